//! What backups take of this node: how many are under way, and how fast they may read.
//!
//! They give way to clients as received states do (decision 22): of a budget with a name they use as much as clients here do not
//! notice. All streams share it.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Instant,
};

use pontoon_proto::v1::{self, meta_command::Body};
use pontoon_raftstore::{Pace, SnapshotBudget};
use tonic::Status;

use crate::shared::Shared;

/// What a backup's id may have.
const ID_MOST: usize = 64;

/// The streams of this node, and what was noted of them.
#[derive(Debug)]
pub(crate) struct Backups {
    active: AtomicUsize,
    pace: Mutex<Pace>,
    begun: Instant,
    /// Bytes of chunks that were handed out.
    pub(crate) given_bytes: AtomicU64,
    /// When somebody last noted here that a backup of all predicates is done, in seconds since 1970; 0: not since the start.
    pub(crate) last_done: AtomicU64,
}

impl Backups {
    pub(crate) fn new() -> Self {
        Backups {
            active: AtomicUsize::new(0),
            pace: Mutex::default(),
            begun: Instant::now(),
            given_bytes: AtomicU64::new(0),
            last_done: AtomicU64::new(0),
        }
    }

    /// A stream begins, until what is returned is dropped.
    pub(crate) fn begin(&self) -> Busy<'_> {
        self.active.fetch_add(1, Ordering::Relaxed);
        Busy(self)
    }

    /// Streams under way.
    pub(crate) fn active(&self) -> usize {
        self.active.load(Ordering::Relaxed)
    }

    /// Time goes on; to be called again and again. `strained`: clients here wait longer than they do without copies.
    pub(crate) fn tick(&self, strained: bool) {
        let copies = self.active() > 0;
        self.lock().look(self.begun.elapsed(), copies, strained);
    }

    /// Blocks until so many bytes fit into the budget.
    pub(crate) fn pace(&self, bytes: usize, budget: SnapshotBudget) {
        let pause = {
            let (mut pace, now) = (self.lock(), self.begun.elapsed());
            let (pause, rate) = (pace.rest(now), pace.rate(budget));
            pace.spend(now + pause, bytes, rate);
            pause
        };
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stream that is under way.
#[derive(Debug)]
pub(crate) struct Busy<'a>(&'a Backups);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Shared {
    /// The budget of a backup: what its caller says, or what the cluster's rules or this node say of states.
    pub(crate) fn backup_budget(&self, asked: &str) -> Result<SnapshotBudget, Status> {
        match asked {
            "" => Ok(self.map.view().budget().unwrap_or(self.budget)),
            asked => asked
                .parse()
                .map_err(|error: pontoon_raftstore::Error| Status::invalid_argument(error.to_string())),
        }
    }
}

impl Shared {
    /// Answers [`v1::BackupNoteRequest`] on the leader of the meta group: what was done becomes an event.
    pub(crate) async fn backup_note(
        self: &std::sync::Arc<Self>,
        request: v1::BackupNoteRequest,
    ) -> Result<v1::BackupNoteReply, Status> {
        if !matches!(request.action.as_str(), "backup" | "restore") || request.id.len() > ID_MOST {
            return Err(Status::invalid_argument("backup or restore, and the id of a backup"));
        }
        let v1::BackupNoteRequest { action, id, predicates, rows, bytes, stored_bytes, .. } = request;
        let mut text = format!("{action} {id}: {predicates} predicates, {rows} rows, {bytes} bytes");
        if action == "backup" {
            text.push_str(&format!(", {stored_bytes} stored"));
        }
        self.meta_done(Body::NoteEvent(v1::NoteEvent { text })).await?;
        Ok(v1::BackupNoteReply {})
    }
}
