//! Sleep: a group in which nothing happens costs nothing.
//!
//! A leader sends its group to sleep when nothing has happened for a while, everything is everywhere, and every member's node
//! was heard; a member follows if that is true of itself, and answers if not, which wakes the leader. A sleeping replica has
//! no clock. What wakes it: anything that is asked of it or said to it, the silence or a new incarnation of its leader's node
//! (of any member's, on the leader), and the word of its leader's node that it does not lead. Why each race ends well is in
//! `docs/decisions/0010-sleeping-groups.md`.

use std::collections::VecDeque;

use pontoon_proto::{NodeId, ReplicaId, v1::BeatKind};
use raft::{ProgressState, StateRole};

use super::{Alive, Replica, Shared, convert, flow::Flights, guarded, node_of};
use crate::{beats::Beat, core::Neighbours, effects::Effects, types::Room};

/// Where a replica is between awake and asleep.
#[derive(Default)]
pub(super) struct Sleep {
    /// On a leader: ticks since the last thing that happened, and what was the last index then.
    idle_ticks: u64,
    idle_index: u64,
    /// Somebody here asked something of it since it was opened or slept last.
    is_used: bool,
    bed: Option<Bed>,
}

/// What a sleeping replica relies on.
#[derive(Clone, Copy)]
struct Bed {
    leader: ReplicaId,
    /// Of the leader's node; 0 on the leader.
    incarnation: u64,
    term: u64,
    /// The lived tick at which it fell asleep.
    since: u64,
}

impl Replica {
    pub(crate) fn is_asleep(&self) -> bool {
        self.sleep.bed.is_some()
    }

    /// Something happens: an awake group stays awake for a while.
    pub(crate) fn stir(&mut self) {
        self.sleep.idle_ticks = 0;
    }

    /// Somebody here asks something of it: it will be asked again, more likely than one that nobody asks.
    pub(crate) fn use_it(&mut self) {
        self.stir();
        self.sleep.is_used = true;
    }

    /// A sleeping follower: whom it takes for the leader, and in which term.
    pub(crate) fn sleeps_under(&self) -> Option<(ReplicaId, u64)> {
        let bed = self.sleep.bed.filter(|bed| bed.leader != self.id)?;
        Some((bed.leader, bed.term))
    }

    pub(crate) fn leads_in(&self, term: u64) -> bool {
        self.is_leader() && self.raw.raft.term == term
    }

    /// Whether a node has to do with this group's sleep: it has the leader (true) or, for a leader, another member (false).
    pub(crate) fn relies_on(&self, node: NodeId) -> Option<bool> {
        let bed = self.sleep.bed?;
        if bed.leader != self.id {
            return (bed.leader.node() == node).then_some(true);
        }
        let members = convert::members(&self.conf);
        members.into_iter().any(|id| node_of(id) == Some(node)).then_some(false)
    }

    /// Whether the leader that a sleeping follower relies on is still heard as the same incarnation.
    pub(crate) fn may_sleep_on(&self, neighbours: &Neighbours) -> bool {
        let Some(bed) = self.sleep.bed else { return true };
        neighbours
            .heard(bed.leader.node(), self.group)
            .is_some_and(|(incarnation, _)| incarnation == bed.incarnation)
    }

    /// Nothing is under way here, and all that is in the log is committed, applied and durable in log and engine.
    fn is_settled(&self, shared: &Shared) -> bool {
        let log = &self.raw.raft.raft_log;
        let (last, applied) = (log.last_index(), self.mark.index);
        let reads = self.raw.raft.pending_read_count() + self.raw.raft.ready_read_count();
        [log.committed, log.persisted, applied, log.applied, self.durable] == [last; 5]
            && self.installing.is_none()
            && self.installed.is_none()
            && self.puller.is_idle()
            && self.vote_pending.is_none()
            && self.held.is_empty()
            && self.committed.is_empty()
            && self.proposals.is_empty()
            && self.change_wait.is_none()
            && self.reservation.is_none()
            && self.reads.is_idle()
            && reads == 0
            && self.conf.voters_outgoing.is_empty()
            && self.conf.learners_next.is_empty()
            && !self.raw.raft.has_pending_conf()
            && self.truncation(shared).is_none()
            && !self.raw.has_ready()
    }

    /// On the leader: nobody lacks anything, and everybody's node is heard.
    fn all_are_there(&self, shared: &Shared) -> bool {
        let raft = &self.raw.raft;
        let last = self.last_index();
        raft.prs().iter().all(|(id, progress)| {
            let Ok(member) = ReplicaId::new(*id) else { return false };
            member == self.id
                || (progress.state != ProgressState::Snapshot
                    && progress.matched == last
                    && progress.committed_index == last
                    && progress.recent_active
                    && !progress.ins.full()
                    && shared.neighbours.heard(member.node(), self.group).is_some())
        })
    }

    /// On a leader, before its clock moves: sends the group to sleep if it may. True: it sleeps.
    pub(super) fn nod_off(&mut self, shared: &Shared, ticks: u64, fx: &mut Effects) -> bool {
        let (after, last) = (shared.config.sleep_after_ticks, self.last_index());
        let raft = &self.raw.raft;
        let idle = after > 0
            && self.is_leader()
            && self.conf.voters.contains(&self.id.get())
            && raft.commit_to_current_term()
            && raft.lead_transferee.is_none()
            && self.silent.is_empty()
            && shared.room == Room::Ample
            // It stays awake until another voter has said that it is there and takes over.
            && !(shared.shuns && self.conf.voters.len() > 1)
            && self.is_settled(shared);
        if !idle || self.sleep.idle_index != last {
            (self.sleep.idle_ticks, self.sleep.idle_index) = (0, last);
            return false;
        }
        // As raft counts ticks that piled up.
        self.sleep.idle_ticks += ticks.min(3);
        // In the place of a heartbeat: by then the answers to the one before are here, and wake nobody.
        let is_due = raft.heartbeat_elapsed() + 1 >= raft.heartbeat_timeout();
        // One that only elected its leader goes to sleep as soon as everybody knows: 100,000 that are founded or opened
        // would all be awake for seconds otherwise.
        let patience = if self.sleep.is_used { after } else { 0 };
        if self.sleep.idle_ticks < patience || !is_due || !self.all_are_there(shared) {
            return false;
        }
        let term = raft.term;
        self.announce_floor(shared);
        for to in convert::members(&self.conf).into_iter().filter_map(|id| ReplicaId::new(id).ok()) {
            if to != self.id {
                let plain = Beat::plain(self.group, BeatKind::Sleep, self.id, to, term);
                fx.beats.push(Beat { commit: last, floor: self.floor, ..plain });
            }
        }
        // Nobody is taking a snapshot; the notes of those who did are of no use.
        self.offered.clear();
        self.lie_down(shared, self.id, 0, fx);
        true
    }

    /// The leader sends this member to sleep. False: something is not as it says, and it is to be taken as a heartbeat.
    pub(crate) fn on_sleep(
        &mut self,
        shared: &Shared,
        beat: Beat,
        incarnation: u64,
        fx: &mut Effects,
    ) -> bool {
        let raft = &self.raw.raft;
        let follows = raft.state == StateRole::Follower
            && (raft.leader_id, raft.term) == (beat.from.get(), beat.term)
            && self.last_index() == beat.commit;
        let known = shared.neighbours.heard(beat.from.node(), self.group);
        if !follows || known.is_none_or(|(heard, _)| heard != incarnation) {
            return false;
        }
        self.floor = self.floor.max(beat.floor);
        if !self.is_settled(shared) {
            return false;
        }
        // It is the leader's word, as a heartbeat is.
        self.raw.raft.election_elapsed = 0;
        self.lie_down(shared, beat.from, incarnation, fx);
        true
    }

    fn lie_down(&mut self, shared: &Shared, leader: ReplicaId, incarnation: u64, fx: &mut Effects) {
        self.note_room(shared);
        let (term, since) = (self.raw.raft.term, shared.neighbours.lived());
        self.sleep.bed = Some(Bed { leader, incarnation, term, since });
        (self.sleep.idle_ticks, self.sleep.is_used) = (0, false);
        self.give_back();
        self.dirty = false;
        fx.statuses.push(self.status());
    }

    /// Gives back the room that only a replica at work needs. Containers keep theirs when they become empty.
    fn give_back(&mut self) {
        if self.flights.is_idle() {
            self.flights = Flights::default();
        }
        (self.held, self.committed) = (VecDeque::new(), VecDeque::new());
        self.proposals = VecDeque::new();
        self.reads.give_back();
        let raft = &mut self.raw.raft;
        raft.maybe_free_inflight_buffers();
        raft.raft_log.unstable.entries.shrink_to_fit();
        raft.msgs.shrink_to_fit();
    }

    /// Wakes up. `has_ended`: the leader said itself that it does not lead any more.
    pub(crate) fn wake(&mut self, shared: &mut Shared, has_ended: bool, fx: &mut Effects) -> Alive<()> {
        self.stir();
        let Some(bed) = self.sleep.bed.take() else { return Ok(()) };
        self.dirty = true;
        self.ticked = shared.ticks;
        let raw = &mut self.raw;
        if bed.leader == self.id {
            // Whom it heard before it slept says nothing about now, and everybody gets a whole timeout to answer.
            raw.raft.election_elapsed = 0;
            let own = self.id.get();
            let others = raw.raft.mut_prs().iter_mut().filter(|(id, _)| **id != own);
            others.for_each(|(_, progress)| progress.recent_active = false);
            // Everybody wakes with it.
            guarded(|| raw.ping())?;
        } else {
            // Its clock stood still. What it promises to the leader, not to vote within a timeout of the leader's last word,
            // is over when nobody can have spoken for that leader for so long; else raft would ignore every candidate.
            let silence = match has_ended {
                true => u64::MAX,
                false => shared.neighbours.silence(bed.leader, bed.incarnation, self.group, bed.since),
            };
            let timeout = raw.raft.election_timeout();
            raw.raft.election_elapsed = usize::try_from(silence).unwrap_or(timeout).min(timeout);
        }
        self.after_raft(shared, fx);
        Ok(())
    }

    /// Its clock goes on from this tick.
    pub(crate) fn begin_at(&mut self, tick: u64) -> Alive<()> {
        self.ticked = tick;
        Ok(())
    }

    /// Another member does not lead in this term, or is gone. Wakes up if that matters. True: it does.
    pub(crate) fn is_roused_by(&self, from: ReplicaId, term: u64) -> Option<bool> {
        let bed = self.sleep.bed?;
        if bed.leader == from && bed.term == term {
            return Some(true);
        }
        let is_member = convert::members(&self.conf).contains(&from.get());
        (bed.leader == self.id && is_member).then_some(false)
    }

    /// Tells the other members that this replica does not lead in a term, or is gone.
    pub(super) fn rouse_others(&self, term: u64, fx: &mut Effects) {
        for to in convert::members(&self.conf).into_iter().filter_map(|id| ReplicaId::new(id).ok()) {
            if to.node() != self.id.node() {
                fx.beats.push(Beat::plain(self.group, BeatKind::Rouse, self.id, to, term));
            }
        }
    }
}
