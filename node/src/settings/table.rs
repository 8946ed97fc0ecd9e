//! All settings, each with its name, its default, what it does, and how a value of it is taken.

use pontoon_raftstore::SnapshotBudget;
use pontoon_shard::EngineKind;

use super::{
    PREFIX, Settings,
    value::{address, bytes, label, number, switch, time},
};
use crate::process::LogFormat;

/// Which log lines there are unless somebody says otherwise: what engines do in the course of things is not among them.
pub(super) const LOG_FILTER: &str = "info,fjall=warn,lsm_tree=warn";

/// The share of the writes whose spans are sent.
pub(super) const SPAN_SAMPLE: f64 = 0.01;

/// How a value is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Text,
    Path,
    Number,
    Share,
    Switch,
    Time,
    Size,
    /// A table of names and values.
    Labels,
}

impl Kind {
    pub(super) fn word(self) -> &'static str {
        match self {
            Kind::Text => "text",
            Kind::Path => "path",
            Kind::Number => "number",
            Kind::Share => "number from 0 to 1",
            Kind::Switch => "true or false",
            Kind::Time => "time",
            Kind::Size => "size",
            Kind::Labels => "table of texts",
        }
    }
}

/// One setting.
pub(super) struct Setting {
    /// With its table, as in `raft.tick`.
    pub(super) key: &'static str,
    pub(super) kind: Kind,
    /// As it would be written; empty: there is none, or it is found at the start.
    pub(super) default: &'static str,
    /// Its own flag; all can be set by `--set`.
    pub(super) flag: Option<&'static str>,
    /// A node does not start without it.
    pub(super) needed: bool,
    /// Sentences for the default file and the reference page.
    pub(super) help: &'static str,
    pub(super) set: fn(&mut Settings, &str) -> Result<(), String>,
}

impl Setting {
    /// The variable of the environment.
    pub(super) fn variable(&self) -> String {
        match self.key {
            // Older than the table, and what everybody would guess.
            "log.filter" => format!("{PREFIX}LOG"),
            key => format!("{PREFIX}{}", key.replace('.', "_").to_uppercase()),
        }
    }
}

const fn setting(
    key: &'static str,
    kind: Kind,
    default: &'static str,
    help: &'static str,
    set: fn(&mut Settings, &str) -> Result<(), String>,
) -> Setting {
    Setting { key, kind, default, flag: None, needed: false, help, set }
}

impl Setting {
    const fn with_flag(self, flag: &'static str) -> Setting {
        Setting { flag: Some(flag), ..self }
    }

    const fn needed(self) -> Setting {
        Setting { needed: true, ..self }
    }
}

/// Takes a value into a field.
macro_rules! into {
    (some $($field:ident).+, $read:expr) => {
        |settings, text| {
            settings.$($field).+ = Some($read(text)?);
            Ok(())
        }
    };
    ($($field:ident).+, $read:expr) => {
        |settings, text| {
            settings.$($field).+ = $read(text)?;
            Ok(())
        }
    };
}

fn path(text: &str) -> Result<std::path::PathBuf, String> {
    match text.is_empty() {
        true => Err("a path is expected".to_owned()),
        false => Ok(text.into()),
    }
}

fn listens(text: &str) -> Result<String, String> {
    address(text, true)
}

fn dials(text: &str) -> Result<String, String> {
    address(text, false)
}

fn budget(text: &str) -> Result<SnapshotBudget, String> {
    text.parse().map_err(|error: pontoon_raftstore::Error| error.to_string())
}

fn engine(text: &str) -> Result<EngineKind, String> {
    match text.parse() {
        Ok(engine @ (EngineKind::Fjall | EngineKind::Sled)) => Ok(engine),
        _ => Err("use fjall or sled".to_owned()),
    }
}

fn connections(text: &str) -> Result<usize, String> {
    match number(text) {
        Ok(most) if most >= 8 => Ok(most),
        Ok(_) => Err("8 or more are needed".to_owned()),
        Err(reason) => Err(reason),
    }
}

fn size_of_chunk(text: &str) -> Result<usize, String> {
    bytes(text).and_then(|bytes| usize::try_from(bytes).map_err(|error| error.to_string()))
}

fn log_format(text: &str) -> Result<LogFormat, String> {
    match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err("text or json is expected".to_owned()),
    }
}

fn endpoint(text: &str) -> Result<String, String> {
    match text.strip_prefix("http://") {
        Some(address) => self::address(address.trim_end_matches('/'), false).map(|_| text.to_owned()),
        None => {
            Err("http://HOST:PORT is expected, of a collector on this machine or in this network".to_owned())
        }
    }
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "a number from 0 to 1 is expected".to_owned())
}

fn log_filter(text: &str) -> Result<String, String> {
    match text.parse::<tracing_subscriber::EnvFilter>() {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(format!("{error}; a filter is as in info or pontoon_node=debug,warn")),
    }
}

/// In the order of the pages; settings of one table stand together.
pub(super) const TABLE: &[Setting] = &[
    setting("dir", Kind::Path, "", "The data directory. Made if it is missing; empty at the first start.", into!(node.dir, path))
        .with_flag("--dir")
        .needed(),
    setting(
        "listen",
        Kind::Text,
        "",
        "HOST:PORT to listen on, loopback only without TLS; port 0 takes a free one. It may change from start to start: the cluster is \
         told.",
        into!(node.listen, listens),
    )
    .with_flag("--listen")
    .needed(),
    setting(
        "advertise",
        Kind::Text,
        "",
        "HOST:PORT that others reach this node by, where that is not the address that it listens on: behind a forwarder, under a \
         name. Without it: the host of listen and the port that was bound. With TLS the certificate must name that host.",
        into!(some node.advertise, dials),
    )
    .with_flag("--advertise"),
    setting(
        "join",
        Kind::Text,
        "",
        "Any node of the cluster. At the first start it is joined, without it a new cluster is founded. Later it is only asked where \
         the others are, should all addresses have changed.",
        into!(some node.join, dials),
    )
    .with_flag("--join"),
    setting(
        "max_connections",
        Kind::Number,
        "4096",
        "How many connections there may be at once, 8 or more. With TLS an eighth of them is for nodes and operators alone.",
        into!(node.max_connections, connections),
    )
    .with_flag("--max-connections"),
    setting(
        "engine",
        Kind::Text,
        "",
        "What rows are stored with: fjall or sled. Without it the directory's, or fjall for a new one.",
        into!(some node.engine, engine),
    )
    .with_flag("--engine"),
    setting(
        "labels",
        Kind::Labels,
        "",
        "For placement: where this node is and what it has, as in zone = \"a\". The flag takes NAME=VALUE and may be repeated, the \
         variable several by commas.",
        |settings, text| {
            let (name, value) = label(text)?;
            settings.node.labels.insert(name, value);
            Ok(())
        },
    )
    .with_flag("--label"),
    setting(
        "tls.cert",
        Kind::Path,
        "",
        "The node's certificate, PEM; `pontoon certs` makes one. With it the node may listen anywhere, and whoever calls must show one of \
         the same authority. Files that are replaced are taken up without a restart.",
        into!(some tls.cert, path),
    )
    .with_flag("--tls-cert"),
    setting("tls.key", Kind::Path, "", "The certificate's private key, PEM.", into!(some tls.key, path))
        .with_flag("--tls-key"),
    setting("tls.ca", Kind::Path, "", "The cluster's authority, PEM.", into!(some tls.ca, path)).with_flag("--tls-ca"),
    setting("wal.dir", Kind::Path, "", "Where the shared log lies, if not in the data directory.", into!(some node.wal_dir, path))
        .with_flag("--wal-dir"),
    setting(
        "wal.keys",
        Kind::Path,
        "",
        "The key file with which the log is encrypted (`pontoon wal key new` makes one). Engine and staged snapshots are not.",
        into!(some node.wal_keys, path),
    )
    .with_flag("--wal-keys"),
    setting(
        "wal.segment",
        Kind::Size,
        "64MiB",
        "The size of a segment, a multiple of 4 KiB from 256 KiB to 1 GiB. An existing log keeps its own.",
        into!(some node.segment_bytes, bytes),
    ),
    setting(
        "disk.reserve",
        Kind::Size,
        "",
        "Disk to keep free; below that the node takes no writes. Without it 512 MiB, or a tenth of a disk smaller than 5 GiB.",
        into!(some node.disk_reserve_bytes, bytes),
    )
    .with_flag("--disk-reserve"),
    setting(
        "disk.capacity",
        Kind::Size,
        "0",
        "What the node may hold, for placement; 0 is not limited.",
        into!(node.capacity_bytes, bytes),
    ),
    setting(
        "snapshots.budget",
        Kind::Text,
        "normal",
        "What received states may take of this node: slow, normal, fast, max, or bytes per second.",
        into!(node.raft.snapshots, budget),
    )
    .with_flag("--snapshot-budget"),
    setting(
        "snapshots.chunk",
        Kind::Size,
        "4MiB",
        "The size that chunks of a state aim at. The same on all nodes, or a state that was received from one is of no use with another.",
        into!(node.raft.chunk_bytes, size_of_chunk),
    ),
    setting(
        "snapshots.chunk_window",
        Kind::Number,
        "1",
        "Chunks that a receiver asks for ahead. More than one pays where the way to the source is long.",
        into!(node.raft.chunk_window, number),
    ),
    setting(
        "raft.leader_lease",
        Kind::Switch,
        "false",
        "Linearizable reads from the leader's lease, without asking a quorum each time. It trusts clocks: those of the nodes must not \
         drift apart by a tenth, nor stand still while a machine is suspended. Start all nodes alike.",
        into!(node.raft.leader_lease, switch),
    )
    .with_flag("--leader-lease"),
    setting("raft.tick", Kind::Time, "100ms", "How often Raft's clock moves. The same on all nodes.", into!(node.raft.tick, time)),
    setting(
        "raft.heartbeat_ticks",
        Kind::Number,
        "3",
        "Ticks between a leader's heartbeats.",
        into!(node.raft.heartbeat_ticks, number),
    ),
    setting(
        "raft.election_ticks",
        Kind::Number,
        "10",
        "Ticks without a leader before a replica asks for votes.",
        into!(node.raft.election_ticks, number),
    ),
    setting(
        "raft.sleep_after_ticks",
        Kind::Number,
        "30",
        "Ticks without anything new after which a group sleeps; at least election_ticks. 0: never.",
        into!(node.raft.sleep_after_ticks, number),
    ),
    setting("raft.core_threads", Kind::Number, "1", "Threads that run consensus.", into!(node.raft.core_threads, number)),
    setting("raft.apply_threads", Kind::Number, "1", "Threads that apply what is committed.", into!(node.raft.apply_threads, number)),
    setting(
        "raft.max_entry",
        Kind::Size,
        "2MiB",
        "The largest command; at most a quarter of the log's batch.",
        into!(node.raft.max_entry_bytes, bytes),
    ),
    setting(
        "raft.max_uncommitted",
        Kind::Size,
        "32MiB",
        "Proposed and not committed, per group, above which commands are answered busy.",
        into!(node.raft.max_uncommitted_bytes, bytes),
    ),
    setting(
        "raft.max_unapplied",
        Kind::Size,
        "32MiB",
        "Committed and not applied, per group, above which commands are answered busy.",
        into!(node.raft.max_unapplied_bytes, bytes),
    ),
    setting(
        "raft.max_unapplied_node",
        Kind::Size,
        "256MiB",
        "The same over all groups of a consensus thread.",
        into!(node.raft.max_unapplied_node_bytes, bytes),
    ),
    setting(
        "raft.max_retained_entries",
        Kind::Number,
        "1048576",
        "Entries that a group's log may keep for members that lag; beyond it they take a snapshot.",
        into!(node.raft.max_retained_entries, number),
    ),
    setting("raft.max_retained", Kind::Size, "256MiB", "The same in bytes.", into!(node.raft.max_retained_bytes, bytes)),
    setting(
        "raft.flush_interval",
        Kind::Time,
        "1s",
        "How often the engine makes durable what was applied.",
        into!(node.raft.flush_interval, time),
    ),
    setting(
        "raft.session_ttl",
        Kind::Time,
        "1h",
        "A client's session whose last request is older expires. The same on all nodes.",
        into!(node.raft.session_ttl, time),
    ),
    setting(
        "upgrade.patience",
        Kind::Time,
        "24h",
        "How long nodes may differ in the cluster versions that they speak, or leave one unfinalised that all speak, until that is told \
         as a problem.",
        into!(node.upgrade_patience, time),
    ),
    setting(
        "metrics.top_groups",
        Kind::Number,
        "10",
        "For so many groups, the busiest, there are metrics of their own; all others are only counted together.",
        into!(node.top_groups, number),
    ),
    setting("log.format", Kind::Text, "text", "How log lines look: text or json.", into!(log_format, log_format))
        .with_flag("--log-format"),
    setting(
        "log.filter",
        Kind::Text,
        LOG_FILTER,
        "Which log lines there are, as in info or pontoon_raftstore=debug,info. Spans of writes and moves are at debug.",
        into!(log_filter, log_filter),
    ),
    setting(
        "otel.endpoint",
        Kind::Text,
        "",
        "A collector of OpenTelemetry's that takes OTLP over gRPC, as in \"http://127.0.0.1:4317\": spans of writes and moves are sent \
         there. Needs a binary that was built with the feature otel.",
        into!(some otel.endpoint, endpoint),
    ),
    setting(
        "otel.sample",
        Kind::Share,
        "0.01",
        "The share of the writes whose spans are sent, the same ones by clients and nodes. Moves are all sent.",
        into!(otel.sample, share),
    ),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn defaults_are_what_a_node_without_settings_does() {
        let shape = |settings: &Settings| {
            let Settings { node, log_format, log_filter, otel, .. } = settings;
            format!(
                "{:?} {} {:?} {} {} {:?} {log_format:?} {log_filter} {}",
                node.raft,
                node.max_connections,
                node.capacity_bytes,
                node.segment_bytes.unwrap_or(64 << 20),
                node.top_groups,
                node.upgrade_patience,
                otel.sample
            )
        };
        let mut settings = Settings::default();
        let before = shape(&settings);
        for setting in TABLE.iter().filter(|setting| !setting.default.is_empty()) {
            (setting.set)(&mut settings, setting.default).unwrap();
            assert_eq!(shape(&settings), before, "{} does not default to {}", setting.key, setting.default);
        }
        let log = pontoon_wal::Options::new("d");
        assert_eq!(log.segment_bytes, 64 << 20);
    }

    #[test]
    fn names_are_given_once_and_tables_stand_together() {
        let names: BTreeSet<&str> = TABLE.iter().map(|setting| setting.key).collect();
        assert_eq!(names.len(), TABLE.len());
        let variables: BTreeSet<String> = TABLE.iter().map(Setting::variable).collect();
        assert_eq!(variables.len(), TABLE.len());
        let mut tables: Vec<_> =
            TABLE.iter().map(|s| s.key.split_once('.').map(|(table, _)| table)).collect();
        tables.dedup();
        let distinct: BTreeSet<_> = tables.iter().collect();
        assert_eq!(distinct.len(), tables.len(), "{tables:?}");
    }
}
