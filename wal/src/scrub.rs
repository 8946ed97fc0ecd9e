//! Looking for rot in sealed segments while the log serves.
//!
//! Every record to which the index points is read and its CRC checked, and every frame's head is looked for. Held by its
//! `Arc`, a segment is not used again meanwhile; what was truncated or cut meanwhile is no loss.

use std::{ops::RangeInclusive, path::PathBuf, sync::Arc};

use pontoon_proto::GroupId;

use crate::{
    DamageWhy, DamagedRecord, Error, Result,
    frame::BLOCK,
    fs::read_exact,
    read::{Extent, note_damage},
    record,
    recovery::frames_in,
    segment::Segment,
    shared::Shared,
};

/// One read asks for at most this much, unless a record is larger.
const READ_BYTES: u32 = 1 << 20;

/// What a scrub found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ScrubReport {
    /// Sealed segments that were looked at.
    pub segments: usize,
    /// Records that were read and checked.
    pub records: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Records that changed on disk. Their groups answer [`Error::Damaged`] from now on, through checkpoints and opens.
    pub damaged: Vec<DamagedRecord>,
    /// Frames whose own head is gone, by file and the offset at which the frame before it ends. What they hold was checked
    /// and is counted above; the next open finds them by the copy of their head, so replace the disk before that is gone too.
    pub damaged_heads: Vec<(PathBuf, u64)>,
}

/// A sealed segment with the frames that it must hold.
struct Target {
    segment: Arc<Segment>,
    incarnation: u64,
    seqs: RangeInclusive<u64>,
}

/// Checks every sealed segment.
pub(crate) fn scrub(shared: &Shared) -> Result<ScrubReport> {
    let targets: Vec<Target> = {
        let table = shared.table();
        let target = |(id, sealed): (&u32, &crate::table::Sealed)| {
            debug_assert_eq!(*id, sealed.segment.id);
            let (segment, incarnation) = (sealed.segment.clone(), sealed.incarnation);
            Target { segment, incarnation, seqs: sealed.first_seq..=sealed.last_seq }
        };
        table.sealed.iter().map(target).collect()
    };
    let mut report = ScrubReport::default();
    for target in targets {
        report.segments += 1;
        records(shared, &target.segment, &mut report)?;
        heads(shared, &target, &mut report)?;
    }
    Ok(report)
}

/// Checks the records that somebody may still ask for.
fn records(shared: &Shared, segment: &Arc<Segment>, report: &mut ScrubReport) -> Result<()> {
    let mut extents: Vec<(GroupId, Extent)> = Vec::new();
    shared.index.for_each(|group, state| {
        state.extents_in(segment, |offset, len, first, count| {
            extents.push((group, Extent { segment: segment.clone(), offset, len, first, count }));
        });
    });
    extents.sort_unstable_by_key(|(_, extent)| extent.offset);
    let mut rest = &extents[..];
    while let Some((_, first)) = rest.first() {
        let start = first.offset;
        let fits =
            rest.partition_point(|(_, extent)| extent.offset + extent.len <= start + READ_BYTES).max(1);
        let (now, later) = rest.split_at(fits);
        let end = now.iter().map(|(_, extent)| extent.offset + extent.len).max().unwrap_or(start);
        let mut bytes = vec![0; (end - start) as usize];
        read_exact(&*segment.file, &mut bytes, u64::from(start))
            .map_err(|source| Error::io("read", &segment.path, source))?;
        for (group, extent) in now {
            let record = &bytes[(extent.offset - start) as usize..][..extent.len as usize];
            let is_it = |head: record::Head| head.group == *group && head.index == extent.first;
            report.records += 1;
            report.bytes += u64::from(extent.len);
            if !record::verify_self(record) || !record::decode_head(record).is_some_and(is_it) {
                lost(shared, *group, extent, report);
            }
        }
        rest = later;
    }
    Ok(())
}

/// A record changed on disk: a loss only if it is still part of its group's log.
fn lost(shared: &Shared, group: GroupId, extent: &Extent, report: &mut ScrubReport) {
    let still = shared.index.with(group, |state| state.holds(&extent.segment, extent.offset));
    if still != Some(true) {
        return;
    }
    note_damage(shared, group, extent);
    report.damaged.push(DamagedRecord {
        path: extent.segment.path.clone(),
        segment: extent.segment.id,
        offset: u64::from(extent.offset),
        bytes: u64::from(extent.len),
        group,
        entries: Some((extent.first, extent.first + extent.count)),
        why: DamageWhy::Changed,
    });
}

/// Looks for the head of every frame that the segment must hold.
fn heads(shared: &Shared, target: &Target, report: &mut ScrubReport) -> Result<()> {
    let Target { segment, incarnation, seqs } = target;
    let mut found = frames_in(segment, shared.identity.store, shared.options.segment_bytes)?;
    found.retain(|frame| frame.incarnation == *incarnation && seqs.contains(&frame.seq));
    found.sort_unstable_by_key(|frame| frame.seq);
    let (mut expected, mut offset) = (*seqs.start(), 0);
    for frame in &found {
        if frame.seq != expected || frame.copy_at.is_some() {
            tracing::error!(path = %segment.path.display(), offset, "a frame's head is damaged");
            report.damaged_heads.push((segment.path.clone(), offset));
        }
        expected = frame.seq + 1;
        offset = u64::from(frame.block + frame.blocks) * BLOCK as u64;
    }
    if expected <= *seqs.end() {
        report.damaged_heads.push((segment.path.clone(), offset));
    }
    Ok(())
}
