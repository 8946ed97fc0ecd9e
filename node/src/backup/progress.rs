//! The progress file of a restore: which groups it made, and how far each is.
//!
//! It is replaced by a rename, so that a kill leaves the old or the new one. It may lie behind what was acknowledged, never before.

use std::{collections::BTreeMap, fs, io, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{
    directory::{io_at, new_file, parent, sync_dir},
    error::BackupError,
};

const FORMAT: u32 = 1;
/// How often the progress file is replaced.
const SAVE_EVERY: Duration = Duration::from_millis(500);

/// The progress file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Progress {
    format: u32,
    cluster: String,
    backup: String,
    /// By names in the cluster.
    predicates: BTreeMap<String, Place>,
}

/// How far a predicate is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Place {
    pub(super) group: u64,
    /// All chunks before this one are acknowledged.
    pub(super) chunks: usize,
    /// The group whose place it is to take; 0: none.
    #[serde(default)]
    pub(super) replaces: u64,
}

#[derive(Debug)]
pub(super) struct Notes {
    path: PathBuf,
    progress: Progress,
    saved: Instant,
    /// Bytes of rows that this run has written.
    pub(super) written: u64,
}

impl Notes {
    /// Reads what an earlier run left; whether there was something.
    pub(super) fn open(path: PathBuf, cluster: String, backup: String) -> Result<(Notes, bool), BackupError> {
        let fresh = Progress { format: FORMAT, cluster, backup, predicates: BTreeMap::new() };
        let found = match fs::read(&path) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(io_at(&path)(error)),
        };
        let refused = |why: &str| BackupError::Refused {
            reason: format!(
                "{} is the progress of another restore ({why}); finish that one, or remove the file and drop what it restored",
                path.display()
            ),
        };
        let resumed = found.is_some();
        let progress = match found {
            None => fresh,
            Some(text) => {
                let found: Progress =
                    serde_json::from_slice(&text).map_err(|_| refused("it is not legible"))?;
                if found.format != FORMAT {
                    return Err(refused("of another version"));
                }
                if found.cluster != fresh.cluster {
                    return Err(refused(&format!("into the cluster {}", found.cluster)));
                }
                if found.backup != fresh.backup {
                    return Err(refused(&format!("of the backup {}", found.backup)));
                }
                found
            }
        };
        Ok((Notes { path, progress, saved: Instant::now(), written: 0 }, resumed))
    }

    /// Durable on return.
    fn save(&mut self) -> Result<(), BackupError> {
        let mut beside = self.path.clone().into_os_string();
        beside.push(".new");
        let beside = PathBuf::from(beside);
        let text = serde_json::to_vec(&self.progress).expect("numbers and words");
        let mut file = new_file(&beside)?;
        io::Write::write_all(&mut file, &text).and_then(|()| file.sync_all()).map_err(io_at(&beside))?;
        fs::rename(&beside, &self.path).map_err(io_at(&self.path))?;
        self.saved = Instant::now();
        sync_dir(parent(&self.path))
    }

    /// How far a predicate is, if this restore made it.
    pub(super) fn place(&self, name: &str) -> Option<Place> {
        self.progress.predicates.get(name).copied()
    }

    /// All before this place is acknowledged. Kept at once if `now`, else every now and then. Returns where it was before.
    pub(super) fn note(&mut self, name: &str, place: Place, now: bool) -> Result<Option<Place>, BackupError> {
        let before = self.progress.predicates.insert(name.to_owned(), place);
        if now || self.saved.elapsed() >= SAVE_EVERY {
            self.save()?;
        }
        Ok(before)
    }

    /// The restore is done.
    pub(super) fn remove(&self) -> Result<(), BackupError> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_at(&self.path)(error)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_of_another_restore_is_left_alone() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("state");
        let open = |cluster: &str, backup: &str| Notes::open(path.clone(), cluster.into(), backup.into());
        let (mut notes, resumed) = open("c", "b").unwrap();
        assert!(!resumed);
        notes.note("p", Place { group: 7, chunks: 3, replaces: 0 }, true).unwrap();
        let (found, resumed) = open("c", "b").unwrap();
        assert!(resumed && found.place("p") == Some(Place { group: 7, chunks: 3, replaces: 0 }));
        assert!(open("other", "b").unwrap_err().to_string().contains("into the cluster c"));
        assert!(open("c", "other").unwrap_err().to_string().contains("of the backup b"));
        fs::write(&path, "{").unwrap();
        assert!(open("c", "b").is_err());
    }
}
