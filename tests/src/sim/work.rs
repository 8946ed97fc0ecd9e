//! What clients and drivers ask of nodes, and who waits for the answer.

use pontoon_proto::{GroupId, NodeId, ReplicaId, v1};
use pontoon_raftstore::{Proposal, ReadLevel};

/// A driver's question or order to a node; the node refuses orders of a driver that was followed by another.
#[derive(Clone)]
pub(super) enum Call {
    Status(GroupId),
    Report,
    /// A node asks the meta group's leader to vouch for it.
    Announce(v1::Hello),
    Confirm(v1::ConfirmMembersRequest),
    Ensure(Box<v1::EnsureReplicaRequest>),
    Change(v1::ChangeMembersRequest),
    Transfer(v1::TransferLeaderRequest),
    Verify(v1::VerifyGroupRequest),
    OtherSource(v1::OtherSourceRequest),
    Fence(v1::FenceReplicaRequest),
}

impl Call {
    /// The driver's term, of orders.
    pub(super) fn term(&self) -> u64 {
        match self {
            Call::Status(_) | Call::Report | Call::Announce(_) | Call::Confirm(_) => 0,
            Call::Ensure(request) => request.driver_term,
            Call::Change(request) => request.driver_term,
            Call::Transfer(request) => request.driver_term,
            Call::Verify(request) => request.driver_term,
            Call::OtherSource(request) => request.driver_term,
            Call::Fence(request) => request.driver_term,
        }
    }
}

#[derive(Clone)]
pub(super) enum Reply {
    Status(Box<v1::ReplicaStatusReply>),
    /// The members, by a linearizable read.
    Members(Box<v1::ConfirmMembersReply>),
    Done,
    /// The meta group vouches for the boot of this token, or says why not.
    Vouched(u64, Result<(), String>),
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
    /// A node that wants to be vouched for under this token.
    Announce {
        from: NodeId,
        id: u64,
        token: u64,
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
    Fence(GroupId, ReplicaId),
}

/// What a driver works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Subject {
    Create(u64),
    Move(u64),
    /// A replica, by group, that its node does not hold any more or is to be fenced there.
    Debt(u64, u64),
}
