//! What a driver asks and orders, and what a node makes of that: the same whoever carries the messages.
//!
//! Every order to a group says by what mandate it is given: the group's term as the driver has seen it, and the driver's
//! term, the move and the number of its phase, which rise from each order that must no longer take effect to those after it.
//! The first two because a driver acts in its own term only and the record's compare-and-set lets no earlier one advance; the
//! third because a group has one move at a time and moves are numbered; the last with each change of the record.

use std::collections::BTreeSet;

use pontoon_proto::{NodeId, ReplicaId, v1};
use pontoon_raftstore::{GroupStatus, Mandate, MemberChange, Role};
use v1::member_change::Change;

use super::{Action, Observation};
use crate::MetaState;

/// A call that ensures something, and the node that it goes to.
#[derive(Debug, Clone)]
pub enum Order {
    /// To a node that shall have room for so many bytes. Its report tells.
    Reserve(NodeId, u64),
    /// To a node that shall hold a replica.
    Ensure(NodeId, Box<v1::EnsureReplicaRequest>),
    /// To a node that must never hold a replica again.
    Fence(NodeId, v1::FenceReplicaRequest),
    /// To the group's leader.
    Change(NodeId, v1::ChangeMembersRequest),
    /// To the group's leader.
    Transfer(NodeId, v1::TransferLeaderRequest),
    /// To the group's leader.
    Verify(NodeId, v1::VerifyGroupRequest),
    /// To the target's node.
    OtherSource(NodeId, v1::OtherSourceRequest),
    /// To nobody: the next look begins with [`confirmation`].
    Confirm,
}

/// The change of a move's record that changes nothing yet, by a driver of this term: it holds for the record as it is.
pub fn advance(record: &v1::Move, driver_term: u64) -> v1::AdvanceMove {
    v1::AdvanceMove { id: record.id, expect_phase_seq: record.phase_seq, driver_term, ..Default::default() }
}

fn node_of(replica: u64) -> Option<NodeId> {
    ReplicaId::new(replica).ok().map(ReplicaId::node)
}

fn is_removed(state: &MetaState, node: NodeId) -> bool {
    state.nodes.get(&node.get()).is_none_or(|node| node.state() == v1::NodeState::Removed)
}

/// Everybody who may know something about a move's group.
pub fn witnesses(mv: &v1::Move, state: &MetaState) -> BTreeSet<NodeId> {
    let shard = state.shards.get(&mv.group);
    let members = shard.into_iter().flat_map(|shard| shard.voters.iter().chain(&shard.learners));
    let all = members.chain([&mv.source, &mv.target]);
    all.filter_map(|id| node_of(*id)).filter(|node| !is_removed(state, *node)).collect()
}

/// What the answers of the witnesses come to.
pub fn observation(
    mv: &v1::Move,
    state: &MetaState,
    reserved: bool,
    silent: &BTreeSet<NodeId>,
    answers: &[(NodeId, v1::ReplicaStatusReply)],
) -> Observation {
    let (source, target) = (node_of(mv.source), node_of(mv.target));
    let of = |node: Option<NodeId>| {
        answers.iter().find(|(asked, _)| Some(*asked) == node).map(|(_, answer)| answer.clone())
    };
    let leader = answers
        .iter()
        .filter_map(|(_, answer)| answer.replica.as_ref())
        .filter(|replica| replica.role == role_name(Role::Leader))
        .max_by_key(|replica| replica.term)
        .cloned();
    Observation {
        leader,
        confirmed: false,
        target: of(target),
        source: of(source),
        reserved,
        target_removed: target.is_some_and(|node| is_removed(state, node)),
        source_removed: source.is_some_and(|node| is_removed(state, node)),
        // Who answers is back, whatever was heard before.
        target_silent: of(target).is_none() && target.is_some_and(|node| silent.contains(&node)),
        source_silent: of(source).is_none() && source.is_some_and(|node| silent.contains(&node)),
    }
}

fn mandate(mv: &v1::Move, driver_term: u64, leader: &v1::ReplicaInfo) -> Option<v1::Mandate> {
    Some(v1::Mandate { group_term: leader.term, driver_term, r#move: mv.id, phase_seq: mv.phase_seq })
}

/// How the leader is asked for its members by a linearizable read; `None` without a leader.
pub fn confirmation(
    mv: &v1::Move,
    driver_term: u64,
    seen: &Observation,
) -> Option<(NodeId, v1::ConfirmMembersRequest)> {
    let leader = seen.leader.as_ref()?;
    let mandate = mandate(mv, driver_term, leader);
    Some((node_of(leader.replica)?, v1::ConfirmMembersRequest { group: mv.group, mandate }))
}

/// Takes the answer to [`confirmation`] into what was seen.
pub fn confirm(seen: &mut Observation, reply: v1::ConfirmMembersReply) {
    if let (Some(leader), v1::ConfirmMembersReply { refusal: None, conf_state: Some(conf), index }) =
        (&mut seen.leader, reply)
    {
        leader.conf_state = Some(conf);
        leader.applied = leader.applied.max(index);
        seen.confirmed = true;
    }
}

/// What the map must be told of the members, if it says something else than the group's leader: routing follows it.
pub fn members_update(mv: &v1::Move, seen: &Observation, state: &MetaState) -> Option<v1::UpdateMembers> {
    let leader = seen.leader.as_ref()?;
    let conf = leader.conf_state.as_ref().filter(|conf| conf.voters_outgoing.is_empty())?;
    let known = state.shards.get(&mv.group);
    if known.is_some_and(|shard| shard.voters == conf.voters && shard.learners == conf.learners) {
        return None;
    }
    Some(v1::UpdateMembers {
        group: mv.group,
        voters: conf.voters.clone(),
        learners: conf.learners.clone(),
        members_index: leader.applied,
    })
}

/// What is sent for an action.
///
/// # Errors
/// Why nothing can be sent now.
pub fn order(
    action: &Action,
    mv: &v1::Move,
    driver_term: u64,
    seen: &Observation,
    state: &MetaState,
) -> Result<Order, &'static str> {
    let group = mv.group;
    let leader = || {
        let leader = seen.leader.as_ref().ok_or("the group has no leader")?;
        let node = node_of(leader.replica).ok_or("the group's leader has no id")?;
        Ok((node, mandate(mv, driver_term, leader)))
    };
    let change = |change: Change| {
        let (node, mandate) = leader()?;
        let change = Some(v1::MemberChange { change: Some(change) });
        Ok(Order::Change(node, v1::ChangeMembersRequest { group, change, driver_term, mandate }))
    };
    let ids = |replicas: &[ReplicaId]| replicas.iter().map(|replica| replica.get()).collect();
    match action {
        Action::Reserve { node, bytes, .. } => Ok(Order::Reserve(*node, *bytes)),
        Action::EnsureReplica { node, replica } => {
            let shard = state.shards.get(&group).ok_or("the shard is gone")?;
            let request = v1::EnsureReplicaRequest {
                shard: Some((**shard).clone()),
                replica: replica.get(),
                initial: None,
                driver_term,
            };
            Ok(Order::Ensure(*node, Box::new(request)))
        }
        Action::Fence { node, replica } => {
            Ok(Order::Fence(*node, v1::FenceReplicaRequest { group, replica: replica.get(), driver_term }))
        }
        Action::AddLearner(replica) => change(Change::AddLearner(replica.get())),
        Action::RemoveLearner(replica) => change(Change::Remove(replica.get())),
        Action::LeaveJoint => change(Change::LeaveJoint(true)),
        Action::EnterJoint { promote, demote } => {
            change(Change::EnterJoint(v1::JointChange { promote: ids(promote), demote: ids(demote) }))
        }
        Action::TransferLeader { to } => {
            let (node, mandate) = leader()?;
            Ok(Order::Transfer(node, v1::TransferLeaderRequest { group, to: to.get(), driver_term, mandate }))
        }
        Action::Verify => {
            let (node, _) = leader()?;
            Ok(Order::Verify(node, v1::VerifyGroupRequest { group, driver_term }))
        }
        Action::OtherSource { node, replica } => Ok(Order::OtherSource(
            *node,
            v1::OtherSourceRequest { group, replica: replica.get(), driver_term },
        )),
        Action::ConfirmRemoved => Ok(Order::Confirm),
    }
}

/// A mandate as a group's leader takes it.
pub fn to_mandate(mandate: v1::Mandate) -> Mandate {
    let v1::Mandate { group_term, driver_term, r#move, phase_seq } = mandate;
    Mandate { term: group_term, place: [driver_term, r#move, phase_seq] }
}

/// A change of members as a group's leader takes it.
///
/// # Errors
/// What the message lacks.
pub fn to_change(change: Option<v1::MemberChange>) -> Result<MemberChange, String> {
    let id = |id: u64| ReplicaId::new(id).map_err(|error| error.to_string());
    let ids = |all: Vec<u64>| all.into_iter().map(id).collect::<Result<Vec<_>, _>>();
    Ok(match change.and_then(|change| change.change).ok_or("which change?")? {
        Change::AddLearner(replica) => MemberChange::AddLearner(id(replica)?),
        Change::Promote(replica) => MemberChange::Promote(id(replica)?),
        Change::Remove(replica) => MemberChange::Remove(id(replica)?),
        Change::EnterJoint(joint) => {
            MemberChange::EnterJoint { promote: ids(joint.promote)?, demote: ids(joint.demote)? }
        }
        Change::LeaveJoint(_) => MemberChange::LeaveJoint,
    })
}

/// A replica as other nodes and people are told of it; how large it is is another's knowledge.
pub fn replica_info(status: &GroupStatus) -> v1::ReplicaInfo {
    let progress = status.progress.iter().map(|peer| v1::ReplicaProgress {
        replica: peer.replica.get(),
        matched: peer.matched,
        snapshot: peer.snapshot,
        active: peer.active,
    });
    v1::ReplicaInfo {
        group: status.group.0,
        replica: status.replica.get(),
        role: role_name(status.role).to_owned(),
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
        pull: status.pull.as_ref().map(|pull| v1::PullView {
            bytes_done: pull.bytes_done,
            bytes_total: pull.bytes_total,
            queued: pull.queued,
        }),
        dead: status.dead.clone().unwrap_or_default(),
        bytes: 0,
        no_room_node: status.no_room.map_or(0, NodeId::get),
        pull_blocked: status.pull_blocked.clone().unwrap_or_default(),
        verified: status.verified.map(|verified| v1::VerifiedState {
            index: verified.index,
            hash: verified.hash.map_or_else(Default::default, |hash| hash.to_vec().into()),
        }),
    }
}

fn role_name(role: Role) -> &'static str {
    match role {
        Role::Leader => "leader",
        Role::Follower => "follower",
        Role::Candidate => "candidate",
        Role::Learner => "learner",
        Role::Dead => "dead",
    }
}
