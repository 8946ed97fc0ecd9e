//! Replaying a log that nothing happened to, on all cores.
//!
//! Frames are read in pieces of a few megabytes. Of a few pieces at a time, each thread first takes one piece apart, and
//! then each applies the records of its share of the groups, in order. Memory is bounded by the pieces under way.
//!
//! This path knows no damage. Whatever is not as it was written makes it give up before anything is decided, and
//! [`super::replay`] starts over, one frame after the other.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    chain::Chain,
    cold::{Cold, Lines},
    replay::{Replay, apply_cold},
    scan::{Found, read_blocks},
};
use crate::{
    Result,
    footer::{Facts, Footer},
    frame::{BLOCK, FRAME_HEADER, FrameHeader, Probe},
    index::{Index, Place, SHARDS},
    outline::{Gist, Outline},
    record::{self, Body, Head, Kind},
    segment::Segment,
};

/// A piece ends with the first frame that reaches this.
const PIECE_BLOCKS: u32 = (2 << 20) / BLOCK as u32;

/// What is taken apart at once.
enum Piece<'a> {
    /// Successive frames of one segment.
    Frames { segment: &'a Arc<Segment>, frames: Vec<&'a Found> },
    /// All that a segment holds.
    Footer(&'a Footer),
}

/// A record that is to be applied.
struct Line {
    lsn: u64,
    offset: u32,
    outline: Outline,
}

/// What frames hold, for each share of the groups.
#[derive(Default)]
struct Taken {
    shares: Vec<Vec<Line>>,
    records: u64,
    last_lsn: u64,
}

/// What a share of the groups has in a piece.
enum Part<'a> {
    Lines(&'a Arc<Segment>, Vec<Line>),
    Footer(&'a Footer),
}

/// What was replayed.
#[derive(Debug, Default)]
pub(super) struct Whole {
    pub(super) frames: u64,
    pub(super) records: u64,
}

/// Applies all frames at or below the proven mark, or the footers that stand for them. `None`: something is not as it was
/// written, and what the replay holds by now is of no use.
pub(super) fn replay(
    replay: &mut Replay<'_>,
    chain: &Chain,
    cold: &Cold,
    footers: &BTreeMap<u32, Footer>,
    threads: usize,
) -> Result<Option<Whole>> {
    if !chain.missing().is_empty() || replay.remembers_damage() {
        return Ok(None);
    }
    let mut whole = Whole::default();
    let share_of = |head: &Head| Index::shard_of(head.group) % threads;
    let is_needed = |head: &Head, lsn| !replay.is_news(head.group, lsn) && replay.is_within_bounds(head);
    let Some((mut cold_lines, cold_records)) = cold.whole(threads, is_needed, share_of)? else {
        return Ok(None);
    };
    (whole.frames, whole.records) = (cold.frames.len() as u64, cold_records);
    let pieces = pieces(chain, footers);
    for round in pieces.chunks(threads) {
        let shared = &*replay;
        let taken: Vec<Result<Option<Taken>>> =
            on_threads(round.iter().map(|piece| move || take_apart(shared, piece, threads)).collect());
        // What each share has, piece by piece in order.
        let mut shares: Vec<Vec<Part<'_>>> = (0..threads).map(|_| Vec::new()).collect();
        let mut last_lsn = replay.last_lsn;
        for (piece, taken) in round.iter().zip(taken) {
            let Some(taken) = taken? else { return Ok(None) };
            match piece {
                Piece::Frames { segment, .. } => {
                    let parts = taken.shares.into_iter().map(|lines| Part::Lines(segment, lines));
                    shares.iter_mut().zip(parts).for_each(|(share, part)| share.push(part));
                }
                Piece::Footer(footer) => {
                    shares.iter_mut().for_each(|share| share.push(Part::Footer(footer)));
                }
            }
            whole.records += taken.records;
            last_lsn = last_lsn.max(taken.last_lsn);
        }
        let each = shares.into_iter().enumerate();
        let each = each.zip(&mut cold_lines);
        let each = each.map(|((nth, parts), cold)| move || apply(shared, (nth, threads), parts, cold));
        if on_threads(each.collect()).contains(&None) {
            return Ok(None);
        }
        replay.last_lsn = last_lsn;
        for piece in round {
            if let Piece::Frames { frames, .. } = piece {
                frames.iter().for_each(|found| replay.passed(found));
                whole.frames += frames.len() as u64;
            }
        }
    }
    // All of them lie below the checkpoint's LSN, but there need not be anything above.
    cold_lines.into_iter().flatten().for_each(|line| apply_cold(&replay.index, line));
    let unscanned = footers.values().max_by_key(|footer| footer.facts.last_seq);
    replay.resume(chain, unscanned)?;
    Ok(Some(whole))
}

/// Runs each on a thread of its own, but the first here.
pub(super) fn on_threads<T: Send>(work: Vec<impl FnOnce() -> T + Send>) -> Vec<T> {
    std::thread::scope(|scope| {
        let mut work = work.into_iter();
        let first = work.next();
        let others: Vec<_> = work.map(|work| scope.spawn(work)).collect();
        let mut results: Vec<T> = first.map(|work| work()).into_iter().collect();
        for other in others {
            match other.join() {
                Ok(result) => results.push(result),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        results
    })
}

/// Everything up to the proven mark, in order.
fn pieces<'a>(chain: &'a Chain, footers: &'a BTreeMap<u32, Footer>) -> Vec<Piece<'a>> {
    let mut pieces: Vec<Piece<'_>> = footers.values().map(Piece::Footer).collect();
    for (_, found) in chain.frames.range(..=chain.proven) {
        match pieces.last_mut() {
            Some(Piece::Frames { segment, frames })
                if segment.id == found.segment.id
                    && end_of(frames) <= found.block
                    && span(frames) < PIECE_BLOCKS =>
            {
                frames.push(found);
            }
            _ => pieces.push(Piece::Frames { segment: &found.segment, frames: vec![found] }),
        }
    }
    pieces.sort_by_key(|piece| match piece {
        Piece::Frames { frames, .. } => frames[0].seq,
        Piece::Footer(footer) => footer.facts.first_seq,
    });
    pieces
}

/// The block behind the last of successive frames.
fn end_of(frames: &[&Found]) -> u32 {
    let last = frames[frames.len() - 1];
    last.block + last.blocks
}

/// How many blocks successive frames take, with what is between them.
fn span(frames: &[&Found]) -> u32 {
    end_of(frames) - frames[0].block
}

/// Reads frames and checks each of their records. `None` if anything is not as it was written.
fn take_apart(replay: &Replay<'_>, piece: &Piece<'_>, threads: usize) -> Result<Option<Taken>> {
    let Piece::Frames { segment, frames } = piece else { return Ok(Some(Taken::default())) };
    let first = frames[0].block;
    let bytes = read_blocks(segment, first, span(frames))?;
    let mut taken = Taken { shares: (0..threads).map(|_| Vec::new()).collect(), ..Taken::default() };
    for found in frames {
        let start = (found.block - first) as usize * BLOCK;
        let frame = bytes.slice(start..start + found.blocks as usize * BLOCK);
        let Probe::Frame(header) = FrameHeader::probe(&frame) else { return Ok(None) };
        if (header.seq, header.blocks) != (found.seq, found.blocks) {
            return Ok(None);
        }
        segment.adopt(&header)?;
        let Some(heads) = segment.directory(&header, &frame[FRAME_HEADER..]) else { return Ok(None) };
        let mut at = header.records_offset as usize;
        for (nth, head) in heads.into_iter().enumerate() {
            if !record::verify(&frame[at..], &head) {
                return Ok(None);
            }
            let lsn = header.first_lsn + nth as u64;
            if head.kind == Kind::Entries || replay.is_news(head.group, lsn) {
                let offset = found.block * BLOCK as u32 + at as u32;
                let plain = segment.open(offset, frame.slice(at..));
                let Some(outline) = plain.and_then(|plain| Outline::of(head, &plain)) else {
                    return Ok(None);
                };
                taken.shares[share_of(&outline, threads)].push(Line { lsn, offset, outline });
            }
            (taken.records, taken.last_lsn) = (taken.records + 1, taken.last_lsn.max(lsn));
            at += head.padded();
        }
    }
    Ok(Some(taken))
}

fn share_of(outline: &Outline, threads: usize) -> usize {
    Index::shard_of(outline.head.group) % threads
}

/// Applies one of so many shares of the groups, with the relocated records in their places. `None`: a footer makes no sense.
fn apply(
    replay: &Replay<'_>,
    (share, shares): (usize, usize),
    parts: Vec<Part<'_>>,
    cold: &mut Lines,
) -> Option<()> {
    for part in parts {
        match part {
            Part::Lines(segment, lines) => apply_lines(replay, segment, lines, cold),
            Part::Footer(footer) => {
                let Facts { first_lsn, last_lsn, .. } = footer.facts;
                while let Some(copy) = cold.pop_front_if(|copy| copy.lsn < first_lsn) {
                    apply_cold(&replay.index, copy);
                }
                // Copies of what the footer lists: it was there before anything was relocated.
                while cold.pop_front_if(|copy| copy.lsn <= last_lsn).is_some() {}
                for shard in (share..SHARDS).step_by(shares) {
                    footer.runs(shard, |run| {
                        if replay.reaches_bounds(run.group, run.first, run.end) {
                            replay.index.with_entry(run.group, |group| group.adopt(&footer.segment, run));
                        }
                    })?;
                }
            }
        }
    }
    Some(())
}

fn apply_lines(replay: &Replay<'_>, segment: &Arc<Segment>, mut lines: Vec<Line>, cold: &mut Lines) {
    let index = &replay.index;
    lines.retain(|line| {
        let head = &line.outline.head;
        replay.is_news(head.group, line.lsn) || replay.is_within_bounds(head)
    });
    // Once for all of them: the count is shared with the other threads.
    let entries = lines.iter().filter(|line| matches!(line.outline.gist, Gist::Entries(_)));
    segment.add_live(entries.map(|line| line.outline.head.padded() as u64).sum());
    for Line { lsn, offset, outline: Outline { head, gist } } in lines {
        while let Some(copy) = cold.pop_front_if(|copy| copy.lsn < lsn) {
            apply_cold(index, copy);
        }
        // Of two that are alike the original stays: what its segment's footer will list must be all that counts there.
        cold.pop_front_if(|copy| copy.lsn == lsn);
        if replay.is_news(head.group, lsn) {
            replay.clip(Index::shard_of(head.group));
        }
        match gist {
            Gist::Entries(terms) => index.with_entry(head.group, |group| {
                group.append_outline(&head, &terms, segment, offset);
            }),
            Gist::HardState(state) => index.with_entry(head.group, |group| group.set_hard_state(state)),
            Gist::Other(body) => match *body {
                Body::Destroy { min_replica } => index.destroy(head.group, min_replica),
                body => {
                    let place = Place::Disk { segment, offset };
                    index.with_entry(head.group, |group| group.apply(&head, body, &place));
                }
            },
        }
    }
}
