//! Real processes that are backed up, restored, exported, and change their engines, while others write and some are killed.

use std::{fs, path::Path};

use bytes::Bytes;
use pontoon_node::client::{Client, Range};
use pontoon_proto::v1;
use pontoon_tests::{
    cluster::{Cluster, until},
    films::FILMS,
    http::{get, metrics},
    process::{Process, Program, files_in},
    traffic::{Rows, Traffic, fill, read_all, verify},
};
use serde_json::{Value, json};
use tokio::{sync::watch, task::JoinHandle};

const PROGRAM: Program =
    Program { exe: env!("CARGO_BIN_EXE_pontoon-under-test"), scratch: env!("CARGO_TARGET_TMPDIR") };

/// Runs a command with `--json` and returns what its last line says.
async fn told(cluster: &Cluster, command: &[&str], code: i32) -> Value {
    let said = cluster.says(0, &[command, &["--json"]].concat(), code, &[]).await;
    let line =
        said.lines().rev().find(|line| line.starts_with('{')).unwrap_or_else(|| panic!("no JSON: {said}"));
    serde_json::from_str(line).expect("the last line is JSON")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("the scratch directory has a plain name")
}

fn row(n: u32) -> (Bytes, Bytes) {
    (format!("row-{n:07}").into(), format!("{n}-{}", "x".repeat(90)).into())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_under_writes_is_a_prefix_of_them_and_comes_back_in_another_cluster() {
    let source = Cluster::start(PROGRAM, "fjall", 3).await;
    let client = source.client().await;
    let expected = fill(&client, "name", 20_000, 100).await;
    let log = client.create_log("events", 3).await.expect("a log is made");
    log.append((0..500).map(|n| format!("event {n}"))).await.expect("records are taken");
    log.truncate(120).await.expect("the log is truncated");
    // Nothing is left of it but where it goes on.
    let ended = client.create_log("ended", 3).await.expect("a log is made");
    ended.append(["a", "b", "c"]).await.expect("records are taken");
    ended.truncate(3).await.expect("the log is truncated");
    // One writer, one row after the other: a prefix has no gaps.
    let counting = tokio::spawn({
        let client = client.clone();
        async move {
            let mut n = 0_u32;
            while client.put("count", n.to_be_bytes().to_vec(), "x").await.is_ok() {
                n += 1;
            }
        }
    });
    until("some writes", async || client.get("count", 20_u32.to_be_bytes().to_vec()).await.ok()?).await;
    let scratch = PROGRAM.scratch();
    let (dir, file) = (scratch.path().join("backups"), scratch.path().join("one.tar"));
    let least = counted(&client).await;
    let first = told(&source, &["backup", text(&dir)], 0).await;
    let between = counted(&client).await;
    let second = told(&source, &["backup", text(&file)], 0).await;
    counting.abort();
    assert_eq!(first["backup"]["predicates"].as_array().map(Vec::len), Some(4), "{first}");
    let rows = |backup: &Value| {
        let found = backup["backup"]["predicates"].as_array().expect("predicates").clone();
        let count = found.into_iter().find(|one| one["predicate"] == "count").expect("count is there");
        count["rows"].as_u64().expect("a number")
    };
    assert!(rows(&first) >= least && rows(&second) >= between, "what was acknowledged before is in it");
    drop(source);

    // Another number of nodes, another engine.
    let target = Cluster::start(PROGRAM, "sled", 1).await;
    let restored = told(&target, &["restore", text(&dir)], 0).await;
    assert_eq!(restored["predicates"].as_array().map(Vec::len), Some(4), "{restored}");
    target.says(0, &["verify", text(&dir), "--deep"], 0, &["same"]).await;
    let client = target.client().await;
    verify(&client, "name", &expected).await;
    let numbers: Vec<Bytes> = read_all(&client, "count").await.into_keys().collect();
    let gapless: Vec<Bytes> = (0..numbers.len() as u32).map(|n| n.to_be_bytes().to_vec().into()).collect();
    assert!(numbers == gapless && numbers.len() as u64 == rows(&first));
    let log = client.log("events");
    let bounds = log.bounds().await.expect("the log is there");
    assert_eq!((bounds.lowest, bounds.next), (120, 500));
    assert_eq!(log.get(499).await.expect("it reads").as_deref(), Some(&b"event 499"[..]));
    assert_eq!(log.append(["new"]).await.expect("it goes on").first, 500);
    let ended = client.log("ended");
    let bounds = ended.bounds().await.expect("the log is there");
    assert_eq!((bounds.lowest, bounds.next), (3, 3), "a log without records goes on where it did");
    ended.append(["d"]).await.expect("a record is taken");
    ended.truncate(4).await.expect("the log is truncated");
    let differs = told(&target, &["verify", text(&dir), "--deep"], 1).await;
    let compared = differs["compared"].as_array().expect("what was compared").clone();
    let ended = compared.iter().find(|one| one["predicate"] == "ended").expect("it was compared");
    assert_eq!(ended["state"], "differs", "no rows here and there, and another next offset: {differs}");
    // New clients, new sessions: nothing of the old ones answers for them.
    client.put("name", "after", "x").await.expect("a restored predicate takes writes");

    let refused = target.says(0, &["restore", text(&file)], 2, &["count", "--replace", "--as"]).await;
    assert!(refused.contains("nothing was restored"), "{refused}");
    let beside = ["restore", text(&file), "--predicate", "count", "--as", "count-again"];
    assert_eq!(told(&target, &beside, 0).await["predicates"][0]["rows"].as_u64(), Some(rows(&second)));
    told(&target, &["restore", text(&dir), "--predicate", "name,events", "--replace"], 0).await;
    verify(&client, "name", &expected).await;
    let bounds = log.bounds().await.expect("the log is there");
    assert_eq!((bounds.lowest, bounds.next), (120, 500));
    let events = target.says(0, &["events"], 0, &["restore 20"]).await;
    assert!(events.contains("4 predicates"), "{events}");
    // The same rows have the same chunks, whatever cluster they lie in.
    let again = told(&target, &["backup", text(&dir), "--predicate", "name"], 0).await;
    assert_eq!(again["new_chunks"].as_u64(), Some(0), "{again}");
}

/// How many numbers are there.
async fn counted(client: &Client) -> u64 {
    read_all(client, "count").await.len() as u64
}

#[tokio::test(flavor = "multi_thread")]
async fn the_second_backup_stores_what_changed_and_a_killed_one_is_gone_on_with() {
    let cluster = Cluster::start(PROGRAM, "fjall", 1).await;
    let client = cluster.client().await;
    let expected = fill(&client, "name", 40_000, 200).await;
    let scratch = PROGRAM.scratch();
    let dir = scratch.path().join("backups");

    // Slow enough to be met in the middle.
    let slow = ["--addr", cluster.address(0), "backup", text(&dir), "--budget", "1500000"];
    let log = scratch.path().join("log");
    let arguments: Vec<String> = slow.iter().map(|&word| word.to_owned()).collect();
    let mut killed = Process::start(PROGRAM, "the backup", &log, &arguments);
    let chunks = dir.join("chunks");
    until("chunks to be stored", async || (chunks.exists() && files_in(&chunks).len() > 3).then_some(()))
        .await;
    killed.kill().await;
    let kept = files_in(&chunks).len();
    cluster.says(0, &["backup", "list", text(&dir)], 0, &[]).await;
    assert!(files_in(&dir.join("backups")).is_empty(), "a killed backup is none");
    let whole = told(&cluster, &["backup", text(&dir), "--budget", "max"], 0).await;
    let (all, new) = (whole["chunks"].as_u64().unwrap(), whole["new_chunks"].as_u64().unwrap());
    assert_eq!(new + kept as u64, all, "what the killed one stored is not stored again");

    // One row in a hundred, anywhere.
    let mut rows: Rows = expected;
    let keys: Vec<Bytes> = rows.keys().step_by(100).cloned().collect();
    for (n, key) in keys.into_iter().enumerate() {
        let value = Bytes::from(format!("changed {n}"));
        client.put("name", key.clone(), value.clone()).await.expect("a write is taken");
        rows.insert(key, value);
    }
    let next = told(&cluster, &["backup", text(&dir), "--budget", "max"], 0).await;
    let (first, second) =
        (whole["backup"]["bytes"].as_u64().unwrap(), next["stored_bytes"].as_u64().unwrap());
    assert!(second * 20 < first, "1 % of the rows changed: {second} bytes stored beside {first}");
    let nothing = told(&cluster, &["backup", text(&dir), "--budget", "max"], 0).await;
    assert_eq!(nothing["stored_bytes"].as_u64(), Some(0));

    // A difference comes back whole, also when what it was made beside is pruned.
    cluster.says(0, &["backup", "prune", text(&dir), "--keep", "1"], 0, &["2 backups are gone"]).await;
    cluster.says(0, &["verify", text(&dir), "--deep"], 0, &["all is well", "same"]).await;
    told(&cluster, &["restore", text(&dir), "--as", "name2"], 0).await;
    verify(&client, "name2", &rows).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_is_named_and_a_killed_restore_is_gone_on_with() {
    let cluster = Cluster::start(PROGRAM, "fjall", 1).await;
    let client = cluster.client().await;
    let expected = fill(&client, "name", 60_000, 300).await;
    fill(&client, "other", 100, 10).await;
    let log = client.create_log("events", 1).await.expect("a log is made");
    for batch in 0..20 {
        let records = (0..500).map(|n| format!("{batch}-{n}-{}", "r".repeat(300)));
        log.append(records).await.expect("records are taken");
    }
    let scratch = PROGRAM.scratch();
    let dir = scratch.path().join("backups");
    told(&cluster, &["backup", text(&dir), "--budget", "max"], 0).await;

    // A second node's engine is slow enough that the restore is met in the middle.
    let target = Cluster::start(PROGRAM, "fjall", 1).await;
    let elsewhere = target.client().await;
    let arguments: Vec<String> =
        ["--addr", target.address(0), "restore", text(&dir)].iter().map(|&word| word.to_owned()).collect();
    let mut killed = Process::start(PROGRAM, "the restore", &scratch.path().join("log"), &arguments);
    until("rows to be there", async || {
        let some = elsewhere.get("name", expected.keys().next()?.clone()).await.ok()?.is_some();
        (some || killed_has_ended(&scratch.path().join("log"))).then_some(())
    })
    .await;
    killed.kill().await;
    let restored = told(&target, &["restore", text(&dir)], 0).await;
    assert_eq!(restored["resumed"].as_bool(), Some(true), "{restored}");
    verify(&elsewhere, "name", &expected).await;
    let bounds = elsewhere.log("events").bounds().await.expect("the log is there");
    assert_eq!((bounds.lowest, bounds.next), (0, 10_000));
    assert!(
        !scratch.path().join("backups.pontoon-restore").exists(),
        "a finished restore leaves no progress"
    );

    // One byte of one chunk of `name`.
    let manifest = fs::read_to_string(&files_in(&dir.join("backups"))[0]).expect("it reads");
    let manifest: Value = serde_json::from_str(manifest.lines().nth(1).expect("two lines")).expect("JSON");
    let predicates = manifest["predicates"].as_array().expect("predicates");
    let name = predicates.iter().find(|one| one["predicate"] == "name").expect("name is there");
    let hash = name["chunks"][1]["hash"].as_str().expect("a hash");
    let path = dir.join("chunks").join(&hash[..2]).join(hash);
    let mut bytes = fs::read(&path).expect("it reads");
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    fs::write(&path, bytes).expect("it takes nonsense");
    cluster.says(0, &["verify", text(&dir)], 1, &["name", hash, "rows lost"]).await;
    let verified = told(&cluster, &["verify", text(&dir)], 1).await;
    let hit = verified["damage"].as_array().expect("damage");
    assert!(
        hit.iter().all(|one| one["predicate"] == "name") && hit.len() == 1,
        "only what is hit: {verified}"
    );
    let refused =
        target.says(0, &["restore", text(&dir), "--predicate", "name", "--replace"], 1, &[hash]).await;
    assert!(refused.contains("damaged"), "{refused}");
    verify(&elsewhere, "name", &expected).await;
    target.says(0, &["restore", text(&dir), "--predicate", "other", "--replace"], 0, &["the same"]).await;
}

/// Reads a predicate of one page again and again until told to stop; each time it must be one of these, whole. How often which was met.
fn watching(
    client: &Client,
    name: &'static str,
    whole: [Rows; 2],
) -> (watch::Sender<bool>, JoinHandle<[u64; 2]>) {
    let (client, (stop, mut stopped)) = (client.clone(), watch::channel(false));
    let watching = tokio::spawn(async move {
        let mut met = [0; 2];
        while !*stopped.borrow_and_update() {
            let page =
                client.scan(name, &Range { limit: 10_000, ..Range::default() }).await.expect("it reads");
            assert!(page.continuation.is_empty(), "one page is one point in time");
            let rows: Rows = page.rows.into_iter().map(|row| (row.key, row.value)).collect();
            let which = whole.iter().position(|whole| *whole == rows);
            met[which.unwrap_or_else(|| panic!("{} rows that nobody had whole", rows.len()))] += 1;
        }
        met
    });
    (stop, watching)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_restored_takes_the_place_of_what_was_there_in_one_step_whoever_dies() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 3).await;
    let client = cluster.client().await;
    let kept = fill(&client, "name", 7_000, 100).await;
    cluster.voters("name", 3).await;
    let scratch = PROGRAM.scratch();
    let dir = scratch.path().join("backups");
    let all: Vec<&str> = (0..3).map(|at| cluster.address(at)).collect();
    let everywhere = all.join(",");
    let backup = told(&cluster, &["backup", text(&dir), "--budget", "max"], 0).await;
    let mut later = kept.clone();
    for at in (0..7_000).step_by(700) {
        let (key, value) = (Bytes::from(format!("fill/{at:07}")), Bytes::from("later"));
        client.put("name", key.clone(), value.clone()).await.expect("a write is taken");
        later.insert(key, value);
    }
    let group = async |name: &str| {
        let request = v1::FindPredicateRequest { predicate: name.to_owned(), hops: 0 };
        client.find_predicate(request).await.expect("somebody answers").shard.map(|shard| shard.group)
    };
    let old = group("name").await.expect("it is there");

    // Something else has the name beside it.
    client.put("name.restoring", "a", "b").await.expect("a write is taken");
    let restore = ["restore", text(&dir), "--predicate", "name", "--replace"];
    cluster.says(0, &restore, 2, &["name.restoring", "drop that first"]).await;
    cluster.says(0, &["predicate", "drop", "name.restoring"], 0, &[]).await;
    until("it to be gone", async || group("name.restoring").await.is_none().then_some(())).await;

    let first = Range { limit: 10, ..Range::default() };
    let begun = client.scan("name", &first).await.expect("a page");
    let (stop, watching) = watching(&client, "name", [later.clone(), kept.clone()]);
    // Whoever restores is killed while it writes.
    let arguments: Vec<String> =
        [&["--addr", &everywhere], &restore[..]].concat().into_iter().map(str::to_owned).collect();
    let mut killed = Process::start(PROGRAM, "the restore", &scratch.path().join("log"), &arguments);
    until("something beside it", async || group("name.restoring").await).await;
    killed.kill().await;
    // Then the leader of the meta group, which is to carry the step out.
    let mut restoring = Process::start(PROGRAM, "the restore", &scratch.path().join("log2"), &arguments);
    let seat = cluster.meta_leader().await;
    cluster.kill(seat).await;
    cluster.restart(seat).await;
    let exit = restoring.ended().await;
    assert!(exit.success(), "{}", restoring.said());
    let new = group("name").await.expect("it is there");
    assert!(new > old, "another group has the name");
    stop.send(true).expect("it watches");
    let met = watching.await.expect("each reader saw one of the two whole");
    assert!(met[0] > 0, "what was there was read until then: {met:?}");
    verify(&client, "name", &kept).await;
    let on = Range { continuation: begun.continuation, ..first };
    let other = client.scan("name", &on).await.expect_err("a scan does not end in another predicate");
    assert!(other.to_string().contains("another predicate by now"), "{other}");
    until("the old one to be gone", async || group("name.restoring").await.is_none().then_some(())).await;

    // Killed when the step was done and before it was noted: what was written since stays.
    client.put("name", "since", "x").await.expect("a write is taken");
    let place = json!({ "group": new, "chunks": 1, "replaces": old });
    let progress = json!({
        "format": 1, "cluster": backup["backup"]["cluster"], "backup": backup["backup"]["id"], "predicates": { "name": place }
    });
    let noted = scratch.path().join("backups.pontoon-restore");
    fs::write(&noted, progress.to_string()).expect("progress is written");
    let again = told(&cluster, &restore, 0).await;
    assert_eq!(again["resumed"], true, "{again}");
    assert_eq!((group("name").await, noted.exists()), (Some(new), false));
    assert!(client.get("name", "since").await.expect("it reads").is_some());
}

fn killed_has_ended(log: &Path) -> bool {
    fs::read_to_string(log).is_ok_and(|said| said.contains("read back"))
}

/// Every form of a statement.
const STATEMENTS: &str = r#"<http://a/b?c=d#e> <http://p/q> <urn:x> <http://graph> .
<s> <name> "plain" .
<s> <name> "" .
<s> <name> "tab\t line\n quote\" back\\ \u00e9 \U0001F600" .
<s> <name> "raw é 脱走遊戯 😀"@ja .
<s> <name> "x"@zh-Hant-TW <g> .
<s> <date> "1976-06-19"^^<http://www.w3.org/2001/XMLSchema#date> .
_:a.b <friend> _:c-d (close=true, since=2006-01-02, note="a ) b") .
<_:odd/label> <friend> <_:other!> <_:graph?> .
alice likes <cake> .
<a\u0020b> <p\u0020q> <o\U0001F600> .
"#;

#[tokio::test(flavor = "multi_thread")]
async fn an_export_loads_as_what_it_was_made_from() {
    let source = Cluster::start(PROGRAM, "fjall", 1).await;
    let target = Cluster::start(PROGRAM, "sled", 1).await;
    let scratch = PROGRAM.scratch();
    let made = scratch.path().join("made.rdf");
    fs::write(&made, STATEMENTS).expect("the file is written");
    source.says(0, &["load", text(&made)], 0, &["11 triples"]).await;
    if Path::new(FILMS).exists() {
        let progress = scratch.path().join("progress");
        source.says(0, &["load", FILMS, "--state", text(&progress)], 0, &["200000 triples"]).await;
    } else {
        println!("{FILMS} is not there: made statements alone are shown");
    }
    let (first, second) = (scratch.path().join("1.nq.gz"), scratch.path().join("2.nq.gz"));
    let exported = told(&source, &["export", text(&first)], 0).await;
    assert_eq!(exported["foreign"].as_u64(), Some(0), "{exported}");
    target.says(0, &["load", text(&first)], 0, &[]).await;
    told(&target, &["export", text(&second)], 0).await;
    assert_eq!(fs::read(&first).unwrap(), fs::read(&second).unwrap(), "the same rows make the same file");
    let (before, after) = (source.client().await, target.client().await);
    for predicate in exported["predicates"].as_array().expect("predicates") {
        let name = predicate["predicate"].as_str().expect("a name");
        assert_eq!(read_all(&before, name).await, read_all(&after, name).await, "{name}");
    }

    before.put("name", "alice", "not RDF").await.expect("a write is taken");
    let third = scratch.path().join("3.nq");
    let refused = source.says(0, &["export", text(&third)], 2, &["name", "--skip-foreign"]).await;
    assert!(!third.exists() && refused.contains("1 rows"), "{refused}");
    let left = told(&source, &["export", text(&third), "--skip-foreign"], 0).await;
    assert_eq!((left["foreign"].as_u64(), &left["triples"]), (Some(1), &exported["triples"]));
    let said =
        source.says(0, &["export", "-", "--predicate", "likes"], 0, &["<alice> <likes> <cake> ."]).await;
    assert!(said.contains("1 triples"), "{said}");
}

/// What nodes have handed out for backups and exports so far; who does not answer, nothing.
async fn given(cluster: &Cluster) -> Vec<f64> {
    let mut given = Vec::new();
    for at in 0..3 {
        let page = get(cluster.address(at), "/metrics").await.map(|(_, page)| page).unwrap_or_default();
        given.push(metrics(&page).get("pontoon_backup_bytes_total").copied().unwrap_or_default());
    }
    given
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_outlives_the_node_that_it_reads_and_holds_no_half_of_anything() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 3).await;
    let scratch = PROGRAM.scratch();
    let path = |name: &str| scratch.path().join(name);
    let pad = "x".repeat(150);
    let statements: String = (0..16_000).map(|n| format!("<s{n:06}> <name> \"{pad}\" .\n")).collect();
    fs::write(path("made.rdf"), statements).expect("the file is written");
    cluster.says(0, &["load", text(&path("made.rdf"))], 0, &["16000 triples"]).await;
    cluster.voters("name", 3).await;
    let all: Vec<String> = (0..3).map(|at| cluster.address(at).to_owned()).collect();
    let everywhere = all.join(",");

    for (round, file) in ["same.nq.gz", "changed.nq.gz", "-"].into_iter().enumerate() {
        let target = if file == "-" { file.to_owned() } else { text(&path(file)).to_owned() };
        let before = given(&cluster).await;
        let words = ["--addr", &everywhere, "export", &target, "--budget", "1500000"];
        let log = path(&format!("log{round}"));
        let mut exporting = Process::start(PROGRAM, "the export", &log, &words.map(str::to_owned));
        let seat = until("some of it to be read", async || {
            let now = given(&cluster).await;
            (0..3).find(|&at| now[at] >= before[at] + 300_000.0)
        })
        .await;
        if round > 0 {
            // Before everything that it has so far.
            fs::write(path("more.rdf"), format!("<a{round}> <name> \"more\" .\n")).expect("it is written");
            let state = path(&format!("progress{round}"));
            cluster.says(seat, &["load", text(&path("more.rdf")), "--state", text(&state)], 0, &[]).await;
        }
        cluster.kill(seat).await;
        let exit = exporting.ended().await;
        cluster.restart(seat).await;
        if file == "-" {
            assert_eq!(exit.code(), Some(1), "{}", exporting.said());
            assert!(exporting.said().contains("the output is of no use"), "it says so");
            continue;
        }
        assert!(exit.success(), "{}", exporting.said());
        let undisturbed = path(&format!("whole{round}.nq.gz"));
        told(&cluster, &["export", text(&undisturbed)], 0).await;
        assert!(fs::read(path(file)).unwrap() == fs::read(undisturbed).unwrap(), "{file}: each row once");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_changes_its_engine_both_ways_under_writes() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 3).await;
    let client = cluster.client().await;
    let expected = fill(&client, "name", 5_000, 200).await;
    let mut traffic = Traffic::start(&client, "live", 2);
    traffic.acknowledged(20).await;
    cluster.says(0, &["engine", "switch", "paper"], 2, &["fjall or sled"]).await;
    // What a node was told by its command line goes above any wish.
    cluster.says(0, &["engine", "switch", "sled"], 2, &["started with the engine fjall"]).await;
    for at in 0..3 {
        cluster.terminate(at).await;
        cluster.restart(at).await;
        traffic.acknowledged(5).await;
    }
    for engine in ["sled", "fjall"] {
        let scratch = PROGRAM.scratch();
        let log = scratch.path().join("switch");
        // The node that it talks to is restarted, too.
        let all: Vec<&str> = (0..3).map(|at| cluster.address(at)).collect();
        let arguments = ["--addr", &all.join(","), "engine", "switch", engine].map(str::to_owned);
        let mut switching = Process::start(PROGRAM, "the switch", &log, &arguments);
        for at in 0..3 {
            let order = format!("restart n{} ", cluster.id(at));
            until(&order, async || {
                assert!(!fs::read_to_string(&log).unwrap_or_default().contains("pontoon:"), "it goes on");
                fs::read_to_string(&log).ok()?.contains(&order).then_some(())
            })
            .await;
            cluster.terminate(at).await;
            cluster.restart(at).await;
            traffic.acknowledged(10).await;
        }
        let exit = switching.ended().await;
        let said = switching.said();
        assert!(exit.success(), "{said}");
        cluster.says(0, &["engine", "status"], 0, &[engine]).await;
        for at in 0..3 {
            let left = fs::read_dir(cluster.dir(at)).expect("it lists").filter_map(|entry| {
                let name = entry.ok()?.file_name().to_string_lossy().into_owned();
                name.starts_with("engine.").then_some(name)
            });
            assert_eq!(left.collect::<Vec<_>>(), Vec::<String>::new(), "the old engine is gone");
        }
        verify(&client, "name", &expected).await;
    }
    let written = traffic.stop().await;
    verify(&client, "live", &written).await;
    let again = cluster.says(0, &["engine", "switch", "fjall"], 0, &["had it already"]).await;
    assert!(!again.contains("restart"), "{again}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wish_that_cannot_be_met_is_refused_and_keeps_no_node_from_starting() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 1).await;
    let client = cluster.client().await;
    let mut rows = Rows::new();
    for n in 0..3_000 {
        let (key, value) = row(n);
        client.put("name", key.clone(), value.clone()).await.expect("a write is taken");
        rows.insert(key, value);
    }
    cluster.terminate(0).await;
    cluster.restart(0).await;
    until("the log to begin later", async || {
        let groups = client.groups(v1::GroupsRequest::default()).await.ok()?.groups;
        let name = groups.into_iter().find(|group| group.predicate == "name")?;
        (name.replicas.first()?.first_index > 6).then_some(())
    })
    .await;
    cluster.says(0, &["engine", "switch", "sled"], 2, &["alone holds"]).await;
    // As if the others had been lost after it was told.
    cluster.terminate(0).await;
    fs::write(cluster.dir(0).join("ENGINE"), "sled\n").expect("a wish is written");
    cluster.restart(0).await;
    let said = told(&cluster, &["engine", "status"], 0).await;
    assert_eq!(said["nodes"][0]["engine"], "fjall", "{said}");
    assert!(said["nodes"][0]["problem"].as_str().is_some_and(|problem| !problem.is_empty()), "{said}");
    verify(&client, "name", &rows).await;
}
