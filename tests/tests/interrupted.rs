//! Moves between real processes that are killed, stopped where they stand, or asked to end, under traffic that knows what must
//! be true. Cases R27, R28 and R29 of other systems; `moves.rs` has them simulated, step by step.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use bytes::Bytes;
use pontoon_node::client::{Client, Expect, Range, cas, put};
use pontoon_proto::v1::MovePhase;
use pontoon_tests::{
    Rng,
    cluster::{Cluster, within},
    process::Program,
    traffic::{Traffic, fill, verify},
};
use tokio::task::JoinSet;

const PROGRAM: Program =
    Program { exe: env!("CARGO_BIN_EXE_pontoon-under-test"), scratch: env!("CARGO_TARGET_TMPDIR") };

/// Enough for a snapshot of several chunks.
const FILL_ROWS: usize = 20_000;
const FILL_VALUE_BYTES: usize = 300;

/// Accounts of the bank, and what each holds at first.
const ACCOUNTS: u64 = 8;
const DEPOSIT: u64 = 1_000;

/// Whose process ends during a move.
#[derive(Debug, Clone, Copy)]
enum Role {
    Driver,
    Source,
    Target,
    Leader,
}

/// How it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Killed,
    /// By SIGTERM: it must end well, whatever goes on.
    Asked,
    /// By SIGSTOP: it stands still, and goes on later as if no time had passed.
    Stopped,
}

/// Money that is moved between the accounts of one predicate, and counted all the time.
struct Bank {
    stop: Arc<AtomicBool>,
    tellers: JoinSet<()>,
    transfers: Arc<AtomicU64>,
    counts: Arc<AtomicU64>,
}

fn account(at: u64) -> Bytes {
    format!("account/{at}").into()
}

fn amount(value: &[u8]) -> u64 {
    std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).expect("an account holds a number")
}

async fn balance(client: &Client, predicate: &str, at: u64) -> Bytes {
    let row = client.get(predicate, account(at)).await.expect("an account is read");
    row.expect("no account is ever missing").value
}

impl Bank {
    async fn open(client: &Client, predicate: &str, seed: u64) -> Bank {
        let ops = (0..ACCOUNTS).map(|at| put(account(at), DEPOSIT.to_string())).collect();
        client.write(predicate, ops).await.expect("the bank opens");
        let mut bank = Bank {
            stop: Arc::default(),
            tellers: JoinSet::new(),
            transfers: Arc::default(),
            counts: Arc::default(),
        };
        for teller in 0..2 {
            let (client, predicate) = (client.clone(), predicate.to_owned());
            let (stop, transfers) = (bank.stop.clone(), bank.transfers.clone());
            let mut rng = Rng::new(seed + teller);
            bank.tellers.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let (from, to) = (rng.below(ACCOUNTS), rng.below(ACCOUNTS));
                    let (gives, takes) =
                        (balance(&client, &predicate, from).await, balance(&client, &predicate, to).await);
                    let sum = rng.below(10);
                    let Some(left) = amount(&gives).checked_sub(sum).filter(|_| from != to) else { continue };
                    let got = amount(&takes) + sum;
                    // Both or none; none if one of them has changed since.
                    let ops = vec![
                        cas(account(from), Expect::Value(gives), Some(left.to_string().into())),
                        cas(account(to), Expect::Value(takes), Some(got.to_string().into())),
                    ];
                    let written = client.write(&predicate, ops).await.expect("a transfer is answered");
                    transfers.fetch_add(u64::from(written.applied), Ordering::Relaxed);
                }
            });
        }
        let (client, predicate) = (client.clone(), predicate.to_owned());
        let (stop, counts) = (bank.stop.clone(), bank.counts.clone());
        bank.tellers.spawn(async move {
            let all = Range::prefix("account/");
            while !stop.load(Ordering::Relaxed) {
                let page = client.scan(&predicate, &all).await.expect("the bank is counted");
                let total: u64 = page.rows.iter().map(|row| amount(&row.value)).sum();
                assert_eq!(page.rows.len() as u64, ACCOUNTS, "an account was not seen");
                assert_eq!(total, ACCOUNTS * DEPOSIT, "money was made or lost");
                counts.fetch_add(1, Ordering::Relaxed);
            }
        });
        bank
    }

    /// Ends it; whoever found something wrong panics here.
    async fn close(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(teller) = within("the tellers to go home", self.tellers.join_next()).await {
            teller.expect("nothing was wrong");
        }
        let (transfers, counts) =
            (self.transfers.load(Ordering::Relaxed), self.counts.load(Ordering::Relaxed));
        println!("{transfers} transfers, counted {counts} times");
        assert!(transfers > 20 && counts > 20, "{transfers} transfers, counted {counts} times");
    }
}

/// Moves a predicate to and fro under traffic; in each move the process with the role ends in the phase.
async fn moves_with_ends(engine: &str, ends: &[(Role, End, MovePhase)]) {
    let mut cluster = Cluster::start(PROGRAM, engine, 4).await;
    let client = cluster.client().await;
    let mut expected = fill(&client, "name", FILL_ROWS, FILL_VALUE_BYTES).await;
    let mut traffic = Traffic::start(&client, "name", 2);
    let mut bystander = Traffic::start(&client, "genre", 1);
    cluster.voters("genre", 3).await;

    for (at, &(role, end, phase)) in ends.iter().enumerate() {
        let holders = cluster.voters("name", 3).await;
        let target = (0..4).find(|node| !holders.contains(node)).expect("one of four holds no replica");
        let leader = cluster.leader("name").await;
        // In turn the replica that leads and one that follows.
        let source = match at % 2 {
            0 => leader,
            _ => *holders.iter().find(|&&node| node != leader).expect("three hold a replica"),
        };
        let id = cluster.start_move("name", source, target).await;
        let seen = cluster.phase(id, phase).await;
        let victim = match role {
            Role::Driver => cluster.meta_leader().await,
            Role::Source => source,
            Role::Target => target,
            Role::Leader => cluster.leader("name").await,
        };
        match end {
            End::Killed => cluster.kill(victim).await,
            End::Stopped => cluster.pause(victim),
            End::Asked => {
                let exit = cluster.terminate(victim).await;
                assert!(exit.success(), "{role:?} {victim} ended with {exit} in {seen:?}");
            }
        }
        println!("move {id} from {source} to {target}: {role:?} {victim} {end:?} in {seen:?}");
        // In turn with the survivors at work for a while, and at once. One that stands still is noticed by that only.
        if at % 2 == 0 || end == End::Stopped {
            traffic.acknowledged(20).await;
            bystander.acknowledged(20).await;
        }
        match end {
            End::Stopped => cluster.resume(victim),
            End::Killed | End::Asked => cluster.restart(victim).await,
        }
        let ended = cluster.moved(id).await;
        assert_eq!(ended.phase(), MovePhase::Done, "{ended:?}");
        let holders = cluster.voters("name", 3).await;
        assert!(holders.contains(&target) && !holders.contains(&source), "{holders:?}");
        traffic.acknowledged(20).await;
    }
    expected.extend(traffic.stop().await);
    verify(&client, "name", &expected).await;
    let untouched = bystander.stop().await;
    verify(&client, "genre", &untouched).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r27_inserts_increments_and_transfers_survive_moves_and_kills() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 4).await;
    let client = cluster.client().await;
    let mut expected = fill(&client, "name", 2_000, FILL_VALUE_BYTES).await;
    let mut traffic = Traffic::start(&client, "name", 3);
    let bank = Bank::open(&client, "bank", 27).await;
    for (at, predicate) in ["name", "bank", "name", "bank", "name", "bank"].into_iter().enumerate() {
        let holders = cluster.voters(predicate, 3).await;
        let target = (0..4).find(|node| !holders.contains(node)).expect("one of four holds no replica");
        let leader = cluster.leader(predicate).await;
        let id = cluster.start_move(predicate, leader, target).await;
        let victim = [leader, target, cluster.meta_leader().await][at % 3];
        cluster.kill(victim).await;
        traffic.acknowledged(20).await;
        cluster.restart(victim).await;
        let ended = cluster.moved(id).await;
        assert_eq!(ended.phase(), MovePhase::Done, "{ended:?}");
    }
    bank.close().await;
    expected.extend(traffic.stop().await);
    verify(&client, "name", &expected).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r28_a_source_that_stood_still_answers_nothing_from_before_the_change_of_members() {
    let cluster = Cluster::start(PROGRAM, "fjall", 4).await;
    let client = cluster.client().await;
    fill(&client, "name", 200, FILL_VALUE_BYTES).await;
    // Its readers hold every read against what was acknowledged before it.
    let mut traffic = Traffic::start(&client, "name", 2);
    for phase in [MovePhase::PreSwitch, MovePhase::Joint, MovePhase::RemoveOld] {
        let holders = cluster.voters("name", 3).await;
        let target = (0..4).find(|node| !holders.contains(node)).expect("one of four holds no replica");
        let source = cluster.leader("name").await;
        let id = cluster.start_move("name", source, target).await;
        let seen = cluster.phase(id, phase).await;
        cluster.pause(source);
        println!("move {id} from {source} to {target}: the source stands still in {seen:?}");
        traffic.acknowledged(30).await;
        let key = format!("written without the source/{id}");
        client.put("name", key.clone(), "new").await.expect("a write without the source");
        cluster.resume(source);
        // A client that knows the source alone asks it first.
        let stale = within("a client to connect", Client::connect([cluster.address(source)])).await;
        let stale = stale.expect("the source answers");
        let row =
            within("a read by way of the source", stale.get("name", key)).await.expect("it is answered");
        assert_eq!(row.map(|row| row.value), Some("new".into()), "after {seen:?}");
        let ended = cluster.moved(id).await;
        assert_eq!(ended.phase(), MovePhase::Done, "{ended:?}");
    }
    traffic.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r29_a_move_survives_the_death_of_its_driver() {
    let phases = [MovePhase::Reserved, MovePhase::Snapshot, MovePhase::Joint, MovePhase::RemoveOld];
    moves_with_ends("fjall", &phases.map(|phase| (Role::Driver, End::Killed, phase))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r29_a_move_survives_the_death_of_its_source() {
    let phases = [MovePhase::Snapshot, MovePhase::CatchUp, MovePhase::Joint, MovePhase::Fence];
    moves_with_ends("fjall", &phases.map(|phase| (Role::Source, End::Killed, phase))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r29_a_move_survives_the_death_of_its_target() {
    let phases = [MovePhase::Learner, MovePhase::Snapshot, MovePhase::PreSwitch, MovePhase::Joint];
    moves_with_ends("fjall", &phases.map(|phase| (Role::Target, End::Killed, phase))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r29_a_move_survives_the_death_of_its_groups_leader() {
    let phases = [MovePhase::Snapshot, MovePhase::Verify, MovePhase::Joint, MovePhase::Fence];
    moves_with_ends("fjall", &phases.map(|phase| (Role::Leader, End::Killed, phase))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r29_a_move_survives_that_somebody_stands_still() {
    let ends = [
        (Role::Driver, End::Stopped, MovePhase::Snapshot),
        (Role::Source, End::Stopped, MovePhase::Joint),
        (Role::Target, End::Stopped, MovePhase::Snapshot),
        (Role::Leader, End::Stopped, MovePhase::PreSwitch),
        (Role::Driver, End::Stopped, MovePhase::RemoveOld),
    ];
    moves_with_ends("fjall", &ends).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r29_a_move_on_sled_survives_the_death_of_its_source_and_its_target() {
    let ends =
        [(Role::Source, End::Killed, MovePhase::Snapshot), (Role::Target, End::Killed, MovePhase::Snapshot)];
    moves_with_ends("sled", &ends).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_asked_to_end_during_a_move_ends_well_and_so_does_the_move() {
    let ends = [
        (Role::Driver, End::Asked, MovePhase::Snapshot),
        (Role::Source, End::Asked, MovePhase::Snapshot),
        (Role::Target, End::Asked, MovePhase::Snapshot),
        (Role::Driver, End::Asked, MovePhase::Joint),
        (Role::Source, End::Asked, MovePhase::Joint),
    ];
    moves_with_ends("fjall", &ends).await;
}
