//! The plain words of the log: entries, hard states, snapshots. They name what Raft keeps without knowing Raft.

use std::fmt;

use bytes::Bytes;

/// The order in which a record entered the log. It says order, never durability.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lsn(pub u64);

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}.{}", self.0 >> Lsn::COUNTER_BITS, self.0 & ((1 << Lsn::COUNTER_BITS) - 1))
    }
}

impl Lsn {
    /// The low bits count records; the bits above are the ordinal of the open that wrote them. A count that runs over
    /// carries into the ordinal, and the next open takes an ordinal above it.
    pub(crate) const COUNTER_BITS: u32 = 44;
}

/// One entry of a group's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its place in the group's log, from 1.
    pub index: u64,
    /// The term in which it was proposed.
    pub term: u64,
    /// What the caller says that it is; the log does not look.
    pub kind: u8,
    /// The payload.
    pub data: Bytes,
}

/// What a replica must remember about its votes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HardState {
    /// The latest term seen.
    pub term: u64,
    /// The replica voted for in that term, 0 for none.
    pub vote: u64,
    /// The highest index known to be committed.
    pub commit: u64,
}

/// The members of a group.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ConfState {
    /// The voters of the (incoming) configuration.
    pub voters: Vec<u64>,
    /// Those that receive the log without a vote.
    pub learners: Vec<u64>,
    /// The voters of the outgoing configuration; empty outside a joint one.
    pub voters_outgoing: Vec<u64>,
    /// Outgoing voters that become learners when the joint configuration is left.
    pub learners_next: Vec<u64>,
    /// Whether the joint configuration is left without being asked.
    pub auto_leave: bool,
}

/// A snapshot as the log remembers it: where it stands and who the members were, with a few bytes of the caller's.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SnapshotMeta {
    /// The last index that the snapshot holds.
    pub index: u64,
    /// The term of that index.
    pub term: u64,
    /// The members at that index.
    pub conf_state: ConfState,
    /// The caller's own bytes, at most [`MAX_SNAPSHOT_DATA_BYTES`](crate::MAX_SNAPSHOT_DATA_BYTES).
    pub data: Bytes,
}

/// What the log knows of a group, copied at one moment. Asking for it never touches the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupView {
    /// The first index that can be read; one above the truncated index.
    pub first_index: u64,
    /// The last index that can be read; `first_index - 1` if there is none.
    pub last_index: u64,
    /// The term of the last index.
    pub last_term: u64,
    /// The hard state, all zero if none was ever saved.
    pub hard_state: HardState,
    /// Index and term below which everything is gone.
    pub truncated: (u64, u64),
    /// The newest snapshot's metadata.
    pub snapshot: Option<SnapshotMeta>,
    /// What is lost of the group. A damaged group takes nothing but `destroy`.
    pub damaged: Option<Damage>,
    /// The minimum replica id that may exist, if the group was ever destroyed here.
    pub tombstone: Option<u64>,
}

/// What a group lost to a damaged disk.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Damage {
    /// Index ranges whose entries are gone, each `[low, high)`.
    pub entries: Vec<(u64, u64)>,
    /// The newest hard state is gone.
    pub hard_state: bool,
    /// The newest truncation point is gone.
    pub truncation: bool,
    /// Some metadata or the snapshot's is gone.
    pub meta: bool,
}

impl Damage {
    /// Whether nothing is lost.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty() && !self.hard_state && !self.truncation && !self.meta
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = Vec::new();
        words.extend(self.entries.iter().map(|(low, high)| format!("entries [{low}, {high})")));
        words.extend(self.hard_state.then(|| "hard state".to_owned()));
        words.extend(self.truncation.then(|| "truncation point".to_owned()));
        words.extend(self.meta.then(|| "metadata".to_owned()));
        f.write_str(&words.join(", "))
    }
}

/// How much the log holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Groups that exist.
    pub groups: usize,
    /// Segments that hold records, the active one included.
    pub segments: usize,
    /// Those of them that hold relocated records.
    pub cold_segments: usize,
    /// Bytes of records that were relocated since the log was opened.
    pub relocated_bytes: u64,
    /// Segments that are ready to take records.
    pub prepared: usize,
    /// Segment files that wait to be used again.
    pub free: usize,
    /// Bytes of all segment files.
    pub disk_bytes: u64,
    /// Bytes of entries that can be read.
    pub live_bytes: u64,
    /// Bytes that were submitted and are not yet durable.
    pub pending_bytes: u64,
    /// Bytes held by the cache of written frames.
    pub cache_bytes: usize,
    /// The number of the newest durable checkpoint.
    pub checkpoint: u64,
    /// Frames go around the system's cache, with O_DIRECT. False before the first write.
    pub direct: bool,
}

/// A group that keeps segments from being used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pinned {
    /// Which group.
    pub group: pontoon_proto::GroupId,
    /// Bytes of its entries on disk.
    pub bytes: u64,
    /// Its first index.
    pub first_index: u64,
    /// Its last index.
    pub last_index: u64,
    /// The segment that holds its oldest entry.
    pub oldest_segment: u32,
}

/// What a round of garbage collection did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GcStats {
    /// Checkpoints written.
    pub checkpoints: u64,
    /// Segments that became free.
    pub segments_freed: usize,
    /// Their bytes.
    pub bytes_freed: u64,
    /// Records that were copied out of segments that were nearly dead.
    pub records_relocated: u64,
    /// Bytes that the copies take.
    pub bytes_relocated: u64,
}

/// Things that an operator may want to know while the log runs.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum WalEvent {
    /// Frames now go to another segment.
    Rotated {
        /// The segment that takes them.
        segment: u32,
    },
    /// A checkpoint is durable.
    Checkpointed {
        /// Its number.
        seq: u64,
    },
    /// A write of the log is not complete after this time. Told once after 100 ms and once after a second.
    Stalled {
        /// How long it has been under way.
        waited: std::time::Duration,
    },
    /// A frame waits for a segment to be prepared: the background did not stay ahead, or there is no room.
    Unprepared,
    /// The disk or the size limit leaves no room for another segment.
    SpaceLow,
    /// There is room again.
    SpaceBack,
    /// Room gets tight, and these groups hold the most of it, the largest first. Told once each time.
    Pinned {
        /// The groups, with the bytes and the first index that they hold.
        groups: Vec<Pinned>,
    },
}
