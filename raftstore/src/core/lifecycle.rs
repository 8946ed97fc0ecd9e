//! How replicas come and go: made, found in the log, opened, removed for ever.

use bytes::Bytes;
use pontoon_proto::{GroupId, ReplicaId, v1};
use pontoon_wal::{self as wal, Batch};
use prost::Message as _;

use super::{Core, Slot, Submission, recover::Recovered};
use crate::{
    apply::{ApplyTask, MARK_FORMAT},
    effects::{Answer, Effects, Token},
    error::Error,
    replica::Replica,
    rules::{Rule, is_broken},
    types::{GroupSpec, GroupStatus, INITIAL_POSITION},
};

/// The log's metadata key of a replica's record.
pub(super) const RECORD_KEY: &[u8] = b"replica";
const RECORD_FORMAT: u32 = 1;

/// Replicas that are opened in one tick. All at once, 100,000 of them would look for leaders together and nothing else would
/// be done; so they come up in order, and those that somebody asks for before.
pub(super) const OPENED_PER_TICK: usize = 500;

/// What the log remembers of a replica beside raft's state.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Record {
    #[prost(uint32, tag = "1")]
    format: u32,
    #[prost(uint64, tag = "2")]
    pub(super) replica: u64,
    #[prost(bytes = "bytes", tag = "3")]
    descriptor: Bytes,
    #[prost(uint64, tag = "4")]
    epoch: u64,
    /// The founding configuration; absent for a replica that began empty.
    #[prost(message, optional, tag = "5")]
    pub(super) initial: Option<v1::ConfState>,
    /// It went on alone, when its group had lost its quorum.
    #[prost(message, optional, tag = "6")]
    pub(super) recovered: Option<Recovered>,
}

impl Record {
    /// Where a founding member's machine stands before its first entry.
    fn initial_mark(&self) -> Option<v1::Mark> {
        let conf = self.initial.clone()?;
        let (index, term) = INITIAL_POSITION;
        Some(v1::Mark {
            format: MARK_FORMAT,
            index,
            term,
            conf_state: Some(conf),
            epoch: self.epoch,
            ..Default::default()
        })
    }
}

impl Core {
    /// Makes sure of a replica. Crash argument: the record, the log's first position and the hard state are one batch;
    /// before it is durable nothing of the replica exists, after it the next open finds all of it.
    pub(super) fn create(&mut self, spec: GroupSpec, token: Token, fx: &mut Effects) {
        let (group, asked) = (spec.group, spec.replica);
        let refuse = |error| (token, Answer::Replica(Err(error)));
        if self.failed.is_some() {
            return fx.answers.push(refuse(Error::Stopped));
        }
        if let Some(min_replica) = self.shared.wal.tombstone(group).filter(|min| asked.get() < *min) {
            return fx.answers.push(refuse(Error::Tombstoned { group, replica: asked, min_replica }));
        }
        match self.slots.get_mut(&group) {
            Some(Slot::Reseeding(reseed)) if reseed.replica == asked => {
                return fx.answers.push((token, Answer::Replica(Ok(asked))));
            }
            Some(Slot::Reseeding(reseed)) => {
                let existing = reseed.replica;
                return fx.answers.push(refuse(Error::OtherReplica { group, existing, asked }));
            }
            Some(Slot::Live(replica)) if replica.id == asked => {
                return fx.answers.push((token, Answer::Replica(Ok(asked))));
            }
            Some(Slot::Opening { replica, waiting, .. }) if *replica == asked => return waiting.push(token),
            Some(Slot::Dead { replica, reason, .. }) if *replica == asked => {
                let reason = reason.clone();
                return fx.answers.push(refuse(Error::Damaged { group, reason }));
            }
            Some(Slot::Live(replica)) => {
                let existing = replica.id;
                return fx.answers.push(refuse(Error::OtherReplica { group, existing, asked }));
            }
            Some(Slot::Opening { replica, .. } | Slot::Dead { replica, .. }) => {
                let existing = *replica;
                return fx.answers.push(refuse(Error::OtherReplica { group, existing, asked }));
            }
            Some(Slot::Leaving { .. }) => {
                let reason = "an earlier replica is being removed; try again".to_owned();
                return fx.answers.push(refuse(Error::Damaged { group, reason }));
            }
            None => {}
        }
        let record = Record {
            format: RECORD_FORMAT,
            replica: asked.get(),
            descriptor: spec.descriptor,
            epoch: spec.epoch,
            initial: spec.initial,
            recovered: None,
        };
        let mut batch = Batch::new();
        batch.put_meta(group, RECORD_KEY, &record.encode_to_vec());
        if record.initial.is_some() {
            let (index, term) = INITIAL_POSITION;
            batch.reset_to(group, index, term);
            batch.hard_state(group, wal::HardState { term, vote: 0, commit: index });
        }
        let founding = record.initial.is_some();
        self.slots.insert(group, Slot::Opening { replica: asked, founding, waiting: vec![token] });
        self.send_batch(batch, None, Submission::Created(group), fx);
    }

    /// What the log remembers of the replica of a group, if that reads.
    pub(super) fn record(&self, group: GroupId) -> Option<Record> {
        let record = Record::decode(self.shared.wal.meta(group, RECORD_KEY)?).ok()?;
        (record.format == RECORD_FORMAT).then_some(record)
    }

    /// Opens what the log holds of a group.
    pub(super) fn adopt(&mut self, group: GroupId, token: Token, fx: &mut Effects) {
        let Some(replica) = self.record(group).and_then(|record| ReplicaId::new(record.replica).ok()) else {
            // Which replica it was is lost too. It must be known as dead all the same: a founding member that is missing
            // would be made anew, without its votes. The lowest id stands for it, so that whichever it was can be removed.
            let reason = "its record in the log is damaged".to_owned();
            let replica = ReplicaId::on(self.shared.node, 1);
            self.slots.insert(group, Slot::Opening { replica, founding: false, waiting: vec![token] });
            return self.kill(group, reason, fx);
        };
        self.slots.insert(group, Slot::Opening { replica, founding: false, waiting: Vec::new() });
        self.open_in_turn(group, fx);
        match (self.unopened.contains(&group), self.slots.get_mut(&group)) {
            // It is known, and opened as soon as it is needed: nobody has to wait for all of them.
            (true, _) => {
                fx.statuses.push(GroupStatus::new(group, replica));
                fx.answers.push((token, Answer::Replica(Ok(replica))));
            }
            (false, Some(Slot::Opening { waiting, .. })) => waiting.push(token),
            (false, _) => unreachable!("{group}: its slot was made above"),
        }
    }

    /// Opens a replica's machine, if not too many were opened in this tick; else in a later one.
    pub(super) fn open_in_turn(&mut self, group: GroupId, fx: &mut Effects) {
        if self.may_open == 0 {
            self.unopened.insert(group);
            return;
        }
        self.may_open -= 1;
        self.open_machine(group, fx);
    }

    /// Somebody has to do with a replica: its turn has come.
    pub(super) fn open_now(&mut self, group: GroupId, fx: &mut Effects) {
        if self.unopened.remove(&group) {
            self.open_machine(group, fx);
        }
    }

    /// Another tick: some of those that wait are opened, in the order of their ids.
    pub(super) fn open_some(&mut self, fx: &mut Effects) {
        self.may_open = OPENED_PER_TICK;
        while self.may_open > 0
            && let Some(group) = self.unopened.pop_first()
        {
            self.open_in_turn(group, fx);
        }
    }

    pub(super) fn open_machine(&mut self, group: GroupId, fx: &mut Effects) {
        if let (Some(Slot::Opening { .. }), Some(record)) = (self.slots.get(&group), self.record(group)) {
            let (descriptor, initial) = (record.descriptor.clone(), record.initial_mark());
            let took_over = record.recovered.map(|recovered| recovered.from);
            fx.apply.push(ApplyTask::Open { group, replica: record.replica, descriptor, initial, took_over });
        }
    }

    pub(super) fn on_opened(&mut self, group: GroupId, mark: Option<v1::Mark>, fx: &mut Effects) {
        let Some(Slot::Opening { replica, founding, .. }) = self.slots.get(&group) else { return };
        let (replica, founding) = (*replica, *founding);
        if self.is_engine_lost(group, mark.as_ref()) {
            if let Some(Slot::Opening { waiting, .. }) = self.slots.remove(&group) {
                fx.answers.extend(waiting.into_iter().map(|token| (token, Answer::Replica(Ok(replica)))));
            }
            return self.reseed(group, replica, fx);
        }
        let alone_since =
            self.record(group).and_then(|record| record.recovered).map_or(0, |recovered| recovered.index);
        match Replica::build(&mut self.shared, group, replica, mark, founding, alone_since) {
            Ok(built) => {
                let id = built.id;
                fx.statuses.push(built.status());
                let before = self.slots.insert(group, Slot::Live(Box::new(built)));
                if let Some(Slot::Opening { waiting, .. }) = before {
                    fx.answers.extend(waiting.into_iter().map(|token| (token, Answer::Replica(Ok(id)))));
                }
                self.ready.insert(group);
                self.awake.insert(group);
            }
            Err(error) => {
                fx.apply.push(ApplyTask::Close { group });
                let reason = match error {
                    Error::Damaged { reason, .. } => reason,
                    other => other.to_string(),
                };
                self.kill(group, reason, fx);
            }
        }
    }

    /// Removes a replica for ever. Crash argument: the tombstone is durable before the machine's data goes, and the next
    /// open of a group that has only a tombstone removes what is left when this is asked again.
    pub(super) fn destroy(&mut self, group: GroupId, replica: ReplicaId, token: Token, fx: &mut Effects) {
        if self.failed.is_some() {
            return fx.answers.push((token, Answer::Destroyed(Err(Error::Stopped))));
        }
        let min_replica = replica.get() + 1;
        let existing = match self.slots.get_mut(&group) {
            Some(Slot::Leaving { min_replica: current, waiting, .. }) if *current >= min_replica => {
                // An engine that failed before is asked again; one that is at work answers both.
                waiting.push(token);
                if waiting.len() == 1 {
                    self.retry_destroy(group, fx);
                }
                return;
            }
            Some(Slot::Live(live)) => Some(live.id),
            Some(Slot::Reseeding(reseed)) => Some(reseed.replica),
            Some(Slot::Opening { replica, .. } | Slot::Dead { replica, .. }) => Some(*replica),
            Some(Slot::Leaving { .. }) | None => None,
        };
        if existing.is_some_and(|existing| existing > replica) {
            // A later replica lives here; the one that was meant is long gone.
            return fx.answers.push((token, Answer::Destroyed(Ok(()))));
        }
        let descriptor = self.record(group).map(|record| record.descriptor).unwrap_or_default();
        self.unopened.remove(&group);
        let mut waiting = vec![token];
        match self.slots.remove(&group) {
            Some(Slot::Live(mut live)) => self.part_with(&mut live, fx),
            Some(Slot::Reseeding(_)) => self.forget_reseed(group),
            Some(Slot::Opening { waiting: creators, .. }) => {
                let stopped = || Answer::Replica(Err(Error::Stopped));
                fx.answers.extend(creators.into_iter().map(|token| (token, stopped())));
            }
            Some(Slot::Leaving { waiting: earlier, .. }) => waiting.extend(earlier),
            Some(Slot::Dead { .. }) | None => {}
        }
        self.slots.insert(group, Slot::Leaving { min_replica, descriptor, waiting });
        let mut batch = Batch::new();
        batch.destroy(group, min_replica);
        if is_broken(Rule::TombstoneFirst) {
            self.retry_destroy(group, fx);
        }
        self.send_batch(batch, None, Submission::Tombstone(group), fx);
    }

    fn retry_destroy(&mut self, group: GroupId, fx: &mut Effects) {
        if let Some(Slot::Leaving { descriptor, .. }) = self.slots.get(&group) {
            fx.apply.push(ApplyTask::Destroy { group, descriptor: descriptor.clone() });
        }
    }
}
