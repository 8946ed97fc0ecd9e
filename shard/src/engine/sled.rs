//! sled 0.34: one tree for everything, since its plain batch covers one tree.
//!
//! Two things are added here:
//!
//! - **Durability.** sled's flush ends with `sync_file_range`, which says nothing about the disk's cache or the file's
//!   length: [`SledEngine::flush`] syncs its files and directories through handles of our own afterwards. Even so, what
//!   it writes between two flushes may reach the disk in any order, so a directory that was open when the operating
//!   system went down is refused ([`Error::Untrusted`]). A kill of the process is harmless.
//! - **Snapshots.** sled has none. A snapshot here is the present tree plus an overlay of what rows in its scope held
//!   before they were first changed under it; batches fill the overlays. The memory is that of the rows changed while
//!   a snapshot is open.

#![expect(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "sled's files are synced through handles of our own"
)]

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, File},
    ops::Bound,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock, Weak},
};

use bytes::Bytes;

use super::{
    Change, Engine, EngineKind, EngineSnapshot, EngineStats, Keyspace, OpenOptions, Scope, WriteBatch,
    health::Health,
    marker::{Home, io, sync_dir},
    prefix_end,
};
use crate::error::Error;

const CACHE_BYTES: u64 = 64 << 20;
/// A scan holds off writers for at most this many rows at a time.
const PAGE_ROWS: usize = 256;

/// The engine sled over one directory.
pub struct SledEngine {
    core: Arc<Core>,
    db: ::sled::Db,
    home: Home,
    /// Finished blob and snapshot files never change again: they are synced once.
    synced: Mutex<HashSet<PathBuf>>,
    health: Health,
}

struct Core {
    tree: ::sled::Tree,
    /// Writers hold it for writing, so that an overlay and the tree change together for every reader.
    overlays: RwLock<Vec<Weak<Overlay>>>,
}

/// What rows in the scope held before their first change.
struct Overlay {
    scope: Vec<Vec<u8>>,
    before: Mutex<BTreeMap<Vec<u8>, Option<::sled::IVec>>>,
}

impl SledEngine {
    /// Opens the directory, made if missing.
    ///
    /// # Errors
    /// As [`super::open`].
    pub fn open(dir: &Path, options: &OpenOptions) -> Result<Self, Error> {
        let home = Home::open(EngineKind::Sled, dir, options)?;
        let db = ::sled::Config::new()
            .path(home.data())
            .cache_capacity(CACHE_BYTES)
            .mode(::sled::Mode::HighThroughput)
            .flush_every_ms(None)
            .open()
            .map_err(|error| Error::Unreadable {
                path: dir.into(),
                kind: EngineKind::Sled,
                source: Box::new(error.into()),
            })?;
        let core = Core { tree: ::sled::Tree::clone(&db), overlays: RwLock::default() };
        Ok(SledEngine { core: Arc::new(core), db, home, synced: Mutex::default(), health: Health::default() })
    }

    /// fsync of every file that sled wrote, and of the directories that name them.
    fn sync_files(&self) -> Result<(), Error> {
        let data = self.home.data();
        let mut synced = self.synced.lock().unwrap_or_else(PoisonError::into_inner);
        let mut present = HashSet::new();
        for dir in [data.join("blobs"), data.clone()] {
            let entries = match fs::read_dir(&dir) {
                Ok(entries) => entries,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(source) => return Err(Error::Io { path: dir, source }),
            };
            for entry in entries {
                let path = entry.map_err(io(&dir))?.path();
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let immutable = dir != data || (name.starts_with("snap.") && !name.ends_with("generating"));
                if path.is_dir() || (immutable && synced.contains(&path)) {
                    present.insert(path);
                    continue;
                }
                match File::open(&path).and_then(|file| file.sync_all()) {
                    Ok(()) => {
                        if immutable {
                            present.insert(path);
                        }
                    }
                    // sled removed a file that it needs no more between the listing and now.
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                    Err(source) => return Err(Error::Io { path, source }),
                }
            }
            sync_dir(&dir)?;
        }
        *synced = present;
        Ok(())
    }
}

fn full_key(space: Keyspace, key: &[u8]) -> Vec<u8> {
    let mut full = Vec::with_capacity(key.len() + 1);
    full.push(space.0);
    full.extend_from_slice(key);
    full
}

impl Engine for SledEngine {
    fn kind(&self) -> EngineKind {
        EngineKind::Sled
    }

    fn get(&self, space: Keyspace, key: &[u8]) -> Result<Option<Bytes>, Error> {
        self.health.check()?;
        Ok(self.core.tree.get(full_key(space, key))?.map(|value| Bytes::copy_from_slice(&value)))
    }

    fn write(&self, batch: WriteBatch) -> Result<(), Error> {
        let mut overlays = self.core.overlays.write().unwrap_or_else(PoisonError::into_inner);
        self.health.check()?;
        overlays.retain(|overlay| overlay.strong_count() > 0);
        let open: Vec<Arc<Overlay>> = overlays.iter().filter_map(Weak::upgrade).collect();
        let mut writes = ::sled::Batch::default();
        for (space, key, change) in batch.changes() {
            let key = full_key(*space, key);
            for overlay in &open {
                overlay.keep(&self.core.tree, &key)?;
            }
            match change {
                Change::Put(value) => writes.insert(key, &value[..]),
                Change::Delete => writes.remove(key),
            }
        }
        self.health.note(self.core.tree.apply_batch(writes))
    }

    fn snapshot(&self, scope: Vec<Scope>) -> Result<Box<dyn EngineSnapshot>, Error> {
        let scope = scope.iter().map(|scope| full_key(scope.space, &scope.prefix)).collect();
        let overlay = Arc::new(Overlay { scope, before: Mutex::default() });
        let mut overlays = self.core.overlays.write().unwrap_or_else(PoisonError::into_inner);
        self.health.check()?;
        overlays.push(Arc::downgrade(&overlay));
        Ok(Box::new(SledSnapshot { core: self.core.clone(), overlay }))
    }

    fn flush(&self) -> Result<(), Error> {
        self.health.check()?;
        self.health.note(self.db.flush())?;
        self.health.note(self.sync_files())
    }

    fn stats(&self) -> EngineStats {
        EngineStats { disk_bytes: self.db.size_on_disk().unwrap_or(0), ..EngineStats::default() }
    }

    fn failure(&self) -> Option<String> {
        self.health.failure()
    }

    fn close(&self) -> Result<(), Error> {
        let _writers = self.core.overlays.write().unwrap_or_else(PoisonError::into_inner);
        if self.health.is_closed() {
            return Ok(());
        }
        self.flush()?;
        self.health.close();
        self.home.mark_clean()
    }
}

impl Overlay {
    fn covers(&self, key: &[u8]) -> bool {
        self.scope.iter().any(|prefix| key.starts_with(prefix))
    }

    /// Remembers what the row holds, the first time that it is about to change.
    fn keep(&self, tree: &::sled::Tree, key: &[u8]) -> Result<(), Error> {
        if self.covers(key) {
            let mut before = self.before.lock().unwrap_or_else(PoisonError::into_inner);
            if !before.contains_key(key) {
                before.insert(key.to_vec(), tree.get(key)?);
            }
        }
        Ok(())
    }
}

/// Rows by full key.
type Rows = BTreeMap<Vec<u8>, ::sled::IVec>;

struct SledSnapshot {
    core: Arc<Core>,
    overlay: Arc<Overlay>,
}

impl SledSnapshot {
    /// Up to [`PAGE_ROWS`] rows of [low, high) as of the snapshot, and where the next page begins.
    fn page(&self, low: &[u8], high: Option<&[u8]>) -> Result<(Rows, Option<Vec<u8>>), Error> {
        let _no_writers = self.core.overlays.read().unwrap_or_else(PoisonError::into_inner);
        let upper = high.map_or(Bound::Unbounded, |high| Bound::Excluded(high.to_vec()));
        let mut rows = Rows::new();
        let mut next = None;
        for row in self.core.tree.range::<Vec<u8>, _>((Bound::Included(low.to_vec()), upper.clone())) {
            let (key, value) = row?;
            if rows.len() == PAGE_ROWS {
                next = Some(key.to_vec());
                break;
            }
            rows.insert(key.to_vec(), value);
        }
        let upper = next.clone().map_or(upper, Bound::Excluded);
        let before = self.overlay.before.lock().unwrap_or_else(PoisonError::into_inner);
        for (key, value) in before.range((Bound::Included(low.to_vec()), upper)) {
            match value {
                Some(value) => rows.insert(key.clone(), value.clone()),
                None => rows.remove(key),
            };
        }
        Ok((rows, next))
    }
}

impl EngineSnapshot for SledSnapshot {
    fn get(&self, space: Keyspace, key: &[u8]) -> Result<Option<Bytes>, Error> {
        let key = full_key(space, key);
        debug_assert!(self.overlay.covers(&key), "the key lies outside of the snapshot's scope");
        let _no_writers = self.core.overlays.read().unwrap_or_else(PoisonError::into_inner);
        let before = self.overlay.before.lock().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
        let value = match before {
            Some(value) => value,
            None => self.core.tree.get(&key)?,
        };
        Ok(value.map(|value| Bytes::copy_from_slice(&value)))
    }

    fn scan(
        &self,
        space: Keyspace,
        low: &[u8],
        high: Option<&[u8]>,
        visit: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), Error> {
        let mut low = full_key(space, low);
        let high = high.map(|high| full_key(space, high)).or_else(|| prefix_end(&[space.0]));
        loop {
            if high.as_ref().is_some_and(|high| *high <= low) {
                return Ok(());
            }
            let (rows, next) = self.page(&low, high.as_deref())?;
            for (key, value) in &rows {
                if !visit(&key[1..], value) {
                    return Ok(());
                }
            }
            match next {
                Some(next) => low = next,
                None => return Ok(()),
            }
        }
    }
}
