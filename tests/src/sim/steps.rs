//! What of a move is durable somewhere, so that a fault can strike between any two steps of it.

use pontoon_proto::{GroupId, v1};
use v1::MovePhase;

use super::scenario::Scenario;

/// Everything about a group that somebody has made durable, or committed: each change of it is a step of a move.
#[derive(Debug, Clone, PartialEq)]
pub struct Persisted {
    /// The move's record in the meta group, and whether it shall go back.
    record: Option<(u64, MovePhase, bool)>,
    nodes: Vec<OnNode>,
}

/// What one node holds.
#[derive(Debug, Clone, PartialEq, Default)]
struct OnNode {
    /// The smallest replica that may be there, and the one that is in the log.
    fence: u64,
    replica: Option<u64>,
    /// Its members, as its engine has them.
    members: v1::ConfState,
    /// Bytes of a state that are staged.
    staged: u64,
    /// Whether its engine has a state, and whether its log has followed.
    has_state: bool,
    switches: bool,
}

impl Scenario {
    /// What is durable of a group now. A process that is down counts with what it had: its disk keeps that.
    pub fn persisted(&self, group: u64, before: Option<&Persisted>) -> Persisted {
        let id = GroupId(group);
        let of_node = |(i, node): (usize, &super::node::Node)| {
            let Some(running) = &node.running else {
                return before.and_then(|before| before.nodes.get(i).cloned()).unwrap_or_default();
            };
            let status = running.stepped.status(id);
            OnNode {
                fence: running.wal.tombstone(id).unwrap_or(0),
                replica: running.wal.group(id).and(status.as_ref()).map(|status| status.replica.get()),
                members: status.as_ref().map(|status| status.conf_state.clone()).unwrap_or_default(),
                staged: status
                    .as_ref()
                    .and_then(|status| status.pull.as_ref())
                    .map_or(0, |pull| pull.bytes_done),
                has_state: status.as_ref().is_some_and(|status| status.applied > 0),
                switches: self.world.checks.switched.contains_key(&(id, node.id)),
            }
        };
        let record = self.world.meta.running_move(group);
        Persisted {
            record: record.map(|mv| (mv.id, mv.phase(), mv.cancel_requested)),
            nodes: self.world.nodes.iter().enumerate().map(of_node).collect(),
        }
    }

    /// Lets time pass until so many steps of a group's move were made, or it has ended; how many were.
    pub fn pass_steps(&mut self, group: u64, steps: usize) -> usize {
        let mut last = self.persisted(group, None);
        for step in 0..steps {
            let id = last.record.map(|(id, ..)| id);
            self.until("another step, or the end of the move", |now| {
                now.persisted(group, Some(&last)) != last
            });
            last = self.persisted(group, Some(&last));
            if last.record.map(|(id, ..)| id) != id && step > 0 {
                return step + 1;
            }
        }
        steps
    }

    /// What a node keeps of a group that it holds no replica of; `None`: nothing but, perhaps, a tombstone.
    pub fn remains(&self, group: u64, node: u64) -> Option<&'static str> {
        let place = self.world.nodes.iter().find(|at| at.id.get() == node)?;
        let running = place.running.as_ref()?;
        let id = GroupId(group);
        if running.stepped.status(id).is_some() {
            return Some("a replica");
        }
        if running.wal.groups().contains(&id) || running.wal.group(id).is_some_and(|view| view.last_index > 0)
        {
            return Some("entries in its log");
        }
        if running.machines.reader(id).is_some() {
            return Some("rows that can be read");
        }
        (place.disk.rows_of(id) > 0).then_some("rows in its engine")
    }
}
