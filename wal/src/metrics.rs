//! What an exporter may want to know of a log, counted as it happens.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// Buckets per doubling of the time.
const STEPS: u32 = 4;
/// The first bucket ends here.
const FIRST_NANOS: u64 = 1_000;
/// The last one has no end; the one before ends at about 64 s.
const BUCKETS: usize = (26 * STEPS + 1) as usize;

/// What a log has done since it was opened, and how it stands: copied at one moment by [`Wal::metrics`](crate::Wal::metrics).
/// Counters only rise.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    /// Batches that became durable.
    pub batches: u64,
    /// Their records.
    pub records: u64,
    /// Their bytes, as they were encoded.
    pub batch_bytes: u64,
    /// Frames that became durable, watermarks and opening frames included.
    pub frames: u64,
    /// Their bytes on disk.
    pub frame_bytes: u64,
    /// From the beginning of a frame's write until it and all before it are durable, of frames with records.
    pub frame_latency: Histogram,
    /// Batches that wait for a frame.
    pub queued_batches: usize,
    /// Their bytes.
    pub queued_bytes: usize,
    /// Frames under way.
    pub frames_under_way: usize,
    /// Times a write was under way for 100 ms, and then for a second.
    pub stalls: u64,
    /// Changes to another segment.
    pub rotations: u64,
    /// Times the writer found no segment that was ready.
    pub rotations_waited: u64,
    /// Checkpoints that became durable.
    pub checkpoints: u64,
    /// Records of entries that a reader found in the cache.
    pub cache_hits: u64,
    /// Those that it had to read.
    pub cache_misses: u64,
    /// Reads of files for readers, and their bytes.
    pub reads: u64,
    /// Bytes of those.
    pub read_bytes: u64,
    /// Reads that nobody waited for, by [`Wal::entries_async`](crate::Wal::entries_async).
    pub fetches: u64,
    /// How the log stands: segments by state, live, pending and cached bytes.
    pub usage: crate::Usage,
    /// Bytes of sealed segments that their live entries keep from being used again, and that are not those entries.
    pub pinned_bytes: u64,
}

impl Metrics {
    /// Batches per frame with records, or nothing before the first.
    pub fn merge_factor(&self) -> Option<f64> {
        let frames = self.frame_latency.count;
        (frames > 0).then(|| self.batches as f64 / frames as f64)
    }
}

/// How often something took how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Histogram {
    /// How many took at most `Histogram::bound(nth)` and more than the bound before; the last ones took longer than any
    /// bound.
    pub counts: Vec<u64>,
    /// How many there were.
    pub count: u64,
    /// How long they took together.
    pub sum: Duration,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram { counts: vec![0; BUCKETS], count: 0, sum: Duration::ZERO }
    }
}

impl Histogram {
    /// The upper bound of a bucket, within a fifth of what it holds; `None` for the last.
    pub fn bound(nth: usize) -> Option<Duration> {
        (nth + 1 < BUCKETS).then(|| Duration::from_nanos(bound_nanos(nth)))
    }

    /// The bound that this share of all (0 to 1) did not exceed; `None` if there were none, or it lies in the last bucket.
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        let wanted = (share.clamp(0.0, 1.0) * self.count as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        let nth = self.counts.iter().position(|count| {
            seen += count;
            seen >= wanted
        })?;
        Histogram::bound(nth)
    }
}

fn bound_nanos(nth: usize) -> u64 {
    let (doublings, step) = (nth as u32 / STEPS, nth as u64 % u64::from(STEPS));
    let base = FIRST_NANOS << doublings;
    base + base * step / u64::from(STEPS)
}

/// The bucket of a time.
fn bucket(time: Duration) -> usize {
    let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    if nanos <= FIRST_NANOS {
        return 0;
    }
    // The doubling whose bounds lie around it, then the step in it.
    let doublings = ((nanos - 1) / FIRST_NANOS).ilog2();
    let base = FIRST_NANOS << doublings;
    let step = ((nanos - base) * u64::from(STEPS)).div_ceil(base);
    ((doublings * STEPS) as usize + step as usize).min(BUCKETS - 1)
}

/// Counts times as they happen: two additions each, by any thread.
pub struct Times {
    counts: [AtomicU64; BUCKETS],
    sum_nanos: AtomicU64,
}

impl fmt::Debug for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Times").finish_non_exhaustive()
    }
}

impl Default for Times {
    fn default() -> Self {
        Times { counts: std::array::from_fn(|_| AtomicU64::new(0)), sum_nanos: AtomicU64::new(0) }
    }
}

impl Times {
    /// Counts one.
    pub fn note(&self, time: Duration) {
        add(&self.counts[bucket(time)], 1);
        add(&self.sum_nanos, u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    /// What was counted so far. Others may count meanwhile.
    pub fn copy(&self) -> Histogram {
        let counts: Vec<u64> = self.counts.iter().map(get).collect();
        Histogram { count: counts.iter().sum(), sum: Duration::from_nanos(get(&self.sum_nanos)), counts }
    }
}

/// The counters of one open log. They order nothing.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) batches: AtomicU64,
    pub(crate) records: AtomicU64,
    pub(crate) batch_bytes: AtomicU64,
    pub(crate) frames: AtomicU64,
    pub(crate) frame_bytes: AtomicU64,
    pub(crate) frame_times: Times,
    pub(crate) stalls: AtomicU64,
    pub(crate) rotations: AtomicU64,
    pub(crate) rotations_waited: AtomicU64,
    pub(crate) checkpoints: AtomicU64,
    pub(crate) cache_hits: AtomicU64,
    pub(crate) cache_misses: AtomicU64,
    pub(crate) reads: AtomicU64,
    pub(crate) read_bytes: AtomicU64,
    pub(crate) fetches: AtomicU64,
}

pub(crate) fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

impl Counters {
    /// What was counted; how the log stands is added by the caller.
    pub(crate) fn copy(&self) -> Metrics {
        Metrics {
            batches: get(&self.batches),
            records: get(&self.records),
            batch_bytes: get(&self.batch_bytes),
            frames: get(&self.frames),
            frame_bytes: get(&self.frame_bytes),
            frame_latency: self.frame_times.copy(),
            stalls: get(&self.stalls),
            rotations: get(&self.rotations),
            rotations_waited: get(&self.rotations_waited),
            checkpoints: get(&self.checkpoints),
            cache_hits: get(&self.cache_hits),
            cache_misses: get(&self.cache_misses),
            reads: get(&self.reads),
            read_bytes: get(&self.read_bytes),
            fetches: get(&self.fetches),
            ..Metrics::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_time_lies_below_its_bucket_s_bound_and_above_the_one_before() {
        for nth in 0..BUCKETS - 1 {
            let bound = Histogram::bound(nth).unwrap();
            assert_eq!(bucket(bound), nth, "{bound:?}");
            assert_eq!(bucket(bound + Duration::from_nanos(1)), nth + 1, "above {bound:?}");
        }
        assert_eq!(bucket(Duration::ZERO), 0);
        assert_eq!(bucket(Duration::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles_come_from_the_buckets() {
        let times = Times::default();
        assert_eq!(times.copy().quantile(0.5), None);
        (1..=100).for_each(|millis| times.note(Duration::from_millis(millis)));
        let histogram = times.copy();
        assert_eq!((histogram.count, histogram.sum), (100, Duration::from_millis(5_050)));
        for (share, millis) in [(0.5, 50), (0.99, 99), (0.0, 1)] {
            let (bound, time) = (histogram.quantile(share).unwrap(), Duration::from_millis(millis));
            assert!(bound >= time && bound <= time.mul_f64(1.25), "{share}: {bound:?}");
        }
    }
}
