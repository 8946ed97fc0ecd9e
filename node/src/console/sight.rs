//! All groups with their replicas and loads, put together from what every node tells. It costs a call to each node and an entry for each
//! replica, so it is made once in a while for all who look, and forgotten when nobody does.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::future::join_all;
use pontoon_proto::{NodeId, v1};
use tonic::Status;

use crate::shared::Shared;

/// For so long a look is good enough; for so many times as long as it took if that is longer, since a crowd takes its time; and never
/// for longer than this, since a node that hangs takes it, too.
const FRESH: Duration = Duration::from_secs(2);
const PAUSE: u32 = 10;
const FRESH_MOST: Duration = Duration::from_secs(6);
/// How long a node may take to tell its loads.
const ANSWER: Duration = Duration::from_secs(2);

/// What was seen at one moment.
#[derive(Debug)]
pub(crate) struct Sight {
    made: Instant,
    took: Duration,
    pub(crate) groups: Vec<Seen>,
    pub(crate) unreachable: Vec<u64>,
}

/// A group as it was seen.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) view: v1::GroupView,
    /// Of its largest replica.
    pub(crate) bytes: u64,
    /// Entries that its slowest replica lacks.
    pub(crate) lag: u64,
    pub(crate) writes_per_s: u64,
    pub(crate) reads_per_s: u64,
    /// The move that is running, 0 if none is.
    pub(crate) moved_by: u64,
}

impl Seen {
    /// Entries that a replica lacks of what its leader has committed.
    pub(crate) fn lag_of(&self, replica: &v1::ReplicaInfo) -> u64 {
        lag(&self.view, replica)
    }
}

fn lag(view: &v1::GroupView, replica: &v1::ReplicaInfo) -> u64 {
    let leaders = view.replicas.iter().filter(|replica| replica.role == "leader");
    let commit = leaders.map(|leader| leader.commit).max().unwrap_or(replica.commit);
    commit.saturating_sub(replica.applied)
}

impl Shared {
    /// The groups as they were seen lately.
    pub(crate) async fn sight(self: &Arc<Self>) -> Result<Arc<Sight>, Status> {
        let mut kept = self.console.sight.lock().await;
        if let Some(sight) = &*kept
            && sight.made.elapsed() < (sight.took * PAUSE).clamp(FRESH, FRESH_MOST)
        {
            return Ok(sight.clone());
        }
        let sight = Arc::new(self.look().await?);
        *kept = Some(sight.clone());
        Ok(sight)
    }

    async fn look(self: &Arc<Self>) -> Result<Sight, Status> {
        let begun = Instant::now();
        let view = self.map.view();
        let nodes = view.present().filter_map(|node| NodeId::new(node.id).ok());
        let loads = nodes.map(|node| self.at_within(ANSWER, node, v1::UsageRequest { groups: true }));
        let (groups, loads) = tokio::join!(self.groups(v1::GroupsRequest::default()), join_all(loads));
        let groups = groups?;
        let mut by_group: HashMap<u64, (u64, u64)> = HashMap::new();
        for load in loads.into_iter().flatten().flat_map(|reply| reply.groups) {
            // Leadership may have moved within what is smoothed: each has answered its part.
            let (writes, reads) = by_group.entry(load.group).or_default();
            (*writes, *reads) = (*writes + load.writes_per_s, *reads + load.reads_per_s);
        }
        let moves: HashMap<u64, u64> = view.map().moves.iter().map(|mv| (mv.group, mv.id)).collect();
        let seen = |view: v1::GroupView| {
            let (writes_per_s, reads_per_s) = by_group.get(&view.group).copied().unwrap_or_default();
            Seen {
                bytes: view.replicas.iter().map(|replica| replica.bytes).max().unwrap_or(0),
                lag: view.replicas.iter().map(|replica| lag(&view, replica)).max().unwrap_or(0),
                writes_per_s,
                reads_per_s,
                moved_by: moves.get(&view.group).copied().unwrap_or(0),
                view,
            }
        };
        Ok(Sight {
            groups: groups.groups.into_iter().map(seen).collect(),
            unreachable: groups.unreachable,
            took: begun.elapsed(),
            made: Instant::now(),
        })
    }

    /// Nobody looks any more.
    pub(crate) async fn forget_sight(&self) {
        *self.console.sight.lock().await = None;
    }
}
