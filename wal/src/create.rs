//! The directory: making it, locking it, telling it from others.
//!
//! Crash cases of making it:
//!
//! 1. Before the rename is durable: there is no log, or only a directory under the temporary name, which the next open
//!    takes over and fills again.
//! 2. After it: both manifests and the segment that they list were synced before the rename, names included.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;

use crate::{
    Error, Options, Result,
    background::{fill_ops, run},
    crypt::Keyring,
    fs::{File, FileOp, Fs, LockGuard, OpenMode},
    manifest::{ListedSegment, Listing, MANIFEST_NAMES, Manifest},
    recovery::{Loaded, load},
    rng::Rng,
    segment::segment_name,
};

pub(crate) const LOCK_NAME: &str = "LOCK";
/// A directory is made under its name with this at the end.
const MAKING: &str = ".creating";

/// Locks the directory, makes it if it is missing, and reads its manifests.
pub(crate) fn enter(options: &Options, keyring: &Keyring) -> Result<(Box<dyn LockGuard>, Loaded, bool)> {
    let (fs, dir) = (&*options.fs, &options.dir);
    // Whoever makes the directory at the same time wins or loses the lock under the temporary name; either way the
    // second look finds it.
    for made in [false, true] {
        if names_in(fs, dir)?.iter().any(|name| MANIFEST_NAMES.contains(&name.as_str())) {
            let lock = lock(fs, &dir.join(LOCK_NAME), dir)?;
            if let Some(loaded) = load(fs, dir, keyring)? {
                return Ok((lock, loaded, false));
            }
        }
        if let Some(name) = names_in(fs, dir)?.first() {
            return Err(Error::Foreign {
                path: dir.clone(),
                what: format!("it holds {name} and no manifest"),
            });
        }
        if made {
            break;
        }
        let making = making_name(dir);
        fs.create_dir(&making).map_err(|source| Error::io("make", &making, source))?;
        let lock = lock(fs, &making.join(LOCK_NAME), dir)?;
        if names_in(fs, dir)?.is_empty() && !names_in(fs, &making)?.is_empty() {
            make(options, keyring, &making)?;
            let loaded = load(fs, dir, keyring)?.ok_or_else(|| Error::Foreign {
                path: dir.clone(),
                what: "somebody removed it while it was made".to_owned(),
            })?;
            return Ok((lock, loaded, true));
        }
    }
    Err(Error::Locked { path: dir.clone() })
}

/// The names in the directory; none if it is not there.
fn names_in(fs: &dyn Fs, dir: &Path) -> Result<Vec<String>> {
    match fs.read_dir(dir) {
        Ok(names) => Ok(names),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => {
            Err(Error::Foreign { path: dir.to_owned(), what: "it is a file".to_owned() })
        }
        Err(source) => Err(Error::io("list", dir, source)),
    }
}

fn lock(fs: &dyn Fs, path: &Path, dir: &Path) -> Result<Box<dyn LockGuard>> {
    let lock = fs.lock(path).map_err(|source| Error::io("lock", path, source))?;
    lock.ok_or_else(|| Error::Locked { path: dir.to_owned() })
}

fn making_name(dir: &Path) -> PathBuf {
    let mut name = dir.file_name().unwrap_or_default().to_owned();
    name.push(MAKING);
    dir.with_file_name(name)
}

/// Fills the directory under its temporary name and gives it its own.
fn make(options: &Options, keyring: &Keyring, making: &Path) -> Result<()> {
    let fs = &*options.fs;
    let mut rng = options.rng();
    let store = uuid::Builder::from_random_bytes(rng.next_u128().to_le_bytes()).into_uuid().as_u128();
    let open = |name: &str| -> Result<(PathBuf, Arc<dyn File>)> {
        let path = making.join(name);
        let file = fs.open(&path, OpenMode::Create).map_err(|source| Error::io("make", &path, source))?;
        Ok((path, file))
    };
    let first = 1;
    let (path, file) = open(&segment_name(first))?;
    run(fill_ops(&file, options.segment_bytes), &path)?;
    for (slot, name) in MANIFEST_NAMES.into_iter().enumerate() {
        let mut manifest = Manifest {
            seq: slot as u64 + 1,
            store,
            segment_bytes: options.segment_bytes,
            next_segment: first + 1,
            segments: vec![ListedSegment {
                id: first,
                epoch: Rng::new(options.seed ^ store as u64).next_u128(),
                listing: Listing::Prepared,
                stream: 0,
                incarnation: 0,
                first_seq: 0,
                last_seq: 0,
                key_id: 0,
                footer: None,
            }],
            ..Manifest::default()
        };
        let (path, file) = open(name)?;
        let data = Bytes::from(manifest.encode(keyring, &mut rng));
        let len = FileOp::SetLen(data.len() as u64);
        run(
            vec![
                (file.clone(), len),
                (file.clone(), FileOp::Write { offset: 0, data }),
                (file, FileOp::Sync),
            ],
            &path,
        )?;
    }
    fs.sync_dir(making).map_err(|source| Error::io("sync", making, source))?;
    let dir = &options.dir;
    fs.rename(making, dir).map_err(|source| Error::io("rename", making, source))?;
    sync_name(fs, dir)
}

/// Makes the directory's own name durable. Whoever finds a log does not know whether the process that made it lived to do
/// that.
pub(crate) fn sync_name(fs: &dyn Fs, dir: &Path) -> Result<()> {
    let parent = match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs.sync_dir(parent).map_err(|source| Error::io("sync", parent, source))
}
