//! What happened: a hash of everything, and words for the last of what matters.

use std::collections::VecDeque;

/// Lines that a failure shows.
const KEPT: usize = 120;

#[derive(Default)]
pub(super) struct Timeline {
    hash: u64,
    lines: VecDeque<String>,
}

impl Timeline {
    /// Counts into the hash.
    pub(super) fn note(&mut self, word: u64) {
        self.hash = (self.hash.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    /// Counts, and is shown if the run fails soon.
    pub(super) fn say(&mut self, now: u64, text: String) {
        for chunk in text.as_bytes().chunks(8) {
            self.note(chunk.iter().fold(now, |word, byte| word << 8 ^ u64::from(*byte)));
        }
        if self.lines.len() == KEPT {
            self.lines.pop_front();
        }
        self.lines.push_back(format!("{now:>8} ms  {text}"));
    }

    pub(super) fn hash(&self) -> u64 {
        self.hash
    }

    pub(super) fn lines(&self) -> Vec<String> {
        self.lines.iter().cloned().collect()
    }
}
