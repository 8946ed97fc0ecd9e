//! The giving side of a backup: one predicate as of one index, chunk by chunk, on a thread of its own.
//!
//! ```text
//!  contents ── rows ──> cutter ── chunk ──> offered ── hash ──> caller
//!                          │                   │ <── want? ─────┘
//!                        pace                  └── bytes, if so
//! ```
//!
//! A few chunks are held at most: those that were offered and not answered. The engine keeps the point in time as long as the stream
//! stands; a caller that takes or says nothing for too long loses it.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use pontoon_proto::{
    GroupId,
    v1::{self, backup_ask::Ask, backup_reply::Reply},
};
use pontoon_raftstore::{ReadLevel, SnapshotBudget};
use pontoon_shard::Contents;
use tokio::{sync::mpsc, time::timeout};
use tonic::{Status, Streaming};

use crate::{
    backup::{Cut, Cutter, Whole},
    config::OWN_KINDS_FROM,
    shared::Shared,
};

/// How long the replica may take to learn what its leader has acknowledged.
const BARRIER: Duration = Duration::from_secs(10);
/// Chunks that are cut and not offered yet.
const AHEAD: usize = 2;
/// Chunks that are offered and not answered.
const OFFERED: usize = 4;

/// What comes from the thread that reads.
enum Read {
    Cut(Cut),
    End(Whole),
    Failed(String),
}

type Replies = mpsc::Sender<Result<v1::BackupReply, Status>>;

/// Opens the point in time and gives it to the stream that is returned.
pub(super) async fn serve(
    shared: Arc<Shared>,
    ask: v1::BackupOpen,
    incoming: Streaming<v1::BackupAsk>,
) -> Result<mpsc::Receiver<Result<v1::BackupReply, Status>>, Status> {
    let budget = shared.backup_budget(&ask.budget)?;
    let (shard, contents) = open(&shared, &ask).await?;
    let (replies, stream) = mpsc::channel(1);
    tokio::spawn(async move {
        if let Err(status) = give(&shared, shard, contents, budget, incoming, &replies).await {
            // Whoever is gone does not want to know.
            drop(replies.send(Err(status)).await);
        }
    });
    Ok(stream)
}

/// The first message of a stream.
pub(super) async fn first(incoming: &mut Streaming<v1::BackupAsk>) -> Result<v1::BackupOpen, Status> {
    let first = timeout(BARRIER, incoming.message())
        .await
        .map_err(|_| Status::deadline_exceeded("nothing was asked for"))??;
    match first.and_then(|first| first.ask) {
        Some(Ask::Open(open)) => Ok(open),
        _ => Err(Status::invalid_argument("a backup's stream begins with what is asked for")),
    }
}

async fn open(shared: &Shared, ask: &v1::BackupOpen) -> Result<(v1::Shard, Contents), Status> {
    let id = GroupId(ask.group);
    let view = shared.map.view();
    let shard = view.shard(id).filter(|shard| shard.predicate == ask.predicate).cloned();
    let name = &ask.predicate;
    let shard =
        shard.ok_or_else(|| Status::not_found(format!("there is no predicate {name} of group {id} here")))?;
    if shard.kind >= OWN_KINDS_FROM {
        let kind = shard.kind;
        return Err(Status::failed_precondition(format!(
            "{name} has the kind {kind}, a state machine of an embedder, whose rows only that can read"
        )));
    }
    let group = shared.raft.group(id);
    let group =
        group.ok_or_else(|| Status::unavailable(format!("{} has no replica of {name}", shared.own)))?;
    let barrier = group.read_barrier(ReadLevel::Follower { max_lag: Duration::ZERO });
    match timeout(BARRIER, barrier).await {
        Ok(Ok(_)) => {}
        Ok(Err(rejected)) => return Err(Status::unavailable(format!("{name}: {rejected}"))),
        Err(_) => return Err(Status::unavailable(format!("{name} has no leader that a majority hears"))),
    }
    let machines = shared.machines.shards().clone();
    let contents = tokio::task::spawn_blocking(move || machines.contents(id)).await;
    let contents = contents.map_err(|error| Status::internal(error.to_string()))?;
    let contents = contents.map_err(|error| Status::internal(error.to_string()))?;
    let contents = contents.ok_or_else(|| {
        Status::unavailable(format!("the replica of {name} on {} does not serve", shared.own))
    })?;
    Ok((shard, contents))
}

async fn give(
    shared: &Arc<Shared>,
    shard: v1::Shard,
    contents: Contents,
    budget: SnapshotBudget,
    mut incoming: Streaming<v1::BackupAsk>,
    replies: &Replies,
) -> Result<(), Status> {
    let bounds = contents.bounds();
    let begun = v1::BackupBegun {
        shard: Some(shard),
        index: contents.index(),
        term: contents.term(),
        bounds: bounds.map(|at| v1::LogBounds { lowest: at.lowest, next: at.next, era: at.era }),
    };
    let _busy = shared.backups.begin();
    let (sender, mut cuts) = mpsc::channel(AHEAD);
    let reader = shared.clone();
    tokio::task::spawn_blocking(move || read(&reader, &contents, budget, &sender));
    if !shared.hand_over(replies, Ok(reply(Reply::Begun(begun)))).await {
        return Ok(());
    }
    let mut stop = shared.stop.subscribe();
    let mut offered: VecDeque<(u64, Cut)> = VecDeque::new();
    let (mut next, mut end) = (0, None);
    loop {
        if let (Some(whole), true) = (end.as_ref(), offered.is_empty()) {
            let Whole { hash, rows, bytes, chunks } = *whole;
            let hash = hash.as_bytes().to_vec().into();
            let end = v1::BackupEnd { hash, rows, bytes, chunks };
            shared.hand_over(replies, Ok(reply(Reply::End(end)))).await;
            return Ok(());
        }
        let message = tokio::select! {
            read = cuts.recv(), if end.is_none() && offered.len() < OFFERED => match read {
                Some(Read::Cut(cut)) => {
                    let offer = v1::BackupCut {
                        chunk: next,
                        hash: cut.hash.as_bytes().to_vec().into(),
                        bytes: cut.data.len() as u64,
                        rows: cut.rows,
                        first_key: cut.first_key.clone(),
                    };
                    offered.push_back((next, cut));
                    next += 1;
                    Reply::Cut(offer)
                }
                Some(Read::End(whole)) => {
                    end = Some(whole);
                    continue;
                }
                Some(Read::Failed(reason)) => return Err(Status::internal(reason)),
                None => return Err(Status::internal("whoever reads the rows is gone")),
            },
            answer = timeout(shared.slow_reader, incoming.message()), if !offered.is_empty() => {
                let answer = answer
                    .map_err(|_| Status::deadline_exceeded("no word on whether a chunk is wanted"))??;
                let Some(v1::BackupAsk { ask: Some(Ask::Answer(answer)) }) = answer else { return Ok(()) };
                let cut = offered.pop_front().filter(|(chunk, _)| *chunk == answer.chunk);
                let (chunk, cut) = cut.ok_or_else(|| {
                    Status::invalid_argument("chunks are answered one by one, in their order")
                })?;
                if !answer.want {
                    continue;
                }
                shared.backups.given_bytes.fetch_add(cut.data.len() as u64, Ordering::Relaxed);
                Reply::Chunk(v1::BackupChunk { chunk, data: cut.data })
            },
            _ = stop.wait_for(|stop| *stop) => return Err(Status::unavailable("the node is shutting down")),
        };
        if !shared.hand_over(replies, Ok(reply(message))).await {
            return Ok(());
        }
    }
}

fn reply(reply: Reply) -> v1::BackupReply {
    v1::BackupReply { reply: Some(reply) }
}

/// Reads, cuts and holds back. Ends early when nobody takes any more.
fn read(shared: &Shared, contents: &Contents, budget: SnapshotBudget, cuts: &mpsc::Sender<Read>) {
    let mut cutter = Cutter::default();
    let send = |cut: Cut| {
        shared.backups.pace(cut.data.len(), budget);
        cuts.blocking_send(Read::Cut(cut)).is_ok()
    };
    let mut heard = true;
    let done = contents.rows(&mut |key, value| {
        if let Some(cut) = cutter.push(key, value) {
            heard = send(cut);
        }
        heard
    });
    if !heard {
        return;
    }
    let end = match done {
        Ok(()) => {
            let (last, whole) = cutter.finish();
            if last.is_some_and(|last| !send(last)) {
                return;
            }
            Read::End(whole)
        }
        Err(error) => Read::Failed(error.to_string()),
    };
    drop(cuts.blocking_send(end));
}
