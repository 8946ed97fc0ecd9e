//! The program `chaos` for three minutes, where this process may make namespaces, mounts and devices.
//!
//! `PONTOON_CHAOS_SECONDS` gives it more time or less, `PONTOON_CHAOS_SEED` the chances of an earlier run.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
};

#[test]
fn five_nodes_hurt_in_every_way_lose_nothing_and_tell_no_lies() {
    let seconds = std::env::var("PONTOON_CHAOS_SECONDS").unwrap_or_else(|_| "180".to_owned());
    let mut command = Command::new(env!("CARGO_BIN_EXE_chaos"));
    command.args(["--seconds", &seconds, "--dir", env!("CARGO_TARGET_TMPDIR")]);
    command.args(["--program", env!("CARGO_BIN_EXE_pontoon-under-test")]);
    if let Ok(seed) = std::env::var("PONTOON_CHAOS_SEED") {
        command.args(["--seed", &seed]);
    }
    let mut child = command.stdout(Stdio::piped()).spawn().expect("the program starts");
    let mut last = String::new();
    for line in BufReader::new(child.stdout.take().expect("stdout is a pipe")).lines() {
        last = line.expect("it prints text");
        println!("{last}");
    }
    let exit = child.wait().expect("a child can be awaited");
    assert!(exit.success(), "{exit}: {last}");
    assert!(last.contains("kills") || last.starts_with("skipped"), "{last}");
}
