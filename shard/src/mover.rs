//! The mover: what to do next about a move, from its record and what is seen of the world. Pure.
//!
//! A driver (the leader of the meta group) observes, asks [`next`], carries the actions out or commits the next phase,
//! and observes again. Every action means "ensure that": a repeat is harmless, its answer is never trusted; what counts
//! is what is seen afterwards. So a driver that dies loses nothing, and two drivers at once do no harm: the record's
//! compare-and-set lets one of them advance, and both want the same of the group.
//!
//! ```text
//! Planned → Reserved → Learner → Snapshot → CatchUp → Verify → PreSwitch → Joint → RemoveOld → Fence → Cleanup → Done
//!    └─────────┴──────────┴──────────┴─────────┴─────────┴──────────┴─→ Aborting → Aborted
//!                                          from Joint only for a target whose node was removed
//! ```
//!
//! | phase, once committed | what is ensured | over when |
//! |---|---|---|
//! | Planned | nothing yet | the group has a leader and the plan still fits its members |
//! | Reserved | the target has room | the target granted it |
//! | Learner | the target's replica exists and is a learner | the configuration names it |
//! | Snapshot | the learner has a state | it follows the log |
//! | CatchUp | the learner is close | matched, applied and persisted within [`LAG`] |
//! | Verify | all replicas hash their state at one entry | the target's hash is the leader's |
//! | PreSwitch | the source does not lead | a voter that stays leads, or there is none |
//! | Joint | target votes, source is a learner | the configuration says so and is not joint |
//! | RemoveOld | the source is no member | a linearizable read says so |
//! | Fence | tombstone at the source, then its data gone | the source's node says so |
//! | Cleanup | nothing is left over | at once |
//!
//! What is decided is then judged with a look at the clock ([`Watch`]): whether the move gets on, and what is done if not.
//!
//! Kinds: an addition has no source, a removal no target; phases without a subject pass. A learner that is added for good
//! passes Joint as it is; one that is removed was never in a quorum.
//!
//! # Who may die when
//!
//! | | before Joint is committed | Joint | RemoveOld and later |
//! |---|---|---|---|
//! | driver | the next one reads record and group and goes on in the same phase | the same; if the group stands in the joint configuration, its leader leaves it with or without a driver | the same |
//! | source | nobody needs it: the leader is another voter, or is elected; a single voter's group waits for its return | the joint configuration commits with the majority of both halves; with three voters the two that stay suffice for the old half, they and the target for the new one | the fence waits for its return, or for its removal from the cluster; the group has left it behind |
//! | target | the move waits, or is cancelled: the learner counts in no quorum | before the joint entry: the target is not caught up any more, so it is not entered, and if its node is removed from the cluster the move goes back; after: the staying voters suffice for both halves, and the move goes on when the target is back | it is a voter like any other |
//! | group's leader | another is elected and the observation comes from it | the same | the same |
//! | meta's majority | the data goes on; a joint configuration is left by the group's leader; the move waits | the same | the same |
//!
//! A group with a single voter has no fault tolerance between the entry of the joint configuration and its end:
//! leadership then passes to the target inside the joint configuration, once the target holds all entries.
//!
//! The point of no return is the commit of phase Joint in the record, not the joint entry: a cancelled move cannot enter
//! it, and only in it the joint entry is proposed. So a move that aborts never has a voter to undo, but for one case: in
//! Joint the target's node is removed from the cluster before the target votes. It never will, so the move goes back; and if
//! a joint entry that was under way takes effect after all, it goes forward again. Either way it ends, and whoever was lost
//! with the node is replaced by another move.

mod abort;
pub mod orders;
mod path;
mod stall;

use pontoon_proto::{NodeId, ReplicaId, v1};
use v1::{MoveBlocker, MoveKind, MovePhase};

pub use self::stall::{Judged, Note, Patience, Watch, failure, needs_hand};

/// A learner is close if it lacks at most so many entries.
pub const LAG: u64 = 64;

/// What a driver has seen of a move's world, all of it after it read the record.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Observation {
    /// What the node of the group's leader said of its replica; `None` if nobody answered as leader.
    pub leader: Option<v1::ReplicaInfo>,
    /// Whether the leader passed a read barrier before it gave its configuration ([`Action::ConfirmRemoved`]).
    pub confirmed: bool,
    /// What the target's node said; `None` if it did not answer.
    pub target: Option<v1::ReplicaStatusReply>,
    /// What the source's node said; `None` if it did not answer.
    pub source: Option<v1::ReplicaStatusReply>,
    /// Whether the target granted [`Action::Reserve`] to this driver.
    pub reserved: bool,
    /// The target's node was removed from the cluster.
    pub target_removed: bool,
    /// The source's node was removed from the cluster.
    pub source_removed: bool,
    /// The target's node has been silent for longer than anybody waits.
    pub target_silent: bool,
    /// The source's node has been silent for longer than anybody waits.
    pub source_silent: bool,
}

/// Something to ensure. Carried out in the order given; one that fails is tried again after the next observation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// The node has room for the replica. It may refuse, with a reason.
    Reserve {
        /// The target's node.
        node: NodeId,
        /// The replica to come.
        replica: ReplicaId,
        /// About how large it is.
        bytes: u64,
    },
    /// The replica exists on its node and waits for a snapshot.
    EnsureReplica {
        /// The target's node.
        node: NodeId,
        /// The replica.
        replica: ReplicaId,
    },
    /// The group's configuration names the replica as a learner.
    AddLearner(ReplicaId),
    /// This voter leads.
    TransferLeader {
        /// The voter.
        to: ReplicaId,
    },
    /// One joint step.
    EnterJoint {
        /// Learners that become voters.
        promote: Vec<ReplicaId>,
        /// Voters that become learners.
        demote: Vec<ReplicaId>,
    },
    /// The joint configuration is over.
    LeaveJoint,
    /// The group's configuration does not name this learner.
    RemoveLearner(ReplicaId),
    /// The tombstone is durable on the node, then the replica's data is gone.
    Fence {
        /// The node.
        node: NodeId,
        /// The replica that shall never be there again.
        replica: ReplicaId,
    },
    /// An entry of the group's log asks all replicas for a hash of their state.
    Verify,
    /// The replica asks another member for the state that it receives.
    OtherSource {
        /// The target's node.
        node: NodeId,
        /// The replica.
        replica: ReplicaId,
    },
    /// Observe again, with the leader's configuration after a read barrier.
    ConfirmRemoved,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Carry these out, then observe again.
    Act(Vec<Action>),
    /// Commit this phase, then observe again.
    Advance(MovePhase),
    /// The same, and note that the node of the replica that goes owes its fence: it does not answer, and nobody waits for it any
    /// more. It is fenced when it returns. Until then it is no member, so nobody hears it.
    AdvanceOwing(MovePhase),
    /// Commit the way back, and note that the target is given up: the next move of the group goes elsewhere. Only of moves that no
    /// operator asked for.
    GiveUp {
        /// What held the move up.
        blocker: MoveBlocker,
        /// The same in words.
        reason: String,
    },
    /// Nothing can be done now.
    Wait {
        /// What holds the move up.
        blocker: MoveBlocker,
        /// The same in words, with the next step where a person can take one.
        reason: String,
    },
}

/// Decides what to do about a move.
pub fn next(mv: &v1::Move, seen: &Observation) -> Decision {
    let parts = match Parts::of(mv) {
        Ok(parts) => parts,
        Err(reason) => return wait(MoveBlocker::Malformed, reason),
    };
    let phase = mv.phase();
    match phase {
        MovePhase::Done | MovePhase::Aborted => wait(MoveBlocker::None, "the move has ended"),
        MovePhase::Aborting => abort::next(mv, &parts, seen),
        // A target whose node was removed never comes, and one that has been silent for too long is not waited for.
        _ if (mv.cancel_requested
            || ((seen.target_removed || seen.target_silent) && parts.target.is_some()))
            && phase < MovePhase::Joint =>
        {
            Decision::Advance(MovePhase::Aborting)
        }
        MovePhase::Joint if seen.target_removed && path::is_as_before(&parts, seen) => {
            Decision::Advance(MovePhase::Aborting)
        }
        _ => path::next(phase, mv, &parts, seen),
    }
}

fn wait(blocker: MoveBlocker, reason: impl Into<String>) -> Decision {
    Decision::Wait { blocker, reason: reason.into() }
}

/// Nobody answers as the group's leader.
fn leaderless(mv: &v1::Move) -> Decision {
    let reason = format!("g{} has no leader that answers: start the nodes of its voters", mv.group);
    wait(MoveBlocker::NoLeader, reason)
}

/// The replicas of a move; both for a replacement, one of them otherwise.
#[derive(Debug, Clone, Copy)]
struct Parts {
    source: Option<ReplicaId>,
    target: Option<ReplicaId>,
    /// Whether the target shall vote in the end.
    promotes: bool,
}

impl Parts {
    fn of(mv: &v1::Move) -> Result<Parts, String> {
        let replica = |id: u64, part: &str| {
            ReplicaId::new(id)
                .map_err(|error| format!("the record's {part} is wrong ({error}): cancel the move"))
        };
        Ok(match mv.kind() {
            MoveKind::Replace => Parts {
                source: Some(replica(mv.source, "source")?),
                target: Some(replica(mv.target, "target")?),
                promotes: true,
            },
            kind @ (MoveKind::Add | MoveKind::AddLearner) => Parts {
                source: None,
                target: Some(replica(mv.target, "target")?),
                promotes: kind == MoveKind::Add,
            },
            MoveKind::Remove => {
                Parts { source: Some(replica(mv.source, "source")?), target: None, promotes: false }
            }
        })
    }
}

/// The group as its leader describes it.
struct Group<'a> {
    info: &'a v1::ReplicaInfo,
    conf: v1::ConfState,
}

impl<'a> Group<'a> {
    fn seen(seen: &'a Observation) -> Option<Group<'a>> {
        let info = seen.leader.as_ref()?;
        Some(Group { info, conf: info.conf_state.clone()? })
    }

    fn leads(&self, replica: ReplicaId) -> bool {
        self.info.replica == replica.get()
    }

    fn is_joint(&self) -> bool {
        !self.conf.voters_outgoing.is_empty() || !self.conf.learners_next.is_empty()
    }

    fn votes(&self, replica: ReplicaId) -> bool {
        self.conf.voters.contains(&replica.get())
    }

    /// In whatever role, the outgoing half of a joint configuration included.
    fn names(&self, replica: ReplicaId) -> bool {
        let conf = &self.conf;
        let lists = [&conf.voters, &conf.learners, &conf.voters_outgoing, &conf.learners_next];
        lists.into_iter().any(|list| list.contains(&replica.get()))
    }

    fn progress(&self, replica: ReplicaId) -> Option<&v1::ReplicaProgress> {
        self.info.progress.iter().find(|progress| progress.replica == replica.get())
    }

    /// The voter that follows the log most closely, apart from `but`.
    fn best_voter(&self, but: ReplicaId) -> Option<ReplicaId> {
        let follows = self.info.progress.iter().filter(|progress| progress.active && !progress.snapshot);
        follows
            .filter(|progress| progress.replica != but.get() && self.conf.voters.contains(&progress.replica))
            .max_by_key(|progress| (progress.matched, std::cmp::Reverse(progress.replica)))
            .and_then(|progress| ReplicaId::new(progress.replica).ok())
    }
}

/// The replica itself, if its node has it; a later or earlier replica of the group on the node is another one.
fn replica_at(status: Option<&v1::ReplicaStatusReply>, replica: ReplicaId) -> Option<&v1::ReplicaInfo> {
    status?.replica.as_ref().filter(|info| info.replica == replica.get())
}

/// Whether the node vouches that the replica is gone and will not come back.
fn is_fenced(status: &v1::ReplicaStatusReply, replica: ReplicaId) -> bool {
    status.min_replica > replica.get() && replica_at(Some(status), replica).is_none()
}

/// What a replica that must go still needs: nothing, its node's answer, or the fence.
fn fence(
    replica: ReplicaId,
    status: Option<&v1::ReplicaStatusReply>,
    (removed, silent): (bool, bool),
    blocker: MoveBlocker,
    then: MovePhase,
) -> Decision {
    let node = replica.node();
    match status {
        Some(status) if is_fenced(status, replica) => Decision::Advance(then),
        Some(_) => Decision::Act(vec![Action::Fence { node, replica }]),
        None if removed => Decision::Advance(then),
        None if silent => Decision::AdvanceOwing(then),
        None => {
            let reason = format!(
                "{node} does not answer and still holds {replica}: start it, or run `pontoon decommission {node}`"
            );
            wait(blocker, reason)
        }
    }
}
