//! Groups that lag do not keep what the others wrote: what is still needed of nearly dead segments moves to the cold stream,
//! and stays readable, through restarts and at any pressure.

use std::sync::{Arc, Mutex};

use pontoon_wal::{
    Batch, Entry, Error, GroupId, Options, PersistSink, Persisted, Wal, WalEvent,
    sim::{Fault, OpKind, SimFs},
    tools,
};

#[path = "support/lib.rs"]
mod support;

use support::{DIR, HandClock, Model, Op, Rng, open, options};

const SEGMENT: u64 = 256 << 10;

fn sim() -> (SimFs, Arc<HandClock>) {
    (SimFs::new(), Arc::new(HandClock::default()))
}

fn settle(wal: &Wal) {
    while wal.step() {}
}

/// Hears of events.
#[derive(Default)]
struct Events(Mutex<Vec<WalEvent>>);

impl PersistSink for Events {
    fn persisted(&self, _: &[Persisted]) {}
    fn failed(&self, error: &Error) {
        panic!("{error}");
    }
    fn event(&self, event: &WalEvent) {
        self.0.lock().unwrap().push(event.clone());
    }
}

/// Writes so many rounds in which many groups come and go, and a few keep what they have.
fn churn(wal: &Wal, model: &mut Model, rng: &mut Rng, rounds: u64, keeps: u64) {
    for round in 0..rounds {
        let mut batch = Batch::new();
        let group = GroupId(100 + round % 50);
        model.apply(group, &Op::Append { back: 0, count: 2, bytes: 9_000 }, &mut batch);
        model.apply(group, &Op::Truncate { keep: 1 }, &mut batch);
        if round % 8 == 0 {
            let lagging = GroupId(1 + rng.below(keeps));
            let back = rng.below(3);
            model.apply(lagging, &Op::Append { back, count: 3, bytes: 200 }, &mut batch);
        }
        wal.commit(batch).unwrap();
    }
}

#[test]
fn what_a_few_groups_keep_moves_and_the_rest_is_freed() {
    let (fs, clock) = sim();
    let (wal, _) = open(&fs, &clock, 1).unwrap();
    let (mut model, mut rng) = (Model::default(), Rng(1));
    churn(&wal, &mut model, &mut rng, 300, 3);
    let before = wal.usage();
    let stats = wal.gc_once().unwrap();
    let after = wal.usage();
    assert!(stats.records_relocated > 20 && stats.segments_freed > 10, "{stats:?}");
    assert!(before.segments > 20 && after.segments < 8 && after.cold_segments > 0, "{before:?} {after:?}");
    assert_eq!(stats.bytes_relocated, after.relocated_bytes);
    assert_eq!(model.differs(&wal), None);
    // Once more: relocated records can be relocated again.
    churn(&wal, &mut model, &mut rng, 300, 3);
    let mut batch = Batch::new();
    model.apply(GroupId(1), &Op::Truncate { keep: 2 }, &mut batch);
    model.apply(GroupId(2), &Op::Append { back: 4, count: 1, bytes: 10 }, &mut batch);
    wal.commit(batch).unwrap();
    wal.gc_once().unwrap();
    assert_eq!(model.differs(&wal), None);
    let pinned = wal.pinned(100);
    assert!(pinned.iter().any(|pin| pin.group == GroupId(3)), "{pinned:?}");
    wal.close().unwrap();
    let (wal, report) = open(&fs, &clock, 2).unwrap();
    assert!(report.damaged.is_empty() && report.damaged_groups.is_empty(), "{report:?}");
    assert_eq!(model.differs(&wal), None);
    let checked = tools::check(Arc::new(fs.clone()), DIR.as_ref(), None).unwrap();
    assert!(checked.is_whole(), "{checked:?}");
    let scrubbed = wal.scrub().unwrap();
    assert!(scrubbed.damaged.is_empty() && scrubbed.damaged_heads.is_empty(), "{scrubbed:?}");
}

#[test]
fn reopened_logs_relocate_on_and_lose_nothing() {
    let (fs, clock) = sim();
    let (mut model, mut rng) = (Model::default(), Rng(2));
    let mut relocated = 0;
    for open_nth in 0..8 {
        let (wal, report) = open(&fs, &clock, open_nth).unwrap();
        assert!(report.damaged.is_empty() && report.damaged_groups.is_empty(), "{report:?}");
        assert_eq!(model.differs(&wal), None, "open {open_nth}");
        churn(&wal, &mut model, &mut rng, 120, 4);
        relocated += wal.gc_once().unwrap().records_relocated;
        churn(&wal, &mut model, &mut rng, 10, 4);
        settle(&wal);
        match open_nth % 3 {
            0 => wal.close().unwrap(),
            1 => {
                drop(wal);
                fs.kill();
            }
            _ => {
                drop(wal);
                fs.crash(open_nth);
            }
        }
    }
    assert!(relocated > 50, "{relocated}");
}

#[test]
fn with_ease_relocation_takes_its_time() {
    let (fs, clock) = sim();
    let slow = Options { relocate_bytes_per_s: 1 << 20, ..options(&fs, &clock, 1) };
    let (wal, _) = Wal::open(slow).unwrap();
    let (mut model, mut rng) = (Model::default(), Rng(3));
    churn(&wal, &mut model, &mut rng, 200, 3);
    settle(&wal);
    let before = wal.usage();
    for _ in 0..200 {
        clock.advance(std::time::Duration::from_millis(100));
        settle(&wal);
    }
    let after = wal.usage();
    assert!(after.relocated_bytes > before.relocated_bytes, "{before:?} {after:?}");
    assert!(before.segments >= after.segments + 4, "{before:?} {after:?}");
    assert_eq!(model.differs(&wal), None);
}

#[test]
fn one_group_that_lags_never_stops_the_others_under_a_hard_limit() {
    let (fs, clock) = sim();
    let limit = 10 * SEGMENT;
    let (wal, _) = Wal::open(Options { size_limit_bytes: Some(limit), ..options(&fs, &clock, 1) }).unwrap();
    let heard = Arc::new(Events::default());
    let door = wal.submitter(heard.clone());
    let mut model = Model::default();
    let mut written = 0;
    for round in 0..3_000u64 {
        let mut batch = Batch::new();
        let group = GroupId(2 + round % 999);
        model.apply(group, &Op::Append { back: 0, count: 1, bytes: 12_000 }, &mut batch);
        model.apply(group, &Op::Truncate { keep: 0 }, &mut batch);
        if round < 1_000 && round % 10 == 0 {
            model.apply(GroupId(1), &Op::Append { back: 0, count: 1, bytes: 4_000 }, &mut batch);
        }
        written += batch.size_bytes();
        let room = door
            .try_reserve(group, batch.size_bytes())
            .unwrap_or_else(|error| panic!("round {round}: {error}: {:?} {:?}", wal.usage(), wal.pinned(3)));
        door.submit(batch, room, round).unwrap();
        settle(&wal);
        assert!(wal.usage().disk_bytes <= limit);
    }
    assert!(written > 12 * limit, "{written}");
    assert_eq!(model.differs(&wal), None);
    let events = heard.0.lock().unwrap();
    let named = events.iter().find_map(|event| match event {
        WalEvent::Pinned { groups } => groups.first().map(|pin| (pin.group, pin.first_index)),
        _ => None,
    });
    assert_eq!(named, Some((GroupId(1), 1)));
}

#[test]
fn a_reader_that_holds_the_old_place_is_not_disturbed() {
    let (fs, clock) = sim();
    let (wal, _) = open(&fs, &clock, 1).unwrap();
    let mut first = Batch::new();
    first.append(GroupId(7), &[Entry { index: 1, term: 1, kind: 0, data: "kept".into() }]);
    wal.commit(first).unwrap();
    let (mut model, mut rng) = (Model::default(), Rng(4));
    churn(&wal, &mut model, &mut rng, 60, 2);
    let read = || {
        let mut out = Vec::new();
        wal.entries(GroupId(7), 1..2, 100, &mut out).unwrap();
        assert_eq!(out[0].data, "kept");
    };
    // Relocation is held at each of its operations in turn.
    fs.hold(true);
    assert!(matches!(wal.gc_once(), Err(Error::Stalled)));
    loop {
        read();
        settle(&wal);
        if !fs.complete_one() {
            break;
        }
    }
    fs.hold(false);
    assert!(wal.gc_once().unwrap().records_relocated > 0 || wal.usage().relocated_bytes > 0);
    read();
}

#[test]
fn rot_is_not_copied_and_its_group_hears_of_it() {
    let (fs, clock) = sim();
    // Nothing is read before it rots.
    let (wal, _) = Wal::open(Options { relocate_bytes_per_s: 0, ..options(&fs, &clock, 1) }).unwrap();
    for group in [7, 8] {
        let data = format!("<{group}>").repeat(20).into();
        let mut batch = Batch::new();
        batch.append(GroupId(group), &[Entry { index: 1, term: 1, kind: 0, data }]);
        wal.commit(batch).unwrap();
    }
    let (mut model, mut rng) = (Model::default(), Rng(5));
    churn(&wal, &mut model, &mut rng, 60, 2);
    for (path, _) in fs.files() {
        fs.tamper(&path, |bytes| {
            if let Some(at) = bytes.windows(6).position(|window| window == b"<7><7>") {
                bytes[at] = b'!';
            }
        });
    }
    wal.gc_once().unwrap();
    let mut out = Vec::new();
    wal.entries(GroupId(8), 1..2, 100, &mut out).unwrap();
    let error = wal.entries(GroupId(7), 1..2, 100, &mut out).unwrap_err();
    assert!(matches!(error, Error::Damaged { group: GroupId(7), .. }), "{error}");
    wal.close().unwrap();
    let (wal, report) = open(&fs, &clock, 2).unwrap();
    assert_eq!(report.damaged_groups.keys().copied().collect::<Vec<_>>(), [GroupId(7)]);
    assert_eq!(model.group_differs(&wal, GroupId(1)), None);
}

#[test]
fn a_full_disk_under_a_cold_frame_passes() {
    for kind in [OpKind::Write, OpKind::Sync] {
        let (fs, clock) = sim();
        let (wal, _) = open(&fs, &clock, 1).unwrap();
        let (mut model, mut rng) = (Model::default(), Rng(6));
        churn(&wal, &mut model, &mut rng, 80, 2);
        settle(&wal);
        fs.fail_nth(kind, 0, Fault::NoSpace);
        let _ = wal.gc_once();
        settle(&wal);
        clock.advance(std::time::Duration::from_secs(1));
        settle(&wal);
        let stats = wal.gc_once().unwrap();
        assert!(wal.usage().relocated_bytes > 0, "{kind:?} {stats:?}");
        assert_eq!(model.differs(&wal), None);
        wal.close().unwrap();
        let (wal, _) = open(&fs, &clock, 2).unwrap();
        assert_eq!(model.differs(&wal), None);
    }
}
