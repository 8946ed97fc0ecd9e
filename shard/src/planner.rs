//! Where replicas go: rules, repairs, plans, and why. Pure: the meta group's state and what was seen in, commands out.
//!
//! ```text
//!   Rules ──> Rulebook ──> Rule of a predicate          require · pin (hard)   spread · avoid · prefer (soft)
//!                            │
//!   MetaState, Seen ─────────┼──> repairs    lost, lacking > against the rules > draining        begun at once
//!                            ├──> balance    bytes with the bound beside it, load, leaders       a plan first
//!                            └──> explain, check_rules
//! ```
//!
//! Nothing here decides who is a member: what is begun is a move, and the mover and the group see it through.

mod balance;
mod exact;
mod explain;
mod leaders;
mod repair;
mod rules;
mod world;

use std::collections::{BTreeMap, BTreeSet};

use pontoon_proto::{NodeId, v1};
use prost::Message;

pub use self::{
    balance::{By, GOAL, Limits, THRESHOLD, balance, balance_by, continue_plan, plan_obstacles},
    explain::{Explanation, Finding, Standing, Verdict, check_rules, explain},
    repair::{elsewhere, placement, repairs, target},
    rules::{RULES_FORMAT, Rule, Rulebook, Selector},
};

/// How many moves may run at once.
pub const MAX_RUNNING_MOVES: usize = 128;

/// Where replicas have stopped for good on nodes that live: groups and nodes. Which replica it was its log may have
/// forgotten; a node has one of a group.
pub type Dead = BTreeSet<(u64, NodeId)>;

/// What was seen of a group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GroupSeen {
    /// About how large a replica is.
    pub bytes: u64,
    /// The node whose replica leads; 0 if unknown.
    pub leader: u64,
}

/// How much is asked of a group, as smoothed by whoever measures.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    /// Writes per second: each of the group's replicas bears them.
    pub writes: u64,
    /// Reads per second that its leader answers.
    pub reads: u64,
}

/// What was seen of the cluster beside what the meta group knows. What is missing is taken to be well.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// Replicas that have stopped for good.
    pub dead: Dead,
    /// Nodes that have said nothing for longer than operators wish to wait.
    pub silent: BTreeSet<NodeId>,
    /// Nodes whose disks are nearly full.
    pub full: BTreeSet<NodeId>,
    /// How large the disks of nodes are; the record's own capacity goes before.
    pub disks: BTreeMap<NodeId, u64>,
    /// By group.
    pub groups: BTreeMap<u64, GroupSeen>,
    /// By group; those that are idle are not in it.
    pub loads: BTreeMap<u64, Load>,
}

impl Seen {
    /// Whether a node can take nothing now.
    fn is_shut(&self, node: u64) -> bool {
        NodeId::new(node).is_ok_and(|node| self.silent.contains(&node) || self.full.contains(&node))
    }

    fn capacity_of(&self, node: &v1::Node) -> u64 {
        match node.capacity_bytes {
            0 => NodeId::new(node.id).ok().and_then(|id| self.disks.get(&id)).copied().unwrap_or(0),
            declared => declared,
        }
    }
}

/// A name for a plan that tells it from others: whoever applies it says which he has read.
fn plan_id(plan: &v1::Plan) -> String {
    let bare = v1::Plan { id: String::new(), ..plan.clone() };
    blake3::hash(&bare.encode_to_vec()).to_hex()[..8].to_owned()
}
