//! Whole clusters from a seed: what ships, in a world that is made up.
//!
//! `PONTOON_SIM_SEEDS` sets how many seeds the long test runs, `PONTOON_SIM_GROUPS` how many groups each has;
//! `PONTOON_SIM_SEED` replays a single one.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use pontoon_tests::sim::{Coverage, Faults, Kind, Mistake, Plan, Report, run};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

fn seeds(default: u64) -> std::ops::RangeInclusive<u64> {
    match number("PONTOON_SIM_SEED") {
        Some(seed) => seed..=seed,
        None => 1..=number("PONTOON_SIM_SEEDS").unwrap_or(default),
    }
}

/// What the ordinary seeds may miss, since it takes a millisecond of a pull, or of a move's last step, and a kind that strikes seldom; `simulate` demands
/// it of a hunt of a thousand seeds.
const RARE: [(Kind, &str); 7] = [
    (Kind::Duplicate, "staged"),
    (Kind::Rot, "Cleanup"),
    (Kind::Rot, "asked"),
    (Kind::Rot, "staged"),
    (Kind::Lost, "asked"),
    (Kind::Lost, "staged"),
    (Kind::Lost, "switched"),
];

fn groups() -> u64 {
    number("PONTOON_SIM_GROUPS").unwrap_or(64)
}

fn play(plan: &Plan) -> Report {
    match run(plan) {
        Ok(report) => report,
        Err(failure) => panic!("{failure}"),
    }
}

#[test]
fn a_healthy_cluster_serves_all_and_moves_at_will() {
    for seed in 1..=4 {
        let calm = Faults { moves: 2_000, ..Faults::default() };
        let plan = Plan::drawn(seed, 5, 32);
        let report =
            play(&Plan { groups: 32, steps: 4_000, lease: false, aims: false, faults: calm, ..plan });
        assert!(report.operations > 1_000 && report.moves > 10 && report.snapshots > 10, "{report:?}");
        assert_eq!((report.given_up, report.stuck), (0, 0), "nothing holds them up: {report:?}");
        assert!(report.slept > 10, "quiet groups do not sleep: {report:?}");
    }
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
    let seeds = seeds(200);
    let next = AtomicU64::new(*seeds.start());
    let sum = Mutex::new((Coverage::default(), 0, 0, 0));
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed > *seeds.end() {
                        return;
                    }
                    let report = play(&Plan::drawn(seed, 5, groups()));
                    let mut sum = sum.lock().unwrap_or_else(PoisonError::into_inner);
                    sum.0.add(&report.coverage);
                    sum.1 += report.operations;
                    sum.2 += report.moves;
                    sum.3 += report.slept;
                }
            });
        }
    });
    let (coverage, operations, moves, slept) = sum.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!("{coverage}\n{operations} operations checked, {moves} moves, {slept} times asleep");
    if number("PONTOON_SIM_SEED").is_none() {
        for kind in Kind::ALL {
            assert!(coverage.struck(kind) > 0, "no seed had {kind:?}");
        }
        assert!(slept > 0, "no group has slept");
        if number("PONTOON_SIM_SEEDS").is_none() {
            let unmet: Vec<_> = coverage.unmet().into_iter().filter(|cell| !RARE.contains(cell)).collect();
            assert_eq!(unmet, [], "no fault of the kind met the phase in any seed");
        }
    }
}

#[test]
fn a_thousand_moves_end_in_order_whatever_strikes() {
    let wanted = number("PONTOON_SIM_MOVES").unwrap_or(1_000);
    let mut sum = [0; 5];
    for seed in 1.. {
        let Report { moves, given_up, stuck, drains, plans, .. } = play(&Plan::of_moves(seed));
        for (sum, more) in sum.iter_mut().zip([moves, given_up, stuck, drains, plans]) {
            *sum += more;
        }
        if sum[0] >= wanted {
            break;
        }
    }
    let [moves, given_up, stuck, drains, plans] = sum;
    println!("{moves} moves, {given_up} given up, {stuck} times stuck, {drains} drains, {plans} plans");
    assert!(given_up > 0 && stuck > 0 && drains > 0 && plans > 0, "some never happened");
}

#[test]
fn mistakes_on_purpose_are_noticed() {
    // Those that few seeds show; `simulate --broken all` tries the others, too.
    for mistake in [
        Mistake::AckBeforeSync,
        Mistake::AcknowledgedTailCut,
        Mistake::MarkApart,
        Mistake::PromotedEarly,
        Mistake::ChangeMissed,
        Mistake::DeletedOnBelief,
    ] {
        let _making = mistake.make();
        let found = (1..=400).find_map(|seed| run(&Plan::drawn(seed, 5, 4)).err());
        let found = found.unwrap_or_else(|| panic!("400 seeds do not show {mistake:?}"));
        println!("{mistake:?}: seed {}: {}", found.plan.seed, found.what.lines().next().unwrap_or_default());
    }
}
