//! The files of the audit log: lines are appended and synced; a full file gives way to a new one, and the oldest goes.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use super::AuditEntry;

const NAME: &str = "audit.log";
/// A file is full at this size.
const FILE_BYTES: u64 = 8 << 20;
/// How many full files are kept beside the one that is written.
const FULL_FILES: u32 = 8;

/// What keeps the audit log from being written or read.
#[derive(Debug, thiserror::Error)]
#[error("the audit log {} cannot be {what}: {source}; free space or mend its permissions", path.display())]
pub struct AuditError {
    path: PathBuf,
    what: &'static str,
    source: io::Error,
}

/// The writing end.
#[derive(Debug)]
pub(super) struct Trail {
    dir: PathBuf,
    /// `None`: to be opened by the next line.
    file: Option<File>,
    size: u64,
    /// The number of the last line.
    seq: u64,
    full_at: u64,
}

impl Trail {
    /// The end of the log in a directory, and what keeps it from being written.
    pub(super) fn open(dir: &Path) -> (Trail, Option<AuditError>) {
        let mut trail = Trail { dir: dir.to_owned(), file: None, size: 0, seq: 0, full_at: FILE_BYTES };
        let problem = trail.reopen().err();
        (trail, problem)
    }

    /// Appends a line under the next number and makes it durable.
    pub(super) fn append(&mut self, mut entry: AuditEntry) -> Result<(), AuditError> {
        if self.file.is_none() {
            self.reopen()?;
        }
        entry.seq = self.seq + 1;
        let mut line = serde_json::to_vec(&entry).map_err(|error| self.failed("written", error.into()))?;
        line.push(b'\n');
        if self.size > 0 && self.size + line.len() as u64 > self.full_at {
            self.rotate()?;
        }
        let Some(file) = &mut self.file else { return Ok(()) };
        if let Err(error) = file.write_all(&line).and_then(|()| file.sync_data()) {
            // What of the line is there is not known: the next one begins on a line of its own.
            self.file = None;
            return Err(self.failed("written", error));
        }
        self.size += line.len() as u64;
        self.seq = entry.seq;
        Ok(())
    }

    fn failed(&self, what: &'static str, source: io::Error) -> AuditError {
        AuditError { path: self.dir.join(NAME), what, source }
    }

    fn reopen(&mut self) -> Result<(), AuditError> {
        let last = read(&self.dir, 0, 1)?.pop();
        self.seq = self.seq.max(last.map_or(0, |entry| entry.seq));
        let open = || -> io::Result<(File, u64)> {
            let mut file =
                File::options().read(true).append(true).create(true).mode(0o600).open(self.dir.join(NAME))?;
            let size = file.metadata()?.len();
            let mut end = [b'\n'];
            if size > 0 {
                file.seek(SeekFrom::Start(size - 1))?;
                file.read_exact(&mut end)?;
            }
            // A crash left half a line.
            if end != [b'\n'] {
                file.write_all(b"\n")?;
            }
            sync_dir(&self.dir)?;
            Ok((file, size + 1))
        };
        let (file, size) = open().map_err(|error| self.failed("written", error))?;
        (self.file, self.size) = (Some(file), size);
        Ok(())
    }

    /// Makes room for a new file. A crash on the way leaves a number out, which nobody minds.
    fn rotate(&mut self) -> Result<(), AuditError> {
        self.file = None;
        let rotated = (0..FULL_FILES).rev().try_for_each(|number| {
            match fs::rename(path_of(&self.dir, number), path_of(&self.dir, number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            }
        });
        rotated.map_err(|error| self.failed("rotated", error))?;
        self.reopen()
    }
}

/// The number 0 is written, 1 is the latest full one.
fn path_of(dir: &Path, number: u32) -> PathBuf {
    match number {
        0 => dir.join(NAME),
        number => dir.join(format!("{NAME}.{number}")),
    }
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// The latest lines of the audit log in a data directory with numbers above `after`, at most `limit`, the oldest first. Lines
/// that a crash left half written are passed over. May be called while a node writes.
///
/// # Errors
/// If a file is there and cannot be read.
pub fn read(dir: &Path, after: u64, limit: usize) -> Result<Vec<AuditEntry>, AuditError> {
    let mut newest_first = Vec::new();
    for number in 0..=FULL_FILES {
        let path = path_of(dir, number);
        let failed = |source| AuditError { path: path.clone(), what: "read", source };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(error)),
        };
        let mut here = Vec::new();
        for line in BufReader::new(file).split(b'\n') {
            let line = line.map_err(failed)?;
            here.extend(serde_json::from_slice::<AuditEntry>(&line).ok());
        }
        let reaches = here.first().is_some_and(|first| first.seq <= after);
        newest_first.extend(here.into_iter().rev().filter(|entry| entry.seq > after));
        if reaches || newest_first.len() >= limit {
            break;
        }
    }
    newest_first.truncate(limit);
    newest_first.reverse();
    // A file that was rotated between two looks was read twice.
    newest_first.dedup_by_key(|entry| entry.seq);
    Ok(newest_first)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(what: &str) -> AuditEntry {
        AuditEntry {
            seq: 0,
            when: "2026-01-01T00:00:00Z".to_owned(),
            node: 1,
            who: "local".to_owned(),
            from: "-".to_owned(),
            what: what.to_owned(),
            facts: Default::default(),
            result: "done".to_owned(),
            reason: String::new(),
            passed_on: false,
        }
    }

    fn numbers(dir: &Path, after: u64, limit: usize) -> Vec<u64> {
        read(dir, after, limit).unwrap().iter().map(|entry| entry.seq).collect()
    }

    #[test]
    fn lines_are_numbered_on_over_restarts_and_half_lines() {
        let dir = tempfile::tempdir().unwrap();
        for start in 1..=3 {
            let (mut trail, problem) = Trail::open(dir.path());
            assert!(problem.is_none());
            trail.append(entry("Join")).unwrap();
            assert_eq!(numbers(dir.path(), 0, 10), (1..=start).collect::<Vec<_>>());
            let mut file = File::options().append(true).open(dir.path().join(NAME)).unwrap();
            file.write_all(br#"{"seq":99,"when"#).unwrap();
        }
        assert_eq!(numbers(dir.path(), 1, 10), [2, 3]);
        assert_eq!(numbers(dir.path(), 0, 1), [3], "the latest");
    }

    #[test]
    fn the_log_is_bounded_and_keeps_the_latest() {
        let dir = tempfile::tempdir().unwrap();
        let (mut trail, _) = Trail::open(dir.path());
        trail.full_at = 1_000;
        for _ in 0..500 {
            trail.append(entry("MoveStart")).unwrap();
        }
        let sizes: Vec<u64> =
            fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).collect();
        assert_eq!(sizes.len(), FULL_FILES as usize + 1);
        assert!(sizes.iter().all(|&size| size <= 1_000), "{sizes:?}");
        let kept = numbers(dir.path(), 0, 1_000);
        assert_eq!(kept.last(), Some(&500));
        assert!(kept.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{kept:?}");
        assert_eq!(numbers(dir.path(), 498, 1_000), [499, 500]);
    }

    #[test]
    fn a_log_that_cannot_be_written_is_taken_up_when_it_can() {
        let dir = tempfile::tempdir().unwrap();
        // A directory in its place: also who may do everything cannot append to that.
        fs::create_dir(dir.path().join(NAME)).unwrap();
        let (mut trail, problem) = Trail::open(dir.path());
        assert!(problem.unwrap().to_string().contains("audit.log cannot be"));
        assert!(trail.append(entry("Drain")).is_err());
        fs::remove_dir(dir.path().join(NAME)).unwrap();
        trail.append(entry("Drain")).unwrap();
        assert_eq!(numbers(dir.path(), 0, 10), [1]);
    }
}
