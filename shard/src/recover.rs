//! Groups that have lost their quorum for good: which there are, and with which replica each goes on. Pure.
//!
//! A group lives while the replicas that are left can be a majority of each half of a configuration that one of them holds. Whoever
//! holds an older one may be wrong about that, which is the safe way to be wrong: a group that may live is left alone.
//!
//! Of what is left, the replica with the latest last entry (its term, then its index) has every entry that any of them
//! has and that was committed, by the argument of the Raft paper (section 5.4.3) for elections. It is chosen whether it votes or
//! learns. What only the lost ones had is lost: whatever they acknowledged after that entry.

use std::collections::{BTreeMap, BTreeSet};

use pontoon_proto::{GroupId, ReplicaId, v1};

/// The format of plans.
pub const PLAN_FORMAT: u32 = 1;
/// Ordinals that are passed over before a replica's new one: those that may have been given out by entries that are lost.
const ORDINALS_LOST: u32 = 1_000;

/// What nodes have left, by node.
pub type Remains = BTreeMap<u64, Vec<v1::Remain>>;

/// How the groups of a map go on that live no more, once the nodes that are `lost` never come back. Without its id and time.
pub fn plan(map: &v1::ClusterMap, remains: &Remains, lost: &BTreeSet<u64>) -> v1::RecoveryPlan {
    let mut plan = v1::RecoveryPlan {
        format: PLAN_FORMAT,
        cluster: map.cluster.clone(),
        lost: lost.iter().copied().collect(),
        ..Default::default()
    };
    let mut by_group: BTreeMap<u64, Vec<&v1::Remain>> = BTreeMap::new();
    for remain in remains.values().flatten() {
        by_group.entry(info(remain).group).or_default().push(remain);
    }
    // By number, so that the meta group comes first.
    let shards: BTreeMap<u64, &v1::Shard> = map.shards.iter().map(|shard| (shard.group, shard)).collect();
    for (group, shard) in shards {
        let left = by_group.remove(&group).unwrap_or_default();
        // One that is being made or dropped and has nothing has lost nothing either.
        if lives(&left) || (left.is_empty() && shard.state() != v1::ShardState::Live) {
            continue;
        }
        match step(shard, &left) {
            Some(step) => plan.steps.push(step),
            None => plan.gone.push(v1::LostGroup {
                group,
                predicate: shard.predicate.clone(),
                voters: shard.voters.clone(),
            }),
        }
    }
    plan
}

/// Whether those who are to go on have noticed that nobody leads them: from then on their logs stay as they are.
pub fn is_settled(plan: &v1::RecoveryPlan, remains: &Remains) -> bool {
    let goes_on = |info: &&v1::ReplicaInfo| {
        plan.steps.iter().any(|step| (step.group, step.from) == (info.group, info.replica))
    };
    remains.values().flatten().map(info).filter(goes_on).all(|info| info.leader == 0)
}

/// Why a plan does not hold any more, one line a group; empty: it does, or a part of it was carried out already.
pub fn obstacles(plan: &v1::RecoveryPlan, remains: &Remains) -> Vec<String> {
    let mut found = Vec::new();
    for step in &plan.steps {
        let left: Vec<&v1::Remain> =
            remains.values().flatten().filter(|remain| info(remain).group == step.group).collect();
        if left.iter().any(|remain| info(remain).replica == step.to) {
            continue;
        }
        let name = &step.predicate;
        if lives(&left) {
            found.push(format!("{name} (g{}) has a quorum again", step.group));
            continue;
        }
        match left.iter().find(|remain| info(remain).replica == step.from) {
            Some(remain)
                if (remain.last_term, info(remain).last_index) == (step.last_term, step.last_index) => {}
            Some(_) => found.push(format!("{name} (g{}) has gone on since", step.group)),
            None => {
                found.push(format!("the replica of {name} (g{}) that was to go on is not there", step.group))
            }
        }
    }
    found
}

fn info(remain: &v1::Remain) -> &v1::ReplicaInfo {
    static NONE: std::sync::LazyLock<v1::ReplicaInfo> = std::sync::LazyLock::new(v1::ReplicaInfo::default);
    remain.replica.as_ref().unwrap_or(&NONE)
}

/// Whether what is left can be a quorum of the group. A replica that waits for its state counts: it votes when that has come.
fn lives(left: &[&v1::Remain]) -> bool {
    let there: BTreeSet<u64> = left
        .iter()
        .map(|remain| info(remain))
        .filter(|info| info.dead.is_empty())
        .map(|info| info.replica)
        .collect();
    let serves = |voters: &[u64]| {
        let living = voters.iter().filter(|id| there.contains(id)).count();
        voters.is_empty() || living * 2 > voters.len()
    };
    left.iter()
        .filter_map(|remain| info(remain).conf_state.as_ref())
        .any(|conf| !conf.voters.is_empty() && serves(&conf.voters) && serves(&conf.voters_outgoing))
}

/// With whom the group goes on, if anybody has its state.
fn step(shard: &v1::Shard, left: &[&v1::Remain]) -> Option<v1::RecoveryStep> {
    let able = left.iter().filter(|remain| {
        let info = info(remain);
        info.dead.is_empty() && info.applied > 0
    });
    let votes = |remain: &v1::Remain| {
        let info = info(remain);
        info.conf_state.as_ref().is_some_and(|conf| conf.voters.contains(&info.replica))
    };
    let best = able.max_by_key(|remain| {
        let info = info(remain);
        (remain.last_term, info.last_index, votes(remain), std::cmp::Reverse(info.replica))
    })?;
    let survivor = info(best);
    let from = ReplicaId::new(survivor.replica).ok()?;
    let conf = survivor.conf_state.clone().unwrap_or_default();
    let members = [&conf.voters, &conf.voters_outgoing, &conf.learners, &conf.learners_next];
    let known = members.into_iter().flatten().copied().chain(left.iter().map(|remain| info(remain).replica));
    let highest = known.filter_map(|id| ReplicaId::new(id).ok()).map(ReplicaId::ordinal).max().unwrap_or(0);
    let ordinal = highest.max(shard.next_ordinal) + ORDINALS_LOST;
    let voters = conf.voters.iter().chain(&conf.voters_outgoing).copied().collect::<BTreeSet<_>>();
    Some(v1::RecoveryStep {
        group: shard.group,
        predicate: match GroupId(shard.group) {
            GroupId::META => "the meta group".to_owned(),
            _ => shard.predicate.clone(),
        },
        from: from.get(),
        to: ReplicaId::on(from.node(), ordinal).get(),
        last_term: best.last_term,
        last_index: survivor.last_index,
        commit: survivor.commit,
        voters: voters.into_iter().collect(),
        leftovers: left
            .iter()
            .map(|remain| info(remain).replica)
            .filter(|replica| *replica != from.get())
            .collect(),
    })
}

#[cfg(test)]
mod tests {
    use pontoon_proto::NodeId;

    use super::*;

    fn id(node: u64) -> u64 {
        ReplicaId::on(NodeId::new(node).unwrap(), 1).get()
    }

    fn conf(voters: &[u64]) -> v1::ConfState {
        v1::ConfState { voters: voters.iter().map(|node| id(*node)).collect(), ..Default::default() }
    }

    fn remain(node: u64, group: u64, last: (u64, u64), conf: v1::ConfState) -> v1::Remain {
        let replica = v1::ReplicaInfo {
            group,
            replica: id(node),
            last_index: last.1,
            commit: last.1.saturating_sub(1),
            applied: 5,
            conf_state: Some(conf),
            ..Default::default()
        };
        v1::Remain { replica: Some(replica), last_term: last.0 }
    }

    fn map(groups: &[u64]) -> v1::ClusterMap {
        let shards = groups.iter().map(|group| v1::Shard {
            group: *group,
            predicate: format!("p{group}"),
            state: v1::ShardState::Live.into(),
            next_ordinal: 4,
            voters: vec![id(1), id(2), id(3)],
            ..Default::default()
        });
        v1::ClusterMap { shards: shards.collect(), ..Default::default() }
    }

    fn planned(groups: &[u64], left: Vec<(u64, Vec<v1::Remain>)>, lost: &[u64]) -> v1::RecoveryPlan {
        plan(&map(groups), &left.into_iter().collect(), &lost.iter().copied().collect())
    }

    #[test]
    fn a_group_that_may_live_is_left_alone() {
        let all = conf(&[1, 2, 3]);
        let left = vec![(1, vec![remain(1, 7, (3, 9), all.clone())]), (2, vec![remain(2, 7, (3, 9), all)])];
        assert!(planned(&[7], left, &[3]).steps.is_empty());
        // One of the two knows of a later configuration of which they are too few; the other may know better.
        let left = vec![
            (1, vec![remain(1, 7, (3, 9), conf(&[1, 4, 5]))]),
            (2, vec![remain(2, 7, (3, 9), conf(&[1, 2, 3]))]),
        ];
        assert!(planned(&[7], left, &[3, 4, 5]).steps.is_empty());
        // Both halves of a joint configuration count.
        let joint = v1::ConfState { voters_outgoing: conf(&[1, 2, 3]).voters, ..conf(&[1, 4, 5]) };
        let left =
            vec![(1, vec![remain(1, 7, (3, 9), joint.clone())]), (2, vec![remain(2, 7, (3, 9), joint)])];
        assert_eq!(planned(&[7], left, &[3, 4, 5]).steps.len(), 1);
    }

    #[test]
    fn the_latest_entry_decides_and_the_others_are_left_over() {
        let five = conf(&[1, 2, 3, 4, 5]);
        let left =
            vec![(1, vec![remain(1, 7, (3, 90), five.clone())]), (2, vec![remain(2, 7, (4, 12), five)])];
        let plan = planned(&[7], left, &[3, 4, 5]);
        let step = &plan.steps[0];
        assert_eq!((step.from, step.last_term, step.last_index), (id(2), 4, 12));
        assert_eq!(step.leftovers, [id(1)]);
        let to = ReplicaId::new(step.to).unwrap();
        assert_eq!(to.node(), NodeId::new(2).unwrap());
        assert!(to.ordinal() >= 1_004, "above all that was given out, and what may have been: {to}");
    }

    #[test]
    fn a_learner_serves_where_no_voter_is_left_and_a_dead_one_never() {
        let learns = v1::ConfState { learners: vec![id(4)], ..conf(&[1, 2, 3]) };
        let mut dead = remain(3, 7, (9, 99), learns.clone());
        dead.replica.as_mut().unwrap().dead = "its log lost entries".into();
        let left = vec![(3, vec![dead]), (4, vec![remain(4, 7, (3, 9), learns)])];
        assert_eq!(planned(&[7], left, &[1, 2]).steps[0].from, id(4));
    }

    #[test]
    fn the_meta_group_comes_first_and_what_nobody_has_is_told() {
        let all = conf(&[1, 2, 3]);
        let left = vec![(3, vec![remain(3, 7, (3, 9), all.clone()), remain(3, 1, (3, 9), all)])];
        let plan = planned(&[7, 1, 8], left, &[1, 2]);
        assert_eq!(plan.steps.iter().map(|step| step.group).collect::<Vec<_>>(), [1, 7]);
        assert_eq!(plan.gone[0].predicate, "p8");
    }

    #[test]
    fn a_plan_holds_until_something_changes() {
        let all = conf(&[1, 2, 3]);
        let left = |last| -> Remains { [(3, vec![remain(3, 7, last, all.clone())])].into() };
        let plan = planned(&[7], vec![(3, vec![remain(3, 7, (3, 9), all.clone())])], &[1, 2]);
        assert!(obstacles(&plan, &left((3, 9))).is_empty());
        assert!(obstacles(&plan, &left((3, 10)))[0].contains("has gone on since"));
        assert!(obstacles(&plan, &Remains::new())[0].contains("is not there"));
        let back: Remains =
            [(3, vec![remain(3, 7, (3, 9), all.clone())]), (2, vec![remain(2, 7, (3, 9), all.clone())])]
                .into();
        assert!(obstacles(&plan, &back)[0].contains("has a quorum again"));
        // Carried out already, wherever it stands by now.
        let mut done = remain(3, 7, (3, 70_000), conf(&[]));
        done.replica.as_mut().unwrap().replica = plan.steps[0].to;
        assert!(obstacles(&plan, &[(3, vec![done])].into()).is_empty());
    }
}
