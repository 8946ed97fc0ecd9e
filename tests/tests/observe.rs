//! What a node tells of itself while it runs, and while things go wrong: metrics, health, problems, diagnosis. On real processes.

use std::{
    collections::BTreeSet,
    fs,
    io::Read,
    path::{Path, PathBuf},
    process::Command,
};

use pontoon_proto::v1::{self, MovePhase};
use pontoon_tests::{
    cluster::{Cluster, until, within},
    http::{get, metric_names, metrics},
    process::Program,
    traffic::{Traffic, fill, verify},
};
use tonic::transport::Channel;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

const PROGRAM: Program =
    Program { exe: env!("CARGO_BIN_EXE_pontoon-under-test"), scratch: env!("CARGO_TARGET_TMPDIR") };

/// The metrics that the reference page lists.
fn listed() -> BTreeSet<String> {
    let page = pontoon_node::metrics::reference();
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.filter_map(|row| row.split_once('`')).map(|(name, _)| name.to_owned()).collect()
}

async fn page(address: &str) -> String {
    let (status, page) = get(address, "/metrics").await.expect("the node listens");
    assert_eq!(status, 200, "{page}");
    page
}

/// Waits until `/readyz` answers with this status and these words.
async fn readyz(address: &str, wanted: u16, words: &[&str]) {
    until(&format!("/readyz to say {wanted} and {words:?}"), async || {
        let (status, body) = get(address, "/readyz").await.ok()?;
        (status == wanted && words.iter().all(|word| body.contains(word))).then_some(())
    })
    .await;
}

/// Waits until the health service says this of a service.
async fn serves(address: &str, service: &str, wanted: ServingStatus) {
    until(&format!("{service:?} to be {wanted:?}"), async || {
        let channel = Channel::from_shared(format!("http://{address}")).ok()?.connect().await.ok()?;
        let mut health = HealthClient::new(channel);
        let request = HealthCheckRequest { service: service.to_owned() };
        let reply = health.check(request).await.ok()?.into_inner();
        (reply.status() == wanted).then_some(())
    })
    .await;
}

const DATA: &str = "pontoon.v1.Data";
const ADMIN: &str = "pontoon.v1.Admin";

#[tokio::test(flavor = "multi_thread")]
async fn metrics_tell_what_happens_and_do_not_grow_with_the_groups() {
    let cluster = Cluster::start(PROGRAM, "fjall", 4).await;
    let client = cluster.client().await;
    let expected = fill(&client, "name", 2_000, 100).await;
    verify(&client, "name", &expected).await;
    let holders = cluster.voters("name", 3).await;
    let target = (0..4).find(|node| !holders.contains(node)).expect("one of four holds no replica");
    let id = cluster.start_move("name", holders[0], target).await;
    assert_eq!(cluster.moved(id).await.phase(), MovePhase::Done);

    // Each metric of the page is there, and no other. What needs traffic is on the node that has it.
    let mut named = BTreeSet::new();
    let (mut writes, mut reads, mut done, mut received) = (0.0, 0.0, 0.0, 0.0);
    for at in 0..4 {
        let page = page(cluster.address(at)).await;
        named.extend(metric_names(&page));
        let values = metrics(&page);
        let value = |name: &str| values.get(name).copied().unwrap_or_else(|| panic!("no {name}: {page}"));
        writes += value("pontoon_write_seconds_count");
        reads += value("pontoon_read_seconds_count");
        done += value("pontoon_moves_ended_total{how=\"done\"}");
        received += value("pontoon_snapshots_installed_total");
        assert!(value("pontoon_wal_sync_seconds_count") > 0.0 && value("pontoon_raft_turns_total") > 0.0);
        assert!(value("process_resident_memory_bytes") > 1e6 && value("process_open_fds") > 3.0);
        assert_eq!(value("pontoon_ready"), 1.0);
        assert_eq!(value("pontoon_problem{code=\"disk-stalled\"}"), 0.0);
        let in_phase = value("pontoon_move_phase_seconds_count{phase=\"joint\"}");
        assert_eq!(in_phase > 0.0, value("pontoon_moves_ended_total{how=\"done\"}") > 0.0);
    }
    assert_eq!(named, listed());
    assert!(
        writes >= 1.0 && reads >= 1.0 && done >= 1.0 && received >= 1.0,
        "{writes} {reads} {done} {received}"
    );

    let before = page(cluster.address(0)).await.lines().count();
    for group in 0..40 {
        cluster.says(0, &["put", &format!("p{group}"), "k", "v"], 0, &[]).await;
    }
    let after = page(cluster.address(0)).await.lines().count();
    // Two lines for each of the busiest ten, and whatever streams were made meanwhile.
    assert!(after <= before + 2 * 10 + 4 * 9, "{before} lines have become {after}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_quorum_of_the_meta_group_is_told_and_passes() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 3).await;
    let address = cluster.address(0).to_owned();
    readyz(&address, 200, &["ready"]).await;
    serves(&address, DATA, ServingStatus::Serving).await;
    serves(&address, ADMIN, ServingStatus::Serving).await;
    cluster.says(0, &["status", "--problems"], 0, &["nothing is wrong"]).await;

    cluster.kill(1).await;
    cluster.kill(2).await;
    // Clients of groups that have a quorum are served all the same.
    readyz(&address, 200, &["ready", "meta-lost", "pontoon recover plan"]).await;
    serves(&address, ADMIN, ServingStatus::NotServing).await;
    serves(&address, DATA, ServingStatus::Serving).await;
    let lost = format!("pontoon decommission n{}", cluster.id(2));
    cluster.says(0, &["status", "--problems"], 0, &["meta-lost", "silent", "unavailable", &lost]).await;
    let values = metrics(&page(&address).await);
    assert_eq!(values["pontoon_problem{code=\"meta-lost\"}"], 1.0);

    cluster.restart_all(&[1, 2]).await;
    serves(&address, ADMIN, ServingStatus::Serving).await;
    until("nothing to be wrong", async || {
        let (_, said) = PROGRAM.run(["--addr", &address, "status", "--problems"]).await;
        said.contains("nothing is wrong").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_takes_a_node_out_of_service_and_is_named_everywhere() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 3).await;
    let stat = rustix::fs::statvfs(cluster.dir(0)).expect("a file system says what it has");
    let free = stat.f_bavail * stat.f_frsize;
    for (reserve, code) in [(free / 2 * 3, "disk-low"), (free * 4, "disk-full")] {
        assert!(cluster.terminate(1).await.success());
        cluster.restart_with(1, &["--disk-reserve", &reserve.to_string()]).await;
        let address = cluster.address(1).to_owned();
        readyz(&address, 503, &["not ready", code, "free space there"]).await;
        serves(&address, DATA, ServingStatus::NotServing).await;
        serves(&address, ADMIN, ServingStatus::Serving).await;
        let (healthz, _) = get(&address, "/healthz").await.expect("the node listens");
        assert_eq!(healthz, 200, "the process lives");
        let place = format!("n{}", cluster.id(1));
        cluster.says(0, &["status", "--problems"], 0, &[code, &place, "free space there"]).await;
    }
    assert!(cluster.terminate(1).await.success());
    cluster.restart(1).await;
    readyz(cluster.address(1), 200, &["ready"]).await;
}

/// A file system in a file, whose disk can be made to stand still; gone with the value.
struct StillDisk(PathBuf);

impl StillDisk {
    /// `None` where the system does not let us make one.
    fn mount(under: &Path) -> Option<StillDisk> {
        let (image, at) = (under.join("image"), under.join("disk"));
        fs::File::create(&image).and_then(|file| file.set_len(1500 << 20)).expect("room for a sparse file");
        fs::create_dir(&at).expect("the build's directory takes another one");
        let done = |command: &mut Command| command.output().is_ok_and(|output| output.status.success());
        let made = done(Command::new("mkfs.ext4").arg("-q").arg(&image))
            && done(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&at));
        made.then_some(StillDisk(at))
    }

    fn freeze(&self, frozen: bool) {
        let flag = if frozen { "-f" } else { "-u" };
        let status = Command::new("fsfreeze").arg(flag).arg(&self.0).status().expect("fsfreeze is there");
        assert!(status.success(), "fsfreeze {flag}");
    }
}

impl Drop for StillDisk {
    fn drop(&mut self) {
        // One that stands still cannot be unmounted.
        let _ = Command::new("fsfreeze").arg("-u").arg(&self.0).output();
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_stands_still_is_told_and_passes() {
    let scratch = PROGRAM.scratch();
    let has = Command::new("fsfreeze").arg("--version").output().is_ok_and(|output| output.status.success());
    let Some(disk) = has.then(|| StillDisk::mount(scratch.path())).flatten() else {
        eprintln!("skipped: no file system can be made to stand still here");
        return;
    };
    let mut cluster = Cluster::start(PROGRAM, "fjall", 3).await;
    let dir = disk.0.join("wal").display().to_string();
    let at = cluster.add_with(&["--wal-dir", &dir]).await;
    let address = cluster.address(at).to_owned();
    // It leads nothing else, so that what it leads must be written by it.
    cluster.says(0, &["predicate", "create", "name", "--replicas", "1"], 0, &[]).await;
    let holder = cluster.leader("name").await;
    if holder != at {
        let id = cluster.start_move("name", holder, at).await;
        assert_eq!(cluster.moved(id).await.phase(), MovePhase::Done);
    }
    let client = cluster.client().await;
    client.put("name", "before", "row").await.expect("it serves");
    readyz(&address, 200, &["ready"]).await;

    disk.freeze(true);
    let writing = tokio::spawn(async move { client.put("name", "meanwhile", "row").await });
    readyz(&address, 503, &["not ready", "disk-stalled", "stop the node"]).await;
    serves(&address, DATA, ServingStatus::NotServing).await;
    let place = format!("n{}", cluster.id(at));
    cluster.says(0, &["status", "--problems"], 0, &["disk-stalled", &place]).await;
    let values = metrics(&page(&address).await);
    assert!(values["pontoon_raft_sync_owed_seconds"] > 0.0);

    disk.freeze(false);
    readyz(&address, 200, &["ready"]).await;
    serves(&address, DATA, ServingStatus::Serving).await;
    drop(within("the write to end", writing).await.expect("it does not panic"));
    let client = cluster.client().await;
    until("a write to pass", async || client.put("name", "after", "row").await.ok()).await;
    let dead = cluster.terminate(at).await;
    assert!(dead.success(), "{dead}");
}

/// The files of a bundle, by their names.
fn unpack(file: &Path) -> std::collections::BTreeMap<String, String> {
    let archive = flate2::read::GzDecoder::new(fs::File::open(file).expect("the bundle is there"));
    let mut archive = tar::Archive::new(archive);
    let read = |mut entry: tar::Entry<'_, _>| {
        let name = entry.path().expect("a name").display().to_string();
        let mut text = String::new();
        entry.read_to_string(&mut text).expect("text");
        (name, text)
    };
    archive.entries().expect("an archive").map(|entry| read(entry.expect("an entry"))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bundle_holds_what_every_node_that_answers_can_tell_and_no_rows() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 3).await;
    let client = cluster.client().await;
    client.put("name", "the-key-of-a-row", "the-value-of-a-row").await.expect("it serves");
    cluster.voters("name", 3).await;
    cluster.kill(2).await;
    let file = cluster.dir(0).with_file_name("bundle.tar.gz");
    let name = file.display().to_string();
    let silent = format!("n{} did not answer", cluster.id(2));
    cluster.says(0, &["debug", "bundle", &name], 0, &["no rows", &silent]).await;
    cluster.says(0, &["debug", "bundle", &name], 2, &["name another file"]).await;

    let files = unpack(&file);
    let text =
        |name: String| files.get(&name).unwrap_or_else(|| panic!("no {name} among {:?}", files.keys()));
    for at in 0..2 {
        let of = |name: &str| text(format!("pontoon-debug/n{}/{name}", cluster.id(at)));
        assert!(!metric_names(of("metrics.txt")).is_empty());
        assert!(of("settings.toml").contains("raft.tick = \"100ms\"  # default"));
        assert!(of("settings.toml").contains("# --listen"));
        assert!(of("log.jsonl").contains("serving"), "{}", of("log.jsonl"));
        assert!(of("wal.txt").contains("batches:") && of("wal.txt").contains("segments:"));
        let about: serde_json::Value = serde_json::from_str(of("node.json")).expect("JSON");
        assert_eq!(about["node"], cluster.id(at));
    }
    assert!(!text(format!("pontoon-debug/n{}/error", cluster.id(2))).is_empty());
    assert!(text("pontoon-debug/events.jsonl".to_owned()).contains("\"seq\""));
    assert!(text("pontoon-debug/problems.json".to_owned()).contains("does not answer"));
    assert!(files.values().all(|text| !text.contains("-of-a-row")), "rows are nobody's business");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_is_shown_from_each_of_its_replicas() {
    let cluster = Cluster::start(PROGRAM, "fjall", 3).await;
    let client = cluster.client().await;
    let mut traffic = Traffic::start(&client, "name", 2);
    traffic.acknowledged(50).await;
    cluster.voters("name", 3).await;
    let group = cluster
        .map_until("name to be in the map", |map| {
            map.shards.iter().find(|shard| shard.predicate == "name").map(|shard| shard.group)
        })
        .await
        .to_string();
    let leader = cluster.leader("name").await;
    let words = ["name", "leader", "follower", "member, as its leader sees it", "unsynced", "log bytes"];
    let said = cluster.says(leader, &["debug", "group", &group], 0, &words).await;
    assert!(!said.contains("did not answer"), "{said}");
    let said = cluster.says((leader + 1) % 3, &["debug", "group", &group, "--json"], 0, &[]).await;
    let json: serde_json::Value = serde_json::from_str(said.lines().last().expect("a line")).expect("JSON");
    let replicas = json["replicas"].as_array().expect("replicas");
    assert_eq!(replicas.len(), 3, "{json}");
    assert!(replicas.iter().all(|replica| replica["depths"]["log_bytes"].as_u64() > Some(0)), "{json}");
    let leads: Vec<_> = replicas.iter().filter(|replica| replica["role"] == "leader").collect();
    assert_eq!(leads.len(), 1, "{json}");
    assert_eq!(leads[0]["progress"].as_array().map(Vec::len), Some(3), "{json}");
    cluster.says(0, &["debug", "group", "999"], 2, &["no node holds a replica of group 999"]).await;
    let rows = traffic.stop().await;
    verify(&client, "name", &rows).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_profile_names_the_threads_that_write_and_the_code_that_allocates() {
    let cluster = Cluster::start(PROGRAM, "fjall", 1).await;
    let client = cluster.client().await;
    let mut traffic = Traffic::start(&client, "name", 2);
    traffic.acknowledged(20).await;
    let stacks = cluster.dir(0).with_file_name("threads.txt");
    let file = stacks.display().to_string();
    let said =
        cluster.says(0, &["debug", "profile", "--seconds", "3", "--out", &file, "--json"], 0, &[]).await;
    let json: serde_json::Value = serde_json::from_str(said.lines().last().expect("a line")).expect("JSON");
    assert_eq!(json["node"], cluster.id(0));
    let threads = json["threads"].as_array().expect("threads");
    for name in ["raft-0", "apply-0", "wal-writer-"] {
        let crew = threads.iter().filter(|thread| thread["name"].as_str().unwrap_or("").starts_with(name));
        let cpu: u64 = crew.filter_map(|thread| thread["cpu_us"].as_u64()).sum();
        assert!(cpu > 0, "{name} has done nothing: {json}");
    }
    let text = fs::read_to_string(&stacks).expect("the file is there");
    assert!(text.lines().any(|line| line.starts_with("raft-0;")), "{text}");
    let legible = |line: &str| line.rsplit_once(' ').is_some_and(|(_, ms)| ms.parse::<u64>().is_ok());
    assert!(text.lines().all(legible), "{text}");
    cluster.says(0, &["debug", "profile", "--out", &file], 2, &["name another file"]).await;
    cluster.says(0, &["debug", "profile", "--node", "n99"], 2, &["there is no node n99"]).await;
    let rows = traffic.stop().await;
    verify(&client, "name", &rows).await;

    // What is written while the heap is recorded, with much to allocate.
    let raw = cluster.dir(0).with_file_name("heap.txt");
    let heap = [
        "debug",
        "profile",
        "--heap",
        "--seconds",
        "3",
        "--raw",
        "--out",
        &raw.display().to_string(),
        "--json",
    ];
    let written = async {
        let rows = fill(&client, "large", 2_000, 1_000).await;
        verify(&client, "large", &rows).await;
    };
    let (said, ()) = tokio::join!(cluster.says(0, &heap, 0, &[]), written);
    let json: serde_json::Value = serde_json::from_str(said.lines().last().expect("a line")).expect("JSON");
    assert!(json["resident_bytes"].as_u64() >= json["active_bytes"].as_u64(), "{json}");
    let stacks = json["stacks"].as_array().expect("stacks");
    let named = |stack: &serde_json::Value| {
        let frames = stack["frames"].to_string();
        ["node", "raftstore", "wal"].iter().any(|name| frames.contains(&format!(" ({name}/src/")))
    };
    assert!(stacks.iter().any(named), "nobody of ours has allocated: {json}");
    let raw = fs::read_to_string(raw).expect("the file is there");
    assert!(raw.starts_with("heap_v2/") && raw.contains("MAPPED_LIBRARIES"), "{raw}");
    assert!(!cluster.dir(0).join("heap.profile").exists(), "what the allocator wrote is taken away again");
    cluster.says(0, &["audit"], 0, &["Profile", "threads", "heap"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_profile_at_a_time_and_it_ends_with_whoever_asked() {
    let cluster = Cluster::start(PROGRAM, "fjall", 1).await;
    let client = cluster.client().await;
    let address = cluster.address(0);
    for kind in [v1::ProfileKind::Threads, v1::ProfileKind::Heap] {
        let ask = |seconds| {
            let request = v1::ProfileRequest { kind: kind.into(), seconds, raw: false };
            client.profile_at(address, request)
        };
        // Neither can end well so soon: the one that does not wait for a minute was refused, and the other is dropped.
        let refused = tokio::select! {
            first = ask(60) => first,
            second = ask(60) => second,
        };
        let refused = refused.expect_err("there is one already").to_string();
        assert!(refused.contains("is being profiled already"), "{refused}");
        until("the dropped one to have ended", async || ask(1).await.ok()).await;
        for wrong in [0, 61] {
            let refused = ask(wrong).await.expect_err("the time is wrong").to_string();
            assert!(refused.contains("1 to 60 seconds"), "{refused}");
        }
    }
    let unknown = v1::ProfileRequest { kind: 9, seconds: 1, raw: false };
    let refused = client.profile_at(address, unknown).await.expect_err("there is no such kind").to_string();
    assert!(refused.contains("kind 9"), "{refused}");
    // The two that were dropped are told, too.
    cluster.says(0, &["audit"], 0, &["Profile", "unknown", "is being profiled already"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_are_json_where_that_is_asked_for_and_few_at_a_start() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 1).await;
    for group in 0..30 {
        cluster.says(0, &["put", &format!("p{group}"), "k", "v"], 0, &[]).await;
    }
    assert!(cluster.terminate(0).await.success());
    fs::remove_file(cluster.log(0)).expect("a log is there");
    cluster.restart_with(0, &["--log-format", "json"]).await;
    cluster.says(0, &["get", "p29", "k"], 0, &["v"]).await;
    assert!(cluster.terminate(0).await.success());
    let said = fs::read_to_string(cluster.log(0)).expect("a log is there");
    let lines: Vec<serde_json::Value> = said
        .lines()
        .filter(|line| line.starts_with('{'))
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    let serving = lines.iter().find(|line| line["fields"]["message"] == "serving").expect("it says so");
    assert_eq!(serving["level"], "INFO");
    assert!(serving["fields"]["address"].is_string() && serving["timestamp"].is_string(), "{serving}");
    assert!(lines.len() < 31, "a line for each group at least: {said}");
}
