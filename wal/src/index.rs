//! What every group holds and where, in memory: 8 bytes per extent of entries.
//!
//! The index shows what was submitted, durable or not. An entry is either pending (its bytes are kept here until they are
//! written) or an extent of a segment.

use std::{
    collections::{BTreeMap, HashMap},
    hash::{BuildHasherDefault, Hasher},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use pontoon_proto::GroupId;

mod group;

pub(crate) use group::{Extent, Group, Piece, Place, RUN_EXTENTS, Run, Sim, Spot};

/// Power of two; enough that readers on a few cores rarely meet, and that a checkpoint, which takes one after the other,
/// never holds submitters up for long. Manifests and footers keep something for each, so that this number and
/// [`Index::shard_of`] belong to the format.
pub(crate) const SHARDS: usize = 64;

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

/// A part of the groups.
#[derive(Default)]
pub(crate) struct Shard {
    pub(crate) groups: ByGroup<Group>,
    /// Minimum replica ids of destroyed groups.
    pub(crate) tombstones: ByGroup<u64>,
}

/// All groups. A shard's lock is held for memory operations only, never during I/O.
pub(crate) struct Index {
    shards: Box<[Mutex<Shard>]>,
    /// How many groups exist.
    groups: AtomicUsize,
}

impl Index {
    pub(crate) fn new() -> Self {
        Index { shards: (0..SHARDS).map(|_| Mutex::default()).collect(), groups: AtomicUsize::new(0) }
    }

    /// Where a group is: groups of different shards never wait for each other.
    pub(crate) fn shard_of(group: GroupId) -> usize {
        let mut hasher = IdHasher::default();
        hasher.write_u64(group.0);
        (hasher.finish() >> 20) as usize % SHARDS
    }

    fn shard(&self, group: GroupId) -> MutexGuard<'_, Shard> {
        self.nth_shard(Index::shard_of(group))
    }

    /// A shard by its number.
    pub(crate) fn nth_shard(&self, nth: usize) -> MutexGuard<'_, Shard> {
        self.shards[nth].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at a group if it exists.
    pub(crate) fn with<T>(&self, group: GroupId, look: impl FnOnce(&Group) -> T) -> Option<T> {
        self.shard(group).groups.get(&group).map(look)
    }

    /// Looks at a group, or at nothing if it does not exist.
    pub(crate) fn look<T>(&self, group: GroupId, look: impl FnOnce(Option<&Group>) -> T) -> T {
        look(self.shard(group).groups.get(&group))
    }

    /// Changes a group if it exists.
    pub(crate) fn with_mut<T>(&self, group: GroupId, change: impl FnOnce(&mut Group) -> T) -> Option<T> {
        self.shard(group).groups.get_mut(&group).map(change)
    }

    /// Changes a group, which exists from now on.
    pub(crate) fn with_entry<T>(&self, group: GroupId, change: impl FnOnce(&mut Group) -> T) -> T {
        let mut shard = self.shard(group);
        let state = shard.groups.entry(group).or_insert_with(|| {
            self.groups.fetch_add(1, Ordering::Relaxed);
            Group::default()
        });
        change(state)
    }

    /// Removes a group; its tombstone never falls.
    pub(crate) fn destroy(&self, group: GroupId, min_replica: u64) {
        let mut shard = self.shard(group);
        if let Some(mut gone) = shard.groups.remove(&group) {
            self.groups.fetch_sub(1, Ordering::Relaxed);
            gone.clear_log();
        }
        raise(&mut shard, group, min_replica);
    }

    pub(crate) fn raise_tombstone(&self, group: GroupId, min_replica: u64) {
        raise(&mut self.shard(group), group, min_replica);
    }

    pub(crate) fn tombstone(&self, group: GroupId) -> Option<u64> {
        self.shard(group).tombstones.get(&group).copied()
    }

    pub(crate) fn tombstones(&self) -> BTreeMap<GroupId, u64> {
        let mut all = BTreeMap::new();
        for nth in 0..SHARDS {
            all.extend(self.nth_shard(nth).tombstones.iter().map(|(group, id)| (*group, *id)));
        }
        all
    }

    /// Visits all groups, a shard at a time, in no order that a caller may rely on.
    pub(crate) fn for_each(&self, mut visit: impl FnMut(GroupId, &Group)) {
        for nth in 0..SHARDS {
            self.nth_shard(nth).groups.iter().for_each(|(group, state)| visit(*group, state));
        }
    }

    /// Visits all groups to change them.
    pub(crate) fn for_each_mut(&self, mut visit: impl FnMut(GroupId, &mut Group)) {
        for nth in 0..SHARDS {
            self.nth_shard(nth).groups.iter_mut().for_each(|(group, state)| visit(*group, state));
        }
    }

    /// How many groups exist.
    pub(crate) fn len(&self) -> usize {
        self.groups.load(Ordering::Relaxed)
    }
}

fn raise(shard: &mut Shard, group: GroupId, min_replica: u64) {
    let kept = shard.tombstones.entry(group).or_default();
    *kept = min_replica.max(*kept);
}
