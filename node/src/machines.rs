//! The state machines of this node: those of the crate `shard`, and the embedder's own.

use std::{fmt, sync::Arc};

use pontoon_proto::{GroupId, v1};
use pontoon_raftstore::{MachineError, Machines, StateMachine};
use pontoon_shard::{LogReader, MapReader, ShardMachines};
use prost::Message;

use crate::config::{MachineExtension, OWN_KINDS_FROM};

/// Sends each group to who knows its kind.
pub(crate) struct NodeMachines {
    shards: Arc<ShardMachines>,
    own: Option<Arc<dyn MachineExtension>>,
}

impl fmt::Debug for NodeMachines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeMachines").field("shards", &self.shards).finish_non_exhaustive()
    }
}

impl NodeMachines {
    pub(crate) fn new(shards: Arc<ShardMachines>, own: Option<Arc<dyn MachineExtension>>) -> Self {
        NodeMachines { shards, own }
    }

    pub(crate) fn shards(&self) -> &Arc<ShardMachines> {
        &self.shards
    }

    pub(crate) fn reader(&self, group: GroupId) -> Option<MapReader> {
        self.shards.reader(group)
    }

    pub(crate) fn log(&self, group: GroupId) -> Option<LogReader> {
        self.shards.log(group)
    }

    /// About how many bytes a group's rows take here; 0 for the embedder's own.
    pub(crate) fn usage(&self, group: GroupId) -> u64 {
        self.shards.usage(group)
    }
}

impl Machines for NodeMachines {
    fn open(&self, group: GroupId, descriptor: &[u8]) -> Result<Box<dyn StateMachine>, MachineError> {
        let shard = v1::Shard::decode(descriptor)?;
        if shard.kind < OWN_KINDS_FROM {
            return self.shards.open(group, descriptor);
        }
        match &self.own {
            Some(own) => own.open(group, &shard),
            None => Err(format!(
                "{group} ({}) has the kind {}, for which this node has no machine; start it with the extension that made it",
                shard.predicate, shard.kind
            )
            .into()),
        }
    }

    fn flush(&self) -> Result<(), MachineError> {
        if let Some(own) = &self.own {
            own.flush()?;
        }
        self.shards.flush()
    }

    fn failure(&self) -> Option<String> {
        self.shards.failure()
    }
}
