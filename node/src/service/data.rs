//! Reads and writes of predicates.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use futures::future::join_all;
use pontoon_proto::{
    GroupId, NodeId,
    v1::{self, Refusal, refusal::Kind},
};
use pontoon_raftstore::{Group, Proposal, ReadLevel, RequestId, Ticket};
use pontoon_shard::{Error as ShardError, Expect, MapCommand, MapReader, Scan, decode_map_reply};
use tokio::time::Instant;
use tonic::{Request, Response, Status, transport::Channel};

use crate::{
    api::{data_client::DataClient, data_server::Data},
    map::member_nodes,
    route::{Refused, Routed, refusal},
    shared::Shared,
};

const SCAN_ROWS_DEFAULT: usize = 1_000;
const SCAN_ROWS_MOST: usize = 10_000;
const SCAN_BYTES_DEFAULT: usize = 1 << 20;
const SCAN_BYTES_MOST: usize = 8 << 20;

/// Serves `pontoon.v1.Data`.
#[derive(Debug)]
pub(crate) struct DataService {
    pub(crate) shared: Arc<Shared>,
}

#[tonic::async_trait]
impl Data for DataService {
    async fn open_session(
        &self,
        request: Request<v1::OpenSessionRequest>,
    ) -> Result<Response<v1::OpenSessionReply>, Status> {
        self.shared.route(request.into_inner()).await.map(Response::new)
    }

    async fn write(&self, request: Request<v1::WriteRequest>) -> Result<Response<v1::WriteReply>, Status> {
        self.shared.route(request.into_inner()).await.map(Response::new)
    }

    async fn write_many(
        &self,
        request: Request<v1::WriteManyRequest>,
    ) -> Result<Response<v1::WriteManyReply>, Status> {
        let replies = self.shared.write_many(request.into_inner()).await;
        Ok(Response::new(v1::WriteManyReply { replies }))
    }

    async fn get(&self, request: Request<v1::GetRequest>) -> Result<Response<v1::GetReply>, Status> {
        self.shared.route(request.into_inner()).await.map(Response::new)
    }

    async fn scan(&self, request: Request<v1::ScanRequest>) -> Result<Response<v1::ScanReply>, Status> {
        self.shared.route(request.into_inner()).await.map(Response::new)
    }

    async fn route(&self, request: Request<v1::RouteRequest>) -> Result<Response<v1::RouteReply>, Status> {
        self.shared.route_of(request.into_inner()).await.map(Response::new)
    }
}

impl Routed for v1::OpenSessionRequest {
    type Reply = v1::OpenSessionReply;

    fn predicate(&self) -> &str {
        &self.predicate
    }

    fn stays(&self) -> bool {
        self.direct || self.hops > 0
    }

    fn passed_on(&self) -> Self {
        v1::OpenSessionRequest { hops: self.hops + 1, ..self.clone() }
    }

    fn creates(&self) -> bool {
        !self.must_exist
    }

    fn repeatable(&self) -> bool {
        true
    }

    async fn local(self, shared: &Shared, shard: &v1::Shard, group: Group) -> Result<Self::Reply, Refused> {
        let stamp = group.session_stamp().await?;
        Ok(v1::OpenSessionReply {
            refusal: None,
            stamp,
            epoch: shard.epoch,
            group: shard.group,
            leader_node: shared.own.get(),
            leader_address: shared.address.clone(),
        })
    }

    async fn remote(self, mut client: DataClient<Channel>) -> Result<Self::Reply, Status> {
        Ok(client.open_session(self).await?.into_inner())
    }

    fn refusal(reply: &Self::Reply) -> Option<&Refusal> {
        reply.refusal.as_ref()
    }

    fn refused(refusal: Refusal) -> Self::Reply {
        v1::OpenSessionReply { refusal: Some(refusal), ..Default::default() }
    }
}

impl Routed for v1::WriteRequest {
    type Reply = v1::WriteReply;

    fn predicate(&self) -> &str {
        &self.predicate
    }

    fn stays(&self) -> bool {
        self.direct || self.hops > 0
    }

    fn passed_on(&self) -> Self {
        v1::WriteRequest { hops: self.hops + 1, ..self.clone() }
    }

    fn creates(&self) -> bool {
        true
    }

    fn repeatable(&self) -> bool {
        self.request.is_some()
    }

    async fn local(self, _: &Shared, _: &v1::Shard, group: Group) -> Result<Self::Reply, Refused> {
        let ops = self.ops.len();
        finish(ops, propose(&group, self)?).await
    }

    async fn remote(self, mut client: DataClient<Channel>) -> Result<Self::Reply, Status> {
        Ok(client.write(self).await?.into_inner())
    }

    fn refusal(reply: &Self::Reply) -> Option<&Refusal> {
        reply.refusal.as_ref()
    }

    fn refused(refusal: Refusal) -> Self::Reply {
        v1::WriteReply { refusal: Some(refusal), ..Default::default() }
    }
}

impl Routed for v1::GetRequest {
    type Reply = v1::GetReply;

    fn predicate(&self) -> &str {
        &self.predicate
    }

    fn stays(&self) -> bool {
        self.direct || self.hops > 0
    }

    fn passed_on(&self) -> Self {
        v1::GetRequest { hops: self.hops + 1, ..self.clone() }
    }

    fn creates(&self) -> bool {
        false
    }

    fn repeatable(&self) -> bool {
        true
    }

    async fn local(self, shared: &Shared, shard: &v1::Shard, group: Group) -> Result<Self::Reply, Refused> {
        check_epoch(&group, self.epoch, shard)?;
        let index = group.read_barrier(ReadLevel::Linearizable).await?;
        let row = read(shared, group.id(), move |reader| reader.get(&self.key)).await?;
        Ok(match row {
            None => v1::GetReply { index, ..Default::default() },
            Some(row) => {
                v1::GetReply { refusal: None, found: true, value: row.value, modified: row.index, index }
            }
        })
    }

    async fn remote(self, mut client: DataClient<Channel>) -> Result<Self::Reply, Status> {
        Ok(client.get(self).await?.into_inner())
    }

    fn refusal(reply: &Self::Reply) -> Option<&Refusal> {
        reply.refusal.as_ref()
    }

    fn refused(refusal: Refusal) -> Self::Reply {
        v1::GetReply { refusal: Some(refusal), ..Default::default() }
    }
}

impl Routed for v1::ScanRequest {
    type Reply = v1::ScanReply;

    fn predicate(&self) -> &str {
        &self.predicate
    }

    fn stays(&self) -> bool {
        self.direct || self.hops > 0
    }

    fn passed_on(&self) -> Self {
        v1::ScanRequest { hops: self.hops + 1, ..self.clone() }
    }

    fn creates(&self) -> bool {
        false
    }

    fn repeatable(&self) -> bool {
        true
    }

    async fn local(self, shared: &Shared, shard: &v1::Shard, group: Group) -> Result<Self::Reply, Refused> {
        check_epoch(&group, self.epoch, shard)?;
        let scan = scan_of(&self)?;
        group.read_barrier(ReadLevel::Linearizable).await?;
        let page = read(shared, group.id(), move |reader| reader.scan(&scan)).await?;
        let row =
            |row: pontoon_shard::Row| v1::ScanRow { key: row.key, value: row.value, modified: row.index };
        Ok(v1::ScanReply {
            refusal: None,
            rows: page.rows.into_iter().map(row).collect(),
            continuation: page.next.map(continuation_of).unwrap_or_default(),
            index: page.index,
        })
    }

    async fn remote(self, mut client: DataClient<Channel>) -> Result<Self::Reply, Status> {
        Ok(client.scan(self).await?.into_inner())
    }

    fn refusal(reply: &Self::Reply) -> Option<&Refusal> {
        reply.refusal.as_ref()
    }

    fn refused(refusal: Refusal) -> Self::Reply {
        v1::ScanReply { refusal: Some(refusal), ..Default::default() }
    }
}

impl Shared {
    /// Proposes every write that is led here at once, sends the others together to their leaders, and looks one by one
    /// after those that were refused for want of the right node.
    async fn write_many(self: &Arc<Self>, request: v1::WriteManyRequest) -> Vec<v1::WriteReply> {
        let stays = request.direct || request.hops > 0;
        let mut replies: Vec<Option<v1::WriteReply>> = vec![None; request.writes.len()];
        let mut here = Vec::new();
        let mut elsewhere: BTreeMap<NodeId, Vec<usize>> = BTreeMap::new();
        let mut slow = Vec::new();
        let view = self.map.view();
        for (at, write) in request.writes.iter().enumerate() {
            let Some(shard) =
                view.predicate(&write.predicate).filter(|shard| shard.state() == v1::ShardState::Live)
            else {
                slow.push(at);
                continue;
            };
            let group = self.raft.group(GroupId(shard.group));
            let led = group.as_ref().and_then(|group| group.status().borrow().leader);
            match group {
                Some(group) if stays || led.is_none_or(|leader| leader.node() == self.own) => {
                    match propose(&group, write.clone()) {
                        Ok(ticket) => here.push((at, shard, write.ops.len(), ticket)),
                        Err(refused) => {
                            replies[at] = Some(v1::WriteRequest::refused(self.explain(refused, shard)))
                        }
                    }
                }
                _ if stays => replies[at] = Some(v1::WriteRequest::refused(self.not_here(shard))),
                _ => match led.map(|leader| leader.node()).or_else(|| self.probable_leader(shard)) {
                    Some(node) => elsewhere.entry(node).or_default().push(at),
                    None => slow.push(at),
                },
            }
        }
        let local = join_all(here.into_iter().map(async |(at, shard, ops, ticket)| {
            let reply = finish(ops, ticket).await;
            (at, reply.unwrap_or_else(|refused| v1::WriteRequest::refused(self.explain(refused, shard))))
        }));
        let remote = join_all(elsewhere.into_iter().map(async |(node, ats)| {
            let writes: Vec<_> = ats.iter().map(|&at| request.writes[at].clone()).collect();
            (
                ats,
                self.send_many(node, v1::WriteManyRequest { writes, direct: false, hops: request.hops + 1 })
                    .await,
            )
        }));
        let (local, remote) = tokio::join!(local, remote);
        for (at, reply) in local
            .into_iter()
            .chain(remote.into_iter().flat_map(|(ats, replies)| ats.into_iter().zip(replies)))
        {
            let wrong_node = matches!(
                reply.refusal.as_ref().and_then(|refusal| refusal.kind.as_ref()),
                Some(Kind::NotLeader(_) | Kind::NotHere(_))
            );
            match wrong_node && !stays {
                true => slow.push(at),
                false => replies[at] = Some(reply),
            }
        }
        let looked_after = join_all(slow.into_iter().map(async |at| {
            let write =
                v1::WriteRequest { direct: request.direct, hops: request.hops, ..request.writes[at].clone() };
            (at, self.route(write).await)
        }));
        for (at, reply) in looked_after.await {
            replies[at] = Some(reply.unwrap_or_else(|status| {
                let reason = status.message().to_owned();
                v1::WriteRequest::refused(refusal(Kind::Ambiguous(v1::RefusedAmbiguous { reason })))
            }));
        }
        replies.into_iter().map(|reply| reply.expect("each write was put in exactly one way")).collect()
    }

    /// One call to another node. Where it fails, writes with a request id count as refused, others as ambiguous.
    async fn send_many(&self, node: NodeId, request: v1::WriteManyRequest) -> Vec<v1::WriteReply> {
        let repeatable: Vec<bool> = request.writes.iter().map(Routed::repeatable).collect();
        let sent = async {
            let address =
                self.map.address(node).ok_or_else(|| Status::unavailable("its address is not known"))?;
            Ok::<_, Status>(self.channels.data(&address)?.write_many(request).await?.into_inner())
        };
        match sent.await {
            Ok(reply) if reply.replies.len() == repeatable.len() => reply.replies,
            result => {
                let reason = match result {
                    Ok(_) => format!("{node} gave another number of answers"),
                    Err(status) => format!("the call to {node} failed: {}", status.message()),
                };
                let refuse = |repeatable: bool| {
                    v1::WriteRequest::refused(refusal(match repeatable {
                        true => Kind::NotLeader(v1::RefusedNotLeader::default()),
                        false => Kind::Ambiguous(v1::RefusedAmbiguous { reason: reason.clone() }),
                    }))
                };
                repeatable.into_iter().map(refuse).collect()
            }
        }
    }

    async fn route_of(self: &Arc<Self>, request: v1::RouteRequest) -> Result<v1::RouteReply, Status> {
        let deadline = Instant::now() + std::time::Duration::from_secs(8);
        let shard = match self.find_shard(&request.predicate, request.create, deadline).await? {
            Ok(shard) => shard,
            Err(refusal) => return Ok(v1::RouteReply { refusal: Some(refusal), ..Default::default() }),
        };
        let members = member_nodes(&shard)
            .into_iter()
            .map(|node| v1::NodeAddress {
                node: node.get(),
                address: self.map.address(node).unwrap_or_default(),
            })
            .collect();
        let group = GroupId(shard.group);
        let here = self.raft.group(group).and_then(|group| group.status().borrow().leader);
        let leader = here.map(|leader| leader.node()).or_else(|| self.map.leader(group));
        Ok(v1::RouteReply {
            refusal: None,
            descriptor: Some(shard),
            leader_node: leader.map_or(0, NodeId::get),
            leader_address: leader.and_then(|node| self.map.address(node)).unwrap_or_default(),
            members,
        })
    }
}

fn propose(group: &Group, request: v1::WriteRequest) -> Result<Ticket, Refused> {
    let (epoch, id) = (request.epoch, request.request);
    let payload = command(request.ops)?;
    let request = id.map(|id| RequestId {
        client: (u128::from(id.client_high) << 64) | u128::from(id.client_low),
        stamp: id.stamp,
        seq: id.seq,
        acked_below: id.acked_below,
    });
    Ok(group.propose(Proposal { payload, request, epoch, urgent: false }))
}

async fn finish(ops: usize, ticket: Ticket) -> Result<v1::WriteReply, Refused> {
    let applied = ticket.await?;
    let reply = decode_map_reply(&applied.reply)
        .map_err(|error| Refused::Status(Status::internal(error.to_string())))?;
    if !reply.refused.is_empty() {
        return Err(invalid(reply.refused));
    }
    let mut results = vec![v1::WriteResult { held: true, ..Default::default() }; ops];
    if let Some(failed) = reply.failed
        && let Some(result) = results.get_mut(failed.op as usize)
    {
        *result = v1::WriteResult { held: false, current: failed.value, current_index: failed.index };
    }
    Ok(v1::WriteReply { refusal: None, index: applied.index, applied: reply.applied, results })
}

/// The operations as a command of the map, within its limits.
fn command(ops: Vec<v1::WriteOp>) -> Result<Bytes, Refused> {
    let mut command = MapCommand::new();
    for op in ops {
        command = match op.op {
            Some(v1::write_op::Op::Put(put)) => command.put(put.key, put.value),
            Some(v1::write_op::Op::Delete(delete)) => command.delete(delete.key),
            Some(v1::write_op::Op::Cas(cas)) => {
                let expect = match cas.expect {
                    Some(v1::write_cas::Expect::Absent(_)) => Expect::Absent,
                    Some(v1::write_cas::Expect::Value(value)) => Expect::Value(value),
                    Some(v1::write_cas::Expect::Index(index)) => Expect::Index(index),
                    None => return Err(invalid("a compare-and-set must say what it expects".to_owned())),
                };
                command.cas(cas.key, expect, cas.new_value)
            }
            None => return Err(invalid("an operation of the batch is empty".to_owned())),
        };
    }
    command.encode().map_err(|error| match error {
        ShardError::KeyTooLarge { len, max } => too_large("key", len, max),
        ShardError::ValueTooLarge { len, max } => too_large("value", len, max),
        ShardError::CommandTooLarge { len, max } => too_large("batch", len, max),
        other => invalid(other.to_string()),
    })
}

fn too_large(what: &str, size: usize, limit: usize) -> Refused {
    let refused = v1::RefusedTooLarge { size: size as u64, limit: limit as u64, what: what.to_owned() };
    Refused::Refusal(Box::new(Kind::TooLarge(refused)))
}

fn invalid(reason: String) -> Refused {
    Refused::Refusal(Box::new(Kind::Invalid(v1::RefusedInvalid { reason })))
}

/// Reads check the epoch here; writes carry it into the log.
fn check_epoch(group: &Group, asked: u64, shard: &v1::Shard) -> Result<(), Refused> {
    let current = group.status().borrow().epoch;
    if asked == 0 || asked == current {
        return Ok(());
    }
    let descriptor = Some(shard.clone());
    Err(Refused::Refusal(Box::new(Kind::StaleEpoch(v1::RefusedStaleEpoch { asked, current, descriptor }))))
}

/// Reads rows away from the network's threads: the engine may go to disk.
async fn read<T: Send + 'static>(
    shared: &Shared,
    group: GroupId,
    read: impl FnOnce(MapReader) -> Result<T, ShardError> + Send + 'static,
) -> Result<T, Refused> {
    let reader = shared
        .machines
        .reader(group)
        .ok_or_else(|| invalid(format!("{group} is not a map; its own kind of machine answers for it")))?;
    tokio::task::spawn_blocking(move || read(reader))
        .await
        .map_err(|error| Refused::Status(Status::internal(error.to_string())))?
        .map_err(|error| Refused::Status(Status::internal(error.to_string())))
}

/// A continuation is a version byte and the first key of the next page.
const CONTINUATION: u8 = 1;

fn continuation_of(next: Bytes) -> Bytes {
    [&[CONTINUATION], &next[..]].concat().into()
}

fn scan_of(request: &v1::ScanRequest) -> Result<Scan, Refused> {
    let mut scan = match request.prefix.is_empty() {
        true => Scan::range(request.low.clone(), (!request.high.is_empty()).then(|| request.high.clone())),
        false => Scan::prefix(request.prefix.clone()),
    };
    if let Some((&version, key)) = request.continuation.split_first() {
        if version != CONTINUATION {
            return Err(invalid(
                "the continuation is not from this cluster's version; scan from the start".to_owned(),
            ));
        }
        scan.low = scan.low.max(Bytes::copy_from_slice(key));
    }
    scan.limit = match request.limit as usize {
        0 => SCAN_ROWS_DEFAULT,
        limit => limit.min(SCAN_ROWS_MOST),
    };
    scan.max_bytes = match usize::try_from(request.limit_bytes).unwrap_or(usize::MAX) {
        0 => SCAN_BYTES_DEFAULT,
        bytes => bytes.min(SCAN_BYTES_MOST),
    };
    Ok(scan)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_continuation_moves_the_lower_end_only_forward() {
        let request = |continuation: Bytes| v1::ScanRequest {
            low: Bytes::from_static(b"m"),
            continuation,
            limit: 50_000,
            ..Default::default()
        };
        let scan = scan_of(&request(continuation_of(Bytes::from_static(b"p")))).unwrap();
        assert_eq!(
            (&scan.low[..], scan.limit, scan.max_bytes),
            (&b"p"[..], SCAN_ROWS_MOST, SCAN_BYTES_DEFAULT)
        );
        assert_eq!(&scan_of(&request(continuation_of(Bytes::from_static(b"a")))).unwrap().low[..], b"m");
        assert!(scan_of(&request(Bytes::from_static(&[9, b'p']))).is_err());
    }

    #[test]
    fn a_batch_over_a_limit_is_refused_before_it_is_proposed() {
        let put = |key: usize, value: usize| v1::WriteOp {
            op: Some(v1::write_op::Op::Put(v1::WritePut {
                key: vec![b'k'; key].into(),
                value: vec![0; value].into(),
            })),
        };
        assert!(command(vec![put(3, 3)]).is_ok());
        for (op, what) in [(put(4097, 1), "key"), (put(1, (1 << 20) + 1), "value")] {
            match command(vec![op]) {
                Err(Refused::Refusal(kind)) => {
                    assert!(matches!(&*kind, Kind::TooLarge(refused) if refused.what == what), "{kind:?}");
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(command(vec![v1::WriteOp { op: None }]).is_err());
    }
}
