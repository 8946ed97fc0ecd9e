//! What a run is: its seed, its size, and how hard it is.

use super::operator::REPLICAS;
use crate::Rng;

/// A run. The same plan gives the same run, to the letter.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Where all chance comes from.
    pub seed: u64,
    /// Nodes at first.
    pub nodes: u64,
    /// Predicates, each a group; the meta group comes on top.
    pub groups: u64,
    /// Voters of each predicate.
    pub replicas: u32,
    /// How long faults strike, in milliseconds of the simulation.
    pub steps: u64,
    /// Whether leaders read by a lease.
    pub lease: bool,
    /// How long a node may be silent until nobody waits for it, in milliseconds; 0: for ever.
    pub repair_after_ms: u64,
    /// Whether it is [`Plan::of_moves`]: whoever replays it says so.
    pub of_moves: bool,
    /// Whether faults also strike at moments that the seed picks: see [`super::Coverage`].
    pub aims: bool,
    /// How hard.
    pub faults: Faults,
}

impl Plan {
    /// A run of which the seed decides the faults, too: some kinds are left out, the others come often or seldom.
    pub fn drawn(seed: u64, nodes: u64, groups: u64) -> Plan {
        let mut rng = Rng::new(seed ^ 0x0066_6175_6c74_7300);
        let mut often = |most: u64| if rng.chance(700) { 1 + rng.below(most) } else { 0 };
        let (loss, duplicate) = (often(40), often(40));
        let faults = Faults {
            loss,
            duplicate,
            held_up: duplicate,
            clog: often(150),
            partition: often(100),
            one_way: often(80),
            crash: often(100),
            kill: often(60),
            pause: often(80),
            jump: often(60),
            stall: often(100),
            io: often(40),
            no_space: often(40),
            rot: often(25),
            lost: often(25),
            moves: 100 + often(600),
            drains: often(60),
            plans: often(40),
        };
        let repair_after_ms = if rng.chance(600) { 500 + rng.below(2_500) } else { 0 };
        let lease = rng.chance(300);
        Plan {
            seed,
            nodes,
            groups,
            replicas: REPLICAS,
            steps: 6_000,
            lease,
            repair_after_ms,
            of_moves: false,
            aims: true,
            faults,
        }
    }

    /// A small run that is about moves: many at a time, whatever else happens.
    pub fn of_moves(seed: u64) -> Plan {
        let plan = Plan::drawn(seed, 5, 8);
        let faults = Faults { moves: 4_000, drains: 200, plans: 60, ..plan.faults };
        Plan { steps: 4_000, of_moves: true, faults, ..plan }
    }
}

/// How often what goes wrong: messages in permille, everything else per 100,000 steps.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// Messages lost.
    pub loss: u64,
    /// Messages that arrive twice, the second time later.
    pub duplicate: u64,
    /// Drivers' calls, and answers to them, that are held up on their way.
    pub held_up: u64,
    /// A link delays everything for a while.
    pub clog: u64,
    /// A node is cut off, both ways.
    pub partition: u64,
    /// A node is heard by nobody, or hears nobody.
    pub one_way: u64,
    /// Power cuts: what was not synced is torn, reordered, lost.
    pub crash: u64,
    /// Processes killed: what was written stays.
    pub kill: u64,
    /// Processes that stop for a while and go on.
    pub pause: u64,
    /// A node's wall clock jumps.
    pub jump: u64,
    /// A disk completes nothing for a while, then in any order.
    pub stall: u64,
    /// A write or a sync fails.
    pub io: u64,
    /// A disk is full for a while.
    pub no_space: u64,
    /// Bits of a log flip while its node is down.
    pub rot: u64,
    /// A node loses its disks and is replaced by another.
    pub lost: u64,
    /// Replicas that the operator moves, adds or removes.
    pub moves: u64,
    /// Nodes that the operator drains, or takes into use again.
    pub drains: u64,
    /// Plans by which nodes are used more evenly.
    pub plans: u64,
}
