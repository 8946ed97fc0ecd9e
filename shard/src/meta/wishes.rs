//! What operators wish: rules and plans; and what is owed by nodes that do not answer.

use std::sync::Arc;

use pontoon_proto::{ReplicaId, v1};
use v1::{MetaRefusal, meta_reply::Body as Answer};

use super::apply::{Outcome, Step, refuse};
use crate::planner::{RULES_FORMAT, Rulebook, plan_obstacles};

/// The most moves and transfers that a plan may have: it is one entry of a log.
const MAX_PLANNED: usize = 10_000;

impl Step<'_> {
    pub(super) fn set_rules(&mut self, ask: v1::SetRules) -> Outcome {
        let now = self.state.rules.revision;
        if ask.expect_revision != 0 && ask.expect_revision != now {
            let text = "somebody else has changed the rules: read them again with `pontoon rules show`";
            return Err(refuse(MetaRefusal::Changed, text));
        }
        let rules = v1::Rules { format: RULES_FORMAT, revision: self.index, ..ask.rules.unwrap_or_default() };
        let book = Rulebook::read(&rules).map_err(|error| refuse(MetaRefusal::Invalid, error))?;
        self.state.rules = Arc::new(rules);
        self.state.rulebook = Arc::new(book);
        self.touched.rules = true;
        self.note(format!("the rules have changed, revision {}", self.index));
        Ok(Answer::Done(true))
    }

    pub(super) fn start_plan(&mut self, ask: v1::StartPlan) -> Outcome {
        let plan = ask.plan.unwrap_or_default();
        let changed = |text: String| refuse(MetaRefusal::Changed, text);
        if let Some(running) = &self.state.plan {
            let text = format!("plan {} is being carried out: wait until its moves have begun", running.id);
            return Err(refuse(MetaRefusal::Busy, text));
        }
        if plan.id.is_empty() || plan.moves.len() + plan.transfers.len() > MAX_PLANNED {
            let text =
                format!("a plan has an id and at most {MAX_PLANNED} moves and transfers: make a smaller one");
            return Err(refuse(MetaRefusal::Invalid, text));
        }
        if let Some(node) = plan_obstacles(self.state, &plan).first() {
            return Err(changed(format!(
                "{node} takes no replicas any more: run `pontoon rebalance plan` again"
            )));
        }
        let stale = plan.moves.iter().find(|planned| {
            self.state.shards.get(&planned.group).is_none_or(|shard| shard.revision != planned.revision)
        });
        if let Some(planned) = stale {
            return Err(changed(format!(
                "{} has changed since the plan was made: run `pontoon rebalance plan` again",
                planned.predicate
            )));
        }
        let (moves, transfers) = (plan.moves.len(), plan.transfers.len());
        self.note(format!("plan {} begins: {moves} moves, {transfers} transfers of leadership", plan.id));
        self.state.plan = Some(Arc::new(plan));
        self.touched.plan = true;
        Ok(Answer::Done(true))
    }

    pub(super) fn end_plan(&mut self, id: &str) -> Outcome {
        if self.state.plan.as_ref().is_some_and(|plan| plan.id == id) {
            self.state.plan = None;
            self.touched.plan = true;
            self.note(format!("plan {id}: all of its moves have begun"));
        }
        Ok(Answer::Done(true))
    }

    /// A replica is no member any more, and its node does not answer: it is fenced as soon as that returns. One that was removed
    /// meanwhile never does.
    pub(super) fn owe(&mut self, group: u64, replica: u64) {
        let returns = ReplicaId::new(replica)
            .is_ok_and(|replica| self.state.members().any(|node| node.id == replica.node().get()));
        if returns && self.state.debts.insert((group, replica)) {
            self.touched.debts.insert((group, replica));
        }
    }

    pub(super) fn settle_debt(&mut self, group: u64, replica: u64) -> Outcome {
        if self.state.debts.remove(&(group, replica)) {
            self.touched.debts.insert((group, replica));
        }
        Ok(Answer::Done(true))
    }

    /// A node is removed for ever: it is never spoken to again, so nothing of it needs a fence.
    pub(super) fn forgive(&mut self, node: u64) {
        let of_node =
            |replica: u64| ReplicaId::new(replica).is_ok_and(|replica| replica.node().get() == node);
        let owed: Vec<(u64, u64)> =
            self.state.debts.iter().copied().filter(|(_, replica)| of_node(*replica)).collect();
        for debt in owed {
            self.state.debts.remove(&debt);
            self.touched.debts.insert(debt);
        }
    }
}
