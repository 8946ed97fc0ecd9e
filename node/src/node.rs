//! Starting and stopping a node.
//!
//! A start goes from the outside in, so that each mistake is found before anything is changed: the address, the
//! directory, the log (which is the lock), the identity, the engine, the runtime, the server. What a first start adds:
//! a founder makes the meta group and registers itself in it; a joiner asks the cluster for its id. Both may crash
//! anywhere and start again ([`crate::directory`]).

use std::{
    fmt, io,
    net::IpAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use dashmap::DashMap;
use pontoon_proto::{
    ClusterId, GroupId, NodeId, ReplicaId,
    v1::{self, meta_command::Body, meta_reply::Body as Answer},
};
use pontoon_raftstore::{Event, Group, GroupSpec, Identity, MultiRaft};
use pontoon_shard::META_PREDICATE;
use pontoon_wal::{Durability, KeyFile, Wal};
use prost::Message;
use tokio::{
    net::TcpListener,
    sync::watch,
    task::JoinHandle,
    time::{sleep, timeout},
};
use tracing::{info, warn};

use crate::{
    announce::announce,
    audit::Audit,
    channels::Channels,
    client::{Client, ClientError},
    config::{NodeConfig, resolve},
    console::Console,
    directory::{Directory, Marker, State},
    engines::{EngineStory, choose_engine, forget_old_engine},
    error::NodeError,
    follow::remember_peers,
    foreground::{Latencies, watch_foreground},
    giving::Backups,
    health::{Health, watch_health},
    join::join,
    machines::NodeMachines,
    map::MapCache,
    meter::Meter,
    profile::Profiles,
    readers::Readers,
    reopen::open_engine,
    seek::{seek_once, seek_until_found},
    server,
    shared::Shared,
    space::{Space, watch_space},
    stats::Counted,
    tls::{Dialer, Door, Tls},
    transport::PeerTransport,
    upgrade::{Upgrade, remember_version, watch_upgrade},
};

/// The id of the node that founds a cluster.
const FIRST: u64 = 1;
/// How many members the meta group grows to, as far as there are nodes; always an odd number.
const META_REPLICAS: u32 = 5;
/// How long a founder waits until its meta group is led.
const FOUND_PATIENCE: Duration = Duration::from_secs(20);
/// How long open calls may take to end at a shutdown.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(2);
const RETRY: Duration = Duration::from_millis(100);

/// A whole node in this process.
///
/// # Examples
/// ```no_run
/// # async fn run() -> Result<(), pontoon_node::NodeError> {
/// use pontoon_node::{Node, NodeConfig};
///
/// let first = Node::start(NodeConfig::new("data/1", "127.0.0.1:7001")).await?;
/// let second = Node::start(NodeConfig::new("data/2", "127.0.0.1:0").joining(first.address())).await?;
/// second.shutdown().await?;
/// first.shutdown().await
/// # }
/// ```
pub struct Node {
    pub(crate) shared: Arc<Shared>,
    server: Option<JoinHandle<Result<(), tonic::transport::Error>>>,
    tasks: Vec<JoinHandle<()>>,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").field("shared", &self.shared).finish_non_exhaustive()
    }
}

impl Node {
    /// Starts a node: the first of a cluster, one that joins, or one that was here before. On return it serves.
    ///
    /// Must be called in a multi-threaded tokio runtime.
    ///
    /// # Errors
    /// Each [`NodeError`] names what is wrong and the next step. Nothing was changed that a repeated start would not
    /// take up again.
    ///
    /// # Cancel safety
    /// Dropping this may leave the directory locked until the process ends.
    pub async fn start(config: NodeConfig) -> Result<Node, NodeError> {
        let tls = match config.tls.clone() {
            Some(files) => Some(blocking(move || Tls::open(files)).await?),
            None => None,
        };
        let listener = bind(&config.listen, tls.is_some()).await?;
        let bound = listener
            .local_addr()
            .map_err(|source| NodeError::Listen { address: config.listen.clone(), source })?;
        if let (Some(address), None) = (&config.advertise, &tls) {
            resolve(address, false).await?;
        }
        let address = advertised(config.advertise.as_ref().unwrap_or(&config.listen), bound.port())?;

        let (directory, marker) = Directory::open(&config.dir)?;
        if let Some(reason) = marker.as_ref().and_then(|marker| config.versions.misses(marker.version())) {
            return Err(NodeError::WrongVersion { path: config.dir.clone(), reason });
        }
        let (engine, usual) = choose_engine(&config, marker.as_ref(), directory.read_wish())?;
        let wal_dir = config.wal_dir.clone().unwrap_or_else(|| directory.wal());
        let mut dirs = vec![config.dir.clone()];
        dirs.extend(wal_dir.parent().filter(|_| config.wal_dir.is_some()).map(Path::to_owned));
        dirs.iter().try_for_each(|dir| {
            std::fs::create_dir_all(dir).map_err(|source| NodeError::Io { path: dir.clone(), source })
        })?;
        let space = Space::new(dirs, config.disk_reserve_bytes)?;
        let wal = open_wal(&config, &wal_dir).await?;
        let stored = Identity::load(&wal)?;
        check_owner(&config.dir, &wal_dir, marker.as_ref(), stored.as_ref())?;

        let marker = match marker {
            Some(marker) => marker,
            None => {
                let state = if config.join.is_some() { State::Joining } else { State::Founding };
                let marker = Marker::new(state, engine.to_string());
                directory.write_marker(&marker)?;
                marker
            }
        };
        let known = v1::ClusterMap { cluster_version: marker.version(), ..directory.read_peers() };
        let map = Arc::new(MapCache::new(known));
        let dialer = Dialer::new(tls.clone());
        let channels = Channels::new(dialer.clone());
        let identity = match (stored, marker.state) {
            (Some(stored), _) if stored.address == address => stored,
            (Some(stored), _) => establish(&wal, stored.cluster, stored.node.get(), &address).await?,
            (None, State::Joining) => {
                let wanted = tls.as_ref().and_then(|tls| tls.subject().node());
                join(&config, &wal, &marker, (engine, wanted), &address, &channels, &map).await?
            }
            (None, _) => {
                let first =
                    NodeId::new(FIRST).map_err(|error| NodeError::Founding { reason: error.to_string() })?;
                tls.iter()
                    .try_for_each(|tls| tls.must_be(first, "as the first node of a cluster is called"))?;
                establish(&wal, ClusterId(marker.nonce), FIRST, &address).await?
            }
        };
        let (cluster, own) = (identity.cluster, identity.node);
        tls.iter().try_for_each(|tls| tls.must_be(own, "which the data directory belongs to"))?;
        let seek = config.join.clone().filter(|join| marker.state == State::Member && *join != address);
        if let Some(join) = &seek {
            // Before the engine: what it lacks is asked of the others.
            seek_once(join, cluster, own, &channels, &map).await;
        }

        let mut story = EngineStory { told: config.engine, problem: None };
        let (engine, shards) =
            match open_engine((engine, config.versions), &directory, &wal, own, &map, &channels).await {
                Ok(shards) => (engine, shards),
                // A wish keeps no node from starting.
                Err(error @ NodeError::EngineLost { .. }) if usual != engine => {
                    warn!(wish = %engine, %error, "the engine is not changed");
                    story.problem = Some(error.to_string());
                    (
                        usual,
                        open_engine((usual, config.versions), &directory, &wal, own, &map, &channels).await?,
                    )
                }
                Err(error) => return Err(error),
            };
        if directory.read_wish() == Some(engine) {
            directory.write_wish(None)?;
        }
        let directory = Arc::new(directory);
        let machines = Arc::new(NodeMachines::new(shards, config.machines.clone()));
        let transport = Arc::new(PeerTransport::new(own, config.versions, map.clone(), dialer));
        let raft_config = pontoon_raftstore::Config {
            seed: wal.incarnation(),
            urgent_group: Some(GroupId::META),
            vouching_group: Some(GroupId::META),
            ..config.raft.clone()
        };
        let raft = blocking({
            let (wal, machines, transport) = (wal.clone(), machines.clone(), transport.clone());
            move || MultiRaft::open(raft_config, wal, identity, machines, transport)
        })
        .await?;
        transport.attach(raft.clone());

        let shared = Arc::new(Shared {
            cluster,
            own,
            address: address.clone(),
            engine,
            versions: config.versions,
            founding: AtomicBool::new(matches!(marker.state, State::Founding)),
            upgrade: Upgrade::new(config.upgrade_patience),
            wal,
            raft,
            machines,
            map,
            channels,
            transport,
            space,
            readers: Readers::default(),
            foreground: Latencies::default(),
            meter: Meter::default(),
            console: Console::default(),
            counted: Counted::default(),
            backups: Backups::new(),
            budget: config.raft.snapshots,
            directory: directory.clone(),
            story,
            health: Health::default(),
            top_groups: config.top_groups,
            settings: config.settings.clone(),
            tls: tls.clone(),
            audit: blocking({
                let dir = config.dir.clone();
                move || Ok::<_, NodeError>(Audit::open(dir, own))
            })
            .await?,
            turned_away: Arc::default(),
            profiles: Profiles::new(config.heap.clone()),
            slow_reader: config.slow_reader,
            creating: DashMap::new(),
            plans: Default::default(),
            stop: watch::Sender::new(false),
            started: Instant::now(),
            driver_term: AtomicU64::new(0),
            turns: AtomicUsize::new(0),
        });
        let door = Door::new(tls.clone(), shared.turned_away.clone(), config.max_connections);
        let server = tokio::spawn(server::serve(shared.clone(), door.open(listener), tls.is_some()));
        let mut tasks = vec![
            tokio::spawn(forget_old_engine(shared.clone())),
            tokio::spawn(shared.transport.clone().greet_all()),
            tokio::spawn(shared.clone().follow_own_meta()),
            tokio::spawn(shared.clone().follow_others()),
            tokio::spawn(remember_peers(shared.clone(), directory.clone())),
            tokio::spawn(shared.clone().found_own_replicas()),
            tokio::spawn(shared.clone().reconcile()),
            tokio::spawn(watch_space(shared.clone())),
            tokio::spawn(watch_foreground(shared.clone())),
            tokio::spawn(watch_health(shared.clone())),
            tokio::spawn(watch_upgrade(shared.clone())),
            tokio::spawn(shared.clone().heed_map(config.raft.snapshots)),
            tokio::spawn(follow_leaders(shared.clone())),
        ];
        tasks.extend(tls.map(|tls| tokio::spawn(tls.watch(shared.stop.subscribe()))));
        let mut node = Node { shared, server: Some(server), tasks };
        match marker.state {
            State::Founding => {
                if let Err(error) = node.found(&marker, &config).await {
                    drop(node.shutdown().await);
                    return Err(error);
                }
            }
            State::Joining | State::Member => {}
        }
        if let Some(join) = seek {
            tokio::spawn(seek_until_found(node.shared.clone(), join));
        }
        tokio::spawn(announce(node.shared.clone(), config.labels.clone(), config.capacity_bytes));
        let member = Marker { engine: engine.to_string(), ..marker.member(cluster, own) };
        if member != marker {
            directory.write_marker(&member)?;
        }
        node.tasks.push(tokio::spawn(remember_version(node.shared.clone(), directory, member)));
        info!(node = %own, %cluster, address, engine = %engine, "serving");
        Ok(node)
    }

    /// Where the node listens.
    pub fn address(&self) -> &str {
        &self.shared.address
    }

    /// The node's id.
    pub fn id(&self) -> NodeId {
        self.shared.own
    }

    /// The cluster that the node belongs to.
    pub fn cluster(&self) -> ClusterId {
        self.shared.cluster
    }

    /// The runtime, for embedders that propose to groups of their own kinds.
    pub fn raft(&self) -> &MultiRaft {
        &self.shared.raft
    }

    /// This node's replica of a predicate's group; `None` if none is here.
    pub fn group(&self, predicate: &str) -> Option<Group> {
        let view = self.shared.map.view();
        self.shared.raft.group(GroupId(view.predicate(predicate)?.group))
    }

    /// A client of the cluster that asks this node first: reads that need not see the latest
    /// ([`crate::client::Client::with_reads`]) are answered by the replicas here.
    ///
    /// # Errors
    /// [`ClientError::NobodyAnswers`] if the node is shutting down.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn client(&self) -> Result<Client, ClientError> {
        Client::through([self.address()], self.shared.channels.dialer()).await
    }

    /// The nodes of the cluster that are not removed, this one included: id and address, as this node has heard them.
    ///
    /// A node joins by [`NodeConfig::joining`]. It leaves for good by giving its replicas up
    /// ([`crate::client::Client::leave`] for each predicate), a [`Node::shutdown`], and `decommission` at any other node.
    /// Who serves one predicate is told by [`crate::client::Client::servers`].
    pub fn servers(&self) -> Vec<(NodeId, String)> {
        let view = self.shared.map.view();
        let present = view.present().filter_map(|node| NodeId::new(node.id).ok());
        present.map(|node| (node, self.shared.map.address(node).unwrap_or_default())).collect()
    }

    /// Waits until this node has no business to go on, and says why with the next step: its log or its engine failed, or the
    /// cluster knows a later disk of it or has removed it. Pending for ever while all is well. The caller shuts the node
    /// down.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn failed(&self) -> String {
        tokio::select! {
            reason = self.disk_failed() => reason,
            reason = self.shared.transport.copied() => reason,
            reason = self.shared.overtaken() => reason,
            reason = self.removed() => reason,
            reason = self.shared.left_behind() => reason,
        }
    }

    async fn removed(&self) -> String {
        let own = self.shared.own;
        let mut views = self.shared.map.subscribe();
        let removed =
            views.wait_for(|view| view.node(own).is_some_and(|node| node.state() == v1::NodeState::Removed));
        match removed.await {
            Ok(_) => format!(
                "{own} was removed from the cluster, for ever: move this directory away and join as a new node"
            ),
            Err(_) => std::future::pending().await,
        }
    }

    async fn disk_failed(&self) -> String {
        let mut events = self.shared.raft.events();
        loop {
            match events.recv().await {
                Ok(Event::LogFailed { reason }) => return self.with_next_step("log", &reason),
                Ok(Event::EngineFailed { reason }) => return self.with_next_step("engine", &reason),
                Ok(_) | Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => {}
                Err(tokio::sync::broadcast::error::RecvError::Closed) => {
                    return "the runtime stopped".to_owned();
                }
            }
        }
    }

    fn with_next_step(&self, what: &str, reason: &str) -> String {
        let disk = self.shared.space.seen().disk;
        // A write that fails for lack of room gives back what it had taken: there may be plenty again by now.
        let step = match disk.is_nearly_full() {
            true => "free some space",
            false => "check the disk, or free some space if it was full",
        };
        format!(
            "the {what} failed: {reason} ({} MiB are free on the disk); {step}, then start the node again: what it \
             acknowledged is in its log",
            disk.free >> 20
        )
    }

    /// Stops serving, flushes, and closes engine and log. Acknowledged writes are durable with or without this.
    ///
    /// # Errors
    /// What failed last while closing; everything is stopped nonetheless.
    pub async fn shutdown(mut self) -> Result<(), NodeError> {
        self.shared.stop.send_replace(true);
        self.shared.transport.stop();
        if let Some(mut server) = self.server.take()
            && timeout(SHUTDOWN_PATIENCE, &mut server).await.is_err()
        {
            server.abort();
            drop(server.await);
        }
        for task in self.tasks.drain(..) {
            task.abort();
            drop(task.await);
        }
        let shared = self.shared.clone();
        drop(self);
        let (raft, machines, wal) = (shared.raft.clone(), shared.machines.clone(), shared.wal.clone());
        drop(shared);
        blocking(move || {
            raft.shutdown();
            machines.shards().close()?;
            wal.close()?;
            Ok::<(), NodeError>(())
        })
        .await
    }

    /// Makes the meta group with this node as its only voter and registers it there. Repeatable.
    async fn found(&self, marker: &Marker, config: &NodeConfig) -> Result<(), NodeError> {
        let replica = ReplicaId::on(self.shared.own, 1);
        let descriptor = v1::Shard {
            predicate: META_PREDICATE.to_owned(),
            group: GroupId::META.0,
            epoch: 1,
            kind: v1::ShardKind::Meta.into(),
            replicas_wanted: META_REPLICAS,
            initial: vec![replica.get()],
            ..Default::default()
        };
        let spec = GroupSpec {
            group: GroupId::META,
            replica,
            descriptor: descriptor.encode_to_vec().into(),
            epoch: 1,
            initial: Some(v1::ConfState { voters: vec![replica.get()], ..Default::default() }),
        };
        let group = self.shared.raft.create_group(spec).await?;
        let bootstrap = v1::BootstrapCluster {
            cluster: self.shared.cluster.as_bytes().to_vec().into(),
            node: Some(v1::RegisterNode {
                address: self.shared.address.clone(),
                engine: self.shared.engine.to_string(),
                boot_token: self.shared.wal.incarnation(),
                nonce: marker.nonce.as_bytes().to_vec().into(),
                labels: config.labels.clone(),
                capacity_bytes: config.capacity_bytes,
                ..Default::default()
            }),
            meta_replicas: META_REPLICAS,
        };
        let mut reason = String::new();
        for _ in 0..(FOUND_PATIENCE.as_millis() / RETRY.as_millis()) {
            if let Err(rejected) = group.wait_for_leader().await {
                reason = rejected.to_string();
            } else {
                match self.shared.meta_command(Body::Bootstrap(bootstrap.clone())).await {
                    Ok(reply) => match reply.body {
                        Some(Answer::Refused(refused))
                            if refused.reason() != v1::MetaRefusal::Bootstrapped =>
                        {
                            return Err(NodeError::Founding { reason: refused.text });
                        }
                        _ => break,
                    },
                    Err(status) => reason = status.message().to_owned(),
                }
            }
            sleep(RETRY).await;
        }
        let mut views = self.shared.map.subscribe();
        match timeout(FOUND_PATIENCE, views.wait_for(|view| view.version() > 0)).await {
            Ok(Ok(_)) => {}
            _ => return Err(NodeError::Founding { reason }),
        }
        self.shared.begin_at_newest().await;
        self.shared.founding.store(false, Ordering::Release);
        Ok(())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.shared.stop.send_replace(true);
        self.shared.transport.stop();
    }
}

/// Runs what blocks away from the network's threads.
pub(crate) async fn blocking<T, E>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, NodeError>
where
    T: Send + 'static,
    E: Send + 'static,
    NodeError: From<E>,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(result?),
        Err(failure) => match failure.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(failure) => Err(NodeError::Serve(failure.to_string())),
        },
    }
}

async fn bind(address: &str, tls: bool) -> Result<TcpListener, NodeError> {
    let resolved = resolve(address, tls).await?;
    TcpListener::bind(&*resolved).await.map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => NodeError::PortInUse { address: address.to_owned() },
        _ => NodeError::Listen { address: address.to_owned(), source },
    })
}

/// The address as others are told it: the host as it was given, the port too unless it is 0, which stands for the one that was
/// bound.
fn advertised(given: &str, bound: u16) -> Result<String, NodeError> {
    let (host, port) = given.rsplit_once(':').unwrap_or((given, "0"));
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    if bare.parse::<IpAddr>().is_ok_and(|address| address.is_unspecified()) {
        return Err(NodeError::Advertise { address: given.to_owned() });
    }
    match port.parse() {
        Ok(0) => Ok(format!("{host}:{bound}")),
        Ok(port @ 1..=u16::MAX) => Ok(format!("{host}:{port}")),
        Err(_) => Err(NodeError::Advertise { address: given.to_owned() }),
    }
}

async fn open_wal(config: &NodeConfig, path: &Path) -> Result<Wal, NodeError> {
    let mut options = pontoon_wal::Options::new(path);
    if let Some(segment_bytes) = config.segment_bytes {
        options.segment_bytes = segment_bytes;
    }
    if let Some(path) = &config.wal_keys {
        let path = path.clone();
        let keys = blocking(move || KeyFile::open(path)).await?;
        options.keys = Some(Arc::new(keys));
    }
    if !config.durable {
        options.durability = Durability::System;
    }
    let (wal, report) = blocking(move || Wal::open(options)).await?;
    let (path, damaged) = (path.display(), report.damaged.len());
    info!(%path, segments = report.segments, records = report.records, torn = ?report.torn, "the log is open");
    if report.lost_frames > 0 || damaged > 0 {
        let (lost_frames, groups) = (report.lost_frames, report.damaged_groups.keys());
        warn!(%path, lost_frames, damaged, ?groups, "the log has lost something: `pontoon wal verify` says what");
    }
    Ok(wal)
}

/// Checks that marker and log speak of the same node.
fn check_owner(
    dir: &Path,
    wal: &Path,
    marker: Option<&Marker>,
    stored: Option<&Identity>,
) -> Result<(), NodeError> {
    let name = |cluster: ClusterId, node: NodeId| format!("node {node} of cluster {cluster}");
    let owner = stored.map(|identity| name(identity.cluster, identity.node));
    let foreign = |path: &Path, found: String, expected: String| {
        Err(NodeError::ForeignDirectory { path: path.to_owned(), found, expected })
    };
    match (marker, owner) {
        (None, Some(found)) => foreign(wal, found, "a new node".to_owned()),
        (Some(Marker { cluster: Some(cluster), node: Some(node), .. }), owner) => {
            let node = NodeId::new(*node).map_err(|error| NodeError::ForeignDirectory {
                path: dir.to_owned(),
                found: error.to_string(),
                expected: "a node".to_owned(),
            })?;
            let expected = name(ClusterId(*cluster), node);
            match owner {
                Some(found) if found == expected => Ok(()),
                Some(found) => foreign(wal, found, expected),
                None => foreign(wal, "nobody (it is empty)".to_owned(), expected),
            }
        }
        _ => Ok(()),
    }
}

pub(crate) async fn establish(
    wal: &Wal,
    cluster: ClusterId,
    node: u64,
    address: &str,
) -> Result<Identity, NodeError> {
    let node = NodeId::new(node).map_err(|error| NodeError::Founding { reason: error.to_string() })?;
    let (wal, address) = (wal.clone(), address.to_owned());
    blocking(move || Identity::establish(&wal, cluster, node, &address)).await
}

/// Keeps the map told of leaders; the runtime logs its events itself.
async fn follow_leaders(shared: Arc<Shared>) {
    use tokio::sync::broadcast::error::RecvError;
    let mut events = shared.raft.events();
    loop {
        match events.recv().await {
            Ok(Event::LeaderChanged { group, leader, .. }) => shared.map.set_leader(group, leader.node()),
            Ok(_) | Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_are_told_the_host_as_given_and_the_port_as_bound() {
        let told = |given: &str, bound| advertised(given, bound).unwrap();
        assert_eq!(told("127.0.0.1:0", 7001), "127.0.0.1:7001");
        assert_eq!(told("[::1]:0", 7001), "[::1]:7001");
        assert_eq!(told("localhost:7000", 7000), "localhost:7000");
        assert_eq!(told("db1.example.com:80", 7000), "db1.example.com:80");
        for nowhere in ["0.0.0.0:7000", "[::]:0", "host:http"] {
            assert!(matches!(advertised(nowhere, 7000), Err(NodeError::Advertise { .. })), "{nowhere}");
        }
    }
}
