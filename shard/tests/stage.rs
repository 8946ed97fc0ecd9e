//! States that are received: cut short anywhere, taken up again, and what is there in the end.

#[path = "support/meta.rs"]
#[allow(dead_code, reason = "shared by several tests")]
mod support;

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use pontoon_proto::{GroupId, v1};
use pontoon_raftstore::{Machines, Staging, StateMachine};
use pontoon_shard::{
    EngineKind, ShardMachines,
    engine::{self, Engine, Keyspace, MemoryDisk, MemoryEngine, Scope},
};
use proptest::prelude::*;
use support::{chunked, descriptor, mark};

const GROUP: GroupId = GroupId(7);
/// Large states are ingested.
const HURRY: bool = true;

type Rows = Vec<(Bytes, Bytes)>;

struct Node {
    machines: Arc<ShardMachines>,
    machine: Box<dyn StateMachine>,
}

impl Node {
    fn open(engine: Arc<dyn Engine>) -> Node {
        let machines = ShardMachines::new(engine).unwrap();
        let machine = machines.open(GROUP, &descriptor(GROUP.0, v1::ShardKind::Map)).unwrap();
        Node { machines, machine }
    }

    fn of(disk: &MemoryDisk) -> Node {
        Node::open(Arc::new(MemoryEngine::open(disk)))
    }

    fn logical(&self) -> Rows {
        let mut rows = Vec::new();
        let mut visit = |key: &[u8], value: &[u8]| {
            rows.push((Bytes::copy_from_slice(key), Bytes::copy_from_slice(value)));
            true
        };
        self.machine.checkpoint().unwrap().rows(b"", &mut visit).unwrap();
        rows
    }

    /// Stages the first `puts` chunks that are not held; how many there were, and the stage.
    fn stage(&mut self, rows: &Rows, each: usize, at: u64, puts: usize) -> (usize, Staging) {
        let (chunks, parts) = chunked(rows, each);
        let mut staging = self.machine.stage(at, &chunks).unwrap();
        let missing = (0..chunks.len()).filter(|chunk| !staging.held.contains(&(*chunk as u32)));
        let missing: Vec<usize> = missing.collect();
        for chunk in missing.iter().take(puts) {
            staging.stage.put(*chunk as u32, parts[*chunk], HURRY).unwrap();
        }
        (missing.len(), staging)
    }
}

fn rows(keys: impl IntoIterator<Item = u32>, value: &str) -> Rows {
    keys.into_iter().map(|key| (format!("\u{1}k{key:04}").into(), value.to_owned().into())).collect()
}

/// Rows of all keyspaces of an engine, by key.
fn everything(engine: &dyn Engine) -> BTreeMap<(u8, Bytes), Bytes> {
    let mut all = BTreeMap::new();
    for space in 0..9 {
        let scope = Scope { space: Keyspace(space), prefix: Bytes::new() };
        let mut visit = |key: &[u8], value: &[u8]| {
            all.insert((space, Bytes::copy_from_slice(key)), Bytes::copy_from_slice(value));
            true
        };
        engine.snapshot(vec![scope]).unwrap().scan(Keyspace(space), b"", None, &mut visit).unwrap();
    }
    all
}

#[test]
fn after_a_kill_at_any_batch_at_most_one_chunk_is_sent_again() {
    let state = rows(0..50, "v");
    for puts in 0..5 {
        for keep in 0..3 {
            let disk = MemoryDisk::new();
            let mut node = Node::of(&disk);
            drop(node.stage(&state, 10, 90, puts));
            disk.power_cut_keeping(keep);
            let mut node = Node::of(&disk);
            assert_eq!(node.machine.mark().unwrap(), None, "what is half received is not seen");
            assert!(node.logical().is_empty());
            let (came, Staging { stage, held }) = node.stage(&state, 10, 90, 9);
            assert!(held.len() >= puts && came + held.len() == 5, "{held:?} after {puts}");
            node.machine.install(stage, &mark(90)).unwrap();
            assert_eq!(node.logical(), state);
        }
    }
}

#[test]
fn a_chunk_of_several_batches_that_is_cut_short_leaves_nothing_behind() {
    let value = "x".repeat(30 << 10);
    let (state, after) = (rows(0..50, &value), rows((0..50).step_by(3), &value));
    for keep in 0..9 {
        let disk = MemoryDisk::new();
        let mut node = Node::of(&disk);
        let (chunks, parts) = chunked(&state, 10);
        let mut staging = node.machine.stage(90, &chunks).unwrap();
        // The last chunk is not flushed by itself: the cut comes at any of its batches.
        parts.iter().enumerate().for_each(|(at, rows)| staging.stage.put(at as u32, rows, false).unwrap());
        assert!(disk.unflushed() >= 4, "one batch for all the rows: whoever writes waits for it");
        disk.power_cut_keeping(keep);
        let mut node = Node::of(&disk);
        let (_, Staging { stage, .. }) = node.stage(&after, 10, 95, 9);
        node.machine.install(stage, &mark(95)).unwrap();
        assert!(node.logical() == after, "{keep} batches kept");
    }
}

#[test]
fn of_another_state_only_what_changed_is_sent_and_what_is_there_is_exactly_that_state() {
    let before = rows(0..50, "v");
    // The second chunk differs, the first and third do not; the fourth has lost a row and the last has gone.
    let mut after = [rows(0..10, "v"), rows(10..20, "w"), rows(20..30, "v"), rows(30..39, "v")].concat();
    let disk = MemoryDisk::new();
    let mut node = Node::of(&disk);
    drop(node.stage(&before, 10, 90, 4));
    disk.power_cut();
    let mut node = Node::of(&disk);
    let (came, Staging { stage, held }) = node.stage(&after, 10, 95, 9);
    assert_eq!((came, held), (2, vec![0, 2]));
    node.machine.install(stage, &mark(95)).unwrap();
    assert_eq!(node.logical(), after);
    // A state that begins later, over one that has begun earlier.
    let mut node = Node::of(&MemoryDisk::new());
    drop(node.stage(&before, 10, 90, 4));
    after.drain(..20);
    let (came, Staging { stage, held }) = node.stage(&after, 10, 95, 9);
    assert_eq!((came, held), (1, vec![0]));
    node.machine.install(stage, &mark(95)).unwrap();
    assert_eq!(node.logical(), after);
    // Nothing at all, over something.
    let mut node = Node::of(&MemoryDisk::new());
    drop(node.stage(&before, 10, 90, 3));
    let (_, Staging { stage, .. }) = node.stage(&Vec::new(), 10, 95, 9);
    node.machine.install(stage, &mark(95)).unwrap();
    assert!(node.logical().is_empty());
}

#[test]
fn what_the_log_has_passed_is_dropped() {
    let disk = MemoryDisk::new();
    let mut node = Node::of(&disk);
    drop(node.stage(&rows(0..50, "v"), 10, 90, 4));
    node.machine.commit(Vec::new(), &mark(89)).unwrap();
    node.machines.flush().unwrap();
    disk.power_cut();
    let mut node = Node::of(&disk);
    let (came, _) = node.stage(&rows(0..50, "v"), 10, 90, 0);
    assert_eq!(came, 1, "still wanted");
    node.machine.commit(Vec::new(), &mark(90)).unwrap();
    node.machines.flush().unwrap();
    while !node.machines.reap(7).unwrap() {}
    assert_eq!(everything(&MemoryEngine::open(&disk)).len(), 1, "the mark");
    // Passed, and killed before that was known: the next open sees it.
    let mut node = Node::of(&disk);
    drop(node.stage(&rows(0..50, "v"), 10, 95, 4));
    let (came, _) = node.stage(&rows(0..50, "v"), 10, 96, 0);
    assert_eq!(came, 1);
    node.machine.destroy().unwrap();
    while !node.machines.reap(7).unwrap() {}
    node.machines.flush().unwrap();
    assert!(everything(&MemoryEngine::open(&disk)).is_empty());
}

#[test]
fn rows_that_are_not_of_their_chunk_are_refused_and_change_nothing() {
    let mut node = Node::of(&MemoryDisk::new());
    let state = rows(0..30, "v");
    let (chunks, parts) = chunked(&state, 10);
    let mut staging = node.machine.stage(9, &chunks).unwrap();
    let mut disordered = parts[1].to_vec();
    disordered.swap(3, 4);
    for foreign in [parts[0], parts[2], &disordered] {
        assert!(staging.stage.put(1, foreign, HURRY).is_err());
    }
    assert!(staging.stage.put(7, parts[0], HURRY).is_err());
    parts.iter().enumerate().for_each(|(at, rows)| staging.stage.put(at as u32, rows, HURRY).unwrap());
    assert!(staging.stage.put(1, parts[1], HURRY).is_err(), "each once");
    node.machine.install(staging.stage, &mark(9)).unwrap();
    assert_eq!(node.logical(), state);
    let half = node.stage(&rows(0..30, "w"), 10, 20, 2).1;
    assert!(node.machine.install(half.stage, &mark(20)).is_err());
    assert_eq!(node.logical(), state);
}

#[test]
fn large_chunks_are_ingested_and_taken_up_again_by_every_engine() {
    for kind in [EngineKind::Fjall, EngineKind::Sled] {
        let dir = tempfile::tempdir().unwrap();
        let value = "x".repeat(64 << 10);
        let state = rows(0..120, &value);
        let mut node = Node::open(engine::open(kind, dir.path()).unwrap());
        node.machine.commit(Vec::new(), &mark(3)).unwrap();
        drop(node.stage(&state, 20, 90, 4));
        node.machines.close().unwrap();
        drop(node);
        let mut node = Node::open(engine::open(kind, dir.path()).unwrap());
        let mut after = state.clone();
        after[25].1 = "other".into();
        after.remove(110);
        let (came, Staging { stage, held }) = node.stage(&after, 20, 95, 9);
        assert_eq!((came, held), (3, vec![0, 2, 3]), "{kind}");
        node.machine.install(stage, &mark(95)).unwrap();
        assert!(node.logical() == after, "{kind}");
        node.machines.close().unwrap();
        drop(node);
        let node = Node::open(engine::open(kind, dir.path()).unwrap());
        assert!(node.logical() == after, "{kind}");
    }
}

#[derive(Debug, Clone)]
struct Try {
    keys: Vec<u8>,
    each: usize,
    puts: usize,
    keep: usize,
}

fn tries() -> impl Strategy<Value = Vec<Try>> {
    let keys = proptest::collection::vec(0u8..4, 24);
    let one = (keys, 1usize..7, 0usize..6, 0usize..6);
    proptest::collection::vec(one.prop_map(|(keys, each, puts, keep)| Try { keys, each, puts, keep }), 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// States come and are cut short by a loss of power; the last one is installed, and nothing else is there.
    #[test]
    fn whatever_was_received_before_the_installed_state_is_exact(tries in tries()) {
        let disk = MemoryDisk::new();
        let mut at = 10;
        let state = |keys: &[u8]| -> Rows {
            let there = keys.iter().enumerate().filter(|(_, value)| **value > 0);
            there.map(|(key, value)| (format!("\u{1}{key:02}").into(), value.to_string().into())).collect()
        };
        for Try { keys, each, puts, keep } in &tries {
            let mut node = Node::of(&disk);
            drop(node.stage(&state(keys), *each, at, *puts));
            disk.power_cut_keeping(*keep);
            at += 1;
        }
        let last = tries.last().unwrap();
        let mut node = Node::of(&disk);
        let (_, Staging { stage, .. }) = node.stage(&state(&last.keys), last.each, at, 99);
        node.machine.install(stage, &mark(at)).unwrap();
        prop_assert_eq!(node.logical(), state(&last.keys));
        while !node.machines.reap(9).unwrap() {}
        node.machines.flush().unwrap();
        let left = everything(&MemoryEngine::open(&disk));
        prop_assert_eq!(left.len(), 1 + state(&last.keys).len(), "the mark and the rows");
    }
}
