//! One run, from its plan to its report.

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
};

use super::{coverage::Coverage, node::TICK_MS, plan::Plan, world::World};

/// What a run did, if nothing went wrong.
#[derive(Debug, Clone)]
pub struct Report {
    /// The plan's seed.
    pub seed: u64,
    /// A hash of all that happened: equal for equal plans.
    pub hash: u64,
    /// How long the run took, in milliseconds of the simulation.
    pub simulated_ms: u64,
    /// Operations of clients that were answered and checked.
    pub operations: u64,
    /// Moves that came to their end.
    pub moves: u64,
    /// Those whose target was given up, before all faults ended.
    pub given_up: u64,
    /// How often one was called stuck, before all faults ended.
    pub stuck: u64,
    /// Drains that were begun.
    pub drains: u64,
    /// Plans that were begun.
    pub plans: u64,
    /// Snapshots that were switched to.
    pub snapshots: u64,
    /// Nodes that lost their disks and were replaced.
    pub replaced: u64,
    /// How often a replica fell asleep.
    pub slept: u64,
    /// What struck, and when.
    pub coverage: Coverage,
}

/// What went wrong.
#[derive(Debug, Clone)]
pub struct Failure {
    /// The plan.
    pub plan: Plan,
    /// What was seen.
    pub what: String,
    /// What happened last.
    pub timeline: Vec<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Plan { seed, nodes, groups, of_moves, .. } = self.plan;
        for line in &self.timeline {
            writeln!(f, "{line}")?;
        }
        writeln!(f, "seed {seed}: {}", self.what)?;
        let size = match of_moves {
            true => "--of-moves".to_owned(),
            false => format!("--groups {groups} --nodes {nodes}"),
        };
        write!(f, "replay: cargo run --release -p pontoon-tests --bin simulate -- --seed {seed} {size}")
    }
}

/// The most that a majority may take until it serves everything, and all until everything is in order.
const PROGRESS_MS: u64 = 60 * 10 * TICK_MS;
const ORDER_MS: u64 = 60_000;

/// Runs a plan.
///
/// # Errors
/// What a check found, or a panic of what was simulated.
pub fn run(plan: &Plan) -> Result<Report, Box<Failure>> {
    let mut world = World::new(*plan);
    let played = catch_unwind(AssertUnwindSafe(|| world.play()));
    match played {
        Ok(()) => Ok(Report {
            seed: plan.seed,
            hash: world.timeline.hash(),
            simulated_ms: world.now,
            operations: world.tally.operations,
            moves: world.meta.next_move - 1,
            given_up: world.tally.given_up,
            stuck: world.tally.stuck,
            drains: world.tally.drains,
            plans: world.tally.plans,
            snapshots: world.tally.snapshots,
            replaced: world.tally.replaced,
            slept: world.tally.slept,
            coverage: world.coverage,
        }),
        Err(panic) => {
            let what = panic.downcast_ref::<String>().map(String::as_str);
            let what = what.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic").to_owned();
            Err(Box::new(Failure { plan: *plan, what, timeline: world.timeline.lines() }))
        }
    }
}

impl World {
    fn play(&mut self) {
        self.found();
        self.calm = false;
        self.say("faults begin");
        for _ in 0..self.plan.steps {
            self.strike();
            self.step();
        }
        self.finish();
    }

    /// The liveness phase, and the checks at the end.
    pub(super) fn finish(&mut self) {
        // A majority is enough to go on.
        if let Some(down) = self.heal() {
            self.demand_writes();
            self.settle(PROGRESS_MS, |world| world.clients_are_done());
            self.nodes[down].down_until = self.now;
        }
        self.say("everybody is back");
        self.demand_writes();
        self.settle(ORDER_MS, World::is_at_rest);
        self.check_end();
    }

    fn settle(&mut self, within_ms: u64, holds: impl Fn(&World) -> Result<(), String>) {
        for _ in 0..within_ms / TICK_MS {
            for _ in 0..TICK_MS {
                self.step();
            }
            if holds(self).is_ok() {
                return;
            }
        }
        if let Err(what) = holds(self) {
            self.fail(&format!("no order after the faults ended: {what}"));
        }
    }
}
