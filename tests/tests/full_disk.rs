//! Disks that fill up under real processes: who has room goes on, who has none says so, and nothing is lost.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

use pontoon_node::client::{Client, ClientError};
use pontoon_proto::v1::NodeRoom;
use pontoon_tests::{
    cluster::{Cluster, until, within},
    process::Program,
    traffic::{Rows, Traffic, verify},
};

const PROGRAM: Program =
    Program { exe: env!("CARGO_BIN_EXE_pontoon-under-test"), scratch: env!("CARGO_TARGET_TMPDIR") };

/// Bytes that may still be written below a directory.
fn free_bytes(path: &Path) -> u64 {
    let stat = rustix::fs::statvfs(path).expect("a file system says what it has");
    stat.f_bavail * stat.f_frsize
}

async fn room(client: &Client, id: u64) -> NodeRoom {
    let status = within("a status", client.status(Default::default())).await.expect("a node answers");
    let view = status.nodes.into_iter().find(|view| view.node.as_ref().is_some_and(|node| node.id == id));
    view.expect("the node is in the cluster").room()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_room_leads_nothing_and_two_of_them_are_named() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 3).await;
    let client = cluster.client().await;
    let mut traffic = Traffic::start(&client, "name", 2);
    traffic.acknowledged(20).await;
    cluster.voters("name", 3).await;

    // More than there is, but less than twice that: little room, not none.
    let reserve = (free_bytes(cluster.dir(0)) / 2 * 3).to_string();
    let without = cluster.leader("name").await;
    assert!(cluster.terminate(without).await.success());
    cluster.restart_with(without, &["--disk-reserve", &reserve]).await;
    assert_eq!(room(&client, cluster.id(without)).await, NodeRoom::Low);
    traffic.acknowledged(100).await;
    let leader = until("leadership to go where there is room", async || {
        Some(cluster.leader("name").await).filter(|leader| *leader != without)
    })
    .await;

    let rows = traffic.stop().await;
    assert!(cluster.terminate(leader).await.success());
    cluster.restart_with(leader, &["--disk-reserve", &reserve]).await;
    let named = until("writes to be refused for lack of room", async || {
        match client.put("name", "late", "late").await {
            Err(ClientError::DiskFull { predicate, node }) => Some((predicate, node)),
            // Until the leader has heard of it.
            Ok(_) => None,
            Err(other) => panic!("{other}"),
        }
    })
    .await;
    assert_eq!(named.0, "name");
    assert!([cluster.id(without), cluster.id(leader)].contains(&named.1), "{named:?}");
    let addr = cluster.address(leader).to_owned();
    let (exit, said) = PROGRAM.run(["put", "name", "late", "later", "--addr", &addr]).await;
    assert_eq!(exit.code(), Some(2), "{said}");
    assert!(said.contains("is nearly full; free space there"), "{said}");
    let (_, problems) = PROGRAM.run(["groups", "--problem", "--addr", &addr]).await;
    assert!(problems.contains("takes no writes: the disk of node"), "{problems}");

    // What stands is read all the same.
    let late = client.get("name", "late").await.expect("reads go on");
    for at in [without, leader] {
        assert!(cluster.terminate(at).await.success());
        cluster.restart(at).await;
    }
    let mut rows = rows;
    rows.extend(late.map(|row| ("late".into(), row.value)));
    verify(&client, "name", &rows).await;
    let mut traffic = Traffic::start(&client, "genre", 2);
    traffic.acknowledged(20).await;
    traffic.stop().await;
}

/// A file system of its own, in memory; gone with the value.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None` where the system does not let us mount one.
    fn mount(under: &Path, mebibytes: u64) -> Option<SmallDisk> {
        let at = under.join("disk");
        fs::create_dir(&at).expect("the build's directory takes another one");
        let size = format!("size={mebibytes}m");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&at).status();
        mounted.is_ok_and(|status| status.success()).then_some(SmallDisk(at))
    }

    /// Takes the room away, but for so many mebibytes.
    fn fill_to(&self, left: u64) {
        let mut ballast =
            File::options().create(true).append(true).open(self.0.join("ballast")).expect("room");
        while free_bytes(&self.0) > left << 20 {
            ballast.write_all(&vec![0; 1 << 20]).expect("there was room");
        }
    }

    fn give_back(&self) {
        fs::remove_file(self.0.join("ballast")).expect("the ballast is there");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn next_key(rows: &Rows) -> String {
    format!("{:06}", rows.len())
}

/// Writes rows until one is refused or lost; those that were acknowledged, and how it ended.
async fn write_until_it_ends(client: &Client, rows: &mut Rows) -> ClientError {
    loop {
        let (key, value) = (next_key(rows), vec![b'v'; 100_000]);
        match client.put("big", key.clone(), value.clone()).await {
            Ok(_) => rows.insert(key.into(), value.into()),
            Err(error) => return error,
        };
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fills_up_is_noticed_and_freed_without_a_loss() {
    let scratch = PROGRAM.scratch();
    let Some(disk) = SmallDisk::mount(scratch.path(), 1400) else {
        eprintln!("skipped: file systems cannot be mounted here");
        return;
    };
    let path: &'static str = Box::leak(disk.0.display().to_string().into_boxed_str());
    let mut cluster = Cluster::start(Program { scratch: path, ..PROGRAM }, "fjall", 1).await;
    let client = cluster.client().await;
    let mut rows = Rows::new();
    client.put("big", "first", "row").await.expect("there is room");
    rows.insert("first".into(), "row".into());

    // With a reserve: writes are refused, and taken again when there is room, without a restart.
    assert!(cluster.terminate(0).await.success());
    cluster.restart_with(0, &["--disk-reserve", &(400 << 20).to_string()]).await;
    disk.fill_to(450);
    let error = write_until_it_ends(&client, &mut rows).await;
    assert!(matches!(error, ClientError::DiskFull { .. }), "{error}");
    verify(&client, "big", &rows).await;
    disk.give_back();
    until("a write to pass", async || client.put("big", "again", "row").await.ok()).await;
    rows.insert("again".into(), "row".into());

    // Without one: the engine meets the end of the disk, the node ends with the next step, and starts when it is done.
    assert!(cluster.terminate(0).await.success());
    cluster.restart_with(0, &["--disk-reserve", "0"]).await;
    disk.fill_to(40);
    let error = write_until_it_ends(&client, &mut rows).await;
    assert!(matches!(error, ClientError::Unknown { .. } | ClientError::Late { .. }), "{error}");
    let (exit, said) = cluster.ended(0).await;
    assert_eq!(exit.code(), Some(1), "{said}");
    assert!(said.contains("free some space") && said.contains("then start the node again"), "{said}");
    assert!(!said.contains("panicked"), "{said}");

    disk.fill_to(1);
    let log_dir = cluster.dir(0).display().to_string();
    let (exit, said) = PROGRAM.run(["node", "--dir", &log_dir, "--listen", "127.0.0.1:0"]).await;
    assert_eq!(exit.code(), Some(2), "{said}");
    assert!(said.contains("is full: ") && said.contains("a node needs 16 MiB to start"), "{said}");

    disk.give_back();
    cluster.restart(0).await;
    let client = cluster.client().await;
    // The write that was not answered may be there.
    let unsure = next_key(&rows);
    if let Some(row) = client.get("big", unsure.clone()).await.expect("the node serves") {
        rows.insert(unsure.into(), row.value);
    }
    verify(&client, "big", &rows).await;
}
