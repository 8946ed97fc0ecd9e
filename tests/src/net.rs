//! A network that delays, reorders, loses and partitions.

use std::collections::{BTreeMap, BTreeSet};

use pontoon_proto::{NodeId, v1::PeerMessage};

use crate::Rng;

/// Messages under way, by the moment they arrive.
#[derive(Default)]
pub(crate) struct Net {
    under_way: BTreeMap<(u64, u64), (NodeId, NodeId, PeerMessage)>,
    sent: u64,
    /// Directed links that are down.
    cut: BTreeSet<(NodeId, NodeId)>,
}

impl Net {
    pub(crate) fn send(
        &mut self,
        now: u64,
        from: NodeId,
        to: NodeId,
        message: PeerMessage,
        loss: u64,
        rng: &mut Rng,
    ) {
        let delay = 1 + rng.below(4) + if rng.chance(20) { rng.below(60) } else { 0 };
        if self.cut.contains(&(from, to)) || rng.chance(loss) {
            return;
        }
        self.sent += 1;
        self.under_way.insert((now + delay, self.sent), (from, to, message));
    }

    pub(crate) fn arrived(&mut self, now: u64) -> Vec<(NodeId, NodeId, PeerMessage)> {
        let later = self.under_way.split_off(&(now + 1, 0));
        std::mem::replace(&mut self.under_way, later).into_values().collect()
    }

    pub(crate) fn is_cut(&self, from: NodeId, to: NodeId) -> bool {
        self.cut.contains(&(from, to))
    }

    pub(crate) fn cut(&mut self, from: NodeId, to: NodeId) {
        self.cut.insert((from, to));
    }

    pub(crate) fn heal(&mut self) {
        self.cut.clear();
    }
}
