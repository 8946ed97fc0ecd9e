//! Where a backup lies: a directory of many, or one file. Its path says which.

use std::path::Path;

use bytes::Bytes;

use super::{
    archive::{Archive, Writing},
    chunk,
    directory::{Directory, Kept, PruneReport, Use},
    error::BackupError,
    manifest::Manifest,
};

/// Where a backup is written to.
#[derive(Debug)]
pub(super) enum Target {
    Directory(Directory),
    File(Box<Writing>),
}

impl Target {
    /// A path that is not there becomes a file if it ends with `.tar`, else a directory.
    pub(super) fn open(path: &Path) -> Result<Target, BackupError> {
        let file = match path.metadata() {
            Ok(found) => !found.is_dir(),
            Err(_) => path.extension().is_some_and(|extension| extension == "tar"),
        };
        match file {
            true => Writing::begin(path).map(Box::new).map(Target::File),
            false => Directory::make(path).map(Target::Directory),
        }
    }

    pub(super) fn has(&self, hash: &blake3::Hash) -> bool {
        match self {
            Target::Directory(directory) => directory.has(hash),
            Target::File(writing) => writing.has(hash),
        }
    }

    /// Stores a chunk, as a difference from `near` if that is worth it. Returns the bytes that were written.
    pub(super) fn put(
        &self,
        hash: &blake3::Hash,
        data: &[u8],
        near: Option<blake3::Hash>,
    ) -> Result<u64, BackupError> {
        match self {
            Target::Directory(directory) => {
                // What is a difference itself is no base, and one that does not read is no reason to fail.
                let base = near.and_then(|near| match directory.base_of(&near) {
                    Ok(base) => Some(base.unwrap_or(near)),
                    Err(_) => None,
                });
                let base = base.and_then(|base| directory.chunk(&base).ok().map(|rows| (base, rows)));
                let stored = chunk::encode(data, base.as_ref().map(|(hash, rows)| (*hash, &rows[..])));
                directory.put_chunk(hash, &stored)
            }
            Target::File(writing) => writing.put_chunk(hash, &chunk::encode(data, None)),
        }
    }

    /// The latest backup that is there and reads.
    pub(super) fn latest(&self) -> Result<Option<Manifest>, BackupError> {
        match self {
            Target::Directory(directory) => {
                Ok(directory.ids()?.iter().rev().find_map(|id| directory.manifest(id).ok()))
            }
            Target::File(_) => Ok(None),
        }
    }

    /// Makes the backup exist. Durable on return.
    pub(super) fn finish(self, manifest: &Manifest) -> Result<(), BackupError> {
        match self {
            Target::Directory(directory) => directory.put_manifest(manifest),
            Target::File(writing) => writing.finish(manifest),
        }
    }
}

/// Where backups are read from.
#[derive(Debug)]
pub(super) enum Source {
    Directory(Directory),
    File(Box<Archive>),
}

impl Source {
    pub(super) fn open(path: &Path) -> Result<Source, BackupError> {
        match path.metadata() {
            Ok(found) if found.is_dir() => Directory::open(path, Use::Read).map(Source::Directory),
            Ok(_) => Archive::open(path).map(Box::new).map(Source::File),
            Err(_) => Err(BackupError::Missing { path: path.to_owned() }),
        }
    }

    pub(super) fn ids(&self) -> Result<Vec<String>, BackupError> {
        match self {
            Source::Directory(directory) => directory.ids(),
            Source::File(archive) => Ok(vec![archive.manifest.id.clone()]),
        }
    }

    pub(super) fn manifest(&self, id: &str) -> Result<Manifest, BackupError> {
        match self {
            Source::Directory(directory) => directory.manifest(id),
            Source::File(archive) => Ok(archive.manifest.clone()),
        }
    }

    /// The backup of this id, or whose id alone begins so; the latest one without.
    pub(super) fn find(&self, path: &Path, id: Option<&str>) -> Result<Manifest, BackupError> {
        let ids = self.ids()?;
        let none = |id: &str| BackupError::NoSuchBackup { path: path.to_owned(), id: id.to_owned() };
        let Some(asked) = id else {
            let latest = ids.last().ok_or_else(|| none("yet; `pontoon backup` makes one"))?;
            return self.manifest(latest);
        };
        let fits: Vec<&String> =
            ids.iter().filter(|id| id.starts_with(asked) || id.ends_with(asked)).collect();
        match fits[..] {
            [id] => self.manifest(id),
            _ => Err(none(asked)),
        }
    }

    pub(super) fn has(&self, hash: &blake3::Hash) -> bool {
        match self {
            Source::Directory(directory) => directory.has(hash),
            Source::File(archive) => archive.has(hash),
        }
    }

    /// The rows of a chunk, checked.
    pub(super) fn chunk(&self, hash: &blake3::Hash) -> Result<Bytes, BackupError> {
        match self {
            Source::Directory(directory) => directory.chunk(hash),
            Source::File(archive) => archive.chunk(hash),
        }
    }
}

/// A backup by its id, and why its manifest does not read if it does not.
pub type Listed = (String, Result<Manifest, BackupError>);

/// The backups at a path, the oldest first. One that does not read is an error of its own.
///
/// # Errors
/// If nothing of ours is there.
pub fn list(path: &Path) -> Result<Vec<Listed>, BackupError> {
    let source = Source::open(path)?;
    Ok(source.ids()?.into_iter().map(|id| (id.clone(), source.manifest(&id))).collect())
}

/// Removes backups from a directory, and what no other one needs.
///
/// # Errors
/// [`BackupError::Damaged`] if a manifest does not read: nothing is removed then.
pub fn prune(path: &Path, keep: Kept) -> Result<PruneReport, BackupError> {
    match path.metadata() {
        Ok(found) if found.is_dir() => Directory::open(path, Use::Write)?.prune(keep),
        Ok(_) => Err(BackupError::Refused {
            reason: format!("{} is one backup in one file; remove the file", path.display()),
        }),
        Err(_) => Err(BackupError::Missing { path: path.to_owned() }),
    }
}
