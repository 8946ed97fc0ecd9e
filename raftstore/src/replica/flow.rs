//! What is on its way to followers, in bytes.
//!
//! Raft 0.7 bounds appends in flight by their number only, and sends a follower that lags as many as that at once. So the
//! number that raft may use is set anew whenever something leaves or is acknowledged: to those that have left, and as many
//! more as the bytes that are left allow if each were as large as one may be. What is left is the smaller of what the
//! follower and what its node may have under way.
//!
//! Invariant: what a follower has under way exceeds its bound by one message at most, and so does what a node has.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use pontoon_proto::NodeId;
use raft::{ProgressState, eraftpb as pb};

use super::{Alive, Replica, Shared, guarded, node_of};
use crate::effects::Effects;

/// The number that raft is given moves in steps of this, so that its ring is seldom made anew.
const STEP: u64 = 16;

/// An append that has left.
struct Sent {
    last_index: u64,
    bytes: u64,
    /// How many of raft's messages went into it.
    messages: u64,
}

/// What one follower has under way.
#[derive(Default)]
struct Flight {
    /// Oldest first.
    appends: VecDeque<Sent>,
    bytes: u64,
    messages: u64,
}

/// What the followers of a leader have under way.
#[derive(Default)]
pub(super) struct Flights(BTreeMap<u64, Flight>);

impl Flights {
    /// Nothing is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.0.is_empty()
    }

    /// Each follower with the appends and the bytes that are under way to it.
    pub(super) fn each(&self) -> impl Iterator<Item = (u64, usize, u64)> {
        self.0.iter().map(|(id, flight)| (*id, flight.appends.len(), flight.bytes))
    }
}

/// What nodes have under way, over all groups of a core.
#[derive(Default)]
pub(crate) struct NodeFlights {
    bytes: BTreeMap<NodeId, u64>,
    /// Followers that may send nothing because their nodes have too much under way.
    starved: BTreeMap<NodeId, BTreeSet<ReplicaOf>>,
}

/// A member of a group.
pub(crate) type ReplicaOf = (pontoon_proto::GroupId, u64);

impl NodeFlights {
    fn add(&mut self, node: NodeId, bytes: u64) {
        *self.bytes.entry(node).or_default() += bytes;
    }

    fn sub(&mut self, node: NodeId, bytes: u64) {
        let Some(held) = self.bytes.get_mut(&node) else { return };
        *held -= bytes;
        if *held == 0 {
            self.bytes.remove(&node);
        }
    }

    fn of(&self, node: NodeId) -> u64 {
        self.bytes.get(&node).copied().unwrap_or_default()
    }

    /// Followers that may go on: their nodes are down to half of what they may have.
    pub(crate) fn take_fed(&mut self, limit: u64) -> Vec<ReplicaOf> {
        let fed: Vec<NodeId> =
            self.starved.keys().copied().filter(|node| self.of(*node) <= limit / 2).collect();
        fed.into_iter().flat_map(|node| self.starved.remove(&node).unwrap_or_default()).collect()
    }
}

/// What the entries of a message weigh.
pub(super) fn weight(message: &pb::Message) -> u64 {
    message.get_entries().iter().map(|entry| entry.data.len() as u64 + 64).sum()
}

impl Replica {
    /// An append leaves for a follower, made of so many of raft's messages.
    pub(super) fn note_sent(&mut self, shared: &mut Shared, message: &pb::Message, messages: u64) {
        let (Some(last), Some(node)) = (message.get_entries().last(), node_of(message.to)) else { return };
        let bytes = weight(message);
        let flight = self.flights.0.entry(message.to).or_default();
        flight.appends.push_back(Sent { last_index: last.index, bytes, messages });
        flight.bytes += bytes;
        flight.messages += messages;
        shared.flights.add(node, bytes);
        self.level(shared, message.to);
    }

    /// A follower is about to tell raft that it has everything up to `index`: raft answers with what may follow, so the
    /// number is set before.
    pub(super) fn note_acknowledged(&mut self, shared: &mut Shared, from: u64, index: u64) {
        let (Some(flight), Some(node)) = (self.flights.0.get_mut(&from), node_of(from)) else { return };
        while let Some(sent) = flight.appends.pop_front_if(|sent| sent.last_index <= index) {
            flight.bytes -= sent.bytes;
            flight.messages -= sent.messages;
            shared.flights.sub(node, sent.bytes);
        }
        if flight.appends.is_empty() {
            self.flights.0.remove(&from);
        }
        self.level(shared, from);
    }

    /// Raft no longer counts on what is under way to this member.
    fn forget_flight(&mut self, shared: &mut Shared, member: u64) {
        if let (Some(flight), Some(node)) = (self.flights.0.remove(&member), node_of(member)) {
            shared.flights.sub(node, flight.bytes);
        }
    }

    /// Nothing is under way any more: the replica leads no longer, or stops.
    pub(super) fn forget_flights(&mut self, shared: &mut Shared) {
        let members: Vec<u64> = self.flights.0.keys().copied().collect();
        members.into_iter().for_each(|member| self.forget_flight(shared, member));
    }

    /// Sets how many appends raft may have under way to a member.
    pub(super) fn level(&mut self, shared: &mut Shared, member: u64) {
        let Some(node) = node_of(member) else { return };
        let replicates = |progress: &raft::Progress| progress.state == ProgressState::Replicate;
        if !self.raw.raft.prs().get(member).is_some_and(replicates) {
            // What it had under way is sent anew, one append at a time, until it answers; then raft sends as many at once
            // as it may, in the same step.
            self.forget_flight(shared, member);
        }
        let (own, sent) =
            self.flights.0.get(&member).map_or((0, 0), |flight| (flight.bytes, flight.messages));
        let Some(progress) = self.raw.raft.mut_prs().get_mut(member) else { return };
        let config = &shared.config;
        let left = config.max_inflight_bytes.saturating_sub(own);
        let left_of_node = config.max_node_inflight_bytes.saturating_sub(shared.flights.of(node));
        let may = sent + left.min(left_of_node) / config.max_append_bytes;
        let step = if may >= STEP { may - may % STEP } else { may };
        progress.ins.set_cap((step as usize).min(config.max_inflight_appends));
        if may == 0 {
            // No acknowledgement of its own will raise it again.
            shared.flights.starved.entry(node).or_default().insert((self.group, member));
        }
    }

    /// The node of a starved member has room again.
    pub(crate) fn feed(&mut self, shared: &mut Shared, member: u64, fx: &mut Effects) -> Alive<()> {
        if !self.is_leader() || self.installing.is_some() {
            return Ok(());
        }
        self.level(shared, member);
        let last = self.last_index();
        let raw = &mut self.raw;
        guarded(|| {
            if raw.raft.prs().get(member).is_some_and(|progress| progress.matched < last) {
                raw.raft.send_append(member);
            }
        })?;
        self.after_raft(shared, fx);
        Ok(())
    }
}

/// Appends to one follower that continue each other become one, up to `max_bytes`: raft makes one for each proposal.
/// Returns each with the number of raft's messages in it that carry entries.
pub(super) fn merge(messages: Vec<pb::Message>, max_bytes: u64) -> Vec<(pb::Message, u64)> {
    let mut merged: Vec<(pb::Message, u64)> = Vec::with_capacity(messages.len());
    // Where the latest append to each follower is, and what it weighs.
    let mut latest: BTreeMap<u64, (usize, u64)> = BTreeMap::new();
    for mut message in messages {
        if message.get_msg_type() != pb::MessageType::MsgAppend {
            merged.push((message, 0));
            continue;
        }
        let (bytes, counts) = (weight(&message), u64::from(!message.get_entries().is_empty()));
        if let Some((at, held)) = latest.get_mut(&message.to)
            && *held + bytes <= max_bytes
            && continues(&merged[*at].0, &message)
        {
            *held += bytes;
            let (before, messages) = &mut merged[*at];
            *messages += counts;
            before.commit = before.commit.max(message.commit);
            before.mut_entries().extend(message.take_entries());
            continue;
        }
        latest.insert(message.to, (merged.len(), bytes));
        merged.push((message, counts));
    }
    merged
}

/// Whether an append says what another one, right behind it, says.
fn continues(before: &pb::Message, message: &pb::Message) -> bool {
    let end = match before.get_entries().last() {
        Some(last) => (last.index, last.term),
        None => (before.index, before.log_term),
    };
    before.term == message.term && end == (message.index, message.log_term)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn append(to: u64, after: (u64, u64), entries: &[(u64, u64)], commit: u64) -> pb::Message {
        let mut message = pb::Message { to, term: 3, commit, ..Default::default() };
        message.set_msg_type(pb::MessageType::MsgAppend);
        (message.index, message.log_term) = after;
        let entry = |(index, term): &(u64, u64)| pb::Entry {
            index: *index,
            term: *term,
            data: vec![0; 36].into(),
            ..Default::default()
        };
        message.set_entries(entries.iter().map(entry).collect());
        message
    }

    #[test]
    fn appends_that_continue_each_other_become_one() {
        let beat = pb::Message { to: 2, msg_type: pb::MessageType::MsgHeartbeat, ..Default::default() };
        let messages = vec![
            append(2, (5, 3), &[(6, 3)], 4),
            append(3, (5, 3), &[(6, 3)], 4),
            beat.clone(),
            append(2, (6, 3), &[(7, 3), (8, 3)], 5),
            append(2, (8, 3), &[], 8),
            append(3, (7, 3), &[(8, 3)], 8),
        ];
        let merged = merge(messages, 1000);
        let whole = append(2, (5, 3), &[(6, 3), (7, 3), (8, 3)], 8);
        // What leaves a gap is left alone.
        let apart = [append(3, (5, 3), &[(6, 3)], 4), beat, append(3, (7, 3), &[(8, 3)], 8)];
        let (numbers, merged): (Vec<u64>, Vec<_>) = merged.into_iter().map(|(m, n)| (n, m)).unzip();
        assert_eq!(numbers, [2, 1, 0, 1]);
        assert_eq!(merged[0], whole);
        assert_eq!(merged[1..], apart);
    }

    #[test]
    fn what_is_merged_stays_within_its_bound() {
        let messages: Vec<_> = (5..25).map(|i| append(2, (i, 3), &[(i + 1, 3)], 4)).collect();
        let merged: Vec<_> = merge(messages, 500).into_iter().map(|(message, _)| message).collect();
        assert_eq!(merged.iter().map(weight).collect::<Vec<_>>(), [500; 4]);
        let indexes: Vec<_> = merged.iter().flat_map(|m| m.get_entries()).map(|e| e.index).collect();
        assert_eq!(indexes, (6..26).collect::<Vec<_>>());
    }
}
