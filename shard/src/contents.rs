//! What a predicate holds, as of one command: for backups and exports.

use std::fmt;

use bytes::Bytes;
use pontoon_proto::{
    GroupId,
    v1::{self, ShardKind},
};

use crate::{
    engine::{EngineSnapshot, Keyspace},
    error::Error,
    layout::{DATA, row_key},
    log::{self, LogBounds},
    store::GroupView,
};

/// A point in time of a predicate's rows, or of a log's records. It shows the state after one command for as long as it
/// lives, whatever is applied meanwhile, and the engine keeps what it shows. Calls block on the engine.
///
/// What belongs to the group and not to its users is not in it: sessions, the index at which a row was written, and what a log
/// has dropped and not swept.
pub struct Contents {
    group: GroupId,
    kind: ShardKind,
    space: Keyspace,
    prefix: Bytes,
    snapshot: Box<dyn EngineSnapshot>,
    mark: v1::Mark,
    bounds: Option<LogBounds>,
}

impl fmt::Debug for Contents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Contents")
            .field("group", &self.group)
            .field("index", &self.mark.index)
            .finish_non_exhaustive()
    }
}

impl Contents {
    pub(crate) fn of(view: &GroupView, kind: ShardKind) -> Result<Contents, Error> {
        let (generation, snapshot) = view.snapshot()?;
        let mark = view.mark_of(&*snapshot)?;
        let bounds = match kind {
            ShardKind::Log => Some(log::bounds_in(view, &*snapshot, generation)?),
            ShardKind::Map | ShardKind::Meta => None,
        };
        let prefix = row_key(view.group, generation, &[]);
        Ok(Contents { group: view.group, kind, space: view.space, prefix, snapshot, mark, bounds })
    }

    /// Whose it is.
    pub fn group(&self) -> GroupId {
        self.group
    }

    /// Whether these are rows of a map or records of a log.
    pub fn kind(&self) -> ShardKind {
        self.kind
    }

    /// The index of the last command that it shows; 0 if none was applied yet.
    pub fn index(&self) -> u64 {
        self.mark.index
    }

    /// The term of that command.
    pub fn term(&self) -> u64 {
        self.mark.term
    }

    /// Which offsets the log has; `None` for a map.
    pub fn bounds(&self) -> Option<LogBounds> {
        self.bounds
    }

    /// Visits keys and values in ascending order of the keys until `visit` returns false. A log's key is its offset, 8 bytes,
    /// big-endian.
    ///
    /// # Errors
    /// [`Error::Damaged`] for a row that is none or a log with a gap, and the engine's.
    pub fn rows(&self, visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<(), Error> {
        match self.bounds {
            None => self.map_rows(visit),
            Some(bounds) => self.records(bounds, visit),
        }
    }

    fn map_rows(&self, visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<(), Error> {
        let (low, high) = ([&self.prefix[..], &[DATA]].concat(), [&self.prefix[..], &[DATA + 1]].concat());
        let mut whole = true;
        self.snapshot.scan(self.space, &low, Some(&high), &mut |key, row| {
            // A row begins with the index that wrote it.
            whole = row.len() >= 8;
            whole && visit(&key[low.len()..], &row[8..])
        })?;
        if whole { Ok(()) } else { Err(Error::Damaged { group: self.group, what: "a row" }) }
    }

    fn records(&self, bounds: LogBounds, visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<(), Error> {
        let key = |offset| [&self.prefix[..], &log::record_key(bounds.era, offset)].concat();
        let (mut next, mut whole, mut stopped) = (bounds.lowest, true, false);
        self.snapshot.scan(
            self.space,
            &key(bounds.lowest),
            Some(&key(bounds.next)),
            &mut |found, record| {
                whole = *found == key(next)[..];
                stopped = whole && !visit(&next.to_be_bytes(), record);
                next += 1;
                whole && !stopped
            },
        )?;
        match whole && (stopped || next == bounds.next) {
            true => Ok(()),
            false => Err(Error::Damaged { group: self.group, what: "a log's row" }),
        }
    }
}
