//! A segment in use: one fixed-size file that takes frames from one open of the log.

use std::{
    fmt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::fs::File;

/// One use of a segment file. The epoch is drawn anew for each use, so frames of an earlier one never validate. Whoever
/// holds the `Arc` keeps the file from being used again.
pub(crate) struct Segment {
    pub(crate) id: u32,
    pub(crate) epoch: u128,
    pub(crate) path: PathBuf,
    pub(crate) file: Arc<dyn File>,
    /// Bytes of records with entries that the index still points at.
    live: AtomicU64,
}

impl Segment {
    pub(crate) fn new(id: u32, epoch: u128, path: PathBuf, file: Arc<dyn File>) -> Segment {
        Segment { id, epoch, path, file, live: AtomicU64::new(0) }
    }

    pub(crate) fn live_bytes(&self) -> u64 {
        self.live.load(Ordering::Acquire)
    }

    pub(crate) fn add_live(&self, bytes: u64) {
        self.live.fetch_add(bytes, Ordering::AcqRel);
    }

    /// Starts the count anew, before anybody else has seen the segment.
    pub(crate) fn forget_live(&self) {
        self.live.store(0, Ordering::Release);
    }

    pub(crate) fn sub_live(&self, bytes: u64) {
        let before = self.live.fetch_sub(bytes, Ordering::AcqRel);
        debug_assert!(before >= bytes, "segment {} releases more than it holds", self.id);
    }
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Segment({:08x}, live {})", self.id, self.live_bytes())
    }
}

/// The file name of a segment.
pub(crate) fn segment_name(id: u32) -> String {
    format!("seg-{id:08x}.wal")
}

/// The id in a segment's file name.
pub(crate) fn segment_id(name: &str) -> Option<u32> {
    let digits = name.strip_prefix("seg-")?.strip_suffix(".wal")?;
    (digits.len() == 8).then(|| u32::from_str_radix(digits, 16).ok()).flatten()
}
