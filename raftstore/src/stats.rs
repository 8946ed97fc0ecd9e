//! What the runtime has done and how it stands, for whoever exports it. Counted by the driver's threads as it happens: an addition to
//! a counter that orders nothing. How a loop stands is written down once a turn.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use pontoon_wal::{Histogram, Times};

use crate::types::Role;

/// A copy of [`crate::MultiRaft::stats`] at one moment. What is said to be counted only rises while the runtime is open.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Stats {
    /// Counted: turns of the loops, each of which ends with at most a few submissions to the log.
    pub turns: u64,
    /// Counted: what the loops took in: commands, messages, ticks, answers of the log and of appliers.
    pub inputs: u64,
    /// Counted: commands that were proposed here.
    pub proposals: u64,
    /// Counted: commands that were refused before they reached a loop, since too much waited in front of it.
    pub refused_at_the_door: u64,
    /// Counted: messages of peers that were dropped, since too much waited; peers repeat them.
    pub messages_dropped: u64,
    /// Counted: messages of peers that were refused.
    pub messages_refused: u64,
    /// Counted: times that a replica here learned of a new leader.
    pub leader_changes: u64,
    /// Counted: snapshots that were installed.
    pub snapshots_installed: u64,
    /// Counted: bytes that were received for them.
    pub snapshot_bytes: u64,
    /// Counted: entries that were applied.
    pub applied_entries: u64,
    /// How long it took to apply what was ready of a group at a time.
    pub apply_times: Histogram,
    /// How long it took to make applied state durable.
    pub flush_times: Histogram,
    /// Inputs that wait in front of the loops.
    pub queued_inputs: u64,
    /// Bytes of entries and chunks of peers that wait there.
    pub queued_peer_bytes: u64,
    /// Pieces of work that wait to be applied.
    pub queued_applies: u64,
    /// Bytes that are committed and not applied.
    pub unapplied_bytes: u64,
    /// Replicas for which time goes on.
    pub awake: u64,
    /// Replicas that were not opened yet.
    pub unopened: u64,
    /// For how long the log has owed a sync, of the loop that waits longest; zero if it owes none.
    pub owed: Duration,
    /// The log has owed a sync for so long that leaderships are passed on.
    pub stalled: bool,
    /// How far the clocks of other nodes are from the one here, of the one that is farthest, in milliseconds: above zero if it is ahead.
    /// The way of a message counts, too.
    pub clock_skew_ms: i64,
}

/// Replicas of a node by what they are, and what is to be said of all of them together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Roles {
    /// They lead.
    pub leaders: u64,
    /// They follow.
    pub followers: u64,
    /// They follow without a vote.
    pub learners: u64,
    /// They ask for votes.
    pub candidates: u64,
    /// They have stopped for good.
    pub dead: u64,
    /// Of all: nothing happens in their groups.
    pub sleeping: u64,
    /// Of all: they know of no leader.
    pub without_leader: u64,
    /// Of all: they receive a state.
    pub receiving: u64,
    /// Of all: entries that are committed and not applied.
    pub lag_entries: u64,
    /// The largest such number of one.
    pub lag_entries_most: u64,
}

impl Roles {
    pub(crate) fn add(&mut self, status: &crate::types::GroupStatus) {
        *match status.role {
            Role::Leader => &mut self.leaders,
            Role::Follower => &mut self.followers,
            Role::Learner => &mut self.learners,
            Role::Candidate => &mut self.candidates,
            Role::Dead => &mut self.dead,
        } += 1;
        if status.role == Role::Dead {
            return;
        }
        let lag = status.commit.saturating_sub(status.applied);
        self.sleeping += u64::from(status.sleeping);
        self.without_leader += u64::from(status.leader.is_none());
        self.receiving += u64::from(status.pull.is_some());
        self.lag_entries += lag;
        self.lag_entries_most = self.lag_entries_most.max(lag);
    }
}

/// What all threads of the runtime count.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) turns: AtomicU64,
    pub(crate) inputs: AtomicU64,
    pub(crate) proposals: AtomicU64,
    pub(crate) refused_at_the_door: AtomicU64,
    pub(crate) messages_refused: AtomicU64,
    pub(crate) leader_changes: AtomicU64,
    pub(crate) snapshots_installed: AtomicU64,
    pub(crate) snapshot_bytes: AtomicU64,
    pub(crate) applied_entries: AtomicU64,
    pub(crate) apply_times: Times,
    pub(crate) flush_times: Times,
}

impl Counters {
    /// What was counted; how things stand is added by the caller.
    pub(crate) fn copy(&self) -> Stats {
        Stats {
            turns: get(&self.turns),
            inputs: get(&self.inputs),
            proposals: get(&self.proposals),
            refused_at_the_door: get(&self.refused_at_the_door),
            messages_refused: get(&self.messages_refused),
            leader_changes: get(&self.leader_changes),
            snapshots_installed: get(&self.snapshots_installed),
            snapshot_bytes: get(&self.snapshot_bytes),
            applied_entries: get(&self.applied_entries),
            apply_times: self.apply_times.copy(),
            flush_times: self.flush_times.copy(),
            ..Stats::default()
        }
    }
}

pub(crate) fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

pub(crate) fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

/// How a loop stands, as its core sees it.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Standing {
    pub(crate) unapplied_bytes: u64,
    pub(crate) awake: u64,
    pub(crate) unopened: u64,
    /// Ticks since which the log owes a sync.
    pub(crate) owed_ticks: u64,
    pub(crate) stalled: bool,
    pub(crate) clock_skew_ms: i64,
}
