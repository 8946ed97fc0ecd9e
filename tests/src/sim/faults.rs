//! What strikes, within what a cluster must survive.

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::atomic::Ordering,
};

use pontoon_proto::{GroupId, NodeId, ReplicaId, v1};
use pontoon_raftstore::Room;
use pontoon_wal::{
    sim::{Fault, OpKind},
    tools::{self, FrameState},
};

use super::{coverage::Kind, node::LOG, plan::Faults, world::World};

/// A node whose disk is damaged or lost for good. There is one at a time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Injury {
    pub(super) node: NodeId,
    /// When a damaged node is given up.
    retire_at: u64,
}

impl Injury {
    /// This node is damaged, and given up at that moment.
    pub(super) fn of(node: NodeId, retire_at: u64) -> Injury {
        Injury { node, retire_at }
    }
}

const SECTOR: usize = 512;
/// After which an idle log has written its watermark.
const IDLE_MS: u64 = 20;
/// Frames that count as new.
const NEWEST_FRAMES: usize = 3;

/// How often each kind strikes.
fn rates(faults: &Faults) -> [(u64, Kind); 12] {
    [
        (faults.clog, Kind::Clog),
        (faults.partition, Kind::Partition),
        (faults.one_way, Kind::OneWay),
        (faults.crash, Kind::Crash),
        (faults.kill, Kind::Kill),
        (faults.pause, Kind::Pause),
        (faults.jump, Kind::Jump),
        (faults.stall, Kind::Stall),
        (faults.io, Kind::Io),
        (faults.no_space, Kind::NoSpace),
        (faults.rot, Kind::Rot),
        (faults.lost, Kind::Lost),
    ]
}

impl World {
    pub(super) fn strike(&mut self) {
        let faults = self.plan.faults;
        if self.heal_at != 0 && self.now >= self.heal_at {
            self.net.heal();
            self.heal_at = 0;
            self.say("the network heals");
        }
        for (rate, kind) in rates(&faults) {
            if rate > 0 && self.rng.below(100_000) < rate {
                let i = self.victim();
                self.strike_with(kind, i);
            }
        }
        if let Some((_, id, kind)) = self.ambush.take_if(|(at, ..)| *at <= self.now)
            && let Some(i) = self.at(id)
        {
            self.strike_with(kind, i);
        }
        if self.plan.aims
            && let Some((kind, id)) = self.aim()
            && self.rng.chance(300)
            && let Some(i) = self.at(id)
        {
            self.strike_with(kind, i);
        }
        if self.rng.below(100_000) < faults.moves {
            match self.rng.below(7) {
                0 => self.cancel_some_move(),
                _ => self.start_some_move(),
            }
        }
        if self.rng.below(100_000) < faults.drains {
            self.drain_or_take_back();
        }
        if self.rng.below(100_000) < faults.plans {
            self.plan_evenly();
        }
    }

    /// Lets a node be struck within a few milliseconds, now and then: something that passes quickly begins there.
    pub(super) fn lie_in_wait(&mut self, node: NodeId) {
        if self.calm || self.ambush.is_some() || !self.rng.chance(120) {
            return;
        }
        // What strikes a single node; power cuts twice as often.
        let times = |kind| match kind {
            Kind::Clog => 0,
            Kind::Crash => 2,
            _ => 1,
        };
        let kinds = rates(&self.plan.faults).into_iter().filter(|(rate, _)| *rate > 0);
        let able: Vec<Kind> = kinds.flat_map(|(_, kind)| std::iter::repeat_n(kind, times(kind))).collect();
        if !able.is_empty() {
            let kind = able[self.rng.below(able.len() as u64) as usize];
            self.ambush = Some((self.now + self.rng.below(12), node, kind));
        }
    }

    /// Cuts a node's power within a few milliseconds, now and then.
    pub(super) fn cut_power_soon(&mut self, node: NodeId) {
        if !self.calm && self.plan.faults.crash > 0 && self.ambush.is_none() && self.rng.chance(120) {
            self.ambush = Some((self.now + self.rng.below(4), node, Kind::Crash));
        }
    }

    fn strike_with(&mut self, kind: Kind, i: usize) {
        let node = &self.nodes[i];
        if !node.is_up() {
            return;
        }
        let id = node.id;
        let is_busy = node.stalled_until != 0 || node.full_until != 0 || node.may_fail;
        match kind {
            Kind::Clog | Kind::Partition | Kind::OneWay if self.heal_at != 0 => return,
            Kind::Stall | Kind::Io | Kind::NoSpace | Kind::Rot if is_busy => return,
            Kind::Rot | Kind::Lost if self.injury.is_some() || !self.can_spare(id) => return,
            _ => {}
        }
        let span = |rng: &mut crate::Rng, least: u64, most: u64| least + rng.below(most);
        self.cover(kind, &|node| node == id, None);
        self.say(format!("{kind:?} strikes {id}"));
        match kind {
            Kind::Loss | Kind::Duplicate => {}
            Kind::Clog => {
                let delay = span(&mut self.rng, 20, 400);
                for other in 0..self.nodes.len() {
                    let other = self.nodes[other].id;
                    if other != id && self.rng.chance(500) {
                        self.net.clog(id, other, delay);
                        self.net.clog(other, id, delay);
                    }
                }
                self.heal_at = self.now + span(&mut self.rng, 100, 1_000);
            }
            Kind::Partition | Kind::OneWay => {
                let way = if kind == Kind::Partition { 0 } else { 1 + self.rng.below(2) };
                for other in 0..self.nodes.len() {
                    let other = self.nodes[other].id;
                    if other == id {
                        continue;
                    }
                    if way != 2 {
                        self.net.cut(id, other);
                    }
                    if way != 1 {
                        self.net.cut(other, id);
                    }
                }
                self.heal_at = self.now + span(&mut self.rng, 100, 1_500);
            }
            Kind::Crash | Kind::Kill => {
                let down = span(&mut self.rng, 5, 600);
                self.end(i, kind == Kind::Crash, down);
            }
            Kind::Pause => self.nodes[i].paused_until = self.now + span(&mut self.rng, 20, 1_200),
            Kind::Jump => {
                let ahead = &mut self.nodes[i].wall_ahead_ms;
                *ahead = (*ahead + self.rng.below(40_000) as i64 - 20_000).clamp(-30_000, 30_000);
            }
            Kind::Stall => {
                self.nodes[i].stalled_until = self.now + span(&mut self.rng, 20, 800);
                self.nodes[i].fs.hold(true);
            }
            Kind::Io => {
                let (nth, draw) = (self.rng.below(30), self.rng.below(4));
                let node = &mut self.nodes[i];
                node.may_fail = true;
                match draw {
                    0 => node.fs.fail_nth(OpKind::Write, nth, Fault::Io),
                    1 => node.fs.fail_nth(OpKind::Write, nth, Fault::Short),
                    2 => node.fs.fail_nth(OpKind::Write, nth, Fault::NoSpace),
                    _ => node.fs.fail_nth(OpKind::Sync, nth, Fault::Io),
                }
            }
            Kind::NoSpace => {
                let room = if self.rng.chance(500) { Room::Low } else { Room::Critical };
                let until = self.now + span(&mut self.rng, 50, 1_000);
                let node = &mut self.nodes[i];
                node.full_until = until;
                node.may_fail = true;
                let held = node.fs.files().iter().map(|(_, len)| len).sum();
                node.fs.set_capacity(Some(held));
                if let Some(running) = &mut node.running {
                    running.stepped.set_room(room);
                }
            }
            Kind::Rot => self.rot(i),
            Kind::Lost => self.lose(i),
        }
    }

    /// A node, one that takes part in a move more often than others: that is where things may go wrong.
    fn victim(&mut self) -> usize {
        let parts: Vec<NodeId> = self
            .meta
            .running_moves()
            .flat_map(|mv| [mv.source, mv.target])
            .filter_map(|id| ReplicaId::new(id).ok().map(ReplicaId::node))
            .collect();
        if !parts.is_empty() && self.rng.chance(600) {
            let id = parts[self.rng.below(parts.len() as u64) as usize];
            if let Some(i) = self.at(id) {
                return i;
            }
        }
        self.rng.below(self.nodes.len() as u64) as usize
    }

    /// Whether each group keeps a majority of each half of its configuration without this node, and whatever else is
    /// lost for good, whichever of the configurations that anybody holds is the true one.
    pub(super) fn can_spare(&self, id: NodeId) -> bool {
        let removes = |mv: &&std::sync::Arc<v1::Move>| mv.kind() == v1::MoveKind::Remove;
        if self.meta.running_moves().any(|mv| removes(&mv)) || self.has_orders() {
            return false;
        }
        let stays = |group, replica: &u64| {
            let Ok(replica) = ReplicaId::new(*replica) else { return false };
            let node = replica.node();
            let gone = self.at(node).is_none_or(|i| self.nodes[i].gone);
            node != id && !gone && !self.dead.contains(&(group, node))
        };
        let has_majority = |group, voters: &[u64]| {
            let left = voters.iter().filter(|replica| stays(group, replica)).count();
            voters.is_empty() || left * 2 > voters.len()
        };
        let seen = self.seen.iter().map(|((group, _), status)| (*group, &status.conf_state));
        let held = self.held.iter().map(|((group, _), conf)| (*group, conf));
        // What a move changes next may stand in logs already and be applied by nobody. When it has gone on, its leader shows it.
        let mut next = self
            .meta
            .running_moves()
            .filter(|mv| (v1::MovePhase::CatchUp..=v1::MovePhase::Joint).contains(&mv.phase()))
            .filter_map(|mv| {
                let shard = self.meta.shards.values().find(|shard| shard.group == mv.group)?;
                let stay = shard.voters.iter().copied().filter(|id| *id != mv.source && *id != mv.target);
                Some((GroupId(mv.group), stay.chain([mv.target]).collect::<Vec<u64>>()))
            });
        seen.chain(held).all(|(group, conf)| {
            has_majority(group, &conf.voters) && has_majority(group, &conf.voters_outgoing)
        }) && next.all(|(group, voters)| has_majority(group, &voters))
    }

    /// Ends the process, then flips bits of its log. Everything was proven durable by then: only the rot is to be seen.
    fn rot(&mut self, i: usize) {
        self.injury = Some(Injury { node: self.nodes[i].id, retire_at: self.now + 1_500 });
        let closes = self.rng.chance(500);
        let (now, clock) = (self.now, self.clock.clone());
        let node = &mut self.nodes[i];
        node.rotten = true;
        if let Some(running) = &node.running {
            // The one way all is in the checkpoint, the other way the watermark of an idle log alone tells what must be there.
            let ended = match closes {
                true => running.wal.clone().close(),
                false => {
                    clock.0.store(now + IDLE_MS, Ordering::Relaxed);
                    while running.wal.step() {}
                    clock.0.store(now, Ordering::Relaxed);
                    Ok(())
                }
            };
            if let Err(error) = ended {
                self.fail(&format!("a log does not close: {error}"));
            }
        }
        self.end(i, false, 20);
        let newest = self.newest_records(i);
        let mut written: Vec<(PathBuf, u64)> = Vec::new();
        for (path, len) in self.nodes[i].fs.files() {
            if path.extension().is_none_or(|extension| extension != "wal") {
                continue;
            }
            let mut sector = [0; SECTOR];
            for at in (0..len).step_by(SECTOR) {
                let read = self.nodes[i].fs.peek(&path, at, &mut sector);
                if read == Some(SECTOR) && sector != [0; SECTOR] {
                    written.push((path.clone(), at));
                }
            }
        }
        for _ in 0..1 + self.rng.below(3) {
            if written.is_empty() {
                return;
            }
            // Half of them where the newest entries are.
            let among = if !newest.is_empty() && self.rng.chance(500) { &newest } else { &written };
            let (path, at) = among[self.rng.below(among.len() as u64) as usize].clone();
            let mut sector = [0; SECTOR];
            self.nodes[i].fs.peek(&path, at, &mut sector);
            if self.rng.chance(300) {
                sector = [0; SECTOR];
            } else {
                sector[self.rng.below(SECTOR as u64) as usize] ^= 1 << self.rng.below(8);
            }
            self.nodes[i].fs.patch(&path, at, &sector);
        }
    }

    /// The sectors in which the records of the newest frames begin that are proven durable.
    fn newest_records(&self, i: usize) -> Vec<(PathBuf, u64)> {
        let mut found = Vec::new();
        let visited = tools::frames(&self.nodes[i].fs, Path::new(LOG), |frame| {
            if frame.state == FrameState::Live && frame.stream == 0 {
                found.push(frame);
            }
            ControlFlow::Continue(())
        });
        if let Err(error) = visited {
            self.fail(&format!("the frames of a log cannot be listed: {error}"));
        }
        found.retain(|frame| frame.records.as_ref().is_some_and(|records| !records.is_empty()));
        found.sort_by_key(|frame| std::cmp::Reverse((frame.ordinal, frame.seq)));
        let sector = |at: u64| at - at % SECTOR as u64;
        let newest = found.into_iter().take(NEWEST_FRAMES);
        newest
            .flat_map(|frame| {
                let path = frame.path.clone();
                frame
                    .records
                    .unwrap_or_default()
                    .into_iter()
                    .map(move |record| (path.clone(), sector(record.offset)))
            })
            .collect()
    }

    /// The node's disks are lost; another takes its place.
    pub(super) fn lose(&mut self, i: usize) {
        let id = self.nodes[i].id;
        self.end(i, true, 0);
        self.nodes[i].gone = true;
        self.dead.retain(|(_, node)| *node != id);
        self.held.retain(|(_, node), _| *node != id);
        self.injury = Some(Injury { node: id, retire_at: u64::MAX });
        self.say(format!("{id} is lost"));
        self.replace_node(id);
    }

    /// Gives a damaged node up after a while; the injury is healed when no group names the lost node any more.
    pub(super) fn tend_injury(&mut self) {
        let Some(Injury { node, retire_at }) = self.injury else { return };
        let Some(i) = self.at(node) else { return };
        if !self.nodes[i].gone {
            let all_are_up = self.nodes.iter().all(|node| node.gone || node.running.is_some());
            if self.now >= retire_at && all_are_up && self.can_spare(node) {
                self.cover(Kind::Lost, &|at| at == node, None);
                self.lose(i);
            }
            return;
        }
        if self.who_names(node).is_none() {
            self.say(format!("{node} is replaced"));
            self.injury = None;
        }
    }

    /// Who still counts on a node.
    pub(super) fn who_names(&self, node: NodeId) -> Option<String> {
        let on_it = |id: &u64| ReplicaId::new(*id).is_ok_and(|replica| replica.node() == node);
        let members = |shard: &v1::Shard| shard.voters.iter().chain(&shard.learners).any(on_it);
        if let Some(shard) = self.meta.shards.values().find(|shard| members(shard)) {
            let (voters, learners) = (&shard.voters, &shard.learners);
            return Some(format!(
                "the map names it in g{}: voters {voters:?}, learners {learners:?}",
                shard.group
            ));
        }
        if let Some(mv) = self.meta.running_moves().find(|mv| on_it(&mv.source) || on_it(&mv.target)) {
            return Some(format!("move {} is about it", mv.id));
        }
        let known = self.seen.values().find(|status| {
            let conf = &status.conf_state;
            conf.voters.iter().chain(&conf.voters_outgoing).any(on_it)
        });
        known.map(|status| format!("{} of {} counts on it", status.replica, status.group))
    }

    /// The log of a node failed: its process ends, and is started again.
    pub(super) fn restart_after_failure(&mut self, i: usize) {
        let (power_cut, down) = (self.rng.chance(300), 10 + self.rng.below(200));
        self.end(i, power_cut, down);
    }

    /// What the disk of a node does by itself.
    pub(super) fn stir_disk(&mut self, i: usize) {
        let now = self.now;
        let node = &mut self.nodes[i];
        if node.stalled_until != 0 {
            if now >= node.stalled_until {
                node.stalled_until = 0;
                node.fs.hold(false);
                while node.fs.complete_one() {}
            } else if self.rng.chance(100) {
                let waiting = node.fs.waiting() as u64;
                if waiting > 0 {
                    node.fs.complete_nth(self.rng.below(waiting) as usize);
                }
            }
        }
        if node.full_until != 0 && now >= node.full_until {
            node.full_until = 0;
            node.fs.set_capacity(None);
            if let Some(running) = &mut node.running {
                running.stepped.set_room(Room::Ample);
            }
        }
    }

    /// Ends all faults, but lets one node stay down: `None` if no group could spare any.
    pub(super) fn heal(&mut self) -> Option<usize> {
        self.calm = true;
        self.net.heal();
        self.heal_at = 0;
        self.say("everything heals");
        for i in 0..self.nodes.len() {
            let node = &mut self.nodes[i];
            node.down_until = self.now;
            node.paused_until = node.paused_until.min(self.now + 1);
            node.stalled_until = node.stalled_until.min(self.now + 1);
            node.full_until = node.full_until.min(self.now + 1);
            if node.may_fail {
                // A fault may wait for its turn yet; it goes with the process.
                self.end(i, false, 1);
            }
        }
        let first = self.rng.below(self.nodes.len() as u64) as usize;
        let order = (0..self.nodes.len()).map(|k| (first + k) % self.nodes.len());
        // A damaged disk may yet take another replica with it.
        let rotten = self.nodes.iter().any(|node| node.rotten && !node.gone);
        let spare =
            order.filter(|i| !self.nodes[*i].gone && !rotten).find(|i| self.can_spare(self.nodes[*i].id));
        if let Some(i) = spare {
            self.end(i, true, u64::MAX / 2);
            let id = self.nodes[i].id;
            self.say(format!("all but {id}"));
        }
        spare
    }
}
