//! Reading entries: pending bytes and cached frames from memory, the rest by few preads, each record's CRC checked.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use pontoon_proto::GroupId;

use crate::{
    Error, Result,
    fs::read_exact,
    index::Piece,
    record::{self, Body, Entries},
    segment::Segment,
    shared::Shared,
    types::Entry,
};

/// Extents that lie this close are read together.
const COALESCE_GAP: u32 = 16 << 10;
/// One read asks for at most this much, unless a record is larger.
const COALESCE_BYTES: u32 = 1 << 20;

/// A record on disk.
pub(crate) struct Extent {
    pub(crate) segment: Arc<Segment>,
    pub(crate) offset: u32,
    pub(crate) len: u32,
    pub(crate) first: u64,
    pub(crate) count: u64,
}

/// Copies entries of the range to `out`, at least one if there is any, up to `max_bytes` of payload.
pub(crate) fn entries(
    shared: &Shared,
    group: GroupId,
    range: Range<u64>,
    max_bytes: u64,
    out: &mut Vec<Entry>,
) -> Result<()> {
    let mut pieces = Vec::new();
    let found = shared.index.with(group, |state| {
        if let Some(damage) = &state.damage {
            return Err(Error::Damaged { group, damage: (**damage).clone() });
        }
        check_bounds(&range, state.first_index(), state.last_index())?;
        if !range.is_empty() {
            state.pieces(range.start, range.end, max_bytes, &mut pieces);
        }
        Ok(())
    });
    found.unwrap_or_else(|| check_bounds(&range, 1, 0))?;
    let mut budget = Budget { left: max_bytes, any: false };
    let mut pieces = pieces.into_iter().peekable();
    while let Some(piece) = pieces.next() {
        let more = match piece {
            Piece::Memory(entries, count) => budget
                .take(&entries, &range, count, out)
                .expect("what this process compressed itself decompresses"),
            Piece::Disk { segment, offset, len, first, count } => {
                let mut row = vec![Extent { segment, offset, len, first, count }];
                while let Some(Piece::Disk { segment, offset, len, first, count }) =
                    pieces.next_if(|next| continues(&row, next))
                {
                    row.push(Extent { segment, offset, len, first, count });
                }
                read_row(shared, group, row, &range, &mut budget, out)?
            }
        };
        if !more {
            break;
        }
    }
    Ok(())
}

/// A part of a group's entries, as far as they can be read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Page {
    /// What was read, ascending.
    pub entries: Vec<Entry>,
    /// What is not there or not what was written, each `[low, high)`, ascending.
    pub lost: Vec<(u64, u64)>,
    /// Where the next page begins.
    pub next: u64,
}

/// Reads what is there, damaged group or not; holes and bad records are named. The index is left as it is.
pub(crate) fn salvage(shared: &Shared, group: GroupId, range: Range<u64>, max_bytes: u64) -> Result<Page> {
    let mut pieces = Vec::new();
    let bounds = shared.index.with(group, |state| {
        let (low, high) = (range.start.max(state.first_index()), range.end.min(state.last_index() + 1));
        if low < high {
            state.pieces(low, high, max_bytes, &mut pieces);
        }
        low..high
    });
    let Some(range) = bounds.filter(|range| !range.is_empty()) else {
        return Ok(Page { next: range.end, ..Page::default() });
    };
    let mut page = Page { next: range.start, ..Page::default() };
    let (mut any, all) = (false, &mut page.entries);
    for piece in pieces {
        any = true;
        let (entries, first, count) = match piece {
            Piece::Memory(entries, count) => (Some(entries.clone()), entries.first, count),
            Piece::Disk { segment, offset, len, first, count } => {
                let extent = Extent { segment, offset, len, first, count };
                (entries_of(group, &extent, &read_span(&extent, &extent)?), first, count)
            }
        };
        if first > page.next {
            page.lost.push((page.next, first));
        }
        let (low, high) = (first.max(range.start), range.end.min(first + count));
        let read = entries.and_then(|entries| {
            entries.read(low, high, |entry| {
                all.push(entry);
                true
            })
        });
        if read.is_none() {
            page.lost.push((low, high));
        }
        page.next = high;
    }
    if !any {
        page.lost.push((range.start, range.end));
        page.next = range.end;
    }
    Ok(page)
}

/// The entries of an extent, if the bytes are the record that it names, unchanged.
fn entries_of(group: GroupId, extent: &Extent, bytes: &Bytes) -> Option<Entries> {
    match record::verify_self(bytes).then(|| record::decode(bytes))?? {
        (head, Body::Entries(entries)) if head.group == group && head.index == extent.first => Some(entries),
        _ => None,
    }
}

fn check_bounds(range: &Range<u64>, first: u64, last: u64) -> Result<()> {
    if range.is_empty() {
        return Ok(());
    }
    if range.start < first {
        return Err(Error::Compacted { first });
    }
    if range.end > last + 1 {
        return Err(Error::Unavailable { last });
    }
    Ok(())
}

/// How much may still be handed out.
struct Budget {
    left: u64,
    any: bool,
}

impl Budget {
    /// Whether more is wanted; `None` if the record does not decompress.
    fn take(
        &mut self,
        entries: &Entries,
        range: &Range<u64>,
        count: u64,
        out: &mut Vec<Entry>,
    ) -> Option<bool> {
        entries.read(range.start, range.end.min(entries.first + count), |entry| {
            let bytes = entry.data.len() as u64;
            if self.any && bytes > self.left {
                return false;
            }
            self.left = self.left.saturating_sub(bytes);
            self.any = true;
            out.push(entry);
            true
        })
    }
}

/// Whether the next piece is read with the row before it.
fn continues(row: &[Extent], next: &Piece) -> bool {
    let (Some(start), Some(end), Piece::Disk { segment, offset, len, .. }) = (row.first(), row.last(), next)
    else {
        return false;
    };
    let gap = offset.checked_sub(end.offset + end.len);
    Arc::ptr_eq(&end.segment, segment)
        && gap.is_some_and(|gap| gap <= COALESCE_GAP)
        && offset + len - start.offset <= COALESCE_BYTES
}

fn read_row(
    shared: &Shared,
    group: GroupId,
    row: Vec<Extent>,
    range: &Range<u64>,
    budget: &mut Budget,
    out: &mut Vec<Entry>,
) -> Result<bool> {
    let mut read: Option<(u32, Bytes)> = None;
    for (nth, extent) in row.iter().enumerate() {
        let cached = match read {
            None => shared.cache.get(extent.segment.id, extent.offset, extent.len),
            Some(_) => None,
        };
        let trusted = cached.is_some();
        let bytes = match (cached, &read) {
            (Some(bytes), _) => bytes,
            (None, Some((start, bytes))) => slice(bytes, *start, extent),
            (None, None) => {
                // What is not cached here is seldom cached further on: the rest of the row in one read.
                let bytes = read_span(extent, &row[row.len() - 1])?;
                let record = slice(&bytes, extent.offset, extent);
                read = (nth + 1 < row.len()).then_some((extent.offset, bytes));
                record
            }
        };
        let decoded = if trusted || record::verify_self(&bytes) { record::decode(&bytes) } else { None };
        let entries = match decoded {
            Some((head, Body::Entries(entries))) if head.group == group && head.index == extent.first => {
                entries
            }
            _ => return Err(damaged(shared, group, extent)),
        };
        match budget.take(&entries, range, extent.count, out) {
            Some(true) => {}
            Some(false) => return Ok(false),
            None => return Err(damaged(shared, group, extent)),
        }
    }
    Ok(true)
}

fn slice(bytes: &Bytes, start: u32, extent: &Extent) -> Bytes {
    let from = (extent.offset - start) as usize;
    bytes.slice(from..from + extent.len as usize)
}

fn read_span(first: &Extent, last: &Extent) -> Result<Bytes> {
    let mut bytes = vec![0; (last.offset + last.len - first.offset) as usize];
    read_exact(&*first.segment.file, &mut bytes, u64::from(first.offset))
        .map_err(|source| Error::io("read", &first.segment.path, source))?;
    Ok(bytes.into())
}

/// Acknowledged bytes changed on disk: from now on the group is damaged, through checkpoints and opens.
pub(crate) fn note_damage(shared: &Shared, group: GroupId, extent: &Extent) {
    let range = (extent.first, extent.first + extent.count);
    shared.index.with_mut(group, |state| state.damage.get_or_insert_default().entries.push(range));
    let path = extent.segment.path.display();
    tracing::error!(%path, offset = extent.offset, %group, "corrupt record");
}

fn damaged(shared: &Shared, group: GroupId, extent: &Extent) -> Error {
    note_damage(shared, group, extent);
    let path = extent.segment.path.clone();
    let (low, high) = (extent.first, extent.first + extent.count);
    let what = format!("entries [{low}, {high}) of {group} changed on disk");
    Error::Corrupt { path, offset: u64::from(extent.offset), what }
}
