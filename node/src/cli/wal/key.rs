//! `pontoon wal key`.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use pontoon_wal::KeyFile;
use serde_json::json;

use super::{Done, Failure};

#[derive(Debug, Subcommand)]
pub(in crate::cli) enum KeyCommand {
    /// Makes a key file with one key.
    New {
        /// The file; there must be none of that name.
        file: PathBuf,
    },
    /// Adds a key, which logs use from their next segment on. A running node sees it by itself.
    Rotate {
        /// The file.
        file: PathBuf,
    },
}

pub(super) fn run(command: &KeyCommand) -> Result<Done, Failure> {
    let (file, changed): (&Path, _) = match command {
        KeyCommand::New { file } => (file, KeyFile::create(file)),
        KeyCommand::Rotate { file } => (file, KeyFile::rotate(file)),
    };
    let id = changed.map_err(|error| Failure::new(Failure::REFUSED, error.to_string()))?;
    let text = match command {
        KeyCommand::New { .. } => format!(
            "{} holds key {id}; keep a copy in a safe place, then start nodes with --wal-keys {}",
            file.display(),
            file.display()
        ),
        KeyCommand::Rotate { .. } => format!(
            "key {id} is the current one in {}; keep the older ones as long as `pontoon wal stat` names them",
            file.display()
        ),
    };
    Ok(Done::new(text, json!({ "file": file, "key": id.0 })))
}
