//! `pontoon wal stat|dump|verify`: the log of a node that is not running.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::Subcommand;
use pontoon_wal::{GroupId, RealFs, WalReader};
use serde_json::{Value, json};

use super::{
    Done, Failure,
    output::{bytes, table},
};

#[derive(Debug, Subcommand)]
pub(super) enum WalCommand {
    /// What the log holds.
    Stat {
        /// A node's data directory, or the log's own.
        dir: PathBuf,
    },
    /// The entries of a group.
    Dump {
        /// A node's data directory, or the log's own.
        dir: PathBuf,
        /// The group.
        #[arg(long)]
        group: u64,
        /// At most so many, from the first.
        #[arg(long, default_value_t = 100)]
        limit: u64,
    },
    /// Reads everything and reports damage.
    Verify {
        /// A node's data directory, or the log's own.
        dir: PathBuf,
    },
}

pub(super) fn run(command: WalCommand) -> Result<Done, Failure> {
    match command {
        WalCommand::Stat { dir } => Ok(stat(&open(&dir)?)),
        WalCommand::Dump { dir, group, limit } => dump(&open(&dir)?, GroupId(group), limit),
        WalCommand::Verify { dir } => verify(&open(&dir)?),
    }
}

fn open(dir: &Path) -> Result<WalReader, Failure> {
    let inside = dir.join("wal");
    let dir = if inside.is_dir() { &inside } else { dir };
    WalReader::open(Arc::new(RealFs), dir)
        .map_err(|error| Failure::error(format!("{}: {error}", dir.display())))
}

fn stat(reader: &WalReader) -> Done {
    let mut rows = Vec::new();
    let mut json = Vec::new();
    for id in reader.groups() {
        let Some(view) = reader.group(id) else { continue };
        rows.push(vec![id.0.to_string(), view.first_index.to_string(), view.last_index.to_string()]);
        json.push(json!({ "group": id.0, "first_index": view.first_index, "last_index": view.last_index }));
    }
    let report = reader.report();
    let text = format!(
        "store {}: {} segments, {} groups, {} frames, {} records\n\n{}",
        reader.store_id(),
        report.segments,
        rows.len(),
        report.frames,
        report.records,
        table(&["group", "first", "last"], &rows)
    );
    let json = json!({
        "store": reader.store_id().to_string(),
        "segments": report.segments,
        "frames": report.frames,
        "records": report.records,
        "groups": json,
    });
    Done::new(text, json)
}

fn dump(reader: &WalReader, group: GroupId, limit: u64) -> Result<Done, Failure> {
    let view = reader.group(group).ok_or_else(|| {
        Failure::error(format!("the log has no group {}; `pontoon wal stat` lists them", group.0))
    })?;
    let end = (view.last_index + 1).min(view.first_index.saturating_add(limit));
    let mut entries = Vec::new();
    if view.first_index < end {
        reader
            .entries(group, view.first_index..end, u64::MAX, &mut entries)
            .map_err(|error| Failure::error(error.to_string()))?;
    }
    let rows: Vec<Vec<String>> = entries
        .iter()
        .map(|entry| vec![entry.index.to_string(), entry.term.to_string(), bytes(entry.data.len() as u64)])
        .collect();
    let json: Vec<Value> = entries
        .iter()
        .map(|entry| json!({ "index": entry.index, "term": entry.term, "bytes": entry.data.len() }))
        .collect();
    Ok(Done::new(table(&["index", "term", "bytes"], &rows), json!({ "group": group.0, "entries": json })))
}

fn verify(reader: &WalReader) -> Result<Done, Failure> {
    let report = reader.report();
    let mut damage: Vec<String> = report
        .damaged
        .iter()
        .map(|hit| {
            format!("{} at {}: {} bytes of group {}", hit.path.display(), hit.offset, hit.bytes, hit.group.0)
        })
        .collect();
    let mut records = 0_u64;
    for id in reader.groups() {
        let Some(view) = reader.group(id) else { continue };
        let mut next = view.first_index;
        while next <= view.last_index {
            let mut entries = Vec::new();
            match reader.entries(id, next..view.last_index + 1, 4 << 20, &mut entries) {
                Ok(()) if !entries.is_empty() => {
                    records += entries.len() as u64;
                    next += entries.len() as u64;
                }
                Ok(()) => break,
                Err(error) => {
                    damage.push(format!("group {}: {error}", id.0));
                    break;
                }
            }
        }
    }
    let torn = report
        .torn
        .as_ref()
        .map(|torn| format!("a torn tail is cut at {} of {}", torn.offset, torn.path.display()));
    let mut lines = vec![format!("{} frames and {records} entries read", report.frames)];
    lines.extend(torn.clone());
    lines.extend(damage.iter().map(|hit| format!("damaged: {hit}")));
    let code = if damage.is_empty() { 0 } else { Failure::ERROR };
    let json = json!({ "frames": report.frames, "entries": records, "torn": torn, "damaged": damage });
    Ok(Done { text: lines.join("\n"), json, code })
}
