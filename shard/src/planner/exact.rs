//! The best plan, where there are few enough of them to try all: with few large replicas no greedy rule is good.

use super::{
    balance::{GOAL, Step, spread},
    world::World,
};

/// So many plans are tried at most.
const MOST: f64 = 300_000.0;

struct Search<'a, 'b> {
    world: World<'a>,
    /// Per movable group, the largest first: its steps that the rules allow.
    options: &'b [(u64, Vec<Step>)],
    chosen: Vec<Step>,
    best: Option<(f64, u64, Vec<Step>)>,
}

/// The steps of the plan that ends with the least spread above [`GOAL`], and of those moves the fewest bytes. `None` if there are
/// too many plans to try.
pub(super) fn search(world: &World<'_>) -> Option<Vec<Step>> {
    let mut options: Vec<(u64, Vec<Step>)> = Vec::new();
    let mut plans = 1.0;
    for (at, group) in world.groups.iter().enumerate().filter(|(_, group)| group.movable && group.bytes > 0) {
        let voters = 0..group.voters.len();
        let steps =
            voters.flat_map(|voter| (0..world.places.len()).map(move |to| Step { group: at, voter, to }));
        let steps: Vec<Step> = steps.filter(|step| world.may_move(step.group, step.voter, step.to)).collect();
        plans *= 1.0 + steps.len() as f64;
        if plans > MOST {
            return None;
        }
        options.push((group.bytes, steps));
    }
    options.sort_by_key(|(bytes, _)| std::cmp::Reverse(*bytes));
    let mut search = Search { world: world.clone(), options: &options, chosen: Vec::new(), best: None };
    search.go(0, 0);
    search.best.map(|(_, _, steps)| steps)
}

impl Search<'_, '_> {
    fn go(&mut self, at: usize, bytes: u64) {
        if self.best.as_ref().is_some_and(|(left, least, _)| *left <= GOAL && bytes >= *least) {
            return;
        }
        let options = self.options;
        let Some((size, steps)) = options.get(at) else {
            let left = spread(&self.world.places).max(GOAL);
            if self.best.as_ref().is_none_or(|(most, least, _)| (left, bytes) < (*most, *least)) {
                self.best = Some((left, bytes, self.chosen.clone()));
            }
            return;
        };
        self.go(at + 1, bytes);
        for step in steps {
            let from = self.world.groups[step.group].voters[step.voter].place;
            self.shift(*step, from, step.to, *size);
            self.chosen.push(*step);
            self.go(at + 1, bytes + size);
            self.chosen.pop();
            self.shift(*step, step.to, from, *size);
        }
    }

    fn shift(&mut self, step: Step, from: usize, to: usize, bytes: u64) {
        self.world.groups[step.group].voters[step.voter].place = to;
        self.world.places[from].used -= bytes;
        self.world.places[to].used += bytes;
    }
}
