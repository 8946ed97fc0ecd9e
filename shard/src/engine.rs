//! Engines: where rows live. An ordered map in a few keyspaces, behind one trait.
//!
//! What every engine promises, and `tests/engines.rs` shows of each:
//!
//! 1. A batch is visible whole or not at all, to readers and across a crash of the process or of the power.
//! 2. Batches survive a crash in the order of their commits: what comes back is a prefix of them, at least as long as
//!    what was committed before the last successful [`Engine::flush`].
//! 3. A snapshot shows one point in time for as long as it lives, whatever is written meanwhile.
//! 4. After a failed write or sync nothing succeeds any more ([`Error::Poisoned`]).
//!
//! Keyspaces are shared by all groups (at most [`MAX_KEYSPACES`]): one per group would cost a file set and
//! milliseconds each.

mod fjall;
mod health;
mod marker;
mod memory;
mod sled;

use std::{fmt, path::Path, str::FromStr, sync::Arc};

use bytes::Bytes;

pub use self::{
    fjall::FjallEngine,
    marker::OpenOptions,
    memory::{MemoryDisk, MemoryEngine},
    sled::SledEngine,
};
use crate::error::Error;

/// The largest number of keyspaces that an engine needs to bear.
pub const MAX_KEYSPACES: u8 = 64;

/// Which engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum EngineKind {
    /// A log-structured tree with a journal; the default.
    #[default]
    Fjall,
    /// A page cache over a log.
    Sled,
    /// A map in memory over a simulated disk, for tests: nothing outlives the process.
    Memory,
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            EngineKind::Fjall => "fjall",
            EngineKind::Sled => "sled",
            EngineKind::Memory => "memory",
        })
    }
}

impl FromStr for EngineKind {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "fjall" => Ok(EngineKind::Fjall),
            "sled" => Ok(EngineKind::Sled),
            "memory" => Ok(EngineKind::Memory),
            _ => Err(Error::UnknownEngine { name: text.into() }),
        }
    }
}

/// One of the shared keyspaces, below [`MAX_KEYSPACES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Keyspace(pub u8);

/// One change of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Writes a row over whatever was there.
    Put(Bytes),
    /// Removes the row, if there is one.
    Delete,
}

/// Changes that become visible together. A later change of a key wins over an earlier one.
#[derive(Debug, Clone, Default)]
pub struct WriteBatch {
    changes: Vec<(Keyspace, Bytes, Change)>,
    bytes: usize,
}

impl WriteBatch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a row.
    pub fn put(&mut self, space: Keyspace, key: impl Into<Bytes>, value: impl Into<Bytes>) {
        let (key, value) = (key.into(), value.into());
        self.bytes += key.len() + value.len();
        self.changes.push((space, key, Change::Put(value)));
    }

    /// Removes a row.
    pub fn delete(&mut self, space: Keyspace, key: impl Into<Bytes>) {
        let key = key.into();
        self.bytes += key.len();
        self.changes.push((space, key, Change::Delete));
    }

    /// The changes, in the order they were added.
    pub fn changes(&self) -> &[(Keyspace, Bytes, Change)] {
        &self.changes
    }

    /// How many changes there are.
    pub fn len(&self) -> usize {
        self.changes.len()
    }

    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// Bytes of keys and values together.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// The rows whose keys begin with a prefix in one keyspace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    /// The keyspace.
    pub space: Keyspace,
    /// The prefix; empty for the whole keyspace.
    pub prefix: Bytes,
}

/// What an engine says of itself; 0 where it does not say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineStats {
    /// Bytes of its files.
    pub disk_bytes: u64,
    /// Bytes of its journals, which are among those.
    pub journal_bytes: u64,
    /// Bytes that were written and are in memory alone but for the journal.
    pub buffered_bytes: u64,
    /// Files that are being merged.
    pub compactions_active: u64,
    /// Such merges since it was opened.
    pub compactions: u64,
}

/// An ordered map in keyspaces 0 to [`MAX_KEYSPACES`], shared by all groups of a node.
pub trait Engine: Send + Sync {
    /// Which engine this is.
    fn kind(&self) -> EngineKind;

    /// The value of a key as of now.
    ///
    /// # Errors
    /// The engine's.
    fn get(&self, space: Keyspace, key: &[u8]) -> Result<Option<Bytes>, Error>;

    /// Writes a batch atomically. Visible on return, durable after the next [`Engine::flush`].
    ///
    /// # Errors
    /// The engine's, then the batch is not visible; [`Error::Poisoned`], [`Error::Closed`].
    fn write(&self, batch: WriteBatch) -> Result<(), Error>;

    /// A point-in-time view of the rows in `scope`; keys outside of it may not be asked for.
    ///
    /// # Errors
    /// The engine's.
    fn snapshot(&self, scope: Vec<Scope>) -> Result<Box<dyn EngineSnapshot>, Error>;

    /// Makes every batch that returned before this call durable, by a real fsync.
    ///
    /// # Errors
    /// The engine's; from then on every flush and write fails.
    fn flush(&self) -> Result<(), Error>;

    /// Adds rows in ascending key order that nobody reads before a later batch says so: not atomic, visible on
    /// return, durable like a batch.
    ///
    /// # Errors
    /// The engine's; any part of the rows may then be visible.
    fn ingest(&self, space: Keyspace, rows: &[(Bytes, Bytes)]) -> Result<(), Error> {
        for chunk in rows.chunks(1024) {
            let mut batch = WriteBatch::new();
            for (key, value) in chunk {
                batch.put(space, key.clone(), value.clone());
            }
            self.write(batch)?;
        }
        Ok(())
    }

    /// Removes up to `max_rows` rows with the prefix; true once none is left. Open snapshots still see them.
    ///
    /// # Errors
    /// The engine's.
    fn delete_prefix(&self, space: Keyspace, prefix: &[u8], max_rows: usize) -> Result<bool, Error> {
        let snapshot = self.snapshot(vec![Scope { space, prefix: Bytes::copy_from_slice(prefix) }])?;
        let mut batch = WriteBatch::new();
        let mut more = false;
        snapshot.scan(space, prefix, prefix_end(prefix).as_deref(), &mut |key, _| {
            more = batch.len() >= max_rows;
            if !more {
                batch.delete(space, Bytes::copy_from_slice(key));
            }
            !more
        })?;
        drop(snapshot);
        self.write(batch)?;
        Ok(!more)
    }

    /// What it says of itself.
    fn stats(&self) -> EngineStats {
        EngineStats::default()
    }

    /// Why nothing succeeds any more until the next open, once a write or a sync has failed.
    fn failure(&self) -> Option<String>;

    /// Flushes and marks the directory as closed in order. Later calls answer [`Error::Closed`]; snapshots live on.
    /// Idempotent.
    ///
    /// # Errors
    /// The engine's; the directory then counts as not closed.
    fn close(&self) -> Result<(), Error>;
}

/// A point in time. Dropping it lets the engine forget what it kept for it.
pub trait EngineSnapshot: Send + Sync {
    /// The value of a key at that time.
    ///
    /// # Errors
    /// The engine's.
    fn get(&self, space: Keyspace, key: &[u8]) -> Result<Option<Bytes>, Error>;

    /// Visits the rows in [low, high) in key order until `visit` returns false; `high` of `None` has no end.
    ///
    /// # Errors
    /// The engine's.
    fn scan(
        &self,
        space: Keyspace,
        low: &[u8],
        high: Option<&[u8]>,
        visit: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), Error>;
}

/// Opens the engine in `dir`, which is made if it is missing. [`EngineKind::Memory`] does not touch the disk.
///
/// # Errors
/// [`Error::OtherEngine`], [`Error::NewerFormat`], [`Error::Foreign`], [`Error::Locked`], [`Error::Untrusted`], and
/// the engine's own.
pub fn open(kind: EngineKind, dir: &Path) -> Result<Arc<dyn Engine>, Error> {
    open_with(kind, dir, &OpenOptions::default())
}

/// [`open`], with what is normally asked of the system passed in.
///
/// # Errors
/// As [`open`].
pub fn open_with(kind: EngineKind, dir: &Path, options: &OpenOptions) -> Result<Arc<dyn Engine>, Error> {
    Ok(match kind {
        EngineKind::Fjall => Arc::new(FjallEngine::open(dir, options)?),
        EngineKind::Sled => Arc::new(SledEngine::open(dir, options)?),
        EngineKind::Memory => Arc::new(MemoryEngine::open(&MemoryDisk::new())),
    })
}

/// The first key after every key with this prefix; `None` if there is no such key.
pub(crate) fn prefix_end(prefix: &[u8]) -> Option<Vec<u8>> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return Some(end);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_read_and_print_the_same() {
        for kind in [EngineKind::Fjall, EngineKind::Sled, EngineKind::Memory] {
            assert_eq!(kind.to_string().parse::<EngineKind>().unwrap(), kind);
        }
        assert!(matches!("rocks".parse::<EngineKind>(), Err(Error::UnknownEngine { .. })));
    }

    #[test]
    fn a_prefix_ends_before_the_next_one() {
        assert_eq!(prefix_end(b"ab"), Some(b"ac".to_vec()));
        assert_eq!(prefix_end(&[1, 255]), Some(vec![2]));
        assert_eq!(prefix_end(&[255, 255]), None);
        assert_eq!(prefix_end(b""), None);
    }
}
