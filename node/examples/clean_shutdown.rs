//! How a program with a node in it ends: by a signal, or because the node cannot go on, and in which order.
//!
//! `cargo run -p pontoon-node --example clean_shutdown`, then Ctrl-C.
//!
//! A kill loses nothing either: what was acknowledged is in the logs of a quorum. A shutdown saves the next start the replay
//! of what the engine had not flushed.

use std::error::Error;

use pontoon_node::{Node, NodeConfig, shutdown_signal};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let scratch = tempfile::tempdir()?;
    // Made first and kept: a signal during the start is not missed.
    let mut signal = std::pin::pin!(shutdown_signal());
    let node = tokio::select! {
        node = Node::start(NodeConfig::new(scratch.path().join("data"), "127.0.0.1:0")) => node?,
        name = &mut signal => {
            println!("ended by {} before it served", name?);
            return Ok(());
        }
    };
    println!("{} serves on {}; Ctrl-C ends it", node.id(), node.address());

    let failure = tokio::select! {
        name = &mut signal => {
            println!("ending by {}", name?);
            None
        }
        // The log, the engine or the cluster says so, with the next step. The node must be shut down all the same.
        reason = node.failed() => Some(reason),
    };
    // Clients of one's own go before the node: open calls are given two seconds.
    node.shutdown().await?;
    match failure {
        Some(reason) => Err(reason.into()),
        None => Ok(()),
    }
}
