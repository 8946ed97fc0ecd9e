//! Restores predicates from a backup into a cluster, by ordinary writes.
//!
//! ```text
//!  chunk ── hash checked ──> rows ──> batches, several under way ──> the group's log ──> a quorum
//!                                                         └─ progress file: chunks before which all is acknowledged
//! ```
//!
//! A predicate that has rows is never written into, unless the progress file says that they are this restore's own: it names the
//! group, and a group's id is given out once. What takes the place of another predicate is written beside it ([`Restoring`]). A
//! restored row has the same bytes however often it is written, and a record is appended
//! only at its own offset, so what was written before a kill may be written again. At the end the cluster is asked for a hash of all
//! rows, which must be the backup's.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::{StreamExt, stream};
use pontoon_proto::v1;
use pontoon_shard::Feature;
use serde::Serialize;
use tokio::time::Instant;

use super::{
    error::BackupError,
    manifest::{Manifest, PredicateBackup, hash_of},
    place::Source,
    progress::Notes,
    restoring::{Restoring, way},
    take::{blocking, note},
};
use crate::{client::Client, cluster::REPLACE_LATER, rules};

/// Predicates at a time.
const PREDICATES_AT_ONCE: usize = 4;
/// How long one batch may take: a restore outlives an election or two.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
pub(super) const PAUSE: Duration = Duration::from_millis(100);

/// How to restore.
#[derive(Debug, Clone, Default)]
pub struct RestoreOptions {
    /// Which backup, by its id or the beginning or end of it; the latest without.
    pub backup: Option<String>,
    /// Only these predicates; empty: all of it.
    pub predicates: Vec<String>,
    /// The name of the restored predicate, if it is one.
    pub rename: Option<String>,
    /// Put it in the place of what has rows, in one step, once it is restored beside that and compared: from cluster version 2 on.
    pub replace: bool,
    /// Set the placement rules, too, if the cluster has none.
    pub rules: bool,
    /// The progress file; `None`: the backup's name with `.pontoon-restore` behind it.
    pub state: Option<PathBuf>,
}

/// A restored predicate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Restored {
    /// In the backup.
    pub predicate: String,
    /// In the cluster.
    pub name: String,
    /// `map` or `log`.
    pub kind: String,
    /// Rows or records.
    pub rows: u64,
    /// Their bytes.
    pub bytes: u64,
    /// The hash of all rows, read back from the cluster.
    pub hash: String,
}

/// What a restore did.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct RestoreReport {
    /// Which backup.
    pub backup: String,
    /// In the order of their names.
    pub predicates: Vec<Restored>,
    /// Bytes of rows that this run wrote.
    pub written_bytes: u64,
    /// Whether an earlier run was gone on with.
    pub resumed: bool,
    /// Whether the placement rules were set.
    pub rules: bool,
    /// How long this run took.
    pub seconds: f64,
}

/// Restores predicates of a backup into a cluster.
///
/// On return every row is durable on a quorum, was read back as the backup has it, and the progress file is gone. After an error
/// or a kill the same call goes on where it was.
///
/// # Errors
/// [`BackupError::Conflict`] before anything is done if the cluster has one of them with rows; [`BackupError::Damaged`] names a file of
/// the backup; [`BackupError::Differs`] if what was restored is not what the backup has.
///
/// # Cancel safety
/// As a kill.
pub async fn restore(
    client: &Client,
    path: &Path,
    options: &RestoreOptions,
    mut show: impl FnMut(u64, Option<&Restored>) + Send,
) -> Result<RestoreReport, BackupError> {
    let begun = Instant::now();
    let client = client.with_deadline(PATIENCE);
    let (source, manifest) = {
        let (path, id) = (path.to_owned(), options.backup.clone());
        blocking(move || {
            let source = Source::open(&path)?;
            let manifest = source.find(&path, id.as_deref())?;
            Ok((Arc::new(source), Arc::new(manifest)))
        })
        .await?
    };
    let jobs = jobs(&manifest, options)?;
    whole_enough(path, &source, &jobs)?;
    let cluster = client.status(v1::StatusRequest {}).await?.cluster;
    let cluster = uuid::Uuid::from_slice(&cluster).map(|id| id.to_string()).unwrap_or_default();
    let state = options.state.clone().unwrap_or_else(|| {
        let mut name = path.as_os_str().to_owned();
        name.push(".pontoon-restore");
        PathBuf::from(name)
    });
    let (notes, resumed) = Notes::open(state, cluster, manifest.id.clone())?;
    let notes = Arc::new(Mutex::new(notes));
    let rules_set = match options.rules {
        true => set_rules(&client, &manifest.rules).await?,
        false => false,
    };
    let mut ready = Vec::new();
    let mut conflicts = Vec::new();
    for (predicate, name) in jobs {
        let Some(way) = way(&client, &notes, predicate, &name, options.replace).await? else {
            conflicts.push(name.clone());
            continue;
        };
        let (source, path, predicate) = (source.clone(), path.to_owned(), predicate.clone());
        let (client, notes) = (client.clone(), notes.clone());
        ready.push(Restoring { client, source, path, notes, predicate, name, way });
    }
    if !conflicts.is_empty() {
        return Err(BackupError::Conflict { predicates: conflicts });
    }
    let beside: Vec<String> = ready.iter().filter_map(Restoring::beside).collect();
    if let Some(both) = ready.iter().find(|one| beside.contains(&one.name)) {
        let name = &both.name;
        let reason = format!(
            "{name} is to be restored, and is the name under which something else would be restored first; name what you want with \
             --predicate, one after the other"
        );
        return Err(BackupError::Refused { reason });
    }
    if !beside.is_empty() {
        // Better now than after hours.
        let now = client.upgrade_status(v1::UpgradeStatusRequest {}).await?.cluster_version;
        if !Feature::ReplacedShards.is_on(now) {
            return Err(BackupError::Refused { reason: REPLACE_LATER.to_owned() });
        }
    }
    let mut running =
        stream::iter(ready.into_iter().map(|one| one.run())).buffer_unordered(PREDICATES_AT_ONCE);
    let mut predicates = Vec::new();
    let mut looks = tokio::time::interval(PAUSE);
    loop {
        let one = tokio::select! {
            one = running.next() => one,
            _ = looks.tick() => {
                let written = notes.lock().expect(UNPOISONED).written;
                show(written, None);
                continue;
            }
        };
        let Some(one) = one else { break };
        let one = one?;
        let written = notes.lock().expect(UNPOISONED).written;
        show(written, Some(&one));
        predicates.push(one);
    }
    drop(running);
    predicates.sort_by(|a, b| a.name.cmp(&b.name));
    let written_bytes = {
        let notes = notes.lock().expect(UNPOISONED);
        notes.remove()?;
        notes.written
    };
    let part = Manifest {
        predicates: manifest
            .predicates
            .iter()
            .filter(|found| predicates.iter().any(|one| one.predicate == found.predicate))
            .cloned()
            .collect(),
        ..(*manifest).clone()
    };
    // What is restored is there whether the cluster notes it or not.
    if let Err(error) = note(&client, "restore", &part, 0).await {
        tracing::warn!(%error, "the cluster could not be told of the restore");
    }
    Ok(RestoreReport {
        backup: manifest.id.clone(),
        predicates,
        written_bytes,
        resumed,
        rules: rules_set,
        seconds: begun.elapsed().as_secs_f64(),
    })
}

/// What is to be restored, and under which names.
fn jobs<'a>(
    manifest: &'a Manifest,
    options: &RestoreOptions,
) -> Result<Vec<(&'a PredicateBackup, String)>, BackupError> {
    let refused = |reason: String| BackupError::Refused { reason };
    let chosen: Vec<&PredicateBackup> = match options.predicates.is_empty() {
        true => manifest.predicates.iter().collect(),
        false => options
            .predicates
            .iter()
            .map(|asked| {
                manifest.predicate(asked).ok_or_else(|| BackupError::NotInBackup {
                    id: manifest.id.clone(),
                    predicate: asked.clone(),
                })
            })
            .collect::<Result<_, _>>()?,
    };
    if let Some(strange) = chosen.iter().find(|found| found.kind().is_none()) {
        let (name, kind) = (&strange.predicate, &strange.kind);
        return Err(refused(format!("{name} is of the kind {kind}, which this version does not know")));
    }
    match &options.rename {
        None => Ok(chosen.into_iter().map(|found| (found, found.predicate.clone())).collect()),
        Some(name) if name.starts_with('@') => Err(refused(format!(
            "{name} belongs to the cluster itself; choose a name that does not begin with @"
        ))),
        Some(name) => match chosen[..] {
            [found] => Ok(vec![(found, name.clone())]),
            _ => Err(refused(format!(
                "--as names one predicate, and {} are to be restored: say which with --predicate",
                chosen.len()
            ))),
        },
    }
}

/// Looks whether all chunks are there at all, before anything is done.
fn whole_enough(
    path: &Path,
    source: &Source,
    jobs: &[(&PredicateBackup, String)],
) -> Result<(), BackupError> {
    for (predicate, _) in jobs {
        for chunk in &predicate.chunks {
            if !source.has(&hash_of(path, &chunk.hash)?) {
                return Err(BackupError::Damaged {
                    path: path.to_owned(),
                    reason: format!("the chunk {} of {} is missing", chunk.hash, predicate.predicate),
                });
            }
        }
    }
    Ok(())
}

async fn set_rules(client: &Client, text: &str) -> Result<bool, BackupError> {
    let refused = |reason: String| BackupError::Refused { reason };
    if text.is_empty() {
        return Ok(false);
    }
    let now = client.rules(v1::RulesRequest::default()).await?.rules.unwrap_or_default();
    let wanted = rules::from_toml(text).map_err(|error| refused(format!("the backup's rules: {error}")))?;
    if now.revision > 0 {
        if rules::to_toml(&now) == rules::to_toml(&wanted) {
            return Ok(false);
        }
        return Err(refused(
            "the cluster has placement rules of its own; restore without --rules".to_owned(),
        ));
    }
    let request = v1::SetRulesRequest { rules: Some(wanted), ..Default::default() };
    let reply = client.set_rules(request).await?;
    match reply.set {
        true => Ok(true),
        false => {
            let findings: Vec<String> = reply
                .findings
                .into_iter()
                .map(|found| format!("{}: {}", found.predicate, found.text))
                .collect();
            Err(refused(format!(
                "the backup's rules cannot be met here ({}); restore without --rules",
                findings.join("; ")
            )))
        }
    }
}

/// No code panics while it holds the lock.
pub(super) const UNPOISONED: &str = "the lock's holders do not panic";
