//! Real processes: killed, restarted, and moved between, under traffic that knows what must be true.

use pontoon_node::{api::data_client::DataClient, client::put};
use pontoon_proto::v1::{self, MovePhase};
use pontoon_tests::{
    cluster::{Cluster, within},
    process::Program,
    traffic::{Rows, Traffic, fill, verify},
};

const PROGRAM: Program =
    Program { exe: env!("CARGO_BIN_EXE_pontoon-under-test"), scratch: env!("CARGO_TARGET_TMPDIR") };

/// Enough for a snapshot of several chunks.
const FILL_ROWS: usize = 20_000;
const FILL_VALUE_BYTES: usize = 300;

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

/// Whose process ends during a move.
#[derive(Debug, Clone, Copy)]
enum Role {
    Driver,
    Source,
    Target,
}

/// How it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Killed,
    /// By SIGTERM: it must end well, whatever goes on.
    Asked,
}

/// Moves a predicate to and fro under traffic; in each move the process with the role ends in the phase.
async fn moves_with_ends(engine: &str, end: End, ends: &[(Role, MovePhase)]) {
    let mut cluster = Cluster::start(PROGRAM, engine, 4).await;
    let client = cluster.client().await;
    let mut expected = fill(&client, "name", FILL_ROWS, FILL_VALUE_BYTES).await;
    let mut traffic = Traffic::start(&client, "name", 2);
    let mut bystander = Traffic::start(&client, "genre", 1);
    cluster.voters("genre", 3).await;

    for (at, &(role, phase)) in ends.iter().enumerate() {
        let holders = cluster.voters("name", 3).await;
        let target = (0..4).find(|node| !holders.contains(node)).expect("one of four holds no replica");
        let leader = cluster.leader("name").await;
        // In turn the replica that leads and one that follows.
        let source = match at % 2 {
            0 => leader,
            _ => *holders.iter().find(|&&node| node != leader).expect("three hold a replica"),
        };
        let id = cluster.start_move("name", source, target).await;
        let seen = cluster.phase(id, phase).await;
        let victim = match role {
            Role::Driver => cluster.meta_leader().await,
            Role::Source => source,
            Role::Target => target,
        };
        match end {
            End::Killed => cluster.kill(victim).await,
            End::Asked => {
                let exit = cluster.terminate(victim).await;
                assert!(exit.success(), "{role:?} {victim} ended with {exit} in {seen:?}");
            }
        }
        println!("move {id} from {source} to {target}: {role:?} {victim} {end:?} in {seen:?}");
        // In turn with the survivors at work for a while, and at once.
        if at % 2 == 0 {
            traffic.acknowledged(20).await;
            bystander.acknowledged(20).await;
        }
        cluster.restart(victim).await;
        let ended = cluster.moved(id).await;
        assert_eq!(ended.phase(), MovePhase::Done, "{ended:?}");
        let holders = cluster.voters("name", 3).await;
        assert!(holders.contains(&target) && !holders.contains(&source), "{holders:?}");
        traffic.acknowledged(20).await;
    }
    expected.extend(traffic.stop().await);
    verify(&client, "name", &expected).await;
    let untouched = bystander.stop().await;
    verify(&client, "genre", &untouched).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_survives_the_death_of_its_driver() {
    let phases = [MovePhase::Reserved, MovePhase::Snapshot, MovePhase::Joint, MovePhase::RemoveOld];
    moves_with_ends("fjall", End::Killed, &phases.map(|phase| (Role::Driver, phase))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_survives_the_death_of_its_source() {
    let phases = [MovePhase::Snapshot, MovePhase::CatchUp, MovePhase::Joint, MovePhase::Fence];
    moves_with_ends("fjall", End::Killed, &phases.map(|phase| (Role::Source, phase))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_survives_the_death_of_its_target() {
    let phases = [MovePhase::Learner, MovePhase::Snapshot, MovePhase::PreSwitch, MovePhase::Joint];
    moves_with_ends("fjall", End::Killed, &phases.map(|phase| (Role::Target, phase))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_on_sled_survives_the_death_of_its_source_and_its_target() {
    let ends = [(Role::Source, MovePhase::Snapshot), (Role::Target, MovePhase::Snapshot)];
    moves_with_ends("sled", End::Killed, &ends).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_asked_to_end_during_a_move_ends_well_and_so_does_the_move() {
    let ends = [
        (Role::Driver, MovePhase::Snapshot),
        (Role::Source, MovePhase::Snapshot),
        (Role::Target, MovePhase::Snapshot),
        (Role::Driver, MovePhase::Joint),
        (Role::Source, MovePhase::Joint),
    ];
    moves_with_ends("fjall", End::Asked, &ends).await;
}
