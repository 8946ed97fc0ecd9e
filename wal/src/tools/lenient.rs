//! A file system whose disk does not answer everywhere: what cannot be read counts as zeros, and is remembered.
//!
//! For tools only. A log that is opened for use ends at the first read that fails, since nobody knows what the disk will do
//! next; a tool that looks at a dying disk wants all the rest.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use crate::fs::{File, FileOp, Fs, LockGuard, OpenMode, Ticket};

/// What is tried by itself when a longer read fails, and counts as one place.
const STEP: u64 = 4096;

/// Bytes that the disk did not give.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    /// The file.
    pub path: PathBuf,
    /// Where in it.
    pub offset: u64,
    /// How many.
    pub bytes: u64,
    /// What the system said.
    pub reason: String,
}

type Places = Arc<Mutex<BTreeMap<(PathBuf, u64), (u64, String)>>>;

/// Another file system, read with patience. Nothing is ever written by it.
#[derive(Clone)]
pub(crate) struct Lenient {
    fs: Arc<dyn Fs>,
    places: Places,
}

impl Lenient {
    pub(crate) fn new(fs: Arc<dyn Fs>) -> Lenient {
        Lenient { fs, places: Arc::default() }
    }

    /// What could not be read so far, neighbours put together, by file and offset.
    pub(crate) fn unreadable(&self) -> Vec<Unreadable> {
        let places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<Unreadable> = Vec::new();
        for ((path, offset), (bytes, reason)) in places.iter() {
            match all.last_mut() {
                Some(last) if last.path == *path && *offset <= last.offset + last.bytes => {
                    last.bytes = last.bytes.max(offset + bytes - last.offset);
                }
                _ => {
                    let (path, reason) = (path.clone(), reason.clone());
                    all.push(Unreadable { path, offset: *offset, bytes: *bytes, reason });
                }
            }
        }
        all
    }
}

fn refused<T>() -> io::Result<T> {
    Err(io::ErrorKind::ReadOnlyFilesystem.into())
}

impl Fs for Lenient {
    fn open(&self, path: &Path, _mode: OpenMode) -> io::Result<Arc<dyn File>> {
        let file = self.fs.open(path, OpenMode::Read)?;
        Ok(Arc::new(LenientFile { file, path: path.to_owned(), places: self.places.clone() }))
    }

    fn create_dir(&self, _path: &Path) -> io::Result<()> {
        refused()
    }

    fn rename(&self, _from: &Path, _to: &Path) -> io::Result<()> {
        refused()
    }

    fn remove_file(&self, _path: &Path) -> io::Result<()> {
        refused()
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<String>> {
        self.fs.read_dir(path)
    }

    fn sync_dir(&self, _path: &Path) -> io::Result<()> {
        refused()
    }

    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn LockGuard>>> {
        self.fs.lock(path)
    }
}

struct LenientFile {
    file: Arc<dyn File>,
    path: PathBuf,
    places: Places,
}

impl File for LenientFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        if let Ok(read) = self.file.read_at(buf, offset) {
            return Ok(read);
        }
        let end = self.file.len()?.min(offset + buf.len() as u64);
        let mut at = offset;
        while at < end {
            // Up to the next place that may be tried by itself.
            let next = (at / STEP + 1) * STEP;
            let part = &mut buf[(at - offset) as usize..(next.min(end) - offset) as usize];
            if let Err(error) = crate::fs::read_exact(&*self.file, part, at) {
                part.fill(0);
                let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
                let known = places.entry((self.path.clone(), at)).or_insert_with(|| (0, error.to_string()));
                known.0 = known.0.max(part.len() as u64);
            }
            at = next;
        }
        Ok(end.saturating_sub(offset) as usize)
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn submit(&self, _op: FileOp) -> Ticket {
        Ticket::done(refused())
    }
}
