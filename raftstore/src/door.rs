//! The way into a core loop, and what of it is taken first.

#![expect(clippy::disallowed_methods, reason = "waits for inputs or for the next tick")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use crossbeam_channel::{Receiver, RecvError, Sender};
use pontoon_proto::{
    GroupId, NodeId,
    v1::{PeerMessage, peer_message::Body},
};
use tokio::sync::oneshot;

use crate::effects::{Answer, Input, Token};

/// Inputs waiting in front of a loop above which proposals are answered Busy.
const QUEUE_LIMIT: usize = 65_536;

/// Bytes of entries and chunks from peers waiting in front of a loop above which more of them are dropped; peers repeat
/// them. What is small is never dropped, so that a flood of data costs no heartbeat.
const PEER_LIMIT_BYTES: u64 = 64 << 20;

/// What a loop thread receives.
pub(crate) enum ToLoop {
    Input(Input),
    /// An input whose answer goes to a waiting caller.
    Ask(Input, Token, oneshot::Sender<Answer>),
    Stop,
}

/// The way into a loop. Sending never blocks; a loop is gone only when the runtime stops, and nobody waits for it then.
#[derive(Clone)]
pub(crate) struct Door {
    /// Taken before all others: what the log and the appliers report, words of nodes, and the urgent group.
    first: Sender<ToLoop>,
    rest: Sender<ToLoop>,
    /// Bytes of peers' entries and chunks that wait.
    peer_bytes: Arc<AtomicU64>,
    /// Messages of peers that were dropped, counted.
    dropped: Arc<AtomicU64>,
    urgent: Option<GroupId>,
}

/// The loop's side of its [`Door`].
pub(crate) struct Inbox {
    first: Receiver<ToLoop>,
    rest: Receiver<ToLoop>,
    peer_bytes: Arc<AtomicU64>,
}

pub(crate) fn door(urgent: Option<GroupId>) -> (Door, Inbox) {
    let ((first, first_inputs), (rest, rest_inputs)) =
        (crossbeam_channel::unbounded(), crossbeam_channel::unbounded());
    let peer_bytes = Arc::new(AtomicU64::new(0));
    let inbox = Inbox { first: first_inputs, rest: rest_inputs, peer_bytes: peer_bytes.clone() };
    (Door { first, rest, peer_bytes, dropped: Arc::default(), urgent }, inbox)
}

impl Door {
    pub(crate) fn first(&self, input: Input) {
        let _ = self.first.send(ToLoop::Input(input));
    }

    /// What concerns a group, in order with all else that does.
    pub(crate) fn to_group(&self, group: GroupId, message: ToLoop) {
        let end = if self.urgent == Some(group) { &self.first } else { &self.rest };
        let _ = end.send(message);
    }

    pub(crate) fn peer(&self, from: NodeId, message: PeerMessage) {
        let bytes = bulk_bytes(&message);
        if bytes > 0 && self.peer_bytes.fetch_add(bytes, Ordering::Relaxed) > PEER_LIMIT_BYTES {
            self.peer_bytes.fetch_sub(bytes, Ordering::Relaxed);
            self.dropped.fetch_add(1, Ordering::Relaxed);
            tracing::debug!(%from, group = message.group, bytes, "too much waits; a message is dropped");
            return;
        }
        self.to_group(GroupId(message.group), ToLoop::Input(Input::Peer { from, message }));
    }

    /// Whether so much waits that commands are refused.
    pub(crate) fn is_full(&self) -> bool {
        self.rest.len() > QUEUE_LIMIT
    }

    /// Inputs that wait, bytes of peers among them, and messages of peers that were dropped so far.
    pub(crate) fn waiting(&self) -> (u64, u64, u64) {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ((self.first.len() + self.rest.len()) as u64, get(&self.peer_bytes), get(&self.dropped))
    }

    /// Ends the loop, behind what was asked before.
    pub(crate) fn stop(&self) {
        let _ = self.rest.send(ToLoop::Stop);
    }
}

impl Inbox {
    /// The next input, without waiting: first things first.
    pub(crate) fn try_next(&self) -> Option<ToLoop> {
        self.first.try_recv().or_else(|_| self.rest.try_recv()).ok()
    }

    /// Waits for the next input, until `deadline`.
    pub(crate) fn next(&self, deadline: Instant) -> Result<Option<ToLoop>, RecvError> {
        if let Some(next) = self.try_next() {
            return Ok(Some(next));
        }
        crossbeam_channel::select! {
            recv(self.first) -> next => next.map(Some),
            recv(self.rest) -> next => next.map(Some),
            default(deadline.saturating_duration_since(Instant::now())) => Ok(None),
        }
    }

    pub(crate) fn taken(&self, message: &ToLoop) {
        if let ToLoop::Input(Input::Peer { message, .. }) = message {
            let bytes = bulk_bytes(message);
            if bytes > 0 {
                self.peer_bytes.fetch_sub(bytes, Ordering::Relaxed);
            }
        }
    }
}

/// The bytes of entries or of a chunk in a message.
fn bulk_bytes(message: &PeerMessage) -> u64 {
    match &message.body {
        Some(Body::Raft(raft)) => raft.entries.iter().map(|entry| entry.data.len() as u64).sum(),
        Some(Body::Chunk(chunk)) => chunk.data.len() as u64,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use pontoon_proto::v1;

    use super::*;

    fn entries(group: u64, bytes: usize) -> PeerMessage {
        let entry = v1::WireEntry { data: vec![0; bytes].into(), ..Default::default() };
        let raft = v1::RaftMessage { entries: vec![entry], ..Default::default() };
        PeerMessage { group, from: 1, to: 2, body: Some(Body::Raft(raft)) }
    }

    fn drain(inbox: &Inbox) -> Vec<u64> {
        std::iter::from_fn(|| inbox.try_next())
            .map(|message| {
                inbox.taken(&message);
                match message {
                    ToLoop::Input(Input::Peer { message, .. }) => message.group,
                    _ => 0,
                }
            })
            .collect()
    }

    #[test]
    fn a_flood_of_entries_is_cut_off_and_heartbeats_pass() {
        let (door, inbox) = door(None);
        let peer = NodeId::new(1).unwrap();
        for _ in 0..1000 {
            door.peer(peer, entries(5, 1 << 20));
        }
        door.peer(peer, entries(6, 0));
        let taken = drain(&inbox);
        assert_eq!(taken.last(), Some(&6));
        assert_eq!(taken.len() as u64 - 1, PEER_LIMIT_BYTES / (1 << 20) + 1);
        // What was taken makes room.
        door.peer(peer, entries(5, 1 << 20));
        assert_eq!(drain(&inbox), [5]);
    }

    #[test]
    fn what_the_log_says_and_the_urgent_group_come_first() {
        let (door, inbox) = door(Some(GroupId(1)));
        let peer = NodeId::new(1).unwrap();
        door.peer(peer, entries(5, 10));
        door.peer(peer, entries(1, 10));
        door.first(Input::Persisted { submission: 3 });
        door.peer(peer, entries(1, 10));
        assert_eq!(drain(&inbox), [1, 0, 1, 5]);
    }
}
