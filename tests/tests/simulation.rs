//! Whole clusters from a seed: power cuts, loss, partitions and moving replicas under load.
//!
//! `PONTOON_SIM_SEEDS` sets how many seeds each test runs, `PONTOON_SIM_SEED` replays a single one.

use pontoon_tests::{Faults, World};

fn seeds(default: u64) -> Vec<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    match number("PONTOON_SIM_SEED") {
        Some(seed) => vec![seed],
        None => (1..=number("PONTOON_SIM_SEEDS").unwrap_or(default)).collect(),
    }
}

const CALM: Faults = Faults { loss: 0, crash: 0, partition: 0, swap: 0 };

#[test]
fn a_healthy_cluster_of_many_groups_serves_all() {
    for seed in seeds(3) {
        let mut world = World::new(seed, 32, CALM);
        world.run(3_000);
        assert!(world.reads > 20, "seed {seed} read {} times", world.reads);
    }
}

#[test]
fn power_cuts_loss_and_partitions_lose_nothing_and_repeat_nothing() {
    let mut crashes = 0;
    for seed in seeds(40) {
        let mut world = World::new(seed, 8, Faults { loss: 30, crash: 2, partition: 2, swap: 0 });
        world.run(6_000);
        crashes += world.crashes;
    }
    assert!(crashes > 0, "no seed cut the power");
}

#[test]
fn replicas_change_nodes_under_power_cuts_loss_and_partitions() {
    let (mut swaps, mut snapshots) = (0, 0);
    for seed in seeds(40) {
        let mut world = World::new(seed, 6, Faults { loss: 20, crash: 2, partition: 1, swap: 5 });
        world.run(6_000);
        swaps += world.swaps_done;
        snapshots += world.snapshots;
    }
    assert!(swaps > 0 && snapshots > 0, "{swaps} swaps, {snapshots} snapshots");
}

#[test]
fn a_seed_replays_to_the_letter() {
    for seed in seeds(3) {
        let run = || World::new(seed, 4, Faults { loss: 30, crash: 3, partition: 2, swap: 4 }).run(2_000);
        assert_eq!(run(), run(), "seed {seed} ran differently the second time");
    }
}
