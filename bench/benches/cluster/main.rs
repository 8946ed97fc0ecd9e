//! Whole clusters beside each other: three members of etcd and three nodes of ours, real processes with synced disks on this
//! machine, one cluster at a time, in turn.
//!
//! `cargo bench --manifest-path bench/Cargo.toml --bench cluster [-- --json] [--seconds S] [--rounds N] [--dir D]
//! [--engine fjall] [--engine sled] [--tls] [CASE…]`
//!
//! With `--tls` ours is measured once without and once with it, between the nodes and towards clients.
//!
//! Two cases of their own measure ours alone: `matrix` (values of 16 B, 128 B and 1 KiB, 1, 64 and 1,024 predicates, 1, 64
//! and 512 clients, on both engines) and `idle-beside` (48 active predicates, with and without 4,096 idle ones beside them,
//! in turn).
//!
//! etcd is Debian's `etcd-server`; where it is absent, ours is measured alone and a line says so. Ours is the release binary,
//! which is built first; its load comes from `pontoon bench`, that of etcd from here, by the same kind of gRPC client.

mod beside;
mod etcd;
mod ours;
mod process;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use ours::Kind;
use serde::Serialize;

pub(crate) type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// What is asked of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Load {
    /// Each client puts, one key a call, and waits for the answer.
    Put,
    /// Each client sends so many independent puts in one call.
    Batch(u32),
    /// Each client reads one key a call, linearizable.
    Read,
    /// A leader is killed with SIGKILL under load; the longest a client waited is what counts.
    Failover,
}

/// One case.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) load: Load,
    pub(crate) clients: u32,
    pub(crate) value_bytes: u32,
    /// Ours: over how many predicates. etcd has one group.
    pub(crate) predicates: u32,
}

const CASES: [Case; 11] = [
    case("put-1", Load::Put, 1, 128, 8),
    case("put-64", Load::Put, 64, 128, 8),
    case("put-512", Load::Put, 512, 128, 8),
    case("put-512-one-group", Load::Put, 512, 128, 1),
    case("put-512-1024-groups", Load::Put, 512, 128, 1024),
    case("put-64-1k", Load::Put, 64, 1024, 8),
    case("batch-512", Load::Batch(64), 512, 128, 8),
    case("read-1", Load::Read, 1, 128, 8),
    case("read-64", Load::Read, 64, 128, 8),
    case("read-512", Load::Read, 512, 128, 8),
    case("failover", Load::Failover, 8, 128, 8),
];

const MATRIX: &str = "matrix";
const BESIDE: &str = "idle-beside";

/// Every size with every number of predicates and of clients.
fn matrix() -> Vec<Case> {
    let mut cases = Vec::new();
    for value_bytes in [16, 128, 1024] {
        for predicates in [1, 64, 1024] {
            for clients in [1, 64, 512] {
                // Named for as long as the program runs.
                let name = format!("put-{clients} {value_bytes} B {predicates}").leak();
                cases.push(case(name, Load::Put, clients, value_bytes, predicates));
            }
        }
    }
    cases
}

const fn case(name: &'static str, load: Load, clients: u32, value_bytes: u32, predicates: u32) -> Case {
    Case { name, load, clients, value_bytes, predicates }
}

/// What one round printed.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Figures {
    pub(crate) per_s: f64,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) p999_ms: f64,
    pub(crate) max_ms: f64,
    /// Processor time of all three members for one operation.
    pub(crate) cpu_ms_per_op: f64,
}

impl Figures {
    fn median(rounds: &[Figures]) -> Figures {
        let of = |pick: fn(&Figures) -> f64| {
            let mut all: Vec<f64> = rounds.iter().map(pick).collect();
            all.sort_by(f64::total_cmp);
            all.get(all.len() / 2).copied().unwrap_or_default()
        };
        Figures {
            per_s: of(|f| f.per_s),
            p50_ms: of(|f| f.p50_ms),
            p99_ms: of(|f| f.p99_ms),
            p999_ms: of(|f| f.p999_ms),
            max_ms: of(|f| f.max_ms),
            cpu_ms_per_op: of(|f| f.cpu_ms_per_op),
        }
    }
}

/// A running cluster.
pub(crate) trait Cluster {
    fn name(&self) -> &'static str;
    /// Puts the load on for so long. `None`: it does not know this kind.
    fn run(&mut self, case: &Case, time: Duration) -> Outcome<Option<Figures>>;
}

struct Args {
    json: bool,
    time: Duration,
    rounds: usize,
    dir: PathBuf,
    engines: Vec<Kind>,
    tls: bool,
    only: Vec<String>,
}

impl Args {
    fn wants(&self, name: &str) -> bool {
        self.only.iter().any(|only| only == name)
    }
}

fn args() -> Outcome<Args> {
    let mut parsed = Args {
        json: false,
        time: Duration::from_secs(5),
        rounds: 3,
        dir: PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target")),
        engines: Vec::new(),
        tls: false,
        only: Vec::new(),
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} needs a value"));
        match word.as_str() {
            "--bench" => {}
            "--json" => parsed.json = true,
            "--tls" => parsed.tls = true,
            "--seconds" => parsed.time = Duration::from_secs(value()?.parse()?),
            "--rounds" => parsed.rounds = value()?.parse()?,
            "--dir" => parsed.dir = value()?.into(),
            "--engine" => parsed.engines.push(match value()?.as_str() {
                "fjall" => Kind::FJALL,
                "sled" => Kind::SLED,
                other => return Err(format!("{other} is no engine: fjall, sled").into()),
            }),
            name if [MATRIX, BESIDE].contains(&name) || CASES.iter().any(|case| case.name == name) => {
                parsed.only.push(name.to_owned());
            }
            other => {
                let names: Vec<&str> = CASES.iter().map(|case| case.name).chain([MATRIX, BESIDE]).collect();
                return Err(
                    format!("{other} is neither an option nor a case; cases: {}", names.join(" ")).into()
                );
            }
        }
    }
    Ok(parsed)
}

fn run() -> Outcome<()> {
    let args = args()?;
    std::fs::create_dir_all(&args.dir)?;
    let binary = ours::build()?;
    if args.wants(BESIDE) {
        return beside::run(&binary, &args.dir, args.time);
    }
    let (cases, has_etcd) = match args.wants(MATRIX) {
        true => (matrix(), false),
        false => (CASES.to_vec(), etcd::is_there()),
    };
    let engines = match (&args.engines[..], args.wants(MATRIX)) {
        ([], true) => vec![Kind::FJALL, Kind::SLED],
        ([], false) => vec![Kind::FJALL],
        (chosen, _) => chosen.to_vec(),
    };
    let kinds: Vec<Kind> = match args.tls {
        true => engines.iter().flat_map(|kind| [*kind, kind.with_tls()]).collect(),
        false => engines,
    };
    if !has_etcd && !args.wants(MATRIX) {
        println!("etcd is not installed (Debian: apt-get install etcd-server); ours is measured alone");
    }
    println!(
        "{:<22} {:<9} {:>9} {:>8} {:>8} {:>8} {:>8} {:>10} {:>15}",
        "case", "engine", "ops/s", "p50 ms", "p99 ms", "p99.9", "max ms", "CPU ms/op", "spread of ops/s"
    );
    for case in
        cases.iter().filter(|case| args.only.is_empty() || args.wants(MATRIX) || args.wants(case.name))
    {
        let mut rounds: Vec<(&'static str, Vec<Figures>)> = Vec::new();
        for _ in 0..args.rounds {
            let dir = tempfile::tempdir_in(&args.dir)?;
            if has_etcd {
                measure(&mut etcd::Etcd::start(dir.path())?, case, args.time, &mut rounds)?;
            }
            for kind in &kinds {
                let dir = tempfile::tempdir_in(&args.dir)?;
                measure(&mut ours::Ours::start(&binary, dir.path(), *kind)?, case, args.time, &mut rounds)?;
            }
        }
        for (engine, rounds) in rounds {
            report(case, engine, &rounds, args.json)?;
        }
    }
    Ok(())
}

fn measure(
    cluster: &mut dyn Cluster,
    case: &Case,
    time: Duration,
    rounds: &mut Vec<(&'static str, Vec<Figures>)>,
) -> Outcome<()> {
    let name = cluster.name();
    if let Some(figures) =
        cluster.run(case, time).map_err(|error| format!("{name}, {}: {error}", case.name))?
    {
        match rounds.iter_mut().find(|(engine, _)| *engine == name) {
            Some((_, all)) => all.push(figures),
            None => rounds.push((name, vec![figures])),
        }
    }
    Ok(())
}

fn report(case: &Case, engine: &str, rounds: &[Figures], json: bool) -> Outcome<()> {
    let median = Figures::median(rounds);
    let low = rounds.iter().map(|f| f.per_s).fold(f64::INFINITY, f64::min);
    let high = rounds.iter().map(|f| f.per_s).fold(0.0, f64::max);
    println!(
        "{:<22} {engine:<9} {:>9.0} {:>8.2} {:>8.2} {:>8.2} {:>8.1} {:>10.3} {low:>7.0}-{high:<7.0}",
        case.name,
        median.per_s,
        median.p50_ms,
        median.p99_ms,
        median.p999_ms,
        median.max_ms,
        median.cpu_ms_per_op
    );
    if json {
        println!(
            "{}",
            serde_json::json!({ "case": case, "engine": engine, "median": median, "rounds": rounds })
        );
    }
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
