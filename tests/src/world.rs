//! The simulated cluster, its clients and its checks.
//!
//! A run has two phases. In the first, faults strike: power cuts, loss, delays, partitions, and replicas change nodes. In
//! the second all faults end, and everything must come right within a bounded time.
//!
//! Checked throughout: at most one leader per group and term; no replica dies; a read sees every write that was
//! acknowledged before it began. Checked at the end: every acknowledged write is there exactly once, every other at most
//! once; all replicas of a group hold equal rows; nobody outside a group's configuration holds a replica.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use pontoon_proto::{GroupId, NodeId, ReplicaId, v1::ConfState};
use pontoon_raftstore::{
    Answer, Config, Event, GroupSpec, MemberChange, Proposal, ProposeError, ReadLevel, Rejected, RequestId,
    Role, Stepped,
};
use pontoon_wal::{Clock, DriverMode, Options, Wal, sim::SimFs};

use crate::{Rng, machine::Disks, net::Net};

/// Steps of a simulated millisecond between two ticks of raft.
const TICK_EVERY: u64 = 20;
/// Steps that the end may take: twenty election timeouts.
const CALM_STEPS: u64 = 20 * 10 * TICK_EVERY;

/// How hard a run is. In permille per step where nothing else is said.
#[derive(Debug, Clone, Copy)]
pub struct Faults {
    /// Messages lost, in permille of messages.
    pub loss: u64,
    /// Power cuts of one node.
    pub crash: u64,
    /// New partitions; each heals after a while.
    pub partition: u64,
    /// Replicas that change nodes.
    pub swap: u64,
}

struct SimClock(std::sync::atomic::AtomicU64);

impl Clock for SimClock {
    fn now(&self) -> Duration {
        Duration::from_millis(self.0.load(std::sync::atomic::Ordering::Relaxed))
    }
}

struct Node {
    id: NodeId,
    fs: SimFs,
    disks: Disks,
    running: Option<(Stepped, Wal)>,
    boots: u64,
    down_until: u64,
    /// What was durable in each group's log when the power was cut.
    promised: BTreeMap<GroupId, u64>,
}

/// What a client waits for.
enum Wait {
    Stamp { client: usize },
    Write { client: usize, seq: u64 },
    Read { group: GroupId, must_hold: Vec<String> },
    Swap { group: GroupId },
}

/// A client writes one value after the other to one group, each until it is acknowledged.
struct Client {
    group: GroupId,
    id: u128,
    stamp: Option<u64>,
    seq: u64,
    /// The value that is being written, and where it was last sent.
    value: Option<String>,
    busy: bool,
    retry_at: u64,
}

/// One replica that changes nodes.
struct Swap {
    group: GroupId,
    source: ReplicaId,
    target: ReplicaId,
    step: SwapStep,
    busy: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum SwapStep {
    Create,
    AddLearner,
    Transfer,
    Joint,
    Remove,
    Fence,
}

/// A cluster in one thread.
pub struct World {
    seed: u64,
    rng: Rng,
    faults: Faults,
    now: u64,
    clock: Arc<SimClock>,
    nodes: Vec<Node>,
    net: Net,
    groups: Vec<GroupId>,
    members: BTreeMap<GroupId, BTreeSet<ReplicaId>>,
    next_ordinal: BTreeMap<GroupId, u32>,
    clients: Vec<Client>,
    waits: BTreeMap<(NodeId, u64, u64), Wait>,
    swaps: BTreeMap<GroupId, Swap>,
    acknowledged: BTreeMap<GroupId, BTreeSet<String>>,
    tried: BTreeMap<GroupId, BTreeSet<String>>,
    leaders: BTreeMap<(GroupId, u64), ReplicaId>,
    heal_at: u64,
    calm: bool,
    next_value: u64,
    /// Counts of what happened, so that a run that tests nothing is noticed.
    pub crashes: u64,
    /// Moves that came to their end.
    pub swaps_done: u64,
    /// Snapshots that were switched in.
    pub snapshots: u64,
    /// Reads that were answered and checked.
    pub reads: u64,
    trace: u64,
}

impl World {
    /// Four nodes, `groups` groups of three replicas each, two clients per group.
    pub fn new(seed: u64, groups: u64, faults: Faults) -> World {
        let mut world = World {
            seed,
            rng: Rng::new(seed),
            faults,
            now: 0,
            clock: Arc::new(SimClock(0.into())),
            nodes: Vec::new(),
            net: Net::default(),
            groups: (2..2 + groups).map(GroupId).collect(),
            members: BTreeMap::new(),
            next_ordinal: BTreeMap::new(),
            clients: Vec::new(),
            waits: BTreeMap::new(),
            swaps: BTreeMap::new(),
            acknowledged: BTreeMap::new(),
            tried: BTreeMap::new(),
            leaders: BTreeMap::new(),
            heal_at: 0,
            calm: false,
            next_value: 0,
            crashes: 0,
            swaps_done: 0,
            snapshots: 0,
            reads: 0,
            trace: seed,
        };
        for id in 1..=4 {
            let id = NodeId::new(id).expect("small");
            let node = Node {
                id,
                fs: SimFs::new(),
                disks: Disks::default(),
                running: None,
                boots: 0,
                down_until: 0,
                promised: BTreeMap::new(),
            };
            world.nodes.push(node);
            world.boot(id);
        }
        for group in world.groups.clone() {
            let members: BTreeSet<ReplicaId> =
                (0..3).map(|i| ReplicaId::on(world.nodes[((group.0 + i) % 4) as usize].id, 1)).collect();
            world.next_ordinal.insert(group, 2);
            let conf =
                ConfState { voters: members.iter().map(|id| id.get()).collect(), ..Default::default() };
            for replica in &members {
                let spec = GroupSpec {
                    group,
                    replica: *replica,
                    descriptor: Bytes::new(),
                    epoch: 1,
                    initial: Some(conf.clone()),
                };
                if let Some((stepped, _)) = &mut world.node(replica.node()).running {
                    stepped.create_group(spec);
                }
            }
            world.members.insert(group, members);
            for client in 0..2 {
                let id = u128::from(group.0) << 8 | client;
                let client = Client { group, id, stamp: None, seq: 0, value: None, busy: false, retry_at: 0 };
                world.clients.push(client);
            }
        }
        // Founding is not what is tested: it is let through before faults begin.
        world.calm = true;
        for _ in 0..4 * TICK_EVERY {
            world.step();
        }
        world.calm = false;
        world
    }

    fn node(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.get() as usize - 1]
    }

    fn boot(&mut self, id: NodeId) {
        let (seed, world_seed, now, clock) = (self.rng.draw(), self.seed, self.now, self.clock.clone());
        let node = self.node(id);
        node.boots += 1;
        let mut options = Options::new("/wal");
        options.fs = Arc::new(node.fs.clone());
        options.segment_bytes = 256 << 10;
        options.seed = seed;
        options.clock = clock;
        options.driver = DriverMode::Manual;
        // Half of the nodes find nothing in memory that was written.
        if node.id.get().is_multiple_of(2) {
            node.fs.set_cold(true);
            options.cache_bytes = 0;
        }
        let promised = std::mem::take(&mut node.promised);
        let (wal, _report) = Wal::open(options)
            .unwrap_or_else(|error| panic!("seed {world_seed}: {id} does not open: {error}"));
        for (group, index) in promised {
            let last = wal.group(group).map_or(0, |view| view.last_index);
            if last < index {
                panic!(
                    "seed {world_seed} at step {now}: {id} promised {group} up to {index}, its log ends at {last}"
                );
            }
        }
        let config = Config { chunk_bytes: 128, chunk_window: 2, seed, ..Default::default() };
        let mut stepped = Stepped::open(config, id, wal.clone(), Arc::new(node.disks.clone()))
            .expect("the configuration holds");
        stepped.set_wall_ms(now);
        node.running = Some((stepped, wal));
    }

    fn fail(&self, what: &str) -> ! {
        panic!("seed {} at step {}: {what}; replay with PONTOON_SIM_SEED={}", self.seed, self.now, self.seed)
    }

    /// Runs `steps` under faults, then heals everything and checks the end. Returns a hash of all that happened: equal
    /// for equal seeds.
    pub fn run(&mut self, steps: u64) -> u64 {
        for _ in 0..steps {
            self.strike();
            self.step();
        }
        self.calm = true;
        self.net.heal();
        for id in 1..=4 {
            let id = NodeId::new(id).expect("small");
            if self.node(id).running.is_none() {
                self.boot(id);
            }
        }
        for _ in 0..CALM_STEPS {
            self.step();
            if self.settled() {
                break;
            }
        }
        self.check_end();
        self.trace
    }

    fn strike(&mut self) {
        if self.rng.chance(self.faults.crash) {
            let id = NodeId::new(1 + self.rng.below(4)).expect("small");
            self.crash(id);
        }
        if self.heal_at == 0 && self.rng.chance(self.faults.partition) {
            let lonely = NodeId::new(1 + self.rng.below(4)).expect("small");
            let one_way = self.rng.chance(300);
            for other in 1..=4 {
                let other = NodeId::new(other).expect("small");
                self.net.cut(lonely, other);
                if !one_way {
                    self.net.cut(other, lonely);
                }
            }
            self.heal_at = self.now + 100 + self.rng.below(1500);
        }
        if self.heal_at != 0 && self.now >= self.heal_at {
            self.net.heal();
            self.heal_at = 0;
        }
        if self.rng.chance(self.faults.swap) {
            self.begin_swap();
        }
    }

    fn crash(&mut self, id: NodeId) {
        let seed = self.rng.draw();
        let down = self.now + 10 + self.rng.below(800);
        let mut rng = self.rng.clone();
        let groups = self.groups.clone();
        let node = self.node(id);
        if let Some((stepped, wal)) = node.running.take() {
            // A term is announced only when it is durable, an index acknowledged only then: what others may have heard of
            // must be there after the power cut.
            let promised =
                groups.into_iter().filter_map(|group| Some((group, stepped.status(group)?.persisted)));
            node.promised = promised.collect();
            drop(stepped);
            // Everything that was not durable may be gone, in whole or in part.
            node.fs.crash(seed);
            drop(wal);
            node.disks.power_cut(&mut rng);
            node.down_until = down;
            self.crashes += 1;
        }
        self.waits.retain(|(node, _, _), _| *node != id);
        for client in &mut self.clients {
            client.busy = false;
        }
        for swap in self.swaps.values_mut() {
            swap.busy = false;
        }
    }

    fn step(&mut self) {
        self.now += 1;
        self.clock.0.store(self.now, std::sync::atomic::Ordering::Relaxed);
        for i in 0..self.nodes.len() {
            let id = self.nodes[i].id;
            if self.nodes[i].running.is_none() && self.now >= self.nodes[i].down_until {
                self.boot(id);
            }
        }
        for (from, to, message) in self.net.arrived(self.now) {
            if let Some((stepped, _)) = &mut self.node(to).running {
                stepped.deliver(from, message);
            }
        }
        self.meet();
        self.clients();
        self.swappers();
        for i in 0..self.nodes.len() {
            self.step_node(i);
        }
    }

    /// Handshakes: every pair that can talk both ways knows each other.
    fn meet(&mut self) {
        if !self.now.is_multiple_of(TICK_EVERY) {
            return;
        }
        let ids: Vec<NodeId> = self.nodes.iter().filter(|n| n.running.is_some()).map(|n| n.id).collect();
        for a in &ids {
            for b in ids.iter().filter(|b| *b != a) {
                if !self.net.is_cut(*a, *b)
                    && !self.net.is_cut(*b, *a)
                    && let Some((stepped, _)) = &mut self.node(*a).running
                {
                    stepped.accepted_by(*b);
                }
            }
        }
    }

    fn step_node(&mut self, i: usize) {
        let (now, calm) = (self.now, self.calm);
        let tick = (now + i as u64 * 3).is_multiple_of(TICK_EVERY);
        let lazy = !calm && self.rng.chance(300);
        let flush = calm || self.rng.chance(15);
        let Some((stepped, wal)) = &mut self.nodes[i].running else { return };
        stepped.set_wall_ms(now);
        if tick {
            stepped.tick(1);
        }
        stepped.turn();
        // A slow disk or a slow engine: acknowledgements and applying come later than the next turn.
        if !lazy {
            while wal.step() {}
            while stepped.step_log() {}
            stepped.turn();
            while stepped.step_apply() {}
            while stepped.step_serve() {}
            stepped.turn();
            if flush {
                stepped.flush().expect("the simulated engine flushes");
            }
        }
        let out = stepped.take_output();
        let id = self.nodes[i].id;
        let boots = self.nodes[i].boots;
        for event in out.events {
            self.on_event(id, event);
        }
        for (to, _, message) in out.send {
            let loss = if self.calm { 0 } else { self.faults.loss };
            self.note(message.group ^ message.from.rotate_left(7) ^ message.to.rotate_left(21));
            self.net.send(self.now, id, to, message, loss, &mut self.rng);
        }
        for (token, answer) in out.answers {
            if let Some(wait) = self.waits.remove(&(id, boots, token)) {
                self.on_answer(id, wait, answer);
            }
        }
    }

    fn note(&mut self, word: u64) {
        self.trace = (self.trace.rotate_left(5) ^ word ^ self.now).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn on_event(&mut self, id: NodeId, event: Event) {
        match event {
            Event::ReplicaDead { group, reason } => self.fail(&format!("{group} died on {id}: {reason}")),
            Event::LogFailed { reason } => self.fail(&format!("the log of {id} failed: {reason}")),
            Event::LeaderChanged { group, leader, term } => {
                let known = *self.leaders.entry((group, term)).or_insert(leader);
                if known != leader {
                    self.fail(&format!("{group} has two leaders in term {term}: {known} and {leader}"));
                }
            }
            Event::SnapshotInstalled { .. } => self.snapshots += 1,
            _ => {}
        }
    }

    /// A node that says it leads the group, or any that holds a replica.
    fn guess_leader(&mut self, group: GroupId) -> Option<NodeId> {
        let mut leading = Vec::new();
        for node in &self.nodes {
            if let Some((stepped, _)) = &node.running
                && stepped.status(group).is_some_and(|status| status.role == Role::Leader)
            {
                leading.push(node.id);
            }
        }
        if leading.is_empty() { None } else { Some(leading[self.rng.below(leading.len() as u64) as usize]) }
    }

    fn clients(&mut self) {
        for i in 0..self.clients.len() {
            if self.clients[i].busy && self.now < self.clients[i].retry_at {
                continue;
            }
            // In the calm, clients finish what they began.
            if !self.clients[i].busy && self.clients[i].value.is_none() && (self.calm || !self.rng.chance(40))
            {
                if !self.calm && self.rng.chance(3) {
                    self.read(self.clients[i].group);
                }
                continue;
            }
            let group = self.clients[i].group;
            let Some(at) = self.guess_leader(group) else { continue };
            let retry_at = self.now + 50 + self.rng.below(200);
            let boots = self.node(at).boots;
            let client = &mut self.clients[i];
            client.busy = true;
            client.retry_at = retry_at;
            let Some(stamp) = client.stamp else {
                let Some((stepped, _)) = &mut self.nodes[at.get() as usize - 1].running else { continue };
                let token = stepped.session_stamp(group);
                self.waits.insert((at, boots, token), Wait::Stamp { client: i });
                continue;
            };
            if client.value.is_none() {
                self.next_value += 1;
                client.seq += 1;
                client.value = Some(format!("v{}", self.next_value));
            }
            let value = client.value.clone().unwrap_or_default();
            self.tried.entry(group).or_default().insert(value.clone());
            let request = RequestId { client: client.id, stamp, seq: client.seq, acked_below: client.seq };
            let seq = client.seq;
            let payload = Bytes::from(format!("row-{}={value}", seq % 40));
            let proposal = Proposal { payload, request: Some(request), epoch: 1, urgent: false };
            let Some((stepped, _)) = &mut self.nodes[at.get() as usize - 1].running else { continue };
            let token = stepped.propose(group, proposal);
            self.waits.insert((at, boots, token), Wait::Write { client: i, seq });
        }
    }

    fn read(&mut self, group: GroupId) {
        // Half of the reads are a follower's that may lag by nothing: they must be as fresh as the leader's.
        let (at, level) = match self.rng.below(2) {
            0 => (self.guess_leader(group), ReadLevel::Linearizable),
            _ => {
                let members: Vec<NodeId> =
                    self.members.get(&group).into_iter().flatten().map(|id| id.node()).collect();
                let nth = self.rng.below(members.len().max(1) as u64) as usize;
                (members.get(nth).copied(), ReadLevel::Follower { max_lag: Duration::ZERO })
            }
        };
        let Some(at) = at else { return };
        let boots = self.node(at).boots;
        let must_hold = self.acknowledged.get(&group).into_iter().flatten().cloned().collect();
        if let Some((stepped, _)) = &mut self.node(at).running {
            let token = stepped.read_barrier(group, level);
            self.waits.insert((at, boots, token), Wait::Read { group, must_hold });
        }
    }

    fn on_answer(&mut self, at: NodeId, wait: Wait, answer: Answer) {
        match (wait, answer) {
            (Wait::Stamp { client }, Answer::Index(result)) => {
                self.clients[client].busy = false;
                self.clients[client].stamp = result.ok();
            }
            (Wait::Write { client, seq }, Answer::Proposed(result)) => {
                let client = &mut self.clients[client];
                if client.seq != seq {
                    // The second answer to a write that was sent twice.
                    return;
                }
                client.busy = false;
                match result {
                    Ok(_) => {
                        if let Some(value) = client.value.take() {
                            self.acknowledged.entry(client.group).or_default().insert(value);
                        }
                    }
                    Err(ProposeError::Rejected(Rejected::SessionExpired)) => {
                        // Possible only for a retry whose first answer was already let go of: it was applied.
                        if client.value.take().is_some() {
                            client.stamp = None;
                        }
                    }
                    Err(_) => {}
                }
            }
            (Wait::Read { group, must_hold }, Answer::Index(Ok(_))) => {
                self.reads += 1;
                let values = self.values(at, group);
                if let Some(missing) = must_hold.iter().find(|value| !values.contains_key(*value)) {
                    self.fail(&format!("a read of {group} on {at} does not see the acknowledged {missing}"));
                }
            }
            (Wait::Swap { group }, Answer::Destroyed(Ok(()))) => self.finish_swap(group),
            // The next look at the configuration says what is to do; the answer only ends the wait.
            (Wait::Swap { group }, _) => {
                if let Some(swap) = self.swaps.get_mut(&group) {
                    swap.busy = false;
                }
            }
            _ => {}
        }
    }

    fn values(&mut self, at: NodeId, group: GroupId) -> BTreeMap<String, u64> {
        let state = self.node(at).disks.state(group).unwrap_or_default();
        let mut counts = BTreeMap::new();
        for row in state.rows.values() {
            for value in String::from_utf8_lossy(row).split_terminator(';') {
                *counts.entry(value.to_owned()).or_insert(0) += 1;
            }
        }
        counts
    }

    fn begin_swap(&mut self) {
        let group = self.groups[self.rng.below(self.groups.len() as u64) as usize];
        if self.swaps.contains_key(&group) {
            return;
        }
        let members = &self.members[&group];
        let free: Vec<NodeId> =
            self.nodes.iter().map(|n| n.id).filter(|id| !members.iter().any(|m| m.node() == *id)).collect();
        let Some(target) = free.first() else { return };
        let source =
            *members.iter().nth(self.rng.below(members.len() as u64) as usize).expect("three members");
        let ordinal = self.next_ordinal.get_mut(&group).expect("counted");
        let target = ReplicaId::on(*target, *ordinal);
        *ordinal += 1;
        self.swaps.insert(group, Swap { group, source, target, step: SwapStep::Create, busy: false });
    }

    fn swappers(&mut self) {
        for group in self.groups.clone() {
            let Some(swap) = self.swaps.get(&group) else { continue };
            if swap.busy && !self.now.is_multiple_of(150) {
                continue;
            }
            let (source, target) = (swap.source, swap.target);
            let Some(leader) = self.guess_leader(group) else { continue };
            let leader_status = self
                .node(leader)
                .running
                .as_ref()
                .and_then(|(stepped, _)| stepped.status(group))
                .expect("it leads");
            let conf = &leader_status.conf_state;
            let has = |ids: &[u64], id: ReplicaId| ids.contains(&id.get());
            let target_made = self
                .node(target.node())
                .running
                .as_ref()
                .is_some_and(|(stepped, _)| stepped.status(group).is_some_and(|s| s.replica == target));
            let step = if leader_status.is_joint() {
                continue;
            } else if has(&conf.voters, target) && !has(&conf.voters, source) && !has(&conf.learners, source)
            {
                SwapStep::Fence
            } else if has(&conf.voters, target) && has(&conf.learners, source) {
                SwapStep::Remove
            } else if !target_made {
                SwapStep::Create
            } else if !has(&conf.learners, target) {
                SwapStep::AddLearner
            } else if leader_status.replica == source {
                SwapStep::Transfer
            } else {
                SwapStep::Joint
            };
            let at = match step {
                SwapStep::Create => target.node(),
                SwapStep::Fence => source.node(),
                _ => leader,
            };
            let stay =
                conf.voters.iter().find(|id| **id != source.get()).and_then(|id| ReplicaId::new(*id).ok());
            let boots = self.node(at).boots;
            let Some((stepped, _)) = &mut self.nodes[at.get() as usize - 1].running else { continue };
            let token = match step {
                SwapStep::Create => stepped.create_group(GroupSpec {
                    group,
                    replica: target,
                    descriptor: Bytes::new(),
                    epoch: 0,
                    initial: None,
                }),
                SwapStep::AddLearner => stepped.change(group, MemberChange::AddLearner(target)),
                SwapStep::Transfer => stepped.transfer_leader(group, stay.expect("three voters")),
                SwapStep::Joint => stepped
                    .change(group, MemberChange::EnterJoint { promote: vec![target], demote: vec![source] }),
                SwapStep::Remove => stepped.change(group, MemberChange::Remove(source)),
                SwapStep::Fence => stepped.destroy_replica(group, source),
            };
            self.waits.insert((at, boots, token), Wait::Swap { group });
            let swap = self.swaps.get_mut(&group).expect("looked at");
            (swap.step, swap.busy) = (step, true);
        }
    }

    fn finish_swap(&mut self, group: GroupId) {
        if let Some(swap) = self.swaps.remove(&group) {
            let members = self.members.get_mut(&group).expect("known");
            members.remove(&swap.source);
            members.insert(swap.target);
            self.swaps_done += 1;
            debug_assert_eq!(swap.group, group);
        }
    }

    /// Whether everybody is done and equal.
    fn settled(&mut self) -> bool {
        if !self.swaps.is_empty() || self.clients.iter().any(|c| c.value.is_some() || c.busy) {
            return false;
        }
        self.groups.clone().into_iter().all(|group| {
            let Some(leader) = self.guess_leader(group) else { return false };
            let last = |world: &mut World, id: NodeId| {
                world
                    .node(id)
                    .running
                    .as_ref()
                    .and_then(|(stepped, _)| stepped.status(group))
                    .map(|s| (s.applied, s.last_index))
            };
            let Some((applied, last_index)) = last(self, leader) else { return false };
            applied == last_index
                && self.members[&group]
                    .clone()
                    .into_iter()
                    .all(|m| last(self, m.node()) == Some((applied, last_index)))
        })
    }

    fn check_end(&mut self) {
        if !self.settled() {
            let swaps: Vec<_> = self.swaps.values().map(|s| (s.group, s.step, s.source, s.target)).collect();
            let stuck: Vec<_> = self.clients.iter().filter(|c| c.value.is_some()).map(|c| c.group).collect();
            let statuses: Vec<_> = self
                .nodes
                .iter()
                .flat_map(|n| self.groups.iter().filter_map(move |g| n.running.as_ref()?.0.status(*g)))
                .map(|s| {
                    format!(
                        "{}:{} {:?} t{} {}/{}/{}",
                        s.group, s.replica, s.role, s.term, s.applied, s.commit, s.last_index
                    )
                })
                .collect();
            self.fail(&format!(
                "no calm after the faults ended: swaps {swaps:?}, writes {stuck:?}, {statuses:#?}"
            ));
        }
        for group in self.groups.clone() {
            let members = self.members[&group].clone();
            let acknowledged = self.acknowledged.remove(&group).unwrap_or_default();
            let tried = self.tried.remove(&group).unwrap_or_default();
            let mut states = Vec::new();
            for member in &members {
                let values = self.values(member.node(), group);
                if let Some(lost) = acknowledged.iter().find(|value| !values.contains_key(*value)) {
                    self.fail(&format!("{member} of {group} lost the acknowledged {lost}"));
                }
                if let Some((value, times)) = values.iter().find(|(_, times)| **times > 1) {
                    self.fail(&format!("{member} of {group} applied {value} {times} times"));
                }
                if let Some(phantom) = values.keys().find(|value| !tried.contains(*value)) {
                    self.fail(&format!("{member} of {group} holds {phantom}, which nobody wrote"));
                }
                states.push(self.node(member.node()).disks.state(group).map(|s| (s.rows, s.system)));
            }
            if states.windows(2).any(|pair| pair[0] != pair[1]) {
                self.fail(&format!("the replicas of {group} differ"));
            }
            for i in 0..self.nodes.len() {
                let id = self.nodes[i].id;
                let here = self.nodes[i].running.as_ref().and_then(|(stepped, _)| stepped.status(group));
                if here.is_some() && !members.iter().any(|m| m.node() == id) {
                    self.fail(&format!("{id} holds a replica of {group} that it should not"));
                }
            }
        }
    }
}
