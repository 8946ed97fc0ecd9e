//! One move, from its record to its end: observe, let [`mover::next`] decide, act or commit the next phase.

use std::time::Duration;

use futures::future::join_all;
use pontoon_proto::{
    NodeId,
    v1::{self, meta_command::Body, meta_reply::Body as Answer},
};
use pontoon_shard::mover::{
    self, Action, Decision, Observation,
    orders::{self, Order},
};
use tokio::time::{Instant, sleep};
use tonic::Status;
use tracing::{debug, info};

use super::Driver;
use crate::{cluster::fresh, views::is_ended};

/// How long a node may take to tell how a replica is.
const OBSERVE_TIMEOUT: Duration = Duration::from_millis(1_500);
/// Pauses between looks while a move waits.
const PAUSE_FIRST: Duration = Duration::from_millis(20);
const PAUSE_MOST: Duration = Duration::from_millis(200);
/// A move that waits longer than this says in its record what for.
const BLOCKED_AFTER: Duration = Duration::from_secs(3);

/// What a driver keeps about a move between two looks. Nothing of it must survive the driver.
struct Step {
    record: v1::Move,
    reserved: bool,
    /// The next look takes the members by a linearizable read.
    confirm: bool,
    pause: Duration,
    waits_since: Option<Instant>,
}

impl Driver {
    pub(super) async fn drive_move(self, id: u64) {
        let Some(record) = self.state().moves.get(&id).map(|mv| (**mv).clone()) else { return };
        let mut step =
            Step { record, reserved: false, confirm: false, pause: PAUSE_FIRST, waits_since: None };
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
            let decision = mover::next(&step.record, &seen);
            let owing = matches!(decision, Decision::AdvanceOwing(_));
            match decision {
                Decision::Advance(phase) | Decision::AdvanceOwing(phase) => {
                    let advance = v1::AdvanceMove {
                        phase: phase.into(),
                        session: fresh(),
                        owing,
                        ..advance(&step.record, self.term)
                    };
                    match self.advance(&mut step, advance).await {
                        Ok(()) => info!(id, predicate = step.record.predicate, ?phase, "move"),
                        Err(reason) => self.wait(&mut step, &reason).await,
                    }
                    step.waits_since = None;
                    step.pause = PAUSE_FIRST;
                }
                Decision::Act(actions) => {
                    let mut failed = None;
                    for action in actions {
                        if let Err(status) = self.act(&mut step, &seen, &action).await {
                            debug!(id, ?action, reason = status.message(), "an action of a move failed");
                            failed = Some(status.message().to_owned());
                            break;
                        }
                    }
                    match failed {
                        Some(reason) => self.wait(&mut step, &reason).await,
                        None => step.pause = PAUSE_FIRST,
                    }
                }
                Decision::Wait { reason } => self.wait(&mut step, &reason).await,
            }
        }
    }

    /// Pauses, and after a while writes into the record what for.
    async fn wait(&self, step: &mut Step, reason: &str) {
        let since = *step.waits_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= BLOCKED_AFTER && step.record.blocked != reason && !goes_on(reason) {
            let blocked = v1::AdvanceMove {
                phase: step.record.phase,
                blocked: reason.to_owned(),
                attempt: true,
                ..advance(&step.record, self.term)
            };
            drop(self.advance(step, blocked).await);
            step.waits_since = Some(Instant::now());
        }
        sleep(step.pause).await;
        step.pause = (step.pause * 2).min(PAUSE_MOST);
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
        match order {
            Order::Reserve(node, bytes) => {
                self.reserve(node, bytes).await?;
                step.reserved = true;
                Ok(())
            }
            Order::Ensure(node, request) => self.shared.at(node, *request).await.map(drop),
            Order::Fence(node, request) => self.shared.at(node, request).await.map(drop),
            Order::Change(node, request) => accepted(self.shared.at(node, request).await?.refusal),
            Order::Transfer(node, request) => {
                let reply = self.shared.at(node, request).await?;
                // The new leader shows itself in the next look; asking again at once would only repeat the transfer.
                sleep(PAUSE_FIRST).await;
                accepted(reply.refusal)
            }
            Order::Verify(node, request) => {
                accepted(self.shared.at(node, request).await?.refusal)?;
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

fn advance(record: &v1::Move, term: u64) -> v1::AdvanceMove {
    v1::AdvanceMove {
        id: record.id,
        expect_phase_seq: record.phase_seq,
        driver_term: term,
        ..Default::default()
    }
}

/// Whether what a move waits for needs nobody's hand; its progress is shown elsewhere.
fn goes_on(reason: &str) -> bool {
    reason.ends_with("goes on by itself")
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
