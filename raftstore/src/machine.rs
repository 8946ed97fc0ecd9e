//! What the runtime needs from above: a place where committed commands take effect.
//!
//! The runtime owns order, exactly-once and membership; a machine owns the data. The two meet in one atomic batch: the
//! effects of the commands, the runtime's own rows and the [`Mark`] reach the engine together or not at all, so that a
//! crash can only lose whole batches, which the log then replays.

use std::sync::Arc;

use bytes::Bytes;
use pontoon_proto::{
    GroupId,
    v1::{ChunkInfo, Mark},
};

/// Why a machine could not do its work. Local trouble, never a property of the command: it stops the replica.
pub type MachineError = Box<dyn std::error::Error + Send + Sync>;

/// A committed command, in log order.
#[derive(Debug, Clone)]
pub struct Command {
    /// The entry's index, from 1.
    pub index: u64,
    /// The entry's term.
    pub term: u64,
    /// The hybrid timestamp of the entry; never goes back within a group.
    pub timestamp: u64,
    /// What was proposed.
    pub payload: Bytes,
}

/// One of the runtime's own rows. Kept with the data, part of snapshots; the machine never reads meaning into it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SystemRow {
    /// Ordered bytes, at most 64 long.
    pub key: Bytes,
    /// `None` deletes the row.
    pub value: Option<Bytes>,
}

/// Opens the machines of a node and makes their work durable.
pub trait Machines: Send + Sync {
    /// Opens the machine of a group, empty if it never held data. `descriptor` is what the creator of the replica gave
    /// ([`crate::GroupSpec::descriptor`]).
    ///
    /// # Errors
    /// The engine's.
    fn open(&self, group: GroupId, descriptor: &[u8]) -> Result<Box<dyn StateMachine>, MachineError>;

    /// Makes durable, by a real fsync, everything that any machine committed before this call. Marks read before the
    /// call are durable after it.
    ///
    /// # Errors
    /// The engine's; after one, the engine must not report success again.
    fn flush(&self) -> Result<(), MachineError>;

    /// Why nothing can be committed any more for any group until the next open; `None` while the engine works. Asked
    /// after an error, to tell trouble of one group from trouble of the node.
    fn failure(&self) -> Option<String> {
        None
    }
}

/// The replicated state of one group on one node. Called by one thread at a time.
pub trait StateMachine: Send {
    /// The mark as the engine holds it; `None` if nothing was ever committed.
    ///
    /// # Errors
    /// The engine's, or a mark of an unknown format.
    fn mark(&self) -> Result<Option<Mark>, MachineError>;

    /// Every system row, in key order.
    ///
    /// # Errors
    /// The engine's.
    fn system_rows(&self) -> Result<Vec<(Bytes, Bytes)>, MachineError>;

    /// Stages the effect of one command into the open batch and returns the reply for the proposer. Later commands of
    /// the batch see it. Must be deterministic: the same commands give the same rows and replies on every replica, and
    /// a command that cannot be understood or does not hold is answered in the reply, not by an error.
    ///
    /// # Errors
    /// The engine's. The batch is then abandoned and the replica stops.
    fn apply(&mut self, command: &Command) -> Result<Bytes, MachineError>;

    /// Writes the staged effects, `rows` and `mark` in one atomic batch. Not yet durable: [`Machines::flush`] does that.
    ///
    /// # Errors
    /// The engine's; the batch is then not visible.
    fn commit(&mut self, rows: Vec<SystemRow>, mark: &Mark) -> Result<(), MachineError>;

    /// Takes a point-in-time view of all logical rows (data and system rows, not the mark), while applying goes on.
    ///
    /// # Errors
    /// The engine's.
    fn checkpoint(&self) -> Result<Arc<dyn SnapshotSource>, MachineError>;

    /// Begins to receive a whole state into a staged generation, apart from the live one. The state is that at `index` and
    /// is cut into `chunks`, in key order: a chunk holds the keys from its own first one up to the next chunk's.
    ///
    /// What an earlier stage received may be taken over: a chunk of it that is durable, and equal to one of `chunks` in
    /// first key, end and hash, need not be sent again and is named in [`Staging::held`]. All other rows of the earlier stage
    /// are gone by the time of [`StateMachine::install`], and the earlier stage takes nothing more. A machine that keeps
    /// nothing holds nothing.
    ///
    /// # Errors
    /// The engine's.
    fn stage(&mut self, index: u64, chunks: &[ChunkInfo]) -> Result<Staging, MachineError>;

    /// Switches to the staged generation and writes `mark` in the same atomic batch, durable on return. The old
    /// generation is dropped lazily afterwards.
    ///
    /// # Errors
    /// The engine's; then the old generation is still the live one.
    fn install(&mut self, stage: Box<dyn SnapshotStage>, mark: &Mark) -> Result<(), MachineError>;

    /// Removes mark, rows and generations of the group. Idempotent. The caller has made the tombstone durable first.
    ///
    /// # Errors
    /// The engine's; may be called again.
    fn destroy(&mut self) -> Result<(), MachineError>;
}

/// A point-in-time view of a machine's logical rows.
pub trait SnapshotSource: Send + Sync {
    /// Visits rows in ascending key order, from the first key at or above `from`, until `visit` returns false or the
    /// rows end.
    ///
    /// # Errors
    /// The engine's.
    fn rows(&self, from: &[u8], visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<(), MachineError>;
}

/// A stage, and what it holds already.
pub struct Staging {
    /// Takes the chunks that are not held.
    pub stage: Box<dyn SnapshotStage>,
    /// Positions of the chunks that an earlier stage received, ascending.
    pub held: Vec<u32>,
}

/// A generation that is being received.
pub trait SnapshotStage: Send {
    /// Adds the rows of a whole chunk. Chunks that are not held come in ascending order, each once. On return the chunk
    /// outlives a kill of the process, or a later [`StateMachine::stage`] does not name it as held.
    ///
    /// `hurry`: the budget has no limit, so the whole counts for more than what other groups of the node wait meanwhile.
    ///
    /// # Errors
    /// The engine's, or rows that are not in order or not of this chunk. The live generation is untouched.
    fn put(&mut self, chunk: u32, rows: &[(Bytes, Bytes)], hurry: bool) -> Result<(), MachineError>;

    /// Access to the concrete type for the machine that made it.
    fn into_any(self: Box<Self>) -> Box<dyn std::any::Any>;

    /// Gives the generation up; its rows are dropped lazily.
    ///
    /// # Errors
    /// The engine's.
    fn abandon(self: Box<Self>) -> Result<(), MachineError>;
}
