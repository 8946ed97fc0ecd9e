//! Plans that count what is asked of groups.

#[path = "support/meta.rs"]
#[allow(dead_code, reason = "shared by several tests")]
mod support;

use pontoon_proto::{
    ReplicaId,
    v1::{self, MovePhase},
};
use pontoon_shard::{
    MetaState,
    planner::{self, By, Limits, Load, Seen},
};
use support::{cluster, replica};

/// The same groups with writes and reads per second.
fn with_loads(seen: Seen, loads: &[(u64, u64)]) -> Seen {
    let loads = loads
        .iter()
        .zip(2..)
        .map(|((writes, reads), group)| (group, Load { writes: *writes, reads: *reads }));
    Seen { loads: loads.filter(|(_, load)| load.writes + load.reads > 0).collect(), ..seen }
}

/// Three nodes that hold the same in bytes, of which the first bears nearly all writes.
fn uneven_load() -> (MetaState, Seen) {
    let groups: Vec<(u64, [u64; 1])> = (0..300).map(|n| (10, [1 + n % 3])).collect();
    let groups: Vec<(u64, &[u64])> = groups.iter().map(|(bytes, nodes)| (*bytes, &nodes[..])).collect();
    let (state, seen) = cluster(&[1 << 20; 3], &groups);
    let loads: Vec<(u64, u64)> = (0..300).map(|n| (if n % 3 == 0 { 12 } else { 1 }, 0)).collect();
    (state, with_loads(seen, &loads))
}

#[test]
fn load_is_made_even_where_it_differs_and_bytes_stay_as_even_as_they_need_be() {
    let (state, seen) = uneven_load();
    let by_bytes = planner::balance_by(&state, &seen, Limits::default(), By::Bytes, 0);
    assert!(by_bytes.moves.is_empty(), "bytes are even: {:?}", by_bytes.moves);
    assert!(by_bytes.load_spread_before > 1_000);
    for by in [By::Load, By::Both] {
        let plan = planner::balance_by(&state, &seen, Limits::default(), by, 0);
        assert!(!plan.moves.is_empty() && plan.load_spread_after < plan.load_spread_before, "{plan:?}");
        assert!(plan.moves[0].reason.contains("writes/s"), "{}", plan.moves[0].reason);
        let used: Vec<u64> = plan.nodes.iter().map(|node| node.used_after).collect();
        assert!(
            used.iter().all(|used| (950..=1_050).contains(used)),
            "5 % around the mean of 1,000: {used:?}"
        );
    }
}

#[test]
fn load_moves_replicas_as_far_as_it_may_and_what_was_moved_does_not_come_back() {
    // Rows are few, so that bytes are no hindrance.
    let groups: Vec<(u64, [u64; 1])> = (0..60).map(|n| (0, [1 + n % 3])).collect();
    let groups: Vec<(u64, &[u64])> = groups.iter().map(|(bytes, nodes)| (*bytes, &nodes[..])).collect();
    let (state, seen) = cluster(&[1 << 20; 3], &groups);
    let loads: Vec<(u64, u64)> = (0..60).map(|n| (if n % 3 == 0 { 60 } else { 3 }, 0)).collect();
    let seen = with_loads(seen, &loads);
    let plan = planner::balance(&state, &seen, Limits::default(), 1_000);
    assert!(plan.load_spread_after <= 140, "one busy group is 136 of the mean: {}", plan.load_spread_after);
    let mut map = state.to_map();
    for mv in &plan.moves {
        let shard = map.shards.iter_mut().find(|shard| shard.group == mv.group).unwrap();
        shard.voters = vec![replica(mv.target_node, 2)];
        map.moves.push(v1::Move {
            id: mv.group,
            group: mv.group,
            source: mv.source,
            target: shard.voters[0],
            phase: MovePhase::Done.into(),
            finished_ms: 1_000,
            ..Default::default()
        });
    }
    // All that was busy falls idle, and the other way round: within the hour nothing returns to where it was.
    let loads: Vec<(u64, u64)> = (0..60).map(|n| (if n % 3 == 0 { 0 } else { 60 }, 0)).collect();
    let seen = with_loads(seen, &loads);
    let again = planner::balance(&MetaState::of_map(map), &seen, Limits::default(), 3_600_000);
    for mv in &again.moves {
        let before = plan.moves.iter().find(|before| before.group == mv.group);
        let left = before.map(|before| ReplicaId::new(before.source).unwrap().node().get());
        assert_ne!(left, Some(mv.target_node), "{mv:?}");
    }
}

#[test]
fn a_little_more_load_here_than_there_moves_nothing_by_itself() {
    let groups: Vec<(u64, [u64; 1])> = (0..30).map(|n| (100, [1 + n % 3])).collect();
    let groups: Vec<(u64, &[u64])> = groups.iter().map(|(bytes, nodes)| (*bytes, &nodes[..])).collect();
    let (state, seen) = cluster(&[1 << 20; 3], &groups);
    // 210, 200 and 200 writes per second.
    let loads: Vec<(u64, u64)> = (0..30).map(|n| (if n % 3 == 0 { 21 } else { 20 }, 0)).collect();
    let little = with_loads(seen.clone(), &loads);
    assert!(planner::balance(&state, &little, Limits::default(), 0).moves.is_empty());
    // Twenty times as much here as there, and yet next to nothing.
    let loads: Vec<(u64, u64)> = (0..30).map(|n| (u64::from(n == 0), 0)).collect();
    let plan = planner::balance(&state, &with_loads(seen, &loads), Limits::default(), 0);
    assert_eq!((plan.moves.len(), plan.load_spread_before), (0, 0));
}

#[test]
fn leaders_are_spread_by_what_is_asked_of_them_and_stay_where_they_then_are() {
    // As many leaders on each node, but those of the first have nearly everything to do.
    let groups: Vec<(u64, [u64; 3])> =
        (0..30u64).map(|n| (100, [1 + n % 3, 1 + (n + 1) % 3, 1 + (n + 2) % 3])).collect();
    let groups: Vec<(u64, &[u64])> = groups.iter().map(|(bytes, nodes)| (*bytes, &nodes[..])).collect();
    let (state, seen) = cluster(&[1 << 20; 3], &groups);
    let loads: Vec<(u64, u64)> = (0..30).map(|n| if n % 3 == 0 { (10, 90) } else { (0, 4) }).collect();
    let mut seen = with_loads(seen, &loads);
    let led = |seen: &Seen| -> Vec<u64> {
        let of = |node: u64| {
            let led = seen.groups.iter().filter(|(_, group)| group.leader == node);
            led.map(|(id, _)| seen.loads.get(id).map_or(0, |load| load.writes + load.reads)).sum()
        };
        (1..=3).map(of).collect()
    };
    let before = led(&seen);
    let plan = planner::balance(&state, &seen, Limits::default(), 0);
    assert!(plan.moves.is_empty(), "each node bears the same writes");
    assert!(!plan.transfers.is_empty());
    for transfer in &plan.transfers {
        seen.groups.get_mut(&transfer.group).unwrap().leader = transfer.to_node;
    }
    let after = led(&seen);
    assert!(after.iter().max() < before.iter().max(), "{before:?} {after:?}");
    let leads: Vec<u64> = plan.nodes.iter().map(|node| node.leads_before).collect();
    assert_eq!(leads, [10, 10, 10]);
    let again = planner::balance(&state, &seen, Limits::default(), 0);
    assert!(again.transfers.is_empty(), "{:?}", again.transfers);
}
