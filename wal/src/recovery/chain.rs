//! Which of the frames that were found are live, and which are missing.
//!
//! A frame is live iff its open's first frame is live, it lies beyond the place where that open cut its predecessor, and
//! no later live open cuts before it. Every frame states its open's cut, so any frame of an open proves the opening frame
//! durable (nothing else is written before).
//!
//! | frame `s` is | and `s` is at or below the proven mark | then |
//! |---|---|---|
//! | whole | | live |
//! | damaged or absent, its head known from a copy | yes | corrupt: the groups that the copy names are damaged |
//! | damaged or absent, no copy | yes | corrupt, nobody knows whom it hits: the log does not open |
//! | damaged or absent | no | the torn tail begins: it and what follows is cut |
//!
//! This is about the hot stream; what counts of the cold one is in [`super::cold`].
//!
//! The proven mark is the highest of: the checkpoint's frame and those of the segments that it lists as sealed; the cut that a live open states (its recovery synced what
//! it read before it wrote); durable_seq in any live frame.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use bytes::Bytes;

use super::scan::{Found, Scan};
use crate::{
    footer::Footer,
    frame::HOT,
    manifest::{AsOf, ListedSegment, Listing},
    rules::{Rule, is_broken},
    segment::Segment,
};

/// The live part of the log.
#[derive(Debug)]
pub(crate) struct Chain {
    /// Frames by frame_seq; a gap at or below `proven` is damage.
    pub(crate) frames: BTreeMap<u64, Found>,
    /// Copies of heads that footers keep, by frame_seq.
    pub(crate) spare: BTreeMap<u64, (Arc<Segment>, Bytes)>,
    /// Frames that must be there: inclusive ranges, ascending; the last ends at `proven`.
    pub(crate) required: Vec<(u64, u64)>,
    /// At or below this, a damaged frame is corruption.
    pub(crate) proven: u64,
    /// The last live open and its ordinal.
    pub(crate) incarnation: u64,
    /// The highest ordinal that was ever used, by void frames too.
    pub(crate) ordinal: u64,
}

impl Chain {
    /// Orders what was found by the rules above. Segments that were not scanned, because footers say what they hold, are
    /// taken for complete.
    pub(crate) fn new(
        scan: Scan,
        as_of: &AsOf,
        listed: &[ListedSegment],
        is_settled: impl Fn(u32) -> bool,
    ) -> Chain {
        let opens = opens(&scan, as_of);
        let (last, _) = opens[opens.len() - 1];
        let range_of: HashMap<u64, (u64, u64)> = opens
            .iter()
            .enumerate()
            .map(|(nth, (open, from))| (*open, (*from, end_of(&opens, nth))))
            .collect();
        // A sealed segment's frames were settled when the checkpoint was made, whatever opens the chain still knows.
        let sealed: HashMap<u32, &ListedSegment> = listed
            .iter()
            .filter(|entry| entry.listing == Listing::Sealed && entry.stream == HOT)
            .map(|entry| (entry.id, entry))
            .collect();
        let is_live = |incarnation: u64, seq: u64| {
            range_of.get(&incarnation).is_some_and(|(from, to)| (*from..=*to).contains(&seq))
        };
        let claims = scan.claims.iter().filter(|(open, seq, _)| is_live(*open, *seq));
        let claims = claims.map(|(_, _, claim)| *claim).filter(|_| !is_broken(Rule::DurableMarkCounts));
        let cuts = opens.iter().skip(1).map(|(_, from)| from - 1);
        let settled = sealed.values().map(|entry| entry.last_seq);
        let proven = claims.chain(cuts).chain(settled).max().unwrap_or(0).max(as_of.seqs[0]);
        let ordinals = scan.incarnations.values().map(|open| open.ordinal);
        let ordinal = ordinals.max().unwrap_or(0).max(as_of.ordinal);
        let mut frames: BTreeMap<u64, Found> = BTreeMap::new();
        for found in scan.frames {
            let live = match sealed.get(&found.segment.id) {
                Some(entry) => {
                    found.incarnation == entry.incarnation
                        && (entry.first_seq..=entry.last_seq).contains(&found.seq)
                }
                None => is_live(found.incarnation, found.seq),
            };
            if live {
                frames.insert(found.seq, found);
            }
        }
        let scanned = sealed.values().filter(|entry| !is_settled(entry.id));
        let mut required: Vec<(u64, u64)> = scanned.map(|entry| (entry.first_seq, entry.last_seq)).collect();
        let active = listed.iter().find(|entry| entry.listing == Listing::Active && entry.stream == HOT);
        required
            .push((active.map_or(as_of.seqs[0] + 1, |entry| entry.first_seq.min(as_of.seqs[0] + 1)), proven));
        required.retain(|(from, to)| from <= to);
        required.sort_unstable();
        Chain { frames, spare: BTreeMap::new(), required, proven, incarnation: last, ordinal }
    }

    /// Adds the heads that footers keep.
    pub(crate) fn with_spare<'a>(mut self, footers: impl Iterator<Item = &'a Footer>) -> Chain {
        let heads =
            footers.map(|footer| (footer.facts.last_seq, (footer.segment.clone(), footer.head.clone())));
        self.spare = heads.filter(|(_, (_, head))| !head.is_empty()).collect();
        self
    }

    /// Frames that must be there and were not found: of each gap the first. Only the frame right behind it may know what it
    /// held, so a longer gap ends recovery at its first frame.
    pub(crate) fn missing(&self) -> Vec<u64> {
        let mut missing = Vec::new();
        for (from, to) in &self.required {
            let mut expected = *from;
            for seq in self.frames.range(from..=to).map(|(seq, _)| *seq) {
                missing.extend((expected < seq).then_some(expected));
                expected = seq + 1;
            }
            missing.extend((expected <= *to).then_some(expected));
        }
        missing
    }
}

/// The live opens, each with its first live frame. The first is the checkpoint's.
fn opens(scan: &Scan, as_of: &AsOf) -> Vec<(u64, u64)> {
    let mut opens = vec![(as_of.incarnation, 0)];
    let (mut current, mut ordinal) = (as_of.incarnation, as_of.ordinal);
    loop {
        // Of two that cut the same predecessor the later is live: it did not see the other.
        let next = scan
            .incarnations
            .iter()
            .filter(|(_, open)| open.cuts[0].incarnation == current && open.ordinal > ordinal)
            .max_by_key(|(token, open)| (open.ordinal, **token));
        let Some((token, open)) = next else { return opens };
        opens.push((*token, open.cuts[0].seq + 1));
        (current, ordinal) = (*token, open.ordinal);
    }
}

/// The last live frame of an open: what its successor left, or whatever is there.
fn end_of(opens: &[(u64, u64)], nth: usize) -> u64 {
    let next = opens.get(nth + 1).filter(|_| !is_broken(Rule::CutsHold));
    next.map_or(u64::MAX, |(_, from)| from - 1)
}
