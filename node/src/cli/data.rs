//! `pontoon get`, `put`, `delete`, `cas`, `scan`.

use bytes::Bytes;
use clap::{ArgGroup, Args};
use pontoon_node::{
    client::{Client, Expect, Range, Row},
    load::{subject_of, subject_prefix},
};
use serde_json::{Value, json};

use super::{
    Context, Done, Failure, ReadArgs,
    output::{json_of, table, text_of},
};

#[derive(Debug, Args)]
pub(super) struct KeyArgs {
    /// The predicate.
    predicate: String,
    /// The key; for loaded data a subject as it is kept, `<iri>` or `_:label`.
    key: String,
}

#[derive(Debug, Args)]
pub(super) struct GetArgs {
    #[command(flatten)]
    row: KeyArgs,
    #[command(flatten)]
    read: ReadArgs,
}

#[derive(Debug, Args)]
pub(super) struct PutArgs {
    /// The predicate.
    predicate: String,
    /// The key.
    key: String,
    /// The value.
    value: String,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("expected").required(true))]
pub(super) struct CasArgs {
    /// The predicate.
    predicate: String,
    /// The key.
    key: String,
    /// The new value; without one the row is deleted.
    value: Option<String>,
    /// There must be no row.
    #[arg(long, group = "expected")]
    absent: bool,
    /// The row must have this value.
    #[arg(long, group = "expected", value_name = "VALUE")]
    expect: Option<String>,
    /// The row must last have been modified at this index.
    #[arg(long, group = "expected", value_name = "INDEX")]
    expect_index: Option<u64>,
}

#[derive(Debug, Args)]
pub(super) struct ScanArgs {
    /// The predicate.
    predicate: String,
    /// Only keys that begin so.
    #[arg(long, conflicts_with_all = ["low", "high", "subject"])]
    prefix: Option<String>,
    /// Only the objects of this subject of loaded data.
    #[arg(long, conflicts_with_all = ["low", "high"])]
    subject: Option<String>,
    /// Only keys from here on.
    #[arg(long)]
    low: Option<String>,
    /// Only keys below this.
    #[arg(long)]
    high: Option<String>,
    /// At most so many rows; 0: all.
    #[arg(long, default_value_t = 100)]
    limit: usize,
    #[command(flatten)]
    read: ReadArgs,
}

pub(super) async fn get(context: &Context, args: GetArgs) -> Result<Done, Failure> {
    let client = context.client().await?.with_reads(args.read.reads());
    let args = args.row;
    if let Some(row) = client.get(&args.predicate, args.key.clone()).await? {
        let json =
            json!({ "found": true, "key": args.key, "value": json_of(&row.value), "modified": row.modified });
        return Ok(Done::new(text_of(&row.value), json));
    }
    // Loaded rows have longer keys: the subject with its object's hash behind it.
    let (rows, _) =
        rows(&client, &args.predicate, Range::prefix(subject_prefix(&args.key)), usize::MAX).await?;
    if rows.is_empty() {
        let text = format!(
            "{} has no row {:?}; `pontoon scan {}` lists its rows",
            args.predicate, args.key, args.predicate
        );
        return Err(Failure::error(text));
    }
    let text: Vec<String> = rows.iter().map(|row| text_of(&row.value)).collect();
    let values: Vec<Value> = rows.iter().map(|row| json_of(&row.value)).collect();
    Ok(Done::new(text.join("\n"), json!({ "found": true, "subject": args.key, "objects": values })))
}

pub(super) async fn put(context: &Context, args: PutArgs) -> Result<Done, Failure> {
    let written = context.client().await?.put(&args.predicate, args.key, args.value).await?;
    Ok(Done::new(
        format!("done at index {}", written.index),
        json!({ "applied": true, "index": written.index }),
    ))
}

pub(super) async fn delete(context: &Context, args: KeyArgs) -> Result<Done, Failure> {
    let client = context.client().await?;
    // A write would make the predicate; to delete from nothing is a mistake.
    client.get(&args.predicate, args.key.clone()).await?;
    let written = client.delete(&args.predicate, args.key).await?;
    Ok(Done::new(
        format!("done at index {}", written.index),
        json!({ "applied": true, "index": written.index }),
    ))
}

pub(super) async fn cas(context: &Context, args: CasArgs) -> Result<Done, Failure> {
    let expect = match (args.expect, args.expect_index) {
        (Some(value), _) => Expect::Value(value.into()),
        (None, Some(index)) => Expect::Modified(index),
        (None, None) => Expect::Absent,
    };
    let client = context.client().await?;
    let written = client.cas(&args.predicate, args.key.clone(), expect, args.value.map(Bytes::from)).await?;
    if written.applied {
        return Ok(Done::new(
            format!("done at index {}", written.index),
            json!({ "applied": true, "index": written.index }),
        ));
    }
    let found = written.results.first().filter(|found| found.current_index > 0);
    let text = match found {
        Some(found) => {
            format!("not done: the row is {:?} of index {}", text_of(&found.current), found.current_index)
        }
        None => "not done: there is no such row".to_owned(),
    };
    let json = json!({
        "applied": false,
        "current": found.map(|found| json_of(&found.current)),
        "current_index": found.map(|found| found.current_index),
    });
    Ok(Done { text, json, code: Failure::REFUSED })
}

pub(super) async fn scan(context: &Context, args: ScanArgs) -> Result<Done, Failure> {
    let client = context.client().await?.with_reads(args.read.reads());
    let prefix = match (args.prefix, args.subject) {
        (Some(prefix), _) => prefix.into_bytes(),
        (None, Some(subject)) => subject_prefix(&subject),
        (None, None) => Vec::new(),
    };
    let range = Range {
        prefix: prefix.into(),
        low: args.low.unwrap_or_default().into(),
        high: args.high.unwrap_or_default().into(),
        ..Range::default()
    };
    let limit = if args.limit == 0 { usize::MAX } else { args.limit };
    let (rows, more) = rows(&client, &args.predicate, range, limit).await?;
    let key = |row: &Row| subject_of(&row.key).unwrap_or_else(|| text_of(&row.key));
    let cells: Vec<Vec<String>> =
        rows.iter().map(|row| vec![key(row), text_of(&row.value), row.modified.to_string()]).collect();
    let mut text = table(&["key", "value", "modified"], &cells);
    if more {
        text.push_str(&format!("\nmore than {} rows; --limit 0 lists all", rows.len()));
    }
    let rows: Vec<Value> = rows
        .iter()
        .map(|row| {
            let mut json =
                json!({ "key": json_of(&row.key), "value": json_of(&row.value), "modified": row.modified });
            if let Some(subject) = subject_of(&row.key) {
                json["subject"] = json!(subject);
            }
            json
        })
        .collect();
    Ok(Done::new(text, json!({ "rows": rows, "more": more })))
}

/// At most `limit` rows of a range, and whether there are more.
async fn rows(
    client: &Client,
    predicate: &str,
    mut range: Range,
    limit: usize,
) -> Result<(Vec<Row>, bool), Failure> {
    let mut rows = Vec::new();
    loop {
        range.limit = limit.saturating_sub(rows.len()).clamp(1, 1_000) as u32;
        let page = client.scan(predicate, &range).await?;
        rows.extend(page.rows);
        let more = !page.continuation.is_empty();
        if !more || rows.len() >= limit {
            return Ok((rows, more));
        }
        range.continuation = page.continuation;
    }
}
