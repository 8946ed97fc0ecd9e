//! What a node is started with.

use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use pontoon_proto::{GroupId, NodeId, v1};
use pontoon_raftstore::{MachineError, StateMachine};
use pontoon_shard::{EngineKind, Versions};

use crate::{
    error::NodeError,
    limits::{CONNECTIONS_DEFAULT, SLOW_READER},
    settings::InForce,
    tls::TlsFiles,
};

/// Shard kinds from here on belong to the embedder: [`MachineExtension`] opens their machines.
pub const OWN_KINDS_FROM: i32 = 1000;

/// A rolling upgrade is done by then.
const UPGRADE_PATIENCE: Duration = Duration::from_secs(24 * 3600);

/// So many groups have metrics of their own unless the operator says otherwise.
const TOP_GROUPS: usize = 10;

/// How a node runs. [`NodeConfig::new`] gives the defaults of `pontoon node`.
#[derive(Clone)]
#[non_exhaustive]
pub struct NodeConfig {
    /// The data directory. Made if it is missing; must be empty at the first start.
    pub dir: PathBuf,
    /// HOST:PORT to listen on. Port 0 takes a free one. Loopback only, unless there is [`NodeConfig::tls`].
    pub listen: String,
    /// HOST:PORT that others reach the node by. `None`: the host of `listen` and the port that was bound, for which port 0 stands here, too.
    /// Loopback only, unless there is [`NodeConfig::tls`].
    pub advertise: Option<String>,
    /// The node's certificate; without one only this machine may talk to it, and whoever does may do everything.
    pub tls: Option<TlsFiles>,
    /// How many connections there may be at once. With TLS an eighth of them is for nodes and operators alone.
    pub max_connections: usize,
    /// How long the reader of a stream may take nothing of what waits for it.
    pub(crate) slow_reader: Duration,
    /// Any node of the cluster to join. At the first start `None` founds a cluster; later this one is asked where it is, should
    /// all addresses have changed.
    pub join: Option<String>,
    /// The engine; `None` takes the directory's, or fjall for a new one.
    pub engine: Option<EngineKind>,
    /// Where the shared log lies, if not in `dir/wal`.
    pub wal_dir: Option<PathBuf>,
    /// The key file with which the shared log is encrypted; `None` for a plain log. Only the log is: what the engine holds and
    /// what snapshots stage is not.
    pub wal_keys: Option<PathBuf>,
    /// The node that this one takes the place of. Only read at the first start.
    pub replace: Option<NodeId>,
    /// For placement: zone, rack, host.
    pub labels: BTreeMap<String, String>,
    /// What the node may hold, in bytes; 0 is not limited.
    pub capacity_bytes: u64,
    /// How long nodes may differ in the versions that they speak, or leave one unfinalised that all speak, until that is told as a
    /// problem.
    pub upgrade_patience: Duration,
    /// Bytes of disk to keep free: below that no writes are taken. `None`: 512 MiB, or a tenth of a disk smaller than 5 GiB.
    pub disk_reserve_bytes: Option<u64>,
    /// The runtime's threads and clocks.
    pub raft: pontoon_raftstore::Config,
    /// The size of a segment of the log; `None` takes the log's default.
    pub segment_bytes: Option<u64>,
    /// How many groups, the busiest, have metrics of their own.
    pub top_groups: usize,
    /// What the process was configured with, for whoever diagnoses it.
    pub settings: Vec<InForce>,
    /// Whether acknowledged writes survive a loss of power. False only for tests and caches.
    pub durable: bool,
    /// The cluster versions that the node speaks. Fewer than [`Versions::OURS`] only for tests: the node plays an older binary.
    pub versions: Versions,
    /// Opens the machines of the embedder's own shard kinds.
    pub machines: Option<Arc<dyn MachineExtension>>,
    /// What profiles the heap, for `pontoon debug profile --heap`: only who sets the program's allocator knows how.
    pub heap: Option<Arc<dyn HeapProfiler>>,
}

/// The profiler of the program's allocator.
///
/// It is started and stopped in turn, by one caller at a time. Every method may block.
pub trait HeapProfiler: Send + Sync {
    /// Begins to record who allocates, from nothing.
    ///
    /// # Errors
    /// Why it cannot, with the next step.
    fn start(&self) -> Result<(), String>;

    /// What was recorded since the start, as jemalloc writes it (`heap_v2/…`).
    ///
    /// # Errors
    /// Local trouble, in words.
    fn dump(&self) -> Result<String, String>;

    /// Stops to record and forgets what was recorded. Also called after a start that failed.
    fn stop(&self);

    /// What the whole process holds.
    fn usage(&self) -> HeapUsage;
}

/// What a process holds of memory, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HeapUsage {
    /// What the program has allocated and not freed.
    pub allocated: u64,
    /// The pages that this lies on.
    pub active: u64,
    /// The pages that are in memory for the allocator, its own included.
    pub resident: u64,
    /// Address space that is kept for later, and takes no memory.
    pub retained: u64,
}

/// Opens state machines of the embedder's own kinds ([`OWN_KINDS_FROM`] and above).
///
/// A predicate of such a kind is created by `CreatePredicate` with that kind, placed, replicated and moved as any
/// other; its commands are proposed through [`crate::Node::group`].
pub trait MachineExtension: Send + Sync {
    /// Opens the machine of a group. `shard.kind` says which kind.
    ///
    /// # Errors
    /// What the replica is stopped with: an unknown kind, or local trouble.
    fn open(&self, group: GroupId, shard: &v1::Shard) -> Result<Box<dyn StateMachine>, MachineError>;

    /// Makes durable everything that these machines committed before the call.
    ///
    /// # Errors
    /// Local trouble; after one, success must not be reported again.
    fn flush(&self) -> Result<(), MachineError>;
}

impl fmt::Debug for NodeConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeConfig")
            .field("dir", &self.dir)
            .field("listen", &self.listen)
            .field("join", &self.join)
            .finish_non_exhaustive()
    }
}

impl NodeConfig {
    /// A node with its data in `dir` that listens on `listen` and founds a cluster.
    pub fn new(dir: impl AsRef<Path>, listen: impl Into<String>) -> Self {
        NodeConfig {
            dir: dir.as_ref().to_owned(),
            listen: listen.into(),
            advertise: None,
            tls: None,
            max_connections: CONNECTIONS_DEFAULT,
            slow_reader: SLOW_READER,
            join: None,
            engine: None,
            wal_dir: None,
            wal_keys: None,
            replace: None,
            labels: BTreeMap::new(),
            capacity_bytes: 0,
            disk_reserve_bytes: None,
            raft: pontoon_raftstore::Config::default(),
            segment_bytes: None,
            top_groups: TOP_GROUPS,
            settings: Vec::new(),
            durable: true,
            versions: Versions::OURS,
            upgrade_patience: UPGRADE_PATIENCE,
            machines: None,
            heap: None,
        }
    }

    /// The same, joining the cluster that the node at `address` belongs to.
    #[must_use]
    pub fn joining(mut self, address: impl Into<String>) -> Self {
        self.join = Some(address.into());
        self
    }
}

/// Resolves a listen address. Without TLS all of its meanings must be loopback.
pub(crate) async fn resolve(address: &str, tls: bool) -> Result<Vec<SocketAddr>, NodeError> {
    let resolved: Vec<SocketAddr> = tokio::net::lookup_host(address)
        .await
        .map_err(|source| NodeError::Resolve { address: address.to_owned(), source })?
        .collect();
    match resolved.iter().find(|resolved| !tls && !resolved.ip().is_loopback()) {
        Some(&resolved) => Err(NodeError::NotLoopback { address: address.to_owned(), resolved }),
        None => Ok(resolved),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn without_tls_only_loopback_is_listened_on() {
        assert!(resolve("127.0.0.1:0", false).await.is_ok());
        assert!(resolve("[::1]:0", false).await.is_ok());
        let error = resolve("0.0.0.0:7000", false).await.unwrap_err();
        assert!(resolve("0.0.0.0:7000", true).await.is_ok());
        assert!(error.to_string().contains("0.0.0.0:7000"), "{error}");
        assert!(matches!(resolve("nowhere", true).await, Err(NodeError::Resolve { .. })));
    }
}
