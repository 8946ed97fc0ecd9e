//! Hybrid timestamps: unix milliseconds in the high 48 bits, a counter in the low 16.

/// Gives out timestamps that never go back and stay close to the wall clock.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct HybridClock {
    last: u64,
}

impl HybridClock {
    /// The next timestamp at this wall time: above every one given or seen before.
    pub(crate) fn next(&mut self, wall_ms: u64) -> u64 {
        self.last = (self.last + 1).max(wall_ms << 16);
        self.last
    }

    /// Takes note of a timestamp from elsewhere.
    pub(crate) fn observe(&mut self, timestamp: u64) {
        self.last = self.last.max(timestamp);
    }
}

/// A span of time in hybrid units.
pub(crate) fn span(duration: std::time::Duration) -> u64 {
    (duration.as_millis() as u64) << 16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_goes_back_when_the_wall_clock_does() {
        let mut clock = HybridClock::default();
        let first = clock.next(1_000);
        assert_eq!(first, 1_000 << 16);
        assert!(clock.next(500) > first);
        clock.observe(2_000 << 16);
        assert!(clock.next(1_500) > 2_000 << 16);
    }
}
