//! From raft's ready to the log, the wire and the applier, in the order that safety needs.

use pontoon_wal::{self as wal, Batch, Reservation};
use raft::{ProgressState, Ready, eraftpb as pb};

use super::{Alive, Offer, Replica, Shared, convert, flow, guarded, install_batch, switched};
use crate::{
    apply::{ApplyTask, weight},
    beats::Beat,
    effects::Effects,
    rules::{Rule, is_broken},
    transport::Class,
};
use pontoon_proto::{
    ReplicaId,
    v1::{self, BeatKind},
};

/// A ready whose entries are in the turn's batch and which raft must be told of once the batch is submitted.
pub(crate) struct Taken {
    ready: Box<Ready>,
    /// Whether the ready is done only when its batch is durable.
    pub(crate) sync: bool,
    pub(crate) number: u64,
}

impl Replica {
    pub(crate) fn has_ready(&self) -> bool {
        self.installing.is_none() && self.raw.has_ready()
    }

    /// Whether the end of the turn has to look at this replica.
    pub(crate) fn has_work(&self) -> bool {
        self.has_ready() || self.has_readers() || self.raw.store().has_wanted()
    }

    /// Takes raft's ready into the turn's batch. `None`: there was nothing, or it waits for a snapshot to be switched in.
    pub(crate) fn take_ready(
        &mut self,
        shared: &mut Shared,
        batch: &mut Batch,
        reservations: &mut Option<Reservation>,
        fx: &mut Effects,
    ) -> Alive<Option<Taken>> {
        if !self.has_ready() {
            return Ok(None);
        }
        let raw = &mut self.raw;
        let mut ready = Box::new(guarded(|| raw.ready())?);
        let number = ready.number();
        self.last_number = number;
        self.pending_bytes = 0;
        if let Some(reservation) = self.reservation.take() {
            match reservations {
                Some(all) => all.merge(reservation),
                None => *reservations = Some(reservation),
            }
        }
        if ready.must_sync() {
            self.last_sync_number = number;
        }
        if ready.hs().is_some_and(|hs| (hs.term, hs.vote) != self.stored_vote(shared)) {
            self.vote_pending = Some(number);
        }
        self.on_read_states(ready.take_read_states(), fx);
        if !ready.snapshot().is_empty() {
            // Nothing of this ready reaches the log before the engine has switched; see `on_installed`.
            self.begin_install(ready, fx);
            return Ok(None);
        }
        let entries: Vec<wal::Entry> = ready.entries().iter().map(convert::entry_to_wal).collect();
        if !entries.is_empty() {
            batch.append(self.group, &entries);
        }
        if let Some(hs) = ready.hs() {
            batch.hard_state(self.group, hard_state(hs));
        }
        self.send_of(shared, &mut ready, number, fx);
        self.committed.extend(ready.take_committed_entries());
        let sync = ready.must_sync();
        Ok(Some(Taken { ready, sync, number }))
    }

    fn stored_vote(&self, shared: &Shared) -> (u64, u64) {
        shared.wal.hard_state(self.group).map_or((0, 0), |state| (state.term, state.vote))
    }

    /// The turn's batch was submitted: its entries can be read, so raft may forget them.
    pub(crate) fn after_submit(&mut self, shared: &mut Shared, taken: Taken, fx: &mut Effects) -> Alive<()> {
        let raw = &mut self.raw;
        guarded(|| raw.advance_append_async(*taken.ready))?;
        self.settle(shared, fx)
    }

    /// A submission with this replica's ready `number` is durable.
    pub(crate) fn on_persisted(&mut self, shared: &mut Shared, number: u64, fx: &mut Effects) -> Alive<()> {
        assert!(number >= self.persisted_number, "{}: readies become durable in order", self.group);
        self.persisted_number = number;
        self.dirty = true;
        if self.vote_pending.is_some_and(|pending| pending <= number) {
            self.vote_pending = None;
        }
        self.settle(shared, fx)
    }

    /// Tells raft what is durable, releases what waited for it, and hands on what is committed.
    fn settle(&mut self, shared: &mut Shared, fx: &mut Effects) -> Alive<()> {
        // Readies after the last one that needed the disk carry nothing to persist: they are done with it.
        let done = if self.persisted_number >= self.last_sync_number {
            self.last_number
        } else {
            self.persisted_number
        };
        // A ready that is being installed is not submitted yet.
        let done = if self.installing.is_some() { done.min(self.last_number - 1) } else { done };
        let raw = &mut self.raw;
        guarded(|| raw.on_persist_ready(done))?;
        if !self.traces.is_empty() {
            self.traces.persisted(self.raw.raft.raft_log.persisted);
        }
        if let Some((number, index)) = self.installed
            && number <= self.persisted_number
        {
            self.installed = None;
            let raw = &mut self.raw;
            guarded(|| raw.advance_apply_to(index))?;
        }
        while let Some((_, messages)) = self.held.pop_front_if(|(number, _)| *number <= self.persisted_number)
        {
            self.send(shared, messages, fx);
        }
        self.after_raft(shared, fx);
        self.pump_apply(shared, fx)
    }

    /// Sends or holds the messages of a ready; see the rules at the head of [`super`].
    fn send_of(&mut self, shared: &mut Shared, ready: &mut Ready, number: u64, fx: &mut Effects) {
        let mut now = ready.take_messages();
        let mut later = ready.take_persisted_messages();
        if let Some(pending) = self.vote_pending {
            if !now.is_empty() {
                self.held.push_back((pending, now));
            }
        } else {
            now.extend(later.extract_if(.., |m| m.get_msg_type() == pb::MessageType::MsgHeartbeatResponse));
            self.send(shared, now, fx);
        }
        if later.is_empty() {
            return;
        }
        debug_assert!(self.last_sync_number <= number);
        let durable = self.last_sync_number <= self.persisted_number || is_broken(Rule::DurableBeforeAck);
        if durable && self.held.is_empty() {
            self.send(shared, later, fx);
        } else {
            self.held.push_back((self.last_sync_number, later));
        }
    }

    fn send(&mut self, shared: &mut Shared, messages: Vec<pb::Message>, fx: &mut Effects) {
        use pb::MessageType::*;
        let gate_open = self.gate_open(shared);
        for (message, made_of) in flow::merge(messages, shared.config.max_append_bytes) {
            let Ok(to) = ReplicaId::new(message.to) else { continue };
            let kind = message.get_msg_type();
            let promises = matches!(
                kind,
                MsgAppendResponse | MsgRequestVote | MsgRequestVoteResponse | MsgRequestPreVoteResponse
            );
            if promises && !gate_open {
                continue;
            }
            let class = match kind {
                MsgAppend | MsgAppendResponse | MsgSnapshot => Class::Append,
                _ => Class::Control,
            };
            if kind == MsgTimeoutNow {
                self.lease.bar(message.term);
            }
            if kind == MsgSnapshot {
                let index = message.get_snapshot().get_metadata().index;
                // One that takes an earlier state still needs the log from there on.
                let offer = self.offered.entry(message.to).or_insert(Offer { since: 0, index });
                offer.since = shared.ticks;
            }
            if kind == MsgAppend {
                self.note_sent(shared, &message, made_of);
            }
            let floor = if matches!(kind, MsgAppend | MsgHeartbeat) { self.floor } else { 0 };
            if self.only_commits(&message) {
                let plain = Beat::plain(self.group, BeatKind::Heartbeat, self.id, to, message.term);
                fx.beats.push(Beat { commit: message.commit, floor, unanswered: true, ..plain });
                continue;
            }
            // Gathered until the end of the turn, which is when everything leaves.
            if let Some(beat) = Beat::of_raft(self.group, &message, floor) {
                fx.beats.push(beat);
                continue;
            }
            let body = v1::peer_message::Body::Raft(convert::message_to_wire(message, floor));
            let message =
                v1::PeerMessage { group: self.group.0, from: self.id.get(), to: to.get(), body: Some(body) };
            fx.send.push((to.node(), class, message));
        }
    }

    /// Whether an append says only that more of what its receiver has acknowledged is committed. Raft sends one to each
    /// follower for each commit, to be answered: half of all messages, where many groups have little to write each. One that
    /// stands behind what its receiver has acknowledged is answered: that is how raft learns that an append was lost, and
    /// without the answer the entry is never sent again.
    fn only_commits(&self, message: &pb::Message) -> bool {
        message.get_msg_type() == pb::MessageType::MsgAppend
            && message.get_entries().is_empty()
            && message.term == self.raw.raft.term
            && self.raw.raft.prs().get(message.to).is_some_and(|progress| {
                progress.state == ProgressState::Replicate
                    && progress.matched >= message.commit.max(message.index)
            })
    }

    /// Hands committed entries to the applier, configuration entries one by one by way of raft.
    pub(super) fn pump_apply(&mut self, shared: &mut Shared, fx: &mut Effects) -> Alive<()> {
        let want_replies = self.is_leader();
        while let Some(front) = self.committed.front() {
            if front.get_entry_type() != pb::EntryType::EntryNormal {
                if !self.apply_change(shared, fx)? {
                    return Ok(());
                }
                continue;
            }
            let normal = self
                .committed
                .iter()
                .position(|e| e.get_entry_type() != pb::EntryType::EntryNormal)
                .unwrap_or(self.committed.len());
            let entries: Vec<pb::Entry> = self.committed.drain(..normal).collect();
            let bytes = weight(&entries);
            self.unapplied_bytes += bytes;
            shared.unapplied_bytes += bytes;
            if !self.traces.is_empty() {
                self.traces.handed_on(entries.last().map_or(0, |entry| entry.index));
            }
            fx.apply.push(ApplyTask::Entries { group: self.group, entries, want_replies });
        }
        Ok(())
    }

    /// Raft accepted a snapshot: the engine switches first.
    ///
    /// Crash argument, step by step:
    /// 1. before the switch: the engine is old, the log is old; the stage is abandoned at the next open;
    /// 2. the switch is one durable batch of the engine: generation, mark, switch record;
    /// 3. between switch and log: the mark is ahead of the log and its switch record tells `build` what to complete;
    /// 4. the log takes snapshot and hard state in one batch; only when that is durable does the answer leave.
    fn begin_install(&mut self, ready: Box<Ready>, fx: &mut Effects) {
        let index = ready.snapshot().get_metadata().index;
        let pull = self.puller.pull().filter(|pull| pull.stepped);
        let staged = pull.and_then(|pull| Some((pull.id, pull.manifest.as_ref()?.mark.clone()?)));
        let (pull, mark) = staged
            .filter(|(_, mark)| mark.index == index)
            .unwrap_or_else(|| unreachable!("{}: only staged snapshots are stepped", self.group));
        let mark = switched(mark, self.id);
        self.installing = Some(ready);
        self.committed.clear();
        fx.apply.push(ApplyTask::Install { group: self.group, pull, mark });
    }

    /// The engine has switched to the snapshot; now the log follows.
    pub(crate) fn on_installed(
        &mut self,
        shared: &mut Shared,
        mark: v1::Mark,
        batch: &mut Batch,
        fx: &mut Effects,
    ) -> Alive<Option<Taken>> {
        let Some(mut ready) = self.installing.take() else {
            return Err("the engine installed a snapshot that nobody asked for".to_owned());
        };
        let conf = mark.conf_state.clone().unwrap_or_default();
        let number = ready.number();
        let before = ready.hs().map_or_else(|| hard_state(&self.raw.raft.hard_state()), hard_state);
        install_batch(batch, self.group, &mark, before);
        let entries: Vec<wal::Entry> = ready.entries().iter().map(convert::entry_to_wal).collect();
        if !entries.is_empty() {
            batch.append(self.group, &entries);
        }
        if let Some(pull) = self.puller.take(shared) {
            fx.events.push(pull.installed(self.group));
        }
        self.installed = Some((number, mark.index));
        self.durable = mark.index;
        self.conf = conf.clone();
        self.raw.mut_store().offer = Some((mark.index, mark.term, conf));
        shared.clock.observe(mark.timestamp);
        self.mark = mark;
        self.floor = 0;
        self.verified = None;
        self.dirty = true;
        // The answer waits for the log as every promise of a follower does.
        let mut messages = ready.take_messages();
        messages.extend(ready.take_persisted_messages());
        self.held.push_back((number, messages));
        self.committed.extend(ready.take_committed_entries());
        Ok(Some(Taken { ready, sync: true, number }))
    }
}

fn hard_state(hs: &pb::HardState) -> wal::HardState {
    wal::HardState { term: hs.term, vote: hs.vote, commit: hs.commit }
}
