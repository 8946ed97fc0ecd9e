//! Whole clusters from a seed: what ships, in a world that is made up.
//!
//! `PONTOON_SIM_SEEDS` sets how many seeds the long test runs, `PONTOON_SIM_SEED` replays a single one.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use pontoon_tests::sim::{Coverage, Faults, Plan, Report, run};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

fn seeds(default: u64) -> std::ops::RangeInclusive<u64> {
    match number("PONTOON_SIM_SEED") {
        Some(seed) => seed..=seed,
        None => 1..=number("PONTOON_SIM_SEEDS").unwrap_or(default),
    }
}

fn play(plan: &Plan) -> Report {
    match run(plan) {
        Ok(report) => report,
        Err(failure) => panic!("{failure}"),
    }
}

#[test]
fn a_healthy_cluster_serves_all_and_moves_at_will() {
    let calm = Faults { moves: 2_000, ..Faults::default() };
    let report = play(&Plan { seed: 1, nodes: 5, groups: 32, steps: 3_000, lease: false, faults: calm });
    assert!(report.operations > 1_000 && report.moves > 10 && report.snapshots > 10, "{report:?}");
}

#[test]
fn a_seed_replays_to_the_letter() {
    for seed in 1..=3 {
        let plan = Plan { steps: 2_000, ..Plan::drawn(seed, 5, 6) };
        assert_eq!(play(&plan).hash, play(&plan).hash, "seed {seed} ran differently the second time");
    }
}

#[test]
fn faults_of_every_kind_lose_nothing_repeat_nothing_and_end() {
    let seeds = seeds(12);
    let next = AtomicU64::new(*seeds.start());
    let sum = Mutex::new((Coverage::default(), 0, 0));
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed > *seeds.end() {
                        return;
                    }
                    let report = play(&Plan::drawn(seed, 5, 64));
                    let mut sum = sum.lock().unwrap_or_else(PoisonError::into_inner);
                    sum.0.add(&report.coverage);
                    sum.1 += report.operations;
                    sum.2 += report.moves;
                }
            });
        }
    });
    let (coverage, operations, moves) = sum.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!("{coverage}\n{operations} operations checked, {moves} moves");
}
