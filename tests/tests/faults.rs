//! Bad input and faults as a user meets them: a message that names the thing and the next step, and a bad exit.

use std::{fs, path::Path};

use pontoon_tests::{
    cluster::{Cluster, free_address, within},
    process::{Process, Program},
    traffic::{Traffic, verify},
};

const PROGRAM: Program =
    Program { exe: env!("CARGO_BIN_EXE_pontoon-under-test"), scratch: env!("CARGO_TARGET_TMPDIR") };

/// Runs a command that must fail, and checks that what it says holds all of `words`.
async fn refused(arguments: &[&str], words: &[&str]) {
    let (exit, said) = PROGRAM.run(arguments).await;
    assert!(exit.code().is_some_and(|code| code != 0), "{arguments:?} ended with {exit}: {said}");
    for word in words {
        assert!(said.contains(word), "{arguments:?} does not say {word:?}: {said}");
    }
    assert!(!said.contains("panicked"), "{said}");
}

async fn node_refused(dir: &Path, listen: &str, more: &[&str], words: &[&str]) {
    let dir = dir.display().to_string();
    let arguments = [&["node", "--end-with-parent", "--dir", &dir, "--listen", listen], more].concat();
    refused(&arguments, words).await;
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &to.join(entry.file_name())),
            false => drop(fs::copy(entry.path(), to.join(entry.file_name())).unwrap()),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_cannot_start_says_why_and_what_to_do() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 1).await;
    let scratch = PROGRAM.scratch();
    let new = scratch.path().join("new");
    let running = cluster.address(0).to_owned();

    node_refused(&new, &running, &[], &[&running, "in use", "--listen"]).await;
    node_refused(&new, "0.0.0.0:7001", &[], &["0.0.0.0:7001", "loopback", "127.0.0.1"]).await;
    let nobody = free_address();
    node_refused(&new, &free_address(), &["--join", &nobody], &[&nobody, "nobody answers", "--join"]).await;
    // The directory of a node that runs.
    let taken = cluster.dir(0).clone();
    node_refused(&taken, &free_address(), &[], &["wal", "use"]).await;

    let foreign = scratch.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("thesis.tex"), "important").unwrap();
    node_refused(&foreign, &free_address(), &[], &["foreign", "thesis.tex", "empty directory"]).await;
    assert_eq!(fs::read_dir(&foreign).unwrap().count(), 1, "nothing was written beside what is not ours");

    let newer = scratch.path().join("newer");
    fs::create_dir(&newer).unwrap();
    fs::write(newer.join("NODE"), r#"{"format": 9, "surprise": true}"#).unwrap();
    node_refused(&newer, &free_address(), &[], &["NODE", "format 9", "run the version"]).await;

    let file = scratch.path().join("file");
    fs::write(&file, "").unwrap();
    node_refused(&file, &free_address(), &[], &["file"]).await;

    refused(&["node", "--dir", "d"], &["--listen", "PONTOON_LISTEN", "--config"]).await;
    refused(&["node", "--dir", "d", "--listen", "x:1", "--engine", "paper"], &["paper", "fjall or sled"])
        .await;
    refused(&["noed"], &["noed", "--help"]).await;
    assert!(cluster.terminate(0).await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_disk_of_another_is_not_taken_for_ones_own() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 2).await;
    let mut other = Cluster::start(PROGRAM, "fjall", 1).await;
    for at in 0..2 {
        assert!(cluster.terminate(at).await.success());
    }
    assert!(other.terminate(0).await.success());

    // The log of another node of the same cluster, and of another cluster.
    let listen = free_address();
    for wal in [cluster.dir(1).join("wal"), other.dir(0).join("wal")] {
        let wal_dir = wal.display().to_string();
        let words = [wal_dir.as_str(), "belongs to", "--wal-dir"];
        node_refused(cluster.dir(0), &listen, &["--wal-dir", &wal_dir], &words).await;
    }
    // A log without its directory.
    let scratch = PROGRAM.scratch();
    let wal_dir = cluster.dir(0).join("wal").display().to_string();
    let words = [wal_dir.as_str(), "belongs to", "a new node"];
    node_refused(&scratch.path().join("new"), &listen, &["--wal-dir", &wal_dir], &words).await;
    // A directory without its log.
    let lost = scratch.path().join("lost");
    fs::create_dir(&lost).unwrap();
    fs::copy(cluster.dir(0).join("NODE"), lost.join("NODE")).unwrap();
    node_refused(&lost, &listen, &[], &["wal", "empty"]).await;

    // None of it did harm.
    cluster.restart_all(&[0, 1]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r23_an_empty_directory_at_a_live_nodes_address_is_refused() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 3).await;
    let address = cluster.address(2).to_owned();
    cluster.kill(2).await;
    let scratch = PROGRAM.scratch();
    let join = cluster.address(0).to_owned();
    let words = [address.as_str(), "decommission", "--replace"];
    node_refused(&scratch.path().join("empty"), &address, &["--join", &join], &words).await;
    cluster.restart(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r24_a_copied_directory_never_serves_beside_its_original() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 3).await;
    let client = cluster.client().await;
    let mut traffic = Traffic::start(&client, "name", 2);
    cluster.voters("name", 3).await;
    traffic.acknowledged(20).await;

    // The image of a stopped node; the original starts again before the copy does.
    assert!(cluster.terminate(2).await.success());
    let scratch = PROGRAM.scratch();
    let image = scratch.path().join("image");
    copy(cluster.dir(2), &image);
    cluster.restart(2).await;
    traffic.acknowledged(20).await;

    let id = format!("n{}", cluster.id(2));
    let words = [id.as_str(), "cannot go on", "copy"];
    node_refused(&image, &free_address(), &[], &words).await;
    // The original was not disturbed.
    traffic.acknowledged(20).await;
    // A copy of the directory of a node that runs, as it stands at one moment.
    let live = scratch.path().join("live");
    cluster.pause(2);
    copy(cluster.dir(2), &live);
    cluster.resume(2);
    node_refused(&live, &free_address(), &[], &[id.as_str(), "cannot go on", "copy"]).await;
    traffic.acknowledged(20).await;
    let rows = traffic.stop().await;
    verify(&client, "name", &rows).await;
    let holders = cluster.voters("name", 3).await;
    assert!(holders.contains(&2));
}

#[tokio::test(flavor = "multi_thread")]
async fn r25_an_old_image_in_the_place_of_its_node_is_refused() {
    let mut cluster = Cluster::start(PROGRAM, "fjall", 3).await;
    let client = cluster.client().await;
    let mut traffic = Traffic::start(&client, "name", 2);
    cluster.voters("name", 3).await;
    traffic.acknowledged(20).await;

    // The image is of before a later start, in which the node votes and acknowledges.
    assert!(cluster.terminate(2).await.success());
    let scratch = PROGRAM.scratch();
    let image = scratch.path().join("image");
    copy(cluster.dir(2), &image);
    cluster.restart(2).await;
    traffic.acknowledged(100).await;
    let (id, address) = (format!("n{}", cluster.id(2)), cluster.address(2).to_owned());
    cluster.kill(2).await;

    let replace = format!("--replace {id}");
    node_refused(&image, &address, &[], &[&id, "cannot go on", "later or other disk", &replace]).await;
    traffic.acknowledged(20).await;
    // Its own directory is welcome as before.
    cluster.restart(2).await;
    let rows = traffic.stop().await;
    verify(&client, "name", &rows).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_may_not_do_is_refused_before_it_is_done() {
    let cluster = Cluster::start(PROGRAM, "fjall", 1).await;
    let address = cluster.address(0).to_owned();
    let at = |words: &[&str]| -> Vec<String> {
        [&["--addr", &address], words].concat().into_iter().map(str::to_owned).collect()
    };
    let check = async |arguments: Vec<String>, words: &[&str]| {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        refused(&arguments, words).await;
    };
    check(at(&["get", "nobody", "k"]), &["nobody", "pontoon predicates"]).await;
    check(at(&["scan", "nobody"]), &["nobody", "pontoon predicates"]).await;
    check(at(&["predicate", "drop", "nobody"]), &["nobody"]).await;
    check(at(&["move", "start", "nobody", "--from", "1", "--to", "2"]), &["nobody"]).await;
    let key = "k".repeat(4097);
    check(at(&["put", "name", &key, "v"]), &["key", "4097", "4096"]).await;
    let nobody = free_address();
    refused(&["--addr", &nobody, "status"], &[&nobody, "nobody answers", "pontoon node"]).await;
    refused(&["--addr", "nonsense", "status"], &["nonsense"]).await;

    // A value over the limit comes by a file of statements; no argument is that long.
    let scratch = PROGRAM.scratch();
    let file = scratch.path().join("long.rdf");
    fs::write(&file, format!("<a> <name> \"{}\" .\n", "x".repeat(1 << 20))).unwrap();
    let name = file.display().to_string();
    check(at(&["load", &name]), &["1048576"]).await;
    let file = scratch.path().join("bad.rdf");
    fs::write(&file, "<a> <name> \"b\" .\n<a> <name> .\n").unwrap();
    let name = file.display().to_string();
    check(at(&["load", &name]), &["bad.rdf", "2"]).await;
    check(at(&["load", "/nowhere/at/all.rdf"]), &["/nowhere/at/all.rdf"]).await;

    // The cluster goes on.
    let arguments = at(&["put", "name", "k", "v"]);
    let (exit, said) = PROGRAM.run(&arguments).await;
    assert!(exit.success(), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_is_interrupted_leaves_nothing_that_stops_the_next_one() {
    let cluster = Cluster::start(PROGRAM, "fjall", 1).await;
    let scratch = PROGRAM.scratch();
    let dir = scratch.path().join("joiner");
    let listen = free_address();
    let mut arguments: Vec<String> = ["node", "--end-with-parent", "--dir"].map(str::to_owned).into();
    arguments.extend([dir.display().to_string(), "--listen".into(), listen.clone()]);
    arguments.extend(["--join".to_owned(), cluster.address(0).to_owned()]);
    // Killed when more and more of its directory exists.
    for part in ["NODE", "wal", "PEERS", "engine"] {
        let mut process = Process::start(PROGRAM, "joiner", &scratch.path().join("log"), &arguments);
        let appears = async {
            while !dir.join(part).exists() && process.exit().is_none() {
                tokio::task::yield_now().await;
            }
        };
        within(&format!("{part} to appear"), appears).await;
        assert_eq!(process.exit(), None, "{}", process.said());
        process.kill().await;
    }
    let mut process = Process::start(PROGRAM, "joiner", &scratch.path().join("last-log"), &arguments);
    cluster
        .map_until("the joiner to be in the map once", |map| {
            let there = map.nodes.iter().filter(|node| node.address == listen).count();
            (there == 1).then_some(())
        })
        .await;
    process.prints("serves on").await;
    let exit = process.terminate().await;
    assert!(exit.success(), "{exit}: {}", process.said());
}
