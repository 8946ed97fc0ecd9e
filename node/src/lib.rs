//! A Pontoon node: the process around the log, the runtime and the shards.
//!
//! A node serves everything on one port: gRPC for clients, operators and peers (package `pontoon.v1`), health,
//! reflection and plain HTTP. [`Node::start`] embeds a whole one.
//!
//! ```text
//!  client ──> service ──> route ──> raftstore::Group ──> wal
//!                │          └──> another node, one hop       ▲
//!  peers ──> transport ──────────────────────────────────────┘
//!  meta group's leader ──> reconcile ──> shards made, moved, repaired
//! ```
//!
//! ```no_run
//! # async fn run() -> Result<(), pontoon_node::NodeError> {
//! use pontoon_node::{Node, NodeConfig};
//!
//! let node = Node::start(NodeConfig::new("data", "127.0.0.1:7001")).await?;
//! println!("{} listens on {}", node.id(), node.address());
//! node.shutdown().await
//! # }
//! ```

pub mod api;
pub mod audit;
pub mod backup;
pub mod certs;
pub mod client;
pub mod export;
pub mod json;
pub mod load;
pub mod rdf;
pub mod recover;
pub mod rules;
pub mod settings;

mod announce;
mod caller;
mod calls;
mod channels;
mod clock;
mod cluster;
mod config;
mod console;
mod directory;
mod engines;
mod error;
mod follow;
mod foreground;
mod gate;
mod giving;
mod health;
mod heat;
mod inspect;
mod join;
mod limits;
mod machines;
mod map;
mod meter;
pub mod metrics;
mod node;
mod placement;
mod preview;
mod problems;
mod process;
mod profile;
mod readers;
mod reconcile;
mod reopen;
mod replicas;
mod roles;
mod route;
mod seek;
mod server;
mod service;
mod shared;
mod space;
mod stats;
mod tls;
mod transport;
mod turned_away;
mod upgrade;
mod views;

pub use config::{HeapProfiler, HeapUsage, MachineExtension, NodeConfig, OWN_KINDS_FROM};
pub use error::NodeError;
pub use limits::MESSAGE_LIMIT_BYTES;
pub use node::Node;
pub use process::{LogFormat, SpanExport, Spans, init_logs, send_logs, send_logs_and_spans, shutdown_signal};
pub use roles::Role;
pub use tls::{Subject, TlsError, TlsFiles};
