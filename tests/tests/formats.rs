//! Directories that released formats wrote are opened, read, and used on.
//!
//! `tests/fixtures` has a directory per cluster version and engine. They are never made anew: a format that cannot be read any more
//! is a fault of the code. `PONTOON_FIXTURES=DIR` makes those of the binary at hand, or of PONTOON_PREVIOUS (docs/testing.md).

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use pontoon_node::client::{Client, put};
use pontoon_tests::{
    cluster::{free_address, until, within},
    process::{Process, Program},
    traffic::{Rows, verify},
};

const PROGRAM: Program =
    Program { exe: env!("CARGO_BIN_EXE_pontoon-under-test"), scratch: env!("CARGO_TARGET_TMPDIR") };

/// Cluster version and engine of each fixture.
const FIXTURES: [(u32, &str); 4] = [(1, "fjall"), (1, "sled"), (2, "fjall"), (2, "sled")];
const ROWS: usize = 60;
const RECORDS: u64 = 12;

fn fixture(folder: &Path, version: u32, engine: &str) -> PathBuf {
    folder.join(format!("{version}-{engine}.tar.gz"))
}

fn record(at: u64) -> String {
    format!("record {at}")
}

/// What the predicate `name` of every fixture holds.
fn rows() -> Rows {
    (0..ROWS)
        .filter(|at| at % 7 != 0)
        .map(|at| (format!("key {at:03}").into(), format!("value {at}").into()))
        .collect()
}

struct Running {
    process: Process,
    address: String,
}

async fn start(program: Program, dir: &Path, log: &Path, options: &[&str]) -> Running {
    let address = free_address();
    let arguments = ["node", "--dir", &dir.display().to_string(), "--listen", &address, "--end-with-parent"];
    let arguments: Vec<String> = arguments.iter().chain(options).map(|&word| word.to_owned()).collect();
    let mut process = Process::start(program, "the node", log, &arguments);
    process.prints("serves on").await;
    Running { process, address }
}

impl Running {
    async fn client(&self) -> Client {
        within("a client to connect", Client::connect([self.address.clone()]))
            .await
            .expect("the node answers")
    }
}

/// Writes a fixture by way of a client, over two starts.
async fn make(program: Program, engine: &str, to: &Path) {
    let scratch = PROGRAM.scratch();
    let (dir, log) = (scratch.path().join("data"), scratch.path().join("log"));
    let options = ["--engine", engine, "--set", "wal.segment=256KiB", "--set", "raft.flush_interval=50ms"];
    let mut node = start(program, &dir, &log, &options).await;
    let client = node.client().await;
    let batch = |from: usize| {
        (from..from + ROWS / 2)
            .map(|at| put(format!("key {at:03}"), format!("value {at}")))
            .collect::<Vec<_>>()
    };
    client.write("name", batch(0)).await.expect("a write is acknowledged");
    let events = client.create_log("events", 1).await.expect("a log is made");
    events.append((0..RECORDS / 2).map(record).collect::<Vec<_>>()).await.expect("records are appended");
    assert!(node.process.terminate().await.success());

    let mut node = start(program, &dir, &log, &options).await;
    let client = node.client().await;
    client.write("name", batch(ROWS / 2)).await.expect("a write is acknowledged");
    for at in (0..ROWS).step_by(7) {
        client.delete("name", format!("key {at:03}")).await.expect("a delete is acknowledged");
    }
    let events = client.log("events");
    events
        .append((RECORDS / 2..RECORDS).map(record).collect::<Vec<_>>())
        .await
        .expect("records are appended");
    match engine {
        // Its files are only trusted after a clean end, or while the machine has not crashed since.
        "sled" => assert!(node.process.terminate().await.success()),
        _ => node.process.kill().await,
    }
    let file = GzEncoder::new(File::create(to).expect("a fixture can be written"), Compression::best());
    let mut archive = tar::Builder::new(file);
    archive.mode(tar::HeaderMode::Deterministic);
    archive.append_dir_all("data", &dir).expect("the directory can be read");
    archive.into_inner().and_then(GzEncoder::finish).expect("a fixture can be written");
}

#[tokio::test(flavor = "multi_thread")]
async fn directories_of_released_formats_are_read_and_used_on() {
    if let Some(folder) = std::env::var_os("PONTOON_FIXTURES").map(PathBuf::from) {
        let (program, version) = match std::env::var("PONTOON_PREVIOUS") {
            Ok(path) => (Program { exe: path.leak(), ..PROGRAM }, pontoon_shard::Versions::OURS.newest - 1),
            Err(_) => (PROGRAM, pontoon_shard::Versions::OURS.newest),
        };
        for engine in ["fjall", "sled"] {
            make(program, engine, &fixture(&folder, version, engine)).await;
        }
        return;
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    for (version, engine) in FIXTURES {
        let scratch = PROGRAM.scratch();
        let path = fixture(&folder, version, engine);
        let file = File::open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        tar::Archive::new(GzDecoder::new(file)).unpack(scratch.path()).expect("a fixture unpacks");
        let (dir, log) = (scratch.path().join("data"), scratch.path().join("log"));
        let (exit, said) = PROGRAM.run(["wal", "verify", &dir.display().to_string()]).await;
        assert!(exit.success(), "{}: {said}", path.display());

        let mut node = start(PROGRAM, &dir, &log, &[]).await;
        let client = node.client().await;
        verify(&client, "name", &rows()).await;
        let events = client.log("events").read(0, None, 1_000).await.expect("records can be read");
        let read: Vec<String> =
            events.records.iter().map(|record| String::from_utf8_lossy(record).into_owned()).collect();
        assert_eq!(read, (0..RECORDS).map(record).collect::<Vec<_>>(), "{}", path.display());

        let status = ["--addr", &node.address, "upgrade", "status"];
        let (_, said) = PROGRAM.run(status).await;
        assert!(said.contains(&format!("the cluster is at version {version}")), "{said}");
        if version < pontoon_shard::Versions::OURS.newest {
            until("the next version to be finalised", async || {
                let (exit, _) = PROGRAM.run(["--addr", &node.address, "upgrade", "finalise"]).await;
                exit.success().then_some(())
            })
            .await;
        }
        client.put("name", "key new", "value new").await.expect("it takes writes");
        assert!(node.process.terminate().await.success());
    }
}
