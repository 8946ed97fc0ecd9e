//! Pointing the index at a copy of a record.

use std::sync::Arc;

use super::{Extent, Group, RUN_EXTENTS, Run};
use crate::{
    rules::{Rule, is_broken},
    segment::Segment,
};

/// A record of entries at its old place.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spot<'a> {
    pub(crate) segment: &'a Arc<Segment>,
    pub(crate) offset: u32,
    /// Its first index.
    pub(crate) first: u64,
}

impl Group {
    /// How many entries of the record that begins with this index at this place are part of the log.
    pub(crate) fn live_at(&self, spot: Spot<'_>) -> Option<u64> {
        let (run, nth) = self.find(spot)?;
        Some(self.runs[run].extents[nth].count())
    }

    /// Points at a copy of a record, if its place is still what it was. Cuts and truncations since then stay in force;
    /// whoever was handed the old place may go on reading there, since he holds the segment.
    pub(crate) fn repoint(&mut self, from: Spot<'_>, to: &Arc<Segment>, offset: u32) -> bool {
        let Some((at, nth)) = self.find(from) else { return false };
        let run = &mut self.runs[at];
        let extent = run.extents[nth];
        // A log that was plain is encrypted by and by: then the copy is longer than the original.
        let len = extent.len() + to.tag_len() as u32 - run.segment.tag_len() as u32;
        let copy = Extent::new(offset, len, extent.count() as u16);
        self.disk_bytes = self.disk_bytes + u64::from(len) - u64::from(extent.len());
        // Counted at its new place first: a segment that is needed never counts as dead.
        to.add_live(u64::from(len));
        run.segment.sub_live(u64::from(extent.len()));
        let (first, end) = (from.first, from.first + extent.count());
        let behind = Run {
            segment: run.segment.clone(),
            first: end,
            end: run.end,
            extents: run.extents.split_off(nth + 1),
        };
        run.extents.pop();
        run.end = first;
        let mut next = at + 1;
        if run.extents.is_empty() {
            self.runs.remove(at);
            next = at;
        }
        let before = next.checked_sub(1).and_then(|at| self.runs.get_mut(at));
        let fits =
            |run: &&mut Run| run.end == first && run.segment.id == to.id && run.extents.len() < RUN_EXTENTS;
        match before.filter(fits) {
            Some(run) => {
                run.extents.push(copy);
                run.end = end;
            }
            None => {
                self.runs.insert(next, Run { segment: to.clone(), first, end, extents: vec![copy] });
                next += 1;
            }
        }
        if !behind.extents.is_empty() {
            self.runs.insert(next, behind);
        }
        true
    }

    /// The run and the extent at this place.
    fn find(&self, spot: Spot<'_>) -> Option<(usize, usize)> {
        let at = self.runs.partition_point(|run| run.first <= spot.first).checked_sub(1)?;
        let run = &self.runs[at];
        let mut first = run.first;
        let nth = run.extents.iter().position(|extent| {
            let here = first == spot.first;
            first += extent.count();
            here
        })?;
        let same = Arc::ptr_eq(&run.segment, spot.segment) && run.extents[nth].offset() == spot.offset;
        (same || is_broken(Rule::StillTheSame)).then_some((at, nth))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{RealFs, fs::Fs, fs::OpenMode};

    fn segment(id: u32) -> Arc<Segment> {
        let file = RealFs.open(std::path::Path::new("/dev/null"), OpenMode::Read).unwrap();
        Arc::new(Segment::new(id, u128::from(id), "/dev/null".into(), file))
    }

    /// A group of so many records of two entries, 64 bytes each, in a segment.
    fn group(segment: &Arc<Segment>, records: u64) -> Group {
        let mut group = Group::default();
        for nth in 0..records {
            group.push_extent(segment, nth as u32 * 64, 64, 1 + nth * 2, 2);
        }
        group.last = records * 2;
        group.terms = vec![(1, 1)];
        group
    }

    fn places(group: &Group) -> Vec<(u32, u64, u64)> {
        let runs = group.runs.iter();
        runs.map(|run| (run.segment.id, run.first, run.end)).collect()
    }

    #[test]
    fn records_move_one_by_one_and_runs_join() {
        let (old, new) = (segment(1), segment(2));
        let mut group = group(&old, 5);
        let mut step = |first: u64, offset, to| {
            let from = Spot { segment: &old, offset, first };
            assert!(group.repoint(from, &new, to) && !group.repoint(from, &new, to));
            group.check_invariants();
            places(&group)
        };
        assert_eq!(step(5, 128, 0), [(1, 1, 5), (2, 5, 7), (1, 7, 11)]);
        assert_eq!(step(7, 192, 64), [(1, 1, 5), (2, 5, 9), (1, 9, 11)]);
        assert_eq!(step(1, 0, 128), [(2, 1, 3), (1, 3, 5), (2, 5, 9), (1, 9, 11)]);
        assert_eq!(step(9, 256, 192), [(2, 1, 3), (1, 3, 5), (2, 5, 11)]);
        step(3, 64, 256);
        assert_eq!((old.live_bytes(), new.live_bytes()), (0, 5 * 64));
    }

    #[test]
    fn what_changed_meanwhile_stays_where_it_is() {
        let (old, new) = (segment(1), segment(2));
        let mut group = group(&old, 3);
        group.truncate_prefix(2, 1);
        assert!(!group.repoint(Spot { segment: &old, offset: 0, first: 1 }, &new, 0), "it is gone");
        group.cut(6);
        assert!(
            group.repoint(Spot { segment: &old, offset: 128, first: 5 }, &new, 0),
            "its beginning is left"
        );
        assert_eq!(group.live_at(Spot { segment: &new, offset: 0, first: 5 }), Some(1));
        assert!(!group.repoint(Spot { segment: &old, offset: 0, first: 3 }, &new, 0), "another place");
        assert!(!group.repoint(Spot { segment: &new, offset: 64, first: 3 }, &new, 0), "another segment");
        assert_eq!((old.live_bytes(), new.live_bytes()), (64, 64));
    }
}
