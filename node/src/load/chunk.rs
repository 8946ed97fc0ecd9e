//! A stretch of lines as batches, one or more per predicate.

use std::collections::BTreeMap;

use pontoon_proto::v1::WriteOp;

use super::row_of;
use crate::{
    client::put,
    rdf::{Line, parse_line},
};

/// A predicate's batch is cut here, far below what a group takes at once.
const BATCH_OPS: usize = 1_024;
const BATCH_BYTES: usize = 512 << 10;
/// A chunk is full at whichever comes first.
const CHUNK_LINES: u64 = 16_384;
const CHUNK_BYTES: usize = 2 << 20;
/// What a row may have; the cluster would refuse the batch.
const KEY_BYTES: usize = 4_096;
const VALUE_BYTES: usize = 1 << 20;
const PREDICATE_BYTES: usize = 1_024;

/// Lines `first_line..=last_line`, ready to be written.
#[derive(Debug, Default)]
pub(super) struct Chunk {
    pub(super) batches: Vec<(String, Vec<WriteOp>)>,
    open: BTreeMap<String, (Vec<WriteOp>, usize)>,
    pub(super) first_line: u64,
    pub(super) last_line: u64,
    /// Where the line after the last one begins.
    pub(super) next: u64,
    pub(super) triples: u64,
    bytes: usize,
}

impl Chunk {
    /// Takes a line in.
    ///
    /// # Errors
    /// Why it is not a statement that can be stored. Then the chunk still ends before that line.
    pub(super) fn add(&mut self, line: &Line) -> Result<(), String> {
        let Some(statement) = parse_line(&line.text).map_err(|error| error.to_string())? else {
            self.pass(line);
            return Ok(());
        };
        let predicate = statement.predicate;
        if predicate.len() > PREDICATE_BYTES {
            return Err(format!(
                "the predicate has {} bytes, the limit is {PREDICATE_BYTES}",
                predicate.len()
            ));
        }
        if predicate.starts_with('@') {
            return Err(format!("names that begin with @, as {predicate}, belong to the cluster itself"));
        }
        let (key, value) = row_of(&statement);
        if key.len() > KEY_BYTES {
            return Err(format!("the subject makes a key of {} bytes, the limit is {KEY_BYTES}", key.len()));
        }
        if value.len() > VALUE_BYTES {
            return Err(format!("the object has {} bytes, the limit is {VALUE_BYTES}", value.len()));
        }
        let size = key.len() + value.len();
        let (ops, bytes) = self.open.entry(predicate.to_owned()).or_default();
        if !ops.is_empty() && *bytes + size > BATCH_BYTES {
            self.batches.push((predicate.to_owned(), std::mem::take(ops)));
            *bytes = 0;
        }
        ops.push(put(key, value));
        *bytes += size;
        if ops.len() >= BATCH_OPS {
            self.batches.push((predicate.to_owned(), std::mem::take(ops)));
            *bytes = 0;
        }
        self.triples += 1;
        self.bytes += size;
        self.pass(line);
        Ok(())
    }

    /// Takes in that a line was dealt with.
    pub(super) fn pass(&mut self, line: &Line) {
        if self.first_line == 0 {
            self.first_line = line.number;
        }
        (self.last_line, self.next) = (line.number, line.next);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.first_line == 0
    }

    pub(super) fn is_full(&self) -> bool {
        self.last_line - self.first_line >= CHUNK_LINES || self.bytes >= CHUNK_BYTES
    }

    /// Closes the open batches.
    pub(super) fn finish(mut self) -> Self {
        let open = std::mem::take(&mut self.open);
        let rest = open.into_iter().filter(|(_, (ops, _))| !ops.is_empty());
        self.batches.extend(rest.map(|(predicate, (ops, _))| (predicate, ops)));
        self
    }
}
