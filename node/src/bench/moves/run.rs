//! The measurement from the first process to the last.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{
    MoveArgs, copies, kills,
    report::{Report, Tiny},
    stage::{Cores, Stage, VALUE_BYTES},
    tiny,
    traffic::{self, Traffic, Window},
};
use crate::cli::{Failure, Say, bytes};

/// The predicate that moves.
const MOVING: &str = "bench.moving";
/// Predicates that are written to beside it.
const WRITTEN: usize = 8;
const SATURATION: Duration = Duration::from_secs(2);
/// How often the rate that keeps the cores half busy is guessed, and how long each guess is looked at.
const TRIALS: u32 = 3;
const TRIAL: Duration = Duration::from_millis(1_200);
/// Until what a move has left behind is cleared away for the most part.
const SETTLE: Duration = Duration::from_millis(300);
/// How long the cluster is looked at without a move: as long as the last move took, within these.
const QUIET: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(5));

pub(super) async fn measure(say: Say, args: MoveArgs) -> Result<Report, Failure> {
    let parent = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    let scratch = tempfile::Builder::new().prefix("pontoon-bench-").tempdir_in(&parent).map_err(|error| {
        Failure::error(format!("{}: {error}; name another directory with --dir", parent.display()))
    })?;
    let end = measure_in(say, &args, scratch.path()).await;
    // Removed here, where it may be told that it cannot be.
    let path = scratch.path().to_owned();
    match (end, scratch.close()) {
        (Ok(_), Err(error)) => Err(Failure::error(format!("{}: {error}; remove it", path.display()))),
        (end, _) => end,
    }
}

async fn measure_in(say: Say, args: &MoveArgs, dir: &std::path::Path) -> Result<Report, Failure> {
    let engine = args.engine.engine.unwrap_or_default();
    say.step(&format!("starting nodes in {}", dir.display()));
    let mut stage = Stage::set(say, dir, engine).await?;
    let tiny_names: Vec<String> = (0..args.tiny).map(|at| format!("bench.tiny.{at:05}")).collect();
    if !tiny_names.is_empty() {
        say.step(&format!("making {} predicates of one row", tiny_names.len()));
        stage.make(&tiny_names).await?;
    }
    stage.add_node().await?;
    let written: Vec<String> = (0..WRITTEN).map(|at| format!("bench.written.{at}")).collect();
    stage.make(&written).await?;
    stage.make(&[MOVING.to_owned()]).await?;
    say.step(&format!("writing {} to {MOVING}", bytes(args.bytes)));
    stage.fill(MOVING, args.bytes).await?;
    stage.set_budget(&args.budget).await?;

    let predicates: Vec<String> = written.iter().cloned().chain([MOVING.to_owned()]).collect();
    let (saturation, rate) = match args.rate {
        Some(rate) => (None, rate),
        None => {
            let most = traffic::saturation(&stage.client, &predicates, SATURATION).await?;
            (Some(most), half_busy(&stage, &predicates, most).await?)
        }
    };
    say.step(&format!("writing {rate} times a second, and each millisecond to {MOVING}"));
    let traffic = Traffic::start(&stage.client, &predicates, MOVING, rate);
    let mut report = Report { engine, rate, saturation, budget: args.budget.clone(), ..Report::default() };

    let (at, size) = (dir.to_owned(), args.bytes);
    report.copy_bytes_per_s = blocking(move || copies::over_loopback(&at, size)).await?;
    let at = dir.to_owned();
    report.engine_bytes_per_s =
        blocking(move || copies::scan_and_ingest(engine, &at, size, VALUE_BYTES)).await?;

    pairs(&stage, args.moves, &mut report).await?;
    if !args.no_kills {
        say.step("killing a target");
        report.resume_target_s = Some(kills::of_target(&mut stage, MOVING, args.bytes, &args.budget).await?);
        say.step("killing the leader of the meta group");
        report.resume_driver_s = Some(kills::of_driver(&mut stage, &written).await?);
    }
    if !tiny_names.is_empty() {
        say.step(&format!("moving {} predicates from node 3 to node 4", tiny_names.len()));
        let per_s = tiny::move_all(&stage, &tiny_names, 3, 4).await?;
        say.step("draining a node of its leaders");
        let drained = tiny::drain_leaders(&stage).await?;
        report.tiny = Some(Tiny { count: tiny_names.len(), per_s, drained });
    }
    report.seen = Some(traffic.stop().await?);
    stage.cluster.stop().await;
    Ok(report)
}

/// The writes per second that keep the cores half busy, with the write each millisecond counted in. Half of what is answered when
/// nobody waits is the first guess; writes that come by themselves cost more.
async fn half_busy(stage: &Stage, predicates: &[String], most: f64) -> Result<u32, Failure> {
    let mut rate = (most / 2.0).max(1_500.0);
    for _ in 0..TRIALS {
        let paced = (rate as u32).saturating_sub(1_000).max(100);
        let traffic = Traffic::start(&stage.client, predicates, MOVING, paced);
        sleep(TRIAL / 3).await;
        let mut cores = Cores::of(stage);
        sleep(TRIAL).await;
        let busy = cores.busy();
        traffic.stop().await?;
        rate *= (0.5 / busy.max(0.05)).clamp(0.25, 1.5);
    }
    Ok((rate as u32).saturating_sub(1_000).max(100))
}

/// Times without a move and with one, in turn.
async fn pairs(stage: &Stage, moves: u32, report: &mut Report) -> Result<(), Failure> {
    let mut cores = Cores::of(stage);
    // The copies before left the disk busy: the first look is a long one, and nodes judge what a move costs their clients by the same time.
    let mut quiet = QUIET.1;
    for at in 0..moves {
        let place = stage.place(MOVING).await?;
        let leads = at.is_multiple_of(2);
        let source = if leads { place.leader } else { place.follower() };
        sleep(SETTLE).await;
        cores.busy();
        let (from, before) = (Instant::now(), stage.written(place.free));
        sleep(quiet).await;
        report.quiet.push(Window { from, to: Instant::now() });
        report.busy.push(cores.busy());
        let without = (stage.written(place.free) - before) as f64 / from.elapsed().as_secs_f64();

        let (begun, before) = (Instant::now(), stage.written(place.free));
        let moved = stage.move_once(MOVING, source, place.free, leads).await?;
        let more = (stage.written(place.free) - before) as f64 - without * begun.elapsed().as_secs_f64();
        report.amplification.push(more.max(0.0) / moved.bytes.max(1) as f64);
        stage.say.step(&format!(
            "  move {} of {moves}: {} from node {source}{} to node {} in {:.2} s",
            at + 1,
            bytes(moved.bytes),
            if leads { ", which leads," } else { "" },
            place.free,
            moved.seconds()
        ));
        quiet = Duration::from_secs_f64(moved.seconds()).clamp(QUIET.0, QUIET.1);
        report.moves.push(moved);
    }
    Ok(())
}

async fn blocking(work: impl FnOnce() -> Result<f64, Failure> + Send + 'static) -> Result<f64, Failure> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Failure::error(format!("a plain copy broke: {error}")))?
}
