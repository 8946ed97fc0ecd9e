//! Raft's own log lines, bridged into tracing.

use slog::{Drain, KV, Level, Never, OwnedKVList, Record};

/// A logger for raft that writes to tracing with the group's name.
pub(crate) fn raft_logger(group: pontoon_proto::GroupId) -> slog::Logger {
    slog::Logger::root(Bridge, slog::o!("group" => group.to_string()))
}

struct Bridge;

impl Drain for Bridge {
    type Ok = ();
    type Err = Never;

    fn log(&self, record: &Record<'_>, context: &OwnedKVList) -> Result<(), Never> {
        // A node opens thousands of groups: raft's informational lines are for debugging.
        match record.level() {
            Level::Critical | Level::Error => {
                tracing::error!(target: "raft", "{} {}", fields(record, context), record.msg());
            }
            Level::Warning => tracing::warn!(target: "raft", "{} {}", fields(record, context), record.msg()),
            Level::Info | Level::Debug => {
                if tracing::enabled!(target: "raft", tracing::Level::DEBUG) {
                    tracing::debug!(target: "raft", "{} {}", fields(record, context), record.msg());
                }
            }
            Level::Trace => {}
        }
        Ok(())
    }
}

fn fields(record: &Record<'_>, context: &OwnedKVList) -> String {
    struct Text(String);
    impl slog::Serializer for Text {
        fn emit_arguments(&mut self, key: slog::Key, value: &std::fmt::Arguments<'_>) -> slog::Result {
            use std::fmt::Write as _;
            let separator = if self.0.is_empty() { "" } else { " " };
            write!(self.0, "{separator}{key}={value}").map_err(|_| slog::Error::Other)
        }
    }
    let mut text = Text(String::new());
    // A field that cannot be printed is left out; the line itself still appears.
    let _ = context.serialize(record, &mut text);
    let _ = record.kv().serialize(record, &mut text);
    text.0
}
