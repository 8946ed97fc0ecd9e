//! What each command does to the state. The same on every replica: nothing is read but state and command.

use std::{collections::BTreeSet, sync::Arc};

use pontoon_proto::{ClusterId, GroupId, NodeId, ReplicaId, v1};
use v1::{MetaRefusal, meta_command::Body as Ask, meta_reply::Body as Answer};

use super::{MAX_EVENTS, MAX_PREDICATE_BYTES, META_PREDICATE, MetaState};
use crate::versions::Versions;

/// How far above the next id a node may ask for one: more is a slip of the hand. Few beside those that a recovery passes over,
/// for what lost entries gave out must lie below.
const IDS_AHEAD_MOST: u64 = 64;

/// Which records a command changed or removed.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Touched {
    pub(super) nodes: BTreeSet<u64>,
    pub(super) shards: BTreeSet<u64>,
    pub(super) moves: BTreeSet<u64>,
    pub(super) events: BTreeSet<u64>,
    pub(super) debts: BTreeSet<(u64, u64)>,
    pub(super) rules: bool,
    pub(super) plan: bool,
}

/// A refusal, boxed since it carries whole records.
pub(super) type Outcome = Result<Answer, Box<v1::MetaRefused>>;

pub(super) fn refuse(reason: MetaRefusal, text: impl Into<String>) -> Box<v1::MetaRefused> {
    Box::new(v1::MetaRefused { reason: reason.into(), text: text.into(), ..Default::default() })
}

/// One command on its way through the state.
pub(super) struct Step<'a> {
    pub(super) state: &'a mut MetaState,
    pub(super) touched: &'a mut Touched,
    pub(super) index: u64,
    pub(super) now_ms: u64,
}

impl MetaState {
    /// Applies one command. A refused one leaves everything but the version as it was.
    pub(super) fn apply(
        &mut self,
        index: u64,
        now_ms: u64,
        ask: Ask,
        touched: &mut Touched,
    ) -> v1::MetaReply {
        let before = self.cluster.is_some();
        let outcome = match ask {
            Ask::Bootstrap(_) if before => {
                Err(refuse(MetaRefusal::Bootstrapped, "the cluster exists already: join it"))
            }
            Ask::Bootstrap(_) | Ask::NoteEvent(_) => self.run(index, now_ms, ask, touched),
            _ if !before => {
                Err(refuse(MetaRefusal::NotBootstrapped, "the cluster has no first node yet: retry"))
            }
            _ => self.run(index, now_ms, ask, touched),
        };
        self.version = index;
        let body = outcome.unwrap_or_else(|refused| Answer::Refused(*refused));
        v1::MetaReply { version: index, body: Some(body) }
    }

    fn run(&mut self, index: u64, now_ms: u64, ask: Ask, touched: &mut Touched) -> Outcome {
        let mut step = Step { state: self, touched, index, now_ms };
        match ask {
            Ask::Bootstrap(ask) => step.bootstrap(ask),
            Ask::RegisterNode(ask) => step.register_node(ask),
            Ask::SetNodeAddress(ask) => step.set_node_address(ask),
            Ask::SetNodeState(ask) => step.set_node_state(ask),
            Ask::CreateShard(ask) => step.create_shard(ask),
            Ask::ShardLive(ask) => step.shard_live(ask.group),
            Ask::DropShard(ask) => step.drop_shard(&ask.predicate),
            Ask::ShardDropped(ask) => step.shard_dropped(ask.group),
            Ask::ReplaceShard(ask) => step.replace_shard(&ask),
            Ask::UpdateMembers(ask) => step.update_members(ask),
            Ask::StartMove(ask) => step.start_move(ask),
            Ask::AdvanceMove(ask) => step.advance_move(ask),
            Ask::CancelMove(ask) => step.cancel_move(ask),
            Ask::PruneMoves(ask) => step.prune_moves(ask.keep as usize),
            Ask::NoteEvent(ask) => {
                step.note(ask.text);
                Ok(Answer::Done(true))
            }
            Ask::SetRules(ask) => step.set_rules(ask),
            Ask::StartPlan(ask) => step.start_plan(ask),
            Ask::EndPlan(ask) => step.end_plan(&ask.id),
            Ask::RecoverCluster(ask) => step.recover_cluster(ask),
            Ask::SettleDebt(ask) => step.settle_debt(ask.group, ask.replica),
            Ask::FinaliseVersion(ask) => step.finalise_version(ask),
        }
    }
}

impl Step<'_> {
    pub(super) fn note(&mut self, text: impl Into<String>) {
        let seq = self.state.next_event;
        self.state.next_event += 1;
        let event = v1::Event { seq, time_ms: self.now_ms, text: text.into() };
        self.state.events.insert(seq, Arc::new(event));
        self.touched.events.insert(seq);
        while self.state.events.len() > MAX_EVENTS {
            if let Some((seq, _)) = self.state.events.pop_first() {
                self.touched.events.insert(seq);
            }
        }
    }

    pub(super) fn put_shard(&mut self, mut shard: v1::Shard) -> v1::Shard {
        shard.revision = self.index;
        self.touched.shards.insert(shard.group);
        self.state.insert_shard(shard.clone());
        shard
    }

    pub(super) fn put_node(&mut self, node: v1::Node) -> v1::Node {
        self.touched.nodes.insert(node.id);
        self.state.nodes.insert(node.id, Arc::new(node.clone()));
        node
    }

    pub(super) fn node(&self, id: u64) -> Result<v1::Node, Box<v1::MetaRefused>> {
        let found = self.state.nodes.get(&id).map(|node| v1::Node::clone(node));
        found.ok_or_else(|| {
            refuse(MetaRefusal::NoSuchNode, format!("there is no node n{id}: `pontoon nodes` lists them"))
        })
    }

    /// A node that may be given replicas.
    pub(super) fn live_node(&self, id: u64) -> Result<NodeId, Box<v1::MetaRefused>> {
        let node = self.node(id)?;
        if node.state() != v1::NodeState::Live {
            let text = format!("n{id} is draining or removed: choose another node");
            return Err(refuse(MetaRefusal::Invalid, text));
        }
        NodeId::new(id).map_err(|error| refuse(MetaRefusal::Invalid, error.to_string()))
    }

    pub(super) fn shard_of(&self, group: u64) -> Result<v1::Shard, Box<v1::MetaRefused>> {
        let found = self.state.shards.get(&group).map(|shard| v1::Shard::clone(shard));
        found.ok_or_else(|| {
            refuse(
                MetaRefusal::NoSuchShard,
                format!("there is no group g{group}: `pontoon groups` lists them"),
            )
        })
    }

    fn bootstrap(&mut self, ask: v1::BootstrapCluster) -> Outcome {
        let cluster = ClusterId::from_slice(&ask.cluster)
            .map_err(|error| refuse(MetaRefusal::Invalid, error.to_string()))?;
        let node = ask.node.ok_or_else(|| refuse(MetaRefusal::Invalid, "bootstrap names no first node"))?;
        self.state.cluster = Some(cluster);
        self.state.cluster_version = 1;
        let Answer::Node(node) = self.register_node(node)? else {
            unreachable!("a registration answers a node")
        };
        let first = NodeId::new(node.id).map_err(|error| refuse(MetaRefusal::Invalid, error.to_string()))?;
        let replica = ReplicaId::on(first, 1).get();
        self.put_shard(v1::Shard {
            predicate: META_PREDICATE.into(),
            group: GroupId::META.0,
            epoch: 1,
            kind: v1::ShardKind::Meta.into(),
            replicas_wanted: ask.meta_replicas.max(1),
            state: v1::ShardState::Live.into(),
            voters: vec![replica],
            initial: vec![replica],
            next_ordinal: 2,
            created_ms: self.now_ms,
            ..Default::default()
        });
        self.note(format!("cluster {cluster} begins with n{} at {}", node.id, node.address));
        Ok(Answer::Node(node))
    }

    fn register_node(&mut self, ask: v1::RegisterNode) -> Outcome {
        if ask.address.is_empty() || ask.nonce.is_empty() {
            return Err(refuse(MetaRefusal::Invalid, "a node registers with its address and a nonce"));
        }
        // The same data directory asks again: it did not hear the first answer.
        if let Some(node) = self.state.members().find(|node| node.nonce == ask.nonce).cloned() {
            return Ok(Answer::Node(v1::Node::clone(&node)));
        }
        let speaks = Versions::said(ask.oldest_version, ask.newest_version);
        self.must_speak(speaks, &ask.address)?;
        if ask.replace != 0 && self.node(ask.replace)?.state() == v1::NodeState::Removed {
            let text = format!("n{} is removed already: start without --replace", ask.replace);
            return Err(refuse(MetaRefusal::Invalid, text));
        }
        let held = self.state.members().find(|node| node.address == ask.address && node.id != ask.replace);
        if let Some(holder) = held {
            let (id, address) = (holder.id, &ask.address);
            let text = format!(
                "{address} belongs to node n{id}: start it with its own data directory, or, if that is lost, \
                 run `pontoon decommission n{id}` or start this node with `--replace n{id}`"
            );
            return Err(refuse(MetaRefusal::AddressHeld, text));
        }
        let next = self.state.next_node;
        let id = if ask.wanted == 0 { next } else { ask.wanted };
        let used = id < self.state.nodes_from || self.state.nodes.contains_key(&id);
        if NodeId::new(id).is_err() || id > next + IDS_AHEAD_MOST || used {
            let why = match used {
                true => "is or was another node, and an id is never given again",
                false => "is far above the ids that are in use",
            };
            let text = format!(
                "n{id} {why}: make a certificate for a new id, as in `pontoon certs node --id {next}`, and start with it"
            );
            return Err(refuse(MetaRefusal::Invalid, text));
        }
        if ask.replace != 0 {
            let mut old = self.node(ask.replace)?;
            old.set_state(v1::NodeState::Removed);
            self.forgive(old.id);
            self.put_node(old);
        }
        self.state.next_node = next.max(id + 1);
        let node = self.put_node(v1::Node {
            id,
            address: ask.address,
            labels: ask.labels,
            capacity_bytes: ask.capacity_bytes,
            engine: ask.engine,
            state: v1::NodeState::Live.into(),
            joined_ms: self.now_ms,
            boot_token: ask.boot_token,
            nonce: ask.nonce,
            ..self.spoken(speaks)
        });
        match ask.replace {
            0 => self.note(format!("n{id} joined at {}", node.address)),
            old => self.note(format!("n{id} joined at {} in the place of n{old}", node.address)),
        }
        Ok(Answer::Node(node))
    }

    fn set_node_address(&mut self, ask: v1::SetNodeAddress) -> Outcome {
        let mut node = self.node(ask.node)?;
        if node.state() == v1::NodeState::Removed {
            let text = format!("n{} is removed for ever: let the machine join as a new node", node.id);
            return Err(refuse(MetaRefusal::Invalid, text));
        }
        if let Some(holder) =
            self.state.members().find(|other| other.address == ask.address && other.id != ask.node)
        {
            let text = format!("{} belongs to node n{}: listen on another address", ask.address, holder.id);
            return Err(refuse(MetaRefusal::AddressHeld, text));
        }
        let (id, known) = (node.id, node.boot_token);
        if ask.boot_history.last() != Some(&ask.boot_token) {
            let text =
                format!("n{id} does not say under which boots it was here before: run matching versions");
            return Err(refuse(MetaRefusal::Invalid, text));
        }
        // Membership, never equality: a command that is repeated or comes late finds its own or a later token, and one that
        // comes after a later boot was accepted is of an older incarnation, which is over.
        if known != 0 && !ask.boot_history.contains(&known) {
            let text = format!(
                "n{id} was seen with a later or other disk (boot {known:#x} is not in its history); this one is a copy, an old \
                 image, or empty: start the node with its own directory, or run `pontoon decommission n{id}` and join with a \
                 fresh directory by `--replace n{id}`"
            );
            return Err(refuse(MetaRefusal::OtherDisk, text));
        }
        let speaks = Versions::said(ask.oldest_version, ask.newest_version);
        self.must_speak(speaks, &format!("n{id}"))?;
        let before = node.clone();
        let spoken = self.spoken(speaks);
        (node.oldest_version, node.newest_version) = (spoken.oldest_version, spoken.newest_version);
        if !ask.labels.is_empty() {
            node.labels = ask.labels;
        }
        if ask.capacity_bytes != 0 {
            node.capacity_bytes = ask.capacity_bytes;
        }
        if !ask.engine.is_empty() {
            node.engine = ask.engine;
        }
        if node != before || node.address != ask.address || node.boot_token != ask.boot_token {
            if node.address != ask.address {
                self.note(format!("n{} moved from {} to {}", node.id, node.address, ask.address));
            }
            node.address = ask.address;
            node.boot_token = ask.boot_token;
            node = self.put_node(node);
        }
        Ok(Answer::Node(node))
    }

    fn set_node_state(&mut self, ask: v1::SetNodeState) -> Outcome {
        let mut node = self.node(ask.node)?;
        let wanted = v1::NodeState::try_from(ask.state)
            .map_err(|_| refuse(MetaRefusal::Invalid, format!("there is no node state {}", ask.state)))?;
        if node.state() == wanted {
            return Ok(Answer::Node(node));
        }
        if node.state() == v1::NodeState::Removed {
            let text = format!("n{} is removed for ever: let the machine join as a new node", node.id);
            return Err(refuse(MetaRefusal::Invalid, text));
        }
        if let Some(seen) = ask.seen
            && (seen.state() != node.state() || seen.replicas != self.state.groups_on(node.id))
        {
            let text = format!("what n{} holds has changed since it was shown: look again", node.id);
            return Err(refuse(MetaRefusal::Changed, text));
        }
        let replicas = self.state.replicas_on(node.id);
        if wanted == v1::NodeState::Removed && replicas > 0 && !ask.force {
            let text =
                format!("n{} still holds {replicas} replicas: move them with `pontoon move start`", node.id);
            return Err(refuse(MetaRefusal::NotEmpty, text));
        }
        node.set_state(wanted);
        if wanted == v1::NodeState::Removed {
            self.forgive(node.id);
        }
        let word = match wanted {
            v1::NodeState::Live => "live",
            v1::NodeState::Draining => "draining",
            v1::NodeState::Removed => "removed",
        };
        self.note(format!("n{} is {word}", node.id));
        Ok(Answer::Node(self.put_node(node)))
    }

    fn create_shard(&mut self, ask: v1::CreateShard) -> Outcome {
        let invalid = |text: String| refuse(MetaRefusal::Invalid, text);
        if let Some(shard) = self.state.shard(&ask.predicate) {
            if shard.state() == v1::ShardState::Dropping {
                let text = format!("{} is being dropped: retry when it is gone", ask.predicate);
                return Err(refuse(MetaRefusal::Busy, text));
            }
            if shard.kind != ask.kind {
                let text = format!(
                    "{} exists already and is of another kind: `pontoon predicates` shows it",
                    ask.predicate
                );
                return Err(invalid(text));
            }
            return Ok(Answer::Shard(v1::Shard::clone(shard)));
        }
        let len = ask.predicate.len();
        if len == 0 || len > MAX_PREDICATE_BYTES {
            return Err(invalid(format!(
                "a predicate's name has 1 to {MAX_PREDICATE_BYTES} bytes, not {len}"
            )));
        }
        if ask.predicate.starts_with('@') || ask.predicate.chars().any(char::is_control) {
            let name = ask.predicate.escape_debug();
            return Err(invalid(format!(
                "{name:?} cannot name a predicate: no leading @, no control characters"
            )));
        }
        if ask.kind() == v1::ShardKind::Meta {
            return Err(invalid("there is one meta group".into()));
        }
        let distinct: BTreeSet<u64> = ask.nodes.iter().copied().collect();
        if distinct.len() != ask.nodes.len() || distinct.is_empty() {
            return Err(invalid("a predicate begins on one or more distinct nodes".into()));
        }
        let mut initial = Vec::new();
        for (ordinal, node) in (1..).zip(&ask.nodes) {
            initial.push(ReplicaId::on(self.live_node(*node)?, ordinal).get());
        }
        let group = self.state.next_group;
        self.state.next_group += 1;
        let shard = self.put_shard(v1::Shard {
            predicate: ask.predicate,
            group,
            epoch: 1,
            kind: ask.kind,
            replicas_wanted: ask.replicas_wanted.max(1),
            state: v1::ShardState::Creating.into(),
            next_ordinal: initial.len() as u32 + 1,
            voters: initial.clone(),
            initial,
            created_ms: self.now_ms,
            ..Default::default()
        });
        self.note(format!("predicate {} is g{group} with {} replicas", shard.predicate, shard.initial.len()));
        Ok(Answer::Shard(shard))
    }

    fn shard_live(&mut self, group: u64) -> Outcome {
        let mut shard = self.shard_of(group)?;
        if shard.state() == v1::ShardState::Creating {
            shard.set_state(v1::ShardState::Live);
            shard = self.put_shard(shard);
        }
        Ok(Answer::Shard(shard))
    }

    fn drop_shard(&mut self, predicate: &str) -> Outcome {
        let Some(shard) = self.state.shard(predicate) else {
            let text = format!("there is no predicate {predicate}: `pontoon predicates` lists them");
            return Err(refuse(MetaRefusal::NoSuchShard, text));
        };
        let mut shard = v1::Shard::clone(shard);
        if shard.kind() == v1::ShardKind::Meta {
            return Err(refuse(MetaRefusal::Invalid, "the meta group cannot be dropped"));
        }
        if let Some(mv) = self.state.running_move(shard.group) {
            let text = format!("move {} of {predicate} is running: cancel it or wait for it", mv.id);
            return Err(refuse(MetaRefusal::Busy, text));
        }
        if shard.state() != v1::ShardState::Dropping {
            shard.set_state(v1::ShardState::Dropping);
            shard.epoch += 1;
            shard = self.put_shard(shard);
            self.note(format!("predicate {predicate} (g{}) is being dropped", shard.group));
        }
        Ok(Answer::Shard(shard))
    }

    fn shard_dropped(&mut self, group: u64) -> Outcome {
        let Some(shard) = self.state.shards.get(&group).cloned() else {
            return Ok(Answer::Done(true));
        };
        if shard.state() != v1::ShardState::Dropping {
            let text = format!("{} is not being dropped", shard.predicate);
            return Err(refuse(MetaRefusal::Invalid, text));
        }
        self.state.remove_shard(group);
        self.touched.shards.insert(group);
        self.note(format!("predicate {} (g{group}) is gone", shard.predicate));
        Ok(Answer::Done(true))
    }

    fn update_members(&mut self, ask: v1::UpdateMembers) -> Outcome {
        let mut shard = self.shard_of(ask.group)?;
        let same = shard.voters == ask.voters && shard.learners == ask.learners;
        if ask.members_index <= shard.members_index || same {
            return Ok(Answer::Shard(shard));
        }
        if ask.voters.is_empty() {
            return Err(refuse(MetaRefusal::Invalid, format!("g{} cannot be without voters", ask.group)));
        }
        let members = ask.voters.iter().chain(&ask.learners);
        for replica in members.map(|id| ReplicaId::new(*id)) {
            let replica = replica.map_err(|error| refuse(MetaRefusal::Invalid, error.to_string()))?;
            if replica.ordinal() >= shard.next_ordinal {
                let text = format!("{replica} was never given out for g{}", ask.group);
                return Err(refuse(MetaRefusal::Invalid, text));
            }
        }
        shard.voters = ask.voters;
        shard.learners = ask.learners;
        shard.members_index = ask.members_index;
        Ok(Answer::Shard(self.put_shard(shard)))
    }
}
