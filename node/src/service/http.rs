//! Plain HTTP on the node's port, and the rule that keeps web pages out.

use std::{net::IpAddr, sync::Arc};

use axum::{
    Router,
    extract::{Request, State},
    http::{StatusCode, Uri, header},
    middleware::Next,
    response::{IntoResponse, Response},
    routing::get,
};

use crate::{metrics, shared::Shared};

/// `/healthz` (the process lives), `/readyz` (it serves clients as it should, and what is wrong) and `/metrics`.
pub(crate) fn routes(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(shared)
}

/// A line for the verdict, then one for each problem, also for those that keep nobody away.
async fn ready(State(shared): State<Arc<Shared>>) -> Response {
    let (status, mut text) = match shared.not_ready() {
        None => (StatusCode::OK, "ready\n".to_owned()),
        Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {reason}\n")),
    };
    shared.health.problems().iter().for_each(|problem| text.push_str(&format!("{problem}\n")));
    (status, text).into_response()
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    // It looks at files, and at every replica.
    match tokio::task::spawn_blocking(move || metrics::page(&shared)).await {
        Ok(page) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], page).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

/// Lets through only calls that name this machine. A node without TLS trusts every local user, but a page in a local
/// browser is not one: its host name, bound to 127.0.0.1 by a hostile resolver, or its origin gives it away.
pub(crate) async fn local_only(request: Request, next: Next) -> Response {
    let host = request
        .uri()
        .host()
        .map(str::to_owned)
        .or_else(|| header_text(&request, header::HOST).and_then(|host| host_of(&host)));
    if !host.as_deref().is_some_and(is_loopback) {
        return (StatusCode::FORBIDDEN, "this node answers to loopback host names only\n").into_response();
    }
    if let Some(origin) = header_text(&request, header::ORIGIN)
        && !origin.parse::<Uri>().ok().and_then(|origin| origin.host().map(is_loopback)).unwrap_or(false)
    {
        return (StatusCode::FORBIDDEN, "requests of foreign pages are not answered\n").into_response();
    }
    next.run(request).await
}

fn header_text(request: &Request, name: header::HeaderName) -> Option<String> {
    request.headers().get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
}

fn host_of(authority: &str) -> Option<String> {
    authority.parse::<axum::http::uri::Authority>().ok().map(|authority| authority.host().to_owned())
}

fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare.eq_ignore_ascii_case("localhost")
        || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_machine_are_loopback() {
        for good in ["localhost", "LOCALHOST", "127.0.0.1", "127.1.2.3", "[::1]", "::1"] {
            assert!(is_loopback(good), "{good}");
        }
        for bad in ["example.com", "localhost.example.com", "10.0.0.1", "0.0.0.0", ""] {
            assert!(!is_loopback(bad), "{bad}");
        }
        assert_eq!(host_of("127.0.0.1:80").as_deref(), Some("127.0.0.1"));
    }
}
