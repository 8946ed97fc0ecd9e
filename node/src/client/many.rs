//! The batched write path: many independent writes, together per leader.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::future::join_all;
use pontoon_proto::v1;
use tokio::time::{Instant, sleep, timeout_at};

use super::{
    Client, ClientError, Written,
    ask::{Next, Trip},
    check_name,
    place::{Missing, Place},
    session::Ticket,
    written,
};

/// What one call carries at most. A single larger write travels alone.
const CALL_BYTES: usize = 4 << 20;
const CALL_WRITES: usize = 1_024;

/// One write on its way.
struct Pending {
    at: usize,
    place: Arc<Place>,
    ticket: Option<Ticket>,
    ops: Vec<v1::WriteOp>,
    bytes: usize,
    trip: Trip,
}

impl Client {
    /// Sends many independent writes, each an atomic batch of one predicate, in as few calls as there are leaders.
    /// Each has its own outcome, in the order given. Several such calls may be in flight at once.
    ///
    /// # Errors
    /// Per write, as [`Client::put`].
    ///
    /// # Cancel safety
    /// Dropping this abandons the answers, not the writes.
    pub async fn write_many(
        &self,
        writes: Vec<(String, Vec<v1::WriteOp>)>,
    ) -> Vec<Result<Written, ClientError>> {
        let until = Instant::now() + self.deadline;
        let mut outcomes: Vec<Option<Result<Written, ClientError>>> = Vec::new();
        outcomes.resize_with(writes.len(), || None);
        let mut pending = Vec::new();
        for (at, (predicate, ops)) in writes.into_iter().enumerate() {
            if let Err(error) = check_name(&predicate) {
                outcomes[at] = Some(Err(error));
                continue;
            }
            let (place, trip) = (self.place(&predicate), Trip::new(until, true));
            let bytes = ops.iter().map(size_of).sum();
            pending.push(Pending { at, place, ticket: None, ops, bytes, trip });
        }
        while !pending.is_empty() {
            let (ready, waiting) = self.take_tickets(pending, until, &mut outcomes).await;
            pending = waiting;
            let mut pause = Duration::from_secs(1);
            for (write, end) in self.send_round(ready).await {
                match end {
                    End::Done(written) => outcomes[write.at] = Some(Ok(written)),
                    End::Failed(error) => outcomes[write.at] = Some(Err(error)),
                    End::Retry(wait) => {
                        pause = pause.min(wait);
                        pending.push(write);
                    }
                }
            }
            // Writes that only waited for a number have one now; those that were refused set the pause.
            if !pending.is_empty() && pending.iter().all(|write| write.ticket.is_some()) {
                sleep(pause).await;
            }
        }
        outcomes
            .into_iter()
            .map(|outcome| outcome.expect("each write leaves the loop with an outcome"))
            .collect()
    }

    /// Gives numbers to as many writes as there are. Whoever has one is sent before anybody waits for another, so that
    /// two callers never wait for each other's numbers.
    async fn take_tickets(
        &self,
        pending: Vec<Pending>,
        until: Instant,
        outcomes: &mut [Option<Result<Written, ClientError>>],
    ) -> (Vec<Pending>, Vec<Pending>) {
        let mut places: BTreeMap<&str, &Arc<Place>> = BTreeMap::new();
        for write in pending.iter().filter(|write| write.ticket.is_none()) {
            places.insert(&write.place.predicate, &write.place);
        }
        let opened = join_all(places.into_iter().map(async |(predicate, place)| {
            (predicate.to_owned(), self.session(place, Missing::Make, until).await)
        }));
        let sessions: BTreeMap<String, _> = opened.await.into_iter().collect();
        let (mut ready, mut waiting) = (Vec::new(), Vec::new());
        for mut write in pending {
            if write.ticket.is_none() {
                match &sessions[&write.place.predicate] {
                    Ok(session) => write.ticket = session.take(),
                    Err(error) => {
                        outcomes[write.at] = Some(Err(error.clone()));
                        continue;
                    }
                }
            }
            if write.ticket.is_some() { ready.push(write) } else { waiting.push(write) }
        }
        if ready.is_empty()
            && let Some(mut first) = waiting.pop()
        {
            match self.ticket(&first.place, Missing::Make, until).await {
                Ok(ticket) => {
                    first.ticket = Some(ticket);
                    ready.push(first);
                }
                Err(error) => outcomes[first.at] = Some(Err(error)),
            }
        }
        (ready, waiting)
    }

    /// Sends each write once, to where its leader is believed to be.
    async fn send_round(&self, ready: Vec<Pending>) -> Vec<(Pending, End)> {
        let mut calls: BTreeMap<String, Vec<Vec<Pending>>> = BTreeMap::new();
        let mut room: BTreeMap<String, usize> = BTreeMap::new();
        // A round sends what nobody is known to lead to one address, so that it travels together.
        let anybody = self.any_address();
        for write in ready {
            let address = write.place.leader().unwrap_or_else(|| anybody.clone());
            let parts = calls.entry(address.clone()).or_default();
            let left = room.entry(address).or_default();
            match parts.last_mut().filter(|part| part.len() < CALL_WRITES && write.bytes <= *left) {
                Some(part) => {
                    *left -= write.bytes;
                    part.push(write);
                }
                None => {
                    *left = CALL_BYTES.saturating_sub(write.bytes);
                    parts.push(vec![write]);
                }
            }
        }
        let sent = calls.into_iter().flat_map(|(address, parts)| {
            parts.into_iter().map(move |part| self.send_part(address.clone(), part))
        });
        join_all(sent).await.into_iter().flatten().collect()
    }

    async fn send_part(&self, address: String, part: Vec<Pending>) -> Vec<(Pending, End)> {
        let request = v1::WriteManyRequest {
            writes: part.iter().map(Pending::request).collect(),
            direct: true,
            hops: 0,
        };
        let ends = part[0].trip.sending_ends();
        let sent = match self.inner.channels.data(&address) {
            Ok(mut client) => timeout_at(ends, client.write_many(request)).await,
            Err(status) => Ok(Err(status)),
        };
        let replies = match sent {
            Ok(Ok(reply)) if reply.get_ref().replies.len() == part.len() => {
                return part
                    .into_iter()
                    .zip(reply.into_inner().replies)
                    .map(|(write, reply)| self.answered(write, &address, reply))
                    .collect();
            }
            Ok(Ok(_)) => Some(tonic::Status::internal("another number of answers than of writes")),
            Ok(Err(status)) => Some(status),
            Err(_) => None,
        };
        let broken = |mut write: Pending| {
            let next = self.broken(&mut write.trip, &write.place, &address, replies.as_ref());
            write.ended(next)
        };
        part.into_iter().map(broken).collect()
    }

    fn answered(&self, mut write: Pending, address: &str, reply: v1::WriteReply) -> (Pending, End) {
        let Some(refusal) = &reply.refusal else {
            write.place.set_leader(address);
            return (write, End::Done(written(reply)));
        };
        match self.refused(&mut write.trip, &write.place, address, refusal) {
            // As in `Client::write`: refused at its first sending, so a new number is as good as the old one.
            Next::Fail(ClientError::SessionExpired { sent_before }) => {
                if let Some(ticket) = write.ticket.as_ref() {
                    write.place.end_session(ticket);
                }
                if sent_before {
                    return (write, End::Failed(ClientError::SessionExpired { sent_before }));
                }
                write.ticket = None;
                write.ended(Next::Hint)
            }
            next => write.ended(next),
        }
    }
}

enum End {
    Done(Written),
    Failed(ClientError),
    Retry(Duration),
}

impl Pending {
    fn request(&self) -> v1::WriteRequest {
        v1::WriteRequest {
            predicate: self.place.predicate.clone(),
            epoch: self.place.epoch(),
            request: self.ticket.as_ref().map(Ticket::id),
            ops: self.ops.clone(),
            direct: true,
            hops: 0,
        }
    }

    fn ended(mut self, next: Next) -> (Self, End) {
        let end = match self.trip.wait_for(next, &self.place) {
            Ok(pause) => End::Retry(pause),
            Err(error) => End::Failed(error),
        };
        (self, end)
    }
}

fn size_of(op: &v1::WriteOp) -> usize {
    use v1::write_op::Op;
    16 + match &op.op {
        Some(Op::Put(put)) => put.key.len() + put.value.len(),
        Some(Op::Delete(delete)) => delete.key.len(),
        Some(Op::Cas(cas)) => {
            let expected = match &cas.expect {
                Some(v1::write_cas::Expect::Value(value)) => value.len(),
                _ => 0,
            };
            cas.key.len() + expected + cas.new_value.as_ref().map_or(0, bytes::Bytes::len)
        }
        None => 0,
    }
}
