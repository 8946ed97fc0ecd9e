//! The runtime moved by hand: each message, sync and tick comes when a test says so.

mod commits;
mod crowd;
mod flow;
mod gate;
mod lab;
mod lease;
#[path = "../common/machine.rs"]
mod machine;
mod orders;
mod pitfalls;
mod recover;
mod stall;
