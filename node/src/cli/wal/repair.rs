//! `pontoon wal repair`.

use std::{path::PathBuf, sync::Arc};

use clap::Args;
use pontoon_wal::{Error, Options, RealFs, tools};
use serde_json::{Value, json};

use super::{
    Done, Failure, Log, LogArgs,
    verify::{json_of_unreadable, words_of_unreadable},
};
use crate::cli::output::table;

#[derive(Debug, Args)]
pub(in crate::cli) struct RepairArgs {
    /// No node may run on it. With the keys of an encrypted log the copy is encrypted, too.
    #[command(flatten)]
    log: LogArgs,
    /// Copy what is readable to this new directory. Without it nothing is written.
    #[arg(long, value_name = "TARGET")]
    write: Option<PathBuf>,
}

pub(super) fn run(args: &RepairArgs) -> Result<Done, Failure> {
    let log = Log::at(&args.log)?;
    let in_use = || {
        Failure::new(
            Failure::REFUSED,
            format!("{} is in use by a node; stop it, then repair", log.dir.display()),
        )
    };
    if log.running {
        return Err(in_use());
    }
    let report = match &args.write {
        None => tools::plan_copy(Arc::new(RealFs), &log.dir, log.keys.clone()),
        Some(target) => tools::copy(&log.dir, Options { keys: log.keys.clone(), ..Options::new(target) }),
    };
    let report = report.map_err(|error| match error {
        Error::Locked { .. } => in_use(),
        Error::BadOption { reason, .. } => Failure::new(
            Failure::REFUSED,
            format!("{reason}; name a directory that does not exist with --write"),
        ),
        error => log.failure(error),
    })?;
    Ok(show(&report, args.write.as_ref()))
}

fn show(report: &tools::CopyReport, target: Option<&PathBuf>) -> Done {
    let mut lines = Vec::new();
    let lost: Vec<Vec<String>> = report
        .losing()
        .map(|copied| {
            let what = copied.lost.as_ref().map(ToString::to_string).unwrap_or_default();
            let range = format!("[{}, {})", copied.first_index, copied.last_index + 1);
            vec![copied.group.0.to_string(), range, what]
        })
        .collect();
    if let Some(torn) = &report.torn {
        lines.push(format!(
            "a torn tail at {} of {}: never acknowledged, the next open cuts it; that needs no repair",
            torn.offset,
            torn.path.display()
        ));
    }
    lines.extend(report.unreadable.iter().map(words_of_unreadable));
    if lost.is_empty() {
        lines.push(format!("all {} groups are whole: nothing needs repair", report.groups.len()));
    } else {
        lines.push(format!("{} of {} groups lose something:", lost.len(), report.groups.len()));
        lines.push(table(&["group", "kept", "lost"], &lost));
        lines.push(
            "a group that lost something stays stopped, in a copy too: replace its replica with `pontoon move start`"
                .to_owned(),
        );
    }
    lines.push(match target {
        Some(target) => format!("copied to {}; the original is as it was", target.display()),
        None => "nothing was written; `--write TARGET` copies what is kept to a new directory".to_owned(),
    });
    let groups: Vec<Value> = report
        .groups
        .iter()
        .map(|copied| {
            json!({
                "group": copied.group.0,
                "first_index": copied.first_index,
                "last_index": copied.last_index,
                "lost": copied.lost.as_ref().map(|lost| json!({
                    "entries": lost.entries, "hard_state": lost.hard_state,
                    "truncation": lost.truncation, "metadata": lost.meta,
                })),
            })
        })
        .collect();
    let json = json!({
        "needed": !lost.is_empty(),
        "groups": groups,
        "torn": report.torn.as_ref().map(|torn| json!({ "path": torn.path, "offset": torn.offset, "why": torn.why.to_string() })),
        "unreadable": report.unreadable.iter().map(json_of_unreadable).collect::<Vec<_>>(),
        "written": target,
    });
    Done::new(lines.join("\n"), json)
}
