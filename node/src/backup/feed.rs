//! The taking side of one predicate's stream.

use std::{collections::VecDeque, time::Duration};

use bytes::Bytes;
use pontoon_proto::{
    ReplicaId,
    v1::{self, backup_ask::Ask, backup_reply::Reply},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::client::{Client, ClientError};

/// How long a node may take to open a point in time: longer than it waits for its leader.
const OPENING: Duration = Duration::from_secs(15);
/// Answers that wait for the network.
const ANSWERS: usize = 8;

/// A predicate as of one index, while it is read.
#[derive(Debug)]
pub(crate) struct Feed {
    /// What it is, and as of when.
    pub(crate) begun: v1::BackupBegun,
    asks: mpsc::Sender<v1::BackupAsk>,
    replies: Streaming<v1::BackupReply>,
    /// The hashes of what was asked for.
    wanted: VecDeque<(u64, blake3::Hash)>,
}

/// What a feed says.
#[derive(Debug)]
pub(crate) enum Item {
    /// The next chunk, in key order. To be answered by [`Feed::answer`].
    Cut(v1::BackupCut, blake3::Hash),
    /// The rows of a chunk that was wanted, checked.
    Chunk(blake3::Hash, Bytes),
    /// There are no more.
    End(v1::BackupEnd),
}

/// Why a feed broke.
#[derive(Debug)]
pub(crate) enum Broken {
    /// Another replica, or the same one later, may do better.
    Passes(String),
    /// The predicate is gone.
    Gone,
    /// Nothing will help.
    Refused(ClientError),
}

impl From<Status> for Broken {
    fn from(status: Status) -> Self {
        match status.code() {
            Code::NotFound => Broken::Gone,
            Code::PermissionDenied
            | Code::InvalidArgument
            | Code::FailedPrecondition
            | Code::Unimplemented => Broken::Refused(ClientError::of(&status)),
            _ => Broken::Passes(ClientError::of(&status).to_string()),
        }
    }
}

/// The nodes that hold a predicate, the best to ask first: those that follow, since those that lead have enough to do, then who
/// leads. `turn` picks among equals.
pub(crate) fn holders(view: &v1::PredicateView, turn: usize) -> Vec<u64> {
    let Some(shard) = &view.shard else { return Vec::new() };
    let members = shard.voters.iter().chain(&shard.learners);
    let mut nodes: Vec<u64> =
        members.filter_map(|id| ReplicaId::new(*id).ok()).map(|replica| replica.node().get()).collect();
    nodes.sort_unstable();
    if !nodes.is_empty() {
        let by = turn % nodes.len();
        nodes.rotate_left(by);
    }
    nodes.sort_by_key(|node| *node == view.leader_node);
    nodes
}

impl Feed {
    /// Opens a point in time on the node that listens there.
    pub(crate) async fn open(
        client: &Client,
        address: &str,
        shard: &v1::Shard,
        budget: &str,
    ) -> Result<Feed, Broken> {
        let (asks, stream) = mpsc::channel(ANSWERS);
        let open = v1::BackupOpen {
            predicate: shard.predicate.clone(),
            group: shard.group,
            budget: budget.to_owned(),
        };
        let gone = || Broken::Passes("the stream ended before its end".to_owned());
        asks.send(v1::BackupAsk { ask: Some(Ask::Open(open)) }).await.map_err(|_| gone())?;
        let mut admin = client.admin_at(address).map_err(Broken::Refused)?;
        let opening = async {
            let mut replies = admin.backup(ReceiverStream::new(stream)).await?.into_inner();
            let first = replies.message().await?;
            Ok::<_, Status>((replies, first))
        };
        let late = |_| Broken::Passes(format!("{address} did not answer within {} s", OPENING.as_secs()));
        let (replies, first) = tokio::time::timeout(OPENING, opening).await.map_err(late)??;
        match first.and_then(|first| first.reply) {
            Some(Reply::Begun(begun)) => Ok(Feed { begun, asks, replies, wanted: VecDeque::new() }),
            _ => Err(gone()),
        }
    }

    /// The next word.
    pub(crate) async fn next(&mut self) -> Result<Item, Broken> {
        let strange = |what: &str| Broken::Passes(format!("the node gave {what}"));
        let message = self.replies.message().await?;
        match message.and_then(|message| message.reply) {
            Some(Reply::Cut(cut)) => {
                let hash: [u8; 32] = cut.hash[..].try_into().map_err(|_| strange("a hash that is none"))?;
                Ok(Item::Cut(cut, blake3::Hash::from_bytes(hash)))
            }
            Some(Reply::Chunk(chunk)) => match self.wanted.pop_front() {
                Some((number, hash)) if number == chunk.chunk && blake3::hash(&chunk.data) == hash => {
                    Ok(Item::Chunk(hash, chunk.data))
                }
                _ => Err(strange("a chunk that does not have its hash")),
            },
            Some(Reply::End(end)) if self.wanted.is_empty() => Ok(Item::End(end)),
            _ => Err(Broken::Passes("the stream ended before its end".to_owned())),
        }
    }

    /// Says whether the chunk that was offered last is wanted.
    pub(crate) async fn answer(&mut self, cut: &v1::BackupCut, hash: blake3::Hash, want: bool) {
        if want {
            self.wanted.push_back((cut.chunk, hash));
        }
        let answer = v1::BackupAnswer { chunk: cut.chunk, want };
        // If the node is gone the next word says so.
        drop(self.asks.send(v1::BackupAsk { ask: Some(Ask::Answer(answer)) }).await);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_follows_is_asked_before_who_leads() {
        let id = |node: u64| ReplicaId::on(pontoon_proto::NodeId::new(node).unwrap(), 1).get();
        let shard = v1::Shard { voters: vec![id(1), id(2), id(3)], ..Default::default() };
        let view = v1::PredicateView { shard: Some(shard), leader_node: 2, ..Default::default() };
        assert_eq!(holders(&view, 0), [1, 3, 2]);
        assert_eq!(holders(&view, 2), [3, 1, 2]);
        assert!(holders(&v1::PredicateView::default(), 0).is_empty());
    }
}
