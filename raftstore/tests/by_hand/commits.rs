//! How followers hear what is committed: in rows that nobody answers.

use std::cell::Cell;

use pontoon_proto::v1::peer_message::Body;
use pontoon_raftstore::Config;

use crate::lab::{Lab, Mail};

fn tells_commits(mail: &Mail) -> bool {
    matches!(&mail.message.body, Some(Body::Beats(beats)) if beats.unanswered)
}

fn followers(leader: u64) -> impl Iterator<Item = u64> {
    (1..=3).filter(move |id| *id != leader)
}

fn lab() -> (Lab, u64) {
    let mut lab = Lab::new(3, Config::default());
    lab.found([2].into_iter(), &[1, 2, 3]);
    lab.settle();
    let leader = lab.leader(2).unwrap();
    (lab, leader)
}

#[test]
fn a_commit_is_told_in_a_row_and_not_answered() {
    let (mut lab, leader) = lab();
    let asked = lab.propose(leader, 2, "k=v");
    let (rows, others) = (Cell::new(0), Cell::new(0));
    lab.settle_where(|mail| {
        let count = if tells_commits(mail) { &rows } else { &others };
        count.set(count.get() + 1);
        true
    });
    let index = lab.outcome(asked).unwrap().unwrap();
    assert!(followers(leader).all(|id| lab.status(id, 2).applied == index));
    // The entry and its acknowledgement, for each follower.
    assert_eq!(others.get(), 4);
    assert!((1..=2).contains(&rows.get()), "{}", rows.get());
}

#[test]
fn a_commit_that_nobody_heard_of_is_told_by_the_next_heartbeat() {
    let (mut lab, leader) = lab();
    let asked = lab.propose(leader, 2, "k=v");
    lab.settle_where(|mail| !tells_commits(mail));
    let index = lab.outcome(asked).unwrap().unwrap();
    assert!(followers(leader).all(|id| lab.status(id, 2).applied < index));
    lab.mail.clear();
    lab.tick(4);
    assert!(followers(leader).all(|id| lab.status(id, 2).applied == index));
}

/// Raft learns of a lost append from the answer to an empty one; nothing else follows in a group that is quiet.
#[test]
fn an_append_that_was_lost_is_sent_again() {
    let (mut lab, leader) = lab();
    let asked = lab.propose(leader, 2, "k=v");
    let lost = Cell::new(0);
    lab.settle_where(|mail| {
        let has_entries = matches!(&mail.message.body, Some(Body::Raft(raft)) if !raft.entries.is_empty());
        lost.set(lost.get() + usize::from(has_entries));
        !has_entries
    });
    lab.mail.clear();
    assert_eq!(lost.get(), 2, "one to each follower");
    lab.tick(8);
    let index = lab.outcome(asked).expect("it is answered").unwrap();
    assert!(followers(leader).all(|id| lab.status(id, 2).applied == index));
}

#[test]
fn a_late_word_of_an_earlier_leader_changes_nothing() {
    let (mut lab, leader) = lab();
    let asked = lab.propose(leader, 2, "k=v");
    lab.settle_where(|mail| !tells_commits(mail));
    let index = lab.outcome(asked).unwrap().unwrap();
    let late: Vec<Mail> = lab.mail.drain(..).filter(tells_commits).collect();
    assert!(!late.is_empty());
    // The others go on without it.
    for _ in 0..40 {
        lab.pass(1);
        lab.settle_where(|mail| followers(leader).any(|id| mail.from.get() == id) && mail.to.get() != leader);
        lab.mail.clear();
    }
    let other = lab.leader(2).unwrap();
    assert_ne!(other, leader);
    let before = lab.status(other, 2);
    assert!(before.commit > index);
    lab.mail = late;
    lab.deliver(|mail| followers(leader).any(|id| mail.to.get() == id));
    let after = lab.status(other, 2);
    assert_eq!((after.term, after.role, after.commit), (before.term, before.role, before.commit));
}
