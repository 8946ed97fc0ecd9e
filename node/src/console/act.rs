//! Orders from a page. Each is shown first, and done only as it was shown: a move by the revision of the predicate's record that the
//! preview was made from, a plan by its id, a drain by a hash of what it would have to do.

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::{Request, State, rejection::JsonRejection},
    http::header,
    middleware::Next,
    response::{IntoResponse, Response},
};
use pontoon_proto::v1;
use serde::Deserialize;
use serde_json::{Value, json};
use tonic::Status;

use super::{Answer, Refused};
use crate::{caller::Caller, gate, json, shared::Shared};

type Order<T> = Result<Json<T>, JsonRejection>;

/// Lets only the node's own pages order: a browser names the page that asks. A program is to use gRPC, as the commands do.
pub(super) async fn own_pages_only(request: Request, next: Next) -> Response {
    let site = request.headers().get("sec-fetch-site");
    let own = request.headers().contains_key(header::ORIGIN)
        && site.is_none_or(|site| site.as_bytes() == b"same-origin")
        && gate::own_page(&request).is_ok();
    match own {
        true => next.run(request).await,
        false => Refused(Status::permission_denied(
            "orders are taken from this node's own pages only; a program uses the commands or gRPC",
        ))
        .into_response(),
    }
}

fn read<T>(order: Order<T>) -> Result<T, Refused> {
    match order {
        Ok(Json(order)) => Ok(order),
        Err(rejected) => Err(Refused(Status::invalid_argument(rejected.body_text()))),
    }
}

fn look_first(what: &str) -> Refused {
    Refused(Status::invalid_argument(format!("{what} is done only as it was shown: ask with dry_run first")))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MoveStart {
    predicate: String,
    /// 0: none, or with a dry run and `to` the planner's choice.
    #[serde(default)]
    from: u64,
    #[serde(default)]
    to: u64,
    #[serde(default)]
    learner: bool,
    #[serde(default)]
    dry_run: bool,
    /// As the dry run has told it.
    #[serde(default)]
    revision: u64,
}

pub(super) async fn move_start(
    State(shared): State<Arc<Shared>>,
    Extension(caller): Extension<Caller>,
    order: Order<MoveStart>,
) -> Answer {
    let order = read(order)?;
    if !order.dry_run && order.revision == 0 {
        return Err(look_first("a move"));
    }
    let kind = match (order.from, order.to, order.learner) {
        (0, 0, _) => {
            return Err(Refused(Status::invalid_argument(
                "a move needs a node that gives or one that takes",
            )));
        }
        (1.., _, true) => {
            return Err(Refused(Status::invalid_argument(
                "a replica without a vote takes nobody's place: choose no node that gives",
            )));
        }
        (0, _, true) => v1::MoveKind::AddLearner,
        (0, _, false) => v1::MoveKind::Add,
        (_, 0, _) => v1::MoveKind::Remove,
        _ => v1::MoveKind::Replace,
    };
    let request = v1::MoveStartRequest {
        predicate: order.predicate,
        kind: kind.into(),
        from_node: order.from,
        to_node: order.to,
        dry_run: order.dry_run,
        hops: 0,
        reason: "asked for by an operator at the console".to_owned(),
        expect_revision: order.revision,
    };
    let reply = shared.ordered(&caller, request).await?;
    Ok(Json(json::move_start(order.dry_run, &reply)))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MoveCancel {
    id: u64,
}

pub(super) async fn move_cancel(
    State(shared): State<Arc<Shared>>,
    Extension(caller): Extension<Caller>,
    order: Order<MoveCancel>,
) -> Answer {
    let id = read(order)?.id;
    let reply = shared.ordered(&caller, v1::MoveCancelRequest { id, hops: 0 }).await?;
    let phase = json::phase_of(&reply.r#move.unwrap_or_default());
    Ok(Json(json!({ "id": id, "phase": phase, "cancel_requested": true })))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Drain {
    node: u64,
    /// Let it take replicas again.
    #[serde(default)]
    cancel: bool,
    #[serde(default)]
    dry_run: bool,
    /// As the dry run has told it.
    #[serde(default)]
    shown: String,
}

pub(super) async fn drain(
    State(shared): State<Arc<Shared>>,
    Extension(caller): Extension<Caller>,
    order: Order<Drain>,
) -> Answer {
    let order = read(order)?;
    let ask = |action: v1::DrainAction, seen| v1::DrainRequest {
        node: order.node,
        action: action.into(),
        hops: 0,
        seen,
    };
    let look = shared.at_meta_leader(ask(v1::DrainAction::Look, None)).await?;
    let shown = shown(&look, order.cancel);
    if order.dry_run {
        return Ok(Json(with(json::drain(&look), "shown", shown)));
    }
    if order.shown.is_empty() {
        return Err(look_first("a drain"));
    }
    if order.shown != shown {
        return Err(Refused(Status::failed_precondition(
            "what the node holds has changed since it was shown: look again",
        )));
    }
    let action = if order.cancel { v1::DrainAction::Cancel } else { v1::DrainAction::Start };
    // What changes from here on is noticed by the command itself, but for why something cannot leave. That follows from the rules
    // and the nodes, and the look is a moment old.
    let state = look.node.map(|node| node.state).unwrap_or_default();
    let seen = (!order.cancel).then_some(v1::SeenNode { state, replicas: look.replicas });
    Ok(Json(json::drain(&shared.ordered(&caller, ask(action, seen)).await?)))
}

/// Of what a drain was judged by: the node's state, how much it holds, and what cannot leave.
fn shown(reply: &v1::DrainReply, cancel: bool) -> String {
    let state = reply.node.as_ref().map(|node| node.state);
    let stuck: Vec<_> = reply.stuck.iter().map(|stuck| (stuck.group, &stuck.reason)).collect();
    // What leaves by itself while a drain is called off is no reason to ask again.
    let judged =
        if cancel { format!("{state:?}") } else { format!("{state:?} {} {stuck:?}", reply.replicas) };
    blake3::hash(judged.as_bytes()).to_hex()[..16].to_owned()
}

fn with(mut object: Value, name: &str, value: String) -> Value {
    object[name] = value.into();
    object
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Plan {}

pub(super) async fn rebalance_plan(State(shared): State<Arc<Shared>>, order: Order<Plan>) -> Answer {
    let Plan {} = read(order)?;
    let reply = shared.at_meta_leader(v1::RebalancePlanRequest::default()).await?;
    Ok(Json(with(json::plan(&reply.plan.unwrap_or_default()), "running", reply.running)))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Apply {
    plan: String,
}

pub(super) async fn rebalance_apply(
    State(shared): State<Arc<Shared>>,
    Extension(caller): Extension<Caller>,
    order: Order<Apply>,
) -> Answer {
    let id = read(order)?.plan;
    let reply = shared.ordered(&caller, v1::RebalanceApplyRequest { id, hops: 0 }).await?;
    Ok(Json(json::plan(&reply.plan.unwrap_or_default())))
}
