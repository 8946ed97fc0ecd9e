//! The way back: the group as it was, and no trace of the target.

use pontoon_proto::v1;
use v1::MovePhase;

use super::{Action, Decision, Group, Observation, Parts, fence, wait};

pub(super) fn next(mv: &v1::Move, parts: &Parts, seen: &Observation) -> Decision {
    // Before Learner nobody had heard of the target.
    let learner = u32::from(MovePhase::Learner as u8);
    let Some(target) = parts.target.filter(|_| mv.entered_ms.contains_key(&learner)) else {
        return Decision::Advance(MovePhase::Aborted);
    };
    let Some(group) = Group::seen(seen) else {
        return wait(format!("g{} has no leader that answers: start the nodes of its voters", mv.group));
    };
    if group.is_joint() {
        return Decision::Act(vec![Action::LeaveJoint]);
    }
    if group.votes(target) && mv.entered_ms.contains_key(&u32::from(MovePhase::Joint as u8)) {
        // A joint entry of this move was under way when it turned back.
        return Decision::Advance(MovePhase::RemoveOld);
    }
    if group.votes(target) {
        return wait(format!(
            "{target} votes by another hand: move it on with a new move once this one is pruned"
        ));
    }
    if group.names(target) {
        return Decision::Act(vec![Action::RemoveLearner(target)]);
    }
    // A driver of an earlier term may have an addition under way: only a linearizable read after it was fenced by the
    // record's term shows that none took effect.
    if !seen.confirmed {
        return Decision::Act(vec![Action::ConfirmRemoved]);
    }
    fence(target, seen.target.as_ref(), seen.target_removed, seen.target_silent, MovePhase::Aborted)
}
