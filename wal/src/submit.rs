//! The door for one submitter.

use std::sync::Arc;

use pontoon_proto::GroupId;

use crate::{
    Batch, Lsn, Result,
    queue::{Ack, SinkSlot},
    shared::Shared,
    space::Reservation,
};

/// Hands batches to the log without blocking; their durability is told to the sink. Clones share the sink.
#[derive(Clone)]
pub struct Submitter {
    pub(crate) shared: Arc<Shared>,
    pub(crate) slot: Arc<SinkSlot>,
}

impl Submitter {
    /// Holds room for a batch of this many bytes of the group's, before anything is promised to anybody.
    ///
    /// # Errors
    /// [`Busy`](crate::Error::Busy) if too much waits for the disk, in all or of this group, [`Quota`](crate::Error::Quota) if the group holds as much as
    /// it may, [`NoSpace`](crate::Error::NoSpace) if the disk or the size limit is reached, [`Poisoned`](crate::Error::Poisoned) or [`Closed`](crate::Error::Closed) if nothing will be
    /// taken any more.
    pub fn try_reserve(&self, group: GroupId, bytes: u64) -> Result<Reservation> {
        self.shared.queue().check_open()?;
        self.shared.check_quota(group)?;
        self.shared.space.try_reserve(bytes)
    }

    /// Holds room from the reserve, for what must be written for the group to live: hard states, truncations,
    /// configuration. Never refused.
    pub fn try_reserve_internal(&self, _group: GroupId) -> Reservation {
        self.shared.space.reserve_internal()
    }

    /// Hands in a batch. Readers see it at once; `token` comes back to the sink when it is durable. Returns the LSN of its
    /// last record.
    ///
    /// Batches for one group are handed in by one thread at a time.
    ///
    /// # Errors
    /// [`Poisoned`](crate::Error::Poisoned) and [`Closed`](crate::Error::Closed); the rest are mistakes of the caller:
    /// [`TooLarge`](crate::Error::TooLarge), [`Gap`](crate::Error::Gap), [`Compacted`](crate::Error::Compacted) (an append
    /// at or below the truncated index), [`Unavailable`](crate::Error::Unavailable) (a truncation beyond the log),
    /// [`TermMismatch`](crate::Error::TermMismatch), [`Damaged`](crate::Error::Damaged). After an error nothing of the
    /// batch was taken.
    pub fn submit(&self, batch: Batch, reservation: Reservation, token: u64) -> Result<Lsn> {
        self.shared.submit(batch, reservation, Ack::Sink(self.slot.clone(), token)).map(|(lsn, _)| lsn)
    }
}

impl std::fmt::Debug for Submitter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Submitter").finish_non_exhaustive()
    }
}
