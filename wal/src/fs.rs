//! The file system as the log sees it: few operations, each with a stated effect on durability.
//!
//! [`RealFs`] is the operating system's; [`sim::SimFs`](crate::sim::SimFs) is a simulated disk that tears, reorders,
//! loses and fails. Writes and syncs of segments are handed in by [`File::submit`] and complete by a [`Ticket`], so that
//! the same log runs on threads and in a simulator.

use std::{
    fmt, io,
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;

mod real;

pub use real::RealFs;

/// How a file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// An existing file, for reading.
    Read,
    /// An existing file, for reading and writing.
    Write,
    /// A file that is made if it is missing, for reading and writing.
    Create,
}

/// Names, directories and locks.
pub trait Fs: Send + Sync {
    /// Opens a file. A made name is durable only after [`Fs::sync_dir`] of its directory.
    ///
    /// # Errors
    /// What the system says; `NotFound` if it must exist and does not.
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>>;

    /// Makes a directory whose parent exists; one that is there already is fine.
    ///
    /// # Errors
    /// What the system says.
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// Renames a file or a directory. A directory may replace an empty one. Durable after [`Fs::sync_dir`] of the parent.
    ///
    /// # Errors
    /// What the system says.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// What the system says.
    fn remove_file(&self, path: &Path) -> io::Result<()>;

    /// The names in a directory, sorted.
    ///
    /// # Errors
    /// What the system says; `NotFound` if there is no such directory.
    fn read_dir(&self, path: &Path) -> io::Result<Vec<String>>;

    /// Makes the names in a directory durable.
    ///
    /// # Errors
    /// What the system says.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;

    /// Locks a file for this process until the guard is dropped; `None` if somebody else has it. The file is made if it
    /// is missing.
    ///
    /// # Errors
    /// What the system says.
    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn LockGuard>>>;
}

/// Holds a lock until it is dropped.
pub trait LockGuard: Send + Sync {}

/// An open file.
pub trait File: Send + Sync {
    /// Reads up to `buf.len()` bytes; fewer only at the end of the file.
    ///
    /// # Errors
    /// What the system says.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Reads exactly `buf.len()` bytes if that needs no waiting for the disk; `false` if it does or the file ends before.
    ///
    /// # Errors
    /// What the system says.
    fn read_now(&self, buf: &mut [u8], offset: u64) -> io::Result<bool> {
        read_exact(self, buf, offset).map(|()| true)
    }

    /// Asks the system to have these bytes at hand soon. A wish: whether it is met shows in [`File::read_now`].
    fn will_need(&self, _offset: u64, _len: u64) {}

    /// The file's length.
    ///
    /// # Errors
    /// What the system says.
    fn len(&self) -> io::Result<u64>;

    /// Whether the file is empty.
    ///
    /// # Errors
    /// What the system says.
    fn is_empty(&self) -> io::Result<bool> {
        self.len().map(|len| len == 0)
    }

    /// Hands in an operation. Operations that overlap or build on each other are handed in one after the other is
    /// complete; others reach the disk in any order until a sync completes.
    fn submit(&self, op: FileOp) -> Ticket;

    /// Whether [`FileOp::WriteDurable`] goes around the system's cache. The first call may open what that needs.
    fn is_direct(&self) -> bool {
        false
    }
}

/// What can be handed to a file.
#[derive(Debug, Clone)]
pub enum FileOp {
    /// Writes all bytes at the offset.
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: Bytes,
    },
    /// Writes all bytes at the offset and makes them durable. Fastest if offset, length and memory are multiples of 4 KiB.
    WriteDurable {
        /// Where.
        offset: u64,
        /// What.
        data: Bytes,
    },
    /// Writes zeros. What a fill needs, without a buffer of that size.
    Zero {
        /// Where.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// Makes every write that completed before, and the length that they need, durable.
    Sync,
    /// Cuts or extends the file to a length.
    SetLen(u64),
}

/// The completion of an operation that was handed in.
#[derive(Debug, Clone)]
pub struct Ticket(Arc<Slot>);

#[derive(Default)]
struct Slot {
    state: Mutex<State>,
    done: Condvar,
}

/// What is carried out by whoever waits first.
type Work = Box<dyn FnOnce() -> io::Result<()> + Send>;

#[derive(Default)]
struct State {
    work: Option<Work>,
    result: Option<io::Result<()>>,
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot").finish_non_exhaustive()
    }
}

impl Slot {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ticket {
    /// One that is complete already.
    pub fn done(result: io::Result<()>) -> Ticket {
        let ticket = Ticket::pending();
        ticket.complete(result);
        ticket
    }

    /// One that [`Ticket::complete`] completes later, from a clone.
    pub fn pending() -> Ticket {
        Ticket(Arc::default())
    }

    /// One whose operation is carried out, and completed, by the thread that first calls [`Ticket::advance`],
    /// [`Ticket::ready`] or [`Ticket::wait`]: as many operations are under way as threads wait, and no thread is woken to
    /// begin one.
    pub fn deferred(work: impl FnOnce() -> io::Result<()> + Send + 'static) -> Ticket {
        let state = State { work: Some(Box::new(work)), result: None };
        Ticket(Arc::new(Slot { state: Mutex::new(state), done: Condvar::new() }))
    }

    /// Completes it. The first result stays.
    pub fn complete(&self, result: io::Result<()>) {
        self.0.state().result.get_or_insert(result);
        self.0.done.notify_all();
    }

    /// Takes the result if it is there.
    pub fn poll(&self) -> Option<io::Result<()>> {
        self.0.state().result.take()
    }

    /// Carries out the operation if that is left to the caller; whether it was.
    pub fn advance(&self) -> bool {
        let work = self.0.state().work.take();
        work.map(|work| self.complete(work())).is_some()
    }

    /// Blocks until the result is there, and takes it.
    ///
    /// # Errors
    /// What the operation met.
    pub fn wait(&self) -> io::Result<()> {
        self.advance();
        let mut state = self.0.state();
        loop {
            match state.result.take() {
                Some(result) => return result,
                None => state = self.0.done.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Blocks until the result is there, and leaves it for [`Ticket::poll`].
    pub fn ready(&self) {
        if self.advance() {
            return;
        }
        let mut state = self.0.state();
        while state.result.is_none() {
            state = self.0.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Reads exactly this many bytes, or fails with `UnexpectedEof`.
pub(crate) fn read_exact(file: &(impl File + ?Sized), mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buf.is_empty() {
        match file.read_at(buf, offset)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => {
                buf = &mut buf[n..];
                offset += n as u64;
            }
        }
    }
    Ok(())
}

/// Reads all that the file holds.
pub(crate) fn read_whole(file: &dyn File) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; file.len()? as usize];
    read_exact(file, &mut bytes, 0)?;
    Ok(bytes)
}

/// Hands in a sync and waits for it.
pub(crate) fn sync(file: &dyn File) -> io::Result<()> {
    file.submit(FileOp::Sync).wait()
}
