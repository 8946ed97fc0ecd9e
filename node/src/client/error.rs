//! What a call of the client may end with, by what its caller does next.

use tonic::{Code, Status};

/// Why a call has no answer. Every message names the thing and the next step.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// No address answers.
    #[error(
        "nobody answers at {address} ({reason}); start a node with `pontoon node --dir D --listen ADDR`, or name another with --addr"
    )]
    NobodyAnswers {
        /// What was tried.
        address: String,
        /// What was heard last.
        reason: String,
    },
    /// A node answers, but nobody in the cluster can decide.
    #[error(
        "{address} answers but cannot ask the meta group ({reason}); `pontoon status` shows which nodes are missing, start them; \
         if they are lost for good, see `pontoon recover plan --help`"
    )]
    NoMetaLeader {
        /// Who was asked.
        address: String,
        /// What was heard last.
        reason: String,
    },
    /// The client's certificates cannot be used.
    #[error("{reason}")]
    Tls {
        /// Which file, what is wrong with it, and the next step.
        reason: String,
    },
    /// The address is not one.
    #[error("{address} is not HOST:PORT: {reason}")]
    Address {
        /// What was given.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The predicate was never made, or was dropped.
    #[error("there is no predicate {predicate}; `pontoon predicates` lists them, the first write makes one")]
    NoSuchPredicate {
        /// Its name.
        predicate: String,
    },
    /// The predicate is of another kind than the call is for; nothing was done.
    #[error("{reason}")]
    WrongKind {
        /// A `ShardKind`, or an embedder's own from 1000 on.
        kind: i32,
        /// What it is, with the commands that it takes.
        reason: String,
    },
    /// There is no such log.
    #[error("there is no log {log}; `pontoon log list` lists them, `pontoon log create {log}` makes it")]
    NoSuchLog {
        /// Its name.
        log: String,
    },
    /// The log has no record at the offset, and the next one will not come there either.
    #[error(
        "{log} has the offsets [{lowest}, {next}), era {era}, and not {offset}; `pontoon log read {log}` begins at the lowest"
    )]
    NoSuchOffset {
        /// The log.
        log: String,
        /// What was asked for.
        offset: u64,
        /// The lowest offset that it has.
        lowest: u64,
        /// The offset of the next record.
        next: u64,
        /// How often it was reset, and one.
        era: u64,
    },
    /// An append expected another offset; nothing was appended.
    #[error(
        "{log} goes on at offset {next}, not at {expected}; nothing was appended: read on from {expected} and append again"
    )]
    UnexpectedOffset {
        /// The log.
        log: String,
        /// What was expected.
        expected: u64,
        /// Where it goes on.
        next: u64,
    },
    /// Over a limit; nothing was proposed.
    #[error("the {what} has {size} bytes, the limit is {limit}; split it")]
    TooLarge {
        /// Which thing.
        what: String,
        /// Its size.
        size: u64,
        /// What it may have.
        limit: u64,
    },
    /// A node that the predicate needs for writes has no room; nothing was written.
    #[error(
        "{predicate} takes no writes: the disk of node {node} is nearly full; free space there, or move predicates away with `pontoon move start`"
    )]
    DiskFull {
        /// The predicate.
        predicate: String,
        /// Whose disk.
        node: u64,
    },
    /// Refused without effect.
    #[error("{reason}")]
    Refused {
        /// Why, with the next step.
        reason: String,
    },
    /// The group forgot this client's session.
    #[error(
        "the session with the group has expired, so whether the write was applied cannot be told; read the row"
    )]
    SessionExpired {
        /// Whether an earlier sending of the request may have been applied. If not, it was not applied.
        sent_before: bool,
    },
    /// The deadline passed, and nothing was done.
    #[error(
        "{predicate} was not served within {seconds:.1} s ({reason}); `pontoon status` and `pontoon groups --problem` show why"
    )]
    Late {
        /// The predicate that was asked.
        predicate: String,
        /// How long it was tried.
        seconds: f64,
        /// What was heard last.
        reason: String,
    },
    /// The deadline passed, and a write may or may not have been applied.
    #[error(
        "whether the write to {predicate} was applied is not known ({reason}); read the row, or write again"
    )]
    Unknown {
        /// The predicate that was asked.
        predicate: String,
        /// What was heard last.
        reason: String,
    },
}

impl ClientError {
    /// What a gRPC status of a node means for the caller.
    pub(crate) fn of(status: &Status) -> Self {
        ClientError::Refused { reason: words(status) }
    }
}

/// A status in words: its message, and what lies beneath if it is the connection.
pub(super) fn words(status: &Status) -> String {
    use std::error::Error;
    let mut deepest: Option<&dyn Error> = status.source();
    while let Some(next) = deepest.and_then(|error| error.source()) {
        deepest = Some(next);
    }
    match deepest {
        Some(error) => explained(error.to_string()),
        None if status.code() == Code::Unimplemented => {
            "the node does not know this call: it runs an older release than this client; upgrade it, or use the command of its release"
                .to_owned()
        }
        None if status.message().is_empty() => format!("{:?}", status.code()),
        None => status.message().to_owned(),
    }
}

/// HTTP/2 takes the first bytes of a TLS answer for a frame, whose length they are not.
const NO_FRAME: &str = "frame with invalid size";

fn explained(reason: String) -> String {
    match reason.ends_with(NO_FRAME) {
        true => format!(
            "what came is not HTTP/2 ({reason}): the node most likely speaks TLS, then show a certificate: --tls-cert, --tls-key and --tls-ca"
        ),
        false => reason,
    }
}

/// Whether the same call may fare better elsewhere or later.
pub(super) fn passes(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable
            | Code::Unknown
            | Code::Cancelled
            | Code::DeadlineExceeded
            | Code::Aborted
            | Code::Internal
            | Code::ResourceExhausted
    )
}
