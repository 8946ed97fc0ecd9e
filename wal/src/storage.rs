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
/// assert_eq!(storage.num_entries()?, 1);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Storage {
    pub(crate) wal: Wal,
    pub(crate) group: GroupId,
}

impl Storage {
    /// Saves what one step of Raft produced, in one batch: the snapshot first (it empties the log, which continues after
    /// it), then entries and hard state. As Raft hands them out, a hard state that is all zero means that it did not
    /// change, and a snapshot at index 0 means none. Nothing at all returns when what came before is durable.
    ///
    /// # Errors
    /// As [`Wal::commit`]; [`Error::Gap`] and [`Error::Compacted`] for entries that do not continue the log.
    pub fn save(&self, state: &HardState, entries: &[Entry], snapshot: Option<&SnapshotMeta>) -> Result<Lsn> {
        let mut batch = Batch::new();
        if let Some(snapshot) = snapshot.filter(|snapshot| snapshot.index > 0) {
            batch.snapshot(self.group, snapshot);
        }
        batch.append(self.group, entries);
        if *state != HardState::default()
            && self.wal.group(self.group).is_none_or(|view| view.hard_state != *state)
        {
            batch.hard_state(self.group, *state);
        }
        self.wal.commit(batch)
    }

    /// Records that the caller made a snapshot at `index`, which the log holds. The log is not truncated: that is
    /// [`Storage::truncate_prefix`], once no follower needs the entries.
    ///
    /// # Errors
    /// [`Error::Compacted`] if a newer snapshot or truncation is there, [`Error::Unavailable`] above the last index, and as
    /// [`Wal::commit`].
    pub fn create_snapshot(&self, index: u64, conf_state: &ConfState, data: Bytes) -> Result<SnapshotMeta> {
        let term = self.term(index)?;
        let newest = self.view()?.snapshot;
        if let Some(newer) = newest.filter(|snapshot| snapshot.index > index) {
            return Err(Error::Compacted { first: newer.index + 1 });
        }
        let meta = SnapshotMeta { index, term, conf_state: conf_state.clone(), data };
        let mut batch = Batch::new();
        batch.snapshot_meta(self.group, &meta);
        self.wal.commit(batch)?;
        Ok(meta)
    }

    /// Begins the group at a snapshot that came from elsewhere: the log is empty after it and continues behind it.
    ///
    /// # Errors
    /// As [`Wal::commit`].
    pub fn begin_at(&self, snapshot: &SnapshotMeta) -> Result<Lsn> {
        let mut batch = Batch::new();
        batch.snapshot(self.group, snapshot);
        self.wal.commit(batch)
    }

    /// Drops the entries up to `index`, that one included.
    ///
    /// # Errors
    /// [`Error::Compacted`] below the truncated index, [`Error::Unavailable`] above the last, and as [`Wal::commit`].
    pub fn truncate_prefix(&self, index: u64) -> Result<Lsn> {
        let mut batch = Batch::new();
        batch.truncate_prefix(self.group, index, self.term(index)?);
        self.wal.commit(batch)
    }

    /// The newest snapshot's metadata, if it reaches the log: a follower that installs it can go on with the entries.
    ///
    /// # Errors
    /// [`Error::SnapshotUnavailable`] if none was made yet, or the log was truncated beyond the newest: for now, until the
    /// caller makes one. [`Error::Damaged`].
    pub fn snapshot(&self) -> Result<SnapshotMeta> {
        let view = self.view()?;
        let needed = view.truncated.0.max(1);
        let newest = view.snapshot.as_ref().map_or(0, |snapshot| snapshot.index);
        let reaching = view.snapshot.filter(|snapshot| snapshot.index >= needed);
        reaching.ok_or(Error::SnapshotUnavailable { group: self.group, newest, needed })
    }

    /// The hard state, and the members as of the newest snapshot; both empty for a group that never saved any.
    ///
    /// # Errors
    /// [`Error::Damaged`]: a replica that forgot its vote must not start.
    pub fn initial_state(&self) -> Result<(HardState, ConfState)> {
        let view = self.view()?;
        Ok((view.hard_state, view.snapshot.map(|snapshot| snapshot.conf_state).unwrap_or_default()))
    }

    /// Everything: the snapshot, the hard state and all entries, in memory at once.
    ///
    /// # Errors
    /// As [`Wal::entries`].
    pub fn read_all(&self) -> Result<(Option<SnapshotMeta>, HardState, Vec<Entry>)> {
        let view = self.view()?;
        let entries = self.entries(view.first_index, view.last_index + 1, u64::MAX)?;
        Ok((view.snapshot, view.hard_state, entries))
    }

    /// Opens the group at a snapshot that the caller holds: the hard state and all entries behind `index`.
    ///
    /// # Errors
    /// [`Error::Compacted`] if the log begins behind the snapshot, [`Error::Unavailable`] if it ends before it,
    /// [`Error::TermMismatch`] if it has another term there, and as [`Wal::entries`].
    pub fn read_from(&self, index: u64, term: u64) -> Result<(HardState, Vec<Entry>)> {
        let ours = self.term(index)?;
        if ours != term {
            return Err(Error::TermMismatch { group: self.group, index, ours, given: term });
        }
        let view = self.view()?;
        Ok((view.hard_state, self.entries(index + 1, view.last_index + 1, u64::MAX)?))
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

    /// One entry.
    ///
    /// # Errors
    /// As [`Wal::entries`].
    pub fn entry(&self, index: u64) -> Result<Entry> {
        let end = index.checked_add(1).ok_or(Error::Unavailable { last: u64::MAX - 1 })?;
        Ok(self.entries(index, end, 0)?.remove(0))
    }

    /// The term of an index.
    ///
    /// # Errors
    /// As [`Wal::term`].
    pub fn term(&self, index: u64) -> Result<u64> {
        self.wal.term(self.group, index)
    }

    /// The first index that can be read, 1 in a new group.
    ///
    /// # Errors
    /// [`Error::Damaged`].
    pub fn first_index(&self) -> Result<u64> {
        Ok(self.view()?.first_index)
    }

    /// The last index that can be read; `first_index - 1` if there is none.
    ///
    /// # Errors
    /// [`Error::Damaged`].
    pub fn last_index(&self) -> Result<u64> {
        Ok(self.view()?.last_index)
    }

    /// How many entries can be read.
    ///
    /// # Errors
    /// [`Error::Damaged`].
    pub fn num_entries(&self) -> Result<u64> {
        self.view().map(|view| view.last_index + 1 - view.first_index)
    }

    /// How many files hold the log, which the group shares with all others.
    pub fn num_log_files(&self) -> usize {
        self.wal.usage().segments
    }

    /// An integer of the group's metadata, 0 if it was never set.
    ///
    /// # Errors
    /// [`Error::Damaged`].
    pub fn int(&self, which: MetaInt) -> Result<u64> {
        let value = self.meta(which.key())?;
        Ok(value.and_then(|value| value[..].try_into().ok()).map_or(0, u64::from_le_bytes))
    }

    /// Sets an integer of the group's metadata.
    ///
    /// # Errors
    /// As [`Wal::commit`].
    pub fn set_int(&self, which: MetaInt, value: u64) -> Result<Lsn> {
        self.put_meta(which.key(), &value.to_le_bytes())
    }

    /// The index up to which the caller's state is safe elsewhere, as set by [`MetaInt::CheckpointIndex`].
    ///
    /// # Errors
    /// [`Error::Damaged`].
    pub fn checkpoint(&self) -> Result<u64> {
        self.int(MetaInt::CheckpointIndex)
    }

    /// A value of the group's metadata, from memory.
    ///
    /// # Errors
    /// [`Error::Damaged`].
    pub fn meta(&self, key: &[u8]) -> Result<Option<Bytes>> {
        self.view()?;
        Ok(self.wal.meta(self.group, key))
    }

    /// The keys of the group's metadata in `[low, high)` with their values, ascending, from memory. The integers are among
    /// them, under keys that begin with `int.`.
    ///
    /// # Errors
    /// [`Error::Damaged`].
    pub fn scan_meta(&self, low: &[u8], high: &[u8]) -> Result<Vec<(Bytes, Bytes)>> {
        self.view()?;
        let mut all = self.wal.shared().all_meta(self.group);
        all.retain(|(key, _)| (low..high).contains(&&key[..]));
        Ok(all)
    }

    /// Sets a value of the group's metadata; an empty one removes the key.
    ///
    /// # Errors
    /// [`Error::TooLarge`] above [`MAX_META_BYTES`](crate::MAX_META_BYTES) or
    /// [`MAX_META_KEY_BYTES`](crate::MAX_META_KEY_BYTES), and as [`Wal::commit`].
    pub fn put_meta(&self, key: &[u8], value: &[u8]) -> Result<Lsn> {
        let mut batch = Batch::new();
        batch.put_meta(self.group, key, value);
        self.wal.commit(batch)
    }

    /// Returns when everything that was submitted before, by anybody, is durable.
    ///
    /// # Errors
    /// As [`Wal::commit`].
    pub fn sync(&self) -> Result<Lsn> {
        self.wal.commit(Batch::new())
    }

    /// The group as it is, empty if it does not exist. A damaged one answers nothing: what is left could be older than what
    /// it promised.
    fn view(&self) -> Result<GroupView> {
        let view = self.wal.group(self.group).unwrap_or(GroupView {
            first_index: 1,
            last_index: 0,
            last_term: 0,
            hard_state: HardState::default(),
            truncated: (0, 0),
            snapshot: None,
            damaged: None,
            tombstone: None,
        });
        match view.damaged {
            Some(damage) => Err(Error::Damaged { group: self.group, damage }),
            None => Ok(view),
        }
    }
}
