//! What the services and tasks of one node share.

use std::{
    collections::VecDeque,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use dashmap::DashMap;
use pontoon_proto::{ClusterId, GroupId, NodeId, v1};
use pontoon_raftstore::{MultiRaft, Role, SnapshotBudget};
use pontoon_shard::{EngineKind, Versions};
use pontoon_wal::Wal;
use tokio::{
    sync::{Mutex, mpsc, watch},
    time::timeout,
};
use tonic::Status;

use crate::{
    audit::Audit,
    channels::Channels,
    console::Console,
    directory::Directory,
    engines::EngineStory,
    foreground::Latencies,
    giving::Backups,
    health::{Code, Health, Serves},
    machines::NodeMachines,
    map::MapCache,
    meter::Meter,
    profile::Profiles,
    readers::Readers,
    settings::InForce,
    space::Space,
    stats::Counted,
    tls::Tls,
    transport::PeerTransport,
    turned_away::{TurnedAway, Why},
    upgrade::Upgrade,
};

/// A running node, without its server.
pub(crate) struct Shared {
    pub(crate) cluster: ClusterId,
    pub(crate) own: NodeId,
    pub(crate) address: String,
    pub(crate) engine: EngineKind,
    /// The cluster versions that this binary speaks.
    pub(crate) versions: Versions,
    /// The cluster begins here and has not got its version yet: nobody else may join.
    pub(crate) founding: AtomicBool,
    /// How the upgrade stands, as the leader of the meta group sees it.
    pub(crate) upgrade: Upgrade,
    pub(crate) wal: Wal,
    pub(crate) raft: MultiRaft,
    pub(crate) machines: Arc<NodeMachines>,
    pub(crate) map: Arc<MapCache>,
    pub(crate) channels: Channels,
    pub(crate) transport: Arc<PeerTransport>,
    pub(crate) space: Space,
    pub(crate) readers: Readers,
    /// What clients wait for when they write here.
    pub(crate) foreground: Latencies,
    /// How much is asked of each group here.
    pub(crate) meter: Meter,
    /// What the console of this node shows.
    pub(crate) console: Console,
    /// What is counted here for whoever looks.
    pub(crate) counted: Counted,
    /// What backups take.
    pub(crate) backups: Backups,
    /// What the node was told that copies may take of it.
    pub(crate) budget: SnapshotBudget,
    pub(crate) directory: Arc<Directory>,
    /// How it came to its engine.
    pub(crate) story: EngineStory,
    /// What is wrong here.
    pub(crate) health: Health,
    pub(crate) top_groups: usize,
    pub(crate) settings: Vec<InForce>,
    /// Its certificates, if it has some.
    pub(crate) tls: Option<Arc<Tls>>,
    /// Who changed what by way of this node.
    pub(crate) audit: Audit,
    /// What was refused at the port.
    pub(crate) turned_away: Arc<TurnedAway>,
    /// Who profiles this node at the moment.
    pub(crate) profiles: Profiles,
    /// How long the reader of a stream may take nothing of what waits for it.
    pub(crate) slow_reader: Duration,
    /// Predicates that are being created on behalf of a first write.
    pub(crate) creating: DashMap<String, Arc<Mutex<()>>>,
    /// Plans of moves that this node has made as the leader of the meta group, the latest last.
    pub(crate) plans: std::sync::Mutex<VecDeque<v1::Plan>>,
    pub(crate) stop: watch::Sender<bool>,
    pub(crate) started: Instant,
    /// The highest meta term that a driver showed: an older driver's late calls are refused.
    pub(crate) driver_term: AtomicU64,
    pub(crate) turns: AtomicUsize,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("own", &self.own)
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// A number that rises with each call.
    pub(crate) fn turn(&self) -> usize {
        self.turns.fetch_add(1, Ordering::Relaxed)
    }

    /// A write of so many bytes that is led here was answered.
    pub(crate) fn wrote(&self, group: GroupId, bytes: usize, took: Duration) {
        self.foreground.note(took);
        self.counted.writes.note(took);
        self.meter.wrote(group, bytes);
    }

    /// A read was answered here.
    pub(crate) fn read(&self, group: GroupId, took: Duration) {
        self.counted.reads.note(took);
        self.meter.read(group);
    }

    /// Why the node does not serve clients as it should; `None` if it does.
    pub(crate) fn not_ready(&self) -> Option<String> {
        if *self.stop.borrow() {
            return Some(format!("{}: the node is shutting down", Code::Stopping.word()));
        }
        let problems = self.health.problems();
        let stops = problems.iter().find(|problem| problem.code.stops().contains(&Serves::Data));
        stops.map(ToString::to_string)
    }

    /// Hands a message to the reader of a stream. False: the reader is gone, or took nothing for too long, and the stream ends.
    ///
    /// # Cancel safety
    /// If this is dropped the message may be lost.
    pub(crate) async fn hand_over<T>(&self, reader: &mpsc::Sender<T>, message: T) -> bool {
        match timeout(self.slow_reader, reader.send(message)).await {
            Ok(sent) => sent.is_ok(),
            Err(_) => {
                self.turned_away.note(Why::SlowReader);
                false
            }
        }
    }

    /// Checks the term of whoever drives a move: a driver that was followed by another must not act any more.
    ///
    /// # Errors
    /// `FAILED_PRECONDITION` for an older driver.
    pub(crate) fn check_driver(&self, term: u64) -> Result<(), Status> {
        let seen = self.driver_term.fetch_max(term, Ordering::Relaxed);
        if term != 0 && term < seen {
            return Err(Status::failed_precondition(format!(
                "driver of term {term} was followed by one of term {seen}"
            )));
        }
        Ok(())
    }

    /// The term in which this node leads the meta group, `None` if it does not.
    pub(crate) fn meta_term(&self) -> Option<u64> {
        let group = self.raft.group(GroupId::META)?;
        group.look(|status| (status.role == Role::Leader).then_some(status.term))
    }

    /// The bytes of the log's files.
    pub(crate) fn wal_bytes(&self) -> u64 {
        self.wal.usage().disk_bytes
    }
}
