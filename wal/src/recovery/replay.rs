//! Applying the live frames, in order, to the state of the checkpoint.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use pontoon_proto::GroupId;

use super::{
    DamageWhy, DamagedRecord, RecoveryReport, TornTail, TornWhy,
    chain::Chain,
    cold::{Line, Lines},
    scan::{Found, read_frame},
};
use crate::{
    Error, Result,
    footer::Footer,
    frame::{BLOCK, FRAME_HEADER, FrameHeader, Probe},
    index::{Index, Place, SHARDS},
    manifest::{GroupState, Manifest},
    record::{self, Body, Head, Kind},
    rules::{Rule, is_broken},
    segment::Segment,
    shared::apply,
    table::Span,
    types::Damage,
};

/// A frame's head and records as far as they can be known.
struct Opened {
    header: FrameHeader,
    bytes: Bytes,
    /// Record heads with their offsets in the frame; `None` if no copy of the directory is readable.
    heads: Vec<(Head, u32)>,
}

/// A frame's header and its records' heads, each with its offset in the frame.
type PlacedHeads = (FrameHeader, Vec<(Head, u32)>);

/// The state while frames are applied.
pub(crate) struct Replay<'a> {
    manifest: &'a Manifest,
    /// What the checkpoint says of each group, by shard, ascending by id.
    states: Vec<Vec<(GroupId, &'a GroupState)>>,
    pub(super) index: Index,
    /// Damage that a checkpoint remembers stays until the group is destroyed.
    old_damage: BTreeMap<GroupId, Damage>,
    /// For each shard of the groups: everything at or below the checkpoint's LSN is applied, and its bounds hold.
    clipped: [AtomicBool; SHARDS],
    pub(crate) last_lsn: u64,
    pub(crate) last_seq: u64,
    /// The head of the last live frame, if that has one block.
    pub(crate) carry: Vec<u8>,
    /// Live frames above the proven mark.
    pub(crate) unproven: Vec<Found>,
    /// Which frames each segment holds.
    pub(crate) held: BTreeMap<u32, Held>,
    /// Relocated records that are still to be applied.
    cold: Lines,
}

/// The live frames of a segment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Held {
    pub(crate) incarnation: u64,
    pub(crate) first_seq: u64,
    pub(crate) last_seq: u64,
    pub(crate) span: Span,
}

impl<'a> Replay<'a> {
    /// Begins with a checkpoint's state.
    pub(crate) fn new(manifest: &'a Manifest) -> Replay<'a> {
        let index = Index::new();
        let mut old_damage = BTreeMap::new();
        let mut states: Vec<Vec<(GroupId, &GroupState)>> = (0..SHARDS).map(|_| Vec::new()).collect();
        for (group, state) in &manifest.groups {
            index.with_entry(*group, |target| target.restore(state));
            states[Index::shard_of(*group)].push((*group, state));
            if let Some(damage) = &state.damage {
                old_damage.insert(*group, damage.clone());
            }
        }
        manifest
            .tombstones
            .iter()
            .for_each(|(group, min_replica)| index.raise_tombstone(*group, *min_replica));
        // Whoever wrote the manifest sorted them; nobody is lost if not.
        states.iter_mut().for_each(|shard| shard.sort_unstable_by_key(|(group, _)| *group));
        Replay {
            manifest,
            states,
            index,
            old_damage,
            clipped: [const { AtomicBool::new(false) }; SHARDS],
            last_lsn: manifest.as_of.lsns.most(),
            last_seq: manifest.as_of.seqs[0],
            carry: Vec::new(),
            unproven: Vec::new(),
            held: BTreeMap::new(),
            cold: Lines::new(),
        }
    }

    /// Applies all live frames up to the torn tail, or those above the proven mark if the others are done.
    pub(crate) fn run(&mut self, chain: &Chain, rest_only: bool, report: &mut RecoveryReport) -> Result<()> {
        let mut lost = chain.missing().into_iter().peekable();
        let mut expected = chain.proven + 1;
        let from = if rest_only { expected } else { 0 };
        for (seq, found) in chain.frames.range(from..) {
            while let Some(gone) = lost.next_if(|gone| gone < seq) {
                self.lost_frame(chain, gone, report)?;
            }
            let beyond = *seq > chain.proven;
            // Beyond the mark, what follows a missing or a damaged frame is cut with it.
            let is_after_gap = beyond && *seq != expected && !is_broken(Rule::TornTailEnds);
            if is_after_gap || !self.frame(chain, found, beyond, report)? {
                let why = if is_after_gap { TornWhy::AfterGap } else { TornWhy::NotWhole };
                report.torn = Some(TornTail::at(found, why));
                break;
            }
            expected += u64::from(beyond);
        }
        for gone in lost {
            self.lost_frame(chain, gone, report)?;
        }
        self.cold_before(u64::MAX);
        (0..SHARDS).for_each(|shard| self.clip(shard));
        Ok(())
    }

    /// Lets the next run apply these records in their places.
    pub(super) fn bring(&mut self, cold: Lines) {
        self.cold = cold;
    }

    /// Applies relocated records up to an LSN that is not among them.
    fn cold_before(&mut self, lsn: u64) {
        while let Some(line) = self.cold.pop_front_if(|line| line.lsn < lsn) {
            apply_cold(&self.index, line);
        }
    }

    /// Ends the replay: damage and holes become final.
    pub(crate) fn finish(self, report: &mut RecoveryReport) -> Index {
        self.index.for_each_mut(|group, state| {
            let mut damage = state.damage.take().map(|damage| *damage).unwrap_or_default();
            if let Some(old) = self.old_damage.get(&group) {
                damage.hard_state |= old.hard_state;
                damage.truncation |= old.truncation;
                damage.meta |= old.meta;
                damage.entries.extend(&old.entries);
            }
            damage.entries.extend(state.holes());
            damage.entries.sort_unstable();
            damage.entries.dedup();
            if !damage.is_empty() {
                report.damaged_groups.insert(group, damage.clone());
                state.damage = Some(Box::new(damage));
            }
        });
        self.index
    }

    /// Applies one frame; `false` if it is torn.
    fn frame(
        &mut self,
        chain: &Chain,
        found: &Found,
        beyond: bool,
        report: &mut RecoveryReport,
    ) -> Result<bool> {
        if beyond && found.copy_at.is_some() {
            return Ok(false);
        }
        let Some(opened) = open_frame(chain, found, beyond)? else {
            return match beyond {
                true => Ok(false),
                false => Err(unattributable(found)),
            };
        };
        let good = |(head, offset): &(Head, u32)| {
            opened.bytes.get(*offset as usize..).is_some_and(|bytes| record::verify(bytes, head))
        };
        if beyond && !opened.heads.iter().all(good) && !is_broken(Rule::WholeFrames) {
            return Ok(false);
        }
        report.frames += 1;
        let base = found.block * BLOCK as u32;
        for (nth, (head, offset)) in opened.heads.iter().enumerate() {
            let lsn = opened.header.first_lsn + nth as u64;
            report.records += 1;
            let decoded = good(&(*head, *offset))
                .then(|| found.segment.open(base + offset, opened.bytes.slice(*offset as usize..)))
                .flatten()
                .and_then(|plain| record::decode(&plain));
            self.record(lsn, head, decoded.map(|(_, body)| body), &found.segment, base + offset, report);
            self.last_lsn = self.last_lsn.max(lsn);
        }
        self.passed(found);
        self.carry = if opened.header.blocks == 1 { carry_of(&opened) } else { Vec::new() };
        if beyond {
            self.unproven.push(found.clone());
        }
        Ok(true)
    }

    /// A frame was applied.
    pub(super) fn passed(&mut self, found: &Found) {
        self.last_seq = found.seq;
        let held = self.hold(found.segment.id, found.incarnation, found.seq);
        held.span.add((found.block, found.blocks), found.first_lsn, found.records);
    }

    fn hold(&mut self, segment: u32, incarnation: u64, seq: u64) -> &mut Held {
        let first = Held { incarnation, first_seq: seq, last_seq: seq, span: Span::default() };
        let held = self.held.entry(segment).or_insert(first);
        (held.incarnation, held.last_seq) = (incarnation, seq);
        held
    }

    /// Everything up to the proven mark was applied elsewhere: what is needed to go on from there. The last of it may be in
    /// a segment that was not scanned.
    pub(super) fn resume(&mut self, chain: &Chain, unscanned: Option<&Footer>) -> Result<()> {
        let scanned = chain.frames.range(..=chain.proven).next_back().map(|(_, found)| found);
        if let Some(footer) = unscanned
            && scanned.is_none_or(|found| found.seq < footer.facts.last_seq)
        {
            self.last_seq = self.last_seq.max(footer.facts.last_seq);
            self.carry = footer.head.to_vec();
            return Ok(());
        }
        let Some(last) = scanned else { return Ok(()) };
        self.carry = match open_frame(chain, last, false)? {
            Some(opened) if opened.header.blocks == 1 => carry_of(&opened),
            _ => Vec::new(),
        };
        Ok(())
    }

    /// A frame below the proven mark that nobody found: the next frame may have a copy of its head.
    fn lost_frame(&mut self, chain: &Chain, seq: u64, report: &mut RecoveryReport) -> Result<()> {
        let gone = || {
            let (path, offset) = match chain.frames.range(..seq).next_back() {
                Some((_, found)) => {
                    (found.segment.path.clone(), u64::from(found.block + found.blocks) * BLOCK as u64)
                }
                None => (std::path::PathBuf::from("the first segment"), 0),
            };
            let what = format!(
                "frame {seq} was acknowledged and is gone with every copy of its directory; \
                 restore the directory or replace the node"
            );
            Error::Corrupt { path, offset, what }
        };
        let (header, heads) = copied(chain, seq)?.ok_or_else(gone)?;
        // If no other frame of its segment is left, the one that carries its head tells where at least that was.
        let known = chain.frames.values().map(|found| &found.segment);
        let mut known = known.chain(chain.spare.values().map(|(segment, _)| segment));
        let next = chain.frames.get(&(seq + 1)).map(|next| &next.segment);
        let segment = known.find(|one| one.id == header.segment).or(next).ok_or_else(gone)?;
        let known_before = report.damaged.len();
        let base = header.block * BLOCK as u32;
        for (nth, (head, offset)) in heads.iter().enumerate() {
            let lsn = header.first_lsn + nth as u64;
            self.record(lsn, head, None, segment, base + offset, report);
            self.last_lsn = self.last_lsn.max(lsn);
        }
        report.damaged[known_before..].iter_mut().for_each(|record| record.why = DamageWhy::Gone);
        report.lost_frames += 1;
        self.last_seq = self.last_seq.max(seq);
        self.hold(header.segment, header.incarnation, seq);
        Ok(())
    }

    fn record(
        &mut self,
        lsn: u64,
        head: &Head,
        body: Option<Body>,
        segment: &Arc<Segment>,
        offset: u32,
        report: &mut RecoveryReport,
    ) {
        if body.is_none() {
            report.damaged.push(DamagedRecord::of(head, segment, offset));
        }
        self.cold_before(lsn);
        if let Some(copy) = self.cold.pop_front_if(|line| line.lsn == lsn)
            && (copy.terms.is_some() || body.is_none())
        {
            return apply_cold(&self.index, copy);
        }
        if !self.is_news(head.group, lsn) {
            return self.old_record(head, body, segment, offset);
        }
        self.clip(Index::shard_of(head.group));
        match body {
            Some(body) => {
                if matches!(body, Body::Destroy { .. }) {
                    self.old_damage.remove(&head.group);
                }
                apply(&self.index, head, body, &Place::Disk { segment, offset });
            }
            None => self.damaged_record(head, segment, offset),
        }
    }

    /// A record that the checkpoint covers: only entries within the bounds that it states still matter.
    fn old_record(&mut self, head: &Head, body: Option<Body>, segment: &Arc<Segment>, offset: u32) {
        if head.kind != Kind::Entries || !self.is_within_bounds(head) {
            return;
        }
        self.index.with_entry(head.group, |group| match body {
            Some(body) => group.apply(head, body, &Place::Disk { segment, offset }),
            None => group.append_damaged(head, segment, offset),
        });
    }

    /// A damaged record says what it was by its head in the directory; what its body said is lost.
    fn damaged_record(&mut self, head: &Head, segment: &Arc<Segment>, offset: u32) {
        if head.kind == Kind::Destroy {
            self.old_damage.remove(&head.group);
            return self.index.destroy(head.group, head.index);
        }
        self.index.with_entry(head.group, |group| group.apply_damaged(head, segment, offset));
    }

    /// Whether entries that the checkpoint covers reach into the bounds that it states.
    pub(super) fn is_within_bounds(&self, head: &Head) -> bool {
        self.reaches_bounds(head.group, head.index, head.index.saturating_add(u64::from(head.count)))
    }

    /// Whether `[low, high)` has something in common with the bounds that the checkpoint states of a group.
    pub(super) fn reaches_bounds(&self, group: GroupId, low: u64, high: u64) -> bool {
        let shard = &self.states[Index::shard_of(group)];
        let found = shard.binary_search_by_key(&group, |(id, _)| *id);
        found.is_ok_and(|at| high > shard[at].1.truncated.0 + 1 && low <= shard[at].1.last.0)
    }

    /// Whether a record comes after what the checkpoint says of its group.
    pub(super) fn is_news(&self, group: GroupId, lsn: u64) -> bool {
        lsn > self.manifest.as_of.lsns.of(group)
    }

    /// Everything up to the checkpoint's LSN of a shard is applied: now its bounds hold. Once only.
    pub(super) fn clip(&self, shard: usize) {
        // Only the thread that applies the shard's records asks.
        if self.clipped[shard].swap(true, Ordering::Relaxed) || is_broken(Rule::BoundsHold) {
            return;
        }
        for (group, state) in &self.states[shard] {
            self.index.with_entry(*group, |target| target.clip(state.truncated, state.last));
        }
    }

    /// Whether the checkpoint holds groups that are damaged.
    pub(super) fn remembers_damage(&self) -> bool {
        !self.old_damage.is_empty()
    }
}

/// Applies a relocated record.
pub(super) fn apply_cold(index: &Index, line: Line) {
    let Line { head, segment, offset, terms, .. } = line;
    index.with_entry(head.group, |group| match terms {
        Some(terms) => {
            segment.add_live(head.padded() as u64);
            group.append_outline(&head, &terms, &segment, offset);
        }
        None => group.append_damaged(&head, &segment, offset),
    });
}

fn unattributable(found: &Found) -> Error {
    Error::Corrupt {
        path: found.segment.path.clone(),
        offset: u64::from(found.block) * BLOCK as u64,
        what: format!(
            "frame {} was acknowledged and every copy of its directory is damaged; \
             restore the directory or replace the node",
            found.seq
        ),
    }
}

/// Reads a frame with the best copy of its head. `None` if no directory is readable.
fn open_frame(chain: &Chain, found: &Found, beyond: bool) -> Result<Option<Opened>> {
    let bytes = read_frame(found)?;
    let head_at = found.copy_at.map_or(0, |block| (block - found.block) as usize * BLOCK);
    let (Probe::Frame(header) | Probe::Copy(header)) = FrameHeader::probe(&bytes[head_at..]) else {
        // It was there a moment ago.
        return Ok(None);
    };
    found.segment.adopt(&header)?;
    let mut heads = found.segment.directory(&header, &bytes[head_at + FRAME_HEADER..]);
    if heads.is_none() && !beyond {
        let copy = header.copy_block as usize * BLOCK;
        heads = match copy {
            0 => {
                copied(chain, found.seq)?.map(|(_, heads)| heads.into_iter().map(|(head, _)| head).collect())
            }
            copy => found.segment.directory(&header, &bytes[copy + FRAME_HEADER..]),
        };
    }
    Ok(heads.map(|heads| {
        let heads = with_offsets(&header, heads);
        Opened { header, bytes, heads }
    }))
}

fn with_offsets(header: &FrameHeader, heads: Vec<Head>) -> Vec<(Head, u32)> {
    let mut offset = header.records_offset;
    let place = |head: Head| {
        let at = offset;
        offset += head.padded() as u32;
        (head, at)
    };
    heads.into_iter().map(place).collect()
}

/// The head of frame `seq` as the frame after it carries it, or its segment's footer.
fn copied(chain: &Chain, seq: u64) -> Result<Option<PlacedHeads>> {
    let next = chain.frames.get(&(seq + 1));
    let carried = next.map(|next| carried(next, seq)).transpose()?.flatten();
    Ok(carried.or_else(|| placed(&chain.spare.get(&seq)?.1, seq)))
}

/// The head of frame `seq` as the frame after it carries it.
fn carried(next: &Found, seq: u64) -> Result<Option<PlacedHeads>> {
    let bytes = read_frame(next)?;
    let head_at = next.copy_at.map_or(0, |block| (block - next.block) as usize * BLOCK);
    let (Probe::Frame(outer) | Probe::Copy(outer)) = FrameHeader::probe(&bytes[head_at..]) else {
        return Ok(None);
    };
    let carry = &bytes[outer.carry_offset as usize..][..outer.carry_len as usize];
    next.segment.adopt(&outer)?;
    Ok(placed(carry, seq).filter(|_| next.segment.vouches_for_carry(&outer, carry)))
}

/// A copy of the head of frame `seq`.
fn placed(copy: &[u8], seq: u64) -> Option<PlacedHeads> {
    let Probe::Copy(header) = FrameHeader::probe(copy) else { return None };
    let heads = header.directory(&copy[FRAME_HEADER..]).filter(|_| header.seq == seq)?;
    let heads = with_offsets(&header, heads);
    Some((header, heads))
}

/// The head of a frame of one block, for the next frame to carry.
fn carry_of(opened: &Opened) -> Vec<u8> {
    opened.header.copy_of_head(&opened.bytes)
}
