//! Every predicate moves around five nodes under mixed traffic, for two minutes, while nodes are killed; then every history is
//! judged and every triple compared.
//!
//! `PONTOON_ROUNDS_SECONDS` gives it more time or less, `PONTOON_ROUNDS_SEED` other chances.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use pontoon_node::client::Client;
use pontoon_proto::v1;
use pontoon_tests::{
    Rng,
    chaos::work::move_around,
    cluster::{Cluster, until},
    films::{FILMS, Triples, films, triples_of},
    history::Histories,
    process::Program,
    traffic::{Rows, fill, read_all},
};
use tokio::time::{Instant, sleep};

const PROGRAM: Program =
    Program { exe: env!("CARGO_BIN_EXE_pontoon-under-test"), scratch: env!("CARGO_TARGET_TMPDIR") };

const NODES: usize = 5;
/// Histories are kept of so many predicates, by so many clients each.
const WATCHED: usize = 4;
const CLIENTS: u64 = 3;
/// Between two kills, and how long a node stays away.
const KILL_EVERY: Duration = Duration::from_secs(4);
const AWAY: Duration = Duration::from_millis(800);

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// What the predicates hold that nobody changes.
enum Loaded {
    Films(BTreeMap<String, Triples>),
    Made(BTreeMap<String, Rows>),
}

impl Loaded {
    fn predicates(&self) -> Vec<String> {
        match self {
            Loaded::Films(films) => films.keys().cloned().collect(),
            Loaded::Made(rows) => rows.keys().cloned().collect(),
        }
    }
}

async fn load(cluster: &Cluster, client: &Client) -> Loaded {
    if Path::new(FILMS).exists() {
        let (exit, said) = PROGRAM.run(["--addr", cluster.address(0), "load", FILMS]).await;
        assert!(exit.success(), "{said}");
        return Loaded::Films(films());
    }
    println!("{FILMS} is not there: made data instead");
    let mut made = BTreeMap::new();
    for nth in 0..8 {
        let predicate = format!("p{nth}");
        made.insert(predicate.clone(), fill(client, &predicate, 4_000, 200).await);
    }
    Loaded::Made(made)
}

/// Compares what is there with what was loaded; rows of the histories are judged elsewhere.
async fn compare(client: &Client, loaded: &Loaded) {
    let plain =
        |rows: Rows| -> Rows { rows.into_iter().filter(|(key, _)| !key.starts_with(b"history/")).collect() };
    match loaded {
        Loaded::Films(expected) => {
            for (predicate, triples) in expected {
                let (found, others) = triples_of(plain(read_all(client, predicate).await));
                let lost: Vec<_> = triples.difference(&found).take(3).collect();
                assert!(lost.is_empty() && found.len() == triples.len(), "{predicate}: lost {lost:?}");
                assert!(others.is_empty(), "{predicate}: nobody wrote {others:?}");
            }
        }
        Loaded::Made(expected) => {
            for (predicate, rows) in expected {
                assert!(
                    &plain(read_all(client, predicate).await) == rows,
                    "{predicate} is not what was loaded"
                );
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_predicate_moves_around_five_nodes_while_they_are_killed() {
    let seconds = from_environment("PONTOON_ROUNDS_SECONDS", 120);
    let seed = from_environment("PONTOON_ROUNDS_SEED", u64::from(std::process::id()));
    println!("PONTOON_ROUNDS_SEED={seed}");
    let mut rng = Rng::new(seed);
    let mut cluster = Cluster::start(PROGRAM, "fjall", NODES).await;
    let client = cluster.client().await;
    cluster.voters("@meta", 3).await;
    let loaded = load(&cluster, &client).await;
    let predicates = loaded.predicates();
    let watched: Vec<String> = predicates.iter().take(WATCHED).cloned().collect();
    let histories = Histories::start(&client, &watched, CLIENTS, rng.draw());
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let nodes: Vec<u64> = (0..NODES).map(|at| cluster.id(at)).collect();
    let mover = tokio::spawn(move_around(
        client.clone(),
        predicates.clone(),
        nodes.clone(),
        stop.clone(),
        done.clone(),
        Rng::new(rng.draw()),
    ));

    let (end, mut kills) = (Instant::now() + Duration::from_secs(seconds), 0);
    while Instant::now() < end {
        sleep(KILL_EVERY).await;
        let victim = rng.below(NODES as u64) as usize;
        cluster.kill(victim).await;
        sleep(AWAY).await;
        cluster.restart(victim).await;
        kills += 1;
    }
    stop.store(true, Ordering::Relaxed);
    mover.await.expect("the mover does not panic");
    let judged = histories.judge().await;

    // Whatever still goes on comes to its end, and nothing is left over.
    until("no move to go on and no group to have a problem", async || {
        let moves = client.move_list(v1::MoveListRequest::default()).await.ok()?.moves;
        let request = v1::GroupsRequest { problem: true, ..Default::default() };
        let reply = client.groups(request).await.ok()?;
        (moves.is_empty() && reply.groups.is_empty() && reply.unreachable.is_empty()).then_some(())
    })
    .await;
    let client = cluster.client().await;
    compare(&client, &loaded).await;
    let moved = done.load(Ordering::Relaxed);
    println!("{kills} kills, {moved} moves done, {judged:?}");
    assert!(judged.answered > 100 && judged.keys >= watched.len(), "hardly anything was asked: {judged:?}");
    assert!(moved >= seconds / 10, "hardly anything moved: {moved} moves");
}
