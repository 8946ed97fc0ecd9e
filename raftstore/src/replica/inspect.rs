//! What waits in a replica, for somebody who looks for a fault.

use pontoon_proto::ReplicaId;

use super::Replica;

/// What waits in a replica, of [`crate::Group::depths`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Depths {
    /// Commands that wait to be committed and applied, on the leader.
    pub proposals: usize,
    /// Reads that wait for a confirmation, or for what they were confirmed to be applied.
    pub reads: usize,
    /// Messages that wait until something is durable here.
    pub held_messages: usize,
    /// Entries that are committed and were not handed to the applier yet.
    pub committed: usize,
    /// Bytes of entries that were handed to the applier, and are not applied.
    pub unapplied_bytes: u64,
    /// Writes of the log that were asked for, and those of them that are durable: the two differ while a sync is under way.
    pub log_writes: (u64, u64),
    /// Bytes that the group's entries take in the log.
    pub log_bytes: u64,
    /// What is under way to each follower, on the leader.
    pub flights: Vec<Flight>,
}

/// What is under way to a follower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flight {
    /// The follower.
    pub replica: ReplicaId,
    /// Append messages that were sent and are not answered.
    pub appends: usize,
    /// Bytes of their entries.
    pub bytes: u64,
}

impl Replica {
    /// What waits.
    pub(crate) fn depths(&self, log_bytes: u64) -> Depths {
        let flight = |(id, appends, bytes): (u64, usize, u64)| {
            Some(Flight { replica: ReplicaId::new(id).ok()?, appends, bytes })
        };
        Depths {
            proposals: self.proposals.len(),
            reads: self.reads.waiting(),
            held_messages: self.held.iter().map(|(_, messages)| messages.len()).sum(),
            committed: self.committed.len(),
            unapplied_bytes: self.unapplied_bytes,
            log_writes: (self.last_sync_number, self.persisted_number),
            log_bytes,
            flights: self.flights.each().filter_map(flight).collect(),
        }
    }
}
