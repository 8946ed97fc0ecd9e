//! The receiving side of one snapshot.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use pontoon_proto::{GroupId, v1};

use super::FORMAT;
use crate::types::Event;

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
    use super::{
        super::{
            serve::SnapshotServer,
            tests::{publish, source},
        },
        *,
    };

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
}
