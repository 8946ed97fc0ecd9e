//! Raft's types on one side, the wire's and the log's on the other. Raft's own parser never sees network input.

use bytes::Bytes;
use pontoon_proto::{ReplicaId, v1};
use pontoon_wal as wal;
use prost::Message as _;
use raft::eraftpb as pb;

/// An entry as the log keeps it. Raft's entry context is not used: the envelope carries what we need.
pub(crate) fn entry_to_wal(entry: &pb::Entry) -> wal::Entry {
    wal::Entry {
        index: entry.index,
        term: entry.term,
        kind: entry.get_entry_type() as i32 as u8,
        data: entry.data.clone(),
    }
}

/// An entry as raft wants it. `None` if the kind is unknown.
pub(crate) fn entry_from_wal(entry: wal::Entry) -> Option<pb::Entry> {
    let mut out = pb::Entry::default();
    out.set_entry_type(entry_type(i32::from(entry.kind))?);
    out.index = entry.index;
    out.term = entry.term;
    out.data = entry.data;
    Some(out)
}

fn entry_type(kind: i32) -> Option<pb::EntryType> {
    match kind {
        0 => Some(pb::EntryType::EntryNormal),
        2 => Some(pb::EntryType::EntryConfChangeV2),
        // ConfChange of the first version is never proposed here.
        _ => None,
    }
}

pub(crate) fn conf_to_raft(conf: &v1::ConfState) -> pb::ConfState {
    let mut out = pb::ConfState::default();
    out.set_voters(conf.voters.clone());
    out.set_learners(conf.learners.clone());
    out.set_voters_outgoing(conf.voters_outgoing.clone());
    out.set_learners_next(conf.learners_next.clone());
    out.auto_leave = conf.auto_leave;
    out
}

pub(crate) fn conf_from_raft(conf: &pb::ConfState) -> v1::ConfState {
    let sorted = |ids: &[u64]| {
        let mut ids = ids.to_vec();
        ids.sort_unstable();
        ids
    };
    v1::ConfState {
        voters: sorted(conf.get_voters()),
        learners: sorted(conf.get_learners()),
        voters_outgoing: sorted(conf.get_voters_outgoing()),
        learners_next: sorted(conf.get_learners_next()),
        auto_leave: conf.auto_leave,
    }
}

pub(crate) fn conf_to_wal(conf: &v1::ConfState) -> wal::ConfState {
    wal::ConfState {
        voters: conf.voters.clone(),
        learners: conf.learners.clone(),
        voters_outgoing: conf.voters_outgoing.clone(),
        learners_next: conf.learners_next.clone(),
        auto_leave: conf.auto_leave,
    }
}

/// Every member of a configuration, in id order, each once.
pub(crate) fn members(conf: &v1::ConfState) -> Vec<u64> {
    let mut all: Vec<u64> = [&conf.voters, &conf.learners, &conf.voters_outgoing, &conf.learners_next]
        .into_iter()
        .flatten()
        .copied()
        .collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Reads a replicated configuration change with the crate's own parser.
pub(crate) fn conf_change_from_bytes(data: Bytes) -> Option<pb::ConfChangeV2> {
    let wire = v1::ConfChange::decode(data).ok()?;
    let mut out = pb::ConfChangeV2::default();
    out.set_transition(match wire.transition {
        0 => pb::ConfChangeTransition::Auto,
        1 => pb::ConfChangeTransition::Implicit,
        2 => pb::ConfChangeTransition::Explicit,
        _ => return None,
    });
    let mut changes = Vec::with_capacity(wire.changes.len());
    for change in wire.changes {
        let mut single = pb::ConfChangeSingle::default();
        single.set_change_type(match change.change_type {
            0 => pb::ConfChangeType::AddNode,
            1 => pb::ConfChangeType::RemoveNode,
            2 => pb::ConfChangeType::AddLearnerNode,
            _ => return None,
        });
        single.node_id = ReplicaId::new(change.node_id).ok()?.get();
        changes.push(single);
    }
    out.set_changes(changes.into());
    out.context = wire.context;
    Some(out)
}

/// A message for the wire. A snapshot message becomes an offer.
pub(crate) fn message_to_wire(message: pb::Message, floor: u64) -> v1::RaftMessage {
    let snapshot = message.has_snapshot().then(|| {
        let meta = message.get_snapshot().get_metadata();
        v1::SnapshotOffer {
            index: meta.index,
            term: meta.term,
            conf_state: Some(conf_from_raft(meta.get_conf_state())),
        }
    });
    v1::RaftMessage {
        kind: message.get_msg_type() as i32,
        term: message.term,
        log_term: message.log_term,
        index: message.index,
        entries: message
            .get_entries()
            .iter()
            .map(|e| v1::WireEntry {
                kind: e.get_entry_type() as i32,
                term: e.term,
                index: e.index,
                data: e.data.clone(),
                context: Bytes::new(),
            })
            .collect(),
        commit: message.commit,
        commit_term: message.commit_term,
        snapshot,
        reject: message.reject,
        reject_hint: message.reject_hint,
        context: message.context,
        priority: message.priority,
        request_snapshot: message.request_snapshot,
        floor,
    }
}

/// A message from the wire, or what is wrong with it.
pub(crate) fn message_from_wire(from: u64, to: u64, wire: v1::RaftMessage) -> Result<pb::Message, String> {
    use pb::MessageType::*;
    let kind = [
        MsgAppend,
        MsgAppendResponse,
        MsgRequestVote,
        MsgRequestVoteResponse,
        MsgSnapshot,
        MsgHeartbeat,
        MsgHeartbeatResponse,
        MsgTimeoutNow,
        MsgRequestPreVote,
        MsgRequestPreVoteResponse,
    ]
    .into_iter()
    .find(|kind| *kind as i32 == wire.kind)
    .ok_or_else(|| format!("message kind {} is not accepted from peers", wire.kind))?;
    let mut out = pb::Message::default();
    out.set_msg_type(kind);
    out.from = from;
    out.to = to;
    out.term = wire.term;
    out.log_term = wire.log_term;
    out.index = wire.index;
    out.commit = wire.commit;
    out.commit_term = wire.commit_term;
    out.reject = wire.reject;
    out.reject_hint = wire.reject_hint;
    out.context = wire.context;
    out.priority = wire.priority;
    out.request_snapshot = wire.request_snapshot;
    if wire.term == 0 {
        return Err("a message without a term".to_owned());
    }
    let (mut index, mut term) = (wire.index, wire.log_term);
    let mut entries = Vec::with_capacity(wire.entries.len());
    for entry in wire.entries {
        index = index.checked_add(1).ok_or("an index past the end of numbers")?;
        if entry.index != index || entry.term < term || entry.term > wire.term {
            return Err(format!("entry {}@{} does not follow {}@{term}", entry.index, entry.term, index - 1));
        }
        term = entry.term;
        let mut pb_entry = pb::Entry::default();
        pb_entry.set_entry_type(
            entry_type(entry.kind).ok_or_else(|| format!("entry kind {} is not known", entry.kind))?,
        );
        pb_entry.index = entry.index;
        pb_entry.term = entry.term;
        pb_entry.data = entry.data;
        entries.push(pb_entry);
    }
    out.set_entries(entries.into());
    Ok(out)
}

/// Builds raft's snapshot metadata; the data never travels inside raft.
pub(crate) fn snapshot_meta(index: u64, term: u64, conf: &v1::ConfState) -> pb::Snapshot {
    let mut snapshot = pb::Snapshot::default();
    let meta = snapshot.mut_metadata();
    meta.index = index;
    meta.term = term;
    meta.set_conf_state(conf_to_raft(conf));
    snapshot
}

#[cfg(test)]
mod tests {
    use super::*;
    use pontoon_proto::NodeId;
    use protobuf_shim::bytes_of;

    /// Raft encodes changes with its own writer; the replicated bytes must mean the same to ours.
    mod protobuf_shim {
        use raft::eraftpb::ConfChangeV2;
        pub(super) fn bytes_of(change: &ConfChangeV2) -> Vec<u8> {
            use raft::prelude::*;
            let mut node = RawNode::new(
                &Config { id: 1, ..Default::default() },
                raft::storage::MemStorage::new_with_conf_state((vec![1], vec![])),
                &slog::Logger::root(slog::Discard, slog::o!()),
            )
            .unwrap();
            node.campaign().unwrap();
            let mut ready = node.ready();
            let entries = ready.take_entries();
            node.store().wl().append(&entries).unwrap();
            let mut light = node.advance(ready);
            assert!(light.take_messages().is_empty());
            node.advance_apply();
            node.propose_conf_change(vec![], change.clone()).unwrap();
            node.ready().take_entries().pop().unwrap().data.to_vec()
        }
    }

    #[test]
    fn a_conf_change_survives_the_two_parsers() {
        let replica = ReplicaId::on(NodeId::new(9).unwrap(), 3);
        let mut change = pb::ConfChangeV2::default();
        change.set_transition(pb::ConfChangeTransition::Explicit);
        let mut single = pb::ConfChangeSingle::default();
        single.set_change_type(pb::ConfChangeType::AddLearnerNode);
        single.node_id = replica.get();
        change.set_changes(vec![single].into());
        let read = conf_change_from_bytes(bytes_of(&change).into()).unwrap();
        assert_eq!(read, change);
    }

    /// Raft elects whom it should by the commit index and term in votes; a wire format that leaves them out goes unnoticed.
    #[test]
    fn a_vote_arrives_as_it_was_sent() {
        let mut vote = pb::Message { from: 1, to: 2, term: 7, log_term: 6, index: 40, ..Default::default() };
        vote.set_msg_type(pb::MessageType::MsgRequestVote);
        (vote.commit, vote.commit_term, vote.priority) = (38, 5, -3);
        (vote.reject, vote.reject_hint, vote.request_snapshot) = (true, 9, 11);
        vote.context = Bytes::from_static(b"CampaignTransfer");
        let wire = message_to_wire(vote.clone(), 0);
        assert_eq!(message_from_wire(1, 2, wire).unwrap(), vote);
    }

    #[test]
    fn garbled_messages_are_refused() {
        let wire = |kind, entries| v1::RaftMessage {
            kind,
            term: 3,
            index: 4,
            log_term: 2,
            entries,
            ..Default::default()
        };
        assert!(message_from_wire(1, 2, wire(0, vec![])).is_err(), "a local message");
        assert!(message_from_wire(1, 2, wire(2, vec![])).is_err(), "a forwarded proposal");
        let entry = |index, term| v1::WireEntry { kind: 0, index, term, ..Default::default() };
        assert!(message_from_wire(1, 2, wire(3, vec![entry(6, 2)])).is_err(), "a gap");
        assert!(message_from_wire(1, 2, wire(3, vec![entry(5, 1)])).is_err(), "a term that goes back");
        assert!(message_from_wire(1, 2, wire(3, vec![entry(5, 9)])).is_err(), "a term of the future");
        assert!(message_from_wire(1, 2, wire(3, vec![entry(5, 2), entry(6, 3)])).is_ok());
    }
}
