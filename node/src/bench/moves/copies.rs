//! What the disk, the loopback and the engine do by themselves with as many bytes: nothing that is moved is faster.

use std::{
    fs::File,
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    time::Instant,
};

use bytes::Bytes;
use pontoon_shard::{
    EngineKind,
    engine::{self, Keyspace, Scope},
};

use crate::cli::Failure;

/// Rows that are handed to the engine together: what a chunk of a snapshot aims at.
const CHUNK_BYTES: usize = 4 << 20;
const SPACE: Keyspace = Keyspace(1);

/// The bytes of a row's value: the same for the same number, and not to be compressed.
pub(super) fn value(number: u64, len: usize) -> Bytes {
    let mut value = vec![0; len];
    blake3::Hasher::new().update(&number.to_le_bytes()).finalize_xof().fill(&mut value);
    value.into()
}

/// The key of a row of the predicate that moves.
pub(super) fn key(number: u64) -> String {
    format!("row/{number:09}")
}

/// Bytes per second of a copy from a file over a connection on the loopback into another file, synced at the end.
///
/// # Errors
/// The system's.
pub(super) fn over_loopback(dir: &Path, bytes: u64) -> Result<f64, Failure> {
    let failed = |error: io::Error| Failure::error(format!("the plain copy in {}: {error}", dir.display()));
    copy(dir, bytes).map_err(failed)
}

fn copy(dir: &Path, bytes: u64) -> io::Result<f64> {
    let (from, to) = (dir.join("copy.from"), dir.join("copy.to"));
    let mut file = File::create(&from)?;
    let mut left = bytes;
    while left > 0 {
        let part = value(left, left.min(1 << 20) as usize);
        file.write_all(&part)?;
        left -= part.len() as u64;
    }
    file.sync_all()?;
    drop(file);
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let begun = Instant::now();
    let sender = std::thread::spawn(move || {
        let mut stream = TcpStream::connect(address)?;
        pass(&mut File::open(from)?, &mut stream)
    });
    let (mut stream, _) = listener.accept()?;
    let mut file = File::create(&to)?;
    pass(&mut stream, &mut file)?;
    file.sync_all()?;
    let seconds = begun.elapsed().as_secs_f64();
    sender.join().map_err(|_| io::Error::other("the sender broke"))??;
    std::fs::remove_file(dir.join("copy.from"))?;
    std::fs::remove_file(&to)?;
    Ok(bytes as f64 / seconds)
}

fn pass(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            read => to.write_all(&buffer[..read])?,
        }
    }
}

/// Bytes per second of one engine's scan into another engine's sorted ingestion, durable at the end.
///
/// # Errors
/// The engine's.
pub(super) fn scan_and_ingest(
    kind: EngineKind,
    dir: &Path,
    bytes: u64,
    value_bytes: usize,
) -> Result<f64, Failure> {
    let failed =
        |error: pontoon_shard::Error| Failure::error(format!("the engine in {}: {error}", dir.display()));
    let (from, to) = (dir.join("scanned"), dir.join("ingested"));
    for dir in [&from, &to] {
        std::fs::create_dir_all(dir)
            .map_err(|error| Failure::error(format!("{}: {error}", dir.display())))?;
    }
    let (source, target) =
        (engine::open(kind, &from).map_err(failed)?, engine::open(kind, &to).map_err(failed)?);
    let mut rows = Vec::new();
    let (mut held, mut number, mut filled) = (0, 0, 0_u64);
    while filled < bytes {
        let (key, value) = (Bytes::from(key(number)), value(number, value_bytes));
        let size = key.len() + value.len();
        (held, filled, number) = (held + size, filled + size as u64, number + 1);
        rows.push((key, value));
        if held >= CHUNK_BYTES || filled >= bytes {
            source.ingest(SPACE, &rows).map_err(failed)?;
            rows.clear();
            held = 0;
        }
    }
    source.flush().map_err(failed)?;

    let begun = Instant::now();
    let snapshot = source.snapshot(vec![Scope { space: SPACE, prefix: Bytes::new() }]).map_err(failed)?;
    let mut refused = None;
    snapshot
        .scan(SPACE, &[], None, &mut |key, value| {
            held += key.len() + value.len();
            rows.push((Bytes::copy_from_slice(key), Bytes::copy_from_slice(value)));
            if held >= CHUNK_BYTES {
                refused = target.ingest(SPACE, &rows).err();
                rows.clear();
                held = 0;
            }
            refused.is_none()
        })
        .map_err(failed)?;
    if let Some(error) = refused {
        return Err(failed(error));
    }
    target.ingest(SPACE, &rows).and_then(|()| target.flush()).map_err(failed)?;
    let rate = filled as f64 / begun.elapsed().as_secs_f64();
    drop(snapshot);
    source.close().and_then(|()| target.close()).map_err(failed)?;
    Ok(rate)
}
