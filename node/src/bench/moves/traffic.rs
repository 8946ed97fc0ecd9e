//! Writes that are due at a time, whatever became of those before them.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use pontoon_node::client::Client;
use tokio::{
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep_until},
};

use crate::cli::Failure;

const EVERY: Duration = Duration::from_millis(1);
/// A write that is unanswered for so long, retries included, has failed.
const PATIENCE: Duration = Duration::from_secs(10);
/// Rows are written again and again, so that a long run does not grow what it measures.
const ROWS: u64 = 4_096;
const VALUE_BYTES: usize = 128;
/// Clients of the short run that finds out how much the cluster takes.
const SATURATING: u64 = 64;

/// A stretch of time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Window {
    pub(super) from: Instant,
    pub(super) to: Instant,
}

impl Window {
    pub(super) fn seconds(&self) -> f64 {
        self.to.saturating_duration_since(self.from).as_secs_f64()
    }
}

/// An answered write: when it was due, since the traffic began, and how long that was before its answer.
#[derive(Debug, Clone, Copy)]
struct Sample {
    due_us: u64,
    latency_us: u32,
}

/// The traffic while it flows.
pub(super) struct Traffic {
    shared: Arc<Shared>,
    tasks: Vec<JoinHandle<()>>,
}

struct Shared {
    client: Client,
    begun: Instant,
    stop: AtomicBool,
    paced: Mutex<Vec<Sample>>,
    /// Those of a write each millisecond to the predicate that moves.
    steady: Mutex<Vec<Sample>>,
    failed: AtomicU64,
    first_failure: Mutex<Option<String>>,
}

/// What the traffic met. Latencies in milliseconds, by the time at which a write was due.
pub(super) struct Seen {
    begun: Instant,
    paced: Vec<Sample>,
    steady: Vec<Sample>,
    pub(super) failed: u64,
    pub(super) first_failure: Option<String>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Traffic {
    /// `rate` writes per second over `predicates`, and one each millisecond to `moving`.
    pub(super) fn start(client: &Client, predicates: &[String], moving: &str, rate: u32) -> Traffic {
        let shared = Arc::new(Shared {
            client: client.with_deadline(PATIENCE),
            begun: Instant::now(),
            stop: AtomicBool::new(false),
            paced: Mutex::default(),
            steady: Mutex::default(),
            failed: AtomicU64::new(0),
            first_failure: Mutex::default(),
        });
        let predicates: Arc<[String]> = predicates.into();
        let moving: Arc<[String]> = [moving.to_owned()].into();
        let tasks = vec![
            tokio::spawn(pace(shared.clone(), predicates, rate, |shared| &shared.paced)),
            tokio::spawn(pace(shared.clone(), moving, 1_000, |shared| &shared.steady)),
        ];
        Traffic { shared, tasks }
    }

    /// Stops, and waits for the answers that are still out.
    pub(super) async fn stop(self) -> Result<Seen, Failure> {
        self.shared.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.map_err(|error| Failure::error(format!("the traffic broke: {error}")))?;
        }
        let take = |samples: &Mutex<Vec<Sample>>| std::mem::take(&mut *lock(samples));
        Ok(Seen {
            begun: self.shared.begun,
            paced: take(&self.shared.paced),
            steady: take(&self.shared.steady),
            failed: self.shared.failed.load(Ordering::Relaxed),
            first_failure: lock(&self.shared.first_failure).clone(),
        })
    }
}

async fn pace(
    shared: Arc<Shared>,
    predicates: Arc<[String]>,
    rate: u32,
    samples: fn(&Shared) -> &Mutex<Vec<Sample>>,
) {
    let (mut due, mut number, mut owed) = (Instant::now(), 0_u64, 0_u64);
    let mut open = JoinSet::new();
    while !shared.stop.load(Ordering::Relaxed) {
        due += EVERY;
        sleep_until(due).await;
        owed += u64::from(rate);
        while owed >= 1_000 {
            owed -= 1_000;
            number += 1;
            open.spawn(one(shared.clone(), predicates.clone(), number, due, samples));
        }
        while open.try_join_next().is_some() {}
    }
    while open.join_next().await.is_some() {}
}

async fn one(
    shared: Arc<Shared>,
    predicates: Arc<[String]>,
    number: u64,
    due: Instant,
    samples: fn(&Shared) -> &Mutex<Vec<Sample>>,
) {
    let predicate = &predicates[(number % predicates.len() as u64) as usize];
    match shared.client.put(predicate, row(number), Bytes::from_static(&[b'v'; VALUE_BYTES])).await {
        Ok(_) => {
            let latency_us = u32::try_from(due.elapsed().as_micros()).unwrap_or(u32::MAX);
            let due_us = (due - shared.begun).as_micros() as u64;
            lock(samples(&shared)).push(Sample { due_us, latency_us });
        }
        Err(error) => {
            shared.failed.fetch_add(1, Ordering::Relaxed);
            lock(&shared.first_failure).get_or_insert_with(|| format!("{predicate}: {error}"));
        }
    }
}

/// Keys of the traffic begin so; no row of the predicate that moves does.
fn row(number: u64) -> String {
    format!("~traffic/{:06}", number % ROWS)
}

/// How many writes per second the cluster answers when clients wait for nothing but their answers.
pub(super) async fn saturation(
    client: &Client,
    predicates: &[String],
    how_long: Duration,
) -> Result<f64, Failure> {
    let until = Instant::now() + how_long;
    let predicates: Arc<[String]> = predicates.into();
    let begun = Instant::now();
    let writers = (0..SATURATING).map(|writer| {
        let (client, predicates) = (client.clone(), predicates.clone());
        tokio::spawn(async move {
            let mut done = 0_u64;
            while Instant::now() < until {
                let number = writer + done * SATURATING;
                let predicate = &predicates[(number % predicates.len() as u64) as usize];
                client.put(predicate, row(number), Bytes::from_static(&[b'v'; VALUE_BYTES])).await?;
                done += 1;
            }
            Ok::<_, pontoon_node::client::ClientError>(done)
        })
    });
    let mut all = 0;
    for writer in writers.collect::<Vec<_>>() {
        all += writer.await.map_err(|error| Failure::error(format!("a writer broke: {error}")))??;
    }
    Ok(all as f64 / begun.elapsed().as_secs_f64())
}

impl Seen {
    /// All latencies of the paced writes that were due in these windows, ascending.
    pub(super) fn paced(&self, windows: &[Window]) -> Vec<f64> {
        self.within(&self.paced, windows)
    }

    /// The longest that a write to the moving predicate waited that was due in this window.
    pub(super) fn gap(&self, window: Window) -> Option<f64> {
        self.within(&self.steady, &[window]).last().copied()
    }

    fn within(&self, samples: &[Sample], windows: &[Window]) -> Vec<f64> {
        let since = |at: Instant| at.saturating_duration_since(self.begun).as_micros() as u64;
        let windows: Vec<_> = windows.iter().map(|window| since(window.from)..since(window.to)).collect();
        let inside = |sample: &&Sample| windows.iter().any(|window| window.contains(&sample.due_us));
        let mut found: Vec<f64> =
            samples.iter().filter(inside).map(|sample| f64::from(sample.latency_us) / 1_000.0).collect();
        found.sort_by(f64::total_cmp);
        found
    }
}

/// The smallest value that such a share of the ascending values does not exceed.
pub(super) fn quantile(ascending: &[f64], share: f64) -> Option<f64> {
    let at = (ascending.len() as f64 * share).ceil() as usize;
    ascending.get(at.saturating_sub(1)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_were_there() {
        let all: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(
            [0.0, 0.5, 0.99, 1.0].map(|share| quantile(&all, share)),
            [Some(1.0), Some(50.0), Some(99.0), Some(100.0)]
        );
        assert_eq!(quantile(&[3.0], 0.99), Some(3.0));
        assert_eq!(quantile(&[], 0.5), None);
    }

    #[tokio::test]
    async fn a_write_belongs_to_the_window_in_which_it_was_due() {
        let begun = Instant::now();
        let sample = |due_us, latency_us| Sample { due_us, latency_us };
        let seen = Seen {
            begun,
            paced: vec![sample(10, 1_000), sample(1_999, 9_000), sample(2_000, 2_000), sample(2_500, 4_000)],
            steady: vec![sample(2_100, 7_000), sample(5_000, 80_000)],
            failed: 0,
            first_failure: None,
        };
        let at = |us| begun + Duration::from_micros(us);
        let window = Window { from: at(2_000), to: at(3_000) };
        assert_eq!(seen.paced(&[window]), [2.0, 4.0]);
        assert_eq!(seen.paced(&[Window { from: at(0), to: at(1_000) }, window]), [1.0, 2.0, 4.0]);
        assert_eq!(seen.gap(window), Some(7.0));
        assert_eq!(seen.gap(Window { from: at(3_000), to: at(4_000) }), None);
    }
}
