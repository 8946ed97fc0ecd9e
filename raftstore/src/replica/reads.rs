//! Reads: how fresh what this replica has applied must be, and how it finds out.
//!
//! A leader confirms with a quorum that it leads (ReadIndex); readers that arrive while a round is under way share the next
//! one, those of other replicas included. Any other replica asks the leader and waits until it has applied the index that
//! comes back. Each confirmation says: whatever was acknowledged before it was asked for is at or below this index. So it
//! bounds how stale the replica is by the age of the question, measured on its own clock alone, and a reader who allows
//! that much need not ask anew.

use pontoon_proto::{ReplicaId, v1};

use super::{Alive, Replica, Shared, guarded};
use crate::{
    effects::{Answer, Effects, Token},
    error::Rejected,
    transport::Class,
    types::ReadLevel,
};

/// Ticks after which a round is asked again: raft drops rounds silently, the network messages.
const RETRY_TICKS: u64 = 4;
/// With so many readers waiting, other replicas are left to ask again.
const MAX_WAITING: usize = 65_536;

/// Somebody here, who is answered when its index is applied.
#[derive(Clone, Copy)]
struct Here {
    token: Token,
    /// Wants the members as well.
    members: bool,
}

/// Who waits for a confirmation.
enum Reader {
    Here(Here),
    /// Another replica, which asked under this number.
    There(ReplicaId, u64),
}

/// A question to the quorum or to the leader.
struct Round {
    /// Names it; nobody else ever uses this number.
    context: u64,
    readers: Vec<Reader>,
    /// The tick at which it was asked last.
    since: u64,
    /// The same on the clock.
    asked: std::time::Duration,
}

/// A confirmation.
#[derive(Clone, Copy)]
struct Confirmed {
    /// When it was asked for, by the clock: ticks stand still while the process does, and what comes meanwhile may be taken in
    /// before they are made up for.
    asked: std::time::Duration,
    index: u64,
}

/// The reads of a replica.
#[derive(Default)]
pub(super) struct Reads {
    waiting: Vec<Reader>,
    round: Option<Round>,
    /// The newest.
    confirmed: Option<Confirmed>,
    /// Readers whose index is confirmed and not applied yet.
    ready: std::collections::BTreeMap<u64, Vec<Here>>,
}

impl Reads {
    /// Nobody waits for anything.
    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.round.is_none() && self.ready.is_empty()
    }

    /// How many wait.
    pub(super) fn waiting(&self) -> usize {
        let asked = self.round.as_ref().map_or(0, |round| round.readers.len());
        self.waiting.len() + asked + self.ready.values().map(Vec::len).sum::<usize>()
    }

    /// Gives back the room that those took who wait no more.
    pub(super) fn give_back(&mut self) {
        self.waiting.shrink_to_fit();
        if self.ready.is_empty() {
            self.ready = Default::default();
        }
    }
}

impl Replica {
    /// Whether readers wait for anything.
    pub(crate) fn has_readers(&self) -> bool {
        !self.reads.is_idle()
    }

    /// Takes a reader in.
    pub(crate) fn read(&mut self, shared: &Shared, token: Token, level: ReadLevel, fx: &mut Effects) {
        let here = Here { token, members: false };
        let max_lag = match level {
            ReadLevel::Local => return fx.answers.push((token, Answer::Index(Ok(self.mark.index)))),
            ReadLevel::Linearizable if !self.is_leader() => {
                return fx.answers.push((token, Answer::Index(Err(self.not_leader()))));
            }
            ReadLevel::Linearizable => return self.read_leading(shared, here, fx),
            ReadLevel::Follower { max_lag } => max_lag,
        };
        let age = |confirmed: Confirmed| shared.clock_now.saturating_sub(confirmed.asked);
        match self.reads.confirmed.filter(|confirmed| age(*confirmed) < max_lag) {
            Some(Confirmed { index, .. }) => self.answer_at(index, here, fx),
            None if self.leader().is_none() => {
                fx.answers.push((token, Answer::Index(Err(self.not_leader()))));
            }
            None => self.reads.waiting.push(Reader::Here(here)),
        }
    }

    /// Takes in, on the leader, somebody who asks for the members.
    pub(super) fn read_members(&mut self, shared: &Shared, token: Token, fx: &mut Effects) {
        self.read_leading(shared, Here { token, members: true }, fx);
    }

    fn read_leading(&mut self, shared: &Shared, here: Here, fx: &mut Effects) {
        match self.leased_index(shared) {
            Some(index) => self.answer_at(index, here, fx),
            None => self.reads.waiting.push(Reader::Here(here)),
        }
    }

    fn answer_at(&mut self, index: u64, here: Here, fx: &mut Effects) {
        self.reads.ready.entry(index).or_default().push(here);
        self.answer_reads(fx);
    }

    fn answer(&self, here: Here, result: Result<u64, Rejected>, fx: &mut Effects) {
        let answer = match here.members {
            false => Answer::Index(result),
            // Mark and members of the same batch: the members as of this very index.
            true => Answer::Members(
                result.map(|_| (self.mark.conf_state.clone().unwrap_or_default(), self.mark.index)),
            ),
        };
        fx.answers.push((here.token, answer));
    }

    /// Another replica asks on behalf of its readers.
    pub(crate) fn on_read_request(
        &mut self,
        shared: &Shared,
        from: ReplicaId,
        context: u64,
        fx: &mut Effects,
    ) {
        let is_member = super::convert::members(&self.conf).contains(&from.get());
        if let Some(index) = self.leased_index(shared).filter(|_| is_member) {
            let reply = v1::ReadReply { context, index };
            return self.tell(from, v1::peer_message::Body::ReadReply(reply), fx);
        }
        // Whoever asks the wrong one asks again, the right one.
        if self.is_leader() && is_member && self.reads.waiting.len() < MAX_WAITING {
            self.reads.waiting.push(Reader::There(from, context));
        }
    }

    /// Begins a round if somebody waits and none is under way.
    pub(crate) fn start_reads(&mut self, shared: &mut Shared, fx: &mut Effects) -> Alive<()> {
        let idle = self.reads.round.is_none() && self.installing.is_none();
        if self.reads.waiting.is_empty() || !idle || !self.may_ask() {
            return Ok(());
        }
        let readers = std::mem::take(&mut self.reads.waiting);
        self.reads.round = Some(Round { context: 0, readers, since: 0, asked: shared.clock_now });
        self.ask(shared, fx)
    }

    /// A leader that has not committed in its term does not know what is committed; raft drops such reads.
    fn may_ask(&self) -> bool {
        !self.is_leader() || self.raw.raft.commit_to_current_term()
    }

    /// Puts the question of the round under way, under a number of its own: an answer to an earlier one must not pass for
    /// one to this. Where nobody can be asked the round waits for the next time.
    fn ask(&mut self, shared: &mut Shared, fx: &mut Effects) -> Alive<()> {
        let (is_leader, leader) = (self.is_leader(), self.leader());
        let Some(round) = &mut self.reads.round else { return Ok(()) };
        (round.context, round.since) = (shared.next_unique(), shared.ticks);
        round.asked = shared.clock_now;
        let context = round.context;
        if is_leader {
            let raw = &mut self.raw;
            return guarded(|| raw.read_index(context.to_be_bytes().to_vec()));
        }
        if let Some(leader) = leader {
            self.tell(leader, v1::peer_message::Body::ReadRequest(v1::ReadRequest { context }), fx);
        }
        Ok(())
    }

    fn tell(&self, to: ReplicaId, body: v1::peer_message::Body, fx: &mut Effects) {
        let message =
            v1::PeerMessage { group: self.group.0, from: self.id.get(), to: to.get(), body: Some(body) };
        fx.send.push((to.node(), Class::Control, message));
    }

    pub(super) fn retry_reads(&mut self, shared: &mut Shared, fx: &mut Effects) -> Alive<()> {
        let is_due = |round: &Round| shared.ticks > round.since + RETRY_TICKS;
        if !self.reads.round.as_ref().is_some_and(is_due) || self.installing.is_some() || !self.may_ask() {
            return Ok(());
        }
        if self.leader().is_none() {
            self.refuse_reads(fx);
            return Ok(());
        }
        self.ask(shared, fx)?;
        self.after_raft(shared, fx);
        Ok(())
    }

    /// Raft confirmed leadership for rounds.
    pub(super) fn on_read_states(&mut self, states: Vec<raft::ReadState>, fx: &mut Effects) {
        for state in states {
            if let Ok(context) = <[u8; 8]>::try_from(state.request_ctx.as_slice()).map(u64::from_be_bytes) {
                self.confirm(context, state.index, fx);
            }
        }
    }

    /// The question of this number is answered, by raft or by the leader's replica; earlier ones count for nothing.
    pub(crate) fn confirm(&mut self, context: u64, index: u64, fx: &mut Effects) {
        let Some(round) = self.reads.round.take_if(|round| round.context == context) else { return };
        self.reads.confirmed = Some(Confirmed { asked: round.asked, index });
        if self.is_leader() {
            self.lease.confirmed(round.asked);
        }
        for reader in round.readers {
            match reader {
                Reader::Here(here) => self.reads.ready.entry(index).or_default().push(here),
                Reader::There(replica, context) => {
                    let reply = v1::ReadReply { context, index };
                    self.tell(replica, v1::peer_message::Body::ReadReply(reply), fx);
                }
            }
        }
        self.answer_reads(fx);
    }

    /// Answers those whose index is applied by now.
    pub(super) fn answer_reads(&mut self, fx: &mut Effects) {
        let applied = self.mark.index;
        while let Some(entry) = self.reads.ready.first_entry().filter(|entry| *entry.key() <= applied) {
            let index = *entry.key();
            for here in entry.remove() {
                self.answer(here, Ok(index), fx);
            }
        }
    }

    /// Nobody will confirm anything: readers here hear of it, other replicas ask again.
    pub(super) fn refuse_reads(&mut self, fx: &mut Effects) {
        let rejected = self.not_leader();
        let round = self.reads.round.take().map(|round| round.readers).unwrap_or_default();
        for reader in std::mem::take(&mut self.reads.waiting).into_iter().chain(round) {
            if let Reader::Here(here) = reader {
                self.answer(here, Err(rejected.clone()), fx);
            }
        }
    }

    /// The replica stops: those who wait for it to apply something wait in vain.
    pub(super) fn stop_reads(&mut self, fx: &mut Effects) {
        let stopped = Rejected::Stopped(self.group);
        for here in std::mem::take(&mut self.reads.ready).into_values().flatten() {
            self.answer(here, Err(stopped.clone()), fx);
        }
    }
}
