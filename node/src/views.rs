//! What people are told: nodes, predicates, groups and moves, put together from the map and from what nodes report.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures::future::join_all;
use pontoon_proto::{GroupId, NodeId, ReplicaId, v1};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};
use tonic::Status;

use crate::{
    health::Problem,
    json::node_of,
    problems::problems,
    shared::Shared,
    space::{Seen, room_to_wire},
};

/// A node that does not answer within this time is shown as unreachable.
const REPORT_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a watched move is looked at.
const WATCH_INTERVAL: Duration = Duration::from_millis(250);

impl Shared {
    pub(crate) async fn status(self: &Arc<Self>) -> v1::StatusReply {
        let view = self.map.view();
        let shards = view.map().shards.iter().filter(|shard| shard.kind() != v1::ShardKind::Meta);
        let nodes = self.node_views().await;
        let silent: BTreeSet<u64> = nodes
            .iter()
            .filter(|view| !view.reachable)
            .filter_map(|view| view.node.as_ref().map(|node| node.id))
            .collect();
        let lacks = |shard: &&v1::Shard| {
            view.under_replicated(shard) || shard.voters.iter().any(|&voter| silent.contains(&node_of(voter)))
        };
        v1::StatusReply {
            cluster: self.cluster.as_bytes().to_vec().into(),
            node: self.own.get(),
            address: self.address.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            engine: self.engine.to_string(),
            meta_leader: self.meta_leader().map_or(view.map().meta_leader, NodeId::get),
            map_version: view.version(),
            predicates: shards.clone().count() as u64,
            groups: view.map().shards.len() as u64,
            under_replicated: view.map().shards.iter().filter(lacks).count() as u64,
            nodes,
            moves_running: view.map().moves.len() as u64,
            uptime_ms: self.started.elapsed().as_millis() as u64,
            dead: self.dead(),
            cluster_version: view.cluster_version(),
        }
    }

    /// Replicas here that have stopped for good.
    fn dead(&self) -> Vec<v1::DeadReplica> {
        let view = self.map.view();
        let dead = self.raft.dead().into_iter().map(|(group, reason)| {
            let predicate = view.shard(group).map(|shard| shard.predicate.clone()).unwrap_or_default();
            v1::DeadReplica { group: group.0, predicate, reason }
        });
        dead.collect()
    }

    pub(crate) async fn casualties(
        self: &Arc<Self>,
        _: v1::CasualtiesRequest,
    ) -> Result<v1::CasualtiesReply, Status> {
        Ok(v1::CasualtiesReply { dead: self.dead() })
    }

    /// Every node that is not removed, with its own report if it answers.
    pub(crate) async fn node_views(self: &Arc<Self>) -> Vec<v1::NodeView> {
        let view = self.map.view();
        join_all(view.present().map(async |node| {
            let report = match NodeId::new(node.id) {
                Ok(id) => self.at_within(REPORT_TIMEOUT, id, v1::ReportRequest {}).await.ok(),
                Err(_) => None,
            };
            match report {
                Some(report) => v1::NodeView { node: Some(node.clone()), reachable: true, ..report },
                None => v1::NodeView { node: Some(node.clone()), ..Default::default() },
            }
        }))
        .await
    }

    /// What this node alone knows of itself.
    pub(crate) async fn report(self: &Arc<Self>, _: v1::ReportRequest) -> Result<v1::NodeView, Status> {
        let groups = self.raft.groups();
        let leaders = groups
            .iter()
            .filter_map(|&group| self.raft.group(group))
            .filter(|group| group.look(|status| status.role == pontoon_raftstore::Role::Leader))
            .count();
        let Seen { disk, room } = self.space.seen();
        let (writes_per_s, reads_per_s) = self.meter.all();
        let p99 = self.foreground.seen().0;
        Ok(v1::NodeView {
            writes_per_s,
            reads_per_s,
            write_p99_us: p99.map_or(0, |p99| p99.as_micros() as u64),
            disk_free_bytes: disk.free,
            disk_total_bytes: disk.total,
            room: room_to_wire(room).into(),
            node: self.map.view().node(self.own).cloned(),
            reachable: true,
            replicas: groups.len() as u64,
            leaders: leaders as u64,
            wal_bytes: self.wal_bytes(),
            engine_bytes: groups.iter().map(|&group| self.machines.usage(group)).sum(),
            dead: self.dead(),
            problems: self.health.problems().iter().map(Problem::to_wire).collect(),
            certificate_expires: self.tls.as_ref().map_or(0, |tls| tls.now().expires),
            audit_problem: self.audit.problem().unwrap_or_default(),
            turned_away: self.turned_away.counts().into_iter().collect(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            oldest_version: self.versions.oldest,
            newest_version: self.versions.newest,
            boot_token: self.raft.identity().boot_token(),
        })
    }

    pub(crate) async fn predicates(
        self: &Arc<Self>,
        request: v1::PredicatesRequest,
    ) -> Result<v1::PredicatesReply, Status> {
        let view = self.map.view();
        if !request.predicate.is_empty() && view.predicate(&request.predicate).is_none() {
            return Err(no_such_predicate(&request.predicate));
        }
        let groups = self.groups(v1::GroupsRequest::default()).await?;
        let seen: BTreeMap<u64, &v1::GroupView> =
            groups.groups.iter().map(|group| (group.group, group)).collect();
        let chosen = view.map().shards.iter().filter(|shard| {
            shard.kind() != v1::ShardKind::Meta
                && (request.predicate.is_empty() || shard.predicate == request.predicate)
        });
        let predicates = chosen.map(|shard| {
            let group = seen.get(&shard.group);
            let running = view.map().moves.iter().find(|mv| mv.group == shard.group);
            v1::PredicateView {
                shard: Some(shard.clone()),
                leader_node: group.map_or(0, |group| group.leader_node),
                under_replicated: view.under_replicated(shard),
                bytes: group
                    .map_or(0, |group| group.replicas.iter().map(|replica| replica.bytes).max().unwrap_or(0)),
                r#move: running.map_or(0, |mv| mv.id),
            }
        });
        let mut predicates: Vec<_> = predicates.collect();
        predicates.sort_by(|a, b| {
            let name = |view: &v1::PredicateView| view.shard.as_ref().map(|shard| shard.predicate.clone());
            name(a).cmp(&name(b))
        });
        Ok(v1::PredicatesReply { predicates })
    }

    pub(crate) async fn groups(
        self: &Arc<Self>,
        request: v1::GroupsRequest,
    ) -> Result<v1::GroupsReply, Status> {
        let view = self.map.view();
        let mut groups: BTreeMap<u64, v1::GroupView> = BTreeMap::new();
        let mut unreachable = Vec::new();
        let mut add = |group: v1::GroupView| {
            let entry = groups
                .entry(group.group)
                .or_insert_with(|| v1::GroupView { group: group.group, ..Default::default() });
            entry.replicas.extend(group.replicas);
        };
        for id in self.raft.groups() {
            if let Some(group) = self.raft.group(id)
                && (request.group == 0 || request.group == id.0)
            {
                add(v1::GroupView { group: id.0, replicas: vec![self.info(&group)], ..Default::default() });
            }
        }
        if !request.local {
            let others: Vec<NodeId> = view
                .present()
                .filter_map(|node| NodeId::new(node.id).ok())
                .filter(|&node| node != self.own)
                .collect();
            let local = v1::GroupsRequest { local: true, problem: false, ..request };
            let answers =
                others.iter().map(async |&node| (node, self.at_within(REPORT_TIMEOUT, node, local).await));
            for (node, answer) in join_all(answers).await {
                match answer {
                    Ok(reply) => reply.groups.into_iter().for_each(&mut add),
                    Err(_) => unreachable.push(node.get()),
                }
            }
            for shard in
                view.map().shards.iter().filter(|shard| request.group == 0 || request.group == shard.group)
            {
                add(v1::GroupView { group: shard.group, ..Default::default() });
            }
        }
        let mut groups: Vec<_> =
            groups.into_values().map(|group| describe(group, &view, request.local)).collect();
        for group in &mut groups {
            let shard = group.shard.iter();
            let silent = shard.flat_map(|shard| &shard.voters).filter_map(|&id| ReplicaId::new(id).ok());
            let silent = silent.filter(|replica| unreachable.contains(&replica.node().get()));
            group.problems.extend(silent.map(|replica| {
                let node = replica.node();
                format!(
                    "silent: replica {replica} does not answer; start {node}, or run `pontoon decommission {node}`"
                )
            }));
        }
        if request.problem {
            groups.retain(|group| !group.problems.is_empty());
        }
        Ok(v1::GroupsReply { groups, unreachable })
    }

    /// A move with what its replicas say now.
    pub(crate) async fn move_view(self: &Arc<Self>, mv: v1::Move) -> v1::MoveView {
        let mut view = v1::MoveView { bytes_total: mv.bytes_total, ..Default::default() };
        if is_ended(&mv) {
            view.bytes_done = if mv.phase() == v1::MovePhase::Done { mv.bytes_total } else { 0 };
        } else {
            let status = v1::ReplicaStatusRequest { group: mv.group };
            let ask = async |replica: u64| {
                let node = ReplicaId::new(replica).ok()?.node();
                self.at_within(REPORT_TIMEOUT, node, status).await.ok()
            };
            let (target, source) = tokio::join!(ask(mv.target), ask(mv.source));
            let worse = [&target, &source].into_iter().flatten().max_by_key(|seen| strain_of(seen));
            if let Some(seen) = worse {
                view.foreground_p99_us = seen.foreground_p99_us;
                view.foreground_before_us = seen.foreground_level_us;
            }
            if let Some(replica) = target.and_then(|seen| seen.replica) {
                match replica.pull {
                    // Before the manifest is here nobody knows more than the record does.
                    Some(pull) if pull.bytes_total == 0 => {}
                    Some(pull) => (view.bytes_done, view.bytes_total) = (pull.bytes_done, pull.bytes_total),
                    None if replica.applied > 0 => view.bytes_done = view.bytes_total,
                    None => {}
                }
                view.lag = replica.commit.saturating_sub(replica.applied);
            }
        }
        view.r#move = Some(mv);
        view
    }

    /// Looks at a move again and again until it has ended.
    pub(crate) async fn watch_move(
        self: &Arc<Self>,
        id: u64,
    ) -> Result<mpsc::Receiver<Result<v1::MoveView, Status>>, Status> {
        let first = self.find_move(id).await?;
        let (sender, receiver) = mpsc::channel(4);
        let shared = self.clone();
        tokio::spawn(async move {
            let (mut mv, mut sent, mut last) = (first, None, (Instant::now(), 0));
            loop {
                let ended = is_ended(&mv);
                let mut view = shared.move_view(mv).await;
                let seconds = last.0.elapsed().as_secs_f64();
                if last.1 > 0 && view.bytes_done > last.1 && seconds > 0.0 {
                    view.rate = ((view.bytes_done - last.1) as f64 / seconds) as u64;
                    let left = view.bytes_total.saturating_sub(view.bytes_done);
                    view.eta_ms = (left * 1000).checked_div(view.rate).unwrap_or(0);
                }
                last = (Instant::now(), view.bytes_done);
                if sent.as_ref() != Some(&view) {
                    sent = Some(view.clone());
                    if !shared.hand_over(&sender, Ok(view)).await {
                        return;
                    }
                }
                if ended {
                    return;
                }
                sleep(WATCH_INTERVAL).await;
                mv = match shared.find_move(id).await {
                    Ok(mv) => mv,
                    Err(status) => {
                        drop(sender.send(Err(status)).await);
                        return;
                    }
                };
            }
        });
        Ok(receiver)
    }

    /// A move's record: from the map while it runs, from the meta group's leader when it has ended.
    async fn find_move(self: &Arc<Self>, id: u64) -> Result<v1::Move, Status> {
        if let Some(mv) = self.map.view().map().moves.iter().find(|mv| mv.id == id) {
            return Ok(mv.clone());
        }
        let list = self.at_meta_leader(v1::MoveListRequest { all: true, hops: 0 }).await?;
        list.moves.into_iter().filter_map(|view| view.r#move).find(|mv| mv.id == id).ok_or_else(|| {
            Status::not_found(format!("there is no move {id}; `pontoon move list` shows them"))
        })
    }
}

/// How much longer writes take on a node than they do without copies, in thousandths.
fn strain_of(seen: &v1::ReplicaStatusReply) -> u64 {
    (seen.foreground_p99_us * 1_000).checked_div(seen.foreground_level_us).unwrap_or(0)
}

/// Whether a move has come to its end, one way or the other.
pub(crate) fn is_ended(mv: &v1::Move) -> bool {
    matches!(mv.phase(), v1::MovePhase::Done | v1::MovePhase::Aborted)
}

pub(crate) fn no_such_predicate(name: &str) -> Status {
    Status::not_found(format!("there is no predicate {name:?}; `pontoon predicates` shows them"))
}

/// Adds what follows from the reports of a group's replicas.
fn describe(mut group: v1::GroupView, view: &crate::map::MapView, local: bool) -> v1::GroupView {
    let shard = view.shard(GroupId(group.group)).cloned();
    group.predicate = shard.as_ref().map(|shard| shard.predicate.clone()).unwrap_or_default();
    let leader =
        group.replicas.iter().filter(|replica| replica.role == "leader").max_by_key(|replica| replica.term);
    let named = leader.map_or_else(
        || group.replicas.iter().max_by_key(|replica| replica.term).map_or(0, |replica| replica.leader),
        |leader| leader.replica,
    );
    group.leader_node = ReplicaId::new(named).map_or(0, |replica| replica.node().get());
    group.problems = problems(&group, shard.as_ref(), leader, (!local).then_some(view));
    group.wanted = shard.as_ref().map_or(0, |shard| view.wanted(shard)) as u32;
    group.shard = shard;
    group
}
