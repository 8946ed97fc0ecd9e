//! The in-memory twin: the oracle for the other engines, and the engine of simulations.
//!
//! A [`MemoryDisk`] outlives the engines opened over it. It holds what is durable and, apart, the batches that are not;
//! a power cut forgets those (or all but a prefix of them, which a real engine may also do), and every engine that was
//! open then is dead.

use std::{
    collections::BTreeMap,
    ops::Bound,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use pontoon_proto::GroupId;

use super::{Change, Engine, EngineKind, EngineSnapshot, Keyspace, Scope, WriteBatch};
use crate::error::Error;

type Rows = BTreeMap<(Keyspace, Bytes), Bytes>;

/// A simulated disk for [`MemoryEngine`]. Clones are the same disk.
#[derive(Debug, Clone, Default)]
pub struct MemoryDisk {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    durable: Arc<Rows>,
    /// `durable` with every unflushed batch on top. Copied on write while a snapshot shares it.
    current: Arc<Rows>,
    unflushed: Vec<WriteBatch>,
    /// Rises with each power cut and open: engines of an earlier life are dead.
    life: u64,
    /// Whether the next flushes fail.
    broken: bool,
}

impl MemoryDisk {
    /// An empty disk.
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets every batch since the last flush. Engines that were open answer [`Error::Closed`] from here on.
    pub fn power_cut(&self) {
        self.power_cut_keeping(0);
    }

    /// A power cut that the first `batches` unflushed batches survive.
    pub fn power_cut_keeping(&self, batches: usize) {
        let mut state = self.lock();
        let mut rows = Rows::clone(&state.durable);
        for batch in state.unflushed.iter().take(batches) {
            apply(&mut rows, batch);
        }
        state.durable = Arc::new(rows);
        state.current = state.durable.clone();
        state.unflushed.clear();
        state.life += 1;
    }

    /// Another disk with what this one holds durably at this moment.
    pub fn image(&self) -> MemoryDisk {
        let durable = self.lock().durable.clone();
        let state = State { current: durable.clone(), durable, ..State::default() };
        MemoryDisk { state: Arc::new(Mutex::new(state)) }
    }

    /// How many batches a power cut could take.
    pub fn unflushed(&self) -> usize {
        self.lock().unflushed.len()
    }

    /// How many rows and records of a group are there, of whatever generation: a replica that went leaves none.
    pub fn rows_of(&self, group: GroupId) -> usize {
        let current = self.lock().current.clone();
        let prefix = group.0.to_be_bytes();
        current.keys().filter(|(_, key)| key.starts_with(&prefix)).count()
    }

    /// Makes every flush from now on fail.
    pub fn fail_flushes(&self) {
        self.lock().broken = true;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change of the state is complete before the lock goes: a panic elsewhere leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A map in memory over a [`MemoryDisk`].
#[derive(Debug)]
pub struct MemoryEngine {
    disk: MemoryDisk,
    life: u64,
    poisoned: std::sync::atomic::AtomicBool,
}

impl MemoryEngine {
    /// Opens what the disk holds. An engine that was open over it before is dead from here on.
    pub fn open(disk: &MemoryDisk) -> Self {
        let mut state = disk.lock();
        state.life += 1;
        let life = state.life;
        drop(state);
        MemoryEngine { disk: disk.clone(), life, poisoned: false.into() }
    }

    fn state(&self) -> Result<MutexGuard<'_, State>, Error> {
        let state = self.disk.lock();
        if state.life != self.life {
            return Err(Error::Closed);
        }
        if self.poisoned.load(std::sync::atomic::Ordering::Acquire) {
            return Err(Error::Poisoned);
        }
        Ok(state)
    }
}

fn apply(rows: &mut Rows, batch: &WriteBatch) {
    for (space, key, change) in batch.changes() {
        match change {
            Change::Put(value) => rows.insert((*space, key.clone()), value.clone()),
            Change::Delete => rows.remove(&(*space, key.clone())),
        };
    }
}

impl Engine for MemoryEngine {
    fn kind(&self) -> EngineKind {
        EngineKind::Memory
    }

    fn get(&self, space: Keyspace, key: &[u8]) -> Result<Option<Bytes>, Error> {
        Ok(self.state()?.current.get(&(space, Bytes::copy_from_slice(key))).cloned())
    }

    fn write(&self, batch: WriteBatch) -> Result<(), Error> {
        let mut state = self.state()?;
        if !batch.is_empty() {
            apply(Arc::make_mut(&mut state.current), &batch);
            state.unflushed.push(batch);
        }
        Ok(())
    }

    fn snapshot(&self, _scope: Vec<Scope>) -> Result<Box<dyn EngineSnapshot>, Error> {
        Ok(Box::new(MemorySnapshot { rows: self.state()?.current.clone() }))
    }

    fn flush(&self) -> Result<(), Error> {
        let mut state = self.state()?;
        if state.broken {
            self.poisoned.store(true, std::sync::atomic::Ordering::Release);
            return Err(Error::Poisoned);
        }
        let unflushed = std::mem::take(&mut state.unflushed);
        let durable = Arc::make_mut(&mut state.durable);
        for batch in &unflushed {
            apply(durable, batch);
        }
        Ok(())
    }

    fn failure(&self) -> Option<String> {
        let failed = self.poisoned.load(std::sync::atomic::Ordering::Acquire);
        failed.then(|| Error::Poisoned.to_string())
    }

    fn close(&self) -> Result<(), Error> {
        match self.flush() {
            Err(Error::Closed) => return Ok(()),
            other => other?,
        }
        self.disk.lock().life += 1;
        Ok(())
    }
}

struct MemorySnapshot {
    rows: Arc<Rows>,
}

impl EngineSnapshot for MemorySnapshot {
    fn get(&self, space: Keyspace, key: &[u8]) -> Result<Option<Bytes>, Error> {
        Ok(self.rows.get(&(space, Bytes::copy_from_slice(key))).cloned())
    }

    fn scan(
        &self,
        space: Keyspace,
        low: &[u8],
        high: Option<&[u8]>,
        visit: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), Error> {
        let low = (space, Bytes::copy_from_slice(low));
        for ((found, key), value) in self.rows.range((Bound::Included(low), Bound::Unbounded)) {
            let past = high.is_some_and(|high| &key[..] >= high);
            if *found != space || past || !visit(key, value) {
                break;
            }
        }
        Ok(())
    }
}
