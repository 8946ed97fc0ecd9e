//! A log that runs out of room: what frees it goes on, it frees itself, and whoever is not the cause goes on too.

use std::sync::{Arc, Mutex};

use pontoon_wal::{
    Batch, Error, GroupId, HardState, Options, PersistSink, Persisted, Submitter, Wal, WalEvent, sim::SimFs,
};

#[path = "support/lib.rs"]
mod support;

use support::{HandClock, Model, Op, Rng, open, options};

const SEGMENT: u64 = 256 << 10;

/// Hears of events, and how many batches are persisted.
#[derive(Default)]
struct Heard {
    events: Mutex<Vec<WalEvent>>,
    persisted: Mutex<u64>,
}

impl PersistSink for Heard {
    fn persisted(&self, done: &[Persisted]) {
        *self.persisted.lock().unwrap() += done.len() as u64;
    }

    fn failed(&self, error: &Error) {
        panic!("{error}");
    }

    fn event(&self, event: &WalEvent) {
        self.events.lock().unwrap().push(event.clone());
    }
}

/// What limits the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Limit {
    /// The disk holds so many bytes.
    Disk,
    /// The log may take so many.
    Option,
    /// The caller forbids growth once there are so many.
    Held,
}

const LIMITS: [Limit; 3] = [Limit::Disk, Limit::Option, Limit::Held];
const SEGMENTS: u64 = 9;

/// A log with a limit, its disk and its model.
struct Scene {
    limit: Limit,
    fs: SimFs,
    clock: Arc<HandClock>,
    heard: Arc<Heard>,
    log: Option<(Wal, Submitter)>,
    model: Model,
    sent: u64,
    opens: u64,
}

impl Scene {
    fn new(limit: Limit) -> Scene {
        let mut scene = Scene {
            limit,
            fs: SimFs::new(),
            clock: Arc::default(),
            heard: Arc::default(),
            log: None,
            model: Model::default(),
            sent: 0,
            opens: 0,
        };
        scene.fs.lose_patience_after(400_000);
        scene.open();
        if limit == Limit::Disk {
            scene.fs.set_capacity(Some(SEGMENTS * SEGMENT + (100 << 10)));
        }
        scene
    }

    fn open(&mut self) {
        self.opens += 1;
        let mut options = options(&self.fs, &self.clock, self.opens);
        if self.limit == Limit::Option {
            options.size_limit_bytes = Some(SEGMENTS * SEGMENT);
        }
        let (wal, report) = Wal::open(options).unwrap();
        assert!(report.damaged.is_empty() && report.damaged_groups.is_empty(), "{report:?}");
        assert_eq!(self.model.differs(&wal), None);
        let door = wal.submitter(self.heard.clone());
        *self.heard.persisted.lock().unwrap() = self.sent;
        self.log = Some((wal, door));
    }

    fn wal(&self) -> &Wal {
        &self.log.as_ref().unwrap().0
    }

    /// Lets the log work; time passes, so that it looks at a full disk again.
    fn settle(&self) {
        for _ in 0..4 {
            let held = self.limit == Limit::Held && self.wal().usage().disk_bytes >= SEGMENTS * SEGMENT;
            self.wal().hold_growth(held);
            while self.wal().step() {}
            self.clock.advance(std::time::Duration::from_millis(600));
        }
        while self.wal().step() {}
    }

    /// Hands in a batch that needs room; whether it was taken.
    fn ask(&mut self, ops: &[(GroupId, Op)]) -> Result<(), Error> {
        let (mut model, mut batch) = (self.model.clone(), Batch::new());
        ops.iter().for_each(|(group, op)| model.apply(*group, op, &mut batch));
        let (_, door) = self.log.as_ref().unwrap();
        let room = door.try_reserve(ops[0].0, batch.size_bytes())?;
        self.sent += 1;
        door.submit(batch, room, self.sent).unwrap();
        self.model = model;
        self.settle();
        assert_eq!(*self.heard.persisted.lock().unwrap(), self.sent, "what has room is written");
        Ok(())
    }

    /// Hands in what is never refused.
    fn insist(&mut self, ops: &[(GroupId, Op)]) {
        let mut batch = Batch::new();
        ops.iter().for_each(|(group, op)| self.model.apply(*group, op, &mut batch));
        let (wal, door) = self.log.as_ref().unwrap();
        self.sent += 1;
        door.submit(batch, door.try_reserve_internal(ops[0].0), self.sent).unwrap();
        self.settle();
        assert_eq!(
            *self.heard.persisted.lock().unwrap(),
            self.sent,
            "{:?}: the reserve holds: {:?}",
            self.limit,
            wal.usage()
        );
    }

    /// Groups write until there is no room; how many batches that took.
    fn fill(&mut self, groups: std::ops::Range<u64>, bytes: usize) -> u64 {
        for nth in 0.. {
            let group = GroupId(groups.start + nth % (groups.end - groups.start));
            match self.ask(&[(group, Op::Append { back: 0, count: 1, bytes })]) {
                Ok(()) => assert!(nth < 2_000, "{:?}: the room never ends", self.limit),
                Err(Error::NoSpace { .. }) => return nth,
                Err(error) => panic!("{error}"),
            }
        }
        unreachable!()
    }

    fn check(&self) {
        assert_eq!(self.model.differs(self.wal()), None);
        if self.limit == Limit::Option {
            assert!(self.wal().usage().disk_bytes <= SEGMENTS * SEGMENT, "{:?}", self.wal().usage());
        }
    }
}

fn keep(group: u64, keep: u64) -> (GroupId, Op) {
    (GroupId(group), Op::Truncate { keep })
}

#[test]
fn hard_states_go_on_for_ever_without_room() {
    for limit in LIMITS {
        let mut scene = Scene::new(limit);
        scene.fill(1..5, 20_000);
        // Far more than the reserve: what holds nothing is freed again.
        let sector = Op::Meta { key: 1, bytes: 2_000 };
        for round in 0..1_500 {
            let state = HardState { term: round, vote: 1, commit: round };
            let group = GroupId(1 + round % 4);
            scene.insist(&[(group, Op::HardState(state)), (group, sector)]);
        }
        scene.check();
        let more = [(GroupId(1), Op::Append { back: 0, count: 1, bytes: 20_000 })];
        assert!(matches!(scene.ask(&more), Err(Error::NoSpace { .. })));
    }
}

#[test]
fn truncation_brings_room_and_the_log_goes_on_by_itself() {
    for limit in LIMITS {
        let mut scene = Scene::new(limit);
        for round in 0..4 {
            let taken = scene.fill(1..9, 20_000);
            assert!(taken > 20, "{limit:?} round {round}: {taken} {:?}", scene.wal().usage());
            for group in 1..9 {
                scene.insist(&[keep(group, 1)]);
            }
            scene.check();
        }
        let events = scene.heard.events.lock().unwrap();
        assert!(
            events.iter().any(|event| matches!(event, WalEvent::Pinned { groups } if !groups.is_empty()))
        );
    }
}

#[test]
fn a_full_log_whose_groups_keep_a_part_is_emptied_by_relocation() {
    for limit in LIMITS {
        let mut scene = Scene::new(limit);
        // Each segment holds records of all groups; all but one let go.
        scene.fill(1..9, 8_000);
        for group in 2..9 {
            scene.insist(&[keep(group, 0)]);
        }
        assert!(scene.wal().usage().relocated_bytes > 0, "{limit:?} {:?}", scene.wal().usage());
        let again = scene.fill(2..9, 8_000);
        assert!(again > 30, "{limit:?}: {again} {:?}", scene.wal().usage());
        scene.check();
    }
}

#[test]
fn a_restart_on_a_full_disk_recovers_and_cleans_up() {
    for limit in LIMITS {
        let mut scene = Scene::new(limit);
        let mut rng = Rng(limit as u64);
        scene.fill(1..9, 12_000);
        for round in 0..12u64 {
            let (wal, door) = scene.log.take().unwrap();
            drop(door);
            match round % 3 {
                0 => wal.close().unwrap(),
                1 => {
                    drop(wal);
                    scene.fs.kill();
                }
                _ => {
                    drop(wal);
                    scene.fs.crash(rng.next());
                }
            }
            scene.open();
            let state = HardState { term: round, vote: 1, commit: 0 };
            scene.insist(&[(GroupId(1 + round % 8), Op::HardState(state))]);
        }
        scene.check();
        for group in 1..9 {
            scene.insist(&[keep(group, 0)]);
        }
        let again = scene.fill(1..9, 12_000);
        assert!(again > 40, "{limit:?}: {again} {:?}", scene.wal().usage());
        scene.check();
    }
}

#[test]
fn groups_that_come_while_the_disk_is_full_are_in_the_checkpoint() {
    for limit in LIMITS {
        let mut scene = Scene::new(limit);
        scene.fill(1..5, 20_000);
        // The manifest needs far more bytes than it had.
        for group in 1_000..1_150 {
            scene.insist(&[(GroupId(group), Op::Meta { key: 1, bytes: 30 })]);
        }
        for group in 1..5 {
            scene.insist(&[keep(group, 0)]);
        }
        let again = scene.fill(1..5, 20_000);
        assert!(again > 20, "{limit:?}: {again} {:?}", scene.wal().usage());
        scene.check();
    }
}

#[test]
fn a_group_over_its_quota_waits_and_the_others_write_for_ever() {
    let (fs, clock) = (SimFs::new(), Arc::new(HandClock::default()));
    let limit = 10 * SEGMENT;
    let (wal, _) = Wal::open(Options {
        size_limit_bytes: Some(limit),
        group_quota_bytes: Some(2 * SEGMENT),
        ..options(&fs, &clock, 1)
    })
    .unwrap();
    let door = wal.submitter(Arc::new(Heard::default()));
    let (mut model, mut written, mut refused) = (Model::default(), 0, 0);
    let mut round = 0;
    while written < 20 * limit {
        round += 1;
        // The first never lets go.
        let ops: &[_] = match round % 8 {
            0 => &[(GroupId(1), Op::Append { back: 0, count: 1, bytes: 6_000 })],
            n => &[
                (GroupId(n + 1), Op::Append { back: 0, count: 1, bytes: 15_000 }),
                (GroupId(n + 1), Op::Truncate { keep: 1 }),
            ],
        };
        let (mut next, mut batch) = (model.clone(), Batch::new());
        ops.iter().for_each(|(group, op)| next.apply(*group, op, &mut batch));
        match door.try_reserve(ops[0].0, batch.size_bytes()) {
            Ok(room) => {
                written += batch.size_bytes();
                door.submit(batch, room, round).unwrap();
                model = next;
            }
            Err(Error::Quota { group: GroupId(1), .. }) => refused += 1,
            Err(error) => panic!("round {round}, {:?}: {error} {:?}", ops[0].0, wal.usage()),
        }
        while wal.step() {}
        assert!(wal.usage().disk_bytes <= limit);
    }
    assert!(refused > 100, "{refused}");
    assert_eq!(model.differs(&wal), None);
    wal.close().unwrap();
    let (wal, _) = open(&fs, &clock, 2).unwrap();
    assert_eq!(model.differs(&wal), None);
}
