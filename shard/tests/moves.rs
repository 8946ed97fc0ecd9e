//! Moves through a simulated world: whoever fails at whatever step, the move reaches its end, and on no way a member
//! is fenced or a voter removed.

#[path = "support/meta.rs"]
#[allow(dead_code, reason = "shared by several tests")]
mod support;

use std::collections::{BTreeMap, BTreeSet};

use pontoon_proto::{
    NodeId, ReplicaId,
    v1::{self, MoveBlocker, MoveKind, MovePhase, meta_command::Body as Ask},
};
use pontoon_shard::{Action, Decision, Observation, mover};
use support::{Meta, replica};

/// What goes wrong, at one step of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// A new driver takes over after the actions, and knows nothing of them.
    DriverBefore,
    /// The old driver's actions arrive twice.
    Repeat,
    /// The actions are lost.
    Lost,
    SourceDown,
    TargetDown,
    /// Another voter is elected.
    LeaderChange,
    /// The group's leader does not answer.
    NoLeader,
    /// A leader that was deposed answers without a read barrier, and its configuration has no learners.
    Deposed,
}

const FAULTS: [Fault; 8] = [
    Fault::DriverBefore,
    Fault::Repeat,
    Fault::Lost,
    Fault::SourceDown,
    Fault::TargetDown,
    Fault::LeaderChange,
    Fault::NoLeader,
    Fault::Deposed,
];

/// When the group's leader leaves a joint configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leaves {
    WhenAsked,
    /// By itself, if it stays a voter.
    AsVoter,
    /// By itself, whatever becomes of it.
    Anyhow,
}

#[derive(Debug, Default, Clone)]
struct Replica {
    matched: u64,
    snapshot: bool,
}

struct World {
    meta: Meta,
    id: u64,
    term: u64,
    reserved: bool,
    confirmed: bool,
    conf: v1::ConfState,
    leader: u64,
    last: u64,
    replicas: BTreeMap<u64, Replica>,
    /// Per node the smallest replica id that may exist.
    fences: BTreeMap<NodeId, u64>,
    down: BTreeSet<NodeId>,
    /// Removed from the cluster, and down for ever.
    gone: BTreeSet<NodeId>,
    silent: bool,
    deposed: bool,
    leaves: Leaves,
    /// At which entry a replica hashed its state last.
    verified: BTreeMap<u64, u64>,
    /// Its state is another one than all others'.
    differs: Option<u64>,
}

fn id(raw: u64) -> ReplicaId {
    ReplicaId::new(raw).unwrap()
}

impl World {
    fn new(voters: &[u64], kind: MoveKind, source: u64, target_node: u64) -> World {
        let mut meta = Meta::with_nodes(5);
        let shard = meta.shard("film", 3, voters);
        let start = v1::StartMove {
            group: shard.group,
            kind: kind.into(),
            source: match kind {
                MoveKind::Add | MoveKind::AddLearner => 0,
                MoveKind::Replace | MoveKind::Remove => shard.voters[source as usize],
            },
            target_node,
            ..Default::default()
        };
        let mv = meta.start(start).unwrap();
        let caught_up = |raw: &u64| (*raw, Replica { matched: 100, snapshot: false });
        World {
            meta,
            id: mv.id,
            term: 1,
            reserved: false,
            confirmed: false,
            leader: shard.voters[0],
            replicas: shard.voters.iter().map(caught_up).collect(),
            conf: v1::ConfState { voters: shard.voters, ..Default::default() },
            last: 100,
            fences: BTreeMap::new(),
            down: BTreeSet::new(),
            gone: BTreeSet::new(),
            silent: false,
            deposed: false,
            leaves: Leaves::WhenAsked,
            verified: BTreeMap::new(),
            differs: None,
        }
    }

    fn mv(&self) -> v1::Move {
        v1::Move::clone(&self.meta.state().moves[&self.id])
    }

    fn info(&self, raw: u64) -> Option<v1::ReplicaInfo> {
        let held = self.replicas.get(&raw)?;
        let leads = raw == self.leader;
        let followers = self.replicas.iter().filter(|(id, _)| self.names(**id));
        let progress = |(id, held): (&u64, &Replica)| v1::ReplicaProgress {
            replica: *id,
            matched: held.matched,
            snapshot: held.snapshot,
            active: !self.down.contains(&self::id(*id).node()),
        };
        Some(v1::ReplicaInfo {
            replica: raw,
            last_index: self.last,
            commit: self.last,
            applied: held.matched,
            durable: held.matched,
            persisted: held.matched,
            conf_state: Some(self.conf.clone()),
            progress: if leads { followers.map(progress).collect() } else { Vec::new() },
            verified: self.verified.get(&raw).map(|index| v1::VerifiedState {
                index: *index,
                hash: vec![*index as u8, u8::from(self.differs == Some(raw))].into(),
            }),
            ..Default::default()
        })
    }

    fn names(&self, raw: u64) -> bool {
        let conf = &self.conf;
        [&conf.voters, &conf.learners, &conf.voters_outgoing, &conf.learners_next]
            .iter()
            .any(|l| l.contains(&raw))
    }

    fn status(&self, raw: u64) -> Option<v1::ReplicaStatusReply> {
        let node = ReplicaId::new(raw).ok()?.node();
        (!self.down.contains(&node)).then(|| v1::ReplicaStatusReply {
            replica: self.info(raw),
            min_replica: self.fences.get(&node).copied().unwrap_or(0),
            ..Default::default()
        })
    }

    fn observe(&mut self) -> Observation {
        let mv = self.mv();
        let leader_up = !self.down.contains(&id(self.leader).node()) && !self.silent;
        let mut leader = if leader_up { self.info(self.leader) } else { None };
        let confirmed = std::mem::take(&mut self.confirmed) && leader_up;
        if let (Some(leader), true) = (&mut leader, self.deposed && !confirmed) {
            leader.conf_state.as_mut().unwrap().learners.clear();
        }
        Observation {
            leader,
            confirmed,
            target: self.status(mv.target),
            source: self.status(mv.source),
            reserved: self.reserved,
            target_removed: ReplicaId::new(mv.target).is_ok_and(|target| self.gone.contains(&target.node())),
            source_removed: false,
            ..Default::default()
        }
    }

    fn is_joint(&self) -> bool {
        !self.conf.voters_outgoing.is_empty()
    }

    /// Whether a majority of every half can be reached.
    fn commits(&self) -> bool {
        let majority = |voters: &[u64]| {
            let up = voters.iter().filter(|raw| !self.down.contains(&id(**raw).node())).count();
            voters.is_empty() || up > voters.len() / 2
        };
        majority(&self.conf.voters) && majority(&self.conf.voters_outgoing)
    }

    fn act(&mut self, action: &Action) {
        let mv = self.mv();
        let leader_up = !self.down.contains(&id(self.leader).node()) && !self.silent;
        let changes = leader_up && self.commits();
        match action {
            Action::Reserve { .. } => self.reserved = self.status(mv.target).is_some(),
            Action::EnsureReplica { node, replica } => {
                assert!(mv.phase() >= MovePhase::Learner, "made only once that was committed");
                let fenced = self.fences.get(node).is_some_and(|min| *min > replica.get());
                if !self.down.contains(node) && !fenced {
                    let made = Replica { matched: 0, snapshot: true };
                    self.replicas.entry(replica.get()).or_insert(made);
                }
            }
            Action::AddLearner(replica) if changes && !self.names(replica.get()) => {
                assert!(!self.is_joint());
                self.conf.learners.push(replica.get());
            }
            Action::TransferLeader { to } if changes => {
                assert!(self.conf.voters.contains(&to.get()), "only a voter can lead");
                if !self.down.contains(&to.node()) && self.replicas[&to.get()].matched == self.last {
                    self.leader = to.get();
                }
            }
            Action::EnterJoint { promote, demote } if changes && !self.is_joint() => {
                assert_eq!(mv.phase(), MovePhase::Joint, "entered only past the point of no return");
                let old = self.conf.voters.clone();
                for target in promote {
                    assert!(self.replicas[&target.get()].matched + mover::LAG >= self.last, "caught up");
                    self.conf.learners.retain(|raw| *raw != target.get());
                    self.conf.voters.push(target.get());
                }
                for source in demote {
                    assert!(self.leader != source.get() || old.len() == 1, "leadership has left the source");
                    self.conf.voters.retain(|raw| *raw != source.get());
                    self.conf.learners_next.push(source.get());
                }
                assert!(!self.conf.voters.is_empty());
                self.conf.voters_outgoing = old;
            }
            Action::LeaveJoint if changes => self.leave_joint(),
            Action::RemoveLearner(replica) if changes => {
                assert!(!self.conf.voters.contains(&replica.get()), "a voter is never removed");
                assert!(!self.is_joint());
                if replica.get() != self.leader {
                    self.conf.learners.retain(|raw| *raw != replica.get());
                }
            }
            Action::Fence { node, replica } if !self.down.contains(node) => {
                assert!(!self.names(replica.get()), "a member is never fenced");
                let fence = self.fences.entry(*node).or_insert(0);
                *fence = (*fence).max(replica.get() + 1);
                self.replicas.remove(&replica.get());
            }
            Action::Verify if changes => {
                self.last += 1;
                for (raw, held) in &mut self.replicas {
                    if !self.down.contains(&id(*raw).node()) && !held.snapshot {
                        held.matched = self.last;
                        self.verified.insert(*raw, self.last);
                    }
                }
            }
            Action::ConfirmRemoved => self.confirmed = changes,
            _ => {}
        }
    }

    fn leave_joint(&mut self) {
        let stays = self.conf.voters.contains(&self.leader);
        if self.is_joint() && (stays || self.leaves == Leaves::Anyhow) {
            self.conf.voters_outgoing.clear();
            let demoted = std::mem::take(&mut self.conf.learners_next);
            self.conf.learners.extend(demoted);
        }
    }

    /// What happens by itself: writes, replication, snapshots.
    fn settle(&mut self) {
        if self.commits() {
            self.last += 1;
        }
        let conf = self.conf.clone();
        for (raw, held) in &mut self.replicas {
            let member = [&conf.voters, &conf.learners, &conf.voters_outgoing, &conf.learners_next]
                .iter()
                .any(|list| list.contains(raw));
            if member && !self.down.contains(&id(*raw).node()) {
                *held = Replica { matched: self.last, snapshot: false };
            }
        }
        if self.leaves != Leaves::WhenAsked && self.commits() {
            self.leave_joint();
        }
    }

    fn elect_another(&mut self) {
        let voters = self.conf.voters.clone();
        let next = voters.iter().find(|raw| **raw != self.leader && self.replicas[raw].matched == self.last);
        if let (Some(next), false) = (next, self.is_joint()) {
            self.leader = *next;
        }
    }

    /// One turn of a driver; false once the move has ended.
    fn turn(&mut self, fault: Option<Fault>) -> bool {
        let mv = self.mv();
        let (source, target) = (ReplicaId::new(mv.source).ok(), ReplicaId::new(mv.target).ok());
        match fault {
            Some(Fault::SourceDown) => self.down.extend(source.map(ReplicaId::node)),
            Some(Fault::TargetDown) => self.down.extend(target.map(ReplicaId::node)),
            Some(Fault::LeaderChange) => self.elect_another(),
            Some(Fault::NoLeader) => self.silent = true,
            Some(Fault::Deposed) => self.deposed = true,
            _ => {}
        }
        let seen = self.observe();
        match mover::next(&mv, &seen) {
            Decision::Act(actions) => {
                let times = match fault {
                    Some(Fault::Lost) => 0,
                    Some(Fault::Repeat) => 2,
                    _ => 1,
                };
                for action in (0..times).flat_map(|_| &actions) {
                    self.act(action);
                }
            }
            Decision::Advance(phase) | Decision::AdvanceOwing(phase) => {
                self.meta.advance(&mv, phase, self.term).unwrap();
                if fault == Some(Fault::Repeat) {
                    let again = self.meta.advance(&mv, phase, self.term).unwrap_err();
                    assert_eq!(again.reason(), v1::MetaRefusal::Changed);
                }
            }
            Decision::Wait { blocker, reason } => {
                assert!(!reason.is_empty() && blocker != MoveBlocker::None);
            }
            Decision::GiveUp { .. } => panic!("only who watches gives up"),
        }
        self.settle();
        if fault == Some(Fault::DriverBefore) {
            self.term += 1;
            self.reserved = false;
            self.confirmed = false;
        }
        self.down = self.gone.clone();
        self.silent = false;
        self.deposed = false;
        !matches!(self.mv().phase(), MovePhase::Done | MovePhase::Aborted)
    }

    /// Runs to the end with one fault, repeated for a few turns from `at` on; how many turns it took.
    fn run(&mut self, at: usize, fault: Option<Fault>) -> usize {
        for turn in 0..200 {
            let now = fault.filter(|_| (at..at + 3).contains(&turn));
            if !self.turn(now) {
                return turn + 1;
            }
        }
        panic!("no end in sight: {:?} with {:?}", self.mv(), self.conf);
    }

    fn check_done(&self, voters: usize) {
        let mv = self.mv();
        assert_eq!(mv.phase(), MovePhase::Done);
        assert_eq!(self.conf.voters.len(), voters);
        assert!(!self.is_joint());
        match mv.kind() {
            MoveKind::AddLearner => assert_eq!(self.conf.learners, [mv.target]),
            MoveKind::Replace | MoveKind::Add => assert!(self.conf.voters.contains(&mv.target)),
            MoveKind::Remove => {}
        }
        if mv.kind() != MoveKind::AddLearner {
            assert!(self.conf.learners.is_empty());
        }
        let shard = &self.meta.state().shards[&mv.group];
        assert_eq!(
            (shard.voters.len(), &shard.learners),
            (voters, &self.conf.learners),
            "the map says the same"
        );
        if let Ok(source) = ReplicaId::new(mv.source) {
            assert!(!self.replicas.contains_key(&source.get()));
            assert_eq!(self.fences[&source.node()], source.get() + 1);
        }
        assert!(self.meta.state().running_move(mv.group).is_none());
    }
}

/// Voters, kind, which of them leaves, the target's node, voters afterwards.
type Case = (&'static [u64], MoveKind, u64, u64, usize);

const CASES: [Case; 8] = [
    (&[1, 2, 3], MoveKind::Replace, 0, 4, 3),
    (&[1, 2, 3], MoveKind::Replace, 2, 4, 3),
    (&[1], MoveKind::Replace, 0, 2, 1),
    (&[1], MoveKind::Add, 0, 2, 2),
    (&[1, 2], MoveKind::Add, 0, 3, 3),
    (&[1, 2, 3], MoveKind::Remove, 0, 0, 2),
    (&[1], MoveKind::AddLearner, 0, 2, 1),
    (&[1, 2, 3], MoveKind::AddLearner, 0, 4, 3),
];

#[test]
fn every_move_ends_whoever_fails_at_whatever_step() {
    for (voters, kind, source, target, after) in CASES {
        for leaves in [Leaves::WhenAsked, Leaves::AsVoter, Leaves::Anyhow] {
            let world = || World { leaves, ..World::new(voters, kind, source, target) };
            let mut calm = world();
            let turns = calm.run(0, None);
            calm.check_done(after);
            for at in 0..turns {
                for fault in FAULTS {
                    let mut world = world();
                    world.run(at, Some(fault));
                    world.check_done(after);
                }
            }
        }
    }
}

#[test]
fn a_permanent_learner_leaves_again_whoever_fails_at_whatever_step() {
    let with_learner = || {
        let mut world = World::new(&[1], MoveKind::AddLearner, 0, 2);
        world.run(0, None);
        let (group, learner) = (world.mv().group, world.mv().target);
        let remove =
            |source| v1::StartMove { group, kind: MoveKind::Remove.into(), source, ..Default::default() };
        let voter = world.conf.voters[0];
        assert!(world.meta.start(remove(voter)).is_err(), "a learner is no stand-in for the last voter");
        // It has no vote to give to another.
        let replace = v1::StartMove { kind: MoveKind::Replace.into(), target_node: 3, ..remove(learner) };
        assert!(world.meta.start(replace).is_err());
        world.id = world.meta.start(remove(learner)).unwrap().id;
        world
    };
    let turns = with_learner().run(0, None);
    for at in 0..turns {
        for fault in FAULTS {
            let mut world = with_learner();
            world.run(at, Some(fault));
            world.check_done(1);
        }
    }
}

#[test]
fn a_plan_that_does_not_fit_the_members_any_more_ends_or_says_so() {
    // A learner whose removal the map asks for is gone already: its node is fenced all the same.
    let mut world = World::new(&[1, 2, 3], MoveKind::AddLearner, 0, 4);
    world.run(0, None);
    let (group, learner) = (world.mv().group, world.mv().target);
    let remove =
        v1::StartMove { group, kind: MoveKind::Remove.into(), source: learner, ..Default::default() };
    world.id = world.meta.start(remove).unwrap().id;
    world.conf.learners.clear();
    world.replicas.remove(&learner);
    world.run(0, None);
    world.check_done(3);
    // A voter that left is replaced by nobody: the planner looks again, an operator is told.
    for purpose in [v1::MovePurpose::Repair, v1::MovePurpose::Operator] {
        let mut world = World::new(&[1, 2, 3], MoveKind::Replace, 2, 4);
        let source = world.mv().source;
        world.conf.voters.retain(|raw| *raw != source);
        let mv = v1::Move { purpose: purpose.into(), ..world.mv() };
        let decided = mover::next(&mv, &world.observe());
        match purpose {
            v1::MovePurpose::Operator => {
                assert!(matches!(decided, Decision::Wait { blocker: MoveBlocker::MembersChanged, .. }));
            }
            _ => assert_eq!(decided, Decision::Advance(MovePhase::Aborting)),
        }
    }
}

#[test]
fn a_move_cancelled_before_joint_leaves_no_trace() {
    for (voters, kind, source, target, _) in CASES {
        let turns = World::new(voters, kind, source, target).run(0, None);
        for at in 0..turns {
            for fault in FAULTS {
                let mut world = World::new(voters, kind, source, target);
                let before = world.conf.clone();
                for _ in 0..at {
                    world.turn(None);
                }
                let phase = world.mv().phase();
                let cancel = v1::CancelMove { id: world.id, reason: String::new() };
                let answer = world.meta.ask(Ask::CancelMove(cancel));
                if phase >= MovePhase::Joint {
                    assert_eq!(answer.unwrap_err().reason(), v1::MetaRefusal::TooLate);
                    continue;
                }
                world.run(0, Some(fault));
                let mv = world.mv();
                assert_eq!(mv.phase(), MovePhase::Aborted, "cancelled in {phase:?}");
                assert_eq!(world.conf, before, "cancelled in {phase:?}");
                assert!(!world.replicas.contains_key(&mv.target));
                if phase >= MovePhase::Learner && mv.target != 0 {
                    assert_eq!(world.fences[&id(mv.target).node()], mv.target + 1);
                }
            }
        }
    }
}

/// At the point of no return, with the target's node removed from the cluster.
fn without_its_target(voters: &[u64], kind: MoveKind, source: u64, node: u64) -> World {
    let mut world = World::new(voters, kind, source, node);
    while world.mv().phase() != MovePhase::Joint {
        world.turn(None);
    }
    let removed = v1::NodeState::Removed.into();
    world
        .meta
        .ask(Ask::SetNodeState(v1::SetNodeState { node, state: removed, force: true, seen: None }))
        .unwrap();
    world.gone.insert(id(world.mv().target).node());
    world.down = world.gone.clone();
    world
}

#[test]
fn a_move_whose_target_is_lost_for_good_ends_even_past_the_point_of_no_return() {
    for fault in FAULTS.into_iter().map(Some).chain([None]) {
        // Nothing had happened: the group is as it was.
        let mut world = without_its_target(&[1, 2, 3], MoveKind::Replace, 2, 4);
        let voters = world.conf.voters.clone();
        world.run(0, fault);
        assert_eq!(world.mv().phase(), MovePhase::Aborted);
        assert_eq!((&world.conf.voters, &world.conf.learners), (&voters, &Vec::new()));

        // The joint step had begun, or begins after the move turned back: the target's replacement is another move.
        for turns_back in [false, true] {
            let mut world = without_its_target(&[1, 2, 3], MoveKind::Replace, 2, 4);
            let mv = world.mv();
            if turns_back {
                world.turn(None);
                assert_eq!(world.mv().phase(), MovePhase::Aborting);
            }
            world.conf.voters_outgoing = world.conf.voters.clone();
            world.conf.voters.retain(|raw| *raw != mv.source);
            world.conf.voters.push(mv.target);
            world.conf.learners.retain(|raw| *raw != mv.target);
            world.conf.learners_next.push(mv.source);
            if world.leader == mv.source {
                world.leader = world.conf.voters[0];
            }
            world.run(0, fault);
            world.check_done(3);
        }
    }
}

#[test]
fn nobody_turns_back_past_the_point_of_no_return_while_the_target_may_come() {
    let mut world = World::new(&[1, 2, 3], MoveKind::Replace, 2, 4);
    while world.mv().phase() != MovePhase::Joint {
        world.turn(None);
    }
    let refused = world.meta.advance(&world.mv(), MovePhase::Aborting, 1).unwrap_err();
    assert_eq!(refused.reason(), v1::MetaRefusal::IllegalPhase);
    let mut early = World::new(&[1, 2, 3], MoveKind::Replace, 2, 4);
    early.meta.ask(Ask::CancelMove(v1::CancelMove { id: early.id, reason: String::new() })).unwrap();
    early.meta.advance(&early.mv(), MovePhase::Aborting, 1).unwrap();
    let refused = early.meta.advance(&early.mv(), MovePhase::RemoveOld, 1).unwrap_err();
    assert_eq!(refused.reason(), v1::MetaRefusal::IllegalPhase);
}

#[test]
fn leadership_passes_to_the_target_only_inside_the_joint_configuration_of_a_single_voter() {
    let mut world = World::new(&[1], MoveKind::Replace, 0, 2);
    let target = world.mv().target;
    while world.turn(None) {
        if world.leader == target {
            assert!(world.mv().phase() >= MovePhase::Joint);
        }
    }
    assert_eq!(world.leader, target);
    // With three voters another of the old ones leads in the end, never the fresh one.
    let mut world = World::new(&[1, 2, 3], MoveKind::Replace, 0, 4);
    let target = world.mv().target;
    while world.turn(None) {
        assert_ne!(world.leader, target);
    }
    assert_ne!(world.leader, replica(1, 1));
}

#[test]
fn a_target_that_lags_is_not_promoted_and_the_reason_says_so() {
    let mut world = World::new(&[1, 2, 3], MoveKind::Replace, 2, 4);
    while world.mv().phase() != MovePhase::Joint {
        world.turn(None);
    }
    let lags: [fn(&mut Observation); 3] = [
        |seen| seen.leader.as_mut().unwrap().progress.iter_mut().for_each(|progress| progress.matched = 1),
        |seen| seen.target.as_mut().unwrap().replica.as_mut().unwrap().applied = 1,
        |seen| {
            let info = seen.target.as_mut().unwrap().replica.as_mut().unwrap();
            (info.durable, info.persisted) = (1, 1);
        },
    ];
    world.last += 200;
    world.settle();
    for lag in lags {
        let mut seen = world.observe();
        assert!(matches!(mover::next(&world.mv(), &seen), Decision::Act(_)));
        lag(&mut seen);
        let Decision::Wait { reason, .. } = mover::next(&world.mv(), &seen) else { panic!("it waits") };
        assert!(reason.contains("n4.4"), "{reason}");
    }
}

#[test]
fn what_waits_for_a_dead_node_names_it_and_the_next_step() {
    let mut world = World::new(&[1, 2, 3], MoveKind::Replace, 0, 4);
    while world.mv().phase() != MovePhase::Fence {
        world.turn(None);
    }
    world.down.insert(NodeId::new(1).unwrap());
    let mut seen = world.observe();
    let Decision::Wait { reason, .. } = mover::next(&world.mv(), &seen) else { panic!("it waits") };
    assert!(reason.contains("n1") && reason.contains("decommission"), "{reason}");
    seen.source_silent = true;
    assert_eq!(mover::next(&world.mv(), &seen), Decision::AdvanceOwing(MovePhase::Cleanup));
    seen.source_removed = true;
    assert_eq!(mover::next(&world.mv(), &seen), Decision::Advance(MovePhase::Cleanup));
    // One that is back is fenced, however long it was away.
    world.down.clear();
    let seen = Observation { source_silent: true, ..world.observe() };
    assert!(
        matches!(&mover::next(&world.mv(), &seen), Decision::Act(actions) if matches!(actions[..], [Action::Fence { .. }]))
    );
}

#[test]
fn a_target_that_is_silent_for_too_long_is_given_up_and_owes_its_fence() {
    let mut world = World::new(&[1, 2, 3], MoveKind::Replace, 0, 4);
    while world.mv().phase() != MovePhase::Snapshot {
        world.turn(None);
    }
    world.down.insert(NodeId::new(4).unwrap());
    let observe = |world: &mut World| Observation { target_silent: true, ..world.observe() };
    let seen = observe(&mut world);
    assert_eq!(mover::next(&world.mv(), &seen), Decision::Advance(MovePhase::Aborting));
}

#[test]
fn a_move_whose_target_was_removed_goes_back_by_itself() {
    let mut world = World::new(&[1, 2, 3], MoveKind::Replace, 0, 4);
    while !world.is_joint() {
        let mut seen = world.observe();
        (seen.target, seen.target_removed) = (None, true);
        assert_eq!(mover::next(&world.mv(), &seen), Decision::Advance(MovePhase::Aborting));
        world.turn(None);
    }
    // It votes: there is nothing to go back to.
    let mut seen = world.observe();
    (seen.target, seen.target_removed) = (None, true);
    assert_eq!(mover::next(&world.mv(), &seen), Decision::Act(vec![Action::LeaveJoint]));
}

/// A replacement of a voter that has come to the phase Verify.
fn to_be_verified() -> World {
    let mut world = World::new(&[1, 2, 3], MoveKind::Replace, 2, 4);
    while world.mv().phase() != MovePhase::Verify {
        assert!(world.turn(None));
    }
    world
}

#[test]
fn a_hash_that_is_not_known_any_more_is_asked_for_again() {
    let mut world = to_be_verified();
    let target = world.mv().target;
    assert_eq!(mover::next(&world.mv(), &world.observe()), Decision::Act(vec![Action::Verify]));
    world.act(&Action::Verify);
    let first = world.verified[&target];
    // It started again; then the leader did.
    world.verified.remove(&target);
    assert_eq!(mover::next(&world.mv(), &world.observe()), Decision::Act(vec![Action::Verify]));
    world.act(&Action::Verify);
    world.verified.remove(&world.leader.clone());
    assert_eq!(mover::next(&world.mv(), &world.observe()), Decision::Act(vec![Action::Verify]));
    world.act(&Action::Verify);
    assert!(world.verified[&target] > first);
    assert_eq!(mover::next(&world.mv(), &world.observe()), Decision::Advance(MovePhase::PreSwitch));
    // One that has not come there yet is waited for.
    world.verified.insert(target, first);
    world.replicas.get_mut(&target).unwrap().matched = first;
    assert!(matches!(mover::next(&world.mv(), &world.observe()), Decision::Wait { .. }));
}

#[test]
fn a_leader_that_took_a_snapshot_over_the_question_asks_another() {
    let mut world = to_be_verified();
    let (leader, target) = (world.leader, world.mv().target);
    world.act(&Action::Verify);
    let first = world.verified[&leader];
    world.act(&Action::Verify);
    // The leader stands behind the second question: it comes to it.
    world.verified.insert(leader, first);
    world.replicas.get_mut(&leader).unwrap().matched = first;
    let waits = mover::next(&world.mv(), &world.observe());
    assert!(matches!(waits, Decision::Wait { blocker: MoveBlocker::Hashing, .. }), "{waits:?}");
    // It has passed it, and knows of the first one only: it will never have the second.
    world.replicas.get_mut(&leader).unwrap().matched = world.verified[&target];
    assert_eq!(mover::next(&world.mv(), &world.observe()), Decision::Act(vec![Action::Verify]));
}

#[test]
fn a_target_or_a_source_whose_state_differs_holds_the_move_up_with_both_hashes() {
    for part in [|mv: &v1::Move| mv.target, |mv: &v1::Move| mv.source] {
        let mut world = to_be_verified();
        world.differs = Some(part(&world.mv()));
        world.act(&Action::Verify);
        for _ in 0..3 {
            let Decision::Wait { reason, .. } = mover::next(&world.mv(), &world.observe()) else {
                panic!("it goes on")
            };
            let index = world.last as u8;
            assert!(
                reason.contains(&format!("its hash is {index:02x}01, the leader's {index:02x}00")),
                "{reason}"
            );
        }
    }
}
