//! What `docs/coming-from.md` promises, one test for each row: what other logs offer, by our calls.

#![expect(
    clippy::disallowed_methods,
    reason = "files are changed behind the log's back, as disks and people do"
)]

use std::{
    collections::BTreeMap,
    ops::ControlFlow,
    path::Path,
    sync::{Arc, Mutex},
};

use pontoon_wal::{
    Batch, ConfState, DriverMode, Durability, Entry, Error, Fs, GroupId, HardState, KeyFile, KeyProvider,
    MetaInt, Options, PersistSink, Persisted, RealFs, SnapshotMeta, Wal, WalReader,
    sim::{Fault, OpKind},
    tools,
};

#[path = "support/lib.rs"]
mod support;

/// Defines the tests, and a list of their names to compare the page with.
macro_rules! rows {
    ($(fn $name:ident() $body:block)*) => {
        $(#[test] fn $name() $body)*
        const ROWS: &[&str] = &[$(stringify!($name)),*];
    };
}

const GROUP: GroupId = GroupId(7);

fn small(dir: &Path) -> Options {
    Options { segment_bytes: 256 << 10, ..Options::new(dir.join("log")) }
}

fn open(dir: &Path) -> Wal {
    Wal::open(small(dir)).unwrap().0
}

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn entry(index: u64) -> Entry {
    Entry { index, term: 1, kind: 0, data: vec![b'x'; 100].into() }
}

fn entries(to: u64) -> Vec<Entry> {
    (1..=to).map(entry).collect()
}

fn state(commit: u64) -> HardState {
    HardState { term: 1, vote: 2, commit }
}

fn members() -> ConfState {
    ConfState { voters: vec![1, 2, 3], ..ConfState::default() }
}

/// A log whose group holds entries 1 to `to`.
fn filled(dir: &Path, to: u64) -> Wal {
    let wal = open(dir);
    wal.storage(GROUP).save(&state(to), &entries(to), None).unwrap();
    wal
}

/// Changes a byte of the payload that holds only these bytes, in every file of the log.
fn rot(dir: &Path, needle: &[u8]) {
    for name in RealFs.read_dir(&dir.join("log")).unwrap() {
        let path = dir.join("log").join(name);
        let mut bytes = std::fs::read(&path).unwrap();
        if let Some(at) = bytes.windows(needle.len()).position(|window| window == needle) {
            bytes[at] ^= 1;
            std::fs::write(&path, bytes).unwrap();
        }
    }
}

rows! {
    fn make_or_open() {
        let dir = scratch();
        let (wal, report) = Wal::open(small(dir.path())).unwrap();
        assert!(report.created);
        wal.close().unwrap();
        assert!(!Wal::open(small(dir.path())).unwrap().1.created);
    }

    fn an_encrypted_one() {
        let dir = scratch();
        let file = dir.path().join("keys");
        KeyFile::create(&file).unwrap();
        let options = || {
            let keys: Arc<dyn KeyProvider> = Arc::new(KeyFile::open(&file).unwrap());
            Options { keys: Some(keys), ..small(dir.path()) }
        };
        let (wal, _) = Wal::open(options()).unwrap();
        wal.storage(GROUP).save(&state(2), &entries(2), None).unwrap();
        wal.close().unwrap();
        assert!(matches!(Wal::open(small(dir.path())), Err(Error::Key { .. })));
        assert_eq!(Wal::open(options()).unwrap().0.storage(GROUP).last_index().unwrap(), 2);
    }

    fn without_syncs() {
        let (fs, clock) = (pontoon_wal::sim::SimFs::new(), Arc::default());
        let options = Options { durability: Durability::System, ..support::options(&fs, &clock, 1) };
        let (wal, _) = Wal::open(options).unwrap();
        wal.storage(GROUP).save(&state(1), &entries(1), None).unwrap();
        while wal.step() {}
        let before = fs.counts().syncs;
        wal.storage(GROUP).save(&state(1), &[entry(2)], None).unwrap();
        assert_eq!(fs.counts().syncs, before);
    }

    fn open_at_a_snapshot() {
        let dir = scratch();
        let storage = filled(dir.path(), 5).storage(GROUP);
        storage.create_snapshot(3, &members(), "s".into()).unwrap();
        let (hard_state, behind) = storage.read_from(3, 1).unwrap();
        assert_eq!((hard_state, behind), (state(5), vec![entry(4), entry(5)]));
        assert_eq!(storage.read_from(5, 1).unwrap().1, []);
    }

    fn a_snapshot_that_the_log_does_not_reach() {
        let dir = scratch();
        let storage = filled(dir.path(), 5).storage(GROUP);
        storage.truncate_prefix(2).unwrap();
        assert!(matches!(storage.read_from(1, 1), Err(Error::Compacted { first: 3 })));
        assert!(matches!(storage.read_from(6, 1), Err(Error::Unavailable { last: 5 })));
    }

    fn a_snapshot_of_another_term() {
        let dir = scratch();
        let storage = filled(dir.path(), 5).storage(GROUP);
        assert!(matches!(storage.read_from(3, 9), Err(Error::TermMismatch { ours: 1, given: 9, .. })));
    }

    fn open_for_reading() {
        let dir = scratch();
        let wal = filled(dir.path(), 3);
        let mut out = Vec::new();
        // No lock is needed, and there is nothing to append with: the reader has no such call.
        let reader = Wal::open_read_only(&dir.path().join("log")).unwrap();
        reader.entries(GROUP, 1..4, u64::MAX, &mut out).unwrap();
        assert_eq!(out, entries(3));
        wal.close().unwrap();
    }

    fn read_all() {
        let dir = scratch();
        let storage = filled(dir.path(), 4).storage(GROUP);
        let made = storage.create_snapshot(2, &members(), "s".into()).unwrap();
        assert_eq!(storage.read_all().unwrap(), (Some(made), state(4), entries(4)));
        drop(storage);
        assert_eq!(open(dir.path()).storage(GROUP).read_all().unwrap().2, entries(4));
    }

    fn save() {
        let dir = scratch();
        let storage = open(dir.path()).storage(GROUP);
        storage.save(&state(2), &entries(3), None).unwrap();
        // As Raft hands it out: nothing changed.
        storage.save(&HardState::default(), &[], Some(&SnapshotMeta::default())).unwrap();
        assert_eq!(storage.initial_state().unwrap().0, state(2));
        // A conflicting entry cuts what stood behind it.
        let other = Entry { term: 2, ..entry(2) };
        storage.save(&HardState::default(), std::slice::from_ref(&other), None).unwrap();
        assert_eq!(storage.read_all().unwrap().2, [entry(1), other]);
        let came = SnapshotMeta { index: 9, term: 2, conf_state: members(), data: "s".into() };
        storage.save(&state(9), &[Entry { term: 2, ..entry(10) }], Some(&came)).unwrap();
        assert_eq!((storage.first_index().unwrap(), storage.last_index().unwrap()), (10, 10));
        assert_eq!(storage.snapshot().unwrap(), came);
    }

    fn entries_that_do_not_follow() {
        let dir = scratch();
        let storage = filled(dir.path(), 3).storage(GROUP);
        let gap = storage.save(&state(3), &[entry(5)], None);
        assert!(matches!(gap, Err(Error::Gap { expected: 4, found: 5, .. })));
        let torn = storage.save(&state(3), &[entry(4), entry(6)], None);
        assert!(matches!(torn, Err(Error::Gap { expected: 5, found: 6, .. })));
        assert_eq!(storage.last_index().unwrap(), 3);
    }

    fn an_entry_that_is_too_large() {
        let dir = scratch();
        let wal = open(dir.path());
        let data = vec![0; wal.max_batch_bytes() as usize].into();
        let saved = wal.storage(GROUP).save(&state(0), &[Entry { data, ..entry(1) }], None);
        assert!(matches!(saved, Err(Error::TooLarge { .. })));
    }

    fn save_a_snapshot() {
        let dir = scratch();
        let storage = filled(dir.path(), 5).storage(GROUP);
        let made = storage.create_snapshot(3, &members(), "s".into()).unwrap();
        assert_eq!((made.index, made.term, storage.snapshot().unwrap()), (3, 1, made.clone()));
        assert_eq!(storage.first_index().unwrap(), 1, "the log is truncated by its own call");
        let older = storage.create_snapshot(2, &members(), "s".into());
        assert!(matches!(older, Err(Error::Compacted { first: 4 })));
        let ahead = storage.create_snapshot(6, &members(), "s".into());
        assert!(matches!(ahead, Err(Error::Unavailable { last: 5 })));
    }

    fn release_what_is_behind() {
        let dir = scratch();
        let wal = open(dir.path());
        let storage = wal.storage(GROUP);
        for index in 1..=60 {
            let data = vec![b'y'; 20_000].into();
            storage.save(&state(index), &[Entry { data, ..entry(index) }], None).unwrap();
        }
        let before = storage.num_log_files();
        storage.truncate_prefix(60).unwrap();
        let freed = wal.gc_once().unwrap();
        assert!(before >= 4 && freed.segments_freed > 0 && storage.num_log_files() < before);
    }

    fn repair_a_torn_tail() {
        let (fs, clock) = (pontoon_wal::sim::SimFs::new(), Arc::default());
        let (wal, _) = support::open(&fs, &clock, 1).unwrap();
        wal.storage(GROUP).save(&state(1), &entries(1), None).unwrap();
        wal.storage(GROUP).save(&state(2), &[Entry { data: vec![1; 9_000].into(), ..entry(2) }], None).unwrap();
        drop(wal);
        fs.kill();
        let torn = tools::check(Arc::new(fs.clone()), Path::new(support::DIR), None).unwrap();
        let path = fs.files().into_iter().map(|(path, _)| path).find(|path| path.ends_with("seg-00000001.wal"));
        fs.tamper(&path.unwrap(), |bytes| {
            let last = bytes.iter().rposition(|byte| *byte != 0).unwrap();
            bytes[last - 5_000..].fill(0);
        });
        assert!(torn.is_whole() && torn.torn.is_none());
        // Opening is the repair; only what nobody was promised goes.
        let (wal, report) = support::open(&fs, &clock, 2).unwrap();
        assert!(report.torn.is_some() && report.damaged_groups.is_empty());
        assert_eq!(wal.storage(GROUP).read_all().unwrap().2, entries(1));
    }

    fn copy_what_is_readable() {
        let dir = scratch();
        filled(dir.path(), 3).close().unwrap();
        let target = Options { dir: dir.path().join("copy"), ..small(dir.path()) };
        let report = tools::copy(&dir.path().join("log"), target.clone()).unwrap();
        assert_eq!(report.losing().count(), 0);
        assert_eq!(Wal::open(target).unwrap().0.storage(GROUP).read_all().unwrap().2, entries(3));
    }

    fn metadata() {
        let dir = scratch();
        let storage = open(dir.path()).storage(GROUP);
        storage.put_meta(b"who", b"node 3").unwrap();
        storage.put_meta(b"whom", b"node 4").unwrap();
        assert_eq!(storage.meta(b"who").unwrap().as_deref(), Some(&b"node 3"[..]));
        let all = storage.scan_meta(b"w", b"x").unwrap();
        assert_eq!(all.iter().map(|(key, _)| &key[..]).collect::<Vec<_>>(), [&b"who"[..], b"whom"]);
        assert_eq!(storage.scan_meta(b"a", b"who").unwrap(), []);
        storage.put_meta(b"who", b"").unwrap();
        assert_eq!(storage.meta(b"who").unwrap(), None);
    }

    fn look_at_everything() {
        let dir = scratch();
        filled(dir.path(), 3).close().unwrap();
        let log = dir.path().join("log");
        let reader = Wal::open_read_only(&log).unwrap();
        assert_eq!(reader.dir(), log);
        assert_eq!(reader.salvage(GROUP, 0..u64::MAX, u64::MAX).unwrap().entries, entries(3));
        let mut held = Vec::new();
        tools::frames(&RealFs, &log, |frame| {
            let records = frame.records.unwrap_or_default();
            held.extend(records.into_iter().filter_map(|record| record.entries));
            ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!(held, [(1, 4)]);
    }

    fn is_it_a_log() {
        let dir = scratch();
        std::fs::write(dir.path().join("other"), "x").unwrap();
        let nothing = WalReader::open(Arc::new(RealFs), dir.path());
        assert!(matches!(nothing, Err(Error::Foreign { .. })));
        let foreign = Wal::open(Options::new(dir.path()));
        assert!(matches!(foreign, Err(Error::Foreign { .. })));
    }

    fn sync() {
        let dir = scratch();
        let wal = open(dir.path());
        let heard = Arc::new(Heard::default());
        let door = wal.submitter(heard.clone());
        let mut batch = Batch::new();
        batch.append(GROUP, &entries(1)).relaxed();
        let room = door.try_reserve(GROUP, batch.size_bytes()).unwrap();
        let lsn = door.submit(batch, room, 42).unwrap();
        assert!(wal.storage(GROUP).sync().unwrap() >= lsn);
        // Sinks are told by another thread; a close waits until they were.
        wal.close().unwrap();
        assert_eq!(heard.tokens(), [42]);
    }

    fn close() {
        let dir = scratch();
        let wal = filled(dir.path(), 1);
        assert!(matches!(Wal::open(small(dir.path())), Err(Error::Locked { .. })));
        let other = wal.clone();
        wal.close().unwrap();
        assert!(matches!(other.storage(GROUP).sync(), Err(Error::Closed)));
        open(dir.path()).close().unwrap();
    }

    fn verify() {
        let dir = scratch();
        let wal = open(dir.path());
        wal.storage(GROUP).save(&state(2), &[entry(1), Entry { data: "needle".into(), ..entry(2) }], None).unwrap();
        wal.close().unwrap();
        let log = dir.path().join("log");
        assert!(tools::check(Arc::new(RealFs), &log, None).unwrap().is_whole());
        rot(dir.path(), b"needle");
        let report = tools::check(Arc::new(RealFs), &log, None).unwrap();
        let [hit] = &report.damaged[..] else { panic!("{report:?}") };
        assert_eq!((hit.group, hit.entries), (GROUP, Some((1, 3))));
    }

    fn a_checksum_that_is_wrong() {
        let dir = scratch();
        // So large that the close leaves it to be scanned: behind a footer the damage would show at the read.
        let roomy = || Wal::open(Options { segment_bytes: 4 << 20, ..small(dir.path()) }).unwrap();
        let (wal, _) = roomy();
        wal.storage(GROUP).save(&state(1), &entries(1), None).unwrap();
        let needle = Entry { data: "needle".into(), ..entry(1) };
        wal.storage(GroupId(8)).save(&state(1), &[needle], None).unwrap();
        wal.close().unwrap();
        rot(dir.path(), b"needle");
        let (wal, report) = roomy();
        assert_eq!(report.damaged_groups.keys().collect::<Vec<_>>(), [&GroupId(8)]);
        let hit = wal.storage(GroupId(8));
        assert!(matches!(hit.read_all(), Err(Error::Damaged { .. })));
        assert!(matches!(hit.initial_state(), Err(Error::Damaged { .. })));
        assert!(matches!(hit.save(&state(2), &[], None), Err(Error::Damaged { .. })));
        assert_eq!(wal.storage(GROUP).read_all().unwrap().2, entries(1), "the others go on");
    }

    fn a_segment_that_is_missing() {
        let dir = scratch();
        filled(dir.path(), 1).close().unwrap();
        let path = dir.path().join("log/seg-00000001.wal");
        std::fs::remove_file(&path).unwrap();
        let missing = Wal::open(small(dir.path()));
        assert!(matches!(missing, Err(Error::Corrupt { path: named, .. }) if named == path));
    }

    fn two_logs_in_one_directory() {
        let (one, other) = (scratch(), scratch());
        filled(one.path(), 1).close().unwrap();
        filled(other.path(), 1).close().unwrap();
        std::fs::copy(other.path().join("log/manifest-a"), one.path().join("log/manifest-a")).unwrap();
        assert!(matches!(Wal::open(small(one.path())), Err(Error::Foreign { .. })));
    }

    fn preparing_a_segment_fails() {
        let (fs, clock) = (pontoon_wal::sim::SimFs::new(), Arc::default());
        let (wal, _) = support::open(&fs, &clock, 1).unwrap();
        let storage = wal.storage(GROUP);
        storage.save(&state(1), &entries(1), None).unwrap();
        // The background makes the next segment now; its first write fails.
        fs.fail_nth(OpKind::Write, 0, Fault::Io);
        while wal.step() {}
        assert!(matches!(storage.save(&state(2), &[entry(2)], None), Err(Error::Poisoned { .. })));
        assert!(matches!(wal.close(), Err(Error::Poisoned { .. })));
        let (wal, _) = support::open(&fs, &clock, 2).unwrap();
        assert_eq!(wal.storage(GROUP).last_index().unwrap(), 1);
    }

    fn entries_up_to_a_size() {
        let dir = scratch();
        let storage = filled(dir.path(), 9).storage(GROUP);
        assert_eq!(storage.entries(2, 9, 350).unwrap(), [entry(2), entry(3), entry(4)]);
        assert_eq!(storage.entries(2, 9, 0).unwrap(), [entry(2)], "at least one");
        assert_eq!(storage.entries(2, 2, 0).unwrap(), []);
        assert!(matches!(storage.entries(8, 11, 0), Err(Error::Unavailable { last: 9 })));
        storage.truncate_prefix(4).unwrap();
        assert!(matches!(storage.entries(4, 6, 0), Err(Error::Compacted { first: 5 })));
    }

    fn one_entry() {
        let dir = scratch();
        let storage = filled(dir.path(), 2).storage(GROUP);
        assert_eq!(storage.entry(2).unwrap(), entry(2));
        assert!(matches!(storage.entry(3), Err(Error::Unavailable { last: 2 })));
        assert!(matches!(storage.entry(u64::MAX), Err(Error::Unavailable { .. })));
    }

    fn term() {
        let dir = scratch();
        let storage = filled(dir.path(), 3).storage(GROUP);
        storage.truncate_prefix(2).unwrap();
        assert_eq!((storage.term(2).unwrap(), storage.term(3).unwrap()), (1, 1));
        assert!(matches!(storage.term(1), Err(Error::Compacted { first: 3 })));
        assert!(matches!(storage.term(4), Err(Error::Unavailable { last: 3 })));
    }

    fn first_and_last_index() {
        let dir = scratch();
        let wal = open(dir.path());
        let storage = wal.storage(GROUP);
        let bounds = || (storage.first_index().unwrap(), storage.last_index().unwrap());
        assert_eq!(bounds(), (1, 0));
        storage.save(&state(5), &entries(5), None).unwrap();
        storage.truncate_prefix(2).unwrap();
        assert_eq!(bounds(), (3, 5));
        let came = SnapshotMeta { index: 9, term: 4, conf_state: members(), data: "s".into() };
        storage.begin_at(&came).unwrap();
        assert_eq!((bounds(), storage.term(9).unwrap()), ((10, 9), 4));
    }

    fn number_of_entries_and_files() {
        let dir = scratch();
        let storage = filled(dir.path(), 5).storage(GROUP);
        storage.truncate_prefix(2).unwrap();
        assert_eq!((storage.num_entries().unwrap(), storage.num_log_files()), (3, 1));
    }

    fn integers_and_the_checkpoint() {
        let dir = scratch();
        let storage = open(dir.path()).storage(GROUP);
        assert_eq!(storage.int(MetaInt::RaftId).unwrap(), 0);
        storage.set_int(MetaInt::RaftId, 3).unwrap();
        storage.set_int(MetaInt::GroupId, 7).unwrap();
        storage.set_int(MetaInt::CheckpointIndex, 99).unwrap();
        drop(storage);
        let storage = open(dir.path()).storage(GROUP);
        let ints = [MetaInt::RaftId, MetaInt::GroupId].map(|which| storage.int(which).unwrap());
        assert_eq!((ints, storage.checkpoint().unwrap()), ([3, 7], 99));
    }

    fn initial_state_with_members() {
        let dir = scratch();
        let storage = filled(dir.path(), 5).storage(GROUP);
        assert_eq!(storage.initial_state().unwrap(), (state(5), ConfState::default()));
        storage.create_snapshot(3, &members(), "s".into()).unwrap();
        assert_eq!(storage.initial_state().unwrap(), (state(5), members()));
    }

    fn a_snapshot_that_is_not_there_yet() {
        let dir = scratch();
        let storage = filled(dir.path(), 5).storage(GROUP);
        let none = storage.snapshot();
        assert!(matches!(none, Err(Error::SnapshotUnavailable { newest: 0, needed: 1, .. })));
        storage.create_snapshot(2, &members(), "s".into()).unwrap();
        assert_eq!(storage.snapshot().unwrap().index, 2);
        // A follower that installs it could not go on with what is left.
        storage.truncate_prefix(4).unwrap();
        let old = storage.snapshot();
        assert!(matches!(old, Err(Error::SnapshotUnavailable { newest: 2, needed: 4, .. })));
        storage.create_snapshot(4, &members(), "s".into()).unwrap();
        assert_eq!(storage.snapshot().unwrap().index, 4);
    }

    fn truncate_up_to_an_index() {
        let dir = scratch();
        let storage = filled(dir.path(), 5).storage(GROUP);
        storage.truncate_prefix(3).unwrap();
        assert_eq!(storage.read_all().unwrap().2, [entry(4), entry(5)]);
        assert!(matches!(storage.truncate_prefix(2), Err(Error::Compacted { first: 4 })));
        assert!(matches!(storage.truncate_prefix(6), Err(Error::Unavailable { last: 5 })));
        storage.truncate_prefix(3).unwrap();
    }

    fn write_many_groups_at_once() {
        let dir = scratch();
        let wal = open(dir.path());
        let mut batch = Batch::new();
        batch.append(GroupId(1), &entries(2)).hard_state(GroupId(1), state(1));
        batch.append(GroupId(2), &entries(3)).put_meta(GroupId(2), b"k", b"v");
        wal.commit(batch).unwrap();
        assert_eq!(wal.groups(), [GroupId(1), GroupId(2)]);
        // All or nothing: a mistake in one group leaves the others as they were.
        let mut batch = Batch::new();
        batch.append(GroupId(1), &[entry(3)]).append(GroupId(2), &[entry(9)]);
        assert!(matches!(wal.commit(batch), Err(Error::Gap { .. })));
        assert_eq!(wal.storage(GroupId(1)).last_index().unwrap(), 2);
    }

    fn write_without_waiting() {
        let dir = scratch();
        let wal = open(dir.path());
        let heard = Arc::new(Heard::default());
        let door = wal.submitter(heard.clone());
        for token in 1..=3 {
            let mut batch = Batch::new();
            batch.append(GROUP, &[entry(token)]);
            let room = door.try_reserve(GROUP, batch.size_bytes()).unwrap();
            door.submit(batch, room, token).unwrap();
        }
        wal.close().unwrap();
        assert_eq!(heard.tokens(), [1, 2, 3]);
    }

    fn groups_and_whether_there_are_any() {
        let dir = scratch();
        let wal = open(dir.path());
        assert!(wal.groups().is_empty());
        wal.storage(GROUP).put_meta(b"k", b"v").unwrap();
        assert_eq!(wal.groups(), [GROUP]);
    }

    fn remove_a_group() {
        let dir = scratch();
        let wal = filled(dir.path(), 3);
        let mut batch = Batch::new();
        batch.destroy(GROUP, 4);
        wal.commit(batch).unwrap();
        assert_eq!((wal.group(GROUP), wal.tombstone(GROUP)), (None, Some(4)));
    }

    fn how_much_is_used() {
        let dir = scratch();
        let wal = filled(dir.path(), 3);
        let usage = wal.usage();
        assert!(usage.live_bytes >= 300 && usage.disk_bytes >= 256 << 10 && usage.segments == 1);
        assert_eq!(wal.pinned(1)[0].group, GROUP);
    }

    fn another_file_system() {
        let (fs, clock) = (pontoon_wal::sim::SimFs::new(), Arc::default());
        let options = Options { driver: DriverMode::Manual, ..support::options(&fs, &clock, 1) };
        let (wal, _) = Wal::open(options).unwrap();
        wal.storage(GROUP).save(&state(1), &entries(1), None).unwrap();
        assert!(fs.files().iter().any(|(path, _)| path.ends_with("seg-00000001.wal")));
    }
}

/// Remembers the tokens that became durable.
#[derive(Default)]
struct Heard(Mutex<Vec<u64>>);

impl Heard {
    fn tokens(&self) -> Vec<u64> {
        self.0.lock().unwrap().clone()
    }
}

impl PersistSink for Heard {
    fn persisted(&self, done: &[Persisted]) {
        self.0.lock().unwrap().extend(done.iter().map(|done| done.token));
    }

    fn failed(&self, error: &Error) {
        panic!("{error}");
    }
}

#[test]
fn the_page_names_tests_that_exist_and_forgets_none() {
    let page = include_str!("../../docs/coming-from.md");
    let mut named: BTreeMap<&str, usize> = BTreeMap::new();
    for line in page.lines().filter(|line| line.starts_with('|') && !line.starts_with("|--")) {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [_, _, test] = cells[..] else { panic!("three columns: {line}") };
        if test == "test" || test.is_empty() {
            assert!(test == "test" || line.contains("not offered"), "neither a test nor a reason: {line}");
            continue;
        }
        for name in test.split(", ") {
            let name = name.trim_matches('`');
            assert!(ROWS.contains(&name), "{name} is no test here");
            *named.entry(name).or_default() += 1;
        }
    }
    for row in ROWS {
        assert!(named.contains_key(row), "{row} is on no line of the page");
    }
}
