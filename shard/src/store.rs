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
//! 2. While rows are staged: the record `Staged` was written before the first of them, and a chunk's record `Chunk` with
//!    or after the last of its rows. What has no such record is deleted before it is received again; what has one is
//!    taken over by the next stage if the state that comes then has the very same chunk. The record of a chunk that is
//!    replaced is deleted before its rows are touched. See [`stage`].
//! 3. At the switch: either the old mark is there and `Staged` (case 2), or the new one, with `Dead` for the old
//!    generation in the same batch.
//! 4. While a dead generation is dropped: its `Dead` record stands until the last row is gone. Dropping begins only
//!    after the batch that declared it dead was flushed, else a power cut could bring the old mark back over rows that
//!    are half gone.
//! 5. A generation's number is taken again only after its record is gone, thus after its rows.

mod group;
mod stage;
mod view;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use pontoon_proto::{GroupId, v1};
use prost::Message;

pub(crate) use self::{group::GroupStore, view::GroupView};
use crate::{
    engine::{Engine, Scope, WriteBatch, prefix_end},
    error::Error,
    layout::{self, MARKS, Record, chunk_prefix, data_space, generation_prefix, record_key},
};

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
    /// Dead by a batch that is not durable yet.
    doomed: Mutex<Vec<DeadGeneration>>,
}

/// What the marks keyspace says about a group.
#[derive(Debug, Clone, Default)]
pub(crate) struct Known {
    mark: Option<v1::EngineMark>,
    /// Generations that are being received, and the index of the state that comes.
    staged: BTreeMap<u32, u64>,
    dead: Vec<u32>,
}

impl Known {
    /// A number that no generation of the group has, dead ones included.
    fn next_generation(&self) -> u32 {
        let live = self.mark.as_ref().map_or(0, |mark| mark.generation);
        self.staged.keys().chain(&self.dead).copied().fold(live, u32::max) + 1
    }
}

impl Shared {
    /// Reads the marks of all groups in one scan, declares dead what nobody will go on to receive, and makes that durable.
    /// Of what an earlier run left staged, each group keeps the last one, unless the live generation has got there.
    pub(crate) fn open(engine: Arc<dyn Engine>) -> Result<(Arc<Shared>, BTreeMap<GroupId, Known>), Error> {
        let mut known = scan_records(&*engine, &[])?;
        let mut batch = WriteBatch::new();
        let mut dead = VecDeque::new();
        for (group, known) in &mut known {
            let live = known.mark.as_ref().and_then(|mark| mark.mark.as_ref()).map_or(0, |mark| mark.index);
            let newest = known.staged.keys().next_back().copied();
            for (generation, _) in
                known.staged.extract_if(.., |at, index| Some(*at) != newest || *index <= live)
            {
                declare_dead(&mut batch, *group, generation);
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
        Ok((Arc::new(Shared { engine, dead: Mutex::new(dead), doomed: Mutex::default() }), known))
    }

    /// Makes durable what was written, the deaths of generations among it.
    pub(crate) fn flush(&self) -> Result<(), Error> {
        let doomed = std::mem::take(&mut *self.doomed());
        let flushed = self.engine.flush();
        match flushed {
            Ok(()) => self.queue().extend(doomed),
            Err(_) => self.doomed().extend(doomed),
        }
        flushed
    }

    /// The generation is dead by a batch that was written: its rows may go after the next flush.
    fn doom(&self, group: GroupId, generation: u32) {
        self.doomed().push(DeadGeneration { group, generation });
    }

    fn doomed(&self) -> std::sync::MutexGuard<'_, Vec<DeadGeneration>> {
        self.doomed.lock().unwrap_or_else(PoisonError::into_inner)
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
            let chunks = chunk_prefix(group, generation);
            if finished && self.engine.delete_prefix(MARKS, &chunks, rows)? {
                let mut batch = WriteBatch::new();
                batch.delete(MARKS, record_key(group, Record::Dead(generation)));
                self.engine.write(batch)?;
                return Ok(true);
            }
            Ok(false)
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
            Record::Staged(generation) => {
                // One of another version, that knows other chunks, is received anew: no state stands at so low an index.
                let state =
                    v1::StagedState::decode(value).ok().filter(|state| state.format == layout::STAGED_FORMAT);
                known.staged.insert(generation, state.map_or(0, |state| state.index));
            }
            Record::Dead(generation) => known.dead.push(generation),
            Record::Chunk => {}
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

fn declare_dead(batch: &mut WriteBatch, group: GroupId, generation: u32) {
    batch.delete(MARKS, record_key(group, Record::Staged(generation)));
    batch.put(MARKS, record_key(group, Record::Dead(generation)), Bytes::new());
}
