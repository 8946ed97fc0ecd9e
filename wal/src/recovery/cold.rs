//! The cold stream: which of its frames count, and the records that they hold.
//!
//! A checkpoint says all of it. A frame counts iff its segment is listed for the stream with its open, and its number is
//! from the segment's first one to the lower of the segment's last one and the checkpoint's cold seq. Such a frame was
//! durable before the checkpoint was written, so one that is missing or damaged is corruption. Every other one is void: its
//! originals are in segments that are still listed. `relocate` has the argument.
//!
//! | frame `s` is | then |
//! |---|---|
//! | whole | live |
//! | damaged in some records | the others count; of these the originals do, if they are still there |
//! | without its own head or directory, the copy is readable | the same |
//! | without either | the log does not open: nobody knows whom it hits |
//!
//! Only entries are relocated, and all of them lie at or below the checkpoint's LSN. So they are applied before the
//! checkpoint's bounds, in LSN order among the others. A record may be there twice, in two segments: it is the same, and is
//! applied once, from a copy that is intact.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use bytes::Bytes;

use super::{
    DamagedRecord, RecoveryReport,
    scan::{Found, read_frame},
    whole::on_threads,
};
use crate::{
    Error, Result,
    frame::{BLOCK, COLD, FRAME_HEADER, FrameHeader, Probe},
    manifest::{ListedSegment, Listing, Manifest},
    outline::Terms,
    record::{self, Head, Kind},
    rules::{Rule, is_broken},
    segment::Segment,
};

/// The cold frames that count.
#[derive(Debug, Default)]
pub(crate) struct Cold {
    /// Those that were found, by frame_seq.
    pub(crate) frames: BTreeMap<u64, Found>,
    /// Those of which nothing was found.
    pub(crate) missing: Vec<u64>,
    /// Per segment that holds some: first and last frame_seq, and the open that wrote them.
    pub(crate) ranges: BTreeMap<u32, (u64, u64, u64)>,
}

/// A relocated record of entries.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) lsn: u64,
    pub(super) head: Head,
    pub(super) segment: Arc<Segment>,
    pub(super) offset: u32,
    /// `None` if its bytes are damaged.
    pub(super) terms: Option<Terms>,
}

/// Lines in the order of their LSNs, each once.
pub(super) type Lines = VecDeque<Line>;

impl Cold {
    /// Sorts out the frames that were found.
    pub(crate) fn new(found: Vec<Found>, manifest: &Manifest) -> Cold {
        let mut cold = Cold::default();
        let mut by_place: BTreeMap<(u32, u64, u64), Found> = BTreeMap::new();
        for found in found {
            by_place.insert((found.segment.id, found.incarnation, found.seq), found);
        }
        for entry in manifest.segments.iter().filter(|entry| entry.stream == COLD) {
            let Some(last) = last_of(entry, manifest.as_of.seqs[1], &by_place) else { continue };
            cold.ranges.insert(entry.id, (entry.first_seq, last, entry.incarnation));
            let mut expected = entry.first_seq;
            let from = (entry.id, entry.incarnation, entry.first_seq);
            for ((_, _, seq), found) in by_place.range(from..=(entry.id, entry.incarnation, last)) {
                // Of each gap the first: nobody can say more of it.
                cold.missing.extend((expected < *seq).then_some(expected));
                cold.frames.insert(*seq, found.clone());
                expected = seq + 1;
            }
            cold.missing.extend((expected <= last).then_some(expected));
        }
        cold
    }

    /// The records of entries for which `is_needed` says so, dealt out by `share_of`, if all are as they were written.
    pub(super) fn whole(
        &self,
        threads: usize,
        is_needed: impl Fn(&Head, u64) -> bool + Sync,
        share_of: impl Fn(&Head) -> usize,
    ) -> Result<Option<(Vec<Lines>, u64)>> {
        if !self.missing.is_empty() {
            return Ok(None);
        }
        let mut shares: Vec<BTreeMap<u64, Line>> = (0..threads).map(|_| BTreeMap::new()).collect();
        let mut records = 0;
        let frames: Vec<&Found> = self.frames.values().collect();
        for some in frames.chunks(threads) {
            let needed = &is_needed;
            let take = |found: &Found| -> Result<Option<(Vec<Line>, u64)>> {
                let Some(frame) = open(found)?.filter(|_| found.copy_at.is_none()) else { return Ok(None) };
                let count = frame.lines.len() as u64;
                let mut lines = Vec::new();
                for (head, lsn, offset) in frame.lines {
                    let line = frame_line(found, &frame.bytes, head, lsn, offset);
                    if line.terms.is_none() {
                        return Ok(None);
                    }
                    lines.extend(Some(line).filter(|line| needed(&line.head, lsn)));
                }
                Ok(Some((lines, count)))
            };
            for taken in on_threads(some.iter().map(|&found| move || take(found)).collect()) {
                let Some((lines, count)) = taken? else { return Ok(None) };
                records += count;
                for line in lines {
                    // In the order of the frames: of two copies the later one stays.
                    shares[share_of(&line.head)].insert(line.lsn, line);
                }
            }
        }
        Ok(Some((shares.into_iter().map(|share| share.into_values().collect()).collect(), records)))
    }

    /// The records of entries for which `is_needed` says so, damaged or not. What is damaged is reported.
    pub(super) fn salvage(
        &self,
        is_needed: impl Fn(&Head, u64) -> bool,
        report: &mut RecoveryReport,
    ) -> Result<Lines> {
        if let Some(seq) = self.missing.first() {
            let (id, _) = self.ranges.iter().find(|(_, (from, to, _))| (from..=to).contains(&seq)).unzip();
            let segment = self.frames.values().map(|found| &found.segment).find(|one| Some(&one.id) == id);
            let path = segment.map_or("a segment of relocated records".into(), |one| one.path.clone());
            return Err(unknown(path, 0, *seq));
        }
        let mut lines: BTreeMap<u64, Line> = BTreeMap::new();
        for found in self.frames.values() {
            let offset = u64::from(found.block) * BLOCK as u64;
            let Some(frame) = open(found)? else {
                return Err(unknown(found.segment.path.clone(), offset, found.seq));
            };
            report.frames += 1;
            for (head, lsn, offset) in frame.lines {
                report.records += 1;
                let line = frame_line(found, &frame.bytes, head, lsn, offset);
                if line.terms.is_none() {
                    report.damaged.push(damaged(&line));
                }
                if head.kind != Kind::Entries || !is_needed(&head, lsn) {
                    continue;
                }
                let known = lines.get(&lsn).is_some_and(|known| known.terms.is_some());
                if line.terms.is_some() || !known {
                    lines.insert(lsn, line);
                }
            }
        }
        Ok(lines.into_values().collect())
    }
}

/// The last frame of a segment that counts; `None` if none does.
fn last_of(entry: &ListedSegment, cold_seq: u64, found: &BTreeMap<(u32, u64, u64), Found>) -> Option<u64> {
    let there = found.range(..=(entry.id, entry.incarnation, u64::MAX)).next_back();
    let last = match entry.listing {
        // A segment that took frames before the capture is listed as active or sealed.
        Listing::Prepared => return None,
        _ if is_broken(Rule::ColdUpToCheckpoint) => there.map_or(0, |((_, _, seq), _)| *seq),
        Listing::Sealed => entry.last_seq.min(cold_seq),
        Listing::Active => cold_seq,
    };
    (entry.first_seq <= last).then_some(last)
}

fn unknown(path: std::path::PathBuf, offset: u64, seq: u64) -> Error {
    let what = format!(
        "cold frame {seq} was durable and is gone with every copy of its directory; \
         restore the directory or replace the node"
    );
    Error::Corrupt { path, offset, what }
}

fn damaged(line: &Line) -> DamagedRecord {
    DamagedRecord::of(&line.head, &line.segment, line.offset)
}

/// A frame with its directory, from its own head or from the copy.
struct Opened {
    bytes: Bytes,
    /// Heads with LSN and offset in the frame.
    lines: Vec<(Head, u64, u32)>,
}

/// Reads a frame. `None` if neither directory is readable.
fn open(found: &Found) -> Result<Option<Opened>> {
    let bytes = read_frame(found)?;
    let own = found.copy_at.map_or(0, |block| (block - found.block) as usize * BLOCK);
    let (Probe::Frame(header) | Probe::Copy(header)) = FrameHeader::probe(&bytes[own..]) else {
        return Ok(None);
    };
    let places = [own, header.copy_block as usize * BLOCK];
    found.segment.adopt(&header)?;
    let lines = places.iter().find_map(|at| found.segment.lines(&header, bytes.get(at + FRAME_HEADER..)?));
    let Some(lines) = lines else { return Ok(None) };
    let mut offset = header.records_offset;
    let place = |(head, lsn): (Head, u64)| {
        let at = offset;
        offset += head.padded() as u32;
        (head, lsn, at)
    };
    let lines = lines.into_iter().map(place).collect();
    Ok(Some(Opened { bytes, lines }))
}

fn frame_line(found: &Found, bytes: &Bytes, head: Head, lsn: u64, offset: u32) -> Line {
    let record = bytes.get(offset as usize..).filter(|record| record::verify(record, &head));
    let offset = found.block * BLOCK as u32 + offset;
    let plain = record.and_then(|record| found.segment.open(offset, bytes.slice_ref(record)));
    let terms = plain.and_then(|plain| match head.kind {
        Kind::Entries => record::terms(&record::decode_head(&plain)?, &plain),
        // Nothing else is relocated.
        _ => Some(Terms::One(0)),
    });
    Line { lsn, head, segment: found.segment.clone(), offset, terms }
}
