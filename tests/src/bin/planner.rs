//! How long a plan takes to be made, and how near to the bound it is, for very many groups.
//!
//! ```text
//! cargo run --release -p pontoon-tests --bin planner -- --groups 100000 --nodes 100
//! cargo run --release -p pontoon-tests --bin planner -- --balance 10000 --from 10 --to 12
//! ```
//!
//! Groups of three replicas lie on all but the last sixth of the nodes, which came later; the sizes of groups differ by a factor of up
//! to ten thousand. One core.

use std::{collections::BTreeMap, time::Instant};

use clap::Parser;
use pontoon_proto::{NodeId, ReplicaId, v1};
use pontoon_raftstore::SnapshotBudget;
use pontoon_shard::{
    MetaState,
    planner::{self, GroupSeen, Limits, Seen},
};
use pontoon_tests::{Rng, balance};

#[derive(Debug, Parser)]
struct Args {
    /// How many groups.
    #[arg(long, default_value_t = 100_000)]
    groups: u64,
    /// How many nodes.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(4..=10_000))]
    nodes: u64,
    /// How often the plan is made.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    rounds: u32,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Spread voters over ten zones.
    #[arg(long)]
    zones: bool,
    /// Instead: balance so many groups in virtual time, then let an hour pass.
    #[arg(long, value_name = "GROUPS")]
    balance: Option<u64>,
    /// Nodes that hold them.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(4..=1_000))]
    from: u64,
    /// Nodes that there are then.
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u64).range(5..=1_000))]
    to: u64,
    /// What a node receives: slow, normal, fast or bytes per second.
    #[arg(long, default_value = "normal")]
    budget: SnapshotBudget,
    /// By how much of a thousand sizes of groups wander in the hour afterwards.
    #[arg(long, default_value_t = 50)]
    wander_permille: u64,
    /// What a move takes beside its copy, in milliseconds.
    #[arg(long, default_value_t = 400)]
    overhead_ms: u64,
}

fn main() {
    let args = Args::parse();
    if let Some(groups) = args.balance {
        return tell_balance(groups, &args);
    }
    let (state, seen) = cluster(&args);
    let limits = Limits { moves: usize::MAX, bytes: u64::MAX };
    let mut times = Vec::new();
    let mut plan = v1::Plan::default();
    for _ in 0..args.rounds {
        let begun = Instant::now();
        plan = planner::balance(&state, &seen, limits, 0);
        times.push(begun.elapsed().as_secs_f64());
    }
    let repairs = Instant::now();
    let begun = planner::repairs(&state, &seen);
    let repairs = repairs.elapsed().as_secs_f64();
    times.sort_by(f64::total_cmp);
    println!("{} groups on {} nodes, zones: {}", args.groups, args.nodes, args.zones);
    println!(
        "plan        {:.3} s (median of {}, {:.3} to {:.3})",
        times[times.len() / 2],
        args.rounds,
        times[0],
        times[times.len() - 1]
    );
    println!(
        "spread      {:.1} % to {:.1} %",
        f64::from(plan.spread_before) / 10.0,
        f64::from(plan.spread_after) / 10.0
    );
    println!(
        "bytes       {} in {} moves, {:.3} of the bound",
        plan.bytes,
        plan.moves.len(),
        plan.bytes as f64 / plan.bound_bytes.max(1) as f64
    );
    println!("transfers   {}", plan.transfers.len());
    println!("repairs     {repairs:.3} s to find {}", begun.len());
}

fn tell_balance(groups: u64, args: &Args) {
    let begun = Instant::now();
    let outcome = balance::run(balance::Setup {
        groups,
        from: args.from,
        to: args.to,
        bytes_per_second: args.budget.bytes_per_second.unwrap_or(u64::MAX),
        turns: args.budget.max_pulls as usize,
        overhead_ms: args.overhead_ms,
        wander_permille: args.wander_permille,
        seed: args.seed,
    });
    let seconds = |ms: u64| ms as f64 / 1_000.0;
    let times = |bound: u64| outcome.took_ms as f64 / bound.max(1) as f64;
    println!("{groups} groups from {} to {} nodes, budget {:?}", args.from, args.to, args.budget);
    println!("spread      {:.1} % to {:.1} %", outcome.spread.0 * 100.0, outcome.spread.1 * 100.0);
    println!("moved       {} bytes in {} moves", outcome.bytes, outcome.moves);
    println!(
        "time        {:.1} s, {:.3} of the {:.1} s in which the busiest node receives as much, {:.3} of the {:.1} s of any plan",
        seconds(outcome.took_ms),
        times(outcome.bound_ms),
        seconds(outcome.bound_ms),
        times(outcome.least_ms),
        seconds(outcome.least_ms)
    );
    println!("an hour on  {} moves, {} of them returned", outcome.later.0, outcome.later.1);
    println!("simulated in {:.1} s", begun.elapsed().as_secs_f64());
}

fn cluster(args: &Args) -> (MetaState, Seen) {
    let mut rng = Rng::new(args.seed);
    let old = args.nodes - args.nodes / 6;
    let nodes = (1..=args.nodes).map(|id| v1::Node {
        id,
        address: format!("10.0.{}.{}:1", id / 256, id % 256),
        labels: [("zone".to_owned(), (id % 10).to_string())].into(),
        capacity_bytes: 1 << 50,
        ..Default::default()
    });
    let mut groups = BTreeMap::new();
    let shards = (2..args.groups + 2).map(|group| {
        let first = rng.below(old);
        let step = 1 + rng.below(2);
        let voters = (0..3u32).map(|ordinal| {
            let node = NodeId::new(1 + (first + u64::from(ordinal) * step) % old).expect("a node");
            ReplicaId::on(node, ordinal + 1).get()
        });
        let voters: Vec<u64> = voters.collect();
        let bytes = 1_000 << rng.below(14);
        let leader = 1 + first % old;
        groups.insert(group, GroupSeen { bytes: bytes + rng.below(bytes), leader });
        v1::Shard {
            group,
            predicate: format!("p{group}"),
            state: v1::ShardState::Live.into(),
            replicas_wanted: 3,
            voters,
            revision: group,
            ..Default::default()
        }
    });
    let spread = args.zones.then(|| v1::Words { words: vec!["zone".to_owned()] });
    let rules = v1::Rules {
        defaults: Some(v1::PlacementRule { spread, ..Default::default() }),
        ..Default::default()
    };
    let map = v1::ClusterMap {
        nodes: nodes.collect(),
        shards: shards.collect(),
        rules: Some(rules),
        ..Default::default()
    };
    (MetaState::of_map(map), Seen { groups, ..Default::default() })
}
