//! Randomness from one seed, so that a run repeats. Not for secrets.

/// SplitMix64.
#[derive(Debug, Clone)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    /// Stirs more into the state.
    pub(crate) fn mix(&mut self, value: u64) {
        self.0 = self.next_u64() ^ value.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    pub(crate) fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Never zero, which means "none".
    pub(crate) fn token(&mut self) -> u64 {
        loop {
            match self.next_u64() {
                0 => {}
                token => return token,
            }
        }
    }

    pub(crate) fn next_u128(&mut self) -> u128 {
        u128::from(self.next_u64()) << 64 | u128::from(self.token())
    }

    /// Below `bound`, which is not zero.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next_u64() % bound
    }
}
