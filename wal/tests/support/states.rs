//! The disks that a power cut may leave, each recovered, used, cut again and recovered again.

#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test uses a part of it")]

use std::{collections::HashMap, sync::Arc};

use pontoon_wal::{
    Batch, DriverMode, GroupId, Options, Wal,
    sim::{self, Loose, OpKind, SimFs, SimImage},
    tools::{self, Fault, FaultKind},
};

use super::{
    run::{Look, Moment, Progress, find_state},
    support::{DIR, HandClock, Model, Op, Rng, open, options},
};

/// Up to so many loose pieces every subset is tried, at each moment.
const ALWAYS_ALL: usize = 4;
/// Up to so many at one moment of [`ALL_ONE_IN`], or at each with `thorough`.
const SOMETIMES_ALL: usize = 12;
const ALL_ONE_IN: u64 = 64;
/// Subsets that are drawn where not every one is tried, and with `thorough`.
const SAMPLES: u64 = 12;
const THOROUGH_SAMPLES: u64 = 48;
/// The directory is made in each run in the same way: of so many runs one looks at that.
const MAKING_ONE_IN: u64 = 8;
/// Of so many disks one is recovered on threads too.
const THREADS_ONE_IN: u64 = 32;
/// Of so many disks with footers one is recovered without them too.
const FOOTERS_ONE_IN: u64 = 16;
/// Blocks written whole, sectors written whole.
const UNITS: [usize; 2] = [4096, 512];

/// What was looked at.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tally {
    /// Disks that differ from each other and were recovered.
    pub states: usize,
    /// Subsets that gave a disk that was known already.
    pub known: usize,
    /// Moments of which every subset was tried.
    pub exhausted: usize,
    pub torn: usize,
    pub second_cuts: usize,
    /// Disks of which some segment was taken from its footer.
    pub footers: usize,
}

/// Looks at all states until the budget is used up.
pub struct Explorer {
    pub seed: u64,
    pub budget: usize,
    pub thorough: bool,
    pub tally: Tally,
    /// Which state a disk holds.
    known: HashMap<u64, usize>,
    moment: usize,
}

/// What a subset is, for the message that a failure prints.
struct Subset<'a> {
    loose: &'a Loose,
    unit: usize,
    kept: Vec<bool>,
}

impl Explorer {
    pub fn new(seed: u64, budget: usize, thorough: bool) -> Explorer {
        Explorer { seed, budget, thorough, tally: Tally::default(), known: HashMap::new(), moment: 0 }
    }

    fn moment(&mut self, moment: &Moment, lineage: &[Model]) -> Result<(), String> {
        let mut rng = Rng(self.seed ^ (self.moment as u64) << 32);
        if moment.submitted == 0 && !self.thorough && !self.seed.is_multiple_of(MAKING_ONE_IN) {
            return Ok(());
        }
        let samples = if self.thorough { THOROUGH_SAMPLES } else { SAMPLES };
        for unit in UNITS {
            let loose = moment.image.loose(unit);
            let len = loose.len();
            let all =
                len <= ALWAYS_ALL || len <= SOMETIMES_ALL && (self.thorough || rng.below(ALL_ONE_IN) == 0);
            self.tally.exhausted += usize::from(all);
            let subsets = if all { 1 << len } else { samples };
            for nth in 0..subsets {
                let kept = match all {
                    true => (0..len).map(|piece| nth >> piece & 1 == 1).collect(),
                    false => sample(nth, len, &mut rng),
                };
                self.state(&Subset { loose: &loose, unit, kept }, moment, lineage)?;
            }
        }
        Ok(())
    }

    fn state(&mut self, subset: &Subset<'_>, moment: &Moment, lineage: &[Model]) -> Result<(), String> {
        let image = subset.loose.power_cut(|piece| subset.kept[piece]);
        let fingerprint = image.fingerprint();
        let allowed = moment.acknowledged..=moment.submitted;
        if let Some(state) = self.known.get(&fingerprint) {
            self.tally.known += 1;
            return match allowed.contains(state) {
                true => Ok(()),
                false => Err(self.blame(subset, &format!("state {state} is none of {allowed:?}"))),
            };
        }
        if self.tally.states >= self.budget {
            return Ok(());
        }
        self.tally.states += 1;
        let _context = Context { seed: self.seed, moment: self.moment };
        let state = recover(&image, fingerprint, moment, lineage, &mut self.tally)
            .map_err(|failure| self.blame(subset, &failure))?;
        self.known.insert(fingerprint, state);
        Ok(())
    }

    fn blame(&self, subset: &Subset<'_>, failure: &str) -> String {
        let pieces = (0..subset.loose.len()).map(|piece| {
            let verb = if subset.kept[piece] { "kept" } else { "lost" };
            format!("\n  {verb} {}", subset.loose.describe(piece))
        });
        format!(
            "{failure}\nseed {}, operation {}, units of {} bytes; replay with PONTOON_WAL_CRASH_SEED={}{}",
            self.seed,
            self.moment,
            subset.unit,
            self.seed,
            pieces.collect::<String>(),
        )
    }
}

/// Says where a panic inside the log came from.
struct Context {
    seed: u64,
    moment: usize,
}

impl Drop for Context {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "seed {}, operation {}; replay with PONTOON_WAL_CRASH_SEED={0}",
                self.seed, self.moment
            );
        }
    }
}

impl Look for Explorer {
    fn look(&mut self, moments: &[Moment], lineage: &[Model]) -> Result<(), String> {
        // Another lineage: the same disk would mean another state.
        self.known.clear();
        for moment in moments {
            self.moment(moment, lineage)?;
            self.moment += 1;
        }
        Ok(())
    }
}

/// A subset that is worth a try: nothing, all, a beginning, all but one, only one, chance.
fn sample(nth: u64, len: usize, rng: &mut Rng) -> Vec<bool> {
    let border = rng.below(len as u64 + 1) as usize;
    match nth {
        0 => vec![false; len],
        1 => vec![true; len],
        _ => match rng.below(6) {
            0 => (0..len).map(|piece| piece < border).collect(),
            1 => (0..len).map(|piece| piece >= border).collect(),
            2 => (0..len).map(|piece| piece != border).collect(),
            3 => (0..len).map(|piece| piece == border).collect(),
            _ => {
                let percent = [10, 50, 90][rng.below(3) as usize];
                (0..len).map(|_| rng.below(100) < percent).collect()
            }
        },
    }
}

/// Recovers a disk; then goes on, is cut again, and recovers again. Which state it held.
fn recover(
    image: &SimImage,
    fingerprint: u64,
    moment: &Moment,
    lineage: &[Model],
    tally: &mut Tally,
) -> Result<usize, String> {
    let (fs, clock) = (SimFs::from_image(image), Arc::new(HandClock::default()));
    let mut rng = Rng(fingerprint);
    if rng.below(THREADS_ONE_IN) == 0 {
        // With threads of its own it is replayed on several.
        let other = SimFs::from_image(image);
        let options = Options { driver: DriverMode::Threads, ..options(&other, &clock, rng.next()) };
        let (wal, report) =
            Wal::open(options).map_err(|error| format!("does not open on threads: {error}"))?;
        find_state(&wal, &report, lineage, moment.acknowledged, moment.submitted)
            .map_err(|failure| format!("on threads: {failure}"))?;
    }
    fs.lose_patience_after(1_000);
    let (wal, report) = open(&fs, &clock, rng.next()).map_err(|error| format!("does not open: {error}"))?;
    let state = find_state(&wal, &report, lineage, moment.acknowledged, moment.submitted)?;
    tally.torn += usize::from(report.torn.is_some());
    if report.footers > 0 {
        tally.footers += 1;
        if rng.below(FOOTERS_ONE_IN) == 0 {
            without_footers(image, moment, lineage)?;
        }
    }
    let mut model = lineage[state].clone();
    model.salt(rng.next());
    go_on(wal, &fs, &clock, model, &mut rng, tally)
        .map_err(|failure| format!("after state {state}: {failure}"))?;
    Ok(state)
}

/// The footers say what the frames say, and nobody needs them.
fn without_footers(image: &SimImage, moment: &Moment, lineage: &[Model]) -> Result<(), String> {
    let (fs, clock) = (SimFs::from_image(image), Arc::new(HandClock::default()));
    let keys = options(&fs, &clock, 1).keys;
    let checked =
        tools::check(Arc::new(fs.clone()), DIR.as_ref(), keys).map_err(|error| error.to_string())?;
    let is_footer = |fault: &&Fault| matches!(fault.kind, FaultKind::Footer | FaultKind::FooterWrong);
    if let Some(fault) = checked.faults.iter().find(is_footer) {
        return Err(format!("frames and footers differ: {fault}"));
    }
    for (path, _) in fs.files() {
        fs.tamper(&path, |bytes| {
            for block in bytes.chunks_mut(UNITS[0]).filter(|block| block.starts_with(b"PNTNFOOT")) {
                block[200] ^= 1;
            }
        })
        .expect("the file exists");
    }
    let (wal, report) =
        open(&fs, &clock, 1).map_err(|error| format!("does not open without footers: {error}"))?;
    find_state(&wal, &report, lineage, moment.acknowledged, moment.submitted)
        .map_err(|failure| format!("without footers: {failure}"))?;
    match report.footers {
        0 => Ok(()),
        footers => Err(format!("{footers} damaged footers are believed")),
    }
}

fn go_on(
    wal: Wal,
    fs: &SimFs,
    clock: &Arc<HandClock>,
    model: Model,
    rng: &mut Rng,
    tally: &mut Tally,
) -> Result<(), String> {
    let progress = Arc::new(Progress::default());
    let door = wal.submitter(progress.clone());
    let mut states = vec![model];
    for nth in 1..=rng.below(4) {
        let mut model = states[states.len() - 1].clone();
        let mut batch = Batch::new();
        for _ in 0..1 + rng.below(2) {
            model.apply(GroupId(1 + rng.below(6)), &Op::draw(rng), &mut batch);
        }
        states.push(model);
        progress.submitted.store(nth as usize, std::sync::atomic::Ordering::Relaxed);
        let room = door.try_reserve_internal(GroupId(1));
        door.submit(batch, room, nth).map_err(|error| format!("a valid batch is refused: {error}"))?;
        for _ in 0..rng.below(6) {
            wal.step();
        }
    }
    if rng.below(3) == 0 {
        while wal.step() {}
    }
    drop((wal, door));
    let (mut acknowledged, mut submitted) = progress.now();
    // Now and then the process dies first, and another one shows what was never synced.
    if rng.below(4) == 0 {
        fs.kill();
        let (wal, report) =
            open(fs, clock, rng.next()).map_err(|error| format!("does not open after a kill: {error}"))?;
        let state = find_state(&wal, &report, &states, acknowledged, submitted)?;
        (acknowledged, submitted) = (state, state);
    }
    fs.crash(rng.next());
    // Now and then recovery itself is cut, at its first or second operation.
    if rng.below(4) == 0 {
        fs.fail_nth(OpKind::Change, rng.below(2), sim::Fault::PowerCut);
        if let Ok((wal, report)) = open(fs, clock, rng.next()) {
            let state = find_state(&wal, &report, &states, acknowledged, submitted)?;
            (acknowledged, submitted) = (state, state);
        }
        fs.crash(rng.next());
        tally.second_cuts += 1;
    }
    let (wal, report) =
        open(fs, clock, rng.next()).map_err(|error| format!("does not open again: {error}"))?;
    let state = find_state(&wal, &report, &states, acknowledged, submitted)?;
    if rng.below(8) > 0 {
        return Ok(());
    }
    let (mut model, mut batch) = (states[state].clone(), Batch::new());
    model.salt(rng.next());
    model.apply(GroupId(2), &Op::Meta { key: 1, bytes: 9 }, &mut batch);
    wal.commit(batch).map_err(|error| format!("does not take a batch: {error}"))?;
    wal.close().map_err(|error| format!("does not close: {error}"))?;
    let (wal, report) =
        open(fs, clock, rng.next()).map_err(|error| format!("does not open at last: {error}"))?;
    find_state(&wal, &report, &[model], 0, 0)?;
    Ok(())
}
