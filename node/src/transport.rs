//! Raft's way to other nodes: per peer three queues and three streams, each on a connection of its own.
//!
//! ```text
//!  core loop ── send ──> queue per (peer, class), bounded in bytes
//!                            └─ pump task ── Greeting, HelloReply, PeerBatch… ──> the peer's Peer service
//! ```
//!
//! - A connection per class: a chunk of a snapshot can fill its socket without holding up a heartbeat.
//! - A queue is bounded in bytes. What does not fit is dropped and the peer reported unreachable; Raft repeats it.
//! - Nothing is sent before both sides have accepted each other's greeting.
//! - The control stream stands to every node of the map, traffic or not: a replica acknowledges only once a quorum of its
//!   group's voters has accepted its node's greeting, and some of them never send it a message. The others are made on
//!   first use.
//! - While a peer cannot be reached its queues are emptied, so that old messages never pile up for a returning node.

use std::{
    fmt,
    sync::{
        Arc, RwLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use dashmap::DashMap;
use pontoon_proto::{
    NodeId,
    v1::{self, PeerMessage, peer_frame::Frame},
};
use pontoon_raftstore::{Class, MultiRaft, Transport};
use pontoon_shard::Versions;
use prost::Message;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, timeout},
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tracing::{debug, info, warn};

use crate::{
    api::peer_client::PeerClient,
    limits::{MESSAGE_LIMIT_BYTES, PEER_FRAME_BYTES},
    map::MapCache,
    tls::Dialer,
    upgrade::{introduce, unspoken},
};

/// Messages are packed into one frame up to about this size.
const FRAME_BYTES: usize = 1 << 20;
/// Frames that wait between a pump and its socket. Few: the queue before the pump is the one that is bounded in bytes.
const FRAMES_AHEAD: usize = 4;
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a peer must take this node for a copy until that is believed. One that started again elsewhere, before its
/// old session was forgotten, is taken for its own copy for a moment.
pub(crate) const COPIED_PATIENCE: Duration = Duration::from_secs(6);
const BACKOFF_FIRST: Duration = Duration::from_millis(20);
const BACKOFF_MOST: Duration = Duration::from_millis(500);

fn queue_limit_bytes(class: Class) -> usize {
    match class {
        Class::Control => 8 << 20,
        Class::Append => 64 << 20,
        Class::Snapshot => 32 << 20,
    }
}

/// The number of a class in a [`v1::Greeting`].
pub(crate) fn class_number(class: Class) -> u32 {
    match class {
        Class::Control => 0,
        Class::Append => 1,
        Class::Snapshot => 2,
    }
}

/// Implements [`Transport`] over gRPC streams.
pub(crate) struct PeerTransport {
    inner: Arc<Inner>,
}

struct Inner {
    own: NodeId,
    versions: Versions,
    map: Arc<MapCache>,
    dialer: Dialer,
    /// Set once the runtime is open, emptied at shutdown: the runtime owns the transport, not the other way round.
    raft: RwLock<Option<MultiRaft>>,
    links: DashMap<NodeId, Arc<[Link; 3]>>,
    runtime: tokio::runtime::Handle,
    stop: watch::Sender<bool>,
    /// Why this node must not go on: a peer knows a later disk of it.
    copied: watch::Sender<Option<String>>,
}

struct Link {
    queue: mpsc::UnboundedSender<Packet>,
    queued_bytes: Arc<AtomicUsize>,
    connected: Arc<AtomicBool>,
    sent_bytes: Arc<AtomicU64>,
    dropped: AtomicU64,
}

/// How a stream to a peer stands, and what was counted on it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LinkView {
    pub(crate) peer: NodeId,
    pub(crate) class: Class,
    pub(crate) connected: bool,
    pub(crate) queued_bytes: usize,
    pub(crate) sent_bytes: u64,
    /// Batches that found the queue full.
    pub(crate) dropped: u64,
}

struct Packet {
    messages: Vec<PeerMessage>,
    bytes: usize,
}

impl fmt::Debug for PeerTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerTransport").field("own", &self.inner.own).finish_non_exhaustive()
    }
}

impl PeerTransport {
    /// Must be called within a tokio runtime; the pumps run there.
    pub(crate) fn new(own: NodeId, versions: Versions, map: Arc<MapCache>, dialer: Dialer) -> Self {
        PeerTransport {
            inner: Arc::new(Inner {
                own,
                versions,
                map,
                dialer,
                raft: RwLock::new(None),
                links: DashMap::new(),
                runtime: tokio::runtime::Handle::current(),
                stop: watch::Sender::new(false),
                copied: watch::Sender::new(None),
            }),
        }
    }

    /// Tells where greetings are checked and failures reported. Before this call nothing is sent.
    pub(crate) fn attach(&self, raft: MultiRaft) {
        *self.inner.raft.write().expect("never poisoned: held only to assign") = Some(raft);
    }

    /// Ends all streams and lets go of the runtime.
    pub(crate) fn stop(&self) {
        self.inner.stop.send_replace(true);
        self.inner.links.clear();
        *self.inner.raft.write().expect("never poisoned: held only to assign") = None;
    }

    /// Opens the control stream to every node of the map, as it grows. Ends with the transport.
    pub(crate) async fn greet_all(self: Arc<Self>) {
        let (mut views, mut stop) = (self.inner.map.subscribe(), self.inner.stop.subscribe());
        loop {
            let view = views.borrow_and_update().clone();
            let peers = view.present().filter_map(|node| NodeId::new(node.id).ok());
            for peer in peers.filter(|&peer| peer != self.inner.own) {
                self.inner.links(peer);
            }
            tokio::select! {
                changed = views.changed() => if changed.is_err() { return },
                _ = stop.wait_for(|stop| *stop) => return,
            }
        }
    }

    /// Somebody who knows says that this node runs from a copy or an old image of its disk.
    pub(crate) fn is_copied(&self, reason: String) {
        self.inner.copied.send_replace(Some(reason));
    }

    /// Waits until this node is known to run from a copy or an old image of its disk, and says how.
    pub(crate) async fn copied(&self) -> String {
        let mut copied = self.inner.copied.subscribe();
        let reason = copied.wait_for(Option::is_some).await.map(|reason| (*reason).clone());
        match reason {
            Ok(Some(reason)) => reason,
            _ => std::future::pending().await,
        }
    }

    /// The streams to all peers, in the order of their ids.
    pub(crate) fn links(&self) -> Vec<LinkView> {
        let mut views = Vec::new();
        for entry in &self.inner.links {
            views.extend(Class::ALL.into_iter().zip(entry.value().iter()).map(|(class, link)| LinkView {
                peer: *entry.key(),
                class,
                connected: link.connected.load(Ordering::Relaxed),
                queued_bytes: link.queued_bytes.load(Ordering::Relaxed),
                sent_bytes: link.sent_bytes.load(Ordering::Relaxed),
                dropped: link.dropped.load(Ordering::Relaxed),
            }));
        }
        views.sort_by_key(|view| (view.peer, class_number(view.class)));
        views
    }

    /// Whether the control stream to a peer stands.
    pub(crate) fn reaches(&self, peer: NodeId) -> bool {
        peer == self.inner.own
            || self.inner.links.get(&peer).is_some_and(|links| links[0].connected.load(Ordering::Relaxed))
    }
}

impl Transport for PeerTransport {
    fn send(&self, to: NodeId, class: Class, messages: Vec<PeerMessage>) {
        if messages.is_empty() || to == self.inner.own || *self.inner.stop.borrow() {
            return;
        }
        let links = self.inner.links(to);
        let link = &links[class_number(class) as usize];
        let bytes = messages.iter().map(Message::encoded_len).sum::<usize>();
        if link.queued_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes > queue_limit_bytes(class) {
            link.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
            link.dropped.fetch_add(1, Ordering::Relaxed);
            self.inner.unreachable(to);
            return;
        }
        if link.queue.send(Packet { messages, bytes }).is_err() {
            link.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
    }
}

impl Inner {
    fn raft(&self) -> Option<MultiRaft> {
        self.raft.read().expect("never poisoned: held only to assign").clone()
    }

    fn unreachable(&self, peer: NodeId) {
        if let Some(raft) = self.raft() {
            raft.unreachable(peer);
        }
    }

    fn links(self: &Arc<Self>, peer: NodeId) -> Arc<[Link; 3]> {
        if let Some(links) = self.links.get(&peer) {
            return links.clone();
        }
        self.links
            .entry(peer)
            .or_insert_with(|| Arc::new(Class::ALL.map(|class| self.start(peer, class))))
            .clone()
    }

    fn start(self: &Arc<Self>, peer: NodeId, class: Class) -> Link {
        let (queue, packets) = mpsc::unbounded_channel();
        let (queued_bytes, connected) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let sent_bytes = Arc::new(AtomicU64::new(0));
        let pump = Pump {
            inner: self.clone(),
            peer,
            class,
            packets,
            queued_bytes: queued_bytes.clone(),
            connected: connected.clone(),
            sent_bytes: sent_bytes.clone(),
        };
        let mut stop = self.stop.subscribe();
        self.runtime.spawn(async move {
            tokio::select! {
                () = pump.run() => {}
                _ = stop.wait_for(|stop| *stop) => {}
            }
        });
        Link { queue, queued_bytes, connected, sent_bytes, dropped: AtomicU64::new(0) }
    }
}

/// Carries one queue to one peer, connecting as often as it takes.
struct Pump {
    inner: Arc<Inner>,
    peer: NodeId,
    class: Class,
    packets: mpsc::UnboundedReceiver<Packet>,
    queued_bytes: Arc<AtomicUsize>,
    connected: Arc<AtomicBool>,
    sent_bytes: Arc<AtomicU64>,
}

/// Why a stream was not made or ended.
enum Ended {
    /// The queue's owner is gone.
    Stopped,
    Broken(String),
    Refused(String),
    /// The peer says that this node runs from a copy or an old image of its disk.
    Copied(String),
}

impl Pump {
    async fn run(mut self) {
        let mut backoff = BACKOFF_FIRST;
        let mut complained = false;
        let mut copied_since = None;
        loop {
            let first = match self.greets() {
                true => match self.packets.try_recv() {
                    Ok(first) => Some(first),
                    Err(mpsc::error::TryRecvError::Empty) => None,
                    Err(mpsc::error::TryRecvError::Disconnected) => return,
                },
                // Nothing to say, nobody to call.
                false => match self.packets.recv().await {
                    Some(first) => Some(first),
                    None => return,
                },
            };
            let bytes = first.as_ref().map_or(0, |first| first.bytes);
            self.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);

            let (ended, was_connected) = match self.connect().await {
                Ok((frames, mut answers)) => {
                    self.connected.store(true, Ordering::Relaxed);
                    info!(peer = %self.peer, class = ?self.class, "stream to peer stands");
                    let ended = self.carry(first, &frames, &mut answers).await;
                    self.connected.store(false, Ordering::Relaxed);
                    (ended, true)
                }
                Err(ended) => (ended, false),
            };
            if was_connected {
                (backoff, complained) = (BACKOFF_FIRST, false);
            }
            match &ended {
                Ended::Copied(reason) => {
                    let since = *copied_since.get_or_insert_with(Instant::now);
                    if since.elapsed() >= COPIED_PATIENCE {
                        self.inner.copied.send_replace(Some(reason.clone()));
                    }
                }
                _ => copied_since = None,
            }
            match ended {
                Ended::Stopped => return,
                Ended::Refused(reason) | Ended::Copied(reason) if !complained => {
                    warn!(peer = %self.peer, class = ?self.class, reason, "greeting was refused");
                    complained = true;
                }
                Ended::Broken(reason) if !complained => {
                    info!(peer = %self.peer, class = ?self.class, reason, "no stream to peer; trying on");
                    complained = true;
                }
                Ended::Refused(reason) | Ended::Copied(reason) | Ended::Broken(reason) => {
                    debug!(peer = %self.peer, class = ?self.class, reason, "no stream to peer");
                }
            }
            self.inner.unreachable(self.peer);
            sleep(backoff).await;
            backoff = (backoff * 2).min(BACKOFF_MOST);
            // Keep what arrived last, if anything did: it makes the next attempt start at once.
            self.discard_all_but_last();
        }
    }

    /// Whether the stream is made without being asked: the control stream to a node that belongs to the cluster.
    fn greets(&self) -> bool {
        let view = self.inner.map.view();
        let present = view.node(self.peer).is_some_and(|node| node.state() != v1::NodeState::Removed);
        self.class == Class::Control && present
    }

    fn discard_all_but_last(&mut self) {
        while self.packets.len() > 1 {
            let Ok(packet) = self.packets.try_recv() else { return };
            self.queued_bytes.fetch_sub(packet.bytes, Ordering::Relaxed);
        }
    }

    async fn connect(&self) -> Result<(mpsc::Sender<v1::PeerFrame>, tonic::Streaming<v1::PeerFrame>), Ended> {
        let broken = |what: &dyn fmt::Display| Ended::Broken(what.to_string());
        let raft = self.inner.raft().ok_or_else(|| broken(&"the runtime is not open"))?;
        let address =
            self.inner.map.address(self.peer).ok_or_else(|| broken(&"its address is not known yet"))?;
        let channel = self.inner.dialer.to_node(&address, self.peer).await.map_err(|error| {
            broken(&format!(
                "{address}: {}",
                std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string)
            ))
        })?;
        let mut client = PeerClient::new(channel)
            .max_decoding_message_size(MESSAGE_LIMIT_BYTES)
            .max_encoding_message_size(PEER_FRAME_BYTES);

        let (frames, outgoing) = mpsc::channel(FRAMES_AHEAD);
        let hello = introduce(raft.hello(), self.inner.versions);
        let greeting = v1::Greeting { hello: Some(hello), class: class_number(self.class) };
        let greeting = v1::PeerFrame { frame: Some(Frame::Greeting(greeting)) };
        frames.try_send(greeting).expect("the channel is empty and its receiver is at hand");
        let greet = async {
            let mut answers = client.stream(ReceiverStream::new(outgoing)).await?.into_inner();
            let first = answers.message().await?;
            Ok::<_, tonic::Status>((answers, first))
        };
        let (answers, first) = timeout(GREETING_TIMEOUT, greet)
            .await
            .map_err(|_| broken(&format!("{address} does not answer the greeting")))?
            .map_err(|status| broken(&format!("{address}: {}", status.message())))?;

        let Some(Frame::Reply(reply)) = first.and_then(|frame| frame.frame) else {
            return Err(broken(&format!("{address} does not speak this protocol")));
        };
        if !reply.refused.is_empty() {
            return Err(match reply.copied {
                true => Ended::Copied(reply.refused),
                false => Ended::Refused(reply.refused),
            });
        }
        let hello = reply.hello.ok_or_else(|| broken(&format!("{address} does not say who it is")))?;
        if hello.node != self.peer.get() {
            return Err(Ended::Refused(format!("at {address} is node {}, not {}", hello.node, self.peer)));
        }
        if let Some(reason) = unspoken(&hello, &self.inner.map.view()) {
            return Err(Ended::Refused(reason));
        }
        // The check makes the peer's token durable, so it blocks.
        let checked = raft.clone();
        let verdict = tokio::task::spawn_blocking(move || checked.check_hello(&hello))
            .await
            .map_err(|error| broken(&error))?;
        if !verdict.refused.is_empty() {
            return Err(Ended::Refused(verdict.refused));
        }
        raft.accepted_by(self.peer);
        Ok((frames, answers))
    }

    /// Sends until the stream or the queue ends.
    async fn carry(
        &mut self,
        first: Option<Packet>,
        frames: &mpsc::Sender<v1::PeerFrame>,
        answers: &mut tonic::Streaming<v1::PeerFrame>,
    ) -> Ended {
        let mut next = first;
        loop {
            let packet = match next.take() {
                Some(packet) => packet,
                None => {
                    tokio::select! {
                        packet = self.packets.recv() => {
                            let Some(packet) = packet else { return Ended::Stopped };
                            self.queued_bytes.fetch_sub(packet.bytes, Ordering::Relaxed);
                            packet
                        }
                        ended = ended(answers) => return ended,
                    }
                }
            };
            let Packet { mut messages, mut bytes } = packet;
            while bytes < FRAME_BYTES {
                let Ok(more) = self.packets.try_recv() else { break };
                self.queued_bytes.fetch_sub(more.bytes, Ordering::Relaxed);
                if bytes + more.bytes > MESSAGE_LIMIT_BYTES / 2 {
                    next = Some(more);
                    break;
                }
                messages.extend(more.messages);
                bytes += more.bytes;
            }
            self.sent_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
            let frame = v1::PeerFrame { frame: Some(Frame::Batch(v1::PeerBatch { messages })) };
            tokio::select! {
                sent = frames.send(frame) => {
                    if sent.is_err() {
                        return Ended::Broken("the connection was closed".to_owned());
                    }
                }
                ended = ended(answers) => return ended,
            }
        }
    }
}

/// After its first answer a peer says nothing more; whatever comes is the end of the stream.
async fn ended(answers: &mut tonic::Streaming<v1::PeerFrame>) -> Ended {
    match answers.next().await {
        None | Some(Ok(_)) => Ended::Broken("the peer ended the stream".to_owned()),
        Some(Err(status)) => Ended::Broken(status.message().to_owned()),
    }
}
