//! Whether a record may follow what a group holds and what the records before it in a batch do.

use pontoon_proto::GroupId;

use super::Group;
use crate::{
    Error, Result,
    record::{self, Head, Kind},
};

/// What a batch has done to a group's bounds so far, for checking the rest of it before anything is applied.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sim {
    truncated: u64,
    last: u64,
    damaged: bool,
    /// Terms can be looked up in the group only while its log is the one before the batch, below this index.
    known_below: u64,
}

impl Sim {
    /// Of a group as it is before the batch.
    pub(crate) fn of(group: &Group) -> Sim {
        Sim {
            truncated: group.truncated.0,
            last: group.last_index(),
            damaged: group.damage.is_some(),
            known_below: u64::MAX,
        }
    }

    /// Checks that a record, whose bytes begin the slice, may follow, and notes what it does.
    pub(crate) fn check(&mut self, head: &Head, record: &[u8], state: Option<&Group>) -> Result<()> {
        let Head { group, index, .. } = *head;
        if self.damaged && head.kind != Kind::Destroy {
            let damage = state.and_then(|state| state.damage.as_deref().cloned()).unwrap_or_default();
            return Err(Error::Damaged { group, damage });
        }
        match head.kind {
            Kind::Entries => {
                if index <= self.truncated {
                    return Err(Error::Compacted { first: self.truncated + 1 });
                }
                if index > self.last + 1 {
                    return Err(Error::Gap { group, expected: self.last + 1, found: index });
                }
                self.last = index + u64::from(head.count) - 1;
                self.known_below = self.known_below.min(index);
            }
            Kind::TruncatePrefix if index > self.truncated => self.truncate(group, index, record, state)?,
            Kind::ResetTo => self.reset(index),
            Kind::Snapshot if head.count == 1 => self.reset(index),
            Kind::Destroy => {
                self.reset(0);
                self.damaged = false;
            }
            Kind::TruncatePrefix | Kind::Snapshot | Kind::HardState | Kind::PutMeta => {}
        }
        Ok(())
    }

    fn truncate(&mut self, group: GroupId, index: u64, record: &[u8], state: Option<&Group>) -> Result<()> {
        if index > self.last {
            return Err(Error::Unavailable { last: self.last });
        }
        let given = record::truncated_term(record).unwrap_or_default();
        let ours = state.filter(|_| index < self.known_below).and_then(|state| state.term(index).ok());
        if let Some(ours) = ours.filter(|ours| *ours != given) {
            return Err(Error::TermMismatch { group, index, ours, given });
        }
        self.truncated = index;
        Ok(())
    }

    fn reset(&mut self, index: u64) {
        (self.truncated, self.last, self.known_below) = (index, index, 0);
    }
}
