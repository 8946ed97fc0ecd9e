//! How busy groups are: what this node answers for each of them, per second, and lately ([`Heat`]).

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicU64, Ordering},
};

use dashmap::DashMap;
use pontoon_proto::{GroupId, v1};

use crate::heat::{Heat, Sum};

/// One part in so many of each second goes into the rate.
const WEIGHT: u64 = 8;
/// Rates are kept in thousandths per second; a group below this is idle, and forgotten.
const IDLE: u64 = 50;

/// Rates of the groups for which something was answered lately.
#[derive(Default)]
pub(crate) struct Meter {
    groups: DashMap<GroupId, Rates>,
    heat: Mutex<Heat>,
}

#[derive(Default)]
struct Rates {
    writes: Rate,
    reads: Rate,
    /// Written since the last turn.
    bytes: AtomicU64,
}

#[derive(Default)]
struct Rate {
    /// Since the last turn.
    count: AtomicU64,
    /// Thousandths per second.
    smoothed: u64,
}

impl Rate {
    /// What was counted since the last turn.
    fn turn(&mut self) -> u64 {
        let now = self.count.swap(0, Ordering::Relaxed);
        self.smoothed = (self.smoothed * (WEIGHT - 1) + now * 1_000) / WEIGHT;
        now
    }

    fn per_second(&self) -> u64 {
        (self.smoothed + 500) / 1_000
    }
}

impl Meter {
    fn note(&self, group: GroupId, note: impl Fn(&Rates)) {
        if let Some(rates) = self.groups.get(&group) {
            note(&rates);
        } else {
            note(&self.groups.entry(group).or_default());
        }
    }

    /// A write of so many bytes was answered.
    pub(crate) fn wrote(&self, group: GroupId, bytes: usize) {
        self.note(group, |rates| {
            rates.writes.count.fetch_add(1, Ordering::Relaxed);
            rates.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        });
    }

    /// A read was answered.
    pub(crate) fn read(&self, group: GroupId) {
        self.note(group, |rates| {
            rates.reads.count.fetch_add(1, Ordering::Relaxed);
        });
    }

    /// A second has passed; it is this one since 1970.
    pub(crate) fn turn(&self, now_s: u64) {
        let mut heat = self.heat();
        heat.at(now_s);
        self.groups.retain(|group, rates| {
            let (writes, reads) = (rates.writes.turn(), rates.reads.turn());
            let bytes = rates.bytes.swap(0, Ordering::Relaxed);
            if writes + reads > 0 {
                heat.add(*group, Sum { writes, reads, bytes });
            }
            rates.writes.smoothed.max(rates.reads.smoothed) >= IDLE
        });
    }

    fn heat(&self) -> std::sync::MutexGuard<'_, Heat> {
        self.heat.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was answered here lately.
    pub(crate) fn lately(&self, width_s: u32, from_s: u64) -> v1::HeatReply {
        self.heat().columns(width_s, from_s)
    }

    /// Writes and reads per second of all groups.
    pub(crate) fn all(&self) -> (u64, u64) {
        let sum = self.groups.iter().fold((0, 0), |(writes, reads), rates| {
            (writes + rates.writes.smoothed, reads + rates.reads.smoothed)
        });
        ((sum.0 + 500) / 1_000, (sum.1 + 500) / 1_000)
    }

    /// The groups for which most is answered, the busiest first: writes and reads per second.
    pub(crate) fn busiest(&self, count: usize) -> Vec<(GroupId, u64, u64)> {
        let rate = |rate: &Rate| rate.per_second();
        let mut all: Vec<_> =
            self.groups.iter().map(|entry| (*entry.key(), rate(&entry.writes), rate(&entry.reads))).collect();
        all.sort_unstable_by_key(|(group, writes, reads)| (std::cmp::Reverse(writes + reads), *group));
        all.truncate(count);
        all
    }

    /// Writes and reads per second.
    pub(crate) fn rates(&self, group: GroupId) -> (u64, u64) {
        self.groups.get(&group).map_or((0, 0), |rates| (rates.writes.per_second(), rates.reads.per_second()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_follows_what_is_answered_and_an_idle_group_is_forgotten() {
        let (meter, group) = (Meter::default(), GroupId(7));
        for second in 0..60 {
            (0..300).for_each(|_| meter.wrote(group, 10));
            (0..20).for_each(|_| meter.read(group));
            meter.turn(second);
        }
        let (writes, reads) = meter.rates(group);
        assert!((290..=300).contains(&writes) && (18..=20).contains(&reads), "{writes}, {reads}");
        assert_eq!(meter.rates(GroupId(8)), (0, 0));
        meter.wrote(GroupId(8), 1);
        assert_eq!(meter.busiest(1), [(group, writes, reads)]);
        assert_eq!(meter.busiest(9).len(), 2);
        meter.turn(60);
        assert!((200..290).contains(&meter.rates(group).0), "one second without is not the end");
        (61..181).for_each(|second| meter.turn(second));
        assert!(meter.groups.is_empty());
        assert_eq!(meter.all(), (0, 0));
        let column = &meter.lately(10, 0).columns[0].cells[0];
        assert_eq!((column.writes, column.reads, column.bytes), (3_000, 200, 30_000));
    }
}
