//! Raft's `Storage` over the shared log.

use pontoon_proto::{GroupId, v1};
use pontoon_wal::{self as wal, Wal};
use raft::{GetEntriesContext, RaftState, StorageError, eraftpb as pb};

use crate::convert;

/// One group's view of the log, as raft wants it.
///
/// Invariants: what was submitted is readable here before it is durable; `offer` is a state that this replica's engine
/// holds, so a snapshot is never offered that could not be served.
pub(crate) struct GroupStorage {
    wal: Wal,
    group: GroupId,
    initial: (wal::HardState, v1::ConfState),
    /// Index, term and configuration that the state machine stands at.
    pub(crate) offer: Option<(u64, u64, v1::ConfState)>,
}

impl GroupStorage {
    pub(crate) fn new(wal: Wal, group: GroupId, hard_state: wal::HardState, conf: v1::ConfState) -> Self {
        GroupStorage { wal, group, initial: (hard_state, conf), offer: None }
    }
}

/// Compacted and Unavailable are answers raft knows; everything else ends this replica (the caller catches the panic).
fn to_raft(error: wal::Error) -> raft::Error {
    match error {
        wal::Error::Compacted { .. } => raft::Error::Store(StorageError::Compacted),
        wal::Error::Unavailable { .. } => raft::Error::Store(StorageError::Unavailable),
        other => raft::Error::Store(StorageError::Other(Box::new(other))),
    }
}

impl raft::Storage for GroupStorage {
    fn initial_state(&self) -> raft::Result<RaftState> {
        let wal::HardState { term, vote, commit } = self.initial.0;
        let hard_state = pb::HardState { term, vote, commit, ..Default::default() };
        Ok(RaftState { hard_state, conf_state: convert::conf_to_raft(&self.initial.1) })
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<pb::Entry>> {
        let max_bytes = max_size.into().unwrap_or(u64::MAX);
        let mut found = Vec::new();
        self.wal.entries(self.group, low..high, max_bytes, &mut found).map_err(to_raft)?;
        found
            .into_iter()
            .map(|entry| {
                convert::entry_from_wal(entry).ok_or_else(|| {
                    raft::Error::Store(StorageError::Other("an entry of an unknown kind in the log".into()))
                })
            })
            .collect()
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        self.wal.term(self.group, index).map_err(to_raft)
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.wal.group(self.group).map_or(1, |view| view.first_index))
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.wal.group(self.group).map_or(0, |view| view.last_index))
    }

    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<pb::Snapshot> {
        match &self.offer {
            // A receiver that is not in the configuration would refuse the snapshot, so there is none for it yet.
            Some((index, term, conf)) if *index >= request_index && convert::members(conf).contains(&to) => {
                Ok(convert::snapshot_meta(*index, *term, conf))
            }
            _ => Err(raft::Error::Store(StorageError::SnapshotTemporarilyUnavailable)),
        }
    }
}
