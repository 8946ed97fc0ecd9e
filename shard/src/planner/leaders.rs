//! Who should lead: a liked voter where a rule says so, and of equals the one whose node leads least.

use pontoon_proto::v1;

use super::world::World;

/// How many groups more than the mean a node may lead before some are passed on, as a share of the mean.
const SLACK: f64 = 0.05;

/// Transfers of leadership, each to a voter of the group as it is in `world`. None for groups whose leader is not known.
pub(super) fn transfers(world: &mut World<'_>) -> Vec<v1::PlannedTransfer> {
    let led = world.groups.iter().filter(|group| group.leader.is_some()).count();
    let mean = led as f64 / world.places.len().max(1) as f64;
    let most = (mean * (1.0 + SLACK)).ceil() as usize;
    let mut transfers = Vec::new();
    for at in 0..world.groups.len() {
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
        if !(is_liked_more || is_relief) {
            continue;
        }
        let (from, to) = (group.voters[leader].place, group.voters[best].place);
        transfers.push(v1::PlannedTransfer {
            group: group.id,
            predicate: group.predicate.to_owned(),
            from_node: world.places[from].id,
            to_node: world.places[to].id,
        });
        world.places[from].leads -= 1;
        world.places[to].leads += 1;
        world.groups[at].leader = Some(best);
    }
    transfers
}
