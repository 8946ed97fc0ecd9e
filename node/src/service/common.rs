//! What the calls for every kind of predicate have in common: how a command is proposed, what a limit means to the
//! caller, and how fresh a read must be.

use std::time::Duration;

use bytes::Bytes;
use pontoon_proto::v1::{self, refusal::Kind};
use pontoon_raftstore::{Group, Proposal, ReadLevel, RequestId, Ticket};
use pontoon_shard::Error;
use tonic::Status;

use crate::route::Refused;

/// Proposes an encoded command.
pub(super) fn submit(group: &Group, epoch: u64, id: Option<v1::RequestId>, payload: Bytes) -> Ticket {
    let request = id.map(|id| RequestId {
        client: (u128::from(id.client_high) << 64) | u128::from(id.client_low),
        stamp: id.stamp,
        seq: id.seq,
        acked_below: id.acked_below,
    });
    group.propose(Proposal { payload, request, epoch, urgent: false })
}

/// A command that cannot be encoded, in the words of the wire.
pub(super) fn over_limit(error: Error) -> Refused {
    match error {
        Error::KeyTooLarge { len, max } => too_large("key", len, max),
        Error::ValueTooLarge { len, max } => too_large("value", len, max),
        Error::CommandTooLarge { len, max } => too_large("batch", len, max),
        other => invalid(other.to_string()),
    }
}

fn too_large(what: &str, size: usize, limit: usize) -> Refused {
    let refused = v1::RefusedTooLarge { size: size as u64, limit: limit as u64, what: what.to_owned() };
    Refused::Refusal(Box::new(Kind::TooLarge(refused)))
}

pub(super) fn invalid(reason: String) -> Refused {
    Refused::Refusal(Box::new(Kind::Invalid(v1::RefusedInvalid { reason })))
}

/// The replica is here and its machine is not: it is dead, or on its way out.
pub(super) fn not_open(group: &Group) -> Refused {
    invalid(format!("{} does not serve here any more; `pontoon groups --problem` shows why", group.id()))
}

/// Reads check the epoch here; writes carry it into the log.
pub(super) fn check_epoch(group: &Group, asked: u64, shard: &v1::Shard) -> Result<(), Refused> {
    let current = group.look(|status| status.epoch);
    if asked == 0 || asked == current {
        return Ok(());
    }
    let descriptor = Some(shard.clone());
    Err(Refused::Refusal(Box::new(Kind::StaleEpoch(v1::RefusedStaleEpoch { asked, current, descriptor }))))
}

/// How fresh an answer must be.
pub(super) fn level_of(freshness: Option<&v1::Freshness>) -> ReadLevel {
    match freshness.and_then(|freshness| freshness.level.as_ref()) {
        None => ReadLevel::Linearizable,
        Some(v1::freshness::Level::MaxLagMs(ms)) => {
            ReadLevel::Follower { max_lag: Duration::from_millis(*ms) }
        }
        Some(v1::freshness::Level::Local(_)) => ReadLevel::Local,
    }
}

/// Reads rows away from the network's threads: the engine may go to disk.
pub(super) async fn blocking<T: Send + 'static>(
    read: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Refused> {
    tokio::task::spawn_blocking(read)
        .await
        .map_err(|error| Refused::Status(Status::internal(error.to_string())))
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Refused::Status(Status::internal(error.to_string()))
    }
}
