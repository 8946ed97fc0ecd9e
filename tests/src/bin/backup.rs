//! What a backup and a restore cost: three nodes in this process, a predicate of random rows, a backup of it, a second one after one
//! row in a hundred has changed, and a restore into three other nodes; beside a plain synced copy of the same bytes.
//!
//! `cargo run --release -p pontoon-tests --bin backup -- --mib 256`

use std::{
    error::Error,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::Instant,
};

use clap::Parser;
use pontoon_node::{
    Node, NodeConfig,
    backup::{self, BackupOptions, RestoreOptions, VerifyOptions},
    client::{Client, put},
};

/// That of the program.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

const NODES: usize = 3;
/// Of a row's key and value.
const VALUE_BYTES: usize = 1_000;
/// Rows of one write, and writes of one call.
const ROWS: usize = 200;
const WRITES: usize = 16;

#[derive(Debug, Parser)]
struct Args {
    /// How much the predicate holds.
    #[arg(long, default_value_t = 256)]
    mib: usize,
    /// Where everything lies; a temporary directory if not given.
    #[arg(long)]
    dir: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> Outcome<()> {
    let args = Args::parse();
    let temporary = tempfile::tempdir()?;
    let dir = args.dir.clone().unwrap_or_else(|| temporary.path().to_owned());
    let count = (args.mib << 20) / (VALUE_BYTES + 12 + 8);
    let (nodes, client) = cluster(&dir.join("from")).await?;
    fill(&client, 0..count, 1, 0).await?;
    let backups = dir.join("backups");
    let options = BackupOptions { budget: "max".to_owned(), ..BackupOptions::default() };

    let first = backup::take(&client, &backups, &options, |_| {}).await?;
    let bytes = first.manifest.bytes();
    tell("backup", bytes, first.seconds);
    println!("  {} chunks, {} bytes stored of {bytes}", first.chunks, first.stored_bytes);
    let begun = Instant::now();
    let copied = copy(&backups.join("chunks"), &dir.join("copy"))?;
    let seconds = begun.elapsed().as_secs_f64();
    tell("plain synced copy of what it stored", copied, seconds);
    println!("  the backup took {:.1} times as long", first.seconds / seconds.max(1e-9));
    let begun = Instant::now();
    let verified = backup::verify(&backups, &VerifyOptions::default())?;
    tell("verify", verified.bytes, begun.elapsed().as_secs_f64());

    // One row in a hundred, anywhere and side by side.
    for (salt, (rows, step, where_)) in
        (1..).zip([(0..count, 100, "anywhere"), (0..count / 100, 1, "side by side")])
    {
        fill(&client, rows, step, salt).await?;
        let next = backup::take(&client, &backups, &options, |_| {}).await?;
        println!(
            "backup after 1 % of the rows changed, {where_}: {} of {} chunks are new, {} bytes stored, {:.1} % of the first one's, in \
             {:.2} s, {:.0} % of its time",
            next.new_chunks,
            next.chunks,
            next.stored_bytes,
            percent(next.stored_bytes as f64, first.stored_bytes as f64),
            next.seconds,
            percent(next.seconds, first.seconds),
        );
    }
    drop(client);
    for node in nodes {
        node.shutdown().await?;
    }

    let (nodes, client) = cluster(&dir.join("to")).await?;
    let restored = backup::restore(&client, &backups, &RestoreOptions::default(), |_, _| {}).await?;
    tell("restore, read back", restored.written_bytes, restored.seconds);
    drop(client);
    for node in nodes {
        node.shutdown().await?;
    }
    Ok(())
}

async fn cluster(dir: &Path) -> Outcome<(Vec<Node>, Client)> {
    let mut nodes: Vec<Node> = Vec::new();
    for number in 0..NODES {
        let config = NodeConfig::new(dir.join(number.to_string()), "127.0.0.1:0");
        nodes.push(match nodes.first() {
            None => Node::start(config).await?,
            Some(first) => Node::start(config.joining(first.address())).await?,
        });
    }
    let client = nodes[0].client().await?.with_deadline(std::time::Duration::from_secs(60));
    client.create_map("rows", NODES as u32).await?;
    client.wait_for_leader("rows").await?;
    Ok((nodes, client))
}

/// Writes every so many-th row.
async fn fill(client: &Client, rows: std::ops::Range<usize>, step: usize, salt: u64) -> Outcome<()> {
    let rows: Vec<usize> = rows.step_by(step).collect();
    for part in rows.chunks(ROWS * WRITES) {
        let write = |rows: &[usize]| {
            let ops = rows.iter().map(|row| put(format!("row-{row:08}"), value(*row, salt)));
            ("rows".to_owned(), ops.collect())
        };
        for written in client.write_many(part.chunks(ROWS).map(write).collect()).await {
            written?;
        }
    }
    Ok(())
}

/// Nothing that could be packed.
fn value(row: usize, salt: u64) -> Vec<u8> {
    let mut value = vec![0; VALUE_BYTES];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&row.to_le_bytes()).update(&salt.to_le_bytes());
    hasher.finalize_xof().fill(&mut value);
    value
}

/// Copies all files below a directory into one file, synced once at the end. Returns its bytes.
fn copy(from: &Path, to: &Path) -> Outcome<u64> {
    let (mut bytes, mut file, mut dirs) = (0, File::create(to)?, vec![from.to_owned()]);
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            match path.is_dir() {
                true => dirs.push(path),
                false => bytes += io::copy(&mut File::open(path)?, &mut file)?,
            }
        }
    }
    file.sync_all()?;
    Ok(bytes)
}

fn percent(part: f64, whole: f64) -> f64 {
    part * 100.0 / whole.max(1e-9)
}

fn tell(what: &str, bytes: u64, seconds: f64) {
    println!("{what}: {bytes} bytes in {seconds:.2} s, {:.0} MB/s", bytes as f64 / 1e6 / seconds.max(1e-9));
}
