//! What other nodes ask of the replicas on this one. Every call says "ensure", so that each may be repeated.

use std::{sync::Arc, time::Duration};

use pontoon_proto::{GroupId, ReplicaId, v1};
use pontoon_raftstore::{Error, Group, GroupSpec, Mandate, Rejected};
use pontoon_shard::mover::orders;
use prost::Message;
use tonic::Status;

use crate::{route::Refused, shared::Shared};

impl Shared {
    /// Makes a replica exist here.
    pub(crate) async fn ensure_replica(
        self: &Arc<Self>,
        request: v1::EnsureReplicaRequest,
    ) -> Result<v1::EnsureReplicaReply, Status> {
        self.check_driver(request.driver_term)?;
        let shard = request.shard.ok_or_else(|| Status::invalid_argument("which shard?"))?;
        let replica = replica_id(request.replica)?;
        if replica.node() != self.own {
            return Err(Status::invalid_argument(format!("{replica} does not belong on {}", self.own)));
        }
        let spec = GroupSpec {
            group: GroupId(shard.group),
            replica,
            descriptor: shard.encode_to_vec().into(),
            epoch: shard.epoch,
            initial: request.initial,
        };
        let group = self.raft.create_group(spec).await.map_err(|error| match error {
            Error::Tombstoned { .. } | Error::OtherReplica { .. } | Error::Damaged { .. } => {
                Status::failed_precondition(error.to_string())
            }
            other => Status::internal(other.to_string()),
        })?;
        Ok(v1::EnsureReplicaReply { replica: Some(self.info(&group)) })
    }

    /// Makes a replica never exist here again.
    pub(crate) async fn fence_replica(
        self: &Arc<Self>,
        request: v1::FenceReplicaRequest,
    ) -> Result<v1::FenceReplicaReply, Status> {
        self.check_driver(request.driver_term)?;
        let (group, replica) = (GroupId(request.group), replica_id(request.replica)?);
        self.raft
            .destroy_replica(group, replica)
            .await
            .map_err(|error| Status::internal(error.to_string()))?;
        Ok(v1::FenceReplicaReply {})
    }

    pub(crate) async fn replica_status(
        self: &Arc<Self>,
        request: v1::ReplicaStatusRequest,
    ) -> Result<v1::ReplicaStatusReply, Status> {
        let group = GroupId(request.group);
        let micros = |time: Option<Duration>| time.map_or(0, |time| time.as_micros() as u64);
        let (p99, level) = self.foreground.seen();
        Ok(v1::ReplicaStatusReply {
            replica: self.raft.group(group).map(|group| self.info(&group)),
            min_replica: self.wal.tombstone(group).unwrap_or(0),
            foreground_p99_us: micros(p99),
            foreground_level_us: micros(level),
        })
    }

    pub(crate) async fn change_members(
        self: &Arc<Self>,
        request: v1::ChangeMembersRequest,
    ) -> Result<v1::ChangeMembersReply, Status> {
        self.check_driver(request.driver_term)?;
        let change = orders::to_change(request.change).map_err(Status::invalid_argument)?;
        let mandate = mandate(request.mandate)?;
        let group = match self.local_group(request.group) {
            Ok(group) => group,
            Err(refusal) => return Ok(v1::ChangeMembersReply { refusal: Some(*refusal), replica: None }),
        };
        match group.change_by(change, mandate).await {
            Ok(()) => Ok(v1::ChangeMembersReply { refusal: None, replica: Some(self.info(&group)) }),
            Err(rejected) => {
                let refusal = Some(self.rejected(rejected, request.group));
                Ok(v1::ChangeMembersReply { refusal, replica: Some(self.info(&group)) })
            }
        }
    }

    pub(crate) async fn transfer_leader(
        self: &Arc<Self>,
        request: v1::TransferLeaderRequest,
    ) -> Result<v1::TransferLeaderReply, Status> {
        self.check_driver(request.driver_term)?;
        let to = replica_id(request.to)?;
        let group = match self.local_group(request.group) {
            Ok(group) => group,
            Err(refusal) => return Ok(v1::TransferLeaderReply { refusal: Some(*refusal) }),
        };
        let handed = match request.mandate {
            Some(mandate) => group.transfer_leader_by(to, orders::to_mandate(mandate)).await,
            None => group.transfer_leader(to).await,
        };
        let refusal = handed.err().map(|rejected| self.rejected(rejected, request.group));
        Ok(v1::TransferLeaderReply { refusal })
    }

    pub(crate) async fn verify_group(
        self: &Arc<Self>,
        request: v1::VerifyGroupRequest,
    ) -> Result<v1::VerifyGroupReply, Status> {
        self.check_driver(request.driver_term)?;
        let group = match self.local_group(request.group) {
            Ok(group) => group,
            Err(refusal) => return Ok(v1::VerifyGroupReply { refusal: Some(*refusal), index: 0 }),
        };
        match group.verify().await {
            Ok(index) => Ok(v1::VerifyGroupReply { refusal: None, index }),
            Err(rejected) => {
                let refusal = Some(self.rejected(rejected, request.group));
                Ok(v1::VerifyGroupReply { refusal, index: 0 })
            }
        }
    }

    pub(crate) async fn other_source(
        self: &Arc<Self>,
        request: v1::OtherSourceRequest,
    ) -> Result<v1::OtherSourceReply, Status> {
        self.check_driver(request.driver_term)?;
        let group = match self.local_group(request.group) {
            Ok(group) => group,
            Err(refusal) => return Ok(v1::OtherSourceReply { refusal: Some(*refusal) }),
        };
        // Another replica than the one that was meant is none of the driver's business.
        if group.look(|status| status.replica.get()) != request.replica {
            return Ok(v1::OtherSourceReply::default());
        }
        let refusal = group.other_source().await.err().map(|rejected| self.rejected(rejected, request.group));
        Ok(v1::OtherSourceReply { refusal })
    }

    pub(crate) async fn confirm_members(
        self: &Arc<Self>,
        request: v1::ConfirmMembersRequest,
    ) -> Result<v1::ConfirmMembersReply, Status> {
        let group = match self.local_group(request.group) {
            Ok(group) => group,
            Err(refusal) => {
                return Ok(v1::ConfirmMembersReply { refusal: Some(*refusal), ..Default::default() });
            }
        };
        match group.members_by(mandate(request.mandate)?).await {
            Ok((conf_state, index)) => {
                Ok(v1::ConfirmMembersReply { refusal: None, conf_state: Some(conf_state), index })
            }
            Err(rejected) => {
                let refusal = Some(self.rejected(rejected, request.group));
                Ok(v1::ConfirmMembersReply { refusal, ..Default::default() })
            }
        }
    }

    fn local_group(&self, group: u64) -> Result<Group, Box<v1::Refusal>> {
        let id = GroupId(group);
        self.raft.group(id).ok_or_else(|| Box::new(self.rejected(Rejected::NoGroup(id), group)))
    }

    fn rejected(&self, rejected: Rejected, group: u64) -> v1::Refusal {
        let shard = self.map.view().shard(GroupId(group)).cloned();
        self.explain(
            Refused::Rejected(rejected),
            &shard.unwrap_or_else(|| v1::Shard { group, ..Default::default() }),
        )
    }

    /// A replica here, as other nodes and people are told of it.
    pub(crate) fn info(&self, group: &Group) -> v1::ReplicaInfo {
        let info = group.look(orders::replica_info);
        v1::ReplicaInfo { bytes: self.machines.usage(group.id()), ..info }
    }
}

/// The mandate of an order, which a driver of this version always gives.
fn mandate(mandate: Option<v1::Mandate>) -> Result<Mandate, Status> {
    let missing = "an order to a group needs a mandate: run matching versions on all nodes";
    mandate.map(orders::to_mandate).ok_or_else(|| Status::invalid_argument(missing))
}

pub(crate) fn replica_id(value: u64) -> Result<ReplicaId, Status> {
    ReplicaId::new(value).map_err(|error| Status::invalid_argument(error.to_string()))
}
