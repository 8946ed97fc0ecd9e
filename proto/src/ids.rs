//! Ids as newtypes. Zero is never a valid id: it means "none" on the wire.

use std::{fmt, num::ParseIntError, str::FromStr};

/// Why a number or a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdError {
    /// Zero means "none" and names nothing.
    #[error("{kind} 0 means none")]
    Zero {
        /// Which id was meant.
        kind: &'static str,
    },
    /// The number does not fit the id.
    #[error("{kind} {value} is too large")]
    TooLarge {
        /// Which id was meant.
        kind: &'static str,
        /// What was given.
        value: u64,
    },
    /// The text is not a number.
    #[error("{kind} is a number: {source}")]
    NotANumber {
        /// Which id was meant.
        kind: &'static str,
        /// What the parser said.
        source: ParseIntError,
    },
    /// The bytes are not sixteen.
    #[error("a cluster id has 16 bytes, not {len}")]
    ClusterLength {
        /// How many bytes there were.
        len: usize,
    },
}

/// A Raft group. Group 0 is the node's own namespace in its log, group 1 is the meta group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct GroupId(pub u64);

impl GroupId {
    /// The node's own records in its log: identity, boot history. No Raft group.
    pub const NODE: GroupId = GroupId(0);
    /// The group that holds the map of the cluster.
    pub const META: GroupId = GroupId(1);
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "g{}", self.0)
    }
}

/// A node: one process with one log. Given by the meta group at join, from 1, never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(u32);

impl NodeId {
    /// Checks a number from outside.
    ///
    /// # Errors
    /// [`IdError::Zero`] and [`IdError::TooLarge`] (node ids have 32 bits).
    pub fn new(value: u64) -> Result<Self, IdError> {
        match u32::try_from(value) {
            Ok(0) => Err(IdError::Zero { kind: "node" }),
            Ok(id) => Ok(NodeId(id)),
            Err(_) => Err(IdError::TooLarge { kind: "node", value }),
        }
    }

    /// The number, at least 1.
    pub fn get(self) -> u64 {
        u64::from(self.0)
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "n{}", self.0)
    }
}

impl FromStr for NodeId {
    type Err = IdError;

    /// Reads `3` or `n3`.
    fn from_str(text: &str) -> Result<Self, IdError> {
        let digits = text.strip_prefix('n').unwrap_or(text);
        let value = digits.parse().map_err(|source| IdError::NotANumber { kind: "node", source })?;
        NodeId::new(value)
    }
}

/// A member of a group, for ever: the node in the high 32 bits, an ordinal that the meta group gives out in ascending
/// order per group in the low 32 bits.
///
/// A replica that returns to a node gets a new ordinal, so of two replica ids of a group on one node the larger is the
/// later, and everybody can tell a member's node without a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplicaId(u64);

impl ReplicaId {
    /// The replica with this ordinal on this node. Ordinals start at 1.
    ///
    /// # Panics
    /// If the ordinal is 0: ordinals are allocated from 1.
    pub fn on(node: NodeId, ordinal: u32) -> Self {
        assert!(ordinal > 0, "replica ordinals start at 1");
        ReplicaId((node.get() << 32) | u64::from(ordinal))
    }

    /// Checks a number from outside.
    ///
    /// # Errors
    /// [`IdError::Zero`] if the node or the ordinal is 0.
    pub fn new(value: u64) -> Result<Self, IdError> {
        if value >> 32 == 0 || value & u64::from(u32::MAX) == 0 {
            return Err(IdError::Zero { kind: "replica" });
        }
        Ok(ReplicaId(value))
    }

    /// The number that Raft knows the member by.
    pub fn get(self) -> u64 {
        self.0
    }

    /// The node that holds the replica.
    pub fn node(self) -> NodeId {
        NodeId((self.0 >> 32) as u32)
    }

    /// The place of the replica in the group's history, from 1.
    pub fn ordinal(self) -> u32 {
        self.0 as u32
    }
}

impl fmt::Display for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.node(), self.ordinal())
    }
}

impl FromStr for ReplicaId {
    type Err = IdError;

    /// Reads `n3.7`.
    fn from_str(text: &str) -> Result<Self, IdError> {
        let (node, ordinal) = text.split_once('.').unwrap_or((text, ""));
        let ordinal: u32 =
            ordinal.parse().map_err(|source| IdError::NotANumber { kind: "replica", source })?;
        ReplicaId::new((node.parse::<NodeId>()?.get() << 32) | u64::from(ordinal))
    }
}

/// A cluster: 128 random bits, drawn once by the first node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterId(pub uuid::Uuid);

impl ClusterId {
    /// Checks bytes from outside.
    ///
    /// # Errors
    /// [`IdError::ClusterLength`] if there are not sixteen.
    pub fn from_slice(bytes: &[u8]) -> Result<Self, IdError> {
        uuid::Uuid::from_slice(bytes).map(ClusterId).map_err(|_| IdError::ClusterLength { len: bytes.len() })
    }

    /// The sixteen bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replica_ids_carry_their_node_and_order_by_ordinal() {
        let node = NodeId::new(7).unwrap();
        let (first, second) = (ReplicaId::on(node, 1), ReplicaId::on(node, 2));
        assert!(first < second);
        assert_eq!(second.node(), node);
        assert_eq!(second.ordinal(), 2);
        assert_eq!(ReplicaId::new(second.get()), Ok(second));
        assert_eq!(second.to_string(), "n7.2");
        assert_eq!("n7.2".parse(), Ok(second));
        for wrong in ["n7", "n7.", "n7.0", "7.x", ".2", "n0.1"] {
            assert!(wrong.parse::<ReplicaId>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn zero_and_garbage_are_refused() {
        assert_eq!(NodeId::new(0), Err(IdError::Zero { kind: "node" }));
        assert!(matches!(NodeId::new(1 << 32), Err(IdError::TooLarge { .. })));
        assert!(matches!("nx".parse::<NodeId>(), Err(IdError::NotANumber { .. })));
        assert_eq!("n3".parse::<NodeId>().unwrap().get(), 3);
        assert!(ReplicaId::new(5).is_err());
        assert!(ReplicaId::new(5 << 32).is_err());
        assert!(matches!(ClusterId::from_slice(&[1, 2]), Err(IdError::ClusterLength { len: 2 })));
    }
}
