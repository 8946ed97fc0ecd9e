//! What a kill costs a move: from the time at which somebody could go on to the move's next step.

use std::time::Duration;

use pontoon_node::client::Client;
use pontoon_proto::v1;
use tokio::time::{Instant, sleep};

use super::stage::{PATIENCE, Stage};
use crate::cli::Failure;

/// A small move passes a phase in a few milliseconds.
const LOOK_EVERY: Duration = Duration::from_millis(3);
/// How long a killed node stays away.
const OUTAGE: Duration = Duration::from_millis(300);
/// Moves that are over before the kill comes are tried again.
const ATTEMPTS: u32 = 5;

/// A move as it is seen: how often its record has changed, how much of its state is staged.
type Seen = (v1::MovePhase, u64, u64);

async fn look(client: &Client, id: u64) -> Result<Seen, Failure> {
    let moves = client.move_list(v1::MoveListRequest { all: true, hops: 0 }).await?.moves;
    let found = moves.into_iter().find(|view| view.r#move.as_ref().is_some_and(|mv| mv.id == id));
    let view = found.ok_or_else(|| Failure::error(format!("move {id} is not listed any more")))?;
    let mv = view.r#move.unwrap_or_default();
    Ok((mv.phase(), mv.phase_seq, view.bytes_done))
}

async fn look_until(client: &Client, id: u64, wanted: impl Fn(&Seen) -> bool) -> Result<Seen, Failure> {
    let until = Instant::now() + PATIENCE;
    while Instant::now() < until {
        let seen = look(client, id).await?;
        if wanted(&seen) || seen.0 >= v1::MovePhase::Done {
            return Ok(seen);
        }
        sleep(LOOK_EVERY).await;
    }
    Err(Failure::error(format!("move {id} does not come on after a kill")))
}

/// Kills the target while it receives, and gives the seconds from its serving again to the move's next step: another chunk or
/// another phase.
pub(super) async fn of_target(
    stage: &mut Stage,
    predicate: &str,
    bytes: u64,
    budget: &str,
) -> Result<f64, Failure> {
    // Slow enough that the kill finds it receiving: a second's worth comes at once, the rest takes a second and more.
    stage.set_budget(&(bytes / 3).max(1).to_string()).await?;
    let place = stage.place(predicate).await?;
    let id = stage.start_move(predicate, place.follower(), place.free).await?.id;
    look_until(&stage.client, id, |(phase, _, done)| *done > 0 || *phase > v1::MovePhase::Snapshot).await?;
    stage.cluster.kill(place.free)?;
    sleep(OUTAGE).await;
    let before = look(&stage.client, id).await?;
    stage.cluster.restart(place.free).await?;
    let up = Instant::now();
    look_until(&stage.client, id, |(_, seq, done)| *seq > before.1 || *done > before.2).await?;
    let seconds = up.elapsed().as_secs_f64();
    stage.set_budget(budget).await?;
    stage.end_of(id).await?;
    Ok(seconds)
}

/// Kills the leader of the meta group, which drives, and gives the seconds from there being another one to the move's next
/// phase.
pub(super) async fn of_driver(stage: &mut Stage, predicates: &[String]) -> Result<f64, Failure> {
    for _ in 0..ATTEMPTS {
        let driver = stage.client.status(v1::StatusRequest {}).await?.meta_leader;
        let mut places = Vec::new();
        for predicate in predicates {
            places.push((predicate, stage.place(predicate).await?));
        }
        // The driver's node takes no part in the move, as far as that can be.
        let apart = |place: &super::stage::Place| place.free != driver && place.leader != driver;
        let Some((predicate, place)) = places.iter().find(|(_, place)| apart(place)).or(places.first())
        else {
            return Err(Failure::error("there is no predicate to be moved"));
        };
        let from = place.voters.iter().copied().find(|node| *node != driver && *node != place.leader);
        let id = stage.start_move(predicate, from.unwrap_or(place.leader), place.free).await?.id;
        stage.cluster.kill(driver)?;
        let survivors = (1..=stage.cluster.len() as u64)
            .filter(|node| *node != driver)
            .map(|node| stage.cluster.address(node));
        let client = Client::connect(survivors).await?;
        let until = Instant::now() + PATIENCE;
        while matches!(client.status(v1::StatusRequest {}).await?.meta_leader, leader if leader == 0 || leader == driver)
        {
            if Instant::now() >= until {
                return Err(Failure::error("the meta group gets no other leader"));
            }
            sleep(LOOK_EVERY).await;
        }
        let led = Instant::now();
        let before = look(&client, id).await?;
        let after = look_until(&client, id, |(_, seq, _)| *seq > before.1).await?;
        let seconds = led.elapsed().as_secs_f64();
        stage.cluster.restart(driver).await?;
        stage.cluster.await_nodes(&stage.client, stage.cluster.len()).await?;
        stage.end_of(id).await?;
        if before.0 < v1::MovePhase::Done && after.1 > before.1 {
            return Ok(seconds);
        }
    }
    Err(Failure::error("moves are over before the leader of the meta group is killed: move something larger"))
}
