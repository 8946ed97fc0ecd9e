//! Changes of membership, and leadership handed over on purpose.
//!
//! Raft 0.7 turns a change that it does not like into an empty entry without a word, so every rule is checked here first.
//! Each change is "ensure": asking again after a lost answer is harmless. A joint configuration is always left by
//! whoever leads, also when the one who entered it is gone.

use pontoon_proto::ReplicaId;
use raft::{StateRole, eraftpb as pb};

use super::{Alive, ProposalWait, Replica, Shared, convert, guarded};
use crate::{
    apply::ApplyTask,
    effects::{Answer, Effects, Token},
    error::Rejected,
    rules::{Rule, is_broken},
    types::{Mandate, MemberChange},
};

/// A target may lag by this many entries when it is promoted: it is in the stream, not behind it.
const CAUGHT_UP_ENTRIES: u64 = 64;

/// Ticks without a word from a receiver after which an offered snapshot counts as failed.
const OFFER_TICKS: u64 = 100;

fn single(kind: pb::ConfChangeType, id: u64) -> pb::ConfChangeSingle {
    let mut change = pb::ConfChangeSingle::default();
    change.set_change_type(kind);
    change.node_id = id;
    change
}

impl Replica {
    /// Proposes a change; the caller is answered when it is applied here, at once if it holds already.
    pub(crate) fn change(
        &mut self,
        shared: &mut Shared,
        token: Token,
        change: &MemberChange,
        mandate: Option<Mandate>,
        fx: &mut Effects,
    ) -> Alive<()> {
        if let Err(refused) = self.takes(mandate) {
            fx.answers.push((token, Answer::Done(Err(refused))));
            return Ok(());
        }
        match self.plan(change) {
            Ok(None) => fx.answers.push((token, Answer::Done(Ok(())))),
            Ok(Some(change)) => match self.propose_change(change)? {
                Ok(index) => self.change_wait = Some(ProposalWait { index, token }),
                Err(reason) => self.refuse_change(token, reason, fx),
            },
            Err(reason) => self.refuse_change(token, reason, fx),
        }
        self.after_raft(shared, fx);
        Ok(())
    }

    fn refuse_change(&self, token: Token, reason: String, fx: &mut Effects) {
        fx.answers.push((token, Answer::Done(Err(Rejected::Membership { group: self.group, reason }))));
    }

    /// What raft must be told for a change to hold; `None` if it holds.
    fn plan(&self, change: &MemberChange) -> Result<Option<pb::ConfChangeV2>, String> {
        use pb::ConfChangeType::{AddLearnerNode, AddNode, RemoveNode};
        let conf = &self.conf;
        let joint = !conf.voters_outgoing.is_empty();
        let is_voter = |id: &ReplicaId| conf.voters.contains(&id.get());
        let is_learner = |id: &ReplicaId| conf.learners.contains(&id.get());
        let mut changes = Vec::new();
        let mut transition = pb::ConfChangeTransition::Auto;
        match change {
            MemberChange::LeaveJoint if !joint => return Ok(None),
            MemberChange::LeaveJoint => {}
            _ if joint => {
                let holds = match change {
                    MemberChange::EnterJoint { promote, demote } => {
                        promote.iter().all(is_voter) && !demote.iter().any(is_voter)
                    }
                    _ => false,
                };
                return if holds {
                    Ok(None)
                } else {
                    Err("a joint configuration is being left; try again".to_owned())
                };
            }
            MemberChange::AddLearner(id) => {
                if is_voter(id) || is_learner(id) {
                    return Ok(None);
                }
                changes.push(single(AddLearnerNode, id.get()));
            }
            MemberChange::Promote(id) => {
                if is_voter(id) {
                    return Ok(None);
                }
                self.check_promotable(*id)?;
                changes.push(single(AddNode, id.get()));
            }
            MemberChange::Remove(id) => {
                if is_voter(id) {
                    return Err(format!("{id} is a voter; demote it first"));
                }
                if *id == self.id {
                    return Err(format!("{id} leads; hand leadership over first"));
                }
                if !is_learner(id) {
                    return Ok(None);
                }
                changes.push(single(RemoveNode, id.get()));
            }
            MemberChange::EnterJoint { promote, demote } => {
                if promote.iter().all(is_voter) && !demote.iter().any(is_voter) {
                    return Ok(None);
                }
                for id in promote.iter().filter(|id| !is_voter(id)) {
                    self.check_promotable(*id)?;
                    changes.push(single(AddNode, id.get()));
                }
                for id in demote.iter().filter(|id| is_voter(id)) {
                    if *id == self.id && conf.voters.len() > 1 {
                        return Err(format!("{id} leads; hand leadership to a voter that stays first"));
                    }
                    changes.push(single(AddLearnerNode, id.get()));
                }
                let left = conf.voters.iter().filter(|id| !demote.iter().any(|d| d.get() == **id)).count();
                if left + promote.len() == 0 {
                    return Err("no voter would be left".to_owned());
                }
                transition = pb::ConfChangeTransition::Explicit;
            }
        }
        let mut out = pb::ConfChangeV2::default();
        out.set_transition(transition);
        out.set_changes(changes.into());
        Ok(Some(out))
    }

    fn check_promotable(&self, id: ReplicaId) -> Result<(), String> {
        if is_broken(Rule::PromoteCaughtUp) {
            return Ok(());
        }
        let Some(progress) = self.raw.raft.prs().get(id.get()) else {
            return Err(format!("{id} is not a learner; add it first"));
        };
        let commit = self.raw.raft.raft_log.committed;
        if progress.state == raft::ProgressState::Snapshot || progress.matched + CAUGHT_UP_ENTRIES < commit {
            return Err(format!(
                "{id} stands at {} of {commit}; wait until it is caught up",
                progress.matched
            ));
        }
        Ok(())
    }

    fn propose_change(&mut self, change: pb::ConfChangeV2) -> Alive<Result<u64, String>> {
        if self.change_wait.is_some() || self.raw.raft.has_pending_conf() {
            return Ok(Err("another change is under way; try again".to_owned()));
        }
        if self.raw.raft.lead_transferee.is_some() {
            return Ok(Err("leadership is being handed over; try again".to_owned()));
        }
        let before = self.last_index();
        let raw = &mut self.raw;
        let accepted = guarded(|| raw.propose_conf_change(Vec::new(), change))?.is_ok();
        let index = self.last_index();
        Ok(if accepted && index == before + 1 {
            Ok(index)
        } else {
            Err("raft did not take it; try again".to_owned())
        })
    }

    /// Hands leadership over; answered when raft has begun, the status tells when it is done.
    pub(crate) fn transfer(
        &mut self,
        shared: &mut Shared,
        token: Token,
        to: ReplicaId,
        mandate: Option<Mandate>,
        fx: &mut Effects,
    ) -> Alive<()> {
        let answer = if let Err(refused) = self.takes(mandate) {
            Err(refused)
        } else if to == self.id {
            Ok(())
        } else if !self.conf.voters.contains(&to.get()) {
            Err(Rejected::Membership { group: self.group, reason: format!("{to} is not a voter") })
        } else {
            let raw = &mut self.raw;
            guarded(|| raw.transfer_leader(to.get()))?;
            self.after_raft(shared, fx);
            Ok(())
        };
        fx.answers.push((token, Answer::Done(answer)));
        Ok(())
    }

    /// On the leader: leaves a joint configuration, or makes somebody lead who votes in the new one.
    ///
    /// A leader without a vote comes about when a single voter is replaced, and when an outgoing voter is elected after
    /// the entry that leaves the joint configuration was proposed. It would go on leading, and could not be removed.
    pub(super) fn tick_membership(&mut self) -> Alive<()> {
        let joint = !self.conf.voters_outgoing.is_empty();
        let votes = self.conf.voters.contains(&self.id.get());
        if (votes && !joint) || self.raw.raft.has_pending_conf() || self.raw.raft.lead_transferee.is_some() {
            return Ok(());
        }
        if votes {
            // Refused only while something else is under way: the next tick asks again.
            let _ = self.propose_change(pb::ConfChangeV2::default())?;
            return Ok(());
        }
        let last = self.last_index();
        let prs = self.raw.raft.prs();
        let heir =
            self.conf.voters.iter().copied().find(|id| prs.get(*id).is_some_and(|p| p.matched == last));
        if let Some(to) = heir {
            let raw = &mut self.raw;
            guarded(|| raw.transfer_leader(to))?;
        }
        Ok(())
    }

    /// On the leader: a snapshot that was offered and not moved on is reported as failed, so that raft probes again.
    pub(super) fn tick_offers(&mut self, shared: &mut Shared) -> Alive<()> {
        if !self.offered.is_empty() {
            shared.turns.note_copy();
        }
        let late: Vec<u64> = self
            .offered
            .iter()
            .filter(|(_, offer)| shared.ticks > offer.since + OFFER_TICKS)
            .map(|(id, _)| *id)
            .collect();
        for id in late {
            self.offered.remove(&id);
            self.dirty = true;
            let raw = &mut self.raw;
            guarded(|| raw.report_snapshot(id, raft::SnapshotStatus::Failure))?;
        }
        Ok(())
    }

    /// Applies the configuration entry at the head of the committed ones. False: it has to wait.
    pub(super) fn apply_change(&mut self, shared: &mut Shared, fx: &mut Effects) -> Alive<bool> {
        let Some(entry) = self.committed.front() else { return Ok(false) };
        let change = convert::conf_change_from_bytes(entry.data.clone())
            .ok_or_else(|| format!("the configuration entry at {} cannot be read", entry.index))?;
        // Raft 0.7 asserts that a sole voter's log is durable when it becomes leader.
        if self.leaves_me_alone(&change)
            && entry.index > self.alone_since
            && self.raw.raft.raft_log.persisted < self.last_index()
        {
            return Ok(false);
        }
        let Some(entry) = self.committed.pop_front() else { return Ok(false) };
        // What the group that was had under way concerns nobody any more.
        let counts = entry.index > self.alone_since;
        if counts && (!is_broken(Rule::ChangeAtItsEntry) || self.is_leader()) {
            let raw = &mut self.raw;
            let conf = guarded(|| raw.apply_conf_change(&change))?.map_err(|error| {
                format!("the configuration entry at {} does not apply: {error}", entry.index)
            })?;
            self.conf = convert::conf_from_raft(&conf);
        }
        self.lease.give_up();
        self.dirty = true;
        let members = convert::members(&self.conf);
        self.offered.retain(|id, _| members.contains(id));
        self.silent.retain(|id| members.contains(id));
        // A leader that is no member any more, or only learns, must not go on leading.
        if self.role() == StateRole::Leader && !members.contains(&self.id.get()) {
            let raw = &mut self.raw;
            guarded(|| {
                let term = raw.raft.term;
                raw.raft.become_follower(term, 0);
            })?;
        }
        let task = ApplyTask::Conf {
            group: self.group,
            index: entry.index,
            term: entry.term,
            conf: self.conf.clone(),
        };
        fx.apply.push(task);
        self.eager |= self.is_sole_voter() && !self.is_leader();
        self.after_raft(shared, fx);
        fx.statuses.push(self.status());
        Ok(true)
    }

    fn leaves_me_alone(&self, change: &pb::ConfChangeV2) -> bool {
        let me = self.id.get();
        let mut voters: Vec<u64> = self.conf.voters.clone();
        for single in change.get_changes() {
            voters.retain(|id| *id != single.node_id);
            if single.get_change_type() == pb::ConfChangeType::AddNode {
                voters.push(single.node_id);
            }
        }
        voters == [me]
    }
}
