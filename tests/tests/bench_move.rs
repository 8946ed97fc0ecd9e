//! `pontoon bench move` on a small cluster of its own: what it measures is of no interest here, that it measures is.

use std::{fs, os::unix::ffi::OsStrExt, time::Duration};

use pontoon_tests::process::Program;
use serde_json::Value;
use tokio::time::timeout;

const PROGRAM: Program =
    Program { exe: env!("CARGO_BIN_EXE_pontoon-under-test"), scratch: env!("CARGO_TARGET_TMPDIR") };

/// Far above what it takes.
const LIMIT: Duration = Duration::from_secs(300);

const NUMBERS: [&str; 31] = [
    "rate_per_s",
    "cores_busy",
    "moves",
    "bytes",
    "failed_writes",
    "gap_p50_ms",
    "gap_p99_ms",
    "gap_max_ms",
    "leader_moves.gap_p50_ms",
    "leader_moves.gap_p99_ms",
    "leader_moves.gap_max_ms",
    "follower_moves.gap_p50_ms",
    "follower_moves.gap_max_ms",
    "without_move.gap_p50_ms",
    "without_move.gap_max_ms",
    "p50_before_ms",
    "p50_during_ms",
    "p99_before_ms",
    "p99_during_ms",
    "p99_ratio",
    "bytes_per_s",
    "received_bytes_per_s",
    "copy_bytes_per_s",
    "scan_ingest_bytes_per_s",
    "write_amplification",
    "resume_s",
    "resume_target_s",
    "resume_driver_s",
    "tiny_per_s",
    "drain_s",
    "drain_gap_ms",
];

/// Processes that were given a path, by their numbers.
fn processes_with(path: &str) -> Vec<String> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let of_process = names.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
    let has_it = |name: &String| {
        let words = fs::read(format!("/proc/{name}/cmdline")).unwrap_or_default();
        words.windows(path.len()).any(|window| window == path.as_bytes())
    };
    of_process.filter(has_it).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn moves_under_traffic_fail_no_write_and_every_figure_is_there() {
    let scratch = PROGRAM.scratch();
    let dir = std::str::from_utf8(scratch.path().as_os_str().as_bytes()).expect("a path in letters");
    let words = ["bench", "move", "--json", "--bytes", "2MiB", "--moves", "2", "--rate", "50", "--tiny", "4"];
    let arguments = [&words[..], &["--dir", dir]].concat();
    let output =
        timeout(LIMIT, PROGRAM.command(&arguments).output()).await.expect("it ends").expect("it starts");
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{stdout}\n{stderr}");
    let json: Value = serde_json::from_str(stdout.lines().last().expect("an object")).expect("it is JSON");
    assert_eq!((json["failed_writes"].as_u64(), json["moves"].as_u64()), (Some(0), Some(2)), "{json}");
    assert_eq!((json["tiny"].as_u64(), json["engine"].as_str()), (Some(4), Some("fjall")), "{json}");
    for name in NUMBERS {
        let found = name.split('.').fold(&json, |value, part| &value[part]);
        assert!(found.is_number(), "{name} is missing: {json}");
    }
    assert_eq!(fs::read_dir(dir).expect("it is there").count(), 0, "a directory is left");
    assert_eq!(processes_with(dir), Vec::<String>::new(), "a process is left");
}
