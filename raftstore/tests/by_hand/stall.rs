//! A disk that does not answer.

use std::collections::BTreeMap;

use pontoon_proto::GroupId;
use pontoon_raftstore::{Config, ReadLevel};

use crate::lab::{Lab, node};

const GROUPS: std::ops::Range<u64> = 3..27;
/// The default election timeout.
const TIMEOUT_TICKS: u64 = 10;

fn led_by(lab: &Lab, id: u64) -> Vec<u64> {
    GROUPS.filter(|group| lab.leader(*group) == Some(id)).collect()
}

#[test]
fn leaders_leave_a_disk_that_stalls_within_an_election_timeout_and_nobody_reads_the_past() {
    let mut lab = Lab::new(3, Config::default());
    lab.found(GROUPS, &[1, 2, 3]);
    let there = led_by(&lab, 1);
    assert!(!there.is_empty());

    lab.nodes[&node(1)].fs.hold(true);
    let mut acknowledged: BTreeMap<u64, u64> = BTreeMap::new();
    let mut asked = Vec::new();
    for tick in 0..50 {
        for group in &there {
            let leader = lab.leader(*group).unwrap();
            asked.push((*group, lab.propose(leader, *group, format!("k{tick}=v"))));
        }
        lab.tick(1);
        asked.retain(|(group, write)| match lab.outcome(*write) {
            Some(Ok(index)) => {
                let highest = acknowledged.entry(*group).or_default();
                *highest = index.max(*highest);
                false
            }
            Some(Err(_)) => false,
            None => true,
        });
        if tick + 1 >= TIMEOUT_TICKS {
            assert_eq!(led_by(&lab, 1), [], "tick {tick}");
        }
        // Whoever answers a read, the one with the stalled disk too, knows everything that was acknowledged before.
        let before = acknowledged.clone();
        let mut reads = Vec::new();
        for group in &there {
            for id in 1..=3 {
                reads.push((
                    *group,
                    (node(id), lab.at(id).read_barrier(GroupId(*group), ReadLevel::Linearizable)),
                ));
            }
        }
        lab.settle();
        let mut answered = 0;
        for (group, read) in reads {
            if let Some(Ok(index)) = lab.read_outcome(read) {
                answered += 1;
                assert!(Some(&index) >= before.get(&group), "group {group} at tick {tick}");
            }
        }
        assert!(
            tick < 2 * TIMEOUT_TICKS || answered >= there.len(),
            "{answered} reads answered at tick {tick}"
        );
    }
    for group in &there {
        assert!(acknowledged.contains_key(group), "nothing was written to group {group} during the stall");
    }

    // It comes back and has everything.
    lab.nodes[&node(1)].fs.hold(false);
    while lab.nodes[&node(1)].fs.complete_one() {}
    lab.tick(2 * TIMEOUT_TICKS);
    for group in GROUPS {
        let leader = lab.leader(group).unwrap();
        assert_eq!(lab.status(1, group).applied, lab.status(leader, group).applied, "group {group}");
        for tick in 0..50 {
            let row = |id: u64| lab.nodes[&node(id)].machines.row(GroupId(group), &format!("k{tick}"));
            assert_eq!(row(1), row(leader), "k{tick} of group {group}");
        }
    }
}

#[test]
fn a_group_without_another_voter_waits_for_its_disk() {
    let mut lab = Lab::new(1, Config::default());
    lab.found(3..4, &[1]);
    lab.nodes[&node(1)].fs.hold(true);
    let write = lab.propose(1, 3, "k=v");
    lab.tick(5 * TIMEOUT_TICKS);
    assert_eq!(lab.leader(3), Some(1));
    assert_eq!(lab.outcome(write), None);
    lab.nodes[&node(1)].fs.hold(false);
    while lab.nodes[&node(1)].fs.complete_one() {}
    lab.settle();
    assert!(matches!(lab.outcome(write), Some(Ok(_))));
}
