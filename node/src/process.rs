//! What a process around a node needs: logs and the signals that end it.

use std::io::{self, IsTerminal};

use tracing_subscriber::{EnvFilter, fmt};

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
    let filter = EnvFilter::try_from_env("PONTOON_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    // Whoever read stderr may be gone: a node serves on without words, it does not panic over them.
    let builder = fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|no| no.is_empty()))
        .log_internal_errors(false);
    // An embedder may have set its own subscriber: then that one stays.
    drop(match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().try_init(),
    });
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
