//! Relocation: what is still needed of segments that are nearly dead is copied into the cold stream, so that a group that
//! lags does not keep the segments of all others.
//!
//! A record is copied unchanged, with its LSN, into a frame of stream 1. When that frame is durable the index points at the
//! copy, record by record, where it still points at the original; a segment to which nothing points is dead, and goes the
//! way of all dead segments: out of the next checkpoint, out of the other manifest, and only then into use again. Part of
//! the background, and a state machine like it; one frame is under way at a time.
//!
//! Crash cases. A checkpoint's *cold seq* is the last cold frame that was durable when its state was captured.
//!
//! 1. Before a cold frame is durable: nothing points at it, no checkpoint counts it. It is void, its originals are where
//!    they were.
//! 2. After that, before a checkpoint: the same. A checkpoint that was captured earlier still lists the victim, since it
//!    lists every segment that was not dead at its capture; and that one was not.
//! 3. After the first checkpoint without the victim: its cold seq covers every frame that took records from there, since
//!    the victim counted as dead only when the last of them was durable, and capture reads both at once. The cold segment
//!    is in its list as active or sealed. So the copies count, and one that is missing or damaged is corruption.
//! 4. If rot takes that checkpoint: the other file is older and lists the victim, which is untouched: a file is used again
//!    when neither manifest lists it. To it the copies are void.
//! 5. When the victim is used again both files were written after case 3, with states that are no older: whichever is left
//!    counts the copies. A list that is written anew over an old state (`list_segments`) keeps the old cold seq and drops
//!    no segment that this state did not drop.
//! 6. A crash after case 1 or 2: the new open has another incarnation and goes on behind the checkpoint's cold seq in a
//!    fresh segment. Recovery files the old cold segment as ending at that seq, or as free if it ends before its first
//!    frame, so the void frames never return.
//! 7. Every record that a checkpoint counts in a cold frame has an LSN at or below the checkpoint's: it was durable, and so
//!    given out, before the capture. So recovery applies cold records before the checkpoint's bounds, in LSN order among
//!    the others; it may meet a record twice, and takes it once.
//! 8. A record that was cut or truncated while it was copied: its copy is dead on arrival. What cut it may not be durable
//!    yet, so the original must stay until it is: a checkpoint waits until all that it captured is durable.
//! 9. A full disk in the middle of a cold frame: nobody was promised it, so it is written again, whole, when there is room.
//!    Any other failure poisons the log.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use bytes::Bytes;
use pontoon_proto::GroupId;

use crate::{
    Durability, Error, GcStats, WalEvent,
    codec::put_varint,
    crypt::TAG,
    frame::{self, BLOCK, COLD, FrameHeader},
    fs::{FileOp, Ticket},
    index::Spot,
    read::{Extent, note_damage},
    record::{self, Head},
    rules::{Rule, is_broken},
    segment::Segment,
    shared::Shared,
    slab::Slabs,
    table::{Active, Sealed, Span},
    writer::{Identity, Step},
};

mod choose;
mod walk;

pub(crate) use choose::Pressure;
use choose::choose;
use walk::{Taken, Turn, Walk};

/// A cold frame is written when it holds so much, or when its victim has nothing more.
const FRAME_BYTES: u64 = 256 << 10;
/// After a full disk, the next try.
const RETRY: Duration = Duration::from_millis(500);
/// Groups that are named when room gets tight.
const NAMED: usize = 8;

/// A record on its way.
struct Moved {
    group: GroupId,
    first: u64,
    /// Where it was, and where it is in its frame's records.
    from: u32,
    at: u32,
}

/// What the next frame will hold; all of one victim.
#[derive(Default)]
struct Load {
    dir: Vec<u8>,
    records: Vec<Bytes>,
    moved: Vec<Moved>,
    bytes: u32,
    first_lsn: u64,
}

/// A frame under way.
struct Flight {
    /// `None` while it waits to be written again.
    ticket: Option<Ticket>,
    op: FileOp,
    header: FrameHeader,
    segment: Arc<Segment>,
    from: Arc<Segment>,
    moved: Vec<Moved>,
}

/// The writer of the cold stream.
///
/// Invariants: `next_seq` is one above the last frame that was handed to the disk; the frames before `flight` are durable
/// and the index was told of them; `load` holds records of the walk's segment only.
pub(crate) struct Relocator {
    identity: Identity,
    next_seq: u64,
    /// The segment that takes frames, and the block of the next.
    segment: Option<(Arc<Segment>, u32)>,
    walk: Option<Walk>,
    load: Load,
    flight: Option<Flight>,
    /// Epochs of segments that cannot be emptied: a head or a needed record is not readable.
    unfit: BTreeSet<u128>,
    /// With ease nothing more is read or written until then.
    paced_until: Duration,
    retry_at: Option<Duration>,
    slabs: Slabs,
    /// It was told which groups hold the most, and the pressure has not ended since.
    named: bool,
}

impl Relocator {
    /// Goes on behind a checkpoint's cold seq.
    pub(crate) fn new(identity: Identity, cold_seq: u64) -> Relocator {
        Relocator {
            identity,
            next_seq: cold_seq + 1,
            segment: None,
            walk: None,
            load: Load::default(),
            flight: None,
            unfit: BTreeSet::new(),
            paced_until: Duration::ZERO,
            retry_at: None,
            slabs: Slabs::default(),
            named: false,
        }
    }

    /// Moves on by one read, one write or one completion. `asked`: somebody waits for a collection.
    pub(crate) fn step(&mut self, shared: &Shared, now: Duration, asked: bool, stats: &mut GcStats) -> Step {
        if let Some(at) = self.retry_at {
            if now < at {
                return Step::Timer(at);
            }
            self.retry_at = None;
        }
        if let Some(flight) = &mut self.flight {
            let ticket = flight.ticket.get_or_insert_with(|| flight.segment.file.submit(flight.op.clone()));
            match ticket.poll() {
                None => return Step::Io(ticket.clone()),
                Some(Ok(())) => self.land(shared, stats),
                Some(Err(source)) => self.fail(shared, now, source),
            }
            return Step::Progress;
        }
        let (closing, opening_seq) = (shared.queue().closed, shared.table().opening_seq);
        let Some(opening_seq) = opening_seq.filter(|_| !closing) else { return Step::Blocked };
        if self.walk.is_none() && !self.begin(shared, asked) {
            return Step::Blocked;
        }
        let pressure = Pressure::of(&shared.table(), asked);
        if pressure == Pressure::Ease && now < self.paced_until {
            return Step::Timer(self.paced_until);
        }
        self.go_on(shared, now, opening_seq)
    }

    /// Chooses a victim; whether there is one.
    fn begin(&mut self, shared: &Shared, asked: bool) -> bool {
        let segment_bytes = shared.options.segment_bytes;
        let mut table = shared.table();
        let pressure = Pressure::of(&table, asked);
        let wants = pressure > Pressure::Ease || shared.options.relocate_bytes_per_s > 0;
        let unfit = |sealed: &Sealed| self.unfit.contains(&sealed.segment.epoch);
        let victim = choose(&table, pressure, segment_bytes, unfit).filter(|_| wants);
        let Some(Sealed { segment, incarnation, first_seq, last_seq, .. }) = victim else {
            table.cold_waits = false;
            let known = |epoch: &u128| table.sealed.values().any(|sealed| sealed.segment.epoch == *epoch);
            self.unfit.retain(known);
            drop(table);
            self.name_holders(shared, pressure);
            return false;
        };
        let (segment, incarnation, seqs) = (segment.clone(), *incarnation, *first_seq..=*last_seq);
        // What the index points at in the segment is no longer all that counts there, so a footer would say too little.
        if let Some(victim) = table.sealed.get_mut(&segment.id) {
            victim.span = Span::default();
        }
        drop(table);
        tracing::debug!(segment = segment.id, live = segment.live_bytes(), ?pressure, "relocating");
        self.walk = Some(Walk::new(&shared.index, segment, incarnation, seqs, segment_bytes));
        self.name_holders(shared, pressure);
        true
    }

    /// Says once per time of pressure who holds the most.
    fn name_holders(&mut self, shared: &Shared, pressure: Pressure) {
        let tight = pressure >= Pressure::Tight;
        if tight && !self.named {
            shared.emit(&WalEvent::Pinned { groups: shared.pinned(NAMED) });
        }
        self.named = tight;
    }

    fn go_on(&mut self, shared: &Shared, now: Duration, opening_seq: u64) -> Step {
        let limit = FRAME_BYTES.min(shared.options.segment_bytes / 8);
        if u64::from(self.load.bytes) >= limit {
            return self.write(shared, now, opening_seq);
        }
        let Some(walk) = &mut self.walk else { return Step::Blocked };
        let turn = walk.next();
        let read = walk.take_read();
        self.pace(shared, now, read);
        match turn {
            Ok(Turn::On) => {}
            Ok(Turn::Record(taken)) => self.take(shared, taken),
            Ok(Turn::Bad(taken)) => self.note_bad(shared, &taken),
            Ok(Turn::End) if !self.load.moved.is_empty() => return self.write(shared, now, opening_seq),
            Ok(Turn::End) => self.end(),
            Ok(Turn::Lost) => {
                // The records can still be read by whoever needs them; the segment stays until they are gone.
                tracing::error!(segment = %self.path(), "a frame's head is damaged; the segment is not emptied");
                self.give_up();
            }
            Err(error) => {
                tracing::error!(%error, "a segment cannot be read; it is not emptied");
                self.give_up();
            }
        }
        Step::Progress
    }

    fn path(&self) -> String {
        self.walk.as_ref().map(|walk| walk.segment.path.display().to_string()).unwrap_or_default()
    }

    /// With ease, bytes take time.
    fn pace(&mut self, shared: &Shared, now: Duration, bytes: u64) {
        let Some(nanos) = (bytes * 1_000_000_000).checked_div(shared.options.relocate_bytes_per_s) else {
            return;
        };
        self.paced_until = self.paced_until.max(now) + Duration::from_nanos(nanos);
    }

    /// Adds a record to the next frame if it is still needed.
    fn take(&mut self, shared: &Shared, taken: Taken) {
        let Some(walk) = &self.walk else { return };
        let Taken { head, mut lsn, offset, bytes } = taken;
        let spot = Spot { segment: &walk.segment, offset, first: head.index };
        if shared.index.with(head.group, |group| group.live_at(spot)).flatten().is_none() {
            return;
        }
        if is_broken(Rule::LsnKept) {
            lsn = shared.queue().next_lsn - 1;
        }
        if self.load.moved.is_empty() {
            self.load.first_lsn = lsn;
        }
        // It is sealed anew at its new place, and is as long as it will be there.
        let Some(plain) = record::decode_head(&bytes) else { return };
        let tag_len = if shared.keyring.is_on() { TAG } else { 0 };
        let head = Head { len: plain.len + tag_len as u32, ..head };
        head.encode_dir(&mut self.load.dir);
        put_varint(&mut self.load.dir, lsn);
        let moved = Moved { group: head.group, first: head.index, from: offset, at: self.load.bytes };
        self.load.moved.push(moved);
        self.load.bytes += head.padded() as u32;
        self.load.records.push(bytes);
    }

    /// Rot is never copied: the group hears of it and keeps the original.
    fn note_bad(&self, shared: &Shared, taken: &Taken) {
        let Some(walk) = &self.walk else { return };
        let (group, first, offset) = (taken.head.group, taken.head.index, taken.offset);
        let spot = Spot { segment: &walk.segment, offset, first };
        let live = shared.index.with(group, |group| group.live_at(spot)).flatten();
        if let Some(count) = live {
            let segment = walk.segment.clone();
            note_damage(
                shared,
                group,
                &Extent { segment, offset, len: taken.head.padded() as u32, first, count },
            );
        }
    }

    /// The walk is over and what it took is durable. What is left, if anything, cannot be moved.
    fn end(&mut self) {
        if self.walk.as_ref().is_some_and(|walk| walk.segment.live_bytes() > 0) {
            return self.give_up();
        }
        self.walk = None;
    }

    /// Leaves the victim alone from now on. What was taken of it and not written stays where it was.
    fn give_up(&mut self) {
        self.unfit.extend(self.walk.take().map(|walk| walk.segment.epoch));
        self.load = Load::default();
    }

    /// Hands the next frame to the disk.
    fn write(&mut self, shared: &Shared, now: Duration, opening_seq: u64) -> Step {
        let Some(from) = self.walk.as_ref().map(|walk| walk.segment.clone()) else { return Step::Blocked };
        let Load { bytes: records_len, ref dir, .. } = self.load;
        let blocks = frame::cold_frame_blocks(dir.len(), records_len as usize) as u32;
        let waited = shared.table().cold_waits;
        let Some((segment, block)) = self.place(shared, blocks) else {
            // Now that this is known, one more may be prepared.
            return if waited { Step::Blocked } else { Step::Progress };
        };
        let load = std::mem::take(&mut self.load);
        let syncs = shared.options.durability == Durability::Sync && !is_broken(Rule::CopyDurable);
        let header = FrameHeader {
            stream: COLD,
            seq: self.next_seq,
            durable_seq: if syncs { self.next_seq - 1 } else { 0 },
            first_lsn: load.first_lsn,
            records: load.moved.len() as u32,
            opening_seq,
            ..self.identity.header(shared, &segment, block)
        };
        let seal = segment.seal().cloned();
        let plan = frame::plan(header, &[], [&load.dir[..]].into_iter(), records_len as usize, seal);
        debug_assert_eq!(plan.header.blocks, blocks, "the frame fits the place that was chosen for it");
        let memory = self.slabs.take(blocks as usize * BLOCK);
        let data = plan.lay_out(memory, load.records.iter().map(|record| &record[..]));
        let offset = u64::from(block) * BLOCK as u64;
        let op = match syncs {
            true => FileOp::WriteDurable { offset, data },
            false => FileOp::Write { offset, data },
        };
        self.next_seq += 1;
        self.segment = Some((segment.clone(), block + blocks));
        self.pace(shared, now, u64::from(blocks) * BLOCK as u64);
        let header = plan.header.clone();
        self.flight = Some(Flight { ticket: None, op, header, segment, from, moved: load.moved });
        Step::Progress
    }

    /// Where the next frame goes: behind the last one, or at the start of a segment that both manifests list. The last one
    /// of those is the writer's, unless it has room for long: a checkpoint waits until what was submitted is on disk.
    fn place(&mut self, shared: &Shared, blocks: u32) -> Option<(Arc<Segment>, u32)> {
        let segment_bytes = shared.options.segment_bytes;
        if let Some((segment, block)) = &self.segment
            && u64::from(block + blocks) * BLOCK as u64 <= segment_bytes
        {
            return Some((segment.clone(), *block));
        }
        let mut table = shared.table();
        let has_room = table.active.as_ref().is_some_and(|active| active.room_bytes >= segment_bytes / 2);
        let spare = table.usable() > 1 || table.usable() == 1 && has_room;
        let next = if spare { table.take_usable() } else { None };
        table.cold_waits = next.is_none();
        let next = next?;
        self.identity.seal(&shared.keyring, &next);
        let active = Active {
            segment: next.clone(),
            incarnation: self.identity.incarnation,
            first_seq: self.next_seq,
            room_bytes: segment_bytes,
            span: Span::default(),
        };
        if let Some(last) = table.cold.replace(active) {
            table.sealed.insert(last.segment.id, last.seal(COLD, self.next_seq - 1));
        }
        shared.update_room(&mut table);
        Some((next, 0))
    }

    /// The frame is durable: readers find its records there.
    fn land(&mut self, shared: &Shared, stats: &mut GcStats) {
        let Some(Flight { header, segment, from, moved, .. }) = self.flight.take() else { return };
        {
            let mut table = shared.table();
            // First of all: a checkpoint that sees the victim dead must count the frame.
            table.cold_seq = header.seq;
            table.relocated_bytes += u64::from(header.records_len);
            if let Some(cold) = &mut table.cold {
                let used = u64::from(header.block + header.blocks) * BLOCK as u64;
                cold.room_bytes = shared.options.segment_bytes - used;
            }
        }
        stats.bytes_relocated += u64::from(header.records_len);
        let base = header.block * BLOCK as u32 + header.records_offset;
        for of_group in moved.chunk_by(|a, b| a.group == b.group) {
            shared.index.with_mut(of_group[0].group, |group| {
                for moved in of_group {
                    let spot = Spot { segment: &from, offset: moved.from, first: moved.first };
                    stats.records_relocated += u64::from(group.repoint(spot, &segment, base + moved.at));
                }
                #[cfg(debug_assertions)]
                group.check_invariants();
            });
        }
    }

    fn fail(&mut self, shared: &Shared, now: Duration, source: std::io::Error) {
        let Some(flight) = &mut self.flight else { return };
        let error = Error::io("write", &flight.segment.path, source);
        if !error.is_disk_full() {
            return shared.poison(error);
        }
        tracing::warn!(%error, "relocation waits for room on the disk");
        self.retry_at = Some(now + RETRY);
        flight.ticket = None;
    }
}
