//! Real processes, killed and restarted under traffic that knows what must be true.

use pontoon_node::{api::data_client::DataClient, client::put};
use pontoon_proto::v1;
use pontoon_tests::{
    cluster::{Cluster, within},
    process::Program,
    traffic::{Rows, Traffic, verify},
};

const PROGRAM: Program =
    Program { exe: env!("CARGO_BIN_EXE_pontoon-under-test"), scratch: env!("CARGO_TARGET_TMPDIR") };

/// Puts a key with itself for a value, without a map, a session or a second try.
async fn plain_put(address: &str, predicate: &str, key: &str) -> v1::WriteReply {
    let mut data = DataClient::connect(format!("http://{address}")).await.expect("the node listens");
    let ops = vec![put(key.to_owned(), key.to_owned())];
    let request = v1::WriteRequest { predicate: predicate.to_owned(), ops, ..Default::default() };
    within("a plain write", data.write(request)).await.expect("the node answers").into_inner()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_leader_costs_no_write_and_repeats_none() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 3).await;
    let client = cluster.client().await;
    let mut traffic = Traffic::start(&client, "name", 4);
    traffic.acknowledged(50).await;
    cluster.voters("name", 3).await;

    for _ in 0..2 {
        let leader = cluster.leader("name").await;
        cluster.kill(leader).await;
        traffic.acknowledged(100).await;
        cluster.restart(leader).await;
        traffic.acknowledged(50).await;
    }
    let mut rows = traffic.stop().await;
    // A client that knows nothing asks any node.
    for at in 0..3 {
        let key = format!("by node {at}");
        let reply = plain_put(cluster.address(at), "name", &key).await;
        assert!(reply.refusal.is_none() && reply.applied, "{reply:?}");
        rows.insert(key.clone().into(), key.into());
    }
    verify(&client, "name", &rows).await;
    for at in 0..3 {
        assert!(cluster.terminate(at).await.success(), "node {at} ends well when it is asked to");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_was_killed_whole_comes_back_with_everything() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 3).await;
    let client = cluster.client().await;
    let mut expected = Vec::new();
    for predicate in ["name", "genre", "director.film"] {
        let mut traffic = Traffic::start(&client, predicate, 2);
        traffic.acknowledged(30).await;
        cluster.voters(predicate, 3).await;
        expected.push((predicate, traffic));
    }
    let mut rows: Vec<(&str, Rows)> = Vec::new();
    for (predicate, traffic) in expected {
        rows.push((predicate, traffic.stop().await));
    }
    for _ in 0..2 {
        for at in 0..3 {
            cluster.kill(at).await;
        }
        cluster.restart_all(&[0, 1, 2]).await;
        let client = cluster.client().await;
        for (predicate, rows) in &rows {
            verify(&client, predicate, rows).await;
        }
    }
    let mut traffic = Traffic::start(&cluster.client().await, "country", 2);
    traffic.acknowledged(30).await;
    traffic.stop().await;
}
