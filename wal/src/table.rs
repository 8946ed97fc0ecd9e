//! Which segment is what.
//!
//! ```text
//!  free ──prepare──> prepared ──listed in both manifests──> usable ──> active ──> sealed ──nothing live──> retired ──┐
//!   ^                                                                                                               │
//!   └──────────────────────────────── in neither manifest and held by no reader ─────────────────────────────────────┘
//! ```
//!
//! A segment takes frames only when both manifest files list it, so that the loss of either file loses no segment; it is
//! used again only when neither does.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use crate::{
    KeyId,
    frame::{COLD, HOT},
    manifest::{ListedSegment, Listing},
    rules::{Rule, is_broken},
    segment::Segment,
};

/// A segment that takes no more frames.
#[derive(Debug)]
pub(crate) struct Sealed {
    pub(crate) segment: Arc<Segment>,
    pub(crate) stream: u8,
    pub(crate) incarnation: u64,
    pub(crate) first_seq: u64,
    pub(crate) last_seq: u64,
}

/// The segment of a stream that takes frames.
#[derive(Debug)]
pub(crate) struct Active {
    pub(crate) segment: Arc<Segment>,
    pub(crate) incarnation: u64,
    pub(crate) first_seq: u64,
    pub(crate) room_bytes: u64,
}

/// A file that no manifest needs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Free {
    pub(crate) id: u32,
    /// It has its full length of written blocks.
    pub(crate) formed: bool,
}

/// All segments.
///
/// Invariants: an id is in exactly one of the lists; every sealed and active segment and every usable one is listed in
/// each durable manifest that is newer than its preparation.
#[derive(Debug, Default)]
pub(crate) struct Table {
    pub(crate) sealed: BTreeMap<u32, Sealed>,
    pub(crate) active: Option<Active>,
    /// The one that takes relocated records.
    pub(crate) cold: Option<Active>,
    pub(crate) prepared: VecDeque<Arc<Segment>>,
    pub(crate) retired: Vec<Arc<Segment>>,
    pub(crate) free: Vec<Free>,
    /// Files that only the older manifest listed when the log was opened.
    pub(crate) waiting: Vec<u32>,
    /// What the two manifest files list; while one is being written it may list the old set or the new.
    pub(crate) listed: [BTreeSet<u32>; 2],
    /// The numbers of the two manifests, 0 for one that is not readable.
    pub(crate) manifest_seqs: [u64; 2],
    /// The keys without which the two manifests cannot be used: their own and those of the segments that they list.
    pub(crate) manifest_keys: [BTreeSet<KeyId>; 2],
    pub(crate) next_id: u32,
    /// The last hot frame that is written and, where syncs are asked for, durable; and its last LSN.
    pub(crate) done_seq: u64,
    pub(crate) done_lsn: u64,
    /// The last cold frame that is written and, where syncs are asked for, durable.
    pub(crate) cold_seq: u64,
    /// This open's opening frame, once it is durable. Before, nothing else is written.
    pub(crate) opening_seq: Option<u64>,
    /// Relocation waits for a segment.
    pub(crate) cold_waits: bool,
    /// A checkpoint waits for records that were queued when it was captured.
    pub(crate) capture_waits: bool,
    /// This open has written something.
    pub(crate) started: bool,
    /// Room is limited and nearly gone: what is dead should become free.
    pub(crate) tight: bool,
    /// Ordinary batches are refused, or will be soon.
    pub(crate) starved: bool,
    /// Bytes of records that this open relocated.
    pub(crate) relocated_bytes: u64,
    /// No new files are made, by the caller's wish.
    pub(crate) held: bool,
    /// The last try to make a segment or a manifest met a full disk.
    pub(crate) disk_full: bool,
}

impl Table {
    fn is_usable(&self, id: u32) -> bool {
        self.listed.iter().all(|listed| listed.contains(&id)) || is_broken(Rule::ListedByBoth)
    }

    /// How many segments may take frames now.
    pub(crate) fn usable(&self) -> usize {
        self.prepared.iter().filter(|segment| self.is_usable(segment.id)).count()
    }

    /// Takes a segment that may take frames.
    pub(crate) fn take_usable(&mut self) -> Option<Arc<Segment>> {
        let at = self.prepared.iter().position(|segment| self.is_usable(segment.id))?;
        self.prepared.remove(at)
    }

    /// Whether there are free files and none of them needs filling.
    pub(crate) fn all_formed(&self) -> bool {
        !self.free.is_empty() && self.free.iter().all(|free| free.formed)
    }

    /// All segment files.
    pub(crate) fn files(&self) -> usize {
        self.sealed.len()
            + usize::from(self.active.is_some())
            + usize::from(self.cold.is_some())
            + self.prepared.len()
            + self.retired.len()
            + self.waiting.len()
            + self.free.len()
    }

    /// Sealed segments to which no entry points.
    pub(crate) fn dead(&self) -> impl Iterator<Item = u32> + '_ {
        self.sealed.iter().filter(|(_, sealed)| sealed.segment.live_bytes() == 0).map(|(id, _)| *id)
    }

    /// What the next manifest lists.
    pub(crate) fn listing(&self) -> Vec<ListedSegment> {
        let new = |segment: &Segment, listing, stream| {
            let Segment { id, epoch, .. } = *segment;
            let key_id = segment.seal().map_or(0, |seal| seal.key_id.0);
            ListedSegment { id, epoch, listing, stream, incarnation: 0, first_seq: 0, last_seq: 0, key_id }
        };
        let sealed = self.sealed.values().map(|sealed| {
            let Sealed { incarnation, first_seq, last_seq, .. } = *sealed;
            let listed = new(&sealed.segment, Listing::Sealed, sealed.stream);
            ListedSegment { incarnation, first_seq, last_seq, ..listed }
        });
        let active = [(&self.active, HOT), (&self.cold, COLD)].into_iter();
        let active = active.filter_map(|(active, stream)| {
            let Active { incarnation, first_seq, segment, .. } = active.as_ref()?;
            let (incarnation, first_seq) = (*incarnation, *first_seq);
            Some(ListedSegment { incarnation, first_seq, ..new(segment, Listing::Active, stream) })
        });
        let prepared = self.prepared.iter().map(|segment| new(segment, Listing::Prepared, HOT));
        sealed.chain(active).chain(prepared).collect()
    }

    /// Whether some file does not say yet what must be said before a segment can be used, first or again.
    pub(crate) fn listing_is_due(&self) -> bool {
        let is_listed = |id: u32| self.listed.iter().any(|listed| listed.contains(&id));
        self.prepared.iter().any(|segment| !self.is_usable(segment.id))
            || self.retired.iter().any(|segment| is_listed(segment.id))
            || self.waiting.iter().any(|id| is_listed(*id))
    }

    /// Retired segments that nothing needs any more become free; their ids.
    pub(crate) fn release(&mut self) -> Vec<u32> {
        let listed = &self.listed;
        let gone = |segment: &Arc<Segment>| {
            let forgotten = listed.iter().all(|listed| !listed.contains(&segment.id));
            Arc::strong_count(segment) == 1 && (forgotten || is_broken(Rule::ForgottenByBoth))
        };
        let (free, kept) = std::mem::take(&mut self.retired).into_iter().partition(gone);
        self.retired = kept;
        let free: Vec<Arc<Segment>> = free;
        let mut ids: Vec<u32> = free.iter().map(|segment| segment.id).collect();
        ids.extend(self.waiting.extract_if(.., |id| listed.iter().all(|listed| !listed.contains(id))));
        self.free.extend(ids.iter().map(|id| Free { id: *id, formed: true }));
        ids
    }
}
