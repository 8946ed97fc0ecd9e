//! Reading entries: pending bytes and cached frames from memory, the rest by few preads, each record's CRC checked. What is
//! in neither memory nor the system's cache is asked for all at once before the first of it is waited for.
//!
//! What a reader fetches from disk does not enter the cache: that holds what was written lately, which followers are about
//! to ask for, and one of them that lags far must not drive it out.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use pontoon_proto::GroupId;

use crate::{
    Error, Result,
    fs::read_exact,
    index::Piece,
    metrics::add,
    record::{self, Body, Entries},
    segment::Segment,
    shared::Shared,
    types::Entry,
};

/// Extents that lie this close are read together.
const COALESCE_GAP: u32 = 16 << 10;
/// One read asks for at most this much, unless a record is larger.
const COALESCE_BYTES: u32 = 1 << 20;
/// So much is asked for ahead of what is waited for.
const AHEAD_BYTES: u64 = 4 << 20;

/// A record on disk.
pub(crate) struct Extent {
    pub(crate) segment: Arc<Segment>,
    pub(crate) offset: u32,
    pub(crate) len: u32,
    pub(crate) first: u64,
    pub(crate) count: u64,
}

/// Whether a read may wait for the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wait {
    /// It may.
    Disk,
    /// It ends instead; what is missing is on its way into the system's cache by then.
    Never,
}

/// Copies entries of the range to `out`, at least one if there is any, up to `max_bytes` of payload. `false`, and nothing
/// copied, if that would mean to wait and must not.
pub(crate) fn entries(
    shared: &Shared,
    group: GroupId,
    range: Range<u64>,
    max_bytes: u64,
    wait: Wait,
    out: &mut Vec<Entry>,
) -> Result<bool> {
    let mut pieces = pieces(shared, group, &range, max_bytes)?.into_iter().peekable();
    let mut budget = Budget { left: max_bytes, any: false };
    let before = out.len();
    if !from_memory(shared, group, &mut pieces, &range, &mut budget, out)? {
        return Ok(true);
    }
    let mut rows = rows(pieces);
    let mut looked = 0;
    for nth in 0..rows.len() {
        if nth == looked {
            looked += look_ahead(shared, &mut rows[nth..], wait)?;
        }
        let more = match &mut rows[nth] {
            Row::Memory(entries, count) => take_pending(&mut budget, entries, &range, *count, out),
            Row::Disk(row) => {
                if wait == Wait::Never && !row.is_here() {
                    out.truncate(before);
                    return Ok(false);
                }
                read_row(shared, group, std::mem::take(row), &range, &mut budget, out)?
            }
        };
        if !more {
            break;
        }
    }
    Ok(true)
}

/// Takes what is in memory, up to the first piece that is not; whether more is wanted.
fn from_memory(
    shared: &Shared,
    group: GroupId,
    pieces: &mut Pieces,
    range: &Range<u64>,
    budget: &mut Budget,
    out: &mut Vec<Entry>,
) -> Result<bool> {
    let (mut hits, mut more) = (0, true);
    while more && let Some(piece) = pieces.peek() {
        more = match piece {
            Piece::Memory(entries, count) => take_pending(budget, entries, range, *count, out),
            Piece::Disk { segment, offset, len, first, count } => {
                let Some(bytes) = shared.cache.get(segment.id, *offset, *len) else { break };
                hits += 1;
                let segment = segment.clone();
                let extent = Extent { segment, offset: *offset, len: *len, first: *first, count: *count };
                take_record(shared, group, &extent, Some(bytes), range, budget, out)?
            }
        };
        pieces.next();
    }
    add(&shared.counters.cache_hits, hits);
    Ok(more)
}

type Pieces = std::iter::Peekable<std::vec::IntoIter<Piece>>;

/// What the index has for a range.
fn pieces(shared: &Shared, group: GroupId, range: &Range<u64>, max_bytes: u64) -> Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    let found = shared.index.with(group, |state| {
        if let Some(damage) = &state.damage {
            return Err(Error::Damaged { group, damage: (**damage).clone() });
        }
        check_bounds(range, state.first_index(), state.last_index())?;
        if !range.is_empty() {
            state.pieces(range.start, range.end, max_bytes, &mut pieces);
        }
        Ok(())
    });
    found.unwrap_or_else(|| check_bounds(range, 1, 0))?;
    Ok(pieces)
}

/// What is read together.
enum Row {
    Memory(Entries, u64),
    Disk(DiskRow),
}

/// Records of one segment that lie close to each other.
#[derive(Default)]
struct DiskRow {
    extents: Vec<Extent>,
    /// The first of them, as far as the cache had them without a gap.
    cached: Vec<Bytes>,
    /// The bytes of the others, from where the first of those begins.
    rest: Option<Bytes>,
}

impl DiskRow {
    /// The bytes that only the disk has.
    fn missing(&self) -> Option<(&Extent, &Extent)> {
        self.extents.get(self.cached.len()).zip(self.extents.last())
    }

    fn is_here(&self) -> bool {
        self.rest.is_some() || self.missing().is_none()
    }

    fn span_bytes(&self) -> u64 {
        self.extents.first().zip(self.extents.last()).map_or(0, |(first, last)| u64::from(span(first, last)))
    }
}

fn rows(pieces: Pieces) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for piece in pieces {
        match (piece, rows.last_mut()) {
            (Piece::Memory(entries, count), _) => rows.push(Row::Memory(entries, count)),
            (Piece::Disk { segment, offset, len, first, count }, last) => {
                let extent = Extent { segment, offset, len, first, count };
                match last {
                    Some(Row::Disk(row)) if continues(&row.extents, &extent) => row.extents.push(extent),
                    _ => rows.push(Row::Disk(DiskRow { extents: vec![extent], ..DiskRow::default() })),
                }
            }
        }
    }
    rows
}

/// Takes from memory what is there, and asks the disk for the rest of some rows at once, so that it works on all of them
/// while the first is waited for. How many rows it looked at.
fn look_ahead(shared: &Shared, rows: &mut [Row], wait: Wait) -> Result<usize> {
    let (mut bytes, mut looked) = (0, 0);
    let alone = rows.len() == 1;
    for row in rows {
        if bytes > AHEAD_BYTES {
            break;
        }
        looked += 1;
        let Row::Disk(row) = row else { continue };
        bytes += row.span_bytes();
        let cached = row.extents.iter().map_while(|it| shared.cache.get(it.segment.id, it.offset, it.len));
        row.cached = cached.collect();
        add(&shared.counters.cache_hits, row.cached.len() as u64);
        add(&shared.counters.cache_misses, (row.extents.len() - row.cached.len()) as u64);
        let Some((first, last)) = row.missing().filter(|_| !alone || wait == Wait::Never) else { continue };
        let (offset, len) = (u64::from(first.offset), span(first, last));
        let mut buffer = vec![0; len as usize];
        let file = &first.segment.file;
        let failed = |source| Error::io("read", &first.segment.path, source);
        match file.read_now(&mut buffer, offset).map_err(failed)? {
            true => {
                note_read(shared, len);
                row.rest = Some(buffer.into());
            }
            false => file.will_need(offset, u64::from(len)),
        }
    }
    Ok(looked)
}

fn note_read(shared: &Shared, len: u32) {
    add(&shared.counters.reads, 1);
    add(&shared.counters.read_bytes, u64::from(len));
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
    let plain = record::verify_self(bytes).then(|| extent.segment.open(extent.offset, bytes.clone()))??;
    match record::decode(&plain)? {
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

/// Whether the next record is read with the row before it.
fn continues(row: &[Extent], next: &Extent) -> bool {
    let (Some(start), Some(end)) = (row.first(), row.last()) else { return false };
    let gap = next.offset.checked_sub(end.offset + end.len);
    Arc::ptr_eq(&end.segment, &next.segment)
        && gap.is_some_and(|gap| gap <= COALESCE_GAP)
        && next.offset + next.len - start.offset <= COALESCE_BYTES
}

fn read_row(
    shared: &Shared,
    group: GroupId,
    mut row: DiskRow,
    range: &Range<u64>,
    budget: &mut Budget,
    out: &mut Vec<Entry>,
) -> Result<bool> {
    if let Some((first, last)) = row.missing().filter(|_| row.rest.is_none()) {
        let bytes = read_span(first, last)?;
        note_read(shared, bytes.len() as u32);
        row.rest = Some(bytes);
    }
    let known = row.cached.len();
    let start = row.extents.get(known).map_or(0, |extent| extent.offset);
    for (nth, extent) in row.extents.iter().enumerate() {
        let bytes = match (row.cached.get(nth), &row.rest) {
            (Some(bytes), _) => bytes.clone(),
            (None, Some(rest)) => slice(rest, start, extent),
            (None, None) => unreachable!("what was not cached was read"),
        };
        let intact = (nth < known || record::verify_self(&bytes)).then_some(bytes);
        if !take_record(shared, group, extent, intact, range, budget, out)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Takes the entries of a record that waits for the disk; whether more is wanted.
fn take_pending(
    budget: &mut Budget,
    entries: &Entries,
    range: &Range<u64>,
    count: u64,
    out: &mut Vec<Entry>,
) -> bool {
    budget.take(entries, range, count, out).expect("what this process compressed itself decompresses")
}

/// Takes the entries of a record, of which these are the bytes if they are as they were written; whether more is wanted.
fn take_record(
    shared: &Shared,
    group: GroupId,
    extent: &Extent,
    intact: Option<Bytes>,
    range: &Range<u64>,
    budget: &mut Budget,
    out: &mut Vec<Entry>,
) -> Result<bool> {
    let plain = intact.and_then(|bytes| extent.segment.open(extent.offset, bytes));
    let more = match plain.and_then(|plain| record::decode(&plain)) {
        Some((head, Body::Entries(entries))) if head.group == group && head.index == extent.first => {
            budget.take(&entries, range, extent.count, out)
        }
        _ => None,
    };
    more.ok_or_else(|| damaged(shared, group, extent))
}

fn slice(bytes: &Bytes, start: u32, extent: &Extent) -> Bytes {
    let from = (extent.offset - start) as usize;
    bytes.slice(from..from + extent.len as usize)
}

/// Bytes from the first record to the end of the last.
fn span(first: &Extent, last: &Extent) -> u32 {
    last.offset + last.len - first.offset
}

fn read_span(first: &Extent, last: &Extent) -> Result<Bytes> {
    let mut bytes = vec![0; span(first, last) as usize];
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
