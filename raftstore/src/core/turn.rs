//! A turn's end: what every ready group wants to write goes into one submission to the log.

use pontoon_proto::{GroupId, v1};
use pontoon_wal::{self as wal, Batch, Reservation};

use super::{Core, Slot, Submission, Submitted, live};
use crate::{
    apply::ApplyTask,
    effects::Effects,
    replica::{Taken, guarded},
    transport::Class,
};

/// What one submission gathers.
#[derive(Default)]
struct Turn {
    batch: Batch,
    reservation: Option<Reservation>,
    taken: Vec<(GroupId, Taken)>,
}

/// What became of a batch.
pub(super) enum Sent {
    Taken,
    /// Nothing of it was taken: the log of a group in it is damaged. That replica has stopped.
    Refused,
    /// The log has failed, and everything stops.
    Failed,
}

impl Core {
    /// Ends the turn: every group with something ready goes into one submission. To be called after the inputs that were
    /// there, before waiting for more.
    pub(crate) fn poll(&mut self, fx: &mut Effects) {
        // What the log has made durable is known by now, however long the inputs waited.
        if std::mem::take(&mut self.stall_is_due) && self.is_stalled() {
            self.make_way(fx);
        }
        // A ready can make another one ready (a sole voter's); the rounds end because each consumes what it found.
        while self.failed.is_none() {
            self.feed(fx);
            let groups = std::mem::take(&mut self.ready);
            if groups.is_empty() {
                break;
            }
            let mut turn = Turn::default();
            for group in groups {
                if turn.batch.size_bytes() > self.batch_limit / 2 {
                    self.submit(std::mem::take(&mut turn), fx);
                }
                self.collect(group, &mut turn, fx);
            }
            self.submit(turn, fx);
        }
        let control = |(node, message)| (node, Class::Control, message);
        fx.send.extend(fx.beats.take(self.shared.wal.incarnation()).map(control));
    }

    pub(super) fn poll_group(&mut self, group: GroupId, fx: &mut Effects) {
        let mut turn = Turn::default();
        self.collect(group, &mut turn, fx);
        self.submit(turn, fx);
    }

    fn collect(&mut self, group: GroupId, turn: &mut Turn, fx: &mut Effects) {
        if let Some(damage) = self.shared.wal.damage(group) {
            return self.kill(group, format!("the log lost {damage}"), fx);
        }
        let Some(replica) = live(&mut self.slots, group) else { return };
        let shared = &mut self.shared;
        let taken = guarded(|| replica.start_reads(shared, fx))
            .flatten()
            .and_then(|()| replica.take_ready(shared, &mut turn.batch, &mut turn.reservation, fx));
        replica.want_entries(fx);
        match taken {
            Ok(Some(taken)) => turn.taken.push((group, taken)),
            Ok(None) => {}
            Err(reason) => self.kill(group, reason, fx),
        }
    }

    fn submit(&mut self, mut turn: Turn, fx: &mut Effects) {
        if !turn.batch.is_empty() {
            let synced: Vec<(GroupId, u64)> =
                turn.taken.iter().filter(|(_, t)| t.sync).map(|(group, t)| (*group, t.number)).collect();
            if synced.is_empty() {
                // Only commit indexes moved: they may ride with the next sync.
                turn.batch.relaxed();
            }
            match self.send_batch(turn.batch, turn.reservation, Submission::Turn(synced), fx) {
                Sent::Taken => {}
                Sent::Refused => {
                    return turn.taken.iter().for_each(|(group, _)| self.begin_again(*group, fx));
                }
                Sent::Failed => return,
            }
        }
        for (group, taken) in turn.taken {
            self.with(group, fx, |replica, shared, fx| replica.after_submit(shared, taken, fx));
        }
    }

    /// Submits to the log.
    pub(super) fn send_batch(
        &mut self,
        batch: Batch,
        reservation: Option<Reservation>,
        what: Submission,
        fx: &mut Effects,
    ) -> Sent {
        // Hard states, empty entries, configuration and truncation were not reserved: they draw on the reserve.
        let reservation =
            reservation.unwrap_or_else(|| self.shared.submitter.try_reserve_internal(GroupId::NODE));
        let token = self.next_submission;
        self.next_submission += 1;
        match self.shared.submitter.submit(batch, reservation, token) {
            Ok(_) => {
                self.submissions.push_back(Submitted { token, since: self.shared.ticks, what });
                Sent::Taken
            }
            // Somebody who reads the disk has found it at this moment.
            Err(wal::Error::Damaged { group, damage }) => {
                self.kill(group, format!("the log lost {damage}"), fx);
                Sent::Refused
            }
            Err(error) => {
                self.on_log_failed(error.to_string(), fx);
                Sent::Failed
            }
        }
    }

    /// What a replica wanted to write was not taken, for another's sake: it goes on as after a crash, from what its log holds.
    /// Nothing of what it wanted was promised to anybody.
    fn begin_again(&mut self, group: GroupId, fx: &mut Effects) {
        let id = match self.slots.remove(&group) {
            Some(Slot::Live(mut replica)) => {
                self.part_with(&mut replica, fx);
                replica.id
            }
            other => {
                self.slots.extend(other.map(|slot| (group, slot)));
                return;
            }
        };
        fx.apply.push(ApplyTask::Close { group });
        self.slots.insert(group, Slot::Opening { replica: id, founding: false, waiting: Vec::new() });
        self.open_machine(group, fx);
    }

    pub(super) fn on_installed(&mut self, group: GroupId, mark: v1::Mark, fx: &mut Effects) {
        let Some(replica) = live(&mut self.slots, group) else { return };
        let mut turn = Turn::default();
        match replica.on_installed(&mut self.shared, mark, &mut turn.batch, fx) {
            Ok(taken) => {
                turn.taken.extend(taken.map(|taken| (group, taken)));
                self.submit(turn, fx);
                self.ready.insert(group);
            }
            Err(reason) => self.kill(group, reason, fx),
        }
    }
}
