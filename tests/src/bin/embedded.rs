//! Writes without a client: three nodes in one process, and tasks that propose to the groups' leaders themselves, as a database does that
//! embeds the crates. Logs and engines on a disk, TCP between the nodes.
//!
//! `cargo run --release -p pontoon-tests --bin embedded -- --clients 1,64,512 --predicates 8`
//!
//! Prints writes per second, latencies, and the processor time of the whole process per write: that of the callers is in it.

use std::{
    error::Error,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use clap::Parser;
use hdrhistogram::Histogram;
use pontoon_node::{Node, NodeConfig, client::Client};
use pontoon_proto::v1;
use pontoon_raftstore::{Group, Proposal, Role};
use pontoon_shard::{EngineKind, MapCommand};
use tokio::{task::JoinSet, time::sleep};

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// That of the program.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const NODES: usize = 3;
/// Rows that each task writes, over and over.
const ROWS: u64 = 4_096;
/// What is not measured before each case.
const WARM_UP: Duration = Duration::from_secs(1);

#[derive(Debug, Parser)]
struct Args {
    /// How many tasks write, each waiting for its answer; several by commas.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 64, 512])]
    clients: Vec<u64>,
    /// Over how many predicates.
    #[arg(long, default_value_t = 8)]
    predicates: usize,
    #[arg(long, default_value_t = 128)]
    value_bytes: usize,
    /// For how long each case is measured, in seconds.
    #[arg(long, default_value_t = 4)]
    seconds: u64,
    /// fjall or sled.
    #[arg(long, default_value = "fjall")]
    engine: EngineKind,
    /// Where the nodes keep their data.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../target"))]
    dir: PathBuf,
}

#[tokio::main]
async fn main() -> Outcome<()> {
    let args = Args::parse();
    let scratch = tempfile::tempdir_in(&args.dir)?;
    let mut nodes: Vec<Node> = Vec::new();
    for number in 0..NODES {
        let mut config = NodeConfig::new(scratch.path().join(number.to_string()), "127.0.0.1:0");
        config.engine = Some(args.engine);
        config.join = nodes.first().map(|first| first.address().to_owned());
        nodes.push(Node::start(config).await?);
    }
    let names: Vec<String> = (0..args.predicates).map(|at| format!("embedded.{at}")).collect();
    let client = Client::connect(nodes.iter().map(|node| node.address().to_owned())).await?;
    for name in &names {
        client
            .create_predicate(v1::CreatePredicateRequest { predicate: name.clone(), ..Default::default() })
            .await?;
    }
    let mut leaders = Vec::new();
    for name in &names {
        leaders.push(leader(&nodes, name).await);
    }
    let leaders: Arc<[Group]> = leaders.into();
    println!(
        "{} predicates, {} B, {}\n{:>8} {:>10} {:>8} {:>8} {:>8} {:>10}",
        args.predicates,
        args.value_bytes,
        args.engine,
        "clients",
        "writes/s",
        "p50 ms",
        "p99 ms",
        "p99.9",
        "CPU ms/op"
    );
    for clients in &args.clients {
        run(&leaders, *clients, args.value_bytes, WARM_UP).await?;
        let (cpu, begun) = (cpu()?, Instant::now());
        let times = run(&leaders, *clients, args.value_bytes, Duration::from_secs(args.seconds)).await?;
        let (took, cpu) = (begun.elapsed(), self::cpu()? - cpu);
        let ms = |share| times.value_at_quantile(share) as f64 / 1_000.0;
        println!(
            "{clients:>8} {:>10.0} {:>8.2} {:>8.2} {:>8.2} {:>10.4}",
            times.len() as f64 / took.as_secs_f64(),
            ms(0.5),
            ms(0.99),
            ms(0.999),
            cpu.as_secs_f64() * 1_000.0 / times.len() as f64
        );
    }
    for node in nodes {
        node.shutdown().await?;
    }
    Ok(())
}

/// The replica that leads a predicate's group, with three voters.
async fn leader(nodes: &[Node], predicate: &str) -> Group {
    loop {
        let groups = nodes.iter().filter_map(|node| node.group(predicate));
        let leads = |group: &Group| {
            group.look(|status| status.role == Role::Leader && status.conf_state.voters.len() == NODES)
        };
        if let Some(group) = groups.into_iter().find(leads) {
            return group;
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// Lets so many tasks write for a while; how long each write took, in microseconds.
async fn run(
    leaders: &Arc<[Group]>,
    clients: u64,
    value_bytes: usize,
    time: Duration,
) -> Outcome<Histogram<u64>> {
    let until = Instant::now() + time;
    let mut tasks = JoinSet::new();
    for client in 0..clients {
        let leaders = leaders.clone();
        tasks.spawn(async move {
            let mut times = Histogram::<u64>::new(3)?;
            let group = &leaders[client as usize % leaders.len()];
            let mut row = 0;
            while Instant::now() < until {
                row = (row + 1) % ROWS;
                let key = format!("{client:05}/{row:05}");
                let payload = MapCommand::new().put(key, vec![b'v'; value_bytes]).encode()?;
                let begun = Instant::now();
                group.propose(Proposal { payload, request: None, epoch: 0, urgent: false }).await?;
                times.record(begun.elapsed().as_micros() as u64)?;
            }
            Outcome::Ok(times)
        });
    }
    let mut all = Histogram::<u64>::new(3)?;
    while let Some(times) = tasks.join_next().await {
        all.add(times??)?;
    }
    Ok(all)
}

/// What this process has computed so far.
fn cpu() -> Outcome<Duration> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    Ok(Duration::from_millis(ticks * 1_000 / rustix::param::clock_ticks_per_second()))
}
