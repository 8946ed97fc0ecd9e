//! What a move will do, before it does: each configuration on the way with what may fail in it, and about how long it takes.

use std::time::Duration;

use pontoon_proto::v1;
use pontoon_raftstore::SnapshotBudget;

/// A single stream of a state hardly exceeds this, whatever the budget: the receiver writes it durably as it comes.
const RECEIVED_PER_SECOND: u64 = 150 << 20;
/// All replicas read and hash their state once before the swap, and the source once to make the manifest.
const HASHED_PER_SECOND: u64 = 400 << 20;
/// The phases themselves.
const PHASES: Duration = Duration::from_millis(300);

/// How many of so many voters a majority is.
fn majority(voters: usize) -> usize {
    voters / 2 + 1
}

fn may_fail(voters: usize) -> usize {
    voters.saturating_sub(majority(voters))
}

fn step(name: &str, voters: &[u64], outgoing: &[u64], learners: &[u64], text: &str) -> v1::MoveStep {
    // In a joint configuration both halves must have their majority.
    let halves = [voters, outgoing].into_iter().filter(|half| !half.is_empty());
    v1::MoveStep {
        name: name.to_owned(),
        voters: voters.to_vec(),
        outgoing: outgoing.to_vec(),
        learners: learners.to_vec(),
        quorum: majority(voters.len()) as u32,
        may_fail: halves.map(|half| may_fail(half.len())).min().unwrap_or(0) as u32,
        text: text.to_owned(),
    }
}

/// The configurations that a group passes through, by nodes; `source` and `target` are 0 where the kind has none.
pub(crate) fn steps(
    kind: v1::MoveKind,
    before: &[u64],
    learners: &[u64],
    source: u64,
    target: u64,
) -> Vec<v1::MoveStep> {
    let without = |all: &[u64], node: u64| -> Vec<u64> {
        all.iter().copied().filter(|other| node == 0 || *other != node).collect()
    };
    let with = |mut all: Vec<u64>, node: u64| {
        all.extend((node != 0).then_some(node));
        all
    };
    let voters = |target: u64| with(without(before, source), target);
    let mut steps = vec![step("now", before, &[], learners, "")];
    match kind {
        v1::MoveKind::AddLearner => {
            let learners = with(learners.to_vec(), target);
            steps.push(step("after", before, &[], &learners, "the new replica never counts for a majority"));
        }
        v1::MoveKind::Remove if !before.contains(&source) => {
            steps.push(step("after", before, &[], &without(learners, source), ""));
        }
        v1::MoveKind::Remove => {
            let after = voters(0);
            steps.push(step("joint", &after, before, learners, "both halves need their majority"));
            steps.push(step("after", &after, &[], learners, ""));
        }
        v1::MoveKind::Add | v1::MoveKind::Replace => {
            let joined = with(learners.to_vec(), target);
            let text = "the new replica receives the state; it does not count for a majority";
            steps.push(step("with the learner", before, &[], &joined, text));
            let text = match (before, kind) {
                ([_], v1::MoveKind::Replace) => {
                    "a one-voter group has no fault tolerance between Joint and RemoveOld: both nodes are needed"
                }
                _ => "both halves need their majority",
            };
            steps.push(step("joint", &voters(target), before, learners, text));
            steps.push(step("after", &voters(target), &[], learners, ""));
        }
    }
    steps
}

/// About how long a move of so many bytes takes while nothing holds it up and nobody suffers from it.
pub(crate) fn estimate(bytes: u64, budget: SnapshotBudget, receives: bool) -> Duration {
    if !receives {
        return PHASES;
    }
    let per_second = budget.bytes_per_second.unwrap_or(u64::MAX).clamp(1, RECEIVED_PER_SECOND);
    let seconds = bytes as f64 / per_second as f64 + 2.0 * bytes as f64 / HASHED_PER_SECOND as f64;
    PHASES + Duration::from_secs_f64(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn safety(steps: &[v1::MoveStep]) -> Vec<(&str, u32, u32)> {
        steps.iter().map(|step| (step.name.as_str(), step.quorum, step.may_fail)).collect()
    }

    #[test]
    fn three_voters_bear_one_fault_all_the_way() {
        let steps = steps(v1::MoveKind::Replace, &[1, 2, 3], &[], 3, 4);
        assert_eq!(
            safety(&steps),
            [("now", 2, 1), ("with the learner", 2, 1), ("joint", 2, 1), ("after", 2, 1)]
        );
        assert_eq!((&steps[1].learners[..], &steps[1].voters[..]), (&[4][..], &[1, 2, 3][..]));
        assert_eq!((&steps[2].voters[..], &steps[2].outgoing[..]), (&[1, 2, 4][..], &[1, 2, 3][..]));
        assert_eq!(steps[3].voters, [1, 2, 4]);
    }

    #[test]
    fn one_voter_bears_none_and_it_is_said_where_both_nodes_are_needed() {
        let steps = steps(v1::MoveKind::Replace, &[1], &[], 1, 2);
        assert!(steps.iter().all(|step| step.may_fail == 0));
        assert!(steps[2].text.contains("no fault tolerance between Joint and RemoveOld"), "{steps:?}");
    }

    #[test]
    fn what_is_added_or_removed_changes_how_many_may_fail() {
        let two = steps(v1::MoveKind::Add, &[1, 2], &[], 0, 3);
        assert_eq!(
            safety(&two),
            [("now", 2, 0), ("with the learner", 2, 0), ("joint", 2, 0), ("after", 2, 1)]
        );
        let removed = steps(v1::MoveKind::Remove, &[1, 2, 3], &[], 3, 0);
        assert_eq!(safety(&removed), [("now", 2, 1), ("joint", 2, 0), ("after", 2, 0)]);
        let learner = steps(v1::MoveKind::AddLearner, &[1, 2, 3], &[], 0, 4);
        assert_eq!(safety(&learner), [("now", 2, 1), ("after", 2, 1)]);
        let gone = steps(v1::MoveKind::Remove, &[1, 2, 3], &[4], 4, 0);
        assert_eq!((gone[0].learners.len(), gone[1].learners.len(), gone[1].may_fail), (1, 0, 1));
    }

    #[test]
    fn the_smaller_of_budget_and_engine_decides_how_long_it_takes() {
        let slow = estimate(80 << 20, SnapshotBudget::SLOW, true);
        assert!(slow >= Duration::from_secs(10) && slow < Duration::from_secs(12), "{slow:?}");
        let (fast, max) = (SnapshotBudget::FAST, SnapshotBudget::MAX);
        assert_eq!(estimate(1 << 30, max, true), estimate(1 << 30, fast, true));
        assert_eq!(estimate(1 << 30, SnapshotBudget::SLOW, false), PHASES);
    }
}
