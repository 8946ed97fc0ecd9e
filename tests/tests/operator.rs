//! What an operator does to a cluster from a terminal, and what the terminal says: words and exit codes.

use pontoon_proto::v1::{self, MovePhase};
use pontoon_tests::{
    cluster::{Cluster, admin_at, until, within},
    process::Program,
    traffic::{Traffic, fill, verify},
};

const PROGRAM: Program =
    Program { exe: env!("CARGO_BIN_EXE_pontoon-under-test"), scratch: env!("CARGO_TARGET_TMPDIR") };

/// Enough for a snapshot of several chunks.
const FILL_ROWS: usize = 20_000;
const FILL_VALUE_BYTES: usize = 300;

/// Which of four nodes holds no replica, and one that holds one but does not lead.
async fn target_and_follower(cluster: &Cluster, predicate: &str) -> (usize, usize) {
    let holders = cluster.voters(predicate, 3).await;
    let target = (0..4).find(|node| !holders.contains(node)).expect("one of four holds no replica");
    let leader = cluster.leader(predicate).await;
    let follower = holders.into_iter().find(|&node| node != leader).expect("three hold a replica");
    (target, follower)
}

/// Starts a move and stops `node` where it stands when the target is a learner. Tried again if the move was faster.
async fn move_held_up(cluster: &Cluster, of: impl Fn(usize, usize) -> usize) -> (u64, usize, usize) {
    loop {
        let (target, source) = target_and_follower(cluster, "name").await;
        let id = cluster.start_move("name", source, target).await;
        cluster.phase(id, MovePhase::Learner).await;
        cluster.pause(of(source, target));
        let client = cluster.client().await;
        let moves =
            client.move_list(v1::MoveListRequest { all: true, hops: 0 }).await.expect("it answers").moves;
        let mv = moves.into_iter().filter_map(|view| view.r#move).find(|mv| mv.id == id);
        if mv.is_some_and(|mv| mv.phase() < MovePhase::Joint) {
            return (id, source, target);
        }
        cluster.resume(of(source, target));
        assert_eq!(cluster.moved(id).await.phase(), MovePhase::Done);
    }
}

/// The groups of which a node holds a replica.
async fn groups_at(cluster: &Cluster, at: usize) -> Vec<u64> {
    let mut admin = admin_at(cluster.address(at)).await.expect("the node listens");
    let request = v1::GroupsRequest { local: true, ..Default::default() };
    let groups = within("a node to tell its groups", admin.groups(request)).await.expect("it answers");
    groups.into_inner().groups.into_iter().map(|group| group.group).collect()
}

/// A move's record says that it waits for a node in a phase. Before, it may have said what it was about to do.
async fn blocked(cluster: &Cluster, id: u64, phase: MovePhase) {
    let waits = |mv: &v1::Move| mv.id == id && mv.phase() == phase && mv.blocked.contains("does not answer");
    let what = "the move to say what it waits for";
    cluster.map_until(what, |map| map.moves.iter().any(waits).then_some(())).await;
}

/// Waits until no group has a problem, as `pontoon groups --problem` tells it.
async fn no_problem(cluster: &Cluster) {
    let client = cluster.client().await;
    until("no group to have a problem", async || {
        let request = v1::GroupsRequest { problem: true, ..Default::default() };
        let reply = client.groups(request).await.ok()?;
        (reply.groups.is_empty() && reply.unreachable.is_empty()).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_move_loses_nothing_and_leaves_nothing_behind() {
    let cluster = Cluster::start(PROGRAM, "fjall", 4).await;
    let client = cluster.client().await;
    let mut expected = fill(&client, "name", FILL_ROWS, FILL_VALUE_BYTES).await;
    let mut traffic = Traffic::start(&client, "name", 2);
    traffic.acknowledged(20).await;

    // The target hangs while it receives; the move is taken back without it.
    let (id, source, target) = move_held_up(&cluster, |_, target| target).await;
    let other = source;
    let number = id.to_string();
    cluster.says(other, &["move", "cancel", &number], 0, &["asked to go back", "pontoon move watch"]).await;
    traffic.acknowledged(20).await;
    blocked(&cluster, id, MovePhase::Aborting).await;
    cluster.says(other, &["move", "list"], 0, &["target-silent", "does not answer"]).await;
    let words = ["\"blocker\":\"target-silent\"", "\"stuck\":false"];
    cluster.says(other, &["move", "list", "--json"], 0, &words).await;
    let words = ["stuck in phase aborting", "does not answer", "pontoon decommission"];
    cluster.says(other, &["move", "watch", &number, "--for-seconds", "0"], 3, &words).await;
    cluster.resume(target);
    assert_eq!(cluster.moved(id).await.phase(), MovePhase::Aborted);
    cluster.says(other, &["move", "watch", &number], 1, &["has gone back"]).await;
    cluster.says(other, &["move", "cancel", &number], 0, &["has gone back already"]).await;
    traffic.acknowledged(20).await;

    // No trace of the target: not in the group's configuration, not on its node.
    let holders = cluster.voters("name", 3).await;
    assert!(holders.contains(&source) && !holders.contains(&target), "{holders:?}");
    let (group, learners) = cluster
        .map_until("name to be in the map", |map| {
            let shard = map.shards.iter().find(|shard| shard.predicate == "name")?;
            Some((shard.group, shard.learners.clone()))
        })
        .await;
    assert!(learners.is_empty(), "{learners:?}");
    assert!(!groups_at(&cluster, target).await.contains(&group), "a ghost");
    no_problem(&cluster).await;

    // And nothing that stands in the way of the next one.
    let id = cluster.start_move("name", source, target).await;
    assert_eq!(cluster.moved(id).await.phase(), MovePhase::Done);
    traffic.acknowledged(20).await;
    expected.extend(traffic.stop().await);
    verify(&client, "name", &expected).await;
}

/// The objects among the lines that a command said.
fn objects(said: &str) -> Vec<serde_json::Value> {
    said.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_tells_what_may_fail_on_the_way_and_a_watch_how_far_it_is() {
    let cluster = Cluster::start(PROGRAM, "fjall", 4).await;
    let client = cluster.client().await;
    let mut expected = fill(&client, "name", FILL_ROWS, FILL_VALUE_BYTES).await;
    let (target, source) = target_and_follower(&cluster, "name").await;
    let (from, to) = (format!("n{}", cluster.id(source)), format!("n{}", cluster.id(target)));
    let start = ["move", "start", "name", "--from", &from, "--to", &to];
    let dry = [&start[..], &["--dry-run"]].concat();
    let words = ["about", "may fail", "with the learner", "joint", "both halves need their majority"];
    cluster.says(0, &dry, 0, &words).await;
    let said = cluster.says(0, &[&dry[..], &["--json"]].concat(), 0, &[]).await;
    let json = objects(&said).pop().expect("an object");
    let steps: Vec<(&str, u64, u64)> = json["steps"]
        .as_array()
        .expect("steps")
        .iter()
        .map(|step| {
            let number = |name: &str| step[name].as_u64().expect("a number");
            (step["name"].as_str().expect("a name"), number("quorum"), number("may_fail"))
        })
        .collect();
    assert_eq!(steps, [("now", 2, 1), ("with the learner", 2, 1), ("joint", 2, 1), ("after", 2, 1)]);
    assert!(json["bytes"].as_u64() > Some(1_000_000) && json["estimate_ms"].as_u64() > Some(0), "{json}");
    let holders = cluster.voters("name", 3).await;
    assert!(!holders.contains(&target), "nothing was begun: {holders:?}");

    cluster.says(0, &["predicate", "create", "solo", "--replicas", "1"], 0, &[]).await;
    let at = cluster.leader("solo").await;
    let (from, to) = (format!("n{}", cluster.id(at)), format!("n{}", cluster.id((at + 1) % 4)));
    let words = ["a one-voter group has no fault tolerance between Joint and RemoveOld"];
    cluster.says(0, &["move", "start", "solo", "--from", &from, "--to", &to, "--dry-run"], 0, &words).await;

    let mut traffic = Traffic::start(&client, "name", 4);
    traffic.acknowledged(50).await;
    let id = cluster.start_move("name", source, target).await;
    let said = cluster.says(0, &["move", "watch", &id.to_string(), "--json"], 0, &[]).await;
    let views = objects(&said);
    let phases: Vec<&str> = views.iter().map(|view| view["phase"].as_str().expect("a phase")).collect();
    assert_eq!(phases.last(), Some(&"done"), "{said}");
    assert!(phases.iter().filter(|phase| **phase == "done").count() == 1, "the end is told once: {said}");
    for name in
        ["bytes_done", "bytes_total", "rate", "lag", "eta_ms", "foreground_p99_ms", "foreground_before_ms"]
    {
        assert!(views.iter().all(|view| view.get(name).is_some()), "{name} is missing: {said}");
    }
    expected.extend(traffic.stop().await);
    verify(&client, "name", &expected).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_that_has_changed_the_members_is_not_cancelled_and_says_what_it_waits_for() {
    let cluster = Cluster::start(PROGRAM, "fjall", 4).await;
    let client = cluster.client().await;
    let mut expected = fill(&client, "name", FILL_ROWS, FILL_VALUE_BYTES).await;
    let mut traffic = Traffic::start(&client, "name", 2);
    traffic.acknowledged(20).await;

    // The source hangs; the group leaves it behind, but it must be fenced.
    let (id, source, target) = move_held_up(&cluster, |source, _| source).await;
    let (other, number) = (target, id.to_string());
    cluster.phase(id, MovePhase::Fence).await;
    let words = ["the wait has ended", "fence", "watch it again"];
    cluster.says(other, &["move", "watch", &number, "--for-seconds", "0"], 4, &words).await;
    cluster.says(other, &["move", "cancel", &number], 2, &["goes on to its end", "pontoon move watch"]).await;
    blocked(&cluster, id, MovePhase::Fence).await;
    cluster.says(other, &["move", "list"], 0, &["source-silent", "does not answer"]).await;
    let words = ["stuck in phase fence", "does not answer", "pontoon decommission"];
    cluster.says(other, &["move", "watch", &number, "--for-seconds", "0"], 3, &words).await;
    traffic.acknowledged(20).await;
    cluster.resume(source);
    assert_eq!(cluster.moved(id).await.phase(), MovePhase::Done);
    cluster.says(other, &["move", "watch", &number], 0, &["done"]).await;
    cluster.says(other, &["move", "cancel", &number], 2, &["is done", "start one back"]).await;
    cluster.says(other, &["move", "cancel", "99"], 2, &["99", "pontoon move list"]).await;
    expected.extend(traffic.stop().await);
    verify(&client, "name", &expected).await;
    no_problem(&cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_disk_is_replaced_with_all_that_it_held() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 3).await;
    let client = cluster.client().await;
    let mut expected = fill(&client, "name", 2_000, FILL_VALUE_BYTES).await;
    let mut traffic = Traffic::start(&client, "name", 2);
    cluster.voters("name", 3).await;
    traffic.acknowledged(20).await;

    let lost = cluster.id(2);
    cluster.kill(2).await;
    traffic.acknowledged(20).await;
    let decommission = format!("pontoon decommission n{lost}");
    cluster.says(0, &["groups", "--problem"], 0, &["name", "@meta", "does not answer", &decommission]).await;
    cluster.says(0, &["status"], 0, &["2 under-replicated", "status --problems"]).await;

    let old = cluster.replace(2).await;
    // Both groups: the predicate's and the meta group.
    for predicate in ["@meta", "name"] {
        let found = cluster
            .map_until(&format!("{predicate} to leave the lost node behind"), |map| {
                let shard = map.shards.iter().find(|shard| shard.predicate == predicate)?;
                let node = |&id: &u64| pontoon_proto::ReplicaId::new(id).expect("a replica").node().get();
                let nodes: Vec<u64> = shard.voters.iter().map(node).collect();
                (nodes.len() == 3 && !nodes.contains(&lost)).then_some(nodes)
            })
            .await;
        assert!(found.contains(&cluster.id(2)), "{predicate} is on {found:?}");
    }
    no_problem(&cluster).await;
    traffic.acknowledged(20).await;

    // With the new one and without another: it is a member like any.
    cluster.kill(1).await;
    traffic.acknowledged(20).await;
    cluster.restart(1).await;

    // The lost disk is found again: it has no place any more.
    let listen = pontoon_tests::cluster::free_address();
    let dir = old.display().to_string();
    let (exit, said) = PROGRAM.run(["node", "--end-with-parent", "--dir", &dir, "--listen", &listen]).await;
    assert_eq!(exit.code(), Some(1), "{said}");
    assert!(said.contains("removed from the cluster") && said.contains("join as a new node"), "{said}");

    expected.extend(traffic.stop().await);
    verify(&client, "name", &expected).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_node_is_decommissioned_only_when_it_is_silent_and_the_others_suffice() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 4).await;
    let client = cluster.client().await;
    let mut traffic = Traffic::start(&client, "name", 2);
    cluster.voters("name", 3).await;
    traffic.acknowledged(20).await;
    cluster.says(0, &["predicate", "create", "solo", "--replicas", "1"], 0, &["solo"]).await;
    let at = cluster.voters("solo", 1).await[0];
    let other = (at + 1) % 4;
    let (id, lost) = (cluster.id(at), format!("n{}", cluster.id(at)));

    cluster.says(other, &["decommission", &lost], 2, &[&lost, "answers", "pontoon drain"]).await;
    cluster.says(other, &["decommission", "n9"], 2, &["n9", "pontoon nodes"]).await;
    cluster.kill(at).await;
    let words = ["of the 1 replicas of solo", "only 0 answer", "start it"];
    cluster.says(other, &["decommission", &lost], 2, &words).await;
    traffic.acknowledged(20).await;

    cluster.says(other, &["predicate", "drop", "solo"], 0, &["solo is dropped"]).await;
    let words = [lost.as_str(), "is removed", "pontoon groups --problem"];
    cluster.says(other, &["decommission", &lost], 0, &words).await;
    for predicate in ["@meta", "name"] {
        cluster
            .map_until(&format!("{predicate} to have three voters without {lost}"), |map| {
                let shard = map.shards.iter().find(|shard| shard.predicate == predicate)?;
                let node = |&id: &u64| pontoon_proto::ReplicaId::new(id).expect("a replica").node().get();
                (shard.voters.len() == 3 && !shard.voters.iter().any(|voter| node(voter) == id)).then_some(())
            })
            .await;
    }
    no_problem(&cluster).await;
    let rows = traffic.stop().await;
    verify(&client, "name", &rows).await;
}
