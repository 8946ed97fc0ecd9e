//! Namespaces, and the nodes in them.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use fuser::BackgroundSession;
use pontoon_node::{
    TlsFiles,
    client::{Client, ConnectOptions},
};
use pontoon_proto::v1;
use tokio::time::sleep;

use super::{disk::Disk, mount::mount, net::Net};
use crate::{
    cluster::within,
    process::{Process, Program},
};

const PORT: u16 = 7400;
/// Between two looks at a node that starts.
const LOOK: Duration = Duration::from_millis(50);

/// A namespace for the network and the clocks, as long as the value lives.
struct Host {
    holder: Child,
    pid: u32,
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(self.holder.kill());
        drop(self.holder.wait());
    }
}

/// Runs a command of the system.
///
/// # Errors
/// If it fails, with what it said.
pub(super) fn run(words: &[&str]) -> Result<(), String> {
    let [program, arguments @ ..] = words else { return Ok(()) };
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{program} does not start: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{}: {}", words.join(" "), String::from_utf8_lossy(&output.stderr).trim())),
    }
}

/// Sets up the device of a host where this process is.
///
/// # Errors
/// If this process may not.
pub fn set_up_here(host: usize) -> Result<(), String> {
    let address = format!("{}/24", Net::address(host));
    run(&["ip", "link", "set", "lo", "up"])?;
    run(&["ip", "addr", "add", &address, "dev", &Net::device(host)])?;
    run(&["ip", "link", "set", &Net::device(host), "up"])
}

impl Host {
    /// A namespace whose monotonic clock is so many seconds ahead.
    fn new(host: usize, ahead_s: u64) -> Result<Host, String> {
        let ahead = ahead_s.to_string();
        let mut holder = Command::new("unshare")
            .args(["--net", "--time", "--monotonic", &ahead, "--boottime", &ahead, "--fork", "--kill-child"])
            .args(["sh", "-c", "echo $$; exec sleep infinity"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("unshare does not start: {error}"))?;
        let mut line = String::new();
        let said = BufReader::new(holder.stdout.take().expect("stdout is a pipe")).read_line(&mut line);
        let pid = said.ok().and_then(|_| line.trim().parse().ok());
        let Some(pid) = pid else { return Err("no namespace was made".to_owned()) };
        let host_of = Host { holder, pid };
        run(&["ip", "link", "set", &Net::device(host), "netns", &pid.to_string()])?;
        let (device, address) = (Net::device(host), Net::address(host));
        let set_up =
            format!("ip link set lo up && ip addr add {address}/24 dev {device} && ip link set {device} up");
        let enter: Vec<String> =
            host_of.enter().into_iter().chain(["sh".into(), "-c".into(), set_up]).collect();
        run(&enter.iter().map(String::as_str).collect::<Vec<&str>>())?;
        Ok(host_of)
    }

    /// What puts a command into the namespace.
    fn enter(&self) -> Vec<String> {
        let of = |kind: &str| format!("--{kind}=/proc/{}/ns/{kind}", self.pid);
        vec!["nsenter".to_owned(), of("net"), of("time"), "--".to_owned()]
    }
}

struct Node {
    host: Host,
    disk: Arc<Disk>,
    // Before the namespace's end, and after the process's.
    _mount: BackgroundSession,
    dir: PathBuf,
    log: PathBuf,
    process: Option<Process>,
}

/// Nodes 1 to n on hosts 0 to n − 1; host n is where this process is.
pub struct Nodes {
    program: Program,
    certs: PathBuf,
    engine: String,
    nodes: Vec<Node>,
}

impl Nodes {
    /// Makes certificates, disks and namespaces for so many nodes. Their devices are here and move there.
    ///
    /// # Errors
    /// If this process may not.
    pub async fn new(
        program: Program,
        engine: &str,
        dir: &Path,
        count: usize,
        ahead_s: impl Fn(usize) -> u64,
    ) -> Result<Nodes, String> {
        let certs = dir.join("certs");
        let at = certs.display().to_string();
        let mut commands = vec![vec!["init", "--cluster", "chaos"]];
        let hosts: Vec<(String, String)> =
            (0..count).map(|host| ((host + 1).to_string(), Net::address(host).to_string())).collect();
        for (id, address) in &hosts {
            commands.push(vec!["node", "--id", id, "--host", address]);
        }
        commands.push(vec!["client", "--role", "operator", "--name", "chaos"]);
        for command in commands {
            let (exit, said) = program.run([&["certs"], &command[..], &["--dir", &at]].concat()).await;
            if !exit.success() {
                return Err(format!("certs {command:?}: {said}"));
            }
        }
        let mut nodes = Vec::new();
        for host in 0..count {
            let at = dir.join(format!("n{}", host + 1));
            let failed = |error: std::io::Error| format!("{}: {error}", at.display());
            let disk = Arc::new(Disk::new(&at).map_err(failed)?);
            let mounted = at.join("disk");
            nodes.push(Node {
                _mount: mount(disk.clone(), &mounted).map_err(failed)?,
                disk,
                host: Host::new(host, ahead_s(host))?,
                dir: mounted.join("data"),
                log: dir.join(format!("n{}.log", host + 1)),
                process: None,
            });
        }
        Ok(Nodes { program, certs, engine: engine.to_owned(), nodes })
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// A node's address.
    pub fn address(&self, at: usize) -> String {
        format!("{}:{PORT}", Net::address(at))
    }

    fn tls(&self, holder: &str) -> TlsFiles {
        let of = |name: String| self.certs.join(name);
        TlsFiles {
            cert: of(format!("{holder}.pem")),
            key: of(format!("{holder}.key")),
            ca: of("ca.pem".to_owned()),
        }
    }

    /// A client, an operator, that begins with these nodes.
    ///
    /// # Panics
    /// If none of them answers.
    pub async fn client(&self, first: impl IntoIterator<Item = usize>) -> Client {
        let addresses: Vec<String> = first.into_iter().map(|at| self.address(at)).collect();
        let options = ConnectOptions::default().tls(self.tls("operator-chaos"));
        within("a client to connect", Client::connect_with(addresses, options)).await.expect("a node answers")
    }

    /// Starts a node that does not run.
    ///
    /// # Panics
    /// If it runs.
    pub fn spawn(&mut self, at: usize) {
        let (address, tls) = (self.address(at), self.tls(&format!("node-{}", at + 1)));
        let join = self.address(usize::from(at == 0));
        let node = &mut self.nodes[at];
        assert!(node.process.is_none(), "n{} runs already", at + 1);
        let is_new = !node.dir.exists();
        let mut words = node.host.enter();
        words.push(self.program.exe.to_owned());
        words.extend(["node", "--end-with-parent", "--listen", &address].map(str::to_owned));
        for (flag, path) in
            [("--dir", &node.dir), ("--tls-cert", &tls.cert), ("--tls-key", &tls.key), ("--tls-ca", &tls.ca)]
        {
            words.extend([flag.to_owned(), path.display().to_string()]);
        }
        if is_new {
            words.extend(["--engine".to_owned(), self.engine.clone()]);
            if at != 0 {
                words.extend(["--join".to_owned(), join]);
            }
        }
        node.process = Some(Process::start_by(&words, &format!("n{}", at + 1), &node.log));
    }

    /// Waits until a node serves and knows who leads the meta group; starts it again if it ends meanwhile. How often it did.
    ///
    /// # Panics
    /// If it does not within a minute.
    pub async fn serving(&mut self, at: usize) -> u32 {
        let options = ConnectOptions::default().tls(self.tls("operator-chaos"));
        let mut ended = 0;
        let look = async {
            loop {
                if self.revive(at) {
                    ended += 1;
                    assert!(ended < 20, "n{} ends again and again", at + 1);
                }
                if let Ok(client) = Client::connect_with([self.address(at)], options.clone()).await
                    && let Ok(status) = client.status(v1::StatusRequest {}).await
                    && status.node == at as u64 + 1
                    && status.meta_leader != 0
                {
                    return;
                }
                sleep(LOOK).await;
            }
        };
        within(&format!("n{} to serve", at + 1), look).await;
        ended
    }

    /// Starts a node whose process has ended by itself. True: it had.
    pub fn revive(&mut self, at: usize) -> bool {
        let ended = self.nodes[at].process.as_mut().is_some_and(|process| process.exit().is_some());
        if ended {
            self.nodes[at].process = None;
            self.spawn(at);
        }
        ended
    }

    /// SIGKILL; with `power`, all that the node did not sync is lost, too.
    ///
    /// # Panics
    /// If the disk below fails.
    pub async fn kill(&mut self, at: usize, power: bool) {
        let node = &mut self.nodes[at];
        // Whoever waits for the disk cannot die.
        node.disk.stall(false);
        if let Some(mut process) = node.process.take() {
            process.kill().await;
        }
        if power {
            node.disk.cut_power().expect("what was not synced is taken back");
        }
    }

    /// Stops a node's process where it stands, or lets it go on.
    pub fn pause(&self, at: usize, paused: bool) {
        if let Some(process) = &self.nodes[at].process {
            if paused { process.pause() } else { process.resume() }
        }
    }

    /// A node's disk.
    pub fn disk(&self, at: usize) -> &Disk {
        &self.nodes[at].disk
    }

    /// States that an engine had lost when its node started.
    ///
    /// # Panics
    /// If a node's log cannot be read.
    pub fn lost_states(&self) -> usize {
        let lost = |node: &Node| {
            let log = std::fs::read_to_string(&node.log).expect("a node that was started has a log");
            log.matches("the engine has lost a replica's state").count()
        };
        self.nodes.iter().map(lost).sum()
    }

    /// Writes and names that power cuts have undone.
    pub fn undone(&self) -> u64 {
        self.nodes.iter().map(|node| node.disk.undone()).sum()
    }
}
