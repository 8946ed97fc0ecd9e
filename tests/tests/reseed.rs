//! Real processes whose engines are lost, and pulls that are killed: states come from whoever has them, once.

use std::{
    fs::{self, OpenOptions},
    io::{Seek, SeekFrom, Write},
    path::Path,
};

use pontoon_proto::v1::{self, MovePhase};
use pontoon_tests::{
    cluster::{Cluster, admin_at, until},
    process::{Program, files_in},
    traffic::{Rows, fill, verify},
};

const PROGRAM: Program =
    Program { exe: env!("CARGO_BIN_EXE_pontoon-under-test"), scratch: env!("CARGO_TARGET_TMPDIR") };

/// The replica of a predicate's group on a node, as that node tells of it.
async fn replica(cluster: &Cluster, at: usize, predicate: &str) -> Option<v1::ReplicaInfo> {
    let mut admin = admin_at(cluster.address(at)).await.ok()?;
    let request = v1::GroupsRequest { local: true, ..Default::default() };
    let groups = admin.groups(request).await.ok()?.into_inner().groups;
    groups.into_iter().find(|group| group.predicate == predicate)?.replicas.into_iter().next()
}

/// Waits until every member's log begins above the founding: no replay from it could bring the state back.
async fn truncated(cluster: &Cluster, predicate: &str) {
    for at in cluster.voters(predicate, 3).await {
        until("the log to begin later", async || {
            replica(cluster, at, predicate).await.filter(|info| info.first_index > 6)
        })
        .await;
    }
}

/// Waits until a node's replica has applied what its leader has committed.
async fn caught_up(cluster: &Cluster, at: usize, predicate: &str) {
    let leader = cluster.leader(predicate).await;
    let commit = replica(cluster, leader, predicate).await.expect("the leader tells").commit;
    until("the replica to have its state", async || {
        replica(cluster, at, predicate).await.filter(|info| info.applied >= commit && info.dead.is_empty())
    })
    .await;
}

/// What can happen to an engine's files.
#[derive(Debug, Clone, Copy)]
enum Harm {
    Deleted,
    Garbled,
    Cut,
    Untrusted,
}

fn harm(engine: &Path, how: Harm) {
    match how {
        Harm::Deleted => fs::remove_dir_all(engine).expect("it can be removed"),
        Harm::Garbled => {
            for path in files_in(&engine.join("data")) {
                let mut file = OpenOptions::new().write(true).open(&path).expect("it opens");
                file.seek(SeekFrom::Start(0)).expect("it seeks");
                file.write_all(&[0xa5; 64 << 10]).expect("it takes nonsense");
            }
        }
        Harm::Cut => {
            for path in files_in(&engine.join("data")) {
                OpenOptions::new().write(true).open(&path).expect("it opens").set_len(7).expect("it is cut");
            }
        }
        Harm::Untrusted => {
            let path = engine.join("ENGINE");
            let text = fs::read_to_string(&path).expect("the marker reads");
            let other = text.lines().map(|line| match line.starts_with("boot ") {
                true => "boot another-run-of-the-system\n".to_owned(),
                false => format!("{line}\n"),
            });
            fs::write(&path, other.collect::<String>()).expect("it takes another boot");
        }
    }
}

async fn engines_are_lost(engine: &str, harms: &[Harm]) {
    let mut cluster = Cluster::start(PROGRAM, engine, 3).await;
    let client = cluster.client().await;
    let expected: Rows = fill(&client, "name", 3_000, 300).await;
    for n in 0..200 {
        client.put("name", format!("one-{n}"), "x").await.expect("a write is taken");
    }
    truncated(&cluster, "name").await;
    for (at, how) in harms.iter().enumerate() {
        let node = at % 3;
        cluster.kill(node).await;
        harm(&cluster.dir(node).join("engine"), *how);
        cluster.restart(node).await;
        caught_up(&cluster, node, "name").await;
        caught_up(&cluster, node, "@meta").await;
        println!("{engine} {how:?}: node {node} has its state again");
        // Its vote counts: without another one, it and the third go on.
        let other = (node + 1) % 3;
        cluster.kill(other).await;
        client.put("name", format!("after-{at}"), "x").await.expect("two of three go on");
        cluster.restart(other).await;
    }
    let mut all = expected;
    all.extend((0..200).map(|n| (format!("one-{n}").into(), "x".into())));
    all.extend((0..harms.len()).map(|n| (format!("after-{n}").into(), "x".into())));
    verify(&client, "name", &all).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r15_sled_that_does_not_open_is_put_aside_and_seeded_anew() {
    engines_are_lost("sled", &[Harm::Garbled, Harm::Cut, Harm::Untrusted]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_was_deleted_or_garbled_is_seeded_anew() {
    engines_are_lost("fjall", &[Harm::Deleted, Harm::Garbled]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_changes_its_engine_and_takes_its_states_from_the_others() {
    let mut cluster = Cluster::start(PROGRAM, "sled", 3).await;
    let client = cluster.client().await;
    let expected = fill(&client, "name", 2_000, 100).await;
    cluster.terminate(1).await;
    cluster.restart_with(1, &["--engine", "fjall"]).await;
    caught_up(&cluster, 1, "name").await;
    cluster.terminate(1).await;
    // From here on it is fjall's.
    cluster.restart(1).await;
    let mut admin = admin_at(cluster.address(1)).await.expect("it serves");
    let status = admin.status(v1::StatusRequest {}).await.expect("it answers").into_inner();
    assert_eq!(status.engine, "fjall");
    verify(&client, "name", &expected).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_is_killed_while_it_copies_asks_for_nothing_that_it_had() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 4).await;
    let client = cluster.client().await;
    let expected = fill(&client, "name", 100_000, 300).await;
    let holders = cluster.voters("name", 3).await;
    let target = (0..4).find(|node| !holders.contains(node)).expect("one of four holds no replica");
    cluster.terminate(target).await;
    // Slow enough to be met in the middle.
    let slow = ["--snapshot-budget", "4000000"];
    cluster.restart_with(target, &slow).await;
    let leader = cluster.leader("name").await;
    let source = *holders.iter().find(|node| **node != leader).expect("two follow");
    let id = cluster.start_move("name", source, target).await;
    let met = until("the copy to be half done", async || {
        let pull = replica(&cluster, target, "name").await?.pull?;
        (pull.bytes_done * 3 > pull.bytes_total && pull.bytes_total > 0).then_some(pull)
    })
    .await;
    assert!(met.bytes_done < met.bytes_total, "met in the middle: {met:?}");
    cluster.kill(target).await;
    // The log of the target's next life alone.
    fs::write(cluster.log(target), "").expect("its log can be emptied");
    cluster.restart(target).await;
    assert_eq!(cluster.moved(id).await.phase(), MovePhase::Done);
    let said = fs::read_to_string(cluster.log(target)).expect("it logs");
    let installed = said.lines().filter(|line| line.contains("a snapshot is installed"));
    let number = |line: &str, name: &str| -> u64 {
        let value = line.split(&format!("{name}=")).nth(1).expect("the line tells");
        value.split_whitespace().next().and_then(|word| word.parse().ok()).expect("a number")
    };
    let line = installed.max_by_key(|line| number(line, "bytes")).expect("it took the state");
    // Nobody writes, so the state is the same and each chunk that was durable is held: what had been told as done was.
    assert!(number(line, "held") > 0, "{line}");
    assert!(number(line, "bytes") <= met.bytes_total - met.bytes_done, "{line}; {met:?}");
    verify(&client, "name", &expected).await;
}
