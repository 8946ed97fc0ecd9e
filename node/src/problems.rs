//! What is wrong with a group, in words: first a word that names the kind, then the next step.

use std::collections::BTreeSet;

use pontoon_proto::{ReplicaId, v1};

use crate::map::MapView;

/// A live replica this many entries behind is a problem.
const LAG_PROBLEM: u64 = 10_000;

/// The problems of a group, as its replicas and the map show them; without a map, those of the replicas alone.
pub(crate) fn problems(
    group: &v1::GroupView,
    shard: Option<&v1::Shard>,
    leader: Option<&v1::ReplicaInfo>,
    map: Option<&MapView>,
) -> Vec<String> {
    let mut problems = Vec::new();
    for replica in &group.replicas {
        let name = name(replica.replica);
        if !replica.dead.is_empty() {
            problems.push(format!("dead: replica {name}: {}", replica.dead));
        } else if let Some(leader) = leader
            && leader.commit.saturating_sub(replica.applied) > LAG_PROBLEM
        {
            let behind = leader.commit - replica.applied;
            problems.push(format!("lagging: replica {name} is {behind} entries behind; it is catching up"));
        }
    }
    let Some(map) = map else { return problems };
    let conf = leader.and_then(|leader| leader.conf_state.as_ref());
    match leader {
        None => problems.push("unavailable: no replica leads; start the nodes that hold its members".to_owned()),
        Some(leader) if leader.no_room_node != 0 => problems.push(format!(
            "full: it takes no writes: the disk of node {} is nearly full; free space there, or move predicates away",
            leader.no_room_node
        )),
        Some(_) if conf.is_some_and(|conf| !conf.voters_outgoing.is_empty()) => {
            problems.push("joint: in a joint configuration; its leader is leaving it".to_owned());
        }
        Some(_) => {}
    }
    let Some(shard) = shard else {
        problems.push("unknown: not in the map; it was dropped or is being made".to_owned());
        return problems;
    };
    let (there, wanted) = (shard.voters.len(), map.wanted(shard));
    if there < wanted {
        problems
            .push(format!("under-replicated: {there} of {wanted} replicas; more are added as nodes join"));
    }
    for replica in map.lost_voters(shard) {
        problems.push(format!(
            "lost: replica {replica}, {} was removed; another takes its place as soon as a node without one is live",
            replica.node()
        ));
    }
    let running = map.map().moves.iter().find(|mv| mv.group == shard.group);
    let moving: BTreeSet<u64> = running.iter().flat_map(|mv| [mv.source, mv.target]).collect();
    if let Some(conf) = conf {
        for learner in conf.learners.iter().filter(|id| !shard.learners.contains(id) && !moving.contains(id))
        {
            problems.push(format!(
                "stuck learner: {} belongs to no move; `pontoon move start {} --from {}` removes it",
                name(*learner),
                shard.predicate,
                ReplicaId::new(*learner).map_or(0, |id| id.node().get())
            ));
        }
        let members: BTreeSet<u64> =
            conf.voters.iter().chain(&conf.learners).chain(&conf.voters_outgoing).copied().collect();
        let ghosts = group.replicas.iter().map(|replica| replica.replica);
        for ghost in ghosts.filter(|id| !members.contains(id) && !moving.contains(id)) {
            problems.push(format!(
                "ghost: replica {} is no member and no move knows of it; it hears nothing and does no harm, and goes when its \
                 node owes its fence no more",
                name(ghost)
            ));
        }
    }
    for (replica, broken) in map.misplaced(shard).into_iter().filter(|(id, _)| !moving.contains(&id.get())) {
        problems.push(format!(
            "misplaced: replica {replica} is against {broken}; it moves as soon as another node may take it: `pontoon explain {}`",
            shard.predicate
        ));
    }
    problems
}

fn name(replica: u64) -> String {
    ReplicaId::new(replica).map_or_else(|_| "?".to_owned(), |replica| replica.to_string())
}

#[cfg(test)]
mod tests {
    use pontoon_proto::NodeId;

    use super::*;

    fn replica(node: u64, role: &str, commit: u64, applied: u64) -> v1::ReplicaInfo {
        let replica = ReplicaId::on(NodeId::new(node).unwrap(), 1).get();
        v1::ReplicaInfo { replica, role: role.to_owned(), term: 6, commit, applied, ..Default::default() }
    }

    #[test]
    fn a_well_group_has_no_problem_and_a_hurt_one_names_each() {
        let id = |node: u64| ReplicaId::on(NodeId::new(node).unwrap(), 1).get();
        let shard = v1::Shard {
            predicate: "p".to_owned(),
            voters: vec![id(1), id(2), id(3)],
            replicas_wanted: 3,
            ..Default::default()
        };
        let node = |id: u64| v1::Node { id, ..Default::default() };
        let rules = v1::Rules {
            defaults: Some(v1::PlacementRule {
                require: Some(v1::Words { words: vec!["!node=3".to_owned()] }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let nodes = (1..=3).map(node).collect();
        let view = MapView::new(v1::ClusterMap { nodes, ..Default::default() });
        let well = vec![replica(1, "leader", 50, 50), replica(2, "follower", 50, 49)];
        let leader = Some(&well[0]);
        let group = v1::GroupView { replicas: well.clone(), ..Default::default() };
        assert!(problems(&group, Some(&shard), leader, Some(&view)).is_empty());

        let dead = v1::ReplicaInfo { dead: "its log is damaged".to_owned(), ..replica(3, "dead", 0, 0) };
        let late = replica(4, "follower", 0, 0);
        let far = v1::ReplicaInfo { commit: 90_000, ..well[0].clone() };
        let group = v1::GroupView { replicas: vec![dead, late], ..Default::default() };
        let thin = v1::Shard { voters: vec![id(1)], ..shard.clone() };
        let found = problems(&group, Some(&thin), Some(&far), Some(&view));
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(
            problems(&group, Some(&thin), None, Some(&view))
                .iter()
                .any(|problem| problem.contains("no replica leads"))
        );

        // A learner that no move brought, a replica that is no member, and one against a rule.
        let conf_state =
            v1::ConfState { voters: shard.voters.clone(), learners: vec![id(4)], ..Default::default() };
        let leader = v1::ReplicaInfo { conf_state: Some(conf_state), ..well[0].clone() };
        let group = v1::GroupView {
            replicas: vec![leader.clone(), replica(5, "follower", 50, 50)],
            ..Default::default()
        };
        let nodes = (1..=5).map(node).collect();
        let view = MapView::new(v1::ClusterMap { nodes, rules: Some(rules), ..Default::default() });
        let found = problems(&group, Some(&shard), Some(&leader), Some(&view));
        let kinds: Vec<&str> = found.iter().filter_map(|problem| problem.split(':').next()).collect();
        assert_eq!(kinds, ["stuck learner", "ghost", "misplaced"], "{found:?}");
    }
}
