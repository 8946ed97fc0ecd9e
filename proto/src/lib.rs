//! The words that Pontoon's layers share: checked ids and the messages that travel between nodes, clients and logs.
//!
//! ```text
//!  ids      NodeId · GroupId · ReplicaId · ClusterId
//!  v1       prost messages: entry (what a log entry holds), peer (node to node), meta (the map), data, admin
//! ```
//!
//! No logic and no I/O live here. Payload fields are `bytes::Bytes`, so that a message that was read from a socket can
//! be stored without a copy.

mod ids;

pub use ids::{ClusterId, GroupId, IdError, NodeId, ReplicaId};

/// The messages of the package `pontoon.v1`, generated from `schema/*.proto`.
#[allow(
    missing_docs,
    clippy::large_enum_variant,
    reason = "generated; the schema files hold the documentation"
)]
pub mod v1 {
    include!(concat!(env!("OUT_DIR"), "/pontoon.v1.rs"));
}
