//! `pontoon recover plan|apply|verify`.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use clap::{Args, Subcommand};
use pontoon_node::{
    client::Client,
    recover::{self, name},
};
use pontoon_proto::{NodeId, ReplicaId, v1};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::{Context, Done, Failure, node_id, output::table};

const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How long a recovery of many groups may take.
const APPLY: Duration = Duration::from_secs(120);

#[derive(Debug, Subcommand)]
pub(super) enum RecoverCommand {
    /// Say which groups have lost their quorum with these nodes, with what each would go on, and what may be lost. Nothing is
    /// begun.
    Plan(PlanArgs),
    /// Carry a plan out. The lost nodes are removed for ever; run it again if it was interrupted.
    Apply {
        /// The file that `plan` wrote.
        file: PathBuf,
    },
    /// Say whether every group of a plan goes on.
    Verify {
        /// The file that `plan` wrote.
        file: PathBuf,
        /// Wait so many seconds until all have their replicas again: exit code 4 if not.
        #[arg(long, value_name = "SECONDS", default_value_t = 0, hide_default_value = true)]
        wait: u64,
    },
}

#[derive(Debug, Args)]
pub(super) struct PlanArgs {
    /// The nodes that never come back, by commas.
    #[arg(long, value_name = "NODES", value_delimiter = ',', required = true, value_parser = node_id)]
    lost: Vec<NodeId>,
    /// Where the plan is written.
    #[arg(long, value_name = "FILE", default_value = "recovery.json")]
    out: PathBuf,
}

pub(super) async fn run(context: &Context, command: RecoverCommand) -> Result<Done, Failure> {
    match command {
        RecoverCommand::Plan(args) => plan(context, args).await,
        RecoverCommand::Apply { file } => apply(context, &file).await,
        RecoverCommand::Verify { file, wait } => verify(context, &file, Duration::from_secs(wait)).await,
    }
}

async fn plan(context: &Context, args: PlanArgs) -> Result<Done, Failure> {
    let lost = args.lost.iter().map(|node| node.get()).collect();
    let reply = context.client().await?.recover_plan(v1::RecoverPlanRequest { lost }).await?;
    let plan = reply.plan.unwrap_or_default();
    let json = recover::to_json(&plan);
    if plan.steps.is_empty() && plan.gone.is_empty() {
        let nodes: Vec<String> = args.lost.iter().map(NodeId::to_string).collect();
        let text = format!(
            "every group has its quorum without {}: run `pontoon decommission` for each of them",
            nodes.join(", ")
        );
        return Ok(Done::new(text, json));
    }
    let text = format!("{json:#}\n");
    // A plan that somebody wants to look at again is not overwritten.
    let file = std::fs::File::create_new(&args.out).map_err(|error| {
        Failure::new(
            Failure::REFUSED,
            format!("{} is not written ({error}): choose another name with --out", args.out.display()),
        )
    })?;
    let written = std::io::Write::write_all(&mut &file, text.as_bytes()).and_then(|()| file.sync_all());
    written.map_err(|error| Failure::error(format!("{}: {error}", args.out.display())))?;
    let rows: Vec<Vec<String>> = plan
        .steps
        .iter()
        .map(|step| {
            vec![
                step.predicate.clone(),
                step.group.to_string(),
                replicas(&step.voters),
                name(step.from),
                format!("{} of term {}", step.last_index, step.last_term),
                replicas(&step.leftovers),
            ]
        })
        .collect();
    let mut text = table(&["what", "group", "voters", "goes on", "last entry", "removed"], &rows);
    for gone in &plan.gone {
        text.push_str(&format!(
            "\n{} (group {}) has no replica left: its data is lost. Drop it with `pontoon predicate drop {}`, then load it again",
            gone.predicate, gone.group, gone.predicate
        ));
    }
    text.push_str(&format!(
        "\n\nWhatever was acknowledged after these entries by the lost nodes alone is lost. The plan is in {0}; it holds until \
         something changes. Make sure that the lost nodes stay down, then run `pontoon recover apply {0}`",
        args.out.display()
    ));
    Ok(Done::new(text, json))
}

fn read(file: &PathBuf) -> Result<v1::RecoveryPlan, Failure> {
    let refuse = |text: String| Failure::new(Failure::REFUSED, format!("{}: {text}", file.display()));
    let text = std::fs::read_to_string(file).map_err(|error| refuse(error.to_string()))?;
    recover::from_json(&text).map_err(refuse)
}

async fn apply(context: &Context, file: &PathBuf) -> Result<Done, Failure> {
    let plan = read(file)?;
    let (count, lost) = (plan.steps.len(), plan.lost.clone());
    let client = context.client().await?.with_deadline(APPLY);
    let reply = client.recover_apply(v1::RecoverApplyRequest { plan: Some(plan) }).await?;
    if !reply.failures.is_empty() {
        let text = format!(
            "{} of {count} groups do not go on yet:\n{}\nrun `pontoon recover apply {}` again",
            reply.failures.len(),
            reply.failures.join("\n"),
            file.display()
        );
        return Err(Failure::new(Failure::STUCK, text));
    }
    let nodes: Vec<String> = lost.iter().map(|id| format!("n{id}")).collect();
    let text = format!(
        "{count} groups go on; {} removed for ever. Follow how they get their replicas back with `pontoon recover verify {} --wait 600`",
        match nodes.len() {
            1 => format!("{} is", nodes[0]),
            _ => format!("{} are", nodes.join(", ")),
        },
        file.display()
    );
    Ok(Done::new(text, json!({ "groups": count, "removed": nodes })))
}

/// How a group of a plan fares.
struct Fares {
    step: v1::RecoveryStep,
    serves: bool,
    voters: usize,
    wanted: usize,
    problems: Vec<String>,
}

impl Fares {
    fn is_whole(&self) -> bool {
        self.serves && self.voters >= self.wanted && self.problems.is_empty()
    }
}

async fn verify(context: &Context, file: &PathBuf, wait: Duration) -> Result<Done, Failure> {
    let plan = read(file)?;
    let client = context.client().await?;
    let until = Instant::now() + wait;
    let fares = loop {
        let fares = look(&client, &plan).await?;
        if fares.iter().all(Fares::is_whole) || Instant::now() >= until {
            break fares;
        }
        sleep(LOOK_EVERY).await;
    };
    let rows: Vec<Vec<String>> = fares
        .iter()
        .map(|fares| {
            vec![
                fares.step.predicate.clone(),
                fares.step.group.to_string(),
                if fares.serves { "serves" } else { "does not serve" }.to_owned(),
                format!("{} of {}", fares.voters, fares.wanted),
                fares.problems.join("; "),
            ]
        })
        .collect();
    let text = table(&["what", "group", "", "voters", "problems"], &rows);
    let groups: Vec<Value> = fares
        .iter()
        .map(|fares| {
            json!({
                "group": fares.step.group,
                "predicate": fares.step.predicate,
                "serves": fares.serves,
                "voters": fares.voters,
                "wanted": fares.wanted,
                "problems": fares.problems,
            })
        })
        .collect();
    let mut done = Done::new(text, json!({ "groups": groups }));
    if fares.iter().any(|fares| !fares.serves) {
        done.code = Failure::STUCK;
    } else if !wait.is_zero() && !fares.iter().all(Fares::is_whole) {
        done.code = Failure::WAIT_ENDED;
    }
    Ok(done)
}

async fn look(client: &Client, plan: &v1::RecoveryPlan) -> Result<Vec<Fares>, Failure> {
    let reply = client.groups(v1::GroupsRequest::default()).await?;
    let seen: BTreeMap<u64, v1::GroupView> =
        reply.groups.into_iter().map(|group| (group.group, group)).collect();
    let lost = |id: &u64| ReplicaId::new(*id).is_ok_and(|replica| plan.lost.contains(&replica.node().get()));
    let fares = plan.steps.iter().map(|step| {
        let group = seen.get(&step.group).cloned().unwrap_or_default();
        let leader = group.replicas.iter().find(|replica| replica.role == "leader");
        let conf = leader.and_then(|leader| leader.conf_state.clone()).unwrap_or_default();
        let recovered = !conf.voters.is_empty() && !conf.voters.iter().chain(&conf.voters_outgoing).any(lost);
        Fares {
            serves: recovered,
            voters: conf.voters.len(),
            wanted: (group.wanted as usize).max(1),
            problems: group.problems.clone(),
            step: step.clone(),
        }
    });
    Ok(fares.collect())
}

fn replicas(ids: &[u64]) -> String {
    ids.iter().copied().map(name).collect::<Vec<_>>().join(" ")
}
