//! What is under way to followers is bounded in bytes, and what waits goes on by itself.

use pontoon_raftstore::{Class, Config};

use crate::lab::{Lab, Mail, node};

const MESSAGE: u64 = 4 << 10;
const WINDOW: u64 = 16 << 10;

fn config() -> Config {
    Config {
        max_append_bytes: MESSAGE,
        max_inflight_bytes: WINDOW,
        max_node_inflight_bytes: 3 * WINDOW,
        ..Default::default()
    }
}

fn command(i: usize, bytes: usize) -> String {
    format!("k{i}={}", "x".repeat(bytes))
}

/// Bytes of entries that wait for a node.
fn under_way(lab: &Lab, to: u64) -> u64 {
    lab.mail.iter().filter(|mail| mail.to == node(to)).map(Mail::entry_bytes).sum()
}

/// Everything but what node 3 would receive.
fn not_to_3(mail: &Mail) -> bool {
    mail.to != node(3)
}

#[test]
fn a_follower_that_does_not_answer_has_a_bounded_number_of_bytes_under_way() {
    let mut lab = Lab::new(3, config());
    lab.found(3..4, &[1, 2, 3]);
    let leader = lab.leader(3).unwrap();
    assert_ne!(leader, 3);
    let mut asked = Vec::new();
    for i in 0..200 {
        asked.push(lab.propose(leader, 3, command(i, 1000)));
        lab.settle_where(not_to_3);
        assert!(under_way(&lab, 3) <= WINDOW + MESSAGE, "{} bytes", under_way(&lab, 3));
    }
    // What is large and what is urgent travel apart.
    assert!(lab.mail.iter().all(|mail| mail.entry_bytes() == 0 || mail.class == Class::Append));
    // The others did not wait.
    for asked in asked {
        lab.outcome(asked).unwrap().unwrap();
    }
    // Small and large commands in turn: many small ones that are acknowledged together make room for few large ones.
    lab.settle();
    for round in 0..20 {
        for i in 0..100 {
            lab.propose(leader, 3, command(i, if round % 2 == 0 { 1 } else { 2000 }));
            lab.settle_where(not_to_3);
            assert!(under_way(&lab, 3) <= WINDOW + MESSAGE, "{} bytes", under_way(&lab, 3));
        }
        lab.deliver(|_| true);
        lab.settle_where(not_to_3);
        assert!(under_way(&lab, 3) <= WINDOW + MESSAGE, "{} bytes", under_way(&lab, 3));
    }
    lab.settle();
    assert_eq!(lab.status(3, 3).applied, lab.status(leader, 3).applied);
}

#[test]
fn a_follower_that_comes_back_is_not_sent_everything_at_once() {
    let mut lab = Lab::new(3, config());
    lab.found(3..4, &[1, 2, 3]);
    let leader = lab.leader(3).unwrap();
    for i in 0..300 {
        lab.propose(leader, 3, command(i, 1000));
        lab.settle_where(not_to_3);
        lab.mail.clear();
    }
    lab.at(leader).unreachable(node(3));
    for _ in 0..10_000 {
        let lag = lab.status(leader, 3).last_index - lab.status(3, 3).last_index;
        if lag == 0 {
            return;
        }
        lab.pass(1);
        for _ in 0..20 {
            assert!(under_way(&lab, 3) <= WINDOW + MESSAGE, "{} bytes", under_way(&lab, 3));
            lab.deliver(|_| true);
        }
    }
    panic!("the follower never caught up");
}

#[test]
fn the_groups_of_a_node_share_what_may_be_under_way_to_it_and_none_is_forgotten() {
    let mut lab = Lab::new(3, config());
    let groups = 3..23;
    lab.found(groups.clone(), &[1, 2, 3]);
    for i in 0..30 {
        for group in groups.clone() {
            let leader = lab.leader(group).unwrap();
            lab.propose(leader, group, command(i, 1000));
        }
        lab.settle_where(not_to_3);
        // Each of the two other nodes keeps to its own bound.
        for from in [1, 2] {
            let from_it = lab.mail.iter().filter(|mail| mail.from == node(from) && mail.to == node(3));
            let bytes: u64 = from_it.map(Mail::entry_bytes).sum();
            assert!(bytes <= 3 * WINDOW + MESSAGE, "{bytes} bytes from node {from}");
        }
    }
    // No time goes by: what was held back goes on as soon as there is room.
    lab.settle();
    for group in groups {
        let leader = lab.leader(group).unwrap();
        assert_eq!(lab.status(3, group).applied, lab.status(leader, group).applied, "group {group}");
    }
}

#[test]
fn a_follower_whose_engine_is_behind_takes_no_more_than_it_may_hold() {
    const UNAPPLIED: u64 = 64 << 10;
    let mut lab = Lab::new(3, Config { max_unapplied_bytes: UNAPPLIED, ..config() });
    lab.found(3..4, &[1, 2, 3]);
    let leader = lab.leader(3).unwrap();
    lab.frozen.insert(node(3));
    let before = lab.status(3, 3).last_index;
    for i in 0..300 {
        lab.propose(leader, 3, command(i, 1000));
        lab.settle();
    }
    // What it may hold, and what was under way when it had that.
    let taken = lab.status(3, 3).last_index - before;
    assert!((UNAPPLIED / 1100..=(UNAPPLIED + WINDOW + MESSAGE) / 1000).contains(&taken), "{taken} entries");
    assert_eq!(lab.status(leader, 3).applied, lab.status(leader, 3).last_index);
    // It is heard, and comes right.
    lab.tick(20);
    assert_eq!(lab.leader(3), Some(leader));
    lab.frozen.clear();
    lab.tick(30);
    assert_eq!(lab.status(3, 3).applied, lab.status(leader, 3).last_index);
}
