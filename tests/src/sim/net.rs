//! A network that delays, reorders, duplicates, loses and partitions.

use std::collections::{BTreeMap, BTreeSet};

use pontoon_proto::{
    GroupId, NodeId,
    v1::{PeerMessage, peer_message::Body},
};

use super::work::{Call, ClientCall, Reply};
use crate::Rng;

/// How long a call may be held up on its way, in milliseconds: in a queue, or in a process that stands still.
const CALL_HELD_UP_MS: u64 = 3_000;

/// What travels.
#[derive(Clone)]
pub(super) enum Packet {
    /// The number is the sender's boot token.
    Peer(Box<PeerMessage>, u64),
    /// A driver asks a node; the number names the question.
    Call(u64, Call),
    Reply(u64, Reply),
    Client(ClientCall),
}

/// Who sends: a node, or a client beside the cluster, which no partition holds up.
pub(super) type Sender = Option<NodeId>;

/// What the network did to a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Sent,
    Lost,
    Twice,
    Clogged,
    Cut,
}

/// Chances, in permille.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Odds {
    pub(super) loss: u64,
    pub(super) duplicate: u64,
    pub(super) held_up: u64,
}

/// Packets under way, by the moment they arrive.
#[derive(Default)]
pub(super) struct Net {
    under_way: BTreeMap<(u64, u64), (Sender, NodeId, Packet)>,
    sent: u64,
    /// Directed links that are down.
    cut: BTreeSet<(NodeId, NodeId)>,
    /// Directed links that delay by this much.
    clogged: BTreeMap<(NodeId, NodeId), u64>,
    /// Peers' messages for this replica are kept.
    kept_for: Option<(NodeId, GroupId)>,
    kept: Vec<(Sender, NodeId, Packet)>,
    /// Chunks to this node that are still to be garbled.
    garbles: Option<(NodeId, u64)>,
    /// Chunks that were.
    pub(super) garbled: u64,
}

impl Net {
    pub(super) fn send(
        &mut self,
        now: u64,
        from: Sender,
        to: NodeId,
        packet: Packet,
        odds: Odds,
        rng: &mut Rng,
    ) -> Fate {
        if from == Some(to) {
            self.put(now + 1, from, to, packet);
            return Fate::Sent;
        }
        let mut delay = 1 + rng.below(3) + if rng.chance(20) { rng.below(60) } else { 0 };
        let mut fate = Fate::Sent;
        if let Some(from) = from {
            if self.cut.contains(&(from, to)) {
                return Fate::Cut;
            }
            if rng.chance(odds.loss) {
                return Fate::Lost;
            }
            if let Some(more) = self.clogged.get(&(from, to)) {
                delay += rng.below(*more);
                fate = Fate::Clogged;
            }
            match packet {
                Packet::Peer(..) if rng.chance(odds.duplicate) => {
                    self.put(now + delay + 1 + rng.below(300), Some(from), to, packet.clone());
                    fate = Fate::Twice;
                }
                // A call is not repeated by what carries it, but whoever asked gives up long before it need arrive.
                Packet::Call(..) | Packet::Reply(..) if rng.chance(odds.held_up) => {
                    delay += rng.below(CALL_HELD_UP_MS);
                    fate = Fate::Clogged;
                }
                _ => {}
            }
        }
        self.put(now + delay, from, to, packet);
        fate
    }

    fn put(&mut self, at: u64, from: Sender, to: NodeId, mut packet: Packet) {
        if let (Some((node, left)), Packet::Peer(message, _)) = (&mut self.garbles, &mut packet)
            && *node == to
            && *left > 0
            && let Some(Body::Chunk(chunk)) = &mut message.body
            && !chunk.data.is_empty()
        {
            let mut data = chunk.data.to_vec();
            let at = self.sent as usize % data.len();
            data[at] ^= 1 << (self.sent % 8);
            chunk.data = data.into();
            *left -= 1;
            self.garbled += 1;
        }
        if let (Some((node, group)), Packet::Peer(message, _)) = (self.kept_for, &packet)
            && to == node
            && message.group == group.0
        {
            self.kept.push((from, to, packet.clone()));
        }
        self.sent += 1;
        self.under_way.insert((at, self.sent), (from, to, packet));
    }

    pub(super) fn arrived(&mut self, now: u64) -> Vec<(Sender, NodeId, Packet)> {
        if self.under_way.first_key_value().is_none_or(|((at, _), _)| *at > now) {
            return Vec::new();
        }
        let later = self.under_way.split_off(&(now + 1, 0));
        std::mem::replace(&mut self.under_way, later).into_values().collect()
    }

    pub(super) fn is_cut(&self, from: NodeId, to: NodeId) -> bool {
        self.cut.contains(&(from, to))
    }

    pub(super) fn cut(&mut self, from: NodeId, to: NodeId) {
        self.cut.insert((from, to));
    }

    pub(super) fn clog(&mut self, from: NodeId, to: NodeId, delay: u64) {
        self.clogged.insert((from, to), delay);
    }

    /// Flips a bit of the next chunks that are sent to a node.
    pub(super) fn garble(&mut self, node: NodeId, chunks: u64) {
        self.garbles = Some((node, chunks));
    }

    /// Keeps a copy of what peers send to a replica from now on.
    pub(super) fn capture(&mut self, node: NodeId, group: GroupId) {
        self.kept_for = Some((node, group));
    }

    /// Ends [`Net::capture`].
    pub(super) fn captured(&mut self) -> Vec<(Sender, NodeId, Packet)> {
        self.kept_for = None;
        std::mem::take(&mut self.kept)
    }

    pub(super) fn deliver_again(&mut self, now: u64, from: Sender, to: NodeId, packet: Packet) {
        self.put(now + 1, from, to, packet);
    }

    pub(super) fn heal(&mut self) {
        self.cut.clear();
        self.clogged.clear();
    }
}
