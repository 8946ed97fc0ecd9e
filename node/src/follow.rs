//! Keeps this node's map up to date: from its own replica of the meta group, or from a node that has one.

use std::{sync::Arc, time::Duration};

use pontoon_proto::{GroupId, v1};
use tokio::{sync::watch, time::sleep};
use tonic::Status;
use tracing::{debug, warn};

use crate::{directory::Directory, shared::Shared};

/// Changes that follow each other within this time travel as one.
const COALESCE: Duration = Duration::from_millis(20);
/// How long to wait before another node is asked.
const RETRY: Duration = Duration::from_millis(100);
/// How often a node that listens to others looks whether it has become a member of the meta group.
const RECHECK: Duration = Duration::from_millis(500);

impl Shared {
    /// Takes over every state that the own replica of the meta group publishes. Ends with the node.
    pub(crate) async fn follow_own_meta(self: Arc<Self>) {
        let mut states = self.machines.shards().meta();
        let mut stop = self.stop.subscribe();
        loop {
            let state = states.borrow_and_update().clone();
            // A state of another cluster cannot be here; one from before the bootstrap says nothing.
            if state.cluster.is_some() {
                self.map.offer(state.to_map());
            }
            tokio::select! {
                changed = states.changed() => if changed.is_err() { return },
                _ = stop.wait_for(|stop| *stop) => return,
            }
            sleep(COALESCE).await;
        }
    }

    /// While no replica of the meta group is here, listens to a node that has one. Ends with the node.
    pub(crate) async fn follow_others(self: Arc<Self>) {
        let mut stop = self.stop.subscribe();
        loop {
            let round = async {
                if self.has_meta_state() {
                    sleep(RECHECK).await;
                    return;
                }
                if let Err(status) = self.listen().await {
                    debug!(reason = status.message(), "the map's stream ended");
                }
                sleep(RETRY).await;
            };
            tokio::select! {
                () = round => {}
                _ = stop.wait_for(|stop| *stop) => return,
            }
        }
    }

    fn has_meta_state(&self) -> bool {
        self.raft.group(GroupId::META).is_some() && self.machines.shards().meta().borrow().cluster.is_some()
    }

    /// Takes over the map of another node, until that ends or a replica of the meta group is here.
    pub(crate) async fn listen(&self) -> Result<(), Status> {
        let node = self.meta_member().ok_or_else(|| Status::unavailable("no other node is known"))?;
        let address = self.map.address(node).ok_or_else(|| Status::unavailable("no address is known"))?;
        let request = v1::MetaMapRequest { node: self.own.get(), have_version: self.map.view().version() };
        let mut maps = self.channels.admin(&address)?.meta_map(request).await?.into_inner();
        loop {
            tokio::select! {
                map = maps.message() => match map? {
                    Some(map) => self.map.offer(map),
                    None => return Ok(()),
                },
                () = sleep(RECHECK) => if self.has_meta_state() { return Ok(()) },
            }
        }
    }

    /// Sends the map at once and whenever it changed, until the receiver or the node is gone.
    pub(crate) fn meta_map(
        self: &Arc<Self>,
        request: &v1::MetaMapRequest,
    ) -> tokio::sync::mpsc::Receiver<Result<v1::ClusterMap, Status>> {
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        let (shared, mut have) = (self.clone(), request.have_version);
        let (mut views, mut stop) = (self.map.subscribe(), self.stop.subscribe());
        tokio::spawn(async move {
            loop {
                let view = views.borrow_and_update().clone();
                if view.version() > have {
                    have = view.version();
                    let meta_leader = shared.meta_leader().map_or(0, |node| node.get());
                    let map = v1::ClusterMap { meta_leader, ..view.map().clone() };
                    if !shared.hand_over(&sender, Ok(map)).await {
                        return;
                    }
                }
                tokio::select! {
                    changed = views.changed() => if changed.is_err() { return },
                    () = sender.closed() => return,
                    _ = stop.wait_for(|stop| *stop) => return,
                }
                sleep(COALESCE).await;
            }
        });
        receiver
    }
}

/// Keeps on disk where the other nodes listen, for the next start.
pub(crate) async fn remember_peers(shared: Arc<Shared>, directory: Arc<Directory>) {
    let mut views = shared.map.subscribe();
    let mut stop: watch::Receiver<bool> = shared.stop.subscribe();
    let mut written = v1::ClusterMap::default();
    loop {
        let view = views.borrow_and_update().clone();
        let map = view.map();
        let mut keep =
            v1::ClusterMap { cluster: map.cluster.clone(), nodes: map.nodes.clone(), ..Default::default() };
        keep.shards.extend(view.shard(GroupId::META).cloned());
        if keep != written && !keep.nodes.is_empty() {
            let (directory, content) = (directory.clone(), keep.clone());
            match tokio::task::spawn_blocking(move || directory.write_peers(&content)).await {
                Ok(Ok(())) => written = keep,
                Ok(Err(error)) => warn!(%error, "the peers' addresses were not kept"),
                Err(_) => return,
            }
        }
        tokio::select! {
            changed = views.changed() => if changed.is_err() { return },
            _ = stop.wait_for(|stop| *stop) => return,
        }
        sleep(RECHECK).await;
    }
}
