//! Upgrades, a node at a time: who speaks which cluster version, and when the next one may be finalised.
//!
//! While nodes differ the cluster stays at its version, at which each binary writes what all of them read
//! ([`pontoon_shard::versions`]). A node that does not speak it is kept out wherever it shows itself: at a start by its own
//! marker, at a join and an announcement by the meta group, at a greeting by its peers, and by itself as soon as it hears.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use pontoon_proto::v1::{self, meta_command::Body};
use pontoon_shard::{Feature, Versions, versions::of_node};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tonic::Status;
use tracing::{info, warn};

use crate::{
    directory::{Directory, Marker},
    map::MapView,
    shared::Shared,
};

/// How often the leader of the meta group looks at what the nodes speak.
const LOOK: Duration = Duration::from_secs(5);

/// Adds to a greeting what this binary speaks.
pub(crate) fn introduce(hello: v1::Hello, versions: Versions) -> v1::Hello {
    v1::Hello { oldest_version: versions.oldest, newest_version: versions.newest, ..hello }
}

/// Why a peer that greets like this is not taken: it does not speak the cluster's version. `None` if it does.
pub(crate) fn unspoken(hello: &v1::Hello, map: &MapView) -> Option<String> {
    let reason = Versions::said(hello.oldest_version, hello.newest_version).misses(map.cluster_version())?;
    Some(format!("n{} at {} is refused: {reason}", hello.node, hello.address))
}

/// What an upgrade waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wait {
    /// Some nodes speak a later version than others.
    Nodes,
    /// All nodes speak a version that is not finalised.
    Operator,
}

/// What the leader of the meta group has seen of an upgrade.
#[derive(Debug)]
pub(crate) struct Upgrade {
    patience: Duration,
    waits: Mutex<Option<(Wait, Instant, String)>>,
}

impl Upgrade {
    pub(crate) fn new(patience: Duration) -> Upgrade {
        Upgrade { patience, waits: Mutex::new(None) }
    }

    /// What an upgrade has waited for longer than it should: for nodes (true) or for an operator, and in words.
    pub(crate) fn late(&self, now: Instant) -> Option<(bool, String)> {
        let waits = self.waits.lock().unwrap_or_else(PoisonError::into_inner);
        let (wait, since, text) = waits.as_ref()?;
        (now.duration_since(*since) >= self.patience).then(|| (*wait == Wait::Nodes, text.clone()))
    }

    fn see(&self, seen: Option<(Wait, String)>, now: Instant) {
        let mut waits = self.waits.lock().unwrap_or_else(PoisonError::into_inner);
        *waits = seen.map(|(wait, text)| {
            let since = waits.as_ref().filter(|(before, ..)| *before == wait).map(|(_, since, _)| *since);
            (wait, since.unwrap_or(now), text)
        });
    }
}

/// What the nodes' words mean for the next version: 0 if nobody speaks one, and what is in its way.
fn judge(now: u32, nodes: &[v1::NodeSpoken]) -> (u32, Vec<String>) {
    let next = now + 1;
    let speaks = |node: &v1::NodeSpoken| Versions::said(node.oldest_version, node.newest_version);
    if !nodes.iter().any(|node| speaks(node).speaks(next)) {
        return (0, Vec::new());
    }
    let ways = nodes.iter().filter_map(|node| {
        let id = node.node;
        match (node.reachable, speaks(node)) {
            (false, _) => Some(format!(
                "n{id} does not answer: start it with a release that speaks {next}, or if it is lost for good run `pontoon \
                 decommission n{id}`"
            )),
            (true, speaks) if !speaks.speaks(next) => {
                Some(format!("n{id} speaks {speaks}, not {next}: start it with a newer release"))
            }
            _ => None,
        }
    });
    (next, ways.collect())
}

fn waits(reply: &v1::UpgradeStatusReply) -> Option<(Wait, String)> {
    let (now, next) = (reply.cluster_version, reply.next_version);
    match reply.in_the_way.as_slice() {
        _ if next == 0 => None,
        [] => Some((
            Wait::Operator,
            format!(
                "all nodes speak version {next} and the cluster is at {now}: run `pontoon upgrade finalise`, or until then go back by \
                 starting nodes with the older release"
            ),
        )),
        ways => {
            Some((Wait::Nodes, format!("the upgrade to version {next} is not done: {}", ways.join("; "))))
        }
    }
}

impl Shared {
    pub(crate) async fn upgrade_status(
        self: &Arc<Self>,
        _: v1::UpgradeStatusRequest,
    ) -> Result<v1::UpgradeStatusReply, Status> {
        Ok(self.upgrade_view(&self.node_views().await, self.map.view().cluster_version()))
    }

    fn upgrade_view(&self, views: &[v1::NodeView], now: u32) -> v1::UpgradeStatusReply {
        let nodes: Vec<v1::NodeSpoken> = views
            .iter()
            .map(|view| {
                let node = view.node.clone().unwrap_or_default();
                let speaks = match view.reachable {
                    true => Versions::said(view.oldest_version, view.newest_version),
                    false => of_node(&node),
                };
                v1::NodeSpoken {
                    node: node.id,
                    address: node.address,
                    reachable: view.reachable,
                    version: view.version.clone(),
                    oldest_version: speaks.oldest,
                    newest_version: speaks.newest,
                }
            })
            .collect();
        let (next, in_the_way) = judge(now, &nodes);
        let turned_on = Feature::ALL.iter().filter(|feature| feature.since() == next);
        let turns_on = turned_on
            .map(|feature| v1::VersionFeature {
                name: feature.name().to_owned(),
                changes: feature.changes().to_owned(),
            })
            .collect();
        v1::UpgradeStatusReply { cluster_version: now, nodes, next_version: next, turns_on, in_the_way }
    }

    /// Raises the cluster version by one. Asks every node under which boot it speaks what: the meta group compares that.
    pub(crate) async fn upgrade_finalise(
        self: &Arc<Self>,
        request: v1::UpgradeFinaliseRequest,
    ) -> Result<v1::UpgradeStatusReply, Status> {
        let now = self.meta_state().cluster_version;
        let views = self.node_views().await;
        let reply = self.upgrade_view(&views, now);
        let refuse = |text: String| Err(Status::failed_precondition(text));
        if request.version == now {
            return Ok(reply);
        }
        let next = match (request.version, reply.next_version) {
            (0, 0) => {
                return refuse(format!("the cluster is at version {now}, and no node speaks a later one"));
            }
            (0, next) => next,
            (wanted, _) if wanted == now + 1 => wanted,
            (wanted, _) => {
                return refuse(format!(
                    "the cluster is at version {now}; it goes to {} next, not to {wanted}",
                    now + 1
                ));
            }
        };
        if !reply.in_the_way.is_empty() {
            return refuse(format!("version {next} cannot be finalised: {}", reply.in_the_way.join("; ")));
        }
        let said = views.iter().map(|view| v1::NodeSpeaks {
            node: view.node.as_ref().map_or(0, |node| node.id),
            boot_token: view.boot_token,
            oldest_version: view.oldest_version,
            newest_version: view.newest_version,
        });
        let finalise = v1::FinaliseVersion { version: next, nodes: said.collect() };
        self.meta_done(Body::FinaliseVersion(finalise)).await?;
        info!(version = next, "the cluster version is finalised");
        Ok(self.upgrade_view(&views, next))
    }

    /// The founder's one node is asked by itself: a cluster begins at the newest version of its founder. Should that fail, an
    /// operator finalises it later.
    pub(crate) async fn begin_at_newest(&self) {
        let Versions { oldest: oldest_version, newest: newest_version } = self.versions;
        let (node, boot_token) = (self.own.get(), self.wal.incarnation());
        let said = v1::NodeSpeaks { node, boot_token, oldest_version, newest_version };
        for version in oldest_version + 1..=newest_version {
            let finalise = v1::FinaliseVersion { version, nodes: vec![said] };
            if let Err(status) = self.meta_done(Body::FinaliseVersion(finalise)).await {
                warn!(version, reason = status.message(), "the cluster begins at an older version");
                return;
            }
        }
    }

    /// Waits until the cluster has a version that this binary does not speak, and says so.
    pub(crate) async fn left_behind(&self) -> String {
        let mut views = self.map.subscribe();
        match views.wait_for(|view| !self.versions.speaks(view.cluster_version())).await {
            Ok(view) => self.versions.misses(view.cluster_version()).unwrap_or_default(),
            Err(_) => std::future::pending().await,
        }
    }
}

/// Keeps in the data directory which cluster version it is used at, so that a binary that does not speak it does not open it. Ends
/// with the node.
pub(crate) async fn remember_version(shared: Arc<Shared>, directory: Arc<Directory>, mut marker: Marker) {
    let (mut views, mut stop) = (shared.map.subscribe(), shared.stop.subscribe());
    loop {
        let version = views.borrow_and_update().cluster_version();
        if version > marker.version() && shared.versions.speaks(version) {
            let (directory, next) = (directory.clone(), marker.at_version(version));
            let written = next.clone();
            match tokio::task::spawn_blocking(move || directory.write_marker(&written)).await {
                Ok(Ok(())) => marker = next,
                // The meta group and the peers keep an older binary out, too.
                Ok(Err(error)) => {
                    warn!(%error, version, "the directory does not say which version it is used at")
                }
                Err(_) => return,
            }
        }
        tokio::select! {
            changed = views.changed() => if changed.is_err() { return },
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
}

/// As the leader of the meta group, looks how the upgrade stands. Ends with the node.
pub(crate) async fn watch_upgrade(shared: Arc<Shared>) {
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut stop = shared.stop.subscribe();
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
        let seen = match shared.meta_term() {
            // A cluster at the newest version that its leader speaks waits for nothing that the leader could name.
            Some(_) if shared.map.view().cluster_version() < shared.versions.newest => {
                let views = shared.node_views().await;
                waits(&shared.upgrade_view(&views, shared.map.view().cluster_version()))
            }
            _ => None,
        };
        shared.upgrade.see(seen, Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(node: u64, reachable: bool, newest_version: u32) -> v1::NodeSpoken {
        v1::NodeSpoken { node, reachable, oldest_version: 1, newest_version, ..Default::default() }
    }

    #[test]
    fn a_silent_node_and_an_old_one_are_in_the_way() {
        let (next, ways) = judge(1, &[node(1, true, 2), node(2, true, 1), node(3, false, 2)]);
        assert_eq!((next, ways.len()), (2, 2));
        assert!(ways[0].contains("n2 speaks 1, not 2") && ways[1].contains("n3 does not answer"), "{ways:?}");
        assert_eq!(judge(1, &[node(1, true, 2), node(2, true, 3)]), (2, Vec::new()));
        assert_eq!(judge(2, &[node(1, true, 2), node(2, false, 2)]), (0, Vec::new()));
    }

    #[test]
    fn a_greeting_of_an_older_binary_is_taken_until_its_version_is_left() {
        let map = |cluster_version| MapView::new(v1::ClusterMap { cluster_version, ..Default::default() });
        let old = v1::Hello { node: 3, address: "a:1".to_owned(), ..Default::default() };
        assert_eq!(unspoken(&old, &map(0)), None);
        assert_eq!(unspoken(&old, &map(1)), None);
        let reason = unspoken(&old, &map(2)).unwrap();
        assert!(reason.contains("n3 at a:1") && reason.contains("speaks 1"), "{reason}");
        assert_eq!(unspoken(&introduce(old, Versions::OURS), &map(2)), None);
    }

    #[test]
    fn what_waits_is_a_problem_after_a_while_and_another_wait_begins_anew() {
        let (upgrade, begun) = (Upgrade::new(Duration::from_secs(60)), Instant::now());
        let after = |seconds| begun + Duration::from_secs(seconds);
        let nodes = || Some((Wait::Nodes, "n2".to_owned()));
        upgrade.see(nodes(), begun);
        upgrade.see(nodes(), after(59));
        assert_eq!(upgrade.late(after(59)), None);
        assert_eq!(upgrade.late(after(60)), Some((true, "n2".to_owned())));
        upgrade.see(Some((Wait::Operator, "all".to_owned())), after(60));
        assert_eq!(upgrade.late(after(61)), None);
        upgrade.see(None, after(62));
        assert_eq!(upgrade.late(after(600)), None);
    }
}
