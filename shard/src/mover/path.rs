//! The way forward.

use pontoon_proto::{ReplicaId, v1};
use pontoon_raftstore::rules::{Rule, is_broken};
use v1::{MoveBlocker, MovePhase, MovePurpose};

use super::{Action, Decision, Group, LAG, Observation, Parts, fence, leaderless, replica_at, wait};

pub(super) fn next(phase: MovePhase, mv: &v1::Move, parts: &Parts, seen: &Observation) -> Decision {
    // These two speak with one node only: the group may be without a leader meanwhile.
    match (phase, parts.source) {
        (MovePhase::Fence, Some(source)) => {
            let gone = (seen.source_removed, seen.source_silent);
            let then = MovePhase::Cleanup;
            return fence(source, seen.source.as_ref(), gone, MoveBlocker::SourceSilent, then);
        }
        (MovePhase::Fence, None) => return Decision::Advance(MovePhase::Cleanup),
        (MovePhase::Cleanup, _) => return Decision::Advance(MovePhase::Done),
        _ => {}
    }
    let Some(group) = Group::seen(seen) else {
        return leaderless(mv);
    };
    match phase {
        MovePhase::Planned => planned(mv, parts, &group),
        MovePhase::Reserved => reserved(mv, parts, seen),
        MovePhase::Learner => learner(parts, &group, seen),
        MovePhase::Snapshot => snapshot(parts, &group, seen),
        MovePhase::CatchUp => match parts.target {
            Some(target) => match behind(target, &group, seen) {
                Some(decision) => decision,
                None => Decision::Advance(MovePhase::Verify),
            },
            None => Decision::Advance(MovePhase::Verify),
        },
        MovePhase::Verify => verify(parts, &group, seen),
        MovePhase::PreSwitch => pre_switch(parts, &group, seen),
        MovePhase::Joint => joint(parts, &group, seen),
        MovePhase::RemoveOld => remove_old(parts, &group, seen),
        MovePhase::Fence
        | MovePhase::Cleanup
        | MovePhase::Done
        | MovePhase::Aborting
        | MovePhase::Aborted => {
            unreachable!("these phases are decided above")
        }
    }
}

/// The plan does not fit the members any more: the planner makes another one, an operator is told.
fn in_vain(mv: &v1::Move, reason: String) -> Decision {
    match mv.purpose() {
        MovePurpose::Operator => wait(MoveBlocker::MembersChanged, reason),
        _ => Decision::Advance(MovePhase::Aborting),
    }
}

fn planned(mv: &v1::Move, parts: &Parts, group: &Group<'_>) -> Decision {
    if group.is_joint() {
        return Decision::Act(vec![Action::LeaveJoint]);
    }
    if let Some(source) = parts.source {
        // A removal of what is gone already has its fence yet to make sure of, after a linearizable read as always.
        if !group.votes(source) && parts.target.is_some() {
            return in_vain(mv, format!("{source} is no voter of the group any more: cancel the move"));
        }
        if parts.target.is_none() && group.votes(source) && group.conf.voters.len() < 2 {
            let reason =
                format!("{source} is the group's only voter: cancel the move, or add a replica first");
            return in_vain(mv, reason);
        }
    }
    Decision::Advance(MovePhase::Reserved)
}

fn reserved(mv: &v1::Move, parts: &Parts, seen: &Observation) -> Decision {
    let Some(target) = parts.target else { return Decision::Advance(MovePhase::Learner) };
    match (&seen.target, seen.reserved) {
        (None, _) => silent(target, seen),
        (Some(_), true) => Decision::Advance(MovePhase::Learner),
        (Some(_), false) => {
            let (node, bytes) = (target.node(), mv.bytes_total);
            Decision::Act(vec![Action::Reserve { node, replica: target, bytes }])
        }
    }
}

/// The target's node does not answer.
fn silent(target: ReplicaId, seen: &Observation) -> Decision {
    let node = target.node();
    let reason = match seen.target_removed {
        true => format!("{node} was removed from the cluster: cancel the move"),
        false => format!("{node} does not answer: start it, or cancel the move"),
    };
    wait(MoveBlocker::TargetSilent, reason)
}

fn learner(parts: &Parts, group: &Group<'_>, seen: &Observation) -> Decision {
    let Some(target) = parts.target else { return Decision::Advance(MovePhase::Snapshot) };
    if let Some(decision) = unmade(target, seen) {
        return decision;
    }
    if group.names(target) {
        return Decision::Advance(MovePhase::Snapshot);
    }
    if group.is_joint() {
        return Decision::Act(vec![Action::LeaveJoint]);
    }
    Decision::Act(vec![Action::AddLearner(target)])
}

/// What is missing until the target's replica exists on its node.
fn unmade(target: ReplicaId, seen: &Observation) -> Option<Decision> {
    let Some(status) = &seen.target else { return Some(silent(target, seen)) };
    match replica_at(Some(status), target) {
        Some(info) if !info.dead.is_empty() => {
            let reason = format!("{target} is dead ({}): cancel the move and start another", info.dead);
            Some(wait(MoveBlocker::TargetDead, reason))
        }
        Some(_) => None,
        None if status.min_replica > target.get() => {
            let reason = format!("{} has fenced {target}: cancel the move", target.node());
            Some(wait(MoveBlocker::TargetFenced, reason))
        }
        None => Some(Decision::Act(vec![Action::EnsureReplica { node: target.node(), replica: target }])),
    }
}

fn snapshot(parts: &Parts, group: &Group<'_>, seen: &Observation) -> Decision {
    let Some(target) = parts.target else { return Decision::Advance(MovePhase::CatchUp) };
    if let Some(decision) = unmade(target, seen) {
        return decision;
    }
    if !group.names(target) {
        // Between two phases nobody else may change the members; an operator's hand could.
        return Decision::Act(vec![Action::AddLearner(target)]);
    }
    let applied = replica_at(seen.target.as_ref(), target).map_or(0, |info| info.applied);
    match group.progress(target) {
        _ if is_broken(Rule::PromoteCaughtUp) => Decision::Advance(MovePhase::CatchUp),
        Some(progress) if !progress.snapshot && progress.matched > 0 && applied > 0 => {
            Decision::Advance(MovePhase::CatchUp)
        }
        _ => receives(target, seen, "receives the group's state"),
    }
}

/// The target is brought up from a state. How far it is is seen elsewhere.
fn receives(target: ReplicaId, seen: &Observation, what: &str) -> Decision {
    let info = replica_at(seen.target.as_ref(), target);
    if info.and_then(|info| info.pull.as_ref()).is_some_and(|pull| pull.queued) {
        let reason = format!("{target} waits for its turn, or for its node's budget: this goes on by itself");
        return wait(MoveBlocker::Queued, reason);
    }
    let why = info.map(|info| info.pull_blocked.as_str()).filter(|why| !why.is_empty());
    let why = why.map_or_else(String::new, |why| format!(" ({why})"));
    wait(MoveBlocker::Copying, format!("{target} {what}{why}: this goes on by itself"))
}

/// What is missing until the target may vote: it must have matched (in its log), applied (in its engine) and persisted
/// within [`LAG`] of the leader, else the new majority would wait for it.
fn behind(target: ReplicaId, group: &Group<'_>, seen: &Observation) -> Option<Decision> {
    if let Some(decision) = unmade(target, seen) {
        return Some(decision);
    }
    if !group.names(target) {
        return Some(Decision::Act(vec![Action::AddLearner(target)]));
    }
    if is_broken(Rule::PromoteCaughtUp) {
        return None;
    }
    let slow = |what: &str, lacks: u64| {
        let reason = format!("{target} {what} {lacks} entries behind: this goes on by itself");
        Some(wait(MoveBlocker::CatchingUp, reason))
    };
    let info = replica_at(seen.target.as_ref(), target)?;
    // In a short log a learner may seem close although its own node still receives a state that an earlier leader offered.
    let is_receiving = info.pull.is_some() || info.applied == 0;
    let Some(progress) = group.progress(target).filter(|progress| !progress.snapshot && !is_receiving) else {
        return Some(receives(target, seen, "receives the group's state again"));
    };
    let durable = info.durable.max(info.persisted);
    let (last, commit) = (group.info.last_index, group.info.commit);
    if progress.matched + LAG < last {
        return slow("is", last - progress.matched);
    }
    if info.applied + LAG < commit {
        return slow("applies", commit - info.applied);
    }
    if durable + LAG < commit {
        return slow("persists", commit - durable);
    }
    None
}

/// The target's state must be that of the others before it may vote: hashes of one entry are compared, those of the leader and
/// the target, and of the source if it is there. A mismatch is for a person to look at.
fn verify(parts: &Parts, group: &Group<'_>, seen: &Observation) -> Decision {
    let Some(target) = parts.target else { return Decision::Advance(MovePhase::PreSwitch) };
    if let Some(decision) = behind(target, group, seen) {
        return decision;
    }
    // Whoever has caught up with nothing has no hash either.
    if is_broken(Rule::PromoteCaughtUp) {
        return Decision::Advance(MovePhase::PreSwitch);
    }
    let hashing = |who: &str| {
        wait(MoveBlocker::Hashing, format!("{who} hashes the group's state: this goes on by itself"))
    };
    let Some(told) = &group.info.verified else { return Decision::Act(vec![Action::Verify]) };
    if told.hash.is_empty() {
        return hashing("the leader");
    }
    let Some(there) = replica_at(seen.target.as_ref(), target) else { return silent(target, seen) };
    match &there.verified {
        Some(hash) if hash.index == told.index && hash.hash.is_empty() => {
            return hashing(&target.to_string());
        }
        Some(hash) if hash.index == told.index => {}
        // Asked again meanwhile: the leader comes to it. One that has passed it without a hash was elsewhere then, or took a
        // snapshot over it: it will never have one.
        Some(hash) if hash.index > told.index && group.info.applied < hash.index => {
            return hashing("the leader");
        }
        _ if there.applied < told.index => {
            let index = told.index;
            let reason = format!("{target} has not come to the hash at {index}: this goes on by itself");
            return wait(MoveBlocker::CatchingUp, reason);
        }
        // It started again, or took a snapshot, since: its hash there will never be known.
        _ => return Decision::Act(vec![Action::Verify]),
    }
    let source = parts.source.and_then(|source| replica_at(seen.source.as_ref(), source));
    let others = [source, Some(there)].into_iter().flatten();
    let differs = others
        .filter_map(|info| Some((info.replica, info.verified.as_ref()?)))
        .find(|(_, hash)| hash.index == told.index && !hash.hash.is_empty() && hash.hash != told.hash);
    match differs.and_then(|(replica, hash)| Some((ReplicaId::new(replica).ok()?, hash))) {
        None => Decision::Advance(MovePhase::PreSwitch),
        Some((replica, hash)) => {
            let (index, theirs, leaders) = (told.index, hex(&hash.hash), hex(&told.hash));
            let reason = format!(
                "the state of {replica} at index {index} differs from the leader's: its hash is {theirs}, the leader's {leaders}; \
                 cancel the move, keep both nodes' directories, and report it"
            );
            wait(MoveBlocker::HashesDiffer, reason)
        }
    }
}

/// The beginning of a hash, enough to tell it from others.
fn hex(hash: &[u8]) -> String {
    hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

fn pre_switch(parts: &Parts, group: &Group<'_>, seen: &Observation) -> Decision {
    if let Some(decision) = parts.target.and_then(|target| behind(target, group, seen)) {
        return decision;
    }
    if let Some(decision) = parts.source.and_then(|source| led_by(source, group)) {
        return decision;
    }
    Decision::Advance(MovePhase::Joint)
}

/// Moves leadership away from a source that leads, to a voter that stays; nothing to do if it is the only voter.
fn led_by(source: ReplicaId, group: &Group<'_>) -> Option<Decision> {
    if !group.leads(source) || group.conf.voters.len() < 2 {
        return None;
    }
    Some(match group.best_voter(source) {
        Some(to) => Decision::Act(vec![Action::TransferLeader { to }]),
        None => {
            let reason =
                format!("{source} leads and no other voter follows: start the nodes of the group's voters");
            wait(MoveBlocker::LeaderStays, reason)
        }
    })
}

/// Whether the joint step has not taken effect: the target has no vote and the group is in no joint configuration.
pub(super) fn is_as_before(parts: &Parts, seen: &Observation) -> bool {
    let (Some(target), Some(group)) = (parts.target, Group::seen(seen)) else { return false };
    !group.is_joint() && !group.votes(target) && (parts.promotes || !group.names(target))
}

fn joint(parts: &Parts, group: &Group<'_>, seen: &Observation) -> Decision {
    let arrived =
        parts.target.is_none_or(|target| group.votes(target) || (!parts.promotes && group.names(target)));
    let left = parts.source.is_none_or(|source| !group.votes(source));
    if arrived && left {
        if !group.is_joint() {
            return Decision::Advance(MovePhase::RemoveOld);
        }
        return leave(parts, group);
    }
    if group.is_joint() {
        // Somebody else's: not ours to judge, only to end.
        return Decision::Act(vec![Action::LeaveJoint]);
    }
    if let Some(decision) = parts.target.and_then(|target| behind(target, group, seen)) {
        return decision;
    }
    if let Some(decision) = parts.source.and_then(|source| led_by(source, group)) {
        return decision;
    }
    let promote = parts.target.into_iter().filter(|target| !group.votes(*target)).collect();
    let demote = parts.source.into_iter().filter(|source| group.votes(*source)).collect();
    Decision::Act(vec![Action::EnterJoint { promote, demote }])
}

/// The joint configuration is ours: leave it, under a leader that stays a voter.
fn leave(parts: &Parts, group: &Group<'_>) -> Decision {
    let Some(source) = parts.source.filter(|source| group.leads(*source)) else {
        return Decision::Act(vec![Action::LeaveJoint]);
    };
    // The leader is on its way out. Prefer a voter that was there before; the target only where there is none, and
    // only once it holds every entry, so that it can win at once.
    let stays = |id: &u64| *id != source.get() && Some(*id) != parts.target.map(ReplicaId::get);
    let all =
        |progress: &v1::ReplicaProgress| !progress.snapshot && progress.matched == group.info.last_index;
    let to = match group.conf.voters.iter().any(stays) {
        true => group.best_voter(source),
        false => parts.target.filter(|target| group.progress(*target).is_some_and(all)),
    };
    match to {
        Some(to) => Decision::Act(vec![Action::TransferLeader { to }]),
        None => {
            let reason =
                format!("{source} leads until a voter that stays holds every entry: this goes on by itself");
            wait(MoveBlocker::LeaderStays, reason)
        }
    }
}

fn remove_old(parts: &Parts, group: &Group<'_>, seen: &Observation) -> Decision {
    let Some(source) = parts.source else { return Decision::Advance(MovePhase::Fence) };
    if is_broken(Rule::LeftBehindFirst) {
        return Decision::Advance(MovePhase::Fence);
    }
    if group.is_joint() {
        return Decision::Act(vec![Action::LeaveJoint]);
    }
    if group.votes(source) {
        let reason =
            format!("{source} votes again by another hand: run `pontoon groups` and remove it there");
        return wait(MoveBlocker::MembersChanged, reason);
    }
    if group.names(source) {
        // A leader that left the joint configuration before it passed leadership on cannot remove itself.
        if let Some(to) = group.best_voter(source).filter(|_| group.leads(source)) {
            return Decision::Act(vec![Action::TransferLeader { to }]);
        }
        return Decision::Act(vec![Action::RemoveLearner(source)]);
    }
    if !seen.confirmed {
        return Decision::Act(vec![Action::ConfirmRemoved]);
    }
    Decision::Advance(MovePhase::Fence)
}
