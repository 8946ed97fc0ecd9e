//! Proposals, on the leader.

use pontoon_proto::v1;
use tracing::Span;

use super::{Alive, ProposalWait, Replica, Shared, guarded};
use crate::{
    apply::Reply,
    effects::{Answer, Effects, Token},
    envelope,
    error::Rejected,
    types::{Applied, Proposal},
};

/// How long a caller waits after Busy.
pub(super) const RETRY_AFTER: std::time::Duration = std::time::Duration::from_millis(5);

impl Replica {
    /// Proposes a command, or says at once why not. Nothing is in the log unless this returns without an answer.
    pub(crate) fn propose(
        &mut self,
        shared: &mut Shared,
        token: Token,
        proposal: Proposal,
        span: Span,
        fx: &mut Effects,
    ) -> Alive<()> {
        let size = proposal.payload.len() as u64;
        let limit = shared.max_entry_bytes;
        if !self.is_leader() || self.installing.is_some() {
            fx.propose_error(token, self.not_leader());
            return Ok(());
        }
        if size > limit {
            fx.propose_error(token, Rejected::TooLarge { size, limit });
            return Ok(());
        }
        if !proposal.urgent
            && let Some(node) = self.lacks_room(shared)
        {
            fx.propose_error(token, Rejected::DiskFull { group: self.group, node });
            return Ok(());
        }
        let busy = Rejected::Busy { group: self.group, retry_after: RETRY_AFTER };
        if self.is_behind(shared) || self.raw.raft.lead_transferee.is_some() {
            fx.propose_error(token, busy);
            return Ok(());
        }
        // Raft would forward a proposal, or turn it into nothing, without a word; the checks above and the comparison
        // of the last index below make sure that it is in the log of this term or was refused.
        if !self.reserve(shared, size + envelope::OVERHEAD) {
            fx.propose_error(token, busy);
            return Ok(());
        }
        let timestamp = shared.clock.next(shared.wall_ms);
        let data = envelope::seal(
            v1::EntryKind::Command,
            proposal.epoch,
            timestamp,
            proposal.request,
            proposal.payload,
        );
        let before = self.last_index();
        let raw = &mut self.raw;
        let accepted = guarded(|| raw.propose(Vec::new(), data))?.is_ok();
        let index = self.last_index();
        if accepted && index == before + 1 {
            self.proposals.push_back(ProposalWait { index, token });
            self.traces.proposed(index, span);
        } else {
            fx.propose_error(token, busy);
        }
        Ok(())
    }

    /// Reserves room in the log for what is about to be stepped or proposed.
    pub(super) fn reserve(&mut self, shared: &Shared, bytes: u64) -> bool {
        match shared.submitter.try_reserve(self.group, bytes) {
            Ok(reservation) => {
                match &mut self.reservation {
                    Some(held) => held.merge(reservation),
                    None => self.reservation = Some(reservation),
                }
                self.pending_bytes += bytes;
                true
            }
            Err(_) => false,
        }
    }

    /// Whether so much waits to be applied that nothing may be added.
    pub(super) fn is_behind(&self, shared: &Shared) -> bool {
        self.unapplied_bytes > shared.config.max_unapplied_bytes
            || shared.unapplied_bytes > shared.config.max_unapplied_node_bytes
    }

    /// Whether the next ready would grow past half a batch of the log.
    pub(crate) fn is_full(&self, limit: u64) -> bool {
        self.pending_bytes > limit / 2
    }

    /// Gives a session stamp.
    pub(crate) fn stamp(&mut self, shared: &mut Shared, token: Token, fx: &mut Effects) {
        let result =
            if self.is_leader() { Ok(shared.clock.next(shared.wall_ms)) } else { Err(self.not_leader()) };
        fx.answers.push((token, Answer::Index(result)));
    }

    /// The machine applied entries up to the mark.
    pub(crate) fn on_applied(
        &mut self,
        shared: &mut Shared,
        mark: v1::Mark,
        bytes: u64,
        replies: Vec<Reply>,
        fx: &mut Effects,
    ) -> Alive<()> {
        assert!(mark.index >= self.mark.index, "{}: the applied index never goes back", self.group);
        self.unapplied_bytes -= bytes;
        shared.unapplied_bytes -= bytes;
        self.mark = mark;
        self.traces.applied(self.mark.index);
        self.dirty = true;
        if self.mark.index >= self.alone_since {
            self.raw.mut_store().offer =
                Some((self.mark.index, self.mark.term, self.mark.conf_state.clone().unwrap_or_default()));
        }
        for reply in replies {
            let Some(wait) = self.proposals.pop_front_if(|wait| wait.index == reply.index) else { continue };
            match reply.result {
                Ok((index, reply)) => {
                    fx.answers.push((wait.token, Answer::Proposed(Ok(Applied { index, reply }))));
                }
                Err(rejected) => fx.propose_error(wait.token, rejected),
            }
        }
        if let Some(wait) = self.change_wait.take_if(|wait| wait.index <= self.mark.index) {
            fx.answers.push((wait.token, Answer::Done(Ok(()))));
        }
        self.answer_reads(fx);
        if self.installing.is_none() && self.installed.is_none() {
            let (raw, index) = (&mut self.raw, self.mark.index);
            guarded(|| raw.advance_apply_to(index))?;
            self.after_raft(shared, fx);
        }
        Ok(())
    }
}
