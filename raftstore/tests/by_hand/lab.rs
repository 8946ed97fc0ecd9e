//! Nodes that are moved by hand, message by message.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use pontoon_proto::{GroupId, NodeId, ReplicaId, v1};
use pontoon_raftstore::{
    Answer, Class, Config, Event, GroupSpec, GroupStatus, Proposal, ProposeError, Rejected, Role, Stepped,
};
use pontoon_wal::{Clock, DriverMode, Options, Wal, sim::SimFs};

use crate::machine::TestMachines;

#[derive(Default)]
struct HandClock(AtomicU64);

impl Clock for HandClock {
    fn now(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }
}

/// A message that nobody has received yet.
pub(crate) struct Mail {
    pub(crate) from: NodeId,
    pub(crate) to: NodeId,
    pub(crate) class: Class,
    pub(crate) message: v1::PeerMessage,
}

impl Mail {
    /// The raft message in it, if it is one.
    pub(crate) fn raft(&self) -> Option<&v1::RaftMessage> {
        match &self.message.body {
            Some(v1::peer_message::Body::Raft(raft)) => Some(raft),
            _ => None,
        }
    }

    /// The bytes of commands in it.
    pub(crate) fn entry_bytes(&self) -> u64 {
        self.raft().map_or(0, |raft| raft.entries.iter().map(|entry| entry.data.len() as u64).sum())
    }
}

pub(crate) struct LabNode {
    pub(crate) fs: SimFs,
    pub(crate) machines: TestMachines,
    pub(crate) stepped: Stepped,
    wal: Wal,
    /// Milliseconds; its own clock begins here.
    started: u64,
}

/// Nodes 1 to n, and what is on its way between them.
pub(crate) struct Lab {
    config: Config,
    clock: Arc<HandClock>,
    pub(crate) nodes: BTreeMap<NodeId, LabNode>,
    pub(crate) mail: Vec<Mail>,
    pub(crate) answers: BTreeMap<(NodeId, u64), Answer>,
    pub(crate) events: Vec<(NodeId, Event)>,
    /// Nodes that apply nothing.
    pub(crate) frozen: BTreeSet<NodeId>,
    /// Nodes that start are greeted by nobody.
    pub(crate) strangers: bool,
    /// The engines of nodes that do not run.
    down: BTreeMap<NodeId, TestMachines>,
}

pub(crate) fn node(id: u64) -> NodeId {
    NodeId::new(id).unwrap()
}

pub(crate) fn replica(id: u64) -> ReplicaId {
    ReplicaId::on(node(id), 1)
}

impl Lab {
    /// Nodes that know each other.
    pub(crate) fn new(size: u64, config: Config) -> Lab {
        let mut lab = Lab {
            config,
            clock: Arc::default(),
            nodes: BTreeMap::new(),
            mail: Vec::new(),
            answers: BTreeMap::new(),
            events: Vec::new(),
            frozen: BTreeSet::new(),
            strangers: false,
            down: BTreeMap::new(),
        };
        for id in 1..=size {
            let (fs, machines) = (SimFs::new(), TestMachines::default());
            lab.boot(node(id), fs, machines);
        }
        lab
    }

    /// Starts a node from a disk and an engine.
    pub(crate) fn boot(&mut self, id: NodeId, fs: SimFs, machines: TestMachines) {
        let mut options = Options::new("/wal");
        options.fs = Arc::new(fs.clone());
        options.segment_bytes = 4 << 20;
        options.seed = id.get();
        options.clock = self.clock.clone();
        options.driver = DriverMode::Manual;
        let (wal, _) = Wal::open(options).expect("the log opens");
        let opened = Stepped::open(self.config.clone(), id, wal.clone(), Arc::new(machines.clone()));
        let started = self.clock.0.load(Ordering::Relaxed);
        let node = LabNode { fs, machines, stepped: opened.expect("the runtime opens"), wal, started };
        self.nodes.insert(id, node);
        if self.strangers {
            return;
        }
        let ids: Vec<NodeId> = self.nodes.keys().copied().collect();
        for (own, node) in &mut self.nodes {
            ids.iter().filter(|other| *other != own).for_each(|other| node.stepped.accepted_by(*other));
        }
    }

    /// Ends a node's process and starts it again.
    pub(crate) fn reboot(&mut self, id: NodeId) {
        let fs = self.nodes[&id].fs.clone();
        self.end(id);
        self.start(id, fs);
    }

    /// Ends a node's process well.
    pub(crate) fn end(&mut self, id: NodeId) {
        let LabNode { fs, machines, stepped, wal, .. } = self.nodes.remove(&id).expect("such a node");
        drop((stepped, wal));
        fs.kill();
        self.down.insert(id, machines);
    }

    /// Starts a node that was ended, from a disk.
    pub(crate) fn start(&mut self, id: NodeId, fs: SimFs) {
        let machines = self.down.remove(&id).expect("a node that was ended");
        self.boot(id, fs, machines);
    }

    /// Founds groups on these nodes and lets each elect a leader.
    pub(crate) fn found(&mut self, groups: impl Iterator<Item = u64> + Clone, members: &[u64]) {
        for (group, id) in groups.clone().flat_map(|group| members.iter().map(move |id| (group, *id))) {
            self.found_again(group, id, members);
        }
        for _ in 0..20 {
            self.settle();
            if groups.clone().all(|group| self.leader(group).is_some()) {
                return;
            }
            self.tick(1);
        }
        panic!("a group has no leader");
    }

    /// Asks a node for its founding replica of a group.
    pub(crate) fn found_again(&mut self, group: u64, id: u64, members: &[u64]) {
        let voters = members.iter().map(|id| replica(*id).get()).collect();
        let initial = Some(v1::ConfState { voters, ..Default::default() });
        let (group, replica) = (GroupId(group), replica(id));
        self.at(id).create_group(GroupSpec { group, replica, descriptor: Bytes::new(), epoch: 1, initial });
    }

    pub(crate) fn at(&mut self, id: u64) -> &mut Stepped {
        &mut self.nodes.get_mut(&node(id)).expect("such a node").stepped
    }

    pub(crate) fn status(&self, id: u64, group: u64) -> GroupStatus {
        self.nodes[&node(id)].stepped.status(GroupId(group)).expect("a replica")
    }

    /// The term of the last entry of a replica's log.
    pub(crate) fn last_term(&self, id: u64, group: u64) -> u64 {
        let (node, last) = (&self.nodes[&node(id)], self.status(id, group).last_index);
        node.wal.term(GroupId(group), last).expect("the log holds it")
    }

    /// Whether a replica is there, and open.
    pub(crate) fn is_open(&self, id: u64, group: u64) -> bool {
        self.nodes[&node(id)].stepped.status(GroupId(group)).is_some()
    }

    /// The node that leads a group in the highest term.
    pub(crate) fn leader(&self, group: u64) -> Option<u64> {
        let statuses =
            self.nodes.iter().filter_map(|(id, node)| Some((id, node.stepped.status(GroupId(group))?)));
        let leaders = statuses.filter(|(_, status)| status.role == Role::Leader);
        leaders.max_by_key(|(_, status)| status.term).map(|(id, _)| id.get())
    }

    /// Lets a node work off what it has, and takes what it says.
    pub(crate) fn turn(&mut self, id: NodeId) {
        let applies = !self.frozen.contains(&id);
        let node = self.nodes.get_mut(&id).expect("such a node");
        loop {
            node.stepped.turn();
            let moved = node.wal.step();
            let applied = applies && node.stepped.step_apply();
            if !(node.stepped.step_log() | applied | node.stepped.step_serve() | moved) {
                break;
            }
        }
        let output = node.stepped.take_output();
        let posted =
            output.send.into_iter().map(|(to, class, message)| Mail { from: id, to, class, message });
        self.mail.extend(posted);
        self.answers.extend(output.answers.into_iter().map(|(token, answer)| ((id, token), answer)));
        self.events.extend(output.events.into_iter().map(|event| (id, event)));
    }

    pub(crate) fn turn_all(&mut self) {
        self.nodes.keys().copied().collect::<Vec<_>>().into_iter().for_each(|id| self.turn(id));
    }

    /// Delivers the mail that fits, in order; the rest stays. True if there was any.
    pub(crate) fn deliver(&mut self, fits: impl Fn(&Mail) -> bool) -> bool {
        let (now, later) = std::mem::take(&mut self.mail).into_iter().partition(|mail| fits(mail));
        let now: Vec<Mail> = now;
        self.mail = later;
        let any = !now.is_empty();
        for Mail { from, to, message, .. } in now {
            if let Some(node) = self.nodes.get_mut(&to) {
                node.stepped.deliver(from, message);
            }
        }
        self.turn_all();
        any
    }

    /// Delivers what fits until nothing of it is left.
    pub(crate) fn settle_where(&mut self, fits: impl Fn(&Mail) -> bool) {
        self.turn_all();
        while self.deliver(&fits) {}
    }

    pub(crate) fn settle(&mut self) {
        self.settle_where(|_| true);
    }

    /// Lets time go on for one node, without delivering anything.
    pub(crate) fn pass_on(&mut self, id: u64, ticks: u64) {
        self.at(id).tick(ticks);
        self.turn(node(id));
    }

    /// Lets time go on for all nodes, without delivering anything.
    pub(crate) fn pass(&mut self, ticks: u64) {
        self.clock.0.fetch_add(100 * ticks, Ordering::Relaxed);
        let now = self.clock.0.load(Ordering::Relaxed);
        for node in self.nodes.values_mut() {
            node.stepped.set_wall_ms(now);
            node.stepped.set_clock(Duration::from_millis(now - node.started));
            node.stepped.tick(ticks);
        }
        self.turn_all();
    }

    /// Lets time go on tick by tick; everything is delivered in between.
    pub(crate) fn tick(&mut self, ticks: u64) {
        for _ in 0..ticks {
            self.pass(1);
            self.settle();
        }
    }

    /// Proposes a command at a node.
    pub(crate) fn propose(&mut self, id: u64, group: u64, payload: impl Into<Bytes>) -> (NodeId, u64) {
        let proposal = Proposal { payload: payload.into(), request: None, epoch: 1, urgent: false };
        (node(id), self.at(id).propose(GroupId(group), proposal))
    }

    /// What became of a proposal, if it is known.
    pub(crate) fn outcome(&mut self, asked: (NodeId, u64)) -> Option<Result<u64, ProposeError>> {
        match self.answers.remove(&asked)? {
            Answer::Proposed(result) => Some(result.map(|applied| applied.index)),
            other => panic!("{other:?} answers a proposal"),
        }
    }

    /// What became of a read, if it is known.
    pub(crate) fn read_outcome(&mut self, asked: (NodeId, u64)) -> Option<Result<u64, Rejected>> {
        match self.answers.remove(&asked)? {
            Answer::Index(result) => Some(result),
            other => panic!("{other:?} answers a read"),
        }
    }
}
