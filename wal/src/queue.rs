//! The way from submitters to the writer: order is given here.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
};

use bytes::Bytes;

use crate::{Error, Lsn, Result, space::Reservation, types::WalEvent};

/// A submitted batch that is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Persisted {
    /// What the submitter gave with it.
    pub token: u64,
    /// The LSN of its last record.
    pub lsn: Lsn,
}

/// Who hears of a submitter's batches. Calls come from the log's writer, one at a time, without any of the log's locks; they
/// should hand over and return.
pub trait PersistSink: Send + Sync {
    /// These batches are durable, in the order of their submission; one call per frame.
    fn persisted(&self, done: &[Persisted]);
    /// The log failed: nothing that was not reported as persisted will be. Called once.
    fn failed(&self, error: &Error);
    /// Something happened that an operator may want to know. Comes from either of the log's threads.
    fn event(&self, _event: &WalEvent) {}
}

/// A submitter's sink as the queue knows it.
pub(crate) struct SinkSlot {
    pub(crate) sink: Arc<dyn PersistSink>,
}

/// Who waits for a batch.
#[derive(Clone)]
pub(crate) enum Ack {
    Sink(Arc<SinkSlot>, u64),
    Waiter(Arc<Waiter>),
}

/// A thread that waits for one batch.
#[derive(Default)]
pub(crate) struct Waiter {
    state: Mutex<WaiterState>,
    changed: Condvar,
}

#[derive(Default)]
struct WaiterState {
    result: Option<Result<()>>,
    lead: bool,
}

/// Why a wait is over.
pub(crate) enum Wake {
    /// The batch is durable, or lost.
    Done(Result<()>),
    /// Somebody has to write, and this thread is awake anyway.
    Lead,
}

impl Waiter {
    fn state(&self) -> MutexGuard<'_, WaiterState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn complete(&self, result: Result<()>) {
        self.state().result.get_or_insert(result);
        self.changed.notify_one();
    }

    /// Asks the thread to write what waits, its own batch included.
    pub(crate) fn lead(&self) {
        self.state().lead = true;
        self.changed.notify_one();
    }

    pub(crate) fn poll(&self) -> Option<Result<()>> {
        self.state().result.clone()
    }

    pub(crate) fn wait(&self) -> Wake {
        let mut state = self.state();
        loop {
            if let Some(result) = &state.result {
                return Wake::Done(result.clone());
            }
            if std::mem::take(&mut state.lead) {
                return Wake::Lead;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A batch on its way to the disk.
pub(crate) struct Queued {
    /// Plain, whatever the log does with it on its way to the disk.
    pub(crate) data: Bytes,
    /// What sealing will add to the data.
    pub(crate) tags_len: usize,
    pub(crate) dir: Vec<u8>,
    pub(crate) records: u32,
    /// How many of the records hold entries: the segment's footer lists those.
    pub(crate) entry_records: u32,
    pub(crate) first_lsn: u64,
    pub(crate) relaxed: bool,
    pub(crate) ack: Ack,
    /// Given back, by its drop, when the batch is durable or lost.
    pub(crate) _reservation: Reservation,
}

impl Queued {
    pub(crate) fn last_lsn(&self) -> u64 {
        self.first_lsn + u64::from(self.records) - 1
    }

    /// What its records take in a frame.
    pub(crate) fn records_len(&self) -> usize {
        self.data.len() + self.tags_len
    }

    /// Whether only a waiting thread hears of it.
    pub(crate) fn is_commit(&self) -> bool {
        matches!(self.ack, Ack::Waiter(_))
    }
}

/// Bytes that are worth a write of their own, however many batches are under way.
const ENOUGH_BYTES: usize = 128 << 10;

/// What waits for the writer.
///
/// Invariants: LSNs in `batches` ascend without a gap and end below `next_lsn`; the index shows exactly what was ever
/// queued here, in this order; `bytes` is what `batches` take in frames.
pub(crate) struct Queue {
    pub(crate) batches: VecDeque<Queued>,
    pub(crate) bytes: usize,
    pub(crate) next_lsn: u64,
    /// How many of the batches are not relaxed.
    pub(crate) urgent: usize,
    /// Relaxed batches are wanted on disk too.
    pub(crate) flush: bool,
    /// How many frames may be under way at once.
    depth: usize,
    /// Frames under way, and the batches in them.
    pub(crate) flying_frames: usize,
    pub(crate) flying_batches: usize,
    /// Rises with everything that the writer's threads might wait for.
    pub(crate) signal: u64,
    /// How many of the writer's threads sleep.
    pub(crate) sleeping: usize,
    /// One of them sleeps until a moment only: it sees to the watermark and to writes that take too long.
    pub(crate) watched: bool,
    /// The writer's threads end when there is nothing to do.
    pub(crate) stop: bool,
    /// No more batches are taken.
    pub(crate) closed: bool,
    /// The failure that stopped the log.
    pub(crate) poison: Option<Arc<Error>>,
    /// Everybody who hears of failures and events.
    pub(crate) sinks: Vec<Weak<SinkSlot>>,
}

impl Queue {
    pub(crate) fn new(next_lsn: u64, depth: usize) -> Queue {
        Queue {
            batches: VecDeque::new(),
            bytes: 0,
            next_lsn,
            urgent: 0,
            flush: false,
            depth,
            flying_frames: 0,
            flying_batches: 0,
            signal: 0,
            sleeping: 0,
            watched: false,
            stop: false,
            closed: false,
            poison: None,
            sinks: Vec::new(),
        }
    }

    /// Whether something waits that should be on disk.
    pub(crate) fn has_work(&self) -> bool {
        self.poison.is_none() && (self.urgent > 0 || self.flush && !self.batches.is_empty())
    }

    /// Whether the writer should write now. While something is under way, small writes wait until there are as many
    /// batches for the next one: otherwise each submitter would soon have a write of its own, and the device as many
    /// syncs as batches.
    pub(crate) fn wants_write(&self) -> bool {
        let worth_it = self.batches.len() >= self.flying_batches || self.bytes >= ENOUGH_BYTES;
        self.has_work() && (self.flying_frames == 0 || self.flying_frames < self.depth && worth_it)
    }

    /// Whether one of the writer's threads should look, and is asleep.
    pub(crate) fn wants_thread(&self) -> bool {
        self.sleeping > 0 && (!self.watched || self.stop || self.poison.is_some() || self.wants_write())
    }

    /// Refuses what may not enter any more.
    pub(crate) fn check_open(&self) -> Result<()> {
        match &self.poison {
            Some(cause) => Err(Error::Poisoned { cause: cause.clone() }),
            None if self.closed => Err(Error::Closed),
            None => Ok(()),
        }
    }

    /// The sinks that are still there.
    pub(crate) fn live_sinks(&mut self) -> Vec<Arc<SinkSlot>> {
        self.sinks.retain(|sink| sink.strong_count() > 0);
        self.sinks.iter().filter_map(Weak::upgrade).collect()
    }
}
