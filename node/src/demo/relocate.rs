//! The move of the demo, under traffic, with its source node killed in the middle.

use std::time::Duration;

use pontoon_node::client::{Client, ClientError};
use pontoon_proto::{ReplicaId, v1};
use tokio::time::{Instant, sleep, timeout_at};

use super::{
    Source,
    traffic::{Seen, Traffic},
};
use crate::{
    cli::{Failure, Say},
    local::Cluster,
};

/// How long the move may take. It is over in seconds; a cluster that is stuck shall not hang the demo.
const MOVE: Duration = Duration::from_secs(180);
/// How long the killed node stays away.
const OUTAGE: Duration = Duration::from_millis(700);
const PAUSE: Duration = Duration::from_millis(50);
/// The traffic flows before the move begins and goes on a little after it.
const WRITES_BEFORE: usize = 300;
const AFTER: Duration = Duration::from_millis(500);

/// What became of the move.
#[derive(Debug)]
pub(super) struct Moved {
    pub(super) predicate: String,
    pub(super) from: u64,
    pub(super) to: u64,
    pub(super) bytes: u64,
    pub(super) seconds: f64,
    pub(super) max_write_gap_ms: f64,
    pub(super) finished: bool,
    pub(super) killed: bool,
    pub(super) killed_in: Option<String>,
}

/// Moves a predicate's replica to node 4.
pub(super) async fn under_traffic(
    say: Say,
    client: &Client,
    cluster: &mut Cluster,
    predicate: &str,
    source: Source,
) -> Result<(Moved, Seen), Failure> {
    let (from, leader) = choose_source(client, predicate, source).await?;
    let to = cluster.len() as u64;
    let traffic = Traffic::start(client, predicate);
    let until = Instant::now() + MOVE;
    while traffic.acknowledged() < WRITES_BEFORE && Instant::now() < until {
        sleep(PAUSE).await;
    }
    say.step(&format!(
        "moving {predicate} from node {from} ({}) to node {to}, under a write each millisecond",
        if from == leader { "its leader" } else { "a follower" }
    ));
    traffic.set_clock();
    let begun = Instant::now();
    let request = v1::MoveStartRequest {
        predicate: predicate.to_owned(),
        kind: v1::MoveKind::Replace.into(),
        from_node: from,
        to_node: to,
        reason: "the demo".to_owned(),
        ..Default::default()
    };
    let started = client.move_start(request).await?;
    let id = started.r#move.as_ref().map(|started| started.id).unwrap_or_default();
    let mut moved = Moved {
        predicate: predicate.to_owned(),
        from,
        to,
        bytes: started.bytes,
        seconds: 0.0,
        max_write_gap_ms: 0.0,
        finished: false,
        killed: false,
        killed_in: None,
    };
    let mut follow = Follow { say, client, id, last: String::new() };
    // The kill comes as soon as the target has begun to receive; before that there is nothing to interrupt.
    let middle = |phase: v1::MovePhase| phase as i32 >= v1::MovePhase::Learner as i32;
    if let Some(view) = follow.closely_until(until, middle).await? {
        let phase = phase_of(&view);
        if !ended(&view) {
            cluster.kill(from)?;
            moved.killed = true;
            say.step(&format!("  node {from} is killed in phase {phase}"));
            moved.killed_in = Some(phase);
            sleep(OUTAGE).await;
            cluster.restart(from).await?;
            say.step(&format!("  node {from} is started again"));
        }
    }
    if let Some(view) = follow.until(until, is_end).await? {
        let record = view.r#move.clone().unwrap_or_default();
        moved.finished = record.phase() == v1::MovePhase::Done;
        moved.bytes = moved.bytes.max(view.bytes_total).max(record.bytes_total);
    }
    moved.seconds = begun.elapsed().as_secs_f64();
    moved.max_write_gap_ms = traffic.longest_gap().as_secs_f64() * 1000.0;
    sleep(AFTER).await;
    let seen = traffic.stop().await;
    say.step(&format!(
        "  {} after {:.1} s",
        if moved.finished { "moved" } else { "the move has NOT finished" },
        moved.seconds
    ));
    Ok((moved, seen))
}

/// A node with a replica of the predicate, and who leads it.
async fn choose_source(client: &Client, predicate: &str, source: Source) -> Result<(u64, u64), Failure> {
    let until = Instant::now() + MOVE;
    loop {
        let request = v1::PredicatesRequest { predicate: predicate.to_owned() };
        let view = client.predicates(request).await?.predicates.into_iter().next().unwrap_or_default();
        let leader = view.leader_node;
        let shard = view.shard.unwrap_or_default();
        let mut nodes: Vec<u64> =
            shard.voters.iter().map(|&id| ReplicaId::new(id).map_or(0, |id| id.node().get())).collect();
        nodes.sort_unstable();
        let chosen = match source {
            Source::Leader => Some(leader),
            Source::Follower => nodes.iter().rev().copied().find(|&node| node != leader),
        };
        // Three replicas first: a predicate that is still being repaired has a move of its own.
        if let Some(chosen) = chosen.filter(|_| leader != 0 && nodes.len() >= 3 && view.r#move == 0) {
            return Ok((chosen, leader));
        }
        if Instant::now() >= until {
            return Err(Failure::error(format!(
                "{predicate} does not get its three replicas; see the nodes' logs"
            )));
        }
        sleep(PAUSE).await;
    }
}

/// A small move passes a phase in a few milliseconds.
const LOOK_EVERY: Duration = Duration::from_millis(3);

struct Follow<'a> {
    say: Say,
    client: &'a Client,
    id: u64,
    last: String,
}

impl Follow<'_> {
    /// As [`Follow::until`], but asks again and again instead of waiting to be told.
    async fn closely_until(
        &mut self,
        until: Instant,
        wanted: impl Fn(v1::MovePhase) -> bool,
    ) -> Result<Option<v1::MoveView>, Failure> {
        while Instant::now() < until {
            let moves = self.client.move_list(v1::MoveListRequest { all: true, hops: 0 }).await?.moves;
            let mine = |view: &v1::MoveView| view.r#move.as_ref().is_some_and(|moved| moved.id == self.id);
            if let Some(view) = moves.into_iter().find(mine) {
                self.show(&view);
                if ended(&view) || view.r#move.as_ref().is_some_and(|moved| wanted(moved.phase())) {
                    return Ok(Some(view));
                }
            }
            sleep(LOOK_EVERY).await;
        }
        Ok(None)
    }

    fn show(&mut self, view: &v1::MoveView) {
        let phase = phase_of(view);
        if phase != self.last {
            self.say.step(&format!("  {phase}"));
            self.last = phase;
        }
    }

    /// Follows the move until a phase is as wanted or it has ended; over the loss of the node that tells of it. `None`:
    /// the time is up.
    async fn until(
        &mut self,
        until: Instant,
        wanted: impl Fn(v1::MovePhase) -> bool,
    ) -> Result<Option<v1::MoveView>, Failure> {
        while Instant::now() < until {
            let mut views = match self.client.move_watch(self.id).await {
                Ok(views) => views,
                Err(ClientError::NobodyAnswers { .. } | ClientError::NoMetaLeader { .. }) => continue,
                Err(error) => return Err(error.into()),
            };
            while let Ok(message) = timeout_at(until, views.message()).await {
                let Ok(Some(view)) = message else { break };
                self.show(&view);
                if ended(&view) || view.r#move.as_ref().is_some_and(|moved| wanted(moved.phase())) {
                    return Ok(Some(view));
                }
            }
            sleep(PAUSE).await;
        }
        Ok(None)
    }
}

fn is_end(phase: v1::MovePhase) -> bool {
    matches!(phase, v1::MovePhase::Done | v1::MovePhase::Aborted)
}

fn ended(view: &v1::MoveView) -> bool {
    view.r#move.as_ref().is_some_and(|moved| is_end(moved.phase()))
}

fn phase_of(view: &v1::MoveView) -> String {
    let name = view.r#move.as_ref().map_or("MOVE_PHASE_PLANNED", |moved| moved.phase().as_str_name());
    name.trim_start_matches("MOVE_PHASE_").to_lowercase().replace('_', "-")
}
