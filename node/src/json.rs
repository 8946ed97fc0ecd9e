//! What programs are told, as objects: by `--json` of the commands and by the console's `/api` alike.

use std::collections::BTreeMap;

use pontoon_proto::{ReplicaId, v1};
use serde_json::{Value, json};
use time::OffsetDateTime;

/// A move with what is seen of it now.
pub fn move_view(view: &v1::MoveView) -> Value {
    let moved = view.r#move.clone().unwrap_or_default();
    let entered: serde_json::Map<String, Value> = moved
        .entered_ms
        .iter()
        .filter_map(|(&phase, &at)| {
            let phase = v1::MovePhase::try_from(phase.cast_signed()).ok()?;
            Some((name_of(phase.as_str_name(), "MOVE_PHASE_"), json!(at)))
        })
        .collect();
    json!({
        "id": moved.id,
        "predicate": moved.predicate,
        "kind": name_of(moved.kind().as_str_name(), "MOVE_KIND_"),
        "from": node_of(moved.source),
        "to": node_of(moved.target),
        "phase": phase_of(&moved),
        "bytes_done": view.bytes_done,
        "bytes_total": view.bytes_total,
        "rate": view.rate,
        "lag": view.lag,
        "eta_ms": view.eta_ms,
        "blocker": blocker_of(&moved),
        "foreground_p99_ms": millis(view.foreground_p99_us),
        "foreground_before_ms": millis(view.foreground_before_us),
        "blocked": moved.blocked,
        "stuck": moved.stuck,
        "reason": moved.reason,
        "started_ms": moved.started_ms,
        "finished_ms": moved.finished_ms,
        "phase_ms": moved.phase_ms,
        "entered_ms": entered,
        "cancel_requested": moved.cancel_requested,
    })
}

/// What a move is in, in words.
pub fn phase_of(moved: &v1::Move) -> String {
    name_of(moved.phase().as_str_name(), "MOVE_PHASE_")
}

/// What holds a move up, for programs; empty while it goes on.
pub fn blocker_of(moved: &v1::Move) -> String {
    match moved.blocker() {
        v1::MoveBlocker::None => String::new(),
        blocker => name_of(blocker.as_str_name(), "MOVE_BLOCKER_"),
    }
}

/// A time since the epoch as people read it, in UTC.
pub fn moment(ms: u64) -> String {
    let at = OffsetDateTime::from_unix_timestamp((ms / 1_000) as i64).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    let (year, month, day) = (at.year(), u8::from(at.month()), at.day());
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}Z", at.hour(), at.minute(), at.second())
}

/// Microseconds as milliseconds; 0 is not known.
pub fn millis(micros: u64) -> Option<f64> {
    (micros > 0).then(|| micros as f64 / 1_000.0)
}

/// A move that has begun, or with `dry_run` what it would do.
pub fn move_start(dry_run: bool, reply: &v1::MoveStartReply) -> Value {
    let moved = reply.r#move.clone().unwrap_or_default();
    let check = |check: &v1::MoveCheck| json!({ "ok": check.ok, "text": check.text });
    json!({
        "dry_run": dry_run,
        "id": moved.id,
        "predicate": moved.predicate,
        "kind": name_of(moved.kind().as_str_name(), "MOVE_KIND_"),
        "from": reply.from_node,
        "to": reply.to_node,
        "bytes": reply.bytes,
        "before": reply.before,
        "after": reply.after,
        "checks": reply.checks.iter().map(check).collect::<Vec<_>>(),
        "estimate_ms": reply.estimate_ms,
        "steps": reply.steps.iter().map(move_step).collect::<Vec<_>>(),
        "revision": reply.revision,
    })
}

fn move_step(step: &v1::MoveStep) -> Value {
    json!({
        "name": step.name,
        "voters": step.voters,
        "outgoing": step.outgoing,
        "learners": step.learners,
        "quorum": step.quorum,
        "may_fail": step.may_fail,
        "text": step.text,
    })
}

/// The node of a replica, 0 if there is none.
pub fn node_of(replica: u64) -> u64 {
    ReplicaId::new(replica).map_or(0, |id| id.node().get())
}

/// A replica as people name it: node, then its place in the group's history.
pub fn place(replica: u64) -> String {
    match ReplicaId::new(replica) {
        Ok(id) => format!("n{}.{}", id.node().get(), id.ordinal()),
        Err(_) => "-".to_owned(),
    }
}

/// What a replica tells of itself. `receives`: bytes that are there and that there are, while it takes in a state.
pub fn replica(info: &v1::ReplicaInfo) -> Value {
    json!({
        "replica": place(info.replica),
        "node": node_of(info.replica),
        "role": info.role,
        "term": info.term,
        "first_index": info.first_index,
        "last_index": info.last_index,
        "commit": info.commit,
        "applied": info.applied,
        "durable": info.durable,
        "bytes": info.bytes,
        "dead": info.dead,
        "receives": info.pull.map(|pull| json!([pull.bytes_done, pull.bytes_total])),
    })
}

/// The nodes of replicas.
pub fn node_ids(replicas: &[u64]) -> Vec<u64> {
    replicas.iter().map(|&replica| node_of(replica)).collect()
}

/// The name of a value of an enum of the schema, as people write it.
pub fn name_of(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_lowercase().replace('_', "-")
}

/// What a predicate is: map, log, or the number of an embedder's own kind.
pub fn kind_of(shard: &v1::Shard) -> String {
    match v1::ShardKind::try_from(shard.kind) {
        Ok(kind) => name_of(kind.as_str_name(), "SHARD_KIND_"),
        Err(_) => shard.kind.to_string(),
    }
}

/// A cluster's id as people write it.
pub fn cluster_name(cluster: &[u8]) -> String {
    uuid::Uuid::from_slice(cluster).map(|id| id.to_string()).unwrap_or_default()
}

/// A node with what it reports of itself.
pub fn node(view: &v1::NodeView) -> Value {
    let node = view.node.clone().unwrap_or_default();
    json!({
        "node": node.id,
        "address": node.address,
        "state": name_of(node.state().as_str_name(), "NODE_STATE_"),
        "reachable": view.reachable,
        "engine": node.engine,
        "labels": node.labels,
        "replicas": view.replicas,
        "leaders": view.leaders,
        "wal_bytes": view.wal_bytes,
        "engine_bytes": view.engine_bytes,
        "disk_free_bytes": view.disk_free_bytes,
        "disk_total_bytes": view.disk_total_bytes,
        "room": name_of(view.room().as_str_name(), "NODE_ROOM_"),
        "audit_problem": view.audit_problem,
        "certificate_expires": view.certificate_expires,
        "turned_away": view.turned_away,
        "version": view.version,
        "oldest_version": view.oldest_version.max(1),
        "newest_version": view.newest_version.max(1),
        "capacity_bytes": node.capacity_bytes,
        "writes_per_s": view.writes_per_s,
        "reads_per_s": view.reads_per_s,
        "write_p99_ms": millis(view.write_p99_us),
    })
}

/// How far a node is emptied.
pub fn drain(reply: &v1::DrainReply) -> Value {
    let node = reply.node.clone().unwrap_or_default();
    let stuck = reply
        .stuck
        .iter()
        .map(|stuck| json!({ "predicate": stuck.predicate, "group": stuck.group, "reason": stuck.reason }));
    json!({
        "node": node.id,
        "state": name_of(node.state().as_str_name(), "NODE_STATE_"),
        "replicas": reply.replicas,
        "leaders": reply.leaders,
        "moving": reply.moving,
        "stuck": stuck.collect::<Vec<_>>(),
    })
}

/// A plan of moves.
pub fn plan(plan: &v1::Plan) -> Value {
    let moves = plan.moves.iter().map(|mv| {
        json!({
            "predicate": mv.predicate,
            "group": mv.group,
            "from": node_of(mv.source),
            "to": mv.target_node,
            "bytes": mv.bytes,
            "reason": mv.reason,
        })
    });
    let transfers = plan.transfers.iter().map(|transfer| {
        json!({ "predicate": transfer.predicate, "from": transfer.from_node, "to": transfer.to_node })
    });
    let nodes = plan.nodes.iter().map(|node| {
        json!({
            "node": node.node,
            "capacity_bytes": node.capacity_bytes,
            "used_before": node.used_before,
            "used_after": node.used_after,
            "writes_before": node.writes_before,
            "writes_after": node.writes_after,
            "leads_before": node.leads_before,
            "leads_after": node.leads_after,
        })
    });
    json!({
        "plan": plan.id,
        "spread_before": f64::from(plan.spread_before) / 1_000.0,
        "spread_after": f64::from(plan.spread_after) / 1_000.0,
        "load_spread_before": f64::from(plan.load_spread_before) / 1_000.0,
        "load_spread_after": f64::from(plan.load_spread_after) / 1_000.0,
        "bytes": plan.bytes,
        "bound_bytes": plan.bound_bytes,
        "moves": moves.collect::<Vec<_>>(),
        "transfers": transfers.collect::<Vec<_>>(),
        "nodes": nodes.collect::<Vec<_>>(),
    })
}

/// Why replicas are on nodes, and why not.
pub fn explanation(reply: &v1::ExplainReply) -> Value {
    let nodes = reply.nodes.iter().map(|node| {
        let verdicts = node.verdicts.iter().map(|verdict| {
            json!({ "ok": verdict.ok, "hard": verdict.hard, "text": verdict.text, "fix": verdict.fix })
        });
        json!({ "node": node.node, "standing": node.standing, "verdicts": verdicts.collect::<Vec<_>>() })
    });
    let shard = reply.shard.clone().unwrap_or_default();
    json!({ "predicate": shard.predicate, "group": shard.group, "nodes": nodes.collect::<Vec<_>>() })
}

/// Something that happened.
pub fn event(event: &v1::Event) -> Value {
    json!({ "seq": event.seq, "time_ms": event.time_ms, "text": event.text })
}

/// So many groups are named for each kind of problem.
const NAMED: usize = 10;

/// What is wrong at nodes and in groups: a code, where, and what to do about it.
pub fn problems(nodes: &[v1::NodeView], groups: &[v1::GroupView]) -> Vec<Value> {
    let mut found: Vec<Value> = nodes.iter().flat_map(of_node).collect();
    let mut kinds: BTreeMap<&str, Vec<(&v1::GroupView, &str)>> = BTreeMap::new();
    for group in groups {
        for problem in &group.problems {
            let (code, text) = problem.split_once(": ").unwrap_or(("unknown", problem));
            kinds.entry(code).or_default().push((group, text));
        }
    }
    for (code, of_kind) in kinds {
        found.extend(of_kind.iter().take(NAMED).map(|(group, text)| {
            let place = format!("{} (group {})", group.predicate, group.group);
            json!({ "code": code, "where": place, "group": group.group, "predicate": group.predicate, "text": text })
        }));
        if let Some(more) = of_kind.len().checked_sub(NAMED).filter(|more| *more > 0) {
            let (place, text) = (format!("{more} more groups"), "`pontoon groups --problem` lists them");
            found.push(json!({ "code": code, "where": place, "groups": more, "text": text }));
        }
    }
    found
}

fn of_node(view: &v1::NodeView) -> Vec<Value> {
    let id = view.node.as_ref().map_or(0, |node| node.id);
    let place = format!("n{id}");
    if !view.reachable {
        let text = format!(
            "it does not answer: start it, or if it is lost for good run `pontoon decommission n{id}`"
        );
        return vec![json!({ "code": "silent", "where": place, "node": id, "text": text })];
    }
    let problem = |problem: &v1::NodeProblem| {
        json!({
            "code": problem.code,
            "where": place,
            "node": id,
            "text": problem.text,
            "since_ms": problem.since_ms,
        })
    };
    view.problems.iter().map(problem).collect()
}
