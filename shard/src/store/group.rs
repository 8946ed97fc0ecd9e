//! A group's live rows, and how another generation takes their place.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use pontoon_proto::{GroupId, v1};
use pontoon_raftstore::{
    SnapshotSource, SnapshotStage, Staging, SystemRow,
    rules::{Rule, is_broken},
};
use prost::Message;

use super::{
    Known, Shared, declare_dead, scan_records,
    stage::{self, Fate, Plan, Source, Stage},
    view::GroupView,
};
use crate::{
    engine::{Engine, Keyspace, Scope, WriteBatch, prefix_end},
    error::Error,
    layout::{
        self, DATA, MARKS, Record, SYSTEM, chunk_key, data_space, generation_prefix, record_key, row_key,
    },
};

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
    staged: Option<Staged>,
}

/// The generation that is being received, or was when this store was closed.
struct Staged {
    generation: u32,
    /// Of the state that comes. Once the live generation stands there, it is not wanted.
    index: u64,
    /// Shared with the stage that fills it, if there is one.
    fate: Arc<Fate>,
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
        let staged = known.staged.last_key_value().map(|(generation, index)| Staged {
            generation: *generation,
            index: *index,
            fate: Arc::default(),
        });
        Ok(GroupStore { view: Arc::new(view), mark, live, bytes, pending: BTreeMap::new(), staged })
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
        if is_broken(Rule::MarkWithData) {
            batch.put(MARKS, record_key(group, Record::Mark), self.mark_value(self.live, mark, self.bytes));
            self.engine().write(std::mem::take(&mut batch))?;
        }
        for (logical, value) in std::mem::take(&mut self.pending) {
            put_or_delete(&mut batch, space, row_key(group, self.live, &logical), value);
        }
        for row in rows {
            let key = row_key(group, self.live, &layout::logical(SYSTEM, &row.key));
            put_or_delete(&mut batch, space, key, row.value);
        }
        batch.put(MARKS, record_key(group, Record::Mark), self.mark_value(self.live, mark, self.bytes));
        // The log got where the received state would have led.
        let passed = self.staged.take_if(|staged| staged.index <= mark.index || staged.fate.is_dead());
        let passed = passed.filter(|staged| !staged.fate.is_dead());
        if let Some(staged) = &passed {
            staged.fate.close();
            declare_dead(&mut batch, group, staged.generation);
        }
        self.engine().write(batch)?;
        if let Some(staged) = passed {
            self.view.shared.doom(group, staged.generation);
        }
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

    /// Begins to receive a state, in the generation of an earlier stage if there is one: what that has of the very same
    /// chunks is kept.
    pub(crate) fn stage(&mut self, index: u64, chunks: &[v1::ChunkInfo]) -> Result<Staging, Error> {
        let group = self.group();
        let old = self.staged.take().filter(|staged| !staged.fate.is_dead());
        if let Some(staged) = &old {
            staged.fate.close();
        }
        let fresh = old.is_none();
        let generation = match old {
            Some(staged) => staged.generation,
            None => {
                let records =
                    scan_records(self.engine(), &group.0.to_be_bytes())?.remove(&group).unwrap_or_default();
                // Above the live one also while no mark holds that.
                records.next_generation().max(self.live + 1)
            }
        };
        let mut batch = WriteBatch::new();
        let state = v1::StagedState { format: layout::STAGED_FORMAT, index };
        batch.put(MARKS, record_key(group, Record::Staged(generation)), state.encode_to_vec());
        let had = if fresh { BTreeMap::new() } else { stage::chunks(self.engine(), group, generation)? };
        let plan = Plan::new(chunks, &had);
        for first_key in had.keys().filter(|first_key| !plan.holds(first_key)) {
            batch.delete(MARKS, chunk_key(group, generation, first_key));
        }
        self.engine().write(batch)?;
        let fate = Arc::new(Fate::open());
        self.staged = Some(Staged { generation, index, fate: fate.clone() });
        let held = plan.held();
        let stage = Stage::begin(self.view.clone(), generation, fate, plan, fresh)?;
        Ok(Staging { stage: Box::new(stage), held })
    }

    /// Makes the staged generation the live one, durably.
    pub(crate) fn install(&mut self, stage: Box<dyn SnapshotStage>, mark: &v1::Mark) -> Result<(), Error> {
        let group = self.group();
        let stale = || Error::StaleStage { group };
        let stage = stage.into_any().downcast::<Stage>().map_err(|_| stale())?;
        let ours = self.staged.as_ref().is_some_and(|staged| staged.generation == stage.generation);
        if !ours || stage.view.group != group || !stage.may_be_installed() {
            return Err(stale());
        }
        let mut batch = WriteBatch::new();
        let value = self.mark_value(stage.generation, mark, stage.bytes);
        batch.put(MARKS, record_key(group, Record::Mark), value);
        batch.delete(MARKS, record_key(group, Record::Staged(stage.generation)));
        for first_key in stage.first_keys() {
            batch.delete(MARKS, chunk_key(group, stage.generation, first_key));
        }
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
        if let Some(staged) = self.staged.take() {
            staged.fate.close();
        }
        self.view.live.store(0, Ordering::Release);
        let records = scan_records(self.engine(), &group.0.to_be_bytes())?.remove(&group).unwrap_or_default();
        let mut batch = WriteBatch::new();
        let mut died: Vec<u32> = records.staged.keys().copied().collect();
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
