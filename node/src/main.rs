//! The binary `pontoon`: nodes, data and operation from a terminal.

mod allocator;
mod bench;
mod cli;
mod demo;
mod local;

use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("pontoon: the runtime cannot be started: {error}; is the limit of threads reached?");
            return ExitCode::from(1);
        }
    };
    let code = runtime.block_on(cli::run(cli));
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    code
}
