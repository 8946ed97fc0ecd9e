//! The view of one group in the shape that single-group logs have: save, snapshots, entries, a few integers.

use bytes::Bytes;
use pontoon_proto::GroupId;

use crate::{
    Batch, Error, Lsn, Result,
    types::{ConfState, Entry, GroupView, HardState, SnapshotMeta},
    wal::Wal,
};

/// Integers that a group keeps in its metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetaInt {
    /// The replica's Raft id.
    RaftId,
    /// The id of the group that the replica serves.
    GroupId,
    /// The index up to which the caller's state is safe elsewhere.
    CheckpointIndex,
}

impl MetaInt {
    fn key(self) -> &'static [u8] {
        match self {
            MetaInt::RaftId => b"int.raft-id",
            MetaInt::GroupId => b"int.group-id",
            MetaInt::CheckpointIndex => b"int.checkpoint",
        }
    }
}

/// One group of a log. Whatever it writes is durable on return. Clones are cheap.
///
/// # Examples
///
/// ```
/// # fn main() -> pontoon_wal::Result<()> {
/// # let parent = tempfile::tempdir().unwrap();
/// # let mut options = pontoon_wal::Options::new(parent.path().join("log"));
/// # options.segment_bytes = 1 << 20;
/// # let (wal, _) = pontoon_wal::Wal::open(options)?;
/// use pontoon_wal::{Entry, GroupId, HardState};
///
/// let storage = wal.storage(GroupId(7));
/// let entry = Entry { index: 1, term: 1, kind: 0, data: "hello".into() };
/// storage.save(&HardState { term: 1, vote: 1, commit: 1 }, &[entry], None)?;
/// assert_eq!(storage.term(1)?, 1);
/// assert_eq!(storage.num_entries(), 1);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Storage {
    pub(crate) wal: Wal,
    pub(crate) group: GroupId,
}

impl Storage {
    /// Saves what one step of Raft produced, in one batch: the snapshot first (it empties the log), then entries and hard
    /// state.
    ///
    /// # Errors
    /// As [`Wal::commit`].
    pub fn save(&self, state: &HardState, entries: &[Entry], snapshot: Option<&SnapshotMeta>) -> Result<Lsn> {
        let mut batch = Batch::new();
        if let Some(snapshot) = snapshot {
            batch.snapshot(self.group, snapshot);
        }
        batch.append(self.group, entries);
        if self.view().is_none_or(|view| view.hard_state != *state) {
            batch.hard_state(self.group, *state);
        }
        self.wal.commit(batch)
    }

    /// Records that the caller made a snapshot at `index`, which the log holds. The log is not truncated.
    ///
    /// # Errors
    /// [`Error::Compacted`] if a newer snapshot or truncation is there, [`Error::Unavailable`], and as [`Wal::commit`].
    pub fn create_snapshot(&self, index: u64, conf_state: &ConfState, data: Bytes) -> Result<SnapshotMeta> {
        if let Some(newer) = self.snapshot().filter(|snapshot| snapshot.index > index) {
            return Err(Error::Compacted { first: newer.index + 1 });
        }
        let meta = SnapshotMeta { index, term: self.term(index)?, conf_state: conf_state.clone(), data };
        let mut batch = Batch::new();
        batch.snapshot_meta(self.group, &meta);
        self.wal.commit(batch)?;
        Ok(meta)
    }

    /// Begins the group at a snapshot: the log is empty after it.
    ///
    /// # Errors
    /// As [`Wal::commit`].
    pub fn open_at(&self, snapshot: &SnapshotMeta) -> Result<Lsn> {
        let mut batch = Batch::new();
        batch.snapshot(self.group, snapshot);
        self.wal.commit(batch)
    }

    /// Drops the entries up to `index`.
    ///
    /// # Errors
    /// [`Error::Compacted`], [`Error::Unavailable`], and as [`Wal::commit`].
    pub fn truncate_prefix(&self, index: u64) -> Result<Lsn> {
        let mut batch = Batch::new();
        batch.truncate_prefix(self.group, index, self.term(index)?);
        self.wal.commit(batch)
    }

    /// The newest snapshot's metadata.
    pub fn snapshot(&self) -> Option<SnapshotMeta> {
        self.view()?.snapshot
    }

    /// The hard state and the members as of the newest snapshot.
    pub fn initial_state(&self) -> (HardState, ConfState) {
        let Some(view) = self.view() else { return Default::default() };
        (view.hard_state, view.snapshot.map(|snapshot| snapshot.conf_state).unwrap_or_default())
    }

    /// Everything: the snapshot, the hard state and all entries.
    ///
    /// # Errors
    /// As [`Wal::entries`].
    pub fn read_all(&self) -> Result<(Option<SnapshotMeta>, HardState, Vec<Entry>)> {
        let Some(view) = self.view() else { return Ok(Default::default()) };
        let mut entries = Vec::new();
        self.wal.entries(self.group, view.first_index..view.last_index + 1, u64::MAX, &mut entries)?;
        Ok((view.snapshot, view.hard_state, entries))
    }

    /// Entries of `[low, high)`, at least one if the range is not empty, up to `max_bytes` of payload.
    ///
    /// # Errors
    /// As [`Wal::entries`].
    pub fn entries(&self, low: u64, high: u64, max_bytes: u64) -> Result<Vec<Entry>> {
        let mut entries = Vec::new();
        self.wal.entries(self.group, low..high, max_bytes, &mut entries)?;
        Ok(entries)
    }

    /// The term of an index.
    ///
    /// # Errors
    /// As [`Wal::term`].
    pub fn term(&self, index: u64) -> Result<u64> {
        self.wal.term(self.group, index)
    }

    /// The first index that can be read.
    pub fn first_index(&self) -> u64 {
        self.view().map_or(1, |view| view.first_index)
    }

    /// The last index that can be read; `first_index - 1` if there is none.
    pub fn last_index(&self) -> u64 {
        self.view().map_or(0, |view| view.last_index)
    }

    /// How many entries can be read.
    pub fn num_entries(&self) -> u64 {
        self.view().map_or(0, |view| view.last_index + 1 - view.first_index)
    }

    /// How many files hold the log, which the group shares with all others.
    pub fn num_log_files(&self) -> usize {
        self.wal.usage().segments
    }

    /// An integer of the group's metadata, 0 if it was never set.
    pub fn int(&self, which: MetaInt) -> u64 {
        let value = self.wal.meta(self.group, which.key());
        value.and_then(|value| value[..].try_into().ok()).map_or(0, u64::from_le_bytes)
    }

    /// Sets an integer of the group's metadata.
    ///
    /// # Errors
    /// As [`Wal::commit`].
    pub fn set_int(&self, which: MetaInt, value: u64) -> Result<Lsn> {
        let mut batch = Batch::new();
        batch.put_meta(self.group, which.key(), &value.to_le_bytes());
        self.wal.commit(batch)
    }

    /// The index up to which the caller's state is safe elsewhere.
    pub fn checkpoint(&self) -> u64 {
        self.int(MetaInt::CheckpointIndex)
    }

    /// Returns when everything that was submitted before, by anybody, is durable.
    ///
    /// # Errors
    /// As [`Wal::commit`].
    pub fn sync(&self) -> Result<Lsn> {
        self.wal.commit(Batch::new())
    }

    fn view(&self) -> Option<GroupView> {
        self.wal.group(self.group)
    }
}
