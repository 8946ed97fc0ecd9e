//! Comparing footers with the frames that they stand for.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::frames::{Fault, FaultKind, FrameInfo, Survey};
use crate::{codec::round_up, frame::BLOCK, index::SHARDS};

/// A record with entries: group, first index, number of entries, length.
type Entries = (u64, u64, u64, u64);

/// The records with entries of each segment that has a footer, by their offsets.
#[derive(Default)]
pub(super) struct Seen(BTreeMap<u32, HashMap<u64, Entries>>);

impl Seen {
    /// Notes what a frame holds.
    pub(super) fn note(&mut self, survey: &Survey, info: &FrameInfo) {
        if !survey.footers.contains_key(&info.segment) {
            return;
        }
        let records = self.0.entry(info.segment).or_default();
        for record in info.records.iter().flatten() {
            if let Some((low, high)) = record.entries {
                let len = round_up(record.bytes as usize, 8) as u64;
                records.insert(record.offset, (record.group.0, low, high - low, len));
            }
        }
    }
}

/// The footers that cannot be read, and those that list what the frames do not hold. Opens scan the segments of the former,
/// so that nothing is lost by that; the latter would be believed. Nobody can compare where frames are wanting.
pub(super) fn check(survey: &Survey, seen: &Seen, wanting: &BTreeSet<u32>) -> Vec<Fault> {
    let mut faults = Vec::new();
    for listed in &survey.manifest.segments {
        let Some(at) = listed.footer else { continue };
        let segment = survey.files.get(&listed.id);
        // Without the key of an encrypted one nobody can look.
        let readable = segment.filter(|segment| listed.key_id == 0 || segment.seal().is_some());
        let Some(segment) = readable else { continue };
        let fault = |kind| Fault {
            path: segment.path.clone(),
            segment: listed.id,
            offset: u64::from(at.block) * BLOCK as u64,
            frame: None,
            kind,
        };
        let Some(footer) = survey.footers.get(&listed.id) else {
            faults.push(fault(FaultKind::Footer));
            continue;
        };
        if wanting.contains(&listed.id) {
            continue;
        }
        let records = seen.0.get(&listed.id);
        let mut wrong = false;
        for shard in 0..SHARDS {
            let read = footer.runs(shard, |run| {
                let mut first = run.first;
                for extent in &run.extents {
                    let record = records.and_then(|records| records.get(&u64::from(extent.offset())));
                    wrong |= record.is_none_or(|(group, low, count, len)| {
                        (*group, *low, *len) != (run.group.0, first, u64::from(extent.len()))
                            || *count < extent.count()
                    });
                    first += extent.count();
                }
            });
            wrong |= read.is_none();
        }
        if wrong {
            faults.push(fault(FaultKind::FooterWrong));
        }
    }
    faults
}
