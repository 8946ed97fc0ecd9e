//! A log that was closed cleanly, and what may be said of it when its files were damaged since.

#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test uses a part of it")]

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use pontoon_wal::{
    Batch, Error, GroupId, HardState,
    sim::{SimFs, SimImage},
    tools,
};

use super::support::{DIR, HandClock, Model, Op, Script, damage, open, restarted_now_and_then};

pub const SECTOR: usize = 512;
pub const BLOCK: usize = 4096;

/// A closed log: its disk, what it holds, and its disk at earlier moments.
pub struct Closed {
    pub image: SimImage,
    pub model: Model,
    /// What it held before the last batch.
    pub before: Model,
    pub past: Vec<SimImage>,
}

/// What came of a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// Nobody misses anything.
    Nothing,
    /// So many groups lost something, and the report says so.
    Reported(usize),
    /// The log says that it cannot tell whom the fault hits.
    Refused,
}

/// How a log ends before it is damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Close,
    /// The process died after the watermark.
    Watermark,
    /// The process died right after the last batch.
    NoWatermark,
}

/// Plays a script, with a crash or a clean restart now and then, and closes the log.
pub fn closed_log(seed: u64, batches: usize) -> Closed {
    ended_log(seed, batches, End::Close)
}

/// As [`closed_log`], with another end.
pub fn ended_log(seed: u64, batches: usize, end: End) -> Closed {
    let (fs, clock) = (SimFs::new(), Arc::new(HandClock::default()));
    let mut script = Script::draw(seed, batches, 6);
    let mut past = Vec::new();
    let (mut wal, _) = open(&fs, &clock, seed).unwrap();
    for (nth, batch) in script.batches.drain(..).enumerate() {
        wal.commit(batch).unwrap();
        if nth % 3 == 0 {
            while wal.step() {}
        }
        if nth % 7 == 0 {
            past.push(fs.image());
        }
        wal = restarted_now_and_then(wal, nth, &fs, &clock, seed);
    }
    match end {
        End::Close => wal.close().unwrap(),
        End::Watermark => {
            while wal.step() {}
            clock.advance(Duration::from_millis(10));
            while wal.step() {}
            drop(wal);
        }
        End::NoWatermark => drop(wal),
    }
    // What was not synced yet is not what this is about.
    fs.kill();
    let model = script.states.pop().unwrap();
    Closed { image: fs.image(), model, before: script.states.pop().unwrap(), past }
}

/// A closed log of which a part was relocated, from segments that are gone and from one that is still there.
pub fn relocated_log(seed: u64) -> Closed {
    let (fs, clock) = (SimFs::new(), Arc::new(HandClock::default()));
    let (wal, _) = open(&fs, &clock, seed).unwrap();
    let (mut model, mut before, mut past) = (Model::default(), Model::default(), Vec::new());
    for round in 0..90 {
        before = model.clone();
        let mut batch = Batch::new();
        let (group, lags) = (GroupId(10 + round % 4), GroupId(1 + round / 4 % 3));
        model.apply(group, &Op::Append { back: 0, count: 1, bytes: 12_000 }, &mut batch);
        model.apply(group, &Op::Truncate { keep: 0 }, &mut batch);
        if round % 4 == 0 {
            model.apply(lags, &Op::Append { back: round % 2, count: 2, bytes: 250 }, &mut batch);
        }
        wal.commit(batch).unwrap();
        if round % 7 == 0 {
            past.push(fs.image());
        }
        if round % 40 == 30 {
            assert!(wal.gc_once().unwrap().records_relocated > 0);
        }
    }
    wal.close().unwrap();
    fs.kill();
    Closed { image: fs.image(), model, before, past }
}

impl Closed {
    /// The segments that hold relocated records.
    pub fn cold_files(&self) -> Vec<PathBuf> {
        let mut paths = BTreeSet::new();
        tools::frames(&self.fs(), DIR.as_ref(), |frame| {
            paths.extend((frame.stream == 1).then_some(frame.path));
            std::ops::ControlFlow::Continue(())
        })
        .unwrap();
        paths.into_iter().collect()
    }

    pub fn fs(&self) -> SimFs {
        SimFs::from_image(&self.image)
    }

    /// The files whose name ends so.
    pub fn files(&self, part: &str) -> Vec<PathBuf> {
        let files = self.fs().files().into_iter().map(|(path, _)| path);
        files.filter(|path| path.to_string_lossy().contains(part)).collect()
    }

    pub fn bytes(&self, path: &Path) -> Vec<u8> {
        bytes_in(&self.image, path)
    }

    /// Bytes of the file before the zeros at its end.
    pub fn used(&self, path: &Path) -> usize {
        self.bytes(path).iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1)
    }

    /// Damages a copy of the disk and asks the log about it. The context is made only if it is needed.
    pub fn damage(&self, context: impl Fn() -> String, damage: impl FnOnce(&SimFs)) -> Result<Seen, String> {
        let fs = self.fs();
        damage(&fs);
        self.judge(&fs).map_err(|failure| format!("{}: {failure}", context()))
    }

    /// Whether a damaged log is as it was before the last batch, and says that it cut what came after.
    pub fn is_cut(&self, damage: impl FnOnce(&SimFs)) -> bool {
        let fs = self.fs();
        damage(&fs);
        let (wal, report) = open(&fs, &Arc::new(HandClock::default()), 99).unwrap();
        self.before.differs(&wal).is_none() && report.damaged.is_empty()
    }

    /// Whether the log is as the model says, or says what it lost.
    fn judge(&self, fs: &SimFs) -> Result<Seen, String> {
        let clock = Arc::new(HandClock::default());
        let (wal, report) = match open(fs, &clock, 99) {
            Ok(opened) => opened,
            Err(Error::Corrupt { .. }) => return Ok(Seen::Refused),
            Err(error) => return Err(error.to_string()),
        };
        let (damaged, hit) = damage(&wal, &report);
        let mut healthy = None;
        for group in self.model.groups.keys().chain(&wal.groups()) {
            if !hit.contains(group) {
                if let Some(difference) = self.model.group_differs(&wal, *group) {
                    return Err(format!("{group} differs in silence: {difference}"));
                }
                healthy = Some(*group);
                continue;
            }
            let named = damaged.iter().any(|record| record.group == *group && record.bytes > 0);
            let refuses = matches!(wal.term(*group, 1), Err(Error::Damaged { .. }));
            if !named || !refuses || wal.group(*group).is_none_or(|view| view.damaged.is_none()) {
                return Err(format!("{group} is hit, and this is all that is said: {report:?}"));
            }
        }
        for (group, id) in &self.model.tombstones {
            if wal.tombstone(*group) != Some(*id) {
                return Err(format!("the tombstone of {group} is {:?}", wal.tombstone(*group)));
            }
        }
        if hit.is_empty() {
            return Ok(Seen::Nothing);
        }
        // Whom it does not hit goes on.
        if let Some(group) = healthy {
            let mut batch = Batch::new();
            batch.hard_state(group, HardState { term: 1 << 40, vote: 1, commit: 0 });
            wal.commit(batch).map_err(|error| format!("{group} is healthy and refuses: {error}"))?;
        }
        Ok(Seen::Reported(hit.len()))
    }
}

pub fn bytes_in(image: &SimImage, path: &Path) -> Vec<u8> {
    let fs = SimFs::from_image(image);
    let len = fs.files().into_iter().find(|(name, _)| name == path).map_or(0, |(_, len)| len);
    let mut bytes = vec![0; len as usize];
    fs.peek(path, 0, &mut bytes);
    bytes
}

/// How often which answer was given.
#[derive(Debug, Clone, Copy, Default)]
pub struct Answers {
    pub nothing: usize,
    pub reported: usize,
    pub refused: usize,
}

impl Answers {
    pub fn count(&mut self, seen: Seen) {
        match seen {
            Seen::Nothing => self.nothing += 1,
            Seen::Reported(_) => self.reported += 1,
            Seen::Refused => self.refused += 1,
        }
    }

    pub fn add(&mut self, other: Answers) {
        self.nothing += other.nothing;
        self.reported += other.reported;
        self.refused += other.refused;
    }
}

/// Every used sector of these files: zeroed, set to ones, swapped with its neighbour, and each older content that it had.
pub fn sectors(log: &Closed, files: &[PathBuf]) -> Result<Answers, String> {
    let mut answers = Answers::default();
    for path in files {
        let bytes = log.bytes(path);
        let past: Vec<Vec<u8>> = log.past.iter().map(|image| bytes_in(image, path)).collect();
        for sector in 0..log.used(path).div_ceil(SECTOR) {
            let at = sector * SECTOR;
            let now = &bytes[at..at + SECTOR];
            let mut versions: Vec<(&str, Vec<u8>)> =
                vec![("zeroed", vec![0; SECTOR]), ("set to ones", vec![0xff; SECTOR])];
            let older = past.iter().filter_map(|bytes| bytes.get(at..at + SECTOR));
            let older: BTreeSet<&[u8]> = older.filter(|older| *older != now).collect();
            versions.extend(older.into_iter().map(|older| ("stale", older.to_vec())));
            for (what, version) in versions {
                let context = || format!("{} sector {sector} {what}", path.display());
                answers.count(log.damage(context, |fs| fs.patch(path, at as u64, &version).unwrap())?);
            }
            if let Some(next) = bytes.get(at + SECTOR..at + 2 * SECTOR) {
                let context = || format!("{} sectors {sector} and {} swapped", path.display(), sector + 1);
                let swapped = [next, now].concat();
                answers.count(log.damage(context, |fs| fs.patch(path, at as u64, &swapped).unwrap())?);
            }
        }
    }
    Ok(answers)
}

/// One bit of each byte of every footer, flipped.
pub fn footers(log: &Closed) -> Result<Answers, String> {
    let mut answers = Answers::default();
    for path in log.files(".wal") {
        let (bytes, used) = (log.bytes(&path), log.used(&path));
        for block in (0..used).step_by(BLOCK).filter(|block| bytes[*block..].starts_with(b"PNTNFOOT")) {
            for (at, byte) in bytes.iter().enumerate().take(used).skip(block) {
                let context = || format!("{} byte {at} of the footer at {block}", path.display());
                let flipped = [byte ^ 1 << (at % 8)];
                answers.count(log.damage(context, |fs| fs.patch(&path, at as u64, &flipped).unwrap())?);
            }
        }
    }
    Ok(answers)
}
