//! `pontoon wal verify`.

use std::sync::Arc;

use pontoon_wal::{
    DamagedRecord, RealFs,
    tools::{self, Unreadable},
};
use serde_json::{Value, json};

use super::{Done, Failure, Log};

pub(super) fn run(log: &Log) -> Result<Done, Failure> {
    let check = || tools::check(Arc::new(RealFs), &log.dir, log.keys.clone());
    let mut report = check();
    for _ in 1..log.tries() {
        if report.as_ref().is_ok_and(tools::CheckReport::is_whole) {
            break;
        }
        report = check();
    }
    let report = report.map_err(|error| log.failure(error))?;
    let mut lines = vec![format!(
        "{} segments, {} frames, {} records and {} entries read",
        report.segments, report.frames, report.records, report.entries
    )];
    let torn = report.torn.as_ref().map(|torn| {
        format!(
            "a torn tail begins at {} of {} ({}): never acknowledged, the next open cuts it",
            torn.offset,
            torn.path.display(),
            torn.why
        )
    });
    lines.extend(torn.clone());
    lines.extend(report.unreadable_manifest.as_ref().map(|path| {
        format!("{} cannot be read, as a crash may leave it; the other one is complete", path.display())
    }));
    lines.extend(report.unreadable.iter().map(words_of_unreadable));
    lines.extend(report.faults.iter().map(|fault| format!("damaged: {fault}")));
    lines.extend(report.damaged.iter().map(|hit| format!("damaged: {}", words_of(hit))));
    lines.extend(report.sealed.map(|key| {
        format!("encrypted, newest with key {key}: CRCs were checked, entries were not read; --keys FILE reads them")
    }));
    let lost: Vec<String> =
        report.lost.iter().map(|(group, damage)| format!("group {} lost {damage}", group.0)).collect();
    lines.extend(lost.clone());
    lines.push(
        match (&report.refused, report.is_whole(), lost.is_empty()) {
            (Some(error), _, _) => return Ok(refused(lines, error, &report)),
            (None, true, _) if report.sealed.is_some() => "every CRC is right",
            (None, true, _) => "everything is as it was written",
            (None, false, true) => "no group needs what was lost",
            (None, false, false) => {
                "these groups' replicas here stay stopped when the node runs, the others serve: replace each with \
                 `pontoon move start`"
            }
        }
        .to_owned(),
    );
    let code = if report.is_whole() { 0 } else { Failure::REFUSED };
    Ok(Done { text: lines.join("\n"), json: json_of(&report), code })
}

fn refused(mut lines: Vec<String>, error: &pontoon_wal::Error, report: &tools::CheckReport) -> Done {
    lines.push(format!("the log does not open: {error}"));
    Done { text: lines.join("\n"), json: json_of(report), code: Failure::REFUSED }
}

fn words_of(hit: &DamagedRecord) -> String {
    let what = match hit.entries {
        Some((low, high)) => format!("entries [{low}, {high})"),
        None => "a record without entries".to_owned(),
    };
    format!(
        "{} at offset {}: {what} of group {}, {} bytes: {}",
        hit.path.display(),
        hit.offset,
        hit.group.0,
        hit.bytes,
        hit.why
    )
}

pub(super) fn words_of_unreadable(place: &Unreadable) -> String {
    let Unreadable { path, offset, bytes, reason } = place;
    format!(
        "unreadable: {bytes} bytes at offset {offset} of {} ({reason}); the disk fails there, taken for zeros",
        path.display()
    )
}

pub(super) fn json_of_unreadable(place: &Unreadable) -> Value {
    json!({ "path": place.path, "offset": place.offset, "bytes": place.bytes, "reason": place.reason })
}

fn json_of(report: &tools::CheckReport) -> Value {
    let faults = report.faults.iter().map(|fault| {
        json!({
            "path": fault.path, "segment": fault.segment, "offset": fault.offset, "frame": fault.frame,
            "loses": fault.loses(), "what": fault.to_string(),
        })
    });
    let damaged = report.damaged.iter().map(|hit| {
        json!({
            "path": hit.path, "segment": hit.segment, "offset": hit.offset, "bytes": hit.bytes,
            "group": hit.group.0, "entries": hit.entries, "why": hit.why.to_string(),
        })
    });
    let lost = report.lost.iter().map(|(group, damage)| {
        json!({
            "group": group.0, "entries": damage.entries, "hard_state": damage.hard_state,
            "truncation": damage.truncation, "metadata": damage.meta,
        })
    });
    json!({
        "store": report.store.to_string(),
        "whole": report.is_whole(),
        "checkpoint": report.checkpoint,
        "segments": report.segments,
        "bytes": report.bytes,
        "frames": report.frames,
        "void_frames": report.void_frames,
        "records": report.records,
        "entries": report.entries,
        "torn": report.torn.as_ref().map(|torn| json!({ "path": torn.path, "offset": torn.offset, "why": torn.why.to_string() })),
        "unreadable_manifest": report.unreadable_manifest,
        "unreadable": report.unreadable.iter().map(json_of_unreadable).collect::<Vec<_>>(),
        "faults": faults.collect::<Vec<_>>(),
        "damaged": damaged.collect::<Vec<_>>(),
        "lost": lost.collect::<Vec<_>>(),
        "hidden": report.sealed.is_some(),
        "refused": report.refused.as_ref().map(ToString::to_string),
    })
}
