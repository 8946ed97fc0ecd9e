//! Applies commands to rows.

use std::{collections::BTreeMap, sync::Arc};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use pontoon_proto::v1::{self, map_cas::Expect, map_op::Op};
use pontoon_raftstore::{
    Command, MachineError, SnapshotSource, SnapshotStage, Staging, StateMachine, SystemRow,
};
use prost::Message;

use crate::{
    error::Error,
    layout::{DATA, logical},
    store::GroupStore,
    versions::known,
};

/// A row as the engine holds it: the index of the command that wrote it, then the value.
pub(super) fn encode_row(index: u64, value: &[u8]) -> Bytes {
    let mut row = BytesMut::with_capacity(8 + value.len());
    row.put_u64(index);
    row.put_slice(value);
    row.freeze()
}

/// The value and the index of a row; `None` if it is too short to be one.
pub(super) fn decode_row(mut row: Bytes) -> Option<(Bytes, u64)> {
    (row.len() >= 8).then(|| {
        let index = row.get_u64();
        (row, index)
    })
}

/// The map's state machine over one group's rows.
pub(crate) struct MapMachine {
    store: GroupStore,
}

/// What one command would write, before it is known whether it takes effect.
type Effects = BTreeMap<Bytes, Effect>;

struct Effect {
    value: Option<Bytes>,
    /// The length of the stored row it replaces, where that was read.
    replaced: Option<usize>,
}

impl MapMachine {
    pub(crate) fn new(store: GroupStore) -> Self {
        MapMachine { store }
    }

    /// The row behind a key, as this command sees it.
    fn row(&self, effects: &Effects, logical: &Bytes) -> Result<Option<(Bytes, u64)>, Error> {
        let row = match effects.get(logical) {
            Some(effect) => effect.value.clone(),
            None => self.store.get(logical)?,
        };
        let damaged = Error::Damaged { group: self.store.group(), what: "a row" };
        row.map(|row| decode_row(row).ok_or(damaged)).transpose()
    }

    fn run(&self, index: u64, command: v1::MapCommand, effects: &mut Effects) -> Result<v1::MapReply, Error> {
        let mut ops = Vec::with_capacity(command.ops.len());
        for (number, op) in command.ops.into_iter().enumerate() {
            let mut reply = v1::MapOpReply::default();
            match op.op {
                Some(Op::Put(put)) => {
                    write(effects, logical(DATA, &put.key), Some(encode_row(index, &put.value)), None);
                }
                Some(Op::Delete(delete)) => {
                    let key = logical(DATA, &delete.key);
                    let row = self.row(effects, &key)?;
                    reply.existed = row.is_some();
                    write(effects, key, None, row);
                }
                Some(Op::Cas(cas)) => {
                    let key = logical(DATA, &cas.key);
                    let row = self.row(effects, &key)?;
                    let holds = match (&cas.expect, &row) {
                        (Some(Expect::Absent(_)), row) => row.is_none(),
                        (Some(Expect::Present(value)), Some((found, _))) => value == found,
                        (Some(Expect::Index(wanted)), Some((_, found))) => wanted == found,
                        (Some(_), None) => false,
                        (None, _) => return Err(self.unknown()),
                    };
                    if !holds {
                        let (value, at) = row.clone().unwrap_or_default();
                        let failed =
                            v1::CasFailure { op: number as u32, exists: row.is_some(), value, index: at };
                        return Ok(v1::MapReply { index, failed: Some(failed), ..Default::default() });
                    }
                    reply.existed = row.is_some();
                    write(effects, key, cas.value.map(|value| encode_row(index, &value)), row);
                }
                None => return Err(self.unknown()),
            }
            ops.push(reply);
        }
        Ok(v1::MapReply { applied: true, index, ops, ..Default::default() })
    }

    /// An operation of a later version: going on without it would let replicas differ.
    fn unknown(&self) -> Error {
        Error::UnknownKind { group: self.store.group(), kind: "an operation of a later version".into() }
    }
}

fn write(effects: &mut Effects, key: Bytes, value: Option<Bytes>, row: Option<(Bytes, u64)>) {
    let stored = row.map(|(value, _)| 8 + value.len());
    // A second write of the same command replaces what the first would have written, not another stored row.
    let replaced = effects.get(&key).map_or(stored, |earlier| earlier.replaced);
    effects.insert(key, Effect { value, replaced });
}

impl StateMachine for MapMachine {
    fn mark(&self) -> Result<Option<v1::Mark>, MachineError> {
        Ok(self.store.mark().cloned())
    }

    fn system_rows(&self) -> Result<Vec<(Bytes, Bytes)>, MachineError> {
        Ok(self.store.system_rows()?)
    }

    fn apply(&mut self, command: &Command) -> Result<Bytes, MachineError> {
        let index = command.index;
        let refuse = |text: String| v1::MapReply { index, refused: text, ..Default::default() };
        let reply = match v1::MapCommand::decode(command.payload.clone()) {
            Err(error) => refuse(format!("not a command of a map: {error}")),
            // Every command has a format: this is something else that happens to decode, a log's command for one.
            Ok(command) if command.format == 0 => refuse("not a command of a map".to_owned()),
            Ok(command) if command.format != super::FORMAT => {
                let (group, found) = (self.store.group(), command.format);
                return Err(
                    Error::UnknownFormat { group, what: "a command", found, known: super::FORMAT }.into()
                );
            }
            Ok(asked) if !known(&asked, &command.payload) => return Err(self.unknown().into()),
            Ok(command) => match super::check(&command) {
                Err(error) => refuse(error.to_string()),
                Ok(()) => {
                    let mut effects = Effects::new();
                    let reply = self.run(index, command, &mut effects)?;
                    if reply.applied {
                        for (key, effect) in effects {
                            self.store.set(key, effect.value, effect.replaced);
                        }
                    }
                    reply
                }
            },
        };
        Ok(reply.encode_to_vec().into())
    }

    fn commit(&mut self, rows: Vec<SystemRow>, mark: &v1::Mark) -> Result<(), MachineError> {
        Ok(self.store.commit(rows, mark)?)
    }

    fn checkpoint(&self) -> Result<Arc<dyn SnapshotSource>, MachineError> {
        Ok(self.store.checkpoint()?)
    }

    fn stage(&mut self, index: u64, chunks: &[v1::ChunkInfo]) -> Result<Staging, MachineError> {
        Ok(self.store.stage(index, chunks)?)
    }

    fn install(&mut self, stage: Box<dyn SnapshotStage>, mark: &v1::Mark) -> Result<(), MachineError> {
        Ok(self.store.install(stage, mark)?)
    }

    fn destroy(&mut self) -> Result<(), MachineError> {
        Ok(self.store.destroy()?)
    }
}
