//! What a process around a node needs: logs, spans and the signals that end it.

#[cfg(feature = "otel")]
mod spans;

use std::{
    collections::VecDeque,
    io::{self, IsTerminal},
    sync::{Mutex, PoisonError},
};

use tracing::Subscriber;
use tracing_subscriber::{
    EnvFilter, Layer,
    fmt::{self, MakeWriter, format::FmtSpan},
    layer::SubscriberExt,
    registry::LookupSpan,
    util::SubscriberInitExt,
};

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Sends the logs of this process to stderr. `PONTOON_LOG` filters them, in the syntax of tracing's `EnvFilter`; without
/// it, `default` does. A second call changes nothing.
pub fn init_logs(format: LogFormat, default: &str) {
    let filter = std::env::var("PONTOON_LOG").unwrap_or_default();
    send_logs(format, if filter.is_empty() { default } else { &filter });
}

/// The same with a filter that is known. The last lines are kept in memory too, for `pontoon debug bundle`. A filter that does not
/// read lets errors pass.
pub fn send_logs(format: LogFormat, filter: &str) {
    // An embedder may have set its own subscriber: then that one stays.
    drop(tracing_subscriber::registry().with(filter_of(filter)).with(shown(format)).with(kept()).try_init());
}

/// Where spans go, and how many of them.
#[derive(Debug, Clone, PartialEq)]
pub struct SpanExport {
    /// A collector of OpenTelemetry's that takes OTLP over gRPC, as in `http://127.0.0.1:4317`.
    pub endpoint: String,
    /// The share of the writes whose spans are sent, from 0 to 1. Moves are all sent.
    pub sample: f64,
    /// What tells this process from others, as `service.instance.id`.
    pub instance: String,
}

impl SpanExport {
    /// Whether this build can send spans.
    pub(crate) const BUILT: bool = cfg!(feature = "otel");
    pub(crate) const MISSING: &str = "otel.endpoint is set, but this binary was built without OpenTelemetry: build it with \
         `--features otel`, or take the setting out";
}

/// Spans on their way to a collector.
#[must_use = "what is not sent yet is lost with it"]
#[derive(Debug)]
pub struct Spans {
    #[cfg(feature = "otel")]
    provider: opentelemetry_sdk::trace::SdkTracerProvider,
}

/// [`send_logs`], and spans of writes and moves to a collector, in batches. One that cannot be reached is told in the log and holds
/// nothing up: what it would have got is dropped. Call it within a tokio runtime.
///
/// # Errors
/// A binary without the feature `otel`, an endpoint that is no URL, or a process whose subscriber is set already, in words.
pub fn send_logs_and_spans(format: LogFormat, filter: &str, export: &SpanExport) -> Result<Spans, String> {
    #[cfg(feature = "otel")]
    {
        let provider = spans::provider(export)?;
        // Spans have a filter of their own, so each layer does.
        tracing_subscriber::registry()
            .with(shown(format).with_filter(filter_of(filter)))
            .with(kept().with_filter(filter_of(filter)))
            .with(spans::layer(&provider))
            .try_init()
            .map_err(|error| format!("spans cannot be sent: {error}"))?;
        Ok(Spans { provider })
    }
    #[cfg(not(feature = "otel"))]
    {
        let _ = (format, filter, export);
        Err(SpanExport::MISSING.to_owned())
    }
}

impl Spans {
    /// Sends what is left, for some seconds at most.
    pub async fn finish(self) {
        #[cfg(feature = "otel")]
        let _ = tokio::task::spawn_blocking(move || self.provider.shutdown()).await;
    }
}

fn filter_of(filter: &str) -> EnvFilter {
    EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("error"))
}

/// What goes to stderr.
fn shown<S: Subscriber + for<'a> LookupSpan<'a>>(format: LogFormat) -> Box<dyn Layer<S> + Send + Sync> {
    // Whoever read stderr may be gone: a node serves on without words, it does not panic over them.
    // A span is told when it is closed, with the time that it took; at the usual level there are few.
    let shown = fmt::layer()
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|no| no.is_empty()))
        .with_span_events(FmtSpan::CLOSE)
        .log_internal_errors(false);
    match format {
        LogFormat::Text => shown.boxed(),
        LogFormat::Json => shown.json().boxed(),
    }
}

fn kept<S: Subscriber + for<'a> LookupSpan<'a>>() -> impl Layer<S> {
    fmt::layer().json().with_writer(&RECENT).with_span_events(FmtSpan::CLOSE)
}

/// The last lines of the log, one JSON object each, the oldest first.
pub(crate) fn recent_logs() -> Vec<String> {
    RECENT.lines.lock().unwrap_or_else(PoisonError::into_inner).lines.iter().cloned().collect()
}

static RECENT: Recent = Recent { lines: Mutex::new(Kept { lines: VecDeque::new(), bytes: 0 }) };

/// Lines and bytes that are kept at most.
const KEPT_LINES: usize = 4_000;
const KEPT_BYTES: usize = 1 << 20;

struct Recent {
    lines: Mutex<Kept>,
}

struct Kept {
    lines: VecDeque<String>,
    bytes: usize,
}

impl Kept {
    fn push(&mut self, line: String) {
        self.bytes += line.len();
        self.lines.push_back(line);
        while self.lines.len() > KEPT_LINES || self.bytes > KEPT_BYTES {
            self.bytes -= self.lines.pop_front().map_or(self.bytes, |line| line.len());
        }
    }
}

impl<'a> MakeWriter<'a> for &'static Recent {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line(Vec::new())
    }
}

/// One line as it is written, kept when it is whole.
struct Line(Vec<u8>);

impl io::Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let line = String::from_utf8_lossy(&self.0).trim_end().to_owned();
        if !line.is_empty() {
            RECENT.lines.lock().unwrap_or_else(PoisonError::into_inner).push(line);
        }
    }
}

/// Waits for SIGTERM or Ctrl-C and returns its name.
///
/// # Errors
/// If the handlers cannot be set up.
///
/// # Cancel safety
/// Dropping this misses nothing: a later call waits for the next signal.
pub async fn shutdown_signal() -> io::Result<&'static str> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "Ctrl-C",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_of_the_log_is_bounded_in_lines_and_bytes() {
        let mut kept = Kept { lines: VecDeque::new(), bytes: 0 };
        (0..KEPT_LINES + 5).for_each(|nth| kept.push(nth.to_string()));
        assert_eq!((kept.lines.len(), kept.lines[0].as_str()), (KEPT_LINES, "5"));
        kept.push("x".repeat(KEPT_BYTES - 10));
        assert!(kept.bytes <= KEPT_BYTES && kept.lines.len() < 5, "{} lines", kept.lines.len());
        kept.push("y".repeat(2 * KEPT_BYTES));
        assert_eq!((kept.lines.len(), kept.bytes), (0, 0));
    }
}
