//! Replicas that have stopped for good while their nodes live: a damaged log, a broken invariant.

use std::{collections::HashMap, time::Duration};

use futures::future::join_all;
use pontoon_proto::{NodeId, v1};
use pontoon_shard::planner::Dead;
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

use super::{Driver, PING};

/// How often nodes are asked.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long a replica must be dead before it is replaced. A node whose log or engine has failed calls all of its replicas
/// dead and ends; started again, it has them all.
const PATIENCE: Duration = Duration::from_secs(8);

impl Driver {
    /// Keeps `dead` up to what the nodes of the cluster report. Ends with the driver.
    pub(super) async fn watch_casualties(self, dead: watch::Sender<Dead>) {
        let mut since: HashMap<(u64, NodeId), Instant> = HashMap::new();
        loop {
            let nodes: Vec<NodeId> = self.state().live_nodes().collect();
            // Who does not answer may be starting again: what it said before does not count.
            let reports = join_all(nodes.iter().map(async |&node| {
                let report = self.shared.at_within(PING, node, v1::CasualtiesRequest {}).await;
                let dead = report.map(|report| report.dead).unwrap_or_default();
                dead.into_iter().map(move |dead| (dead.group, node))
            }))
            .await;
            let found: Dead = reports.into_iter().flatten().collect();
            since.retain(|key, _| found.contains(key));
            for key in found {
                since.entry(key).or_insert_with(Instant::now);
            }
            let ripe = since.iter().filter(|(_, since)| since.elapsed() >= PATIENCE).map(|(key, _)| *key);
            let ripe: Dead = ripe.collect();
            dead.send_if_modified(|known| std::mem::replace(known, ripe.clone()) != ripe);
            sleep(LOOK_EVERY).await;
        }
    }
}
