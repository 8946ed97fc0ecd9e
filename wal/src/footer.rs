//! Footers: where the entries of a sealed segment are, so that an open need not read their records.
//!
//! A footer is drafted while a checkpoint captures the index and belongs to that checkpoint: together they say what the
//! segment's records said. It lies behind the segment's last frame, where nothing acknowledged is, and counts only if a
//! manifest lists it by place and CRC. A segment without one, or with one that is not what the manifest says, is scanned.
//!
//! ```text
//!  header 384 | head of the last frame | runs of the groups of shard 0 | of shard 1 | … | zeros to 4 KiB
//! ```
//!
//! The head is there if the last frame is one of those that leave the copy of theirs to the next frame: that may be in a
//! segment that goes before this one, or never be written.
//!
//! `docs/wal-format.md` gives each byte, and argues why it may be believed.

use std::sync::Arc;

use bytes::{BufMut, Bytes};
use pontoon_proto::GroupId;

use crate::{
    codec::{Decoder, put_varint, round_up},
    crypt::{FOOTER_EXTRA, Seal},
    frame::BLOCK,
    index::{Extent, Group, Index, RUN_EXTENTS, Run, SHARDS},
    manifest::FooterAt,
    record::MAX_INDEX,
    rules::{Rule, is_broken},
    segment::Segment,
    slab::Slabs,
    table::SealedFooter,
};

/// The format that is written, and the only one that is read: what is unknown is scanned instead.
const FORMAT: u16 = 1;
const MAGIC: &[u8; 8] = b"PNTNFOOT";
const CRC_FROM: usize = 12;
/// Where the lengths of the sections begin.
const LENGTHS: usize = 128;
const HEADER: usize = LENGTHS + SHARDS * 4;

/// Room that is kept for each run: group, first index, counts and one term are seldom longer.
const RUN_BYTES: usize = 32;

/// Blocks that the footer of a segment takes, if so many records with entries in it belong to so many groups. More terms
/// than one a run may make it longer: then the segment has none.
pub(crate) fn room_blocks(records: usize, groups: usize) -> usize {
    let runs = records.min(groups + records / RUN_EXTENTS);
    (HEADER + records * size_of::<Extent>() + runs * RUN_BYTES + FOOTER_EXTRA).div_ceil(BLOCK)
}

/// Which segment a footer is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) store: u128,
    pub(crate) epoch: u128,
    pub(crate) segment: u32,
    pub(crate) stream: u8,
    pub(crate) incarnation: u64,
    pub(crate) first_seq: u64,
    pub(crate) last_seq: u64,
    /// The block where the footer begins, behind the last frame.
    pub(crate) block: u32,
    /// The checkpoint's capture began at this LSN.
    pub(crate) lsn: u64,
    /// The LSNs of the segment's first record and of its last, 0 if there is none: relocated records with LSNs between them
    /// are copies of what the footer lists.
    pub(crate) first_lsn: u64,
    pub(crate) last_lsn: u64,
}

/// A footer that is gathered while the index is captured.
pub(crate) struct Draft {
    pub(crate) segment: u32,
    sections: Vec<Vec<u8>>,
}

impl Draft {
    pub(crate) fn new(segment: u32) -> Draft {
        Draft { segment, sections: vec![Vec::new(); SHARDS] }
    }

    /// Adds a run of a group.
    fn add(&mut self, group: GroupId, state: &Group, run: &Run) {
        let out = &mut self.sections[Index::shard_of(group)];
        put_varint(out, group.0);
        put_varint(out, run.first);
        put_varint(out, run.extents.len() as u64);
        put_varint(out, state.terms_in(run.first, run.end).count() as u64);
        let mut before = run.first;
        for (first, term) in state.terms_in(run.first, run.end) {
            put_varint(out, first - before);
            put_varint(out, term);
            before = first;
        }
        run.extents.iter().for_each(|extent| out.put_u64_le(extent.0));
    }

    /// The footer's blocks, and what the manifest says of it; `None` if it does not fit a segment of this size. `head` is
    /// the copy of the last frame's head, if that has no other in its segment. With a seal it is encrypted, and what the
    /// manifest says is said of the plain one; `drawn` is as [`Seal::seal_footer`] wants it.
    pub(crate) fn seal(
        &self,
        facts: &Facts,
        head: &[u8],
        segment_bytes: u64,
        seal: Option<&Seal>,
        drawn: u64,
    ) -> Option<(FooterAt, Bytes)> {
        let len = HEADER + head.len() + self.sections.iter().map(Vec::len).sum::<usize>();
        let padded = round_up(len + seal.map_or(0, |_| FOOTER_EXTRA), BLOCK);
        if u64::from(facts.block) * BLOCK as u64 + padded as u64 > segment_bytes {
            return None;
        }
        let body_crc = self
            .sections
            .iter()
            .fold(crc32c::crc32c(head), |crc, section| crc32c::crc32c_append(crc, section));
        let mut header = Vec::with_capacity(HEADER);
        header.put_slice(MAGIC);
        header.put_u32_le(0);
        header.put_u16_le(FORMAT);
        header.put_slice(&[facts.stream, 0]);
        header.put_u128_le(facts.store);
        header.put_u128_le(facts.epoch);
        header.put_u32_le(facts.segment);
        header.put_u32_le(facts.block);
        header.put_u64_le(facts.incarnation);
        header.put_u64_le(facts.first_seq);
        header.put_u64_le(facts.last_seq);
        header.put_u64_le(facts.lsn);
        header.put_u32_le(head.len() as u32);
        header.put_u32_le(body_crc);
        header.put_u64_le(facts.first_lsn);
        header.put_u64_le(facts.last_lsn);
        header.resize(LENGTHS, 0);
        self.sections.iter().for_each(|section| header.put_u32_le(section.len() as u32));
        let crc = crc32c::crc32c(&header[CRC_FROM..]);
        header[8..CRC_FROM].copy_from_slice(&crc.to_le_bytes());
        let mut out = Slabs::default().take(padded);
        out.put_slice(&header);
        out.put_slice(head);
        self.sections.iter().for_each(|section| out.put_slice(section));
        if let Some(seal) = seal {
            let sealed = seal.seal_footer(&out, drawn);
            out.clear();
            out.put_slice(&sealed);
        }
        out.put_bytes(0, padded - out.len());
        Some((FooterAt { block: facts.block, len: len as u32, crc }, out.freeze()))
    }
}

/// Adds what a group has in the segments of these drafts, which ascend by segment.
pub(crate) fn draft(drafts: &mut [Draft], group: GroupId, state: &Group) {
    for run in state.runs() {
        if let Ok(nth) = drafts.binary_search_by_key(&run.segment.id, |draft| draft.segment) {
            drafts[nth].add(group, state, run);
        }
    }
}

/// A run as a footer lists it.
pub(crate) struct Listed {
    pub(crate) group: GroupId,
    pub(crate) first: u64,
    /// One above the last index.
    pub(crate) end: u64,
    /// (first index, term), ascending.
    pub(crate) terms: Vec<(u64, u64)>,
    pub(crate) extents: Vec<Extent>,
}

/// A footer that was read and is what its manifest says.
pub(crate) struct Footer {
    pub(crate) segment: Arc<Segment>,
    pub(crate) facts: Facts,
    /// The copy of the last frame's head; empty if that frame has its own.
    pub(crate) head: Bytes,
    bytes: Bytes,
    /// Where each section ends, after the head's end.
    ends: Vec<usize>,
}

impl Footer {
    /// Takes the bytes that a manifest lists; `None` if they are not what was written for this use of the segment.
    pub(crate) fn decode(segment: &Arc<Segment>, at: &FooterAt, bytes: Bytes) -> Option<Footer> {
        let header = bytes.get(..HEADER)?;
        let crc = crc32c::crc32c(&header[CRC_FROM..]);
        let mut d = Decoder(header);
        let is_one = d.take(8)? == MAGIC && d.u32()? == crc && d.u16()? == FORMAT;
        let stream = d.u8()?;
        d.u8()?;
        let (store, epoch, id, block) = (d.u128()?, d.u128()?, d.u32()?, d.u32()?);
        let (incarnation, first_seq, last_seq, lsn) = (d.u64()?, d.u64()?, d.u64()?, d.u64()?);
        let (head_len, body_crc) = (d.u32()? as usize, d.u32()?);
        let (first_lsn, last_lsn) = (d.u64()?, d.u64()?);
        let is_it = (crc, block, bytes.len()) == (at.crc, at.block, at.len as usize)
            && (epoch, id) == (segment.epoch, segment.id);
        let is_intact = is_one && is_it && crc32c::crc32c(&bytes[HEADER..]) == body_crc;
        if !is_intact && !is_broken(Rule::FooterChecked) {
            return None;
        }
        let mut end = HEADER.checked_add(head_len)?;
        let mut ends = vec![end];
        for len in header[LENGTHS..].as_chunks::<4>().0 {
            end = end.checked_add(u32::from_le_bytes(*len) as usize)?;
            ends.push(end);
        }
        let is_sound = end == bytes.len() && first_seq <= last_seq && last_seq < 1 << 62;
        let facts = Facts {
            store,
            epoch,
            segment: id,
            stream,
            incarnation,
            first_seq,
            last_seq,
            block,
            lsn,
            first_lsn,
            last_lsn,
        };
        is_sound.then(|| {
            let head = bytes.slice(HEADER..HEADER + head_len);
            Footer { segment: segment.clone(), facts, head, bytes, ends }
        })
    }

    /// What the table says of it.
    pub(crate) fn listed(&self) -> SealedFooter {
        let crc = crc32c::crc32c(&self.bytes[CRC_FROM..HEADER]);
        let at = FooterAt { block: self.facts.block, len: self.bytes.len() as u32, crc };
        SealedFooter { at, lsn: self.facts.lsn }
    }

    /// Hands out the runs of a shard's groups; `None` if they make no sense, whatever the CRC says.
    pub(crate) fn runs(&self, shard: usize, mut take: impl FnMut(Listed)) -> Option<()> {
        let mut d = Decoder(&self.bytes[self.ends[shard]..self.ends[shard + 1]]);
        let limit = u64::from(self.facts.block) * BLOCK as u64;
        while !d.0.is_empty() {
            let group = GroupId(d.varint()?);
            let first = d.varint()?;
            let extents = usize::try_from(d.varint()?).ok().filter(|n| (1..=RUN_EXTENTS).contains(n))?;
            let count = d.varint()?;
            let mut terms = Vec::new();
            let mut before = first;
            for _ in 0..count {
                before = before.checked_add(d.varint()?)?;
                terms.push((before, d.varint()?));
            }
            let words = d.take(extents * 8)?.as_chunks::<8>().0;
            let extents: Vec<Extent> = words.iter().map(|word| Extent(u64::from_le_bytes(*word))).collect();
            let end = first.checked_add(extents.iter().map(|extent| extent.count()).sum())?;
            let fits = |extent: &Extent| {
                extent.count() > 0
                    && extent.len() > 0
                    && u64::from(extent.offset()) + u64::from(extent.len()) <= limit
            };
            let is_sound = Index::shard_of(group) == shard
                && first > 0
                && end <= MAX_INDEX + 1
                && extents.iter().all(fits)
                && terms.first().is_some_and(|(index, _)| *index == first)
                && terms.is_sorted_by(|a, b| a.0 < b.0)
                && terms.last().is_some_and(|(index, _)| *index < end);
            if !is_sound {
                return None;
            }
            take(Listed { group, first, end, terms, extents });
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{RealFs, fs::Fs, fs::OpenMode};

    fn segment(epoch: u128) -> Arc<Segment> {
        let file = RealFs.open(std::path::Path::new("/dev/null"), OpenMode::Read).unwrap();
        Arc::new(Segment::new(3, epoch, "/dev/null".into(), file))
    }

    fn sample() -> (Arc<Segment>, FooterAt, Bytes) {
        let segment = segment(8);
        let mut group = Group::default();
        let run = |first, terms: Vec<(u64, u64)>, extents: Vec<Extent>| {
            let end = first + extents.iter().map(|extent| extent.count()).sum::<u64>();
            Listed { group: GroupId(7), first, end, terms, extents }
        };
        group.adopt(
            &segment,
            run(4, vec![(4, 1), (6, 2)], vec![Extent::new(512, 64, 2), Extent::new(576, 80, 3)]),
        );
        let mut drafts = [Draft::new(2), Draft::new(3)];
        draft(&mut drafts, GroupId(7), &group);
        let facts = Facts {
            store: 1,
            epoch: 8,
            segment: 3,
            stream: 0,
            incarnation: 5,
            first_seq: 2,
            last_seq: 9,
            block: 2,
            lsn: 77,
            first_lsn: 40,
            last_lsn: 70,
        };
        assert_eq!(drafts[1].seal(&facts, b"head", 2 * BLOCK as u64, None, 0), None, "there is no room");
        let (at, bytes) = drafts[1].seal(&facts, b"head", 3 * BLOCK as u64, None, 0).unwrap();
        assert_eq!(bytes.len(), BLOCK);
        (segment, at, bytes.slice(..at.len as usize))
    }

    #[test]
    fn what_a_group_has_in_a_segment_comes_back() {
        let (segment, at, bytes) = sample();
        let footer = Footer::decode(&segment, &at, bytes).unwrap();
        assert_eq!((footer.facts.last_seq, footer.facts.lsn, &footer.head[..]), (9, 77, &b"head"[..]));
        let mut runs = Vec::new();
        for shard in 0..SHARDS {
            footer.runs(shard, |run| runs.push(run)).unwrap();
        }
        assert_eq!(runs.len(), 1);
        let mut group = Group::default();
        group.adopt(&segment, runs.remove(0));
        let terms: Vec<u64> = (4..=8).map(|index| group.term(index).unwrap()).collect();
        assert_eq!(terms, [1, 1, 2, 2, 2]);
        let mut extents = Vec::new();
        group.extents_in(&segment, |offset, len, first, count| extents.push((offset, len, first, count)));
        assert_eq!(extents, [(512, 64, 4, 2), (576, 80, 6, 3)]);
    }

    #[test]
    fn any_flipped_bit_and_any_other_use_of_the_file_is_noticed() {
        let (segment, at, bytes) = sample();
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(Footer::decode(&segment, &at, flipped.into()).is_none(), "bit {bit}");
        }
        assert!(Footer::decode(&self::segment(9), &at, bytes.clone()).is_none());
        assert!(Footer::decode(&segment, &FooterAt { crc: at.crc ^ 1, ..at }, bytes).is_none());
    }

    #[test]
    fn the_room_that_is_kept_is_enough_for_one_term_a_run() {
        let segment = segment(8);
        for (groups, records) in [(1, 1), (1, 1000), (500, 500), (40, 5000), (5000, 5000)] {
            let mut drafts = [Draft::new(3)];
            for group in 0..groups {
                let mut state = Group::default();
                let mut first = 1 << 40;
                let mut left: usize = records / groups;
                while left > 0 {
                    let extents = vec![Extent::new(4096, 64, u16::MAX); left.min(RUN_EXTENTS)];
                    left -= extents.len();
                    let end = first + extents.len() as u64 * u64::from(u16::MAX);
                    let (group, terms) = (GroupId(1 << 30 | group as u64), vec![(first, 1 << 30)]);
                    state.adopt(&segment, Listed { group, first, end, terms, extents });
                    first = end;
                }
                draft(&mut drafts, GroupId(1 << 30 | group as u64), &state);
            }
            let len = HEADER + drafts[0].sections.iter().map(Vec::len).sum::<usize>();
            assert!(len <= room_blocks(records, groups) * BLOCK, "{groups} groups, {records} records: {len}");
        }
    }
}
