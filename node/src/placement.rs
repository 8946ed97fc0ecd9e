//! What operators ask about places: rules, drains, plans, explanations. Answered by the leader of the meta group; all
//! deciding is [`planner`]'s.

use std::{
    sync::{Arc, PoisonError},
    time::Duration,
};

use futures::future::join_all;
use pontoon_proto::{
    NodeId, ReplicaId,
    v1::{self, meta_command::Body, meta_reply::Body as Answer},
};
use pontoon_raftstore::{Role, SnapshotBudget};
use pontoon_shard::{
    MetaState,
    mover::needs_hand,
    planner::{self, By, GroupSeen, Limits, Seen, Standing},
};
use tonic::Status;

use crate::{clock::unix_ms, shared::Shared, space::room_to_wire, views::no_such_predicate};

/// How long a node may take to say how full it is.
const USAGE_TIMEOUT: Duration = Duration::from_secs(2);
/// How many plans are remembered until they are applied.
const PLANS_KEPT: usize = 8;

impl Shared {
    /// How full this node is.
    pub(crate) async fn usage(self: &Arc<Self>, request: v1::UsageRequest) -> Result<v1::UsageReply, Status> {
        let seen = self.space.seen();
        let groups = if request.groups { self.raft.groups() } else { Vec::new() };
        let groups = groups.into_iter().filter_map(|group| {
            let leads = self.raft.group(group)?.look(|status| status.role == Role::Leader);
            let (writes_per_s, reads_per_s) = self.meter.rates(group);
            let bytes = self.machines.usage(group);
            Some(v1::GroupUsage { group: group.0, bytes, leads, writes_per_s, reads_per_s })
        });
        Ok(v1::UsageReply {
            disk_free_bytes: seen.disk.free,
            disk_total_bytes: seen.disk.total,
            room: room_to_wire(seen.room).into(),
            groups: groups.collect(),
        })
    }

    /// Asks every node how full it is. Who does not answer counts as silent.
    pub(crate) async fn look_around(self: &Arc<Self>, state: &MetaState, groups: bool) -> Seen {
        let nodes: Vec<NodeId> = state.members().filter_map(|node| NodeId::new(node.id).ok()).collect();
        let asked =
            nodes.iter().map(|&node| self.at_within(USAGE_TIMEOUT, node, v1::UsageRequest { groups }));
        let mut seen = Seen::default();
        for (node, answer) in nodes.iter().zip(join_all(asked).await) {
            let Ok(usage) = answer else {
                seen.silent.insert(*node);
                continue;
            };
            seen.disks.insert(*node, usage.disk_total_bytes);
            if usage.room() != v1::NodeRoom::Ample {
                seen.full.insert(*node);
            }
            for group in usage.groups {
                let sight: &mut GroupSeen = seen.groups.entry(group.group).or_default();
                sight.bytes = sight.bytes.max(group.bytes);
                if group.leads {
                    sight.leader = node.get();
                }
                if group.writes_per_s + group.reads_per_s > 0 {
                    // Leadership may have moved within what is smoothed: each has answered its part.
                    let load = seen.loads.entry(group.group).or_default();
                    load.writes += group.writes_per_s;
                    load.reads += group.reads_per_s;
                }
            }
        }
        seen
    }

    pub(crate) async fn rules(self: &Arc<Self>, _: v1::RulesRequest) -> Result<v1::RulesReply, Status> {
        let state = self.meta_state();
        let findings = findings(&state, &self.look_around(&state, false).await);
        Ok(v1::RulesReply { rules: Some((*state.rules).clone()), findings })
    }

    pub(crate) async fn set_rules(
        self: &Arc<Self>,
        request: v1::SetRulesRequest,
    ) -> Result<v1::SetRulesReply, Status> {
        let state = self.meta_state();
        let rules = request.rules.unwrap_or_default();
        let wished = (*state).clone().with_rules(rules.clone()).map_err(Status::invalid_argument)?;
        let findings = findings(&wished, &self.look_around(&state, false).await);
        if request.check_only {
            return Ok(v1::SetRulesReply { findings, set: false });
        }
        if let Some(wrong) = findings.iter().find(|finding| finding.wrong && !request.force) {
            return Err(Status::failed_precondition(format!(
                "{}: {} (`pontoon rules check` lists all; --force sets them nonetheless)",
                wrong.predicate, wrong.text
            )));
        }
        let set = v1::SetRules { rules: Some(rules), expect_revision: request.expect_revision };
        self.meta_done(Body::SetRules(set)).await?;
        Ok(v1::SetRulesReply { findings, set: true })
    }

    pub(crate) async fn drain(self: &Arc<Self>, request: v1::DrainRequest) -> Result<v1::DrainReply, Status> {
        let id = NodeId::new(request.node).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let wanted = match request.action() {
            v1::DrainAction::Look => None,
            v1::DrainAction::Start => Some(v1::NodeState::Draining),
            v1::DrainAction::Cancel => Some(v1::NodeState::Live),
        };
        let state = self.meta_state();
        if wanted == Some(v1::NodeState::Draining) && !state.live_nodes().any(|node| node != id) {
            return Err(Status::failed_precondition(format!(
                "{id} is the only live node: add another one first, so that there is somewhere to go"
            )));
        }
        if let Some(wanted) = wanted {
            let set =
                v1::SetNodeState { node: id.get(), state: wanted.into(), force: false, seen: request.seen };
            match self.meta_done(Body::SetNodeState(set)).await?.body {
                Some(Answer::Node(_)) => {}
                _ => return Err(Status::internal("the meta group answered something else than a node")),
            }
        }
        self.drain_view(id).await
    }

    async fn drain_view(self: &Arc<Self>, id: NodeId) -> Result<v1::DrainReply, Status> {
        let state = self.meta_state();
        let node = state.nodes.get(&id.get());
        let node = node
            .ok_or_else(|| Status::not_found(format!("there is no node {id}: `pontoon nodes` lists them")))?;
        let seen = self.look_around(&state, true).await;
        let is_here = |replica: &u64| ReplicaId::new(*replica).is_ok_and(|replica| replica.node() == id);
        let mut reply = v1::DrainReply { node: Some((**node).clone()), ..Default::default() };
        for shard in state.shards.values() {
            let Some(source) = shard.voters.iter().chain(&shard.learners).copied().find(|id| is_here(id))
            else {
                continue;
            };
            reply.replicas += 1;
            reply.leaders +=
                u64::from(seen.groups.get(&shard.group).is_some_and(|seen| seen.leader == id.get()));
            let reason = match state.running_move(shard.group) {
                Some(mv) if !needs_hand(mv) => {
                    reply.moving += u64::from(mv.source == source);
                    continue;
                }
                Some(mv) => format!("move {} waits: {}", mv.id, mv.blocked),
                None => match planner::target(&state, shard.group, source, &seen) {
                    Some(_) => continue,
                    None => format!(
                        "no other node may take it: `pontoon explain {}` says why of each; add a node, or change its rule",
                        shard.predicate
                    ),
                },
            };
            reply.stuck.push(v1::DrainStuck {
                predicate: shard.predicate.clone(),
                group: shard.group,
                reason,
            });
        }
        Ok(reply)
    }

    pub(crate) async fn rebalance_plan(
        self: &Arc<Self>,
        request: v1::RebalancePlanRequest,
    ) -> Result<v1::RebalancePlanReply, Status> {
        let state = self.meta_state();
        let seen = self.look_around(&state, true).await;
        let usual = Limits::default();
        let limits = Limits {
            moves: if request.max_moves == 0 {
                usual.moves
            } else {
                usual.moves.min(request.max_moves as usize)
            },
            bytes: if request.max_bytes == 0 { usual.bytes } else { request.max_bytes },
        };
        let running = state.plan.as_ref().map(|plan| plan.id.clone()).unwrap_or_default();
        let by = match request.by() {
            v1::PlanBy::Both => By::Both,
            v1::PlanBy::Bytes => By::Bytes,
            v1::PlanBy::Load => By::Load,
        };
        let make = move || planner::balance_by(&state, &seen, limits, by, unix_ms());
        let plan = tokio::task::spawn_blocking(make)
            .await
            .map_err(|error| Status::internal(format!("the plan could not be made: {error}")))?;
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        plans.retain(|known| known.id != plan.id);
        plans.push_back(plan.clone());
        while plans.len() > PLANS_KEPT {
            plans.pop_front();
        }
        Ok(v1::RebalancePlanReply { plan: Some(plan), running })
    }

    pub(crate) async fn rebalance_apply(
        self: &Arc<Self>,
        request: v1::RebalanceApplyRequest,
    ) -> Result<v1::RebalanceApplyReply, Status> {
        let known = {
            let plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
            plans.iter().find(|plan| plan.id == request.id).cloned()
        };
        let plan = known.ok_or_else(|| {
            Status::failed_precondition(format!(
                "there is no plan {} (any more): run `pontoon rebalance plan`, and apply what it prints",
                request.id
            ))
        })?;
        self.meta_done(Body::StartPlan(v1::StartPlan { plan: Some(plan.clone()) })).await?;
        Ok(v1::RebalanceApplyReply { plan: Some(plan) })
    }

    pub(crate) async fn explain_placement(
        self: &Arc<Self>,
        request: v1::ExplainRequest,
    ) -> Result<v1::ExplainReply, Status> {
        let state = self.meta_state();
        let shard = state.shard(&request.predicate).ok_or_else(|| no_such_predicate(&request.predicate))?;
        if request.node != 0 && !state.members().any(|node| node.id == request.node) {
            return Err(Status::not_found(format!(
                "there is no node n{}: `pontoon nodes` lists them",
                request.node
            )));
        }
        let seen = self.look_around(&state, false).await;
        let told = planner::explain(&state, &seen, shard).into_iter();
        let told = told.filter(|told| request.node == 0 || told.node.get() == request.node);
        let nodes = told.map(|told| v1::NodeExplanation {
            node: told.node.get(),
            standing: match told.standing {
                Standing::Votes => "votes",
                Standing::Learns => "learns",
                Standing::Misplaced => "misplaced",
                Standing::Could => "could",
                Standing::Cannot => "cannot",
            }
            .to_owned(),
            verdicts: told
                .verdicts
                .into_iter()
                .map(|verdict| v1::ExplainVerdict {
                    ok: verdict.ok,
                    hard: verdict.hard,
                    text: verdict.text,
                    fix: verdict.fix,
                })
                .collect(),
        });
        Ok(v1::ExplainReply { nodes: nodes.collect(), shard: Some((**shard).clone()) })
    }

    /// While the map says that this node drains, it leads nothing that others can lead; and received states take what the rules
    /// allow. Ends with the node.
    pub(crate) async fn heed_map(self: Arc<Self>, usual: SnapshotBudget) {
        let mut budget = usual;
        let mut views = self.map.subscribe();
        let mut stop = self.stop.subscribe();
        loop {
            let view = views.borrow_and_update().clone();
            let drains = view.node(self.own).is_some_and(|node| node.state() == v1::NodeState::Draining);
            self.raft.shun_leadership(drains);
            let wished = view.budget().unwrap_or(usual);
            if std::mem::replace(&mut budget, wished) != wished {
                self.raft.set_snapshot_budget(wished);
            }
            tokio::select! {
                changed = views.changed() => if changed.is_err() { return },
                _ = stop.wait_for(|stop| *stop) => return,
            }
        }
    }

    /// Passes leadership of groups on as a plan says. What does not succeed is for the next plan.
    pub(crate) async fn pass_leadership(self: &Arc<Self>, state: &MetaState, plan: &v1::Plan, term: u64) {
        let passed = plan.transfers.iter().filter_map(|transfer| {
            let shard = state.shards.get(&transfer.group)?;
            let on = |node: u64| {
                let mut voters = shard.voters.iter().filter_map(|id| ReplicaId::new(*id).ok());
                voters.find(|replica| replica.node().get() == node)
            };
            let (from, to) = (NodeId::new(transfer.from_node).ok()?, on(transfer.to_node)?);
            let request = v1::TransferLeaderRequest {
                group: transfer.group,
                to: to.get(),
                driver_term: term,
                ..Default::default()
            };
            Some(async move { drop(self.at_within(USAGE_TIMEOUT, from, request).await) })
        });
        join_all(passed).await;
    }
}

fn findings(state: &MetaState, seen: &Seen) -> Vec<v1::RuleFinding> {
    let found = planner::check_rules(state, seen).into_iter();
    found
        .map(|finding| v1::RuleFinding {
            wrong: finding.wrong,
            predicate: finding.predicate,
            text: finding.text,
        })
        .collect()
}
