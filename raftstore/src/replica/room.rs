//! What a replica does while disks are nearly full ([`Room`]).
//!
//! An engine that meets the end of its disk stops, and every group of the node with it. So commands are refused before:
//! by a leader whose own node lacks room (after it tried to hand leadership on), and by one whose quorum would have to
//! include a node that does. A follower without room goes on while it is only `Low`: then it draws on the reserve of its
//! node, which is safe, since leaders that count on it have stopped; the others commit without it, and at `Critical` it
//! leaves them alone. Configuration entries and urgent commands pass, for they are how room is made.

use pontoon_proto::NodeId;

use super::{Alive, Replica, Shared, convert, guarded, node_of};
use crate::{effects::Effects, types::Room};

/// Ticks after which a node that no longer says that it lacks room is taken to have some. It says so every ten.
const FORGET_TICKS: u64 = 40;

impl Shared {
    pub(crate) fn hear_room(&mut self, node: NodeId, lacks: bool) {
        match lacks {
            true => self.low_peers.insert(node, self.ticks),
            false => self.low_peers.remove(&node),
        };
    }

    fn has_room(&self, node: NodeId) -> bool {
        match node == self.node {
            true => self.room == Room::Ample,
            false => self.low_peers.get(&node).is_none_or(|heard| self.ticks > heard + FORGET_TICKS),
        }
    }
}

impl Replica {
    /// The other nodes with members of this group.
    pub(crate) fn peers(&self, shared: &Shared) -> Vec<NodeId> {
        let members = convert::members(&self.conf);
        members.into_iter().filter_map(node_of).filter(|node| *node != shared.node).collect()
    }

    /// The node for whose sake commands are refused here, if any is.
    pub(super) fn lacks_room(&self, shared: &Shared) -> Option<NodeId> {
        if shared.room == Room::Ample && shared.low_peers.is_empty() {
            return None;
        }
        if shared.room != Room::Ample {
            return Some(shared.node);
        }
        [&self.conf.voters, &self.conf.voters_outgoing].into_iter().find_map(|voters| {
            let mut low = voters.iter().copied().filter_map(node_of).filter(|node| !shared.has_room(*node));
            let first = low.next()?;
            let with_room = voters.len() - 1 - low.count();
            (with_room * 2 <= voters.len()).then_some(first)
        })
    }

    /// Keeps the status true.
    pub(super) fn note_room(&mut self, shared: &Shared) {
        let now = if self.is_leader() { self.lacks_room(shared) } else { None };
        if now != self.no_room {
            self.no_room = now;
            self.dirty = true;
        }
    }

    /// A leader on a node without room, or whose disk does not answer, hands leadership to a voter with room: to the one
    /// that has most of the log. Raft waits until it has the rest, for an election timeout at most.
    pub(crate) fn make_way(&mut self, shared: &mut Shared, fx: &mut Effects) -> Alive<()> {
        if !self.is_leader() || self.installing.is_some() || self.raw.raft.lead_transferee.is_some() {
            return Ok(());
        }
        let prs = self.raw.raft.prs();
        let others = self.conf.voters.iter().copied().filter(|id| *id != self.id.get());
        let heirs = others.filter_map(|id| {
            let progress = prs.get(id).filter(|progress| {
                progress.recent_active && progress.state == raft::ProgressState::Replicate
            })?;
            node_of(id).filter(|node| shared.has_room(*node)).map(|_| (progress.matched, id))
        });
        // The first of those that have as much.
        if let Some((_, to)) = heirs.rev().max_by_key(|(matched, _)| *matched) {
            let raw = &mut self.raw;
            guarded(|| raw.transfer_leader(to))?;
            self.after_raft(shared, fx);
        }
        Ok(())
    }
}
