//! Runs the cases: every engine in a process of its own, a round of each in turn.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

use serde_json::json;

use crate::{
    measure::Figures,
    work::{Case, Kind, Outcome, Scene},
};

/// How long and how often.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    pub(crate) rounds: usize,
    pub(crate) round: Duration,
}

/// This program again, for one engine and case.
pub(crate) fn command(mode: &str, kind: Kind, case: &Case, dir: &Path) -> Outcome<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(mode).arg(serde_json::to_string(&(kind, case))?).arg(dir);
    if mode == "--reopen" {
        // What is freed goes back at once, so that what is left is what is held.
        command
            .env("MALLOC_MMAP_THRESHOLD_", "65536")
            .env("MALLOC_TRIM_THRESHOLD_", "0")
            .env("MALLOC_ARENA_MAX", "1");
    }
    Ok(command)
}

struct Runner {
    kind: Kind,
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    dir: tempfile::TempDir,
    rounds: Vec<Figures>,
}

impl Runner {
    fn start(kind: Kind, case: &Case, parent: &Path) -> Outcome<Runner> {
        let dir = tempfile::tempdir_in(parent)?;
        let mut child = command("--child", kind, case, dir.path())?;
        let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let input = child.stdin.take().ok_or("no input")?;
        let output = BufReader::new(child.stdout.take().ok_or("no output")?);
        Ok(Runner { kind, child, input, output, dir, rounds: Vec::new() })
    }

    fn round(&mut self, time: Duration) -> Outcome<()> {
        writeln!(self.input, "{}", time.as_millis())?;
        self.input.flush()?;
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        self.rounds.push(serde_json::from_str(&line).map_err(|error| format!("{:?}: {error}", self.kind))?);
        Ok(())
    }

    fn end(mut self) -> Outcome<(Kind, Vec<Figures>)> {
        drop(self.input);
        self.child.wait()?;
        self.dir.close()?;
        Ok((self.kind, self.rounds))
    }
}

pub(crate) fn run(
    cases: &[Case],
    engines: &[String],
    pace: Pace,
    parent: &Path,
    as_json: bool,
) -> Outcome<()> {
    let mut ratios: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for case in cases {
        let chosen = case.engines().iter().filter(|kind| match engines {
            [] => **kind != Kind::PontoonEncrypted,
            names => names.iter().any(|name| name == kind.name()),
        });
        let mut runners = Vec::new();
        for kind in chosen {
            runners.push(Runner::start(*kind, case, parent)?);
        }
        // The first round warms up.
        for round in 0..=pace.rounds {
            for runner in &mut runners {
                runner.round(if round == 0 { pace.round / 2 } else { pace.round })?;
                if round == 0 {
                    runner.rounds.clear();
                }
            }
        }
        let mut results = Vec::new();
        for runner in runners {
            results.push(runner.end()?);
        }
        report(case, &results, as_json)?;
        note_ratio(case, &results, &mut ratios);
    }
    if !as_json {
        for (what, ratios) in ratios {
            let mean = (ratios.iter().map(|ratio| ratio.ln()).sum::<f64>() / ratios.len() as f64).exp();
            let least = ratios.iter().copied().fold(f64::MAX, f64::min);
            println!("{what}: geometric mean {mean:.2}, least {least:.2}, of {} cases", ratios.len());
        }
    }
    Ok(())
}

fn entries_per_s(results: &[(Kind, Vec<Figures>)], wanted: Kind) -> Option<f64> {
    let (_, rounds) = results.iter().find(|(kind, _)| *kind == wanted)?;
    Some(Figures::median(rounds).0.entries_per_s)
}

fn note_ratio(case: &Case, results: &[(Kind, Vec<Figures>)], ratios: &mut BTreeMap<String, Vec<f64>>) {
    let Some(ours) = entries_per_s(results, Kind::Pontoon) else { return };
    if case.scene != Scene::Append || case.file_bytes > 0 {
        return;
    }
    let sync = if case.sync { "synced" } else { "unsynced" };
    for kind in [Kind::IdealBuffered, Kind::RaftEngine] {
        if let Some(theirs) = entries_per_s(results, kind) {
            let what = format!("pontoon over {}, {sync}, {} B", kind.name(), case.value_bytes);
            ratios.entry(what).or_default().push(ours / theirs);
        }
    }
}

fn report(case: &Case, results: &[(Kind, Vec<Figures>)], as_json: bool) -> Outcome<()> {
    let ideal = entries_per_s(results, Kind::IdealBuffered);
    let name = case.name();
    if !as_json {
        println!("\n{}", name.trim_end_matches('-'));
        println!(
            "  {:<25} {:>10} {:>19} {:>7} {:>8} {:>8} {:>8} {:>8} {:>8} {:>6} {:>6}",
            "engine",
            "entries/s",
            "spread",
            "ideal",
            "MB/s",
            "p50 us",
            "p99 us",
            "p99.9us",
            "cpu s/M",
            "rss MB",
            "amp"
        );
    }
    for (kind, rounds) in results {
        let (figures, low, high) = Figures::median(rounds);
        if as_json {
            let mut line = json!({
                "engine": kind.name(), "case": name.trim_end_matches('-'), "groups": case.groups,
                "submitters": case.submitters, "value_bytes": case.value_bytes, "sync": case.sync,
                "low": low, "high": high, "rounds": rounds.len(),
            });
            let figures = serde_json::to_value(figures)?;
            if let (Some(line), Some(figures)) = (line.as_object_mut(), figures.as_object()) {
                line.extend(figures.clone());
            }
            println!("{line}");
            continue;
        }
        let Figures { entries_per_s, mb_per_s, p50_us, p99_us, p999_us, cpu_s_per_million, rss_mb, .. } =
            figures;
        let ratio = ideal.map_or(String::new(), |ideal| format!("{:.2}", entries_per_s / ideal));
        let spread = format!("{low:.0}-{high:.0}");
        println!(
            "  {:<25} {entries_per_s:>10.0} {spread:>19} {ratio:>7} {mb_per_s:>8.1} {p50_us:>8.0} {p99_us:>8.0} {p999_us:>8.0} \
             {cpu_s_per_million:>8.3} {rss_mb:>6.0} {:>6.2}",
            kind.name(),
            figures.device_write_amp,
        );
        if case.scene == Scene::Lagging {
            println!("      {:.1} MB on disk", figures.disk_mb);
        } else if !matches!(case.scene, Scene::Append | Scene::Outstanding) {
            println!("      {:.4} s, index {:.1} MB", figures.seconds, figures.index_mb);
        }
    }
    std::io::stdout().flush()?;
    Ok(())
}
