//! The receiving end of Raft's streams: one greeting, one answer, then batches.

use std::{sync::Arc, time::Duration};

use pontoon_proto::{
    NodeId,
    v1::{self, peer_frame::Frame},
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};
use tracing::{debug, warn};

use crate::{
    api::peer_server::Peer,
    caller::Caller,
    shared::Shared,
    turned_away::Why,
    upgrade::{introduce, unspoken},
};

const GREETING_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves `pontoon.v1.Peer`.
#[derive(Debug)]
pub(crate) struct PeerService {
    pub(crate) shared: Arc<Shared>,
}

#[tonic::async_trait]
impl Peer for PeerService {
    type StreamStream = ReceiverStream<Result<v1::PeerFrame, Status>>;

    async fn stream(
        &self,
        request: Request<Streaming<v1::PeerFrame>>,
    ) -> Result<Response<Self::StreamStream>, Status> {
        let caller = Caller::of(request.extensions())?;
        let mut incoming = request.into_inner();
        let first = timeout(GREETING_TIMEOUT, incoming.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no greeting came"))??;
        let Some(Frame::Greeting(v1::Greeting { hello: Some(hello), .. })) =
            first.and_then(|frame| frame.frame)
        else {
            self.shared.turned_away.note(Why::Garbage);
            return Err(Status::invalid_argument("a peer stream begins with a greeting"));
        };
        if let Err(status) = caller.must_speak_for(hello.node) {
            warn!(%caller, node = hello.node, "a certificate was used to speak for another node");
            self.shared.turned_away.note(Why::Greeting);
            return Err(status);
        }
        let peer = NodeId::new(hello.node).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let (address, boot_token) = (hello.address.clone(), hello.boot_history.last().copied().unwrap_or(0));

        // The check makes the peer's boot token durable before anything is taken from it, so it blocks.
        let raft = self.shared.raft.clone();
        let mut reply = match unspoken(&hello, &self.shared.map.view()) {
            Some(refused) => v1::HelloReply { refused, hello: Some(raft.hello()), copied: false },
            None => tokio::task::spawn_blocking(move || raft.check_hello(&hello))
                .await
                .map_err(|error| Status::internal(error.to_string()))?,
        };
        reply.hello = reply.hello.map(|hello| introduce(hello, self.shared.versions));
        let refused = reply.refused.clone();

        let (answers, outgoing) = mpsc::channel(1);
        let frame = v1::PeerFrame { frame: Some(Frame::Reply(reply)) };
        answers.try_send(Ok(frame)).expect("the channel is empty and its receiver is at hand");
        if refused.is_empty() {
            self.shared.map.heard_from(peer, &address);
            tokio::spawn(receive(self.shared.clone(), peer, boot_token, incoming, answers));
        } else {
            self.shared.turned_away.note(Why::Greeting);
            warn!(%peer, address, reason = refused, "greeting refused");
        }
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

/// Delivers until the stream ends. `_answers` keeps the answering half open: its end is how the peer learns of ours.
async fn receive(
    shared: Arc<Shared>,
    peer: NodeId,
    boot_token: u64,
    mut incoming: Streaming<v1::PeerFrame>,
    _answers: mpsc::Sender<Result<v1::PeerFrame, Status>>,
) {
    let mut stop = shared.stop.subscribe();
    loop {
        let message = tokio::select! {
            message = incoming.message() => message,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        match message {
            Ok(Some(v1::PeerFrame { frame: Some(Frame::Batch(batch)) })) => {
                if !shared.raft.deliver(peer, boot_token, batch.messages) {
                    debug!(%peer, "the peer has started again; its old stream ends");
                    return;
                }
            }
            Ok(Some(_)) => {
                shared.turned_away.note(Why::Garbage);
                warn!(%peer, "a frame that is no batch; ending the stream");
                return;
            }
            Ok(None) => return,
            Err(status) => {
                if matches!(status.code(), Code::Internal | Code::OutOfRange | Code::ResourceExhausted) {
                    shared.turned_away.note(Why::Garbage);
                }
                debug!(%peer, reason = status.message(), "peer stream ended");
                return;
            }
        }
    }
}
