//! The checkers are worth something: break one rule of the log, and they notice.

use std::panic::{AssertUnwindSafe, catch_unwind};

use pontoon_wal::rules::{Rule, break_rule};

#[path = "support/run.rs"]
mod run;
#[path = "support/states.rs"]
mod states;
#[path = "support/lib.rs"]
mod support;
#[path = "support/sweep.rs"]
mod sweep;

use run::{Plan, Run};
use states::Explorer;
use sweep::{End, closed_log, ended_log, footers, sectors};

/// A broken rule is found before so many states were looked at, as many as in the ordinary run.
const STATES: usize = 100_000;

/// The rule is broken until this is dropped, by a panic too.
struct Broken;

impl Broken {
    fn rule(rule: Rule) -> Broken {
        break_rule(Some(rule));
        Broken
    }
}

impl Drop for Broken {
    fn drop(&mut self) {
        break_rule(None);
    }
}

/// Looks for a crash that shows the broken rule: how many states were looked at, and what was wrong.
fn hunt(rule: Rule, relocates: bool) -> Option<(usize, String)> {
    let mut looked_at = 0;
    let (groups, lagging) = if relocates { (4, 2) } else { (6, 0) };
    for seed in 1.. {
        let left = STATES.saturating_sub(looked_at);
        if left == 0 {
            return None;
        }
        let mut explorer = Explorer::new(seed, left, false);
        let plan = Plan { seed, steps: 80, groups, lagging, held: seed % 3 == 0, unsynced: false };
        let _broken = Broken::rule(rule);
        let played = catch_unwind(AssertUnwindSafe(|| Run::new(plan).play(&mut explorer)));
        looked_at += explorer.tally.states;
        match played {
            Ok(Ok(())) => {}
            Ok(Err(failure)) => return Some((looked_at, failure)),
            Err(_) => return Some((looked_at, "a panic".to_owned())),
        }
    }
    None
}

#[test]
fn crash_states_show_each_broken_rule() {
    let mut missed = Vec::new();
    let relocation =
        [Rule::CopyDurable, Rule::StillTheSame, Rule::LsnKept, Rule::ColdUpToCheckpoint, Rule::ColdSeqStated];
    for rule in [
        Rule::DurableMarkIsPrefix,
        Rule::TornTailEnds,
        Rule::OpeningAlone,
        Rule::SyncBeforeAck,
        Rule::ForgottenByBoth,
        Rule::ListedByBoth,
        Rule::NameSynced,
        Rule::FilledBeforeListed,
        Rule::CutsHold,
        Rule::WholeFrames,
        Rule::RecoverySyncs,
        Rule::RecoveryRewrites,
        Rule::NewEpoch,
        Rule::CaptureDurable,
        Rule::OlderManifest,
        Rule::ManifestSynced,
        Rule::NewestManifestSynced,
        Rule::BoundsHold,
        Rule::FooterOfSealed,
    ]
    .into_iter()
    .chain(relocation)
    {
        match hunt(rule, relocation.contains(&rule)) {
            Some((states, failure)) => {
                let first = failure.lines().next().unwrap_or_default();
                println!("{rule:?}: after {states} states: {}", &first[..first.len().min(200)]);
            }
            None => missed.push(rule),
        }
    }
    assert!(missed.is_empty(), "nobody noticed {missed:?}");
}

#[test]
fn bad_sectors_show_each_broken_rule() {
    // An open after a close believes footers, and looks at frames only if the process died.
    for rule in [Rule::DurableMarkCounts, Rule::HeadsCopied, Rule::RecordsChecked] {
        let _broken = Broken::rule(rule);
        let log = ended_log(17, 70, End::Watermark);
        let swept = catch_unwind(AssertUnwindSafe(|| sectors(&log, &log.files(".wal"))));
        match swept {
            Ok(Ok(answers)) => assert!(answers.refused > 0, "nobody noticed {rule:?}: {answers:?}"),
            Ok(Err(failure)) => println!("{rule:?}: {failure}"),
            Err(_) => println!("{rule:?}: a panic"),
        }
    }
}

#[test]
fn bad_footers_show_that_they_are_believed() {
    let log = closed_log(12, 60);
    let _broken = Broken::rule(Rule::FooterChecked);
    match catch_unwind(AssertUnwindSafe(|| footers(&log))) {
        Ok(Ok(answers)) => assert!(answers.reported > 0, "nobody noticed: {answers:?}"),
        Ok(Err(failure)) => println!("{failure}"),
        Err(_) => println!("a panic"),
    }
}
