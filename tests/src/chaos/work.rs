//! What goes on meanwhile: appenders who remember what they were told, and moves without end.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use pontoon_node::client::{Client, Log};
use pontoon_proto::{ReplicaId, v1};
use tokio::{task::JoinSet, time::sleep};

use crate::{Rng, cluster::within, history::pause};

/// Records of a log that is read are asked for in such pages.
const PAGE: u32 = 5_000;
/// Between two looks at a move.
const LOOK: Duration = Duration::from_millis(20);

/// Appenders to one log.
pub struct Appenders {
    log: Log,
    stop: Arc<AtomicBool>,
    tasks: JoinSet<BTreeMap<u64, Bytes>>,
}

impl Appenders {
    /// Starts so many. Each appends its records one after the other, and rests for up to `rest` after each; `turn` makes them other
    /// than those of other turns.
    pub fn start(log: Log, turn: u64, appenders: u64, rest: Duration) -> Appenders {
        let (stop, mut tasks) = (Arc::new(AtomicBool::new(false)), JoinSet::new());
        for name in 0..appenders {
            let (log, stop) = (log.clone(), stop.clone());
            tasks.spawn(async move {
                let (mut acknowledged, mut rng) = (BTreeMap::new(), Rng::new(name));
                for round in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let record = Bytes::from(format!("{turn}/{name}/{round}"));
                    // What is not answered in time may be there all the same, once.
                    if let Ok(appended) = log.append([record.clone()]).await {
                        acknowledged.insert(appended.first, record);
                    }
                    pause(&mut rng, rest).await;
                }
                acknowledged
            });
        }
        Appenders { log, stop, tasks }
    }

    /// Ends them and reads the log: whatever was acknowledged is there, where it was said to be; nothing is there twice; each
    /// appender's records are in its order. How many were acknowledged.
    ///
    /// # Panics
    /// If not.
    pub async fn judge(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let mut acknowledged = BTreeMap::new();
        while let Some(ended) = within("appenders to end", self.tasks.join_next()).await {
            acknowledged.extend(ended.expect("an appender does not panic"));
        }
        let bounds = within("a log to tell its bounds", self.log.bounds()).await.expect("the log is there");
        let name = self.log.name();
        let (mut at, mut last) = (bounds.lowest, BTreeMap::<Bytes, u64>::new());
        while at < bounds.next {
            let page = within("a page of a log", self.log.read(at, None, PAGE)).await.expect("it is read");
            assert!(!page.records.is_empty(), "{name} has nothing at {at} of {bounds:?}");
            for (offset, record) in (at..).zip(page.records) {
                if let Some(told) = acknowledged.remove(&offset) {
                    assert_eq!(told, record, "{name} has another record at {offset} than was acknowledged");
                }
                let text = String::from_utf8_lossy(&record).into_owned();
                let (who, nth) = text.rsplit_once('/').expect("a record of ours");
                let nth = nth.parse().expect("a record of ours");
                let before = last.insert(Bytes::from(who.to_owned()), nth);
                assert!(before.is_none_or(|before| before < nth), "{name}: {text} comes after {before:?}");
                at = offset + 1;
            }
        }
        assert!(acknowledged.is_empty(), "{name} lost {acknowledged:?}");
        last.values().map(|nth| nth + 1).sum()
    }
}

/// Moves one replica of one predicate after the other to a node that has none, until it is stopped, and counts the moves that
/// were done.
pub async fn move_around(
    client: Client,
    predicates: Vec<String>,
    nodes: Vec<u64>,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    mut rng: Rng,
) {
    let mut turn = 0;
    while !stop.load(Ordering::Relaxed) {
        let predicate = &predicates[turn % predicates.len()];
        turn += 1;
        let find = v1::FindPredicateRequest { predicate: predicate.clone(), hops: 0 };
        let Ok(v1::FindPredicateReply { shard: Some(shard) }) = client.find_predicate(find).await else {
            continue;
        };
        let holds: Vec<u64> = shard
            .voters
            .iter()
            .filter_map(|id| ReplicaId::new(*id).ok())
            .map(|replica| replica.node().get())
            .collect();
        let free: Vec<u64> = nodes.iter().copied().filter(|node| !holds.contains(node)).collect();
        if holds.is_empty() || free.is_empty() {
            continue;
        }
        let start = v1::MoveStartRequest {
            predicate: predicate.clone(),
            from_node: holds[rng.below(holds.len() as u64) as usize],
            to_node: free[rng.below(free.len() as u64) as usize],
            ..Default::default()
        };
        // A node that was killed just now refuses; the next turn finds another.
        let Ok(reply) = client.move_start(start).await else { continue };
        let id = reply.r#move.map_or(0, |mv| mv.id);
        let list = v1::MoveListRequest { all: true, hops: 0 };
        while !stop.load(Ordering::Relaxed) {
            let moves = client.move_list(list).await.map(|reply| reply.moves).unwrap_or_default();
            let found = moves.into_iter().filter_map(|view| view.r#move).find(|mv| mv.id == id);
            match found.map(|mv| mv.phase()) {
                Some(v1::MovePhase::Done) => {
                    done.fetch_add(1, Ordering::Relaxed);
                    break;
                }
                Some(v1::MovePhase::Aborted) => break,
                _ => sleep(LOOK).await,
            }
        }
    }
}
