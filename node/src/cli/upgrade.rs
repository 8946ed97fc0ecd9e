//! `pontoon upgrade`, `pontoon version`.

use clap::Subcommand;
use pontoon_proto::v1;
use pontoon_shard::{Feature, Versions};
use serde_json::{Value, json};

use super::{Context, Done, Failure, output::table};

#[derive(Debug, Subcommand)]
pub(super) enum UpgradeCommand {
    /// What each node speaks, the cluster's version, what the next one would turn on and what is in its way.
    Status,
    /// Turn the next version on, for ever: nodes of the release before cannot come back.
    ///
    /// Refused while a node does not speak it, or does not answer.
    Finalise {
        /// The version that is meant, as `pontoon upgrade status` shows it; without it the next one.
        #[arg(value_name = "VERSION")]
        to: Option<u32>,
    },
}

pub(super) async fn run(context: &Context, command: UpgradeCommand) -> Result<Done, Failure> {
    let client = context.client().await?;
    match command {
        UpgradeCommand::Status => {
            let reply = client.upgrade_status(v1::UpgradeStatusRequest {}).await?;
            Ok(Done::new(words(&reply), to_json(&reply)))
        }
        UpgradeCommand::Finalise { to } => {
            let request = v1::UpgradeFinaliseRequest { version: to.unwrap_or(0), hops: 0 };
            let reply = client.upgrade_finalise(request).await?;
            let now = reply.cluster_version;
            let text = format!(
                "the cluster is at version {now}: nodes of the release before are not taken any more"
            );
            Ok(Done::new(text, to_json(&reply)))
        }
    }
}

fn speaks(oldest: u32, newest: u32) -> String {
    Versions::said(oldest, newest).to_string()
}

fn words(reply: &v1::UpgradeStatusReply) -> String {
    let rows: Vec<Vec<String>> = reply
        .nodes
        .iter()
        .map(|node| {
            vec![
                node.node.to_string(),
                node.address.clone(),
                match (node.reachable, node.version.is_empty()) {
                    (false, _) => "does not answer".to_owned(),
                    (true, true) => "older".to_owned(),
                    (true, false) => node.version.clone(),
                },
                speaks(node.oldest_version, node.newest_version),
            ]
        })
        .collect();
    let mut text = format!("the cluster is at version {}\n\n", reply.cluster_version);
    text.push_str(&table(&["node", "address", "binary", "speaks"], &rows));
    if reply.next_version == 0 {
        text.push_str("\n\nno node speaks a later version");
        return text;
    }
    text.push_str(&format!("\n\nversion {} would turn on:", reply.next_version));
    for feature in &reply.turns_on {
        text.push_str(&format!("\n  {}: {}", feature.name, feature.changes));
    }
    match reply.in_the_way.is_empty() {
        true => text.push_str(
            "\nnothing is in its way: `pontoon upgrade finalise` turns it on, for ever; until then nodes may go back to the release \
             before",
        ),
        false => text.push_str("\nin its way:"),
    }
    for way in &reply.in_the_way {
        text.push_str(&format!("\n  {way}"));
    }
    text
}

fn to_json(reply: &v1::UpgradeStatusReply) -> Value {
    let nodes = reply.nodes.iter().map(|node| {
        json!({
            "node": node.node,
            "address": node.address,
            "reachable": node.reachable,
            "version": node.version,
            "oldest_version": node.oldest_version,
            "newest_version": node.newest_version,
        })
    });
    let turns_on = reply.turns_on.iter();
    let turns_on = turns_on.map(|feature| json!({ "name": feature.name, "changes": feature.changes }));
    json!({
        "cluster_version": reply.cluster_version,
        "nodes": nodes.collect::<Vec<_>>(),
        "next_version": reply.next_version,
        "turns_on": turns_on.collect::<Vec<_>>(),
        "in_the_way": reply.in_the_way,
    })
}

/// A line for `pontoon status` while nodes differ, or speak what is not finalised; empty else.
pub(super) fn note(status: &v1::StatusReply) -> String {
    let now = status.cluster_version.max(1);
    let newest = status.nodes.iter().filter(|view| view.reachable).map(|view| view.newest_version.max(1));
    let Some((least, most)) = newest.clone().min().zip(newest.max()).filter(|(_, most)| *most > now) else {
        return String::new();
    };
    let state = match least > now {
        true => format!("all nodes that answer speak {}", now + 1),
        false => format!("some nodes speak {most}, others {least}"),
    };
    format!("\n\nthe cluster is at version {now}; {state}: `pontoon upgrade status` says what is left to do")
}

pub(super) fn version() -> Done {
    let (version, ours) = (env!("CARGO_PKG_VERSION"), Versions::OURS);
    let mut text = format!("pontoon {version} speaks cluster versions {ours}");
    for feature in Feature::ALL {
        text.push_str(&format!("\n  {}: {}: {}", feature.since(), feature.name(), feature.changes()));
    }
    let features: Vec<Value> = Feature::ALL
        .iter()
        .map(|feature| json!({ "since": feature.since(), "name": feature.name(), "changes": feature.changes() }))
        .collect();
    let json = json!({
        "version": version,
        "oldest_version": ours.oldest,
        "newest_version": ours.newest,
        "features": features,
    });
    Done::new(text, json)
}
