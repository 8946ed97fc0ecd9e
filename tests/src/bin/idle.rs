//! What groups cost in which nothing happens: three processes with a replica of each group, real logs and engines, TCP
//! between them. Prints the time to found and to open them, bytes of memory per group, and the share of a core at rest.
//!
//! `cargo run --release -p pontoon-tests --bin idle -- --groups 100000`

use std::{
    error::Error,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, OnceLock,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use clap::Parser;
use dashmap::DashMap;
use futures::{StreamExt, stream};
use pontoon_proto::{ClusterId, GroupId, NodeId, ReplicaId, v1};
use pontoon_raftstore::{Class, Config, GroupSpec, Identity, MultiRaft, Proposal, Role, Transport};
use pontoon_shard::{EngineKind, MapCommand, ShardMachines, engine};
use pontoon_wal::{Options, Wal};
use prost::Message;

/// That of the program.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// How often a node looks whether its groups are where they should be.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Requests under way while groups are founded.
const AT_ONCE: usize = 4096;
/// Groups that a row is written to before it is waited for their sleep: what is measured are idle groups, and with all of
/// them in use at once, three nodes on one machine would be busy with heartbeats.
const WAVE: usize = 2048;

#[derive(Debug, Parser)]
struct Args {
    /// Groups; each has a replica on each of the three nodes.
    #[arg(long, default_value_t = 10_000)]
    groups: u64,
    /// For how long the nodes are watched at rest.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// Where the nodes keep their data; a temporary directory if not given.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Runs this node; the program starts itself so.
    #[arg(long, hide = true, requires = "dir")]
    node: Option<u64>,
    /// Where the nodes listen, in order.
    #[arg(long, hide = true, value_delimiter = ',')]
    listen: Vec<String>,
}

fn main() -> Outcome<()> {
    let args = Args::parse();
    match args.node {
        Some(id) => run_node(&args, NodeId::new(id)?),
        None => run_all(&args),
    }
}

/// Founds the groups, watches them at rest, stops the nodes, and opens them again.
fn run_all(args: &Args) -> Outcome<()> {
    let temporary = tempfile::tempdir()?;
    let dir = args.dir.clone().unwrap_or_else(|| temporary.path().to_owned());
    // Ports that were free a moment ago.
    let holders: Vec<TcpListener> =
        (0..3).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<Result<_, _>>()?;
    let listen: Vec<String> = holders
        .iter()
        .map(|holder| holder.local_addr().map(|at| at.to_string()))
        .collect::<Result<_, _>>()?;
    drop(holders);
    for round in ["founded", "opened again"] {
        println!("{} groups, {round}", args.groups);
        let mut nodes = Vec::new();
        for id in 1..=3 {
            nodes.push(Node::start(args, &dir, &listen, id)?);
        }
        for node in &mut nodes {
            node.print_until("at rest")?;
        }
        for node in nodes {
            node.stop()?;
        }
    }
    Ok(())
}

/// A process. Dropping this kills it.
struct Node {
    id: u64,
    child: Child,
    words: BufReader<std::process::ChildStdout>,
}

impl Node {
    fn start(args: &Args, dir: &Path, listen: &[String], id: u64) -> Outcome<Node> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--node", &id.to_string(), "--groups", &args.groups.to_string()]);
        command.args(["--seconds", &args.seconds.to_string(), "--listen", &listen.join(",")]);
        command.arg("--dir").arg(dir.join(format!("node{id}")));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let words = BufReader::new(child.stdout.take().ok_or("no stdout")?);
        Ok(Node { id, child, words })
    }

    fn print_until(&mut self, last: &str) -> Outcome<()> {
        let mut line = String::new();
        while !line.contains(last) {
            line.clear();
            if self.words.read_line(&mut line)? == 0 {
                return Err(format!("node {} ended early", self.id).into());
            }
            print!("  n{} {line}", self.id);
        }
        Ok(())
    }

    fn stop(mut self) -> Outcome<()> {
        drop(self.child.stdin.take());
        let status = self.child.wait()?;
        if !status.success() {
            return Err(format!("node {} ended with {status}", self.id).into());
        }
        Ok(())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn run_node(args: &Args, own: NodeId) -> Outcome<()> {
    let dir = args.dir.clone().ok_or("a node has a directory")?;
    fs::create_dir_all(&dir)?;
    let begun = Instant::now();
    let mut options = Options::new(dir.join("wal"));
    options.segment_bytes = 64 << 20;
    let (wal, _) = Wal::open(options)?;
    let log_opened = begun.elapsed();
    let machines = ShardMachines::new(engine::open(EngineKind::Fjall, &dir.join("engine"))?)?;
    let engine_opened = begun.elapsed();
    let identity = match Identity::load(&wal)? {
        Some(identity) => identity,
        None => Identity::establish(&wal, ClusterId::from_slice(&[7; 16])?, own, "loopback")?,
    };
    let link =
        Arc::new(Link { own, listen: args.listen.clone(), raft: OnceLock::new(), queues: DashMap::new() });
    let before = resident_bytes()?;
    let raft = MultiRaft::open(Config::default(), wal.clone(), identity, machines, link.clone())?;
    println!(
        "open: {:.2} s (log {:.2}, engine {:.2}, runtime {:.2})",
        begun.elapsed().as_secs_f64(),
        log_opened.as_secs_f64(),
        (engine_opened - log_opened).as_secs_f64(),
        (begun.elapsed() - engine_opened).as_secs_f64()
    );
    link.clone().attach(&raft)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    let begun = Instant::now();
    let fresh = raft.groups().is_empty();
    runtime.block_on(async {
        if fresh {
            found(&raft, own, args.groups).await?;
            println!("founded: {:.2} s", begun.elapsed().as_secs_f64());
        }
        wait_for(&raft, |raft, group| {
            raft.group(group).is_some_and(|group| group.look(|status| status.leader.is_some()))
        })
        .await;
        println!("every group has a leader: {:.2} s", begun.elapsed().as_secs_f64());
        if fresh {
            write(&raft).await?;
            println!("a row written to each group led here: {:.2} s", begun.elapsed().as_secs_f64());
        }
        wait_for(&raft, |raft, group| {
            raft.group(group).is_some_and(|group| group.look(|status| status.sleeping))
        })
        .await;
        Outcome::Ok(())
    })?;
    println!("every group sleeps: {:.2} s", begun.elapsed().as_secs_f64());
    let cpu = cpu_ticks()?;
    thread::sleep(Duration::from_secs(args.seconds));
    let used = (cpu_ticks()? - cpu) as f64 / 100.0;
    let grown = resident_bytes()?.saturating_sub(before);
    println!(
        "memory: {} MiB more than before the runtime was opened, {} B per group",
        grown >> 20,
        grown / args.groups
    );
    println!("{:.2} % of a core at rest", 100.0 * used / args.seconds as f64);
    // The parent closes our end when all have said so.
    std::io::stdin().read_to_end(&mut Vec::new())?;
    raft.shutdown();
    drop(raft);
    wal.close()?;
    Ok(())
}

fn replica(node: u64) -> Outcome<ReplicaId> {
    Ok(ReplicaId::on(NodeId::new(node)?, 1))
}

async fn found(raft: &MultiRaft, own: NodeId, groups: u64) -> Outcome<()> {
    let voters = (1..=3).map(|node| Ok(replica(node)?.get())).collect::<Outcome<Vec<u64>>>()?;
    let replica = replica(own.get())?;
    let mut asked = stream::iter(2..2 + groups)
        .map(|group| {
            let shard =
                v1::Shard { predicate: format!("idle.{group}"), group, epoch: 1, ..Default::default() };
            raft.create_group(GroupSpec {
                group: GroupId(group),
                replica,
                descriptor: shard.encode_to_vec().into(),
                epoch: 1,
                initial: Some(v1::ConfState { voters: voters.clone(), ..Default::default() }),
            })
        })
        .buffer_unordered(AT_ONCE);
    while let Some(made) = asked.next().await {
        made?;
    }
    Ok(())
}

/// Writes a row to every group that is led here.
async fn write(raft: &MultiRaft) -> Outcome<()> {
    let payload = MapCommand::new().put("key", "value").encode()?;
    let led = raft.groups().into_iter().filter_map(|id| raft.group(id));
    let led: Vec<_> = led.filter(|group| group.look(|status| status.role == Role::Leader)).collect();
    for wave in led.chunks(WAVE) {
        let mut asked = stream::iter(wave)
            .map(|group| {
                let payload = payload.clone();
                group.propose(Proposal { payload, request: None, epoch: 1, urgent: false })
            })
            .buffer_unordered(WAVE);
        while let Some(written) = asked.next().await {
            written?;
        }
        while !wave.iter().all(|group| group.look(|status| status.sleeping)) {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
    Ok(())
}

/// Waits until something is true of every group.
async fn wait_for(raft: &MultiRaft, holds: impl Fn(&MultiRaft, GroupId) -> bool) {
    let mut left = raft.groups();
    while !left.is_empty() {
        left.retain(|group| !holds(raft, *group));
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn field(path: &str, name: &str) -> Outcome<u64> {
    let text = fs::read_to_string(path)?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)).ok_or("no such field")?;
    Ok(line.split_whitespace().next().ok_or("an empty field")?.parse()?)
}

fn resident_bytes() -> Outcome<u64> {
    Ok(field("/proc/self/status", "VmRSS:")? << 10)
}

/// User and system time of this process, in hundredths of a second.
fn cpu_ticks() -> Outcome<u64> {
    let text = fs::read_to_string("/proc/self/stat")?;
    let (_, fields) = text.rsplit_once(')').ok_or("no name")?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
}

/// Messages to the other nodes: one connection to each, one thread to write it and one to read its other end.
struct Link {
    own: NodeId,
    listen: Vec<String>,
    raft: OnceLock<MultiRaft>,
    queues: DashMap<NodeId, Sender<Vec<v1::PeerMessage>>>,
}

impl Transport for Link {
    fn send(&self, to: NodeId, _class: Class, messages: Vec<v1::PeerMessage>) {
        if let Some(queue) = self.queues.get(&to) {
            // The thread ends with the process only.
            let _ = queue.send(messages);
        }
    }
}

impl Link {
    fn attach(self: Arc<Self>, raft: &MultiRaft) -> Outcome<()> {
        self.raft.set(raft.clone()).map_err(|_| "attached twice")?;
        let listener = TcpListener::bind(&self.listen[self.own.get() as usize - 1])?;
        let link = self.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let link = link.clone();
                // A peer that goes away ends its stream.
                thread::spawn(move || drop(link.read(stream)));
            }
        });
        for peer in (1..=3).filter(|id| *id != self.own.get()) {
            let peer = NodeId::new(peer)?;
            let (queue, messages) = channel();
            self.queues.insert(peer, queue);
            let link = self.clone();
            thread::spawn(move || {
                // Until the peer is there and for as long as this process lives.
                while link.write(peer, &messages).is_err() {
                    thread::sleep(Duration::from_millis(50));
                }
            });
        }
        Ok(())
    }

    fn raft(&self) -> Outcome<&MultiRaft> {
        Ok(self.raft.get().ok_or("attached before")?)
    }

    fn write(&self, peer: NodeId, messages: &Receiver<Vec<v1::PeerMessage>>) -> Outcome<()> {
        let mut stream = TcpStream::connect(&self.listen[peer.get() as usize - 1])?;
        stream.set_nodelay(true)?;
        let raft = self.raft()?;
        send(&mut stream, &raft.hello())?;
        let reply: v1::HelloReply = receive(&mut stream)?;
        if !reply.refused.is_empty() {
            return Err(reply.refused.into());
        }
        raft.accepted_by(peer);
        // What waited for the connection is old.
        messages.try_iter().for_each(drop);
        for messages in messages {
            send(&mut stream, &v1::PeerBatch { messages })?;
        }
        Ok(())
    }

    fn read(&self, mut stream: TcpStream) -> Outcome<()> {
        let hello: v1::Hello = receive(&mut stream)?;
        let reply = self.raft()?.check_hello(&hello);
        let is_refused = !reply.refused.is_empty();
        send(&mut stream, &reply)?;
        if is_refused {
            return Ok(());
        }
        let (from, token) = (NodeId::new(hello.node)?, hello.boot_history.last().copied().unwrap_or(0));
        loop {
            let batch: v1::PeerBatch = receive(&mut stream)?;
            if !self.raft()?.deliver(from, token, batch.messages) {
                return Ok(());
            }
        }
    }
}

fn send(stream: &mut TcpStream, message: &impl Message) -> Outcome<()> {
    let bytes = message.encode_to_vec();
    stream.write_all(&(bytes.len() as u32).to_le_bytes())?;
    stream.write_all(&bytes)?;
    Ok(())
}

fn receive<M: Message + Default>(stream: &mut TcpStream) -> Outcome<M> {
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let mut bytes = vec![0; u32::from_le_bytes(length) as usize];
    stream.read_exact(&mut bytes)?;
    Ok(M::decode(bytes.as_slice())?)
}
