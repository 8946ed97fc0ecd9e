//! Pontoon behind the same door.

use std::{
    path::Path,
    sync::{Arc, Condvar, Mutex, PoisonError},
};

use pontoon_wal::{
    Batch, DataKey, Durability, Entry, Error, GroupId, HardState, KEY_BYTES, KeyId, KeySet, Options,
    PersistSink, Persisted, Submitter, Wal,
};

use crate::{
    engine::Engine,
    work::{Case, Item, Kind, Outcome},
};

pub(crate) struct Ours {
    wal: Wal,
    outstanding: Option<(Submitter, Arc<Count>)>,
}

#[derive(Default)]
struct Count {
    done: Mutex<u64>,
    more: Condvar,
}

impl PersistSink for Count {
    fn persisted(&self, done: &[Persisted]) {
        *self.done.lock().unwrap_or_else(PoisonError::into_inner) += done.len() as u64;
        self.more.notify_all();
    }

    fn failed(&self, error: &Error) {
        eprintln!("the log failed: {error}");
        std::process::exit(1);
    }
}

impl Ours {
    pub(crate) fn open(kind: Kind, dir: &Path, case: &Case, cache: bool) -> Outcome<Ours> {
        let Case { sync, file_bytes, depth, .. } = *case;
        let mut options = Options::new(dir.join("pontoon"));
        options.durability = if sync { Durability::Sync } else { Durability::System };
        if file_bytes > 0 {
            options.segment_bytes = file_bytes;
        }
        if depth > 0 {
            options.write_depth = depth;
        }
        if kind == Kind::PontoonEncrypted {
            options.keys = Some(Arc::new(KeySet::new(KeyId(1), DataKey::new([7; KEY_BYTES]))));
        }
        if !cache {
            options.cache_bytes = 0;
        }
        let (wal, _) = Wal::open(options)?;
        Ok(Ours { wal, outstanding: None })
    }

    /// A door that does not wait.
    pub(crate) fn with_door(mut self) -> Ours {
        let count = Arc::new(Count::default());
        self.outstanding = Some((self.wal.submitter(count.clone()), count));
        self
    }

    /// Hands in the `sent`th batch.
    pub(crate) fn submit(&self, items: &[Item], sent: u64) -> Outcome<()> {
        let (door, _) = self.outstanding.as_ref().ok_or("no door")?;
        let batch = batch(items);
        let room = door.try_reserve(GroupId(items[0].0), batch.size_bytes())?;
        door.submit(batch, room, sent)?;
        Ok(())
    }

    /// Blocks until this many batches are durable.
    pub(crate) fn wait_for(&self, least: u64) -> Outcome<()> {
        let (_, count) = self.outstanding.as_ref().ok_or("no door")?;
        let mut done = count.done.lock().unwrap_or_else(PoisonError::into_inner);
        while *done < least {
            done = count.more.wait(done).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }
}

fn batch(items: &[Item]) -> Batch {
    let mut batch = Batch::new();
    for (group, index, value) in items {
        let group = GroupId(*group);
        batch.append(group, &[Entry { index: *index, term: 1, kind: 0, data: value.clone() }]);
        batch.hard_state(group, HardState { term: 1, vote: 1, commit: *index });
    }
    batch
}

impl Engine for Ours {
    fn write(&self, items: &[Item]) -> Outcome<()> {
        self.wal.commit(batch(items))?;
        Ok(())
    }

    fn truncate(&self, lasts: &[(u64, u64)]) -> Outcome<()> {
        for lasts in lasts.chunks(1024) {
            let mut batch = Batch::new();
            for (group, last) in lasts {
                batch.truncate_prefix(GroupId(*group), *last, 1);
            }
            self.wal.commit(batch)?;
        }
        Ok(())
    }

    fn collect(&self) -> Outcome<()> {
        self.wal.gc_once()?;
        Ok(())
    }

    fn read(&self, group: u64, low: u64, high: u64) -> Outcome<usize> {
        let mut entries = Vec::new();
        self.wal.entries(GroupId(group), low..high, u64::MAX, &mut entries)?;
        Ok(entries.len())
    }
}
