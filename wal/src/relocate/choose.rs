//! Which segment is worth being emptied.

use crate::{
    frame::HOT,
    table::{Sealed, Table},
};

/// How much of a segment may be live, in percent, for relocation to be worth its writes: it frees the whole segment. With
/// ease a segment costs at most a third of what it frees; when room gets tight more, when ordinary batches are refused
/// nearly all that brings anything.
const EASE_PERCENT: u64 = 25;
const TIGHT_PERCENT: u64 = 50;
const STARVED_PERCENT: u64 = 75;
/// A cold segment is never asked for more than this: frames that do not fill their segment's end leave more of it empty in
/// the worst case, and what one relocation packs must not be worth the next one.
const COLD_PERCENT: u64 = 50;
/// With ease, segments of which fewer newer ones are sealed are left alone: most of what they hold goes by itself soon.
const YOUNG: usize = 4;

/// How much room the log has, as far as relocation cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Pressure {
    /// Enough.
    Ease,
    /// Somebody asked for a collection.
    Asked,
    /// Little is left.
    Tight,
    /// Ordinary batches are refused, or will be soon.
    Starved,
}

impl Pressure {
    /// How things stand.
    pub(super) fn of(table: &Table, asked: bool) -> Pressure {
        match (table.starved, table.tight, asked) {
            (true, _, _) => Pressure::Starved,
            (_, true, _) => Pressure::Tight,
            (_, _, true) => Pressure::Asked,
            _ => Pressure::Ease,
        }
    }

    fn percent(self) -> u64 {
        match self {
            Pressure::Ease | Pressure::Asked => EASE_PERCENT,
            Pressure::Tight => TIGHT_PERCENT,
            Pressure::Starved => STARVED_PERCENT,
        }
    }
}

/// The segment to empty next: with ease the oldest of those that are nearly empty, under pressure the one that costs least.
pub(super) fn choose(
    table: &Table,
    pressure: Pressure,
    segment_bytes: u64,
    is_unfit: impl Fn(&Sealed) -> bool,
) -> Option<&Sealed> {
    let mut hot: Vec<u64> =
        table.sealed.values().filter(|sealed| sealed.stream == HOT).map(|sealed| sealed.first_seq).collect();
    hot.sort_unstable();
    let young_from = match pressure {
        Pressure::Ease => hot.len().checked_sub(YOUNG).map_or(0, |at| hot[at]),
        _ => u64::MAX,
    };
    let limit = |stream| match stream {
        HOT => segment_bytes / 100 * pressure.percent(),
        _ => segment_bytes / 100 * pressure.percent().min(COLD_PERCENT),
    };
    let is_old = |sealed: &&Sealed| sealed.stream != HOT || sealed.first_seq < young_from;
    let is_worth = |sealed: &&Sealed| (1..=limit(sealed.stream)).contains(&sealed.segment.live_bytes());
    let victims = table.sealed.values().filter(is_old).filter(is_worth).filter(|sealed| !is_unfit(sealed));
    match pressure {
        Pressure::Ease => victims.min_by_key(|sealed| (sealed.stream, sealed.first_seq)),
        _ => victims.min_by_key(|sealed| (sealed.segment.live_bytes(), sealed.stream, sealed.first_seq)),
    }
}
