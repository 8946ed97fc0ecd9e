//! Reads and writes of logs.
//!
//! A tail is a read that waits: nobody keeps a cursor for anybody. Whoever follows a log asks for the offset after the last
//! record that it has, wherever the group's leader is by now, so that nothing is lost or repeated whoever fails.

use std::{sync::Arc, time::Duration};

use pontoon_proto::v1::{self, Refusal, ShardKind, refusal::Kind};
use pontoon_raftstore::{Group, ReadLevel, Rejected, Role, Ticket};
use pontoon_shard::{Error, LogBounds, LogCommand, LogPage, LogReader, decode_log_reply};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout_at},
};
use tonic::{Status, transport::Channel};

use super::common::{blocking, check_epoch, invalid, level_of, not_open, over_limit, submit};
use crate::{
    api::data_client::DataClient,
    route::{Refused, routed},
    shared::Shared,
};

const RECORDS_DEFAULT: usize = 1_000;
const RECORDS_MOST: usize = 10_000;
const BYTES_DEFAULT: usize = 1 << 20;
const BYTES_MOST: usize = 8 << 20;
/// How long one read may wait for a record. Shorter than a call counts as lost.
const WAIT_MOST_MS: u32 = 3_000;
/// Between two attempts of a tail to reach whoever serves the log.
const PAUSE: Duration = Duration::from_millis(50);

routed! {
    AppendLogRequest => AppendLogReply {
        log by append_log as AppendLog, kind Some(ShardKind::Log), creates |_| false, repeatable |ask| ask.request.is_some(), local append
    }
    ReadLogRequest => ReadLogReply {
        log by read_log as ReadLog, kind Some(ShardKind::Log), creates |_| false, repeatable |_| true, local read
    }
    TruncateLogRequest => TruncateLogReply {
        log by truncate_log as TruncateLog, kind Some(ShardKind::Log), creates |_| false, repeatable |_| true, local truncate
    }
    ResetLogRequest => ResetLogReply {
        log by reset_log as ResetLog, kind Some(ShardKind::Log), creates |_| false, repeatable |ask| ask.request.is_some(), local reset
    }
}

async fn append(
    request: v1::AppendLogRequest,
    shared: &Shared,
    _: &v1::Shard,
    group: Group,
) -> Result<v1::AppendLogReply, Refused> {
    let (bytes, begun) = (request.records.iter().map(bytes::Bytes::len).sum(), Instant::now());
    let command = LogCommand::Append { records: request.records, expect_offset: request.expect_offset };
    let payload = command.encode().map_err(over_limit)?;
    let reply = finish(submit(&group, request.epoch, request.request, payload)).await?;
    shared.counted.writes.note(begun.elapsed());
    shared.meter.wrote(group.id(), bytes);
    Ok(v1::AppendLogReply {
        refusal: None,
        applied: reply.applied,
        offset: reply.offset,
        bounds: Some(bounds(&reply)),
        index: reply.index,
    })
}

async fn truncate(
    request: v1::TruncateLogRequest,
    _: &Shared,
    _: &v1::Shard,
    group: Group,
) -> Result<v1::TruncateLogReply, Refused> {
    let payload = LogCommand::Truncate { below: request.below }.encode().map_err(over_limit)?;
    let reply = finish(submit(&group, request.epoch, request.request, payload)).await?;
    sweep_on(group, &reply);
    Ok(v1::TruncateLogReply { refusal: None, bounds: Some(bounds(&reply)) })
}

async fn reset(
    request: v1::ResetLogRequest,
    _: &Shared,
    _: &v1::Shard,
    group: Group,
) -> Result<v1::ResetLogReply, Refused> {
    let command = LogCommand::Reset { at: request.at, expect_next: request.expect_next };
    let payload = command.encode().map_err(over_limit)?;
    let reply = finish(submit(&group, request.epoch, request.request, payload)).await?;
    sweep_on(group, &reply);
    Ok(v1::ResetLogReply { refusal: None, applied: reply.applied, bounds: Some(bounds(&reply)) })
}

async fn finish(ticket: Ticket) -> Result<v1::LogReply, Refused> {
    let reply = decode_log_reply(&ticket.await?.reply)?;
    match reply.refused.is_empty() {
        true => Ok(reply),
        false => Err(invalid(reply.refused)),
    }
}

/// Drops the rows that a truncation or reset left, a bounded number per command. If this node loses the leadership
/// over it, the next append goes on with it.
fn sweep_on(group: Group, reply: &v1::LogReply) {
    if !reply.sweep_on {
        return;
    }
    tokio::spawn(async move {
        while let Ok(payload) = LogCommand::Sweep.encode()
            && let Ok(reply) = finish(submit(&group, 0, None, payload)).await
            && reply.sweep_on
        {}
    });
}

fn bounds(reply: &v1::LogReply) -> v1::LogBounds {
    v1::LogBounds { lowest: reply.lowest, next: reply.next, era: reply.era }
}

fn wire(bounds: LogBounds) -> v1::LogBounds {
    v1::LogBounds { lowest: bounds.lowest, next: bounds.next, era: bounds.era }
}

async fn read(
    request: v1::ReadLogRequest,
    shared: &Shared,
    shard: &v1::Shard,
    group: Group,
) -> Result<v1::ReadLogReply, Refused> {
    let until = Instant::now() + Duration::from_millis(request.wait_ms.min(WAIT_MOST_MS).into());
    check_epoch(&group, request.epoch, shard)?;
    let level = level_of(request.freshness.as_ref());
    let mut index = group.read_barrier(level).await?;
    let reader = shared.machines.log(group.id()).ok_or_else(|| not_open(&group))?;
    let mut seen = reader.watch();
    loop {
        // Before the read: what is applied after it wakes.
        seen.mark_unchanged();
        let page = page(&reader, &request, level).await?;
        index = index.max(page.index);
        let nothing = page.records.is_empty() && !request.bounds_only;
        let more_may_come = request.from.is_none_or(|from| request.to.is_none_or(|to| to > from));
        if nothing && more_may_come && Instant::now() < until {
            wait(shared, &group, level, &mut seen, until).await?;
            continue;
        }
        let first = request.from.unwrap_or(page.bounds.lowest);
        let bounds = Some(wire(page.bounds));
        return Ok(v1::ReadLogReply { refusal: None, first, records: page.records, bounds, index });
    }
}

/// One look at the log.
async fn page(
    reader: &LogReader,
    request: &v1::ReadLogRequest,
    level: ReadLevel,
) -> Result<LogPage, Refused> {
    let (reader, request) = (reader.clone(), request.clone());
    let limit = match request.limit as usize {
        _ if request.bounds_only => 0,
        0 => RECORDS_DEFAULT,
        limit => limit.min(RECORDS_MOST),
    };
    let bytes = match usize::try_from(request.limit_bytes).unwrap_or(usize::MAX) {
        0 => BYTES_DEFAULT,
        bytes => bytes.min(BYTES_MOST),
    };
    blocking(move || {
        loop {
            let from = match request.from {
                Some(from) if !request.bounds_only => from,
                _ => reader.bounds()?.lowest,
            };
            let gone = |offset, bounds: LogBounds| {
                let LogBounds { lowest, next, era } = bounds;
                Refused::Refusal(Box::new(Kind::Offset(v1::RefusedOffset { offset, lowest, next, era })))
            };
            return match reader.page(from, request.to, limit, bytes) {
                // A replica that may lag behind may not have come so far.
                Ok(LogPage { bounds, .. }) | Err(Error::NoSuchOffset { bounds, .. })
                    if level != ReadLevel::Linearizable && behind(&request, from, bounds) =>
                {
                    Ok(LogPage { records: Vec::new(), bounds, index: 0 })
                }
                Ok(page) if request.era != 0 && request.era != page.bounds.era => {
                    Err(gone(from, page.bounds))
                }
                Ok(page) => Ok(page),
                // The lowest offset has moved between the two looks.
                Err(Error::NoSuchOffset { .. }) if request.from.is_none() || request.bounds_only => continue,
                Err(Error::NoSuchOffset { offset, bounds, .. }) => Err(gone(offset, bounds)),
                Err(error) => Err(error.into()),
            };
        }
    })
    .await?
}

/// Whether a log as a replica has it is older than what the reader has seen elsewhere.
fn behind(request: &v1::ReadLogRequest, from: u64, bounds: LogBounds) -> bool {
    match request.era {
        0 => from > bounds.next,
        era => (era, from) > (bounds.era, bounds.next),
    }
}

/// Waits for something to be applied. A read of the latest is not left waiting at a replica that does not lead any more:
/// nothing might ever be applied there. Nor does one hold up the end of its node.
async fn wait(
    shared: &Shared,
    group: &Group,
    level: ReadLevel,
    seen: &mut tokio::sync::watch::Receiver<LogBounds>,
    until: Instant,
) -> Result<(), Refused> {
    let (mut status, mut stop) = (group.status(), shared.stop.subscribe());
    let deposed = async {
        if level != ReadLevel::Linearizable {
            return std::future::pending().await;
        }
        match status.wait_for(|status| status.role != Role::Leader).await {
            Ok(status) => Rejected::NotLeader { group: group.id(), leader: status.leader },
            Err(_) => Rejected::Stopped(group.id()),
        }
    };
    tokio::select! {
        changed = timeout_at(until, seen.changed()) => match changed {
            Ok(Err(_)) => Err(Rejected::Stopped(group.id()).into()),
            Ok(Ok(())) | Err(_) => Ok(()),
        },
        rejected = deposed => Err(rejected.into()),
        _ = stop.wait_for(|stop| *stop) => Err(Rejected::Stopped(group.id()).into()),
    }
}

impl Shared {
    /// Reads on and on wherever the log is led, until the receiver, the node or the log is gone.
    pub(crate) fn tail_log(
        self: &Arc<Self>,
        request: v1::ReadLogRequest,
    ) -> mpsc::Receiver<Result<v1::ReadLogReply, Status>> {
        let (sender, receiver) = mpsc::channel(1);
        let (shared, mut stop) = (self.clone(), self.stop.subscribe());
        let mut next = v1::ReadLogRequest {
            wait_ms: WAIT_MOST_MS,
            epoch: 0,
            direct: false,
            hops: 0,
            bounds_only: false,
            ..request
        };
        tokio::spawn(async move {
            loop {
                let reply = tokio::select! {
                    reply = shared.route(next.clone()) => reply,
                    () = sender.closed() => return,
                    _ = stop.wait_for(|stop| *stop) => return,
                };
                let (ends, reply) = match reply {
                    Ok(reply) => {
                        let again = reply.refusal.as_ref().is_none_or(passes);
                        if let (None, Some(bounds)) = (&reply.refusal, reply.bounds) {
                            next.from = Some(reply.first + reply.records.len() as u64);
                            next.era = bounds.era;
                        }
                        let at_end = next.to.is_some_and(|to| next.from.is_some_and(|from| from >= to));
                        if again && reply.records.is_empty() && !at_end {
                            if reply.refusal.is_some() {
                                sleep(PAUSE).await;
                            }
                            continue;
                        }
                        (!again || at_end, Ok(reply))
                    }
                    Err(status) => (true, Err(status)),
                };
                if !shared.hand_over(&sender, reply).await || ends {
                    return;
                }
            }
        });
        receiver
    }
}

/// Whether what a read was refused for passes by itself.
fn passes(refusal: &Refusal) -> bool {
    matches!(
        refusal.kind,
        Some(
            Kind::NotLeader(_) | Kind::NotHere(_) | Kind::StaleEpoch(_) | Kind::Busy(_) | Kind::Ambiguous(_)
        )
    )
}
