//! What operators do with a log's directory: look at its frames, check every byte that matters, copy what is readable.
//!
//! Nothing here trusts what an open may take on trust: each frame is read, with both copies of its head and each record.
//! The directory is never written to. While a process has the log open, what is found is the log of a moment, and a
//! segment that is used again meanwhile can look damaged: ask again before believing it.

mod check;
mod copy;
mod footers;
mod frames;
mod lenient;

pub use check::{CheckReport, check};
pub use copy::{CopyReport, GroupCopy, copy, plan_copy};
pub use frames::{Fault, FaultKind, FrameInfo, FrameState, RecordInfo, frames};
pub use lenient::Unreadable;
