//! What readers of a group share with its machine, and reads that no switch of generations disturbs.

use std::sync::{
    Arc,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

use bytes::Bytes;
use pontoon_proto::{GroupId, v1};

use super::{Shared, decode_mark};
use crate::{
    engine::{EngineSnapshot, Keyspace, Scope},
    error::Error,
    layout::{MARKS, Record, generation_prefix, record_key, row_key},
};

/// A group's rows, for any thread.
pub(crate) struct GroupView {
    pub(crate) shared: Arc<Shared>,
    pub(crate) group: GroupId,
    pub(crate) space: Keyspace,
    /// The live generation; 0 once the group is destroyed. Stored after the switch and before the old generation is
    /// queued for dropping, so a reader that finds it unchanged after its read has read whole rows.
    pub(super) live: AtomicU32,
    pub(super) bytes: AtomicU64,
}

impl GroupView {
    /// False from the group's destruction on.
    pub(crate) fn is_there(&self) -> bool {
        self.live.load(Ordering::Acquire) != 0
    }

    /// About how many bytes the live generation holds.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// The live row of a logical key.
    pub(crate) fn get(&self, logical: &[u8]) -> Result<Option<Bytes>, Error> {
        self.live(|generation| self.shared.engine.get(self.space, &row_key(self.group, generation, logical)))
    }

    /// The live generation and a point-in-time view of it and of the group's mark.
    pub(crate) fn snapshot(&self) -> Result<(u32, Box<dyn EngineSnapshot>), Error> {
        let mark = Scope { space: MARKS, prefix: record_key(self.group, Record::Mark) };
        self.live(|generation| {
            let prefix = Bytes::copy_from_slice(&generation_prefix(self.group, generation));
            let rows = Scope { space: self.space, prefix };
            Ok((generation, self.shared.engine.snapshot(vec![mark.clone(), rows])?))
        })
    }

    /// The index of the last command that a snapshot shows; 0 if none was applied yet.
    pub(crate) fn index_of(&self, snapshot: &dyn EngineSnapshot) -> Result<u64, Error> {
        Ok(self.mark_of(snapshot)?.index)
    }

    /// The mark that a snapshot shows; all zeros if nothing was applied yet.
    pub(crate) fn mark_of(&self, snapshot: &dyn EngineSnapshot) -> Result<v1::Mark, Error> {
        let Some(mark) = snapshot.get(MARKS, &record_key(self.group, Record::Mark))? else {
            return Ok(v1::Mark::default());
        };
        Ok(decode_mark(self.group, &mark)?.mark.unwrap_or_default())
    }

    /// Runs `read` on the live generation; once more, if another became the live one meanwhile, since the old one's
    /// rows may have been dropped under the read.
    fn live<T>(&self, mut read: impl FnMut(u32) -> Result<T, Error>) -> Result<T, Error> {
        loop {
            let generation = self.live.load(Ordering::Acquire);
            if generation == 0 {
                return Err(Error::Gone { group: self.group });
            }
            let found = read(generation);
            if self.live.load(Ordering::Acquire) == generation {
                return found;
            }
        }
    }
}
