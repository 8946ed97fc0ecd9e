//! Makes the cluster what the meta group says. Runs on the leader of the meta group, and only while it leads.
//!
//! ```text
//!  meta state changed ─┐
//!  a task ended ───────┼─> look: a shard in creation, one being dropped, a move, a lack of replicas
//!  a second passed ────┘        └─ one task per subject: observe, decide, act or commit, observe again
//! ```
//!
//! Level-triggered: nothing is remembered between looks but which tasks run. A leader that dies loses nothing, its
//! successor finds the same subjects in the same state. Every commit carries the driver's term, and nodes refuse the
//! calls of a term that was followed by another, so a driver that does not know yet that it was deposed does no harm.

mod casualties;
mod moves;
mod shards;
mod sight;

use std::{collections::HashMap, future::Future, pin::Pin, sync::Arc, time::Duration};

use pontoon_proto::{
    GroupId, NodeId,
    v1::{self, meta_command::Body},
};
use pontoon_raftstore::{ReadLevel, Role};
use pontoon_shard::{
    MetaState,
    planner::{self, Seen},
};
use tokio::{
    sync::watch,
    task::{Id, JoinSet},
    time::{Instant, sleep, timeout},
};
use tracing::{debug, error, info};

use crate::{cluster::fresh, shared::Shared, views::is_ended};

/// How long nothing happens before the driver looks again.
const INTERVAL: Duration = Duration::from_secs(1);
/// How often repairs are looked for at most.
const REPAIR_INTERVAL: Duration = Duration::from_millis(200);
/// How long a node may take to show that it is there before it is given a replica.
const PING: Duration = Duration::from_millis(500);
/// How many ended moves the meta group keeps, and the surplus at which it forgets some.
const MOVES_KEPT: u32 = 1_000;
const MOVES_SURPLUS: usize = 100;

/// What a task works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Subject {
    Create(u64),
    Drop(u64),
    Move(u64),
}

/// A leader of the meta group at work in one term.
#[derive(Clone)]
struct Driver {
    shared: Arc<Shared>,
    term: u64,
    /// What is seen of the nodes.
    sight: watch::Sender<Seen>,
}

impl Shared {
    /// Drives whenever this node leads the meta group. Ends with the node.
    pub(crate) async fn reconcile(self: Arc<Self>) {
        let mut stop = self.stop.subscribe();
        tokio::select! {
            () = self.drive_whenever_leading() => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
    }

    async fn drive_whenever_leading(self: &Arc<Self>) {
        loop {
            let Some(group) = self.raft.group(GroupId::META) else {
                sleep(INTERVAL).await;
                continue;
            };
            let mut status = group.status();
            let leads = status.wait_for(|status| status.role == Role::Leader);
            // The limit lets a replica be noticed that was replaced by another.
            let Ok(Ok(term)) = timeout(INTERVAL, leads).await.map(|found| found.map(|status| status.term))
            else {
                continue;
            };
            // Everything that earlier leaders committed must be in the state before anything is decided by it.
            if group.read_barrier(ReadLevel::Linearizable).await.is_err() {
                sleep(PING).await;
                continue;
            }
            info!(term, "driving the cluster");
            Driver { shared: self.clone(), term, sight: watch::Sender::default() }.run().await;
            info!(term, "another node drives the cluster");
        }
    }
}

impl Driver {
    fn leads(&self) -> bool {
        self.shared.meta_term() == Some(self.term)
    }

    fn state(&self) -> Arc<MetaState> {
        self.shared.machines.shards().meta().borrow().clone()
    }

    async fn run(self) {
        let mut tasks: JoinSet<()> = JoinSet::new();
        let mut subjects: HashMap<Id, Subject> = HashMap::new();
        let mut states = self.shared.machines.shards().meta();
        let mut repaired = Instant::now() - REPAIR_INTERVAL;
        let dead = watch::Sender::new(planner::Dead::new());
        let mut casualties = dead.subscribe();
        tasks.spawn(self.clone().watch_casualties(dead));
        let mut nodes = self.sight.subscribe();
        let mut well = None;
        tasks.spawn(self.clone().watch_nodes());
        tasks.spawn(self.clone().keep_balanced());
        // Dropping the set at the end aborts what still runs.
        while self.leads() {
            let state = states.borrow_and_update().clone();
            for subject in subjects_of(&state) {
                if !subjects.values().any(|&known| known == subject) {
                    let task = tasks.spawn(self.clone().work(subject));
                    subjects.insert(task.id(), subject);
                }
            }
            if repaired.elapsed() >= REPAIR_INTERVAL {
                let dead = casualties.borrow_and_update().clone();
                let seen = Seen { dead, ..nodes.borrow_and_update().clone() };
                // With very many groups a look is dear: what was well stays so until the map or the sight of the nodes changes.
                let looked = (state.version, seen);
                if well.as_ref() != Some(&looked) {
                    let is_well = !self.repair(&state, &looked.1).await;
                    well = is_well.then_some(looked);
                }
                self.carry_out(&state).await;
                self.settle_debts(&state).await;
                repaired = Instant::now();
            }
            tokio::select! {
                changed = states.changed() => if changed.is_err() { return },
                Some(ended) = tasks.join_next_with_id() => {
                    let id = match &ended {
                        Ok((id, ())) => *id,
                        Err(error) => error.id(),
                    };
                    let subject = subjects.remove(&id);
                    if let Err(error) = ended {
                        error!(?subject, %error, "a task of the driver failed; it starts again");
                        sleep(INTERVAL).await;
                    }
                }
                () = sleep(if subjects.is_empty() { INTERVAL } else { REPAIR_INTERVAL }) => {}
            }
        }
    }

    fn work(self, subject: Subject) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        match subject {
            Subject::Create(group) => Box::pin(self.create_shard(group)),
            Subject::Drop(group) => Box::pin(self.drop_shard(group)),
            Subject::Move(id) => Box::pin(self.drive_move(id)),
        }
    }

    /// Starts what the planner finds missing, on nodes that answer. False: nothing is missing.
    async fn repair(&self, state: &MetaState, seen: &Seen) -> bool {
        let mut answers: HashMap<u64, bool> = HashMap::new();
        let starts = planner::repairs(state, seen);
        let found = !starts.is_empty();
        for start in starts {
            let target = start.target_node;
            let there = match answers.get(&target) {
                // Nobody has to be there for somebody to go.
                _ if target == 0 => true,
                Some(&there) => there,
                None => {
                    let there = match NodeId::new(target) {
                        Ok(node) => self.shared.at_within(PING, node, v1::ReportRequest {}).await.is_ok(),
                        Err(_) => false,
                    };
                    answers.insert(target, there);
                    there
                }
            };
            if !there || !self.leads() {
                continue;
            }
            let group = start.group;
            let bytes_total = self.shared.machines.usage(GroupId(group));
            let start = v1::StartMove { session: fresh(), bytes_total, ..start };
            if let Err(status) = self.shared.meta_done(Body::StartMove(start)).await {
                debug!(group, reason = status.message(), "a repair was not started");
            }
        }
        let ended = state.moves.values().filter(|mv| is_ended(mv)).count();
        if ended > MOVES_KEPT as usize + MOVES_SURPLUS {
            drop(self.shared.meta_done(Body::PruneMoves(v1::PruneMoves { keep: MOVES_KEPT })).await);
        }
        found
    }
}

/// What there is to do.
fn subjects_of(state: &MetaState) -> Vec<Subject> {
    let shards = state.shards.values().filter_map(|shard| match shard.state() {
        v1::ShardState::Creating => Some(Subject::Create(shard.group)),
        v1::ShardState::Dropping => Some(Subject::Drop(shard.group)),
        v1::ShardState::Live => None,
    });
    shards.chain(state.running_moves().map(|mv| Subject::Move(mv.id))).collect()
}
