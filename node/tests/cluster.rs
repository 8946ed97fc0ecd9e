//! Whole nodes in one process, over loopback sockets and real directories.

use std::{path::Path, time::Duration};

use pontoon_node::{
    Node, NodeConfig,
    api::{admin_client::AdminClient, data_client::DataClient},
    client::{ClientError, Range, Reads},
};
use pontoon_proto::v1;
use pontoon_shard::Versions;
use tonic::transport::Channel;

fn config(dir: &Path) -> NodeConfig {
    pontoon_node::init_logs(pontoon_node::LogFormat::Text, "error");
    let mut config = NodeConfig::new(dir, "127.0.0.1:0");
    config.segment_bytes = Some(4 << 20);
    config.durable = false;
    config.raft.tick = Duration::from_millis(30);
    config
}

async fn admin(node: &Node) -> AdminClient<Channel> {
    AdminClient::connect(format!("http://{}", node.address())).await.unwrap()
}

async fn data(node: &Node) -> DataClient<Channel> {
    DataClient::connect(format!("http://{}", node.address())).await.unwrap()
}

/// Listens to the map until it is as wanted.
async fn map_until(node: &Node, wanted: impl Fn(&v1::ClusterMap) -> bool) -> v1::ClusterMap {
    let mut maps = admin(node).await.meta_map(v1::MetaMapRequest::default()).await.unwrap().into_inner();
    loop {
        let map = maps.message().await.unwrap().expect("the stream lasts as long as the node");
        if wanted(&map) {
            return map;
        }
    }
}

fn shard<'a>(map: &'a v1::ClusterMap, predicate: &str) -> Option<&'a v1::Shard> {
    map.shards.iter().find(|shard| shard.predicate == predicate)
}

fn voters(map: &v1::ClusterMap, predicate: &str) -> usize {
    shard(map, predicate).map_or(0, |shard| shard.voters.len())
}

fn put(predicate: &str, key: &str, value: &str) -> v1::WriteRequest {
    let put = v1::WritePut { key: key.to_owned().into(), value: value.to_owned().into() };
    let op = v1::WriteOp { op: Some(v1::write_op::Op::Put(put)) };
    v1::WriteRequest { predicate: predicate.to_owned(), ops: vec![op], ..Default::default() }
}

async fn write(client: &mut DataClient<Channel>, request: v1::WriteRequest) -> v1::WriteReply {
    let reply = client.write(request).await.unwrap().into_inner();
    assert_eq!(reply.refusal, None);
    reply
}

async fn get(client: &mut DataClient<Channel>, predicate: &str, key: &str) -> Option<String> {
    let request =
        v1::GetRequest { predicate: predicate.to_owned(), key: key.to_owned().into(), ..Default::default() };
    let reply = client.get(request).await.unwrap().into_inner();
    assert_eq!(reply.refusal, None);
    reply.found.then(|| String::from_utf8(reply.value.to_vec()).unwrap())
}

async fn scan_all(client: &mut DataClient<Channel>, predicate: &str, limit: u32) -> Vec<String> {
    let mut keys = Vec::new();
    let mut request = v1::ScanRequest { predicate: predicate.to_owned(), limit, ..Default::default() };
    loop {
        let page = client.scan(request.clone()).await.unwrap().into_inner();
        assert_eq!(page.refusal, None);
        assert!(page.rows.len() <= limit as usize);
        keys.extend(page.rows.iter().map(|row| String::from_utf8(row.key.to_vec()).unwrap()));
        if page.continuation.is_empty() {
            return keys;
        }
        request.continuation = page.continuation;
    }
}

async fn three(scratch: &Path) -> Vec<Node> {
    let first = Node::start(config(&scratch.join("1"))).await.unwrap();
    let second = Node::start(config(&scratch.join("2")).joining(first.address())).await.unwrap();
    let third = Node::start(config(&scratch.join("3")).joining(second.address())).await.unwrap();
    vec![first, second, third]
}

async fn stop(nodes: Vec<Node>) {
    for node in nodes {
        node.shutdown().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_start_together_begin_at_the_newest_version() {
    let scratch = tempfile::tempdir().unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("127.0.0.1:{port}");
    let mut founder = config(&scratch.path().join("first"));
    founder.listen.clone_from(&address);
    let joins = |name: &str| config(&scratch.path().join(name)).joining(&address);
    // Those that join ask from before there is anybody until the founder takes them in.
    let (one, two, three) =
        tokio::join!(Node::start(founder), Node::start(joins("second")), Node::start(joins("third")));
    let nodes = [one, two, three].map(|node| node.unwrap());
    for node in &nodes {
        map_until(node, |map| map.nodes.len() == 3 && map.cluster_version == Versions::OURS.newest).await;
    }
    stop(nodes.into()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lone_node_serves_and_comes_back_with_what_it_had() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("1");
    let node = Node::start(config(&dir)).await.unwrap();
    let (id, cluster) = (node.id(), node.cluster());
    let mut client = data(&node).await;
    for at in 0..20 {
        write(&mut client, put("name", &format!("k{at:02}"), &format!("v{at}"))).await;
    }
    assert_eq!(get(&mut client, "name", "k07").await.as_deref(), Some("v7"));
    drop(client);
    node.shutdown().await.unwrap();

    let node = Node::start(config(&dir)).await.unwrap();
    assert_eq!((node.id(), node.cluster()), (id, cluster));
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&dir).unwrap().permissions());
    assert_eq!(mode & 0o077, 0, "rows lie there in the clear");
    let mut client = data(&node).await;
    assert_eq!(scan_all(&mut client, "name", 7).await.len(), 20);
    assert_eq!(get(&mut client, "name", "k19").await.as_deref(), Some("v19"));
    drop(client);
    node.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_serve_from_any_of_them_and_move_a_predicate_to_a_fourth() {
    let scratch = tempfile::tempdir().unwrap();
    let mut nodes = three(scratch.path()).await;
    map_until(&nodes[2], |map| voters(map, "@meta") == 3).await;

    // Any node takes the first write of a predicate and passes it on.
    let mut clients = Vec::new();
    for node in &nodes {
        clients.push(data(node).await);
    }
    for at in 0..90 {
        write(&mut clients[at % 3], put("name", &format!("k{at:02}"), &format!("v{at}"))).await;
    }
    map_until(&nodes[1], |map| voters(map, "name") == 3).await;
    for client in &mut clients {
        assert_eq!(get(client, "name", "k42").await.as_deref(), Some("v42"));
        assert_eq!(scan_all(client, "name", 25).await.len(), 90);
    }

    let fourth = Node::start(config(&scratch.path().join("4")).joining(nodes[2].address())).await.unwrap();
    let mut operator = admin(&nodes[1]).await;
    let start = v1::MoveStartRequest {
        predicate: "name".to_owned(),
        from_node: nodes[0].id().get(),
        to_node: fourth.id().get(),
        ..Default::default()
    };
    let started = operator.move_start(start).await.unwrap().into_inner();
    let id = started.r#move.unwrap().id;
    let mut views = operator.move_watch(v1::MoveWatchRequest { id, hops: 0 }).await.unwrap().into_inner();
    let mut at = 90;
    let mut last = None;
    while let Some(view) = views.message().await.unwrap() {
        write(&mut clients[at % 3], put("name", &format!("k{at:02}"), &format!("v{at}"))).await;
        at += 1;
        last = view.r#move;
    }
    assert_eq!(last.unwrap().phase(), v1::MovePhase::Done);
    let map = map_until(&nodes[0], |map| map.moves.is_empty()).await;
    let members = shard(&map, "name").unwrap().voters.iter().map(|replica| replica >> 32).collect::<Vec<_>>();
    assert!(members.contains(&fourth.id().get()) && !members.contains(&nodes[0].id().get()), "{members:?}");

    nodes.push(fourth);
    for node in &nodes {
        let mut client = data(node).await;
        assert_eq!(scan_all(&mut client, "name", 1000).await.len(), at);
    }
    drop((clients, operator, views));
    stop(nodes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_starts_again_needs_only_its_directory() {
    let scratch = tempfile::tempdir().unwrap();
    let mut nodes = three(scratch.path()).await;
    map_until(&nodes[0], |map| voters(map, "@meta") == 3).await;
    let mut client = data(&nodes[0]).await;
    write(&mut client, put("name", "a", "1")).await;
    map_until(&nodes[0], |map| voters(map, "name") == 3).await;

    // Two of three go on without the third.
    let third = nodes.pop().unwrap();
    let id = third.id();
    third.shutdown().await.unwrap();
    write(&mut client, put("name", "b", "2")).await;

    let third = Node::start(config(&scratch.path().join("3"))).await.unwrap();
    assert_eq!(third.id(), id);
    let mut again = data(&third).await;
    assert_eq!(get(&mut again, "name", "b").await.as_deref(), Some("2"));
    write(&mut again, put("name", "c", "3")).await;
    assert_eq!(scan_all(&mut client, "name", 10).await, ["a", "b", "c"]);
    // It listens elsewhere now, and the others learn of it.
    let address = third.address().to_owned();
    map_until(&nodes[0], |map| map.nodes.iter().any(|node| node.id == id.get() && node.address == address))
        .await;
    drop((client, again));
    nodes.push(third);
    stop(nodes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_directory_at_a_live_nodes_address_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let first = Node::start(config(&scratch.path().join("1"))).await.unwrap();
    let second = Node::start(config(&scratch.path().join("2")).joining(first.address())).await.unwrap();
    let address = second.address().to_owned();
    second.shutdown().await.unwrap();

    let mut intruder = config(&scratch.path().join("other")).joining(first.address());
    intruder.listen = address;
    let error = Node::start(intruder).await.unwrap_err().to_string();
    assert!(error.contains("decommission") && error.contains("--replace"), "{error}");
    first.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_at_the_start_name_the_thing() {
    let scratch = tempfile::tempdir().unwrap();
    let node = Node::start(config(&scratch.path().join("1"))).await.unwrap();

    let mut same_port = config(&scratch.path().join("2"));
    same_port.listen = node.address().to_owned();
    let error = Node::start(same_port).await.unwrap_err().to_string();
    assert!(error.contains(node.address()) && error.contains("in use"), "{error}");

    let error = Node::start(config(&scratch.path().join("1"))).await.unwrap_err().to_string();
    assert!(error.contains("1") && error.contains("use"), "{error}");

    // A port that was bound and let go: nobody is there.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let error =
        Node::start(config(&scratch.path().join("3")).joining(&nobody)).await.unwrap_err().to_string();
    assert!(error.contains(&nobody) && error.contains("--join"), "{error}");
    node.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_permanent_learner_answers_old_reads_alone_and_votes_on_nothing() {
    let scratch = tempfile::tempdir().unwrap();
    let first = Node::start(config(&scratch.path().join("1"))).await.unwrap();
    let writer = first.client().await.unwrap();
    writer.create_map("name", 1).await.unwrap();
    let log = writer.create_log("events", 1).await.unwrap();
    writer.put("name", "a", "1").await.unwrap();
    log.append(["one"]).await.unwrap();

    let reader = Node::start(config(&scratch.path().join("2")).joining(first.address())).await.unwrap();
    for predicate in ["name", "events"] {
        writer.join_as_learner(predicate, reader.id()).await.unwrap();
        let servers = writer.servers(predicate).await.unwrap();
        let roles: Vec<_> = servers.iter().map(|server| (server.node, server.votes, server.leads)).collect();
        assert_eq!(roles, [(first.id(), true, true), (reader.id(), false, false)]);
    }
    // Twice is once, and the cluster does not take it for a voter that is missing.
    writer.join("name", reader.id()).await.unwrap();
    assert_eq!(voters(&map_until(&reader, |map| map.moves.is_empty()).await, "name"), 1);

    let client = reader.client().await.unwrap();
    let fresh = client.with_reads(Reads::Bounded(Duration::ZERO));
    for round in 2..12 {
        writer.put("name", "a", round.to_string()).await.unwrap();
        assert_eq!(fresh.get("name", "a").await.unwrap().unwrap().value, round.to_string());
        let next = log.append([round.to_string()]).await.unwrap().next;
        assert_eq!(fresh.log("events").bounds().await.unwrap().next, next);
    }
    // Asked at once, at whichever node: a map that has not heard of a predicate yet is no answer.
    for round in 0..4 {
        let name = format!("new{round}");
        client.create_map(name.as_str(), 1).await.unwrap();
        assert_eq!(client.servers(&name).await.unwrap().len(), 1);
    }
    let unknown = client.servers("nobody's").await;
    assert!(matches!(unknown, Err(ClientError::NoSuchPredicate { .. })), "{unknown:?}");
    first.shutdown().await.unwrap();

    // The only voter is gone: what is there is still read, by who asks for no more.
    let local = client.with_reads(Reads::Local).with_deadline(Duration::from_secs(2));
    assert_eq!(local.get("name", "a").await.unwrap().unwrap().value, "11");
    assert_eq!(local.scan("name", &Range::default()).await.unwrap().rows.len(), 1);
    assert_eq!(local.log("events").read(0, None, 0).await.unwrap().records.len(), 11);
    // Beyond what it has there may be more elsewhere: no mistake of the reader's.
    assert!(local.log("events").read(50, None, 0).await.unwrap().records.is_empty());
    let latest = local.with_reads(Reads::Linearizable).get("name", "a").await;
    assert!(matches!(latest, Err(ClientError::Late { .. })), "{latest:?}");

    let first = Node::start(config(&scratch.path().join("1"))).await.unwrap();
    let writer = first.client().await.unwrap();
    assert_eq!(writer.wait_for_leader("name").await.unwrap().node, first.id());
    let mut known: Vec<_> = first.servers().into_iter().map(|(node, _)| node).collect();
    known.sort_unstable();
    assert_eq!(known, [first.id(), reader.id()]);
    for predicate in ["name", "events"] {
        writer.leave(predicate, reader.id()).await.unwrap();
        assert!(writer.leave(predicate, first.id()).await.is_err(), "the last voter stays");
        assert_eq!(writer.servers(predicate).await.unwrap().len(), 1);
    }
    assert!(reader.group("name").is_none());
    stop(vec![reader, first]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_travel_together_are_answered_each_for_itself() {
    let scratch = tempfile::tempdir().unwrap();
    let nodes = three(scratch.path()).await;
    let client = nodes[0].client().await.unwrap();
    let names = ["a", "b", "c"];
    for name in names {
        client.put(name, "k", "v").await.unwrap();
    }
    let calls = (0..600usize).map(|at| {
        let (client, name) = (client.clone(), names[at % 3]);
        tokio::spawn(async move {
            match at % 5 {
                // Refused, in the midst of the others.
                0 => {
                    let refused = client.get("nobody made this", "k").await;
                    assert!(matches!(refused, Err(ClientError::NoSuchPredicate { .. })), "{refused:?}");
                }
                1 => {
                    let large = client.put(name, "k", vec![0; (1 << 20) + 1]).await;
                    assert!(matches!(large, Err(ClientError::TooLarge { .. })), "{large:?}");
                }
                // Abandoned, answered to nobody.
                2 => {
                    let put = client.put(name, format!("left {at}"), "v");
                    drop(tokio::time::timeout(Duration::ZERO, put).await);
                }
                _ => {
                    let (key, value) = (format!("k{at}"), format!("v{at}"));
                    client.put(name, key.clone(), value.clone()).await.unwrap();
                    assert_eq!(client.get(name, key).await.unwrap().unwrap().value, value);
                }
            }
        })
    });
    for call in calls.collect::<Vec<_>>() {
        call.await.unwrap();
    }
    stop(nodes).await;
}
