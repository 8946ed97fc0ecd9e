//! The log against a plain map: whatever is done, in memory and after reopening, both say the same.

use std::{sync::Arc, time::Duration};

use pontoon_wal::{Batch, GroupId, WalReader, sim::SimFs};
use proptest::prelude::*;

#[path = "support/lib.rs"]
mod support;

use support::{HandClock, Model, Op, Rng, open};

/// What happens next to the log.
#[derive(Debug, Clone)]
enum Action {
    Batch { seed: u64, relaxed: bool },
    Close,
    Kill,
    PowerCut { seed: u64 },
    Look,
    Idle,
    Collect,
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        24 => (any::<u64>(), proptest::bool::weighted(0.1)).prop_map(|(seed, relaxed)| Action::Batch { seed, relaxed }),
        2 => Just(Action::Close),
        1 => Just(Action::Kill),
        2 => any::<u64>().prop_map(|seed| Action::PowerCut { seed }),
        1 => Just(Action::Look),
        2 => Just(Action::Idle),
        1 => Just(Action::Collect),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_log_is_a_map_that_survives(actions in proptest::collection::vec(action(), 1..90), seed: u64) {
        let (fs, clock) = (SimFs::new(), Arc::new(HandClock::default()));
        let mut model = Model::default();
        let (mut wal, _) = open(&fs, &clock, seed).unwrap();
        for action in actions {
            match action {
                Action::Batch { seed, relaxed } => {
                    let (mut rng, mut batch) = (Rng(seed), Batch::new());
                    for _ in 0..1 + rng.below(4) {
                        model.apply(GroupId(1 + rng.below(5)), &Op::draw(&mut rng), &mut batch);
                    }
                    if relaxed {
                        batch.relaxed();
                        // It waits for the next sync, or for the log to be idle.
                        let door = wal.submitter(Arc::new(support::Told::default()));
                        let room = door.try_reserve(GroupId(1), batch.size_bytes()).unwrap();
                        door.submit(batch, room, 0).unwrap();
                        prop_assert_eq!(model.differs(&wal), None);
                        while wal.step() {}
                        clock.advance(Duration::from_millis(10));
                        while wal.step() {}
                    } else {
                        wal.commit(batch).unwrap();
                    }
                }
                Action::Close => {
                    wal.close().unwrap();
                    wal = open(&fs, &clock, seed).unwrap().0;
                }
                Action::Kill => {
                    drop(wal);
                    fs.kill();
                    wal = open(&fs, &clock, seed).unwrap().0;
                }
                // All of it was acknowledged: chance has nothing to take.
                Action::PowerCut { seed } => {
                    drop(wal);
                    fs.crash(seed);
                    wal = open(&fs, &clock, seed).unwrap().0;
                }
                Action::Look => {
                    let before = fs.counts();
                    let reader = WalReader::open(Arc::new(fs.clone()), support::DIR.as_ref()).unwrap();
                    prop_assert_eq!(reader.groups(), wal.groups());
                    for group in wal.groups() {
                        prop_assert_eq!(reader.group(group), wal.group(group));
                    }
                    prop_assert_eq!(fs.counts().changes, before.changes);
                }
                Action::Idle => {
                    clock.advance(Duration::from_millis(10));
                    while wal.step() {}
                }
                Action::Collect => {
                    wal.gc_once().unwrap();
                }
            }
            prop_assert_eq!(model.differs(&wal), None);
        }
        wal.close().unwrap();
        let (wal, report) = open(&fs, &clock, seed).unwrap();
        prop_assert_eq!(model.differs(&wal), None);
        prop_assert!(report.damaged.is_empty() && report.torn.is_none());
    }
}

#[test]
fn segments_are_used_again_and_the_log_stays_small() {
    let (fs, clock) = (SimFs::new(), Arc::new(HandClock::default()));
    let (wal, _) = open(&fs, &clock, 1).unwrap();
    let (mut model, mut rng) = (Model::default(), Rng(9));
    for round in 0..600 {
        let mut batch = Batch::new();
        let group = GroupId(1 + rng.below(4));
        model.apply(group, &Op::Append { back: 0, count: 3, bytes: 3_000 }, &mut batch);
        model.apply(group, &Op::Truncate { keep: 2 }, &mut batch);
        wal.commit(batch).unwrap();
        assert!(wal.usage().disk_bytes <= 12 * (256 << 10), "round {round}: {:?}", wal.usage());
    }
    assert_eq!(model.differs(&wal), None);
    wal.close().unwrap();
    let (wal, _) = open(&fs, &clock, 2).unwrap();
    assert_eq!(model.differs(&wal), None);
}

#[test]
fn restarts_do_not_pile_up_segments() {
    let (fs, clock) = (SimFs::new(), Arc::new(HandClock::default()));
    let mut most = 0;
    for restart in 1..=80 {
        let (wal, _) = open(&fs, &clock, restart).unwrap();
        let mut batch = Batch::new();
        let entry = pontoon_wal::Entry { index: restart, term: 1, kind: 0, data: "x".into() };
        batch.append(GroupId(1), &[entry]).truncate_prefix(GroupId(1), restart, 1);
        wal.commit(batch).unwrap();
        while wal.step() {}
        most = most.max(fs.files().len());
        match restart % 2 {
            0 => wal.close().unwrap(),
            _ => {
                drop(wal);
                fs.kill();
            }
        }
    }
    assert!(most <= 24, "{most} files");
}
