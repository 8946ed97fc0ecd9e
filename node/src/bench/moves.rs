//! `pontoon bench move`: moves under traffic, measured on a cluster of its own.
//!
//! ```text
//!   three nodes ─> tiny predicates ─> a fourth node ─> the predicate that moves, and those that are only written to
//!   saturation for a moment ─> half of it from here on, and a write each millisecond to the predicate that moves
//!     ├─ a plain copy, the engine's own scan and ingestion
//!     ├─ (as long without a move, a move) again and again, the leader's replica in every other one
//!     ├─ a killed target, a killed leader of the meta group
//!     └─ all tiny predicates from one node to another, then the node that leads most is drained of its leaders
//! ```
//!
//! Writes wait for nobody: each has a time at which it is due, and its latency counts from there.

mod copies;
mod kills;
mod report;
mod run;
mod stage;
mod tiny;
mod traffic;

use std::path::PathBuf;

use clap::Args;
use pontoon_node::shutdown_signal;
use pontoon_raftstore::SnapshotBudget;

use crate::cli::{Context, Done, EngineArgs, Failure, Say};

#[derive(Debug, Args)]
pub(crate) struct MoveArgs {
    /// How large the predicate is that moves, as in 512KiB or 1GiB.
    #[arg(long, default_value = "32MiB", value_parser = size)]
    bytes: u64,
    /// How many moves; in every other one the replica that leads moves.
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u32).range(2..=1_000))]
    moves: u32,
    /// Writes per second while it is measured. Default: half of what the cluster takes, found by trying.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate: Option<u32>,
    /// What moves may take of each node: slow, normal, fast, max or bytes per second.
    #[arg(long, default_value = "normal", value_parser = budget)]
    budget: String,
    /// How many predicates of one row are moved between two nodes; 0 for none.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(0..=100_000))]
    tiny: u32,
    /// Kill nobody: what a move loses by that is not measured.
    #[arg(long)]
    no_kills: bool,
    /// A directory on the disk that is to be measured; the system's for temporary files if not given.
    #[arg(long)]
    dir: Option<PathBuf>,
    #[command(flatten)]
    engine: EngineArgs,
}

pub(super) async fn run(context: &Context, args: MoveArgs) -> Result<Done, Failure> {
    // Whichever way this ends, the cluster is dropped with it and takes its processes and its directory along.
    tokio::select! {
        end = run::measure(Say::of(context), args) => end.map(|report| report.done()),
        signal = shutdown_signal() => {
            Err(Failure::error(format!("ended by {}; nothing is left running", signal.unwrap_or("a signal"))))
        }
    }
}

/// A number of bytes as people write it.
fn size(text: &str) -> Result<u64, String> {
    let digits = text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: Option<u64> = match unit {
        "" | "B" => Some(1),
        "KiB" => Some(1 << 10),
        "MiB" => Some(1 << 20),
        "GiB" => Some(1 << 30),
        _ => None,
    };
    let bytes =
        number.parse::<u64>().ok().zip(factor).and_then(|(number, factor)| number.checked_mul(factor));
    match bytes {
        Some(bytes @ 1..) => Ok(bytes),
        _ => Err("a size is a number and KiB, MiB or GiB, as in 64MiB".to_owned()),
    }
}

fn budget(text: &str) -> Result<String, String> {
    text.parse::<SnapshotBudget>().map(|_| text.to_owned()).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Words {
        #[command(flatten)]
        args: MoveArgs,
    }

    fn parse(words: &[&str]) -> Result<MoveArgs, clap::Error> {
        Words::try_parse_from([&["bench"], words].concat()).map(|words| words.args)
    }

    #[test]
    fn sizes_have_units() {
        let read = |text| size(text).ok();
        assert_eq!(
            [read("17"), read("4KiB"), read("32MiB"), read("1GiB")],
            [Some(17), Some(4096), Some(32 << 20), Some(1 << 30)]
        );
        for wrong in ["", "0", "MiB", "1MB", "-1", "1.5GiB", "99999999999999999GiB"] {
            assert!(size(wrong).unwrap_err().contains("64MiB"), "{wrong}");
        }
    }

    #[test]
    fn what_is_left_out_ends_in_about_a_minute() {
        let args = parse(&[]).unwrap();
        assert_eq!((args.bytes, args.moves, args.tiny, args.rate), (32 << 20, 12, 200, None));
        assert_eq!((args.budget.as_str(), args.no_kills), ("normal", false));
        let args = parse(&["--bytes", "1GiB", "--moves", "4", "--budget", "4096", "--tiny", "0"]).unwrap();
        assert_eq!((args.bytes, args.moves, args.budget.as_str(), args.tiny), (1 << 30, 4, "4096", 0));
    }

    #[test]
    fn nonsense_is_refused() {
        for words in [
            &["--budget", "quick"][..],
            &["--moves", "1"],
            &["--rate", "0"],
            &["--bytes", "much"],
            &["--engine", "paper"],
        ] {
            assert!(parse(words).is_err(), "{words:?}");
        }
    }
}
