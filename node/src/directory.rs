//! The data directory: who lives here, and what was begun.
//!
//! ```text
//!  DIR/NODE      the marker: format, cluster, node, engine, and how far the first start came
//!  DIR/PEERS     where the other nodes listened when last heard, so that a restart needs nobody
//!  DIR/wal/      the shared log (elsewhere with --wal-dir)
//!  DIR/engine/   the engine's files
//! ```
//!
//! The marker is written under another name, synced and renamed, so it is whole or absent. Its `state` makes the first
//! start repeatable: a crash between "the cluster knows me" and "I know my id" repeats the join with the same nonce,
//! to which the meta group gives the same answer. The directory itself is locked by the log.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use pontoon_proto::{ClusterId, NodeId, v1};
use prost::Message;
use serde::{Deserialize, Serialize};

use crate::error::NodeError;

/// The newest format of the marker that this version reads and the one it writes.
const FORMAT: u32 = 1;
const MARKER: &str = "NODE";
const PEERS: &str = "PEERS";

/// How far the first start came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    /// The first node of a cluster; the meta group may or may not exist yet.
    Founding,
    /// Asks a cluster to take it in; may or may not have been registered.
    Joining,
    /// Knows its cluster and its id.
    Member,
}

/// The content of the marker file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Marker {
    pub(crate) format: u32,
    pub(crate) state: State,
    pub(crate) engine: String,
    /// Sixteen random bytes in hexadecimal, drawn once: the cluster's id of a founder, the nonce of a joiner.
    pub(crate) nonce: uuid::Uuid,
    pub(crate) cluster: Option<uuid::Uuid>,
    pub(crate) node: Option<u64>,
}

impl Marker {
    pub(crate) fn new(state: State, engine: String) -> Self {
        Marker { format: FORMAT, state, engine, nonce: uuid::Uuid::new_v4(), cluster: None, node: None }
    }

    /// The marker of a node that knows who it is.
    pub(crate) fn member(&self, cluster: ClusterId, node: NodeId) -> Self {
        Marker { state: State::Member, cluster: Some(cluster.0), node: Some(node.get()), ..self.clone() }
    }
}

/// An opened data directory.
#[derive(Debug)]
pub(crate) struct Directory {
    path: PathBuf,
}

impl Directory {
    /// Opens a directory and reads its marker; `None` if nothing was ever started here. A missing directory is made.
    pub(crate) fn open(path: &Path) -> Result<(Directory, Option<Marker>), NodeError> {
        let directory = Directory { path: path.to_owned() };
        match fs::read(path.join(MARKER)) {
            Ok(bytes) => Ok((directory, Some(parse(&path.join(MARKER), &bytes)?))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                directory.prepare_empty()?;
                Ok((directory, None))
            }
            Err(source) => Err(NodeError::Io { path: path.join(MARKER), source }),
        }
    }

    pub(crate) fn wal(&self) -> PathBuf {
        self.path.join("wal")
    }

    pub(crate) fn engine(&self) -> PathBuf {
        self.path.join("engine")
    }

    /// Replaces the marker; durable on return.
    pub(crate) fn write_marker(&self, marker: &Marker) -> Result<(), NodeError> {
        let mut text = serde_json::to_vec_pretty(marker).expect("a marker is plain data");
        text.push(b'\n');
        self.replace(MARKER, &text)
    }

    /// Keeps the nodes and the meta group's record for the next start. Best effort of the caller: a lost file costs
    /// only the time until a peer dials in.
    pub(crate) fn write_peers(&self, map: &v1::ClusterMap) -> Result<(), NodeError> {
        self.replace(PEERS, &map.encode_to_vec())
    }

    /// What [`Directory::write_peers`] kept; empty if there is nothing legible.
    pub(crate) fn read_peers(&self) -> v1::ClusterMap {
        fs::read(self.path.join(PEERS))
            .ok()
            .and_then(|bytes| v1::ClusterMap::decode(bytes.as_slice()).ok())
            .unwrap_or_default()
    }

    fn prepare_empty(&self) -> Result<(), NodeError> {
        let io = |source| NodeError::Io { path: self.path.clone(), source };
        fs::create_dir_all(&self.path).map_err(io)?;
        for entry in fs::read_dir(&self.path).map_err(io)? {
            let name = entry.map_err(io)?.file_name();
            // A marker that was being written when the very first start crashed.
            if name == "lost+found" || name == format!("{MARKER}.new").as_str() {
                continue;
            }
            let found = name.to_string_lossy().into_owned();
            return Err(NodeError::NotADataDirectory { path: self.path.clone(), found });
        }
        if let Some(parent) = self.path.parent() {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            sync_directory(parent)?;
        }
        Ok(())
    }

    fn replace(&self, name: &str, content: &[u8]) -> Result<(), NodeError> {
        let (temporary, path) = (self.path.join(format!("{name}.new")), self.path.join(name));
        let io = |source| NodeError::Io { path: path.clone(), source };
        let mut file = File::create(&temporary).map_err(io)?;
        file.write_all(content).map_err(io)?;
        file.sync_all().map_err(io)?;
        fs::rename(&temporary, &path).map_err(io)?;
        sync_directory(&self.path)
    }
}

fn sync_directory(path: &Path) -> Result<(), NodeError> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(|source| NodeError::Io { path: path.to_owned(), source })
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Marker, NodeError> {
    #[derive(Deserialize)]
    struct Versioned {
        format: u32,
    }
    let damaged = |source| NodeError::Marker { path: path.to_owned(), source };
    let Versioned { format } = serde_json::from_slice(bytes).map_err(damaged)?;
    if format != FORMAT {
        return Err(NodeError::UnknownFormat { path: path.to_owned(), found: format, known: FORMAT });
    }
    serde_json::from_slice(bytes).map_err(damaged)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_comes_back_as_written() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("deep").join("data");
        let (directory, none) = Directory::open(&path).unwrap();
        assert_eq!(none, None);
        let marker = Marker::new(State::Joining, "fjall".to_owned());
        directory.write_marker(&marker).unwrap();
        assert_eq!(Directory::open(&path).unwrap().1, Some(marker.clone()));

        let member = marker.member(ClusterId(uuid::Uuid::new_v4()), NodeId::new(7).unwrap());
        directory.write_marker(&member).unwrap();
        assert_eq!(Directory::open(&path).unwrap().1, Some(member));
    }

    #[test]
    fn a_newer_format_is_refused_by_name() {
        let scratch = tempfile::tempdir().unwrap();
        fs::write(scratch.path().join(MARKER), br#"{"format": 9, "surprise": true}"#).unwrap();
        let error = Directory::open(scratch.path()).unwrap_err();
        assert!(matches!(error, NodeError::UnknownFormat { found: 9, known: FORMAT, .. }), "{error}");
    }

    #[test]
    fn a_directory_of_somebody_else_is_left_alone() {
        let scratch = tempfile::tempdir().unwrap();
        fs::write(scratch.path().join("thesis.tex"), "important").unwrap();
        let error = Directory::open(scratch.path()).unwrap_err();
        assert!(error.to_string().contains("thesis.tex"), "{error}");
    }

    #[test]
    fn garbage_in_the_marker_is_an_error_with_the_path() {
        let scratch = tempfile::tempdir().unwrap();
        fs::write(scratch.path().join(MARKER), "{").unwrap();
        let error = Directory::open(scratch.path()).unwrap_err();
        assert!(error.to_string().contains(MARKER), "{error}");
    }
}
