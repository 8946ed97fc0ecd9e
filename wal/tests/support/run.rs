//! A run of the log on the simulated disk, drawn from a seed: what it does, and the disk before each change of it.

#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test uses a part of it")]

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use pontoon_wal::{
    Batch, Compression, Durability, Error, GroupId, KeyProvider, KeySet, Options, PersistSink, Persisted,
    RecoveryReport, Submitter, Wal, WalEvent,
    sim::{Fault, OpKind, SimFs, SimImage},
};

use super::support::{HandClock, Model, Op, Rng, encrypt, key, one_key, options};

/// What a run does next. A new ability of the log gets a line here, a weight in [`Step::draw`] and an arm in
/// [`Run::step`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Hands in a batch.
    Submit { relaxed: bool },
    /// Hands in a batch that fills a good part of a segment.
    Fat,
    /// Hands in a batch that lets nearly everything of all groups go.
    Shrink,
    /// Lets the log take a few steps.
    Nudge,
    /// Lets the log work until it has nothing to do.
    Settle,
    /// Lets time pass, so that a watermark and relaxed batches are written.
    Idle,
    /// Collects garbage.
    Collect,
    /// An encrypted log gets another key.
    Rotate,
    /// Closes the log and opens it again.
    Close,
    /// The process dies and starts again; the system keeps what it was given.
    Kill,
    /// The machine stops; what was not synced is left to chance.
    PowerCut,
    /// A write or a sync fails, and the process ends.
    Fail,
}

impl Step {
    fn draw(rng: &mut Rng) -> Step {
        match rng.below(64) {
            0..=11 => Step::Submit { relaxed: false },
            12..=15 => Step::Submit { relaxed: true },
            16..=27 => Step::Fat,
            28..=33 => Step::Shrink,
            34..=41 => Step::Nudge,
            42..=52 => Step::Settle,
            53 => Step::Fail,
            54..=55 => Step::Idle,
            56 => Step::Rotate,
            57..=58 => Step::Collect,
            59..=60 => Step::Close,
            61 => Step::PowerCut,
            _ => Step::Kill,
        }
    }
}

/// What a run is made of.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub seed: u64,
    pub steps: usize,
    pub groups: u64,
    /// So many more groups keep what they have for long, so that segments are emptied by relocation.
    pub lagging: u64,
    /// Operations of the disk wait and are carried out in any order.
    pub held: bool,
    /// Batches are acknowledged without a sync: a power cut takes what no open has made durable.
    pub unsynced: bool,
}

/// The disk at one moment, and which states of the log it may hold: those of `acknowledged..=submitted`.
#[derive(Clone)]
pub struct Moment {
    pub image: SimImage,
    pub acknowledged: usize,
    pub submitted: usize,
}

/// What the watcher of the disk may ask without touching the log.
#[derive(Debug, Default)]
pub struct Progress {
    /// What no power cut may take.
    pub acknowledged: AtomicUsize,
    /// What the log said to be persisted. It is the same, unless the log is not asked for syncs.
    pub told: AtomicUsize,
    pub unsynced: bool,
    pub submitted: AtomicUsize,
    /// The segments that took frames.
    pub segments: Mutex<Vec<u32>>,
    pub may_fail: AtomicBool,
}

impl Progress {
    pub fn now(&self) -> (usize, usize) {
        (self.acknowledged.load(Ordering::Relaxed), self.submitted.load(Ordering::Relaxed))
    }

    pub fn set(&self, state: usize) {
        self.acknowledged.store(state, Ordering::Relaxed);
        self.told.store(state, Ordering::Relaxed);
        self.submitted.store(state, Ordering::Relaxed);
    }
}

impl PersistSink for Progress {
    fn persisted(&self, done: &[Persisted]) {
        for done in done {
            let before = self.told.swap(done.token as usize, Ordering::Relaxed);
            assert_eq!(before + 1, done.token as usize, "batches are acknowledged in order");
            if !self.unsynced {
                self.acknowledged.store(done.token as usize, Ordering::Relaxed);
            }
        }
    }

    fn event(&self, event: &WalEvent) {
        if let WalEvent::Rotated { segment } = event {
            self.segments.lock().unwrap().push(*segment);
        }
    }

    fn failed(&self, error: &Error) {
        assert!(self.may_fail.load(Ordering::Relaxed), "the simulated disk does not fail here: {error}");
    }
}

/// How often things happened, so that a test can say that they did.
#[derive(Debug, Clone, Copy, Default)]
pub struct Happened {
    pub moments: usize,
    pub rotations: usize,
    /// Segments that took frames again.
    pub used_again: usize,
    pub checkpoints: u64,
    /// Bytes of records that were relocated.
    pub relocated: u64,
    pub torn: usize,
    pub opens: usize,
    /// Keys of encrypted logs.
    pub keys: usize,
    /// Segments that opens took from their footers.
    pub footers: usize,
}

/// A run under way.
pub struct Run {
    pub plan: Plan,
    pub fs: SimFs,
    clock: Arc<HandClock>,
    rng: Rng,
    options: Options,
    /// Of five runs one is encrypted, and one becomes so when it opens the log for the second time.
    keys: Option<Arc<KeySet>>,
    wal: Option<(Wal, Submitter)>,
    progress: Arc<Progress>,
    /// The state after each batch; earlier ones are the past that no crash brings back.
    pub lineage: Vec<Model>,
    moments: Arc<Mutex<Vec<Moment>>>,
    pub happened: Happened,
}

/// Who looks at the moments of a run. They may hold the states of this lineage.
pub trait Look {
    fn look(&mut self, moments: &[Moment], lineage: &[Model]) -> Result<(), String>;
}

impl Run {
    pub fn new(plan: Plan) -> Run {
        let (fs, clock) = (SimFs::new(), Arc::new(HandClock::default()));
        let mut rng = Rng(plan.seed);
        let keys = plan.seed.is_multiple_of(5).then(one_key);
        encrypt(keys.clone());
        let options = Options {
            prepared_segments: 1 + rng.below(2) as usize,
            max_frame_bytes: [4 << 10, 32 << 10, 1 << 20][rng.below(3) as usize],
            cache_bytes: [0, 1 << 20][rng.below(2) as usize],
            compression: [Compression::None, Compression::None, Compression::Lz4, Compression::Zstd(1)]
                [rng.below(4) as usize],
            compress_above_bytes: 200,
            durability: if plan.unsynced { Durability::System } else { Durability::Sync },
            write_depth: [4, 1, 2][plan.seed as usize % 3],
            // Without a reserve segments are used again sooner.
            reserve_segments: if plan.seed % 4 == 3 { 2 } else { 0 },
            relocate_bytes_per_s: if plan.lagging > 0 { u64::MAX } else { 0 },
            ..options(&fs, &clock, plan.seed)
        };
        let progress = Arc::new(Progress { unsynced: plan.unsynced, ..Progress::default() });
        let moments = Arc::new(Mutex::new(Vec::new()));
        let (seen, noted) = (progress.clone(), moments.clone());
        fs.lose_patience_after(plan.steps as u64 * 200);
        fs.watch(move |image| {
            let (acknowledged, submitted) = seen.now();
            noted.lock().unwrap().push(Moment { image: image.clone(), acknowledged, submitted });
        });
        let happened = Happened { keys: usize::from(keys.is_some()), ..Happened::default() };
        let lineage = vec![Model::default()];
        Run { plan, fs, clock, rng, options, keys, wal: None, progress, lineage, moments, happened }
    }

    /// Plays it to the end, showing each moment.
    pub fn play(&mut self, look: &mut impl Look) -> Result<(), String> {
        self.open(look, 0)?;
        for _ in 0..self.plan.steps {
            let step = Step::draw(&mut self.rng);
            // Half of the runs hardly ever open the log anew: segments are used again within one open.
            let ends = matches!(step, Step::Close | Step::Kill | Step::PowerCut | Step::Fail);
            let calm = self.plan.seed.is_multiple_of(2) && self.rng.below(12) > 0;
            let step = if ends && calm { Step::Settle } else { step };
            let collects = self.plan.lagging > 0 && step == Step::Settle && self.rng.below(2) == 0;
            self.step(if collects { Step::Collect } else { step }, look)?;
        }
        self.step(Step::Close, look)?;
        self.show(look)?;
        let segments = self.progress.segments.lock().unwrap();
        let different: BTreeSet<u32> = segments.iter().copied().collect();
        self.happened.rotations = segments.len();
        self.happened.used_again = segments.len() - different.len();
        Ok(())
    }

    fn wal(&self) -> &Wal {
        &self.wal.as_ref().expect("the log is open").0
    }

    fn step(&mut self, step: Step, look: &mut impl Look) -> Result<(), String> {
        match step {
            Step::Submit { relaxed } => {
                let ops: Vec<_> = (0..1 + self.rng.below(3)).map(|_| Op::draw(&mut self.rng)).collect();
                let mut ops: Vec<_> = ops.into_iter().map(|op| (self.any_group(), op)).collect();
                ops.extend(self.lag());
                self.submit(ops, relaxed);
            }
            Step::Fat => {
                let bytes = 20_000 + self.rng.below(40_000) as usize;
                let group = self.any_group();
                let ops = [Op::Append { back: 0, count: 1, bytes }, Op::Truncate { keep: 2 }];
                let mut ops = ops.map(|op| (group, op)).to_vec();
                ops.extend(self.lag());
                self.submit(ops, false);
            }
            Step::Shrink => {
                let mut keep = || Op::Truncate { keep: self.rng.below(8) / 7 };
                let mut ops: Vec<_> = (1..=self.plan.groups).map(|group| (GroupId(group), keep())).collect();
                if self.plan.lagging > 0 && self.rng.below(8) == 0 {
                    let group = GroupId(self.plan.groups + 1 + self.rng.below(self.plan.lagging));
                    ops.push((group, Op::Truncate { keep: self.rng.below(4) }));
                }
                self.submit(ops, false);
            }
            Step::Nudge => {
                for _ in 0..1 + self.rng.below(4) {
                    self.wal().step();
                    self.complete_one();
                }
            }
            Step::Settle => self.settle(),
            Step::Idle => {
                self.clock.advance(Duration::from_millis(10));
                self.settle();
                // Relaxed batches were written; now the watermark's time comes.
                self.clock.advance(Duration::from_millis(10));
                self.settle();
            }
            Step::Collect => {
                match self.wal().gc_once() {
                    Ok(_) => {}
                    // What it copies at the moment is changed, and the change is written before the copy.
                    Err(Error::Stalled) if self.plan.lagging > 0 => {
                        let group = GroupId(self.plan.groups + 1 + self.rng.below(self.plan.lagging));
                        let op = Op::Append { back: self.rng.below(16), count: 2, bytes: 100 };
                        self.submit(vec![(group, op)], false);
                        for _ in 0..4 {
                            self.wal().step();
                            self.fs.complete_nth(self.fs.waiting().saturating_sub(1));
                        }
                    }
                    Err(Error::Stalled) => {}
                    Err(error) => return Err(format!("cannot collect: {error}")),
                }
                self.settle();
                let shown = self.lineage[self.lineage.len() - 1].differs(self.wal());
                if let Some(difference) = shown {
                    return Err(format!("after a collection the log shows: {difference}"));
                }
            }
            Step::Rotate => {
                if let Some(keys) = &self.keys {
                    self.happened.keys += 1;
                    let (id, key) = key(self.happened.keys as u32);
                    keys.add(id, key);
                    self.wal().rotate_key().map_err(|error| format!("cannot take another key: {error}"))?;
                }
                self.settle();
            }
            Step::Close => {
                self.settle();
                self.fs.hold(false);
                let (wal, door) = self.wal.take().expect("the log is open");
                drop(door);
                self.happened.checkpoints += wal.usage().checkpoint;
                self.happened.relocated += wal.usage().relocated_bytes;
                wal.close().map_err(|error| format!("cannot close: {error}"))?;
                let (told, submitted) = (self.told(), self.progress.now().1);
                if told != submitted {
                    return Err(format!("closed with {told} of {submitted} batches acknowledged"));
                }
                self.open(look, told)?;
            }
            Step::Fail => {
                let (kind, fault) = [
                    (OpKind::Sync, Fault::Io),
                    (OpKind::Sync, Fault::NoSpace),
                    (OpKind::Write, Fault::Short),
                    (OpKind::Write, Fault::Io),
                ][self.rng.below(4) as usize];
                self.progress.may_fail.store(true, Ordering::Relaxed);
                self.fs.fail_nth(kind, self.rng.below(4), fault);
                for _ in 0..3 {
                    self.step(Step::Fat, look)?;
                    self.settle();
                }
                let end = [Step::PowerCut, Step::Kill][self.rng.below(4).min(1) as usize];
                self.step(end, look)?;
                self.progress.may_fail.store(false, Ordering::Relaxed);
            }
            Step::Kill | Step::PowerCut => {
                // It comes while something is under way, so that torn tails and void frames become the log's past.
                self.step(Step::Submit { relaxed: false }, look)?;
                for _ in 0..[6, 40][self.rng.below(2) as usize].min(self.rng.below(40)) {
                    self.wal().step();
                }
                self.happened.relocated += self.wal().usage().relocated_bytes;
                self.wal = None;
                self.show(look)?;
                let floor = match step {
                    Step::Kill => {
                        self.fs.kill();
                        self.told()
                    }
                    _ => {
                        self.fs.crash(self.rng.next());
                        self.progress.now().0
                    }
                };
                self.fs.hold(false);
                self.open(look, floor)?;
            }
        }
        Ok(())
    }

    fn any_group(&mut self) -> GroupId {
        GroupId(1 + self.rng.below(self.plan.groups))
    }

    /// Now and then one of the groups that lag writes a little, over what it wrote before too.
    fn lag(&mut self) -> Option<(GroupId, Op)> {
        if self.plan.lagging == 0 || self.rng.below(2) == 0 {
            return None;
        }
        let group = GroupId(self.plan.groups + 1 + self.rng.below(self.plan.lagging));
        let (back, count) = (self.rng.below(3), 1 + self.rng.below(3));
        Some((group, Op::Append { back, count, bytes: self.rng.below(900) as usize }))
    }

    fn submit(&mut self, ops: Vec<(GroupId, Op)>, relaxed: bool) {
        let mut model = self.lineage[self.lineage.len() - 1].clone();
        let mut batch = Batch::new();
        for (group, op) in &ops {
            model.apply(*group, op, &mut batch);
        }
        if relaxed {
            batch.relaxed();
        }
        self.lineage.push(model);
        let nth = self.progress.submitted.fetch_add(1, Ordering::Relaxed) + 1;
        assert_eq!(nth + 1, self.lineage.len());
        let (_, door) = self.wal.as_ref().expect("the log is open");
        let room = door.try_reserve_internal(GroupId(1));
        match door.submit(batch, room, nth as u64) {
            Ok(_) => {}
            Err(Error::Poisoned { .. }) if self.progress.may_fail.load(Ordering::Relaxed) => {
                self.lineage.pop();
                self.progress.submitted.fetch_sub(1, Ordering::Relaxed);
            }
            Err(error) => panic!("a valid batch is refused: {error}"),
        }
    }

    fn complete_one(&mut self) -> bool {
        let waiting = self.fs.waiting() as u64;
        waiting > 0 && self.fs.complete_nth(self.rng.below(waiting) as usize)
    }

    fn settle(&mut self) {
        loop {
            while self.wal().step() {}
            if !self.complete_one() {
                return;
            }
        }
    }

    fn told(&self) -> usize {
        self.progress.told.load(Ordering::Relaxed)
    }

    /// Opens the log, which must hold one of the states from `floor` on; that one is what counts from now on.
    fn open(&mut self, look: &mut impl Look, floor: usize) -> Result<(), String> {
        self.options.seed = self.rng.next();
        if self.happened.opens == 1 && self.plan.seed % 5 == 1 {
            self.happened.keys += 1;
            self.keys = Some(one_key());
            encrypt(self.keys.clone());
            self.options.keys = self.keys.clone().map(|keys| keys as Arc<dyn KeyProvider>);
        }
        let (wal, report) = Wal::open(self.options.clone())
            .map_err(|error| format!("the run cannot open the log: {error}"))?;
        self.show(look)?;
        let (_, submitted) = self.progress.now();
        let state = find_state(&wal, &report, &self.lineage, floor, submitted)
            .map_err(|difference| format!("in the run itself: {difference}"))?;
        self.lineage.truncate(state + 1);
        // What is handed in from now on must not look like what was lost.
        let salt = self.rng.next();
        self.lineage[state].salt(salt);
        self.progress.set(state);
        self.happened.opens += 1;
        self.happened.footers += report.footers;
        self.happened.torn += usize::from(report.torn.is_some());
        self.fs.hold(self.plan.held);
        let door = wal.submitter(self.progress.clone());
        self.wal = Some((wal, door));
        Ok(())
    }

    /// Shows what was noted since the last time, and how the disk is now.
    fn show(&mut self, look: &mut impl Look) -> Result<(), String> {
        let mut moments = std::mem::take(&mut *self.moments.lock().unwrap());
        let (acknowledged, submitted) = self.progress.now();
        moments.push(Moment { image: self.fs.image(), acknowledged, submitted });
        self.happened.moments += moments.len();
        look.look(&moments, &self.lineage)
    }
}

/// Which of the states that it may hold the log holds.
pub fn find_state(
    wal: &Wal,
    report: &RecoveryReport,
    lineage: &[Model],
    acknowledged: usize,
    submitted: usize,
) -> Result<usize, String> {
    if !report.damaged.is_empty() || !report.damaged_groups.is_empty() || report.lost_frames > 0 {
        return Err(format!("a power cut is taken for damage: {report:?}"));
    }
    let mut candidates = (acknowledged..=submitted).rev();
    candidates.find(|state| lineage[*state].differs(wal).is_none()).ok_or_else(|| {
        let differences: Vec<_> =
            (acknowledged..=submitted).map(|state| (state, lineage[state].differs(wal))).collect();
        format!("none of the states {acknowledged}..={submitted}: {differences:?}")
    })
}
