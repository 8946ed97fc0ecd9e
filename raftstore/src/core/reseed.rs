//! A replica whose engine is lost while its log is whole: the state comes from another member, and the replica goes on.
//!
//! The log holds the votes, and everything that was acknowledged and is not in some quorum's states: term, vote and entries
//! stay. Only what was applied below the log's beginning is gone, so a state at or above that is all that is missing. It is
//! no snapshot of raft's, which refuses what lies below its commit; and no raft runs here meanwhile, so that nothing is
//! answered, promised or voted. Whoever takes this replica for a member and says so is a source: a leader's heartbeats come
//! for as long as nobody answers them, and without a leader a candidate's question does as well.
//!
//! Crash argument. The stage and the switch are those of any snapshot (`replica/ready.rs` `begin_install`); before the switch
//! the engine is as lost as before, and the next open begins again with what is staged. If the log does not hold the entry of
//! the state that came, it begins anew behind it, in one batch with a hard state of at least that entry's term, no vote if
//! that made the term rise, and a commit at or above it. What it held there was never committed: two logs with different
//! terms at an index that is committed in one of them differ in all that follows. Between switch and batch the mark's switch
//! record tells the next open what to write.

use std::collections::BTreeSet;

use pontoon_proto::{GroupId, ReplicaId, v1};
use pontoon_wal::Batch;
use v1::peer_message::Body;

use super::{Core, Slot, Submission};
use crate::{
    apply::{ApplyOutcome, ApplyTask},
    effects::Effects,
    puller::Puller,
    replica::{install_batch, switched},
    types::GroupStatus,
};

/// What is told of a replica that waits for its state.
const LOST: &str = "its engine's state is lost; it waits for a member that has the state, and if no other member has, restore \
                    the engine's directory from a backup";

/// A replica that has its log and no state.
pub(super) struct Reseed {
    pub(super) replica: ReplicaId,
    puller: Puller,
    /// Where the log begins: the state must stand there or above.
    truncated: u64,
    /// Members that were heard.
    members: BTreeSet<u64>,
}

impl Reseed {
    fn status(&self, core: &Core, group: GroupId) -> GroupStatus {
        let mut status = GroupStatus::new(group, self.replica);
        if let Some(view) = core.shared.wal.group(group) {
            (status.first_index, status.last_index) = (view.first_index, view.last_index);
            (status.persisted, status.term, status.commit) =
                (view.last_index, view.hard_state.term, view.hard_state.commit);
        }
        status.pull = self.puller.progress();
        let blocked = self.puller.blocked().filter(|_| status.pull.is_none());
        status.pull_blocked = Some(blocked.map_or_else(|| LOST.to_owned(), |why| format!("{LOST} ({why})")));
        status
    }
}

impl Core {
    /// Whether the engine has less than the log builds upon.
    pub(super) fn is_engine_lost(&self, group: GroupId, mark: Option<&v1::Mark>) -> bool {
        let view = self.shared.wal.group(group).filter(|view| view.damaged.is_none());
        view.is_some_and(|view| mark.map_or(0, |mark| mark.index) < view.truncated.0)
    }

    /// The state is to come from elsewhere. Whoever waits for the replica hears that it is here.
    pub(super) fn reseed(&mut self, group: GroupId, replica: ReplicaId, fx: &mut Effects) {
        let truncated = self.shared.wal.group(group).map_or(0, |view| view.truncated.0);
        tracing::warn!(%group, %replica, truncated, "the engine has lost a replica's state: it comes from another member");
        let puller = Puller::new(group, replica);
        let reseed = Reseed { replica, puller, truncated, members: BTreeSet::new() };
        self.slots.insert(group, Slot::Reseeding(Box::new(reseed)));
        self.reseeding.insert(group);
        self.tell_reseed(group, fx);
    }

    pub(super) fn tell_reseed(&mut self, group: GroupId, fx: &mut Effects) {
        if let Some(Slot::Reseeding(reseed)) = self.slots.get(&group) {
            fx.statuses.push(reseed.status(self, group));
        }
    }

    pub(super) fn reseed_status(&self, group: GroupId) -> Option<GroupStatus> {
        match self.slots.get(&group)? {
            Slot::Reseeding(reseed) => Some(reseed.status(self, group)),
            _ => None,
        }
    }

    /// A member speaks to a replica that waits for its state.
    pub(super) fn on_peer_of_reseed(
        &mut self,
        group: GroupId,
        from: ReplicaId,
        to: u64,
        body: Body,
        fx: &mut Effects,
    ) {
        let Some(Slot::Reseeding(reseed)) = self.slots.get_mut(&group) else { return };
        if reseed.replica.get() != to {
            return;
        }
        let shared = &mut self.shared;
        let complete = match body {
            Body::Raft(_) => {
                let is_new = reseed.members.insert(from.get());
                if reseed.puller.is_idle() && reseed.puller.refuses(shared).is_none() {
                    let mut sources: Vec<u64> = reseed.members.iter().copied().collect();
                    let by = shared.next_unique() as usize % sources.len();
                    sources.rotate_left(by);
                    reseed.puller.begin(shared, 0, sources, reseed.truncated, fx);
                } else if is_new {
                    reseed.puller.add_source(from.get());
                }
                false
            }
            Body::ManifestRequest(request) => {
                let reason = "the state here is lost and comes from another member".to_owned();
                reseed.puller.say(
                    from.get(),
                    Body::PullRefused(v1::PullRefused { pull: request.pull, reason }),
                    fx,
                );
                return;
            }
            body => reseed.puller.on_said(shared, from.get(), body, fx),
        };
        self.install_reseed(group, complete, fx);
    }

    /// What the applier says of a state that is on its way. False: no such replica waits here.
    pub(super) fn on_outcome_of_reseed(&mut self, outcome: &ApplyOutcome, fx: &mut Effects) -> bool {
        let group = match outcome {
            ApplyOutcome::StageBegun { group, .. }
            | ApplyOutcome::Staged { group, .. }
            | ApplyOutcome::StageFailed { group, .. }
            | ApplyOutcome::Installed { group, .. } => *group,
            _ => return false,
        };
        let Some(Slot::Reseeding(reseed)) = self.slots.get_mut(&group) else { return false };
        let shared = &mut self.shared;
        let complete = match outcome {
            ApplyOutcome::StageBegun { pull, held, .. } => reseed.puller.on_begun(shared, *pull, held, fx),
            ApplyOutcome::Staged { pull, chunk, .. } => reseed.puller.on_staged(shared, *pull, *chunk, fx),
            ApplyOutcome::StageFailed { pull, reason, .. } => {
                reseed.puller.on_stage_failed(shared, *pull, reason.clone(), fx);
                false
            }
            ApplyOutcome::Installed { mark, .. } => {
                self.on_reseeded(group, mark, fx);
                return true;
            }
            _ => false,
        };
        self.install_reseed(group, complete, fx);
        true
    }

    /// Everything is staged: the engine switches.
    fn install_reseed(&mut self, group: GroupId, complete: bool, fx: &mut Effects) {
        let Some(Slot::Reseeding(reseed)) = self.slots.get_mut(&group) else { return };
        if complete && let Some((pull, mark)) = reseed.puller.step() {
            fx.apply.push(ApplyTask::Install { group, pull, mark: switched(mark, reseed.replica) });
        }
        self.tell_reseed(group, fx);
    }

    /// The engine has the state; the log follows if it must, and the replica opens as at any start.
    fn on_reseeded(&mut self, group: GroupId, mark: &v1::Mark, fx: &mut Effects) {
        let Some(Slot::Reseeding(mut reseed)) = self.slots.remove(&group) else { return };
        self.reseeding.remove(&group);
        if let Some(pull) = reseed.puller.take(&mut self.shared) {
            fx.events.push(pull.installed(group));
        }
        let replica = reseed.replica;
        self.slots.insert(group, Slot::Opening { replica, founding: false, waiting: Vec::new() });
        let Some(view) = self.shared.wal.group(group) else { return };
        if self.shared.wal.term(group, mark.index).is_ok_and(|term| term == mark.term) {
            return self.open_machine(group, fx);
        }
        let mut batch = Batch::new();
        install_batch(&mut batch, group, mark, view.hard_state);
        self.send_batch(batch, None, Submission::Created(group), fx);
    }

    /// The replica goes, or stops.
    pub(super) fn forget_reseed(&mut self, group: GroupId) {
        self.reseeding.remove(&group);
        self.shared.turns.leave(group);
    }

    /// Time goes on for those that wait for their state.
    pub(super) fn tick_reseeds(&mut self, ticks: u64, fx: &mut Effects) {
        let groups: Vec<GroupId> = self.reseeding.iter().copied().collect();
        for group in groups {
            let Some(Slot::Reseeding(reseed)) = self.slots.get_mut(&group) else { continue };
            let complete = reseed.puller.tick(&mut self.shared, ticks, fx);
            self.install_reseed(group, complete, fx);
        }
    }

    /// A pull that waited for its turn, or for the budget, goes on.
    pub(super) fn go_on_with_reseed(&mut self, group: GroupId, fx: &mut Effects) {
        if let Some(Slot::Reseeding(reseed)) = self.slots.get_mut(&group) {
            reseed.puller.go_on(&mut self.shared, fx);
        }
    }
}
