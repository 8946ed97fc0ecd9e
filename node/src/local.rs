//! A cluster of node processes on this machine, for the demo and for measurements.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use pontoon_node::client::Client;
use pontoon_proto::v1;
use pontoon_shard::EngineKind;
use tokio::time::{Instant, sleep, timeout};

use crate::cli::{Failure, TLS_VARIABLES};

/// How long a node may take until it serves.
const START: Duration = Duration::from_secs(60);
/// How long a node may take to end by itself.
const STOP: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The processes. Dropping this kills them, unless they are to be kept.
#[derive(Debug)]
pub(crate) struct Cluster {
    binary: PathBuf,
    dir: PathBuf,
    engine: Option<EngineKind>,
    /// Whether the processes may outlive this one.
    keep: bool,
    nodes: Vec<NodeProcess>,
}

#[derive(Debug)]
pub(crate) struct NodeProcess {
    pub(crate) address: String,
    child: Child,
}

impl Cluster {
    pub(crate) fn new(dir: &Path, engine: Option<EngineKind>, keep: bool) -> Result<Self, Failure> {
        let binary = std::env::current_exe()
            .map_err(|error| Failure::error(format!("where this program lies cannot be told: {error}")))?;
        Ok(Cluster { binary, dir: dir.to_owned(), engine, keep, nodes: Vec::new() })
    }

    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// The operating system's number of a node's process.
    pub(crate) fn process(&self, number: u64) -> u32 {
        self.nodes[number as usize - 1].child.id()
    }

    pub(crate) fn address(&self, number: u64) -> String {
        self.nodes[number as usize - 1].address.clone()
    }

    pub(crate) fn addresses(&self) -> Vec<String> {
        self.nodes.iter().map(|node| node.address.clone()).collect()
    }

    /// Starts the next node: the first founds the cluster, the others join it.
    pub(crate) async fn start(&mut self) -> Result<&NodeProcess, Failure> {
        let number = self.nodes.len() + 1;
        let join = self.nodes.first().map(|node| node.address.clone());
        let node = self.spawn(number, "127.0.0.1:0", join.as_deref()).await?;
        self.nodes.push(node);
        Ok(&self.nodes[number - 1])
    }

    /// Kills a node as a loss of power of its process would: SIGKILL, no word to anybody.
    pub(crate) fn kill(&mut self, number: u64) -> Result<(), Failure> {
        let child = &mut self.nodes[number as usize - 1].child;
        child
            .kill()
            .and_then(|()| child.wait())
            .map_err(|error| Failure::error(format!("node {number} could not be killed: {error}")))?;
        Ok(())
    }

    /// Starts a killed node where it was.
    pub(crate) async fn restart(&mut self, number: u64) -> Result<(), Failure> {
        let address = self.nodes[number as usize - 1].address.clone();
        self.nodes[number as usize - 1] = self.spawn(number as usize, &address, None).await?;
        Ok(())
    }

    async fn spawn(&self, number: usize, listen: &str, join: Option<&str>) -> Result<NodeProcess, Failure> {
        let log_path = self.dir.join(format!("node{number}.log"));
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            Failure::error(format!("node {number} {what}: {error}; its log is {}", log_path.display()))
        };
        let log = File::options()
            .create(true)
            .append(true)
            .open(&log_path)
            .map_err(|error| failed("has no place for its log", &error))?;
        let mut command = Command::new(&self.binary);
        // These nodes are reached from this machine alone, whatever cluster the one who runs this works with.
        for name in TLS_VARIABLES {
            command.env_remove(name);
        }
        command.arg("node").arg("--json").arg("--listen").arg(listen);
        command.arg("--dir").arg(self.dir.join(format!("node{number}")));
        if let Some(join) = join {
            command.arg("--join").arg(join);
        }
        if let Some(engine) = self.engine {
            command.arg("--engine").arg(engine.to_string());
        }
        if self.keep {
            // A Ctrl-C for this process shall not reach nodes that are meant to stay.
            std::os::unix::process::CommandExt::process_group(&mut command, 0);
        } else {
            command.arg("--end-with-parent");
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .map_err(|error| failed("cannot be started", &error))?;
        let stdout = child.stdout.take();
        // The guard exists before anything is awaited: whoever drops this future leaves no process behind.
        let mut node = NodeProcess { address: String::new(), child };
        let first_line = tokio::task::spawn_blocking(move || {
            let mut line = String::new();
            if let Some(stdout) = stdout {
                BufReader::new(stdout).read_line(&mut line)?;
            }
            Ok::<_, std::io::Error>(line)
        });
        let line = match timeout(START, first_line).await {
            Ok(Ok(Ok(line))) => line,
            Ok(Ok(Err(error))) => return Err(failed("says nothing", &error)),
            Ok(Err(error)) => return Err(failed("says nothing", &error)),
            Err(_) => return Err(failed("does not serve", &format!("nothing within {} s", START.as_secs()))),
        };
        let said: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
        match said["address"].as_str() {
            Some(address) => address.clone_into(&mut node.address),
            None => {
                let reason = said["error"].as_str().unwrap_or("it ended").to_owned();
                return Err(failed("did not start", &reason));
            }
        }
        Ok(node)
    }

    /// Waits until the cluster lists so many nodes that answer.
    pub(crate) async fn await_nodes(&self, client: &Client, count: usize) -> Result<(), Failure> {
        let until = Instant::now() + START;
        loop {
            let nodes = client.nodes(v1::NodesRequest {}).await?.nodes;
            if nodes.iter().filter(|node| node.reachable).count() >= count {
                return Ok(());
            }
            if Instant::now() >= until {
                let text = format!(
                    "of {count} nodes only {} are listed; the logs are in {}",
                    nodes.len(),
                    self.dir.display()
                );
                return Err(Failure::error(text));
            }
            sleep(LOOK_EVERY).await;
        }
    }

    /// Ends the processes as an operator would, and those that do not end by force.
    pub(crate) async fn stop(mut self) {
        for node in &self.nodes {
            if let Some(id) = rustix::process::Pid::from_raw(node.child.id() as i32) {
                // One that has ended already is as good.
                let _ = rustix::process::kill_process(id, rustix::process::Signal::TERM);
            }
        }
        let until = Instant::now() + STOP;
        while Instant::now() < until {
            if self.nodes.iter_mut().all(|node| matches!(node.child.try_wait(), Ok(Some(_)) | Err(_))) {
                break;
            }
            sleep(LOOK_EVERY).await;
        }
    }

    /// Leaves the processes running and says how to talk to them.
    pub(crate) fn keep(mut self, dir: &Path) -> String {
        let mut text = format!("\nthe cluster goes on, its data is in {}:", dir.display());
        for (at, mut node) in std::mem::take(&mut self.nodes).into_iter().enumerate() {
            text.push_str(&format!("\n  node {} at {}, process {}", at + 1, node.address, node.child.id()));
            if at == 0 {
                text.push_str(&format!("  (pontoon status --addr {})", node.address));
            }
            // Reaps it if it has ended already; otherwise it belongs to nobody from here on.
            drop(node.child.try_wait());
            node.leave();
        }
        text.push_str("\nend it with kill and the numbers of the processes");
        text
    }
}

impl NodeProcess {
    fn leave(self) {
        std::mem::forget(self);
    }
}

impl Drop for NodeProcess {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            drop(self.child.kill());
            drop(self.child.wait());
        }
    }
}
