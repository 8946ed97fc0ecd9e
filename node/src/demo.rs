//! `pontoon demo`: the main job on one machine, with real processes.
//!
//! Three nodes, a data set, a fourth node, the largest predicate moved to it while it is written and read and its source
//! node is killed; then every record is read back and compared.

mod data;
mod relocate;
mod traffic;
mod verify;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Args, ValueEnum};
use pontoon_node::{
    client::Client,
    load::{LoadOptions, LoadStep, load},
    shutdown_signal,
};
use pontoon_proto::v1;
use serde_json::{Value, json};

use crate::{
    cli::{Context, Done, EngineArgs, Failure, Say, bytes, percent_bar},
    local::Cluster,
};
use relocate::Moved;
use traffic::Seen;
use verify::Verified;

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// An RDF file to load instead of the data set that the demo makes.
    #[arg(long, value_name = "FILE", conflicts_with = "size")]
    data: Option<PathBuf>,
    /// How many triples the demo makes: about 20,000, 200,000 or 2,000,000.
    #[arg(long, value_enum, default_value_t = Size::Default)]
    size: Size,
    /// An empty directory to work in; a temporary one if not given.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Leave the cluster running at the end.
    #[arg(long)]
    keep: bool,
    /// Which of the moving predicate's replicas is the source of the move.
    #[arg(long, value_enum, default_value_t = Source::Follower)]
    source: Source,
    #[command(flatten)]
    engine: EngineArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Size {
    Small,
    Default,
    Large,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Source {
    /// A replica that does not lead: no write need wait for the kill.
    Follower,
    /// The leader: with its node killed, writes wait for an election.
    Leader,
}

impl Size {
    fn triples(self) -> u64 {
        match self {
            Size::Small => 20_000,
            Size::Default => 200_000,
            Size::Large => 2_000_000,
        }
    }
}

pub(crate) async fn run(context: &Context, args: DemoArgs) -> Result<Done, Failure> {
    // Whichever way this ends, the cluster is dropped with it and takes its processes along.
    tokio::select! {
        end = demo(context, args) => end,
        signal = shutdown_signal() => {
            Err(Failure::error(format!("ended by {}; nothing is left running", signal.unwrap_or("a signal"))))
        }
    }
}

async fn demo(context: &Context, args: DemoArgs) -> Result<Done, Failure> {
    let say = Say::of(context);
    let begun = std::time::Instant::now();
    if let Some(file) = &args.data {
        std::fs::File::open(file).map_err(|error| {
            Failure::error(format!("{}: {error}; name an RDF file with --data", file.display()))
        })?;
    }
    let (dir, scratch) = work_dir(args.dir.as_deref())?;
    let mut cluster = Cluster::new(&dir, args.engine.engine, args.keep)?;

    say.step(&format!("starting three nodes in {}", dir.display()));
    for _ in 0..3 {
        let address = cluster.start().await?.address.clone();
        say.step(&format!("  node {} serves on {address}", cluster.len()));
    }
    let client = Client::connect(cluster.addresses()).await?;
    cluster.await_nodes(&client, 3).await?;

    let file = match &args.data {
        Some(file) => file.clone(),
        None => {
            let file = dir.join("films.rdf");
            say.step(&format!("making {} triples about films", args.size.triples()));
            data::write_films(&file, args.size.triples())
                .map_err(|error| Failure::error(format!("{}: {error}; is the disk full?", file.display())))?;
            file
        }
    };
    let loaded = load_all(say, &client, &file, &dir).await?;
    let expected = {
        let file = file.clone();
        tokio::task::spawn_blocking(move || verify::expected(&file))
            .await
            .map_err(|error| Failure::error(format!("the data set could not be counted: {error}")))??
    };
    let triples: u64 = expected.values().map(|rows| rows.len() as u64).sum();
    let (largest, rows) = expected
        .iter()
        .max_by_key(|(_, rows)| rows.len())
        .map(|(name, rows)| (name.clone(), rows.len()))
        .ok_or_else(|| Failure::new(Failure::REFUSED, format!("{} has no triples", file.display())))?;

    let fourth = cluster.start().await?.address.clone();
    cluster.await_nodes(&client, 4).await?;
    say.step(&format!("  node 4 serves on {fourth}; the largest predicate is {largest} with {rows} triples"));
    let (moved, seen) = relocate::under_traffic(say, &client, &mut cluster, &largest, args.source).await?;

    say.step("reading every triple and every acknowledged live write back");
    let verified = verify::all(&client, expected, &largest, &seen.acknowledged, context.json).await?;
    let groups = client.status(v1::StatusRequest {}).await.map(|status| status.groups).unwrap_or(0);

    let summary = Summary { triples, groups, rate: loaded, moved, seen, verified, seconds: begun.elapsed() };
    let mut text = summary.text();
    if args.keep {
        text.push_str(&cluster.keep(&dir));
        if let Some(scratch) = scratch {
            let _kept: PathBuf = scratch.keep();
        }
    } else {
        cluster.stop().await;
    }
    Ok(Done { text, json: summary.json(), code: if summary.is_clean() { 0 } else { Failure::ERROR } })
}

/// The directory to work in, with the guard that removes a temporary one.
fn work_dir(given: Option<&Path>) -> Result<(PathBuf, Option<tempfile::TempDir>), Failure> {
    let failed = |dir: &Path, error: std::io::Error| {
        Failure::error(format!("{}: {error}; name another directory with --dir", dir.display()))
    };
    let Some(dir) = given else {
        let scratch = tempfile::Builder::new()
            .prefix("pontoon-demo-")
            .tempdir()
            .map_err(|error| failed(&std::env::temp_dir(), error))?;
        return Ok((scratch.path().to_owned(), Some(scratch)));
    };
    std::fs::create_dir_all(dir).map_err(|error| failed(dir, error))?;
    if std::fs::read_dir(dir).map_err(|error| failed(dir, error))?.next().is_some() {
        let text = format!("{} is not empty; the demo starts from an empty directory", dir.display());
        return Err(Failure::new(Failure::REFUSED, text));
    }
    Ok((std::path::absolute(dir).map_err(|error| failed(dir, error))?, None))
}

/// Loads the data set through the same path as `pontoon load`, and gives the rate.
async fn load_all(say: Say, client: &Client, file: &Path, dir: &Path) -> Result<f64, Failure> {
    let options = LoadOptions { state: Some(dir.join("load.progress")), skip_bad: 0 };
    let bar = percent_bar(0, "loading [{bar:32}] {percent:>3}%, {msg}, {eta} left");
    let mut read = None;
    let report = load(client, file, &options, |step| match step {
        LoadStep::Begins { file_bytes, read: counter, .. } => {
            bar.set_length(file_bytes);
            read = Some(counter);
        }
        LoadStep::Loaded(triples) => {
            let position = read.as_ref().map_or(0, |read| read.load(std::sync::atomic::Ordering::Relaxed));
            bar.set_position(position);
            bar.set_message(format!("{triples} triples"));
        }
        LoadStep::Skipped(_) => {}
    })
    .await;
    bar.finish_and_clear();
    let report = report?;
    say.step(&format!(
        "loaded {} triples in {:.1} s ({:.0}/s)",
        report.loaded, report.seconds, report.triples_per_s
    ));
    Ok(report.triples_per_s)
}

struct Summary {
    triples: u64,
    groups: u64,
    rate: f64,
    moved: Moved,
    seen: Seen,
    verified: Verified,
    seconds: Duration,
}

impl Summary {
    fn is_clean(&self) -> bool {
        self.verified.lost == 0
            && self.verified.foreign == 0
            && self.seen.failed_writes == 0
            && self.seen.stale_reads == 0
            && self.moved.finished
            && self.moved.killed
    }

    fn text(&self) -> String {
        let (moved, seen, verified) = (&self.moved, &self.seen, &self.verified);
        let mut lines = vec![
            String::new(),
            format!(
                "triples          {}, loaded at {:.0}/s into {} groups",
                self.triples, self.rate, self.groups
            ),
            format!(
                "move             {} from node {} to node {}: {} in {:.1} s, longest write gap {:.1} ms{}",
                moved.predicate,
                moved.from,
                moved.to,
                bytes(moved.bytes),
                moved.seconds,
                moved.max_write_gap_ms,
                if moved.finished { "" } else { ", NOT FINISHED" }
            ),
            format!(
                "kill             node {} {} and was started again",
                moved.from,
                match &moved.killed_in {
                    Some(phase) => format!("was killed in phase {phase}"),
                    None => "was NOT killed: the move was over before".to_owned(),
                }
            ),
            format!(
                "live traffic     {} writes acknowledged, {} failed; {} reads, {} failed, {} stale",
                seen.acknowledged.len(),
                seen.failed_writes,
                seen.reads,
                seen.failed_reads,
                seen.stale_reads
            ),
            format!(
                "verified         {} triples and {} live writes; {} lost, {} foreign rows",
                verified.triples, verified.live, verified.lost, verified.foreign
            ),
        ];
        lines.extend(seen.first_failure.iter().map(|failure| format!("first failure    {failure}")));
        lines.extend(verified.examples.iter().map(|example| format!("lost             {example}")));
        lines.push(format!(
            "{} in {:.1} s",
            if self.is_clean() { "clean" } else { "NOT CLEAN" },
            self.seconds.as_secs_f64()
        ));
        lines.join("\n")
    }

    fn json(&self) -> Value {
        let moved = json!({
            "predicate": self.moved.predicate,
            "from": self.moved.from,
            "to": self.moved.to,
            "bytes": self.moved.bytes,
            "seconds": self.moved.seconds,
            "max_write_gap_ms": self.moved.max_write_gap_ms,
            "finished": self.moved.finished,
            "killed_in_phase": self.moved.killed_in,
        });
        json!({
            "clean": self.is_clean(),
            "triples": self.triples,
            "verified": self.verified.triples,
            "lost": self.verified.lost,
            "foreign": self.verified.foreign,
            "failed_writes": self.seen.failed_writes,
            "load_triples_per_s": self.rate.round(),
            "groups": self.groups,
            "live_writes": self.seen.acknowledged.len(),
            "live_verified": self.verified.live,
            "reads": self.seen.reads,
            "failed_reads": self.seen.failed_reads,
            "stale_reads": self.seen.stale_reads,
            "moves": [moved],
            "seconds": self.seconds.as_secs_f64(),
        })
    }
}
