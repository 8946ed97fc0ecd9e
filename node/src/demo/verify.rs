//! Reads everything back and compares it with what was loaded and acknowledged.
//!
//! Of each expected row only a hash is kept, so that a large data set fits into memory.

use std::{
    collections::{BTreeMap, HashSet},
    path::Path,
};

use pontoon_node::{
    client::{Client, Range},
    load::row_of,
    rdf::{Lines, parse_line},
};

use super::traffic::{LIVE, row};
use crate::cli::{Failure, percent_bar};

/// How many lost things are named.
const EXAMPLES: usize = 5;
const PAGE_ROWS: u32 = 10_000;

/// Per predicate the hashes of its rows.
pub(super) type Expected = BTreeMap<String, HashSet<u128>>;

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Verified {
    /// Statements that are there as they were loaded.
    pub(super) triples: u64,
    /// Acknowledged live writes that are there.
    pub(super) live: u64,
    /// Statements and acknowledged writes that are not there, or not as they were.
    pub(super) lost: u64,
    /// Rows that nobody wrote.
    pub(super) foreign: u64,
    pub(super) examples: Vec<String>,
}

/// The rows that a file's statements make.
pub(super) fn expected(file: &Path) -> Result<Expected, Failure> {
    let failed = |text: String| Failure::error(format!("{}: {text}", file.display()));
    let mut lines = Lines::open(file).map_err(|error| Failure::error(error.to_string()))?;
    let mut expected = Expected::new();
    while let Some(line) = lines.next_line().map_err(|error| Failure::error(error.to_string()))? {
        let statement =
            parse_line(&line.text).map_err(|error| failed(format!("line {}: {error}", line.number)))?;
        let Some(statement) = statement else { continue };
        let (key, value) = row_of(&statement);
        let hash = hash(&key, value.as_bytes());
        match expected.get_mut(statement.predicate) {
            Some(rows) => drop(rows.insert(hash)),
            None => drop(expected.insert(statement.predicate.to_owned(), HashSet::from([hash]))),
        }
    }
    Ok(expected)
}

/// Scans every predicate.
pub(super) async fn all(
    client: &Client,
    expected: Expected,
    live_in: &str,
    acknowledged: &[u64],
    quiet: bool,
) -> Result<Verified, Failure> {
    let total = expected.values().map(|rows| rows.len() as u64).sum::<u64>() + acknowledged.len() as u64;
    let bar = percent_bar(total, "reading [{bar:32}] {percent:>3}% of {len} rows, {eta} left");
    if quiet {
        bar.set_draw_target(indicatif::ProgressDrawTarget::hidden());
    }
    let mut verified = Verified::default();
    let mut live: BTreeMap<String, u64> =
        acknowledged.iter().map(|&number| (row(number).0, number)).collect();
    for (predicate, mut rows) in expected {
        let mut range = Range { limit: PAGE_ROWS, ..Range::default() };
        loop {
            let page = client.scan(&predicate, &range).await?;
            bar.inc(page.rows.len() as u64);
            for found in page.rows {
                if rows.remove(&hash(&found.key, &found.value)) {
                    verified.triples += 1;
                } else if predicate == live_in && found.key.starts_with(LIVE.as_bytes()) {
                    let key = String::from_utf8_lossy(&found.key).into_owned();
                    // A write that failed for its writer may still have been applied: it is nobody's loss.
                    let Some(&number) = live.get(&key) else { continue };
                    if found.value == row(number).1 {
                        live.remove(&key);
                        verified.live += 1;
                    }
                } else {
                    verified.foreign += 1;
                    verified.name(format!("a foreign row in {predicate}: {}", found.key.escape_ascii()));
                }
            }
            if page.continuation.is_empty() {
                break;
            }
            range.continuation = page.continuation;
        }
        verified.lost += rows.len() as u64;
        if !rows.is_empty() {
            verified.name(format!("{} triples of {predicate}", rows.len()));
        }
    }
    verified.lost += live.len() as u64;
    for key in live.into_keys().take(EXAMPLES) {
        verified.name(format!("the acknowledged live write {key}"));
    }
    bar.finish_and_clear();
    Ok(verified)
}

impl Verified {
    fn name(&mut self, example: String) {
        if self.examples.len() < EXAMPLES {
            self.examples.push(example);
        }
    }
}

fn hash(key: &[u8], value: &[u8]) -> u128 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(key.len() as u64).to_le_bytes());
    hasher.update(key);
    hasher.update(value);
    let mut half = [0; 16];
    half.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    u128::from_le_bytes(half)
}
