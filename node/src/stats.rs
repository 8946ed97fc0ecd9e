//! What a node counts itself; the floors below count for themselves.
//!
//! A counter orders nothing and is an addition; what is asked for is put together when somebody asks ([`crate::metrics`]).

use std::sync::atomic::{AtomicU64, Ordering};

use pontoon_proto::v1::{self, MovePhase};
use pontoon_wal::Times;

/// Calls that are counted, by the name of their method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum Asked {
    OpenSession,
    Write,
    Get,
    Scan,
    AppendLog,
    ReadLog,
    TruncateLog,
    ResetLog,
}

impl Asked {
    pub(crate) const ALL: [Asked; 8] = [
        Asked::OpenSession,
        Asked::Write,
        Asked::Get,
        Asked::Scan,
        Asked::AppendLog,
        Asked::ReadLog,
        Asked::TruncateLog,
        Asked::ResetLog,
    ];

    pub(crate) fn word(self) -> &'static str {
        match self {
            Asked::OpenSession => "open_session",
            Asked::Write => "write",
            Asked::Get => "get",
            Asked::Scan => "scan",
            Asked::AppendLog => "append_log",
            Asked::ReadLog => "read_log",
            Asked::TruncateLog => "truncate_log",
            Asked::ResetLog => "reset_log",
        }
    }
}

/// How a call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum Ended {
    /// As it was asked.
    Done,
    /// Without effect: another node leads, there is no room, the epoch is old, a limit.
    Refused,
    /// With a status, or without a word on what became of it.
    Failed,
}

impl Ended {
    pub(crate) const ALL: [Ended; 3] = [Ended::Done, Ended::Refused, Ended::Failed];

    pub(crate) fn word(self) -> &'static str {
        match self {
            Ended::Done => "done",
            Ended::Refused => "refused",
            Ended::Failed => "failed",
        }
    }

    pub(crate) fn of(refusal: Option<&v1::Refusal>) -> Ended {
        match refusal.map(|refusal| &refusal.kind) {
            None => Ended::Done,
            Some(Some(v1::refusal::Kind::Ambiguous(_))) => Ended::Failed,
            Some(_) => Ended::Refused,
        }
    }
}

/// The phases of a move that take time.
pub(crate) const PHASES: [MovePhase; 12] = [
    MovePhase::Planned,
    MovePhase::Reserved,
    MovePhase::Learner,
    MovePhase::Snapshot,
    MovePhase::CatchUp,
    MovePhase::Verify,
    MovePhase::PreSwitch,
    MovePhase::Joint,
    MovePhase::RemoveOld,
    MovePhase::Fence,
    MovePhase::Cleanup,
    MovePhase::Aborting,
];

/// The counters of one node.
#[derive(Debug, Default)]
pub(crate) struct Counted {
    /// From the proposal of a write to its answer, of those that are led here.
    pub(crate) writes: Times,
    /// From the arrival of a read to its answer, of those that are answered here.
    pub(crate) reads: Times,
    calls: [[AtomicU64; Ended::ALL.len()]; Asked::ALL.len()],
    phases: [Times; PHASES.len()],
    moves_done: AtomicU64,
    moves_aborted: AtomicU64,
}

impl Counted {
    pub(crate) fn call(&self, asked: Asked, ended: Ended) {
        self.calls[asked as usize][ended as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn calls(&self, asked: Asked, ended: Ended) -> u64 {
        self.calls[asked as usize][ended as usize].load(Ordering::Relaxed)
    }

    /// A move that is driven here has left a phase after so long.
    pub(crate) fn left_phase(&self, left: MovePhase, took: std::time::Duration, now: MovePhase) {
        if let Some(at) = PHASES.iter().position(|phase| *phase == left) {
            self.phases[at].note(took);
        }
        match now {
            MovePhase::Done => self.moves_done.fetch_add(1, Ordering::Relaxed),
            MovePhase::Aborted => self.moves_aborted.fetch_add(1, Ordering::Relaxed),
            _ => return,
        };
    }

    /// How long each phase took.
    pub(crate) fn phases(&self) -> impl Iterator<Item = (MovePhase, pontoon_wal::Histogram)> {
        PHASES.iter().zip(&self.phases).map(|(phase, times)| (*phase, times.copy()))
    }

    /// Moves that were driven here to their end: those that are done, and those that went back.
    pub(crate) fn moves(&self) -> (u64, u64) {
        (self.moves_done.load(Ordering::Relaxed), self.moves_aborted.load(Ordering::Relaxed))
    }
}
