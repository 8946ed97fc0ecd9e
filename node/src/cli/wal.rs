//! `pontoon wal stat|dump|verify|repair`: the log of a node on this machine. The log is never written to. The node may run,
//! except for `repair`: what is read then is the log of a moment. A segment that is used again meanwhile can look damaged, so
//! damage is believed of a running node's log only when it is there each time.

mod dump;
mod repair;
mod verify;

use std::{
    fs::{File, TryLockError},
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::Subcommand;
use pontoon_wal::{RealFs, WalReader};
use serde_json::json;

use super::{Done, Failure, output::table};

/// How often a running node's log is read before damage in it is believed.
const TRIES: usize = 5;

#[derive(Debug, Subcommand)]
pub(super) enum WalCommand {
    /// What the log holds.
    Stat {
        /// A node's data directory, or the log's own.
        dir: PathBuf,
    },
    /// The entries of a group, or with --frames the frames on disk.
    Dump(dump::DumpArgs),
    /// Reads everything and reports damage; exit code 2 if there is any.
    Verify {
        /// A node's data directory, or the log's own.
        dir: PathBuf,
    },
    /// What a copy of the log would keep and lose; with --write makes it. The original is never written to.
    Repair(repair::RepairArgs),
}

pub(super) fn run(command: WalCommand) -> Result<Done, Failure> {
    let (WalCommand::Stat { dir } | WalCommand::Verify { dir }) = &command else {
        return match command {
            WalCommand::Dump(args) => dump::run(&args),
            WalCommand::Repair(args) => repair::run(&args),
            WalCommand::Stat { .. } | WalCommand::Verify { .. } => unreachable!("matched above"),
        };
    };
    let log = Log::at(dir);
    let done = match command {
        WalCommand::Verify { .. } => verify::run(&log)?,
        _ => stat(&log.open()?),
    };
    Ok(log.finish(done))
}

/// A log's directory, and whether a node has it open.
struct Log {
    dir: PathBuf,
    running: bool,
}

impl Log {
    /// The log of a node's data directory, or the log's own directory.
    fn at(dir: &Path) -> Log {
        let inside = dir.join("wal");
        let dir = if inside.is_dir() { inside } else { dir.to_owned() };
        // The lock is tried and given back at once.
        let lock = File::open(dir.join("LOCK"));
        let running = lock.is_ok_and(|lock| matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock)));
        Log { dir, running }
    }

    fn tries(&self) -> usize {
        if self.running { TRIES } else { 1 }
    }

    fn open(&self) -> Result<WalReader, Failure> {
        let mut last = WalReader::open(Arc::new(RealFs), &self.dir);
        for _ in 1..self.tries() {
            if last.as_ref().is_ok_and(|reader| reader.report().damaged_groups.is_empty()) {
                break;
            }
            last = WalReader::open(Arc::new(RealFs), &self.dir);
        }
        last.map_err(|error| self.failure(error))
    }

    fn failure(&self, error: pontoon_wal::Error) -> Failure {
        match error {
            pontoon_wal::Error::Foreign { .. } => Failure::new(
                Failure::REFUSED,
                format!("{} holds no log; name a node's --dir, or its --wal-dir", self.dir.display()),
            ),
            pontoon_wal::Error::Corrupt { .. } => Failure::new(
                Failure::REFUSED,
                format!(
                    "{error}; `pontoon wal verify` names all damage, `pontoon wal dump --frames` what is left"
                ),
            ),
            error => Failure::error(error.to_string()),
        }
    }

    fn finish(&self, mut done: Done) -> Done {
        done.json["running"] = json!(self.running);
        if self.running {
            done.text.push_str("\na node has this log open: this was the log of a moment");
        }
        done
    }
}

fn stat(reader: &WalReader) -> Done {
    let mut rows = Vec::new();
    let mut json = Vec::new();
    for id in reader.groups() {
        let Some(view) = reader.group(id) else { continue };
        let entries = view.last_index + 1 - view.first_index;
        let numbers = [id.0, view.first_index, view.last_index, entries, view.hard_state.term];
        rows.push(numbers.iter().map(u64::to_string).collect());
        json.push(json!({
            "group": id.0,
            "first_index": view.first_index,
            "last_index": view.last_index,
            "entries": entries,
            "term": view.hard_state.term,
            "commit": view.hard_state.commit,
        }));
    }
    let report = reader.report();
    let mut text = format!(
        "store {}: {} segments, {} groups, {} frames, {} records\n\n{}",
        reader.store_id(),
        report.segments,
        rows.len(),
        report.frames,
        report.records,
        table(&["group", "first", "last", "entries", "term"], &rows)
    );
    let lost: Vec<String> =
        report.damaged_groups.iter().map(|(group, damage)| format!("group {}: {damage}", group.0)).collect();
    lost.iter().for_each(|lost| text.push_str(&format!("\ndamaged: {lost}")));
    let json = json!({
        "store": reader.store_id().to_string(),
        "segments": report.segments,
        "segment_bytes": reader.segment_bytes(),
        "frames": report.frames,
        "records": report.records,
        "groups": json,
        "damaged": lost,
    });
    Done::new(text, json)
}
