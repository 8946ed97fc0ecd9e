//! Predicates, engines, the meta group and the mover of shards.
//!
//! What the crate guarantees:
//!
//! - Effects of commands, the runtime's rows and the mark reach an engine in one atomic batch; a received state becomes
//!   the live one in the mark's batch, durably, and the old one is dropped only afterwards.
//! - Three engines keep the same promises ([`engine`]) and show it in one suite.
//! - The meta group's commands, the mover, the planner and routing are pure: state and observations in, commands out.
//! - What a command does depends on the state and its cluster version alone ([`versions`]); what is not known stops a replica.
//! - A move's phases are committed before they act, and each action is "ensure that": whoever dies, it goes on or
//!   can be rolled back.
//!
//! ```text
//!   raftstore ──Machines──> ShardMachines ──> map, log, meta machines      MapReader, LogReader, watch<MetaState>
//!                                 │                  │                          ^
//!                                 │           GroupStore: generations, mark ────┘
//!                                 └──────> engine: fjall · sled · memory
//!
//!   MetaState ──> planner (what to start) ──> mover (what to do next) ──> commands and actions, for node to carry out
//!       └──> routing (who serves what)
//! ```
//!
//! # Examples
//! ```
//! use pontoon_proto::{GroupId, v1};
//! use pontoon_raftstore::{Command, Machines};
//! use pontoon_shard::{EngineKind, MapCommand, ShardMachines, engine};
//! use prost::Message;
//!
//! let machines = ShardMachines::new(engine::open(EngineKind::Memory, "unused".as_ref())?)?;
//! let shard = v1::Shard { group: 2, predicate: "name".into(), ..Default::default() };
//! let mut machine = machines.open(GroupId(2), &shard.encode_to_vec())?;
//!
//! // The runtime does this, for committed entries.
//! let payload = MapCommand::new().put("alice", "Alice").encode()?;
//! machine.apply(&Command { index: 6, term: 5, timestamp: 1, payload })?;
//! machine.commit(Vec::new(), &v1::Mark { format: 1, index: 6, term: 5, ..Default::default() })?;
//!
//! let row = machines.reader(GroupId(2)).and_then(|reader| reader.get(b"alice").transpose()).expect("it is there")?;
//! assert_eq!((&row.value[..], row.index), (&b"Alice"[..], 6));
//! # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
//! ```

mod contents;
mod error;
mod layout;
mod log;
mod machines;
mod map;
mod meta;
mod routing;
mod store;

pub mod engine;
pub mod mover;
pub mod planner;
pub mod recover;
pub mod versions;

pub use contents::Contents;
pub use engine::EngineKind;
pub use error::Error;
pub use log::{
    LogBounds, LogCommand, LogPage, LogReader, MAX_RECORD_BYTES, MAX_RECORDS, MAX_RESET_OFFSET, Records,
    decode_log_reply,
};
pub use machines::ShardMachines;
pub use map::{
    Expect, MAX_COMMAND_BYTES, MAX_KEY_BYTES, MAX_OPS, MAX_VALUE_BYTES, MapCommand, MapReader, Page, Row,
    Scan, decode_map_reply,
};
pub use meta::{
    MAX_EVENTS, MAX_PREDICATE_BYTES, META_PREDICATE, MetaState, decode_meta_reply, legal, meta_command,
};
pub use mover::{Action, Decision, Observation};
pub use routing::{Route, Routing};
pub use versions::{Feature, Versions};
