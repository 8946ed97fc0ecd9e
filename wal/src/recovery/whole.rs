//! Replaying a log that nothing happened to, on all cores.
//!
//! Frames are read in pieces of a few megabytes. Of a few pieces at a time, each thread first takes one piece apart, and
//! then each applies the records of its share of the groups, in order. Memory is bounded by the pieces under way.
//!
//! This path knows no damage. Whatever is not as it was written makes it give up before anything is decided, and
//! [`super::replay`] starts over, one frame after the other.

use std::sync::Arc;

use super::{
    chain::Chain,
    cold::{Cold, Lines},
    replay::{Replay, apply_cold},
    scan::{Found, read_blocks},
};
use crate::{
    Result,
    frame::{BLOCK, FRAME_HEADER, FrameHeader, Probe},
    index::{Index, Place},
    outline::{Gist, Outline},
    record::{self, Body, Head, Kind},
    segment::Segment,
};

/// A piece ends with the first frame that reaches this.
const PIECE_BLOCKS: u32 = (2 << 20) / BLOCK as u32;

/// Successive frames of one segment.
struct Piece<'a> {
    segment: &'a Arc<Segment>,
    frames: Vec<&'a Found>,
}

/// A record that is to be applied.
struct Line {
    lsn: u64,
    offset: u32,
    outline: Outline,
}

/// What a piece holds, for each share of the groups.
#[derive(Default)]
struct Taken {
    shares: Vec<Vec<Line>>,
    records: u64,
    last_lsn: u64,
}

/// What was replayed.
#[derive(Debug, Default)]
pub(super) struct Whole {
    pub(super) frames: u64,
    pub(super) records: u64,
}

/// Applies all frames at or below the proven mark. `None`: something is not as it was written, and what the replay holds
/// by now is of no use.
pub(super) fn replay(
    replay: &mut Replay<'_>,
    chain: &Chain,
    cold: &Cold,
    threads: usize,
) -> Result<Option<Whole>> {
    if !chain.missing().is_empty() || replay.remembers_damage() {
        return Ok(None);
    }
    let mut whole = Whole::default();
    let as_of = replay.as_of_lsn();
    let share_of = |head: &Head| Index::shard_of(head.group) % threads;
    let lines = cold.whole(threads, as_of, |head| replay.is_within_bounds(head), share_of)?;
    let Some((mut cold_lines, cold_records)) = lines else { return Ok(None) };
    (whole.frames, whole.records) = (cold.frames.len() as u64, cold_records);
    let pieces = pieces(chain);
    for round in pieces.chunks(threads) {
        let taken: Vec<Result<Option<Taken>>> =
            on_threads(round.iter().map(|piece| move || take_apart(piece, as_of, threads)).collect());
        let mut parts = Vec::new();
        for part in taken {
            let Some(part) = part? else { return Ok(None) };
            whole.records += part.records;
            replay.last_lsn = replay.last_lsn.max(part.last_lsn);
            parts.push(part);
        }
        // Each share's lines, piece by piece in order.
        let mut shares: Vec<Vec<(&Arc<Segment>, Vec<Line>)>> = (0..threads).map(|_| Vec::new()).collect();
        for (piece, part) in round.iter().zip(parts) {
            for (share, lines) in shares.iter_mut().zip(part.shares) {
                share.push((piece.segment, lines));
            }
        }
        let shared = &*replay;
        let work = shares.into_iter().zip(&mut cold_lines).enumerate();
        let clipped = on_threads(
            work.map(|(nth, (share, cold))| move || apply(shared, nth, threads, share, cold)).collect(),
        );
        replay.note_clipped(&clipped);
        for found in round.iter().flat_map(|piece| &piece.frames) {
            replay.passed(found);
            whole.frames += 1;
        }
    }
    // All of them lie below the checkpoint's LSN, but there need not be anything above.
    cold_lines.into_iter().flatten().for_each(|line| apply_cold(&replay.index, line));
    replay.resume(chain)?;
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

fn pieces(chain: &Chain) -> Vec<Piece<'_>> {
    let mut pieces: Vec<Piece<'_>> = Vec::new();
    for (_, found) in chain.frames.range(..=chain.proven) {
        match pieces.last_mut() {
            Some(piece)
                if piece.segment.id == found.segment.id
                    && piece.first_block() + piece.blocks() <= found.block
                    && piece.blocks() < PIECE_BLOCKS =>
            {
                piece.frames.push(found);
            }
            _ => pieces.push(Piece { segment: &found.segment, frames: vec![found] }),
        }
    }
    pieces
}

impl Piece<'_> {
    fn first_block(&self) -> u32 {
        self.frames[0].block
    }

    fn blocks(&self) -> u32 {
        let last = self.frames[self.frames.len() - 1];
        last.block + last.blocks - self.first_block()
    }
}

/// Reads a piece and checks each of its records. `None` if anything is not as it was written.
fn take_apart(piece: &Piece<'_>, as_of_lsn: u64, threads: usize) -> Result<Option<Taken>> {
    let bytes = read_blocks(piece.segment, piece.first_block(), piece.blocks())?;
    let mut taken = Taken { shares: (0..threads).map(|_| Vec::new()).collect(), ..Taken::default() };
    for found in &piece.frames {
        let start = (found.block - piece.first_block()) as usize * BLOCK;
        let frame = bytes.slice(start..start + found.blocks as usize * BLOCK);
        let Probe::Frame(header) = FrameHeader::probe(&frame) else { return Ok(None) };
        if (header.seq, header.blocks) != (found.seq, found.blocks) {
            return Ok(None);
        }
        piece.segment.adopt(&header)?;
        let Some(heads) = piece.segment.directory(&header, &frame[FRAME_HEADER..]) else { return Ok(None) };
        let mut at = header.records_offset as usize;
        for (nth, head) in heads.into_iter().enumerate() {
            if !record::verify(&frame[at..], &head) {
                return Ok(None);
            }
            let lsn = header.first_lsn + nth as u64;
            if head.kind == Kind::Entries || lsn > as_of_lsn {
                let offset = found.block * BLOCK as u32 + at as u32;
                let plain = piece.segment.open(offset, frame.slice(at..));
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

/// Applies one share of the groups; whether the checkpoint's bounds were put in force for it.
fn apply(
    replay: &Replay<'_>,
    share: usize,
    threads: usize,
    pieces: Vec<(&Arc<Segment>, Vec<Line>)>,
    cold: &mut Lines,
) -> bool {
    let mut clipped = replay.is_clipped(share);
    let index = &replay.index;
    for (segment, mut lines) in pieces {
        lines.retain(|line| line.lsn > replay.as_of_lsn() || replay.is_within_bounds(&line.outline.head));
        // Once for all of them: the count is shared with the other threads.
        let entries = lines.iter().filter(|line| matches!(line.outline.gist, Gist::Entries(_)));
        segment.add_live(entries.map(|line| line.outline.head.padded() as u64).sum());
        for Line { lsn, offset, outline: Outline { head, gist } } in lines {
            let mut is_copied = false;
            while let Some(copy) = cold.pop_front_if(|copy| copy.lsn <= lsn) {
                is_copied |= copy.lsn == lsn;
                apply_cold(index, copy);
            }
            if is_copied {
                segment.sub_live(head.padded() as u64);
                continue;
            }
            if lsn > replay.as_of_lsn() && !std::mem::replace(&mut clipped, true) {
                replay.clip_share(share, threads);
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
    clipped
}
