//! From a predicate to the replica that answers: lookup, creation on first write, and the one hop for plain clients.
//!
//! ```text
//!  request ── shard of the predicate? ──no── create it (writes) or NoSuchPredicate (reads)
//!                 │
//!                 ├─ led here ───────────────> local answer
//!                 ├─ direct, or came by a hop ─> NotLeader / NotHere with a hint
//!                 └─ else ────────────────────> the same call to the leader, hops + 1
//! ```
//!
//! A refusal says that nothing happened, so a call is passed on again after one, for a while. When a connection breaks
//! under a call, what happened is unknown: it is repeated only if it carries a request id or reads.

use std::{future::Future, sync::Arc, time::Duration};

use pontoon_proto::{
    GroupId, NodeId,
    v1::{self, Refusal, call::Request, refusal::Kind, reply::Reply},
};
use pontoon_raftstore::{Group, ProposeError, Rejected};
use tokio::time::{Instant, sleep, timeout_at};
use tonic::{Code, Status, transport::Channel};

use crate::{
    api::data_client::DataClient,
    map::member_nodes,
    shared::Shared,
    stats::{Asked, Ended},
};

/// How long a node looks for the leader on behalf of a plain client.
const PATIENCE: Duration = Duration::from_secs(8);
const PAUSE_FIRST: Duration = Duration::from_millis(5);
const PAUSE_MOST: Duration = Duration::from_millis(200);
/// The longest name of a predicate in bytes.
pub(crate) const PREDICATE_LIMIT_BYTES: usize = 1024;

/// A call about one predicate.
pub(crate) trait Routed: Clone + Send + Sync + 'static {
    type Reply: Send;
    /// What it is counted as.
    const ASKED: Asked;

    fn predicate(&self) -> &str;
    /// Whether the caller follows hints itself, or the call came by a hop.
    fn stays(&self) -> bool;
    /// The call as it is passed on.
    fn passed_on(&self) -> Self;
    /// Whether a missing predicate is made.
    fn creates(&self) -> bool;
    /// Whether the call may be repeated when its answer was lost.
    fn repeatable(&self) -> bool;
    /// What the predicate must be; `None`: anything.
    fn kind() -> Option<v1::ShardKind>;
    fn local(
        self,
        shared: &Shared,
        shard: &v1::Shard,
        group: Group,
    ) -> impl Future<Output = Result<Self::Reply, Refused>> + Send;
    fn remote(self, client: DataClient<Channel>) -> impl Future<Output = Result<Self::Reply, Status>> + Send;
    /// The call as it travels with others on one stream; itself, if it has to go alone.
    fn into_call(self) -> Result<Request, Self>;
    /// Its answer from there; `None`: it is another call's.
    fn of_reply(reply: Reply) -> Option<Self::Reply>;
    fn refusal(reply: &Self::Reply) -> Option<&Refusal>;
    fn refused(refusal: Refusal) -> Self::Reply;
}

/// Implements [`Routed`] for requests with the usual fields: which one names the predicate, which call of the service
/// answers, what the predicate must be, whether a missing one is made, whether the call may be repeated, and the function
/// that answers here.
macro_rules! routed {
    ($($request:ident => $reply:ident {
        $name:ident by $method:ident as $asked:ident, kind $kind:expr, creates $creates:expr, repeatable $repeatable:expr, local $local:path
        $(, streamed as $streamed:ident)?
    })*) => {$(
        impl $crate::route::Routed for v1::$request {
            type Reply = v1::$reply;
            const ASKED: $crate::stats::Asked = $crate::stats::Asked::$asked;

            fn predicate(&self) -> &str {
                &self.$name
            }

            fn stays(&self) -> bool {
                self.direct || self.hops > 0
            }

            fn passed_on(&self) -> Self {
                v1::$request { hops: self.hops + 1, ..self.clone() }
            }

            fn creates(&self) -> bool {
                let creates: fn(&Self) -> bool = $creates;
                creates(self)
            }

            fn repeatable(&self) -> bool {
                let repeatable: fn(&Self) -> bool = $repeatable;
                repeatable(self)
            }

            fn kind() -> Option<v1::ShardKind> {
                $kind
            }

            async fn local(
                self,
                shared: &Shared,
                shard: &v1::Shard,
                group: Group,
            ) -> Result<Self::Reply, Refused> {
                $local(self, shared, shard, group).await
            }

            async fn remote(self, mut client: DataClient<Channel>) -> Result<Self::Reply, Status> {
                Ok(client.$method(self).await?.into_inner())
            }

            $crate::route::streamed!($($streamed)?);

            fn refusal(reply: &Self::Reply) -> Option<&Refusal> {
                reply.refusal.as_ref()
            }

            fn refused(refusal: Refusal) -> Self::Reply {
                v1::$reply { refusal: Some(refusal), ..Default::default() }
            }
        }
    )*};
}

pub(crate) use routed;

/// The part of [`Routed`] that says whether a call travels with others.
macro_rules! streamed {
    () => {
        fn into_call(self) -> Result<v1::call::Request, Self> {
            Err(self)
        }

        fn of_reply(_: v1::reply::Reply) -> Option<Self::Reply> {
            None
        }
    };
    ($kind:ident) => {
        fn into_call(self) -> Result<v1::call::Request, Self> {
            Ok(v1::call::Request::$kind(self))
        }

        fn of_reply(reply: v1::reply::Reply) -> Option<Self::Reply> {
            match reply {
                v1::reply::Reply::$kind(reply) => Some(reply),
                _ => None,
            }
        }
    };
}

pub(crate) use streamed;

/// How a local call ended without its answer.
#[derive(Debug)]
pub(crate) enum Refused {
    Rejected(Rejected),
    Refusal(Box<Kind>),
    Status(Status),
}

impl From<Rejected> for Refused {
    fn from(rejected: Rejected) -> Self {
        Refused::Rejected(rejected)
    }
}

impl From<ProposeError> for Refused {
    fn from(error: ProposeError) -> Self {
        match error {
            ProposeError::Rejected(rejected) => Refused::Rejected(rejected),
            ProposeError::Ambiguous(ambiguous) => {
                let refused = v1::RefusedAmbiguous { reason: ambiguous.to_string() };
                Refused::Refusal(Box::new(Kind::Ambiguous(refused)))
            }
        }
    }
}

pub(crate) fn refusal(kind: Kind) -> Refusal {
    Refusal { kind: Some(kind) }
}

impl Shared {
    /// Answers a call here or through the node that leads.
    pub(crate) async fn route<R: Routed>(self: &Arc<Self>, request: R) -> Result<R::Reply, Status> {
        let reply = self.answer(request).await;
        let ended = reply.as_ref().map_or(Ended::Failed, |reply| Ended::of(R::refusal(reply)));
        self.counted.call(R::ASKED, ended);
        reply
    }

    async fn answer<R: Routed>(self: &Arc<Self>, request: R) -> Result<R::Reply, Status> {
        let deadline = Instant::now() + PATIENCE;
        let mut pause = PAUSE_FIRST;
        loop {
            let shard = match self.find_shard(request.predicate(), request.creates(), deadline).await? {
                Ok(shard) => shard,
                Err(refusal) => return Ok(R::refused(refusal)),
            };
            // Before anything is proposed: a machine of another kind would not know the command.
            if let Some(refusal) = R::kind().and_then(|wanted| wrong_kind(&shard, wanted)) {
                return Ok(R::refused(refusal));
            }
            let group = GroupId(shard.group);
            let mut last = None;
            if let Some(handle) = self.raft.group(group) {
                match request.clone().local(self, &shard, handle).await {
                    Ok(reply) => return Ok(reply),
                    Err(Refused::Status(status)) => return Err(status),
                    Err(refused) => last = Some(self.explain(refused, &shard)),
                }
            }
            let last = last.unwrap_or_else(|| self.not_here(&shard));
            if request.stays() || !self.moves_on(&last) {
                return Ok(R::refused(last));
            }
            let Some(node) = self.hint(&last, &shard) else {
                if Instant::now() + pause >= deadline {
                    return Ok(R::refused(last));
                }
                self.pause(&mut pause).await;
                continue;
            };
            match self.pass_on(&request, group, node, deadline).await {
                Passed::Reply(reply) => return Ok(reply),
                Passed::Failed(status) => return Err(status),
                Passed::Again(last) => {
                    if Instant::now() + pause >= deadline {
                        return Ok(R::refused(*last));
                    }
                }
            }
            self.pause(&mut pause).await;
        }
    }

    async fn pause(&self, pause: &mut Duration) {
        sleep(*pause).await;
        *pause = (*pause * 2).min(PAUSE_MOST);
    }

    async fn pass_on<R: Routed>(
        &self,
        request: &R,
        group: GroupId,
        node: NodeId,
        deadline: Instant,
    ) -> Passed<R::Reply> {
        let again = |reason: String| {
            let reason = format!("{reason}; send it again with the same request id");
            Passed::Again(Box::new(refusal(Kind::Ambiguous(v1::RefusedAmbiguous { reason }))))
        };
        let Some(address) = self.map.address(node) else {
            self.map.forget_leader(group);
            return Passed::Again(Box::new(refusal(Kind::NotLeader(v1::RefusedNotLeader::default()))));
        };
        let client = match self.channels.data(&address) {
            Ok(client) => client,
            Err(status) => return Passed::Failed(status),
        };
        match timeout_at(deadline, request.passed_on().remote(client)).await {
            Err(_) => {
                self.map.forget_leader(group);
                again(format!("{node} at {address} did not answer in time"))
            }
            Ok(Err(status))
                if matches!(status.code(), Code::Unavailable | Code::Cancelled | Code::Unknown) =>
            {
                self.map.forget_leader(group);
                if request.repeatable() {
                    return Passed::Again(Box::new(refusal(
                        Kind::NotLeader(v1::RefusedNotLeader::default()),
                    )));
                }
                let reason = format!("the connection to {node} at {address} broke: {}", status.message());
                Passed::Reply(R::refused(refusal(Kind::Ambiguous(v1::RefusedAmbiguous { reason }))))
            }
            Ok(Err(status)) => Passed::Failed(status),
            Ok(Ok(reply)) => match R::refusal(&reply) {
                Some(refused) if self.moves_on(refused) => {
                    match refused.kind.as_ref() {
                        Some(Kind::NotLeader(hint)) => self.learn_leader(group, hint.node, &hint.address),
                        Some(Kind::NotHere(hint)) => self.learn_leader(group, hint.node, &hint.address),
                        _ => {}
                    }
                    Passed::Again(Box::new(refused.clone()))
                }
                _ => {
                    self.map.set_leader(group, node);
                    Passed::Reply(reply)
                }
            },
        }
    }

    fn learn_leader(&self, group: GroupId, node: u64, address: &str) {
        match NodeId::new(node) {
            Ok(node) => {
                if self.map.address(node).is_none() {
                    self.map.heard_from(node, address);
                }
                self.map.set_leader(group, node);
            }
            Err(_) => self.map.forget_leader(group),
        }
    }

    /// Whether a refusal is one that another node would not give.
    fn moves_on(&self, refusal: &Refusal) -> bool {
        matches!(refusal.kind, Some(Kind::NotLeader(_) | Kind::NotHere(_)))
    }

    /// Whom to ask next after a refusal: who is said to lead, else somebody who should know.
    fn hint(&self, last: &Refusal, shard: &v1::Shard) -> Option<NodeId> {
        let named = match &last.kind {
            Some(Kind::NotLeader(hint)) => hint.node,
            Some(Kind::NotHere(hint)) => hint.node,
            _ => 0,
        };
        if let Ok(node) = NodeId::new(named)
            && node != self.own
        {
            return Some(node);
        }
        self.probable_leader(shard)
    }

    /// A node that probably leads the shard's group and is not this one.
    pub(crate) fn probable_leader(&self, shard: &v1::Shard) -> Option<NodeId> {
        let group = GroupId(shard.group);
        if let Some(node) = self.map.leader(group)
            && node != self.own
        {
            return Some(node);
        }
        let nodes: Vec<NodeId> = member_nodes(shard).into_iter().filter(|&node| node != self.own).collect();
        // Another one at each try, so that one dead member does not stand in the way.
        let turn = self.turn();
        let reachable: Vec<NodeId> =
            nodes.iter().copied().filter(|&node| self.transport.reaches(node)).collect();
        let candidates = if reachable.is_empty() { nodes } else { reachable };
        (!candidates.is_empty()).then(|| candidates[turn % candidates.len()])
    }

    /// The shard of a predicate that is served, made if need be.
    pub(crate) async fn find_shard(
        self: &Arc<Self>,
        predicate: &str,
        create: bool,
        deadline: Instant,
    ) -> Result<Result<v1::Shard, Refusal>, Status> {
        // First of all: a group of the cluster's own takes no client's commands, and would stop at one.
        if let Err(reason) = check_predicate(predicate) {
            return Ok(Err(refusal(Kind::Invalid(v1::RefusedInvalid { reason }))));
        }
        let served = |shard: &v1::Shard| shard.state() == v1::ShardState::Live;
        if let Some(shard) = self.map.view().predicate(predicate)
            && served(shard)
        {
            return Ok(Ok(shard.clone()));
        }
        let missing = || {
            let predicate = predicate.to_owned();
            refusal(Kind::NoSuchPredicate(v1::RefusedNoSuchPredicate { predicate }))
        };
        let known = self.map.view().predicate(predicate).map(v1::Shard::state);
        if !create && matches!(known, None | Some(v1::ShardState::Dropping)) {
            // The map here may be older than the predicate, above all after a restart: only the meta group can say that
            // there is none.
            let request = v1::FindPredicateRequest { predicate: predicate.to_owned(), hops: 0 };
            let found = self.at_meta_leader(request).await?.shard;
            if found.is_none_or(|shard| shard.state() == v1::ShardState::Dropping) {
                return Ok(Err(missing()));
            }
        }
        if create {
            self.create_once(predicate).await?;
        }
        // The map follows; a predicate in creation is served in a moment.
        let mut views = self.map.subscribe();
        let wait = views.wait_for(|view| view.predicate(predicate).is_some_and(served));
        let found = match timeout_at(deadline, wait).await {
            Ok(Ok(view)) => view.predicate(predicate).cloned(),
            _ => None,
        };
        Ok(found.ok_or_else(|| refusal(Kind::Busy(v1::RefusedBusy { retry_after_ms: 200 }))))
    }

    /// Creates a predicate; of many callers for the same name one asks and the others wait for it.
    async fn create_once(self: &Arc<Self>, predicate: &str) -> Result<(), Status> {
        let turn = self.creating.entry(predicate.to_owned()).or_default().clone();
        let _turn = turn.lock().await;
        let served =
            self.map.view().predicate(predicate).is_some_and(|shard| {
                matches!(shard.state(), v1::ShardState::Live | v1::ShardState::Creating)
            });
        let result = if served {
            Ok(())
        } else {
            let request =
                v1::CreatePredicateRequest { predicate: predicate.to_owned(), ..Default::default() };
            self.at_meta_leader(request).await.map(drop)
        };
        self.creating.remove(predicate);
        result
    }

    /// A refusal of this node's own replica in the words of the wire.
    pub(crate) fn explain(&self, refused: Refused, shard: &v1::Shard) -> Refusal {
        let kind = match refused {
            Refused::Refusal(kind) => *kind,
            Refused::Status(status) => {
                Kind::Invalid(v1::RefusedInvalid { reason: status.message().to_owned() })
            }
            Refused::Rejected(rejected) => match rejected {
                Rejected::NotLeader { group, leader } => {
                    let node = leader.map(|leader| leader.node());
                    match node {
                        Some(node) => self.map.set_leader(group, node),
                        None => self.map.forget_leader(group),
                    }
                    Kind::NotLeader(v1::RefusedNotLeader {
                        node: node.map_or(0, NodeId::get),
                        address: node.and_then(|node| self.map.address(node)).unwrap_or_default(),
                    })
                }
                Rejected::Busy { retry_after, .. } => {
                    Kind::Busy(v1::RefusedBusy { retry_after_ms: retry_after.as_millis() as u64 })
                }
                Rejected::DiskFull { node, .. } => Kind::DiskFull(v1::RefusedDiskFull { node: node.get() }),
                Rejected::StaleEpoch { asked, current, .. } => Kind::StaleEpoch(v1::RefusedStaleEpoch {
                    asked,
                    current,
                    descriptor: Some(shard.clone()),
                }),
                Rejected::TooLarge { size, limit } => {
                    Kind::TooLarge(v1::RefusedTooLarge { size, limit, what: "batch".to_owned() })
                }
                late @ Rejected::Late { .. } => Kind::Late(v1::RefusedLate { reason: late.to_string() }),
                Rejected::SessionExpired => Kind::SessionExpired(v1::RefusedSessionExpired {}),
                Rejected::TooManyOpen => Kind::TooManyOpen(v1::RefusedTooManyOpen {}),
                Rejected::NoGroup(_) | Rejected::Stopped(_) => return self.not_here(shard),
                other => Kind::Invalid(v1::RefusedInvalid { reason: other.to_string() }),
            },
        };
        refusal(kind)
    }

    pub(crate) fn not_here(&self, shard: &v1::Shard) -> Refusal {
        let node = self.probable_leader(shard);
        refusal(Kind::NotHere(v1::RefusedNotHere {
            descriptor: Some(shard.clone()),
            node: node.map_or(0, NodeId::get),
            address: node.and_then(|node| self.map.address(node)).unwrap_or_default(),
        }))
    }
}

/// Why a call for predicates of one kind is not for this one; `None` if it is.
pub(crate) fn wrong_kind(shard: &v1::Shard, wanted: v1::ShardKind) -> Option<Refusal> {
    if shard.kind == i32::from(wanted) {
        return None;
    }
    let name = &shard.predicate;
    let reason = match v1::ShardKind::try_from(shard.kind) {
        Ok(v1::ShardKind::Log) => format!(
            "{name} is a log: `pontoon log append {name}` writes to it, `pontoon log read {name}` and `pontoon log tail \
             {name}` read it"
        ),
        Ok(v1::ShardKind::Map) => format!(
            "{name} is a map: `pontoon put {name}` writes to it, `pontoon get {name}` and `pontoon scan {name}` read it"
        ),
        _ => format!(
            "{name} is of the kind {}: only the program that made it talks to its machine",
            shard.kind
        ),
    };
    let refused = v1::RefusedWrongKind { predicate: name.clone(), kind: shard.kind, reason };
    Some(refusal(Kind::WrongKind(refused)))
}

enum Passed<T> {
    Reply(T),
    Failed(Status),
    Again(Box<Refusal>),
}

/// Whether a name can be a predicate's.
///
/// # Errors
/// Why not, with the next step.
pub(crate) fn check_predicate(name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err("a predicate needs a name".to_owned());
    }
    if name.len() > PREDICATE_LIMIT_BYTES {
        return Err(format!(
            "a predicate's name has at most {PREDICATE_LIMIT_BYTES} bytes, this one {}; shorten it",
            name.len()
        ));
    }
    if name.starts_with('@') {
        return Err(format!("{name} names a group of the cluster's own; choose a name without @ in front"));
    }
    if name.chars().any(char::is_control) {
        return Err(format!("the predicate's name {name:?} holds control characters; leave them out"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_before_anything_is_made() {
        assert!(check_predicate("director.film").is_ok());
        assert!(check_predicate("имя@ru").is_ok());
        assert!(check_predicate("").is_err());
        assert!(check_predicate("@meta").unwrap_err().contains("the cluster's own"));
        assert!(check_predicate("a\nb").is_err());
        assert!(check_predicate(&"x".repeat(PREDICATE_LIMIT_BYTES + 1)).unwrap_err().contains("1025"));
    }
}
