//! What clients and drivers ask of nodes, and who waits for the answer.

use pontoon_proto::{GroupId, NodeId, ReplicaId, v1};
use pontoon_raftstore::{GroupStatus, MemberChange, Proposal, ReadLevel, Role};

/// A driver's question or order to a node; the node refuses orders of a driver that was followed by another.
#[derive(Clone)]
pub(super) enum Call {
    Status(GroupId),
    Report,
    Confirm(GroupId),
    Ensure { term: u64, shard: Box<v1::Shard>, replica: ReplicaId, initial: Option<v1::ConfState> },
    Change { term: u64, group: GroupId, change: MemberChange },
    Transfer { term: u64, group: GroupId, to: ReplicaId },
    Verify { term: u64, group: GroupId },
    Fence { term: u64, group: GroupId, replica: ReplicaId },
}

impl Call {
    /// The driver's term, of orders.
    pub(super) fn term(&self) -> u64 {
        match self {
            Call::Status(_) | Call::Report | Call::Confirm(_) => 0,
            Call::Ensure { term, .. }
            | Call::Change { term, .. }
            | Call::Transfer { term, .. }
            | Call::Verify { term, .. }
            | Call::Fence { term, .. } => *term,
        }
    }
}

#[derive(Clone)]
pub(super) enum Reply {
    Status(Box<v1::ReplicaStatusReply>),
    /// The members, by a linearizable read.
    Members(v1::ConfState, u64),
    Done,
    Failed(String),
}

/// A client's try.
#[derive(Clone)]
pub(super) struct ClientCall {
    pub(super) client: usize,
    pub(super) group: GroupId,
    /// Which try of which operation it is.
    pub(super) attempt: u64,
    pub(super) what: ClientAsk,
}

#[derive(Clone)]
pub(super) enum ClientAsk {
    Stamp,
    Propose(Box<Proposal>),
    Read(ReadLevel),
}

/// Who waits for an answer of a node's runtime.
pub(super) enum Wait {
    Client {
        client: usize,
        attempt: u64,
    },
    Call {
        from: NodeId,
        id: u64,
        what: Asked,
    },
    /// A driver's barrier before it begins.
    Barrier {
        term: u64,
    },
    /// A driver's commit for what it works on.
    Commit {
        term: u64,
        subject: Subject,
    },
    Nobody,
}

/// What a call was about, as far as its answer needs it.
pub(super) enum Asked {
    Plain,
    Members(GroupId),
    Fence(GroupId, ReplicaId),
}

/// What a driver works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Subject {
    Create(u64),
    Move(u64),
}

/// A replica as other nodes are told of it.
pub(super) fn info(status: &GroupStatus) -> v1::ReplicaInfo {
    let role = match status.role {
        Role::Leader => "leader",
        Role::Follower => "follower",
        Role::Candidate => "candidate",
        Role::Learner => "learner",
        Role::Dead => "dead",
    };
    let progress = status.progress.iter().map(|peer| v1::ReplicaProgress {
        replica: peer.replica.get(),
        matched: peer.matched,
        snapshot: peer.snapshot,
        active: peer.active,
    });
    v1::ReplicaInfo {
        group: status.group.0,
        replica: status.replica.get(),
        role: role.to_owned(),
        term: status.term,
        leader: status.leader.map_or(0, ReplicaId::get),
        first_index: status.first_index,
        last_index: status.last_index,
        persisted: status.persisted,
        commit: status.commit,
        applied: status.applied,
        durable: status.durable,
        epoch: status.epoch,
        conf_state: Some(status.conf_state.clone()),
        progress: progress.collect(),
        pull: status
            .pull
            .as_ref()
            .map(|pull| v1::PullView { bytes_done: pull.bytes_done, bytes_total: pull.bytes_total }),
        dead: status.dead.clone().unwrap_or_default(),
        verified: status.verified.map(|verified| v1::VerifiedState {
            index: verified.index,
            hash: verified.hash.map_or_else(Default::default, |hash| hash.to_vec().into()),
        }),
        ..Default::default()
    }
}
