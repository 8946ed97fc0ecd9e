//! `pontoon node`.

use std::{collections::BTreeMap, path::PathBuf};

use clap::Args;
use pontoon_node::{LogFormat, Node, NodeConfig, init_logs, shutdown_signal};
use pontoon_proto::NodeId;
use pontoon_raftstore::SnapshotBudget;
use serde_json::json;

use super::{Context, DirArgs, Done, EngineArgs, Failure, node_id, print_line};

#[derive(Debug, Args)]
pub(super) struct NodeArgs {
    #[command(flatten)]
    dir: DirArgs,
    /// HOST:PORT to listen on, loopback only without TLS; port 0 takes a free one.
    #[arg(long)]
    listen: String,
    /// HOST:PORT by which others reach this node, if not by --listen: its certificate must name that host.
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// How many connections there may be at once. With TLS an eighth is for nodes and operators alone. Default: 4096.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(8..))]
    max_connections: Option<u32>,
    /// Any node of the cluster to join. Only needed at the first start.
    #[arg(long)]
    join: Option<String>,
    #[command(flatten)]
    engine: EngineArgs,
    /// Where the log lies, if not in the data directory.
    #[arg(long)]
    wal_dir: Option<PathBuf>,
    /// The key file with which the log is encrypted (`pontoon wal key new` makes one). Engine and staged snapshots are not.
    #[arg(long, value_name = "FILE")]
    wal_keys: Option<PathBuf>,
    /// The node that is lost and whose place this one takes: it is removed for ever, its replicas are made anew.
    #[arg(long, value_name = "NODE", value_parser = node_id, requires = "join")]
    replace: Option<NodeId>,
    /// For placement, as in zone=a. May be repeated.
    #[arg(long, value_parser = label)]
    label: Vec<(String, String)>,
    /// Bytes of disk to keep free; below that the node takes no writes. Default: 512 MiB, or a tenth of a smaller disk.
    #[arg(long, value_name = "BYTES")]
    disk_reserve: Option<u64>,
    /// What snapshots may take of this node: slow, normal, fast, max, or bytes per second.
    #[arg(long, value_name = "BUDGET", default_value = "normal")]
    snapshot_budget: SnapshotBudget,
    /// Linearizable reads from the leader's lease, without asking a quorum each time. It trusts clocks: those of the nodes must
    /// not drift apart by a tenth, nor stand still while a machine is suspended. Start all nodes alike.
    #[arg(long)]
    leader_lease: bool,
    /// Logs as one JSON object per line. PONTOON_LOG filters them.
    #[arg(long)]
    log_json: bool,
    /// End when the process that started this one ends.
    #[arg(long, hide = true)]
    end_with_parent: bool,
}

pub(super) async fn run(context: &Context, args: NodeArgs) -> Result<Done, Failure> {
    if args.end_with_parent {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
            .map_err(|error| Failure::error(format!("the parent's end cannot be watched: {error}")))?;
    }
    init_logs(if args.log_json { LogFormat::Json } else { LogFormat::Text }, "info");
    let mut config = NodeConfig::new(&args.dir.dir, args.listen);
    config.tls = context.tls.clone();
    config.advertise = args.advertise;
    if let Some(most) = args.max_connections {
        config.max_connections = most as usize;
    }
    config.join = args.join;
    config.engine = args.engine.engine;
    config.wal_dir = args.wal_dir;
    config.wal_keys = args.wal_keys;
    config.raft.leader_lease = args.leader_lease;
    config.raft.snapshots = args.snapshot_budget;
    config.replace = args.replace;
    config.disk_reserve_bytes = args.disk_reserve;
    config.labels = args.label.into_iter().collect::<BTreeMap<_, _>>();
    // One listener for the whole run: a signal between two of them would be missed.
    let mut signal = std::pin::pin!(shutdown_signal());
    // A signal during the start ends the process as it is: what is on disk is taken up again.
    let node = tokio::select! {
        biased;
        signal = &mut signal => return Ok(Done::new("", json!({ "ended_by": signal.unwrap_or("a signal") }))),
        node = Node::start(config) => node?,
    };
    let (id, address) = (node.id().get(), node.address().to_owned());
    print_line(&match context.json {
        true => json!({ "node": id, "address": address, "cluster": node.cluster().to_string() }).to_string(),
        false => format!("node {id} of cluster {} serves on {address}", node.cluster()),
    });
    let signal = tokio::select! {
        signal = &mut signal => {
            signal.map_err(|error| Failure::error(format!("signals cannot be heard: {error}")))?
        }
        reason = node.failed() => {
            // What is acknowledged is durable; how the rest closes adds nothing to the reason.
            drop(node.shutdown().await);
            return Err(Failure::error(format!("node {id} cannot go on: {reason}")));
        }
    };
    tracing::info!(signal, "ending");
    node.shutdown().await?;
    Ok(Done::new(
        format!("node {id} ended by {signal}"),
        json!({ "node": id, "address": address, "ended_by": signal }),
    ))
}

fn label(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("a label is NAME=VALUE, as in zone=a")?;
    Ok((name.to_owned(), value.to_owned()))
}
