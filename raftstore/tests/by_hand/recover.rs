//! A group whose quorum is lost for good goes on with one replica.

use pontoon_proto::{GroupId, NodeId, ReplicaId, v1};
use pontoon_raftstore::{Answer, Config, Error, GroupSpec, MemberChange, Recovery, Role};
use pontoon_wal::sim::SimFs;

use crate::lab::{Lab, Mail, node, replica};

const GROUP: u64 = 3;
const SURVIVOR: u64 = 3;

fn heir() -> ReplicaId {
    ReplicaId::on(node(SURVIVOR), 1_000)
}

/// Three nodes and a group that the first one leads, with a row that all have.
fn lab() -> Lab {
    let mut lab = Lab::new(3, Config::default());
    lab.found(GROUP..GROUP + 1, &[1, 2, 3]);
    assert_eq!(lab.leader(GROUP), Some(1), "the first in rank leads");
    let asked = lab.propose(1, GROUP, "a=1");
    lab.tick(3);
    lab.outcome(asked).expect("an outcome").expect("applied");
    lab
}

/// The first two nodes are lost, and the third has noticed.
fn lose(lab: &mut Lab) {
    lab.mail.clear();
    for id in [1, 2] {
        lab.end(node(id));
    }
    lab.tick(60);
    assert_eq!(lab.status(SURVIVOR, GROUP).leader, None);
}

fn recovery(lab: &Lab) -> Recovery {
    let status = lab.status(SURVIVOR, GROUP);
    let term = lab.last_term(SURVIVOR, GROUP);
    Recovery { from: status.replica, to: heir(), last: (term, status.last_index) }
}

fn answer(lab: &mut Lab, token: u64) -> Option<Result<ReplicaId, Error>> {
    match lab.answers.remove(&(node(SURVIVOR), token))? {
        Answer::Replica(result) => Some(result),
        other => panic!("{other:?} answers a recovery"),
    }
}

fn recover(lab: &mut Lab, recovery: Recovery) -> Result<ReplicaId, Error> {
    let token = lab.at(SURVIVOR).recover(GroupId(GROUP), recovery);
    lab.settle();
    answer(lab, token).expect("an answer")
}

fn row(lab: &Lab, id: u64, key: &str) -> Option<String> {
    lab.nodes[&node(id)].machines.row(GroupId(GROUP), key)
}

fn goes_on_alone(lab: &mut Lab) {
    lab.tick(3);
    let status = lab.status(SURVIVOR, GROUP);
    assert_eq!((status.replica, status.role), (heir(), Role::Leader));
    assert_eq!(status.conf_state, v1::ConfState { voters: vec![heir().get()], ..Default::default() });
    let asked = lab.propose(SURVIVOR, GROUP, "b=2");
    lab.tick(2);
    lab.outcome(asked).expect("an outcome").expect("applied");
    assert_eq!(row(lab, SURVIVOR, "b").as_deref(), Some("2"));
    assert_eq!(row(lab, SURVIVOR, "a").as_deref(), Some("1"));
}

#[test]
fn the_survivor_goes_on_with_all_that_its_log_holds() {
    let mut lab = lab();
    // The leader was about to commit this one: the survivor has it and was never told.
    lab.propose(1, GROUP, "tail=7");
    lab.turn_all();
    lab.deliver(|mail| mail.to == node(SURVIVOR) && mail.raft().is_some());
    let before = lab.status(SURVIVOR, GROUP);
    assert!(before.last_index > before.commit, "{before:?}");
    lose(&mut lab);
    let term = lab.status(SURVIVOR, GROUP).term;
    let recovery = recovery(&lab);
    assert_eq!(recover(&mut lab, recovery).unwrap(), heir());
    goes_on_alone(&mut lab);
    assert_eq!(row(&lab, SURVIVOR, "tail").as_deref(), Some("7"));
    assert!(lab.status(SURVIVOR, GROUP).term > term + 1_000, "no term of the lost ones comes up to it");
    // Asked again, and after a restart.
    assert_eq!(recover(&mut lab, recovery).unwrap(), heir());
    lab.reboot(node(SURVIVOR));
    lab.tick(3);
    assert_eq!(lab.status(SURVIVOR, GROUP).role, Role::Leader);
    assert_eq!(row(&lab, SURVIVOR, "tail").as_deref(), Some("7"));
}

#[test]
fn it_is_refused_to_one_that_is_not_as_planned() {
    let mut lab = lab();
    let planned = recovery(&lab);
    let refused = recover(&mut lab, planned).unwrap_err().to_string();
    assert!(refused.contains("leads the group") && refused.contains("make a new plan"), "{refused}");
    lose(&mut lab);
    let wrong = [
        (Recovery { last: (planned.last.0, planned.last.1 - 1), ..planned }, "has gone on to entry"),
        (Recovery { last: (planned.last.0 + 1, planned.last.1), ..planned }, "has gone on to entry"),
        (Recovery { from: replica(2), ..planned }, "the replica here is"),
        (Recovery { to: ReplicaId::on(node(2), 9), ..planned }, "the replica here is"),
    ];
    for (recovery, reason) in wrong {
        let refused = recover(&mut lab, recovery).unwrap_err().to_string();
        assert!(refused.contains(reason), "{refused}");
    }
    let token = lab.at(SURVIVOR).recover(GroupId(77), planned);
    lab.settle();
    let refused = answer(&mut lab, token).expect("an answer").unwrap_err().to_string();
    assert!(refused.contains("there is no replica of the group here"), "{refused}");
    assert_eq!(lab.status(SURVIVOR, GROUP).replica, replica(SURVIVOR));
    recover(&mut lab, planned).unwrap();
}

#[test]
fn changes_that_the_lost_group_had_under_way_count_for_nothing() {
    let mut lab = lab();
    lab.at(1).change(GroupId(GROUP), MemberChange::AddLearner(replica(8)));
    lab.turn(node(1));
    lab.deliver(|mail| mail.to == node(SURVIVOR) && mail.raft().is_some());
    let before = lab.status(SURVIVOR, GROUP);
    assert!(before.last_index > before.commit, "{before:?}");
    lose(&mut lab);
    let recovery = recovery(&lab);
    recover(&mut lab, recovery).unwrap();
    goes_on_alone(&mut lab);
    // Nor after a restart, before and after which the entry is applied again.
    lab.reboot(node(SURVIVOR));
    goes_on_alone_after_a_restart(&mut lab);
}

fn goes_on_alone_after_a_restart(lab: &mut Lab) {
    lab.tick(3);
    let status = lab.status(SURVIVOR, GROUP);
    assert_eq!(status.conf_state, v1::ConfState { voters: vec![heir().get()], ..Default::default() });
    assert_eq!(status.role, Role::Leader);
}

#[test]
fn a_crash_leaves_the_old_replica_or_the_new_one() {
    // The log takes the batch, or the power goes before it does: asked and not stepped.
    for durable in [false, true] {
        let mut lab = lab();
        lose(&mut lab);
        let planned = recovery(&lab);
        lab.at(SURVIVOR).recover(GroupId(GROUP), planned);
        // The engine's mark names the old replica in either case.
        lab.frozen.insert(node(SURVIVOR));
        if durable {
            lab.turn(node(SURVIVOR));
        } else {
            lab.at(SURVIVOR).turn();
        }
        lab.frozen.clear();
        let disk = SimFs::from_image(&lab.nodes[&node(SURVIVOR)].fs.image());
        lab.end(node(SURVIVOR));
        disk.crash(7);
        lab.start(node(SURVIVOR), disk);
        lab.tick(3);
        let expected = if durable { heir() } else { replica(SURVIVOR) };
        assert_eq!(lab.status(SURVIVOR, GROUP).replica, expected);
        assert_eq!(row(&lab, SURVIVOR, "a").as_deref(), Some("1"), "durable: {durable}");
        lab.tick(60);
        recover(&mut lab, planned).unwrap();
        goes_on_alone(&mut lab);
    }
}

#[test]
fn the_lost_ones_come_back_and_nobody_hears_them() {
    let mut lab = lab();
    let disks: Vec<(NodeId, _)> = [1, 2].map(|id| (node(id), lab.nodes[&node(id)].fs.clone())).into();
    lose(&mut lab);
    let planned = recovery(&lab);
    recover(&mut lab, planned).unwrap();
    goes_on_alone(&mut lab);
    for (id, fs) in disks {
        lab.start(id, fs);
    }
    // They are a quorum of the group that was; what they say to the third, and what it says, is for replicas that are no more.
    lab.tick(60);
    let status = lab.status(SURVIVOR, GROUP);
    assert_eq!((status.replica, status.role), (heir(), Role::Leader));
    let asked = lab.propose(SURVIVOR, GROUP, "c=3");
    lab.tick(3);
    lab.outcome(asked).expect("an outcome").expect("applied");
    assert_eq!(row(&lab, 1, "c"), None);
    assert!(
        lab.events.iter().all(|(_, event)| !format!("{event:?}").contains("ReplicaDead")),
        "{:?}",
        lab.events
    );
}

#[test]
fn a_new_member_gets_the_state_and_not_the_old_changes() {
    let mut lab = lab();
    lab.at(1).change(GroupId(GROUP), MemberChange::AddLearner(replica(8)));
    lab.turn(node(1));
    lab.deliver(|mail: &Mail| mail.to == node(SURVIVOR) && mail.raft().is_some());
    lose(&mut lab);
    let planned = recovery(&lab);
    recover(&mut lab, planned).unwrap();
    goes_on_alone(&mut lab);
    let (fs, machines) = Default::default();
    lab.boot(node(4), fs, machines);
    let joins = ReplicaId::on(node(4), 1_001);
    let spec = GroupSpec {
        group: GroupId(GROUP),
        replica: joins,
        descriptor: Default::default(),
        epoch: 1,
        initial: None,
    };
    lab.at(4).create_group(spec);
    lab.at(SURVIVOR).change(GroupId(GROUP), MemberChange::AddLearner(joins));
    for _ in 0..100 {
        lab.tick(1);
    }
    lab.at(SURVIVOR).change(GroupId(GROUP), MemberChange::Promote(joins));
    lab.tick(5);
    let expected = v1::ConfState { voters: vec![heir().get(), joins.get()], ..Default::default() };
    for id in [SURVIVOR, 4] {
        assert_eq!(lab.status(id, GROUP).conf_state, expected);
        assert_eq!(row(&lab, id, "a").as_deref(), Some("1"));
    }
}
