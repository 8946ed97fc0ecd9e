//! The console: pages for people, served by every node from files in the program, and the JSON that they show.
//!
//! ```text
//!  browser ──> /console/*  files, the same until the program is another
//!          ──> /api/live   one stream per visible page: overview, nodes, problems, moves, events, each when it changes
//!          ──> /api/…      one answer: the matrix, a predicate, the heat map
//!          ──> POST /api/… an order: shown first, then done as it was shown
//! ```
//!
//! - Nothing here shows a key or a value. Names of predicates are shown to whoever may read.
//! - However many look, the cluster is looked at once in a while ([`sight`], [`live`]); nobody looks: it costs nothing.
//! - Orders come from the node's own pages alone ([`act`]), and go the way of the commands': to the leader of the meta group, and
//!   into the audit log.

mod act;
mod files;
mod live;
mod read;
mod sight;

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, Request},
    http::{HeaderValue, StatusCode, header},
    middleware::{Next, from_fn},
    response::{IntoResponse, Response},
    routing::{any, get, post},
};
use serde_json::{Value, json};
use tokio::sync::{Mutex, Semaphore};
use tonic::{Code, Status};

use crate::{
    limits::{LIVE_MOST, ORDER_BYTES},
    shared::Shared,
};

/// What the console of one node keeps while somebody looks.
#[derive(Debug)]
pub(crate) struct Console {
    gaze: Mutex<live::Gaze>,
    sight: Mutex<Option<Arc<sight::Sight>>>,
    places: Arc<Semaphore>,
}

impl Default for Console {
    fn default() -> Self {
        let places = Arc::new(Semaphore::new(LIVE_MOST));
        Console { gaze: Mutex::default(), sight: Mutex::default(), places }
    }
}

/// Everything but what [`crate::service::http`] serves.
pub(crate) fn routes(shared: Arc<Shared>) -> Router {
    let orders = Router::new()
        .route("/api/move/start", post(act::move_start))
        .route("/api/move/cancel", post(act::move_cancel))
        .route("/api/drain", post(act::drain))
        .route("/api/rebalance/plan", post(act::rebalance_plan))
        .route("/api/rebalance/apply", post(act::rebalance_apply))
        .layer(DefaultBodyLimit::max(ORDER_BYTES))
        .layer(from_fn(act::own_pages_only));
    Router::new()
        .route("/", get(files::index))
        .route("/console/{*path}", get(files::file))
        .route("/api/now", get(read::now))
        .route("/api/live", get(live::live))
        .route("/api/matrix", get(read::matrix))
        .route("/api/predicate", get(read::predicate))
        .route("/api/heat", get(read::heat))
        .route("/api/events", get(read::events))
        .route("/api/moves", get(read::moves))
        .route("/api/{*path}", any(nothing))
        .merge(orders)
        .layer(from_fn(careful))
        .with_state(shared)
}

async fn nothing() -> (StatusCode, Json<Value>) {
    (StatusCode::NOT_FOUND, Json(json!({ "error": "there is nothing of that name" })))
}

/// What a browser is told of every answer: nothing from elsewhere is loaded, no other page has this one in a frame or reads it, and
/// no answer is kept that was not said to be.
async fn careful(request: Request, next: Next) -> Response {
    const HEADERS: [(header::HeaderName, &str); 5] = [
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'; \
             require-trusted-types-for 'script'",
        ),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ];
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    for (name, value) in HEADERS {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

/// Why there is no answer, in the words of [`Status`].
struct Refused(Status);

impl From<Status> for Refused {
    fn from(status: Status) -> Self {
        Refused(status)
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let code = match self.0.code() {
            Code::InvalidArgument => StatusCode::BAD_REQUEST,
            Code::PermissionDenied => StatusCode::FORBIDDEN,
            Code::NotFound => StatusCode::NOT_FOUND,
            Code::FailedPrecondition | Code::AlreadyExists | Code::Aborted => StatusCode::CONFLICT,
            Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
            Code::Unavailable | Code::Cancelled | Code::Unknown => StatusCode::SERVICE_UNAVAILABLE,
            Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (code, Json(json!({ "error": self.0.message() }))).into_response()
    }
}

type Answer = Result<Json<Value>, Refused>;
