//! What every group holds and where, in memory: 8 bytes per extent of entries.
//!
//! The index shows what was submitted, durable or not. An entry is either pending (its bytes are kept here until they are
//! written) or an extent of a segment.

use std::{
    collections::{BTreeMap, HashMap},
    hash::{BuildHasherDefault, Hasher},
    sync::{Mutex, MutexGuard, PoisonError},
};

use pontoon_proto::GroupId;

mod group;

pub(crate) use group::{Group, Piece, Place, Sim, Spot};

/// Power of two; enough that readers on a few cores rarely meet.
const SHARDS: usize = 64;

/// Group ids are small numbers that we gave out ourselves: one multiplication spreads them.
#[derive(Default)]
pub(crate) struct IdHasher(u64);

/// A map by group id.
pub(crate) type ByGroup<T> = HashMap<GroupId, T, BuildHasherDefault<IdHasher>>;

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, value: u64) {
        let mixed = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 32);
    }
}

type Shard = ByGroup<Group>;

/// All groups. A shard's lock is held for memory operations only, never during I/O.
pub(crate) struct Index {
    shards: Box<[Mutex<Shard>]>,
    /// Minimum replica ids of destroyed groups.
    tombstones: Mutex<BTreeMap<GroupId, u64>>,
}

impl Index {
    pub(crate) fn new() -> Self {
        Index { shards: (0..SHARDS).map(|_| Mutex::default()).collect(), tombstones: Mutex::default() }
    }

    /// Where a group is: groups of different shards never wait for each other.
    pub(crate) fn shard_of(group: GroupId) -> usize {
        let mut hasher = IdHasher::default();
        hasher.write_u64(group.0);
        (hasher.finish() >> 20) as usize % SHARDS
    }

    fn shard(&self, group: GroupId) -> MutexGuard<'_, Shard> {
        let shard = &self.shards[Index::shard_of(group)];
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at a group if it exists.
    pub(crate) fn with<T>(&self, group: GroupId, look: impl FnOnce(&Group) -> T) -> Option<T> {
        self.shard(group).get(&group).map(look)
    }

    /// Looks at a group, or at nothing if it does not exist.
    pub(crate) fn look<T>(&self, group: GroupId, look: impl FnOnce(Option<&Group>) -> T) -> T {
        look(self.shard(group).get(&group))
    }

    /// Changes a group if it exists.
    pub(crate) fn with_mut<T>(&self, group: GroupId, change: impl FnOnce(&mut Group) -> T) -> Option<T> {
        self.shard(group).get_mut(&group).map(change)
    }

    /// Changes a group, which exists from now on.
    pub(crate) fn with_entry<T>(&self, group: GroupId, change: impl FnOnce(&mut Group) -> T) -> T {
        change(self.shard(group).entry(group).or_default())
    }

    /// Removes a group; its tombstone never falls.
    pub(crate) fn destroy(&self, group: GroupId, min_replica: u64) {
        if let Some(mut gone) = self.shard(group).remove(&group) {
            gone.clear_log();
        }
        self.raise_tombstone(group, min_replica);
    }

    pub(crate) fn raise_tombstone(&self, group: GroupId, min_replica: u64) {
        let mut tombstones = self.tombstones.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = tombstones.entry(group).or_default();
        *kept = min_replica.max(*kept);
    }

    pub(crate) fn tombstone(&self, group: GroupId) -> Option<u64> {
        self.tombstones.lock().unwrap_or_else(PoisonError::into_inner).get(&group).copied()
    }

    pub(crate) fn tombstones(&self) -> BTreeMap<GroupId, u64> {
        self.tombstones.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Visits all groups, a shard at a time, in no order that a caller may rely on.
    pub(crate) fn for_each(&self, mut visit: impl FnMut(GroupId, &Group)) {
        for shard in &self.shards {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            shard.iter().for_each(|(group, state)| visit(*group, state));
        }
    }

    /// Visits all groups to change them.
    pub(crate) fn for_each_mut(&self, mut visit: impl FnMut(GroupId, &mut Group)) {
        for shard in &self.shards {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            shard.iter_mut().for_each(|(group, state)| visit(*group, state));
        }
    }

    /// How many groups exist.
    pub(crate) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().unwrap_or_else(PoisonError::into_inner).len()).sum()
    }
}
