//! Calls between nodes: to one node by its id, or to whoever leads the meta group.
//!
//! Each request type knows how to be answered here and how to be sent there, so that a caller need not care which of
//! the two it is.

use std::{future::Future, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use pontoon_proto::{GroupId, NodeId, v1};
use pontoon_raftstore::{Proposal, ProposeError, ReadLevel};
use pontoon_shard::versions;
use prost::Message;
use tokio::time::{Instant, sleep, timeout};
use tonic::{Code, Status, transport::Channel};

use crate::{api::admin_client::AdminClient, clock::unix_ms, map::member_nodes, shared::Shared};

/// How long one node may take to answer another.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the node that was asked first looks for the leader of the meta group.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a leader of the meta group may take to prove that it still leads.
const BARRIER: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(50);
/// Any node, a member of the meta group, its leader.
const MOST_HOPS: u32 = 2;

/// A request that any node can answer for itself.
pub(crate) trait Call: Clone + Send + Sync + 'static {
    type Reply: Send;
    /// Boxed, since answers call each other.
    fn run(self, shared: Arc<Shared>) -> BoxFuture<'static, Result<Self::Reply, Status>>;
    fn send(self, client: AdminClient<Channel>) -> impl Future<Output = Result<Self::Reply, Status>> + Send;
}

/// A request that the leader of the meta group answers. `Unavailable` from [`Call::run`] means that it does not lead
/// (any more); these requests may be repeated.
pub(crate) trait MetaCall: Call {
    fn hops(&mut self) -> &mut u32;
}

macro_rules! calls {
    ($($request:ident => $reply:ident by $method:ident $($meta:ident)?;)*) => {$(
        impl Call for v1::$request {
            type Reply = v1::$reply;

            fn run(self, shared: Arc<Shared>) -> BoxFuture<'static, Result<v1::$reply, Status>> {
                Box::pin(async move { shared.$method(self).await })
            }

            async fn send(self, mut client: AdminClient<Channel>) -> Result<v1::$reply, Status> {
                Ok(client.$method(self).await?.into_inner())
            }
        }
        $(calls!(@$meta $request);)?
    )*};
    (@meta $request:ident) => {
        impl MetaCall for v1::$request {
            fn hops(&mut self) -> &mut u32 {
                &mut self.hops
            }
        }
    };
}

calls! {
    CreatePredicateRequest => CreatePredicateReply by create_predicate meta;
    DropPredicateRequest => DropPredicateReply by drop_predicate meta;
    ReplacePredicateRequest => ReplacePredicateReply by replace_predicate meta;
    FindPredicateRequest => FindPredicateReply by find_predicate meta;
    MoveStartRequest => MoveStartReply by move_start meta;
    MoveListRequest => MoveListReply by move_list meta;
    MoveCancelRequest => MoveCancelReply by move_cancel meta;
    DecommissionRequest => DecommissionReply by decommission meta;
    JoinRequest => JoinReply by join meta;
    AnnounceRequest => AnnounceReply by announce meta;
    EventsRequest => EventsReply by events meta;
    RulesRequest => RulesReply by rules meta;
    SetRulesRequest => SetRulesReply by set_rules meta;
    DrainRequest => DrainReply by drain meta;
    RebalancePlanRequest => RebalancePlanReply by rebalance_plan meta;
    RebalanceApplyRequest => RebalanceApplyReply by rebalance_apply meta;
    ExplainRequest => ExplainReply by explain_placement meta;
    RecoverRecordRequest => RecoverRecordReply by recover_record meta;
    BackupNoteRequest => BackupNoteReply by backup_note meta;
    EngineRequest => EngineReply by engine;
    UpgradeFinaliseRequest => UpgradeStatusReply by upgrade_finalise meta;
    UpgradeStatusRequest => UpgradeStatusReply by upgrade_status;
    RemainsRequest => RemainsReply by remains;
    RecoverReplicaRequest => RecoverReplicaReply by recover_replica;
    RecoverPlanRequest => RecoverPlanReply by recover_plan;
    RecoverApplyRequest => RecoverApplyReply by recover_apply;
    AuditRequest => AuditReply by audit;
    HeatRequest => HeatReply by heat;
    UsageRequest => UsageReply by usage;
    InspectRequest => InspectReply by inspect;
    InspectGroupRequest => InspectGroupReply by inspect_group;
    ProfileRequest => ProfileReply by profile;
    GroupsRequest => GroupsReply by groups;
    ReportRequest => NodeView by report;
    CasualtiesRequest => CasualtiesReply by casualties;
    EnsureReplicaRequest => EnsureReplicaReply by ensure_replica;
    FenceReplicaRequest => FenceReplicaReply by fence_replica;
    ReplicaStatusRequest => ReplicaStatusReply by replica_status;
    ChangeMembersRequest => ChangeMembersReply by change_members;
    TransferLeaderRequest => TransferLeaderReply by transfer_leader;
    VerifyGroupRequest => VerifyGroupReply by verify_group;
    OtherSourceRequest => OtherSourceReply by other_source;
    ConfirmMembersRequest => ConfirmMembersReply by confirm_members;
}

impl Shared {
    /// Asks one node, which may be this one.
    pub(crate) async fn at<C: Call>(self: &Arc<Self>, node: NodeId, call: C) -> Result<C::Reply, Status> {
        self.at_within(CALL_TIMEOUT, node, call).await
    }

    /// The same with a limit of its own.
    pub(crate) async fn at_within<C: Call>(
        self: &Arc<Self>,
        limit: Duration,
        node: NodeId,
        call: C,
    ) -> Result<C::Reply, Status> {
        let late =
            |_| Status::deadline_exceeded(format!("{node} did not answer within {} s", limit.as_secs()));
        if node == self.own {
            return timeout(limit, call.run(self.clone())).await.map_err(late)?;
        }
        let address = self
            .map
            .address(node)
            .ok_or_else(|| Status::unavailable(format!("where {node} listens is not known")))?;
        let answer = timeout(limit, call.send(self.channels.admin(&address)?)).await.map_err(late)?;
        answer.map_err(|status| too_old(node, status))
    }

    /// Asks the leader of the meta group, through its members if need be.
    pub(crate) async fn at_meta_leader<C: MetaCall>(
        self: &Arc<Self>,
        mut call: C,
    ) -> Result<C::Reply, Status> {
        let (hops, deadline) = (*call.hops(), Instant::now() + PATIENCE);
        loop {
            let last = match self.meta_leader() {
                Some(leader) if leader == self.own => match self.meta_barrier().await {
                    Ok(()) => call.clone().run(self.clone()).await,
                    Err(status) => Err(status),
                },
                leader if hops < MOST_HOPS => match leader.or_else(|| self.meta_member()) {
                    Some(node) => {
                        let mut passed = call.clone();
                        *passed.hops() = hops + 1;
                        self.at(node, passed).await
                    }
                    None => Err(Status::unavailable(
                        "no member of the meta group is known; is the cluster reachable?",
                    )),
                },
                _ => Err(Status::unavailable(format!("{} does not lead the meta group", self.own))),
            };
            match last {
                Err(status) if lost(&status) => {
                    if hops > 0 || Instant::now() >= deadline {
                        return Err(Status::unavailable(status.message()));
                    }
                }
                other => return other,
            }
            sleep(PAUSE).await;
        }
    }

    /// Who leads the meta group, as far as a member here knows.
    pub(crate) fn meta_leader(&self) -> Option<NodeId> {
        let group = self.raft.group(GroupId::META)?;
        let leader = group.look(|status| status.leader);
        leader.map(|leader| leader.node())
    }

    /// Waits until the state here holds all that was committed in the meta group before the call: a leader that was just
    /// elected may not have applied what its predecessor acknowledged.
    async fn meta_barrier(&self) -> Result<(), Status> {
        let group = self
            .raft
            .group(GroupId::META)
            .ok_or_else(|| Status::unavailable("no member of the meta group is here"))?;
        match timeout(BARRIER, group.read_barrier(ReadLevel::Linearizable)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(rejected)) => Err(Status::unavailable(rejected.to_string())),
            Err(_) => Err(Status::unavailable("the meta group's leader hears no majority")),
        }
    }

    /// A member of the meta group other than this node, another one each time.
    pub(crate) fn meta_member(&self) -> Option<NodeId> {
        let view = self.map.view();
        let mut nodes: Vec<NodeId> = view.shard(GroupId::META).map(member_nodes).unwrap_or_default();
        nodes.retain(|&node| node != self.own);
        if nodes.is_empty() {
            nodes = view
                .present()
                .filter_map(|node| NodeId::new(node.id).ok())
                .filter(|&node| node != self.own)
                .collect();
        }
        (!nodes.is_empty()).then(|| nodes[self.turn() % nodes.len()])
    }

    /// Commits one command in the meta group. This node must lead it.
    ///
    /// # Errors
    /// `UNAVAILABLE` if it does not lead or the outcome is not known: the commands may be repeated.
    pub(crate) async fn meta_command(&self, body: v1::meta_command::Body) -> Result<v1::MetaReply, Status> {
        loop {
            let version = self.meta_state().cluster_version;
            let mut fitted = body.clone();
            versions::fit(&mut fitted, version);
            let reply = self.propose_meta(fitted).await?;
            // If the version has risen between the two, what it needs was left out of the command.
            let is_refused = matches!(&reply.body, Some(v1::meta_reply::Body::Refused(refused))
                if refused.reason() == v1::MetaRefusal::WrongVersion);
            if !is_refused || self.meta_state_at(reply.version).await?.cluster_version == version {
                return Ok(reply);
            }
        }
    }

    async fn propose_meta(&self, body: v1::meta_command::Body) -> Result<v1::MetaReply, Status> {
        let group = self
            .raft
            .group(GroupId::META)
            .ok_or_else(|| Status::unavailable("no member of the meta group is here"))?;
        let command = v1::MetaCommand { format: 1, now_ms: unix_ms(), body: Some(body) };
        let proposal =
            Proposal { payload: command.encode_to_vec().into(), request: None, epoch: 0, urgent: true };
        let applied = timeout(PATIENCE, group.propose(proposal))
            .await
            .map_err(|_| Status::unavailable("the meta group did not commit the command in time"))?
            .map_err(|error| match error {
                ProposeError::Rejected(rejected) => Status::unavailable(rejected.to_string()),
                ProposeError::Ambiguous(ambiguous) => Status::unavailable(ambiguous.to_string()),
            })?;
        v1::MetaReply::decode(applied.reply)
            .map_err(|error| Status::internal(format!("the meta group's answer is not legible: {error}")))
    }

    /// The same; what the meta group refuses is an error too.
    pub(crate) async fn meta_done(&self, body: v1::meta_command::Body) -> Result<v1::MetaReply, Status> {
        let reply = self.meta_command(body).await?;
        match &reply.body {
            Some(v1::meta_reply::Body::Refused(refused)) => Err(refused_status(refused)),
            _ => Ok(reply),
        }
    }
}

/// What the meta group refused, as a status.
pub(crate) fn refused_status(refused: &v1::MetaRefused) -> Status {
    let code = match refused.reason() {
        v1::MetaRefusal::Invalid => Code::InvalidArgument,
        v1::MetaRefusal::NoSuchNode | v1::MetaRefusal::NoSuchShard | v1::MetaRefusal::NoSuchMove => {
            Code::NotFound
        }
        v1::MetaRefusal::AddressHeld => Code::AlreadyExists,
        _ => Code::FailedPrecondition,
    };
    Status::new(code, refused.text.clone())
}

/// A node that does not have a method is of an older release.
fn too_old(node: NodeId, status: Status) -> Status {
    // With TLS a node says it in the words of its table.
    let unknown = status.code() == Code::Unimplemented || status.message().starts_with("no role may call");
    match unknown {
        true => Status::failed_precondition(format!(
            "{node}, which would have to answer, runs an older release that does not know this call: upgrade it first"
        )),
        false => status,
    }
}

/// Whether the call may have found nobody who leads.
fn lost(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::Cancelled | Code::Unknown)
}
