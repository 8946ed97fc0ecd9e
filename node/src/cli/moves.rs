//! `pontoon move start|list|watch|cancel`.

use std::time::Duration;

use clap::Subcommand;
use pontoon_node::{
    client::{Client, ClientError},
    json::{self, place},
};
use pontoon_proto::{NodeId, v1};
use pontoon_shard::mover::needs_hand;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout_at};

use super::{
    Context, Done, Failure,
    cluster::duration,
    node_id,
    output::{bytes, print_line, table},
};

/// Between two attempts to follow a move whose node has gone away.
const PAUSE: Duration = Duration::from_millis(200);

/// How often a move in the same phase says how far it is.
const SAY_EVERY: Duration = Duration::from_secs(1);

/// How long the first word about a move may take.
const FIRST_WORD: Duration = Duration::from_secs(5);

#[derive(Debug, Subcommand)]
pub(super) enum MoveCommand {
    /// Start a move: replace the replica on --from by one on --to. With --to alone one is added.
    Start {
        /// The predicate.
        predicate: String,
        /// The node that gives its replica up.
        #[arg(long, value_name = "NODE", value_parser = node_id)]
        from: Option<NodeId>,
        /// The node that takes it.
        #[arg(long, value_name = "NODE", value_parser = node_id)]
        to: Option<NodeId>,
        /// With --to alone: the new replica follows without a vote, for good. It answers reads with --max-lag and --local.
        #[arg(long, requires = "to", conflicts_with = "from")]
        learner: bool,
        /// With --from alone: nothing takes the replica's place.
        #[arg(long, requires = "from", conflicts_with = "to")]
        remove: bool,
        /// Only say what would be done.
        #[arg(long)]
        dry_run: bool,
        /// Follow the move until it has ended.
        #[arg(long, conflicts_with = "dry_run")]
        wait: bool,
    },
    /// The moves that go on.
    List {
        /// Also those that have ended.
        #[arg(long)]
        all: bool,
    },
    /// Follow a move until it has ended.
    Watch {
        /// The number, as `pontoon move list` shows it.
        id: u64,
        /// Give up after so many seconds: exit code 4 if the move goes on, 3 if it waits for somebody's hand.
        #[arg(long, value_name = "SECONDS")]
        for_seconds: Option<u64>,
    },
    /// Ask a move to go back. Possible until its joint configuration is committed.
    Cancel {
        /// The number, as `pontoon move list` shows it.
        id: u64,
    },
}

pub(super) async fn run(context: &Context, command: MoveCommand) -> Result<Done, Failure> {
    let client = context.client().await?;
    match command {
        MoveCommand::Start { predicate, from, to, learner, remove, dry_run, wait } => {
            let kind = match (from, to) {
                (Some(_), Some(_)) => v1::MoveKind::Replace,
                (None, Some(_)) if learner => v1::MoveKind::AddLearner,
                (None, Some(_)) => v1::MoveKind::Add,
                (Some(_), None) if remove => v1::MoveKind::Remove,
                (Some(_), None) => {
                    let text = "where shall the replica go? Say --to NODE, or --remove if nothing is to take its place; a replica that the \
                                rules want is made anew elsewhere";
                    return Err(Failure::new(Failure::REFUSED, text));
                }
                (None, None) => {
                    let text = "a move needs --to NODE, --from NODE and --to NODE, or --from NODE --remove; `pontoon predicates` shows who has what";
                    return Err(Failure::new(Failure::REFUSED, text));
                }
            };
            let request = v1::MoveStartRequest {
                predicate,
                kind: kind.into(),
                from_node: from.map_or(0, NodeId::get),
                to_node: to.map_or(0, NodeId::get),
                dry_run,
                hops: 0,
                reason: "asked for by an operator".to_owned(),
                ..Default::default()
            };
            let reply = client.move_start(request).await?;
            match (wait, reply.r#move.as_ref().map(|started| started.id)) {
                (true, Some(id)) => watch(context, &client, id, None).await,
                _ => Ok(started(dry_run, &reply)),
            }
        }
        MoveCommand::List { all } => {
            let moves = client.move_list(v1::MoveListRequest { all, hops: 0 }).await?.moves;
            let json: Vec<Value> = moves.iter().map(json::move_view).collect();
            let text = match moves.is_empty() {
                true => "no moves".to_owned(),
                false => move_table(&moves),
            };
            Ok(Done::new(text, json!({ "moves": json })))
        }
        MoveCommand::Watch { id, for_seconds } => {
            watch(
                context,
                &client,
                id,
                for_seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds)),
            )
            .await
        }
        MoveCommand::Cancel { id } => {
            let reply = client.move_cancel(v1::MoveCancelRequest { id, hops: 0 }).await?;
            let moved = reply.r#move.unwrap_or_default();
            let phase = json::phase_of(&moved);
            let text = match moved.phase() {
                v1::MovePhase::Aborted => format!("move {id} has gone back already"),
                _ => format!(
                    "move {id} is asked to go back, from phase {phase}; `pontoon move watch {id}` follows it"
                ),
            };
            Ok(Done::new(text, json!({ "id": id, "phase": phase, "cancel_requested": true })))
        }
    }
}

fn started(dry_run: bool, reply: &v1::MoveStartReply) -> Done {
    let moved = reply.r#move.clone().unwrap_or_default();
    let mut lines = vec![match dry_run {
        true => format!(
            "{} would move {}: nodes {:?} to {:?}",
            moved.predicate,
            bytes(reply.bytes),
            reply.before,
            reply.after
        ),
        false => format!(
            "move {} of {} has begun: {}, nodes {:?} to {:?}; `pontoon move watch {}` follows it",
            moved.id,
            moved.predicate,
            bytes(reply.bytes),
            reply.before,
            reply.after,
            moved.id
        ),
    }];
    lines.extend(
        reply.checks.iter().map(|check| format!("  {} {}", if check.ok { "ok " } else { "NOT" }, check.text)),
    );
    if dry_run {
        lines.push(format!("about {} while nothing holds it up", duration(reply.estimate_ms)));
        lines.push(String::new());
        lines.push(step_table(&reply.steps));
        let notes = reply.steps.iter().filter(|step| !step.text.is_empty());
        lines.extend(notes.map(|step| format!("{}: {}", step.name, step.text)));
    }
    let refused = dry_run && reply.checks.iter().any(|check| !check.ok);
    Done {
        text: lines.join("\n"),
        json: json::move_start(dry_run, reply),
        code: if refused { Failure::REFUSED } else { 0 },
    }
}

/// Each configuration on the way, and whether the group bears a fault in it.
fn step_table(steps: &[v1::MoveStep]) -> String {
    let nodes = |nodes: &[u64]| match nodes {
        [] => "-".to_owned(),
        nodes => nodes.iter().map(|node| format!("n{node}")).collect::<Vec<_>>().join(" "),
    };
    let rows: Vec<Vec<String>> = steps
        .iter()
        .map(|step| {
            let voters = match step.outgoing.is_empty() {
                true => nodes(&step.voters),
                false => format!("{} and {}", nodes(&step.outgoing), nodes(&step.voters)),
            };
            vec![
                step.name.clone(),
                voters,
                nodes(&step.learners),
                step.quorum.to_string(),
                step.may_fail.to_string(),
            ]
        })
        .collect();
    table(&["configuration", "voters", "learners", "majority", "may fail"], &rows)
}

/// Follows a move over the loss of the node that tells of it.
async fn watch(context: &Context, client: &Client, id: u64, until: Option<Instant>) -> Result<Done, Failure> {
    let far = Instant::now() + Duration::from_secs(365 * 86_400);
    let until = until.unwrap_or(far);
    let first = Instant::now() + FIRST_WORD;
    let mut last: Option<v1::MoveView> = None;
    let mut said: Option<(Instant, u64)> = None;
    loop {
        let mut views = match client.move_watch(id).await {
            Ok(views) => views,
            // The cluster as a whole may be away for a moment; a move that does not exist never comes.
            Err(ClientError::NobodyAnswers { .. } | ClientError::NoMetaLeader { .. })
                if last.is_some() && Instant::now() < until =>
            {
                sleep(PAUSE).await;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        loop {
            // However short the wait, it ends with what is known of the move.
            let patience = if last.is_some() { until } else { until.max(first) };
            let view = match timeout_at(patience, views.message()).await {
                Err(_) => {
                    return Err(wait_ended(id, &last.and_then(|view| view.r#move).unwrap_or_default()));
                }
                Ok(Ok(Some(view))) => view,
                Ok(Ok(None) | Err(_)) => break,
            };
            let moved = view.r#move.clone().unwrap_or_default();
            let news = said.is_none_or(|(at, seq)| seq != moved.phase_seq || at.elapsed() >= SAY_EVERY);
            if news {
                said = Some((Instant::now(), moved.phase_seq));
                let ended = matches!(moved.phase(), v1::MovePhase::Done | v1::MovePhase::Aborted);
                match context.json {
                    // The last word is the command's result.
                    true if ended => {}
                    true => print_line(&json::move_view(&view).to_string()),
                    false => print_line(&line_of(&view)),
                }
            }
            match moved.phase() {
                v1::MovePhase::Done => return Ok(Done::new("", json::move_view(&view))),
                v1::MovePhase::Aborted => {
                    let text = format!("move {id} has gone back; {} is served where it was", moved.predicate);
                    return Ok(Done { text, json: json::move_view(&view), code: Failure::ERROR });
                }
                _ if moved.stuck => return Err(wait_ended(id, &moved)),
                _ => last = Some(view),
            }
        }
        sleep(PAUSE).await;
    }
}

fn wait_ended(id: u64, moved: &v1::Move) -> Failure {
    let phase = json::phase_of(moved);
    let blocked = &moved.blocked;
    match (needs_hand(moved), blocked.is_empty()) {
        (true, _) => Failure::new(Failure::STUCK, format!("move {id} is stuck in phase {phase}: {blocked}")),
        (false, true) => Failure::new(
            Failure::WAIT_ENDED,
            format!("the wait has ended; move {id} is in phase {phase} and goes on: watch it again"),
        ),
        (false, false) => Failure::new(
            Failure::WAIT_ENDED,
            format!("the wait has ended; move {id} is in phase {phase}, {blocked}: watch it again"),
        ),
    }
}

fn line_of(view: &v1::MoveView) -> String {
    let moved = view.r#move.clone().unwrap_or_default();
    let mut line = format!("move {} of {}: {}", moved.id, moved.predicate, json::phase_of(&moved));
    if view.bytes_total > 0 {
        line.push_str(&format!(", {} of {}", bytes(view.bytes_done), bytes(view.bytes_total)));
    }
    if view.rate > 0 {
        line.push_str(&format!(", {}/s, {} left", bytes(view.rate), duration(view.eta_ms)));
    }
    if view.lag > 0 {
        line.push_str(&format!(", lacks {} entries", view.lag));
    }
    if let Some(now) = json::millis(view.foreground_p99_us) {
        line.push_str(&format!(", writes p99 {now:.1} ms"));
        if let Some(before) = json::millis(view.foreground_before_us) {
            line.push_str(&format!(", {before:.1} without copies"));
        }
    }
    if !moved.blocked.is_empty() {
        line.push_str(&format!(", held up ({}): {}", json::blocker_of(&moved), moved.blocked));
    }
    line
}

fn move_table(moves: &[v1::MoveView]) -> String {
    let rows: Vec<Vec<String>> = moves
        .iter()
        .map(|view| {
            let moved = view.r#move.clone().unwrap_or_default();
            vec![
                moved.id.to_string(),
                moved.predicate.clone(),
                json::name_of(moved.kind().as_str_name(), "MOVE_KIND_"),
                place(moved.source),
                place(moved.target),
                json::phase_of(&moved),
                format!("{} of {}", bytes(view.bytes_done), bytes(view.bytes_total)),
                json::blocker_of(&moved),
                moved.blocked.clone(),
            ]
        })
        .collect();
    let head = ["move", "predicate", "kind", "from", "to", "phase", "bytes", "held up by", ""];
    table(&head, &rows)
}
