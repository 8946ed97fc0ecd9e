//! `pontoon backup`, `restore`, `verify` and `export`.

use std::{
    io::Write,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Args, Subcommand};
use pontoon_node::{
    backup::{
        self, BackupError, BackupOptions, Kept, Manifest, RestoreOptions, Step, VerifyOptions, compare,
    },
    export::{ExportError, ExportFile, ExportOptions, export},
};
use serde_json::{Value, json};

use super::{
    Context, Done, Failure, Say, bytes,
    output::{percent_bar, table},
};

const DAY: Duration = Duration::from_secs(86_400);

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(super) struct BackupArgs {
    #[command(subcommand)]
    command: Option<BackupCommand>,
    /// A directory, to which only what is new is added; or a new file that ends with .tar, complete in itself. A directory that
    /// is called list, prune or verify is written ./list.
    #[arg(value_name = "DIR|FILE", required = true)]
    path: Option<PathBuf>,
    /// Only these predicates, by commas or several times.
    #[arg(long, value_name = "PREDICATE", value_delimiter = ',')]
    predicate: Vec<String>,
    /// What it may take of each node: slow, normal, fast, max or bytes per second. Without: what received states may.
    #[arg(long, value_name = "BUDGET", default_value = "", hide_default_value = true)]
    budget: String,
}

#[derive(Debug, Subcommand)]
enum BackupCommand {
    /// The backups in a directory or file.
    List {
        /// Where they are.
        path: PathBuf,
        /// Every predicate of each.
        #[arg(long)]
        predicates: bool,
    },
    /// Remove old backups from a directory, and the chunks that only they needed.
    Prune {
        /// Where they are.
        path: PathBuf,
        /// The latest so many stay.
        #[arg(long, value_name = "N", required_unless_present = "keep_days")]
        keep: Option<usize>,
        /// All that are younger than so many days stay.
        #[arg(long, value_name = "DAYS")]
        keep_days: Option<u32>,
        /// Say what would go.
        #[arg(long)]
        dry_run: bool,
    },
    /// The same as `pontoon verify`.
    Verify(VerifyArgs),
}

#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    /// Where the backups are.
    #[arg(value_name = "DIR|FILE")]
    path: PathBuf,
    /// Only this one, by its id or the beginning or end of it.
    #[arg(long, value_name = "ID")]
    backup: Option<String>,
    /// Compare the latest (or that one) with the cluster, too: what was written since is a difference.
    #[arg(long)]
    deep: bool,
}

#[derive(Debug, Args)]
pub(super) struct RestoreArgs {
    /// Where the backup is.
    #[arg(value_name = "DIR|FILE")]
    path: PathBuf,
    /// Which one, by its id or the beginning or end of it; the latest without.
    #[arg(long, value_name = "ID")]
    backup: Option<String>,
    /// Only these predicates, by commas or several times.
    #[arg(long, value_name = "PREDICATE", value_delimiter = ',')]
    predicate: Vec<String>,
    /// The restored predicate is to be called so; for one predicate.
    #[arg(long = "as", value_name = "NAME")]
    rename: Option<String>,
    /// Replace predicates that have rows, each in one step once it is restored beside them and compared.
    #[arg(long)]
    replace: bool,
    /// Set the placement rules of the backup, too, if the cluster has none.
    #[arg(long)]
    rules: bool,
    /// Where to keep how far it is; DIR.pontoon-restore if not given.
    #[arg(long, value_name = "PATH")]
    state: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct ExportArgs {
    /// A new file, packed if it ends with .gz; or - for stdout.
    #[arg(value_name = "FILE|-")]
    file: PathBuf,
    /// Only these predicates, by commas or several times.
    #[arg(long, value_name = "PREDICATE", value_delimiter = ',')]
    predicate: Vec<String>,
    /// Leave out rows and records that are not RDF: loading could not bring them back.
    #[arg(long)]
    skip_foreign: bool,
    /// As for `pontoon backup`.
    #[arg(long, value_name = "BUDGET", default_value = "", hide_default_value = true)]
    budget: String,
}

impl From<BackupError> for Failure {
    fn from(error: BackupError) -> Self {
        match error {
            BackupError::Cluster(error) => error.into(),
            error if error.is_refusal() => Failure::new(Failure::REFUSED, error.to_string()),
            error => Failure::error(error.to_string()),
        }
    }
}

impl From<ExportError> for Failure {
    fn from(error: ExportError) -> Self {
        match error {
            ExportError::Cluster(error) => error.into(),
            error @ ExportError::Foreign { .. } => Failure::new(Failure::REFUSED, error.to_string()),
            error => Failure::error(error.to_string()),
        }
    }
}

pub(super) async fn run(context: &Context, args: BackupArgs) -> Result<Done, Failure> {
    match args.command {
        Some(BackupCommand::List { path, predicates }) => {
            blocking(move || backup::list(&path)).await.map(|found| listed(found, predicates))
        }
        Some(BackupCommand::Prune { path, keep, keep_days, dry_run }) => {
            prune(path, keep, keep_days, dry_run).await
        }
        Some(BackupCommand::Verify(args)) => verify(context, args).await,
        None => {
            let path = args.path.unwrap_or_default();
            take(context, &path, BackupOptions { predicates: args.predicate, budget: args.budget }).await
        }
    }
}

async fn take(context: &Context, path: &Path, options: BackupOptions) -> Result<Done, Failure> {
    let client = context.client().await?;
    let bar = percent_bar(0, "backing up [{bar:32}] {bytes} of about {total_bytes}, {elapsed}");
    let report = backup::take(&client, path, &options, |step| match step {
        Step::Begins { bytes, .. } => bar.set_length(bytes),
        Step::Passed(bytes) => bar.set_position(bytes),
        Step::Done(_) => {}
    })
    .await;
    bar.finish_and_clear();
    let report = report?;
    let manifest = &report.manifest;
    let mut text = table(&HEAD, &rows_of(manifest));
    text.push_str(&format!(
        "\nbackup {}: {} rows, {} in {} chunks; {} chunks are new, {} read, {} stored, {:.1} s",
        manifest.id,
        manifest.rows(),
        bytes(manifest.bytes()),
        report.chunks,
        report.new_chunks,
        bytes(report.read_bytes),
        bytes(report.stored_bytes),
        report.seconds,
    ));
    for (name, why) in &report.skipped {
        text.push_str(&format!("\nleft out: {name}: {why}"));
    }
    if !report.unnoted.is_empty() {
        text.push_str(&format!("\nthe cluster has no event of it: {}", report.unnoted));
    }
    let mut json = json!(report);
    json["backup"] = summary(manifest, true);
    Ok(Done::new(text, json))
}

const HEAD: [&str; 6] = ["predicate", "kind", "index", "rows", "bytes", "hash"];

fn rows_of(manifest: &Manifest) -> Vec<Vec<String>> {
    let row = |found: &backup::PredicateBackup| {
        vec![
            found.predicate.clone(),
            found.kind.clone(),
            found.index.to_string(),
            found.rows.to_string(),
            bytes(found.bytes),
            found.hash.chars().take(12).collect(),
        ]
    };
    manifest.predicates.iter().map(row).collect()
}

fn summary(manifest: &Manifest, predicates: bool) -> Value {
    let mut json = json!({
        "id": manifest.id,
        "begun_ms": manifest.begun_ms,
        "cluster": manifest.cluster,
        "all": manifest.all,
        "rows": manifest.rows(),
        "bytes": manifest.bytes(),
    });
    if predicates {
        let one = |found: &backup::PredicateBackup| {
            json!({
                "predicate": found.predicate,
                "kind": found.kind,
                "index": found.index,
                "rows": found.rows,
                "bytes": found.bytes,
                "hash": found.hash,
                "offsets": found.offsets,
                "chunks": found.chunks.len(),
            })
        };
        json["predicates"] = manifest.predicates.iter().map(one).collect();
    }
    json
}

fn listed(found: Vec<(String, Result<Manifest, BackupError>)>, predicates: bool) -> Done {
    let mut rows = Vec::new();
    let mut json = Vec::new();
    let mut tables = String::new();
    for (id, manifest) in &found {
        match manifest {
            Ok(manifest) => {
                rows.push(vec![
                    id.clone(),
                    manifest.begun(),
                    if manifest.all { "all" } else { "some" }.to_owned(),
                    manifest.predicates.len().to_string(),
                    manifest.rows().to_string(),
                    bytes(manifest.bytes()),
                    manifest.cluster.clone(),
                ]);
                json.push(summary(manifest, predicates));
                if predicates {
                    tables.push_str(&format!("\n\n{id}\n{}", table(&HEAD, &rows_of(manifest))));
                }
            }
            Err(error) => {
                tables.push_str(&format!("\n{id}: {error}"));
                json.push(json!({ "id": id, "error": error.to_string() }));
            }
        }
    }
    let head = ["backup", "begun", "what", "predicates", "rows", "bytes", "cluster"];
    Done::new(table(&head, &rows) + &tables, json!({ "backups": json }))
}

async fn prune(
    path: PathBuf,
    keep: Option<usize>,
    keep_days: Option<u32>,
    dry_run: bool,
) -> Result<Done, Failure> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let since = keep_days.map(|days| now.saturating_sub(DAY * days));
    let kept =
        Kept { last: keep.unwrap_or(0), since_ms: since.map(|since| since.as_millis() as u64), dry_run };
    let report = blocking(move || backup::prune(&path, kept)).await?;
    let verb = if dry_run { "would go" } else { "are gone" };
    let mut text = format!(
        "{} backups {verb}, {} stay; {} chunks with {} {verb}",
        report.removed.len(),
        report.kept.len(),
        report.chunks,
        bytes(report.bytes)
    );
    for id in &report.removed {
        text.push_str(&format!("\n  {id}"));
    }
    Ok(Done::new(text, json!(report)))
}

pub(super) async fn verify(context: &Context, args: VerifyArgs) -> Result<Done, Failure> {
    let options = VerifyOptions { backup: args.backup };
    let report = {
        let (path, options) = (args.path.clone(), options.clone());
        blocking(move || backup::verify(&path, &options)).await?
    };
    let mut text = format!(
        "{} backups, {} predicates: {} chunks with {} read and hashed",
        report.backups,
        report.predicates,
        report.chunks,
        bytes(report.bytes)
    );
    let mut done = Done::new(String::new(), json!(report));
    if report.damage.is_empty() {
        text.push_str("; all is well");
    } else {
        done.code = 1;
        let row = |found: &backup::Damage| {
            let predicate = if found.predicate.is_empty() { "all of it" } else { &found.predicate };
            vec![found.backup.clone(), predicate.to_owned(), found.rows.to_string(), found.what.clone()]
        };
        let rows: Vec<_> = report.damage.iter().map(row).collect();
        text.push_str(&format!("\n{}", table(&["backup", "predicate", "rows lost", "damage"], &rows)));
        text.push_str(
            "\nthe other predicates can be restored (--predicate); remove the files that are named, and the next backup stores anew \
             what the cluster still has of them",
        );
    }
    if args.deep {
        let client = context.client().await?;
        let compared = compare(&client, &args.path, &options).await?;
        let rows: Vec<_> = compared
            .iter()
            .map(|one| {
                let (then, now) = one.rows;
                vec![one.predicate.clone(), then.to_string(), now.to_string(), one.state.clone()]
            })
            .collect();
        text.push_str(&format!("\n{}", table(&["predicate", "rows then", "rows now", "state"], &rows)));
        done.json["compared"] = json!(compared);
        if compared.iter().any(|one| one.state != "same") {
            done.code = 1;
        }
    }
    done.text = text;
    Ok(done)
}

pub(super) async fn restore(context: &Context, args: RestoreArgs) -> Result<Done, Failure> {
    let client = context.client().await?;
    let options = RestoreOptions {
        backup: args.backup,
        predicates: args.predicate,
        rename: args.rename,
        replace: args.replace,
        rules: args.rules,
        state: args.state,
    };
    let say = Say::of(context);
    let bar = percent_bar(0, "restoring {bytes}, {elapsed}");
    let report = backup::restore(&client, &args.path, &options, |written, done| {
        bar.set_position(written);
        if let Some(done) = done {
            bar.suspend(|| say.step(&format!("{}: {} rows, read back and the same", done.name, done.rows)));
        }
    })
    .await;
    bar.finish_and_clear();
    let report = report?;
    let row = |one: &backup::Restored| {
        vec![
            one.name.clone(),
            if one.name == one.predicate { String::new() } else { one.predicate.clone() },
            one.kind.clone(),
            one.rows.to_string(),
            bytes(one.bytes),
            one.hash.chars().take(12).collect(),
        ]
    };
    let rows: Vec<_> = report.predicates.iter().map(row).collect();
    let mut text = table(&["restored", "of", "kind", "rows", "bytes", "hash"], &rows);
    text.push_str(&format!(
        "\nbackup {}: {} written in {:.1} s{}; every predicate was read back and is as the backup has it",
        report.backup,
        bytes(report.written_bytes),
        report.seconds,
        if report.resumed { ", going on where an earlier run ended" } else { "" }
    ));
    if report.rules {
        text.push_str("\nthe placement rules are set, see `pontoon rules`");
    }
    Ok(Done::new(text, json!(report)))
}

pub(super) async fn run_export(context: &Context, args: ExportArgs) -> Result<Done, Failure> {
    let options =
        ExportOptions { predicates: args.predicate, skip_foreign: args.skip_foreign, budget: args.budget };
    let to_stdout = args.file.as_os_str() == "-";
    if to_stdout && context.json {
        return Err(Failure::new(
            Failure::REFUSED,
            "--json and the rows cannot both go to stdout: name a file",
        ));
    }
    let client = context.client().await?;
    let bar = percent_bar(0, "exporting {bytes}, {elapsed}");
    let show = |bytes| bar.set_position(bytes);
    let report = if to_stdout {
        let mut out = std::io::BufWriter::new(std::io::stdout());
        export(&client, &mut out, &options, show).await.map_err(Failure::from)
    } else {
        to_file(&client, &args.file, &options, show).await
    };
    bar.finish_and_clear();
    let report = report?;
    let rows: Vec<_> = report
        .predicates
        .iter()
        .map(|one| {
            let (triples, foreign) = (one.triples.to_string(), one.foreign.to_string());
            vec![one.predicate.clone(), one.index.to_string(), triples, foreign]
        })
        .collect();
    let mut text = table(&["predicate", "index", "triples", "not RDF"], &rows);
    text.push_str(&format!(
        "\n{} triples, {} of lines in {:.1} s; {} rows or records are not RDF and left out",
        report.triples,
        bytes(report.bytes),
        report.seconds,
        report.foreign
    ));
    for (name, why) in &report.skipped {
        text.push_str(&format!("\nleft out: {name}: {why}"));
    }
    if to_stdout {
        drop(writeln!(std::io::stderr(), "{text}"));
        return Ok(Done::new("", Value::Null));
    }
    let mut json = json!(report);
    json["file"] = json!(args.file.to_string_lossy());
    Ok(Done::new(text, json))
}

/// Writes beside the file and gives it its name when it is whole and durable.
async fn to_file(
    client: &pontoon_node::client::Client,
    path: &Path,
    options: &ExportOptions,
    show: impl FnMut(u64) + Send,
) -> Result<pontoon_node::export::ExportReport, Failure> {
    let failed = |error: std::io::Error| {
        let text = format!("{}: {error}", path.display());
        match error.kind() {
            std::io::ErrorKind::AlreadyExists => Failure::new(Failure::REFUSED, text),
            _ => Failure::error(text),
        }
    };
    let mut file = ExportFile::create(path).map_err(failed)?;
    let report = export(client, &mut file, options, show).await?;
    file.finish().map_err(failed)?;
    Ok(report)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BackupError> + Send + 'static,
) -> Result<T, Failure> {
    let done = tokio::task::spawn_blocking(work).await;
    Ok(done.map_err(|error| Failure::error(error.to_string()))??)
}
