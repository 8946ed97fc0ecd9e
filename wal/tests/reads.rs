//! Reads that find nothing in memory: all of it is asked for before the first piece is waited for, or nobody waits.

use std::{
    collections::BTreeSet,
    io,
    path::Path,
    sync::{Arc, Mutex},
};

use pontoon_wal::{
    Batch, Entry, Error, Fs, GroupId, Options, Wal,
    fs::{File, FileOp, LockGuard, OpenMode, Ticket},
    sim::SimFs,
};

#[path = "support/lib.rs"]
mod support;

use support::{DIR, HandClock, options};

/// What was asked of segment files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    Now(u64),
    Ahead(u64),
    Read(u64),
}

/// A disk of which nothing is at hand until it was asked for.
#[derive(Clone)]
struct Cold {
    fs: SimFs,
    asked: Arc<Mutex<Vec<Asked>>>,
    at_hand: Arc<Mutex<BTreeSet<u64>>>,
}

struct ColdFile {
    file: Arc<dyn File>,
    disk: Cold,
}

impl Fs for Cold {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>> {
        Ok(Arc::new(ColdFile { file: self.fs.open(path, mode)?, disk: self.clone() }))
    }
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.fs.create_dir(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.fs.rename(from, to)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.fs.remove_file(path)
    }
    fn read_dir(&self, path: &Path) -> io::Result<Vec<String>> {
        self.fs.read_dir(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.fs.sync_dir(path)
    }
    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn LockGuard>>> {
        self.fs.lock(path)
    }
}

impl File for ColdFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.disk.asked.lock().unwrap().push(Asked::Read(offset));
        self.file.read_at(buf, offset)
    }
    fn read_now(&self, buf: &mut [u8], offset: u64) -> io::Result<bool> {
        self.disk.asked.lock().unwrap().push(Asked::Now(offset));
        match self.disk.at_hand.lock().unwrap().contains(&offset) {
            true => self.file.read_now(buf, offset),
            false => Ok(false),
        }
    }
    fn will_need(&self, offset: u64, _len: u64) {
        self.disk.asked.lock().unwrap().push(Asked::Ahead(offset));
        self.disk.at_hand.lock().unwrap().insert(offset);
    }
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }
    fn submit(&self, op: FileOp) -> Ticket {
        self.file.submit(op)
    }
}

fn append(group: u64, index: u64, bytes: usize) -> Batch {
    let mut batch = Batch::new();
    let data = vec![index as u8; bytes].into();
    batch.append(GroupId(group), &[Entry { index, term: 1, kind: 0, data }]);
    batch
}

/// Six entries of group 1, so far apart that no two are read together.
fn scattered() -> (Cold, Wal) {
    let disk = Cold { fs: SimFs::new(), asked: Arc::default(), at_hand: Arc::default() };
    let options = Options {
        fs: Arc::new(disk.clone()),
        segment_bytes: 1 << 20,
        ..options(&disk.fs, &Arc::new(HandClock::default()), 1)
    };
    let (wal, _) = Wal::open(options).unwrap();
    for index in 1..=6 {
        wal.commit(append(1, index, 100)).unwrap();
        wal.commit(append(2, index, 40_000)).unwrap();
    }
    disk.asked.lock().unwrap().clear();
    (disk, wal)
}

fn indices(entries: &[Entry]) -> Vec<u64> {
    entries.iter().map(|entry| entry.index).collect()
}

#[test]
fn everything_is_asked_for_before_the_first_piece_is_waited_for() {
    let (disk, wal) = scattered();
    let mut read = Vec::new();
    wal.entries(GroupId(1), 1..7, u64::MAX, &mut read).unwrap();
    assert_eq!(indices(&read), [1, 2, 3, 4, 5, 6]);
    let asked = disk.asked.lock().unwrap();
    let first_read = asked.iter().position(|asked| matches!(asked, Asked::Read(_))).unwrap();
    let ahead = |asked: &&Asked| matches!(asked, Asked::Ahead(_));
    assert_eq!(asked[..first_read].iter().filter(ahead).count(), 6, "{asked:?}");
    assert_eq!(asked.iter().filter(ahead).count(), 6, "once each");
    // One piece alone is simply read.
    drop(asked);
    disk.asked.lock().unwrap().clear();
    disk.at_hand.lock().unwrap().clear();
    wal.entries(GroupId(1), 3..4, u64::MAX, &mut read).unwrap();
    assert!(matches!(disk.asked.lock().unwrap()[..], [Asked::Read(_)]));
}

#[test]
fn a_read_that_must_not_wait_reads_all_or_nothing() {
    let (disk, wal) = scattered();
    let mut read = vec![Entry { index: 99, term: 0, kind: 0, data: "kept".into() }];
    assert!(!wal.entries_now(GroupId(1), 1..7, u64::MAX, &mut read).unwrap());
    assert_eq!(indices(&read), [99], "nothing of it");
    let waited = |disk: &Cold| disk.asked.lock().unwrap().iter().any(|asked| matches!(asked, Asked::Read(_)));
    assert!(!waited(&disk));
    // Asking had all of it fetched.
    assert!(wal.entries_now(GroupId(1), 1..7, u64::MAX, &mut read).unwrap());
    assert_eq!(indices(&read), [99, 1, 2, 3, 4, 5, 6]);
    assert!(!waited(&disk));
    let metrics = wal.metrics();
    assert_eq!((metrics.cache_hits, metrics.cache_misses, metrics.reads), (0, 12, 6));
}

#[test]
fn what_is_read_without_waiting_is_checked_too() {
    let (disk, wal) = scattered();
    assert!(!wal.entries_now(GroupId(1), 1..7, u64::MAX, &mut Vec::new()).unwrap());
    let offset = *disk.at_hand.lock().unwrap().iter().nth(3).unwrap();
    let (path, _) = disk.fs.files().into_iter().find(|(path, _)| is_used(&disk.fs, path)).unwrap();
    disk.fs.patch(&path, offset + 60, &[0xff]).unwrap();
    let refused = wal.entries_now(GroupId(1), 1..7, u64::MAX, &mut Vec::new()).unwrap_err();
    assert!(matches!(refused, Error::Corrupt { offset: at, .. } if at == offset), "{refused}");
    assert!(wal.group(GroupId(1)).unwrap().damaged.is_some());
    assert!(wal.entries(GroupId(2), 1..7, u64::MAX, &mut Vec::new()).is_ok());
}

/// Whether frames are in the file.
fn is_used(fs: &SimFs, path: &Path) -> bool {
    let mut magic = [0; 4];
    path.starts_with(DIR) && fs.peek(path, 0, &mut magic) == Some(4) && &magic == b"PNTN" && {
        path.extension().is_some_and(|extension| extension == "wal")
    }
}

#[test]
fn a_read_that_nobody_waits_for_is_told_by_a_step() {
    let (_, wal) = scattered();
    let told: Arc<Mutex<Vec<_>>> = Arc::default();
    let ask = |range| {
        let told = told.clone();
        wal.entries_async(GroupId(1), range, u64::MAX, move |read| {
            told.lock().unwrap().push(read.map(|read| indices(&read)).map_err(|error| error.to_string()));
        })
    };
    ask(2..5).unwrap();
    ask(2..9).unwrap();
    assert_eq!(told.lock().unwrap().len(), 0);
    while wal.step() {}
    assert_eq!(*told.lock().unwrap(), [Ok(vec![2, 3, 4]), Err("entries above index 6 do not exist".into())]);
    // What waits at a close is still told; afterwards nothing is taken.
    ask(6..7).unwrap();
    let door = wal.clone();
    wal.close().unwrap();
    assert_eq!(told.lock().unwrap().len(), 3);
    assert!(matches!(door.entries_async(GroupId(1), 1..2, 1, |_| ()), Err(Error::Closed)));
}
