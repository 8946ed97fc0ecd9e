//! Which group serves a key, and who leads it: what a node or client remembers of the map. Pure.

use std::{collections::BTreeMap, sync::Arc};

use pontoon_proto::{NodeId, ReplicaId, v1};

/// Where to send a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Route {
    /// The shard that serves the key.
    pub shard: Arc<v1::Shard>,
    /// Who leads its group, as far as is known.
    pub leader: Option<ReplicaId>,
}

/// A cache of the map. What is learned from anywhere is merged; an older record never replaces a newer one.
///
/// Invariants: a group's (epoch, revision) and the leader's term never go back; a group that is gone stays gone.
#[derive(Debug, Clone, Default)]
pub struct Routing {
    version: u64,
    cluster: Vec<u8>,
    shards: BTreeMap<u64, Arc<v1::Shard>>,
    /// Predicate to the groups that serve its ranges, by lower bound.
    predicates: BTreeMap<String, BTreeMap<Vec<u8>, u64>>,
    nodes: BTreeMap<NodeId, v1::Node>,
    leaders: BTreeMap<u64, (u64, ReplicaId)>,
}

/// What decides which of two records is the later one.
fn age(shard: &v1::Shard) -> (u64, u64) {
    (shard.epoch, shard.revision)
}

impl Routing {
    /// Knows nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes over a whole map; false if it is older than what is known, and then nothing changes.
    pub fn update(&mut self, map: &v1::ClusterMap) -> bool {
        if map.version < self.version {
            return false;
        }
        self.version = map.version;
        self.cluster = map.cluster.to_vec();
        self.nodes =
            map.nodes.iter().filter_map(|node| Some((NodeId::new(node.id).ok()?, node.clone()))).collect();
        let listed: BTreeMap<u64, &v1::Shard> = map.shards.iter().map(|shard| (shard.group, shard)).collect();
        // A record that came from elsewhere may be later than this map; one that is not was dropped.
        let gone: Vec<u64> = self
            .shards
            .values()
            .filter(|shard| !listed.contains_key(&shard.group) && shard.revision <= map.version)
            .map(|shard| shard.group)
            .collect();
        for group in gone {
            self.forget(group);
        }
        for shard in &map.shards {
            self.merge(shard.clone());
        }
        true
    }

    /// Takes over one record; false if it is not later than what is known.
    pub fn learn(&mut self, shard: v1::Shard) -> bool {
        // The map would list it, had it not been dropped since.
        let gone = !self.shards.contains_key(&shard.group) && shard.revision <= self.version;
        !gone && self.merge(shard)
    }

    fn merge(&mut self, shard: v1::Shard) -> bool {
        if self.shards.get(&shard.group).is_some_and(|known| age(known) >= age(&shard)) {
            return false;
        }
        let known = self.shards.get(&shard.group);
        if known.is_some_and(|known| known.low != shard.low || known.predicate != shard.predicate) {
            self.forget(shard.group);
        }
        let ranges = self.predicates.entry(shard.predicate.clone()).or_default();
        let holder = ranges.get(&shard.low[..]).and_then(|group| self.shards.get(group));
        // Of two groups that claim the same range, as after drop and create, the later one serves it: ids only rise.
        if holder.is_none_or(|holder| holder.group <= shard.group) {
            ranges.insert(shard.low.to_vec(), shard.group);
        }
        self.shards.insert(shard.group, Arc::new(shard));
        true
    }

    fn forget(&mut self, group: u64) {
        self.leaders.remove(&group);
        let Some(shard) = self.shards.remove(&group) else { return };
        if let Some(ranges) = self.predicates.get_mut(&shard.predicate) {
            if ranges.get(&shard.low[..]) == Some(&group) {
                ranges.remove(&shard.low[..]);
            }
            if ranges.is_empty() {
                self.predicates.remove(&shard.predicate);
            }
        }
    }

    /// Remembers who leads a group; words of an older term are ignored.
    pub fn leader(&mut self, group: u64, term: u64, leader: ReplicaId) {
        let known = self.leaders.entry(group).or_insert((term, leader));
        if term >= known.0 {
            *known = (term, leader);
        }
    }

    /// This replica did not lead after all. Somebody else's name stays.
    pub fn forget_leader(&mut self, group: u64, leader: ReplicaId) {
        if self.leaders.get(&group).is_some_and(|(_, known)| *known == leader) {
            self.leaders.remove(&group);
        }
    }

    /// Where a key of a predicate is served; `None` if no shard is known for it.
    pub fn route(&self, predicate: &str, key: &[u8]) -> Option<Route> {
        let (_, group) = self.predicates.get(predicate)?.range(..=key.to_vec()).next_back()?;
        let shard = self.shards.get(group)?;
        (shard.high.is_empty() || key < &shard.high[..]).then(|| self.route_of(shard))
    }

    /// Where a group is served.
    pub fn group(&self, group: u64) -> Option<Route> {
        self.shards.get(&group).map(|shard| self.route_of(shard))
    }

    fn route_of(&self, shard: &Arc<v1::Shard>) -> Route {
        let leader = self.leaders.get(&shard.group).map(|(_, leader)| *leader);
        Route { shard: shard.clone(), leader }
    }

    /// The shards known, by group.
    pub fn shards(&self) -> impl Iterator<Item = &Arc<v1::Shard>> {
        self.shards.values()
    }

    /// The nodes known, by id; removed ones included.
    pub fn nodes(&self) -> impl Iterator<Item = &v1::Node> {
        self.nodes.values()
    }

    /// Where a node listens.
    pub fn address(&self, node: NodeId) -> Option<&str> {
        self.nodes.get(&node).map(|node| node.address.as_str())
    }

    /// The version of the last map; 0 if there was none.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The cluster's id as the last map gave it.
    pub fn cluster(&self) -> &[u8] {
        &self.cluster
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard(group: u64, epoch: u64, revision: u64) -> v1::Shard {
        v1::Shard { predicate: "name".into(), group, epoch, revision, ..Default::default() }
    }

    fn map(version: u64, shards: Vec<v1::Shard>) -> v1::ClusterMap {
        v1::ClusterMap { version, shards, ..Default::default() }
    }

    #[test]
    fn nothing_goes_back_to_an_older_epoch() {
        let mut routing = Routing::new();
        assert!(routing.update(&map(10, vec![shard(2, 3, 9)])));
        assert!(!routing.learn(shard(2, 2, 100)), "an older epoch");
        assert!(!routing.learn(shard(2, 3, 8)), "an older revision");
        assert!(!routing.update(&map(9, vec![])), "an older map");
        assert!(routing.learn(shard(2, 4, 11)));
        assert!(routing.update(&map(10, vec![shard(2, 3, 9)])), "the same map again");
        assert_eq!(routing.route("name", b"x").unwrap().shard.epoch, 4);
    }

    #[test]
    fn a_dropped_predicate_is_gone_and_its_successor_serves() {
        let mut routing = Routing::new();
        routing.update(&map(10, vec![shard(2, 1, 9)]));
        routing.learn(shard(7, 1, 12));
        routing.update(&map(13, vec![shard(7, 1, 12)]));
        assert_eq!(routing.route("name", b"").unwrap().shard.group, 7);
        assert!(routing.group(2).is_none());
        assert!(!routing.learn(shard(2, 1, 9)), "it was dropped");
        routing.update(&map(14, vec![]));
        assert!(routing.route("name", b"").is_none());
    }

    #[test]
    fn who_takes_a_name_serves_it_in_whatever_order_that_is_heard() {
        let named = |name: &str, shard: v1::Shard| v1::Shard { predicate: name.into(), ..shard };
        let dropping = v1::Shard { state: v1::ShardState::Dropping.into(), ..shard(2, 2, 12) };
        let (old, new) = (named("beside", dropping), shard(7, 1, 12));
        for order in [[&old, &new], [&new, &old]] {
            let mut routing = Routing::new();
            routing.update(&map(10, vec![shard(2, 1, 9), named("beside", shard(7, 1, 10))]));
            for record in order {
                assert!(routing.learn(record.clone()));
            }
            assert_eq!(routing.route("name", b"").unwrap().shard.group, 7);
            assert!(!routing.learn(shard(2, 1, 9)), "what was before");
            routing.update(&map(13, vec![new.clone()]));
            assert_eq!(routing.route("name", b"").unwrap().shard.group, 7);
            assert!(routing.route("beside", b"").is_none());
        }
    }

    #[test]
    fn keys_find_the_shard_of_their_range() {
        let mut routing = Routing::new();
        let low = v1::Shard { high: "m".into(), ..shard(2, 1, 1) };
        let high = v1::Shard { low: "m".into(), high: "x".into(), ..shard(3, 1, 1) };
        routing.update(&map(1, vec![low, high]));
        assert_eq!(routing.route("name", b"a").unwrap().shard.group, 2);
        assert_eq!(routing.route("name", b"m").unwrap().shard.group, 3);
        assert!(routing.route("name", b"x").is_none());
        assert!(routing.route("other", b"a").is_none());
    }

    #[test]
    fn leaders_follow_their_term() {
        let mut routing = Routing::new();
        routing.learn(shard(2, 1, 1));
        let replica = |node| ReplicaId::on(NodeId::new(node).unwrap(), 1);
        routing.leader(2, 5, replica(1));
        routing.leader(2, 4, replica(2));
        assert_eq!(routing.group(2).unwrap().leader, Some(replica(1)));
        routing.forget_leader(2, replica(2));
        assert_eq!(routing.group(2).unwrap().leader, Some(replica(1)));
        routing.forget_leader(2, replica(1));
        assert_eq!(routing.group(2).unwrap().leader, None);
    }
}
