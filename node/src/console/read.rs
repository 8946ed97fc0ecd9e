//! What pages ask for by themselves. Bounded: a page of the matrix, however many predicates there are.

use std::{cmp::Reverse, collections::BTreeMap, sync::Arc};

use axum::{Extension, Json, extract::State, http::Uri};
use percent_encoding::percent_decode_str;
use pontoon_proto::{GroupId, v1};
use serde_json::{Value, json};
use tonic::Status;

use super::{
    Answer,
    live::you,
    sight::{Seen, Sight},
};
use crate::{
    caller::Caller,
    json::{self, kind_of, name_of, node_ids, node_of},
    shared::Shared,
    views::no_such_predicate,
};

const ROWS_DEFAULT: usize = 100;
const ROWS_MOST: usize = 1_000;
const EVENTS_MOST: u32 = 1_000;
/// Rows of the heat map: the busiest predicates of the whole time.
const HEAT_ROWS: usize = 40;

/// What follows the question mark.
struct Query(BTreeMap<String, String>);

impl Query {
    fn of(uri: &Uri) -> Query {
        let pairs = uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
        Query(pairs.map(|(name, value)| (name.to_owned(), decoded(value))).collect())
    }

    fn text(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    /// # Errors
    /// `INVALID_ARGUMENT` if it is there and no number.
    fn number(&self, name: &str) -> Result<Option<u64>, Status> {
        match self.text(name) {
            "" => Ok(None),
            text => text
                .parse()
                .map(Some)
                .map_err(|_| Status::invalid_argument(format!("{name}={text} is no number"))),
        }
    }
}

/// `%20` and `+` as what they stand for; what stands for nothing stays as it is.
fn decoded(value: &str) -> String {
    percent_decode_str(&value.replace('+', " ")).decode_utf8_lossy().into_owned()
}

/// All parts of what goes on, for whoever has no stream.
pub(super) async fn now(
    State(shared): State<Arc<Shared>>,
    Extension(caller): Extension<Caller>,
) -> Json<Value> {
    let frame = shared.frame().await;
    let parts = frame.parts().map(|(name, part)| (name.to_owned(), part.clone()));
    Json(Value::Object(parts.chain([("you".to_owned(), you(&caller))]).collect()))
}

/// A page of the matrix: predicates that fit, in the wanted order, with their replicas.
pub(super) async fn matrix(State(shared): State<Arc<Shared>>, uri: Uri) -> Answer {
    let query = Query::of(&uri);
    let sight = shared.sight().await?;
    let offset = query.number("offset")?.unwrap_or(0) as usize;
    let limit = query.number("limit")?.map_or(ROWS_DEFAULT, |limit| (limit as usize).min(ROWS_MOST));
    let chosen = choose(&sight, &query)?;
    let view = shared.map.view();
    let mut nodes: Vec<u64> = view.present().map(|node| node.id).collect();
    nodes.sort_unstable();
    let rows: Vec<Value> = chosen.iter().skip(offset).take(limit).map(|seen| row(seen)).collect();
    Ok(Json(json!({
        "nodes": nodes,
        "unreachable": sight.unreachable,
        "all": sight.groups.len(),
        "total": chosen.len(),
        "offset": offset,
        "rows": rows,
    })))
}

fn choose<'a>(sight: &'a Sight, query: &Query) -> Result<Vec<&'a Seen>, Status> {
    let (name, problem) = (query.text("name").to_lowercase(), query.text("problem") == "1");
    let node = query.number("node")?;
    let fits = |seen: &&Seen| {
        (name.is_empty() || seen.view.predicate.to_lowercase().contains(&name))
            && (!problem || !seen.view.problems.is_empty())
            && node
                .is_none_or(|node| seen.view.replicas.iter().any(|replica| node_of(replica.replica) == node))
    };
    let mut chosen: Vec<&Seen> = sight.groups.iter().filter(fits).collect();
    match query.text("sort") {
        "" | "name" => chosen.sort_by(|a, b| a.view.predicate.cmp(&b.view.predicate)),
        "size" => chosen.sort_by_key(|seen| Reverse(seen.bytes)),
        "lag" => chosen.sort_by_key(|seen| Reverse(seen.lag)),
        "load" => chosen.sort_by_key(|seen| Reverse(seen.writes_per_s + seen.reads_per_s)),
        "problems" => chosen.sort_by_key(|seen| Reverse(seen.view.problems.len())),
        other => {
            let text = format!("sort={other} is none of name, size, lag, load, problems");
            return Err(Status::invalid_argument(text));
        }
    }
    if query.text("desc") == "1" {
        chosen.reverse();
    }
    Ok(chosen)
}

fn row(seen: &Seen) -> Value {
    let replicas = seen.view.replicas.iter();
    let cells: Vec<Value> = replicas
        .map(|replica| json!([node_of(replica.replica), replica.role, replica.bytes, seen.lag_of(replica)]))
        .collect();
    let shard = seen.view.shard.as_ref();
    json!({
        "predicate": seen.view.predicate,
        "group": seen.view.group,
        "kind": shard.map(kind_of),
        "bytes": seen.bytes,
        "lag": seen.lag,
        "writes_per_s": seen.writes_per_s,
        "reads_per_s": seen.reads_per_s,
        "problems": seen.view.problems,
        "move": seen.moved_by,
        "members": shard.map(|shard| node_ids(&[&shard.voters[..], &shard.learners[..]].concat())),
        "cells": cells,
    })
}

/// One predicate in depth: its replicas, and of each node why it holds one, or could, or cannot.
pub(super) async fn predicate(State(shared): State<Arc<Shared>>, uri: Uri) -> Answer {
    let query = Query::of(&uri);
    let name = query.text("name");
    let view = shared.map.view();
    let meta = view.shard(GroupId::META).filter(|shard| shard.predicate == name);
    let shard = view.predicate(name).or(meta).ok_or_else(|| no_such_predicate(name))?.clone();
    let explain = v1::ExplainRequest { predicate: name.to_owned(), ..Default::default() };
    let groups = v1::GroupsRequest { group: shard.group, ..Default::default() };
    let (groups, explanation, sight) =
        tokio::join!(shared.groups(groups), shared.at_meta_leader(explain), shared.sight());
    let groups = groups?;
    let group = groups.groups.into_iter().next().unwrap_or_default();
    let load = sight.ok().and_then(|sight| {
        let seen = sight.groups.iter().find(|seen| seen.view.group == shard.group)?;
        Some((seen.writes_per_s, seen.reads_per_s))
    });
    let explanation = explanation
        .map_or_else(|status| json!({ "error": status.message() }), |reply| json::explanation(&reply));
    let replicas: Vec<Value> = group.replicas.iter().map(json::replica).collect();
    Ok(Json(json!({
        "predicate": shard.predicate,
        "group": shard.group,
        "kind": kind_of(&shard),
        "state": name_of(shard.state().as_str_name(), "SHARD_STATE_"),
        "epoch": shard.epoch,
        "created_ms": shard.created_ms,
        "wanted": view.wanted(&shard),
        "leader": group.leader_node,
        "voters": node_ids(&shard.voters),
        "learners": node_ids(&shard.learners),
        "writes_per_s": load.map(|load| load.0),
        "reads_per_s": load.map(|load| load.1),
        "replicas": replicas,
        "problems": group.problems,
        "unreachable": groups.unreachable,
        "explanation": explanation,
    })))
}

/// What was asked of the busiest predicates, by columns of time. `column` is wanted in seconds.
pub(super) async fn heat(State(shared): State<Arc<Shared>>, uri: Uri) -> Answer {
    let query = Query::of(&uri);
    let width_s = query.number("column")?.unwrap_or(10).min(u32::MAX.into()) as u32;
    let reply = shared.heat(v1::HeatRequest { width_s, ..Default::default() }).await?;
    let mut sums: BTreeMap<u64, u64> = BTreeMap::new();
    for cell in reply.columns.iter().flat_map(|column| &column.cells) {
        *sums.entry(cell.group).or_default() += cell.writes + cell.reads;
    }
    let mut groups: Vec<(u64, u64)> = sums.into_iter().collect();
    groups.sort_by_key(|(group, sum)| (Reverse(*sum), *group));
    groups.truncate(HEAT_ROWS);
    let places: BTreeMap<u64, usize> =
        groups.iter().enumerate().map(|(at, (group, _))| (*group, at)).collect();
    let view = shared.map.view();
    let rows: Vec<Value> = groups
        .iter()
        .map(|&(group, _)| {
            let shard = view.shard(GroupId(group));
            json!({ "group": group, "predicate": shard.map(|shard| shard.predicate.clone()) })
        })
        .collect();
    let columns: Vec<Value> = reply
        .columns
        .iter()
        .map(|column| {
            let (mut cells, mut rest, mut all) = (Vec::new(), [0; 3], [0; 3]);
            for cell in column.cells.iter().chain(&column.rest) {
                let counted = [cell.writes, cell.reads, cell.bytes];
                let add = |sum: &mut [u64; 3]| (0..3).for_each(|at| sum[at] += counted[at]);
                add(&mut all);
                match places.get(&cell.group) {
                    Some(at) => cells.push(json!([at, cell.writes, cell.reads, cell.bytes])),
                    None => add(&mut rest),
                }
            }
            json!({ "from_s": column.from_s, "cells": cells, "rest": rest, "all": all })
        })
        .collect();
    Ok(Json(json!({
        "column_s": reply.width_s,
        "rows": rows,
        "columns": columns,
        "silent": reply.silent,
    })))
}

/// What happened, the latest last.
pub(super) async fn events(State(shared): State<Arc<Shared>>, uri: Uri) -> Answer {
    let query = Query::of(&uri);
    let limit = query.number("limit")?.unwrap_or(200).min(EVENTS_MOST.into()) as u32;
    let request = v1::EventsRequest { after: query.number("after")?.unwrap_or(0), limit, hops: 0 };
    let reply = shared.at_meta_leader(request).await?;
    Ok(Json(json!({ "events": reply.events.iter().map(json::event).collect::<Vec<_>>() })))
}

/// All moves that the cluster remembers, the latest first.
pub(super) async fn moves(State(shared): State<Arc<Shared>>) -> Answer {
    let list = shared.at_meta_leader(v1::MoveListRequest { all: true, hops: 0 }).await?;
    Ok(Json(json!({ "moves": list.moves.iter().rev().map(json::move_view).collect::<Vec<_>>() })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_as_they_were_sent() {
        let query = Query::of(&"/x?name=a%20b%2Fc+d&n=7&bad=%zz&%".parse().expect("a path"));
        assert_eq!((query.text("name"), query.text("bad"), query.text("none")), ("a b/c d", "%zz", ""));
        assert_eq!(query.number("n").expect("a number"), Some(7));
        assert!(query.number("bad").is_err());
        assert_eq!(decoded("%f0%9f%8c%89"), "\u{1f309}");
    }
}
