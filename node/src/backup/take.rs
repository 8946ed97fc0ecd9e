//! Takes a backup: several predicates at a time, each from one of its replicas, chunk by chunk.
//!
//! A chunk that is stored already is not asked for. One that is not is stored as what differs from the chunk of the latest backup that
//! lies at its keys, so that a row here and there costs about its own bytes.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, stream};
use pontoon_proto::v1::{self, ShardKind, ShardState};
use serde::Serialize;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

use super::{
    error::BackupError,
    feed::{Broken, Feed, Item, holders},
    manifest::{ChunkRef, Manifest, Offsets, PredicateBackup, new_id},
    place::Target,
};
use crate::{
    client::{Client, ClientError},
    clock::unix_ms,
    config::OWN_KINDS_FROM,
    rules,
};

/// Predicates that are read at a time, and chunks of each that are on their way to the disk.
const PREDICATES_AT_ONCE: usize = 4;
const CHUNKS_AT_ONCE: usize = 4;
/// How long a predicate is tried, at one replica after the other, until the backup fails.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(200);

/// What to take.
#[derive(Debug, Clone, Default)]
pub struct BackupOptions {
    /// Only these predicates; empty: all.
    pub predicates: Vec<String>,
    /// What it may take of each node: slow, normal, fast, max or bytes per second. Empty: what received states may.
    pub budget: String,
}

/// What a backup did.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct BackupReport {
    /// What there is now.
    #[serde(skip)]
    pub manifest: Manifest,
    /// Bytes that nodes gave: of chunks that were not there.
    pub read_bytes: u64,
    /// Bytes that were written for them.
    pub stored_bytes: u64,
    /// Chunks of the backup, and those of them that were not there.
    pub chunks: u64,
    /// See `chunks`.
    pub new_chunks: u64,
    /// Predicates that are left out, and why.
    pub skipped: Vec<(String, String)>,
    /// How long it took.
    pub seconds: f64,
    /// Why the cluster could not be told that it is done; empty if it was.
    pub unnoted: String,
}

/// How far a backup is.
#[derive(Debug)]
pub enum Step<'a> {
    /// So many predicates, of about so many bytes.
    Begins {
        /// How many predicates.
        predicates: usize,
        /// About how many bytes.
        bytes: u64,
    },
    /// So many bytes of rows were looked at.
    Passed(u64),
    /// A predicate is done.
    Done(&'a PredicateBackup),
}

#[derive(Debug, Default)]
struct Counted {
    passed: AtomicU64,
    read: AtomicU64,
    stored: AtomicU64,
    chunks: AtomicU64,
    fresh: AtomicU64,
}

/// Takes a backup of a cluster into a directory of backups, or a new file.
///
/// Each predicate is as it was at one index, with everything that was acknowledged before it was asked for. On return the backup is
/// durable, and the cluster has an event that says so.
///
/// # Errors
/// [`BackupError::Unread`] if a predicate could not be read from any replica. There is no backup then; the chunks that were stored in a
/// directory are found by the next one.
///
/// # Cancel safety
/// As an error.
pub async fn take(
    client: &Client,
    path: &Path,
    options: &BackupOptions,
    mut show: impl FnMut(Step<'_>) + Send,
) -> Result<BackupReport, BackupError> {
    let (begun, begun_ms) = (Instant::now(), unix_ms());
    let (views, skipped) = wanted(client, &options.predicates).await?;
    let cluster = client.status(v1::StatusRequest {}).await?.cluster;
    let rules = client.rules(v1::RulesRequest::default()).await?.rules.filter(|rules| rules.revision > 0);
    let target = {
        let path = path.to_owned();
        blocking(move || Target::open(&path)).await?
    };
    show(Step::Begins { predicates: views.len(), bytes: views.iter().map(|view| view.bytes).sum() });
    let target = Arc::new(target);
    let last = Arc::new(latest_bases(&target)?);
    let counted = Arc::new(Counted::default());
    let taken = views.into_iter().enumerate().map(|(turn, view)| {
        let taking = Taking {
            client: client.clone(),
            target: target.clone(),
            last: last.clone(),
            counted: counted.clone(),
            budget: options.budget.clone(),
        };
        async move { taking.predicate(view, turn).await }
    });
    let mut taken = stream::iter(taken).buffer_unordered(PREDICATES_AT_ONCE);
    let (mut predicates, mut skipped) = (Vec::new(), skipped);
    let mut looks = tokio::time::interval(PAUSE);
    loop {
        let one = tokio::select! {
            one = taken.next() => one,
            _ = looks.tick() => {
                show(Step::Passed(counted.passed.load(Ordering::Relaxed)));
                continue;
            }
        };
        match one {
            None => break,
            Some(Ok(Ok(predicate))) => {
                show(Step::Done(&predicate));
                predicates.push(predicate);
            }
            Some(Ok(Err(name))) => skipped.push((name, "it was dropped meanwhile".to_owned())),
            Some(Err(error)) => return Err(error),
        }
    }
    drop(taken);
    predicates.sort_by(|a, b| a.predicate.cmp(&b.predicate));
    let manifest = Manifest {
        id: new_id(begun_ms),
        begun_ms,
        done_ms: unix_ms(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        cluster: uuid::Uuid::from_slice(&cluster).map(|id| id.to_string()).unwrap_or_default(),
        all: options.predicates.is_empty(),
        predicates,
        rules: rules.map(|rules| rules::to_toml(&rules)).unwrap_or_default(),
    };
    let target = Arc::into_inner(target)
        .ok_or_else(|| BackupError::Refused { reason: "a chunk is still being written".to_owned() })?;
    let manifest = blocking(move || target.finish(&manifest).map(|()| manifest)).await?;
    let mut report = BackupReport {
        read_bytes: counted.read.load(Ordering::Relaxed),
        stored_bytes: counted.stored.load(Ordering::Relaxed),
        chunks: counted.chunks.load(Ordering::Relaxed),
        new_chunks: counted.fresh.load(Ordering::Relaxed),
        skipped,
        seconds: begun.elapsed().as_secs_f64(),
        unnoted: String::new(),
        manifest,
    };
    // The backup is there whether the cluster hears of it or not.
    if let Err(error) = note(client, "backup", &report.manifest, report.stored_bytes).await {
        report.unnoted = error.to_string();
    }
    Ok(report)
}

/// Tells the cluster what was done.
pub(super) async fn note(
    client: &Client,
    action: &str,
    manifest: &Manifest,
    stored_bytes: u64,
) -> Result<(), ClientError> {
    let note = v1::BackupNoteRequest {
        action: action.to_owned(),
        id: manifest.id.clone(),
        predicates: manifest.predicates.len() as u64,
        rows: manifest.rows(),
        bytes: manifest.bytes(),
        stored_bytes,
        all: manifest.all,
        hops: 0,
    };
    client.backup_note(note).await.map(drop)
}

/// The predicates that are to be read, and those that cannot be.
pub(crate) async fn wanted(
    client: &Client,
    asked: &[String],
) -> Result<(Vec<v1::PredicateView>, Vec<(String, String)>), BackupError> {
    let mut views = client.predicates(v1::PredicatesRequest::default()).await?.predicates;
    let name = |view: &v1::PredicateView| {
        view.shard.as_ref().map(|shard| shard.predicate.clone()).unwrap_or_default()
    };
    views.retain(|view| !name(view).starts_with('@'));
    views.sort_by_key(name);
    let asked: std::collections::BTreeSet<&String> = asked.iter().collect();
    if !asked.is_empty() {
        views.retain(|view| asked.contains(&name(view)));
        let found: std::collections::BTreeSet<String> = views.iter().map(name).collect();
        if let Some(missing) = asked.into_iter().find(|asked| !found.contains(*asked)) {
            return Err(ClientError::NoSuchPredicate { predicate: missing.clone() }.into());
        }
    }
    let mut skipped = Vec::new();
    views.retain(|view| {
        let Some(shard) = &view.shard else { return false };
        let why = match shard.state() {
            _ if shard.kind >= OWN_KINDS_FROM => "its state machine is an embedder's own",
            ShardState::Live => return true,
            ShardState::Creating => "it is being made",
            ShardState::Dropping => "it is being dropped",
        };
        skipped.push((shard.predicate.clone(), why.to_owned()));
        false
    });
    Ok((views, skipped))
}

/// Of each predicate of the latest backup: first keys, and which chunk lies there.
type Bases = BTreeMap<String, BTreeMap<Vec<u8>, blake3::Hash>>;

fn latest_bases(target: &Target) -> Result<Bases, BackupError> {
    let mut bases = Bases::new();
    for predicate in target.latest()?.into_iter().flat_map(|manifest| manifest.predicates) {
        let chunks = predicate.chunks.iter().filter_map(|chunk| {
            Some((from_hex(&chunk.first_key)?, blake3::Hash::from_hex(&chunk.hash).ok()?))
        });
        bases.insert(predicate.predicate.clone(), chunks.collect());
    }
    Ok(bases)
}

/// Reads one predicate.
struct Taking {
    client: Client,
    target: Arc<Target>,
    last: Arc<Bases>,
    counted: Arc<Counted>,
    budget: String,
}

impl Taking {
    /// The predicate; its name, if it is gone.
    async fn predicate(
        self,
        mut view: v1::PredicateView,
        turn: usize,
    ) -> Result<Result<PredicateBackup, String>, BackupError> {
        let name = view.shard.as_ref().map(|shard| shard.predicate.clone()).unwrap_or_default();
        let until = Instant::now() + PATIENCE;
        let mut reason = "no node is known to hold it".to_owned();
        let mut turn = turn;
        loop {
            for address in addresses(&self.client, &holders(&view, turn)).await? {
                let Some(shard) = &view.shard else { break };
                let tried = match Feed::open(&self.client, &address, shard, &self.budget).await {
                    Ok(mut feed) => self.read(&mut feed).await,
                    Err(broken) => Err(Failed::Feed(broken)),
                };
                match tried {
                    Ok(predicate) => return Ok(Ok(predicate)),
                    Err(Failed::Store(error)) => return Err(error),
                    Err(Failed::Feed(Broken::Refused(error))) => return Err(error.into()),
                    Err(Failed::Feed(Broken::Passes(heard))) => reason = heard,
                    Err(Failed::Feed(Broken::Gone)) => reason = format!("{address} does not know its group"),
                }
            }
            if Instant::now() >= until {
                return Err(BackupError::Unread { predicate: name, reason });
            }
            sleep(PAUSE).await;
            turn += 1;
            // Its replicas may lie elsewhere by now, or it is gone.
            let request = v1::FindPredicateRequest { predicate: name.clone(), hops: 0 };
            if self.client.find_predicate(request).await?.shard.is_none() {
                return Ok(Err(name));
            }
            let request = v1::PredicatesRequest { predicate: name.clone() };
            if let Some(fresh) = self.client.predicates(request).await?.predicates.pop() {
                view = fresh;
            }
        }
    }

    async fn read(&self, feed: &mut Feed) -> Result<PredicateBackup, Failed> {
        let begun = feed.begun.clone();
        let shard = begun.shard.unwrap_or_default();
        let bases = self.last.get(&shard.predicate);
        let mut chunks: Vec<ChunkRef> = Vec::new();
        let mut near: HashMap<blake3::Hash, Option<blake3::Hash>> = HashMap::new();
        let mut storing: JoinSet<Result<(), BackupError>> = JoinSet::new();
        let end = loop {
            match feed.next().await? {
                Item::Cut(cut, hash) => {
                    let there = near.contains_key(&hash) || self.target.has(&hash);
                    if !there {
                        let below =
                            bases.and_then(|bases| bases.range(..=cut.first_key.to_vec()).next_back());
                        near.insert(hash, below.map(|(_, below)| *below));
                    }
                    chunks.push(ChunkRef {
                        hash: hash.to_hex().to_string(),
                        bytes: cut.bytes,
                        rows: cut.rows,
                        first_key: to_hex(&cut.first_key),
                    });
                    self.counted.passed.fetch_add(cut.bytes, Ordering::Relaxed);
                    feed.answer(&cut, hash, !there).await;
                }
                Item::Chunk(hash, data) => {
                    let near = near.get(&hash).copied().flatten();
                    if storing.len() >= CHUNKS_AT_ONCE {
                        stored(&mut storing).await?;
                    }
                    let (target, counted) = (self.target.clone(), self.counted.clone());
                    storing.spawn_blocking(move || {
                        let bytes = target.put(&hash, &data, near)?;
                        counted.read.fetch_add(data.len() as u64, Ordering::Relaxed);
                        counted.stored.fetch_add(bytes, Ordering::Relaxed);
                        counted.fresh.fetch_add(1, Ordering::Relaxed);
                        Ok(())
                    });
                }
                Item::End(end) => break end,
            }
        };
        while !storing.is_empty() {
            stored(&mut storing).await?;
        }
        self.counted.chunks.fetch_add(chunks.len() as u64, Ordering::Relaxed);
        let (rows, bytes) =
            chunks.iter().fold((0, 0), |(rows, bytes), chunk| (rows + chunk.rows, bytes + chunk.bytes));
        if (rows, bytes, chunks.len() as u64) != (end.rows, end.bytes, end.chunks) {
            return Err(Failed::Feed(Broken::Passes("what came is not what the node counted".to_owned())));
        }
        let kind = match shard.kind() {
            ShardKind::Log => "log",
            ShardKind::Map | ShardKind::Meta => "map",
        };
        Ok(PredicateBackup {
            predicate: shard.predicate,
            kind: kind.to_owned(),
            replicas: shard.replicas_wanted,
            group: shard.group,
            index: begun.index,
            term: begun.term,
            rows,
            bytes,
            hash: to_hex(&end.hash),
            offsets: begun.bounds.map(Offsets::of),
            chunks,
        })
    }
}

enum Failed {
    Feed(Broken),
    Store(BackupError),
}

impl From<Broken> for Failed {
    fn from(broken: Broken) -> Self {
        Failed::Feed(broken)
    }
}

/// Waits for one chunk to be stored.
async fn stored(storing: &mut JoinSet<Result<(), BackupError>>) -> Result<(), Failed> {
    let Some(done) = storing.join_next().await else { return Ok(()) };
    done.unwrap_or_else(|error| {
        Err(BackupError::Refused { reason: format!("a chunk was not stored: {error}") })
    })
    .map_err(Failed::Store)
}

/// Where nodes listen, in their order; those that are not known are left out.
pub(crate) async fn addresses(client: &Client, nodes: &[u64]) -> Result<Vec<String>, ClientError> {
    let known = client.nodes(v1::NodesRequest {}).await?.nodes;
    let known: Vec<(u64, bool, String)> = known
        .into_iter()
        .filter_map(|view| view.node.map(|node| (node.id, view.reachable, node.address)))
        .collect();
    let mut found: Vec<&(u64, bool, String)> =
        nodes.iter().filter_map(|node| known.iter().find(|(id, ..)| id == node)).collect();
    found.sort_by_key(|(_, reachable, _)| !reachable);
    Ok(found.into_iter().map(|(_, _, address)| address.clone()).collect())
}

pub(super) fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    (digits.len().is_multiple_of(2)).then(|| digits.chunks(2).map(byte).collect())?
}

/// Runs what blocks on the disk away from the network's threads.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BackupError> + Send + 'static,
) -> Result<T, BackupError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| BackupError::Refused { reason: error.to_string() })?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_back_from_hexadecimal() {
        for key in [&b""[..], b"\0\xff", b"key"] {
            assert_eq!(from_hex(&to_hex(key)).as_deref(), Some(key));
        }
        assert_eq!(from_hex("0"), None);
        assert_eq!(from_hex("zz"), None);
    }
}
