//! Golden scripts of the runtime: what happens to a group, step by step. `REWRITE=1` writes the answers anew.
//!
//! A script is blocks of commands, `---` and what came of them. The network delivers at once and in order; a command
//! ends when nothing moves any more, except for time, which moves by `tick`.

#![expect(clippy::disallowed_methods, reason = "a test looks at files")]

#[path = "common/machine.rs"]
mod machine;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use machine::TestMachines;
use pontoon_proto::{GroupId, NodeId, ReplicaId, v1};
use pontoon_raftstore::{
    Answer, Class, Config, GroupSpec, GroupStatus, MemberChange, Proposal, ReadLevel, RequestId, Room,
    Stepped,
};
use pontoon_wal::{Clock, DriverMode, Options, Wal, sim::SimFs};

const GROUP: GroupId = GroupId(3);
/// Another one with the same first in rank; nothing is said about it.
const OTHER_GROUP: GroupId = GroupId(6);

#[derive(Default)]
struct HandClock(AtomicU64);

impl Clock for HandClock {
    fn now(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }
}

struct Node {
    fs: SimFs,
    machines: TestMachines,
    running: Option<(Stepped, Wal)>,
}

#[derive(Default)]
struct Session {
    clock: Arc<HandClock>,
    nodes: BTreeMap<NodeId, Node>,
    cut: BTreeSet<NodeId>,
    /// Messages of these classes from these nodes are lost.
    muted: Vec<(NodeId, Class)>,
    /// The status that each node told of last.
    told: BTreeMap<NodeId, GroupStatus>,
    boots: u64,
    stamp: u64,
}

fn node(word: &str) -> NodeId {
    word.parse().expect("a node such as n1")
}

/// `n1` is replica `n1.1`; `n4.2` says the ordinal.
fn replica(word: &str) -> ReplicaId {
    let (at, ordinal) = word.split_once('.').unwrap_or((word, "1"));
    ReplicaId::on(node(at), ordinal.parse().expect("an ordinal"))
}

fn name(id: u64) -> String {
    ReplicaId::new(id).map_or("?".to_owned(), |id| id.to_string())
}

fn names(ids: &[u64]) -> String {
    ids.iter().map(|id| name(*id)).collect::<Vec<_>>().join(" ")
}

impl Session {
    fn boot(&mut self, id: NodeId) {
        self.boots += 1;
        let node = self.nodes.entry(id).or_insert_with(|| Node {
            fs: SimFs::new(),
            machines: TestMachines::default(),
            running: None,
        });
        let mut options = Options::new("/wal");
        options.fs = Arc::new(node.fs.clone());
        options.segment_bytes = 256 << 10;
        options.seed = self.boots;
        options.cache_bytes = 0;
        options.clock = self.clock.clone();
        options.driver = DriverMode::Manual;
        let (wal, _) = Wal::open(options).expect("the log opens");
        let config = Config { chunk_bytes: 64, ..Default::default() };
        let machines = Arc::new(node.machines.clone());
        node.running = Some((Stepped::open(config, id, wal.clone(), machines).expect("it opens"), wal));
        self.greet();
    }

    fn greet(&mut self) {
        let ids: Vec<NodeId> = self.nodes.keys().copied().collect();
        for (id, node) in &mut self.nodes {
            if let Some((stepped, _)) = &mut node.running {
                ids.iter().filter(|other| *other != id).for_each(|other| stepped.accepted_by(*other));
            }
        }
    }

    fn at(&mut self, id: NodeId) -> &mut Stepped {
        &mut self.nodes.get_mut(&id).and_then(|node| node.running.as_mut()).expect("the node runs").0
    }

    /// Runs until nothing moves, and prints the answers.
    fn settle(&mut self, out: &mut String) {
        loop {
            let mut messages = Vec::new();
            for (id, node) in &mut self.nodes {
                let Some((stepped, wal)) = &mut node.running else { continue };
                let mut moved = true;
                while moved {
                    stepped.turn();
                    moved = wal.step();
                    moved |= stepped.step_log() | stepped.step_apply() | stepped.step_serve();
                }
                let output = stepped.take_output();
                let sent =
                    output.send.into_iter().filter(|(_, class, _)| !self.muted.contains(&(*id, *class)));
                messages.extend(sent.map(|(to, _, message)| (*id, to, message)));
                self.told.extend(output.statuses.into_iter().map(|status| (*id, status)));
                for (_, answer) in output.answers {
                    describe_answer(*id, answer, &mut self.stamp, out);
                }
                for event in output.events {
                    writeln!(out, "{id}: {}", describe_event(&event)).expect("a string");
                }
            }
            messages.retain(|(from, to, _)| !self.cut.contains(from) && !self.cut.contains(to));
            if messages.is_empty() {
                return;
            }
            for (from, to, message) in messages {
                if let Some((stepped, _)) = self.nodes.get_mut(&to).and_then(|node| node.running.as_mut()) {
                    stepped.deliver(from, message);
                }
            }
        }
    }

    fn run(&mut self, line: &str, out: &mut String) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match &words[..] {
            ["boot", ids @ ..] => ids.iter().for_each(|id| self.boot(node(id))),
            [what @ ("found" | "found-other"), ids @ ..] => {
                let voters = ids.iter().map(|id| replica(id).get()).collect();
                let initial = v1::ConfState { voters, ..Default::default() };
                for id in ids {
                    let group = if *what == "found" { GROUP } else { OTHER_GROUP };
                    let replica = replica(id);
                    let spec = GroupSpec {
                        group,
                        replica,
                        descriptor: Bytes::new(),
                        epoch: 1,
                        initial: Some(initial.clone()),
                    };
                    self.at(replica.node()).create_group(spec);
                }
            }
            ["make", id] => {
                let replica = replica(id);
                let spec =
                    GroupSpec { group: GROUP, replica, descriptor: Bytes::new(), epoch: 0, initial: None };
                self.at(replica.node()).create_group(spec);
            }
            ["destroy", id] => {
                let replica = replica(id);
                self.at(replica.node()).destroy_replica(GROUP, replica);
            }
            ["tick", count] => {
                for _ in 0..count.parse().expect("a number") {
                    let now = self.clock.0.fetch_add(100, Ordering::Relaxed) + 100;
                    for node in self.nodes.values_mut() {
                        if let Some((stepped, _)) = &mut node.running {
                            stepped.set_wall_ms(now);
                            stepped.set_clock(Duration::from_millis(now));
                            stepped.tick(1);
                        }
                    }
                    self.settle(out);
                }
            }
            ["propose", id, command] => {
                let payload = Bytes::copy_from_slice(command.as_bytes());
                self.at(node(id))
                    .propose(GROUP, Proposal { payload, request: None, epoch: 1, urgent: false });
            }
            ["many", id, count] => {
                for n in 0..count.parse().expect("a number") {
                    let payload = format!("m{n}=.").into();
                    self.at(node(id))
                        .propose(GROUP, Proposal { payload, request: None, epoch: 1, urgent: false });
                    // What is said of each is said of all.
                    self.settle(&mut String::new());
                }
            }
            ["lose", id] => self.nodes[&node(id)].machines.groups.lock().unwrap().clear(),
            ["verify", id] => {
                self.at(node(id)).verify(GROUP);
            }
            ["hashes", ids @ ..] => {
                let verified = ids.iter().map(|id| self.at(node(id)).status(GROUP).and_then(|s| s.verified));
                let verified: Vec<_> = verified.collect();
                let same =
                    verified.iter().all(|one| one.is_some_and(|v| v.hash.is_some()) && *one == verified[0]);
                let index = verified[0].map(|verified| verified.index);
                writeln!(out, "the hashes at {index:?} are {}", if same { "equal" } else { "not equal" })
                    .expect("a string");
            }
            ["wants", ids @ ..] => {
                for id in ids {
                    let blocked = self.at(node(id)).status(GROUP).and_then(|status| status.pull_blocked);
                    writeln!(out, "{id}: {}", blocked.as_deref().unwrap_or("nothing")).expect("a string");
                }
            }
            ["urgent", id, command] => {
                let payload = Bytes::copy_from_slice(command.as_bytes());
                self.at(node(id)).propose(GROUP, Proposal { payload, request: None, epoch: 1, urgent: true });
            }
            ["room", id, room] => {
                let room = match *room {
                    "ample" => Room::Ample,
                    "low" => Room::Low,
                    "critical" => Room::Critical,
                    other => panic!("no such room: {other}"),
                };
                self.at(node(id)).set_room(room);
            }
            ["break", id] => {
                *self.nodes[&node(id)].machines.broken.lock().unwrap() = Some("no space left".to_owned());
            }
            ["mend", id] => {
                *self.nodes[&node(id)].machines.broken.lock().unwrap() = None;
            }
            ["stamp", id] => {
                self.at(node(id)).session_stamp(GROUP);
            }
            ["request", id, seq, command] => {
                let payload = Bytes::copy_from_slice(command.as_bytes());
                let seq = seq.parse().expect("a number");
                let request = Some(RequestId { client: 7, stamp: self.stamp, seq, acked_below: 0 });
                self.at(node(id)).propose(GROUP, Proposal { payload, request, epoch: 1, urgent: false });
            }
            ["read", id] => {
                self.at(node(id)).read_barrier(GROUP, ReadLevel::Linearizable);
            }
            ["follow", id, max_lag_ms] => {
                let max_lag = Duration::from_millis(max_lag_ms.parse().expect("milliseconds"));
                self.at(node(id)).read_barrier(GROUP, ReadLevel::Follower { max_lag });
            }
            ["local", id] => {
                self.at(node(id)).read_barrier(GROUP, ReadLevel::Local);
            }
            ["transfer", id, to] => {
                self.at(node(id)).transfer_leader(GROUP, replica(to));
            }
            ["learner", id, target] => {
                self.at(node(id)).change(GROUP, MemberChange::AddLearner(replica(target)));
            }
            ["joint", id, promote, demote] => {
                let change = MemberChange::EnterJoint {
                    promote: vec![replica(promote)],
                    demote: vec![replica(demote)],
                };
                self.at(node(id)).change(GROUP, change);
            }
            ["remove", id, target] => {
                self.at(node(id)).change(GROUP, MemberChange::Remove(replica(target)));
            }
            ["flush", ids @ ..] => {
                let ids: Vec<NodeId> = ids.iter().map(|id| node(id)).collect();
                let nodes = self.nodes.iter_mut().filter(|(id, _)| ids.is_empty() || ids.contains(id));
                nodes.filter_map(|(_, node)| node.running.as_mut()).for_each(|(stepped, _)| {
                    stepped.flush().expect("machines flush");
                })
            }
            ["cold", id] => self.nodes[&node(id)].fs.set_cold(true),
            ["fetched", id] => {
                let (_, wal) = self.nodes[&node(id)].running.as_ref().expect("the node runs");
                writeln!(out, "{id} let its log fetch {} times", wal.metrics().fetches).expect("a string");
            }
            ["kill", id] => {
                let node = self.nodes.get_mut(&node(id)).expect("booted");
                node.running = None;
                node.fs.crash(self.boots);
            }
            ["cut", id] => {
                self.cut.insert(node(id));
            }
            ["mute", id, class] => {
                let class = match *class {
                    "append" => Class::Append,
                    "control" => Class::Control,
                    "snapshot" => Class::Snapshot,
                    _ => panic!("no such class: {class}"),
                };
                self.muted.push((node(id), class));
            }
            ["heal"] => {
                self.cut.clear();
                self.muted.clear();
            }
            ["told", id] => {
                let progress = self.told[&node(id)].progress.iter().map(|peer| {
                    let snapshot = if peer.snapshot { " waits for a snapshot" } else { "" };
                    let active = if peer.active { "" } else { " is silent" };
                    format!("{} at {}{snapshot}{active}", peer.replica, peer.matched)
                });
                let progress: Vec<String> = progress.collect();
                writeln!(out, "{id} tells of {}", progress.join(", ")).expect("a string");
            }
            ["row", id, key] => {
                let row = self.nodes[&node(id)].machines.row(GROUP, key);
                writeln!(out, "{id} {key} = {}", row.as_deref().unwrap_or("nothing")).expect("a string");
            }
            ["status", ids @ ..] => {
                for id in ids {
                    let text = self.at(node(id)).status(GROUP).map_or("no replica".to_owned(), |s| {
                        let mut text = format!(
                            "{:?} of term {}, log {}..={} durable to {}, committed {}, applied {}, voters [{}]",
                            s.role, s.term, s.first_index, s.last_index, s.persisted, s.commit, s.applied,
                            names(&s.conf_state.voters)
                        );
                        for (what, ids) in
                            [("outgoing", &s.conf_state.voters_outgoing), ("learners", &s.conf_state.learners)]
                        {
                            if !ids.is_empty() {
                                write!(text, " {what} [{}]", names(ids)).expect("a string");
                            }
                        }
                        if s.sleeping {
                            text.push_str(", asleep");
                        }
                        if let Some(node) = s.no_room {
                            write!(text, ", no room on node {node}").expect("a string");
                        }
                        text
                    });
                    writeln!(out, "{id} {text}").expect("a string");
                }
            }
            _ => panic!("no such command: {line}"),
        }
        self.settle(out);
    }
}

fn describe_answer(at: NodeId, answer: Answer, stamp: &mut u64, out: &mut String) {
    let text = match answer {
        Answer::Proposed(Ok(applied)) => {
            format!("applied at {}: {}", applied.index, String::from_utf8_lossy(&applied.reply))
        }
        Answer::Proposed(Err(error)) => format!("not applied: {error}"),
        // Stamps are unix time and counters, far above any index.
        Answer::Index(Ok(index)) if index > 1 << 16 => {
            *stamp = index;
            "a stamp".to_owned()
        }
        Answer::Index(Ok(index)) => format!("confirmed {index}"),
        Answer::Index(Err(error)) | Answer::Done(Err(error)) | Answer::Members(Err(error)) => {
            error.to_string()
        }
        Answer::Members(Ok((conf, index))) => format!("members at {index}: {:?}", conf.voters),
        Answer::Done(Ok(())) => "done".to_owned(),
        Answer::Replica(Ok(id)) => format!("{id} is here"),
        Answer::Replica(Err(error)) | Answer::Destroyed(Err(error)) => error.to_string(),
        Answer::Destroyed(Ok(())) => "gone".to_owned(),
        Answer::Depths(depths) => format!("{depths:?}"),
    };
    writeln!(out, "{at}: {text}").expect("a string");
}

fn describe_event(event: &pontoon_raftstore::Event) -> String {
    use pontoon_raftstore::Event::*;
    match event {
        LeaderChanged { leader, term, .. } => format!("{leader} leads term {term}"),
        ReplicaDead { reason, .. } => format!("dead: {reason}"),
        SnapshotInstalled { index, bytes, .. } => format!("took a snapshot at {index} of {bytes} bytes"),
        other => format!("{other:?}"),
    }
}

#[test]
fn every_script_gives_its_recorded_answers() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scripts");
    let mut scripts: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    scripts.sort();
    assert!(!scripts.is_empty());
    for path in scripts {
        let recorded = fs::read_to_string(&path).unwrap();
        let mut session = Session::default();
        let mut blocks = Vec::new();
        for block in recorded.trim_end().split("\n\n") {
            let commands = block.split("\n---").next().unwrap_or(block);
            let mut out = String::new();
            for line in commands.lines().filter(|line| !line.starts_with('#')) {
                session.run(line, &mut out);
            }
            blocks.push(format!("{commands}\n---\n{out}"));
        }
        let actual = blocks.join("\n");
        if std::env::var_os("REWRITE").is_some() {
            fs::write(&path, &actual).unwrap();
        } else {
            assert_eq!(actual, recorded, "{} answers differently", path.display());
        }
    }
}
