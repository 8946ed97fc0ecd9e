//! The data directory: who lives here, and what was begun.
//!
//! ```text
//!  DIR/NODE      the marker: format, cluster, node, engine, and how far the first start came
//!  DIR/PEERS     where the other nodes listened when last heard, so that a restart needs nobody
//!  DIR/ENGINE    the engine to start with the next time, if it is to be another one
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
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use pontoon_proto::{ClusterId, NodeId, v1};
use pontoon_shard::EngineKind;
use prost::Message;
use serde::{Deserialize, Serialize};

use crate::error::NodeError;

/// The format of the marker. While the cluster is at version 1 the older one is written: an older binary may come back.
const FORMAT: u32 = 1;
/// The format from cluster version 2 on, which names the version.
const VERSIONED: u32 = 2;
const MARKER: &str = "NODE";
const PEERS: &str = "PEERS";
const WISH: &str = "ENGINE";

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
    /// The cluster version that the directory was last used at, from 2 on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) cluster_version: Option<u32>,
}

impl Marker {
    pub(crate) fn new(state: State, engine: String) -> Self {
        let nonce = uuid::Uuid::new_v4();
        Marker { format: FORMAT, state, engine, nonce, cluster: None, node: None, cluster_version: None }
    }

    /// The marker of a node that knows who it is.
    pub(crate) fn member(&self, cluster: ClusterId, node: NodeId) -> Self {
        Marker { state: State::Member, cluster: Some(cluster.0), node: Some(node.get()), ..self.clone() }
    }

    /// The cluster version that the directory was last used at.
    pub(crate) fn version(&self) -> u32 {
        self.cluster_version.unwrap_or(1)
    }

    /// The marker of a directory that is used at this cluster version. It never goes back.
    pub(crate) fn at_version(&self, version: u32) -> Self {
        match version > self.version() {
            true => Marker { format: VERSIONED, cluster_version: Some(version), ..self.clone() },
            false => self.clone(),
        }
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

    /// The engine to start with the next time; durable on return.
    pub(crate) fn write_wish(&self, wish: Option<EngineKind>) -> Result<(), NodeError> {
        match wish {
            Some(wish) => self.replace(WISH, format!("{wish}\n").as_bytes()),
            None => match fs::remove_file(self.path.join(WISH)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                Err(source) => Err(NodeError::Io { path: self.path.join(WISH), source }),
                Ok(()) => sync_directory(&self.path),
            },
        }
    }

    /// What [`Directory::write_wish`] kept; `None` if there is nothing legible.
    pub(crate) fn read_wish(&self) -> Option<EngineKind> {
        fs::read_to_string(self.path.join(WISH)).ok()?.trim().parse().ok()
    }

    /// Engines that were put aside for one of another kind.
    pub(crate) fn switched(&self) -> Result<Vec<PathBuf>, NodeError> {
        let io = |source| NodeError::Io { path: self.path.clone(), source };
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(io)? {
            let path = entry.map_err(io)?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("engine.switched-")) {
                found.push(path);
            }
        }
        Ok(found)
    }

    fn prepare_empty(&self) -> Result<(), NodeError> {
        let io = |source| NodeError::Io { path: self.path.clone(), source };
        // Rows lie here in the clear: what is made is its owner's alone.
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.path).map_err(io)?;
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
    if !(FORMAT..=VERSIONED).contains(&format) {
        return Err(NodeError::UnknownFormat { path: path.to_owned(), found: format, known: VERSIONED });
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
        assert_eq!(Directory::open(&path).unwrap().1, Some(member.clone()));

        let text = || fs::read_to_string(path.join(MARKER)).unwrap();
        directory.write_marker(&member.at_version(1)).unwrap();
        assert!(text().contains("\"format\": 1") && !text().contains("version"), "an older binary reads it");
        let later = member.at_version(2);
        directory.write_marker(&later).unwrap();
        assert!(text().contains("\"format\": 2"));
        assert_eq!(Directory::open(&path).unwrap().1, Some(later.at_version(1)), "it never goes back");
    }

    #[test]
    fn a_newer_format_is_refused_by_name() {
        let scratch = tempfile::tempdir().unwrap();
        fs::write(scratch.path().join(MARKER), br#"{"format": 9, "surprise": true}"#).unwrap();
        let error = Directory::open(scratch.path()).unwrap_err();
        assert!(matches!(error, NodeError::UnknownFormat { found: 9, known: VERSIONED, .. }), "{error}");
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
