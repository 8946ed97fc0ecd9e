//! Reads and writes of predicates.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use futures::future::join_all;
use pontoon_proto::{
    GroupId, NodeId,
    v1::{self, Refusal, ShardKind, refusal::Kind},
};
use pontoon_raftstore::{Group, Ticket};
use pontoon_shard::{Expect, Feature, MapCommand, MapReader, Scan, decode_map_reply};
use prost::Message;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, transport::Channel};
use tracing::debug_span;

use super::{
    calls,
    common::{blocking, check_epoch, invalid, level_of, not_open, over_limit, submit},
};
use crate::{
    api::{data_client::DataClient, data_server::Data},
    caller::Caller,
    client::client_word,
    map::member_nodes,
    route::{Refused, Routed, refusal, routed, wrong_kind},
    shared::Shared,
    stats::{Asked, Ended},
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

    type CallsStream = ReceiverStream<Result<v1::ReplyBatch, Status>>;

    async fn calls(
        &self,
        request: Request<Streaming<v1::CallBatch>>,
    ) -> Result<Response<Self::CallsStream>, Status> {
        let caller = Caller::of(request.extensions())?;
        let answers = calls::serve(self.shared.clone(), caller, request.into_inner());
        Ok(Response::new(ReceiverStream::new(answers)))
    }

    async fn get(&self, request: Request<v1::GetRequest>) -> Result<Response<v1::GetReply>, Status> {
        self.shared.route(request.into_inner()).await.map(Response::new)
    }

    async fn scan(&self, request: Request<v1::ScanRequest>) -> Result<Response<v1::ScanReply>, Status> {
        self.shared.route(request.into_inner()).await.map(Response::new)
    }

    async fn route(&self, request: Request<v1::RouteRequest>) -> Result<Response<v1::RouteReply>, Status> {
        let caller = Caller::of(request.extensions())?;
        let request = request.into_inner();
        if request.create {
            caller.must_write("to make a predicate")?;
        }
        self.shared.route_of(request).await.map(Response::new)
    }

    async fn append_log(
        &self,
        request: Request<v1::AppendLogRequest>,
    ) -> Result<Response<v1::AppendLogReply>, Status> {
        self.shared.route(request.into_inner()).await.map(Response::new)
    }

    async fn read_log(
        &self,
        request: Request<v1::ReadLogRequest>,
    ) -> Result<Response<v1::ReadLogReply>, Status> {
        self.shared.route(request.into_inner()).await.map(Response::new)
    }

    type TailLogStream = ReceiverStream<Result<v1::ReadLogReply, Status>>;

    async fn tail_log(
        &self,
        request: Request<v1::ReadLogRequest>,
    ) -> Result<Response<Self::TailLogStream>, Status> {
        Ok(Response::new(ReceiverStream::new(self.shared.tail_log(request.into_inner()))))
    }

    async fn truncate_log(
        &self,
        request: Request<v1::TruncateLogRequest>,
    ) -> Result<Response<v1::TruncateLogReply>, Status> {
        self.shared.route(request.into_inner()).await.map(Response::new)
    }

    async fn reset_log(
        &self,
        request: Request<v1::ResetLogRequest>,
    ) -> Result<Response<v1::ResetLogReply>, Status> {
        let open = self.shared.audit.begin(&Caller::of(request.extensions())?, request.get_ref());
        let answer = self.shared.route(request.into_inner()).await.map(Response::new);
        let judged =
            answer.as_ref().map_err(Status::clone).and_then(|reply| match &reply.get_ref().refusal {
                None => Ok(()),
                Some(refusal) => Err(Status::failed_precondition(format!("{:?}", refusal.kind))),
            });
        if let Some(open) = open {
            open.end(&judged).await;
        }
        answer
    }
}

routed! {
    OpenSessionRequest => OpenSessionReply {
        predicate by open_session as OpenSession, kind None, creates |ask| !ask.must_exist, repeatable |_| true, local session
    }
    WriteRequest => WriteReply {
        predicate by write as Write, kind Some(ShardKind::Map), creates |_| true, repeatable |ask| ask.request.is_some(), local write,
        streamed as Write
    }
    GetRequest => GetReply {
        predicate by get as Get, kind Some(ShardKind::Map), creates |_| false, repeatable |_| true, local get,
        streamed as Get
    }
    ScanRequest => ScanReply {
        predicate by scan as Scan, kind Some(ShardKind::Map), creates |_| false, repeatable |_| true, local scan
    }
}

async fn session(
    _: v1::OpenSessionRequest,
    shared: &Shared,
    shard: &v1::Shard,
    group: Group,
) -> Result<v1::OpenSessionReply, Refused> {
    Ok(v1::OpenSessionReply {
        refusal: None,
        stamp: group.session_stamp().await?,
        epoch: shard.epoch,
        group: shard.group,
        leader_node: shared.own.get(),
        leader_address: shared.address.clone(),
    })
}

async fn write(
    request: v1::WriteRequest,
    shared: &Shared,
    _: &v1::Shard,
    group: Group,
) -> Result<v1::WriteReply, Refused> {
    let (ops, bytes, begun) = (request.ops.len(), bytes_of(&request.ops), Instant::now());
    let reply = finish(ops, propose(&group, request)?).await?;
    shared.wrote(group.id(), bytes, begun.elapsed());
    Ok(reply)
}

/// About how much operations write.
fn bytes_of(ops: &[v1::WriteOp]) -> usize {
    ops.iter().map(Message::encoded_len).sum()
}

async fn get(
    request: v1::GetRequest,
    shared: &Shared,
    shard: &v1::Shard,
    group: Group,
) -> Result<v1::GetReply, Refused> {
    let begun = Instant::now();
    check_epoch(&group, request.epoch, shard)?;
    let index = group.read_barrier(level_of(request.freshness.as_ref())).await?;
    let reader = map_of(shared, &group)?;
    let row = shared.readers.run(move || reader.get(&request.key)).await.map_err(Refused::Status)??;
    shared.read(group.id(), begun.elapsed());
    Ok(match row {
        None => v1::GetReply { index, ..Default::default() },
        Some(row) => {
            v1::GetReply { refusal: None, found: true, value: row.value, modified: row.index, index }
        }
    })
}

async fn scan(
    request: v1::ScanRequest,
    shared: &Shared,
    shard: &v1::Shard,
    group: Group,
) -> Result<v1::ScanReply, Refused> {
    let begun = Instant::now();
    check_epoch(&group, request.epoch, shard)?;
    let scan = scan_of(&request, group.id())?;
    let names_group = Feature::ReplacedShards.is_on(shared.map.view().cluster_version());
    let continued = |next| continuation_of(next, names_group.then_some(group.id()));
    group.read_barrier(level_of(request.freshness.as_ref())).await?;
    let reader = map_of(shared, &group)?;
    let page = blocking(move || reader.scan(&scan)).await??;
    shared.read(group.id(), begun.elapsed());
    let row = |row: pontoon_shard::Row| v1::ScanRow { key: row.key, value: row.value, modified: row.index };
    Ok(v1::ScanReply {
        refusal: None,
        rows: page.rows.into_iter().map(row).collect(),
        continuation: page.next.map(continued).unwrap_or_default(),
        index: page.index,
    })
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
            if let Some(refusal) = wrong_kind(shard, ShardKind::Map) {
                replies[at] = Some(v1::WriteRequest::refused(refusal));
                continue;
            }
            let group = self.raft.group(GroupId(shard.group));
            let led = group.as_ref().and_then(|group| group.look(|status| status.leader));
            match group {
                Some(group) if stays || led.is_none_or(|leader| leader.node() == self.own) => {
                    match propose(&group, write.clone()) {
                        Ok(ticket) => here.push((at, shard, &write.ops, ticket)),
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
        let begun = Instant::now();
        let local = join_all(here.into_iter().map(async |(at, shard, ops, ticket)| {
            let reply = finish(ops.len(), ticket).await;
            if reply.is_ok() {
                self.wrote(GroupId(shard.group), bytes_of(ops), begun.elapsed());
            }
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
            .inspect(|(_, reply)| self.counted.call(Asked::Write, Ended::of(reply.refusal.as_ref())))
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
        let here = self.raft.group(group).and_then(|group| group.look(|status| status.leader));
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

pub(super) fn propose(group: &Group, request: v1::WriteRequest) -> Result<Ticket, Refused> {
    // It lives as long as the command's, which is below it. The client has one of the same name and number.
    let id = request.request.as_ref();
    let span = debug_span!(
        "serve_write",
        predicate = request.predicate,
        group = %group.id(),
        client = id.map(client_word),
        seq = id.map(|id| id.seq)
    );
    let payload = command(request.ops)?;
    Ok(span.in_scope(|| submit(group, request.epoch, request.request, payload)))
}

pub(super) async fn finish(ops: usize, ticket: Ticket) -> Result<v1::WriteReply, Refused> {
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
    command.encode().map_err(over_limit)
}

pub(super) fn map_of(shared: &Shared, group: &Group) -> Result<MapReader, Refused> {
    shared.machines.reader(group.id()).ok_or_else(|| not_open(group))
}

/// A continuation is a version byte and the first key of the next page; with [`Feature::ReplacedShards`] another version byte, the
/// group, and that key: a scan must not begin with one predicate and end with what took its place.
const CONTINUATION: u8 = 1;
const CONTINUATION_OF_GROUP: u8 = 2;

fn continuation_of(next: Bytes, group: Option<GroupId>) -> Bytes {
    match group {
        None => [&[CONTINUATION], &next[..]].concat().into(),
        Some(GroupId(group)) => [&[CONTINUATION_OF_GROUP], &group.to_be_bytes()[..], &next].concat().into(),
    }
}

fn scan_of(request: &v1::ScanRequest, group: GroupId) -> Result<Scan, Refused> {
    let mut scan = match request.prefix.is_empty() {
        true => Scan::range(request.low.clone(), (!request.high.is_empty()).then(|| request.high.clone())),
        false => Scan::prefix(request.prefix.clone()),
    };
    if let Some((&version, rest)) = request.continuation.split_first() {
        let key = match (version, rest.split_first_chunk()) {
            (CONTINUATION, _) => rest,
            (CONTINUATION_OF_GROUP, Some((of, key))) if u64::from_be_bytes(*of) == group.0 => key,
            (CONTINUATION_OF_GROUP, Some(_)) => {
                let name = &request.predicate;
                return Err(invalid(format!("{name} is another predicate by now; scan from the start")));
            }
            _ => {
                return Err(invalid(
                    "the continuation is not from this cluster's version; scan from the start".to_owned(),
                ));
            }
        };
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
        let (group, other) = (GroupId(7), GroupId(8));
        for named in [None, Some(group)] {
            let next = |key: &'static [u8]| request(continuation_of(Bytes::from_static(key), named));
            let scan = scan_of(&next(b"p"), group).unwrap();
            assert_eq!(
                (&scan.low[..], scan.limit, scan.max_bytes),
                (&b"p"[..], SCAN_ROWS_MOST, SCAN_BYTES_DEFAULT)
            );
            assert_eq!(&scan_of(&next(b"a"), group).unwrap().low[..], b"m");
            assert_eq!(
                scan_of(&next(b"p"), other).is_err(),
                named.is_some(),
                "it may not end in another group"
            );
        }
        for bad in [&[9, b'p'][..], &[CONTINUATION_OF_GROUP, 0]] {
            assert!(scan_of(&request(Bytes::from_static(bad)), group).is_err());
        }
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
