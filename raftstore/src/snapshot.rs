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

mod pull;
mod serve;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use pontoon_proto::v1;

pub(crate) use self::{
    pull::{Pull, PullStep, check_manifest},
    serve::{ServeTask, Served, SnapshotServer},
};
/// The format of manifests and chunks.
pub(crate) const FORMAT: u32 = 1;

/// What a row takes in a chunk.
fn row_bytes(key: &[u8], value: &[u8]) -> usize {
    8 + key.len() + value.len()
}

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

/// Chunks behind the first so many are larger: each costs the receiver several syncs, and in a large state one that is sent
/// again counts for less.
const SMALL_CHUNKS: usize = 16;
/// So many times as large. What a transport takes in one message bounds it.
const GROWTH: usize = 3;

/// Cuts the rows of a view, which come in order, into chunks: at a border key once a chunk holds half of its limit, at any key once it
/// holds all. The limit is `chunk_bytes`, and [`GROWTH`] times that after [`SMALL_CHUNKS`] times as many bytes.
struct Cutter {
    chunk_bytes: usize,
    limit: usize,
    /// Bytes of the chunks that are closed.
    cut_off: usize,
    chunks: Vec<v1::ChunkInfo>,
    first_key: Bytes,
    current: BytesMut,
}

impl Cutter {
    fn new(chunk_bytes: usize) -> Cutter {
        Cutter {
            chunk_bytes,
            limit: chunk_bytes,
            cut_off: 0,
            chunks: Vec::new(),
            first_key: Bytes::new(),
            current: BytesMut::new(),
        }
    }

    fn row(&mut self, key: &[u8], value: &[u8]) {
        let held = self.current.len();
        if held >= self.limit || (held >= self.limit / 2 && is_border(key)) {
            self.cut_off += held;
            if self.cut_off >= SMALL_CHUNKS * self.chunk_bytes {
                self.limit = GROWTH * self.chunk_bytes;
            }
            self.close();
        }
        if self.current.is_empty() {
            self.first_key = Bytes::copy_from_slice(key);
        }
        put_row(&mut self.current, key, value);
    }

    fn close(&mut self) {
        self.chunks.push(v1::ChunkInfo {
            hash: Bytes::copy_from_slice(blake3::hash(&self.current).as_bytes()),
            bytes: self.current.len() as u64,
            first_key: std::mem::take(&mut self.first_key),
        });
        self.current.clear();
    }

    fn finish(mut self) -> Vec<v1::ChunkInfo> {
        if !self.current.is_empty() {
            self.close();
        }
        self.chunks
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pontoon_proto::{GroupId, NodeId};

    use super::*;
    use crate::{
        apply::SnapshotRequest,
        machine::{MachineError, SnapshotSource},
    };

    pub(super) struct Rows(pub(super) Vec<(Vec<u8>, Vec<u8>)>);

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

    pub(super) fn source(rows: u32) -> Arc<Rows> {
        Arc::new(Rows((0..rows).map(|i| (format!("key-{i:06}").into_bytes(), vec![i as u8; 40])).collect()))
    }

    pub(super) fn said(server: &mut SnapshotServer, task: ServeTask) -> Option<v1::peer_message::Body> {
        match server.run(task).or_else(|| all(server)) {
            Some(Served::Send(_, message)) => message.body,
            _ => None,
        }
    }

    /// Goes on until something is ready.
    pub(super) fn all(server: &mut SnapshotServer) -> Option<Served> {
        while server.scans() {
            if let (_, Some(served)) = server.go_on() {
                return Some(served);
            }
        }
        None
    }

    pub(super) fn publish(server: &mut SnapshotServer, source: Arc<Rows>) -> v1::Manifest {
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
    fn chunks_of_a_large_state_grow_behind_the_first_ones() {
        let mut cutter = Cutter::new(1 << 10);
        source(20_000).0.iter().for_each(|(key, value)| cutter.row(key, value));
        let chunks = cutter.finish();
        let sizes: Vec<u64> = chunks.iter().map(|chunk| chunk.bytes).collect();
        // A row may go beyond the limit.
        let small = sizes.iter().take_while(|size| **size <= 1_100).count();
        assert!((SMALL_CHUNKS..=2 * SMALL_CHUNKS).contains(&small), "{sizes:?}");
        let (large, last) = (&sizes[small..sizes.len() - 1], sizes.len() - 1);
        assert!(large.iter().all(|size| (1_536..=3_172).contains(size)), "{:?} of {last}", large);
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
}
