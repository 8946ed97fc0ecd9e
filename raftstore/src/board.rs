//! What all threads of the runtime share: who is here, what was counted, and the doors of the loops.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use dashmap::DashMap;
use pontoon_proto::{
    GroupId, NodeId,
    v1::{self, PeerMessage},
};
use tokio::sync::{broadcast, oneshot, watch};

use crate::{
    beats,
    door::{Door, ToLoop},
    effects::{Answer, Input, Token},
    stats::{Counters, Roles, Standing, Stats, add},
    types::{Event, GroupStatus},
};

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing under these locks can be left half changed by a panic.
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// What is known here of a replica.
pub(crate) struct Shown {
    pub(crate) status: GroupStatus,
    /// Made for the first who watches, gone with the last: of very many replicas few are watched, and it takes more room
    /// than the status.
    watched: Option<watch::Sender<GroupStatus>>,
}

impl Shown {
    pub(crate) fn watch(&mut self) -> watch::Receiver<GroupStatus> {
        self.watched.get_or_insert_with(|| watch::Sender::new(self.status.clone())).subscribe()
    }

    fn show(&mut self, status: GroupStatus) {
        if self.status == status {
            return;
        }
        self.watched.take_if(|watched| watched.is_closed());
        if let Some(watched) = &self.watched {
            watched.send_replace(status.clone());
        }
        self.status = status;
    }
}

/// What all threads share.
pub(crate) struct Board {
    pub(crate) statuses: DashMap<GroupId, Box<Shown>>,
    /// Replicas that have stopped for good, and why: few, and asked for often.
    pub(crate) dead: Mutex<BTreeMap<GroupId, String>>,
    pub(crate) events: broadcast::Sender<Event>,
    pub(crate) counters: Counters,
    /// How each loop stood at the end of its last turn.
    pub(crate) standings: Vec<Mutex<Standing>>,
    pub(crate) loops: Vec<Door>,
}

impl Board {
    pub(crate) fn door(&self, group: GroupId) -> &Door {
        &self.loops[group.0 as usize % self.loops.len()]
    }

    /// Asks the loop of a group; the answer goes to whoever waits for it.
    pub(crate) fn ask(&self, group: GroupId, input: Input, token: Token, answer: oneshot::Sender<Answer>) {
        self.door(group).to_group(group, ToLoop::Ask(input, token, answer));
    }

    /// Whether so much waits in front of the group's loop that commands are refused.
    pub(crate) fn is_full(&self, group: GroupId) -> bool {
        let full = self.door(group).is_full();
        add(if full { &self.counters.refused_at_the_door } else { &self.counters.proposals }, 1);
        full
    }

    /// What was counted, and how the loops stand.
    pub(crate) fn stats(&self, tick: Duration) -> Stats {
        let mut stats = self.counters.copy();
        for door in &self.loops {
            let (inputs, bytes, dropped) = door.waiting();
            stats.queued_inputs += inputs;
            stats.queued_peer_bytes += bytes;
            stats.messages_dropped += dropped;
        }
        for standing in &self.standings {
            let standing = *lock(standing);
            stats.unapplied_bytes += standing.unapplied_bytes;
            stats.awake += standing.awake;
            stats.unopened += standing.unopened;
            stats.owed = stats.owed.max(tick * u32::try_from(standing.owed_ticks).unwrap_or(u32::MAX));
            stats.stalled |= standing.stalled;
            if standing.clock_skew_ms.unsigned_abs() > stats.clock_skew_ms.unsigned_abs() {
                stats.clock_skew_ms = standing.clock_skew_ms;
            }
        }
        stats
    }

    /// The replicas by what they are.
    pub(crate) fn roles(&self) -> Roles {
        let mut roles = Roles::default();
        self.statuses.iter().for_each(|shown| roles.add(&shown.status));
        roles
    }

    /// A message of a peer for a group.
    pub(crate) fn peer(&self, from: NodeId, message: PeerMessage) {
        self.door(GroupId(message.group)).peer(from, message);
    }

    /// What concerns the node goes to every loop.
    pub(crate) fn input_all(&self, input: impl Fn() -> Input) {
        self.loops.iter().for_each(|door| door.first(input()));
    }

    /// What another node says goes to the loops that it concerns.
    pub(crate) fn input_of_node(&self, from: NodeId, own: NodeId, message: PeerMessage) {
        use v1::peer_message::Body;
        let send = |at: usize, message| self.loops[at].first(Input::Peer { from, message });
        match message.body {
            Some(Body::Ping(ping)) => beats::loops_of_lane(ping.lane, ping.lanes, self.loops.len())
                .for_each(|at| send(at, message.clone())),
            Some(Body::Beats(packed)) => {
                for (at, packed) in beats::deal(packed, from, own, self.loops.len()) {
                    send(
                        at,
                        PeerMessage {
                            group: GroupId::NODE.0,
                            from: 0,
                            to: 0,
                            body: Some(Body::Beats(packed)),
                        },
                    );
                }
            }
            // Nothing else is said to a node.
            _ => {}
        }
    }

    pub(crate) fn publish(&self, status: GroupStatus) {
        let group = status.group;
        let mut dead = lock(&self.dead);
        match &status.dead {
            Some(reason) => drop(dead.insert(group, reason.clone())),
            None if !dead.is_empty() => drop(dead.remove(&group)),
            None => {}
        }
        drop(dead);
        match self.statuses.get_mut(&group) {
            Some(mut shown) => shown.show(status),
            None => drop(self.statuses.insert(group, Box::new(Shown { status, watched: None }))),
        }
    }

    pub(crate) fn engine_failed(&self, reason: &str) {
        self.input_all(|| Input::EngineFailed { reason: reason.to_owned() });
    }

    /// Logs and counts what happened, and tells whoever listens.
    pub(crate) fn tell(&self, event: Event) {
        let counters = &self.counters;
        match &event {
            Event::LeaderChanged { group, leader, term } => {
                add(&counters.leader_changes, 1);
                tracing::debug!(%group, %leader, term, "a leader is known");
            }
            Event::MessageRefused { from, group, reason } => {
                add(&counters.messages_refused, 1);
                tracing::warn!(%from, %group, %reason, "a message is refused");
            }
            Event::SnapshotInstalled { group, index, bytes, chunks, held } => {
                add(&counters.snapshots_installed, 1);
                add(&counters.snapshot_bytes, *bytes);
                tracing::info!(%group, index, bytes, chunks, held, "a snapshot is installed");
            }
            Event::ReplicaDead { group, reason } => {
                tracing::error!(%group, %reason, "a replica has stopped; replace it under a new id");
            }
            // The core said so itself, once.
            Event::LogFailed { .. } | Event::EngineFailed { .. } => {}
        }
        // Nobody has to listen.
        let _ = self.events.send(event);
    }
}
