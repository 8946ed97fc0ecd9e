//! What the doors, the writer and the background share.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use pontoon_proto::GroupId;

use crate::{
    Batch, Error, KeyId, Lsn, MAX_BATCH_BYTES, Options, Pinned, Result, Usage, WalEvent,
    background::Background,
    cache::Cache,
    compress,
    crypt::{self, Keyring},
    fetch::Fetches,
    frame::COLD,
    fs::LockGuard,
    index::{ByGroup, Index, Place, Sim},
    metrics::{Counters, Metrics},
    pool,
    queue::{Ack, Queue, Queued},
    record::{self, Body, Head, Kind},
    space::{Reservation, Space},
    table::Table,
    writer::{Identity, Writer},
};

/// What a batch may hold records of, and how large they are, for room to be made at once to check them.
const MANY_GROUPS: usize = 64;
const LARGE_RECORD: usize = 256;
/// One open log.
///
/// Locks are taken in this order: writer, background, queue, table, a shard of the index, cache. Callbacks and the write
/// path's I/O run under none, but for the news of a failure, which runs under the writer's; readers take a shard's lock and
/// the cache's, never during I/O.
pub(crate) struct Shared {
    pub(crate) options: Options,
    pub(crate) keyring: Arc<Keyring>,
    pub(crate) identity: Identity,
    pub(crate) index: Index,
    pub(crate) space: Arc<Space>,
    pub(crate) cache: Cache,
    pub(crate) counters: Counters,
    pub(crate) fetches: Fetches,
    queue: Mutex<Queue>,
    /// The writer has something to do.
    pub(crate) work: Condvar,
    table: Mutex<Table>,
    /// Set once, with `Queue::poison`; spares the writer a lock per step.
    poisoned: AtomicBool,
    writer: Mutex<Writer>,
    background: Mutex<Background>,
    pub(crate) background_signal: Mutex<BackgroundSignal>,
    pub(crate) background_work: Condvar,
    /// The background's thread finished a pass.
    pub(crate) background_done: Condvar,
    /// Held until the log is closed.
    pub(crate) lock: Mutex<Option<Box<dyn LockGuard>>>,
}

/// What the background's thread waits for.
#[derive(Default)]
pub(crate) struct BackgroundSignal {
    pub(crate) count: u64,
    pub(crate) stop: bool,
}

/// What recovery hands over.
pub(crate) struct Parts {
    pub(crate) keyring: Arc<Keyring>,
    pub(crate) identity: Identity,
    pub(crate) index: Index,
    pub(crate) table: Table,
    pub(crate) writer: Writer,
    pub(crate) background: Background,
    pub(crate) next_lsn: u64,
    pub(crate) lock: Option<Box<dyn LockGuard>>,
}

impl Shared {
    pub(crate) fn new(options: Options, parts: Parts) -> Shared {
        let space = Space::new(options.max_pending_bytes);
        let depth = options.depth();
        let shared = Shared {
            cache: Cache::new(options.cache_bytes),
            counters: Counters::default(),
            fetches: Fetches::default(),
            options,
            keyring: parts.keyring,
            identity: parts.identity,
            index: parts.index,
            space,
            queue: Mutex::new(Queue::new(parts.next_lsn, depth)),
            work: Condvar::new(),
            table: Mutex::new(parts.table),
            poisoned: AtomicBool::new(false),
            writer: Mutex::new(parts.writer),
            background: Mutex::new(parts.background),
            background_signal: Mutex::default(),
            background_work: Condvar::new(),
            background_done: Condvar::new(),
            lock: Mutex::new(parts.lock),
        };
        shared.update_room(&mut shared.table());
        shared
    }

    pub(crate) fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn writer(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn background(&self) -> MutexGuard<'_, Background> {
        self.background.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn background_signal(&self) -> MutexGuard<'_, BackgroundSignal> {
        self.background_signal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn max_batch_bytes(&self) -> u64 {
        MAX_BATCH_BYTES.min(self.options.segment_bytes / 4)
    }

    /// Lets the writer look again.
    pub(crate) fn wake_writer(&self) {
        let mut queue = self.queue();
        queue.signal += 1;
        self.work.notify_one();
    }

    /// Lets the background look again.
    pub(crate) fn wake_background(&self) {
        self.background_signal().count += 1;
        self.background_work.notify_one();
    }

    /// Stops the log for good; the first failure stays.
    pub(crate) fn poison(&self, error: Error) {
        tracing::error!(%error, "the log stops");
        self.queue().poison.get_or_insert_with(|| Arc::new(error));
        self.poisoned.store(true, Ordering::Release);
        self.wake_writer();
    }

    pub(crate) fn poison_cause(&self) -> Option<Arc<Error>> {
        if !self.poisoned.load(Ordering::Acquire) {
            return None;
        }
        self.queue().poison.clone()
    }

    /// Tells everybody. The caller holds none of the queue's, the table's and the index's locks.
    pub(crate) fn emit(&self, event: &WalEvent) {
        let sinks = self.queue().live_sinks();
        sinks.iter().for_each(|slot| slot.sink.event(event));
    }

    /// Refuses more entries to a group that holds too many, or of which too many wait for the disk.
    pub(crate) fn check_quota(&self, group: GroupId) -> Result<()> {
        let (held_bytes, pending_bytes) =
            self.index.with(group, |state| (state.disk_bytes().0, state.pending_bytes())).unwrap_or_default();
        if let Some(quota_bytes) = self.options.group_quota_bytes
            && held_bytes > quota_bytes
        {
            return Err(Error::Quota { group, held_bytes, quota_bytes });
        }
        match pending_bytes > self.options.max_pending_group_bytes {
            true => Err(Error::Busy { pending_bytes }),
            false => Ok(()),
        }
    }

    /// Whether another segment file may be made.
    pub(crate) fn may_grow(&self, table: &Table) -> bool {
        let limit = self.options.size_limit_bytes.unwrap_or(u64::MAX);
        // An id is never given out twice; no honest log comes to the last one.
        let has_id = table.next_id < u32::MAX;
        has_id && !table.held && (table.files() as u64 + 1) * self.options.segment_bytes <= limit
    }

    /// How many segments should be ready. Once a log is larger than a segment the reserve is among them: on a disk that is
    /// found full there is nothing but what was prepared before.
    pub(crate) fn wanted_prepared(&self, table: &Table) -> usize {
        let reserve = if table.sealed.is_empty() { 0 } else { self.options.reserve_segments };
        self.options.prepared_segments.max(1 + reserve) + usize::from(table.cold_waits)
    }

    /// States how much room ordinary batches have.
    pub(crate) fn update_room(&self, table: &mut Table) {
        let segment = self.options.segment_bytes;
        let growth = match (self.options.size_limit_bytes, table.disk_full || table.held) {
            (None, false) => {
                (table.tight, table.starved) = (false, false);
                return self.space.set_room(u64::MAX);
            }
            (_, true) => 0,
            (Some(limit), false) => (limit / segment).saturating_sub(table.files() as u64),
        };
        // A file that is not filled yet may never be, while the disk is full.
        let free = table.free.iter().filter(|free| free.formed || !table.disk_full).count();
        let ahead = (table.prepared.len() + free) as u64 + growth;
        let reserve = self.options.reserve_segments as u64;
        table.tight = ahead <= reserve + 1;
        // Batches do not split over segments, so the end of one may stay empty.
        let active = table.active.as_ref().map_or(0, |active| active.room_bytes);
        let room = (ahead * (segment / 4 * 3) + active).saturating_sub(reserve * segment);
        table.starved = room < segment / 2;
        self.space.set_room(room);
    }

    /// Checks a batch, gives it its place in the order, shows it to readers and queues it. Also says whether a committer
    /// should write now; for a sink's batch one of the writer's threads does.
    pub(crate) fn submit(
        &self,
        mut batch: Batch,
        mut reservation: Reservation,
        ack: Ack,
    ) -> Result<(Lsn, bool)> {
        if let Some(mistake) = batch.mistake.take() {
            return Err(mistake);
        }
        // Sealed records are longer, by a tag each: on their way to the disk, where nothing is held up by the work.
        let tags_len = if self.keyring.is_on() { batch.records as usize * crypt::TAG } else { 0 };
        // As it was handed in: what one log takes, every log takes, however well it compresses.
        let (size, limit) = (batch.size_bytes() + tags_len as u64, self.max_batch_bytes());
        if size > limit {
            return Err(Error::TooLarge { what: "a batch", size, limit });
        }
        let mut batch = compress::batch(batch, self.options.compression, self.options.compress_above_bytes);
        if tags_len > 0 {
            crypt::sealed_dir(&batch.data, &mut batch.dir);
        }
        reservation.cover(batch.size_bytes() + tags_len as u64);
        let is_commit = matches!(ack, Ack::Waiter(_));
        let (records, entry_records, relaxed) = (batch.records, batch.entry_records, batch.relaxed);
        let dir = std::mem::take(&mut batch.dir);
        let data = pool::share(std::mem::take(&mut batch.data));
        let mut queue = self.queue();
        queue.check_open()?;
        check_all(&self.index, &data)?;
        let first_lsn = queue.next_lsn;
        show_all(&self.index, &data, first_lsn);
        queue.next_lsn += u64::from(records);
        let _reservation = reservation;
        let queued =
            Queued { data, tags_len, dir, records, entry_records, first_lsn, relaxed, ack, _reservation };
        let lsn = Lsn(queued.last_lsn());
        queue.urgent += usize::from(!relaxed);
        queue.bytes += queued.records_len();
        queue.batches.push_back(queued);
        let leads = is_commit && queue.wants_write();
        if !leads {
            queue.signal += 1;
            if queue.wants_thread() {
                self.work.notify_one();
            }
        }
        Ok((lsn, leads))
    }
}

/// What may be asked about the log as a whole.
impl Shared {
    pub(crate) fn group_ids(&self) -> Vec<GroupId> {
        let mut groups = Vec::new();
        self.index.for_each(|group, _| groups.push(group));
        groups.sort_unstable();
        groups
    }

    /// All metadata of a group, ascending by key.
    pub(crate) fn all_meta(&self, group: GroupId) -> Vec<(Bytes, Bytes)> {
        self.index.with(group, |state| state.meta().to_vec()).unwrap_or_default()
    }

    pub(crate) fn usage(&self) -> Usage {
        let pending_bytes = self.space.charged();
        let direct = self.writer().is_direct();
        let table = self.table();
        let sealed = table.sealed.values().map(|sealed| &sealed.segment);
        let active = table.active.iter().chain(&table.cold);
        let written = sealed.chain(active.map(|active| &active.segment));
        let cold = table.sealed.values().filter(|sealed| sealed.stream == COLD).count();
        let (active, cold_active) = (usize::from(table.active.is_some()), usize::from(table.cold.is_some()));
        Usage {
            groups: self.index.len(),
            segments: table.sealed.len() + active + cold_active,
            cold_segments: cold + cold_active,
            relocated_bytes: table.relocated_bytes,
            prepared: table.prepared.len(),
            free: table.free.len() + table.retired.len() + table.waiting.len(),
            disk_bytes: table.files() as u64 * self.options.segment_bytes,
            live_bytes: written.map(|segment| segment.live_bytes()).sum(),
            pending_bytes,
            cache_bytes: self.cache.bytes(),
            checkpoint: table.manifest_seqs.into_iter().max().unwrap_or(0),
            direct,
        }
    }

    pub(crate) fn metrics(&self) -> Metrics {
        let usage = self.usage();
        let (queued_batches, queued_bytes, frames_under_way) = {
            let queue = self.queue();
            (queue.batches.len(), queue.bytes, queue.flying_frames)
        };
        let pinned_bytes = {
            let table = self.table();
            let live = table.sealed.values().map(|sealed| sealed.segment.live_bytes());
            live.filter(|live| *live > 0).map(|live| self.options.segment_bytes - live).sum()
        };
        Metrics {
            queued_batches,
            queued_bytes,
            frames_under_way,
            usage,
            pinned_bytes,
            ..self.counters.copy()
        }
    }

    /// The keys without which what is on disk cannot be opened.
    pub(crate) fn key_ids_on_disk(&self) -> BTreeSet<KeyId> {
        let table = self.table();
        let sealed = table.sealed.values().map(|sealed| &sealed.segment);
        let active = table.active.iter().chain(&table.cold).map(|active| &active.segment);
        let segments = sealed.chain(active).chain(&table.retired);
        let keys = segments.filter_map(|segment| segment.seal()).map(|seal| seal.key_id);
        keys.chain(table.manifest_keys.iter().flatten().copied()).collect()
    }

    pub(crate) fn pinned(&self, n: usize) -> Vec<Pinned> {
        let mut pinned = Vec::new();
        self.index.for_each(|group, state| {
            if let (bytes, Some(oldest_segment)) = state.disk_bytes() {
                let (first_index, last_index) = (state.first_index(), state.last_index());
                pinned.push(Pinned { group, bytes, first_index, last_index, oldest_segment });
            }
        });
        pinned.sort_unstable_by_key(|pin| (std::cmp::Reverse(pin.bytes), pin.group));
        pinned.truncate(n);
        pinned
    }

    /// Blocks until the background has done something.
    pub(crate) fn await_background(&self) {
        let signal = self.background_signal();
        // It tells after each pass; a pass that ended just before this is caught by the timeout.
        let wait = std::time::Duration::from_millis(2);
        drop(self.background_done.wait_timeout(signal, wait).unwrap_or_else(PoisonError::into_inner));
    }
}

/// Reads a record of a batch, which this process encoded itself.
fn record_at(data: &Bytes, at: usize) -> (Head, Body) {
    record::decode_at(data, at).expect("a batch holds well-formed records")
}

/// Checks all records against the groups as they are and as the batch changes them. Only heads are looked at.
fn check_all(index: &Index, data: &[u8]) -> Result<()> {
    // Nearly always the records of a group follow each other.
    let mut before: ByGroup<Sim> = ByGroup::default();
    let mut rest = data;
    while let Some(mut head) = record::decode_head(rest) {
        let group = head.group;
        let known = before.get(&group).copied();
        let sim = index.look(group, |state| {
            let mut sim = known.unwrap_or_else(|| state.map_or_else(Sim::default, Sim::of));
            loop {
                sim.check(&head, rest, state)?;
                rest = &rest[head.padded()..];
                match record::decode_head(rest) {
                    Some(next) if next.group == group => head = next,
                    _ => return Ok(sim),
                }
            }
        })?;
        if !rest.is_empty() {
            if before.is_empty() {
                before.reserve(rest.len().div_ceil(LARGE_RECORD).min(MANY_GROUPS));
            }
            before.insert(group, sim);
        }
    }
    Ok(())
}

/// Shows the records of a batch, of which the first has this LSN, to readers. Records of one group that follow each other
/// appear at once.
fn show_all(index: &Index, data: &Bytes, first_lsn: u64) {
    let (mut at, mut lsn) = (0, first_lsn);
    while at < data.len() {
        let (head, body) = record_at(data, at);
        let group = head.group;
        if let Body::Destroy { min_replica } = body {
            index.destroy(group, min_replica);
            (at, lsn) = (at + head.padded(), lsn + 1);
            continue;
        }
        index.with_entry(group, |state| {
            let (mut head, mut body) = (head, body);
            loop {
                state.apply(&head, body, &Place::Memory { lsn });
                (at, lsn) = (at + head.padded(), lsn + 1);
                match record::decode_head(&data[at..]) {
                    Some(next) if next.group == group && next.kind != Kind::Destroy => {
                        (head, body) = record_at(data, at);
                    }
                    _ => break,
                }
            }
            #[cfg(debug_assertions)]
            state.check_invariants();
        });
    }
}

/// Applies one record to the index.
pub(crate) fn apply(index: &Index, head: &Head, body: Body, place: &Place<'_>) {
    match body {
        Body::Destroy { min_replica } => index.destroy(head.group, min_replica),
        body => index.with_entry(head.group, |group| group.apply(head, body, place)),
    }
}
