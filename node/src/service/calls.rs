//! Calls that share a stream: taken as they come, each answered as soon as it can be.
//!
//! What is ready at the same time leaves together, so the more calls are under way the less one of them costs; a single one
//! waits for nobody. A stream has a bounded number of calls open: beyond it nothing more is read, and the client's own
//! window holds it back.

use std::sync::Arc;

use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use pontoon_proto::v1::{self, call::Request, reply::Reply};
use prost::Message;
use tokio::sync::mpsc;
use tonic::{Status, Streaming};
use tracing::debug;

use crate::{caller::Caller, route::Routed, shared::Shared, turned_away::Why};

/// Calls of one stream that are under way here at most.
const MOST_OPEN: usize = 8_192;
/// Answers that leave together at most, and their bytes; exceeded by one answer.
const MOST_TOGETHER: usize = 1_024;
const MOST_BYTES: usize = 4 << 20;
/// Batches of answers that wait for the connection.
const BATCHES_AHEAD: usize = 2;

/// Serves a stream of calls until the client ends it or the node stops. Each call is judged by what its caller may do.
pub(super) fn serve(
    shared: Arc<Shared>,
    caller: Caller,
    incoming: Streaming<v1::CallBatch>,
) -> mpsc::Receiver<Result<v1::ReplyBatch, Status>> {
    let (answers, outgoing) = mpsc::channel(BATCHES_AHEAD);
    tokio::spawn(async move {
        let mut stop = shared.stop.subscribe();
        tokio::select! {
            () = run(&shared, &caller, incoming, answers) => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
    });
    outgoing
}

async fn run(
    shared: &Arc<Shared>,
    caller: &Caller,
    mut incoming: Streaming<v1::CallBatch>,
    answers: mpsc::Sender<Result<v1::ReplyBatch, Status>>,
) {
    let mut open: FuturesUnordered<BoxFuture<'static, v1::Reply>> = FuturesUnordered::new();
    loop {
        tokio::select! {
            batch = incoming.message(), if open.len() < MOST_OPEN => match batch {
                Ok(Some(batch)) => open.extend(batch.calls.into_iter().map(|call| answer(shared.clone(), caller, call))),
                // Whoever asked is gone; what was proposed takes its way, and is answered under its id when it is repeated.
                Ok(None) => return,
                Err(status) => return debug!(reason = status.message(), "a stream of calls ended"),
            },
            Some(reply) = open.next() => {
                let mut bytes = reply.encoded_len();
                let mut replies = vec![reply];
                while replies.len() < MOST_TOGETHER
                    && bytes < MOST_BYTES
                    && let Some(Some(reply)) = open.next().now_or_never()
                {
                    bytes += reply.encoded_len();
                    replies.push(reply);
                }
                if !shared.hand_over(&answers, Ok(v1::ReplyBatch { replies })).await {
                    return;
                }
            }
        }
    }
}

fn answer(shared: Arc<Shared>, caller: &Caller, call: v1::Call) -> BoxFuture<'static, v1::Reply> {
    let id = call.id;
    let reply = move |reply| v1::Reply { id, reply: Some(reply) };
    if let Some(Request::Write(_)) = call.request
        && let Err(status) = caller.must_write("a write")
    {
        shared.turned_away.note(Why::Denied);
        return std::future::ready(reply(failed(&status))).boxed();
    }
    match call.request {
        Some(Request::Write(write)) => {
            async move { reply(routed(&shared, write, Reply::Write).await) }.boxed()
        }
        Some(Request::Get(get)) => async move { reply(routed(&shared, get, Reply::Get).await) }.boxed(),
        None => {
            let status = Status::unimplemented("a call that this version does not know on a stream");
            std::future::ready(reply(failed(&status))).boxed()
        }
    }
}

async fn routed<R: Routed>(shared: &Arc<Shared>, request: R, reply: fn(R::Reply) -> Reply) -> Reply {
    shared.route(request).await.map_or_else(|status| failed(&status), reply)
}

fn failed(status: &Status) -> Reply {
    Reply::Failed(v1::CallFailed { code: status.code().into(), message: status.message().to_owned() })
}
