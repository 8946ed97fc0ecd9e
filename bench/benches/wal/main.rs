//! The log beside raft-engine and beside the device's own limit, in one run and one directory.
//!
//! `cargo bench --manifest-path bench/Cargo.toml --bench wal -- [--quick] [--json] [--dir DIR] [--engine NAME] [--depth N]
//! [FILTER..]`
//! prints medians of interleaved rounds. A filter is a part of a case's name; without filters all cases run, which takes
//! about half an hour. Values do not compress.

mod child;
mod engine;
mod ideal;
mod measure;
mod ours;
mod parent;
mod peer;
mod work;

use std::{path::PathBuf, time::Duration};

use parent::Pace;
use work::{Case, Kind, Outcome};

fn main() -> Outcome<()> {
    let mut args = std::env::args().skip(1);
    let (mut filters, mut engines, mut as_json) = (Vec::new(), Vec::new(), false);
    let mut pace = Pace { rounds: 5, round: Duration::from_millis(300) };
    let mut depth = 0;
    let mut parent = std::env::current_dir()?;
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--child" | "--reopen" => {
                let what = args.next().ok_or("which engine?")?;
                let (kind, case): (Kind, Case) = serde_json::from_str(&what)?;
                let dir = PathBuf::from(args.next().ok_or("where?")?);
                return match arg.as_str() {
                    "--child" => child::run(kind, case, &dir),
                    _ => child::reopen(kind, case, &dir),
                };
            }
            "--json" => as_json = true,
            "--quick" => pace = Pace { rounds: 3, round: Duration::from_millis(250) },
            "--dir" => parent = args.next().ok_or("--dir needs a directory")?.into(),
            "--engine" => engines.push(args.next().ok_or("--engine needs a name")?),
            "--depth" => depth = args.next().ok_or("--depth needs a number")?.parse()?,
            // What cargo adds.
            "--bench" => {}
            filter => filters.push(filter.to_owned()),
        }
    }
    let cases: Vec<Case> = Case::all()
        .into_iter()
        .map(|case| Case { depth, ..case })
        .filter(|case| {
            filters.is_empty() || filters.iter().any(|filter| case.name().contains(filter.as_str()))
        })
        .collect();
    parent::run(&cases, &engines, pace, &parent, as_json)
}
