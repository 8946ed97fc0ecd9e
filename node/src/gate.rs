//! What stands before every service and page: who may call what, by the one table of [`crate::roles`].

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{StatusCode, Uri, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use tonic::Status;
use tracing::debug;

use crate::{
    audit::Audit,
    caller::Caller,
    roles,
    turned_away::{TurnedAway, Why},
};

/// Where the gate tells of what it does not let through.
#[derive(Debug, Clone)]
pub(crate) struct Gate {
    pub(crate) turned_away: Arc<TurnedAway>,
    pub(crate) audit: Audit,
}

/// Lets a call through that its caller's role allows. Without TLS the callers are local and may call everything.
pub(crate) async fn allowed_only(
    State(Gate { turned_away, audit }): State<Gate>,
    request: Request,
    next: Next,
) -> Response {
    let path = request.uri().path();
    let judged = Caller::of_parts(request.extensions()).and_then(|caller| {
        if caller.role().is_none() {
            return Ok(());
        }
        match roles::allowed(path) {
            Some(roles) => caller.must_be(roles, path),
            None => Err(Status::permission_denied(format!("no role may call {path}"))),
        }
        .and_then(|()| own_page(&request))
        .inspect_err(|status| {
            debug!(%caller, path, reason = status.message(), "a call was denied");
            audit.denied(&caller, path, status);
        })
    });
    match judged {
        Ok(()) => next.run(request).await,
        Err(status) => {
            turned_away.note(Why::Denied);
            denied(&request, status)
        }
    }
}

/// In the words of whoever calls: gRPC's, or a page's.
fn denied(request: &Request, status: Status) -> Response {
    let kind = request.headers().get(header::CONTENT_TYPE);
    match kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc")) {
        true => status.into_http(),
        false => (StatusCode::FORBIDDEN, format!("{}\n", status.message())).into_response(),
    }
}

/// A browser shows its owner's certificate to whatever page asks: only the node's own pages may.
pub(crate) fn own_page(request: &Request) -> Result<(), Status> {
    let Some(origin) = request.headers().get(header::ORIGIN) else { return Ok(()) };
    let origin = origin.to_str().ok().and_then(|origin| origin.parse::<Uri>().ok());
    let named = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
    let host = request.uri().authority().map(|authority| authority.as_str()).or(named);
    match origin.as_ref().and_then(Uri::authority).map(|authority| authority.as_str()) == host
        && host.is_some()
    {
        true => Ok(()),
        false => Err(Status::permission_denied("requests of foreign pages are not answered")),
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    #[test]
    fn foreign_pages_are_told_from_own_ones() {
        let asks = |uri: &str, headers: &[(&str, &str)]| {
            let mut request = Request::builder().uri(uri);
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            own_page(&request.body(Body::empty()).unwrap()).is_ok()
        };
        assert!(asks("/x", &[("host", "db:7400")]), "no page asks");
        assert!(asks("/x", &[("host", "db:7400"), ("origin", "https://db:7400")]));
        assert!(asks("https://db:7400/x", &[("origin", "https://db:7400")]));
        for foreign in ["https://evil.example", "https://db:7401", "null", "https://db:7400.evil.example"] {
            assert!(!asks("/x", &[("host", "db:7400"), ("origin", foreign)]), "{foreign}");
        }
        assert!(!asks("/x", &[("origin", "https://db:7400")]), "no host to compare with");
    }
}
