//! Reads records, from any thread, while commands are applied.

use std::{collections::VecDeque, fmt, sync::Arc};

use bytes::Bytes;
use tokio::sync::watch;

use super::{LogBounds, STATE, bounds_in, bounds_of, decode_state, record_key};
use crate::{error::Error, layout::row_key, store::GroupView};

/// How much [`Records`] reads at a time.
const PAGE_RECORDS: usize = 1_000;
const PAGE_BYTES: usize = 1 << 20;

/// Part of a log, as of one point in time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogPage {
    /// The records, in order; the first one's offset is the one that was asked for.
    pub records: Vec<Bytes>,
    /// Which offsets the log has.
    pub bounds: LogBounds,
    /// The index of the last command that this page shows; 0 if none was applied yet.
    pub index: u64,
}

/// Reads a log on this node, as far as its group's log is applied here. Whoever needs the latest passes a read barrier
/// first. Calls block on the engine.
#[derive(Clone)]
pub struct LogReader {
    view: Arc<GroupView>,
    seen: watch::Receiver<LogBounds>,
}

impl fmt::Debug for LogReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogReader").field("group", &self.view.group).finish_non_exhaustive()
    }
}

impl LogReader {
    pub(crate) fn new(view: Arc<GroupView>, seen: watch::Receiver<LogBounds>) -> Self {
        LogReader { view, seen }
    }

    /// Which offsets the log has.
    ///
    /// # Errors
    /// [`Error::Gone`] if the replica was destroyed, and the engine's.
    pub fn bounds(&self) -> Result<LogBounds, Error> {
        Ok(bounds_of(&decode_state(self.view.group, self.view.get(&STATE)?)?))
    }

    /// Reads one record; `None` if the log does not have the offset.
    ///
    /// # Errors
    /// As [`LogReader::page`].
    pub fn get(&self, offset: u64) -> Result<Option<Bytes>, Error> {
        match self.page(offset, offset.checked_add(1), 1, 0) {
            Ok(page) => Ok(page.records.into_iter().next()),
            Err(Error::NoSuchOffset { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads the records with offsets in [from, to), at most `limit` of them; stops after the one with which they reach
    /// `max_bytes`, so at least one comes if there is one. None come at the log's end.
    ///
    /// # Errors
    /// [`Error::NoSuchOffset`] if `from` lies below the lowest offset or above the next one, [`Error::Gone`] if the replica
    /// was destroyed, [`Error::Damaged`], and the engine's.
    pub fn page(&self, from: u64, to: Option<u64>, limit: usize, max_bytes: usize) -> Result<LogPage, Error> {
        let (generation, snapshot) = self.view.snapshot()?;
        let bounds = bounds_in(&self.view, &*snapshot, generation)?;
        let group = self.view.group;
        if from < bounds.lowest || from > bounds.next {
            return Err(Error::NoSuchOffset { group, offset: from, bounds });
        }
        let mut page = LogPage { records: Vec::new(), bounds, index: self.view.index_of(&*snapshot)? };
        let high = to.map_or(bounds.next, |to| to.min(bounds.next)).min(from.saturating_add(limit as u64));
        let key = |offset| row_key(group, generation, &record_key(bounds.era, offset));
        let (mut bytes, mut expected, mut whole) = (0, from, true);
        if from < high {
            snapshot.scan(self.view.space, &key(from), Some(&key(high)[..]), &mut |found, record| {
                // A gap would hand a record out under another one's offset.
                whole = *found == key(expected)[..];
                expected += 1;
                bytes += record.len();
                page.records.push(Bytes::copy_from_slice(record));
                whole && bytes < max_bytes
            })?;
        }
        let short = page.records.is_empty() && from < high;
        match whole && !short {
            true => Ok(page),
            false => Err(Error::Damaged { group, what: "a log's row" }),
        }
    }

    /// Reads the whole log, page by page, up to where it ends when that is reached. A truncation or reset meanwhile ends it
    /// with [`Error::NoSuchOffset`].
    ///
    /// # Errors
    /// As [`LogReader::bounds`].
    pub fn records(&self) -> Result<Records, Error> {
        let bounds = self.bounds()?;
        Ok(Records { reader: self.clone(), era: bounds.era, next: bounds.lowest, page: VecDeque::new() })
    }

    /// Which offsets the log has, as a watch that wakes after each command that was applied here. What it says is in the
    /// engine. Its sender is gone with the replica.
    pub fn watch(&self) -> watch::Receiver<LogBounds> {
        self.seen.clone()
    }
}

/// A whole log in order: offsets and records. Made by [`LogReader::records`].
#[derive(Debug)]
pub struct Records {
    reader: LogReader,
    era: u64,
    next: u64,
    page: VecDeque<Bytes>,
}

impl Iterator for Records {
    type Item = Result<(u64, Bytes), Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.page.is_empty() {
            let page = match self.reader.page(self.next, None, PAGE_RECORDS, PAGE_BYTES) {
                Ok(page) => page,
                Err(error) => return Some(Err(error)),
            };
            if page.bounds.era != self.era {
                let (group, offset, bounds) = (self.reader.view.group, self.next, page.bounds);
                return Some(Err(Error::NoSuchOffset { group, offset, bounds }));
            }
            self.page = page.records.into();
        }
        let record = self.page.pop_front()?;
        self.next += 1;
        Some(Ok((self.next - 1, record)))
    }
}
