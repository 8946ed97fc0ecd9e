//! How fast durable appends are, beside what the device does by itself.
//!
//! `cargo run --release -p pontoon-wal --example append_bench [DIR]` prints medians of interleaved rounds. The ideal is
//! a loop that overwrites 4 KiB of a file that holds zeros and calls fdatasync, with no index and no format.

#![expect(clippy::disallowed_methods, clippy::disallowed_types, reason = "it measures")]

use std::{
    error::Error as StdError,
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

use pontoon_wal::{Batch, Entry, Error, GroupId, Options, PersistSink, Persisted, Wal};

const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(1);

type Outcome<T> = Result<T, Box<dyn StdError + Send + Sync>>;

/// Overwrites and syncs 4 KiB, again and again: operations per second.
fn device(dir: &Path) -> Outcome<f64> {
    const BLOCK: usize = 4096;
    const BLOCKS: u64 = 4096;
    let path = dir.join("device");
    let file = File::options().create(true).truncate(false).read(true).write(true).open(&path)?;
    if file.metadata()?.len() == 0 {
        for block in 0..BLOCKS {
            file.write_all_at(&[0; BLOCK], block * BLOCK as u64)?;
        }
        file.sync_all()?;
    }
    let start = Instant::now();
    let mut done = 0;
    while start.elapsed() < ROUND {
        file.write_all_at(&[7; BLOCK], done % BLOCKS * BLOCK as u64)?;
        file.sync_data()?;
        done += 1;
    }
    Ok(done as f64 / start.elapsed().as_secs_f64())
}

fn batch(group: GroupId, index: u64, bytes: usize) -> Batch {
    let mut batch = Batch::new();
    batch.append(group, &[Entry { index, term: 1, kind: 0, data: vec![7; bytes].into() }]);
    batch
}

/// Threads that each wait for their own commits, a group each: commits per second.
fn blocking(wal: &Wal, first_group: u64, threads: u64, bytes: usize) -> Outcome<f64> {
    let start = Instant::now();
    let workers: Vec<_> = (0..threads)
        .map(|i| {
            let (wal, group) = (wal.clone(), GroupId(first_group + i));
            std::thread::spawn(move || -> Outcome<u64> {
                let mut index = 0;
                while start.elapsed() < ROUND {
                    index += 1;
                    wal.commit(batch(group, index, bytes))?;
                }
                Ok(index)
            })
        })
        .collect();
    let mut done = 0;
    for worker in workers {
        done += worker.join().map_err(|_| "a writer panicked")??;
    }
    Ok(done as f64 / start.elapsed().as_secs_f64())
}

#[derive(Default)]
struct Count {
    done: Mutex<u64>,
    more: Condvar,
}

impl PersistSink for Count {
    fn persisted(&self, done: &[Persisted]) {
        *self.done.lock().unwrap_or_else(PoisonError::into_inner) += done.len() as u64;
        self.more.notify_all();
    }

    fn failed(&self, error: &Error) {
        eprintln!("the log failed: {error}");
        std::process::exit(1);
    }
}

/// One thread with so many batches outstanding, over a thousand groups: batches per second.
fn outstanding(wal: &Wal, first_group: u64, depth: u64, bytes: usize) -> Outcome<f64> {
    const GROUPS: u64 = 1000;
    let count = Arc::new(Count::default());
    let door = wal.submitter(count.clone());
    let start = Instant::now();
    let mut sent = 0;
    let wait_for = |least: u64| {
        let mut done = count.done.lock().unwrap_or_else(PoisonError::into_inner);
        while *done < least {
            done = count.more.wait(done).unwrap_or_else(PoisonError::into_inner);
        }
    };
    while start.elapsed() < ROUND {
        let group = GroupId(first_group + sent % GROUPS);
        let batch = batch(group, sent / GROUPS + 1, bytes);
        let room = door.try_reserve(group, batch.size_bytes())?;
        door.submit(batch, room, sent)?;
        sent += 1;
        wait_for(sent.saturating_sub(depth));
    }
    wait_for(sent);
    Ok(sent as f64 / start.elapsed().as_secs_f64())
}

fn main() -> Outcome<()> {
    let parent: PathBuf = std::env::args_os().nth(1).map_or_else(|| ".".into(), Into::into);
    let dir = tempfile::tempdir_in(parent)?;
    let (wal, _) = Wal::open(Options::new(dir.path().join("log")))?;
    let bytes = 128;
    let names = ["device", "1 thread", "8 threads", "64 threads", "1 thread, 64 outstanding"];
    let mut rounds: Vec<Vec<f64>> = vec![Vec::new(); names.len()];
    let mut group = 0;
    for _ in 0..ROUNDS {
        rounds[0].push(device(dir.path())?);
        for (row, threads) in [(1, 1), (2, 8), (3, 64)] {
            rounds[row].push(blocking(&wal, group, threads, bytes)?);
            group += 10_000;
        }
        rounds[4].push(outstanding(&wal, group, 64, bytes)?);
        group += 10_000;
    }
    println!("{bytes} B entries, durable, medians of {ROUNDS} interleaved rounds");
    let mut device = 0.0;
    for (name, mut round) in names.into_iter().zip(rounds) {
        round.sort_by(f64::total_cmp);
        let (low, median, high) = (round[0], round[ROUNDS / 2], round[ROUNDS - 1]);
        if name == "device" {
            device = median;
        }
        println!(
            "{name:<26} {median:>9.0}/s   {:>5.2}x the device   ({low:.0} to {high:.0})",
            median / device
        );
    }
    wal.close()?;
    Ok(())
}
