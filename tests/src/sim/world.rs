//! The world: who there is, and what a millisecond is.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, atomic::Ordering},
};

use pontoon_proto::{GroupId, NodeId, ReplicaId, v1};
use pontoon_raftstore::{Answer, Event, GroupSpec, GroupStatus, Mandate, Role};
use pontoon_shard::{MetaState, mover::orders};

use super::{
    checks::Checks,
    clients::{Client, Histories},
    coverage::{Coverage, Kind},
    faults::Injury,
    machines::Book,
    net::{Fate, Net, Odds, Packet, Sender},
    node::{Node, Running, SimClock, TICK_MS},
    operator::address,
    plan::Plan,
    timeline::Timeline,
    work::{Asked, Call, ClientAsk, ClientCall, Reply, Wait},
};
use crate::Rng;

/// How long a replica may take to be removed, in milliseconds.
const FENCING_MS: u64 = 15;

/// Counts of what happened, so that a run that tests nothing is noticed.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Tally {
    pub(super) operations: u64,
    /// Moves whose target was given up. This and the next one before the end only: then one node is stopped, to see the others do
    /// without it, and who waits for that one rightly gives up.
    pub(super) given_up: u64,
    /// Moves that were called stuck.
    pub(super) stuck: u64,
    pub(super) drains: u64,
    pub(super) plans: u64,
    pub(super) snapshots: u64,
    pub(super) replaced: u64,
    /// Replicas that fell asleep.
    pub(super) slept: u64,
}

pub(super) struct World {
    pub(super) plan: Plan,
    pub(super) rng: Rng,
    pub(super) now: u64,
    /// Events within the millisecond.
    moments: u64,
    pub(super) clock: Arc<SimClock>,
    pub(super) nodes: Vec<Node>,
    pub(super) net: Net,
    pub(super) clients: Vec<Client>,
    pub(super) histories: Histories,
    pub(super) waits: BTreeMap<(NodeId, u64, u64), Wait>,
    pub(super) next_call: u64,
    /// The newest word of each replica.
    pub(super) seen: BTreeMap<(GroupId, NodeId), GroupStatus>,
    /// The last word of the replicas of processes that ended, until they are heard again: they hold their configurations yet.
    pub(super) held: BTreeMap<(GroupId, NodeId), v1::ConfState>,
    pub(super) checks: Checks,
    pub(super) book: Book,
    /// The meta group's state, as the node has it that has applied most.
    pub(super) meta: Arc<MetaState>,
    pub(super) injury: Option<Injury>,
    /// Replicas that a damaged disk has killed.
    pub(super) dead: BTreeSet<(GroupId, NodeId)>,
    pub(super) coverage: Coverage,
    pub(super) timeline: Timeline,
    pub(super) tally: Tally,
    /// Nothing strikes any more.
    pub(super) calm: bool,
    pub(super) heal_at: u64,
    /// What is to strike whom, and when.
    pub(super) ambush: Option<(u64, NodeId, Kind)>,
    /// Forged nodes that were not believed, and why.
    pub(super) refusals: Vec<(NodeId, String)>,
}

impl World {
    /// The first node of a cluster, and as many as will join it.
    pub(super) fn new(plan: Plan) -> World {
        let mut world = World {
            plan,
            rng: Rng::new(plan.seed),
            now: 0,
            moments: 0,
            clock: Arc::new(SimClock(0.into())),
            nodes: Vec::new(),
            net: Net::default(),
            clients: Vec::new(),
            histories: Histories::default(),
            waits: BTreeMap::new(),
            next_call: 0,
            seen: BTreeMap::new(),
            held: BTreeMap::new(),
            checks: Checks::default(),
            book: Book::default(),
            meta: Arc::default(),
            injury: None,
            dead: BTreeSet::new(),
            coverage: Coverage::default(),
            timeline: Timeline::default(),
            tally: Tally::default(),
            calm: true,
            heal_at: 0,
            ambush: None,
            refusals: Vec::new(),
        };
        for id in 1..=plan.nodes {
            world.add_node(NodeId::new(id).expect("small"), address(id, 0));
        }
        world
    }

    pub(super) fn add_node(&mut self, id: NodeId, address: String) {
        let node = Node::new(id, address, &mut self.rng);
        self.nodes.push(node);
        self.boot(self.nodes.len() - 1);
    }

    pub(super) fn fail(&self, what: &str) -> ! {
        panic!("at {} ms: {what}", self.now)
    }

    pub(super) fn say(&mut self, text: impl Into<String>) {
        self.timeline.say(self.now, text.into());
    }

    /// A number for an event that no other event has, in the order of events.
    pub(super) fn moment(&mut self) -> u64 {
        self.moments += 1;
        self.now << 20 | self.moments
    }

    /// Where a node is in the list, if there is such a node.
    pub(super) fn at(&self, id: NodeId) -> Option<usize> {
        self.nodes.iter().position(|node| node.id == id)
    }

    /// The groups that were founded, the meta group first.
    pub(super) fn groups(&self) -> Vec<GroupId> {
        (1..=self.plan.groups + 1).map(GroupId).collect()
    }

    pub(super) fn boot(&mut self, i: usize) {
        let (seed, now, clock) = (self.rng.draw(), self.now, self.clock.clone());
        let lease = self.plan.lease;
        let node = &mut self.nodes[i];
        let id = node.id;
        let report = match node.boot(now, clock, &self.book, (seed, lease)) {
            Ok(report) => report,
            Err(error) if node.rotten => {
                self.say(format!("{id} does not open: {error}"));
                return self.lose(i);
            }
            Err(error) => self.fail(&format!("{id} does not open: {error}")),
        };
        let (promised, rotten) = (std::mem::take(&mut node.promised), node.rotten);
        if !report.damaged_groups.is_empty() {
            let groups: Vec<String> = report.damaged_groups.keys().map(GroupId::to_string).collect();
            self.say(format!("{id} starts, damaged: {}", groups.join(" ")));
        } else {
            self.say(format!("{id} starts"));
        }
        let Some(running) = &self.nodes[i].running else { return };
        for (group, index) in promised {
            let view = running.wal.group(group);
            let last = view.as_ref().map_or(0, |view| view.last_index);
            let is_known = rotten && view.is_none_or(|view| view.damaged.is_some());
            if last < index && !is_known {
                self.fail(&format!("{id} promised {group} up to {index}, its log ends at {last}"));
            }
        }
    }

    /// One millisecond.
    pub(super) fn step(&mut self) {
        self.now += 1;
        self.moments = 0;
        self.clock.0.store(self.now, Ordering::Relaxed);
        for i in 0..self.nodes.len() {
            let node = &self.nodes[i];
            if node.running.is_none() && !node.gone && self.now >= node.down_until {
                self.boot(i);
            } else if node.paused_until != 0 && self.now >= node.paused_until {
                self.resume(i);
            }
        }
        for (from, to, packet) in self.net.arrived(self.now) {
            let Some(i) = self.at(to) else { continue };
            if self.nodes[i].paused_until != 0 {
                self.nodes[i].inbox.push((from, packet));
            } else {
                self.take(i, from, packet);
            }
        }
        if self.now.is_multiple_of(TICK_MS) {
            self.meet();
        }
        if self.now.is_multiple_of(4) {
            self.read_map();
        }
        self.run_clients();
        self.run_operator();
        self.heed_map();
        for i in 0..self.nodes.len() {
            self.step_node(i);
        }
        let wrong = self.book.lock().wrong.take();
        if let Some(wrong) = wrong {
            self.fail(&wrong);
        }
    }

    /// Follows the map of the cluster, and makes founding replicas that nobody came to make.
    fn read_map(&mut self) {
        for node in self.nodes.iter().filter(|node| node.is_up()) {
            let Some(running) = &node.running else { continue };
            let meta = running.machines.meta();
            let state = meta.borrow();
            if state.version > self.meta.version {
                self.meta = state.clone();
            }
        }
        if !self.now.is_multiple_of(100) {
            return;
        }
        // The last word of a replica that was removed since says nothing any more.
        let mut seen = std::mem::take(&mut self.seen);
        seen.retain(|(group, node), _| {
            let running = self.at(*node).and_then(|i| self.nodes[i].running.as_ref());
            running.is_some_and(|running| running.stepped.status(*group).is_some())
        });
        self.seen = seen;
        let mut held = std::mem::take(&mut self.held);
        held.retain(|(group, node), _| {
            let running = self.at(*node).and_then(|i| self.nodes[i].running.as_ref());
            running.is_none_or(|running| running.wal.group(*group).is_some())
        });
        self.held = held;
        let meta = self.meta.clone();
        for shard in meta.shards.values().filter(|shard| shard.state() == v1::ShardState::Live) {
            for replica in shard.initial.iter().filter(|id| shard.voters.contains(id)) {
                let Ok(replica) = ReplicaId::new(*replica) else { continue };
                let group = GroupId(shard.group);
                let Some(i) = self.at(replica.node()).filter(|i| self.nodes[*i].is_up()) else { continue };
                let boots = self.nodes[i].boots;
                let Some(running) = &mut self.nodes[i].running else { continue };
                let fenced = running.wal.tombstone(group).is_some_and(|least| least > replica.get());
                if fenced || running.stepped.status(group).is_some() || running.wal.group(group).is_some() {
                    continue;
                }
                let token = running.stepped.create_group(spec(shard, replica, true));
                self.waits.insert((replica.node(), boots, token), Wait::Nobody);
            }
        }
    }

    /// The process was paused. Its clock tells at once how late it is; what it had to do next may have been to look at that, or
    /// to take in what has come meanwhile.
    fn resume(&mut self, i: usize) {
        let now = self.now;
        let node = &mut self.nodes[i];
        node.paused_until = 0;
        let id = node.id;
        let late = now.saturating_sub(node.next_tick) / node.tick_every;
        node.next_tick += (late + 1) * node.tick_every;
        let (wall_ms, clock) = (node.wall_ms(now), node.clock(now));
        let inbox = std::mem::take(&mut node.inbox);
        if let Some(running) = &mut node.running {
            running.stepped.set_wall_ms(wall_ms);
            running.stepped.set_clock(clock);
        }
        let ticks_first = self.rng.chance(500);
        self.say(format!("{id} goes on after {} ticks", late + 1));
        if ticks_first {
            self.tick_late(i, late + 1);
        }
        for (from, packet) in inbox {
            self.take(i, from, packet);
        }
        if !ticks_first {
            self.tick_late(i, late + 1);
        }
    }

    fn tick_late(&mut self, i: usize, ticks: u64) {
        if let Some(running) = &mut self.nodes[i].running {
            running.stepped.tick(ticks);
        }
    }

    pub(super) fn send(&mut self, from: Sender, to: NodeId, group: GroupId, packet: Packet) {
        let faults = self.plan.faults;
        let odds = match self.calm {
            true => Odds::default(),
            false => Odds { loss: faults.loss, duplicate: faults.duplicate, held_up: faults.held_up },
        };
        let fate = self.net.send(self.now, from, to, packet, odds, &mut self.rng);
        let kind = match fate {
            Fate::Sent => return,
            Fate::Lost => Kind::Loss,
            Fate::Twice => Kind::Duplicate,
            Fate::Clogged => Kind::Clog,
            // Counted once, where the link was cut.
            Fate::Cut => return,
        };
        let ends = [Some(to), from];
        self.cover(kind, &|node| ends.contains(&Some(node)), Some(group));
    }

    /// A packet has arrived at a node.
    fn take(&mut self, i: usize, from: Sender, packet: Packet) {
        let id = self.nodes[i].id;
        let boots = self.nodes[i].boots;
        let Some(running) = &mut self.nodes[i].running else { return };
        match packet {
            Packet::Peer(message, token) => {
                if let Some(from) = from.filter(|from| running.stepped.admits(*from, token)) {
                    running.stepped.deliver(from, *message);
                }
            }
            Packet::Reply(_, Reply::Vouched(token, verdict)) => self.hear_vouched(i, token, verdict),
            Packet::Reply(call, reply) => {
                if let (Some(driver), Some(from)) = (&mut running.driver, from) {
                    driver.hear(call, from, reply);
                }
            }
            Packet::Call(call, what) => {
                if let Some(from) = from {
                    self.serve(i, from, call, what);
                }
            }
            Packet::Client(ClientCall { client, group, attempt, what }) => {
                let token = match what {
                    ClientAsk::Stamp => running.stepped.session_stamp(group),
                    ClientAsk::Propose(proposal) => running.stepped.propose(group, *proposal),
                    ClientAsk::Read(level) => running.stepped.read_barrier(group, level),
                };
                self.waits.insert((id, boots, token), Wait::Client { client, attempt });
            }
        }
    }

    /// What a node does for a driver.
    fn serve(&mut self, i: usize, from: NodeId, call: u64, what: Call) {
        let (id, boots) = (self.nodes[i].id, self.nodes[i].boots);
        let Some(running) = &mut self.nodes[i].running else { return };
        if let Call::Announce(hello) = what {
            return self.serve_announce(i, from, call, hello);
        }
        let term = what.term();
        let newest = running.driver_term.max(term);
        running.driver_term = newest;
        if term != 0 && term < newest {
            let reason = format!("a driver of term {term} was followed by one of term {newest}");
            return self.send(Some(id), from, GroupId::META, Packet::Reply(call, Reply::Failed(reason)));
        }
        let mut asked = Asked::Plain;
        let (group, token) = match what {
            Call::Announce(_) | Call::Report => {
                return self.send(Some(id), from, GroupId::META, Packet::Reply(call, Reply::Done));
            }
            Call::Status(group) => {
                let status = v1::ReplicaStatusReply {
                    replica: running.stepped.status(group).as_ref().map(orders::replica_info),
                    min_replica: running.wal.tombstone(group).unwrap_or(0),
                    ..Default::default()
                };
                return self.send(
                    Some(id),
                    from,
                    group,
                    Packet::Reply(call, Reply::Status(Box::new(status))),
                );
            }
            Call::Confirm(request) => {
                let mandate = mandate(request.mandate);
                (GroupId(request.group), running.stepped.members(GroupId(request.group), mandate))
            }
            Call::Ensure(request) => {
                let shard = request.shard.as_ref().expect("every driver names the shard");
                let spec = spec(shard, replica_id(request.replica), request.initial.is_some());
                (spec.group, running.stepped.create_group(spec))
            }
            Call::Change(request) => {
                let change = orders::to_change(request.change).expect("every driver names the change");
                let group = GroupId(request.group);
                (group, running.stepped.change_by(group, change, mandate(request.mandate)))
            }
            Call::Transfer(request) => {
                let (group, to) = (GroupId(request.group), replica_id(request.to));
                let token = match request.mandate {
                    Some(given) => running.stepped.transfer_leader_by(group, to, orders::to_mandate(given)),
                    None => running.stepped.transfer_leader(group, to),
                };
                (group, token)
            }
            Call::OtherSource(request) => {
                let group = GroupId(request.group);
                (group, running.stepped.other_source(group))
            }
            Call::Verify(request) => {
                let group = GroupId(request.group);
                (group, running.stepped.verify(group))
            }
            Call::Fence(request) => {
                let (group, replica) = (GroupId(request.group), replica_id(request.replica));
                asked = Asked::Fence(group, replica);
                (group, running.stepped.destroy_replica(group, replica))
            }
        };
        if let Asked::Fence(group, replica) = asked {
            self.check_fence(group, replica);
            // What is durable first, the tombstone or that the data is gone, shows if the engine flushes and the node is struck.
            self.nodes[i].flushes_until = self.now + FENCING_MS;
            self.cut_power_soon(id);
        }
        self.waits.insert((id, boots, token), Wait::Call { from, id: call, what: asked });
        self.timeline.note(group.0 ^ call << 8);
    }

    fn step_node(&mut self, i: usize) {
        let (now, calm) = (self.now, self.calm);
        if !self.nodes[i].is_up() {
            return;
        }
        self.drive(i);
        // A slow disk or a slow engine: acknowledgements and applying come later than the next turn.
        let lazy = !calm && self.rng.chance(300);
        let flush = self.rng.chance(match (calm, now < self.nodes[i].flushes_until) {
            (true, _) => 60,
            (false, true) => 300,
            (false, false) => 15,
        });
        self.stir_disk(i);
        let node = &mut self.nodes[i];
        let (wall_ms, clock) = (node.wall_ms(now), node.clock(now));
        let ticks = now >= node.next_tick;
        if ticks {
            node.next_tick += node.tick_every;
        }
        let (id, boots, frozen) = (node.id, node.boots, node.frozen);
        let Some(Running { stepped, wal, .. }) = &mut node.running else { return };
        stepped.set_wall_ms(wall_ms);
        stepped.set_clock(clock);
        if ticks {
            stepped.tick(1);
        }
        stepped.turn();
        if !lazy {
            while wal.step() {}
            while stepped.step_log() {}
            stepped.turn();
            while !frozen && stepped.step_apply() {}
            // Now and then the rest of what is read of a state waits for the next turn.
            while stepped.step_serve() && (calm || !self.rng.chance(50)) {}
            stepped.turn();
            if flush && !frozen {
                stepped.flush().expect("the simulated engine flushes");
            }
        }
        let (out, boot_token) = (stepped.take_output(), wal.incarnation());
        for status in out.statuses {
            self.check_status(i, &status);
            if status.pull.is_some() {
                self.lie_in_wait(id);
            }
            let sleeps = status.sleeping;
            self.held.remove(&(status.group, id));
            let before = self.seen.insert((status.group, id), status);
            self.tally.slept += u64::from(sleeps && before.is_some_and(|before| !before.sleeping));
        }
        for event in out.events {
            self.hear(i, event);
        }
        for (to, _, message) in out.send {
            self.timeline
                .note(message.group ^ message.from.rotate_left(7) ^ message.to.rotate_left(21) ^ now << 32);
            self.send(Some(id), to, GroupId(message.group), Packet::Peer(Box::new(message), boot_token));
        }
        for (token, answer) in out.answers {
            if let Some(wait) = self.waits.remove(&(id, boots, token)) {
                self.answered(i, wait, answer);
            }
        }
    }

    fn hear(&mut self, i: usize, event: Event) {
        let id = self.nodes[i].id;
        match event {
            Event::ReplicaDead { group, reason } => {
                self.say(format!("{group} dies on {id}: {reason}"));
                if !self.nodes[i].rotten {
                    self.fail(&format!("{group} died on {id}, whose disk nobody hurt: {reason}"));
                }
                self.dead.insert((group, id));
            }
            Event::LogFailed { reason } => {
                self.say(format!("the log of {id} fails: {reason}"));
                if !self.nodes[i].may_fail {
                    self.fail(&format!("the log of {id} failed, whose disk works: {reason}"));
                }
                self.restart_after_failure(i);
            }
            Event::EngineFailed { reason } => self.fail(&format!("the engine of {id} failed: {reason}")),
            Event::LeaderChanged { group, leader, term } => {
                self.check_leader(group, leader, term);
                if leader.node() == id {
                    self.say(format!("{leader} leads {group} in term {term}"));
                }
            }
            Event::SnapshotInstalled { group, index, .. } => {
                self.tally.snapshots += 1;
                self.checks.switched.insert((group, id), index);
                self.lie_in_wait(id);
                self.say(format!("{group} on {id} stands at a snapshot of {index}"));
            }
            Event::MessageRefused { from, group, reason } => {
                self.say(format!("{id} refuses a message of {from} for {group}: {reason}"));
            }
            _ => {}
        }
    }

    fn answered(&mut self, i: usize, wait: Wait, answer: Answer) {
        let id = self.nodes[i].id;
        match (wait, answer) {
            (Wait::Client { client, attempt }, answer) => self.client_hears(i, client, attempt, answer),
            (Wait::Call { from, id: call, what }, answer) => {
                let reply = match (&what, answer) {
                    (_, Answer::Members(Ok((conf_state, index)))) => {
                        let conf_state = Some(conf_state);
                        Reply::Members(Box::new(v1::ConfirmMembersReply { refusal: None, conf_state, index }))
                    }
                    (Asked::Plain, Answer::Index(Ok(_))) => Reply::Done,
                    (Asked::Fence(group, replica), Answer::Destroyed(Ok(()))) => {
                        // An order that was held up says nothing of a later replica.
                        if self.seen.get(&(*group, id)).is_none_or(|seen| seen.replica <= *replica) {
                            self.seen.remove(&(*group, id));
                            self.held.remove(&(*group, id));
                            self.dead.remove(&(*group, id));
                        }
                        self.say(format!("{replica} of {group} is gone from {id}"));
                        Reply::Done
                    }
                    (_, Answer::Done(Ok(())) | Answer::Replica(Ok(_)) | Answer::Destroyed(Ok(()))) => {
                        Reply::Done
                    }
                    (_, other) => Reply::Failed(format!("{other:?}")),
                };
                self.send(Some(id), from, GroupId::META, Packet::Reply(call, reply));
            }
            (Wait::Barrier { term }, Answer::Index(result)) => {
                if let Some(driver) = self.nodes[i].driver().filter(|driver| driver.term == term) {
                    driver.begin(result.is_ok());
                }
            }
            (Wait::Announce { from, id, token }, Answer::Proposed(result)) => {
                self.announced(i, (from, id, token), result);
            }
            (Wait::Commit { term, subject }, Answer::Proposed(result)) => {
                self.committed(i, term, subject, result);
            }
            _ => {}
        }
    }

    /// Nodes that say they lead a group.
    pub(super) fn leaders(&self, group: GroupId) -> Vec<usize> {
        let nodes = self.nodes.iter().enumerate();
        let leads = |node: &Node| {
            node.running.is_some()
                && self.seen.get(&(group, node.id)).is_some_and(|status| status.role == Role::Leader)
        };
        nodes.filter(|(_, node)| leads(node)).map(|(i, _)| i).collect()
    }

    /// Ends a node's process.
    pub(super) fn end(&mut self, i: usize, power_cut: bool, down_for: u64) {
        let groups = self.groups();
        let node = &mut self.nodes[i];
        if node.running.is_none() {
            return;
        }
        let id = node.id;
        node.end(power_cut, &groups, &mut self.rng);
        node.down_until = self.now + down_for;
        self.waits.retain(|(at, _, _), _| *at != id);
        let ended = self.seen.extract_if(.., |(_, at), _| *at == id);
        self.held.extend(ended.map(|(at, status)| (at, status.conf_state)));
        self.checks.forget(id);
        for other in 0..self.nodes.len() {
            if self.rng.chance(500)
                && self.nodes[other].is_up()
                && let Some(running) = &mut self.nodes[other].running
            {
                running.stepped.unreachable(id);
            }
        }
    }
}

impl Node {
    pub(super) fn driver(&mut self) -> Option<&mut super::driver::Driver> {
        self.running.as_mut()?.driver.as_mut()
    }
}

fn replica_id(id: u64) -> ReplicaId {
    ReplicaId::new(id).expect("every driver names replicas that there may be")
}

fn mandate(mandate: Option<v1::Mandate>) -> Mandate {
    orders::to_mandate(mandate.expect("every driver has one"))
}

/// What a replica of a shard is made from.
pub(super) fn spec(shard: &v1::Shard, replica: ReplicaId, founding: bool) -> GroupSpec {
    let conf = v1::ConfState { voters: shard.initial.clone(), ..Default::default() };
    GroupSpec {
        group: GroupId(shard.group),
        replica,
        descriptor: prost::Message::encode_to_vec(shard).into(),
        epoch: shard.epoch,
        initial: founding.then_some(conf),
    }
}
