//! A disk that keeps what it promised and nothing else: when power is cut, all that was not synced is undone.
//!
//! Everything is written to a directory of the machine at once, and what it takes to undo it is kept until a sync of the file,
//! or of the directory, makes it durable. A name (a file that is made, renamed or removed) is durable once its directory was
//! synced, as POSIX says and no more; what a file holds, once the file was.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs::{self, File, Metadata},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

/// The directory itself.
pub(super) const ROOT: u64 = 1;

/// What takes a change of a file back: what the bytes from these offsets on were, and how long the file was.
struct Undo {
    before: Vec<(u64, Vec<u8>)>,
    len: u64,
}

impl Undo {
    fn new(offset: u64, before: Vec<u8>, len: u64) -> Undo {
        Undo { before: vec![(offset, before)], len }
    }

    /// These bytes are durable now, whatever they were.
    fn spare(&mut self, from: u64, to: u64) {
        self.len = self.len.max(to);
        for (offset, bytes) in std::mem::take(&mut self.before) {
            let end = offset + bytes.len() as u64;
            let (left, right) = (from.clamp(offset, end) - offset, to.clamp(offset, end) - offset);
            let parts = [(offset, &bytes[..left as usize]), (offset + right, &bytes[right as usize..])];
            self.before.extend(
                parts.into_iter().filter(|(_, part)| !part.is_empty()).map(|(at, part)| (at, part.to_vec())),
            );
        }
    }
}

/// What takes a change of names back. Paths are those of that moment: whatever was renamed later is renamed back before.
enum NameUndo {
    Made {
        path: PathBuf,
    },
    /// It lies in the attic until nobody can want it back.
    Gone {
        path: PathBuf,
        attic: PathBuf,
    },
    Moved {
        from: PathBuf,
        to: PathBuf,
        over: Option<PathBuf>,
    },
}

/// A change of names, and the directories whose sync makes it durable.
struct Named {
    dirs: [u64; 2],
    undo: NameUndo,
}

fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

const NOT_FOUND: i32 = 2;
const BAD_FILE: i32 = 9;
const NO_SPACE: i32 = 28;
const NOT_EMPTY: i32 = 39;

#[derive(Default)]
struct Files {
    paths: HashMap<u64, PathBuf>,
    numbers: HashMap<PathBuf, u64>,
    last: u64,
    open: HashMap<u64, (u64, Arc<File>)>,
    undo: HashMap<u64, Vec<Undo>>,
    names: Vec<Named>,
    in_attic: u64,
}

impl Files {
    fn path(&self, number: u64) -> io::Result<PathBuf> {
        self.paths.get(&number).cloned().ok_or_else(|| errno(NOT_FOUND))
    }

    fn number(&mut self, path: &Path) -> u64 {
        if let Some(known) = self.numbers.get(path) {
            return *known;
        }
        self.last += 1;
        self.paths.insert(self.last, path.to_owned());
        self.numbers.insert(path.to_owned(), self.last);
        self.last
    }

    /// Whatever was at a path, and below it, is at another from now on.
    fn moved(&mut self, from: &Path, to: &Path) {
        let below: Vec<(u64, PathBuf)> = self
            .numbers
            .iter()
            .filter(|(path, _)| path.starts_with(from))
            .map(|(path, number)| (*number, path.clone()))
            .collect();
        for (number, old) in below {
            self.numbers.remove(&old);
            let rest = old.strip_prefix(from).unwrap_or(Path::new(""));
            let new = if rest.as_os_str().is_empty() { to.to_owned() } else { to.join(rest) };
            self.numbers.insert(new.clone(), number);
            self.paths.insert(number, new);
        }
    }
}

/// A disk, as its mount and whoever hurts it see it.
pub struct Disk {
    backing: PathBuf,
    attic: PathBuf,
    files: Mutex<Files>,
    stalled: Mutex<bool>,
    goes_on: Condvar,
    full: AtomicBool,
    undone: AtomicU64,
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Disk {
    /// A disk in an empty directory.
    ///
    /// # Errors
    /// If the directory cannot be written to.
    pub fn new(dir: &Path) -> io::Result<Disk> {
        let (backing, attic) = (dir.join("backing"), dir.join("attic"));
        fs::create_dir_all(&backing)?;
        fs::create_dir_all(&attic)?;
        let mut files = Files { last: ROOT, ..Files::default() };
        files.paths.insert(ROOT, backing.clone());
        files.numbers.insert(backing.clone(), ROOT);
        Ok(Disk {
            backing,
            attic,
            files: Mutex::new(files),
            stalled: Mutex::new(false),
            goes_on: Condvar::new(),
            full: AtomicBool::new(false),
            undone: AtomicU64::new(0),
        })
    }

    /// From now on nothing is completed, or all that waits is.
    pub fn stall(&self, stalled: bool) {
        *held(&self.stalled) = stalled;
        self.goes_on.notify_all();
    }

    /// From now on nothing grows any more, or it does again.
    pub fn fill(&self, full: bool) {
        self.full.store(full, Ordering::Relaxed);
    }

    /// Undoes everything that was not synced. Nobody may have a file open: whoever had is dead.
    ///
    /// # Errors
    /// Of the machine's disk.
    pub fn cut_power(&self) -> io::Result<()> {
        let mut files = held(&self.files);
        for (number, undo) in std::mem::take(&mut files.undo) {
            let Ok(path) = files.path(number) else { continue };
            let file = File::options().write(true).open(path)?;
            for Undo { before, len } in undo.into_iter().rev() {
                for (offset, bytes) in before {
                    file.write_all_at(&bytes, offset)?;
                }
                file.set_len(len)?;
                self.undone.fetch_add(1, Ordering::Relaxed);
            }
        }
        for name in std::mem::take(&mut files.names).into_iter().rev() {
            self.undone.fetch_add(1, Ordering::Relaxed);
            match name.undo {
                // Its directory has another name for good.
                NameUndo::Made { path } if !path.exists() => {}
                NameUndo::Made { path } if path.is_dir() => fs::remove_dir_all(&path)?,
                NameUndo::Made { path } => fs::remove_file(&path)?,
                NameUndo::Gone { path, attic } => fs::rename(&attic, &path)?,
                NameUndo::Moved { from, to, over } => {
                    fs::rename(&to, &from)?;
                    if let Some(attic) = over {
                        fs::rename(&attic, &to)?;
                    }
                }
            }
        }
        // Numbers are never used again: whoever knows one from before finds nothing.
        let last = files.last;
        *files = Files { last, ..Files::default() };
        files.paths.insert(ROOT, self.backing.clone());
        files.numbers.insert(self.backing.clone(), ROOT);
        Ok(())
    }

    /// Writes and names that were undone so far.
    pub fn undone(&self) -> u64 {
        self.undone.load(Ordering::Relaxed)
    }

    pub(super) fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    /// Returns when nothing holds the disk up.
    pub(super) fn wait(&self) {
        let stalled = held(&self.stalled);
        drop(self.goes_on.wait_while(stalled, |stalled| *stalled).unwrap_or_else(PoisonError::into_inner));
    }

    fn room(&self) -> io::Result<()> {
        if self.is_full() { Err(errno(NO_SPACE)) } else { Ok(()) }
    }

    pub(super) fn find(&self, parent: u64, name: &OsStr) -> io::Result<(u64, Metadata)> {
        let mut files = held(&self.files);
        let path = files.path(parent)?.join(name);
        let about = fs::symlink_metadata(&path)?;
        Ok((files.number(&path), about))
    }

    pub(super) fn about(&self, number: u64) -> io::Result<Metadata> {
        fs::symlink_metadata(held(&self.files).path(number)?)
    }

    pub(super) fn list(&self, number: u64) -> io::Result<Vec<(u64, fs::FileType, std::ffi::OsString)>> {
        let mut files = held(&self.files);
        let mut all = Vec::new();
        for entry in fs::read_dir(files.path(number)?)? {
            let entry = entry?;
            all.push((files.number(&entry.path()), entry.file_type()?, entry.file_name()));
        }
        Ok(all)
    }

    pub(super) fn make_dir(&self, parent: u64, name: &OsStr) -> io::Result<(u64, Metadata)> {
        self.room()?;
        let mut files = held(&self.files);
        let path = files.path(parent)?.join(name);
        fs::create_dir(&path)?;
        files.names.push(Named { dirs: [parent; 2], undo: NameUndo::Made { path: path.clone() } });
        Ok((files.number(&path), fs::symlink_metadata(&path)?))
    }

    pub(super) fn make_file(&self, parent: u64, name: &OsStr) -> io::Result<(u64, Metadata, u64)> {
        let mut files = held(&self.files);
        let path = files.path(parent)?.join(name);
        let is_new = !path.exists();
        if is_new {
            self.room()?;
        }
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&path)?;
        if is_new {
            files.names.push(Named { dirs: [parent; 2], undo: NameUndo::Made { path: path.clone() } });
        }
        let number = files.number(&path);
        files.last += 1;
        let handle = files.last;
        files.open.insert(handle, (number, Arc::new(file)));
        Ok((number, fs::symlink_metadata(&path)?, handle))
    }

    pub(super) fn open(&self, number: u64) -> io::Result<u64> {
        let mut files = held(&self.files);
        let file = File::options().read(true).write(true).open(files.path(number)?)?;
        files.last += 1;
        let handle = files.last;
        files.open.insert(handle, (number, Arc::new(file)));
        Ok(handle)
    }

    pub(super) fn close(&self, handle: u64) {
        held(&self.files).open.remove(&handle);
    }

    pub(super) fn read(&self, handle: u64, offset: u64, size: usize) -> io::Result<Vec<u8>> {
        let (_, file) = self.opened(handle)?;
        read_up_to(&file, offset, size)
    }

    /// Writes; `durable`: as one writes to a file that was opened with `O_DSYNC`.
    pub(super) fn write(&self, handle: u64, offset: u64, data: &[u8], durable: bool) -> io::Result<()> {
        let (number, file) = self.opened(handle)?;
        let mut files = held(&self.files);
        let len = file.metadata()?.len();
        if offset + data.len() as u64 > len {
            self.room()?;
        }
        if durable {
            file.write_all_at(data, offset)?;
            let earlier = files.undo.entry(number).or_default();
            earlier.iter_mut().for_each(|undo| undo.spare(offset, offset + data.len() as u64));
            return Ok(());
        }
        let before = read_up_to(&file, offset, data.len())?;
        file.write_all_at(data, offset)?;
        files.undo.entry(number).or_default().push(Undo::new(offset, before, len));
        Ok(())
    }

    pub(super) fn set_len(&self, number: u64, new: u64) -> io::Result<()> {
        let mut files = held(&self.files);
        let file = File::options().read(true).write(true).open(files.path(number)?)?;
        let len = file.metadata()?.len();
        if new > len {
            self.room()?;
        }
        let before = read_up_to(&file, new, len.saturating_sub(new) as usize)?;
        file.set_len(new)?;
        files.undo.entry(number).or_default().push(Undo::new(new, before, len));
        Ok(())
    }

    pub(super) fn remove(&self, parent: u64, name: &OsStr) -> io::Result<()> {
        let mut files = held(&self.files);
        let path = files.path(parent)?.join(name);
        if fs::symlink_metadata(&path)?.is_dir() && fs::read_dir(&path)?.next().is_some() {
            return Err(errno(NOT_EMPTY));
        }
        let attic = self.away(&mut files, &path)?;
        files.names.push(Named { dirs: [parent; 2], undo: NameUndo::Gone { path, attic } });
        Ok(())
    }

    pub(super) fn rename(&self, from: (u64, &OsStr), to: (u64, &OsStr)) -> io::Result<()> {
        let mut files = held(&self.files);
        let dirs = [from.0, to.0];
        let (from, to) = (files.path(from.0)?.join(from.1), files.path(to.0)?.join(to.1));
        fs::symlink_metadata(&from)?;
        let over = if to.exists() { Some(self.away(&mut files, &to)?) } else { None };
        fs::rename(&from, &to)?;
        files.moved(&from, &to);
        files.names.push(Named { dirs, undo: NameUndo::Moved { from, to, over } });
        Ok(())
    }

    /// What a file holds is durable.
    pub(super) fn sync(&self, number: u64) {
        held(&self.files).undo.remove(&number);
    }

    /// The names in a directory are durable.
    pub(super) fn sync_dir(&self, number: u64) -> io::Result<()> {
        let mut files = held(&self.files);
        let (durable, rest): (Vec<_>, Vec<_>) =
            std::mem::take(&mut files.names).into_iter().partition(|name| name.dirs.contains(&number));
        files.names = rest;
        for Named { undo, .. } in durable {
            if let NameUndo::Gone { attic, .. } | NameUndo::Moved { over: Some(attic), .. } = undo {
                if let Some(number) = files.numbers.remove(&attic) {
                    files.paths.remove(&number);
                    files.undo.remove(&number);
                }
                if attic.is_dir() { fs::remove_dir_all(attic)? } else { fs::remove_file(attic)? }
            }
        }
        Ok(())
    }

    /// Puts something where nobody looks, so that it can be brought back.
    fn away(&self, files: &mut Files, path: &Path) -> io::Result<PathBuf> {
        files.in_attic += 1;
        let attic = self.attic.join(format!("{}-{}", files.last, files.in_attic));
        fs::rename(path, &attic)?;
        files.moved(path, &attic);
        Ok(attic)
    }

    fn opened(&self, handle: u64) -> io::Result<(u64, Arc<File>)> {
        let files = held(&self.files);
        files.open.get(&handle).cloned().ok_or_else(|| errno(BAD_FILE))
    }
}

fn read_up_to(file: &File, offset: u64, size: usize) -> io::Result<Vec<u8>> {
    let mut data = vec![0; size];
    let mut at = 0;
    while at < size {
        match file.read_at(&mut data[at..], offset + at as u64)? {
            0 => break,
            more => at += more,
        }
    }
    data.truncate(at);
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(disk: &Disk, name: &str) -> Option<Vec<u8>> {
        let (number, about) = disk.find(ROOT, OsStr::new(name)).ok()?;
        let handle = disk.open(number).unwrap();
        let all = disk.read(handle, 0, about.len() as usize).unwrap();
        disk.close(handle);
        Some(all)
    }

    fn write(disk: &Disk, name: &str, offset: u64, data: &[u8]) -> u64 {
        let (number, _, handle) = disk.make_file(ROOT, OsStr::new(name)).unwrap();
        disk.write(handle, offset, data, false).unwrap();
        disk.close(handle);
        number
    }

    #[test]
    fn a_power_cut_takes_back_what_was_not_synced_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::new(dir.path()).unwrap();
        let number = write(&disk, "a", 0, b"kept data");
        disk.sync(number);
        disk.sync_dir(ROOT).unwrap();
        write(&disk, "a", 5, b"gone and longer");
        write(&disk, "b", 0, b"never synced");
        disk.cut_power().unwrap();
        assert_eq!((read(&disk, "a").unwrap(), read(&disk, "b")), (b"kept data".to_vec(), None));
        assert_eq!(disk.undone(), 3);
    }

    #[test]
    fn what_was_written_durably_stays_whatever_was_written_around_it() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::new(dir.path()).unwrap();
        let (number, _, handle) = disk.make_file(ROOT, OsStr::new("a")).unwrap();
        disk.write(handle, 0, b"0123456789", false).unwrap();
        disk.sync(number);
        disk.sync_dir(ROOT).unwrap();
        disk.write(handle, 0, b"abcdefghijklmn", false).unwrap();
        disk.write(handle, 3, b"DUR", true).unwrap();
        disk.write(handle, 2, b"xxx", false).unwrap();
        disk.cut_power().unwrap();
        assert_eq!(read(&disk, "a").unwrap(), b"012DUR6789");
        let (_, _, handle) = disk.make_file(ROOT, OsStr::new("a")).unwrap();
        disk.write(handle, 10, b"zeros", false).unwrap();
        disk.write(handle, 12, b"R", true).unwrap();
        disk.cut_power().unwrap();
        assert_eq!(read(&disk, "a").unwrap(), b"012DUR6789zeR", "a longer file is part of it");
    }

    #[test]
    fn a_name_is_durable_with_its_directory_only() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::new(dir.path()).unwrap();
        for (name, data) in [("old", b"old"), ("new", b"new")] {
            disk.sync(write(&disk, name, 0, data));
        }
        disk.sync_dir(ROOT).unwrap();
        let rename = || disk.rename((ROOT, OsStr::new("new")), (ROOT, OsStr::new("old"))).unwrap();
        rename();
        assert_eq!((read(&disk, "old").unwrap(), read(&disk, "new")), (b"new".to_vec(), None));
        disk.cut_power().unwrap();
        assert_eq!(
            (read(&disk, "old").unwrap(), read(&disk, "new").unwrap()),
            (b"old".to_vec(), b"new".to_vec())
        );
        disk.remove(ROOT, OsStr::new("old")).unwrap();
        disk.cut_power().unwrap();
        assert_eq!(read(&disk, "old").unwrap(), b"old");
        rename();
        disk.sync_dir(ROOT).unwrap();
        disk.cut_power().unwrap();
        assert_eq!((read(&disk, "old").unwrap(), read(&disk, "new")), (b"new".to_vec(), None));
    }

    #[test]
    fn a_full_disk_takes_nothing_more_and_keeps_what_it_has() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::new(dir.path()).unwrap();
        write(&disk, "a", 0, b"data");
        disk.fill(true);
        let (_, _, handle) = disk.make_file(ROOT, OsStr::new("a")).unwrap();
        assert_eq!(disk.write(handle, 2, b"more", false).unwrap_err().kind(), io::ErrorKind::StorageFull);
        disk.write(handle, 0, b"same", false).unwrap();
        assert_eq!(read(&disk, "a").unwrap(), b"same");
        disk.fill(false);
        disk.write(handle, 2, b"more", false).unwrap();
    }
}
