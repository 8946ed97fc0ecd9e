//! The state and what can be asked of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use pontoon_proto::{ClusterId, GroupId, NodeId, ReplicaId, v1};

use crate::{planner::Rulebook, versions::Feature};

/// Everything that the meta group knows. Records are shared, so that a published copy costs little.
///
/// Invariants ([`MetaState::check_invariants`]): ids are below the next one to be given out; a group has at most one
/// move that has not ended; a predicate has one shard; two nodes that are not removed never share an address.
#[derive(Debug, Clone, PartialEq)]
pub struct MetaState {
    /// `None` before the bootstrap command.
    pub cluster: Option<ClusterId>,
    /// What is turned on; see [`crate::versions`].
    pub cluster_version: u32,
    /// The index of the last command.
    pub version: u64,
    /// By id; removed ones stay.
    pub nodes: BTreeMap<u64, Arc<v1::Node>>,
    /// By group.
    pub shards: BTreeMap<u64, Arc<v1::Shard>>,
    /// By id; ended ones stay until they are pruned.
    pub moves: BTreeMap<u64, Arc<v1::Move>>,
    /// By number, the newest [`super::MAX_EVENTS`].
    pub events: BTreeMap<u64, Arc<v1::Event>>,
    /// What operators want of the places of replicas.
    pub rules: Arc<v1::Rules>,
    /// A plan whose moves have not all begun.
    pub plan: Option<Arc<v1::Plan>>,
    /// Replicas, by group, that are members no more and whose nodes did not answer: they are fenced when these return.
    pub debts: BTreeSet<(u64, u64)>,
    /// The id of the next node.
    pub next_node: u64,
    /// No node gets an id below this one: entries that were lost may have given it out.
    pub nodes_from: u64,
    /// The id of the next group.
    pub next_group: u64,
    /// The id of the next move.
    pub next_move: u64,
    /// The number of the next event.
    pub next_event: u64,
    /// `rules`, read.
    pub(super) rulebook: Arc<Rulebook>,
    pub(super) by_predicate: BTreeMap<String, u64>,
    /// Group to the move that has not ended.
    pub(super) running: BTreeMap<u64, u64>,
}

impl Default for MetaState {
    fn default() -> Self {
        MetaState {
            cluster: None,
            cluster_version: 0,
            version: 0,
            nodes: BTreeMap::new(),
            shards: BTreeMap::new(),
            moves: BTreeMap::new(),
            events: BTreeMap::new(),
            rules: Arc::default(),
            plan: None,
            debts: BTreeSet::new(),
            next_node: 1,
            nodes_from: 1,
            next_group: GroupId::META.0 + 1,
            next_move: 1,
            next_event: 1,
            rulebook: Arc::default(),
            by_predicate: BTreeMap::new(),
            running: BTreeMap::new(),
        }
    }
}

/// Whether a move has come to its end, one way or the other.
pub(crate) fn ended(phase: v1::MovePhase) -> bool {
    matches!(phase, v1::MovePhase::Done | v1::MovePhase::Aborted)
}

impl MetaState {
    /// Whether the cluster has a feature.
    pub fn has(&self, feature: Feature) -> bool {
        feature.is_on(self.cluster_version)
    }

    /// The shard of a predicate, whatever its state.
    pub fn shard(&self, predicate: &str) -> Option<&Arc<v1::Shard>> {
        self.shards.get(self.by_predicate.get(predicate)?)
    }

    /// The group's move that has not ended.
    pub fn running_move(&self, group: u64) -> Option<&Arc<v1::Move>> {
        self.moves.get(self.running.get(&group)?)
    }

    /// All moves that have not ended.
    pub fn running_moves(&self) -> impl Iterator<Item = &Arc<v1::Move>> {
        self.running.values().filter_map(|id| self.moves.get(id))
    }

    /// Nodes at which moves of a group were given up since one of its moves was done, in the order of these moves.
    pub fn given_up(&self, group: u64) -> Vec<NodeId> {
        let mut nodes = Vec::new();
        for mv in self.moves.values().filter(|mv| mv.group == group && ended(mv.phase())) {
            if mv.phase() == v1::MovePhase::Done {
                nodes.clear();
            } else if mv.gave_up() != v1::MoveBlocker::None
                && let Ok(target) = ReplicaId::new(mv.target)
            {
                nodes.retain(|node| *node != target.node());
                nodes.push(target.node());
            }
        }
        nodes
    }

    /// The rules, read.
    pub fn rulebook(&self) -> &Rulebook {
        &self.rulebook
    }

    /// The same state under other rules.
    ///
    /// # Errors
    /// What does not read in them.
    pub fn with_rules(mut self, rules: v1::Rules) -> Result<MetaState, String> {
        self.rulebook = Arc::new(Rulebook::read(&rules)?);
        self.rules = Arc::new(rules);
        Ok(self)
    }

    /// Nodes that take part: live or draining.
    pub fn members(&self) -> impl Iterator<Item = &Arc<v1::Node>> {
        self.nodes.values().filter(|node| node.state() != v1::NodeState::Removed)
    }

    /// Nodes that may be given replicas.
    pub fn live_nodes(&self) -> impl Iterator<Item = NodeId> + '_ {
        let live = self.nodes.values().filter(|node| node.state() == v1::NodeState::Live);
        live.filter_map(|node| NodeId::new(node.id).ok())
    }

    /// How many replicas a node holds or is about to receive.
    pub fn replicas_on(&self, node: u64) -> usize {
        self.load().get(&node).copied().unwrap_or(0)
    }

    /// How many groups have a member on a node.
    pub fn groups_on(&self, node: u64) -> u64 {
        let here = |id: &u64| ReplicaId::new(*id).is_ok_and(|replica| replica.node().get() == node);
        let groups =
            self.shards.values().filter(|shard| shard.voters.iter().chain(&shard.learners).any(here));
        groups.count() as u64
    }

    /// Replicas per node, those on their way included.
    pub fn load(&self) -> BTreeMap<u64, usize> {
        let mut load = BTreeMap::new();
        let members = self.shards.values().flat_map(|shard| shard.voters.iter().chain(&shard.learners));
        for replica in members.copied().filter_map(|id| ReplicaId::new(id).ok()) {
            *load.entry(replica.node().get()).or_insert(0) += 1;
        }
        for mv in self.running_moves() {
            let arriving = |shard: &Arc<v1::Shard>| {
                !shard.voters.contains(&mv.target) && !shard.learners.contains(&mv.target)
            };
            if let (Ok(target), true) =
                (ReplicaId::new(mv.target), self.shards.get(&mv.group).is_some_and(arriving))
            {
                *load.entry(target.node().get()).or_insert(0) += 1;
            }
        }
        load
    }

    /// A state with the nodes, shards and moves of a map, and nothing else: for planning away from the meta group.
    pub fn of_map(map: v1::ClusterMap) -> MetaState {
        let mut state = MetaState {
            cluster: ClusterId::from_slice(&map.cluster).ok(),
            version: map.version,
            cluster_version: map.cluster_version.max(1),
            nodes: map.nodes.into_iter().map(|node| (node.id, Arc::new(node))).collect(),
            ..MetaState::default()
        };
        if let Some(rules) = map.rules
            && let Ok(book) = Rulebook::read(&rules)
        {
            (state.rules, state.rulebook) = (Arc::new(rules), Arc::new(book));
        }
        map.shards.into_iter().for_each(|shard| state.insert_shard(shard));
        map.moves.into_iter().for_each(|mv| state.insert_move(mv));
        state
    }

    /// The map as it travels to nodes.
    pub fn to_map(&self) -> v1::ClusterMap {
        v1::ClusterMap {
            cluster: self.cluster.map(|id| id.as_bytes().to_vec().into()).unwrap_or_default(),
            version: self.version,
            nodes: self.nodes.values().map(|node| v1::Node::clone(node)).collect(),
            shards: self.shards.values().map(|shard| v1::Shard::clone(shard)).collect(),
            moves: self.running_moves().map(|mv| v1::Move::clone(mv)).collect(),
            meta_leader: 0,
            rules: Some((*self.rules).clone()),
            cluster_version: self.cluster_version,
        }
    }

    /// Puts a record in, with the indexes that lead to it.
    pub(super) fn insert_shard(&mut self, shard: v1::Shard) {
        self.by_predicate.insert(shard.predicate.clone(), shard.group);
        self.shards.insert(shard.group, Arc::new(shard));
    }

    pub(super) fn remove_shard(&mut self, group: u64) {
        if let Some(shard) = self.shards.remove(&group) {
            self.by_predicate.remove(&shard.predicate);
        }
    }

    pub(super) fn insert_move(&mut self, mv: v1::Move) {
        if ended(mv.phase()) {
            if self.running.get(&mv.group) == Some(&mv.id) {
                self.running.remove(&mv.group);
            }
        } else {
            self.running.insert(mv.group, mv.id);
        }
        self.moves.insert(mv.id, Arc::new(mv));
    }

    /// Checks what must hold between commands.
    ///
    /// # Panics
    /// If it does not: naming what.
    pub fn check_invariants(&self) {
        let below = |last: Option<&u64>, next: u64| last.is_none_or(|last| *last < next);
        assert!(below(self.nodes.keys().last(), self.next_node), "node ids are below the next one");
        assert!(below(self.shards.keys().last(), self.next_group), "group ids are below the next one");
        assert!(below(self.moves.keys().last(), self.next_move), "move ids are below the next one");
        assert!(below(self.events.keys().last(), self.next_event), "events are below the next one");
        let predicates: BTreeMap<_, _> =
            self.shards.values().map(|s| (s.predicate.clone(), s.group)).collect();
        assert_eq!(predicates, self.by_predicate, "one shard per predicate");
        assert_eq!(predicates.len(), self.shards.len(), "one shard per predicate");
        let running: Vec<_> = self.moves.values().filter(|mv| !ended(mv.phase())).collect();
        let by_group: BTreeMap<_, _> = running.iter().map(|mv| (mv.group, mv.id)).collect();
        assert_eq!(by_group.len(), running.len(), "one move per group");
        assert_eq!(by_group, self.running, "the running moves are known by group");
        let addresses: std::collections::BTreeSet<_> = self.members().map(|node| &node.address).collect();
        assert_eq!(addresses.len(), self.members().count(), "members have addresses of their own");
        for shard in self.shards.values() {
            let members = shard.voters.iter().chain(&shard.learners).chain(&shard.initial);
            for replica in members.copied().filter_map(|id| ReplicaId::new(id).ok()) {
                assert!(replica.ordinal() < shard.next_ordinal, "replica ordinals are below the next one");
            }
        }
    }
}
