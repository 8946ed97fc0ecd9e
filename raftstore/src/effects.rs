//! What goes into the core and what comes out.

use std::time::Duration;

use pontoon_proto::{GroupId, NodeId, ReplicaId, v1};
use pontoon_wal::{self as wal, Wal};

use crate::{
    apply::{ApplyOutcome, ApplyTask},
    beats::Gather,
    budget::SnapshotBudget,
    error::{Error, ProposeError, Rejected},
    replica::Depths,
    snapshot::ServeTask,
    transport::Class,
    types::{
        Applied, Event, GroupSpec, GroupStatus, Mandate, MemberChange, Proposal, ReadLevel, Recovery, Room,
    },
};

/// Names a caller who waits for an answer. Chosen by the driver.
pub(crate) type Token = u64;

/// What the clocks say when an input is taken; read after it arrived.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Now {
    /// Unix time in milliseconds; it only colours timestamps.
    pub(crate) wall_ms: u64,
    /// A clock that never goes back, since any moment.
    pub(crate) clock: Duration,
}

/// Everything that can happen to the core.
pub(crate) enum Input {
    /// Raft's clock moves by this many ticks.
    Tick(u64),
    /// A message of a peer whose handshake was accepted.
    Peer {
        from: NodeId,
        message: v1::PeerMessage,
    },
    Propose {
        group: GroupId,
        token: Token,
        proposal: Proposal,
        /// Follows the command through the replica.
        span: tracing::Span,
    },
    /// What waits in a replica.
    Depths {
        group: GroupId,
        token: Token,
    },
    Stamp {
        group: GroupId,
        token: Token,
    },
    Read {
        group: GroupId,
        token: Token,
        level: ReadLevel,
    },
    Change {
        group: GroupId,
        token: Token,
        change: MemberChange,
        mandate: Option<Mandate>,
    },
    Verify {
        group: GroupId,
        token: Token,
    },
    /// The replica here shall receive its state from another member.
    OtherSource {
        group: GroupId,
        token: Token,
    },
    /// A state was hashed.
    Verified {
        group: GroupId,
        index: u64,
        hash: Option<[u8; 32]>,
    },
    Transfer {
        group: GroupId,
        token: Token,
        to: ReplicaId,
        mandate: Option<Mandate>,
    },
    /// Who is a member, by a linearizable read that no order of a lower place follows.
    Members {
        group: GroupId,
        token: Token,
        mandate: Mandate,
    },
    Create {
        spec: GroupSpec,
        token: Token,
    },
    Destroy {
        group: GroupId,
        replica: ReplicaId,
        token: Token,
    },
    /// The group's quorum is lost for good: its replica here goes on alone.
    Recover {
        group: GroupId,
        recovery: Recovery,
        token: Token,
    },
    /// A replica that the log holds is opened again.
    Adopt {
        group: GroupId,
        token: Token,
    },
    /// The log made a submission durable.
    Persisted {
        submission: u64,
    },
    /// The log failed; nothing is durable any more.
    LogFailed {
        reason: String,
    },
    /// The engine failed; nothing is applied any more.
    EngineFailed {
        reason: String,
    },
    Outcome(ApplyOutcome),
    /// The log has read what a [`FetchTask`] asked for.
    Fetched {
        group: GroupId,
        replica: ReplicaId,
        low: u64,
        read: Result<Vec<wal::Entry>, wal::Error>,
    },
    /// Engines made these marks durable.
    Flushed(Vec<(GroupId, u64)>),
    /// A peer accepted this node under its current boot token.
    AcceptedBy(NodeId),
    /// The group that remembers boot tokens accepted this node's current one.
    Vouched,
    Unreachable(NodeId),
    /// Whether this node shall lead nothing.
    Shun(bool),
    /// How much room the disks of this node have.
    Room(Room),
    /// Snapshots may take so many bytes of the disk.
    Free(u64),
    Budget(SnapshotBudget),
    /// Whether clients here wait longer than they do without copies.
    Strained(bool),
}

/// What a caller hears.
#[derive(Debug)]
pub enum Answer {
    /// Of a proposal.
    Proposed(Result<Applied, ProposeError>),
    /// Of a read barrier (the index that was confirmed), a session stamp, or a question for hashes (its entry's index).
    Index(Result<u64, Rejected>),
    /// Of a change of members or a transfer.
    Done(Result<(), Rejected>),
    /// Of a question who is a member: the configuration, and the index as of which it holds.
    Members(Result<(v1::ConfState, u64), Rejected>),
    /// Of a replica that was to be made or opened.
    Replica(Result<ReplicaId, Error>),
    /// Of a replica that was to be removed.
    Destroyed(Result<(), Error>),
    /// Of a question what waits.
    Depths(Result<Box<Depths>, Rejected>),
}

/// Entries that a replica's log is to read from disk; [`Input::Fetched`] answers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FetchTask {
    pub(crate) group: GroupId,
    pub(crate) replica: ReplicaId,
    pub(crate) low: u64,
    pub(crate) high: u64,
    pub(crate) max_bytes: u64,
}

impl FetchTask {
    /// Hands the read to the log, which tells `done` from a thread of its own, or from its step.
    pub(crate) fn begin(self, wal: &Wal, done: impl FnOnce(Input) + Clone + Send + 'static) {
        let FetchTask { group, replica, low, high, max_bytes } = self;
        let tell = done.clone();
        let begun = wal.entries_async(group, low..high, max_bytes, move |read| {
            tell(Input::Fetched { group, replica, low, read });
        });
        if let Err(error) = begun {
            done(Input::Fetched { group, replica, low, read: Err(error) });
        }
    }
}

/// What the core wants done. The driver empties it after each turn.
#[derive(Default)]
pub(crate) struct Effects {
    pub(crate) send: Vec<(NodeId, Class, v1::PeerMessage)>,
    /// Small words for other nodes, which leave with the turn: the end of it packs them into `send`.
    pub(crate) beats: Gather,
    pub(crate) apply: Vec<ApplyTask>,
    pub(crate) serve: Vec<ServeTask>,
    pub(crate) fetch: Vec<FetchTask>,
    pub(crate) answers: Vec<(Token, Answer)>,
    pub(crate) statuses: Vec<GroupStatus>,
    /// Replicas that are gone from this node.
    pub(crate) gone: Vec<GroupId>,
    pub(crate) events: Vec<Event>,
}

impl Effects {
    pub(crate) fn propose_error(&mut self, token: Token, error: impl Into<ProposeError>) {
        self.answers.push((token, Answer::Proposed(Err(error.into()))));
    }
}
