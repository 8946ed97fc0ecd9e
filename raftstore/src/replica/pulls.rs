//! Snapshots: offers taken, states pulled, views served.

use pontoon_proto::{ReplicaId, v1};
use raft::eraftpb as pb;

use super::{Alive, Offer, Replica, Shared, convert, guarded};
use crate::{
    apply::{ApplyTask, SnapshotRequest},
    effects::Effects,
    puller::sources,
    snapshot::ServeTask,
};

impl Replica {
    fn to_peer(&self, to: u64, body: v1::peer_message::Body, fx: &mut Effects) {
        self.puller.say(to, body, fx);
    }

    /// The leader offers a snapshot: raft does not see the offer before the state is here.
    pub(super) fn on_offer(
        &mut self,
        shared: &mut Shared,
        from: ReplicaId,
        wire: v1::RaftMessage,
        fx: &mut Effects,
    ) -> Alive<()> {
        let Some(offer) = wire.snapshot else { return Ok(()) };
        if wire.term < self.raw.raft.term {
            return Ok(());
        }
        let committed = self.raw.raft.raft_log.committed;
        if offer.index <= committed {
            // This log is there already, and the leader does not know: the answer to an earlier offer was lost. Raft
            // installs nothing below its commit, whoever says what, and answers with how far the log is. Without that answer
            // the leader of an idle group would offer the same again and again. The status frees one that knows already but
            // still waits for the snapshot.
            let Some(below) = committed.checked_sub(1) else { return Ok(()) };
            let mut message = pb::Message::default();
            message.set_msg_type(pb::MessageType::MsgSnapshot);
            message.from = from.get();
            message.to = self.id.get();
            message.term = wire.term;
            let conf = offer.conf_state.unwrap_or_default();
            message.set_snapshot(convert::snapshot_meta(below, offer.term, &conf));
            let raw = &mut self.raw;
            guarded(|| raw.step(message).ok())?;
            let reason = "not needed".to_owned();
            let status = v1::SnapshotStatus { pull: 0, reason, ..Default::default() };
            self.to_peer(from.get(), v1::peer_message::Body::SnapshotStatus(status), fx);
            self.after_raft(shared, fx);
            return Ok(());
        }
        if !self.puller.is_idle() {
            self.puller.offered_again(shared, from.get(), offer.index, fx);
            return Ok(());
        }
        if let Some(reason) = self.puller.refuses(shared) {
            // The leader offers again, and the status says what it waits for.
            let status = v1::SnapshotStatus { pull: 0, reason: reason.to_owned(), ..Default::default() };
            self.to_peer(from.get(), v1::peer_message::Body::SnapshotStatus(status), fx);
            return Ok(());
        }
        self.dirty = true;
        let conf = offer.conf_state.unwrap_or_default();
        let sources = sources(&conf, self.id.get(), from.get(), shared.next_unique());
        self.puller.begin(shared, from.get(), sources, offer.index, fx);
        Ok(())
    }

    /// The receiver's side of the snapshot channel.
    pub(crate) fn on_pulled(
        &mut self,
        shared: &mut Shared,
        from: ReplicaId,
        body: v1::peer_message::Body,
        fx: &mut Effects,
    ) -> Alive<()> {
        self.dirty |= !self.puller.is_idle();
        match self.puller.on_said(shared, from.get(), body, fx) {
            true => self.step_snapshot(shared, fx),
            false => Ok(()),
        }
    }

    pub(crate) fn on_stage_begun(
        &mut self,
        shared: &mut Shared,
        pull: u64,
        held: &[u32],
        fx: &mut Effects,
    ) -> Alive<()> {
        self.dirty = true;
        match self.puller.on_begun(shared, pull, held, fx) {
            true => self.step_snapshot(shared, fx),
            false => Ok(()),
        }
    }

    pub(crate) fn on_staged(
        &mut self,
        shared: &mut Shared,
        pull: u64,
        chunk: u32,
        fx: &mut Effects,
    ) -> Alive<()> {
        self.dirty = true;
        match self.puller.on_staged(shared, pull, chunk, fx) {
            true => self.step_snapshot(shared, fx),
            false => Ok(()),
        }
    }

    pub(crate) fn on_stage_failed(
        &mut self,
        shared: &mut Shared,
        pull: u64,
        reason: String,
        fx: &mut Effects,
    ) {
        self.puller.on_stage_failed(shared, pull, reason, fx);
    }

    /// A pull that waited for its turn, or for the budget, goes on.
    pub(crate) fn go_on(&mut self, shared: &mut Shared, fx: &mut Effects) {
        self.dirty = true;
        self.puller.go_on(shared, fx);
    }

    /// What comes here comes too slowly for somebody who looks on.
    pub(crate) fn other_source(&mut self, shared: &mut Shared, fx: &mut Effects) {
        self.dirty |= !self.puller.is_idle();
        self.puller.other_source(shared, fx);
    }

    pub(super) fn tick_pull(&mut self, shared: &mut Shared, ticks: u64, fx: &mut Effects) -> Alive<()> {
        match self.puller.tick(shared, ticks, fx) {
            true => self.step_snapshot(shared, fx),
            false => Ok(()),
        }
    }

    /// All chunks are staged: raft is given the snapshot, at this replica's term and from its current leader.
    pub(super) fn step_snapshot(&mut self, shared: &mut Shared, fx: &mut Effects) -> Alive<()> {
        let (term, leader) = (self.raw.raft.term, self.raw.raft.leader_id);
        let staged = self.puller.pull().and_then(|pull| pull.manifest.as_ref()?.mark.as_ref());
        let may = staged.is_some_and(|mark| mark.term <= term) && leader != 0 && leader != self.id.get();
        let Some((id, mark)) = may.then(|| self.puller.step()).flatten() else { return Ok(()) };
        let mut message = pb::Message::default();
        message.set_msg_type(pb::MessageType::MsgSnapshot);
        message.from = leader;
        message.to = self.id.get();
        message.term = term;
        message.set_snapshot(convert::snapshot_meta(
            mark.index,
            mark.term,
            &mark.conf_state.clone().unwrap_or_default(),
        ));
        let raw = &mut self.raw;
        guarded(|| raw.step(message).ok())?;
        self.after_raft(shared, fx);
        if self.raw.snap().is_none_or(|snapshot| snapshot.is_empty()) {
            // Raft had no use for it: the log got there by itself.
            self.puller.take(shared);
            fx.apply.push(ApplyTask::StageAbandon { group: self.group, pull: id });
        }
        Ok(())
    }

    /// The source's side of the snapshot channel.
    pub(crate) fn on_asked(
        &mut self,
        shared: &mut Shared,
        from: ReplicaId,
        body: v1::peer_message::Body,
        fx: &mut Effects,
    ) -> Alive<()> {
        use v1::peer_message::Body;
        if let Some(offer) = self.offered.get_mut(&from.get()) {
            offer.since = shared.ticks;
        }
        match body {
            Body::ManifestRequest(request) => {
                shared.turns.note_copy();
                fx.apply.push(ApplyTask::Checkpoint(SnapshotRequest {
                    group: self.group,
                    peer: from.node(),
                    receiver: from.get(),
                    replica: self.id.get(),
                    pull: request.pull,
                    min_index: request.min_index,
                }));
            }
            Body::ChunkRequest(request) => {
                shared.turns.note_copy();
                fx.serve.push(ServeTask::Read {
                    group: self.group,
                    peer: from.node(),
                    from: self.id.get(),
                    to: from.get(),
                    request,
                });
            }
            Body::SnapshotStatus(status) if status.done => {
                fx.serve.push(ServeTask::Release { group: self.group, receiver: from.get() });
            }
            Body::SnapshotStatus(status)
                if status.under_way && self.puller.pull().is_some_and(|pull| pull.id == status.pull) =>
            {
                self.puller.on_said(shared, from.get(), Body::SnapshotStatus(status), fx);
            }
            Body::SnapshotStatus(status) if status.under_way => {
                // Raft may have been told otherwise, by way of a lost connection; what comes needs its log all the same.
                let now = Offer { since: shared.ticks, index: status.index };
                let member = self.is_leader() && convert::members(&self.conf).contains(&from.get());
                if member && status.index >= self.raw.raft.raft_log.first_index().saturating_sub(1) {
                    let offer = self.offered.entry(from.get()).or_insert(now);
                    offer.index = offer.index.min(now.index);
                }
            }
            Body::SnapshotStatus(_) if self.is_leader() => {
                self.offered.remove(&from.get());
                self.dirty = true;
                let raw = &mut self.raw;
                guarded(|| raw.report_snapshot(from.get(), raft::SnapshotStatus::Failure))?;
            }
            _ => {}
        }
        Ok(())
    }

    /// On the leader: a receiver that took a state is probed from there, also if it is an earlier one than raft waits for, that
    /// of another member or of an earlier offer.
    pub(super) fn note_arrived(&mut self, from: u64) -> Alive<()> {
        let arrived =
            self.raw.raft.prs().get(from).zip(self.offered.get(&from)).is_some_and(|(progress, offer)| {
                progress.state == raft::ProgressState::Snapshot && progress.matched >= offer.index
            });
        if arrived {
            self.offered.remove(&from);
            self.dirty = true;
            let raw = &mut self.raw;
            guarded(|| raw.report_snapshot(from, raft::SnapshotStatus::Failure))?;
        }
        Ok(())
    }

    /// A view for a receiver is open, and its manifest is being made: that may take a while. Said here and not when it was
    /// asked for, so that a machine that stands still is silent.
    pub(crate) fn tell_at_work(&self, request: &SnapshotRequest, fx: &mut Effects) {
        let status = v1::SnapshotStatus { pull: request.pull, under_way: true, ..Default::default() };
        self.to_peer(request.receiver, v1::peer_message::Body::SnapshotStatus(status), fx);
    }

    /// A receiver is told that there is no state for it here yet.
    pub(crate) fn refuse_pull(&self, request: &SnapshotRequest, reason: String, fx: &mut Effects) {
        let refused = v1::PullRefused { pull: request.pull, reason };
        self.to_peer(request.receiver, v1::peer_message::Body::PullRefused(refused), fx);
    }
}
