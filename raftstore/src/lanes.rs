//! What waits to be applied: a queue per group, and turns among groups.
//!
//! A thread takes a group, works off a bounded piece of its queue and goes on with the next, so that a group with much to
//! apply delays the others by one piece and no more. Entries that wait are applied as one batch of the engine, however
//! they came.
//!
//! A chunk of a received state takes many times as long as a piece of entries, and goes to another thread. Until that gives the
//! group back ([`Lane::release`]) nothing else of it is handed out: one thread at a time has a group.
//!
//! How much waits is bounded where it comes from: by what a group, and all groups of a core, may have unapplied
//! ([`crate::Config::max_unapplied_bytes`]).

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Condvar, Mutex, MutexGuard},
};

use pontoon_proto::GroupId;
use raft::eraftpb as pb;

use crate::apply::{ApplyTask, entry_weight};

/// The bytes of entries that a group applies before the next one has its turn; exceeded by one entry at most.
const PIECE_BYTES: u64 = 256 << 10;

#[derive(Default)]
struct Queues {
    /// Never empty ones.
    by_group: BTreeMap<GroupId, VecDeque<ApplyTask>>,
    /// Groups with tasks that are not held, each once, in the order of their turns.
    turns: VecDeque<GroupId>,
    /// Groups of which a chunk was handed out.
    held: BTreeSet<GroupId>,
    closed: bool,
}

/// The queues of one apply thread.
pub(crate) struct Lane {
    queues: Mutex<Queues>,
    more: Condvar,
    /// The group whose turn is always next.
    urgent: Option<GroupId>,
}

impl Lane {
    pub(crate) fn new(urgent: Option<GroupId>) -> Lane {
        Lane { queues: Mutex::default(), more: Condvar::new(), urgent }
    }

    fn queues(&self) -> MutexGuard<'_, Queues> {
        // Nothing under this lock can be left half changed by a panic.
        self.queues.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Adds a task behind those of its group. Never blocks for long.
    pub(crate) fn push(&self, task: ApplyTask) {
        let mut queues = self.queues();
        queues.push(task, self.urgent);
        drop(queues);
        self.more.notify_one();
    }

    /// Adds tasks, each behind those of its group. Never blocks for long.
    pub(crate) fn push_all(&self, tasks: impl Iterator<Item = ApplyTask>) {
        let mut queues = self.queues();
        tasks.for_each(|task| queues.push(task, self.urgent));
        drop(queues);
        self.more.notify_one();
    }

    /// The chunk that was handed out is dealt with: the group's other tasks may follow.
    pub(crate) fn release(&self, group: GroupId) {
        let mut queues = self.queues();
        queues.release(group, self.urgent);
        drop(queues);
        self.more.notify_all();
    }

    /// No task comes after those that were pushed.
    pub(crate) fn close(&self) {
        self.queues().closed = true;
        self.more.notify_all();
    }

    /// Tasks that wait.
    pub(crate) fn len(&self) -> usize {
        self.queues().by_group.values().map(VecDeque::len).sum()
    }

    /// The next piece of work, if there is one.
    pub(crate) fn try_take(&self) -> Option<ApplyTask> {
        self.queues().take(self.urgent)
    }

    /// Waits for the next piece of work. `None`: closed, and everything was handed out.
    pub(crate) fn take(&self) -> Option<ApplyTask> {
        let mut queues = self.queues();
        loop {
            if let Some(task) = queues.take(self.urgent) {
                return Some(task);
            }
            if queues.closed && queues.held.is_empty() {
                return None;
            }
            queues = self.more.wait(queues).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }
}

impl Queues {
    fn push(&mut self, task: ApplyTask, urgent: Option<GroupId>) {
        let group = task.group();
        let queue = self.by_group.entry(group).or_default();
        let is_first = queue.is_empty();
        queue.push_back(task);
        if is_first && !self.held.contains(&group) {
            self.line_up(group, urgent);
        }
    }

    fn line_up(&mut self, group: GroupId, urgent: Option<GroupId>) {
        match urgent == Some(group) {
            true => self.turns.push_front(group),
            false => self.turns.push_back(group),
        }
    }

    fn release(&mut self, group: GroupId, urgent: Option<GroupId>) {
        if self.held.remove(&group) && self.by_group.contains_key(&group) {
            self.line_up(group, urgent);
        }
    }

    /// The next piece of the group whose turn it is.
    fn take(&mut self, urgent: Option<GroupId>) -> Option<ApplyTask> {
        let group = self.turns.pop_front()?;
        let queue = self.by_group.get_mut(&group)?;
        let task = queue.pop_front()?;
        let piece = match task {
            ApplyTask::Entries { group, entries, want_replies } => {
                gather(queue, group, entries, want_replies)
            }
            other => other,
        };
        let more = !queue.is_empty();
        if !more {
            self.by_group.remove(&group);
        }
        if matches!(piece, ApplyTask::StageChunk { .. }) {
            self.held.insert(group);
        } else if more {
            self.line_up(group, urgent);
        }
        Some(piece)
    }
}

/// Makes one piece of the entries and those that wait behind them.
fn gather(
    queue: &mut VecDeque<ApplyTask>,
    group: GroupId,
    mut entries: Vec<pb::Entry>,
    mut want_replies: bool,
) -> ApplyTask {
    let mut bytes = 0;
    let fits = entries.iter().take_while(|entry| {
        let before = bytes;
        bytes += entry_weight(entry);
        before < PIECE_BYTES
    });
    let fits = fits.count();
    if fits < entries.len() {
        let entries = entries.split_off(fits);
        queue.push_front(ApplyTask::Entries { group, entries, want_replies });
    }
    while bytes < PIECE_BYTES
        && let Some(ApplyTask::Entries { entries: next, .. }) = queue.front()
        && bytes + next.iter().map(entry_weight).sum::<u64>() <= PIECE_BYTES
    {
        if let Some(ApplyTask::Entries { entries: next, want_replies: wanted, .. }) = queue.pop_front() {
            bytes += next.iter().map(entry_weight).sum::<u64>();
            entries.extend(next);
            // Who did not propose has nobody waiting, and ignores what it hears.
            want_replies |= wanted;
        }
    }
    ApplyTask::Entries { group, entries, want_replies }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apply::StageChunk;

    fn entries(group: u64, indexes: std::ops::Range<u64>, bytes: usize) -> ApplyTask {
        let entry = |index| pb::Entry { index, data: vec![0; bytes].into(), ..Default::default() };
        let group = GroupId(group);
        ApplyTask::Entries { group, entries: indexes.map(entry).collect(), want_replies: false }
    }

    fn chunk(group: GroupId) -> ApplyTask {
        let (hash, data) = Default::default();
        ApplyTask::StageChunk { group, chunk: StageChunk { pull: 5, chunk: 0, hash, data, hurry: false } }
    }

    fn close(group: u64) -> ApplyTask {
        ApplyTask::Close { group: GroupId(group) }
    }

    /// What a lane hands out: group and indexes, none for another task.
    fn drain(lane: &Lane) -> Vec<(u64, Vec<u64>)> {
        lane.close();
        let mut all = Vec::new();
        while let Some(task) = lane.take() {
            let indexes = match &task {
                ApplyTask::Entries { entries, .. } => entries.iter().map(|entry| entry.index).collect(),
                _ => Vec::new(),
            };
            all.push((task.group().0, indexes));
        }
        all
    }

    #[test]
    fn entries_that_wait_become_one_piece_and_nothing_overtakes_in_a_group() {
        let lane = Lane::new(None);
        lane.push(entries(1, 1..3, 10));
        lane.push(entries(1, 3..5, 10));
        lane.push(close(1));
        lane.push(entries(1, 5..6, 10));
        assert_eq!(drain(&lane), [(1, vec![1, 2, 3, 4]), (1, vec![]), (1, vec![5])]);
    }

    #[test]
    fn a_group_with_much_to_apply_delays_the_others_by_one_piece() {
        let lane = Lane::new(None);
        lane.push(entries(1, 1..101, 100 << 10));
        lane.push(entries(2, 1..2, 10));
        lane.push(entries(3, 1..2, 10));
        let order: Vec<u64> = drain(&lane).into_iter().map(|(group, _)| group).collect();
        assert_eq!(order[..4], [1, 2, 3, 1]);
        let lane = Lane::new(None);
        lane.push(entries(1, 1..101, 100 << 10));
        let pieces = drain(&lane);
        assert!(pieces.iter().all(|(_, indexes)| indexes.len() <= 3), "{pieces:?}");
        let whole: Vec<u64> = pieces.into_iter().flat_map(|(_, indexes)| indexes).collect();
        assert_eq!(whole, (1..101).collect::<Vec<_>>());
    }

    #[test]
    fn nothing_of_a_group_follows_a_chunk_before_it_is_given_back() {
        let lane = Lane::new(None);
        let group = GroupId(1);
        lane.push(chunk(group));
        lane.push(close(1));
        lane.push(entries(2, 1..2, 10));
        assert!(matches!(lane.try_take(), Some(ApplyTask::StageChunk { .. })));
        assert_eq!(lane.try_take().map(|task| task.group()), Some(GroupId(2)));
        lane.push(entries(1, 1..2, 10));
        assert!(lane.try_take().is_none());
        lane.release(GroupId(2));
        assert!(lane.try_take().is_none(), "that one was not held");
        lane.release(group);
        assert_eq!(drain(&lane), [(1, vec![]), (1, vec![1])]);
    }

    #[test]
    fn a_closed_lane_waits_for_what_is_held() {
        let lane = std::sync::Arc::new(Lane::new(None));
        let group = GroupId(1);
        lane.push(chunk(group));
        lane.push(close(1));
        assert!(lane.take().is_some());
        lane.close();
        let taker = std::thread::spawn({
            let lane = lane.clone();
            move || lane.take().map(|task| task.group())
        });
        lane.release(group);
        assert_eq!(taker.join().unwrap(), Some(group));
        assert!(lane.take().is_none());
    }

    #[test]
    fn the_urgent_group_is_next_whenever_it_has_something() {
        let lane = Lane::new(Some(GroupId(9)));
        for group in 1..4 {
            lane.push(entries(group, 1..2, 10));
        }
        lane.push(entries(9, 1..2, 10));
        assert_eq!(drain(&lane).first().map(|(group, _)| *group), Some(9));
    }
}
