//! Failing disks, full disks, foreign directories, locks.

use std::{path::Path, sync::Arc, time::Duration};

use pontoon_wal::{
    Batch, Durability, Entry, Error, Fs, GroupId, Options, SnapshotMeta, Wal,
    fs::{FileOp, OpenMode},
    sim::{Fault, OpKind, SimFs},
};

#[path = "support/lib.rs"]
mod support;

use support::{DIR, HandClock, Told, open, options};

fn entry(index: u64, bytes: usize) -> Entry {
    Entry { index, term: 1, kind: 0, data: vec![index as u8; bytes].into() }
}

fn append(group: u64, index: u64, bytes: usize) -> Batch {
    let mut batch = Batch::new();
    batch.append(GroupId(group), &[entry(index, bytes)]);
    batch
}

fn sim() -> (SimFs, Arc<HandClock>) {
    (SimFs::new(), Arc::new(HandClock::default()))
}

#[test]
fn a_failed_sync_poisons_once_and_no_later_success_follows() {
    for (kind, fault) in [
        (OpKind::Sync, Fault::Io),
        (OpKind::Write, Fault::Io),
        (OpKind::Write, Fault::Short),
        (OpKind::Sync, Fault::NoSpace),
    ] {
        let (fs, clock) = sim();
        let (wal, _) = open(&fs, &clock, 1).unwrap();
        wal.commit(append(1, 1, 10)).unwrap();
        while wal.step() {}
        let told = Arc::new(Told::default());
        let door = wal.submitter(told.clone());
        fs.fail_nth(kind, 0, fault);
        let room = door.try_reserve(GroupId(1), 100).unwrap();
        door.submit(append(1, 2, 10), room, 7).unwrap();
        while wal.step() {}
        let syncs = fs.counts().syncs;
        assert_eq!(told.failed.lock().unwrap().len(), 1, "{kind:?} {fault:?}");
        assert!(told.persisted.lock().unwrap().is_empty());
        assert!(matches!(wal.commit(append(1, 3, 10)), Err(Error::Poisoned { .. })));
        assert!(matches!(door.try_reserve(GroupId(1), 1), Err(Error::Poisoned { .. })));
        clock.advance(Duration::from_secs(1));
        while wal.step() {}
        assert_eq!(fs.counts().syncs, syncs, "the sync is not tried again");
        assert!(matches!(wal.close(), Err(Error::Poisoned { .. })));
        // Power fails too: the acknowledged entry is there, the other one as chance has it, whole or not.
        fs.crash(3);
        let (wal, report) = open(&fs, &clock, 2).unwrap();
        assert!(report.damaged_groups.is_empty());
        let last = wal.group(GroupId(1)).unwrap().last_index;
        assert!((1..=2).contains(&last), "{last}");
        wal.commit(append(1, last + 1, 10)).unwrap();
    }
}

#[test]
fn a_read_error_at_open_is_an_error_and_not_a_torn_tail() {
    let (fs, clock) = sim();
    let (wal, _) = open(&fs, &clock, 1).unwrap();
    wal.commit(append(1, 1, 10)).unwrap();
    wal.close().unwrap();
    let image = fs.image();
    for nth in 0..8 {
        let before = fs.counts().reads;
        fs.fail_nth(OpKind::Read, nth, Fault::Io);
        match open(&fs, &clock, 2) {
            Err(Error::Io { .. }) => {}
            Ok((wal, _)) => {
                assert!(fs.counts().reads - before <= nth, "a read failed and nobody noticed");
                assert_eq!(wal.group(GroupId(1)).unwrap().last_index, 1);
            }
            Err(error) => panic!("{error}"),
        }
        fs.restore(&image);
    }
}

#[test]
fn a_full_disk_refuses_ordinary_batches_and_lets_the_log_clean_up() {
    let (fs, clock) = sim();
    let (wal, _) = Wal::open(Options { prepared_segments: 2, ..options(&fs, &clock, 1) }).unwrap();
    wal.commit(append(1, 1, 10)).unwrap();
    while wal.step() {}
    fs.set_capacity(Some(6 * (256 << 10)));
    let mut index = 1;
    let refused = loop {
        match wal.commit(append(1, index + 1, 20_000)) {
            Ok(_) => index += 1,
            Err(error) => break error,
        }
        assert!(index < 1000, "the disk never filled");
    };
    assert!(matches!(refused, Error::NoSpace { .. }), "{refused}");
    // What the group needs to shrink passes, from the reserve.
    let told = Arc::new(Told::default());
    let door = wal.submitter(told.clone());
    let mut batch = Batch::new();
    batch.truncate_prefix(GroupId(1), index, 1);
    door.submit(batch, door.try_reserve_internal(GroupId(1)), 1).unwrap();
    while wal.step() {}
    assert_eq!(told.persisted.lock().unwrap().len(), 1);
    clock.advance(Duration::from_secs(2));
    while wal.step() {}
    for _ in 0..60 {
        index += 1;
        let mut batch = append(1, index, 20_000);
        batch.truncate_prefix(GroupId(1), index, 1);
        wal.commit(batch).unwrap_or_else(|error| panic!("{error}: {:?}", wal.usage()));
    }
    wal.close().unwrap();
    let (wal, _) = open(&fs, &clock, 2).unwrap();
    assert_eq!(wal.group(GroupId(1)).unwrap().last_index, index);
}

#[test]
fn the_size_limit_holds() {
    let (fs, clock) = sim();
    let limit = 8 * (256 << 10);
    let (wal, _) = Wal::open(Options { size_limit_bytes: Some(limit), ..options(&fs, &clock, 1) }).unwrap();
    let mut index = 0;
    while wal.commit(append(1, index + 1, 30_000)).is_ok() {
        index += 1;
        assert!(wal.usage().disk_bytes <= limit);
    }
    assert!(index > 20, "{index} {:?}", wal.usage());
    let door = wal.submitter(Arc::new(Told::default()));
    assert!(matches!(door.try_reserve(GroupId(1), 30_000), Err(Error::NoSpace { .. })));
    let mut batch = Batch::new();
    batch.destroy(GroupId(1), 5);
    door.submit(batch, door.try_reserve_internal(GroupId(1)), 1).unwrap();
    while wal.step() {}
    assert!(door.try_reserve(GroupId(1), 30_000).is_ok(), "{:?}", wal.usage());
}

#[test]
fn only_one_process_opens_a_log() {
    let (fs, clock) = sim();
    let (wal, _) = open(&fs, &clock, 1).unwrap();
    assert!(matches!(open(&fs, &clock, 2), Err(Error::Locked { .. })));
    wal.close().unwrap();
    open(&fs, &clock, 3).unwrap();

    let dir = tempfile::tempdir().unwrap();
    let real = || Options { segment_bytes: 256 << 10, ..Options::new(dir.path().join("log")) };
    let (wal, _) = Wal::open(real()).unwrap();
    assert!(matches!(Wal::open(real()), Err(Error::Locked { .. })));
    drop(wal);
    Wal::open(real()).unwrap();
}

#[test]
fn foreign_and_newer_directories_are_refused_by_name() {
    let (fs, clock) = sim();
    fs.create_dir(Path::new(DIR)).unwrap();
    drop(fs.open(&Path::new(DIR).join("holiday.jpg"), OpenMode::Create).unwrap());
    let error = open(&fs, &clock, 1).unwrap_err();
    assert!(matches!(error, Error::Foreign { .. }) && error.to_string().contains("holiday.jpg"), "{error}");

    let (fs, clock) = sim();
    open(&fs, &clock, 1).unwrap().0.close().unwrap();
    let manifest = Path::new(DIR).join("manifest-a");
    fs.tamper(&manifest, |bytes| {
        bytes[12] = 200;
        let crc = crc32c::crc32c(&bytes[12..128]);
        bytes[8..12].copy_from_slice(&crc.to_le_bytes());
    });
    let error = open(&fs, &clock, 1).unwrap_err();
    assert!(matches!(&error, Error::NewerFormat { path, found: 200, .. } if *path == manifest), "{error}");

    let (fs, clock) = sim();
    drop(fs.open(Path::new(DIR), OpenMode::Create).unwrap().submit(FileOp::SetLen(3)));
    assert!(matches!(open(&fs, &clock, 1), Err(Error::Foreign { .. })));
}

#[test]
fn an_empty_directory_becomes_a_log() {
    let dir = tempfile::tempdir().unwrap();
    let (wal, report) = Wal::open(Options { segment_bytes: 256 << 10, ..Options::new(dir.path()) }).unwrap();
    assert!(report.created);
    wal.commit(append(1, 1, 10)).unwrap();
    wal.close().unwrap();
    let reader = Wal::open_read_only(dir.path()).unwrap();
    assert_eq!(reader.group(GroupId(1)).unwrap().last_index, 1);
}

#[test]
fn callers_mistakes_are_refused_and_leave_nothing_behind() {
    let (fs, clock) = sim();
    let (wal, _) = open(&fs, &clock, 1).unwrap();
    wal.commit(append(1, 1, 10)).unwrap();
    let mut batch = Batch::new();
    batch.append(GroupId(2), &[entry(1, 1)]).append(GroupId(1), &[entry(5, 1)]);
    assert!(matches!(wal.commit(batch), Err(Error::Gap { expected: 2, found: 5, .. })));
    assert_eq!(wal.group(GroupId(2)), None, "a batch is whole or not at all");
    let mut batch = Batch::new();
    batch.append(GroupId(1), &[entry(2, 1), entry(4, 1)]);
    assert!(matches!(wal.commit(batch), Err(Error::Gap { expected: 3, found: 4, .. })));
    let mut batch = Batch::new();
    batch.truncate_prefix(GroupId(1), 9, 1);
    assert!(matches!(wal.commit(batch), Err(Error::Unavailable { last: 1 })));
    let mut batch = Batch::new();
    batch.truncate_prefix(GroupId(1), 1, 3);
    assert!(matches!(wal.commit(batch), Err(Error::TermMismatch { ours: 1, given: 3, .. })));
    let mut batch = Batch::new();
    batch.truncate_prefix(GroupId(1), 1, 1);
    wal.commit(batch).unwrap();
    assert!(matches!(wal.commit(append(1, 1, 1)), Err(Error::Compacted { first: 2 })));
    assert!(matches!(wal.commit(append(1, 2, 80_000)), Err(Error::TooLarge { .. })));
    // An index so high that nothing could follow it is a mistake, not a panic.
    let meta = SnapshotMeta { index: u64::MAX, ..SnapshotMeta::default() };
    let mut batches = [append(1, u64::MAX, 1), Batch::new(), Batch::new(), Batch::new()];
    batches[1].reset_to(GroupId(1), u64::MAX, 1);
    batches[2].truncate_prefix(GroupId(1), u64::MAX, 1);
    batches[3].snapshot(GroupId(1), &meta);
    for batch in batches {
        assert!(matches!(wal.commit(batch), Err(Error::TooLarge { what: "an index", .. })));
    }
    let mut batch = Batch::new();
    batch.put_meta(GroupId(1), b"k", &[0; 65 << 10]);
    assert!(matches!(wal.commit(batch), Err(Error::TooLarge { .. })));
    let mut out = Vec::new();
    assert!(matches!(wal.entries(GroupId(1), 1..2, 9, &mut out), Err(Error::Compacted { first: 2 })));
    assert!(matches!(wal.entries(GroupId(1), 2..3, 9, &mut out), Err(Error::Unavailable { last: 1 })));
    assert!(matches!(wal.entries(GroupId(9), 1..2, 9, &mut out), Err(Error::Unavailable { last: 0 })));
    assert_eq!((wal.term(GroupId(1), 1).unwrap(), wal.term(GroupId(9), 0).unwrap()), (1, 0));
}

#[test]
fn each_open_has_its_own_token_even_from_one_seed() {
    let (fs, clock) = sim();
    let mut tokens = std::collections::BTreeSet::new();
    let mut store = None;
    for round in 0..5 {
        let (wal, _) = open(&fs, &clock, 1).unwrap();
        assert!(tokens.insert(wal.incarnation()));
        assert_eq!(*store.get_or_insert(wal.store_id()), wal.store_id());
        wal.commit(append(1, round + 1, 1)).unwrap();
        wal.close().unwrap();
    }
}

#[test]
fn nothing_is_written_before_the_first_append() {
    let (fs, clock) = sim();
    open(&fs, &clock, 1).unwrap().0.close().unwrap();
    let before = fs.counts();
    let (wal, _) = open(&fs, &clock, 2).unwrap();
    clock.advance(Duration::from_secs(1));
    while wal.step() {}
    wal.gc_once().unwrap();
    wal.close().unwrap();
    assert_eq!(fs.counts().changes, before.changes);
}

#[test]
fn a_log_without_syncs_keeps_what_its_checkpoints_state() {
    let (fs, clock) = sim();
    let unsynced = || Options { durability: Durability::System, ..options(&fs, &clock, 1) };
    let (wal, _) = Wal::open(unsynced()).unwrap();
    for index in 1..=40 {
        wal.commit(append(1, index, 5_000)).unwrap();
    }
    wal.gc_once().unwrap();
    for index in 41..=60 {
        wal.commit(append(1, index, 5_000)).unwrap();
    }
    drop(wal);
    fs.crash(5);
    let (wal, report) = Wal::open(unsynced()).unwrap();
    assert!(report.damaged_groups.is_empty(), "{report:?}");
    let last = wal.group(GroupId(1)).unwrap().last_index;
    assert!((40..=60).contains(&last), "{last}");
    let mut out = Vec::new();
    wal.entries(GroupId(1), 1..last + 1, u64::MAX, &mut out).unwrap();
    assert_eq!(out.len() as u64, last);
}

#[test]
fn held_operations_delay_acknowledgement_and_nothing_else() {
    let (fs, clock) = sim();
    let (wal, _) = open(&fs, &clock, 1).unwrap();
    wal.commit(append(1, 1, 10)).unwrap();
    while wal.step() {}
    let told = Arc::new(Told::default());
    let door = wal.submitter(told.clone());
    fs.hold(true);
    for index in 2..=4 {
        let room = door.try_reserve(GroupId(1), 100).unwrap();
        door.submit(append(1, index, 10), room, index).unwrap();
    }
    while wal.step() {}
    assert_eq!(wal.group(GroupId(1)).unwrap().last_index, 4, "readers see it at once");
    let mut out = Vec::new();
    wal.entries(GroupId(1), 1..5, u64::MAX, &mut out).unwrap();
    assert_eq!(out.len(), 4);
    assert!(told.persisted.lock().unwrap().is_empty());
    let mut completed = 0;
    while fs.complete_one() {
        completed += 1;
        while wal.step() {}
    }
    assert_eq!(completed, 2, "three batches, one write, one sync");
    let tokens: Vec<u64> = told.persisted.lock().unwrap().iter().map(|done| done.token).collect();
    assert_eq!(tokens, [2, 3, 4]);
}

#[test]
fn a_log_that_may_not_grow_lives_on_what_it_has_and_grows_again_when_it_may() {
    let (fs, clock) = sim();
    let mut options = options(&fs, &clock, 1);
    options.prepared_segments = 4;
    let (wal, _) = Wal::open(options).unwrap();
    let files =
        || fs.read_dir(Path::new(DIR)).unwrap().iter().filter(|name| name.starts_with("seg-")).count();
    wal.commit(append(1, 1, 10)).unwrap();
    while wal.step() {}
    let before = files();
    wal.hold_growth(true);
    let mut index = 2;
    let refused = loop {
        match wal.commit(append(1, index, 20_000)) {
            Ok(_) => index += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, Error::NoSpace { .. }), "{refused}");
    assert!(index > 2, "prepared segments are used");
    assert_eq!(files(), before);
    wal.hold_growth(false);
    while wal.step() {}
    wal.commit(append(1, index, 20_000)).unwrap();
    assert!(files() > before);
}

#[test]
fn a_group_over_its_quota_waits_and_the_others_go_on() {
    let (fs, clock) = sim();
    let mut options = options(&fs, &clock, 1);
    options.group_quota_bytes = Some(50_000);
    let (wal, _) = Wal::open(options).unwrap();
    let door = wal.submitter(Arc::new(Told::default()));
    let write = |group: u64, index: u64| {
        let batch = append(group, index, 10_000);
        let room = door.try_reserve(GroupId(group), batch.size_bytes())?;
        door.submit(batch, room, index).map(drop)?;
        while wal.step() {}
        Ok::<(), Error>(())
    };
    let mut index = 1;
    let refused = loop {
        match write(7, index) {
            Ok(()) => index += 1,
            Err(error) => break error,
        }
    };
    let Error::Quota { group, held_bytes, quota_bytes: 50_000 } = refused else { panic!("{refused}") };
    assert!(group == GroupId(7) && (50_000..70_000).contains(&held_bytes), "{held_bytes}");
    (1..=4).for_each(|index| write(8, index).unwrap());
    // What the group needs in order to live is never refused; truncation brings room.
    let mut batch = Batch::new();
    batch.truncate_prefix(GroupId(7), index - 2, 1);
    door.submit(batch, door.try_reserve_internal(GroupId(7)), 0).unwrap();
    while wal.step() {}
    write(7, index).unwrap();
}
