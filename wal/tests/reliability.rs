//! The faults that other logs were caught by, one test each. R01 to R12 are the names of the cases in `docs/testing.md`.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use pontoon_wal::{
    Batch, DamageWhy, Entry, Error, GroupId, Options, RecoveryReport, TornWhy, Wal,
    sim::{Fault, OpKind, SimFs, SimImage},
};

#[path = "support/lib.rs"]
mod support;

use support::{HandClock, Model, Op, Rng, Script, Told, bytes_of, open, options};

fn entry(group: u64, index: u64, bytes: usize) -> Entry {
    let mut data = format!("<{group}:{index}>").into_bytes();
    data.resize(bytes.max(data.len()), b'.');
    Entry { index, term: 1, kind: 0, data: data.into() }
}

fn append(group: u64, index: u64, bytes: usize) -> Batch {
    let mut batch = Batch::new();
    batch.append(GroupId(group), &[entry(group, index, bytes)]);
    batch
}

fn sim() -> (SimFs, Arc<HandClock>) {
    (SimFs::new(), Arc::new(HandClock::default()))
}

fn settle(wal: &Wal) {
    while wal.step() {}
}

/// Lets the watermark be written.
fn idle(wal: &Wal, clock: &HandClock) {
    settle(wal);
    clock.advance(Duration::from_millis(10));
    settle(wal);
}

fn segments(fs: &SimFs) -> Vec<PathBuf> {
    let files = fs.files().into_iter().map(|(path, _)| path);
    files.filter(|path| path.to_string_lossy().ends_with(".wal")).collect()
}

/// Where these bytes stand.
fn find(fs: &SimFs, what: &[u8]) -> (PathBuf, usize) {
    let found = segments(fs).into_iter().find_map(|path| {
        let at = bytes_of(fs, &path).windows(what.len()).position(|window| window == what)?;
        Some((path, at))
    });
    found.unwrap_or_else(|| panic!("{} is nowhere", String::from_utf8_lossy(what)))
}

fn last(wal: &Wal, group: u64) -> u64 {
    wal.group(GroupId(group)).map_or(0, |view| view.last_index)
}

fn read_all(wal: &Wal, group: u64) -> Vec<u64> {
    let view = wal.group(GroupId(group)).unwrap();
    let mut out = Vec::new();
    wal.entries(GroupId(group), view.first_index..view.last_index + 1, u64::MAX, &mut out).unwrap();
    out.iter().for_each(|got| assert_eq!(*got, entry(group, got.index, got.data.len())));
    out.into_iter().map(|entry| entry.index).collect()
}

/// 1,000 entries of 50 groups in turn, 20 to a batch, and a watermark; the process died.
fn interleaved() -> (SimFs, Arc<HandClock>) {
    let (fs, clock) = sim();
    let (wal, _) = open(&fs, &clock, 1).unwrap();
    for round in 0..50 {
        let mut batch = Batch::new();
        for nth in 0..20 {
            let serial = round * 20 + nth;
            let (group, index) = (1 + serial % 50, 1 + serial / 50);
            batch.append(GroupId(group), &[entry(group, index, 40)]);
        }
        wal.commit(batch).unwrap();
    }
    idle(&wal, &clock);
    drop(wal);
    fs.kill();
    (fs, clock)
}

#[test]
fn r01_a_flipped_bit_in_the_last_segment_is_damage_and_never_a_cut() {
    let (fs, clock) = interleaved();
    let image = fs.image();
    let (path, payload) = find(&fs, b"<7:11>");
    let record = payload - 45;
    // CRC, length, kind, count, group, index, term, the entry's length, its kind, payload.
    for class in [0, 4, 8, 12, 16, 24, 32, 40, 44, 47] {
        fs.restore(&image);
        fs.tamper(&path, |bytes| bytes[record + class] ^= 1).unwrap();
        let (wal, report) = open(&fs, &clock, 2).unwrap();
        assert_eq!(report.torn, None, "byte {class}");
        let damaged = &report.damaged[..];
        assert!(
            matches!(damaged, [one] if one.path == path && one.offset == record as u64
                && one.group == GroupId(7) && one.entries == Some((11, 12))),
            "byte {class}: {damaged:?}"
        );
        assert_eq!(report.damaged_groups.keys().collect::<Vec<_>>(), [&GroupId(7)]);
        for group in (1..=50).filter(|group| *group != 7) {
            assert_eq!(read_all(&wal, group), (1..=20).collect::<Vec<_>>(), "byte {class}");
            wal.commit(append(group, 21, 10)).unwrap();
        }
        assert!(matches!(wal.commit(append(7, 21, 10)), Err(Error::Damaged { .. })));
    }
}

#[test]
fn r02_zeros_in_the_middle_are_never_the_end_of_the_log() {
    let (fs, clock) = interleaved();
    let image = fs.image();
    let path = segments(&fs).remove(0);
    let used = bytes_of(&fs, &path).iter().rposition(|byte| *byte != 0).unwrap();
    for size in [512, 4096] {
        for start in (0..used).step_by(size) {
            fs.restore(&image);
            fs.tamper(&path, |bytes| bytes[start..start + size].fill(0)).unwrap();
            let (wal, report) = open(&fs, &clock, 2).unwrap();
            assert_eq!(report.torn, None, "{size} zeros at {start}");
            for group in (1..=50).filter(|group| !report.damaged_groups.contains_key(&GroupId(*group))) {
                assert_eq!(read_all(&wal, group).len(), 20, "{size} zeros at {start}");
            }
        }
    }
    // A hole that swallows whole frames with all copies of their heads: nobody can say whom it hits.
    for size in [16 << 10, 64 << 10] {
        fs.restore(&image);
        fs.tamper(&path, |bytes| bytes[8192..8192 + size].fill(0)).unwrap();
        let error = open(&fs, &clock, 2).unwrap_err();
        assert!(matches!(&error, Error::Corrupt { path: named, .. } if *named == path), "{error}");
    }
}

#[test]
fn r03_the_last_batch_of_a_segment_that_is_not_the_last_is_no_tail() {
    let (fs, clock) = sim();
    let (wal, _) = open(&fs, &clock, 1).unwrap();
    for index in 1..=40 {
        wal.commit(append(1 + index % 2, index.div_ceil(2), 20_000)).unwrap();
        settle(&wal);
    }
    idle(&wal, &clock);
    drop(wal);
    fs.kill();
    let image = fs.image();
    let mut hit = 0;
    let files = segments(&fs);
    for path in &files {
        let bytes = bytes_of(&fs, path);
        // The last payload in the file: everything behind it is another segment's matter.
        let Some(at) = bytes.windows(2).rposition(|window| window == b"..") else { continue };
        fs.restore(&image);
        fs.tamper(path, |bytes| bytes[at] ^= 1).unwrap();
        let (wal, report) = open(&fs, &clock, 2).unwrap();
        assert_eq!(report.torn, None);
        let (damaged, _) = support::damage(&wal, &report);
        assert!(matches!(&damaged[..], [one] if one.path == *path), "{damaged:?}");
        hit += 1;
    }
    assert!(hit >= 3, "{hit} of {files:?}");
}

#[test]
fn r04_the_last_batch_is_ambiguous_until_its_watermark_and_no_longer() {
    let (fs, clock) = sim();
    let (wal, _) = open(&fs, &clock, 1).unwrap();
    wal.commit(append(1, 1, 40)).unwrap();
    wal.commit(append(2, 1, 40)).unwrap();
    let before = fs.image();
    idle(&wal, &clock);
    let after = fs.image();
    drop(wal);
    let rot = |image: &SimImage| {
        fs.restore(image);
        let (path, at) = find(&fs, b"<2:1>");
        fs.tamper(&path, |bytes| bytes[at] ^= 1).unwrap();
        open(&fs, &clock, 2).unwrap()
    };
    // A crash and rot of the same frame within 5 ms looks like a torn write: it is cut, and the report says where.
    let (wal, report) = rot(&before);
    assert_eq!(report.torn.as_ref().map(|torn| torn.why), Some(TornWhy::NotWhole), "{report:?}");
    assert!(report.damaged.is_empty(), "{report:?}");
    assert_eq!((last(&wal, 1), last(&wal, 2)), (1, 0));
    drop(wal);
    // From the watermark on it is damage.
    let (wal, report) = rot(&after);
    assert_eq!(report.torn, None);
    assert!(report.damaged.iter().all(|record| record.why == DamageWhy::Changed), "{report:?}");
    assert_eq!(report.damaged_groups.keys().collect::<Vec<_>>(), [&GroupId(2)]);
    assert_eq!(read_all(&wal, 1), [1]);
}

/// Hands a script in through a submitter; how many batches were acknowledged, and how many handed in.
fn play(wal: &Wal, script: &Script, rng: &mut Rng) -> (usize, usize) {
    let told = Arc::new(Told::default());
    let door = wal.submitter(told.clone());
    let mut submitted = 0;
    for batch in &script.batches {
        let room = door.try_reserve_internal(GroupId(1));
        if door.submit(batch.clone(), room, submitted as u64).is_err() {
            break;
        }
        submitted += 1;
        for _ in 0..rng.below(4) {
            wal.step();
        }
    }
    settle(wal);
    (told.persisted.lock().unwrap().len(), submitted)
}

fn state_of(
    wal: &Wal,
    report: &RecoveryReport,
    script: &Script,
    range: (usize, usize),
    context: &str,
) -> usize {
    assert!(report.damaged.is_empty() && report.damaged_groups.is_empty(), "{context}: {report:?}");
    let found = (range.0..=range.1).rev().find(|state| script.states[*state].differs(wal).is_none());
    found.unwrap_or_else(|| {
        panic!("{context}: none of the states {range:?}: {:?}", script.states[range.1].differs(wal))
    })
}

/// Lets one operation of each kind and number fail; the process ends and starts again, then power is cut. Returns how
/// often the log stopped and how often it went on.
fn fail_each(kind: OpKind, fault: Fault, batches: usize) -> (usize, usize) {
    let script = Script::draw(9, batches, 4);
    let (mut stopped, mut went_on) = (0, 0);
    for nth in 0.. {
        let context = format!("{kind:?} {nth}, {fault:?}");
        let (fs, clock) = sim();
        let (wal, _) = open(&fs, &clock, 1).unwrap();
        let before = fs.counts();
        fs.fail_nth(kind, nth, fault);
        let (acknowledged, submitted) = play(&wal, &script, &mut Rng(nth));
        let done = match kind {
            OpKind::Sync => fs.counts().syncs - before.syncs,
            OpKind::Write => fs.counts().writes - before.writes,
            _ => fs.counts().changes - before.changes,
        };
        if done <= nth {
            assert!(nth > 20, "the script is long enough");
            return (stopped, went_on);
        }
        let poisoned = matches!(wal.commit(Batch::new()), Err(Error::Poisoned { .. }));
        if poisoned {
            // Nothing is tried again, whatever time it is.
            let counts = fs.counts();
            clock.advance(Duration::from_secs(9));
            settle(&wal);
            assert_eq!(fs.counts(), counts, "{context}");
            stopped += 1;
        } else {
            clock.advance(Duration::from_secs(1));
            settle(&wal);
            assert_eq!(submitted, batches, "{context}");
            went_on += 1;
        }
        drop(wal);
        // The next process sees what the system still has in memory, and shows it to others.
        fs.kill();
        let (wal, report) = open(&fs, &clock, 2).unwrap_or_else(|error| panic!("{context}: {error}"));
        let shown = state_of(&wal, &report, &script, (acknowledged, submitted), &context);
        let mut model = script.states[shown].clone();
        let mut batch = Batch::new();
        model.salt(nth);
        model.apply(GroupId(1), &Op::Append { back: 0, count: 1, bytes: 30 }, &mut batch);
        wal.commit(batch).unwrap();
        drop(wal);
        fs.crash(nth);
        let (wal, report) = open(&fs, &clock, 3).unwrap_or_else(|error| panic!("{context}: {error}"));
        assert!(report.damaged.is_empty(), "{context}: {report:?}");
        assert_eq!(model.differs(&wal), None, "{context}");
    }
    unreachable!()
}

#[test]
fn r05_a_sync_that_fails_once_is_never_followed_by_a_success() {
    let (stopped, went_on) = fail_each(OpKind::Sync, Fault::Io, 60);
    assert!(stopped > 20 && went_on == 0, "{stopped} {went_on}");
}

#[test]
fn r06_no_room_at_any_operation_loses_nothing() {
    let (stopped, went_on) = fail_each(OpKind::Change, Fault::NoSpace, 60);
    assert!(stopped > 20 && went_on > 5, "{stopped} {went_on}");
}

#[test]
fn r06_a_full_disk_passes_without_a_restart() {
    let (fs, clock) = sim();
    let (wal, _) = open(&fs, &clock, 1).unwrap();
    wal.commit(append(1, 1, 10)).unwrap();
    settle(&wal);
    fs.set_capacity(Some(5 * (256 << 10)));
    let mut index = 1;
    while wal.commit(append(1, index + 1, 20_000)).is_ok() {
        index += 1;
    }
    assert!(matches!(wal.commit(append(2, 1, 20_000)), Err(Error::NoSpace { .. })));
    assert_eq!(read_all(&wal, 1).len() as u64, index, "nothing was deleted");
    fs.set_capacity(None);
    clock.advance(Duration::from_secs(1));
    settle(&wal);
    for more in index + 1..index + 30 {
        wal.commit(append(1, more, 20_000)).unwrap();
    }
    wal.close().unwrap();
    let (wal, _) = open(&fs, &clock, 2).unwrap();
    assert_eq!(last(&wal, 1), index + 29);
}

#[test]
fn r07_a_short_write_is_never_read_as_more_than_nothing() {
    let (stopped, went_on) = fail_each(OpKind::Write, Fault::Short, 60);
    assert!(stopped > 20 && went_on == 0, "{stopped} {went_on}");
}

/// Plays this with the disk watched: each moment before a change, with a number that `now` gives.
fn watched<T>(fs: &SimFs, now: Arc<Mutex<usize>>, act: impl FnOnce() -> T) -> (Vec<(SimImage, usize)>, T) {
    let moments = Arc::new(Mutex::new(Vec::new()));
    let noted = moments.clone();
    fs.watch(move |image| noted.lock().unwrap().push((image.clone(), *now.lock().unwrap())));
    let result = act();
    fs.unwatch();
    let moments = std::mem::take(&mut *moments.lock().unwrap());
    (moments, result)
}

#[test]
fn r08_names_reach_the_disk_in_any_order_or_not_at_all() {
    let (fs, clock) = sim();
    let acknowledged = Arc::new(Mutex::new(0));
    let (moments, ()) = watched(&fs, acknowledged.clone(), || {
        let (wal, _) = open(&fs, &clock, 1).unwrap();
        for index in 1..=30 {
            let mut batch = append(1, index, 30_000);
            batch.truncate_prefix(GroupId(1), index - 1, 1);
            wal.commit(batch).unwrap();
            *acknowledged.lock().unwrap() = index as usize;
            settle(&wal);
        }
    });
    let (mut tried, mut most) = (0, 0);
    for (image, acknowledged) in moments {
        let loose = image.loose(4096);
        let names: Vec<usize> = (0..loose.len())
            .filter(|piece| {
                !loose.describe(*piece).contains("/seg") || loose.describe(*piece).starts_with("Add")
            })
            .collect();
        most = most.max(names.len());
        for subset in 0..1usize << names.len().min(8) {
            for others in [false, true] {
                let kept = |piece| match names.iter().position(|name| *name == piece) {
                    Some(nth) => subset >> nth & 1 == 1,
                    None => others,
                };
                let fs = SimFs::from_image(&loose.power_cut(kept));
                let (wal, report) = open(&fs, &clock, 2).unwrap_or_else(|error| panic!("{error}"));
                assert!(report.damaged.is_empty());
                let last = last(&wal, 1) as usize;
                assert!((acknowledged..=acknowledged + 1).contains(&last), "{last} of {acknowledged}");
                tried += 1;
            }
        }
    }
    assert!(tried > 200 && most >= 2, "{tried} {most}");
    // A listed segment that is gone is named.
    let names = segments(&fs);
    let gone = names.iter().filter(|path| {
        let copy = SimFs::from_image(&fs.image());
        pontoon_wal::Fs::remove_file(&copy, path).unwrap();
        matches!(open(&copy, &clock, 3), Err(Error::Corrupt { path: named, .. }) if named == **path)
    });
    assert!(gone.count() >= 2, "{names:?}");
}

#[test]
fn r09_what_an_earlier_use_of_a_segment_left_is_nothing() {
    let (fs, clock) = sim();
    let (wal, _) = open(&fs, &clock, 1).unwrap();
    let mut rng = Rng(9);
    let mut index = 0;
    let mut stale = 0;
    for _ in 0..120 {
        index += 1;
        let mut batch = append(1, index, 9_000);
        batch.truncate_prefix(GroupId(1), index, 1);
        wal.commit(batch).unwrap();
        if index > 60 {
            let copy = SimFs::from_image(&fs.image());
            copy.crash(rng.next());
            let (again, report) = open(&copy, &clock, 2).unwrap();
            assert!(report.damaged.is_empty(), "{report:?}");
            assert_eq!(again.group(GroupId(1)).unwrap().truncated, (index, 1));
            let bytes = segments(&copy).iter().map(|path| bytes_of(&copy, path)).collect::<Vec<_>>().concat();
            let heads = bytes.chunks(4096).filter(|block| block.starts_with(b"PNTNFRAM")).count();
            stale = stale.max(heads as u64 - report.frames.min(heads as u64));
        }
    }
    assert!(stale > 10, "segments are used again with old frames in them: {stale}");
}

#[test]
fn r10_a_crash_anywhere_in_a_collection_keeps_each_group_and_no_ghost() {
    let (fs, clock) = sim();
    let (wal, _) = Wal::open(Options { prepared_segments: 2, ..options(&fs, &clock, 1) }).unwrap();
    let mut model = Model::default();
    let mut rng = Rng(10);
    let lagging = GroupId(900);
    for round in 0..400u64 {
        // Few groups hold much, many hold little, some are destroyed; one keeps what it has, and is relocated.
        let skew = 1 + rng.below(200);
        let group = GroupId(1 + rng.below(skew));
        let mut batch = Batch::new();
        let op = match round % 8 {
            0 => Op::Destroy { min_replica: round },
            1 => Op::Truncate { keep: 1 },
            _ => Op::Append { back: 0, count: 1, bytes: 4_000 / (1 + group.0 as usize) },
        };
        model.apply(group, &op, &mut batch);
        if round % 3 == 0 {
            model.apply(GroupId(1), &Op::Append { back: 0, count: 1, bytes: 8_000 }, &mut batch);
            model.apply(GroupId(1), &Op::Truncate { keep: 2 }, &mut batch);
        }
        if round % 16 == 0 {
            model.apply(lagging, &Op::Append { back: round / 16 % 3, count: 2, bytes: 100 }, &mut batch);
        }
        wal.commit(batch).unwrap();
    }
    let mut batch = Batch::new();
    // The last tenth keeps what it has.
    for group in 1..=180 {
        model.apply(GroupId(group), &Op::Truncate { keep: 0 }, &mut batch);
    }
    wal.commit(batch).unwrap();
    let (moments, stats) = watched(&fs, Arc::default(), || wal.gc_once().unwrap());
    assert!(stats.checkpoints > 1 && stats.segments_freed > 0 && moments.len() > 2, "{stats:?}");
    assert!(stats.records_relocated > 5, "{stats:?}");
    for (image, _) in moments {
        let loose = image.loose(512);
        for nth in 0..24u64 {
            let mut rng = Rng(nth);
            let percent = [0, 100, 50][nth.min(2) as usize];
            let fs = SimFs::from_image(&loose.power_cut(|_| rng.below(100) < percent));
            let (wal, report) = open(&fs, &clock, 2).unwrap();
            assert!(report.damaged.is_empty(), "{report:?}");
            assert_eq!(model.differs(&wal), None);
            // The collection is made again, and cut again.
            wal.commit(append(777, 1, 10)).unwrap();
            fs.fail_nth(OpKind::Change, rng.below(4), Fault::PowerCut);
            let _ = wal.gc_once();
            drop(wal);
            fs.crash(nth);
            let (wal, _) = open(&fs, &clock, 3).unwrap();
            let mut batch = Batch::new();
            batch.destroy(GroupId(777), 1);
            wal.commit(batch).unwrap();
            let mut model = model.clone();
            model.tombstones.insert(GroupId(777), 1);
            assert_eq!(model.differs(&wal), None);
        }
    }
}

#[test]
fn r11_a_whole_record_in_anothers_place_is_not_taken_for_it() {
    let (fs, clock) = interleaved();
    let image = fs.image();
    let (path, from) = find(&fs, b"<3:5>");
    let (other, to) = find(&fs, b"<4:9>");
    assert_eq!(path, other);
    let len = 45 + 40;
    fs.tamper(&path, |bytes| bytes.copy_within(from - 45..from - 45 + len, to - 45)).unwrap();
    let (wal, report) = open(&fs, &clock, 2).unwrap();
    let hit: BTreeSet<GroupId> = report.damaged_groups.keys().copied().collect();
    assert!(hit.contains(&GroupId(4)) && !hit.contains(&GroupId(3)), "{report:?}");
    assert_eq!(read_all(&wal, 3).len(), 20);
    drop(wal);
    // A write that never reached the disk, in the middle of a frame: the zeros of before.
    fs.restore(&image);
    fs.tamper(&path, |bytes| bytes[to / 512 * 512..(to / 512 + 1) * 512].fill(0)).unwrap();
    let (_, report) = open(&fs, &clock, 2).unwrap();
    assert!(report.damaged_groups.contains_key(&GroupId(4)) && report.torn.is_none(), "{report:?}");
}

#[test]
fn r12_a_sync_that_hangs_acknowledges_nothing_and_blocks_no_reader() {
    let (fs, clock) = sim();
    let small = Options { max_pending_bytes: 64 << 10, ..options(&fs, &clock, 1) };
    let (wal, _) = Wal::open(small).unwrap();
    wal.commit(append(1, 1, 10)).unwrap();
    settle(&wal);
    let told = Arc::new(Told::default());
    let door = wal.submitter(told.clone());
    fs.hold(true);
    let mut handed_in = 1;
    let busy = loop {
        match door.try_reserve(GroupId(1), 1_000) {
            Ok(room) => {
                handed_in += 1;
                door.submit(append(1, handed_in, 900), room, handed_in).unwrap();
            }
            Err(error) => break error,
        }
        settle(&wal);
    };
    assert!(matches!(busy, Error::Busy { .. }), "{busy}");
    for _ in 0..30 {
        clock.advance(Duration::from_secs(1));
        settle(&wal);
        assert!(told.persisted.lock().unwrap().is_empty());
    }
    assert_eq!(read_all(&wal, 1).len() as u64, handed_in, "readers go on");
    assert!(matches!(wal.commit(Batch::new()), Ok(_) | Err(Error::Stalled | Error::Busy { .. })));
    // What the group needs to live is taken still.
    let mut batch = Batch::new();
    batch.truncate_prefix(GroupId(1), 2, 1);
    door.submit(batch, door.try_reserve_internal(GroupId(1)), handed_in + 1).unwrap();
    // It comes back after all.
    while fs.complete_one() {
        settle(&wal);
    }
    let tokens: Vec<u64> = told.persisted.lock().unwrap().iter().map(|done| done.token).collect();
    assert_eq!(tokens, (2..=handed_in + 1).collect::<Vec<_>>());
    assert!(door.try_reserve(GroupId(1), 1_000).is_ok());
    // Or it never does: the process ends without having promised anything.
    let room = door.try_reserve(GroupId(1), 1_000).unwrap();
    door.submit(append(1, handed_in + 1, 10), room, 0).unwrap();
    settle(&wal);
    drop((door, wal));
    fs.crash(12);
    fs.hold(false);
    let (wal, _) = open(&fs, &clock, 2).unwrap();
    assert!((handed_in..=handed_in + 1).contains(&last(&wal, 1)));
}
