//! Logs on real processes: followed through a killed leader and a move, and mirrored by a process that is killed.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use futures::StreamExt;
use pontoon_node::client::{Client, Log};
use pontoon_proto::v1::MovePhase;
use pontoon_tests::{
    cluster::{Cluster, until, within},
    process::{Process, Program},
};
use tokio::{sync::watch, task::JoinSet};

const PROGRAM: Program =
    Program { exe: env!("CARGO_BIN_EXE_pontoon-under-test"), scratch: env!("CARGO_TARGET_TMPDIR") };

/// Enough that a moved replica comes by a snapshot of several chunks.
const FILL_RECORDS: usize = 6_000;
const FILL_BYTES: usize = 1_000;

/// Appenders that know which offset each of their records has.
struct Appenders {
    stop: Arc<AtomicBool>,
    count: watch::Receiver<u64>,
    tasks: JoinSet<BTreeMap<u64, Bytes>>,
}

impl Appenders {
    fn start(log: &Log, appenders: usize) -> Appenders {
        let stop = Arc::new(AtomicBool::new(false));
        let (sender, count) = watch::channel(0);
        let sender = Arc::new(sender);
        let mut tasks = JoinSet::new();
        for name in 0..appenders {
            let (log, stop, sender) = (log.clone(), stop.clone(), sender.clone());
            tasks.spawn(async move {
                let mut acknowledged = BTreeMap::new();
                for round in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let records: Vec<Bytes> =
                        (0..round % 3 + 1).map(|n| format!("{name}/{round}/{n}").into()).collect();
                    let appended =
                        log.append(records.clone()).await.expect("an append is retried until it is done");
                    acknowledged.extend((appended.first..).zip(records));
                    sender.send_modify(|count| *count += 1);
                }
                acknowledged
            });
        }
        Appenders { stop, count, tasks }
    }

    /// Waits for so many more appends: the log is served.
    async fn acknowledged(&mut self, more: u64) {
        let wanted = *self.count.borrow() + more;
        let enough = self.count.wait_for(|&count| count >= wanted);
        drop(within("appends to be acknowledged", enough).await);
    }

    async fn stop(mut self) -> BTreeMap<u64, Bytes> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = BTreeMap::new();
        while let Some(ended) = within("the appenders to end", self.tasks.join_next()).await {
            for (offset, record) in ended.expect("no append failed") {
                assert_eq!(all.insert(offset, record), None, "two records got the offset {offset}");
            }
        }
        all
    }
}

/// Every record, by a reader of the whole log, which begins at offset 0.
async fn whole(log: &Log) -> Vec<Bytes> {
    let records = log.records().await.expect("the log is served");
    let read = records.enumerate().map(|(at, found)| {
        let (offset, record) = found.expect("the log is served");
        assert_eq!(offset, at as u64);
        record
    });
    within("the whole log", read.collect()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_is_moved_under_traffic_and_its_tail_loses_and_repeats_nothing() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 4).await;
    let client = cluster.client().await;
    let log = within("a log to be made", client.create_log("events", 0)).await.expect("the name is free");
    let filler: Vec<Bytes> = (0..FILL_RECORDS).map(|n| vec![n as u8; FILL_BYTES].into()).collect();
    for part in filler.chunks(1_000) {
        within("an append", log.append(part.to_vec())).await.expect("there is room");
    }
    let mut appenders = Appenders::start(&log, 3);
    let mut tail = client.log("events").tail(0);
    let (seen_to, mut seen) = watch::channel(0);
    let follower = tokio::spawn(async move {
        let mut records: Vec<Bytes> = Vec::new();
        while records.last().is_none_or(|last| *last != "the end") {
            let (first, more) = tail.next_many().await.expect("somebody serves the log again soon");
            assert_eq!(first, records.len() as u64, "an offset was left out or came twice");
            records.extend(more);
            seen_to.send_replace(records.len());
        }
        records
    });
    appenders.acknowledged(50).await;

    // The leader's process is killed, then its replica moves away while it leads.
    let leader = cluster.leader("events").await;
    cluster.kill(leader).await;
    appenders.acknowledged(50).await;
    cluster.restart(leader).await;
    let source = cluster.leader("events").await;
    let holders = cluster.voters("events", 3).await;
    let target = (0..4).find(|node| !holders.contains(node)).expect("one of four holds no replica");
    let id = cluster.start_move("events", source, target).await;
    cluster.phase(id, MovePhase::Snapshot).await;
    appenders.acknowledged(20).await;
    assert_eq!(cluster.moved(id).await.phase(), MovePhase::Done);
    appenders.acknowledged(50).await;

    let acknowledged = appenders.stop().await;
    within("the last append", log.append(["the end"])).await.expect("the log is served");
    let followed = within("the tail to come to the end", follower).await.expect("the tail meets no gap");
    assert!(*seen.borrow_and_update() > FILL_RECORDS);
    let records = whole(&log).await;
    assert_eq!(followed, records);
    assert_eq!(records.len(), FILL_RECORDS + acknowledged.len() + 1, "an append was lost or applied twice");
    assert_eq!(records[..FILL_RECORDS], filler);
    for (offset, record) in acknowledged {
        assert_eq!(records[offset as usize], record);
    }
    let holders = cluster.voters("events", 3).await;
    assert!(holders.contains(&target) && !holders.contains(&source), "{holders:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_goes_on_after_a_kill_and_refuses_what_it_cannot_copy() {
    let there = Cluster::start(PROGRAM, "fjall", 1).await;
    let here = Cluster::start(PROGRAM, "sled", 1).await;
    let (source, copy) = (there.client().await.log("events"), here.client().await.log("events"));
    within("a log to be made", source.client().create_log("events", 0)).await.expect("the name is free");
    let command = ["--addr", here.address(0), "log", "mirror", "events", "--from-cluster", there.address(0)];
    let once = [&command[..], &["--once"]].concat();
    let scratch = PROGRAM.scratch();

    let mut appenders = Appenders::start(&source, 2);
    appenders.acknowledged(20).await;
    for round in 0..3u64 {
        let file = scratch.path().join(format!("mirror{round}.log"));
        let mut mirror = Process::start(PROGRAM, "a mirror", &file, &command.map(str::to_owned));
        mirror.prints("is mirrored up to offset").await;
        let before = within("the copy's bounds", copy.bounds()).await.expect("it exists by now").next;
        appenders.acknowledged(20).await;
        until("the copy to grow", async || copy.bounds().await.ok().filter(|now| now.next > before)).await;
        mirror.kill().await;
    }
    let acknowledged = appenders.stop().await;
    let (exit, said) = PROGRAM.run(&once).await;
    assert!(exit.success() && said.contains("is mirrored up to offset"), "{said}");
    let original = whole(&source).await;
    assert_eq!(original.len(), acknowledged.len());
    assert_eq!(whole(&copy).await, original);

    // The embedder's mirror does the same: it goes on where the other stopped.
    let mirror = pontoon_node::client::Mirror::into(copy.client().clone());
    let mut state = mirror.join("events", source.clone()).await.expect("the copy is a log");
    let appended = source.append(["by the library"]).await.expect("it is served");
    let caught_up = state.wait_for(|state| state.as_ref().is_ok_and(|state| state.next == appended.next));
    within("the library to catch up", caught_up).await.expect("the mirror runs");
    assert_eq!(mirror.leave("events").await.expect("there is one").expect("it did well").next, appended.next);
    mirror.close().await;

    // What was truncated before it was copied is told, with the way on; and so is a copy that is none.
    let appended = source.append(["lost", "kept"]).await.expect("it is served");
    source.truncate(appended.first + 1).await.expect("the log reaches so far");
    let (exit, said) = PROGRAM.run(&once).await;
    let step = format!("pontoon log reset events --at {}", appended.first + 1);
    assert!(exit.code() == Some(3) && said.contains("truncated") && said.contains(&step), "{said}");
    copy.reset(appended.first + 1).await.expect("it is served");
    let (exit, said) = PROGRAM.run(&once).await;
    assert!(exit.success(), "{said}");
    assert_eq!(copy.get(appended.first + 1).await.expect("it is served").as_deref(), Some(&b"kept"[..]));
    copy.append(["by another hand"]).await.expect("it is served");
    let (exit, said) = PROGRAM.run(&once).await;
    assert!(exit.code() == Some(3) && said.contains("is no copy of events"), "{said}");
    source.append(["something else"]).await.expect("it is served");
    let (exit, said) = PROGRAM.run(&once).await;
    assert!(exit.code() == Some(3) && said.contains("differ"), "{said}");
    let (exit, said) = PROGRAM
        .run(["--addr", here.address(0), "log", "mirror", "events", "--from-cluster", here.address(0)])
        .await;
    assert!(exit.code() == Some(2) && said.contains("same cluster"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn any_node_tails_a_log_for_a_plain_client() {
    use pontoon_node::api::data_client::DataClient;
    use pontoon_proto::v1;
    let cluster = Cluster::start(PROGRAM, "fjall", 4).await;
    let client: Client = cluster.client().await;
    let log = within("a log to be made", client.create_log("events", 1)).await.expect("the name is free");
    log.append(["a", "b"]).await.expect("it is served");
    let leader = cluster.leader("events").await;
    let elsewhere = (leader + 1) % 4;
    let mut data =
        DataClient::connect(format!("http://{}", cluster.address(elsewhere))).await.expect("it listens");
    let request = v1::ReadLogRequest { log: "events".to_owned(), from: Some(1), ..Default::default() };
    let mut pages = within("a tail to begin", data.tail_log(request)).await.expect("it answers").into_inner();
    let mut page = async || within("a page", pages.message()).await.expect("it goes on").expect("it goes on");
    assert_eq!((page().await.first, page_of(&log).await), (1, 2));
    // Its only replica moves while the tail waits.
    let target = (0..4).find(|&node| node != leader && node != elsewhere).expect("four nodes");
    let id = cluster.start_move("events", leader, target).await;
    assert_eq!(cluster.moved(id).await.phase(), MovePhase::Done);
    log.append(["c"]).await.expect("it is served");
    let next = page().await;
    assert_eq!((next.first, &next.records[..]), (2, &["c".into()][..]));
    log.reset(0).await.expect("it is served");
    let refused = page().await.refusal.expect("the offset is gone").kind;
    assert!(matches!(refused, Some(v1::refusal::Kind::Offset(_))), "{refused:?}");
}

async fn page_of(log: &Log) -> u64 {
    log.bounds().await.expect("it is served").next
}
