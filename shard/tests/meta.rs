//! The meta group: each command, what it refuses, and the state on its way through rows, snapshots and restarts.

#[path = "support/meta.rs"]
#[allow(dead_code, reason = "shared by several tests")]
mod support;

use std::{collections::BTreeSet, sync::Arc};

use bytes::Bytes;
use pontoon_proto::v1::{
    self, MetaRefusal, MoveKind, MovePhase, meta_command::Body as Ask, meta_reply::Body as Answer,
};
use pontoon_raftstore::Command;
use pontoon_shard::{
    MAX_EVENTS, META_PREDICATE,
    engine::{MemoryDisk, MemoryEngine},
    legal,
    planner::{self, Seen},
};
use proptest::prelude::*;
use prost::Message;
use support::{Meta, register, replica};

fn refusal(answer: Result<impl std::fmt::Debug, Box<v1::MetaRefused>>) -> MetaRefusal {
    let refused = answer.expect_err("it is refused");
    assert!(!refused.text.is_empty());
    refused.reason()
}

fn node(answer: Result<Answer, Box<v1::MetaRefused>>) -> v1::Node {
    match answer {
        Ok(Answer::Node(node)) => node,
        other => panic!("a node, not {other:?}"),
    }
}

fn create(predicate: &str, nodes: &[u64]) -> Ask {
    let kind = v1::ShardKind::Map.into();
    Ask::CreateShard(v1::CreateShard {
        predicate: predicate.into(),
        kind,
        replicas_wanted: 3,
        nodes: nodes.to_vec(),
    })
}

fn replace(shard: &v1::Shard, source: usize, target_node: u64) -> v1::StartMove {
    let (group, source) = (shard.group, shard.voters[source]);
    v1::StartMove { group, kind: MoveKind::Replace.into(), source, target_node, ..Default::default() }
}

#[test]
fn a_cluster_begins_with_its_first_node_and_itself_as_group_1() {
    let mut meta = Meta::empty();
    assert_eq!(refusal(meta.ask(Ask::RegisterNode(register(1)))), MetaRefusal::NotBootstrapped);
    let begin =
        v1::BootstrapCluster { cluster: vec![7; 16].into(), node: Some(register(1)), meta_replicas: 3 };
    assert_eq!(node(meta.ask(Ask::Bootstrap(begin.clone()))).id, 1);
    assert_eq!(refusal(meta.ask(Ask::Bootstrap(begin))), MetaRefusal::Bootstrapped);
    let state = meta.state();
    let shard = state.shard(META_PREDICATE).unwrap();
    assert_eq!((shard.group, shard.kind(), shard.state()), (1, v1::ShardKind::Meta, v1::ShardState::Live));
    assert_eq!(shard.voters, [replica(1, 1)]);
    assert_eq!(state.cluster.unwrap().as_bytes(), &[7; 16]);
}

#[test]
fn a_node_that_asks_again_is_the_same_node_and_an_address_has_one_holder() {
    let mut meta = Meta::with_nodes(2);
    assert_eq!(node(meta.ask(Ask::RegisterNode(register(2)))).id, 2);
    let stranger = v1::RegisterNode { nonce: vec![9; 16].into(), ..register(2) };
    let refused = meta.ask(Ask::RegisterNode(stranger.clone())).unwrap_err();
    assert_eq!(refused.reason(), MetaRefusal::AddressHeld);
    assert!(refused.text.contains("pontoon decommission n2") && refused.text.contains("--replace n2"));
    let replacing = v1::RegisterNode { replace: 2, ..stranger };
    assert_eq!(node(meta.ask(Ask::RegisterNode(replacing.clone()))).id, 3);
    assert_eq!(node(meta.ask(Ask::RegisterNode(replacing))).id, 3, "the same answer again");
    assert_eq!(meta.state().nodes[&2].state(), v1::NodeState::Removed);
    let nameless = v1::RegisterNode { nonce: Bytes::new(), ..register(4) };
    assert_eq!(refusal(meta.ask(Ask::RegisterNode(nameless))), MetaRefusal::Invalid);
    let late = v1::RegisterNode { replace: 2, ..register(5) };
    assert_eq!(refusal(meta.ask(Ask::RegisterNode(late))), MetaRefusal::Invalid);
}

#[test]
fn a_node_gets_the_id_that_it_wants_if_nobody_can_have_had_it() {
    let mut meta = Meta::with_nodes(3);
    let wants = |id, node| Ask::RegisterNode(v1::RegisterNode { wanted: id, ..register(node) });
    for taken in [1, 2, 3] {
        let refused = meta.ask(wants(taken, 6)).unwrap_err();
        assert!(
            refused.text.contains("never given again") && refused.text.contains("--id 4"),
            "{}",
            refused.text
        );
    }
    assert_eq!(refusal(meta.ask(wants(1_000_000, 6))), MetaRefusal::Invalid);
    assert_eq!(node(meta.ask(wants(7, 6))).id, 7);
    assert_eq!(node(meta.ask(wants(7, 6))).id, 7, "the same answer again");
    assert_eq!(node(meta.ask(wants(5, 8))).id, 5, "below the highest, and free");
    assert_eq!(node(meta.ask(Ask::RegisterNode(register(9)))).id, 8, "the next one is above all of them");

    // Ids that the lost entries of a recovered meta group may have given out are nobody's any more.
    let step = v1::RecoveryStep { group: 1, from: replica(1, 1), to: replica(1, 50), ..Default::default() };
    let plan = v1::RecoveryPlan { lost: vec![2], steps: vec![step], ..Default::default() };
    meta.ask(Ask::RecoverCluster(v1::RecoverCluster { plan: Some(plan) })).unwrap();
    let next = meta.state().next_node;
    for passed_over in [6, 9, next - 1] {
        assert_eq!(refusal(meta.ask(wants(passed_over, 10))), MetaRefusal::Invalid, "{passed_over}");
    }
    assert_eq!(node(meta.ask(wants(next, 10))).id, next);
}

#[test]
fn nodes_change_address_and_state() {
    let mut meta = Meta::with_nodes(3);
    meta.shard("name", 1, &[2]);
    let address = |node, address: &str| {
        Ask::SetNodeAddress(v1::SetNodeAddress {
            node,
            address: address.into(),
            boot_token: 5,
            boot_history: vec![5],
            ..Default::default()
        })
    };
    assert_eq!(node(meta.ask(address(2, "127.0.0.1:9000"))).boot_token, 5);
    assert_eq!(refusal(meta.ask(address(3, "127.0.0.1:9000"))), MetaRefusal::AddressHeld);
    assert_eq!(refusal(meta.ask(address(8, "x"))), MetaRefusal::NoSuchNode);
    let state = |node, state: v1::NodeState, force| {
        Ask::SetNodeState(v1::SetNodeState { node, state: state.into(), force, seen: None })
    };
    assert_eq!(node(meta.ask(state(2, v1::NodeState::Draining, false))).state(), v1::NodeState::Draining);
    assert_eq!(refusal(meta.ask(create("other", &[2]))), MetaRefusal::Invalid);
    assert_eq!(refusal(meta.ask(state(2, v1::NodeState::Removed, false))), MetaRefusal::NotEmpty);
    assert_eq!(node(meta.ask(state(2, v1::NodeState::Removed, true))).state(), v1::NodeState::Removed);
    assert_eq!(refusal(meta.ask(state(2, v1::NodeState::Live, false))), MetaRefusal::Invalid);
    let removed = meta.ask(address(2, "127.0.0.1:9001")).unwrap_err();
    assert!(removed.text.contains("n2 is removed for ever"), "{}", removed.text);
    let labelled = Ask::SetNodeAddress(v1::SetNodeAddress {
        node: 3,
        address: "127.0.0.1:7003".into(),
        boot_token: 5,
        boot_history: vec![5],
        labels: [("zone".to_owned(), "b".to_owned())].into(),
        capacity_bytes: 9,
        ..Default::default()
    });
    let told = node(meta.ask(labelled));
    assert_eq!((told.labels["zone"].as_str(), told.capacity_bytes), ("b", 9));
    let kept = node(meta.ask(address(3, "127.0.0.1:7003")));
    assert_eq!(
        (kept.labels["zone"].as_str(), kept.capacity_bytes),
        ("b", 9),
        "nothing said is nothing changed"
    );
    // The address is free again.
    node(meta.ask(address(3, "127.0.0.1:9000")));
}

#[test]
fn a_node_is_accepted_by_its_boots_and_an_other_disk_is_told_so() {
    let mut meta = Meta::with_nodes(2);
    let boots = |history: &[u64]| {
        Ask::SetNodeAddress(v1::SetNodeAddress {
            node: 2,
            address: "127.0.0.1:7002".into(),
            boot_token: *history.last().unwrap(),
            boot_history: history.to_vec(),
            ..Default::default()
        })
    };
    assert_eq!(node(meta.ask(boots(&[5]))).boot_token, 5);
    assert_eq!(node(meta.ask(boots(&[5]))).boot_token, 5, "a repeat is harmless");
    // Boots that were not heard of lie between.
    assert_eq!(node(meta.ask(boots(&[5, 6, 7, 8]))).boot_token, 8);
    // An empty disk, an image from before the last boot, a word of an earlier boot that comes late.
    for other in [&[9][..], &[5, 6, 10], &[5, 6, 7]] {
        let refused = meta.ask(boots(other)).unwrap_err();
        assert_eq!(refused.reason(), MetaRefusal::OtherDisk);
        assert!(refused.text.contains("pontoon decommission n2"), "{}", refused.text);
        assert!(refused.text.contains("--replace n2"), "{}", refused.text);
        assert_eq!(meta.state().nodes[&2].boot_token, 8);
    }
    let silent = v1::SetNodeAddress {
        node: 2,
        address: "127.0.0.1:7002".into(),
        boot_token: 9,
        boot_history: Vec::new(),
        ..Default::default()
    };
    assert_eq!(refusal(meta.ask(Ask::SetNodeAddress(silent))), MetaRefusal::Invalid);
}

#[test]
fn predicates_are_created_once_and_dropped_in_steps() {
    let mut meta = Meta::with_nodes(3);
    let Ok(Answer::Shard(shard)) = meta.ask(create("name", &[3, 1])) else { panic!("a shard") };
    assert_eq!((shard.group, shard.state(), shard.epoch), (2, v1::ShardState::Creating, 1));
    assert_eq!(shard.initial, [replica(3, 1), replica(1, 2)]);
    let Ok(Answer::Shard(again)) = meta.ask(create("name", &[2])) else { panic!("a shard") };
    assert_eq!(again, shard, "idempotent by name");
    let Ask::CreateShard(other) = create("name", &[1]) else { panic!("a creation") };
    let log = v1::CreateShard { kind: v1::ShardKind::Log.into(), ..other };
    assert_eq!(refusal(meta.ask(Ask::CreateShard(log))), MetaRefusal::Invalid, "of another kind");
    for (bad, nodes) in [("", &[1][..]), ("@x", &[1]), ("a\nb", &[1]), ("twice", &[1, 1]), ("nowhere", &[])] {
        assert_eq!(refusal(meta.ask(create(bad, nodes))), MetaRefusal::Invalid, "{bad:?}");
    }
    assert_eq!(refusal(meta.ask(create("far", &[9]))), MetaRefusal::NoSuchNode);
    assert_eq!(refusal(meta.start(replace(&shard, 0, 2))), MetaRefusal::Busy);
    meta.ask(Ask::ShardLive(v1::ShardLive { group: 2 })).unwrap();
    let drop = |name: &str| Ask::DropShard(v1::DropShard { predicate: name.into() });
    let gone = |group| Ask::ShardDropped(v1::ShardDropped { group });
    assert_eq!(refusal(meta.ask(drop("nothing"))), MetaRefusal::NoSuchShard);
    assert_eq!(refusal(meta.ask(drop(META_PREDICATE))), MetaRefusal::Invalid);
    assert_eq!(refusal(meta.ask(gone(2))), MetaRefusal::Invalid);
    let Ok(Answer::Shard(dropping)) = meta.ask(drop("name")) else { panic!("a shard") };
    assert_eq!((dropping.state(), dropping.epoch), (v1::ShardState::Dropping, 2));
    assert_eq!(refusal(meta.ask(create("name", &[1]))), MetaRefusal::Busy);
    meta.ask(gone(2)).unwrap();
    meta.ask(gone(2)).unwrap();
    assert_eq!(meta.shard("name", 3, &[1]).group, 3, "a group's id is never given out again");
}

#[test]
fn a_drain_is_refused_if_the_node_is_not_as_it_was_seen() {
    let mut meta = Meta::with_nodes(3);
    meta.ask(finalise()).unwrap();
    meta.shard("name", 1, &[2]);
    let seen = |state: v1::NodeState, replicas| Some(v1::SeenNode { state: state.into(), replicas });
    let mut drain = |seen| {
        let state = v1::NodeState::Draining.into();
        meta.ask(Ask::SetNodeState(v1::SetNodeState { node: 2, state, force: false, seen }))
    };
    assert_eq!(refusal(drain(seen(v1::NodeState::Live, 0))), MetaRefusal::Changed, "it has a replica by now");
    assert_eq!(refusal(drain(seen(v1::NodeState::Draining, 1))), MetaRefusal::Changed, "it was used again");
    assert_eq!(node(drain(seen(v1::NodeState::Live, 1))).state(), v1::NodeState::Draining);
    assert!(drain(seen(v1::NodeState::Live, 1)).is_ok(), "a repeat is done already");
}

/// Of nodes that speak version 2.
fn finalise() -> Ask {
    let said = (1..6).map(|node| v1::NodeSpeaks { node, newest_version: 2, ..Default::default() });
    Ask::FinaliseVersion(v1::FinaliseVersion { version: 2, nodes: said.collect() })
}

#[test]
fn a_predicate_takes_the_place_of_another_in_one_step_that_survives_a_restart() {
    let disk = MemoryDisk::new();
    let mut meta = Meta::open(Arc::new(MemoryEngine::open(&disk)));
    let first =
        v1::BootstrapCluster { cluster: vec![7; 16].into(), node: Some(register(1)), meta_replicas: 3 };
    meta.ask(Ask::Bootstrap(first)).unwrap();
    let (old, new) = (meta.shard("name", 1, &[1]), meta.shard("beside", 1, &[1]));
    let replace = |predicate: &str, old_group, new_group| {
        Ask::ReplaceShard(v1::ReplaceShard { predicate: predicate.into(), old_group, new_group })
    };
    let ask = || replace("name", old.group, new.group);
    assert_eq!(refusal(meta.ask(ask())), MetaRefusal::WrongVersion, "version 1 does not have it");
    meta.ask(finalise()).unwrap();
    let before = meta.state();
    assert_eq!(refusal(meta.ask(replace("beside", new.group, old.group))), MetaRefusal::Invalid);
    assert_eq!(refusal(meta.ask(replace("other", old.group, new.group))), MetaRefusal::Changed);
    assert_eq!(refusal(meta.ask(replace("name", 9, new.group))), MetaRefusal::NoSuchShard);
    assert_eq!(refusal(meta.ask(replace("name", 1, new.group))), MetaRefusal::Changed);
    let Ok(Answer::Shard(making)) = meta.ask(create("making", &[1])) else { panic!("a shard") };
    assert_eq!(refusal(meta.ask(replace("name", old.group, making.group))), MetaRefusal::Changed);
    assert_eq!(meta.state().shard("name"), before.shard("name"), "a refusal changes nothing");

    let Ok(Answer::Shard(named)) = meta.ask(ask()) else { panic!("a shard") };
    let whole = |meta: &Meta| {
        let state = meta.state();
        let (name, beside) = (state.shard("name").unwrap().clone(), state.shard("beside").unwrap().clone());
        assert_eq!((name.group, name.state()), (new.group, v1::ShardState::Live));
        assert_eq!(name.epoch, new.epoch, "its replicas serve on as they do");
        assert_eq!((beside.group, beside.state()), (old.group, v1::ShardState::Dropping));
    };
    whole(&meta);
    let Ok(Answer::Shard(again)) = meta.ask(ask()) else { panic!("a repeat is answered in the same way") };
    assert_eq!(again, named);
    let mut meta = Meta::open(Arc::new(MemoryEngine::open(&disk)));
    whole(&meta);
    meta.ask(Ask::ShardDropped(v1::ShardDropped { group: old.group })).unwrap();
    assert!(meta.state().shard("beside").is_none());
    assert_eq!(meta.state().shard("name").unwrap().group, new.group);
}

#[test]
fn members_never_go_back_to_what_was_heard_earlier() {
    let mut meta = Meta::with_nodes(3);
    let shard = meta.shard("name", 3, &[1]);
    let mv = meta
        .start(v1::StartMove { group: 2, kind: MoveKind::Add.into(), target_node: 2, ..Default::default() })
        .unwrap();
    let update = |voters: &[u64], learners: &[u64], members_index| {
        let (voters, learners) = (voters.to_vec(), learners.to_vec());
        Ask::UpdateMembers(v1::UpdateMembers { group: 2, voters, learners, members_index })
    };
    let first = shard.voters[0];
    meta.ask(update(&[first], &[mv.target], 10)).unwrap();
    let revision = meta.state().shards[&2].revision;
    meta.ask(update(&[first, mv.target], &[], 12)).unwrap();
    assert!(meta.state().shards[&2].revision > revision);
    meta.ask(update(&[first], &[mv.target], 11)).unwrap();
    assert_eq!(meta.state().shards[&2].voters, [first, mv.target]);
    assert_eq!(refusal(meta.ask(update(&[replica(3, 9)], &[], 20))), MetaRefusal::Invalid);
}

#[test]
fn moves_are_refused_where_they_make_no_sense() {
    let mut meta = Meta::with_nodes(4);
    let three = meta.shard("three", 3, &[1, 2, 3]);
    let one = meta.shard("one", 1, &[1]);
    let ask = |group, kind: MoveKind, source, target_node| v1::StartMove {
        group,
        kind: kind.into(),
        source,
        target_node,
        ..Default::default()
    };
    let first = three.voters[0];
    for (what, reason) in [
        (ask(99, MoveKind::Replace, first, 4), MetaRefusal::NoSuchShard),
        (ask(three.group, MoveKind::Replace, replica(4, 1), 4), MetaRefusal::Invalid),
        (ask(three.group, MoveKind::Replace, first, 2), MetaRefusal::Invalid),
        (ask(three.group, MoveKind::Add, 0, 9), MetaRefusal::NoSuchNode),
        (ask(one.group, MoveKind::Remove, one.voters[0], 0), MetaRefusal::Invalid),
    ] {
        assert_eq!(refusal(meta.start(what)), reason);
    }
    let ordinals = meta.state().shards[&three.group].next_ordinal;
    assert_eq!(ordinals, 4, "a refused move takes no ordinal");
    let mv = meta.start(ask(three.group, MoveKind::Replace, first, 4)).unwrap();
    assert_eq!((mv.target, mv.phase(), mv.phase_seq), (replica(4, 4), MovePhase::Planned, 1));
    let refused = meta.start(ask(three.group, MoveKind::Add, 0, 4)).unwrap_err();
    assert_eq!((refused.reason(), refused.r#move), (MetaRefusal::Busy, Some(mv)));
    let drop = Ask::DropShard(v1::DropShard { predicate: "three".into() });
    assert_eq!(refusal(meta.ask(drop)), MetaRefusal::Busy);
    assert_eq!(meta.state().replicas_on(4), 1, "the replica on its way counts");
}

#[test]
fn a_move_advances_by_compare_and_set_under_one_driver() {
    let mut meta = Meta::with_nodes(4);
    let shard = meta.shard("name", 3, &[1, 2, 3]);
    let planned = meta.start(replace(&shard, 0, 4)).unwrap();
    let reserved = meta.advance(&planned, MovePhase::Reserved, 5).unwrap();
    assert_eq!((reserved.phase_seq, reserved.driver_term), (2, 5));
    assert_eq!(refusal(meta.advance(&planned, MovePhase::Reserved, 5)), MetaRefusal::Changed);
    assert_eq!(refusal(meta.advance(&reserved, MovePhase::Learner, 4)), MetaRefusal::StaleDriver);
    assert_eq!(refusal(meta.advance(&reserved, MovePhase::Joint, 5)), MetaRefusal::IllegalPhase);
    let ask = v1::AdvanceMove {
        id: reserved.id,
        expect_phase_seq: 2,
        driver_term: 6,
        phase: MovePhase::Reserved.into(),
        blocked: "n4 is full".into(),
        bytes_total: 77,
        attempt: true,
        ..Default::default()
    };
    let Ok(Answer::Move(blocked)) = meta.ask(Ask::AdvanceMove(ask)) else { panic!("a move") };
    assert_eq!((blocked.blocked.as_str(), blocked.bytes_total, blocked.attempts), ("n4 is full", 77, 1));
    assert_eq!(blocked.session, reserved.session, "the same phase keeps its session");
    let mut mv = blocked;
    for phase in
        [MovePhase::Learner, MovePhase::Snapshot, MovePhase::CatchUp, MovePhase::Verify, MovePhase::PreSwitch]
    {
        mv = meta.advance(&mv, phase, 6).unwrap();
    }
    let cancel = |id| Ask::CancelMove(v1::CancelMove { id, reason: "operator".into() });
    meta.ask(cancel(mv.id)).unwrap();
    assert_eq!(
        refusal(meta.advance(&mv, MovePhase::Joint, 6)),
        MetaRefusal::Changed,
        "the cancel came first"
    );
    let cancelled = v1::Move::clone(&meta.state().moves[&mv.id]);
    assert_eq!(refusal(meta.advance(&cancelled, MovePhase::Joint, 6)), MetaRefusal::IllegalPhase);
    let aborting = meta.advance(&cancelled, MovePhase::Aborting, 6).unwrap();
    let aborted = meta.advance(&aborting, MovePhase::Aborted, 6).unwrap();
    assert!(aborted.finished_ms > 0);
    assert_eq!(refusal(meta.advance(&aborted, MovePhase::Aborted, 6)), MetaRefusal::IllegalPhase);
    assert_eq!(refusal(meta.ask(cancel(99))), MetaRefusal::NoSuchMove);
    // Another may follow, under a new replica id; ended moves are forgotten from the oldest on.
    let next = meta.start(replace(&shard, 0, 4)).unwrap();
    assert_eq!(next.target, replica(4, 5));
    meta.ask(Ask::PruneMoves(v1::PruneMoves { keep: 0 })).unwrap();
    assert_eq!(meta.state().moves.keys().collect::<Vec<_>>(), [&next.id]);
}

#[test]
fn phases_follow_the_path_or_leave_it_up_to_joint() {
    let all: Vec<MovePhase> = (0..14).map(|phase| MovePhase::try_from(phase).unwrap()).collect();
    for from in &all {
        let to: Vec<MovePhase> = all.iter().copied().filter(|to| legal(*from, *to)).collect();
        let next = |phase: MovePhase| MovePhase::try_from(i32::from(phase) + 1).unwrap();
        match from {
            MovePhase::Done | MovePhase::Aborted => assert!(to.is_empty()),
            MovePhase::Aborting => assert_eq!(to, [MovePhase::RemoveOld, MovePhase::Aborted]),
            early if *early <= MovePhase::Joint => assert_eq!(to, [next(*early), MovePhase::Aborting]),
            late => assert_eq!(to, [next(*late)]),
        }
    }
}

#[test]
fn the_event_log_keeps_the_newest() {
    let mut meta = Meta::with_nodes(1);
    for n in 0..MAX_EVENTS + 5 {
        meta.ask(Ask::NoteEvent(v1::NoteEvent { text: format!("event {n}") })).unwrap();
    }
    let state = meta.state();
    assert_eq!(state.events.len(), MAX_EVENTS);
    assert_eq!(state.events.last_key_value().unwrap().1.text, format!("event {}", MAX_EVENTS + 4));
}

#[test]
fn a_command_of_a_later_version_stops_the_replica() {
    let mut meta = Meta::with_nodes(1);
    let formats = [
        v1::MetaCommand { format: 9, ..Default::default() },
        v1::MetaCommand { format: 1, ..Default::default() },
    ];
    for command in formats {
        let payload = command.encode_to_vec().into();
        assert!(meta.machine.apply(&Command { index: 50, term: 1, timestamp: 1, payload }).is_err());
    }
}

#[test]
fn the_state_is_published_after_the_commit_and_survives_a_restart() {
    let disk = MemoryDisk::new();
    let mut meta = Meta::open(Arc::new(MemoryEngine::open(&disk)));
    let begin =
        v1::BootstrapCluster { cluster: vec![7; 16].into(), node: Some(register(1)), meta_replicas: 3 };
    let payload = pontoon_shard::meta_command(1, Ask::Bootstrap(begin));
    meta.machine.apply(&Command { index: 1, term: 1, timestamp: 1, payload }).unwrap();
    assert_eq!(meta.state().version, 0, "nothing is said before it is committed");
    meta.machine.commit(Vec::new(), &support::mark(1)).unwrap();
    meta.index = 1;
    assert_eq!(meta.state().version, 1);
    let shard = meta.shard("name", 3, &[1]);
    meta.machines.close().unwrap();
    let again = Meta::open(Arc::new(MemoryEngine::open(&disk)));
    assert_eq!(again.state(), meta.state());
    assert_eq!(again.state().to_map().shards.len(), 2);
    assert_eq!(again.state().shard("name").unwrap().group, shard.group);
}

#[test]
fn new_predicates_go_where_there_is_least_and_odd_numbers_win() {
    let mut meta = Meta::with_nodes(4);
    let nodes = |meta: &Meta, wanted| -> Vec<u64> {
        planner::placement(&meta.state(), "p", wanted, &Seen::default())
            .iter()
            .map(|node| node.get())
            .collect()
    };
    assert_eq!(nodes(&meta, 3), [2, 3, 4], "n1 holds the meta group");
    meta.shard("a", 3, &[2, 3, 4]);
    meta.shard("b", 3, &[2, 3, 4]);
    assert_eq!(nodes(&meta, 3), [1, 2, 3]);
    assert_eq!(nodes(&meta, 4), [1, 2, 3]);
    assert_eq!(nodes(&meta, 1), [1]);
    assert_eq!(nodes(&Meta::with_nodes(2), 3), [2]);
    assert!(nodes(&Meta::empty(), 3).is_empty());
    let drain = v1::SetNodeState { node: 1, state: v1::NodeState::Draining.into(), force: false, seen: None };
    meta.ask(Ask::SetNodeState(drain)).unwrap();
    assert_eq!(nodes(&meta, 3), [2, 3, 4]);
    assert_eq!(
        planner::target(&meta.state(), meta.state().shard("a").unwrap().group, 0, &Seen::default()),
        None
    );
}

#[test]
fn a_voter_on_a_removed_node_is_replaced_as_soon_as_there_is_room() {
    let mut meta = Meta::with_nodes(3);
    meta.shard("a", 3, &[1, 2, 3]);
    meta.shard("b", 1, &[1]);
    let group = meta.state().shard("a").unwrap().group;
    let removed = v1::SetNodeState { node: 3, state: v1::NodeState::Removed.into(), force: true, seen: None };
    meta.ask(Ask::SetNodeState(removed)).unwrap();
    assert!(planner::repairs(&meta.state(), &Seen::default()).is_empty(), "every live node holds a replica");
    node(meta.ask(Ask::RegisterNode(register(4))));
    let repairs = planner::repairs(&meta.state(), &Seen::default());
    let repair = repairs.iter().find(|repair| repair.group == group).expect("the lost voter is replaced");
    assert_eq!((repair.kind(), repair.source, repair.target_node), (MoveKind::Replace, replica(3, 3), 4));
    assert!(repair.reason.contains("n3 was removed"), "{}", repair.reason);
    meta.start(repair.clone()).unwrap();
}

#[test]
fn a_dead_voter_is_replaced_elsewhere_or_else_leaves_room_for_its_successor() {
    let mut meta = Meta::with_nodes(3);
    meta.shard("a", 3, &[1, 2, 3]);
    meta.shard("b", 2, &[1, 2]);
    let group = |meta: &Meta, name: &str| meta.state().shard(name).unwrap().group;
    let voter = |meta: &Meta, name: &str, at: usize| meta.state().shard(name).unwrap().voters[at];
    let (a, b) = (group(&meta, "a"), group(&meta, "b"));
    let on = |id: u64| pontoon_proto::ReplicaId::new(id).unwrap().node();
    let dead = [(a, on(voter(&meta, "a", 2))), (b, on(voter(&meta, "b", 1)))].into();
    let dead = Seen { dead, ..Default::default() };
    let repairs = planner::repairs(&meta.state(), &dead);
    let of = |group: u64| repairs.iter().find(|repair| repair.group == group).cloned();
    assert!(of(b).is_none(), "one of two is no majority and can change nothing");
    let removed = of(a).unwrap();
    assert_eq!((removed.kind(), removed.source), (MoveKind::Remove, voter(&meta, "a", 2)));
    assert!(removed.reason.contains("is dead"), "{}", removed.reason);
    meta.start(removed).unwrap();
}

#[test]
fn repairs_grow_the_meta_group_first_and_end_when_nothing_lacks() {
    let mut meta = Meta::with_nodes(2);
    meta.shard("a", 3, &[1]);
    meta.shard("b", 1, &[2]);
    assert!(
        planner::repairs(&meta.state(), &Seen::default()).is_empty(),
        "two voters are no better than one"
    );
    node(meta.ask(Ask::RegisterNode(register(3))));
    assert_eq!(planner::repairs(&meta.state(), &Seen::default())[0].group, 1, "the meta group comes first");
    // Whatever is proposed is carried out at once, until nothing is proposed any more.
    let mut rounds = 0;
    loop {
        let repairs = planner::repairs(&meta.state(), &Seen::default());
        if repairs.is_empty() {
            break;
        }
        for repair in &repairs {
            meta.start(repair.clone()).unwrap();
        }
        assert!(planner::repairs(&meta.state(), &Seen::default()).is_empty(), "one move per group at a time");
        for repair in repairs {
            let state = meta.state();
            let mut mv = v1::Move::clone(state.running_move(repair.group).unwrap());
            for phase in 1..=11 {
                mv = meta.advance(&mv, MovePhase::try_from(phase).unwrap(), 1).unwrap();
            }
            let shard = &state.shards[&repair.group];
            let voters = [&shard.voters[..], &[mv.target]].concat();
            let members_index = shard.members_index + 1;
            let update =
                v1::UpdateMembers { group: repair.group, voters, learners: Vec::new(), members_index };
            meta.ask(Ask::UpdateMembers(update)).unwrap();
        }
        rounds += 1;
        assert!(rounds < 10);
    }
    let state = meta.state();
    let nodes = |predicate: &str| -> BTreeSet<u64> {
        state.shard(predicate).unwrap().voters.iter().map(|raw| raw >> 32).collect()
    };
    assert_eq!(nodes(META_PREDICATE), [1, 2, 3].into());
    assert_eq!(nodes("a"), [1, 2, 3].into());
    assert_eq!(nodes("b"), [2].into(), "one was wanted");
}

/// Any command, most of them senseless.
fn asks() -> impl Strategy<Value = Vec<Ask>> {
    let group = 0..6u64;
    let name = || (0..3u8).prop_map(|n| format!("p{n}"));
    let one = prop_oneof![
        (1..6u64, 0..4u64)
            .prop_map(|(n, replace)| Ask::RegisterNode(v1::RegisterNode { replace, ..register(n) })),
        (0..6u64, 0..3i32, any::<bool>()).prop_map(|(node, state, force)| Ask::SetNodeState(
            v1::SetNodeState { node, state, force, seen: None }
        )),
        (name(), proptest::collection::vec(1..5u64, 0..4)).prop_map(|(predicate, nodes)| {
            Ask::CreateShard(v1::CreateShard { predicate, replicas_wanted: 3, nodes, ..Default::default() })
        }),
        group.clone().prop_map(|group| Ask::ShardLive(v1::ShardLive { group })),
        name().prop_map(|predicate| Ask::DropShard(v1::DropShard { predicate })),
        group.clone().prop_map(|group| Ask::ShardDropped(v1::ShardDropped { group })),
        (name(), group.clone(), group.clone()).prop_map(|(predicate, old_group, new_group)| {
            Ask::ReplaceShard(v1::ReplaceShard { predicate, old_group, new_group })
        }),
        Just(finalise()),
        (group, 0..4i32, 1..6u64, 1..4u32, 0..6u64).prop_map(|(group, kind, node, ordinal, target_node)| {
            let source = replica(node, ordinal);
            Ask::StartMove(v1::StartMove { group, kind, source, target_node, ..Default::default() })
        }),
        (1..5u64, 1..8u64, 0..15i32).prop_map(|(id, expect_phase_seq, phase)| {
            Ask::AdvanceMove(v1::AdvanceMove {
                id,
                expect_phase_seq,
                phase,
                driver_term: 1,
                ..Default::default()
            })
        }),
        (1..5u64).prop_map(|id| Ask::CancelMove(v1::CancelMove { id, ..Default::default() })),
        (0..2u32).prop_map(|keep| Ask::PruneMoves(v1::PruneMoves { keep })),
    ];
    proptest::collection::vec(one, 0..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// `Meta::ask` checks the invariants after each command.
    #[test]
    fn any_commands_keep_the_invariants_and_give_the_same_rows_everywhere(asks in asks()) {
        let (mut one, mut two) = (Meta::with_nodes(3), Meta::with_nodes(3));
        for ask in asks {
            let answers = (one.ask(ask.clone()), two.ask(ask));
            prop_assert_eq!(answers.0, answers.1);
        }
        let rows = |meta: &Meta| {
            let mut rows = Vec::new();
            let copy = Bytes::copy_from_slice;
            meta.machine.checkpoint().unwrap().rows(b"", &mut |key, value| {
                rows.push((copy(key), copy(value)));
                true
            }).unwrap();
            rows
        };
        prop_assert_eq!(rows(&one), rows(&two));
        let mut fresh = Meta::empty();
        support::install(&mut *fresh.machine, &rows(&one), 7, one.index);
        prop_assert_eq!(fresh.state(), one.state());
    }
}

#[test]
fn what_a_silent_node_owes_is_kept_until_it_is_settled_or_the_node_is_removed() {
    let disk = MemoryDisk::new();
    let mut meta = Meta::open(Arc::new(MemoryEngine::open(&disk)));
    let begin =
        v1::BootstrapCluster { cluster: vec![7; 16].into(), node: Some(register(1)), meta_replicas: 1 };
    meta.ask(Ask::Bootstrap(begin)).unwrap();
    (2..=5).for_each(|node| drop(meta.ask(Ask::RegisterNode(register(node))).unwrap()));
    let fencing = |meta: &mut Meta, predicate: &str, source: u64| {
        let shard = meta.shard(predicate, 3, &[source, 4, 5]);
        let mut mv = meta.start(replace(&shard, 0, 1)).unwrap();
        for phase in 1..=MovePhase::Fence as i32 {
            mv = meta.advance(&mv, MovePhase::try_from(phase).unwrap(), 1).unwrap();
        }
        (mv, (shard.group, shard.voters[0]))
    };
    let end = |meta: &mut Meta, mv: v1::Move| {
        let owing = |mv: &v1::Move, phase: MovePhase| {
            Ask::AdvanceMove(v1::AdvanceMove {
                id: mv.id,
                expect_phase_seq: mv.phase_seq,
                driver_term: 1,
                phase: phase.into(),
                owing: true,
                ..Default::default()
            })
        };
        assert_eq!(refusal(meta.ask(owing(&mv, MovePhase::Fence))), MetaRefusal::IllegalPhase);
        let Ok(Answer::Move(mv)) = meta.ask(owing(&mv, MovePhase::Cleanup)) else { panic!("a move") };
        meta.advance(&mv, MovePhase::Done, 1).unwrap();
    };
    let ((a, first), (b, second)) = (fencing(&mut meta, "a", 2), fencing(&mut meta, "b", 3));
    let (c, _) = fencing(&mut meta, "c", 3);
    end(&mut meta, a);
    end(&mut meta, b);
    drop(meta);
    let mut meta = Meta::open(Arc::new(MemoryEngine::open(&disk)));
    assert_eq!(meta.state().debts, BTreeSet::from([first, second]));
    meta.ask(Ask::SettleDebt(v1::SettleDebt { group: first.0, replica: first.1 })).unwrap();
    assert_eq!(meta.state().debts, BTreeSet::from([second]));
    let removed = v1::NodeState::Removed.into();
    meta.ask(Ask::SetNodeState(v1::SetNodeState { node: 3, state: removed, force: true, seen: None }))
        .unwrap();
    assert!(meta.state().debts.is_empty(), "a node that is removed is never spoken to again");
    end(&mut meta, c);
    assert!(meta.state().debts.is_empty(), "nor does it owe what is found out later");
    drop(meta);
    assert!(Meta::open(Arc::new(MemoryEngine::open(&disk))).state().debts.is_empty());
}
