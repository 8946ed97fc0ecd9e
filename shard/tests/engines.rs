//! One suite for all engines: what the trait promises, and what each does when the power is cut.

#![expect(clippy::disallowed_methods, reason = "a test looks at files")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use pontoon_shard::{
    EngineKind, Error,
    engine::{
        self, Engine, EngineSnapshot, Keyspace, MemoryDisk, MemoryEngine, OpenOptions, Scope, WriteBatch,
    },
};
use proptest::prelude::*;

const MARKS: Keyspace = Keyspace(0);
const ROWS: Keyspace = Keyspace(3);

/// A place for an engine that outlives it.
enum Place {
    Disk(EngineKind, tempfile::TempDir),
    Memory(MemoryDisk),
}

impl Place {
    fn all() -> Vec<Place> {
        let disk = |kind| Place::Disk(kind, tempfile::tempdir().unwrap());
        vec![disk(EngineKind::Fjall), disk(EngineKind::Sled), Place::Memory(MemoryDisk::new())]
    }

    fn open(&self) -> Arc<dyn Engine> {
        match self {
            Place::Disk(kind, dir) => engine::open(*kind, &dir.path().join("engine")).unwrap(),
            Place::Memory(disk) => Arc::new(MemoryEngine::open(disk)),
        }
    }
}

fn key(n: u32) -> Bytes {
    Bytes::copy_from_slice(&n.to_be_bytes())
}

fn whole(space: Keyspace) -> Vec<Scope> {
    vec![Scope { space, prefix: Bytes::new() }]
}

fn rows(
    snapshot: &dyn EngineSnapshot,
    space: Keyspace,
    low: &[u8],
    high: Option<&[u8]>,
) -> Vec<(Bytes, Bytes)> {
    let mut rows = Vec::new();
    let copy = Bytes::copy_from_slice;
    snapshot
        .scan(space, low, high, &mut |key, value| {
            rows.push((copy(key), copy(value)));
            true
        })
        .unwrap();
    rows
}

fn all_rows(engine: &dyn Engine, space: Keyspace) -> Vec<(Bytes, Bytes)> {
    rows(&*engine.snapshot(whole(space)).unwrap(), space, b"", None)
}

/// Batch `n` writes the mark and ten rows that all say `n`.
fn numbered(n: u32) -> WriteBatch {
    let mut batch = WriteBatch::new();
    for row in 0..10 {
        batch.put(ROWS, key(row), key(n));
    }
    batch.put(ROWS, key(1_000 + n), vec![7; 300]);
    batch.put(MARKS, "mark", key(n));
    batch
}

/// Checks that marks and rows tell of the same batch and returns its number; 0 if there is none.
fn numbered_state(engine: &dyn Engine) -> u32 {
    let number = |value: Bytes| u32::from_be_bytes(value[..].try_into().unwrap());
    let mark = engine.get(MARKS, b"mark").unwrap().map_or(0, number);
    for row in 0..10 {
        assert_eq!(engine.get(ROWS, &key(row)).unwrap().map_or(0, number), mark, "a batch is whole");
    }
    let beyond = all_rows(engine, ROWS).into_iter().filter(|(found, _)| *found >= key(1_000)).count();
    assert_eq!(beyond as u32, mark, "batches survive in order");
    mark
}

#[test]
fn rows_are_ordered_and_keyspaces_apart() {
    for place in Place::all() {
        let engine = place.open();
        let mut batch = WriteBatch::new();
        for n in [5, 1, 9, 3] {
            batch.put(ROWS, key(n), vec![n as u8]);
            batch.put(Keyspace(2), key(n), "other");
        }
        batch.put(ROWS, key(9), "later wins");
        batch.delete(ROWS, key(1));
        engine.write(batch).unwrap();
        engine.write(WriteBatch::new()).unwrap();
        let snapshot = engine.snapshot(whole(ROWS)).unwrap();
        let keys = |low: &[u8], high: Option<&[u8]>| -> Vec<Bytes> {
            rows(&*snapshot, ROWS, low, high).into_iter().map(|row| row.0).collect()
        };
        assert_eq!(keys(b"", None), [key(3), key(5), key(9)]);
        assert_eq!(keys(&key(4), None), [key(5), key(9)]);
        assert_eq!(keys(&key(3), Some(&key(9))), [key(3), key(5)]);
        assert!(keys(&key(6), Some(&key(6))).is_empty());
        assert!(keys(&key(9), Some(&key(3))).is_empty());
        assert_eq!(engine.get(ROWS, &key(9)).unwrap().unwrap(), "later wins");
        assert_eq!(engine.get(ROWS, &key(1)).unwrap(), None);
        assert_eq!(all_rows(&*engine, Keyspace(2)).len(), 4);
        let mut first = Vec::new();
        snapshot
            .scan(ROWS, b"", None, &mut |key, _| {
                first.push(key.to_vec());
                false
            })
            .unwrap();
        assert_eq!(first, [key(3)]);
    }
}

#[test]
fn what_was_flushed_or_closed_is_there_after_reopening() {
    for place in Place::all() {
        let engine = place.open();
        engine.write(numbered(1)).unwrap();
        engine.flush().unwrap();
        drop(engine);
        let engine = place.open();
        assert_eq!(numbered_state(&*engine), 1);
        engine.write(numbered(2)).unwrap();
        engine.close().unwrap();
        engine.close().unwrap();
        assert!(matches!(engine.write(numbered(3)), Err(Error::Closed)));
        assert!(matches!(engine.flush(), Err(Error::Closed)));
        drop(engine);
        assert_eq!(numbered_state(&*place.open()), 2);
    }
}

#[test]
fn a_snapshot_stands_still_while_writes_go_on() {
    for place in Place::all() {
        let engine = place.open();
        for n in 0..2_000 {
            let mut batch = WriteBatch::new();
            batch.put(ROWS, key(n * 2), key(n));
            engine.write(batch).unwrap();
        }
        let before = all_rows(&*engine, ROWS);
        let snapshot = engine.snapshot(whole(ROWS)).unwrap();
        let threads: Vec<_> = (0..2)
            .map(|thread| {
                let engine = engine.clone();
                std::thread::spawn(move || {
                    for n in 0..4_000 {
                        let mut batch = WriteBatch::new();
                        batch.put(ROWS, key(n), vec![thread; 20]);
                        batch.delete(ROWS, key(4_000 - n));
                        engine.write(batch).unwrap();
                    }
                })
            })
            .collect();
        // While they write, and after.
        for _ in 0..3 {
            assert_eq!(rows(&*snapshot, ROWS, b"", None), before);
        }
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(rows(&*snapshot, ROWS, b"", None), before);
        assert_eq!(snapshot.get(ROWS, &key(10)).unwrap(), Some(key(5)));
        assert_eq!(snapshot.get(ROWS, &key(11)).unwrap(), None);
        assert_ne!(all_rows(&*engine, ROWS), before);
    }
}

#[test]
fn readers_see_batches_whole() {
    for place in Place::all() {
        let engine = place.open();
        engine.write(numbered(1)).unwrap();
        let writer = {
            let engine = engine.clone();
            std::thread::spawn(move || (2..500).for_each(|n| engine.write(numbered(n)).unwrap()))
        };
        let both = || [whole(MARKS), whole(ROWS)].concat();
        while !writer.is_finished() {
            let snapshot = engine.snapshot(both()).unwrap();
            let mark = snapshot.get(MARKS, b"mark").unwrap().unwrap();
            for (_, value) in rows(&*snapshot, ROWS, &key(0), Some(&key(10))) {
                assert_eq!(value, mark);
            }
        }
        writer.join().unwrap();
        assert_eq!(numbered_state(&*engine), 499);
    }
}

#[test]
fn ingested_rows_are_there_and_a_prefix_is_dropped_in_steps() {
    for place in Place::all() {
        let engine = place.open();
        let made = |group: u8| -> Vec<(Bytes, Bytes)> {
            (0..3_000).map(|n| ([&[group][..], &key(n)].concat().into(), vec![group; 50].into())).collect()
        };
        engine.write(numbered(1)).unwrap();
        for group in [60, 61, 62] {
            engine.ingest(ROWS, &made(group)).unwrap();
        }
        let snapshot = engine.snapshot(whole(ROWS)).unwrap();
        let mut steps = 1;
        while !engine.delete_prefix(ROWS, &[61], 1_000).unwrap() {
            steps += 1;
        }
        assert!(steps >= 3);
        assert!(engine.delete_prefix(ROWS, &[61], 1_000).unwrap(), "nothing left");
        let of =
            |snapshot: &dyn EngineSnapshot, group: u8| rows(snapshot, ROWS, &[group], Some(&[group + 1]));
        let now = engine.snapshot(whole(ROWS)).unwrap();
        assert_eq!(of(&*now, 60), made(60));
        assert!(of(&*now, 61).is_empty());
        assert_eq!(of(&*now, 62), made(62));
        assert_eq!(of(&*snapshot, 61), made(61));
        drop((snapshot, now));
        engine.flush().unwrap();
        drop(engine);
        let engine = place.open();
        assert_eq!(numbered_state_prefix(&*engine), 1);
        assert_eq!(of(&*engine.snapshot(whole(ROWS)).unwrap(), 62), made(62));
    }
}

/// [`numbered_state`] without the count of rows, where others lie beside them.
fn numbered_state_prefix(engine: &dyn Engine) -> u32 {
    let mark = engine.get(MARKS, b"mark").unwrap().unwrap();
    assert_eq!(engine.get(ROWS, &key(0)).unwrap().unwrap(), mark);
    u32::from_be_bytes(mark[..].try_into().unwrap())
}

/// Overwrites what an engine reads first.
fn damage(data: &Path) {
    for entry in fs::read_dir(data).unwrap() {
        let path = entry.unwrap().path();
        if ["version", "conf"].iter().any(|name| path.file_name().unwrap() == *name) {
            fs::write(path, vec![0x5a; 64]).unwrap();
        }
    }
}

#[test]
fn another_engines_or_a_newer_or_a_foreign_or_a_locked_directory_is_refused_by_name() {
    let parent = tempfile::tempdir().unwrap();
    for (mine, other) in [(EngineKind::Fjall, EngineKind::Sled), (EngineKind::Sled, EngineKind::Fjall)] {
        let dir = parent.path().join(mine.to_string());
        let refused = |kind| match engine::open(kind, &dir) {
            Ok(_) => panic!("{kind} opened it"),
            Err(error) => {
                assert!(error.to_string().contains(&dir.display().to_string()), "{error}");
                error
            }
        };
        let engine = engine::open(mine, &dir).unwrap();
        assert!(matches!(refused(mine), Error::Locked { .. }));
        drop(engine);
        assert!(matches!(refused(other), Error::OtherEngine { .. }));
        let marker = dir.join("ENGINE");
        damage(&dir.join("data"));
        assert!(matches!(refused(mine), Error::Unreadable { .. }));
        let text = fs::read_to_string(&marker).unwrap();
        fs::write(&marker, text.replace("pontoon engine 1", "pontoon engine 2")).unwrap();
        assert!(matches!(refused(mine), Error::NewerFormat { found: 2, known: 1, .. }));
        fs::write(&marker, "something else").unwrap();
        assert!(matches!(refused(mine), Error::Foreign { .. }));
        fs::remove_file(&marker).unwrap();
        assert!(matches!(refused(mine), Error::Foreign { .. }));
    }
}

#[test]
fn sled_is_refused_after_the_system_went_down_under_it_and_only_then() {
    let dir = tempfile::tempdir().unwrap();
    let boot = |id: &str| OpenOptions { boot_id: Some(id.into()) };
    let open = |id: &str| engine::open_with(EngineKind::Sled, dir.path(), &boot(id));
    let engine = open("monday").unwrap();
    engine.write(numbered(1)).unwrap();
    engine.flush().unwrap();
    drop(engine);
    // A kill of the process: the system went on.
    let engine = open("monday").unwrap();
    assert_eq!(numbered_state(&*engine), 1);
    engine.close().unwrap();
    drop(engine);
    // Closed in order: whatever the system did afterwards.
    let engine = open("tuesday").unwrap();
    assert_eq!(numbered_state(&*engine), 1);
    drop(engine);
    // Open when the system went down.
    let error = open("wednesday").err().expect("it is refused");
    assert!(matches!(error, Error::Untrusted { .. }));
    assert!(error.to_string().contains(&dir.path().display().to_string()));
    assert!(error.to_string().contains("other nodes"), "it names the next step: {error}");
    assert!(matches!(open("wednesday"), Err(Error::Untrusted { .. })), "and stays so");
}

#[test]
fn the_twin_loses_what_was_not_flushed_and_only_that() {
    for keep in 0..4 {
        let disk = MemoryDisk::new();
        let engine = MemoryEngine::open(&disk);
        engine.write(numbered(1)).unwrap();
        engine.flush().unwrap();
        (2..5).for_each(|n| engine.write(numbered(n)).unwrap());
        assert_eq!(disk.unflushed(), 3);
        disk.power_cut_keeping(keep);
        assert!(matches!(engine.write(numbered(9)), Err(Error::Closed)), "the engine died with the power");
        assert_eq!(numbered_state(&MemoryEngine::open(&disk)), 1 + keep as u32);
    }
    let disk = MemoryDisk::new();
    let engine = MemoryEngine::open(&disk);
    engine.write(numbered(1)).unwrap();
    disk.power_cut();
    assert_eq!(numbered_state(&MemoryEngine::open(&disk)), 0);
}

#[test]
fn after_a_failed_flush_nothing_succeeds() {
    let disk = MemoryDisk::new();
    let engine = MemoryEngine::open(&disk);
    engine.write(numbered(1)).unwrap();
    disk.fail_flushes();
    assert!(engine.flush().is_err());
    assert!(matches!(engine.flush(), Err(Error::Poisoned)));
    assert!(matches!(engine.write(numbered(2)), Err(Error::Poisoned)));
}

/// Every file below a directory, with its bytes.
fn image(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut dirs = vec![dir.to_path_buf()];
    while let Some(next) = dirs.pop() {
        for entry in fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else {
                files.insert(path.strip_prefix(dir).unwrap().to_path_buf(), fs::read(&path).unwrap());
            }
        }
    }
    files
}

fn restore(image: &BTreeMap<PathBuf, Vec<u8>>, dir: &Path) {
    for (path, bytes) in image {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

#[test]
fn fjall_comes_back_at_or_after_its_last_durable_mark_wherever_the_power_was_cut() {
    let dir = tempfile::tempdir().unwrap();
    let engine = engine::open(EngineKind::Fjall, dir.path()).unwrap();
    for n in 1..=20 {
        engine.write(numbered(n)).unwrap();
    }
    engine.flush().unwrap();
    let durable = image(dir.path());
    for n in 21..=30 {
        engine.write(numbered(n)).unwrap();
    }
    // The journal as the system has it now; a flush only makes the copy complete.
    engine.flush().unwrap();
    let later = image(dir.path());
    drop(engine);

    let is_journal = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "jnl");
    let changed: Vec<&PathBuf> = later.keys().filter(|path| durable.get(*path) != later.get(*path)).collect();
    assert!(changed.iter().all(|path| is_journal(path)), "only the journal is written: {changed:?}");
    let journal = changed[0].clone();
    let (old, new) = (&durable[&journal], &later[&journal]);
    let shared = old.iter().zip(new).take_while(|(a, b)| a == b).count();
    let end = new.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    let mut reached = std::collections::BTreeSet::new();
    for step in 0..=15 {
        // Up to here the later bytes reached the disk; beyond, it still holds what it held.
        let cut = shared + (end - shared) * step / 15;
        let mut torn = new[..cut].to_vec();
        torn.extend(old.get(cut..).unwrap_or_default());
        let mut image = durable.clone();
        image.insert(journal.clone(), torn);
        let copy = tempfile::tempdir().unwrap();
        restore(&image, copy.path());
        let engine = engine::open(EngineKind::Fjall, copy.path()).unwrap();
        let state = numbered_state(&*engine);
        assert!((20..=30).contains(&state), "cut at {cut}: {state}");
        reached.insert(state);
        engine.write(numbered(state + 1)).unwrap();
        assert_eq!(numbered_state(&*engine), state + 1, "it goes on after the cut");
    }
    assert!(reached.contains(&20) && reached.contains(&30) && reached.len() > 5, "{reached:?}");
}

#[derive(Debug, Clone)]
enum Op {
    Write(Vec<(u8, u8, Option<u8>)>),
    Snapshot,
    DropPrefix(u8, u8, usize),
    Flush,
    Reopen,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let change = (0..3u8, 0..20u8, proptest::option::weighted(0.7, any::<u8>()));
    let op = prop_oneof![
        6 => proptest::collection::vec(change, 0..8).prop_map(Op::Write),
        2 => Just(Op::Snapshot),
        1 => (0..3u8, 0..20u8, 1..5usize).prop_map(|(space, key, rows)| Op::DropPrefix(space, key, rows)),
        1 => Just(Op::Flush),
        1 => Just(Op::Reopen),
    ];
    proptest::collection::vec(op, 1..40)
}

/// Runs operations and compares with plain maps; snapshots with copies of them.
fn against_a_model(place: &Place, ops: &[Op]) {
    type Model = BTreeMap<(u8, Bytes), Bytes>;
    let mut engine = place.open();
    let mut model = Model::new();
    let mut snapshots: Vec<(Box<dyn EngineSnapshot>, Model)> = Vec::new();
    let scope = || (0..3).map(|space| Scope { space: Keyspace(space), prefix: Bytes::new() }).collect();
    let of = |model: &Model, space: u8| -> Vec<(Bytes, Bytes)> {
        let rows = model.iter().filter(|((found, _), _)| *found == space);
        rows.map(|((_, key), value)| (key.clone(), value.clone())).collect()
    };
    for op in ops {
        match op {
            Op::Write(changes) => {
                let mut batch = WriteBatch::new();
                for (space, key, value) in changes {
                    let key = Bytes::from(vec![*key; 3]);
                    match value {
                        Some(value) => {
                            let value = Bytes::from(vec![*value; usize::from(*value)]);
                            batch.put(Keyspace(*space), key.clone(), value.clone());
                            model.insert((*space, key), value);
                        }
                        None => {
                            batch.delete(Keyspace(*space), key.clone());
                            model.remove(&(*space, key));
                        }
                    }
                }
                engine.write(batch).unwrap();
            }
            Op::Snapshot => snapshots.push((engine.snapshot(scope()).unwrap(), model.clone())),
            Op::DropPrefix(space, key, rows) => {
                while !engine.delete_prefix(Keyspace(*space), &[*key], *rows).unwrap() {}
                model.remove(&(*space, Bytes::from(vec![*key; 3])));
            }
            Op::Flush => engine.flush().unwrap(),
            Op::Reopen => {
                snapshots.clear();
                engine.close().unwrap();
                drop(engine);
                engine = place.open();
            }
        }
        snapshots.push((engine.snapshot(scope()).unwrap(), model.clone()));
        for (snapshot, model) in &snapshots {
            for space in 0..3 {
                assert_eq!(rows(&**snapshot, Keyspace(space), b"", None), of(model, space));
            }
        }
        snapshots.pop();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn engines_agree_with_a_plain_map(ops in ops()) {
        for place in Place::all() {
            against_a_model(&place, &ops);
        }
    }
}
