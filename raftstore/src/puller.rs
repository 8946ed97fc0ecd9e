//! A pull on its way: which source is asked, when another one is, what the leader hears, and what the budget allows.
//!
//! Everything here is "ask again": a question or an answer that is lost, doubled or late does no harm, since a pull's number
//! changes with each manifest and each chunk is checked against its hash before it is staged.

use pontoon_proto::{GroupId, NodeId, ReplicaId, v1};
use v1::peer_message::Body;

use crate::{
    apply::{ApplyTask, StageChunk},
    convert,
    effects::Effects,
    replica::Shared,
    snapshot::{Pull, PullStep, check_manifest},
    transport::Class,
    types::{PullProgress, Room},
};

/// Ticks of silence after which a question is repeated, and the leader hears that the pull goes on.
const ASK_AGAIN_TICKS: u64 = 20;
/// Ticks of silence after which another source is asked. One that is at work on a manifest, which takes a scan of the whole
/// state, says so whenever it is asked.
const PATIENCE_TICKS: u64 = 40;
/// Ticks of silence of a source whose node cannot be reached after which another one is asked. Not at once: a queue that was full
/// is told of in the same words.
const GONE_TICKS: u64 = 3;
/// Ticks without any step forward after which a pull is given up.
const GIVE_UP_TICKS: u64 = 300;
/// Ticks for which a receiver without room refuses what it is offered.
const NO_ROOM_TICKS: u64 = 50;

/// What a replica receives, if anything.
pub(crate) struct Puller {
    group: GroupId,
    id: ReplicaId,
    /// Boxed: few replicas ever pull.
    pull: Option<Box<Pull>>,
    /// Why nothing is received, and until which tick nothing is begun.
    blocked: Option<(u64, String)>,
}

/// Members of whom a state may be had, in the order in which they are asked: followers first, in another order for each
/// pull so that not all receivers ask the same one, and the leader last.
pub(crate) fn sources(conf: &v1::ConfState, own: u64, leader: u64, turn: u64) -> Vec<u64> {
    let mut others = convert::members(conf);
    others.sort_unstable();
    others.dedup();
    others.retain(|id| *id != own && *id != leader);
    // Learners may be empty themselves.
    let is_learner = |id: &u64| conf.learners.contains(id) && !conf.voters.contains(id);
    let (mut voters, learners): (Vec<u64>, Vec<u64>) = others.into_iter().partition(|id| !is_learner(id));
    let by = turn as usize % voters.len().max(1);
    voters.rotate_left(by);
    voters.extend(learners);
    if leader != own {
        voters.push(leader);
    }
    voters
}

impl Puller {
    pub(crate) fn new(group: GroupId, id: ReplicaId) -> Puller {
        Puller { group, id, pull: None, blocked: None }
    }

    pub(crate) fn pull(&self) -> Option<&Pull> {
        self.pull.as_deref()
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.pull.is_none()
    }

    pub(crate) fn progress(&self) -> Option<PullProgress> {
        self.pull.as_ref().map(|pull| pull.progress())
    }

    /// Why nothing comes, in words.
    pub(crate) fn blocked(&self) -> Option<&str> {
        self.blocked.as_ref().map(|(_, reason)| reason.as_str())
    }

    /// Why nothing may be begun now.
    pub(crate) fn refuses(&self, shared: &Shared) -> Option<&str> {
        if shared.room != Room::Ample {
            return Some("the receiver's disk is nearly full");
        }
        self.blocked.as_ref().filter(|(until, _)| shared.ticks < *until).map(|(_, reason)| reason.as_str())
    }

    pub(crate) fn say(&self, to: u64, body: Body, fx: &mut Effects) {
        if let Ok(replica) = ReplicaId::new(to) {
            let message = v1::PeerMessage { group: self.group.0, from: self.id.get(), to, body: Some(body) };
            fx.send.push((replica.node(), Class::Snapshot, message));
        }
    }

    pub(crate) fn begin(
        &mut self,
        shared: &mut Shared,
        leader: u64,
        sources: Vec<u64>,
        min_index: u64,
        fx: &mut Effects,
    ) {
        let id = shared.next_unique();
        let mut pull = Box::new(Pull::new(id, leader, sources, min_index, shared.config.chunk_window));
        pull.waits_turn = !shared.turns.enter(self.group);
        let waits = pull.waits_turn;
        self.pull = Some(pull);
        if waits { self.tell_leader(fx) } else { self.ask_manifest(fx) }
    }

    /// The turn has come, or there is budget again.
    pub(crate) fn go_on(&mut self, shared: &mut Shared, fx: &mut Effects) {
        let Some(pull) = &mut self.pull else { return shared.turns.leave(self.group) };
        pull.waits_turn = false;
        if pull.manifest.is_none() {
            self.ask_manifest(fx);
        }
        self.pour(shared, fx);
    }

    /// Turns to another source, on somebody's word that this one is too slow. A pull that waits for its turn, or for nothing that a
    /// source could give, goes on as it is.
    pub(crate) fn other_source(&mut self, shared: &mut Shared, fx: &mut Effects) {
        let owed = self.pull.as_ref().is_some_and(|pull| !pull.stepped && pull.is_owed());
        if owed && !shared.turns.is_waiting(self.group) {
            self.turn_to_next(shared, "the source is too slow".to_owned(), fx);
        }
    }

    /// Another member may be asked, too.
    pub(crate) fn add_source(&mut self, source: u64) {
        if let Some(pull) = &mut self.pull {
            pull.add_source(source);
        }
    }

    /// Another leader offers, or the same one again.
    pub(crate) fn offered_again(&mut self, shared: &mut Shared, leader: u64, index: u64, fx: &mut Effects) {
        let Some(pull) = &mut self.pull else { return };
        pull.leader = leader;
        if pull.manifest.is_none() && pull.min_index < index {
            pull.min_index = index;
            pull.ask_anew(shared.next_unique());
            if shared.turns.enter(self.group) {
                self.ask_manifest(fx);
            }
        }
        self.tell_leader(fx);
    }

    /// That the pull goes on, and which log it will need.
    fn tell_leader(&self, fx: &mut Effects) {
        let Some(pull) = &self.pull else { return };
        let (under_way, index) = (true, pull.min_index);
        let status = v1::SnapshotStatus { pull: pull.id, under_way, index, ..Default::default() };
        self.say(pull.leader, Body::SnapshotStatus(status), fx);
    }

    fn ask_manifest(&self, fx: &mut Effects) {
        let Some(pull) = &self.pull else { return };
        let request = v1::ManifestRequest { pull: pull.id, min_index: pull.min_index };
        self.say(pull.source(), Body::ManifestRequest(request), fx);
    }

    /// Asks for what the budget allows.
    fn pour(&mut self, shared: &mut Shared, fx: &mut Effects) {
        let Some(pull) = &mut self.pull else { return };
        let mut chunks = Vec::new();
        while let Some(chunk) = pull.queue.front().copied() {
            let bytes =
                pull.manifest.as_ref().and_then(|m| m.chunks.get(chunk as usize)).map_or(0, |c| c.bytes);
            let felt_by = [pull.source(), pull.leader].map(|id| ReplicaId::new(id).ok().map(ReplicaId::node));
            if !shared.turns.spend(self.group, felt_by, bytes) {
                break;
            }
            pull.queue.pop_front();
            chunks.push(chunk);
        }
        self.ask_chunks(chunks, fx);
    }

    fn ask_chunks(&self, chunks: Vec<u32>, fx: &mut Effects) {
        let Some((pull, manifest)) =
            self.pull.as_ref().and_then(|pull| Some((pull, pull.manifest.as_ref()?)))
        else {
            return;
        };
        for chunk in chunks {
            let request = v1::ChunkRequest { pull: pull.id, snapshot: manifest.snapshot, chunk };
            self.say(pull.source(), Body::ChunkRequest(request), fx);
        }
    }

    /// What a source says. True: all is staged.
    pub(crate) fn on_said(&mut self, shared: &mut Shared, from: u64, body: Body, fx: &mut Effects) -> bool {
        if shared.room == Room::Critical {
            // What was staged goes too: room is what is needed now.
            self.drop_staged(shared, "the receiver's disk is nearly full".to_owned(), fx);
        }
        let Some(pull) = self.pull.as_mut().filter(|pull| pull.source() == from && !pull.stepped) else {
            return false;
        };
        let steps = match body {
            Body::Manifest(manifest) if manifest.pull == pull.id && pull.manifest.is_none() => {
                match check_manifest(&manifest, self.group, self.id.get(), pull.min_index) {
                    Ok(()) => pull.on_manifest(manifest),
                    Err(reason) => {
                        self.turn_to_next(shared, reason, fx);
                        return false;
                    }
                }
            }
            Body::Chunk(chunk) if chunk.pull == pull.id => pull.on_chunk(chunk),
            Body::PullRefused(refused) if refused.pull == pull.id => {
                self.turn_to_next(shared, refused.reason, fx);
                return false;
            }
            // The source is at work on it.
            Body::SnapshotStatus(status) if status.pull == pull.id && status.under_way => {
                (pull.idle_ticks, pull.stuck_ticks) = (0, 0);
                return false;
            }
            _ => return false,
        };
        self.run(shared, steps, fx)
    }

    /// The stage takes chunks: what it holds need not come. True: all is staged.
    pub(crate) fn on_begun(
        &mut self,
        shared: &mut Shared,
        pull: u64,
        held: &[u32],
        fx: &mut Effects,
    ) -> bool {
        let Some(current) = self.pull.as_mut().filter(|current| current.id == pull) else { return false };
        let steps = current.on_begun(held);
        let to_come = current.progress();
        let to_come = to_come.bytes_total - to_come.bytes_done;
        if let Err(free) = shared.turns.reserve(self.group, to_come) {
            let reason = format!(
                "the receiver has room for {free} bytes beside what it receives already, and {to_come} are to come: free \
                 some space there, or move the predicate elsewhere"
            );
            self.blocked = Some((shared.ticks + NO_ROOM_TICKS, reason.clone()));
            self.fail(shared, reason, fx);
            return false;
        }
        self.blocked = None;
        self.run(shared, steps, fx)
    }

    /// A chunk is staged. True: all is.
    pub(crate) fn on_staged(&mut self, shared: &mut Shared, pull: u64, chunk: u32, fx: &mut Effects) -> bool {
        let Some(current) = self.pull.as_mut().filter(|current| current.id == pull) else { return false };
        let before = current.bytes_done;
        let steps = current.on_staged(chunk);
        shared.turns.release(self.group, current.bytes_done - before);
        self.run(shared, steps, fx)
    }

    /// A chunk could not be staged: it was not what the manifest says, or the engine did not take it.
    pub(crate) fn on_stage_failed(
        &mut self,
        shared: &mut Shared,
        pull: u64,
        reason: String,
        fx: &mut Effects,
    ) {
        if self.pull.as_ref().is_some_and(|current| current.id == pull && !current.stepped) {
            self.turn_to_next(shared, reason, fx);
        }
    }

    /// A node cannot be reached. If it is the one that gives, nobody waits until it has been silent for long.
    pub(crate) fn unreachable(&mut self, shared: &mut Shared, node: NodeId, fx: &mut Effects) {
        let lost = self.pull.as_ref().is_some_and(|pull| {
            let gives = ReplicaId::new(pull.source()).is_ok_and(|source| source.node() == node);
            gives && pull.is_owed() && !pull.stepped && pull.idle_ticks >= GONE_TICKS
        });
        if lost && !shared.turns.is_waiting(self.group) {
            self.turn_to_next(shared, format!("{node} cannot be reached"), fx);
        }
    }

    fn run(&mut self, shared: &mut Shared, steps: Vec<PullStep>, fx: &mut Effects) -> bool {
        let Some(pull) = &mut self.pull else { return false };
        let (group, id) = (self.group, pull.id);
        let mut complete = false;
        for step in steps {
            match step {
                PullStep::Begin(manifest) => {
                    fx.apply.push(ApplyTask::StageBegin { group, pull: id, manifest });
                }
                PullStep::Request(chunks) => pull.queue.extend(chunks),
                PullStep::Stage { chunk, hash, data } => {
                    let hurry = shared.turns.hurries();
                    let chunk = StageChunk { pull: id, chunk, hash, data, hurry };
                    fx.apply.push(ApplyTask::StageChunk { group, chunk });
                }
                PullStep::Complete => complete = true,
            }
        }
        self.pour(shared, fx);
        if complete {
            self.release_view(fx);
        }
        complete
    }

    /// The source need not keep its view for us any more.
    fn release_view(&self, fx: &mut Effects) {
        if let Some(pull) = self.pull.as_ref().filter(|pull| pull.manifest.is_some()) {
            let status = v1::SnapshotStatus { pull: pull.id, done: true, ..Default::default() };
            self.say(pull.source(), Body::SnapshotStatus(status), fx);
        }
    }

    /// This source is of no use: the next one is asked, or the first one again after a pause.
    fn turn_to_next(&mut self, shared: &mut Shared, reason: String, fx: &mut Effects) {
        self.release_view(fx);
        let Some(pull) = &mut self.pull else { return };
        tracing::debug!(group = %self.group, source = pull.source(), %reason, "a state is asked of another member");
        let next = pull.next_source(shared.next_unique());
        self.blocked = Some((0, reason));
        if next {
            self.ask_manifest(fx);
        }
    }

    /// Time goes on. True: all is staged, and nobody has taken it yet.
    pub(crate) fn tick(&mut self, shared: &mut Shared, ticks: u64, fx: &mut Effects) -> bool {
        let Some(pull) = &mut self.pull else { return false };
        if pull.stepped {
            return false;
        }
        if shared.turns.is_waiting(self.group) {
            pull.idle_ticks += ticks;
            if (pull.idle_ticks - ticks) / ASK_AGAIN_TICKS != pull.idle_ticks / ASK_AGAIN_TICKS {
                self.tell_leader(fx);
            }
            return false;
        }
        let before = pull.idle_ticks;
        pull.idle_ticks += ticks;
        if pull.is_complete() || !pull.queue.is_empty() {
            // It waits for a leader here, or for the budget: that is nobody's fault.
            pull.stuck_ticks = 0;
        }
        pull.stuck_ticks += ticks;
        let idle = pull.idle_ticks;
        if pull.stuck_ticks > GIVE_UP_TICKS {
            let reason =
                self.blocked.take().map_or_else(|| "no member answers".to_owned(), |(_, reason)| reason);
            self.fail(shared, reason, fx);
            return false;
        }
        if pull.is_owed() && idle > PATIENCE_TICKS {
            self.turn_to_next(shared, "the source went silent".to_owned(), fx);
            return false;
        }
        if before / ASK_AGAIN_TICKS == idle / ASK_AGAIN_TICKS {
            return false;
        }
        let complete = pull.is_complete();
        if pull.rests {
            pull.ask_anew(shared.next_unique());
        }
        match pull.manifest {
            Some(_) => {
                let missing = pull.missing();
                self.ask_chunks(missing, fx);
            }
            None => self.ask_manifest(fx),
        }
        self.tell_leader(fx);
        complete
    }

    /// Gives up and tells the leader, which then probes and offers again. What was staged is kept for that.
    pub(crate) fn fail(&mut self, shared: &mut Shared, reason: String, fx: &mut Effects) {
        self.release_view(fx);
        if let Some(pull) = self.take(shared) {
            let status = v1::SnapshotStatus { pull: pull.id, reason, ..Default::default() };
            self.say(pull.leader, Body::SnapshotStatus(status), fx);
        }
    }

    /// Gives up, and what was staged too.
    pub(crate) fn drop_staged(&mut self, shared: &mut Shared, reason: String, fx: &mut Effects) {
        if let Some(pull) = self.pull.as_ref().filter(|pull| !pull.stepped) {
            fx.apply.push(ApplyTask::StageAbandon { group: self.group, pull: pull.id });
            self.fail(shared, reason, fx);
        }
    }

    /// Raft, or the log, takes over what is staged. Its mark.
    pub(crate) fn step(&mut self) -> Option<(u64, v1::Mark)> {
        let pull = self.pull.as_mut()?;
        let mark = pull.manifest.as_ref()?.mark.clone()?;
        pull.stepped = true;
        Some((pull.id, mark))
    }

    /// Ends the pull.
    pub(crate) fn take(&mut self, shared: &mut Shared) -> Option<Box<Pull>> {
        shared.turns.leave(self.group);
        self.pull.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn followers_are_asked_before_learners_and_the_leader_last() {
        let conf = v1::ConfState { voters: vec![1, 2, 3], learners: vec![4, 9], ..Default::default() };
        assert_eq!(sources(&conf, 9, 2, 0), [1, 3, 4, 2]);
        assert_eq!(sources(&conf, 9, 2, 1), [3, 1, 4, 2]);
        let alone = v1::ConfState { voters: vec![2], learners: vec![9], ..Default::default() };
        assert_eq!(sources(&alone, 9, 2, 7), [2]);
    }
}
