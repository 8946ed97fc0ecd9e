//! A generation on its way out of one engine and into another.

use std::{
    any::Any,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use pontoon_raftstore::{MachineError, SnapshotSource, SnapshotStage};

use super::{declare_dead, view::GroupView};
use crate::{
    engine::{EngineSnapshot, Keyspace, WriteBatch, prefix_end},
    error::Error,
    layout::row_key,
};

/// From this size on, staged rows are ingested in bulk instead of written in batches.
const INGEST_BYTES: usize = 4 << 20;

/// A point in time of one generation, by logical keys.
pub(super) struct Source {
    pub(super) snapshot: Box<dyn EngineSnapshot>,
    pub(super) space: Keyspace,
    pub(super) prefix: Bytes,
}

impl SnapshotSource for Source {
    fn rows(&self, from: &[u8], visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<(), MachineError> {
        let low = [&self.prefix[..], from].concat();
        let high = prefix_end(&self.prefix);
        self.snapshot.scan(self.space, &low, high.as_deref(), &mut |key, value| {
            visit(&key[self.prefix.len()..], value)
        })?;
        Ok(())
    }
}

/// A generation that is being received.
pub(super) struct Stage {
    pub(super) view: Arc<GroupView>,
    pub(super) generation: u32,
    /// False once the machine has given the generation up: its rows may be gone, and none may be added.
    wanted: Arc<AtomicBool>,
    buffer: Vec<(Bytes, Bytes)>,
    buffered: usize,
    pub(super) bytes: u64,
    last: Bytes,
}

impl Stage {
    pub(super) fn new(view: Arc<GroupView>, generation: u32, wanted: Arc<AtomicBool>) -> Stage {
        Stage { view, generation, wanted, buffer: Vec::new(), buffered: 0, bytes: 0, last: Bytes::new() }
    }

    /// Hands what was collected to the engine.
    pub(super) fn write_out(&mut self) -> Result<(), Error> {
        if !self.wanted.load(Ordering::Acquire) {
            return Err(Error::StaleStage { group: self.view.group });
        }
        let rows = std::mem::take(&mut self.buffer);
        let bulk = self.buffered >= INGEST_BYTES;
        self.buffered = 0;
        let engine = &self.view.shared.engine;
        if bulk {
            return engine.ingest(self.view.space, &rows);
        }
        let mut batch = WriteBatch::new();
        for (key, value) in rows {
            batch.put(self.view.space, key, value);
        }
        engine.write(batch)
    }
}

impl SnapshotStage for Stage {
    fn put(&mut self, rows: &[(Bytes, Bytes)]) -> Result<(), MachineError> {
        for (logical, value) in rows {
            assert!(self.last.is_empty() || *logical > self.last, "staged rows come in ascending order");
            self.last = logical.clone();
            let key = row_key(self.view.group, self.generation, logical);
            self.buffered += key.len() + value.len();
            self.bytes += (logical.len() + value.len()) as u64;
            self.buffer.push((key, value.clone()));
            if self.buffered >= INGEST_BYTES {
                self.write_out()?;
            }
        }
        Ok(())
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }

    fn abandon(self: Box<Self>) -> Result<(), MachineError> {
        if !self.wanted.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let group = self.view.group;
        let mut batch = WriteBatch::new();
        declare_dead(&mut batch, group, self.generation);
        let engine = &self.view.shared.engine;
        engine.write(batch)?;
        engine.flush()?;
        self.view.shared.bury(group, self.generation);
        Ok(())
    }
}
