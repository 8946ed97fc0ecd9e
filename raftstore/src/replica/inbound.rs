//! Messages from peers, checked before raft sees them: raft 0.7 panics on what a stale, damaged or hostile peer can say.

use pontoon_proto::{NodeId, ReplicaId, v1};
use raft::{StateRole, eraftpb as pb};

use super::{Alive, Replica, Shared, convert, flow, guarded};
use crate::{
    beats::Beat,
    effects::Effects,
    types::{Event, Room},
};

/// What the check found.
enum Verdict {
    Step,
    /// Not for raft; say why.
    Refuse(String),
    /// This replica's own log is short of what it acknowledged.
    LostLog(String),
}

impl Replica {
    /// Takes a raft message of a peer.
    pub(crate) fn on_raft(
        &mut self,
        shared: &mut Shared,
        from: ReplicaId,
        wire: v1::RaftMessage,
        fx: &mut Effects,
    ) -> Alive<()> {
        if self.installing.is_some() {
            return Ok(());
        }
        if wire.kind == pb::MessageType::MsgSnapshot as i32 {
            return self.on_offer(shared, from, wire, fx);
        }
        let (floor, kind, term) = (wire.floor, wire.kind, wire.term);
        let message = match convert::message_from_wire(from.get(), self.id.get(), wire) {
            Ok(message) => message,
            Err(reason) => return self.refuse(from.node(), reason, fx),
        };
        match self.check(&message) {
            Verdict::Step => {}
            Verdict::Refuse(reason) => return self.refuse(from.node(), reason, fx),
            Verdict::LostLog(reason) => return Err(reason),
        }
        if self.asks_too_early(shared, &message) {
            return Ok(());
        }
        let entries = message.get_entries();
        // A new leader's empty entry and configurations always pass: without them nobody could read, or make room.
        let commands =
            entries.iter().any(|e| e.entry_type == pb::EntryType::EntryNormal && !e.data.is_empty());
        let bytes = flow::weight(&message);
        let no_room = commands && (shared.room == Room::Critical || self.is_behind(shared));
        if bytes > 0 && (no_room || !self.reserve(shared, bytes)) {
            // A full log or disk takes no entries, nor does an engine that is far behind; the leader repeats them.
            return Ok(());
        }
        let standing = self.standing(from);
        let answers_append = kind == pb::MessageType::MsgAppendResponse as i32 && self.is_leader();
        if answers_append && !message.reject && message.term == self.raw.raft.term {
            self.note_acknowledged(shared, from.get(), message.index);
        }
        let raw = &mut self.raw;
        // An unknown peer's answer is an error and no fault.
        guarded(|| raw.step(message).ok())?;
        if answers_append {
            self.level(shared, from.get());
            self.note_arrived(from.get())?;
        }
        // In an idle group nothing else tells that a member has arrived: whoever waits for it looks at the status.
        self.dirty |= self.standing(from) != standing || self.silent.remove(&from.get());
        let from_leader = self.raw.raft.leader_id == from.get() && self.raw.raft.term == term;
        if from_leader
            && [pb::MessageType::MsgAppend as i32, pb::MessageType::MsgHeartbeat as i32].contains(&kind)
        {
            self.floor = self.floor.max(floor);
            self.lease.heard_leader(shared.clock_now);
        }
        self.after_raft(shared, fx);
        Ok(())
    }

    /// Whether this replica follows the sender, which knows what is in the log here.
    pub(crate) fn follows(&self, beat: Beat) -> bool {
        let raft = &self.raw.raft;
        self.installing.is_none()
            && raft.state == StateRole::Follower
            && (raft.leader_id, raft.term) == (beat.from.get(), beat.term)
            && beat.commit <= self.last_index()
    }

    /// Whether there is something new in it: one that was late wakes nobody.
    pub(crate) fn learns_from(&self, beat: Beat) -> bool {
        !self.is_asleep() || beat.commit > self.raw.raft.raft_log.committed
    }

    /// The leader tells what is committed, at most as far as this replica has acknowledged in this term: so the log here is
    /// the leader's up to there, and nothing has to be said. It is the leader's word as a heartbeat is.
    pub(crate) fn on_commit(&mut self, shared: &mut Shared, beat: Beat, fx: &mut Effects) -> Alive<()> {
        let raft = &mut self.raw.raft;
        raft.election_elapsed = 0;
        guarded(|| raft.raft_log.commit_to(beat.commit))?;
        self.floor = self.floor.max(beat.floor);
        self.lease.heard_leader(shared.clock_now);
        self.after_raft(shared, fx);
        Ok(())
    }

    fn refuse(&self, from: NodeId, reason: String, fx: &mut Effects) -> Alive<()> {
        fx.events.push(Event::MessageRefused { from, group: self.group, reason });
        Ok(())
    }

    fn check(&self, message: &pb::Message) -> Verdict {
        let raft = &self.raw.raft;
        let (last, committed) = (self.last_index(), raft.raft_log.committed);
        if message.term < raft.term {
            return Verdict::Step;
        }
        match message.get_msg_type() {
            // The leader never tells a follower of commits beyond what that follower acknowledged.
            pb::MessageType::MsgHeartbeat if message.commit > last => Verdict::LostLog(format!(
                "the leader counts on entries up to {}, the log here ends at {last}: it lost acknowledged entries",
                message.commit
            )),
            pb::MessageType::MsgAppend => {
                // As raft sees its log. What came in this turn is in ours only at the turn's end, and may be committed already, in place
                // of what was there before. 0: the entry is compacted.
                let differs =
                    |index, other| raft.raft_log.term(index).is_ok_and(|term| term != 0 && term != other);
                let conflict = message
                    .get_entries()
                    .iter()
                    .take_while(|e| e.index <= committed)
                    .find(|e| differs(e.index, e.term));
                match conflict {
                    Some(e) => Verdict::Refuse(format!(
                        "entry {}@{} conflicts with a committed one",
                        e.index, e.term
                    )),
                    None => Verdict::Step,
                }
            }
            pb::MessageType::MsgAppendResponse
                if message.term == raft.term && !message.reject && message.index > last =>
            {
                Verdict::Refuse(format!(
                    "an acknowledgement of {} where the log ends at {last}",
                    message.index
                ))
            }
            _ => Verdict::Step,
        }
    }
}
