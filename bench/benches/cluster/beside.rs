//! What idle predicates cost those that are active: two clusters of ours, one with 4,096 idle ones beside, in turn.

use std::{path::Path, time::Duration};

use crate::{
    Case, Cluster, Figures, Load, Outcome, case,
    ours::{Kind, Ours},
};

const ACTIVE: Case = case("48 active", Load::Put, 64, 128, 48);
const CROWD: u32 = 4096;
const PAIRS: usize = 10;
/// Until all that is not used sleeps.
const REST: Duration = Duration::from_secs(10);

/// Measures ten interleaved pairs and prints each, their medians and the cost.
pub(crate) fn run(binary: &Path, dir: &Path, time: Duration) -> Outcome<()> {
    let (alone_dir, beside_dir) = (tempfile::tempdir_in(dir)?, tempfile::tempdir_in(dir)?);
    let mut alone = Ours::start(binary, alone_dir.path(), Kind::FJALL)?;
    let mut beside = Ours::start(binary, beside_dir.path(), Kind::FJALL)?;
    beside.run(&Case { predicates: CROWD, ..ACTIVE }, Duration::from_secs(5))?;
    std::thread::sleep(REST);
    println!("{ACTIVE:?}, without and with {CROWD} idle predicates beside");
    println!(
        "{:>4} {:>11} {:>11} {:>13} {:>13}",
        "pair", "without /s", "with /s", "without ms/op", "with ms/op"
    );
    let (mut without, mut with) = (Vec::new(), Vec::new());
    for pair in 1..=PAIRS {
        let nothing = "it does not put";
        let one = alone.run(&ACTIVE, time)?.ok_or(nothing)?;
        let other = beside.run(&ACTIVE, time)?.ok_or(nothing)?;
        println!(
            "{pair:>4} {:>11.0} {:>11.0} {:>13.3} {:>13.3}",
            one.per_s, other.per_s, one.cpu_ms_per_op, other.cpu_ms_per_op
        );
        without.push(one);
        with.push(other);
    }
    let (without, with) = (Figures::median(&without), Figures::median(&with));
    println!(
        "medians: {:.0}/s and {:.0}/s ({:+.1} %), {:.3} and {:.3} CPU ms/op ({:+.1} %)",
        without.per_s,
        with.per_s,
        100.0 * (with.per_s / without.per_s - 1.0),
        without.cpu_ms_per_op,
        with.cpu_ms_per_op,
        100.0 * (with.cpu_ms_per_op / without.cpu_ms_per_op - 1.0)
    );
    Ok(())
}
