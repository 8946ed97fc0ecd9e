//! Which loops of other nodes live, by their own word.
//!
//! Time is counted in lived ticks: of ticks that piled up while this process stood still a few count only, so that a pause
//! here is not taken for silence there. A lived tick is never shorter than a tick, so silence is never overstated.

use std::collections::{BTreeMap, VecDeque};

use pontoon_proto::{GroupId, NodeId, ReplicaId, v1};

/// What another node said of itself.
#[derive(Default)]
pub(crate) struct Neighbours {
    /// Ticks that this loop lived.
    lived: u64,
    nodes: BTreeMap<NodeId, Neighbour>,
    /// Of each node: how far its clock was from the one here at its last words, in milliseconds.
    skews: BTreeMap<NodeId, VecDeque<i64>>,
}

/// So many words are compared: one that was long on its way, or came while this process stood still, says nothing of a clock.
const COMPARED: usize = 8;

struct Neighbour {
    incarnation: u64,
    /// Of each of its loops: the lived tick of its last word, and whether its silence was noticed.
    lanes: Vec<Lane>,
}

#[derive(Clone, Copy)]
struct Lane {
    heard: u64,
    is_silent: bool,
}

/// So many loops are believed in; more are a garbled message.
const MOST_LANES: u32 = 1024;

impl Neighbours {
    /// Time goes on. Returns the nodes of which a loop fell silent: it said nothing for more than `timeout` ticks.
    pub(crate) fn tick(&mut self, ticks: u64, timeout: u64) -> Vec<NodeId> {
        self.lived += ticks;
        let lived = self.lived;
        let mut silent = Vec::new();
        for (node, neighbour) in &mut self.nodes {
            let fell =
                neighbour.lanes.iter_mut().filter(|lane| !lane.is_silent && lived - lane.heard > timeout);
            let fell = fell.map(|lane| lane.is_silent = true).count();
            if fell > 0 {
                self.skews.remove(node);
                silent.push(*node);
            }
        }
        silent
    }

    /// A loop of a node says that it lives. True: the node is another incarnation than the one that was known.
    pub(crate) fn hear(&mut self, node: NodeId, ping: &v1::NodePing) -> bool {
        let lanes = ping.lanes.max(1);
        if lanes > MOST_LANES || ping.lane >= lanes {
            return false;
        }
        let never = Lane { heard: self.lived, is_silent: false };
        let fresh = || Neighbour { incarnation: ping.incarnation, lanes: vec![never; lanes as usize] };
        let mut is_new = false;
        let neighbour = self.nodes.entry(node).or_insert_with(fresh);
        if neighbour.incarnation != ping.incarnation || neighbour.lanes.len() != lanes as usize {
            *neighbour = fresh();
            is_new = true;
        }
        neighbour.lanes[ping.lane as usize] = never;
        is_new
    }

    /// What is known of the loop that has the group on that node, unless it is silent: its incarnation and the lived tick at
    /// which it was heard.
    pub(crate) fn heard(&self, node: NodeId, group: GroupId) -> Option<(u64, u64)> {
        let neighbour = self.nodes.get(&node)?;
        let lane = neighbour.lanes[group.0 as usize % neighbour.lanes.len()];
        (!lane.is_silent).then_some((neighbour.incarnation, lane.heard))
    }

    /// For how long nobody can have spoken for the leader of a group: since `since`, a lived tick, or its loop's last word. A
    /// leader whose node is another incarnation is gone for good: as long as one likes.
    pub(crate) fn silence(&self, leader: ReplicaId, incarnation: u64, group: GroupId, since: u64) -> u64 {
        match self.nodes.get(&leader.node()) {
            Some(neighbour) if neighbour.incarnation == incarnation => {
                let heard = neighbour.lanes[group.0 as usize % neighbour.lanes.len()].heard;
                self.lived - heard.max(since)
            }
            _ => u64::MAX,
        }
    }

    /// A node says what its clock shows. 0: it does not say.
    pub(crate) fn compare_clocks(&mut self, node: NodeId, there_ms: u64, here_ms: u64) {
        if there_ms == 0 {
            return;
        }
        let skews = self.skews.entry(node).or_default();
        skews.truncate(COMPARED - 1);
        skews.push_front(there_ms.cast_signed().wrapping_sub(here_ms.cast_signed()));
    }

    /// How far the clock of another node is from the one here, of the node that is farthest, in milliseconds; above zero if it is
    /// ahead. Of each the word that speaks best for it counts; of one that said too few, none.
    pub(crate) fn skew_ms(&self) -> i64 {
        let told = self.skews.values().filter(|skews| skews.len() == COMPARED);
        let best = told.filter_map(|skews| skews.iter().copied().min_by_key(|skew| skew.unsigned_abs()));
        best.max_by_key(|skew| skew.unsigned_abs()).unwrap_or(0)
    }

    /// Ticks that this loop lived.
    pub(crate) fn lived(&self) -> u64 {
        self.lived
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ping(incarnation: u64, lane: u32, lanes: u32) -> v1::NodePing {
        v1::NodePing { incarnation, lane, lanes, ..Default::default() }
    }

    #[test]
    fn each_loop_of_a_node_is_heard_by_itself_and_its_silence_noticed_once() {
        let node = NodeId::new(2).unwrap();
        let mut all = Neighbours::default();
        assert!(!all.hear(node, &ping(7, 0, 2)));
        assert!(all.tick(10, 10).is_empty());
        assert!(!all.hear(node, &ping(7, 1, 2)));
        assert_eq!(all.tick(1, 10), [node], "loop 0");
        assert_eq!(all.heard(node, GroupId(4)), None);
        assert_eq!(all.heard(node, GroupId(5)), Some((7, 10)));
        assert!(all.tick(1, 10).is_empty());
        assert!(!all.hear(node, &ping(7, 0, 2)), "the same one again");
        assert_eq!(all.heard(node, GroupId(4)), Some((7, 12)));
    }

    #[test]
    fn a_leader_of_another_incarnation_is_silent_for_ever() {
        let node = NodeId::new(2).unwrap();
        let (leader, group) = (ReplicaId::on(node, 1), GroupId(3));
        let mut all = Neighbours::default();
        all.hear(node, &ping(7, 0, 1));
        all.tick(5, 10);
        assert_eq!(all.silence(leader, 7, group, 0), 5);
        assert_eq!(all.silence(leader, 7, group, 3), 2, "it spoke itself since then");
        assert!(all.hear(node, &ping(8, 0, 1)));
        assert_eq!(all.silence(leader, 7, group, 5), u64::MAX);
        assert_eq!(all.silence(leader, 8, group, 5), 0);
    }

    #[test]
    fn the_clock_that_is_farthest_counts_by_the_word_that_speaks_best_for_it() {
        let (near, far) = (NodeId::new(2).unwrap(), NodeId::new(3).unwrap());
        let mut all = Neighbours::default();
        all.hear(near, &ping(7, 0, 1));
        all.hear(far, &ping(7, 0, 1));
        for (nth, late) in [900, 3, 5_000, 40, 3, 8, 70, 900].into_iter().enumerate() {
            assert_eq!(all.skew_ms(), 0, "{nth} words are too few");
            all.compare_clocks(near, 100_000, 100_000 + late);
            all.compare_clocks(far, 100_000 - 2_000, 100_000 + late);
        }
        assert_eq!(all.skew_ms(), -2_003, "what was long on its way says nothing");
        all.compare_clocks(far, 0, 100_000);
        assert_eq!(all.skew_ms(), -2_003, "one that does not say is not compared");
        (0..COMPARED).for_each(|_| all.compare_clocks(far, 100_001, 100_000));
        assert_eq!(all.skew_ms(), -3, "it was set right");
        all.compare_clocks(near, 107_000, 100_000);
        assert_eq!(all.skew_ms(), -3);
        (0..COMPARED).for_each(|_| all.compare_clocks(near, 107_000, 100_000));
        assert_eq!(all.skew_ms(), 7_000);
        assert_eq!(all.tick(11, 10), [near, far]);
        assert_eq!(all.skew_ms(), 0, "whoever is silent has no clock");
    }

    #[test]
    fn garbled_loops_are_not_believed() {
        let node = NodeId::new(2).unwrap();
        let mut all = Neighbours::default();
        assert!(!all.hear(node, &ping(7, 2, 2)));
        assert!(!all.hear(node, &ping(7, 0, u32::MAX)));
        assert_eq!(all.heard(node, GroupId(1)), None);
    }
}
