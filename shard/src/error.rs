//! Why something in this crate did not happen.

use std::path::PathBuf;

use pontoon_proto::GroupId;

use crate::{engine::EngineKind, log::LogBounds};

/// Everything that can go wrong here. A variant exists because a caller acts differently on it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The name is none of the engines'.
    #[error("unknown engine {name:?}: choose fjall, sled or memory")]
    UnknownEngine {
        /// What was asked for.
        name: String,
    },
    /// The directory was written by another engine.
    #[error("{} holds data of the engine {found}, not {wanted}: start with --engine {found}, or use an empty directory", path.display())]
    OtherEngine {
        /// The directory.
        path: PathBuf,
        /// Whose data it holds.
        found: String,
        /// What was asked for.
        wanted: EngineKind,
    },
    /// A later version wrote the directory.
    #[error("{} has engine format {found}; this version knows up to {known}: use the version that wrote it", path.display())]
    NewerFormat {
        /// The directory.
        path: PathBuf,
        /// The format found.
        found: u32,
        /// The newest format known here.
        known: u32,
    },
    /// The directory holds something that no engine of ours made.
    #[error("{} is not an engine's directory ({reason}): use an empty one", path.display())]
    Foreign {
        /// The directory or file.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// Another process uses the directory.
    #[error("{} is in use by another process: stop it, or use another directory", path.display())]
    Locked {
        /// The directory.
        path: PathBuf,
    },
    /// The operating system went down over an open sled directory: sled's files may be older than what it had
    /// reported durable, so nothing in them can be trusted.
    #[error(
        "{} was open in sled when the operating system went down, so its contents are untrusted: \
         its states must come from other nodes, or from a backup",
        path.display()
    )]
    Untrusted {
        /// The directory.
        path: PathBuf,
    },
    /// The engine cannot read what the directory holds.
    #[error(
        "{} does not open in {kind} ({source}): its states must come from other nodes, or from a backup",
        path.display()
    )]
    Unreadable {
        /// The directory.
        path: PathBuf,
        /// The engine.
        kind: EngineKind,
        /// What the engine said.
        source: Box<Error>,
    },
    /// A write or sync failed before; nothing after it can be promised.
    #[error("the engine stopped after a failed write or sync: restart the node")]
    Poisoned,
    /// The engine's own threads failed at a flush or a compaction.
    #[error("the engine stopped after a failure in the background; its log line before this says which")]
    Background,
    /// The engine was closed.
    #[error("the engine is closed")]
    Closed,
    /// A file operation failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The engine fjall failed.
    #[error("fjall: {0}")]
    Fjall(#[from] fjall::Error),
    /// The engine sled failed.
    #[error("sled: {0}")]
    Sled(#[from] sled::Error),
    /// A row of ours does not read as what it should be.
    #[error("{group}: {what} is damaged in the engine")]
    Damaged {
        /// The group whose row it is; group 0 if the row names none.
        group: GroupId,
        /// Which row.
        what: &'static str,
    },
    /// A later version wrote this; skipping it would let replicas differ.
    #[error(
        "{group}: {what} has format {found}; this version knows up to {known}: use the version that wrote it"
    )]
    UnknownFormat {
        /// The group.
        group: GroupId,
        /// Which row or command.
        what: &'static str,
        /// The format found.
        found: u32,
        /// The newest format known here.
        known: u32,
    },
    /// A kind of machine that this version does not have.
    #[error("{group} is of the kind {kind}, which this version cannot serve")]
    UnknownKind {
        /// The group.
        group: GroupId,
        /// The kind as found.
        kind: String,
    },
    /// A stage was handed to a machine that did not make it, or was abandoned meanwhile.
    #[error("{group}: the staged generation is no longer wanted")]
    StaleStage {
        /// The group.
        group: GroupId,
    },
    /// The replica's rows were removed from this engine.
    #[error("{group} holds nothing here any more")]
    Gone {
        /// The group.
        group: GroupId,
    },
    /// A key is too long.
    #[error("a key of {len} bytes is over the limit of {max}")]
    KeyTooLarge {
        /// Its length.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// A value is too long.
    #[error("a value of {len} bytes is over the limit of {max}")]
    ValueTooLarge {
        /// Its length.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// A command has no operations, or too many.
    #[error("a command holds 1 to {max} operations, not {count}: split it")]
    OpCount {
        /// How many it has.
        count: usize,
        /// The limit.
        max: usize,
    },
    /// A command's operations are too large together.
    #[error("a command of {len} bytes is over the limit of {max}: split it")]
    CommandTooLarge {
        /// Its encoded length.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// A log cannot begin at so high an offset.
    #[error("the offset {offset} is over the limit of {max}")]
    OffsetTooLarge {
        /// The offset.
        offset: u64,
        /// The limit.
        max: u64,
    },
    /// A log has no record at an offset, and will not append the next one there either.
    #[error("{group} has no offset {offset}: it has [{}, {})", bounds.lowest, bounds.next)]
    NoSuchOffset {
        /// The group.
        group: GroupId,
        /// What was asked for.
        offset: u64,
        /// What there is.
        bounds: LogBounds,
    },
    /// A message does not decode.
    #[error("not a valid message: {0}")]
    Decode(#[from] prost::DecodeError),
}
