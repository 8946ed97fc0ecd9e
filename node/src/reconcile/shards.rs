//! Shards come to life and go.

use std::time::Duration;

use futures::{StreamExt, future::join_all, stream::FuturesUnordered};
use pontoon_proto::{
    GroupId, NodeId, ReplicaId,
    v1::{self, meta_command::Body},
};
use tokio::time::{sleep, timeout};
use tracing::debug;

use super::Driver;
use crate::{map::member_nodes, shared::Shared};

const RETRY: Duration = Duration::from_millis(100);
const RETRY_GONE: Duration = Duration::from_secs(1);

impl Driver {
    /// Makes a majority of the founding members exist, then lets the shard be served. Members whose nodes are down are
    /// made by these themselves when they return ([`Shared::found_own_replicas`]).
    pub(super) async fn create_shard(self, group: u64) {
        while self.leads() {
            let state = self.state();
            let Some(shard) =
                state.shards.get(&group).filter(|shard| shard.state() == v1::ShardState::Creating)
            else {
                return;
            };
            let replicas: Vec<ReplicaId> =
                shard.initial.iter().filter_map(|&id| ReplicaId::new(id).ok()).collect();
            let mut asked: FuturesUnordered<_> = replicas
                .iter()
                .map(|&replica| {
                    let request = v1::EnsureReplicaRequest {
                        shard: Some((**shard).clone()),
                        replica: replica.get(),
                        initial: Some(founding(shard)),
                        driver_term: self.term,
                    };
                    let shared = &self.shared;
                    async move { (replica, shared.at(replica.node(), request).await) }
                })
                .collect();
            let mut made = 0;
            while let Some((replica, answer)) = asked.next().await {
                match answer {
                    Ok(_) => made += 1,
                    Err(status) => {
                        debug!(%replica, reason = status.message(), "a founding member was not made")
                    }
                }
                if made > replicas.len() / 2 {
                    break;
                }
            }
            if made > replicas.len() / 2
                && self.shared.meta_done(Body::ShardLive(v1::ShardLive { group })).await.is_ok()
            {
                // The rest of the calls may finish; whoever missed one makes its replica by itself.
                drop(timeout(RETRY_GONE, asked.collect::<Vec<_>>()).await);
                return;
            }
            sleep(RETRY).await;
        }
    }

    /// Fences every member, then forgets the shard. Waits for nodes that are down unless they were removed.
    pub(super) async fn drop_shard(self, group: u64) {
        while self.leads() {
            let state = self.state();
            let Some(shard) =
                state.shards.get(&group).filter(|shard| shard.state() == v1::ShardState::Dropping)
            else {
                return;
            };
            let gone = |node: NodeId| {
                state.nodes.get(&node.get()).is_none_or(|node| node.state() == v1::NodeState::Removed)
            };
            // The highest ordinal that was given out: nothing of the group may ever come back, whichever replica it was.
            let last = shard.next_ordinal.saturating_sub(1).max(1);
            let nodes: Vec<NodeId> = member_nodes(shard).into_iter().filter(|&node| !gone(node)).collect();
            let fenced = join_all(nodes.iter().map(|&node| {
                let replica = ReplicaId::on(node, last).get();
                self.shared.at(node, v1::FenceReplicaRequest { group, replica, driver_term: self.term })
            }))
            .await;
            if fenced.iter().all(Result::is_ok)
                && self.shared.meta_done(Body::ShardDropped(v1::ShardDropped { group })).await.is_ok()
            {
                return;
            }
            sleep(RETRY_GONE).await;
        }
    }
}

/// The configuration that a group starts with, the same on each founding member for ever.
pub(crate) fn founding(shard: &v1::Shard) -> v1::ConfState {
    v1::ConfState { voters: shard.initial.clone(), ..Default::default() }
}

impl Shared {
    /// Makes the founding replicas that the map places here and that do not exist yet: this node was down when the
    /// driver made the others. Ends with the node.
    ///
    /// Safe to repeat: a replica that was here and went has left a tombstone, and a node that lost its data has another
    /// id and is no founding member.
    pub(crate) async fn found_own_replicas(self: std::sync::Arc<Self>) {
        let mut views = self.map.subscribe();
        let mut stop = self.stop.subscribe();
        loop {
            let view = views.borrow_and_update().clone();
            for shard in &view.map().shards {
                let own = shard
                    .initial
                    .iter()
                    .copied()
                    .filter(|id| shard.voters.contains(id))
                    .find_map(|id| ReplicaId::new(id).ok().filter(|replica| replica.node() == self.own));
                let Some(replica) = own else { continue };
                let group = GroupId(shard.group);
                let fenced = self.wal.tombstone(group).is_some_and(|least| least > replica.get());
                if shard.state() != v1::ShardState::Live || fenced || self.raft.group(group).is_some() {
                    continue;
                }
                let request = v1::EnsureReplicaRequest {
                    shard: Some(shard.clone()),
                    replica: replica.get(),
                    initial: Some(founding(shard)),
                    driver_term: 0,
                };
                if let Err(status) = self.ensure_replica(request).await {
                    debug!(%group, %replica, reason = status.message(), "a founding replica was not made");
                }
            }
            tokio::select! {
                changed = views.changed() => if changed.is_err() { return },
                _ = stop.wait_for(|stop| *stop) => return,
            }
        }
    }
}
