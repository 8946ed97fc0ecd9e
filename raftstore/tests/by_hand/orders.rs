//! Orders of moves that come late, and what may be relied on once the members were told.

use pontoon_proto::{GroupId, NodeId, ReplicaId, v1};
use pontoon_raftstore::{Answer, Config, Mandate, MemberChange, Rejected, Role};

use crate::lab::{Lab, Mail, node, replica};

const GROUP: u64 = 3;

fn lab() -> (Lab, u64) {
    let mut lab = Lab::new(3, Config::default());
    lab.found(GROUP..GROUP + 1, &[1, 2, 3]);
    let leader = lab.leader(GROUP).unwrap();
    (lab, leader)
}

fn learner() -> ReplicaId {
    replica(8)
}

/// An order of a driver's term, a move and a phase, by what is known of the leader now.
fn mandate(lab: &Lab, leader: u64, place: [u64; 3]) -> Mandate {
    Mandate { term: lab.status(leader, GROUP).term, place }
}

fn order(lab: &mut Lab, at: u64, change: MemberChange, mandate: Mandate) -> (NodeId, u64) {
    (node(at), lab.at(at).change_by(GroupId(GROUP), change, mandate))
}

fn ordered(lab: &mut Lab, at: u64, change: MemberChange, mandate: Mandate) -> Result<(), Rejected> {
    let asked = order(lab, at, change, mandate);
    lab.settle();
    match lab.answers.remove(&asked) {
        Some(Answer::Done(result)) => result,
        other => panic!("{other:?} answers an order"),
    }
}

fn members(lab: &mut Lab, at: u64, mandate: Mandate) -> (NodeId, u64) {
    (node(at), lab.at(at).members(GroupId(GROUP), mandate))
}

fn told(lab: &mut Lab, asked: (NodeId, u64)) -> Option<Result<v1::ConfState, Rejected>> {
    match lab.answers.remove(&asked)? {
        Answer::Members(result) => Some(result.map(|(conf, _)| conf)),
        other => panic!("{other:?} tells the members"),
    }
}

fn apart_from(id: u64) -> impl Fn(&Mail) -> bool {
    move |mail| mail.from != node(id) && mail.to != node(id)
}

#[test]
fn an_order_that_was_followed_by_a_later_one_is_refused() {
    let (mut lab, leader) = lab();
    let add = MemberChange::AddLearner(learner());
    let late = mandate(&lab, leader, [4, 7, 3]);
    ordered(&mut lab, leader, add.clone(), late).unwrap();
    // The move turns back; the order is repeated by the network when all is undone.
    let back = mandate(&lab, leader, [4, 7, 9]);
    ordered(&mut lab, leader, MemberChange::Remove(learner()), back).unwrap();
    let asked = members(&mut lab, leader, back);
    lab.settle();
    assert!(told(&mut lab, asked).unwrap().unwrap().learners.is_empty());
    let refused = ordered(&mut lab, leader, add.clone(), late).unwrap_err();
    assert!(matches!(refused, Rejected::Late { .. }), "{refused}");
    assert!(refused.to_string().contains("look at the group again"), "{refused}");
    assert!(lab.status(leader, GROUP).conf_state.learners.is_empty());
    // Of a driver that was followed by another, whatever the phase; of a move before.
    for place in [[3, 7, 30], [4, 6, 30]] {
        let refused = ordered(&mut lab, leader, add.clone(), Mandate { place, ..late });
        assert!(matches!(refused, Err(Rejected::Late { .. })), "{refused:?}");
    }
    ordered(&mut lab, leader, add, Mandate { place: [4, 8, 1], ..late }).unwrap();
}

#[test]
fn the_members_that_are_told_fence_what_was_ordered_before_and_never_arrived() {
    let (mut lab, leader) = lab();
    let now = mandate(&lab, leader, [4, 7, 9]);
    let asked = members(&mut lab, leader, now);
    lab.settle();
    told(&mut lab, asked).unwrap().unwrap();
    let late = mandate(&lab, leader, [4, 7, 8]);
    let refused = ordered(&mut lab, leader, MemberChange::AddLearner(learner()), late);
    assert!(matches!(refused, Err(Rejected::Late { .. })), "{refused:?}");
    let to = [1, 2, 3].into_iter().find(|id| *id != leader).unwrap();
    let asked = (node(leader), lab.at(leader).transfer_leader_by(GroupId(GROUP), replica(to), late));
    lab.settle();
    let answer = lab.answers.remove(&asked);
    assert!(matches!(answer, Some(Answer::Done(Err(Rejected::Late { .. })))), "{answer:?}");
}

#[test]
fn an_order_for_the_leader_of_another_term_is_refused() {
    let (mut lab, old) = lab();
    let before = mandate(&lab, old, [4, 7, 3]);
    let heir = [1, 2, 3].into_iter().find(|id| *id != old).unwrap();
    for to in [heir, old] {
        let from = lab.leader(GROUP).unwrap();
        lab.at(from).transfer_leader(GroupId(GROUP), replica(to));
        lab.tick(3);
        assert_eq!(lab.leader(GROUP), Some(to));
        // The second time it is the very replica that the order was meant for.
        let refused = ordered(&mut lab, to, MemberChange::AddLearner(learner()), before);
        assert!(matches!(refused, Err(Rejected::Late { .. })), "{refused:?}");
    }
    let now = mandate(&lab, old, [4, 7, 3]);
    ordered(&mut lab, old, MemberChange::AddLearner(learner()), now).unwrap();
}

#[test]
fn the_members_are_not_told_while_a_change_is_under_way() {
    let (mut lab, leader) = lab();
    let now = mandate(&lab, leader, [4, 7, 3]);
    order(&mut lab, leader, MemberChange::AddLearner(learner()), now);
    lab.turn(node(leader));
    let later = Mandate { place: [4, 7, 9], ..now };
    let asked = members(&mut lab, leader, later);
    lab.turn(node(leader));
    let refused = told(&mut lab, asked);
    assert!(matches!(refused, Some(Err(Rejected::Membership { .. }))), "{refused:?}");
    lab.settle();
    let asked = members(&mut lab, leader, later);
    lab.settle();
    assert_eq!(told(&mut lab, asked).unwrap().unwrap().learners, [learner().get()]);
}

#[test]
fn what_a_deposed_leader_took_is_lost_once_the_members_are_told() {
    let (mut lab, old) = lab();
    let cut_off = mandate(&lab, old, [4, 7, 3]);
    order(&mut lab, old, MemberChange::AddLearner(learner()), cut_off);
    lab.turn(node(old));
    lab.mail.clear();
    let fresh = loop {
        lab.pass(1);
        lab.settle_where(apart_from(old));
        let leads = |id: &u64| *id != old && lab.status(*id, GROUP).role == Role::Leader;
        if let Some(fresh) = [1, 2, 3].into_iter().find(leads) {
            break fresh;
        }
    };
    let now = mandate(&lab, fresh, [4, 7, 9]);
    let asked = members(&mut lab, fresh, now);
    lab.settle_where(apart_from(old));
    assert!(told(&mut lab, asked).unwrap().unwrap().learners.is_empty());
    // The one that was cut off asks nobody, and is not believed.
    let asked = members(&mut lab, old, Mandate { place: [4, 7, 9], ..cut_off });
    lab.turn(node(old));
    assert!(!matches!(told(&mut lab, asked), Some(Ok(_))));
    lab.tick(5);
    for id in [1, 2, 3] {
        assert!(lab.status(id, GROUP).conf_state.learners.is_empty());
    }
}

#[test]
fn a_question_for_a_hash_that_is_under_way_answers_all_who_ask() {
    let (mut lab, leader) = lab();
    let ask = |lab: &mut Lab, at: u64| {
        let asked = (node(at), lab.at(at).verify(GroupId(GROUP)));
        lab.turn(node(at));
        match lab.answers.remove(&asked) {
            Some(Answer::Index(index)) => index,
            other => panic!("{other:?} answers a question for a hash"),
        }
    };
    let first = ask(&mut lab, leader).unwrap();
    assert_eq!(ask(&mut lab, leader), Ok(first), "nobody has come to it yet");
    // It is lost with its leader: the next one asks anew.
    lab.mail.clear();
    let others = (1..4).filter(|id| *id != leader);
    let next = (0..100).find_map(|_| {
        lab.pass(1);
        lab.settle_where(apart_from(leader));
        others.clone().find(|id| lab.status(*id, GROUP).role == Role::Leader)
    });
    let next = next.expect("the others elect a leader");
    let second = ask(&mut lab, next).unwrap();
    lab.settle();
    let applied = lab.status(next, GROUP).applied;
    assert!(applied >= second, "{applied} of {second}");
    assert!(ask(&mut lab, next).unwrap() > second, "that one is answered: another is asked");
}
