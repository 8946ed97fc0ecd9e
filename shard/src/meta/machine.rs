//! The state machine of group 1: rows and a published copy.
//!
//! ```text
//! 0            MetaHeader
//! 1 ‖ id       Node          2 ‖ group   Shard
//! 3 ‖ id       Move          4 ‖ seq     Event
//! 5 ‖ 0        Rules         6 ‖ 0       Plan
//! 7 ‖ group ‖ replica        what a node owes
//! ```

use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use pontoon_proto::{ClusterId, GroupId, v1};
use pontoon_raftstore::{
    Command, MachineError, SnapshotSource, SnapshotStage, Staging, StateMachine, SystemRow,
};
use prost::Message;
use tokio::sync::watch;

use v1::meta_command::Body;

use super::{FORMAT, MetaState, apply::Touched};
use crate::{
    error::Error,
    layout::DATA,
    planner::Rulebook,
    store::GroupStore,
    versions::{Feature, Versions, known},
};

/// The header's format once the state has versions.
const VERSIONED: u32 = 2;

const HEADER: u8 = 0;
const NODE: u8 = 1;
const SHARD: u8 = 2;
const MOVE: u8 = 3;
const EVENT: u8 = 4;
const RULES: u8 = 5;
const PLAN: u8 = 6;
const DEBT: u8 = 7;

/// The meta group's machine.
///
/// Invariant: `state` is what the rows in the store say, with the staged ones on top; what is published is what the
/// committed ones say.
pub(crate) struct MetaMachine {
    store: GroupStore,
    state: MetaState,
    published: watch::Sender<Arc<MetaState>>,
    dirty: bool,
    versions: Versions,
}

fn key(table: u8, id: u64) -> Bytes {
    let mut key = BytesMut::with_capacity(10);
    key.put_u8(DATA);
    key.put_u8(table);
    if table != HEADER {
        key.put_u64(id);
    }
    key.freeze()
}

impl MetaMachine {
    pub(crate) fn open(
        store: GroupStore,
        published: watch::Sender<Arc<MetaState>>,
        versions: Versions,
    ) -> Result<Self, Error> {
        let state = load(&store, versions)?;
        let machine = MetaMachine { store, state, published, dirty: true, versions };
        machine.publish();
        Ok(machine)
    }

    fn publish(&self) {
        self.published.send_replace(Arc::new(self.state.clone()));
    }

    fn write(&mut self, touched: &Touched) {
        let state = &self.state;
        let row = |table: u8, id: u64, row: Option<Vec<u8>>| (key(table, id), row.map(Bytes::from));
        let mut rows = Vec::new();
        rows.extend(
            touched.nodes.iter().map(|id| row(NODE, *id, state.nodes.get(id).map(|r| r.encode_to_vec()))),
        );
        rows.extend(
            touched.shards.iter().map(|id| row(SHARD, *id, state.shards.get(id).map(|r| r.encode_to_vec()))),
        );
        rows.extend(
            touched.moves.iter().map(|id| row(MOVE, *id, state.moves.get(id).map(|r| r.encode_to_vec()))),
        );
        rows.extend(
            touched.events.iter().map(|id| row(EVENT, *id, state.events.get(id).map(|r| r.encode_to_vec()))),
        );
        if touched.rules {
            rows.push(row(RULES, 0, Some(state.rules.encode_to_vec())));
        }
        if touched.plan {
            rows.push(row(PLAN, 0, state.plan.as_ref().map(|plan| plan.encode_to_vec())));
        }
        rows.extend(touched.debts.iter().map(|debt| {
            let mut key = BytesMut::from(&key(DEBT, debt.0)[..]);
            key.put_u64(debt.1);
            (key.freeze(), state.debts.contains(debt).then(Bytes::new))
        }));
        let header = v1::MetaHeader {
            format: if state.has(Feature::VersionedHeader) { VERSIONED } else { FORMAT },
            cluster: state.cluster.map(|id| id.as_bytes().to_vec().into()).unwrap_or_default(),
            cluster_version: state.cluster_version,
            next_node: state.next_node,
            nodes_from: state.nodes_from,
            next_group: state.next_group,
            next_move: state.next_move,
            next_event: state.next_event,
            version: state.version,
        };
        rows.push(row(HEADER, 0, Some(header.encode_to_vec())));
        for (key, value) in rows {
            self.store.set(key, value, None);
        }
    }
}

/// A cluster version that is not spoken here.
fn beyond(group: GroupId, found: u32, versions: Versions) -> Error {
    Error::UnknownFormat { group, what: "the cluster", found, known: versions.newest }
}

/// Reads the state from its rows.
fn load(store: &GroupStore, versions: Versions) -> Result<MetaState, Error> {
    let group = store.group();
    let damaged = |what: &'static str| move |_| Error::Damaged { group, what };
    let mut state = MetaState::default();
    for (key, value) in store.data_rows()? {
        match key.first() {
            Some(&HEADER) => {
                let header = v1::MetaHeader::decode(value).map_err(damaged("the meta header"))?;
                if !(FORMAT..=VERSIONED).contains(&header.format) {
                    let found = header.format;
                    return Err(Error::UnknownFormat {
                        group,
                        what: "the meta state",
                        found,
                        known: VERSIONED,
                    });
                }
                if header.cluster_version > versions.newest {
                    return Err(beyond(group, header.cluster_version, versions));
                }
                state.cluster = ClusterId::from_slice(&header.cluster).ok();
                state.cluster_version = header.cluster_version;
                state.version = header.version;
                state.next_node = header.next_node;
                state.nodes_from = header.nodes_from;
                state.next_group = header.next_group;
                state.next_move = header.next_move;
                state.next_event = header.next_event;
            }
            Some(&NODE) => {
                let node = v1::Node::decode(value).map_err(damaged("a node's record"))?;
                state.nodes.insert(node.id, Arc::new(node));
            }
            Some(&SHARD) => {
                state.insert_shard(v1::Shard::decode(value).map_err(damaged("a shard's record"))?)
            }
            Some(&MOVE) => state.insert_move(v1::Move::decode(value).map_err(damaged("a move's record"))?),
            Some(&EVENT) => {
                let event = v1::Event::decode(value).map_err(damaged("an event's record"))?;
                state.events.insert(event.seq, Arc::new(event));
            }
            Some(&RULES) => {
                let rules = v1::Rules::decode(value).map_err(damaged("the rules"))?;
                let book = Rulebook::read(&rules).map_err(|_| Error::Damaged { group, what: "the rules" })?;
                (state.rules, state.rulebook) = (Arc::new(rules), Arc::new(book));
            }
            Some(&PLAN) => {
                state.plan = Some(Arc::new(v1::Plan::decode(value).map_err(damaged("the plan"))?));
            }
            Some(&DEBT) if key.len() == 17 => {
                let mut rest = key.slice(1..);
                state.debts.insert((rest.get_u64(), rest.get_u64()));
            }
            _ => return Err(Error::Damaged { group, what: "a meta row's key" }),
        }
    }
    Ok(state)
}

impl StateMachine for MetaMachine {
    fn mark(&self) -> Result<Option<v1::Mark>, MachineError> {
        Ok(self.store.mark().cloned())
    }

    fn system_rows(&self) -> Result<Vec<(Bytes, Bytes)>, MachineError> {
        Ok(self.store.system_rows()?)
    }

    fn apply(&mut self, command: &Command) -> Result<Bytes, MachineError> {
        let group = self.store.group();
        let refused = |text: String| {
            let reason = v1::MetaRefusal::Invalid.into();
            let refused = v1::MetaRefused { reason, text, ..Default::default() };
            v1::MetaReply { version: command.index, body: Some(v1::meta_reply::Body::Refused(refused)) }
        };
        let reply = match v1::MetaCommand::decode(command.payload.clone()) {
            Err(error) => refused(format!("not a command of the meta group: {error}")),
            Ok(ask) if ask.format != FORMAT => {
                let found = ask.format;
                return Err(Error::UnknownFormat { group, what: "a command", found, known: FORMAT }.into());
            }
            Ok(ask) if ask.body.is_some() && !known(&ask, &command.payload) => {
                return Err(Error::UnknownKind { group, kind: "a field of a later version".into() }.into());
            }
            Ok(v1::MetaCommand { body: Some(Body::FinaliseVersion(ask)), .. })
                if ask.version > self.versions.newest =>
            {
                return Err(beyond(group, ask.version, self.versions).into());
            }
            Ok(ask) => {
                let body =
                    ask.body.ok_or(Error::UnknownKind { group, kind: "a later version's command".into() })?;
                let mut touched = Touched::default();
                let reply = self.state.apply(command.index, ask.now_ms, body, &mut touched);
                self.write(&touched);
                self.dirty = true;
                if cfg!(debug_assertions) {
                    self.state.check_invariants();
                }
                reply
            }
        };
        Ok(reply.encode_to_vec().into())
    }

    fn commit(&mut self, rows: Vec<SystemRow>, mark: &v1::Mark) -> Result<(), MachineError> {
        self.store.commit(rows, mark)?;
        if std::mem::take(&mut self.dirty) {
            self.publish();
        }
        Ok(())
    }

    fn checkpoint(&self) -> Result<Arc<dyn SnapshotSource>, MachineError> {
        Ok(self.store.checkpoint()?)
    }

    fn stage(&mut self, index: u64, chunks: &[v1::ChunkInfo]) -> Result<Staging, MachineError> {
        Ok(self.store.stage(index, chunks)?)
    }

    fn install(&mut self, stage: Box<dyn SnapshotStage>, mark: &v1::Mark) -> Result<(), MachineError> {
        self.store.install(stage, mark)?;
        self.state = load(&self.store, self.versions)?;
        self.publish();
        Ok(())
    }

    fn destroy(&mut self) -> Result<(), MachineError> {
        self.store.destroy()?;
        self.state = MetaState::default();
        self.publish();
        Ok(())
    }
}
