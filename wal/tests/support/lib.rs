//! What the tests share: a clock to turn by hand, a plain model of a log, operations drawn from a seed.

#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test uses a part of it")]

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use pontoon_wal::{
    Batch, Clock, ConfState, DamagedRecord, DataKey, DriverMode, Entry, Error, GroupId, HardState, KEY_BYTES,
    KeyId, KeyProvider, KeySet, Options, PersistSink, Persisted, RecoveryReport, Result, SnapshotMeta, Wal,
    sim::SimFs,
};

pub const DIR: &str = "/log";

#[derive(Debug, Default)]
pub struct HandClock(AtomicU64);

impl HandClock {
    pub fn advance(&self, time: Duration) {
        self.0.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }
}

impl Clock for HandClock {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }
}

thread_local! {
    static KEYS: RefCell<Option<Arc<KeySet>>> = const { RefCell::new(None) };
}

/// From now on the logs of this thread are opened with these keys, or none.
pub fn encrypt(keys: Option<Arc<KeySet>>) {
    KEYS.set(keys);
}

/// Some key, and its number.
pub fn key(nth: u32) -> (KeyId, DataKey) {
    (KeyId(nth), DataKey::new([nth as u8; KEY_BYTES]))
}

pub fn one_key() -> Arc<KeySet> {
    let (id, key) = key(1);
    Arc::new(KeySet::new(id, key))
}

pub fn options(fs: &SimFs, clock: &Arc<HandClock>, seed: u64) -> Options {
    Options {
        fs: Arc::new(fs.clone()),
        segment_bytes: 256 << 10,
        cache_bytes: 0,
        seed,
        clock: clock.clone(),
        driver: DriverMode::Manual,
        prepared_segments: 1,
        keys: KEYS.with_borrow(|keys| keys.clone().map(|keys| keys as Arc<dyn KeyProvider>)),
        ..Options::new(DIR)
    }
}

pub fn open(fs: &SimFs, clock: &Arc<HandClock>, seed: u64) -> Result<(Wal, RecoveryReport)> {
    Wal::open(options(fs, clock, seed))
}

/// Remembers what it was told.
#[derive(Debug, Default)]
pub struct Told {
    pub persisted: Mutex<Vec<Persisted>>,
    pub failed: Mutex<Vec<String>>,
}

impl PersistSink for Told {
    fn persisted(&self, done: &[Persisted]) {
        assert!(self.failed.lock().unwrap().is_empty(), "nothing is persisted after a failure");
        self.persisted.lock().unwrap().extend(done);
    }

    fn failed(&self, error: &Error) {
        self.failed.lock().unwrap().push(error.to_string());
    }
}

pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// One change to one group, relative to the group's state, so that it is valid whatever came before.
#[derive(Debug, Clone, Copy)]
pub enum Op {
    /// Overwrites the last `back` entries (as far as there are) and goes on with `count` entries of `bytes`.
    Append {
        back: u64,
        count: u64,
        bytes: usize,
    },
    HardState(HardState),
    /// Keeps the last `keep` entries.
    Truncate {
        keep: u64,
    },
    /// Resets to this far beyond the last index.
    Reset {
        ahead: u64,
    },
    Snapshot {
        ahead: u64,
    },
    Meta {
        key: u8,
        bytes: usize,
    },
    Destroy {
        min_replica: u64,
    },
}

impl Op {
    pub fn draw(rng: &mut Rng) -> Op {
        match rng.below(24) {
            0..=12 => Op::Append {
                back: if rng.below(4) == 0 { rng.below(4) } else { 0 },
                count: 1 + rng.below(4),
                bytes: match rng.below(8) {
                    0 | 1 => 3_900,
                    2 => 1_500,
                    _ => rng.below(300) as usize,
                },
            },
            13..=15 => {
                Op::HardState(HardState { term: rng.below(9), vote: rng.below(4), commit: rng.below(100) })
            }
            16..=18 => Op::Truncate { keep: rng.below(5) },
            19 => Op::Reset { ahead: rng.below(5) },
            20 => Op::Snapshot { ahead: rng.below(5) },
            21..=22 => Op::Meta { key: rng.below(3) as u8, bytes: rng.below(40) as usize },
            _ => Op::Destroy { min_replica: rng.below(10) },
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModelGroup {
    pub entries: BTreeMap<u64, (u64, Bytes)>,
    pub truncated: (u64, u64),
    pub last_term: u64,
    pub hard_state: HardState,
    pub snapshot: Option<SnapshotMeta>,
    pub meta: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl ModelGroup {
    pub fn last(&self) -> u64 {
        self.entries.keys().next_back().copied().unwrap_or(self.truncated.0)
    }
}

/// A log as a plain map.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Model {
    pub groups: BTreeMap<GroupId, ModelGroup>,
    pub tombstones: BTreeMap<GroupId, u64>,
    serial: u64,
}

/// Bytes of which no two places look alike; of every third a part comes again and again, so that they can be compressed.
fn payload(seed: u64, bytes: usize) -> Bytes {
    let mut rng = Rng(seed);
    let fresh = if seed.is_multiple_of(3) { bytes.div_ceil(4) } else { bytes };
    let words = std::iter::repeat_with(|| rng.next().to_le_bytes());
    let fresh: Vec<u8> = words.flatten().take(fresh).collect();
    fresh.iter().copied().cycle().take(bytes).collect()
}

impl Model {
    /// Lets what is applied from now on differ from what was applied to another copy.
    pub fn salt(&mut self, salt: u64) {
        self.serial += 1 + salt % (1 << 30) * 1_000;
    }

    /// Applies an operation here and adds it to the batch.
    pub fn apply(&mut self, group: GroupId, op: &Op, batch: &mut Batch) {
        self.serial += 1;
        let serial = self.serial;
        if let Op::Destroy { min_replica } = op {
            self.groups.remove(&group);
            let kept = self.tombstones.entry(group).or_default();
            *kept = min_replica.max(kept).to_owned();
            batch.destroy(group, *min_replica);
            return;
        }
        let state = self.groups.entry(group).or_default();
        match op {
            Op::Append { back, count, bytes } => {
                let first = state.last().saturating_sub(*back).max(state.truncated.0) + 1;
                let term = serial / 10 + 1;
                let entries: Vec<Entry> = (first..first + count)
                    .map(|index| {
                        let data = payload(serial ^ index << 40, *bytes);
                        Entry { index, term, kind: (index % 3) as u8, data }
                    })
                    .collect();
                state.entries.split_off(&first);
                state
                    .entries
                    .extend(entries.iter().map(|entry| (entry.index, (entry.term, entry.data.clone()))));
                batch.append(group, &entries);
            }
            Op::HardState(hard_state) => {
                state.hard_state = *hard_state;
                batch.hard_state(group, *hard_state);
            }
            Op::Truncate { keep } => {
                let index = state.last().saturating_sub(*keep);
                let term = match state.entries.get(&index) {
                    Some((term, _)) => *term,
                    None => state.truncated.1,
                };
                if index > state.truncated.0 {
                    state.truncated = (index, term);
                    state.entries = state.entries.split_off(&(index + 1));
                }
                batch.truncate_prefix(group, index, term);
            }
            Op::Reset { ahead } => {
                state.truncated = (state.last() + ahead, serial);
                state.entries.clear();
                batch.reset_to(group, state.truncated.0, serial);
            }
            Op::Snapshot { ahead } => {
                let meta = SnapshotMeta {
                    index: state.last() + ahead,
                    term: serial,
                    conf_state: ConfState {
                        voters: vec![1, serial],
                        auto_leave: true,
                        ..ConfState::default()
                    },
                    data: serial.to_le_bytes().to_vec().into(),
                };
                state.truncated = (meta.index, meta.term);
                state.entries.clear();
                batch.snapshot(group, &meta);
                state.snapshot = Some(meta);
            }
            Op::Meta { key, bytes } => {
                let value = vec![serial as u8; *bytes];
                batch.put_meta(group, &[*key], &value);
                if value.is_empty() {
                    state.meta.remove(&vec![*key]);
                } else {
                    state.meta.insert(vec![*key], value);
                }
            }
            Op::Destroy { .. } => {}
        }
    }

    /// What of this differs from the log; `None` if nothing does.
    pub fn differs(&self, wal: &Wal) -> Option<String> {
        let groups: Vec<GroupId> = self.groups.keys().copied().collect();
        if wal.groups() != groups {
            return Some(format!("groups {:?} instead of {groups:?}", wal.groups()));
        }
        for group in &groups {
            if let Some(difference) = self.group_differs(wal, *group) {
                return Some(format!("{group}: {difference}"));
            }
        }
        let tombstones = self.tombstones.iter().find(|(group, id)| wal.tombstone(**group) != Some(**id));
        tombstones
            .map(|(group, id)| format!("tombstone of {group} is {:?} instead of {id}", wal.tombstone(*group)))
    }

    pub fn group_differs(&self, wal: &Wal, group: GroupId) -> Option<String> {
        let (Some(state), Some(view)) = (self.groups.get(&group), wal.group(group)) else {
            return (self.groups.contains_key(&group) || wal.group(group).is_some())
                .then(|| "existence".to_owned());
        };
        let ours = (state.truncated.0 + 1, state.last(), state.hard_state, state.truncated, &state.snapshot);
        let theirs = (view.first_index, view.last_index, view.hard_state, view.truncated, &view.snapshot);
        if ours != theirs {
            return Some(format!("{theirs:?} instead of {ours:?}"));
        }
        let mut entries = Vec::new();
        if let Err(error) = wal.entries(group, view.first_index..view.last_index + 1, u64::MAX, &mut entries)
        {
            return Some(error.to_string());
        }
        if entries.len() != state.entries.len() {
            return Some(format!("{} entries instead of {}", entries.len(), state.entries.len()));
        }
        for (entry, (index, (term, data))) in entries.iter().zip(&state.entries) {
            let term_read = wal.term(group, *index);
            if (entry.index, entry.term, &entry.data) != (*index, *term, data)
                || term_read.ok() != Some(*term)
            {
                return Some(format!("entry {index}"));
            }
        }
        if wal.term(group, state.truncated.0).ok() != Some(state.truncated.1) {
            return Some("the truncated index's term".to_owned());
        }
        (0..3u8).find_map(|key| {
            let ours = state.meta.get(&vec![key]).cloned();
            let theirs = wal.meta(group, &[key]).map(|value| value.to_vec());
            (ours != theirs).then(|| format!("meta {key}: {theirs:?} instead of {ours:?}"))
        })
    }
}

/// A script of batches with the model after each; `states[k]` is the state after `k` batches.
pub struct Script {
    pub batches: Vec<Batch>,
    pub states: Vec<Model>,
}

impl Script {
    pub fn draw(seed: u64, batches: usize, groups: u64) -> Script {
        let mut rng = Rng(seed);
        let mut script = Script { batches: Vec::new(), states: vec![Model::default()] };
        for _ in 0..batches {
            let mut model = script.states[script.states.len() - 1].clone();
            let mut batch = Batch::new();
            for _ in 0..1 + rng.below(3) {
                model.apply(GroupId(1 + rng.below(groups)), &Op::draw(&mut rng), &mut batch);
            }
            script.batches.push(batch);
            script.states.push(model);
        }
        script
    }
}

/// The damage that an open log knows of after everything in it was looked at: an open takes a segment's footer for its
/// records, so that rot in those shows in a scrub.
pub fn damage(wal: &Wal, report: &RecoveryReport) -> (Vec<DamagedRecord>, BTreeSet<GroupId>) {
    let mut damaged = report.damaged.clone();
    damaged.extend(wal.scrub().expect("the disk can be read").damaged);
    damaged.sort_by_key(|record| (record.segment, record.offset));
    damaged.dedup_by_key(|record| (record.segment, record.offset));
    let is_hit = |group: &GroupId| wal.group(*group).is_some_and(|view| view.damaged.is_some());
    let hit: BTreeSet<GroupId> = wal.groups().into_iter().filter(is_hit).collect();
    assert!(report.damaged_groups.keys().all(|group| hit.contains(group)));
    (damaged, hit)
}

/// Reads a segment file of a simulated disk.
pub fn bytes_of(fs: &SimFs, path: &Path) -> Vec<u8> {
    fs.tamper(path, |bytes| bytes.clone()).expect("the file exists")
}

/// What befalls a log now and then between two batches: a crash, or a clean restart.
pub fn restarted_now_and_then(wal: Wal, nth: usize, fs: &SimFs, clock: &Arc<HandClock>, seed: u64) -> Wal {
    match nth % 40 {
        13 => {
            drop(wal);
            fs.crash(nth as u64);
        }
        33 => wal.close().unwrap(),
        _ => return wal,
    }
    open(fs, clock, seed).unwrap().0
}
