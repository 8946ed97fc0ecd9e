//! Looking at a log without writing to it or locking it.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    path::Path,
    sync::Arc,
};

use bytes::Bytes;
use pontoon_proto::GroupId;
use uuid::Uuid;

use crate::{
    Entry, Error, Fs, GroupView, KeyId, KeyProvider, Options, Pinned, RecoveryReport, Result, Usage,
    crypt::Keyring,
    read::{self, Page, Wait},
    recovery,
    shared::Shared,
    tools::{self, CheckReport},
};

/// A log as it stood on disk when it was opened. Nothing is written, locked or synced: for tools. While another process
/// has the log open, entries that it truncates later may stop to be readable.
pub struct WalReader {
    shared: Arc<Shared>,
    report: RecoveryReport,
}

impl WalReader {
    /// Opens the log in a directory of this file system.
    ///
    /// # Errors
    /// As [`Wal::open`](crate::Wal::open), but never `Locked`.
    pub fn open(fs: Arc<dyn Fs>, dir: &Path) -> Result<WalReader> {
        WalReader::open_with(fs, dir, None)
    }

    /// Opens the log in a directory of this file system with the keys that it may need.
    ///
    /// # Errors
    /// As [`WalReader::open`].
    pub fn open_with(fs: Arc<dyn Fs>, dir: &Path, keys: Option<Arc<dyn KeyProvider>>) -> Result<WalReader> {
        let keyring = Keyring::new(dir, keys.clone())?;
        let loaded = recovery::load(&*fs, dir, &keyring)?;
        let loaded = loaded.ok_or_else(|| Error::Foreign {
            path: dir.to_owned(),
            what: "it holds no manifest".to_owned(),
        })?;
        let mut options = Options { fs, cache_bytes: 0, keys, ..Options::new(dir) };
        let (parts, report) = recovery::recover(&mut options, keyring, loaded, true)?;
        Ok(WalReader { shared: Arc::new(Shared::new(options, parts)), report })
    }

    /// What recovery would report.
    pub fn report(&self) -> &RecoveryReport {
        &self.report
    }

    /// The store's id.
    pub fn store_id(&self) -> Uuid {
        Uuid::from_u128(self.shared.identity.store)
    }

    /// All groups, ascending.
    pub fn groups(&self) -> Vec<GroupId> {
        self.shared.group_ids()
    }

    /// As [`Wal::group`](crate::Wal::group).
    pub fn group(&self, group: GroupId) -> Option<GroupView> {
        let tombstone = self.tombstone(group);
        self.shared.index.with(group, |state| state.view(tombstone))
    }

    /// As [`Wal::entries`](crate::Wal::entries).
    ///
    /// # Errors
    /// As there.
    pub fn entries(
        &self,
        group: GroupId,
        range: Range<u64>,
        max_bytes: u64,
        out: &mut Vec<Entry>,
    ) -> Result<()> {
        read::entries(&self.shared, group, range, max_bytes, Wait::Disk, out).map(drop)
    }

    /// Reads a page of what is there of a group's entries in a range, damaged or not, and names what is not readable. The
    /// range is cut to the group's bounds; a page ends with the record that reaches `max_bytes`.
    ///
    /// # Errors
    /// [`Error::Io`]. A group that does not exist has an empty page.
    pub fn salvage(&self, group: GroupId, range: Range<u64>, max_bytes: u64) -> Result<Page> {
        read::salvage(&self.shared, group, range, max_bytes)
    }

    /// Reads every frame, record and entry, whatever opening the log took on trust. The directory is read anew.
    ///
    /// # Errors
    /// As [`tools::check`].
    pub fn check(&self) -> Result<CheckReport> {
        let options = &self.shared.options;
        tools::check(options.fs.clone(), &options.dir, options.keys.clone())
    }

    /// As [`Wal::key_ids_in_use`](crate::Wal::key_ids_in_use), without the one that would be written with.
    pub fn key_ids_in_use(&self) -> BTreeSet<KeyId> {
        self.shared.key_ids_on_disk()
    }

    /// All metadata of a group, ascending by key.
    pub fn all_meta(&self, group: GroupId) -> Vec<(Bytes, Bytes)> {
        self.shared.all_meta(group)
    }

    /// The minimum replica ids of groups that were destroyed here.
    pub fn tombstones(&self) -> BTreeMap<GroupId, u64> {
        self.shared.index.tombstones()
    }

    /// The log's directory.
    pub fn dir(&self) -> &Path {
        &self.shared.options.dir
    }

    /// Bytes per segment.
    pub fn segment_bytes(&self) -> u64 {
        self.shared.options.segment_bytes
    }

    /// As [`Wal::meta`](crate::Wal::meta).
    pub fn meta(&self, group: GroupId, key: &[u8]) -> Option<Bytes> {
        self.shared.index.with(group, |state| state.meta_of(key))?
    }

    /// As [`Wal::tombstone`](crate::Wal::tombstone).
    pub fn tombstone(&self, group: GroupId) -> Option<u64> {
        self.shared.index.tombstone(group)
    }

    /// As [`Wal::usage`](crate::Wal::usage).
    pub fn usage(&self) -> Usage {
        self.shared.usage()
    }

    /// As [`Wal::pinned`](crate::Wal::pinned).
    pub fn pinned(&self, n: usize) -> Vec<Pinned> {
        self.shared.pinned(n)
    }
}

impl std::fmt::Debug for WalReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WalReader").field("dir", &self.shared.options.dir).finish_non_exhaustive()
    }
}
