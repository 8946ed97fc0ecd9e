//! The progress file: how far a load is acknowledged.
//!
//! It is replaced by a rename, so that a kill leaves the old or the new one. It may lie behind what was acknowledged,
//! never before: what is loaded again has the same rows.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::LoadError;

const FORMAT: u32 = 1;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Progress {
    pub(super) format: u32,
    /// The cluster that is loaded into.
    pub(super) cluster: String,
    /// The size of the file that is loaded.
    pub(super) file_bytes: u64,
    /// Everything before this offset of the (unpacked) text is acknowledged.
    pub(super) position: u64,
    /// The number of the last line before it.
    pub(super) line: u64,
    pub(super) triples: u64,
    /// Bad lines that were tolerated so far.
    pub(super) skipped: u64,
}

impl Progress {
    pub(super) fn new(cluster: String, file_bytes: u64) -> Self {
        Progress { format: FORMAT, cluster, file_bytes, position: 0, line: 0, triples: 0, skipped: 0 }
    }

    /// Reads the progress of an earlier run of this load, if there was one.
    pub(super) fn resume(self, path: &Path) -> Result<Self, LoadError> {
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(self),
            Err(source) => return Err(LoadError::Progress { path: path.to_owned(), source }),
        };
        let other = |reason: String| LoadError::OtherProgress { path: path.to_owned(), reason };
        let found: Progress =
            serde_json::from_slice(&text).map_err(|error| other(format!("it is not legible: {error}")))?;
        if found.format != FORMAT {
            return Err(other(format!("its format is {}, this version knows {FORMAT}", found.format)));
        }
        if found.cluster != self.cluster {
            return Err(other(format!("into the cluster {}, not {}", found.cluster, self.cluster)));
        }
        if found.file_bytes != self.file_bytes {
            return Err(other(format!("of a file of {} bytes, not {}", found.file_bytes, self.file_bytes)));
        }
        Ok(found)
    }

    pub(super) fn save(&self, path: &Path) -> Result<(), LoadError> {
        let failed = |source| LoadError::Progress { path: path.to_owned(), source };
        let mut beside = path.as_os_str().to_owned();
        beside.push(".new");
        let beside = PathBuf::from(beside);
        let text = serde_json::to_vec(self).expect("a struct of numbers and a string has a JSON form");
        fs::write(&beside, text).map_err(failed)?;
        fs::rename(&beside, path).map_err(failed)
    }

    pub(super) fn remove(path: &Path) -> Result<(), LoadError> {
        match fs::remove_file(path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(LoadError::Progress { path: path.to_owned(), source })
            }
            _ => Ok(()),
        }
    }
}
