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

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use pontoon_proto::{GroupId, NodeId, v1};

use crate::{
    apply::SnapshotRequest,
    machine::{MachineError, SnapshotSource},
    types::Event,
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
    let mut row = BytesMut::new();
    source.rows(&[], &mut |key, value| {
        row.clear();
        put_row(&mut row, key, value);
        hasher.update(&row);
        true
    })?;
    Ok(*hasher.finalize().as_bytes())
}

struct View {
    group: GroupId,
    receiver: u64,
    manifest: v1::Manifest,
    source: Arc<dyn SnapshotSource>,
    last_used: u64,
}

/// Serves views of this node's state machines. Blocks on engines: runs on its own thread.
pub(crate) struct SnapshotServer {
    chunk_bytes: usize,
    max_views: u32,
    views: BTreeMap<u64, View>,
    next_view: u64,
    ticks: u64,
}

impl SnapshotServer {
    /// `first_view` must differ between incarnations, so that a receiver never reads another view under an old number.
    pub(crate) fn new(chunk_bytes: usize, max_views: u32, first_view: u64) -> Self {
        SnapshotServer { chunk_bytes, max_views, views: BTreeMap::new(), next_view: first_view, ticks: 0 }
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
                        };
                        self.views.insert(snapshot, view);
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
        let at = request.chunk as usize;
        let chunks = &view.manifest.chunks;
        let info = chunks.get(at).ok_or("there is no such chunk")?;
        let end = chunks.get(at + 1).map(|next| next.first_key.clone());
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

impl View {
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

/// What a pull wants to happen.
#[derive(Debug, PartialEq)]
pub(crate) enum PullStep {
    /// Stage this state: what is there already need not come.
    Begin(Arc<v1::Manifest>),
    /// Ask the source for these chunks.
    Request(Vec<u32>),
    /// Stage this chunk next.
    Stage { chunk: u32, hash: Bytes, data: Bytes },
    /// All is staged: step the snapshot.
    Complete,
}

/// The receiver's side of one snapshot, without I/O.
///
/// Any member may be the source. A source that is silent, refuses or sends nonsense is followed by the next one; what was
/// staged until then is kept as far as the next one's manifest has the same chunks.
///
/// Invariants: of one manifest, chunks that are not held are staged in order, each once; at most `window` are asked for and
/// not staged, so at most so many are sent again after a kill.
#[derive(Debug)]
pub(crate) struct Pull {
    /// Names one manifest of one source: with each other one it changes, so that what comes late is not taken for it.
    pub(crate) id: u64,
    /// The leader that offered: it hears how the pull goes.
    pub(crate) leader: u64,
    /// Who may be asked, in this order; never empty.
    sources: Vec<u64>,
    at: usize,
    /// The index that was offered; the manifest stands at it or above.
    pub(crate) min_index: u64,
    pub(crate) manifest: Option<Arc<v1::Manifest>>,
    /// Positions of the chunks that come, once it is known which are held.
    wanted: Option<Vec<u32>>,
    window: usize,
    // These count along `wanted`.
    asked: usize,
    handed: usize,
    staged: usize,
    arrived: BTreeMap<usize, Bytes>,
    /// Chunks that are to be asked for as soon as the budget allows; the last ones below `asked`.
    pub(crate) queue: VecDeque<u32>,
    /// Ticks without a word from the source.
    pub(crate) idle_ticks: u64,
    /// Ticks without anything that brings the pull on.
    pub(crate) stuck_ticks: u64,
    /// Every source was asked in vain; the next round begins after a pause.
    pub(crate) rests: bool,
    /// Other pulls of the node come first.
    pub(crate) waits_turn: bool,
    pub(crate) bytes_done: u64,
    /// Bytes and chunks that came, over all sources.
    pub(crate) received: (u64, u32),
    /// Set when the staged state was stepped into raft.
    pub(crate) stepped: bool,
}

impl Pull {
    pub(crate) fn new(id: u64, leader: u64, sources: Vec<u64>, min_index: u64, window: u32) -> Self {
        debug_assert!(!sources.is_empty(), "the leader is one");
        Pull {
            id,
            leader,
            sources,
            at: 0,
            min_index,
            manifest: None,
            wanted: None,
            window: window as usize,
            asked: 0,
            handed: 0,
            staged: 0,
            arrived: BTreeMap::new(),
            queue: VecDeque::new(),
            idle_ticks: 0,
            stuck_ticks: 0,
            rests: false,
            waits_turn: false,
            bytes_done: 0,
            received: (0, 0),
            stepped: false,
        }
    }

    /// Who is asked now.
    pub(crate) fn source(&self) -> u64 {
        self.sources[self.at]
    }

    pub(crate) fn add_source(&mut self, source: u64) {
        if !self.sources.contains(&source) {
            self.sources.push(source);
        }
    }

    /// The index of the state that comes, if that is known.
    pub(crate) fn index(&self) -> Option<u64> {
        Some(self.manifest.as_ref()?.mark.as_ref()?.index)
    }

    /// Forgets the manifest, and all words under the old number.
    pub(crate) fn ask_anew(&mut self, id: u64) {
        self.id = id;
        (self.manifest, self.wanted) = (None, None);
        (self.asked, self.handed, self.staged) = (0, 0, 0);
        self.arrived.clear();
        self.queue.clear();
        self.idle_ticks = 0;
        self.rests = false;
    }

    /// The source is of no use: the next one's turn. False: it was the last one of this round.
    pub(crate) fn next_source(&mut self, id: u64) -> bool {
        self.at = (self.at + 1) % self.sources.len();
        self.ask_anew(id);
        self.rests = self.at == 0;
        !self.rests
    }

    fn on_its_way(&mut self) {
        (self.idle_ticks, self.stuck_ticks) = (0, 0);
    }

    pub(crate) fn on_manifest(&mut self, manifest: v1::Manifest) -> Vec<PullStep> {
        if self.manifest.is_some() {
            return Vec::new();
        }
        self.on_its_way();
        let manifest = Arc::new(manifest);
        self.manifest = Some(manifest.clone());
        vec![PullStep::Begin(manifest)]
    }

    /// The stage takes chunks, but for those that it holds.
    pub(crate) fn on_begun(&mut self, held: &[u32]) -> Vec<PullStep> {
        let Some(manifest) = self.manifest.as_ref().filter(|_| self.wanted.is_none()) else {
            return Vec::new();
        };
        let is_held = |at: &u32| held.binary_search(at).is_ok();
        let all = 0..manifest.chunks.len() as u32;
        self.bytes_done = all.clone().filter(is_held).map(|at| manifest.chunks[at as usize].bytes).sum();
        self.wanted = Some(all.filter(|at| !is_held(at)).collect());
        self.on_its_way();
        self.advance()
    }

    pub(crate) fn on_chunk(&mut self, chunk: v1::Chunk) -> Vec<PullStep> {
        let wanted = self.wanted.as_deref().unwrap_or_default();
        let at = wanted.binary_search(&chunk.chunk).ok().filter(|at| (self.handed..self.asked).contains(at));
        let Some(at) = at else { return Vec::new() };
        self.on_its_way();
        self.received.0 += chunk.data.len() as u64;
        self.received.1 += 1;
        self.arrived.insert(at, chunk.data);
        self.advance()
    }

    pub(crate) fn on_staged(&mut self, chunk: u32) -> Vec<PullStep> {
        debug_assert_eq!(
            self.wanted.as_deref().and_then(|w| w.get(self.staged)),
            Some(&chunk),
            "staged in order"
        );
        self.on_its_way();
        self.staged += 1;
        if let Some(info) = self.manifest.as_ref().and_then(|m| m.chunks.get(chunk as usize)) {
            self.bytes_done += info.bytes;
        }
        self.advance()
    }

    fn advance(&mut self) -> Vec<PullStep> {
        let (Some(manifest), Some(wanted)) = (&self.manifest, &self.wanted) else { return Vec::new() };
        let mut steps = Vec::new();
        let until = wanted.len().min(self.staged + self.window);
        if self.asked < until {
            let chunks = wanted[self.asked..until].to_vec();
            self.asked = until;
            steps.push(PullStep::Request(chunks));
        }
        while let Some(data) = self.arrived.remove(&self.handed) {
            let chunk = wanted[self.handed];
            let hash = manifest.chunks[chunk as usize].hash.clone();
            steps.push(PullStep::Stage { chunk, hash, data });
            self.handed += 1;
        }
        if self.staged == wanted.len() {
            steps.push(PullStep::Complete);
        }
        steps
    }

    /// What to ask again after a silence.
    pub(crate) fn missing(&self) -> Vec<u32> {
        let wanted = self.wanted.as_deref().unwrap_or_default();
        let sent = self.handed..self.asked - self.queue.len();
        sent.filter(|at| !self.arrived.contains_key(at)).map(|at| wanted[at]).collect()
    }

    /// Whether the source owes something: what is being staged here is not its business.
    pub(crate) fn is_owed(&self) -> bool {
        !self.rests && (self.manifest.is_none() || !self.missing().is_empty())
    }

    /// Whether everything is staged and raft was not told yet.
    pub(crate) fn is_complete(&self) -> bool {
        self.wanted.as_ref().is_some_and(|wanted| self.staged == wanted.len()) && !self.stepped
    }

    /// What is told when the state is switched in.
    pub(crate) fn installed(&self, group: GroupId) -> Event {
        let index = self.index().unwrap_or_default();
        let (bytes, chunks) = self.received;
        let all = self.manifest.as_ref().map_or(0, |manifest| manifest.chunks.len());
        let held = (all - self.wanted.as_ref().map_or(0, Vec::len)) as u32;
        Event::SnapshotInstalled { group, index, bytes, chunks, held }
    }

    pub(crate) fn progress(&self) -> crate::types::PullProgress {
        let bytes_total = self.manifest.as_ref().map_or(0, |m| m.total_bytes);
        let queued = self.waits_turn || !self.queue.is_empty();
        crate::types::PullProgress { bytes_done: self.bytes_done.min(bytes_total), bytes_total, queued }
    }
}

/// Whether a manifest can be what was asked for: a source may be of another version, or no friend.
pub(crate) fn check_manifest(
    manifest: &v1::Manifest,
    group: GroupId,
    receiver: u64,
    min_index: u64,
) -> Result<(), String> {
    if manifest.format != FORMAT {
        return Err(format!("a manifest of format {} is not known here", manifest.format));
    }
    let mark = manifest.mark.as_ref().ok_or("a manifest without a mark")?;
    if manifest.group != group.0 || mark.index < min_index {
        return Err(format!("a manifest of g{} at {} is not what was asked for", manifest.group, mark.index));
    }
    let conf = mark.conf_state.as_ref().ok_or("a manifest without members")?;
    if !crate::convert::members(conf).contains(&receiver) {
        return Err("a manifest that does not name this member".to_owned());
    }
    let in_order = manifest.chunks.is_sorted_by(|a, b| a.first_key < b.first_key);
    let total = manifest.chunks.iter().try_fold(0u64, |sum, chunk| sum.checked_add(chunk.bytes));
    if !in_order || total != Some(manifest.total_bytes) {
        return Err("a manifest whose chunks do not fit together".to_owned());
    }
    Ok(())
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

    fn said(server: &mut SnapshotServer, task: ServeTask) -> Option<v1::peer_message::Body> {
        match server.run(task) {
            Some(Served::Send(_, message)) => message.body,
            _ => None,
        }
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
        let task =
            ServeTask::Publish { request, source, mark: v1::Mark::default(), descriptor: Bytes::new() };
        let Some(v1::peer_message::Body::Manifest(manifest)) = said(server, task) else {
            panic!("no manifest")
        };
        manifest
    }

    /// Runs a whole pull against a server and returns the rows in the order they were staged.
    fn pull_all(server: &mut SnapshotServer, manifest: v1::Manifest) -> Vec<(Bytes, Bytes)> {
        let mut pull = Pull::new(5, 2, vec![2], 0, 3);
        let mut rows = Vec::new();
        let mut steps = pull.on_manifest(manifest);
        while !steps.is_empty() {
            let mut next = Vec::new();
            for step in steps {
                match step {
                    PullStep::Begin(_) => next.extend(pull.on_begun(&[])),
                    PullStep::Request(mut chunks) => {
                        // Answers arrive in any order.
                        chunks.reverse();
                        for chunk in chunks {
                            let snapshot = pull.manifest.as_ref().unwrap().snapshot;
                            let request = v1::ChunkRequest { pull: 5, snapshot, chunk };
                            let peer = NodeId::new(2).unwrap();
                            let task = ServeTask::Read { group: GroupId(7), peer, from: 2, to: 1, request };
                            let Some(v1::peer_message::Body::Chunk(chunk)) = said(server, task) else {
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
            let mut server = SnapshotServer::new(4 << 10, 8, 1);
            let manifest = publish(&mut server, source.clone());
            assert!(rows < 100 || manifest.chunks.len() > 10);
            let pulled = pull_all(&mut server, manifest);
            assert_eq!(pulled.len(), rows as usize);
            assert!(pulled.iter().zip(&source.0).all(|(a, b)| a.0 == b.0 && a.1 == b.1));
        }
    }

    #[test]
    fn one_changed_row_changes_few_hashes() {
        let mut server = SnapshotServer::new(4 << 10, 8, 1);
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

    fn pull_of(chunks: u32) -> (Pull, v1::Manifest) {
        let mut server = SnapshotServer::new(64, 8, 1);
        let mut manifest = publish(&mut server, source(chunks * 4));
        manifest.chunks.truncate(chunks as usize);
        (Pull::new(5, 2, vec![3, 2], 0, 1), manifest)
    }

    #[test]
    fn one_chunk_is_under_way_at_a_time_and_those_that_are_held_never() {
        let (mut pull, manifest) = pull_of(4);
        assert!(matches!(pull.on_manifest(manifest)[..], [PullStep::Begin(_)]));
        assert_eq!(pull.on_begun(&[0, 2]), [PullStep::Request(vec![1])]);
        let chunk = |chunk| v1::Chunk { pull: 5, chunk, data: Bytes::from_static(b"x") };
        for not_asked in [0, 2, 3, 9] {
            assert!(pull.on_chunk(chunk(not_asked)).is_empty());
        }
        assert!(matches!(pull.on_chunk(chunk(1))[..], [PullStep::Stage { chunk: 1, .. }]));
        assert!(pull.on_chunk(chunk(1)).is_empty(), "doubled");
        assert_eq!(pull.on_staged(1), [PullStep::Request(vec![3])]);
        assert!(matches!(pull.on_chunk(chunk(3))[..], [PullStep::Stage { chunk: 3, .. }]));
        assert_eq!(pull.on_staged(3), [PullStep::Complete]);
        assert_eq!(pull.received.1, 2);
    }

    #[test]
    fn a_source_that_is_of_no_use_is_followed_by_the_next_and_what_it_says_late_is_nothing() {
        let (mut pull, manifest) = pull_of(4);
        pull.on_manifest(manifest.clone());
        pull.on_begun(&[]);
        assert!(pull.next_source(6));
        assert_eq!((pull.source(), pull.index()), (2, None));
        assert!(pull.on_chunk(v1::Chunk { pull: 5, chunk: 0, data: Bytes::new() }).is_empty());
        assert!(pull.on_begun(&[]).is_empty(), "of the manifest before");
        pull.on_manifest(manifest);
        assert_eq!(pull.on_begun(&[0]), [PullStep::Request(vec![1])]);
        assert!(!pull.next_source(7), "the round is over");
        assert!(pull.rests && !pull.is_owed());
    }

    #[test]
    fn a_manifest_that_does_not_fit_is_refused() {
        let good = v1::Manifest {
            format: FORMAT,
            group: 7,
            mark: Some(v1::Mark {
                index: 9,
                conf_state: Some(v1::ConfState { voters: vec![1], ..Default::default() }),
                ..Default::default()
            }),
            chunks: ["a", "b"]
                .map(|key| v1::ChunkInfo { bytes: 1, first_key: key.into(), ..Default::default() })
                .into(),
            total_bytes: 2,
            ..Default::default()
        };
        let check = |manifest: &v1::Manifest| check_manifest(manifest, GroupId(7), 1, 9);
        check(&good).unwrap();
        let change = |work: fn(&mut v1::Manifest)| {
            let mut manifest = good.clone();
            work(&mut manifest);
            check(&manifest).unwrap_err()
        };
        assert!(change(|m| m.format = 9).contains("format 9"));
        change(|m| m.mark = None);
        change(|m| m.group = 8);
        change(|m| m.chunks.reverse());
        change(|m| m.chunks[1].bytes = u64::MAX);
        change(|m| m.total_bytes = 3);
        assert!(check_manifest(&good, GroupId(7), 1, 10).is_err(), "too old");
        assert!(check_manifest(&good, GroupId(7), 2, 9).is_err(), "of a group that this one is not in");
    }

    #[test]
    fn idle_views_are_dropped() {
        let mut server = SnapshotServer::new(4 << 10, 8, 1);
        let manifest = publish(&mut server, source(10));
        server.run(ServeTask::Tick { ticks: VIEW_IDLE_TICKS + 1 });
        let request = v1::ChunkRequest { pull: 5, snapshot: manifest.snapshot, chunk: 0 };
        assert!(server.read(GroupId(7), &request).is_err());
    }
}
