//! Which fault met which phase of a move and of a snapshot's installation.

use std::fmt;

use pontoon_proto::{GroupId, NodeId, ReplicaId, v1::MovePhase};
use pontoon_raftstore::GroupStatus;

use super::world::World;

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A message is lost.
    Loss,
    /// A message arrives twice.
    Duplicate,
    /// A message is held up and overtaken.
    Clog,
    /// A node is cut off.
    Partition,
    /// A node is cut off in one direction.
    OneWay,
    /// Power is cut.
    Crash,
    /// The process is killed.
    Kill,
    /// The process stands still.
    Pause,
    /// The wall clock jumps.
    Jump,
    /// The disk stands still.
    Stall,
    /// A write or sync fails.
    Io,
    /// The disk is full.
    NoSpace,
    /// Bits of the log flip.
    Rot,
    /// The disks are lost.
    Lost,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 14] = [
        Kind::Loss,
        Kind::Duplicate,
        Kind::Clog,
        Kind::Partition,
        Kind::OneWay,
        Kind::Crash,
        Kind::Kill,
        Kind::Pause,
        Kind::Jump,
        Kind::Stall,
        Kind::Io,
        Kind::NoSpace,
        Kind::Rot,
        Kind::Lost,
    ];
}

/// What a fault may meet: phases of a move, then of a snapshot that a replica takes in.
const MEETS: [&str; 16] = [
    "Planned",
    "Reserved",
    "Learner",
    "Snapshot",
    "CatchUp",
    "Verify",
    "PreSwitch",
    "Joint",
    "RemoveOld",
    "Fence",
    "Cleanup",
    "Aborting",
    "asked",
    "chunks",
    "staged",
    "switched",
];
const ABORTING: usize = 11;
const ASKED: usize = 12;
const CHUNKS: usize = 13;
const STAGED: usize = 14;
const SWITCHED: usize = 15;

/// How often each kind of fault struck, and in which phase.
#[derive(Debug, Clone, Default)]
pub struct Coverage {
    struck: [u64; Kind::ALL.len()],
    cells: [[u64; MEETS.len()]; Kind::ALL.len()],
}

impl Coverage {
    /// How often a kind of fault struck.
    pub fn struck(&self, kind: Kind) -> u64 {
        self.struck[kind as usize]
    }

    /// The names of what faults may meet.
    pub fn phases() -> &'static [&'static str] {
        &MEETS
    }

    /// How often a kind of fault met a phase.
    pub fn met(&self, kind: Kind, phase: &str) -> u64 {
        MEETS.iter().position(|name| *name == phase).map_or(0, |at| self.cells[kind as usize][at])
    }

    /// What no fault of a kind has met yet.
    pub fn unmet(&self) -> Vec<(Kind, &'static str)> {
        let all = Kind::ALL.into_iter().flat_map(|kind| MEETS.into_iter().map(move |phase| (kind, phase)));
        all.filter(|(kind, phase)| self.met(*kind, phase) == 0).collect()
    }

    /// Adds another run's counts.
    pub fn add(&mut self, other: &Coverage) {
        for (sum, more) in self.struck.iter_mut().zip(other.struck) {
            *sum += more;
        }
        for (sum, more) in self.cells.as_flattened_mut().iter_mut().zip(other.cells.as_flattened()) {
            *sum += more;
        }
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<10}{:>9}", "fault", "struck")?;
        for name in MEETS {
            write!(f, "{name:>10}")?;
        }
        for kind in Kind::ALL {
            write!(f, "\n{:<10}{:>9}", format!("{kind:?}"), self.struck(kind))?;
            for count in self.cells[kind as usize] {
                write!(f, "{count:>10}")?;
            }
        }
        Ok(())
    }
}

impl World {
    /// Counts a fault that struck these nodes, or one group's messages to them.
    pub(super) fn cover(&mut self, kind: Kind, strikes: &dyn Fn(NodeId) -> bool, group: Option<GroupId>) {
        self.coverage.struck[kind as usize] += 1;
        let mut met = [false; MEETS.len()];
        let of_group = group.and_then(|group| self.meta.running_move(group.0));
        let all = self.meta.running_moves().filter(|_| group.is_none());
        for mv in all.chain(of_group) {
            let group = GroupId(mv.group);
            let parts = [mv.source, mv.target].map(|id| ReplicaId::new(id).ok().map(ReplicaId::node));
            let hits = parts.into_iter().flatten().any(strikes)
                || self.leaders(group).iter().any(|i| strikes(self.nodes[*i].id));
            if let Some(phase) = phase_index(mv.phase()).filter(|_| hits) {
                met[phase] = true;
            }
        }
        for node in self.nodes.iter().filter(|node| strikes(node.id)) {
            let Some(running) = &node.running else { continue };
            let all = self.seen.keys().filter(|(_, at)| *at == node.id).map(|(group, _)| *group);
            let groups: Vec<GroupId> = group.map_or_else(|| all.collect(), |group| vec![group]);
            for group in groups {
                if let Some(phase) = running.stepped.status(group).and_then(|status| phase_of(&status)) {
                    met[phase] = true;
                }
                met[SWITCHED] |= self.checks.switched.contains_key(&(group, node.id));
            }
        }
        for (cell, met) in self.coverage.cells[kind as usize].iter_mut().zip(met) {
            *cell += u64::from(met);
        }
    }

    /// A fault and a moment that the seed has picked for each other, have not met in this run, and could now: the fault, and
    /// who would be struck.
    pub(super) fn aim(&self) -> Option<(Kind, NodeId)> {
        let cells = AIMED.len() as u64 * MEETS.len() as u64;
        (0..AIMS).find_map(|nth| {
            let cell = (self.plan.seed * AIMS + nth) % cells;
            let (kind, phase) = (AIMED[cell as usize % AIMED.len()], cell as usize / AIMED.len());
            let open = self.coverage.cells[kind as usize][phase] == 0;
            let node = open.then(|| self.who_is_in(phase, nth)).flatten()?;
            Some((kind, node))
        })
    }

    /// A node with a part in what is in this phase.
    fn who_is_in(&self, phase: usize, turn: u64) -> Option<NodeId> {
        let node = |replica: u64| ReplicaId::new(replica).ok().map(ReplicaId::node);
        if phase == SWITCHED {
            return self.checks.switched.keys().next().map(|(_, node)| *node);
        }
        self.meta.running_moves().find_map(|mv| {
            if phase <= ABORTING {
                let (first, second) =
                    if turn.is_multiple_of(2) { (mv.source, mv.target) } else { (mv.target, mv.source) };
                return node(first).or(node(second)).filter(|_| phase_index(mv.phase()) == Some(phase));
            }
            let target = node(mv.target)?;
            let running = self.at(target).and_then(|i| self.nodes[i].running.as_ref())?;
            let status = running.stepped.status(GroupId(mv.group))?;
            (phase_of(&status) == Some(phase)).then_some(target)
        })
    }
}

/// Moments that a seed picks.
const AIMS: u64 = 3;

/// Faults that strike a node at a moment; the others meet messages.
const AIMED: [Kind; 12] = [
    Kind::Clog,
    Kind::Partition,
    Kind::OneWay,
    Kind::Crash,
    Kind::Kill,
    Kind::Pause,
    Kind::Jump,
    Kind::Stall,
    Kind::Io,
    Kind::NoSpace,
    Kind::Rot,
    Kind::Lost,
];

fn phase_index(phase: MovePhase) -> Option<usize> {
    match phase {
        MovePhase::Aborting => Some(ABORTING),
        MovePhase::Done | MovePhase::Aborted => None,
        phase => Some(phase as usize),
    }
}

/// Where a replica stands with a snapshot that it takes in.
fn phase_of(status: &GroupStatus) -> Option<usize> {
    let pull = status.pull.as_ref()?;
    Some(match (pull.bytes_total, pull.bytes_done) {
        (0, _) => ASKED,
        (total, done) if done < total => CHUNKS,
        _ => STAGED,
    })
}
