//! What the leader of the meta group answers: predicates, moves, members. Runs on whichever node leads it; a call that
//! finds the leadership gone ends with `UNAVAILABLE` and is taken elsewhere.

use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures::future::join_all;
use pontoon_proto::{
    NodeId, ReplicaId,
    v1::{self, meta_command::Body, meta_reply::Body as Answer, refusal::Kind},
};
use pontoon_shard::{
    Feature, MetaState, Versions,
    planner::{self, Seen},
};
use tokio::time::{Instant, timeout, timeout_at};
use tonic::Status;

use crate::{
    calls::refused_status,
    map::{holders, member_nodes},
    preview,
    route::{check_predicate, wrong_kind},
    shared::Shared,
    views::{is_ended, no_such_predicate},
};

/// How long a predicate may take to be served after it was created.
const CREATE_PATIENCE: Duration = Duration::from_secs(10);
/// How long a node may take to show that it is there.
const ANSWER: Duration = Duration::from_secs(2);
/// What a cluster says that cannot do it yet.
pub(crate) const REPLACE_LATER: &str = "the cluster is at version 1, where nothing takes the place of something else in one step: run `pontoon upgrade \
                             finalise` once all nodes are upgraded, or drop the predicate and restore without --replace";
const REPLICAS_DEFAULT: u32 = 3;
const EVENTS_DEFAULT: usize = 100;

impl Shared {
    pub(crate) fn meta_state(&self) -> Arc<MetaState> {
        self.machines.shards().meta().borrow().clone()
    }

    /// The meta state here as soon as it is as new as that version.
    pub(crate) async fn meta_state_at(&self, version: u64) -> Result<Arc<MetaState>, Status> {
        let mut states = self.machines.shards().meta();
        let state = states.wait_for(|state| state.version >= version).await;
        state.map(|state| state.clone()).map_err(|_| Status::unavailable("the node is shutting down"))
    }

    pub(crate) async fn create_predicate(
        self: &Arc<Self>,
        request: v1::CreatePredicateRequest,
    ) -> Result<v1::CreatePredicateReply, Status> {
        check_predicate(&request.predicate).map_err(Status::invalid_argument)?;
        let state = self.meta_state();
        let shard = match state.shard(&request.predicate) {
            Some(shard) if shard.state() != v1::ShardState::Dropping => {
                check_kind(shard, request.kind)?;
                (**shard).clone()
            }
            _ => {
                let wanted = if request.replicas == 0 { REPLICAS_DEFAULT } else { request.replicas };
                let seen = self.look_around(&state, false).await;
                let nodes = planner::placement(&state, &request.predicate, wanted as usize, &seen);
                let nodes = nodes.into_iter().map(NodeId::get).collect();
                let create = v1::CreateShard {
                    predicate: request.predicate.clone(),
                    kind: request.kind,
                    replicas_wanted: wanted,
                    nodes,
                };
                match self.meta_done(Body::CreateShard(create)).await?.body {
                    Some(Answer::Shard(shard)) => shard,
                    _ => return Err(Status::internal("the meta group answered something else than a shard")),
                }
            }
        };
        if shard.state() == v1::ShardState::Live {
            return Ok(v1::CreatePredicateReply { shard: Some(shard) });
        }
        let group = shard.group;
        let mut states = self.machines.shards().meta();
        let live = states.wait_for(|state| {
            state.shards.get(&group).is_none_or(|shard| shard.state() != v1::ShardState::Creating)
        });
        let found = match timeout(CREATE_PATIENCE, live).await {
            Ok(Ok(state)) => state.shards.get(&group).map(|shard| (**shard).clone()),
            _ => {
                let members: Vec<_> = member_nodes(&shard).iter().map(ToString::to_string).collect();
                return Err(Status::deadline_exceeded(format!(
                    "{} is being created on {}; are these nodes up? It will be served when they are",
                    request.predicate,
                    members.join(", ")
                )));
            }
        };
        let shard =
            found.ok_or_else(|| Status::aborted(format!("{} was dropped meanwhile", request.predicate)))?;
        Ok(v1::CreatePredicateReply { shard: Some(shard) })
    }

    pub(crate) async fn find_predicate(
        self: &Arc<Self>,
        request: v1::FindPredicateRequest,
    ) -> Result<v1::FindPredicateReply, Status> {
        let shard = self.meta_state().shard(&request.predicate).map(|shard| (**shard).clone());
        Ok(v1::FindPredicateReply { shard })
    }

    pub(crate) async fn drop_predicate(
        self: &Arc<Self>,
        request: v1::DropPredicateRequest,
    ) -> Result<v1::DropPredicateReply, Status> {
        let state = self.meta_state();
        let Some(shard) = state.shard(&request.predicate) else {
            return Err(no_such_predicate(&request.predicate));
        };
        if let Some(kind) = request.kind {
            check_kind(shard, kind)?;
        }
        let group = shard.group;
        self.meta_done(Body::DropShard(v1::DropShard { predicate: request.predicate.clone() })).await?;
        let mut states = self.machines.shards().meta();
        let gone = states.wait_for(|state| !state.shards.contains_key(&group));
        // Nodes that are down are fenced when they return; the caller need not wait for them.
        drop(timeout(CREATE_PATIENCE, gone).await);
        Ok(v1::DropPredicateReply {})
    }

    /// Answers when the old predicate is gone, or its nodes are down. Whoever still writes to it by an older map may be told that
    /// that is done, until it is gone.
    pub(crate) async fn replace_predicate(
        self: &Arc<Self>,
        request: v1::ReplacePredicateRequest,
    ) -> Result<v1::ReplacePredicateReply, Status> {
        let v1::ReplacePredicateRequest { predicate, old_group, new_group, .. } = request;
        // It may not be proposed before: an older node would stop at it.
        if !self.meta_state().has(Feature::ReplacedShards) {
            return Err(Status::failed_precondition(REPLACE_LATER));
        }
        let until = Instant::now() + CREATE_PATIENCE;
        let mut states = self.machines.shards().meta();
        let still = states.wait_for(|state| {
            [old_group, new_group].into_iter().all(|group| state.running_move(group).is_none())
        });
        // If one goes on, the meta group says so.
        drop(timeout_at(until, still).await);
        let replace = v1::ReplaceShard { predicate, old_group, new_group };
        let Some(Answer::Shard(shard)) = self.meta_done(Body::ReplaceShard(replace)).await?.body else {
            return Err(Status::internal("the meta group answered something else than a shard"));
        };
        let gone = states.wait_for(|state| !state.shards.contains_key(&old_group));
        drop(timeout_at(until, gone).await);
        Ok(v1::ReplacePredicateReply { shard: Some(shard) })
    }

    pub(crate) async fn move_start(
        self: &Arc<Self>,
        request: v1::MoveStartRequest,
    ) -> Result<v1::MoveStartReply, Status> {
        let state = self.meta_state();
        let shard =
            state.shard(&request.predicate).ok_or_else(|| no_such_predicate(&request.predicate))?.clone();
        let seen = self.look_around(&state, false).await;
        let plan = plan_move(&state, &shard, &request, &seen)?;
        if let Ok(target) = NodeId::new(plan.target_node)
            && let Ok(view) = self.at_within(Duration::from_secs(2), target, v1::ReportRequest {}).await
            && view.room() != v1::NodeRoom::Ample
        {
            return Err(Status::failed_precondition(format!(
                "the disk of node {target} is nearly full ({} MiB free); free space there, or choose another node",
                view.disk_free_bytes >> 20
            )));
        }
        let reports = join_all(member_nodes(&shard).into_iter().map(|node| {
            self.at_within(Duration::from_secs(2), node, v1::ReplicaStatusRequest { group: shard.group })
        }))
        .await;
        let replicas: Vec<_> = reports.into_iter().flatten().filter_map(|reply| reply.replica).collect();
        let bytes = replicas.iter().map(|replica| replica.bytes).max().unwrap_or(0);
        let leader = replicas.iter().find(|replica| replica.role == "leader");
        let before: Vec<u64> =
            shard.voters.iter().filter_map(|&id| ReplicaId::new(id).ok()).map(|id| id.node().get()).collect();
        let source_node = ReplicaId::new(plan.source).map_or(0, |source| source.node().get());
        let mut after: Vec<u64> = before.iter().copied().filter(|&node| node != source_node).collect();
        after.extend((plan.target_node != 0).then_some(plan.target_node));
        let mut reply = v1::MoveStartReply {
            r#move: None,
            checks: checks(&shard, &before, leader.is_some(), replicas.len()),
            bytes,
            before,
            after,
            leader_node: leader
                .and_then(|leader| ReplicaId::new(leader.replica).ok())
                .map_or(0, |id| id.node().get()),
            steps: Vec::new(),
            estimate_ms: 0,
            revision: shard.revision,
            from_node: source_node,
            to_node: plan.target_node,
        };
        if request.dry_run {
            let learners: Vec<u64> = shard
                .learners
                .iter()
                .filter_map(|&id| ReplicaId::new(id).ok())
                .map(|id| id.node().get())
                .collect();
            let kind = v1::MoveKind::try_from(plan.kind).unwrap_or_default();
            let budget = self.map.view().budget().unwrap_or_default();
            let target = plan.target_node;
            reply.steps = preview::steps(kind, &reply.before, &learners, source_node, target);
            reply.estimate_ms = preview::estimate(bytes, budget, target != 0).as_millis() as u64;
        }
        let start = v1::StartMove {
            bytes_total: bytes,
            session: fresh(),
            expect_revision: request.expect_revision,
            ..plan
        };
        reply.r#move = Some(if request.dry_run {
            v1::Move {
                group: shard.group,
                predicate: shard.predicate.clone(),
                kind: start.kind,
                source: start.source,
                bytes_total: bytes,
                ..Default::default()
            }
        } else {
            match self.meta_done(Body::StartMove(start)).await?.body {
                Some(Answer::Move(mv)) => mv,
                _ => return Err(Status::internal("the meta group answered something else than a move")),
            }
        });
        Ok(reply)
    }

    pub(crate) async fn move_list(
        self: &Arc<Self>,
        request: v1::MoveListRequest,
    ) -> Result<v1::MoveListReply, Status> {
        let state = self.meta_state();
        let chosen = state.moves.values().filter(|mv| request.all || !is_ended(mv));
        let moves = join_all(chosen.map(|mv| self.move_view((**mv).clone()))).await;
        Ok(v1::MoveListReply { moves })
    }

    pub(crate) async fn move_cancel(
        self: &Arc<Self>,
        request: v1::MoveCancelRequest,
    ) -> Result<v1::MoveCancelReply, Status> {
        let cancel = v1::CancelMove { id: request.id, reason: "by an operator".to_owned() };
        match self.meta_done(Body::CancelMove(cancel)).await?.body {
            Some(Answer::Move(mv)) => Ok(v1::MoveCancelReply { r#move: Some(mv) }),
            _ => Err(Status::internal("the meta group answered something else than a move")),
        }
    }

    /// Removes a node for ever. Only one that is empty or does not answer: whoever answers still votes, and would go on
    /// voting while its successors are made.
    pub(crate) async fn decommission(
        self: &Arc<Self>,
        request: v1::DecommissionRequest,
    ) -> Result<v1::DecommissionReply, Status> {
        let node = NodeId::new(request.node).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let state = self.meta_state();
        let members = state.members().filter_map(|node| NodeId::new(node.id).ok());
        let answers = members.map(async |asked| {
            let answer = self.at_within(ANSWER, asked, v1::ReportRequest {}).await;
            answer.is_ok().then_some(asked)
        });
        let answering: BTreeSet<NodeId> = join_all(answers).await.into_iter().flatten().collect();
        let replicas = state.replicas_on(node.get()) as u64;
        if answering.contains(&node) && replicas > 0 {
            return Err(Status::failed_precondition(format!(
                "{node} answers and holds {replicas} replicas: empty it with `pontoon drain {node} --wait`, and ask again"
            )));
        }
        let nodes_of = |shard: &v1::Shard| -> Vec<NodeId> {
            shard.voters.iter().filter_map(|&id| ReplicaId::new(id).ok()).map(ReplicaId::node).collect()
        };
        for shard in state.shards.values().filter(|shard| shard.state() != v1::ShardState::Dropping) {
            let voters = nodes_of(shard);
            let there = voters.iter().filter(|&voter| answering.contains(voter)).count();
            if voters.contains(&node) && there * 2 <= voters.len() {
                return Err(Status::failed_precondition(format!(
                    "of the {} replicas of {} (group {}) only {there} answer, no majority: without {node} nobody could \
                     replace its replica; start it or the other nodes that do not answer, or, if these are lost for good, make a \
                     plan with `pontoon recover plan --lost NODES`",
                    voters.len(),
                    shard.predicate,
                    shard.group
                )));
            }
        }
        let removed = v1::NodeState::Removed.into();
        let remove = v1::SetNodeState { node: node.get(), state: removed, force: true, seen: None };
        match self.meta_done(Body::SetNodeState(remove)).await?.body {
            Some(Answer::Node(node)) => Ok(v1::DecommissionReply { node: Some(node), replicas }),
            _ => Err(Status::internal("the meta group answered something else than a node")),
        }
    }

    pub(crate) async fn events(
        self: &Arc<Self>,
        request: v1::EventsRequest,
    ) -> Result<v1::EventsReply, Status> {
        let state = self.meta_state();
        let limit = if request.limit == 0 { EVENTS_DEFAULT } else { request.limit as usize };
        let newer: Vec<_> = state
            .events
            .range(request.after.saturating_add(1)..)
            .map(|(_, event)| (**event).clone())
            .collect();
        let events = newer[newer.len().saturating_sub(limit)..].to_vec();
        Ok(v1::EventsReply { events })
    }

    /// Takes a node in. The same nonce gets the same answer.
    pub(crate) async fn join(self: &Arc<Self>, request: v1::JoinRequest) -> Result<v1::JoinReply, Status> {
        if self.founding.load(Ordering::Acquire) {
            return Err(Status::unavailable("the cluster is being founded: ask again"));
        }
        let speaks = Versions::said(request.oldest_version, request.newest_version);
        if let Some(reason) = speaks.misses(self.meta_state().cluster_version) {
            return Err(Status::failed_precondition(reason));
        }
        let register = v1::RegisterNode {
            address: request.address,
            engine: request.engine,
            labels: request.labels,
            capacity_bytes: request.capacity_bytes,
            boot_token: request.boot_token,
            nonce: request.nonce,
            replace: request.replace,
            wanted: request.wanted,
            oldest_version: request.oldest_version,
            newest_version: request.newest_version,
        };
        let reply = self.meta_done(Body::RegisterNode(register)).await?;
        let Some(Answer::Node(node)) = reply.body else {
            return Err(Status::internal("the meta group answered something else than a node"));
        };
        // The map that is handed out must hold the new node.
        let state = self.meta_state_at(reply.version).await?;
        Ok(v1::JoinReply {
            cluster: self.cluster.as_bytes().to_vec().into(),
            node: node.id,
            map: Some(v1::ClusterMap { meta_leader: self.own.get(), ..state.to_map() }),
        })
    }

    pub(crate) async fn announce(
        self: &Arc<Self>,
        request: v1::AnnounceRequest,
    ) -> Result<v1::AnnounceReply, Status> {
        let v1::AnnounceRequest {
            node,
            address,
            boot_token,
            boot_history,
            labels,
            capacity_bytes,
            engine,
            oldest_version,
            newest_version,
            ..
        } = request;
        if let Ok(id) = NodeId::new(node)
            && let Some(copied) = self.raft.twin(id, boot_token, &address)
        {
            return Ok(v1::AnnounceReply { copied, perhaps: true });
        }
        let address = v1::SetNodeAddress {
            node,
            address,
            boot_token,
            boot_history,
            labels,
            capacity_bytes,
            engine,
            oldest_version,
            newest_version,
        };
        match self.meta_command(Body::SetNodeAddress(address)).await?.body {
            Some(Answer::Refused(refused)) if refused.reason() == v1::MetaRefusal::OtherDisk => {
                Ok(v1::AnnounceReply { copied: refused.text, perhaps: false })
            }
            Some(Answer::Refused(refused)) => Err(refused_status(&refused)),
            _ => Ok(v1::AnnounceReply::default()),
        }
    }
}

/// Refuses a call for predicates of one kind that names one of another.
fn check_kind(shard: &v1::Shard, wanted: i32) -> Result<(), Status> {
    let wrong = v1::ShardKind::try_from(wanted).ok().and_then(|wanted| wrong_kind(shard, wanted));
    match wrong.and_then(|refusal| refusal.kind) {
        Some(Kind::WrongKind(wrong)) => Err(Status::failed_precondition(wrong.reason)),
        _ if shard.kind == wanted => Ok(()),
        _ => Err(Status::failed_precondition(format!(
            "{} exists already and is of the kind {}, not {wanted}: choose another name",
            shard.predicate, shard.kind
        ))),
    }
}

/// Fills in what the request leaves to the planner and refuses what makes no sense.
fn plan_move(
    state: &MetaState,
    shard: &v1::Shard,
    request: &v1::MoveStartRequest,
    seen: &Seen,
) -> Result<v1::StartMove, Status> {
    let kind = v1::MoveKind::try_from(request.kind)
        .map_err(|_| Status::invalid_argument(format!("no kind of move has the number {}", request.kind)))?;
    // A learner may only be given up: it has no vote to pass on.
    let learners: &[u64] = if kind == v1::MoveKind::Remove { &shard.learners } else { &[] };
    let replica_on = |node: u64| {
        let members = shard.voters.iter().chain(learners);
        members.copied().find(|&id| ReplicaId::new(id).is_ok_and(|replica| replica.node().get() == node))
    };
    let load = state.load();
    let load_of = |node: u64| load.get(&node).copied().unwrap_or(0);
    let source = match (kind, request.from_node) {
        (v1::MoveKind::Add | v1::MoveKind::AddLearner, _) => 0,
        (_, 0) => shard
            .voters
            .iter()
            .copied()
            .max_by_key(|&id| ReplicaId::new(id).map_or(0, |replica| load_of(replica.node().get())))
            .ok_or_else(|| {
                Status::failed_precondition(format!("{} has no voters yet; wait", shard.predicate))
            })?,
        (_, node) => replica_on(node).ok_or_else(|| {
            let movable = v1::Shard { learners: learners.to_vec(), ..shard.clone() };
            let holders: Vec<_> = holders(&movable).iter().map(ToString::to_string).collect();
            Status::failed_precondition(format!(
                "n{node} holds no replica of {} that can be moved so; those are on {}",
                shard.predicate,
                holders.join(", ")
            ))
        })?,
    };
    let target_node = match (kind, request.to_node) {
        (v1::MoveKind::Remove, _) => 0,
        (_, 0) => planner::target(state, shard.group, source, seen)
            .ok_or_else(|| {
                Status::failed_precondition(format!(
                    "no other node may take a replica of {0}: `pontoon explain {0}` says why of each; add a node",
                    shard.predicate
                ))
            })?
            .get(),
        (_, node) if holders(shard).iter().any(|holder| holder.get() == node) => {
            return Err(Status::failed_precondition(format!(
                "n{node} already holds a replica of {}; choose another node, or let one join (`pontoon node --join`)",
                shard.predicate
            )));
        }
        (_, node) if !state.live_nodes().any(|live| live.get() == node) => {
            return Err(Status::failed_precondition(format!(
                "n{node} is not a live node of this cluster; `pontoon nodes` lists them"
            )));
        }
        (_, node) => {
            let broken = state.nodes.get(&node).map(|node| state.rulebook().of(&shard.predicate).breaks(node));
            if let Some(broken) = broken.unwrap_or_default().first() {
                return Err(Status::failed_precondition(format!(
                    "n{node} is against a rule of {0} ({broken}): choose another node, `pontoon explain {0}` shows them, or \
                     change the rule",
                    shard.predicate
                )));
            }
            let id = NodeId::new(node).map_err(|error| Status::invalid_argument(error.to_string()))?;
            if seen.silent.contains(&id) {
                return Err(Status::failed_precondition(format!("n{node} does not answer: start it, or choose another node")));
            }
            node
        }
    };
    if state.rulebook().of(&shard.predicate).freeze {
        return Err(Status::failed_precondition(format!(
            "{} is frozen by a rule: `pontoon rules show`, take `freeze` out and set the rules again",
            shard.predicate
        )));
    }
    let reason = if request.reason.is_empty() { "by an operator".to_owned() } else { request.reason.clone() };
    Ok(v1::StartMove {
        group: shard.group,
        kind: kind.into(),
        source,
        target_node,
        reason,
        ..Default::default()
    })
}

fn checks(shard: &v1::Shard, before: &[u64], led: bool, answering: usize) -> Vec<v1::MoveCheck> {
    let majority = before.len() / 2 + 1;
    let mut checks = vec![
        v1::MoveCheck {
            ok: led,
            text: if led {
                "the group has a leader".to_owned()
            } else {
                "nobody leads the group now; the move waits".to_owned()
            },
        },
        v1::MoveCheck {
            ok: answering >= majority,
            text: format!("{answering} of {} replicas answer, {majority} are needed", before.len()),
        },
    ];
    if before.len() == 1 {
        checks.push(v1::MoveCheck {
            ok: true,
            text:
                "one voter: no fault is tolerated between the joint step and the removal of the old replica"
                    .to_owned(),
        });
    }
    if before.len() < shard.replicas_wanted as usize {
        let text = format!("{} of {} wanted replicas exist", before.len(), shard.replicas_wanted);
        checks.push(v1::MoveCheck { ok: true, text });
    }
    checks
}

/// A number that no other call drew.
pub(crate) fn fresh() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().0
}
