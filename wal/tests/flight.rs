//! Several frames on their way to the disk at once: whatever order they arrive in, what is acknowledged is a beginning.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use pontoon_wal::{
    Batch, Entry, Error, GroupId, Options, PersistSink, Persisted, Submitter, TornWhy, Wal, WalEvent,
    sim::{Fault, OpKind, SimFs},
};

#[path = "support/lib.rs"]
mod support;

use support::{HandClock, Told, open, options};

fn append(group: u64, index: u64, bytes: usize) -> Batch {
    let mut batch = Batch::new();
    let data = vec![index as u8; bytes].into();
    batch.append(GroupId(group), &[Entry { index, term: 1, kind: 0, data }]);
    batch
}

struct Flight {
    fs: SimFs,
    clock: Arc<HandClock>,
    wal: Wal,
    told: Arc<Told>,
    door: Submitter,
}

impl Flight {
    /// A log with one durable entry of group 1, whose next writes wait.
    fn new(depth: usize) -> Flight {
        let (fs, clock) = (SimFs::new(), Arc::new(HandClock::default()));
        let (wal, _) = Wal::open(Options { write_depth: depth, ..options(&fs, &clock, 1) }).unwrap();
        wal.commit(append(1, 1, 10)).unwrap();
        while wal.step() {}
        let told = Arc::new(Told::default());
        let door = wal.submitter(told.clone());
        fs.hold(true);
        Flight { fs, clock, wal, told, door }
    }

    /// Hands in an entry of this group and lets the writer begin what it will.
    fn submit(&self, group: u64, index: u64) {
        let room = self.door.try_reserve(GroupId(group), 100).unwrap();
        self.door.submit(append(group, index, 10), room, index).unwrap();
        while self.wal.step() {}
    }

    /// Carries out the write of a frame and its sync.
    fn complete(&self, nth: usize) {
        for _ in 0..2 {
            assert!(self.fs.complete_nth(nth));
            while self.wal.step() {}
        }
    }

    /// Lets the write of a frame meet the fault that waits for it.
    fn fail(&self, nth: usize) {
        assert!(self.fs.complete_nth(nth));
        while self.wal.step() {}
    }

    fn acknowledged(&self) -> Vec<u64> {
        self.told.persisted.lock().unwrap().iter().map(|done| done.token).collect()
    }
}

#[test]
fn one_group_may_let_only_so_much_wait_for_the_disk() {
    let (fs, clock) = (SimFs::new(), Arc::new(HandClock::default()));
    let options = Options { max_pending_group_bytes: 50_000, ..options(&fs, &clock, 1) };
    let (wal, _) = Wal::open(options).unwrap();
    wal.commit(append(1, 1, 10)).unwrap();
    let door = wal.submitter(Arc::new(Told::default()));
    let write = |group: u64, index: u64| {
        let room = door.try_reserve(GroupId(group), 10_000)?;
        door.submit(append(group, index, 10_000), room, index).map(drop)
    };
    fs.hold(true);
    let mut index = 2;
    let refused = loop {
        match write(1, index) {
            Ok(()) => index += 1,
            Err(error) => break error,
        }
    };
    let Error::Busy { pending_bytes } = refused else { panic!("{refused}") };
    assert!((50_000..70_000).contains(&pending_bytes), "{pending_bytes}");
    // The others find no more than that before them; what the group needs in order to live passes.
    (1..=3).for_each(|index| write(2, index).unwrap());
    let mut batch = Batch::new();
    batch.truncate_prefix(GroupId(1), 1, 1);
    door.submit(batch, door.try_reserve_internal(GroupId(1)), 0).unwrap();
    fs.hold(false);
    while fs.complete_one() || wal.step() {}
    write(1, index).unwrap();
}

#[test]
fn so_many_frames_are_under_way_as_was_chosen() {
    for depth in [1, 2, 4] {
        let flight = Flight::new(depth);
        (2..=20).for_each(|index| flight.submit(1, index));
        assert_eq!(flight.fs.waiting(), depth);
        while flight.fs.complete_one() {
            while flight.wal.step() {}
            assert!(flight.fs.waiting() <= depth);
        }
        assert_eq!(flight.acknowledged(), (2..=20).collect::<Vec<_>>());
    }
}

#[test]
fn a_frame_is_acknowledged_after_all_before_it() {
    let flight = Flight::new(4);
    (2..=4).for_each(|index| flight.submit(1, index));
    assert_eq!(flight.fs.waiting(), 2, "a third frame would hold less than what is under way");
    flight.complete(1);
    assert!(flight.acknowledged().is_empty());
    flight.complete(0);
    assert_eq!(flight.acknowledged()[..2], [2, 3]);
    while flight.fs.complete_one() {
        while flight.wal.step() {}
    }
    assert_eq!(flight.acknowledged(), [2, 3, 4]);
}

#[test]
fn a_torn_frame_takes_along_what_was_durable_behind_it() {
    let flight = Flight::new(4);
    (2..=3).for_each(|index| flight.submit(1, index));
    // A frame that knows the second to be durable would prove the first as well, if it counted what completed.
    flight.complete(1);
    (4..=9).for_each(|index| flight.submit(1, index));
    assert_eq!(flight.fs.waiting(), 3, "two more frames behind the one that is late");
    flight.complete(1);
    assert!(flight.acknowledged().is_empty());
    let Flight { fs, clock, wal, .. } = flight;
    drop(wal);
    for seed in 0..8 {
        // The late frame had reached nothing: what the crash takes from it is all of it.
        fs.crash(seed);
    }
    fs.hold(false);
    let (wal, report) = open(&fs, &clock, 2).unwrap();
    assert_eq!(report.torn.as_ref().map(|torn| torn.why), Some(TornWhy::AfterGap), "{report:?}");
    assert!(report.damaged.is_empty() && report.void_frames == 0, "{report:?}");
    assert_eq!(wal.group(GroupId(1)).unwrap().last_index, 1);
    wal.commit(append(1, 2, 20)).unwrap();
    drop(wal);
    let (wal, report) = open(&fs, &clock, 3).unwrap();
    assert!(report.damaged.is_empty() && report.torn.is_none(), "the cut is in force: {report:?}");
    assert!(report.void_frames > 0, "{report:?}");
    assert_eq!(wal.group(GroupId(1)).unwrap().last_index, 2);
}

#[test]
fn after_a_failed_write_nothing_is_acknowledged_whatever_completes() {
    for failed_first in [true, false] {
        let flight = Flight::new(2);
        (2..=3).for_each(|index| flight.submit(1, index));
        if failed_first {
            flight.fs.fail_nth(OpKind::Write, 0, Fault::Io);
            flight.fail(0);
            flight.complete(0);
        } else {
            flight.complete(1);
            flight.fs.fail_nth(OpKind::Write, 0, Fault::Io);
            flight.fail(0);
        }
        assert!(flight.acknowledged().is_empty());
        assert_eq!(flight.told.failed.lock().unwrap().len(), 1);
        assert!(matches!(flight.wal.commit(append(1, 4, 10)), Err(Error::Poisoned { .. })));
        assert_eq!(flight.fs.waiting(), 0, "nothing is written any more");
    }
}

#[test]
fn the_opening_frame_is_alone_whatever_waits() {
    let (fs, clock) = (SimFs::new(), Arc::new(HandClock::default()));
    let (wal, _) = Wal::open(Options { write_depth: 4, ..options(&fs, &clock, 1) }).unwrap();
    let door = wal.submitter(Arc::new(Told::default()));
    fs.hold(true);
    for index in 1..=8 {
        let room = door.try_reserve(GroupId(1), 100).unwrap();
        door.submit(append(1, index, 10), room, index).unwrap();
        while wal.step() {}
    }
    // The background fills a segment meanwhile: one operation of its own.
    assert!(fs.waiting() <= 2, "{} operations", fs.waiting());
    while fs.complete_one() {
        while wal.step() {}
    }
    assert_eq!(wal.usage().pending_bytes, 0);
}

#[test]
fn a_head_is_carried_by_the_next_frame_though_both_were_under_way() {
    let flight = Flight::new(2);
    flight.submit(7, 1);
    flight.submit(8, 1);
    flight.complete(1);
    flight.complete(0);
    let Flight { fs, clock, wal, told, .. } = flight;
    assert_eq!(told.persisted.lock().unwrap().len(), 2);
    fs.hold(false);
    wal.close().unwrap();
    let segment: PathBuf =
        fs.files().into_iter().map(|(path, _)| path).find(|p| is_first_segment(p)).unwrap();
    // Opening frame, the entry of group 1, then the two that were under way together: the first of them rots.
    fs.tamper(&segment, |bytes| {
        let block = (0..bytes.len() / 4096)
            .find(|block| {
                let frame = &bytes[block * 4096..][..4096];
                frame.starts_with(b"PNTNFRAM") && frame[256..].windows(2).next() == Some(&[1, 7])
            })
            .expect("the frame is there");
        bytes[block * 4096..][..4096].fill(0);
    });
    let (wal, report) = open(&fs, &clock, 2).unwrap();
    let hit: Vec<GroupId> = report.damaged_groups.keys().copied().collect();
    assert_eq!(hit, [GroupId(7)], "{report:?}");
    assert_eq!(wal.group(GroupId(8)).unwrap().last_index, 1);
}

fn is_first_segment(path: &Path) -> bool {
    path.to_string_lossy().ends_with("seg-00000001.wal")
}

#[derive(Default)]
struct Events(Mutex<Vec<WalEvent>>);

impl PersistSink for Events {
    fn persisted(&self, _done: &[Persisted]) {}

    fn failed(&self, error: &Error) {
        panic!("{error}");
    }

    fn event(&self, event: &WalEvent) {
        self.0.lock().unwrap().push(event.clone());
    }
}

#[test]
fn a_write_that_takes_long_is_told_twice() {
    let flight = Flight::new(2);
    let events = Arc::new(Events::default());
    let _door = flight.wal.submitter(events.clone());
    flight.submit(1, 2);
    for _ in 0..30 {
        flight.clock.advance(Duration::from_millis(50));
        while flight.wal.step() {}
    }
    let stalls = [100, 1000].map(|ms| WalEvent::Stalled { waited: Duration::from_millis(ms) });
    assert_eq!(*events.0.lock().unwrap(), stalls);
    flight.complete(0);
    assert_eq!(flight.acknowledged(), [2]);
}

#[test]
fn a_segment_that_is_not_ready_is_told_once_and_counted() {
    let (fs, clock) = (SimFs::new(), Arc::new(HandClock::default()));
    let (wal, _) = Wal::open(options(&fs, &clock, 1)).unwrap();
    wal.commit(append(1, 1, 10)).unwrap();
    while wal.step() {}
    let events = Arc::new(Events::default());
    let door = wal.submitter(events.clone());
    let unprepared = || events.0.lock().unwrap().iter().filter(|it| **it == WalEvent::Unprepared).count();
    wal.hold_growth(true);
    // Batches from the reserve are taken even if there is no segment left for them.
    for index in 2..=60 {
        door.submit(append(1, index, 20_000), door.try_reserve_internal(GroupId(1)), index).unwrap();
        while wal.step() {}
    }
    assert_eq!((unprepared(), wal.metrics().rotations_waited), (1, 1));
    wal.hold_growth(false);
    while wal.step() {}
    let metrics = wal.metrics();
    assert_eq!((metrics.batches, metrics.records, metrics.queued_batches), (60, 60, 0));
    assert!(metrics.batch_bytes > 59 * 20_000 && metrics.frame_bytes > metrics.batch_bytes);
    assert!(metrics.frames > metrics.frame_latency.count && metrics.merge_factor().unwrap() >= 1.0);
    assert_eq!(metrics.frame_latency.counts.iter().sum::<u64>(), metrics.frame_latency.count);
    assert!(metrics.rotations > 4 && metrics.checkpoints > 0 && metrics.stalls == 0);
    assert_eq!(metrics.usage, wal.usage());
}
