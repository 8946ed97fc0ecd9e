//! The cloneable doors to the runtime. Async lives here; everything below is synchronous.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use pontoon_proto::{GroupId, NodeId, ReplicaId, v1};
use pontoon_wal::Wal;
use tokio::sync::{broadcast, oneshot, watch};

use crate::{
    budget::SnapshotBudget,
    driver::{self, Threads},
    effects::{Answer, Input, Token},
    error::{Ambiguous, Error, ProposeError, Rejected},
    identity::{Identity, Peers},
    machine::Machines,
    replica::Depths,
    stats::{Roles, Stats},
    transport::Transport,
    types::{
        Applied, Config, Event, GroupSpec, GroupStatus, Mandate, MemberChange, Proposal, ReadLevel, Recovery,
        Role, Room,
    },
};

struct Inner {
    threads: Threads,
    wal: Wal,
    identity: Identity,
    peers: Peers,
    started: Instant,
    next_token: AtomicU64,
    stopping: Mutex<()>,
}

/// All groups of a node. Cheap to clone.
#[derive(Clone)]
pub struct MultiRaft {
    inner: Arc<Inner>,
}

impl MultiRaft {
    /// Starts the runtime over an open log, with every replica in it. Blocks until some hundred of them are open; the others
    /// follow, some in each tick, and whatever is asked for or spoken to at once. Damaged ones are reported by
    /// [`MultiRaft::events`] and their status, the others serve. This open's boot token is durable before
    /// the first message leaves.
    ///
    /// # Errors
    /// [`Error::Config`], and the log's when the identity cannot be written.
    #[expect(clippy::disallowed_methods, reason = "what the network does later is measured from here")]
    pub fn open(
        config: Config,
        wal: Wal,
        mut identity: Identity,
        machines: Arc<dyn Machines>,
        transport: Arc<dyn Transport>,
    ) -> Result<MultiRaft, Error> {
        config.validate()?;
        identity.boot(&wal)?;
        let threads = driver::start(&config, identity.node, &wal, &machines, &transport)?;
        let peers = Peers::new(wal.clone());
        let inner = Inner {
            threads,
            wal,
            identity,
            peers,
            started: Instant::now(),
            next_token: AtomicU64::new(0),
            stopping: Mutex::new(()),
        };
        let runtime = MultiRaft { inner: Arc::new(inner) };
        let groups: Vec<GroupId> =
            runtime.inner.wal.groups().into_iter().filter(|group| *group != GroupId::NODE).collect();
        let answers: Vec<_> = groups
            .into_iter()
            .map(|group| runtime.ask(group, |token| Input::Adopt { group, token }))
            .collect();
        for answer in answers {
            if let Ok(Answer::Replica(Err(error))) = answer.blocking_recv() {
                tracing::error!(%error, "a replica does not open");
            }
        }
        Ok(runtime)
    }

    fn ask(&self, group: GroupId, input: impl FnOnce(Token) -> Input) -> oneshot::Receiver<Answer> {
        let token = self.inner.next_token.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        // A stopped loop drops the sender, which the receiver notices.
        self.inner.threads.board.ask(group, input(token), token, sender);
        receiver
    }

    /// Who this node is, with the boot token of this open.
    pub fn identity(&self) -> Identity {
        self.inner.identity.clone()
    }

    /// What opens a stream to a peer.
    pub fn hello(&self) -> v1::Hello {
        self.inner.identity.hello()
    }

    /// Judges a peer's handshake. On acceptance the peer's boot token is durable here. Blocks on the log: call it from a
    /// thread that may.
    pub fn check_hello(&self, hello: &v1::Hello) -> v1::HelloReply {
        let now = self.inner.started.elapsed();
        let (refused, copied) = match self.inner.peers.judge(&self.inner.identity, hello, now) {
            Ok(_) => (String::new(), false),
            Err(unwelcome) => (unwelcome.reason, unwelcome.copied),
        };
        v1::HelloReply { refused, hello: Some(self.hello()), copied }
    }

    /// Takes note that a peer accepted this node's handshake: votes and acknowledgements are gated on that.
    pub fn accepted_by(&self, peer: NodeId) {
        self.inner.threads.board.input_all(|| Input::AcceptedBy(peer));
    }

    /// Takes messages from a peer whose handshake was accepted under `boot_token`. Never blocks. False: the peer has since
    /// been accepted under another token; the caller closes the stream.
    pub fn deliver(&self, from: NodeId, boot_token: u64, messages: Vec<v1::PeerMessage>) -> bool {
        if !self.inner.peers.admits(from, boot_token, self.inner.started.elapsed()) {
            return false;
        }
        let board = &self.inner.threads.board;
        for message in messages {
            match GroupId(message.group) {
                GroupId::NODE => board.input_of_node(from, self.inner.identity.node, message),
                _ => board.peer(from, message),
            }
        }
        true
    }

    /// Takes note that the vouching group ([`Config::vouching_group`]) has accepted this open's boot token.
    pub fn vouched(&self) {
        self.inner.threads.board.input_all(|| Input::Vouched);
    }

    /// Why a node under this boot token at this address is a copy of one that is alive, this one included; `None` if it is none
    /// as far as is known here. To be asked before the vouching group accepts a token.
    pub fn twin(&self, node: NodeId, boot_token: u64, address: &str) -> Option<String> {
        let Inner { identity, peers, started, .. } = &*self.inner;
        identity.twin(peers, node, boot_token, address, started.elapsed())
    }

    /// Tells that a peer cannot be reached, or that messages to it were dropped.
    pub fn unreachable(&self, peer: NodeId) {
        self.inner.threads.board.input_all(|| Input::Unreachable(peer));
    }

    /// From `true` to `false` this node leads nothing that a voter elsewhere can lead: it is being emptied. Commands are
    /// taken meanwhile.
    pub fn shun_leadership(&self, shuns: bool) {
        self.inner.threads.board.input_all(|| Input::Shun(shuns));
    }

    /// Tells how much room the disks of this node have. Until the next call it stays so; peers are told.
    pub fn set_room(&self, room: Room) {
        self.inner.threads.board.input_all(|| Input::Room(room));
    }

    /// Tells how many bytes snapshots may take of the disk. Until the first call that is not known, and not looked at.
    pub fn set_free(&self, bytes: u64) {
        self.inner.threads.board.input_all(|| Input::Free(bytes));
    }

    /// Changes what snapshots may take of this node, at once.
    pub fn set_snapshot_budget(&self, budget: SnapshotBudget) {
        self.inner.threads.board.input_all(|| Input::Budget(budget));
    }

    /// Tells whether clients of this node wait longer than they do without copies ([`crate::Foreground`] judges). Until the next
    /// call it stays so; receivers here and elsewhere hold back for it, if their budget adapts.
    pub fn set_strained(&self, strained: bool) {
        self.inner.threads.board.input_all(|| Input::Strained(strained));
    }

    /// Whether this node receives states or gives some to others, or did within the last seconds.
    pub fn copies(&self) -> bool {
        self.inner.threads.ledger.copies()
    }

    /// What the runtime has done since it was opened, and how it stands. Costs the same however many replicas there are.
    pub fn stats(&self) -> Stats {
        self.inner.threads.stats()
    }

    /// The replicas here by what they are. Looks at each of them once.
    pub fn roles(&self) -> Roles {
        self.inner.threads.board.roles()
    }

    /// Makes sure that a replica exists here. Durable on return. The same spec may be given again at any time.
    ///
    /// # Errors
    /// [`Error::Tombstoned`], [`Error::OtherReplica`], [`Error::Damaged`] (the replica is dead), [`Error::Stopped`].
    ///
    /// # Cancel safety
    /// Dropping this abandons the answer, not the creation.
    pub async fn create_group(&self, spec: GroupSpec) -> Result<Group, Error> {
        if spec.group == GroupId::NODE {
            return Err(Error::Config("group 0 is the node's own".to_owned()));
        }
        if spec.replica.node() != self.inner.identity.node {
            return Err(Error::Config(format!(
                "{} does not belong on {}",
                spec.replica, self.inner.identity.node
            )));
        }
        let group = spec.group;
        match self.ask(group, |token| Input::Create { spec, token }).await {
            Ok(Answer::Replica(Ok(_))) => self.group(group).ok_or(Error::Stopped),
            Ok(Answer::Replica(Err(error))) => Err(error),
            _ => Err(Error::Stopped),
        }
    }

    /// The replica of a group on this node, dead ones included.
    pub fn group(&self, id: GroupId) -> Option<Group> {
        let replica = self.inner.threads.board.statuses.get(&id)?.status.replica;
        Some(Group { runtime: self.clone(), id, replica })
    }

    /// Every group with a replica here, in id order.
    pub fn groups(&self) -> Vec<GroupId> {
        let mut groups: Vec<GroupId> =
            self.inner.threads.board.statuses.iter().map(|entry| *entry.key()).collect();
        groups.sort_unstable();
        groups
    }

    /// The replicas here that have stopped for good, and why, in id order. Costs nothing while there are none.
    pub fn dead(&self) -> Vec<(GroupId, String)> {
        self.inner
            .threads
            .board
            .dead
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .clone()
            .into_iter()
            .collect()
    }

    /// Removes a replica from this node for ever: the tombstone is durable, then the data goes, then this returns.
    /// Idempotent, also for a replica that was never here.
    ///
    /// # Errors
    /// [`Error::Machine`] if the engine fails (ask again), [`Error::Stopped`].
    ///
    /// # Cancel safety
    /// Dropping this abandons the answer, not the removal.
    pub async fn destroy_replica(&self, group: GroupId, replica: ReplicaId) -> Result<(), Error> {
        match self.ask(group, |token| Input::Destroy { group, replica, token }).await {
            Ok(Answer::Destroyed(result)) => result,
            _ => Err(Error::Stopped),
        }
    }

    /// Lets the replica of a group that has lost its quorum for good go on alone, as the group's only voter, under a new id: with
    /// everything that its log holds. Durable on return. Idempotent. What the lost ones had beyond its last entry is lost; that
    /// they never come back is the caller's business.
    ///
    /// # Errors
    /// [`Error::NotRecovered`]: the replica is another, has gone on, follows a leader, or has nothing to go on with;
    /// [`Error::Stopped`].
    ///
    /// # Cancel safety
    /// Dropping this abandons the answer, not the recovery.
    pub async fn recover(&self, group: GroupId, recovery: Recovery) -> Result<(), Error> {
        match self.ask(group, |token| Input::Recover { group, recovery, token }).await {
            Ok(Answer::Replica(result)) => result.map(drop),
            _ => Err(Error::Stopped),
        }
    }

    /// The last entry that a group's log holds here, the term and the index; `None` if the log knows no such group.
    pub fn last_entry(&self, group: GroupId) -> Option<(u64, u64)> {
        let index = self.inner.wal.group(group)?.last_index;
        Some((self.inner.wal.term(group, index).ok()?, index))
    }

    /// What happens from now on. A listener that is too slow misses the oldest.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.inner.threads.board.events.subscribe()
    }

    /// Stops all threads after what they were given and makes applied state durable. Blocks. The caller closes the log.
    pub fn shutdown(&self) {
        let _once = self.inner.stopping.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        self.inner.threads.stop();
    }
}

/// One group's replica on this node. Cheap to clone.
#[derive(Clone)]
pub struct Group {
    runtime: MultiRaft,
    id: GroupId,
    replica: ReplicaId,
}

impl Group {
    /// The group.
    pub fn id(&self) -> GroupId {
        self.id
    }

    /// The replica here.
    pub fn replica(&self) -> ReplicaId {
        self.replica
    }

    /// Proposes a command. The ticket resolves when it is applied here, or refused, or when its outcome cannot be told. Called within
    /// a span, it has one below it (`command`, at the level debug) until the command is applied.
    pub fn propose(&self, proposal: Proposal) -> Ticket {
        let board = &self.runtime.inner.threads.board;
        if board.is_full(self.id) {
            let busy = Rejected::Busy { group: self.id, retry_after: Duration::from_millis(10) };
            return Ticket { group: self.id, state: TicketState::Refused(Some(busy)) };
        }
        let group = self.id;
        let span = tracing::debug_span!("command", %group, index = tracing::field::Empty);
        let receiver = self.runtime.ask(group, |token| Input::Propose { group, token, proposal, span });
        Ticket { group, state: TicketState::Waiting(receiver) }
    }

    /// Gets a session stamp from the leader, for [`crate::RequestId`].
    ///
    /// # Errors
    /// [`Rejected::NotLeader`] and other refusals.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn session_stamp(&self) -> Result<u64, Rejected> {
        let group = self.id;
        self.index(self.runtime.ask(group, |token| Input::Stamp { group, token })).await
    }

    /// Waits until this replica has applied what the level asks for: what its state machine says after that is as fresh.
    /// Returns the index that was confirmed; [`ReadLevel::Local`] the one that is applied.
    ///
    /// # Errors
    /// [`Rejected::NotLeader`]: by [`ReadLevel::Linearizable`] if it does not lead, by [`ReadLevel::Follower`] if nobody is
    /// known to; other refusals.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn read_barrier(&self, level: ReadLevel) -> Result<u64, Rejected> {
        let group = self.id;
        self.index(self.runtime.ask(group, |token| Input::Read { group, token, level })).await
    }

    /// Asks every replica, through the leader, for a hash of its state at one entry, and returns that entry's index. The hashes
    /// are in the replicas' [`Group::status`], each on its own node, once they have applied the entry; see
    /// [`GroupStatus::verified`]. The entry is lost if leadership changes before it is committed. While the leader has not applied the
    /// entry of one question, another one gets the same index.
    ///
    /// # Errors
    /// [`Rejected::NotLeader`], [`Rejected::Busy`].
    ///
    /// # Cancel safety
    /// Dropping this abandons the answer, not the question.
    pub async fn verify(&self) -> Result<u64, Rejected> {
        let group = self.id;
        self.index(self.runtime.ask(group, |token| Input::Verify { group, token })).await
    }

    /// Lets the replica here ask another member for the state that it receives, if one comes: somebody who looks on finds this
    /// source too slow. Nothing happens where no state comes, or where it waits for this node alone.
    ///
    /// # Errors
    /// [`Rejected::NoGroup`], [`Rejected::Stopped`], [`Rejected::NotLeader`] while it is being opened.
    ///
    /// # Cancel safety
    /// Dropping this abandons the answer, not the order.
    pub async fn other_source(&self) -> Result<(), Rejected> {
        let group = self.id;
        self.done(self.runtime.ask(group, |token| Input::OtherSource { group, token })).await
    }

    /// What waits in this replica: for whoever looks for a fault.
    ///
    /// # Errors
    /// [`Rejected::NoGroup`], [`Rejected::Stopped`], [`Rejected::NotLeader`] while it is being opened.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn depths(&self) -> Result<Depths, Rejected> {
        let group = self.id;
        match self.runtime.ask(group, |token| Input::Depths { group, token }).await {
            Ok(Answer::Depths(result)) => result.map(|depths| *depths),
            _ => Err(Rejected::Stopped(group)),
        }
    }

    async fn index(&self, answer: oneshot::Receiver<Answer>) -> Result<u64, Rejected> {
        match answer.await {
            Ok(Answer::Index(result)) => result,
            _ => Err(Rejected::Stopped(self.id)),
        }
    }

    async fn done(&self, answer: oneshot::Receiver<Answer>) -> Result<(), Rejected> {
        match answer.await {
            Ok(Answer::Done(result)) => result,
            _ => Err(Rejected::Stopped(self.id)),
        }
    }

    /// What the replica is and knows; a watch that wakes on change, at most once a tick for progress.
    ///
    /// Of a replica that has been removed, the last status stays and the watch reports that its sender is gone.
    pub fn status(&self) -> watch::Receiver<GroupStatus> {
        match self.runtime.inner.threads.board.statuses.get_mut(&self.id) {
            Some(mut shown) => shown.watch(),
            None => watch::channel(GroupStatus::new(self.id, self.replica)).1,
        }
    }

    /// Looks at the status once, without watching it.
    pub fn look<T>(&self, look: impl FnOnce(&GroupStatus) -> T) -> T {
        match self.runtime.inner.threads.board.statuses.get(&self.id) {
            Some(shown) => look(&shown.status),
            None => look(&GroupStatus::new(self.id, self.replica)),
        }
    }

    /// Changes the members, through the leader. Answered when the change is applied on the leader, or holds already.
    ///
    /// # Errors
    /// [`Rejected::Membership`] with the reason and what to wait for, [`Rejected::NotLeader`].
    ///
    /// # Cancel safety
    /// Dropping this abandons the answer, not the change; ask again to be sure.
    pub async fn change(&self, change: MemberChange) -> Result<(), Rejected> {
        let group = self.id;
        self.done(self.runtime.ask(group, |token| Input::Change { group, token, change, mandate: None }))
            .await
    }

    /// Changes the members by a mandate: an order that comes late is refused. See [`Group::change`].
    ///
    /// # Errors
    /// [`Rejected::Late`], and as [`Group::change`].
    ///
    /// # Cancel safety
    /// As [`Group::change`].
    pub async fn change_by(&self, change: MemberChange, mandate: Mandate) -> Result<(), Rejected> {
        let (group, mandate) = (self.id, Some(mandate));
        self.done(self.runtime.ask(group, |token| Input::Change { group, token, change, mandate })).await
    }

    /// Tells who is a member, and the index as of which that holds. Once this has answered, no order with a mandate of a lower
    /// place takes effect any more, and all that did are in the answer.
    ///
    /// # Errors
    /// [`Rejected::Late`], [`Rejected::NotLeader`], [`Rejected::Membership`] while a change is under way.
    ///
    /// # Cancel safety
    /// Dropping this abandons the answer; lower places are refused all the same.
    pub async fn members_by(&self, mandate: Mandate) -> Result<(v1::ConfState, u64), Rejected> {
        let group = self.id;
        match self.runtime.ask(group, |token| Input::Members { group, token, mandate }).await {
            Ok(Answer::Members(result)) => result,
            _ => Err(Rejected::Stopped(self.id)),
        }
    }

    /// Adds a learner. See [`Group::change`].
    ///
    /// # Errors
    /// As [`Group::change`].
    ///
    /// # Cancel safety
    /// As [`Group::change`].
    pub async fn add_learner(&self, replica: ReplicaId) -> Result<(), Rejected> {
        self.change(MemberChange::AddLearner(replica)).await
    }

    /// Makes a caught-up learner a voter. See [`Group::change`].
    ///
    /// # Errors
    /// As [`Group::change`].
    ///
    /// # Cancel safety
    /// As [`Group::change`].
    pub async fn promote(&self, replica: ReplicaId) -> Result<(), Rejected> {
        self.change(MemberChange::Promote(replica)).await
    }

    /// Removes a learner. See [`Group::change`].
    ///
    /// # Errors
    /// As [`Group::change`].
    ///
    /// # Cancel safety
    /// As [`Group::change`].
    pub async fn remove(&self, replica: ReplicaId) -> Result<(), Rejected> {
        self.change(MemberChange::Remove(replica)).await
    }

    /// Hands leadership to another voter. Answered when it has begun; await [`Group::status`] for the end. It is given up
    /// after an election timeout.
    ///
    /// # Errors
    /// [`Rejected::NotLeader`], [`Rejected::Membership`] if the target is no voter.
    ///
    /// # Cancel safety
    /// Dropping this abandons the answer only.
    pub async fn transfer_leader(&self, to: ReplicaId) -> Result<(), Rejected> {
        let group = self.id;
        self.done(self.runtime.ask(group, |token| Input::Transfer { group, token, to, mandate: None })).await
    }

    /// Hands leadership over by a mandate: an order that comes late is refused. See [`Group::transfer_leader`].
    ///
    /// # Errors
    /// [`Rejected::Late`], and as [`Group::transfer_leader`].
    ///
    /// # Cancel safety
    /// As [`Group::transfer_leader`].
    pub async fn transfer_leader_by(&self, to: ReplicaId, mandate: Mandate) -> Result<(), Rejected> {
        let (group, mandate) = (self.id, Some(mandate));
        self.done(self.runtime.ask(group, |token| Input::Transfer { group, token, to, mandate })).await
    }

    /// Waits until this replica knows a leader.
    ///
    /// # Errors
    /// [`Rejected::Stopped`] if the replica is dead or removed.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn wait_for_leader(&self) -> Result<ReplicaId, Rejected> {
        let mut status = self.status();
        let seen = status
            .wait_for(|status| status.leader.is_some() || status.role == Role::Dead)
            .await
            .map_err(|_| Rejected::Stopped(self.id))?;
        seen.leader.ok_or(Rejected::Stopped(self.id))
    }
}

enum TicketState {
    Waiting(oneshot::Receiver<Answer>),
    Refused(Option<Rejected>),
}

/// The answer to a proposal, to come. Dropping it abandons the answer, not the proposal.
#[must_use = "the outcome of a proposal is in its ticket"]
pub struct Ticket {
    group: GroupId,
    state: TicketState,
}

impl Future for Ticket {
    type Output = Result<Applied, ProposeError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let group = self.group;
        match &mut self.state {
            TicketState::Refused(rejected) => {
                Poll::Ready(Err(rejected.take().unwrap_or(Rejected::Stopped(group)).into()))
            }
            TicketState::Waiting(receiver) => Pin::new(receiver).poll(context).map(|answer| match answer {
                Ok(Answer::Proposed(result)) => result,
                _ => Err(Ambiguous { group, reason: "the runtime stopped" }.into()),
            }),
        }
    }
}
