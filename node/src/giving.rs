//! What backups take of this node: how many are under way, and how fast they may read.
//!
//! They give way to clients as received states do (decision 22): of a budget with a name they use as much as clients here do not
//! notice. All streams share it.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use pontoon_proto::v1::{self, meta_command::Body};
use pontoon_raftstore::{Share, SnapshotBudget};
use tonic::Status;

use crate::shared::Shared;

/// However little it may take, a backup that stands still would keep its point in time for ever.
const PAUSE_MOST: Duration = Duration::from_secs(2);
/// What a backup's id may have.
const ID_MOST: usize = 64;

/// The streams of this node, and what was noted of them.
#[derive(Debug)]
pub(crate) struct Backups {
    active: AtomicUsize,
    pace: Mutex<Pace>,
    /// Bytes of chunks that were handed out.
    pub(crate) given_bytes: AtomicU64,
    /// When somebody last noted here that a backup of all predicates is done, in seconds since 1970; 0: not since the start.
    pub(crate) last_done: AtomicU64,
}

#[derive(Debug)]
struct Pace {
    share: Share,
    /// Until then the budget is used up.
    spent_until: Instant,
}

impl Backups {
    /// `tick`: how often [`Backups::tick`] is called.
    pub(crate) fn new(tick: Duration) -> Self {
        let pace = Pace { share: Share::new(tick), spent_until: Instant::now() };
        Backups {
            active: AtomicUsize::new(0),
            pace: Mutex::new(pace),
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

    /// Time goes on; `strained`: clients here wait longer than they do without copies.
    pub(crate) fn tick(&self, strained: bool) {
        let copies = self.active() > 0;
        self.lock().share.tick(1, copies, strained);
    }

    /// Blocks until so many bytes fit into the budget.
    pub(crate) fn pace(&self, bytes: usize, budget: SnapshotBudget) {
        let pause = self.lock().take(Instant::now(), bytes, budget);
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pace {
    /// How long to wait before these bytes go.
    fn take(&mut self, now: Instant, bytes: usize, budget: SnapshotBudget) -> Duration {
        let Some(whole) = budget.bytes_per_second else { return Duration::ZERO };
        let share = if budget.adapts { self.share.get() } else { Share::WHOLE };
        let rate = (whole as f64 * f64::from(share) / f64::from(Share::WHOLE)).max(1.0);
        let begin = self.spent_until.max(now);
        // What was not used is lost.
        let pause = (begin - now).min(PAUSE_MOST);
        self.spent_until = now + pause + Duration::from_secs_f64((bytes as f64 / rate).min(3_600.0));
        pause
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_shared_by_all_and_what_is_not_used_is_lost() {
        let begun = Instant::now();
        let mut pace = Pace { share: Share::new(Duration::from_millis(250)), spent_until: begun };
        let budget = "1000".parse().unwrap();
        assert_eq!(pace.take(begun, 500, budget), Duration::ZERO);
        assert_eq!(pace.take(begun, 500, budget), Duration::from_millis(500));
        let later = begun + Duration::from_secs(9);
        assert_eq!(pace.take(later, 500, budget), Duration::ZERO);
        assert_eq!(pace.take(later, 500, budget), Duration::from_millis(500));
        assert_eq!(pace.take(later, 500, SnapshotBudget::MAX), Duration::ZERO);
    }

    #[test]
    fn with_a_named_budget_it_gives_way() {
        let begun = Instant::now();
        let backups = Backups::new(Duration::from_millis(250));
        let _busy = backups.begin();
        for _ in 0..40 {
            backups.tick(false);
        }
        let whole = backups.lock().share.get();
        for _ in 0..40 {
            backups.tick(true);
        }
        assert!(backups.lock().share.get() < whole / 8);
        let mut pace = backups.lock();
        pace.spent_until = begun;
        pace.take(begun, 128 << 20, SnapshotBudget::NORMAL);
        assert_eq!(pace.take(begun, 1, SnapshotBudget::NORMAL), PAUSE_MOST);
    }
}
