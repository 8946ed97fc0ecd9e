//! The checker of histories against another one, on random small histories: some that a register made, some with answers
//! that it never gave.

use pontoon_tests::{
    Rng,
    linear::{Act, Op, Value, Verdict, check},
};
use stateright::semantics::{ConsistencyTester, LinearizabilityTester, SequentialSpec};

/// The register, for the other checker.
#[derive(Clone, Default)]
struct Register(Value);

#[derive(Clone, Debug, PartialEq)]
enum Ask {
    Write(Value),
    Swap(Value, Value),
    Read,
}

#[derive(Clone, Debug, PartialEq)]
enum Answer {
    Done,
    Was(Value),
}

impl SequentialSpec for Register {
    type Op = Ask;
    type Ret = Answer;

    fn invoke(&mut self, ask: &Ask) -> Answer {
        match ask {
            Ask::Write(value) => self.0 = *value,
            Ask::Swap(expected, value) if *expected == self.0 => self.0 = *value,
            Ask::Swap(..) | Ask::Read => return Answer::Was(self.0),
        }
        Answer::Done
    }
}

/// What the other checker says. Each operation is a thread of its own: an open one must not hold up others.
fn other_opinion(ops: &[Op]) -> bool {
    let mut events: Vec<(u64, usize, bool)> = Vec::new();
    for (nth, op) in ops.iter().enumerate() {
        events.push((op.call, nth, true));
        events.extend(op.answer.map(|answer| (answer, nth, false)));
    }
    events.sort_unstable();
    let mut tester = LinearizabilityTester::new(Register::default());
    for (_, nth, is_call) in events {
        let (ask, answer) = match ops[nth].act {
            Act::Write(value) => (Ask::Write(value), Answer::Done),
            Act::Swap(expected, value) => (Ask::Swap(expected, value), Answer::Done),
            Act::Read(value) => (Ask::Read, Answer::Was(value)),
        };
        let told = match is_call {
            true => tester.on_invoke(nth, ask).map(drop),
            false => tester.on_return(nth, answer).map(drop),
        };
        told.expect("each operation is called once and answered once");
    }
    tester.is_consistent()
}

/// A history of a register that works, but for some answers that are made up in `lies` permille of all cases.
fn history(rng: &mut Rng, lies: u64) -> Vec<Op> {
    let count = 3 + rng.below(7) as usize;
    let mut moments: Vec<u64> = (1..=3 * count as u64).collect();
    for at in (1..moments.len()).rev() {
        moments.swap(at, rng.below(at as u64 + 1) as usize);
    }
    // Call, effect and answer at three moments in order; what happens is what the register says at the effect.
    let mut planned: Vec<[u64; 3]> =
        moments.chunks_exact(3).map(|three| [three[0], three[1], three[2]]).collect();
    for three in &mut planned {
        three.sort_unstable();
    }
    planned.sort_unstable_by_key(|three| three[1]);
    let mut value = 0;
    let mut ops = Vec::new();
    for [call, _, answer] in planned {
        let draw = |rng: &mut Rng| 1 + rng.below(4) as Value;
        let is_open = rng.chance(150);
        let mut act = match rng.below(3) {
            0 => Act::Write(draw(rng)),
            1 => {
                let expected = rng.below(4) as Value;
                if expected == value { Act::Swap(expected, draw(rng)) } else { Act::Read(value) }
            }
            _ => Act::Read(value),
        };
        // An open operation has an effect or none.
        let takes_effect = !is_open || rng.chance(500);
        match act {
            Act::Write(new) | Act::Swap(_, new) if takes_effect => value = new,
            _ => {}
        }
        if rng.chance(lies) {
            act = match act {
                Act::Read(_) => Act::Read(rng.below(5) as Value),
                Act::Swap(_, new) => Act::Swap(rng.below(5) as Value, new),
                write => write,
            };
        }
        ops.push(Op { call, answer: (!is_open).then_some(answer), act });
    }
    ops
}

#[test]
fn both_checkers_say_the_same_of_good_and_bad_histories() {
    let mut rng = Rng::new(5);
    let (mut good, mut bad) = (0, 0);
    for round in 0..6_000 {
        let ops = history(&mut rng, if round % 2 == 0 { 0 } else { 250 });
        let ours = check(&ops);
        assert_eq!(ours == Verdict::Linearizable, other_opinion(&ops), "{ours:?}: {ops:#?}");
        match ours {
            Verdict::Linearizable => good += 1,
            _ => bad += 1,
        }
        assert!(round % 2 == 1 || ours == Verdict::Linearizable, "a register that works made this: {ops:#?}");
    }
    assert!(good > 3_000 && bad > 500, "{good} good histories, {bad} bad ones");
}
