//! What keeps a node from starting, by what its operator does next.

use std::{io, net::SocketAddr, path::PathBuf};

use crate::tls::TlsError;

/// Why a node could not start or stop. Every message names the thing and the next step.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NodeError {
    /// The listen address does not resolve.
    #[error("the address {address} cannot be resolved: {source}; give HOST:PORT")]
    Resolve {
        /// What was given.
        address: String,
        /// What the resolver said.
        source: io::Error,
    },
    /// Without TLS only this machine may talk to a node.
    #[error(
        "{address} resolves to {resolved}, which is not a loopback address: without TLS a node listens on loopback only; \
         use 127.0.0.1 or [::1], or give the node a certificate (`pontoon certs node`, --tls-cert, --tls-key, --tls-ca)"
    )]
    NotLoopback {
        /// What was given.
        address: String,
        /// The address that is not loopback.
        resolved: SocketAddr,
    },
    /// The address is where a node listens, not where others find it.
    #[error("{address} is no address that others can reach; say with --advertise HOST:PORT by which they do")]
    Advertise {
        /// The address.
        address: String,
    },
    /// The node's certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Somebody else listens there.
    #[error("{address} is in use by another process; stop it or choose another port with --listen")]
    PortInUse {
        /// The address.
        address: String,
    },
    /// The socket cannot be made.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// The node that was named at `--join` does not answer.
    #[error("nobody answers at {address} ({reason}); start that node first, or correct --join")]
    NobodyAnswers {
        /// The address.
        address: String,
        /// What was tried last.
        reason: String,
    },
    /// The cluster does not take this node in.
    #[error("the cluster at {address} refuses this node: {reason}")]
    JoinRefused {
        /// Who was asked.
        address: String,
        /// Why, with the next step.
        reason: String,
    },
    /// A file or directory cannot be used.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is no room to start in.
    #[error(
        "the disk of {} is full: {} MiB are free, a node needs {} MiB to start; free some space, then start again",
        path.display(), free >> 20, needed >> 20
    )]
    DiskFull {
        /// A directory on the disk.
        path: PathBuf,
        /// Bytes that are free.
        free: u64,
        /// Bytes that must be.
        needed: u64,
    },
    /// The directory holds something else.
    #[error(
        "{} is not a data directory: it holds {found} and no NODE file; name an empty directory with --dir",
        path.display()
    )]
    NotADataDirectory {
        /// The directory.
        path: PathBuf,
        /// One thing that is in it.
        found: String,
    },
    /// The marker file is not legible.
    #[error("{} is damaged: {source}; restore it, or remove this node and join with an empty directory", path.display())]
    Marker {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// The directory was written by another version.
    #[error("{} has format {found}, this version knows {known}; run the version that wrote it", path.display())]
    UnknownFormat {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The format known here.
        known: u32,
    },
    /// The directory belongs to a cluster of a version that this binary does not speak.
    #[error("{}: {reason}", path.display())]
    WrongVersion {
        /// The data directory.
        path: PathBuf,
        /// Which versions, and the next step.
        reason: String,
    },
    /// The parts of the directory do not belong together.
    #[error("{} belongs to {found}, not to {expected}; start this node with its own --dir and --wal-dir", path.display())]
    ForeignDirectory {
        /// Which part.
        path: PathBuf,
        /// Who owns it.
        found: String,
        /// Who should.
        expected: String,
    },
    /// The engine is lost, and nobody else has what it held.
    #[error(
        "the engine's state is lost ({why}), and no other node that answers holds {count} of the groups that the log builds \
         upon ({groups}): start the other nodes first; if they lost theirs too, restore this node's engine directory from a \
         backup"
    )]
    EngineLost {
        /// What is wrong with the engine.
        why: String,
        /// How many groups are held by nobody else.
        count: usize,
        /// Some of them.
        groups: String,
    },
    /// The name of an engine in the marker means nothing here.
    #[error("the engine {name} is not known; use fjall or sled")]
    UnknownEngine {
        /// The name.
        name: String,
    },
    /// The shared log cannot be opened or closed.
    #[error("the log: {0}")]
    Wal(#[from] pontoon_wal::Error),
    /// The key file of the shared log is refused.
    #[error(transparent)]
    Keys(#[from] pontoon_wal::KeyFileError),
    /// The engine cannot be opened or closed.
    #[error("the engine: {0}")]
    Engine(#[from] pontoon_shard::Error),
    /// The runtime cannot be opened.
    #[error(transparent)]
    Raft(#[from] pontoon_raftstore::Error),
    /// The first command of the cluster was not taken.
    #[error("the cluster could not be founded: {reason}; start the node again")]
    Founding {
        /// What happened.
        reason: String,
    },
    /// The server failed.
    #[error("the server stopped: {0}")]
    Serve(String),
}
