//! Rules and dashboards name what a node tells, and each rule fires and clears.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

fn dist(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../dist").join(name)
}

fn read(name: &str) -> String {
    fs::read_to_string(dist(name)).expect("the file is there")
}

/// The metrics that the reference page lists; `observe.rs` shows that a node tells exactly those.
fn listed() -> BTreeMap<String, String> {
    let page = pontoon_node::metrics::reference();
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `"));
    let row = |row: &str| {
        let (name, rest) = row.split_once("` | ")?;
        Some((name.to_owned(), rest.split(' ').next()?.to_owned()))
    };
    rows.filter_map(row).collect()
}

/// The metrics that an expression names.
fn named(expression: &str) -> BTreeSet<String> {
    let words = expression.split(|character: char| !(character.is_ascii_alphanumeric() || character == '_'));
    let ours = words.filter(|word| word.starts_with("pontoon_") || word.starts_with("process_"));
    ours.map(str::to_owned).collect()
}

/// # Panics
/// If something is named that no node tells.
fn are_told(expressions: impl Iterator<Item = String>) {
    let listed = listed();
    let mut count = 0;
    for expression in expressions {
        for name in named(&expression) {
            let histogram = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
            let found = match histogram {
                Some(base) => listed.get(base).is_some_and(|kind| kind == "histogram"),
                None => listed.get(&name).is_some_and(|kind| kind != "histogram"),
            };
            assert!(found, "{name} is told by no node: {expression}");
            count += 1;
        }
    }
    assert!(count > 0, "nothing is named");
}

/// The alerts with their expressions.
fn alerts() -> BTreeMap<String, String> {
    let rules = read("prometheus/alerts.yml");
    let after =
        |line: &str, word: &str| line.trim_start_matches([' ', '-']).strip_prefix(word).map(str::to_owned);
    let names = rules.lines().filter_map(|line| after(line, "alert: "));
    let expressions = rules.lines().filter_map(|line| after(line, "expr: "));
    names.zip(expressions).collect()
}

#[test]
fn rules_name_what_a_node_tells_and_the_next_step() {
    are_told(alerts().into_values());
    let rules = read("prometheus/alerts.yml");
    for word in ["summary: ", "next: ", "severity: "] {
        assert_eq!(rules.matches(word).count(), alerts().len(), "each alert has a {word}");
    }
}

#[test]
fn the_dashboard_names_what_a_node_tells() {
    let dashboard: Value = serde_json::from_str(&read("grafana/pontoon.json")).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let targets = panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    let expressions: Vec<String> =
        targets.map(|target| target["expr"].as_str().expect("an expression").to_owned()).collect();
    assert!(expressions.len() > 30, "{}", expressions.len());
    are_told(expressions.into_iter());
    let ids: BTreeSet<u64> = panels.iter().filter_map(|panel| panel["id"].as_u64()).collect();
    assert_eq!(ids.len(), panels.len(), "each panel has an id of its own");
}

/// For each alert: what is told, and its values while it is well, while it is not, and when it is well again, as promtool writes
/// them. A value is told every minute; trouble begins at 20 minutes and is over at 60.
const TRIED: [(&str, &str, &str); 22] = [
    ("PontoonNodeDown", "up{job=\"pontoon\"}", "1x20 0x40 1x60"),
    ("PontoonNotReady", "pontoon_ready", "1x20 0x40 1x60"),
    ("PontoonDiskStalled", "pontoon_problem{code=\"disk-stalled\"}", "0x20 1x40 0x60"),
    ("PontoonDiskFull", "pontoon_disk_room", "0x20 1x40 0x60"),
    ("PontoonDiskFillsUp", "pontoon_disk_free_bytes", "10000+0x20 10000-200x40 10000+0x180"),
    ("PontoonMetaLost", "pontoon_problem{code=\"meta-lost\"}", "0x20 1x40 0x60"),
    ("PontoonGroupsWithoutLeader", "pontoon_replicas_without_leader", "0x20 3x40 0x60"),
    ("PontoonUnderReplicated", "pontoon_groups_under_replicated", "0x20 2x40 0x60"),
    ("PontoonDeadReplicas", "pontoon_replicas{role=\"dead\"}", "0x20 1x40 0x60"),
    ("PontoonReplicaLags", "pontoon_replica_lag_entries_max", "5x20 20000x40 5x60"),
    ("PontoonMoveStuck", "pontoon_moves_stuck", "0x20 1x40 0x60"),
    ("PontoonWritesSlow", "pontoon_write_seconds_bucket", "slow"),
    ("PontoonSyncsSlow", "pontoon_wal_sync_seconds_bucket", "slow"),
    ("PontoonWritesFail", "pontoon_calls_total{call=\"write\",ended=\"failed\"}", "0x20 0+60x40 2400x60"),
    ("PontoonPeerUnreachable", "pontoon_peer_connected{peer=\"2\",class=\"control\"}", "1x20 0x40 1x60"),
    ("PontoonClockTrouble", "pontoon_clock_skew_seconds", "0x20 -1.5x40 0x60"),
    ("PontoonUpgradeUndone", "pontoon_problem{code=\"finalise-due\"}", "0x20 1x40 0x60"),
    ("PontoonCertificateExpires", "pontoon_certificate_expires_seconds", "4000000x20 100000x40 4000000x60"),
    // The clock begins at 0 there. Two days are 172,800 s.
    ("PontoonBackupOverdue", "pontoon_backup_last_success_seconds", "-170000x60 6000x60"),
    ("PontoonAuditNotWritten", "pontoon_audit_written", "1x20 0x40 1x60"),
    ("PontoonTurnedAway", "pontoon_turned_away_total{why=\"handshakes_failed\"}", "0x20 0+600x40 24000x60"),
    ("PontoonRestarts", "process_start_time_seconds{job=\"pontoon\"}", "100x20 100+1x40 140x180"),
];

/// The series of a case, and their values.
fn series(metric: &str, values: &str) -> Vec<(String, String)> {
    if values != "slow" {
        return vec![(metric.to_owned(), values.to_owned())];
    }
    // All is fast, then all is slow, then all is fast again.
    let fast = "0+60x20 1200x40 1200+60x60";
    let all = "0+60x120";
    vec![
        (format!("{metric}{{instance=\"n1\",le=\"0.016384\"}}"), fast.to_owned()),
        (format!("{metric}{{instance=\"n1\",le=\"2.097152\"}}"), fast.to_owned()),
        (format!("{metric}{{instance=\"n1\",le=\"4.194304\"}}"), all.to_owned()),
        (format!("{metric}{{instance=\"n1\",le=\"+Inf\"}}"), all.to_owned()),
    ]
}

#[test]
fn each_alert_fires_and_clears() {
    let tried: BTreeSet<&str> = TRIED.iter().map(|(alert, ..)| *alert).collect();
    let there = alerts();
    assert_eq!(tried, there.keys().map(String::as_str).collect(), "each alert is tried");
    if !Command::new("promtool").arg("--version").output().is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: promtool is not installed (Debian has it in the package prometheus)");
        return;
    }
    let rules = dist("prometheus/alerts.yml");
    let checked = Command::new("promtool").args(["check", "rules"]).arg(&rules).output().expect("it runs");
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));

    let rules = fs::canonicalize(rules).expect("it is there");
    let mut text =
        format!("rule_files: [{:?}]\nevaluation_interval: 1m\ntests:\n", rules.display().to_string());
    for (alert, metric, values) in TRIED {
        let _ = write!(text, "- interval: 1m\n  name: {alert}\n  input_series:\n");
        for (series, values) in series(metric, values) {
            let _ = writeln!(text, "  - {{series: '{series}', values: '{values}'}}");
        }
        text.push_str("  promql_expr_test:\n");
        let firing = format!("count(ALERTS{{alertname=\"{alert}\",alertstate=\"firing\"}})");
        for (at, fires) in [("19m", false), ("59m", true), (clear_at(alert), false)] {
            let samples = if fires { "[{labels: '{}', value: 1}]" } else { "[]" };
            let _ = writeln!(text, "  - {{expr: '{firing}', eval_time: {at}, exp_samples: {samples}}}");
        }
    }
    let scratch = tempfile::tempdir().expect("a directory");
    let file = scratch.path().join("tests.yml");
    fs::write(&file, text).expect("room for a file");
    let tested = Command::new("promtool").args(["test", "rules"]).arg(&file).output().expect("it runs");
    let said = [tested.stdout, tested.stderr].concat();
    assert!(tested.status.success(), "{}", String::from_utf8_lossy(&said));
}

/// The units as their directives, comments and descriptions left out.
fn directives(unit: &str) -> Vec<String> {
    let lines = unit.lines().filter(|line| !line.is_empty() && !line.starts_with(['#', '[']));
    lines.filter(|line| !line.starts_with("Description=")).map(str::to_owned).collect()
}

#[test]
fn the_units_are_the_same_but_for_the_node_and_systemd_understands_them() {
    let (one, several) = (read("systemd/pontoon.service"), read("systemd/pontoon@.service"));
    let places = [
        ("/etc/pontoon/pontoon.toml", "/etc/pontoon/%i.toml"),
        ("--dir /var/lib/pontoon", "--dir /var/lib/pontoon/%i"),
        ("StateDirectory=pontoon", "StateDirectory=pontoon/%i"),
    ];
    let as_several: Vec<String> = directives(&one)
        .into_iter()
        .map(|line| match places.iter().find(|(from, _)| line.ends_with(from)) {
            Some((from, to)) => line.replace(from, to),
            // Its file is named before the directory.
            None => line,
        })
        .map(|line| line.replace("/etc/pontoon/pontoon.toml", "/etc/pontoon/%i.toml"))
        .collect();
    assert_eq!(as_several, directives(&several));
    assert!(one.contains("Type=notify") && one.contains("RestartPreventExitStatus=2"));

    if !Command::new("systemd-analyze").arg("--version").output().is_ok_and(|output| output.status.success())
    {
        eprintln!("skipped: systemd-analyze is not installed");
        return;
    }
    let scratch = tempfile::tempdir().expect("a directory");
    for (name, unit) in [("pontoon.service", one), ("pontoon@1.service", several)] {
        // Its binary and its user are not on this machine.
        let unit = unit.replace("/usr/local/bin/pontoon", "/bin/true").replace("=pontoon\n", "=root\n");
        let file = scratch.path().join(name);
        fs::write(&file, unit).expect("room for a file");
        let verified = Command::new("systemd-analyze")
            .args(["verify", "--man=no"])
            .arg(&file)
            .output()
            .expect("it runs");
        let said = [verified.stdout, verified.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        let ours: Vec<&str> = said.lines().filter(|line| line.contains(name)).collect();
        assert!(verified.status.success() && ours.is_empty(), "{said}");
    }
}

/// Those that look back for an hour clear later.
fn clear_at(alert: &str) -> &'static str {
    match alert {
        "PontoonDiskFillsUp" | "PontoonRestarts" => "200m",
        _ => "110m",
    }
}
