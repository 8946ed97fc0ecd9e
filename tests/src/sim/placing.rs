//! Where replicas should be: what a driver sees of the nodes and begins by itself, and what the operator wants of them (drains,
//! plans), as `pontoon node` does it.

use std::collections::{BTreeMap, BTreeSet};

use pontoon_proto::{GroupId, NodeId, ReplicaId, v1};
use pontoon_shard::{
    MetaState,
    planner::{self, GroupSeen, Limits, Seen},
};
use v1::{NodeState, meta_command::Body};

use super::{
    net::Packet,
    work::{Call, Wait},
    world::World,
};

/// Between two looks at the nodes, and how long an answer may take.
const LOOK_MS: u64 = 100;
const ANSWER_MS: u64 = 150;
/// Moves of a plan.
const PLANNED: usize = 6;

/// What a driver sees of the nodes. It begins with every node as one that just spoke.
#[derive(Default)]
pub(super) struct Eyes {
    heard: BTreeMap<NodeId, u64>,
    /// Questions of the look under way, and who has answered.
    asked: BTreeMap<u64, NodeId>,
    answered: BTreeSet<NodeId>,
    /// When the look ends, or the next one begins.
    until: u64,
    looks: bool,
    silent: BTreeSet<NodeId>,
}

impl Eyes {
    /// Whether this is an answer to a question of a look.
    pub(super) fn hear(&mut self, call: u64, from: NodeId) -> bool {
        let is_ours = self.asked.remove(&call).is_some();
        if is_ours {
            self.answered.insert(from);
        }
        is_ours
    }

    /// Nodes that have been silent for too long.
    pub(super) fn silent(&self) -> &BTreeSet<NodeId> {
        &self.silent
    }

    /// The same for the planner.
    pub(super) fn seen(&self) -> Seen {
        Seen { silent: self.silent.clone(), ..Seen::default() }
    }
}

impl World {
    /// Asks all nodes whether they are there, and judges by the answers.
    pub(super) fn look_around(&mut self, i: usize, eyes: &mut Eyes, state: &MetaState) {
        let now = self.now;
        if now < eyes.until && !(eyes.looks && eyes.asked.is_empty()) {
            return;
        }
        let members: Vec<NodeId> = state.members().filter_map(|node| NodeId::new(node.id).ok()).collect();
        if !eyes.looks {
            (eyes.looks, eyes.until) = (true, now + ANSWER_MS);
            (eyes.asked, eyes.answered) = Default::default();
            let from = self.nodes[i].id;
            for to in members {
                self.next_call += 1;
                eyes.asked.insert(self.next_call, to);
                self.send(Some(from), to, GroupId::META, Packet::Call(self.next_call, Call::Report));
            }
            return;
        }
        (eyes.looks, eyes.until) = (false, now + LOOK_MS);
        let patience = self.plan.repair_after_ms;
        eyes.heard.retain(|node, _| members.contains(node));
        for node in members {
            let heard = eyes.heard.entry(node).or_insert(now);
            if eyes.answered.contains(&node) {
                *heard = now;
            }
        }
        let given_up = |heard: &u64| patience != 0 && now - heard >= patience;
        let silent = eyes.heard.iter().filter(|(_, heard)| given_up(heard)).map(|(node, _)| *node);
        let silent: BTreeSet<NodeId> = silent.collect();
        for node in silent.difference(&eyes.silent).copied().collect::<Vec<_>>() {
            self.say(format!("{node} is given up: it is silent"));
        }
        eyes.silent = silent;
    }

    /// Starts what the planner finds missing, on nodes that are there.
    pub(super) fn repair(&mut self, i: usize, state: &MetaState, eyes: &Eyes) {
        for start in planner::repairs(state, &eyes.seen()) {
            let target = NodeId::new(start.target_node).ok();
            let there = target.is_none_or(|id| self.at(id).is_some_and(|at| self.nodes[at].is_up()));
            if there {
                let session = self.moment();
                self.propose(i, Body::StartMove(v1::StartMove { session, ..start }), Wait::Nobody);
            }
        }
    }

    /// Begins what there is room for of the plan under way; ends it when nothing is left.
    pub(super) fn carry_out(&mut self, i: usize, term: u64, state: &MetaState) {
        let Some(plan) = state.plan.clone() else { return };
        if let Some(starts) = planner::continue_plan(state, &plan) {
            for start in starts {
                let session = self.moment();
                self.propose(i, Body::StartMove(v1::StartMove { session, ..start }), Wait::Nobody);
            }
            return;
        }
        let id = self.nodes[i].id;
        for transfer in &plan.transfers {
            let Some(shard) = state.shards.get(&transfer.group) else { continue };
            let mut voters = shard.voters.iter().filter_map(|id| ReplicaId::new(*id).ok());
            let to = voters.find(|replica| replica.node().get() == transfer.to_node);
            let (Some(to), Ok(from)) = (to, NodeId::new(transfer.from_node)) else { continue };
            let call = Call::Transfer(v1::TransferLeaderRequest {
                group: transfer.group,
                to: to.get(),
                driver_term: term,
                mandate: None,
            });
            self.next_call += 1;
            self.send(Some(id), from, GroupId::META, Packet::Call(self.next_call, call));
        }
        self.propose(i, Body::EndPlan(v1::EndPlan { id: plan.id.clone() }), Wait::Nobody);
    }

    /// A node that drains leads nothing.
    pub(super) fn heed_map(&mut self) {
        if !self.now.is_multiple_of(LOOK_MS) {
            return;
        }
        let meta = self.meta.clone();
        for node in self.nodes.iter_mut().filter(|node| node.is_up()) {
            let known = meta.nodes.get(&node.id.get());
            let drains = known.is_some_and(|known| known.state() == NodeState::Draining);
            if let Some(running) = &mut node.running {
                running.stepped.shun_leadership(drains);
            }
        }
    }

    fn draining(&self) -> Option<u64> {
        self.meta.members().find(|node| node.state() == NodeState::Draining).map(|node| node.id)
    }

    /// The operator drains a node, or takes the one that drains into use again.
    pub(super) fn drain_or_take_back(&mut self) {
        let live: Vec<NodeId> = self.meta.live_nodes().collect();
        let (node, state) = match self.draining() {
            Some(node) => (node, NodeState::Live),
            None if self.injury.is_some() || live.len() < self.plan.nodes as usize => return,
            None => (live[self.rng.below(live.len() as u64) as usize].get(), NodeState::Draining),
        };
        if self.has_orders() {
            return;
        }
        self.say(format!("n{node} is to be {state:?}"));
        self.tally.drains += u64::from(state == NodeState::Draining);
        self.order(Body::SetNodeState(v1::SetNodeState {
            node,
            state: state.into(),
            force: false,
            seen: None,
        }));
    }

    /// The operator has the nodes used more evenly, by sizes of groups that are made up.
    pub(super) fn plan_evenly(&mut self) {
        if self.has_orders() || self.meta.plan.is_some() {
            return;
        }
        let mut seen = Seen::default();
        for group in self.groups() {
            let leader = self.leaders(group).first().map_or(0, |i| self.nodes[*i].id.get());
            let bytes = 1 << self.rng.below(20);
            seen.groups.insert(group.0, GroupSeen { bytes, leader });
        }
        let limits = Limits { moves: PLANNED, ..Limits::default() };
        let plan = planner::balance(&self.meta, &seen, limits, self.now);
        if plan.moves.is_empty() && plan.transfers.is_empty() {
            return;
        }
        self.say(format!("a plan of {} moves, {} transfers", plan.moves.len(), plan.transfers.len()));
        self.tally.plans += 1;
        self.order(Body::StartPlan(v1::StartPlan { plan: Some(plan) }));
    }

    /// Whether what the operator wants of the nodes is done, and nothing is owed; what is not.
    pub(super) fn is_placed(&self) -> Result<(), String> {
        if let Some((group, replica)) = self.meta.debts.first() {
            return Err(format!("the fence of {replica} of g{group} is owed"));
        }
        if let Some(plan) = &self.meta.plan {
            return Err(format!("plan {} has not ended", plan.id));
        }
        let Some(node) = self.draining() else { return Ok(()) };
        let on_it = |id: &u64| ReplicaId::new(*id).is_ok_and(|replica| replica.node().get() == node);
        match self.meta.shards.values().find(|shard| shard.voters.iter().chain(&shard.learners).any(on_it)) {
            Some(shard) => Err(format!("n{node} drains and holds a replica of g{}", shard.group)),
            None => Ok(()),
        }
    }
}
