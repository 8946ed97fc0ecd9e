//! One engine in a process of its own, so that processor time and memory are its alone. It runs a round for every line on
//! its standard input and answers each with a line of figures.

use std::{
    io::{BufRead, Write},
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    engine::{self, Engine},
    measure::{Figures, Meter, chill, disk_mb, histogram, rss_mb},
    ours::Ours,
    work::{Case, Kind, Outcome, Scene, Turn},
};

/// Entries of the log that is opened again, read from or collected.
const FILLED: u64 = 1_000_000;
/// Ranges that are read.
const READS: u64 = 4_000;
const DEPTH: u64 = 64;

pub(crate) fn run(kind: Kind, case: Case, dir: &Path) -> Outcome<()> {
    let mut round: Box<dyn FnMut(Duration) -> Outcome<Figures>> = match case.scene {
        Scene::Append => {
            let engine = engine::open(kind, &case, dir)?;
            let mut turns: Vec<Turn> = (0..case.submitters).map(|nth| Turn::new(&case, nth)).collect();
            Box::new(move |time| append(&*engine, &case, dir, &mut turns, time))
        }
        Scene::Outstanding if kind.is_ours() => {
            let ours = Ours::open(kind, dir, &case, true)?.with_door();
            let mut turn = Turn::new(&case, 0);
            let mut sent = 0;
            Box::new(move |time| outstanding(&ours, &case, dir, &mut turn, &mut sent, time))
        }
        Scene::Outstanding => {
            let engine = engine::open(kind, &case, dir)?;
            let spread = Case { submitters: DEPTH, ..case };
            let mut turns: Vec<Turn> = (0..DEPTH).map(|nth| Turn::new(&spread, nth)).collect();
            turns.iter_mut().for_each(Turn::narrow);
            Box::new(move |time| append(&*engine, &case, dir, &mut turns, time))
        }
        Scene::ReopenCold | Scene::ReopenWarm => {
            let mut turn = Turn::new(&case, 0);
            fill(&*engine::open(kind, &case, dir)?, &case, &mut turn)?;
            Box::new(move |_| reopen_elsewhere(kind, &case, dir))
        }
        Scene::ReadCached | Scene::ReadCold => {
            let mut turn = Turn::new(&case, 0);
            let mut engine = Some(engine::open(kind, &case, dir)?);
            if let Some(engine) = &engine {
                fill_to(&**engine, &case, &mut turn, 100_000)?;
            }
            Box::new(move |_| {
                if case.scene == Scene::ReadCold {
                    engine = None;
                    chill(dir)?;
                    engine = Some(engine::open(kind, &case, dir)?);
                    chill(dir)?;
                }
                read(&**engine.as_ref().ok_or("closed")?, &case, dir, &turn)
            })
        }
        Scene::Collect => {
            let engine = engine::open(kind, &case, dir)?;
            let mut turn = Turn::new(&case, 0);
            let mut freed: Vec<u64> = vec![0; case.groups as usize + 1];
            Box::new(move |_| {
                fill_to(&*engine, &case, &mut turn, FILLED / 4)?;
                collect(&*engine, &case, dir, &turn, &mut freed)
            })
        }
        Scene::Lagging => {
            let engine = engine::open(kind, &case, dir)?;
            let mut turn = Turn::new(&case, 0);
            Box::new(move |time| lagging(&*engine, &case, dir, &mut turn, time))
        }
    };
    let (input, mut output) = (std::io::stdin().lock(), std::io::stdout());
    for line in input.lines() {
        let time = Duration::from_millis(line?.trim().parse()?);
        writeln!(output, "{}", serde_json::to_string(&round(time)?)?)?;
        output.flush()?;
    }
    Ok(())
}

/// Opens the log that `run` of another process filled, and says what that took.
pub(crate) fn reopen(kind: Kind, case: Case, dir: &Path) -> Outcome<()> {
    let before = rss_mb()?;
    let start = Instant::now();
    let engine: Box<dyn Engine> = match kind {
        // What the index takes, not the cache.
        Kind::Pontoon | Kind::PontoonEncrypted => Box::new(Ours::open(kind, dir, &case, false)?),
        kind => engine::open(kind, &case, dir)?,
    };
    let seconds = start.elapsed().as_secs_f64();
    let rss_mb = rss_mb()?;
    let figures = Figures {
        seconds,
        rss_mb,
        index_mb: rss_mb - before,
        entries_per_s: FILLED as f64 / seconds,
        ..Figures::default()
    };
    println!("{}", serde_json::to_string(&figures)?);
    drop(engine);
    Ok(())
}

fn reopen_elsewhere(kind: Kind, case: &Case, dir: &Path) -> Outcome<Figures> {
    if case.scene == Scene::ReopenCold {
        chill(dir)?;
    }
    let output = crate::parent::command("--reopen", kind, case, dir)?.output()?;
    if !output.status.success() {
        return Err(format!("reopening failed: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn fill(engine: &dyn Engine, case: &Case, turn: &mut Turn) -> Outcome<()> {
    fill_to(engine, case, turn, FILLED)
}

fn fill_to(engine: &dyn Engine, case: &Case, turn: &mut Turn, entries: u64) -> Outcome<()> {
    let mut items = Vec::new();
    for _ in 0..entries / case.batch_groups() {
        turn.next(&mut items);
        engine.write(&items)?;
    }
    Ok(())
}

/// Threads that write and wait, each with its own groups. What they wrote is dropped before the next round.
fn append(
    engine: &dyn Engine,
    case: &Case,
    dir: &Path,
    turns: &mut [Turn],
    time: Duration,
) -> Outcome<Figures> {
    let times = Mutex::new(histogram());
    let entries = AtomicU64::new(0);
    let meter = Meter::start(dir);
    std::thread::scope(|scope| {
        let threads: Vec<_> = turns
            .iter_mut()
            .map(|turn| {
                scope.spawn(|| -> Outcome<()> {
                    let (mut own, mut items, mut count) = (histogram(), Vec::new(), 0);
                    while meter.elapsed() < time {
                        turn.next(&mut items);
                        let start = Instant::now();
                        engine.write(&items)?;
                        own.saturating_record(start.elapsed().as_nanos() as u64);
                        count += items.len() as u64;
                    }
                    entries.fetch_add(count, Ordering::Relaxed);
                    times.lock().unwrap_or_else(PoisonError::into_inner).add(&own)?;
                    Ok(())
                })
            })
            .collect();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a submitter panicked")?)
    })?;
    let times = times.into_inner().unwrap_or_else(PoisonError::into_inner);
    let figures = meter.stop(entries.into_inner(), case.value_bytes, &times)?;
    let lasts: Vec<(u64, u64)> = turns.iter().flat_map(Turn::lasts).collect();
    engine.truncate(&lasts)?;
    engine.collect()?;
    Ok(figures)
}

/// One thread with so many batches under way.
fn outstanding(
    ours: &Ours,
    case: &Case,
    dir: &Path,
    turn: &mut Turn,
    sent: &mut u64,
    time: Duration,
) -> Outcome<Figures> {
    let mut items = Vec::new();
    turn.narrow();
    let before = *sent;
    let mut starts = std::collections::VecDeque::new();
    let mut times = histogram();
    let meter = Meter::start(dir);
    while meter.elapsed() < time {
        turn.next(&mut items);
        starts.push_back(Instant::now());
        ours.submit(&items, *sent)?;
        *sent += 1;
        if *sent - before >= DEPTH {
            ours.wait_for(*sent - DEPTH + 1)?;
            if let Some(start) = starts.pop_front() {
                times.saturating_record(start.elapsed().as_nanos() as u64);
            }
        }
    }
    ours.wait_for(*sent)?;
    let figures = meter.stop(*sent - before, case.value_bytes, &times)?;
    let lasts: Vec<(u64, u64)> = turn.lasts().collect();
    ours.truncate(&lasts)?;
    ours.collect()?;
    Ok(figures)
}

fn read(engine: &dyn Engine, case: &Case, dir: &Path, turn: &Turn) -> Outcome<Figures> {
    const LEN: u64 = 64;
    let lasts: Vec<(u64, u64)> = turn.lasts().collect();
    let mut times = histogram();
    let mut at = 12345u64;
    let meter = Meter::start(dir);
    let mut entries = 0;
    for _ in 0..READS {
        at = at.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let (group, last) = lasts[(at >> 33) as usize % lasts.len()];
        let low = 1 + (at >> 13) % (last - LEN);
        let start = Instant::now();
        let read = engine.read(group, low, low + LEN)?;
        times.saturating_record(start.elapsed().as_nanos() as u64);
        if read as u64 != LEN {
            return Err(format!("read {read} entries").into());
        }
        entries += LEN;
    }
    meter.stop(entries, case.value_bytes, &times)
}

/// All groups write in turn, and after each lap all but the first let go of what they have.
fn lagging(
    engine: &dyn Engine,
    case: &Case,
    dir: &Path,
    turn: &mut Turn,
    time: Duration,
) -> Outcome<Figures> {
    let (mut items, mut times, mut entries) = (Vec::new(), histogram(), 0);
    let meter = Meter::start(dir);
    while meter.elapsed() < time {
        for _ in 0..case.groups.div_ceil(case.batch_groups()) {
            turn.next(&mut items);
            let start = Instant::now();
            engine.write(&items)?;
            times.saturating_record(start.elapsed().as_nanos() as u64);
            entries += items.len() as u64;
        }
        let lasts: Vec<(u64, u64)> = turn.lasts().skip(1).collect();
        engine.truncate(&lasts)?;
    }
    engine.collect()?;
    let figures = meter.stop(entries, case.value_bytes, &times)?;
    Ok(Figures { disk_mb: disk_mb(dir)?, ..figures })
}

/// Drops the older half of every group and frees files.
fn collect(engine: &dyn Engine, case: &Case, dir: &Path, turn: &Turn, freed: &mut [u64]) -> Outcome<Figures> {
    let lasts: Vec<(u64, u64)> =
        turn.lasts().map(|(group, last)| (group, freed[group as usize].midpoint(last))).collect();
    let dropped: u64 = lasts.iter().map(|(group, last)| last - freed[*group as usize]).sum();
    lasts.iter().for_each(|(group, last)| freed[*group as usize] = *last);
    let meter = Meter::start(dir);
    engine.truncate(&lasts)?;
    engine.collect()?;
    meter.stop(dropped, case.value_bytes, &histogram())
}
