//! Very many small moves at once, and a node that passes all its leaderships on.

use std::time::Duration;

use futures::{StreamExt, TryStreamExt, stream};
use pontoon_proto::v1;
use tokio::time::{Instant, sleep};

use super::{
    stage::{PATIENCE, Stage},
    traffic::Window,
};
use crate::cli::Failure;

const STARTED_AT_ONCE: usize = 64;
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// How a node lost its leaderships.
#[derive(Debug, Clone, Copy)]
pub(super) struct Drained {
    pub(super) leaders: u64,
    pub(super) window: Window,
}

/// Moves every one of them from one node to another; predicates per second, from the first order to the last end.
pub(super) async fn move_all(stage: &Stage, names: &[String], from: u64, to: u64) -> Result<f64, Failure> {
    let begun = Instant::now();
    let started = stream::iter(names).map(|name| stage.start_move(name, from, to));
    let moves: Vec<v1::Move> = started.buffer_unordered(STARTED_AT_ONCE).try_collect().await?;
    let until = Instant::now() + PATIENCE;
    while stage.client.status(v1::StatusRequest {}).await?.moves_running > 0 {
        if Instant::now() >= until {
            return Err(Failure::error("the small moves do not end; see the nodes' logs"));
        }
        sleep(LOOK_EVERY).await;
    }
    Ok(moves.len() as f64 / begun.elapsed().as_secs_f64())
}

/// Drains the node that leads most until it leads nothing, and lets it take leaderships again.
pub(super) async fn drain_leaders(stage: &Stage) -> Result<Drained, Failure> {
    let nodes = stage.client.nodes(v1::NodesRequest {}).await?.nodes;
    let most = nodes.into_iter().max_by_key(|node| node.leaders).unwrap_or_default();
    let node = most.node.unwrap_or_default().id;
    let ask = |action: v1::DrainAction| v1::DrainRequest { node, action: action.into(), hops: 0, seen: None };
    let from = Instant::now();
    let mut reply = stage.client.drain(ask(v1::DrainAction::Start)).await?;
    while reply.leaders > 0 {
        if from.elapsed() >= PATIENCE {
            return Err(Failure::error(format!("n{node} still leads {} groups", reply.leaders)));
        }
        sleep(LOOK_EVERY).await;
        reply = stage.client.drain(ask(v1::DrainAction::Look)).await?;
    }
    let window = Window { from, to: Instant::now() };
    stage.client.drain(ask(v1::DrainAction::Cancel)).await?;
    Ok(Drained { leaders: most.leaders, window })
}
