//! Runs whole clusters from seeds, on all cores, until one fails or the seeds are through.

use std::{
    process::ExitCode,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use clap::Parser;
use pontoon_tests::sim::{Coverage, Failure, Plan, run};

/// Simulates whole clusters, each from one seed.
#[derive(Parser)]
struct Options {
    /// How many seeds; 0: without end.
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// The first seed; without --seeds the only one.
    #[arg(long)]
    seed: Option<u64>,
    /// Predicates of a cluster, each a group.
    #[arg(long, default_value_t = 64)]
    groups: u64,
    /// Nodes of a cluster.
    #[arg(long, default_value_t = 5)]
    nodes: u64,
    /// How long faults strike, in simulated milliseconds.
    #[arg(long, default_value_t = 6_000)]
    steps: u64,
    /// Seeds at a time; 0: as many as there are cores.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Seeds that are about moves, until so many have ended; instead of --seeds. With --seed the first of them.
    #[arg(long, conflicts_with_all = ["seeds", "groups", "nodes", "steps"])]
    moves: Option<u64>,
    /// With --seed: the seed is one of those that are about moves.
    #[arg(long, conflicts_with = "moves", requires = "seed")]
    of_moves: bool,
    /// No new seed after so many minutes.
    #[arg(long)]
    minutes: Option<u64>,
    /// Each seed that this divides is run twice, and must run alike.
    #[arg(long, default_value_t = 50)]
    twice_every: u64,
    /// Makes a mistake on purpose, and tells how many seeds it takes until that is noticed; `all` tries each.
    #[cfg(feature = "testing")]
    #[arg(long)]
    broken: Option<String>,
    /// Prints each seed's trace hash.
    #[arg(long)]
    verbose: bool,
}

/// So many seeds must have shown every fault in every phase.
const SEEDS_FOR_ALL: u64 = 1_000;

/// What all threads add up.
#[derive(Default)]
struct Sum {
    seeds: u64,
    simulated_ms: u64,
    operations: u64,
    moves: u64,
    given_up: u64,
    stuck: u64,
    drains: u64,
    plans: u64,
    snapshots: u64,
    replaced: u64,
    slept: u64,
    coverage: Coverage,
    failures: Vec<Failure>,
    /// Kilobytes in memory, each time some seeds were through.
    memory: Vec<(u64, u64)>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    // What goes wrong inside is told with its timeline; the core catches some panics itself.
    std::panic::set_hook(Box::new(|_| {}));
    #[cfg(feature = "testing")]
    if let Some(name) = &options.broken {
        return hunt(name, &options);
    }
    let first = options.seed.unwrap_or(1);
    let count = match (options.seed, options.seeds) {
        _ if options.moves.is_some() => u64::MAX - first,
        (Some(_), 100) => 1,
        (_, 0) => u64::MAX - first,
        (_, count) => count,
    };
    let begun = Instant::now();
    let (next, stop, sum) = (AtomicU64::new(first), AtomicBool::new(false), Mutex::new(Sum::default()));
    let threads = match options.threads {
        0 => thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| work(&options, first + count, begun, &next, &stop, &sum));
        }
    });
    let sum = sum.into_inner().unwrap_or_else(PoisonError::into_inner);
    for failure in &sum.failures {
        println!("{failure}\n");
    }
    tell(&sum, begun.elapsed());
    let mut wrong = !sum.failures.is_empty();
    if options.moves.is_none() && sum.seeds >= SEEDS_FOR_ALL {
        for (kind, phase) in sum.coverage.unmet() {
            wrong = true;
            println!("{kind:?} never met {phase}");
        }
        if sum.slept == 0 {
            wrong = true;
            println!("no group has ever slept");
        }
    }
    ExitCode::from(u8::from(wrong))
}

fn work(options: &Options, end: u64, begun: Instant, next: &AtomicU64, stop: &AtomicBool, sum: &Mutex<Sum>) {
    let limit = options.minutes.map(|minutes| Duration::from_secs(minutes * 60));
    while !stop.load(Ordering::Relaxed) && limit.is_none_or(|limit| begun.elapsed() < limit) {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        if seed >= end {
            return;
        }
        let plan = match options.moves.is_some() || options.of_moves {
            true => Plan::of_moves(seed),
            false => Plan { steps: options.steps, ..Plan::drawn(seed, options.nodes, options.groups) },
        };
        let mut ran = run(&plan);
        if let Ok(report) = &ran
            && options.twice_every != 0
            && seed.is_multiple_of(options.twice_every)
            && run(&plan).ok().map(|again| again.hash) != Some(report.hash)
        {
            let what = "it ran differently the second time".to_owned();
            ran = Err(Box::new(Failure { plan, what, timeline: Vec::new() }));
        }
        let mut sum = sum.lock().unwrap_or_else(PoisonError::into_inner);
        sum.seeds += 1;
        match ran {
            Ok(report) => {
                if options.verbose {
                    println!("seed {seed}: {:016x}", report.hash);
                }
                sum.simulated_ms += report.simulated_ms;
                sum.operations += report.operations;
                sum.moves += report.moves;
                sum.given_up += report.given_up;
                sum.stuck += report.stuck;
                sum.drains += report.drains;
                sum.plans += report.plans;
                if options.moves.is_some_and(|moves| sum.moves >= moves) {
                    stop.store(true, Ordering::Relaxed);
                }
                sum.snapshots += report.snapshots;
                sum.replaced += report.replaced;
                sum.slept += report.slept;
                sum.coverage.add(&report.coverage);
            }
            Err(failure) => {
                eprintln!("seed {seed} fails: {}", failure.what);
                sum.failures.push(*failure);
                if options.seeds == 0 || options.moves.is_some() || sum.failures.len() >= 10 {
                    stop.store(true, Ordering::Relaxed);
                }
            }
        }
        if sum.seeds.is_multiple_of(200) {
            let reached = (sum.seeds, resident_kb());
            sum.memory.push(reached);
            eprintln!("{} seeds, {} failures, {} KiB in memory", sum.seeds, sum.failures.len(), reached.1);
        }
    }
}

/// How many seeds it takes until a mistake is noticed.
#[cfg(feature = "testing")]
fn hunt(name: &str, options: &Options) -> ExitCode {
    use pontoon_tests::sim::Mistake;
    let mistakes = match name {
        "all" => Mistake::ALL.to_vec(),
        name => match name.parse() {
            Ok(mistake) => vec![mistake],
            Err(reason) => {
                eprintln!("{reason}");
                return ExitCode::from(2);
            }
        },
    };
    let mut missed = false;
    for mistake in mistakes {
        let _making = mistake.make();
        let first = options.seed.unwrap_or(1);
        let begun = Instant::now();
        let found = (first..first + options.seeds).find_map(|seed| {
            let plan = Plan { steps: options.steps, ..Plan::drawn(seed, options.nodes, options.groups) };
            run(&plan).err()
        });
        match found {
            Some(failure) if options.verbose => println!("{mistake:?}: {failure}"),
            Some(failure) => {
                let what = failure.what.lines().next().unwrap_or_default();
                let seeds = failure.plan.seed - first + 1;
                println!("{mistake:?}: {seeds} seeds, {:.1} s: {what}", begun.elapsed().as_secs_f64());
            }
            None => {
                missed = true;
                println!("{mistake:?}: not noticed in {} seeds", options.seeds);
            }
        }
    }
    ExitCode::from(u8::from(missed))
}

fn tell(sum: &Sum, took: Duration) {
    println!("{}", sum.coverage);
    println!(
        "{} seeds in {:.1} s, {:.0} s simulated, {} operations checked, {} moves ({} given up, {} times stuck), {} drains, {} plans, {} snapshots, {} nodes replaced, {} times asleep, {} failures",
        sum.seeds,
        took.as_secs_f64(),
        sum.simulated_ms as f64 / 1_000.0,
        sum.operations,
        sum.moves,
        sum.given_up,
        sum.stuck,
        sum.drains,
        sum.plans,
        sum.snapshots,
        sum.replaced,
        sum.slept,
        sum.failures.len()
    );
    if let [(first, before), .., (last, after)] = sum.memory[..] {
        let slope = (after as f64 - before as f64) / (last - first) as f64;
        println!("memory: {after} KiB, {slope:+.2} KiB per seed since seed {first}");
    }
}

/// What the process has in memory; 0 where the system does not say.
fn resident_kb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}
