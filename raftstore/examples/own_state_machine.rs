//! A counter of one's own, replicated: the least that an embedder writes.
//!
//! `cargo run -p pontoon-raftstore --example own_state_machine`

use std::{
    any::Any,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use pontoon_proto::{ClusterId, GroupId, NodeId, ReplicaId, v1};
use pontoon_raftstore::{
    Class, Command, Config, GroupSpec, Identity, MachineError, Machines, MultiRaft, Proposal, ReadLevel,
    SnapshotSource, SnapshotStage, Staging, StateMachine, SystemRow, Transport,
};
use pontoon_wal::{Options, Wal};

/// The state: a sum, and the mark and rows that the runtime keeps with it. A real one writes them to an engine, in one batch.
#[derive(Default, Clone)]
struct Counter(Arc<Mutex<(u64, Option<v1::Mark>)>>);

impl Machines for Counter {
    fn open(&self, _group: GroupId, _descriptor: &[u8]) -> Result<Box<dyn StateMachine>, MachineError> {
        Ok(Box::new(Applying { counter: self.clone(), staged: 0 }))
    }

    fn flush(&self) -> Result<(), MachineError> {
        Ok(())
    }
}

struct Applying {
    counter: Counter,
    staged: u64,
}

impl StateMachine for Applying {
    fn mark(&self) -> Result<Option<v1::Mark>, MachineError> {
        Ok(self.counter.0.lock().map_err(|_| "poisoned")?.1.clone())
    }

    fn system_rows(&self) -> Result<Vec<(Bytes, Bytes)>, MachineError> {
        Ok(Vec::new())
    }

    fn apply(&mut self, command: &Command) -> Result<Bytes, MachineError> {
        self.staged += command.payload.len() as u64;
        let sum = self.counter.0.lock().map_err(|_| "poisoned")?.0 + self.staged;
        Ok(Bytes::from(sum.to_string()))
    }

    fn commit(&mut self, _rows: Vec<SystemRow>, mark: &v1::Mark) -> Result<(), MachineError> {
        let mut state = self.counter.0.lock().map_err(|_| "poisoned")?;
        state.0 += std::mem::take(&mut self.staged);
        state.1 = Some(mark.clone());
        Ok(())
    }

    fn checkpoint(&self) -> Result<Arc<dyn SnapshotSource>, MachineError> {
        Ok(Arc::new(Sum(self.counter.0.lock().map_err(|_| "poisoned")?.0)))
    }

    fn stage(&mut self, _index: u64, _chunks: &[v1::ChunkInfo]) -> Result<Staging, MachineError> {
        Ok(Staging { stage: Box::new(Sum(0)), held: Vec::new() })
    }

    fn install(&mut self, stage: Box<dyn SnapshotStage>, mark: &v1::Mark) -> Result<(), MachineError> {
        let sum = stage.into_any().downcast::<Sum>().map_err(|_| "a foreign stage")?;
        *self.counter.0.lock().map_err(|_| "poisoned")? = (sum.0, Some(mark.clone()));
        Ok(())
    }

    fn destroy(&mut self) -> Result<(), MachineError> {
        *self.counter.0.lock().map_err(|_| "poisoned")? = (0, None);
        Ok(())
    }
}

/// A snapshot of one row.
struct Sum(u64);

impl SnapshotSource for Sum {
    fn rows(&self, _from: &[u8], visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<(), MachineError> {
        visit(b"sum", &self.0.to_be_bytes());
        Ok(())
    }
}

impl SnapshotStage for Sum {
    fn put(&mut self, _chunk: u32, rows: &[(Bytes, Bytes)], _hurry: bool) -> Result<(), MachineError> {
        for (_, value) in rows {
            self.0 = u64::from_be_bytes(value.as_ref().try_into()?);
        }
        Ok(())
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }

    fn abandon(self: Box<Self>) -> Result<(), MachineError> {
        Ok(())
    }
}

/// One node has nobody to talk to. A cluster sends the messages by whatever it has; `pontoon-node` uses gRPC.
struct Alone;

impl Transport for Alone {
    fn send(&self, _to: NodeId, _class: Class, _messages: Vec<v1::PeerMessage>) {}
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    let (node, group) = (NodeId::new(1)?, GroupId(7));
    let (wal, _) = Wal::open(Options::new(dir.path().join("wal")))?;
    let identity = Identity::establish(&wal, ClusterId::from_slice(&[1; 16])?, node, "localhost")?;
    let runtime = MultiRaft::open(
        Config::default(),
        wal.clone(),
        identity,
        Arc::new(Counter::default()),
        Arc::new(Alone),
    )?;

    let replica = ReplicaId::on(node, 1);
    let initial = v1::ConfState { voters: vec![replica.get()], ..Default::default() };
    let spec = GroupSpec { group, replica, descriptor: Bytes::new(), epoch: 1, initial: Some(initial) };
    tokio::runtime::Builder::new_current_thread().build()?.block_on(async {
        let counter = runtime.create_group(spec).await?;
        counter.wait_for_leader().await?;
        counter.read_barrier(ReadLevel::Linearizable).await?;
        for word in ["many", "rafts", "one", "log"] {
            let proposal = Proposal { payload: Bytes::from(word), request: None, epoch: 1, urgent: false };
            let applied = counter.propose(proposal).await?;
            println!("entry {}: {} letters so far", applied.index, String::from_utf8_lossy(&applied.reply));
        }
        Ok::<(), Box<dyn std::error::Error>>(())
    })?;
    runtime.shutdown();
    drop(runtime);
    wal.close()?;
    Ok(())
}
