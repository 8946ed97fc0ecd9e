//! What was answered for each group lately: columns of time, in each of them the busiest groups and the sum of all others.
//!
//! There are two ranges: ten minutes by columns of ten seconds, and six hours by columns of two minutes. A column keeps 64 groups of 32
//! bytes, the one that is being filled at most 4,096 of 48: all together less than 1 MiB, however many groups there are.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use futures::future::join_all;
use pontoon_proto::{GroupId, NodeId, v1};
use tonic::Status;

use crate::shared::Shared;

/// How long columns are, in seconds, and how many there are.
const RANGES: [(u32, usize); 2] = [(10, 60), (120, 180)];
/// So many groups of a column are told apart.
const TOLD_APART: usize = 64;
/// Of the column that is being filled; whoever comes later counts among the others.
const OPEN_MOST: usize = 4_096;
/// How long a node may take to tell its columns.
const ANSWER: Duration = Duration::from_secs(2);

/// What was answered in some time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Sum {
    pub(crate) writes: u64,
    pub(crate) reads: u64,
    pub(crate) bytes: u64,
}

impl Sum {
    fn add(&mut self, other: Sum) {
        self.writes += other.writes;
        self.reads += other.reads;
        self.bytes += other.bytes;
    }

    fn cell(self, group: u64) -> v1::HeatCell {
        v1::HeatCell { group, writes: self.writes, reads: self.reads, bytes: self.bytes }
    }

    fn of(cell: &v1::HeatCell) -> Sum {
        Sum { writes: cell.writes, reads: cell.reads, bytes: cell.bytes }
    }
}

/// The columns of one node.
pub(crate) struct Heat {
    ranges: Vec<Range>,
}

struct Range {
    width_s: u32,
    most: usize,
    closed: VecDeque<v1::HeatColumn>,
    from_s: u64,
    open: HashMap<u64, Sum>,
    rest: Sum,
}

impl Default for Heat {
    fn default() -> Self {
        let range = |(width_s, most)| Range {
            width_s,
            most,
            closed: VecDeque::new(),
            from_s: 0,
            open: HashMap::new(),
            rest: Sum::default(),
        };
        Heat { ranges: RANGES.into_iter().map(range).collect() }
    }
}

impl Heat {
    /// It is this second. A clock that goes back begins no column before the present one.
    pub(crate) fn at(&mut self, now_s: u64) {
        self.ranges.iter_mut().for_each(|range| range.at(now_s));
    }

    pub(crate) fn add(&mut self, group: GroupId, sum: Sum) {
        for range in &mut self.ranges {
            let full = range.open.len() >= OPEN_MOST && !range.open.contains_key(&group.0);
            let counted = if full { &mut range.rest } else { range.open.entry(group.0).or_default() };
            counted.add(sum);
        }
    }

    /// The columns from a second on, of the range whose columns are most like what is wanted.
    pub(crate) fn columns(&self, width_s: u32, from_s: u64) -> v1::HeatReply {
        let range = self.ranges.iter().min_by_key(|range| range.width_s.abs_diff(width_s));
        let Some(range) = range else { return v1::HeatReply::default() };
        let wanted = |column: &&v1::HeatColumn| column.from_s >= from_s;
        let mut columns: Vec<_> = range.closed.iter().filter(wanted).cloned().collect();
        columns.extend(range.close().filter(|column| column.from_s >= from_s));
        v1::HeatReply { width_s: range.width_s, columns, silent: Vec::new() }
    }
}

impl Range {
    fn at(&mut self, now_s: u64) {
        let from_s = now_s - now_s % u64::from(self.width_s);
        if from_s <= self.from_s {
            return;
        }
        self.closed.extend(self.close());
        while self.closed.len() >= self.most {
            self.closed.pop_front();
        }
        (self.from_s, self.rest) = (from_s, Sum::default());
        self.open = HashMap::new();
    }

    /// The present column as it is; `None` if nothing was answered.
    fn close(&self) -> Option<v1::HeatColumn> {
        column(self.from_s, self.open.iter().map(|(&group, &sum)| (group, sum)).collect(), self.rest)
    }
}

fn column(from_s: u64, mut sums: Vec<(u64, Sum)>, mut rest: Sum) -> Option<v1::HeatColumn> {
    sums.sort_unstable_by_key(|(group, sum)| (Reverse(sum.writes + sum.reads), *group));
    sums.iter().skip(TOLD_APART).for_each(|(_, sum)| rest.add(*sum));
    sums.truncate(TOLD_APART);
    if sums.is_empty() && rest == Sum::default() {
        return None;
    }
    let cells = sums.into_iter().map(|(group, sum)| sum.cell(group)).collect();
    Some(v1::HeatColumn { from_s, cells, rest: Some(rest.cell(0)) })
}

/// The columns of several nodes as one: each has answered its part of a group's calls.
fn together(replies: impl IntoIterator<Item = v1::HeatReply>) -> Vec<v1::HeatColumn> {
    let mut all: BTreeMap<u64, (BTreeMap<u64, Sum>, Sum)> = BTreeMap::new();
    for told in replies.into_iter().flat_map(|reply| reply.columns) {
        let (sums, rest) = all.entry(told.from_s).or_default();
        told.cells.iter().for_each(|cell| sums.entry(cell.group).or_default().add(Sum::of(cell)));
        told.rest.iter().for_each(|cell| rest.add(Sum::of(cell)));
    }
    all.into_iter()
        .filter_map(|(from_s, (sums, rest))| column(from_s, sums.into_iter().collect(), rest))
        .collect()
}

impl Shared {
    /// What was answered here, or on all nodes that answer.
    pub(crate) async fn heat(self: &Arc<Self>, request: v1::HeatRequest) -> Result<v1::HeatReply, Status> {
        let own = self.meter.lately(request.width_s, request.from_s);
        if request.local {
            return Ok(own);
        }
        let width_s = own.width_s;
        let ask = v1::HeatRequest { local: true, ..request };
        let view = self.map.view();
        let others =
            view.present().filter_map(|node| NodeId::new(node.id).ok()).filter(|&node| node != self.own);
        let asked = others.map(async |node| (node, self.at_within(ANSWER, node, ask).await));
        let (mut replies, mut silent) = (vec![own], Vec::new());
        for (node, answer) in join_all(asked).await {
            match answer {
                Ok(reply) => replies.push(reply),
                Err(_) => silent.push(node.get()),
            }
        }
        Ok(v1::HeatReply { width_s, columns: together(replies), silent })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writes(writes: u64) -> Sum {
        Sum { writes, reads: 1, bytes: writes * 10 }
    }

    #[test]
    fn columns_follow_each_other_and_old_ones_go() {
        let mut heat = Heat::default();
        for second in 1_000..3_000 {
            heat.at(second);
            heat.add(GroupId(7), writes(2));
        }
        let fine = heat.columns(1, 0);
        assert_eq!((fine.width_s, fine.columns.len()), (10, 60));
        assert_eq!((fine.columns[0].from_s, fine.columns[59].from_s), (2_400, 2_990));
        assert_eq!(fine.columns[59].cells, [Sum { writes: 20, reads: 10, bytes: 200 }.cell(7)]);
        assert_eq!(heat.columns(10, 2_990).columns.len(), 1);
        assert_eq!(heat.columns(100, 0).columns.len(), 17);
        heat.at(2_000);
        assert_eq!(heat.columns(10, 0).columns.len(), 60, "a clock that goes back takes nothing away");
    }

    #[test]
    fn of_a_crowd_the_busiest_are_told_apart_and_nothing_is_lost() {
        let mut heat = Heat::default();
        heat.at(10);
        for group in 1..=10_000 {
            heat.add(GroupId(group), writes(1));
        }
        heat.add(GroupId(9), writes(100));
        assert!(heat.ranges.iter().all(|range| range.open.len() == OPEN_MOST));
        let column = heat.columns(10, 0).columns.remove(0);
        assert_eq!((column.cells.len(), column.cells[0].group), (TOLD_APART, 9));
        let told: u64 = column.cells.iter().chain(&column.rest).map(|cell| cell.writes).sum();
        assert_eq!(told, 10_100);
    }

    #[test]
    fn nodes_answer_parts_of_a_group() {
        let node = |second, group, count| {
            let mut heat = Heat::default();
            heat.at(second);
            heat.add(GroupId(group), writes(count));
            heat.columns(10, 0)
        };
        let all = together([node(10, 1, 3), node(10, 1, 4), node(20, 2, 5)]);
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].cells[0].writes, all[0].cells[0].reads, all[1].cells[0].group), (7, 2, 2));
    }
}
