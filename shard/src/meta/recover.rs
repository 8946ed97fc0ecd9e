//! What a recovery from lost quorums does to the map.

use pontoon_proto::{GroupId, ReplicaId, v1};
use v1::{MetaRefusal, MovePhase, meta_reply::Body as Answer};

use super::{
    apply::{Outcome, Step, refuse},
    state::ended,
};

/// Ids of each kind that are passed over when the meta group itself was recovered: entries that it has lost may have given
/// out as many, and an id is never given out twice.
const IDS_LOST: u32 = 1_000;

impl Step<'_> {
    /// Takes note of all that a plan decides: repeated, it changes nothing more.
    pub(super) fn recover_cluster(&mut self, ask: v1::RecoverCluster) -> Outcome {
        let plan = ask.plan.unwrap_or_default();
        if let Some(id) = plan.lost.iter().find(|id| !self.state.nodes.contains_key(id)) {
            let text = format!("there is no node n{id}: make a new plan");
            return Err(refuse(MetaRefusal::NoSuchNode, text));
        }
        let is_noted = |step: &v1::RecoveryStep| {
            self.state.shards.get(&step.group).is_none_or(|shard| shard.voters.contains(&step.to))
        };
        let gone =
            |id: &u64| self.state.nodes.get(id).is_some_and(|node| node.state() == v1::NodeState::Removed);
        if plan.steps.iter().all(is_noted) && plan.lost.iter().all(gone) {
            return Ok(Answer::Done(true));
        }
        for id in &plan.lost {
            let mut node = self.node(*id)?;
            if node.state() != v1::NodeState::Removed {
                node.set_state(v1::NodeState::Removed);
                self.forgive(*id);
                self.put_node(node);
                self.note(format!("n{id} is removed: recovery {} counts it as lost", plan.id));
            }
        }
        if plan.steps.iter().any(|step| step.group == GroupId::META.0) {
            self.pass_over_lost_ids();
        }
        for step in plan.steps {
            self.recover_shard(&plan.id, step);
        }
        Ok(Answer::Done(true))
    }

    fn pass_over_lost_ids(&mut self) {
        self.state.next_node += u64::from(IDS_LOST);
        self.state.nodes_from = self.state.next_node;
        self.state.next_group += u64::from(IDS_LOST);
        self.state.next_move += u64::from(IDS_LOST);
        let shards: Vec<v1::Shard> =
            self.state.shards.values().map(|shard| v1::Shard::clone(shard)).collect();
        for mut shard in shards {
            shard.next_ordinal += IDS_LOST;
            self.put_shard(shard);
        }
    }

    /// The group has one member now, whatever is on the way in or out of it.
    fn recover_shard(&mut self, plan: &str, step: v1::RecoveryStep) {
        // Dropped since the plan was made.
        let Ok(mut shard) = self.shard_of(step.group) else { return };
        if let Some(mv) = self.state.running_move(step.group) {
            let mut mv = v1::Move::clone(mv);
            mv.set_phase(MovePhase::Aborted);
            (mv.finished_ms, mv.blocked) = (self.now_ms, String::new());
            debug_assert!(ended(mv.phase()), "such a move is over");
            self.note(format!("move {} of {} is over: the group was recovered", mv.id, mv.predicate));
            self.put_move(mv);
        }
        for replica in step.leftovers {
            self.owe(step.group, replica);
        }
        let ordinal = ReplicaId::new(step.to).map_or(0, |replica| replica.ordinal());
        shard.next_ordinal = shard.next_ordinal.max(ordinal + 1);
        (shard.voters, shard.learners) = (vec![step.to], Vec::new());
        // The group's index may have fallen behind what was last heard of it.
        shard.members_index = 0;
        self.note(format!(
            "{} goes on with {} alone, from entry {} of term {}: recovery {plan}",
            shard.predicate,
            super::moves::replica_name(step.to),
            step.last_index,
            step.last_term
        ));
        self.put_shard(shard);
    }
}
