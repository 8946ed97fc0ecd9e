//! What can go wrong, one variant per thing that a caller does about it.

use std::{io, path::PathBuf, sync::Arc};

use pontoon_proto::GroupId;

use crate::{KeyId, types::Damage};

/// The result of an operation on the log.
pub type Result<T> = std::result::Result<T, Error>;

/// Why the log refused or failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Too much waits for the disk, in all or of the group; nothing was taken. Try again when earlier batches are
    /// acknowledged.
    #[error("{pending_bytes} bytes wait for the disk already; try again later")]
    Busy {
        /// Bytes that wait, in all or of the group.
        pending_bytes: u64,
    },
    /// No room on the disk or below the size limit; nothing was taken. Truncate, destroy or make room.
    #[error(
        "the log has no room for {needed_bytes} more bytes; truncate or remove groups, raise the size limit or free disk space"
    )]
    NoSpace {
        /// Bytes that were asked for.
        needed_bytes: u64,
    },
    /// One group holds as much as it may. The others go on.
    #[error(
        "{group} holds {held_bytes} bytes of the log, its quota is {quota_bytes}; truncate it, or raise the quota"
    )]
    Quota {
        /// The group.
        group: GroupId,
        /// What its entries take.
        held_bytes: u64,
        /// What they may take.
        quota_bytes: u64,
    },
    /// A write or sync failed earlier. Nothing that was not acknowledged by then will ever be; open the log again.
    #[error("the log stopped after a failure: {cause}; restart to recover what was acknowledged")]
    Poisoned {
        /// The failure.
        cause: Arc<Error>,
    },
    /// A batch, an entry or a value is above its limit.
    #[error("{what} has {size} bytes, the limit is {limit}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// Its size.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// An append does not continue the group's log, or its entries do not continue each other.
    #[error("{group} continues at index {expected}, not at {found}")]
    Gap {
        /// The group.
        group: GroupId,
        /// The highest index that may come next.
        expected: u64,
        /// What came.
        found: u64,
    },
    /// A truncation names another term than the log has at that index.
    #[error("{group} has term {ours} at index {index}, not {given}")]
    TermMismatch {
        /// The group.
        group: GroupId,
        /// The index.
        index: u64,
        /// The term in the log.
        ours: u64,
        /// The term that was given.
        given: u64,
    },
    /// The index was truncated away.
    #[error("entries below index {first} are gone")]
    Compacted {
        /// The first index that is still there.
        first: u64,
    },
    /// The index is not in the log yet.
    #[error("entries above index {last} do not exist")]
    Unavailable {
        /// The last index that exists.
        last: u64,
    },
    /// The group has no snapshot that reaches its log. Make one and ask again.
    #[error(
        "{group} has no snapshot at or above index {needed} yet, the newest is at {newest}; make one and ask again"
    )]
    SnapshotUnavailable {
        /// The group.
        group: GroupId,
        /// The newest snapshot's index, 0 for none.
        newest: u64,
        /// The lowest index that would do.
        needed: u64,
    },
    /// The group lost acknowledged data. It takes nothing but `destroy`.
    #[error("{group} is damaged ({damage}); destroy it and replace the replica")]
    Damaged {
        /// The group.
        group: GroupId,
        /// What is lost.
        damage: Damage,
    },
    /// Bytes that were acknowledged are not what was written.
    #[error("{} is corrupt at offset {offset}: {what}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// The offset in it.
        offset: u64,
        /// What is wrong.
        what: String,
    },
    /// Another process has the log open.
    #[error("{} is in use by another process; stop it or choose another directory", path.display())]
    Locked {
        /// The directory.
        path: PathBuf,
    },
    /// The directory is not a log.
    #[error("{} is not a log: {what}; choose an empty or a new directory", path.display())]
    Foreign {
        /// The directory or file.
        path: PathBuf,
        /// What was found there.
        what: String,
    },
    /// The log was written by a newer version.
    #[error("{} has format {found}, this version reads up to {supported}; use the newer version", path.display())]
    NewerFormat {
        /// The file.
        path: PathBuf,
        /// Its format version.
        found: u32,
        /// The newest that is known here.
        supported: u32,
    },
    /// The log is encrypted, and a key that it needs is not there or is not the right one. Nothing was written.
    #[error("{} needs key {key_id}: {fault}", dir.display())]
    Key {
        /// The log's directory.
        dir: PathBuf,
        /// The number of the key.
        key_id: KeyId,
        /// What is the matter with it.
        fault: KeyFault,
    },
    /// The provider of keys does not answer.
    #[error("cannot get the keys for {}: {source}", dir.display())]
    KeySource {
        /// The log's directory.
        dir: PathBuf,
        /// What the provider said.
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// An option does not make sense.
    #[error("{option}: {reason}")]
    BadOption {
        /// The option.
        option: &'static str,
        /// Why it is refused.
        reason: String,
    },
    /// The file system failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// The log was closed.
    #[error("the log is closed")]
    Closed,
    /// The log is stepped by hand and cannot make progress until the file system completes an operation.
    #[error("the log waits for the file system; complete its operations and step again")]
    Stalled,
}

/// What is the matter with a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyFault {
    /// The log was opened without keys.
    #[error("it is encrypted and was opened without keys; open it with the keys that it was written with")]
    NoKeys,
    /// The provider does not know it.
    #[error("it is not in {provider}; put it back there, what was written with it cannot be read without it")]
    Missing {
        /// The provider.
        provider: String,
    },
    /// What was written with it does not open with it.
    #[error(
        "{} does not open with the key of that number in {provider}: it was written with another key, or changed since; \
         put the right key back under that number, or restore the directory", file.display()
    )]
    Wrong {
        /// The provider.
        provider: String,
        /// The file.
        file: PathBuf,
    },
}

impl Error {
    /// Wraps what the file system said.
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Error {
        Error::Io { action, path: path.into(), source: Arc::new(source) }
    }

    /// Whether the disk is full, which passes, other than a disk that fails.
    pub(crate) fn is_disk_full(&self) -> bool {
        matches!(self, Error::Io { source, .. }
            if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
    }
}
