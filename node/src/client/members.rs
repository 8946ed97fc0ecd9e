//! Who serves a predicate, and how that is changed: for embedders that place replicas themselves.

use std::time::Duration;

use pontoon_proto::{NodeId, ReplicaId, v1};
use tokio::time::{Instant, sleep};

use super::{Client, ClientError, Log};

const PAUSE: Duration = Duration::from_millis(50);

/// One of the nodes that serve a predicate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// The node.
    pub node: NodeId,
    /// Where it listens; empty if that is not known now.
    pub address: String,
    /// Whether it votes; if not, it is a learner: it follows, and answers reads that need not see the latest.
    pub votes: bool,
    /// Whether it leads.
    pub leads: bool,
}

impl Client {
    /// The nodes that serve a predicate, voters first, as the meta group has it now. Who leads is what a node has heard.
    ///
    /// # Errors
    /// [`ClientError::NoSuchPredicate`] among others.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn servers(&self, predicate: &str) -> Result<Vec<Server>, ClientError> {
        let name = predicate.to_owned();
        let found =
            self.find_predicate(v1::FindPredicateRequest { predicate: name.clone(), hops: 0 }).await?;
        let shard = found.shard.ok_or(ClientError::NoSuchPredicate { predicate: name.clone() })?;
        // The node that is asked may not have heard of a new predicate yet: then it has heard of no leader either.
        let views = self.predicates(v1::PredicatesRequest { predicate: name }).await;
        let leader =
            views.ok().and_then(|mut views| views.predicates.pop()).map_or(0, |view| view.leader_node);
        let nodes = self.nodes(v1::NodesRequest {}).await?.nodes;
        let address = |id: NodeId| {
            let found = nodes.iter().filter_map(|view| view.node.as_ref()).find(|node| node.id == id.get());
            found.map(|node| node.address.clone()).unwrap_or_default()
        };
        let member =
            |votes: bool| move |id: &u64| ReplicaId::new(*id).ok().map(|replica| (replica.node(), votes));
        let members = shard.voters.iter().filter_map(member(true));
        let members = members.chain(shard.learners.iter().filter_map(member(false)));
        let server = |(node, votes): (NodeId, bool)| Server {
            node,
            address: address(node),
            votes,
            leads: node.get() == leader,
        };
        Ok(members.map(server).collect())
    }

    /// Waits until somebody leads a predicate's group, at most as long as the client's deadline.
    ///
    /// # Errors
    /// [`ClientError::Late`]; [`ClientError::NoSuchPredicate`] among others.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn wait_for_leader(&self, predicate: &str) -> Result<Server, ClientError> {
        let begun = Instant::now();
        loop {
            if let Some(leader) = self.servers(predicate).await?.into_iter().find(|server| server.leads) {
                return Ok(leader);
            }
            if begun.elapsed() + PAUSE >= self.deadline {
                let (predicate, seconds) = (predicate.to_owned(), begun.elapsed().as_secs_f64());
                return Err(ClientError::Late { predicate, seconds, reason: "nobody leads it".to_owned() });
            }
            sleep(PAUSE).await;
        }
    }

    /// Lets a node serve a predicate, as a voter; on return it does. Nothing to do if it holds a replica already.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with the reason: no such node, another move under way, no room, or somebody cancelled it.
    ///
    /// # Cancel safety
    /// Dropping this abandons the wait, not the move.
    pub async fn join(&self, predicate: &str, node: NodeId) -> Result<(), ClientError> {
        self.gain(predicate, node, v1::MoveKind::Add).await
    }

    /// The same as a permanent learner: it follows without a vote, so that no write waits for it, and answers reads that need
    /// not see the latest ([`Client::with_reads`]).
    ///
    /// # Errors
    /// As [`Client::join`].
    ///
    /// # Cancel safety
    /// Dropping this abandons the wait, not the move.
    pub async fn join_as_learner(&self, predicate: &str, node: NodeId) -> Result<(), ClientError> {
        self.gain(predicate, node, v1::MoveKind::AddLearner).await
    }

    async fn gain(&self, predicate: &str, node: NodeId, kind: v1::MoveKind) -> Result<(), ClientError> {
        if self.servers(predicate).await?.iter().any(|server| server.node == node) {
            return Ok(());
        }
        let request = v1::MoveStartRequest {
            predicate: predicate.to_owned(),
            kind: kind.into(),
            to_node: node.get(),
            reason: format!("{node} joins"),
            ..Default::default()
        };
        self.moved(request).await
    }

    /// Ends a node's part in a predicate; on return its replica's data is gone. Nothing to do if it holds none.
    ///
    /// A predicate below the number of replicas that it was made with is given another one by the cluster, on a node that has
    /// none.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with the reason: it is the last replica, or another move is under way.
    ///
    /// # Cancel safety
    /// Dropping this abandons the wait, not the move.
    pub async fn leave(&self, predicate: &str, node: NodeId) -> Result<(), ClientError> {
        if !self.servers(predicate).await?.iter().any(|server| server.node == node) {
            return Ok(());
        }
        let request = v1::MoveStartRequest {
            predicate: predicate.to_owned(),
            kind: v1::MoveKind::Remove.into(),
            from_node: node.get(),
            reason: format!("{node} leaves"),
            ..Default::default()
        };
        self.moved(request).await
    }

    /// Starts a move and waits for its end, over the loss of whichever node tells of it.
    async fn moved(&self, request: v1::MoveStartRequest) -> Result<(), ClientError> {
        let id = self.move_start(request).await?.r#move.unwrap_or_default().id;
        loop {
            match self.move_watch(id).await {
                Ok(mut views) => {
                    while let Ok(Some(view)) = views.message().await {
                        let moved = view.r#move.unwrap_or_default();
                        match moved.phase() {
                            v1::MovePhase::Done => return Ok(()),
                            v1::MovePhase::Aborted => {
                                let reason =
                                    format!("move {id} of {} has gone back: start it again", moved.predicate);
                                return Err(ClientError::Refused { reason });
                            }
                            _ => {}
                        }
                    }
                }
                Err(ClientError::NobodyAnswers { .. } | ClientError::NoMetaLeader { .. }) => {}
                Err(error) => return Err(error),
            }
            sleep(PAUSE).await;
        }
    }
}

impl Log {
    /// The nodes that serve it: see [`Client::servers`].
    ///
    /// # Errors
    /// As [`Client::servers`].
    pub async fn servers(&self) -> Result<Vec<Server>, ClientError> {
        self.client().servers(self.name()).await
    }

    /// Waits until somebody leads it: see [`Client::wait_for_leader`].
    ///
    /// # Errors
    /// As [`Client::wait_for_leader`].
    pub async fn wait_for_leader(&self) -> Result<Server, ClientError> {
        self.client().wait_for_leader(self.name()).await
    }

    /// Lets a node serve it: see [`Client::join`].
    ///
    /// # Errors
    /// As [`Client::join`].
    pub async fn join(&self, node: NodeId) -> Result<(), ClientError> {
        self.client().join(self.name(), node).await
    }

    /// Ends a node's part in it: see [`Client::leave`].
    ///
    /// # Errors
    /// As [`Client::leave`].
    pub async fn leave(&self, node: NodeId) -> Result<(), ClientError> {
        self.client().leave(self.name(), node).await
    }
}
