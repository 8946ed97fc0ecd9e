//! `pontoon status --problems`.

use clap::Args;
use pontoon_node::json;
use pontoon_proto::v1;
use serde_json::{Value, json};

use super::{Context, Done, Failure, output::table};

#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    /// Only what is wrong: a code, where, and what to do about it.
    #[arg(long)]
    pub(super) problems: bool,
}

pub(super) async fn problems(context: &Context) -> Result<Done, Failure> {
    let client = context.client().await?;
    let (status, groups) = tokio::join!(
        client.status(v1::StatusRequest {}),
        client.groups(v1::GroupsRequest { problem: true, ..Default::default() })
    );
    let (status, groups) = (status?, groups?);
    let problems = json::problems(&status.nodes, &groups.groups);
    let cell = |problem: &Value, name: &str| problem[name].as_str().unwrap_or_default().to_owned();
    let cells: Vec<Vec<String>> = problems
        .iter()
        .map(|problem| ["code", "where", "text"].map(|name| cell(problem, name)).to_vec())
        .collect();
    let text = match cells.is_empty() {
        true => "nothing is wrong".to_owned(),
        false => table(&["problem", "where", "what to do"], &cells),
    };
    Ok(Done::new(text, json!({ "problems": problems })))
}
