//! Reads from the leader's lease.

use pontoon_proto::GroupId;
use pontoon_raftstore::{Config, MemberChange, ReadLevel};

use crate::lab::{Lab, Mail, node, replica};

const GROUP: u64 = 3;

fn leased() -> Config {
    Config { leader_lease: true, ..Default::default() }
}

/// Three nodes, their leader, and one of the others.
fn lab(config: Config) -> (Lab, u64, u64) {
    let mut lab = Lab::new(3, config);
    lab.found(GROUP..GROUP + 1, &[1, 2, 3]);
    let leader = lab.leader(GROUP).unwrap();
    (lab, leader, if leader == 1 { 2 } else { 1 })
}

/// Asks, delivers nothing, and tells what was answered.
fn read_alone(lab: &mut Lab, id: u64) -> Option<u64> {
    let asked = (node(id), lab.at(id).read_barrier(GroupId(GROUP), ReadLevel::Linearizable));
    lab.turn(node(id));
    lab.read_outcome(asked).and_then(Result::ok)
}

fn read(lab: &mut Lab, id: u64) {
    let asked = (node(id), lab.at(id).read_barrier(GroupId(GROUP), ReadLevel::Linearizable));
    lab.settle();
    lab.read_outcome(asked).unwrap().unwrap();
}

#[test]
fn without_the_option_each_read_asks_a_quorum() {
    let (mut lab, leader, _) = lab(Config::default());
    read(&mut lab, leader);
    assert_eq!(read_alone(&mut lab, leader), None);
}

#[test]
fn a_confirmed_leader_answers_alone_until_the_lease_ends_and_sees_every_write() {
    let (mut lab, leader, _) = lab(leased());
    assert_eq!(read_alone(&mut lab, leader), None, "nobody has confirmed it yet");
    lab.settle();
    let write = lab.propose(leader, GROUP, "k=v");
    lab.settle();
    let written = lab.outcome(write).unwrap().unwrap();
    assert_eq!(read_alone(&mut lab, leader), Some(written));
    lab.pass(8);
    assert_eq!(read_alone(&mut lab, leader), Some(written));
    lab.pass(1);
    assert_eq!(read_alone(&mut lab, leader), None);
}

#[test]
fn nobody_else_leads_while_a_lease_holds() {
    let (mut lab, leader, _) = lab(leased());
    read(&mut lab, leader);
    lab.mail.clear();
    let mut elected_after = None;
    for tick in 1..60 {
        lab.pass(1);
        lab.settle_where(|mail| mail.from != node(leader) && mail.to != node(leader));
        if lab.leader(GROUP) != Some(leader) {
            elected_after = Some(tick);
            break;
        }
        assert_eq!(read_alone(&mut lab, leader).is_some(), tick < 9, "tick {tick}");
    }
    assert!(elected_after.unwrap() >= 10, "elected after {elected_after:?} ticks");
    assert_eq!(read_alone(&mut lab, leader), None, "the old leader answers beside a new one");
}

#[test]
fn a_voter_that_starts_again_keeps_the_promise_it_has_forgotten() {
    // The third campaigns before the other would.
    let (mut lab, leader, third) = lab(leased());
    let other = 6 - leader - third;
    // Only one of the others confirms the lease; it starts again at once and is asked for its vote by the third, which has
    // heard nothing for long.
    for _ in 0..9 {
        lab.pass(1);
        lab.mail.clear();
    }
    let asked = (node(leader), lab.at(leader).read_barrier(GroupId(GROUP), ReadLevel::Linearizable));
    lab.settle_where(|mail| mail.to != node(third) && mail.from != node(third));
    lab.read_outcome(asked).unwrap().unwrap();
    lab.mail.clear();
    lab.reboot(node(other));
    for _ in 0..8 {
        lab.pass(1);
        lab.settle_where(|mail| mail.from != node(leader) && mail.to != node(leader));
        assert_eq!(lab.leader(GROUP), Some(leader));
        assert!(read_alone(&mut lab, leader).is_some());
    }
    for _ in 0..40 {
        lab.pass(1);
        lab.settle_where(|mail| mail.from != node(leader) && mail.to != node(leader));
    }
    assert_ne!(lab.leader(GROUP), Some(leader));
}

#[test]
fn a_leader_that_offered_leadership_has_no_lease_for_the_rest_of_its_term() {
    let (mut lab, leader, other) = lab(leased());
    read(&mut lab, leader);
    lab.at(leader).transfer_leader(GroupId(GROUP), replica(other));
    lab.turn(node(leader));
    assert_eq!(read_alone(&mut lab, leader), None);
    // The word is late; raft gives the transfer up, the leader goes on, and is confirmed again.
    let is_offer = |mail: &Mail| mail.raft().is_some_and(|raft| raft.kind == 14);
    assert!(lab.mail.iter().any(is_offer), "raft's MsgTimeoutNow has another number");
    for _ in 0..15 {
        lab.pass(1);
        lab.settle_where(|mail| !is_offer(mail));
    }
    assert_eq!(lab.leader(GROUP), Some(leader));
    let asked = (node(leader), lab.at(leader).read_barrier(GroupId(GROUP), ReadLevel::Linearizable));
    lab.settle_where(|mail| !is_offer(mail));
    lab.read_outcome(asked).unwrap().unwrap();
    assert_eq!(read_alone(&mut lab, leader), None);
    // Now it comes: the other leads at once, which a lease would not have known.
    lab.mail.retain(is_offer);
    lab.settle_where(|mail| mail.to != node(leader));
    assert_eq!(lab.leader(GROUP), Some(other));
}

#[test]
fn a_new_configuration_ends_the_lease() {
    let (mut lab, leader, _) = lab(leased());
    read(&mut lab, leader);
    let learner = pontoon_proto::ReplicaId::on(node(9), 1);
    lab.at(leader).change(GroupId(GROUP), MemberChange::AddLearner(learner));
    lab.settle();
    assert_eq!(read_alone(&mut lab, leader), None);
    lab.settle();
    assert!(read_alone(&mut lab, leader).is_some());
}
