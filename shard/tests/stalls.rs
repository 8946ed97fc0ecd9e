//! Moves that do not get on, by a made clock: when they say so, and what is done about it.

#[path = "support/meta.rs"]
#[allow(dead_code, reason = "shared by several tests")]
mod support;

use std::time::Duration;

use pontoon_proto::{
    NodeId, ReplicaId,
    v1::{self, MoveBlocker, MoveKind, MovePhase, MovePurpose, meta_command::Body as Ask},
};
use pontoon_shard::{
    Action, Decision, Observation,
    mover::{self, Judged, Note, Patience, Watch, needs_hand},
    planner::{self, Seen},
};
use support::{Meta, replica};

const NOTE: u64 = 2;
const STALL: u64 = 60;

/// A move of a predicate on nodes 1, 2 and 3 of so many, from 3 to 4, and what is seen of it.
struct Stage {
    meta: Meta,
    id: u64,
    watch: Watch,
    now: u64,
    seen: Observation,
}

fn info(replica: u64, applied: u64) -> v1::ReplicaInfo {
    v1::ReplicaInfo {
        replica,
        applied,
        durable: applied,
        persisted: applied,
        commit: 500,
        last_index: 500,
        ..Default::default()
    }
}

impl Stage {
    /// In a phase, with everything as it should be there.
    fn in_phase(nodes: u64, purpose: MovePurpose, phase: MovePhase) -> Stage {
        let mut meta = Meta::with_nodes(nodes);
        let shard = meta.shard("film", 3, &[1, 2, 3]);
        let start = v1::StartMove {
            group: shard.group,
            kind: MoveKind::Replace.into(),
            source: shard.voters[2],
            target_node: 4,
            bytes_total: 1 << 20,
            purpose: purpose.into(),
            ..Default::default()
        };
        let mut mv = meta.start(start).unwrap();
        while mv.phase() < phase {
            let next = MovePhase::try_from(mv.phase() as i32 + 1).unwrap();
            mv = meta.advance(&mv, next, 1).unwrap();
        }
        let target = mv.target;
        let progress =
            |replica, matched| v1::ReplicaProgress { replica, matched, snapshot: false, active: true };
        let leader = v1::ReplicaInfo {
            conf_state: Some(v1::ConfState {
                voters: shard.voters.clone(),
                learners: vec![target],
                ..Default::default()
            }),
            progress: shard
                .voters
                .iter()
                .map(|id| progress(*id, 500))
                .chain([progress(target, 500)])
                .collect(),
            ..info(shard.voters[0], 500)
        };
        let answers =
            |info| v1::ReplicaStatusReply { replica: Some(info), min_replica: 0, ..Default::default() };
        let seen = Observation {
            leader: Some(leader),
            target: Some(answers(info(target, 500))),
            source: Some(answers(info(shard.voters[2], 500))),
            reserved: true,
            ..Default::default()
        };
        Stage { id: mv.id, meta, watch: Watch::new(Patience::default()), now: 0, seen }
    }

    /// The target receives a state of so many bytes.
    fn receives(&mut self, done: u64, total: u64) {
        let target = self.mv().target;
        let pull = Some(v1::PullView { bytes_done: done, bytes_total: total, queued: false });
        let info = v1::ReplicaInfo { pull, ..info(target, 0) };
        self.seen.target =
            Some(v1::ReplicaStatusReply { replica: Some(info), min_replica: 0, ..Default::default() });
        for peer in &mut self.seen.leader.as_mut().unwrap().progress {
            peer.snapshot = peer.replica == target;
        }
    }

    fn mv(&self) -> v1::Move {
        v1::Move::clone(&self.meta.state().moves[&self.id])
    }

    fn elsewhere(&self) -> bool {
        planner::elsewhere(&self.meta.state(), &self.mv(), &Seen::default())
    }

    /// Looks a second later; what is to be noted, is.
    fn look(&mut self) -> Judged {
        self.now += 1;
        let (mv, elsewhere) = (self.mv(), self.elsewhere());
        let decision = mover::next(&mv, &self.seen);
        let now = Duration::from_secs(self.now);
        let judged = self.watch.judge(now, &mv, &self.seen, decision, || elsewhere);
        if let Some(Note { blocker, reason, stuck }) = judged.note.clone() {
            let told = v1::AdvanceMove {
                id: mv.id,
                expect_phase_seq: mv.phase_seq,
                driver_term: 1,
                phase: mv.phase,
                blocker: blocker.into(),
                blocked: reason,
                stuck,
                ..Default::default()
            };
            self.meta.ask(Ask::AdvanceMove(told)).unwrap();
        }
        judged
    }

    /// Looks each second until something is so; how many looks it took.
    fn until(&mut self, is_so: impl Fn(&Judged, &v1::Move) -> bool) -> u64 {
        for look in 1..1_000 {
            let judged = self.look();
            if is_so(&judged, &self.mv()) {
                return look;
            }
        }
        panic!("never: {:?}", self.mv())
    }

    fn give_up(&mut self) {
        let mv = self.mv();
        let given_up = v1::AdvanceMove {
            id: mv.id,
            expect_phase_seq: mv.phase_seq,
            driver_term: 1,
            phase: MovePhase::Aborting.into(),
            gives_up: true,
            blocker: MoveBlocker::Copying.into(),
            blocked: "it was slow".into(),
            ..Default::default()
        };
        self.meta.ask(Ask::AdvanceMove(given_up)).unwrap();
    }
}

fn is_stuck(_: &Judged, mv: &v1::Move) -> bool {
    mv.stuck
}

fn turns(judged: &Judged, _: &v1::Move) -> bool {
    matches!(&judged.decision, Decision::Act(actions) if matches!(actions[..], [Action::OtherSource { .. }]))
}

fn gives_up(judged: &Judged, _: &v1::Move) -> bool {
    matches!(judged.decision, Decision::GiveUp { .. })
}

/// What makes a move wait, in which phase, and what its record says then.
type Held = (MovePhase, fn(&mut Stage), MoveBlocker);

const HELD: [Held; 14] = [
    (MovePhase::Planned, |stage| stage.seen.leader = None, MoveBlocker::NoLeader),
    (MovePhase::Reserved, |stage| stage.seen.target = None, MoveBlocker::TargetSilent),
    (MovePhase::Reserved, |stage| stage.seen.reserved = false, MoveBlocker::Making),
    (MovePhase::Learner, |stage| stage.seen.target.as_mut().unwrap().replica = None, MoveBlocker::Making),
    (
        MovePhase::Learner,
        |stage| stage.seen.leader.as_mut().unwrap().conf_state.as_mut().unwrap().learners.clear(),
        MoveBlocker::NoMajority,
    ),
    (
        MovePhase::Learner,
        |stage| {
            stage.seen.target =
                Some(v1::ReplicaStatusReply { replica: None, min_replica: u64::MAX, ..Default::default() });
        },
        MoveBlocker::TargetFenced,
    ),
    (
        MovePhase::Snapshot,
        |stage| {
            let target = stage.seen.target.as_mut().unwrap();
            target.replica.as_mut().unwrap().dead = "its log is damaged".into();
        },
        MoveBlocker::TargetDead,
    ),
    (MovePhase::Snapshot, |stage| stage.receives(10, 100), MoveBlocker::Copying),
    (
        MovePhase::CatchUp,
        |stage| stage.seen.target.as_mut().unwrap().replica.as_mut().unwrap().applied = 1,
        MoveBlocker::CatchingUp,
    ),
    (MovePhase::Verify, |_| (), MoveBlocker::Hashing),
    (
        MovePhase::PreSwitch,
        |stage| stage.seen.leader.as_mut().unwrap().replica = stage.mv().source,
        MoveBlocker::LeaderStays,
    ),
    (MovePhase::Joint, |_| (), MoveBlocker::NoMajority),
    (MovePhase::Fence, |stage| stage.seen.source = None, MoveBlocker::SourceSilent),
    (MovePhase::Fence, |_| (), MoveBlocker::Fencing),
];

#[test]
fn whatever_does_not_get_on_says_within_seconds_what_holds_it_up() {
    for (phase, held, blocker) in HELD {
        let mut stage = Stage::in_phase(5, MovePurpose::Operator, phase);
        held(&mut stage);
        let took = stage.until(|_, mv| mv.blocker() != MoveBlocker::None);
        let mv = stage.mv();
        assert_eq!((mv.blocker(), took), (blocker, NOTE + 1), "{phase:?}: {}", mv.blocked);
        assert!(!mv.blocked.is_empty());
    }
}

#[test]
fn what_goes_on_says_nothing_and_what_goes_on_again_takes_its_words_back() {
    let mut stage = Stage::in_phase(5, MovePurpose::Operator, MovePhase::Snapshot);
    for done in 0..200 {
        stage.receives(done, 1_000);
        assert_eq!(stage.look().note, None, "a byte a second is life");
    }
    for _ in 0..10 {
        stage.look();
    }
    assert_eq!(stage.mv().blocker(), MoveBlocker::Copying);
    // One byte now and then is no reason to write about it each time.
    let seq = stage.mv().phase_seq;
    for done in 200..220 {
        stage.receives(done, 1_000);
        (0..4).for_each(|_| drop(stage.look()));
    }
    assert_eq!((stage.mv().phase_seq, stage.mv().blocker()), (seq, MoveBlocker::Copying));
    for done in 220..240 {
        stage.receives(done, 1_000);
        stage.look();
    }
    assert_eq!((stage.mv().blocker(), stage.mv().blocked), (MoveBlocker::None, String::new()));
}

#[test]
fn an_operators_move_asks_another_source_then_is_stuck_and_is_never_sent_elsewhere() {
    let mut stage = Stage::in_phase(5, MovePurpose::Operator, MovePhase::Snapshot);
    stage.receives(10, 100);
    assert_eq!(stage.until(turns), STALL + 1);
    assert!(!stage.mv().stuck && !needs_hand(&stage.mv()));
    assert_eq!(stage.until(|judged, mv| turns(judged, mv) || gives_up(judged, mv) || mv.stuck), STALL);
    let mv = stage.mv();
    assert!(mv.stuck && needs_hand(&mv), "{mv:?}");
    assert_eq!(mv.blocker(), MoveBlocker::Copying);
    // It gives its slot back, and goes on when bytes come.
    let events = &stage.meta.state().events;
    assert!(events.values().any(|event| event.text.contains("is stuck: n4.4 receives")), "{events:?}");
    stage.receives(11, 100);
    stage.look();
    assert!(!stage.mv().stuck && stage.mv().blocker() == MoveBlocker::None);
    // And is patient again.
    assert_eq!(stage.until(turns), STALL);
}

#[test]
fn a_planners_move_asks_another_source_then_another_target() {
    let mut stage = Stage::in_phase(5, MovePurpose::Drain, MovePhase::Snapshot);
    stage.receives(10, 100);
    assert_eq!(stage.until(turns), STALL + 1);
    assert_eq!(stage.until(gives_up), STALL);
    assert!(!stage.mv().stuck);
    stage.give_up();
    let mv = stage.mv();
    assert_eq!(
        (mv.phase(), mv.gave_up(), mv.blocker()),
        (MovePhase::Aborting, MoveBlocker::Copying, MoveBlocker::None)
    );
    stage.meta.advance(&mv, MovePhase::Aborted, 1).unwrap();
    // The next one goes to node 5, and if that is given up, too, back to where it is longest ago.
    let drains =
        v1::SetNodeState { node: 3, state: v1::NodeState::Draining.into(), force: false, seen: None };
    stage.meta.ask(Ask::SetNodeState(drains)).unwrap();
    let mut next = |expected: u64| {
        let group = stage.mv().group;
        let starts = planner::repairs(&stage.meta.state(), &Seen::default());
        let start = starts.into_iter().find(|start| start.group == group).unwrap();
        assert_eq!(start.target_node, expected);
        stage.id = stage.meta.start(start).unwrap().id;
        let elsewhere = stage.elsewhere();
        stage.give_up();
        stage.meta.advance(&stage.mv(), MovePhase::Aborted, 1).unwrap();
        elsewhere
    };
    assert!(!next(5), "nothing is left that was not tried");
    next(4);
    next(5);
}

#[test]
fn a_planners_move_with_nowhere_else_to_go_is_stuck() {
    let mut stage = Stage::in_phase(4, MovePurpose::Repair, MovePhase::Snapshot);
    stage.receives(10, 100);
    stage.until(turns);
    assert_eq!(stage.until(|judged, mv| gives_up(judged, mv) || mv.stuck), STALL);
    assert!(stage.mv().stuck);
    // Until there is.
    stage.meta.ask(Ask::RegisterNode(support::register(5))).unwrap();
    assert!(gives_up(&stage.look(), &stage.mv()));
}

#[test]
fn what_no_waiting_changes_is_not_waited_for() {
    let dead = |stage: &mut Stage| {
        stage.seen.target.as_mut().unwrap().replica.as_mut().unwrap().dead = "its log is damaged".into();
    };
    let mut stage = Stage::in_phase(5, MovePurpose::Operator, MovePhase::Snapshot);
    dead(&mut stage);
    assert_eq!(stage.until(is_stuck), NOTE + 1);
    let mut stage = Stage::in_phase(5, MovePurpose::Balance, MovePhase::Snapshot);
    dead(&mut stage);
    assert_eq!(stage.until(gives_up), NOTE + 1);
    // States that differ are for a person to look at, whoever began the move.
    let mut stage = Stage::in_phase(5, MovePurpose::Balance, MovePhase::Verify);
    let verified = |byte: u8| Some(v1::VerifiedState { index: 500, hash: vec![byte; 32].into() });
    stage.seen.leader.as_mut().unwrap().verified = verified(1);
    stage.seen.target.as_mut().unwrap().replica.as_mut().unwrap().verified = verified(2);
    assert_eq!(stage.until(is_stuck), NOTE + 1);
    assert_eq!(stage.mv().blocker(), MoveBlocker::HashesDiffer);
    assert!(stage.mv().blocked.contains("0202020202020202"), "{}", stage.mv().blocked);
}

#[test]
fn patience_with_one_thing_is_not_used_up_by_another() {
    let mut stage = Stage::in_phase(5, MovePurpose::Repair, MovePhase::Snapshot);
    let leader = stage.seen.leader.take();
    assert_eq!(stage.until(is_stuck), STALL + 1, "no target is better without a leader");
    for _ in 0..600 {
        assert!(!gives_up(&stage.look(), &stage.mv()));
    }
    stage.seen.leader = leader;
    stage.receives(10, 100);
    stage.look();
    assert!(!stage.mv().stuck, "something else holds it up now");
    assert_eq!(stage.until(|judged, mv| turns(judged, mv) || gives_up(judged, mv)), STALL);
    // Who comes and goes is no sign of life, and does not begin anew each time.
    let mut stage = Stage::in_phase(5, MovePurpose::Operator, MovePhase::Snapshot);
    stage.receives(10, 100);
    let there = stage.seen.target.clone();
    let took = (1..1_000).find(|look| {
        stage.seen.target = if look % 6 < 3 { None } else { there.clone() };
        let judged = stage.look();
        turns(&judged, &stage.mv()) || stage.mv().stuck
    });
    assert!(took.unwrap() <= 2 * STALL + 6, "{took:?}");
}

#[test]
fn a_pull_that_waits_for_its_turn_is_not_stalled_and_reading_much_takes_long() {
    let mut stage = Stage::in_phase(5, MovePurpose::Repair, MovePhase::Snapshot);
    stage.receives(0, 0);
    stage.seen.target.as_mut().unwrap().replica.as_mut().unwrap().pull.as_mut().unwrap().queued = true;
    for _ in 0..1_000 {
        let judged = stage.look();
        assert!(matches!(judged.decision, Decision::Wait { blocker: MoveBlocker::Queued, .. }));
    }
    assert!(!stage.mv().stuck && stage.mv().blocker() == MoveBlocker::Queued);
    // A gibibyte is cut into chunks, or hashed, without a word for a minute more.
    let mut stage = Stage::in_phase(5, MovePurpose::Operator, MovePhase::Verify);
    let mv = stage.mv();
    let larger = v1::AdvanceMove {
        id: mv.id,
        expect_phase_seq: mv.phase_seq,
        driver_term: 1,
        phase: mv.phase,
        bytes_total: 1 << 30,
        ..Default::default()
    };
    stage.meta.ask(Ask::AdvanceMove(larger)).unwrap();
    assert_eq!(stage.until(is_stuck), STALL + 64 + 1);
}

#[test]
fn writes_are_no_sign_of_life_of_a_move_that_waits_for_something_else() {
    let mut stage = Stage::in_phase(5, MovePurpose::Operator, MovePhase::PreSwitch);
    stage.seen.leader.as_mut().unwrap().replica = stage.mv().source;
    let took = (1..1_000).find(|more| {
        let leader = stage.seen.leader.as_mut().unwrap();
        (leader.commit, leader.last_index) = (500 + more, 500 + more);
        leader.progress.iter_mut().for_each(|peer| peer.matched = 500 + more);
        stage.seen.target.as_mut().unwrap().replica = Some(info(stage.mv().target, 500 + more));
        stage.look();
        stage.mv().stuck
    });
    assert_eq!((took, stage.mv().blocker()), (Some(STALL + 1), MoveBlocker::LeaderStays));
}

#[test]
fn a_new_driver_leaves_what_is_stuck_so_and_begins_to_count() {
    let mut stage = Stage::in_phase(5, MovePurpose::Operator, MovePhase::Fence);
    stage.seen.source = None;
    stage.until(is_stuck);
    stage.watch = Watch::new(Patience::default());
    for _ in 0..STALL / 2 {
        stage.look();
        assert!(stage.mv().stuck);
    }
    // The source is back.
    let fenced =
        v1::ReplicaStatusReply { replica: None, min_replica: replica(3, 3) + 1, ..Default::default() };
    stage.seen.source = Some(fenced);
    assert_eq!(stage.look().decision, Decision::Advance(MovePhase::Cleanup));
    stage.meta.advance(&stage.mv(), MovePhase::Cleanup, 1).unwrap();
    assert!(!stage.mv().stuck && stage.mv().blocked.is_empty());
}

#[test]
fn a_target_is_given_up_on_the_way_back_only_and_never_for_an_operator() {
    for (purpose, phase) in
        [(MovePurpose::Operator, MovePhase::Aborting), (MovePurpose::Repair, MovePhase::CatchUp)]
    {
        let mut stage = Stage::in_phase(5, purpose, MovePhase::Snapshot);
        let mv = stage.mv();
        let wrong = v1::AdvanceMove {
            id: mv.id,
            expect_phase_seq: mv.phase_seq,
            driver_term: 1,
            phase: phase.into(),
            gives_up: true,
            blocker: MoveBlocker::Copying.into(),
            ..Default::default()
        };
        let refused = stage.meta.ask(Ask::AdvanceMove(wrong)).unwrap_err();
        assert_eq!(refused.reason(), v1::MetaRefusal::IllegalPhase);
    }
    // Nobody waits for a target that was given up and does not answer: its fence is owed.
    let mut stage = Stage::in_phase(5, MovePurpose::Repair, MovePhase::Snapshot);
    stage.give_up();
    stage.seen.target = None;
    stage.seen.confirmed = true;
    stage.seen.leader.as_mut().unwrap().conf_state.as_mut().unwrap().learners.clear();
    assert_eq!(stage.look().decision, Decision::AdvanceOwing(MovePhase::Aborted));
    // One that answers is fenced first.
    let mv = stage.mv();
    stage.seen.target = Some(v1::ReplicaStatusReply::default());
    let fence = Action::Fence { node: NodeId::new(4).unwrap(), replica: ReplicaId::new(mv.target).unwrap() };
    assert_eq!(stage.look().decision, Decision::Act(vec![fence]));
}

/// On the way back the members are asked for at every second look: that is no other thing to wait for.
#[test]
fn a_question_that_is_answered_takes_no_blame_from_a_silent_node() {
    let mut stage = Stage::in_phase(5, MovePurpose::Operator, MovePhase::Snapshot);
    let mv = stage.mv();
    stage.meta.ask(Ask::CancelMove(v1::CancelMove { id: mv.id, ..Default::default() })).unwrap();
    let mv = stage.mv();
    stage.meta.advance(&mv, MovePhase::Aborting, 1).unwrap();
    stage.seen.target = None;
    let conf = stage.seen.leader.as_mut().unwrap().conf_state.as_mut().unwrap();
    conf.learners.clear();
    let mut looks = 0;
    while !stage.mv().stuck {
        looks += 1;
        assert!(looks < 90, "a minute and a little: {:?}", stage.mv());
        let judged = stage.look();
        stage.seen.confirmed = judged.decision == Decision::Act(vec![Action::ConfirmRemoved]);
        assert!(
            [MoveBlocker::None, MoveBlocker::TargetSilent].contains(&stage.mv().blocker()),
            "{:?}",
            stage.mv()
        );
    }
    assert!(looks >= 60, "not before its time: {looks}");
    // Whoever gets no answer says so.
    let mut stage = Stage::in_phase(5, MovePurpose::Operator, MovePhase::Snapshot);
    let mv = stage.mv();
    stage.meta.advance(&mv, MovePhase::Aborting, 1).unwrap();
    let conf = stage.seen.leader.as_mut().unwrap().conf_state.as_mut().unwrap();
    conf.learners.clear();
    for _ in 0..5 {
        stage.look();
    }
    assert_eq!(stage.mv().blocker(), MoveBlocker::NoMajority);
}
