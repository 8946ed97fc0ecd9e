//! The plain words of the runtime's interface.

use std::time::Duration;

use bytes::Bytes;
use pontoon_proto::{GroupId, NodeId, ReplicaId, v1::ConfState};

use crate::{budget::SnapshotBudget, error::Error};

/// The log position that every founded group starts from: (index, term). Not zero, so that an empty replica can never
/// catch up by entries alone and must take the configuration from a snapshot.
pub const INITIAL_POSITION: (u64, u64) = (5, 5);

/// How many requests of one session may be unacknowledged in one group.
pub const MAX_OPEN_REQUESTS: usize = 1024;

/// Tuning of the runtime. The defaults suit a database node.
#[derive(Debug, Clone)]
pub struct Config {
    /// Threads that run consensus; each owns the groups that hash to it. At least 1.
    pub core_threads: usize,
    /// A group whose inputs and whose applying go before those of all others: one that the others wait for, such as the
    /// one that says where everything is.
    pub urgent_group: Option<GroupId>,
    /// A group whose state remembers the boot token of each node, if there is one, and accepts a node by [`Identity`]'s rule.
    /// Once it has ([`MultiRaft::vouched`]) the replicas of this node vote and acknowledge; until then those do of whose group
    /// every other voter has accepted this node's greeting. That group itself, and all groups if there is none, need a quorum
    /// of such voters.
    ///
    /// [`Identity`]: crate::Identity
    /// [`MultiRaft::vouched`]: crate::MultiRaft::vouched
    pub vouching_group: Option<GroupId>,
    /// Threads that apply; each owns the machines that hash to it. At least 1.
    pub apply_threads: usize,
    /// How often Raft's clock moves.
    pub tick: Duration,
    /// Ticks between a leader's heartbeats.
    pub heartbeat_ticks: usize,
    /// Ticks without a leader before the first replica in rank campaigns. A node that says nothing for longer is taken to be
    /// gone, and the sleeping groups that it leads wake.
    pub election_ticks: usize,
    /// Leaders answer linearizable reads from a lease: for nine tenths of an election timeout after a quorum was heard,
    /// nobody is asked. Off by default, for it trusts clocks: those of a group's voters must not drift apart by a tenth,
    /// nor stand still while a machine is suspended. All nodes of a cluster are started with the same setting. With it, a
    /// voter that starts again waits an election timeout before it votes.
    pub leader_lease: bool,
    /// Ticks without anything new after which a group sleeps until something happens; at least `election_ticks`. 0: never.
    /// One that nobody used since it was opened, or slept last, does not wait for them.
    pub sleep_after_ticks: u64,
    /// The largest proposal in bytes; also bounded by a quarter of the log's batch.
    pub max_entry_bytes: u64,
    /// The most that one append message carries, in bytes.
    pub max_append_bytes: u64,
    /// Append messages in flight per follower.
    pub max_inflight_appends: usize,
    /// Bytes of entries in flight per follower; exceeded by one message at most.
    pub max_inflight_bytes: u64,
    /// Bytes of entries in flight per node, over all groups of one core thread; exceeded by one message per group that
    /// probes at most.
    pub max_node_inflight_bytes: u64,
    /// Proposed and not yet committed bytes per group, above which proposals are answered Busy.
    pub max_uncommitted_bytes: u64,
    /// Committed and not yet applied bytes per group, above which proposals are answered Busy and followers take no
    /// entries: their leaders repeat them.
    pub max_unapplied_bytes: u64,
    /// The same over all groups of one core thread.
    pub max_unapplied_node_bytes: u64,
    /// The size that snapshot chunks aim at, in bytes, the first of a state; those behind them are up to three times as large. At most a
    /// quarter of what the transport takes in one message; the same on all nodes, or what was received from one is of no use with
    /// another.
    pub chunk_bytes: usize,
    /// Chunks that a receiver has asked for and not made durable: so many are sent again if it is killed. More than one pays
    /// where the way to the source is long.
    pub chunk_window: u32,
    /// What snapshots may take of the node; [`crate::MultiRaft::set_snapshot_budget`] changes it.
    pub snapshots: SnapshotBudget,
    /// How often applied state is made durable while there is any that is not.
    pub flush_interval: Duration,
    /// A session whose last request is older than this expires.
    pub session_ttl: Duration,
    /// Entries that a group's log may keep for members that lag; beyond it they take a snapshot.
    pub max_retained_entries: u64,
    /// The same in bytes of the log, so that a member that is away for long does not fill the disk.
    pub max_retained_bytes: u64,
    /// Seeds the election jitter, so that a run can be replayed.
    pub seed: u64,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            core_threads: 1,
            urgent_group: None,
            vouching_group: None,
            apply_threads: 1,
            tick: Duration::from_millis(100),
            heartbeat_ticks: 3,
            election_ticks: 10,
            leader_lease: false,
            sleep_after_ticks: 30,
            max_entry_bytes: 2 << 20,
            max_append_bytes: 512 << 10,
            max_inflight_appends: 128,
            max_inflight_bytes: 8 << 20,
            max_node_inflight_bytes: 32 << 20,
            max_uncommitted_bytes: 32 << 20,
            max_unapplied_bytes: 32 << 20,
            max_unapplied_node_bytes: 256 << 20,
            chunk_bytes: 4 << 20,
            chunk_window: 1,
            snapshots: SnapshotBudget::NORMAL,
            flush_interval: Duration::from_secs(1),
            session_ttl: Duration::from_secs(3600),
            max_retained_entries: 1 << 20,
            max_retained_bytes: 256 << 20,
            seed: 0,
        }
    }
}

impl Config {
    /// # Errors
    /// [`Error::Config`] naming the field that does not fit.
    pub fn validate(&self) -> Result<(), Error> {
        let refuse = |what: &str| Err(Error::Config(what.to_owned()));
        if self.core_threads == 0 || self.apply_threads == 0 {
            return refuse("core_threads and apply_threads are at least 1");
        }
        if self.heartbeat_ticks == 0 || self.election_ticks <= self.heartbeat_ticks {
            return refuse("election_ticks is larger than heartbeat_ticks, which is at least 1");
        }
        if (1..self.election_ticks as u64).contains(&self.sleep_after_ticks) {
            return refuse("sleep_after_ticks is 0 or at least election_ticks");
        }
        if self.chunk_bytes == 0 || self.chunk_window == 0 {
            return refuse("chunk_bytes and chunk_window are at least 1");
        }
        if self.max_entry_bytes == 0 || self.max_inflight_appends == 0 {
            return refuse("max_entry_bytes and max_inflight_appends are at least 1");
        }
        if self.max_append_bytes == 0
            || self.max_append_bytes > self.max_inflight_bytes.min(self.max_node_inflight_bytes)
        {
            return refuse(
                "max_append_bytes is at least 1, and at most max_inflight_bytes and max_node_inflight_bytes",
            );
        }
        Ok(())
    }

    /// Appends of the largest size that a follower may have under way.
    pub(crate) fn first_inflight_appends(&self) -> usize {
        let first = self.max_inflight_bytes / self.max_append_bytes;
        usize::try_from(first).map_or(self.max_inflight_appends, |first| first.min(self.max_inflight_appends))
    }
}

/// What a replica is made from. The same spec may be given again at any time.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupSpec {
    /// The group, not [`GroupId::NODE`].
    pub group: GroupId,
    /// The replica on this node.
    pub replica: ReplicaId,
    /// What the state belongs to; handed to [`crate::Machines::open`] and kept in the log's metadata.
    pub descriptor: Bytes,
    /// The shard epoch that the group starts with. Ignored for a replica without `initial`.
    pub epoch: u64,
    /// The founding configuration, the same on each founding member; `None` for a replica that waits for a snapshot.
    pub initial: Option<ConfState>,
}

/// Names one request of one client for ever. A retry carries the same, and is applied once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestId {
    /// The client, random.
    pub client: u128,
    /// The timestamp that [`crate::Group::session_stamp`] gave this client; the same on each retry.
    pub stamp: u64,
    /// Counts the client's requests, from 1.
    pub seq: u64,
    /// The client has all answers below this and will not ask again.
    pub acked_below: u64,
}

/// What is asked of a group.
#[derive(Debug, Clone)]
pub struct Proposal {
    /// The command, for the state machine.
    pub payload: Bytes,
    /// Names the request; without one, a retry may be applied twice.
    pub request: Option<RequestId>,
    /// The shard epoch that the proposer believes in; 0 is not checked.
    pub epoch: u64,
    /// Taken although disks are nearly full ([`Room::Low`]): for the few small commands by which room is made.
    pub urgent: bool,
}

/// How fresh a read must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReadLevel {
    /// Sees every write that was acknowledged before it began. The leader serves it.
    #[default]
    Linearizable,
    /// Sees every write that was acknowledged more than this before it began; with zero, all of them. Any replica serves
    /// it, learners too, and asks the leader only if what it heard last is too old. Counted in ticks, two of which are
    /// taken for the clock's coarseness.
    Follower {
        /// How stale it may be.
        max_lag: std::time::Duration,
    },
    /// Sees what this replica has, however old, without asking anybody.
    Local,
}

/// How much room the disks of a node have left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Room {
    /// Enough for everything.
    #[default]
    Ample,
    /// Less than the reserve. Groups led here hand leadership to a voter with room, and take no commands but urgent ones
    /// ([`Rejected::DiskFull`](crate::Rejected::DiskFull)); what others commit is still taken.
    Low,
    /// The reserve is half gone. Nothing is taken from leaders elsewhere either, entries or snapshots, so that the engine
    /// never meets the end of the disk; they repeat it later.
    Critical,
}

/// A command took effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// Where in the log. For a retry: where it was applied first.
    pub index: u64,
    /// What the state machine answered.
    pub reply: Bytes,
}

/// A change of a group's members. Each is "ensure": one that already holds is answered at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemberChange {
    /// The replica becomes a learner, unless it is a member already.
    AddLearner(ReplicaId),
    /// A learner that is caught up becomes a voter.
    Promote(ReplicaId),
    /// A learner leaves. Voters are demoted first; the leader cannot be removed.
    Remove(ReplicaId),
    /// In one joint step, learners that are caught up become voters and voters become learners. Whoever leads leaves the
    /// joint configuration by itself.
    EnterJoint {
        /// Learners to become voters.
        promote: Vec<ReplicaId>,
        /// Voters to become learners.
        demote: Vec<ReplicaId>,
    },
    /// Leaves a joint configuration.
    LeaveJoint,
}

/// In whose name a group is given an order, so that one which comes late is known for it.
///
/// An order is taken by the leader of `term` alone, and by it only while it has heard of none with a higher place. Why that
/// is enough stands at the head of `replica/mandate.rs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mandate {
    /// The group's term in which whoever gives the order has seen its leader lead.
    pub term: u64,
    /// The order's place among all that are ever given to the group, compared from the left. Whoever gives orders sees to it
    /// that one which must no longer take effect has a lower place than those that follow.
    pub place: [u64; 3],
}

/// How a replica of a group that has lost its quorum for good goes on: alone, under a new id.
///
/// It is refused unless the replica is what it was when that was decided, so that a group which lives after all is left alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recovery {
    /// The replica that it is.
    pub from: ReplicaId,
    /// The replica that it becomes: on the same node, with a higher ordinal than any that was given out there.
    pub to: ReplicaId,
    /// The last entry of its log: the term and the index.
    pub last: (u64, u64),
}

/// What a replica is at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Role {
    /// Follows, or waits for its first snapshot.
    #[default]
    Follower,
    /// Follows without a vote.
    Learner,
    /// Asks for votes.
    Candidate,
    /// Leads.
    Leader,
    /// Has stopped for good; must be replaced under a new id.
    Dead,
}

/// How far a leader knows a member to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// The member.
    pub replica: ReplicaId,
    /// Its log is durable and equal to the leader's up to this index.
    pub matched: u64,
    /// It needs, or is taking, a snapshot.
    pub snapshot: bool,
    /// It answered within the last election timeout.
    pub active: bool,
}

/// How far a snapshot has been pulled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PullProgress {
    /// Bytes that are staged.
    pub bytes_done: u64,
    /// Bytes in all.
    pub bytes_total: u64,
    /// It waits for its turn among other pulls, or for the node's budget.
    pub queued: bool,
}

/// A hash of a replica's state, made at an entry that asked for it ([`crate::Group::verify`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verified {
    /// The entry's index. Equal states at the same index have equal hashes.
    pub index: u64,
    /// The hash of all rows; `None` while it is being made.
    pub hash: Option<[u8; 32]>,
}

/// What a replica is and knows.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupStatus {
    /// The group.
    pub group: GroupId,
    /// The replica here.
    pub replica: ReplicaId,
    /// Its role.
    pub role: Role,
    /// Its term.
    pub term: u64,
    /// Who leads, as far as it knows.
    pub leader: Option<ReplicaId>,
    /// The first index in its log.
    pub first_index: u64,
    /// The last index in its log.
    pub last_index: u64,
    /// The last index that is durable in its log.
    pub persisted: u64,
    /// The last index known to be committed.
    pub commit: u64,
    /// The last index that its state machine holds.
    pub applied: u64,
    /// The last index that its engine holds durably.
    pub durable: u64,
    /// The shard epoch.
    pub epoch: u64,
    /// The members, as applied.
    pub conf_state: ConfState,
    /// How far the members are; empty on all but the leader.
    pub progress: Vec<Progress>,
    /// A snapshot that is being pulled.
    pub pull: Option<PullProgress>,
    /// Why no snapshot comes that is wanted: the last source's word, or the lack of room here.
    pub pull_blocked: Option<String>,
    /// On a leader that takes no commands for lack of room: the node whose disk is full.
    pub no_room: Option<NodeId>,
    /// The state that was hashed last. Of a replica that has applied an entry which asked for a hash and tells of another one,
    /// or of none, that hash will not be known: it started again or took a snapshot since.
    pub verified: Option<Verified>,
    /// Nothing happens in the group, and it costs nothing until something does.
    pub sleeping: bool,
    /// Why the replica is dead.
    pub dead: Option<String>,
}

impl GroupStatus {
    /// Whether the configuration is a joint one.
    pub fn is_joint(&self) -> bool {
        !self.conf_state.voters_outgoing.is_empty()
    }

    pub(crate) fn dead(group: GroupId, replica: ReplicaId, reason: String) -> Self {
        GroupStatus { role: Role::Dead, dead: Some(reason), ..GroupStatus::new(group, replica) }
    }

    pub(crate) fn new(group: GroupId, replica: ReplicaId) -> Self {
        GroupStatus {
            group,
            replica,
            role: Role::Follower,
            term: 0,
            leader: None,
            first_index: 1,
            last_index: 0,
            persisted: 0,
            commit: 0,
            applied: 0,
            durable: 0,
            epoch: 0,
            conf_state: ConfState::default(),
            progress: Vec::new(),
            pull: None,
            pull_blocked: None,
            no_room: None,
            verified: None,
            sleeping: false,
            dead: None,
        }
    }
}

/// What happened, for whoever watches.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Event {
    /// A replica learned of a leader.
    LeaderChanged {
        /// The group.
        group: GroupId,
        /// The leader.
        leader: ReplicaId,
        /// Its term.
        term: u64,
    },
    /// A replica has stopped for good.
    ReplicaDead {
        /// The group.
        group: GroupId,
        /// Why, and the next step.
        reason: String,
    },
    /// A replica took a snapshot in.
    SnapshotInstalled {
        /// The group.
        group: GroupId,
        /// The index it stands at.
        index: u64,
        /// How many bytes were received.
        bytes: u64,
        /// How many chunks were received.
        chunks: u32,
        /// How many chunks there were already, from a pull that was cut short.
        held: u32,
    },
    /// The shared log failed: nothing is acknowledged any more; restart the node on a healthy disk.
    LogFailed {
        /// What the log said.
        reason: String,
    },
    /// The engine failed: no replica of this node goes on; restart the node once the cause is gone.
    EngineFailed {
        /// What the engine said.
        reason: String,
    },
    /// A message from a peer was refused before it reached Raft.
    MessageRefused {
        /// The sender.
        from: NodeId,
        /// The group.
        group: GroupId,
        /// What is wrong with it.
        reason: String,
    },
}
