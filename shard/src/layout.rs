//! Where rows lie in an engine.
//!
//! ```text
//! keyspace 0 (marks)   group ‖ 0                   the mark: EngineMark {generation, runtime's mark}
//!                      group ‖ 1 ‖ generation      a stage is being received: StagedState
//!                      group ‖ 2 ‖ generation      the generation is dead; its rows may be dropped
//!                      group ‖ 3 ‖ generation ‖ …  a chunk of it is all there: StagedChunk, by its first logical key
//! keyspaces 1 to 8     group ‖ generation ‖ 0 ‖ …  a system row of the runtime
//!   (by group)         group ‖ generation ‖ 1 ‖ …  a row of the machine
//! ```
//!
//! Group ids are 8 bytes and generations 4, big-endian, so a generation is one range and all that is known of a group
//! is one range of the marks. What follows the generation is the **logical key**: it is what snapshots carry.
//!
//! A generation's rows are read only while the mark names it. It is dead if a record says so, never because the mark
//! names another: a stage that is being received is not live either.

use bytes::{BufMut, Bytes, BytesMut};
use pontoon_proto::GroupId;

use crate::engine::Keyspace;

/// The format of rows and marks.
pub(crate) const FORMAT: u32 = 1;
/// The format of what is kept of a generation that is being received.
pub(crate) const STAGED_FORMAT: u32 = 1;
/// One for the marks, and some for the data: enough that one group's compaction does not hold up all others, few enough
/// that their write buffers stay small.
pub(crate) const KEYSPACES: u8 = 9;
/// Marks and records about generations.
pub(crate) const MARKS: Keyspace = Keyspace(0);

/// The tag of a chunk's record.
const CHUNK: u8 = 3;

/// First byte of the logical key of the runtime's rows.
pub(crate) const SYSTEM: u8 = 0;
/// First byte of the logical key of the machine's rows.
pub(crate) const DATA: u8 = 1;

/// The keyspace of a group's rows.
pub(crate) fn data_space(group: GroupId) -> Keyspace {
    // Neighbouring ids are spread by multiplying with the golden ratio.
    let spread = group.0.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
    Keyspace(1 + (spread % u64::from(KEYSPACES - 1)) as u8)
}

/// What begins every row of a generation.
pub(crate) fn generation_prefix(group: GroupId, generation: u32) -> [u8; 12] {
    let mut prefix = [0; 12];
    prefix[..8].copy_from_slice(&group.0.to_be_bytes());
    prefix[8..].copy_from_slice(&generation.to_be_bytes());
    prefix
}

/// The engine's key of a logical key.
pub(crate) fn row_key(group: GroupId, generation: u32, logical: &[u8]) -> Bytes {
    let mut key = BytesMut::with_capacity(12 + logical.len());
    key.put_slice(&generation_prefix(group, generation));
    key.put_slice(logical);
    key.freeze()
}

/// The logical key of a row.
pub(crate) fn logical(kind: u8, key: &[u8]) -> Bytes {
    let mut logical = BytesMut::with_capacity(1 + key.len());
    logical.put_u8(kind);
    logical.put_slice(key);
    logical.freeze()
}

/// A record in the marks keyspace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Record {
    Mark,
    Staged(u32),
    Dead(u32),
    /// One of the chunks that a generation received; see [`chunk_prefix`].
    Chunk,
}

/// The engine's key of a record.
pub(crate) fn record_key(group: GroupId, record: Record) -> Bytes {
    let mut key = BytesMut::with_capacity(13);
    key.put_u64(group.0);
    match record {
        Record::Mark => key.put_u8(0),
        Record::Staged(generation) => {
            key.put_u8(1);
            key.put_u32(generation);
        }
        Record::Dead(generation) => {
            key.put_u8(2);
            key.put_u32(generation);
        }
        Record::Chunk => key.put_u8(CHUNK),
    }
    key.freeze()
}

/// What begins the records of a generation's chunks. The rest of such a key is the chunk's first logical key.
pub(crate) fn chunk_prefix(group: GroupId, generation: u32) -> [u8; 13] {
    let mut prefix = [0; 13];
    prefix[..8].copy_from_slice(&group.0.to_be_bytes());
    prefix[8] = CHUNK;
    prefix[9..].copy_from_slice(&generation.to_be_bytes());
    prefix
}

/// The engine's key of a chunk's record.
pub(crate) fn chunk_key(group: GroupId, generation: u32, first_key: &[u8]) -> Bytes {
    [&chunk_prefix(group, generation)[..], first_key].concat().into()
}

/// Reads a key of the marks keyspace.
pub(crate) fn parse_record(key: &[u8]) -> Option<(GroupId, Record)> {
    let (group, rest) = key.split_first_chunk::<8>()?;
    let group = GroupId(u64::from_be_bytes(*group));
    let (tag, rest) = rest.split_first()?;
    let generation = || rest.try_into().ok().map(u32::from_be_bytes);
    match *tag {
        0 if rest.is_empty() => Some((group, Record::Mark)),
        1 => Some((group, Record::Staged(generation()?))),
        2 => Some((group, Record::Dead(generation()?))),
        CHUNK if rest.len() >= 4 => Some((group, Record::Chunk)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_read_back() {
        for record in [Record::Mark, Record::Staged(7), Record::Dead(u32::MAX)] {
            let key = record_key(GroupId(300), record);
            assert_eq!(parse_record(&key), Some((GroupId(300), record)));
        }
        assert_eq!(parse_record(&chunk_key(GroupId(300), 7, b"k")), Some((GroupId(300), Record::Chunk)));
        assert_eq!(parse_record(b"short"), None);
        assert_eq!(parse_record(&[0; 10]), None);
    }

    #[test]
    fn groups_spread_over_the_data_keyspaces_only() {
        let spaces: std::collections::BTreeSet<_> =
            (1..1000).map(|group| data_space(GroupId(group))).collect();
        assert_eq!(spaces.len(), usize::from(KEYSPACES) - 1);
        assert!(!spaces.contains(&MARKS));
    }
}
