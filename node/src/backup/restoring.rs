//! One predicate on its way into a cluster, and how it comes under its name.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use futures::{StreamExt, stream};
use pontoon_proto::v1::{self, ShardKind, WriteOp};
use tokio::time::{Instant, sleep};

use super::{
    cut::rows_of,
    error::BackupError,
    manifest::{Offsets, PredicateBackup, hash_of},
    place::Source,
    progress::{Notes, Place},
    restore::{PATIENCE, PAUSE, Restored, UNPOISONED},
    take::blocking,
    verify::state_of,
};
use crate::{
    client::{Client, Range, put},
    route::check_predicate,
};

/// Chunks of a map that are on their way.
const CHUNKS_AT_ONCE: usize = 4;
/// A batch is cut here: far below what a group takes at once, far above what an entry costs.
const BATCH_BYTES: usize = 512 << 10;
const BATCH_ROWS: usize = 4_096;

/// What the cluster has under a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    Free,
    /// Somebody made it and nobody wrote to it, or this restore did.
    Ours(Place),
    /// This group has rows that are not this restore's, or is of another kind.
    Taken(u64),
}

/// Looks what is under a predicate's name.
async fn standing(
    client: &Client,
    known: Option<Place>,
    predicate: &PredicateBackup,
    name: &str,
) -> Result<Standing, BackupError> {
    let request = v1::FindPredicateRequest { predicate: name.to_owned(), hops: 0 };
    let Some(shard) = client.find_predicate(request).await?.shard else { return Ok(Standing::Free) };
    if shard.state() == v1::ShardState::Dropping {
        return Ok(Standing::Free);
    }
    let replaced = known.is_some_and(|place| place.replaces == shard.group);
    if replaced || predicate.kind() != v1::ShardKind::try_from(shard.kind).ok() {
        return Ok(Standing::Taken(shard.group));
    }
    if let Some(place) = known.filter(|place| place.group == shard.group) {
        return Ok(Standing::Ours(place));
    }
    let empty = match shard.kind() {
        ShardKind::Log => {
            let bounds = client.log(name).bounds().await?;
            bounds.next == 0 && bounds.era == 1
        }
        ShardKind::Map | ShardKind::Meta => {
            client.scan(name, &Range { limit: 1, ..Range::default() }).await?.rows.is_empty()
        }
    };
    match empty {
        true => Ok(Standing::Ours(Place { group: shard.group, chunks: 0, replaces: 0 })),
        false => Ok(Standing::Taken(shard.group)),
    }
}

/// How what is restored comes under its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// It is written there. Without a place the predicate is made first.
    Straight(Option<Place>),
    /// It is written beside, under [`beside`], and takes the place of a group.
    Beside {
        /// That group.
        old: u64,
        /// How far it is, if it was begun.
        place: Option<Place>,
    },
    /// It is there.
    Done,
}

/// The name under which is restored what is to take the place of something.
fn beside(name: &str) -> String {
    format!("{name}.restoring")
}

/// Looks how a predicate comes under its name; `None` if that belongs to something else, which may not be replaced.
pub(super) async fn way(
    client: &Client,
    notes: &Mutex<Notes>,
    predicate: &PredicateBackup,
    name: &str,
    replace: bool,
) -> Result<Option<Way>, BackupError> {
    let known = notes.lock().expect(UNPOISONED).place(name);
    let old = match standing(client, known, predicate, name).await? {
        Standing::Free => return Ok(Some(Way::Straight(None))),
        // It has the name already, so it was compared, and its users may have written to it since.
        Standing::Ours(place) if place.replaces != 0 => return Ok(Some(Way::Done)),
        Standing::Ours(place) => return Ok(Some(Way::Straight(Some(place)))),
        Standing::Taken(_) if !replace => return Ok(None),
        Standing::Taken(old) => old,
    };
    let (refused, other) = (|reason: String| BackupError::Refused { reason }, beside(name));
    check_predicate(&other).map_err(refused)?;
    let place = match standing(client, known, predicate, &other).await? {
        Standing::Free => None,
        Standing::Ours(place) if place.group > old => Some(Place { replaces: old, ..place }),
        Standing::Ours(_) | Standing::Taken(_) => {
            return Err(refused(format!(
                "{other}, where {name} would be restored before it takes its place, is something else; drop that first"
            )));
        }
    };
    Ok(Some(Way::Beside { old, place }))
}

/// Restores one predicate.
///
/// One that takes the place of another is written and compared beside it, and then gets its name by one command of the meta group,
/// which drops the other in the same step. Whenever anybody dies, who reads by the name finds one of the two whole:
///
/// 1. Before the group beside is noted: it is empty, and the next run takes it for its own.
/// 2. While it is written: the next run goes on. A restore that is given up leaves it to be dropped, and nothing else.
/// 3. Before the answer to the command comes: either it was committed or not. The next run finds out by which group has the name.
/// 4. After it: the progress file says which group was to take the place. That has it, so there is nothing left to do.
pub(super) struct Restoring {
    pub(super) client: Client,
    pub(super) source: Arc<Source>,
    pub(super) path: PathBuf,
    pub(super) notes: Arc<Mutex<Notes>>,
    pub(super) predicate: PredicateBackup,
    /// The name in the cluster.
    pub(super) name: String,
    pub(super) way: Way,
}

impl Restoring {
    /// The name beside its own that it needs.
    pub(super) fn beside(&self) -> Option<String> {
        matches!(self.way, Way::Beside { .. }).then(|| beside(&self.name))
    }

    pub(super) async fn run(self) -> Result<Restored, BackupError> {
        match self.way {
            Way::Straight(place) => {
                let place = match place {
                    Some(place) => place,
                    None => Place { group: self.make(&self.name).await?, chunks: 0, replaces: 0 },
                };
                self.fill(&self.name, place).await?;
            }
            Way::Beside { old, place } => {
                // Nothing is begun for a backup that cannot take the place.
                self.read_all().await?;
                let beside = beside(&self.name);
                let place = match place {
                    Some(place) => place,
                    None => Place { group: self.make(&beside).await?, chunks: 0, replaces: old },
                };
                self.fill(&beside, place).await?;
                let predicate = self.name.clone();
                let request = v1::ReplacePredicateRequest {
                    predicate,
                    old_group: old,
                    new_group: place.group,
                    hops: 0,
                };
                self.client.replace_predicate(request).await?;
            }
            Way::Done => {}
        }
        Ok(Restored {
            predicate: self.predicate.predicate.clone(),
            name: self.name.clone(),
            kind: self.predicate.kind.clone(),
            rows: self.predicate.rows,
            bytes: self.predicate.bytes,
            hash: self.predicate.hash.clone(),
        })
    }

    /// Writes all that is missing, and compares.
    async fn fill(&self, target: &str, place: Place) -> Result<(), BackupError> {
        self.noted(place, true)?;
        match self.predicate.kind() {
            Some(ShardKind::Log) => self.records(target, place).await?,
            _ => self.rows(target, place).await?,
        }
        self.compare(target).await
    }

    async fn make(&self, name: &str) -> Result<u64, BackupError> {
        let until = Instant::now() + PATIENCE;
        // One of this name that is being dropped goes first.
        loop {
            let request = v1::FindPredicateRequest { predicate: name.to_owned(), hops: 0 };
            let found = self.client.find_predicate(request).await?.shard;
            if found.is_none_or(|shard| shard.state() != v1::ShardState::Dropping) {
                break;
            }
            if Instant::now() >= until {
                return Err(BackupError::Refused {
                    reason: format!(
                        "{name} is still being dropped; `pontoon predicates` shows it. Then run this again"
                    ),
                });
            }
            sleep(PAUSE).await;
        }
        let kind = self.predicate.kind().unwrap_or(ShardKind::Map).into();
        let request = v1::CreatePredicateRequest {
            predicate: name.to_owned(),
            replicas: self.predicate.replicas,
            kind,
            hops: 0,
        };
        let shard = self.client.create_predicate(request).await?.shard;
        Ok(shard.map_or(0, |shard| shard.group))
    }

    async fn read_all(&self) -> Result<(), BackupError> {
        for at in 0..self.predicate.chunks.len() {
            self.chunk(at).await?;
        }
        Ok(())
    }

    async fn chunk(&self, at: usize) -> Result<Vec<(Bytes, Bytes)>, BackupError> {
        read(self.source.clone(), self.path.clone(), self.predicate.chunks[at].hash.clone()).await
    }

    /// All before this place is acknowledged.
    fn noted(&self, place: Place, now: bool) -> Result<(), BackupError> {
        let mut notes = self.notes.lock().expect(UNPOISONED);
        let before = notes.note(&self.name, place, now)?.unwrap_or(place);
        let done = &self.predicate.chunks[before.chunks.min(place.chunks)..place.chunks];
        notes.written += done.iter().map(|chunk| chunk.bytes).sum::<u64>();
        Ok(())
    }

    async fn rows(&self, target: &str, place: Place) -> Result<(), BackupError> {
        let chunks = self.predicate.chunks.iter().skip(place.chunks).map(|chunk| {
            let rows = read(self.source.clone(), self.path.clone(), chunk.hash.clone());
            let (client, name) = (self.client.clone(), target.to_owned());
            async move {
                let batches = batches(rows.await?).into_iter().map(|ops| (name.clone(), ops)).collect();
                for written in client.write_many(batches).await {
                    written?;
                }
                Ok::<_, BackupError>(())
            }
        });
        // In their order: what is before an acknowledged one is acknowledged.
        let mut chunks = stream::iter(chunks).buffered(CHUNKS_AT_ONCE);
        let mut place = place;
        while let Some(done) = chunks.next().await {
            done?;
            place.chunks += 1;
            self.noted(place, false)?;
        }
        Ok(())
    }

    async fn records(&self, target: &str, place: Place) -> Result<(), BackupError> {
        let log = self.client.log(target);
        let Offsets { lowest, next, .. } =
            self.predicate.offsets.unwrap_or(Offsets { lowest: 0, next: 0, era: 1 });
        let bounds = log.bounds().await?;
        let mut at = if bounds.next == 0 && bounds.era == 1 && lowest > 0 {
            log.reset_from(0, lowest).await?.next
        } else {
            bounds.next
        };
        if at < lowest || at > next {
            return Err(BackupError::Differs {
                predicate: target.to_owned(),
                reason: format!("it goes on at offset {at}, the backup has [{lowest}, {next})"),
            });
        }
        let (mut place, mut first) = (place, lowest);
        place.chunks = 0;
        for number in 0..self.predicate.chunks.len() {
            let chunk = &self.predicate.chunks[number];
            if first + chunk.rows > at {
                let skip = (at - first) as usize;
                let records = self.chunk(number).await?.into_iter().skip(skip).map(|(_, record)| record);
                for batch in records_batches(records.collect()) {
                    at = log.append_at(at, batch).await?.next;
                }
            }
            first += chunk.rows;
            place.chunks = number + 1;
            self.noted(place, false)?;
        }
        Ok(())
    }

    /// Asks the cluster what it has now.
    async fn compare(&self, target: &str) -> Result<(), BackupError> {
        let until = Instant::now() + PATIENCE;
        let now = loop {
            match state_of(&self.client, target).await {
                Ok(now) => break now,
                // The node that is asked may not have heard of a new predicate yet.
                Err(_) if Instant::now() < until => sleep(PAUSE).await,
                Err(reason) => return Err(BackupError::Unread { predicate: target.to_owned(), reason }),
            }
        };
        match now.differs(&self.predicate) {
            None => Ok(()),
            Some(reason) => Err(BackupError::Differs { predicate: target.to_owned(), reason }),
        }
    }
}

/// The rows of a chunk, checked.
async fn read(source: Arc<Source>, path: PathBuf, hash: String) -> Result<Vec<(Bytes, Bytes)>, BackupError> {
    blocking(move || {
        let data = source.chunk(&hash_of(&path, &hash)?)?;
        rows_of(data)
            .map_err(|reason| BackupError::Damaged { path, reason: format!("chunk {hash}: {reason}") })
    })
    .await
}

fn batches(rows: Vec<(Bytes, Bytes)>) -> Vec<Vec<WriteOp>> {
    let (mut batches, mut batch, mut bytes) = (Vec::new(), Vec::new(), 0);
    for (key, value) in rows {
        let size = key.len() + value.len();
        if !batch.is_empty() && (bytes + size > BATCH_BYTES || batch.len() >= BATCH_ROWS) {
            batches.push(std::mem::take(&mut batch));
            bytes = 0;
        }
        bytes += size;
        batch.push(put(key, value));
    }
    batches.extend((!batch.is_empty()).then_some(batch));
    batches
}

fn records_batches(records: Vec<Bytes>) -> Vec<Vec<Bytes>> {
    let (mut batches, mut batch, mut bytes) = (Vec::new(), Vec::new(), 0);
    for record in records {
        if !batch.is_empty() && (bytes + record.len() > BATCH_BYTES || batch.len() >= BATCH_ROWS) {
            batches.push(std::mem::take(&mut batch));
            bytes = 0;
        }
        bytes += record.len();
        batch.push(record);
    }
    batches.extend((!batch.is_empty()).then_some(batch));
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_small_enough_and_lose_nothing() {
        let rows: Vec<(Bytes, Bytes)> = (0..10_000_u32)
            .map(|n| {
                (Bytes::from(n.to_string()), Bytes::from(vec![0; if n % 1_000 == 0 { 1 << 20 } else { 10 }]))
            })
            .collect();
        let made = batches(rows.clone());
        assert_eq!(made.iter().map(Vec::len).sum::<usize>(), rows.len());
        assert!(made.iter().all(|batch| !batch.is_empty() && batch.len() <= BATCH_ROWS));
        let records: Vec<Bytes> = rows.into_iter().map(|(_, value)| value).collect();
        assert_eq!(records_batches(records.clone()).concat(), records);
        assert!(batches(Vec::new()).is_empty());
    }
}
