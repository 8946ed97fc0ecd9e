//! Raft's `Storage` over the shared log.
//!
//! What a leader sends to a follower that lags may lie on disk only. Raft allows that read to be answered later: it is
//! refused as temporarily unavailable, noted in [`Fetching`], carried out by the log's readers, and raft asks again when it
//! is there. So a core loop never waits for the disk on account of a slow follower.

use std::{cell::RefCell, collections::BTreeMap};

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
    /// What raft asks for once, when it is made.
    initial: RefCell<Option<Box<(wal::HardState, v1::ConfState)>>>,
    /// Index, term and configuration that the state machine stands at.
    pub(crate) offer: Option<(u64, u64, v1::ConfState)>,
    fetching: RefCell<Fetching>,
}

/// So many questions of raft wait for the same entries at most, one for each follower; the next heartbeat asks again for
/// one that is not noted.
const MAX_ASKED: usize = 8;

/// Reads that raft waits for.
#[derive(Default)]
struct Fetching {
    /// By first index.
    reads: BTreeMap<u64, Asked>,
    /// What was read from an index on, while raft asks for it again.
    fetched: Option<(u64, Vec<pb::Entry>)>,
}

/// A read and the questions that it answers.
struct Asked {
    high: u64,
    max_bytes: u64,
    contexts: Vec<GetEntriesContext>,
    /// The log was asked.
    is_under_way: bool,
}

impl GroupStorage {
    /// Raft is made, and asks no more where the group stands.
    pub(crate) fn opened(&self) {
        *self.initial.borrow_mut() = None;
    }

    /// Whether there are reads that the log has not been asked for.
    pub(crate) fn has_wanted(&self) -> bool {
        self.fetching.borrow().reads.values().any(|asked| !asked.is_under_way)
    }

    /// Reads that the log has not been asked for yet: `[low, high)` and the bytes that are wanted at most.
    pub(crate) fn take_wanted(&self) -> Vec<(u64, u64, u64)> {
        let mut fetching = self.fetching.borrow_mut();
        let new = fetching.reads.iter_mut().filter(|(_, asked)| !asked.is_under_way);
        new.map(|(low, asked)| {
            asked.is_under_way = true;
            (*low, asked.high, asked.max_bytes)
        })
        .collect()
    }

    /// What was read from an index on, if anything; the questions that waited for it. To be ended by [`Self::forget`].
    pub(crate) fn fetched(&self, low: u64, entries: Option<Vec<pb::Entry>>) -> Vec<GetEntriesContext> {
        let mut fetching = self.fetching.borrow_mut();
        fetching.fetched = entries.map(|entries| (low, entries));
        fetching.reads.remove(&low).map(|asked| asked.contexts).unwrap_or_default()
    }

    /// What was read is not kept: by the next question the log may say something else.
    pub(crate) fn forget(&self) {
        self.fetching.borrow_mut().fetched = None;
    }

    /// Notes a question that has to wait.
    fn ask(&self, low: u64, high: u64, max_bytes: u64, context: GetEntriesContext) {
        let mut fetching = self.fetching.borrow_mut();
        let asked = fetching.reads.entry(low).or_insert_with(|| Asked {
            high,
            max_bytes,
            contexts: Vec::new(),
            is_under_way: false,
        });
        if asked.contexts.len() < MAX_ASKED {
            asked.contexts.push(context);
        }
    }

    pub(crate) fn new(wal: Wal, group: GroupId, hard_state: wal::HardState, conf: v1::ConfState) -> Self {
        GroupStorage {
            wal,
            group,
            initial: RefCell::new(Some(Box::new((hard_state, conf)))),
            offer: None,
            fetching: RefCell::default(),
        }
    }
}

/// What is wrong with an entry that a newer version may have written.
pub(crate) const UNKNOWN_KIND: &str = "an entry of an unknown kind in the log";

/// Entries as raft wants them; `None` if one is of an unknown kind.
pub(crate) fn entries_from_wal(entries: Vec<wal::Entry>) -> Option<Vec<pb::Entry>> {
    entries.into_iter().map(convert::entry_from_wal).collect()
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
        let initial = self.initial.borrow();
        let (wal::HardState { term, vote, commit }, conf) =
            initial.as_deref().unwrap_or_else(|| unreachable!("raft asks before it is made"));
        let (term, vote, commit) = (*term, *vote, *commit);
        let hard_state = pb::HardState { term, vote, commit, ..Default::default() };
        Ok(RaftState { hard_state, conf_state: convert::conf_to_raft(conf) })
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        context: GetEntriesContext,
    ) -> raft::Result<Vec<pb::Entry>> {
        let max_bytes = max_size.into().unwrap_or(u64::MAX);
        let mut found = Vec::new();
        if context.can_async() {
            if let Some((_, entries)) =
                self.fetching.borrow().fetched.as_ref().filter(|(from, _)| *from == low)
            {
                return Ok(entries.clone());
            }
            let is_here = self.wal.entries_now(self.group, low..high, max_bytes, &mut found);
            if !is_here.map_err(to_raft)? {
                self.ask(low, high, max_bytes, context);
                return Err(raft::Error::Store(StorageError::LogTemporarilyUnavailable));
            }
        } else {
            self.wal.entries(self.group, low..high, max_bytes, &mut found).map_err(to_raft)?;
        }
        entries_from_wal(found).ok_or_else(|| raft::Error::Store(StorageError::Other(UNKNOWN_KIND.into())))
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        self.wal.term(self.group, index).map_err(to_raft)
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.wal.bounds(self.group).map_or(1, |(first, _)| first))
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.wal.bounds(self.group).map_or(0, |(_, last)| last))
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
