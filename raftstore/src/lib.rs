//! Many Raft groups over one shared log.

mod error;
mod machine;
mod transport;

pub use error::{Ambiguous, Error, ProposeError, Rejected};
pub use machine::{Command, MachineError, Machines, SnapshotSource, SnapshotStage, StateMachine, SystemRow};
pub use transport::{Class, Transport};
