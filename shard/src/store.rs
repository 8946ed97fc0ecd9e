//! The rows of one group: what every state machine here has in common.
//!
//! Effects are staged in memory while a batch of commands is applied and reach the engine together with the runtime's
//! rows and the mark, in one batch. A received state is written into a generation of its own and becomes the live one
//! by the mark's batch alone.
//!
//! Crash cases:
//!
//! 1. Before the batch of a commit: nothing of it is there; the log replays it. After it, but before a flush: as far
//!    as the engine kept a prefix of the batches; mark and rows agree, the log replays the rest.
//! 2. While rows are staged: the record `Staged` was written before the first of them. At the next open it becomes
//!    `Dead` and the rows are dropped.
//! 3. At the switch: either the old mark is there and `Staged` (case 2), or the new one, with `Dead` for the old
//!    generation in the same batch.
//! 4. While a dead generation is dropped: its `Dead` record stands until the last row is gone. Dropping begins only
//!    after the batch that declared it dead was flushed, else a power cut could bring the old mark back over rows that
//!    are half gone.
//! 5. A generation's number is taken again only after its record is gone, thus after its rows.

use std::{
    any::Any,
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use pontoon_proto::{GroupId, v1};
use pontoon_raftstore::{MachineError, SnapshotSource, SnapshotStage, SystemRow};
use prost::Message;

use crate::{
    engine::{Engine, EngineSnapshot, Keyspace, Scope, WriteBatch, prefix_end},
    error::Error,
    layout::{self, DATA, MARKS, Record, SYSTEM, data_space, generation_prefix, record_key, row_key},
};

/// From this size on, staged rows are ingested in bulk instead of written in batches.
const INGEST_BYTES: usize = 4 << 20;

/// A generation whose rows may be dropped: the batch that declared it dead is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DeadGeneration {
    pub(crate) group: GroupId,
    pub(crate) generation: u32,
}

/// What all machines of a node share.
pub(crate) struct Shared {
    pub(crate) engine: Arc<dyn Engine>,
    dead: Mutex<VecDeque<DeadGeneration>>,
}

/// What the marks keyspace says about a group.
#[derive(Debug, Clone, Default)]
pub(crate) struct Known {
    mark: Option<v1::EngineMark>,
    staged: Vec<u32>,
    dead: Vec<u32>,
}

impl Known {
    /// A number that no generation of the group has, dead ones included.
    fn next_generation(&self) -> u32 {
        let live = self.mark.as_ref().map_or(0, |mark| mark.generation);
        self.staged.iter().chain(&self.dead).copied().fold(live, u32::max) + 1
    }
}

impl Shared {
    /// Reads the marks of all groups in one scan, turns what an earlier run left staged into dead generations, and
    /// makes that durable.
    pub(crate) fn open(engine: Arc<dyn Engine>) -> Result<(Arc<Shared>, BTreeMap<GroupId, Known>), Error> {
        let mut known = scan_records(&*engine, &[])?;
        let mut batch = WriteBatch::new();
        let mut dead = VecDeque::new();
        for (group, known) in &mut known {
            for generation in known.staged.drain(..) {
                batch.delete(MARKS, record_key(*group, Record::Staged(generation)));
                batch.put(MARKS, record_key(*group, Record::Dead(generation)), Bytes::new());
                known.dead.push(generation);
            }
            dead.extend(
                known.dead.iter().map(|generation| DeadGeneration { group: *group, generation: *generation }),
            );
        }
        engine.write(batch)?;
        if !dead.is_empty() {
            // What was read may have been written by a run that was killed before it was flushed (case 4).
            engine.flush()?;
        }
        Ok((Arc::new(Shared { engine, dead: Mutex::new(dead) }), known))
    }

    /// The generation's death is durable: queue its rows for dropping.
    fn bury(&self, group: GroupId, generation: u32) {
        self.queue().push_back(DeadGeneration { group, generation });
    }

    fn queue(&self) -> std::sync::MutexGuard<'_, VecDeque<DeadGeneration>> {
        self.dead.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops up to `rows` rows of dead generations; true if none is left.
    pub(crate) fn reap(&self, rows: usize) -> Result<bool, Error> {
        let Some(next) = self.queue().pop_front() else { return Ok(true) };
        let DeadGeneration { group, generation } = next;
        let prefix = generation_prefix(group, generation);
        let dropped = self.engine.delete_prefix(data_space(group), &prefix, rows).and_then(|finished| {
            if finished {
                let mut batch = WriteBatch::new();
                batch.delete(MARKS, record_key(group, Record::Dead(generation)));
                self.engine.write(batch)?;
            }
            Ok(finished)
        });
        let mut queue = self.queue();
        if !matches!(dropped, Ok(true)) {
            queue.push_back(next);
        }
        dropped?;
        Ok(queue.is_empty())
    }
}

/// Reads the records whose keys begin with `prefix`.
fn scan_records(engine: &dyn Engine, prefix: &[u8]) -> Result<BTreeMap<GroupId, Known>, Error> {
    let mut known: BTreeMap<GroupId, Known> = BTreeMap::new();
    let mut damage = None;
    let scope = Scope { space: MARKS, prefix: Bytes::copy_from_slice(prefix) };
    engine.snapshot(vec![scope])?.scan(MARKS, prefix, prefix_end(prefix).as_deref(), &mut |key, value| {
        let Some((group, record)) = layout::parse_record(key) else {
            damage = Some(Error::Damaged { group: GroupId::NODE, what: "a record's key" });
            return false;
        };
        let known = known.entry(group).or_default();
        match record {
            Record::Mark => match decode_mark(group, value) {
                Ok(mark) => known.mark = Some(mark),
                Err(error) => damage = Some(error),
            },
            Record::Staged(generation) => known.staged.push(generation),
            Record::Dead(generation) => known.dead.push(generation),
        }
        damage.is_none()
    })?;
    damage.map_or(Ok(known), Err)
}

pub(crate) fn decode_mark(group: GroupId, value: &[u8]) -> Result<v1::EngineMark, Error> {
    let mark = v1::EngineMark::decode(value).map_err(|_| Error::Damaged { group, what: "the mark" })?;
    if mark.format != layout::FORMAT {
        return Err(Error::UnknownFormat {
            group,
            what: "the mark",
            found: mark.format,
            known: layout::FORMAT,
        });
    }
    if mark.generation == 0 || mark.mark.is_none() {
        return Err(Error::Damaged { group, what: "the mark" });
    }
    Ok(mark)
}

/// What readers of a group share with its machine.
pub(crate) struct GroupView {
    pub(crate) shared: Arc<Shared>,
    pub(crate) group: GroupId,
    pub(crate) space: Keyspace,
    /// The live generation; 0 once the group is destroyed. Stored after the switch and before the old generation is
    /// queued for dropping, so a reader that finds it unchanged after its read has read whole rows.
    pub(crate) live: AtomicU32,
    bytes: AtomicU64,
}

impl GroupView {
    /// False from the group's destruction on.
    pub(crate) fn is_there(&self) -> bool {
        self.live.load(Ordering::Acquire) != 0
    }

    /// About how many bytes the live generation holds.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

/// The rows of one group, for the one thread that applies commands to them.
///
/// Invariants: `live` is the generation of the mark in the engine, or an unused number if there is no mark; `pending`
/// holds logical keys whose effects are not in the engine yet; the mark's index never goes back within a generation.
pub(crate) struct GroupStore {
    view: Arc<GroupView>,
    mark: Option<v1::Mark>,
    live: u32,
    bytes: u64,
    pending: BTreeMap<Bytes, Option<Bytes>>,
    staged: Option<(u32, Arc<AtomicBool>)>,
}

impl GroupStore {
    /// Opens the group's rows. `known` is what the scan at open found, if this is the first use since then.
    pub(crate) fn open(
        shared: &Arc<Shared>,
        group: GroupId,
        known: Option<Known>,
    ) -> Result<GroupStore, Error> {
        let known = match known {
            Some(known) => known,
            None => scan_records(&*shared.engine, &group.0.to_be_bytes())?.remove(&group).unwrap_or_default(),
        };
        let live = known.mark.as_ref().map_or_else(|| known.next_generation(), |mark| mark.generation);
        let bytes = known.mark.as_ref().map_or(0, |mark| mark.bytes);
        let view = GroupView {
            shared: shared.clone(),
            group,
            space: data_space(group),
            live: AtomicU32::new(live),
            bytes: AtomicU64::new(bytes),
        };
        let mark = known.mark.and_then(|mark| mark.mark);
        Ok(GroupStore { view: Arc::new(view), mark, live, bytes, pending: BTreeMap::new(), staged: None })
    }

    pub(crate) fn view(&self) -> &Arc<GroupView> {
        &self.view
    }

    pub(crate) fn group(&self) -> GroupId {
        self.view.group
    }

    pub(crate) fn mark(&self) -> Option<&v1::Mark> {
        self.mark.as_ref()
    }

    fn engine(&self) -> &dyn Engine {
        &*self.view.shared.engine
    }

    /// The value of a logical key, staged effects included.
    pub(crate) fn get(&self, logical: &[u8]) -> Result<Option<Bytes>, Error> {
        match self.pending.get(logical) {
            Some(value) => Ok(value.clone()),
            None => self.engine().get(self.view.space, &row_key(self.group(), self.live, logical)),
        }
    }

    /// Stages a row (`None` deletes it). `replaced` is the length of the value it replaces, as far as the caller knows.
    pub(crate) fn set(&mut self, logical: Bytes, value: Option<Bytes>, replaced: Option<usize>) {
        let size = |len: usize| (logical.len() + len) as u64;
        self.bytes += value.as_ref().map_or(0, |value| size(value.len()));
        self.bytes = self.bytes.saturating_sub(replaced.map_or(0, size));
        self.pending.insert(logical, value);
    }

    fn mark_value(&self, generation: u32, mark: &v1::Mark, bytes: u64) -> Bytes {
        let mark = v1::EngineMark { format: layout::FORMAT, generation, mark: Some(mark.clone()), bytes };
        mark.encode_to_vec().into()
    }

    /// Writes staged effects, the runtime's rows and the mark in one batch.
    pub(crate) fn commit(&mut self, rows: Vec<SystemRow>, mark: &v1::Mark) -> Result<(), Error> {
        let (group, space) = (self.group(), self.view.space);
        if let Some(before) = &self.mark {
            assert!(
                before.index <= mark.index,
                "{group}: the mark went back from {} to {}",
                before.index,
                mark.index
            );
        }
        let mut batch = WriteBatch::new();
        for (logical, value) in std::mem::take(&mut self.pending) {
            put_or_delete(&mut batch, space, row_key(group, self.live, &logical), value);
        }
        for row in rows {
            let key = row_key(group, self.live, &layout::logical(SYSTEM, &row.key));
            put_or_delete(&mut batch, space, key, row.value);
        }
        batch.put(MARKS, record_key(group, Record::Mark), self.mark_value(self.live, mark, self.bytes));
        self.engine().write(batch)?;
        self.mark = Some(mark.clone());
        self.view.live.store(self.live, Ordering::Release);
        self.view.bytes.store(self.bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Every row of one kind, in key order, without its kind byte. Staged effects are not included.
    pub(crate) fn rows(&self, kind: u8) -> Result<Vec<(Bytes, Bytes)>, Error> {
        let mut rows = Vec::new();
        let prefix = row_key(self.group(), self.live, &[kind]);
        let snapshot =
            self.engine().snapshot(vec![Scope { space: self.view.space, prefix: prefix.clone() }])?;
        snapshot.scan(self.view.space, &prefix, prefix_end(&prefix).as_deref(), &mut |key, value| {
            rows.push((Bytes::copy_from_slice(&key[prefix.len()..]), Bytes::copy_from_slice(value)));
            true
        })?;
        Ok(rows)
    }

    /// Every row of the runtime.
    pub(crate) fn system_rows(&self) -> Result<Vec<(Bytes, Bytes)>, Error> {
        self.rows(SYSTEM)
    }

    /// Every row of the machine.
    pub(crate) fn data_rows(&self) -> Result<Vec<(Bytes, Bytes)>, Error> {
        self.rows(DATA)
    }

    /// A point-in-time view of the live generation.
    pub(crate) fn checkpoint(&self) -> Result<Arc<dyn SnapshotSource>, Error> {
        let prefix = Bytes::copy_from_slice(&generation_prefix(self.group(), self.live));
        let space = self.view.space;
        let snapshot = self.engine().snapshot(vec![Scope { space, prefix: prefix.clone() }])?;
        Ok(Arc::new(Source { snapshot, space, prefix }))
    }

    /// Begins a new generation. One that was begun before is given up.
    pub(crate) fn stage(&mut self) -> Result<Box<dyn SnapshotStage>, Error> {
        let group = self.group();
        let records = scan_records(self.engine(), &group.0.to_be_bytes())?.remove(&group).unwrap_or_default();
        let mut batch = WriteBatch::new();
        if let Some((_, wanted)) = self.staged.take() {
            wanted.store(false, Ordering::Release);
        }
        for generation in &records.staged {
            declare_dead(&mut batch, group, *generation);
        }
        // Above the live one also while no mark holds that.
        let generation = records.next_generation().max(self.live + 1);
        batch.put(MARKS, record_key(group, Record::Staged(generation)), Bytes::new());
        self.engine().write(batch)?;
        if !records.staged.is_empty() {
            self.engine().flush()?;
            for generation in records.staged {
                self.view.shared.bury(group, generation);
            }
        }
        let wanted = Arc::new(AtomicBool::new(true));
        self.staged = Some((generation, wanted.clone()));
        Ok(Box::new(Stage {
            view: self.view.clone(),
            generation,
            wanted,
            buffer: Vec::new(),
            buffered: 0,
            bytes: 0,
            last: Bytes::new(),
        }))
    }

    /// Makes the staged generation the live one, durably.
    pub(crate) fn install(&mut self, stage: Box<dyn SnapshotStage>, mark: &v1::Mark) -> Result<(), Error> {
        let group = self.group();
        let stale = || Error::StaleStage { group };
        let mut stage = stage.into_any().downcast::<Stage>().map_err(|_| stale())?;
        let ours = self.staged.as_ref().is_some_and(|(generation, _)| *generation == stage.generation);
        if !ours || stage.view.group != group {
            return Err(stale());
        }
        stage.write_out()?;
        let mut batch = WriteBatch::new();
        let value = self.mark_value(stage.generation, mark, stage.bytes);
        batch.put(MARKS, record_key(group, Record::Mark), value);
        batch.delete(MARKS, record_key(group, Record::Staged(stage.generation)));
        let old = self.mark.is_some().then_some(self.live);
        if let Some(old) = old {
            batch.put(MARKS, record_key(group, Record::Dead(old)), Bytes::new());
        }
        self.engine().write(batch)?;
        self.engine().flush()?;
        self.staged = None;
        self.pending.clear();
        self.mark = Some(mark.clone());
        self.live = stage.generation;
        self.bytes = stage.bytes;
        self.view.live.store(self.live, Ordering::Release);
        self.view.bytes.store(self.bytes, Ordering::Relaxed);
        if let Some(old) = old {
            self.view.shared.bury(group, old);
        }
        Ok(())
    }

    /// Removes the mark and declares every generation dead, durably.
    pub(crate) fn destroy(&mut self) -> Result<(), Error> {
        let group = self.group();
        self.pending.clear();
        if let Some((_, wanted)) = self.staged.take() {
            wanted.store(false, Ordering::Release);
        }
        self.view.live.store(0, Ordering::Release);
        let records = scan_records(self.engine(), &group.0.to_be_bytes())?.remove(&group).unwrap_or_default();
        let mut batch = WriteBatch::new();
        let mut died = records.staged.clone();
        died.extend(records.mark.as_ref().map(|mark| mark.generation));
        for generation in &died {
            declare_dead(&mut batch, group, *generation);
        }
        batch.delete(MARKS, record_key(group, Record::Mark));
        self.engine().write(batch)?;
        self.engine().flush()?;
        self.live = records.next_generation();
        self.mark = None;
        self.bytes = 0;
        self.view.bytes.store(0, Ordering::Relaxed);
        for generation in died {
            self.view.shared.bury(group, generation);
        }
        Ok(())
    }
}

fn put_or_delete(batch: &mut WriteBatch, space: Keyspace, key: Bytes, value: Option<Bytes>) {
    match value {
        Some(value) => batch.put(space, key, value),
        None => batch.delete(space, key),
    }
}

fn declare_dead(batch: &mut WriteBatch, group: GroupId, generation: u32) {
    batch.delete(MARKS, record_key(group, Record::Staged(generation)));
    batch.put(MARKS, record_key(group, Record::Dead(generation)), Bytes::new());
}

/// A point in time of one generation, by logical keys.
struct Source {
    snapshot: Box<dyn EngineSnapshot>,
    space: Keyspace,
    prefix: Bytes,
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
struct Stage {
    view: Arc<GroupView>,
    generation: u32,
    /// False once the machine has given the generation up: its rows may be gone, and none may be added.
    wanted: Arc<AtomicBool>,
    buffer: Vec<(Bytes, Bytes)>,
    buffered: usize,
    bytes: u64,
    last: Bytes,
}

impl Stage {
    fn write_out(&mut self) -> Result<(), Error> {
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
