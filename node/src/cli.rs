//! The commands. Tables for people, with `--json` one object on the last line of stdout.
//!
//! Exit codes: [`EXIT_CODES`].

mod audit;
mod backup;
mod certs;
mod cluster;
mod config;
mod data;
mod debug;
mod engine;
mod examples;
mod load;
mod log;
mod moves;
mod node;
mod notify;
mod output;
mod pages;
mod placement;
mod problems;
mod profile;
mod recover;
mod tls;
mod upgrade;
mod wal;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use pontoon_node::{
    TlsFiles,
    client::{Client, ClientError, ConnectOptions, Reads},
};
use pontoon_proto::NodeId;
use pontoon_shard::EngineKind;

pub(crate) use output::{Done, Failure, Say, bytes, percent_bar, print_line, table};
pub(crate) use tls::TLS_VARIABLES;

/// What scripts may rely on.
const EXIT_CODES: &str = "Exit codes:
  0  done
  1  failed, or what was asked for is not there
  2  refused without effect, or wrong usage
  3  stuck: it waits for somebody's hand, the message says for what
  4  the wait ended before the thing did; it goes on";

/// Pontoon: the storage layer of a sharded database.
#[derive(Debug, Parser)]
#[command(name = "pontoon", version, propagate_version = true, arg_required_else_help = true)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct Cli {
    /// Print the result as one JSON object on the last line of stdout.
    #[arg(long, global = true)]
    json: bool,
    /// A node of the cluster, HOST:PORT; several by commas.
    #[arg(
        long,
        global = true,
        env = "PONTOON_ADDR",
        default_value = "127.0.0.1:7400",
        value_delimiter = ',',
        value_parser = address
    )]
    addr: Vec<String>,
    /// How many seconds one call may take, retries included.
    #[arg(long, global = true, default_value_t = 10.0, value_parser = seconds)]
    timeout: f64,
    #[command(flatten)]
    tls: tls::TlsArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Three nodes and then a fourth on this machine: load, move under traffic with a kill, verify.
    Demo(crate::demo::DemoArgs),
    /// Run one node until SIGTERM or Ctrl-C. The first founds a cluster, the others --join it.
    Node(Box<node::NodeArgs>),
    /// The configuration of a node: print the default file, or check one.
    #[command(subcommand)]
    Config(config::ConfigCommand),
    /// Load N-Triples, N-Quads or Dgraph RDF, also .gz. Run it again to go on after a kill.
    Load(load::LoadArgs),
    /// Keep predicates in a directory or file, each as of one index; only what is new is added. list, prune and verify beside it.
    Backup(backup::BackupArgs),
    /// Bring predicates of a backup into this cluster, and read them back. Run it again to go on after a kill.
    Restore(backup::RestoreArgs),
    /// Read and hash every byte of backups, and say what is damaged.
    Verify(backup::VerifyArgs),
    /// Write predicates as RDF that `load` gives back unchanged.
    Export(backup::ExportArgs),
    /// Read a key; for loaded data, all objects of a subject.
    Get(data::GetArgs),
    /// Set the value of a key.
    Put(data::PutArgs),
    /// Delete a key.
    Delete(data::KeyArgs),
    /// Set (or without VALUE delete) a key if it is as expected.
    Cas(data::CasArgs),
    /// List rows in order of their keys.
    Scan(data::ScanArgs),
    /// Logs: records in the order in which they were appended.
    #[command(subcommand)]
    Log(log::LogCommand),
    /// The cluster at a glance, or what is wrong in it.
    Status(problems::StatusArgs),
    /// The nodes, and what each holds.
    Nodes,
    /// The predicates, and who serves them.
    Predicates,
    /// Make or drop a predicate.
    #[command(subcommand)]
    Predicate(cluster::PredicateCommand),
    /// Remove a node for ever: one that is empty after a drain, or one that is lost. What the latter held is made anew on
    /// other nodes.
    Decommission {
        /// Its id, as in `pontoon nodes`.
        #[arg(value_parser = node_id)]
        node: NodeId,
    },
    /// Groups whose quorum is lost for good: a plan first, which says what may be lost.
    #[command(subcommand)]
    Recover(recover::RecoverCommand),
    /// Every group's replicas on every node.
    Groups(cluster::GroupsArgs),
    /// Move a predicate's replica to another node.
    #[command(subcommand)]
    Move(moves::MoveCommand),
    /// Where replicas should lie: show, set or check the rules.
    #[command(subcommand)]
    Rules(placement::RulesCommand),
    /// Empty a node: its leaderships at once, then its replicas, to where the rules allow.
    Drain(placement::DrainArgs),
    /// Use the nodes evenly: a plan first, with the bound below which none can be.
    #[command(subcommand)]
    Rebalance(placement::RebalanceCommand),
    /// Why a predicate's replicas are on a node, and why not.
    Explain(placement::ExplainArgs),
    /// Which engine each node has, and how to change it in place.
    #[command(subcommand)]
    Engine(engine::EngineCommand),
    /// What happened in the cluster.
    Events(cluster::EventsArgs),
    /// For whoever looks for a fault: everything that the nodes can tell, one group in depth, or where time and memory go.
    #[command(subcommand)]
    Debug(debug::DebugCommand),
    /// Certificates for TLS: who each node and each client is, and what it may do.
    #[command(subcommand)]
    Certs(certs::CertsCommand),
    /// Who changed what, from where, and how it ended.
    Audit(audit::AuditArgs),
    /// Which cluster versions the nodes speak; finalise one once all of them do.
    #[command(subcommand)]
    Upgrade(upgrade::UpgradeCommand),
    /// This binary's version, and the cluster versions that it speaks with what each turned on.
    Version,
    /// Print the script by which a shell completes `pontoon`.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write the manual pages.
    Man {
        /// Where to; made if it is missing.
        dir: PathBuf,
    },
    /// Generate load and measure latencies.
    Bench(crate::bench::BenchArgs),
    /// Look at a node's log on this machine's disk.
    #[command(subcommand)]
    Wal(wal::WalCommand),
}

/// How to reach the cluster, and how to print.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) json: bool,
    pub(crate) tls: Option<TlsFiles>,
    addresses: Vec<String>,
    timeout: Duration,
}

impl Context {
    pub(crate) async fn client(&self) -> Result<Client, ClientError> {
        self.client_of(self.addresses.clone()).await
    }

    /// The same through other nodes.
    pub(crate) async fn client_of(
        &self,
        addresses: impl IntoIterator<Item = String>,
    ) -> Result<Client, ClientError> {
        let mut options = ConnectOptions::default();
        options.tls = self.tls.clone();
        Ok(Client::connect_with(addresses, options).await?.with_deadline(self.timeout))
    }
}

/// How old an answer may be.
#[derive(Debug, Args, Clone)]
pub(crate) struct ReadArgs {
    /// The answer may lack what was written in this time, as in 2s or 500ms: the node at --addr answers from its own
    /// replica, if it has one, without asking the leader each time.
    #[arg(long, value_name = "TIME", value_parser = time, conflicts_with = "local")]
    max_lag: Option<Duration>,
    /// Whatever the replica of the node at --addr has, however old.
    #[arg(long)]
    local: bool,
}

impl ReadArgs {
    pub(crate) fn reads(&self) -> Reads {
        match (self.local, self.max_lag) {
            (true, _) => Reads::Local,
            (false, Some(lag)) => Reads::Bounded(lag),
            (false, None) => Reads::Linearizable,
        }
    }
}

/// Which engine a node stores its rows with.
#[derive(Debug, Args, Clone)]
pub(crate) struct EngineArgs {
    /// fjall (the default) or sled.
    #[arg(long, value_parser = engine)]
    pub(crate) engine: Option<EngineKind>,
}

/// All commands, with their examples.
fn command() -> clap::Command {
    examples::add(Cli::command())
}

/// Reads the command line; ends the process where it asks for help or makes no sense.
pub(crate) fn parse() -> Cli {
    let matches = command().get_matches();
    Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
}

/// Runs a command to its exit code.
pub(crate) async fn run(cli: Cli) -> ExitCode {
    let tls = match cli.tls.files() {
        Ok(tls) => tls,
        Err(failure) => return output::finish(cli.json, Err(failure)),
    };
    let timeout = Duration::from_secs_f64(cli.timeout);
    let context = Context { json: cli.json, tls, addresses: cli.addr, timeout };
    if !matches!(cli.command, Command::Node(_)) {
        pontoon_node::init_logs(pontoon_node::LogFormat::Text, "error");
    }
    let end = match cli.command {
        Command::Demo(args) => crate::demo::run(&context, args).await,
        Command::Node(args) => node::run(&context, *args).await,
        Command::Config(command) => config::run(command),
        Command::Load(args) => load::run(&context, args).await,
        Command::Backup(args) => backup::run(&context, args).await,
        Command::Restore(args) => backup::restore(&context, args).await,
        Command::Verify(args) => backup::verify(&context, args).await,
        Command::Export(args) => backup::run_export(&context, args).await,
        Command::Engine(command) => engine::run(&context, command).await,
        Command::Get(args) => data::get(&context, args).await,
        Command::Put(args) => data::put(&context, args).await,
        Command::Delete(args) => data::delete(&context, args).await,
        Command::Cas(args) => data::cas(&context, args).await,
        Command::Scan(args) => data::scan(&context, args).await,
        Command::Log(command) => log::run(&context, command).await,
        Command::Status(args) => match args.problems {
            true => problems::problems(&context).await,
            false => cluster::status(&context).await,
        },
        Command::Debug(command) => debug::run(&context, command).await,
        Command::Nodes => cluster::nodes(&context).await,
        Command::Predicates => cluster::predicates(&context).await,
        Command::Predicate(command) => cluster::predicate(&context, command).await,
        Command::Decommission { node } => cluster::decommission(&context, node).await,
        Command::Recover(command) => recover::run(&context, command).await,
        Command::Groups(args) => cluster::groups(&context, args).await,
        Command::Move(command) => moves::run(&context, command).await,
        Command::Rules(command) => placement::rules(&context, command).await,
        Command::Drain(args) => placement::drain(&context, args).await,
        Command::Rebalance(command) => placement::rebalance(&context, command).await,
        Command::Explain(args) => placement::explain(&context, args).await,
        Command::Events(args) => cluster::events(&context, args).await,
        Command::Bench(args) => crate::bench::run(&context, args).await,
        Command::Audit(args) => audit::run(&context, args).await,
        Command::Certs(command) => certs::run(command),
        Command::Upgrade(command) => upgrade::run(&context, command).await,
        Command::Version => Ok(upgrade::version()),
        Command::Completions { shell } => Ok(pages::completions(shell)),
        Command::Man { dir } => pages::man(&dir),
        Command::Wal(command) => wal::run(command),
    };
    output::finish(context.json, end)
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if seconds > 0.0 && seconds <= 86_400.0 => Ok(seconds),
        _ => Err("a number of seconds above 0, at most 86400".to_owned()),
    }
}

/// A time as people write it: `2s`, `500ms`, `1m`.
fn time(text: &str) -> Result<Duration, String> {
    let digits = text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: Option<u64> = number.parse().ok();
    let ms = match unit {
        "ms" => Some(1),
        "s" => Some(1_000),
        "m" => Some(60_000),
        _ => None,
    };
    let ms = number.zip(ms).and_then(|(number, ms)| number.checked_mul(ms));
    ms.map(Duration::from_millis).ok_or_else(|| "a time is a number and ms, s or m, as in 500ms".to_owned())
}

fn address(text: &str) -> Result<String, String> {
    let parts = text.rsplit_once(':').filter(|(host, _)| !host.is_empty() && !host.contains(['/', ' ']));
    match parts.map(|(_, port)| port.parse::<u16>()) {
        Some(Ok(1..)) => Ok(text.to_owned()),
        _ => Err("an address is HOST:PORT, as in 127.0.0.1:7400".to_owned()),
    }
}

/// A node as people write it, `3` or `n3`.
fn node_id(text: &str) -> Result<NodeId, String> {
    let digits = text.strip_prefix('n').unwrap_or(text);
    let id: u64 = digits.parse().map_err(|_| "a node is its number, see `pontoon nodes`".to_owned())?;
    NodeId::new(id).map_err(|error| error.to_string())
}

fn engine(text: &str) -> Result<EngineKind, String> {
    match text.parse() {
        Ok(engine @ (EngineKind::Fjall | EngineKind::Sled)) => Ok(engine),
        _ => Err(format!("the engine {text} is not known; use fjall or sled")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commands_fit_together() {
        command().debug_assert();
    }

    #[test]
    fn wrong_words_are_refused() {
        for words in [
            &["pontoon", "--timeout", "0", "status"][..],
            &["pontoon", "move", "start"],
            &["pontoon", "demo", "--engine", "paper"],
            &["pontoon", "status", "--addr", "localhost"],
            &["pontoon", "status", "--addr", "http://127.0.0.1:7400/"],
            &["pontoon", "move", "start", "name", "--to", "0"],
            &["pontoon", "move", "start", "name", "--to", "2", "--remove"],
            &["pontoon", "move", "start", "name", "--remove"],
            &["pontoon", "decommission", "third"],
            &["pontoon", "recover", "plan"],
            &["pontoon", "recover", "plan", "--lost", "n2,third"],
            &["pontoon", "get", "name", "k", "--local", "--max-lag", "2s"],
            &["pontoon", "log", "tail", "events", "--from", "-1"],
            &["pontoon", "log", "truncate", "events"],
            &["pontoon", "log", "mirror", "events"],
            &["pontoon", "debug", "profile", "--seconds", "0"],
            &["pontoon", "debug", "profile", "--seconds", "61"],
            &["pontoon", "debug", "profile", "--raw", "--out", "f"],
            &["pontoon", "debug", "profile", "--heap", "--raw"],
            &["pontoon", "backup"],
            &["pontoon", "backup", "prune", "b"],
            &["pontoon", "restore"],
            // Without a cluster to join there is nobody whose place it could take.
            &["pontoon", "node", "--dir", "d", "--listen", "127.0.0.1:1", "--replace", "3"],
        ] {
            assert!(Cli::try_parse_from(words).is_err(), "{words:?}");
        }
        assert!(Cli::try_parse_from(["pontoon", "status", "--json", "--addr", "127.0.0.1:1"]).is_ok());
        assert!(Cli::try_parse_from(["pontoon", "status", "--addr", "[::1]:7,localhost:8"]).is_ok());
    }

    #[test]
    fn times_have_units() {
        assert_eq!(time("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(time("2s"), Ok(Duration::from_secs(2)));
        assert_eq!(time("1m"), Ok(Duration::from_secs(60)));
        for wrong in ["2", "s", "", "2h", "-1s", "1.5s", "99999999999999999999s"] {
            assert!(time(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_node_is_written_with_or_without_its_letter() {
        assert_eq!(node_id("3"), node_id("n3"));
        assert!(node_id("0").is_err() && node_id("n").is_err() && node_id("m3").is_err());
    }
}
