//! Why a replica is on a node or is not, and whether rules can be met.

use std::collections::BTreeSet;

use pontoon_proto::{NodeId, ReplicaId, v1};

use super::{Rule, Seen, repair::candidates};
use crate::meta::{META_PREDICATE, MetaState};

/// What a node is to a predicate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It holds a voter.
    Votes,
    /// It holds a learner.
    Learns,
    /// It holds a replica that should not be there.
    Misplaced,
    /// It could take a replica.
    Could,
    /// It cannot.
    Cannot,
}

/// One condition, whether a node meets it, and what would change that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Whether it is met.
    pub ok: bool,
    /// Whether a node that does not meet it is out of the question.
    pub hard: bool,
    /// The condition, in words.
    pub text: String,
    /// What to do about it; empty if it is met.
    pub fix: String,
}

/// What a node is to a predicate, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// The node.
    pub node: NodeId,
    /// What it is.
    pub standing: Standing,
    /// The conditions, hard ones first.
    pub verdicts: Vec<Verdict>,
}

/// Explains what each node that is not removed is to a predicate.
pub fn explain(state: &MetaState, seen: &Seen, shard: &v1::Shard) -> Vec<Explanation> {
    let rule = state.rulebook().of(&shard.predicate);
    let members = state.members().filter_map(|node| Some((NodeId::new(node.id).ok()?, &**node)));
    members.map(|(id, node)| explain_node(state, seen, shard, rule, id, node)).collect()
}

fn holds(replicas: &[u64], node: NodeId) -> bool {
    replicas.iter().any(|id| ReplicaId::new(*id).is_ok_and(|replica| replica.node() == node))
}

fn explain_node(
    state: &MetaState,
    seen: &Seen,
    shard: &v1::Shard,
    rule: &Rule,
    id: NodeId,
    node: &v1::Node,
) -> Explanation {
    let name = &shard.predicate;
    let mut verdicts = Vec::new();
    let mut say = |ok: bool, hard: bool, text: String, fix: String| {
        verdicts.push(Verdict { ok, hard, text, fix: if ok { String::new() } else { fix } });
    };
    let live = node.state() == v1::NodeState::Live;
    say(
        live,
        true,
        if live { "it is live" } else { "it drains" }.to_owned(),
        format!("`pontoon drain {id} --cancel`"),
    );
    let speaks = !seen.silent.contains(&id);
    let text = if speaks { "it answers" } else { "it does not answer" };
    say(speaks, true, text.to_owned(), format!("start it, or run `pontoon decommission {id}`"));
    let room = !seen.full.contains(&id);
    let text = if room { "its disk has room" } else { "its disk is nearly full" };
    say(room, true, text.to_owned(), "free space there, or move predicates away".to_owned());
    for selector in &rule.require {
        let ok = selector.takes(node);
        let fix = format!("start it with `--label`, or change the rule of {name}: `pontoon rules show`");
        say(ok, true, format!("require {selector}"), fix);
    }
    if !rule.pin.is_empty() {
        let pins: Vec<String> = rule.pin.iter().map(ToString::to_string).collect();
        let fix = format!("add {id} to the pin of {name}: `pontoon rules show`");
        say(rule.pin.contains(&id), true, format!("pin {}", pins.join(", ")), fix);
    }
    for selector in rule.avoid.iter().filter(|selector| selector.takes(node)) {
        say(false, false, format!("avoid {selector}"), "it is taken only if no other node can be".to_owned());
    }
    for selector in rule.prefer.iter() {
        say(
            selector.takes(node),
            false,
            format!("prefer {selector}"),
            "nodes with it are taken first".to_owned(),
        );
    }
    if !rule.spread.is_empty() {
        let others = shard.voters.iter().filter_map(|id| ReplicaId::new(*id).ok()).map(ReplicaId::node);
        let others = others.filter(|other| *other != id).filter_map(|other| state.nodes.get(&other.get()));
        let others: Vec<&v1::Node> = others.map(|node| &**node).collect();
        let alone = rule.crowding(others.iter().copied());
        let with = rule.crowding(others.iter().copied().chain([node]));
        let crowded = rule.spread.iter().zip(alone.iter().zip(&with)).find(|(_, (alone, with))| alone < with);
        match crowded {
            None => say(true, false, format!("spread over {}", rule.spread.join(", ")), String::new()),
            Some((label, _)) => {
                let value = node.labels.get(label).map_or("", String::as_str);
                let fix = format!("a node with another {label} is taken first");
                say(false, false, format!("another replica lies in {label}={value}"), fix);
            }
        }
    }
    if rule.freeze {
        say(true, false, "frozen: only what is lost is moved".to_owned(), String::new());
    }
    if let Some(mv) = state.running_move(shard.group) {
        let text = format!("move {} of {name} is under way: {:?}", mv.id, mv.phase());
        let fix = format!("`pontoon move watch {}`", mv.id);
        say(false, false, text, fix);
    }
    verdicts.sort_by_key(|verdict| (verdict.ok, !verdict.hard));
    let fits = verdicts.iter().all(|verdict| verdict.ok || !verdict.hard);
    let allowed = rule.allows(node) && live;
    let standing = match (holds(&shard.voters, id), holds(&shard.learners, id)) {
        (false, false) if fits => Standing::Could,
        (false, false) => Standing::Cannot,
        _ if !allowed => Standing::Misplaced,
        (true, _) => Standing::Votes,
        (_, true) => Standing::Learns,
    };
    Explanation { node: id, standing, verdicts }
}

/// Something about rules that an operator should know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Whether the rules cannot be met; else they can, but not as well as they ask for.
    pub wrong: bool,
    /// The predicate, or `default`.
    pub predicate: String,
    /// In words, with the next step.
    pub text: String,
}

/// Whether the rules of `state` can be met by its nodes: for each predicate that exists or that a rule names, and for one that may be
/// made. Empty if all is well.
pub fn check_rules(state: &MetaState, seen: &Seen) -> Vec<Finding> {
    let book = state.rulebook();
    let mut findings = Vec::new();
    let shards = state.shards.values().filter(|shard| shard.predicate != META_PREDICATE);
    let mut names: BTreeSet<&str> = shards.map(|shard| &*shard.predicate).collect();
    names.extend(book.named().map(|(name, _)| &**name));
    // Most predicates have the same rule, and the same fault.
    let common = check_one(state, seen, "default", book.of("default"), 3);
    for name in names {
        let rule = book.of(name);
        let wanted = state.shard(name).map_or(3, |shard| shard.replicas_wanted);
        if std::ptr::eq(&**rule, &**book.of("default")) && wanted == 3 {
            continue;
        }
        findings.extend(check_one(state, seen, name, rule, wanted));
    }
    findings.extend(common);
    findings.sort_by_key(|finding| !finding.wrong);
    findings
}

fn check_one(state: &MetaState, seen: &Seen, name: &str, rule: &Rule, wanted: u32) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut say = |wrong: bool, text: String| {
        findings.push(Finding { wrong, predicate: name.to_owned(), text });
    };
    for pinned in &rule.pin {
        let there = state.members().any(|node| node.id == pinned.get());
        if !there {
            say(
                true,
                format!("it is pinned to {pinned}, which is no node of the cluster: take it out of the pin"),
            );
        }
    }
    let voters = rule.voters.unwrap_or(wanted) as usize;
    let replicas = voters + rule.learners.unwrap_or(0) as usize;
    let nodes = candidates(state, seen, rule, &BTreeSet::new(), &Default::default());
    if nodes.len() < replicas {
        let live = state.live_nodes().count();
        // A young cluster that has fewer nodes than replicas is under-replicated, and no rule is wrong.
        let by_rule = nodes.len() < live.min(replicas);
        say(
            by_rule,
            format!(
                "it should have {replicas} replicas, and {} of {live} live nodes may hold one: label or add nodes, or ask for less",
                nodes.len()
            ),
        );
    }
    for label in &rule.spread {
        let values: BTreeSet<_> = nodes.iter().filter_map(|(_, node)| node.labels.get(label)).collect();
        let without = nodes.iter().filter(|(_, node)| !node.labels.contains_key(label)).count();
        if values.len() + without < voters.min(nodes.len()) {
            let text = format!(
                "its {voters} voters cannot lie in as many values of {label}: the nodes that may hold one have {}",
                values.len()
            );
            say(false, text);
        } else if without > 0 {
            say(
                false,
                format!(
                    "{without} of the nodes that may hold it have no label {label}: start them with `--label {label}=…`"
                ),
            );
        }
    }
    findings
}
