//! Writes out early what an engine has written to its files.
//!
//! An engine fills a table or a journal in the system's cache and syncs it afterwards. Then tens of MiB go to the disk at once, in requests of
//! megabytes, and whoever else syncs meanwhile, above all the shared log, waits behind each of them. Here the system is told to begin as soon as
//! a few hundred KiB have come together. What is durable when does not change: the engine's own syncs decide that, and find less to do.
//! Best effort: where a file cannot be watched, everything is as it would be without.

#![expect(clippy::disallowed_methods, clippy::disallowed_types, reason = "the files are the engine's")]

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    mem::MaybeUninit,
    num::NonZeroU64,
    ops::Range,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use rustix::{
    fs::{
        Advice, fadvise, fstat,
        inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags},
    },
    io::Errno,
};

/// What comes together before it is written out: more delays others, less costs more requests.
const PIECE: u64 = 256 << 10;
/// After a look at what was written, for so long nothing is looked at: a writer at full speed would wake us with each of its writes.
const PAUSE: Duration = Duration::from_millis(4);

/// Watches directories, by a thread that ends when this is dropped.
pub(super) struct Early {
    inotify: Arc<OwnedFd>,
    watches: Vec<i32>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Early {
    /// Watches fjall's directory: journals, and the tables of the keyspaces that are there.
    pub(super) fn watch(data: &Path) -> io::Result<Early> {
        let mut dirs = vec![data.to_owned()];
        for keyspace in fs::read_dir(data.join("keyspaces"))? {
            dirs.push(keyspace?.path().join("tables"));
        }
        Early::watch_with(&dirs, |file, range| {
            // Said of dirty pages, this begins to write them. It gives up clean ones: those of before, of which a journal's are never read and
            // a table's are mostly not in the range.
            let length = NonZeroU64::new(range.end - range.start);
            let _ = fadvise(file, range.start, length, Advice::DontNeed);
        })
    }

    fn watch_with(
        dirs: &[PathBuf],
        mut out: impl FnMut(&File, Range<u64>) + Send + 'static,
    ) -> io::Result<Early> {
        let inotify = Arc::new(inotify::init(CreateFlags::CLOEXEC)?);
        let flags = WatchFlags::MODIFY | WatchFlags::CLOSE_WRITE | WatchFlags::DELETE | WatchFlags::ONLYDIR;
        let mut watched = HashMap::new();
        for dir in dirs {
            watched.insert(inotify::add_watch(&inotify, dir, flags)?, dir.clone());
        }
        let watches = watched.keys().copied().collect();
        let stop = Arc::new(AtomicBool::new(false));
        let (events, stopped) = (inotify.clone(), stop.clone());
        let run = move || {
            let mut files = Files { dirs: watched, open: HashMap::new() };
            let mut buffer = [MaybeUninit::uninit(); 4096];
            let mut reader = Reader::new(events.as_fd(), &mut buffer);
            loop {
                let event = match reader.next() {
                    Err(Errno::INTR) => continue,
                    Err(_) => return,
                    Ok(event) => event,
                };
                if event.events().contains(ReadFlags::QUEUE_OVERFLOW) {
                    // Some may have been closed or deleted: none is held open for nothing.
                    files.open.clear();
                }
                if event.events().contains(ReadFlags::IGNORED) {
                    files.dirs.remove(&event.wd());
                }
                if stopped.load(Ordering::Acquire) || files.dirs.is_empty() {
                    return;
                }
                if let Some(name) = event.file_name().and_then(|name| name.to_str().ok()) {
                    files.take(event.wd(), name, event.events());
                }
                if reader.is_buffer_empty() {
                    files.look(&mut out);
                    // Lets more come together; nothing is waited for.
                    thread::sleep(PAUSE);
                }
            }
        };
        let thread = thread::Builder::new().name("engine-early".to_owned()).spawn(run)?;
        Ok(Early { inotify, watches, stop, thread: Some(thread) })
    }
}

impl Drop for Early {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // The end of a watch is an event. If none is left to end, the thread has seen that all its directories are gone.
        for watch in &self.watches {
            let _ = inotify::remove_watch(&self.inotify, *watch);
        }
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// Files that are being written.
struct Files {
    dirs: HashMap<i32, PathBuf>,
    open: HashMap<(i32, String), Written>,
}

struct Written {
    file: File,
    progress: Progress,
    changed: bool,
}

impl Files {
    fn take(&mut self, watch: i32, name: &str, events: ReadFlags) {
        let key = (watch, name.to_owned());
        if events.intersects(ReadFlags::CLOSE_WRITE | ReadFlags::DELETE) {
            self.open.remove(&key);
            return;
        }
        if let Some(written) = self.open.get_mut(&key) {
            written.changed = true;
        } else if let Some(dir) = self.dirs.get(&watch)
            && let Ok(file) = File::open(dir.join(name))
            && let Some(size) = held(&file)
        {
            self.open.insert(key, Written { file, progress: Progress(size), changed: false });
        }
    }

    fn look(&mut self, out: &mut impl FnMut(&File, Range<u64>)) {
        for Written { file, progress, changed } in self.open.values_mut() {
            if std::mem::take(changed)
                && let Some(range) = held(file).and_then(|size| progress.to(size))
            {
                out(file, range);
            }
        }
    }
}

/// Bytes of a file for which there is room, on the disk or reserved for what is in the cache. A journal is as long from the beginning as it
/// will be: its length says nothing.
fn held(file: &File) -> Option<u64> {
    u64::try_from(fstat(file).ok()?.st_blocks).ok().map(|blocks| blocks * 512)
}

/// How far a file is written out, which is written from its beginning to its end.
struct Progress(u64);

impl Progress {
    /// It goes up to here now: what is to be written out.
    fn to(&mut self, size: u64) -> Option<Range<u64>> {
        let done = self.0;
        if size < done.saturating_add(PIECE) {
            return None;
        }
        self.0 = size;
        Some(done..size)
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, sync::mpsc};

    use super::*;

    #[test]
    fn what_is_written_is_told_in_pieces_while_the_file_is_open() {
        let scratch = tempfile::tempdir().unwrap();
        let (told, pieces) = mpsc::channel();
        let early =
            Early::watch_with(&[scratch.path().to_owned()], move |_, range| drop(told.send(range))).unwrap();
        let mut file = File::create(scratch.path().join("7")).unwrap();
        // As long from the beginning as a journal is.
        file.set_len(256 << 20).unwrap();
        let mut end = 0;
        for _ in 0..3 {
            // The first look at a file only notes how far it is; after that, a whole piece is told.
            let mut written = 0;
            let range: Range<u64> = loop {
                file.write_all(&[7; 64 << 10]).unwrap();
                written += 64 << 10;
                match pieces.recv_timeout(Duration::from_millis(20)) {
                    Ok(range) => break range,
                    Err(_) => assert!(written < 64 << 20, "64 MiB, and nothing is told"),
                }
            };
            assert!(range.start >= end && range.end - range.start >= PIECE, "{range:?} after {end}");
            end = range.end;
        }
        drop(early);
        assert!(pieces.iter().all(|range| range.start >= end), "and then the thread has ended");
    }

    #[test]
    fn it_ends_when_its_directory_is_gone() {
        let scratch = tempfile::tempdir().unwrap();
        fs::create_dir_all(scratch.path().join("keyspaces/1/tables")).unwrap();
        let early = Early::watch(scratch.path()).unwrap();
        let gone = scratch.path().to_owned();
        drop(scratch);
        drop(early);
        assert!(Early::watch(&gone).is_err());
    }

    #[test]
    fn less_than_a_piece_is_left_to_the_next_look() {
        let mut progress = Progress(4096);
        assert_eq!(progress.to(4096 + PIECE - 1), None);
        assert_eq!(progress.to(4096 + PIECE), Some(4096..4096 + PIECE));
        assert_eq!(progress.to(4096 + PIECE), None);
        assert_eq!(progress.to(0), None, "another file of this name");
    }
}
