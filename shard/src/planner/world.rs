//! Nodes and groups by number, for plans over many of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use pontoon_proto::{NodeId, ReplicaId, v1};

use super::{Load, Rule, Seen, balance::Step};
use crate::meta::MetaState;

/// A replica does not return to a node that it left within this time.
const NO_RETURN_MS: u64 = 3_600_000;

/// A node that may hold replicas.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) id: u64,
    /// In bytes, or 1 for all where some node's is not known.
    pub(super) capacity: f64,
    pub(super) used: u64,
    pub(super) leads: usize,
    /// Writes per second that its replicas bear.
    pub(super) writes: u64,
    /// Writes and reads per second of the groups that it leads.
    pub(super) led: u64,
}

impl Place {
    pub(super) fn utilisation(&self) -> f64 {
        self.used as f64 / self.capacity
    }
}

/// A voter and the number of its place; one past the last for a node that takes part in no plan.
#[derive(Debug, Clone, Copy)]
pub(super) struct Member {
    pub(super) replica: u64,
    pub(super) place: usize,
}

#[derive(Debug, Clone)]
pub(super) struct Held<'a> {
    pub(super) id: u64,
    pub(super) predicate: &'a str,
    pub(super) revision: u64,
    pub(super) rule: &'a Arc<Rule>,
    pub(super) voters: Vec<Member>,
    /// Places of learners, which no voter may join.
    pub(super) learners: Vec<usize>,
    pub(super) bytes: u64,
    pub(super) load: Load,
    /// Which of the voters leads.
    pub(super) leader: Option<usize>,
    /// Whether a plan may move one of its replicas.
    pub(super) movable: bool,
    /// Places that a replica has left lately, or did not come to.
    pub(super) left: Vec<usize>,
}

/// What plans are made from.
#[derive(Debug, Clone)]
pub(super) struct World<'a> {
    pub(super) places: Vec<Place>,
    pub(super) groups: Vec<Held<'a>>,
    nodes: Vec<&'a v1::Node>,
    /// Per rule that does not let every node do, by its address: the places that it allows.
    allowed: BTreeMap<usize, Vec<bool>>,
    /// What must stay even while something else is made so.
    guard: Option<Guard>,
}

/// The use of nodes in bytes, while groups are weighed by something else.
#[derive(Debug, Clone)]
struct Guard {
    /// Per group.
    bytes: Vec<u64>,
    places: Vec<Place>,
    low: f64,
    high: f64,
}

impl Guard {
    fn allows(&self, group: usize, from: usize, to: usize) -> bool {
        let bytes = self.bytes[group] as f64;
        let use_of = |place: usize, by: f64| {
            let place = &self.places[place];
            (place.used as f64 + by) / place.capacity
        };
        bytes == 0.0 || (use_of(to, bytes) <= self.high && use_of(from, -bytes) >= self.low)
    }

    fn take(&mut self, group: usize, from: usize, to: usize) {
        self.places[from].used -= self.bytes[group];
        self.places[to].used += self.bytes[group];
    }
}

impl<'a> World<'a> {
    pub(super) fn of(state: &'a MetaState, seen: &Seen, now_ms: u64) -> World<'a> {
        let takes_part = |node: &&v1::Node| {
            node.state() == v1::NodeState::Live
                && !NodeId::new(node.id).is_ok_and(|id| seen.silent.contains(&id))
        };
        let nodes: Vec<&v1::Node> = state.nodes.values().map(|node| &**node).filter(takes_part).collect();
        let number: BTreeMap<u64, usize> = nodes.iter().enumerate().map(|(at, node)| (node.id, at)).collect();
        let nowhere = nodes.len();
        let place_of = |node: u64| number.get(&node).copied().unwrap_or(nowhere);
        // Utilisations of nodes compare only where each has a capacity.
        let known = nodes.iter().all(|node| seen.capacity_of(node) > 0);
        let mut places: Vec<Place> = nodes
            .iter()
            .map(|node| Place {
                id: node.id,
                capacity: if known { seen.capacity_of(node) as f64 } else { 1.0 },
                used: 0,
                leads: 0,
                writes: 0,
                led: 0,
            })
            .collect();
        let mut left: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
        let recent =
            |mv: &&Arc<v1::Move>| mv.finished_ms.saturating_add(NO_RETURN_MS) > now_ms && mv.source != 0;
        for mv in state.moves.values().filter(recent).filter(|mv| mv.phase() == v1::MovePhase::Done) {
            left.entry(mv.group).or_default().extend(place_of_replica(mv.source, place_of));
        }
        // Nor does it go where a move was given up.
        let gave_up = |mv: &&Arc<v1::Move>| {
            mv.gave_up() != v1::MoveBlocker::None && mv.finished_ms.saturating_add(NO_RETURN_MS) > now_ms
        };
        for mv in state.moves.values().filter(gave_up) {
            left.entry(mv.group).or_default().extend(place_of_replica(mv.target, place_of));
        }
        let mut groups = Vec::with_capacity(state.shards.len());
        for shard in state.shards.values() {
            let running = state.running_move(shard.group);
            let sight = seen.groups.get(&shard.group).copied().unwrap_or_default();
            let load = seen.loads.get(&shard.group).copied().unwrap_or_default();
            let member = |id: &u64| Some(Member { replica: *id, place: place_of_replica(*id, place_of)? });
            let voters: Vec<Member> = shard.voters.iter().filter_map(member).collect();
            let learners: Vec<usize> =
                shard.learners.iter().filter_map(|id| place_of_replica(*id, place_of)).collect();
            // A replica on its way counts where it goes.
            let leaving = running.map_or(0, |mv| mv.source);
            let arriving = running.and_then(|mv| place_of_replica(mv.target, place_of));
            let rests = voters.iter().filter(|member| member.replica != leaving).map(|member| member.place);
            for place in rests.chain(learners.iter().copied()).chain(arriving).collect::<BTreeSet<_>>() {
                if let Some(place) = places.get_mut(place) {
                    place.used += sight.bytes;
                    place.writes += load.writes;
                }
            }
            let rule = state.rulebook().of(&shard.predicate);
            let leader = voters
                .iter()
                .position(|member| places.get(member.place).is_some_and(|place| place.id == sight.leader));
            if let Some(leader) = leader {
                places[voters[leader].place].leads += 1;
                places[voters[leader].place].led += load.writes + load.reads;
            }
            let whole = voters.iter().all(|member| member.place < nowhere);
            groups.push(Held {
                id: shard.group,
                predicate: &shard.predicate,
                revision: shard.revision,
                rule,
                movable: whole && running.is_none() && shard.state() == v1::ShardState::Live && !rule.freeze,
                voters,
                learners,
                bytes: sight.bytes,
                load,
                leader,
                left: left.remove(&shard.group).unwrap_or_default(),
            });
        }
        let mut allowed = BTreeMap::new();
        for group in &groups {
            allowed.entry(Arc::as_ptr(group.rule) as usize).or_insert_with(|| {
                nodes
                    .iter()
                    .map(|node| group.rule.allows(node) && !seen.is_shut(node.id))
                    .collect::<Vec<bool>>()
            });
        }
        World { places, groups, nodes, allowed, guard: None }
    }

    /// The same nodes and groups, weighed by the writes that replicas bear. Groups of `moved` stay where they are; nobody holds
    /// less than `low` of its capacity in bytes afterwards, nor more than `high`, by a move of this world.
    pub(super) fn by_load(&self, moved: &BTreeSet<u64>, low: f64, high: f64) -> World<'a> {
        let mut world = self.clone();
        let guard = Guard {
            bytes: self.groups.iter().map(|group| group.bytes).collect(),
            places: self.places.clone(),
            low,
            high,
        };
        world.guard = Some(guard);
        for place in &mut world.places {
            (place.used, place.capacity) = (place.writes, 1.0);
        }
        for group in &mut world.groups {
            group.bytes = group.load.writes;
            group.movable &= !moved.contains(&group.id);
        }
        world
    }

    /// The node at a place.
    pub(super) fn node(&self, place: usize) -> &'a v1::Node {
        self.nodes[place]
    }

    /// Whether a voter may go to a place: allowed by the rule, empty, not left lately, and not worse for the group.
    pub(super) fn may_move(&self, group: usize, voter: usize, to: usize) -> bool {
        let held = &self.groups[group];
        let allowed = &self.allowed[&(Arc::as_ptr(held.rule) as usize)];
        if !held.movable
            || !allowed[to]
            || held.left.contains(&to)
            || held.learners.contains(&to)
            || held.voters.iter().any(|member| member.place == to)
        {
            return false;
        }
        let rule = held.rule;
        let from = held.voters[voter].place;
        if rule.dislike(self.nodes[to]) > rule.dislike(self.nodes[from]) {
            return false;
        }
        if self.guard.as_ref().is_some_and(|guard| !guard.allows(group, from, to)) {
            return false;
        }
        if rule.spread.is_empty() {
            return true;
        }
        let others =
            held.voters.iter().enumerate().filter(|(at, _)| *at != voter).map(|(_, member)| member.place);
        let others: Vec<&v1::Node> = others.map(|place| self.nodes[place]).collect();
        let crowding = |place: usize| rule.crowding(others.iter().copied().chain([self.nodes[place]]));
        crowding(to) <= crowding(from)
    }

    /// Moves a voter. A leader that moves hands leadership to the first of those that stay.
    pub(super) fn take(&mut self, step: Step) {
        let held = &mut self.groups[step.group];
        let from = held.voters[step.voter].place;
        held.voters[step.voter].place = step.to;
        self.places[from].used -= held.bytes;
        self.places[step.to].used += held.bytes;
        self.places[from].writes -= held.load.writes;
        self.places[step.to].writes += held.load.writes;
        if let Some(guard) = &mut self.guard {
            guard.take(step.group, from, step.to);
        }
        let led = held.load.writes + held.load.reads;
        if held.leader == Some(step.voter) {
            self.places[from].leads -= 1;
            self.places[from].led -= led;
            held.leader = (0..held.voters.len()).find(|voter| *voter != step.voter).or(Some(step.voter));
            if let Some(leader) = held.leader {
                self.places[held.voters[leader].place].leads += 1;
                self.places[held.voters[leader].place].led += led;
            }
        }
    }
}

fn place_of_replica(replica: u64, place_of: impl Fn(u64) -> usize) -> Option<usize> {
    ReplicaId::new(replica).ok().map(|replica| place_of(replica.node().get()))
}
