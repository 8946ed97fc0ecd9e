//! What can go wrong, by what the caller does next.

use std::time::Duration;

use pontoon_proto::{GroupId, NodeId, ReplicaId};

use crate::machine::MachineError;

/// The request had no effect and never will: refused before the log, or deterministically at apply.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Rejected {
    /// This replica does not lead. Ask the hinted one.
    #[error("{group} is not led here; leader: {}", leader.map_or("unknown".to_owned(), |l| l.to_string()))]
    NotLeader {
        /// The group.
        group: GroupId,
        /// Who leads, as far as is known here.
        leader: Option<ReplicaId>,
    },
    /// Too much is under way. Try again later.
    #[error("{group} is busy; try again in {} ms", retry_after.as_millis())]
    Busy {
        /// The group.
        group: GroupId,
        /// How long to wait.
        retry_after: Duration,
    },
    /// Disks are nearly full, and the log takes no more commands until there is room or leadership has moved.
    #[error(
        "{group} takes no writes: the disk of {node} is nearly full; free space there, or move predicates away"
    )]
    DiskFull {
        /// The group.
        group: GroupId,
        /// The node that lacks room.
        node: NodeId,
    },
    /// The request was addressed by an old map. Look the shard up again.
    #[error("{group} is at epoch {current}, not {asked}; look the shard up again")]
    StaleEpoch {
        /// The group.
        group: GroupId,
        /// The epoch in the request.
        asked: u64,
        /// The group's epoch.
        current: u64,
    },
    /// One entry holds at most `limit` bytes. Split the request.
    #[error("a request of {size} bytes is over the limit of {limit}")]
    TooLarge {
        /// The request's size in bytes.
        size: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// The client's session is older than the group remembers. Open a new one; whether this request was applied in the
    /// old one can no longer be told, and it is not applied now.
    #[error("the session expired; open a new one with the leader")]
    SessionExpired,
    /// The client has too many requests open (1,024 per group). Await some.
    #[error("too many open requests in one session")]
    TooManyOpen,
    /// A membership change is refused.
    #[error("{group} cannot change its members: {reason}")]
    Membership {
        /// The group.
        group: GroupId,
        /// Why, and what to wait for.
        reason: String,
    },
    /// An order was given by what was so before: the leader has changed, or somebody has followed who knows more. Look at
    /// the group again.
    #[error("{group} does not take an order that comes late: {reason}; look at the group again")]
    Late {
        /// The group.
        group: GroupId,
        /// What has changed.
        reason: String,
    },
    /// No replica of this group is on this node.
    #[error("{0} has no replica here")]
    NoGroup(GroupId),
    /// The node is shutting down or the replica has stopped.
    #[error("{0} has stopped on this node")]
    Stopped(GroupId),
}

/// The request may or may not take effect. Retry with the same request id to learn which.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{group}: the outcome is not known ({reason}); retry with the same request id")]
pub struct Ambiguous {
    /// The group.
    pub group: GroupId,
    /// What happened to the answer.
    pub reason: &'static str,
}

/// How a proposal ended without an answer from the state machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Without effect, now and for ever.
    #[error(transparent)]
    Rejected(#[from] Rejected),
    /// With or without effect.
    #[error(transparent)]
    Ambiguous(#[from] Ambiguous),
}

/// Errors of the runtime itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The shared log's.
    #[error(transparent)]
    Wal(#[from] pontoon_wal::Error),
    /// The engine's.
    #[error("the state machine of {group}: {source}")]
    Machine {
        /// The group.
        group: GroupId,
        /// What the machine said.
        source: MachineError,
    },
    /// A tombstone forbids the replica: ids are never reused.
    #[error(
        "{replica} of {group} was removed from this node (tombstone {min_replica:#x}); ask for a new replica id"
    )]
    Tombstoned {
        /// The group.
        group: GroupId,
        /// The replica that was to be made.
        replica: ReplicaId,
        /// The smallest id that may exist.
        min_replica: u64,
    },
    /// The group exists here as another replica.
    #[error("{group} is already here as {existing}, not as {asked}; remove that replica first")]
    OtherReplica {
        /// The group.
        group: GroupId,
        /// Who is here.
        existing: ReplicaId,
        /// Who was asked for.
        asked: ReplicaId,
    },
    /// The log of a group and its engine do not fit together; the replica is dead and must be replaced.
    #[error("{group} is damaged on this node: {reason}; replace the replica under a new id")]
    Damaged {
        /// The group.
        group: GroupId,
        /// What does not fit.
        reason: String,
    },
    /// A replica does not go on alone.
    #[error("{group} is not recovered on this node: {reason}; make a new plan")]
    NotRecovered {
        /// The group.
        group: GroupId,
        /// What is against it.
        reason: String,
    },
    /// What is stored was written by a newer version.
    #[error("{what} has format {found}, this version knows up to {known}; run the newer version")]
    UnknownFormat {
        /// What was read.
        what: &'static str,
        /// Its format.
        found: u32,
        /// The newest known here.
        known: u32,
    },
    /// The directory belongs to somebody else.
    #[error("the log belongs to {found}, not to {expected}; start this node with its own directory")]
    ForeignIdentity {
        /// Who owns the directory.
        found: String,
        /// Who was expected.
        expected: String,
    },
    /// A peer's handshake was refused.
    #[error("{node} is refused: {reason}")]
    Refused {
        /// The peer.
        node: NodeId,
        /// Why, and the next step.
        reason: String,
    },
    /// The configuration does not hold together.
    #[error("configuration: {0}")]
    Config(String),
    /// The runtime has stopped.
    #[error("the runtime has stopped")]
    Stopped,
}
