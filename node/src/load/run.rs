//! Reader and writers of a load.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use futures::StreamExt;
use pontoon_proto::v1;
use serde::Serialize;
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;

use super::{LoadError, chunk::Chunk, progress::Progress};
use crate::{client::Client, rdf::Lines};

/// How many chunks are on their way at once. With the reader's own two this bounds a load's memory.
const CHUNKS_IN_FLIGHT: usize = 4;
const CHUNKS_AHEAD: usize = 2;
/// How often the progress file is replaced.
const SAVE_EVERY: Duration = Duration::from_millis(500);
/// How long one batch may take: a load outlives an election or two.
const PATIENCE: Duration = Duration::from_secs(60);

/// How to load.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// The progress file; `None`: the input's name with `.pontoon-load` behind it.
    pub state: Option<PathBuf>,
    /// How many bad lines are tolerated.
    pub skip_bad: u64,
}

/// A line that was tolerated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SkippedLine {
    /// Counted from 1.
    pub line: u64,
    /// What is wrong with it.
    pub reason: String,
}

/// What a load did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct LoadReport {
    /// Statements of the whole file, with those of earlier runs.
    pub triples: u64,
    /// Statements that this run wrote.
    pub loaded: u64,
    /// The line that this run went on after, 0 if it began at the beginning.
    pub resumed_after_line: u64,
    /// Lines of the whole file.
    pub lines: u64,
    /// Bad lines that this run tolerated.
    pub skipped: Vec<SkippedLine>,
    /// How long this run took.
    pub seconds: f64,
    /// Statements per second of this run.
    pub triples_per_s: f64,
}

/// How far a load is, for whoever shows it.
#[derive(Debug)]
pub enum LoadStep<'a> {
    /// It begins: the size of the file, and a count of the bytes read from it.
    Begins {
        /// Bytes of the file itself.
        file_bytes: u64,
        /// Bytes of it that were read.
        read: Arc<AtomicU64>,
        /// The line after which it goes on, 0 at the beginning.
        after_line: u64,
    },
    /// So many statements are acknowledged.
    Loaded(u64),
    /// A bad line is tolerated.
    Skipped(&'a SkippedLine),
}

/// Loads a file, from where an earlier run was ended if there was one.
///
/// On return every statement of the file is durable in its predicate's group, and the progress file is gone. After an
/// error or a kill the same call goes on after the last acknowledged stretch.
///
/// # Errors
/// [`LoadError`] names the place. What was acknowledged stays loaded.
pub async fn load(
    client: &Client,
    path: &Path,
    options: &LoadOptions,
    mut show: impl FnMut(LoadStep<'_>) + Send,
) -> Result<LoadReport, LoadError> {
    let begun = Instant::now();
    let state = options.state.clone().unwrap_or_else(|| {
        let mut name = path.as_os_str().to_owned();
        name.push(".pontoon-load");
        PathBuf::from(name)
    });
    let mut lines = Lines::open(path)?;
    let cluster = client.status(v1::StatusRequest {}).await?.cluster;
    let cluster = uuid::Uuid::from_slice(&cluster).map(|id| id.to_string()).unwrap_or_default();
    let mut progress = Progress::new(cluster, lines.file_bytes()).resume(&state)?;
    let mut report = LoadReport { resumed_after_line: progress.line, ..LoadReport::default() };
    show(LoadStep::Begins {
        file_bytes: lines.file_bytes(),
        read: lines.progress(),
        after_line: progress.line,
    });
    let (chunks, parsed) = mpsc::channel(CHUNKS_AHEAD);
    let tolerated = options.skip_bad.saturating_sub(progress.skipped);
    let (position, line, path_of_reader) = (progress.position, progress.line, path.to_owned());
    let reader = tokio::task::spawn_blocking(move || {
        let end = lines
            .skip_to(position, line)
            .map_err(LoadError::from)
            .and_then(|()| read_chunks(&mut lines, &path_of_reader, tolerated, &chunks));
        if let Err(error) = end {
            // Whoever is gone does not want to know.
            drop(chunks.blocking_send(Err(error)));
        }
    });

    let client = client.with_deadline(PATIENCE);
    let mut acknowledged = ReceiverStream::new(parsed)
        .map(async |read| match read {
            Ok((chunk, skipped)) => write_chunk(&client, chunk).await.map(|chunk| (chunk, skipped)),
            Err(error) => Err(error),
        })
        .buffered(CHUNKS_IN_FLIGHT);
    let mut saved = Instant::now();
    let mut failed = None;
    // In the order of the file: what is before an acknowledged chunk is acknowledged.
    while let Some(end) = acknowledged.next().await {
        let (chunk, skipped): (Chunk, Vec<SkippedLine>) = match end {
            Ok(end) => end,
            Err(error) => {
                failed = Some(error);
                break;
            }
        };
        (progress.position, progress.line) = (chunk.next, chunk.last_line);
        progress.triples += chunk.triples;
        progress.skipped += skipped.len() as u64;
        report.loaded += chunk.triples;
        skipped.iter().for_each(|line| show(LoadStep::Skipped(line)));
        report.skipped.extend(skipped);
        show(LoadStep::Loaded(report.loaded));
        if saved.elapsed() >= SAVE_EVERY {
            progress.save(&state)?;
            saved = Instant::now();
        }
    }
    drop(acknowledged);
    if let Some(mut error) = failed {
        if progress.position > 0 {
            progress.save(&state)?;
        }
        if let LoadError::BadLine { skipped, .. } = &mut error {
            *skipped = report.skipped;
        }
        return Err(error);
    }
    reader.await.expect("the reader does not panic");
    Progress::remove(&state)?;
    report.triples = progress.triples;
    report.lines = progress.line;
    report.seconds = begun.elapsed().as_secs_f64();
    report.triples_per_s = report.loaded as f64 / report.seconds.max(1e-9);
    Ok(report)
}

type Parsed = Result<(Chunk, Vec<SkippedLine>), LoadError>;

/// Cuts the file into chunks until its end, its first intolerable line, or until nobody wants more.
fn read_chunks(
    lines: &mut Lines,
    path: &Path,
    mut tolerated: u64,
    chunks: &mpsc::Sender<Parsed>,
) -> Result<(), LoadError> {
    let (mut chunk, mut skipped) = (Chunk::default(), Vec::new());
    while let Some(line) = lines.next_line()? {
        if let Err(reason) = chunk.add(&line) {
            if tolerated == 0 {
                // What stands before the bad line is loaded; the next run begins with that line.
                if !chunk.is_empty() {
                    drop(chunks.blocking_send(Ok((chunk.finish(), skipped))));
                }
                let skipped = Vec::new();
                return Err(LoadError::BadLine { path: path.to_owned(), line: line.number, reason, skipped });
            }
            tolerated -= 1;
            chunk.pass(&line);
            skipped.push(SkippedLine { line: line.number, reason });
        }
        if chunk.is_full() {
            let full = (std::mem::take(&mut chunk).finish(), std::mem::take(&mut skipped));
            if chunks.blocking_send(Ok(full)).is_err() {
                return Ok(());
            }
        }
    }
    if !chunk.is_empty() {
        drop(chunks.blocking_send(Ok((chunk.finish(), skipped))));
    }
    Ok(())
}

async fn write_chunk(client: &Client, mut chunk: Chunk) -> Result<Chunk, LoadError> {
    let batches = std::mem::take(&mut chunk.batches);
    let names: Vec<String> = batches.iter().map(|(predicate, _)| predicate.clone()).collect();
    for (predicate, outcome) in names.into_iter().zip(client.write_many(batches).await) {
        if let Err(source) = outcome {
            let (first_line, last_line) = (chunk.first_line, chunk.last_line);
            return Err(LoadError::Write { predicate, first_line, last_line, source });
        }
    }
    Ok(chunk)
}
