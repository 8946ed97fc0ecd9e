//! The runtime without threads and clocks: whoever holds it says what happens next.
//!
//! It runs the same core, appliers and snapshot server as the threads do, one step at a time, so that a simulator can put
//! a crash between any two of them and replay the run from its seed.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex},
    time::Duration,
};

use pontoon_proto::{GroupId, NodeId, ReplicaId, v1};
use pontoon_wal::{self as wal, PersistSink, Persisted, Wal};

use crate::{
    apply::{Applier, ApplyOutcome},
    budget::SnapshotBudget,
    core::Core,
    effects::{Answer, Effects, Input, Now},
    error::Error,
    identity::{Identity, Peers},
    lanes::Lane,
    machine::Machines,
    snapshot::{ServeTask, Served, SnapshotServer},
    transport::Class,
    types::{
        Config, Event, GroupSpec, GroupStatus, Mandate, MemberChange, Proposal, ReadLevel, Recovery, Room,
    },
};

#[derive(Default)]
struct Sink(Mutex<VecDeque<Input>>);

impl Sink {
    fn push(&self, input: Input) {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push_back(input);
    }

    fn pop(&self) -> Option<Input> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).pop_front()
    }
}

impl PersistSink for Sink {
    fn persisted(&self, done: &[Persisted]) {
        if let Some(last) = done.last() {
            self.push(Input::Persisted { submission: last.token });
        }
    }

    fn failed(&self, error: &wal::Error) {
        self.push(Input::LogFailed { reason: error.to_string() });
    }
}

/// What came out of the steps since it was last taken.
#[derive(Default)]
pub struct Output {
    /// Messages for other nodes.
    pub send: Vec<(NodeId, Class, v1::PeerMessage)>,
    /// Answers, by the token that the call returned.
    pub answers: Vec<(u64, Answer)>,
    /// Statuses that changed.
    pub statuses: Vec<GroupStatus>,
    /// What happened.
    pub events: Vec<Event>,
}

/// One node's runtime, stepped by hand. The log must be open in [`wal::DriverMode::Manual`]; whoever holds this steps it.
pub struct Stepped {
    core: Core,
    applier: Applier,
    server: SnapshotServer,
    machines: Arc<dyn Machines>,
    sink: Arc<Sink>,
    wal: Wal,
    apply: Lane,
    serve: VecDeque<ServeTask>,
    dirty: BTreeMap<GroupId, u64>,
    out: Output,
    /// Between the inputs of a turn, what leaves at its end.
    fx: Effects,
    next_token: u64,
    now: Now,
    /// Who this node is and whom it knows, once it was introduced.
    known: Option<(Identity, Peers)>,
}

impl Stepped {
    /// Opens every replica that the log holds, as [`crate::MultiRaft::open`] does.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn open(
        config: Config,
        node: NodeId,
        wal: Wal,
        machines: Arc<dyn Machines>,
    ) -> Result<Stepped, Error> {
        config.validate()?;
        let sink = Arc::new(Sink::default());
        let submitter = wal.submitter(sink.clone());
        let incarnation = wal.incarnation();
        let groups: Vec<GroupId> = wal.groups().into_iter().filter(|group| *group != GroupId::NODE).collect();
        let mut stepped = Stepped {
            applier: Applier::new(machines.clone(), config.session_ttl),
            apply: Lane::new(config.urgent_group),
            server: SnapshotServer::new(
                config.chunk_bytes,
                config.snapshots.max_views,
                incarnation & (u64::MAX >> 1),
            ),
            core: Core::new(config, node, wal.clone(), submitter, incarnation, (0, 1)),
            machines,
            sink,
            wal,
            serve: VecDeque::new(),
            dirty: BTreeMap::new(),
            out: Output::default(),
            fx: Effects::default(),
            next_token: 0,
            now: Now::default(),
            known: None,
        };
        for group in groups {
            stepped.ask(|token| Input::Adopt { group, token });
        }
        while stepped.step_apply() {}
        Ok(stepped)
    }

    /// Unix time for everything that follows, in milliseconds.
    pub fn set_wall_ms(&mut self, wall_ms: u64) {
        self.now.wall_ms = wall_ms;
    }

    /// The clock for everything that follows; never goes back.
    pub fn set_clock(&mut self, clock: Duration) {
        self.now.clock = clock;
    }

    fn input(&mut self, input: Input) {
        let mut fx = std::mem::take(&mut self.fx);
        self.core.handle(self.now, input, &mut fx);
        self.take(fx);
    }

    fn ask(&mut self, input: impl FnOnce(u64) -> Input) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        self.input(input(token));
        token
    }

    fn take(&mut self, fx: Effects) {
        self.fx.beats = fx.beats;
        self.out.send.extend(fx.send);
        self.out.answers.extend(fx.answers);
        self.out.statuses.extend(fx.statuses);
        self.out.events.extend(fx.events);
        fx.apply.into_iter().for_each(|task| self.apply.push(task));
        self.serve.extend(fx.serve);
        for task in fx.fetch {
            let sink = self.sink.clone();
            task.begin(&self.wal, move |input| sink.push(input));
        }
    }

    /// Ends a turn: what is ready goes to the log and out.
    pub fn turn(&mut self) {
        let mut fx = std::mem::take(&mut self.fx);
        self.core.poll(&mut fx);
        self.take(fx);
    }

    /// Takes what came out since the last call.
    pub fn take_output(&mut self) -> Output {
        std::mem::take(&mut self.out)
    }

    /// Hears the log's next acknowledgement or read; false if there is none.
    pub fn step_log(&mut self) -> bool {
        let input = self.sink.pop();
        input.map(|input| self.input(input)).is_some()
    }

    /// Runs the next task of the state machines; false if there is none.
    pub fn step_apply(&mut self) -> bool {
        let Some(task) = self.apply.try_take() else { return false };
        let (group, mut outcomes) = (task.group(), Vec::new());
        self.applier.run(task, &mut outcomes);
        // Here chunks are staged in their turn.
        self.apply.release(group);
        for outcome in outcomes {
            match &outcome {
                ApplyOutcome::Applied { group, mark, .. } => {
                    self.dirty.insert(*group, mark.index);
                }
                ApplyOutcome::Opened { group, mark: Some(mark) } => {
                    self.dirty.insert(*group, mark.index);
                }
                ApplyOutcome::Installed { group, .. } | ApplyOutcome::Destroyed { group } => {
                    self.dirty.remove(group);
                }
                _ => {}
            }
            self.input(Input::Outcome(outcome));
        }
        true
    }

    /// Runs the next task of the snapshot server, or reads on in a state; false if there is nothing to do.
    pub fn step_serve(&mut self) -> bool {
        let served = match self.serve.pop_front() {
            Some(task) => self.server.run(task),
            None if self.server.scans() => self.server.go_on().1,
            None => return false,
        };
        match served {
            Some(Served::Send(to, message)) => self.out.send.push((to, Class::Snapshot, message)),
            Some(Served::Verified { group, index, hash }) => {
                self.input(Input::Verified { group, index, hash });
            }
            None => {}
        }
        if self.serve.is_empty() {
            self.server.read_ahead();
        }
        true
    }

    /// Makes applied state durable.
    ///
    /// # Errors
    /// The engine's.
    pub fn flush(&mut self) -> Result<(), crate::machine::MachineError> {
        let marks = std::mem::take(&mut self.dirty);
        self.machines.flush()?;
        self.input(Input::Flushed(marks.into_iter().collect()));
        Ok(())
    }

    /// Moves raft's clock.
    pub fn tick(&mut self, ticks: u64) {
        self.input(Input::Tick(ticks));
        while self.core.has_more() {
            let mut fx = std::mem::take(&mut self.fx);
            self.core.go_on(&mut fx);
            self.take(fx);
        }
    }

    /// A message arrives.
    pub fn deliver(&mut self, from: NodeId, message: v1::PeerMessage) {
        self.input(Input::Peer { from, message });
    }

    /// A peer accepted this node's handshake.
    pub fn accepted_by(&mut self, peer: NodeId) {
        self.input(Input::AcceptedBy(peer));
    }

    /// The vouching group accepted this open's boot token.
    pub fn vouched(&mut self) {
        self.input(Input::Vouched);
    }

    /// From now on this node is who the log says, and greets and judges others as [`crate::MultiRaft`] does. This open's boot
    /// token is durable on return.
    ///
    /// # Errors
    /// The log's.
    pub fn introduce(&mut self, mut identity: Identity) -> Result<(), Error> {
        identity.boot(&self.wal)?;
        self.known = Some((identity, Peers::new(self.wal.clone())));
        Ok(())
    }

    /// How this node greets; `None` before it was introduced.
    pub fn hello(&self) -> Option<v1::Hello> {
        self.known.as_ref().map(|(me, _)| me.hello())
    }

    /// Judges a greeting, as [`crate::MultiRaft::check_hello`] does.
    pub fn check_hello(&self, hello: &v1::Hello) -> v1::HelloReply {
        let Some((me, peers)) = &self.known else { return v1::HelloReply::default() };
        let (refused, copied) = match peers.judge(me, hello, self.now.clock) {
            Ok(_) => (String::new(), false),
            Err(unwelcome) => (unwelcome.reason, unwelcome.copied),
        };
        v1::HelloReply { refused, hello: Some(me.hello()), copied }
    }

    /// Whether messages of a node under this boot token are taken.
    pub fn admits(&self, from: NodeId, boot_token: u64) -> bool {
        self.known.as_ref().is_some_and(|(_, peers)| peers.admits(from, boot_token, self.now.clock))
    }

    /// As [`crate::MultiRaft::twin`].
    pub fn twin(&self, node: NodeId, boot_token: u64, address: &str) -> Option<String> {
        let (me, peers) = self.known.as_ref()?;
        me.twin(peers, node, boot_token, address, self.now.clock)
    }

    /// A peer cannot be reached.
    pub fn unreachable(&mut self, peer: NodeId) {
        self.input(Input::Unreachable(peer));
    }

    /// This node leads nothing from now on, or may lead again.
    pub fn shun_leadership(&mut self, shuns: bool) {
        self.input(Input::Shun(shuns));
    }

    /// The disks of this node have this much room from now on.
    pub fn set_room(&mut self, room: Room) {
        self.input(Input::Room(room));
    }

    /// Snapshots may take so many bytes of the disk from now on.
    pub fn set_free(&mut self, bytes: u64) {
        self.input(Input::Free(bytes));
    }

    /// What snapshots may take of the node from now on.
    pub fn set_snapshot_budget(&mut self, budget: SnapshotBudget) {
        self.input(Input::Budget(budget));
    }

    /// Proposes; the token's answer is [`Answer::Proposed`].
    pub fn propose(&mut self, group: GroupId, proposal: Proposal) -> u64 {
        self.ask(|token| Input::Propose { group, token, proposal, span: tracing::Span::none() })
    }

    /// Asks for a session stamp; the answer is [`Answer::Index`].
    pub fn session_stamp(&mut self, group: GroupId) -> u64 {
        self.ask(|token| Input::Stamp { group, token })
    }

    /// Asks for a read barrier; the answer is [`Answer::Index`].
    pub fn read_barrier(&mut self, group: GroupId, level: ReadLevel) -> u64 {
        self.ask(|token| Input::Read { group, token, level })
    }

    /// Changes members; the answer is [`Answer::Done`].
    pub fn change(&mut self, group: GroupId, change: MemberChange) -> u64 {
        self.ask(|token| Input::Change { group, token, change, mandate: None })
    }

    /// Changes members by a mandate; the answer is [`Answer::Done`].
    pub fn change_by(&mut self, group: GroupId, change: MemberChange, mandate: Mandate) -> u64 {
        self.ask(|token| Input::Change { group, token, change, mandate: Some(mandate) })
    }

    /// Hands leadership over; the answer is [`Answer::Done`].
    pub fn transfer_leader(&mut self, group: GroupId, to: ReplicaId) -> u64 {
        self.ask(|token| Input::Transfer { group, token, to, mandate: None })
    }

    /// Hands leadership over by a mandate; the answer is [`Answer::Done`].
    pub fn transfer_leader_by(&mut self, group: GroupId, to: ReplicaId, mandate: Mandate) -> u64 {
        self.ask(|token| Input::Transfer { group, token, to, mandate: Some(mandate) })
    }

    /// Asks who is a member; the answer is [`Answer::Members`].
    pub fn members(&mut self, group: GroupId, mandate: Mandate) -> u64 {
        self.ask(|token| Input::Members { group, token, mandate })
    }

    /// Asks all replicas for a hash of their state; the answer is [`Answer::Index`], see [`crate::Group::verify`].
    pub fn verify(&mut self, group: GroupId) -> u64 {
        self.ask(|token| Input::Verify { group, token })
    }

    /// Lets a replica here ask another member for the state that it receives; the answer is [`Answer::Done`].
    pub fn other_source(&mut self, group: GroupId) -> u64 {
        self.ask(|token| Input::OtherSource { group, token })
    }

    /// Makes sure of a replica; the answer is [`Answer::Replica`].
    pub fn create_group(&mut self, spec: GroupSpec) -> u64 {
        self.ask(|token| Input::Create { spec, token })
    }

    /// Removes a replica for ever; the answer is [`Answer::Destroyed`].
    pub fn destroy_replica(&mut self, group: GroupId, replica: ReplicaId) -> u64 {
        self.ask(|token| Input::Destroy { group, replica, token })
    }

    /// Lets a replica go on alone; the answer is [`Answer::Replica`].
    pub fn recover(&mut self, group: GroupId, recovery: Recovery) -> u64 {
        self.ask(|token| Input::Recover { group, recovery, token })
    }

    /// What a replica here is and knows.
    pub fn status(&self, group: GroupId) -> Option<GroupStatus> {
        self.core.status(group)
    }
}
