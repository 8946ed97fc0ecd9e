//! `pontoon node`.

use std::{path::PathBuf, sync::Arc};

use clap::Args;
use pontoon_node::{
    Node, send_logs, send_logs_and_spans,
    settings::{Settings, SettingsError},
    shutdown_signal,
};
use pontoon_proto::NodeId;
use serde_json::json;

use super::{Context, Done, Failure, node_id, notify, print_line};

/// Flags that are settings are kept as they were written: [`Settings`] reads them like lines of the file.
#[derive(Debug, Args)]
pub(super) struct NodeArgs {
    /// A configuration file; variables and flags win over it. `pontoon config default` prints one.
    #[arg(long, value_name = "FILE", env = "PONTOON_CONFIG")]
    config: Option<PathBuf>,
    /// The data directory.
    #[arg(long)]
    dir: Option<String>,
    /// HOST:PORT to listen on, loopback only without TLS; port 0 takes a free one.
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// HOST:PORT that others reach this node by, if not the one that it listens on.
    #[arg(long, value_name = "ADDR")]
    advertise: Option<String>,
    /// How many connections there may be at once. With TLS an eighth is for nodes and operators alone. Default: 4096.
    #[arg(long, value_name = "COUNT")]
    max_connections: Option<String>,
    /// Any node of the cluster to join. Only needed at the first start, and when all nodes have moved to other addresses.
    #[arg(long, value_name = "ADDR")]
    join: Option<String>,
    /// fjall (the default) or sled.
    #[arg(long)]
    engine: Option<String>,
    /// Where the log lies, if not in the data directory.
    #[arg(long, value_name = "DIR")]
    wal_dir: Option<String>,
    /// The key file with which the log is encrypted (`pontoon wal key new` makes one). Engine and staged snapshots are not.
    #[arg(long, value_name = "FILE")]
    wal_keys: Option<String>,
    /// The node that is lost and whose place this one takes: it is removed for ever, its replicas are made anew.
    #[arg(long, value_name = "NODE", value_parser = node_id, requires = "join")]
    replace: Option<NodeId>,
    /// For placement, as in zone=a. May be repeated.
    #[arg(long, value_name = "NAME=VALUE")]
    label: Vec<String>,
    /// Disk to keep free; below that the node takes no writes. Default: 512 MiB, or a tenth of a smaller disk.
    #[arg(long, value_name = "SIZE")]
    disk_reserve: Option<String>,
    /// What snapshots may take of this node: slow, normal (the default), fast, max, or bytes per second.
    #[arg(long, value_name = "BUDGET")]
    snapshot_budget: Option<String>,
    /// Linearizable reads from the leader's lease, without asking a quorum each time. It trusts clocks: those of the nodes must
    /// not drift apart by a tenth, nor stand still while a machine is suspended. Start all nodes alike.
    #[arg(long)]
    leader_lease: bool,
    /// How log lines look: text (the default) or json. PONTOON_LOG filters them.
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<String>,
    /// Any setting of the file, as in raft.tick=50ms. May be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Play a binary that speaks no later cluster version: for tests of upgrades.
    #[arg(long, hide = true)]
    newest_version: Option<u32>,
    /// End when the process that started this one ends.
    #[arg(long, hide = true)]
    end_with_parent: bool,
}

impl NodeArgs {
    /// The file, then the environment, then the flags; with warnings that are to be told.
    fn settings(&self, context: &Context) -> Result<(Settings, Vec<String>), SettingsError> {
        let mut settings = Settings::default();
        if let Some(path) = &self.config {
            settings.file(path)?;
        }
        // What is not UTF-8 is none of ours.
        let variables = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        let warnings = settings.variables(variables)?;
        let flags = [
            ("--dir", &self.dir),
            ("--listen", &self.listen),
            ("--advertise", &self.advertise),
            ("--join", &self.join),
            ("--engine", &self.engine),
            ("--wal-dir", &self.wal_dir),
            ("--wal-keys", &self.wal_keys),
            ("--disk-reserve", &self.disk_reserve),
            ("--snapshot-budget", &self.snapshot_budget),
            ("--log-format", &self.log_format),
            ("--max-connections", &self.max_connections),
        ];
        let flags = flags.into_iter().filter_map(|(flag, value)| Some((flag, value.as_deref()?)));
        let labels = self.label.iter().map(|label| ("--label", label.as_str()));
        let lease = self.leader_lease.then_some(("--leader-lease", "true"));
        // Every command has these; a path that is not UTF-8 is told as one that is not there.
        let tls = context.tls.iter().flat_map(|tls| {
            [("--tls-cert", &tls.cert), ("--tls-key", &tls.key), ("--tls-ca", &tls.ca)]
                .map(|(flag, path)| (flag, path.to_string_lossy().into_owned()))
        });
        for (flag, value) in tls {
            settings.flag(flag, &value)?;
        }
        let others = self.set.iter().map(|set| ("--set", set.as_str()));
        for (flag, value) in others.chain(flags).chain(labels).chain(lease) {
            settings.flag(flag, value)?;
        }
        Ok((settings, warnings))
    }
}

pub(super) async fn run(context: &Context, args: NodeArgs) -> Result<Done, Failure> {
    if args.end_with_parent {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
            .map_err(|error| Failure::error(format!("the parent's end cannot be watched: {error}")))?;
    }
    let (settings, warnings) = args.settings(context)?;
    let mut config = settings.check()?;
    config.replace = args.replace;
    config.heap = Some(Arc::new(crate::allocator::Profiler::new(&config.dir)));
    if let Some(newest) = args.newest_version {
        let ours = config.versions;
        config.versions = ours.up_to(newest).ok_or_else(|| {
            Failure::new(
                Failure::REFUSED,
                format!("cluster version {newest} is not among those of this binary, {ours}"),
            )
        })?;
    }
    let spans = match settings.spans() {
        Some(export) => {
            let sent = send_logs_and_spans(settings.log_format(), settings.log_filter(), &export);
            Some(sent.map_err(|reason| Failure::new(Failure::REFUSED, reason))?)
        }
        None => {
            send_logs(settings.log_format(), settings.log_filter());
            None
        }
    };
    for warning in warnings {
        tracing::warn!("{warning}");
    }
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
    notify::tell(notify::READY);
    let ended = tokio::select! {
        signal = &mut signal => {
            signal.map_err(|error| Failure::error(format!("signals cannot be heard: {error}")))
        }
        reason = node.failed() => Err(Failure::error(format!("node {id} cannot go on: {reason}"))),
    };
    notify::tell(notify::STOPPING);
    if let Ok(signal) = &ended {
        tracing::info!(signal, "ending");
    }
    let closed = node.shutdown().await;
    if let Some(spans) = spans {
        spans.finish().await;
    }
    let signal = ended?;
    // What is acknowledged is durable: of a node that failed, how it closes adds nothing to the reason.
    closed?;
    Ok(Done::new(
        format!("node {id} ended by {signal}"),
        json!({ "node": id, "address": address, "ended_by": signal }),
    ))
}
