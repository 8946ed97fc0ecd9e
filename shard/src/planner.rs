//! Where replicas go. Pure, and plain for now: live nodes with the fewest replicas.

use std::collections::BTreeSet;

use pontoon_proto::{GroupId, NodeId, ReplicaId, v1};

use crate::meta::MetaState;

/// How many moves may run at once before repairs wait.
pub const MAX_RUNNING_MOVES: usize = 64;

/// The largest odd number of replicas that so many nodes can hold: an even one needs more nodes for the same fault
/// tolerance.
fn odd(wanted: usize, live: usize) -> usize {
    let most = wanted.min(live);
    if most.is_multiple_of(2) { most.saturating_sub(1) } else { most }
}

/// Live nodes, those with the fewest replicas first.
fn by_load(state: &MetaState) -> Vec<NodeId> {
    let load = state.load();
    let mut nodes: Vec<NodeId> = state.live_nodes().collect();
    nodes.sort_by_key(|node| (load.get(&node.get()).copied().unwrap_or(0), *node));
    nodes
}

/// Nodes for the first replicas of a new predicate: the largest odd number up to `wanted` that there are live nodes
/// for. Empty if there is no live node.
pub fn placement(state: &MetaState, wanted: usize) -> Vec<NodeId> {
    let mut nodes = by_load(state);
    nodes.truncate(odd(wanted, nodes.len()));
    nodes
}

/// A node for one more replica of a group: live, without one yet. `None` if there is no such node.
pub fn target(state: &MetaState, group: u64) -> Option<NodeId> {
    let held = holders(state.shards.get(&group)?);
    by_load(state).into_iter().find(|node| !held.contains(node))
}

fn holders(shard: &v1::Shard) -> BTreeSet<NodeId> {
    let members = shard.voters.iter().chain(&shard.learners);
    members.filter_map(|id| ReplicaId::new(*id).ok()).map(ReplicaId::node).collect()
}

/// Where replicas have stopped for good on nodes that live: groups and nodes. Which replica it was its log may have
/// forgotten; a node has one of a group.
pub type Dead = BTreeSet<(u64, NodeId)>;

/// Voters on nodes that were removed from the cluster, and those that are dead.
fn lost_voters(state: &MetaState, shard: &v1::Shard, dead: &Dead) -> Vec<u64> {
    let gone =
        |node: NodeId| state.nodes.get(&node.get()).is_none_or(|node| node.state() == v1::NodeState::Removed);
    let lost = |id: u64| {
        let node = ReplicaId::new(id).map(ReplicaId::node);
        node.is_ok_and(|node| gone(node) || dead.contains(&(shard.group, node)))
    };
    shard.voters.iter().copied().filter(|id| lost(*id)).collect()
}

/// Moves that bring groups nearer to the number of voters they want: the meta group first, then predicates by what
/// they lack. A voter on a node that was removed from the cluster is lost: it is replaced before anything is added, as
/// soon as a live node has no replica yet. So is a dead one; if no other node can take its place, it is removed while the
/// others are a majority, and its node is given a new one after that. A group gains voters only if there are live nodes to reach an odd number of
/// them, so that it never rests on two. At most one move per group, and few enough that [`MAX_RUNNING_MOVES`] run.
///
/// The sessions are 0: the caller fills in fresh numbers.
pub fn repairs(state: &MetaState, dead: &Dead) -> Vec<v1::StartMove> {
    let live: BTreeSet<NodeId> = state.live_nodes().collect();
    let room = MAX_RUNNING_MOVES.saturating_sub(state.running_moves().count());
    let mut lacking: Vec<_> = state
        .shards
        .values()
        .filter(|shard| shard.state() == v1::ShardState::Live && state.running_move(shard.group).is_none())
        .filter_map(|shard| {
            let held = holders(shard);
            let lost = lost_voters(state, shard, dead);
            if let Some(&source) = lost.first() {
                let voters = shard.voters.len() - lost.len();
                return Some((shard.group != GroupId::META.0, voters, shard.group, source, held));
            }
            // Nodes that could hold voters: those that do, and the live ones that do not.
            let voters = shard.voters.len();
            let able = voters + live.difference(&held).count();
            let goal = odd(shard.replicas_wanted as usize, able);
            (goal > voters).then(|| (shard.group != GroupId::META.0, voters, shard.group, 0, held))
        })
        .collect();
    lacking.sort();
    lacking.truncate(room);
    let mut load = state.load();
    let mut moves = Vec::new();
    for (_, voters, group, source, held) in lacking {
        let is_dead = ReplicaId::new(source).is_ok_and(|lost| dead.contains(&(group, lost.node())));
        let free = live.difference(&held);
        let node = free.min_by_key(|node| (load.get(&node.get()).copied().unwrap_or(0), **node));
        let target = match node {
            Some(node) => node.get(),
            // It needs the place of its own successor.
            None if is_dead && voters > 1 => 0,
            None => continue,
        };
        if target != 0 {
            *load.entry(target).or_insert(0) += 1;
        }
        let (kind, reason) = match ReplicaId::new(source) {
            Ok(lost) if is_dead => {
                let kind = if target == 0 { v1::MoveKind::Remove } else { v1::MoveKind::Replace };
                (kind, format!("{lost} is dead"))
            }
            Ok(lost) => (v1::MoveKind::Replace, format!("{} was removed from the cluster", lost.node())),
            Err(_) => (v1::MoveKind::Add, format!("it has {voters} of the replicas that it should have")),
        };
        moves.push(v1::StartMove {
            group,
            kind: kind.into(),
            source,
            target_node: target,
            reason,
            ..Default::default()
        });
    }
    moves
}
