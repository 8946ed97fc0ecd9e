//! Nodes with certificates, in this process: who gets in, and what each may do there.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use axum::http::uri::PathAndQuery;
use pontoon_proto::v1::{self, peer_frame::Frame};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};
use tonic::{Code, Request, Status, transport::Channel};
use tonic_prost::ProstCodec;

use super::{Dialer, Tls, TlsFiles};
use crate::{
    Node, NodeConfig, NodeError, Role, TlsError,
    api::{admin_client::AdminClient, peer_client::PeerClient},
    certs,
    client::{Client, ClientError, ConnectOptions},
    roles::{RULES, words},
};

/// Far above what anything here takes.
const LIMIT: Duration = Duration::from_secs(60);

/// An authority, and the nodes and clients that it knows.
struct Stage {
    dir: TempDir,
}

impl Stage {
    fn new() -> Stage {
        let stage = Stage { dir: tempfile::tempdir().unwrap() };
        certs::init(&stage.certs(), "stage", 30).unwrap();
        stage
    }

    fn certs(&self) -> PathBuf {
        self.dir.path().join("certs")
    }

    fn files(&self, role: Role, name: &str) -> TlsFiles {
        files(&self.certs(), role, name, false)
    }

    fn node(&self, id: u64) -> NodeConfig {
        let mut config = NodeConfig::new(self.dir.path().join(format!("n{id}")), "127.0.0.1:0");
        config.durable = false;
        config.tls = Some(self.files(Role::Node, &id.to_string()));
        config
    }
}

/// Makes a certificate, or makes it anew.
fn files(certs: &Path, role: Role, name: &str, renew: bool) -> TlsFiles {
    let hosts = ["127.0.0.1".to_owned(), "localhost".to_owned()];
    let hosts = if role == Role::Node { &hosts[..] } else { &[] };
    let made = certs::issue(certs, role, name, hosts, 30, renew).unwrap();
    TlsFiles { cert: made.cert, key: made.key, ca: certs.join("ca.pem") }
}

fn channel(files: TlsFiles, node: &Node) -> Channel {
    Dialer::new(Some(Tls::open(files).unwrap())).lazily(node.address()).unwrap()
}

async fn client(files: TlsFiles, node: &Node) -> Result<Client, ClientError> {
    Client::connect_with([node.address()], ConnectOptions::default().tls(files)).await
}

/// Calls a method with an empty message.
async fn call(channel: Channel, path: &'static str) -> Result<(), Status> {
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.map_err(|error| Status::unknown(error.to_string()))?;
    let answer = grpc.server_streaming(
        Request::new(()),
        PathAndQuery::from_static(path),
        ProstCodec::<(), ()>::default(),
    );
    timeout(LIMIT, answer).await.unwrap().map(drop)
}

/// Waits until a node has turned somebody away for this reason.
async fn turned_away(node: &Node, why: &str, times: u64) {
    let counted = async {
        while node.shared.turned_away.counts()[why] < times {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(LIMIT, counted).await.unwrap_or_else(|_| panic!("{why}: {:?}", node.shared.turned_away.counts()));
}

#[tokio::test(flavor = "multi_thread")]
async fn each_role_may_call_what_the_table_says_and_nothing_else() {
    let stage = Stage::new();
    let node = Node::start(stage.node(1)).await.unwrap();
    for role in Role::ALL {
        let name = if role == Role::Node { "2" } else { "somebody" };
        let channel = channel(stage.files(role, name), &node);
        for &(path, roles) in RULES {
            let answer = call(channel.clone(), path).await;
            let denied = answer.as_ref().err().filter(|status| {
                status.code() == Code::PermissionDenied && status.message().contains("needs the role")
            });
            assert_eq!(denied.is_none(), roles.contains(&role), "{role} calls {path}: {answer:?}");
            if let Some(status) = denied {
                assert!(status.message().contains(&words(roles)), "{}", status.message());
            }
        }
        let strange = call(channel, "/pontoon.v1.Data/Drop").await.unwrap_err();
        assert_eq!(strange.code(), Code::PermissionDenied, "{strange}");
    }
    node.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_neither_writes_nor_makes_predicates_on_any_way() {
    let stage = Stage::new();
    let node = Node::start(stage.node(1)).await.unwrap();
    let writer = client(stage.files(Role::Writer, "app"), &node).await.unwrap();
    writer.put("name", "k", "v").await.unwrap();
    let reader = client(stage.files(Role::Reader, "app"), &node).await.unwrap();
    assert_eq!(reader.get("name", "k").await.unwrap().unwrap().value, "v");

    let refused = reader.put("name", "k", "w").await.unwrap_err().to_string();
    assert!(refused.contains("needs the role writer"), "{refused}");
    let mut data = crate::api::data_client::DataClient::new(channel(
        files(&stage.certs(), Role::Reader, "app", true),
        &node,
    ));
    let route = v1::RouteRequest { predicate: "other".to_owned(), create: true };
    assert_eq!(data.route(route).await.unwrap_err().code(), Code::PermissionDenied);

    let write = v1::WriteRequest { predicate: "name".to_owned(), ..Default::default() };
    let calls = vec![v1::Call { id: 1, request: Some(v1::call::Request::Write(write)) }];
    let (batches, sent) = tokio::sync::mpsc::channel(1);
    batches.send(v1::CallBatch { calls }).await.unwrap();
    let sent = tokio_stream::wrappers::ReceiverStream::new(sent);
    let answer = data.calls(sent).await.unwrap().into_inner().message().await.unwrap().unwrap();
    match answer.replies[0].reply.as_ref().unwrap() {
        v1::reply::Reply::Failed(failed) => {
            assert_eq!(failed.code, i32::from(Code::PermissionDenied), "{failed:?}")
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(reader.get("name", "k").await.unwrap().unwrap().value, "v");
    node.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_join_with_the_ids_of_their_certificates_and_speak_for_themselves_alone() {
    let stage = Stage::new();
    let wrong = Node::start(stage.node(4)).await.unwrap_err();
    assert!(matches!(wrong, NodeError::Tls(TlsError::OtherHolder { .. })), "{wrong}");

    let first = Node::start(stage.node(1)).await.unwrap();
    let third = Node::start(stage.node(3).joining(first.address())).await.unwrap();
    assert_eq!((first.id().get(), third.id().get()), (1, 3));
    let writer = client(stage.files(Role::Writer, "app"), &third).await.unwrap();
    writer.put("name", "k", "v").await.unwrap();

    // An id that is taken is refused, and so is a word for another node.
    let mut again = stage.node(5);
    again.tls = Some(files(&stage.certs(), Role::Node, "3", true));
    again.dir = stage.dir.path().join("again");
    let refused = Node::start(again.joining(first.address())).await.unwrap_err().to_string();
    assert!(refused.contains("never given again"), "{refused}");

    let third_files = files(&stage.certs(), Role::Node, "3", true);
    let stranger = channel(third_files, &first);
    let mut admin = AdminClient::new(stranger.clone());
    let announce = v1::AnnounceRequest { node: 1, address: "127.0.0.1:1".to_owned(), ..Default::default() };
    assert_eq!(admin.announce(announce).await.unwrap_err().code(), Code::PermissionDenied);
    let join = v1::JoinRequest { wanted: 7, ..Default::default() };
    assert_eq!(admin.join(join).await.unwrap_err().code(), Code::PermissionDenied);

    let before = first.shared.turned_away.counts()["greetings_refused"];
    let hello = third.raft().hello();
    let lie = v1::Hello { node: 2, ..hello };
    let greeting =
        v1::PeerFrame { frame: Some(Frame::Greeting(v1::Greeting { hello: Some(lie), class: 0 })) };
    let refused = PeerClient::new(stranger).stream(tokio_stream::iter([greeting])).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    assert!(refused.message().contains("n3 does not speak for node n2"), "{refused}");
    assert_eq!(first.shared.turned_away.counts()["greetings_refused"], before + 1);

    third.shutdown().await.unwrap();
    first.shutdown().await.unwrap();
    // A directory is its node's, whatever certificate comes.
    let mut swapped = stage.node(6);
    swapped.dir = stage.dir.path().join("n3");
    let wrong = Node::start(swapped).await.unwrap_err().to_string();
    assert!(wrong.contains("n3, which the data directory belongs to"), "{wrong}");
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_are_turned_away_and_counted() {
    let (stage, other) = (Stage::new(), Stage::new());
    let node = Node::start(stage.node(1)).await.unwrap();

    // Another authority, which this client trusts as little as the node trusts the client.
    let foreign = client(other.files(Role::Operator, "eve"), &node).await.unwrap_err().to_string();
    assert!(foreign.contains("invalid peer certificate"), "{foreign}");
    turned_away(&node, "handshakes_failed", 1).await;
    let mut trusting = other.files(Role::Writer, "eve");
    trusting.ca = stage.certs().join("ca.pem");
    let unknown = Tls::open(trusting).unwrap_err().to_string();
    assert!(unknown.contains("not valid under"), "{unknown}");

    // No TLS at all, and bytes that are no protocol.
    let plain = Client::connect([node.address()]).await.unwrap_err().to_string();
    assert!(plain.contains("nobody answers"), "{plain}");
    let mut raw = TcpStream::connect(node.address()).await.unwrap();
    raw.write_all(&[0x5a; 4096]).await.unwrap();
    // A closed connection ends the read, or breaks it.
    drop(timeout(LIMIT, raw.read_to_end(&mut Vec::new())).await.unwrap());
    turned_away(&node, "handshakes_failed", 3).await;

    // A certificate of the same authority for another cluster: the authority's key has been used for two.
    let text = fs::read_to_string(stage.certs().join("ca.pem")).unwrap();
    let issuer = rcgen::Issuer::from_ca_cert_pem(
        &text,
        rcgen::KeyPair::from_pem(&fs::read_to_string(stage.certs().join("ca.key")).unwrap()).unwrap(),
    )
    .unwrap();
    for (at, uri) in ["pontoon://elsewhere/operator/eve", "https://eve.example", "pontoon://stage/root/eve"]
        .into_iter()
        .enumerate()
    {
        let mut params = rcgen::CertificateParams::default();
        params.subject_alt_names = vec![rcgen::SanType::URI(uri.try_into().unwrap())];
        let key = rcgen::KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &issuer).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(super::certificates(&stage.certs().join("ca.pem")).unwrap().remove(0)).unwrap();
        let config = rustls::ClientConfig::builder_with_provider(super::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(
                vec![cert.der().clone()],
                rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        let stream = TcpStream::connect(node.address()).await.unwrap();
        let name = rustls::pki_types::ServerName::try_from("127.0.0.1").unwrap();
        let mut stream =
            tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
        drop(timeout(LIMIT, stream.read_to_end(&mut Vec::new())).await.unwrap());
        turned_away(&node, "strange_certificates", at as u64 + 1).await;
    }
    // Who belongs here still gets in.
    let reader = client(stage.files(Role::Reader, "app"), &node).await.unwrap();
    assert_eq!(reader.status(v1::StatusRequest {}).await.unwrap().node, 1);
    node.shutdown().await.unwrap();
}

/// The certificate that a node shows to a new connection.
async fn shown(as_whom: &TlsFiles, node: &Node) -> Vec<u8> {
    let client = Tls::open(as_whom.clone()).unwrap().now().client.clone();
    let name = rustls::pki_types::ServerName::try_from("127.0.0.1").unwrap();
    let stream = TcpStream::connect(node.address()).await.unwrap();
    let stream = tokio_rustls::TlsConnector::from(client).connect(name, stream).await.unwrap();
    stream.get_ref().1.peer_certificates().unwrap()[0].to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn new_certificates_are_taken_up_and_bad_ones_are_not() {
    let stage = Stage::new();
    let node = Node::start(stage.node(1)).await.unwrap();
    let reader = stage.files(Role::Reader, "app");
    let tls = node.shared.tls.clone().unwrap();
    let first = shown(&reader, &node).await;

    // Each of these is noticed, judged and left: nothing that is shown changes.
    let files = TlsFiles {
        cert: stage.certs().join("node-1.pem"),
        key: stage.certs().join("node-1.key"),
        ca: reader.ca.clone(),
    };
    let (cert, key) = (fs::read(&files.cert).unwrap(), fs::read(&files.key).unwrap());
    let other = stage.files(Role::Node, "2");
    let (other_cert, other_key) = (fs::read(&other.cert).unwrap(), fs::read(&other.key).unwrap());
    let elsewhere = Stage::new();
    let foreign = elsewhere.files(Role::Node, "1");
    let (foreign_cert, foreign_key) = (fs::read(&foreign.cert).unwrap(), fs::read(&foreign.key).unwrap());
    for (bad_cert, bad_key) in [
        (&b"nothing"[..], &key[..]),
        (&cert[..], &b"nothing"[..]),
        (&cert[..], &other_key[..]),
        (&other_cert[..], &other_key[..]),
        (&foreign_cert[..], &foreign_key[..]),
    ] {
        fs::write(&files.cert, bad_cert).unwrap();
        fs::write(&files.key, bad_key).unwrap();
        // Seen once, and at rest the next time.
        tls.refresh();
        tls.refresh();
        assert_eq!(shown(&reader, &node).await, first);
    }
    fs::remove_file(&files.cert).unwrap();
    tls.refresh();
    tls.refresh();
    assert_eq!(shown(&reader, &node).await, first);
    fs::write(&files.cert, &cert).unwrap();
    fs::write(&files.key, &key).unwrap();

    // The node looks by itself.
    self::files(&stage.certs(), Role::Node, "1", true);
    let changed = async {
        while shown(&reader, &node).await == first {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(LIMIT, changed).await.unwrap();
    client(reader, &node).await.unwrap();
    node.shutdown().await.unwrap();
}
