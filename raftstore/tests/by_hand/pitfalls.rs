//! What raft 0.7 does to those who trust it, each with the guard that keeps it from happening here. A pitfall that is
//! guarded elsewhere is named in `docs/testing.md` with its test.

use bytes::Bytes;
use pontoon_proto::{GroupId, ReplicaId, v1};
use pontoon_raftstore::{Answer, Config, Event, MemberChange, ProposeError, ReadLevel, Rejected, Role};

use crate::lab::{Lab, Mail, node, replica};

const GROUP: u64 = 3;
const ELECTION_TICKS: u64 = 10;

/// Raft's numbers of message kinds.
mod kind {
    pub(super) const PROPOSE: i32 = 2;
    pub(super) const APPEND: i32 = 3;
    pub(super) const APPEND_RESPONSE: i32 = 4;
    pub(super) const HEARTBEAT: i32 = 8;
    pub(super) const HUP: i32 = 0;
    pub(super) const TRANSFER_LEADER: i32 = 13;
}

/// Three nodes and the one that leads.
fn lab() -> (Lab, u64) {
    let mut lab = Lab::new(3, Config::default());
    lab.found(GROUP..GROUP + 1, &[1, 2, 3]);
    let leader = lab.leader(GROUP).unwrap();
    (lab, leader)
}

fn others(leader: u64) -> [u64; 2] {
    [1, 2, 3].into_iter().filter(|id| *id != leader).collect::<Vec<_>>().try_into().unwrap()
}

fn apart_from(id: u64) -> impl Fn(&Mail) -> bool {
    move |mail| mail.from != node(id) && mail.to != node(id)
}

fn read(lab: &mut Lab, id: u64) -> (pontoon_proto::NodeId, u64) {
    (node(id), lab.at(id).read_barrier(GroupId(GROUP), ReadLevel::Linearizable))
}

fn change(lab: &mut Lab, id: u64, change: MemberChange) -> (pontoon_proto::NodeId, u64) {
    (node(id), lab.at(id).change(GroupId(GROUP), change))
}

fn changed(lab: &mut Lab, asked: (pontoon_proto::NodeId, u64)) -> Option<Result<(), Rejected>> {
    match lab.answers.remove(&asked)? {
        Answer::Done(result) => Some(result),
        other => panic!("{other:?} answers a change"),
    }
}

/// A message of raft from another replica, as it would come over the wire.
fn tell(lab: &mut Lab, from: ReplicaId, to: u64, raft: v1::RaftMessage) {
    let body = Some(v1::peer_message::Body::Raft(raft));
    let message = v1::PeerMessage { group: GROUP, from: from.get(), to: replica(to).get(), body };
    lab.at(to).deliver(from.node(), message);
    lab.turn(node(to));
}

#[test]
fn p1_a_leader_that_was_cut_off_does_not_answer_reads_beside_a_new_one() {
    let (mut lab, old) = lab();
    for _ in 0..4 * ELECTION_TICKS {
        lab.pass(1);
        lab.settle_where(apart_from(old));
        if lab.leader(GROUP) != Some(old) {
            break;
        }
    }
    let new = lab.leader(GROUP).unwrap();
    assert_ne!(new, old);
    let write = lab.propose(new, GROUP, "k=new");
    lab.settle_where(apart_from(old));
    lab.outcome(write).unwrap().unwrap();
    let stale = read(&mut lab, old);
    for _ in 0..ELECTION_TICKS {
        lab.settle_where(apart_from(old));
        assert!(!matches!(lab.read_outcome(stale), Some(Ok(_))));
        lab.pass(1);
    }
}

#[test]
fn p2_a_sole_voter_waits_for_its_disk_before_it_campaigns() {
    let mut lab = Lab::new(1, Config::default());
    lab.found(GROUP..GROUP + 1, &[1]);
    lab.nodes[&node(1)].fs.hold(true);
    lab.propose(1, GROUP, "k=v");
    lab.turn(node(1));
    // A word of a later term makes a follower of it, whose log is ahead of its disk.
    let term = lab.status(1, GROUP).term + 1;
    tell(&mut lab, replica(2), 1, v1::RaftMessage { kind: kind::HEARTBEAT, term, ..Default::default() });
    assert_eq!(lab.status(1, GROUP).role, Role::Follower);
    lab.tick(5 * ELECTION_TICKS);
    assert_eq!(lab.status(1, GROUP).role, Role::Follower, "{:?}", lab.status(1, GROUP).dead);
    lab.nodes[&node(1)].fs.hold(false);
    while lab.nodes[&node(1)].fs.complete_one() {}
    lab.tick(5 * ELECTION_TICKS);
    assert_eq!(lab.status(1, GROUP).role, Role::Leader);
}

#[test]
fn p3_what_is_proposed_to_a_follower_is_refused_and_never_forwarded() {
    let (mut lab, leader) = lab();
    let [follower, _] = others(leader);
    let before = lab.status(leader, GROUP).last_index;
    let write = lab.propose(follower, GROUP, "k=v");
    lab.turn_all();
    assert!(lab.mail.iter().all(|mail| mail.raft().is_none_or(|raft| raft.kind != kind::PROPOSE)));
    lab.settle();
    let refused = lab.outcome(write).unwrap();
    assert!(matches!(
        refused,
        Err(ProposeError::Rejected(Rejected::NotLeader { leader: Some(hint), .. })) if hint == replica(leader)
    ));
    assert_eq!(lab.status(leader, GROUP).last_index, before);
}

#[test]
fn p3_proposals_and_commands_of_raft_are_not_taken_from_peers() {
    let (mut lab, leader) = lab();
    let [follower, _] = others(leader);
    let before = lab.status(leader, GROUP);
    for kind in [kind::PROPOSE, kind::HUP, kind::TRANSFER_LEADER, 99] {
        lab.events.clear();
        let entries =
            vec![v1::WireEntry { term: before.term, index: 1, data: "x".into(), ..Default::default() }];
        let raft = v1::RaftMessage { kind, term: before.term, entries, ..Default::default() };
        tell(&mut lab, replica(follower), leader, raft);
        assert!(
            matches!(lab.events[..], [(_, Event::MessageRefused { .. })]),
            "kind {kind}: {:?}",
            lab.events
        );
    }
    lab.settle();
    assert_eq!(lab.status(leader, GROUP).last_index, before.last_index);
    assert_eq!(lab.leader(GROUP), Some(leader));
}

#[test]
fn p4_a_read_that_raft_drops_on_a_fresh_leader_is_answered_all_the_same() {
    let (mut lab, old) = lab();
    let [one, two] = others(old);
    let is_append = |mail: &Mail| mail.raft().is_some_and(|raft| raft.kind == kind::APPEND);
    // A new leader that cannot commit the first entry of its term.
    let fresh = loop {
        lab.pass(1);
        lab.settle_where(|mail| apart_from(old)(mail) && !is_append(mail));
        if let Some(fresh) = [one, two].into_iter().find(|id| lab.status(*id, GROUP).role == Role::Leader) {
            break fresh;
        }
    };
    let asked = read(&mut lab, fresh);
    lab.settle_where(|mail| apart_from(old)(mail) && !is_append(mail));
    assert_eq!(lab.read_outcome(asked), None, "what is committed is not known yet");
    lab.tick(2);
    let index = lab.read_outcome(asked).unwrap().unwrap();
    assert_eq!(index, lab.status(fresh, GROUP).commit);
}

#[test]
fn p4_a_read_of_a_replica_without_a_leader_is_refused_at_once() {
    let (mut lab, leader) = lab();
    let [follower, _] = others(leader);
    let before = lab.status(follower, GROUP).term;
    // Somebody of a later term leaves it without a leader.
    let response = v1::RaftMessage { kind: kind::APPEND_RESPONSE, term: before + 3, ..Default::default() };
    tell(&mut lab, replica(leader), follower, response);
    assert_eq!(lab.status(follower, GROUP).leader, None);
    let level = ReadLevel::Follower { max_lag: std::time::Duration::ZERO };
    let asked = (node(follower), lab.at(follower).read_barrier(GroupId(GROUP), level));
    lab.turn(node(follower));
    assert!(matches!(lab.read_outcome(asked), Some(Err(Rejected::NotLeader { leader: None, .. }))));
}

#[test]
fn p6_a_second_change_is_refused_and_does_not_become_an_empty_entry() {
    let (mut lab, leader) = lab();
    let before = lab.status(leader, GROUP).last_index;
    let learner = |id| MemberChange::AddLearner(ReplicaId::on(node(id), 1));
    let first = change(&mut lab, leader, learner(8));
    let second = change(&mut lab, leader, learner(9));
    lab.turn(node(leader));
    assert!(matches!(changed(&mut lab, second), Some(Err(Rejected::Membership { .. }))));
    assert_eq!(lab.status(leader, GROUP).last_index, before + 1);
    lab.settle();
    assert_eq!(changed(&mut lab, first), Some(Ok(())));
}

#[test]
fn p7_a_log_that_is_older_than_its_engine_ends_the_replica_and_nothing_else() {
    let (mut lab, leader) = lab();
    lab.found(4..5, &[1, 2, 3]);
    let [follower, _] = others(leader);
    let image = lab.nodes[&node(follower)].fs.image();
    for i in 0..10 {
        lab.propose(leader, GROUP, format!("k{i}=v"));
    }
    lab.settle();
    // The disk with the log is set back, the one with the engine is not.
    lab.nodes[&node(follower)].fs.restore(&image);
    lab.reboot(node(follower));
    lab.tick(1);
    let status = lab.status(follower, GROUP);
    assert_eq!(status.role, Role::Dead);
    assert!(status.dead.unwrap().contains("the log lost entries"));
    lab.tick(ELECTION_TICKS);
    assert_eq!(lab.status(follower, 4).applied, lab.status(lab.leader(4).unwrap(), 4).applied);
}

#[test]
fn p8_a_heartbeat_that_counts_on_entries_which_are_gone_ends_the_replica_without_a_panic() {
    let (mut lab, leader) = lab();
    lab.found(4..5, &[1, 2, 3]);
    let [follower, _] = others(leader);
    let status = lab.status(follower, GROUP);
    let raft = v1::RaftMessage {
        kind: kind::HEARTBEAT,
        term: status.term,
        commit: status.last_index + 5,
        ..Default::default()
    };
    tell(&mut lab, replica(leader), follower, raft);
    let dead = lab.status(follower, GROUP).dead.unwrap();
    assert!(dead.contains("it lost acknowledged entries"), "{dead}");
    // It says nothing any more; the others and its other groups go on.
    lab.settle();
    let writes = [lab.propose(leader, GROUP, "k=v"), {
        let leader = lab.leader(4).unwrap();
        lab.propose(leader, 4, "k=v")
    }];
    lab.settle();
    for write in writes {
        lab.outcome(write).unwrap().unwrap();
    }
    lab.tick(3 * ELECTION_TICKS);
    assert_eq!(lab.status(follower, GROUP).role, Role::Dead);
}

#[test]
fn p8_an_append_that_conflicts_with_what_is_committed_is_refused() {
    let (mut lab, leader) = lab();
    let [follower, _] = others(leader);
    let status = lab.status(follower, GROUP);
    let entry = v1::WireEntry {
        term: status.term + 1,
        index: status.commit,
        data: Bytes::from_static(b"other"),
        ..Default::default()
    };
    let raft = v1::RaftMessage {
        kind: kind::APPEND,
        term: status.term + 1,
        index: status.commit - 1,
        log_term: status.term - 1,
        entries: vec![entry],
        ..Default::default()
    };
    lab.events.clear();
    tell(&mut lab, replica(leader), follower, raft);
    assert!(matches!(&lab.events[..], [(_, Event::MessageRefused { .. })]), "{:?}", lab.events);
    lab.tick(ELECTION_TICKS);
    assert_eq!(lab.status(follower, GROUP).role, Role::Follower);
}

#[test]
fn p8_an_append_that_comes_twice_in_one_turn_conflicts_with_nothing() {
    let (mut lab, leader) = lab();
    let [follower, other] = others(leader);
    let status = lab.status(follower, GROUP);
    let (term, last) = (status.term, status.last_index);
    let log_term = lab.last_term(follower, GROUP);
    let append = |term, commit| v1::RaftMessage {
        kind: kind::APPEND,
        term,
        index: last,
        log_term,
        commit,
        entries: vec![v1::WireEntry { term, index: last + 1, ..Default::default() }],
        ..Default::default()
    };
    // What the old leader could not commit is on the disk.
    tell(&mut lab, replica(leader), follower, append(term, status.commit));
    assert_eq!((lab.status(follower, GROUP).last_index, lab.last_term(follower, GROUP)), (last + 1, term));

    // The next leader's comes in its place, committed by others, twice at once: as after a pause.
    lab.events.clear();
    let body = Some(v1::peer_message::Body::Raft(append(term + 1, last + 1)));
    let (from, to) = (replica(other).get(), replica(follower).get());
    let message = v1::PeerMessage { group: GROUP, from, to, body };
    for _ in 0..2 {
        lab.at(follower).deliver(node(other), message.clone());
    }
    assert_eq!(lab.last_term(follower, GROUP), term, "its turn has not ended: the log has not got it yet");
    lab.turn(node(follower));
    let refused = |event: &Event| matches!(event, Event::MessageRefused { .. });
    assert!(!lab.events.iter().any(|(_, event)| refused(event)), "{:?}", lab.events);
    let status = lab.status(follower, GROUP);
    assert_eq!((status.commit, lab.last_term(follower, GROUP)), (last + 1, term + 1));
}

#[test]
fn p9_a_follower_far_behind_in_applying_campaigns_without_reading_its_backlog_at_once() {
    const UNAPPLIED: u64 = 32 << 10;
    let mut lab = Lab::new(3, Config { max_unapplied_bytes: UNAPPLIED, ..Default::default() });
    lab.found(GROUP..GROUP + 1, &[1, 2, 3]);
    let leader = lab.leader(GROUP).unwrap();
    let [follower, _] = others(leader);
    lab.frozen.insert(node(follower));
    for i in 0..200 {
        lab.propose(leader, GROUP, format!("k{i}={}", "x".repeat(1000)));
        lab.settle();
    }
    // What raft looks through when it campaigns is what is committed and not applied.
    let status = lab.status(follower, GROUP);
    assert!((status.commit - status.applied) * 1000 < 2 * UNAPPLIED, "{status:?}");
}

#[test]
fn p10_a_follower_that_lags_gets_many_entries_in_one_message() {
    let (mut lab, leader) = lab();
    let [follower, _] = others(leader);
    for i in 0..1000 {
        lab.propose(leader, GROUP, format!("k{i}=v"));
        lab.settle_where(apart_from(follower));
        lab.mail.clear();
    }
    lab.at(leader).unreachable(node(follower));
    let mut messages = 0;
    for _ in 0..ELECTION_TICKS {
        lab.pass(1);
        while !lab.mail.is_empty() {
            messages +=
                lab.mail.iter().filter(|mail| mail.to == node(follower) && mail.entry_bytes() > 0).count();
            lab.deliver(|_| true);
        }
    }
    assert_eq!(lab.status(follower, GROUP).last_index, lab.status(leader, GROUP).last_index);
    assert!(messages < 10, "{messages} messages");
}

#[test]
fn p11_disks_of_followers_that_stall_neither_depose_a_leader_nor_stop_reads() {
    let (mut lab, leader) = lab();
    for id in others(leader) {
        lab.nodes[&node(id)].fs.hold(true);
    }
    let write = lab.propose(leader, GROUP, "k=v");
    lab.tick(5 * ELECTION_TICKS);
    assert_eq!(lab.leader(GROUP), Some(leader));
    assert_eq!(lab.outcome(write), None, "no quorum has it");
    let asked = read(&mut lab, leader);
    lab.settle();
    lab.read_outcome(asked).unwrap().unwrap();
}

#[test]
fn p14_a_leader_neither_removes_nor_demotes_itself() {
    let (mut lab, leader) = lab();
    let demote = MemberChange::EnterJoint { promote: Vec::new(), demote: vec![replica(leader)] };
    for asked in [MemberChange::Remove(replica(leader)), demote] {
        let asked = change(&mut lab, leader, asked);
        lab.settle();
        assert!(matches!(changed(&mut lab, asked), Some(Err(Rejected::Membership { .. }))));
    }
    assert_eq!(lab.leader(GROUP), Some(leader));
}

#[test]
fn p15_whoever_leads_next_leaves_the_joint_configuration() {
    let (mut lab, leader) = lab();
    let [demoted, stays] = others(leader);
    // The joint entry is committed; its leader is gone before it can leave.
    change(
        &mut lab,
        leader,
        MemberChange::EnterJoint { promote: Vec::new(), demote: vec![replica(demoted)] },
    );
    let is_joint = |lab: &Lab, id| lab.status(id, GROUP).is_joint();
    lab.turn_all();
    for _ in 0..20 {
        if is_joint(&lab, stays) && is_joint(&lab, demoted) {
            break;
        }
        lab.deliver(|_| true);
    }
    assert!(
        is_joint(&lab, stays) && is_joint(&lab, demoted),
        "the joint configuration was left too soon to be seen"
    );
    lab.mail.clear();
    for _ in 0..6 * ELECTION_TICKS {
        lab.pass(1);
        lab.settle_where(apart_from(leader));
    }
    // The new configuration is the old leader and the one that stays: without the old leader nobody can leave yet.
    lab.tick(4 * ELECTION_TICKS);
    for id in [leader, stays] {
        let status = lab.status(id, GROUP);
        assert!(!status.is_joint(), "{status:?}");
        assert_eq!(status.conf_state.learners, [replica(demoted).get()]);
    }
}

#[test]
fn p16_readers_of_a_leader_that_steps_down_are_told() {
    let (mut lab, leader) = lab();
    let asked = read(&mut lab, leader);
    lab.turn(node(leader));
    let term = lab.status(leader, GROUP).term;
    let [follower, _] = others(leader);
    let later = v1::RaftMessage { kind: kind::HEARTBEAT, term: term + 1, ..Default::default() };
    tell(&mut lab, replica(follower), leader, later);
    assert!(matches!(lab.read_outcome(asked), Some(Err(Rejected::NotLeader { .. }))));
}

#[test]
fn p18_an_answer_of_somebody_unknown_harms_nobody() {
    let (mut lab, leader) = lab();
    let status = lab.status(leader, GROUP);
    for kind in [kind::APPEND_RESPONSE, 6, 9, 18] {
        let raft =
            v1::RaftMessage { kind, term: status.term, index: status.last_index, ..Default::default() };
        tell(&mut lab, ReplicaId::on(node(9), 1), leader, raft);
    }
    let write = lab.propose(leader, GROUP, "k=v");
    lab.settle();
    lab.outcome(write).unwrap().unwrap();
    assert_eq!(lab.leader(GROUP), Some(leader));
}

#[test]
fn p24_followers_apply_without_waiting_for_the_next_write_or_heartbeat() {
    let (mut lab, leader) = lab();
    let write = lab.propose(leader, GROUP, "k=v");
    lab.settle();
    let index = lab.outcome(write).unwrap().unwrap();
    for id in 1..=3 {
        assert_eq!(lab.status(id, GROUP).applied, index, "no time went by");
    }
}

/// Not raft's doing: a replica of which the log has lost even the record.
#[test]
fn a_replica_whose_record_is_damaged_is_dead_and_is_not_founded_anew() {
    const DAMAGED: u64 = 5;
    let (mut lab, leader) = lab();
    let [follower, _] = others(leader);
    lab.found(DAMAGED..DAMAGED + 1, &[1, 2, 3]);
    let fs = lab.nodes[&node(follower)].fs.clone();
    let image = fs.image();
    lab.end(node(follower));
    fs.restore(&image);
    // The key of the record that was written last; no checkpoint has it yet.
    let segments =
        fs.files().into_iter().filter(|(path, _)| path.extension().is_some_and(|ext| ext == "wal"));
    for (path, _) in segments {
        fs.tamper(&path, |bytes| {
            if let Some(at) = bytes.windows(7).rposition(|window| window == b"replica") {
                bytes[at] ^= 1;
            }
        });
    }
    lab.start(node(follower), fs);
    let status = lab.status(follower, DAMAGED);
    assert_eq!(status.role, Role::Dead);
    assert!(status.dead.unwrap().contains("log"));
    // Whoever finds it missing asks for it as at its founding.
    lab.found_again(DAMAGED, follower, &[1, 2, 3]);
    lab.tick(ELECTION_TICKS);
    assert_eq!(lab.status(follower, DAMAGED).role, Role::Dead);
    let write = lab.propose(leader, GROUP, "k=v");
    lab.settle();
    let index = lab.outcome(write).unwrap().unwrap();
    assert_eq!(lab.status(follower, GROUP).applied, index);
}
