//! The giving side: views of this node's state machines, cut into chunks.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use bytes::{Bytes, BytesMut};
use pontoon_proto::{GroupId, NodeId, v1};

use super::{FORMAT, cut, put_row};
use crate::{
    apply::SnapshotRequest,
    machine::{MachineError, SnapshotSource},
};

/// Ticks after which a view that nobody reads is dropped.
const VIEW_IDLE_TICKS: u64 = 600;
/// Rows are hashed in pieces of this size: row by row the hash takes several times as long.
const HASH_BYTES: usize = 128 << 10;
/// Chunks that are read before they are asked for, over all views.
const MOST_AHEAD: usize = 4;

/// What the server is asked.
#[allow(clippy::large_enum_variant, reason = "a few are made per snapshot")]
pub(crate) enum ServeTask {
    /// Cuts a fresh view and answers with its manifest.
    Publish { request: SnapshotRequest, source: Arc<dyn SnapshotSource>, mark: v1::Mark, descriptor: Bytes },
    /// Hashes a view of the state at an index.
    Verify { group: GroupId, index: u64, source: Arc<dyn SnapshotSource> },
    /// Reads one chunk.
    Read { group: GroupId, peer: NodeId, from: u64, to: u64, request: v1::ChunkRequest },
    /// How many views may be open from now on.
    Budget { max_views: u32 },
    /// The receiver has what it wanted.
    Release { group: GroupId, receiver: u64 },
    /// Time goes on; idle views are dropped.
    Tick { ticks: u64 },
}

/// What came of a task.
#[allow(clippy::large_enum_variant, reason = "a few are made per snapshot")]
pub(crate) enum Served {
    /// An answer on its way.
    Send(NodeId, v1::PeerMessage),
    /// The hash of a state; none if it could not be read.
    Verified { group: GroupId, index: u64, hash: Option<[u8; 32]> },
}

/// A hash of all logical rows. It depends on nothing but them.
fn hash_rows(source: &dyn SnapshotSource) -> Result<[u8; 32], MachineError> {
    let mut hasher = blake3::Hasher::new();
    let mut rows = BytesMut::with_capacity(HASH_BYTES);
    source.rows(&[], &mut |key, value| {
        put_row(&mut rows, key, value);
        if rows.len() >= HASH_BYTES {
            hasher.update(&rows);
            rows.clear();
        }
        true
    })?;
    hasher.update(&rows);
    Ok(*hasher.finalize().as_bytes())
}

struct View {
    group: GroupId,
    receiver: u64,
    manifest: v1::Manifest,
    source: Arc<dyn SnapshotSource>,
    last_used: u64,
    /// The chunk that will be asked for next, as far as can be told: read while the receiver stages the one before.
    ahead: Option<(u32, Bytes)>,
}

/// Serves views of this node's state machines. Blocks on engines: runs on its own thread.
pub(crate) struct SnapshotServer {
    chunk_bytes: usize,
    max_views: u32,
    views: BTreeMap<u64, View>,
    /// Views and chunks that are worth being read ahead, the oldest first; views that are gone may be among them.
    wishes: VecDeque<(u64, u32)>,
    next_view: u64,
    ticks: u64,
}

impl SnapshotServer {
    /// `first_view` must differ between incarnations, so that a receiver never reads another view under an old number.
    pub(crate) fn new(chunk_bytes: usize, max_views: u32, first_view: u64) -> Self {
        SnapshotServer {
            chunk_bytes,
            max_views,
            views: BTreeMap::new(),
            wishes: VecDeque::new(),
            next_view: first_view,
            ticks: 0,
        }
    }

    /// Reads a chunk that a receiver will ask for next. To be called while nothing else waits. False: there is none.
    ///
    /// A receiver asks for a chunk when the last one is durable, so that a kill costs one chunk. Without this, source and
    /// receiver would work in turn.
    pub(crate) fn read_ahead(&mut self) -> bool {
        let Some((snapshot, chunk)) = self.wishes.pop_front() else { return false };
        let held = self.views.values().filter(|view| view.ahead.is_some()).count();
        if held < MOST_AHEAD
            && let Some(view) = self.views.get_mut(&snapshot)
        {
            // What cannot be read is found again, and told, when it is asked for.
            view.ahead = view.chunk(chunk).ok().map(|data| (chunk, data));
        }
        true
    }

    pub(crate) fn run(&mut self, task: ServeTask) -> Option<Served> {
        match task {
            ServeTask::Tick { ticks } => {
                self.ticks += ticks;
                let horizon = self.ticks.saturating_sub(VIEW_IDLE_TICKS);
                self.views.retain(|_, view| view.last_used >= horizon);
                None
            }
            ServeTask::Verify { group, index, source } => {
                let hash = hash_rows(source.as_ref());
                if let Err(error) = &hash {
                    tracing::warn!(%group, index, %error, "a state could not be read to be verified");
                }
                Some(Served::Verified { group, index, hash: hash.ok() })
            }
            ServeTask::Budget { max_views } => {
                self.max_views = max_views;
                None
            }
            ServeTask::Release { group, receiver } => {
                self.release(group, receiver);
                None
            }
            ServeTask::Publish { request, source, mark, descriptor } => {
                let known = self.views.values_mut().find(|view| view.is_of(&request));
                if let Some(view) = known.filter(|view| view.manifest.pull == request.pull) {
                    // It asked once more while its manifest was made, or did not get it.
                    view.last_used = self.ticks;
                    let body = v1::peer_message::Body::Manifest(view.manifest.clone());
                    return Some(answer(&request, body));
                }
                // One view per receiver and group: a new pull means that the old one was given up.
                self.release(request.group, request.receiver);
                let cut = match self.views.len() < self.max_views.max(1) as usize {
                    true => cut(source.as_ref(), self.chunk_bytes).map_err(|error| error.to_string()),
                    false => Err(format!("{} states are being given away here already", self.views.len())),
                };
                let body = match cut {
                    Ok(chunks) => {
                        let snapshot = self.next_view;
                        self.next_view += 1;
                        let total_bytes = chunks.iter().map(|c| c.bytes).sum();
                        let manifest = v1::Manifest {
                            format: FORMAT,
                            pull: request.pull,
                            group: request.group.0,
                            snapshot,
                            mark: Some(mark),
                            chunks,
                            total_bytes,
                            descriptor,
                        };
                        let view = View {
                            group: request.group,
                            receiver: request.receiver,
                            manifest: manifest.clone(),
                            source,
                            last_used: self.ticks,
                            ahead: None,
                        };
                        self.views.insert(snapshot, view);
                        self.wishes.push_back((snapshot, 0));
                        v1::peer_message::Body::Manifest(manifest)
                    }
                    Err(reason) => refuse(request.pull, reason),
                };
                Some(answer(&request, body))
            }
            ServeTask::Read { group, peer, from, to, request } => {
                let body = match self.read(group, &request) {
                    Ok(data) => v1::peer_message::Body::Chunk(v1::Chunk {
                        pull: request.pull,
                        chunk: request.chunk,
                        data,
                    }),
                    Err(reason) => refuse(request.pull, reason),
                };
                Some(Served::Send(peer, v1::PeerMessage { group: group.0, from, to, body: Some(body) }))
            }
        }
    }

    fn release(&mut self, group: GroupId, receiver: u64) {
        self.views.retain(|_, view| (view.group, view.receiver) != (group, receiver));
    }

    fn read(&mut self, group: GroupId, request: &v1::ChunkRequest) -> Result<Bytes, String> {
        let view = self
            .views
            .get_mut(&request.snapshot)
            .filter(|view| view.group == group)
            .ok_or("the view is gone; ask for a new manifest")?;
        view.last_used = self.ticks;
        let chunk = request.chunk;
        let data = match view.ahead.take().filter(|(ahead, _)| *ahead == chunk) {
            Some((_, data)) => data,
            None => view.chunk(chunk)?,
        };
        self.wishes.retain(|(wished, _)| *wished != request.snapshot);
        if (chunk as usize) + 1 < view.manifest.chunks.len() {
            self.wishes.push_back((request.snapshot, chunk + 1));
        }
        Ok(data)
    }
}

impl View {
    fn chunk(&self, chunk: u32) -> Result<Bytes, String> {
        let at = chunk as usize;
        let chunks = &self.manifest.chunks;
        let info = chunks.get(at).ok_or("there is no such chunk")?;
        let end = chunks.get(at + 1).map(|next| next.first_key.clone());
        let mut data = BytesMut::with_capacity(info.bytes as usize);
        self.source
            .rows(&info.first_key, &mut |key, value| {
                if end.as_ref().is_some_and(|end| key >= end.as_ref()) {
                    return false;
                }
                put_row(&mut data, key, value);
                true
            })
            .map_err(|error| error.to_string())?;
        Ok(data.freeze())
    }

    fn is_of(&self, request: &SnapshotRequest) -> bool {
        (self.group, self.receiver) == (request.group, request.receiver)
    }
}

fn answer(request: &SnapshotRequest, body: v1::peer_message::Body) -> Served {
    let (group, from, to) = (request.group.0, request.replica, request.receiver);
    Served::Send(request.peer, v1::PeerMessage { group, from, to, body: Some(body) })
}

fn refuse(pull: u64, reason: String) -> v1::peer_message::Body {
    v1::peer_message::Body::PullRefused(v1::PullRefused { pull, reason })
}

#[cfg(test)]
mod tests {
    use super::{
        super::tests::{Rows, publish, said, source},
        *,
    };

    #[test]
    fn so_many_views_are_open_at_most_and_one_per_receiver() {
        let mut server = SnapshotServer::new(4 << 10, 2, 1);
        let ask = |server: &mut SnapshotServer, receiver| {
            let request = SnapshotRequest {
                group: GroupId(7),
                peer: NodeId::new(2).unwrap(),
                receiver,
                replica: 2,
                pull: 5,
                min_index: 0,
            };
            let (mark, descriptor) = (v1::Mark::default(), Bytes::new());
            let task = ServeTask::Publish { request, source: source(3), mark, descriptor };
            matches!(said(server, task), Some(v1::peer_message::Body::Manifest(_)))
        };
        assert!(ask(&mut server, 1) && ask(&mut server, 1) && ask(&mut server, 3));
        assert!(!ask(&mut server, 4), "refused, and asked elsewhere");
        server.run(ServeTask::Release { group: GroupId(7), receiver: 3 });
        assert!(ask(&mut server, 4));
        server.run(ServeTask::Budget { max_views: 3 });
        assert!(ask(&mut server, 3));
    }

    #[test]
    fn a_hash_tells_every_difference_between_rows() {
        let hash = |rows: &[(&str, &str)]| {
            let rows = rows.iter().map(|(k, v)| (k.as_bytes().to_vec(), v.as_bytes().to_vec()));
            hash_rows(&Rows(rows.collect())).unwrap()
        };
        let all = [hash(&[]), hash(&[("a", "b")]), hash(&[("ab", "")]), hash(&[("a", ""), ("b", "")])];
        assert_eq!(all.iter().collect::<std::collections::BTreeSet<_>>().len(), all.len());
        assert_eq!(hash(&[("a", "b")]), all[1]);
    }

    #[test]
    fn idle_views_are_dropped() {
        let mut server = SnapshotServer::new(4 << 10, 8, 1);
        let manifest = publish(&mut server, source(10));
        server.run(ServeTask::Tick { ticks: VIEW_IDLE_TICKS + 1 });
        let request = v1::ChunkRequest { pull: 5, snapshot: manifest.snapshot, chunk: 0 };
        assert!(server.read(GroupId(7), &request).is_err());
    }

    #[test]
    fn what_is_read_ahead_is_what_is_asked_for_and_the_last_chunk_has_no_next() {
        let mut server = SnapshotServer::new(64, 8, 1);
        let manifest = publish(&mut server, source(12));
        let chunks = manifest.chunks.len() as u32;
        assert!(chunks > 3);
        let read = |server: &mut SnapshotServer, chunk| {
            let request = v1::ChunkRequest { pull: 5, snapshot: manifest.snapshot, chunk };
            server.read(GroupId(7), &request).unwrap()
        };
        let ahead = |server: &SnapshotServer| server.views.values().next().unwrap().ahead.clone();
        let plain: Vec<Bytes> = (0..chunks).map(|chunk| read(&mut server, chunk)).collect();
        assert!(!server.read_ahead(), "behind the last one is nothing");
        for chunk in 0..chunks {
            assert_eq!(read(&mut server, chunk), plain[chunk as usize]);
            assert_eq!(server.read_ahead(), chunk + 1 < chunks);
            assert_eq!(ahead(&server).map(|(next, _)| next), (chunk + 1 < chunks).then_some(chunk + 1));
        }
        // Whoever holds a chunk already passes it over.
        read(&mut server, 0);
        assert!(server.read_ahead());
        assert_eq!(read(&mut server, 2), plain[2]);
        assert_eq!(ahead(&server), None);
        server.run(ServeTask::Release { group: GroupId(7), receiver: 1 });
        assert!(server.read_ahead() && !server.read_ahead(), "of a view that is gone");
    }
}
