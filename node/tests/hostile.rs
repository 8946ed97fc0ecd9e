//! R30: bad peers and bad bytes. Whatever comes to a node's port, it costs whoever sent it the call or the stream, and of
//! what may be said by a peer it costs one group at most.
//!
//! `PONTOON_R30_CASES` says how many cases each hunt plays (64), `PONTOON_R30_SEED` from which seed (1).

use std::{collections::BTreeSet, env, time::Duration};

use axum::{
    body::Body,
    http::{Request, header},
};
use http_body_util::BodyExt;
use pontoon_node::{
    Node, NodeConfig,
    api::{FILE_DESCRIPTOR_SET, admin_client::AdminClient},
};
use pontoon_proto::{
    ReplicaId,
    v1::{self, peer_frame::Frame, peer_message::Body as Says},
};
use pontoon_shard::Versions;
use proptest::{
    collection::vec,
    prelude::*,
    strategy::ValueTree,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};
use prost::Message;
use prost_types::FileDescriptorSet;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};
use tonic::{Code, transport::Channel};
use tower::ServiceExt;

/// Far above what anything here takes.
const LIMIT: Duration = Duration::from_secs(60);
/// What a node may take for all that is thrown at it here.
const MEMORY_MOST: u64 = 64 << 20;

fn number(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

/// Draws the cases of a hunt, the same for the same seed.
fn cases<S: Strategy>(strategy: S) -> Vec<S::Value> {
    let seed = number("PONTOON_R30_SEED", 1);
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let mut runner =
        TestRunner::new_with_rng(Config::default(), TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let draw = |_| strategy.new_tree(&mut runner).expect("the strategy rejects nothing").current();
    (0..number("PONTOON_R30_CASES", 64)).map(draw).collect()
}

/// Three nodes with a predicate that is thrown at and one that must not notice. The first is thrown at in the name of the second.
struct Stage {
    first: Node,
    second: Node,
    third: Node,
    channel: Channel,
    victim: v1::Shard,
    _dir: TempDir,
}

impl Stage {
    async fn new() -> Stage {
        let dir = tempfile::tempdir().unwrap();
        let config = |name: &str| {
            let mut config = NodeConfig::new(dir.path().join(name), "127.0.0.1:0");
            config.durable = false;
            config
        };
        let first = Node::start(config("1")).await.unwrap();
        let second = Node::start(config("2").joining(first.address())).await.unwrap();
        let third = Node::start(config("3").joining(first.address())).await.unwrap();
        let client = first.client().await.unwrap();
        for predicate in ["victim", "bystander"] {
            client.create_map(predicate, 3).await.unwrap();
            client.put(predicate, "k", "v").await.unwrap();
        }
        // A replica on each node: some may still be on their way.
        let whole = async {
            loop {
                let ask = v1::FindPredicateRequest { predicate: "victim".to_owned(), hops: 0 };
                let shard = client.find_predicate(ask).await.unwrap().shard.unwrap();
                if shard.voters.len() == 3 {
                    return shard;
                }
                sleep(Duration::from_millis(10)).await;
            }
        };
        let victim = timeout(LIMIT, whole).await.unwrap();
        let endpoint =
            tonic::transport::Endpoint::from_shared(format!("http://{}", first.address())).unwrap();
        let channel = endpoint.connect().await.unwrap();
        Stage { first, second, third, channel, victim, _dir: dir }
    }

    /// Sends bytes as the body of a call; its status, `None` if the connection broke.
    async fn send(&self, path: &str, body: Vec<u8>) -> Option<i32> {
        let request = Request::post(format!("http://{}{path}", self.first.address()))
            .header(header::CONTENT_TYPE, "application/grpc")
            .header(header::TE, "trailers")
            .body(tonic::body::Body::new(Body::from(body)))
            .unwrap();
        let answer = timeout(LIMIT, self.channel.clone().oneshot(request)).await.unwrap().ok()?;
        let status =
            |headers: &axum::http::HeaderMap| headers.get("grpc-status")?.to_str().ok()?.parse().ok();
        if let Some(status) = status(answer.headers()) {
            return Some(status);
        }
        // Streams that have nothing to end for go on: it is enough that they were begun.
        match timeout(Duration::from_millis(500), answer.into_body().collect()).await {
            Ok(Ok(body)) => body.trailers().and_then(status),
            Ok(Err(_)) => None,
            Err(_) => Some(0),
        }
    }

    /// What the second node says of itself.
    fn hello(&self) -> v1::Hello {
        let spoken = Versions::OURS;
        v1::Hello {
            oldest_version: spoken.oldest,
            newest_version: spoken.newest,
            ..self.second.raft().hello()
        }
    }

    fn greeting(&self) -> v1::PeerFrame {
        let greeting = v1::Greeting { hello: Some(self.hello()), class: 1 };
        v1::PeerFrame { frame: Some(Frame::Greeting(greeting)) }
    }

    async fn turned_away(&self, why: &str) -> u64 {
        let mut admin = AdminClient::new(self.channel.clone());
        let view = admin.report(v1::ReportRequest {}).await.unwrap().into_inner();
        view.turned_away[why]
    }

    /// The node lives, and who was not meant has not noticed.
    async fn is_well(&self) {
        let client = self.first.client().await.unwrap();
        client.put("bystander", "k", "w").await.unwrap();
        assert_eq!(client.get("bystander", "k").await.unwrap().unwrap().value, "w");
        let groups = client.groups(v1::GroupsRequest::default()).await.unwrap().groups;
        let dead: BTreeSet<u64> = groups
            .iter()
            .filter(|group| group.replicas.iter().any(|r| !r.dead.is_empty()))
            .map(|g| g.group)
            .collect();
        assert!(dead.iter().all(|&group| group == self.victim.group), "groups {dead:?} died of it");
        let failed = timeout(Duration::ZERO, self.first.failed()).await;
        assert!(failed.is_err(), "{failed:?}");
    }

    async fn end(self) {
        self.third.shutdown().await.unwrap();
        self.second.shutdown().await.unwrap();
        self.first.shutdown().await.unwrap();
    }
}

/// A message as gRPC frames it.
fn framed(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap();
    [&[0], &length.to_be_bytes()[..], message].concat()
}

/// What this process holds of the machine's memory, in bytes.
fn memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a process has memory");
    resident.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

fn methods() -> Vec<String> {
    let mut methods = Vec::new();
    for file in FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap().file {
        for service in &file.service {
            let name = |method: &prost_types::MethodDescriptorProto| {
                format!("/{}.{}/{}", file.package(), service.name(), method.name())
            };
            methods.extend(service.method.iter().map(name));
        }
    }
    methods
}

/// Bytes of a message that were changed in some places, cut, or made up.
fn garbled(valid: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let length = valid.len().max(1);
    let flips = vec((0..length, any::<u8>()), 0..8);
    let changed = (Just(valid), flips, 0..=length).prop_map(|(mut bytes, flips, keep)| {
        for (at, value) in flips {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= value;
            }
        }
        bytes.truncate(keep);
        bytes
    });
    prop_oneof![3 => changed, 1 => vec(any::<u8>(), 0..200)]
}

#[tokio::test(flavor = "multi_thread")]
async fn r30_bad_bytes_in_any_call_are_an_error_and_cost_nothing() {
    let stage = Stage::new().await;
    let before = memory();
    let write = v1::WriteRequest {
        predicate: "victim".to_owned(),
        ops: vec![pontoon_node::client::put("k", "v")],
        request: Some(v1::RequestId { client_high: 1, client_low: 2, stamp: 3, seq: 4, acked_below: 5 }),
        ..Default::default()
    };
    let methods = methods();
    assert!(methods.len() > 40, "{methods:?}");
    for (at, bytes) in cases(garbled(write.encode_to_vec())).into_iter().enumerate() {
        // Removing nodes is no mistake of bytes; it is what that call does.
        let harmless = |path: &&String| {
            !["/Decommission", "/DropPredicate", "/Join"].iter().any(|end| path.ends_with(end))
        };
        for path in methods.iter().filter(harmless).skip(at % 7).step_by(7) {
            // A field of a foreign message may be legible: then there is another answer. A panic breaks the call.
            let status = stage.send(path, framed(&bytes)).await;
            assert!(
                status.is_some_and(|status| status != i32::from(Code::Unknown)),
                "{path}: {status:?} to {bytes:02x?}"
            );
        }
    }
    // Lengths that lie, and what would have to be unpacked.
    let mut lies = vec![
        [&[0][..], &u32::MAX.to_be_bytes()].concat(),
        [&[0][..], &(1u32 << 31).to_be_bytes(), &[0; 100]].concat(),
        [&[1][..], &4u32.to_be_bytes(), &[31, 139, 8, 0]].concat(),
        [&[77][..], &4u32.to_be_bytes(), &[0; 4]].concat(),
    ];
    // A length inside the message, and 100,000 groups in each other.
    lies.push(framed(&[0x0a, 0xff, 0xff, 0xff, 0xff, 0x07]));
    lies.push(framed(&vec![0x0b; 100_000]));
    for path in &methods {
        for lie in &lies {
            let status = stage.send(path, lie.clone()).await;
            assert!(
                status.is_none_or(|status| status != 0)
                    || path.ends_with("/Stream")
                    || path.ends_with("/Calls"),
                "{path}: {status:?}"
            );
        }
    }
    stage.is_well().await;
    let grown = memory().saturating_sub(before);
    assert!(grown < MEMORY_MOST, "{} MiB for refused bytes", grown >> 20);
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r30_bad_bytes_on_a_peer_stream_end_it_and_are_counted() {
    let stage = Stage::new().await;
    let message = v1::PeerMessage {
        group: stage.victim.group,
        from: ReplicaId::on(stage.second.id(), 1).get(),
        to: ReplicaId::on(stage.first.id(), 1).get(),
        body: Some(Says::Raft(v1::RaftMessage { kind: 8, term: 1, ..Default::default() })),
    };
    let batch = v1::PeerFrame { frame: Some(Frame::Batch(v1::PeerBatch { messages: vec![message] })) };
    let greeting = framed(&stage.greeting().encode_to_vec());
    for bytes in cases(garbled(batch.encode_to_vec())) {
        stage.send("/pontoon.v1.Peer/Stream", [greeting.clone(), framed(&bytes)].concat()).await;
    }
    let before = stage.turned_away("illegible_frames").await;
    // A second greeting, a field that is no frame, an end in the middle.
    for bytes in [greeting.clone(), framed(&[0xff; 10]), framed(&[0x12, 0x40, 0x0a])] {
        stage.send("/pontoon.v1.Peer/Stream", [greeting.clone(), bytes].concat()).await;
    }
    let counted = async {
        while stage.turned_away("illegible_frames").await < before + 3 {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(LIMIT, counted).await.unwrap();
    stage.is_well().await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r30_a_peer_that_is_not_who_it_says_is_refused_and_counted() {
    let stage = Stage::new().await;
    let hello = stage.hello();
    let strangers = [
        v1::Hello { cluster: vec![7; 16].into(), ..hello.clone() },
        v1::Hello { cluster: vec![7; 3].into(), ..hello.clone() },
        v1::Hello { boot_history: vec![1, 2, 3], ..hello.clone() },
        v1::Hello { boot_history: Vec::new(), ..hello.clone() },
        v1::Hello { protocol: 99, ..hello.clone() },
        v1::Hello { newest_version: 1, ..hello.clone() },
        v1::Hello { node: stage.first.id().get(), ..hello.clone() },
        v1::Hello { node: 0, ..hello.clone() },
        v1::Hello { node: u64::MAX, ..hello.clone() },
    ];
    let mut peer = pontoon_node::api::peer_client::PeerClient::new(stage.channel.clone());
    for stranger in strangers {
        let greeting = v1::Greeting { hello: Some(stranger.clone()), class: 0 };
        let frame = v1::PeerFrame { frame: Some(Frame::Greeting(greeting)) };
        let (sender, frames) = tokio::sync::mpsc::channel(2);
        sender.send(frame).await.unwrap();
        let stream = tokio_stream::wrappers::ReceiverStream::new(frames);
        let refused = match timeout(LIMIT, peer.stream(stream)).await.unwrap() {
            Err(status) => status.message().to_owned(),
            Ok(answers) => match answers.into_inner().message().await.unwrap().unwrap().frame {
                Some(Frame::Reply(reply)) => reply.refused,
                other => panic!("{other:?}"),
            },
        };
        assert!(!refused.is_empty(), "{stranger:?} is taken in");
    }
    assert!(stage.turned_away("greetings_refused").await >= 6);
    stage.is_well().await;
    stage.end().await;
}

/// Everything that a peer may say, about the victim, with numbers that may be anything.
fn said(group: u64, from: u64, to: u64) -> impl Strategy<Value = v1::PeerMessage> {
    let n = || prop_oneof![4 => 0..20u64, 1 => any::<u64>()];
    let bytes = || vec(any::<u8>(), 0..64);
    let entry = (0..5i32, n(), n(), bytes(), bytes()).prop_map(|(kind, term, index, data, context)| {
        v1::WireEntry { kind, term, index, data: data.into(), context: context.into() }
    });
    let conf = || {
        (vec(n(), 0..4), vec(n(), 0..4), any::<bool>()).prop_map(|(voters, learners, auto_leave)| {
            v1::ConfState { voters, learners, auto_leave, ..Default::default() }
        })
    };
    let offer = (n(), n(), proptest::option::of(conf()))
        .prop_map(|(index, term, conf_state)| v1::SnapshotOffer { index, term, conf_state });
    let raft = (
        (-1..25i32, n(), n(), n(), vec(entry, 0..4)),
        (n(), n(), proptest::option::of(offer), any::<bool>(), n(), bytes()),
    )
        .prop_map(
            |(
                (kind, term, log_term, index, entries),
                (commit, commit_term, snapshot, reject, reject_hint, context),
            )| {
                Says::Raft(v1::RaftMessage {
                    kind,
                    term,
                    log_term,
                    index,
                    entries,
                    commit,
                    commit_term,
                    snapshot,
                    reject,
                    reject_hint,
                    context: context.into(),
                    ..Default::default()
                })
            },
        );
    let chunk_info = (bytes(), n(), bytes()).prop_map(|(hash, bytes, first_key)| v1::ChunkInfo {
        hash: hash.into(),
        bytes,
        first_key: first_key.into(),
    });
    let manifest = (any::<u32>(), n(), n(), n(), vec(chunk_info, 0..4), n(), bytes()).prop_map(
        |(format, pull, of, snapshot, chunks, total_bytes, descriptor)| {
            Says::Manifest(v1::Manifest {
                format,
                pull,
                group: of,
                snapshot,
                chunks,
                total_bytes,
                descriptor: descriptor.into(),
                ..Default::default()
            })
        },
    );
    let says = prop_oneof![
        6 => raft,
        2 => manifest,
        1 => (n(), n()).prop_map(|(pull, min_index)| Says::ManifestRequest(v1::ManifestRequest { pull, min_index })),
        1 => (n(), n(), any::<u32>()).prop_map(|(pull, snapshot, chunk)| Says::ChunkRequest(v1::ChunkRequest { pull, snapshot, chunk })),
        1 => (n(), any::<u32>(), bytes()).prop_map(|(pull, chunk, data)| Says::Chunk(v1::Chunk { pull, chunk, data: data.into() })),
        1 => (n(), any::<bool>(), any::<bool>(), n()).prop_map(|(pull, done, under_way, index)| Says::SnapshotStatus(v1::SnapshotStatus { pull, done, under_way, index, ..Default::default() })),
        1 => n().prop_map(|pull| Says::PullRefused(v1::PullRefused { pull, reason: "no".to_owned() })),
        1 => n().prop_map(|context| Says::ReadRequest(v1::ReadRequest { context })),
        1 => (n(), n()).prop_map(|(context, index)| Says::ReadReply(v1::ReadReply { context, index })),
    ];
    let strange = prop_oneof![8 => Just((from, to)), 1 => (n(), n())];
    (says, strange).prop_map(move |(says, (from, to))| v1::PeerMessage { group, from, to, body: Some(says) })
}

#[tokio::test(flavor = "multi_thread")]
async fn r30_what_a_peer_says_costs_one_group_at_most() {
    let stage = Stage::new().await;
    let of = |node: &Node| {
        let member = |id: &&u64| ReplicaId::new(**id).is_ok_and(|replica| replica.node() == node.id());
        stage.victim.voters.iter().find(member).copied().unwrap()
    };
    let (from, to) = (of(&stage.second), of(&stage.first));
    let greeting = framed(&stage.greeting().encode_to_vec());
    let before = memory();
    for messages in cases(vec(said(stage.victim.group, from, to), 1..20)) {
        let frame = v1::PeerFrame { frame: Some(Frame::Batch(v1::PeerBatch { messages })) };
        stage
            .send("/pontoon.v1.Peer/Stream", [greeting.clone(), framed(&frame.encode_to_vec())].concat())
            .await;
    }
    // Small words of whole nodes, whose columns do not fit, about groups that are not there.
    let beats = (
        vec(any::<u64>(), 0..5),
        vec(0..9u32, 0..5),
        vec(any::<u32>(), 0..5),
        vec(0..9u64, 0..5),
        any::<bool>(),
    );
    for (groups, kinds, members, terms, unanswered) in cases(beats) {
        // None about those who were not meant: whoever may speak for a node may speak for its replicas.
        let groups = groups.into_iter().map(|group| group | 1 << 40).collect();
        let incarnation = stage.second.raft().hello().boot_history.last().copied().unwrap();
        let beats = v1::Beats {
            incarnation,
            groups,
            kinds,
            from: members.clone(),
            to: members,
            terms: terms.clone(),
            commits: terms,
            unanswered,
            ..Default::default()
        };
        let message = v1::PeerMessage { group: 0, from: 0, to: 0, body: Some(Says::Beats(beats)) };
        let frame = v1::PeerFrame { frame: Some(Frame::Batch(v1::PeerBatch { messages: vec![message] })) };
        stage
            .send("/pontoon.v1.Peer/Stream", [greeting.clone(), framed(&frame.encode_to_vec())].concat())
            .await;
    }
    stage.is_well().await;
    let grown = memory().saturating_sub(before);
    assert!(grown < MEMORY_MOST, "{} MiB for lies", grown >> 20);
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r30_bytes_that_are_no_protocol_end_their_connection() {
    let stage = Stage::new().await;
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    for bytes in cases(prop_oneof![vec(any::<u8>(), 100..2_000), garbled([preface, vec![0; 200]].concat())]) {
        let mut stream = TcpStream::connect(stage.first.address()).await.unwrap();
        // It may hang up before everything is said.
        drop(stream.write_all(&bytes).await);
        drop(stream.shutdown().await);
        drop(timeout(LIMIT, stream.read_to_end(&mut Vec::new())).await.unwrap());
    }
    stage.is_well().await;
    stage.end().await;
}
