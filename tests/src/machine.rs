//! The replicated state of the simulation: rows that values are appended to, with an engine's durability.

use std::{
    any::Any,
    collections::BTreeMap,
    ops::Bound,
    sync::{Arc, Mutex, MutexGuard},
};

use bytes::Bytes;
use pontoon_proto::{GroupId, v1};
use pontoon_raftstore::{
    Command, MachineError, Machines, SnapshotSource, SnapshotStage, StateMachine, SystemRow,
};

use crate::Rng;

type Rows = BTreeMap<Vec<u8>, Vec<u8>>;

/// What one group's machine holds.
#[derive(Default, Clone, Debug, PartialEq)]
pub struct State {
    /// Data.
    pub rows: Rows,
    /// The runtime's rows.
    pub system: Rows,
    /// The mark.
    pub mark: Option<v1::Mark>,
}

#[derive(Default)]
struct Disk {
    groups: BTreeMap<GroupId, State>,
    /// What each commit since the last flush replaced, oldest first.
    undo: Vec<(GroupId, Option<State>)>,
}

/// The machines of one node. A command `key=value` appends `value;` to the row `key` and answers with the row.
#[derive(Default, Clone)]
pub struct Disks(Arc<Mutex<Disk>>);

impl Disks {
    fn lock(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Loses a part of what was committed since the last flush: whole batches from the end.
    pub fn power_cut(&self, rng: &mut Rng) {
        let mut disk = self.lock();
        let keep = rng.below(disk.undo.len() as u64 + 1) as usize;
        while disk.undo.len() > keep {
            let Some((group, before)) = disk.undo.pop() else { break };
            match before {
                Some(state) => disk.groups.insert(group, state),
                None => disk.groups.remove(&group),
            };
        }
        disk.undo.clear();
    }

    /// The state of a group as applied.
    pub fn state(&self, group: GroupId) -> Option<State> {
        self.lock().groups.get(&group).cloned()
    }

    fn change(&self, group: GroupId, durable: bool, work: impl FnOnce(&mut State)) {
        let mut disk = self.lock();
        let before = disk.groups.get(&group).cloned();
        disk.undo.push((group, before));
        work(disk.groups.entry(group).or_default());
        if durable {
            disk.undo.clear();
        }
    }
}

impl Machines for Disks {
    fn open(&self, group: GroupId, _descriptor: &[u8]) -> Result<Box<dyn StateMachine>, MachineError> {
        Ok(Box::new(Machine { group, disks: self.clone(), staged: Rows::new() }))
    }

    fn flush(&self) -> Result<(), MachineError> {
        self.lock().undo.clear();
        Ok(())
    }
}

struct Machine {
    group: GroupId,
    disks: Disks,
    staged: Rows,
}

impl StateMachine for Machine {
    fn mark(&self) -> Result<Option<v1::Mark>, MachineError> {
        Ok(self.disks.state(self.group).and_then(|state| state.mark))
    }

    fn system_rows(&self) -> Result<Vec<(Bytes, Bytes)>, MachineError> {
        let state = self.disks.state(self.group).unwrap_or_default();
        Ok(state.system.into_iter().map(|(key, value)| (key.into(), value.into())).collect())
    }

    fn apply(&mut self, command: &Command) -> Result<Bytes, MachineError> {
        let text = std::str::from_utf8(&command.payload)?;
        let (key, value) = text.split_once('=').ok_or("no = in the command")?;
        let key = key.as_bytes().to_vec();
        let stored =
            || self.disks.lock().groups.get(&self.group).and_then(|state| state.rows.get(&key).cloned());
        let mut row = self.staged.get(&key).cloned().or_else(stored).unwrap_or_default();
        row.extend_from_slice(value.as_bytes());
        row.push(b';');
        self.staged.insert(key, row.clone());
        Ok(row.into())
    }

    fn commit(&mut self, rows: Vec<SystemRow>, mark: &v1::Mark) -> Result<(), MachineError> {
        let staged = std::mem::take(&mut self.staged);
        self.disks.change(self.group, false, |state| {
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
        let state = self.disks.state(self.group).unwrap_or_default();
        let tagged = |tag: u8, rows: Rows| {
            rows.into_iter().map(move |(key, value)| ([&[tag][..], &key].concat(), value))
        };
        Ok(Arc::new(View(tagged(0, state.system).chain(tagged(1, state.rows)).collect())))
    }

    fn stage(&mut self) -> Result<Box<dyn SnapshotStage>, MachineError> {
        Ok(Box::new(Stage::default()))
    }

    fn install(&mut self, stage: Box<dyn SnapshotStage>, mark: &v1::Mark) -> Result<(), MachineError> {
        let stage = stage.into_any().downcast::<Stage>().map_err(|_| "a foreign stage")?;
        let mut fresh = State { mark: Some(mark.clone()), ..Default::default() };
        for (key, value) in stage.0 {
            let (tag, key) = key.split_first().ok_or("an empty key")?;
            let rows = if *tag == 0 { &mut fresh.system } else { &mut fresh.rows };
            rows.insert(key.to_vec(), value);
        }
        self.disks.change(self.group, true, |state| *state = fresh);
        Ok(())
    }

    fn destroy(&mut self) -> Result<(), MachineError> {
        let mut disk = self.disks.lock();
        let before = disk.groups.remove(&self.group);
        disk.undo.push((self.group, before));
        Ok(())
    }
}

struct View(Rows);

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
    fn put(&mut self, rows: &[(Bytes, Bytes)]) -> Result<(), MachineError> {
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
