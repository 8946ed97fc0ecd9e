//! A load generator with latency percentiles.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use clap::Args;
use hdrhistogram::Histogram;
use pontoon_node::client::{Client, put};
use serde_json::json;

use crate::cli::{Context, Done, Failure};

#[derive(Debug, Args)]
pub(super) struct ClosedLoopArgs {
    /// How many clients write at once, each waiting for its answer.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    clients: u32,
    /// How many independent writes a client sends in one call.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    batch: u32,
    /// For how long.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// The size of a value.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(0..=1_048_576))]
    value_bytes: u32,
    /// Over how many predicates, named bench.0 and so on.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4_096))]
    predicates: u32,
    /// Read keys instead of writing them.
    #[arg(long)]
    reads: bool,
}

const HOUR_US: u64 = 3_600_000_000;

/// What one client saw.
struct Seen {
    latencies: Histogram<u64>,
    operations: u64,
    failed: u64,
    first_failure: Option<String>,
}

pub(super) async fn run(context: &Context, args: ClosedLoopArgs) -> Result<Done, Failure> {
    let client = context.client().await?;
    let names: Arc<Vec<String>> = Arc::new((0..args.predicates).map(|at| format!("bench.{at}")).collect());
    // The predicates exist before the clock starts.
    for outcome in
        client.write_many(names.iter().map(|name| (name.clone(), vec![put("k", "v")])).collect()).await
    {
        outcome?;
    }
    let stop = Arc::new(AtomicBool::new(false));
    let args = Arc::new(args);
    let begun = Instant::now();
    let clients: Vec<_> = (0..args.clients)
        .map(|number| {
            tokio::spawn(one_client(client.clone(), args.clone(), names.clone(), number, stop.clone()))
        })
        .collect();
    tokio::time::sleep(Duration::from_secs(args.seconds)).await;
    stop.store(true, Ordering::Relaxed);
    let mut all = Seen::new()?;
    for client in clients {
        let seen = client.await.map_err(|error| Failure::error(format!("a client broke: {error}")))??;
        all.latencies.add(&seen.latencies).map_err(|error| Failure::error(error.to_string()))?;
        all.operations += seen.operations;
        all.failed += seen.failed;
        all.first_failure = all.first_failure.or(seen.first_failure);
    }
    let seconds = begun.elapsed().as_secs_f64();
    let rate = all.operations as f64 / seconds;
    let ms = |value: u64| value as f64 / 1000.0;
    let (p50, p99) = (ms(all.latencies.value_at_quantile(0.5)), ms(all.latencies.value_at_quantile(0.99)));
    let (p999, max) = (ms(all.latencies.value_at_quantile(0.999)), ms(all.latencies.max()));
    let what = if args.reads { "reads" } else { "writes" };
    let mut text = format!(
        "{} {what} of {} B by {} clients, {} a call, over {} predicates, in {seconds:.1} s\n{rate:.0}/s, calls p50 {p50:.2} ms, p99 {p99:.2} ms, p99.9 {p999:.2} ms, max {max:.2} ms\n{} failed",
        all.operations, args.value_bytes, args.clients, args.batch, args.predicates, all.failed
    );
    if let Some(failure) = &all.first_failure {
        text.push_str(&format!(", the first: {failure}"));
    }
    let json = json!({
        "what": what,
        "clients": args.clients,
        "batch": args.batch,
        "value_bytes": args.value_bytes,
        "predicates": args.predicates,
        "seconds": seconds,
        "operations": all.operations,
        "failed": all.failed,
        "ops_per_s": rate,
        "p50_ms": p50,
        "p99_ms": p99,
        "p999_ms": p999,
        "max_ms": max,
    });
    Ok(Done { text, json, code: if all.failed == 0 { 0 } else { Failure::ERROR } })
}

impl Seen {
    fn new() -> Result<Self, Failure> {
        // Microseconds up to an hour: a fixed range, so that recording never allocates nor cuts a value off.
        let latencies =
            Histogram::new_with_bounds(1, HOUR_US, 3).map_err(|error| Failure::error(error.to_string()))?;
        Ok(Seen { latencies, operations: 0, failed: 0, first_failure: None })
    }
}

async fn one_client(
    client: Client,
    args: Arc<ClosedLoopArgs>,
    names: Arc<Vec<String>>,
    number: u32,
    stop: Arc<AtomicBool>,
) -> Result<Seen, Failure> {
    let mut seen = Seen::new()?;
    let value = bytes::Bytes::from(vec![b'v'; args.value_bytes as usize]);
    let mut at = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        let begun = Instant::now();
        // Keys are spread over 2^16 rows per client, so that a long run does not fill the disk with rows.
        let mut next = || {
            at += 1;
            let name = &names[(u64::from(number) + at) as usize % names.len()];
            (name, format!("{number:05}/{:05}", at & 0xffff))
        };
        let results: Vec<Result<(), String>> = if args.reads {
            let (name, key) = next();
            vec![client.get(name, key).await.map(drop).map_err(|error| error.to_string())]
        } else if args.batch == 1 {
            let (name, key) = next();
            vec![client.put(name, key, value.clone()).await.map(drop).map_err(|error| error.to_string())]
        } else {
            let writes = (0..args.batch)
                .map(|_| next())
                .map(|(name, key)| (name.clone(), vec![put(key, value.clone())]));
            let outcomes = client.write_many(writes.collect()).await;
            outcomes.into_iter().map(|outcome| outcome.map(drop).map_err(|error| error.to_string())).collect()
        };
        seen.latencies.saturating_record(begun.elapsed().as_micros() as u64);
        for result in results {
            match result {
                Ok(()) => seen.operations += 1,
                Err(error) => {
                    seen.failed += 1;
                    seen.first_failure.get_or_insert(error);
                }
            }
        }
    }
    Ok(seen)
}
