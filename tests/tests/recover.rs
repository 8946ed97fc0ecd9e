//! Quorums that are lost for good, on real processes and at the terminal.

use std::path::Path;

use pontoon_tests::{
    cluster::{Cluster, until, within},
    process::Program,
    traffic::{Rows, Traffic, fill, verify},
};

const PROGRAM: Program =
    Program { exe: env!("CARGO_BIN_EXE_pontoon-under-test"), scratch: env!("CARGO_TARGET_TMPDIR") };

const ROWS: usize = 500;
const VALUE_BYTES: usize = 300;

/// Writes some rows and waits for each.
async fn write_more(cluster: &Cluster, prefix: &str, expected: &mut Rows) {
    let client = cluster.client().await;
    for at in 0..20 {
        let (key, value) = (format!("{prefix}/{at}"), at.to_string());
        let written = within("a write", client.put("name", key.clone(), value.clone())).await;
        written.expect("it is acknowledged");
        expected.insert(key.into(), value.into());
    }
}

fn path(file: &Path) -> &str {
    file.to_str().expect("a path")
}

/// Two of three nodes are gone, and with them the quorums of a predicate and of the meta group.
#[tokio::test(flavor = "multi_thread")]
async fn one_of_three_nodes_goes_on_with_what_it_has() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 3).await;
    let client = cluster.client().await;
    let mut expected = fill(&client, "name", ROWS, VALUE_BYTES).await;
    let mut traffic = Traffic::start(&client, "name", 2);
    traffic.acknowledged(50).await;
    expected.extend(traffic.stop().await);
    cluster.voters("name", 3).await;
    cluster.voters("@meta", 3).await;
    // Whoever leads has every row that was acknowledged.
    let stays = cluster.leader("name").await;
    let (first, second) = ((stays + 1) % 3, (stays + 2) % 3);
    let id = |at: usize| format!("n{}", cluster.id(at));
    let (one, both) = (id(first), format!("{},{}", id(first), id(second)));
    let scratch = cluster.dir(0).with_extension("plans");
    std::fs::create_dir(&scratch).unwrap();
    let (file, later) = (scratch.join("first.json"), scratch.join("later.json"));

    let plan = ["recover", "plan", "--out", path(&file), "--lost"];
    cluster.says(stays, &[&plan[..], &[&one]].concat(), 2, &["answers: it is not lost"]).await;
    cluster.kill(first).await;
    let words = ["every group has its quorum without", "pontoon decommission"];
    cluster.says(stays, &[&plan[..], &[&one]].concat(), 0, &words).await;
    cluster.kill(second).await;
    let words = ["does not answer", "if it is lost for good, too, say so: --lost"];
    cluster.says(stays, &[&plan[..], &[&one]].concat(), 2, &words).await;
    cluster.says(stays, &[&plan[..], &["n77"]].concat(), 2, &["there is no node n77"]).await;
    assert!(!file.exists(), "nothing was planned");
    let words = ["the meta group", "name", "goes on", "is lost", "pontoon recover apply"];
    cluster.says(stays, &[&plan[..], &[&both]].concat(), 0, &words).await;
    cluster.says(stays, &[&plan[..], &[&both]].concat(), 2, &["is not written", "--out"]).await;
    cluster.says(stays, &["recover", "verify", path(&file)], 3, &["does not serve"]).await;

    // One of the two comes back after all: there is a quorum again, and it goes on.
    cluster.restart(first).await;
    cluster.says(stays, &["recover", "apply", path(&file)], 2, &["answers: it is not lost"]).await;
    write_more(&cluster, "again", &mut expected).await;
    // A write is acknowledged by two of three, and these are the two: the one that stays has it, whoever leads.
    cluster.kill(first).await;
    let words = ["nothing was done", "has gone on since", "make a new plan"];
    cluster.says(stays, &["recover", "apply", path(&file)], 2, &words).await;

    let plan = ["recover", "plan", "--out", path(&later), "--lost", &both];
    cluster.says(stays, &plan, 0, &[]).await;
    cluster
        .says(stays, &["recover", "apply", path(&later)], 0, &["2 groups go on", "removed for ever"])
        .await;
    until("both groups to serve", async || {
        let command = ["--addr", cluster.address(stays), "recover", "verify", path(&later)];
        let (exit, said) = PROGRAM.run(command).await;
        (exit.code() == Some(0) && said.contains("1 of 3")).then_some(())
    })
    .await;
    let client = cluster.client().await;
    verify(&client, "name", &expected).await;
    write_more(&cluster, "alone", &mut expected).await;

    // A lost node that returns is told that it is none any more.
    cluster.start_in_vain(first);
    let (exit, said) = cluster.ended(first).await;
    assert!(!exit.success(), "{said}");
    assert!(said.contains("was removed from the cluster, for ever"), "{said}");

    // New nodes: everything has three replicas again. The plan is done, and applying it again changes nothing.
    cluster.add().await;
    cluster.add().await;
    let verify_whole = ["recover", "verify", path(&later), "--wait", "60"];
    cluster.says(stays, &verify_whole, 0, &["3 of 3"]).await;
    cluster.says(stays, &["recover", "apply", path(&later)], 0, &["2 groups go on"]).await;
    write_more(&cluster, "whole", &mut expected).await;
    verify(&client, "name", &expected).await;
    let events = cluster.says(stays, &["events", "--limit", "1000"], 0, &["goes on with", "alone"]).await;
    assert!(events.contains("counts it as lost"), "{events}");
}

/// The meta group lives; of one predicate two of three replicas are lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_predicate_is_recovered_while_the_cluster_lives() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 5).await;
    let client = cluster.client().await;
    let meta = cluster.voters("@meta", 3).await;
    let expected = fill(&client, "name", ROWS, VALUE_BYTES).await;
    let holders = cluster.voters("name", 3).await;
    let stays = cluster.leader("name").await;
    let lost: Vec<usize> = holders.into_iter().filter(|&node| node != stays).collect();
    let there = meta.iter().filter(|node| !lost.contains(node)).count();
    assert!(
        there >= 2,
        "a new predicate goes to the emptiest nodes, and the meta group is on the others: {meta:?}, {lost:?}"
    );
    let names: Vec<String> = lost.iter().map(|&node| format!("n{}", cluster.id(node))).collect();
    for &node in &lost {
        cluster.kill(node).await;
    }
    let words = ["no majority", "pontoon recover plan"];
    cluster.says(stays, &["decommission", &names[0]], 2, &words).await;
    let file = cluster.dir(0).with_extension("plan");
    let plan = ["recover", "plan", "--out", path(&file), "--lost", &names.join(",")];
    let said = cluster.says(stays, &plan, 0, &["name"]).await;
    assert!(!said.contains("the meta group"), "a quorum of it lives: {said}");
    cluster.says(stays, &["recover", "apply", path(&file)], 0, &["1 groups go on"]).await;
    let verify_whole = ["recover", "verify", path(&file), "--wait", "60"];
    cluster.says(stays, &verify_whole, 0, &["serves", "3 of 3"]).await;
    verify(&cluster.client().await, "name", &expected).await;
}
