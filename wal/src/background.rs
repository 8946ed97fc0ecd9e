//! The background: prepares segments, writes checkpoints, frees segments, and lets [`Relocator`] empty some. A state machine
//! like the writer.
//!
//! Crash cases:
//!
//! 1. While a segment file is being filled: no manifest lists it, so it is free, whatever it holds.
//! 2. After it is filled, before both manifests list it: it took no frame, so either manifest tells the truth.
//! 3. In the middle of a manifest's write: that file is torn, the other is whole. It is at most one checkpoint older, and
//!    everything that it lists is still there: a segment is used again only when neither file lists it.
//! 4. After a manifest is durable, before the next: entries, bounds and segments that it no longer mentions are only in
//!    the other file's past. Recovery takes the newer one; if rot takes that, the older is complete (see 3) and every
//!    segment that took frames since is listed in both.
//! 5. Between the capture and the manifest's write: the capture is in memory only.
//!    The newer file may also be what an earlier process wrote and did not live to sync, or whose sync failed: so each open
//!    writes it once more as it stands and syncs it before it touches the older one.
//! 6. A full disk in the middle of a manifest's write: as 3, and the file is written again when there is room. Until then
//!    the file counts as listing both the old set and the new.
//! 7. While footers are written: they lie behind the last frame of segments that take no more frames. Whatever is there is
//!    void (the opening frame that cut it is durable by then), or what an earlier try to write a footer left. No manifest
//!    lists the footer yet, so nobody looks at it, and a later checkpoint writes over it.
//! 8. After the footers, before the manifest that lists them: as 7. A footer is listed by its CRC, and only by manifests
//!    whose state is at least as late as its capture; so the loss of the newer manifest leaves an older one, with footers
//!    of its own time or none.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::{Arc, MutexGuard},
    time::Duration,
};

use bytes::Bytes;

use crate::{
    Durability, Error, GcStats, KeyId, Result, WalEvent,
    checkpoint::{Capture, Footers},
    codec::round_up,
    frame::BLOCK,
    fs::{File, FileOp, OpenMode, Ticket, read_whole},
    manifest::{AsOf, MANIFEST_NAMES, Manifest},
    metrics::add,
    recovery,
    relocate::Relocator,
    rng::Rng,
    rules::{Rule, is_broken},
    segment::{Segment, segment_name},
    shared::Shared,
    table::{Free, SealedFooter, Table},
    writer::{Identity, Step},
};

/// A segment is filled in pieces of this size: a larger one would hold up the log's own writes.
const FILL_BYTES: u64 = 256 << 10;
/// After a full disk, the next try.
const RETRY: Duration = Duration::from_millis(500);
/// Dead segments that ask for a checkpoint even if prepared ones abound.
const DEAD_ENOUGH: usize = 4;
/// So many times the manifest's size is written to segments between two checkpoints that are made for the sake of the next
/// open, so that many groups do not double what is written.
const MANIFEST_SHARE: u64 = 8;
/// Sealed segments without a footer that ask for a checkpoint however little they hold: each open leaves one behind, and
/// scanning it costs what it could hold.
const UNSETTLED_ENOUGH: usize = 4;
/// A close leaves at most this part of a segment to be scanned by the next open, or makes a checkpoint.
const CLOSE_PART: u64 = 16;
/// What a manifest has room for at least before it needs more of the disk; a group takes about a hundred bytes.
const SLACK_BYTES: u64 = 16 << 10;
/// Free files that are kept for later, since filling new ones costs as much as writing them; more are removed.
const KEEP_FREE: usize = 16;
/// How many more than asked for are prepared at once if that costs no filling, so that a busy log is listed seldom.
const PREPARE_MORE: usize = 6;

/// Operations on a row of files, one after the other.
struct Job {
    ops: VecDeque<(Arc<dyn File>, FileOp)>,
    ticket: Option<Ticket>,
    goal: Goal,
}

enum Goal {
    /// `grows`: it takes room on the disk that the log did not have before.
    Prepare {
        id: u32,
        file: Arc<dyn File>,
        grows: bool,
    },
    /// The footers of some sealed segments.
    Footers(Vec<(u32, SealedFooter)>),
    Checkpoint(Written),
}

/// A manifest on its way to the disk.
struct Written {
    slot: usize,
    seq: u64,
    bytes: u64,
    listed: BTreeSet<u32>,
    keys: BTreeSet<KeyId>,
}

/// The background of one open log.
pub(crate) struct Background {
    identity: Identity,
    rng: Rng,
    relocator: Relocator,
    capture: Option<Capture>,
    job: Option<Job>,
    retry_at: Option<Duration>,
    /// Checkpoints that were asked for.
    pub(crate) gc_wanted: bool,
    pub(crate) stats: GcStats,
    /// `Table::written_bytes` when the last capture began.
    written_at_capture: u64,
    /// The size of the last manifest.
    manifest_bytes: u64,
    /// Segments are prepared up to more than asked for.
    topping_up: bool,
    /// The newer manifest file was synced by this open.
    newest_is_synced: bool,
    /// The disk was full for the last checkpoint.
    manifest_waits: bool,
}

impl Background {
    pub(crate) fn new(identity: Identity, rng: Rng, cold_seq: u64) -> Background {
        Background {
            relocator: Relocator::new(identity.clone(), cold_seq),
            identity,
            rng,
            capture: None,
            job: None,
            retry_at: None,
            gc_wanted: false,
            stats: GcStats::default(),
            written_at_capture: 0,
            manifest_bytes: 0,
            topping_up: false,
            newest_is_synced: false,
            manifest_waits: false,
        }
    }

    pub(crate) fn step(&mut self, shared: &Shared, now: Duration) -> Step {
        if shared.poison_cause().is_some() {
            return Step::Blocked;
        }
        let step = self.step_segments(shared, now);
        if !matches!(step, Step::Blocked | Step::Timer(_)) {
            return step;
        }
        match (step, self.relocate(shared, now)) {
            (step, Step::Blocked) => step,
            (Step::Timer(one), Step::Timer(other)) => Step::Timer(one.min(other)),
            (_, step) => step,
        }
    }

    fn relocate(&mut self, shared: &Shared, now: Duration) -> Step {
        self.relocator.step(shared, now, self.gc_wanted, &mut self.stats)
    }

    /// Everything but relocation.
    fn step_segments(&mut self, shared: &Shared, now: Duration) -> Step {
        if self.job.is_some() {
            return self.step_job(shared, now);
        }
        if !shared.table().started {
            // Nothing is written before the first append.
            return Step::Blocked;
        }
        if shared.table().ended {
            return self.step_end(shared, now);
        }
        self.release(shared);
        if let Some(at) = self.retry_at {
            if now < at {
                return Step::Timer(at);
            }
            self.retry_at = None;
        }
        if let Some(capture) = &mut self.capture {
            if !capture.is_complete() {
                capture.step(shared);
                return Step::Progress;
            }
            return self.start_checkpoint(shared, now);
        }
        // Whatever else is to be done comes before a segment that has to be filled.
        self.topping_up &= shared.table().all_formed();
        if self.topping_up {
            return self.start_prepare(shared, now);
        }
        if self.gc_wanted {
            // What it empties is freed with the rest; for that it may need a segment more.
            let mut step = self.relocate(shared, now);
            if matches!(step, Step::Blocked) && shared.table().cold_waits {
                step = self.start_prepare(shared, now);
            }
            if matches!(step, Step::Progress | Step::Io(_)) {
                return step;
            }
        }
        if self.wants_checkpoint(shared) {
            self.capture(shared);
            return Step::Progress;
        }
        self.start_prepare(shared, now)
    }

    /// After the last frame: one more checkpoint if the next open would have much to scan, and nothing else. A disk that is
    /// full now does not hold the close up.
    fn step_end(&mut self, shared: &Shared, now: Duration) -> Step {
        if self.retry_at.is_some() {
            return Step::Blocked;
        }
        match &mut self.capture {
            Some(capture) if capture.is_complete() => return self.start_checkpoint(shared, now),
            Some(capture) => capture.step(shared),
            None => {
                let table = shared.table();
                if !self.leaves_much_to_scan(shared, &table) {
                    return Step::Blocked;
                }
                drop(table);
                self.capture(shared);
            }
        }
        Step::Progress
    }

    fn capture(&mut self, shared: &Shared) {
        self.written_at_capture = shared.table().written_bytes;
        self.capture = Some(Capture::begin(shared));
    }

    fn step_job(&mut self, shared: &Shared, now: Duration) -> Step {
        let Some(job) = &mut self.job else { return Step::Blocked };
        if let Some(ticket) = &job.ticket {
            match ticket.poll() {
                None => return Step::Io(ticket.clone()),
                Some(Ok(())) => job.ticket = None,
                Some(Err(source)) => {
                    let failed = self.job.take();
                    self.fail(shared, now, failed, source);
                    return Step::Progress;
                }
            }
        }
        if let Some((file, op)) = job.ops.pop_front() {
            job.ticket = Some(file.submit(op));
            return Step::Progress;
        }
        match self.job.take().map(|job| job.goal) {
            Some(Goal::Prepare { id, file, grows }) => self.finish_prepare(shared, id, file, grows),
            Some(Goal::Footers(done)) => {
                let mut table = shared.table();
                for (id, footer) in done {
                    let sealed = table.sealed.get_mut(&id);
                    sealed.into_iter().for_each(|sealed| sealed.footer = Some(footer));
                }
            }
            Some(Goal::Checkpoint(written)) => self.finish_checkpoint(shared, written),
            None => {}
        }
        Step::Progress
    }

    /// A full disk passes; any other failure leaves blocks in an unknown state, and the log stops.
    fn fail(&mut self, shared: &Shared, now: Duration, job: Option<Job>, source: std::io::Error) {
        let Some(job) = job else { return };
        let name = match &job.goal {
            Goal::Prepare { id, .. } => segment_name(*id),
            Goal::Footers(done) => done.first().map_or_else(String::new, |(id, _)| segment_name(*id)),
            Goal::Checkpoint(written) => MANIFEST_NAMES[written.slot].to_owned(),
        };
        let error = Error::io("write", shared.options.dir.join(name), source);
        if !error.is_disk_full() {
            shared.poison(error);
            return;
        }
        match job.goal {
            // What is left of the disk is for the manifests.
            Goal::Prepare { id, .. } => self.remove(shared, Free { id, formed: false }),
            Goal::Checkpoint(_) => {
                // It frees more than it takes: the room of a file that nobody needs is its.
                self.manifest_waits = true;
                let free = shared.table().free.pop();
                if let Some(free) = free {
                    return self.remove(shared, free);
                }
            }
            Goal::Footers(_) => {}
        }
        self.disk_full(shared, shared.table(), now);
    }

    fn disk_full(&mut self, shared: &Shared, mut table: MutexGuard<'_, Table>, now: Duration) {
        self.retry_at = Some(now + RETRY);
        // Whoever asked for a collection gets the answer that the disk allows.
        self.gc_wanted = false;
        let news = !std::mem::replace(&mut table.disk_full, true);
        shared.update_room(&mut table);
        drop(table);
        if news {
            tracing::warn!(dir = %shared.options.dir.display(), "the disk is full; the log lives on its reserve");
            shared.emit(&WalEvent::SpaceLow);
        }
    }

    fn wants_checkpoint(&mut self, shared: &Shared) -> bool {
        let table = shared.table();
        let dead = table.dead().count();
        let short = table.prepared.len() < shared.wanted_prepared(&table) && table.free.is_empty();
        if self.gc_wanted && dead == 0 && !table.listing_is_due() && self.stats.checkpoints > 0 {
            self.gc_wanted = false;
        }
        self.gc_wanted
            || table.listing_is_due()
            || (short || table.tight) && dead > 0
            || dead >= DEAD_ENOUGH
            || self.leaves_much_to_scan(shared, &table)
    }

    /// Whether the next open should not have to scan what has come together since the last checkpoint.
    fn leaves_much_to_scan(&self, shared: &Shared, table: &Table) -> bool {
        let unsettled = table.unsettled().count();
        let written = table.written_bytes - self.written_at_capture;
        let segment = shared.options.segment_bytes;
        let enough = match table.ended {
            true => (segment / CLOSE_PART).max(self.manifest_bytes),
            // The end of a segment may stay empty.
            false => (segment / 2).max(MANIFEST_SHARE * self.manifest_bytes),
        };
        unsettled > 0 && (written >= enough || unsettled >= UNSETTLED_ENOUGH)
    }

    /// Writes what was captured once all of it is durable.
    fn start_checkpoint(&mut self, shared: &Shared, now: Duration) -> Step {
        let mut table = shared.table();
        let waits = self.capture.as_ref().is_some_and(|capture| table.done_lsn < capture.lsns.most())
            && !is_broken(Rule::CaptureDurable);
        table.capture_waits = waits;
        if waits {
            let starving = table.usable() == 0 && table.listing_is_due();
            drop(table);
            // The writer may be waiting for a segment itself; then the capture would wait for ever.
            return if starving { self.list_segments(shared, now) } else { self.start_prepare(shared, now) };
        }
        if let Some(capture) = &mut self.capture {
            let Footers { ops, done } = capture.footers(shared, &mut table, &mut self.rng);
            if !ops.is_empty() {
                drop(table);
                self.job = Some(Job { ops: ops.into(), ticket: None, goal: Goal::Footers(done) });
                return self.step_job(shared, now);
            }
        }
        let Some(capture) = self.capture.take() else { return Step::Blocked };
        for id in capture.dead {
            if let Some(sealed) = table.sealed.remove(&id) {
                table.retired.push(sealed.segment);
            }
        }
        let manifest = Manifest {
            as_of: AsOf {
                incarnation: self.identity.incarnation,
                ordinal: self.identity.ordinal,
                seqs: [table.done_seq, if is_broken(Rule::ColdSeqStated) { 0 } else { capture.cold_seq }],
                lsns: capture.lsns,
            },
            groups: capture.groups,
            tombstones: capture.tombstones,
            ..Manifest::default()
        };
        self.write_manifest(shared, table, now, manifest)
    }

    /// Writes the newest manifest again with today's segments: the state stays as of its LSN, and every frame after that
    /// is in a segment that is still listed.
    fn list_segments(&mut self, shared: &Shared, now: Duration) -> Step {
        let loaded = recovery::load(&*shared.options.fs, &shared.options.dir, &shared.keyring);
        let newest = loaded.map(|loaded| {
            let manifests = loaded.into_iter().flat_map(|loaded| loaded.manifests).flatten();
            manifests.max_by_key(|manifest| manifest.seq)
        });
        match newest {
            Ok(Some(manifest)) => self.write_manifest(shared, shared.table(), now, manifest),
            Ok(None) => Step::Blocked,
            Err(error) => {
                shared.poison(error);
                Step::Progress
            }
        }
    }

    /// Writes a manifest with this state over the older of the two files.
    fn write_manifest(
        &mut self,
        shared: &Shared,
        mut table: MutexGuard<'_, Table>,
        now: Duration,
        state: Manifest,
    ) -> Step {
        let older = usize::from(table.manifest_seqs[0] > table.manifest_seqs[1]);
        let slot = if is_broken(Rule::OlderManifest) { 1 - older } else { older };
        let mut manifest = Manifest {
            seq: table.manifest_seqs[1 - older] + 1,
            store: self.identity.store,
            segment_bytes: shared.options.segment_bytes,
            next_segment: table.next_id,
            segments: table.listing(state.as_of.lsns.least()),
            ..state
        };
        let listed: BTreeSet<u32> = manifest.segments.iter().map(|segment| segment.id).collect();
        let bytes = Bytes::from(manifest.encode(&shared.keyring, &mut self.rng));
        let keys: BTreeSet<KeyId> = manifest.keys().collect();
        // Until the sync the file may hold the old list or the new one.
        table.listed[slot].extend(&listed);
        table.manifest_keys[slot].extend(&keys);
        let mut ops: VecDeque<(Arc<dyn File>, FileOp)> = VecDeque::new();
        if shared.options.durability == Durability::System {
            // Frames were written without a sync; what the checkpoint builds on must be there after a power cut.
            let files = table.active.iter().chain(&table.cold).map(|active| &active.segment);
            let files = files.chain(table.sealed.values().map(|sealed| &sealed.segment));
            ops.extend(files.map(|segment| (segment.file.clone(), FileOp::Sync)));
        }
        drop(table);
        let open = |slot: usize| {
            let path = shared.options.dir.join(MANIFEST_NAMES[slot]);
            let file = shared.options.fs.open(&path, OpenMode::Write);
            file.map_err(|source| shared.poison(Error::io("open", path, source)))
        };
        let Ok(file) = open(slot) else { return Step::Progress };
        if !self.newest_is_synced && !is_broken(Rule::NewestManifestSynced) {
            let Ok(newest) = open(1 - slot) else { return Step::Progress };
            let data = match read_whole(&*newest) {
                Ok(bytes) => Bytes::from(bytes),
                Err(source) => {
                    shared.poison(Error::io(
                        "read",
                        shared.options.dir.join(MANIFEST_NAMES[1 - slot]),
                        source,
                    ));
                    return Step::Progress;
                }
            };
            ops.push_back((newest.clone(), FileOp::Write { offset: 0, data }));
            ops.push_back((newest, FileOp::Sync));
        }
        let written = Written { slot, seq: manifest.seq, bytes: bytes.len() as u64, listed, keys };
        if !self.manifest_waits {
            ops.extend(slack(&file, bytes.len() as u64).map(|op| (file.clone(), op)));
        }
        ops.push_back((file.clone(), FileOp::Write { offset: 0, data: bytes }));
        if !is_broken(Rule::ManifestSynced) {
            ops.push_back((file, FileOp::Sync));
        }
        self.job = Some(Job { ops, ticket: None, goal: Goal::Checkpoint(written) });
        self.step_job(shared, now)
    }

    fn finish_checkpoint(&mut self, shared: &Shared, written: Written) {
        let Written { slot, seq, bytes, listed, keys } = written;
        self.manifest_bytes = bytes;
        let has_room;
        {
            let mut table = shared.table();
            table.listed[slot] = listed;
            table.manifest_keys[slot] = keys;
            table.manifest_seqs[slot] = seq;
            has_room = std::mem::take(&mut self.manifest_waits) && disk_has_room(shared, &mut table);
            shared.update_room(&mut table);
        }
        if has_room {
            shared.emit(&WalEvent::SpaceBack);
        }
        self.newest_is_synced = true;
        self.stats.checkpoints += 1;
        add(&shared.counters.checkpoints, 1);
        tracing::debug!(seq, "checkpoint");
        shared.emit(&WalEvent::Checkpointed { seq });
        self.release(shared);
        shared.wake_writer();
    }

    /// Frees what both manifests forgot, and removes files that are too many.
    fn release(&mut self, shared: &Shared) {
        let mut table = shared.table();
        let freed = table.release();
        freed.iter().for_each(|id| shared.cache.forget(*id));
        self.stats.segments_freed += freed.len();
        self.stats.bytes_freed += freed.len() as u64 * shared.options.segment_bytes;
        let kept = table.free.len().min(KEEP_FREE);
        let surplus = table.free.split_off(kept);
        if !freed.is_empty() {
            shared.update_room(&mut table);
        }
        drop(table);
        surplus.into_iter().for_each(|free| self.remove(shared, free));
    }

    /// A file that stays is free at the next open, whatever it holds.
    fn remove(&self, shared: &Shared, free: Free) {
        let path = shared.options.dir.join(segment_name(free.id));
        if let Err(error) = shared.options.fs.remove_file(&path) {
            tracing::warn!(path = %path.display(), %error, "cannot remove a free segment");
        }
    }

    fn start_prepare(&mut self, shared: &Shared, now: Duration) -> Step {
        let mut table = shared.table();
        let wanted = shared.wanted_prepared(&table);
        let for_nothing = table.all_formed();
        let more = self.topping_up && for_nothing && table.usable() > 0;
        if table.prepared.len() >= wanted + if more { PREPARE_MORE } else { 0 } {
            // What was prepared is listed next, all at once.
            return if std::mem::take(&mut self.topping_up) { Step::Progress } else { Step::Blocked };
        }
        self.topping_up = for_nothing;
        // First what costs nothing: on a full disk it may be all that there is.
        let formed = table.free.iter().rposition(|free| free.formed);
        let free = formed.or(table.free.len().checked_sub(1)).map(|at| table.free.remove(at));
        let (id, formed) = match free {
            Some(free) => (free.id, free.formed),
            None if shared.may_grow(&table) => {
                table.next_id += 1;
                (table.next_id - 1, false)
            }
            None => return Step::Blocked,
        };
        drop(table);
        // A key that was added meanwhile comes into use with the next segment. Nobody waits for the provider: no lock is held.
        if let Err(error) = shared.keyring.refresh() {
            tracing::warn!(%error, "the log goes on with the key that it has");
        }
        let path = shared.options.dir.join(segment_name(id));
        let file = match shared.options.fs.open(&path, OpenMode::Create) {
            Ok(file) => file,
            Err(source) => {
                let error = Error::io("make", path, source);
                if error.is_disk_full() {
                    self.disk_full(shared, shared.table(), now);
                } else {
                    shared.poison(error);
                }
                return Step::Progress;
            }
        };
        let ops =
            if formed { Default::default() } else { fill_ops(&file, shared.options.segment_bytes).into() };
        self.job = Some(Job { ops, ticket: None, goal: Goal::Prepare { id, file, grows: !formed } });
        self.step_job(shared, now)
    }

    fn finish_prepare(&mut self, shared: &Shared, id: u32, file: Arc<dyn File>, grows: bool) {
        let dir = &shared.options.dir;
        if !is_broken(Rule::NameSynced)
            && let Err(source) = shared.options.fs.sync_dir(dir)
        {
            shared.poison(Error::io("sync", dir, source));
            return;
        }
        let epoch = if is_broken(Rule::NewEpoch) { u128::from(id) } else { self.rng.next_u128() };
        let segment = Segment::new(id, epoch, dir.join(segment_name(id)), file);
        let mut table = shared.table();
        table.prepared.push_back(Arc::new(segment));
        // A file that was there before says nothing of the disk.
        let has_room = grows && disk_has_room(shared, &mut table);
        shared.update_room(&mut table);
        drop(table);
        if has_room {
            shared.emit(&WalEvent::SpaceBack);
        }
    }
}

/// Lets a manifest that grows grow by half as much again and some more, so that it does not need room when the disk is full.
fn slack(file: &Arc<dyn File>, needed: u64) -> Option<FileOp> {
    // What the file has is known well enough: without an answer it is written as it is.
    let len = file.len().ok()?;
    let more = round_up(needed as usize / 2, BLOCK) as u64 + SLACK_BYTES;
    (needed > len).then_some(FileOp::Zero { offset: needed, len: more })
}

/// Notes that the disk took something; whether that is news.
fn disk_has_room(shared: &Shared, table: &mut Table) -> bool {
    let news = std::mem::replace(&mut table.disk_full, false);
    shared.update_room(table);
    news
}

/// What fills a segment with written zeros: a block that was never written costs a journal commit at its first sync.
pub(crate) fn fill_ops(file: &Arc<dyn File>, segment_bytes: u64) -> Vec<(Arc<dyn File>, FileOp)> {
    let mut ops: Vec<(Arc<dyn File>, FileOp)> = vec![(file.clone(), FileOp::SetLen(segment_bytes))];
    for offset in (0..segment_bytes).step_by(FILL_BYTES as usize) {
        ops.push((file.clone(), FileOp::Zero { offset, len: FILL_BYTES.min(segment_bytes - offset) }));
    }
    if !is_broken(Rule::FilledBeforeListed) {
        ops.push((file.clone(), FileOp::Sync));
    }
    ops
}

/// Runs operations to their end, for when nobody else uses the log yet.
pub(crate) fn run(ops: Vec<(Arc<dyn File>, FileOp)>, path: &std::path::Path) -> Result<()> {
    for (file, op) in ops {
        file.submit(op).wait().map_err(|source| Error::io("write", path, source))?;
    }
    Ok(())
}
