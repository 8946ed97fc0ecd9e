//! The log's front.

use std::{
    collections::BTreeSet,
    ops::Range,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use pontoon_proto::GroupId;
use uuid::Uuid;

use crate::{
    Batch, DriverMode, Error, GcStats, GroupView, KeyId, Lsn, Metrics, Options, PersistSink, Pinned, RealFs,
    RecoveryReport, Result, ScrubReport, Storage, Submitter, Usage, WalReader, create,
    crypt::Keyring,
    driver::{self, Threads},
    fetch::{Fetch, Fetches},
    queue::{Ack, SinkSlot, Waiter},
    read::{self, Wait},
    recovery, scrub,
    shared::Shared,
    types::{Entry, HardState},
    writer::{Step, Stepper},
};

/// One durable log for many groups. Clones are cheap and share the log; the last one that is dropped closes it.
///
/// # Examples
///
/// ```
/// # fn main() -> pontoon_wal::Result<()> {
/// # let parent = tempfile::tempdir().unwrap();
/// # let dir = parent.path().join("log");
/// use pontoon_wal::{Batch, Entry, GroupId, Options, Wal};
///
/// # let mut options = Options::new(&dir);
/// # options.segment_bytes = 1 << 20;
/// let (wal, _report) = Wal::open(options)?;
/// let mut batch = Batch::new();
/// batch.append(GroupId(7), &[Entry { index: 1, term: 1, kind: 0, data: "hello".into() }]);
/// wal.commit(batch)?;
///
/// let mut entries = Vec::new();
/// wal.entries(GroupId(7), 1..2, u64::MAX, &mut entries)?;
/// assert_eq!(entries[0].data, "hello");
/// wal.close()
/// # }
/// ```
#[derive(Clone)]
pub struct Wal {
    handle: Arc<Handle>,
}

/// What the clones share besides the log: its threads.
struct Handle {
    shared: Arc<Shared>,
    threads: Mutex<Threads>,
}

impl Wal {
    /// Opens the log in a directory, which is made if it is missing, and locks it. Of an existing log nothing new
    /// is written before the first submit; frames that no sync is known to have made durable are written again as they stand.
    ///
    /// Damage does not keep the log from opening as long as it is known whom it hits: those groups are in the report and
    /// answer `Damaged`.
    ///
    /// # Errors
    /// [`Error::Locked`], [`Error::Foreign`], [`Error::NewerFormat`], [`Error::Corrupt`] (damage of which nobody knows whom
    /// it hits), [`Error::Io`], [`Error::BadOption`]; [`Error::Key`] if it is encrypted and a key is missing or wrong, which
    /// is found before anything is written; [`Error::KeySource`].
    pub fn open(mut options: Options) -> Result<(Wal, RecoveryReport)> {
        options.check()?;
        let keyring = Keyring::new(&options.dir, options.keys.clone())?;
        let (lock, loaded, created) = create::enter(&options, &keyring)?;
        let (mut parts, mut report) = recovery::recover(&mut options, keyring, loaded, false)?;
        report.created = created;
        parts.lock = Some(lock);
        let driver = options.driver;
        let shared = Arc::new(Shared::new(options, parts));
        let threads = match driver {
            DriverMode::Threads => Threads::start(&shared)?,
            DriverMode::Manual => Threads::default(),
        };
        Ok((Wal { handle: Arc::new(Handle { shared, threads: Mutex::new(threads) }) }, report))
    }

    /// Opens a log for looking only: no lock, no writes. For other file systems see [`WalReader::open`].
    ///
    /// # Errors
    /// As [`WalReader::open`].
    pub fn open_read_only(dir: &Path) -> Result<WalReader> {
        WalReader::open(Arc::new(RealFs), dir)
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.handle.shared
    }

    /// This open's random token. No other open of this log has it.
    pub fn incarnation(&self) -> u64 {
        self.shared().identity.incarnation
    }

    /// The store's id, drawn when the directory was made.
    pub fn store_id(&self) -> Uuid {
        Uuid::from_u128(self.shared().identity.store)
    }

    /// A door for one submitter, whose sink hears of its batches, of failures and events.
    pub fn submitter(&self, sink: Arc<dyn PersistSink>) -> Submitter {
        let slot = Arc::new(SinkSlot { sink });
        self.shared().queue().sinks.push(Arc::downgrade(&slot));
        Submitter { shared: self.handle.shared.clone(), slot }
    }

    /// Hands in a batch and blocks until it is durable. If nobody else writes at the moment, this thread does.
    ///
    /// # Errors
    /// As [`Submitter::try_reserve`] and [`Submitter::submit`]; [`Error::Stalled`] if the log is stepped by hand and the
    /// simulated disk holds an operation back.
    pub fn commit(&self, batch: Batch) -> Result<Lsn> {
        let shared = self.shared();
        let reservation = shared.space.try_reserve(batch.size_bytes())?;
        let waiter = Arc::new(Waiter::default());
        let (lsn, leads) = shared.submit(batch, reservation, Ack::Waiter(waiter.clone()))?;
        match shared.options.driver {
            DriverMode::Threads => driver::commit(shared, &waiter, leads)?,
            DriverMode::Manual => loop {
                if let Some(result) = waiter.poll() {
                    result?;
                    break;
                }
                if !self.step() {
                    return Err(self.why_stalled());
                }
            },
        }
        Ok(lsn)
    }

    fn why_stalled(&self) -> Error {
        match self.shared().table().disk_full {
            true => Error::NoSpace { needed_bytes: self.shared().options.segment_bytes },
            false => Error::Stalled,
        }
    }

    /// The largest batch by [`Batch::size_bytes`]: 16 MiB or a quarter of a segment; in an encrypted log 16 bytes less for each
    /// record.
    pub fn max_batch_bytes(&self) -> u64 {
        self.shared().max_batch_bytes()
    }

    /// What the log knows of a group. `None` if it does not exist. No I/O.
    pub fn group(&self, group: GroupId) -> Option<GroupView> {
        let tombstone = self.tombstone(group);
        self.shared().index.with(group, |state| state.view(tombstone))
    }

    /// The first and the last index of a group, if it exists: of [`Wal::group`] what is asked often, without the rest.
    pub fn bounds(&self, group: GroupId) -> Option<(u64, u64)> {
        self.shared().index.with(group, |state| (state.first_index(), state.last_index()))
    }

    /// The hard state of a group, if it exists; as [`Wal::bounds`].
    pub fn hard_state(&self, group: GroupId) -> Option<HardState> {
        self.shared().index.with(group, |state| state.hard_state)
    }

    /// Whether a group is damaged; as [`Wal::bounds`].
    pub fn is_damaged(&self, group: GroupId) -> bool {
        self.shared().index.with(group, |state| state.damage.is_some()).unwrap_or(false)
    }

    /// The term of an index. The truncated index still has its term; a group that does not exist has only index 0. No I/O.
    ///
    /// # Errors
    /// [`Error::Compacted`] below the truncated index, [`Error::Unavailable`] above the last, [`Error::Damaged`].
    pub fn term(&self, group: GroupId, index: u64) -> Result<u64> {
        let term = self.shared().index.with(group, |state| match &state.damage {
            Some(damage) => Err(Error::Damaged { group, damage: (**damage).clone() }),
            None => state.term(index),
        });
        term.unwrap_or(if index == 0 { Ok(0) } else { Err(Error::Unavailable { last: 0 }) })
    }

    /// Reads entries of `[low, high)` to the end of `out`: at least one if the range is not empty, then as many as
    /// `max_bytes` of payload allow.
    ///
    /// # Errors
    /// [`Error::Compacted`] or [`Error::Unavailable`] if a part of the range is not in the log, [`Error::Damaged`],
    /// [`Error::Corrupt`] if a record changed on disk (the group is damaged from then on), [`Error::Io`].
    pub fn entries(
        &self,
        group: GroupId,
        range: Range<u64>,
        max_bytes: u64,
        out: &mut Vec<Entry>,
    ) -> Result<()> {
        read::entries(self.shared(), group, range, max_bytes, Wait::Disk, out).map(drop)
    }

    /// As [`Wal::entries`], but never waits for the disk: `false`, and nothing read, if that would be needed. By then the
    /// system was asked for what is missing.
    ///
    /// # Errors
    /// As there.
    pub fn entries_now(
        &self,
        group: GroupId,
        range: Range<u64>,
        max_bytes: u64,
        out: &mut Vec<Entry>,
    ) -> Result<bool> {
        read::entries(self.shared(), group, range, max_bytes, Wait::Never, out)
    }

    /// As [`Wal::entries`], on a thread of the log's: what was read is told to `done`, which is called exactly once, with the
    /// state of the log at some moment after this call. It should hand over and return. With [`DriverMode::Manual`] a step
    /// does it.
    ///
    /// Reads queue without a bound of the log's own: a caller has few of them under way per group.
    ///
    /// # Errors
    /// [`Error::Closed`], [`Error::Io`] if no thread can be started; `done` is not called then. What the read itself meets is
    /// told to `done`.
    pub fn entries_async(
        &self,
        group: GroupId,
        range: Range<u64>,
        max_bytes: u64,
        done: impl FnOnce(Result<Vec<Entry>>) + Send + 'static,
    ) -> Result<()> {
        Fetches::submit(&self.handle.shared, Fetch { group, range, max_bytes, done: Box::new(done) })
    }

    /// A value of a group's metadata, from memory.
    pub fn meta(&self, group: GroupId, key: &[u8]) -> Option<Bytes> {
        self.shared().index.with(group, |state| state.meta_of(key))?
    }

    /// The minimum replica id that may ever exist again, if the group was destroyed here.
    pub fn tombstone(&self, group: GroupId) -> Option<u64> {
        self.shared().index.tombstone(group)
    }

    /// All groups that exist, ascending.
    pub fn groups(&self) -> Vec<GroupId> {
        self.shared().group_ids()
    }

    /// How much the log holds.
    pub fn usage(&self) -> Usage {
        self.shared().usage()
    }

    /// What the log has done since it was opened, for exporters.
    pub fn metrics(&self) -> Metrics {
        self.shared().metrics()
    }

    /// The `n` groups that hold the most bytes on disk, the largest first.
    pub fn pinned(&self, n: usize) -> Vec<Pinned> {
        self.shared().pinned(n)
    }

    /// Writes checkpoints until no dead segment is left that could be freed. Does nothing before the first submit.
    ///
    /// # Errors
    /// [`Error::Poisoned`], [`Error::Closed`].
    pub fn gc_once(&self) -> Result<GcStats> {
        let shared = self.shared();
        if !shared.table().started {
            return shared.queue().check_open().map(|()| GcStats::default());
        }
        {
            let mut background = shared.background();
            background.stats = GcStats::default();
            background.gc_wanted = true;
        }
        shared.wake_background();
        let mut stalled = false;
        loop {
            shared.queue().check_open()?;
            let (done, stats) = {
                let background = shared.background();
                (!background.gc_wanted, background.stats)
            };
            if done {
                return Ok(stats);
            }
            match shared.options.driver {
                DriverMode::Manual if stalled => return Err(Error::Stalled),
                // The step that finds nothing more to do may be the one that ends the collection.
                DriverMode::Manual => stalled = !self.step(),
                DriverMode::Threads => shared.await_background(),
            }
        }
    }

    /// Bytes that a group's entries take in segments, from memory; 0 for a group that is not here.
    pub fn log_bytes(&self, group: GroupId) -> u64 {
        self.shared().index.with(group, |state| state.disk_bytes().0).unwrap_or(0)
    }

    /// Reads every sealed segment and checks it, while the log serves. Blocks for as long as that takes; a second call
    /// checks again. Groups that lost something are damaged from here on; the others are not touched.
    ///
    /// # Errors
    /// Those of the file system: a segment that cannot be read is no damage that is known.
    pub fn scrub(&self) -> Result<ScrubReport> {
        scrub::scrub(self.shared())
    }

    /// Forbids or allows new segment files, for a caller who sees the disk fill up. While forbidden, the log lives on the
    /// files that it has: it reuses what is dead, and answers [`Error::NoSpace`] when that is not enough.
    pub fn hold_growth(&self, held: bool) {
        let shared = self.shared();
        let mut table = shared.table();
        table.held = held;
        shared.update_room(&mut table);
        drop(table);
        shared.wake_background();
    }

    /// Asks the provider of keys which key is the current one, without waiting for the log to do so. That key is used for the
    /// next manifest and the next segment; what is written already stays as it is until it is collected. `None` in a log that
    /// is not encrypted.
    ///
    /// # Errors
    /// [`Error::KeySource`]; the log goes on with the key that it has.
    pub fn rotate_key(&self) -> Result<Option<KeyId>> {
        self.shared().keyring.refresh()
    }

    /// The keys without which the log could not be opened now, or not after the loss of either manifest, and the one that it
    /// writes with; empty in a log that is not encrypted. A key that is not among them may be removed from the provider.
    pub fn key_ids_in_use(&self) -> BTreeSet<KeyId> {
        let mut ids = self.shared().key_ids_on_disk();
        ids.extend(self.shared().keyring.current_id());
        ids
    }

    /// Writes what was submitted and a watermark, ends the threads and lets the directory go. Other clones and submitters
    /// answer [`Error::Closed`] afterwards; readers may go on.
    ///
    /// # Errors
    /// [`Error::Poisoned`] if the log failed before or fails now, [`Error::NoSpace`] if what was submitted found no room,
    /// [`Error::Stalled`] as for [`Wal::commit`].
    pub fn close(self) -> Result<()> {
        self.handle.close()
    }

    /// With [`DriverMode::Manual`]: moves writer and background one step over what the clock and the file system say;
    /// whether anything happened.
    pub fn step(&self) -> bool {
        self.handle.step()
    }

    /// The view of one group in the shape that single-group logs have.
    pub fn storage(&self, group: GroupId) -> Storage {
        Storage { wal: self.clone(), group }
    }
}

impl Handle {
    fn step(&self) -> bool {
        let shared = &*self.shared;
        let wrote = match driver::step(shared, Stepper::Driver) {
            Step::Progress => true,
            Step::Write(job) => {
                job.begin().advance();
                true
            }
            Step::Tell(news) => {
                news.tell(shared);
                shared.writer().told();
                true
            }
            Step::Io(_) | Step::Timer(_) | Step::Blocked => false,
        };
        let step = shared.background().step(shared, shared.options.clock.now());
        let worked = match step {
            Step::Progress => true,
            Step::Io(ticket) => ticket.advance(),
            Step::Write(_) | Step::Tell(_) | Step::Timer(_) | Step::Blocked => false,
        };
        Fetches::step(shared) || wrote || worked
    }

    fn close(&self) -> Result<()> {
        let shared = &*self.shared;
        {
            let mut queue = shared.queue();
            queue.closed = true;
            queue.flush = true;
        }
        Fetches::stop(shared);
        match shared.options.driver {
            DriverMode::Threads => self.threads.lock().unwrap_or_else(PoisonError::into_inner).stop(shared),
            DriverMode::Manual => while self.step() {},
        }
        let cause = shared.poison_cause();
        let left = !shared.queue().batches.is_empty();
        let quiet = shared.writer().is_quiet();
        shared.lock.lock().unwrap_or_else(PoisonError::into_inner).take();
        match cause {
            Some(cause) => Err(Error::Poisoned { cause }),
            None if left => {
                let error = Error::NoSpace { needed_bytes: shared.options.segment_bytes };
                shared.poison(error.clone());
                self.step();
                Err(error)
            }
            None if !quiet => Err(Error::Stalled),
            None => Ok(()),
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if self.shared.options.driver == DriverMode::Manual {
            // Whoever steps the log decides what still happens; a simulated crash wants nothing more.
            Fetches::stop(&self.shared);
            self.shared.queue().closed = true;
            self.shared.lock.lock().unwrap_or_else(PoisonError::into_inner).take();
        } else if let Err(error) = self.close() {
            tracing::warn!(%error, "the log was dropped and did not close cleanly");
        }
    }
}

impl std::fmt::Debug for Wal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Wal").field("dir", &self.shared().options.dir).finish_non_exhaustive()
    }
}
