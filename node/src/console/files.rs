//! The files of the console, in the program.

use std::sync::LazyLock;

use axum::{
    extract::Path,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};

struct File {
    path: &'static str,
    kind: &'static str,
    content: &'static str,
}

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const PICTURE: &str = "image/svg+xml";

macro_rules! files {
    ($($path:literal $kind:ident)*) => {
        const FILES: &[File] = &[
            $(File { path: $path, kind: $kind, content: include_str!(concat!("../../console/", $path)) },)*
        ];
    };
}

files! {
    "index.html" HTML
    "style.css" CSS
    "icon.svg" PICTURE
    "app.js" SCRIPT
    "api.js" SCRIPT
    "charts.js" SCRIPT
    "dialogs.js" SCRIPT
    "dom.js" SCRIPT
    "grid.js" SCRIPT
    "live.js" SCRIPT
    "parts.js" SCRIPT
    "words.js" SCRIPT
    "pages/overview.js" SCRIPT
    "pages/matrix.js" SCRIPT
    "pages/moves.js" SCRIPT
    "pages/problems.js" SCRIPT
    "pages/nodes.js" SCRIPT
    "pages/predicate.js" SCRIPT
    "pages/heat.js" SCRIPT
    "pages/events.js" SCRIPT
}

/// One tag for all: files of two programs are not mixed.
static TAG: LazyLock<String> = LazyLock::new(|| {
    let mut hash = blake3::Hasher::new();
    for file in FILES {
        hash.update(file.content.as_bytes());
    }
    format!("\"{}\"", &hash.finalize().to_hex()[..16])
});

pub(super) async fn index(headers: HeaderMap) -> Response {
    serve("index.html", &headers)
}

pub(super) async fn file(Path(path): Path<String>, headers: HeaderMap) -> Response {
    serve(&path, &headers)
}

fn serve(path: &str, headers: &HeaderMap) -> Response {
    let Some(file) = FILES.iter().find(|file| file.path == path) else {
        return (StatusCode::NOT_FOUND, "the console has no such file\n").into_response();
    };
    // Always asked for anew, and sent anew only with another program.
    let kept = [(header::ETAG, TAG.as_str()), (header::CACHE_CONTROL, "no-cache")];
    match headers.get(header::IF_NONE_MATCH).is_some_and(|tag| tag.as_bytes() == TAG.as_bytes()) {
        true => (StatusCode::NOT_MODIFIED, kept).into_response(),
        false => (kept, [(header::CONTENT_TYPE, file.kind)], file.content).into_response(),
    }
}
