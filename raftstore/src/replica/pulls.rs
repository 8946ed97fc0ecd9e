//! Snapshots: offers taken, states pulled, views served.

use pontoon_proto::{ReplicaId, v1};
use raft::eraftpb as pb;

use super::{Alive, Replica, Shared, abandon_stage, convert, guarded};
use crate::{
    apply::{ApplyTask, SnapshotRequest},
    effects::Effects,
    snapshot::{FORMAT, Pull, ServeTask},
    transport::Class,
    types::Room,
};

/// Ticks of silence after which missing chunks are asked for again, and after which a pull is given up.
const ASK_AGAIN_TICKS: u64 = 20;
const GIVE_UP_TICKS: u64 = 100;

impl Replica {
    fn to_peer(&self, to: u64, body: v1::peer_message::Body, fx: &mut Effects) {
        if let Ok(replica) = ReplicaId::new(to) {
            let message = v1::PeerMessage { group: self.group.0, from: self.id.get(), to, body: Some(body) };
            fx.send.push((replica.node(), Class::Snapshot, message));
        }
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
            let status = v1::SnapshotStatus { pull: 0, done: false, reason: "not needed".to_owned() };
            self.to_peer(from.get(), v1::peer_message::Body::SnapshotStatus(status), fx);
            self.after_raft(shared, fx);
            return Ok(());
        }
        if self.pull.as_ref().is_some_and(|pull| pull.source == from.get()) {
            return Ok(());
        }
        if shared.room != Room::Ample {
            // The leader offers again, and the status says what it waits for.
            let reason = "the receiver's disk is nearly full".to_owned();
            let status = v1::SnapshotStatus { pull: 0, done: false, reason };
            self.to_peer(from.get(), v1::peer_message::Body::SnapshotStatus(status), fx);
            return Ok(());
        }
        if let Some(pull) = &self.pull {
            // Another leader offers: the old one may be gone.
            fx.apply.push(abandon_stage(self.group, pull.id));
        }
        let id = shared.next_unique();
        self.pull = Some(Box::new(Pull::new(id, from.get(), offer.index, shared.config.chunk_window)));
        self.dirty = true;
        fx.apply.push(ApplyTask::StageBegin { group: self.group, pull: id });
        let request = v1::ManifestRequest { pull: id, min_index: offer.index };
        self.to_peer(from.get(), v1::peer_message::Body::ManifestRequest(request), fx);
        Ok(())
    }

    pub(super) fn ask_chunks(
        &self,
        pull: u64,
        source: u64,
        snapshot: u64,
        chunks: Vec<u32>,
        fx: &mut Effects,
    ) {
        for chunk in chunks {
            let request = v1::ChunkRequest { pull, snapshot, chunk };
            self.to_peer(source, v1::peer_message::Body::ChunkRequest(request), fx);
        }
    }

    /// The receiver's side of the snapshot channel.
    pub(crate) fn on_pulled(
        &mut self,
        shared: &mut Shared,
        body: v1::peer_message::Body,
        fx: &mut Effects,
    ) -> Alive<()> {
        use v1::peer_message::Body;
        if shared.room == Room::Critical {
            // What was staged goes too: room is what is needed now.
            self.fail_pull("the receiver's disk is nearly full".to_owned(), fx);
        }
        let Some(pull) = &mut self.pull else { return Ok(()) };
        self.dirty = true;
        let steps = match body {
            Body::Manifest(manifest) if manifest.pull == pull.id => {
                if manifest.format != FORMAT || manifest.mark.is_none() {
                    let reason = format!("a manifest of format {} is not known here", manifest.format);
                    self.fail_pull(reason, fx);
                    return Ok(());
                }
                pull.on_manifest(manifest)
            }
            Body::Chunk(chunk) if chunk.pull == pull.id => pull.on_chunk(chunk),
            Body::PullRefused(refused) if refused.pull == pull.id => {
                self.fail_pull(refused.reason, fx);
                return Ok(());
            }
            _ => return Ok(()),
        };
        self.run_pull(shared, steps, fx)
    }

    pub(crate) fn on_staged(
        &mut self,
        shared: &mut Shared,
        pull: u64,
        chunk: u32,
        fx: &mut Effects,
    ) -> Alive<()> {
        let steps = match &mut self.pull {
            Some(current) if current.id == pull => current.on_staged(chunk),
            _ => return Ok(()),
        };
        self.dirty = true;
        self.run_pull(shared, steps, fx)
    }

    /// Gives a pull up and tells the leader, which then probes and offers again.
    pub(crate) fn fail_pull(&mut self, reason: String, fx: &mut Effects) {
        if self.installing.is_some() {
            return;
        }
        if let Some(pull) = self.pull.take() {
            fx.apply.push(abandon_stage(self.group, pull.id));
            let status = v1::SnapshotStatus { pull: pull.id, done: false, reason };
            self.to_peer(pull.source, v1::peer_message::Body::SnapshotStatus(status), fx);
        }
    }

    pub(crate) fn fail_pull_of(&mut self, pull: u64, reason: String, fx: &mut Effects) {
        if self.pull.as_ref().is_some_and(|current| current.id == pull) {
            self.fail_pull(reason, fx);
        }
    }

    pub(super) fn tick_pull(&mut self, shared: &mut Shared, ticks: u64, fx: &mut Effects) {
        let Some(pull) = &mut self.pull else { return };
        let before = pull.idle_ticks;
        pull.idle_ticks += ticks;
        let (id, source, idle) = (pull.id, pull.source, pull.idle_ticks);
        if idle > GIVE_UP_TICKS {
            self.fail_pull("the source went silent".to_owned(), fx);
            return;
        }
        if before / ASK_AGAIN_TICKS == idle / ASK_AGAIN_TICKS {
            return;
        }
        match &pull.manifest {
            Some(manifest) => {
                let (snapshot, missing, complete) = (manifest.snapshot, pull.missing(), pull.is_complete());
                self.ask_chunks(id, source, snapshot, missing, fx);
                if complete {
                    // All is here but no leader was known when it arrived. A failure surfaces at the next visit.
                    let _ = self.step_snapshot(shared, fx);
                }
            }
            None => {
                let request = v1::ManifestRequest { pull: id, min_index: pull.min_index };
                self.to_peer(source, v1::peer_message::Body::ManifestRequest(request), fx);
            }
        }
    }

    /// All chunks are staged: raft is given the snapshot, at this replica's term and from its current leader.
    pub(super) fn step_snapshot(&mut self, shared: &mut Shared, fx: &mut Effects) -> Alive<()> {
        let Some(pull) = &mut self.pull else { return Ok(()) };
        let Some(mark) = pull.manifest.as_ref().and_then(|manifest| manifest.mark.clone()) else {
            return Ok(());
        };
        let (term, leader) = (self.raw.raft.term, self.raw.raft.leader_id);
        if leader == 0 || leader == self.id.get() || mark.term > term {
            return Ok(());
        }
        pull.stepped = true;
        let id = pull.id;
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
            self.pull = None;
            fx.apply.push(abandon_stage(self.group, id));
        }
        Ok(())
    }

    /// The source's side of the snapshot channel.
    pub(crate) fn on_asked(
        &mut self,
        shared: &Shared,
        from: ReplicaId,
        body: v1::peer_message::Body,
        fx: &mut Effects,
    ) -> Alive<()> {
        use v1::peer_message::Body;
        if let Some(since) = self.offered.get_mut(&from.get()) {
            *since = shared.ticks;
        }
        match body {
            Body::ManifestRequest(request) => {
                fx.apply.push(ApplyTask::Checkpoint(SnapshotRequest {
                    group: self.group,
                    peer: from.node(),
                    receiver: from.get(),
                    replica: self.id.get(),
                    pull: request.pull,
                    min_index: request.min_index,
                }));
            }
            Body::ChunkRequest(request) => fx.serve.push(ServeTask::Read {
                group: self.group,
                peer: from.node(),
                from: self.id.get(),
                to: from.get(),
                request,
            }),
            Body::SnapshotStatus(status) if self.is_leader() && !status.done => {
                self.offered.remove(&from.get());
                self.dirty = true;
                let raw = &mut self.raw;
                guarded(|| raw.report_snapshot(from.get(), raft::SnapshotStatus::Failure))?;
            }
            _ => {}
        }
        Ok(())
    }

    /// A receiver is told that there is no state for it here yet.
    pub(crate) fn refuse_pull(&self, request: &SnapshotRequest, reason: String, fx: &mut Effects) {
        let refused = v1::PullRefused { pull: request.pull, reason };
        self.to_peer(request.receiver, v1::peer_message::Body::PullRefused(refused), fx);
    }
}
