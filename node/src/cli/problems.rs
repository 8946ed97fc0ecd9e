//! `pontoon status --problems`.

use std::collections::BTreeMap;

use clap::Args;
use pontoon_proto::v1;
use serde_json::{Value, json};

use super::{Context, Done, Failure, output::table};

/// So many groups are named for each kind of problem.
const NAMED: usize = 10;

#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    /// Only what is wrong: a code, where, and what to do about it.
    #[arg(long)]
    pub(super) problems: bool,
}

struct Row {
    code: String,
    place: String,
    text: String,
    json: Value,
}

pub(super) async fn problems(context: &Context) -> Result<Done, Failure> {
    let client = context.client().await?;
    let (status, groups) = tokio::join!(
        client.status(v1::StatusRequest {}),
        client.groups(v1::GroupsRequest { problem: true, ..Default::default() })
    );
    let (status, groups) = (status?, groups?);
    let mut rows: Vec<Row> = status.nodes.iter().flat_map(of_node).collect();
    let mut kinds: BTreeMap<&str, Vec<(&v1::GroupView, &str)>> = BTreeMap::new();
    for group in &groups.groups {
        for problem in &group.problems {
            let (code, text) = problem.split_once(": ").unwrap_or(("unknown", problem));
            kinds.entry(code).or_default().push((group, text));
        }
    }
    for (code, found) in kinds {
        for (group, text) in found.iter().take(NAMED) {
            rows.push(Row {
                code: code.to_owned(),
                place: format!("{} (group {})", group.predicate, group.group),
                text: (*text).to_owned(),
                json: json!({ "code": code, "group": group.group, "predicate": group.predicate, "text": text }),
            });
        }
        if let Some(more) = found.len().checked_sub(NAMED).filter(|more| *more > 0) {
            rows.push(Row {
                code: code.to_owned(),
                place: format!("{more} more groups"),
                text: "`pontoon groups --problem` lists them".to_owned(),
                json: json!({ "code": code, "groups": more }),
            });
        }
    }
    let cells: Vec<Vec<String>> =
        rows.iter().map(|row| vec![row.code.clone(), row.place.clone(), row.text.clone()]).collect();
    let text = match cells.is_empty() {
        true => "nothing is wrong".to_owned(),
        false => table(&["problem", "where", "what to do"], &cells),
    };
    let json: Vec<Value> = rows.into_iter().map(|row| row.json).collect();
    Ok(Done::new(text, json!({ "problems": json })))
}

fn of_node(view: &v1::NodeView) -> Vec<Row> {
    let id = view.node.as_ref().map_or(0, |node| node.id);
    if !view.reachable {
        let text = format!(
            "it does not answer: start it, or if it is lost for good run `pontoon decommission n{id}`"
        );
        let json = json!({ "code": "silent", "node": id, "text": text });
        return vec![Row { code: "silent".to_owned(), place: format!("n{id}"), text, json }];
    }
    let row = |problem: &v1::NodeProblem| Row {
        code: problem.code.clone(),
        place: format!("n{id}"),
        text: problem.text.clone(),
        json: json!({
            "code": problem.code,
            "node": id,
            "text": problem.text,
            "since_ms": problem.since_ms,
        }),
    };
    view.problems.iter().map(row).collect()
}
