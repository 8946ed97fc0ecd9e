//! Who should lead: a liked voter where a rule says so, and of equals the one whose node leads least; then the one whose node has
//! less to do for what it leads.

use std::{cmp::Reverse, collections::BTreeSet};

use pontoon_proto::v1;

use super::{
    balance::{GOAL, THRESHOLD},
    world::World,
};

/// How many groups more than the mean a node may lead before some are passed on, as a share of the mean.
const SLACK: f64 = 0.05;
/// Below so many reads and writes per second on average, what nodes do for the groups that they lead is of no interest.
const IDLE: f64 = 10.0;

/// Transfers of leadership, each to a voter of the group as it is in `world`, at most one per group. None for groups whose leader is
/// not known.
pub(super) fn transfers(world: &mut World<'_>) -> Vec<v1::PlannedTransfer> {
    let mut passed = Vec::new();
    even_load(world, &mut passed);
    let busy: BTreeSet<usize> = passed.iter().map(|(at, _)| *at).collect();
    let led = world.groups.iter().filter(|group| group.leader.is_some()).count();
    let mean = led as f64 / world.places.len().max(1) as f64;
    let most = (mean * (1.0 + SLACK)).ceil() as usize;
    let mut order: Vec<usize> = (0..world.groups.len()).filter(|at| !busy.contains(at)).collect();
    // Those of which least is asked are passed on first: what nodes do for the others stays even.
    order.sort_by_key(|at| led_of(world, *at));
    for at in order {
        let group = &world.groups[at];
        let Some(leader) = group.leader else { continue };
        let rule = group.rule;
        let rank = |voter: usize| {
            let place = group.voters[voter].place;
            (!rule.likes_leader(world.node(place)), world.places[place].leads)
        };
        let known = (0..group.voters.len()).filter(|voter| group.voters[*voter].place < world.places.len());
        let Some(best) = known.min_by_key(|voter| (rank(*voter), *voter)) else { continue };
        let (now, then) = (rank(leader), rank(best));
        let is_liked_more = now.0 && !then.0;
        // Only what evens is worth a change: a leader that goes to a node that leads as many comes back the next time.
        let is_relief = now.0 == then.0 && now.1 > most && then.1 + 1 < now.1;
        if is_liked_more || is_relief {
            pass(world, &mut passed, at, best);
        }
    }
    passed.sort_by_key(|(at, _)| *at);
    passed.into_iter().map(|(_, transfer)| transfer).collect()
}

fn led_of(world: &World<'_>, at: usize) -> u64 {
    let load = world.groups[at].load;
    load.writes + load.reads
}

fn pass(world: &mut World<'_>, passed: &mut Vec<(usize, v1::PlannedTransfer)>, at: usize, to_voter: usize) {
    let group = &world.groups[at];
    let Some(leader) = group.leader else { return };
    let (from, to) = (group.voters[leader].place, group.voters[to_voter].place);
    let transfer = v1::PlannedTransfer {
        group: group.id,
        predicate: group.predicate.to_owned(),
        from_node: world.places[from].id,
        to_node: world.places[to].id,
    };
    let led = led_of(world, at);
    world.places[from].leads -= 1;
    world.places[from].led -= led;
    world.places[to].leads += 1;
    world.places[to].led += led;
    world.groups[at].leader = Some(to_voter);
    passed.push((at, transfer));
}

/// Passes leadership from nodes that do most for what they lead to voters on nodes that do less. Begins where one does more than
/// [`THRESHOLD`] above the mean and ends at [`GOAL`]. Groups that one of their voters should lead by a rule are left to that, and
/// those of which little is asked are not worth it: where few groups are busy it never gets even, and would go on for ever.
fn even_load(world: &mut World<'_>, passed: &mut Vec<(usize, v1::PlannedTransfer)>) {
    let mean =
        world.places.iter().map(|place| place.led as f64).sum::<f64>() / world.places.len().max(1) as f64;
    let highest = world.places.iter().map(|place| place.led as f64).fold(0.0, f64::max);
    if mean < IDLE || highest <= mean * (1.0 + THRESHOLD) {
        return;
    }
    let is_busy = |at: &usize| led_of(world, *at) as f64 > mean * GOAL;
    let mut busy: Vec<usize> = (0..world.groups.len()).filter(is_busy).collect();
    busy.sort_by_key(|at| (Reverse(led_of(world, *at)), *at));
    for at in busy {
        let (group, led) = (&world.groups[at], led_of(world, at));
        let Some(leader) = group.leader else { continue };
        let from = group.voters[leader].place;
        if from >= world.places.len() || world.places[from].led as f64 <= mean * (1.0 + GOAL) {
            continue;
        }
        let is_there = |voter: &usize| group.voters[*voter].place < world.places.len();
        let likes = |voter: usize| group.rule.likes_leader(world.node(group.voters[voter].place));
        if (0..group.voters.len()).filter(is_there).any(likes) {
            continue;
        }
        let fits = |voter: &usize| {
            let place = group.voters[*voter].place;
            place != from && world.places[place].led + led < world.places[from].led
        };
        let best = (0..group.voters.len()).filter(is_there).filter(fits);
        if let Some(best) = best.min_by_key(|voter| (world.places[group.voters[*voter].place].led, *voter)) {
            pass(world, passed, at, best);
        }
    }
}
