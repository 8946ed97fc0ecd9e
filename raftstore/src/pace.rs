//! Copies give way to clients: what a node's clients wait for, and how much of its budget a receiver uses.
//!
//! ```text
//!  whoever serves clients ── p99 of a window ──> Foreground ── strained? ──> the node's loops ── ping ──> other nodes
//!                                                                               │                          │
//!                                                                             Share <──────────────────────┘
//!                                                           of the receiver: much less at once, more bit by bit
//! ```
//!
//! Each node judges its own clients' writes against what they took while no state was received or given there; what a good
//! latency is nobody has to say. Receivers alone hold back, for themselves and for those that give to them: that ends
//! the strain on both. Time is passed in, so the same inputs give the same rate.

use std::time::Duration;

use crate::budget::SnapshotBudget;

/// How long after a copy the engine still clears up behind it: that time says nothing of the level without copies.
const AFTERMATH: Duration = Duration::from_secs(2);
/// Clients that have been worse off for so long, with receivers at their least rate, are so for another reason.
const NOT_THE_COPIES: Duration = Duration::from_secs(30);
/// One part in so many of a new window goes into the level and into the deviation from it.
const WEIGHT: u32 = 8;

/// What the clients of a node wait for, and whether copies are the reason.
///
/// Invariants: `level` is made of windows without copies, until those with copies have been worse for half a minute; it is
/// absent until there was one with enough writes.
///
/// # Examples
/// ```
/// use std::time::Duration;
/// use pontoon_raftstore::Foreground;
///
/// let ms = Duration::from_millis;
/// let mut foreground = Foreground::default();
/// assert!(!foreground.window(ms(500), Some(ms(4)), false));
/// assert!(foreground.window(ms(1_000), Some(ms(9)), true), "twice as long as without the copy");
/// assert_eq!(foreground.level(), Some(ms(4)));
/// ```
#[derive(Debug, Clone, Default)]
pub struct Foreground {
    level: Option<Level>,
    p99: Option<Duration>,
    last_copy: Option<Duration>,
    strained_since: Option<Duration>,
}

/// The p99 of writes as it usually is, and how far windows usually are from it.
#[derive(Debug, Clone, Copy)]
struct Level {
    p99: Duration,
    deviation: Duration,
}

impl Level {
    fn first(p99: Duration) -> Level {
        Level { p99, deviation: p99 / WEIGHT }
    }

    fn take(&mut self, p99: Duration) {
        self.deviation = weighed(self.deviation, self.p99.abs_diff(p99));
        self.p99 = weighed(self.p99, p99);
    }

    /// Above this it is not chance: a fifth more, and what windows differ by anyway.
    fn limit(&self) -> Duration {
        self.p99 + self.p99 / 5 + self.deviation
    }
}

fn weighed(old: Duration, new: Duration) -> Duration {
    (old * (WEIGHT - 1) + new) / WEIGHT
}

impl Foreground {
    /// A window has ended at `now`, on any clock that does not go back. `p99` is that of the writes that clients had answered
    /// in it, `None` if there were too few to tell; `copies`: whether states were received or given meanwhile. Returns
    /// whether the node is strained.
    pub fn window(&mut self, now: Duration, p99: Option<Duration>, copies: bool) -> bool {
        self.p99 = p99;
        if copies {
            self.last_copy = Some(now);
        }
        let Some(p99) = p99 else {
            self.strained_since = None;
            return false;
        };
        if self.last_copy.is_none_or(|last| now.saturating_sub(last) > AFTERMATH) {
            self.level.get_or_insert_with(|| Level::first(p99)).take(p99);
        }
        let strained = copies && self.level.is_some_and(|level| p99 > level.limit());
        if !strained {
            self.strained_since = None;
            return false;
        }
        let since = *self.strained_since.get_or_insert(now);
        if now.saturating_sub(since) >= NOT_THE_COPIES
            && let Some(level) = &mut self.level
        {
            level.take(p99);
        }
        true
    }

    /// Whether clients wait longer than they do without copies.
    pub fn is_strained(&self) -> bool {
        self.strained_since.is_some()
    }

    /// The last window's p99; `None` if there were too few writes.
    pub fn p99(&self) -> Option<Duration> {
        self.p99
    }

    /// The p99 without copies; `None` until there was a window to tell it from.
    pub fn level(&self) -> Option<Duration> {
        self.level.map(|level| level.p99)
    }
}

/// The whole budget.
pub(crate) const WHOLE: u32 = Share::WHOLE;
/// What a receiver begins with after a rest: whether more is too much is found out on the way.
const FIRST: u32 = WHOLE / 16;
/// How soon that doubles, as long as nobody was ever strained since: what each step does is to be seen first.
const DOUBLE: Duration = Duration::from_secs(2);
/// What is always left: a copy that stands still would hold up whatever waits for it.
const LEAST: u32 = WHOLE / 32;
/// How soon after a cut the next one may follow: the first must have shown what it does.
const BETWEEN_CUTS: Duration = Duration::from_millis(600);
/// Afterwards it grows by its own size in so long, if nobody minds: by little while it is little, so that what is too much is too much by
/// little when it is noticed.
const RISE: Duration = Duration::from_secs(8);
/// Without copies for so long, the next one begins anew.
const REST: Duration = Duration::from_secs(5);

/// How much of a budget a receiver uses: it doubles until somebody is strained, as a sender of TCP does (RFC 5681, slow start), and
/// from then on it is cut at once and grows in proportion.
///
/// Invariant: between a 32nd of [`Share::WHOLE`] and all of it.
#[derive(Debug, Clone)]
pub(crate) struct Share {
    tick: Duration,
    share: u32,
    /// Nobody has been strained since the rest.
    doubles: bool,
    since_double: Duration,
    since_rise: Duration,
    since_cut: Duration,
    rests: Duration,
}

impl Share {
    /// The whole budget.
    pub(crate) const WHOLE: u32 = 1024;

    /// As after a rest. `tick` is how long a tick lasts.
    pub(crate) fn new(tick: Duration) -> Share {
        let zero = Duration::ZERO;
        let (since_double, since_rise, since_cut, rests) = (zero, zero, BETWEEN_CUTS, zero);
        Share { tick, share: FIRST, doubles: true, since_double, since_rise, since_cut, rests }
    }

    /// In parts of [`Share::WHOLE`].
    pub(crate) fn get(&self) -> u32 {
        self.share
    }

    /// Time goes on. `strained`: clients here, or at a node that gives, wait longer than they do without copies.
    pub(crate) fn tick(&mut self, ticks: u64, copies: bool, strained: bool) {
        let passed = self.tick.saturating_mul(u32::try_from(ticks).unwrap_or(u32::MAX));
        self.since_cut = self.since_cut.saturating_add(passed);
        if !copies {
            self.rests = self.rests.saturating_add(passed);
            if self.rests >= REST {
                *self = Share::new(self.tick);
            }
            return;
        }
        self.rests = Duration::ZERO;
        if !strained && self.doubles {
            self.since_double = self.since_double.saturating_add(passed);
            while self.since_double >= DOUBLE && self.share < WHOLE {
                self.since_double -= DOUBLE;
                self.share = (self.share * 2).min(WHOLE);
            }
        } else if !strained {
            self.since_rise = self.since_rise.saturating_add(passed);
            let rise = u128::from(self.share) * self.since_rise.as_micros() / RISE.as_micros();
            if rise > 0 {
                let for_that = RISE.as_micros() * rise / u128::from(self.share);
                let for_that = Duration::from_micros(u64::try_from(for_that).unwrap_or(u64::MAX));
                self.since_rise = self.since_rise.saturating_sub(for_that);
                self.share = (u128::from(self.share) + rise).min(u128::from(WHOLE)) as u32;
            }
        } else if self.since_cut >= BETWEEN_CUTS {
            self.doubles = false;
            self.share = (self.share * 5 / 8).max(LEAST);
            (self.since_cut, self.since_rise) = (Duration::ZERO, Duration::ZERO);
        }
    }
}

/// However little it may take, what stands still would keep its point in time for ever.
const PAUSE_MOST: Duration = Duration::from_secs(2);

/// How often a [`Pace`] judges.
const LOOK: Duration = Duration::from_millis(50);

/// How fast states may be read, by whoever shares this: as much of a budget as clients do not notice. `now` is the time of any clock that
/// does not go back.
#[derive(Debug, Clone)]
pub struct Pace {
    share: Share,
    looked: Duration,
    /// Until then what may be read is used up.
    spent_until: Duration,
}

impl Default for Pace {
    /// As after a rest, at the clock's beginning.
    fn default() -> Self {
        Pace { share: Share::new(LOOK), looked: Duration::ZERO, spent_until: Duration::ZERO }
    }
}

impl Pace {
    /// Time has gone on. `reads`: whether states were read since; `strained`: clients wait longer than they do without copies.
    pub fn look(&mut self, now: Duration, reads: bool, strained: bool) {
        let ticks = now.saturating_sub(self.looked).as_millis() / LOOK.as_millis();
        let ticks = u32::try_from(ticks).unwrap_or(u32::MAX);
        if ticks > 0 {
            self.looked += LOOK * ticks;
            self.share.tick(ticks.into(), reads, strained);
        }
    }

    /// Bytes per second; `None` is not limited.
    pub fn rate(&self, budget: SnapshotBudget) -> Option<u64> {
        let share = if budget.adapts { self.share.get() } else { WHOLE };
        let bytes = u128::from(budget.bytes_per_second?) * u128::from(share) / u128::from(WHOLE);
        Some(u64::try_from(bytes).unwrap_or(u64::MAX).max(1))
    }

    /// How long to wait until something may be read: two seconds at most. What was not used meanwhile is lost.
    pub fn rest(&self, now: Duration) -> Duration {
        self.spent_until.saturating_sub(now).min(PAUSE_MOST)
    }

    /// So many bytes are read from `at` on.
    pub fn spend(&mut self, at: Duration, bytes: usize, rate: Option<u64>) {
        let seconds = rate.map_or(0.0, |rate| bytes as f64 / rate as f64);
        self.spent_until = at + Duration::from_secs_f64(seconds.min(3_600.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_shared_by_all_and_what_is_not_used_is_lost() {
        let second = Duration::from_secs(1);
        let mut pace = Pace::default();
        let mut take = |now: Duration, bytes, budget: &str| {
            let rest = pace.rest(now);
            let rate = pace.rate(budget.parse().unwrap());
            pace.spend(now + rest, bytes, rate);
            rest
        };
        assert_eq!((take(second, 500, "1000"), take(second, 500, "1000")), (Duration::ZERO, second / 2));
        let later = second * 9;
        assert_eq!((take(later, 500, "1000"), take(later, 500, "1000")), (Duration::ZERO, second / 2));
        let later = second * 18;
        assert_eq!((take(later, 500, "max"), take(later, 500, "max")), (Duration::ZERO, Duration::ZERO));
        take(later, 1 << 40, "1000");
        assert_eq!(take(later, 1, "1000"), PAUSE_MOST);
    }

    #[test]
    fn what_reads_states_gives_way_if_the_budget_has_a_name() {
        let mut pace = Pace::default();
        let mut rate_at = |second, strained| {
            pace.look(Duration::from_secs(second), true, strained);
            pace.rate(SnapshotBudget::NORMAL).unwrap()
        };
        let whole = rate_at(10, false);
        assert_eq!(Some(whole), SnapshotBudget::NORMAL.bytes_per_second);
        let strained = (11..20).map(|second| rate_at(second, true)).last().unwrap();
        assert!(strained < whole / 8, "{strained} of {whole}");
        assert_eq!(pace.rate("1000".parse().unwrap()), Some(1000));
        assert_eq!(pace.rate(SnapshotBudget::MAX), None);
    }

    const WINDOW: Duration = Duration::from_millis(250);

    fn ms(ms: u64) -> Option<Duration> {
        Some(Duration::from_millis(ms))
    }

    /// Windows one after the other.
    struct Watch {
        foreground: Foreground,
        now: Duration,
    }

    impl Watch {
        fn new() -> Watch {
            Watch { foreground: Foreground::default(), now: Duration::ZERO }
        }

        fn windows(&mut self, count: u32, p99: Option<Duration>, copies: bool) -> bool {
            for _ in 0..count {
                self.now += WINDOW;
                self.foreground.window(self.now, p99, copies);
            }
            self.foreground.is_strained()
        }
    }

    #[test]
    fn a_node_is_strained_by_its_own_measure_and_only_while_it_copies() {
        for usual in [1, 40] {
            let mut watch = Watch::new();
            assert!(!watch.windows(20, ms(usual), false));
            assert!(!watch.windows(4, ms(usual), true), "as before");
            assert!(watch.windows(1, ms(usual * 2), true));
            assert!(!watch.windows(1, ms(usual), true));
            assert!(!watch.windows(1, ms(usual * 2), false), "whatever that is, it is no copy");
            assert_eq!(watch.foreground.level(), ms(usual));
        }
    }

    #[test]
    fn what_differs_anyway_is_no_strain() {
        let mut watch = Watch::new();
        for at in 0..40 {
            watch.windows(1, ms(if at % 2 == 0 { 8 } else { 12 }), false);
        }
        assert!(!watch.windows(1, ms(13), true));
        assert!(watch.windows(1, ms(18), true));
    }

    #[test]
    fn the_time_after_a_copy_says_nothing_of_the_time_without() {
        let mut watch = Watch::new();
        watch.windows(20, ms(5), false);
        watch.windows(4, ms(50), true);
        watch.windows(8, ms(50), false);
        assert_eq!(watch.foreground.level(), ms(5));
        watch.windows(40, ms(50), false);
        assert!(watch.foreground.level() > ms(45));
    }

    #[test]
    fn too_few_writes_tell_nothing() {
        let mut watch = Watch::new();
        assert!(!watch.windows(4, ms(500), true), "there is no level yet");
        watch.windows(20, None, false);
        assert_eq!((watch.foreground.level(), watch.foreground.p99()), (None, None));
        watch.windows(20, ms(5), false);
        assert!(watch.windows(1, ms(10), true));
        assert!(!watch.windows(1, None, true));
    }

    #[test]
    fn what_does_not_get_better_without_copies_is_the_new_level() {
        let mut watch = Watch::new();
        watch.windows(20, ms(5), false);
        assert!(watch.windows(100, ms(20), true));
        assert!(!watch.windows(100, ms(20), true), "the load has grown: copies do not stand still for ever");
    }

    fn share() -> Share {
        Share::new(Duration::from_millis(100))
    }

    #[test]
    fn until_somebody_minds_it_doubles() {
        let mut share = share();
        share.tick(19, true, false);
        assert_eq!(share.get(), FIRST, "what that does is not seen yet");
        share.tick(1, true, false);
        assert_eq!(share.get(), FIRST * 2);
        share.tick(20, true, false);
        assert_eq!(share.get(), FIRST * 4);
        share.tick(10, true, true);
        let cut = share.get();
        (0..10).for_each(|_| share.tick(1, true, false));
        let risen = share.get();
        assert!(
            (cut * 9 / 8 - 2..=cut * 9 / 8 + 2).contains(&risen),
            "from now on slowly: {risen} after {cut}"
        );
        share.tick(1_000_000, true, false);
        assert_eq!(share.get(), WHOLE);
    }

    #[test]
    fn it_falls_fast_and_rises_slowly_and_never_stands_still() {
        let mut share = share();
        (0..40).for_each(|_| share.tick(1, true, false));
        assert_eq!(share.get(), FIRST * 4);
        share.tick(1, true, true);
        let cut = share.get();
        assert_eq!(cut, FIRST * 4 * 5 / 8);
        share.tick(5, true, true);
        assert_eq!(share.get(), cut, "the first cut has not shown what it does");
        share.tick(1, true, true);
        assert_eq!(share.get(), cut * 5 / 8);
        share.tick(1, true, false);
        assert!((cut * 5 / 8..cut).contains(&share.get()));
        (0..100).for_each(|_| share.tick(6, true, true));
        assert_eq!(share.get(), LEAST);
        (0..200).for_each(|_| share.tick(1, true, false));
        assert!((WHOLE / 4..WHOLE).contains(&share.get()), "{}", share.get());
        share.tick(1_000_000, true, false);
        assert_eq!(share.get(), WHOLE);
    }

    #[test]
    fn after_a_rest_it_begins_anew() {
        let mut share = share();
        (0..100).for_each(|_| share.tick(1, true, false));
        share.tick(20, false, false);
        assert_eq!(share.get(), WHOLE, "the next copy follows at once");
        share.tick(30, false, false);
        assert_eq!(share.get(), FIRST);
    }

    /// A plant with a queue: the more is copied, the longer clients wait.
    #[test]
    fn it_settles_where_clients_hardly_notice() {
        let (mut share, mut watch) = (share(), Watch::new());
        watch.windows(20, ms(5), false);
        let (mut strained, mut sum) = (false, 0);
        for at in 0..400 {
            // Above half of the budget a write waits for what is copied.
            let wait = 5 + u64::from(share.get().saturating_sub(WHOLE / 2)) / 50;
            if at % 5 == 0 {
                strained = watch.windows(2, ms(wait), true);
            }
            share.tick(1, true, strained);
            sum += share.get();
        }
        let mean = sum / 400;
        assert!((WHOLE / 3..WHOLE * 2 / 3).contains(&mean), "{mean}");
    }
}
