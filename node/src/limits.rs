//! What anybody may ask of a node's port, in one place. A node must outlive whoever is careless or hostile with it: each limit
//! bounds what one connection, one call or one message can take before it has been found good.
//!
//! | what | bound by |
//! |---|---|
//! | connections | [`NodeConfig::max_connections`](crate::NodeConfig::max_connections), with a share for nodes and operators |
//! | a TLS handshake, the first bytes | [`HANDSHAKE`] |
//! | a silent connection | [`SILENCE`]; live ones answer pings |
//! | calls of a connection | [`STREAMS_MOST`], [`RESETS_PENDING_MOST`] |
//! | headers | [`HEADERS_BYTES`] |
//! | messages | [`MESSAGE_LIMIT_BYTES`], [`ADMIN_REQUEST_BYTES`], [`PEER_FRAME_BYTES`]; lengths are checked before anything is allocated |
//! | nesting of messages | prost's 100 |
//! | a reader that takes nothing | [`SLOW_READER`] |
//! | pages of the console | [`LIVE_MOST`], [`LIVE_LASTS`], [`ORDER_BYTES`] |
//! | compression | none is offered or accepted, so nothing can be small on the wire and large here |

use std::time::Duration;

/// The largest message on any stream or call, both ways. A write batch and a page of a scan fit, with room.
pub const MESSAGE_LIMIT_BYTES: usize = 16 << 20;
/// What an administrative request may have: the longest are placement rules.
pub(crate) const ADMIN_REQUEST_BYTES: usize = 4 << 20;
/// A frame between nodes: one message of raft's may be as large as a batch, and a frame holds others beside it.
pub(crate) const PEER_FRAME_BYTES: usize = 2 * MESSAGE_LIMIT_BYTES;

/// Connections that a node takes unless it is told otherwise. A client needs one to each node, a peer three or four.
pub(crate) const CONNECTIONS_DEFAULT: usize = 4_096;
/// One part in so many of the connections is for nodes and operators alone, so that clients cannot lock them out.
pub(crate) const RESERVED_PART: usize = 8;
/// Until when a connection must have said who it is, and then its first words.
pub(crate) const HANDSHAKE: Duration = Duration::from_secs(10);
/// A connection from which nothing came for so long is closed. One that lives answers the pings.
pub(crate) const SILENCE: Duration = Duration::from_secs(60);
/// How often a silent HTTP/2 connection is asked for a sign of life, and how long it may take to give one.
pub(crate) const PING_EVERY: Duration = Duration::from_secs(20);
pub(crate) const PING_PATIENCE: Duration = Duration::from_secs(20);

/// Calls that one connection has open: a client's tails and moves that it watches count. More wait at the client.
pub(crate) const STREAMS_MOST: u32 = 1_024;
/// Calls that were opened and dropped before they were looked at; a connection with more is closed (rapid reset).
pub(crate) const RESETS_PENDING_MOST: usize = 64;
/// All headers of a call.
pub(crate) const HEADERS_BYTES: u32 = 16 << 10;

/// Flow control windows: wide enough that a fast link never waits for an update.
pub(crate) const STREAM_WINDOW_BYTES: u32 = 8 << 20;
pub(crate) const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;

/// How long the reader of a stream may take nothing, while something waits for it, until the stream ends.
pub(crate) const SLOW_READER: Duration = Duration::from_secs(60);

/// Pages of the console that hear at once what goes on. More ask again and again.
pub(crate) const LIVE_MOST: usize = 64;
/// So long such a stream lasts; the page asks anew. A browser says nothing meanwhile, and [`SILENCE`] would end it.
pub(crate) const LIVE_LASTS: Duration = Duration::from_secs(45);
/// What a page of the console may order with.
pub(crate) const ORDER_BYTES: usize = 16 << 10;

#[cfg(test)]
mod tests;
