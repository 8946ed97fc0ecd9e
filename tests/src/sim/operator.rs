//! The operator: founds the cluster, moves replicas, replaces what is lost. All by commands of the meta group.

use pontoon_proto::{GroupId, NodeId, ReplicaId, v1};
use pontoon_raftstore::GroupSpec;
use pontoon_shard::{META_PREDICATE, planner};
use v1::{MoveKind, MovePhase, meta_command::Body, meta_reply::Body as Answer};

use super::{
    clients::Client,
    node::{CLUSTER, TICK_MS},
    work::Wait,
    world::{World, spec},
};

/// How long the founding may take.
const FOUNDING_MS: u64 = 60_000;
/// Voters that each group should have.
pub(super) const REPLICAS: u32 = 3;
/// The operator's place among the clients.
const OPERATOR: usize = 0;
/// Between two looks at what is hurt.
const LOOK_MS: u64 = 100;

/// Where the node listens that was the first here, or took the place of another.
pub(super) fn address(node: u64, replace: u64) -> String {
    format!("10.0.0.{node}:{replace}")
}

fn register(node: u64, replace: u64) -> v1::RegisterNode {
    v1::RegisterNode {
        address: address(node, replace),
        engine: "memory".into(),
        nonce: vec![node as u8, replace as u8, 3].into(),
        replace,
        ..Default::default()
    }
}

impl World {
    pub(super) fn order(&mut self, body: Body) {
        self.clients[OPERATOR].orders.push(body);
    }

    /// Founds the cluster as `pontoon node` does: the first node begins with the meta group alone, the others join, then
    /// the predicates are created.
    pub(super) fn found(&mut self) {
        self.clients.push(Client::new(GroupId::META, 1));
        let first = self.nodes[0].id;
        let shard = v1::Shard {
            predicate: META_PREDICATE.into(),
            group: GroupId::META.0,
            epoch: 1,
            kind: v1::ShardKind::Meta.into(),
            initial: vec![ReplicaId::on(first, 1).get()],
            ..Default::default()
        };
        let spec: GroupSpec = spec(&shard, ReplicaId::on(first, 1), true);
        let boots = self.nodes[0].boots;
        let Some(running) = &mut self.nodes[0].running else { return };
        let token = running.stepped.create_group(spec);
        self.waits.insert((first, boots, token), Wait::Nobody);
        let bootstrap = v1::BootstrapCluster {
            cluster: CLUSTER.to_vec().into(),
            node: Some(register(1, 0)),
            meta_replicas: REPLICAS,
        };
        self.order(Body::Bootstrap(bootstrap));
        for node in 2..=self.plan.nodes {
            self.order(Body::RegisterNode(register(node, 0)));
        }
        let nodes = self.plan.nodes as usize;
        self.wait_for("all nodes to join", |world| world.meta.live_nodes().count() == nodes);
        let replicas = self.plan.replicas;
        for group in 2..self.plan.groups + 2 {
            let all = self.plan.nodes;
            let mut placed: Vec<u64> =
                (0..u64::from(replicas).min(all)).map(|k| 1 + (group + k * (1 + group % 2)) % all).collect();
            placed.sort_unstable();
            placed.dedup();
            if placed.len() < replicas as usize {
                placed = planner::placement(&self.meta, "", replicas as usize, &planner::Seen::default())
                    .into_iter()
                    .map(NodeId::get)
                    .collect();
            }
            self.order(Body::CreateShard(v1::CreateShard {
                predicate: format!("p{group}"),
                replicas_wanted: replicas,
                nodes: placed,
                ..Default::default()
            }));
            for client in 0..2 {
                self.clients.push(Client::new(GroupId(group), u128::from(group) << 8 | client));
            }
        }
        self.wait_for("the cluster to be founded", |world| world.is_settled().is_ok());
    }

    /// Lets the world go on until something holds.
    pub(super) fn wait_for(&mut self, what: &str, holds: impl Fn(&World) -> bool) {
        for _ in 0..FOUNDING_MS / TICK_MS {
            for _ in 0..TICK_MS {
                self.step();
            }
            if holds(self) {
                return;
            }
        }
        self.fail(&format!("waited in vain for {what}: {}", self.is_settled().err().unwrap_or_default()));
    }

    pub(super) fn operator_hears(&mut self, body: Body, reply: Result<Answer, Box<v1::MetaRefused>>) {
        match (body, reply) {
            (Body::RegisterNode(ask), Ok(Answer::Node(node))) if ask.replace != 0 => {
                let id = NodeId::new(node.id).expect("the meta group gives out ids");
                self.say(format!("{id} joins in the place of n{}", ask.replace));
                if self.at(id).is_none() {
                    self.add_node(id, node.address);
                    self.tally.replaced += 1;
                }
            }
            (Body::StartMove(_), Ok(Answer::Move(mv))) => {
                let (group, source, target) = (mv.group, name(mv.source), name(mv.target));
                self.say(format!("move {}: g{group} {:?} {source} {target}", mv.id, mv.kind()));
            }
            (_, Err(refused)) => {
                self.timeline.note(refused.text.len() as u64);
            }
            _ => {}
        }
    }

    pub(super) fn run_operator(&mut self) {
        if !self.now.is_multiple_of(LOOK_MS) || self.meta.cluster.is_none() {
            return;
        }
        self.tend_injury();
        if self.meta.moves.len() > 40 {
            self.order(Body::PruneMoves(v1::PruneMoves { keep: 20 }));
        }
        if self.clients[OPERATOR].orders.len() > 4 {
            return;
        }
        // What the members have overtaken is taken back.
        let overtaken = self
            .meta
            .running_moves()
            .find(|mv| mv.stuck && mv.blocker() == v1::MoveBlocker::MembersChanged && !mv.cancel_requested);
        if let Some(id) = overtaken.map(|mv| mv.id) {
            self.order(Body::CancelMove(v1::CancelMove { id, ..Default::default() }));
        }
        // A dead replica is replaced under a new id.
        let dead: Vec<(GroupId, NodeId)> = self.dead.iter().copied().collect();
        for (group, node) in dead {
            let Some(shard) = self.meta.shards.get(&group.0) else { continue };
            let voter = |id: &&u64| ReplicaId::new(**id).is_ok_and(|replica| replica.node() == node);
            let Some(source) = shard.voters.iter().find(voter).copied() else { continue };
            if self.meta.running_move(group.0).is_none() && !self.calls_for(group) {
                self.begin_move(group, MoveKind::Replace, source);
            }
        }
    }

    /// Whether the operator's commands say something of a group already.
    fn calls_for(&self, group: GroupId) -> bool {
        let of = |body: &Body| matches!(body, Body::StartMove(start) if start.group == group.0);
        self.clients[OPERATOR].orders.iter().any(of)
    }

    fn begin_move(&mut self, group: GroupId, kind: MoveKind, source: u64) {
        let Some(shard) = self.meta.shards.get(&group.0) else { return };
        let holds = |node: NodeId| {
            let mut members = shard.voters.iter().chain(&shard.learners);
            members.any(|id| ReplicaId::new(*id).is_ok_and(|replica| replica.node() == node))
        };
        let free: Vec<NodeId> = self
            .meta
            .live_nodes()
            .filter(|id| {
                !holds(*id) && self.at(*id).is_some_and(|i| !self.nodes[i].gone && !self.nodes[i].rotten)
            })
            .collect();
        let target = match kind {
            MoveKind::Remove => 0,
            _ if free.is_empty() => return,
            _ => free[self.rng.below(free.len() as u64) as usize].get(),
        };
        let session = self.moment();
        self.order(Body::StartMove(v1::StartMove {
            group: group.0,
            kind: kind.into(),
            source,
            target_node: target,
            session,
            ..Default::default()
        }));
    }

    /// Moves, adds or removes a replica of some group.
    pub(super) fn start_some_move(&mut self) {
        if self.clients[OPERATOR].orders.len() > 4 {
            return;
        }
        // Some groups move more often than others, so that moves follow on moves.
        let group = match self.rng.below(8) {
            0 => GroupId::META,
            1..4 => GroupId(2 + self.rng.below(self.plan.groups.min(4))),
            _ => GroupId(2 + self.rng.below(self.plan.groups)),
        };
        let Some(shard) = self.meta.shards.get(&group.0).cloned() else { return };
        if shard.voters.is_empty() || self.meta.running_move(group.0).is_some() {
            return;
        }
        let source = shard.voters[self.rng.below(shard.voters.len() as u64) as usize];
        match self.rng.below(12) {
            0 if shard.voters.len() > 2 && self.injury.is_none() => {
                self.begin_move(group, MoveKind::Remove, source);
            }
            // A replica more finds no place on a node less.
            1 if shard.voters.len() + 1 < self.plan.nodes as usize => {
                self.begin_move(group, MoveKind::Add, 0)
            }
            _ => self.begin_move(group, MoveKind::Replace, source),
        }
    }

    /// Cancels some move that has not gone too far.
    pub(super) fn cancel_some_move(&mut self) {
        let early: Vec<u64> =
            self.meta.running_moves().filter(|mv| mv.phase() < MovePhase::Joint).map(|mv| mv.id).collect();
        if !early.is_empty() {
            let id = early[self.rng.below(early.len() as u64) as usize];
            self.order(Body::CancelMove(v1::CancelMove { id, ..Default::default() }));
        }
    }

    /// A new node takes the place of one whose disks are lost.
    pub(super) fn replace_node(&mut self, lost: NodeId) {
        self.order(Body::RegisterNode(register(lost.get(), lost.get())));
    }
}

fn name(id: u64) -> String {
    ReplicaId::new(id).map_or_else(|_| "-".to_owned(), |replica| replica.to_string())
}
