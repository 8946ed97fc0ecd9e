//! The view of one group, in the shape that single-group logs have.

use pontoon_proto::GroupId;

use crate::wal::Wal;

/// One group of a log.
#[derive(Clone)]
pub struct Storage {
    pub(crate) wal: Wal,
    pub(crate) group: GroupId,
}

impl Storage {
    /// The first index that can be read.
    pub fn first_index(&self) -> u64 {
        self.wal.group(self.group).map_or(1, |view| view.first_index)
    }
}
