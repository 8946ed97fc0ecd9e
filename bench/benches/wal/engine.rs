//! What all engines can do, and how each is opened.

use std::path::Path;

use crate::{
    ideal::Ideal,
    ours::Ours,
    peer::Peer,
    work::{Case, Item, Kind, Outcome},
};

/// A log under measurement. What the ideal cannot do it refuses.
pub(crate) trait Engine: Send + Sync {
    /// Writes the entries and a hard state of each of their groups, and returns when the batch is as durable as was asked.
    fn write(&self, items: &[Item]) -> Outcome<()>;

    /// Drops the entries of groups up to an index.
    fn truncate(&self, _lasts: &[(u64, u64)]) -> Outcome<()> {
        Ok(())
    }

    /// Frees files that hold nothing any more.
    fn collect(&self) -> Outcome<()> {
        Ok(())
    }

    /// Reads entries; how many there were.
    fn read(&self, _group: u64, _low: u64, _high: u64) -> Outcome<usize> {
        Err("this engine keeps no entries".into())
    }
}

pub(crate) fn open(kind: Kind, case: &Case, dir: &Path) -> Outcome<Box<dyn Engine>> {
    let (sync, file) = (case.sync, case.file_bytes);
    Ok(match kind {
        Kind::IdealBuffered => Box::new(Ideal::open(dir, false, sync)?),
        Kind::IdealDirect => Box::new(Ideal::open(dir, true, sync)?),
        Kind::RaftEngine => Box::new(Peer::open(dir, false, false, sync, file)?),
        Kind::RaftEngineMerged => Box::new(Peer::open(dir, false, true, sync, file)?),
        Kind::RaftEngineTuned => Box::new(Peer::open(dir, true, false, sync, file)?),
        Kind::RaftEngineTunedMerged => Box::new(Peer::open(dir, true, true, sync, file)?),
        Kind::Pontoon | Kind::PontoonEncrypted => Box::new(Ours::open(kind, dir, case, true)?),
    })
}
