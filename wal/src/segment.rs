//! A segment in use: one fixed-size file that takes frames from one open of the log.

use std::{
    fmt,
    path::PathBuf,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;

use crate::{
    Result,
    crypt::{Guard, Seal, TAG},
    frame::FrameHeader,
    fs::File,
    record::{self, Head},
};

/// One use of a segment file. The epoch is drawn anew for each use, so frames of an earlier one never validate. Whoever
/// holds the `Arc` keeps the file from being used again.
pub(crate) struct Segment {
    pub(crate) id: u32,
    pub(crate) epoch: u128,
    pub(crate) path: PathBuf,
    pub(crate) file: Arc<dyn File>,
    /// Bytes of records with entries that the index still points at.
    live: AtomicU64,
    /// What seals and opens its records; unset in a segment that is not encrypted or has taken no frame.
    seal: OnceLock<Arc<Seal>>,
    /// In a segment that was there when the log was opened: which of its frames count.
    guard: Option<Guard>,
}

impl Segment {
    pub(crate) fn new(id: u32, epoch: u128, path: PathBuf, file: Arc<dyn File>) -> Segment {
        Segment { id, epoch, path, file, live: AtomicU64::new(0), seal: OnceLock::new(), guard: None }
    }

    pub(crate) fn guarded(self, guard: Guard) -> Segment {
        Segment { guard: Some(guard), ..self }
    }

    /// What its records are sealed with, if they are.
    pub(crate) fn seal(&self) -> Option<&Arc<Seal>> {
        self.seal.get()
    }

    /// Its frames are sealed with this from now on. A segment takes frames of one open, so there is one seal.
    pub(crate) fn set_seal(&self, seal: Option<Arc<Seal>>) {
        if let Some(seal) = seal {
            let known = self.seal.get_or_init(|| seal.clone());
            debug_assert_eq!(known.key_id, seal.key_id, "a segment has one seal");
        }
    }

    /// How much longer a record is here than in memory.
    pub(crate) fn tag_len(&self) -> usize {
        if self.seal.get().is_some() { TAG } else { 0 }
    }

    /// Whether a frame's header is one that this log wrote here.
    ///
    /// # Errors
    /// [`Error::Key`](crate::Error::Key) if that takes a key that is not there.
    pub(crate) fn admits(&self, header: &FrameHeader) -> Result<bool> {
        match (self.seal.get(), &self.guard) {
            (Some(seal), _) => Ok(seal.knows(header)),
            (None, Some(guard)) => guard.admits(header),
            (None, None) => Ok(true),
        }
    }

    /// A live frame with this header was found here: what is sealed here is opened as it asks.
    ///
    /// # Errors
    /// As [`Segment::admits`].
    pub(crate) fn adopt(&self, header: &FrameHeader) -> Result<()> {
        if let (None, Some(guard)) = (self.seal.get(), &self.guard) {
            self.set_seal(guard.seal_of(header)?);
        }
        Ok(())
    }

    /// The directory of a frame of this segment, if these are its bytes and unchanged.
    pub(crate) fn directory(&self, header: &FrameHeader, bytes: &[u8]) -> Option<Vec<Head>> {
        Some(self.lines(header, bytes)?.into_iter().map(|(head, _)| head).collect())
    }

    /// The same, with the LSN of each record.
    pub(crate) fn lines(&self, header: &FrameHeader, bytes: &[u8]) -> Option<Vec<(Head, u64)>> {
        let lines = header.lines(bytes)?;
        let is_known = |seal: &Arc<Seal>| seal.knows_directory(header, &bytes[..header.dir_len as usize]);
        self.seal.get().is_none_or(is_known).then_some(lines)
    }

    /// Whether these are the bytes that a frame of this segment carries for the one before.
    pub(crate) fn vouches_for_carry(&self, header: &FrameHeader, carry: &[u8]) -> bool {
        self.seal.get().is_none_or(|seal| seal.knows_carry(header, carry))
    }

    /// Whether a record whose CRC is right is what was sealed at this offset, as far as anybody can look.
    pub(crate) fn vouches_for(&self, offset: u32, record: &[u8]) -> bool {
        self.seal
            .get()
            .is_none_or(|seal| record::is_sealed(record) && seal.open_record(offset, record).is_some())
    }

    /// The plain form of a record that stands at this offset; `None` if it is not what was sealed there.
    pub(crate) fn open(&self, offset: u32, record: Bytes) -> Option<Bytes> {
        match (self.seal.get(), record::is_sealed(&record)) {
            (None, false) => Some(record),
            (Some(seal), true) => seal.open_record(offset, &record),
            _ => None,
        }
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
