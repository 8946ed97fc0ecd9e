//! The map of the cluster as this node has it: nodes, shards, running moves.
//!
//! The meta group owns the map; here is a copy that only goes forward. Beside it stand two hints that no group
//! replicates: where a node was last heard from, and who was last seen to lead a group. Hints may be wrong; whoever
//! follows one is told the truth at the other end.

use std::{collections::HashMap, sync::Arc};

use dashmap::DashMap;
use pontoon_proto::{GroupId, NodeId, ReplicaId, v1};
use pontoon_raftstore::SnapshotBudget;
use pontoon_shard::planner::Rulebook;
use tokio::sync::watch;

/// One version of the map with its indexes.
#[derive(Debug, Default)]
pub(crate) struct MapView {
    map: v1::ClusterMap,
    predicates: HashMap<String, usize>,
    groups: HashMap<u64, usize>,
    nodes: HashMap<u64, usize>,
    rulebook: Rulebook,
}

impl MapView {
    pub(crate) fn new(map: v1::ClusterMap) -> Self {
        let by_shard = |key: fn(&v1::Shard) -> Option<u64>| -> HashMap<u64, usize> {
            map.shards.iter().enumerate().filter_map(|(at, shard)| Some((key(shard)?, at))).collect()
        };
        let predicates = map
            .shards
            .iter()
            .enumerate()
            .filter(|(_, shard)| shard.kind() != v1::ShardKind::Meta)
            .map(|(at, shard)| (shard.predicate.clone(), at))
            .collect();
        let groups = by_shard(|shard| Some(shard.group));
        let nodes = map.nodes.iter().enumerate().map(|(at, node)| (node.id, at)).collect();
        // Rules of a later version are the meta leader's affair; here they only explain.
        let rulebook = map.rules.as_ref().and_then(|rules| Rulebook::read(rules).ok()).unwrap_or_default();
        MapView { map, predicates, groups, nodes, rulebook }
    }

    pub(crate) fn map(&self) -> &v1::ClusterMap {
        &self.map
    }

    pub(crate) fn version(&self) -> u64 {
        self.map.version
    }

    /// What is turned on in the cluster. A sender that does not say so knows of version 1 alone.
    pub(crate) fn cluster_version(&self) -> u32 {
        self.map.cluster_version.max(1)
    }

    /// The shard of a predicate, in whatever state it is.
    pub(crate) fn predicate(&self, name: &str) -> Option<&v1::Shard> {
        self.predicates.get(name).map(|&at| &self.map.shards[at])
    }

    pub(crate) fn shard(&self, group: GroupId) -> Option<&v1::Shard> {
        self.groups.get(&group.0).map(|&at| &self.map.shards[at])
    }

    pub(crate) fn node(&self, node: NodeId) -> Option<&v1::Node> {
        self.nodes.get(&node.get()).map(|&at| &self.map.nodes[at])
    }

    /// Voters whose nodes were removed from the cluster: they wait for others in their place.
    pub(crate) fn lost_voters(&self, shard: &v1::Shard) -> Vec<ReplicaId> {
        let gone = |node: NodeId| self.node(node).is_some_and(|node| node.state() == v1::NodeState::Removed);
        let voters = shard.voters.iter().filter_map(|&id| ReplicaId::new(id).ok());
        voters.filter(|replica| gone(replica.node())).collect()
    }

    /// Whether fewer replicas than wanted are there or can come back.
    pub(crate) fn under_replicated(&self, shard: &v1::Shard) -> bool {
        shard.voters.len() - self.lost_voters(shard).len() < self.wanted(shard)
    }

    /// How many voters a shard should have. The meta group grows with the cluster: that it does not have more than there are
    /// nodes for is nothing to complain of.
    pub(crate) fn wanted(&self, shard: &v1::Shard) -> usize {
        let wanted = self.rulebook.of(&shard.predicate).voters.unwrap_or(shard.replicas_wanted) as usize;
        let present = self.present().count();
        let odd = if present.is_multiple_of(2) { present.saturating_sub(1) } else { present };
        if shard.group == GroupId::META.0 { wanted.min(odd.max(1)) } else { wanted }
    }

    /// What received states may take of a node, if a rule says so.
    pub(crate) fn budget(&self) -> Option<SnapshotBudget> {
        self.rulebook.budget
    }

    /// Replicas on nodes where the rules do not want them, and the rule.
    pub(crate) fn misplaced(&self, shard: &v1::Shard) -> Vec<(ReplicaId, String)> {
        let rule = self.rulebook.of(&shard.predicate);
        let members = shard.voters.iter().chain(&shard.learners).filter_map(|&id| ReplicaId::new(id).ok());
        let broken = members.filter_map(|replica| {
            let node = self.node(replica.node()).filter(|node| node.state() != v1::NodeState::Removed)?;
            Some((replica, rule.breaks(node).into_iter().next()?))
        });
        broken.collect()
    }

    /// Nodes that are not removed.
    pub(crate) fn present(&self) -> impl Iterator<Item = &v1::Node> {
        self.map.nodes.iter().filter(|node| node.state() != v1::NodeState::Removed)
    }
}

/// The nodes that hold or once founded a shard, voters first, without repetition: whoever may know something of it.
pub(crate) fn member_nodes(shard: &v1::Shard) -> Vec<NodeId> {
    nodes_of(shard.voters.iter().chain(&shard.learners).chain(&shard.initial))
}

/// The nodes that hold a shard's members now, voters first. A founder that has left is none of them, and may come back.
pub(crate) fn holders(shard: &v1::Shard) -> Vec<NodeId> {
    nodes_of(shard.voters.iter().chain(&shard.learners))
}

fn nodes_of<'a>(replicas: impl Iterator<Item = &'a u64>) -> Vec<NodeId> {
    let mut nodes = Vec::new();
    for &replica in replicas {
        if let Ok(replica) = ReplicaId::new(replica)
            && !nodes.contains(&replica.node())
        {
            nodes.push(replica.node());
        }
    }
    nodes
}

/// The newest map that this node has heard, and its hints.
///
/// Invariant: the version of the view never goes back.
#[derive(Debug)]
pub(crate) struct MapCache {
    view: watch::Sender<Arc<MapView>>,
    /// Where a node said that it listens, in a greeting newer than the map's record.
    heard: DashMap<u64, String>,
    leaders: DashMap<u64, NodeId>,
}

impl MapCache {
    pub(crate) fn new(first: v1::ClusterMap) -> Self {
        MapCache {
            view: watch::Sender::new(Arc::new(MapView::new(first))),
            heard: DashMap::new(),
            leaders: DashMap::new(),
        }
    }

    pub(crate) fn view(&self) -> Arc<MapView> {
        self.view.borrow().clone()
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<MapView>> {
        self.view.subscribe()
    }

    /// Takes a map if it is newer than the one at hand.
    pub(crate) fn offer(&self, map: v1::ClusterMap) {
        if map.version <= self.view().version() {
            return;
        }
        let next = Arc::new(MapView::new(map));
        self.view.send_if_modified(|present| {
            if next.version() <= present.version() {
                return false;
            }
            // A record that changed is newer than what the node said before it changed.
            self.heard.retain(|&id, _| {
                NodeId::new(id).is_ok_and(|node| {
                    let address = |view: &MapView| view.node(node).map(|node| node.address.clone());
                    address(present) == address(&next)
                })
            });
            *present = next;
            true
        });
    }

    pub(crate) fn heard_from(&self, node: NodeId, address: &str) {
        if !address.is_empty() {
            self.heard.insert(node.get(), address.to_owned());
        }
    }

    /// Where a node listens, as far as is known.
    pub(crate) fn address(&self, node: NodeId) -> Option<String> {
        if let Some(heard) = self.heard.get(&node.get()) {
            return Some(heard.clone());
        }
        self.view().node(node).map(|node| node.address.clone())
    }

    pub(crate) fn set_leader(&self, group: GroupId, node: NodeId) {
        self.leaders.insert(group.0, node);
    }

    pub(crate) fn forget_leader(&self, group: GroupId) {
        self.leaders.remove(&group.0);
    }

    /// Who was last seen to lead a group.
    pub(crate) fn leader(&self, group: GroupId) -> Option<NodeId> {
        self.leaders.get(&group.0).map(|node| *node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: u64, address: &str) -> v1::Node {
        v1::Node { id, address: address.to_owned(), ..Default::default() }
    }

    fn map(version: u64, nodes: Vec<v1::Node>) -> v1::ClusterMap {
        let shard =
            v1::Shard { predicate: "name".to_owned(), group: 2, epoch: version, ..Default::default() };
        v1::ClusterMap { version, nodes, shards: vec![shard], ..Default::default() }
    }

    #[test]
    fn an_older_map_changes_nothing() {
        let cache = MapCache::new(v1::ClusterMap::default());
        cache.offer(map(5, vec![node(1, "a")]));
        cache.offer(map(4, vec![node(1, "b")]));
        assert_eq!(cache.view().version(), 5);
        assert_eq!(cache.view().predicate("name").unwrap().epoch, 5);
        assert_eq!(cache.view().shard(GroupId(2)).unwrap().predicate, "name");
        assert_eq!(cache.address(NodeId::new(1).unwrap()).as_deref(), Some("a"));
    }

    #[test]
    fn a_greeting_wins_until_the_map_changes_its_record() {
        let (cache, one) = (MapCache::new(map(1, vec![node(1, "old")])), NodeId::new(1).unwrap());
        cache.heard_from(one, "new");
        assert_eq!(cache.address(one).as_deref(), Some("new"));
        cache.offer(map(2, vec![node(1, "old"), node(2, "b")]));
        assert_eq!(cache.address(one).as_deref(), Some("new"));
        cache.offer(map(3, vec![node(1, "newer"), node(2, "b")]));
        assert_eq!(cache.address(one).as_deref(), Some("newer"));
    }

    #[test]
    fn members_are_named_once_voters_first() {
        let on = |node, ordinal| ReplicaId::on(NodeId::new(node).unwrap(), ordinal).get();
        let shard = v1::Shard {
            voters: vec![on(2, 2), on(3, 3)],
            learners: vec![on(4, 4)],
            initial: vec![on(1, 1), on(2, 2)],
            ..Default::default()
        };
        assert_eq!(member_nodes(&shard).iter().map(|node| node.get()).collect::<Vec<_>>(), [2, 3, 4, 1]);
        assert_eq!(holders(&shard).iter().map(|node| node.get()).collect::<Vec<_>>(), [2, 3, 4]);
    }
}
