//! The core: all replicas of one loop, without a clock, a disk or a socket.
//!
//! ```text
//!  Input ──> handle() ──> replicas ──┐            one turn: handle as many inputs as there are,
//!                                    │            then poll() once: every ready of every group
//!  Effects <──────────── poll() <────┘            goes into one submission to the log
//! ```
//!
//! A turn gives the log one atomic batch per turn (cut between groups at the batch limit), so one sync serves them all.
//! Reads of the log and its non-blocking submissions are calls, not effects: raft reads its storage synchronously.

mod lifecycle;
mod neighbours;
mod recover;
mod reseed;
mod sleepers;
mod time;
mod turn;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use pontoon_proto::{GroupId, NodeId, ReplicaId, v1};
use pontoon_wal::{Submitter, Wal};

use lifecycle::OPENED_PER_TICK;
pub(crate) use neighbours::Neighbours;
use reseed::Reseed;
use sleepers::Wakes;
use time::Pass;

use crate::{
    apply::{ApplyOutcome, ApplyTask},
    budget::{Ledger, Turns},
    effects::{Answer, Effects, Input, Now, Token},
    envelope,
    error::{Error, Rejected},
    hybrid::HybridClock,
    replica::{Alive, Replica, Shared, guarded},
    snapshot::ServeTask,
    types::{Config, Event, GroupStatus, Room},
};

enum Slot {
    /// The record is being made durable, or the machine is being opened.
    Opening {
        replica: ReplicaId,
        /// A new member of a new group: nobody leads it yet.
        founding: bool,
        waiting: Vec<Token>,
    },
    Live(Box<Replica>),
    /// The log is whole, the engine's state is lost: it comes from another member.
    Reseeding(Box<Reseed>),
    /// Stopped for good; answers nothing, votes for nobody.
    Dead {
        replica: ReplicaId,
        reason: String,
    },
    /// The tombstone is being made durable, or the data is being removed.
    Leaving {
        min_replica: u64,
        descriptor: Bytes,
        waiting: Vec<Token>,
    },
}

/// What a submission to the log was for.
enum Submission {
    Turn(Vec<(GroupId, u64)>),
    Created(GroupId),
    Tombstone(GroupId),
}

/// A submission that is not durable yet.
struct Submitted {
    token: u64,
    /// The tick it was made at.
    since: u64,
    what: Submission,
}

/// All replicas of one loop.
pub(crate) struct Core {
    shared: Shared,
    slots: BTreeMap<GroupId, Slot>,
    ready: BTreeSet<GroupId>,
    /// Every live replica that is not asleep. Time goes on for these alone.
    awake: BTreeSet<GroupId>,
    /// Every replica that waits for its state.
    reseeding: BTreeSet<GroupId>,
    /// The nodes that have members of groups that sleep here, and of how many.
    bedfellows: BTreeMap<NodeId, usize>,
    /// Sleeping groups that are to wake, not all at once.
    wakes: Wakes,
    /// How far the clock has come among those that are awake.
    pass: Pass,
    /// Replicas whose machines are to be opened: not all at once, and at once where somebody asks.
    unopened: BTreeSet<GroupId>,
    /// So many more may be opened in this tick.
    may_open: usize,
    /// The first group that the digest under way has not come to.
    digest: Option<GroupId>,
    /// Which loop of the node this is, and how many there are.
    lane: (u32, u32),
    submissions: VecDeque<Submitted>,
    next_submission: u64,
    /// Time has passed since it was last seen whether the log is stalled.
    stall_is_due: bool,
    batch_limit: u64,
    /// The log failed: no replica acts any more.
    failed: Option<String>,
}

impl Core {
    /// `unique_base` differs between incarnations of the node and between its cores; `lane` is which of how many cores.
    pub(crate) fn new(
        config: Config,
        node: NodeId,
        wal: Wal,
        submitter: Submitter,
        unique_base: u64,
        lane: (u32, u32),
    ) -> Self {
        let turns = Turns::new(config.snapshots, lane.1, config.tick);
        let batch_limit = wal.max_batch_bytes();
        let max_entry_bytes = config.max_entry_bytes.min(batch_limit / 4 - envelope::OVERHEAD);
        Core {
            shared: Shared {
                config,
                node,
                wal,
                submitter,
                accepted: BTreeSet::new(),
                vouched: false,
                flights: Default::default(),
                unapplied_bytes: 0,
                room: Room::Ample,
                shuns: false,
                low_peers: BTreeMap::new(),
                neighbours: Neighbours::default(),
                clock: HybridClock::default(),
                wall_ms: 0,
                clock_now: Duration::ZERO,
                ticks: 0,
                unique: unique_base,
                max_entry_bytes,
                turns,
            },
            slots: BTreeMap::new(),
            ready: BTreeSet::new(),
            awake: BTreeSet::new(),
            reseeding: BTreeSet::new(),
            bedfellows: BTreeMap::new(),
            wakes: Wakes::default(),
            pass: Pass::default(),
            unopened: BTreeSet::new(),
            may_open: OPENED_PER_TICK,
            digest: None,
            lane,
            submissions: VecDeque::new(),
            next_submission: 0,
            stall_is_due: false,
            batch_limit,
            failed: None,
        }
    }

    /// Takes one input.
    pub(crate) fn handle(&mut self, now: Now, input: Input, fx: &mut Effects) {
        (self.shared.wall_ms, self.shared.clock_now) = (now.wall_ms, now.clock);
        match input {
            Input::Tick(ticks) => self.tick(ticks, fx),
            Input::Peer { from, message } => self.on_peer(from, message, fx),
            Input::Propose { group, token, proposal, span } => {
                let Some(replica) = live(&mut self.slots, group) else {
                    let rejected = self.missing(group, fx);
                    return fx.propose_error(token, rejected);
                };
                replica.use_it();
                if replica.is_full(self.batch_limit) {
                    self.poll_group(group, fx);
                }
                self.with(group, fx, |replica, shared, fx| {
                    replica.propose(shared, token, proposal, span, fx)
                });
            }
            Input::Stamp { group, token } => match live(&mut self.slots, group) {
                Some(replica) => replica.stamp(&mut self.shared, token, fx),
                None => {
                    let rejected = self.missing(group, fx);
                    fx.answers.push((token, Answer::Index(Err(rejected))));
                }
            },
            Input::Read { group, token, level } => match live(&mut self.slots, group) {
                Some(replica) => {
                    replica.read(&self.shared, token, level, fx);
                    // What this replica can answer by itself wakes nobody.
                    if replica.has_readers() {
                        replica.use_it();
                        self.with(group, fx, |_, _, _| Ok(()));
                    }
                }
                None => {
                    let rejected = self.missing(group, fx);
                    fx.answers.push((token, Answer::Index(Err(rejected))));
                }
            },
            Input::Change { group, token, change, mandate } => {
                if live(&mut self.slots, group).is_none() {
                    let rejected = self.missing(group, fx);
                    return fx.answers.push((token, Answer::Done(Err(rejected))));
                }
                self.with(group, fx, |replica, shared, fx| {
                    replica.change(shared, token, &change, mandate, fx)
                });
            }
            Input::Verify { group, token } => {
                if live(&mut self.slots, group).is_none() {
                    let rejected = self.missing(group, fx);
                    return fx.answers.push((token, Answer::Index(Err(rejected))));
                }
                self.with(group, fx, |replica, shared, fx| {
                    replica.stir();
                    replica.verify(shared, token, fx)
                });
            }
            Input::Depths { group, token } => {
                let depths = match live(&mut self.slots, group) {
                    Some(replica) => Ok(Box::new(replica.depths(self.shared.wal.log_bytes(group)))),
                    None => Err(self.missing(group, fx)),
                };
                fx.answers.push((token, Answer::Depths(depths)));
            }
            Input::OtherSource { group, token } => {
                if live(&mut self.slots, group).is_none() {
                    let rejected = self.missing(group, fx);
                    return fx.answers.push((token, Answer::Done(Err(rejected))));
                }
                self.with(group, fx, |replica, shared, fx| {
                    replica.other_source(shared, fx);
                    fx.answers.push((token, Answer::Done(Ok(()))));
                    Ok(())
                });
            }
            Input::Verified { group, index, hash } => {
                if let Some(replica) = live(&mut self.slots, group) {
                    replica.on_verified(index, hash);
                    fx.statuses.push(replica.status());
                }
            }
            Input::Transfer { group, token, to, mandate } => {
                if live(&mut self.slots, group).is_none() {
                    let rejected = self.missing(group, fx);
                    return fx.answers.push((token, Answer::Done(Err(rejected))));
                }
                self.with(group, fx, |replica, shared, fx| replica.transfer(shared, token, to, mandate, fx));
            }
            Input::Members { group, token, mandate } => {
                if live(&mut self.slots, group).is_none() {
                    let rejected = self.missing(group, fx);
                    return fx.answers.push((token, Answer::Members(Err(rejected))));
                }
                self.with(group, fx, |replica, shared, fx| {
                    replica.members(shared, token, mandate, fx);
                    Ok(())
                });
            }
            Input::Create { spec, token } => self.create(spec, token, fx),
            Input::Adopt { group, token } => self.adopt(group, token, fx),
            Input::Destroy { group, replica, token } => self.destroy(group, replica, token, fx),
            Input::Recover { group, recovery, token } => self.recover(group, &recovery, token, fx),
            Input::Persisted { submission } => self.on_persisted(submission, fx),
            Input::LogFailed { reason } => self.on_log_failed(reason, fx),
            Input::EngineFailed { reason } => self.on_engine_failed(reason, fx),
            Input::Outcome(outcome) => self.on_outcome(outcome, fx),
            Input::Fetched { group, replica, low, read } => {
                // A later replica of the group has not asked.
                if live(&mut self.slots, group).is_some_and(|live| live.id == replica) {
                    self.with(group, fx, |replica, _, _| replica.fetched(low, read));
                }
            }
            Input::Flushed(marks) => {
                for (group, index) in marks {
                    if let Some(replica) = live(&mut self.slots, group) {
                        replica.flushed(index);
                    }
                }
            }
            Input::AcceptedBy(node) => {
                self.shared.accepted.insert(node);
                // It may have started anew: what it said before is old.
                self.shared.hear_room(node, false);
            }
            Input::Vouched => self.shared.vouched = true,
            Input::Room(room) => self.on_room(room, fx),
            Input::Shun(shuns) => self.on_shun(shuns, fx),
            Input::Free(bytes) => self.shared.turns.set_free(bytes),
            Input::Strained(strained) => self.shared.turns.set_strained(strained),
            Input::Budget(budget) => {
                self.shared.turns.set_budget(budget);
                fx.serve.push(ServeTask::Budget(budget));
            }
            Input::Unreachable(node) => {
                // Of those that sleep, none waits for anybody.
                let groups: Vec<GroupId> = self.awake.iter().copied().collect();
                for group in groups {
                    self.with(group, fx, |replica, shared, fx| replica.unreachable(shared, node, fx));
                }
            }
        }
    }

    /// Shares the room on the disk with the node's other loops.
    pub(crate) fn sharing(mut self, ledger: Arc<Ledger>) -> Core {
        self.shared.turns.share(ledger);
        self
    }

    /// Followers that waited for their nodes go on, and pulls that waited for their turn.
    fn feed(&mut self, fx: &mut Effects) {
        let fed = self.shared.flights.take_fed(self.shared.config.max_node_inflight_bytes);
        for (group, member) in fed {
            self.with(group, fx, |replica, shared, fx| replica.feed(shared, member, fx));
        }
        for group in self.shared.turns.take_next() {
            if self.reseeding.contains(&group) {
                self.go_on_with_reseed(group, fx);
                continue;
            }
            self.with(group, fx, |replica, shared, fx| {
                replica.go_on(shared, fx);
                Ok(())
            });
        }
    }

    /// Runs `work` on a live replica, which wakes if it sleeps; what it says went wrong, or a panic, ends the replica and
    /// nothing else. Raft reads its storage where one does not think of it, and takes a damaged log for a broken invariant.
    fn with(
        &mut self,
        group: GroupId,
        fx: &mut Effects,
        work: impl FnOnce(&mut Replica, &mut Shared, &mut Effects) -> Alive<()>,
    ) {
        if let Err(reason) = self.get_up(group, false, fx) {
            return self.kill(group, reason, fx);
        }
        let Some(replica) = live(&mut self.slots, group) else { return };
        let shared = &mut self.shared;
        match guarded(|| work(replica, shared, fx)).flatten() {
            Ok(()) => {
                self.ready.insert(group);
            }
            Err(reason) => self.kill(group, reason, fx),
        }
    }

    /// A replica has stopped for good; the others go on.
    fn kill(&mut self, group: GroupId, reason: String, fx: &mut Effects) {
        if self.stop(group, reason.clone(), fx) {
            fx.events.push(Event::ReplicaDead { group, reason });
        }
    }

    fn stop(&mut self, group: GroupId, reason: String, fx: &mut Effects) -> bool {
        let Some(slot) = self.slots.remove(&group) else { return false };
        // A later replica of the group is opened when its own record is durable.
        self.unopened.remove(&group);
        let replica = match slot {
            Slot::Live(mut replica) => {
                self.part_with(&mut replica, fx);
                fx.apply.push(ApplyTask::Close { group });
                replica.id
            }
            Slot::Opening { replica, waiting, .. } => {
                for token in waiting {
                    let reason = reason.clone();
                    fx.answers.push((token, Answer::Replica(Err(Error::Damaged { group, reason }))));
                }
                replica
            }
            Slot::Reseeding(reseed) => {
                self.forget_reseed(group);
                fx.apply.push(ApplyTask::Close { group });
                reseed.replica
            }
            other => {
                self.slots.insert(group, other);
                return false;
            }
        };
        fx.statuses.push(GroupStatus::dead(group, replica, reason.clone()));
        self.slots.insert(group, Slot::Dead { replica, reason });
        true
    }

    /// What a replica is at this moment.
    pub(crate) fn status(&self, group: GroupId) -> Option<GroupStatus> {
        match self.slots.get(&group)? {
            Slot::Live(replica) => Some(replica.status()),
            Slot::Dead { replica, reason, .. } => Some(GroupStatus::dead(group, *replica, reason.clone())),
            Slot::Reseeding(_) => self.reseed_status(group),
            Slot::Opening { .. } | Slot::Leaving { .. } => None,
        }
    }

    /// What is asked of a replica that is not live. One that waits to be opened need not wait any longer.
    fn missing(&mut self, group: GroupId, fx: &mut Effects) -> Rejected {
        self.open_now(group, fx);
        match self.slots.get(&group) {
            Some(Slot::Opening { .. }) if self.failed.is_none() => {
                Rejected::NotLeader { group, leader: None }
            }
            Some(Slot::Dead { .. }) => Rejected::Stopped(group),
            Some(Slot::Reseeding(_)) if self.failed.is_none() => Rejected::NotLeader { group, leader: None },
            _ if self.failed.is_some() => Rejected::Stopped(group),
            _ => Rejected::NoGroup(group),
        }
    }

    fn on_peer(&mut self, from: NodeId, message: v1::PeerMessage, fx: &mut Effects) {
        use v1::peer_message::Body;
        let group = GroupId(message.group);
        match &message.body {
            Some(Body::Ping(ping)) if group == GroupId::NODE => return self.on_ping(from, ping),
            Some(Body::Beats(beats)) if group == GroupId::NODE => return self.on_beats(from, beats, fx),
            _ => {}
        }
        let (Ok(sender), Some(body)) = (ReplicaId::new(message.from), message.body) else { return };
        if sender.node() != from {
            let reason = format!("it speaks for {sender}, which is on another node");
            return fx.events.push(Event::MessageRefused { from, group, reason });
        }
        let Some(replica) = live(&mut self.slots, group) else {
            // Whoever speaks to a member repeats it.
            self.open_now(group, fx);
            return self.on_peer_of_reseed(group, sender, message.to, body, fx);
        };
        if replica.id.get() != message.to {
            return;
        }
        if !is_beat(&body) {
            replica.stir();
        }
        if let Body::Raft(_) = body
            && replica.is_full(self.batch_limit)
        {
            self.poll_group(group, fx);
        }
        self.with(group, fx, |replica, shared, fx| match body {
            Body::Raft(wire) => replica.on_raft(shared, sender, wire, fx),
            Body::ManifestRequest(_) | Body::ChunkRequest(_) | Body::SnapshotStatus(_) => {
                replica.on_asked(shared, sender, body, fx)
            }
            Body::Manifest(_) | Body::Chunk(_) | Body::PullRefused(_) => {
                replica.on_pulled(shared, sender, body, fx)
            }
            Body::ReadRequest(asked) => {
                replica.on_read_request(shared, sender, asked.context, fx);
                Ok(())
            }
            Body::ReadReply(reply) => {
                replica.confirm(reply.context, reply.index, fx);
                Ok(())
            }
            Body::Ping(_) | Body::Beats(_) => Ok(()),
        });
    }

    fn on_persisted(&mut self, submission: u64, fx: &mut Effects) {
        // Acknowledgements come in the order of submission; relaxed ones may be skipped over.
        while let Some(done) = self.submissions.pop_front_if(|waiting| waiting.token <= submission) {
            match done.what {
                Submission::Turn(groups) => {
                    for (group, number) in groups {
                        self.with(group, fx, |replica, shared, fx| replica.on_persisted(shared, number, fx));
                    }
                }
                Submission::Created(group) => self.open_in_turn(group, fx),
                Submission::Tombstone(group) => {
                    if let Some(Slot::Leaving { descriptor, .. }) = self.slots.get(&group) {
                        fx.apply.push(ApplyTask::Destroy { group, descriptor: descriptor.clone() });
                    }
                }
            }
        }
    }

    fn on_log_failed(&mut self, reason: String, fx: &mut Effects) {
        if self.failed.is_some() {
            return;
        }
        tracing::error!(%reason, "the log has failed; nothing is acknowledged any more; restart the node on a healthy disk");
        fx.events.push(Event::LogFailed { reason: reason.clone() });
        self.stop_all(format!("the log failed: {reason}"), fx);
    }

    /// Entries that were acknowledged are in the log; the next open applies what the engine lost.
    fn on_engine_failed(&mut self, reason: String, fx: &mut Effects) {
        if self.failed.is_some() {
            return;
        }
        tracing::error!(%reason, "the engine has failed; nothing is applied any more; restart the node once the cause is gone");
        fx.events.push(Event::EngineFailed { reason: reason.clone() });
        self.stop_all(format!("the engine failed: {reason}"), fx);
    }

    /// No replica acts any more in this open; none of them is lost.
    fn stop_all(&mut self, reason: String, fx: &mut Effects) {
        self.failed = Some(reason.clone());
        let groups: Vec<GroupId> = self.slots.keys().copied().collect();
        for group in groups {
            self.stop(group, reason.clone(), fx);
        }
    }

    fn on_outcome(&mut self, outcome: ApplyOutcome, fx: &mut Effects) {
        if self.on_outcome_of_reseed(&outcome, fx) {
            return;
        }
        match outcome {
            ApplyOutcome::Applied { group, mark, bytes, replies } => {
                self.with(group, fx, |replica, shared, fx| {
                    replica.on_applied(shared, mark, bytes, replies, fx)
                });
            }
            ApplyOutcome::Opened { group, mark } => self.on_opened(group, mark, fx),
            ApplyOutcome::Staged { group, pull, chunk } => {
                self.with(group, fx, |replica, shared, fx| replica.on_staged(shared, pull, chunk, fx));
            }
            ApplyOutcome::StageBegun { group, pull, held } => {
                self.with(group, fx, |replica, shared, fx| replica.on_stage_begun(shared, pull, &held, fx));
            }
            ApplyOutcome::StageFailed { group, pull, reason } => {
                self.with(group, fx, |replica, shared, fx| {
                    replica.on_stage_failed(shared, pull, reason, fx);
                    Ok(())
                });
            }
            ApplyOutcome::Installed { group, mark } => self.on_installed(group, mark, fx),
            ApplyOutcome::Checkpointed { request, source, mark, descriptor } => {
                if let Some(replica) = live(&mut self.slots, request.group) {
                    replica.tell_at_work(&request, fx);
                }
                fx.serve.push(ServeTask::Publish { request, source, mark, descriptor });
            }
            ApplyOutcome::Verify { group, index, source } => {
                if let Some(replica) = live(&mut self.slots, group) {
                    replica.on_verify(index);
                    fx.serve.push(ServeTask::Verify { group, index, source });
                }
            }
            ApplyOutcome::CheckpointRefused { request, reason } => {
                if let Some(replica) = live(&mut self.slots, request.group) {
                    replica.refuse_pull(&request, reason, fx);
                }
            }
            ApplyOutcome::Destroyed { group } => {
                if let Some(Slot::Leaving { waiting, .. }) = self.slots.remove(&group) {
                    fx.gone.push(group);
                    fx.answers.extend(waiting.into_iter().map(|token| (token, Answer::Destroyed(Ok(())))));
                }
            }
            ApplyOutcome::EngineFailed { reason } => self.on_engine_failed(reason, fx),
            ApplyOutcome::Failed { group, reason } => {
                if let Some(Slot::Leaving { waiting, .. }) = self.slots.get_mut(&group) {
                    // The tombstone stands; the data goes when it is asked for again.
                    for token in std::mem::take(waiting) {
                        let error = Error::Machine { group, source: reason.clone().into() };
                        fx.answers.push((token, Answer::Destroyed(Err(error))));
                    }
                    return;
                }
                self.kill(group, reason, fx);
            }
        }
    }
}

/// Whether a message says nothing that keeps a group awake: a leader that has nothing to do says it, too.
fn is_beat(body: &v1::peer_message::Body) -> bool {
    use raft::eraftpb::MessageType::{MsgHeartbeat, MsgHeartbeatResponse};
    match body {
        v1::peer_message::Body::Raft(wire) => {
            [MsgHeartbeat as i32, MsgHeartbeatResponse as i32].contains(&wire.kind)
        }
        _ => false,
    }
}

fn live(slots: &mut BTreeMap<GroupId, Slot>, group: GroupId) -> Option<&mut Replica> {
    match slots.get_mut(&group) {
        Some(Slot::Live(replica)) => Some(replica),
        _ => None,
    }
}
