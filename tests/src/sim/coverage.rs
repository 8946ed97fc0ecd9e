//! Which fault met which phase of a move and of a snapshot's installation.

use std::fmt;

use pontoon_proto::{GroupId, NodeId, ReplicaId, v1::MovePhase};

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
            if hits {
                let phase = match mv.phase() {
                    MovePhase::Aborting => ABORTING,
                    MovePhase::Done | MovePhase::Aborted => continue,
                    phase => phase as usize,
                };
                met[phase.min(ABORTING)] = true;
            }
        }
        let least = NodeId::new(1).expect("one");
        let (from, to) = group.map_or((GroupId(0), u64::MAX), |group| (group, group.0));
        let of_group = self.seen.range((from, least)..).take_while(|((at, _), _)| at.0 <= to);
        for ((at, node), status) in of_group {
            if !strikes(*node) {
                continue;
            }
            if let Some(pull) = &status.pull {
                let phase = match (pull.bytes_total, pull.bytes_done) {
                    (0, _) => ASKED,
                    (total, done) if done < total => CHUNKS,
                    _ => STAGED,
                };
                met[phase] = true;
            }
            met[SWITCHED] |= self.checks.switched.contains_key(&(*at, *node));
        }
        for (cell, met) in self.coverage.cells[kind as usize].iter_mut().zip(met) {
            *cell += u64::from(met);
        }
    }
}
