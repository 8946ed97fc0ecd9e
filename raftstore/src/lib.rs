//! Many Raft groups over one shared log.

mod apply;
mod convert;
mod core;
mod dedup;
mod driver;
mod effects;
mod envelope;
mod error;
mod handle;
mod hybrid;
mod identity;
mod logging;
mod machine;
mod replica;
mod snapshot;
mod stepped;
mod storage;
mod transport;
mod types;

pub use effects::Answer;
pub use error::{Ambiguous, Error, ProposeError, Rejected};
pub use handle::{Group, MultiRaft, Ticket};
pub use identity::{Identity, PEER_PROTOCOL};
pub use machine::{Command, MachineError, Machines, SnapshotSource, SnapshotStage, StateMachine, SystemRow};
pub use stepped::{Output, Stepped};
pub use transport::{Class, Transport};
pub use types::{
    Applied, Config, Event, GroupSpec, GroupStatus, INITIAL_POSITION, MAX_OPEN_REQUESTS, MemberChange,
    Progress, Proposal, PullProgress, RequestId, Role,
};
