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
    manifest::{FooterAt, ListedSegment, Listing},
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
    pub(crate) span: Span,
    pub(crate) footer: Option<SealedFooter>,
}

/// What the footer of a hot segment has to know of the frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Span {
    /// Where the last frame begins and where it ends; the end is 0 if the segment cannot have a footer.
    pub(crate) last_block: u32,
    pub(crate) end_block: u32,
    /// The LSNs of the first record and of the last, 0 if there is none.
    pub(crate) first_lsn: u64,
    pub(crate) last_lsn: u64,
}

impl Span {
    /// Adds the next frame.
    pub(crate) fn add(&mut self, (block, blocks): (u32, u32), first_lsn: u64, records: u32) {
        (self.last_block, self.end_block) = (block, block + blocks);
        if records > 0 {
            self.first_lsn = if self.first_lsn == 0 { first_lsn } else { self.first_lsn };
            self.last_lsn = first_lsn + u64::from(records) - 1;
        }
    }
}

/// A footer that is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SealedFooter {
    pub(crate) at: FooterAt,
    /// The capture to which it belongs began at this LSN.
    pub(crate) lsn: u64,
}

/// The segment of a stream that takes frames.
#[derive(Debug)]
pub(crate) struct Active {
    pub(crate) segment: Arc<Segment>,
    pub(crate) incarnation: u64,
    pub(crate) first_seq: u64,
    pub(crate) room_bytes: u64,
    /// Of the durable frames.
    pub(crate) span: Span,
}

impl Active {
    /// What it is when it takes no more frames of its stream than up to this one.
    pub(crate) fn seal(self, stream: u8, last_seq: u64) -> Sealed {
        let Active { segment, incarnation, first_seq, span, .. } = self;
        Sealed { segment, stream, incarnation, first_seq, last_seq, span, footer: None }
    }
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
    /// This open wants to write something.
    pub(crate) started: bool,
    /// The log was closed and nothing will be written to segments any more.
    pub(crate) ended: bool,
    /// Bytes of frames that this open has written.
    pub(crate) written_bytes: u64,
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

    /// Sealed segments that could have a footer and have none, ascending. Those of encrypted segments would tell what groups
    /// and terms there are to whoever can change them, under a CRC alone.
    pub(crate) fn unsettled(&self) -> impl Iterator<Item = u32> + '_ {
        let may = self.opening_seq.is_some();
        let lacks = move |sealed: &Sealed| {
            may && sealed.footer.is_none() && sealed.span.end_block > 0 && sealed.segment.seal().is_none()
        };
        self.sealed.iter().filter(move |(_, sealed)| lacks(sealed)).map(|(id, _)| *id)
    }

    /// What a manifest lists whose state is complete up to this LSN. A footer that belongs to a later capture says too
    /// little for it: what later records dropped is missing there, and the records that did so may be in that segment.
    pub(crate) fn listing(&self, lsn: u64) -> Vec<ListedSegment> {
        let new = |segment: &Segment, listing, stream| {
            let Segment { id, epoch, .. } = *segment;
            let key_id = segment.seal().map_or(0, |seal| seal.key_id.0);
            ListedSegment {
                id,
                epoch,
                listing,
                stream,
                incarnation: 0,
                first_seq: 0,
                last_seq: 0,
                key_id,
                footer: None,
            }
        };
        let sealed = self.sealed.values().map(|sealed| {
            let Sealed { incarnation, first_seq, last_seq, .. } = *sealed;
            let listed = new(&sealed.segment, Listing::Sealed, sealed.stream);
            let footer = sealed.footer.filter(|footer| footer.lsn <= lsn).map(|footer| footer.at);
            ListedSegment { incarnation, first_seq, last_seq, footer, ..listed }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{RealFs, fs::Fs, fs::OpenMode};

    #[test]
    fn a_footer_is_listed_with_states_from_its_capture_on() {
        let file = RealFs.open(std::path::Path::new("/dev/null"), OpenMode::Read).unwrap();
        let segment = Arc::new(Segment::new(3, 8, "/dev/null".into(), file));
        let at = FooterAt { block: 9, len: 700, crc: 1 };
        let footer = Some(SealedFooter { at, lsn: 50 });
        let span = Span::default();
        let sealed = Sealed { segment, stream: HOT, incarnation: 1, first_seq: 2, last_seq: 7, span, footer };
        let table = Table { sealed: BTreeMap::from([(3, sealed)]), ..Table::default() };
        let listed = |lsn| table.listing(lsn).into_iter().map(|listed| listed.footer).collect::<Vec<_>>();
        assert_eq!((listed(49), listed(50), listed(51)), (vec![None], vec![Some(at)], vec![Some(at)]));
    }
}
