//! Room for batches: asked for before a proposal is taken, so that a submit never fails for lack of it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{Error, Result};

/// A batch never shares its last block with another frame, and a frame's header takes part of one.
const BLOCK: u64 = 4096;

#[derive(Debug)]
struct State {
    /// Bytes of reservations that are out, queued batches included.
    charged: u64,
    /// Bytes that ordinary reservations may take in all. The reserve is not in it.
    room: u64,
}

/// The account of room in the log.
#[derive(Debug)]
pub(crate) struct Space {
    state: Mutex<State>,
    max_pending: u64,
}

impl Space {
    pub(crate) fn new(max_pending: u64) -> Arc<Space> {
        Arc::new(Space { state: Mutex::new(State { charged: 0, room: u64::MAX }), max_pending })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a batch of this size may cost on disk when it is written alone.
    fn charge(bytes: u64) -> u64 {
        bytes.div_ceil(BLOCK).saturating_add(1).saturating_mul(BLOCK)
    }

    pub(crate) fn try_reserve(self: &Arc<Self>, bytes: u64) -> Result<Reservation> {
        let charge = Space::charge(bytes);
        let mut state = self.state();
        if state.charged.saturating_add(charge) > state.room {
            return Err(Error::NoSpace { needed_bytes: bytes });
        }
        // One batch is always let in, whatever the limit.
        if state.charged > 0 && state.charged.saturating_add(charge) > self.max_pending {
            return Err(Error::Busy { pending_bytes: state.charged });
        }
        state.charged += charge;
        Ok(Reservation { space: self.clone(), charge })
    }

    /// A reservation that is always given; it grows with its batch.
    pub(crate) fn reserve_internal(self: &Arc<Self>) -> Reservation {
        self.state().charged += BLOCK;
        Reservation { space: self.clone(), charge: BLOCK }
    }

    /// States how much room there is, charges that are out included.
    pub(crate) fn set_room(&self, room: u64) {
        self.state().room = room;
    }

    pub(crate) fn charged(&self) -> u64 {
        self.state().charged
    }
}

/// Room that is held for a batch. Dropping it gives the room back; submitting it keeps it until the batch is durable.
#[derive(Debug)]
#[must_use = "the room is given back when the reservation is dropped"]
pub struct Reservation {
    space: Arc<Space>,
    charge: u64,
}

impl Reservation {
    /// Adds another reservation to this one, for a batch that was gathered from several.
    ///
    /// # Panics
    /// If the other comes from another log: its room is elsewhere.
    pub fn merge(&mut self, mut other: Reservation) {
        assert!(Arc::ptr_eq(&self.space, &other.space), "reservations of two logs cannot merge");
        self.charge += std::mem::take(&mut other.charge);
    }

    /// Raises the charge to what a batch of this size takes, without asking.
    pub(crate) fn cover(&mut self, bytes: u64) {
        let missing = Space::charge(bytes).saturating_sub(self.charge);
        if missing == 0 {
            return;
        }
        self.space.state().charged += missing;
        self.charge += missing;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.charge > 0 {
            self.space.state().charged -= self.charge;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_given_back_on_drop_and_merged_once() {
        let space = Space::new(1 << 20);
        space.set_room(5 * BLOCK);
        let mut first = space.try_reserve(100).unwrap();
        let second = space.try_reserve(100).unwrap();
        assert!(matches!(space.try_reserve(100), Err(Error::NoSpace { needed_bytes: 100 })));
        first.merge(second);
        assert_eq!(space.charged(), 4 * BLOCK);
        let internal = space.reserve_internal();
        drop((first, internal));
        assert_eq!(space.charged(), 0);
    }

    #[test]
    fn too_much_pending_is_busy_but_one_batch_always_passes() {
        let space = Space::new(BLOCK);
        let first = space.try_reserve(1 << 20).unwrap();
        assert!(matches!(space.try_reserve(1), Err(Error::Busy { .. })));
        drop(first);
        assert!(space.try_reserve(1).is_ok());
    }
}
