//! How long it takes until nodes are evenly used, in virtual time: the meta group's machine, the plan and the scheduler are those that
//! ship; what is made up is how long a copy takes.
//!
//! Each node receives states at a rate, as many at a time as its budget has turns; the rate is shared by those that come. The phases
//! before and after a copy take a while each, during which nothing is received for the move. A move counts in the scheduler's slots from
//! its start to its end. Once nodes are even, an hour passes in which sizes wander and the cluster balances itself as often as it
//! does; no replica may return to a node that it left.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use bytes::Bytes;
use pontoon_proto::{GroupId, ReplicaId, v1};
use pontoon_raftstore::{Command, Machines, StateMachine};
use pontoon_shard::{
    MetaState, ShardMachines, decode_meta_reply,
    engine::{MemoryDisk, MemoryEngine},
    meta_command,
    planner::{self, GroupSeen, Limits, Seen, THRESHOLD},
};
use prost::Message;
use v1::{MovePhase, meta_command::Body as Ask, meta_reply::Body as Answer};

use crate::Rng;

/// How often the driver looks for what it may begin.
const SCHEDULE_MS: u64 = 200;
/// How often a cluster that balances itself is looked over.
const BALANCE_MS: u64 = 60_000;
const HOUR_MS: u64 = 3_600_000;
const STEP_MS: u64 = 10;

/// What is balanced.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    /// Groups of three replicas.
    pub groups: u64,
    /// Nodes that hold them.
    pub from: u64,
    /// Nodes that there are in the end.
    pub to: u64,
    /// What each node receives.
    pub bytes_per_second: u64,
    /// States that a node receives at the same time.
    pub turns: usize,
    /// What a move takes beside its copy, half of it before.
    pub overhead_ms: u64,
    /// By how much of a thousand sizes wander in the hour afterwards, each minute anew.
    pub wander_permille: u64,
    /// Where sizes come from.
    pub seed: u64,
}

/// What came of it.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// Moves until the nodes were even.
    pub moves: usize,
    /// Bytes that they copied.
    pub bytes: u64,
    /// The spread before and after, as a share of the mean.
    pub spread: (f64, f64),
    /// Virtual time from the plan to the last move's end.
    pub took_ms: u64,
    /// The time in which the busiest node receives what the plan gives it, at its full rate.
    pub bound_ms: u64,
    /// The same with what any plan must move, spread over the nodes that came.
    pub least_ms: u64,
    /// Moves in the hour afterwards, and how many of them returned to a node that was left.
    pub later: (usize, usize),
}

/// A move under way.
struct Under {
    record: v1::Move,
    target: u64,
    /// When its copy may begin; then when it ends.
    waits_until: u64,
    left: f64,
    copied: bool,
}

struct World {
    setup: Setup,
    rng: Rng,
    machine: Box<dyn StateMachine>,
    machines: Arc<ShardMachines>,
    index: u64,
    now_ms: u64,
    seen: Seen,
    under: BTreeMap<u64, Under>,
    /// Nodes that a group has left.
    left: BTreeSet<(u64, u64)>,
    reversed: usize,
    done: usize,
    bytes: u64,
    received: BTreeMap<u64, u64>,
}

fn node(replica: u64) -> u64 {
    ReplicaId::new(replica).map_or(0, |replica| replica.node().get())
}

impl World {
    fn new(setup: Setup) -> World {
        let machines = ShardMachines::new(Arc::new(MemoryEngine::open(&MemoryDisk::new())))
            .expect("an empty engine opens");
        let kind = v1::ShardKind::Meta.into();
        let meta = v1::Shard { group: GroupId::META.0, kind, ..Default::default() };
        let machine =
            Machines::open(&*machines, GroupId::META, &meta.encode_to_vec()).expect("the meta machine opens");
        let mut world = World {
            setup,
            rng: Rng::new(setup.seed),
            machine,
            machines,
            index: 0,
            now_ms: HOUR_MS,
            seen: Seen::default(),
            under: BTreeMap::new(),
            left: BTreeSet::new(),
            reversed: 0,
            done: 0,
            bytes: 0,
            received: BTreeMap::new(),
        };
        let register = |id: u64| v1::RegisterNode {
            address: format!("10.0.0.{id}:1"),
            engine: "memory".into(),
            nonce: Bytes::copy_from_slice(&id.to_be_bytes()),
            capacity_bytes: 1 << 40,
            ..Default::default()
        };
        let cluster = Bytes::from_static(&[7; 16]);
        world.ask(Ask::Bootstrap(v1::BootstrapCluster {
            cluster,
            node: Some(register(1)),
            meta_replicas: 3,
        }));
        (2..=setup.from).for_each(|id| drop(world.ask(Ask::RegisterNode(register(id)))));
        for _ in 0..setup.groups {
            let first = world.rng.below(setup.from);
            let step = 1 + world.rng.below(2);
            let nodes: Vec<u64> = (0..3).map(|k| 1 + (first + k * step) % setup.from).collect();
            let predicate = format!("p{}", world.index);
            let create =
                v1::CreateShard { predicate, replicas_wanted: 3, nodes: nodes.clone(), ..Default::default() };
            let Some(Answer::Shard(shard)) = world.ask(Ask::CreateShard(create)) else { continue };
            world.ask(Ask::ShardLive(v1::ShardLive { group: shard.group }));
            let bytes = 4_000 << world.rng.below(12);
            let bytes = bytes + world.rng.below(bytes);
            world.seen.groups.insert(shard.group, GroupSeen { bytes, leader: nodes[0] });
        }
        (setup.from + 1..=setup.to).for_each(|id| drop(world.ask(Ask::RegisterNode(register(id)))));
        world.publish();
        world
    }

    /// One command of the meta group; `None`: it was refused.
    fn ask(&mut self, body: Ask) -> Option<Answer> {
        self.index += 1;
        let payload = meta_command(self.now_ms, body);
        let command = Command { index: self.index, term: 1, timestamp: self.index, payload };
        let reply = self.machine.apply(&command).expect("the machine applies");
        decode_meta_reply(&reply).expect("an answer").ok()
    }

    fn publish(&mut self) {
        let mark = v1::Mark { format: 1, index: self.index, term: 1, ..Default::default() };
        self.machine.commit(Vec::new(), &mark).expect("the machine commits");
    }

    fn state(&self) -> Arc<MetaState> {
        self.machines.meta().borrow().clone()
    }

    fn advance(&mut self, record: &v1::Move, phase: MovePhase) -> Option<v1::Move> {
        let ask = v1::AdvanceMove {
            id: record.id,
            expect_phase_seq: record.phase_seq,
            driver_term: 1,
            phase: phase.into(),
            ..Default::default()
        };
        match self.ask(Ask::AdvanceMove(ask)) {
            Some(Answer::Move(record)) => Some(record),
            _ => None,
        }
    }

    /// What the driver begins of a plan; true: it has ended.
    fn schedule(&mut self) -> bool {
        let state = self.state();
        let Some(plan) = state.plan.clone() else { return true };
        let starts = planner::continue_plan(&state, &plan);
        let ended = starts.is_none();
        for start in starts.into_iter().flatten() {
            let bytes = start.bytes_total;
            if let Some(Answer::Move(record)) = self.ask(Ask::StartMove(start)) {
                let target = node(record.target);
                let waits_until = self.now_ms + self.setup.overhead_ms / 2;
                let under = Under { target, waits_until, left: bytes as f64, copied: false, record };
                self.under.insert(under.record.id, under);
            }
        }
        if ended {
            self.ask(Ask::EndPlan(v1::EndPlan { id: plan.id.clone() }));
        }
        self.publish();
        ended
    }

    /// Copies go on for a step.
    fn copy(&mut self) {
        let mut turns: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        for (id, under) in &self.under {
            if !under.copied && under.waits_until <= self.now_ms {
                turns.entry(under.target).or_default().push(*id);
            }
        }
        let per_step = self.setup.bytes_per_second as f64 * STEP_MS as f64 / 1_000.0;
        for ids in turns.into_values() {
            // What one does not use, the next one does.
            let mut budget = per_step;
            let mut open: Vec<u64> = ids.into_iter().take(self.setup.turns).collect();
            while budget > 0.5 && !open.is_empty() {
                let share = budget / open.len() as f64;
                open.retain(|id| {
                    let Some(under) = self.under.get_mut(id) else { return false };
                    let took = share.min(under.left);
                    under.left -= took;
                    budget -= took;
                    if under.left < 0.5 {
                        under.copied = true;
                        under.waits_until = self.now_ms + self.setup.overhead_ms / 2;
                    }
                    !under.copied
                });
            }
        }
        let over = |under: &&Under| under.copied && under.waits_until <= self.now_ms;
        let over: Vec<u64> = self.under.values().filter(over).map(|under| under.record.id).collect();
        let any = !over.is_empty();
        for id in over {
            self.end(id);
        }
        if any {
            self.publish();
        }
    }

    fn end(&mut self, id: u64) {
        let Some(under) = self.under.remove(&id) else { return };
        let (group, source, bytes) =
            (under.record.group, node(under.record.source), under.record.bytes_total);
        let mut record = Some(under.record);
        while let Some(now) = record.filter(|record| record.phase() != MovePhase::Done) {
            let next = MovePhase::try_from(now.phase() as i32 + 1).unwrap_or(MovePhase::Done);
            record = self.advance(&now, next);
        }
        self.done += 1;
        self.bytes += bytes;
        *self.received.entry(under.target).or_default() += bytes;
        self.reversed += usize::from(self.left.contains(&(group, under.target)));
        self.left.insert((group, source));
    }

    /// Makes a plan and begins it; the plan, unless there is nothing to move.
    fn plan(&mut self) -> Option<v1::Plan> {
        let plan = planner::balance(&self.state(), &self.seen, Limits::default(), self.now_ms);
        let plan = v1::Plan { transfers: Vec::new(), ..plan };
        if plan.moves.is_empty() {
            return None;
        }
        self.ask(Ask::StartPlan(v1::StartPlan { plan: Some(plan.clone()) }))?;
        self.publish();
        Some(plan)
    }

    fn run_until_even(&mut self) {
        loop {
            let ended = self.now_ms.is_multiple_of(SCHEDULE_MS) && self.schedule();
            if ended && self.under.is_empty() {
                return;
            }
            self.now_ms += STEP_MS;
            self.copy();
        }
    }

    /// Sizes wander and come back.
    fn wander(&mut self, usual: &BTreeMap<u64, u64>) {
        for (group, seen) in &mut self.seen.groups {
            let bytes = usual.get(group).copied().unwrap_or(0);
            let most = self.setup.wander_permille.min(1_000);
            seen.bytes = bytes * (1_000 - most + self.rng.below(2 * most + 1)) / 1_000;
        }
    }
}

/// Balances, then lets an hour pass.
pub fn run(setup: Setup) -> Outcome {
    let mut world = World::new(setup);
    let begun = world.now_ms;
    let plan = world.plan().unwrap_or_default();
    world.run_until_even();
    let (moves, bytes, took_ms) = (world.done, world.bytes, world.now_ms - begun);
    let rate = setup.bytes_per_second as f64 / 1_000.0;
    let busiest = world.received.values().copied().max().unwrap_or(0);
    let least = plan.bound_bytes as f64 / (setup.to - setup.from).max(1) as f64;
    let usual: BTreeMap<u64, u64> = world.seen.groups.iter().map(|(id, seen)| (*id, seen.bytes)).collect();
    let after = planner::balance(&world.state(), &world.seen, Limits::default(), world.now_ms).spread_before;
    let hour = world.now_ms + HOUR_MS;
    while world.now_ms < hour {
        world.wander(&usual);
        let plan = planner::balance(&world.state(), &world.seen, Limits::default(), world.now_ms);
        let next = world.now_ms + BALANCE_MS;
        if f64::from(plan.spread_before) > THRESHOLD * 1_000.0 && world.plan().is_some() {
            world.run_until_even();
        }
        world.now_ms = world.now_ms.max(next);
    }
    Outcome {
        moves,
        bytes,
        spread: (f64::from(plan.spread_before) / 1_000.0, f64::from(after) / 1_000.0),
        took_ms,
        bound_ms: (busiest as f64 / rate) as u64,
        least_ms: (least / rate) as u64,
        later: (world.done - moves, world.reversed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_even_near_the_bound_and_nothing_returns() {
        let setup = Setup {
            groups: 600,
            from: 10,
            to: 12,
            bytes_per_second: 4 << 20,
            turns: 4,
            overhead_ms: 400,
            wander_permille: 50,
            seed: 1,
        };
        let outcome = run(setup);
        assert!(outcome.moves > 50 && outcome.spread.0 > 0.9 && outcome.spread.1 <= 0.035, "{outcome:?}");
        assert!(outcome.took_ms as f64 <= 1.15 * outcome.bound_ms as f64, "{outcome:?}");
        assert_eq!(outcome.later, (0, 0), "nothing has changed: {outcome:?}");
        // Sizes that change more than any cluster's: much is moved then, and nothing back.
        let outcome = run(Setup { wander_permille: 950, ..setup });
        assert!(outcome.later.0 > 50 && outcome.later.1 == 0, "{outcome:?}");
    }
}
