//! What lies on the simulated disk: contents and names, durable and not.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
};

use crate::rng::Rng;

/// What reaches the disk as one.
const SECTOR: usize = 512;

/// A file's content.
#[derive(Debug, Clone, Default)]
pub(super) struct Inode {
    /// What survives any crash.
    pub(super) durable: Vec<u8>,
    /// What readers see.
    pub(super) current: Vec<u8>,
    /// Sectors that differ or may differ, in no order.
    unsynced: BTreeSet<usize>,
}

impl Inode {
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        let (start, end) = (offset as usize, offset as usize + data.len());
        if self.current.len() < end {
            self.current.resize(end, 0);
        }
        self.current[start..end].copy_from_slice(data);
        self.unsynced.extend(start / SECTOR..end.div_ceil(SECTOR));
    }

    pub(super) fn set_len(&mut self, len: u64) {
        let old = self.current.len();
        self.current.resize(len as usize, 0);
        if len as usize > old {
            self.unsynced.extend(old / SECTOR..(len as usize).div_ceil(SECTOR));
        }
    }

    pub(super) fn sync(&mut self) {
        // A sector that a failed sync gave up is clean for the system and stays lost.
        self.durable.resize(self.current.len(), 0);
        for sector in std::mem::take(&mut self.unsynced) {
            self.keep(sector);
        }
    }

    /// Everything that is written counts as synced.
    pub(super) fn settle(&mut self) {
        self.durable.clone_from(&self.current);
        self.unsynced.clear();
    }

    /// A failed sync: what it should have saved counts as clean and is not on the disk.
    pub(super) fn forget_unsynced(&mut self) {
        self.unsynced.clear();
    }

    fn keep(&mut self, sector: usize) {
        let end = (sector * SECTOR + SECTOR).min(self.current.len()).min(self.durable.len());
        if let Some(start) = Some(sector * SECTOR).filter(|start| *start < end) {
            self.durable[start..end].copy_from_slice(&self.current[start..end]);
        }
    }

    fn crash(&mut self, rng: &mut Rng) {
        if !self.unsynced.is_empty() || self.current.len() != self.durable.len() {
            // The length is one fact; each sector is one. Some crashes keep nearly all, some nearly nothing.
            let keep_percent = [0, 10, 50, 90, 100][rng.below(5) as usize];
            if rng.below(100) < keep_percent || self.current.len() < self.durable.len() {
                self.durable.resize(self.current.len(), 0);
            }
            for sector in std::mem::take(&mut self.unsynced) {
                if rng.below(100) < keep_percent {
                    self.keep(sector);
                }
            }
        }
        self.current.clone_from(&self.durable);
    }
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

    pub(super) fn files(&self) -> Vec<(PathBuf, u64)> {
        let len = |inode| self.inodes.get(inode).map_or(0, |file| file.current.len() as u64);
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

    /// Keeps of what was not synced what chance leaves.
    pub(super) fn crash(&mut self, rng: &mut Rng) {
        self.inodes.values_mut().for_each(|inode| inode.crash(rng));
        for change in std::mem::take(&mut self.changes) {
            if rng.below(2) == 0 {
                self.durable.apply(&change);
            }
        }
        self.current = self.durable.clone();
        let named: BTreeSet<u64> = self.current.files.values().copied().collect();
        self.inodes.retain(|inode, _| named.contains(inode));
    }
}
