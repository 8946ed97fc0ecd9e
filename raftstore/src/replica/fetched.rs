//! Entries that raft wanted and the log had to read from disk.

use pontoon_wal as wal;

use super::{Alive, Replica, guarded};
use crate::{
    effects::{Effects, FetchTask},
    storage::{UNKNOWN_KIND, entries_from_wal},
};

impl Replica {
    /// Asks the log for what raft could not be given.
    pub(crate) fn want_entries(&self, fx: &mut Effects) {
        let (group, replica) = (self.group, self.id);
        let wanted = self.raw.store().take_wanted();
        fx.fetch.extend(wanted.into_iter().map(|(low, high, max_bytes)| FetchTask {
            group,
            replica,
            low,
            high,
            max_bytes,
        }));
    }

    /// What was read is there, or why not: raft asks again for each follower that it was for.
    pub(crate) fn fetched(&mut self, low: u64, read: Result<Vec<wal::Entry>, wal::Error>) -> Alive<()> {
        let entries = match read {
            Ok(entries) => Some(entries_from_wal(entries).ok_or(UNKNOWN_KIND)?),
            // Truncated or cut meanwhile, or the node stops: raft finds out by itself.
            Err(wal::Error::Compacted { .. } | wal::Error::Unavailable { .. } | wal::Error::Closed) => None,
            Err(error) => return Err(error.to_string()),
        };
        let contexts = self.raw.store().fetched(low, entries);
        if self.installing.is_some() {
            // Raft is left alone, and leads nobody any more.
            self.raw.store().forget();
            return Ok(());
        }
        let raw = &mut self.raw;
        let answered = guarded(|| contexts.into_iter().for_each(|context| raw.on_entries_fetched(context)));
        self.raw.store().forget();
        answered
    }
}
