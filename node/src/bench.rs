//! `pontoon bench`: load generators that measure.

mod load;
mod moves;

use clap::{Args, Subcommand};

use crate::cli::{Context, Done, Failure};

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    what: Option<Bench>,
    #[command(flatten)]
    load: load::ClosedLoopArgs,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// Moves under traffic, measured on a cluster of its own: four processes on this machine, removed at the end.
    Move(moves::MoveArgs),
}

pub(crate) async fn run(context: &Context, args: BenchArgs) -> Result<Done, Failure> {
    match args.what {
        None => load::run(context, args.load).await,
        Some(Bench::Move(args)) => moves::run(context, args).await,
    }
}
