//! A backup in one file: a tar with the chunks, then the manifest. It needs nothing beside it.
//!
//! It is written as `FILE.partial` and gets its name when it is whole and durable; what a killed run left is written over. Chunks
//! are packed one by one and looked up by their place, so that one predicate is read without the others.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsString,
    fs::{self, File},
    io::{BufWriter, Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Mutex,
};

use bytes::Bytes;

use super::{
    chunk,
    directory::{io_at, new_file, parent, sync_dir},
    error::BackupError,
    manifest::Manifest,
};

const MANIFEST: &str = "backup.json";
const CHUNKS: &str = "chunks/";

/// A file that is being written.
pub(super) struct Writing {
    path: PathBuf,
    partial: PathBuf,
    tar: Mutex<Tar>,
}

struct Tar {
    builder: tar::Builder<BufWriter<File>>,
    has: HashSet<blake3::Hash>,
}

impl std::fmt::Debug for Writing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writing").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Writing {
    pub(super) fn begin(path: &Path) -> Result<Writing, BackupError> {
        if path.exists() {
            return Err(BackupError::Exists { path: path.to_owned() });
        }
        let mut partial = OsString::from(path);
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let builder = tar::Builder::new(BufWriter::new(new_file(&partial)?));
        let tar = Mutex::new(Tar { builder, has: HashSet::new() });
        Ok(Writing { path: path.to_owned(), partial, tar })
    }

    pub(super) fn has(&self, hash: &blake3::Hash) -> bool {
        self.tar.lock().expect(UNPOISONED).has.contains(hash)
    }

    /// Adds a chunk. Durable after [`Writing::finish`]. Returns its bytes as stored.
    pub(super) fn put_chunk(&self, hash: &blake3::Hash, stored: &[u8]) -> Result<u64, BackupError> {
        let mut tar = self.tar.lock().expect(UNPOISONED);
        // Two predicates may hold the same rows.
        if !tar.has.insert(*hash) {
            return Ok(0);
        }
        self.append(&mut tar, &format!("{CHUNKS}{hash}"), stored)?;
        Ok(stored.len() as u64)
    }

    fn append(&self, tar: &mut Tar, name: &str, content: &[u8]) -> Result<(), BackupError> {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o600);
        header.set_cksum();
        tar.builder.append_data(&mut header, name, content).map_err(io_at(&self.partial))
    }

    /// Adds the manifest and gives the file its name. Durable on return.
    pub(super) fn finish(self, manifest: &Manifest) -> Result<(), BackupError> {
        let mut tar = self.tar.lock().expect(UNPOISONED);
        self.append(&mut tar, MANIFEST, &manifest.encode())?;
        let done = |tar: &mut Tar| {
            tar.builder.finish()?;
            tar.builder.get_mut().flush()?;
            tar.builder.get_mut().get_mut().sync_all()
        };
        done(&mut tar).map_err(io_at(&self.partial))?;
        fs::rename(&self.partial, &self.path).map_err(io_at(&self.path))?;
        sync_dir(parent(&self.path))
    }
}

/// A file that is there.
#[derive(Debug)]
pub(super) struct Archive {
    path: PathBuf,
    file: File,
    chunks: HashMap<blake3::Hash, (u64, u64)>,
    pub(super) manifest: Manifest,
}

impl Archive {
    pub(super) fn open(path: &Path) -> Result<Archive, BackupError> {
        let file = File::open(path).map_err(io_at(path))?;
        let foreign = |found: &str| BackupError::Foreign { path: path.to_owned(), found: found.to_owned() };
        let mut chunks = HashMap::new();
        let mut manifest = None;
        let mut tar = tar::Archive::new(file.try_clone().map_err(io_at(path))?);
        for entry in tar.entries_with_seek().map_err(|_| foreign("it is no tar"))? {
            let mut entry = entry.map_err(|error| match chunks.is_empty() {
                true => foreign("it is no tar"),
                false => BackupError::Damaged { path: path.to_owned(), reason: error.to_string() },
            })?;
            let name = entry.path().map_err(io_at(path))?.to_string_lossy().into_owned();
            if name == MANIFEST {
                let mut text = Vec::new();
                entry.read_to_end(&mut text).map_err(io_at(path))?;
                manifest = Some(Manifest::decode(path, &text)?);
                continue;
            }
            let hash = name.strip_prefix(CHUNKS).and_then(|hex| blake3::Hash::from_hex(hex).ok());
            let hash = hash.ok_or_else(|| foreign(&format!("a tar with {name}")))?;
            chunks.insert(hash, (entry.raw_file_position(), entry.size()));
        }
        let manifest = manifest.ok_or_else(|| BackupError::Damaged {
            path: path.to_owned(),
            reason: "it ends before its manifest".to_owned(),
        })?;
        Ok(Archive { path: path.to_owned(), file, chunks, manifest })
    }

    pub(super) fn has(&self, hash: &blake3::Hash) -> bool {
        self.chunks.contains_key(hash)
    }

    /// The rows of a chunk, checked.
    pub(super) fn chunk(&self, hash: &blake3::Hash) -> Result<Bytes, BackupError> {
        let damaged = |reason: String| BackupError::Damaged { path: self.path.clone(), reason };
        let (at, len) =
            *self.chunks.get(hash).ok_or_else(|| damaged(format!("it lacks the chunk {hash}")))?;
        let mut stored = vec![0; usize::try_from(len).unwrap_or(usize::MAX).min(CHUNK_MOST)];
        self.file.read_exact_at(&mut stored, at).map_err(io_at(&self.path))?;
        chunk::decode(&stored, None, *hash).map_err(|reason| damaged(format!("the chunk {hash}: {reason}")))
    }
}

/// No stored chunk is longer.
const CHUNK_MOST: usize = 16 << 20;
/// No code panics while it holds the lock.
const UNPOISONED: &str = "the lock's holders do not panic";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backup::manifest::tests::manifest;

    #[test]
    fn chunks_and_manifest_come_back_and_a_file_is_made_once() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("b.tar");
        let writing = Writing::begin(&path).unwrap();
        let rows: Vec<Vec<u8>> = (0..20_u8).map(|n| vec![n; 1_000 + usize::from(n)]).collect();
        for data in &rows {
            let hash = blake3::hash(data);
            let stored = chunk::encode(data, None);
            assert_eq!(writing.put_chunk(&hash, &stored).unwrap(), stored.len() as u64);
            assert_eq!(writing.put_chunk(&hash, &stored).unwrap(), 0);
        }
        assert!(!path.exists(), "not before it is whole");
        let made = manifest();
        writing.finish(&made).unwrap();
        let archive = Archive::open(&path).unwrap();
        assert_eq!(archive.manifest, made);
        for data in &rows {
            assert_eq!(archive.chunk(&blake3::hash(data)).unwrap(), data[..]);
        }
        assert!(archive.chunk(&blake3::hash(b"none")).is_err());
        assert!(matches!(Writing::begin(&path), Err(BackupError::Exists { .. })));
    }

    #[test]
    fn what_is_no_backup_is_named_so() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("b.tar");
        fs::write(&path, "a text, longer than nothing. ".repeat(100)).unwrap();
        assert!(matches!(Archive::open(&path), Err(BackupError::Foreign { .. })));
        let writing = Writing::begin(&scratch.path().join("c.tar")).unwrap();
        writing.finish(&manifest()).unwrap();
        let whole = fs::read(scratch.path().join("c.tar")).unwrap();
        for len in [0, 100, 512, 600] {
            fs::write(&path, &whole[..len]).unwrap();
            assert!(Archive::open(&path).is_err(), "{len}");
        }
    }
}
