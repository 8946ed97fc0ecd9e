//! The leader's lease, an option: reads without asking a quorum each time.
//!
//! A round of ReadIndex that was begun at a time `t` of the leader's clock, and confirmed, says that a quorum heard the
//! leader after `t`. With the option on, a voter that heard its leader neither votes for another nor campaigns before an
//! election timeout has passed on its own clock ([`Replica::keeps_promise`]); any other leader needs one of that quorum. So
//! until `t` plus nine tenths of the timeout nobody else leads, if no two clocks drift apart by a tenth, and what this
//! leader has committed by now is all that was acknowledged.
//!
//! What ends or bars it:
//!
//! - A transfer makes its target campaign at once, and the word to it may be late by any time: a leader that has sent one
//!   has no lease for the rest of its term.
//! - A new configuration has other quorums: the lease is given up when it is applied. An election under a later one needs a
//!   voter of this one, since the later one is proposed by a leader that has applied this one.
//! - A voter that starts again has forgotten whom it heard: it keeps the promise as if it had just heard somebody.
//! - The clock is read when a read is taken in, never before it arrived, so that a pause of the process does not make the
//!   lease longer. A clock that stands still while the machine is suspended does; hence off by default.

use std::time::Duration;

use raft::eraftpb as pb;

use super::{Replica, Shared};

/// What raft writes into the votes that a transfer asks for.
const TRANSFER: &[u8] = b"CampaignTransfer";

#[derive(Default)]
pub(super) struct Lease {
    /// When the newest confirmed round was begun, on the leader's clock.
    begun: Option<Duration>,
    /// The term in which leadership was offered to somebody.
    barred: Option<u64>,
    /// When a leader was last heard, on this replica's clock.
    heard: Option<Duration>,
}

impl Lease {
    /// A replica that may have heard a leader before it was opened.
    pub(super) fn of_reopened(now: Duration) -> Lease {
        Lease { heard: Some(now), ..Default::default() }
    }

    pub(super) fn give_up(&mut self) {
        self.begun = None;
    }

    /// Leadership is offered to somebody in this term.
    pub(super) fn bar(&mut self, term: u64) {
        self.barred = Some(term);
        self.begun = None;
    }

    pub(super) fn confirmed(&mut self, begun: Duration) {
        self.begun = self.begun.max(Some(begun));
    }

    pub(super) fn heard_leader(&mut self, now: Duration) {
        self.heard = Some(now);
    }
}

fn timeout(shared: &Shared) -> Duration {
    shared.config.tick * shared.config.election_ticks as u32
}

impl Replica {
    /// The index that a read may be answered with once it is applied, without asking anybody.
    pub(super) fn leased_index(&self, shared: &Shared) -> Option<u64> {
        let term = self.raw.raft.term;
        let begun =
            self.lease.begun.filter(|_| shared.config.leader_lease && self.lease.barred != Some(term))?;
        let holds = self.is_leader() && shared.clock_now < begun + timeout(shared) * 9 / 10;
        holds.then_some(self.raw.raft.raft_log.committed)
    }

    /// Whether this voter may not yet help anybody but the leader it heard.
    pub(super) fn keeps_promise(&self, shared: &Shared) -> bool {
        let heard = self.lease.heard.filter(|_| shared.config.leader_lease && !self.is_leader());
        heard.is_some_and(|heard| shared.clock_now < heard + timeout(shared))
    }

    /// Whether a message asks for what was promised not to be given.
    pub(super) fn asks_too_early(&self, shared: &Shared, message: &pb::Message) -> bool {
        let is_vote = matches!(
            message.get_msg_type(),
            pb::MessageType::MsgRequestVote | pb::MessageType::MsgRequestPreVote
        );
        is_vote && message.context != TRANSFER && self.keeps_promise(shared)
    }
}
