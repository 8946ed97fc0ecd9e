//! What drives moves: the node that leads the meta group asks [`mover::next`] and carries out what it says, by calls over
//! the network and commits of the meta group, as `pontoon node` does.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use pontoon_proto::{GroupId, NodeId, ReplicaId, v1};
use pontoon_raftstore::{Applied, Proposal, ProposeError, ReadLevel, Role};
use pontoon_shard::{
    Action, Decision, MetaState, Observation, decode_meta_reply, meta_command,
    mover::{
        self,
        orders::{self, Order},
    },
    planner,
};
use v1::{meta_command::Body, meta_reply::Body as Answer};

use super::{
    net::Packet,
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

/// A leader of the meta group at work in one term. It goes with the process.
pub(super) struct Driver {
    pub(super) term: u64,
    /// Everything that earlier leaders committed is applied.
    ready: bool,
    ask_at: u64,
    repair_at: u64,
    works: BTreeMap<Subject, Work>,
}

struct Work {
    /// Of a move.
    record: v1::Move,
    reserved: bool,
    confirm: bool,
    pause: u64,
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
    /// An action was asked for; these follow.
    Acted(VecDeque<Action>, Box<Observation>, bool),
}

impl Driver {
    fn new(term: u64) -> Driver {
        Driver { term, ready: false, ask_at: 0, repair_at: 0, works: BTreeMap::new() }
    }

    /// The barrier was passed, or not.
    pub(super) fn begin(&mut self, passed: bool) {
        self.ready |= passed;
    }

    /// A node has answered.
    pub(super) fn hear(&mut self, call: u64, from: NodeId, reply: Reply) {
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
        let subjects: BTreeSet<Subject> = subjects_of(&state).into_iter().collect();
        for subject in &subjects {
            driver.works.entry(*subject).or_insert_with(|| Work {
                record: match subject {
                    Subject::Move(id) => state.moves.get(id).map(|mv| (**mv).clone()).unwrap_or_default(),
                    Subject::Create(_) => v1::Move::default(),
                },
                reserved: false,
                confirm: false,
                pause: PAUSE_FIRST_MS,
                doing: Doing::Rest { until: now },
            });
        }
        if now >= driver.repair_at {
            driver.repair_at = now + REPAIR_MS;
            self.repair(i, &state);
        }
        let due: Vec<Subject> =
            driver.works.iter().filter(|(_, work)| work.is_due(now)).map(|(s, _)| *s).collect();
        for subject in due {
            let Some(mut work) = driver.works.remove(&subject) else { continue };
            if self.work(i, term, subject, &mut work, &state) {
                driver.works.insert(subject, work);
            }
        }
        if let Some(running) = &mut self.nodes[i].running {
            running.driver = Some(driver);
        }
    }

    /// One step of a piece of work whose time has come; false if it is over.
    fn work(&mut self, i: usize, term: u64, subject: Subject, work: &mut Work, state: &MetaState) -> bool {
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
                self.go_on(i, term, subject, work, state, heard, then)
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
        state: &MetaState,
        heard: Vec<(NodeId, Reply)>,
        then: Then,
    ) {
        match then {
            Then::Founded => {}
            Then::Observed => {
                let answers: Vec<_> = heard
                    .into_iter()
                    .filter_map(|(node, reply)| match reply {
                        Reply::Status(status) => Some((node, *status)),
                        _ => None,
                    })
                    .collect();
                let seen =
                    orders::observation(&work.record, state, work.reserved, &Default::default(), &answers);
                if std::mem::take(&mut work.confirm)
                    && let Some((node, request)) = orders::confirmation(&work.record, term, &seen)
                {
                    let calls = vec![(node, Call::Confirm(request))];
                    work.doing = self.ask(i, calls, 1, Then::Confirmed(Box::new(seen)));
                    return;
                }
                self.decide(i, term, subject, work, state, seen);
            }
            Then::Confirmed(mut seen) => {
                if let Some((_, Reply::Members(reply))) = heard.into_iter().next() {
                    orders::confirm(&mut seen, *reply);
                }
                self.decide(i, term, subject, work, state, *seen);
            }
            Then::Acted(left, seen, reserves) => match heard.first() {
                Some((_, Reply::Done)) => {
                    work.reserved |= reserves;
                    work.pause = PAUSE_FIRST_MS;
                    self.act(i, term, work, state, left, seen);
                }
                other => {
                    if let Some((_, Reply::Failed(reason))) = other {
                        self.timeline.note(reason.len() as u64);
                    }
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
        state: &MetaState,
        seen: Observation,
    ) {
        if let Some(update) = orders::members_update(&work.record, &seen, state) {
            self.propose(i, Body::UpdateMembers(update), Wait::Nobody);
        }
        match mover::next(&work.record, &seen) {
            Decision::Advance(phase) | Decision::AdvanceOwing(phase) => {
                let session = self.moment();
                work.pause = PAUSE_FIRST_MS;
                work.doing = self.commit(
                    i,
                    term,
                    subject,
                    Body::AdvanceMove(v1::AdvanceMove {
                        id: work.record.id,
                        expect_phase_seq: work.record.phase_seq,
                        driver_term: term,
                        phase: phase.into(),
                        session,
                        ..Default::default()
                    }),
                );
            }
            Decision::Act(actions) => self.act(i, term, work, state, actions.into(), Box::new(seen)),
            Decision::Wait { reason } => {
                self.timeline.note(reason.len() as u64);
                self.pause(work);
            }
        }
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
            Ok(Order::Confirm) => {
                work.confirm = true;
                return self.act(i, term, work, state, actions, seen);
            }
            Err(_) => return self.pause(work),
        };
        let reserves = matches!(action, Action::Reserve { .. });
        work.doing = self.ask(i, vec![(node, call)], 1, Then::Acted(actions, seen, reserves));
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

    fn propose(&mut self, i: usize, body: Body, wait: Wait) {
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
            Some(Err(refused)) => refused.r#move,
            _ => None,
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
            if phase == v1::MovePhase::Done {
                self.tally.moves += 1;
            }
        }
    }

    /// Starts what the planner finds missing, on nodes that are there.
    fn repair(&mut self, i: usize, state: &MetaState) {
        for start in planner::repairs(state, &planner::Seen::default()) {
            let target = NodeId::new(start.target_node).ok().and_then(|id| self.at(id));
            if target.is_some_and(|at| self.nodes[at].is_up()) {
                let session = self.moment();
                self.propose(i, Body::StartMove(v1::StartMove { session, ..start }), Wait::Nobody);
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
fn subjects_of(state: &MetaState) -> Vec<Subject> {
    let creating = state.shards.values().filter(|shard| shard.state() == v1::ShardState::Creating);
    let moves = state.running_moves().map(|mv| Subject::Move(mv.id));
    creating.map(|shard| Subject::Create(shard.group)).chain(moves).collect()
}
