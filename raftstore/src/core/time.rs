//! What goes on with time: raft's clocks, housekeeping, words to other nodes.

use std::collections::BTreeSet;

use pontoon_proto::{GroupId, NodeId, v1};
use pontoon_wal::Batch;

use super::{Core, Slot, Submission, live};
use crate::{
    effects::Effects, replica::guarded, snapshot::ServeTask, stats::Standing, transport::Class, types::Room,
};

/// Ticks between looks at what the log may drop.
const HOUSEKEEPING_TICKS: u64 = 10;

/// Of ticks that piled up so many count for the silence of others, as they do for raft.
const MOST_TICKS: u64 = 3;

/// Groups that the clock visits in one turn. With very many awake, a visit to all of them takes longer than a tick; what
/// comes in between must not wait for it, or the groups would never get what they wait for.
const VISITS_PER_TURN: usize = 1024;

/// The clock's way through the groups that are awake. A group that it comes to late gets the ticks that it missed.
#[derive(Default)]
pub(super) struct Pass {
    /// The first group that it has not come to; `None`: it has been everywhere.
    next: Option<GroupId>,
    /// Time went on meanwhile: it begins again after this.
    again: bool,
}

impl Core {
    pub(super) fn tick(&mut self, ticks: u64, fx: &mut Effects) {
        if self.failed.is_some() {
            return;
        }
        let before = self.shared.ticks;
        self.shared.ticks += ticks;
        self.shared.turns.tick(ticks);
        let timeout = self.shared.config.election_ticks as u64;
        for node in self.shared.neighbours.tick(ticks.min(MOST_TICKS), timeout) {
            self.rouse_node(node);
        }
        self.open_some(fx);
        self.wake_some(before, fx);
        self.pass.again = true;
        self.go_on(fx);
        self.tick_reseeds(ticks, fx);
        self.tick_digest(before, fx);
        let every = self.shared.config.heartbeat_ticks as u64;
        if before / every != self.shared.ticks / every {
            self.ping(fx);
        }
        self.stall_is_due = true;
        // Groups that slept have heirs as soon as their members have answered.
        if self.shared.room != Room::Ample || self.shared.shuns {
            self.make_way(fx);
        }
        if before / HOUSEKEEPING_TICKS == self.shared.ticks / HOUSEKEEPING_TICKS {
            return;
        }
        fx.serve.push(ServeTask::Tick { ticks: HOUSEKEEPING_TICKS });
    }

    /// Whether the clock has not come to every group yet: [`Core::go_on`] is to be called after the inputs that are there,
    /// without waiting for more.
    pub(crate) fn has_more(&self) -> bool {
        self.failed.is_none() && (self.pass.next.is_some() || self.pass.again)
    }

    /// Lets the clock visit some of the groups that are awake, those that it has not come to.
    pub(crate) fn go_on(&mut self, fx: &mut Effects) {
        if !self.has_more() {
            return;
        }
        let first = self.pass.next.take().unwrap_or_else(|| {
            self.pass.again = false;
            GroupId(0)
        });
        let mut groups: Vec<GroupId> = self.awake.range(first..).take(VISITS_PER_TURN + 1).copied().collect();
        if groups.len() > VISITS_PER_TURN {
            self.pass.next = groups.pop();
        }
        let mut batch = Batch::new();
        for group in groups {
            self.visit(group, &mut batch, fx);
        }
        if !batch.is_empty() {
            // Losing a truncation only keeps entries longer.
            batch.relaxed();
            self.send_batch(batch, None, Submission::Turn(Vec::new()), fx);
        }
    }

    /// Time goes on for one group.
    fn visit(&mut self, group: GroupId, truncations: &mut Batch, fx: &mut Effects) {
        let Some(replica) = live(&mut self.slots, group) else { return };
        let before = replica.ticked;
        let shared = &mut self.shared;
        let ticks = shared.ticks - before;
        if ticks == 0 {
            return;
        }
        if let Err(reason) = guarded(|| replica.tick(shared, ticks, fx)).flatten() {
            return self.kill(group, reason, fx);
        }
        if replica.has_work() {
            self.ready.insert(group);
        }
        if replica.is_asleep() {
            return self.lay_down(group);
        }
        if before / HOUSEKEEPING_TICKS != shared.ticks / HOUSEKEEPING_TICKS
            && truncations.size_bytes() < self.batch_limit / 2
            && let Some((index, term)) = replica.truncation(shared)
        {
            truncations.truncate_prefix(group, index, term);
        }
    }

    /// A word to every node that shares groups with this loop: that it lives, and how much room there is here. It opens a
    /// connection, too.
    fn ping(&mut self, fx: &mut Effects) {
        let mut nodes: BTreeSet<NodeId> = self.bedfellows.keys().copied().collect();
        for group in &self.awake {
            if let Some(Slot::Live(replica)) = self.slots.get(group) {
                nodes.extend(replica.peers(&self.shared));
            }
        }
        let room = match self.shared.room {
            Room::Ample => v1::NodeRoom::Ample,
            Room::Low => v1::NodeRoom::Low,
            Room::Critical => v1::NodeRoom::Critical,
        };
        let ping = v1::NodePing {
            sent: self.shared.ticks,
            room: room.into(),
            incarnation: self.shared.wal.incarnation(),
            lane: self.lane.0,
            lanes: self.lane.1,
            strained: self.shared.turns.is_strained(),
            wall_ms: self.shared.wall_ms,
        };
        for node in nodes {
            let body = Some(v1::peer_message::Body::Ping(ping));
            let message = v1::PeerMessage { group: GroupId::NODE.0, from: 0, to: 0, body };
            fx.send.push((node, Class::Control, message));
        }
    }

    pub(super) fn on_ping(&mut self, from: NodeId, ping: &v1::NodePing) {
        let had_room = !self.shared.low_peers.contains_key(&from);
        let has_room = ping.room() == v1::NodeRoom::Ample;
        self.shared.hear_room(from, !has_room);
        self.shared.turns.hear_strain(from, ping.strained);
        self.shared.neighbours.compare_clocks(from, ping.wall_ms, self.shared.wall_ms);
        // Leaders that sleep tell no longer what is true if a member's node changes.
        if self.shared.neighbours.hear(from, ping) || had_room != has_room {
            self.rouse_node(from);
        }
    }

    pub(super) fn on_room(&mut self, room: Room, fx: &mut Effects) {
        if self.shared.room == room || self.failed.is_some() {
            return;
        }
        self.shared.room = room;
        self.rouse_leaders();
        self.ping(fx);
        if room != Room::Ample {
            self.make_way(fx);
        }
    }

    pub(super) fn on_shun(&mut self, shuns: bool, fx: &mut Effects) {
        if self.shared.shuns == shuns || self.failed.is_some() {
            return;
        }
        self.shared.shuns = shuns;
        if shuns {
            self.rouse_leaders();
            self.make_way(fx);
        }
    }

    /// Whether the log has owed a sync for half an election timeout. Who leads here still commits by the others' disks, but
    /// neither votes nor takes part; and if the disk does not come back, every group would wait for it a whole timeout.
    pub(super) fn is_stalled(&self) -> bool {
        self.owed_ticks() >= (self.shared.config.election_ticks as u64 / 2).max(1)
    }

    /// Ticks since which the log owes a sync; 0 if it owes none.
    fn owed_ticks(&self) -> u64 {
        // What need not be synced rides with the next sync, however long that takes.
        let owed = self.submissions.iter().find(|waiting| match &waiting.what {
            Submission::Turn(groups) => !groups.is_empty(),
            Submission::Created(_) | Submission::Tombstone(_) => true,
        });
        owed.map_or(0, |oldest| self.shared.ticks - oldest.since)
    }

    /// How this loop stands.
    pub(crate) fn standing(&self) -> Standing {
        Standing {
            unapplied_bytes: self.shared.unapplied_bytes,
            awake: self.awake.len() as u64,
            unopened: self.unopened.len() as u64,
            owed_ticks: self.owed_ticks(),
            stalled: self.is_stalled(),
            clock_skew_ms: self.shared.neighbours.skew_ms(),
        }
    }

    /// Leadership leaves a node without room, or one whose disk does not answer.
    pub(super) fn make_way(&mut self, fx: &mut Effects) {
        let groups: Vec<GroupId> = self.awake.iter().copied().collect();
        for group in groups {
            self.with(group, fx, |replica, shared, fx| replica.make_way(shared, fx));
        }
    }
}
