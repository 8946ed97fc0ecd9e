//! Cluster versions: what is written at each, who is refused, and that nobody goes on with what it does not know.

#[path = "support/meta.rs"]
#[allow(dead_code, reason = "shared by several tests")]
mod support;

use std::sync::Arc;

use pontoon_proto::{GroupId, v1};
use pontoon_raftstore::{Command, Machines};
use pontoon_shard::{
    MapCommand, ShardMachines, Versions,
    engine::{MemoryDisk, MemoryEngine},
    meta_command,
};
use prost::Message;
use support::{Meta, descriptor, mark, register};
use v1::{MetaRefusal, meta_command::Body as Ask};

const BOTH: Versions = Versions { oldest: 1, newest: 2 };

fn said(node: u64, newest_version: u32) -> v1::NodeSpeaks {
    v1::NodeSpeaks { node, oldest_version: 1, newest_version, ..Default::default() }
}

fn finalise(version: u32, nodes: impl IntoIterator<Item = v1::NodeSpeaks>) -> Ask {
    Ask::FinaliseVersion(v1::FinaliseVersion { version, nodes: nodes.into_iter().collect() })
}

fn refusal<T: std::fmt::Debug>(answer: Result<T, Box<v1::MetaRefused>>) -> (MetaRefusal, String) {
    let refused = answer.unwrap_err();
    (refused.reason(), refused.text)
}

fn announce(node: u64, newest_version: u32) -> Ask {
    Ask::SetNodeAddress(v1::SetNodeAddress {
        node,
        address: register(node).address,
        boot_token: 7,
        boot_history: vec![7],
        oldest_version: newest_version.min(1),
        newest_version,
        ..Default::default()
    })
}

#[test]
fn a_version_is_finalised_when_every_member_speaks_it_under_its_present_boot() {
    let mut meta = Meta::with_nodes(3);
    assert_eq!(meta.state().cluster_version, 1);
    let (why, text) = refusal(meta.ask(finalise(2, [said(1, 2), said(2, 2)])));
    assert_eq!(why, MetaRefusal::Changed);
    assert!(text.contains("n3 has not said"), "{text}");
    let (why, text) = refusal(meta.ask(finalise(2, [said(1, 2), said(2, 1), said(3, 2)])));
    assert_eq!(why, MetaRefusal::WrongVersion);
    assert!(text.contains("n2 speaks 1, not 2"), "{text}");
    // Started again since it said so: perhaps by an older binary.
    meta.ask(announce(3, 2)).unwrap();
    let all = || [said(1, 2), said(2, 2), said(3, 2)];
    assert_eq!(refusal(meta.ask(finalise(2, all()))).0, MetaRefusal::Changed);
    let again = v1::NodeSpeaks { boot_token: 7, ..said(3, 2) };
    let all = || [said(1, 2), said(2, 2), again];
    assert_eq!(meta.state().cluster_version, 1);
    meta.ask(finalise(2, all())).unwrap();
    meta.ask(finalise(2, [])).expect("a repeat changes nothing");
    assert_eq!(meta.state().cluster_version, 2);
    assert!(meta.state().nodes.values().all(|node| node.newest_version == 2));
    assert_eq!(refusal(meta.ask(finalise(1, all()))).0, MetaRefusal::Invalid);
}

#[test]
fn a_node_that_is_removed_need_not_speak() {
    let mut meta = Meta::with_nodes(2);
    let removed = v1::NodeState::Removed.into();
    meta.ask(Ask::SetNodeState(v1::SetNodeState { node: 2, state: removed, force: true, seen: None }))
        .unwrap();
    meta.ask(finalise(2, [said(1, 2)])).unwrap();
}

#[test]
fn who_does_not_speak_the_clusters_version_is_not_taken_in() {
    let mut meta = Meta::with_nodes(2);
    // Below version 2 nobody is asked, and nothing is kept.
    meta.ask(announce(2, 1)).unwrap();
    assert_eq!(meta.state().nodes[&2].newest_version, 0);
    let again = v1::NodeSpeaks { boot_token: 7, ..said(2, 2) };
    meta.ask(finalise(2, [said(1, 2), again])).unwrap();

    for newest in [0, 1] {
        let (why, text) = refusal(meta.ask(announce(2, newest)));
        assert_eq!(why, MetaRefusal::WrongVersion);
        assert!(text.contains("n2 is refused: the cluster is at version 2"), "{text}");
        let stranger = v1::RegisterNode { oldest_version: 1, newest_version: newest, ..register(3) };
        assert_eq!(refusal(meta.ask(Ask::RegisterNode(stranger))).0, MetaRefusal::WrongVersion);
    }
    meta.ask(announce(2, 2)).unwrap();
    let later = v1::RegisterNode { oldest_version: 2, newest_version: 3, ..register(3) };
    meta.ask(Ask::RegisterNode(later)).unwrap();
    assert_eq!(meta.state().nodes[&3].newest_version, 3);
}

/// The rows as an engine keeps them, by way of the copy that travels.
fn rows(meta: &Meta) -> Vec<u8> {
    let mut rows = Vec::new();
    let mut keep = |key: &[u8], value: &[u8]| {
        rows.extend([key, value].concat());
        true
    };
    meta.machine.checkpoint().unwrap().rows(&[], &mut keep).unwrap();
    rows
}

#[test]
fn below_its_version_a_feature_leaves_no_trace_in_the_rows() {
    let (mut newer, mut older) = (Meta::with_nodes(2), Meta::with_nodes(2));
    newer.ask(announce(2, 2)).unwrap();
    // What a binary writes that knows of no versions.
    older.ask(announce(2, 0)).unwrap();
    assert_eq!(rows(&newer), rows(&older));
}

#[test]
fn a_binary_that_does_not_speak_a_version_stops_where_it_begins() {
    let engine = || Arc::new(MemoryEngine::open(&MemoryDisk::new()));
    let older = Versions { oldest: 1, newest: 1 };
    for (versions, goes_on) in [(BOTH, true), (older, false)] {
        let machines = ShardMachines::speaking(engine(), versions).unwrap();
        let mut machine = machines.open(GroupId::META, &descriptor(1, v1::ShardKind::Meta)).unwrap();
        let begin =
            v1::BootstrapCluster { cluster: vec![7; 16].into(), node: Some(register(1)), meta_replicas: 3 };
        let commands = [Ask::Bootstrap(begin), finalise(2, [said(1, 2)])];
        let applied: Vec<bool> = (1..)
            .zip(commands)
            .map(|(index, body)| {
                let payload = meta_command(index, body);
                machine.apply(&Command { index, term: 1, timestamp: index, payload }).is_ok()
            })
            .collect();
        assert_eq!(applied, [true, goes_on], "{versions}");
    }
}

#[test]
fn a_directory_of_a_later_version_is_not_opened_by_an_older_binary() {
    let disk = MemoryDisk::new();
    let mut meta = Meta::open(Arc::new(MemoryEngine::open(&disk)));
    let begin =
        v1::BootstrapCluster { cluster: vec![7; 16].into(), node: Some(register(1)), meta_replicas: 3 };
    meta.ask(Ask::Bootstrap(begin)).unwrap();
    meta.ask(finalise(2, [said(1, 2)])).unwrap();
    meta.machines.close().unwrap();
    let opened = |newest| {
        let engine = Arc::new(MemoryEngine::open(&disk));
        let machines = ShardMachines::speaking(engine, Versions { oldest: 1, newest }).unwrap();
        machines.open(GroupId::META, &descriptor(1, v1::ShardKind::Meta)).map(drop)
    };
    let error = opened(1).unwrap_err().to_string();
    assert!(error.contains("the cluster has format 2"), "{error}");
    opened(2).unwrap();
}

#[test]
fn a_field_of_a_later_version_stops_the_replica_instead_of_being_lost() {
    // Field 9999, a varint.
    let later = [0xf8, 0xf0, 0x04, 1];
    let mut meta = Meta::with_nodes(1);
    let payload = [&meta_command(1, Ask::PruneMoves(v1::PruneMoves { keep: 1 }))[..], &later].concat();
    let command = Command { index: 50, term: 1, timestamp: 50, payload: payload.into() };
    let error = meta.machine.apply(&command).unwrap_err().to_string();
    assert!(error.contains("later version"), "{error}");

    let machines = ShardMachines::new(Arc::new(MemoryEngine::open(&MemoryDisk::new()))).unwrap();
    let shard = v1::Shard { group: 2, ..Default::default() };
    let mut machine = machines.open(GroupId(2), &shard.encode_to_vec()).unwrap();
    let payload = MapCommand::new().put("k", "v").encode().unwrap();
    machine.apply(&Command { index: 1, term: 1, timestamp: 1, payload: payload.clone() }).unwrap();
    machine.commit(Vec::new(), &mark(1)).unwrap();
    let payload = [&payload[..], &later].concat().into();
    let error = machine.apply(&Command { index: 2, term: 1, timestamp: 2, payload }).unwrap_err().to_string();
    assert!(error.contains("later version"), "{error}");
}
