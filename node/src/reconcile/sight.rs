//! What the driver sees of nodes: who has been silent for too long, whose disk is full; and plans that it makes and carries out.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use pontoon_proto::{
    NodeId, ReplicaId,
    v1::{self, meta_command::Body},
};
use pontoon_shard::{
    MetaState,
    planner::{self, By, Limits, Seen, THRESHOLD},
};
use tokio::time::{Instant, sleep};
use tracing::{debug, info};

use super::Driver;
use crate::{clock::unix_ms, cluster::fresh};

/// How often nodes are asked.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long a node may be silent until its replicas are made anew, where no rule says otherwise.
const REPAIR_AFTER: Duration = Duration::from_secs(600);
/// How often a cluster that balances itself is looked over.
const BALANCE_EVERY: Duration = Duration::from_secs(60);

impl Driver {
    /// Keeps what is seen of the nodes up to date, apart from the dead. A driver begins with every node as one that just spoke:
    /// a new one waits anew, and gives nobody up too early. Ends with the driver.
    pub(super) async fn watch_nodes(self) {
        let mut heard: HashMap<NodeId, Instant> = HashMap::new();
        loop {
            let state = self.state();
            let now = self.shared.look_around(&state, false).await;
            let patience = state.rulebook().repair_after_ms.map_or(REPAIR_AFTER, Duration::from_millis);
            for node in state.members().filter_map(|node| NodeId::new(node.id).ok()) {
                let speaks = !now.silent.contains(&node);
                let last = heard.entry(node).or_insert_with(Instant::now);
                if speaks {
                    *last = Instant::now();
                }
            }
            heard.retain(|node, _| state.members().any(|member| member.id == node.get()));
            let given_up = |last: &Instant| !patience.is_zero() && last.elapsed() >= patience;
            let silent = heard.iter().filter(|(_, last)| given_up(last)).map(|(node, _)| *node).collect();
            let next = Seen { silent, ..now };
            self.sight.send_if_modified(|known| {
                let same = known.silent == next.silent && known.full == next.full;
                *known = next;
                !same
            });
            sleep(LOOK_EVERY).await;
        }
    }

    /// Fences what nodes owe that did not answer when their replicas went. Returns with nothing owed by whoever answers.
    pub(super) async fn settle_debts(&self, state: &MetaState) {
        let mut mute: BTreeSet<NodeId> = self.sight.borrow().silent.clone();
        for &(group, replica) in &state.debts {
            let Some(id) = ReplicaId::new(replica).ok().filter(|id| !mute.contains(&id.node())) else {
                continue;
            };
            let fence = v1::FenceReplicaRequest { group, replica, driver_term: self.term };
            if let Err(status) = self.shared.at_within(super::PING, id.node(), fence).await {
                // Its other debts wait for the next time, too.
                debug!(group, replica, reason = status.message(), "a node was not fenced yet");
                mute.insert(id.node());
                continue;
            }
            let settled = Body::SettleDebt(v1::SettleDebt { group, replica });
            if let Err(status) = self.shared.meta_done(settled).await {
                debug!(group, replica, reason = status.message(), "a debt was not settled");
            }
        }
    }

    /// Begins as much of the plan under way as there is room for; ends it when nothing is left.
    pub(super) async fn carry_out(&self, state: &MetaState) {
        let Some(plan) = state.plan.clone() else { return };
        match planner::continue_plan(state, &plan) {
            Some(moves) => {
                for start in moves {
                    let (group, start) = (start.group, v1::StartMove { session: fresh(), ..start });
                    if let Err(status) = self.shared.meta_done(Body::StartMove(start)).await {
                        debug!(group, reason = status.message(), "a move of the plan was not started");
                    }
                }
            }
            None => {
                self.shared.pass_leadership(state, &plan, self.term).await;
                drop(self.shared.meta_done(Body::EndPlan(v1::EndPlan { id: plan.id.clone() })).await);
            }
        }
    }

    /// Where a rule says so, makes and begins a plan whenever the nodes are used too unevenly. Ends with the driver.
    pub(super) async fn keep_balanced(self) {
        loop {
            sleep(BALANCE_EVERY).await;
            let state = self.state();
            let busy = state.plan.is_some() || state.running_moves().next().is_some();
            if !state.rulebook().rebalance || busy {
                continue;
            }
            let seen = self.shared.look_around(&state, true).await;
            let made = tokio::task::spawn_blocking(move || {
                let uneven = |spread: u32| f64::from(spread) > THRESHOLD * 1_000.0;
                let plan = planner::balance(&state, &seen, Limits::default(), unix_ms());
                match (uneven(plan.spread_before), uneven(plan.load_spread_before)) {
                    (true, _) => (true, plan),
                    // Bytes that are even enough are not moved for their own sake.
                    (false, true) => {
                        (true, planner::balance_by(&state, &seen, Limits::default(), By::Load, unix_ms()))
                    }
                    (false, false) => (false, plan),
                }
            });
            let Ok((uneven, plan)) = made.await else { continue };
            let uneven = uneven && !plan.moves.is_empty();
            if uneven || !plan.transfers.is_empty() {
                let plan = if uneven { plan } else { v1::Plan { moves: Vec::new(), ..plan } };
                info!(plan = plan.id, moves = plan.moves.len(), spread = plan.spread_before, "balancing");
                drop(self.shared.meta_done(Body::StartPlan(v1::StartPlan { plan: Some(plan) })).await);
            }
        }
    }
}
