//! The cluster that is measured, and what is asked of it again and again.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use futures::{StreamExt, TryStreamExt, stream};
use pontoon_node::client::{Client, put};
use pontoon_proto::{ReplicaId, v1};
use pontoon_shard::{EngineKind, planner::RULES_FORMAT};
use tokio::time::{Instant, sleep};

use super::{
    copies::{key, value},
    traffic::Window,
};
use crate::{
    cli::{Failure, Say},
    local::Cluster,
};

/// How long anything may take that is over in seconds; a cluster that is stuck shall not hang the measurement.
pub(super) const PATIENCE: Duration = Duration::from_secs(300);
const PAUSE: Duration = Duration::from_millis(20);
/// Until every node has heard of new rules: they are told within a moment, and nothing tells that they were.
const RULES_SPREAD: Duration = Duration::from_millis(300);
pub(super) const VALUE_BYTES: usize = 1_024;
const ROWS_PER_WRITE: u64 = 128;
const WRITES_PER_CALL: u64 = 8;
const CALLS_AT_ONCE: usize = 3;
/// How many calls that make predicates are under way.
const MADE_AT_ONCE: usize = 32;

/// The processes, a client of them, and where they lie.
pub(super) struct Stage {
    pub(super) say: Say,
    pub(super) client: Client,
    pub(super) cluster: Cluster,
    pub(super) dir: PathBuf,
}

/// Where a predicate's voters are, by the numbers of their nodes.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) leader: u64,
    pub(super) voters: Vec<u64>,
    /// The one of four nodes that holds none.
    pub(super) free: u64,
}

impl Place {
    /// A node whose replica follows.
    pub(super) fn follower(&self) -> u64 {
        self.voters.iter().copied().find(|node| *node != self.leader).unwrap_or(self.leader)
    }
}

/// A move that has ended well.
#[derive(Debug, Clone)]
pub(super) struct Moved {
    pub(super) leader_moved: bool,
    pub(super) bytes: u64,
    pub(super) window: Window,
    /// When the record stood in each phase.
    pub(super) phases: BTreeMap<v1::MovePhase, Window>,
}

impl Moved {
    /// From the first chunk to the last.
    pub(super) fn received(&self) -> f64 {
        self.phases.get(&v1::MovePhase::Snapshot).map_or(0.0, Window::seconds)
    }

    pub(super) fn seconds(&self) -> f64 {
        self.window.seconds()
    }
}

impl Stage {
    /// Three nodes in an empty directory.
    pub(super) async fn set(say: Say, dir: &Path, engine: EngineKind) -> Result<Stage, Failure> {
        let mut cluster = Cluster::new(dir, Some(engine), false)?;
        for _ in 0..3 {
            cluster.start().await?;
        }
        let client = Client::connect(cluster.addresses()).await?;
        cluster.await_nodes(&client, 3).await?;
        Ok(Stage { say, client, cluster, dir: dir.to_owned() })
    }

    pub(super) async fn add_node(&mut self) -> Result<(), Failure> {
        self.cluster.start().await?;
        self.cluster.await_nodes(&self.client, self.cluster.len()).await
    }

    /// Makes predicates of one row each.
    pub(super) async fn make(&self, names: &[String]) -> Result<(), Failure> {
        let made = stream::iter(names.iter().cloned()).map(|name| async move {
            self.client.create_map(name.clone(), 3).await?;
            self.client.put(&name, "k", "v").await.map(drop)
        });
        made.buffer_unordered(MADE_AT_ONCE).try_collect::<()>().await?;
        Ok(())
    }

    /// Fills a predicate with rows that are not to be compressed.
    pub(super) async fn fill(&self, predicate: &str, bytes: u64) -> Result<(), Failure> {
        let client = self.client.with_deadline(PATIENCE);
        let rows = (bytes / VALUE_BYTES as u64).max(1);
        let calls = (0..rows).step_by((ROWS_PER_WRITE * WRITES_PER_CALL) as usize);
        let client = &client;
        let written = stream::iter(calls).map(|first| async move {
            let end = (first + ROWS_PER_WRITE * WRITES_PER_CALL).min(rows);
            let writes = (first..end).step_by(ROWS_PER_WRITE as usize).map(|low| {
                let rows = low..(low + ROWS_PER_WRITE).min(end);
                (predicate.to_owned(), rows.map(|row| put(key(row), value(row, VALUE_BYTES))).collect())
            });
            client.write_many(writes.collect()).await.into_iter().try_for_each(|end| end.map(drop))
        });
        written.buffer_unordered(CALLS_AT_ONCE).try_collect::<()>().await?;
        Ok(())
    }

    /// What received states may take from now on.
    pub(super) async fn set_budget(&self, budget: &str) -> Result<(), Failure> {
        let cluster = v1::ClusterRule { budget: Some(budget.to_owned()), ..Default::default() };
        let rules = v1::Rules { format: RULES_FORMAT, cluster: Some(cluster), ..Default::default() };
        let request = v1::SetRulesRequest { rules: Some(rules), force: true, ..Default::default() };
        self.client.set_rules(request).await?;
        sleep(RULES_SPREAD).await;
        Ok(())
    }

    /// Where a predicate lies, once it has three voters, a leader and no move.
    pub(super) async fn place(&self, predicate: &str) -> Result<Place, Failure> {
        let until = Instant::now() + PATIENCE;
        loop {
            let request = v1::PredicatesRequest { predicate: predicate.to_owned() };
            let view =
                self.client.predicates(request).await?.predicates.into_iter().next().unwrap_or_default();
            let voters = view.shard.unwrap_or_default().voters;
            let voters: Vec<u64> = voters
                .into_iter()
                .filter_map(|id| ReplicaId::new(id).ok())
                .map(|id| id.node().get())
                .collect();
            let free = (1..=self.cluster.len() as u64).find(|node| !voters.contains(node));
            if let (Some(free), 3, 0) = (free, voters.len(), view.r#move)
                && voters.contains(&view.leader_node)
            {
                return Ok(Place { leader: view.leader_node, voters, free });
            }
            if Instant::now() >= until {
                let text = format!(
                    "{predicate} does not get three voters and a leader; the nodes' logs are in {}",
                    self.dir.display()
                );
                return Err(Failure::error(text));
            }
            sleep(PAUSE).await;
        }
    }

    pub(super) async fn start_move(&self, predicate: &str, from: u64, to: u64) -> Result<v1::Move, Failure> {
        let request = v1::MoveStartRequest {
            predicate: predicate.to_owned(),
            kind: v1::MoveKind::Replace.into(),
            from_node: from,
            to_node: to,
            reason: "measured".to_owned(),
            ..Default::default()
        };
        Ok(self.client.move_start(request).await?.r#move.unwrap_or_default())
    }

    /// Follows a move to its end.
    pub(super) async fn end_of(&self, id: u64) -> Result<v1::Move, Failure> {
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            // Whoever tells may be gone meanwhile.
            let Ok(mut views) = self.client.move_watch(id).await else {
                sleep(PAUSE).await;
                continue;
            };
            while let Ok(Some(view)) = views.message().await {
                let record = view.r#move.unwrap_or_default();
                match record.phase() {
                    v1::MovePhase::Done => return Ok(record),
                    v1::MovePhase::Aborted => {
                        return Err(Failure::error(format!("move {id} has gone back; see `pontoon events`")));
                    }
                    _ => {}
                }
            }
        }
        Err(Failure::error(format!("move {id} does not end; the nodes' logs are in {}", self.dir.display())))
    }

    /// Moves a replica and tells when that was.
    pub(super) async fn move_once(
        &self,
        predicate: &str,
        from: u64,
        to: u64,
        leads: bool,
    ) -> Result<Moved, Failure> {
        let started = self.start_move(predicate, from, to).await?;
        let ended = self.end_of(started.id).await?;
        let mut entered: Vec<(u32, u64)> = ended.entered_ms.iter().map(|(phase, ms)| (*phase, *ms)).collect();
        entered.sort_unstable();
        let phases = entered.windows(2).filter_map(|pair| {
            let phase = v1::MovePhase::try_from(pair[0].0 as i32).ok()?;
            Some((phase, Window { from: at(pair[0].1), to: at(pair[1].1) }))
        });
        Ok(Moved {
            leader_moved: leads,
            bytes: started.bytes_total,
            // The record's own times: whoever follows it hears of its end later.
            window: Window { from: at(ended.started_ms), to: at(ended.finished_ms) },
            phases: phases.collect(),
        })
    }

    /// Bytes that a node's process has had written to the disk.
    pub(super) fn written(&self, node: u64) -> u64 {
        let path = format!("/proc/{}/io", self.cluster.process(node));
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("write_bytes: "));
        line.and_then(|bytes| bytes.parse().ok()).unwrap_or_default()
    }
}

/// A time of the same machine's wall clock as an instant.
fn at(unix: u64) -> Instant {
    let ago = SystemTime::now().duration_since(UNIX_EPOCH + Duration::from_millis(unix)).unwrap_or_default();
    let now = Instant::now();
    now.checked_sub(ago).unwrap_or(now)
}

/// How much of all cores the nodes and whoever writes to them have used since the last look; what else runs does not count.
pub(super) struct Cores {
    processes: Vec<u32>,
    last: (Instant, f64),
}

impl Cores {
    pub(super) fn of(stage: &Stage) -> Cores {
        let nodes = (1..=stage.cluster.len() as u64).map(|node| stage.cluster.process(node));
        let processes: Vec<u32> = nodes.chain([std::process::id()]).collect();
        let last = (Instant::now(), used(&processes));
        Cores { processes, last }
    }

    pub(super) fn busy(&mut self) -> f64 {
        let now = (Instant::now(), used(&self.processes));
        let (seconds, used) = ((now.0 - self.last.0).as_secs_f64(), now.1 - self.last.1);
        self.last = now;
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        used / seconds.max(0.001) / cores as f64
    }
}

/// Seconds of processor time that processes have used.
fn used(processes: &[u32]) -> f64 {
    let ticks_of = |process: &u32| {
        let text = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
        // The name, which may hold anything, ends with the last parenthesis; two of what follows are the times.
        let fields = text.rsplit_once(')').map_or("", |(_, fields)| fields);
        fields.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<u64>().ok()).sum::<u64>()
    };
    // Linux tells these times in hundredths, whatever its clock does.
    processes.iter().map(ticks_of).sum::<u64>() as f64 / 100.0
}
