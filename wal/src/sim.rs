//! A simulated disk: it keeps what was synced, and of the rest what chance leaves.
//!
//! Model: a file's bytes reach the disk in sectors of 512 bytes, in any order, until a sync of the file completes; a name
//! reaches it when its directory is synced. [`SimFs::crash`] keeps of everything that was not synced a subset drawn from a
//! seed; [`SimImage::loose`] lists that everything piece by piece, so that a test can build each disk that a power cut may
//! leave. After a failed sync the bytes that it should have made durable read as written and are dropped by a crash unless
//! chance keeps them: a later successful sync does not bring them back.

use std::{
    collections::BTreeSet,
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;

use crate::{
    fs::{File, FileOp, Fs, LockGuard, OpenMode, Ticket},
    rng::Rng,
};

mod content;
mod disk;

use content::Content;
use disk::{Atom, Disk, Inode, SECTOR};

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

/// What is on the disk at one moment. Copies share their bytes.
#[derive(Debug, Clone)]
pub struct SimImage(Disk);

/// What is not durable of an image, in pieces, each of which a power cut keeps or loses.
#[derive(Debug, Clone)]
pub struct Loose {
    disk: Disk,
    atoms: Vec<Atom>,
}

impl SimImage {
    /// What is not durable: names, lengths and writes, the latter cut at multiples of `unit_bytes`: 512 for a disk whose
    /// sectors are written whole, 4,096 for one that writes such blocks whole.
    ///
    /// # Panics
    /// If the unit is not a multiple of 512.
    pub fn loose(&self, unit_bytes: usize) -> Loose {
        assert!(unit_bytes > 0 && unit_bytes.is_multiple_of(SECTOR), "no disk tears sectors");
        Loose { disk: self.0.clone(), atoms: self.0.atoms(unit_bytes) }
    }

    /// Equal for images with the same names and bytes, if nothing of them is loose.
    pub fn fingerprint(&self) -> u64 {
        self.0.fingerprint()
    }
}

impl Loose {
    /// How many pieces there are.
    pub fn len(&self) -> usize {
        self.atoms.len()
    }

    /// Whether everything is durable.
    pub fn is_empty(&self) -> bool {
        self.atoms.is_empty()
    }

    /// The disk after a power cut that keeps the pieces for which `kept` says so, and nothing else.
    pub fn power_cut(&self, mut kept: impl FnMut(usize) -> bool) -> SimImage {
        let atoms = self.atoms.iter().enumerate().filter(|(nth, _)| kept(*nth));
        SimImage(self.disk.power_cut(atoms.map(|(_, atom)| atom)))
    }

    /// What a piece is, for people.
    pub fn describe(&self, nth: usize) -> String {
        self.disk.describe(&self.atoms[nth])
    }
}

/// Hears of the disk before each change.
type Watcher = Box<dyn FnMut(&SimImage) + Send>;

/// A simulated file system. Clones share the disk.
#[derive(Clone, Default)]
pub struct SimFs(Arc<Mutex<State>>);

impl std::fmt::Debug for SimFs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimFs").field("counts", &self.counts()).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct State {
    disk: Disk,
    watcher: Option<Watcher>,
    counts: Counts,
    faults: Vec<(OpKind, u64, Fault)>,
    powerless: bool,
    /// Rises with each crash; handles of before are dead.
    life: u64,
    locked: BTreeSet<u64>,
    held: bool,
    waiting: Vec<(u64, u64, FileOp, Ticket)>,
    capacity: Option<u64>,
    cold: bool,
    /// Places of files that cannot be read.
    unreadable: Vec<(u64, Range<u64>)>,
    patience: Option<u64>,
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
        state.disk = state.image().0;
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

    /// With `true`, no bytes are at hand: [`File::read_now`] finds nothing, and whoever wants them waits for the disk.
    pub fn set_cold(&self, cold: bool) {
        self.state().cold = cold;
    }

    /// From now on each read that touches these bytes of a file fails, whoever asks. `None` if there is no such file.
    pub fn set_unreadable(&self, path: &Path, bytes: Range<u64>) -> Option<()> {
        let mut state = self.state();
        let inode = state.disk.lookup(path)?;
        state.unreadable.push((inode, bytes));
        Some(())
    }

    /// Panics at the operation that is the `changes`th from now on to change the disk: a log that never comes to rest is
    /// noticed.
    pub fn lose_patience_after(&self, changes: u64) {
        let mut state = self.state();
        state.patience = Some(state.counts.changes + changes);
    }

    /// With `true`, writes and syncs of files wait for [`SimFs::complete_one`].
    pub fn hold(&self, hold: bool) {
        self.state().held = hold;
    }

    /// How many operations wait.
    pub fn waiting(&self) -> usize {
        self.state().waiting.len()
    }

    /// Carries out the oldest operation that waits; `false` if none does.
    pub fn complete_one(&self) -> bool {
        self.complete_nth(0)
    }

    /// Carries out the `nth` oldest operation that waits, before the older ones: a write may overtake writes and a sync, a
    /// sync covers the writes that were carried out before it. A durable write is one of each: after the write its sync
    /// waits in its place. `false` if not so many wait.
    pub fn complete_nth(&self, nth: usize) -> bool {
        let mut state = self.state();
        if state.waiting.len() <= nth {
            return false;
        }
        let (life, inode, op, ticket) = state.waiting.remove(nth);
        let result = match op {
            // Written first and durable later: a process may be killed in between.
            FileOp::WriteDurable { offset, data } => {
                let written = state.file_op(life, inode, &FileOp::Write { offset, data });
                if written.is_ok() {
                    state.waiting.insert(nth, (life, inode, FileOp::Sync, ticket));
                    return true;
                }
                written
            }
            op => state.file_op(life, inode, &op),
        };
        drop(state);
        ticket.complete(result);
        true
    }

    /// Copies the disk. Operations that wait count as under way: a power cut may leave any part of them.
    pub fn image(&self) -> SimImage {
        self.state().image()
    }

    /// Shows the disk to somebody before each operation that changes it, as [`SimFs::image`] does. He must not use it.
    pub fn watch(&self, watcher: impl FnMut(&SimImage) + Send + 'static) {
        self.state().watcher = Some(Box::new(watcher));
    }

    /// Ends [`SimFs::watch`].
    pub fn unwatch(&self) {
        self.state().watcher = None;
    }

    /// Another disk with these contents.
    pub fn from_image(image: &SimImage) -> SimFs {
        let fs = SimFs::new();
        fs.state().disk = image.0.clone();
        fs
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

    /// Puts bytes into a file behind everybody's back, durably, within its length. `None` if there is no such file.
    pub fn patch(&self, path: &Path, offset: u64, bytes: &[u8]) -> Option<()> {
        self.behind(path, |content| content.write(offset as usize, bytes))
    }

    /// Reads a file behind everybody's back. `None` if there is no such file.
    pub fn peek(&self, path: &Path, offset: u64, buf: &mut [u8]) -> Option<usize> {
        let state = self.state();
        let inode = state.disk.lookup(path)?;
        Some(state.disk.inodes.get(&inode)?.current().read(offset as usize, buf))
    }

    /// Cuts a file to a length behind everybody's back, durably. `None` if there is no such file.
    pub fn cut(&self, path: &Path, len: u64) -> Option<()> {
        self.behind(path, |content| content.resize(len as usize))
    }

    fn behind(&self, path: &Path, change: impl FnOnce(&mut Content)) -> Option<()> {
        let mut state = self.state();
        let inode = state.disk.lookup(path)?;
        let file = state.disk.inodes.get_mut(&inode)?;
        let mut content = file.current().clone();
        change(&mut content);
        file.settle(content);
        Some(())
    }

    /// Changes the bytes of a file behind everybody's back, durably. `None` if there is no such file.
    pub fn tamper<T>(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>) -> T) -> Option<T> {
        let mut state = self.state();
        let inode = state.disk.lookup(path)?;
        let file = state.disk.inodes.get_mut(&inode)?;
        let mut bytes = file.current().to_vec();
        let result = change(&mut bytes);
        file.settle(Content::from_bytes(&bytes));
        Some(result)
    }
}

impl State {
    fn image(&self) -> SimImage {
        let mut disk = self.disk.clone();
        for (life, inode, op, _) in &self.waiting {
            let Some(file) = disk.inodes.get_mut(inode).filter(|_| *life == self.life) else { continue };
            match op {
                FileOp::Write { offset, data } | FileOp::WriteDurable { offset, data } => {
                    file.hand_in_write(*offset, data)
                }
                FileOp::Zero { offset, len } => file.hand_in_write(*offset, &vec![0; *len as usize].into()),
                FileOp::SetLen(len) => file.hand_in_len(*len),
                FileOp::Sync => {}
            }
        }
        SimImage(disk)
    }

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
        if kind != OpKind::Read
            && let Some(mut watcher) = self.watcher.take()
        {
            watcher(&self.image());
            self.watcher = Some(watcher);
        }
        let counts = (self.counts.changes, self.count(kind));
        assert!(self.patience.is_none_or(|limit| counts.0 < limit), "the log never comes to rest");
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
            FileOp::Zero { offset, len } => self.write(life, inode, *offset, &vec![0; *len as usize].into()),
            FileOp::WriteDurable { offset, data } => {
                self.write(life, inode, *offset, data)?;
                self.file_op(life, inode, &FileOp::Sync)
            }
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
            .filter(|(id, _)| **id != inode && self.disk.is_named(**id))
            .map(|(_, file)| file.current().len() as u64)
            .sum();
        let own = self.disk.inodes.get(&inode).map_or(0, |file| file.current().len() as u64);
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
        let end = offset + buf.len() as u64;
        let hits = |(inode, bytes): &(u64, Range<u64>)| {
            *inode == self.inode && bytes.start < end && offset < bytes.end
        };
        if state.unreadable.iter().any(hits) {
            return Err(error_of(Fault::Io));
        }
        let file = state.file(self.life, self.inode)?;
        Ok(file.current().read(offset as usize, buf))
    }

    fn read_now(&self, buf: &mut [u8], offset: u64) -> io::Result<bool> {
        if self.fs.state().cold {
            return Ok(false);
        }
        Ok(self.read_at(buf, offset)? == buf.len())
    }

    fn len(&self) -> io::Result<u64> {
        let mut state = self.fs.state();
        state.file(self.life, self.inode).map(|file| file.current().len() as u64)
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
