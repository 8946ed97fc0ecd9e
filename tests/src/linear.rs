//! Whether the history of one register can be explained by one order of its operations.
//!
//! Each operation must seem to happen at one moment between its call and its answer. The search is Wing and Gong's with
//! Lowe's memory: it puts one operation after the other in order, goes back where it gets stuck, and never visits the same
//! (set of operations, value) twice. A read that fits the value is put in order at once: it changes nothing, so putting it
//! off helps nobody. Only writes make it branch.

use std::collections::HashSet;

/// A value of the register; 0 is "nothing there".
pub type Value = u32;

/// What was asked of the register and, if it was answered, what came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Act {
    /// The value is this from now on.
    Write(Value),
    /// The value was the first and is the second from now on. One that was refused because the value was another is a
    /// [`Act::Read`] of that one; one whose answer is not known has taken effect or has not.
    Swap(Value, Value),
    /// The value was this.
    Read(Value),
}

/// An operation. Moments are numbers that no two events share, except for the calls of reads that may be stale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Op {
    /// When it was called: it seems to happen later.
    pub call: u64,
    /// When it was answered: it seems to happen earlier. `None`: it was not, and happens some time later or never.
    pub answer: Option<u64>,
    /// What it is.
    pub act: Act,
}

/// What the search found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// There is such an order.
    Linearizable,
    /// There is none.
    Violation,
    /// The search was given up after so many steps. Whoever asks counts it as a violation.
    Unknown,
}

/// Steps after which the search is given up.
const PATIENCE: usize = 2_000_000;

/// Searches for an order, of a register that holds nothing at first.
pub fn check(history: &[Op]) -> Verdict {
    let mut ops = history.to_vec();
    // An unanswered read binds nobody.
    ops.retain(|op| op.answer.is_some() || !matches!(op.act, Act::Read(_)));
    ops.sort_by_key(|op| (op.call, op.answer));
    let mut search =
        Search { done: vec![0; ops.len().div_ceil(64)], ops, value: 0, left: 0, path: Vec::new() };
    search.left = search.ops.iter().filter(|op| op.answer.is_some()).count();
    search.run()
}

struct Search {
    /// By their calls.
    ops: Vec<Op>,
    /// Which of them are in order, as bits.
    done: Vec<u64>,
    value: Value,
    /// How many answered ones are not in order yet.
    left: usize,
    path: Vec<Taken>,
}

/// An operation that was put in order, and how to take it back.
struct Taken {
    op: usize,
    before: Value,
    /// Reads that followed for free.
    reads: Vec<usize>,
    /// Where to look for another one in its place.
    next: usize,
}

impl Search {
    fn run(&mut self) -> Verdict {
        let mut visited: HashSet<(Vec<u64>, Value)> = HashSet::new();
        let mut reads = self.take_reads();
        let mut from = 0;
        for _ in 0..PATIENCE {
            if self.left == 0 {
                return Verdict::Linearizable;
            }
            match self.candidate(from) {
                Some(op) => {
                    let before = self.value;
                    self.put(op);
                    let followers = self.take_reads();
                    if visited.insert((self.done.clone(), self.value)) {
                        self.path.push(Taken { op, before, reads: followers, next: op + 1 });
                        from = 0;
                    } else {
                        self.take_back(op, before, &followers);
                        from = op + 1;
                    }
                }
                None => {
                    let Some(last) = self.path.pop() else {
                        reads.clear();
                        return Verdict::Violation;
                    };
                    self.take_back(last.op, last.before, &last.reads);
                    from = last.next;
                }
            }
        }
        Verdict::Unknown
    }

    fn is_done(&self, op: usize) -> bool {
        self.done[op / 64] >> (op % 64) & 1 == 1
    }

    /// Before this moment everything that comes next must have been called.
    fn horizon(&self) -> u64 {
        let mut horizon = u64::MAX;
        for (nth, op) in self.ops.iter().enumerate() {
            if op.call > horizon {
                break;
            }
            if let Some(answer) = op.answer.filter(|_| !self.is_done(nth)) {
                horizon = horizon.min(answer);
            }
        }
        horizon
    }

    /// The first operation at or after `from` that may come next and changes the value.
    fn candidate(&self, from: usize) -> Option<usize> {
        let horizon = self.horizon();
        let ops = self.ops.iter().enumerate().take_while(|(_, op)| op.call < horizon).skip(from);
        ops.filter(|(nth, _)| !self.is_done(*nth)).find_map(|(nth, op)| match op.act {
            Act::Write(_) => Some(nth),
            Act::Swap(expected, _) => (expected == self.value).then_some(nth),
            Act::Read(_) => None,
        })
    }

    fn put(&mut self, op: usize) {
        self.done[op / 64] |= 1 << (op % 64);
        self.left -= usize::from(self.ops[op].answer.is_some());
        match self.ops[op].act {
            Act::Write(value) | Act::Swap(_, value) => self.value = value,
            Act::Read(_) => {}
        }
    }

    fn take_reads(&mut self) -> Vec<usize> {
        let mut taken = Vec::new();
        loop {
            let horizon = self.horizon();
            let before = taken.len();
            for nth in 0..self.ops.len() {
                if self.ops[nth].call >= horizon {
                    break;
                }
                if self.ops[nth].act == Act::Read(self.value) && !self.is_done(nth) {
                    self.put(nth);
                    taken.push(nth);
                }
            }
            if taken.len() == before {
                return taken;
            }
        }
    }

    fn take_back(&mut self, op: usize, before: Value, reads: &[usize]) {
        for &nth in reads.iter().chain([&op]) {
            self.done[nth / 64] &= !(1 << (nth % 64));
            self.left += usize::from(self.ops[nth].answer.is_some());
        }
        self.value = before;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(call: u64, answer: u64, act: Act) -> Op {
        Op { call, answer: (answer != 0).then_some(answer), act }
    }

    #[test]
    fn a_stale_read_is_a_violation_and_an_overlapping_one_is_not() {
        let write = op(1, 2, Act::Write(7));
        assert_eq!(check(&[write, op(3, 4, Act::Read(0))]), Verdict::Violation);
        assert_eq!(check(&[op(1, 4, Act::Write(7)), op(2, 3, Act::Read(0))]), Verdict::Linearizable);
        assert_eq!(check(&[write, op(0, 4, Act::Read(0))]), Verdict::Linearizable);
    }

    #[test]
    fn a_write_without_an_answer_happens_at_any_time_or_never() {
        let open = op(1, 0, Act::Write(7));
        let (absent, there) = (op(2, 3, Act::Read(0)), op(4, 5, Act::Read(7)));
        assert_eq!(check(&[open, absent]), Verdict::Linearizable);
        assert_eq!(check(&[open, absent, there]), Verdict::Linearizable);
        assert_eq!(check(&[open, absent, there, op(6, 7, Act::Read(0))]), Verdict::Violation);
    }

    #[test]
    fn a_swap_that_took_effect_twice_is_a_violation() {
        let swap = op(1, 2, Act::Swap(0, 1));
        let back = op(3, 4, Act::Write(0));
        assert_eq!(check(&[swap, back, op(5, 6, Act::Read(0))]), Verdict::Linearizable);
        assert_eq!(check(&[swap, back, op(5, 6, Act::Read(1))]), Verdict::Violation);
    }
}
