//! `pontoon rules`, `drain`, `rebalance`, `explain`.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Subcommand, ValueEnum};
use pontoon_node::{
    client::Client,
    json::{self, place},
    rules,
};
use pontoon_proto::{NodeId, v1};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::{
    Context, Done, Failure, node_id,
    output::{bytes, table},
    print_line,
};

/// Between two looks at a node that is being emptied.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// A drain that has nothing under way for so long waits for somebody's hand.
const STUCK_AFTER: Duration = Duration::from_secs(15);

#[derive(Debug, Subcommand)]
pub(super) enum RulesCommand {
    /// Print the rules as TOML, to be changed and set again.
    Show,
    /// Set the rules of a TOML file. Refused if the cluster cannot meet them.
    Set {
        /// The file; - for standard input.
        file: PathBuf,
        /// Set them although they cannot be met.
        #[arg(long)]
        force: bool,
    },
    /// Say what is wrong with the rules of a file, or with those that are set.
    Check {
        /// The file; - for standard input.
        file: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
pub(super) struct DrainArgs {
    /// The node, as in `pontoon nodes`.
    #[arg(value_parser = node_id)]
    node: NodeId,
    /// Wait until it is empty.
    #[arg(long, conflicts_with = "cancel")]
    wait: bool,
    /// Give up after so many seconds: exit code 4; the drain goes on.
    #[arg(long, value_name = "SECONDS", requires = "wait")]
    for_seconds: Option<u64>,
    /// Let it take replicas again.
    #[arg(long)]
    cancel: bool,
    /// Only say how far it is.
    #[arg(long, conflicts_with_all = ["cancel", "wait"])]
    look: bool,
}

/// What a plan makes even.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum By {
    Bytes,
    Load,
    Both,
}

#[derive(Debug, Subcommand)]
pub(super) enum RebalanceCommand {
    /// Say which moves would use the nodes evenly. Nothing is begun.
    Plan {
        /// At most so many moves.
        #[arg(long, default_value_t = 0, hide_default_value = true)]
        max_moves: u32,
        /// At most so many bytes.
        #[arg(long, default_value_t = 0, hide_default_value = true)]
        max_bytes: u64,
        /// What shall be even: bytes, the load of writes that nodes bear, or both, which is bytes and then load where it differs by
        /// more than a tenth.
        #[arg(long, value_enum, default_value_t = By::Both)]
        by: By,
    },
    /// Carry out a plan, if nothing has changed since it was made.
    Apply {
        /// Its id, as `plan` printed it.
        id: String,
    },
}

#[derive(Debug, Args)]
pub(super) struct ExplainArgs {
    /// The predicate.
    predicate: String,
    /// Only this node.
    #[arg(long, value_name = "NODE", value_parser = node_id)]
    node: Option<NodeId>,
}

pub(super) async fn rules(context: &Context, command: RulesCommand) -> Result<Done, Failure> {
    let client = context.client().await?;
    match command {
        RulesCommand::Show => {
            let reply = client.rules(v1::RulesRequest::default()).await?;
            let rules = reply.rules.unwrap_or_default();
            let text = match rules.revision {
                0 => "# no rules are set: three voters, anywhere".to_owned(),
                revision => format!("# revision {revision}\n{}", rules::to_toml(&rules)),
            };
            let json = json!({ "revision": rules.revision, "toml": rules::to_toml(&rules) });
            Ok(Done::new(text.trim_end(), json))
        }
        RulesCommand::Set { file, force } => {
            let wished = v1::SetRulesRequest { rules: Some(read(&file)?), force, ..Default::default() };
            let reply = client.set_rules(wished).await?;
            let (text, findings) = told(&reply.findings);
            let text = if reply.findings.is_empty() {
                "the rules are set".to_owned()
            } else {
                format!("{text}\nthe rules are set")
            };
            Ok(Done::new(text, json!({ "set": reply.set, "findings": findings })))
        }
        RulesCommand::Check { file } => {
            let found = match file {
                None => client.rules(v1::RulesRequest::default()).await?.findings,
                Some(file) => {
                    let wished = v1::SetRulesRequest {
                        rules: Some(read(&file)?),
                        check_only: true,
                        ..Default::default()
                    };
                    client.set_rules(wished).await?.findings
                }
            };
            let (text, findings) = told(&found);
            let text = if found.is_empty() { "every rule can be met".to_owned() } else { text };
            let wrong = found.iter().any(|finding| finding.wrong);
            let code = if wrong { Failure::REFUSED } else { 0 };
            Ok(Done { code, ..Done::new(text, json!({ "ok": !wrong, "findings": findings })) })
        }
    }
}

fn read(file: &PathBuf) -> Result<v1::Rules, Failure> {
    let refused = |text: String| Failure::new(Failure::REFUSED, format!("{}: {text}", file.display()));
    let text = match file.as_os_str() == "-" {
        true => std::io::read_to_string(std::io::stdin()),
        false => std::fs::read_to_string(file),
    };
    let text = text.map_err(|error| refused(error.to_string()))?;
    rules::from_toml(&text).map_err(refused)
}

fn told(findings: &[v1::RuleFinding]) -> (String, Vec<Value>) {
    let line = |finding: &v1::RuleFinding| {
        let weight = if finding.wrong { "cannot be met" } else { "note" };
        format!("{} ({weight}): {}", finding.predicate, finding.text)
    };
    let json = |finding: &v1::RuleFinding| json!({ "wrong": finding.wrong, "predicate": finding.predicate, "text": finding.text });
    let lines: Vec<String> = findings.iter().map(line).collect();
    (lines.join("\n"), findings.iter().map(json).collect())
}

pub(super) async fn drain(context: &Context, args: DrainArgs) -> Result<Done, Failure> {
    let client = context.client().await?;
    let action = match (args.cancel, args.look) {
        (true, _) => v1::DrainAction::Cancel,
        (_, true) => v1::DrainAction::Look,
        _ => v1::DrainAction::Start,
    };
    let ask = |action: v1::DrainAction| v1::DrainRequest {
        node: args.node.get(),
        action: action.into(),
        hops: 0,
        seen: None,
    };
    let mut reply = client.drain(ask(action)).await?;
    if args.cancel {
        let text = format!("{} takes replicas again; those that have left stay where they are", args.node);
        return Ok(Done::new(text, json::drain(&reply)));
    }
    let until = args.for_seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let mut moved = Instant::now();
    while args.wait && reply.replicas > 0 {
        let before = (reply.replicas, reply.leaders);
        sleep(LOOK_EVERY).await;
        reply = client.drain(ask(v1::DrainAction::Look)).await?;
        if (reply.replicas, reply.leaders) != before {
            moved = Instant::now();
            if !context.json {
                print_line(&format!(
                    "{} replicas left, {} of them lead, {} on their way",
                    reply.replicas, reply.leaders, reply.moving
                ));
            }
        }
        if until.is_some_and(|until| Instant::now() >= until) {
            let text = format!(
                "{}\nthe drain goes on: `pontoon drain {} --look`",
                drain_text(&reply, args.node),
                args.node
            );
            return Err(Failure::new(Failure::WAIT_ENDED, text));
        }
        // What can still leave is given its time; what cannot waits for somebody.
        if moved.elapsed() >= STUCK_AFTER && !reply.stuck.is_empty() && reply.moving == 0 {
            return Err(Failure::new(Failure::STUCK, drain_text(&reply, args.node)));
        }
    }
    Ok(Done::new(drain_text(&reply, args.node), json::drain(&reply)))
}

fn drain_text(reply: &v1::DrainReply, node: NodeId) -> String {
    let state = reply.node.as_ref().map(v1::Node::state);
    let mut text = match (reply.replicas, state) {
        (0, Some(v1::NodeState::Draining)) => format!(
            "{node} is empty: stop it and start it again at will, `pontoon drain {node} --cancel` to use it again, or \
             `pontoon decommission {node}` to take it out for ever"
        ),
        (replicas, state) => format!(
            "{node} is {}: {replicas} replicas, {} of them lead, {} on their way",
            json::name_of(state.unwrap_or_default().as_str_name(), "NODE_STATE_"),
            reply.leaders,
            reply.moving
        ),
    };
    for stuck in &reply.stuck {
        text.push_str(&format!("\n{} (group {}): {}", stuck.predicate, stuck.group, stuck.reason));
    }
    text
}

pub(super) async fn rebalance(context: &Context, command: RebalanceCommand) -> Result<Done, Failure> {
    let client: Client = context.client().await?;
    match command {
        RebalanceCommand::Plan { max_moves, max_bytes, by } => {
            let by = match by {
                By::Bytes => v1::PlanBy::Bytes,
                By::Load => v1::PlanBy::Load,
                By::Both => v1::PlanBy::Both,
            };
            let request = v1::RebalancePlanRequest { max_moves, max_bytes, by: by.into(), hops: 0 };
            let reply = client.rebalance_plan(request).await?;
            let plan = reply.plan.unwrap_or_default();
            let mut text = plan_text(&plan);
            if !reply.running.is_empty() {
                text.push_str(&format!(
                    "\nplan {} is being carried out: this one counts its moves in",
                    reply.running
                ));
            } else if !(plan.moves.is_empty() && plan.transfers.is_empty()) {
                text.push_str(&format!("\n`pontoon rebalance apply {}` carries it out", plan.id));
            }
            Ok(Done::new(text, json::plan(&plan)))
        }
        RebalanceCommand::Apply { id } => {
            let plan = client.rebalance_apply(v1::RebalanceApplyRequest { id, hops: 0 }).await?.plan;
            let plan = plan.unwrap_or_default();
            let text = format!(
                "plan {} begins: {} moves, {} transfers of leadership; `pontoon move list` shows how far it is",
                plan.id,
                plan.moves.len(),
                plan.transfers.len()
            );
            Ok(Done::new(text, json::plan(&plan)))
        }
    }
}

fn percent(thousandths: u32) -> String {
    format!("{:.1} %", f64::from(thousandths) / 10.0)
}

fn plan_text(plan: &v1::Plan) -> String {
    let nodes: Vec<Vec<String>> = plan
        .nodes
        .iter()
        .map(|node| {
            vec![
                node.node.to_string(),
                bytes(node.used_before),
                bytes(node.used_after),
                node.writes_before.to_string(),
                node.writes_after.to_string(),
                node.leads_before.to_string(),
                node.leads_after.to_string(),
            ]
        })
        .collect();
    let mut text = table(&["node", "bytes", "after", "writes/s", "after", "leads", "after"], &nodes);
    if !plan.moves.is_empty() {
        let rows: Vec<Vec<String>> = plan
            .moves
            .iter()
            .map(|mv| {
                let to = format!("n{}", mv.target_node);
                vec![mv.predicate.clone(), place(mv.source), to, bytes(mv.bytes), mv.reason.clone()]
            })
            .collect();
        text.push_str(&format!("\n\n{}", table(&["predicate", "from", "to", "bytes", "why"], &rows)));
    }
    text.push_str(&format!(
        "\n\nspread {} → {}, of writes {} → {}, moves {}, bytes {} (an even use takes at least {}), transfers of leadership {}",
        percent(plan.spread_before),
        percent(plan.spread_after),
        percent(plan.load_spread_before),
        percent(plan.load_spread_after),
        plan.moves.len(),
        bytes(plan.bytes),
        bytes(plan.bound_bytes),
        plan.transfers.len()
    ));
    if plan.moves.is_empty() {
        text.push_str("\nno move makes it more even");
    }
    text
}

pub(super) async fn explain(context: &Context, args: ExplainArgs) -> Result<Done, Failure> {
    let request =
        v1::ExplainRequest { predicate: args.predicate, node: args.node.map_or(0, NodeId::get), hops: 0 };
    let reply = context.client().await?.explain_placement(request).await?;
    let mut lines = Vec::new();
    for node in &reply.nodes {
        let standing = match node.standing.as_str() {
            "votes" => "holds a voter",
            "learns" => "holds a learner",
            "misplaced" => "holds a replica that should not be there",
            "could" => "could take one",
            _ => "cannot take one",
        };
        lines.push(format!("n{}  {standing}", node.node));
        for verdict in &node.verdicts {
            let mark = match (verdict.ok, verdict.hard) {
                (true, _) => "yes",
                (false, true) => "NO",
                (false, false) => "but",
            };
            let fix = if verdict.fix.is_empty() { String::new() } else { format!("  ({})", verdict.fix) };
            lines.push(format!("    {mark:<4}{}{fix}", verdict.text));
        }
    }
    Ok(Done::new(lines.join("\n"), json::explanation(&reply)))
}
