//! One move, from its record to its end: observe, let [`mover::next`] decide, act or commit the next phase.

use std::{collections::BTreeSet, time::Duration};

use futures::future::join_all;
use pontoon_proto::{
    NodeId, ReplicaId,
    v1::{self, member_change::Change, meta_command::Body, meta_reply::Body as Answer},
};
use pontoon_shard::mover::{self, Action, Decision, Observation};
use tokio::time::{Instant, sleep};
use tonic::Status;
use tracing::{debug, info};

use super::Driver;
use crate::{calls::Call, cluster::fresh, map::member_nodes, views::is_ended};

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
            match mover::next(&step.record, &seen) {
                Decision::Advance(phase) => {
                    let advance = v1::AdvanceMove {
                        phase: phase.into(),
                        session: fresh(),
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
        let state = self.state();
        let mv = &step.record;
        let part = |id: u64| ReplicaId::new(id).ok().map(ReplicaId::node);
        let (source, target) = (part(mv.source), part(mv.target));
        let mut nodes: BTreeSet<NodeId> = state
            .shards
            .get(&mv.group)
            .map(|shard| member_nodes(shard))
            .unwrap_or_default()
            .into_iter()
            .collect();
        nodes.extend(source.into_iter().chain(target));
        let removed = |node: Option<NodeId>| {
            node.is_some_and(|node| {
                state.nodes.get(&node.get()).is_none_or(|node| node.state() == v1::NodeState::Removed)
            })
        };
        nodes.retain(|&node| !removed(Some(node)));
        let request = v1::ReplicaStatusRequest { group: mv.group };
        let answers = join_all(
            nodes
                .iter()
                .map(async |&node| (node, self.shared.at_within(OBSERVE_TIMEOUT, node, request).await.ok())),
        )
        .await;
        let of = |node: Option<NodeId>| {
            answers.iter().find(|(asked, _)| Some(*asked) == node).and_then(|(_, answer)| answer.clone())
        };
        let leader = answers
            .iter()
            .filter_map(|(_, answer)| answer.as_ref()?.replica.as_ref())
            .filter(|replica| replica.role == "leader")
            .max_by_key(|replica| replica.term)
            .cloned();
        let mut seen = Observation {
            leader,
            confirmed: false,
            target: of(target),
            source: of(source),
            reserved: step.reserved,
            target_removed: removed(target),
            source_removed: removed(source),
        };
        if step.confirm {
            seen.confirmed = self.confirm(&mut seen).await;
        }
        seen
    }

    /// Replaces the leader's members by those of a linearizable read; false if that did not succeed.
    async fn confirm(&self, seen: &mut Observation) -> bool {
        let Some(leader) = &mut seen.leader else { return false };
        let Ok(replica) = ReplicaId::new(leader.replica) else { return false };
        let request = v1::ConfirmMembersRequest { group: leader.group };
        match self.shared.at_within(OBSERVE_TIMEOUT, replica.node(), request).await {
            Ok(v1::ConfirmMembersReply { refusal: None, conf_state: Some(conf_state), index }) => {
                leader.conf_state = Some(conf_state);
                leader.applied = leader.applied.max(index);
                true
            }
            _ => false,
        }
    }

    /// Brings the members in the map up to what the group's leader says: routing follows them.
    async fn note_members(&self, mv: &v1::Move, seen: &Observation) {
        let Some(leader) = &seen.leader else { return };
        let Some(conf) = leader.conf_state.as_ref().filter(|conf| conf.voters_outgoing.is_empty()) else {
            return;
        };
        let state = self.state();
        let known = state.shards.get(&mv.group);
        if known.is_some_and(|shard| shard.voters == conf.voters && shard.learners == conf.learners) {
            return;
        }
        let update = v1::UpdateMembers {
            group: mv.group,
            voters: conf.voters.clone(),
            learners: conf.learners.clone(),
            members_index: leader.applied,
        };
        if let Err(status) = self.shared.meta_done(Body::UpdateMembers(update)).await {
            debug!(group = mv.group, reason = status.message(), "the members in the map were not updated");
        }
    }

    async fn act(&self, step: &mut Step, seen: &Observation, action: &Action) -> Result<(), Status> {
        let group = step.record.group;
        match action {
            Action::Reserve { node, bytes, .. } => {
                self.reserve(*node, *bytes).await?;
                step.reserved = true;
                Ok(())
            }
            Action::EnsureReplica { node, replica } => {
                let state = self.state();
                let shard = state.shards.get(&group).ok_or_else(|| Status::not_found("the shard is gone"))?;
                let request = v1::EnsureReplicaRequest {
                    shard: Some((**shard).clone()),
                    replica: replica.get(),
                    initial: None,
                    driver_term: self.term,
                };
                self.shared.at(*node, request).await.map(drop)
            }
            Action::AddLearner(replica) => self.change(seen, group, Change::AddLearner(replica.get())).await,
            Action::RemoveLearner(replica) => self.change(seen, group, Change::Remove(replica.get())).await,
            Action::LeaveJoint => self.change(seen, group, Change::LeaveJoint(true)).await,
            Action::EnterJoint { promote, demote } => {
                let ids = |replicas: &[ReplicaId]| replicas.iter().map(|replica| replica.get()).collect();
                let joint = v1::JointChange { promote: ids(promote), demote: ids(demote) };
                self.change(seen, group, Change::EnterJoint(joint)).await
            }
            Action::TransferLeader { to } => {
                let request = v1::TransferLeaderRequest { group, to: to.get(), driver_term: self.term };
                let reply = self.at_leader(seen, request).await?;
                // The new leader shows itself in the next look; asking again at once would only repeat the transfer.
                sleep(PAUSE_FIRST).await;
                accepted(reply.refusal)
            }
            Action::Verify => {
                let request = v1::VerifyGroupRequest { group, driver_term: self.term };
                let reply = self.at_leader(seen, request).await?;
                accepted(reply.refusal)?;
                // The hashes show themselves in the next look; another question would only make new ones.
                sleep(PAUSE_FIRST).await;
                Ok(())
            }
            Action::Fence { node, replica } => {
                let request =
                    v1::FenceReplicaRequest { group, replica: replica.get(), driver_term: self.term };
                self.shared.at(*node, request).await.map(drop)
            }
            Action::ConfirmRemoved => {
                step.confirm = true;
                Ok(())
            }
        }
    }

    async fn change(&self, seen: &Observation, group: u64, change: Change) -> Result<(), Status> {
        let change = Some(v1::MemberChange { change: Some(change) });
        let request = v1::ChangeMembersRequest { group, change, driver_term: self.term };
        accepted(self.at_leader(seen, request).await?.refusal)
    }

    async fn at_leader<C: Call>(&self, seen: &Observation, call: C) -> Result<C::Reply, Status> {
        let leader = seen.leader.as_ref().and_then(|leader| ReplicaId::new(leader.replica).ok());
        let node = leader.ok_or_else(|| Status::unavailable("the group has no leader"))?.node();
        self.shared.at(node, call).await
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
        Some(Kind::Invalid(invalid)) => invalid.reason,
        Some(other) => format!("refused: {other:?}"),
    };
    Err(Status::failed_precondition(text))
}
