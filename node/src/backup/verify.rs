//! Verifies backups: every chunk is read and hashed, each once, and what is damaged is told by predicate.

use std::{collections::BTreeMap, path::Path};

use pontoon_proto::v1;
use serde::Serialize;

use super::{
    cut::rows_of,
    error::BackupError,
    feed::{Broken, Feed, Item, holders},
    manifest::{Manifest, Offsets, PredicateBackup, hash_of},
    place::Source,
    take::{addresses, blocking, to_hex},
};
use crate::client::Client;

/// What to verify.
#[derive(Debug, Clone, Default)]
pub struct VerifyOptions {
    /// Only this backup; all without.
    pub backup: Option<String>,
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Damage {
    /// The backup that it hits.
    pub backup: String,
    /// The predicate; empty: the whole backup, its manifest does not read.
    pub predicate: String,
    /// What, with the file.
    pub what: String,
    /// The rows of it that cannot be had.
    pub rows: u64,
}

/// What was verified.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct VerifyReport {
    /// Backups.
    pub backups: u64,
    /// Predicates of all of them.
    pub predicates: u64,
    /// Chunks that were read; one that several share counts once.
    pub chunks: u64,
    /// Bytes of their rows.
    pub bytes: u64,
    /// What is wrong; empty if all is well.
    pub damage: Vec<Damage>,
}

/// Reads and hashes all of a backup, or of all backups at a path. Blocks on the disk.
///
/// # Errors
/// If nothing of ours is there. Damage is in the report.
pub fn verify(path: &Path, options: &VerifyOptions) -> Result<VerifyReport, BackupError> {
    let source = Source::open(path)?;
    let ids = match &options.backup {
        None => source.ids()?,
        Some(id) => vec![source.find(path, Some(id))?.id],
    };
    let mut report = VerifyReport::default();
    let mut known: BTreeMap<String, Result<(), String>> = BTreeMap::new();
    for id in ids {
        report.backups += 1;
        let manifest = match source.manifest(&id) {
            Ok(manifest) => manifest,
            Err(error) => {
                let what = error.to_string();
                report.damage.push(Damage { backup: id, predicate: String::new(), what, rows: 0 });
                continue;
            }
        };
        for predicate in &manifest.predicates {
            report.predicates += 1;
            predicate_of(path, &source, &manifest, predicate, &mut known, &mut report)?;
        }
    }
    report.chunks = known.len() as u64;
    Ok(report)
}

fn predicate_of(
    path: &Path,
    source: &Source,
    manifest: &Manifest,
    predicate: &PredicateBackup,
    known: &mut BTreeMap<String, Result<(), String>>,
    report: &mut VerifyReport,
) -> Result<(), BackupError> {
    let mut damage = |what: String, rows| {
        let (backup, predicate) = (manifest.id.clone(), predicate.predicate.clone());
        report.damage.push(Damage { backup, predicate, what, rows });
    };
    let mut rows = 0;
    for chunk in &predicate.chunks {
        if !known.contains_key(&chunk.hash) {
            let found = source.chunk(&hash_of(path, &chunk.hash)?);
            let judged = match found {
                Ok(data) if data.len() as u64 != chunk.bytes => Err("it has another length".to_owned()),
                Ok(data) => {
                    report.bytes += chunk.bytes;
                    match rows_of(data) {
                        Ok(rows) if rows.len() as u64 == chunk.rows => Ok(()),
                        Ok(_) => Err("it has another number of rows".to_owned()),
                        Err(reason) => Err(reason.to_owned()),
                    }
                }
                Err(error) => Err(error.to_string()),
            };
            known.insert(chunk.hash.clone(), judged);
        }
        rows += chunk.rows;
        if let Some(Err(reason)) = known.get(&chunk.hash) {
            damage(format!("chunk {}: {reason}", chunk.hash), chunk.rows);
        }
    }
    if rows != predicate.rows {
        damage(format!("it should have {} rows, its chunks have {rows}", predicate.rows), 0);
    }
    Ok(())
}

/// What a predicate of a cluster has now.
pub(super) struct State {
    rows: u64,
    hash: String,
    offsets: Option<Offsets>,
}

impl State {
    /// How it differs from the backup; `None` if it does not. A log without records has its offsets still. Its era is its own.
    pub(super) fn differs(&self, backup: &PredicateBackup) -> Option<String> {
        let offsets = |at: &Offsets| (at.lowest, at.next);
        if let (Some(now), Some(then)) = (&self.offsets, &backup.offsets)
            && offsets(now) != offsets(then)
        {
            let ((low, high), (then_low, then_high)) = (offsets(now), offsets(then));
            return Some(format!("it has the offsets [{low}, {high}), the backup [{then_low}, {then_high})"));
        }
        let same = self.rows == backup.rows && self.hash == backup.hash;
        (!same).then(|| format!("it has {} rows, the backup {}", self.rows, backup.rows))
    }
}

/// Reads and hashes all rows of a predicate where they lie. No rows are sent.
pub(super) async fn state_of(client: &Client, predicate: &str) -> Result<State, String> {
    // Of two groups that had the name one after the other it must be the one that has it now.
    let request = v1::FindPredicateRequest { predicate: predicate.to_owned(), hops: 0 };
    let shard = client.find_predicate(request).await.map_err(|error| error.to_string())?.shard;
    let view = v1::PredicateView { shard: Some(shard.ok_or("it is not there")?), ..Default::default() };
    let mut reason = "no node is known to hold it".to_owned();
    for address in addresses(client, &holders(&view, 0)).await.map_err(|error| error.to_string())? {
        let Some(shard) = &view.shard else { break };
        match state_at(client, &address, shard).await {
            Ok(state) => return Ok(state),
            Err(Broken::Refused(error)) => return Err(error.to_string()),
            Err(Broken::Passes(heard)) => reason = heard,
            Err(Broken::Gone) => reason = "it is not there".to_owned(),
        }
    }
    Err(reason)
}

async fn state_at(client: &Client, address: &str, shard: &v1::Shard) -> Result<State, Broken> {
    let mut feed = Feed::open(client, address, shard, "").await?;
    loop {
        match feed.next().await? {
            Item::Cut(cut, hash) => feed.answer(&cut, hash, false).await,
            Item::Chunk(..) => {}
            Item::End(end) => {
                let offsets = feed.begun.bounds.map(Offsets::of);
                return Ok(State { rows: end.rows, hash: to_hex(&end.hash), offsets });
            }
        }
    }
}

/// How a predicate of a backup compares with the cluster's, as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Compared {
    /// Which.
    pub predicate: String,
    /// Rows in the backup and in the cluster.
    pub rows: (u64, u64),
    /// `same`, `differs`, or why it cannot be told.
    pub state: String,
}

/// Compares the predicates of a backup with those of a running cluster. What was written since makes a difference, too.
///
/// # Errors
/// If nothing of ours is there.
pub async fn compare(
    client: &Client,
    path: &Path,
    options: &VerifyOptions,
) -> Result<Vec<Compared>, BackupError> {
    let (path, id) = (path.to_owned(), options.backup.clone());
    let manifest = blocking(move || Source::open(&path)?.find(&path, id.as_deref())).await?;
    let mut compared = Vec::new();
    for predicate in &manifest.predicates {
        let (rows, state) = match state_of(client, &predicate.predicate).await {
            Ok(now) => {
                let same = now.differs(predicate).is_none();
                (now.rows, if same { "same" } else { "differs" }.to_owned())
            }
            Err(reason) => (0, reason),
        };
        compared.push(Compared {
            predicate: predicate.predicate.clone(),
            rows: (predicate.rows, rows),
            state,
        });
    }
    Ok(compared)
}
