//! What lies on the simulated disk: contents and names, durable and not.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
};

use bytes::Bytes;

use super::content::{Content, mix};
use crate::rng::Rng;

/// What reaches the disk as one.
pub(super) const SECTOR: usize = 512;

/// A change of a file that no sync has made durable.
#[derive(Debug, Clone)]
enum Pending {
    Len(usize),
    Write {
        offset: usize,
        data: Bytes,
        /// A sync failed over it: the system holds it for clean, so no later sync writes it.
        lost: bool,
    },
}

/// A file's content.
#[derive(Debug, Clone, Default)]
pub(super) struct Inode {
    /// What survives any crash.
    durable: Content,
    /// What readers see.
    current: Content,
    /// What leads from the one to the other, in the order in which it was asked for.
    pending: Vec<Pending>,
}

impl Inode {
    pub(super) fn current(&self) -> &Content {
        &self.current
    }

    pub(super) fn write(&mut self, offset: u64, data: &Bytes) {
        let offset = offset as usize;
        if self.current.len() < offset + data.len() {
            self.set_len((offset + data.len()) as u64);
        }
        self.current.write(offset, data);
        self.hand_in_write(offset as u64, data);
    }

    pub(super) fn set_len(&mut self, len: u64) {
        self.current.resize(len as usize);
        self.hand_in_len(len);
    }

    /// A write that is under way: readers do not see it, a power cut may leave any part of it.
    pub(super) fn hand_in_write(&mut self, offset: u64, data: &Bytes) {
        self.pending.push(Pending::Write { offset: offset as usize, data: data.clone(), lost: false });
    }

    /// A new length that is under way.
    pub(super) fn hand_in_len(&mut self, len: u64) {
        self.pending.push(Pending::Len(len as usize));
    }

    pub(super) fn sync(&mut self) {
        for pending in std::mem::take(&mut self.pending) {
            match &pending {
                Pending::Write { lost: true, .. } => self.pending.push(pending),
                Pending::Write { offset, data, .. } => {
                    overwrite(&mut self.durable, *offset, data);
                    // What a failed sync gave up below it does not come back over it.
                    self.pending.retain(|lost| !lost.touches(*offset, data.len()));
                }
                Pending::Len(len) => self.durable.resize(*len),
            }
        }
    }

    /// Everything that is written counts as synced.
    pub(super) fn settle(&mut self, content: Content) {
        self.durable = content.clone();
        self.current = content;
        self.pending.clear();
    }

    /// A failed sync: what it should have saved counts as clean, and only chance brings it to the disk.
    pub(super) fn forget_unsynced(&mut self) {
        for pending in &mut self.pending {
            if let Pending::Write { lost, .. } = pending {
                *lost = true;
            }
        }
    }
}

/// Writes what fits below the length: what lies beyond it is lost with the length.
fn overwrite(content: &mut Content, offset: usize, data: &[u8]) {
    let end = content.len().min(offset + data.len());
    if offset < end {
        content.write(offset, &data[..end - offset]);
    }
}

/// One thing that a power cut keeps or loses.
#[derive(Debug, Clone)]
pub(super) enum Atom {
    /// A change of names, by its place in the list.
    Name(usize),
    /// A new length, by its place in the file's list.
    Len { inode: u64, nth: usize },
    /// A part of a write.
    Part { inode: u64, nth: usize, from: usize, to: usize },
}

/// A change of names that its directory's sync has not reached.
#[derive(Debug, Clone)]
enum NameChange {
    Add { path: PathBuf, inode: u64, dir: bool },
    Remove { path: PathBuf },
    Rename { from: PathBuf, to: PathBuf },
}

impl NameChange {
    /// Whether a sync of this directory makes it durable.
    fn is_in(&self, dir: &Path) -> bool {
        let (NameChange::Add { path, .. }
        | NameChange::Remove { path }
        | NameChange::Rename { to: path, .. }) = self;
        path.parent() == Some(dir)
    }
}

/// Names by full path; files with their inodes.
#[derive(Debug, Clone, Default)]
struct Space {
    files: BTreeMap<PathBuf, u64>,
    dirs: BTreeSet<PathBuf>,
}

impl Space {
    fn has_parent(&self, path: &Path) -> bool {
        path.parent().is_none_or(|parent| parent.parent().is_none() || self.dirs.contains(parent))
    }

    /// Applies a change if it still makes sense.
    fn apply(&mut self, change: &NameChange) {
        match change {
            NameChange::Add { path, inode, dir } if self.has_parent(path) => {
                if *dir {
                    self.dirs.insert(path.clone());
                } else {
                    self.files.insert(path.clone(), *inode);
                }
            }
            NameChange::Add { .. } => {}
            NameChange::Remove { path } => {
                self.files.remove(path);
            }
            NameChange::Rename { from, to } => {
                let moved = |path: &PathBuf| path.strip_prefix(from).ok().map(|rest| join(to, rest));
                if self.files.contains_key(from) || self.dirs.contains(from) {
                    self.files = std::mem::take(&mut self.files)
                        .into_iter()
                        .map(|(path, inode)| (moved(&path).unwrap_or(path), inode))
                        .collect();
                    self.dirs = std::mem::take(&mut self.dirs)
                        .into_iter()
                        .map(|path| moved(&path).unwrap_or(path))
                        .collect();
                }
            }
        }
    }
}

fn join(to: &Path, rest: &Path) -> PathBuf {
    if rest.as_os_str().is_empty() { to.to_owned() } else { to.join(rest) }
}

/// All files and names.
#[derive(Debug, Clone, Default)]
pub(super) struct Disk {
    pub(super) inodes: BTreeMap<u64, Inode>,
    current: Space,
    durable: Space,
    changes: Vec<NameChange>,
    next_inode: u64,
}

impl Disk {
    pub(super) fn lookup(&self, path: &Path) -> Option<u64> {
        self.current.files.get(path).copied().or_else(|| self.is_dir(path).then_some(0))
    }

    pub(super) fn is_dir(&self, path: &Path) -> bool {
        path.parent().is_none() || self.current.dirs.contains(path)
    }

    /// Whether a file still has a name.
    pub(super) fn is_named(&self, inode: u64) -> bool {
        self.current.files.values().any(|other| *other == inode)
    }

    pub(super) fn files(&self) -> Vec<(PathBuf, u64)> {
        let len = |inode| self.inodes.get(inode).map_or(0, |file| file.current().len() as u64);
        self.current.files.iter().map(|(path, inode)| (path.clone(), len(inode))).collect()
    }

    fn change(&mut self, change: NameChange) {
        self.current.apply(&change);
        self.changes.push(change);
    }

    pub(super) fn create(&mut self, path: &Path) -> io::Result<u64> {
        if !self.current.has_parent(path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        self.next_inode += 1;
        let inode = self.next_inode;
        self.inodes.insert(inode, Inode::default());
        self.change(NameChange::Add { path: path.to_owned(), inode, dir: false });
        Ok(inode)
    }

    pub(super) fn create_dir(&mut self, path: &Path) -> io::Result<()> {
        if !self.current.has_parent(path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        self.change(NameChange::Add { path: path.to_owned(), inode: 0, dir: true });
        Ok(())
    }

    pub(super) fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        if self.lookup(from).is_none() {
            return Err(io::ErrorKind::NotFound.into());
        }
        if self.is_dir(to) && !self.names_in(to)?.is_empty() {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        self.change(NameChange::Rename { from: from.to_owned(), to: to.to_owned() });
        Ok(())
    }

    pub(super) fn remove(&mut self, path: &Path) -> io::Result<()> {
        if !self.current.files.contains_key(path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        self.change(NameChange::Remove { path: path.to_owned() });
        Ok(())
    }

    pub(super) fn names_in(&self, dir: &Path) -> io::Result<Vec<String>> {
        if !self.is_dir(dir) {
            return Err(match self.current.files.contains_key(dir) {
                true => io::ErrorKind::NotADirectory.into(),
                false => io::ErrorKind::NotFound.into(),
            });
        }
        let paths = self.current.files.keys().chain(&self.current.dirs);
        let inside = paths.filter(|path| path.parent() == Some(dir));
        let mut names: Vec<String> = inside
            .filter_map(|path| path.file_name())
            .map(|name| name.to_string_lossy().into_owned())
            .collect();
        names.sort();
        Ok(names)
    }

    pub(super) fn sync_dir(&mut self, dir: &Path) {
        // A directory that is synced can be found: its own name goes along, as in a journal.
        let taken = |change: &NameChange| {
            change.is_in(dir) || matches!(change, NameChange::Add { path, dir: true, .. } if path == dir)
        };
        let (synced, rest) = std::mem::take(&mut self.changes).into_iter().partition(taken);
        self.changes = rest;
        let synced: Vec<NameChange> = synced;
        synced.iter().for_each(|change| self.durable.apply(change));
        self.rename_unsynced(&synced);
    }

    /// Changes below a directory whose rename became durable follow it to its new name.
    fn rename_unsynced(&mut self, synced: &[NameChange]) {
        for change in synced {
            let NameChange::Rename { from, to } = change else { continue };
            for later in &mut self.changes {
                if let NameChange::Add { path, .. } | NameChange::Remove { path } = later
                    && let Ok(rest) = path.strip_prefix(from)
                {
                    *path = join(to, rest);
                }
            }
        }
    }

    /// Everything that a power cut may keep or lose, in the order in which it was asked for. Writes fall apart at
    /// multiples of `unit`; a part that changes nothing is none.
    pub(super) fn atoms(&self, unit: usize) -> Vec<Atom> {
        let mut atoms: Vec<Atom> = (0..self.changes.len()).map(Atom::Name).collect();
        for (id, file) in &self.inodes {
            for (nth, pending) in file.pending.iter().enumerate() {
                match pending {
                    Pending::Len(len)
                        if *len == file.durable.len()
                            && !file.pending[..nth].iter().any(|p| matches!(p, Pending::Len(_))) => {}
                    Pending::Len(_) => atoms.push(Atom::Len { inode: *id, nth }),
                    Pending::Write { offset, data, .. } => {
                        let rewrites = file.pending[..nth].iter().any(|p| p.touches(*offset, data.len()));
                        let mut from = *offset;
                        while from < offset + data.len() {
                            let to = (from / unit * unit + unit).min(offset + data.len());
                            // Over another pending write even the old bytes are a change.
                            if rewrites || !file.durable.holds(from, &data[from - offset..to - offset]) {
                                atoms.push(Atom::Part { inode: *id, nth, from, to });
                            }
                            from = to;
                        }
                    }
                }
            }
        }
        atoms
    }

    /// The disk after a power cut that keeps these and nothing else.
    pub(super) fn power_cut<'a>(&self, kept: impl Iterator<Item = &'a Atom>) -> Disk {
        let mut durable = self.durable.clone();
        let mut contents: BTreeMap<u64, Content> = BTreeMap::new();
        for atom in kept {
            match *atom {
                Atom::Name(nth) => durable.apply(&self.changes[nth]),
                Atom::Len { inode, nth } => {
                    let file = &self.inodes[&inode];
                    if let Pending::Len(len) = file.pending[nth] {
                        contents.entry(inode).or_insert_with(|| file.durable.clone()).resize(len);
                    }
                }
                Atom::Part { inode, nth, from, to } => {
                    let file = &self.inodes[&inode];
                    if let Pending::Write { offset, data, .. } = &file.pending[nth] {
                        let content = contents.entry(inode).or_insert_with(|| file.durable.clone());
                        overwrite(content, from, &data[from - offset..to - offset]);
                    }
                }
            }
        }
        let inodes = durable.files.values().map(|inode| {
            let content = contents.remove(inode).unwrap_or_else(|| self.inodes[inode].durable.clone());
            (*inode, Inode { durable: content.clone(), current: content, pending: Vec::new() })
        });
        let inodes = inodes.collect();
        Disk { inodes, current: durable.clone(), durable, changes: Vec::new(), next_inode: self.next_inode }
    }

    /// Keeps of what was not synced what chance leaves: of some files nearly all, of some nearly nothing.
    pub(super) fn crash(&mut self, rng: &mut Rng) {
        let mut percent: BTreeMap<u64, u64> = BTreeMap::new();
        let atoms = self.atoms(SECTOR);
        let kept = atoms.iter().filter(|atom| match atom {
            Atom::Name(_) => rng.below(2) == 0,
            Atom::Len { inode, .. } | Atom::Part { inode, .. } => {
                let percent =
                    *percent.entry(*inode).or_insert_with(|| [0, 10, 50, 90, 100][rng.below(5) as usize]);
                rng.below(100) < percent
            }
        });
        *self = self.power_cut(kept);
    }

    /// What an atom is, for people.
    pub(super) fn describe(&self, atom: &Atom) -> String {
        let name = |inode: &u64| {
            let paths = self.current.files.iter().find(|(_, other)| *other == inode);
            paths.map_or_else(|| format!("file {inode}"), |(path, _)| path.display().to_string())
        };
        match atom {
            Atom::Name(nth) => format!("{:?}", self.changes[*nth]),
            Atom::Len { inode, .. } => format!("length of {}", name(inode)),
            Atom::Part { inode, nth, from, to } => {
                let lost = matches!(self.inodes[inode].pending[*nth], Pending::Write { lost: true, .. });
                let after = if lost { " after a failed sync" } else { "" };
                format!("{} bytes {from}..{to}{after}", name(inode))
            }
        }
    }

    /// Disks with the same names and bytes, all durable, have the same.
    pub(super) fn fingerprint(&self) -> u64 {
        let mut hash = 0;
        for (path, inode) in &self.current.files {
            let name = path.as_os_str().as_encoded_bytes().iter();
            hash = name.fold(hash, |hash, byte| mix(hash ^ u64::from(*byte)));
            hash = mix(hash ^ self.inodes.get(inode).map_or(0, |file| file.current.hash()));
        }
        let dirs = self.current.dirs.iter().flat_map(|dir| dir.as_os_str().as_encoded_bytes());
        dirs.fold(hash, |hash, byte| mix(hash ^ u64::from(*byte)))
    }
}

impl Pending {
    fn touches(&self, from: usize, len: usize) -> bool {
        matches!(self, Pending::Write { offset, data, .. } if *offset < from + len && from < offset + data.len())
    }
}
