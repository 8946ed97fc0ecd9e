//! A meta group of one replica over the in-memory engine.

use std::sync::Arc;

use bytes::Bytes;
use pontoon_proto::{
    GroupId, NodeId, ReplicaId,
    v1::{self, meta_command::Body as Ask, meta_reply::Body as Answer},
};
use pontoon_raftstore::{Command, Machines, Staging, StateMachine};
use pontoon_shard::{
    MetaState, ShardMachines, decode_meta_reply,
    engine::{Engine, MemoryDisk, MemoryEngine},
    meta_command,
    planner::{GroupSeen, Seen},
};
use prost::Message;

pub(crate) struct Meta {
    pub(crate) machines: Arc<ShardMachines>,
    pub(crate) machine: Box<dyn StateMachine>,
    pub(crate) index: u64,
}

pub(crate) fn descriptor(group: u64, kind: v1::ShardKind) -> Vec<u8> {
    v1::Shard { group, kind: kind.into(), ..Default::default() }.encode_to_vec()
}

pub(crate) fn mark(index: u64) -> v1::Mark {
    v1::Mark { format: 1, index, term: 1, ..Default::default() }
}

/// Rows by logical key.
type Rows = [(Bytes, Bytes)];

/// A state as it is sent: chunks of so many rows, and the rows of each.
pub(crate) fn chunked(rows: &Rows, each: usize) -> (Vec<v1::ChunkInfo>, Vec<&Rows>) {
    let parts: Vec<_> = rows.chunks(each).collect();
    let info = |rows: &&Rows| {
        let text: Vec<u8> = rows.iter().flat_map(|(k, v)| [b"<", &k[..], b"=", v].concat()).collect();
        // What a hash must do here: differ where rows do.
        v1::ChunkInfo { bytes: text.len() as u64, first_key: rows[0].0.clone(), hash: text.into() }
    };
    (parts.iter().map(info).collect(), parts)
}

/// Receives a state whole and makes it the live one.
pub(crate) fn install(machine: &mut dyn StateMachine, rows: &Rows, each: usize, at: u64) {
    let (chunks, parts) = chunked(rows, each);
    let Staging { mut stage, held } = machine.stage(at, &chunks).unwrap();
    for (chunk, rows) in parts.into_iter().enumerate().filter(|(chunk, _)| !held.contains(&(*chunk as u32))) {
        stage.put(chunk as u32, rows, false).unwrap();
    }
    machine.install(stage, &mark(at)).unwrap();
}

pub(crate) fn replica(node: u64, ordinal: u32) -> u64 {
    ReplicaId::on(NodeId::new(node).unwrap(), ordinal).get()
}

pub(crate) fn register(node: u64) -> v1::RegisterNode {
    v1::RegisterNode {
        address: format!("127.0.0.1:{}", 7000 + node),
        engine: "memory".into(),
        nonce: vec![node as u8; 16].into(),
        ..Default::default()
    }
}

impl Meta {
    /// Over an engine, with nothing in it yet or with what an earlier one left there.
    pub(crate) fn open(engine: Arc<dyn Engine>) -> Meta {
        let machines = ShardMachines::new(engine).unwrap();
        let machine = machines.open(GroupId::META, &descriptor(1, v1::ShardKind::Meta)).unwrap();
        let index = machine.mark().unwrap().map_or(0, |mark| mark.index);
        Meta { machines, machine, index }
    }

    /// Before the bootstrap command.
    pub(crate) fn empty() -> Meta {
        Meta::open(Arc::new(MemoryEngine::open(&MemoryDisk::new())))
    }

    /// With so many nodes, the first of which began the cluster.
    pub(crate) fn with_nodes(nodes: u64) -> Meta {
        let mut meta = Meta::empty();
        let first =
            v1::BootstrapCluster { cluster: vec![7; 16].into(), node: Some(register(1)), meta_replicas: 3 };
        meta.ask(Ask::Bootstrap(first)).unwrap();
        for node in 2..=nodes {
            meta.ask(Ask::RegisterNode(register(node))).unwrap();
        }
        meta
    }

    pub(crate) fn ask(&mut self, body: Ask) -> Result<Answer, Box<v1::MetaRefused>> {
        self.index += 1;
        let payload = meta_command(1_000 + self.index, body);
        let command = Command { index: self.index, term: 1, timestamp: self.index, payload };
        let reply = self.machine.apply(&command).unwrap();
        self.machine.commit(Vec::new(), &mark(self.index)).unwrap();
        self.state().check_invariants();
        decode_meta_reply(&reply).unwrap()
    }

    pub(crate) fn state(&self) -> Arc<MetaState> {
        self.machines.meta().borrow().clone()
    }

    /// A live predicate on these nodes.
    pub(crate) fn shard(&mut self, predicate: &str, wanted: u32, nodes: &[u64]) -> v1::Shard {
        let ask = v1::CreateShard {
            predicate: predicate.into(),
            replicas_wanted: wanted,
            nodes: nodes.to_vec(),
            ..Default::default()
        };
        let Ok(Answer::Shard(shard)) = self.ask(Ask::CreateShard(ask)) else { panic!("a shard") };
        match self.ask(Ask::ShardLive(v1::ShardLive { group: shard.group })) {
            Ok(Answer::Shard(shard)) => shard,
            other => panic!("a shard, not {other:?}"),
        }
    }

    pub(crate) fn start(&mut self, ask: v1::StartMove) -> Result<v1::Move, Box<v1::MetaRefused>> {
        self.ask(Ask::StartMove(ask)).map(|answer| match answer {
            Answer::Move(mv) => mv,
            other => panic!("a move, not {other:?}"),
        })
    }

    pub(crate) fn advance(
        &mut self,
        mv: &v1::Move,
        phase: v1::MovePhase,
        term: u64,
    ) -> Result<v1::Move, Box<v1::MetaRefused>> {
        let ask = v1::AdvanceMove {
            id: mv.id,
            expect_phase_seq: mv.phase_seq,
            driver_term: term,
            phase: phase.into(),
            ..Default::default()
        };
        self.ask(Ask::AdvanceMove(ask)).map(|answer| match answer {
            Answer::Move(mv) => mv,
            other => panic!("a move, not {other:?}"),
        })
    }
}

/// A cluster of nodes with capacities (0: unknown), and of groups with a size and the nodes of their voters.
pub(crate) fn cluster(capacities: &[u64], groups: &[(u64, &[u64])]) -> (MetaState, Seen) {
    let nodes = capacities.iter().zip(1..).map(|(capacity, id)| v1::Node {
        id,
        address: format!("127.0.0.1:{id}"),
        capacity_bytes: *capacity,
        ..Default::default()
    });
    let shards = groups.iter().zip(2..).map(|((_, voters), group)| v1::Shard {
        group,
        predicate: format!("p{group}"),
        state: v1::ShardState::Live.into(),
        voters: voters.iter().zip(1..).map(|(node, ordinal)| replica(*node, ordinal)).collect(),
        replicas_wanted: voters.len() as u32,
        revision: group,
        ..Default::default()
    });
    let map = v1::ClusterMap { nodes: nodes.collect(), shards: shards.collect(), ..Default::default() };
    let sights = groups.iter().zip(2..).map(|((bytes, voters), group)| {
        (group, GroupSeen { bytes: *bytes, leader: voters.first().copied().unwrap_or(0) })
    });
    (MetaState::of_map(map), Seen { groups: sights.collect(), ..Default::default() })
}
