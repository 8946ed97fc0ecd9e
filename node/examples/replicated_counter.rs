//! A counter on three nodes, each of which could be lost: no increment is lost or counted twice.
//!
//! `cargo run -p pontoon-node --example replicated_counter`
//!
//! An increment is a compare-and-set of a row: the request id that it carries makes a retry harmless, the expectation two
//! writers at once. `node_with_own_machine` counts in a state machine of its own.

use std::error::Error;

use pontoon_node::{
    Node, NodeConfig,
    client::{Client, ClientError, Expect},
};

/// Adds one and returns the sum.
async fn add_one(client: &Client) -> Result<u64, ClientError> {
    loop {
        let row = client.get("counters", "visits").await?;
        let (sum, expect) = match &row {
            Some(row) => {
                (String::from_utf8_lossy(&row.value).parse().unwrap_or(0), Expect::Modified(row.modified))
            }
            None => (0, Expect::Absent),
        };
        let next: u64 = sum + 1;
        if client.cas("counters", "visits", expect, Some(next.to_string().into())).await?.applied {
            return Ok(next);
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let scratch = tempfile::tempdir()?;
    let first = Node::start(NodeConfig::new(scratch.path().join("1"), "127.0.0.1:0")).await?;
    let join = |dir: &str| NodeConfig::new(scratch.path().join(dir), "127.0.0.1:0").joining(first.address());
    let (second, third) = (Node::start(join("2")).await?, Node::start(join("3")).await?);

    let clients = [second.client().await?, third.client().await?];
    clients[0].create_map("counters", 3).await?;
    let adders = clients.map(|client| {
        tokio::spawn(async move {
            for _ in 0..5 {
                println!("{}", add_one(&client).await?);
            }
            Ok::<(), ClientError>(())
        })
    });
    for adder in adders {
        adder.await??;
    }

    // Two of three go on.
    third.shutdown().await?;
    println!("and {} without the third node", add_one(&second.client().await?).await?);
    second.shutdown().await?;
    first.shutdown().await?;
    Ok(())
}
