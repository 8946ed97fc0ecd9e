//! A node tells the meta group where it listens and which boots of its log there were, and hears whether it is itself.
//!
//! Until that is answered, replicas here promise something only where every other voter of their group has greeted this node
//! ([`pontoon_raftstore::Config::vouching_group`]). A node that is refused has no business to go on: it would only wait for
//! promises that nobody takes from it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use pontoon_proto::v1;
use tokio::time::{Instant, sleep, timeout};
use tonic::Code;
use tracing::{info, warn};

use crate::{shared::Shared, transport::COPIED_PATIENCE};

/// How long a node whose address was refused listens to another's map.
const LISTEN: Duration = Duration::from_secs(1);
const LISTENED_TO: usize = 5;
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_MOST: Duration = Duration::from_secs(1);

/// Asks until it is heard, or the node stops.
pub(crate) async fn announce(shared: Arc<Shared>, labels: BTreeMap<String, String>, capacity_bytes: u64) {
    let mut stop = shared.stop.subscribe();
    tokio::select! {
        () = shared.announce_until_heard(labels, capacity_bytes) => {}
        _ = stop.wait_for(|stop| *stop) => {}
    }
}

impl Shared {
    async fn announce_until_heard(self: &Arc<Self>, labels: BTreeMap<String, String>, capacity_bytes: u64) {
        let identity = self.raft.identity();
        let request = v1::AnnounceRequest {
            node: self.own.get(),
            address: self.address.clone(),
            boot_token: identity.boot_token(),
            hops: 0,
            boot_history: identity.hello().boot_history,
            labels,
            capacity_bytes,
            engine: self.engine.to_string(),
            oldest_version: self.versions.oldest,
            newest_version: self.versions.newest,
        };
        let mut pause = RETRY_FIRST;
        let mut copied_since = None;
        loop {
            match self.at_meta_leader(request.clone()).await {
                Ok(v1::AnnounceReply { copied, .. }) if copied.is_empty() => {
                    info!("the meta group vouches for this node");
                    return self.raft.vouched();
                }
                Ok(v1::AnnounceReply { copied, perhaps }) => {
                    let since = *copied_since.get_or_insert_with(Instant::now);
                    warn!(reason = copied, "the meta group does not vouch for this node");
                    if !perhaps || since.elapsed() >= COPIED_PATIENCE {
                        self.transport.is_copied(copied);
                        return;
                    }
                }
                Err(status) if status.code() == Code::Unavailable => {}
                Err(status) => {
                    warn!(reason = status.message(), "the cluster did not take this node's address");
                    // The map of another says why, above all that this node was removed: a replica of the meta group
                    // here may have been left behind.
                    // Who is asked may be down; the next one then.
                    for _ in 0..LISTENED_TO {
                        match timeout(LISTEN, self.listen()).await {
                            Ok(Err(_)) => {}
                            _ => break,
                        }
                    }
                }
            }
            sleep(pause).await;
            pause = (pause * 2).min(RETRY_MOST);
        }
    }

    /// Waits until the meta group remembers a boot of this node that its directory has never seen, and says so: another process
    /// runs from a copy of it, and was vouched for.
    pub(crate) async fn overtaken(&self) -> String {
        let (own, identity) = (self.own, self.raft.identity());
        let mut views = self.map.subscribe();
        let overtaken = views.wait_for(|view| {
            view.node(own).is_some_and(|node| node.boot_token != 0 && !identity.knows_boot(node.boot_token))
        });
        let Ok(view) = overtaken.await else { return std::future::pending().await };
        let address = view.node(own).map(|node| node.address.clone()).unwrap_or_default();
        format!(
            "the cluster knows {own} at {address} by a later or other disk; this one is a copy or an old image: start the node \
             with its own directory, or decommission it and join a fresh one with --replace {own}"
        )
    }
}
