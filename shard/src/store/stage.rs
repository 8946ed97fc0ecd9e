//! A generation on its way out of one engine and into another.
//!
//! A state arrives in chunks. Each is written whole and recorded (`Chunk`: hash, end, size), and what was written is flushed
//! before the next one is asked for, so that a kill costs one chunk at most. A flush is one sync of the engine's journal, on
//! a disk that syncs in 1 ms some hundredth of the time that a chunk of megabytes takes on its way; the last chunk is spared
//! it, since the switch is flushed.
//!
//! A stage that takes over what an earlier one received ends with exactly the rows of its own state: chunks lie end to end
//! from the first key to the last, the first one reaching down to the beginning and the last one up to the end of the
//! generation, and all that lies in the range of a chunk that is not held is deleted before the chunk is written. A chunk is
//! held if first key, end and hash are the same: then its range holds the same rows.
//!
//! Crash cases, beside those at the head of [`super`]:
//!
//! 1. After the records of replaced chunks were deleted, before their rows were: rows without a record, which the next
//!    stage deletes before it writes there.
//! 2. Between two batches of such a deletion or of a chunk's rows (its record is in the last), or between bulk ingestion of them
//!    and the record: the same.
//! 3. After a chunk's record, before the flush: batches survive in order, the rows with or before the record. Bulk
//!    ingestion is durable by itself, and what was written before it, too.
//! 4. A new state came and its index stands in `Staged`, its chunks are not planned yet: records tell what is there.

use std::{
    any::Any,
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use pontoon_proto::{GroupId, v1};
use pontoon_raftstore::{MachineError, SnapshotSource, SnapshotStage};
use prost::Message;

use super::{declare_dead, view::GroupView};
use crate::{
    engine::{Engine, EngineSnapshot, Keyspace, Scope, WriteBatch, prefix_end},
    error::Error,
    layout::{MARKS, chunk_key, chunk_prefix, generation_prefix, row_key},
};

/// A state of which so much is to come, if it is in a hurry, is ingested in bulk, chunk by chunk, instead of written in batches: half as
/// much goes to the disk, but everybody who writes to the engine waits for the syncs of each ingestion.
const BULK_STATE_BYTES: u64 = 4 << 20;
/// Chunks smaller than this are written in a batch all the same: an ingestion makes files.
const BULK_CHUNK_BYTES: usize = 512 << 10;
/// What is written in one batch: whoever applies entries waits for it.
const BATCH_BYTES: usize = 64 << 10;
/// Rows that are deleted in one batch where another chunk is to come.
const CLEAR_ROWS: usize = 4096;

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

/// The chunks that an earlier stage of this generation received whole, by first key.
pub(super) fn chunks(
    engine: &dyn Engine,
    group: GroupId,
    generation: u32,
) -> Result<BTreeMap<Bytes, v1::StagedChunk>, Error> {
    let prefix = chunk_prefix(group, generation);
    let mut chunks = BTreeMap::new();
    let scope = Scope { space: MARKS, prefix: Bytes::copy_from_slice(&prefix) };
    engine.snapshot(vec![scope])?.scan(
        MARKS,
        &prefix,
        prefix_end(&prefix).as_deref(),
        &mut |key, value| {
            // One that does not read is replaced.
            let chunk = v1::StagedChunk::decode(value).unwrap_or_default();
            chunks.insert(Bytes::copy_from_slice(&key[prefix.len()..]), chunk);
            true
        },
    )?;
    Ok(chunks)
}

/// One chunk of the state that comes.
struct Planned {
    first_key: Bytes,
    /// The next chunk's first key.
    end: Option<Bytes>,
    hash: Bytes,
    /// On the wire.
    bytes: u64,
    /// What it weighs in the generation, if it is there already.
    held: Option<u64>,
}

/// How a state comes, in key order.
pub(super) struct Plan(Vec<Planned>);

impl Plan {
    pub(super) fn new(chunks: &[v1::ChunkInfo], had: &BTreeMap<Bytes, v1::StagedChunk>) -> Plan {
        let planned = chunks.iter().enumerate().map(|(at, chunk)| {
            let end = chunks.get(at + 1).map(|next| next.first_key.clone());
            let there = had.get(&chunk.first_key);
            let held = there.filter(|there| there.hash == chunk.hash && there.end == end);
            Planned {
                first_key: chunk.first_key.clone(),
                end,
                hash: chunk.hash.clone(),
                bytes: chunk.bytes,
                held: held.map(|there| there.bytes),
            }
        });
        Plan(planned.collect())
    }

    /// Positions of the chunks that are there.
    pub(super) fn held(&self) -> Vec<u32> {
        let held = self.0.iter().enumerate().filter(|(_, chunk)| chunk.held.is_some());
        held.map(|(at, _)| at as u32).collect()
    }

    pub(super) fn holds(&self, first_key: &Bytes) -> bool {
        let at = self.0.binary_search_by(|chunk| chunk.first_key.cmp(first_key));
        at.is_ok_and(|at| self.0[at].held.is_some())
    }

    /// The range of a chunk in the generation: the first one begins with it.
    fn low(&self, at: usize) -> &[u8] {
        if at == 0 { &[] } else { &self.0[at].first_key }
    }
}

/// Whether a stage may still be filled; known to it and to its machine.
#[derive(Default)]
pub(super) struct Fate {
    open: AtomicBool,
    dead: AtomicBool,
}

impl Fate {
    pub(super) fn open() -> Fate {
        Fate { open: true.into(), dead: false.into() }
    }

    /// Nothing is added any more: another stage goes on, or the rows go.
    pub(super) fn close(&self) {
        self.open.store(false, Ordering::Release);
    }

    /// Whether the generation was given up and recorded as dead.
    pub(super) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }
}

/// A generation that is being received.
pub(super) struct Stage {
    pub(super) view: Arc<GroupView>,
    pub(super) generation: u32,
    fate: Arc<Fate>,
    plan: Plan,
    /// Chunks that are to come.
    missing: usize,
    is_large: bool,
    /// Nothing was ever written into the generation but by this stage.
    fresh: bool,
    pub(super) bytes: u64,
}

impl Stage {
    pub(super) fn begin(
        view: Arc<GroupView>,
        generation: u32,
        fate: Arc<Fate>,
        plan: Plan,
        fresh: bool,
    ) -> Result<Stage, Error> {
        let missing = plan.0.iter().filter(|chunk| chunk.held.is_none());
        let (count, to_come) = missing.fold((0, 0), |(count, sum), chunk| (count + 1, sum + chunk.bytes));
        let bytes = plan.0.iter().filter_map(|chunk| chunk.held).sum();
        let is_large = to_come >= BULK_STATE_BYTES;
        let stage = Stage { view, generation, fate, plan, missing: count, is_large, fresh, bytes };
        if !fresh {
            match stage.plan.0.first() {
                None => stage.clear(&[], None)?,
                // Chunks that are not held are cleared when they come.
                Some(first) if first.held.is_some() => stage.clear(&[], Some(&first.first_key))?,
                Some(_) => {}
            }
        }
        Ok(stage)
    }

    /// Whether every chunk is there, and no other stage has followed.
    pub(super) fn may_be_installed(&self) -> bool {
        self.missing == 0 && self.fate.open.load(Ordering::Acquire)
    }

    pub(super) fn first_keys(&self) -> impl Iterator<Item = &Bytes> {
        self.plan.0.iter().map(|chunk| &chunk.first_key)
    }

    fn check_wanted(&self) -> Result<(), Error> {
        match self.fate.open.load(Ordering::Acquire) {
            true => Ok(()),
            false => Err(Error::StaleStage { group: self.view.group }),
        }
    }

    /// Deletes the generation's rows in [low, high).
    fn clear(&self, low: &[u8], high: Option<&[u8]>) -> Result<(), Error> {
        let (group, space, engine) = (self.view.group, self.view.space, &self.view.shared.engine);
        let prefix = Bytes::copy_from_slice(&generation_prefix(group, self.generation));
        let end =
            high.map(|high| row_key(group, self.generation, high).to_vec()).or_else(|| prefix_end(&prefix));
        let mut low = row_key(group, self.generation, low);
        loop {
            let snapshot = engine.snapshot(vec![Scope { space, prefix: prefix.clone() }])?;
            let mut batch = WriteBatch::new();
            let mut next = None;
            snapshot.scan(space, &low, end.as_deref(), &mut |key, _| {
                let key = Bytes::copy_from_slice(key);
                if batch.len() == CLEAR_ROWS {
                    next = Some(key);
                    return false;
                }
                batch.delete(space, key);
                true
            })?;
            drop(snapshot);
            if !batch.is_empty() {
                engine.write(batch)?;
            }
            match next {
                Some(next) => low = next,
                None => return Ok(()),
            }
        }
    }

    fn write(&mut self, at: usize, rows: &[(Bytes, Bytes)], hurry: bool) -> Result<(), Error> {
        self.check_wanted()?;
        let group = self.view.group;
        let planned = self.plan.0.get(at).filter(|chunk| chunk.held.is_none());
        let planned = planned.ok_or(Error::Damaged { group, what: "a chunk that nobody asked for" })?;
        let within = rows.first().is_none_or(|(key, _)| *key >= planned.first_key)
            && rows.last().is_none_or(|(key, _)| planned.end.as_ref().is_none_or(|end| key < end));
        if !within || !rows.is_sorted_by(|a, b| a.0 < b.0) {
            return Err(Error::Damaged { group, what: "the order of the rows of a received chunk" });
        }
        let (hash, end, key) = (
            planned.hash.clone(),
            planned.end.clone(),
            chunk_key(group, self.generation, &planned.first_key),
        );
        if !self.fresh {
            self.clear(self.plan.low(at), end.as_deref())?;
        }
        let (engine, space) = (&self.view.shared.engine, self.view.space);
        let bytes: usize = rows.iter().map(|(key, value)| key.len() + value.len()).sum();
        let full = rows.iter().map(|(key, value)| (row_key(group, self.generation, key), value.clone()));
        let mut batch = WriteBatch::new();
        if hurry && self.is_large && bytes >= BULK_CHUNK_BYTES {
            engine.ingest(space, &full.collect::<Vec<_>>())?;
        } else {
            let mut held = 0;
            for (key, value) in full {
                held += key.len() + value.len();
                batch.put(space, key, value);
                if held >= BATCH_BYTES {
                    engine.write(std::mem::take(&mut batch))?;
                    held = 0;
                }
            }
        }
        let record = v1::StagedChunk { hash, end, bytes: bytes as u64 };
        batch.put(MARKS, key, record.encode_to_vec());
        engine.write(batch)?;
        self.missing -= 1;
        if self.missing > 0 {
            engine.flush()?;
        }
        self.plan.0[at].held = Some(bytes as u64);
        self.bytes += bytes as u64;
        Ok(())
    }
}

impl SnapshotStage for Stage {
    fn put(&mut self, chunk: u32, rows: &[(Bytes, Bytes)], hurry: bool) -> Result<(), MachineError> {
        Ok(self.write(chunk as usize, rows, hurry)?)
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }

    fn abandon(self: Box<Self>) -> Result<(), MachineError> {
        if !self.fate.open.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let group = self.view.group;
        let mut batch = WriteBatch::new();
        declare_dead(&mut batch, group, self.generation);
        let engine = &self.view.shared.engine;
        engine.write(batch)?;
        engine.flush()?;
        self.fate.dead.store(true, Ordering::Release);
        self.view.shared.bury(group, self.generation);
        Ok(())
    }
}
