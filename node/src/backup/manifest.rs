//! What a backup consists of: two lines of JSON, the first of which vouches for the second.

use std::path::Path;

use pontoon_proto::v1::{self, ShardKind};
use serde::{Deserialize, Serialize};

use super::error::BackupError;
use crate::json::moment;

/// The newest format of manifests and directories, and the one that is written.
pub(super) const FORMAT: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
struct FirstLine {
    format: u32,
    /// Of the second line.
    blake3: String,
}

/// One backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Manifest {
    /// When it was begun, in UTC, and some random digits: `20261130T224501.123Z-1f2e3d4c`. The order of ids is that of time.
    pub id: String,
    /// When it was begun, in milliseconds since 1970.
    pub begun_ms: u64,
    /// When it was complete.
    pub done_ms: u64,
    /// The version that wrote it.
    pub version: String,
    /// The id of the cluster that it was taken from.
    pub cluster: String,
    /// Whether all predicates were asked for.
    pub all: bool,
    /// By their names, in order.
    pub predicates: Vec<PredicateBackup>,
    /// The placement rules, as `pontoon rules` prints them; empty if there were none.
    #[serde(default)]
    pub rules: String,
}

/// A predicate as it was at one index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PredicateBackup {
    /// Its name.
    pub predicate: String,
    /// `map` or `log`.
    pub kind: String,
    /// How many replicas it should have.
    pub replicas: u32,
    /// The group that it was read from.
    pub group: u64,
    /// The command of that group after which it was like this; 0: before the first.
    pub index: u64,
    /// That command's term.
    pub term: u64,
    /// Rows or records.
    pub rows: u64,
    /// Their bytes, as they are encoded in chunks.
    pub bytes: u64,
    /// BLAKE3 of all of them, one after the other.
    pub hash: String,
    /// Of a log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offsets: Option<Offsets>,
    /// In key order.
    pub chunks: Vec<ChunkRef>,
}

/// Which offsets a log had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offsets {
    /// The first record's; `next` if there were none.
    pub lowest: u64,
    /// The next record's.
    pub next: u64,
    /// One more than how often it had been reset.
    pub era: u64,
}

/// A chunk of a predicate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ChunkRef {
    /// BLAKE3 of its rows: its name.
    pub hash: String,
    /// The bytes of its rows.
    pub bytes: u64,
    /// How many.
    pub rows: u64,
    /// The first one's key in hexadecimal.
    pub first_key: String,
}

impl Manifest {
    /// A predicate of it.
    pub fn predicate(&self, name: &str) -> Option<&PredicateBackup> {
        self.predicates.iter().find(|found| found.predicate == name)
    }

    /// Rows of all predicates.
    pub fn rows(&self) -> u64 {
        self.predicates.iter().map(|found| found.rows).sum()
    }

    /// Bytes of all predicates.
    pub fn bytes(&self) -> u64 {
        self.predicates.iter().map(|found| found.bytes).sum()
    }

    /// When it was begun, for people.
    pub fn begun(&self) -> String {
        moment(self.begun_ms)
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let second = serde_json::to_vec(self).expect("a manifest is plain data");
        let first = FirstLine { format: FORMAT, blake3: blake3::hash(&second).to_hex().to_string() };
        let mut text = serde_json::to_vec(&first).expect("two fields");
        text.push(b'\n');
        text.extend_from_slice(&second);
        text.push(b'\n');
        text
    }

    pub(super) fn decode(path: &Path, text: &[u8]) -> Result<Manifest, BackupError> {
        let damaged =
            |reason: &str| BackupError::Damaged { path: path.to_owned(), reason: reason.to_owned() };
        let (first, rest) = text
            .split_at_checked(text.iter().position(|byte| *byte == b'\n').unwrap_or(0))
            .unwrap_or_default();
        let first: FirstLine =
            serde_json::from_slice(first).map_err(|_| damaged("its first line is not legible"))?;
        if first.format != FORMAT {
            return Err(BackupError::Format { path: path.to_owned(), found: first.format, known: FORMAT });
        }
        let second = rest.trim_ascii();
        if blake3::hash(second).to_hex().as_str() != first.blake3 {
            return Err(damaged("its second line does not have the hash that the first one says"));
        }
        serde_json::from_slice(second).map_err(|error| damaged(&error.to_string()))
    }
}

impl Offsets {
    pub(super) fn of(v1::LogBounds { lowest, next, era }: v1::LogBounds) -> Offsets {
        Offsets { lowest, next, era }
    }
}

impl PredicateBackup {
    pub(super) fn kind(&self) -> Option<ShardKind> {
        match self.kind.as_str() {
            "map" => Some(ShardKind::Map),
            "log" => Some(ShardKind::Log),
            _ => None,
        }
    }
}

/// The id of a backup that begins now.
pub(super) fn new_id(begun_ms: u64) -> String {
    let random = uuid::Uuid::new_v4().simple().to_string();
    let digits: String = moment(begun_ms).chars().filter(char::is_ascii_digit).collect();
    let (day, time) = digits.split_at(digits.len() - "hhmmss".len());
    let digits = format!("{day}T{time}.{:03}Z", begun_ms % 1_000);
    format!("{digits}-{}", &random[..8])
}

/// `2026-11-30 22:45:01Z`.
/// A chunk's name.
pub(super) fn hash_of(path: &Path, hex: &str) -> Result<blake3::Hash, BackupError> {
    blake3::Hash::from_hex(hex).map_err(|_| BackupError::Damaged {
        path: path.to_owned(),
        reason: format!("{hex} is not the name of a chunk"),
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::backup) fn manifest() -> Manifest {
        let begun_ms = 1_796_000_000_123;
        Manifest {
            id: new_id(begun_ms),
            begun_ms,
            done_ms: begun_ms,
            version: "1".into(),
            cluster: "c".into(),
            all: true,
            predicates: Vec::new(),
            rules: String::new(),
        }
    }

    #[test]
    fn a_manifest_comes_back_and_vouches_for_itself() {
        let (path, made) = (Path::new("m.json"), manifest());
        let text = made.encode();
        assert_eq!(Manifest::decode(path, &text).unwrap(), made);
        for at in 0..text.len() - 1 {
            let mut bad = text.clone();
            bad[at] ^= 1;
            assert!(Manifest::decode(path, &bad).is_err(), "{at}");
            assert!(Manifest::decode(path, &text[..at]).is_err(), "{at}");
        }
        let later = String::from_utf8(text).unwrap().replacen(":1,", ":2,", 1);
        let error = Manifest::decode(path, later.as_bytes()).unwrap_err();
        assert!(matches!(error, BackupError::Format { found: 2, known: 1, .. }), "{error}");
    }

    #[test]
    fn ids_tell_when_and_are_in_order() {
        assert!(new_id(1_796_000_000_123).starts_with("20261130T"));
        assert!(new_id(1_796_000_000_123) < new_id(1_796_000_000_124));
        assert!(new_id(1_796_000_000_999) < new_id(1_796_000_001_000));
        assert_eq!(manifest().begun().len(), "2026-11-29 01:02:03Z".len());
    }
}
