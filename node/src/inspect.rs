//! What a node tells to whoever looks for a fault.

use std::{fmt::Write, sync::Arc, time::Duration};

use futures::future::join_all;
use pontoon_proto::{GroupId, NodeId, v1};
use pontoon_raftstore::{Depths, Flight};
use tokio::time::timeout;
use tonic::Status;

use crate::{metrics, process::recent_logs, settings::InForce, shared::Shared};

/// How long a node may take to tell how a group is.
const ANSWER: Duration = Duration::from_secs(2);
/// How long a loop may take: one that hangs is what is looked for.
const LOOP_ANSWER: Duration = Duration::from_secs(1);
/// So many groups that hold room in the log are named.
const HOLDERS: usize = 20;

impl Shared {
    /// Everything that this node can tell of itself.
    pub(crate) async fn inspect(self: &Arc<Self>, _: v1::InspectRequest) -> Result<v1::InspectReply, Status> {
        let report = self.report(v1::ReportRequest {}).await?;
        let shared = self.clone();
        let (metrics, log_statistics) =
            tokio::task::spawn_blocking(move || (metrics::page(&shared), shared.log_statistics()))
                .await
                .map_err(|error| Status::internal(error.to_string()))?;
        let setting = |InForce { key, value, origin }: &InForce| v1::SettingInForce {
            key: key.clone(),
            value: value.clone(),
            origin: origin.to_string(),
        };
        Ok(v1::InspectReply {
            report: Some(report),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_ms: self.started.elapsed().as_millis() as u64,
            settings: self.settings.iter().map(setting).collect(),
            metrics,
            logs: recent_logs(),
            log_statistics,
        })
    }

    fn log_statistics(&self) -> String {
        let log = self.wal.metrics();
        let mut text = format!("{log:#?}\n");
        let _ = writeln!(text, "the groups that hold most of it:");
        for held in self.wal.pinned(HOLDERS) {
            let _ = writeln!(text, "  {held:?}");
        }
        text
    }

    /// A group's replicas with what waits in each of them: here, and unless only that is asked for on every node that answers.
    pub(crate) async fn inspect_group(
        self: &Arc<Self>,
        request: v1::InspectGroupRequest,
    ) -> Result<v1::InspectGroupReply, Status> {
        let (group, view) = (GroupId(request.group), self.map.view());
        let mut reply = v1::InspectGroupReply {
            predicate: view.shard(group).map(|shard| shard.predicate.clone()).unwrap_or_default(),
            ..Default::default()
        };
        if let Some(handle) = self.raft.group(group) {
            let depths = timeout(LOOP_ANSWER, handle.depths()).await;
            reply.replicas.push(v1::InspectedReplica {
                node: self.own.get(),
                replica: Some(self.info(&handle)),
                sleeping: handle.look(|status| status.sleeping),
                depths: depths.ok().and_then(Result::ok).map(wire),
            });
        }
        if !request.local {
            let others = view.present().filter_map(|node| NodeId::new(node.id).ok());
            let local = v1::InspectGroupRequest { local: true, ..request };
            let ask = async |node| (node, self.at_within(ANSWER, node, local).await);
            for (node, answer) in join_all(others.filter(|&node| node != self.own).map(ask)).await {
                match answer {
                    Ok(other) => reply.replicas.extend(other.replicas),
                    Err(_) => reply.unreachable.push(node.get()),
                }
            }
            reply.replicas.sort_by_key(|replica| replica.node);
            if reply.replicas.is_empty() && reply.unreachable.is_empty() {
                return Err(Status::not_found(format!(
                    "no node holds a replica of group {}; `pontoon groups` lists them",
                    request.group
                )));
            }
        }
        Ok(reply)
    }
}

fn wire(depths: Depths) -> v1::ReplicaDepths {
    let flight = |Flight { replica, appends, bytes }: &Flight| v1::ReplicaFlight {
        replica: replica.get(),
        appends: *appends as u64,
        bytes: *bytes,
    };
    v1::ReplicaDepths {
        proposals: depths.proposals as u64,
        reads: depths.reads as u64,
        held_messages: depths.held_messages as u64,
        committed: depths.committed as u64,
        unapplied_bytes: depths.unapplied_bytes,
        writes_asked: depths.log_writes.0,
        writes_durable: depths.log_writes.1,
        log_bytes: depths.log_bytes,
        flights: depths.flights.iter().map(flight).collect(),
    }
}
