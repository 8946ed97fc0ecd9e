//! What a checkpoint says of the groups: the index, captured one shard after the other while the log goes on.
//!
//! Each shard is described as of an LSN of its own. A record counts as part of the checkpoint if its LSN is at or below that
//! of its group's shard, so that a batch may lie on both sides; the checkpoint is written when the highest of the LSNs is
//! durable, and with it every batch of which it holds a part. Submitters wait for the copy of one shard at most.

use std::sync::Arc;

use pontoon_proto::GroupId;

use crate::{
    footer::{self, Draft, Facts},
    frame::{BLOCK, FrameHeader, Probe},
    fs::{File, FileOp},
    index::SHARDS,
    manifest::{GroupState, ShardLsns},
    recovery::scan::read_blocks,
    rng::Rng,
    rules::{Rule, is_broken},
    shared::Shared,
    table::{Sealed, SealedFooter, Span, Table},
};

/// Shards that are copied in one step of the background.
const SHARDS_A_STEP: usize = 16;

/// The state of all groups, each shard at its LSN.
pub(crate) struct Capture {
    pub(crate) lsns: ShardLsns,
    /// How many shards are captured.
    done: usize,
    pub(crate) groups: Vec<(GroupId, GroupState)>,
    pub(crate) tombstones: Vec<(GroupId, u64)>,
    /// Segments that held nothing when the capture began; then they hold nothing later.
    pub(crate) dead: Vec<u32>,
    /// The last durable cold frame then: what made those segments dead is at or before it.
    pub(crate) cold_seq: u64,
    /// Of segments that were sealed when the capture began: all their records are in it. Ascending.
    drafts: Vec<Draft>,
}

impl Capture {
    /// Begins; [`Capture::step`] does the work.
    pub(crate) fn begin(shared: &Shared) -> Capture {
        let table = shared.table();
        let dead: Vec<u32> = table.dead().collect();
        let mut drafts: Vec<u32> = table.unsettled().filter(|id| !dead.contains(id)).collect();
        if is_broken(Rule::FooterOfSealed) {
            drafts.extend(table.active.iter().map(|active| active.segment.id));
            drafts.sort_unstable();
        }
        Capture {
            lsns: ShardLsns::default(),
            done: 0,
            groups: Vec::new(),
            tombstones: Vec::new(),
            dead,
            cold_seq: table.cold_seq,
            drafts: drafts.into_iter().map(Draft::new).collect(),
        }
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.done == SHARDS
    }

    /// Captures some more.
    pub(crate) fn step(&mut self, shared: &Shared) {
        for _ in 0..SHARDS_A_STEP.min(SHARDS - self.done) {
            self.shard(shared);
        }
        if self.is_complete() {
            self.groups.sort_unstable_by_key(|(group, _)| *group);
            self.tombstones.sort_unstable();
            // Relaxed batches are in it too: they are wanted on disk.
            shared.queue().flush = true;
            shared.wake_writer();
        }
    }

    fn shard(&mut self, shared: &Shared) {
        let queue = shared.queue();
        self.lsns.0[self.done] = queue.next_lsn - 1;
        // Whoever holds the shard keeps later records from it; submitters to others go on.
        let shard = shared.index.nth_shard(self.done);
        drop(queue);
        for (group, state) in &shard.groups {
            self.groups.push((*group, state.checkpoint()));
            if !self.drafts.is_empty() {
                footer::draft(&mut self.drafts, *group, state);
            }
        }
        self.tombstones.extend(shard.tombstones.iter().map(|(group, id)| (*group, *id)));
        self.done += 1;
    }

    /// The writes that put the drafts into their segments, and what the table says of them afterwards. Called when all that
    /// was captured is durable.
    pub(crate) fn footers(&mut self, shared: &Shared, table: &mut Table, rng: &mut Rng) -> Footers {
        let mut footers = Footers::default();
        let lsn = self.lsns.least();
        for draft in std::mem::take(&mut self.drafts) {
            // Of a segment that is being emptied meanwhile the draft holds a part only.
            let sealed = table.sealed.get_mut(&draft.segment);
            let Some(sealed) = sealed.filter(|sealed| sealed.span.end_block > 0) else { continue };
            let facts = facts(shared, sealed, lsn);
            let head = last_head(sealed);
            let seal = sealed.segment.seal().map(|seal| &**seal);
            let drawn = if seal.is_some() { rng.next_u64() } else { 0 };
            let footer =
                head.and_then(|head| draft.seal(&facts, &head, shared.options.segment_bytes, seal, drawn));
            match footer {
                Some((at, data)) => {
                    let op = FileOp::WriteDurable { offset: u64::from(at.block) * BLOCK as u64, data };
                    footers.ops.push((sealed.segment.file.clone(), op));
                    footers.done.push((draft.segment, SealedFooter { at, lsn }));
                }
                // More terms than room was kept for, or rot already: opens scan it.
                None => sealed.span.end_block = 0,
            }
        }
        footers
    }
}

/// Footers on their way to the disk.
#[derive(Default)]
pub(crate) struct Footers {
    pub(crate) ops: Vec<(Arc<dyn File>, FileOp)>,
    pub(crate) done: Vec<(u32, SealedFooter)>,
}

fn facts(shared: &Shared, sealed: &Sealed, lsn: u64) -> Facts {
    Facts {
        store: shared.identity.store,
        epoch: sealed.segment.epoch,
        segment: sealed.segment.id,
        stream: sealed.stream,
        incarnation: sealed.incarnation,
        first_seq: sealed.first_seq,
        last_seq: sealed.last_seq,
        block: sealed.span.end_block,
        lsn,
        first_lsn: sealed.span.first_lsn,
        last_lsn: sealed.span.last_lsn,
    }
}

/// The copy of the last frame's head that the footer keeps; empty if the frame has its own. `None`: it is not readable.
fn last_head(sealed: &Sealed) -> Option<Vec<u8>> {
    let Span { last_block, end_block, .. } = sealed.span;
    let blocks = end_block - last_block;
    if blocks > 1 {
        return Some(Vec::new());
    }
    let bytes = read_blocks(&sealed.segment, last_block, blocks).ok()?;
    match FrameHeader::probe(&bytes) {
        Probe::Frame(header) if header.seq == sealed.last_seq => Some(header.copy_of_head(&bytes)),
        _ => None,
    }
}
