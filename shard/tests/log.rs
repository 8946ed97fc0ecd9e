//! The log against a plain model, on every engine, and its state on its way from one engine to another.

#[path = "support/meta.rs"]
#[allow(dead_code, reason = "shared by several tests")]
mod support;

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use pontoon_proto::{GroupId, v1};
use pontoon_raftstore::{Command, Machines, StateMachine};
use pontoon_shard::{
    EngineKind, Error, LogBounds, LogCommand, LogReader, MapCommand, ShardMachines, decode_log_reply,
    engine::{self, Engine, MemoryDisk, MemoryEngine},
};
use proptest::prelude::*;
use prost::Message;
use support::{descriptor, mark};

const GROUP: GroupId = GroupId(7);
/// As many rows as a command sweeps.
const SWEEP: u64 = 1_024;

struct Log {
    machines: Arc<ShardMachines>,
    machine: Box<dyn StateMachine>,
    index: u64,
}

impl Log {
    fn open(engine: Arc<dyn Engine>) -> Log {
        let machines = ShardMachines::new(engine).unwrap();
        let machine = machines.open(GROUP, &descriptor(GROUP.0, v1::ShardKind::Log)).unwrap();
        let index = machine.mark().unwrap().map_or(0, |mark| mark.index);
        Log { machines, machine, index }
    }

    fn memory() -> Log {
        Log::open(Arc::new(MemoryEngine::open(&MemoryDisk::new())))
    }

    fn apply(&mut self, payload: Bytes) -> v1::LogReply {
        self.index += 1;
        let command = Command { index: self.index, term: 1, timestamp: self.index, payload };
        let reply = decode_log_reply(&self.machine.apply(&command).unwrap()).unwrap();
        assert_eq!(reply.index, self.index);
        reply
    }

    fn commit(&mut self) {
        self.machine.commit(Vec::new(), &mark(self.index)).unwrap();
    }

    fn run(&mut self, command: LogCommand) -> v1::LogReply {
        let reply = self.apply(command.encode().unwrap());
        self.commit();
        reply
    }

    fn append(&mut self, records: &[&str]) -> v1::LogReply {
        self.run(append(records.iter().map(|record| Bytes::copy_from_slice(record.as_bytes())).collect()))
    }

    fn reader(&self) -> LogReader {
        self.machines.log(GROUP).unwrap()
    }

    fn bounds(&self) -> (u64, u64, u64) {
        let bounds = self.reader().bounds().unwrap();
        (bounds.lowest, bounds.next, bounds.era)
    }

    fn records(&self) -> Vec<(u64, Bytes)> {
        self.reader().records().unwrap().map(Result::unwrap).collect()
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

fn append(records: Vec<Bytes>) -> LogCommand {
    LogCommand::Append { records, expect_offset: None }
}

fn small(count: u64) -> Vec<Bytes> {
    (0..count).map(|n| n.to_string().into()).collect()
}

#[test]
fn records_get_offsets_that_follow_each_other() {
    let mut log = Log::memory();
    assert_eq!(log.bounds(), (0, 0, 1));
    assert_eq!(log.append(&["a", "b", ""]).offset, 0);
    assert_eq!(log.append(&["d"]).offset, 3);
    let reader = log.reader();
    assert_eq!(reader.get(2).unwrap().as_deref(), Some(&b""[..]));
    assert_eq!((reader.get(3).unwrap(), reader.get(4).unwrap()), (Some("d".into()), None));
    let page = reader.page(1, Some(3), 10, 1 << 20).unwrap();
    assert_eq!((page.records, page.index), (vec!["b".into(), "".into()], 2));
    assert!(reader.page(4, None, 10, 1 << 20).unwrap().records.is_empty(), "nothing yet at the end");
    assert!(matches!(reader.page(5, None, 10, 1), Err(Error::NoSuchOffset { offset: 5, .. })));
    // An expectation that does not hold appends nothing.
    let at = |offset| LogCommand::Append { records: small(1), expect_offset: Some(offset) };
    let missed = log.run(at(3));
    assert_eq!((missed.applied, missed.next, missed.refused.as_str()), (false, 4, ""));
    assert!(log.run(at(4)).applied);
    assert_eq!(log.bounds(), (0, 5, 1));
}

#[test]
fn pages_keep_to_their_limits_and_bring_at_least_one_record() {
    let mut log = Log::memory();
    log.run(append(vec![vec![7; 1_000].into(); 10]));
    let reader = log.reader();
    let page = |limit, bytes| reader.page(2, None, limit, bytes).unwrap().records.len();
    assert_eq!((page(3, 1 << 20), page(100, 2_500), page(100, 0), page(100, 1 << 20)), (3, 3, 1, 8));
    assert_eq!(page(0, 100), 0);
}

#[test]
fn what_is_truncated_is_gone_at_once_and_swept_a_bounded_number_at_a_time() {
    let mut log = Log::memory();
    log.run(append(small(3 * SWEEP)));
    let full = log.machines.usage(GROUP);
    let reply = log.run(LogCommand::Truncate { below: 2 * SWEEP + 10 });
    assert_eq!((reply.lowest, reply.next, reply.sweep_on), (2 * SWEEP + 10, 3 * SWEEP, true));
    assert!(matches!(log.reader().page(2 * SWEEP, None, 1, 1), Err(Error::NoSuchOffset { .. })));
    // The state's row, and what is left of the records.
    let rows = |log: &Log| log.logical().len() as u64;
    assert_eq!(rows(&log), 1 + 2 * SWEEP);
    // An append sweeps on too.
    assert!(log.append(&["x"]).sweep_on);
    assert_eq!(rows(&log), 1 + SWEEP + 1);
    assert!(!log.run(LogCommand::Sweep).sweep_on);
    assert_eq!(rows(&log), 1 + SWEEP - 10 + 1);
    assert!(log.machines.usage(GROUP) < full / 2, "what was swept counts no more");
    // Backwards is nothing, beyond the end is a mistake.
    assert_eq!(log.run(LogCommand::Truncate { below: 3 }).lowest, 2 * SWEEP + 10);
    let beyond = log.run(LogCommand::Truncate { below: 3 * SWEEP + 2 });
    assert!(!beyond.applied && beyond.refused.contains("ends before"), "{beyond:?}");
    let all = log.run(LogCommand::Truncate { below: 3 * SWEEP + 1 });
    assert_eq!((all.lowest, all.next), (3 * SWEEP + 1, 3 * SWEEP + 1));
    assert!(log.records().is_empty());
    assert_eq!(log.append(&["y"]).offset, 3 * SWEEP + 1);
}

#[test]
fn a_reset_begins_anew_and_meets_no_garbage_of_the_same_offset() {
    let mut log = Log::memory();
    log.run(append(small(2 * SWEEP)));
    let reply = log.run(LogCommand::Reset { at: 5, expect_next: None });
    assert_eq!((reply.lowest, reply.next, reply.era, reply.sweep_on), (5, 5, 2, true));
    log.append(&["new"]);
    assert_eq!(log.records(), [(5, "new".into())]);
    while log.run(LogCommand::Sweep).sweep_on {}
    assert_eq!((log.records(), log.logical().len()), (vec![(5, "new".into())], 2));
    let reset = |expect_next| LogCommand::Reset { at: 0, expect_next };
    assert!(!log.run(reset(Some(5))).applied);
    assert!(log.run(reset(Some(6))).applied);
    assert_eq!(log.bounds(), (0, 0, 3));
}

#[test]
fn what_is_no_command_of_a_log_is_answered_and_one_of_a_later_version_stops_the_replica() {
    let mut log = Log::memory();
    let map = MapCommand::new().put("k", "v").encode().unwrap();
    let large = v1::LogReset { at: u64::MAX, expect_next: None };
    let body = Some(v1::log_command::Body::Reset(large));
    let large = v1::LogCommand { format: 1, body }.encode_to_vec().into();
    for payload in [map, Bytes::from_static(b"\xff\xff"), large] {
        let reply = log.apply(payload);
        assert!(!reply.applied && !reply.refused.is_empty());
    }
    log.commit();
    assert_eq!(log.bounds(), (0, 0, 1));
    for command in [v1::LogCommand { format: 2, body: None }, v1::LogCommand { format: 1, body: None }] {
        let payload = command.encode_to_vec().into();
        let command = Command { index: 9, term: 1, timestamp: 9, payload };
        assert!(log.machine.apply(&command).is_err());
    }
}

#[test]
fn who_waits_is_woken_by_the_commit_and_finds_the_records() {
    let mut log = Log::memory();
    let mut seen = log.reader().watch();
    seen.mark_unchanged();
    log.apply(append(small(2)).encode().unwrap());
    assert!(!seen.has_changed().unwrap(), "applied is not committed to the engine");
    log.commit();
    assert!(seen.has_changed().unwrap());
    assert_eq!(*seen.borrow_and_update(), LogBounds { lowest: 0, next: 2, era: 1 });
    let rows = log.logical();
    let mut other = Log::memory();
    let mut installed = other.reader().watch();
    installed.mark_unchanged();
    other.install(&rows, 5);
    assert_eq!(installed.borrow_and_update().next, 2);
    let reader = other.reader();
    other.machine.destroy().unwrap();
    assert!(matches!(reader.bounds(), Err(Error::Gone { .. })));
    assert!(other.machines.log(GROUP).is_none());
    drop(other);
    assert!(installed.has_changed().is_err(), "nobody waits for a replica that is gone");
}

#[test]
fn a_power_cut_leaves_a_log_of_whole_commands() {
    for keep in 0..=4 {
        let disk = MemoryDisk::new();
        let mut log = Log::open(Arc::new(MemoryEngine::open(&disk)));
        log.append(&["a", "b"]);
        log.machines.flush().unwrap();
        log.append(&["c", "d"]);
        log.run(LogCommand::Truncate { below: 3 });
        log.run(LogCommand::Reset { at: 9, expect_next: None });
        log.append(&["z"]);
        disk.power_cut_keeping(keep);
        let mut log = Log::open(Arc::new(MemoryEngine::open(&disk)));
        let (bounds, count) = match log.index {
            1 => ((0, 2, 1), 2),
            2 => ((0, 4, 1), 4),
            3 => ((3, 4, 1), 1),
            4 => ((9, 9, 2), 0),
            _ => ((9, 10, 2), 1),
        };
        assert_eq!((log.bounds(), log.records().len()), (bounds, count), "keeping {keep}");
        // The machine goes on where the engine stands.
        assert_eq!(log.append(&["next"]).offset, bounds.1);
    }
}

#[derive(Debug, Clone)]
enum Op {
    Append(Vec<u8>, Option<i8>),
    Truncate(u8),
    Reset(u8, Option<i8>),
    Sweep,
}

/// A log as a plain map.
#[derive(Debug, Clone, Default, PartialEq)]
struct Model {
    lowest: u64,
    next: u64,
    resets: u64,
    records: BTreeMap<u64, Bytes>,
}

impl Model {
    fn near(&self, offset: i8) -> u64 {
        self.next.saturating_add_signed(offset.into())
    }

    fn command(&self, op: &Op) -> LogCommand {
        match op {
            Op::Append(records, expect) => LogCommand::Append {
                records: records.iter().map(|&len| vec![len; len.into()].into()).collect(),
                expect_offset: expect.map(|near| self.near(near)),
            },
            Op::Truncate(below) => LogCommand::Truncate { below: self.lowest + u64::from(*below) },
            Op::Reset(at, expect) => {
                LogCommand::Reset { at: (*at).into(), expect_next: expect.map(|near| self.near(near)) }
            }
            Op::Sweep => LogCommand::Sweep,
        }
    }

    /// Whether the command takes effect.
    fn run(&mut self, command: &LogCommand) -> bool {
        match command {
            LogCommand::Append { records, expect_offset } => {
                if expect_offset.is_some_and(|expected| expected != self.next) {
                    return false;
                }
                self.records.extend((self.next..).zip(records.iter().cloned()));
                self.next += records.len() as u64;
            }
            LogCommand::Truncate { below } => {
                if *below > self.next {
                    return false;
                }
                self.lowest = self.lowest.max(*below);
                self.records = self.records.split_off(&self.lowest);
            }
            LogCommand::Reset { at, expect_next } => {
                if expect_next.is_some_and(|expected| expected != self.next) {
                    return false;
                }
                *self = Model { lowest: *at, next: *at, resets: self.resets + 1, records: BTreeMap::new() };
            }
            LogCommand::Sweep => {}
        }
        true
    }
}

fn ops() -> impl Strategy<Value = Vec<(Op, bool)>> {
    let near = || proptest::option::of(-1..2i8);
    let op = prop_oneof![
        5 => (proptest::collection::vec(any::<u8>(), 1..6), near()).prop_map(|(records, at)| Op::Append(records, at)),
        2 => (0..12u8).prop_map(Op::Truncate),
        1 => (0..30u8, near()).prop_map(|(at, expect)| Op::Reset(at, expect)),
        1 => Just(Op::Sweep),
    ];
    proptest::collection::vec((op, any::<bool>()), 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_log_does_what_the_model_does_on_every_engine_and_its_snapshot_is_the_same_state_elsewhere(ops in ops()) {
        let mut twin: Option<Vec<(Bytes, Bytes)>> = None;
        for kind in [EngineKind::Memory, EngineKind::Fjall, EngineKind::Sled] {
            let dir = tempfile::tempdir().unwrap();
            let mut log = Log::open(engine::open(kind, dir.path()).unwrap());
            let mut model = Model::default();
            for (op, commit) in &ops {
                let command = model.command(op);
                let before = model.next;
                let takes_effect = model.run(&command);
                let reply = log.apply(command.clone().encode().unwrap());
                prop_assert_eq!(reply.applied, takes_effect);
                prop_assert_eq!((reply.lowest, reply.next, reply.era), (model.lowest, model.next, model.resets + 1));
                if takes_effect && matches!(command, LogCommand::Append { .. }) {
                    prop_assert_eq!(reply.offset, before);
                }
                // Several commands reach the engine in one batch now and then.
                if *commit {
                    log.commit();
                }
            }
            log.commit();
            let wanted: Vec<(u64, Bytes)> = model.records.clone().into_iter().collect();
            prop_assert_eq!(&log.records(), &wanted);
            prop_assert_eq!(log.bounds(), (model.lowest, model.next, model.resets + 1));

            // Replicas hold the same rows whatever their engine is and however commands came together in batches.
            let rows = log.logical();
            prop_assert_eq!(twin.get_or_insert_with(|| rows.clone()), &rows);
            let mut other = Log::memory();
            other.append(&["stale"]);
            other.install(&rows, log.index);
            prop_assert_eq!(other.logical(), rows);
            prop_assert_eq!(other.records(), wanted);
            prop_assert_eq!(other.append(&["on"]), log.append(&["on"]));
        }
    }
}
