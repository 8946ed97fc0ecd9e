//! Applies commands to a log.

use std::sync::Arc;

use bytes::Bytes;
use pontoon_proto::v1::{self, log_command::Body};
use pontoon_raftstore::{
    Command, MachineError, SnapshotSource, SnapshotStage, Staging, StateMachine, SystemRow,
};
use prost::Message;
use tokio::sync::watch;

use super::{FORMAT, LogBounds, STATE, SWEEP_ROWS, bounds_of, check, decode_state, fresh, record_key};
use crate::{error::Error, store::GroupStore, versions::known};

/// The log's state machine over one group's rows.
///
/// Invariants: `state` is what the engine's row says once the staged effects are in it; the rows of its era are the
/// records of [lowest, next) and those that `garbage` names; no other era has rows but what `garbage` names.
pub(crate) struct LogMachine {
    store: GroupStore,
    state: v1::LogState,
    /// The length of the state's row as it is stored, if there is one.
    stored: Option<usize>,
    /// Wakes whoever waits for records: after each commit, never before.
    seen: watch::Sender<LogBounds>,
}

impl LogMachine {
    pub(crate) fn open(store: GroupStore, seen: watch::Sender<LogBounds>) -> Result<Self, Error> {
        let mut machine = LogMachine { store, state: fresh(), stored: None, seen };
        machine.reload()?;
        Ok(machine)
    }

    fn tell(&self) {
        self.seen.send_replace(bounds_of(&self.state));
    }

    /// Takes over what the engine holds.
    fn reload(&mut self) -> Result<(), Error> {
        let row = self.store.get(&STATE)?;
        self.stored = row.as_ref().map(Bytes::len);
        self.state = decode_state(self.store.group(), row)?;
        self.tell();
        Ok(())
    }

    fn run(&mut self, body: Body) -> Result<v1::LogReply, Error> {
        let mut reply = v1::LogReply { applied: true, ..Default::default() };
        match body {
            Body::Append(append) => {
                let (first, count) = (self.state.next, append.records.len() as u64);
                let fits = first.checked_add(count).is_some();
                if !fits || append.expect_offset.is_some_and(|expected| expected != first) {
                    reply.applied = false;
                } else {
                    reply.offset = first;
                    for (offset, record) in (first..).zip(append.records) {
                        self.store.set(record_key(self.state.era, offset), Some(record), None);
                    }
                    self.state.next += count;
                }
            }
            Body::Truncate(v1::LogTruncate { below }) => {
                if below > self.state.next {
                    reply.applied = false;
                    reply.refused = format!(
                        "the log ends before offset {}; truncate below that or an earlier one",
                        self.state.next
                    );
                } else if below > self.state.lowest {
                    self.discard(below);
                }
            }
            Body::Reset(reset) => {
                if reset.expect_next.is_some_and(|expected| expected != self.state.next) {
                    reply.applied = false;
                } else {
                    self.discard(self.state.next);
                    self.state.era += 1;
                    (self.state.lowest, self.state.next) = (reset.at, reset.at);
                }
            }
            Body::Sweep(_) => {}
        }
        self.sweep()?;
        let row = self.state.encode_to_vec();
        let replaced = self.stored.replace(row.len());
        self.store.set(Bytes::from_static(&STATE), Some(row.into()), replaced);
        let LogBounds { lowest, next, era } = bounds_of(&self.state);
        reply.sweep_on = !self.state.garbage.is_empty();
        Ok(v1::LogReply { lowest, next, era, ..reply })
    }

    /// The records below `low` are none any more.
    fn discard(&mut self, low: u64) {
        let (era, from) = (self.state.era, self.state.lowest);
        match self.state.garbage.last_mut() {
            Some(last) if last.era == era && last.high == from => last.high = low,
            _ if from < low => self.state.garbage.push(v1::LogGarbage { era, low: from, high: low }),
            _ => {}
        }
        self.state.lowest = low;
    }

    /// Drops some rows of garbage, the oldest first.
    fn sweep(&mut self) -> Result<(), Error> {
        let mut left = SWEEP_ROWS;
        while let Some(oldest) = self.state.garbage.first_mut().filter(|_| left > 0) {
            let end = oldest.high.min(oldest.low.saturating_add(left));
            for offset in oldest.low..end {
                let key = record_key(oldest.era, offset);
                let replaced = self.store.get(&key)?.map(|row| row.len());
                self.store.set(key, None, replaced);
            }
            left -= end - oldest.low;
            oldest.low = end;
            if oldest.low == oldest.high {
                self.state.garbage.remove(0);
            }
        }
        Ok(())
    }
}

impl StateMachine for LogMachine {
    fn mark(&self) -> Result<Option<v1::Mark>, MachineError> {
        Ok(self.store.mark().cloned())
    }

    fn system_rows(&self) -> Result<Vec<(Bytes, Bytes)>, MachineError> {
        Ok(self.store.system_rows()?)
    }

    fn apply(&mut self, command: &Command) -> Result<Bytes, MachineError> {
        let refuse = |text: String| v1::LogReply { refused: text, ..Default::default() };
        let group = self.store.group();
        let reply = match v1::LogCommand::decode(command.payload.clone()) {
            Err(error) => refuse(format!("not a command of a log: {error}")),
            // Every command has a format: this is something else that happens to decode, a map's command for one.
            Ok(command) if command.format == 0 => refuse("not a command of a log".to_owned()),
            Ok(command) if command.format != FORMAT => {
                let (what, found) = ("a command", command.format);
                return Err(Error::UnknownFormat { group, what, found, known: FORMAT }.into());
            }
            // Going on without a command of a later version would let replicas differ.
            Ok(v1::LogCommand { body: None, .. }) => {
                return Err(Error::UnknownKind { group, kind: "a command of a later version".into() }.into());
            }
            Ok(asked) if !known(&asked, &command.payload) => {
                return Err(Error::UnknownKind { group, kind: "a field of a later version".into() }.into());
            }
            Ok(v1::LogCommand { body: Some(body), .. }) => match check(&body) {
                Err(error) => refuse(error.to_string()),
                Ok(()) => self.run(body)?,
            },
        };
        Ok(v1::LogReply { index: command.index, ..reply }.encode_to_vec().into())
    }

    fn commit(&mut self, rows: Vec<SystemRow>, mark: &v1::Mark) -> Result<(), MachineError> {
        self.store.commit(rows, mark)?;
        self.tell();
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
        Ok(self.reload()?)
    }

    fn destroy(&mut self) -> Result<(), MachineError> {
        self.store.destroy()?;
        (self.state, self.stored) = (fresh(), None);
        self.tell();
        Ok(())
    }
}
