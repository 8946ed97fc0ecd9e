//! What a process around a node needs: logs and the signals that end it.

use std::{
    collections::VecDeque,
    io::{self, IsTerminal},
    sync::{Mutex, PoisonError},
};

use tracing_subscriber::{
    EnvFilter, Layer,
    fmt::{self, MakeWriter, format::FmtSpan},
    layer::SubscriberExt,
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
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("error"));
    // Whoever read stderr may be gone: a node serves on without words, it does not panic over them.
    // A span is told when it is closed, with the time that it took; at the usual level there are few.
    let shown = fmt::layer()
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|no| no.is_empty()))
        .with_span_events(FmtSpan::CLOSE)
        .log_internal_errors(false);
    let shown = match format {
        LogFormat::Text => shown.boxed(),
        LogFormat::Json => shown.json().boxed(),
    };
    let kept = fmt::layer().json().with_writer(&RECENT).with_span_events(FmtSpan::CLOSE);
    // An embedder may have set its own subscriber: then that one stays.
    drop(tracing_subscriber::registry().with(filter).with(shown).with(kept).try_init());
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
