//! Hashes of the state, made by all replicas at the same entry.
//!
//! The entry's index names the state: a replica that has applied it takes a point-in-time view there and hashes it apart
//! from applying. What a replica knows is told by its status, and is forgotten with each new question, at a restart and when
//! a snapshot is installed: whoever stands at the index or above and does not name it will never know, and another question
//! is to be asked. One that is still under way answers all who ask meanwhile: where entries are applied late, whoever looks on
//! would else ask at each look, and each question is a scan of the state on every replica.

use bytes::Bytes;
use pontoon_proto::v1;

use super::{Alive, Replica, Shared, guarded, proposals::RETRY_AFTER};
use crate::{
    effects::{Answer, Effects, Token},
    envelope,
    error::Rejected,
    types::Verified,
};

impl Replica {
    /// Asks all replicas, by an entry of the log. The answer is its index, which may still be lost with this leader.
    pub(crate) fn verify(&mut self, shared: &mut Shared, token: Token, fx: &mut Effects) -> Alive<()> {
        let index = match self.propose_verify(shared)? {
            Some(index) => Ok(index),
            None if !self.is_leader() || self.installing.is_some() => Err(self.not_leader()),
            None => Err(Rejected::Busy { group: self.group, retry_after: RETRY_AFTER }),
        };
        fx.answers.push((token, Answer::Index(index)));
        Ok(())
    }

    fn propose_verify(&mut self, shared: &mut Shared) -> Alive<Option<u64>> {
        let may = self.is_leader() && self.installing.is_none() && self.raw.raft.lead_transferee.is_none();
        let term = self.raw.raft.term;
        if may && self.asked.0 == term && self.mark.index < self.asked.1 {
            // In its own term a leader loses no entry.
            return Ok(Some(self.asked.1));
        }
        if !may || self.is_behind(shared) || !self.reserve(shared, envelope::OVERHEAD) {
            return Ok(None);
        }
        let timestamp = shared.clock.next(shared.wall_ms);
        let data = envelope::seal(v1::EntryKind::Verify, 0, timestamp, None, Bytes::new());
        let before = self.last_index();
        let raw = &mut self.raw;
        let accepted = guarded(|| raw.propose(Vec::new(), data))?.is_ok();
        let index = self.last_index();
        let asked = (accepted && index == before + 1).then_some(index);
        if let Some(index) = asked {
            self.asked = (term, index);
        }
        Ok(asked)
    }

    /// The state at an index is being hashed.
    pub(crate) fn on_verify(&mut self, index: u64) {
        self.verified = Some(Verified { index, hash: None });
        self.dirty = true;
    }

    /// It is hashed, or could not be read.
    pub(crate) fn on_verified(&mut self, index: u64, hash: Option<[u8; 32]>) {
        if self.verified.is_some_and(|verified| verified.index == index) {
            self.verified = hash.map(|hash| Verified { index, hash: Some(hash) });
            self.dirty = true;
        }
    }
}
