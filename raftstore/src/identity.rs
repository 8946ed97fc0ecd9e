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
//!
//! What a peer remembers protects the groups that it shares with a node. A group whose members have changed since may know
//! nobody who remembers, so a replica makes no promises until its node is known to more than a quorum: either a group that
//! remembers each node's token ([`crate::Config::vouching_group`]) has accepted this one's, by the same rule, or, while that
//! group does not answer, every other voter of the replica's group has. The vouching group's own voters need a quorum of their
//! peers: it could not begin otherwise. Outside the fault model: an old image of one of them, while the only peer that saw its
//! newer token is down.
//!
//! Nobody is locked out by this who has its own directory. After a restart of everything the vouching group elects a leader by
//! greetings alone, then vouches for everybody. A node that dies before it was heard presents one token more the next time,
//! and each token that anybody may remember was in the log before it was shown. While the vouching group is lost, those who
//! run go on, and one that starts again makes promises where all others of a group are there to greet it.

use std::{sync::Mutex, time::Duration};

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

fn load_history(wal: &Wal) -> Result<Vec<u64>, Error> {
    let Some(bytes) = wal.meta(GroupId::NODE, HISTORY_KEY) else { return Ok(Vec::new()) };
    let reason = "the node's boot history cannot be read".to_owned();
    let history = History::decode(bytes).map_err(|_| Error::Damaged { group: GroupId::NODE, reason })?;
    Ok(history.tokens)
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
        let history = load_history(wal)?;
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
        let history = load_history(wal)?;
        Ok(Identity { cluster, node, address: address.to_owned(), history })
    }

    /// Appends this open's token to the history of a log, whoever it will belong to. Durable on return. To be called before
    /// the token is shown to anybody; opening the runtime does it, too.
    ///
    /// # Errors
    /// [`Error::Damaged`] for a history that cannot be read; the log's.
    pub fn note_boot(wal: &Wal) -> Result<(), Error> {
        let mut tokens = load_history(wal)?;
        if tokens.last() == Some(&wal.incarnation()) {
            return Ok(());
        }
        tokens.push(wal.incarnation());
        let extra = tokens.len().saturating_sub(HISTORY_LIMIT);
        tokens.drain(..extra);
        let mut batch = Batch::new();
        batch.put_meta(GroupId::NODE, HISTORY_KEY, &History { tokens }.encode_to_vec());
        wal.commit(batch)?;
        Ok(())
    }

    pub(crate) fn boot(&mut self, wal: &Wal) -> Result<(), Error> {
        Identity::note_boot(wal)?;
        self.history = load_history(wal)?;
        Ok(())
    }

    /// Whether this directory was open under the token at some time. A node of the same id for which that is not so runs from
    /// another disk, or from a later state of this one.
    pub fn knows_boot(&self, token: u64) -> bool {
        self.history.contains(&token)
    }

    /// The token of this open; 0 before the runtime was opened.
    pub fn boot_token(&self) -> u64 {
        self.history.last().copied().unwrap_or(0)
    }

    /// Why a node of this token and address is a copy of one that is alive, as far as is known here.
    pub(crate) fn twin(
        &self,
        peers: &Peers,
        node: NodeId,
        token: u64,
        address: &str,
        now: Duration,
    ) -> Option<String> {
        match node == self.node {
            true => (token != self.boot_token()).then(|| copy_of(node, &self.address, address)),
            false => peers.twin(node, token, address, now),
        }
    }

    /// How this node introduces itself.
    pub fn hello(&self) -> v1::Hello {
        v1::Hello {
            protocol: PEER_PROTOCOL,
            cluster: Bytes::copy_from_slice(self.cluster.as_bytes()),
            node: self.node.get(),
            boot_history: self.history.clone(),
            address: self.address.clone(),
            // What a node speaks beyond this protocol it adds itself.
            ..Default::default()
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

fn copy_of(node: NodeId, alive: &str, copy: &str) -> String {
    format!(
        "{node} is alive at {alive}; the directory at {copy} is a copy of it: remove it and join with an empty one"
    )
}

struct Session {
    token: u64,
    address: String,
    /// On a clock that never goes back.
    heard: Duration,
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
        now: Duration,
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
            if let Some(reason) = self.twin(node, token, &hello.address, now) {
                return Err(Unwelcome::copy(reason));
            }
            let mut batch = Batch::new();
            batch.put_meta(GroupId::NODE, &peer_key(node), &token.to_le_bytes());
            self.wal.commit(batch).map_err(|error| Unwelcome::stranger(error.to_string()))?;
        }
        self.sessions.insert(node, Session { token, address: hello.address.clone(), heard: now });
        Ok((node, token))
    }

    /// Why a node of this token and address is a copy of one that was heard just now; `None` if it is none.
    pub(crate) fn twin(&self, node: NodeId, token: u64, address: &str, now: Duration) -> Option<String> {
        let alive = self.sessions.get(&node).filter(|session| {
            session.token != token && session.address != address && now.saturating_sub(session.heard) < ALIVE
        })?;
        Some(copy_of(node, &alive.address, address))
    }

    /// Whether messages of this node under this token are taken; notes that it is alive.
    pub(crate) fn admits(&self, node: NodeId, token: u64, now: Duration) -> bool {
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
    fn a_boot_that_is_noted_early_counts_once_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let mut tokens = Vec::new();
        for open in 0..3 {
            let mut options = pontoon_wal::Options::new(dir.path().join("wal"));
            options.segment_bytes = 256 << 10;
            let (wal, _) = Wal::open(options).unwrap();
            tokens.push(wal.incarnation());
            // The first time it ends before it knows whose log this is.
            Identity::note_boot(&wal).unwrap();
            if open > 0 {
                let mut me = Identity::establish(&wal, cluster(), node(1), "a:1").unwrap();
                me.boot(&wal).unwrap();
                assert_eq!(me.hello().boot_history, tokens);
                assert!(tokens.iter().all(|token| me.knows_boot(*token)) && !me.knows_boot(1));
            }
            wal.close().unwrap();
        }
    }

    #[test]
    fn a_restart_is_accepted_an_old_image_and_a_copy_are_not() {
        let (_dir, wal) = wal();
        let me = Identity::establish(&wal, cluster(), node(1), "a:1").unwrap();
        let peers = Peers::new(wal);
        let t0 = Duration::from_secs(9);
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
        let now = Duration::from_secs(9);
        assert!(peers.judge(&me, &hello(&[1], "b:1"), now).unwrap_err().reason.contains("copy"));
        let mut other = hello(&[1], "b:1");
        other.cluster = Bytes::from_static(&[9; 16]);
        assert!(peers.judge(&me, &other, now).unwrap_err().reason.contains("cluster"));
        other.protocol = 9;
        assert!(peers.judge(&me, &other, now).unwrap_err().reason.contains("protocol 9"));
    }
}
