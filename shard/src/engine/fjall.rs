//! fjall: a journal and one log-structured tree per keyspace.
//!
//! What its persist modes do (fjall 3.1): `Buffer` hands the journal to the system, `SyncData` and `SyncAll` also call
//! `fdatasync` and `fsync` on it. A batch is one checksummed record of the journal, whatever keyspaces it touches, so
//! the synced journal is what decides atomicity; before a memtable goes to its tree's files the worker syncs the
//! journal, so files never run ahead of it. Writes here do not even hand over to the system (`manual_journal_persist`):
//! what a kill loses, the shared log replays.
//!
//! fjall's own sync holds the journal's lock, which every batch needs, until the disk is done; [`FjallEngine::sync`] does not.
//!
//! Bulk ingestion is the one path that flushes a memtable without syncing the journal first. It happens under the
//! write half of [`FjallEngine::gate`], after a sync of our own: otherwise a power cut could keep rows of a batch
//! whose mark, in another keyspace, is lost.

#[cfg(target_os = "linux")]
mod early;
mod journals;

use std::{
    panic::resume_unwind,
    path::Path,
    sync::{PoisonError, RwLock},
    thread,
};

use ::fjall::{Database, KeyspaceCreateOptions, PersistMode, Readable, Snapshot};
use bytes::Bytes;
use pontoon_raftstore::give_way;

use self::journals::Journals;
use super::{
    Change, Engine, EngineKind, EngineSnapshot, EngineStats, Keyspace, MAX_KEYSPACES, OpenOptions, Scope,
    WriteBatch,
    health::Health,
    marker::{Home, sync_dir},
};
use crate::{error::Error, layout};

/// A keyspace's memtable goes to disk at this size, so all of them together hold at most nine times as much.
const MEMTABLE_BYTES: u64 = 16 << 20;
const CACHE_BYTES: u64 = 64 << 20;
/// A start reads all journals again: with more, memtables that fill slowly are written out early and let the oldest one go.
const JOURNAL_BYTES: u64 = 128 << 20;

/// Flushes and compactions may take a while, clients may not: by this much threads that do them are nicer than the others. Not by more: whoever
/// writes faster than they come along is held back by the engine.
const WORKERS_NICER: i32 = 5;

/// The engine fjall over one directory.
pub struct FjallEngine {
    db: Database,
    spaces: Vec<::fjall::Keyspace>,
    home: Home,
    /// Held for reading by batches, for writing by the end of an ingestion.
    gate: RwLock<()>,
    journals: Journals,
    health: Health,
    #[cfg(target_os = "linux")]
    _early: Option<early::Early>,
}

impl FjallEngine {
    /// Opens the directory, made if missing.
    ///
    /// # Errors
    /// As [`super::open`].
    pub fn open(dir: &Path, options: &OpenOptions) -> Result<Self, Error> {
        let home = Home::open(EngineKind::Fjall, dir, options)?;
        let unreadable = |error: ::fjall::Error| Error::Unreadable {
            path: dir.into(),
            kind: EngineKind::Fjall,
            source: Box::new(error.into()),
        };
        // By a thread of its own: the workers that it starts have its priority.
        let builder = Database::builder(home.data())
            .manual_journal_persist(true)
            .cache_size(CACHE_BYTES)
            .max_journaling_size(JOURNAL_BYTES)
            .worker_threads(2);
        let opening = thread::Builder::new().name("engine-open".to_owned()).spawn(move || {
            give_way(WORKERS_NICER);
            builder.open()
        });
        let opened = opening.map_err(|source| Error::Io { path: dir.into(), source })?.join();
        let db = opened.unwrap_or_else(|panic| resume_unwind(panic)).map_err(|error| match error {
            ::fjall::Error::Locked => Error::Locked { path: dir.into() },
            other => unreadable(other),
        })?;
        let spaces = (0..layout::KEYSPACES)
            .map(|space| {
                db.keyspace(&format!("k{space:02}"), || {
                    KeyspaceCreateOptions::default()
                        .max_memtable_size(MEMTABLE_BYTES)
                        .manual_journal_persist(true)
                })
            })
            .collect::<Result<Vec<_>, _>>()
            .map_err(unreadable)?;
        // Of a keyspace fjall syncs what is in its directory, and not the name of that directory: a power cut would take it as a
        // whole, with all that was flushed. No row is written before these names are durable.
        sync_dir(&home.data().join("keyspaces"))?;
        sync_dir(&home.data())?;
        home.sync_names()?;
        #[cfg(target_os = "linux")]
        let early = early::Early::watch(&home.data())
            .inspect_err(|error| tracing::debug!(%error, "the engine's files are not written out early"))
            .ok();
        Ok(FjallEngine {
            #[cfg(target_os = "linux")]
            _early: early,
            journals: Journals::new(home.data()),
            db,
            spaces,
            home,
            gate: RwLock::new(()),
            health: Health::default(),
        })
    }

    fn note<T>(&self, result: Result<T, ::fjall::Error>) -> Result<T, Error> {
        self.health.note(result.map_err(|error| match error {
            ::fjall::Error::Poisoned => Error::Background,
            other => Error::Fjall(other),
        }))
    }

    /// Handing over what is buffered takes the journal's lock, which every batch needs; the sync itself does not.
    fn sync(&self) -> Result<(), Error> {
        self.note(self.db.persist(PersistMode::Buffer))?;
        self.note(match self.journals.sync() {
            Some(synced) => synced.map_err(Into::into),
            None => self.db.persist(PersistMode::SyncAll),
        })
    }
}

fn space(spaces: &[::fjall::Keyspace], space: Keyspace) -> &::fjall::Keyspace {
    debug_assert!(space.0 < MAX_KEYSPACES);
    &spaces[usize::from(space.0)]
}

impl Engine for FjallEngine {
    fn kind(&self) -> EngineKind {
        EngineKind::Fjall
    }

    fn get(&self, keyspace: Keyspace, key: &[u8]) -> Result<Option<Bytes>, Error> {
        self.health.check()?;
        let found = space(&self.spaces, keyspace).get(key)?;
        Ok(found.map(|value| Bytes::copy_from_slice(&value)))
    }

    fn write(&self, batch: WriteBatch) -> Result<(), Error> {
        let _gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        self.health.check()?;
        let mut writes = self.db.batch();
        for (keyspace, key, change) in batch.changes() {
            let keyspace = space(&self.spaces, *keyspace);
            match change {
                Change::Put(value) => writes.insert(keyspace, &key[..], &value[..]),
                Change::Delete => writes.remove(keyspace, &key[..]),
            }
        }
        self.note(writes.commit())
    }

    fn snapshot(&self, _scope: Vec<Scope>) -> Result<Box<dyn EngineSnapshot>, Error> {
        self.health.check()?;
        Ok(Box::new(FjallSnapshot { snapshot: self.db.snapshot(), spaces: self.spaces.clone() }))
    }

    fn flush(&self) -> Result<(), Error> {
        self.health.check()?;
        self.sync()
    }

    fn ingest(&self, keyspace: Keyspace, rows: &[(Bytes, Bytes)]) -> Result<(), Error> {
        self.health.check()?;
        let mut ingestion = space(&self.spaces, keyspace).start_ingestion()?;
        for (key, value) in rows {
            ingestion.write(&key[..], &value[..])?;
        }
        let _gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        self.health.check()?;
        self.sync()?;
        self.note(ingestion.finish())
    }

    fn stats(&self) -> EngineStats {
        EngineStats {
            disk_bytes: self.db.disk_space().unwrap_or(0),
            journal_bytes: self.db.journal_disk_space().unwrap_or(0),
            buffered_bytes: self.db.write_buffer_size(),
            compactions_active: self.db.active_compactions() as u64,
            compactions: self.db.compactions_completed() as u64,
        }
    }

    fn failure(&self) -> Option<String> {
        self.health.failure()
    }

    fn close(&self) -> Result<(), Error> {
        let _gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        if self.health.is_closed() {
            return Ok(());
        }
        self.flush()?;
        self.health.close();
        self.home.mark_clean()
    }
}

struct FjallSnapshot {
    snapshot: Snapshot,
    spaces: Vec<::fjall::Keyspace>,
}

impl EngineSnapshot for FjallSnapshot {
    fn get(&self, keyspace: Keyspace, key: &[u8]) -> Result<Option<Bytes>, Error> {
        let found = self.snapshot.get(space(&self.spaces, keyspace), key)?;
        Ok(found.map(|value| Bytes::copy_from_slice(&value)))
    }

    fn scan(
        &self,
        keyspace: Keyspace,
        low: &[u8],
        high: Option<&[u8]>,
        visit: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), Error> {
        use std::ops::Bound;
        if high.is_some_and(|high| high <= low) {
            return Ok(());
        }
        let high = high.map_or(Bound::Unbounded, Bound::Excluded);
        let range = (Bound::Included(low), high);
        for guard in self.snapshot.range::<&[u8], _>(space(&self.spaces, keyspace), range) {
            let (key, value) = guard.into_inner()?;
            if !visit(&key, &value) {
                break;
            }
        }
        Ok(())
    }
}
