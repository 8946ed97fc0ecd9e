//! Writers and readers that know what must be true.
//!
//! Each writer owns the rows under its name. In each round it puts a row, sometimes deletes an older one, and raises a
//! counter by compare-and-set from the value before. A write that was applied twice would find its counter raised
//! already; one that was lost would leave it behind. Readers hold the store to linearizability: a counter read is at
//! least what was acknowledged before the read began.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use pontoon_node::client::{Client, Expect, Range, put};
use tokio::{sync::watch, task::JoinSet};

use crate::cluster::within;

/// What a predicate must hold, key by key.
pub type Rows = BTreeMap<Bytes, Bytes>;

/// Every seventh round deletes the row of three rounds before.
const DELETES: u64 = 7;

/// How long a call may take. What is judged here is what was acknowledged, not how soon: a disk under a test stands still for seconds at times.
const DEADLINE: Duration = Duration::from_secs(40);

/// Writers at work. Stop them with [`Traffic::stop`]; dropping them abandons them.
#[derive(Debug)]
pub struct Traffic {
    stop: Arc<AtomicBool>,
    acknowledged: watch::Receiver<u64>,
    writers: JoinSet<Result<Rows, String>>,
    readers: JoinSet<Result<(), String>>,
}

impl Traffic {
    /// Starts writers of one predicate, and a reader for each.
    pub fn start(client: &Client, predicate: &str, writers: usize) -> Traffic {
        let client = client.with_deadline(DEADLINE);
        let stop = Arc::new(AtomicBool::new(false));
        let (count, acknowledged) = watch::channel(0);
        let count = Arc::new(count);
        let mut traffic =
            Traffic { stop: stop.clone(), acknowledged, writers: JoinSet::new(), readers: JoinSet::new() };
        for name in 0..writers {
            let (floor, least) = watch::channel(0);
            let writer = Writer {
                client: client.clone(),
                predicate: predicate.to_owned(),
                name: format!("w{name}"),
                stop: stop.clone(),
                count: count.clone(),
                floor,
            };
            traffic.readers.spawn(read(
                client.clone(),
                predicate.to_owned(),
                writer.counter(),
                least,
                stop.clone(),
            ));
            traffic.writers.spawn(writer.run());
        }
        traffic
    }

    /// Waits until so many more rounds were acknowledged: the predicate serves.
    pub async fn acknowledged(&mut self, more: u64) {
        let wanted = *self.acknowledged.borrow() + more;
        let enough = self.acknowledged.wait_for(|&count| count >= wanted);
        // An error says that all writers have ended; what ended them is told by `stop`.
        drop(within("writes to be acknowledged", enough).await);
    }

    /// Stops and returns what the predicate must hold now.
    ///
    /// # Panics
    /// If a write or a read failed, or was answered wrongly.
    pub async fn stop(mut self) -> Rows {
        self.stop.store(true, Ordering::Relaxed);
        let mut rows = Rows::new();
        let mut failures = Vec::new();
        while let Some(ended) = within("the writers to end", self.writers.join_next()).await {
            match ended.expect("a writer does not panic") {
                Ok(written) => rows.extend(written),
                Err(failure) => failures.push(failure),
            }
        }
        while let Some(ended) = within("the readers to end", self.readers.join_next()).await {
            failures.extend(ended.expect("a reader does not panic").err());
        }
        assert!(failures.is_empty(), "{}", failures.join("\n"));
        rows
    }
}

struct Writer {
    client: Client,
    predicate: String,
    name: String,
    stop: Arc<AtomicBool>,
    count: Arc<watch::Sender<u64>>,
    floor: watch::Sender<u64>,
}

impl Writer {
    fn counter(&self) -> String {
        format!("{}/counter", self.name)
    }

    async fn run(self) -> Result<Rows, String> {
        let mut rows = Rows::new();
        let mut round = 0;
        while !self.stop.load(Ordering::Relaxed) {
            round += 1;
            self.round(round, &mut rows).await.map_err(|reason| {
                format!("{} failed in round {round} of {}: {reason}", self.name, self.predicate)
            })?;
            self.floor.send_replace(round);
            self.count.send_modify(|count| *count += 1);
        }
        Ok(rows)
    }

    async fn round(&self, round: u64, rows: &mut Rows) -> Result<(), String> {
        let (client, predicate) = (&self.client, self.predicate.as_str());
        let key = |round: u64| Bytes::from(format!("{}/{round:06}", self.name));
        let value = Bytes::from(format!("round {round}"));
        client.put(predicate, key(round), value.clone()).await.map_err(|error| error.to_string())?;
        rows.insert(key(round), value);

        if round.is_multiple_of(DELETES) {
            client.delete(predicate, key(round - 3)).await.map_err(|error| error.to_string())?;
            rows.remove(&key(round - 3));
        }

        let expect = match round {
            1 => Expect::Absent,
            _ => Expect::Value((round - 1).to_string().into()),
        };
        let (counter, value) = (Bytes::from(self.counter()), Bytes::from(round.to_string()));
        let raised = client
            .cas(predicate, counter.clone(), expect, Some(value.clone()))
            .await
            .map_err(|error| error.to_string())?;
        if !raised.applied {
            return Err(format!("the counter was not {} any more: {:?}", round - 1, raised.results));
        }
        rows.insert(counter, value);
        Ok(())
    }
}

async fn read(
    client: Client,
    predicate: String,
    counter: String,
    mut floor: watch::Receiver<u64>,
    stop: Arc<AtomicBool>,
) -> Result<(), String> {
    // Before the first round the predicate may not exist. A writer that ends without one leaves nothing to read.
    if floor.wait_for(|&floor| floor > 0).await.is_err() {
        return Ok(());
    }
    while !stop.load(Ordering::Relaxed) {
        let least = *floor.borrow();
        let row =
            client.get(&predicate, counter.clone()).await.map_err(|error| format!("a read: {error}"))?;
        let seen = row.and_then(|row| std::str::from_utf8(&row.value).ok()?.parse::<u64>().ok());
        if seen.is_none_or(|seen| seen < least) {
            return Err(format!(
                "{counter} of {predicate} was read as {seen:?} after {least} was acknowledged"
            ));
        }
    }
    Ok(())
}

/// Writes rows in batches and returns them: something for a snapshot to carry.
///
/// # Panics
/// If a write fails.
pub async fn fill(client: &Client, predicate: &str, count: usize, value_bytes: usize) -> Rows {
    let rows: Rows = (0..count)
        .map(|at| {
            let mut value = format!("{at} ").into_bytes();
            value.resize(value_bytes, b'.');
            (Bytes::from(format!("fill/{at:07}")), Bytes::from(value))
        })
        .collect();
    let all: Vec<(&Bytes, &Bytes)> = rows.iter().collect();
    for part in all.chunks(2_000) {
        let batches = part.chunks(100).map(|rows| {
            let ops = rows.iter().map(|&(key, value)| put(key.clone(), value.clone())).collect();
            (predicate.to_owned(), ops)
        });
        for outcome in within("a fill", client.write_many(batches.collect())).await {
            outcome.expect("a write of the fill is acknowledged");
        }
    }
    rows
}

/// Everything that a predicate holds.
///
/// # Panics
/// If a read fails.
pub async fn read_all(client: &Client, predicate: &str) -> Rows {
    let mut rows = Rows::new();
    let mut range = Range { limit: 5_000, ..Range::default() };
    loop {
        let page = within("a page", client.scan(predicate, &range)).await.expect("a page can be read");
        rows.extend(page.rows.into_iter().map(|row| (row.key, row.value)));
        if page.continuation.is_empty() {
            return rows;
        }
        range.continuation = page.continuation;
    }
}

/// Compares all that a predicate holds with what it must hold.
///
/// # Panics
/// If they differ, naming the first rows that do.
pub async fn verify(client: &Client, predicate: &str, expected: &Rows) {
    let found = read_all(client, predicate).await;
    if &found == expected {
        return;
    }
    let lost = expected.iter().filter(|(key, value)| found.get(*key) != Some(value));
    let strange = found.iter().filter(|(key, _)| !expected.contains_key(*key));
    panic!(
        "{predicate} holds {} rows, not {}; lost or wrong: {:?}; nobody wrote: {:?}",
        found.len(),
        expected.len(),
        lost.take(5).collect::<Vec<_>>(),
        strange.take(5).collect::<Vec<_>>(),
    );
}
