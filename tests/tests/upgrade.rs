//! Real processes of two releases beside each other: upgraded one by one, some taken back, finalised once, under traffic.
//!
//! The older release is the binary that PONTOON_PREVIOUS names (`.ci/previous` builds one from an earlier commit); without it this
//! binary plays one that speaks no later cluster version than 1.

use std::{fs, path::Path};

use pontoon_proto::v1::MovePhase;
use pontoon_tests::{
    cluster::{Cluster, until},
    process::Program,
    traffic::{Traffic, verify},
};

const PROGRAM: Program =
    Program { exe: env!("CARGO_BIN_EXE_pontoon-under-test"), scratch: env!("CARGO_TARGET_TMPDIR") };

/// The older release, the options that its nodes take, and whether it is another binary.
fn older() -> (Program, &'static [&'static str], bool) {
    match std::env::var("PONTOON_PREVIOUS") {
        Ok(path) => (Program { exe: path.leak(), ..PROGRAM }, &[], true),
        Err(_) => (PROGRAM, &["--newest-version", "1"], false),
    }
}

/// Starts a stopped node by the older release.
async fn take_back(cluster: &mut Cluster, at: usize) {
    let (program, options, _) = older();
    cluster.set_program(program);
    cluster.restart_with(at, options).await;
    cluster.set_program(PROGRAM);
}

async fn upgrade(cluster: &mut Cluster, at: usize) {
    assert!(cluster.terminate(at).await.success(), "node {at} ends well");
    cluster.restart(at).await;
}

/// A cluster of the older release.
async fn old_cluster(nodes: usize) -> Cluster {
    let (program, options, _) = older();
    let mut cluster = Cluster::start(program, "fjall", 0).await;
    for _ in 0..nodes {
        cluster.add_with(options).await;
    }
    cluster.voters("@meta", 3).await;
    cluster.set_program(PROGRAM);
    cluster
}

/// Moves the predicate's replica from one node that holds it to one that does not.
async fn move_somewhere(cluster: &Cluster, predicate: &str) {
    let holders = cluster.voters(predicate, 3).await;
    let free = (0..4).find(|at| !holders.contains(at)).expect("one of four is free");
    let id = cluster.start_move(predicate, holders[0], free).await;
    assert_eq!(cluster.moved(id).await.phase(), MovePhase::Done);
}

async fn at_version(cluster: &Cluster, version: u32) {
    let what = format!("the cluster to be at version {version}");
    cluster.map_until(&what, |map| (map.cluster_version.max(1) == version).then_some(())).await;
}

fn marker(cluster: &Cluster, at: usize) -> std::path::PathBuf {
    cluster.dir(at).join("NODE")
}

async fn remembers(path: &Path) {
    until("the directory to say which version it is used at", async || {
        fs::read_to_string(path).ok().filter(|text| text.contains("\"format\": 2"))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_are_upgraded_one_by_one_and_back_and_the_version_is_finalised_once() {
    let (program, options, foreign) = older();
    let mut cluster = old_cluster(4).await;
    let client = cluster.client().await;
    let mut traffic = Traffic::start(&client, "name", 3);
    traffic.acknowledged(30).await;
    cluster.voters("name", 3).await;
    if foreign {
        cluster.says(0, &["upgrade", "status"], 2, &["older release"]).await;
    }

    upgrade(&mut cluster, 0).await;
    upgrade(&mut cluster, 1).await;
    traffic.acknowledged(30).await;
    let said =
        cluster.says(0, &["upgrade", "status"], 0, &["the cluster is at version 1", "in its way"]).await;
    assert!(said.contains("n3 speaks 1, not 2") && said.contains("n4 speaks 1, not 2"), "{said}");
    cluster.says(0, &["upgrade", "finalise"], 2, &[]).await;
    cluster.says(0, &["status"], 0, &["some nodes speak 2, others 1"]).await;
    // States are copied and their hashes compared between the releases.
    move_somewhere(&cluster, "name").await;
    traffic.acknowledged(30).await;

    // Back, and forth again: what the newer one wrote the older one reads.
    assert!(cluster.terminate(1).await.success());
    take_back(&mut cluster, 1).await;
    traffic.acknowledged(30).await;
    move_somewhere(&cluster, "name").await;
    for at in [1, 2, 3] {
        upgrade(&mut cluster, at).await;
        traffic.acknowledged(20).await;
    }

    // One that is silent might come back as it was.
    cluster.kill(3).await;
    cluster.says(0, &["upgrade", "finalise"], 2, &["n4 does not answer"]).await;
    at_version(&cluster, 1).await;
    cluster.restart(3).await;
    let before = fs::read(marker(&cluster, 3)).expect("a directory has a marker");
    cluster.says(0, &["upgrade", "status"], 0, &["nothing is in its way", "node-versions"]).await;
    cluster.says(0, &["upgrade", "finalise", "3"], 2, &["it goes to 2 next"]).await;
    let finalised = until("the version to be finalised", async || {
        // A node that started just now may not have been heard yet.
        let said = PROGRAM.run(["--addr", cluster.address(0), "upgrade", "finalise", "2"]).await;
        said.0.success().then_some(said.1)
    })
    .await;
    assert!(finalised.contains("the cluster is at version 2"), "{finalised}");
    at_version(&cluster, 2).await;
    traffic.acknowledged(30).await;
    cluster.says(0, &["upgrade", "finalise"], 2, &["no node speaks a later one"]).await;
    cluster.says(0, &["upgrade", "finalise", "2"], 0, &["at version 2"]).await;

    // From here on the older release is kept out: by the directory,
    remembers(&marker(&cluster, 3)).await;
    assert!(cluster.terminate(3).await.success());
    let newer = fs::read(marker(&cluster, 3)).expect("a directory has a marker");
    cluster.set_program(program);
    cluster.start_in_vain_with(3, options);
    let (exit, said) = cluster.ended(3).await;
    let reason =
        if foreign { "format 2, this version knows 1" } else { "at version 2, and this binary speaks 1" };
    assert!(!exit.success() && said.contains(reason), "{exit}: {said}");
    // by the others, should the directory say nothing,
    fs::write(marker(&cluster, 3), before).expect("a marker can be written");
    cluster.start_in_vain_with(3, options);
    if foreign {
        let log = cluster.log(3);
        until("the older node to hear that it is refused", async || {
            fs::read_to_string(&log)
                .ok()
                .filter(|text| text.contains("is refused: the cluster is at version 2"))
        })
        .await;
        cluster.kill(3).await;
    } else {
        let (exit, said) = cluster.ended(3).await;
        assert!(!exit.success() && said.contains("at version 2, and this binary speaks 1"), "{exit}: {said}");
    }
    // and as a new member.
    let new = program.scratch();
    let dir = new.path().join("new").display().to_string();
    let join = ["node", "--dir", &dir, "--listen", "127.0.0.1:0", "--join", cluster.address(0)];
    let (exit, said) = program.run([&join[..], options].concat()).await;
    assert!(!exit.success() && said.contains("the cluster is at version 2"), "{exit}: {said}");

    cluster.set_program(PROGRAM);
    fs::write(marker(&cluster, 3), newer).expect("a marker can be written");
    cluster.restart(3).await;
    traffic.acknowledged(30).await;
    let rows = traffic.stop().await;
    verify(&cluster.client().await, "name", &rows).await;
    for at in 0..4 {
        assert!(cluster.terminate(at).await.success(), "node {at} ends well");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_that_is_left_undone_is_told_as_a_problem() {
    let mut cluster = old_cluster(3).await;
    let patience = ["--set", "upgrade.patience=1ms"];
    for at in 0..2 {
        assert!(cluster.terminate(at).await.success());
        cluster.restart_with(at, &patience).await;
    }
    // Only a leader that knows of versions tells of them.
    let told = async |cluster: &Cluster, code: &str| {
        until(code, async || {
            let (_, said) = PROGRAM.run(["--addr", cluster.address(0), "status", "--problems"]).await;
            said.contains(code).then_some(said)
        })
        .await
    };
    assert!(cluster.terminate(2).await.success());
    take_back(&mut cluster, 2).await;
    if cluster.meta_leader().await == 2 {
        cluster.kill(2).await;
        cluster.meta_leader().await;
        take_back(&mut cluster, 2).await;
    }
    let said = told(&cluster, "mixed-versions").await;
    assert!(said.contains("n3"), "{said}");
    assert!(cluster.terminate(2).await.success());
    cluster.restart_with(2, &patience).await;
    let said = told(&cluster, "finalise-due").await;
    assert!(said.contains("pontoon upgrade finalise"), "{said}");
}
