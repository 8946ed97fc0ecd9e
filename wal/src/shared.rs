//! What the doors, the writer and the background share.

use std::{
    collections::HashMap,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    sync::Arc,
};

use bytes::Bytes;
use pontoon_proto::GroupId;

use crate::{
    Batch, Error, Lsn, MAX_BATCH_BYTES, Options, Result,
    index::{Index, Place, Sim},
    queue::{Ack, Queue, Queued},
    record::{self, Body, Head},
    space::{Reservation, Space},
};

/// One open log.
///
/// Locks are taken in this order: writer, background, queue, segments, a shard of the index, cache. Callbacks run under
/// the writer's only, I/O of the write path too; readers take a shard's lock and the cache's, never during I/O.
pub(crate) struct Shared {
    pub(crate) options: Options,
    pub(crate) index: Index,
    pub(crate) space: Arc<Space>,
    queue: Mutex<Queue>,
    /// The writer has something to do.
    pub(crate) work: Condvar,
}

impl Shared {
    pub(crate) fn new(options: Options) -> Shared {
        let space = Space::new(options.max_pending_bytes);
        Shared { options, index: Index::new(), space, queue: Mutex::new(Queue::new(1)), work: Condvar::new() }
    }

    pub(crate) fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn max_batch_bytes(&self) -> u64 {
        MAX_BATCH_BYTES.min(self.options.segment_bytes / 4)
    }

    /// Checks a batch, gives it its place in the order, shows it to readers and queues it.
    pub(crate) fn submit(&self, batch: Batch, mut reservation: Reservation, ack: Ack) -> Result<Lsn> {
        if let Some(mistake) = batch.mistake {
            return Err(mistake);
        }
        let (size, limit) = (batch.size_bytes(), self.max_batch_bytes());
        if size > limit {
            return Err(Error::TooLarge { what: "a batch", size, limit });
        }
        reservation.cover(size);
        let Batch { data, dir, records, relaxed, .. } = batch;
        let data = Bytes::from(data);
        let decoded = decode_all(&data);
        let mut queue = self.queue();
        queue.check_open()?;
        check_all(&self.index, &decoded)?;
        let first_lsn = queue.next_lsn;
        for (nth, (head, body)) in decoded.into_iter().enumerate() {
            apply(&self.index, &head, body, &Place::Memory { lsn: first_lsn + nth as u64 });
        }
        queue.next_lsn += u64::from(records);
        let queued = Queued { data, dir, records, first_lsn, relaxed, ack, reservation };
        let lsn = Lsn(queued.last_lsn());
        queue.urgent += usize::from(!relaxed);
        queue.batches.push_back(queued);
        drop(queue);
        self.work.notify_one();
        Ok(lsn)
    }
}

/// The records of a batch, which this process encoded itself.
fn decode_all(data: &Bytes) -> Vec<(Head, Body)> {
    let mut records = Vec::new();
    let mut offset = 0;
    while offset < data.len() {
        let (head, body) = record::decode(&data.slice(offset..)).expect("a batch holds well-formed records");
        offset += head.padded();
        records.push((head, body));
    }
    records
}

/// Checks all records against the groups as they are and as the batch changes them.
fn check_all(index: &Index, records: &[(Head, Body)]) -> Result<()> {
    let mut groups: HashMap<GroupId, Sim> = HashMap::new();
    for (head, body) in records {
        index.with(head.group, |state| {
            let sim = groups.entry(head.group).or_insert_with(|| state.sim());
            sim.check(head.group, body, Some(state))
        })
        .unwrap_or_else(|| groups.entry(head.group).or_default().check(head.group, body, None))?;
    }
    Ok(())
}

/// Applies one record to the index.
pub(crate) fn apply(index: &Index, head: &Head, body: Body, place: &Place<'_>) {
    match body {
        Body::Destroy { min_replica } => index.destroy(head.group, min_replica),
        body => index.with_entry(head.group, |group| group.apply(head, body, place)),
    }
}
