//! When all addresses of a cluster have changed at once, nobody knows anybody: whoever is started with `--join` asks there who it is.
//! Its greeting then tells the other side where it is itself.

use std::{sync::Arc, time::Duration};

use pontoon_proto::{ClusterId, NodeId, v1};
use tokio::time::{sleep, timeout};

use crate::{channels::Channels, map::MapCache, shared::Shared};

const ANSWER: Duration = Duration::from_secs(2);
const RETRY: Duration = Duration::from_millis(250);

/// Asks the node at an address who it is, and keeps its address if it belongs to the cluster; whether it did.
pub(crate) async fn seek_once(
    address: &str,
    cluster: ClusterId,
    own: NodeId,
    channels: &Channels,
    map: &MapCache,
) -> bool {
    let Ok(mut admin) = channels.admin(address) else { return false };
    let Ok(Ok(reply)) = timeout(ANSWER, admin.status(v1::StatusRequest {})).await else { return false };
    let reply = reply.into_inner();
    match NodeId::new(reply.node) {
        Ok(node) if reply.cluster == cluster.as_bytes().as_slice() && node != own => {
            map.heard_from(node, &reply.address);
            true
        }
        _ => false,
    }
}

/// The same until somebody has answered, or this node has been heard, or it stops.
pub(crate) async fn seek_until_found(shared: Arc<Shared>, address: String) {
    let mut stop = shared.stop.subscribe();
    let seeking = async {
        while !shared.reaches_anybody()
            && !seek_once(&address, shared.cluster, shared.own, &shared.channels, &shared.map).await
        {
            sleep(RETRY).await;
        }
    };
    tokio::select! {
        () = seeking => {}
        _ = stop.wait_for(|stop| *stop) => {}
    }
}

impl Shared {
    fn reaches_anybody(&self) -> bool {
        let view = self.map.view();
        let mut others = view.present().filter_map(|node| NodeId::new(node.id).ok());
        others.any(|node| node != self.own && self.transport.reaches(node))
    }
}
