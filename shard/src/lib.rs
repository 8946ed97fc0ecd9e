//! Predicates, engines, the meta group and the mover of shards.

mod error;
mod layout;
mod machines;
mod map;
mod meta;
mod routing;
mod store;

pub mod engine;
pub mod mover;
pub mod planner;

pub use engine::EngineKind;
pub use error::Error;
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
