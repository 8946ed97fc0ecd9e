//! `pontoon wal dump`: entries by group and index, or frames by segment and offset.

use std::ops::ControlFlow;

use clap::{Args, ValueEnum};
use pontoon_wal::{
    Entry, GroupId, RealFs, WalReader,
    tools::{self, FrameInfo},
};
use serde_json::{Value, json};

use super::{Done, Failure, Log, LogArgs};
use crate::cli::output::{bytes, table, text_of};

/// Payload that is read at a time.
const PAGE_BYTES: u64 = 1 << 20;

#[derive(Debug, Args)]
pub(in crate::cli) struct DumpArgs {
    #[command(flatten)]
    log: LogArgs,
    /// Only this group. Entries of all groups otherwise.
    #[arg(long)]
    group: Option<u64>,
    /// Only entries at or above this index.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Only entries below this index.
    #[arg(long, default_value_t = u64::MAX, hide_default_value = true)]
    to: u64,
    /// At most so many entries or frames.
    #[arg(long, default_value_t = 100)]
    limit: usize,
    /// Show payloads, as text or in hexadecimal digits.
    #[arg(long, value_enum, default_value_t = Payload::None)]
    payload: Payload,
    /// At most so many bytes of each payload.
    #[arg(long, default_value_t = 64)]
    payload_bytes: usize,
    /// The frames on disk instead, with the records in them; void and torn ones, too.
    #[arg(long)]
    frames: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Payload {
    None,
    Text,
    Hex,
}

pub(super) fn run(args: &DumpArgs) -> Result<Done, Failure> {
    let log = Log::at(&args.log)?;
    let done = if args.frames { frames(&log, args)? } else { entries(&log.open()?, args)? };
    Ok(log.finish(done))
}

fn entries(reader: &WalReader, args: &DumpArgs) -> Result<Done, Failure> {
    let groups = match args.group.map(GroupId) {
        Some(group) if reader.group(group).is_none() => {
            return Err(Failure::error(format!(
                "the log has no group {}; `pontoon wal stat` lists them",
                group.0
            )));
        }
        Some(group) => vec![group],
        None => reader.groups(),
    };
    let (mut rows, mut found, mut lost) = (Vec::new(), Vec::new(), Vec::new());
    for group in groups {
        let Some(view) = reader.group(group) else { continue };
        let mut next = view.first_index.max(args.from);
        let end = args.to.min(view.last_index + 1);
        while next < end && found.len() < args.limit {
            let page = reader
                .salvage(group, next..end, PAGE_BYTES)
                .map_err(|error| Failure::error(error.to_string()))?;
            for entry in page.entries.iter().take(args.limit - found.len()) {
                rows.push(row(group, entry, args));
                found.push(entry_json(group, entry, args));
            }
            lost.extend(page.lost.into_iter().map(|(low, high)| (group, low, high)));
            next = page.next;
        }
    }
    let mut head = vec!["group", "index", "term", "kind", "bytes"];
    head.extend((args.payload != Payload::None).then_some("payload"));
    let mut text = table(&head, &rows);
    for (group, low, high) in &lost {
        text.push_str(&format!("\ndamaged: entries [{low}, {high}) of group {} cannot be read", group.0));
    }
    if found.len() == args.limit {
        text.push_str(&format!("\nthe first {}; --limit shows more", args.limit));
    }
    let lost: Vec<Value> =
        lost.iter().map(|(group, low, high)| json!({ "group": group.0, "entries": [low, high] })).collect();
    Ok(Done::new(text, json!({ "group": args.group, "entries": found, "lost": lost })))
}

fn row(group: GroupId, entry: &Entry, args: &DumpArgs) -> Vec<String> {
    let mut row: Vec<String> = [group.0, entry.index, entry.term, u64::from(entry.kind)]
        .iter()
        .map(u64::to_string)
        .chain([bytes(entry.data.len() as u64)])
        .collect();
    row.extend(payload(entry, args));
    row
}

fn entry_json(group: GroupId, entry: &Entry, args: &DumpArgs) -> Value {
    let mut json = json!({
        "group": group.0, "index": entry.index, "term": entry.term, "kind": entry.kind,
        "bytes": entry.data.len(),
    });
    if let Some(payload) = payload(entry, args) {
        json["payload"] = json!(payload);
    }
    json
}

fn payload(entry: &Entry, args: &DumpArgs) -> Option<String> {
    let shown = &entry.data[..entry.data.len().min(args.payload_bytes)];
    let shown = match args.payload {
        Payload::None => return None,
        Payload::Text => text_of(shown),
        Payload::Hex => shown.iter().map(|byte| format!("{byte:02x}")).collect(),
    };
    Some(if entry.data.len() > args.payload_bytes { format!("{shown}...") } else { shown })
}

fn frames(log: &Log, args: &DumpArgs) -> Result<Done, Failure> {
    let (mut text, mut found) = (Vec::new(), Vec::new());
    let wanted = |record: &tools::RecordInfo| {
        args.group.is_none_or(|group| record.group.0 == group)
            && record.entries.map_or(args.from == 0 && args.to == u64::MAX, |(low, high)| {
                high > args.from && low < args.to
            })
    };
    let is_all = args.group.is_none() && args.from == 0 && args.to == u64::MAX;
    let visit = |mut frame: FrameInfo| {
        if let Some(records) = &mut frame.records {
            records.retain(wanted);
        }
        if is_all || frame.records.as_ref().is_none_or(|records| !records.is_empty()) {
            if found.len() == args.limit {
                return ControlFlow::Break(());
            }
            text.push(frame_text(&frame));
            found.push(frame_json(&frame));
        }
        ControlFlow::Continue(())
    };
    tools::frames(&RealFs, &log.dir, visit).map_err(|error| log.failure(error))?;
    if found.len() == args.limit {
        text.push(format!("the first {}; --limit shows more", args.limit));
    }
    Ok(Done::new(text.join("\n"), json!({ "frames": found })))
}

fn frame_text(frame: &FrameInfo) -> String {
    let marks = [
        (frame.is_opening, "opening"),
        (frame.is_watermark, "watermark"),
        (!frame.is_head_intact, "HEAD DAMAGED"),
        (frame.is_copy_intact == Some(false), "COPY DAMAGED"),
        (frame.records.is_none(), "NO DIRECTORY"),
    ];
    let marks: String = marks.iter().filter(|(on, _)| *on).map(|(_, word)| format!(" {word}")).collect();
    let mut lines = vec![format!(
        "segment {:08x} offset {}: {} frame {} of open {}, {}, durable to {}{}{marks}",
        frame.segment,
        frame.offset,
        frame.state,
        frame.seq,
        frame.ordinal,
        bytes(frame.bytes),
        frame.durable_seq,
        frame.key.map(|key| format!(", key {key}")).unwrap_or_default(),
    )];
    for record in frame.records.iter().flatten() {
        let what = match record.entries {
            Some((low, high)) => format!(" [{low}, {high})"),
            None if record.index > 0 => format!(" {}", record.index),
            None => String::new(),
        };
        let damaged = if record.is_intact { "" } else { " DAMAGED" };
        lines.push(format!(
            "  {} group {} {}{what}, {} at {}{damaged}",
            record.lsn,
            record.group.0,
            record.kind,
            bytes(record.bytes),
            record.offset
        ));
    }
    lines.join("\n")
}

fn frame_json(frame: &FrameInfo) -> Value {
    let records = frame.records.as_ref().map(|records| {
        let records = records.iter().map(|record| {
            json!({
                "lsn": record.lsn.0, "kind": record.kind, "group": record.group.0, "index": record.index,
                "entries": record.entries, "offset": record.offset, "bytes": record.bytes,
                "intact": record.is_intact,
            })
        });
        records.collect::<Vec<_>>()
    });
    json!({
        "path": frame.path, "segment": frame.segment, "offset": frame.offset, "bytes": frame.bytes,
        "state": frame.state.to_string(), "stream": frame.stream, "frame_seq": frame.seq,
        "durable_seq": frame.durable_seq, "incarnation": format!("{:016x}", frame.incarnation),
        "ordinal": frame.ordinal, "opening": frame.is_opening, "watermark": frame.is_watermark,
        "checkpoint": frame.checkpoint, "first_lsn": frame.first_lsn.0, "head_intact": frame.is_head_intact,
        "copy_intact": frame.is_copy_intact, "key": frame.key.map(|key| key.0), "records": records,
    })
}
