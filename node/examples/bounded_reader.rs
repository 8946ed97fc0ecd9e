//! A reader beside the voters: a permanent learner that answers from its own rows, as old as the reader allows.
//!
//! `cargo run -p pontoon-node --example bounded_reader`

use std::{error::Error, time::Duration};

use pontoon_node::{Node, NodeConfig, client::Reads};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let scratch = tempfile::tempdir()?;
    let first = Node::start(NodeConfig::new(scratch.path().join("1"), "127.0.0.1:0")).await?;
    let writer = first.client().await?;
    writer.create_map("prices", 1).await?;
    writer.put("prices", "tea", "3.20").await?;

    let config = NodeConfig::new(scratch.path().join("2"), "127.0.0.1:0").joining(first.address());
    let reader = Node::start(config).await?;
    // It votes on nothing: no write waits for it, and its loss costs nobody anything.
    writer.join_as_learner("prices", reader.id()).await?;
    println!("{:?}", writer.servers("prices").await?);

    // Everything that was acknowledged more than two seconds ago is seen, without a word to the leader as a rule.
    let bounded = reader.client().await?.with_reads(Reads::Bounded(Duration::from_secs(2)));
    println!("{:?}", bounded.get("prices", "tea").await?);
    // Zero: all that was acknowledged, asked for at the leader and read here.
    let fresh = bounded.with_reads(Reads::Bounded(Duration::ZERO));
    writer.put("prices", "tea", "3.40").await?;
    println!("{:?}", fresh.get("prices", "tea").await?);

    writer.leave("prices", reader.id()).await?;
    reader.shutdown().await?;
    first.shutdown().await?;
    Ok(())
}
