//! Plans that use nodes evenly, in bytes and at the least cost, and the bound below which none can be; then in what is asked of them.
//!
//! A node's *utilisation* is what it holds over what it may hold; the *spread* is the difference between the most and the
//! least used node over the mean. A plan ends at a spread of [`GOAL`] or as near to it as the sizes of replicas and the rules allow.
//!
//! **The bound.** Wherever a plan ends, there is a window [low, low + GOAL × mean] that holds every node's utilisation. To get into a
//! given window, the nodes above it must give away at least what they have above it, and the nodes below it must take at least
//! what they lack; so at least the larger of the two sums moves. The first falls and the second rises as the window goes up, so the
//! least of the larger lies where they meet, which is found by halving. This holds for any sizes and rules.
//!
//! **The plan.** Into that window: nodes above it give their largest replicas that fit, to the node that lacks most of those
//! that the group's rule allows. Where replicas are few and large that is not the best; for those an exhaustive search
//! ([`super::exact`]) takes over, and what greed leaves uneven is tried replica by replica.

//!
//! **Load.** What is left of moves makes the writes even that nodes bear, by the same steps with another weight, as far as bytes do not
//! become so uneven by it that they would be moved back.

use std::collections::BTreeSet;

use pontoon_proto::{NodeId, ReplicaId, v1};

use super::{
    Seen, exact,
    world::{Place, World},
};
use crate::meta::MetaState;

/// The spread at which moves begin by themselves.
pub const THRESHOLD: f64 = 0.10;
/// The spread at which a plan ends.
pub const GOAL: f64 = 0.03;
/// Nodes that bear fewer writes per second than this are not busy: how they differ is of no interest.
const IDLE_WRITES: f64 = 10.0;
/// Improvements that are tried one by one after the first pass.
const SINGLE_MOVES: usize = 1_000;

/// What a plan may cost.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Moves; at least 1.
    pub moves: usize,
    /// Bytes, a move that exceeds them not begun.
    pub bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { moves: 10_000, bytes: u64::MAX }
    }
}

/// What a plan makes even.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum By {
    /// What nodes hold over what they may hold.
    Bytes,
    /// The writes per second that nodes bear, while bytes stay as even as they need be.
    Load,
    /// Bytes, and load where it differs by more than [`THRESHOLD`].
    #[default]
    Both,
}

/// A replica that changes its node: of which group, which of its voters, where to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) group: usize,
    pub(super) voter: usize,
    pub(super) to: usize,
}

/// The window that every node should end in, and the bytes that must move at least.
#[derive(Debug, Clone, Copy)]
pub(super) struct Window {
    pub(super) low: f64,
    pub(super) high: f64,
    pub(super) bound: f64,
}

impl Window {
    pub(super) fn of(places: &[Place]) -> Window {
        let mean = mean(places);
        let sums = |low: f64| {
            let high = low + GOAL * mean;
            let over = |place: &Place| (place.used as f64 - high * place.capacity).max(0.0);
            let under = |place: &Place| (low * place.capacity - place.used as f64).max(0.0);
            (places.iter().map(over).sum::<f64>(), places.iter().map(under).sum::<f64>())
        };
        let (mut low, mut high) = (mean * (1.0 - GOAL), mean);
        for _ in 0..60 {
            let middle = (low + high) / 2.0;
            let (over, under) = sums(middle);
            if over > under { low = middle } else { high = middle }
        }
        let (over, under) = sums(high);
        Window { low: high, high: high + GOAL * mean, bound: over.max(under) }
    }
}

/// The mean utilisation.
pub(super) fn mean(places: &[Place]) -> f64 {
    let capacity: f64 = places.iter().map(|place| place.capacity).sum();
    let used: f64 = places.iter().map(|place| place.used as f64).sum();
    if capacity > 0.0 { used / capacity } else { 0.0 }
}

/// The spread over nodes, as a share of the mean; 0 where nothing is held.
pub(super) fn spread(places: &[Place]) -> f64 {
    let mean = mean(places);
    let most = places.iter().map(Place::utilisation).fold(0.0, f64::max);
    let least = places.iter().map(Place::utilisation).fold(f64::INFINITY, f64::min);
    if mean > 0.0 { (most - least) / mean } else { 0.0 }
}

/// A plan that makes the nodes' use even. Groups that are moved already, frozen or short of a voter are left alone, and none
/// returns within an hour to a node that it left. At most one move per group.
pub fn balance(state: &MetaState, seen: &Seen, limits: Limits, now_ms: u64) -> v1::Plan {
    balance_by(state, seen, limits, By::Both, now_ms)
}

/// As [`balance`], of what is asked for.
pub fn balance_by(state: &MetaState, seen: &Seen, limits: Limits, by: By, now_ms: u64) -> v1::Plan {
    let mut world = World::of(state, seen, now_ms);
    let before = world.places.clone();
    let mut plan = v1::Plan::default();
    let spread_before = spread(&before);
    if by != By::Load && spread_before > GOAL {
        let window = Window::of(&before);
        plan.bound_bytes = window.bound.ceil() as u64;
        let steps = match exact::search(&world) {
            Some(steps) => steps,
            None => greedy(&mut world.clone(), window),
        };
        adopt(&mut plan, &mut world, steps, limits, |from, to| {
            let (from, to) = (&before[from], &before[to]);
            let share = |place: &Place| share(place, &before);
            format!(
                "n{} is used by {:.0} %, n{} by {:.0} % of the mean",
                from.id,
                share(from),
                to.id,
                share(to)
            )
        });
    }
    let loads_before = load_spread(&before);
    let is_due = match by {
        By::Bytes => false,
        By::Load => load_spread(&world.places) > GOAL,
        By::Both => load_spread(&world.places) > THRESHOLD,
    };
    if is_due {
        let moved: BTreeSet<u64> = plan.moves.iter().map(|mv| mv.group).collect();
        let even = mean(&world.places);
        let (low, high) = (even * (1.0 - THRESHOLD / 2.0), even * (1.0 + THRESHOLD / 2.0));
        let mut weighed = world.by_load(&moved, low, high);
        let window = Window::of(&weighed.places);
        let steps = greedy(&mut weighed, window);
        adopt(&mut plan, &mut world, steps, limits, |from, to| {
            let (from, to) = (&before[from], &before[to]);
            format!("n{} bears {} writes/s, n{} {}", from.id, from.writes, to.id, to.writes)
        });
    }
    (plan.spread_before, plan.spread_after) =
        (thousandths(spread_before), thousandths(spread(&world.places)));
    (plan.load_spread_before, plan.load_spread_after) =
        (thousandths(loads_before), thousandths(load_spread(&world.places)));
    plan.transfers = super::leaders::transfers(&mut world);
    plan.nodes = std::iter::zip(&before, &world.places)
        .map(|(before, after)| v1::PlannedNode {
            node: before.id,
            capacity_bytes: before.capacity as u64,
            used_before: before.used,
            used_after: after.used,
            leads_before: before.leads as u64,
            leads_after: after.leads as u64,
            writes_before: before.writes,
            writes_after: after.writes,
        })
        .collect();
    plan.id = super::plan_id(&plan);
    plan
}

/// Takes as many steps into the plan as its limits allow.
fn adopt(
    plan: &mut v1::Plan,
    world: &mut World<'_>,
    steps: Vec<Step>,
    limits: Limits,
    reason: impl Fn(usize, usize) -> String,
) {
    for step in steps {
        let group = &world.groups[step.group];
        let (source, bytes) = (group.voters[step.voter], group.bytes);
        if plan.moves.len() >= limits.moves || plan.bytes.saturating_add(bytes) > limits.bytes {
            continue;
        }
        plan.bytes += bytes;
        plan.moves.push(v1::PlannedMove {
            group: group.id,
            predicate: group.predicate.to_owned(),
            source: source.replica,
            target_node: world.places[step.to].id,
            bytes,
            revision: group.revision,
            reason: reason(source.place, step.to),
        });
        world.take(step);
    }
}

/// The spread of the writes that nodes bear, as [`spread`]; 0 where there are hardly any.
fn load_spread(places: &[Place]) -> f64 {
    let mean = places.iter().map(|place| place.writes as f64).sum::<f64>() / places.len().max(1) as f64;
    if mean < IDLE_WRITES {
        return 0.0;
    }
    let writes = places.iter().map(|place| place.writes as f64);
    let (most, least) = (writes.clone().fold(0.0, f64::max), writes.fold(f64::INFINITY, f64::min));
    (most - least) / mean
}

fn share(place: &Place, all: &[Place]) -> f64 {
    let mean = mean(all);
    if mean > 0.0 { 100.0 * place.utilisation() / mean } else { 0.0 }
}

fn thousandths(spread: f64) -> u32 {
    (spread * 1_000.0).round().min(f64::from(u32::MAX)) as u32
}

/// Which of a group's voters lie on a place, in order of size; groups that have been moved are passed over.
struct Givers {
    /// Per place (group, voter), the largest first.
    held: Vec<Vec<(usize, usize)>>,
    moved: BTreeSet<usize>,
}

impl Givers {
    fn of(world: &World<'_>) -> Givers {
        let mut held = vec![Vec::new(); world.places.len()];
        for (at, group) in
            world.groups.iter().enumerate().filter(|(_, group)| group.movable && group.bytes > 0)
        {
            for (voter, member) in group.voters.iter().enumerate() {
                if let Some(list) = held.get_mut(member.place) {
                    list.push((at, voter));
                }
            }
        }
        for list in &mut held {
            list.sort_by_key(|(group, voter)| {
                (std::cmp::Reverse(world.groups[*group].bytes), *group, *voter)
            });
        }
        Givers { held, moved: BTreeSet::new() }
    }
}

fn greedy(world: &mut World<'_>, window: Window) -> Vec<Step> {
    let mut givers = Givers::of(world);
    let mut steps = Vec::new();
    let excess = |place: &Place| place.used as f64 - window.high * place.capacity;
    let lack = |place: &Place| window.low * place.capacity - place.used as f64;
    let mut donors: Vec<usize> =
        (0..world.places.len()).filter(|at| excess(&world.places[*at]) > 0.0).collect();
    donors.sort_by(|a, b| excess(&world.places[*b]).total_cmp(&excess(&world.places[*a])).then(a.cmp(b)));
    for donor in donors {
        give(world, &mut givers, &mut steps, donor, &window, |place| excess(place));
    }
    // Nodes that still lack something take it from whoever stays inside of the window.
    while let Some(taker) = (0..world.places.len())
        .filter(|at| lack(&world.places[*at]) > 0.0)
        .max_by(|a, b| lack(&world.places[*a]).total_cmp(&lack(&world.places[*b])).then(b.cmp(a)))
    {
        let Some(step) = feed(world, &givers, taker, &window) else { break };
        apply(world, &mut givers, &mut steps, step);
    }
    for _ in 0..SINGLE_MOVES {
        if spread(&world.places) <= GOAL {
            break;
        }
        let Some(step) = improve(world, &givers) else { break };
        apply(world, &mut givers, &mut steps, step);
    }
    steps
}

fn apply(world: &mut World<'_>, givers: &mut Givers, steps: &mut Vec<Step>, step: Step) {
    world.take(step);
    givers.moved.insert(step.group);
    steps.push(step);
}

/// A node above the window gives its largest replicas that are not larger than what is left to give.
fn give(
    world: &mut World<'_>,
    givers: &mut Givers,
    steps: &mut Vec<Step>,
    donor: usize,
    window: &Window,
    excess: impl Fn(&Place) -> f64,
) {
    let list = std::mem::take(&mut givers.held[donor]);
    // The smallest that is larger than the rest: given last, if the rest is worth it.
    let mut larger = None;
    for &(group, voter) in &list {
        let left = excess(&world.places[donor]);
        if left <= 0.0 {
            break;
        }
        if givers.moved.contains(&group) {
            continue;
        }
        if world.groups[group].bytes as f64 > left {
            larger = Some((group, voter));
            continue;
        }
        if let Some(to) = taker(world, group, voter, window) {
            apply(world, givers, steps, Step { group, voter, to });
        }
    }
    if let Some((group, voter)) = larger.filter(|(group, _)| !givers.moved.contains(group))
        && excess(&world.places[donor]) > 0.0
    {
        let place = &world.places[donor];
        let stays_above = place.used as f64 - world.groups[group].bytes as f64 >= window.low * place.capacity;
        if stays_above && let Some(to) = taker(world, group, voter, window) {
            apply(world, givers, steps, Step { group, voter, to });
        }
    }
    givers.held[donor] = list;
}

/// The place that lacks most, of those that may take the replica and stay inside of the window.
fn taker(world: &World<'_>, group: usize, voter: usize, window: &Window) -> Option<usize> {
    let bytes = world.groups[group].bytes as f64;
    let room = |at: &usize| {
        let place = &world.places[*at];
        place.used as f64 + bytes <= window.high * place.capacity
    };
    let mut places: Vec<usize> = (0..world.places.len()).filter(room).collect();
    let lack = |at: usize| {
        let place = &world.places[at];
        window.low * place.capacity - place.used as f64
    };
    places.sort_by(|a, b| lack(*b).total_cmp(&lack(*a)).then(a.cmp(b)));
    places.into_iter().find(|to| world.may_move(group, voter, *to))
}

/// The largest replica that a place below the window can take from one that stays inside of it.
fn feed(world: &World<'_>, givers: &Givers, taker: usize, window: &Window) -> Option<Step> {
    let place = &world.places[taker];
    let room = window.high * place.capacity - place.used as f64;
    let lack = window.low * place.capacity - place.used as f64;
    let mut best: Option<(f64, Step)> = None;
    for (donor, list) in givers.held.iter().enumerate().filter(|(donor, _)| *donor != taker) {
        let giver = &world.places[donor];
        let spare = giver.used as f64 - window.low * giver.capacity;
        let fitting = list.iter().filter(|(group, _)| {
            let bytes = world.groups[*group].bytes as f64;
            bytes <= spare && bytes <= room && !givers.moved.contains(group)
        });
        for &(group, voter) in fitting.take(64) {
            let bytes = world.groups[group].bytes as f64;
            // What is moved beyond what is lacking is moved in vain.
            let gain = bytes.min(lack) - (bytes - lack).max(0.0);
            if best.as_ref().is_none_or(|(most, _)| gain > *most) && world.may_move(group, voter, taker) {
                best = Some((gain, Step { group, voter, to: taker }));
            }
        }
    }
    best.map(|(_, step)| step)
}

/// The single move from the most used place that evens most.
fn improve(world: &World<'_>, givers: &Givers) -> Option<Step> {
    let used = |at: &usize, by: f64| (world.places[*at].used as f64 + by) / world.places[*at].capacity;
    let most = (0..world.places.len()).max_by(|a, b| used(a, 0.0).total_cmp(&used(b, 0.0)).then(b.cmp(a)))?;
    let top = used(&most, 0.0);
    let mut best: Option<(f64, Step)> = None;
    for &(group, voter) in
        givers.held[most].iter().filter(|(group, _)| !givers.moved.contains(group)).take(512)
    {
        let bytes = world.groups[group].bytes as f64;
        for to in (0..world.places.len()).filter(|to| *to != most) {
            let worst = used(&most, -bytes).max(used(&to, bytes));
            if worst < top
                && best.as_ref().is_none_or(|(least, _)| worst < *least)
                && world.may_move(group, voter, to)
            {
                best = Some((worst, Step { group, voter, to }));
            }
        }
    }
    best.map(|(_, step)| step)
}

/// Moves of a plan that may begin now: those that the map still allows, as many as there is room for. What has changed since
/// the plan was made is passed over, and `None` says that nothing of it is left.
pub fn continue_plan(state: &MetaState, plan: &v1::Plan) -> Option<Vec<v1::StartMove>> {
    let mut slots = super::repair::Slots::of(state);
    let mut begin = Vec::new();
    let mut is_left = false;
    for planned in &plan.moves {
        let node = ReplicaId::new(planned.source).map(|replica| replica.node().get());
        let (Some(shard), Ok(from)) = (state.shards.get(&planned.group), node) else { continue };
        // Begun already, or moved by another hand; or to a node that takes nothing any more, so that it would be refused for ever.
        let takes = |node: &std::sync::Arc<v1::Node>| node.state() == v1::NodeState::Live;
        let is_target = state.nodes.get(&planned.target_node).is_some_and(takes);
        if shard.revision != planned.revision || shard.state() != v1::ShardState::Live || !is_target {
            continue;
        }
        is_left = true;
        let nodes = [from, planned.target_node];
        if slots.has_room(v1::MovePurpose::Balance) && nodes.iter().all(|node| slots.takes(*node)) {
            slots.take(nodes);
            begin.push(v1::StartMove {
                group: planned.group,
                kind: v1::MoveKind::Replace.into(),
                source: planned.source,
                target_node: planned.target_node,
                reason: planned.reason.clone(),
                bytes_total: planned.bytes,
                purpose: v1::MovePurpose::Balance.into(),
                expect_revision: planned.revision,
                ..Default::default()
            });
        }
    }
    is_left.then_some(begin)
}

/// Nodes that a plan names and that may not take replicas any more.
pub fn plan_obstacles(state: &MetaState, plan: &v1::Plan) -> Vec<NodeId> {
    let live: BTreeSet<NodeId> = state.live_nodes().collect();
    let targets: BTreeSet<NodeId> =
        plan.moves.iter().filter_map(|mv| NodeId::new(mv.target_node).ok()).collect();
    targets.difference(&live).copied().collect()
}
