//! Small words between members of many groups, packed into one message per node and turn.
//!
//! Each row is taken at the receiver exactly as if it had come alone. A message whose arrays do not fit together, or that
//! names what cannot be, is refused as a whole.

use std::collections::BTreeMap;

use bytes::Bytes;
use pontoon_proto::{
    GroupId, NodeId, ReplicaId,
    v1::{self, BeatKind},
};
use raft::eraftpb as pb;

/// Rows of one message; more go into another one.
const MOST_ROWS: usize = 4096;

/// One small word from a member of a group to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Beat {
    pub(crate) group: GroupId,
    pub(crate) kind: BeatKind,
    pub(crate) from: ReplicaId,
    pub(crate) to: ReplicaId,
    pub(crate) term: u64,
    pub(crate) commit: u64,
    pub(crate) floor: u64,
    /// 0: none.
    pub(crate) context: u64,
    /// A heartbeat that only tells what is committed.
    pub(crate) unanswered: bool,
}

impl Beat {
    /// A word that says its kind and term only.
    pub(crate) fn plain(group: GroupId, kind: BeatKind, from: ReplicaId, to: ReplicaId, term: u64) -> Self {
        Beat { group, kind, from, to, term, commit: 0, floor: 0, context: 0, unanswered: false }
    }

    /// A heartbeat or an answer to one; `None` for every other message, and for one that says more than a row holds.
    pub(crate) fn of_raft(group: GroupId, message: &pb::Message, floor: u64) -> Option<Beat> {
        let kind = match message.get_msg_type() {
            pb::MessageType::MsgHeartbeat => BeatKind::Heartbeat,
            pb::MessageType::MsgHeartbeatResponse => BeatKind::Answer,
            _ => return None,
        };
        let context = match message.context.len() {
            0 => 0,
            8 => u64::from_be_bytes(message.context.as_ref().try_into().ok()?),
            _ => return None,
        };
        let says_more = (context == 0 && !message.context.is_empty())
            || message.reject
            || message.has_snapshot()
            || !message.get_entries().is_empty()
            || [message.log_term, message.index, message.commit_term, message.reject_hint] != [0; 4]
            || message.request_snapshot != 0
            || message.priority != 0;
        if says_more {
            return None;
        }
        let (from, to) = (ReplicaId::new(message.from).ok()?, ReplicaId::new(message.to).ok()?);
        let (term, commit) = (message.term, message.commit);
        Some(Beat { commit, floor, context, ..Beat::plain(group, kind, from, to, term) })
    }

    /// The raft message that this row stands for. One that sends to sleep is a heartbeat to whoever stays awake.
    pub(crate) fn into_raft(self) -> v1::RaftMessage {
        let kind = match self.kind {
            BeatKind::Answer => pb::MessageType::MsgHeartbeatResponse,
            _ => pb::MessageType::MsgHeartbeat,
        };
        let context = match self.context {
            0 => Bytes::new(),
            context => Bytes::copy_from_slice(&context.to_be_bytes()),
        };
        v1::RaftMessage {
            kind: kind as i32,
            term: self.term,
            commit: self.commit,
            floor: self.floor,
            context,
            ..Default::default()
        }
    }
}

/// Rows for other nodes, gathered over a turn.
#[derive(Default)]
pub(crate) struct Gather {
    /// By node, those that are answered before those that are not.
    rows: BTreeMap<(NodeId, bool), Vec<v1::Beats>>,
}

impl Gather {
    pub(crate) fn push(&mut self, beat: Beat) {
        let unanswered = beat.unanswered;
        let messages = self.rows.entry((beat.to.node(), unanswered)).or_default();
        if messages.last().is_none_or(|last| last.groups.len() == MOST_ROWS) {
            messages.push(v1::Beats { unanswered, ..Default::default() });
        }
        if let Some(last) = messages.last_mut() {
            push_row(last, beat);
        }
    }

    /// Everything gathered since the last call, by node.
    pub(crate) fn take(
        &mut self,
        incarnation: u64,
    ) -> impl Iterator<Item = (NodeId, v1::PeerMessage)> + use<> {
        std::mem::take(&mut self.rows).into_iter().flat_map(move |((node, _), messages)| {
            messages.into_iter().map(move |beats| {
                let body = v1::peer_message::Body::Beats(v1::Beats { incarnation, ..beats });
                (node, v1::PeerMessage { group: GroupId::NODE.0, from: 0, to: 0, body: Some(body) })
            })
        })
    }
}

fn push_row(beats: &mut v1::Beats, beat: Beat) {
    beats.groups.push(beat.group.0);
    beats.kinds.push(beat.kind as u32);
    beats.from.push(beat.from.ordinal());
    beats.to.push(beat.to.ordinal());
    beats.terms.push(beat.term);
    beats.commits.push(beat.commit);
    beats.floors.push(beat.floor);
    beats.contexts.push(beat.context);
}

/// Reads a message from one node to another, or says what is wrong with it.
pub(crate) fn read(beats: &v1::Beats, from: NodeId, to: NodeId) -> Result<Vec<Beat>, String> {
    let rows = beats.groups.len();
    let lengths = [
        beats.kinds.len(),
        beats.from.len(),
        beats.to.len(),
        beats.terms.len(),
        beats.commits.len(),
        beats.floors.len(),
        beats.contexts.len(),
    ];
    if rows > MOST_ROWS || lengths != [rows; 7] {
        return Err(format!("its rows do not fit together: {rows} groups, then {lengths:?}"));
    }
    let member = |node: NodeId, ordinal: u32| {
        ReplicaId::new((node.get() << 32) | u64::from(ordinal)).map_err(|error| error.to_string())
    };
    (0..rows)
        .map(|row| {
            let kind = i32::try_from(beats.kinds[row]).ok().and_then(|kind| BeatKind::try_from(kind).ok());
            let group = GroupId(beats.groups[row]);
            let fits = |kind: &BeatKind| {
                *kind != BeatKind::None && (!beats.unanswered || *kind == BeatKind::Heartbeat)
            };
            let kind = kind
                .filter(|kind| fits(kind) && group != GroupId::NODE)
                .ok_or_else(|| format!("a row of kind {} for {group}", beats.kinds[row]))?;
            Ok(Beat {
                group,
                kind,
                from: member(from, beats.from[row])?,
                to: member(to, beats.to[row])?,
                term: beats.terms[row],
                commit: beats.commits[row],
                floor: beats.floors[row],
                context: beats.contexts[row],
                unanswered: beats.unanswered,
            })
        })
        .collect()
}

/// Deals the rows out to so many loops, by group. What does not fit together goes to the first one, which refuses it.
pub(crate) fn deal(beats: v1::Beats, from: NodeId, to: NodeId, loops: usize) -> Vec<(usize, v1::Beats)> {
    let rows = match read(&beats, from, to) {
        Ok(rows) if loops > 1 => rows,
        _ => return vec![(0, beats)],
    };
    let mut dealt = BTreeMap::<usize, v1::Beats>::new();
    for beat in rows {
        let hand = dealt.entry(beat.group.0 as usize % loops);
        push_row(
            hand.or_insert_with(|| v1::Beats {
                incarnation: beats.incarnation,
                unanswered: beats.unanswered,
                ..Default::default()
            }),
            beat,
        );
    }
    dealt.into_iter().collect()
}

/// The loops, of so many here, that share groups with loop `lane` of `lanes` elsewhere.
pub(crate) fn loops_of_lane(lane: u32, lanes: u32, loops: usize) -> impl Iterator<Item = usize> {
    fn gcd(a: usize, b: usize) -> usize {
        if b == 0 { a } else { gcd(b, a % b) }
    }
    let common = gcd(lanes.max(1) as usize, loops);
    (0..loops).filter(move |at| at % common == lane as usize % common)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: u64) -> NodeId {
        NodeId::new(id).unwrap()
    }

    fn beat(group: u64, context: u64) -> Beat {
        Beat {
            group: GroupId(group),
            kind: BeatKind::Heartbeat,
            from: ReplicaId::on(node(1), 4),
            to: ReplicaId::on(node(2), 5),
            term: 6,
            commit: 7,
            floor: 3,
            context,
            unanswered: false,
        }
    }

    fn gathered(beats: impl IntoIterator<Item = Beat>) -> Vec<v1::Beats> {
        let mut gather = Gather::default();
        beats.into_iter().for_each(|beat| gather.push(beat));
        gather
            .take(9)
            .map(|(_, message)| match message.body {
                Some(v1::peer_message::Body::Beats(beats)) => beats,
                other => panic!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn rows_come_out_as_they_went_in_and_long_messages_are_cut() {
        let sent: Vec<Beat> = (1..=MOST_ROWS as u64 + 2).map(|group| beat(group, group % 3)).collect();
        let messages = gathered(sent.clone());
        assert_eq!(messages.len(), 2);
        let read: Vec<Beat> =
            messages.iter().flat_map(|beats| read(beats, node(1), node(2)).unwrap()).collect();
        assert_eq!(read, sent);
        assert!(messages.iter().all(|beats| beats.incarnation == 9));
    }

    #[test]
    fn heartbeats_that_say_more_than_a_row_holds_go_alone() {
        let mut message = pb::Message::default();
        message.set_msg_type(pb::MessageType::MsgHeartbeat);
        (message.from, message.to) = (beat(1, 0).from.get(), beat(1, 0).to.get());
        (message.term, message.commit) = (6, 7);
        assert_eq!(Beat::of_raft(GroupId(1), &message, 3), Some(beat(1, 0)));
        message.context = Bytes::copy_from_slice(&5u64.to_be_bytes());
        let row = Beat::of_raft(GroupId(1), &message, 3).unwrap();
        assert_eq!(row, beat(1, 5));
        assert_eq!(row.into_raft().context, message.context);
        for context in [Bytes::from_static(b"more"), Bytes::from_static(&[0; 8])] {
            message.context = context;
            assert_eq!(Beat::of_raft(GroupId(1), &message, 3), None);
        }
        message.context = Bytes::new();
        message.index = 1;
        assert_eq!(Beat::of_raft(GroupId(1), &message, 3), None);
        message.index = 0;
        message.set_msg_type(pb::MessageType::MsgAppendResponse);
        assert_eq!(Beat::of_raft(GroupId(1), &message, 3), None);
    }

    #[test]
    fn garbled_messages_are_refused() {
        let garble: [fn(&mut v1::Beats); 10] = [
            |beats| beats.groups.clear(),
            |beats| beats.kinds.truncate(1),
            |beats| beats.from.push(1),
            |beats| beats.contexts.clear(),
            |beats| beats.kinds[0] = 0,
            |beats| beats.kinds[1] = 77,
            |beats| beats.kinds[1] = u32::MAX,
            |beats| beats.from[0] = 0,
            |beats| beats.to[1] = 0,
            |beats| beats.groups[0] = 0,
        ];
        for garble in garble {
            let mut beats = gathered([beat(1, 0), beat(2, 1)]).remove(0);
            garble(&mut beats);
            assert!(read(&beats, node(1), node(2)).is_err(), "{beats:?}");
            assert_eq!(deal(beats.clone(), node(1), node(2), 3), [(0, beats)], "one loop refuses it");
        }
        let long = v1::Beats { groups: vec![1; MOST_ROWS + 1], ..Default::default() };
        assert!(read(&long, node(1), node(2)).is_err());
    }

    #[test]
    fn what_is_not_answered_travels_apart_and_is_a_heartbeat() {
        let quiet = |group| Beat { unanswered: true, ..beat(group, 0) };
        let messages = gathered([quiet(1), beat(2, 0), quiet(3)]);
        let groups: Vec<_> = messages.iter().map(|beats| (beats.unanswered, beats.groups.clone())).collect();
        assert_eq!(groups, [(false, vec![2]), (true, vec![1, 3])]);
        let dealt = deal(messages[1].clone(), node(1), node(2), 2);
        let rows: Vec<Beat> =
            dealt.iter().flat_map(|(_, beats)| read(beats, node(1), node(2)).unwrap()).collect();
        assert_eq!(rows, [quiet(1), quiet(3)]);
        let mut garbled = messages[1].clone();
        garbled.kinds[0] = BeatKind::Sleep as u32;
        assert!(read(&garbled, node(1), node(2)).is_err());
    }

    #[test]
    fn each_row_goes_to_the_loop_of_its_group() {
        let beats = gathered((1..=7).map(|group| beat(group, 0))).remove(0);
        let dealt = deal(beats.clone(), node(1), node(2), 3);
        assert_eq!(dealt.iter().map(|(at, _)| *at).collect::<Vec<_>>(), [0, 1, 2]);
        for (at, beats) in dealt {
            assert_eq!(beats.incarnation, 9);
            assert!(beats.groups.iter().all(|group| *group as usize % 3 == at));
        }
        assert_eq!(deal(beats.clone(), node(1), node(2), 1), [(0, beats)]);
    }

    #[test]
    fn a_lane_is_heard_by_the_loops_that_share_groups_with_it() {
        let loops = |lane, lanes, loops| loops_of_lane(lane, lanes, loops).collect::<Vec<_>>();
        assert_eq!(loops(1, 2, 2), [1]);
        assert_eq!(loops(0, 1, 2), [0, 1]);
        assert_eq!(loops(1, 2, 3), [0, 1, 2]);
        assert_eq!(loops(3, 4, 2), [1]);
        assert_eq!(loops(7, 0, 2), [0, 1], "garbled: all of them");
        for (lanes, here) in [(2, 3), (4, 6), (3, 3)] {
            for group in 0..24usize {
                let lane = group as u32 % lanes;
                assert!(loops(lane, lanes, here).contains(&(group % here)));
            }
        }
    }
}
