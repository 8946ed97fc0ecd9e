//! Three nodes of ours, and `pontoon bench` as their load.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use serde_json::Value;

use crate::{
    Case, Cluster, Figures, Load, Outcome,
    process::{Member, cpu_of},
};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// Builds the release binary and tells where it is.
pub(crate) fn build() -> Outcome<PathBuf> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let output = Command::new(cargo)
        .args(["build", "--release", "--package", "pontoon-node", "--message-format", "json"])
        .current_dir(ROOT)
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err("the release binary does not build".into());
    }
    let built = String::from_utf8(output.stdout)?;
    let artifacts = built.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let binary = artifacts.filter_map(|line| line["executable"].as_str().map(PathBuf::from)).next();
    binary.ok_or_else(|| "the build names no binary".into())
}

/// What of ours is measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    pub(crate) engine: &'static str,
    /// Between the nodes and towards the load.
    pub(crate) tls: bool,
}

impl Kind {
    pub(crate) const FJALL: Kind = Kind { name: "fjall", engine: "fjall", tls: false };
    pub(crate) const SLED: Kind = Kind { name: "sled", engine: "sled", tls: false };

    pub(crate) fn with_tls(self) -> Kind {
        let name = if self.engine == "sled" { "sled+tls" } else { "fjall+tls" };
        Kind { name, tls: true, ..self }
    }
}

pub(crate) struct Ours {
    kind: Kind,
    /// Certificates, if there are any.
    certs: Option<PathBuf>,
    binary: PathBuf,
    members: Vec<Member>,
    addresses: Vec<String>,
}

impl Ours {
    /// Three nodes, ready.
    pub(crate) fn start(binary: &Path, dir: &Path, kind: Kind) -> Outcome<Ours> {
        let certs = if kind.tls { Some(make_certs(binary, dir)?) } else { None };
        let (members, addresses) = (Vec::new(), Vec::new());
        let mut cluster = Ours { kind, certs, binary: binary.to_owned(), members, addresses };
        for number in 1..=3 {
            let log = std::fs::File::create(dir.join(format!("ours{number}.log")))?;
            let mut command = cluster.command(&format!("node-{number}"));
            command.args(["node", "--json", "--end-with-parent", "--listen", "127.0.0.1:0"]);
            command.args(["--engine", kind.engine, "--dir"]).arg(dir.join(format!("ours{number}")));
            if let Some(first) = cluster.addresses.first() {
                command.args(["--join", first]);
            }
            let mut member = Member::spawn(command.stdout(Stdio::piped()).stderr(log))?;
            let mut line = String::new();
            let output = member.child().stdout.take().ok_or("no output")?;
            BufReader::new(output).read_line(&mut line)?;
            let ready: Value = serde_json::from_str(&line).map_err(|error| format!("{line:?}: {error}"))?;
            let address = ready["address"].as_str().ok_or_else(|| format!("no address in {line}"))?;
            cluster.addresses.push(address.to_owned());
            cluster.members.push(member);
        }
        Ok(cluster)
    }

    /// The program, with the certificate of that name.
    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(&self.binary);
        if let Some(certs) = &self.certs {
            command.env("PONTOON_TLS_CA", certs.join("ca.pem"));
            command.env("PONTOON_TLS_CERT", certs.join(format!("{name}.pem")));
            command.env("PONTOON_TLS_KEY", certs.join(format!("{name}.key")));
        }
        command
    }

    fn load(&self, case: &Case, seconds: u64, reads: bool) -> Outcome<Member> {
        let mut command = self.command("operator-bench");
        command.args(["bench", "--json", "--addr", &self.addresses.join(",")]);
        let batch = if let Load::Batch(batch) = case.load { batch } else { 1 };
        for (flag, value) in [
            ("--clients", u64::from(case.clients)),
            ("--batch", u64::from(batch)),
            ("--seconds", seconds),
            ("--value-bytes", u64::from(case.value_bytes)),
            ("--predicates", u64::from(case.predicates)),
        ] {
            command.arg(flag).arg(value.to_string());
        }
        if reads {
            command.arg("--reads");
        }
        Member::spawn(command.stdout(Stdio::piped()))
    }
}

/// An authority, three nodes' certificates and one for the load, made as an operator makes them.
fn make_certs(binary: &Path, dir: &Path) -> Outcome<PathBuf> {
    let certs = dir.join("certs");
    let init = vec!["init"];
    let node = |id| vec!["node", "--id", id, "--host", "127.0.0.1"];
    let client = vec!["client", "--role", "operator", "--name", "bench"];
    for words in [init, node("1"), node("2"), node("3"), client] {
        let output = Command::new(binary).arg("certs").args(&words).arg("--dir").arg(&certs).output()?;
        if !output.status.success() {
            return Err(format!("certs {words:?}: {}", String::from_utf8_lossy(&output.stderr)).into());
        }
    }
    Ok(certs)
}

fn finish(mut load: Member) -> Outcome<Value> {
    let output = load.child().stdout.take().ok_or("no output")?;
    let lines: Vec<String> = BufReader::new(output).lines().collect::<Result<_, _>>()?;
    load.child().wait()?;
    let last = lines.last().ok_or("pontoon bench said nothing")?;
    let printed: Value = serde_json::from_str(last)?;
    if printed["failed"].as_u64() != Some(0) {
        return Err(format!("operations failed: {last}").into());
    }
    Ok(printed)
}

impl Cluster for Ours {
    fn name(&self) -> &'static str {
        self.kind.name
    }

    fn run(&mut self, case: &Case, time: Duration) -> Outcome<Option<Figures>> {
        let reads = case.load == Load::Read;
        // The predicates come into being, and what is read.
        finish(self.load(&Case { load: Load::Put, ..*case }, 1, false)?)?;
        let before = cpu_of(&self.members)?;
        let load = self.load(case, time.as_secs(), reads)?;
        if case.load == Load::Failover {
            std::thread::sleep(time / 3);
            // Any node leads some of the predicates.
            self.members.remove(1).kill()?;
            self.addresses.remove(1);
        }
        let printed = finish(load)?;
        let number = |name: &str| printed[name].as_f64().ok_or_else(|| format!("no {name} in {printed}"));
        let cpu = match case.load {
            Load::Failover => 0.0,
            _ => (cpu_of(&self.members)? - before).as_secs_f64() * 1000.0 / number("operations")?,
        };
        Ok(Some(Figures {
            per_s: number("ops_per_s")?,
            p50_ms: number("p50_ms")?,
            p99_ms: number("p99_ms")?,
            p999_ms: number("p999_ms")?,
            max_ms: number("max_ms")?,
            cpu_ms_per_op: cpu,
        }))
    }
}
