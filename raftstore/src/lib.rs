//! Many Raft groups over one shared log.
//!
//! What the crate guarantees:
//!
//! - A proposal that was answered is applied, on a quorum's durable logs, exactly once per request id while its session
//!   lives. [`Rejected`] means without effect for ever; [`Ambiguous`] says honestly that it is not known.
//! - Nothing that promises a term, a vote or an entry leaves a node before it is durable there; everything else leaves
//!   at once.
//! - Effects, dedup rows, mark and configuration reach a state machine in one atomic batch, and the log keeps whatever an
//!   engine has not made durable.
//! - A fault stays in its group: messages are checked before raft sees them, and a panic stops one replica.
//! - A disk that was copied or set back does not vote.
//!
//! ```text
//!  Group::propose ─┐                 ┌─> Transport ──> other nodes
//!  deliver ────────┼─> core loop ────┼─> apply threads ──> StateMachine
//!  log's sink ─────┘  (sans-io Core) └─> snapshot thread
//!                          │
//!                          └─> wal: one submission per turn for all groups
//! ```
//!
//! The same core, appliers and snapshot server run under threads ([`MultiRaft`]) and step by step ([`Stepped`]), which is
//! how the simulator replays a run from its seed.
//!
//! An embedder implements [`Machines`] and [`StateMachine`] (where commands take effect) and [`Transport`] (how messages
//! travel). The crate's example `own_state_machine` is a whole program:
//!
//! ```no_run
//! # use std::sync::Arc;
//! # use bytes::Bytes;
//! # use pontoon_proto::{GroupId, ReplicaId, v1};
//! # use pontoon_raftstore::{Config, GroupSpec, Identity, Machines, MultiRaft, Proposal, Transport};
//! # async fn run(
//! #     wal: pontoon_wal::Wal, identity: Identity, machines: Arc<dyn Machines>, transport: Arc<dyn Transport>,
//! # ) -> Result<(), Box<dyn std::error::Error>> {
//! let replica = ReplicaId::on(identity.node, 1);
//! let runtime = MultiRaft::open(Config::default(), wal, identity, machines, transport)?;
//! let initial = v1::ConfState { voters: vec![replica.get()], ..Default::default() };
//! let spec = GroupSpec { group: GroupId(7), replica, descriptor: Bytes::new(), epoch: 1, initial: Some(initial) };
//! let group = runtime.create_group(spec).await?;
//! group.wait_for_leader().await?;
//! let applied = group.propose(Proposal { payload: Bytes::from("command"), request: None, epoch: 1, urgent: false }).await?;
//! println!("applied at {}", applied.index);
//! # Ok(())
//! # }
//! ```

mod apply;
mod beats;
mod board;
mod budget;
mod convert;
mod core;
mod dedup;
mod door;
mod driver;
mod effects;
mod envelope;
mod error;
mod handle;
mod hybrid;
mod identity;
mod lanes;
mod logging;
mod machine;
mod pace;
mod priority;
mod puller;
mod replica;
#[doc(hidden)]
pub mod rules;
mod snapshot;
mod stats;
mod stepped;
mod storage;
mod transport;
mod types;

pub use budget::SnapshotBudget;
pub use effects::Answer;
pub use error::{Ambiguous, Error, ProposeError, Rejected};
pub use handle::{Group, MultiRaft, Ticket};
pub use identity::{Identity, PEER_PROTOCOL};
pub use machine::{
    Command, MachineError, Machines, SnapshotSource, SnapshotStage, Staging, StateMachine, SystemRow,
};
pub use pace::{Foreground, Pace};
pub use priority::give_way;
pub use replica::{Depths, Flight};
pub use stats::{Roles, Stats};
pub use stepped::{Output, Stepped};
pub use transport::{Class, Transport};
pub use types::{
    Applied, Config, Event, GroupSpec, GroupStatus, INITIAL_POSITION, MAX_OPEN_REQUESTS, Mandate,
    MemberChange, Progress, Proposal, PullProgress, ReadLevel, Recovery, RequestId, Role, Room, Verified,
};
