//! Operating the cluster, and what nodes ask of each other. Each call is answered by a method of [`Shared`].

use std::sync::{Arc, atomic::Ordering};

use pontoon_proto::v1;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::backup;
use crate::{
    api::admin_server::Admin,
    audit::{Audited, ended},
    caller::Caller,
    calls::Call,
    clock::unix_ms,
    shared::Shared,
};

/// Serves `pontoon.v1.Admin`.
#[derive(Debug)]
pub(crate) struct AdminService {
    pub(crate) shared: Arc<Shared>,
}

impl AdminService {
    /// Answers from what this node has.
    async fn here<C: Call>(&self, request: Request<C>) -> Result<Response<C::Reply>, Status> {
        request.into_inner().run(self.shared.clone()).await.map(Response::new)
    }

    /// The same; who asked, and how it ended, goes into the audit log.
    async fn here_audited<C: Call + Audited>(
        &self,
        request: Request<C>,
    ) -> Result<Response<C::Reply>, Status> {
        let open = self.shared.audit.begin(&Caller::of(request.extensions())?, request.get_ref());
        ended(open, self.here(request).await).await
    }

    /// Answers through the leader of the meta group.
    async fn meta<C: crate::calls::MetaCall>(
        &self,
        request: Request<C>,
    ) -> Result<Response<C::Reply>, Status> {
        self.shared.at_meta_leader(request.into_inner()).await.map(Response::new)
    }

    /// The same; who asked, and how it ended, goes into the audit log.
    async fn audited<C: crate::calls::MetaCall + Audited>(
        &self,
        request: Request<C>,
    ) -> Result<Response<C::Reply>, Status> {
        let caller = Caller::of(request.extensions())?;
        self.shared.ordered(&caller, request.into_inner()).await.map(Response::new)
    }
}

#[tonic::async_trait]
impl Admin for AdminService {
    type MoveWatchStream = ReceiverStream<Result<v1::MoveView, Status>>;
    type BackupStream = ReceiverStream<Result<v1::BackupReply, Status>>;
    type MetaMapStream = ReceiverStream<Result<v1::ClusterMap, Status>>;

    async fn status(&self, _: Request<v1::StatusRequest>) -> Result<Response<v1::StatusReply>, Status> {
        Ok(Response::new(self.shared.status().await))
    }

    async fn nodes(&self, _: Request<v1::NodesRequest>) -> Result<Response<v1::NodesReply>, Status> {
        Ok(Response::new(v1::NodesReply { nodes: self.shared.node_views().await }))
    }

    async fn predicates(
        &self,
        request: Request<v1::PredicatesRequest>,
    ) -> Result<Response<v1::PredicatesReply>, Status> {
        self.shared.predicates(request.into_inner()).await.map(Response::new)
    }

    async fn groups(&self, request: Request<v1::GroupsRequest>) -> Result<Response<v1::GroupsReply>, Status> {
        self.here(request).await
    }

    async fn create_predicate(
        &self,
        request: Request<v1::CreatePredicateRequest>,
    ) -> Result<Response<v1::CreatePredicateReply>, Status> {
        self.audited(request).await
    }

    async fn drop_predicate(
        &self,
        request: Request<v1::DropPredicateRequest>,
    ) -> Result<Response<v1::DropPredicateReply>, Status> {
        self.audited(request).await
    }

    async fn replace_predicate(
        &self,
        request: Request<v1::ReplacePredicateRequest>,
    ) -> Result<Response<v1::ReplacePredicateReply>, Status> {
        self.audited(request).await
    }

    async fn find_predicate(
        &self,
        request: Request<v1::FindPredicateRequest>,
    ) -> Result<Response<v1::FindPredicateReply>, Status> {
        self.meta(request).await
    }

    async fn move_start(
        &self,
        request: Request<v1::MoveStartRequest>,
    ) -> Result<Response<v1::MoveStartReply>, Status> {
        self.audited(request).await
    }

    async fn move_list(
        &self,
        request: Request<v1::MoveListRequest>,
    ) -> Result<Response<v1::MoveListReply>, Status> {
        self.meta(request).await
    }

    async fn move_watch(
        &self,
        request: Request<v1::MoveWatchRequest>,
    ) -> Result<Response<Self::MoveWatchStream>, Status> {
        let views = self.shared.watch_move(request.into_inner().id).await?;
        Ok(Response::new(ReceiverStream::new(views)))
    }

    async fn move_cancel(
        &self,
        request: Request<v1::MoveCancelRequest>,
    ) -> Result<Response<v1::MoveCancelReply>, Status> {
        self.audited(request).await
    }

    async fn decommission(
        &self,
        request: Request<v1::DecommissionRequest>,
    ) -> Result<Response<v1::DecommissionReply>, Status> {
        self.audited(request).await
    }

    async fn events(&self, request: Request<v1::EventsRequest>) -> Result<Response<v1::EventsReply>, Status> {
        self.meta(request).await
    }

    async fn rules(&self, request: Request<v1::RulesRequest>) -> Result<Response<v1::RulesReply>, Status> {
        self.meta(request).await
    }

    async fn set_rules(
        &self,
        request: Request<v1::SetRulesRequest>,
    ) -> Result<Response<v1::SetRulesReply>, Status> {
        self.audited(request).await
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainReply>, Status> {
        self.audited(request).await
    }

    async fn rebalance_plan(
        &self,
        request: Request<v1::RebalancePlanRequest>,
    ) -> Result<Response<v1::RebalancePlanReply>, Status> {
        self.meta(request).await
    }

    async fn rebalance_apply(
        &self,
        request: Request<v1::RebalanceApplyRequest>,
    ) -> Result<Response<v1::RebalanceApplyReply>, Status> {
        self.audited(request).await
    }

    async fn explain_placement(
        &self,
        request: Request<v1::ExplainRequest>,
    ) -> Result<Response<v1::ExplainReply>, Status> {
        self.meta(request).await
    }

    async fn backup(
        &self,
        request: Request<Streaming<v1::BackupAsk>>,
    ) -> Result<Response<Self::BackupStream>, Status> {
        let caller = Caller::of(request.extensions())?;
        let mut incoming = request.into_inner();
        let ask = backup::first(&mut incoming).await?;
        let open = self.shared.audit.begin(&caller, &ask);
        let stream = ended(open, backup::serve(self.shared.clone(), ask, incoming).await).await?;
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn backup_note(
        &self,
        request: Request<v1::BackupNoteRequest>,
    ) -> Result<Response<v1::BackupNoteReply>, Status> {
        let asked = request.get_ref();
        let here = asked.hops == 0 && asked.action == "backup" && asked.all;
        let noted = self.audited(request).await?;
        if here {
            self.shared.backups.last_done.store(unix_ms() / 1_000, Ordering::Relaxed);
        }
        Ok(noted)
    }

    async fn engine(&self, request: Request<v1::EngineRequest>) -> Result<Response<v1::EngineReply>, Status> {
        self.here_audited(request).await
    }

    async fn audit(&self, request: Request<v1::AuditRequest>) -> Result<Response<v1::AuditReply>, Status> {
        self.here(request).await
    }

    async fn heat(&self, request: Request<v1::HeatRequest>) -> Result<Response<v1::HeatReply>, Status> {
        self.here(request).await
    }

    async fn upgrade_status(
        &self,
        request: Request<v1::UpgradeStatusRequest>,
    ) -> Result<Response<v1::UpgradeStatusReply>, Status> {
        self.here(request).await
    }

    async fn upgrade_finalise(
        &self,
        request: Request<v1::UpgradeFinaliseRequest>,
    ) -> Result<Response<v1::UpgradeStatusReply>, Status> {
        self.audited(request).await
    }

    async fn usage(&self, request: Request<v1::UsageRequest>) -> Result<Response<v1::UsageReply>, Status> {
        self.here(request).await
    }

    async fn join(&self, request: Request<v1::JoinRequest>) -> Result<Response<v1::JoinReply>, Status> {
        // What is passed on was checked by who passes it on.
        if request.get_ref().hops == 0 {
            Caller::of(request.extensions())?.must_speak_for(request.get_ref().wanted)?;
        }
        self.audited(request).await
    }

    async fn announce(
        &self,
        request: Request<v1::AnnounceRequest>,
    ) -> Result<Response<v1::AnnounceReply>, Status> {
        // A node asks itself first, so its own word arrives with one hop.
        if request.get_ref().hops <= 1 {
            Caller::of(request.extensions())?.must_speak_for(request.get_ref().node)?;
        }
        self.meta(request).await
    }

    async fn casualties(
        &self,
        request: Request<v1::CasualtiesRequest>,
    ) -> Result<Response<v1::CasualtiesReply>, Status> {
        self.here(request).await
    }

    async fn report(&self, request: Request<v1::ReportRequest>) -> Result<Response<v1::NodeView>, Status> {
        self.here(request).await
    }

    async fn meta_map(
        &self,
        request: Request<v1::MetaMapRequest>,
    ) -> Result<Response<Self::MetaMapStream>, Status> {
        Ok(Response::new(ReceiverStream::new(self.shared.meta_map(&request.into_inner()))))
    }

    async fn ensure_replica(
        &self,
        request: Request<v1::EnsureReplicaRequest>,
    ) -> Result<Response<v1::EnsureReplicaReply>, Status> {
        self.here(request).await
    }

    async fn fence_replica(
        &self,
        request: Request<v1::FenceReplicaRequest>,
    ) -> Result<Response<v1::FenceReplicaReply>, Status> {
        self.here(request).await
    }

    async fn replica_status(
        &self,
        request: Request<v1::ReplicaStatusRequest>,
    ) -> Result<Response<v1::ReplicaStatusReply>, Status> {
        self.here(request).await
    }

    async fn change_members(
        &self,
        request: Request<v1::ChangeMembersRequest>,
    ) -> Result<Response<v1::ChangeMembersReply>, Status> {
        self.here(request).await
    }

    async fn transfer_leader(
        &self,
        request: Request<v1::TransferLeaderRequest>,
    ) -> Result<Response<v1::TransferLeaderReply>, Status> {
        self.here(request).await
    }

    async fn verify_group(
        &self,
        request: Request<v1::VerifyGroupRequest>,
    ) -> Result<Response<v1::VerifyGroupReply>, Status> {
        self.here(request).await
    }

    async fn inspect(
        &self,
        request: Request<v1::InspectRequest>,
    ) -> Result<Response<v1::InspectReply>, Status> {
        self.here(request).await
    }

    async fn profile(
        &self,
        request: Request<v1::ProfileRequest>,
    ) -> Result<Response<v1::ProfileReply>, Status> {
        self.here_audited(request).await
    }

    async fn inspect_group(
        &self,
        request: Request<v1::InspectGroupRequest>,
    ) -> Result<Response<v1::InspectGroupReply>, Status> {
        self.here(request).await
    }

    async fn remains(
        &self,
        request: Request<v1::RemainsRequest>,
    ) -> Result<Response<v1::RemainsReply>, Status> {
        self.here(request).await
    }

    async fn recover_replica(
        &self,
        request: Request<v1::RecoverReplicaRequest>,
    ) -> Result<Response<v1::RecoverReplicaReply>, Status> {
        self.here(request).await
    }

    async fn recover_record(
        &self,
        request: Request<v1::RecoverRecordRequest>,
    ) -> Result<Response<v1::RecoverRecordReply>, Status> {
        self.audited(request).await
    }

    async fn recover_plan(
        &self,
        request: Request<v1::RecoverPlanRequest>,
    ) -> Result<Response<v1::RecoverPlanReply>, Status> {
        self.here(request).await
    }

    async fn recover_apply(
        &self,
        request: Request<v1::RecoverApplyRequest>,
    ) -> Result<Response<v1::RecoverApplyReply>, Status> {
        self.here_audited(request).await
    }

    async fn other_source(
        &self,
        request: Request<v1::OtherSourceRequest>,
    ) -> Result<Response<v1::OtherSourceReply>, Status> {
        self.here(request).await
    }

    async fn confirm_members(
        &self,
        request: Request<v1::ConfirmMembersRequest>,
    ) -> Result<Response<v1::ConfirmMembersReply>, Status> {
        self.here(request).await
    }
}
