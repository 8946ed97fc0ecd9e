//! The map against a plain model, and its state on its way from one engine to another.

#[path = "support/meta.rs"]
#[allow(dead_code, reason = "shared by several tests")]
mod support;

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use pontoon_proto::{GroupId, v1};
use pontoon_raftstore::{Command, Machines, StateMachine, SystemRow};
use pontoon_shard::{
    EngineKind, Error, Expect, MAX_KEY_BYTES, MapCommand, MapReader, Row, Scan, ShardMachines,
    decode_map_reply,
    engine::{self, Engine, MemoryDisk, MemoryEngine},
};
use proptest::prelude::*;
use prost::Message;
use support::{chunked, descriptor, mark};

const GROUP: GroupId = GroupId(7);

/// One group's machine and what it needs.
struct Map {
    machines: Arc<ShardMachines>,
    machine: Box<dyn StateMachine>,
    index: u64,
}

impl Map {
    fn open(engine: Arc<dyn Engine>, group: GroupId) -> Map {
        Map::on(ShardMachines::new(engine).unwrap(), group)
    }

    fn on(machines: Arc<ShardMachines>, group: GroupId) -> Map {
        let machine = machines.open(group, &descriptor(group.0, v1::ShardKind::Map)).unwrap();
        let index = machine.mark().unwrap().map_or(0, |mark| mark.index);
        Map { machines, machine, index }
    }

    fn memory() -> Map {
        Map::open(Arc::new(MemoryEngine::open(&MemoryDisk::new())), GROUP)
    }

    fn apply(&mut self, payload: Bytes) -> v1::MapReply {
        self.index += 1;
        let command = Command { index: self.index, term: 1, timestamp: self.index, payload };
        decode_map_reply(&self.machine.apply(&command).unwrap()).unwrap()
    }

    fn commit(&mut self) {
        let row = SystemRow { key: "client".into(), value: Some(self.index.to_string().into()) };
        self.machine.commit(vec![row], &mark(self.index)).unwrap();
    }

    fn run(&mut self, command: MapCommand) -> v1::MapReply {
        let reply = self.apply(command.encode().unwrap());
        self.commit();
        reply
    }

    fn reader(&self, group: GroupId) -> MapReader {
        self.machines.reader(group).unwrap()
    }

    fn rows(&self) -> Vec<Row> {
        self.reader(GROUP).scan(&Scan { limit: 1 << 20, max_bytes: 1 << 30, ..Scan::all() }).unwrap().rows
    }

    /// Every logical row, as a snapshot carries them.
    fn logical(&self) -> Vec<(Bytes, Bytes)> {
        let mut rows = Vec::new();
        let source = self.machine.checkpoint().unwrap();
        source
            .rows(b"", &mut |key, value| {
                rows.push((Bytes::copy_from_slice(key), Bytes::copy_from_slice(value)));
                true
            })
            .unwrap();
        rows
    }

    fn install(&mut self, rows: &[(Bytes, Bytes)], at: u64) {
        support::install(&mut *self.machine, rows, 3, at);
        self.index = at;
    }
}

#[test]
fn rows_carry_the_index_of_the_command_that_wrote_them() {
    let mut map = Map::memory();
    assert!(map.run(MapCommand::new().put("a", "1").put("b", "2")).applied);
    map.run(MapCommand::new().put("b", "3"));
    let reader = map.reader(GROUP);
    let row = |key: &str, value: &str, index| {
        Some(Row { key: key.to_owned().into(), value: value.to_owned().into(), index })
    };
    assert_eq!(reader.get(b"a").unwrap(), row("a", "1", 1));
    assert_eq!(reader.get(b"b").unwrap(), row("b", "3", 2));
    assert_eq!(reader.get(b"c").unwrap(), None);
    assert_eq!(reader.applied().unwrap(), 2);
    let reply = map.run(MapCommand::new().delete("a").delete("a"));
    assert_eq!(reply.ops.iter().map(|op| op.existed).collect::<Vec<_>>(), [true, false]);
    assert_eq!(reader.get(b"a").unwrap(), None);
}

#[test]
fn a_failed_expectation_undoes_the_whole_command() {
    let mut map = Map::memory();
    map.run(MapCommand::new().put("a", "1"));
    let command = MapCommand::new().put("b", "2").delete("a").cas("c", Expect::Index(1), None);
    let reply = map.run(command);
    assert!(!reply.applied);
    assert_eq!(reply.failed, Some(v1::CasFailure { op: 2, exists: false, ..Default::default() }));
    assert_eq!(map.rows().len(), 1);
    let reply = map.run(MapCommand::new().cas("a", Expect::Value("9".into()), Some("x".into())));
    let failed = v1::CasFailure { op: 0, exists: true, value: "1".into(), index: 1 };
    assert_eq!(reply.failed, Some(failed));
    assert!(map.run(MapCommand::new().cas("a", Expect::Index(1), Some("2".into()))).applied);
    assert!(map.run(MapCommand::new().cas("a", Expect::Value("2".into()), None)).applied);
    assert!(map.run(MapCommand::new().cas("a", Expect::Absent, Some("3".into()))).applied);
    // Later operations of a command see the earlier ones.
    let twice = MapCommand::new().put("a", "4").cas("a", Expect::Value("4".into()), Some("5".into()));
    assert!(map.run(twice).applied);
    assert_eq!(map.rows()[0].value, "5");
}

#[test]
fn a_command_that_makes_no_sense_is_answered_and_one_of_a_later_version_stops_the_replica() {
    let mut map = Map::memory();
    let op = v1::MapPut { key: vec![0; MAX_KEY_BYTES + 1].into(), value: Bytes::new() };
    let large = v1::MapCommand { format: 1, ops: vec![v1::MapOp { op: Some(v1::map_op::Op::Put(op)) }] };
    for payload in [Bytes::from_static(b"\xff\xff"), large.encode_to_vec().into()] {
        let reply = map.apply(payload);
        assert!(!reply.applied && !reply.refused.is_empty());
    }
    map.commit();
    assert!(map.rows().is_empty());
    let unknown_op = v1::MapCommand { format: 1, ops: vec![v1::MapOp { op: None }] };
    let later = v1::MapCommand { format: 2, ops: Vec::new() };
    for command in [unknown_op, later] {
        let payload = command.encode_to_vec().into();
        let command = Command { index: 4, term: 1, timestamp: 4, payload };
        assert!(map.machine.apply(&command).is_err());
    }
}

#[test]
fn pages_follow_each_other_and_keep_to_their_limits() {
    let mut map = Map::memory();
    for chunk in 0..10 {
        let keys = (0..10).map(|n| format!("key{:03}", chunk * 10 + n));
        map.run(keys.fold(MapCommand::new(), |command, key| command.put(key, vec![1; 100])));
    }
    map.run(MapCommand::new().put("other", ""));
    let reader = map.reader(GROUP);
    for (limit, max_bytes) in [(7, 1 << 20), (1_000, 500), (0, 0)] {
        let mut scan = Scan { limit, max_bytes, ..Scan::prefix("key") };
        let (mut rows, mut pages) = (Vec::new(), 0);
        loop {
            let page = reader.scan(&scan).unwrap();
            assert_eq!(page.index, 11);
            pages += 1;
            rows.extend(page.rows);
            match page.next {
                Some(next) => scan.low = next,
                None => break,
            }
        }
        assert_eq!(rows.len(), 100);
        assert!(rows.is_sorted_by_key(|row| row.key.clone()));
        assert!(pages >= 100 / 7);
    }
    let range = Scan::range("key050", Some("key053".into()));
    assert_eq!(reader.scan(&range).unwrap().rows.len(), 3);
    let narrow = Scan { prefix: "key05".into(), ..Scan::range("key058", Some("zzz".into())) };
    assert_eq!(reader.scan(&narrow).unwrap().rows.len(), 2);
    assert_eq!(reader.scan(&Scan::range("z", Some("a".into()))).unwrap().rows.len(), 0);
}

#[test]
fn a_batch_reaches_the_engine_whole_or_not_at_all() {
    let disk = MemoryDisk::new();
    let mut map = Map::open(Arc::new(MemoryEngine::open(&disk)), GROUP);
    map.run(MapCommand::new().put("a", "1"));
    map.machines.flush().unwrap();
    map.run(MapCommand::new().put("a", "2"));
    map.apply(MapCommand::new().put("a", "3").encode().unwrap());
    disk.power_cut_keeping(1);
    let mut map = Map::open(Arc::new(MemoryEngine::open(&disk)), GROUP);
    assert_eq!(map.index, 2);
    assert_eq!(map.rows()[0].value, "2");
    assert_eq!(map.machine.system_rows().unwrap(), [("client".into(), "2".into())]);
    map.run(MapCommand::new().put("b", "1"));
    let delete = SystemRow { key: "client".into(), value: None };
    map.machine.commit(vec![delete], &mark(4)).unwrap();
    assert!(map.machine.system_rows().unwrap().is_empty());
}

#[test]
fn a_power_cut_at_any_batch_of_an_install_leaves_the_old_state_or_the_new_one() {
    let rows: Vec<(Bytes, Bytes)> = {
        let mut map = Map::memory();
        (0..20).for_each(|n| drop(map.run(MapCommand::new().put(format!("new{n:02}"), "x"))));
        map.logical()
    };
    // One batch is the stage's record, one its rows; the switch is flushed, so nothing is lost after it.
    for keep in 0..=3 {
        for installed in [false, true] {
            let disk = MemoryDisk::new();
            let mut map = Map::open(Arc::new(MemoryEngine::open(&disk)), GROUP);
            map.run(MapCommand::new().put("old", "1"));
            map.machines.flush().unwrap();
            let (chunks, _) = chunked(&rows, rows.len());
            let mut stage = map.machine.stage(50, &chunks).unwrap().stage;
            stage.put(0, &rows, false).unwrap();
            if installed {
                map.machine.install(stage, &mark(50)).unwrap();
                assert_eq!(disk.unflushed(), 0, "durable on return");
            }
            disk.power_cut_keeping(keep);
            let mut map = Map::open(Arc::new(MemoryEngine::open(&disk)), GROUP);
            assert_eq!(map.index, if installed { 50 } else { 1 });
            assert_eq!(map.rows().len(), if installed { 20 } else { 1 });
            // What is staged is kept for the next stage, until the log has passed it.
            map.machine.commit(Vec::new(), &mark(51)).unwrap();
            map.machines.flush().unwrap();
            while !map.machines.reap(5).unwrap() {}
            assert_eq!(map.rows().len(), if installed { 20 } else { 1 });
            map.machines.flush().unwrap();
            let engine = MemoryEngine::open(&disk);
            assert_eq!(
                engine_rows(&engine),
                map_rows_in_engine(installed),
                "no row of a dead generation is left"
            );
        }
    }
}

/// Rows in all keyspaces of the engine.
fn engine_rows(engine: &dyn Engine) -> usize {
    let snapshot = |space| {
        let scope = engine::Scope { space: engine::Keyspace(space), prefix: Bytes::new() };
        engine.snapshot(vec![scope]).unwrap()
    };
    let mut count = 0;
    for space in 0..engine::MAX_KEYSPACES.min(9) {
        let mut visit = |_: &[u8], _: &[u8]| {
            count += 1;
            true
        };
        snapshot(space).scan(engine::Keyspace(space), b"", None, &mut visit).unwrap();
    }
    count
}

/// The mark, the session's row, and the data.
fn map_rows_in_engine(installed: bool) -> usize {
    2 + if installed { 20 } else { 1 }
}

#[test]
fn a_generation_is_switched_and_dropped_among_thousands_of_groups() {
    for kind in [EngineKind::Fjall, EngineKind::Sled, EngineKind::Memory] {
        let dir = tempfile::tempdir().unwrap();
        let machines = ShardMachines::new(engine::open(kind, dir.path()).unwrap()).unwrap();
        let groups = 1_500;
        for group in 1..=groups {
            let mut map = Map::on(machines.clone(), GroupId(group));
            map.run(MapCommand::new().put("group", group.to_string()).put("x", "y"));
        }
        let moved = GroupId(700);
        let mut map = Map::on(machines.clone(), moved);
        let reader = map.reader(moved);
        let rows: Vec<(Bytes, Bytes)> = {
            let mut other = Map::memory();
            (0..50).for_each(|n| drop(other.run(MapCommand::new().put(format!("n{n:02}"), "new"))));
            other.logical()
        };
        // One given up, one taken.
        let (chunks, parts) = chunked(&rows, 10);
        let mut stage = map.machine.stage(90, &chunks).unwrap().stage;
        stage.put(0, parts[0], false).unwrap();
        stage.abandon().unwrap();
        map.install(&rows, 90);
        assert_eq!(
            reader.scan(&Scan::all()).unwrap().rows.len(),
            50,
            "a reader from before sees the new state"
        );
        assert_eq!(reader.scan(&Scan::all()).unwrap().index, 90);
        let mut gone = Map::on(machines.clone(), GroupId(701));
        let late = gone.reader(GroupId(701));
        gone.machine.destroy().unwrap();
        assert!(matches!(late.get(b"x"), Err(Error::Gone { .. })));
        assert!(machines.reader(GroupId(701)).is_none());
        while !machines.reap(7).unwrap() {}
        let check = |machines: &Arc<ShardMachines>| {
            for group in 1..=groups {
                let map = Map::on(machines.clone(), GroupId(group));
                let rows = map.reader(GroupId(group)).scan(&Scan::all()).unwrap().rows;
                match group {
                    700 => assert_eq!((rows.len(), map.index), (50, 90)),
                    701 => assert_eq!((rows.len(), map.index), (0, 0)),
                    _ => assert_eq!(rows[0].value, group.to_string()),
                }
            }
        };
        check(&machines);
        if kind == EngineKind::Memory {
            continue;
        }
        machines.close().unwrap();
        drop((map, gone, late, reader, machines));
        let machines = ShardMachines::new(engine::open(kind, dir.path()).unwrap()).unwrap();
        check(&machines);
        // A replica that comes back to where one was destroyed begins anew.
        let mut back = Map::on(machines.clone(), GroupId(701));
        back.run(MapCommand::new().put("again", "1"));
        assert_eq!(back.reader(GroupId(701)).scan(&Scan::all()).unwrap().rows.len(), 1);
    }
}

#[test]
fn a_stage_that_is_no_longer_wanted_can_neither_grow_nor_be_installed() {
    let mut map = Map::memory();
    map.run(MapCommand::new().put("a", "1"));
    let old = map.machine.stage(9, &[]).unwrap().stage;
    let new = map.machine.stage(9, &[]).unwrap().stage;
    assert!(map.machine.install(old, &mark(9)).is_err());
    map.machine.install(new, &mark(9)).unwrap();
    assert!(map.rows().is_empty());
    map.machine.destroy().unwrap();
    map.machine.destroy().unwrap();
    assert_eq!(map.machine.mark().unwrap(), None);
    assert_eq!(map.machines.usage(GROUP), 0);
}

#[test]
fn the_usage_follows_what_is_known_of_the_rows() {
    let mut map = Map::memory();
    map.run(MapCommand::new().put("a", vec![0; 1_000]).put("b", vec![0; 1_000]));
    let full = map.machines.usage(GROUP);
    assert!((2_000..2_100).contains(&full), "{full}");
    map.run(MapCommand::new().delete("a").cas("b", Expect::Index(1), Some(vec![0; 10].into())));
    let less = map.machines.usage(GROUP);
    assert!((10..60).contains(&less), "{less}");
}

#[test]
fn an_unknown_kind_of_group_is_refused_by_name() {
    let map = Map::memory();
    let open = |descriptor: &[u8]| map.machines.open(GroupId(9), descriptor).err().unwrap().to_string();
    assert!(open(&v1::Shard { kind: 77, ..Default::default() }.encode_to_vec()).contains("77"));
    assert!(map.machines.reader(GroupId(9)).is_none());
}

type Model = BTreeMap<Bytes, (Bytes, u64)>;

#[derive(Debug, Clone)]
enum Op {
    Put(u8, u8),
    Delete(u8),
    Cas(u8, u8, u64, Option<u8>),
}

/// What the command should do; its effects are in `model` afterwards if it takes effect.
fn expected(model: &mut Model, index: u64, ops: &[Op]) -> bool {
    let mut after = model.clone();
    for op in ops {
        match op {
            Op::Put(key, value) => drop(after.insert(bytes(*key), (bytes(*value), index))),
            Op::Delete(key) => drop(after.remove(&bytes(*key))),
            Op::Cas(key, how, at, value) => {
                let row = after.get(&bytes(*key));
                let holds = match expect(*how, *at) {
                    Expect::Absent => row.is_none(),
                    Expect::Value(value) => row.is_some_and(|row| row.0 == value),
                    Expect::Index(at) => row.is_some_and(|row| row.1 == at),
                };
                if !holds {
                    return false;
                }
                match value {
                    Some(value) => drop(after.insert(bytes(*key), (bytes(*value), index))),
                    None => drop(after.remove(&bytes(*key))),
                }
            }
        }
    }
    *model = after;
    true
}

fn bytes(n: u8) -> Bytes {
    vec![n; usize::from(n % 4) + 1].into()
}

fn expect(how: u8, at: u64) -> Expect {
    match how % 3 {
        0 => Expect::Absent,
        1 => Expect::Value(bytes(at as u8)),
        _ => Expect::Index(at),
    }
}

fn commands() -> impl Strategy<Value = Vec<(Vec<Op>, bool)>> {
    let op = prop_oneof![
        3 => (0..12u8, 0..4u8).prop_map(|(key, value)| Op::Put(key, value)),
        1 => (0..12u8).prop_map(Op::Delete),
        2 => (0..12u8, any::<u8>(), 0..6u64, proptest::option::of(0..4u8))
            .prop_map(|(key, how, at, value)| Op::Cas(key, how, at, value)),
    ];
    proptest::collection::vec((proptest::collection::vec(op, 1..5), any::<bool>()), 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_map_does_what_the_model_does_and_its_snapshot_is_the_same_state_elsewhere(commands in commands()) {
        let mut map = Map::memory();
        let mut model = Model::new();
        for (ops, commit) in &commands {
            let command = ops.iter().fold(MapCommand::new(), |command, op| match op {
                Op::Put(key, value) => command.put(bytes(*key), bytes(*value)),
                Op::Delete(key) => command.delete(bytes(*key)),
                Op::Cas(key, how, at, value) => command.cas(bytes(*key), expect(*how, *at), value.map(bytes)),
            });
            let reply = map.apply(command.encode().unwrap());
            prop_assert_eq!(reply.applied, expected(&mut model, map.index, ops));
            if *commit {
                map.commit();
            }
        }
        map.commit();
        let wanted: Vec<Row> = model
            .iter()
            .map(|(key, (value, index))| Row { key: key.clone(), value: value.clone(), index: *index })
            .collect();
        prop_assert_eq!(map.rows(), wanted.clone());

        let rows = map.logical();
        let dir = tempfile::tempdir().unwrap();
        let sled = engine::open(EngineKind::Sled, dir.path()).unwrap();
        let mut other = Map::open(sled, GROUP);
        other.run(MapCommand::new().put("stale", "row"));
        other.install(&rows, map.index);
        prop_assert_eq!(other.logical(), rows);
        prop_assert_eq!(other.rows(), wanted);
        prop_assert_eq!(other.machine.system_rows().unwrap(), map.machine.system_rows().unwrap());
        prop_assert_eq!(other.machine.mark().unwrap(), map.machine.mark().unwrap());
    }
}

#[test]
fn a_large_state_goes_by_bulk_to_every_engine() {
    let mut map = Map::memory();
    for n in 0..40u32 {
        map.run(MapCommand::new().put(format!("{n:05}"), vec![n as u8; 300_000]));
    }
    let rows = map.logical();
    for kind in [EngineKind::Fjall, EngineKind::Sled] {
        let dir = tempfile::tempdir().unwrap();
        let mut other = Map::open(engine::open(kind, dir.path()).unwrap(), GROUP);
        other.install(&rows, map.index);
        drop(other);
        let mut other = Map::open(engine::open(kind, dir.path()).unwrap(), GROUP);
        assert!(other.logical() == rows, "{kind}: the same rows after reopening");
        assert!(other.run(MapCommand::new().cas("00001", Expect::Index(2), None)).applied);
        assert_eq!(other.rows().len(), 39);
    }
}
