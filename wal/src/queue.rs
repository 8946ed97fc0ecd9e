//! The way from submitters to the writer: order is given here.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, PoisonError, Weak},
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

/// Who hears of a submitter's batches. Calls come from the log's writer, one at a time, without any of the log's locks
/// that readers or submitters need; they should hand over and return.
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
    result: Mutex<Option<Result<()>>>,
    done: Condvar,
}

impl Waiter {
    pub(crate) fn complete(&self, result: Result<()>) {
        self.result.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(result);
        self.done.notify_one();
    }

    pub(crate) fn poll(&self) -> Option<Result<()>> {
        self.result.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn wait(&self) -> Result<()> {
        let mut result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match &*result {
                Some(result) => return result.clone(),
                None => result = self.done.wait(result).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

/// A batch on its way to the disk.
pub(crate) struct Queued {
    pub(crate) data: Bytes,
    pub(crate) dir: Vec<u8>,
    pub(crate) records: u32,
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

    /// Whether only a waiting thread hears of it.
    pub(crate) fn is_commit(&self) -> bool {
        matches!(self.ack, Ack::Waiter(_))
    }
}

/// How the writer's thread sleeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sleeping {
    /// It does not, or there is no such thread.
    No,
    /// Until a moment at which it looks anyway.
    Timed,
    /// Until it is told.
    Untold,
}

/// What waits for the writer.
///
/// Invariants: LSNs in `batches` ascend without a gap and end below `next_lsn`; the index shows exactly what was ever
/// queued here, in this order.
pub(crate) struct Queue {
    pub(crate) batches: VecDeque<Queued>,
    pub(crate) next_lsn: u64,
    /// How many of the batches are not relaxed.
    pub(crate) urgent: usize,
    /// Relaxed batches are wanted on disk too.
    pub(crate) flush: bool,
    /// Rises with everything that the writer might wait for.
    pub(crate) signal: u64,
    /// What the writer's thread waits for.
    pub(crate) sleeping: Sleeping,
    /// The writer's thread ends when it has nothing to do.
    pub(crate) stop: bool,
    /// No more batches are taken.
    pub(crate) closed: bool,
    /// The failure that stopped the log.
    pub(crate) poison: Option<Arc<Error>>,
    /// Everybody who hears of failures and events.
    pub(crate) sinks: Vec<Weak<SinkSlot>>,
}

impl Queue {
    pub(crate) fn new(next_lsn: u64) -> Queue {
        Queue {
            batches: VecDeque::new(),
            next_lsn,
            urgent: 0,
            flush: false,
            signal: 0,
            sleeping: Sleeping::No,
            stop: false,
            closed: false,
            poison: None,
            sinks: Vec::new(),
        }
    }

    /// Whether the writer should write now.
    pub(crate) fn wants_write(&self) -> bool {
        self.poison.is_none() && (self.urgent > 0 || self.flush && !self.batches.is_empty())
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
