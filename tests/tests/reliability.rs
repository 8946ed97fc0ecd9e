//! Faults that caught other systems, each by name, on simulated clusters with clients at work and every check of the
//! simulation on. The log's own cases are in `wal/tests/reliability.rs`.

use pontoon_proto::v1::MovePhase;
use pontoon_tests::sim::Scenario;

/// A node without a replica of the group.
fn free(scenario: &Scenario, group: u64) -> u64 {
    let voters = scenario.voters(group);
    (1..=5).find(|node| !voters.contains(node)).expect("five nodes, three voters")
}

fn follower(scenario: &Scenario, group: u64) -> u64 {
    let leader = scenario.leader(group);
    *scenario.voters(group).iter().find(|node| Some(**node) != leader).expect("three voters")
}

fn operations(scenario: &mut Scenario, more: u64) {
    let wanted = scenario.operations() + more;
    scenario.until("clients get on", |now| now.operations() >= wanted);
}

/// Begins to move the replica of a follower or of the leader; the source and the target.
fn begin_move(scenario: &mut Scenario, group: u64, leader_moves: bool) -> (u64, u64) {
    let target = free(scenario, group);
    let source = match leader_moves {
        true => scenario.leader(group).expect("it leads"),
        false => follower(scenario, group),
    };
    scenario.start_move(group, source, target);
    scenario.until("the move begins", |now| now.phase(group).is_some());
    (source, target)
}

#[test]
fn r13_a_crash_at_any_step_of_applying_repeats_nothing() {
    for seed in 0..4 {
        let mut scenario = Scenario::new(seed, 5, 2);
        for round in 0..40 {
            let node = 1 + (seed + round) % 5;
            scenario.pass(20 + 7 * (round % 5));
            scenario.crash(node, 3 + round % 4);
        }
        operations(&mut scenario, 200);
        scenario.finish();
    }
}

#[test]
fn r14_an_engine_that_loses_all_it_did_not_flush_is_brought_up_from_the_log() {
    let mut scenario = Scenario::new(3, 5, 2);
    for _ in 0..5 {
        operations(&mut scenario, 150);
        for node in 1..=5 {
            scenario.crash(node, 5);
        }
    }
    operations(&mut scenario, 100);
    scenario.finish();
}

#[test]
fn r15_an_engine_that_is_lost_is_seeded_from_the_others_while_votes_and_log_stay() {
    for moment in 0..12 {
        let mut scenario = Scenario::new(300 + moment, 5, 1);
        operations(&mut scenario, 250);
        let voters = scenario.voters(2);
        scenario.until("the log begins later", |now| {
            voters.iter().all(|node| now.status(2, *node).is_some_and(|status| status.first_index > 6))
        });
        for node in voters {
            let before = scenario.snapshots();
            scenario.lose_engine(node, 5);
            // The second time in the middle of it: what is staged is taken up again, or the switch is completed.
            scenario.until("it takes its state", |now| {
                let there = |s: pontoon_raftstore::GroupStatus| s.pull.is_some() || s.applied > 0;
                now.snapshots() > before || now.status(2, node).is_some_and(there)
            });
            scenario.pass(moment);
            scenario.crash(node, 5);
            scenario.until("it has its state", |now| {
                now.status(2, node).is_some_and(|status| status.applied > 0)
            });
            operations(&mut scenario, 30);
        }
        scenario.finish();
    }
}

#[test]
fn r16_a_replica_whose_state_is_ahead_of_its_log_is_dead_and_replaced() {
    let mut scenario = Scenario::new(7, 5, 2);
    let node = follower(&scenario, 2);
    let log = scenario.old_log(node);
    operations(&mut scenario, 300);
    // The engine has flushed what the old log does not hold.
    scenario.pass(500);
    scenario.set_back(node, &log);
    scenario.until("the replica is found dead", |now| now.dead() > 0);
    operations(&mut scenario, 100);
    scenario.finish();
}

#[test]
fn r17_a_crash_at_any_step_of_an_installation_leaves_the_old_state_or_the_new() {
    for moment in 0..24 {
        let mut scenario = Scenario::new(100 + moment, 5, 1);
        operations(&mut scenario, 60);
        let (_, target) = begin_move(&mut scenario, 2, false);
        scenario.until("the target takes a snapshot", |now| {
            now.status(2, target).is_some_and(|status| status.pull.is_some() || status.applied > 0)
        });
        scenario.pass(moment);
        scenario.crash(target, 30);
        scenario.until("the move ends", |now| now.phase(2).is_none());
        scenario.finish();
    }
}

#[test]
fn r18_remote_snapshot_over_a_divergent_tail() {
    for seed in 0..3 {
        let mut scenario = Scenario::new(40 + seed, 5, 1);
        operations(&mut scenario, 50);
        let old = scenario.leader(2).expect("it leads");
        let before = scenario.snapshots();
        // What clients still ask of the old leader stands in its log alone.
        scenario.isolate(old);
        scenario.until("another leads", |now| now.leader(2).is_some_and(|leader| leader != old));
        let behind = scenario.status(2, old).expect("it holds a replica").last_index;
        scenario.until("the others have truncated what it lacks", |now| {
            let status = now.leader(2).and_then(|leader| now.status(2, leader));
            status.is_some_and(|status| status.first_index > behind + 1)
        });
        scenario.heal();
        scenario.until("it takes a snapshot", |now| now.snapshots() > before);
        operations(&mut scenario, 50);
        scenario.finish();
    }
}

#[test]
fn r19_nobody_is_elected_by_members_of_before() {
    for seed in 0..4 {
        let mut scenario = Scenario::new(60 + seed, 5, 1);
        operations(&mut scenario, 30);
        let frozen = follower(&scenario, 2);
        scenario.freeze(frozen, true);
        let target = free(&scenario, 2);
        let leader = scenario.leader(2).expect("it leads");
        let source =
            *scenario.voters(2).iter().find(|node| ![leader, frozen].contains(node)).expect("a third");
        scenario.start_move(2, source, target);
        // The target votes, as the frozen one has not applied.
        scenario.until("the target votes", |now| now.voters(2).contains(&target));
        scenario.split(&[frozen, source]);
        scenario.pass(1_500);
        scenario.heal();
        scenario.freeze(frozen, false);
        operations(&mut scenario, 50);
        scenario.finish();
    }
}

#[test]
fn r20_a_change_of_members_survives_a_restart_of_anybody_at_any_time() {
    for moment in 0..16 {
        let mut scenario = Scenario::new(200 + moment, 5, 1);
        operations(&mut scenario, 30);
        let (source, target) = begin_move(&mut scenario, 2, moment % 2 == 0);
        scenario.until("the switch is near", |now| {
            now.phase(2).is_none_or(|phase| phase >= MovePhase::PreSwitch)
        });
        scenario.pass(moment * 2);
        let victim = match moment % 4 {
            0 => source,
            1 => target,
            2 => scenario.leader(2).unwrap_or(source),
            _ => scenario.leader(1).unwrap_or(target),
        };
        scenario.crash(victim, 40);
        scenario.until("the move ends", |now| now.phase(2).is_none());
        operations(&mut scenario, 20);
        scenario.finish();
    }
}

#[test]
fn r21_a_learner_votes_once_it_has_the_state_and_counts_from_then_on() {
    let mut scenario = Scenario::new(9, 5, 1);
    operations(&mut scenario, 100);
    let (source, target) = begin_move(&mut scenario, 2, false);
    // The simulation's checks see a voter without state; here it is to carry the group.
    scenario.until("the move ends", |now| now.phase(2).is_none());
    let voters = scenario.voters(2);
    assert!(voters.contains(&target) && !voters.contains(&source), "{voters:?}");
    let old = *voters.iter().find(|node| **node != target).expect("three voters");
    scenario.crash(old, 2_000);
    operations(&mut scenario, 50);
    scenario.finish();
}

#[test]
fn r22_a_removed_replica_does_not_come_back_with_delayed_messages() {
    for seed in 0..3 {
        let mut scenario = Scenario::new(80 + seed, 5, 1);
        operations(&mut scenario, 50);
        let target = free(&scenario, 2);
        let source = follower(&scenario, 2);
        scenario.capture(2, source);
        operations(&mut scenario, 50);
        scenario.start_move(2, source, target);
        scenario.until("the move begins", |now| now.phase(2).is_some());
        scenario.until("the source is to be fenced", |now| {
            now.phase(2).is_none_or(|phase| phase >= MovePhase::Fence)
        });
        scenario.pass(seed * 3);
        scenario.crash(source, 20);
        scenario.until("the move ends", |now| now.phase(2).is_none());
        let captured = scenario.captured();
        assert!(!captured.is_empty(), "nothing was on its way");
        for _ in 0..3 {
            scenario.replay(&captured);
            scenario.pass(200);
            assert!(scenario.status(2, source).is_none(), "it is there again");
        }
        scenario.crash(source, 20);
        scenario.pass(100);
        scenario.replay(&captured);
        operations(&mut scenario, 50);
        assert!(scenario.status(2, source).is_none(), "it is there again");
        scenario.finish();
    }
}

/// Whether what stands in for a node is heard by the leader of a group as a member.
fn is_heard(scenario: &Scenario, group: u64, node: u64) -> bool {
    let status = scenario.leader(group).and_then(|leader| scenario.status(group, leader));
    let heard = status.is_some_and(|status| {
        status.progress.iter().any(|member| member.replica.node().get() == node && member.active)
    });
    heard || scenario.leader(group) == Some(node)
}

/// What stands in for a node is refused by a peer and by the meta group, with the next step, and carries no group.
fn is_refused(scenario: &mut Scenario, node: u64) {
    let by_meta = "run `pontoon decommission";
    let by_peer = "decommission it and join";
    for words in [by_meta, by_peer] {
        scenario.until("it is refused", |now| now.refusals(node).iter().any(|said| said.contains(words)));
    }
    let replace = format!("--replace n{node}");
    assert!(scenario.refusals(node).iter().all(|said| said.contains(&replace)));
    scenario.pass(1_000);
    assert!(!scenario.is_vouched_for(node));
    assert!(!is_heard(scenario, 2, node), "it is taken for a member");
}

#[test]
fn r23_an_empty_disk_at_a_known_place_is_refused() {
    for seed in 0..3 {
        let mut scenario = Scenario::new(400 + seed, 5, 2);
        operations(&mut scenario, 50);
        let node = follower(&scenario, 2);
        scenario.until("it is itself", |now| now.is_vouched_for(node));
        scenario.forge(node, None);
        is_refused(&mut scenario, node);
        operations(&mut scenario, 50);
        scenario.finish();
    }
}

#[test]
fn r24_a_copy_beside_the_living_node_is_refused_by_everybody() {
    let mut scenario = Scenario::new(420, 5, 2);
    operations(&mut scenario, 50);
    for node in 1..=5 {
        scenario.until("it is itself", |now| now.is_vouched_for(node));
        let said = scenario.copy_beside(node);
        assert_eq!(said.len(), 5, "four peers and the meta group's leader: {said:?}");
        assert!(
            said.iter().all(|said| said.contains("is alive at") && said.contains("a copy of it")),
            "{said:?}"
        );
    }
    operations(&mut scenario, 50);
    scenario.finish();
}

#[test]
fn r25_an_old_image_is_refused() {
    for seed in 0..3 {
        let mut scenario = Scenario::new(440 + seed, 5, 2);
        operations(&mut scenario, 50);
        let node = follower(&scenario, 2);
        let image = scenario.old_disks(node);
        // It starts again, votes and acknowledges; the image knows nothing of that.
        scenario.crash(node, 20);
        scenario.until("it is there again", |now| now.is_vouched_for(node) && is_heard(now, 2, node));
        operations(&mut scenario, 200);
        scenario.forge(node, Some(&image));
        is_refused(&mut scenario, node);
        operations(&mut scenario, 50);
        scenario.finish();
    }
}

#[test]
fn a_restart_of_everybody_at_once_lets_everybody_vote() {
    for seed in 0..4 {
        let mut scenario = Scenario::new(460 + seed, 5, 2);
        operations(&mut scenario, 50);
        for _ in 0..3 {
            for node in 1..=5 {
                scenario.crash(node, 10 + 7 * node);
            }
            // Again before anybody was vouched for: a crash loop while the meta group has no leader.
            scenario.pass(60);
        }
        operations(&mut scenario, 100);
        for node in 1..=5 {
            scenario.until("it is vouched for", |now| now.is_vouched_for(node));
        }
        scenario.finish();
    }
}

#[test]
fn groups_go_on_and_a_node_returns_while_the_meta_group_is_lost() {
    let mut scenario = Scenario::new(470, 5, 4);
    operations(&mut scenario, 50);
    let meta = scenario.voters(1);
    // A group with one member on a meta voter's node at most keeps its majority.
    let lives = (2..=5).find(|group| {
        let lost = scenario.voters(*group).iter().filter(|node| meta[..2].contains(node)).count();
        lost == 0
    });
    for node in &meta[..2] {
        scenario.crash(*node, 4_000);
    }
    scenario.pass(1_500);
    assert_eq!(scenario.leader(1), None, "the meta group has lost its majority");
    operations(&mut scenario, 50);
    if let Some(group) = lives {
        // All others of its group are there to greet it: it counts again without the meta group's word.
        let node = follower(&scenario, group);
        scenario.crash(node, 20);
        scenario.until("it counts again", |now| is_heard(now, group, node));
        assert!(!scenario.is_vouched_for(node));
    }
    scenario.finish();
}

#[test]
fn r26_a_leader_that_stood_still_reads_nothing_old() {
    for seed in 0..6 {
        let mut scenario = Scenario::new(300 + seed, 5, 2);
        operations(&mut scenario, 50);
        for _ in 0..4 {
            let leader = scenario.leader(2).expect("it leads");
            scenario.jump(leader, if seed % 2 == 0 { 15_000 } else { -15_000 });
            // Reads that are on their way wait for it, and more come while it stands still.
            scenario.pause(leader, 100 + 250 * seed);
            scenario.pass(1_200);
            operations(&mut scenario, 40);
        }
        scenario.finish();
    }
}

#[test]
fn r35_power_is_cut_everywhere_at_once_again_and_again() {
    let mut scenario = Scenario::new(11, 5, 4);
    for round in 0..40 {
        scenario.pass(40 + 13 * (round % 7));
        for node in 1..=5 {
            scenario.crash(node, 1 + (round + node) % 5);
        }
    }
    operations(&mut scenario, 200);
    scenario.finish();
}
