//! Placement rules as people write them: TOML.
//!
//! ```toml
//! [cluster]
//! repair_after = "10m"        # how long a node may be silent until its replicas are made anew; "never"
//! rebalance = false           # whether replicas move by themselves until the nodes are evenly used
//! budget = "normal"           # what received states may take of each node: slow, normal, fast, max or bytes per second
//!
//! [default]
//! voters = 3                  # an odd number
//! spread = ["zone", "rack"]   # voters lie under different values, the widest label first
//!
//! [tag.hot]
//! require = ["disk=ssd"]      # all must hold; zone=a|b for several values, !zone=a for all others, node=3 for a node
//! avoid = ["zone=c"]          # taken last; prefer: taken first
//!
//! [predicate.name]
//! tags = ["hot"]
//! learners = 1                # replicas without a vote, for reads
//! leader_prefer = ["zone=a"]
//! pin = [1, 2, 3]             # the only nodes
//! freeze = true               # nothing moves but what is lost
//! ```
//!
//! Of several rules that speak of a predicate its own comes first, then its tags' in their order, then the default; field by field.

use std::collections::BTreeMap;

use pontoon_proto::v1;
use serde::{Deserialize, Serialize};

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    #[serde(skip_serializing_if = "Cluster::is_empty")]
    cluster: Cluster,
    #[serde(skip_serializing_if = "Option::is_none")]
    default: Option<Rule>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    tag: BTreeMap<String, Rule>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    predicate: BTreeMap<String, Predicate>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Cluster {
    #[serde(skip_serializing_if = "Option::is_none")]
    repair_after: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rebalance: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    budget: Option<String>,
}

impl Cluster {
    fn is_empty(&self) -> bool {
        self.repair_after.is_none() && self.rebalance.is_none() && self.budget.is_none()
    }
}

/// The fields of a rule stand in both kinds of tables; serde cannot refuse unknown ones of a flattened table.
macro_rules! rule_table {
    ($(#[$doc:meta])* $name:ident { $($extra:ident: $kind:ty),* }) => {
        $(#[$doc])*
        #[derive(Debug, Default, Clone, Serialize, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        struct $name {
            $(#[serde(skip_serializing_if = "Vec::is_empty")] $extra: $kind,)*
            #[serde(skip_serializing_if = "Option::is_none")]
            voters: Option<u32>,
            #[serde(skip_serializing_if = "Option::is_none")]
            learners: Option<u32>,
            #[serde(skip_serializing_if = "Option::is_none")]
            require: Option<Vec<String>>,
            #[serde(skip_serializing_if = "Option::is_none")]
            prefer: Option<Vec<String>>,
            #[serde(skip_serializing_if = "Option::is_none")]
            avoid: Option<Vec<String>>,
            #[serde(skip_serializing_if = "Option::is_none")]
            spread: Option<Vec<String>>,
            #[serde(skip_serializing_if = "Option::is_none")]
            leader_prefer: Option<Vec<String>>,
            #[serde(skip_serializing_if = "Option::is_none")]
            pin: Option<Vec<u64>>,
            #[serde(skip_serializing_if = "Option::is_none")]
            freeze: Option<bool>,
        }

        impl $name {
            fn to_rule(&self) -> v1::PlacementRule {
                let words = |words: &Option<Vec<String>>| words.clone().map(|words| v1::Words { words });
                v1::PlacementRule {
                    voters: self.voters,
                    learners: self.learners,
                    require: words(&self.require),
                    prefer: words(&self.prefer),
                    avoid: words(&self.avoid),
                    spread: words(&self.spread),
                    leader_prefer: words(&self.leader_prefer),
                    pin: self.pin.clone().map(|nodes| v1::Pins { nodes }),
                    freeze: self.freeze,
                }
            }

            fn of_rule(rule: &v1::PlacementRule) -> Self {
                let words = |words: &Option<v1::Words>| words.as_ref().map(|words| words.words.clone());
                $name {
                    voters: rule.voters,
                    learners: rule.learners,
                    require: words(&rule.require),
                    prefer: words(&rule.prefer),
                    avoid: words(&rule.avoid),
                    spread: words(&rule.spread),
                    leader_prefer: words(&rule.leader_prefer),
                    pin: rule.pin.as_ref().map(|pins| pins.nodes.clone()),
                    freeze: rule.freeze,
                    $($extra: <$kind>::new(),)*
                }
            }
        }
    };
}

rule_table!(Rule {});
rule_table!(Predicate { tags: Vec<String> });

/// Reads rules. Whether the cluster can meet them is another question.
///
/// # Errors
/// In words, with line and column: what does not read, and for an unknown key those that are known.
pub fn from_toml(text: &str) -> Result<v1::Rules, String> {
    let file: File = toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())?;
    let repair_after_ms = file.cluster.repair_after.as_deref().map(read_time).transpose()?;
    let predicate = |(name, rule): (String, Predicate)| {
        let read = v1::PredicateRule { rule: Some(rule.to_rule()), tags: rule.tags };
        (name, read)
    };
    Ok(v1::Rules {
        defaults: file.default.map(|rule| rule.to_rule()),
        tags: file.tag.into_iter().map(|(name, rule)| (name, rule.to_rule())).collect(),
        predicates: file.predicate.into_iter().map(predicate).collect(),
        cluster: Some(v1::ClusterRule {
            repair_after_ms,
            rebalance: file.cluster.rebalance,
            budget: file.cluster.budget,
        }),
        ..Default::default()
    })
}

/// Writes rules so that [`from_toml`] reads the same ones.
pub fn to_toml(rules: &v1::Rules) -> String {
    let cluster = rules.cluster.clone().unwrap_or_default();
    let predicate = |(name, own): (&String, &v1::PredicateRule)| {
        let rule = own.rule.clone().unwrap_or_default();
        (name.clone(), Predicate { tags: own.tags.clone(), ..Predicate::of_rule(&rule) })
    };
    let file = File {
        cluster: Cluster {
            repair_after: cluster.repair_after_ms.map(write_time),
            rebalance: cluster.rebalance,
            budget: cluster.budget.clone(),
        },
        default: rules.defaults.as_ref().map(Rule::of_rule),
        tag: rules.tags.iter().map(|(name, rule)| (name.clone(), Rule::of_rule(rule))).collect(),
        predicate: rules.predicates.iter().map(predicate).collect(),
    };
    toml::to_string(&file).unwrap_or_default()
}

const UNITS: [(&str, u64); 4] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)];

fn read_time(text: &str) -> Result<u64, String> {
    if text == "never" {
        return Ok(0);
    }
    let digits = text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, ms)| *ms);
    let ms = number.parse::<u64>().ok().zip(unit).and_then(|(number, unit)| number.checked_mul(unit));
    ms.filter(|ms| *ms > 0).ok_or_else(|| {
        format!("repair_after = {text:?}: write \"10m\", a number and ms, s, m or h, or \"never\"")
    })
}

fn write_time(ms: u64) -> String {
    match UNITS.iter().rev().find(|(_, unit)| ms.is_multiple_of(*unit)) {
        _ if ms == 0 => "never".to_owned(),
        Some((name, unit)) => format!("{}{name}", ms / unit),
        None => format!("{ms}ms"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rules_of_the_page_above_read_and_come_back() {
        let page = include_str!("rules.rs").lines().map_while(|line| line.strip_prefix("//!"));
        let page: Vec<&str> = page.map(|line| line.strip_prefix(' ').unwrap_or(line)).collect();
        let begin = page.iter().position(|line| *line == "```toml").unwrap();
        let end = page.iter().rposition(|line| *line == "```").unwrap();
        let rules = from_toml(&page[begin + 1..end].join("\n")).unwrap();
        assert_eq!(rules.cluster.as_ref().unwrap().repair_after_ms, Some(600_000));
        assert_eq!(rules.predicates["name"].tags, ["hot"]);
        pontoon_shard::planner::Rulebook::read(&rules).unwrap();
        assert_eq!(from_toml(&to_toml(&rules)).unwrap(), rules);
    }

    #[test]
    fn what_does_not_read_is_named_with_its_line() {
        let refused = |text: &str| from_toml(text).unwrap_err();
        let unknown = refused("[default]\nvoter = 3\n");
        assert!(
            unknown.contains("voter") && unknown.contains("voters") && unknown.contains("line 2"),
            "{unknown}"
        );
        assert!(refused("[predicates.name]\n").contains("predicate"));
        assert!(refused("[cluster]\nrepair_after = \"soon\"\n").contains("10m"));
        assert!(refused("[default]\nvoters = \"3\"\n").contains("line 2"));
    }

    #[test]
    fn times_come_back() {
        for text in ["never", "1500ms", "90s", "10m", "2h"] {
            assert_eq!(write_time(read_time(text).unwrap()), text);
        }
    }
}
