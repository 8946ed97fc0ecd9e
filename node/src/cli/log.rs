//! `pontoon log create|drop|list|append|read|tail|truncate|reset|mirror`.

use std::{
    io::{BufRead, BufReader},
    time::{Duration, Instant},
};

use bytes::Bytes;
use clap::{Args, Subcommand};
use futures::future::join_all;
use pontoon_node::{
    client::{Client, ConnectOptions, Log, MirrorError, mirror},
    json::node_ids,
    shutdown_signal,
};
use pontoon_proto::v1;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::{
    Context, Done, Failure, ReadArgs, address,
    cluster::places,
    output::{bytes, json_of, print_line, table, text_of},
    tls::FromTlsArgs,
};

/// How many lines and bytes of stdin one append carries at most.
const APPEND_LINES: usize = 1_000;
const APPEND_BYTES: usize = 512 << 10;
/// How many lines wait for the cluster at most.
const LINES_AHEAD: usize = 4_096;
/// How often a mirror says how far it is.
const EVERY: Duration = Duration::from_secs(1);

#[derive(Debug, Subcommand)]
pub(super) enum LogCommand {
    /// Make a log, if it does not exist.
    Create {
        /// The name.
        name: String,
        /// How many replicas it shall have; 0: three.
        #[arg(long, default_value_t = 0)]
        replicas: u32,
    },
    /// Drop a log with all its records.
    Drop {
        /// The name.
        name: String,
    },
    /// The logs, and which offsets they have.
    List,
    /// Append records, in order: those given, or each line of stdin.
    Append(AppendArgs),
    /// Read records from an offset on.
    Read(RangeArgs),
    /// Follow a log: print each record that is appended, through changes of leader and moves, until Ctrl-C.
    Tail(TailArgs),
    /// Drop every record below an offset. The others keep their offsets.
    Truncate {
        /// The name.
        name: String,
        /// The lowest offset that stays.
        #[arg(long, value_name = "OFFSET")]
        below: u64,
    },
    /// Drop every record and begin anew at an offset. Whoever follows the log is told.
    Reset {
        /// The name.
        name: String,
        /// The offset of the next record.
        #[arg(long, value_name = "OFFSET", default_value_t = 0)]
        at: u64,
    },
    /// Copy a log of another cluster into this one, at the same offsets, and keep at it until Ctrl-C. Run it again to go
    /// on after a kill.
    Mirror(MirrorArgs),
}

#[derive(Debug, Args)]
pub(super) struct AppendArgs {
    /// The name.
    name: String,
    /// The records; without any, each line of stdin is one.
    records: Vec<String>,
    /// Append only if the first record gets this offset.
    #[arg(long, value_name = "OFFSET", requires = "records")]
    expect_offset: Option<u64>,
}

#[derive(Debug, Args)]
pub(super) struct RangeArgs {
    /// The name.
    name: String,
    /// The first offset; the log's lowest if not given.
    #[arg(long, value_name = "OFFSET")]
    from: Option<u64>,
    /// Only offsets below this.
    #[arg(long, value_name = "OFFSET")]
    to: Option<u64>,
    /// At most so many records; 0: all.
    #[arg(long, default_value_t = 100)]
    limit: u64,
    #[command(flatten)]
    read: ReadArgs,
}

#[derive(Debug, Args)]
pub(super) struct TailArgs {
    /// The name.
    name: String,
    /// The first offset; only what is appended from now on if not given.
    #[arg(long, value_name = "OFFSET")]
    from: Option<u64>,
    /// End after so many records.
    #[arg(long, value_name = "N")]
    count: Option<u64>,
}

#[derive(Debug, Args)]
pub(super) struct MirrorArgs {
    /// The log of the other cluster.
    source: String,
    /// A node of the other cluster, HOST:PORT; several by commas. The copy is made in the cluster at --addr.
    #[arg(long, value_name = "ADDR", required = true, value_delimiter = ',', value_parser = address)]
    from_cluster: Vec<String>,
    /// The log here, made if it does not exist; of the same name if not given.
    #[arg(long, value_name = "NAME")]
    to: Option<String>,
    /// End when everything is copied that is there at the start.
    #[arg(long)]
    once: bool,
    #[command(flatten)]
    from_tls: FromTlsArgs,
}

pub(super) async fn run(context: &Context, command: LogCommand) -> Result<Done, Failure> {
    let client = context.client().await?;
    match command {
        LogCommand::Create { name, replicas } => {
            let kind = v1::ShardKind::Log.into();
            let request =
                v1::CreatePredicateRequest { predicate: name.clone(), replicas, kind, ..Default::default() };
            let shard = client.create_predicate(request).await?.shard.unwrap_or_default();
            Ok(Done::new(
                format!(
                    "the log {name} is served by group {} on nodes {}",
                    shard.group,
                    places(&shard.voters)
                ),
                json!({ "log": name, "group": shard.group, "nodes": node_ids(&shard.voters) }),
            ))
        }
        LogCommand::Drop { name } => {
            client.log(&name).drop_log().await?;
            Ok(Done::new(format!("{name} is dropped"), json!({ "log": name, "dropped": true })))
        }
        LogCommand::List => list(&client).await,
        LogCommand::Append(args) => append(&client, args).await,
        LogCommand::Read(args) => read(&client, args).await,
        LogCommand::Tail(args) => tail(context, &client, args).await,
        LogCommand::Truncate { name, below } => {
            let bounds = client.log(&name).truncate(below).await?;
            Ok(Done::new(
                format!("{name} has the offsets [{}, {})", bounds.lowest, bounds.next),
                json!({ "log": name, "lowest": bounds.lowest, "next": bounds.next }),
            ))
        }
        LogCommand::Reset { name, at } => {
            let bounds = client.log(&name).reset(at).await?;
            Ok(Done::new(
                format!("{name} is empty and goes on at offset {}, in era {}", bounds.next, bounds.era),
                json!({ "log": name, "lowest": bounds.lowest, "next": bounds.next, "era": bounds.era }),
            ))
        }
        LogCommand::Mirror(args) => copy(context, &client, args).await,
    }
}

async fn list(client: &Client) -> Result<Done, Failure> {
    let views = client.predicates(v1::PredicatesRequest::default()).await?.predicates;
    let logs = views
        .into_iter()
        .filter(|view| view.shard.as_ref().is_some_and(|shard| shard.kind == i32::from(v1::ShardKind::Log)));
    let logs = join_all(logs.map(async |view| {
        let shard = view.shard.unwrap_or_default();
        // A log without a leader is listed all the same, without its offsets.
        let bounds = client.log(&shard.predicate).bounds().await.ok();
        (shard, view.leader_node, view.bytes, bounds)
    }))
    .await;
    let rows: Vec<Vec<String>> = logs
        .iter()
        .map(|(shard, leader, size, bounds)| {
            let offset = |of: Option<u64>| of.map_or("-".to_owned(), |offset| offset.to_string());
            vec![
                shard.predicate.clone(),
                shard.group.to_string(),
                places(&shard.voters),
                if *leader == 0 { "-".to_owned() } else { leader.to_string() },
                offset(bounds.map(|bounds| bounds.lowest)),
                offset(bounds.map(|bounds| bounds.next)),
                bytes(*size),
            ]
        })
        .collect();
    let json: Vec<Value> = logs
        .iter()
        .map(|(shard, leader, size, bounds)| {
            json!({
                "log": shard.predicate,
                "group": shard.group,
                "nodes": node_ids(&shard.voters),
                "leader": leader,
                "bytes": size,
                "lowest": bounds.map(|bounds| bounds.lowest),
                "next": bounds.map(|bounds| bounds.next),
                "era": bounds.map(|bounds| bounds.era),
            })
        })
        .collect();
    let text = match rows.is_empty() {
        true => "there are no logs; `pontoon log create NAME` makes one".to_owned(),
        false => table(&["log", "group", "nodes", "leader", "lowest", "next", "bytes"], &rows),
    };
    Ok(Done::new(text, json!({ "logs": json })))
}

async fn append(client: &Client, args: AppendArgs) -> Result<Done, Failure> {
    let log = client.log(&args.name);
    let (first, next) = if args.records.is_empty() {
        append_lines(&log).await?
    } else {
        let appended = match args.expect_offset {
            Some(expected) => log.append_at(expected, args.records).await?,
            None => log.append(args.records).await?,
        };
        (Some(appended.first), appended.next)
    };
    let count = first.map_or(0, |first| next - first);
    let text = match (first, count) {
        (None, _) => "stdin was empty, nothing is appended".to_owned(),
        (Some(first), 1) => format!("appended at offset {first}"),
        (Some(first), _) => format!("{count} records appended, offsets {first} to {}", next - 1),
    };
    Ok(Done::new(text, json!({ "log": args.name, "first": first, "next": next, "records": count })))
}

/// Appends the lines of stdin as they come: those that wait travel together. The offset of the first one, and the one
/// after the last; others may append in between.
async fn append_lines(log: &Log) -> Result<(Option<u64>, u64), Failure> {
    // Asked first: a mistake in the name is told before anything is read.
    let mut next = log.bounds().await?.next;
    let mut lines = lines_of_stdin();
    let (mut first, mut left) = (None, None);
    while let Some(line) = match left.take() {
        Some(line) => Some(line),
        None => lines.recv().await,
    } {
        let mut records = vec![line?];
        let mut size = records[0].len();
        while records.len() < APPEND_LINES
            && let Ok(line) = lines.try_recv()
        {
            let line = line?;
            if size + line.len() > APPEND_BYTES {
                left = Some(Ok(line));
                break;
            }
            size += line.len();
            records.push(line);
        }
        let appended = log.append(records).await.map_err(|error| {
            let failure = Failure::from(error);
            let so_far = first.map_or("nothing was appended before".to_owned(), |_| {
                format!("the lines before are appended, up to offset {}", next - 1)
            });
            Failure { text: format!("{} ({so_far})", failure.text), ..failure }
        })?;
        first = first.or(Some(appended.first));
        next = appended.next;
    }
    Ok((first, next))
}

fn lines_of_stdin() -> mpsc::Receiver<Result<Bytes, Failure>> {
    let (sender, receiver) = mpsc::channel(LINES_AHEAD);
    // A thread of its own: it may wait for somebody's typing while the process ends.
    std::thread::spawn(move || {
        let mut stdin = BufReader::new(std::io::stdin().lock());
        loop {
            let mut line = Vec::new();
            let line = match stdin.read_until(b'\n', &mut line) {
                Ok(0) => return,
                Ok(_) => {
                    if line.last() == Some(&b'\n') {
                        line.pop();
                    }
                    Ok(Bytes::from(line))
                }
                Err(error) => Err(Failure::error(format!("stdin cannot be read: {error}"))),
            };
            let ends = line.is_err();
            if sender.blocking_send(line).is_err() || ends {
                return;
            }
        }
    });
    receiver
}

async fn read(client: &Client, args: RangeArgs) -> Result<Done, Failure> {
    let log = client.with_reads(args.read.reads()).log(&args.name);
    let bounds = log.bounds().await?;
    let first = args.from.unwrap_or(bounds.lowest);
    let limit = if args.limit == 0 { u64::MAX } else { args.limit };
    let (mut records, mut next, mut bounds) = (Vec::new(), first, bounds);
    // What is appended while this reads is left to the next one.
    let end = args.to.unwrap_or(bounds.next).min(first.saturating_add(limit));
    loop {
        let page = log
            .read(next, Some(end), u32::try_from(end.saturating_sub(next)).unwrap_or(0).min(10_000))
            .await?;
        (next, bounds) = (page.next(), page.bounds);
        let ends = page.records.is_empty() || next >= end;
        records.extend(page.records);
        if ends {
            break;
        }
    }
    let mut lines: Vec<String> =
        (first..).zip(&records).map(|(offset, record)| line(offset, record)).collect();
    if lines.is_empty() {
        lines.push(format!("no records; {} has the offsets [{}, {})", args.name, bounds.lowest, bounds.next));
    } else if next < bounds.next && args.to.is_none_or(|to| next < to) {
        lines.push(format!("more follow from offset {next}; --limit 0 prints all"));
    }
    let records: Vec<Value> = (first..)
        .zip(&records)
        .map(|(offset, record)| json!({ "offset": offset, "record": json_of(record) }))
        .collect();
    let json = json!({
        "log": args.name,
        "records": records,
        "lowest": bounds.lowest,
        "next": bounds.next,
        "era": bounds.era,
    });
    Ok(Done::new(lines.join("\n"), json))
}

fn line(offset: u64, record: &[u8]) -> String {
    format!("{offset}\t{}", text_of(record))
}

async fn tail(context: &Context, client: &Client, args: TailArgs) -> Result<Done, Failure> {
    let log = client.log(&args.name);
    let from = match args.from {
        Some(from) => from,
        None => log.bounds().await?.next,
    };
    let mut tail = log.tail(from);
    let mut signal = std::pin::pin!(shutdown_signal());
    let mut left = args.count.unwrap_or(u64::MAX);
    while left > 0 {
        let (offset, record) = tokio::select! {
            found = tail.next() => found.map_err(|error| {
                let (failure, next) = (Failure::from(error), tail.position());
                if next == from {
                    return failure;
                }
                let text = format!("{} (printed up to offset {}: --from {next} goes on)", failure.text, next - 1);
                Failure { text, ..failure }
            })?,
            _ = &mut signal => break,
        };
        print_line(&match context.json {
            true => json!({ "offset": offset, "record": json_of(&record) }).to_string(),
            false => line(offset, &record),
        });
        left -= 1;
    }
    let next = tail.position();
    Ok(Done::new("", json!({ "log": args.name, "records": next - from, "next": next })))
}

async fn copy(context: &Context, here: &Client, args: MirrorArgs) -> Result<Done, Failure> {
    let mut options = ConnectOptions::default();
    options.tls = args.from_tls.clone().files(context.tls.as_ref())?;
    let there = Client::connect_with(args.from_cluster.iter().cloned(), options).await.map_err(|error| {
        let failure = Failure::from(error);
        Failure { text: format!("--from-cluster: {}", failure.text), ..failure }
    })?;
    let there = there.with_deadline(context.timeout);
    let to = args.to.as_deref().unwrap_or(&args.source);
    same_cluster(&there, here, &args.source, to).await?;
    let from = there.log(&args.source);
    // Before anything is made here: a log that is not there cannot be mirrored.
    let bounds = from.bounds().await.map_err(|error| {
        let failure = Failure::from(error);
        let asked = args.from_cluster.join(",");
        Failure { text: format!("at {asked}: {}", failure.text), ..failure }
    })?;
    let to = here.create_log(to, 0).await?;
    let mut said: Option<Instant> = None;
    let mut last = Default::default();
    let run = mirror(&from, &to, args.once.then_some(bounds.next), |done| {
        last = done;
        if !context.json && said.is_none_or(|said| said.elapsed() >= EVERY) {
            said = Some(Instant::now());
            print_line(&format!("{} is mirrored up to offset {}", from.name(), done.next));
        }
    });
    let ended = tokio::select! {
        ended = run => ended.map(drop),
        _ = shutdown_signal() => Ok(()),
    };
    match ended {
        Ok(()) => Ok(Done::new(
            format!(
                "{} is mirrored up to offset {}: {} records appended",
                args.source, last.next, last.appended
            ),
            json!({ "log": to.name(), "next": last.next, "appended": last.appended }),
        )),
        Err(MirrorError::Client(error)) => Err(error.into()),
        Err(error) => Err(Failure::new(Failure::STUCK, error.to_string())),
    }
}

/// A log is no mirror of itself.
async fn same_cluster(there: &Client, here: &Client, from: &str, to: &str) -> Result<(), Failure> {
    if from != to {
        return Ok(());
    }
    let (there, here) = (there.status(v1::StatusRequest {}), here.status(v1::StatusRequest {}));
    let (there, here) = tokio::try_join!(there, here)?;
    match there.cluster == here.cluster {
        true => Err(Failure::new(
            Failure::REFUSED,
            format!(
                "--from-cluster and --addr are the same cluster, where {from} is itself; name another log with --to"
            ),
        )),
        false => Ok(()),
    }
}
