//! What drives moves: the node that leads the meta group asks [`mover::next`] and carries out what it says, by calls over
//! the network and commits of the meta group, as `pontoon node` does.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use pontoon_proto::{GroupId, NodeId, ReplicaId, v1};
use pontoon_raftstore::{Applied, Proposal, ProposeError, ReadLevel, Role};
use pontoon_shard::{
    Action, Decision, MetaState, Observation, decode_meta_reply, meta_command,
    mover::{
        self, Judged, Note, Patience, Watch,
        orders::{self, Order},
    },
    planner,
};
use v1::{meta_command::Body, meta_reply::Body as Answer};

use super::{
    net::Packet,
    placing::Eyes,
    work::{Call, Reply, Subject, Wait},
    world::World,
};

/// How long a question or an order may take.
const CALL_MS: u64 = 400;
const COMMIT_MS: u64 = 600;
/// Pauses between looks while a move waits.
const PAUSE_FIRST_MS: u64 = 10;
const PAUSE_MOST_MS: u64 = 100;
const REPAIR_MS: u64 = 100;
/// A run is short, and so is patience.
const PATIENCE: Patience = Patience { note: Duration::from_millis(200), stall: Duration::from_millis(600) };

/// A leader of the meta group at work in one term. It goes with the process.
pub(super) struct Driver {
    pub(super) term: u64,
    /// Everything that earlier leaders committed is applied.
    ready: bool,
    ask_at: u64,
    repair_at: u64,
    works: BTreeMap<Subject, Work>,
    pub(super) eyes: Eyes,
}

struct Work {
    /// Of a move.
    record: v1::Move,
    reserved: bool,
    confirm: bool,
    pause: u64,
    watch: Watch,
    /// What was decided, to be done once the record says what was to be noted.
    after: Option<(Box<Observation>, Decision)>,
    doing: Doing,
}

enum Doing {
    Rest { until: u64 },
    Ask { asked: BTreeMap<u64, NodeId>, heard: Vec<(NodeId, Reply)>, enough: usize, until: u64, then: Then },
    Commit { until: u64 },
}

enum Then {
    Founded,
    Observed,
    Confirmed(Box<Observation>),
    /// An action was asked for; the others follow.
    Acted(Action, VecDeque<Action>, Box<Observation>),
    Fenced,
}

impl Driver {
    fn new(term: u64) -> Driver {
        let eyes = Eyes::default();
        Driver { term, ready: false, ask_at: 0, repair_at: 0, works: BTreeMap::new(), eyes }
    }

    /// The barrier was passed, or not.
    pub(super) fn begin(&mut self, passed: bool) {
        self.ready |= passed;
    }

    /// A node has answered.
    pub(super) fn hear(&mut self, call: u64, from: NodeId, reply: Reply) {
        if self.eyes.hear(call, from) {
            return;
        }
        for work in self.works.values_mut() {
            if let Doing::Ask { asked, heard, .. } = &mut work.doing
                && asked.remove(&call).is_some()
            {
                heard.push((from, reply));
                return;
            }
        }
    }
}

impl World {
    /// Lets a node that leads the meta group drive.
    pub(super) fn drive(&mut self, i: usize) {
        let now = self.now;
        let (id, boots) = (self.nodes[i].id, self.nodes[i].boots);
        let Some(running) = &mut self.nodes[i].running else { return };
        let leads = self.seen.get(&(GroupId::META, id)).is_some_and(|status| status.role == Role::Leader);
        if !leads {
            running.driver = None;
            return;
        }
        // The last word may be a tick old.
        let status = running.stepped.status(GroupId::META).filter(|status| status.role == Role::Leader);
        let Some(term) = status.map(|status| status.term) else {
            running.driver = None;
            return;
        };
        let mut driver =
            running.driver.take().filter(|driver| driver.term == term).unwrap_or_else(|| Driver::new(term));
        if !driver.ready {
            if now >= driver.ask_at {
                driver.ask_at = now + CALL_MS;
                let token = running.stepped.read_barrier(GroupId::META, ReadLevel::Linearizable);
                self.waits.insert((id, boots, token), Wait::Barrier { term });
            }
            running.driver = Some(driver);
            return;
        }
        let state = running.machines.meta().borrow().clone();
        self.look_around(i, &mut driver.eyes, &state);
        let subjects: BTreeSet<Subject> = subjects_of(&state, driver.eyes.silent()).into_iter().collect();
        for subject in &subjects {
            driver.works.entry(*subject).or_insert_with(|| Work {
                record: match subject {
                    Subject::Move(id) => state.moves.get(id).map(|mv| (**mv).clone()).unwrap_or_default(),
                    Subject::Create(_) | Subject::Debt(..) => v1::Move::default(),
                },
                reserved: false,
                confirm: false,
                pause: PAUSE_FIRST_MS,
                watch: Watch::new(PATIENCE),
                after: None,
                doing: Doing::Rest { until: now },
            });
        }
        if now >= driver.repair_at {
            driver.repair_at = now + REPAIR_MS;
            self.repair(i, &state, &driver.eyes);
            self.carry_out(i, term, &state);
        }
        let due: Vec<Subject> =
            driver.works.iter().filter(|(_, work)| work.is_due(now)).map(|(s, _)| *s).collect();
        for subject in due {
            let Some(mut work) = driver.works.remove(&subject) else { continue };
            if self.work(i, term, subject, &mut work, &state, &driver.eyes) {
                driver.works.insert(subject, work);
            }
        }
        if let Some(running) = &mut self.nodes[i].running {
            running.driver = Some(driver);
        }
    }

    /// One step of a piece of work whose time has come; false if it is over.
    fn work(
        &mut self,
        i: usize,
        term: u64,
        subject: Subject,
        work: &mut Work,
        state: &MetaState,
        eyes: &Eyes,
    ) -> bool {
        let rest = Doing::Rest { until: self.now + work.pause };
        match (subject, std::mem::replace(&mut work.doing, rest)) {
            (Subject::Create(group), Doing::Rest { .. } | Doing::Commit { .. }) => {
                let creating = |shard: &&std::sync::Arc<v1::Shard>| shard.state() == v1::ShardState::Creating;
                let Some(shard) = state.shards.get(&group).filter(creating).cloned() else { return false };
                let replicas: Vec<ReplicaId> =
                    shard.initial.iter().filter_map(|id| ReplicaId::new(*id).ok()).collect();
                let conf = v1::ConfState { voters: shard.initial.clone(), ..Default::default() };
                let calls = replicas.iter().map(|replica| {
                    let request = v1::EnsureReplicaRequest {
                        shard: Some((*shard).clone()),
                        replica: replica.get(),
                        initial: Some(conf.clone()),
                        driver_term: term,
                    };
                    (replica.node(), Call::Ensure(Box::new(request)))
                });
                let enough = replicas.len() / 2 + 1;
                work.doing = self.ask(i, calls.collect(), enough, Then::Founded);
            }
            (Subject::Create(group), Doing::Ask { heard, enough, .. }) => {
                let made = heard.iter().filter(|(_, reply)| matches!(reply, Reply::Done)).count();
                if made >= enough {
                    work.doing = self.commit(i, term, subject, Body::ShardLive(v1::ShardLive { group }));
                }
            }
            (Subject::Debt(group, replica), Doing::Rest { .. } | Doing::Commit { .. }) => {
                let node = ReplicaId::new(replica).map(ReplicaId::node);
                let Some(node) = node.ok().filter(|_| state.debts.contains(&(group, replica))) else {
                    return false;
                };
                let fence = Call::Fence(v1::FenceReplicaRequest { group, replica, driver_term: term });
                work.doing = self.ask(i, vec![(node, fence)], 1, Then::Fenced);
            }
            (Subject::Debt(group, replica), Doing::Ask { heard, .. }) => {
                if matches!(heard.first(), Some((_, Reply::Done))) {
                    let settled = Body::SettleDebt(v1::SettleDebt { group, replica });
                    work.doing = self.commit(i, term, subject, settled);
                }
            }
            (Subject::Move(_), Doing::Commit { .. }) if work.after.is_some() => {
                if let Some((seen, decision)) = work.after.take() {
                    self.carry_on(i, term, subject, work, state, seen, decision);
                }
            }
            (Subject::Move(id), Doing::Rest { .. } | Doing::Commit { .. }) => {
                // Whoever cancels changes the record.
                if let Some(record) = state.moves.get(&id).filter(|mv| mv.phase_seq > work.record.phase_seq) {
                    work.record = (**record).clone();
                }
                if matches!(work.record.phase(), v1::MovePhase::Done | v1::MovePhase::Aborted) {
                    return false;
                }
                let group = GroupId(work.record.group);
                let nodes = orders::witnesses(&work.record, state);
                let calls: Vec<(NodeId, Call)> =
                    nodes.into_iter().map(|node| (node, Call::Status(group))).collect();
                let enough = calls.len();
                work.doing = self.ask(i, calls, enough, Then::Observed);
            }
            (Subject::Move(_), Doing::Ask { heard, then, .. }) => {
                self.go_on(i, term, subject, work, (state, eyes), heard, then)
            }
        }
        true
    }

    #[allow(clippy::too_many_arguments, reason = "what a step of a move needs")]
    fn go_on(
        &mut self,
        i: usize,
        term: u64,
        subject: Subject,
        work: &mut Work,
        (state, eyes): (&MetaState, &Eyes),
        heard: Vec<(NodeId, Reply)>,
        then: Then,
    ) {
        match then {
            Then::Founded | Then::Fenced => {}
            Then::Observed => {
                let answers: Vec<_> = heard
                    .into_iter()
                    .filter_map(|(node, reply)| match reply {
                        Reply::Status(status) => Some((node, *status)),
                        _ => None,
                    })
                    .collect();
                let seen = orders::observation(&work.record, state, work.reserved, eyes.silent(), &answers);
                if std::mem::take(&mut work.confirm)
                    && let Some((node, request)) = orders::confirmation(&work.record, term, &seen)
                {
                    let calls = vec![(node, Call::Confirm(request))];
                    work.doing = self.ask(i, calls, 1, Then::Confirmed(Box::new(seen)));
                    return;
                }
                self.decide(i, term, subject, work, (state, eyes), seen);
            }
            Then::Confirmed(mut seen) => {
                if let Some((_, Reply::Members(reply))) = heard.into_iter().next() {
                    orders::confirm(&mut seen, *reply);
                }
                self.decide(i, term, subject, work, (state, eyes), *seen);
            }
            Then::Acted(action, left, seen) => match heard.first() {
                Some((_, Reply::Done)) => {
                    work.reserved |= matches!(action, Action::Reserve { .. });
                    work.pause = PAUSE_FIRST_MS;
                    self.act(i, term, work, state, left, seen);
                }
                other => {
                    let reason = match other {
                        Some((_, Reply::Failed(reason))) => reason.as_str(),
                        _ => "no answer",
                    };
                    self.timeline.note(reason.len() as u64);
                    let (blocker, reason) = mover::failure(&action, false, reason);
                    work.watch.failed(blocker, reason);
                    self.pause(work);
                }
            },
        }
    }

    fn decide(
        &mut self,
        i: usize,
        term: u64,
        subject: Subject,
        work: &mut Work,
        (state, eyes): (&MetaState, &Eyes),
        seen: Observation,
    ) {
        if let Some(update) = orders::members_update(&work.record, &seen, state) {
            self.propose(i, Body::UpdateMembers(update), Wait::Nobody);
        }
        let Work { record, watch, .. } = work;
        let (now, decision) = (Duration::from_millis(self.now), mover::next(record, &seen));
        let elsewhere = || planner::elsewhere(state, record, &eyes.seen());
        let Judged { note, decision } = watch.judge(now, record, &seen, decision, elsewhere);
        let seen = Box::new(seen);
        let Some(Note { blocker, reason, stuck }) = note else {
            return self.carry_on(i, term, subject, work, state, seen, decision);
        };
        self.timeline.note(reason.len() as u64 ^ (blocker as u64) << 16);
        self.tally.stuck += u64::from(stuck && !work.record.stuck && !self.calm);
        let told = v1::AdvanceMove {
            phase: work.record.phase,
            blocker: blocker.into(),
            blocked: reason,
            stuck,
            ..orders::advance(&work.record, term)
        };
        work.after = Some((seen, decision));
        work.doing = self.commit(i, term, subject, Body::AdvanceMove(told));
    }

    #[allow(clippy::too_many_arguments, reason = "what a step of a move needs")]
    fn carry_on(
        &mut self,
        i: usize,
        term: u64,
        subject: Subject,
        work: &mut Work,
        state: &MetaState,
        seen: Box<Observation>,
        decision: Decision,
    ) {
        let next = orders::advance(&work.record, term);
        let next = match decision {
            Decision::Act(actions) => return self.act(i, term, work, state, actions.into(), seen),
            Decision::Wait { reason, .. } => {
                self.timeline.note(reason.len() as u64);
                return self.pause(work);
            }
            Decision::Advance(phase) => v1::AdvanceMove { phase: phase.into(), ..next },
            Decision::AdvanceOwing(phase) => v1::AdvanceMove { phase: phase.into(), owing: true, ..next },
            Decision::GiveUp { blocker, reason } => {
                self.tally.given_up += u64::from(!self.calm);
                v1::AdvanceMove {
                    phase: v1::MovePhase::Aborting.into(),
                    gives_up: true,
                    blocker: blocker.into(),
                    blocked: reason,
                    ..next
                }
            }
        };
        let session = self.moment();
        work.pause = PAUSE_FIRST_MS;
        let body = Body::AdvanceMove(v1::AdvanceMove { session, ..next });
        work.doing = self.commit(i, term, subject, body);
    }

    fn pause(&self, work: &mut Work) {
        work.doing = Doing::Rest { until: self.now + work.pause };
        work.pause = (work.pause * 2).min(PAUSE_MOST_MS);
    }

    fn act(
        &mut self,
        i: usize,
        term: u64,
        work: &mut Work,
        state: &MetaState,
        mut actions: VecDeque<Action>,
        seen: Box<Observation>,
    ) {
        let Some(action) = actions.pop_front() else {
            work.doing = Doing::Rest { until: self.now };
            return;
        };
        let (node, call) = match orders::order(&action, &work.record, term, &seen, state) {
            Ok(Order::Reserve(node, _)) => (node, Call::Report),
            Ok(Order::Ensure(node, request)) => (node, Call::Ensure(request)),
            Ok(Order::Fence(node, request)) => (node, Call::Fence(request)),
            Ok(Order::Change(node, request)) => (node, Call::Change(request)),
            Ok(Order::Transfer(node, request)) => (node, Call::Transfer(request)),
            Ok(Order::Verify(node, request)) => (node, Call::Verify(request)),
            Ok(Order::OtherSource(node, request)) => (node, Call::OtherSource(request)),
            Ok(Order::Confirm) => {
                work.confirm = true;
                return self.act(i, term, work, state, actions, seen);
            }
            Err(_) => return self.pause(work),
        };
        work.doing = self.ask(i, vec![(node, call)], 1, Then::Acted(action, actions, seen));
    }

    fn ask(&mut self, i: usize, calls: Vec<(NodeId, Call)>, enough: usize, then: Then) -> Doing {
        let from = self.nodes[i].id;
        let mut asked = BTreeMap::new();
        for (to, call) in calls {
            self.next_call += 1;
            asked.insert(self.next_call, to);
            self.send(Some(from), to, GroupId::META, Packet::Call(self.next_call, call));
        }
        Doing::Ask { asked, heard: Vec::new(), enough, until: self.now + CALL_MS, then }
    }

    fn commit(&mut self, i: usize, term: u64, subject: Subject, body: Body) -> Doing {
        self.propose(i, body, Wait::Commit { term, subject });
        Doing::Commit { until: self.now + COMMIT_MS }
    }

    pub(super) fn propose(&mut self, i: usize, body: Body, wait: Wait) {
        let node = &mut self.nodes[i];
        let (id, boots, wall_ms) = (node.id, node.boots, node.wall_ms(self.now));
        let Some(running) = &mut node.running else { return };
        let proposal =
            Proposal { payload: meta_command(wall_ms, body), request: None, epoch: 1, urgent: true };
        let token = running.stepped.propose(GroupId::META, proposal);
        self.waits.insert((id, boots, token), wait);
    }

    /// What became of a commit.
    pub(super) fn committed(
        &mut self,
        i: usize,
        term: u64,
        subject: Subject,
        result: Result<Applied, ProposeError>,
    ) {
        let now = self.now;
        let answer = result.ok().and_then(|applied| decode_meta_reply(&applied.reply).ok());
        let Some(driver) = self.nodes[i].driver().filter(|driver| driver.term == term) else { return };
        let Some(work) = driver.works.get_mut(&subject) else { return };
        let record = match answer {
            Some(Ok(Answer::Move(record))) => Some(record),
            other => {
                // What was decided may not hold any more.
                work.after = None;
                other.and_then(|answer| answer.err()).and_then(|refused| refused.r#move)
            }
        };
        if let Some(record) = record.filter(|record| record.phase_seq >= work.record.phase_seq) {
            work.record = record;
        }
        if let Doing::Commit { until } = &mut work.doing {
            *until = now;
        }
        let (phase, group) = (work.record.phase(), work.record.group);
        let parts = [work.record.source, work.record.target];
        if let Subject::Move(id) = subject {
            self.say(format!("move {id} of g{group} is in {phase:?}"));
            let part = parts[self.rng.below(2) as usize];
            if let Ok(replica) = ReplicaId::new(part) {
                self.lie_in_wait(replica.node());
            }
        }
    }
}

impl Work {
    fn is_due(&self, now: u64) -> bool {
        match &self.doing {
            Doing::Rest { until } | Doing::Commit { until } => now >= *until,
            Doing::Ask { asked, heard, enough, until, .. } => {
                now >= *until || asked.is_empty() || heard.len() >= *enough
            }
        }
    }
}

/// What there is to do.
fn subjects_of(state: &MetaState, silent: &BTreeSet<NodeId>) -> Vec<Subject> {
    let creating = state.shards.values().filter(|shard| shard.state() == v1::ShardState::Creating);
    let moves = state.running_moves().map(|mv| Subject::Move(mv.id));
    let hears = |id: u64| ReplicaId::new(id).is_ok_and(|replica| !silent.contains(&replica.node()));
    let debts = state.debts.iter().filter(|(_, replica)| hears(*replica));
    let debts = debts.map(|(group, replica)| Subject::Debt(*group, *replica));
    creating.map(|shard| Subject::Create(shard.group)).chain(moves).chain(debts).collect()
}
