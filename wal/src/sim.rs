//! A simulated disk: it keeps what was synced, and of the rest what chance leaves.
//!
//! Model: a file's bytes reach the disk in sectors of 512 bytes, in any order, until a sync of the file completes; a name
//! reaches it when its directory is synced. [`SimFs::crash`] keeps of everything that was not synced a subset drawn from a
//! seed. After a failed sync the bytes that it should have made durable read as written and are dropped by a crash unless
//! chance keeps them: a later successful sync does not bring them back.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;

use crate::{
    fs::{File, FileOp, Fs, LockGuard, OpenMode, Ticket},
    rng::Rng,
};

mod disk;

use disk::{Disk, Inode};

/// What a fault does to the operation that it hits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It fails with an I/O error and has no effect; a failed sync loses what it should have saved.
    Io,
    /// It fails for lack of room.
    NoSpace,
    /// A write puts down a part of its bytes, then fails.
    Short,
    /// Power is cut in the middle of it: this and every later operation fails until [`SimFs::crash`].
    PowerCut,
}

/// Which operations a fault counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum OpKind {
    /// Anything that changes the disk: writes, syncs, lengths and names.
    Change,
    /// Writes to files.
    Write,
    /// Syncs of files and directories.
    Sync,
    /// Reads of files.
    Read,
}

/// How many operations there were.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Writes to files.
    pub writes: u64,
    /// Syncs of files and directories.
    pub syncs: u64,
    /// Reads of files.
    pub reads: u64,
    /// All operations that change the disk.
    pub changes: u64,
}

/// What is on the disk at one moment.
#[derive(Debug, Clone)]
pub struct SimImage(Disk);

/// A simulated file system. Clones share the disk.
#[derive(Debug, Clone, Default)]
pub struct SimFs(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    disk: Disk,
    counts: Counts,
    faults: Vec<(OpKind, u64, Fault)>,
    powerless: bool,
    /// Rises with each crash; handles of before are dead.
    life: u64,
    locked: BTreeSet<u64>,
    held: bool,
    waiting: Vec<(u64, u64, FileOp, Ticket)>,
    capacity: Option<u64>,
}

impl SimFs {
    /// An empty disk with a root directory.
    pub fn new() -> Self {
        SimFs::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cuts the power and brings it back: what was not synced survives as chance has it, files of before are dead, faults
    /// are forgotten.
    pub fn crash(&self, seed: u64) {
        let mut state = self.state();
        state.disk.crash(&mut Rng::new(seed));
        state.powerless = false;
        state.life += 1;
        state.faults.clear();
        state.locked.clear();
        state.waiting.clear();
    }

    /// Ends the process without cutting the power: what was written stays, locks are released.
    pub fn kill(&self) {
        let mut state = self.state();
        state.powerless = false;
        state.life += 1;
        state.faults.clear();
        state.locked.clear();
        state.waiting.clear();
    }

    /// Lets the `nth` operation of this kind from now on (0 is the next) meet a fault.
    pub fn fail_nth(&self, kind: OpKind, nth: u64, fault: Fault) {
        let mut state = self.state();
        let at = state.count(kind) + nth;
        state.faults.push((kind, at, fault));
    }

    /// How many operations there were.
    pub fn counts(&self) -> Counts {
        self.state().counts
    }

    /// Limits the bytes that all files may have together.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.state().capacity = bytes;
    }

    /// With `true`, writes and syncs of files wait for [`SimFs::complete_one`].
    pub fn hold(&self, hold: bool) {
        self.state().held = hold;
    }

    /// Carries out the oldest operation that waits; `false` if none does.
    pub fn complete_one(&self) -> bool {
        let mut state = self.state();
        if state.waiting.is_empty() {
            return false;
        }
        let (life, inode, op, ticket) = state.waiting.remove(0);
        let result = state.file_op(life, inode, &op);
        drop(state);
        ticket.complete(result);
        true
    }

    /// Copies the disk.
    pub fn image(&self) -> SimImage {
        SimImage(self.state().disk.clone())
    }

    /// Replaces the disk. Files that are open are dead, locks are released.
    pub fn restore(&self, image: &SimImage) {
        self.kill();
        self.state().disk = image.0.clone();
    }

    /// All files with their lengths.
    pub fn files(&self) -> Vec<(PathBuf, u64)> {
        self.state().disk.files()
    }

    /// Changes the bytes of a file behind everybody's back, durably. `None` if there is no such file.
    pub fn tamper<T>(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>) -> T) -> Option<T> {
        let mut state = self.state();
        let inode = state.disk.lookup(path)?;
        let file = state.disk.inodes.get_mut(&inode)?;
        file.settle();
        let result = change(&mut file.current);
        file.durable.clone_from(&file.current);
        Some(result)
    }
}

impl State {
    fn count(&self, kind: OpKind) -> u64 {
        match kind {
            OpKind::Change => self.counts.changes,
            OpKind::Write => self.counts.writes,
            OpKind::Sync => self.counts.syncs,
            OpKind::Read => self.counts.reads,
        }
    }

    /// Counts an operation and says which fault it meets.
    fn begin(&mut self, kind: OpKind) -> Option<Fault> {
        if self.powerless {
            return Some(Fault::PowerCut);
        }
        let counts = (self.counts.changes, self.count(kind));
        let hit = self.faults.iter().position(|(of, at, _)| {
            *of == kind && *at == counts.1 || *of == OpKind::Change && kind != OpKind::Read && *at == counts.0
        });
        match kind {
            OpKind::Write => self.counts.writes += 1,
            OpKind::Sync => self.counts.syncs += 1,
            OpKind::Read => self.counts.reads += 1,
            OpKind::Change => {}
        }
        self.counts.changes += u64::from(kind != OpKind::Read);
        let fault = hit.map(|at| self.faults.swap_remove(at).2);
        self.powerless |= fault == Some(Fault::PowerCut);
        fault
    }

    /// Counts an operation that has its effect whole or not at all.
    fn begin_whole(&mut self, kind: OpKind) -> io::Result<()> {
        self.begin(kind).map_or(Ok(()), |fault| Err(error_of(fault)))
    }

    fn file(&mut self, life: u64, inode: u64) -> io::Result<&mut Inode> {
        if life != self.life {
            return Err(io::Error::other("the simulated machine was restarted"));
        }
        self.disk.inodes.get_mut(&inode).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn file_op(&mut self, life: u64, inode: u64, op: &FileOp) -> io::Result<()> {
        self.file(life, inode)?;
        match op {
            FileOp::Write { offset, data } => self.write(life, inode, *offset, data),
            FileOp::SetLen(len) => {
                self.begin_whole(OpKind::Change)?;
                self.check_capacity(inode, *len)?;
                self.file(life, inode)?.set_len(*len);
                Ok(())
            }
            FileOp::Sync => {
                let fault = self.begin(OpKind::Sync);
                let file = self.file(life, inode)?;
                match fault {
                    None => file.sync(),
                    Some(fault) => {
                        if fault != Fault::PowerCut {
                            file.forget_unsynced();
                        }
                        return Err(error_of(fault));
                    }
                }
                Ok(())
            }
        }
    }

    fn write(&mut self, life: u64, inode: u64, offset: u64, data: &Bytes) -> io::Result<()> {
        let fault = self.begin(OpKind::Write);
        let kept = match fault {
            None => data.clone(),
            // Power was cut while it was under way: any of its sectors may be there.
            Some(Fault::PowerCut) => data.clone(),
            Some(Fault::Short) => data.slice(..data.len() / 2),
            Some(fault) => return Err(error_of(fault)),
        };
        self.check_capacity(inode, offset + kept.len() as u64)?;
        self.file(life, inode)?.write(offset, &kept);
        fault.map_or(Ok(()), |fault| Err(error_of(fault)))
    }

    fn check_capacity(&self, inode: u64, len: u64) -> io::Result<()> {
        let others: u64 = self
            .disk
            .inodes
            .iter()
            .filter(|(id, _)| **id != inode)
            .map(|(_, file)| file.current.len() as u64)
            .sum();
        let own = self.disk.inodes.get(&inode).map_or(0, |file| file.current.len() as u64);
        match self.capacity {
            Some(capacity) if len > own && others + len > capacity => Err(io::ErrorKind::StorageFull.into()),
            _ => Ok(()),
        }
    }
}

fn error_of(fault: Fault) -> io::Error {
    match fault {
        Fault::Io | Fault::Short => io::Error::other("simulated I/O error"),
        Fault::NoSpace => io::ErrorKind::StorageFull.into(),
        Fault::PowerCut => io::Error::other("simulated power cut"),
    }
}

impl Fs for SimFs {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>> {
        let mut state = self.state();
        let inode = match state.disk.lookup(path) {
            _ if state.disk.is_dir(path) => return Err(io::ErrorKind::IsADirectory.into()),
            Some(inode) => inode,
            None if mode == OpenMode::Create => {
                state.begin_whole(OpKind::Change)?;
                state.disk.create(path)?
            }
            None => return Err(io::ErrorKind::NotFound.into()),
        };
        if state.powerless {
            return Err(error_of(Fault::PowerCut));
        }
        Ok(Arc::new(SimFile { fs: self.clone(), inode, life: state.life }))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        if state.disk.is_dir(path) {
            return Ok(());
        }
        state.begin_whole(OpKind::Change)?;
        state.disk.create_dir(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.begin_whole(OpKind::Change)?;
        state.disk.rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.begin_whole(OpKind::Change)?;
        state.disk.remove(path)
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<String>> {
        let state = self.state();
        if state.powerless {
            return Err(error_of(Fault::PowerCut));
        }
        state.disk.names_in(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.begin_whole(OpKind::Sync)?;
        state.disk.sync_dir(path);
        Ok(())
    }

    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn LockGuard>>> {
        drop(self.open(path, OpenMode::Create)?);
        let mut state = self.state();
        let inode = state.disk.lookup(path).ok_or(io::ErrorKind::NotFound)?;
        let life = state.life;
        Ok(state
            .locked
            .insert(inode)
            .then(|| -> Box<dyn LockGuard> { Box::new(SimLock { fs: self.clone(), inode, life }) }))
    }
}

struct SimLock {
    fs: SimFs,
    inode: u64,
    life: u64,
}

impl LockGuard for SimLock {}

impl Drop for SimLock {
    fn drop(&mut self) {
        let mut state = self.fs.state();
        if state.life == self.life {
            state.locked.remove(&self.inode);
        }
    }
}

struct SimFile {
    fs: SimFs,
    inode: u64,
    life: u64,
}

impl File for SimFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut state = self.fs.state();
        state.begin_whole(OpKind::Read)?;
        let file = state.file(self.life, self.inode)?;
        let rest = file.current.get(offset as usize..).unwrap_or_default();
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }

    fn len(&self) -> io::Result<u64> {
        let mut state = self.fs.state();
        state.file(self.life, self.inode).map(|file| file.current.len() as u64)
    }

    fn submit(&self, op: FileOp) -> Ticket {
        let mut state = self.fs.state();
        if state.held {
            let ticket = Ticket::pending();
            state.waiting.push((self.life, self.inode, op, ticket.clone()));
            return ticket;
        }
        Ticket::done(state.file_op(self.life, self.inode, &op))
    }
}
