//! The real state machines, watched: whoever applies an index must do what everybody does there.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use pontoon_proto::{GroupId, v1};
use pontoon_raftstore::{
    Command, MachineError, Machines, SnapshotSource, SnapshotStage, Staging, StateMachine, SystemRow,
};
use pontoon_shard::ShardMachines;

/// What was seen of any replica at an index, which all others must agree with.
#[derive(Default)]
pub(super) struct Ledger {
    /// Hashes of all commands and answers up to and with an index.
    applied: BTreeMap<(GroupId, u64), u64>,
    /// Hashes of the configuration in a mark.
    members: BTreeMap<(GroupId, u64), u64>,
    /// Hashes of all rows as of a mark, where somebody took or installed a snapshot.
    rows: BTreeMap<(GroupId, u64), u64>,
    /// The newest configuration that anybody applied, and at which index.
    newest: BTreeMap<GroupId, (u64, v1::ConfState)>,
    /// The first disagreement.
    pub(super) wrong: Option<String>,
}

/// A shared [`Ledger`].
#[derive(Clone, Default)]
pub(super) struct Book(Arc<Mutex<Ledger>>);

impl Book {
    pub(super) fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was applied up to and with an index.
    fn chain(&self, group: GroupId, index: u64) -> u64 {
        let ledger = self.lock();
        ledger.applied.range((group, 0)..=(group, index)).next_back().map_or(0, |(_, chain)| *chain)
    }
}

impl Ledger {
    /// The members of a group by its newest applied configuration, in whatever role.
    pub(super) fn members_of(&self, group: GroupId) -> Vec<u64> {
        let conf = self.newest.get(&group).map(|(_, conf)| conf.clone()).unwrap_or_default();
        [conf.voters, conf.learners, conf.voters_outgoing, conf.learners_next].concat()
    }

    fn note_members(&mut self, group: GroupId, mark: &v1::Mark) {
        let newest = self.newest.entry(group).or_default();
        if mark.index >= newest.0 {
            *newest = (mark.index, mark.conf_state.clone().unwrap_or_default());
        }
    }

    fn agree(
        &mut self,
        which: impl Fn(&mut Ledger) -> &mut BTreeMap<(GroupId, u64), u64>,
        at: (GroupId, u64),
        hash: u64,
        what: &str,
    ) {
        let known = *which(self).entry(at).or_insert(hash);
        if known != hash && self.wrong.is_none() {
            self.wrong = Some(format!("two replicas of {} differ at index {}: {what}", at.0, at.1));
        }
    }
}

/// A hash to compare with, quick to make.
pub(super) fn hash(parts: &[&[u8]]) -> u64 {
    let mut word = 0xcbf2_9ce4_8422_2325_u64;
    for part in parts {
        word = (word ^ part.len() as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for chunk in part.chunks(8) {
            let bytes = chunk.iter().fold(0, |bytes: u64, byte| bytes << 8 | u64::from(*byte));
            word = ((word ^ bytes).rotate_left(23)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
    }
    word ^ word >> 29
}

/// A hash of everything that a machine holds.
pub(super) fn rows_hash(source: &dyn SnapshotSource) -> Result<u64, MachineError> {
    let mut word = 0;
    source.rows(&[], &mut |key, value| {
        word = hash(&[&u64::to_be_bytes(word), key, value]);
        true
    })?;
    Ok(word)
}

fn members_hash(mark: &v1::Mark) -> u64 {
    let conf = mark.conf_state.clone().unwrap_or_default();
    let sorted = |mut ids: Vec<u64>| {
        ids.sort_unstable();
        ids.into_iter().flat_map(u64::to_be_bytes).collect::<Vec<u8>>()
    };
    let lists = [conf.voters, conf.learners, conf.voters_outgoing, conf.learners_next].map(sorted);
    hash(&lists.each_ref().map(Vec::as_slice))
}

/// The machines of one node's life.
pub(super) struct Watched {
    pub(super) machines: Arc<ShardMachines>,
    pub(super) book: Book,
}

impl Machines for Watched {
    fn open(&self, group: GroupId, descriptor: &[u8]) -> Result<Box<dyn StateMachine>, MachineError> {
        let machine = Machines::open(&*self.machines, group, descriptor)?;
        let mark = machine.mark()?.map_or(0, |mark| mark.index);
        let chain = self.book.chain(group, mark);
        Ok(Box::new(WatchedMachine { machine, group, chain, book: self.book.clone() }))
    }

    fn flush(&self) -> Result<(), MachineError> {
        self.machines.flush()
    }

    fn failure(&self) -> Option<String> {
        self.machines.failure()
    }
}

struct WatchedMachine {
    machine: Box<dyn StateMachine>,
    group: GroupId,
    /// What was applied so far.
    chain: u64,
    book: Book,
}

impl StateMachine for WatchedMachine {
    fn mark(&self) -> Result<Option<v1::Mark>, MachineError> {
        self.machine.mark()
    }

    fn system_rows(&self) -> Result<Vec<(Bytes, Bytes)>, MachineError> {
        self.machine.system_rows()
    }

    fn apply(&mut self, command: &Command) -> Result<Bytes, MachineError> {
        let reply = self.machine.apply(command)?;
        let numbers = [self.chain, command.index, command.term, command.timestamp].map(u64::to_be_bytes);
        self.chain = hash(&[numbers.as_flattened(), &command.payload, &reply]);
        self.book.lock().agree(
            |l| &mut l.applied,
            (self.group, command.index),
            self.chain,
            "what they applied",
        );
        Ok(reply)
    }

    fn commit(&mut self, rows: Vec<SystemRow>, mark: &v1::Mark) -> Result<(), MachineError> {
        let members = members_hash(mark);
        let mut ledger = self.book.lock();
        ledger.agree(|l| &mut l.members, (self.group, mark.index), members, "who is a member");
        ledger.note_members(self.group, mark);
        drop(ledger);
        self.machine.commit(rows, mark)
    }

    fn checkpoint(&self) -> Result<Arc<dyn SnapshotSource>, MachineError> {
        let source = self.machine.checkpoint()?;
        let index = self.machine.mark()?.map_or(0, |mark| mark.index);
        let rows = rows_hash(&*source)?;
        self.book.lock().agree(|l| &mut l.rows, (self.group, index), rows, "what a snapshot holds");
        Ok(source)
    }

    fn stage(&mut self, index: u64, chunks: &[v1::ChunkInfo]) -> Result<Staging, MachineError> {
        self.machine.stage(index, chunks)
    }

    fn install(&mut self, stage: Box<dyn SnapshotStage>, mark: &v1::Mark) -> Result<(), MachineError> {
        self.machine.install(stage, mark)?;
        self.chain = self.book.chain(self.group, mark.index);
        let rows = rows_hash(&*self.machine.checkpoint()?)?;
        let mut ledger = self.book.lock();
        ledger.agree(|l| &mut l.rows, (self.group, mark.index), rows, "what was installed");
        ledger.agree(
            |l| &mut l.members,
            (self.group, mark.index),
            members_hash(mark),
            "the members installed",
        );
        Ok(())
    }

    fn destroy(&mut self) -> Result<(), MachineError> {
        self.machine.destroy()
    }
}
