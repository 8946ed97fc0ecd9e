//! Nodes that move to other addresses: the cluster learns where they are, and nothing is lost.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use pontoon_tests::{
    cluster::{Cluster, free_address, until, within},
    process::Program,
    traffic::{Traffic, verify},
};
use tokio::net::{TcpListener, TcpStream};

const PROGRAM: Program =
    Program { exe: env!("CARGO_BIN_EXE_pontoon-under-test"), scratch: env!("CARGO_TARGET_TMPDIR") };

/// Waits until the map has this address of a node.
async fn known_at(cluster: &Cluster, at: usize, address: &str) {
    let id = cluster.id(at);
    cluster
        .map_until(&format!("the map to have n{id} at {address}"), |map| {
            map.nodes.iter().any(|node| node.id == id && node.address == address).then_some(())
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_listens_elsewhere_is_found_by_all() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 3).await;
    let client = cluster.client().await;
    let mut traffic = Traffic::start(&client, "name", 2);
    cluster.voters("name", 3).await;
    traffic.acknowledged(20).await;
    for at in [1, 0] {
        assert!(cluster.terminate(at).await.success());
        cluster.moved_to(at, free_address());
        cluster.restart(at).await;
        let address = cluster.address(at).to_owned();
        known_at(&cluster, at, &address).await;
        traffic.acknowledged(20).await;
    }
    // The one that stayed goes down: the two that moved are a quorum and must have found each other. A client that knows only
    // addresses where nobody is any more must be told another one.
    let mut rows = traffic.stop().await;
    cluster.kill(2).await;
    let client = cluster.client().await;
    for round in 0..20 {
        let key = format!("late-{round}");
        until("a write to pass", async || client.put("name", key.clone(), "row").await.ok()).await;
        rows.insert(key.into(), "row".into());
    }
    verify(&client, "name", &rows).await;
    cluster.restart(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_all_move_at_once_find_each_other_by_one_address() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 3).await;
    let client = cluster.client().await;
    client.put("name", "k", "v").await.expect("it serves");
    cluster.voters("name", 3).await;
    for at in 0..3 {
        assert!(cluster.terminate(at).await.success());
        cluster.moved_to(at, free_address());
    }
    let first = cluster.address(0).to_owned();
    cluster.restart_all_with(&[0, 1, 2], &["--join", &first]).await;
    for at in 0..3 {
        let address = cluster.address(at).to_owned();
        known_at(&cluster, at, &address).await;
    }
    let client = cluster.client().await;
    let row = client.get("name", "k").await.expect("it serves").expect("the row is there");
    assert_eq!(&row.value[..], b"v");
    client.put("name", "k", "w").await.expect("it takes writes");
}

/// Passes connections on to another address, and counts them.
async fn forward(to: String) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
    let address = listener.local_addr().expect("it is bound").to_string();
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::Relaxed);
            let to = to.clone();
            tokio::spawn(async move {
                if let Ok(mut far) = TcpStream::connect(&to).await {
                    drop(tokio::io::copy_bidirectional(&mut near, &mut far).await);
                }
            });
        }
    });
    (address, count)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_behind_a_forwarder_is_reached_by_what_it_advertises() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 3).await;
    let client = cluster.client().await;
    let mut traffic = Traffic::start(&client, "name", 2);
    cluster.voters("name", 3).await;
    traffic.acknowledged(20).await;
    assert!(cluster.terminate(1).await.success());
    let (outside, count) = forward(cluster.address(1).to_owned()).await;
    cluster.restart_with(1, &["--advertise", &outside]).await;
    known_at(&cluster, 1, &outside).await;
    // Without one of the others, it is needed.
    cluster.kill(2).await;
    traffic.acknowledged(50).await;
    assert!(count.load(Ordering::Relaxed) > 0, "nobody came by way of the forwarder");
    cluster.restart(2).await;
    let rows = traffic.stop().await;
    verify(&cluster.client().await, "name", &rows).await;

    // An address that nobody may be sent to is refused before anything is changed.
    assert!(cluster.terminate(1).await.success());
    let dir = cluster.dir(1).display().to_string();
    let listen = cluster.address(1).to_owned();
    let start = ["node", "--dir", &dir, "--listen", &listen, "--advertise"];
    let (exit, said) = within("a refusal", PROGRAM.run(start.iter().chain(&["0.0.0.0:7400"]))).await;
    assert_eq!(exit.code(), Some(2), "{said}");
    assert!(said.contains("0.0.0.0:7400"), "{said}");
    let (exit, said) = within("a refusal", PROGRAM.run(start.iter().chain(&["localhost"]))).await;
    assert_eq!(exit.code(), Some(2), "{said}");
    assert!(said.contains("--advertise") && said.contains("HOST:PORT"), "{said}");
}
