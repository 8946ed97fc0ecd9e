//! Where replicas lie: rules, drains, nodes that are silent for too long, and plans, on real processes and at the terminal.

use std::{collections::BTreeSet, fs};

use pontoon_proto::{ReplicaId, v1};
use pontoon_tests::{
    cluster::{Cluster, until},
    process::Program,
    traffic::{Traffic, fill, verify},
};
use serde_json::Value;

const PROGRAM: Program =
    Program { exe: env!("CARGO_BIN_EXE_pontoon-under-test"), scratch: env!("CARGO_TARGET_TMPDIR") };

const ROWS: usize = 300;
const VALUE_BYTES: usize = 300;

async fn json(cluster: &Cluster, at: usize, command: &[&str]) -> Value {
    let said = cluster.says(at, &[command, &["--json"]].concat(), 0, &[]).await;
    serde_json::from_str(said.trim().lines().last().expect("an object")).expect("it is JSON")
}

async fn set_rules(cluster: &Cluster, rules: &str, code: i32, words: &[&str]) {
    let file = cluster.dir(0).with_extension("rules");
    fs::write(&file, rules).unwrap();
    cluster.says(0, &["rules", "set", file.to_str().expect("a path")], code, words).await;
}

/// The nodes of a predicate's voters, by their ids.
fn nodes_of(map: &v1::ClusterMap, predicate: &str) -> Option<BTreeSet<u64>> {
    let shard = map.shards.iter().find(|shard| shard.predicate == predicate)?;
    Some(shard.voters.iter().map(|id| ReplicaId::new(*id).unwrap().node().get()).collect())
}

async fn with_zones(zones: &[&str]) -> Cluster {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 0).await;
    for zone in zones {
        cluster.add_with(&["--label", &format!("zone={zone}")]).await;
    }
    cluster.voters("@meta", 3).await;
    cluster
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_place_predicates_and_move_what_lies_against_them() {
    let cluster = with_zones(&["a", "a", "b", "c"]).await;
    let client = cluster.client().await;
    let id = |at: usize| cluster.id(at);
    set_rules(&cluster, "[default]\nspread = [\"zone\"]\n", 0, &["the rules are set"]).await;
    let rows = fill(&client, "name", ROWS, VALUE_BYTES).await;
    let spread = cluster.map_until("a predicate in every zone", |map| nodes_of(map, "name")).await;
    assert!(spread.contains(&id(2)) && spread.contains(&id(3)), "one in b, one in c: {spread:?}");
    let nodes = client.nodes(v1::NodesRequest {}).await.expect("it answers").nodes;
    let zones: Vec<String> =
        nodes.into_iter().map(|view| view.node.unwrap().labels["zone"].clone()).collect();
    assert_eq!(zones, ["a", "a", "b", "c"], "the founder has its label, too");

    let impossible = "[predicate.name]\nrequire = [\"zone=a\"]\n";
    set_rules(&cluster, impossible, 2, &["name: it should have 3 replicas, and 2 of 4", "--force"]).await;
    set_rules(&cluster, "[default]\nvoter = 3\n", 2, &["line 2", "voters"]).await;
    let without_c = "[default]\nspread = [\"zone\"]\n[predicate.name]\nrequire = [\"!zone=c\"]\n";
    let mut traffic = Traffic::start(&client, "name", 2);
    traffic.acknowledged(20).await;
    set_rules(&cluster, without_c, 0, &[]).await;
    let wanted = BTreeSet::from([id(0), id(1), id(2)]);
    cluster
        .map_until("the predicate to leave zone c", |map| {
            (nodes_of(map, "name")? == wanted && map.moves.is_empty()).then_some(())
        })
        .await;
    traffic.acknowledged(20).await;

    let name = id(3).to_string();
    let words = ["cannot take one", "NO  require !zone=c", "pontoon rules show"];
    cluster.says(1, &["explain", "name", "--node", &name], 0, &words).await;
    cluster
        .says(1, &["move", "start", "name", "--to", &name], 2, &["require !zone=c", "pontoon explain name"])
        .await;
    cluster.says(1, &["rules", "check"], 0, &[]).await;
    cluster.says(1, &["rules", "show"], 0, &["[predicate.name]", "!zone=c"]).await;
    let mut expected = rows;
    expected.extend(traffic.stop().await);
    verify(&client, "name", &expected).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_node_is_empty_leads_nothing_and_may_go() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 4).await;
    let client = cluster.client().await;
    let predicates = ["one", "two", "three", "four"];
    let mut rows = Vec::new();
    for predicate in predicates {
        rows.push(fill(&client, predicate, ROWS, VALUE_BYTES).await);
    }
    let victim = cluster.leader("one").await;
    let other = (victim + 1) % 4;
    let mut traffic = Traffic::start(&client, "one", 2);
    traffic.acknowledged(20).await;
    let name = format!("n{}", cluster.id(victim));
    cluster.says(other, &["decommission", &name], 2, &["answers", &format!("pontoon drain {name}")]).await;
    cluster.says(other, &["drain", &name, "--wait"], 0, &["is empty", "pontoon decommission"]).await;
    let looked = json(&cluster, other, &["drain", &name, "--look"]).await;
    assert_eq!((looked["replicas"].as_u64(), looked["leaders"].as_u64()), (Some(0), Some(0)), "{looked}");
    traffic.acknowledged(20).await;
    let id = cluster.id(victim);
    cluster
        .map_until("every predicate to have three replicas elsewhere", |map| {
            let all = predicates.iter().chain(&["@meta"]);
            let nodes: Option<Vec<BTreeSet<u64>>> = all.map(|predicate| nodes_of(map, predicate)).collect();
            nodes?.iter().all(|nodes| nodes.len() == 3 && !nodes.contains(&id)).then_some(())
        })
        .await;
    cluster.says(other, &["decommission", &name], 0, &[]).await;
    cluster.kill(victim).await;
    traffic.acknowledged(20).await;
    rows[0].extend(traffic.stop().await);
    for (predicate, rows) in predicates.iter().zip(&rows) {
        verify(&client, predicate, rows).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_silent_for_too_long_is_replaced_and_fenced_when_it_returns() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 4).await;
    let client = cluster.client().await;
    set_rules(&cluster, "[cluster]\nrepair_after = \"2s\"\n", 0, &[]).await;
    let rows = fill(&client, "name", ROWS, VALUE_BYTES).await;
    let holders = cluster.voters("name", 3).await;
    let leader = cluster.leader("name").await;
    let victim = holders.into_iter().find(|node| *node != leader).expect("a follower");
    let (id, asked) = (cluster.id(victim), (victim + 1) % 4);
    cluster.kill(victim).await;
    // Nothing waits for its return: not the moves, and not those that come after them.
    cluster
        .map_until("its replicas to be made anew elsewhere", |map| {
            let nodes = nodes_of(map, "name")?;
            (nodes.len() == 3 && !nodes.contains(&id) && map.moves.is_empty()).then_some(())
        })
        .await;
    verify(&client, "name", &rows).await;
    cluster.restart(victim).await;
    let client = cluster.client().await;
    until("what it held to be gone from it", async || {
        let groups = client.groups(v1::GroupsRequest::default()).await.ok()?;
        let name = groups.groups.into_iter().find(|group| group.predicate == "name")?;
        let node = |replica: &v1::ReplicaInfo| ReplicaId::new(replica.replica).unwrap().node().get();
        (!name.replicas.iter().any(|replica| node(replica) == id)).then_some(())
    })
    .await;
    // It is a node like any other again.
    let source = format!("n{}", cluster.id(leader));
    let target = format!("n{id}");
    cluster
        .says(asked, &["move", "start", "name", "--from", &source, "--to", &target, "--wait"], 0, &[])
        .await;
    verify(&client, "name", &rows).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_fills_a_new_node_and_is_refused_once_the_map_has_changed() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 3).await;
    let client = cluster.client().await;
    let predicates: Vec<String> = (0..8).map(|n| format!("p{n}")).collect();
    let mut rows = Vec::new();
    for predicate in &predicates {
        rows.push(fill(&client, predicate, ROWS, VALUE_BYTES).await);
    }
    let new = cluster.add().await;
    let plan = json(&cluster, 0, &["rebalance", "plan"]).await;
    let moves = plan["moves"].as_array().expect("moves");
    assert!(moves.len() >= 5 && moves.iter().all(|mv| mv["to"] == cluster.id(new)), "{plan}");
    assert!(plan["spread_after"].as_f64() < plan["spread_before"].as_f64(), "{plan}");
    let id = plan["plan"].as_str().expect("an id").to_owned();
    // One of its predicates is moved by hand before it is applied.
    let moved = moves[0]["predicate"].as_str().expect("a name");
    let to = cluster.id(new).to_string();
    let from = moves[0]["from"].to_string();
    cluster.says(1, &["move", "start", moved, "--from", &from, "--to", &to, "--wait"], 0, &[]).await;
    cluster.says(1, &["rebalance", "apply", &id], 2, &["has changed since", "rebalance plan"]).await;
    cluster.says(1, &["rebalance", "apply", "unknown"], 2, &["no plan unknown"]).await;
    let plan = json(&cluster, 2, &["rebalance", "plan"]).await;
    let id = plan["plan"].as_str().expect("an id").to_owned();
    cluster.says(1, &["rebalance", "apply", &id], 0, &["begins"]).await;
    let client = cluster.client().await;
    until("the plan to be over", async || {
        let events =
            client.events(v1::EventsRequest { limit: 1_000, ..Default::default() }).await.ok()?.events;
        let over = events.iter().any(|event| event.text.contains(&format!("plan {id}: all")));
        let list = client.move_list(v1::MoveListRequest::default()).await.ok()?.moves;
        (over && list.is_empty()).then_some(())
    })
    .await;
    let again = json(&cluster, 0, &["rebalance", "plan"]).await;
    assert!(
        again["spread_before"].as_f64() <= plan["spread_after"].as_f64().map(|spread| spread + 0.1),
        "{again}"
    );
    for (predicate, rows) in predicates.iter().zip(&rows) {
        verify(&client, predicate, rows).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_counts_what_is_asked_of_groups_and_says_so() {
    let cluster = Cluster::start(PROGRAM, "fjall", 3).await;
    let client = cluster.client().await;
    let mut traffic = Traffic::start(&client, "busy", 8);
    traffic.acknowledged(50).await;
    cluster.voters("busy", 3).await;
    let plan = until("the nodes to tell how busy they are", async || {
        let plan = json(&cluster, 0, &["rebalance", "plan", "--by", "load"]).await;
        let nodes = plan["nodes"].as_array().expect("nodes");
        nodes.iter().all(|node| node["writes_before"].as_u64() > Some(0)).then(|| plan.clone())
    })
    .await;
    // Each of three nodes bears every write: there is nothing to even.
    assert_eq!(
        (plan["load_spread_before"].as_f64(), plan["moves"].as_array().map(Vec::len)),
        (Some(0.0), Some(0))
    );
    cluster.says(1, &["rebalance", "plan"], 0, &["writes/s", "of writes"]).await;
    cluster.says(1, &["rebalance", "plan", "--by", "weight"], 2, &["bytes", "load", "both"]).await;
    traffic.stop().await;
}
