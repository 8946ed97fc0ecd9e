//! One group's state and the rules by which records change it. Submit and recovery use the same rules.

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;

use crate::{
    Error, Result,
    footer::Listed,
    manifest::GroupState,
    outline::Terms,
    record::{Body, Entries, Head, Kind},
    segment::Segment,
    types::{Damage, GroupView, HardState, SnapshotMeta},
};

mod check;
mod pending;
mod repoint;

pub(crate) use check::Sim;
use pending::PendingLog;
pub(crate) use repoint::Spot;

/// A run is found by binary search and searched extent by extent; this bounds the second part.
pub(crate) const RUN_EXTENTS: usize = 128;

/// Where a record of entries is: 27 bits of offset and 21 of length, both in units of 8 bytes, and 16 of entry count.
/// Footers hold them as they are here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent(pub(crate) u64);

impl Extent {
    pub(crate) fn new(offset: u32, len: u32, count: u16) -> Extent {
        debug_assert!(offset.is_multiple_of(8) && len.is_multiple_of(8));
        Extent(u64::from(offset / 8) << 37 | u64::from(len / 8) << 16 | u64::from(count))
    }

    pub(crate) fn offset(self) -> u32 {
        (self.0 >> 37) as u32 * 8
    }

    pub(crate) fn len(self) -> u32 {
        (self.0 >> 16 & 0x1f_ffff) as u32 * 8
    }

    pub(crate) fn count(self) -> u64 {
        self.0 & 0xffff
    }

    fn with_count(self, count: u64) -> Extent {
        Extent(self.0 & !0xffff | count)
    }
}

/// Extents of one segment whose indices follow each other.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) segment: Arc<Segment>,
    pub(crate) first: u64,
    /// One above the last index.
    pub(crate) end: u64,
    pub(crate) extents: Vec<Extent>,
}

/// Where a record that is applied stands.
pub(crate) enum Place<'a> {
    /// Nowhere yet; its bytes are in memory.
    Memory { lsn: u64 },
    /// In a segment.
    Disk { segment: &'a Arc<Segment>, offset: u32 },
}

/// A piece of an answer to a read, in the order of indices.
pub(crate) enum Piece {
    Memory(Entries, u64),
    Disk { segment: Arc<Segment>, offset: u32, len: u32, first: u64, count: u64 },
}

/// One group.
///
/// Invariants: indices in `runs`, then in `pending`, ascend; outside recovery they cover `(truncated, last]` without a
/// hole. `terms` holds (first index, term) of each run of equal terms above the truncated index, ascending; the first
/// begins at or below the first index.
#[derive(Debug, Default)]
pub(crate) struct Group {
    pub(crate) hard_state: HardState,
    pub(crate) truncated: (u64, u64),
    last: u64,
    /// Bytes of entries on disk.
    disk_bytes: u64,
    runs: VecDeque<Run>,
    terms: Vec<(u64, u64)>,
    // Rare or short-lived: an idle group pays a pointer for each.
    pending: PendingLog,
    pub(crate) snapshot: Option<Arc<SnapshotMeta>>,
    /// Ascending by key. A group has a value or two, for which a tree would take ten times the room.
    meta: Box<[(Bytes, Bytes)]>,
    pub(crate) damage: Option<Box<Damage>>,
}

impl Group {
    pub(crate) fn first_index(&self) -> u64 {
        self.truncated.0 + 1
    }

    pub(crate) fn last_index(&self) -> u64 {
        self.last.max(self.truncated.0)
    }

    pub(crate) fn view(&self, tombstone: Option<u64>) -> GroupView {
        GroupView {
            first_index: self.first_index(),
            last_index: self.last_index(),
            last_term: self.last_term(),
            hard_state: self.hard_state,
            truncated: self.truncated,
            snapshot: self.snapshot.as_deref().cloned(),
            damaged: self.damage.as_deref().cloned(),
            tombstone,
        }
    }

    pub(crate) fn last_term(&self) -> u64 {
        self.terms.last().map_or(self.truncated.1, |(_, term)| *term)
    }

    /// What a checkpoint says of the group.
    pub(crate) fn checkpoint(&self) -> GroupState {
        GroupState {
            hard_state: self.hard_state,
            truncated: self.truncated,
            last: (self.last_index(), self.last_term()),
            snapshot: self.snapshot.clone(),
            meta: self.meta.to_vec(),
            damage: self.damage.as_deref().cloned(),
        }
    }

    /// The group's metadata, ascending by key.
    pub(crate) fn meta(&self) -> &[(Bytes, Bytes)] {
        &self.meta
    }

    /// A value of the group's metadata.
    pub(crate) fn meta_of(&self, key: &[u8]) -> Option<Bytes> {
        let at = self.meta.binary_search_by(|(known, _)| known.as_ref().cmp(key)).ok()?;
        Some(self.meta[at].1.clone())
    }

    /// The term of an index, from memory.
    pub(crate) fn term(&self, index: u64) -> Result<u64> {
        if index == self.truncated.0 {
            return Ok(self.truncated.1);
        }
        if index < self.truncated.0 {
            return Err(Error::Compacted { first: self.first_index() });
        }
        if index > self.last_index() {
            return Err(Error::Unavailable { last: self.last_index() });
        }
        let after = self.terms.partition_point(|(first, _)| *first <= index);
        Ok(self.terms[..after].last().map_or(self.truncated.1, |(_, term)| *term))
    }

    /// Applies a record that passed [`Sim::check`] or was read back in its place. `Destroy` is the index's matter.
    pub(crate) fn apply(&mut self, head: &Head, body: Body, place: &Place<'_>) {
        match body {
            Body::Entries(entries) => self.append(head, entries, place),
            Body::HardState(state) => self.set_hard_state(state),
            Body::TruncatePrefix { index, term } => self.truncate_prefix(index, term),
            Body::ResetTo { index, term } => self.reset(index, term),
            Body::Snapshot { reset, meta } => {
                if reset {
                    self.reset(meta.index, meta.term);
                }
                // An own copy: a slice would keep the whole batch in memory for as long as the snapshot is known.
                let data = Bytes::copy_from_slice(&meta.data);
                self.snapshot = Some(Arc::new(SnapshotMeta { data, ..meta }));
            }
            Body::PutMeta { key, value } => self.put_meta(key, value),
            Body::Destroy { .. } => {}
        }
    }

    fn append(&mut self, head: &Head, entries: Entries, place: &Place<'_>) {
        let (first, count) = (entries.first, entries.count as u64);
        self.extend(first, count, entries.term_runs());
        match *place {
            Place::Memory { lsn } => self.pending.push(lsn, entries),
            Place::Disk { segment, offset } => {
                self.push_extent(segment, offset, head.padded() as u32, first, count)
            }
        }
    }

    /// Adds a record of entries that is on disk, by its outline. The caller has counted its bytes as live.
    pub(crate) fn append_outline(&mut self, head: &Head, terms: &Terms, segment: &Arc<Segment>, offset: u32) {
        let (first, count) = (head.index, u64::from(head.count));
        self.extend(first, count, terms.runs(first));
        self.place_extent(segment, offset, head.padded() as u32, first, count);
    }

    /// Adds a run as a footer lists it, with what that drops.
    pub(crate) fn adopt(&mut self, segment: &Arc<Segment>, run: Listed) {
        let Listed { first, end, terms, extents, .. } = run;
        let len: u64 = extents.iter().map(|extent| u64::from(extent.len())).sum();
        segment.add_live(len);
        self.disk_bytes += len;
        self.extend(first, end - first, terms.into_iter());
        self.add_run(Run { segment: segment.clone(), first, end, extents });
    }

    /// What the group has on disk, by index.
    pub(crate) fn runs(&self) -> impl Iterator<Item = &Run> {
        self.runs.iter()
    }

    /// The runs of equal terms in `[low, high)`, as (first index, term).
    pub(crate) fn terms_in(&self, low: u64, high: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let begins = self.terms.partition_point(|(first, _)| *first <= low);
        // A record may begin below the truncated index, where terms are no longer known and nobody asks for them.
        let at_low = begins.checked_sub(1).map_or(self.truncated.1, |before| self.terms[before].1);
        let later = self.terms[begins..].iter().copied().take_while(move |(first, _)| *first < high);
        std::iter::once((low, at_low)).chain(later)
    }

    pub(crate) fn set_hard_state(&mut self, state: HardState) {
        self.hard_state = state;
        if let Some(damage) = &mut self.damage {
            damage.hard_state = false;
        }
    }

    /// Moves the bounds and terms to where these entries leave them; where their bytes are is the caller's matter.
    fn extend(&mut self, first: u64, count: u64, terms: impl Iterator<Item = (u64, u64)>) {
        self.cut(first);
        self.note_terms(terms);
        self.last = first + count - 1;
    }

    fn note_terms(&mut self, runs: impl Iterator<Item = (u64, u64)>) {
        for (index, term) in runs {
            if self.terms.last().is_none_or(|(_, last)| *last != term) {
                self.terms.push((index, term));
            }
        }
    }

    /// Adds entries of which only place and range are known: their record is damaged.
    pub(crate) fn append_damaged(&mut self, head: &Head, segment: &Arc<Segment>, offset: u32) {
        let (first, count) = (head.index, u64::from(head.count));
        self.extend(first, count, std::iter::once((first, 0)));
        self.push_extent(segment, offset, head.padded() as u32, first, count);
        self.damage.get_or_insert_default().entries.push((first, first + count));
    }

    fn push_extent(&mut self, segment: &Arc<Segment>, offset: u32, len: u32, first: u64, count: u64) {
        segment.add_live(u64::from(len));
        self.place_extent(segment, offset, len, first, count);
    }

    fn place_extent(&mut self, segment: &Arc<Segment>, offset: u32, len: u32, first: u64, count: u64) {
        let extent = Extent::new(offset, len, count as u16);
        self.disk_bytes += u64::from(len);
        match self.runs.back_mut() {
            Some(run)
                if run.segment.id == segment.id && run.extents.len() < RUN_EXTENTS && run.end == first =>
            {
                run.extents.push(extent);
                run.end += count;
            }
            _ => {
                let (segment, end) = (segment.clone(), first + count);
                self.add_run(Run { segment, first, end, extents: vec![extent] });
            }
        }
    }

    /// The bytes of a pending record reached its segment.
    pub(crate) fn settle(&mut self, lsn: u64, segment: &Arc<Segment>, offset: u32, len: u32) {
        // A record that was cut meanwhile is no longer here: its bytes are dead on arrival.
        let Some(record) = self.pending.settle(lsn) else { return };
        self.push_extent(segment, offset, len, record.entries.first, record.count);
    }

    /// Drops entries at and above an index.
    fn cut(&mut self, from: u64) {
        if from > self.last {
            return;
        }
        self.pending.cut(from);
        while let Some(run) = self.runs.back_mut() {
            let mut end = run.end;
            while end > from
                && let Some(extent) = run.extents.pop()
            {
                let start = end - extent.count();
                if start < from {
                    run.extents.push(extent.with_count(from - start));
                } else {
                    self.disk_bytes -= u64::from(extent.len());
                    run.segment.sub_live(u64::from(extent.len()));
                }
                end = start;
            }
            run.end = run.end.min(from);
            if !run.extents.is_empty() {
                break;
            }
            self.runs.pop_back();
        }
        self.terms.truncate(self.terms.partition_point(|(first, _)| *first < from));
        self.last = from - 1;
        self.trim_damage(|low, high| (low, high.min(from)));
    }

    /// Drops entries up to an index.
    pub(crate) fn truncate_prefix(&mut self, index: u64, term: u64) {
        if index <= self.truncated.0 {
            return;
        }
        if index >= self.last {
            return self.reset(index, term);
        }
        while let Some(run) = self.runs.front_mut() {
            let mut gone = 0;
            while let Some(extent) =
                run.extents.get(gone).filter(|extent| run.first + extent.count() <= index + 1)
            {
                self.disk_bytes -= u64::from(extent.len());
                run.segment.sub_live(u64::from(extent.len()));
                run.first += extent.count();
                gone += 1;
            }
            run.extents.drain(..gone);
            if !run.extents.is_empty() {
                break;
            }
            self.runs.pop_front();
        }
        self.pending.truncate(index);
        self.truncated = (index, term);
        let covering = self.terms.partition_point(|(first, _)| *first <= index + 1).saturating_sub(1);
        self.terms.drain(..covering);
        self.trim_damage(|low, high| (low.max(index + 1), high));
        self.clear_truncation_damage();
    }

    fn reset(&mut self, index: u64, term: u64) {
        self.clear_log();
        self.truncated = (index, term);
        self.last = index;
        self.trim_damage(|_, _| (0, 0));
        self.clear_truncation_damage();
    }

    /// Most groups have one run for long, and a queue would begin with room for four.
    fn add_run(&mut self, run: Run) {
        if self.runs.is_empty() {
            self.runs.reserve_exact(1);
        }
        self.runs.push_back(run);
    }

    fn put_meta(&mut self, key: Bytes, value: Bytes) {
        let mut meta = std::mem::take(&mut self.meta).into_vec();
        let found = meta.binary_search_by(|(known, _)| known.cmp(&key));
        // Own copies: a slice would keep the whole batch in memory for as long as the value lives.
        let own = Bytes::copy_from_slice;
        match found {
            Ok(at) if value.is_empty() => drop(meta.remove(at)),
            Ok(at) => meta[at].1 = own(&value),
            Err(_) if value.is_empty() => {}
            Err(at) => meta.insert(at, (own(&key), own(&value))),
        }
        self.meta = meta.into();
    }

    /// Forgets all entries.
    pub(crate) fn clear_log(&mut self) {
        for run in self.runs.drain(..) {
            run.segment.sub_live(run.extents.iter().map(|extent| u64::from(extent.len())).sum());
        }
        self.runs.shrink_to_fit();
        self.disk_bytes = 0;
        self.pending.clear();
        self.terms = Vec::new();
        self.last = self.truncated.0;
    }

    fn trim_damage(&mut self, trim: impl Fn(u64, u64) -> (u64, u64)) {
        if let Some(damage) = &mut self.damage {
            damage.entries.iter_mut().for_each(|range| *range = trim(range.0, range.1));
            damage.entries.retain(|(low, high)| low < high);
        }
    }

    fn clear_truncation_damage(&mut self) {
        if let Some(damage) = &mut self.damage {
            damage.truncation = false;
        }
    }

    /// Takes what a checkpoint says besides the bounds, for which [`Group::clip`] comes later.
    pub(crate) fn restore(&mut self, state: &GroupState) {
        self.hard_state = state.hard_state;
        self.snapshot.clone_from(&state.snapshot);
        self.meta = state.meta.clone().into();
        self.meta.sort_unstable();
    }

    /// Sets the bounds that a checkpoint states, and drops what lies outside. Missing entries leave holes.
    pub(crate) fn clip(&mut self, truncated: (u64, u64), last: (u64, u64)) {
        if last.0 <= truncated.0 {
            return self.reset(truncated.0, truncated.1);
        }
        self.cut(last.0 + 1);
        self.truncate_prefix(truncated.0, truncated.1);
        self.truncated = truncated;
        if self.last_index() < last.0 {
            self.note_terms(std::iter::once((self.last_index() + 1, last.1)));
            self.last = last.0;
        }
    }

    /// Applies what can be known of a damaged record: its kind and range. What it would have said is noted as lost, until
    /// a later record says it anew.
    pub(crate) fn apply_damaged(&mut self, head: &Head, segment: &Arc<Segment>, offset: u32) {
        let mut lost = Damage::default();
        match head.kind {
            Kind::Entries => return self.append_damaged(head, segment, offset),
            Kind::HardState => lost.hard_state = true,
            Kind::PutMeta => lost.meta = true,
            Kind::TruncatePrefix => match self.term(head.index) {
                Ok(term) => self.truncate_prefix(head.index, term),
                Err(_) => lost.truncation = head.index > self.truncated.0,
            },
            Kind::ResetTo => {
                self.reset(head.index, 0);
                lost.truncation = true;
            }
            Kind::Snapshot => {
                lost.meta = true;
                if head.count == 1 {
                    self.reset(head.index, 0);
                    lost.truncation = true;
                }
            }
            Kind::Destroy => {}
        }
        if !lost.is_empty() {
            let damage = self.damage.get_or_insert_default();
            damage.hard_state |= lost.hard_state;
            damage.truncation |= lost.truncation;
            damage.meta |= lost.meta;
        }
    }

    /// Index ranges above the truncated index for which there are neither extents nor pending records.
    pub(crate) fn holes(&self) -> Vec<(u64, u64)> {
        let mut holes = Vec::new();
        let mut next = self.first_index();
        let runs = self.runs.iter().map(|run| (run.first, run.end));
        let pending =
            self.pending.iter().map(|record| (record.entries.first, record.entries.first + record.count));
        for (first, end) in runs.chain(pending) {
            if first > next {
                holes.push((next, first));
            }
            next = next.max(end);
        }
        if self.last_index() + 1 > next {
            holes.push((next, self.last_index() + 1));
        }
        holes
    }

    /// The pieces that hold `[low, high)`, as many as are needed for `max_bytes`, at least one.
    pub(crate) fn pieces(&self, low: u64, high: u64, max_bytes: u64, out: &mut Vec<Piece>) {
        let mut bytes = 0;
        let start = self.runs.partition_point(|run| run.first <= low).saturating_sub(1);
        for run in self.runs.range(start..) {
            let mut first = run.first;
            for extent in &run.extents {
                if first >= high || bytes > max_bytes {
                    return;
                }
                let (count, len) = (extent.count(), extent.len());
                if first + count > low {
                    let segment = run.segment.clone();
                    out.push(Piece::Disk { segment, offset: extent.offset(), len, first, count });
                    // The first piece may hold much that lies before the range.
                    bytes += if first >= low { u64::from(len) } else { 0 };
                }
                first += count;
            }
        }
        for record in self.pending.iter() {
            let first = record.entries.first;
            if first >= high || bytes > max_bytes {
                return;
            }
            if first + record.count > low {
                out.push(Piece::Memory(record.entries.clone(), record.count));
                bytes += if first >= low { record.entries.bytes.len() as u64 } else { 0 };
            }
        }
    }

    /// Visits the records of entries in a segment, as (offset, length, first index, count).
    pub(crate) fn extents_in(&self, segment: &Segment, mut visit: impl FnMut(u32, u32, u64, u64)) {
        for run in self.runs.iter().filter(|run| run.segment.id == segment.id) {
            let mut first = run.first;
            for extent in &run.extents {
                visit(extent.offset(), extent.len(), first, extent.count());
                first += extent.count();
            }
        }
    }

    /// Whether the record at an offset of a segment is part of the log.
    pub(crate) fn holds(&self, segment: &Segment, offset: u32) -> bool {
        let mut held = false;
        self.extents_in(segment, |at, _, _, _| held |= at == offset);
        held
    }

    /// Bytes of entries that wait for the disk.
    pub(crate) fn pending_bytes(&self) -> u64 {
        self.pending.bytes()
    }

    /// Bytes of entries on disk, and the oldest segment that holds some.
    pub(crate) fn disk_bytes(&self) -> (u64, Option<u32>) {
        (self.disk_bytes, self.runs.front().map(|run| run.segment.id))
    }

    /// Panics if an invariant does not hold. Debug builds ask after every change.
    #[cfg(debug_assertions)]
    pub(crate) fn check_invariants(&self) {
        assert!(self.last_index() >= self.truncated.0);
        if self.damage.is_none() {
            assert_eq!(self.holes(), [], "a healthy group has no holes");
        }
        let extents = self.runs.iter().flat_map(|run| &run.extents);
        assert_eq!(self.disk_bytes, extents.map(|extent| u64::from(extent.len())).sum::<u64>());
        assert!(self.terms.is_sorted_by(|a, b| a.0 < b.0), "term runs ascend: {:?}", self.terms);
        assert!(self.terms.first().is_none_or(|(first, _)| *first <= self.first_index()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{RealFs, fs::Fs, fs::OpenMode, record};
    use pontoon_proto::GroupId;

    /// A record of entries as a submitter encodes it.
    fn entries(first: u64, terms: &[u64]) -> (Head, Body) {
        let list: Vec<crate::Entry> = terms
            .iter()
            .zip(first..)
            .map(|(term, index)| crate::Entry { index, term: *term, kind: 0, data: "x".into() })
            .collect();
        let (mut data, mut dir) = (Vec::new(), Vec::new());
        let head = (Kind::Entries, GroupId(1), first, terms.len() as u32);
        record::encode(&mut data, &mut dir, head, |out| record::put_entries(out, &list));
        record::decode(&data.into()).unwrap()
    }

    fn append(group: &mut Group, lsn: u64, first: u64, terms: &[u64]) {
        let (head, body) = entries(first, terms);
        group.apply(&head, body, &Place::Memory { lsn });
        group.check_invariants();
    }

    fn segment() -> Arc<Segment> {
        let file = RealFs.open(std::path::Path::new("/dev/null"), OpenMode::Read).unwrap();
        Arc::new(Segment::new(1, 1, "/dev/null".into(), file))
    }

    #[test]
    fn an_idle_group_is_small_and_an_extent_has_eight_bytes() {
        assert!(size_of::<Group>() <= 152, "{}", size_of::<Group>());
        assert_eq!(size_of::<Extent>(), 8);
        let extent = Extent::new((1 << 30) - 8, (16 << 20) - 8, u16::MAX);
        assert_eq!((extent.offset(), extent.len(), extent.count()), ((1 << 30) - 8, (16 << 20) - 8, 65_535));
    }

    #[test]
    fn terms_follow_appends_cuts_and_truncations() {
        let mut group = Group::default();
        append(&mut group, 1, 1, &[1, 1, 2, 2, 3]);
        append(&mut group, 2, 4, &[5, 5]);
        let terms: Vec<u64> = (0..=5).map(|index| group.term(index).unwrap()).collect();
        assert_eq!(terms, [0, 1, 1, 2, 5, 5]);
        group.truncate_prefix(3, 2);
        group.check_invariants();
        assert_eq!((group.term(3).unwrap(), group.term(4).unwrap()), (2, 5));
        assert!(matches!(group.term(2), Err(Error::Compacted { first: 4 })));
        assert!(matches!(group.term(6), Err(Error::Unavailable { last: 5 })));
    }

    #[test]
    fn a_record_that_was_cut_before_it_was_written_is_dead_on_arrival() {
        let (mut group, segment) = (Group::default(), segment());
        append(&mut group, 1, 1, &[1, 1, 1]);
        append(&mut group, 2, 4, &[1, 1]);
        append(&mut group, 3, 3, &[2]);
        group.settle(1, &segment, 0, 80);
        group.settle(2, &segment, 80, 64);
        assert_eq!(segment.live_bytes(), 80, "the second record is gone");
        group.settle(3, &segment, 144, 48);
        group.check_invariants();
        assert_eq!((group.last_index(), segment.live_bytes()), (3, 128));
        group.truncate_prefix(2, 1);
        assert_eq!(segment.live_bytes(), 48);
        group.clear_log();
        assert_eq!(segment.live_bytes(), 0);
    }
}
