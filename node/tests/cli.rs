//! The binary as its users meet it: words, exit codes, JSON on the last line.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Output, Stdio},
};

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
    let mut child = pontoon()
        .args(["node", "--json", "--listen", "127.0.0.1:0", "--end-with-parent", "--dir"])
        .arg(dir)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let said: Value = serde_json::from_str(&line).unwrap();
    Running { child, address: said["address"].as_str().unwrap().to_owned() }
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
