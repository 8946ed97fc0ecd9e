//! What was refused at the node's port, by why: the counters that tell an operator of somebody careless or hostile.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering},
};

/// Why something was turned away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Why {
    /// One connection too many.
    Crowded,
    /// No handshake, or not in time: no TLS, no certificate, one of another authority, an expired one.
    Handshake,
    /// A certificate without a role, or of another cluster.
    Stranger,
    /// Nothing came for too long.
    Silent,
    /// A call that the caller's role does not allow.
    Denied,
    /// A peer that is of another cluster, a copy, or not who its certificate says.
    Greeting,
    /// Bytes on a peer's stream that are no frame.
    Garbage,
    /// A stream whose reader took nothing.
    SlowReader,
}

const ALL: [(Why, &str); 8] = [
    (Why::Crowded, "connections_over_limit"),
    (Why::Handshake, "handshakes_failed"),
    (Why::Stranger, "strange_certificates"),
    (Why::Silent, "silent_connections"),
    (Why::Denied, "calls_denied"),
    (Why::Greeting, "greetings_refused"),
    (Why::Garbage, "illegible_frames"),
    (Why::SlowReader, "slow_readers"),
];

/// Counts since the node was started.
#[derive(Debug, Default)]
pub(crate) struct TurnedAway {
    counts: [AtomicU64; ALL.len()],
}

impl TurnedAway {
    pub(crate) fn note(&self, why: Why) {
        self.counts[why as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Every counter by its name.
    pub(crate) fn counts(&self) -> BTreeMap<String, u64> {
        let count = |why: Why| self.counts[why as usize].load(Ordering::Relaxed);
        ALL.iter().map(|&(why, name)| (name.to_owned(), count(why))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_a_counter_of_its_own() {
        let away = TurnedAway::default();
        for (at, (why, name)) in ALL.into_iter().enumerate() {
            assert_eq!(why as usize, at, "{name}");
            (0..=at).for_each(|_| away.note(why));
        }
        let counts = away.counts();
        assert_eq!(ALL.map(|(_, name)| counts[name]), [1, 2, 3, 4, 5, 6, 7, 8]);
    }
}
