//! The way back: the group as it was, and no trace of the target.

use pontoon_proto::v1;
use v1::{MoveBlocker, MovePhase};

use super::{Action, Decision, Group, Observation, Parts, fence, leaderless, wait};

pub(super) fn next(mv: &v1::Move, parts: &Parts, seen: &Observation) -> Decision {
    // Before Learner nobody had heard of the target.
    let learner = u32::from(MovePhase::Learner as u8);
    let Some(target) = parts.target.filter(|_| mv.entered_ms.contains_key(&learner)) else {
        return Decision::Advance(MovePhase::Aborted);
    };
    let Some(group) = Group::seen(seen) else {
        return leaderless(mv);
    };
    if group.is_joint() {
        return Decision::Act(vec![Action::LeaveJoint]);
    }
    if group.votes(target) && mv.entered_ms.contains_key(&u32::from(MovePhase::Joint as u8)) {
        // A joint entry of this move was under way when it turned back.
        return Decision::Advance(MovePhase::RemoveOld);
    }
    if group.votes(target) {
        let reason =
            format!("{target} votes by another hand: move it on with a new move once this one is pruned");
        return wait(MoveBlocker::MembersChanged, reason);
    }
    if group.names(target) {
        return Decision::Act(vec![Action::RemoveLearner(target)]);
    }
    // A driver of an earlier term may have an addition under way: only a linearizable read after it was fenced by the
    // record's term shows that none took effect.
    if !seen.confirmed {
        return Decision::Act(vec![Action::ConfirmRemoved]);
    }
    // Nobody waits for a target that was given up: it is no member, and what it holds is fenced when it returns.
    let given_up = mv.gave_up() != MoveBlocker::None;
    let gone = (seen.target_removed, seen.target_silent || given_up);
    fence(target, seen.target.as_ref(), gone, MoveBlocker::TargetSilent, MovePhase::Aborted)
}
