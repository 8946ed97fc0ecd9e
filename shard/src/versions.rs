//! Cluster versions: what nodes of different releases may write for each other.
//!
//! The meta group holds one number. A binary speaks a range of them, and behaves at each as every other binary does that speaks it:
//! at version 1 a newer one writes the very bytes that the oldest one writes, so that nodes are upgraded one by one, and back. Once
//! every node speaks the next version an operator finalises it, and only then [`Feature`]s of it are on.
//!
//! Three rules keep replicas equal, whoever applies:
//! - What a command does depends on the state's own version alone, by [`Feature::is_on`].
//! - Nobody proposes what the version does not have yet ([`fit`]), and a binary that meets a word it does not know stops its replica
//!   (`known` in this crate) instead of going on without it.
//! - The command that raises the version is itself unknown to whoever does not speak it.
//!
//! A new version is a new number in [`Versions::OURS`], a row in the table of [`Feature`]s, `is_on` where the state machine differs,
//! and a line in [`fit`] for what commands may carry. `docs/testing.md` says how the fixtures of a release are made.

use std::fmt;

use pontoon_proto::v1::{self, meta_command::Body};
use prost::Message;

/// The cluster versions that a binary speaks, from and to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Versions {
    /// The lowest.
    pub oldest: u32,
    /// The highest: what a cluster that it founds begins with.
    pub newest: u32,
}

impl Versions {
    /// What this binary speaks: its own version and the one before.
    pub const OURS: Versions = Versions { oldest: 1, newest: 2 };

    /// As a node says it. One that says nothing is older than that this is asked, and speaks 1.
    pub fn said(oldest: u32, newest: u32) -> Versions {
        Versions { oldest: oldest.max(1), newest: newest.max(1) }
    }

    /// The same up to a lower version: a binary that plays an older one. `None` if nothing is left.
    pub fn up_to(self, newest: u32) -> Option<Versions> {
        (self.oldest..=self.newest).contains(&newest).then_some(Versions { newest, ..self })
    }

    /// Whether a cluster of this version can have such a node.
    pub fn speaks(self, version: u32) -> bool {
        (self.oldest..=self.newest).contains(&version)
    }

    /// Why a cluster of this version cannot have such a node, with the next step; `None` if it can.
    pub fn misses(self, version: u32) -> Option<String> {
        (!self.speaks(version)).then(|| {
            format!(
                "the cluster is at version {version}, and this binary speaks {self}: run a release that speaks {version}"
            )
        })
    }
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.oldest == self.newest {
            true => write!(f, "{}", self.newest),
            false => write!(f, "{} to {}", self.oldest, self.newest),
        }
    }
}

/// What a cluster version turns on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Feature {
    /// The meta group keeps what each node speaks.
    NodeVersions,
    /// The meta state says that it has versions.
    VersionedHeader,
    /// A predicate takes the place of another in one step.
    ReplacedShards,
    /// A drain says what of the node was seen.
    SeenNodes,
}

impl Feature {
    /// All of them, in the order of their versions.
    pub const ALL: [Feature; 4] =
        [Feature::NodeVersions, Feature::VersionedHeader, Feature::ReplacedShards, Feature::SeenNodes];

    /// The cluster version that turns it on, for ever.
    pub fn since(self) -> u32 {
        match self {
            Feature::NodeVersions
            | Feature::VersionedHeader
            | Feature::ReplacedShards
            | Feature::SeenNodes => 2,
        }
    }

    /// Its name for people and programs.
    pub fn name(self) -> &'static str {
        match self {
            Feature::NodeVersions => "node-versions",
            Feature::VersionedHeader => "versioned-header",
            Feature::ReplacedShards => "replaced-shards",
            Feature::SeenNodes => "seen-nodes",
        }
    }

    /// What is different with it.
    pub fn changes(self) -> &'static str {
        match self {
            Feature::NodeVersions => {
                "the meta group keeps which versions each node speaks, and takes in no node that does not speak the cluster's"
            }
            Feature::VersionedHeader => {
                "the meta state and each data directory say which version they need, so that an older binary refuses them by name"
            }
            Feature::ReplacedShards => {
                "`pontoon restore --replace` puts what it restored in the place of what was there, in one step"
            }
            Feature::SeenNodes => {
                "a drain from the console is refused by the meta group itself if the node holds something else than was shown"
            }
        }
    }

    /// Whether a cluster of this version has it.
    pub fn is_on(self, version: u32) -> bool {
        version >= self.since()
    }
}

/// Takes out of a command what a cluster of this version does not have yet: a binary that does not know it would stop.
pub fn fit(body: &mut Body, version: u32) {
    let lacks = |feature: Feature| !feature.is_on(version);
    match body {
        Body::RegisterNode(ask) if lacks(Feature::NodeVersions) => {
            (ask.oldest_version, ask.newest_version) = (0, 0);
        }
        Body::SetNodeAddress(ask) if lacks(Feature::NodeVersions) => {
            (ask.oldest_version, ask.newest_version) = (0, 0);
        }
        Body::SetNodeState(ask) if lacks(Feature::SeenNodes) => ask.seen = None,
        _ => {}
    }
}

/// Whether every field of a command is known here. Commands are encoded by this code alone, so a message that is shorter when it is
/// encoded again has lost something.
pub(crate) fn known(command: &impl Message, payload: &[u8]) -> bool {
    command.encoded_len() == payload.len()
}

/// The range in a node's record.
pub fn of_node(node: &v1::Node) -> Versions {
    Versions::said(node.oldest_version, node.newest_version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_say_what_they_miss() {
        let ours = Versions { oldest: 2, newest: 3 };
        assert!(ours.speaks(2) && ours.speaks(3) && !ours.speaks(1) && !ours.speaks(4));
        assert_eq!(ours.misses(3), None);
        assert!(ours.misses(4).unwrap().contains("speaks 2 to 3"));
        assert_eq!(ours.up_to(2).unwrap().to_string(), "2");
        assert_eq!(ours.up_to(1), None);
        assert_eq!(Versions::said(0, 0), Versions { oldest: 1, newest: 1 });
    }

    #[test]
    fn every_feature_belongs_to_a_version_that_is_spoken_and_the_newest_has_one() {
        let since: Vec<u32> = Feature::ALL.iter().map(|feature| feature.since()).collect();
        assert!(since.is_sorted() && since.iter().all(|&version| Versions::OURS.speaks(version)));
        assert_eq!(since.last(), Some(&Versions::OURS.newest));
        assert_eq!(Versions::OURS.newest - Versions::OURS.oldest, 1, "its own version and the one before");
    }

    #[test]
    fn a_field_of_a_later_version_is_noticed() {
        let ask = v1::RegisterNode { address: "a".to_owned(), ..Default::default() };
        let known_bytes = ask.encode_to_vec();
        assert!(known(&v1::RegisterNode::decode(known_bytes.as_slice()).unwrap(), &known_bytes));
        // Field 9999, a varint.
        let later = [known_bytes.as_slice(), &[0xf8, 0xf0, 0x04, 1]].concat();
        assert!(!known(&v1::RegisterNode::decode(later.as_slice()).unwrap(), &later));
    }

    #[test]
    fn commands_carry_nothing_that_an_older_node_does_not_know() {
        let ask = v1::RegisterNode { oldest_version: 1, newest_version: 2, ..Default::default() };
        let mut body = Body::RegisterNode(ask.clone());
        fit(&mut body, 2);
        assert_eq!(body, Body::RegisterNode(ask));
        fit(&mut body, 1);
        assert_eq!(body, Body::RegisterNode(v1::RegisterNode::default()));
        let seen = Some(v1::SeenNode::default());
        let mut body = Body::SetNodeState(v1::SetNodeState { seen, ..Default::default() });
        fit(&mut body, 1);
        assert_eq!(body, Body::SetNodeState(v1::SetNodeState::default()));
    }
}
