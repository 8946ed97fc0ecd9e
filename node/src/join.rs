//! How a node becomes a member of a cluster: it asks for an id, as often as it takes.

use std::time::{Duration, Instant};

use pontoon_proto::{ClusterId, NodeId, v1};
use pontoon_raftstore::Identity;
use pontoon_shard::EngineKind;
use pontoon_wal::Wal;
use tokio::time::{sleep, timeout};
use tonic::{Code, Status};

use crate::{
    channels::Channels,
    config::NodeConfig,
    directory::Marker,
    error::NodeError,
    map::MapCache,
    node::{blocking, establish},
};

/// How long a joiner tries to reach the node that it was told of.
const REACH_PATIENCE: Duration = Duration::from_secs(10);
/// How long a joiner waits for a cluster that answers but has no leader yet.
const JOIN_PATIENCE: Duration = Duration::from_secs(20);
const RETRY: Duration = Duration::from_millis(100);

/// Asks the cluster for an id: the one in the node's certificate, if it has one. The answer is the same however often it is asked with this directory's nonce.
pub(crate) async fn join(
    config: &NodeConfig,
    wal: &Wal,
    marker: &Marker,
    (engine, wanted): (EngineKind, Option<NodeId>),
    own_address: &str,
    channels: &Channels,
    map: &MapCache,
) -> Result<Identity, NodeError> {
    let Some(address) = config.join.clone() else {
        return Err(NodeError::JoinRefused {
            address: "?".to_owned(),
            reason: "this directory began to join a cluster; start it with --join again".to_owned(),
        });
    };
    // What the cluster will remember must be in the history, also if this process ends before it knows who it is.
    let noted = wal.clone();
    blocking(move || Identity::note_boot(&noted)).await?;
    let request = v1::JoinRequest {
        address: own_address.to_owned(),
        engine: engine.to_string(),
        labels: config.labels.clone(),
        capacity_bytes: config.capacity_bytes,
        nonce: marker.nonce.as_bytes().to_vec().into(),
        boot_token: wal.incarnation(),
        hops: 0,
        replace: config.replace.map_or(0, NodeId::get),
        wanted: wanted.map_or(0, NodeId::get),
        oldest_version: config.versions.oldest,
        newest_version: config.versions.newest,
    };
    let reply = ask_to_join(&address, request, channels).await?;
    let refused = |reason: String| NodeError::JoinRefused { address: address.clone(), reason };
    let cluster = ClusterId::from_slice(&reply.cluster).map_err(|error| refused(error.to_string()))?;
    let told = reply.map.unwrap_or_default();
    // A leader that knows of no versions takes everybody in.
    if let Some(reason) = config.versions.misses(told.cluster_version.max(1)) {
        return Err(refused(reason));
    }
    map.offer(told);
    establish(wal, cluster, reply.node, own_address).await
}

async fn ask_to_join(
    address: &str,
    request: v1::JoinRequest,
    channels: &Channels,
) -> Result<v1::JoinReply, NodeError> {
    let started = Instant::now();
    loop {
        let status = match channels.admin(address) {
            Ok(mut client) => match timeout(JOIN_PATIENCE, client.join(request.clone())).await {
                Ok(Ok(reply)) => return Ok(reply.into_inner()),
                Ok(Err(status)) => status,
                Err(_) => Status::deadline_exceeded("no answer"),
            },
            Err(status) => status,
        };
        // A connection that was never made has a source; an answer from the other side has none.
        let unreachable = status.code() == Code::Unavailable && std::error::Error::source(&status).is_some();
        let patience = if unreachable { REACH_PATIENCE } else { JOIN_PATIENCE };
        let retry = matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Unknown);
        if !retry || started.elapsed() >= patience {
            let (address, reason) = (address.to_owned(), status.message().to_owned());
            return Err(match unreachable {
                true => NodeError::NobodyAnswers { address, reason },
                false => NodeError::JoinRefused { address, reason },
            });
        }
        sleep(RETRY).await;
    }
}
