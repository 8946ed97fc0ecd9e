//! All machines of a node over one engine.

use std::{collections::BTreeMap, fmt, sync::Arc};

use dashmap::DashMap;
use pontoon_proto::{GroupId, v1};
use pontoon_raftstore::{MachineError, Machines, StateMachine};
use prost::Message;
use std::sync::{Mutex, PoisonError};
use tokio::sync::watch;

use crate::{
    contents::Contents,
    engine::{Engine, EngineStats},
    error::Error,
    log::{LogBounds, LogMachine, LogReader},
    map::{MapMachine, MapReader},
    meta::{MetaMachine, MetaState},
    store::{GroupStore, GroupView, Known, Shared},
    versions::Versions,
};

/// How many rows of dead generations a flush drops at most.
const REAP_ROWS_PER_FLUSH: usize = 2_000;

/// Opens the machines of a node's groups and reads their rows.
///
/// The kind of a group comes from its descriptor, an encoded [`v1::Shard`].
pub struct ShardMachines {
    shared: Arc<Shared>,
    /// What the scan at open found of groups that were not opened since.
    known: Mutex<BTreeMap<GroupId, Known>>,
    views: DashMap<GroupId, (v1::ShardKind, Arc<GroupView>)>,
    /// What the logs here say of themselves, for readers that wait.
    logs: DashMap<GroupId, watch::Receiver<LogBounds>>,
    meta: watch::Sender<Arc<MetaState>>,
    versions: Versions,
}

impl fmt::Debug for ShardMachines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShardMachines").field("groups", &self.views.len()).finish_non_exhaustive()
    }
}

impl ShardMachines {
    /// Reads the marks of all groups in one scan; nothing is served yet.
    ///
    /// # Errors
    /// The engine's, and [`Error::Damaged`] or [`Error::UnknownFormat`] for a mark that does not read.
    pub fn new(engine: Arc<dyn Engine>) -> Result<Arc<ShardMachines>, Error> {
        ShardMachines::speaking(engine, Versions::OURS)
    }

    /// The same for a binary that speaks other cluster versions: beyond them the meta group's machine stops.
    ///
    /// # Errors
    /// As [`ShardMachines::new`].
    pub fn speaking(engine: Arc<dyn Engine>, versions: Versions) -> Result<Arc<ShardMachines>, Error> {
        let (shared, known) = Shared::open(engine)?;
        let (meta, _) = watch::channel(Arc::default());
        Ok(Arc::new(ShardMachines {
            shared,
            known: Mutex::new(known),
            views: DashMap::new(),
            logs: DashMap::new(),
            meta,
            versions,
        }))
    }

    /// Reads the rows of a map; `None` if no map of this group was opened here, or it was destroyed.
    pub fn reader(&self, group: GroupId) -> Option<MapReader> {
        let view = self.views.get(&group)?;
        (view.0 == v1::ShardKind::Map && view.1.is_there()).then(|| MapReader::new(view.1.clone()))
    }

    /// Reads the records of a log; `None` if no log of this group was opened here, or it was destroyed.
    pub fn log(&self, group: GroupId) -> Option<LogReader> {
        let view = self.views.get(&group)?;
        let seen = self.logs.get(&group)?;
        let there = view.0 == v1::ShardKind::Log && view.1.is_there();
        there.then(|| LogReader::new(view.1.clone(), seen.clone()))
    }

    /// What a map or a log holds, as of the last command that was applied here; `None` if neither of this group was opened
    /// here, or it was destroyed. Blocks on the engine.
    ///
    /// # Errors
    /// [`Error::Damaged`], and the engine's.
    pub fn contents(&self, group: GroupId) -> Result<Option<Contents>, Error> {
        let Some((kind, view)) = self.views.get(&group).map(|view| (view.0, view.1.clone())) else {
            return Ok(None);
        };
        if kind == v1::ShardKind::Meta || !view.is_there() {
            return Ok(None);
        }
        Contents::of(&view, kind).map(Some)
    }

    /// The meta group's state as this node has applied it; of version 0 while this node has no replica of it.
    pub fn meta(&self) -> watch::Receiver<Arc<MetaState>> {
        self.meta.subscribe()
    }

    /// About how many bytes a group's rows take here, counted as they were written: exact for inserts, deletes and
    /// conditional writes, too much for rows that were overwritten blindly.
    pub fn usage(&self, group: GroupId) -> u64 {
        self.views.get(&group).map_or(0, |view| view.1.bytes())
    }

    /// What the engine says of itself.
    pub fn engine_stats(&self) -> EngineStats {
        self.shared.engine.stats()
    }

    /// Drops up to `rows` rows of generations that are dead; true if none is left. [`Machines::flush`] does it in
    /// small steps too.
    ///
    /// # Errors
    /// The engine's.
    pub fn reap(&self, rows: usize) -> Result<bool, Error> {
        self.shared.reap(rows)
    }

    /// Closes the engine in order. Machines and readers must not be used any more.
    ///
    /// # Errors
    /// The engine's.
    pub fn close(&self) -> Result<(), Error> {
        self.shared.engine.close()
    }

    fn open_machine(&self, group: GroupId, descriptor: &[u8]) -> Result<Box<dyn StateMachine>, Error> {
        let shard = v1::Shard::decode(descriptor)?;
        let unknown = || Error::UnknownKind { group, kind: shard.kind.to_string() };
        let kind = v1::ShardKind::try_from(shard.kind).map_err(|_| unknown())?;
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).remove(&group);
        let store = GroupStore::open(&self.shared, group, known)?;
        self.views.insert(group, (kind, store.view().clone()));
        Ok(match kind {
            v1::ShardKind::Map => Box::new(MapMachine::new(store)),
            v1::ShardKind::Meta => Box::new(MetaMachine::open(store, self.meta.clone(), self.versions)?),
            v1::ShardKind::Log => {
                let (sender, seen) = watch::channel(LogBounds { lowest: 0, next: 0, era: 1 });
                self.logs.insert(group, seen);
                Box::new(LogMachine::open(store, sender)?)
            }
        })
    }
}

impl Machines for ShardMachines {
    fn open(&self, group: GroupId, descriptor: &[u8]) -> Result<Box<dyn StateMachine>, MachineError> {
        Ok(self.open_machine(group, descriptor)?)
    }

    fn flush(&self) -> Result<(), MachineError> {
        self.shared.flush()?;
        self.shared.reap(REAP_ROWS_PER_FLUSH)?;
        Ok(())
    }

    fn failure(&self) -> Option<String> {
        self.shared.engine.failure()
    }
}
