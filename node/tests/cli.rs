//! The binary as its users meet it: words, exit codes, JSON on the last line.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, Command, Output, Stdio},
};

use rustix::process::{Pid, Signal};
use serde_json::Value;

struct Running {
    child: Child,
    address: String,
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn pontoon() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pontoon"));
    command.env_remove("PONTOON_ADDR").env_remove("PONTOON_LOG");
    command
}

fn node(dir: &Path) -> Running {
    node_with(dir, &[])
}

fn node_with(dir: &Path, words: &[&str]) -> Running {
    let mut child = pontoon()
        .args(["node", "--json", "--listen", "127.0.0.1:0", "--end-with-parent", "--dir"])
        .arg(dir)
        .args(words)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let said: Value = serde_json::from_str(&line).unwrap();
    Running { child, address: said["address"].as_str().unwrap().to_owned() }
}

fn signal(child: &Child, signal: Signal) {
    let id = Pid::from_raw(child.id().cast_signed()).unwrap();
    rustix::process::kill_process(id, signal).unwrap();
}

fn run(address: &str, words: &[&str]) -> (i32, Value, String) {
    let output = pontoon().args(["--json", "--addr", address]).args(words).output().unwrap();
    read(&output)
}

fn read(output: &Output) -> (i32, Value, String) {
    let stdout = String::from_utf8(output.stdout.clone()).unwrap();
    let json = stdout.lines().last().map(|line| serde_json::from_str(line).unwrap()).unwrap_or_default();
    (output.status.code().unwrap(), json, String::from_utf8(output.stderr.clone()).unwrap())
}

#[test]
fn a_node_that_is_not_there_is_named_with_the_next_step() {
    let (code, json, stderr) = run("127.0.0.1:1", &["status"]);
    assert_eq!(code, 1);
    assert!(stderr.contains("nobody answers at 127.0.0.1:1") && stderr.contains("pontoon node"), "{stderr}");
    assert_eq!(json["code"], 1);
    let (code, _, stderr) = read(&pontoon().args(["fly"]).output().unwrap());
    assert_eq!(code, 2);
    assert!(stderr.contains("fly"), "{stderr}");
    let (code, _, stderr) = run("localhost", &["status"]);
    assert_eq!(code, 2);
    assert!(stderr.contains("localhost") && stderr.contains("HOST:PORT"), "{stderr}");
    let (code, _, stderr) = read(
        &pontoon()
            .args(["node", "--dir", "x", "--listen", "127.0.0.1:7", "--replace", "3"])
            .output()
            .unwrap(),
    );
    assert_eq!(code, 2);
    assert!(stderr.contains("--join"), "{stderr}");
    let (code, _, stderr) =
        read(&pontoon().args(["node", "--dir", "x", "--listen", "0.0.0.0:7"]).output().unwrap());
    assert_eq!(code, 2);
    assert!(stderr.contains("loopback"), "{stderr}");
}

#[test]
fn data_is_written_read_compared_and_loaded() {
    let scratch = tempfile::tempdir().unwrap();
    let node = node(&scratch.path().join("node"));
    let at = node.address.as_str();

    assert_eq!(run(at, &["get", "name", "k"]).0, 2);
    assert_eq!(run(at, &["put", "name", "k", "v"]).1["applied"], true);
    assert_eq!(run(at, &["get", "name", "k"]).1["value"], "v");
    let (code, json, _) = run(at, &["cas", "name", "k", "w", "--absent"]);
    assert_eq!((code, &json["applied"], &json["current"]), (2, &Value::from(false), &Value::from("v")));
    assert_eq!(run(at, &["cas", "name", "k", "w", "--expect", "v"]).0, 0);
    assert_eq!(run(at, &["scan", "name"]).1["rows"][0]["value"], "w");
    assert_eq!(run(at, &["delete", "name", "k"]).0, 0);
    assert_eq!(run(at, &["get", "name", "k"]).0, 1);
    let (code, _, stderr) = run(at, &["put", "name", "k", &"x".repeat(100), "--timeout", "0"]);
    assert_eq!(code, 2, "{stderr}");

    let file = scratch.path().join("data.rdf");
    let mut text = String::new();
    for film in 0..500 {
        text.push_str(&format!(
            "<f.{film}> <title> \"film {film}\"@en .\n<f.{film}> <title> \"кино {film}\"@ru .\n"
        ));
    }
    fs::write(&file, format!("{text}<broken> <title> \"no end .\n<last> <title> \"z\" .\n")).unwrap();
    let path = file.to_str().unwrap();
    let (code, _, stderr) = run(at, &["load", path]);
    assert_eq!(code, 1);
    assert!(stderr.contains("line 1001") && stderr.contains("does not end"), "{stderr}");
    let state = scratch.path().join("data.rdf.pontoon-load");
    assert!(state.exists(), "the next run goes on from there");
    let (code, json, stderr) = run(at, &["load", path, "--skip-bad", "1"]);
    assert_eq!(code, 0, "{stderr}");
    assert_eq!((&json["loaded"], &json["triples"]), (&Value::from(1), &Value::from(1001)));
    assert_eq!(json["resumed_after_line"], 1000);
    assert_eq!(json["skipped"][0]["line"], 1001);
    assert!(!state.exists());
    assert_eq!(
        run(at, &["get", "title", "<f.7>"]).1["objects"].as_array().unwrap().len(),
        2,
        "both objects of a subject come back"
    );
    assert_eq!(run(at, &["scan", "title", "--limit", "0"]).1["rows"].as_array().unwrap().len(), 1001);

    let predicates = run(at, &["predicates"]).1;
    assert!(predicates["predicates"].as_array().unwrap().iter().any(|view| view["predicate"] == "title"));
    assert_eq!(run(at, &["nodes"]).1["nodes"][0]["node"], 1);
    assert_eq!(run(at, &["status"]).1["node"], 1);
    assert_eq!(run(at, &["groups"]).0, 0);
    assert_eq!(run(at, &["move", "list"]).1["moves"], Value::Array(Vec::new()));
    let (code, _, stderr) = run(at, &["move", "start", "nothing", "--from", "1", "--to", "2"]);
    assert_eq!(code, 2, "{stderr}");
    assert_eq!(run(at, &["predicate", "create", "made"]).0, 0);
    assert_eq!(run(at, &["predicate", "drop", "made"]).0, 0);
}

#[test]
fn a_log_is_read_while_its_node_runs_after_it_ended_and_when_it_is_damaged() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("node");
    let wal = |words: &[&str], dir: &Path| {
        read(&pontoon().args(["--json", "wal"]).args(words).arg(dir).output().unwrap())
    };
    let node = node(&dir);
    let needle = "a value that is written once and found again";
    assert_eq!(run(&node.address, &["put", "name", "k", needle]).0, 0);
    assert_eq!(run(&node.address, &["put", "name", "l", "another"]).0, 0);
    let group = run(&node.address, &["predicates"]).1["predicates"][0]["group"].as_u64().unwrap();

    let (code, json, stderr) = wal(&["stat"], &dir);
    assert_eq!((code, &json["running"]), (0, &Value::from(true)), "{stderr}");
    assert!(json["groups"].as_array().unwrap().iter().any(|held| held["group"] == group));
    let (code, json, stderr) = wal(&["verify"], &dir);
    assert_eq!((code, &json["whole"]), (0, &Value::from(true)), "{json} {stderr}");
    let (code, _, stderr) = wal(&["repair"], &dir);
    assert!(code == 2 && stderr.contains("in use"), "{stderr}");
    drop(node);

    let (code, json, _) = wal(&["repair"], &dir);
    assert_eq!((code, &json["needed"], &json["written"]), (0, &Value::from(false), &Value::Null));
    let (code, json, _) = wal(&["verify"], &dir);
    assert_eq!(
        (code, &json["running"], &json["damaged"]),
        (0, &Value::from(false), &Value::Array(Vec::new()))
    );
    let (code, json, _) = wal(
        &["dump", "--group", &group.to_string(), "--payload", "text", "--payload-bytes", "4096"],
        &dir.join("wal"),
    );
    assert_eq!(code, 0);
    let entries = json["entries"].as_array().unwrap();
    assert!(entries.len() >= 2 && json.to_string().contains(needle), "{json}");
    let last = entries.last().unwrap()["index"].as_u64().unwrap();
    let (_, json, _) = wal(&["dump", "--group", &group.to_string(), "--from", &last.to_string()], &dir);
    assert_eq!(json["entries"].as_array().unwrap().len(), 1);
    let (code, json, _) = wal(&["dump", "--frames", "--limit", "100000"], &dir);
    let frames = json["frames"].as_array().unwrap();
    assert!(code == 0 && frames.iter().any(|frame| frame["opening"] == true), "{json}");
    let (_, json, _) = wal(&["dump", "--frames", "--group", &group.to_string()], &dir);
    let held = json["frames"].as_array().unwrap();
    assert!(!held.is_empty() && held.len() < frames.len());
    let (code, _, stderr) = wal(&["dump", "--group", "99"], &dir);
    assert_eq!(code, 1);
    assert!(stderr.contains("99") && stderr.contains("pontoon wal stat"), "{stderr}");
    for nothing in
        [scratch.path().join("nowhere"), scratch.path().to_owned(), dir.join("NODE"), dir.join("engine")]
    {
        let (code, _, stderr) = wal(&["stat"], &nothing);
        assert_eq!(code, 2, "{stderr}");
        assert!(stderr.contains(nothing.to_str().unwrap()) && stderr.contains("holds no log"), "{stderr}");
    }

    let mut hits = 0;
    for entry in fs::read_dir(dir.join("wal")).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = fs::read(&path).unwrap();
        let found: Vec<usize> = bytes
            .windows(needle.len())
            .enumerate()
            .filter(|(_, at)| *at == needle.as_bytes())
            .map(|(at, _)| at)
            .collect();
        found.iter().for_each(|&at| bytes[at] ^= 1);
        hits += found.len();
        fs::write(&path, bytes).unwrap();
    }
    assert!(hits > 0, "the value is in the log");
    let (code, json, _) = wal(&["verify"], &dir);
    assert_eq!(code, 2);
    let damaged = &json["damaged"][0];
    assert_eq!((&damaged["group"], &json["lost"][0]["group"]), (&group.into(), &group.into()));
    assert!(damaged["path"].as_str().unwrap().ends_with(".wal") && damaged["offset"].is_u64(), "{json}");
    assert!(damaged["entries"].is_array(), "{json}");
    let said = pontoon().args(["wal", "verify"]).arg(&dir).output().unwrap();
    let said = String::from_utf8(said.stdout).unwrap();
    assert!(said.contains(&format!("group {group}")) && said.contains("at offset"), "{said}");
    let (code, json, _) = wal(&["stat"], &dir);
    assert_eq!(code, 0);
    assert!(json["damaged"][0].as_str().unwrap().contains(&format!("group {group}")), "{json}");

    let copy = scratch.path().join("copy");
    let target = copy.to_str().unwrap();
    let (code, json, stderr) = wal(&["repair", "--write", target], &dir);
    assert_eq!((code, &json["needed"]), (0, &Value::from(true)), "{stderr}");
    let losing = json["groups"].as_array().unwrap().iter().filter(|copied| !copied["lost"].is_null());
    assert_eq!(losing.map(|copied| copied["group"].as_u64().unwrap()).collect::<Vec<_>>(), [group]);
    let (code, _, stderr) = wal(&["repair", "--write", target], &dir);
    assert!(code == 2 && stderr.contains("exists already"), "{stderr}");
    let (code, json, _) = wal(&["verify"], &copy);
    assert_eq!(
        (code, &json["faults"], &json["lost"][0]["group"]),
        (2, &Value::Array(Vec::new()), &group.into())
    );
}

#[test]
fn a_node_whose_log_nobody_reads_any_more_serves_on() {
    let scratch = tempfile::tempdir().unwrap();
    let mut child = pontoon()
        .args(["node", "--json", "--listen", "127.0.0.1:0", "--end-with-parent", "--dir"])
        .arg(scratch.path().join("node"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stderr.take());
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let said: Value = serde_json::from_str(&line).unwrap();
    let mut node = Running { child, address: said["address"].as_str().unwrap().to_owned() };
    assert_eq!(run(&node.address, &["put", "name", "k", "v"]).0, 0);
    signal(&node.child, Signal::TERM);
    assert_eq!(node.child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_demo_that_is_interrupted_leaves_no_process_and_no_file() {
    let scratch = tempfile::tempdir().unwrap();
    let mut demo = pontoon()
        .args(["demo", "--size", "small"])
        .env("TMPDIR", scratch.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut addresses = Vec::new();
    for line in BufReader::new(demo.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        addresses.extend(line.split_once("serves on ").map(|(_, address)| address.trim().to_owned()));
        if addresses.len() == 3 {
            break;
        }
    }
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1);
    signal(&demo, Signal::INT);
    assert_eq!(demo.wait().unwrap().code(), Some(1));
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0, "a temporary directory is left");
    for address in addresses {
        assert!(std::net::TcpStream::connect(&address).is_err(), "a node still listens on {address}");
    }
}

#[test]
fn a_demo_that_cannot_begin_says_why_before_anything_runs() {
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("file");
    fs::write(&file, "x").unwrap();
    let demo = |words: &[&str], code: i32, says: &str| {
        let (found, json, stderr) = read(&pontoon().args(["--json", "demo"]).args(words).output().unwrap());
        assert_eq!((found, &json["code"]), (code, &Value::from(code)), "{stderr}");
        assert!(stderr.contains(says) && !stderr.contains("starting"), "{stderr}");
    };
    let (dir, file) = (scratch.path().to_str().unwrap(), file.to_str().unwrap());
    demo(&["--dir", dir], 2, "is not empty");
    demo(&["--dir", file], 1, "name another directory with --dir");
    demo(&["--data", "/nowhere/films.rdf"], 1, "name an RDF file with --data");
}

#[test]
fn a_log_is_made_appended_to_read_cut_and_dropped() {
    let scratch = tempfile::tempdir().unwrap();
    let node = node(&scratch.path().join("node"));
    let at = node.address.as_str();
    let refused = |words: &[&str], says: &str| {
        let (code, _, stderr) = run(at, words);
        assert!(code == 2 && stderr.contains(says), "{words:?}: {code} {stderr}");
    };

    refused(&["log", "append", "events", "x"], "pontoon log create events");
    refused(&["log", "read", "events"], "there is no log events");
    assert_eq!(run(at, &["log", "create", "events"]).0, 0);
    let (code, json, stderr) = run(at, &["log", "append", "events", "a", "b"]);
    assert_eq!((code, &json["first"], &json["next"]), (0, &0.into(), &2.into()), "{stderr}");
    let mut child = pontoon()
        .args(["--json", "--addr", at, "log", "append", "events"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"c\n\nlast without an end").unwrap();
    let (code, json, _) = read(&child.wait_with_output().unwrap());
    assert_eq!((code, &json["first"], &json["records"]), (0, &2.into(), &3.into()));
    refused(&["log", "append", "events", "x", "--expect-offset", "4"], "goes on at offset 5");
    assert_eq!(run(at, &["log", "append", "events", "f", "--expect-offset", "5"]).0, 0);

    let (_, json, _) = run(at, &["log", "read", "events", "--from", "1", "--to", "4"]);
    let records: Vec<_> = json["records"].as_array().unwrap().iter().map(|found| &found["record"]).collect();
    assert_eq!(records, ["b", "c", ""]);
    let output = pontoon()
        .args(["--addr", at, "log", "tail", "events", "--from", "4", "--count", "2"])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "4\tlast without an end\n5\tf\n");
    assert_eq!(run(at, &["log", "read", "events", "--local"]).1["records"].as_array().unwrap().len(), 6);

    let (_, json, _) = run(at, &["log", "truncate", "events", "--below", "4"]);
    assert_eq!((&json["lowest"], &json["next"]), (&4.into(), &6.into()));
    refused(&["log", "truncate", "events", "--below", "7"], "ends before");
    refused(&["log", "read", "events", "--from", "3"], "[4, 6)");
    refused(&["log", "tail", "events", "--from", "9"], "[4, 6)");
    let (_, json, _) = run(at, &["log", "list"]);
    assert_eq!((&json["logs"][0]["lowest"], &json["logs"][0]["next"]), (&4.into(), &6.into()));
    let (_, json, _) = run(at, &["log", "reset", "events", "--at", "50"]);
    assert_eq!((&json["next"], &json["era"]), (&50.into(), &2.into()));
    assert_eq!(run(at, &["log", "append", "events", "x"]).1["first"], 50);

    // Each kind of predicate names the commands of its own.
    assert_eq!(run(at, &["put", "name", "k", "v"]).0, 0);
    for words in [&["put", "events", "k", "v"][..], &["get", "events", "k"], &["scan", "events"]] {
        refused(words, "events is a log: `pontoon log append events`");
    }
    for words in [
        &["log", "append", "name", "x"][..],
        &["log", "read", "name"],
        &["log", "tail", "name"],
        &["log", "truncate", "name", "--below", "0"],
        &["log", "reset", "name"],
        &["log", "create", "name"],
        &["log", "drop", "name"],
    ] {
        refused(words, "name is a map: `pontoon put name`");
    }
    refused(&["predicate", "create", "events"], "events is a log");
    let kinds: Vec<Value> = run(at, &["predicates"]).1["predicates"]
        .as_array()
        .unwrap()
        .iter()
        .map(|predicate| predicate["kind"].clone())
        .collect();
    assert_eq!(kinds, ["log", "map"]);
    assert_eq!(run(at, &["log", "drop", "events"]).0, 0);
    refused(&["log", "read", "events"], "there is no log events");
    assert_eq!(run(at, &["get", "name", "k"]).1["value"], "v");
}

#[test]
fn an_encrypted_log_hides_its_entries_and_says_which_key_is_missing() {
    let scratch = tempfile::tempdir().unwrap();
    let (dir, file) = (scratch.path().join("node"), scratch.path().join("keys"));
    let keys = file.to_str().unwrap();
    let wal = |words: &[&str]| read(&pontoon().args(["--json", "wal"]).args(words).output().unwrap());
    let at = dir.to_str().unwrap();
    let (code, json, stderr) = wal(&["key", "new", keys]);
    assert_eq!((code, &json["key"]), (0, &1.into()), "{stderr}");
    let (code, _, stderr) = wal(&["key", "new", keys]);
    assert!(code == 2 && stderr.contains("there already") && stderr.contains("key rotate"), "{stderr}");

    let node = node_with(&dir, &["--wal-keys", keys]);
    let needle = "a value that nobody may find in the log";
    assert_eq!(run(&node.address, &["put", "name", "k", needle]).0, 0);
    let (code, json, stderr) = wal(&["key", "rotate", keys]);
    assert_eq!((code, &json["key"]), (0, &2.into()), "{stderr}");
    drop(node);
    for entry in fs::read_dir(dir.join("wal")).unwrap() {
        let bytes = fs::read(entry.unwrap().path()).unwrap();
        assert!(!bytes.windows(needle.len()).any(|window| window == needle.as_bytes()));
    }

    let start = |words: &[&str]| {
        let words = [&["node", "--listen", "127.0.0.1:0", "--dir", at], words].concat();
        let output = pontoon().args(words).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, stderr) = start(&[]);
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("needs key 1") && stderr.contains("--wal-keys FILE"), "{stderr}");
    let other = scratch.path().join("other");
    let other = other.to_str().unwrap();
    assert_eq!(wal(&["key", "new", other]).0, 0);
    let (code, stderr) = start(&["--wal-keys", other]);
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("needs key 1") && stderr.contains("another key"), "{stderr}");
    fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let (code, stderr) = start(&["--wal-keys", keys]);
    assert!(code == 2 && stderr.contains("chmod 600"), "{stderr}");
    fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();

    // The same again with the keys, and the rotated one in use.
    let node = node_with(&dir, &["--wal-keys", keys]);
    assert_eq!(run(&node.address, &["get", "name", "k"]).1["value"], needle);
    drop(node);
    let (code, json, stderr) = wal(&["stat", at]);
    assert_eq!(
        (code, &json["hidden"], &json["keys"]),
        (0, &true.into(), &serde_json::json!([1, 2])),
        "{stderr}"
    );
    let (code, json, _) = wal(&["stat", at, "--keys", keys]);
    assert_eq!((code, &json["keys"]), (0, &serde_json::json!([1, 2])));
    assert!(!json["groups"].as_array().unwrap().is_empty());
    let (code, json, _) = wal(&["verify", at]);
    assert_eq!(
        (code, &json["whole"], &json["hidden"], &json["entries"]),
        (0, &true.into(), &true.into(), &0.into())
    );
    let (code, json, _) = wal(&["verify", at, "--keys", keys]);
    assert_eq!((code, &json["whole"], &json["hidden"]), (0, &true.into(), &false.into()));
    let (code, json, _) = wal(&["dump", at, "--frames"]);
    assert!(
        code == 0 && json["frames"].as_array().unwrap().iter().all(|frame| frame["key"].is_u64()),
        "{json}"
    );
    let (code, _, stderr) = wal(&["dump", at]);
    assert!(code == 2 && stderr.contains("--keys FILE"), "{stderr}");
    let shown =
        wal(&["dump", at, "--keys", keys, "--payload", "text", "--payload-bytes", "4096"]).1.to_string();
    assert!(shown.contains(needle), "{shown}");
    let copy = scratch.path().join("copy");
    let copy = copy.to_str().unwrap();
    assert_eq!(wal(&["repair", at, "--write", copy]).0, 2);
    assert_eq!(wal(&["repair", at, "--keys", keys, "--write", copy]).0, 0);
    assert_eq!(wal(&["stat", copy, "--keys", keys]).1["keys"], serde_json::json!([2]));
}
