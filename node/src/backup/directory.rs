//! A directory of backups.
//!
//! ```text
//!  DIR/PONTOON-BACKUP        the format: this directory is ours
//!  DIR/LOCK                  held by who writes (alone) and by who reads (together)
//!  DIR/chunks/ab/ab12…       chunks, by the hashes of their rows
//!  DIR/backups/ID.json       manifests: a backup exists if its manifest does
//!  DIR/tmp/                  what is being written
//! ```
//!
//! Everything is written in `tmp`, synced and renamed, so a file under its own name is whole. Crash cases:
//!
//! 1. While a chunk is written: a file in `tmp`, which the next writer removes.
//! 2. Between chunks and manifest: chunks that no manifest names. The next backup finds those that it needs; `prune` removes the
//!    others.
//! 3. The directories that hold new names are synced before the manifest gets its name, so no manifest names what a loss of
//!    power takes back.
//! 4. While `prune` removes: manifests go first, durably, then what no other one names. What stays is case 2.

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{
    chunk,
    error::BackupError,
    manifest::{FORMAT, Manifest, hash_of},
};

const MARKER: &str = "PONTOON-BACKUP";
const LOCK: &str = "LOCK";

#[derive(Debug, Serialize, Deserialize)]
struct Marker {
    format: u32,
}

/// How a directory is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// Others may read, too.
    Read,
    /// Nobody else.
    Write,
}

/// An opened directory, locked until it is dropped.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    _lock: File,
    /// Directories with names that are not durable yet.
    touched: Mutex<BTreeSet<PathBuf>>,
    /// Names what is being written.
    turn: AtomicU64,
}

/// What a prune keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Kept {
    /// The latest so many.
    pub last: usize,
    /// All that were begun after this, in milliseconds since 1970.
    pub since_ms: Option<u64>,
    /// Say what would go, and let it stay.
    pub dry_run: bool,
}

/// What a prune removed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PruneReport {
    /// Backups that are gone.
    pub removed: Vec<String>,
    /// Backups that stay.
    pub kept: Vec<String>,
    /// Chunks that no backup needs any more.
    pub chunks: u64,
    /// Their bytes on disk.
    pub bytes: u64,
}

pub(super) fn io_at(path: &Path) -> impl FnOnce(io::Error) -> BackupError + use<> {
    let path = path.to_owned();
    |source| BackupError::Io { path, source }
}

fn make_dir(path: &Path) -> Result<(), BackupError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io_at(path))
}

/// A new file that its owner alone may read.
pub(super) fn new_file(path: &Path) -> Result<File, BackupError> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path).map_err(io_at(path))
}

pub(super) fn sync_dir(path: &Path) -> Result<(), BackupError> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(io_at(path))
}

pub(super) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

impl Directory {
    /// Makes the directory if it is missing or empty, and locks it to write.
    pub(super) fn make(path: &Path) -> Result<Directory, BackupError> {
        make_dir(path)?;
        let marker = path.join(MARKER);
        if !marker.exists() {
            for entry in fs::read_dir(path).map_err(io_at(path))? {
                let name = entry.map_err(io_at(path))?.file_name();
                // A first run that was killed before it had written its marker.
                if name != "lost+found" && name != LOCK && name != "tmp" {
                    let found = name.to_string_lossy().into_owned();
                    return Err(BackupError::Foreign { path: path.to_owned(), found });
                }
            }
        }
        let directory = Directory::lock(path, Use::Write)?;
        for name in ["tmp", "chunks", "backups"] {
            make_dir(&path.join(name))?;
        }
        if !marker.exists() {
            let text = serde_json::to_vec(&Marker { format: FORMAT }).expect("one number");
            directory.put(&text, &marker)?;
            directory.sync()?;
            sync_dir(parent(path))?;
        }
        directory.check()?;
        directory.clear_tmp()?;
        Ok(directory)
    }

    /// Opens a directory that is there.
    pub(super) fn open(path: &Path, how: Use) -> Result<Directory, BackupError> {
        if !path.join(MARKER).exists() {
            let found = match fs::read_dir(path).map_err(io_at(path))?.next() {
                Some(Ok(entry)) => entry.file_name().to_string_lossy().into_owned(),
                _ => "it is empty".to_owned(),
            };
            return Err(BackupError::Foreign { path: path.to_owned(), found });
        }
        let directory = Directory::lock(path, how)?;
        directory.check()?;
        Ok(directory)
    }

    fn lock(path: &Path, how: Use) -> Result<Directory, BackupError> {
        let name = path.join(LOCK);
        let open =
            |write: bool| OpenOptions::new().read(true).write(write).create(write).mode(0o600).open(&name);
        // A reader may have no right to write here.
        let lock = match how {
            Use::Write => open(true),
            Use::Read => open(false).or_else(|_| open(true)),
        };
        let lock = lock.map_err(io_at(&name))?;
        let locked = match how {
            Use::Read => lock.try_lock_shared(),
            Use::Write => lock.try_lock(),
        };
        match locked {
            Ok(()) => Ok(Directory {
                path: path.to_owned(),
                _lock: lock,
                touched: Mutex::default(),
                turn: AtomicU64::new(0),
            }),
            Err(TryLockError::WouldBlock) => Err(BackupError::Locked { path: path.to_owned() }),
            Err(TryLockError::Error(error)) => Err(io_at(&name)(error)),
        }
    }

    fn check(&self) -> Result<(), BackupError> {
        let path = self.path.join(MARKER);
        let text = fs::read(&path).map_err(io_at(&path))?;
        let marker: Marker = serde_json::from_slice(&text)
            .map_err(|error| BackupError::Damaged { path: path.clone(), reason: error.to_string() })?;
        match marker.format {
            FORMAT => Ok(()),
            found => Err(BackupError::Format { path: self.path.clone(), found, known: FORMAT }),
        }
    }

    fn clear_tmp(&self) -> Result<(), BackupError> {
        let tmp = self.path.join("tmp");
        for entry in fs::read_dir(&tmp).map_err(io_at(&tmp))? {
            let path = entry.map_err(io_at(&tmp))?.path();
            fs::remove_file(&path).map_err(io_at(&path))?;
        }
        Ok(())
    }

    /// Where a chunk lies.
    pub(super) fn chunk_path(&self, hash: &blake3::Hash) -> PathBuf {
        let hex = hash.to_hex();
        self.path.join("chunks").join(&hex[..2]).join(hex.as_str())
    }

    pub(super) fn has(&self, hash: &blake3::Hash) -> bool {
        self.chunk_path(hash).exists()
    }

    /// What a chunk is stored as a difference from.
    pub(super) fn base_of(&self, hash: &blake3::Hash) -> Result<Option<blake3::Hash>, BackupError> {
        let path = self.chunk_path(hash);
        let mut head = Vec::new();
        let file = File::open(&path).map_err(io_at(&path))?;
        file.take(chunk::HEAD_MOST as u64).read_to_end(&mut head).map_err(io_at(&path))?;
        let head = chunk::head(&head).map_err(|reason| BackupError::Damaged { path, reason })?;
        Ok(head.base)
    }

    /// Stores a chunk that is not there. Its file is whole and durable on return, its name after [`Directory::sync`].
    /// Returns the bytes of the file.
    pub(super) fn put_chunk(&self, hash: &blake3::Hash, stored: &[u8]) -> Result<u64, BackupError> {
        self.put(stored, &self.chunk_path(hash))
    }

    fn put(&self, content: &[u8], path: &Path) -> Result<u64, BackupError> {
        // Two may store the same rows at once.
        let tmp = self.path.join("tmp").join(self.turn.fetch_add(1, Ordering::Relaxed).to_string());
        make_dir(parent(&tmp))?;
        let mut file = new_file(&tmp)?;
        file.write_all(content).and_then(|()| file.sync_all()).map_err(io_at(&tmp))?;
        let home = parent(path);
        if !home.exists() {
            make_dir(home)?;
            self.touch(parent(home));
        }
        fs::rename(&tmp, path).map_err(io_at(path))?;
        self.touch(home);
        Ok(content.len() as u64)
    }

    fn touch(&self, dir: &Path) {
        self.touched.lock().expect(UNPOISONED).insert(dir.to_owned());
    }

    /// Makes the names of what was stored durable.
    pub(super) fn sync(&self) -> Result<(), BackupError> {
        let touched = std::mem::take(&mut *self.touched.lock().expect(UNPOISONED));
        touched.iter().try_for_each(|dir| sync_dir(dir))
    }

    /// Makes the backup exist, after everything that it names. Durable on return.
    pub(super) fn put_manifest(&self, manifest: &Manifest) -> Result<(), BackupError> {
        self.sync()?;
        let path = self.manifest_path(&manifest.id);
        self.put(&manifest.encode(), &path)?;
        self.sync()
    }

    fn manifest_path(&self, id: &str) -> PathBuf {
        self.path.join("backups").join(format!("{id}.json"))
    }

    /// The ids of all backups, the oldest first.
    pub(super) fn ids(&self) -> Result<Vec<String>, BackupError> {
        let dir = self.path.join("backups");
        let mut ids = Vec::new();
        for entry in fs::read_dir(&dir).map_err(io_at(&dir))? {
            let name = entry.map_err(io_at(&dir))?.file_name();
            ids.extend(name.to_string_lossy().strip_suffix(".json").map(str::to_owned));
        }
        ids.sort();
        Ok(ids)
    }

    pub(super) fn manifest(&self, id: &str) -> Result<Manifest, BackupError> {
        let path = self.manifest_path(id);
        let text = fs::read(&path).map_err(io_at(&path))?;
        Manifest::decode(&path, &text)
    }

    /// The rows of a chunk, checked.
    pub(super) fn chunk(&self, hash: &blake3::Hash) -> Result<Bytes, BackupError> {
        let path = self.chunk_path(hash);
        let damaged = |reason| BackupError::Damaged { path: path.clone(), reason };
        let stored = fs::read(&path).map_err(io_at(&path))?;
        let base = match chunk::head(&stored).map_err(damaged)?.base {
            None => None,
            Some(base) => {
                let path = self.chunk_path(&base);
                let whole = fs::read(&path).map_err(io_at(&path))?;
                let rows = chunk::decode(&whole, None, base)
                    .map_err(|reason| BackupError::Damaged { path, reason })?;
                Some(rows)
            }
        };
        chunk::decode(&stored, base.as_deref(), *hash).map_err(damaged)
    }

    /// Removes backups, and the chunks that no other one needs.
    ///
    /// # Errors
    /// If a manifest or the head of a chunk that stays does not read: what it needs is not known, and nothing is removed.
    pub(super) fn prune(&self, keep: Kept) -> Result<PruneReport, BackupError> {
        let ids = self.ids()?;
        let mut report = PruneReport::default();
        let (mut needed, mut gone) = (BTreeSet::new(), Vec::new());
        for (at, id) in ids.iter().enumerate() {
            let latest = ids.len() - at <= keep.last;
            let manifest = self.manifest(id)?;
            if latest || keep.since_ms.is_some_and(|since| manifest.begun_ms >= since) {
                for chunk in manifest.predicates.iter().flat_map(|found| &found.chunks) {
                    if !needed.contains(&chunk.hash) {
                        let base = self.base_of(&hash_of(&self.path, &chunk.hash)?)?;
                        needed.extend(base.map(|base| base.to_hex().to_string()));
                        needed.insert(chunk.hash.clone());
                    }
                }
                report.kept.push(id.clone());
            } else {
                gone.push(self.manifest_path(id));
                report.removed.push(id.clone());
            }
        }
        if !keep.dry_run {
            gone.iter().try_for_each(|path| fs::remove_file(path).map_err(io_at(path)))?;
            sync_dir(&self.path.join("backups"))?;
        }
        let chunks = self.path.join("chunks");
        for home in fs::read_dir(&chunks).map_err(io_at(&chunks))? {
            let home = home.map_err(io_at(&chunks))?.path();
            for entry in fs::read_dir(&home).map_err(io_at(&home))? {
                let entry = entry.map_err(io_at(&home))?;
                if needed.contains(entry.file_name().to_string_lossy().as_ref()) {
                    continue;
                }
                report.chunks += 1;
                report.bytes += entry.metadata().map_err(io_at(&entry.path()))?.len();
                if !keep.dry_run {
                    fs::remove_file(entry.path()).map_err(io_at(&entry.path()))?;
                }
            }
        }
        Ok(report)
    }
}

/// No code panics while it holds the lock.
const UNPOISONED: &str = "the lock's holders do not panic";

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::backup::manifest::{ChunkRef, PredicateBackup, new_id};

    fn manifest(at: u64, chunks: &[&[u8]]) -> Manifest {
        let chunks = chunks.iter().map(|data| ChunkRef {
            hash: blake3::hash(data).to_hex().to_string(),
            bytes: data.len() as u64,
            rows: 1,
            first_key: String::new(),
        });
        let predicate = PredicateBackup {
            predicate: "p".into(),
            kind: "map".into(),
            replicas: 3,
            group: 2,
            index: 9,
            term: 5,
            rows: 1,
            bytes: 1,
            hash: String::new(),
            offsets: None,
            chunks: chunks.collect(),
        };
        Manifest {
            id: new_id(at * 1_000),
            begun_ms: at * 1_000,
            done_ms: at * 1_000,
            version: "1".into(),
            cluster: "c".into(),
            all: true,
            predicates: vec![predicate],
            rules: String::new(),
        }
    }

    fn store(directory: &Directory, data: &[u8]) {
        directory.put_chunk(&blake3::hash(data), &chunk::encode(data, None)).unwrap();
    }

    #[test]
    fn a_backup_exists_with_its_manifest_and_chunks_of_a_killed_one_are_found() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("deep").join("backups");
        let directory = Directory::make(&path).unwrap();
        store(&directory, b"one");
        // Killed here, in the middle of the next chunk.
        fs::write(path.join("tmp").join("half"), "half").unwrap();
        drop(directory);
        let directory = Directory::make(&path).unwrap();
        assert!(directory.ids().unwrap().is_empty());
        assert!(directory.has(&blake3::hash(b"one")) && !path.join("tmp").join("half").exists());
        let made = manifest(1, &[b"one"]);
        directory.put_manifest(&made).unwrap();
        assert_eq!(directory.ids().unwrap(), std::slice::from_ref(&made.id));
        assert_eq!(directory.manifest(&made.id).unwrap(), made);
        assert_eq!(directory.chunk(&blake3::hash(b"one")).unwrap(), b"one"[..]);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&directory.chunk_path(&blake3::hash(b"one"))), 0o600);
        assert_eq!((mode(&path), mode(&path.join("chunks"))), (0o700, 0o700));
    }

    #[test]
    fn one_writes_alone_and_many_read() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("backups");
        let writer = Directory::make(&path).unwrap();
        for how in [Use::Read, Use::Write] {
            assert!(matches!(Directory::open(&path, how), Err(BackupError::Locked { .. })));
        }
        drop(writer);
        let _readers =
            [Directory::open(&path, Use::Read).unwrap(), Directory::open(&path, Use::Read).unwrap()];
        assert!(matches!(Directory::make(&path), Err(BackupError::Locked { .. })));
    }

    #[test]
    fn what_is_not_ours_or_of_a_later_version_is_left_alone() {
        let scratch = tempfile::tempdir().unwrap();
        fs::write(scratch.path().join("thesis.tex"), "important").unwrap();
        let error = Directory::make(scratch.path()).unwrap_err();
        assert!(error.to_string().contains("thesis.tex"), "{error}");
        let path = scratch.path().join("later");
        drop(Directory::make(&path).unwrap());
        fs::write(path.join(MARKER), r#"{"format":9}"#).unwrap();
        assert!(matches!(Directory::make(&path), Err(BackupError::Format { found: 9, .. })));
    }

    #[test]
    fn prune_keeps_what_the_kept_ones_need_and_their_bases() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("backups");
        let directory = Directory::make(&path).unwrap();
        for data in [&b"old"[..], b"both", b"nobody"] {
            store(&directory, data);
        }
        let mut base = [0; 5_000];
        blake3::Hasher::new().update(b"what does not compress").finalize_xof().fill(&mut base);
        let new = [&base[..4_000], &[8; 50]].concat();
        store(&directory, &base);
        let over = chunk::encode(&new, Some((blake3::hash(&base), &base)));
        directory.put_chunk(&blake3::hash(&new), &over).unwrap();
        let (first, second) = (manifest(1, &[b"old", b"both"]), manifest(2, &[b"both", &new]));
        for made in [&first, &second] {
            directory.put_manifest(made).unwrap();
        }
        let keep = Kept { last: 1, ..Kept::default() };
        let report = directory.prune(Kept { dry_run: true, ..keep }).unwrap();
        assert_eq!((report.removed.as_slice(), report.chunks), (&[first.id.clone()][..], 2));
        assert!(directory.has(&blake3::hash(b"old")));
        assert_eq!(directory.prune(keep).unwrap(), report);
        for (data, there) in
            [(&b"old"[..], false), (b"both", true), (&new, true), (&base, true), (b"nobody", false)]
        {
            assert_eq!(directory.has(&blake3::hash(data)), there, "{}", data.escape_ascii());
        }
        let since_ms = Some(1_500);
        assert!(directory.prune(Kept { since_ms, ..Kept::default() }).unwrap().removed.is_empty());
        // What a damaged one needs is not known.
        fs::write(directory.manifest_path(&second.id), "{}\n{}").unwrap();
        assert!(directory.prune(Kept::default()).is_err() && directory.has(&blake3::hash(&new)));
    }
}
