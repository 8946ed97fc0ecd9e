//! Applying: committed entries become state, in order, with the mark in the batch of the data.
//!
//! ```text
//!  core ── ApplyTask ──> Applier ── commands, rows, mark ──> StateMachine
//!    ^                      │
//!    └──── ApplyOutcome ────┘
//! ```
//!
//! The applier blocks (engines do), so it runs on its own threads; the simulator calls it inline. It is a plain state
//! machine itself: a task in, outcomes out.
//!
//! Crash argument. A batch of the engine holds the effects of whole entries, the dedup rows and the mark (index, term,
//! configuration). A crash loses whole batches from the end; what is left has a mark that says exactly which entries it
//! contains, and the log still holds all later ones, because nothing above a mark that was *flushed* is truncated.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use bytes::Bytes;
use pontoon_proto::{GroupId, NodeId, v1};
use raft::eraftpb as pb;

use crate::{
    dedup::{Sessions, Verdict},
    envelope,
    error::{Error, Rejected},
    hybrid,
    machine::{Command, Machines, SnapshotSource, SnapshotStage, Staging, StateMachine},
    snapshot,
};

/// The format of the mark that this version writes.
pub(crate) const MARK_FORMAT: u32 = 1;

/// Who asked for a snapshot, and how it must be.
#[derive(Debug, Clone)]
pub(crate) struct SnapshotRequest {
    pub(crate) group: GroupId,
    pub(crate) peer: NodeId,
    /// The receiver.
    pub(crate) receiver: u64,
    /// The replica here.
    pub(crate) replica: u64,
    pub(crate) pull: u64,
    pub(crate) min_index: u64,
}

pub(crate) enum ApplyTask {
    /// Opens the machine of a group; `initial` is the mark of a founding member whose engine holds nothing, `took_over` the
    /// replica that this one was before it went on alone (`core/recover.rs`).
    Open {
        group: GroupId,
        replica: u64,
        descriptor: Bytes,
        initial: Option<v1::Mark>,
        took_over: Option<u64>,
    },
    /// Normal entries, contiguous.
    Entries {
        group: GroupId,
        entries: Vec<pb::Entry>,
        want_replies: bool,
    },
    /// A configuration entry that the core has applied.
    Conf {
        group: GroupId,
        index: u64,
        term: u64,
        conf: v1::ConfState,
    },
    Checkpoint(SnapshotRequest),
    StageBegin {
        group: GroupId,
        pull: u64,
        manifest: Arc<v1::Manifest>,
    },
    StageChunk {
        group: GroupId,
        chunk: StageChunk,
    },
    StageAbandon {
        group: GroupId,
        pull: u64,
    },
    Install {
        group: GroupId,
        pull: u64,
        mark: v1::Mark,
    },
    Destroy {
        group: GroupId,
        descriptor: Bytes,
    },
    /// Forgets the machine without touching its data.
    Close {
        group: GroupId,
    },
}

impl ApplyTask {
    pub(crate) fn group(&self) -> GroupId {
        match self {
            ApplyTask::Open { group, .. }
            | ApplyTask::Entries { group, .. }
            | ApplyTask::Conf { group, .. }
            | ApplyTask::StageBegin { group, .. }
            | ApplyTask::StageChunk { group, .. }
            | ApplyTask::StageAbandon { group, .. }
            | ApplyTask::Install { group, .. }
            | ApplyTask::Destroy { group, .. }
            | ApplyTask::Close { group } => *group,
            ApplyTask::Checkpoint(request) => request.group,
        }
    }
}

/// A chunk of a state that is received.
pub(crate) struct StageChunk {
    pub(crate) pull: u64,
    pub(crate) chunk: u32,
    pub(crate) hash: Bytes,
    pub(crate) data: Bytes,
    /// Others of the node may wait for it.
    pub(crate) hurry: bool,
}

/// What became of one entry, for its proposer.
pub(crate) struct Reply {
    pub(crate) index: u64,
    /// Where it was applied (an earlier index for a retry) and the answer.
    pub(crate) result: Result<(u64, Bytes), Rejected>,
}

pub(crate) enum ApplyOutcome {
    Opened {
        group: GroupId,
        mark: Option<v1::Mark>,
    },
    Applied {
        group: GroupId,
        mark: v1::Mark,
        bytes: u64,
        replies: Vec<Reply>,
    },
    /// A view for the snapshot server.
    Checkpointed {
        request: SnapshotRequest,
        source: Arc<dyn SnapshotSource>,
        mark: v1::Mark,
        descriptor: Bytes,
    },
    /// A view of the state at an entry that asks for its hash.
    Verify {
        group: GroupId,
        index: u64,
        source: Arc<dyn SnapshotSource>,
    },
    CheckpointRefused {
        request: SnapshotRequest,
        reason: String,
    },
    /// A stage takes chunks, but for those that it holds.
    StageBegun {
        group: GroupId,
        pull: u64,
        held: Vec<u32>,
    },
    Staged {
        group: GroupId,
        pull: u64,
        chunk: u32,
    },
    StageFailed {
        group: GroupId,
        pull: u64,
        reason: String,
    },
    Installed {
        group: GroupId,
        mark: v1::Mark,
    },
    Destroyed {
        group: GroupId,
    },
    /// The engine failed for every group of the node.
    EngineFailed {
        reason: String,
    },
    /// The replica must stop; its machine is closed.
    Failed {
        group: GroupId,
        reason: String,
    },
}

struct Slot {
    machine: Box<dyn StateMachine>,
    descriptor: Bytes,
    mark: v1::Mark,
    sessions: Sessions,
    stage: Option<(u64, Box<dyn SnapshotStage>)>,
    /// The entry that was just applied asks for the state's hash.
    verify: bool,
}

/// A chunk and the stage that takes it, on their way to a thread that may take its time. Whoever has it has the group: the
/// applier is given nothing of it meanwhile ([`crate::lanes`]).
pub(crate) struct StageWork {
    group: GroupId,
    chunk: StageChunk,
    stage: Box<dyn SnapshotStage>,
}

/// A stage on its way back; none if it broke, and its machine's group with it.
pub(crate) struct StageBack {
    pub(crate) group: GroupId,
    pull: u64,
    stage: Option<Box<dyn SnapshotStage>>,
}

impl StageWork {
    /// Stages the chunk. Blocks on the engine.
    pub(crate) fn run(self) -> (StageBack, ApplyOutcome) {
        let StageWork { group, chunk: StageChunk { pull, chunk, hash, data, hurry }, mut stage } = self;
        let staged = catch_unwind(AssertUnwindSafe(|| {
            let rows = snapshot::open_chunk(&hash, &data)?;
            // The live generation is untouched: the pull is given up, and comes again.
            stage.put(chunk, &rows, hurry).map_err(|error| error.to_string())
        }));
        let (stage, outcome) = match staged {
            Ok(Ok(())) => (Some(stage), ApplyOutcome::Staged { group, pull, chunk }),
            Ok(Err(reason)) => (Some(stage), ApplyOutcome::StageFailed { group, pull, reason }),
            Err(panic) => {
                let reason = format!("the state machine panicked: {}", panic_text(panic.as_ref()));
                (None, ApplyOutcome::Failed { group, reason })
            }
        };
        (StageBack { group, pull, stage }, outcome)
    }
}

/// The machines of one apply thread.
pub(crate) struct Applier {
    machines: Arc<dyn Machines>,
    /// Boxed: a tree leaves half of its places empty.
    slots: BTreeMap<GroupId, Box<Slot>>,
    session_ttl: u64,
}

/// The bytes that an entry weighs in the apply budget.
pub(crate) fn entry_weight(entry: &pb::Entry) -> u64 {
    entry.data.len() as u64 + 32
}

/// The bytes that entries weigh in the apply budget.
pub(crate) fn weight(entries: &[pb::Entry]) -> u64 {
    entries.iter().map(entry_weight).sum()
}

impl Applier {
    pub(crate) fn new(machines: Arc<dyn Machines>, session_ttl: std::time::Duration) -> Self {
        Applier { machines, slots: BTreeMap::new(), session_ttl: hybrid::span(session_ttl) }
    }

    /// What a chunk needs to be staged elsewhere; `None` if its pull was given up. The group is not to be touched until
    /// [`Applier::take_back`].
    pub(crate) fn lend(&mut self, group: GroupId, chunk: StageChunk) -> Option<StageWork> {
        let slot = self.slots.get_mut(&group)?;
        let (_, stage) = slot.stage.take_if(|(current, _)| *current == chunk.pull)?;
        Some(StageWork { group, chunk, stage })
    }

    /// Takes a stage back that was lent.
    pub(crate) fn take_back(&mut self, back: StageBack) {
        match (back.stage, self.slots.get_mut(&back.group)) {
            (Some(stage), Some(slot)) => slot.stage = Some((back.pull, stage)),
            (None, _) => drop(self.slots.remove(&back.group)),
            (Some(_), None) => {}
        }
    }

    /// Runs one task. A panic of the machine, or an error that the engine survives, stops that group only.
    pub(crate) fn run(&mut self, task: ApplyTask, out: &mut Vec<ApplyOutcome>) {
        let group = task.group();
        let result = catch_unwind(AssertUnwindSafe(|| self.try_run(task, out)));
        let reason = match result {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(panic) => format!("the state machine panicked: {}", panic_text(panic.as_ref())),
        };
        self.slots.remove(&group);
        out.push(match self.machines.failure() {
            Some(reason) => ApplyOutcome::EngineFailed { reason },
            None => ApplyOutcome::Failed { group, reason },
        });
    }

    fn try_run(&mut self, task: ApplyTask, out: &mut Vec<ApplyOutcome>) -> Result<(), Error> {
        let group = task.group();
        let machine_error = |source| Error::Machine { group, source };
        match task {
            ApplyTask::Open { replica, descriptor, initial, took_over, .. } => {
                let mut machine = self.machines.open(group, &descriptor).map_err(machine_error)?;
                let mut found = machine.mark().map_err(machine_error)?;
                if let Some(mark) = found.as_mut().filter(|mark| Some(mark.replica) == took_over) {
                    mark.replica = replica;
                    mark.conf_state = Some(v1::ConfState { voters: vec![replica], ..Default::default() });
                }
                if found.as_ref().is_some_and(|mark| mark.replica != replica) {
                    // Crash case: an earlier replica was removed here and its tombstone was durable, but the removal of
                    // its data was cut short or lost. It is repeated before the new replica holds anything.
                    machine.destroy().map_err(machine_error)?;
                    drop(machine);
                    machine = self.machines.open(group, &descriptor).map_err(machine_error)?;
                    found = machine.mark().map_err(machine_error)?;
                }
                if let Some(mark) = &found
                    && mark.format > MARK_FORMAT
                {
                    let what = "an engine's mark";
                    return Err(Error::UnknownFormat { what, found: mark.format, known: MARK_FORMAT });
                }
                let mark = found.or(initial);
                let floor = mark.as_ref().map_or(0, |m| m.session_floor);
                let sessions = Sessions::load(machine.system_rows().map_err(machine_error)?, floor)?;
                let slot = Slot {
                    machine,
                    descriptor,
                    mark: v1::Mark { replica, ..mark.clone().unwrap_or_default() },
                    sessions,
                    stage: None,
                    verify: false,
                };
                self.slots.insert(group, Box::new(slot));
                out.push(ApplyOutcome::Opened { group, mark });
            }
            ApplyTask::Destroy { descriptor, .. } => {
                let mut machine = match self.slots.remove(&group) {
                    Some(slot) => slot.machine,
                    None => self.machines.open(group, &descriptor).map_err(machine_error)?,
                };
                machine.destroy().map_err(machine_error)?;
                out.push(ApplyOutcome::Destroyed { group });
            }
            ApplyTask::Close { .. } => {
                self.slots.remove(&group);
            }
            // Where one thread does everything.
            ApplyTask::StageChunk { chunk, .. } => {
                if let Some(work) = self.lend(group, chunk) {
                    let (back, outcome) = work.run();
                    self.take_back(back);
                    out.push(outcome);
                }
            }
            task => {
                // A slot is missing only after its replica failed; what was still queued for it is dropped.
                if let Some(slot) = self.slots.get_mut(&group) {
                    slot.run(group, task, self.session_ttl, out)?;
                }
            }
        }
        Ok(())
    }
}

impl Slot {
    fn run(
        &mut self,
        group: GroupId,
        task: ApplyTask,
        session_ttl: u64,
        out: &mut Vec<ApplyOutcome>,
    ) -> Result<(), Error> {
        let machine_error = |source| Error::Machine { group, source };
        match task {
            ApplyTask::Entries { entries, want_replies, .. } => {
                let bytes = weight(&entries);
                let mut replies = Vec::with_capacity(if want_replies { entries.len() } else { 0 });
                for entry in entries {
                    let reply = self.apply(group, entry, session_ttl)?;
                    if want_replies {
                        replies.extend(reply);
                    }
                    if std::mem::take(&mut self.verify) {
                        // The view shows the state at this very entry, on every replica.
                        self.commit(group)?;
                        let source = self.machine.checkpoint().map_err(machine_error)?;
                        out.push(ApplyOutcome::Verify { group, index: self.mark.index, source });
                    }
                }
                self.commit(group)?;
                out.push(ApplyOutcome::Applied { group, mark: self.mark.clone(), bytes, replies });
            }
            ApplyTask::Conf { index, term, conf, .. } => {
                (self.mark.index, self.mark.term, self.mark.conf_state) = (index, term, Some(conf));
                self.commit(group)?;
                out.push(ApplyOutcome::Applied {
                    group,
                    mark: self.mark.clone(),
                    bytes: 0,
                    replies: Vec::new(),
                });
            }
            ApplyTask::Checkpoint(request) => {
                let members = self.mark.conf_state.as_ref().map(crate::convert::members).unwrap_or_default();
                if self.mark.index < request.min_index || !members.contains(&request.receiver) {
                    let reason = format!("the state here stands at {}, try again", self.mark.index);
                    out.push(ApplyOutcome::CheckpointRefused { request, reason });
                } else {
                    let source = self.machine.checkpoint().map_err(machine_error)?;
                    let (mark, descriptor) = (self.mark.clone(), self.descriptor.clone());
                    out.push(ApplyOutcome::Checkpointed { request, source, mark, descriptor });
                }
            }
            ApplyTask::StageBegin { pull, manifest, .. } => {
                let index = manifest.mark.as_ref().map_or(0, |mark| mark.index);
                let Staging { stage, held } =
                    self.machine.stage(index, &manifest.chunks).map_err(machine_error)?;
                self.stage = Some((pull, stage));
                out.push(ApplyOutcome::StageBegun { group, pull, held });
            }
            ApplyTask::StageAbandon { pull, .. } => {
                if let Some((_, stage)) = self.stage.take_if(|(current, _)| *current == pull) {
                    stage.abandon().map_err(machine_error)?;
                }
            }
            ApplyTask::Install { pull, mark, .. } => {
                let Some((_, stage)) = self.stage.take_if(|(current, _)| *current == pull) else {
                    return Err(Error::Damaged {
                        group,
                        reason: "a snapshot without its staged state".to_owned(),
                    });
                };
                self.machine.install(stage, &mark).map_err(machine_error)?;
                let rows = self.machine.system_rows().map_err(machine_error)?;
                self.sessions = Sessions::load(rows, mark.session_floor)?;
                self.mark = mark.clone();
                out.push(ApplyOutcome::Installed { group, mark });
            }
            ApplyTask::Open { .. }
            | ApplyTask::Destroy { .. }
            | ApplyTask::Close { .. }
            | ApplyTask::StageChunk { .. } => {
                unreachable!("handled by the applier itself")
            }
        }
        Ok(())
    }

    /// Stages one entry. Returns what its proposer hears; nothing for a leader's empty entry.
    fn apply(&mut self, group: GroupId, entry: pb::Entry, session_ttl: u64) -> Result<Option<Reply>, Error> {
        assert!(
            entry.index == self.mark.index + 1,
            "{group}: applying {} after {}: entries are applied in order, each once",
            entry.index,
            self.mark.index
        );
        (self.mark.index, self.mark.term) = (entry.index, entry.term);
        if entry.data.is_empty() {
            return Ok(None);
        }
        let opened = envelope::open(entry.data)?;
        self.mark.timestamp = self.mark.timestamp.max(opened.timestamp);
        let timestamp = self.mark.timestamp;
        self.sessions.expire(timestamp.saturating_sub(session_ttl));
        self.mark.session_floor = self.sessions.floor();
        let result = match opened.kind {
            v1::EntryKind::Epoch => {
                self.mark.epoch = self.mark.epoch.max(opened.epoch);
                Ok((entry.index, Bytes::new()))
            }
            v1::EntryKind::Verify => {
                self.verify = true;
                Ok((entry.index, Bytes::new()))
            }
            v1::EntryKind::Command if opened.epoch != 0 && opened.epoch != self.mark.epoch => {
                Err(Rejected::StaleEpoch { group, asked: opened.epoch, current: self.mark.epoch })
            }
            v1::EntryKind::Command => {
                let verdict = opened.request.map_or(Verdict::New, |r| self.sessions.judge(&r, timestamp));
                match verdict {
                    Verdict::Answered(index, reply) => Ok((index, reply)),
                    Verdict::Refused(rejected) => Err(rejected),
                    Verdict::New => {
                        let command = Command {
                            index: entry.index,
                            term: entry.term,
                            timestamp,
                            payload: opened.payload,
                        };
                        let reply = self
                            .machine
                            .apply(&command)
                            .map_err(|source| Error::Machine { group, source })?;
                        if let Some(request) = &opened.request {
                            self.sessions.record(request, entry.index, reply.clone());
                        }
                        Ok((entry.index, reply))
                    }
                }
            }
            v1::EntryKind::Unspecified => unreachable!("refused when the envelope was opened"),
        };
        Ok(Some(Reply { index: entry.index, result }))
    }

    fn commit(&mut self, group: GroupId) -> Result<(), Error> {
        self.mark.format = MARK_FORMAT;
        let rows = self.sessions.take_changes();
        self.machine.commit(rows, &self.mark).map_err(|source| Error::Machine { group, source })
    }
}

/// What a caught panic said.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_else(|| "no message".to_owned())
}
