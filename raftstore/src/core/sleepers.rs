//! Sleeping groups of a loop: who is told, who wakes, and how it is noticed that a leader is none any more.

use std::collections::{BTreeMap, BTreeSet, btree_map::Entry};

use pontoon_proto::{
    GroupId, NodeId,
    v1::{self, BeatKind},
};

use super::{Core, Slot, live};
use crate::{
    beats,
    beats::Beat,
    effects::Effects,
    replica::{Alive, Replica},
    types::Event,
};

/// Groups that wake in one tick, when a node falls silent: woken all at once, 100,000 of them would campaign at once.
const WAKES_PER_TICK: usize = 500;

/// Ticks between the beginnings of digests.
const DIGEST_TICKS: u64 = 100;
/// Groups that a digest looks at in one tick.
const DIGEST_GROUPS: usize = 1024;

/// Who is to wake.
#[derive(Default)]
pub(super) struct Wakes {
    /// Their leader's node fell silent or began anew: nobody can use them. They go first.
    leaderless: BTreeSet<GroupId>,
    /// They lead, and something is to be looked at: nothing waits for them.
    leading: BTreeSet<GroupId>,
}

impl Core {
    /// Something changed about a node: whatever sleeps relying on it wakes, a few groups a tick.
    pub(super) fn rouse_node(&mut self, node: NodeId) {
        for (group, slot) in &self.slots {
            let Slot::Live(replica) = slot else { continue };
            match replica.relies_on(node) {
                Some(true) => self.wakes.leaderless.insert(*group),
                Some(false) => self.wakes.leading.insert(*group),
                None => continue,
            };
        }
    }

    /// Every group that is led here wakes, a few a tick.
    pub(super) fn rouse_leaders(&mut self) {
        for (group, slot) in &self.slots {
            if let Slot::Live(replica) = slot
                && replica.is_leader()
                && replica.is_asleep()
            {
                self.wakes.leading.insert(*group);
            }
        }
    }

    /// Wakes some of those that are to wake. Of the tick at hand, which began at `before`, they live to see all.
    pub(super) fn wake_some(&mut self, before: u64, fx: &mut Effects) {
        let mut may_wake = WAKES_PER_TICK;
        while may_wake > 0
            && let Some(group) = self.wakes.leaderless.pop_first()
        {
            // The node may be back since.
            let neighbours = &self.shared.neighbours;
            if live(&mut self.slots, group).is_some_and(|replica| !replica.may_sleep_on(neighbours)) {
                self.with(group, fx, |replica, _, _| replica.begin_at(before));
                may_wake -= 1;
            }
        }
        while may_wake > 0
            && let Some(group) = self.wakes.leading.pop_first()
        {
            self.with(group, fx, |replica, _, _| replica.begin_at(before));
            may_wake -= 1;
        }
    }

    /// A replica fell asleep: time goes on without it.
    pub(super) fn lay_down(&mut self, group: GroupId) {
        self.awake.remove(&group);
        let Some(replica) = live(&mut self.slots, group) else { return };
        for node in replica.peers(&self.shared) {
            *self.bedfellows.entry(node).or_default() += 1;
        }
    }

    /// A replica wakes, if it sleeps.
    pub(super) fn get_up(&mut self, group: GroupId, has_ended: bool, fx: &mut Effects) -> Alive<()> {
        let Some(replica) = live(&mut self.slots, group).filter(|replica| replica.is_asleep()) else {
            return Ok(());
        };
        self.awake.insert(group);
        self.ready.insert(group);
        leave_bed(&mut self.bedfellows, replica.peers(&self.shared));
        replica.wake(&mut self.shared, has_ended, fx)
    }

    /// A replica stops for good.
    pub(super) fn part_with(&mut self, replica: &mut Replica, fx: &mut Effects) {
        self.awake.remove(&replica.group);
        if replica.is_asleep() {
            leave_bed(&mut self.bedfellows, replica.peers(&self.shared));
        }
        replica.abandon(&mut self.shared, fx);
    }

    /// Small words of many groups.
    pub(super) fn on_beats(&mut self, from: NodeId, packed: &v1::Beats, fx: &mut Effects) {
        let rows = match beats::read(packed, from, self.shared.node) {
            Ok(rows) => rows,
            Err(reason) => {
                return fx.events.push(Event::MessageRefused { from, group: GroupId::NODE, reason });
            }
        };
        for beat in rows {
            match beat.kind {
                BeatKind::Digest => self.on_digest(beat, fx),
                BeatKind::Rouse => self.on_rouse(beat, fx),
                BeatKind::Heartbeat if beat.unanswered && self.on_commit(beat, fx) => {}
                BeatKind::Sleep if self.on_sleep(beat, packed.incarnation, fx) => {}
                _ => {
                    let body = Some(v1::peer_message::Body::Raft(beat.into_raft()));
                    let (group, from_id, to) = (beat.group.0, beat.from.get(), beat.to.get());
                    self.on_peer(from, v1::PeerMessage { group, from: from_id, to, body }, fx);
                }
            }
        }
    }

    /// False: it does not follow who says so, and takes it as a heartbeat.
    fn on_commit(&mut self, beat: Beat, fx: &mut Effects) -> bool {
        let Some(replica) = live(&mut self.slots, beat.group) else { return false };
        if replica.id != beat.to || !replica.follows(beat) {
            return false;
        }
        if replica.learns_from(beat) {
            self.with(beat.group, fx, |replica, shared, fx| replica.on_commit(shared, beat, fx));
        }
        true
    }

    fn on_sleep(&mut self, beat: Beat, incarnation: u64, fx: &mut Effects) -> bool {
        let Some(replica) = live(&mut self.slots, beat.group) else { return false };
        let was_asleep = replica.is_asleep();
        if replica.id != beat.to || !replica.on_sleep(&self.shared, beat, incarnation, fx) {
            return false;
        }
        if !was_asleep {
            self.lay_down(beat.group);
        }
        true
    }

    /// A member sleeps and relies on a replica here. If wrongly so, it hears of it.
    fn on_digest(&mut self, beat: Beat, fx: &mut Effects) {
        let replica = live(&mut self.slots, beat.group);
        if !replica.is_some_and(|replica| replica.id == beat.to && replica.leads_in(beat.term)) {
            fx.beats.push(Beat::plain(beat.group, BeatKind::Rouse, beat.to, beat.from, beat.term));
        }
    }

    /// A member does not lead, or is gone.
    fn on_rouse(&mut self, beat: Beat, fx: &mut Effects) {
        let replica = live(&mut self.slots, beat.group).filter(|replica| replica.id == beat.to);
        let Some(has_ended) = replica.and_then(|replica| replica.is_roused_by(beat.from, beat.term)) else {
            return;
        };
        if let Err(reason) = self.get_up(beat.group, has_ended, fx) {
            self.kill(beat.group, reason, fx);
        }
    }

    /// Tells the nodes of leaders who sleeps relying on them, once in a while: that a leader is none any more is said at
    /// once, but may be lost.
    pub(super) fn tick_digest(&mut self, before: u64, fx: &mut Effects) {
        if before / DIGEST_TICKS != self.shared.ticks / DIGEST_TICKS {
            self.digest = Some(GroupId(0));
        }
        let Some(first) = self.digest.take() else { return };
        let mut last = None;
        for (at, (group, slot)) in self.slots.range(first..).take(DIGEST_GROUPS).enumerate() {
            if at + 1 == DIGEST_GROUPS {
                last = Some(*group);
            }
            if let Slot::Live(replica) = slot
                && let Some((leader, term)) = replica.sleeps_under()
            {
                fx.beats.push(Beat::plain(*group, BeatKind::Digest, replica.id, leader, term));
            }
        }
        self.digest = last.map(|group| GroupId(group.0.saturating_add(1)));
    }
}

/// One group less is asleep that has members on these nodes.
fn leave_bed(bedfellows: &mut BTreeMap<NodeId, usize>, nodes: Vec<NodeId>) {
    for node in nodes {
        if let Entry::Occupied(mut groups) = bedfellows.entry(node) {
            *groups.get_mut() -= 1;
            if *groups.get() == 0 {
                groups.remove();
            }
        }
    }
}
