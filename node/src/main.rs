//! The binary `pontoon`: nodes, data and operation from a terminal.

fn main() -> std::process::ExitCode {
    std::process::ExitCode::SUCCESS
}
