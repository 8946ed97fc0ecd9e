//! The writer: gathers what is queued into frames and puts them on disk, several at a time.
//!
//! It is a state machine over the clock and the completions of the file system. Who steps it (its threads, a committer, a
//! simulator) does not matter. A frame's write is carried out by the thread that built the frame, after it left the state
//! machine, so that as many writes are under way as threads step; so is the copying of its records.
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
//!    next open reads what is there. Frames that were under way and complete later are not acknowledged: they stand behind
//!    one that may be missing.
//! 7. With several frames under way, a later one may be durable when an earlier one is torn. It was not acknowledged, since
//!    acknowledgements are given in the order of the frames; no durable_seq covers the torn one, since that is the end of
//!    the durable beginning, not the highest frame that completed. So the torn one is a torn tail, and what follows it is
//!    cut with it.
//! 8. A segment is left when all its frames are durable: the checkpoint that lists it as sealed promises that.

use std::{
    collections::VecDeque,
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::{Bytes, BytesMut};

use crate::{
    Durability, Error, Lsn, Persisted, Result, WalEvent, create,
    crypt::{Keyring, Use},
    footer,
    frame::{self, BLOCK, Cut, FLAG_OPENING, FLAG_WATERMARK, FrameHeader, HOT, Plan},
    fs::{FileOp, Ticket},
    metrics::add,
    pool,
    queue::{Ack, Queued, SinkSlot, Waiter},
    record::{self, Kind},
    rules::{Rule, is_broken},
    segment::Segment,
    shared::Shared,
    slab::Slabs,
    table::{Active, Span},
};

/// Frames with records leave this much of a segment to a watermark, so that proving the last frame durable never needs
/// another segment: header and carried head take at most two blocks, the copy a third.
const TAIL_BLOCKS: usize = 3;
/// A write that takes so long is news.
const STALLS: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(1)];

/// What a step did, or what it waits for.
#[derive(Debug)]
pub(crate) enum Step {
    /// Something happened; step again.
    Progress,
    /// A frame that the caller writes, without the writer's lock.
    Write(Box<Job>),
    /// An operation of the file system.
    Io(Ticket),
    /// Sinks are to be told, without the writer's lock; then [`Writer::told`] is called.
    Tell(News),
    /// A moment, unless something is submitted before.
    Timer(Duration),
    /// Somebody else: a submitter or the background.
    Blocked,
}

/// What sinks will be told.
#[derive(Default)]
pub(crate) struct News {
    calls: Vec<(Arc<SinkSlot>, Vec<Persisted>)>,
    events: Vec<WalEvent>,
}

impl std::fmt::Debug for News {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "News({} calls, {:?})", self.calls.len(), self.events)
    }
}

impl News {
    fn is_empty(&self) -> bool {
        self.calls.is_empty() && self.events.is_empty()
    }

    /// Tells each submitter of its batches, in order.
    pub(crate) fn tell(self, shared: &Shared) {
        self.calls.iter().for_each(|(slot, done)| slot.sink.persisted(done));
        self.events.iter().for_each(|event| shared.emit(event));
    }
}

/// A frame on its way out of the state machine.
pub(crate) struct Job {
    plan: Plan,
    memory: BytesMut,
    records: Vec<Bytes>,
    segment: Arc<Segment>,
    durable: bool,
    flight: Arc<Flight>,
}

/// What the writer learns of a job.
#[derive(Default)]
struct Flight {
    bytes: OnceLock<Bytes>,
    ticket: OnceLock<Ticket>,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Job(frame {})", self.plan.header.seq)
    }
}

impl Job {
    /// Lays the frame out and hands it to the disk.
    pub(crate) fn begin(self) -> Ticket {
        let Job { plan, memory, records, segment, durable, flight } = self;
        let data = plan.lay_out(memory, records.iter().map(|batch| &batch[..]));
        let bytes = flight.bytes.get_or_init(|| data.clone());
        debug_assert_eq!(bytes.len(), data.len(), "a job is done once");
        let offset = u64::from(plan.header.block) * BLOCK as u64;
        let ticket = segment.file.submit(match durable {
            true => FileOp::WriteDurable { offset, data },
            false => FileOp::Write { offset, data },
        });
        flight.ticket.get_or_init(|| ticket.clone());
        ticket
    }
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

impl Identity {
    /// Gives a segment that this open takes into use its key, if there are keys.
    pub(crate) fn seal(&self, keyring: &Keyring, segment: &Segment) {
        let Segment { id, epoch, .. } = *segment;
        let Identity { store, incarnation, .. } = *self;
        segment.set_seal(keyring.seal_new(&Use { store, epoch, segment: id, incarnation }));
    }

    /// What each frame of this open says of itself and of its place.
    pub(crate) fn header(&self, shared: &Shared, segment: &Segment, block: u32) -> FrameHeader {
        let Identity { store, incarnation, ordinal, cuts } = *self;
        FrameHeader {
            store,
            epoch: segment.epoch,
            segment: segment.id,
            block,
            incarnation,
            ordinal,
            cuts,
            checkpoint: shared.table().manifest_seqs.into_iter().max().unwrap_or(0),
            ..FrameHeader::default()
        }
    }
}

/// A frame between its write and its acknowledgement.
struct InFlight {
    flight: Arc<Flight>,
    is_done: bool,
    since: Duration,
    /// How many of [`STALLS`] it has passed.
    stalls: usize,
    header: FrameHeader,
    segment: Arc<Segment>,
    batches: Vec<Queued>,
}

/// Where the next frame goes.
struct Position {
    segment: Arc<Segment>,
    block: u32,
    /// Records with entries that the segment holds: its footer will list them.
    entry_records: usize,
}

impl Position {
    /// Blocks of the segment that frames with records may use, if so many more with entries are among them.
    fn limit(&self, shared: &Shared, more: usize) -> usize {
        let total = shared.options.segment_bytes as usize / BLOCK;
        let footer = footer::room_blocks(self.entry_records + more, shared.index.len());
        total.saturating_sub(TAIL_BLOCKS + footer)
    }
}

/// The writer of the hot stream.
///
/// Invariants: `next_seq` is one above the last frame that was handed to the disk; `durable_seq < next_seq` never falls,
/// and all frames up to it are durable; `in_flight` holds the frames between the two, in order, all of one segment, and
/// until the opening frame is durable nothing but it; after a poisoning nothing is written.
pub(crate) struct Writer {
    identity: Identity,
    /// The frame_seq of this open's opening frame, once it is durable.
    opening_seq: Option<u64>,
    next_seq: u64,
    durable_seq: u64,
    position: Option<Position>,
    /// The head of the last frame, if that had one block.
    carry: Vec<u8>,
    in_flight: VecDeque<InFlight>,
    slabs: Slabs,
    /// Nothing was written since the last watermark.
    watermarked: bool,
    last_write: Duration,
    /// Since when only relaxed batches wait.
    relaxed_since: Option<Duration>,
    /// The sinks were told of the poisoning.
    failure_told: bool,
    /// What the sinks will be told.
    news: News,
    /// Somebody is telling them; calls never overtake each other.
    telling: bool,
    /// A frame waits for a segment to be prepared.
    waits_for_segment: bool,
    /// Whose batch is durable. Woken by the caller, without the writer's lock.
    woken: Vec<Arc<Waiter>>,
}

/// Who steps the writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stepper {
    /// One of its own threads, or the one that steps the whole log.
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
            position: None,
            carry,
            in_flight: VecDeque::new(),
            slabs: Slabs::default(),
            watermarked: true,
            last_write: Duration::ZERO,
            relaxed_since: None,
            failure_told: false,
            news: News::default(),
            telling: false,
            waits_for_segment: false,
            woken: Vec::new(),
        }
    }

    /// Whether nothing is in flight, the last frame is proven durable and nobody is left to be told.
    pub(crate) fn is_quiet(&self) -> bool {
        self.in_flight.is_empty() && self.watermarked && self.news.is_empty() && !self.telling
    }

    /// Whether the writes go around the system's cache.
    pub(crate) fn is_direct(&self) -> bool {
        self.position.as_ref().is_some_and(|position| position.segment.file.is_direct())
    }

    /// The sinks were told what [`Step::Tell`] gave.
    pub(crate) fn told(&mut self) {
        self.telling = false;
    }

    /// Threads to wake, once the writer's lock is released.
    pub(crate) fn take_woken(&mut self) -> Vec<Arc<Waiter>> {
        std::mem::take(&mut self.woken)
    }

    pub(crate) fn step(&mut self, shared: &Shared, now: Duration, stepper: Stepper) -> Step {
        let reaped = self.reap(shared, now);
        self.note_stalls(shared, now);
        if !self.news.is_empty() && stepper == Stepper::Driver && !self.telling {
            self.telling = true;
            return Step::Tell(std::mem::take(&mut self.news));
        }
        if let Some(cause) = shared.poison_cause() {
            return match stepper {
                Stepper::Driver if self.news.is_empty() && !self.telling => self.tell_failure(shared, &cause),
                _ => Step::Blocked,
            };
        }
        match self.begin(shared, now, stepper) {
            Step::Timer(_) | Step::Blocked if reaped => Step::Progress,
            step => step,
        }
    }

    /// Begins a write if there is a reason.
    fn begin(&mut self, shared: &Shared, now: Duration, stepper: Stepper) -> Step {
        let (wants_write, waiting, closed, front_is_commit) = {
            let queue = shared.queue();
            let front_is_commit = queue.batches.front().is_some_and(Queued::is_commit);
            (queue.wants_write(), !queue.batches.is_empty(), queue.closed, front_is_commit)
        };
        if wants_write {
            self.relaxed_since = None;
            return match self.opening_seq {
                None if self.in_flight.is_empty() => self.open(shared, now, stepper),
                None => self.wait_for_disk(shared, now),
                Some(_) if stepper == Stepper::Committer && !front_is_commit => Step::Blocked,
                Some(_) => self.write_frame(shared, now, 0, stepper),
            };
        }
        if !self.in_flight.is_empty() {
            return self.wait_for_disk(shared, now);
        }
        if self.watermarked && !waiting {
            if closed {
                self.end(shared);
            }
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
        self.write_frame(shared, now, FLAG_WATERMARK, stepper)
    }

    /// Writes the opening frame. The log's own name must not be what a power cut takes from under it.
    fn open(&mut self, shared: &Shared, now: Duration, stepper: Stepper) -> Step {
        if let Err(error) = create::sync_name(&*shared.options.fs, &shared.options.dir) {
            shared.poison(error);
            return Step::Progress;
        }
        self.write_frame(shared, now, FLAG_OPENING, stepper)
    }

    /// Nothing will be written any more: the segment is complete, and the last checkpoint may give it a footer.
    fn end(&mut self, shared: &Shared) {
        let mut table = shared.table();
        if let Some(active) = table.active.take() {
            table.sealed.insert(active.segment.id, active.seal(HOT, self.next_seq - 1));
            table.ended = true;
            self.position = None;
            drop(table);
            shared.wake_background();
        }
    }

    /// Whoever carries out the oldest write steps again after it. A thread that has nothing else to do looks now and then
    /// whether it takes too long, or whether everything is idle by then.
    fn wait_for_disk(&self, shared: &Shared, now: Duration) -> Step {
        Step::Timer(now + shared.options.idle_watermark)
    }

    fn note_stalls(&mut self, shared: &Shared, now: Duration) {
        let Some(frame) = self.in_flight.front_mut() else { return };
        while let Some(stall) = STALLS.get(frame.stalls)
            && now >= frame.since + *stall
        {
            frame.stalls += 1;
            add(&shared.counters.stalls, 1);
            self.news.events.push(WalEvent::Stalled { waited: *stall });
        }
    }

    /// Notes which writes are complete, and acknowledges the frames of which all before are; whether there were any.
    pub(crate) fn reap(&mut self, shared: &Shared, now: Duration) -> bool {
        for frame in self.in_flight.iter_mut().filter(|frame| !frame.is_done) {
            match frame.flight.ticket.get().and_then(Ticket::poll) {
                None => {}
                Some(Ok(())) => frame.is_done = true,
                Some(Err(source)) => shared.poison(Error::io("write", &frame.segment.path, source)),
            }
        }
        let mut any = false;
        // After a failure nothing is acknowledged any more, whatever completes.
        while shared.poison_cause().is_none()
            && let Some(frame) = self.in_flight.pop_front_if(|frame| frame.is_done)
        {
            self.complete(shared, frame, now);
            any = true;
        }
        any
    }

    /// Builds the next frame and hands it to the disk.
    fn write_frame(&mut self, shared: &Shared, now: Duration, flags: u16, stepper: Stepper) -> Step {
        let Some((segment, block)) = self.place(shared, flags) else {
            return self.wait_for_disk(shared, now);
        };
        let batches = self.gather(shared, flags, stepper);
        let records_len = batches.iter().map(Queued::records_len).sum();
        let dir_len = batches.iter().map(|batch| batch.dir.len()).sum();
        let must_sync = match flags & FLAG_OPENING != 0 {
            true => !is_broken(Rule::OpeningAlone),
            false => shared.options.durability == Durability::Sync && !is_broken(Rule::SyncBeforeAck),
        };
        let header = FrameHeader {
            flags,
            seq: self.next_seq,
            durable_seq: match shared.options.durability {
                Durability::Sync if is_broken(Rule::DurableMarkIsPrefix) => self.last_done(),
                Durability::Sync => self.durable_seq,
                Durability::System => 0,
            },
            first_lsn: batches.first().map_or(0, |batch| batch.first_lsn),
            records: batches.iter().map(|batch| batch.records).sum(),
            opening_seq: self.opening_seq.unwrap_or(self.next_seq),
            ..self.identity.header(shared, &segment, block)
        };
        let memory = self.slabs.take(frame::frame_blocks(dir_len, self.carry.len(), records_len) * BLOCK);
        let dirs = batches.iter().map(|batch| &batch.dir[..]);
        let mut plan = frame::plan(header, &self.carry, dirs, records_len, segment.seal().cloned());
        debug_assert!(
            u64::from(block + plan.header.blocks) * BLOCK as u64 <= shared.options.segment_bytes,
            "a frame never leaves its segment"
        );
        self.carry = plan.carry.take().unwrap_or_default();
        self.next_seq += 1;
        self.watermarked = flags & FLAG_WATERMARK != 0 || shared.options.durability == Durability::System;
        let entry_records: usize = batches.iter().map(|batch| batch.entry_records as usize).sum();
        if let Some(position) = &mut self.position {
            position.block += plan.header.blocks;
            position.entry_records += entry_records;
        }
        let flight: Arc<Flight> = Arc::default();
        let records = batches.iter().map(|batch| batch.data.clone()).collect();
        self.in_flight.push_back(InFlight {
            flight: flight.clone(),
            is_done: false,
            since: now,
            stalls: 0,
            header: plan.header.clone(),
            segment: segment.clone(),
            batches,
        });
        Step::Write(Box::new(Job { plan, memory, records, segment, durable: must_sync, flight }))
    }

    /// The last frame that completed, whatever came of those before it.
    fn last_done(&self) -> u64 {
        let done = self.in_flight.iter().filter(|frame| frame.is_done);
        done.map(|frame| frame.header.seq).max().unwrap_or(self.durable_seq)
    }

    /// Where the next frame goes: behind the last one, or at the start of a prepared segment.
    fn place(&mut self, shared: &Shared, flags: u16) -> Option<(Arc<Segment>, u32)> {
        if let Some(position) = &self.position {
            let queue = shared.queue();
            let (blocks, limit) = match queue.batches.front().filter(|_| flags == 0) {
                Some(batch) => (
                    frame::frame_blocks(batch.dir.len(), self.carry.len(), batch.records_len()),
                    position.limit(shared, batch.entry_records as usize),
                ),
                None => (
                    frame::frame_blocks(0, self.carry.len(), 0),
                    shared.options.segment_bytes as usize / BLOCK,
                ),
            };
            // The first frame of a segment always finds room, whatever that leaves to a footer.
            if position.block == 0 || position.block as usize + blocks <= limit {
                return Some((position.segment.clone(), position.block));
            }
        }
        if !self.in_flight.is_empty() {
            return None;
        }
        let mut table = shared.table();
        // The first submit wants a frame: from now on the background may write too.
        table.started = true;
        let Some(next) = table.take_usable() else {
            drop(table);
            shared.wake_background();
            if !std::mem::replace(&mut self.waits_for_segment, true) {
                add(&shared.counters.rotations_waited, 1);
                self.news.events.push(WalEvent::Unprepared);
            }
            return None;
        };
        self.waits_for_segment = false;
        self.identity.seal(&shared.keyring, &next);
        let active = Active {
            segment: next.clone(),
            incarnation: self.identity.incarnation,
            first_seq: self.next_seq,
            room_bytes: shared.options.segment_bytes,
            span: Span::default(),
        };
        if let Some(last) = table.active.replace(active) {
            table.sealed.insert(last.segment.id, last.seal(HOT, self.next_seq - 1));
        }
        drop(table);
        self.position = Some(Position { segment: next.clone(), block: 0, entry_records: 0 });
        shared.wake_background();
        add(&shared.counters.rotations, 1);
        self.news.events.push(WalEvent::Rotated { segment: next.id });
        Some((next, 0))
    }

    /// Takes as many batches as one frame may hold; none for an opening frame and a watermark.
    fn gather(&self, shared: &Shared, flags: u16, stepper: Stepper) -> Vec<Queued> {
        let mut queue = shared.queue();
        queue.flying_frames += 1;
        let mut batches = Vec::new();
        if flags != 0 {
            return batches;
        }
        let Some(position) = &self.position else { return batches };
        let (mut dir_len, mut data_len, mut entries) = (0, 0, 0);
        let limit = shared.options.max_frame_bytes as usize;
        while let Some(batch) = queue.batches.pop_front_if(|batch| {
            let (dir, data) = (dir_len + batch.dir.len(), data_len + batch.records_len());
            let fits = || {
                let end = position.block as usize + frame::frame_blocks(dir, self.carry.len(), data);
                end <= position.limit(shared, entries + batch.entry_records as usize)
            };
            // The first one fits: its place was chosen for it.
            batches.is_empty()
                || (stepper == Stepper::Driver || batch.is_commit()) && dir + data <= limit && fits()
        }) {
            dir_len += batch.dir.len();
            data_len += batch.records_len();
            entries += batch.entry_records as usize;
            queue.urgent -= usize::from(!batch.relaxed);
            batches.push(batch);
        }
        queue.bytes -= data_len;
        queue.flying_batches += batches.len();
        queue.flush &= !queue.batches.is_empty();
        batches
    }

    /// The frame and all before it are durable: its records are on disk for readers, its submitters hear of it.
    fn complete(&mut self, shared: &Shared, frame: InFlight, now: Duration) {
        let InFlight { header, flight, segment, batches, since, .. } = frame;
        debug_assert_eq!(header.seq, self.durable_seq + 1, "acknowledged in the order of the frames");
        self.durable_seq = header.seq;
        self.last_write = now;
        if header.flags & FLAG_OPENING != 0 {
            self.opening_seq = Some(header.seq);
        }
        let frame_offset = header.block * BLOCK as u32;
        settle(shared, &segment, frame_offset + header.records_offset, &batches);
        if let Some(bytes) = flight.bytes.get().filter(|_| !batches.is_empty()) {
            shared.cache.insert(segment.id, frame_offset, bytes.clone());
        }
        let counters = &shared.counters;
        add(&counters.frames, 1);
        add(&counters.frame_bytes, u64::from(header.blocks) * BLOCK as u64);
        if !batches.is_empty() {
            add(&counters.batches, batches.len() as u64);
            add(&counters.records, u64::from(header.records));
            add(&counters.batch_bytes, batches.iter().map(|batch| batch.data.len() as u64).sum());
            counters.frame_times.note(now.saturating_sub(since));
        }
        let used = u64::from(header.block + header.blocks) * BLOCK as u64;
        let mut table = shared.table();
        table.done_seq = header.seq;
        table.opening_seq = self.opening_seq;
        if let Some(batch) = batches.last() {
            table.done_lsn = batch.last_lsn();
        }
        table.written_bytes += u64::from(header.blocks) * BLOCK as u64;
        if let Some(active) = &mut table.active {
            active.room_bytes = shared.options.segment_bytes - used;
            active.span.add((header.block, header.blocks), header.first_lsn, header.records);
        }
        shared.update_room(&mut table);
        let short = table.prepared.len() < shared.wanted_prepared(&table);
        let wake = table.capture_waits || table.tight || short;
        drop(table);
        if wake {
            shared.wake_background();
        }
        {
            let mut queue = shared.queue();
            queue.flying_frames -= 1;
            queue.flying_batches -= batches.len();
        }
        self.acknowledge(batches);
    }

    /// Gives the batches' room back and notes who will be told, each submitter with one call.
    fn acknowledge(&mut self, batches: Vec<Queued>) {
        let first = self.news.calls.len();
        for batch in batches {
            let lsn = Lsn(batch.last_lsn());
            pool::give(batch.dir);
            match batch.ack {
                Ack::Waiter(waiter) => self.woken.push(waiter),
                Ack::Sink(slot, token) => {
                    let done = Persisted { token, lsn };
                    match self.news.calls[first..].iter_mut().find(|(known, _)| Arc::ptr_eq(known, &slot)) {
                        Some((_, list)) => list.push(done),
                        None => self.news.calls.push((slot, vec![done])),
                    }
                }
            }
        }
    }

    fn tell_failure(&mut self, shared: &Shared, cause: &Arc<Error>) -> Step {
        if std::mem::replace(&mut self.failure_told, true) {
            return Step::Blocked;
        }
        let error = Error::Poisoned { cause: cause.clone() };
        let (queued, sinks) = {
            let mut queue = shared.queue();
            queue.urgent = 0;
            queue.bytes = 0;
            (queue.flying_frames, queue.flying_batches) = (0, 0);
            (std::mem::take(&mut queue.batches), queue.live_sinks())
        };
        let in_flight = self.in_flight.drain(..).flat_map(|frame| frame.batches);
        for batch in in_flight.chain(queued) {
            if let Ack::Waiter(waiter) = &batch.ack {
                waiter.complete(Err(error.clone()));
            }
        }
        sinks.iter().for_each(|slot| slot.sink.failed(&error));
        Step::Progress
    }
}

/// Wakes threads whose batches are durable.
pub(crate) fn wake(woken: Vec<Arc<Waiter>>) {
    let done: Result<()> = Ok(());
    woken.iter().for_each(|waiter| waiter.complete(done.clone()));
}

/// Points the index at the records on disk.
fn settle(shared: &Shared, segment: &Arc<Segment>, mut offset: u32, batches: &[Queued]) {
    let tag_len = segment.tag_len();
    for batch in batches {
        let (mut at, mut lsn) = (0, batch.first_lsn);
        while let Some(head) = record::decode_head(&batch.data[at..]) {
            let len = head.padded() + tag_len;
            if head.kind == Kind::Entries {
                shared.index.with_mut(head.group, |group| group.settle(lsn, segment, offset, len as u32));
            }
            at += head.padded();
            offset += len as u32;
            lsn += 1;
        }
    }
}
