//! Calls that travel together: one stream to each node, and on it whatever is asked of that node at the time.
//!
//! ```text
//!  put, get ──────────> queue ── one batch of all that waits ──> the node
//!      ▲                                                           │
//!      └──────────── the open call of that id <── batches of answers
//! ```
//!
//! Nothing is held back: a call leaves as soon as the one before has been handed to the connection. Those that come in
//! between leave together.
//!
//! A stream that breaks ends all calls on it with a status, as a connection ends those that were made one by one; who asks
//! again makes a new one. A node of a version without streams is asked call by call.

use std::collections::HashMap;

use dashmap::DashMap;
use pontoon_proto::v1::{self, call::Request, reply::Reply};
use prost::Message;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, transport::Channel};

use crate::api::data_client::DataClient;

/// What one batch carries at most; calls beyond go into the next one.
const BATCH_CALLS: usize = 1_024;
const BATCH_BYTES: usize = 4 << 20;
/// Batches handed over that the connection has not taken yet.
const BATCHES_AHEAD: usize = 1;

/// The streams of a client, by address.
#[derive(Debug, Default)]
pub(super) struct Streams {
    open: DashMap<String, Stream>,
}

#[derive(Debug, Clone)]
enum Stream {
    Open(mpsc::UnboundedSender<Queued>),
    /// The node does not know of streams.
    Absent,
}

#[derive(Debug)]
struct Queued {
    request: Request,
    answer: oneshot::Sender<Result<Reply, Status>>,
}

impl Streams {
    /// Whether a node, as far as is known, takes calls together.
    pub(super) fn may_go(&self, address: &str) -> bool {
        self.open.get(address).is_none_or(|stream| matches!(*stream, Stream::Open(_)))
    }

    /// Sends a call with those that leave at the same time, and waits for its answer.
    ///
    /// # Errors
    /// As a call of its own. What becomes of a call that fails is as unknown.
    pub(super) async fn call(
        &self,
        address: &str,
        client: DataClient<Channel>,
        request: Request,
    ) -> Result<Reply, Status> {
        let (answer, answered) = oneshot::channel();
        let call = Queued { request, answer };
        let known = self.open.get(address).map(|stream| stream.clone());
        let unsent = match known {
            Some(Stream::Open(queue)) => queue.send(call).err().map(|mpsc::error::SendError(call)| call),
            Some(Stream::Absent) | None => Some(call),
        };
        if let Some(call) = unsent {
            self.begin(address, client, call);
        }
        match answered.await {
            Ok(Err(status)) if status.code() == Code::Unimplemented => {
                self.open.insert(address.to_owned(), Stream::Absent);
                Err(Status::unavailable("it takes calls one by one"))
            }
            Ok(result) => result,
            Err(_) => Err(Status::unavailable("the stream of calls broke")),
        }
    }

    /// Sends on a new stream, unless somebody else has made one meanwhile.
    fn begin(&self, address: &str, client: DataClient<Channel>, call: Queued) {
        let mut stream = self.open.entry(address.to_owned()).or_insert(Stream::Absent);
        let call = match &*stream {
            Stream::Open(queue) => match queue.send(call) {
                Ok(()) => return,
                Err(mpsc::error::SendError(call)) => call,
            },
            Stream::Absent => call,
        };
        let (queue, queued) = mpsc::unbounded_channel();
        // The receiver is at hand.
        let _ = queue.send(call);
        *stream = Stream::Open(queue);
        tokio::spawn(run(client, queued));
    }
}

/// Carries the calls of one stream until it breaks or nobody can ask any more.
async fn run(mut client: DataClient<Channel>, mut queued: mpsc::UnboundedReceiver<Queued>) {
    let (batches, outgoing) = mpsc::channel(BATCHES_AHEAD);
    let mut open = HashMap::new();
    let broken = match client.calls(ReceiverStream::new(outgoing)).await {
        Ok(answers) => carry(&mut queued, &mut open, &batches, answers.into_inner()).await,
        Err(status) => status,
    };
    queued.close();
    let unsent = std::iter::from_fn(|| queued.try_recv().ok()).map(|call| call.answer);
    for answer in open.into_values().chain(unsent) {
        // Whoever does not wait any more need not hear of it.
        let _ = answer.send(Err(broken.clone()));
    }
}

type Open = HashMap<u64, oneshot::Sender<Result<Reply, Status>>>;

async fn carry(
    queued: &mut mpsc::UnboundedReceiver<Queued>,
    open: &mut Open,
    batches: &mpsc::Sender<v1::CallBatch>,
    mut answers: tonic::Streaming<v1::ReplyBatch>,
) -> Status {
    let mut next_id = 0;
    let mut waiting = None;
    loop {
        // Answers are taken while a batch waits for room: the node reads no more while nobody takes what it says.
        tokio::select! {
            room = batches.reserve(), if waiting.is_some() => {
                let Ok(room) = room else { return Status::unavailable("the connection was closed") };
                room.send(gather(waiting.take(), queued, open, &mut next_id));
            }
            first = queued.recv(), if waiting.is_none() => match first {
                Some(first) => waiting = Some(first),
                None => return Status::cancelled("nobody asks any more"),
            },
            batch = answers.message() => match batch {
                Ok(Some(batch)) => batch.replies.into_iter().for_each(|reply| settle(reply, open)),
                Ok(None) => return Status::unavailable("the node ended the stream of calls"),
                Err(status) => return status,
            },
        }
    }
}

/// Everything that waits, as one batch.
fn gather(
    first: Option<Queued>,
    queued: &mut mpsc::UnboundedReceiver<Queued>,
    open: &mut Open,
    next_id: &mut u64,
) -> v1::CallBatch {
    let (mut calls, mut bytes) = (Vec::new(), 0);
    let mut next = first;
    while let Some(Queued { request, answer }) = next.take().or_else(|| queued.try_recv().ok()) {
        // Its caller may have gone since.
        if answer.is_closed() {
            continue;
        }
        *next_id += 1;
        let call = v1::Call { id: *next_id, request: Some(request) };
        bytes += call.encoded_len();
        open.insert(call.id, answer);
        calls.push(call);
        if calls.len() == BATCH_CALLS || bytes >= BATCH_BYTES {
            break;
        }
    }
    v1::CallBatch { calls }
}

fn settle(reply: v1::Reply, open: &mut Open) {
    let Some(answer) = open.remove(&reply.id) else { return };
    // Whoever does not wait any more need not hear of it.
    let _ = answer.send(match reply.reply {
        Some(Reply::Failed(failed)) => Err(Status::new(Code::from_i32(failed.code), failed.message)),
        Some(reply) => Ok(reply),
        None => Err(Status::internal("an answer of a kind that this version does not know")),
    });
}
