//! Records: what one frame holds for one group, encoded once by the submitter and never changed after.
//!
//! A record starts on a multiple of 8 bytes with a header of 32:
//!
//! ```text
//!  0 crc32c u32 (over all that follows, without padding) | 4 len u32 (header and body, without padding)
//!  8 kind u8 | 9 codec u8 | 10 flags u8 (1: sealed) | 11 reserved u8 (0) | 12 count u32 | 16 group u64 | 24 index u64 | 32 body
//! ```
//!
//! In memory records are plain. One of an encrypted log is sealed on its way to the disk and opened on its way back
//! (`crypt.rs`); everything here but [`verify`] is about plain ones.
//!
//! The CRC covers group, kind, index and payload, so that a record that turns up in another's place does not pass for
//! it. The place in the order (LSN) is bound by the frame's header.

use bytes::{BufMut, Bytes};
use pontoon_proto::GroupId;

use crate::{
    MAX_BATCH_BYTES,
    codec::{Decoder, put_bytes, put_u64s, put_varint, round_up},
    compress::Codec,
    outline::Terms,
    rules::{Rule, is_broken},
    types::{ConfState, Entry, HardState, SnapshotMeta},
};

/// Bytes before a record's body.
pub(crate) const RECORD_HEADER: usize = 32;
/// The byte of a record that names how its payload is compressed.
const CODEC_AT: usize = 9;
/// The byte of a record that holds its flags.
pub(crate) const FLAGS_AT: usize = 10;
/// Of a record's flags: the body is encrypted and ends with a tag.
pub(crate) const SEALED: u8 = 1;
/// Bytes per entry in the table that opens the body of an `Entries` record: term, length, kind.
const ENTRY_ROW: usize = 13;
/// An extent counts its entries in 16 bits.
pub(crate) const MAX_RECORD_ENTRIES: usize = u16::MAX as usize;

/// The highest index of an entry, so that one above it and a record's count always fit.
pub(crate) const MAX_INDEX: u64 = 1 << 62;

/// What a record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Entries = 1,
    HardState = 2,
    TruncatePrefix = 3,
    ResetTo = 4,
    /// Snapshot metadata; `count` is 1 if the log is reset to it as well.
    Snapshot = 5,
    PutMeta = 6,
    /// `index` holds the minimum replica id that may exist again.
    Destroy = 7,
}

impl Kind {
    /// Whether a record's index field is an index of the group's log.
    pub(crate) fn has_index(self) -> bool {
        matches!(self, Kind::Entries | Kind::TruncatePrefix | Kind::ResetTo | Kind::Snapshot)
    }

    fn from_u8(value: u8) -> Option<Kind> {
        Some(match value {
            1 => Kind::Entries,
            2 => Kind::HardState,
            3 => Kind::TruncatePrefix,
            4 => Kind::ResetTo,
            5 => Kind::Snapshot,
            6 => Kind::PutMeta,
            7 => Kind::Destroy,
            _ => return None,
        })
    }
}

/// A record's header as the frame's directory repeats it, so that a damaged record still tells whom it hits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) kind: Kind,
    pub(crate) group: GroupId,
    pub(crate) index: u64,
    pub(crate) count: u32,
    /// Bytes without padding.
    pub(crate) len: u32,
}

impl Head {
    /// Whether nobody after needs to ask for the ranges of index, count and length.
    fn is_sound(&self) -> bool {
        let counts = match self.kind {
            Kind::Entries => self.index > 0 && (1..=MAX_RECORD_ENTRIES).contains(&(self.count as usize)),
            _ => true,
        };
        counts
            && self.len as usize >= RECORD_HEADER
            && u64::from(self.len) <= 2 * MAX_BATCH_BYTES
            && !(self.kind.has_index() && self.index > MAX_INDEX)
    }

    /// Bytes that the record takes in the frame.
    pub(crate) fn padded(&self) -> usize {
        round_up(self.len as usize, 8)
    }

    /// Appends the directory's line.
    pub(crate) fn encode_dir(&self, dir: &mut Vec<u8>) {
        dir.push(self.kind as u8);
        put_varint(dir, self.group.0);
        put_varint(dir, self.index);
        put_varint(dir, u64::from(self.count));
        put_varint(dir, u64::from(self.len));
    }

    /// Reads a line of the directory.
    pub(crate) fn decode_dir(dir: &mut Decoder<'_>) -> Option<Head> {
        let kind = Kind::from_u8(dir.u8()?)?;
        let group = GroupId(dir.varint()?);
        let index = dir.varint()?;
        let count = u32::try_from(dir.varint()?).ok()?;
        let len = u32::try_from(dir.varint()?).ok()?;
        Some(Head { kind, group, index, count, len }).filter(Head::is_sound)
    }
}

/// A decoded record.
#[derive(Debug, Clone)]
pub(crate) enum Body {
    Entries(Entries),
    HardState(HardState),
    TruncatePrefix { index: u64, term: u64 },
    ResetTo { index: u64, term: u64 },
    Snapshot { reset: bool, meta: SnapshotMeta },
    PutMeta { key: Bytes, value: Bytes },
    Destroy { min_replica: u64 },
}

/// The entries of one record, still in the record's bytes.
#[derive(Debug, Clone)]
pub(crate) struct Entries {
    pub(crate) first: u64,
    pub(crate) count: usize,
    codec: Option<Codec>,
    /// The whole record.
    pub(crate) bytes: Bytes,
}

impl Entries {
    fn row(&self, nth: usize) -> (u64, usize, u8) {
        let row = &self.bytes[RECORD_HEADER + nth * ENTRY_ROW..][..ENTRY_ROW];
        let mut decoder = Decoder(row);
        let term = decoder.u64().unwrap_or_default();
        let len = decoder.u32().unwrap_or_default();
        (term, len as usize, row[12])
    }

    /// The runs of equal terms, as (first index, term).
    pub(crate) fn term_runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut previous = None;
        (0..self.count).filter_map(move |nth| {
            let (term, _, _) = self.row(nth);
            (previous.replace(term) != Some(term)).then_some((self.first + nth as u64, term))
        })
    }

    /// Hands out the entries of `[low, high)` in order until `take` says stop, and tells whether it did not. Payloads share
    /// the record's memory, or that of the whole payload if it was compressed. `None`: it does not decompress.
    pub(crate) fn read(&self, low: u64, high: u64, mut take: impl FnMut(Entry) -> bool) -> Option<bool> {
        let table_end = RECORD_HEADER + self.count * ENTRY_ROW;
        let (payload, mut offset) = match self.codec {
            None => (self.bytes.clone(), table_end),
            Some(codec) => {
                let len = (0..self.count).map(|nth| self.row(nth).1).sum();
                (codec.decompress(&self.bytes[table_end..], len)?, 0)
            }
        };
        for nth in 0..self.count {
            let (term, len, kind) = self.row(nth);
            let index = self.first + nth as u64;
            if index >= high {
                break;
            }
            if index >= low {
                let data = payload.slice(offset..offset + len);
                if !take(Entry { index, term, kind, data }) {
                    return Some(false);
                }
            }
            offset += len;
        }
        Some(true)
    }
}

/// Reads a record whose CRC was checked by the caller or by [`verify`]. `None` if the bytes are no record.
pub(crate) fn decode(record: &Bytes) -> Option<(Head, Body)> {
    decode_at(record, 0)
}

/// The same for a record that begins at an offset of some bytes.
pub(crate) fn decode_at(bytes: &Bytes, at: usize) -> Option<(Head, Body)> {
    let head = decode_head(bytes.get(at..)?)?;
    let end = at.checked_add(head.len as usize)?;
    let record = bytes.get(at..end)?;
    if flags(record) != 0 {
        return None;
    }
    if head.kind == Kind::Entries {
        let (_, codec) = rows(&head, record)?;
        let bytes = bytes.slice(at..end);
        let entries = Entries { first: head.index, count: head.count as usize, codec, bytes };
        return Some((head, Body::Entries(entries)));
    }
    let body = decode_body(&head, bytes, record.get(RECORD_HEADER..)?)?;
    Some((head, body))
}

/// The term that a truncation names.
pub(crate) fn truncated_term(record: &[u8]) -> Option<u64> {
    Decoder(record.get(RECORD_HEADER..)?).u64()
}

/// The table of a record of entries, if lengths and range fit.
fn rows<'a>(head: &Head, record: &'a [u8]) -> Option<(&'a [[u8; ENTRY_ROW]], Option<Codec>)> {
    let codec = Codec::of_flags(record[CODEC_AT]).ok()?;
    let mut body = Decoder(record.get(RECORD_HEADER..head.len as usize)?);
    let table = body.take((head.count as usize).checked_mul(ENTRY_ROW)?)?.as_chunks::<ENTRY_ROW>().0;
    let payload: u64 = table.iter().map(|r| u64::from(u32::from_le_bytes([r[8], r[9], r[10], r[11]]))).sum();
    let fits = codec.is_some() || payload == body.0.len() as u64;
    fits.then_some((table, codec))
}

/// Where the payload of a record of entries begins; `None` for other records.
pub(crate) fn payload_offset(head: &Head) -> Option<usize> {
    (head.kind == Kind::Entries).then_some(RECORD_HEADER + head.count as usize * ENTRY_ROW)
}

/// Encodes a record of entries again, of which `front` is everything before the payload, with a compressed one.
pub(crate) fn encode_squeezed(
    data: &mut Vec<u8>,
    dir: &mut Vec<u8>,
    front: &[u8],
    codec: Codec,
    payload: &[u8],
) {
    let start = data.len();
    data.put_slice(front);
    data[start + CODEC_AT] = codec as u8;
    data.put_slice(payload);
    seal(data, start);
    decode_head(&data[start..]).expect("the front is a record's").encode_dir(dir);
}

/// Fills in the length and CRC of the record that begins at `start` and ends with the data, and pads it.
fn seal(data: &mut Vec<u8>, start: usize) {
    let len = data.len() - start;
    data[start + 4..start + 8].copy_from_slice(&(len as u32).to_le_bytes());
    let crc = crc32c::crc32c(&data[start + 4..]);
    data[start..start + 4].copy_from_slice(&crc.to_le_bytes());
    data.resize(start + round_up(len, 8), 0);
}

/// The terms of a record of entries; `None` if it is not well formed.
pub(crate) fn terms(head: &Head, record: &[u8]) -> Option<Terms> {
    let (rows, _) = rows(head, record)?;
    let term = |row: &[u8; ENTRY_ROW]| u64::from_le_bytes(row[..8].try_into().expect("a row is longer"));
    let first = term(&rows[0]);
    if rows.iter().all(|row| term(row) == first) {
        return Some(Terms::One(first));
    }
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for (row, index) in rows.iter().zip(head.index..) {
        if runs.last().is_none_or(|(_, last)| *last != term(row)) {
            runs.push((index, term(row)));
        }
    }
    Some(Terms::Runs(runs.into()))
}

/// Reads the body of a record without entries, which is a part of `bytes`.
fn decode_body(head: &Head, bytes: &Bytes, body: &[u8]) -> Option<Body> {
    let mut body = Decoder(body);
    let at = |part: &[u8]| bytes.slice_ref(part);
    let decoded = match head.kind {
        Kind::Entries => return None,
        Kind::HardState => {
            Body::HardState(HardState { term: body.u64()?, vote: body.u64()?, commit: body.u64()? })
        }
        Kind::TruncatePrefix => Body::TruncatePrefix { index: head.index, term: body.u64()? },
        Kind::ResetTo => Body::ResetTo { index: head.index, term: body.u64()? },
        Kind::Snapshot => {
            let mut meta = decode_snapshot(&mut body)?;
            meta.data = at(body.bytes()?);
            (meta.index == head.index).then_some(())?;
            Body::Snapshot { reset: head.count == 1, meta }
        }
        Kind::PutMeta => Body::PutMeta { key: at(body.bytes()?), value: at(body.bytes()?) },
        Kind::Destroy => Body::Destroy { min_replica: head.index },
    };
    body.end()?;
    Some(decoded)
}

/// A record's flags, the reserved byte included.
fn flags(record: &[u8]) -> u16 {
    u16::from_le_bytes([record[FLAGS_AT], record[FLAGS_AT + 1]])
}

/// Whether a record, of which there is a header, is encrypted.
pub(crate) fn is_sealed(record: &[u8]) -> bool {
    flags(record) == u16::from(SEALED)
}

/// Reads a record's header.
pub(crate) fn decode_head(record: &[u8]) -> Option<Head> {
    let mut decoder = Decoder(record);
    let _crc = decoder.u32()?;
    let len = decoder.u32()?;
    let kind = Kind::from_u8(decoder.u8()?)?;
    let (_codec, _reserved) = (decoder.u8()?, decoder.u16()?);
    let count = decoder.u32()?;
    let group = GroupId(decoder.u64()?);
    let index = decoder.u64()?;
    Some(Head { kind, group, index, count, len }).filter(Head::is_sound)
}

/// Whether the bytes are the record that `head` announces, unchanged.
pub(crate) fn verify(record: &[u8], head: &Head) -> bool {
    let len = head.len as usize;
    record.len() >= len
        && decode_head(record) == Some(*head)
        && (record[..4] == crc32c::crc32c(&record[4..len]).to_le_bytes() || is_broken(Rule::RecordsChecked))
}

/// Whether the bytes start with a record whose CRC is right.
pub(crate) fn verify_self(record: &[u8]) -> bool {
    decode_head(record).is_some_and(|head| verify(record, &head))
}

/// Encodes a record at the end of `data` and its line at the end of `dir`.
pub(crate) fn encode(
    data: &mut Vec<u8>,
    dir: &mut Vec<u8>,
    (kind, group, index, count): (Kind, GroupId, u64, u32),
    body: impl FnOnce(&mut Vec<u8>),
) {
    let start = data.len();
    debug_assert!(start.is_multiple_of(8));
    data.put_u64_le(0);
    data.put_u8(kind as u8);
    data.put_bytes(0, 3);
    data.put_u32_le(count);
    data.put_u64_le(group.0);
    data.put_u64_le(index);
    body(data);
    let len = (data.len() - start) as u32;
    seal(data, start);
    Head { kind, group, index, count, len }.encode_dir(dir);
}

/// The body of an `Entries` record.
pub(crate) fn put_entries(data: &mut Vec<u8>, entries: &[Entry]) {
    for entry in entries {
        data.put_u64_le(entry.term);
        data.put_u32_le(entry.data.len() as u32);
        data.put_u8(entry.kind);
    }
    entries.iter().for_each(|entry| data.put_slice(&entry.data));
}

/// The body of a `HardState` record.
pub(crate) fn put_hard_state(data: &mut Vec<u8>, state: &HardState) {
    data.put_u64_le(state.term);
    data.put_u64_le(state.vote);
    data.put_u64_le(state.commit);
}

/// The body of a `Snapshot` record; the checkpoint uses the same bytes.
pub(crate) fn put_snapshot(data: &mut Vec<u8>, meta: &SnapshotMeta) {
    data.put_u64_le(meta.index);
    data.put_u64_le(meta.term);
    let conf = &meta.conf_state;
    for ids in [&conf.voters, &conf.learners, &conf.voters_outgoing, &conf.learners_next] {
        put_u64s(data, ids);
    }
    data.put_u8(u8::from(conf.auto_leave));
    put_bytes(data, &meta.data);
}

/// Reads what [`put_snapshot`] wrote up to the data, whose length and bytes come next.
pub(crate) fn decode_snapshot(body: &mut Decoder<'_>) -> Option<SnapshotMeta> {
    Some(SnapshotMeta {
        index: body.u64()?,
        term: body.u64()?,
        conf_state: ConfState {
            voters: body.u64s()?,
            learners: body.u64s()?,
            voters_outgoing: body.u64s()?,
            learners_next: body.u64s()?,
            auto_leave: body.u8()? != 0,
        },
        data: Bytes::new(),
    })
}
