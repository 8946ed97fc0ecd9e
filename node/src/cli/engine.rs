//! `pontoon engine status|switch`.
//!
//! A switch takes one node after the other, in the order of their ids: it gives the node the wish, waits until
//! every group is whole, says that the node is to be started again, and goes on when the node has started with the other engine and everything is durable in it. It keeps nothing: what each node
//! says of itself is all that it goes by, so it may be ended and begun again anywhere.

use std::time::Duration;

use clap::{Args, Subcommand};
use pontoon_node::client::Client;
use pontoon_proto::{NodeId, v1};
use pontoon_shard::EngineKind;
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::{Context, Done, Failure, Say, engine, node_id, output::table};

const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How long one node may take to answer.
const ANSWER: Duration = Duration::from_secs(5);

#[derive(Debug, Subcommand)]
pub(super) enum EngineCommand {
    /// The engine of each node, and what its next start changes to.
    Status,
    /// Change the engine, one node after the other. Each takes its states from the others; run it again to go on.
    Switch(SwitchArgs),
}

#[derive(Debug, Args)]
pub(super) struct SwitchArgs {
    /// fjall or sled.
    #[arg(value_parser = engine)]
    engine: EngineKind,
    /// Only these nodes, by commas; all without.
    #[arg(long, value_name = "NODES", value_delimiter = ',', value_parser = node_id)]
    node: Vec<NodeId>,
    /// How many seconds each node may take until it has been started again and has its states: exit code 4 then.
    #[arg(long, value_name = "SECONDS", default_value_t = 3_600)]
    wait: u64,
}

pub(super) async fn run(context: &Context, command: EngineCommand) -> Result<Done, Failure> {
    let client = context.client().await?;
    match command {
        EngineCommand::Status => status(&client).await,
        EngineCommand::Switch(args) => switch(context, &client, args).await,
    }
}

/// A node, and what it says of its engine; why it says nothing, if it does not.
struct Seen {
    node: v1::Node,
    said: Result<v1::EngineReply, String>,
}

async fn look(client: &Client) -> Result<Vec<Seen>, Failure> {
    let views = client.nodes(v1::NodesRequest {}).await?.nodes;
    let nodes = views.into_iter().filter_map(|view| view.node);
    let mut seen = Vec::new();
    for node in nodes.filter(|node| node.state() != v1::NodeState::Removed) {
        let said = ask(client, &node.address, "").await.map_err(|failure| failure.text);
        seen.push(Seen { node, said });
    }
    seen.sort_by_key(|seen| seen.node.id);
    Ok(seen)
}

async fn ask(client: &Client, address: &str, wish: &str) -> Result<v1::EngineReply, Failure> {
    let asked = client.engine_at(address, wish);
    match tokio::time::timeout(ANSWER, asked).await {
        Ok(reply) => Ok(reply?),
        Err(_) => Err(Failure::error(format!("{address} does not answer"))),
    }
}

async fn status(client: &Client) -> Result<Done, Failure> {
    let seen = look(client).await?;
    let row = |seen: &Seen| {
        let (node, address) = (format!("n{}", seen.node.id), seen.node.address.clone());
        match &seen.said {
            Ok(said) => {
                let aside = match said.aside.len() {
                    0 => String::new(),
                    _ => "takes its states over; the old engine is aside".to_owned(),
                };
                let told =
                    if said.told.is_empty() { String::new() } else { format!("started with {}", said.told) };
                let notes: Vec<String> =
                    [told, aside, said.problem.clone()].into_iter().filter(|note| !note.is_empty()).collect();
                vec![node, address, said.engine.clone(), said.wish.clone(), notes.join("; ")]
            }
            Err(why) => vec![node, address, seen.node.engine.clone(), String::new(), why.clone()],
        }
    };
    let rows: Vec<_> = seen.iter().map(row).collect();
    let json: Vec<_> = seen
        .iter()
        .map(|seen| match &seen.said {
            Ok(said) => json!({
                "node": seen.node.id,
                "address": seen.node.address,
                "engine": said.engine,
                "wish": said.wish,
                "told": said.told,
                "aside": said.aside,
                "problem": said.problem,
            }),
            Err(why) => json!({ "node": seen.node.id, "address": seen.node.address, "silent": why }),
        })
        .collect();
    Ok(Done::new(table(&["node", "address", "engine", "next start", ""], &rows), json!({ "nodes": json })))
}

async fn switch(context: &Context, client: &Client, args: SwitchArgs) -> Result<Done, Failure> {
    let wanted = args.engine.to_string();
    let say = Say::of(context);
    let seen = look(client).await?;
    if let Some(missing) = args.node.iter().find(|node| seen.iter().all(|seen| seen.node.id != node.get())) {
        let text = format!("there is no node {missing}; `pontoon nodes` lists them");
        return Err(Failure::new(Failure::REFUSED, text));
    }
    let chosen = seen.into_iter().map(|seen| seen.node);
    let chosen = chosen.filter(|node| args.node.is_empty() || args.node.iter().any(|id| id.get() == node.id));
    let (mut switched, mut already) = (Vec::new(), Vec::new());
    for node in chosen {
        let until = Instant::now() + Duration::from_secs(args.wait);
        let name = format!("n{}", node.id);
        let before = ask(client, &node.address, "").await?;
        if before.engine == wanted {
            if !before.wish.is_empty() {
                // A wish for the other one is taken back.
                ask(client, &node.address, &wanted).await?;
            }
            settled(client, &node, &wanted, until).await?;
            already.push(name);
            continue;
        }
        let reply = ask(client, &node.address, &wanted).await?;
        whole(client, until).await?;
        if reply.wish != wanted {
            return Err(Failure::error(format!("{name} does not keep the wish for {wanted}")));
        }
        say.step(&format!("restart {name} ({}) now: it starts with {wanted}", node.address));
        settled(client, &node, &wanted, until).await?;
        say.step(&format!("{name} has {wanted}, and all its states in it"));
        switched.push(name);
    }
    whole(client, Instant::now() + Duration::from_secs(args.wait)).await?;
    let mut text = match switched.is_empty() {
        true => String::new(),
        false => format!("{} changed to {wanted}", switched.join(", ")),
    };
    if !already.is_empty() {
        let gap = if text.is_empty() { "" } else { "; " };
        text.push_str(&format!("{gap}{} had it already", already.join(", ")));
    }
    Ok(Done::new(text, json!({ "engine": wanted, "switched": switched, "already": already })))
}

/// Waits until nothing is wrong with any group: of what one node is about to lose, others have all.
async fn whole(client: &Client, until: Instant) -> Result<(), Failure> {
    loop {
        let reply = client.groups(v1::GroupsRequest { problem: true, ..Default::default() }).await?;
        if reply.groups.is_empty() && reply.unreachable.is_empty() {
            return Ok(());
        }
        if Instant::now() >= until {
            let silent: Vec<String> = reply.unreachable.iter().map(|node| format!("n{node}")).collect();
            let text = format!(
                "{} groups are not whole{}: no engine is changed meanwhile; see `pontoon groups --problem`, then run this again",
                reply.groups.len(),
                if silent.is_empty() {
                    String::new()
                } else {
                    format!(", {} do not answer", silent.join(", "))
                }
            );
            return Err(Failure::new(Failure::WAIT_ENDED, text));
        }
        sleep(LOOK_EVERY).await;
    }
}

/// Waits until a node has the engine and needs no old one.
async fn settled(client: &Client, node: &v1::Node, wanted: &str, until: Instant) -> Result<(), Failure> {
    loop {
        let waits = match ask(client, &node.address, "").await {
            Ok(said) if said.engine == wanted && said.aside.is_empty() => return Ok(()),
            Ok(said) if said.engine == wanted => "still takes its states over".to_owned(),
            Ok(said) if !said.problem.is_empty() => {
                let text = format!("n{} did not change its engine: {}", node.id, said.problem);
                return Err(Failure::new(Failure::STUCK, text));
            }
            Ok(said) => format!("was not started again yet, and has {}", said.engine),
            Err(failure) => format!("does not answer ({})", failure.text),
        };
        if Instant::now() >= until {
            let text = format!("n{} {waits}; run this again to go on", node.id);
            return Err(Failure::new(Failure::WAIT_ENDED, text));
        }
        sleep(LOOK_EVERY).await;
    }
}
