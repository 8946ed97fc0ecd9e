//! Live traffic on the moving predicate: a paced writer that waits for nothing, and readers.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use pontoon_node::client::Client;
use tokio::{
    task::{JoinHandle, JoinSet},
    time::{Instant, MissedTickBehavior, interval, sleep},
};

use super::data::Chance;

/// The rows of live writes begin so; no statement's subject does.
pub(super) const LIVE: &str = "~live/";
const WRITE_EVERY: Duration = Duration::from_millis(1);
/// A write that is unanswered for so long, retries included, has failed.
const PATIENCE: Duration = Duration::from_secs(10);
const READERS: u64 = 2;
const READ_EVERY: Duration = Duration::from_millis(4);

/// What the traffic met.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// The numbers of the writes that were acknowledged.
    pub(super) acknowledged: Vec<u64>,
    pub(super) failed_writes: u64,
    pub(super) reads: u64,
    pub(super) failed_reads: u64,
    /// Reads that did not see a write which was acknowledged before they began.
    pub(super) stale_reads: u64,
    pub(super) first_failure: Option<String>,
}

/// The traffic while it runs.
pub(super) struct Traffic {
    shared: Arc<Shared>,
    writer: JoinHandle<()>,
    readers: Vec<JoinHandle<()>>,
}

struct Shared {
    client: Client,
    predicate: String,
    stop: AtomicBool,
    seen: Mutex<Seen>,
    gap: Mutex<Gap>,
    /// The newest acknowledged write, 0 for none.
    newest: AtomicU64,
}

/// The longest interval between acknowledgements since the clock was set.
struct Gap {
    last: Instant,
    longest: Duration,
}

/// The row of a live write.
pub(super) fn row(number: u64) -> (String, String) {
    (format!("{LIVE}{number:012}"), format!("live write {number}"))
}

const UNPOISONED: &str = "the lock's holders do not panic";

impl Traffic {
    pub(super) fn start(client: &Client, predicate: &str) -> Self {
        let shared = Arc::new(Shared {
            client: client.with_deadline(PATIENCE),
            predicate: predicate.to_owned(),
            stop: AtomicBool::new(false),
            seen: Mutex::default(),
            gap: Mutex::new(Gap { last: Instant::now(), longest: Duration::ZERO }),
            newest: AtomicU64::new(0),
        });
        let writer = tokio::spawn(write(shared.clone()));
        let readers = (0..READERS).map(|seed| tokio::spawn(read(shared.clone(), seed))).collect();
        Traffic { shared, writer, readers }
    }

    /// How many writes are acknowledged by now.
    pub(super) fn acknowledged(&self) -> usize {
        self.shared.seen.lock().expect(UNPOISONED).acknowledged.len()
    }

    /// Begins to measure the gap.
    pub(super) fn set_clock(&self) {
        *self.shared.gap.lock().expect(UNPOISONED) = Gap { last: Instant::now(), longest: Duration::ZERO };
    }

    /// The longest gap so far, with the one that is open.
    pub(super) fn longest_gap(&self) -> Duration {
        let gap = self.shared.gap.lock().expect(UNPOISONED);
        gap.longest.max(gap.last.elapsed())
    }

    /// Stops, and waits for the answers that are still out.
    pub(super) async fn stop(self) -> Seen {
        self.shared.stop.store(true, Ordering::Relaxed);
        for task in self.readers.into_iter().chain([self.writer]) {
            // A task that broke has left its part of the tally short: the verification says what is lost.
            if let Err(error) = task.await {
                let mut seen = self.shared.seen.lock().expect(UNPOISONED);
                seen.failed_writes += 1;
                seen.first_failure.get_or_insert(error.to_string());
            }
        }
        std::mem::take(&mut *self.shared.seen.lock().expect(UNPOISONED))
    }
}

async fn write(shared: Arc<Shared>) {
    let mut ticks = interval(WRITE_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut open = JoinSet::new();
    let mut number = 0;
    while !shared.stop.load(Ordering::Relaxed) {
        ticks.tick().await;
        number += 1;
        open.spawn(write_one(shared.clone(), number));
        while open.try_join_next().is_some() {}
    }
    while open.join_next().await.is_some() {}
}

async fn write_one(shared: Arc<Shared>, number: u64) {
    let (key, value) = row(number);
    let end = shared.client.put(&shared.predicate, key, value).await;
    if end.is_ok() {
        let mut gap = shared.gap.lock().expect(UNPOISONED);
        let now = Instant::now();
        gap.longest = gap.longest.max(now - gap.last);
        gap.last = now;
    }
    let mut seen = shared.seen.lock().expect(UNPOISONED);
    match end {
        Ok(_) => {
            seen.acknowledged.push(number);
            shared.newest.fetch_max(number, Ordering::Relaxed);
        }
        Err(error) => {
            seen.failed_writes += 1;
            seen.first_failure.get_or_insert_with(|| format!("write {number}: {error}"));
        }
    }
}

/// Reads acknowledged writes, mostly the newest, and looks whether they are there.
async fn read(shared: Arc<Shared>, seed: u64) {
    let mut chance = Chance(seed);
    while !shared.stop.load(Ordering::Relaxed) {
        sleep(READ_EVERY).await;
        let newest = shared.newest.load(Ordering::Relaxed);
        if newest == 0 {
            continue;
        }
        let known = {
            let seen = shared.seen.lock().expect(UNPOISONED);
            match chance.below(2) {
                0 => newest,
                _ => seen.acknowledged[chance.below(seen.acknowledged.len() as u64) as usize],
            }
        };
        let (key, value) = row(known);
        let end = shared.client.get(&shared.predicate, key).await;
        let mut seen = shared.seen.lock().expect(UNPOISONED);
        seen.reads += 1;
        match end {
            Ok(Some(row)) if row.value == value => {}
            Ok(_) => {
                seen.stale_reads += 1;
                seen.first_failure.get_or_insert_with(|| format!("a read did not see write {known}"));
            }
            Err(error) => {
                seen.failed_reads += 1;
                seen.first_failure.get_or_insert_with(|| format!("read of write {known}: {error}"));
            }
        }
    }
}
