//! How busy groups are: what this node answers for each of them, per second.

use std::sync::atomic::{AtomicU64, Ordering};

use dashmap::DashMap;
use pontoon_proto::GroupId;

/// One part in so many of each second goes into the rate.
const WEIGHT: u64 = 8;
/// Rates are kept in thousandths per second; a group below this is idle, and forgotten.
const IDLE: u64 = 50;

/// Rates of the groups for which something was answered lately.
#[derive(Default)]
pub(crate) struct Meter {
    groups: DashMap<GroupId, Rates>,
}

#[derive(Default)]
struct Rates {
    writes: Rate,
    reads: Rate,
}

#[derive(Default)]
struct Rate {
    /// Since the last turn.
    count: AtomicU64,
    /// Thousandths per second.
    smoothed: u64,
}

impl Rate {
    fn turn(&mut self) {
        let now = self.count.swap(0, Ordering::Relaxed) * 1_000;
        self.smoothed = (self.smoothed * (WEIGHT - 1) + now) / WEIGHT;
    }

    fn per_second(&self) -> u64 {
        (self.smoothed + 500) / 1_000
    }
}

impl Meter {
    fn note(&self, group: GroupId, rate: fn(&Rates) -> &Rate) {
        if let Some(rates) = self.groups.get(&group) {
            rate(&rates).count.fetch_add(1, Ordering::Relaxed);
        } else {
            rate(&self.groups.entry(group).or_default()).count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A write was answered.
    pub(crate) fn wrote(&self, group: GroupId) {
        self.note(group, |rates| &rates.writes);
    }

    /// A read was answered.
    pub(crate) fn read(&self, group: GroupId) {
        self.note(group, |rates| &rates.reads);
    }

    /// A second has passed.
    pub(crate) fn turn(&self) {
        self.groups.retain(|_, rates| {
            rates.writes.turn();
            rates.reads.turn();
            rates.writes.smoothed.max(rates.reads.smoothed) >= IDLE
        });
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
        for _ in 0..60 {
            (0..300).for_each(|_| meter.wrote(group));
            (0..20).for_each(|_| meter.read(group));
            meter.turn();
        }
        let (writes, reads) = meter.rates(group);
        assert!((290..=300).contains(&writes) && (18..=20).contains(&reads), "{writes}, {reads}");
        assert_eq!(meter.rates(GroupId(8)), (0, 0));
        meter.wrote(GroupId(8));
        assert_eq!(meter.busiest(1), [(group, writes, reads)]);
        assert_eq!(meter.busiest(9).len(), 2);
        meter.turn();
        assert!((200..290).contains(&meter.rates(group).0), "one second without is not the end");
        (0..120).for_each(|_| meter.turn());
        assert!(meter.groups.is_empty());
    }
}
