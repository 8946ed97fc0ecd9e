//! A group that has lost its quorum for good goes on with one replica, when an operator says so.
//!
//! What is left of the group stays as it is: state, log, and every entry in it, whether or not it was committed; whoever chose
//! this replica chose it because no other has more. It goes on under a new replica id as the only voter. The old id is dead
//! with that, and so are the old members: whatever they say is for a replica that is not here any more, and what this
//! one says they do not know. Who reaches them still reads what they have; see the decision on lost quorums.
//!
//! Changes of members that are in the log and were not applied belong to the group that was: none of them takes effect
//! ([`Recovered::index`]). The term leaps, so that whatever a leader of the lost ones has said is of an earlier one.
//!
//! Crash argument. The record with the new id and the hard state with the new term are one batch of the log. Before it is
//! durable the old replica opens again, after it the new one does. The engine's mark still names the old replica until
//! the first batch of the new one replaces it; until then each open takes it over anew, which the record allows.

use pontoon_proto::{GroupId, ReplicaId, v1};
use pontoon_wal::{self as wal, Batch};
use prost::Message as _;

use super::{Core, Slot, Submission, lifecycle::RECORD_KEY};
use crate::{
    apply::ApplyTask,
    effects::{Answer, Effects, Token},
    error::Error,
    types::Recovery,
};

/// Terms that a recovery leaps over: more than the lost ones can have begun since the survivor heard of them.
const TERM_LEAP: u64 = 1 << 16;

/// What a record keeps of a recovery, for ever.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct Recovered {
    /// The replica that it was.
    #[prost(uint64, tag = "1")]
    pub(super) from: u64,
    /// The last index of the log that it had. Changes of members up to here count for nothing.
    #[prost(uint64, tag = "2")]
    pub(super) index: u64,
}

impl Core {
    /// Lets a replica go on alone, under a new id.
    pub(super) fn recover(&mut self, group: GroupId, recovery: &Recovery, token: Token, fx: &mut Effects) {
        let answer = |result| (token, Answer::Replica(result));
        if self.failed.is_some() {
            return fx.answers.push(answer(Err(Error::Stopped)));
        }
        let refusal = match self.slots.get_mut(&group) {
            Some(Slot::Live(live)) if live.id == recovery.to => {
                return fx.answers.push(answer(Ok(recovery.to)));
            }
            Some(Slot::Opening { replica, waiting, .. }) if *replica == recovery.to => {
                waiting.push(token);
                return self.open_now(group, fx);
            }
            Some(Slot::Live(live)) => live.refuses_recovery(recovery),
            Some(Slot::Opening { .. }) => {
                self.open_now(group, fx);
                Some("it is being opened; ask again".to_owned())
            }
            Some(Slot::Reseeding(_)) => {
                Some("its engine's state is lost, it has nothing to go on with".to_owned())
            }
            Some(Slot::Dead { reason, .. }) => Some(format!("it is dead ({reason})")),
            Some(Slot::Leaving { .. }) | None => Some("there is no replica of the group here".to_owned()),
        };
        let refuse = |reason: String| answer(Err(Error::NotRecovered { group, reason }));
        if let Some(reason) = refusal {
            return fx.answers.push(refuse(reason));
        }
        let Some(mut record) = self.record(group) else {
            return fx.answers.push(refuse("its record in the log is damaged".to_owned()));
        };
        let Some(Slot::Live(mut live)) = self.slots.remove(&group) else {
            unreachable!("{group}: a replica that refuses nothing is alive")
        };
        let before = live.id;
        let (index, term) = (live.last_index(), live.term());
        let commit = live.commit();
        tracing::warn!(%group, %before, now = %recovery.to, index, term, "a replica goes on alone: its group had lost its quorum");
        self.part_with(&mut live, fx);
        fx.apply.push(ApplyTask::Close { group });
        let to = recovery.to;
        record.replica = to.get();
        record.initial = record.initial.map(|_| alone(to));
        record.recovered = Some(Recovered { from: before.get(), index });
        let mut batch = Batch::new();
        batch.put_meta(group, RECORD_KEY, &record.encode_to_vec());
        batch.hard_state(group, wal::HardState { term: term + TERM_LEAP, vote: 0, commit });
        self.slots.insert(group, Slot::Opening { replica: to, founding: false, waiting: vec![token] });
        self.send_batch(batch, None, Submission::Created(group), fx);
    }
}

/// The configuration of a replica that is alone.
fn alone(replica: ReplicaId) -> v1::ConfState {
    v1::ConfState { voters: vec![replica.get()], ..Default::default() }
}
