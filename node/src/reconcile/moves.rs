//! One move, from its record to its end: observe, let [`mover::next`] decide, act or commit the next phase.

use std::time::Duration;

use futures::future::join_all;
use pontoon_proto::{
    NodeId,
    v1::{self, meta_command::Body, meta_reply::Body as Answer},
};
use pontoon_shard::{
    mover::{
        self, Action, Decision, Judged, Note, Observation, Patience, Watch,
        orders::{self, Order},
    },
    planner,
};
use tokio::time::{Instant, sleep};
use tonic::{Code, Status};
use tracing::{Instrument, Span, debug, debug_span, info, info_span};

use super::Driver;
use crate::{cluster::fresh, views::is_ended};

/// How long a node may take to tell how a replica is. With the next one and [`Patience::note`] it makes less than the five
/// seconds after which a move that does not get on must say why.
const OBSERVE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a node may take to do what it is told. Each order means "ensure that", and what comes of it is seen in the next look.
const ORDER_TIMEOUT: Duration = Duration::from_millis(1_200);
/// Pauses between looks while a move waits.
const PAUSE_FIRST: Duration = Duration::from_millis(20);
const PAUSE_MOST: Duration = Duration::from_millis(200);

/// What a driver keeps about a move between two looks. Nothing of it must survive the driver.
struct Step {
    record: v1::Move,
    reserved: bool,
    /// The next look takes the members by a linearizable read.
    confirm: bool,
    pause: Duration,
    watch: Watch,
    /// When the phase was begun, or taken over, and the span that lives as long.
    entered: Instant,
    span: Span,
}

/// A span for as long as a move is in a phase, below that of the move.
fn phase_span(record: &v1::Move) -> Span {
    debug_span!("phase", phase = ?record.phase())
}

impl Driver {
    pub(super) async fn drive_move(self, id: u64) {
        let Some(record) = self.state().moves.get(&id).map(|mv| (**mv).clone()) else { return };
        let span = info_span!("move", id, group = record.group, predicate = record.predicate);
        self.drive_record(record).instrument(span).await;
    }

    async fn drive_record(self, record: v1::Move) {
        let (id, watch) = (record.id, Watch::new(Patience::default()));
        let (entered, span) = (Instant::now(), phase_span(&record));
        let mut step =
            Step { record, reserved: false, confirm: false, pause: PAUSE_FIRST, watch, entered, span };
        let begun = Instant::now();
        while self.leads() {
            // Whoever cancels changes the record.
            if let Some(record) = self.state().moves.get(&id)
                && record.phase_seq > step.record.phase_seq
            {
                step.record = (**record).clone();
            }
            if is_ended(&step.record) {
                return;
            }
            let seen = self.observe(&step).await;
            step.confirm = false;
            self.note_members(&step.record, &seen).await;
            let Judged { note, decision } = self.judge(&mut step, begun.elapsed(), &seen);
            // What was decided may not hold for a record that somebody else has changed.
            if let Some(note) = note
                && !self.note(&mut step, note).await
            {
                self.pause(&mut step).await;
                continue;
            }
            let span = step.span.clone();
            self.carry_on(&mut step, &seen, decision).instrument(span).await;
        }
    }

    /// What to do, with a look at the clock.
    fn judge(&self, step: &mut Step, now: Duration, seen: &Observation) -> Judged {
        let Step { record, watch, .. } = step;
        let decision = mover::next(record, seen);
        watch.judge(now, record, seen, decision, || {
            planner::elsewhere(&self.state(), record, &self.sight.borrow())
        })
    }

    async fn carry_on(&self, step: &mut Step, seen: &Observation, decision: Decision) {
        let id = step.record.id;
        let next = orders::advance(&step.record, self.term);
        let next = match decision {
            Decision::Wait { .. } => return self.pause(step).await,
            Decision::Act(actions) => {
                for action in actions {
                    if let Err(status) = self.act(step, seen, &action).await {
                        debug!(id, ?action, reason = status.message(), "an action of a move failed");
                        let is_full = status.code() == Code::ResourceExhausted;
                        let (blocker, reason) = mover::failure(&action, is_full, status.message());
                        step.watch.failed(blocker, reason);
                        return self.pause(step).await;
                    }
                }
                step.pause = PAUSE_FIRST;
                return;
            }
            Decision::Advance(phase) => v1::AdvanceMove { phase: phase.into(), ..next },
            Decision::AdvanceOwing(phase) => v1::AdvanceMove { phase: phase.into(), owing: true, ..next },
            Decision::GiveUp { blocker, reason } => v1::AdvanceMove {
                phase: v1::MovePhase::Aborting.into(),
                gives_up: true,
                blocker: blocker.into(),
                blocked: reason,
                ..next
            },
        };
        let (left, phase) = (step.record.phase(), next.phase());
        match self.advance(step, v1::AdvanceMove { session: fresh(), ..next }).await {
            Ok(()) => {
                let took = std::mem::replace(&mut step.entered, Instant::now()).elapsed();
                self.shared.counted.left_phase(left, took, phase);
                step.span = phase_span(&step.record);
                info!(?phase, after = ?took, "the move goes on");
                step.pause = PAUSE_FIRST;
            }
            Err(reason) => {
                step.watch.failed(v1::MoveBlocker::Refused, reason);
                self.pause(step).await;
            }
        }
    }

    async fn pause(&self, step: &mut Step) {
        sleep(step.pause).await;
        step.pause = (step.pause * 2).min(PAUSE_MOST);
    }

    /// Writes into the record what holds the move up, or that nothing does. False: the record has changed meanwhile, or cannot be.
    async fn note(&self, step: &mut Step, note: Note) -> bool {
        let Note { blocker, reason, stuck } = note;
        let told = v1::AdvanceMove {
            phase: step.record.phase,
            blocker: blocker.into(),
            blocked: reason,
            stuck,
            attempt: blocker != v1::MoveBlocker::None,
            ..orders::advance(&step.record, self.term)
        };
        self.advance(step, told).await.is_ok()
    }

    /// Commits a change of the record and takes over what the meta group answers.
    async fn advance(&self, step: &mut Step, advance: v1::AdvanceMove) -> Result<(), String> {
        let reply = self
            .shared
            .meta_command(Body::AdvanceMove(advance))
            .await
            .map_err(|status| status.message().to_owned())?;
        match reply.body {
            Some(Answer::Move(record)) => {
                step.record = record;
                Ok(())
            }
            Some(Answer::Refused(refused)) => {
                if let Some(record) = refused.r#move {
                    step.record = record;
                }
                Err(refused.text)
            }
            _ => Err("the meta group answered something else than a move".to_owned()),
        }
    }

    /// Asks everybody who may know something about the group.
    async fn observe(&self, step: &Step) -> Observation {
        let (state, mv) = (self.state(), &step.record);
        let request = v1::ReplicaStatusRequest { group: mv.group };
        let ask =
            async |node| Some((node, self.shared.at_within(OBSERVE_TIMEOUT, node, request).await.ok()?));
        let answers = join_all(orders::witnesses(mv, &state).into_iter().map(ask)).await;
        let answers: Vec<_> = answers.into_iter().flatten().collect();
        let silent = self.sight.borrow().silent.clone();
        let mut seen = orders::observation(mv, &state, step.reserved, &silent, &answers);
        if step.confirm
            && let Some((node, request)) = orders::confirmation(mv, self.term, &seen)
            && let Ok(reply) = self.shared.at_within(OBSERVE_TIMEOUT, node, request).await
        {
            orders::confirm(&mut seen, reply);
        }
        seen
    }

    /// Brings the members in the map up to what the group's leader says: routing follows them.
    async fn note_members(&self, mv: &v1::Move, seen: &Observation) {
        let Some(update) = orders::members_update(mv, seen, &self.state()) else { return };
        if let Err(status) = self.shared.meta_done(Body::UpdateMembers(update)).await {
            debug!(group = mv.group, reason = status.message(), "the members in the map were not updated");
        }
    }

    async fn act(&self, step: &mut Step, seen: &Observation, action: &Action) -> Result<(), Status> {
        let order = orders::order(action, &step.record, self.term, seen, &self.state())
            .map_err(Status::unavailable)?;
        let at = &self.shared;
        match order {
            Order::Reserve(node, bytes) => {
                self.reserve(node, bytes).await?;
                step.reserved = true;
                Ok(())
            }
            Order::Ensure(node, request) => at.at_within(ORDER_TIMEOUT, node, *request).await.map(drop),
            Order::Fence(node, request) => at.at_within(ORDER_TIMEOUT, node, request).await.map(drop),
            Order::Change(node, request) => {
                accepted(at.at_within(ORDER_TIMEOUT, node, request).await?.refusal)
            }
            Order::OtherSource(node, request) => {
                accepted(at.at_within(ORDER_TIMEOUT, node, request).await?.refusal)
            }
            Order::Transfer(node, request) => {
                let reply = at.at_within(ORDER_TIMEOUT, node, request).await?;
                // The new leader shows itself in the next look; asking again at once would only repeat the transfer.
                sleep(PAUSE_FIRST).await;
                accepted(reply.refusal)
            }
            Order::Verify(node, request) => {
                accepted(at.at_within(ORDER_TIMEOUT, node, request).await?.refusal)?;
                // The hashes show themselves in the next look; another question would only make new ones.
                sleep(PAUSE_FIRST).await;
                Ok(())
            }
            Order::Confirm => {
                step.confirm = true;
                Ok(())
            }
        }
    }

    /// Whether a node that was given a capacity has room.
    async fn reserve(&self, node: NodeId, bytes: u64) -> Result<(), Status> {
        let report = self.shared.at_within(OBSERVE_TIMEOUT, node, v1::ReportRequest {}).await?;
        let capacity = self.state().nodes.get(&node.get()).map_or(0, |node| node.capacity_bytes);
        if capacity != 0 && report.engine_bytes + bytes > capacity {
            return Err(Status::resource_exhausted(format!(
                "{node} holds {} of {capacity} bytes and {bytes} are to come: raise its capacity or cancel the move",
                report.engine_bytes
            )));
        }
        Ok(())
    }
}

fn accepted(refusal: Option<v1::Refusal>) -> Result<(), Status> {
    use v1::refusal::Kind;
    let text = match refusal.and_then(|refusal| refusal.kind) {
        None => return Ok(()),
        Some(Kind::NotLeader(_)) => "the leader has changed".to_owned(),
        Some(Kind::Invalid(v1::RefusedInvalid { reason }) | Kind::Late(v1::RefusedLate { reason })) => reason,
        Some(other) => format!("refused: {other:?}"),
    };
    Err(Status::failed_precondition(text))
}
