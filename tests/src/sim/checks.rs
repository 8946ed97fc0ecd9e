//! What must be true, all the time and at the end.

use std::collections::{BTreeMap, BTreeSet};

use pontoon_proto::{GroupId, NodeId, ReplicaId, v1};
use pontoon_raftstore::{GroupStatus, Machines as _, Role};

use super::{machines::rows_hash, operator::REPLICAS, world::World};
use crate::linear::{self, Act, Op, Verdict};

/// What was seen so far, to compare with.
#[derive(Default)]
pub(super) struct Checks {
    leaders: BTreeMap<(GroupId, u64), ReplicaId>,
    /// The term of each committed entry.
    committed: BTreeMap<(GroupId, u64), u64>,
    /// The term before an entry, by index and term of the entry: logs that agree on one agree on the other.
    before: BTreeMap<(GroupId, u64, u64), u64>,
    /// Up to where a replica's log was compared.
    compared: BTreeMap<(GroupId, NodeId), u64>,
    applied: BTreeMap<(GroupId, NodeId), (ReplicaId, u64)>,
    /// Replicas that were seen to vote.
    voters: BTreeSet<(GroupId, u64)>,
    /// Engines that have switched to a snapshot of this index, until their logs have followed.
    pub(super) switched: BTreeMap<(GroupId, NodeId), u64>,
}

impl Checks {
    /// A process has ended: what it had in memory is gone.
    pub(super) fn forget(&mut self, node: NodeId) {
        self.compared.retain(|(_, at), _| *at != node);
        self.applied.retain(|(_, at), _| *at != node);
        self.switched.retain(|(_, at), _| *at != node);
    }
}

impl World {
    pub(super) fn check_leader(&mut self, group: GroupId, leader: ReplicaId, term: u64) {
        let known = *self.checks.leaders.entry((group, term)).or_insert(leader);
        if known != leader {
            self.fail(&format!("{group} has two leaders in term {term}: {known} and {leader}"));
        }
    }

    /// A replica has said how it is.
    pub(super) fn check_status(&mut self, i: usize, status: &GroupStatus) {
        let (group, id) = (status.group, self.nodes[i].id);
        if status.dead.is_some() {
            return;
        }
        if status.role == Role::Leader {
            self.check_leader(group, status.replica, status.term);
            self.check_new_voters(status);
        }
        let (replica, applied) =
            self.checks.applied.get(&(group, id)).copied().unwrap_or((status.replica, 0));
        if replica == status.replica && status.applied < applied {
            self.fail(&format!("{replica} of {group} went back from {applied} to {}", status.applied));
        }
        self.checks.applied.insert((group, id), (status.replica, status.applied));
        if self.checks.switched.get(&(group, id)).is_some_and(|index| status.persisted >= *index) {
            self.checks.switched.remove(&(group, id));
        }
        let lost =
            status.pull_blocked.as_deref().is_some_and(|why| why.starts_with("its engine's state is lost"));
        let (hurt, replica) = (self.nodes[i].rotten || self.nodes[i].engine_taken, status.replica);
        if lost && !hurt {
            self.fail(&format!("the state of {replica} of {group} is gone, and its log builds upon it"));
        }
        self.check_log(i, status);
    }

    fn check_log(&mut self, i: usize, status: &GroupStatus) {
        let (group, id) = (status.group, self.nodes[i].id);
        let Some(running) = &self.nodes[i].running else { return };
        let Some(view) = running.wal.group(group).filter(|view| view.damaged.is_none()) else { return };
        let compared = self.checks.compared.get(&(group, id)).copied().unwrap_or(0);
        let first = view.first_index.max(compared + 1);
        // Raft counts entries in as soon as a leader has sent them with their commit; the log has others in their place yet, or
        // for good if it fails.
        let committed = status.commit.min(status.persisted);
        let mut wrong = None;
        let mut before = running.wal.term(group, first.saturating_sub(1)).ok();
        for index in first..=view.last_index {
            let Ok(term) = running.wal.term(group, index) else { break };
            if let Some(before) = before {
                let known = *self.checks.before.entry((group, index, term)).or_insert(before);
                if known != before {
                    wrong = Some(format!(
                        "logs agree on {index}@{term} and not on the entry before: {known}, {before}"
                    ));
                }
            }
            if index <= committed {
                let known = *self.checks.committed.entry((group, index)).or_insert(term);
                if known != term {
                    wrong = Some(format!("entry {index} was committed in term {known} and in term {term}"));
                }
            }
            before = Some(term);
        }
        self.checks.compared.insert((group, id), committed.min(view.last_index).max(compared));
        if let Some(wrong) = wrong {
            self.fail(&format!("{group} on {id}: {wrong}"));
        }
    }

    /// Whoever votes has the group's state.
    fn check_new_voters(&mut self, status: &GroupStatus) {
        for voter in &status.conf_state.voters {
            let Ok(replica) = ReplicaId::new(*voter) else { continue };
            if !self.checks.voters.insert((status.group, *voter)) {
                continue;
            }
            let there = self.at(replica.node()).and_then(|i| self.nodes[i].running.as_ref());
            let there = there.and_then(|running| running.stepped.status(status.group));
            if let Some(there) = there.filter(|there| there.replica == replica && there.dead.is_none())
                && (there.applied == 0 || there.pull.is_some())
            {
                self.fail(&format!("{replica} of {} votes before it has the group's state", status.group));
            }
        }
    }

    /// A replica is about to be removed from its node for ever.
    pub(super) fn check_fence(&mut self, group: GroupId, replica: ReplicaId) {
        let members = self.book.lock().members_of(group);
        if members.contains(&replica.get()) {
            self.fail(&format!("{replica} is removed from its node and is a member of {group} still"));
        }
    }

    /// Whether everything is as it should be when nothing strikes; what is not.
    pub(super) fn is_settled(&self) -> Result<(), String> {
        if let Some(client) = self.clients.iter().find(|client| !client.is_done()) {
            return Err(format!("{} is not answered", client.describe()));
        }
        if let Some(injury) = self.injury {
            let why = self.who_names(injury.node).unwrap_or_else(|| "it waits for its end".to_owned());
            let moves = self.meta.running_moves();
            let moves: Vec<String> = moves
                .map(|mv| {
                    let target = ReplicaId::new(mv.target).ok();
                    let seen = target.and_then(|target| self.seen.get(&(GroupId(mv.group), target.node())));
                    let seen = seen.map(|seen| {
                        (seen.role, seen.applied, seen.sleeping, seen.pull.is_some(), &seen.pull_blocked)
                    });
                    let led = self.leaders(GroupId(mv.group)).first().copied();
                    let led = led.and_then(|i| self.seen.get(&(GroupId(mv.group), self.nodes[i].id)));
                    let led =
                        led.map(|led| (led.replica, led.last_index, led.commit, led.sleeping, &led.progress));
                    format!(
                        "move {} of g{} is in {:?}: target {seen:?}, leader {led:?}",
                        mv.id,
                        mv.group,
                        mv.phase()
                    )
                })
                .collect();
            return Err(format!("{injury:?} is not healed: {why}; {moves:?}"));
        }
        if let Some(mv) = self.meta.running_moves().next() {
            let (id, group, phase, blocker) = (mv.id, mv.group, mv.phase(), mv.blocker());
            return Err(format!("move {id} of g{group} is in {phase:?}: {blocker:?}: {}", mv.blocked));
        }
        self.is_placed()?;
        let live = self.meta.live_nodes().count();
        for group in self.groups() {
            let Some(shard) = self.meta.shards.get(&group.0) else {
                return Err(format!("{group} is not created"));
            };
            let wanted = if group == GroupId::META { REPLICAS } else { self.plan.replicas };
            let wanted = (wanted as usize).min(live);
            if shard.state() != v1::ShardState::Live
                || shard.voters.len() < wanted
                || !shard.learners.is_empty()
            {
                return Err(format!("{group} has voters {:?} learners {:?}", shard.voters, shard.learners));
            }
            let Some(leader) = self.leaders(group).first().copied() else {
                return Err(format!("{group} has no leader"));
            };
            let status = &self.seen[&(group, self.nodes[leader].id)];
            let mut voters = status.conf_state.voters.clone();
            voters.sort_unstable();
            let mut known = shard.voters.clone();
            known.sort_unstable();
            if voters != known || !status.conf_state.learners.is_empty() || status.is_joint() {
                return Err(format!("the map says {known:?} of {group}, its leader {:?}", status.conf_state));
            }
            for voter in &status.conf_state.voters {
                let Ok(replica) = ReplicaId::new(*voter) else { continue };
                let there = self.seen.get(&(group, replica.node())).filter(|there| there.replica == replica);
                let Some(there) = there else { return Err(format!("{replica} of {group} is not there")) };
                if there.applied != status.last_index || there.dead.is_some() {
                    return Err(format!(
                        "{replica} of {group} stands at {} of {}, {:?}",
                        there.applied, status.last_index, there.dead
                    ));
                }
            }
        }
        Ok(())
    }

    /// Whether, moreover, nobody has anything left to apply at this very moment.
    pub(super) fn is_at_rest(&self) -> Result<(), String> {
        self.is_settled()?;
        for (group, node) in self.seen.keys() {
            let running = self.at(*node).and_then(|i| self.nodes[i].running.as_ref());
            let Some(status) = running.and_then(|running| running.stepped.status(*group)) else { continue };
            let leader = self.leaders(*group).first().copied();
            let leader = leader.and_then(|i| self.nodes[i].running.as_ref()?.stepped.status(*group));
            let last = leader.map_or(0, |leader| leader.last_index);
            if status.applied != last || status.last_index != last {
                return Err(format!("{group} on {node} stands at {} of {last}", status.applied));
            }
        }
        Ok(())
    }

    pub(super) fn check_end(&mut self) {
        for group in self.groups() {
            let leader = self.leaders(group)[0];
            let leader_id = self.nodes[leader].id;
            let conf = self.seen[&(group, leader_id)].conf_state.clone();
            let replicas: Vec<ReplicaId> =
                conf.voters.iter().filter_map(|id| ReplicaId::new(*id).ok()).collect();
            self.check_equal(group, &replicas);
            for node in &self.nodes {
                let Some(running) = &node.running else { continue };
                let here = running.stepped.status(group);
                if here.is_some() && !replicas.iter().any(|replica| replica.node() == node.id) {
                    self.fail(&format!("{} holds a replica of {group} that it should not", node.id));
                }
            }
            self.read_all(group, leader);
        }
        let histories = std::mem::take(&mut self.histories);
        for ((group, key), ops) in histories.keys {
            let verdict = linear::check(&ops);
            if verdict != Verdict::Linearizable {
                let ops: Vec<String> = ops.iter().map(describe).collect();
                self.fail(&format!("{verdict:?}: the history of {key} of {group}:\n{}", ops.join("\n")));
            }
        }
    }

    /// All replicas hold the same rows, the runtime's included.
    fn check_equal(&self, group: GroupId, replicas: &[ReplicaId]) {
        let mut first = None;
        for replica in replicas {
            let running = self.at(replica.node()).and_then(|i| self.nodes[i].running.as_ref());
            let Some(running) = running else { self.fail(&format!("{replica} of {group} is not there")) };
            let kind = if group == GroupId::META { v1::ShardKind::Meta } else { v1::ShardKind::Map };
            let shard = v1::Shard { group: group.0, kind: kind.into(), ..Default::default() };
            let machine = running.machines.open(group, &prost::Message::encode_to_vec(&shard));
            let hash = machine.and_then(|machine| rows_hash(&*machine.checkpoint()?));
            let hash = hash
                .unwrap_or_else(|error| self.fail(&format!("{replica} of {group} cannot be read: {error}")));
            if *first.get_or_insert(hash) != hash {
                self.fail(&format!("the replicas of {group} hold different rows"));
            }
        }
    }

    /// Reads every key once more: what was acknowledged must be there at the end.
    fn read_all(&mut self, group: GroupId, leader: usize) {
        let reader = self.nodes[leader].running.as_ref().and_then(|running| running.machines.reader(group));
        let Some(reader) = reader else { return };
        let keys: Vec<String> =
            self.histories.keys.keys().filter(|(of, _)| *of == group).map(|(_, key)| key.clone()).collect();
        for key in keys {
            let (call, answer) = (self.moment(), self.moment());
            let row = match reader.get(key.as_bytes()) {
                Ok(row) => row.map(|row| row.value),
                Err(error) => self.fail(&format!("{key} of {group} cannot be read: {error}")),
            };
            let act = Act::Read(self.histories.number(row.as_ref()));
            let ops = self.histories.keys.entry((group, key)).or_default();
            ops.push(Op { call, answer: Some(answer), act });
        }
    }
}

fn describe(op: &Op) -> String {
    let at = |moment: u64| format!("{}.{}", moment >> 20, moment & 0xf_ffff);
    let answer = op.answer.map_or_else(|| "?".to_owned(), at);
    format!("  {:>12} to {:>12}  {:?}", at(op.call), answer, op.act)
}
