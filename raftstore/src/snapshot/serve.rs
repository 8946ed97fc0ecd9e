//! The giving side: views of this node's state machines, cut into chunks, and hashes of them.
//!
//! Both take a scan of a whole state. It is read a piece at a time, those of several states by turns, so that a question about one is not
//! kept waiting by the scan of another, and whoever runs this can pause between pieces.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use bytes::{Bytes, BytesMut};
use pontoon_proto::{GroupId, NodeId, v1};

use super::{Cutter, FORMAT, put_row, row_bytes};
use crate::{apply::SnapshotRequest, budget::SnapshotBudget, machine::SnapshotSource};

/// Ticks after which a view that nobody reads is dropped.
const VIEW_IDLE_TICKS: u64 = 600;
/// Rows are hashed in pieces of this size: row by row the hash takes several times as long.
const HASH_BYTES: usize = 128 << 10;
/// What is read of a state without a pause. Not much less: each piece is looked up anew.
const PIECE_BYTES: usize = 1 << 20;
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
    /// What may be taken from now on; of it, how many views may be open.
    Budget(SnapshotBudget),
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
#[derive(Default)]
struct RowHash {
    hasher: blake3::Hasher,
    rows: BytesMut,
}

impl RowHash {
    fn row(&mut self, key: &[u8], value: &[u8]) {
        put_row(&mut self.rows, key, value);
        if self.rows.len() >= HASH_BYTES {
            self.hasher.update(&self.rows);
            self.rows.clear();
        }
    }

    fn finish(mut self) -> [u8; 32] {
        self.hasher.update(&self.rows);
        *self.hasher.finalize().as_bytes()
    }
}

/// A scan that is under way.
struct Scan {
    group: GroupId,
    source: Arc<dyn SnapshotSource>,
    /// The first key that is not read yet.
    from: Bytes,
    aim: Aim,
}

/// What a scan is for.
#[allow(clippy::large_enum_variant, reason = "there are a few")]
enum Aim {
    Hash { index: u64, hash: RowHash },
    Manifest { request: SnapshotRequest, mark: v1::Mark, descriptor: Bytes, cutter: Cutter },
}

impl Aim {
    fn row(&mut self, key: &[u8], value: &[u8]) {
        match self {
            Aim::Hash { hash, .. } => hash.row(key, value),
            Aim::Manifest { cutter, .. } => cutter.row(key, value),
        }
    }

    fn receiver(&self) -> Option<u64> {
        match self {
            Aim::Hash { .. } => None,
            Aim::Manifest { request, .. } => Some(request.receiver),
        }
    }
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
    /// The next one to go on is the first. One at most makes a manifest for a group's receiver.
    scans: VecDeque<Scan>,
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
            scans: VecDeque::new(),
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
                // Of the question before, nobody takes the answer any more.
                let is_hash = |scan: &Scan| matches!(scan.aim, Aim::Hash { .. });
                self.scans.retain(|scan| scan.group != group || !is_hash(scan));
                self.scan(group, source, Aim::Hash { index, hash: RowHash::default() });
                None
            }
            ServeTask::Budget(budget) => {
                self.max_views = budget.max_views;
                None
            }
            ServeTask::Release { group, receiver } => {
                self.release(group, receiver);
                None
            }
            ServeTask::Publish { request, source, mark, descriptor } => {
                self.publish(request, source, mark, descriptor)
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

    fn publish(
        &mut self,
        request: SnapshotRequest,
        source: Arc<dyn SnapshotSource>,
        mark: v1::Mark,
        descriptor: Bytes,
    ) -> Option<Served> {
        // It asked once more while its manifest was made, or did not get it.
        let known = self.views.values_mut().find(|view| view.is_of(&request));
        if let Some(view) = known.filter(|view| view.manifest.pull == request.pull) {
            view.last_used = self.ticks;
            return Some(answer(&request, v1::peer_message::Body::Manifest(view.manifest.clone())));
        }
        let is_made = |scan: &Scan| match &scan.aim {
            Aim::Manifest { request: made, .. } => {
                (made.group, made.receiver, made.pull) == (request.group, request.receiver, request.pull)
            }
            Aim::Hash { .. } => false,
        };
        if self.scans.iter().any(is_made) {
            return None;
        }
        // One view per receiver and group: a new pull means that the old one was given up.
        self.release(request.group, request.receiver);
        let made = self.scans.iter().filter(|scan| scan.aim.receiver().is_some()).count();
        let open = self.views.len() + made;
        if open >= self.max_views.max(1) as usize {
            let reason = format!("{open} states are being given away here already");
            return Some(answer(&request, refuse(request.pull, reason)));
        }
        let cutter = Cutter::new(self.chunk_bytes);
        self.scan(request.group, source, Aim::Manifest { request, mark, descriptor, cutter });
        None
    }

    fn scan(&mut self, group: GroupId, source: Arc<dyn SnapshotSource>, aim: Aim) {
        self.scans.push_back(Scan { group, source, from: Bytes::new(), aim });
    }

    /// Whether there is something to go on with.
    pub(crate) fn scans(&self) -> bool {
        !self.scans.is_empty()
    }

    /// Reads a piece of one of the scans. To be called while nothing else waits. Bytes that were read, and what is ready now.
    pub(crate) fn go_on(&mut self) -> (usize, Option<Served>) {
        let Some(Scan { group, source, from, mut aim }) = self.scans.pop_front() else { return (0, None) };
        let most = PIECE_BYTES.min(self.chunk_bytes);
        let (mut taken, mut next) = (0, None);
        let read = source.rows(&from, &mut |key, value| {
            if taken >= most {
                next = Some(Bytes::copy_from_slice(key));
                return false;
            }
            taken += row_bytes(key, value);
            aim.row(key, value);
            true
        });
        let served = match (read, next) {
            (Ok(()), Some(from)) => {
                self.scans.push_back(Scan { group, source, from, aim });
                None
            }
            (Ok(()), None) => Some(match aim {
                Aim::Hash { index, hash } => Served::Verified { group, index, hash: Some(hash.finish()) },
                Aim::Manifest { request, mark, descriptor, cutter } => {
                    self.open(request, source, mark, descriptor, cutter.finish())
                }
            }),
            (Err(error), _) => Some(match aim {
                Aim::Hash { index, .. } => {
                    tracing::warn!(%group, index, %error, "a state could not be read to be verified");
                    Served::Verified { group, index, hash: None }
                }
                Aim::Manifest { request, .. } => answer(&request, refuse(request.pull, error.to_string())),
            }),
        };
        (taken, served)
    }

    /// A view whose manifest is made.
    fn open(
        &mut self,
        request: SnapshotRequest,
        source: Arc<dyn SnapshotSource>,
        mark: v1::Mark,
        descriptor: Bytes,
        chunks: Vec<v1::ChunkInfo>,
    ) -> Served {
        let snapshot = self.next_view;
        self.next_view += 1;
        let total_bytes = chunks.iter().map(|chunk| chunk.bytes).sum();
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
        answer(&request, v1::peer_message::Body::Manifest(manifest))
    }

    fn release(&mut self, group: GroupId, receiver: u64) {
        self.views.retain(|_, view| (view.group, view.receiver) != (group, receiver));
        self.scans.retain(|scan| (scan.group, scan.aim.receiver()) != (group, Some(receiver)));
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
        super::tests::{Rows, all, publish, said, source},
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
        server.run(ServeTask::Budget(SnapshotBudget { max_views: 3, ..SnapshotBudget::NORMAL }));
        assert!(ask(&mut server, 3));
    }

    #[test]
    fn a_hash_tells_every_difference_between_rows() {
        let hash = |rows: &[(&str, &str)]| {
            let rows = rows.iter().map(|(k, v)| (k.as_bytes().to_vec(), v.as_bytes().to_vec()));
            let mut server = SnapshotServer::new(4 << 10, 8, 1);
            let source = Arc::new(Rows(rows.collect()));
            server.run(ServeTask::Verify { group: GroupId(7), index: 3, source });
            match all(&mut server) {
                Some(Served::Verified { hash: Some(hash), .. }) => hash,
                _ => panic!("no hash"),
            }
        };
        let all = [hash(&[]), hash(&[("a", "b")]), hash(&[("ab", "")]), hash(&[("a", ""), ("b", "")])];
        assert_eq!(all.iter().collect::<std::collections::BTreeSet<_>>().len(), all.len());
        assert_eq!(hash(&[("a", "b")]), all[1]);
    }

    #[test]
    fn states_are_read_by_turns_and_no_question_waits_for_one() {
        let piece = 256;
        let mut server = SnapshotServer::new(piece, 8, 1);
        let manifest = publish(&mut server, source(50));
        let (long, short) = (source(200), source(20));
        let verify = |group, source| ServeTask::Verify { group: GroupId(group), index: 3, source };
        assert!(server.run(verify(1, long.clone())).is_none() && server.run(verify(2, short)).is_none());
        let mut ready = Vec::new();
        while server.scans() {
            // Whatever is under way, chunks are given.
            let request = v1::ChunkRequest { pull: 5, snapshot: manifest.snapshot, chunk: 0 };
            assert!(server.read(GroupId(7), &request).is_ok());
            let (read, served) = server.go_on();
            assert!(read <= piece + 64, "{read} bytes in one piece");
            if let Some(Served::Verified { group, .. }) = served {
                ready.push(group.0);
            }
        }
        assert_eq!(ready, [2, 1], "the short one is not kept waiting by the long one");
    }

    #[test]
    fn a_newer_question_for_a_hash_ends_the_scan_of_the_one_before() {
        let mut server = SnapshotServer::new(256, 8, 1);
        for (group, index) in [(1, 3), (2, 5), (1, 4)] {
            server.run(ServeTask::Verify { group: GroupId(group), index, source: source(50) });
            server.go_on();
        }
        let mut ready = Vec::new();
        while server.scans() {
            if let (_, Some(Served::Verified { group, index, .. })) = server.go_on() {
                ready.push((group.0, index));
            }
        }
        ready.sort_unstable();
        assert_eq!(ready, [(1, 4), (2, 5)]);
    }

    #[test]
    fn a_receiver_that_asks_again_gets_one_manifest_and_one_that_gave_up_none() {
        let mut server = SnapshotServer::new(256, 8, 1);
        let task = |pull| {
            let peer = NodeId::new(2).unwrap();
            let request =
                SnapshotRequest { group: GroupId(7), peer, receiver: 1, replica: 2, pull, min_index: 0 };
            ServeTask::Publish {
                request,
                source: source(50),
                mark: v1::Mark::default(),
                descriptor: Bytes::new(),
            }
        };
        let made = |server: &mut SnapshotServer| match all(server) {
            Some(Served::Send(
                _,
                v1::PeerMessage { body: Some(v1::peer_message::Body::Manifest(made)), .. },
            )) => Some(made.pull),
            _ => None,
        };
        assert!(server.run(task(5)).is_none());
        server.go_on();
        assert!(server.run(task(5)).is_none() && server.scans.len() == 1, "it is under way");
        assert!(server.run(task(6)).is_none() && server.scans.len() == 1, "the pull before was given up");
        assert_eq!((made(&mut server), made(&mut server)), (Some(6), None));
        server.run(task(7));
        server.run(ServeTask::Release { group: GroupId(7), receiver: 1 });
        assert!(!server.scans());
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
