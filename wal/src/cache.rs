//! Frames that were written lately, whole, as they are on disk. Keeping one costs nothing per record.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;

#[derive(Default)]
struct State {
    /// Per segment, frames by offset.
    frames: HashMap<u32, BTreeMap<u32, Bytes>>,
    /// The order of their arrival, which is the order of leaving. May name frames that left with their segment.
    order: VecDeque<(u32, u32)>,
    bytes: usize,
}

/// A budget of bytes; the oldest frames leave first.
pub(crate) struct Cache {
    state: Mutex<State>,
    budget: usize,
}

impl Cache {
    pub(crate) fn new(budget: usize) -> Cache {
        Cache { state: Mutex::default(), budget }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn insert(&self, segment: u32, offset: u32, frame: Bytes) {
        if frame.len() > self.budget {
            return;
        }
        let mut state = self.state();
        state.bytes += frame.len();
        if let Some(old) = state.frames.entry(segment).or_default().insert(offset, frame) {
            state.bytes -= old.len();
        }
        state.order.push_back((segment, offset));
        while state.bytes > self.budget
            && let Some((segment, offset)) = state.order.pop_front()
        {
            if let Some(frame) = state.frames.get_mut(&segment).and_then(|frames| frames.remove(&offset)) {
                state.bytes -= frame.len();
            }
        }
    }

    /// The bytes at an offset of a segment, if the frame around them is here.
    pub(crate) fn get(&self, segment: u32, offset: u32, len: u32) -> Option<Bytes> {
        let state = self.state();
        let (start, frame) = state.frames.get(&segment)?.range(..=offset).next_back()?;
        let from = (offset - start) as usize;
        (from + len as usize <= frame.len()).then(|| frame.slice(from..from + len as usize))
    }

    /// Forgets a segment that is going to be used again.
    pub(crate) fn forget(&self, segment: u32) {
        let mut state = self.state();
        if let Some(frames) = state.frames.remove(&segment) {
            state.bytes -= frames.values().map(Bytes::len).sum::<usize>();
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.state().bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_leave_first_and_a_forgotten_segment_is_gone() {
        let cache = Cache::new(8192);
        cache.insert(1, 0, vec![1; 4096].into());
        cache.insert(1, 4096, vec![2; 4096].into());
        assert_eq!(cache.get(1, 4100, 2).unwrap(), &[2, 2][..]);
        assert!(cache.get(1, 4095, 2).is_none());
        cache.insert(2, 0, vec![3; 4096].into());
        assert!(cache.get(1, 0, 1).is_none());
        cache.forget(1);
        assert_eq!(cache.bytes(), 4096);
        assert!(Cache::new(0).get(1, 0, 1).is_none());
    }
}
