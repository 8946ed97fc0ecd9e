//! A cluster whose faults are chosen one by one, with clients at work and all checks of a simulation on.

use pontoon_proto::{GroupId, NodeId, ReplicaId, v1};
use pontoon_raftstore::{GroupStatus, Role};
use pontoon_shard::engine::MemoryDisk;
use pontoon_wal::sim::{SimFs, SimImage};
use v1::MovePhase;

use super::{
    faults::Injury,
    machines::Book,
    net::{Packet, Sender},
    node::Node,
    operator::REPLICAS,
    plan::{Faults, Plan},
    world::World,
};

/// How long anything that must happen may take.
const PATIENCE_MS: u64 = 30_000;

/// A founded cluster. Every method panics if a check of the simulation fails meanwhile.
pub struct Scenario {
    pub(super) world: World,
}

/// What was on its way to a replica, to be sent again.
pub struct Captured(Vec<(Sender, NodeId, Packet)>);

impl Captured {
    /// Whether nothing was on its way.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The log of a node as it was.
pub struct OldLog(SimImage);

/// All disks of a node as they were.
pub struct OldDisks(SimImage, MemoryDisk);

impl Scenario {
    /// Founds a cluster of so many nodes and predicates.
    pub fn new(seed: u64, nodes: u64, groups: u64) -> Scenario {
        Scenario::with_replicas(seed, nodes, groups, REPLICAS)
    }

    /// Founds a cluster whose predicates have so many voters each.
    pub fn with_replicas(seed: u64, nodes: u64, groups: u64, replicas: u32) -> Scenario {
        let mut world = World::new(Plan {
            seed,
            nodes,
            groups,
            replicas,
            steps: 0,
            lease: seed % 2 == 1,
            repair_after_ms: 0,
            of_moves: false,
            aims: false,
            faults: Faults::default(),
        });
        world.found();
        world.calm = false;
        Scenario { world }
    }

    /// Lets time pass.
    pub fn pass(&mut self, ms: u64) {
        for _ in 0..ms {
            self.world.step();
        }
    }

    /// Lets time pass until something is so.
    pub fn until(&mut self, what: &str, mut is_so: impl FnMut(&Scenario) -> bool) {
        for _ in 0..PATIENCE_MS {
            if is_so(self) {
                return;
            }
            self.world.step();
        }
        self.world.fail(&format!("waited in vain until {what}"));
    }

    fn place(&self, node: u64) -> usize {
        let id = NodeId::new(node).expect("a node");
        self.world.at(id).expect("a node of the cluster")
    }

    /// What a replica knows of itself; `None` if there is none.
    pub fn status(&self, group: u64, node: u64) -> Option<GroupStatus> {
        let running = self.world.nodes[self.place(node)].running.as_ref()?;
        running.stepped.status(GroupId(group))
    }

    /// The node that leads a group in the highest term, if any does.
    pub fn leader(&self, group: u64) -> Option<u64> {
        let leads = |id: &u64| Some((self.status(group, *id).filter(|s| s.role == Role::Leader)?.term, *id));
        let ids: Vec<u64> = self.world.nodes.iter().map(|node| node.id.get()).collect();
        ids.iter().filter_map(leads).max().map(|(_, id)| id)
    }

    /// The nodes of a group's voters, as its leader has applied them.
    pub fn voters(&self, group: u64) -> Vec<u64> {
        let status = self.leader(group).and_then(|leader| self.status(group, leader));
        let voters = status.map(|status| status.conf_state.voters).unwrap_or_default();
        let node = |id: &u64| ReplicaId::new(*id).ok().map(|replica| replica.node().get());
        voters.iter().filter_map(node).collect()
    }

    /// Operations that clients had an answer for.
    pub fn operations(&self) -> u64 {
        self.world.tally.operations
    }

    /// Snapshots that were switched to.
    pub fn snapshots(&self) -> u64 {
        self.world.tally.snapshots
    }

    /// Cuts all links of a node.
    pub fn isolate(&mut self, node: u64) {
        let one = NodeId::new(node).expect("a node");
        for other in 0..self.world.nodes.len() {
            let other = self.world.nodes[other].id;
            self.world.net.cut(one, other);
            self.world.net.cut(other, one);
        }
    }

    /// Cuts the links between the nodes of a set and all others.
    pub fn split(&mut self, side: &[u64]) {
        let ids: Vec<NodeId> = self.world.nodes.iter().map(|node| node.id).collect();
        let here = |id: &NodeId| side.contains(&id.get());
        for a in &ids {
            for b in ids.iter().filter(|b| here(a) != here(b)) {
                self.world.net.cut(*a, *b);
            }
        }
    }

    /// Ends every cut.
    pub fn heal(&mut self) {
        self.world.net.heal();
    }

    /// Cuts the power of a node for a while.
    pub fn crash(&mut self, node: u64, down_ms: u64) {
        let i = self.place(node);
        self.world.end(i, true, down_ms);
    }

    /// Stops a process for a while.
    pub fn pause(&mut self, node: u64, ms: u64) {
        let (i, until) = (self.place(node), self.world.now + ms);
        self.world.nodes[i].paused_until = until;
    }

    /// Sets a wall clock forward or back.
    pub fn jump(&mut self, node: u64, ms: i64) {
        let i = self.place(node);
        self.world.nodes[i].wall_ahead_ms += ms;
    }

    /// From now on a node's state machines stand still, or go on.
    pub fn freeze(&mut self, node: u64, frozen: bool) {
        let i = self.place(node);
        self.world.nodes[i].frozen = frozen;
    }

    /// Asks the meta group for a move of a group's voter from one node to another.
    pub fn start_move(&mut self, group: u64, from: u64, to: u64) {
        self.change(group, v1::MoveKind::Replace, from, to);
    }

    /// Asks the meta group for another voter of a group, on a node without one.
    pub fn add_voter(&mut self, group: u64, to: u64) {
        self.change(group, v1::MoveKind::Add, 0, to);
    }

    /// Asks the meta group for a voter less.
    pub fn remove_voter(&mut self, group: u64, from: u64) {
        self.change(group, v1::MoveKind::Remove, from, 0);
    }

    fn change(&mut self, group: u64, kind: v1::MoveKind, from: u64, to: u64) {
        let on = |id: &&u64| ReplicaId::new(**id).is_ok_and(|replica| replica.node().get() == from);
        let shard = self.world.meta.shards.get(&group).expect("the group is in the map");
        let source = match from {
            0 => 0,
            _ => *shard.voters.iter().find(on).expect("the source votes"),
        };
        self.world.order(v1::meta_command::Body::StartMove(v1::StartMove {
            group,
            kind: kind.into(),
            source,
            target_node: to,
            ..Default::default()
        }));
    }

    /// Asks the meta group to take a group's move back.
    pub fn cancel_move(&mut self, group: u64) {
        let id = self.world.meta.running_move(group).expect("a move runs").id;
        self.world.order(v1::meta_command::Body::CancelMove(v1::CancelMove { id, ..Default::default() }));
    }

    /// Moves that have been begun so far.
    pub fn moves(&self) -> u64 {
        self.world.meta.next_move - 1
    }

    /// From now on so many of a thousand peers' messages arrive twice.
    pub fn duplicate(&mut self, permille: u64) {
        self.world.plan.faults.duplicate = permille;
    }

    /// The next chunks of a state that reach a node have a flipped bit.
    pub fn garble_chunks(&mut self, node: u64, chunks: u64) {
        self.world.net.garble(NodeId::new(node).expect("a node"), chunks);
    }

    /// Chunks that were garbled and have arrived.
    pub fn garbled(&self) -> u64 {
        self.world.net.garbled
    }

    /// How long a node may be silent until nobody waits for it.
    pub fn repair_after(&mut self, ms: u64) {
        self.world.plan.repair_after_ms = ms;
    }

    /// The phase of a group's move that has not ended.
    pub fn phase(&self, group: u64) -> Option<MovePhase> {
        self.world.meta.running_move(group).map(|mv| mv.phase())
    }

    /// From now on every packet for a group on a node is kept, too.
    pub fn capture(&mut self, group: u64, node: u64) {
        self.world.net.capture(NodeId::new(node).expect("a node"), GroupId(group));
    }

    /// What was kept.
    pub fn captured(&mut self) -> Captured {
        Captured(self.world.net.captured())
    }

    /// Sends what was kept once more.
    pub fn replay(&mut self, captured: &Captured) {
        for (from, to, packet) in &captured.0 {
            self.world.net.deliver_again(self.world.now, *from, *to, packet.clone());
        }
    }

    /// A node's log as it is now.
    pub fn old_log(&self, node: u64) -> OldLog {
        OldLog(self.world.nodes[self.place(node)].fs.image())
    }

    /// Ends a node's process, puts an old log in the place of its log and starts it again. Its engine keeps what it has.
    /// Replicas there may die from now on, and are replaced.
    pub fn set_back(&mut self, node: u64, log: &OldLog) {
        let i = self.place(node);
        self.world.end(i, false, 10);
        self.world.nodes[i].fs.restore(&log.0);
        self.world.nodes[i].rotten = true;
        self.world.nodes[i].promised.clear();
        self.world.injury = Some(Injury::of(self.world.nodes[i].id, self.world.now + 2_000));
    }

    /// The disks of a node as they are now.
    pub fn old_disks(&self, node: u64) -> OldDisks {
        let node = &self.world.nodes[self.place(node)];
        OldDisks(node.fs.image(), node.disk.image())
    }

    /// Ends a node's process and starts it again from old disks, or from empty ones. It is given up after a while.
    pub fn forge(&mut self, node: u64, disks: Option<&OldDisks>) {
        let i = self.place(node);
        self.world.end(i, false, 10);
        let now = self.world.now;
        let node = &mut self.world.nodes[i];
        (node.fs, node.disk) = match disks {
            Some(OldDisks(log, engine)) => (SimFs::from_image(log), engine.image()),
            None => (SimFs::new(), MemoryDisk::new()),
        };
        (node.forged, node.rotten) = (true, true);
        node.promised.clear();
        self.world.injury = Some(Injury::of(self.world.nodes[i].id, now + 3_000));
    }

    /// What others have said to a node that they take for a copy, an old image or an empty disk.
    pub fn refusals(&self, node: u64) -> Vec<&str> {
        let of = self.world.refusals.iter().filter(|(id, _)| id.get() == node);
        of.map(|(_, reason)| reason.as_str()).collect()
    }

    /// Whether the meta group vouches for what runs on a node.
    pub fn is_vouched_for(&self, node: u64) -> bool {
        self.world.nodes[self.place(node)].running.as_ref().is_some_and(|running| running.vouched)
    }

    /// Starts a copy of a node's disks beside the node; what the other nodes say to its greeting, and the node that leads the
    /// meta group to its wish to be vouched for.
    pub fn copy_beside(&mut self, node: u64) -> Vec<String> {
        let OldDisks(log, engine) = self.old_disks(node);
        let i = self.place(node);
        let mut copy = Node::new(self.world.nodes[i].id, "10.9.9.9:9".to_owned(), &mut self.world.rng);
        (copy.fs, copy.disk) = (SimFs::from_image(&log), engine);
        // The machines of a copy must not be compared with those of its original.
        let (now, clock, book) = (self.world.now, self.world.clock.clone(), Book::default());
        copy.boot(now, clock, &book, (7, false)).expect("the copy opens");
        let hello =
            copy.running.as_ref().and_then(|running| running.stepped.hello()).expect("it knows itself");
        let token = hello.boot_history.last().copied().expect("it was open");
        let meta_leader = self.leader(GroupId::META.0);
        let mut said = Vec::new();
        for other in self.world.nodes.iter().filter(|other| other.is_up()) {
            let Some(running) = &other.running else { continue };
            if other.id != copy.id {
                said.push(running.stepped.check_hello(&hello).refused);
            }
            if Some(other.id.get()) == meta_leader {
                said.extend(running.stepped.twin(copy.id, token, &hello.address));
            }
        }
        said
    }

    /// Ends a node's process, takes its engine away and starts it again after so many milliseconds. Its log is whole.
    pub fn lose_engine(&mut self, node: u64, down: u64) {
        let i = self.place(node);
        self.world.end(i, false, down);
        self.world.nodes[i].disk = Default::default();
        self.world.nodes[i].engine_taken = true;
    }

    /// Replicas that have died of a damaged disk.
    pub fn dead(&self) -> usize {
        self.world.dead.len()
    }

    /// Heals everything, demands order, and checks all that must be true at the end.
    pub fn finish(mut self) {
        for node in &mut self.world.nodes {
            node.frozen = false;
        }
        self.world.finish();
    }
}
