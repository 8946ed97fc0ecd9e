//! What very many predicates cost when something goes wrong: three real processes, a node killed with SIGKILL and started
//! again.
//!
//! `cargo run --release -p pontoon-tests --bin crowd -- --predicates 10000 --log-mib 1024`
//!
//! Prints how long it takes to make them, for how long the predicates that the killed node led take no writes (one write of
//! each is under way from the moment of the kill), and how long the node takes to serve again, with so much log on its disk.

use std::{
    error::Error,
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::Parser;
use futures::{StreamExt, stream};
use hdrhistogram::Histogram;
use pontoon_node::client::{Client, Reads, put};
use pontoon_proto::v1;
use pontoon_tests::{cluster::Cluster, process::Program};

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Writes in one call while predicates are made and filled.
const TOGETHER: usize = 256;
const VALUE_BYTES: usize = 1024;
/// How long a write may take while nobody leads.
const PATIENCE: Duration = Duration::from_secs(60);
/// Until all that is not used sleeps.
const REST: Duration = Duration::from_secs(8);

#[derive(Debug, Parser)]
struct Args {
    /// How many predicates.
    #[arg(long, default_value_t = 10_000)]
    predicates: usize,
    /// What is written before the kill, in MiB of values.
    #[arg(long, default_value_t = 0)]
    log_mib: usize,
    /// fjall or sled.
    #[arg(long, default_value = "fjall")]
    engine: String,
    /// Where the nodes keep their data.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../target"))]
    dir: PathBuf,
}

#[tokio::main]
async fn main() -> Outcome<()> {
    let args = Args::parse();
    // The node's binary is built beside this one. Both live as long as the program.
    let exe = std::env::current_exe()?.with_file_name("pontoon-under-test");
    let named = |path: PathBuf| -> &'static str { path.to_string_lossy().into_owned().leak() };
    let program = Program { exe: named(exe), scratch: named(args.dir.clone()) };
    let mut cluster = Cluster::start(program, &args.engine, 3).await;
    let client = cluster.client().await.with_deadline(PATIENCE);
    let names: Vec<String> = (0..args.predicates).map(|at| format!("crowd.{at}")).collect();

    let begun = Instant::now();
    write_all(&client, &names, 0).await?;
    println!("{} predicates made and written once: {:.1} s", names.len(), begun.elapsed().as_secs_f64());
    let rounds = (args.log_mib << 20) / (VALUE_BYTES * names.len());
    for round in 1..=rounds {
        write_all(&client, &names, round).await?;
    }
    println!("{} MiB more written", (rounds * VALUE_BYTES * names.len()) >> 20);
    tokio::time::sleep(REST).await;

    let victim = 1;
    let lost = led_by(&client, cluster.id(victim)).await?;
    let killed = Instant::now();
    cluster.kill(victim).await;
    let gaps = stream::iter(&lost).map(async |name| {
        client.put(name, "after", "the kill").await?;
        Outcome::Ok(killed.elapsed())
    });
    let gaps: Vec<Duration> = gaps
        .buffer_unordered(lost.len().max(1))
        .collect::<Vec<_>>()
        .await
        .into_iter()
        .collect::<Outcome<_>>()?;
    let mut all = Histogram::<u64>::new(3)?;
    gaps.iter().for_each(|gap| all.saturating_record(gap.as_millis() as u64));
    println!(
        "{} of them were led by the killed node; no writes for: median {} ms, p99 {} ms, at most {} ms",
        gaps.len(),
        all.value_at_quantile(0.5),
        all.value_at_quantile(0.99),
        all.max()
    );

    let begun = Instant::now();
    cluster.restart(victim).await;
    println!("the killed node serves again: {:.2} s", begun.elapsed().as_secs_f64());
    let own = Client::connect([cluster.address(victim)]).await?.with_reads(Reads::Local);
    let begun = Instant::now();
    for name in &names {
        own.with_deadline(PATIENCE).get(name, "0").await?.ok_or("a row is missing")?;
    }
    println!("and has answered for each predicate: {:.2} s later", begun.elapsed().as_secs_f64());
    Ok(())
}

/// Writes a row to each predicate.
async fn write_all(client: &Client, names: &[String], round: usize) -> Outcome<()> {
    let value = bytes::Bytes::from(vec![b'v'; VALUE_BYTES]);
    let calls = names.chunks(TOGETHER).map(|names| {
        let writes = names.iter().map(|name| (name.clone(), vec![put(round.to_string(), value.clone())]));
        client.write_many(writes.collect())
    });
    let mut outcomes = stream::iter(calls).buffer_unordered(4);
    while let Some(outcomes) = outcomes.next().await {
        for outcome in outcomes {
            outcome?;
        }
    }
    Ok(())
}

/// The predicates that a node leads.
async fn led_by(client: &Client, node: u64) -> Outcome<Vec<String>> {
    let all = client.predicates(v1::PredicatesRequest::default()).await?.predicates;
    let led = all.into_iter().filter(|view| view.leader_node == node);
    Ok(led.filter_map(|view| Some(view.shard?.predicate)).filter(|name| name.starts_with("crowd.")).collect())
}
