//! Operating the cluster through any of its nodes.

use std::future::Future;

use pontoon_proto::v1;
use tokio::time::{Instant, sleep, timeout};
use tonic::{Code, Response, Status, Streaming, transport::Channel};

use super::{Client, ClientError, GREETING, error::words};
use crate::api::admin_client::AdminClient;

/// How long one node may take: it looks for the leader of the meta group on the caller's behalf.
const ANSWER: std::time::Duration = std::time::Duration::from_secs(15);
const PAUSE: std::time::Duration = std::time::Duration::from_millis(100);

macro_rules! calls {
    ($($(#[$doc:meta])* $method:ident($request:ident) -> $reply:ident;)*) => {
        impl Client {$(
            $(#[$doc])*
            ///
            /// # Errors
            /// [`ClientError::Refused`] with the cluster's reason, [`ClientError::NobodyAnswers`],
            /// [`ClientError::NoMetaLeader`].
            pub async fn $method(&self, request: v1::$request) -> Result<v1::$reply, ClientError> {
                self.ask_any(async |mut admin| admin.$method(request.clone()).await).await
            }
        )*}
    };
}

calls! {
    /// The cluster as a node sees it.
    status(StatusRequest) -> StatusReply;
    /// The nodes, and what each of them holds.
    nodes(NodesRequest) -> NodesReply;
    /// The predicates, and who serves them.
    predicates(PredicatesRequest) -> PredicatesReply;
    /// The replicas of the groups on every node that answers.
    groups(GroupsRequest) -> GroupsReply;
    /// Makes a predicate; answers when it is served. Idempotent.
    create_predicate(CreatePredicateRequest) -> CreatePredicateReply;
    /// The record of a predicate, by a linearizable read of the map; absent if there is none.
    find_predicate(FindPredicateRequest) -> FindPredicateReply;
    /// Drops a predicate with all its rows.
    drop_predicate(DropPredicateRequest) -> DropPredicateReply;
    /// One predicate takes the name of another, which is dropped, in one step. Idempotent.
    replace_predicate(ReplacePredicateRequest) -> ReplacePredicateReply;
    /// Starts a move, or with `dry_run` says what it would do.
    move_start(MoveStartRequest) -> MoveStartReply;
    /// The moves that go on, or all.
    move_list(MoveListRequest) -> MoveListReply;
    /// Asks a move to go back; possible until its joint configuration is committed.
    move_cancel(MoveCancelRequest) -> MoveCancelReply;
    /// Removes a node that does not answer, for ever. Its replicas are made anew on other nodes.
    decommission(DecommissionRequest) -> DecommissionReply;
    /// The placement rules, and what is wrong with them.
    rules(RulesRequest) -> RulesReply;
    /// Checks rules, and sets them unless only the check is asked for.
    set_rules(SetRulesRequest) -> SetRulesReply;
    /// Empties a node, or lets it take replicas again, or tells how far that is.
    drain(DrainRequest) -> DrainReply;
    /// What moves would use the nodes evenly.
    rebalance_plan(RebalancePlanRequest) -> RebalancePlanReply;
    /// Carries out a plan, if the map has not changed since it was made.
    rebalance_apply(RebalanceApplyRequest) -> RebalanceApplyReply;
    /// Why a predicate's replicas are on a node, and why not.
    explain_placement(ExplainRequest) -> ExplainReply;
    /// How the groups go on that lose their quorum with these nodes. Nothing is begun.
    recover_plan(RecoverPlanRequest) -> RecoverPlanReply;
    /// Carries such a plan out. Idempotent.
    recover_apply(RecoverApplyRequest) -> RecoverApplyReply;
    /// Everything that one node, the first that answers, can tell of itself to whoever looks for a fault.
    inspect(InspectRequest) -> InspectReply;
    /// A group's replicas with what waits in each of them.
    inspect_group(InspectGroupRequest) -> InspectGroupReply;
    /// Which cluster versions the nodes speak, and what finalising the next one would turn on.
    upgrade_status(UpgradeStatusRequest) -> UpgradeStatusReply;
    /// Raises the cluster version by one, for ever.
    upgrade_finalise(UpgradeFinaliseRequest) -> UpgradeStatusReply;
    /// Who changed what.
    audit(AuditRequest) -> AuditReply;
    /// Tells the cluster that a backup or a restore is done.
    backup_note(BackupNoteRequest) -> BackupNoteReply;
    /// What happened.
    events(EventsRequest) -> EventsReply;
}

impl Client {
    /// Makes a predicate that maps keys to values, with so many replicas (0: three), if there is none of that name; on
    /// return it is served. The first write makes one too.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if the name is not one or belongs to a log.
    pub async fn create_map(&self, name: impl Into<String>, replicas: u32) -> Result<(), ClientError> {
        let request = v1::CreatePredicateRequest { predicate: name.into(), replicas, ..Default::default() };
        self.create_predicate(request).await.map(drop)
    }

    /// Asks one node, by where it listens, which engine it has; a `wish` that is not empty is what it starts with the next time, durable
    /// on return.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if the wish cannot be met, or the node does not answer.
    pub async fn engine_at(&self, address: &str, wish: &str) -> Result<v1::EngineReply, ClientError> {
        let request = v1::EngineRequest { wish: wish.to_owned() };
        let reply = self.admin_at(address)?.engine(request).await;
        reply.map(Response::into_inner).map_err(|status| ClientError::of(&status))
    }

    /// Profiles one node, by where it listens. It may take the client's deadline longer than the profile lasts.
    ///
    /// # Errors
    /// [`ClientError::Refused`] with the node's reason, or if it does not answer.
    ///
    /// # Cancel safety
    /// Dropping this ends the profile.
    pub async fn profile_at(
        &self,
        address: &str,
        request: v1::ProfileRequest,
    ) -> Result<v1::ProfileReply, ClientError> {
        let limit = self.deadline + std::time::Duration::from_secs(request.seconds.into());
        let mut admin = self.admin_at(address)?;
        let late = |_| Status::deadline_exceeded(format!("{address} does not answer"));
        let reply = timeout(limit, admin.profile(request)).await.map_err(late).flatten();
        reply.map(Response::into_inner).map_err(|status| ClientError::of(&status))
    }

    /// Follows a move: its state at once, then at each change, until it has ended. The stream breaks with the node that
    /// serves it; call again then.
    ///
    /// # Errors
    /// As the other calls.
    pub async fn move_watch(&self, id: u64) -> Result<Streaming<v1::MoveView>, ClientError> {
        let request = v1::MoveWatchRequest { id, hops: 0 };
        self.ask_any(async |mut admin| admin.move_watch(request).await).await
    }

    /// Asks one node after the other until one answers or the time is up.
    async fn ask_any<T, F: Future<Output = Result<Response<T>, Status>>>(
        &self,
        call: impl Fn(AdminClient<Channel>) -> F,
    ) -> Result<T, ClientError> {
        let until = Instant::now() + self.deadline.max(GREETING);
        loop {
            let address = self.any_address();
            let late = || Status::deadline_exceeded("no answer");
            let answer =
                timeout(ANSWER, call(self.admin_at(&address)?)).await.unwrap_or_else(|_| Err(late()));
            let status = match answer {
                Ok(reply) => return Ok(reply.into_inner()),
                Err(status) => status,
            };
            let passes = matches!(
                status.code(),
                Code::Unavailable | Code::Unknown | Code::Cancelled | Code::DeadlineExceeded
            );
            if !passes {
                return Err(ClientError::of(&status));
            }
            if Instant::now() + PAUSE >= until {
                let reason = words(&status);
                // A connection that was never made has a source; the word of a node that answered has none.
                return Err(match std::error::Error::source(&status).is_some() {
                    true => ClientError::NobodyAnswers { address, reason },
                    false => ClientError::NoMetaLeader { address, reason },
                });
            }
            sleep(PAUSE).await;
        }
    }
}
