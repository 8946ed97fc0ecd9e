//! What goes on, about once a second: looked at once for all who listen, and sent part by part when it changes.

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Extension,
    extract::State,
    http::{StatusCode, header},
    response::{
        IntoResponse, Response, Sse,
        sse::{self, KeepAlive},
    },
};
use pontoon_proto::v1;
use serde_json::{Value, json};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;

use crate::{
    caller::Caller,
    clock::unix_ms,
    json::{self, cluster_name},
    limits::{LIVE_LASTS, LIVE_MOST},
    roles::Role,
    shared::Shared,
    views::is_ended,
};

/// Between two looks.
const EVERY: Duration = Duration::from_secs(1);
/// The meta group may be without a leader; the rest is shown nonetheless.
const META_PATIENCE: Duration = Duration::from_millis(1_500);
/// Moves that have ended, and events, that are always at hand.
const ENDED_SHOWN: usize = 20;
const EVENTS_SHOWN: u32 = 50;
/// When a page is to ask again after its stream has ended, in milliseconds.
const AGAIN: Duration = Duration::from_millis(250);

/// One look, by parts.
#[derive(Debug)]
pub(super) struct Frame {
    parts: Vec<(&'static str, Arc<Value>)>,
}

impl Frame {
    pub(super) fn parts(&self) -> impl Iterator<Item = (&'static str, &Value)> {
        self.parts.iter().map(|(name, part)| (*name, &**part))
    }
}

/// What is remembered from look to look.
#[derive(Debug, Default)]
pub(super) struct Gaze {
    last: Option<(Instant, Arc<Frame>)>,
    /// What moves had received.
    received: HashMap<u64, (Instant, u64, u64)>,
    /// Kept while nobody leads the meta group.
    ended: Arc<Value>,
    events: Arc<Value>,
}

/// Who looks, and what they may do.
pub(super) fn you(caller: &Caller) -> Value {
    let acts = caller.role().is_none_or(|role| role == Role::Operator);
    json!({ "name": caller.to_string(), "acts": acts })
}

pub(super) async fn live(
    State(shared): State<Arc<Shared>>,
    Extension(caller): Extension<Caller>,
) -> Response {
    let Ok(place) = shared.console.places.clone().try_acquire_owned() else {
        let text = format!("{LIVE_MOST} pages listen already: this one asks now and then");
        let body = axum::Json(json!({ "error": text }));
        return (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "5")], body).into_response();
    };
    let (sender, receiver) = mpsc::channel::<Result<sse::Event, Infallible>>(8);
    tokio::spawn(async move {
        let mut stop = shared.stop.subscribe();
        tokio::select! {
            () = tell(&shared, &sender, you(&caller)) => {}
            () = sender.closed() => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
        drop(place);
        if shared.console.places.available_permits() == LIVE_MOST {
            shared.forget_sight().await;
        }
    });
    Sse::new(ReceiverStream::new(receiver)).keep_alive(KeepAlive::default()).into_response()
}

async fn tell(shared: &Arc<Shared>, sender: &mpsc::Sender<Result<sse::Event, Infallible>>, you: Value) {
    let event = |name: &str, part: &Value| sse::Event::default().event(name).data(part.to_string());
    if !shared.hand_over(sender, Ok(event("you", &you).retry(AGAIN))).await {
        return;
    }
    let begun = Instant::now();
    let mut sent: HashMap<&'static str, Arc<Value>> = HashMap::new();
    while begun.elapsed() < LIVE_LASTS {
        let frame = shared.frame().await;
        for (name, part) in &frame.parts {
            if sent.get(name) != Some(part) {
                if !shared.hand_over(sender, Ok(event(name, part))).await {
                    return;
                }
                sent.insert(name, part.clone());
            }
        }
        sleep(EVERY).await;
    }
}

impl Shared {
    /// What goes on, as it was seen within a second.
    pub(super) async fn frame(self: &Arc<Self>) -> Arc<Frame> {
        let mut gaze = self.console.gaze.lock().await;
        if let Some((at, frame)) = &gaze.last
            && at.elapsed() < EVERY * 9 / 10
        {
            return frame.clone();
        }
        let frame = Arc::new(self.gaze(&mut gaze).await);
        gaze.last = Some((Instant::now(), frame.clone()));
        frame
    }

    async fn gaze(self: &Arc<Self>, gaze: &mut Gaze) -> Frame {
        let list = timeout(META_PATIENCE, self.at_meta_leader(v1::MoveListRequest { all: true, hops: 0 }));
        let events = v1::EventsRequest { limit: EVENTS_SHOWN, ..Default::default() };
        let events = timeout(META_PATIENCE, self.at_meta_leader(events));
        let (status, sight, list, events) = tokio::join!(self.status(), self.sight(), list, events);
        let meta_answers = matches!((&list, &events), (Ok(Ok(_)), Ok(Ok(_))));
        let running = match list {
            Ok(Ok(list)) => {
                let (ended, running): (Vec<_>, Vec<_>) =
                    list.moves.into_iter().partition(|view| view.r#move.as_ref().is_none_or(is_ended));
                let latest = ended.iter().rev().take(ENDED_SHOWN).map(json::move_view);
                gaze.ended = Arc::new(latest.collect());
                running
            }
            _ => {
                let moves = self.map.view().map().moves.clone();
                moves.into_iter().map(|mv| v1::MoveView { r#move: Some(mv), ..Default::default() }).collect()
            }
        };
        if let Ok(Ok(events)) = events {
            gaze.events = Arc::new(events.events.iter().rev().map(json::event).collect());
        }
        let running = gaze.with_rates(running);
        let groups: Vec<v1::GroupView> = match &sight {
            Ok(sight) => {
                let bad = sight.groups.iter().filter(|seen| !seen.view.problems.is_empty());
                bad.map(|seen| seen.view.clone()).collect()
            }
            Err(_) => Vec::new(),
        };
        let problems = json::problems(&status.nodes, &groups);
        let sum = |of: fn(&v1::NodeView) -> u64| status.nodes.iter().map(of).sum::<u64>();
        let overview = json!({
            "time_ms": unix_ms(),
            "cluster": cluster_name(&status.cluster),
            "node": status.node,
            "address": status.address,
            "version": status.version,
            "engine": status.engine,
            "meta_leader": status.meta_leader,
            "meta_answers": meta_answers,
            "predicates": status.predicates,
            "under_replicated": status.under_replicated,
            "moves_running": running.len(),
            "problems": problems.len(),
            "nodes": status.nodes.len(),
            "nodes_answering": status.nodes.iter().filter(|view| view.reachable).count(),
            "writes_per_s": sum(|view| view.writes_per_s),
            "reads_per_s": sum(|view| view.reads_per_s),
            "write_p99_ms": json::millis(status.nodes.iter().map(|view| view.write_p99_us).max().unwrap_or(0)),
            "bytes": sum(|view| view.engine_bytes),
            "uptime_ms": status.uptime_ms,
        });
        let nodes: Value = status.nodes.iter().map(node).collect();
        let running: Value = running.iter().map(json::move_view).collect();
        Frame {
            parts: vec![
                ("overview", Arc::new(overview)),
                ("nodes", Arc::new(nodes)),
                ("problems", Arc::new(problems.into())),
                ("moves", Arc::new(running)),
                ("ended", gaze.ended.clone()),
                ("events", gaze.events.clone()),
            ],
        }
    }
}

/// A node with its problems.
fn node(view: &v1::NodeView) -> Value {
    let mut node = json::node(view);
    node["problems"] =
        view.problems.iter().map(|problem| json!({ "code": problem.code, "text": problem.text })).collect();
    node
}

impl Gaze {
    /// Adds how fast each move receives, and until when.
    fn with_rates(&mut self, mut views: Vec<v1::MoveView>) -> Vec<v1::MoveView> {
        let now = Instant::now();
        let mut received = HashMap::new();
        for view in &mut views {
            let id = view.r#move.as_ref().map_or(0, |mv| mv.id);
            let before = self.received.get(&id).copied();
            if let Some((at, bytes, rate)) = before {
                let millis = now.duration_since(at).as_millis().max(1) as u64;
                let grown = view.bytes_done.saturating_sub(bytes) * 1_000 / millis;
                view.rate = if rate == 0 { grown } else { (rate + grown) / 2 };
                let left = view.bytes_total.saturating_sub(view.bytes_done);
                view.eta_ms = (left * 1_000).checked_div(view.rate).unwrap_or(0);
            }
            received.insert(id, (now, view.bytes_done, view.rate));
        }
        self.received = received;
        views
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_move_that_receives_has_a_rate_and_one_that_is_gone_is_forgotten() {
        let mut gaze = Gaze::default();
        let view = |bytes_done| v1::MoveView {
            r#move: Some(v1::Move { id: 7, ..Default::default() }),
            bytes_done,
            bytes_total: 4_000_000,
            ..Default::default()
        };
        assert_eq!(gaze.with_rates(vec![view(0)])[0].rate, 0);
        let earlier =
            Instant::now().checked_sub(Duration::from_secs(2)).expect("the machine runs for longer");
        gaze.received.insert(7, (earlier, 0, 0));
        let seen = gaze.with_rates(vec![view(2_000_000)]);
        assert!(seen[0].rate > 0 && seen[0].rate <= 1_000_000, "{}", seen[0].rate);
        assert!(seen[0].eta_ms >= 2_000, "{}", seen[0].eta_ms);
        gaze.with_rates(Vec::new());
        assert!(gaze.received.is_empty());
    }
}
