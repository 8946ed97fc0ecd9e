//! Rules as the planner reads them: which nodes may hold a predicate's replicas, and which should.

use std::{collections::BTreeMap, fmt, str::FromStr, sync::Arc};

use pontoon_proto::{NodeId, v1};
use pontoon_raftstore::SnapshotBudget;

use crate::meta::META_PREDICATE;

/// The format of [`v1::Rules`].
pub const RULES_FORMAT: u32 = 1;
/// How many voters a rule may ask for.
const MAX_VOTERS: u32 = 9;
/// How many learners a rule may ask for.
const MAX_LEARNERS: u32 = 16;

/// Some of the nodes: those with a label, or one by its id, or all but these.
///
/// Written `zone=a`, `zone=a|b`, `node=3`, `!disk=hdd`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selector {
    negated: bool,
    name: String,
    values: Vec<String>,
}

impl Selector {
    /// Whether a node is one of them. A node without the label is none of those that have it.
    pub fn takes(&self, node: &v1::Node) -> bool {
        let holds = match self.name.as_str() {
            "node" => {
                self.values.iter().any(|value| value.parse().is_ok_and(|id: NodeId| id.get() == node.id))
            }
            name => node.labels.get(name).is_some_and(|value| self.values.contains(value)),
        };
        holds != self.negated
    }
}

impl FromStr for Selector {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (negated, rest) = match text.strip_prefix('!') {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let wrong = || {
            format!(
                "{text:?} selects no nodes: write NAME=VALUE, as in zone=a, zone=a|b, !disk=hdd or node=3"
            )
        };
        let (name, values) = rest.split_once('=').ok_or_else(wrong)?;
        let values: Vec<String> = values.split('|').map(str::to_owned).collect();
        if name.is_empty() || values.iter().any(String::is_empty) {
            return Err(wrong());
        }
        if name == "node" {
            for value in &values {
                value.parse::<NodeId>().map_err(|error| format!("{text:?}: {error}"))?;
            }
        }
        Ok(Selector { negated, name: name.to_owned(), values })
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}={}", if self.negated { "!" } else { "" }, self.name, self.values.join("|"))
    }
}

/// What is wanted of one predicate's places. Empty lists and `None` ask for nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rule {
    /// How many voters; `None`: as many as the predicate was created with.
    pub voters: Option<u32>,
    /// How many permanent learners; `None`: those that somebody added stay.
    pub learners: Option<u32>,
    /// All must hold.
    pub require: Vec<Selector>,
    /// Better than other nodes.
    pub prefer: Vec<Selector>,
    /// Worse than other nodes.
    pub avoid: Vec<Selector>,
    /// Label names, the widest first.
    pub spread: Vec<String>,
    /// Whose replicas should lead.
    pub leader_prefer: Vec<Selector>,
    /// The only nodes, if there are any.
    pub pin: Vec<NodeId>,
    /// Nothing moves but what is lost.
    pub freeze: bool,
}

impl Rule {
    /// The hard conditions that a node does not meet, each as it was written.
    pub fn breaks(&self, node: &v1::Node) -> Vec<String> {
        let unmet = self.require.iter().filter(|selector| !selector.takes(node));
        let mut broken: Vec<String> = unmet.map(|selector| format!("require {selector}")).collect();
        if !self.pin.is_empty() && !self.pin.iter().any(|pinned| pinned.get() == node.id) {
            let names: Vec<String> = self.pin.iter().map(ToString::to_string).collect();
            broken.push(format!("pin {}", names.join(", ")));
        }
        broken
    }

    /// Whether a node meets the hard conditions.
    pub fn allows(&self, node: &v1::Node) -> bool {
        self.require.iter().all(|selector| selector.takes(node))
            && (self.pin.is_empty() || self.pin.iter().any(|pinned| pinned.get() == node.id))
    }

    /// How much worse than others a node is; the smaller the better.
    pub fn dislike(&self, node: &v1::Node) -> i32 {
        let count =
            |selectors: &[Selector]| selectors.iter().filter(|selector| selector.takes(node)).count() as i32;
        // A node to avoid is worse than any that is merely not preferred.
        count(&self.avoid) * 100 - count(&self.prefer)
    }

    /// Whether a node's replica should lead rather than those of nodes of which this is not true.
    pub fn likes_leader(&self, node: &v1::Node) -> bool {
        self.leader_prefer.iter().any(|selector| selector.takes(node))
    }

    /// How badly nodes lie together: per label of `spread`, how many of them lie where an earlier one lies, taking the
    /// wider labels in (a rack is one of its zone). Compared from the widest label to the narrowest. A node without the
    /// label lies by itself.
    pub fn crowding<'a>(&self, nodes: impl Iterator<Item = &'a v1::Node> + Clone) -> Vec<usize> {
        let crowded = |depth: usize| {
            let mut seen: Vec<Vec<&String>> = Vec::new();
            let mut crowded = 0;
            for node in nodes.clone() {
                let place: Option<Vec<&String>> =
                    self.spread[..=depth].iter().map(|label| node.labels.get(label)).collect();
                match place {
                    Some(place) if seen.contains(&place) => crowded += 1,
                    Some(place) => seen.push(place),
                    None => {}
                }
            }
            crowded
        };
        (0..self.spread.len()).map(crowded).collect()
    }

    fn read(layers: &[&v1::PlacementRule]) -> Result<Rule, String> {
        fn first<'a, T>(
            layers: &[&'a v1::PlacementRule],
            field: fn(&'a v1::PlacementRule) -> Option<T>,
        ) -> Option<T> {
            layers.iter().find_map(|layer| field(layer))
        }
        let selectors = |words: Option<&v1::Words>| -> Result<Vec<Selector>, String> {
            words.map(|words| &words.words[..]).unwrap_or_default().iter().map(|word| word.parse()).collect()
        };
        let voters = first(layers, |layer| layer.voters);
        if voters.is_some_and(|voters| voters == 0 || voters > MAX_VOTERS || voters.is_multiple_of(2)) {
            return Err(format!("voters is an odd number from 1 to {MAX_VOTERS}"));
        }
        let learners = first(layers, |layer| layer.learners);
        if learners.is_some_and(|learners| learners > MAX_LEARNERS) {
            return Err(format!("learners is at most {MAX_LEARNERS}"));
        }
        let pin = first(layers, |layer| layer.pin.as_ref()).map(|pins| &pins.nodes[..]).unwrap_or_default();
        let pin = pin.iter().map(|id| NodeId::new(*id).map_err(|error| format!("pin: {error}")));
        let spread =
            first(layers, |layer| layer.spread.as_ref()).map(|words| words.words.clone()).unwrap_or_default();
        if let Some(wrong) = spread.iter().find(|name| name.is_empty() || name.contains(['=', '!', '|'])) {
            return Err(format!("spread names labels, as in zone, not {wrong:?}"));
        }
        Ok(Rule {
            voters,
            learners,
            require: selectors(first(layers, |layer| layer.require.as_ref()))?,
            prefer: selectors(first(layers, |layer| layer.prefer.as_ref()))?,
            avoid: selectors(first(layers, |layer| layer.avoid.as_ref()))?,
            spread,
            leader_prefer: selectors(first(layers, |layer| layer.leader_prefer.as_ref()))?,
            pin: pin.collect::<Result<_, _>>()?,
            freeze: first(layers, |layer| layer.freeze).unwrap_or(false),
        })
    }
}

/// All rules, merged for each predicate that has one of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rulebook {
    default: Arc<Rule>,
    /// The meta group has the default's places, but its own number of voters.
    meta: Arc<Rule>,
    special: BTreeMap<String, Arc<Rule>>,
    /// See [`v1::ClusterRule`].
    pub repair_after_ms: Option<u64>,
    /// See [`v1::ClusterRule`].
    pub rebalance: bool,
    /// See [`v1::ClusterRule`].
    pub budget: Option<SnapshotBudget>,
}

impl Rulebook {
    /// Merges the layers.
    ///
    /// # Errors
    /// Naming what does not read: a selector, a number out of its range, an unknown tag or format.
    pub fn read(rules: &v1::Rules) -> Result<Rulebook, String> {
        if rules.format > RULES_FORMAT {
            return Err(format!(
                "the rules have the format {}, this version knows formats up to {RULES_FORMAT}: upgrade this node",
                rules.format
            ));
        }
        let nothing = v1::PlacementRule::default();
        let default = rules.defaults.as_ref().unwrap_or(&nothing);
        for (tag, rule) in &rules.tags {
            Rule::read(&[rule]).map_err(|error| format!("tag {tag}: {error}"))?;
        }
        let mut special = BTreeMap::new();
        for (predicate, own) in &rules.predicates {
            let wrong = |error: String| format!("predicate {predicate}: {error}");
            let mut layers: Vec<&v1::PlacementRule> = own.rule.iter().collect();
            for tag in &own.tags {
                let rule = rules
                    .tags
                    .get(tag)
                    .ok_or_else(|| wrong(format!("there is no tag {tag}: add [tag.{tag}]")))?;
                layers.push(rule);
            }
            layers.push(default);
            special.insert(predicate.clone(), Arc::new(Rule::read(&layers).map_err(wrong)?));
        }
        let default = Rule::read(&[default]).map_err(|error| format!("default: {error}"))?;
        let meta = Rule { voters: None, learners: None, ..default.clone() };
        let cluster = rules.cluster.clone().unwrap_or_default();
        let budget = cluster.budget.as_deref().map(str::parse::<SnapshotBudget>).transpose();
        let budget = budget.map_err(|error| format!("cluster: budget: {error}"))?;
        Ok(Rulebook {
            default: Arc::new(default),
            meta: Arc::new(meta),
            special,
            repair_after_ms: cluster.repair_after_ms,
            rebalance: cluster.rebalance.unwrap_or(false),
            budget,
        })
    }

    /// The rule for a predicate, which need not exist yet.
    pub fn of(&self, predicate: &str) -> &Arc<Rule> {
        let usual = if predicate == META_PREDICATE { &self.meta } else { &self.default };
        self.special.get(predicate).unwrap_or(usual)
    }

    /// The predicates with a rule of their own.
    pub fn named(&self) -> impl Iterator<Item = (&String, &Arc<Rule>)> {
        self.special.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: u64, labels: &[(&str, &str)]) -> v1::Node {
        let labels = labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        v1::Node { id, labels, ..Default::default() }
    }

    fn words(words: &[&str]) -> Option<v1::Words> {
        Some(v1::Words { words: words.iter().map(|word| (*word).to_owned()).collect() })
    }

    #[test]
    fn selectors_take_labels_nodes_and_all_others() {
        let a = node(3, &[("zone", "a")]);
        let takes = |text: &str| text.parse::<Selector>().unwrap().takes(&a);
        assert!(
            takes("zone=a") && takes("zone=b|a") && takes("node=3") && takes("node=n3") && takes("!zone=b")
        );
        assert!(!takes("zone=b") && !takes("!zone=a") && !takes("rack=1") && takes("!rack=1"));
        for wrong in ["zone", "=a", "zone=", "zone=a|", "node=0", "node=x", "!"] {
            assert!(wrong.parse::<Selector>().is_err(), "{wrong}");
        }
        assert_eq!("!zone=a|b".parse::<Selector>().unwrap().to_string(), "!zone=a|b");
    }

    #[test]
    fn the_more_special_rule_wins_field_by_field() {
        let rules = v1::Rules {
            format: RULES_FORMAT,
            defaults: Some(v1::PlacementRule {
                voters: Some(5),
                spread: words(&["zone"]),
                ..Default::default()
            }),
            tags: [(
                "hot".to_owned(),
                v1::PlacementRule { require: words(&["disk=ssd"]), ..Default::default() },
            )]
            .into(),
            predicates: [(
                "name".to_owned(),
                v1::PredicateRule {
                    tags: vec!["hot".to_owned()],
                    rule: Some(v1::PlacementRule { voters: Some(1), ..Default::default() }),
                },
            )]
            .into(),
            ..Default::default()
        };
        let book = Rulebook::read(&rules).unwrap();
        let name = book.of("name");
        assert_eq!((name.voters, &name.spread[..]), (Some(1), &["zone".to_owned()][..]));
        assert_eq!(name.breaks(&node(1, &[])), ["require disk=ssd"]);
        assert_eq!(book.of("other").voters, Some(5));
        assert_eq!(book.of(META_PREDICATE).voters, None, "the meta group has a number of its own");
        assert_eq!(book.of(META_PREDICATE).spread, ["zone"]);
    }

    #[test]
    fn rules_that_do_not_read_are_refused_by_name() {
        let with = |rule: v1::PlacementRule| v1::Rules { defaults: Some(rule), ..Default::default() };
        let refused = |rules: &v1::Rules| Rulebook::read(rules).unwrap_err();
        assert!(refused(&with(v1::PlacementRule { voters: Some(2), ..Default::default() })).contains("odd"));
        let zone = v1::PlacementRule { require: words(&["zone"]), ..Default::default() };
        assert!(refused(&with(zone)).contains("zone=a"));
        let untagged = v1::PredicateRule { tags: vec!["cold".to_owned()], rule: None };
        let rules = v1::Rules { predicates: [("p".to_owned(), untagged)].into(), ..Default::default() };
        assert!(refused(&rules).contains("[tag.cold]"));
        assert!(refused(&v1::Rules { format: 9, ..Default::default() }).contains("upgrade"));
    }

    #[test]
    fn crowding_counts_from_the_widest_label() {
        let rule = Rule { spread: vec!["zone".into(), "rack".into()], ..Default::default() };
        let nodes = [
            node(1, &[("zone", "a"), ("rack", "1")]),
            node(2, &[("zone", "a"), ("rack", "2")]),
            node(3, &[("zone", "b"), ("rack", "1")]),
            node(4, &[]),
        ];
        assert_eq!(rule.crowding(nodes.iter()), [1, 0], "the racks are of different zones");
        assert_eq!(rule.crowding(nodes[1..].iter()), [0, 0]);
    }
}
