//! Reads rows, from any thread, while commands are applied.

use std::{fmt, sync::Arc};

use bytes::Bytes;

use super::machine::decode_row;
use crate::{
    engine::prefix_end,
    error::Error,
    layout::{self, DATA, row_key},
    store::GroupView,
};

/// A row of a map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Its key.
    pub key: Bytes,
    /// Its value.
    pub value: Bytes,
    /// The index of the command that last wrote it.
    pub index: u64,
}

/// Which rows to read: those that begin with `prefix` and lie in [low, high).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scan {
    /// The first key that may come.
    pub low: Bytes,
    /// The first key that may not come any more; `None`: no end.
    pub high: Option<Bytes>,
    /// What every key begins with.
    pub prefix: Bytes,
    /// At most so many rows.
    pub limit: usize,
    /// Stops after the row with which keys and values reach so many bytes: at least one row comes, if there is one.
    pub max_bytes: usize,
}

impl Scan {
    /// Every row.
    pub fn all() -> Self {
        let (limit, max_bytes) = (1000, 1 << 20);
        Scan { low: Bytes::new(), high: None, prefix: Bytes::new(), limit, max_bytes }
    }

    /// The rows whose keys begin with `prefix`.
    pub fn prefix(prefix: impl Into<Bytes>) -> Self {
        Scan { prefix: prefix.into(), ..Self::all() }
    }

    /// The rows in [low, high).
    pub fn range(low: impl Into<Bytes>, high: Option<Bytes>) -> Self {
        Scan { low: low.into(), high, ..Self::all() }
    }
}

/// Part of a scan, as of one point in time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// The rows, in key order.
    pub rows: Vec<Row>,
    /// Where the next page begins: its `low`. `None`: there are no more rows.
    pub next: Option<Bytes>,
    /// The index of the last command that this page shows; 0 if none was applied yet.
    pub index: u64,
}

/// Reads a group's rows on this node, as far as it has applied its log. Whoever needs the latest passes a read barrier
/// first. Calls block on the engine.
#[derive(Clone)]
pub struct MapReader {
    view: Arc<GroupView>,
}

impl fmt::Debug for MapReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MapReader").field("group", &self.view.group).finish_non_exhaustive()
    }
}

impl MapReader {
    pub(crate) fn new(view: Arc<GroupView>) -> Self {
        MapReader { view }
    }

    /// The row of a key.
    ///
    /// # Errors
    /// [`Error::Gone`] if the replica was destroyed, and the engine's.
    pub fn get(&self, key: &[u8]) -> Result<Option<Row>, Error> {
        let found = self.view.get(&layout::logical(DATA, key))?;
        found.map(|row| self.row(Bytes::copy_from_slice(key), row)).transpose()
    }

    /// One page of rows, as of one point in time.
    ///
    /// # Errors
    /// [`Error::Gone`] if the replica was destroyed, and the engine's.
    pub fn scan(&self, scan: &Scan) -> Result<Page, Error> {
        let (generation, snapshot) = self.view.snapshot()?;
        let index = self.view.index_of(&*snapshot)?;
        let base = row_key(self.view.group, generation, &[DATA]);
        let low = scan.low.clone().max(scan.prefix.clone());
        let ends = [scan.high.clone(), prefix_end(&scan.prefix).map(Bytes::from)];
        let high = match ends.into_iter().flatten().min() {
            Some(high) => Some([&base[..], &high].concat()),
            None => prefix_end(&base),
        };
        let mut page = Page { rows: Vec::new(), next: None, index };
        let mut bytes = 0;
        let mut damage = None;
        snapshot.scan(self.view.space, &[&base[..], &low].concat(), high.as_deref(), &mut |key, value| {
            let key = Bytes::copy_from_slice(&key[base.len()..]);
            if page.rows.len() >= scan.limit.max(1) || (bytes >= scan.max_bytes && !page.rows.is_empty()) {
                page.next = Some(key);
                return false;
            }
            bytes += key.len() + value.len();
            match self.row(key, Bytes::copy_from_slice(value)) {
                Ok(row) => page.rows.push(row),
                Err(error) => damage = Some(error),
            }
            damage.is_none()
        })?;
        damage.map_or(Ok(page), Err)
    }

    /// The index of the last command whose effects are visible; 0 if none is.
    ///
    /// # Errors
    /// [`Error::Gone`] if the replica was destroyed, and the engine's.
    pub fn applied(&self) -> Result<u64, Error> {
        self.view.index_of(&*self.view.snapshot()?.1)
    }

    /// About how many bytes the rows take, counted as they were written.
    pub fn bytes(&self) -> u64 {
        self.view.bytes()
    }

    fn row(&self, key: Bytes, row: Bytes) -> Result<Row, Error> {
        let damaged = Error::Damaged { group: self.view.group, what: "a row" };
        let (value, index) = decode_row(row).ok_or(damaged)?;
        Ok(Row { key, value, index })
    }
}
