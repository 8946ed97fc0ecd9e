//! Applying the live frames, in order, to the state of the checkpoint.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use pontoon_proto::GroupId;

use super::{
    DamagedRecord, RecoveryReport, TornTail,
    chain::Chain,
    cold::{Line, Lines},
    scan::{Found, read_frame},
};
use crate::{
    Error, Result,
    frame::{BLOCK, FRAME_HEADER, FrameHeader, Probe},
    index::{Index, Place},
    manifest::{GroupState, Manifest},
    record::{self, Body, Head, Kind},
    rules::{Rule, is_broken},
    segment::Segment,
    shared::apply,
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
    states: BTreeMap<GroupId, &'a GroupState>,
    pub(super) index: Index,
    /// Damage that a checkpoint remembers stays until the group is destroyed.
    old_damage: BTreeMap<GroupId, Damage>,
    /// For each share of the groups: everything at or below the checkpoint's LSN is applied, and its bounds hold.
    clipped: Vec<bool>,
    pub(crate) last_lsn: u64,
    pub(crate) last_seq: u64,
    /// The head of the last live frame, if that has one block.
    pub(crate) carry: Vec<u8>,
    /// Live frames above the proven mark.
    pub(crate) unproven: Vec<Found>,
    /// The last live frame of each segment.
    pub(crate) last_in: BTreeMap<u32, (u64, u64, u64)>,
    /// Relocated records that are still to be applied.
    cold: Lines,
}

impl<'a> Replay<'a> {
    /// Begins with a checkpoint's state. The groups are dealt out in so many shares.
    pub(crate) fn new(manifest: &'a Manifest, shares: usize) -> Replay<'a> {
        let index = Index::new();
        let mut old_damage = BTreeMap::new();
        for (group, state) in &manifest.groups {
            index.with_entry(*group, |target| target.restore(state));
            if let Some(damage) = &state.damage {
                old_damage.insert(*group, damage.clone());
            }
        }
        manifest
            .tombstones
            .iter()
            .for_each(|(group, min_replica)| index.raise_tombstone(*group, *min_replica));
        Replay {
            manifest,
            states: manifest.groups.iter().map(|(group, state)| (*group, state)).collect(),
            index,
            old_damage,
            clipped: vec![false; shares],
            last_lsn: manifest.as_of.lsn,
            last_seq: manifest.as_of.seqs[0],
            carry: Vec::new(),
            unproven: Vec::new(),
            last_in: BTreeMap::new(),
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
            if beyond && *seq != expected && !is_broken(Rule::TornTailEnds)
                || !self.frame(chain, found, beyond, report)?
            {
                report.torn = Some(TornTail::at(found));
                break;
            }
            expected += u64::from(beyond);
        }
        for gone in lost {
            self.lost_frame(chain, gone, report)?;
        }
        self.clip();
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
            is_broken(Rule::RecordsChecked)
                || opened.bytes.get(*offset as usize..).is_some_and(|bytes| record::verify(bytes, head))
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
        let last = self.last_in.entry(found.segment.id).or_insert((found.seq, 0, 0));
        (last.1, last.2) = (found.seq, found.incarnation);
    }

    /// Everything up to the proven mark was applied elsewhere: what is needed to go on from there.
    pub(super) fn resume(&mut self, chain: &Chain) -> Result<()> {
        let Some((_, last)) = chain.frames.range(..=chain.proven).next_back() else { return Ok(()) };
        self.carry = match open_frame(chain, last, false)? {
            Some(opened) if opened.header.blocks == 1 => carry_of(&opened),
            _ => Vec::new(),
        };
        Ok(())
    }

    /// A frame below the proven mark that nobody found: the next frame may have a copy of its head.
    fn lost_frame(&mut self, chain: &Chain, seq: u64, report: &mut RecoveryReport) -> Result<()> {
        let next = chain.frames.get(&(seq + 1));
        let Some((header, heads)) = next.map(|next| carried(next, seq)).transpose()?.flatten() else {
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
            return Err(Error::Corrupt { path, offset, what });
        };
        let Some(segment) = next.map(|next| next.segment.clone()) else { return Ok(()) };
        let segment = chain
            .frames
            .values()
            .map(|found| &found.segment)
            .find(|s| s.id == header.segment)
            .unwrap_or(&segment);
        let base = header.block * BLOCK as u32;
        for (nth, (head, offset)) in heads.iter().enumerate() {
            let lsn = header.first_lsn + nth as u64;
            self.record(lsn, head, None, segment, base + offset, report);
            self.last_lsn = self.last_lsn.max(lsn);
        }
        report.lost_frames += 1;
        self.last_seq = self.last_seq.max(seq);
        let (first, _, _) = self.last_in.get(&header.segment).copied().unwrap_or((seq, 0, 0));
        self.last_in.insert(header.segment, (first, seq, header.incarnation));
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
            report.damaged.push(DamagedRecord {
                path: segment.path.clone(),
                segment: segment.id,
                offset: u64::from(offset),
                bytes: u64::from(head.len),
                group: head.group,
                entries: (head.kind == Kind::Entries)
                    .then(|| (head.index, head.index + u64::from(head.count))),
            });
        }
        self.cold_before(lsn);
        if let Some(copy) = self.cold.pop_front_if(|line| line.lsn == lsn)
            && (copy.terms.is_some() || body.is_none())
        {
            return apply_cold(&self.index, copy);
        }
        if lsn <= self.manifest.as_of.lsn {
            return self.old_record(head, body, segment, offset);
        }
        self.clip();
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
        let end = head.index.saturating_add(u64::from(head.count));
        self.states
            .get(&head.group)
            .is_some_and(|state| end > state.truncated.0 + 1 && head.index <= state.last.0)
    }

    /// Everything up to the checkpoint's LSN is applied: now its bounds hold, in each share once.
    fn clip(&mut self) {
        self.cold_before(u64::MAX);
        let shares = self.clipped.len();
        for share in 0..shares {
            if !std::mem::replace(&mut self.clipped[share], true) {
                self.clip_share(share, shares);
            }
        }
    }

    pub(super) fn clip_share(&self, share: usize, shares: usize) {
        if is_broken(Rule::BoundsHold) {
            return;
        }
        for (group, state) in &self.states {
            if Index::shard_of(*group) % shares == share {
                self.index.with_entry(*group, |target| target.clip(state.truncated, state.last));
            }
        }
    }

    pub(super) fn is_clipped(&self, share: usize) -> bool {
        self.clipped[share]
    }

    pub(super) fn note_clipped(&mut self, clipped: &[bool]) {
        self.clipped.copy_from_slice(clipped);
    }

    pub(super) fn as_of_lsn(&self) -> u64 {
        self.manifest.as_of.lsn
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
            0 => chain
                .frames
                .get(&(found.seq + 1))
                .map(|next| carried(next, found.seq))
                .transpose()?
                .flatten()
                .map(|(_, heads)| heads.into_iter().map(|(head, _)| head).collect()),
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

/// The head of frame `seq` as the frame after it carries it.
fn carried(next: &Found, seq: u64) -> Result<Option<PlacedHeads>> {
    let bytes = read_frame(next)?;
    let head_at = next.copy_at.map_or(0, |block| (block - next.block) as usize * BLOCK);
    let (Probe::Frame(outer) | Probe::Copy(outer)) = FrameHeader::probe(&bytes[head_at..]) else {
        return Ok(None);
    };
    let carry = &bytes[outer.carry_offset as usize..][..outer.carry_len as usize];
    next.segment.adopt(&outer)?;
    let Probe::Copy(header) = FrameHeader::probe(carry) else { return Ok(None) };
    if header.seq != seq || !next.segment.vouches_for_carry(&outer, carry) {
        return Ok(None);
    }
    let heads = header.directory(&carry[FRAME_HEADER..]);
    Ok(heads.map(|heads| {
        let heads = with_offsets(&header, heads);
        (header, heads)
    }))
}

/// The head of a frame of one block, for the next frame to carry.
fn carry_of(opened: &Opened) -> Vec<u8> {
    opened.header.copy_of_head(&opened.bytes)
}
