//! A network inside the process, for the runtime's own tests.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
};

use pontoon_proto::{NodeId, v1};
use pontoon_raftstore::{Class, MultiRaft, Transport};

/// A network inside the process. Nodes that are cut off neither send nor receive.
#[derive(Default)]
pub(crate) struct Network {
    nodes: Mutex<BTreeMap<NodeId, MultiRaft>>,
    cut: Mutex<BTreeSet<NodeId>>,
}

impl Network {
    /// Connects a node to all others: handshakes both ways.
    pub(crate) fn join(&self, runtime: &MultiRaft) {
        let me = runtime.identity();
        let mut nodes = self.nodes.lock().unwrap();
        for (id, other) in nodes.iter().filter(|(id, _)| **id != me.node) {
            assert_eq!(other.check_hello(&runtime.hello()).refused, "");
            assert_eq!(runtime.check_hello(&other.hello()).refused, "");
            runtime.accepted_by(*id);
            other.accepted_by(me.node);
        }
        nodes.insert(me.node, runtime.clone());
    }

    pub(crate) fn leave(&self, node: NodeId) {
        self.nodes.lock().unwrap().remove(&node);
    }

    pub(crate) fn cut(&self, node: NodeId, cut: bool) {
        let mut all = self.cut.lock().unwrap();
        if cut {
            all.insert(node)
        } else {
            all.remove(&node)
        };
    }
}

/// One node's end of the network.
pub(crate) struct Link {
    pub(crate) network: Arc<Network>,
    pub(crate) node: NodeId,
}

impl Transport for Link {
    fn send(&self, to: NodeId, _class: Class, messages: Vec<v1::PeerMessage>) {
        let cut = self.network.cut.lock().unwrap();
        if cut.contains(&to) || cut.contains(&self.node) {
            return;
        }
        drop(cut);
        let (peer, token) = {
            let nodes = self.network.nodes.lock().unwrap();
            let Some(me) = nodes.get(&self.node) else { return };
            (nodes.get(&to).cloned(), me.identity().boot_token())
        };
        if let Some(peer) = peer {
            peer.deliver(self.node, token, messages);
        }
    }
}
