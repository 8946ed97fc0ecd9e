//! Why a backup, a restore or a look at one failed.

use std::{io, path::PathBuf};

use crate::client::ClientError;

/// Each names the thing and the next step.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackupError {
    /// A file or directory of the backup cannot be read or written.
    #[error("{}: {source}{}", path.display(), room(source))]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The path is there and holds something else.
    #[error("{} holds no backups of ours ({found}); name an empty or a new directory, or a new FILE.tar", path.display())]
    Foreign {
        /// The path.
        path: PathBuf,
        /// What was found.
        found: String,
    },
    /// There is nothing.
    #[error("{} is not there; name a directory or a file that `pontoon backup` has made", path.display())]
    Missing {
        /// The path.
        path: PathBuf,
    },
    /// A backup in one file is made once.
    #[error("{} exists; name a new file, or a directory to add to", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// It was written by a later version.
    #[error("{} has the format {found}, this version knows {known}; use the version that wrote it", path.display())]
    Format {
        /// What has it.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The newest that is known here.
        known: u32,
    },
    /// A manifest or a chunk is not what was written.
    #[error("{} is damaged: {reason}; `pontoon verify` says which predicates that hits", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How that was seen.
        reason: String,
    },
    /// Somebody else is at work in the directory.
    #[error("{} is in use by another backup, prune or restore; run this again when that has ended", path.display())]
    Locked {
        /// The directory.
        path: PathBuf,
    },
    /// There is no such backup.
    #[error("{} has no backup {id}; `pontoon backup list {}` shows those that it has", path.display(), path.display())]
    NoSuchBackup {
        /// Where it was looked for.
        path: PathBuf,
        /// Its id, or the beginning of one.
        id: String,
    },
    /// The backup does not have the predicate.
    #[error(
        "the backup {id} has no predicate {predicate}; `pontoon backup list --predicates` shows what it has"
    )]
    NotInBackup {
        /// The backup.
        id: String,
        /// What was asked for.
        predicate: String,
    },
    /// The target has what would be restored. Nothing was done.
    #[error(
        "the cluster has {} already, with rows; nothing was restored. Restore beside it with --as NAME (one predicate), drop it first, \
         or say --replace to have what is restored take its place",
        predicates.join(", ")
    )]
    Conflict {
        /// Which predicates.
        predicates: Vec<String>,
    },
    /// After the restore the predicate is not what the backup has.
    #[error(
        "{predicate} was restored and is not what the backup has ({reason}); did somebody write to it meanwhile? Drop it and restore it again"
    )]
    Differs {
        /// Which.
        predicate: String,
        /// How.
        reason: String,
    },
    /// A predicate could not be read to its end from any of its replicas.
    #[error(
        "{predicate} could not be read ({reason}); nothing was added to the backups, what was read is kept for the next run. \
             `pontoon groups --problem` shows what is wrong"
    )]
    Unread {
        /// Which.
        predicate: String,
        /// The last thing that was heard.
        reason: String,
    },
    /// The request makes no sense.
    #[error("{reason}")]
    Refused {
        /// Why, with the next step.
        reason: String,
    },
    /// The cluster refuses or does not answer.
    #[error(transparent)]
    Cluster(#[from] ClientError),
}

impl BackupError {
    /// Whether nothing was done, and the same again would be refused again.
    pub fn is_refusal(&self) -> bool {
        match self {
            BackupError::Foreign { .. }
            | BackupError::Missing { .. }
            | BackupError::Exists { .. }
            | BackupError::Format { .. }
            | BackupError::Locked { .. }
            | BackupError::NoSuchBackup { .. }
            | BackupError::NotInBackup { .. }
            | BackupError::Conflict { .. }
            | BackupError::Refused { .. } => true,
            BackupError::Io { .. }
            | BackupError::Damaged { .. }
            | BackupError::Differs { .. }
            | BackupError::Unread { .. }
            | BackupError::Cluster(_) => false,
        }
    }
}

fn room(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free space there, or `pontoon backup prune`, and run this again: what is stored so far is not stored again"
        }
        _ => "",
    }
}
