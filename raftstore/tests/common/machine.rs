//! A small state machine for the runtime's own tests.

use std::{
    any::Any,
    collections::BTreeMap,
    ops::Bound,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use pontoon_proto::{GroupId, v1};
use pontoon_raftstore::{
    Command, MachineError, Machines, SnapshotSource, SnapshotStage, Staging, StateMachine, SystemRow,
};

type Rows = BTreeMap<Vec<u8>, Vec<u8>>;

/// What one group's machine holds: rows, system rows and the mark.
#[derive(Default, Clone)]
pub(crate) struct State {
    pub(crate) rows: Rows,
    pub(crate) system: Rows,
    pub(crate) mark: Option<v1::Mark>,
}

/// Machines that append: command `key=value` adds `value` to the row `key`, and answers with the whole row.
#[derive(Default, Clone)]
pub(crate) struct TestMachines {
    pub(crate) groups: Arc<Mutex<BTreeMap<GroupId, State>>>,
    /// Why no commit succeeds any more.
    pub(crate) broken: Arc<Mutex<Option<String>>>,
}

impl TestMachines {
    pub(crate) fn row(&self, group: GroupId, key: &str) -> Option<String> {
        let groups = self.groups.lock().unwrap();
        groups.get(&group)?.rows.get(key.as_bytes()).map(|value| String::from_utf8(value.clone()).unwrap())
    }
}

impl Machines for TestMachines {
    fn open(&self, group: GroupId, _descriptor: &[u8]) -> Result<Box<dyn StateMachine>, MachineError> {
        Ok(Box::new(TestMachine { group, all: self.clone(), staged: Rows::new() }))
    }

    fn flush(&self) -> Result<(), MachineError> {
        self.failure().map_or(Ok(()), |reason| Err(reason.into()))
    }

    fn failure(&self) -> Option<String> {
        self.broken.lock().unwrap().clone()
    }
}

struct TestMachine {
    group: GroupId,
    all: TestMachines,
    staged: Rows,
}

impl TestMachine {
    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(self.all.groups.lock().unwrap().entry(self.group).or_default())
    }
}

impl StateMachine for TestMachine {
    fn mark(&self) -> Result<Option<v1::Mark>, MachineError> {
        Ok(self.with(|state| state.mark.clone()))
    }

    fn system_rows(&self) -> Result<Vec<(Bytes, Bytes)>, MachineError> {
        Ok(self
            .with(|state| state.system.iter().map(|(k, v)| (k.clone().into(), v.clone().into())).collect()))
    }

    fn apply(&mut self, command: &Command) -> Result<Bytes, MachineError> {
        let text = std::str::from_utf8(&command.payload)?;
        if text == "panic" {
            panic!("asked to");
        }
        let (key, value) = text.split_once('=').ok_or("no = in the command")?;
        let mut row = match self.staged.get(key.as_bytes()) {
            Some(row) => row.clone(),
            None => self.with(|state| state.rows.get(key.as_bytes()).cloned()).unwrap_or_default(),
        };
        row.extend_from_slice(value.as_bytes());
        self.staged.insert(key.as_bytes().to_vec(), row.clone());
        Ok(row.into())
    }

    fn commit(&mut self, rows: Vec<SystemRow>, mark: &v1::Mark) -> Result<(), MachineError> {
        if let Some(reason) = self.all.failure() {
            return Err(reason.into());
        }
        let staged = std::mem::take(&mut self.staged);
        self.with(|state| {
            state.rows.extend(staged);
            for row in rows {
                match row.value {
                    Some(value) => state.system.insert(row.key.to_vec(), value.to_vec()),
                    None => state.system.remove(row.key.as_ref()),
                };
            }
            state.mark = Some(mark.clone());
        });
        Ok(())
    }

    fn checkpoint(&self) -> Result<Arc<dyn SnapshotSource>, MachineError> {
        Ok(Arc::new(self.with(|state| View::of(state))))
    }

    fn stage(&mut self, _index: u64, _chunks: &[v1::ChunkInfo]) -> Result<Staging, MachineError> {
        Ok(Staging { stage: Box::<Stage>::default(), held: Vec::new() })
    }

    fn install(&mut self, stage: Box<dyn SnapshotStage>, mark: &v1::Mark) -> Result<(), MachineError> {
        let stage = stage.into_any().downcast::<Stage>().map_err(|_| "a foreign stage")?;
        let mut fresh = State { mark: Some(mark.clone()), ..Default::default() };
        for (key, value) in stage.0 {
            let (tag, key) = key.split_first().ok_or("an empty key")?;
            let rows = if *tag == 0 { &mut fresh.system } else { &mut fresh.rows };
            rows.insert(key.to_vec(), value);
        }
        self.with(|state| *state = fresh);
        Ok(())
    }

    fn destroy(&mut self) -> Result<(), MachineError> {
        self.all.groups.lock().unwrap().remove(&self.group);
        Ok(())
    }
}

/// All logical rows under one order: system rows first.
struct View(Rows);

impl View {
    fn of(state: &State) -> View {
        let tagged = |tag: u8, rows: &Rows| {
            let tag = move |key: &Vec<u8>| [&[tag], key.as_slice()].concat();
            rows.iter().map(move |(key, value)| (tag(key), value.clone())).collect::<Vec<_>>()
        };
        View(tagged(0, &state.system).into_iter().chain(tagged(1, &state.rows)).collect())
    }
}

impl SnapshotSource for View {
    fn rows(&self, from: &[u8], visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<(), MachineError> {
        for (key, value) in self.0.range::<[u8], _>((Bound::Included(from), Bound::Unbounded)) {
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
        self.0.extend(rows.iter().map(|(key, value)| (key.to_vec(), value.to_vec())));
        Ok(())
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }

    fn abandon(self: Box<Self>) -> Result<(), MachineError> {
        Ok(())
    }
}
