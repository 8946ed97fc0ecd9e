//! What the runtime needs from above to reach other nodes.

use pontoon_proto::{NodeId, v1::PeerMessage};

/// Traffic classes. Each has a queue and a stream of its own per peer, so that data never delays a heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Votes, heartbeats and their answers.
    Control,
    /// Entries and acknowledgements.
    Append,
    /// Manifests and chunks.
    Snapshot,
}

impl Class {
    /// All classes, by priority.
    pub const ALL: [Class; 3] = [Class::Control, Class::Append, Class::Snapshot];
}

/// Sends messages to other nodes, in order per peer and class, without waiting.
///
/// Loss is allowed (Raft repeats); duplication and reordering across classes are too. Inbound messages go to
/// [`crate::MultiRaft::deliver`], and only from peers whose handshake was accepted.
pub trait Transport: Send + Sync {
    /// Queues messages for a node. Never blocks: with a full queue or without a connection the messages are dropped,
    /// and the transport tells [`crate::MultiRaft::unreachable`].
    fn send(&self, to: NodeId, class: Class, messages: Vec<PeerMessage>);
}
