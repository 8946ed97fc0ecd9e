//! What clients wait for when they write here: a histogram per window, so that copies can give way.
//!
//! Recording is one addition to a counter. A task sums the windows of the last second and judges them
//! ([`pontoon_raftstore::Foreground`]). It turns the meter of groups over, too.

use std::{
    array::from_fn,
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use pontoon_raftstore::Foreground;
use tokio::time::{MissedTickBehavior, interval};

use crate::{clock::unix_ms, shared::Shared};

/// How often what was recorded is looked at.
pub(crate) const WINDOW: Duration = Duration::from_millis(250);
/// The windows that are judged together.
const WINDOWS: usize = 4;
/// With fewer writes nothing is said of the slowest hundredth.
const ENOUGH: u64 = 50;
/// Buckets within a factor of two: neighbours differ by a sixteenth at most.
const FINE: usize = 16;
/// The largest time told apart is 2^27 µs, over two minutes.
const BUCKETS: usize = FINE * 24;

/// Counters of writes by the time that they took.
pub(crate) struct Latencies {
    counts: Box<[AtomicU32; BUCKETS]>,
    judge: Mutex<Foreground>,
}

impl Default for Latencies {
    fn default() -> Self {
        Latencies { counts: Box::new(from_fn(|_| AtomicU32::new(0))), judge: Mutex::default() }
    }
}

fn bucket(micros: u64) -> usize {
    let micros = micros.max(1);
    let octave = micros.ilog2() as usize;
    if octave < 4 {
        return micros as usize;
    }
    let fine = (micros >> (octave - 4)) as usize & (FINE - 1);
    (FINE * (octave - 3) + fine).min(BUCKETS - 1)
}

/// The largest time of a bucket.
fn value(bucket: usize) -> Duration {
    let micros = match bucket / FINE {
        0 => bucket as u64,
        octave => (((FINE + bucket % FINE + 1) as u64) << (octave - 1)) - 1,
    };
    Duration::from_micros(micros)
}

fn p99(windows: &VecDeque<Vec<u32>>) -> Option<Duration> {
    let sum = |bucket: usize| windows.iter().map(|counts| u64::from(counts[bucket])).sum::<u64>();
    let all: u64 = (0..BUCKETS).map(sum).sum();
    if all < ENOUGH {
        return None;
    }
    let mut slower = 0;
    for bucket in (0..BUCKETS).rev() {
        slower += sum(bucket);
        if slower * 100 >= all {
            return Some(value(bucket));
        }
    }
    None
}

impl Latencies {
    /// A write led here was answered after so long.
    pub(crate) fn note(&self, took: Duration) {
        self.counts[bucket(took.as_micros() as u64)].fetch_add(1, Ordering::Relaxed);
    }

    fn take(&self) -> Vec<u32> {
        self.counts.iter().map(|count| count.swap(0, Ordering::Relaxed)).collect()
    }

    /// The p99 of the last second, and what it is without copies; `None` where too few write.
    pub(crate) fn seen(&self) -> (Option<Duration>, Option<Duration>) {
        let judge = self.judge.lock().unwrap_or_else(PoisonError::into_inner);
        (judge.p99(), judge.level())
    }

    fn judge(&self, now: Duration, windows: &VecDeque<Vec<u32>>, copies: bool) -> bool {
        self.judge.lock().unwrap_or_else(PoisonError::into_inner).window(now, p99(windows), copies)
    }
}

/// Tells the runtime whenever clients here begin to suffer from copies, or cease to. Ends with the node.
pub(crate) async fn watch_foreground(shared: Arc<Shared>) {
    let mut windows: VecDeque<Vec<u32>> = VecDeque::new();
    let (mut strained, mut turns) = (false, 0_usize);
    let mut ticks = interval(WINDOW);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut stop = shared.stop.subscribe();
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
        turns += 1;
        if turns.is_multiple_of(WINDOWS) {
            shared.meter.turn(unix_ms() / 1_000);
        }
        windows.push_back(shared.foreground.take());
        if windows.len() > WINDOWS {
            windows.pop_front();
        }
        let copies = shared.raft.copies() || shared.backups.active() > 0;
        let now = shared.foreground.judge(shared.started.elapsed(), &windows, copies);
        shared.backups.tick(now);
        if std::mem::replace(&mut strained, now) != now {
            shared.raft.set_strained(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_holds_times_that_are_alike() {
        let mut last = 0;
        for micros in (1..5_000).chain([70_000, 1 << 20, (1 << 27) - 1]) {
            let (at, micros) = (bucket(micros), Duration::from_micros(micros));
            assert!(at >= last && at < BUCKETS, "{micros:?}");
            assert!(value(at) >= micros && value(at) <= micros + micros / 8, "{micros:?} in {:?}", value(at));
            last = at;
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn of_a_hundred_writes_the_slowest_decides_and_few_decide_nothing() {
        let latencies = Latencies::default();
        (0..49).for_each(|_| latencies.note(Duration::from_millis(1)));
        let mut windows = VecDeque::from([latencies.take()]);
        assert_eq!(p99(&windows), None);
        (0..50).for_each(|_| latencies.note(Duration::from_millis(1)));
        latencies.note(Duration::from_millis(80));
        windows.push_back(latencies.take());
        let found = p99(&windows).unwrap();
        assert!((Duration::from_millis(80)..Duration::from_millis(90)).contains(&found), "{found:?}");
        windows.push_back({
            (0..100).for_each(|_| latencies.note(Duration::from_millis(1)));
            latencies.take()
        });
        assert!(p99(&windows).unwrap() < Duration::from_millis(2), "one of two hundred");
    }
}
