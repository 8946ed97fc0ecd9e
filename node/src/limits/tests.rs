//! Limits of a node's port, met on purpose.

use std::time::Duration;

use tokio::{
    io::AsyncReadExt,
    net::TcpStream,
    time::{sleep, timeout},
};
use tonic::{Code, transport::Endpoint};

use super::*;
use crate::{
    Node, NodeConfig, Role, TlsFiles,
    api::data_client::DataClient,
    certs,
    client::{Client, ConnectOptions},
};
use pontoon_proto::v1;

const LIMIT: Duration = Duration::from_secs(60);

async fn counted(node: &Node, why: &str) {
    let counted = async {
        while node.shared.turned_away.counts()[why] == 0 {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(LIMIT, counted).await.unwrap_or_else(|_| panic!("{why}: {:?}", node.shared.turned_away.counts()));
}

fn config(dir: &tempfile::TempDir) -> NodeConfig {
    let mut config = NodeConfig::new(dir.path().join("n1"), "127.0.0.1:0");
    config.durable = false;
    config
}

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_too_many_is_closed_and_a_place_that_is_left_is_given_again() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(NodeConfig { max_connections: 8, ..config(&dir) }).await.unwrap();
    let mut open = Vec::new();
    for _ in 0..9 {
        open.push(TcpStream::connect(node.address()).await.unwrap());
    }
    counted(&node, "connections_over_limit").await;
    drop(open);
    let again = async {
        while Client::connect([node.address()]).await.is_err() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(LIMIT, again).await.unwrap();
    node.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_cannot_lock_operators_out() {
    let dir = tempfile::tempdir().unwrap();
    let certs_dir = dir.path().join("certs");
    certs::init(&certs_dir, "c", 30).unwrap();
    let issue = |role: Role, name: &str, hosts: &[String]| {
        let made = certs::issue(&certs_dir, role, name, hosts, 30, false).unwrap();
        TlsFiles { cert: made.cert, key: made.key, ca: certs_dir.join("ca.pem") }
    };
    let tls = issue(Role::Node, "1", &["127.0.0.1".to_owned()]);
    let node = Node::start(NodeConfig { max_connections: 16, tls: Some(tls), ..config(&dir) }).await.unwrap();
    let reader = ConnectOptions::default().tls(issue(Role::Reader, "app", &[]));
    let mut readers = Vec::new();
    while let Ok(client) = Client::connect_with([node.address()], reader.clone()).await {
        readers.push(client);
        assert!(readers.len() < 16, "readers take every place");
    }
    counted(&node, "connections_over_limit").await;
    let operator = ConnectOptions::default().tls(issue(Role::Operator, "ann", &[]));
    Client::connect_with([node.address()], operator).await.unwrap();
    drop(readers);
    node.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tail_that_nobody_reads_ends() {
    let dir = tempfile::tempdir().unwrap();
    let node =
        Node::start(NodeConfig { slow_reader: Duration::from_millis(200), ..config(&dir) }).await.unwrap();
    let log = node.client().await.unwrap().create_log("events", 1).await.unwrap();
    // More than what the connection and the places on the way to it hold.
    for _ in 0..24 {
        log.append([vec![7; 500_000]]).await.unwrap();
    }
    let endpoint = Endpoint::from_shared(format!("http://{}", node.address())).unwrap();
    let narrow = endpoint.initial_stream_window_size(65_535).connect().await.unwrap();
    let mut data = DataClient::new(narrow);
    let tail = v1::ReadLogRequest { log: "events".to_owned(), from: Some(0), ..Default::default() };
    let unread = data.tail_log(tail).await.unwrap();
    counted(&node, "slow_readers").await;
    drop(unread);
    // The node still serves, this connection too.
    let read = v1::ReadLogRequest { log: "events".to_owned(), from: Some(23), ..Default::default() };
    assert_eq!(data.read_log(read).await.unwrap().into_inner().records.len(), 1);
    node.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_too_large_is_refused_on_either_side() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(config(&dir)).await.unwrap();
    let channel =
        Endpoint::from_shared(format!("http://{}", node.address())).unwrap().connect().await.unwrap();
    let put = |bytes: usize| {
        let put = v1::WritePut { key: "k".into(), value: vec![0; bytes].into() };
        let ops = vec![v1::WriteOp { op: Some(v1::write_op::Op::Put(put)) }];
        v1::WriteRequest { predicate: "p".to_owned(), ops, ..Default::default() }
    };
    // The client of this test has no limit of its own on what it sends.
    let mut data = DataClient::new(channel.clone());
    let refused = data.write(put(MESSAGE_LIMIT_BYTES)).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused}");
    let mut admin = crate::api::admin_client::AdminClient::new(channel);
    let long = v1::MoveStartRequest { reason: "x".repeat(ADMIN_REQUEST_BYTES), ..Default::default() };
    assert_eq!(admin.move_start(long).await.unwrap_err().code(), Code::OutOfRange);
    // Within the limit of messages, and over that of values.
    let reply = data.write(put(2 << 20)).await.unwrap().into_inner();
    assert!(reply.refusal.is_some(), "{reply:?}");
    data.write(put(1_000)).await.unwrap();
    node.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_that_are_too_large_end_the_call() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(config(&dir)).await.unwrap();
    let mut stream = TcpStream::connect(node.address()).await.unwrap();
    let head = format!("GET /healthz HTTP/1.1\r\nhost: localhost\r\nx: {}\r\n", "y".repeat(2 << 20));
    let (mut read, mut write) = stream.split();
    let mut answer = Vec::new();
    // The node may hang up before all of it is sent.
    let sent = tokio::io::AsyncWriteExt::write_all(&mut write, head.as_bytes());
    let (_, got) = timeout(LIMIT, async { tokio::join!(sent, read.read_to_end(&mut answer)) }).await.unwrap();
    if got.is_ok() && !answer.is_empty() {
        assert!(String::from_utf8_lossy(&answer).starts_with("HTTP/1.1 431"), "{answer:?}");
    }
    Client::connect([node.address()]).await.unwrap();
    node.shutdown().await.unwrap();
}
