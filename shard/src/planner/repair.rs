//! What must be begun now, whatever it costs: replicas that are lost, lacking, against the rules, or on nodes that drain.

use std::collections::{BTreeMap, BTreeSet};

use pontoon_proto::{GroupId, NodeId, ReplicaId, v1};
use v1::{MoveKind, MovePurpose};

use super::{MAX_RUNNING_MOVES, Rule, Seen};
use crate::{meta::MetaState, mover::needs_hand};

/// Moves in which one node may take part, as the one that leaves or the one that takes.
const MOVES_PER_NODE: usize = 32;
/// Moves that are kept free for replicas that are lost or lacking.
const FREE_FOR_REPAIR: usize = MAX_RUNNING_MOVES / 2;

/// The largest odd number of replicas that so many nodes can hold: an even one needs more nodes for the same fault
/// tolerance.
fn odd(wanted: usize, able: usize) -> usize {
    let most = wanted.min(able);
    if most.is_multiple_of(2) { most.saturating_sub(1) } else { most }
}

fn node_of(replica: u64) -> Option<u64> {
    ReplicaId::new(replica).ok().map(|replica| replica.node().get())
}

/// How well a node suits a rule, the smallest best: how it lies to the other replicas, then whether it is liked.
pub(super) type Rank = (Vec<usize>, i32);

/// The nodes that may take one more replica beside those on `beside`, the best first; of equals those that hold less.
pub(super) fn candidates<'a>(
    state: &'a MetaState,
    seen: &Seen,
    rule: &Rule,
    beside: &BTreeSet<u64>,
    load: &BTreeMap<u64, usize>,
) -> Vec<(Rank, &'a v1::Node)> {
    let neighbours: Vec<&v1::Node> =
        beside.iter().filter_map(|id| state.nodes.get(id).map(|node| &**node)).collect();
    let takes = |node: &&v1::Node| {
        node.state() == v1::NodeState::Live
            && !beside.contains(&node.id)
            && !seen.is_shut(node.id)
            && rule.allows(node)
    };
    let nodes = state.nodes.values().map(|node| &**node).filter(takes);
    let mut ranked: Vec<(Rank, &v1::Node)> = nodes
        .map(|node| ((rule.crowding(neighbours.iter().copied().chain([node])), rule.dislike(node)), node))
        .collect();
    let load_of = |node: &v1::Node| load.get(&node.id).copied().unwrap_or(0);
    ranked.sort_by(|(a, one), (b, other)| (a, load_of(one), one.id).cmp(&(b, load_of(other), other.id)));
    ranked
}

/// Why a move is begun and how much it presses, the smallest first.
type Urgency = (MovePurpose, bool, usize, u64);

/// Nodes for a replica, the best first.
type Targets = Vec<(Rank, u64)>;

struct Need {
    urgency: Urgency,
    kind: MoveKind,
    source: u64,
    /// Nodes in order of preference; empty for a removal.
    targets: Targets,
    reason: String,
}

/// A shard that may be moved, with what its rule says of it.
struct Case<'a> {
    state: &'a MetaState,
    seen: &'a Seen,
    load: &'a BTreeMap<u64, usize>,
    shard: &'a v1::Shard,
    rule: &'a Rule,
    given_up: &'a GivenUp,
}

/// Per group the nodes at which its moves were given up ([`MetaState::given_up`]).
type GivenUp = BTreeMap<u64, Vec<NodeId>>;

fn given_up(state: &MetaState) -> GivenUp {
    let groups = state.moves.values().filter(|mv| mv.gave_up() != v1::MoveBlocker::None).map(|mv| mv.group);
    let groups: BTreeSet<u64> = groups.collect();
    groups.into_iter().map(|group| (group, state.given_up(group))).collect()
}

impl<'a> Case<'a> {
    fn node(&self, replica: u64) -> Option<&'a v1::Node> {
        node_of(replica).and_then(|node| self.state.nodes.get(&node)).map(|node| &**node)
    }

    /// Why a replica does not come back, if so.
    fn lost(&self, replica: u64) -> Option<String> {
        let id = ReplicaId::new(replica).ok()?;
        if self.node(replica).is_none_or(|node| node.state() == v1::NodeState::Removed) {
            return Some(format!("{} was removed from the cluster", id.node()));
        }
        if self.seen.dead.contains(&(self.shard.group, id.node())) {
            return Some(format!("{id} is dead"));
        }
        let silent = self.seen.silent.contains(&id.node());
        silent.then(|| format!("{} has been silent for too long", id.node()))
    }

    fn held(&self) -> BTreeSet<u64> {
        let members = self.shard.voters.iter().chain(&self.shard.learners);
        members.filter_map(|id| node_of(*id)).collect()
    }

    /// Nodes that may take a replica, in order of preference, beside all members but those of `leaving`.
    fn free(&self, leaving: &[u64]) -> Targets {
        let gone: BTreeSet<u64> = leaving.iter().filter_map(|id| node_of(*id)).collect();
        let held = self.held();
        let stays: BTreeSet<u64> = held.difference(&gone).copied().collect();
        let free = candidates(self.state, self.seen, self.rule, &stays, self.load);
        let free = free.into_iter().map(|(rank, node)| (rank, node.id));
        free.filter(|(_, node)| !held.contains(node)).collect()
    }

    /// Of these, the ones to choose from. Where a move of the group was given up is tried again only if there is nowhere else, and then
    /// where that is longest ago.
    fn targets(&self, leaving: &[u64]) -> Targets {
        let free = self.free(leaving);
        let given_up = self.given_up.get(&self.shard.group).map_or(&[][..], Vec::as_slice);
        let is_untried = |node: &u64| !given_up.iter().any(|tried| tried.get() == *node);
        if given_up.is_empty() || free.iter().any(|(_, node)| is_untried(node)) {
            return free.into_iter().filter(|(_, node)| is_untried(node)).collect();
        }
        let longest_ago =
            given_up.iter().find_map(|tried| free.iter().find(|(_, node)| *node == tried.get()));
        longest_ago.cloned().into_iter().collect()
    }

    fn need(
        &self,
        purpose: MovePurpose,
        kind: MoveKind,
        source: u64,
        targets: Targets,
        reason: String,
    ) -> Option<Need> {
        let voters = self.shard.voters.iter().filter(|id| self.lost(**id).is_none()).count();
        let urgency = (purpose, self.shard.group != GroupId::META.0, voters, self.shard.group);
        let possible = !targets.is_empty() || kind == MoveKind::Remove;
        possible.then_some(Need { urgency, kind, source, targets, reason })
    }

    fn next(&self) -> Option<Need> {
        let shard = self.shard;
        let lost: Vec<u64> = shard.voters.iter().copied().filter(|id| self.lost(*id).is_some()).collect();
        let there = shard.voters.len() - lost.len();
        if let Some(&source) = lost.first() {
            return self.replace_lost(source, &lost, there);
        }
        if let Some(&source) = shard.learners.iter().find(|id| self.lost(**id).is_some()) {
            let reason = self.lost(source).unwrap_or_default();
            return self.need(MovePurpose::Repair, MoveKind::Remove, source, Vec::new(), reason);
        }
        let wanted = self.rule.voters.unwrap_or(shard.replicas_wanted) as usize;
        if there < wanted {
            // Nodes that could hold voters: those that do, and those that may take one.
            if odd(wanted, there + self.free(&[]).len()) > there {
                let targets = self.targets(&[]);
                let reason = format!("it has {there} of the replicas that it should have");
                return self.need(MovePurpose::Repair, MoveKind::Add, 0, targets, reason);
            }
        }
        self.learners().or_else(|| self.surplus(wanted)).or_else(|| self.misplaced())
    }

    /// A voter that does not come back is replaced. If no other node can take its place and it is dead on a living node, it is
    /// removed while the others are a majority, and its node is given a new one after that. Where those that are left are no
    /// majority, nothing can be changed any more: that is for an operator.
    fn replace_lost(&self, source: u64, lost: &[u64], there: usize) -> Option<Need> {
        if there * 2 <= self.shard.voters.len() {
            return None;
        }
        let reason = self.lost(source).unwrap_or_default();
        let targets = self.targets(lost);
        let id = ReplicaId::new(source).ok()?;
        let is_dead = self.seen.dead.contains(&(self.shard.group, id.node()));
        match (targets.is_empty(), is_dead) {
            (true, true) => self.need(MovePurpose::Repair, MoveKind::Remove, source, Vec::new(), reason),
            (true, false) => None,
            (false, _) => self.need(MovePurpose::Repair, MoveKind::Replace, source, targets, reason),
        }
    }

    /// Learners that a rule asks for; and one in the wrong place goes, for it is made anew at no risk.
    fn learners(&self) -> Option<Need> {
        let wrong = self.shard.learners.iter().copied().find(|id| self.unfit(*id).is_some());
        if let Some(source) = wrong {
            let (purpose, reason) = self.unfit(source)?;
            return self.need(purpose, MoveKind::Remove, source, Vec::new(), reason);
        }
        let wanted = self.rule.learners? as usize;
        let there = self.shard.learners.len();
        if there < wanted {
            let reason = format!("it has {there} of {wanted} learners");
            return self.need(MovePurpose::Repair, MoveKind::AddLearner, 0, self.targets(&[]), reason);
        }
        let surplus = self.shard.learners.iter().copied().filter(|_| there > wanted).max()?;
        let reason = format!("it has {there} learners and should have {wanted}");
        self.need(MovePurpose::Rules, MoveKind::Remove, surplus, Vec::new(), reason)
    }

    /// More voters than a rule asks for. Those that an operator added where no rule counts stay.
    fn surplus(&self, wanted: usize) -> Option<Need> {
        self.rule.voters?;
        let there = self.shard.voters.len();
        if there <= wanted {
            return None;
        }
        let worst = self.shard.voters.iter().copied().max_by_key(|id| {
            let others =
                self.shard.voters.iter().filter(|other| *other != id).filter_map(|other| self.node(*other));
            let crowding = self.rule.crowding(others);
            let load = node_of(*id).and_then(|node| self.load.get(&node)).copied().unwrap_or(0);
            (self.unfit(*id).is_some(), std::cmp::Reverse(crowding), load, *id)
        })?;
        let reason = format!("it has {there} voters and should have {wanted}");
        self.need(MovePurpose::Rules, MoveKind::Remove, worst, Vec::new(), reason)
    }

    /// Why a replica should not be where it is, if so.
    fn unfit(&self, replica: u64) -> Option<(MovePurpose, String)> {
        let node = self.node(replica)?;
        let broken = self.rule.breaks(node);
        match broken.first() {
            Some(broken) if !self.rule.freeze => {
                Some((MovePurpose::Rules, format!("n{} is against {broken}", node.id)))
            }
            _ if node.state() == v1::NodeState::Draining => {
                Some((MovePurpose::Drain, format!("n{} drains", node.id)))
            }
            _ => None,
        }
    }

    /// A voter that is not where it should be, or that lies with another one although there is a better place.
    fn misplaced(&self) -> Option<Need> {
        let mut unfit: Vec<_> =
            self.shard.voters.iter().filter_map(|id| Some((self.unfit(*id)?, *id))).collect();
        unfit.sort();
        if let Some(((purpose, reason), source)) = unfit.into_iter().next() {
            return self.need(purpose, MoveKind::Replace, source, self.targets(&[source]), reason);
        }
        if self.rule.freeze || self.rule.spread.is_empty() {
            return None;
        }
        let nodes: Vec<&v1::Node> = self.shard.voters.iter().filter_map(|id| self.node(*id)).collect();
        let now = self.rule.crowding(nodes.iter().copied());
        if now.iter().all(|crowded| *crowded == 0) {
            return None;
        }
        let better = self.shard.voters.iter().filter_map(|source| {
            let others = nodes.iter().copied().filter(|node| Some(node.id) != node_of(*source));
            let targets = self.targets(&[*source]);
            let target = self.state.nodes.get(&targets.first()?.1)?;
            let then = self.rule.crowding(others.chain([&**target]));
            (then < now).then_some((then, *source, targets))
        });
        let (_, source, targets) = better.min()?;
        let reason = format!("its voters lie together by {}", self.rule.spread.join(", "));
        self.need(MovePurpose::Rules, MoveKind::Replace, source, targets, reason)
    }
}

/// Moves that bring groups nearer to what they should be: first what is lost or lacking, the meta group before predicates and these
/// by how little they have left, then what is against the rules, then what lies on nodes that drain. A voter on a node that was
/// removed from the cluster, is silent for too long, or is dead itself is lost. A group gains voters only if there are nodes
/// to reach an odd number of them, so that it never rests on two. At most one move per group, and few enough that
/// [`MAX_RUNNING_MOVES`] run and no node takes part in too many; some of them are kept free for repairs.
///
/// The sessions are 0: the caller fills in fresh numbers.
pub fn repairs(state: &MetaState, seen: &Seen) -> Vec<v1::StartMove> {
    let mut load = state.load();
    let given_up = given_up(state);
    let cases = state
        .shards
        .values()
        .filter(|shard| shard.state() == v1::ShardState::Live && state.running_move(shard.group).is_none());
    let mut needs: Vec<(u64, Need)> = cases
        .filter_map(|shard| {
            let rule = state.rulebook().of(&shard.predicate);
            let case = Case { state, seen, load: &load, shard, rule, given_up: &given_up };
            Some((shard.group, case.next()?))
        })
        .collect();
    needs.sort_by_key(|(_, need)| need.urgency);
    let mut slots = Slots::of(state);
    let mut moves = Vec::new();
    for (group, need) in needs {
        let purpose = need.urgency.0;
        if !slots.has_room(purpose) {
            break;
        }
        let source = if need.source == 0 { None } else { node_of(need.source) };
        let open = || need.targets.iter().filter(|(_, node)| slots.takes(*node));
        // Several needs of one turn must not all meet at the node that held the least before them.
        let best = open().next().map(|(rank, _)| rank);
        let equals = open().filter(|(rank, _)| Some(rank) == best).map(|(_, node)| *node);
        let target = equals.min_by_key(|node| (load.get(node).copied().unwrap_or(0), *node));
        if (target.is_none() && need.kind != MoveKind::Remove)
            || source.is_some_and(|node| !slots.takes(node))
        {
            continue;
        }
        slots.take(source.into_iter().chain(target));
        if let Some(target) = target {
            *load.entry(target).or_insert(0) += 1;
        }
        moves.push(v1::StartMove {
            group,
            kind: need.kind.into(),
            source: need.source,
            target_node: target.unwrap_or(0),
            reason: need.reason,
            purpose: purpose.into(),
            ..Default::default()
        });
    }
    moves
}

/// How many moves may still begin, in all and per node.
pub(super) struct Slots {
    running: usize,
    per_node: BTreeMap<u64, usize>,
}

impl Slots {
    pub(super) fn of(state: &MetaState) -> Slots {
        let mut slots = Slots { running: 0, per_node: BTreeMap::new() };
        // One that only waits for somebody's return does not hold up the others.
        for mv in state.running_moves().filter(|mv| !needs_hand(mv)) {
            slots.take([mv.source, mv.target].into_iter().filter_map(node_of));
        }
        slots
    }

    pub(super) fn has_room(&self, purpose: MovePurpose) -> bool {
        let kept = if purpose <= MovePurpose::Repair { 0 } else { FREE_FOR_REPAIR };
        self.running + kept < MAX_RUNNING_MOVES
    }

    pub(super) fn takes(&self, node: u64) -> bool {
        self.per_node.get(&node).copied().unwrap_or(0) < MOVES_PER_NODE
    }

    pub(super) fn take(&mut self, nodes: impl IntoIterator<Item = u64>) {
        self.running += 1;
        for node in nodes {
            *self.per_node.entry(node).or_default() += 1;
        }
    }
}

/// Nodes for the first replicas of a new predicate: the largest odd number up to what its rule, or else `wanted`, asks for, that
/// there are nodes for. Empty if there is none.
pub fn placement(state: &MetaState, predicate: &str, wanted: usize, seen: &Seen) -> Vec<NodeId> {
    let rule = state.rulebook().of(predicate);
    let load = state.load();
    let wanted = rule.voters.map_or(wanted, |voters| voters as usize);
    let mut chosen: BTreeSet<u64> = BTreeSet::new();
    let mut nodes = Vec::new();
    while nodes.len() < wanted {
        let Some(node) = candidates(state, seen, rule, &chosen, &load).first().map(|(_, node)| node.id)
        else {
            break;
        };
        chosen.insert(node);
        nodes.extend(NodeId::new(node));
    }
    nodes.truncate(odd(wanted, nodes.len()));
    nodes
}

/// A node for one more replica of a group. `None` if there is no such node.
pub fn target(state: &MetaState, group: u64, leaving: u64, seen: &Seen) -> Option<NodeId> {
    let shard = state.shards.get(&group)?;
    let rule = state.rulebook().of(&shard.predicate);
    let case = Case { state, seen, load: &state.load(), shard, rule, given_up: &given_up(state) };
    case.targets(&[leaving]).first().and_then(|(_, node)| NodeId::new(*node).ok())
}

/// Whether there is another node for what a move brings to its target, at which no move of the group was given up.
pub fn elsewhere(state: &MetaState, mv: &v1::Move, seen: &Seen) -> bool {
    let Some(shard) = state.shards.get(&mv.group) else { return false };
    let rule = state.rulebook().of(&shard.predicate);
    let case = Case { state, seen, load: &state.load(), shard, rule, given_up: &GivenUp::new() };
    let tried = state.given_up(mv.group);
    let new = |node: u64| Some(node) != node_of(mv.target) && !tried.iter().any(|tried| tried.get() == node);
    case.free(&[mv.source]).into_iter().any(|(_, node)| new(node))
}
