//! Who a replica that started again must be known to before it promises anything.

use pontoon_proto::GroupId;
use pontoon_raftstore::Config;

use crate::lab::{Lab, node};

const GROUP: u64 = 3;

/// Of three voters one is lost for good, one has started again, and the third has greeted it.
fn one_lost_one_new(vouching_group: Option<GroupId>) -> Lab {
    let mut lab = Lab::new(3, Config { vouching_group, ..Config::default() });
    for id in 1..=3 {
        lab.at(id).vouched();
    }
    lab.found(GROUP..GROUP + 1, &[1, 2, 3]);
    lab.end(node(1));
    lab.strangers = true;
    lab.reboot(node(2));
    lab.at(2).accepted_by(node(3));
    lab
}

#[test]
fn a_replica_that_counts_on_a_lost_node_votes_once_its_own_is_vouched_for() {
    let mut lab = one_lost_one_new(Some(GroupId(1)));
    lab.tick(60);
    assert_eq!(lab.leader(GROUP), None, "not every other voter knows it, nor does anybody vouch for it");
    lab.at(2).vouched();
    lab.tick(60);
    let leader = lab.leader(GROUP).expect("two of three");
    let asked = lab.propose(leader, GROUP, "k=v");
    lab.settle();
    assert!(matches!(lab.outcome(asked), Some(Ok(_))));
}

#[test]
fn every_other_voter_stands_for_the_group_that_vouches_while_that_is_away() {
    let mut lab = one_lost_one_new(Some(GroupId(1)));
    lab.at(2).accepted_by(node(1));
    lab.tick(60);
    assert!(lab.leader(GROUP).is_some());
}

#[test]
fn a_quorum_is_enough_for_the_group_that_vouches_and_where_none_does() {
    for vouching in [Some(GroupId(GROUP)), None] {
        let mut lab = one_lost_one_new(vouching);
        lab.tick(60);
        assert!(lab.leader(GROUP).is_some(), "{vouching:?}");
    }
}

#[test]
fn nobody_votes_whom_nobody_knows() {
    for vouching in [Some(GroupId(1)), Some(GroupId(GROUP)), None] {
        let mut lab = Lab::new(3, Config { vouching_group: vouching, ..Config::default() });
        lab.found(GROUP..GROUP + 1, &[1, 2, 3]);
        lab.strangers = true;
        for id in 1..=3 {
            lab.reboot(node(id));
        }
        lab.tick(60);
        assert_eq!(lab.leader(GROUP), None, "{vouching:?}");
    }
}
