//! `pontoon debug`.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use clap::Subcommand;
use flate2::{Compression, write::GzEncoder};
use futures::future::join_all;
use pontoon_node::{
    client::ClientError,
    json::{self, place},
};
use pontoon_proto::v1;
use serde_json::{Value, json};

use super::{
    Context, Done, Failure,
    output::{bytes, table},
    profile,
};

/// So many events of the cluster go into a bundle.
const EVENTS: u32 = 1_000;

#[derive(Debug, Subcommand)]
pub(super) enum DebugCommand {
    /// Gather what every node that answers can tell into one archive: settings, status, metrics, recent logs, how its log stands.
    Bundle {
        /// The archive; it must not exist.
        file: PathBuf,
    },
    /// One group in depth, from each of its replicas: Raft's state, how far its members are, and what waits.
    Group {
        /// Its number, as in `pontoon groups`.
        group: u64,
    },
    /// What the threads of a node do for some seconds, or which code allocates. One at a time; Ctrl-C ends it.
    Profile(profile::ProfileArgs),
}

pub(super) async fn run(context: &Context, command: DebugCommand) -> Result<Done, Failure> {
    match command {
        DebugCommand::Bundle { file } => bundle(context, &file).await,
        DebugCommand::Group { group } => inspect_group(context, group).await,
        DebugCommand::Profile(args) => profile::run(context, args).await,
    }
}

/// What goes into an archive, with its name there.
type Entry = (String, String);

async fn bundle(context: &Context, file: &Path) -> Result<Done, Failure> {
    // Before anybody is asked: an old bundle is not written over.
    let out = File::create_new(file).map_err(|error| {
        Failure::new(
            Failure::REFUSED,
            format!("{} cannot be made: {error}; name another file", file.display()),
        )
    })?;
    let gathered = gather(context).await;
    let (entries, answered, silent) = match gathered {
        Ok(gathered) => gathered,
        Err(failure) => {
            drop(std::fs::remove_file(file));
            return Err(failure);
        }
    };
    let written = tokio::task::block_in_place(|| write(out, &entries));
    written.map_err(|error| Failure::error(format!("{} could not be written: {error}", file.display())))?;
    let mut text = format!("{} holds what {} told", file.display(), named(&answered));
    if !silent.is_empty() {
        text.push_str(&format!("; {} did not answer", named(&silent)));
    }
    text.push_str(". It holds names of predicates, addresses and paths, no rows and no keys");
    let json = json!({ "file": file.display().to_string(), "nodes": answered, "silent": silent });
    Ok(Done::new(text, json))
}

fn named(nodes: &[u64]) -> String {
    nodes.iter().map(|node| format!("n{node}")).collect::<Vec<_>>().join(", ")
}

async fn gather(context: &Context) -> Result<(Vec<Entry>, Vec<u64>, Vec<u64>), Failure> {
    let client = context.client().await?;
    let status = client.status(v1::StatusRequest {}).await?;
    let mut entries = vec![json_entry("status.json", &status_json(&status))];
    // Without a quorum of the meta group these fail, and that is worth knowing.
    let groups = client.groups(v1::GroupsRequest { problem: true, ..Default::default() }).await;
    entries.push(match groups {
        Ok(reply) => json_entry("problems.json", &group_problems(&reply)),
        Err(error) => ("problems.error".to_owned(), format!("{error}\n")),
    });
    entries.push(match client.events(v1::EventsRequest { limit: EVENTS, ..Default::default() }).await {
        Ok(reply) => ("events.jsonl".to_owned(), events(&reply)),
        Err(error) => ("events.error".to_owned(), format!("{error}\n")),
    });
    let told = join_all(status.nodes.iter().map(async |view| {
        let node = view.node.clone().unwrap_or_default();
        (node.id, inspect(context, &node.address).await)
    }));
    let (mut answered, mut silent) = (Vec::new(), Vec::new());
    for (node, told) in told.await {
        match told {
            Ok(reply) => {
                answered.push(node);
                entries.extend(of_node(node, &reply));
            }
            Err(error) => {
                silent.push(node);
                entries.push((format!("n{node}/error"), format!("{error}\n")));
            }
        }
    }
    Ok((entries, answered, silent))
}

async fn inspect(context: &Context, address: &str) -> Result<v1::InspectReply, ClientError> {
    let client = context.client_of([address.to_owned()]).await?;
    client.inspect(v1::InspectRequest {}).await
}

fn of_node(node: u64, reply: &v1::InspectReply) -> Vec<Entry> {
    let report = reply.report.clone().unwrap_or_default();
    let problems: Vec<Value> = report
        .problems
        .iter()
        .map(|problem| json!({ "code": problem.code, "text": problem.text, "since_ms": problem.since_ms }))
        .collect();
    let mut about = json::node(&report);
    about["version"] = json!(reply.version);
    about["uptime_ms"] = json!(reply.uptime_ms);
    about["problems"] = json!(problems);
    let settings = reply.settings.iter();
    let settings =
        settings.map(|setting| format!("{} = {:?}  # {}\n", setting.key, setting.value, setting.origin));
    let named = |name: &str| format!("n{node}/{name}");
    vec![
        json_entry(&named("node.json"), &about),
        (named("settings.toml"), settings.collect()),
        (named("metrics.txt"), reply.metrics.clone()),
        (named("log.jsonl"), reply.logs.iter().map(|line| format!("{line}\n")).collect()),
        (named("wal.txt"), reply.log_statistics.clone()),
    ]
}

fn json_entry(name: &str, value: &Value) -> Entry {
    (name.to_owned(), format!("{value:#}\n"))
}

fn status_json(status: &v1::StatusReply) -> Value {
    json!({
        "asked": status.node,
        "version": status.version,
        "meta_leader": status.meta_leader,
        "map_version": status.map_version,
        "predicates": status.predicates,
        "groups": status.groups,
        "under_replicated": status.under_replicated,
        "moves_running": status.moves_running,
        "nodes": status.nodes.iter().map(json::node).collect::<Vec<_>>(),
    })
}

fn group_problems(reply: &v1::GroupsReply) -> Value {
    let group = |group: &v1::GroupView| json!({ "group": group.group, "predicate": group.predicate, "problems": group.problems });
    json!({ "groups": reply.groups.iter().map(group).collect::<Vec<_>>(), "unreachable": reply.unreachable })
}

fn events(reply: &v1::EventsReply) -> String {
    let line = |event: &v1::Event| json!({ "seq": event.seq, "time_ms": event.time_ms, "text": event.text });
    reply.events.iter().map(|event| format!("{}\n", line(event))).collect()
}

fn write(out: File, entries: &[Entry]) -> io::Result<()> {
    let mut archive = tar::Builder::new(GzEncoder::new(out, Compression::default()));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    for (name, content) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(now);
        archive.append_data(&mut header, format!("pontoon-debug/{name}"), content.as_bytes())?;
    }
    archive.into_inner()?.finish()?.sync_all()
}

async fn inspect_group(context: &Context, group: u64) -> Result<Done, Failure> {
    let request = v1::InspectGroupRequest { group, local: false };
    let reply = context.client().await?.inspect_group(request).await?;
    let mut rows = Vec::new();
    let mut members = Vec::new();
    for seen in &reply.replicas {
        let info = seen.replica.clone().unwrap_or_default();
        let depths = seen.depths.clone();
        let depth = |of: fn(&v1::ReplicaDepths) -> String| depths.as_ref().map_or("-".to_owned(), of);
        rows.push(vec![
            place(info.replica),
            if seen.sleeping { format!("{}, asleep", info.role) } else { info.role.clone() },
            info.term.to_string(),
            format!("{}..{}", info.first_index, info.last_index),
            info.persisted.to_string(),
            info.commit.to_string(),
            info.applied.to_string(),
            info.durable.to_string(),
            depth(|depths| depths.proposals.to_string()),
            depth(|depths| depths.reads.to_string()),
            depth(|depths| depths.held_messages.to_string()),
            depth(|depths| bytes(depths.unapplied_bytes)),
            depth(|depths| depths.writes_asked.saturating_sub(depths.writes_durable).to_string()),
            depth(|depths| bytes(depths.log_bytes)),
        ]);
        for progress in &info.progress {
            let flight = depths.iter().flat_map(|depths| &depths.flights);
            let flight =
                flight.copied().find(|flight| flight.replica == progress.replica).unwrap_or_default();
            members.push(vec![
                place(progress.replica),
                progress.matched.to_string(),
                info.last_index.saturating_sub(progress.matched).to_string(),
                flight.appends.to_string(),
                bytes(flight.bytes),
                match (progress.active, progress.snapshot) {
                    (false, _) => "silent".to_owned(),
                    (true, true) => "takes a state".to_owned(),
                    (true, false) => String::new(),
                },
            ]);
        }
    }
    let head = [
        "replica",
        "role",
        "term",
        "log",
        "persisted",
        "commit",
        "applied",
        "durable",
        "proposals",
        "reads",
        "held",
        "unapplied",
        "unsynced",
        "log bytes",
    ];
    let mut text = format!("{} (group {group})\n{}", reply.predicate, table(&head, &rows));
    if !members.is_empty() {
        let head = ["member, as its leader sees it", "matched", "behind", "appends", "under way", ""];
        text.push_str(&format!("\n\n{}", table(&head, &members)));
    }
    let dead =
        reply.replicas.iter().filter_map(|seen| seen.replica.as_ref()).filter(|info| !info.dead.is_empty());
    for info in dead {
        text.push_str(&format!("\n{} is dead: {}", place(info.replica), info.dead));
    }
    if !reply.unreachable.is_empty() {
        text.push_str(&format!("\n{} did not answer", named(&reply.unreachable)));
    }
    let json = json!({
        "group": group,
        "predicate": reply.predicate,
        "replicas": reply.replicas.iter().map(replica_json).collect::<Vec<_>>(),
        "unreachable": reply.unreachable,
    });
    Ok(Done::new(text, json))
}

fn replica_json(seen: &v1::InspectedReplica) -> Value {
    let info = seen.replica.clone().unwrap_or_default();
    let progress: Vec<Value> = info
        .progress
        .iter()
        .map(|progress| {
            json!({
                "replica": place(progress.replica),
                "matched": progress.matched,
                "snapshot": progress.snapshot,
                "active": progress.active,
            })
        })
        .collect();
    let depths = seen.depths.as_ref().map(|depths| {
        let flight = |flight: &v1::ReplicaFlight| {
            json!({ "replica": place(flight.replica), "appends": flight.appends, "bytes": flight.bytes })
        };
        json!({
            "proposals": depths.proposals,
            "reads": depths.reads,
            "held_messages": depths.held_messages,
            "committed": depths.committed,
            "unapplied_bytes": depths.unapplied_bytes,
            "writes_asked": depths.writes_asked,
            "writes_durable": depths.writes_durable,
            "log_bytes": depths.log_bytes,
            "flights": depths.flights.iter().map(flight).collect::<Vec<_>>(),
        })
    });
    let conf = info.conf_state.clone().unwrap_or_default();
    let places = |ids: &[u64]| ids.iter().map(|&id| place(id)).collect::<Vec<_>>();
    json!({
        "node": seen.node,
        "replica": place(info.replica),
        "role": info.role,
        "sleeping": seen.sleeping,
        "term": info.term,
        "leader": place(info.leader),
        "first_index": info.first_index,
        "last_index": info.last_index,
        "persisted": info.persisted,
        "commit": info.commit,
        "applied": info.applied,
        "durable": info.durable,
        "epoch": info.epoch,
        "voters": places(&conf.voters),
        "learners": places(&conf.learners),
        "voters_outgoing": places(&conf.voters_outgoing),
        "progress": progress,
        "pull_blocked": info.pull_blocked,
        "dead": info.dead,
        "depths": depths,
    })
}
