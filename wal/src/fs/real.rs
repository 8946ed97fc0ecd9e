//! The operating system's file system. An operation is carried out by the thread that waits for it.

#![expect(clippy::disallowed_methods, clippy::disallowed_types, reason = "this is the file system")]

use std::{
    fs, io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use super::{File, FileOp, Fs, LockGuard, OpenMode, Ticket};

mod direct;

use direct::Direct;

/// The operating system's file system.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealFs;

impl Fs for RealFs {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>> {
        let mut options = fs::OpenOptions::new();
        options.read(true).write(mode != OpenMode::Read).create(mode == OpenMode::Create).truncate(false);
        let file = options.open(path)?;
        let path = path.to_owned();
        Ok(Arc::new(RealFile(Arc::new(Handle { file, path, mode, direct: OnceLock::new() }))))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        match fs::create_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
            other => other,
        }
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(path)? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        fs::File::open(path)?.sync_all()
    }

    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn LockGuard>>> {
        let file = fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let file = match file {
            // A disk that failed is often read-only by then; a lock that is there can be held for reading, too.
            Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => fs::File::open(path)?,
            other => other?,
        };
        match file.try_lock() {
            Ok(()) => Ok(Some(Box::new(RealLock { _file: file }))),
            Err(fs::TryLockError::WouldBlock) => Ok(None),
            Err(fs::TryLockError::Error(error)) => Err(error),
        }
    }
}

/// The system releases the lock when the last descriptor of this open file is closed.
struct RealLock {
    _file: fs::File,
}

impl LockGuard for RealLock {}

struct RealFile(Arc<Handle>);

struct Handle {
    file: fs::File,
    path: PathBuf,
    mode: OpenMode,
    /// The same file once more, around the system's cache; none where the file system has no such thing.
    direct: OnceLock<Option<Direct>>,
}

impl Handle {
    fn direct(&self) -> Option<&Direct> {
        let open = || match self.mode {
            OpenMode::Read => None,
            OpenMode::Write | OpenMode::Create => Direct::open(&self.path),
        };
        self.direct.get_or_init(open).as_ref()
    }

    fn run(&self, op: &FileOp) -> io::Result<()> {
        match op {
            FileOp::Write { offset, data } => self.file.write_all_at(data, *offset),
            FileOp::WriteDurable { offset, data } => {
                if let Some(direct) = self.direct().filter(|direct| direct.takes(data, *offset)) {
                    return direct.write_durable(data, *offset);
                }
                self.file.write_all_at(data, *offset)?;
                self.file.sync_data()
            }
            FileOp::Zero { offset, len } => direct::zero(&self.file, self.direct(), *offset, *len),
            // Segments are written ahead with zeros, so that a sync of data alone never waits for the file system's
            // journal; where a length changes, fdatasync takes the length along.
            FileOp::Sync => self.file.sync_data(),
            FileOp::SetLen(len) => self.file.set_len(*len),
        }
    }
}

impl File for RealFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        loop {
            match self.0.file.read_at(buf, offset) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    #[cfg(target_os = "linux")]
    fn read_now(&self, buf: &mut [u8], offset: u64) -> io::Result<bool> {
        use rustix::io::{Errno, ReadWriteFlags, preadv2};

        let wanted = buf.len();
        match preadv2(&self.0.file, &mut [io::IoSliceMut::new(buf)], offset, ReadWriteFlags::NOWAIT) {
            Ok(read) => Ok(read == wanted),
            // Not at hand, or a file system that cannot tell.
            Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    #[cfg(target_os = "linux")]
    fn will_need(&self, offset: u64, len: u64) {
        use rustix::fs::{Advice, fadvise};

        // A file system that takes no advice reads when it is asked to.
        let _ = fadvise(&self.0.file, offset, std::num::NonZeroU64::new(len), Advice::WillNeed);
    }

    fn len(&self) -> io::Result<u64> {
        self.0.file.metadata().map(|meta| meta.len())
    }

    fn submit(&self, op: FileOp) -> Ticket {
        let handle = self.0.clone();
        Ticket::deferred(move || handle.run(&op))
    }

    fn is_direct(&self) -> bool {
        self.0.direct().is_some()
    }
}
