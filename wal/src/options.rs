//! What a caller chooses when it opens a log.

use std::{
    fmt,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    Compression, Error, KeyProvider, Result,
    fs::{Fs, RealFs},
    rng::Rng,
};

/// The smallest segment.
pub const MIN_SEGMENT_BYTES: u64 = 256 << 10;
/// The largest segment.
pub const MAX_SEGMENT_BYTES: u64 = 1 << 30;

/// When a batch is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// After a sync: it survives a power cut.
    #[default]
    Sync,
    /// After the write: it survives the process, and a power cut only if the system wrote it in time. For tests and caches.
    System,
}

/// Who moves the log forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DriverMode {
    /// Threads of the log's own: as many writers as frames may be under way, and one for the background.
    #[default]
    Threads,
    /// The caller, by [`Wal::step`](crate::Wal::step). Deterministic by seed, clock and calls.
    Manual,
}

/// Time that only goes forward.
pub trait Clock: Send + Sync {
    /// Since some fixed origin.
    fn now(&self) -> Duration;
}

/// The system's monotonic clock.
#[derive(Debug, Clone, Copy)]
pub struct SystemClock(Instant);

impl Default for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "this is the clock")]
    fn default() -> Self {
        SystemClock(Instant::now())
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// How a log is opened. Fields may be changed after [`Options::new`].
#[derive(Clone)]
pub struct Options {
    /// Where the log lives. Made if it is missing or empty; its parent must exist. Not itself a mount point, since it is
    /// made under another name and renamed: use a directory below.
    pub dir: PathBuf,
    /// The file system.
    pub fs: Arc<dyn Fs>,
    /// Bytes per segment: a multiple of 4 KiB from 256 KiB to 1 GiB. An existing log keeps its own.
    pub segment_bytes: u64,
    /// When a batch is acknowledged.
    pub durability: Durability,
    /// Bytes of written frames kept in memory for readers; 0 keeps none.
    pub cache_bytes: usize,
    /// The most that segment files may take on disk, or no limit but the disk's. At least eight segments. The two manifests
    /// come on top, about 100 bytes per group each.
    pub size_limit_bytes: Option<u64>,
    /// The most that one group's entries may take in segments before [`Submitter::try_reserve`](crate::Submitter::try_reserve)
    /// refuses more, so that a group that is not truncated does not fill the log for the others. `None`: no such limit.
    pub group_quota_bytes: Option<u64>,
    /// Bytes per second that may be read and written to empty segments that are nearly dead, so that one group that keeps
    /// its entries does not keep those of all others on disk; 0 for none. When room gets tight there is no such limit.
    pub relocate_bytes_per_s: u64,
    /// Bytes that may wait for the disk before a reservation answers `Busy`.
    pub max_pending_bytes: u64,
    /// Bytes of one group's entries that may wait for the disk before a reservation for it answers `Busy`. Batches reach
    /// the disk in the order in which they were handed in, so this is what another group's batch may find before it on
    /// account of one group.
    pub max_pending_group_bytes: u64,
    /// The most bytes of batches that are gathered into one frame. A larger batch is a frame of its own.
    pub max_frame_bytes: u64,
    /// How large payloads are kept. Records that were written otherwise are read all the same.
    pub compression: Compression,
    /// Payloads of a record below this are never compressed.
    pub compress_above_bytes: usize,
    /// How many frames may be on their way to the disk at once, 1 to 16. They are acknowledged in order. Above 1 a frame
    /// need not wait for the one before; each costs the log a thread.
    pub write_depth: usize,
    /// How many threads carry out [`Wal::entries_async`](crate::Wal::entries_async), 1 to 64. They start when they are
    /// needed.
    pub read_threads: usize,
    /// Encrypts what is written from now on, and opens what was encrypted before; an encrypted log does not open without. A
    /// log that was not is read all the same: its segments stay as they are until they are collected. `None`: plain.
    pub keys: Option<Arc<dyn KeyProvider>>,
    /// Randomness for the store's id, incarnations and epochs, and thereby for the keys of an encrypted log: no two opens of
    /// a log may have the same. Production passes the system's.
    pub seed: u64,
    /// The clock.
    pub clock: Arc<dyn Clock>,
    /// Who moves the log forward.
    pub driver: DriverMode,
    /// How long nothing happens before a watermark proves the last frame durable.
    pub idle_watermark: Duration,
    /// Segments that ordinary batches leave to hard states, truncations, relocation and checkpoints, at most four. They are
    /// kept ready once the log is larger than a segment, since a disk that is found full has nothing but what was prepared
    /// before. With less than two a full disk may leave the log no way to free itself.
    pub reserve_segments: usize,
    /// How many unused segments are kept ready; at least one more than the reserve once the log is larger than a segment.
    pub prepared_segments: usize,
}

impl Options {
    /// Production's choices for this directory.
    #[expect(clippy::disallowed_methods, reason = "what is drawn here is the seed of everything else")]
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        let random = uuid::Uuid::new_v4().as_u128();
        Options {
            dir: dir.into(),
            fs: Arc::new(RealFs),
            segment_bytes: 64 << 20,
            durability: Durability::Sync,
            cache_bytes: 64 << 20,
            size_limit_bytes: None,
            group_quota_bytes: None,
            relocate_bytes_per_s: 64 << 20,
            max_pending_bytes: 256 << 20,
            max_pending_group_bytes: 16 << 20,
            max_frame_bytes: 1 << 20,
            compression: Compression::None,
            compress_above_bytes: 4 << 10,
            keys: None,
            write_depth: 2,
            read_threads: 4,
            seed: (random >> 64) as u64 ^ random as u64,
            clock: Arc::new(SystemClock::default()),
            driver: DriverMode::Threads,
            idle_watermark: Duration::from_millis(5),
            reserve_segments: 2,
            prepared_segments: 2,
        }
    }

    /// What epochs, incarnations and salts are drawn from. An encrypted log must never draw the same twice, so one that is in
    /// use does not rely on the caller's seed alone.
    pub(crate) fn rng(&self) -> Rng {
        let mut rng = Rng::new(self.seed);
        if self.keys.is_some() && self.driver == DriverMode::Threads {
            #[expect(
                clippy::disallowed_methods,
                reason = "a seed that came twice must not cost the secrecy of a log"
            )]
            let (high, low) = uuid::Uuid::new_v4().as_u64_pair();
            rng.mix(high);
            rng.mix(low);
        }
        rng
    }

    /// How many frames are under way at once. Writes that are not synced end when the system has copied them, one after
    /// the other whoever asks.
    pub(crate) fn depth(&self) -> usize {
        match self.durability {
            Durability::Sync => self.write_depth,
            Durability::System => 1,
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        let bad = |option, reason: String| Err(Error::BadOption { option, reason });
        if !(MIN_SEGMENT_BYTES..=MAX_SEGMENT_BYTES).contains(&self.segment_bytes)
            || !self.segment_bytes.is_multiple_of(4096)
        {
            return bad(
                "segment_bytes",
                format!("{} is not a multiple of 4 KiB from 256 KiB to 1 GiB", self.segment_bytes),
            );
        }
        if let Some(limit) = self.size_limit_bytes
            && limit < self.segment_bytes * 8
        {
            return bad("size_limit_bytes", format!("{limit} is less than eight segments"));
        }
        if self.reserve_segments > 4 {
            return bad("reserve_segments", format!("{} is more than four", self.reserve_segments));
        }
        self.compression.check()?;
        if !(1..=16).contains(&self.write_depth) {
            return bad("write_depth", format!("{} is not 1 to 16", self.write_depth));
        }
        if !(1..=64).contains(&self.read_threads) {
            return bad("read_threads", format!("{} is not 1 to 64", self.read_threads));
        }
        if self.dir.file_name().is_none() {
            return bad("dir", format!("{} has no name of its own", self.dir.display()));
        }
        Ok(())
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("dir", &self.dir)
            .field("segment_bytes", &self.segment_bytes)
            .field("durability", &self.durability)
            .field("cache_bytes", &self.cache_bytes)
            .field("size_limit_bytes", &self.size_limit_bytes)
            .field("encrypted", &self.keys.is_some())
            .field("driver", &self.driver)
            .finish_non_exhaustive()
    }
}
