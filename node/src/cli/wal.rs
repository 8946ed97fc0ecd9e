//! `pontoon wal stat|dump|verify|repair|key`: the log of a node on this machine. The log is never written to. The node may run,
//! except for `repair`: what is read then is the log of a moment. A segment that is used again meanwhile can look damaged, so
//! damage is believed of a running node's log only when it is there each time.

mod dump;
mod key;
mod repair;
mod verify;

use std::{
    collections::BTreeSet,
    fs::{File, TryLockError},
    ops::ControlFlow,
    path::PathBuf,
    sync::Arc,
};

use clap::{Args, Subcommand};
use pontoon_wal::{KeyFile, KeyProvider, RealFs, WalReader, tools};
use serde_json::json;

use super::{
    Done, Failure,
    output::{key_hint, table},
};

/// How often a running node's log is read before damage in it is believed.
const TRIES: usize = 5;

#[derive(Debug, Subcommand)]
pub(super) enum WalCommand {
    /// What the log holds.
    Stat(LogArgs),
    /// The entries of a group, or with --frames the frames on disk.
    Dump(dump::DumpArgs),
    /// Reads everything and reports damage; exit code 2 if there is any.
    Verify(LogArgs),
    /// What a copy of the log would keep and lose; with --write makes it. The original is never written to.
    Repair(repair::RepairArgs),
    /// Makes a key file, or adds a key to one.
    #[command(subcommand)]
    Key(key::KeyCommand),
}

/// Which log, and how to open it.
#[derive(Debug, Args)]
pub(super) struct LogArgs {
    /// A node's data directory, or the log's own.
    dir: PathBuf,
    /// The key file of an encrypted log. Without it only what is in the clear is looked at.
    #[arg(long, value_name = "FILE")]
    keys: Option<PathBuf>,
}

pub(super) fn run(command: WalCommand) -> Result<Done, Failure> {
    match command {
        WalCommand::Dump(args) => dump::run(&args),
        WalCommand::Repair(args) => repair::run(&args),
        WalCommand::Key(command) => key::run(&command),
        WalCommand::Stat(args) => {
            let log = Log::at(&args)?;
            Ok(log.finish(stat_of(&log)?))
        }
        WalCommand::Verify(args) => {
            let log = Log::at(&args)?;
            Ok(log.finish(verify::run(&log)?))
        }
    }
}

/// A log's directory, and whether a node has it open.
struct Log {
    dir: PathBuf,
    running: bool,
    keys: Option<Arc<dyn KeyProvider>>,
}

impl Log {
    /// The log of a node's data directory, or the log's own directory.
    fn at(args: &LogArgs) -> Result<Log, Failure> {
        let inside = args.dir.join("wal");
        let dir = if inside.is_dir() { inside } else { args.dir.clone() };
        let keys = match &args.keys {
            None => None,
            Some(path) => {
                let keys = KeyFile::open(path);
                let keys = keys.map_err(|error| Failure::new(Failure::REFUSED, error.to_string()))?;
                Some(Arc::new(keys) as Arc<dyn KeyProvider>)
            }
        };
        // The lock is tried and given back at once.
        let lock = File::open(dir.join("LOCK"));
        let running = lock.is_ok_and(|lock| matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock)));
        Ok(Log { dir, running, keys })
    }

    fn tries(&self) -> usize {
        if self.running { TRIES } else { 1 }
    }

    fn open(&self) -> Result<WalReader, Failure> {
        let open = || WalReader::open_with(Arc::new(RealFs), &self.dir, self.keys.clone());
        let mut last = open();
        for _ in 1..self.tries() {
            if last.as_ref().is_ok_and(|reader| reader.report().damaged_groups.is_empty()) {
                break;
            }
            last = open();
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
            error @ pontoon_wal::Error::Key { .. } => {
                Failure::new(Failure::REFUSED, key_hint(&error, "--keys FILE"))
            }
            error => Failure::error(error.to_string()),
        }
    }

    /// The keys that the frames on disk ask for, if the log is encrypted and no keys were given; and how many frames and
    /// records there are.
    fn sealed_with(&self) -> Result<Option<(BTreeSet<u32>, u64, u64)>, Failure> {
        if self.keys.is_some() {
            return Ok(None);
        }
        let (mut keys, mut frames, mut records) = (BTreeSet::new(), 0, 0);
        let visit = |frame: tools::FrameInfo| {
            if frame.state != tools::FrameState::Void {
                keys.extend(frame.key.map(|key| key.0));
                frames += 1;
                records += frame.records.map_or(0, |records| records.len() as u64);
            }
            ControlFlow::Continue(())
        };
        tools::frames(&RealFs, &self.dir, visit).map_err(|error| self.failure(error))?;
        Ok((!keys.is_empty()).then_some((keys, frames, records)))
    }

    fn finish(&self, mut done: Done) -> Done {
        done.json["running"] = json!(self.running);
        if self.running {
            done.text.push_str("\na node has this log open: this was the log of a moment");
        }
        done
    }
}

fn stat_of(log: &Log) -> Result<Done, Failure> {
    let Some((keys, frames, records)) = log.sealed_with()? else { return Ok(stat(&log.open()?)) };
    let listed = listed(&keys);
    let text = format!(
        "{frames} frames, {records} records, encrypted with {listed}\n\
         what the groups hold is hidden; --keys FILE shows it"
    );
    Ok(Done::new(text, json!({ "frames": frames, "records": records, "keys": keys, "hidden": true })))
}

fn listed(keys: &BTreeSet<u32>) -> String {
    let numbers: Vec<String> = keys.iter().map(u32::to_string).collect();
    format!("key {}", numbers.join(", "))
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
    let keys: BTreeSet<u32> = reader.key_ids_in_use().into_iter().map(|key| key.0).collect();
    if !keys.is_empty() {
        text.push_str(&format!("\nencrypted, needs {}", listed(&keys)));
    }
    let lost: Vec<String> =
        report.damaged_groups.iter().map(|(group, damage)| format!("group {}: {damage}", group.0)).collect();
    lost.iter().for_each(|lost| text.push_str(&format!("\ndamaged: {lost}")));
    let json = json!({
        "store": reader.store_id().to_string(),
        "segments": report.segments,
        "segment_bytes": reader.segment_bytes(),
        "frames": report.frames,
        "records": report.records,
        "keys": keys,
        "groups": json,
        "damaged": lost,
    });
    Done::new(text, json)
}
