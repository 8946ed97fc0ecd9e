//! Batches: what a submitter hands in, atomic across its groups.

use pontoon_proto::GroupId;

use bytes::BufMut;

use crate::{
    Error,
    codec::put_bytes,
    pool,
    record::{self, Kind, MAX_INDEX, MAX_RECORD_ENTRIES},
    types::{Entry, HardState, SnapshotMeta},
};

/// The largest value of a group's metadata.
pub const MAX_META_BYTES: usize = 64 << 10;
/// The largest key of a group's metadata.
pub const MAX_META_KEY_BYTES: usize = 1 << 10;
/// The largest data of a snapshot's metadata.
pub const MAX_SNAPSHOT_DATA_BYTES: usize = 1 << 20;
/// The largest batch that any segment size allows.
pub const MAX_BATCH_BYTES: u64 = 16 << 20;

/// Payload after which an append starts another record, so that reading one entry never reads much more.
const RECORD_TARGET_BYTES: usize = 128 << 10;

/// Changes to one or more groups that become durable together or not at all. Changes to one group apply in order.
///
/// Records are encoded and checksummed as they are added, on the caller's thread. A mistake (entries that do not continue
/// each other, a value that is too large) is kept and returned by the submit.
///
/// ```
/// use pontoon_wal::{Batch, Entry, GroupId, HardState};
///
/// let mut batch = Batch::new();
/// batch.append(GroupId(7), &[Entry { index: 1, term: 1, kind: 0, data: "hello".into() }]);
/// batch.hard_state(GroupId(7), HardState { term: 1, vote: 3, commit: 0 });
/// assert!(!batch.is_empty());
/// ```
#[derive(Debug, Clone, Default)]
pub struct Batch {
    pub(crate) data: Vec<u8>,
    pub(crate) dir: Vec<u8>,
    pub(crate) records: u32,
    /// How many of the records hold entries.
    pub(crate) entry_records: u32,
    pub(crate) relaxed: bool,
    pub(crate) mistake: Option<Error>,
}

impl Drop for Batch {
    fn drop(&mut self) {
        pool::give(std::mem::take(&mut self.data));
        pool::give(std::mem::take(&mut self.dir));
    }
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Batch::default()
    }

    /// Appends entries, whose indices follow each other. What stood at or above the first of them is cut.
    pub fn append(&mut self, group: GroupId, entries: &[Entry]) -> &mut Self {
        for pair in entries.windows(2) {
            if pair[1].index != pair[0].index.wrapping_add(1) {
                let (expected, found) = (pair[0].index.wrapping_add(1), pair[1].index);
                return self.mistake(Error::Gap { group, expected, found });
            }
        }
        if let Some(entry) = entries.iter().find(|entry| entry.data.len() as u64 > MAX_BATCH_BYTES) {
            return self.too_large("an entry", entry.data.len(), MAX_BATCH_BYTES as usize);
        }
        match (entries.first(), entries.last()) {
            (Some(first), _) if first.index == 0 => {
                return self.mistake(Error::Gap { group, expected: 1, found: 0 });
            }
            (_, Some(last)) if last.index > MAX_INDEX => return self.index_too_large(last.index),
            _ => {}
        }
        let mut rest = entries;
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = rest.iter().take(MAX_RECORD_ENTRIES).take_while(|entry| {
                let room = bytes < RECORD_TARGET_BYTES;
                bytes += entry.data.len();
                room
            });
            let (now, later) = rest.split_at(fits.count().max(1));
            let head = (Kind::Entries, group, now[0].index, now.len() as u32);
            self.record(head, |data| record::put_entries(data, now));
            rest = later;
        }
        self
    }

    /// Saves the hard state.
    pub fn hard_state(&mut self, group: GroupId, state: HardState) -> &mut Self {
        self.record((Kind::HardState, group, 0, 0), |data| record::put_hard_state(data, &state))
    }

    /// Saves a snapshot's metadata and empties the log, which continues after the snapshot's index.
    pub fn snapshot(&mut self, group: GroupId, meta: &SnapshotMeta) -> &mut Self {
        self.put_snapshot(group, meta, true)
    }

    /// Saves the metadata of a snapshot that the replica made itself; the log stays as it is.
    pub fn snapshot_meta(&mut self, group: GroupId, meta: &SnapshotMeta) -> &mut Self {
        self.put_snapshot(group, meta, false)
    }

    /// Drops the entries up to `index`, whose term is `term`. At or below the truncated index it does nothing.
    pub fn truncate_prefix(&mut self, group: GroupId, index: u64, term: u64) -> &mut Self {
        self.record((Kind::TruncatePrefix, group, index, 0), |data| data.put_u64_le(term))
    }

    /// Empties the log, which continues after `index` of `term`.
    pub fn reset_to(&mut self, group: GroupId, index: u64, term: u64) -> &mut Self {
        self.record((Kind::ResetTo, group, index, 0), |data| data.put_u64_le(term))
    }

    /// Saves a value of the group's metadata; an empty one removes the key.
    pub fn put_meta(&mut self, group: GroupId, key: &[u8], value: &[u8]) -> &mut Self {
        if key.len() > MAX_META_KEY_BYTES {
            return self.too_large("a metadata key", key.len(), MAX_META_KEY_BYTES);
        }
        if value.len() > MAX_META_BYTES {
            return self.too_large("a metadata value", value.len(), MAX_META_BYTES);
        }
        self.record((Kind::PutMeta, group, 0, 0), |data| {
            put_bytes(data, key);
            put_bytes(data, value);
        })
    }

    /// Removes the group: entries, hard state, metadata, snapshot. What stays for ever is the minimum replica id that may
    /// exist again, which never falls.
    pub fn destroy(&mut self, group: GroupId, min_replica: u64) -> &mut Self {
        self.record((Kind::Destroy, group, min_replica, 0), |_| {})
    }

    /// Lets the batch wait for the next sync that something else asks for.
    pub fn relaxed(&mut self) -> &mut Self {
        self.relaxed = true;
        self
    }

    /// Bytes that the batch takes in a frame; what a reservation should ask for.
    pub fn size_bytes(&self) -> u64 {
        (self.data.len() + self.dir.len()) as u64
    }

    /// Whether nothing was added.
    pub fn is_empty(&self) -> bool {
        self.records == 0 && self.mistake.is_none()
    }

    fn record(&mut self, head: (Kind, GroupId, u64, u32), body: impl FnOnce(&mut Vec<u8>)) -> &mut Self {
        let (kind, _, index, _) = head;
        if kind.has_index() && index > MAX_INDEX {
            return self.index_too_large(index);
        }
        if self.records == 0 {
            (self.data, self.dir) = (pool::take(), pool::take());
        }
        record::encode(&mut self.data, &mut self.dir, head, body);
        self.records += 1;
        self.entry_records += u32::from(head.0 == Kind::Entries);
        self
    }

    fn put_snapshot(&mut self, group: GroupId, meta: &SnapshotMeta, reset: bool) -> &mut Self {
        if meta.data.len() > MAX_SNAPSHOT_DATA_BYTES {
            return self.too_large("a snapshot's data", meta.data.len(), MAX_SNAPSHOT_DATA_BYTES);
        }
        self.record((Kind::Snapshot, group, meta.index, u32::from(reset)), |data| {
            record::put_snapshot(data, meta)
        })
    }

    fn mistake(&mut self, error: Error) -> &mut Self {
        self.mistake.get_or_insert(error);
        self
    }

    fn index_too_large(&mut self, index: u64) -> &mut Self {
        self.mistake(Error::TooLarge { what: "an index", size: index, limit: MAX_INDEX })
    }

    fn too_large(&mut self, what: &'static str, size: usize, limit: usize) -> &mut Self {
        self.mistake(Error::TooLarge { what, size: size as u64, limit: limit as u64 })
    }
}
