//! What is measured: who writes what, and with which engine.

use serde::{Deserialize, Serialize};

pub(crate) type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Entries and hard states of at most this many groups go into one batch.
const BATCH_GROUPS: u64 = 64;

/// Who writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// One file, buffered write and fdatasync, concurrent submitters merged: no index, records or recovery.
    IdealBuffered,
    /// The same with O_DIRECT and O_DSYNC.
    IdealDirect,
    /// As it comes, a thread per submitter.
    RaftEngine,
    /// As it comes, one thread that merges the submitters' batches.
    RaftEngineMerged,
    /// Files filled ahead and recycled, no compression; a thread per submitter.
    RaftEngineTuned,
    /// The same with one thread that merges.
    RaftEngineTunedMerged,
    /// Ours.
    Pontoon,
    /// Ours, encrypted. Only if it is asked for by name.
    PontoonEncrypted,
}

impl Kind {
    pub(crate) const ALL: [Kind; 8] = [
        Kind::IdealBuffered,
        Kind::IdealDirect,
        Kind::RaftEngine,
        Kind::RaftEngineMerged,
        Kind::RaftEngineTuned,
        Kind::RaftEngineTunedMerged,
        Kind::Pontoon,
        Kind::PontoonEncrypted,
    ];

    /// Whether it is ours.
    pub(crate) fn is_ours(self) -> bool {
        matches!(self, Kind::Pontoon | Kind::PontoonEncrypted)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::IdealBuffered => "ideal-buffered",
            Kind::IdealDirect => "ideal-direct",
            Kind::RaftEngine => "raft-engine",
            Kind::RaftEngineMerged => "raft-engine-merged",
            Kind::RaftEngineTuned => "raft-engine-tuned",
            Kind::RaftEngineTunedMerged => "raft-engine-tuned-merged",
            Kind::Pontoon => "pontoon",
            Kind::PontoonEncrypted => "pontoon-encrypted",
        }
    }
}

/// One load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Case {
    pub(crate) scene: Scene,
    pub(crate) groups: u64,
    pub(crate) submitters: u64,
    pub(crate) value_bytes: usize,
    pub(crate) sync: bool,
    /// Bytes of a file of the log, 0 for what the engine chooses.
    pub(crate) file_bytes: u64,
    /// Our writes under way at once, 0 for what the log chooses.
    pub(crate) depth: usize,
}

/// What happens in a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Scene {
    /// Submitters write batches and wait for each.
    Append,
    /// 64 batches under way at once; where an engine has only calls that wait, from 64 threads.
    Outstanding,
    /// A log of a million entries is written, then opened again from cold files.
    ReopenCold,
    /// The same with files in the page cache.
    ReopenWarm,
    /// Ranges of 64 entries that were just written are read.
    ReadCached,
    /// The same ranges after reopening, from cold files.
    ReadCold,
    /// Half of every group goes, and files are collected.
    Collect,
    /// All groups write, and all but one let go of what they wrote.
    Lagging,
}

impl Case {
    pub(crate) fn append(groups: u64, submitters: u64, value_bytes: usize, sync: bool) -> Case {
        Case { scene: Scene::Append, groups, submitters, value_bytes, sync, file_bytes: 0, depth: 0 }
    }

    /// Every case, in the order in which they run.
    pub(crate) fn all() -> Vec<Case> {
        let mut cases = Vec::new();
        for sync in [true, false] {
            for value_bytes in [128, 1 << 10, 16 << 10] {
                for (groups, submitters) in [
                    (1, 1),
                    (16, 1),
                    (16, 8),
                    (256, 1),
                    (256, 8),
                    (256, 64),
                    (4096, 1),
                    (4096, 8),
                    (4096, 64),
                ] {
                    cases.push(Case::append(groups, submitters, value_bytes, sync));
                }
            }
        }
        // Small files, so that a round changes them hundreds of times.
        cases.push(Case { file_bytes: 4 << 20, ..Case::append(16, 8, 1 << 10, true) });
        let special = |scene, groups, value_bytes| Case {
            scene,
            groups,
            submitters: 1,
            value_bytes,
            sync: scene == Scene::Outstanding,
            file_bytes: 0,
            depth: 0,
        };
        cases.push(special(Scene::Outstanding, 1024, 256));
        cases.push(special(Scene::ReopenCold, 4096, 128));
        cases.push(special(Scene::ReopenWarm, 4096, 128));
        cases.push(special(Scene::ReadCached, 64, 256));
        cases.push(special(Scene::ReadCold, 64, 256));
        cases.push(special(Scene::Collect, 4096, 128));
        cases.push(Case { file_bytes: 4 << 20, sync: true, ..special(Scene::Lagging, 1000, 1 << 10) });
        cases
    }

    /// How filters and the table call it.
    pub(crate) fn name(&self) -> String {
        let Case { groups, submitters, value_bytes, .. } = self;
        let sync = if self.sync { "sync" } else { "unsynced" };
        match self.scene {
            Scene::Append if self.file_bytes > 0 => {
                format!("rotation-g{groups}-s{submitters}-v{value_bytes}")
            }
            Scene::Append => format!("append-{sync}-g{groups}-s{submitters}-v{value_bytes}-"),
            Scene::Outstanding => "outstanding-64".to_owned(),
            Scene::ReopenCold => "reopen-cold".to_owned(),
            Scene::ReopenWarm => "reopen-warm".to_owned(),
            Scene::ReadCached => "read-cached".to_owned(),
            Scene::ReadCold => "read-cold".to_owned(),
            Scene::Collect => "collect".to_owned(),
            Scene::Lagging => "lagging".to_owned(),
        }
    }

    /// The engines that the scene makes sense for.
    pub(crate) fn engines(&self) -> &'static [Kind] {
        match self.scene {
            Scene::Append => &Kind::ALL,
            Scene::Outstanding => &[
                Kind::RaftEngine,
                Kind::RaftEngineMerged,
                Kind::RaftEngineTuned,
                Kind::Pontoon,
                Kind::PontoonEncrypted,
            ],
            _ => &[Kind::RaftEngine, Kind::Pontoon, Kind::PontoonEncrypted],
        }
    }

    /// Groups in one batch.
    pub(crate) fn batch_groups(&self) -> u64 {
        (self.groups / self.submitters).clamp(1, BATCH_GROUPS)
    }
}

/// Bytes that no compression shortens, the same in every run.
pub(crate) struct Values {
    bytes: bytes::Bytes,
    len: usize,
    at: usize,
}

impl Values {
    pub(crate) fn new(len: usize) -> Values {
        static BYTES: std::sync::OnceLock<bytes::Bytes> = std::sync::OnceLock::new();
        let bytes = BYTES.get_or_init(|| {
            let mut state = 0x9e37_79b9_7f4a_7c15u64;
            let mut next = || {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 32) as u8
            };
            let bytes: Vec<u8> = (0..8 << 20).map(|_| next()).collect();
            // Static bytes are shared without a count that all threads would fight for.
            bytes::Bytes::from_static(bytes.leak())
        });
        Values { bytes: bytes.clone(), len, at: 0 }
    }

    /// The next entry's value: another part of the bytes, so that the entries of a batch have nothing in common.
    pub(crate) fn next(&mut self) -> bytes::Bytes {
        self.at += self.len + 64;
        if self.at + self.len > self.bytes.len() {
            self.at %= 64;
        }
        self.bytes.slice(self.at..self.at + self.len)
    }
}

/// An entry to be written: its group, its index, its value.
pub(crate) type Item = (u64, u64, bytes::Bytes);

/// What a submitter writes next: its groups in turn, each with its next index.
pub(crate) struct Turn {
    first: u64,
    groups: u64,
    width: u64,
    at: u64,
    values: Values,
    pub(crate) index: Vec<u64>,
}

impl Turn {
    pub(crate) fn new(case: &Case, submitter: u64) -> Turn {
        let groups = (case.groups / case.submitters).max(1);
        Turn {
            first: 1 + submitter * groups,
            groups,
            width: case.batch_groups(),
            at: 0,
            values: Values::new(case.value_bytes),
            index: vec![0; groups as usize],
        }
    }

    /// From now on one group per batch.
    pub(crate) fn narrow(&mut self) {
        self.width = 1;
    }

    /// The entries of the next batch.
    pub(crate) fn next(&mut self, items: &mut Vec<Item>) {
        items.clear();
        for _ in 0..self.width {
            let nth = (self.at % self.groups) as usize;
            self.index[nth] += 1;
            items.push((self.first + nth as u64, self.index[nth], self.values.next()));
            self.at += 1;
        }
    }

    /// (group, last index) of all groups that hold something.
    pub(crate) fn lasts(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let lasts = self.index.iter().enumerate();
        lasts.map(|(nth, index)| (self.first + nth as u64, *index)).filter(|(_, index)| *index > 0)
    }
}
