//! A cluster of real processes on this machine: real sockets, real disk, durable logs.
//!
//! Nothing here waits for a time to pass. Every wait is for something to be seen, and has a limit that only says when
//! to give up ([`within`]).

use std::{
    future::Future,
    net::TcpListener,
    path::PathBuf,
    process::ExitStatus,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use pontoon_node::{api::admin_client::AdminClient, client::Client};
use pontoon_proto::{ReplicaId, v1};
use tempfile::TempDir;
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::Channel;

use crate::process::{Process, Program};

/// When a wait has failed. Far above what anything here takes.
const LIMIT: Duration = Duration::from_secs(60);
/// Between two looks at something that cannot be waited for.
const LOOK: Duration = Duration::from_millis(20);
/// The predicate name of the meta group.
const META: &str = "@meta";

/// Waits for a future that must end.
///
/// # Panics
/// If it does not within a minute, naming `what` was awaited.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match timeout(LIMIT, future).await {
        Ok(value) => value,
        Err(_) => panic!("waited {} s for {what}", LIMIT.as_secs()),
    }
}

/// Looks until there is something to see.
///
/// # Panics
/// As [`within`].
pub async fn until<T, F: Future<Output = Option<T>>>(what: &str, look: impl Fn() -> F) -> T {
    let looking = async {
        loop {
            if let Some(seen) = look().await {
                return seen;
            }
            sleep(LOOK).await;
        }
    };
    within(what, looking).await
}

/// A node of a [`Cluster`], whether its process runs or not.
#[derive(Debug)]
struct Member {
    id: u64,
    dir: PathBuf,
    address: String,
    process: Option<Process>,
}

/// Nodes as processes. Dropping it kills them and removes their data.
///
/// Nodes are named by their number from 0, in the order in which they were started; [`Cluster::id`] is their id in the
/// cluster.
#[derive(Debug)]
pub struct Cluster {
    program: Program,
    engine: String,
    members: Vec<Member>,
    // Last: the processes end before their files go.
    scratch: TempDir,
    /// Elsewhere: what a node says of a disk that is full must not be lost on it.
    logs: TempDir,
}

impl Cluster {
    /// Starts so many nodes and waits until the meta group has spread over them.
    ///
    /// # Panics
    /// As everything here: if what must happen does not.
    pub async fn start(program: Program, engine: &str, nodes: usize) -> Cluster {
        let (engine, members) = (engine.to_owned(), Vec::new());
        let logs = tempfile::tempdir().expect("a directory for what nodes say");
        let mut cluster = Cluster { program, engine, members, scratch: program.scratch(), logs };
        for _ in 0..nodes {
            cluster.add().await;
        }
        // It grows to three at once, so that it never stands on two.
        if nodes > 0 {
            cluster.voters(META, if nodes < 3 { 1 } else { 3 }).await;
        }
        cluster
    }

    /// Starts another node that joins by way of a running one, waits until it serves, and returns its number.
    pub async fn add(&mut self) -> usize {
        self.add_with(&[]).await
    }

    /// The same with options of its own.
    pub async fn add_with(&mut self, options: &[&str]) -> usize {
        let at = self.members.len();
        let member = Member {
            id: 0,
            dir: self.scratch.path().join(at.to_string()),
            address: free_address(),
            process: None,
        };
        let join = self.members.iter().find(|member| member.process.is_some());
        let join = join.map(|member| member.address.clone());
        self.members.push(member);
        self.spawn(at, join, options);
        let status = self.serving(at).await;
        self.members[at].id = status.node;
        at
    }

    /// Starts a new node in the place of one that is not running: at its address, with an empty directory. It has a new
    /// id, under the same number. Returns the old directory.
    pub async fn replace(&mut self, at: usize) -> PathBuf {
        let join = self.running().next().expect("a node runs").address.clone();
        let member = &mut self.members[at];
        assert!(member.process.is_none(), "node {at} runs");
        let (old, lost) = (member.id, member.dir.clone());
        member.dir = lost.with_extension("again");
        self.spawn(at, Some(join), &["--replace", &format!("n{old}")]);
        let status = self.serving(at).await;
        assert_ne!(status.node, old, "a node without its disk is another one");
        self.members[at].id = status.node;
        lost
    }

    fn spawn(&mut self, at: usize, join: Option<String>, options: &[&str]) {
        let log = self.log(at);
        let member = &mut self.members[at];
        let mut arguments = vec![
            "node".to_owned(),
            "--dir".to_owned(),
            member.dir.display().to_string(),
            "--listen".to_owned(),
            member.address.clone(),
            "--end-with-parent".to_owned(),
        ];
        if !member.dir.exists() {
            arguments.extend(["--engine".to_owned(), self.engine.clone()]);
        }
        if let Some(join) = join {
            arguments.extend(["--join".to_owned(), join]);
        }
        arguments.extend(options.iter().map(|&option| option.to_owned()));
        member.process = Some(Process::start(self.program, &format!("node {at}"), &log, &arguments));
    }

    /// Runs a command against a node, and returns what it said.
    ///
    /// # Panics
    /// If it ends with another exit code, does not say all of `words`, or panics.
    pub async fn says(&self, at: usize, command: &[&str], code: i32, words: &[&str]) -> String {
        let arguments = [&["--addr", self.address(at)], command].concat();
        let (exit, said) = self.program.run(&arguments).await;
        assert_eq!(exit.code(), Some(code), "{command:?}: {said}");
        for word in words {
            assert!(said.contains(word), "{command:?} does not say {word:?}: {said}");
        }
        assert!(!said.contains("panicked"), "{said}");
        said
    }

    /// Waits until a node answers and knows who leads the meta group.
    async fn serving(&mut self, at: usize) -> v1::StatusReply {
        let address = self.address(at).to_owned();
        let process = self.members[at].process.as_mut().expect("it was started");
        let look = async {
            loop {
                if let Some(exit) = process.exit() {
                    panic!("node {at} ended with {exit}:\n{}", process.said());
                }
                if let Ok(mut admin) = admin_at(&address).await
                    && let Ok(status) = admin.status(v1::StatusRequest {}).await
                    && status.get_ref().meta_leader != 0
                {
                    return status.into_inner();
                }
                sleep(LOOK).await;
            }
        };
        within(&format!("node {at} to serve"), look).await
    }

    /// SIGKILL.
    pub async fn kill(&mut self, at: usize) {
        self.members[at].process.as_mut().expect("the node runs").kill().await;
        self.members[at].process = None;
    }

    /// Stops a node's process where it stands; see [`Process::pause`].
    pub fn pause(&self, at: usize) {
        self.members[at].process.as_ref().expect("the node runs").pause();
    }

    /// Lets a paused node go on.
    pub fn resume(&self, at: usize) {
        self.members[at].process.as_ref().expect("the node runs").resume();
    }

    /// SIGTERM; returns how the process ended.
    pub async fn terminate(&mut self, at: usize) -> ExitStatus {
        let exit = self.members[at].process.as_mut().expect("the node runs").terminate().await;
        self.members[at].process = None;
        exit
    }

    /// Starts a node again that is not expected to serve; see [`Cluster::ended`].
    ///
    /// # Panics
    /// If it runs.
    pub fn start_in_vain(&mut self, at: usize) {
        self.start_in_vain_with(at, &[]);
    }

    /// The same with these options.
    pub fn start_in_vain_with(&mut self, at: usize, options: &[&str]) {
        assert!(self.members[at].process.is_none(), "node {at} runs already");
        self.spawn(at, None, options);
    }

    /// What is started from now on is this program.
    pub fn set_program(&mut self, program: Program) {
        self.program = program;
    }

    /// Starts a stopped node again, from its directory alone, and waits until it serves.
    pub async fn restart(&mut self, at: usize) {
        self.restart_all(&[at]).await;
    }

    /// Starts a stopped node again with these options, and waits until it serves.
    pub async fn restart_with(&mut self, at: usize, options: &[&str]) {
        assert!(self.members[at].process.is_none(), "node {at} runs already");
        self.spawn(at, None, options);
        let status = self.serving(at).await;
        assert_eq!(status.node, self.members[at].id, "a node keeps its id");
    }

    /// Waits until a node's process has ended by itself; how, and what it said.
    pub async fn ended(&mut self, at: usize) -> (ExitStatus, String) {
        let mut process = self.members[at].process.take().expect("the node ran");
        (process.ended().await, process.said())
    }

    /// Starts stopped nodes again, all before any is waited for.
    pub async fn restart_all(&mut self, nodes: &[usize]) {
        self.restart_all_with(nodes, &[]).await;
    }

    /// The same with these options.
    pub async fn restart_all_with(&mut self, nodes: &[usize], options: &[&str]) {
        for &at in nodes {
            assert!(self.members[at].process.is_none(), "node {at} runs already");
            self.spawn(at, None, options);
        }
        for &at in nodes {
            let status = self.serving(at).await;
            assert_eq!(status.node, self.members[at].id, "a node keeps its id");
        }
    }

    /// A stopped node is to listen elsewhere from its next start on.
    pub fn moved_to(&mut self, at: usize, address: String) {
        assert!(self.members[at].process.is_none(), "node {at} runs");
        self.members[at].address = address;
    }

    /// Where a node listens.
    pub fn address(&self, at: usize) -> &str {
        &self.members[at].address
    }

    /// A node's id in the cluster.
    pub fn id(&self, at: usize) -> u64 {
        self.members[at].id
    }

    /// The node with this id.
    pub fn number(&self, id: u64) -> usize {
        self.members.iter().position(|member| member.id == id).expect("the node is one of ours")
    }

    /// A node's data directory.
    pub fn dir(&self, at: usize) -> &PathBuf {
        &self.members[at].dir
    }

    /// Where a node's process writes what it says.
    pub fn log(&self, at: usize) -> PathBuf {
        self.logs.path().join(format!("{at}.log"))
    }

    /// A client that knows every node.
    pub async fn client(&self) -> Client {
        let addresses: Vec<&str> = self.running().map(|member| member.address.as_str()).collect();
        let client = within("a client to connect", Client::connect(addresses)).await;
        client.expect("a running node answers")
    }

    fn running(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(|member| member.process.is_some())
    }

    /// Follows the map of the cluster, at whichever nodes run, until it holds what is wanted.
    ///
    /// # Panics
    /// As [`within`].
    pub async fn map_until<T>(&self, what: &str, wanted: impl Fn(&v1::ClusterMap) -> Option<T>) -> T {
        within(what, self.follow_map(wanted)).await
    }

    async fn follow_map<T>(&self, wanted: impl Fn(&v1::ClusterMap) -> Option<T>) -> T {
        loop {
            for member in self.running() {
                let Ok(mut admin) = admin_at(&member.address).await else { continue };
                let Ok(maps) = admin.meta_map(v1::MetaMapRequest::default()).await else { continue };
                let mut maps = maps.into_inner();
                while let Ok(Some(map)) = maps.message().await {
                    if let Some(found) = wanted(&map) {
                        return found;
                    }
                }
            }
            sleep(LOOK).await;
        }
    }

    /// Waits until a predicate has so many voters, and returns their nodes.
    pub async fn voters(&self, predicate: &str, count: usize) -> Vec<usize> {
        let voters = self
            .map_until(&format!("{predicate} to have {count} voters"), |map| {
                let shard = map.shards.iter().find(|shard| shard.predicate == predicate)?;
                let settled = map.moves.iter().all(|mv| mv.group != shard.group);
                (shard.voters.len() == count && settled).then(|| shard.voters.clone())
            })
            .await;
        let node = |&id: &u64| ReplicaId::new(id).expect("the map holds replica ids").node();
        voters.iter().map(|id| self.number(node(id).get())).collect()
    }

    /// Who leads the meta group, as the running nodes agree.
    pub async fn meta_leader(&self) -> usize {
        self.leader(META).await
    }

    /// Who leads a predicate's group.
    pub async fn leader(&self, predicate: &str) -> usize {
        let group = self
            .map_until(&format!("{predicate} to be in the map"), |map| {
                map.shards.iter().find(|shard| shard.predicate == predicate).map(|shard| shard.group)
            })
            .await;
        let id = until(&format!("{predicate} to have a leader"), async || {
            let request = v1::GroupsRequest { problem: false, group, local: false };
            let mut leaders = Vec::new();
            for member in self.running() {
                let mut admin = admin_at(&member.address).await.ok()?;
                let groups = admin.groups(request).await.ok()?.into_inner().groups;
                leaders.push(groups.first()?.leader_node);
            }
            let first = *leaders.first()?;
            let runs = self.running().any(|member| member.id == first);
            (runs && leaders.iter().all(|&leader| leader == first)).then_some(first)
        })
        .await;
        self.number(id)
    }

    /// Starts a move of a predicate's replica and returns the move's id.
    pub async fn start_move(&self, predicate: &str, from: usize, to: usize) -> u64 {
        let request = v1::MoveStartRequest {
            predicate: predicate.to_owned(),
            from_node: self.id(from),
            to_node: self.id(to),
            ..Default::default()
        };
        let client = self.client().await;
        let started = within("a move to start", client.move_start(request)).await;
        started.expect("nothing speaks against the move").r#move.expect("a started move has a record").id
    }

    /// Waits until a move has reached a phase or gone beyond, and returns the phase seen.
    ///
    /// # Panics
    /// As [`Cluster::moved`].
    pub async fn phase(&self, id: u64, phase: v1::MovePhase) -> v1::MovePhase {
        let reached = self.follow_map(|map| {
            let mv = map.moves.iter().find(|mv| mv.id == id)?;
            (mv.phase >= i32::from(phase)).then(|| mv.phase())
        });
        tokio::select! {
            phase = reached => phase,
            // Too fast for the map, which shows what goes on.
            ended = self.moved(id) => ended.phase(),
        }
    }

    /// Waits until a move has ended, and returns its record.
    ///
    /// # Panics
    /// If it does not get on for a minute, or does not end within five, with what was seen of it last.
    pub async fn moved(&self, id: u64) -> v1::Move {
        let client = self.client().await;
        let begun = Instant::now();
        let (mut last, mut alive) = (None, begun);
        loop {
            let request = v1::MoveListRequest { all: true, hops: 0 };
            let listed = within("the moves to be listed", client.move_list(request)).await;
            let moves = listed.map_or_else(|_| Vec::new(), |list| list.moves);
            let view = moves.into_iter().find(|view| view.r#move.as_ref().is_some_and(|mv| mv.id == id));
            let record = view.as_ref().and_then(|view| view.r#move.clone());
            if let Some(record) = &record
                && matches!(record.phase(), v1::MovePhase::Done | v1::MovePhase::Aborted)
            {
                return record.clone();
            }
            // Without the rate and the clients' latencies, which always change.
            let seen = view.map(|view| (record, view.bytes_done, view.bytes_total, view.lag));
            if seen.is_some() && seen != last {
                (last, alive) = (seen, Instant::now());
            }
            let gets_on = alive.elapsed() < LIMIT && begun.elapsed() < LIMIT * 5;
            assert!(gets_on, "move {id} does not get on, or does not end: {last:#?}");
            sleep(LOOK).await;
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.scratch.disable_cleanup(true);
            eprintln!("logs and data are kept in {}", self.scratch.path().display());
        }
    }
}

/// A loopback address that nobody listens on, and that no outgoing connection takes while its node is down: the system
/// takes those from higher up.
///
/// # Panics
/// If there is none.
pub fn free_address() -> String {
    const PORTS: std::ops::Range<u32> = 12_000..32_000;
    static TAKEN: AtomicU32 = AtomicU32::new(0);
    let begin = std::process::id().wrapping_mul(101);
    for _ in PORTS {
        let turn = begin.wrapping_add(TAKEN.fetch_add(1, Ordering::Relaxed));
        let address = format!("127.0.0.1:{}", PORTS.start + turn % (PORTS.end - PORTS.start));
        if TcpListener::bind(&address).is_ok() {
            return address;
        }
    }
    panic!("no port of {PORTS:?} is free");
}

/// A client of one node's services for operators and nodes.
///
/// # Errors
/// If nobody answers there.
pub async fn admin_at(address: &str) -> Result<AdminClient<Channel>, tonic::transport::Error> {
    AdminClient::connect(format!("http://{address}")).await
}
