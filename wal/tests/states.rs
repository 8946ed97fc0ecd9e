//! Every disk that a power cut may leave, at every operation of runs drawn from seeds, holds all that was acknowledged and
//! a beginning of the rest, and goes on from there. `docs/testing.md` has the budget and how to replay a seed.

#[path = "support/run.rs"]
mod run;
#[path = "support/states.rs"]
mod states;
#[path = "support/lib.rs"]
mod support;

use run::{Happened, Plan, Run};
use states::{Explorer, Tally};

/// States that the tests of this file look at together, unless PONTOON_WAL_CRASH_STATES says otherwise.
const STATES: usize = 100_000;

fn number(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name} is not a number: {value}")))
}

/// Plays runs until a share of the budget is used up.
fn explore(first_seed: u64, share: usize, plan: impl Fn(u64) -> Plan) -> Happened {
    let budget = number("PONTOON_WAL_CRASH_STATES").map_or(STATES, |states| states as usize) / share;
    let only = number("PONTOON_WAL_CRASH_SEED");
    let (mut all, mut happened, mut runs) = (Tally::default(), Happened::default(), 0);
    for seed in first_seed.. {
        let seed = match only {
            Some(only) if seed == first_seed => only,
            Some(_) => break,
            None => seed,
        };
        let left = if only.is_some() { usize::MAX } else { budget.saturating_sub(all.states) };
        if left == 0 {
            break;
        }
        // A seed that is replayed sees what it saw; a long hunt tries every subset of up to twelve pieces.
        let mut explorer = Explorer::new(seed, left, only.is_none() && budget > STATES);
        let mut run = Run::new(plan(seed));
        if let Err(failure) = run.play(&mut explorer) {
            panic!("{failure}");
        }
        let (tally, here) = (explorer.tally, run.happened);
        runs += 1;
        all.states += tally.states;
        all.known += tally.known;
        all.exhausted += tally.exhausted;
        all.torn += tally.torn;
        all.second_cuts += tally.second_cuts;
        all.footers += tally.footers;
        happened.moments += here.moments;
        happened.checkpoints += here.checkpoints;
        happened.relocated += here.relocated;
        happened.rotations += here.rotations;
        happened.used_again += here.used_again;
        happened.torn += here.torn;
        happened.opens += here.opens;
        happened.keys += here.keys;
        happened.footers += here.footers;
    }
    println!("{runs} runs, {all:?}, {happened:?}");
    if runs > 15 {
        assert!(all.torn > 100 && all.second_cuts > 100 && all.exhausted > 100, "{all:?}");
        assert!(happened.checkpoints > 100 && happened.rotations > 30, "{happened:?}");
        assert!(happened.used_again > 5 && happened.opens > 20 && happened.keys > 5, "{happened:?}");
        assert!(happened.footers > 20 && all.footers > 100, "{happened:?}, {all:?}");
    }
    happened
}

#[test]
fn each_disk_that_a_power_cut_may_leave_recovers() {
    explore(1, 4, |seed| Plan { seed, steps: 80, groups: 6, lagging: 0, held: false, unsynced: false });
}

#[test]
fn each_disk_recovers_when_operations_overtake_each_other() {
    explore(100_001, 4, |seed| Plan { seed, steps: 80, groups: 4, lagging: 0, held: true, unsynced: false });
}

#[test]
fn each_disk_of_many_groups_recovers() {
    explore(200_001, 8, |seed| Plan {
        seed,
        steps: 80,
        groups: 40,
        lagging: 0,
        held: false,
        unsynced: false,
    });
}

#[test]
fn each_disk_of_a_log_without_syncs_holds_a_beginning() {
    explore(300_001, 8, |seed| Plan {
        seed,
        steps: 80,
        groups: 6,
        lagging: 0,
        held: seed.is_multiple_of(2),
        unsynced: true,
    });
}

#[test]
fn each_disk_recovers_while_records_are_relocated() {
    let happened = explore(400_001, 4, |seed| Plan {
        seed,
        steps: 80,
        groups: 4,
        lagging: 2,
        held: seed.is_multiple_of(3),
        unsynced: seed.is_multiple_of(7),
    });
    assert!(happened.relocated > 100_000 || number("PONTOON_WAL_CRASH_SEED").is_some(), "{happened:?}");
}
