//! Who a node is, and how its peers tell it from a copy of its disk.
//!
//! Each open of the log draws a boot token and appends it to a history in the log's metadata, durable before the first
//! message. A peer remembers the last token that it accepted, durable before it accepts, and from then on accepts only a
//! history that contains it:
//!
//! - a restart presents the old history and one more token: accepted;
//! - an older image of the disk lacks the token of a later boot: refused;
//! - of two copies that both booted, the one that was accepted last is in, the other is refused at its next message.
//!
//! Membership in the history is what counts, never equality, so that a repeated or delayed handshake is harmless.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use bytes::Bytes;
use dashmap::DashMap;
use pontoon_proto::{ClusterId, GroupId, NodeId, v1};
use pontoon_wal::{Batch, Wal};
use prost::Message as _;

use crate::error::Error;

/// The protocol between nodes. A node speaks it and the one before it (there is none yet).
pub const PEER_PROTOCOL: u32 = 1;

const FORMAT: u32 = 1;
const IDENTITY_KEY: &[u8] = b"identity";
const HISTORY_KEY: &[u8] = b"boot-history";

/// Tokens kept. A peer that slept through this many restarts refuses; it is then replaced.
const HISTORY_LIMIT: usize = 4096;

/// A node that was heard this recently is alive.
const ALIVE: Duration = Duration::from_secs(3);

#[derive(Clone, PartialEq, prost::Message)]
struct Stored {
    #[prost(uint32, tag = "1")]
    format: u32,
    #[prost(bytes = "bytes", tag = "2")]
    cluster: Bytes,
    #[prost(uint64, tag = "3")]
    node: u64,
    #[prost(string, tag = "4")]
    address: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct History {
    #[prost(fixed64, repeated, tag = "1")]
    tokens: Vec<u64>,
}

/// A node's name for ever, and its boots so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The cluster that the node belongs to.
    pub cluster: ClusterId,
    /// The node.
    pub node: NodeId,
    /// Where it listens, as it last said.
    pub address: String,
    history: Vec<u64>,
}

impl Identity {
    /// Reads who the log belongs to; `None` in a fresh log.
    ///
    /// # Errors
    /// [`Error::UnknownFormat`] for what a newer version wrote, [`Error::Damaged`] for what cannot be read.
    pub fn load(wal: &Wal) -> Result<Option<Identity>, Error> {
        let damaged =
            |what: &str| Error::Damaged { group: GroupId::NODE, reason: format!("{what} cannot be read") };
        let Some(bytes) = wal.meta(GroupId::NODE, IDENTITY_KEY) else { return Ok(None) };
        let stored = Stored::decode(bytes).map_err(|_| damaged("the node's identity"))?;
        if stored.format != FORMAT {
            return Err(Error::UnknownFormat {
                what: "the node's identity",
                found: stored.format,
                known: FORMAT,
            });
        }
        let history = match wal.meta(GroupId::NODE, HISTORY_KEY) {
            Some(bytes) => History::decode(bytes).map_err(|_| damaged("the node's boot history"))?.tokens,
            None => Vec::new(),
        };
        Ok(Some(Identity {
            cluster: ClusterId::from_slice(&stored.cluster).map_err(|_| damaged("the cluster's id"))?,
            node: NodeId::new(stored.node).map_err(|_| damaged("the node's id"))?,
            address: stored.address,
            history,
        }))
    }

    /// Writes who the log belongs to, or a new address of the same node. Durable on return.
    ///
    /// # Errors
    /// [`Error::ForeignIdentity`] if the log belongs to another node or cluster; the log's.
    pub fn establish(wal: &Wal, cluster: ClusterId, node: NodeId, address: &str) -> Result<Identity, Error> {
        let found = Identity::load(wal)?;
        if let Some(found) = &found
            && (found.cluster, found.node) != (cluster, node)
        {
            return Err(Error::ForeignIdentity {
                found: format!("{} of cluster {}", found.node, found.cluster),
                expected: format!("{node} of cluster {cluster}"),
            });
        }
        let stored = Stored {
            format: FORMAT,
            cluster: Bytes::copy_from_slice(cluster.as_bytes()),
            node: node.get(),
            address: address.to_owned(),
        };
        let mut batch = Batch::new();
        batch.put_meta(GroupId::NODE, IDENTITY_KEY, &stored.encode_to_vec());
        wal.commit(batch)?;
        let history = found.map(|found| found.history).unwrap_or_default();
        Ok(Identity { cluster, node, address: address.to_owned(), history })
    }

    /// Appends this open's token to the history. Durable on return.
    pub(crate) fn boot(&mut self, wal: &Wal) -> Result<(), Error> {
        let token = wal.incarnation();
        if self.history.last() != Some(&token) {
            self.history.push(token);
        }
        let extra = self.history.len().saturating_sub(HISTORY_LIMIT);
        self.history.drain(..extra);
        let mut batch = Batch::new();
        batch.put_meta(GroupId::NODE, HISTORY_KEY, &History { tokens: self.history.clone() }.encode_to_vec());
        wal.commit(batch)?;
        Ok(())
    }

    /// The token of this open; 0 before the runtime was opened.
    pub fn boot_token(&self) -> u64 {
        self.history.last().copied().unwrap_or(0)
    }

    /// How this node introduces itself.
    pub fn hello(&self) -> v1::Hello {
        v1::Hello {
            protocol: PEER_PROTOCOL,
            cluster: Bytes::copy_from_slice(self.cluster.as_bytes()),
            node: self.node.get(),
            boot_history: self.history.clone(),
            address: self.address.clone(),
        }
    }
}

/// Why a handshake is not accepted.
#[derive(Debug)]
pub(crate) struct Unwelcome {
    pub(crate) reason: String,
    /// The peer runs from a copy or an old image of a disk. If that lasts, it has no business to go on.
    pub(crate) copied: bool,
}

impl Unwelcome {
    fn stranger(reason: impl Into<String>) -> Self {
        Unwelcome { reason: reason.into(), copied: false }
    }

    fn copy(reason: String) -> Self {
        Unwelcome { reason, copied: true }
    }
}

struct Session {
    token: u64,
    address: String,
    heard: Instant,
}

/// The peers that this node knows, by the tokens it accepted.
pub(crate) struct Peers {
    wal: Wal,
    sessions: DashMap<NodeId, Session>,
    /// One handshake is judged at a time: two copies must not both be found new.
    judging: Mutex<()>,
}

fn peer_key(node: NodeId) -> Vec<u8> {
    format!("peer/{}", node.get()).into_bytes()
}

impl Peers {
    pub(crate) fn new(wal: Wal) -> Self {
        Peers { wal, sessions: DashMap::new(), judging: Mutex::new(()) }
    }

    fn remembered(&self, node: NodeId) -> Option<u64> {
        let bytes = self.wal.meta(GroupId::NODE, &peer_key(node))?;
        Some(u64::from_le_bytes(bytes.as_ref().try_into().ok()?))
    }

    /// Judges a handshake and makes the peer's token durable before it accepts.
    pub(crate) fn judge(
        &self,
        me: &Identity,
        hello: &v1::Hello,
        now: Instant,
    ) -> Result<(NodeId, u64), Unwelcome> {
        if hello.protocol != PEER_PROTOCOL {
            return Err(Unwelcome::stranger(format!(
                "it speaks peer protocol {}, this node speaks {PEER_PROTOCOL}; run matching versions",
                hello.protocol
            )));
        }
        let cluster =
            ClusterId::from_slice(&hello.cluster).map_err(|error| Unwelcome::stranger(error.to_string()))?;
        if cluster != me.cluster {
            return Err(Unwelcome::stranger(format!(
                "it belongs to cluster {cluster}, this one is {}; check its --join address",
                me.cluster
            )));
        }
        let node = NodeId::new(hello.node).map_err(|error| Unwelcome::stranger(error.to_string()))?;
        if node == me.node {
            // Not a verdict on the greeter: it may be this node itself, by an address that was another's before.
            return Err(Unwelcome::stranger(format!(
                "it calls itself {node}, as this node does; one of the two directories is a copy, stop that process"
            )));
        }
        let token = *hello.boot_history.last().ok_or_else(|| Unwelcome::stranger("it has no boot token"))?;
        let _one_at_a_time = self.judging.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let remembered = self.remembered(node);
        if let Some(known) = remembered.filter(|known| !hello.boot_history.contains(known)) {
            return Err(Unwelcome::copy(format!(
                "{node} was seen with a later or other disk (boot {known:#x} is not in its history); this one is a copy or an \
                 old image: start the node with its own directory, or decommission it and join a fresh one with --replace {node}"
            )));
        }
        if remembered != Some(token) {
            let twin = self.sessions.get(&node).filter(|session| {
                session.token != token
                    && session.address != hello.address
                    && now.saturating_duration_since(session.heard) < ALIVE
            });
            if let Some(twin) = twin {
                return Err(Unwelcome::copy(format!(
                    "{node} is alive at {}; the directory at {} is a copy of it: remove it and join with an empty one",
                    twin.address, hello.address
                )));
            }
            let mut batch = Batch::new();
            batch.put_meta(GroupId::NODE, &peer_key(node), &token.to_le_bytes());
            self.wal.commit(batch).map_err(|error| Unwelcome::stranger(error.to_string()))?;
        }
        self.sessions.insert(node, Session { token, address: hello.address.clone(), heard: now });
        Ok((node, token))
    }

    /// Whether messages of this node under this token are taken; notes that it is alive.
    pub(crate) fn admits(&self, node: NodeId, token: u64, now: Instant) -> bool {
        match self.sessions.get_mut(&node) {
            Some(mut session) if session.token == token => {
                session.heard = now;
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "the tests begin at some moment")]
mod tests {
    use super::*;

    fn wal() -> (tempfile::TempDir, Wal) {
        let dir = tempfile::tempdir().unwrap();
        let mut options = pontoon_wal::Options::new(dir.path().join("wal"));
        options.segment_bytes = 256 << 10;
        let (wal, _) = Wal::open(options).unwrap();
        (dir, wal)
    }

    fn node(id: u64) -> NodeId {
        NodeId::new(id).unwrap()
    }

    fn cluster() -> ClusterId {
        ClusterId::from_slice(&[7; 16]).unwrap()
    }

    fn hello(history: &[u64], address: &str) -> v1::Hello {
        let identity = Identity {
            cluster: cluster(),
            node: node(2),
            address: address.into(),
            history: history.to_vec(),
        };
        identity.hello()
    }

    #[test]
    fn an_identity_is_kept_and_a_foreign_one_refused() {
        let (_dir, wal) = wal();
        assert_eq!(Identity::load(&wal).unwrap(), None);
        let mut me = Identity::establish(&wal, cluster(), node(1), "a:1").unwrap();
        me.boot(&wal).unwrap();
        assert_eq!(me.boot_token(), wal.incarnation());
        assert_eq!(Identity::load(&wal).unwrap(), Some(me));
        let foreign = Identity::establish(&wal, cluster(), node(3), "a:1");
        assert!(matches!(foreign, Err(Error::ForeignIdentity { .. })));
    }

    #[test]
    fn a_restart_is_accepted_an_old_image_and_a_copy_are_not() {
        let (_dir, wal) = wal();
        let me = Identity::establish(&wal, cluster(), node(1), "a:1").unwrap();
        let peers = Peers::new(wal);
        let t0 = Instant::now();
        assert!(peers.judge(&me, &hello(&[10], "b:1"), t0).is_ok());
        assert!(peers.admits(node(2), 10, t0));
        // Restarted at the same address: the old session may still seem alive.
        assert!(peers.judge(&me, &hello(&[10, 11], "b:1"), t0).is_ok());
        assert!(!peers.admits(node(2), 10, t0), "the old incarnation is fenced");
        // An image from before the restart boots again.
        let refused = peers.judge(&me, &hello(&[10, 12], "b:1"), t0).unwrap_err().reason;
        assert!(refused.contains("--replace n2"), "{refused}");
        // A copy beside the living node.
        let refused = peers.judge(&me, &hello(&[10, 11, 13], "c:1"), t0).unwrap_err().reason;
        assert!(refused.contains("alive at b:1"), "{refused}");
        // The node moved to another address after it was silent for a while.
        assert!(peers.judge(&me, &hello(&[10, 11, 13], "c:1"), t0 + ALIVE).is_ok());
    }

    #[test]
    fn strangers_are_refused_by_name() {
        let (_dir, wal) = wal();
        let me = Identity::establish(&wal, cluster(), node(2), "a:1").unwrap();
        let peers = Peers::new(wal);
        let now = Instant::now();
        assert!(peers.judge(&me, &hello(&[1], "b:1"), now).unwrap_err().reason.contains("copy"));
        let mut other = hello(&[1], "b:1");
        other.cluster = Bytes::from_static(&[9; 16]);
        assert!(peers.judge(&me, &other, now).unwrap_err().reason.contains("cluster"));
        other.protocol = 9;
        assert!(peers.judge(&me, &other, now).unwrap_err().reason.contains("protocol 9"));
    }
}
