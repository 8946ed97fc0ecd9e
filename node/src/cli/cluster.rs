//! `pontoon status`, `nodes`, `predicates`, `predicate`, `groups`, `events`.

use std::time::{SystemTime, UNIX_EPOCH};

use clap::{Args, Subcommand};
use pontoon_node::json::{self, cluster_name, kind_of, moment, name_of, node_ids, place};
use pontoon_proto::{NodeId, v1};
use serde_json::{Value, json};

use super::{
    Context, Done, Failure,
    output::{bytes, counted, print_line, table},
    upgrade,
};

/// A certificate that is valid for fewer seconds is to be renewed.
const EXPIRES_SOON: i64 = 14 * 86_400;
/// How often what happened is asked for, by whoever follows it.
const FOLLOW_EVERY: std::time::Duration = std::time::Duration::from_millis(500);

#[derive(Debug, Subcommand)]
pub(super) enum PredicateCommand {
    /// Make a predicate, if it does not exist.
    Create {
        /// The name.
        name: String,
        /// How many replicas it shall have; 0: three.
        #[arg(long, default_value_t = 0)]
        replicas: u32,
    },
    /// Drop a predicate with all its rows.
    Drop {
        /// The name.
        name: String,
    },
}

#[derive(Debug, Args)]
pub(super) struct GroupsArgs {
    /// Only groups with a problem, with what to do about it.
    #[arg(long)]
    problem: bool,
}

#[derive(Debug, Args)]
pub(super) struct EventsArgs {
    /// Only events above this number.
    #[arg(long, default_value_t = 0)]
    after: u64,
    /// At most so many.
    #[arg(long, default_value_t = 100)]
    limit: u32,
    /// Go on with what happens from now on, until Ctrl-C. With --json each event is an object on a line.
    #[arg(long)]
    follow: bool,
}

pub(super) async fn status(context: &Context) -> Result<Done, Failure> {
    let status = context.client().await?.status(v1::StatusRequest {}).await?;
    let cluster = cluster_name(&status.cluster);
    let mut text = format!(
        "cluster {cluster}\nnode {} at {}, version {}, engine {}, up {}\n{}\n{} in {}, {} under-replicated, {} running\n\n{}",
        status.node,
        status.address,
        status.version,
        status.engine,
        duration(status.uptime_ms),
        match status.meta_leader {
            0 => "nobody is known to lead the meta group".to_owned(),
            node => format!("the meta group is led by node {node}"),
        },
        counted(status.predicates, "predicate"),
        counted(status.groups, "group"),
        status.under_replicated,
        counted(status.moves_running, "move"),
        node_table(&status.nodes),
    );
    if status.under_replicated > 0 || status.nodes.iter().any(|view| !view.reachable) {
        text.push_str("\n`pontoon status --problems` says what is wrong, and what to do about it");
    }
    text.push_str(&upgrade::note(&status));
    text.push_str(&node_problems(&status.nodes));
    for dead in &status.dead {
        text.push_str(&format!(
            "\nthe replica of {} (group {}) is dead: {}",
            dead.predicate, dead.group, dead.reason
        ));
    }
    let dead: Vec<Value> = status
        .dead
        .iter()
        .map(|dead| json!({ "group": dead.group, "predicate": dead.predicate, "reason": dead.reason }))
        .collect();
    let json = json!({
        "cluster": cluster,
        "node": status.node,
        "address": status.address,
        "version": status.version,
        "cluster_version": status.cluster_version.max(1),
        "engine": status.engine,
        "meta_leader": status.meta_leader,
        "map_version": status.map_version,
        "predicates": status.predicates,
        "groups": status.groups,
        "under_replicated": status.under_replicated,
        "moves_running": status.moves_running,
        "uptime_ms": status.uptime_ms,
        "nodes": status.nodes.iter().map(json::node).collect::<Vec<_>>(),
        "dead": dead,
    });
    Ok(Done::new(text, json))
}

pub(super) async fn nodes(context: &Context) -> Result<Done, Failure> {
    let reply = context.client().await?.nodes(v1::NodesRequest {}).await?;
    let json = json!({ "nodes": reply.nodes.iter().map(json::node).collect::<Vec<_>>() });
    Ok(Done::new(node_table(&reply.nodes) + &node_problems(&reply.nodes), json))
}

pub(super) async fn predicates(context: &Context) -> Result<Done, Failure> {
    let reply = context.client().await?.predicates(v1::PredicatesRequest::default()).await?;
    let rows: Vec<Vec<String>> = reply
        .predicates
        .iter()
        .map(|view| {
            let shard = view.shard.clone().unwrap_or_default();
            vec![
                shard.predicate.clone(),
                kind_of(&shard),
                shard.group.to_string(),
                name_of(shard.state().as_str_name(), "SHARD_STATE_"),
                match shard.learners.is_empty() {
                    true => places(&shard.voters),
                    false => format!("{} +{}", places(&shard.voters), places(&shard.learners)),
                },
                match view.leader_node {
                    0 => "-".to_owned(),
                    node => node.to_string(),
                },
                bytes(view.bytes),
                match (view.r#move, view.under_replicated) {
                    (0, false) => String::new(),
                    (0, true) => "under-replicated".to_owned(),
                    (id, _) => format!("move {id}"),
                },
            ]
        })
        .collect();
    let json: Vec<Value> = reply
        .predicates
        .iter()
        .map(|view| {
            let shard = view.shard.clone().unwrap_or_default();
            json!({
                "predicate": shard.predicate,
                "kind": kind_of(&shard),
                "group": shard.group,
                "epoch": shard.epoch,
                "state": name_of(shard.state().as_str_name(), "SHARD_STATE_"),
                "nodes": node_ids(&shard.voters),
                "learners": node_ids(&shard.learners),
                "leader": view.leader_node,
                "under_replicated": view.under_replicated,
                "bytes": view.bytes,
                "move": view.r#move,
            })
        })
        .collect();
    let text = table(&["predicate", "kind", "group", "state", "nodes", "leader", "bytes", ""], &rows);
    Ok(Done::new(text, json!({ "predicates": json })))
}

pub(super) async fn predicate(context: &Context, command: PredicateCommand) -> Result<Done, Failure> {
    let client = context.client().await?;
    match command {
        PredicateCommand::Create { name, replicas } => {
            let request =
                v1::CreatePredicateRequest { predicate: name.clone(), replicas, ..Default::default() };
            let shard = client.create_predicate(request).await?.shard.unwrap_or_default();
            let nodes = node_ids(&shard.voters);
            Ok(Done::new(
                format!("{name} is served by group {} on nodes {}", shard.group, places(&shard.voters)),
                json!({ "predicate": name, "group": shard.group, "nodes": nodes }),
            ))
        }
        PredicateCommand::Drop { name } => {
            client
                .drop_predicate(v1::DropPredicateRequest { predicate: name.clone(), ..Default::default() })
                .await?;
            Ok(Done::new(format!("{name} is dropped"), json!({ "predicate": name, "dropped": true })))
        }
    }
}

pub(super) async fn decommission(context: &Context, node: NodeId) -> Result<Done, Failure> {
    let request = v1::DecommissionRequest { node: node.get(), hops: 0 };
    let replicas = context.client().await?.decommission(request).await?.replicas;
    let text = match replicas {
        0 => format!("{node} is removed; it held nothing"),
        _ => format!(
            "{node} is removed; its {replicas} replicas are made anew where there is room; `pontoon groups --problem` shows \
             what is left to do"
        ),
    };
    Ok(Done::new(text, json!({ "node": node.get(), "removed": true, "replicas": replicas })))
}

pub(super) async fn groups(context: &Context, args: GroupsArgs) -> Result<Done, Failure> {
    let request = v1::GroupsRequest { problem: args.problem, ..Default::default() };
    let reply = context.client().await?.groups(request).await?;
    let mut rows = Vec::new();
    for group in &reply.groups {
        for replica in &group.replicas {
            rows.push(vec![
                group.group.to_string(),
                group.predicate.clone(),
                place(replica.replica),
                replica.role.clone(),
                replica.term.to_string(),
                replica.commit.to_string(),
                replica.applied.to_string(),
                replica.last_index.saturating_sub(replica.applied).to_string(),
                bytes(replica.bytes),
            ]);
        }
    }
    let head = ["group", "predicate", "replica", "role", "term", "commit", "applied", "lag", "bytes"];
    let mut text = match (args.problem, rows.is_empty()) {
        (true, true) => "no group has a problem".to_owned(),
        _ => table(&head, &rows),
    };
    for group in reply.groups.iter().filter(|group| !group.problems.is_empty()) {
        text.push_str(&format!(
            "\n{} (group {}): {}",
            group.predicate,
            group.group,
            group.problems.join("; ")
        ));
    }
    if !reply.unreachable.is_empty() {
        text.push_str(&format!("\nnodes that did not answer: {:?}", reply.unreachable));
    }
    let groups: Vec<Value> = reply
        .groups
        .iter()
        .map(|group| {
            json!({
                "group": group.group,
                "predicate": group.predicate,
                "leader": group.leader_node,
                "replicas": group.replicas.iter().map(json::replica).collect::<Vec<_>>(),
                "problems": group.problems,
            })
        })
        .collect();
    Ok(Done::new(text, json!({ "groups": groups, "unreachable": reply.unreachable })))
}

pub(super) async fn events(context: &Context, args: EventsArgs) -> Result<Done, Failure> {
    let client = context.client().await?;
    let mut request = v1::EventsRequest { after: args.after, limit: args.limit, hops: 0 };
    let line = |event: &v1::Event| format!("{:>6}  {}  {}", event.seq, moment(event.time_ms), event.text);
    let json = |event: &v1::Event| json!({ "seq": event.seq, "time_ms": event.time_ms, "text": event.text });
    loop {
        let reply = client.events(request).await?;
        if !args.follow {
            let text: Vec<String> = reply.events.iter().map(line).collect();
            let events: Vec<Value> = reply.events.iter().map(json).collect();
            return Ok(Done::new(text.join("\n"), json!({ "events": events })));
        }
        for event in &reply.events {
            print_line(&if context.json { json(event).to_string() } else { line(event) });
            request.after = event.seq;
        }
        tokio::time::sleep(FOLLOW_EVERY).await;
    }
}

pub(super) fn places(replicas: &[u64]) -> String {
    let mut nodes = node_ids(replicas);
    nodes.sort_unstable();
    nodes.iter().map(u64::to_string).collect::<Vec<_>>().join(",")
}

fn node_table(nodes: &[v1::NodeView]) -> String {
    let rows: Vec<Vec<String>> = nodes
        .iter()
        .map(|view| {
            let node = view.node.clone().unwrap_or_default();
            // Of one that does not answer nothing is known.
            let known = |text: String| if view.reachable { text } else { "-".to_owned() };
            vec![
                node.id.to_string(),
                node.address.clone(),
                match (view.reachable, view.room()) {
                    (false, _) => "does not answer".to_owned(),
                    (true, v1::NodeRoom::Ample) => name_of(node.state().as_str_name(), "NODE_STATE_"),
                    (true, _) => "disk nearly full".to_owned(),
                },
                node.engine.clone(),
                known(view.replicas.to_string()),
                known(view.leaders.to_string()),
                known(bytes(view.wal_bytes)),
                known(bytes(view.engine_bytes)),
                known(bytes(view.disk_free_bytes)),
            ]
        })
        .collect();
    table(&["node", "address", "state", "engine", "replicas", "leaders", "log", "data", "disk free"], &rows)
}

/// A line for each thing at a node that wants a hand and is no group's problem.
fn node_problems(nodes: &[v1::NodeView]) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs().cast_signed());
    let mut text = String::new();
    for view in nodes {
        let node = view.node.as_ref().map_or(0, |node| node.id);
        if !view.audit_problem.is_empty() {
            let problem = &view.audit_problem;
            text.push_str(&format!("\nn{node} does not write down who changes what: {problem}"));
        }
        let left = view.certificate_expires - now;
        if view.certificate_expires != 0 && left < EXPIRES_SOON {
            let days = left.div_euclid(86_400);
            text.push_str(&format!(
                "\nthe certificate of n{node} is valid for {days} more days: `pontoon certs node --dir DIR --id {node} --renew` \
                 makes a new one, which the node takes up by itself"
            ));
        }
    }
    text
}

pub(super) fn duration(ms: u64) -> String {
    match ms {
        0..10_000 => format!("{:.1} s", ms as f64 / 1000.0),
        10_000..600_000 => format!("{} s", ms / 1000),
        _ => format!("{} min", ms / 60_000),
    }
}
