//! `pontoon wal stat|dump|verify`: the log of a node on this machine. Nothing is written, so the node may run; what is
//! read then is the log of a moment, and a segment that is recycled meanwhile can look damaged.

use std::{
    fs::{File, TryLockError},
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
    let (WalCommand::Stat { dir } | WalCommand::Dump { dir, .. } | WalCommand::Verify { dir }) = &command;
    let inside = dir.join("wal");
    let dir = if inside.is_dir() { &inside } else { dir };
    let running = is_open(dir);
    let reader = open(dir)?;
    let mut done = match command {
        WalCommand::Stat { .. } => stat(&reader),
        WalCommand::Dump { group, limit, .. } => dump(&reader, GroupId(group), limit)?,
        WalCommand::Verify { .. } => verify(&reader),
    };
    done.json["running"] = json!(running);
    if running {
        done.text.push_str("\na node has this log open; stop it before you believe in damage");
    }
    Ok(done)
}

/// Whether a node has the log open. The lock is tried and given back at once.
fn is_open(dir: &Path) -> bool {
    let lock = File::open(dir.join("LOCK"));
    lock.is_ok_and(|lock| matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

fn open(dir: &Path) -> Result<WalReader, Failure> {
    WalReader::open(Arc::new(RealFs), dir).map_err(|error| match error {
        pontoon_wal::Error::Foreign { .. } => Failure::new(
            Failure::REFUSED,
            format!("{} holds no log; name a node's --dir, or its --wal-dir", dir.display()),
        ),
        error => Failure::error(error.to_string()),
    })
}

/// What the log lost, by group.
fn lost(reader: &WalReader) -> Vec<String> {
    let damaged = reader.report().damaged_groups.iter();
    damaged.map(|(group, damage)| format!("group {}: {damage}", group.0)).collect()
}

fn stat(reader: &WalReader) -> Done {
    let mut rows = Vec::new();
    let mut json = Vec::new();
    for id in reader.groups() {
        let Some(view) = reader.group(id) else { continue };
        let entries = view.last_index + 1 - view.first_index;
        let numbers = [id.0, view.first_index, view.last_index, entries];
        rows.push(numbers.iter().map(u64::to_string).collect());
        json.push(json!({
            "group": id.0,
            "first_index": view.first_index,
            "last_index": view.last_index,
            "entries": entries,
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
        table(&["group", "first", "last", "entries"], &rows)
    );
    let lost = lost(reader);
    lost.iter().for_each(|lost| text.push_str(&format!("\ndamaged: {lost}")));
    let json = json!({
        "store": reader.store_id().to_string(),
        "segments": report.segments,
        "frames": report.frames,
        "records": report.records,
        "groups": json,
        "damaged": lost,
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

fn verify(reader: &WalReader) -> Done {
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
                    damage.push(error.to_string());
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
    let lost = lost(reader);
    match (damage.is_empty(), lost.is_empty()) {
        (true, _) => {}
        (false, true) => lines.push("no group needs what was lost".to_owned()),
        (false, false) => lines.push(
            "these groups' replicas here stay stopped when the node runs, the others serve: replace each with `pontoon \
             move start`"
                .to_owned(),
        ),
    }
    let code = if damage.is_empty() { 0 } else { Failure::ERROR };
    let json = json!({ "frames": report.frames, "entries": records, "torn": torn, "damaged": damage });
    Done { text: lines.join("\n"), json, code }
}
