//! Snapshots: a manifest of hashed chunks, pulled by the receiver.
//!
//! ```text
//!  leader ── MsgSnapshot (an offer) ──> receiver
//!  source <── ManifestRequest ───────── receiver          the source pins a point-in-time view
//!  source ── Manifest (hashes) ───────> receiver
//!  source <── ChunkRequest n ────────── receiver ──> staged generation, in key order
//!  source ── Chunk n ─────────────────> receiver
//!                                       receiver ──> raft.step(MsgSnapshot), then the switch
//! ```
//!
//! Chunk borders lie between keys and depend on the keys alone, so that an unchanged stretch of the key space keeps its
//! chunks, and their hashes, from one snapshot to the next.

use std::{collections::BTreeMap, sync::Arc};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use pontoon_proto::{GroupId, NodeId, v1};

use crate::{
    apply::SnapshotRequest,
    machine::{MachineError, SnapshotSource},
};

/// The format of manifests and chunks.
pub(crate) const FORMAT: u32 = 1;

/// Ticks after which a view that nobody reads is dropped.
const VIEW_IDLE_TICKS: u64 = 600;

fn put_row(out: &mut BytesMut, key: &[u8], value: &[u8]) {
    out.put_u32_le(key.len() as u32);
    out.put_u32_le(value.len() as u32);
    out.put_slice(key);
    out.put_slice(value);
}

/// Checks a chunk against its hash and reads its rows. A chunk that does not fit is refused, never half used.
pub(crate) fn open_chunk(hash: &[u8], data: &Bytes) -> Result<Vec<(Bytes, Bytes)>, String> {
    if blake3::hash(data).as_bytes() != hash {
        return Err("a chunk does not match its hash".to_owned());
    }
    let mut rest = data.clone();
    let mut rows = Vec::new();
    while !rest.is_empty() {
        if rest.len() < 8 {
            return Err("a chunk ends inside a row".to_owned());
        }
        let (key, value) = (rest.get_u32_le() as usize, rest.get_u32_le() as usize);
        if rest.len() < key.saturating_add(value) {
            return Err("a chunk ends inside a row".to_owned());
        }
        rows.push((rest.split_to(key), rest.split_to(value)));
    }
    Ok(rows)
}

/// Whether a new chunk may begin at this key.
fn is_border(key: &[u8]) -> bool {
    spread(key) & 0x3f == 0
}

/// FNV-1a: spreads borders evenly over any kind of keys.
fn spread(key: &[u8]) -> u32 {
    key.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

/// Cuts a view into chunks: at a border key once a chunk holds half of `chunk_bytes`, at any key once it holds all.
fn cut(source: &dyn SnapshotSource, chunk_bytes: usize) -> Result<Vec<v1::ChunkInfo>, MachineError> {
    let mut chunks = Vec::new();
    let mut current = BytesMut::new();
    let mut first_key = Bytes::new();
    let mut close = |current: &mut BytesMut, first_key: &Bytes| {
        chunks.push(v1::ChunkInfo {
            hash: Bytes::copy_from_slice(blake3::hash(current).as_bytes()),
            bytes: current.len() as u64,
            first_key: first_key.clone(),
        });
        current.clear();
    };
    source.rows(&[], &mut |key, value| {
        let full = current.len() >= chunk_bytes || (current.len() >= chunk_bytes / 2 && is_border(key));
        if full {
            close(&mut current, &first_key);
        }
        if current.is_empty() {
            first_key = Bytes::copy_from_slice(key);
        }
        put_row(&mut current, key, value);
        true
    })?;
    if !current.is_empty() {
        close(&mut current, &first_key);
    }
    Ok(chunks)
}

/// What the server is asked.
#[allow(clippy::large_enum_variant, reason = "a few are made per snapshot")]
pub(crate) enum ServeTask {
    /// Cuts a fresh view and answers with its manifest.
    Publish { request: SnapshotRequest, source: Arc<dyn SnapshotSource>, mark: v1::Mark, descriptor: Bytes },
    /// Reads one chunk.
    Read { group: GroupId, peer: NodeId, from: u64, to: u64, request: v1::ChunkRequest },
    /// Time goes on; idle views are dropped.
    Tick { ticks: u64 },
}

/// An answer on its way.
pub(crate) struct Outgoing {
    pub(crate) to: NodeId,
    pub(crate) message: v1::PeerMessage,
}

struct View {
    group: GroupId,
    source: Arc<dyn SnapshotSource>,
    chunks: Vec<v1::ChunkInfo>,
    last_used: u64,
}

/// Serves views of this node's state machines. Blocks on engines: runs on its own thread.
pub(crate) struct SnapshotServer {
    chunk_bytes: usize,
    views: BTreeMap<u64, View>,
    next_view: u64,
    ticks: u64,
}

impl SnapshotServer {
    /// `first_view` must differ between incarnations, so that a receiver never reads another view under an old number.
    pub(crate) fn new(chunk_bytes: usize, first_view: u64) -> Self {
        SnapshotServer { chunk_bytes, views: BTreeMap::new(), next_view: first_view, ticks: 0 }
    }

    pub(crate) fn run(&mut self, task: ServeTask) -> Option<Outgoing> {
        match task {
            ServeTask::Tick { ticks } => {
                self.ticks += ticks;
                let horizon = self.ticks.saturating_sub(VIEW_IDLE_TICKS);
                self.views.retain(|_, view| view.last_used >= horizon);
                None
            }
            ServeTask::Publish { request, source, mark, descriptor } => {
                let body = match cut(source.as_ref(), self.chunk_bytes) {
                    Ok(chunks) => {
                        // One view per receiver and group: a new pull means that the old one was given up.
                        let snapshot = self.next_view;
                        self.next_view += 1;
                        let total_bytes = chunks.iter().map(|c| c.bytes).sum();
                        let manifest = v1::Manifest {
                            format: FORMAT,
                            pull: request.pull,
                            group: request.group.0,
                            snapshot,
                            mark: Some(mark),
                            chunks: chunks.clone(),
                            total_bytes,
                            descriptor,
                        };
                        let view = View { group: request.group, source, chunks, last_used: self.ticks };
                        self.views.insert(snapshot, view);
                        v1::peer_message::Body::Manifest(manifest)
                    }
                    Err(error) => refuse(request.pull, error.to_string()),
                };
                Some(Outgoing {
                    to: request.peer,
                    message: v1::PeerMessage {
                        group: request.group.0,
                        from: request.replica,
                        to: request.receiver,
                        body: Some(body),
                    },
                })
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
                Some(Outgoing {
                    to: peer,
                    message: v1::PeerMessage { group: group.0, from, to, body: Some(body) },
                })
            }
        }
    }

    fn read(&mut self, group: GroupId, request: &v1::ChunkRequest) -> Result<Bytes, String> {
        let view = self
            .views
            .get_mut(&request.snapshot)
            .filter(|view| view.group == group)
            .ok_or("the view is gone; ask for a new manifest")?;
        view.last_used = self.ticks;
        let at = request.chunk as usize;
        let info = view.chunks.get(at).ok_or("there is no such chunk")?;
        let end = view.chunks.get(at + 1).map(|next| next.first_key.clone());
        let mut data = BytesMut::with_capacity(info.bytes as usize);
        view.source
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
}

fn refuse(pull: u64, reason: String) -> v1::peer_message::Body {
    v1::peer_message::Body::PullRefused(v1::PullRefused { pull, reason })
}

/// What a pull wants to happen.
#[derive(Debug, PartialEq)]
pub(crate) enum PullStep {
    /// Ask the source for these chunks of this view.
    Request { snapshot: u64, chunks: Vec<u32> },
    /// Stage this chunk next.
    Stage { chunk: u32, hash: Bytes, data: Bytes },
    /// All is staged: step the snapshot.
    Complete,
}

/// The receiver's side of one snapshot, without I/O.
///
/// Invariants: chunks are staged in order, each once; at most `window` are asked for and not staged.
#[derive(Debug)]
pub(crate) struct Pull {
    pub(crate) id: u64,
    /// The replica that offered and is asked.
    pub(crate) source: u64,
    /// The index that was offered; the manifest stands at it or above.
    pub(crate) min_index: u64,
    pub(crate) manifest: Option<v1::Manifest>,
    window: u32,
    asked: u32,
    handed: u32,
    staged: u32,
    arrived: BTreeMap<u32, Bytes>,
    /// Ticks without any progress.
    pub(crate) idle_ticks: u64,
    pub(crate) bytes_done: u64,
    /// Set when the staged state was stepped into raft.
    pub(crate) stepped: bool,
}

impl Pull {
    pub(crate) fn new(id: u64, source: u64, min_index: u64, window: u32) -> Self {
        Pull {
            id,
            source,
            min_index,
            manifest: None,
            window,
            asked: 0,
            handed: 0,
            staged: 0,
            arrived: BTreeMap::new(),
            idle_ticks: 0,
            bytes_done: 0,
            stepped: false,
        }
    }

    fn total(&self) -> u32 {
        self.manifest.as_ref().map_or(0, |m| m.chunks.len() as u32)
    }

    pub(crate) fn on_manifest(&mut self, manifest: v1::Manifest) -> Vec<PullStep> {
        if self.manifest.is_some() {
            return Vec::new();
        }
        self.idle_ticks = 0;
        self.manifest = Some(manifest);
        self.advance()
    }

    pub(crate) fn on_chunk(&mut self, chunk: v1::Chunk) -> Vec<PullStep> {
        if chunk.chunk < self.handed || chunk.chunk >= self.asked {
            return Vec::new();
        }
        self.idle_ticks = 0;
        self.arrived.insert(chunk.chunk, chunk.data);
        self.advance()
    }

    pub(crate) fn on_staged(&mut self, chunk: u32) -> Vec<PullStep> {
        debug_assert_eq!(chunk, self.staged, "chunks are staged in order");
        self.idle_ticks = 0;
        self.staged = chunk + 1;
        if let Some(info) = self.manifest.as_ref().and_then(|m| m.chunks.get(chunk as usize)) {
            self.bytes_done += info.bytes;
        }
        self.advance()
    }

    fn advance(&mut self) -> Vec<PullStep> {
        let Some(manifest) = &self.manifest else { return Vec::new() };
        let (total, snapshot) = (manifest.chunks.len() as u32, manifest.snapshot);
        let mut steps = Vec::new();
        let chunks: Vec<u32> = (self.asked..total.min(self.staged + self.window)).collect();
        if let Some(last) = chunks.last() {
            self.asked = last + 1;
            steps.push(PullStep::Request { snapshot, chunks });
        }
        while let Some(data) = self.arrived.remove(&self.handed) {
            let hash = manifest.chunks[self.handed as usize].hash.clone();
            steps.push(PullStep::Stage { chunk: self.handed, hash, data });
            self.handed += 1;
        }
        if self.staged == total {
            steps.push(PullStep::Complete);
        }
        steps
    }

    /// What to ask again after a silence.
    pub(crate) fn missing(&self) -> Vec<u32> {
        (self.handed..self.asked).filter(|chunk| !self.arrived.contains_key(chunk)).collect()
    }

    /// Whether everything is staged and raft was not told yet.
    pub(crate) fn is_complete(&self) -> bool {
        self.manifest.is_some() && self.staged == self.total() && !self.stepped
    }

    pub(crate) fn progress(&self) -> crate::types::PullProgress {
        let bytes_total = self.manifest.as_ref().map_or(0, |m| m.total_bytes);
        debug_assert!(self.staged <= self.total());
        crate::types::PullProgress { bytes_done: self.bytes_done, bytes_total }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Rows(Vec<(Vec<u8>, Vec<u8>)>);

    impl SnapshotSource for Rows {
        fn rows(&self, from: &[u8], visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<(), MachineError> {
            for (key, value) in self.0.iter().filter(|(key, _)| key.as_slice() >= from) {
                if !visit(key, value) {
                    break;
                }
            }
            Ok(())
        }
    }

    fn source(rows: u32) -> Arc<Rows> {
        Arc::new(Rows((0..rows).map(|i| (format!("key-{i:06}").into_bytes(), vec![i as u8; 40])).collect()))
    }

    fn publish(server: &mut SnapshotServer, source: Arc<Rows>) -> v1::Manifest {
        let request = SnapshotRequest {
            group: GroupId(7),
            peer: NodeId::new(2).unwrap(),
            receiver: 1,
            replica: 2,
            pull: 5,
            min_index: 0,
        };
        let out = server
            .run(ServeTask::Publish { request, source, mark: v1::Mark::default(), descriptor: Bytes::new() })
            .unwrap();
        let Some(v1::peer_message::Body::Manifest(manifest)) = out.message.body else {
            panic!("no manifest")
        };
        manifest
    }

    /// Runs a whole pull against a server and returns the rows in the order they were staged.
    fn pull_all(server: &mut SnapshotServer, manifest: v1::Manifest) -> Vec<(Bytes, Bytes)> {
        let mut pull = Pull::new(5, 2, 0, 3);
        let mut rows = Vec::new();
        let mut steps = pull.on_manifest(manifest);
        while !steps.is_empty() {
            let mut next = Vec::new();
            for step in steps {
                match step {
                    PullStep::Request { snapshot, mut chunks } => {
                        // Answers arrive in any order.
                        chunks.reverse();
                        for chunk in chunks {
                            let request = v1::ChunkRequest { pull: 5, snapshot, chunk };
                            let peer = NodeId::new(2).unwrap();
                            let out = server
                                .run(ServeTask::Read { group: GroupId(7), peer, from: 2, to: 1, request })
                                .unwrap();
                            let Some(v1::peer_message::Body::Chunk(chunk)) = out.message.body else {
                                panic!()
                            };
                            next.extend(pull.on_chunk(chunk));
                        }
                    }
                    PullStep::Stage { chunk, hash, data } => {
                        rows.extend(open_chunk(&hash, &data).unwrap());
                        next.extend(pull.on_staged(chunk));
                    }
                    PullStep::Complete => return rows,
                }
            }
            steps = next;
        }
        panic!("the pull stopped early");
    }

    #[test]
    fn a_pull_brings_every_row_in_order() {
        for rows in [0, 1, 5, 5_000] {
            let source = source(rows);
            let mut server = SnapshotServer::new(4 << 10, 1);
            let manifest = publish(&mut server, source.clone());
            assert!(rows < 100 || manifest.chunks.len() > 10);
            let pulled = pull_all(&mut server, manifest);
            assert_eq!(pulled.len(), rows as usize);
            assert!(pulled.iter().zip(&source.0).all(|(a, b)| a.0 == b.0 && a.1 == b.1));
        }
    }

    #[test]
    fn one_changed_row_changes_few_hashes() {
        let mut server = SnapshotServer::new(4 << 10, 1);
        let before = publish(&mut server, source(5_000));
        let mut rows = source(5_000).0.clone();
        rows.insert(2_500, (b"key-002499-x".to_vec(), b"new".to_vec()));
        let after = publish(&mut server, Arc::new(Rows(rows)));
        let old: std::collections::BTreeSet<_> = before.chunks.iter().map(|c| c.hash.clone()).collect();
        let fresh = after.chunks.iter().filter(|c| !old.contains(&c.hash)).count();
        assert!(fresh * 4 < after.chunks.len(), "{fresh} of {} chunks are new", after.chunks.len());
    }

    #[test]
    fn a_flipped_bit_or_a_cut_chunk_is_refused() {
        let mut data = BytesMut::new();
        put_row(&mut data, b"k", b"v");
        let hash = *blake3::hash(&data).as_bytes();
        let good = data.clone().freeze();
        assert_eq!(open_chunk(&hash, &good).unwrap().len(), 1);
        data[9] ^= 1;
        assert!(open_chunk(&hash, &data.freeze()).is_err());
        let cut = good.slice(..good.len() - 1);
        assert!(open_chunk(blake3::hash(&cut).as_bytes(), &cut).is_err());
    }

    #[test]
    fn idle_views_are_dropped() {
        let mut server = SnapshotServer::new(4 << 10, 1);
        let manifest = publish(&mut server, source(10));
        server.run(ServeTask::Tick { ticks: VIEW_IDLE_TICKS + 1 });
        let request = v1::ChunkRequest { pull: 5, snapshot: manifest.snapshot, chunk: 0 };
        assert!(server.read(GroupId(7), &request).is_err());
    }
}
