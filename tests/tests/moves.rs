//! Moves, interrupted: a fault between any two steps that are durable somewhere, on simulated clusters with clients at work and
//! every check of the simulation on. Cases R27, R28 and R29 of other systems are here; the others are in `reliability.rs`.

use std::{
    collections::BTreeSet,
    fmt,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use pontoon_proto::v1::MovePhase;
use pontoon_tests::sim::Scenario;

const META: u64 = 1;
const GROUP: u64 = 2;
/// As few as a replacement needs.
const NODES: u64 = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Strikes {
    /// Power is cut.
    Crash,
    /// Nobody is heard and nobody hears.
    Partition,
}

/// Who is struck, by what it is at that moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Role {
    Driver,
    Source,
    Target,
    Leader,
}

const ROLES: [Role; 4] = [Role::Driver, Role::Source, Role::Target, Role::Leader];

/// A move that has just been asked for: who gives and who takes; 0: nobody.
struct Begun {
    scenario: Scenario,
    group: u64,
    source: u64,
    target: u64,
    /// How many voters the group has when all is in order again.
    voters: usize,
    /// After how many of its steps it is taken back; 0: it is not.
    back_after: usize,
}

/// A fault at one place.
#[derive(Clone, Copy)]
struct Cell {
    step: usize,
    strikes: Strikes,
    role: Role,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {}: {:?} strikes the {:?}", self.step, self.strikes, self.role)
    }
}

fn operations(scenario: &mut Scenario, more: u64) {
    let wanted = scenario.operations() + more;
    scenario.until("clients get on", |now| now.operations() >= wanted);
}

fn free(scenario: &Scenario, nodes: u64) -> u64 {
    free_of(scenario, GROUP, nodes)
}

fn free_of(scenario: &Scenario, group: u64, nodes: u64) -> u64 {
    let voters = scenario.voters(group);
    (1..=nodes).find(|node| !voters.contains(node)).expect("a node without a replica")
}

fn follower(scenario: &Scenario) -> u64 {
    follower_of(scenario, GROUP)
}

fn follower_of(scenario: &Scenario, group: u64) -> u64 {
    let leader = scenario.leader(group);
    *scenario.voters(group).iter().find(|node| Some(**node) != leader).expect("three voters")
}

fn begin(seed: u64, leader_moves: bool, back_after: usize) -> Begun {
    Begun { back_after, ..begin_of(seed, GROUP, leader_moves) }
}

fn begin_of(seed: u64, group: u64, leader_moves: bool) -> Begun {
    let mut scenario = Scenario::new(seed, NODES, 1);
    operations(&mut scenario, 40);
    let source = match leader_moves {
        true => scenario.leader(group).expect("it leads"),
        false => follower_of(&scenario, group),
    };
    let target = free_of(&scenario, group, NODES);
    scenario.start_move(group, source, target);
    Begun::new(scenario, group, source, target)
}

/// A voter more.
fn begin_addition(seed: u64) -> Begun {
    let mut scenario = Scenario::new(seed, NODES, 1);
    operations(&mut scenario, 40);
    let target = free(&scenario, NODES);
    scenario.add_voter(GROUP, target);
    Begun { voters: 4, ..Begun::new(scenario, GROUP, 0, target) }
}

/// A voter less; a repair then brings another.
fn begin_removal(seed: u64, leader_goes: bool) -> Begun {
    let mut scenario = Scenario::new(seed, NODES, 1);
    operations(&mut scenario, 40);
    let source = match leader_goes {
        true => scenario.leader(GROUP).expect("it leads"),
        false => follower(&scenario),
    };
    scenario.remove_voter(GROUP, source);
    Begun::new(scenario, GROUP, source, 0)
}

/// The only voter moves.
fn begin_single(seed: u64) -> Begun {
    let mut scenario = Scenario::with_replicas(seed, NODES, 1, 1);
    operations(&mut scenario, 40);
    let (source, target) = (scenario.leader(GROUP).expect("it leads"), free(&scenario, NODES));
    scenario.start_move(GROUP, source, target);
    Begun { voters: 1, ..Begun::new(scenario, GROUP, source, target) }
}

impl Begun {
    fn new(mut scenario: Scenario, group: u64, source: u64, target: u64) -> Begun {
        scenario.until("the move begins", |now| now.phase(group).is_some());
        Begun { scenario, group, source, target, voters: 3, back_after: 0 }
    }

    /// Up to a step, and no further.
    fn go_to(&mut self, step: usize) -> usize {
        let (now, back) = (&mut self.scenario, self.back_after);
        if back == 0 || step < back {
            return now.pass_steps(self.group, step);
        }
        let made = now.pass_steps(self.group, back);
        now.cancel_move(self.group);
        made + now.pass_steps(self.group, step - back)
    }

    fn node(&self, role: Role) -> Option<u64> {
        match role {
            Role::Driver => self.scenario.leader(META),
            Role::Source => Some(self.source).filter(|node| *node != 0),
            Role::Target => Some(self.target).filter(|node| *node != 0),
            Role::Leader => self.scenario.leader(self.group),
        }
    }

    /// All is over, in order, and whoever gave or did not get a replica has nothing left of it.
    fn ends(mut self) {
        let (group, wanted) = (self.group, self.voters);
        self.scenario.until("the move ends, and what the rules make of it", |now| {
            now.phase(group).is_none() && now.voters(group).len() == wanted
        });
        operations(&mut self.scenario, 10);
        let voters = self.scenario.voters(group);
        if self.source != 0 && self.target != 0 {
            let went = if voters.contains(&self.target) { self.source } else { self.target };
            assert_eq!(self.back_after == 0, went == self.source, "{voters:?}");
        }
        for node in (1..=NODES).filter(|node| !voters.contains(node)) {
            self.scenario.until("nothing is left there", |now| now.remains(group, node).is_none());
        }
        self.scenario.finish();
    }
}

fn strike(begin: impl Fn() -> Begun, cell: Cell) -> Option<u64> {
    let mut begun = begin();
    begun.go_to(cell.step);
    let node = begun.node(cell.role)?;
    match cell.strikes {
        Strikes::Crash => begun.scenario.crash(node, 60),
        Strikes::Partition => {
            begun.scenario.isolate(node);
            begun.scenario.pass(500);
            begun.scenario.heal();
        }
    }
    begun.ends();
    Some(node)
}

/// Every step × fault × role. A node that has several roles at a moment is struck once.
fn every_step(begin: impl Fn() -> Begun + Sync) {
    let mut calm = begin();
    let steps = calm.go_to(1_000);
    // What comes before a move is taken back is struck where it is not.
    let first = calm.back_after;
    calm.ends();
    let cells: Vec<Cell> = (first..steps)
        .flat_map(|step| {
            [Strikes::Crash, Strikes::Partition]
                .into_iter()
                .flat_map(move |strikes| ROLES.into_iter().map(move |role| Cell { step, strikes, role }))
        })
        .collect();
    let (next, struck) = (AtomicUsize::new(0), Mutex::new(BTreeSet::new()));
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(cell) = cells.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let mut probe = begin();
                    probe.go_to(cell.step);
                    let key = probe.node(cell.role).map(|node| (cell.step, cell.strikes, node));
                    drop(probe);
                    let is_new = |key| struck.lock().unwrap_or_else(PoisonError::into_inner).insert(key);
                    if key.is_some_and(is_new) {
                        println!("{cell}");
                        strike(&begin, *cell);
                    }
                }
            });
        }
    });
    let struck = struck.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!("{steps} steps, {} places, {} struck", cells.len(), struck.len());
    let (passed, struck) = (steps - first, struck.len());
    assert!(passed > 6 && struck >= 4 * passed, "{passed} steps, {struck} struck");
}

#[test]
fn r29_a_fault_at_any_step_of_a_leaders_move_ends_in_order() {
    every_step(|| begin(1, true, 0));
}

#[test]
fn r29_a_fault_at_any_step_of_a_followers_move_ends_in_order() {
    every_step(|| begin(2, false, 0));
}

#[test]
fn r29_a_fault_at_any_step_of_a_move_that_goes_back_ends_in_order() {
    // Its learner is there and receives.
    every_step(|| begin(3, false, 5));
}

#[test]
fn r29_a_fault_at_any_step_of_an_addition_ends_in_order() {
    every_step(|| begin_addition(4));
}

#[test]
fn r29_a_fault_at_any_step_of_a_followers_removal_ends_in_order() {
    every_step(|| begin_removal(5, false));
}

#[test]
fn r29_a_fault_at_any_step_of_a_leaders_removal_ends_in_order() {
    every_step(|| begin_removal(6, true));
}

#[test]
fn r29_a_fault_at_any_step_of_the_only_voters_move_ends_in_order() {
    every_step(|| begin_single(7));
}

#[test]
fn r29_a_fault_at_any_step_of_the_meta_groups_move_ends_in_order() {
    every_step(|| begin_of(8, META, false));
}

#[test]
fn r29_a_fault_at_any_step_of_the_meta_leaders_move_ends_in_order() {
    every_step(|| begin_of(9, META, true));
}

#[test]
fn r29_chunks_that_are_garbled_or_come_twice_are_never_taken() {
    for seed in 0..6 {
        let mut begun = begin(20 + seed, seed % 2 == 0, 0);
        begun.scenario.duplicate(300);
        begun.scenario.garble_chunks(begun.target, 1 + seed);
        begun.ends();
    }
    let mut begun = begin(30, false, 0);
    begun.scenario.garble_chunks(begun.target, 3);
    begun.scenario.until("chunks are garbled", |now| now.garbled() == 3);
    begun.ends();
}

#[test]
fn r27_writes_during_moves_are_kept_and_applied_once() {
    for seed in 0..3 {
        let mut scenario = Scenario::new(500 + seed, 5, 1);
        operations(&mut scenario, 40);
        for round in 0..12 {
            let (source, target) = match round % 2 {
                0 => (scenario.leader(GROUP).expect("it leads"), free(&scenario, 5)),
                _ => (follower(&scenario), free(&scenario, 5)),
            };
            scenario.start_move(GROUP, source, target);
            scenario.until("the move begins", |now| now.phase(GROUP).is_some());
            scenario.pass(30 * (1 + (seed + round) % 9));
            let victim = [source, target, scenario.leader(META).unwrap_or(source)][(round % 3) as usize];
            match (seed + round) % 2 {
                0 => scenario.crash(victim, 50),
                _ => {
                    scenario.isolate(victim);
                    scenario.pass(300);
                    scenario.heal();
                }
            }
            scenario.until("the move ends", |now| now.phase(GROUP).is_none());
            // It serves again soon after, whoever was struck.
            operations(&mut scenario, 20);
            scenario.until("it is led", |now| now.leader(GROUP).is_some());
        }
        // Registers, compare-and-sets and lists: each history is checked.
        scenario.finish();
    }
}

#[test]
fn r28_reads_around_the_change_of_members_see_every_acknowledged_write() {
    for (nth, phase) in [MovePhase::PreSwitch, MovePhase::Joint, MovePhase::RemoveOld, MovePhase::Fence]
        .into_iter()
        .enumerate()
    {
        for leader_moves in [false, true] {
            let mut begun = begin(40 + 2 * nth as u64 + u64::from(leader_moves), leader_moves, 0);
            begun.scenario.until("the move is there", |now| now.phase(GROUP).is_some_and(|now| now >= phase));
            // Clients still reach the source, which the others have left behind: it must not answer from before.
            let (source, operations_before) = (begun.source, begun.scenario.operations());
            begun.scenario.isolate(source);
            begun.scenario.pass(1_500);
            assert!(begun.scenario.operations() > operations_before, "nobody serves in {phase:?}");
            begun.scenario.heal();
            begun.ends();
        }
    }
}

#[test]
fn there_and_back_again_a_hundred_times_leaves_nothing_behind() {
    let mut scenario = Scenario::new(77, 5, 1);
    operations(&mut scenario, 60);
    let home = follower(&scenario);
    let away = free(&scenario, 5);
    for round in 0..100 {
        for (source, target) in [(home, away), (away, home)] {
            scenario.start_move(GROUP, source, target);
            let begun = scenario.moves();
            scenario.until("the move begins", |now| now.moves() > begun);
            scenario.until("the move ends", |now| now.phase(GROUP).is_none());
            let voters = scenario.voters(GROUP);
            assert!(voters.contains(&target) && !voters.contains(&source), "round {round}: {voters:?}");
            scenario.until("nothing is left of it", |now| now.remains(GROUP, source).is_none());
        }
        operations(&mut scenario, 3);
    }
    // The log of the one that left, opened again, has nothing either.
    scenario.crash(away, 20);
    scenario.pass(500);
    assert_eq!(scenario.remains(GROUP, away), None, "round {}", scenario.moves());
    operations(&mut scenario, 20);
    scenario.finish();
}

#[test]
fn a_node_that_is_silent_for_too_long_is_left_behind_and_fenced_when_it_returns() {
    for seed in 0..4 {
        let mut scenario = Scenario::new(600 + seed, 5, 2);
        operations(&mut scenario, 40);
        scenario.repair_after(800);
        let lost =
            if seed % 2 == 0 { scenario.leader(GROUP).expect("it leads") } else { follower(&scenario) };
        scenario.isolate(lost);
        scenario.until("others take its place", |now| {
            let voters = now.voters(GROUP);
            now.leader(GROUP).is_some_and(|leader| leader != lost)
                && voters.len() == 3
                && !voters.contains(&lost)
        });
        operations(&mut scenario, 20);
        assert!(scenario.status(GROUP, lost).is_some(), "nobody could tell it");
        scenario.heal();
        scenario.until("it is fenced", |now| now.remains(GROUP, lost).is_none());
        scenario.finish();
    }
}
