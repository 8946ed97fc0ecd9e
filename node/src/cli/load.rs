//! `pontoon load`.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use clap::Args;
use pontoon_node::load::{LoadOptions, LoadStep, load};
use serde_json::json;

use super::{Context, Done, Failure, percent_bar, print_line};

#[derive(Debug, Args)]
pub(super) struct LoadArgs {
    /// The file, plain or gzip.
    file: PathBuf,
    /// Tolerate up to N malformed lines, and list them.
    #[arg(long, value_name = "N", default_value_t = 0)]
    skip_bad: u64,
    /// Where to keep how far the load is; FILE.pontoon-load if not given.
    #[arg(long, value_name = "PATH")]
    state: Option<PathBuf>,
}

pub(super) async fn run(context: &Context, args: LoadArgs) -> Result<Done, Failure> {
    let client = context.client().await?;
    let options = LoadOptions { state: args.state, skip_bad: args.skip_bad };
    let bar = percent_bar(0, "loading [{bar:32}] {percent:>3}% of {total_bytes}, {msg}, {eta} left");
    let begun = std::time::Instant::now();
    let mut read: Option<Arc<AtomicU64>> = None;
    let report = load(&client, &args.file, &options, |step| match step {
        LoadStep::Begins { file_bytes, read: counter, after_line } => {
            bar.set_length(file_bytes);
            if after_line > 0 {
                bar.suspend(|| eprintln!("going on after line {after_line}"));
            }
            read = Some(counter);
        }
        LoadStep::Loaded(triples) => {
            bar.set_position(read.as_ref().map_or(0, |read| read.load(Ordering::Relaxed)));
            bar.set_message(format!(
                "{triples} triples, {:.0}/s",
                triples as f64 / begun.elapsed().as_secs_f64()
            ));
        }
        LoadStep::Skipped(bad) => bar.suspend(|| {
            if !context.json {
                print_line(&format!("skipped line {}: {}", bad.line, bad.reason));
            }
        }),
    })
    .await;
    bar.finish_and_clear();
    let report = report?;
    let mut text = format!(
        "{} triples of {} lines loaded in {:.1} s ({:.0}/s)",
        report.loaded, report.lines, report.seconds, report.triples_per_s
    );
    if report.resumed_after_line > 0 {
        text.push_str(&format!(
            ", going on after line {}; {} in all",
            report.resumed_after_line, report.triples
        ));
    }
    if !report.skipped.is_empty() {
        text.push_str(&format!("; {} bad lines skipped", report.skipped.len()));
    }
    let mut json = json!(report);
    json["file"] = json!(args.file.to_string_lossy());
    Ok(Done::new(text, json))
}
