//! The writer: gathers what is queued into frames and puts them on disk, one at a time.
//!
//! It is a state machine over the clock and the completions of the file system. Who steps it (a thread, a committer, a
//! simulator) does not matter.
//!
//! Crash cases of the write path, each of which a test provokes:
//!
//! 1. Before the opening frame is durable nothing else is written, so there is nothing that it could fail to cut.
//! 2. In the middle of a frame's write: some of its blocks are there. Nobody was told that it is durable, no durable_seq
//!    covers it; it is a torn tail. The block before it was never touched.
//! 3. After the write, before the sync: as 2, or it is whole. Then recovery syncs it before anybody sees it.
//! 4. After the sync, before the acknowledgement: it is whole and comes back; nobody was promised that it would not.
//! 5. At a change of segment: the next frame is the first of a segment that both manifests list, so it is found.
//! 6. After a failed write or sync: the state of the blocks is unknown, so nothing is written after it in this open. The
//!    next open reads what is there.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;

use crate::{
    Durability, Error, Lsn, Persisted, WalEvent,
    frame::{self, BLOCK, Cut, FLAG_OPENING, FLAG_WATERMARK, FrameHeader},
    fs::{FileOp, Ticket},
    queue::{Ack, Queued, SinkSlot},
    record::{self, Kind},
    rules::{Rule, is_broken},
    segment::Segment,
    shared::Shared,
    table::{Active, Sealed},
};

/// Frames with records leave this much of a segment to a watermark, so that proving the last frame durable never needs
/// another segment: header and carried head take at most two blocks, the copy a third.
const TAIL_BLOCKS: usize = 3;

/// What a step did, or what it waits for.
#[derive(Debug)]
pub(crate) enum Step {
    /// Something happened; step again.
    Progress,
    /// An operation of the file system.
    Io(Ticket),
    /// A moment, unless something is submitted before.
    Timer(Duration),
    /// Somebody else: a submitter or the background.
    Blocked,
}

/// Who this open is.
#[derive(Debug, Clone, Default)]
pub(crate) struct Identity {
    pub(crate) store: u128,
    pub(crate) incarnation: u64,
    pub(crate) ordinal: u64,
    /// Where the opening frame cuts the streams.
    pub(crate) cuts: [Cut; 2],
}

/// A frame between its write and its acknowledgement.
struct InFlight {
    ticket: Ticket,
    syncing: bool,
    must_sync: bool,
    header: FrameHeader,
    bytes: Bytes,
    segment: Arc<Segment>,
    batches: Vec<Queued>,
}

/// The writer of the hot stream.
///
/// Invariants: `next_seq` is one above the last frame that was handed to the disk; `durable_seq < next_seq` never falls; at
/// most one frame is in flight; after a poisoning nothing is written.
pub(crate) struct Writer {
    identity: Identity,
    /// The frame_seq of this open's opening frame, once it is durable.
    opening_seq: Option<u64>,
    next_seq: u64,
    durable_seq: u64,
    segment: Option<(Arc<Segment>, u32)>,
    /// The head of the last frame, if that had one block.
    carry: Vec<u8>,
    in_flight: Option<InFlight>,
    /// Nothing was written since the last watermark.
    watermarked: bool,
    last_write: Duration,
    /// Since when only relaxed batches wait.
    relaxed_since: Option<Duration>,
    /// The sinks were told of the poisoning.
    failure_told: bool,
    /// What the sinks will be told.
    events: Vec<WalEvent>,
}

/// Who steps the writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stepper {
    /// Its own thread, or the one that steps the whole log.
    Driver,
    /// A thread that waits for its own batch. It may hold locks that sinks need, so it calls none.
    Committer,
}

impl Writer {
    /// A writer that continues after the frame `last_seq`, whose head is `carry` if it had one block.
    pub(crate) fn new(identity: Identity, last_seq: u64, carry: Vec<u8>) -> Writer {
        Writer {
            identity,
            opening_seq: None,
            next_seq: last_seq + 1,
            durable_seq: last_seq,
            segment: None,
            carry,
            in_flight: None,
            watermarked: true,
            last_write: Duration::ZERO,
            relaxed_since: None,
            failure_told: false,
            events: Vec::new(),
        }
    }

    /// Whether nothing is in flight and the last frame is proven durable.
    pub(crate) fn is_quiet(&self) -> bool {
        self.in_flight.is_none() && self.watermarked
    }

    pub(crate) fn step(&mut self, shared: &Shared, now: Duration, stepper: Stepper) -> Step {
        if stepper == Stepper::Driver {
            self.events.drain(..).for_each(|event| shared.emit(&event));
        }
        if let Some(cause) = shared.poison_cause() {
            return match stepper {
                Stepper::Driver => self.tell_failure(shared, &cause),
                Stepper::Committer => Step::Blocked,
            };
        }
        if self.in_flight.is_some() {
            return self.step_in_flight(shared, now);
        }
        let (wants_write, waiting, closed, front_is_commit) = {
            let queue = shared.queue();
            let front_is_commit = queue.batches.front().is_some_and(Queued::is_commit);
            (queue.wants_write(), !queue.batches.is_empty(), queue.closed, front_is_commit)
        };
        if wants_write {
            self.relaxed_since = None;
            return match self.opening_seq {
                None => self.write_frame(shared, FLAG_OPENING, stepper),
                Some(_) if stepper == Stepper::Committer && !front_is_commit => Step::Blocked,
                Some(_) => self.write_frame(shared, 0, stepper),
            };
        }
        if self.watermarked && !waiting {
            return Step::Blocked;
        }
        self.relaxed_since = waiting.then(|| self.relaxed_since.unwrap_or(now));
        let deadline = self.relaxed_since.unwrap_or(self.last_write) + shared.options.idle_watermark;
        if !closed && now < deadline {
            return Step::Timer(deadline);
        }
        if waiting {
            // Relaxed batches waited long enough for a sync of somebody else.
            shared.queue().flush = true;
            return Step::Progress;
        }
        self.write_frame(shared, FLAG_WATERMARK, stepper)
    }

    fn step_in_flight(&mut self, shared: &Shared, now: Duration) -> Step {
        let Some(frame) = &mut self.in_flight else { return Step::Blocked };
        match frame.ticket.poll() {
            None => Step::Io(frame.ticket.clone()),
            Some(Err(source)) => {
                let action = if frame.syncing { "sync" } else { "write" };
                shared.poison(Error::io(action, &frame.segment.path, source));
                Step::Progress
            }
            Some(Ok(())) if frame.must_sync && !frame.syncing => {
                frame.syncing = true;
                frame.ticket = frame.segment.file.submit(FileOp::Sync);
                Step::Progress
            }
            Some(Ok(())) => {
                if let Some(frame) = self.in_flight.take() {
                    self.complete(shared, frame, now);
                }
                Step::Progress
            }
        }
    }

    /// Builds the next frame and hands it to the disk.
    fn write_frame(&mut self, shared: &Shared, flags: u16, stepper: Stepper) -> Step {
        let Some((segment, block)) = self.place(shared, flags) else { return Step::Blocked };
        let room = shared.options.segment_bytes as usize / BLOCK - block as usize;
        let batches = if flags == 0 { self.gather(shared, room - TAIL_BLOCKS, stepper) } else { Vec::new() };
        let records_len = batches.iter().map(|batch| batch.data.len()).sum();
        let must_sync = match flags & FLAG_OPENING != 0 {
            true => !is_broken(Rule::OpeningAlone),
            false => shared.options.durability == Durability::Sync && !is_broken(Rule::SyncBeforeAck),
        };
        let header = FrameHeader {
            flags,
            store: self.identity.store,
            epoch: segment.epoch,
            segment: segment.id,
            block,
            incarnation: self.identity.incarnation,
            ordinal: self.identity.ordinal,
            seq: self.next_seq,
            durable_seq: match shared.options.durability {
                Durability::Sync => self.durable_seq,
                Durability::System => 0,
            },
            first_lsn: batches.first().map_or(0, |batch| batch.first_lsn),
            records: batches.iter().map(|batch| batch.records).sum(),
            opening_seq: self.opening_seq.unwrap_or(self.next_seq),
            cuts: self.identity.cuts,
            checkpoint: shared.table().manifest_seqs.into_iter().max().unwrap_or(0),
            ..FrameHeader::default()
        };
        let dirs = batches.iter().map(|batch| &batch.dir[..]);
        let records = batches.iter().map(|batch| &batch.data[..]);
        let built = frame::build(header, &self.carry, dirs, records, records_len);
        debug_assert!(built.header.blocks as usize <= room, "a frame never leaves its segment");
        self.carry = built.carry.unwrap_or_default();
        self.next_seq += 1;
        self.watermarked = flags & FLAG_WATERMARK != 0 || shared.options.durability == Durability::System;
        self.segment = Some((segment.clone(), block + built.header.blocks));
        let op = FileOp::Write { offset: u64::from(block) * BLOCK as u64, data: built.bytes.clone() };
        let ticket = segment.file.submit(op);
        let (header, bytes) = (built.header, built.bytes);
        self.in_flight =
            Some(InFlight { ticket, syncing: false, must_sync, header, bytes, segment, batches });
        Step::Progress
    }

    /// Where the next frame goes: behind the last one, or at the start of a prepared segment.
    fn place(&mut self, shared: &Shared, flags: u16) -> Option<(Arc<Segment>, u32)> {
        let blocks = {
            let queue = shared.queue();
            let batch = queue.batches.front().filter(|_| flags == 0);
            batch.map_or(frame::frame_blocks(0, self.carry.len(), 0), |batch| {
                frame::frame_blocks(batch.dir.len(), self.carry.len(), batch.data.len())
            })
        };
        let tail = if flags == 0 { TAIL_BLOCKS as u64 } else { 0 };
        let total = shared.options.segment_bytes / BLOCK as u64 - tail;
        if let Some((segment, block)) = &self.segment
            && u64::from(*block) + blocks as u64 <= total
        {
            return Some((segment.clone(), *block));
        }
        let mut table = shared.table();
        // The first submit wants a frame: from now on the background may write too.
        table.started = true;
        let Some(next) = table.take_usable() else {
            drop(table);
            shared.wake_background();
            return None;
        };
        let active = Active {
            segment: next.clone(),
            incarnation: self.identity.incarnation,
            first_seq: self.next_seq,
            room_bytes: shared.options.segment_bytes,
        };
        if let Some(Active { segment, incarnation, first_seq, .. }) = table.active.replace(active) {
            let last_seq = self.next_seq - 1;
            table.sealed.insert(segment.id, Sealed { segment, incarnation, first_seq, last_seq });
        }
        drop(table);
        shared.wake_background();
        self.events.push(WalEvent::Rotated { segment: next.id });
        Some((next, 0))
    }

    /// Takes as many batches as one frame may hold.
    fn gather(&self, shared: &Shared, room_blocks: usize, stepper: Stepper) -> Vec<Queued> {
        let mut queue = shared.queue();
        let (mut batches, mut dir_len, mut data_len) = (Vec::new(), 0, 0);
        let limit = shared.options.max_frame_bytes as usize;
        while let Some(batch) = queue.batches.pop_front_if(|batch| {
            let (dir, data) = (dir_len + batch.dir.len(), data_len + batch.data.len());
            // The first one fits: its place was chosen for it.
            batches.is_empty()
                || (stepper == Stepper::Driver || batch.is_commit())
                    && dir + data <= limit
                    && frame::frame_blocks(dir, self.carry.len(), data) <= room_blocks
        }) {
            dir_len += batch.dir.len();
            data_len += batch.data.len();
            queue.urgent -= usize::from(!batch.relaxed);
            batches.push(batch);
        }
        queue.flush &= !queue.batches.is_empty();
        batches
    }

    /// The frame is durable: its records are on disk for readers, its submitters hear of it.
    fn complete(&mut self, shared: &Shared, frame: InFlight, now: Duration) {
        let InFlight { header, bytes, segment, batches, .. } = frame;
        debug_assert_eq!(header.seq + 1, self.next_seq);
        self.durable_seq = header.seq;
        self.last_write = now;
        if header.flags & FLAG_OPENING != 0 {
            self.opening_seq = Some(header.seq);
        }
        let frame_offset = header.block * BLOCK as u32;
        settle(shared, &segment, frame_offset + header.records_offset, &batches);
        if !batches.is_empty() {
            shared.cache.insert(segment.id, frame_offset, bytes);
        }
        let used = u64::from(header.block + header.blocks) * BLOCK as u64;
        let mut table = shared.table();
        table.done_seq = header.seq;
        if let Some(batch) = batches.last() {
            table.done_lsn = batch.last_lsn();
        }
        if let Some(active) = &mut table.active {
            active.room_bytes = shared.options.segment_bytes - used;
        }
        shared.update_room(&mut table);
        let short = table.prepared.len() < shared.options.prepared_segments;
        let wake = table.capture_waits || table.tight || short;
        drop(table);
        if wake {
            shared.wake_background();
        }
        acknowledge(batches);
    }

    fn tell_failure(&mut self, shared: &Shared, cause: &Arc<Error>) -> Step {
        if std::mem::replace(&mut self.failure_told, true) {
            return Step::Blocked;
        }
        let error = Error::Poisoned { cause: cause.clone() };
        let (queued, sinks) = {
            let mut queue = shared.queue();
            queue.urgent = 0;
            (std::mem::take(&mut queue.batches), queue.live_sinks())
        };
        let in_flight = self.in_flight.take().map(|frame| frame.batches).unwrap_or_default();
        for batch in in_flight.into_iter().chain(queued) {
            if let Ack::Waiter(waiter) = &batch.ack {
                waiter.complete(Err(error.clone()));
            }
        }
        sinks.iter().for_each(|slot| slot.sink.failed(&error));
        Step::Progress
    }
}

/// Points the index at the records on disk.
fn settle(shared: &Shared, segment: &Arc<Segment>, mut offset: u32, batches: &[Queued]) {
    for batch in batches {
        let (mut at, mut lsn) = (0, batch.first_lsn);
        while let Some(head) = record::decode_head(&batch.data[at..]) {
            let len = head.padded();
            if head.kind == Kind::Entries {
                shared.index.with_mut(head.group, |group| group.settle(lsn, segment, offset, len as u32));
            }
            at += len;
            offset += len as u32;
            lsn += 1;
        }
    }
}

/// Gives the batches' room back, then tells each submitter of its batches, in order, with one call.
fn acknowledge(batches: Vec<Queued>) {
    // Whoever hears that a batch is durable may ask for its room at once.
    let acks: Vec<(Ack, Lsn)> = batches
        .into_iter()
        .map(|batch| {
            let lsn = Lsn(batch.last_lsn());
            (batch.ack, lsn)
        })
        .collect();
    let mut calls: Vec<(Arc<SinkSlot>, Vec<Persisted>)> = Vec::new();
    for (ack, lsn) in acks {
        match ack {
            Ack::Waiter(waiter) => waiter.complete(Ok(())),
            Ack::Sink(slot, token) => {
                let done = Persisted { token, lsn };
                match calls.iter_mut().find(|(known, _)| Arc::ptr_eq(known, &slot)) {
                    Some((_, list)) => list.push(done),
                    None => calls.push((slot, vec![done])),
                }
            }
        }
    }
    calls.iter().for_each(|(slot, done)| slot.sink.persisted(done));
}
