//! Very many groups on a node: none waits for all the others.

use pontoon_proto::GroupId;
use pontoon_raftstore::{Config, ProposeError, ReadLevel, Rejected, Role};

use crate::lab::{Lab, node};

/// More than are opened in a tick, and more than the clock visits in a turn.
const CROWD: u64 = 1_300;
/// Those that are opened in a tick.
const AT_ONCE: u64 = 500;

/// What a node may take to pass on as many leaderships as wake in a tick, while nothing else happens.
const DRAIN_TICKS: u64 = 10;

fn leaders(lab: &Lab, id: u64) -> u64 {
    let leads = |group: u64| {
        let status = lab.nodes[&node(id)].stepped.status(GroupId(group));
        status.is_some_and(|status| status.role == Role::Leader)
    };
    (2..2 + CROWD).filter(|group| leads(*group)).count() as u64
}

#[test]
fn groups_come_up_some_in_each_tick() {
    let mut lab = Lab::new(1, Config::default());
    for group in 2..2 + CROWD {
        lab.found_again(group, 1, &[1]);
    }
    lab.settle();
    let open = |lab: &Lab| (2..2 + CROWD).filter(|group| lab.is_open(1, *group)).count() as u64;
    assert_eq!(open(&lab), AT_ONCE);
    lab.tick(1);
    assert_eq!(open(&lab), 2 * AT_ONCE);
    lab.tick(1);
    assert_eq!(open(&lab), CROWD);
    // The clock comes to all of them.
    lab.tick(1);
    assert_eq!(leaders(&lab, 1), CROWD);
}

#[test]
fn a_group_that_is_asked_for_comes_up_before_its_turn() {
    let mut lab = Lab::new(1, Config::default());
    lab.found(2..2 + CROWD, &[1]);
    lab.reboot(node(1));
    let last = 1 + CROWD;
    assert!(!lab.is_open(1, last), "it waits for its turn");
    let asked = lab.propose(1, last, "k=v");
    lab.turn_all();
    let rejected = Rejected::NotLeader { group: GroupId(last), leader: None };
    assert_eq!(lab.outcome(asked), Some(Err(ProposeError::Rejected(rejected))), "nobody leads it yet");
    assert!(lab.is_open(1, last));
    assert!(!lab.is_open(1, last - 1));
    lab.tick(1);
    let asked = lab.propose(1, last, "k=v");
    lab.settle();
    assert!(matches!(lab.outcome(asked), Some(Ok(_))));
    // A read brings one up, too.
    lab.at(1).read_barrier(GroupId(last - 1), ReadLevel::Linearizable);
    lab.turn_all();
    assert!(lab.is_open(1, last - 1));
}

#[test]
fn a_word_of_a_peer_brings_its_group_up() {
    let mut lab = Lab::new(3, Config::default());
    let last = 1 + CROWD;
    lab.found([last].into_iter(), &[1, 2, 3]);
    for group in 2..last {
        lab.found_again(group, 2, &[2]);
    }
    lab.tick(5);
    let leader = lab.leader(last).unwrap();
    lab.reboot(node(2));
    assert!(!lab.is_open(2, last));
    let other = if leader == 2 { 1 } else { leader };
    // Whoever leads, or wants to, speaks to its members.
    for _ in 0..30 {
        if lab.is_open(2, last) {
            break;
        }
        let fits = |mail: &crate::lab::Mail| mail.from == node(other) || mail.to == node(other);
        lab.pass_on(other, 1);
        lab.settle_where(fits);
    }
    assert!(lab.is_open(2, last), "without a tick of its own");
}

#[test]
fn a_node_that_is_to_lead_nothing_passes_sleeping_groups_on() {
    let mut lab = Lab::new(3, Config::default());
    let groups = 2..2 + AT_ONCE / 5;
    lab.found(groups.clone(), &[1, 2, 3]);
    let asleep = |lab: &Lab| {
        groups.clone().all(|group| lab.leader(group).is_some_and(|id| lab.status(id, group).sleeping))
    };
    (1..=3).for_each(|id| lab.at(id).flush().unwrap());
    lab.tick(60);
    assert!(asleep(&lab));
    let led = |lab: &Lab| groups.clone().filter(|group| lab.leader(*group) == Some(1)).count();
    assert!(led(&lab) > 10);
    lab.at(1).shun_leadership(true);
    lab.settle();
    for _ in 0..DRAIN_TICKS {
        lab.tick(1);
    }
    assert_eq!(led(&lab), 0);
    // A group that nobody else can lead sleeps all the same.
    lab.found([1_000].into_iter(), &[1]);
    lab.at(1).flush().unwrap();
    lab.tick(60);
    assert!(lab.status(1, 1_000).sleeping);
}
