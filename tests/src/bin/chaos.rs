//! Hurts a cluster of real processes in every way at once, for as long as one likes, and judges what its clients saw.
//!
//! `cargo run --release -p pontoon-tests --bin chaos -- --seconds 7200`
//!
//! Five nodes with certificates, each in a network namespace and a time namespace, on a disk of its own. In each round a node is
//! killed, or its power is cut so that all is lost that it did not sync, and meanwhile something else goes wrong: a process
//! stands still, links are cut both ways or one way, lose, delay or choke, a disk stands still or is full. Predicates and logs
//! move all the time. Histories are judged for linearizability, logs for what was acknowledged, and engines for what they kept.
//!
//! Needs the right to make namespaces and mounts (root has it). Without: says so, and ends with 0.

use std::{
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Command, ExitCode},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use clap::Parser;
use pontoon_node::client::Client;
use pontoon_proto::v1;
use pontoon_tests::{
    Rng,
    chaos::{
        hosts::{Nodes, set_up_here},
        net::{Link, Net},
        work::{Appenders, move_around},
    },
    cluster::{until, within},
    history::{Histories, Judged},
    process::Program,
};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

const NODES: usize = 5;
const PREDICATES: usize = 6;
const LOGS: usize = 2;
/// Clients of each predicate, and appenders to each log.
const CLIENTS: u64 = 3;
const APPENDERS: u64 = 2;
/// How long one of them rests at most before it asks for the next thing: what is judged are faults, not load.
const REST: Duration = Duration::from_millis(30);
/// Moves at a time.
const MOVERS: usize = 2;
/// After so long all that was seen is judged, and forgotten.
const EPOCH: Duration = Duration::from_secs(60);
/// How long a client waits for an answer: what is not answered by then may have happened or not.
const DEADLINE: Duration = Duration::from_secs(3);
/// How far apart the nodes' monotonic clocks are at most.
const AHEAD_S: u64 = 30 * 24 * 3_600;

#[derive(Parser)]
#[command(about = "Hurts a cluster of real processes in every way, and judges what its clients saw")]
struct Options {
    /// For how long
    #[arg(long, default_value_t = 180)]
    seconds: u64,
    /// Where chance comes from; drawn if not given
    #[arg(long)]
    seed: Option<u64>,
    /// fjall or sled
    #[arg(long, default_value = "fjall")]
    engine: String,
    /// The program `pontoon`; as a rule what lies beside this one
    #[arg(long)]
    program: Option<PathBuf>,
    /// A directory on a real disk; the system's for temporary files if not given
    #[arg(long)]
    dir: Option<PathBuf>,
    /// This process is in namespaces of its own
    #[arg(long, hide = true)]
    inside: bool,
}

/// What else goes wrong in a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    StandsStill,
    CutOff,
    SpeaksToNobody,
    HearsNobody,
    Loss,
    Delay,
    Choke,
    DiskStall,
    DiskFull,
}

const FAULTS: [Fault; 9] = [
    Fault::StandsStill,
    Fault::CutOff,
    Fault::SpeaksToNobody,
    Fault::HearsNobody,
    Fault::Loss,
    Fault::Delay,
    Fault::Choke,
    Fault::DiskStall,
    Fault::DiskFull,
];

#[derive(Default)]
struct Tally {
    kills: u64,
    power: u64,
    faults: [u64; FAULTS.len()],
    /// Nodes whose process ended by itself, as it does when its disk fails it.
    ended: u64,
    judged: Judged,
    records: u64,
}

/// Goes into namespaces, if this process may.
fn go_inside() -> ExitCode {
    let unshare = ["--net", "--mount", "--propagation", "private", "--fork", "--kill-child", "--"];
    let may = Command::new("unshare").args(["--net", "--mount", "--time", "--fork", "true"]).output();
    let may = may.is_ok_and(|output| output.status.success()) && std::path::Path::new("/dev/fuse").exists();
    if !may || std::fs::metadata("/dev/net/tun").is_err() {
        println!("skipped: namespaces, /dev/fuse and /dev/net/tun are needed; run it as root");
        return ExitCode::SUCCESS;
    }
    let own = std::env::current_exe().expect("a program knows where it is");
    let error = Command::new("unshare")
        .args(unshare)
        .arg(own)
        .args(std::env::args_os().skip(1))
        .arg("--inside")
        .exec();
    eprintln!("unshare does not start: {error}");
    ExitCode::FAILURE
}

fn main() -> ExitCode {
    let options = Options::parse();
    if !options.inside {
        return go_inside();
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime starts");
    match runtime.block_on(run(options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("error: {reason}");
            ExitCode::FAILURE
        }
    }
}

async fn run(options: Options) -> Result<(), String> {
    let seed = options.seed.unwrap_or_else(|| u64::from(std::process::id()) << 20 | u64::from(nanos()));
    println!("--seed {seed}");
    let beside = || std::env::current_exe().ok().map(|own| own.with_file_name("pontoon-under-test"));
    let exe = options.program.or_else(beside).ok_or("where the program lies is not known")?;
    let parent = options.dir.unwrap_or_else(std::env::temp_dir);
    let text = |path: PathBuf| -> &'static str { path.display().to_string().leak() };
    let program = Program { exe: text(exe), scratch: text(parent) };
    // Whoever panics leaves what there is to be looked at.
    let mut scratch = program.scratch();
    scratch.disable_cleanup(true);
    println!("{}", scratch.path().display());
    let mut rng = Rng::new(seed);

    let net = Net::new(NODES + 1, rng.draw()).map_err(|error| format!("no device: {error}"))?;
    set_up_here(NODES)?;
    let ahead: Vec<u64> = (0..NODES).map(|_| rng.below(AHEAD_S)).collect();
    let nodes = Nodes::new(program, &options.engine, scratch.path(), NODES, |at| ahead[at]).await?;
    // sled's files are not trusted after a power cut.
    let keeps = options.engine != "sled";
    let mut chaos = Chaos {
        nodes,
        keeps,
        net,
        rng,
        tally: Tally::default(),
        stop: Arc::default(),
        moved: Arc::default(),
    };
    chaos.work(Duration::from_secs(options.seconds)).await?;
    drop(chaos);
    scratch.disable_cleanup(false);
    Ok(())
}

fn nanos() -> u32 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| now.subsec_nanos())
}

struct Chaos {
    nodes: Nodes,
    /// Whether the engine has to have what it made durable, whatever befell its node.
    keeps: bool,
    net: Net,
    rng: Rng,
    tally: Tally,
    stop: Arc<AtomicBool>,
    moved: Arc<AtomicU64>,
}

impl Chaos {
    async fn work(&mut self, time: Duration) -> Result<(), String> {
        for at in 0..NODES {
            self.nodes.spawn(at);
            self.nodes.serving(at).await;
        }
        let client = self.nodes.client(0..NODES).await.with_deadline(DEADLINE);
        let predicates: Vec<String> = (0..PREDICATES).map(|nth| format!("p{nth}")).collect();
        for predicate in &predicates {
            client.put(predicate, "made", "made").await.map_err(|error| error.to_string())?;
        }
        let mut logs = Vec::new();
        for nth in 0..LOGS {
            logs.push(client.create_log(format!("log{nth}"), 3).await.map_err(|error| error.to_string())?);
        }
        let everything: Vec<String> =
            predicates.iter().cloned().chain(logs.iter().map(|log| log.name().to_owned())).collect();
        let mut movers = JoinSet::new();
        for nth in 0..MOVERS {
            movers.spawn(move_around(
                client.clone(),
                everything.iter().skip(nth).step_by(MOVERS).cloned().collect(),
                (1..=NODES as u64).collect(),
                self.stop.clone(),
                self.moved.clone(),
                Rng::new(self.rng.draw()),
            ));
        }

        let (begun, mut epoch) = (Instant::now(), 0);
        while begun.elapsed() < time {
            let ends = Instant::now() + EPOCH.min(time.saturating_sub(begun.elapsed()));
            let (seed, first_key) = (self.rng.draw(), epoch * 1_000_000);
            let histories = Histories::start_from(&client, &predicates, CLIENTS, seed, first_key, REST);
            let appenders: Vec<Appenders> =
                logs.iter().map(|log| Appenders::start(log.clone(), epoch, APPENDERS, REST)).collect();
            while Instant::now() < ends {
                self.round().await;
            }
            let judged = histories.judge().await;
            self.tally.judged.keys += judged.keys;
            self.tally.judged.answered += judged.answered;
            self.tally.judged.unknown += judged.unknown;
            for appenders in appenders {
                self.tally.records += appenders.judge().await;
            }
            for log in &logs {
                // A log that is judged need not be read again.
                let next = log.bounds().await.map_err(|error| error.to_string())?.next;
                drop(log.truncate(next).await);
            }
            epoch += 1;
            println!("{:>6} s: {}", begun.elapsed().as_secs(), self.summary());
        }
        self.stop.store(true, Ordering::Relaxed);
        while let Some(ended) = within("the movers to end", movers.join_next()).await {
            ended.map_err(|error| error.to_string())?;
        }
        self.comes_to_rest(&client).await;
        println!("{}", self.summary());
        self.enough(begun.elapsed().as_secs())
    }

    /// A node dies, and something else goes wrong meanwhile; then everybody is well again.
    async fn round(&mut self) {
        let victim = self.rng.below(NODES as u64) as usize;
        let hurt = (victim + 1 + self.rng.below(NODES as u64 - 1) as usize) % NODES;
        let nth = self.rng.below(FAULTS.len() as u64) as usize;
        self.strike(FAULTS[nth], hurt, true);
        self.tally.faults[nth] += 1;
        let pause = |rng: &mut Rng, most: u64| Duration::from_millis(50 + rng.below(most));
        sleep(pause(&mut self.rng, 1_200)).await;
        let power = self.rng.chance(500);
        self.nodes.kill(victim, power).await;
        self.tally.kills += 1;
        self.tally.power += u64::from(power);
        sleep(pause(&mut self.rng, 800)).await;
        // In turn it starts while the other fault lasts, and after it.
        if self.rng.chance(500) {
            self.nodes.spawn(victim);
            sleep(pause(&mut self.rng, 1_000)).await;
            self.strike(FAULTS[nth], hurt, false);
        } else {
            self.strike(FAULTS[nth], hurt, false);
            self.nodes.spawn(victim);
        }
        for at in 0..NODES {
            self.tally.ended += u64::from(self.nodes.revive(at));
            self.tally.ended += u64::from(self.nodes.serving(at).await);
        }
    }

    fn strike(&mut self, fault: Fault, at: usize, on: bool) {
        let others: Vec<usize> = (0..NODES).filter(|other| *other != at).collect();
        let link = match fault {
            Fault::StandsStill => return self.nodes.pause(at, on),
            Fault::DiskStall => return self.nodes.disk(at).stall(on),
            Fault::DiskFull => return self.nodes.disk(at).fill(on),
            _ if !on => return self.net.heal(),
            Fault::CutOff | Fault::SpeaksToNobody | Fault::HearsNobody => {
                Link { cut: true, ..Link::default() }
            }
            Fault::Loss => Link { loss: 20 + self.rng.below(200), ..Link::default() },
            Fault::Delay => Link { delay: Duration::from_millis(5 + self.rng.below(150)), ..Link::default() },
            Fault::Choke => Link { rate: 20_000 + self.rng.below(400_000), ..Link::default() },
        };
        // Clients reach it yet: it must not serve what it cannot know.
        for other in others {
            match fault {
                Fault::SpeaksToNobody => self.net.set(at, other, link, false),
                Fault::HearsNobody => self.net.set(other, at, link, false),
                _ => self.net.set(at, other, link, true),
            }
        }
    }

    /// Nothing is left that goes on, or is wrong.
    async fn comes_to_rest(&self, client: &Client) {
        until("no move to go on and no group to have a problem", async || {
            let moves = client.move_list(v1::MoveListRequest::default()).await.ok()?.moves;
            let request = v1::GroupsRequest { problem: true, ..Default::default() };
            let reply = client.groups(request).await.ok()?;
            (moves.is_empty() && reply.groups.is_empty() && reply.unreachable.is_empty()).then_some(())
        })
        .await;
    }

    fn summary(&self) -> String {
        let Tally { kills, power, faults, ended, judged, records } = &self.tally;
        let faults: Vec<String> =
            FAULTS.iter().zip(faults).map(|(fault, count)| format!("{fault:?} {count}")).collect();
        let (passed, dropped) = self.net.packets();
        format!(
            "{kills} kills ({power} power cuts, {} unsynced writes and names lost, {} states lost by engines), {}, {ended} ended by \
             themselves; {} moves; {} \
             keys, {} answered, {} unknown; {records} records; {passed} packets, {dropped} dropped",
            self.nodes.undone(),
            self.nodes.lost_states(),
            faults.join(", "),
            self.moved.load(Ordering::Relaxed),
            judged.keys,
            judged.answered,
            judged.unknown,
        )
    }

    /// A run that did hardly anything says nothing, and one in which states came from others instead of from the disk not enough.
    fn enough(&self, seconds: u64) -> Result<(), String> {
        let moves = self.moved.load(Ordering::Relaxed);
        if self.keeps && self.nodes.lost_states() > 0 {
            return Err(format!("engines lost what was durable: {}", self.summary()));
        }
        let enough = self.tally.kills >= seconds / 12
            && moves >= seconds / 12
            && self.tally.judged.answered > 100 * seconds / 10
            && self.tally.records > seconds;
        if enough { Ok(()) } else { Err(format!("hardly anything happened: {}", self.summary())) }
    }
}
