//! `pontoon audit`.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use clap::Args;
use pontoon_node::audit::{AuditEntry, read};
use pontoon_proto::v1;
use serde_json::json;

use super::{Context, Done, Failure, print_line, table};

/// How often new lines are asked for, by whoever follows them.
const FOLLOW_EVERY: Duration = Duration::from_millis(500);
const HEAD: [&str; 7] = ["when", "node", "who", "from", "what", "about", "result"];

#[derive(Debug, Args)]
pub(super) struct AuditArgs {
    /// At most so many, the latest.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    limit: u32,
    /// Go on with what happens from now on, until Ctrl-C. With --json each line is an object.
    #[arg(long)]
    follow: bool,
    /// Also what nodes passed on for each other: the same actions once more, where they were carried out.
    #[arg(long)]
    all: bool,
    /// Read the files in this data directory instead of asking the nodes: for a node that is down.
    #[arg(long, conflicts_with = "follow")]
    dir: Option<PathBuf>,
}

pub(super) async fn run(context: &Context, args: AuditArgs) -> Result<Done, Failure> {
    if let Some(dir) = &args.dir {
        let mut entries =
            read(dir, 0, args.limit as usize).map_err(|error| Failure::error(error.to_string()))?;
        entries.retain(|entry| args.all || !entry.passed_on);
        return Ok(whole(&entries, &[]));
    }
    let client = context.client().await?;
    let mut request =
        v1::AuditRequest { limit: args.limit, passed_on: args.all, local: false, after: BTreeMap::new() };
    let reply = client.audit(request.clone()).await?;
    let entries: Vec<AuditEntry> = reply.entries.into_iter().map(Into::into).collect();
    if !args.follow {
        return Ok(whole(&entries, &reply.silent));
    }
    request.after = reply.seen;
    say(context, &entries);
    let mut signal = std::pin::pin!(pontoon_node::shutdown_signal());
    loop {
        tokio::select! {
            () = tokio::time::sleep(FOLLOW_EVERY) => {}
            _ = &mut signal => return Ok(Done::new("", json!({ "seen": request.after }))),
        }
        let reply = client.audit(request.clone()).await?;
        request.after = reply.seen;
        say(context, &reply.entries.into_iter().map(Into::into).collect::<Vec<_>>());
    }
}

fn whole(entries: &[AuditEntry], silent: &[u64]) -> Done {
    let mut text = match entries.is_empty() {
        true => "nothing was changed yet".to_owned(),
        false => table(&HEAD, &entries.iter().map(row).collect::<Vec<_>>()),
    };
    if !silent.is_empty() {
        let nodes: Vec<_> = silent.iter().map(|node| format!("n{node}")).collect();
        text.push_str(&format!(
            "\nwithout {}: no answer; `pontoon audit --dir DIR` reads the files of a node that is down",
            nodes.join(", ")
        ));
    }
    Done::new(text, json!({ "entries": entries, "silent": silent }))
}

fn say(context: &Context, entries: &[AuditEntry]) {
    for entry in entries {
        print_line(&match context.json {
            true => serde_json::to_string(entry).unwrap_or_default(),
            false => row(entry).join("  "),
        });
    }
}

fn row(entry: &AuditEntry) -> Vec<String> {
    let facts: Vec<_> = entry.facts.iter().map(|(name, fact)| format!("{name}={fact}")).collect();
    vec![
        entry.when.clone(),
        format!("n{}", entry.node),
        entry.who.clone(),
        entry.from.clone(),
        entry.what.clone(),
        facts.join(" "),
        match entry.reason.is_empty() {
            true => entry.result.clone(),
            false => format!("{}: {}", entry.result, entry.reason),
        },
    ]
}
