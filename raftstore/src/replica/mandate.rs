//! Orders that come late: which of them a leader does not take.
//!
//! Whoever moves replicas sends orders to a group's leader, and an order may be held up on its way until it is harmful: a
//! learner is added once more after it was removed for good, members are swapped that have been swapped back since. So each
//! order names the group's term that its giver has seen, and its place among all orders to the group ([`Mandate`]). A leader
//! takes those of its own term, and none below the highest place that it has heard of in that term.
//!
//! What a giver may rely on: once [`Replica::members`] has answered to an order of place `p`, no order of a lower place takes
//! effect any more, and the members that it answered are what all of them together have made. For an order with a lower place
//! was given before, and it names
//!
//! - the same term: then it meets the same leader, for nobody leads a term twice. If it came before, it is in the log of this
//!   leader; `members` is refused while a change in that log is not applied, so that the answer knows of it. If it comes
//!   after, its place is too low. The memory of places need not outlive the leader: nobody else takes orders of its term;
//! - an earlier term: then what its leader has put into the log and this one has not found there can never be committed, since
//!   a quorum has confirmed the later term to `members`. What this one found there was not applied at first, and is by now;
//! - a later term: then somebody led it before `members` was asked, and a quorum knew of it. It would not have confirmed the
//!   earlier term.
//!
//! Orders without a mandate are those of an embedder, who sees to their order himself. A joint configuration is left by whoever
//! leads, without any: it ends what an order began.
//!
//! Orders to a node (make a replica, fence it) need none of this. Replica ids are never used again, so one that comes late
//! concerns the same replica: a replica that is made after it was fenced meets its tombstone, one that is fenced late was to
//! be fenced already, and no driver fences before `members` has told that nothing names it nor ever will.

use super::{Replica, Shared};
use crate::{
    effects::{Answer, Effects, Token},
    error::Rejected,
    rules::{Rule, is_broken},
    types::Mandate,
};

impl Replica {
    /// Whether this replica carries out an order, and remembers its place if it does.
    pub(super) fn takes(&mut self, mandate: Option<Mandate>) -> Result<(), Rejected> {
        if !self.is_leader() || self.installing.is_some() {
            return Err(self.not_leader());
        }
        let Some(Mandate { term, place }) = mandate.filter(|_| !is_broken(Rule::OrdersInTime)) else {
            return Ok(());
        };
        let late = |reason: String| Err(Rejected::Late { group: self.group, reason });
        let current = self.raw.raft.term;
        if term != current {
            return late(format!("it was meant for the leader of term {term}, this is {current}"));
        }
        if place < self.ordered {
            return late(format!("it is the order {place:?}, {:?} was heard before", self.ordered));
        }
        self.ordered = place;
        Ok(())
    }

    /// Answers who is a member, when all that was ordered before is applied and a quorum has confirmed that this replica leads.
    pub(crate) fn members(&mut self, shared: &Shared, token: Token, mandate: Mandate, fx: &mut Effects) {
        let refused = match self.takes(Some(mandate)) {
            Err(refused) => refused,
            Ok(()) if self.raw.raft.has_pending_conf() && !is_broken(Rule::OrdersInTime) => {
                let reason = "a change is under way; try again".to_owned();
                Rejected::Membership { group: self.group, reason }
            }
            Ok(()) => return self.read_members(shared, token, fx),
        };
        fx.answers.push((token, Answer::Members(Err(refused))));
    }
}
