//! Replicas that die while their nodes live.

use std::{fs, path::Path};

use pontoon_proto::ReplicaId;
use pontoon_tests::{
    cluster::Cluster,
    process::Program,
    traffic::{Traffic, fill, verify},
};

const PROGRAM: Program =
    Program { exe: env!("CARGO_BIN_EXE_pontoon-under-test"), scratch: env!("CARGO_TARGET_TMPDIR") };

const FILL_VALUE_BYTES: usize = 300;

/// Flips a bit of the first place in a log that holds these bytes.
fn rot(log: &Path, needle: &[u8]) {
    for entry in fs::read_dir(log).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "wal") {
            continue;
        }
        let mut bytes = fs::read(&path).unwrap();
        if let Some(at) = bytes.windows(needle.len()).position(|window| window == needle) {
            bytes[at] ^= 1;
            return fs::write(&path, bytes).unwrap();
        }
    }
    panic!("no segment in {} holds it", log.display());
}

/// There is no fourth node: the dead replica leaves, and its node is given another.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_whose_log_rots_is_replaced_on_its_own_node() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 3).await;
    let client = cluster.client().await;
    let mut expected = fill(&client, "name", 500, FILL_VALUE_BYTES).await;
    let other_rows = fill(&client, "other", 500, FILL_VALUE_BYTES).await;
    cluster.voters("name", 3).await;
    let mut traffic = Traffic::start(&client, "name", 2);
    traffic.acknowledged(20).await;

    let victim = (cluster.leader("name").await + 1) % 3;
    let id = cluster.id(victim);
    let voters = |map: &pontoon_proto::v1::ClusterMap| {
        let shard = map.shards.iter().find(|shard| shard.predicate == "name")?;
        let replicas = shard.voters.iter().map(|id| ReplicaId::new(*id).expect("a replica"));
        Some(replicas.collect::<Vec<ReplicaId>>())
    };
    let before = cluster.map_until("name to be in the map", voters).await;
    let dead = *before.iter().find(|replica| replica.node().get() == id).unwrap();
    assert!(cluster.terminate(victim).await.success());
    rot(&cluster.dir(victim).join("wal"), b"fill/0000123");
    cluster.restart(victim).await;

    let after = cluster
        .map_until("the dead replica to be replaced", |map| {
            voters(map).filter(|voters| voters.len() == 3 && !voters.contains(&dead))
        })
        .await;
    let new = after.iter().find(|replica| replica.node() == dead.node()).expect("one on its node");
    assert!(new.ordinal() > dead.ordinal(), "{new} after {dead}");
    // It counts: another node may go.
    let other = (victim + 1) % 3;
    cluster.kill(other).await;
    traffic.acknowledged(20).await;
    cluster.restart(other).await;
    expected.extend(traffic.stop().await);
    verify(&client, "name", &expected).await;
    verify(&client, "other", &other_rows).await;
}
