//! Power is cut at every operation of a scripted run, and again while the log recovers: what was acknowledged is there,
//! what was not is there whole or not at all.

use std::{sync::Arc, time::Duration};

use pontoon_wal::{
    Wal,
    sim::{Fault, OpKind, SimFs},
};

#[path = "support/lib.rs"]
mod support;

use support::{HandClock, Rng, Script, Told, open};

const TEARS: u64 = 3;

/// Plays the script from `from` on. Returns how many batches were acknowledged and how many handed in when it ended.
fn play(wal: &Wal, clock: &HandClock, script: &Script, from: usize, rng: &mut Rng) -> (usize, usize) {
    let told = Arc::new(Told::default());
    let door = wal.submitter(told.clone());
    let (mut submitted, mut stopped) = (from, false);
    while submitted < script.batches.len() {
        for _ in 0..1 + rng.below(3) {
            let Some(batch) = script.batches.get(submitted) else { break };
            let reservation = door.try_reserve_internal(pontoon_wal::GroupId(1));
            if door.submit(batch.clone(), reservation, submitted as u64).is_err() {
                stopped = true;
                break;
            }
            submitted += 1;
        }
        while wal.step() {}
        let acknowledged = from + told.persisted.lock().unwrap().len();
        if stopped || acknowledged < submitted {
            return (acknowledged, submitted);
        }
        if rng.below(4) == 0 {
            clock.advance(Duration::from_millis(6));
            while wal.step() {}
        }
    }
    (from + told.persisted.lock().unwrap().len(), submitted)
}

/// Which state the log is in, of those that it may be in.
fn find_state(wal: &Wal, script: &Script, acknowledged: usize, submitted: usize, context: &str) -> usize {
    let candidates = (acknowledged..=submitted).rev();
    let found = candidates.clone().find(|k| script.states[*k].differs(wal).is_none());
    found.unwrap_or_else(|| {
        let differences: Vec<_> = candidates.map(|k| (k, script.states[k].differs(wal))).collect();
        panic!("{context}: none of the states {acknowledged}..={submitted}: {differences:?}")
    })
}

/// How the first process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    PowerCut,
    /// Only the process dies: what it wrote and did not sync is still to be lost.
    Kill,
}

fn crash_everywhere(seed: u64, batches: usize, end: End) {
    let script = Script::draw(seed, batches, 5);
    let clock = Arc::new(HandClock::default());
    let changes = {
        let fs = SimFs::new();
        let (wal, _) = open(&fs, &clock, seed).unwrap();
        assert_eq!(play(&wal, &clock, &script, 0, &mut Rng(seed)), (batches, batches));
        assert!(
            wal.usage().checkpoint > 4,
            "the script is long enough to need checkpoints: {:?}",
            wal.usage()
        );
        fs.counts().changes
    };
    for at in 0..changes {
        for tear in 0..TEARS {
            crash_at(seed, &script, at, tear, end);
        }
    }
}

fn crash_at(seed: u64, script: &Script, at: u64, tear: u64, end: End) {
    let context = format!("seed {seed}, operation {at}, tear {tear}, {end:?}");
    let clock = Arc::new(HandClock::default());
    let fs = SimFs::new();
    let mut rng = Rng(seed ^ at << 8 ^ tear << 40);
    fs.fail_nth(OpKind::Change, at, Fault::PowerCut);
    let (mut acknowledged, mut submitted) = match open(&fs, &clock, seed) {
        Ok((wal, _)) => play(&wal, &clock, script, 0, &mut Rng(seed)),
        Err(_) => (0, 0),
    };
    match end {
        End::PowerCut => fs.crash(rng.next()),
        End::Kill => fs.kill(),
    }
    // A second cut somewhere in recovery or soon after it.
    let soon = if end == End::Kill { 24 } else { 12 };
    fs.fail_nth(OpKind::Change, rng.below(soon), Fault::PowerCut);
    if let Ok((wal, report)) = open(&fs, &clock, seed + 1) {
        assert!(report.damaged.is_empty() && report.damaged_groups.is_empty(), "{context}: {report:?}");
        let state = find_state(&wal, script, acknowledged, submitted, &context);
        let (more, handed) = play(&wal, &clock, script, state, &mut rng);
        (acknowledged, submitted) = (more.max(state), handed.max(state));
    }
    fs.crash(rng.next());
    let (wal, report) = open(&fs, &clock, seed + 2).unwrap_or_else(|error| panic!("{context}: {error}"));
    assert!(report.damaged.is_empty() && report.damaged_groups.is_empty(), "{context}: {report:?}");
    let state = find_state(&wal, script, acknowledged, submitted, &context);
    // The log goes on from there to its end, and a clean close loses nothing.
    let all = script.batches.len();
    assert_eq!(play(&wal, &clock, script, state, &mut rng), (all, all), "{context}");
    wal.close().unwrap();
    let (wal, _) = open(&fs, &clock, seed + 3).unwrap_or_else(|error| panic!("{context}: {error}"));
    assert_eq!(script.states[all].differs(&wal), None, "{context}");
}

#[test]
fn a_power_cut_at_any_operation_keeps_what_was_acknowledged() {
    crash_everywhere(1, 110, End::PowerCut);
}

#[test]
fn another_script_survives_as_well() {
    crash_everywhere(77, 90, End::PowerCut);
}

#[test]
fn what_a_killed_process_left_unsynced_may_still_be_lost() {
    crash_everywhere(4, 90, End::Kill);
}

#[test]
fn the_same_seed_and_calls_make_the_same_disk() {
    let run = || {
        let (fs, clock, script) = (SimFs::new(), Arc::new(HandClock::default()), Script::draw(5, 60, 5));
        for seed in [5, 6] {
            let (wal, _) = open(&fs, &clock, seed).unwrap();
            play(&wal, &clock, &script, if seed == 5 { 0 } else { 60 }, &mut Rng(5));
            wal.close().unwrap();
        }
        let files = fs.files().into_iter();
        files.map(|(path, _)| (path.clone(), support::bytes_of(&fs, &path))).collect::<Vec<_>>()
    };
    assert!(run() == run());
}
