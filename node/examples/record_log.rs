//! A replicated record log: appended to on one node, followed on another, and moved to a third while that goes on.
//!
//! `cargo run -p pontoon-node --example record_log`

use std::error::Error;

use pontoon_node::{Node, NodeConfig};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let scratch = tempfile::tempdir()?;
    let first = Node::start(NodeConfig::new(scratch.path().join("1"), "127.0.0.1:0")).await?;
    let join = |dir: &str| NodeConfig::new(scratch.path().join(dir), "127.0.0.1:0").joining(first.address());
    let (second, third) = (Node::start(join("2")).await?, Node::start(join("3")).await?);

    let log = first.client().await?.create_log("events", 1).await?;
    let leader = log.wait_for_leader().await?;
    println!("{} leads, {:?}", leader.node, log.append(["one", "two"]).await?);

    // Who follows keeps one number, the offset of the next record, and needs nothing else to go on after a crash.
    let mut tail = second.client().await?.log("events").tail(0);
    for _ in 0..2 {
        println!("{:?}", tail.next().await?);
    }

    // The log changes its node; the tail goes on.
    let elsewhere = [&first, &second, &third].map(Node::id).into_iter().find(|id| *id != leader.node);
    let elsewhere = elsewhere.ok_or("three nodes have an other")?;
    log.join(elsewhere).await?;
    log.leave(leader.node).await?;
    log.append(["three"]).await?;
    println!("{:?} on {:?}", tail.next().await?, log.servers().await?);

    for node in [third, second, first] {
        node.shutdown().await?;
    }
    Ok(())
}
