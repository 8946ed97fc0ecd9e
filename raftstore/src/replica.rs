//! One replica: raft's node and the bookkeeping around it.
//!
//! Which message may leave when (the design's rule, kept in `ready.rs`):
//!
//! 1. While a term or a vote of this replica is not durable, nothing leaves it.
//! 2. Otherwise a leader's messages leave at once (they promise nothing about its own disk).
//! 3. A follower's heartbeat responses leave at once (they promise a term only).
//!    Heartbeats and their responses leave packed ([`crate::beats`]) with everything else, at the end of the turn.
//! 4. Every other message of a non-leader waits until its ready, and all before it, are durable.
//! 5. Votes, candidacies and acknowledgements leave only once this node's boot token was accepted, by the vouching group or
//!    by the group's other voters ([`crate::identity`]), so that a copied or restored disk cannot vote twice.

mod fetched;
pub(crate) mod flow;
mod inbound;
mod inspect;
mod lease;
mod mandate;
mod membership;
mod proposals;
mod pulls;
mod reads;
mod ready;
mod room;
mod sleep;
mod trace;
mod verify;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use bytes::Bytes;
use pontoon_proto::{GroupId, NodeId, ReplicaId, v1};
use pontoon_wal::{self as wal, Reservation, Submitter, Wal};
use raft::{RawNode, StateRole, eraftpb as pb};

use flow::{Flights, NodeFlights};
pub use inspect::{Depths, Flight};
use lease::Lease;
use reads::Reads;
pub(crate) use ready::Taken;
use sleep::Sleep;
use trace::Traces;

use crate::{
    apply::panic_text,
    budget::Turns,
    convert,
    core::Neighbours,
    effects::{Answer, Effects, Token},
    error::{Ambiguous, Error, Rejected},
    hybrid::HybridClock,
    logging::raft_logger,
    puller::Puller,
    rules::{Rule, is_broken},
    storage::GroupStorage,
    types::{Config, Event, GroupStatus, Progress, Recovery, Role, Room, Verified},
};

/// What all replicas of a core share while one of them works.
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) node: NodeId,
    pub(crate) wal: Wal,
    pub(crate) submitter: Submitter,
    /// Peers that accepted this node's current boot token.
    pub(crate) accepted: BTreeSet<NodeId>,
    /// The vouching group accepted it.
    pub(crate) vouched: bool,
    /// What other nodes have under way.
    pub(crate) flights: NodeFlights,
    /// Committed and not yet applied.
    pub(crate) unapplied_bytes: u64,
    /// How much room the disks here have.
    pub(crate) room: Room,
    /// Whether this node shall lead nothing: it is being emptied.
    pub(crate) shuns: bool,
    /// Nodes that lack room, and the tick at which they last said so.
    pub(crate) low_peers: BTreeMap<NodeId, u64>,
    /// What other nodes say of themselves.
    pub(crate) neighbours: Neighbours,
    pub(crate) clock: HybridClock,
    pub(crate) wall_ms: u64,
    /// A clock that never goes back, read when the input at hand was taken.
    pub(crate) clock_now: Duration,
    /// Ticks since the core started.
    pub(crate) ticks: u64,
    /// Makes read contexts and pull ids unique between incarnations.
    pub(crate) unique: u64,
    pub(crate) max_entry_bytes: u64,
    /// Whose turn it is to receive a state.
    pub(crate) turns: Turns,
}

impl Shared {
    pub(crate) fn next_unique(&mut self) -> u64 {
        self.unique += 1;
        self.unique
    }
}

/// How raft fared; anything but `Ok` ends the replica.
pub(crate) type Alive<T> = Result<T, String>;

struct ProposalWait {
    index: u64,
    token: Token,
}

/// What the leader knows of a member that takes a snapshot.
#[derive(Debug, Clone, Copy)]
struct Offer {
    /// The tick at which it last moved on it.
    since: u64,
    /// The state that it takes stands here or above: of the log below this it needs nothing.
    index: u64,
}

/// A live replica.
///
/// Invariants: `durable <= mark.index <= raft applied hand-off <= commit`; `persisted_number <= last_sync_number <=
/// last_number`; while `installing` is set raft is not touched.
pub(crate) struct Replica {
    pub(crate) group: GroupId,
    pub(crate) id: ReplicaId,
    raw: RawNode<GroupStorage>,
    mark: v1::Mark,
    /// The configuration as raft applied it; ahead of the mark's while the applier writes it.
    conf: v1::ConfState,
    /// The mark that the engine has made durable.
    durable: u64,

    /// The last ready given out, the last that needed the disk, the last that is durable.
    last_number: u64,
    last_sync_number: u64,
    persisted_number: u64,
    /// The ready whose term or vote is not durable yet.
    vote_pending: Option<u64>,
    held: VecDeque<(u64, Vec<pb::Message>)>,
    flights: Flights,
    reservation: Option<Reservation>,
    /// Bytes stepped or proposed since the last ready.
    pending_bytes: u64,

    /// Committed, not yet handed to the applier (a configuration entry may have to wait).
    committed: VecDeque<pb::Entry>,
    unapplied_bytes: u64,
    proposals: VecDeque<ProposalWait>,
    traces: Traces,
    change_wait: Option<ProposalWait>,
    /// The last index of the log when the replica went on alone; 0 if it never did. Changes of members up to here are those of
    /// the group that was, and no state below this is offered: whoever began from it would meet them.
    alone_since: u64,
    /// The highest place of an order that was heard here.
    ordered: [u64; 3],
    reads: Reads,
    lease: Lease,

    puller: Puller,
    /// A ready that carries a snapshot: it continues once the engine has switched.
    installing: Option<Box<raft::Ready>>,
    /// The ready of an installed snapshot and its index: applied once the log is durable.
    installed: Option<(u64, u64)>,
    /// Members that were offered a snapshot.
    offered: BTreeMap<u64, Offer>,
    /// On the leader: members that were not heard between raft's last two looks at its quorum, nor since.
    silent: BTreeSet<u64>,
    /// The highest index that may be truncated, as the leader said (or computed, on the leader). 0: not heard yet.
    floor: u64,
    /// The tick at which its clock moved last.
    pub(crate) ticked: u64,
    eager: bool,
    sleep: Sleep,
    seen: (u64, StateRole, u64),
    /// The last state that was hashed, or is being.
    verified: Option<Verified>,
    /// On the leader: the term and the index of the question that was asked last.
    asked: (u64, u64),
    /// Why commands are refused, as the status tells it.
    no_room: Option<NodeId>,
    dirty: bool,
}

/// The node of a member, by raft's number of it.
fn node_of(member: u64) -> Option<NodeId> {
    ReplicaId::new(member).ok().map(ReplicaId::node)
}

/// Calls into raft; a panic there ends this replica only.
pub(crate) fn guarded<T>(work: impl FnOnce() -> T) -> Alive<T> {
    catch_unwind(AssertUnwindSafe(work))
        .map_err(|panic| format!("it stopped on a broken invariant: {}", panic_text(panic.as_ref())))
}

impl Replica {
    /// Builds a replica from the log and its machine's mark, and says what the log must still take first.
    ///
    /// # Errors
    /// [`Error::Damaged`]: log and engine do not fit together; the replica must be replaced under a new id.
    pub(crate) fn build(
        shared: &mut Shared,
        group: GroupId,
        id: ReplicaId,
        mark: Option<v1::Mark>,
        founding: bool,
        alone_since: u64,
    ) -> Result<Replica, Error> {
        let damaged = |reason: String| Error::Damaged { group, reason };
        let mark = mark.unwrap_or_default();
        let (mut hard_state, mut view) = match shared.wal.group(group) {
            Some(view) => (view.hard_state, view),
            None => return Err(damaged("the log has forgotten the group".to_owned())),
        };
        if let Some(damage) = &view.damaged {
            return Err(damaged(format!("the log lost {damage}")));
        }
        if mark.index < view.truncated.0 {
            return Err(damaged(format!(
                "the engine stands at {} but the log begins after {}: the engine lost state",
                mark.index, view.truncated.0
            )));
        }
        let log_term = if mark.index == 0 { Ok(0) } else { shared.wal.term(group, mark.index) };
        if log_term.as_ref().ok() != Some(&mark.term) {
            // Crash case: the engine switched to a snapshot, the log did not take it any more. The switch record in the
            // mark says what to write; nothing was acknowledged in between.
            if mark.switched_at != mark.index || mark.index == 0 {
                return Err(damaged(format!(
                    "the engine stands at {}@{} but the log ends at {}: the log lost entries",
                    mark.index, mark.term, view.last_index
                )));
            }
            let mut batch = wal::Batch::new();
            hard_state = install_batch(&mut batch, group, &mark, hard_state);
            shared.wal.commit(batch)?;
            view = shared
                .wal
                .group(group)
                .ok_or_else(|| damaged("the log has forgotten the group".to_owned()))?;
        }
        hard_state.commit = hard_state.commit.max(mark.index);
        if hard_state.commit > view.last_index {
            return Err(damaged(format!(
                "entries up to {} were committed but the log ends at {}",
                hard_state.commit, view.last_index
            )));
        }
        let conf = mark.conf_state.clone().unwrap_or_default();
        let config = &shared.config;
        let raft_config = raft::Config {
            id: id.get(),
            election_tick: config.election_ticks,
            heartbeat_tick: config.heartbeat_ticks,
            applied: mark.index,
            max_size_per_msg: config.max_append_bytes,
            // The first burst; `flow` allows more where messages prove small.
            max_inflight_msgs: config.first_inflight_appends(),
            check_quorum: true,
            pre_vote: true,
            min_election_tick: config.election_ticks,
            max_election_tick: config.election_ticks + TIMEOUT_SPREAD_TICKS,
            read_only_option: match is_broken(Rule::ReadsAskQuorum) {
                true => raft::ReadOnlyOption::LeaseBased,
                false => raft::ReadOnlyOption::Safe,
            },
            max_uncommitted_size: config.max_uncommitted_bytes,
            max_committed_size_per_ready: 4 << 20,
            ..Default::default()
        };
        let mut storage = GroupStorage::new(shared.wal.clone(), group, hard_state, conf.clone());
        if mark.index > 0 && mark.index >= alone_since {
            storage.offer = Some((mark.index, mark.term, conf.clone()));
        }
        let raw = guarded(|| RawNode::new(&raft_config, storage, &raft_logger(group)))
            .map_err(damaged)?
            .map_err(|error| damaged(error.to_string()))?;
        raw.store().opened();
        shared.clock.observe(mark.timestamp);
        let mut replica = Replica {
            group,
            id,
            raw,
            durable: mark.index.min(view.truncated.0),
            mark,
            conf,
            last_number: 0,
            last_sync_number: 0,
            persisted_number: 0,
            vote_pending: None,
            held: VecDeque::new(),
            flights: Flights::default(),
            reservation: None,
            pending_bytes: 0,
            committed: VecDeque::new(),
            unapplied_bytes: 0,
            proposals: VecDeque::new(),
            traces: Traces::default(),
            change_wait: None,
            alone_since,
            ordered: [0; 3],
            reads: Reads::default(),
            lease: if founding { Lease::default() } else { Lease::of_reopened(shared.clock_now) },
            puller: Puller::new(group, id),
            installing: None,
            installed: None,
            offered: BTreeMap::new(),
            silent: BTreeSet::new(),
            floor: 0,
            ticked: shared.ticks,
            eager: founding,
            sleep: Sleep::default(),
            seen: (0, StateRole::Follower, 0),
            verified: None,
            asked: (0, 0),
            no_room: None,
            dirty: true,
        };
        // A sole voter has nobody to wait for; a founding group elects its first in rank at once.
        replica.eager |= replica.is_sole_voter();
        replica.after_raft(shared, &mut Effects::default());
        Ok(replica)
    }

    fn role(&self) -> StateRole {
        self.raw.raft.state
    }

    pub(crate) fn is_leader(&self) -> bool {
        self.role() == StateRole::Leader
    }

    fn leader(&self) -> Option<ReplicaId> {
        ReplicaId::new(self.raw.raft.leader_id).ok()
    }

    fn is_sole_voter(&self) -> bool {
        self.conf.voters == [self.id.get()] && self.conf.voters_outgoing.is_empty()
    }

    pub(crate) fn last_index(&self) -> u64 {
        self.raw.raft.raft_log.last_index()
    }

    pub(crate) fn term(&self) -> u64 {
        self.raw.raft.term
    }

    pub(crate) fn commit(&self) -> u64 {
        self.raw.raft.raft_log.committed
    }

    /// The last entry of the log: the term and the index.
    pub(crate) fn last_entry(&self) -> (u64, u64) {
        (self.raw.raft.raft_log.last_term(), self.last_index())
    }

    /// Why this replica must not go on alone; `None` if it may.
    pub(crate) fn refuses_recovery(&self, recovery: &Recovery) -> Option<String> {
        let (id, last) = (self.id, self.last_entry());
        if id != recovery.from || recovery.to <= id || recovery.to.node() != id.node() {
            return Some(format!("the replica here is {id}"));
        }
        if let Some(leader) = self.leader() {
            return Some(format!("{leader} leads the group"));
        }
        if self.installing.is_some() || self.installed.is_some() {
            return Some(format!("{id} is taking a snapshot in"));
        }
        if self.mark.index == 0 {
            return Some(format!("{id} has no state yet"));
        }
        (last != recovery.last).then(|| format!("{id} has gone on to entry {} of term {}", last.1, last.0))
    }

    fn not_leader(&self) -> Rejected {
        Rejected::NotLeader { group: self.group, leader: self.leader() }
    }

    /// Whether this incarnation of the node is known well enough to promise anything; see [`crate::identity`].
    fn gate_open(&self, shared: &Shared) -> bool {
        let vouching = shared.config.vouching_group.filter(|group| *group != self.group);
        if vouching.is_some() && shared.vouched {
            return true;
        }
        let known = |voters: &[u64]| {
            let knows = |node: NodeId| node == shared.node || shared.accepted.contains(&node);
            let accepted = voters.iter().filter(|id| node_of(**id).is_some_and(knows)).count();
            match vouching {
                Some(_) => accepted == voters.len(),
                None => voters.is_empty() || accepted * 2 > voters.len(),
            }
        };
        known(&self.conf.voters) && known(&self.conf.voters_outgoing)
    }

    /// Time goes on. Everything that is retried is retried here.
    pub(crate) fn tick(&mut self, shared: &mut Shared, ticks: u64, fx: &mut Effects) -> Alive<()> {
        self.ticked = shared.ticks;
        if self.installing.is_some() || self.nod_off(shared, ticks, fx) {
            return Ok(());
        }
        // A sole voter becomes leader within its campaign, and raft 0.7 asserts that its log is durable by then.
        let may_campaign = self.gate_open(shared)
            && (!self.is_sole_voter() || self.raw.raft.raft_log.persisted == self.last_index());
        if self.is_leader() || may_campaign {
            let keeps_promise = self.keeps_promise(shared);
            let campaign = !keeps_promise
                && self.eager
                && !self.is_leader()
                && self.leader().is_none()
                && self.is_first_in_rank();
            if may_campaign {
                self.eager = false;
            }
            if campaign {
                let raw = &mut self.raw;
                // Refused campaigns (a configuration entry to apply first) come again by the timeout.
                guarded(|| raw.campaign().ok())?;
            }
            // Ticks that piled up count, but only so far that a pause is not taken for a dead leader.
            for _ in 0..ticks.min(3) {
                self.note_silent();
                let elapsed = self.raw.raft.election_elapsed + 1;
                if keeps_promise && elapsed >= self.timeout_ticks(shared, self.raw.raft.term) {
                    break;
                }
                let raw = &mut self.raw;
                guarded(|| raw.tick())?;
            }
            self.after_raft(shared, fx);
        }
        self.retry_reads(shared, fx)?;
        self.tick_pull(shared, ticks, fx)?;
        if self.is_leader() {
            self.tick_offers(shared)?;
            self.tick_membership()?;
            self.announce_floor(shared);
        }
        self.note_room(shared);
        if self.dirty {
            self.dirty = false;
            fx.statuses.push(self.status());
        }
        Ok(())
    }

    /// To be called after each visit to raft: notices changes of role, term and leader, and replaces raft's own
    /// randomness by a timeout that depends on rank, term and seed only.
    fn after_raft(&mut self, shared: &mut Shared, fx: &mut Effects) {
        let term = self.raw.raft.term;
        let now = (term, self.role(), self.raw.raft.leader_id);
        self.raw.raft.set_randomized_election_timeout(self.timeout_ticks(shared, term));
        if now == self.seen {
            return;
        }
        let before = std::mem::replace(&mut self.seen, now);
        self.dirty = true;
        if before.1 == StateRole::Leader && now.1 != StateRole::Leader {
            self.forget_flights(shared);
            self.lease.give_up();
            self.lost_leadership(fx);
            self.rouse_others(before.0, fx);
        }
        if now.1 == StateRole::Leader && before.1 != StateRole::Leader {
            self.floor = 0;
            self.offered.clear();
            self.silent.clear();
        }
        if let Some(leader) = self.leader()
            && (before.0, before.2) != (now.0, now.2)
        {
            fx.events.push(Event::LeaderChanged { group: self.group, leader, term });
        }
    }

    fn timeout_ticks(&self, shared: &Shared, term: u64) -> usize {
        let rank = self.rank().unwrap_or(0).min(MAX_RANK);
        let word = shared.config.seed ^ self.group.0.rotate_left(17) ^ self.id.get().rotate_left(39) ^ term;
        let jitter = (mix(word) % JITTER_TICKS as u64) as usize;
        shared.config.election_ticks + rank * RANK_TICKS + jitter
    }

    /// This voter's place in the order of campaigns: rotated by the group, so that leaders spread over nodes.
    fn rank(&self) -> Option<usize> {
        let voters = &self.conf.voters;
        let at = voters.iter().position(|id| *id == self.id.get())?;
        Some((at + self.group.0 as usize) % voters.len())
    }

    fn is_first_in_rank(&self) -> bool {
        self.rank() == Some(0)
    }

    fn lost_leadership(&mut self, fx: &mut Effects) {
        self.traces.lost();
        for wait in self.proposals.drain(..) {
            let reason = "the leader changed";
            fx.propose_error(wait.token, Ambiguous { group: self.group, reason });
        }
        if let Some(wait) = self.change_wait.take() {
            let reason = "the leader changed; ask the new one".to_owned();
            fx.answers
                .push((wait.token, Answer::Done(Err(Rejected::Membership { group: self.group, reason }))));
        }
        self.refuse_reads(fx);
    }

    /// Answers everybody who waits: the replica stops.
    pub(crate) fn abandon(&mut self, shared: &mut Shared, fx: &mut Effects) {
        self.forget_flights(shared);
        shared.unapplied_bytes -= self.unapplied_bytes;
        self.puller.take(shared);
        self.lost_leadership(fx);
        self.stop_reads(fx);
        self.rouse_others(self.raw.raft.term, fx);
    }

    /// Engines made this replica's state durable up to `index`.
    pub(crate) fn flushed(&mut self, index: u64) {
        debug_assert!(index <= self.mark.index, "{}: durable {index} is ahead of applied", self.group);
        if index > self.durable {
            self.durable = index;
            self.dirty = true;
        }
    }

    /// The highest index that members and receivers no longer need, told to followers with appends and heartbeats.
    fn announce_floor(&mut self, shared: &Shared) {
        let last = self.last_index();
        // A receiver was registered with its offer, before its manifest was made.
        let needs =
            |id: &u64, matched: u64| self.offered.get(id).map_or(matched, |offer| matched.max(offer.index));
        let prs = self.raw.raft.prs();
        let matched = prs.iter().map(|(id, progress)| needs(id, progress.matched)).min().unwrap_or(0);
        // The caps override members that lag, never this replica's own durable mark.
        let (held, may_hold) = (shared.wal.log_bytes(self.group), shared.config.max_retained_bytes);
        let entries = last + 1 - self.raw.raft.raft_log.first_index();
        // Of entries of about one size, the youngest that fit.
        let fitting = match held > may_hold {
            true => (u128::from(entries) * u128::from(may_hold) / u128::from(held)) as u64,
            false => entries,
        };
        let cap = last.saturating_sub(shared.config.max_retained_entries.min(fitting));
        self.floor = self.floor.max(matched.max(cap));
    }

    /// What the log may drop now, if it is worth a record: (index, term).
    pub(crate) fn truncation(&self, shared: &Shared) -> Option<(u64, u64)> {
        const WORTH_ENTRIES: u64 = 128;
        let target = self.floor.min(self.durable);
        let first = self.raw.raft.raft_log.first_index();
        if self.installing.is_some() || target < first + WORTH_ENTRIES {
            return None;
        }
        Some((target, shared.wal.term(self.group, target).ok()?))
    }

    /// The node does not answer: raft stops waiting for it.
    pub(crate) fn unreachable(&mut self, shared: &mut Shared, node: NodeId, fx: &mut Effects) -> Alive<()> {
        self.puller.unreachable(shared, node, fx);
        if !self.is_leader() || self.installing.is_some() {
            return Ok(());
        }
        let there: Vec<u64> =
            convert::members(&self.conf).into_iter().filter(|id| node_of(*id) == Some(node)).collect();
        for id in there {
            let raw = &mut self.raw;
            guarded(|| {
                raw.report_unreachable(id);
                raw.report_snapshot(id, raft::SnapshotStatus::Failure);
            })?;
            self.level(shared, id);
            self.offered.remove(&id);
            self.dirty = true;
        }
        self.after_raft(shared, fx);
        Ok(())
    }

    /// Raft forgets at each look at its quorum who was heard since the one before. What is told of the members holds until
    /// the next look, so that nobody is called silent for having had no time to answer.
    fn note_silent(&mut self) {
        let raft = &self.raw.raft;
        if !self.is_leader() || raft.election_elapsed + 1 < raft.election_timeout() {
            return;
        }
        let own = self.id.get();
        let silent = raft.prs().iter().filter(|(id, progress)| **id != own && !progress.recent_active);
        let silent: BTreeSet<u64> = silent.map(|(id, _)| *id).collect();
        if silent != self.silent {
            self.silent = silent;
            self.dirty = true;
        }
    }

    /// What the leader tells of a member; see [`Replica::status`].
    fn standing(&self, id: ReplicaId) -> Option<(u64, bool)> {
        let progress = self.raw.raft.prs().get(id.get()).filter(|_| self.is_leader())?;
        Some((progress.matched, progress.state == raft::ProgressState::Snapshot))
    }

    pub(crate) fn status(&self) -> GroupStatus {
        let raft = &self.raw.raft;
        let role = match raft.state {
            StateRole::Leader => Role::Leader,
            StateRole::Candidate | StateRole::PreCandidate => Role::Candidate,
            StateRole::Follower if self.conf.learners.contains(&self.id.get()) => Role::Learner,
            StateRole::Follower => Role::Follower,
        };
        let mut progress = Vec::new();
        if self.is_leader() {
            progress.extend(raft.prs().iter().filter_map(|(id, progress)| {
                Some(Progress {
                    replica: ReplicaId::new(*id).ok()?,
                    matched: progress.matched,
                    snapshot: progress.state == raft::ProgressState::Snapshot,
                    active: !self.silent.contains(id),
                })
            }));
            progress.sort_by_key(|p| p.replica);
        }
        GroupStatus {
            group: self.group,
            replica: self.id,
            role,
            term: raft.term,
            leader: self.leader(),
            first_index: raft.raft_log.first_index(),
            last_index: self.last_index(),
            persisted: raft.raft_log.persisted,
            commit: raft.raft_log.committed,
            applied: self.mark.index,
            durable: self.durable,
            epoch: self.mark.epoch,
            conf_state: self.conf.clone(),
            progress,
            pull: self.puller.progress(),
            pull_blocked: self.puller.blocked().map(str::to_owned),
            no_room: self.no_room,
            verified: self.verified,
            sleeping: self.is_asleep(),
            dead: None,
        }
    }
}

/// Ticks between the campaigns of neighbouring ranks.
const RANK_TICKS: usize = 3;
const MAX_RANK: usize = 7;
const JITTER_TICKS: usize = 3;
const TIMEOUT_SPREAD_TICKS: usize = RANK_TICKS * MAX_RANK + JITTER_TICKS;

/// SplitMix64's finalizer: spreads a word's bits evenly.
fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// The hard state that fits a log which begins after a snapshot. A term that rises clears the vote.
fn after_install(before: wal::HardState, index: u64, term: u64) -> wal::HardState {
    wal::HardState {
        term: before.term.max(term),
        vote: if term > before.term { 0 } else { before.vote },
        commit: before.commit.max(index),
    }
}

/// What the log takes when the engine has switched to a snapshot; the hard state that it then holds.
pub(crate) fn install_batch(
    batch: &mut wal::Batch,
    group: GroupId,
    mark: &v1::Mark,
    before: wal::HardState,
) -> wal::HardState {
    let conf = mark.switched_conf.as_deref().cloned().unwrap_or_default();
    let meta = wal::SnapshotMeta {
        index: mark.index,
        term: mark.term,
        conf_state: convert::conf_to_wal(&conf),
        data: Bytes::new(),
    };
    let hard_state = after_install(before, mark.index, mark.term);
    batch.snapshot(group, &meta).hard_state(group, hard_state);
    hard_state
}

/// The mark of a source, as the engine here takes it with the state: with what the log must hold then.
pub(crate) fn switched(mark: v1::Mark, replica: ReplicaId) -> v1::Mark {
    v1::Mark {
        switched_at: mark.index,
        switched_term: mark.term,
        switched_conf: mark.conf_state.clone().map(Box::new),
        replica: replica.get(),
        ..mark
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_inside_raft_is_a_reason_and_no_panic() {
        let reason = guarded(|| panic!("to_commit 9 is out of range")).unwrap_err();
        assert!(reason.contains("to_commit 9 is out of range"), "{reason}");
        assert_eq!(guarded(|| 3), Ok(3));
    }
}
