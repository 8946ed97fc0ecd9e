//! Records of entries that are not written yet.

use std::collections::VecDeque;

use crate::record::Entries;

/// A record that waits for the disk.
#[derive(Debug)]
pub(super) struct Pending {
    lsn: u64,
    /// How many of its entries are still in the log, counted from its first.
    pub(super) count: u64,
    /// Bytes of this record and of those before it, from some common origin.
    end: u64,
    pub(super) entries: Entries,
}

impl Pending {
    /// One above the last index.
    fn end_index(&self) -> u64 {
        self.entries.first + self.count
    }
}

/// A group's pending records, in the order of their indices. Nearly always there is none or one: an idle group pays a
/// pointer, and one record costs one allocation.
#[derive(Debug, Default)]
pub(super) struct PendingLog(Option<Box<Waiting>>);

#[derive(Debug)]
struct Waiting {
    first: Pending,
    more: VecDeque<Pending>,
}

impl PendingLog {
    pub(super) fn push(&mut self, lsn: u64, entries: Entries) {
        let (count, bytes) = (entries.count as u64, entries.bytes.len() as u64);
        match &mut self.0 {
            Some(waiting) => {
                let end = waiting.more.back().unwrap_or(&waiting.first).end + bytes;
                waiting.more.push_back(Pending { lsn, count, end, entries });
            }
            None => {
                let first = Pending { lsn, count, end: bytes, entries };
                self.0 = Some(Box::new(Waiting { first, more: VecDeque::new() }));
            }
        }
    }

    /// Takes the first record if it has this LSN.
    pub(super) fn settle(&mut self, lsn: u64) -> Option<Pending> {
        match &self.0 {
            Some(waiting) if waiting.first.lsn == lsn => self.pop(),
            _ => None,
        }
    }

    fn pop(&mut self) -> Option<Pending> {
        let waiting = self.0.as_mut()?;
        match waiting.more.pop_front() {
            Some(next) => Some(std::mem::replace(&mut waiting.first, next)),
            None => self.0.take().map(|last| last.first),
        }
    }

    /// Drops entries at and above an index.
    pub(super) fn cut(&mut self, from: u64) {
        let Some(waiting) = &mut self.0 else { return };
        while waiting.more.pop_back_if(|record| record.entries.first >= from).is_some() {}
        if waiting.first.entries.first >= from {
            self.0 = None;
            return;
        }
        let last = waiting.more.back_mut().unwrap_or(&mut waiting.first);
        last.count = last.count.min(from - last.entries.first);
    }

    /// Drops records that end at or below an index.
    pub(super) fn truncate(&mut self, index: u64) {
        while self.0.as_ref().is_some_and(|waiting| waiting.first.end_index() <= index + 1) {
            self.pop();
        }
    }

    pub(super) fn clear(&mut self) {
        self.0 = None;
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Pending> {
        self.0.iter().flat_map(|waiting| std::iter::once(&waiting.first).chain(&waiting.more))
    }

    /// Bytes of all.
    pub(super) fn bytes(&self) -> u64 {
        let Some(Waiting { first, more }) = self.0.as_deref() else { return 0 };
        let before = first.end - first.entries.bytes.len() as u64;
        more.back().unwrap_or(first).end - before
    }
}
