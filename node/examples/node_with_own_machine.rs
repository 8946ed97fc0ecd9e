//! A node that serves a state machine of one's own: a counter per predicate of the kind 1000.
//!
//! `cargo run -p pontoon-node --example node_with_own_machine` starts a node in a new temporary directory, creates such a
//! predicate, adds to it twice and prints what the counter says.
//!
//! The machine keeps its state in memory to stay short, so it starts from the log's snapshot or from nothing at each
//! start; a real one writes rows and mark to its engine in one atomic batch.

use std::{
    any::Any,
    collections::BTreeMap,
    error::Error,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use pontoon_node::{MachineExtension, Node, NodeConfig, OWN_KINDS_FROM, api::admin_client::AdminClient};
use pontoon_proto::{GroupId, v1};
use pontoon_raftstore::{
    Command, MachineError, Proposal, SnapshotSource, SnapshotStage, Staging, StateMachine, SystemRow,
};

const COUNTER: i32 = OWN_KINDS_FROM;
const COUNT_KEY: &[u8] = b"\x01count";

type Rows = BTreeMap<Bytes, Bytes>;

/// Opens a counter for each group of the kind.
struct Counters;

impl MachineExtension for Counters {
    fn open(&self, _: GroupId, shard: &v1::Shard) -> Result<Box<dyn StateMachine>, MachineError> {
        match shard.kind {
            COUNTER => Ok(Box::new(Counter::default())),
            other => Err(format!("no machine for the kind {other}").into()),
        }
    }

    fn flush(&self) -> Result<(), MachineError> {
        Ok(())
    }
}

/// A sum that commands add to. The rows are what snapshots carry: the runtime's own and the count.
#[derive(Default)]
struct Counter {
    count: u64,
    rows: Arc<Mutex<Rows>>,
    mark: Option<v1::Mark>,
}

impl StateMachine for Counter {
    fn mark(&self) -> Result<Option<v1::Mark>, MachineError> {
        Ok(self.mark.clone())
    }

    fn system_rows(&self) -> Result<Vec<(Bytes, Bytes)>, MachineError> {
        let rows = self.rows.lock().expect("no holder panics");
        let system = rows.iter().filter(|(key, _)| key.first() == Some(&0));
        Ok(system.map(|(key, value)| (key.slice(1..), value.clone())).collect())
    }

    fn apply(&mut self, command: &Command) -> Result<Bytes, MachineError> {
        // What is no number adds nothing, on every replica alike.
        let add =
            std::str::from_utf8(&command.payload).ok().and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
        self.count = self.count.wrapping_add(add);
        Ok(self.count.to_string().into())
    }

    fn commit(&mut self, rows: Vec<SystemRow>, mark: &v1::Mark) -> Result<(), MachineError> {
        let mut stored = self.rows.lock().expect("no holder panics");
        for row in rows {
            let key: Bytes = [&[0], &row.key[..]].concat().into();
            match row.value {
                Some(value) => stored.insert(key, value),
                None => stored.remove(&key),
            };
        }
        stored.insert(Bytes::from_static(COUNT_KEY), self.count.to_be_bytes().to_vec().into());
        self.mark = Some(mark.clone());
        Ok(())
    }

    fn checkpoint(&self) -> Result<Arc<dyn SnapshotSource>, MachineError> {
        Ok(Arc::new(View(self.rows.lock().expect("no holder panics").clone())))
    }

    fn stage(&mut self, _index: u64, _chunks: &[v1::ChunkInfo]) -> Result<Staging, MachineError> {
        Ok(Staging { stage: Box::<Stage>::default(), held: Vec::new() })
    }

    fn install(&mut self, stage: Box<dyn SnapshotStage>, mark: &v1::Mark) -> Result<(), MachineError> {
        let stage = stage.into_any().downcast::<Stage>().map_err(|_| "a stage of another machine")?;
        let count =
            stage.0.get(COUNT_KEY).and_then(|row| row[..].try_into().ok()).map_or(0, u64::from_be_bytes);
        *self.rows.lock().expect("no holder panics") = stage.0;
        (self.count, self.mark) = (count, Some(mark.clone()));
        Ok(())
    }

    fn destroy(&mut self) -> Result<(), MachineError> {
        *self = Counter::default();
        Ok(())
    }
}

struct View(Rows);

impl SnapshotSource for View {
    fn rows(&self, from: &[u8], visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<(), MachineError> {
        for (key, value) in self.0.range(Bytes::copy_from_slice(from)..) {
            if !visit(key, value) {
                break;
            }
        }
        Ok(())
    }
}

#[derive(Default)]
struct Stage(Rows);

impl SnapshotStage for Stage {
    fn put(&mut self, _chunk: u32, rows: &[(Bytes, Bytes)], _hurry: bool) -> Result<(), MachineError> {
        self.0.extend(rows.iter().cloned());
        Ok(())
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }

    fn abandon(self: Box<Self>) -> Result<(), MachineError> {
        Ok(())
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let scratch = tempfile::tempdir()?;
    let mut config = NodeConfig::new(scratch.path().join("data"), "127.0.0.1:0");
    config.machines = Some(Arc::new(Counters));
    let node = Node::start(config).await?;

    let mut admin = AdminClient::connect(format!("http://{}", node.address())).await?;
    let create =
        v1::CreatePredicateRequest { predicate: "visits".to_owned(), kind: COUNTER, ..Default::default() };
    admin.create_predicate(create).await?;

    let group = node.group("visits").ok_or("the predicate is on this node")?;
    group.wait_for_leader().await?;
    for add in ["40", "2"] {
        let proposal = Proposal { payload: add.into(), request: None, epoch: 0, urgent: false };
        let applied = group.propose(proposal).await?;
        println!("+{add} = {}", String::from_utf8_lossy(&applied.reply));
    }
    drop(admin);
    node.shutdown().await?;
    Ok(())
}
