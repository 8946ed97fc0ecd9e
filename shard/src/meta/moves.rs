//! Moves: started, advanced by their driver, cancelled, forgotten.

use pontoon_proto::{ReplicaId, v1};
use v1::{MetaRefusal, MoveBlocker, MoveKind, MovePhase, MovePurpose, meta_reply::Body as Answer};

use super::{
    apply::{Outcome, Step, refuse},
    state::ended,
};

/// Whether a move may go from one phase to another: along the path, or off it to `Aborting`. From `Joint` it turns back only
/// if the target's node was removed from the cluster, and only such a one goes forward again.
pub fn legal(from: MovePhase, to: MovePhase) -> bool {
    match (from, to) {
        (MovePhase::Aborting, _) => matches!(to, MovePhase::Aborted | MovePhase::RemoveOld),
        (MovePhase::Done | MovePhase::Aborted, _) | (_, MovePhase::Aborted) => false,
        (_, MovePhase::Aborting) => from <= MovePhase::Joint,
        _ => i32::from(to) == i32::from(from) + 1,
    }
}

impl Step<'_> {
    pub(super) fn put_move(&mut self, mut mv: v1::Move) -> v1::Move {
        mv.phase_seq += 1;
        self.touched.moves.insert(mv.id);
        self.state.insert_move(mv.clone());
        mv
    }

    fn find_move(&self, id: u64) -> Result<v1::Move, Box<v1::MetaRefused>> {
        let found = self.state.moves.get(&id).map(|mv| v1::Move::clone(mv));
        found.ok_or_else(|| {
            refuse(MetaRefusal::NoSuchMove, format!("there is no move {id}: `pontoon move list` lists them"))
        })
    }

    pub(super) fn start_move(&mut self, ask: v1::StartMove) -> Outcome {
        let invalid = |text: String| refuse(MetaRefusal::Invalid, text);
        let mut shard = self.shard_of(ask.group)?;
        let name = &shard.predicate;
        if shard.state() != v1::ShardState::Live {
            return Err(refuse(
                MetaRefusal::Busy,
                format!("{name} is being created or dropped: retry later"),
            ));
        }
        if let Some(mv) = self.state.running_move(ask.group) {
            let text = format!("move {} of {name} is running: cancel it or wait for it", mv.id);
            let mv = v1::Move::clone(mv);
            return Err(Box::new(v1::MetaRefused {
                reason: MetaRefusal::Busy.into(),
                text,
                r#move: Some(mv),
                ..Default::default()
            }));
        }
        if ask.expect_revision != 0 && ask.expect_revision != shard.revision {
            let text = format!("{name} has changed since the move was planned: plan again");
            return Err(refuse(MetaRefusal::Changed, text));
        }
        let kind =
            MoveKind::try_from(ask.kind).map_err(|_| invalid(format!("no kind of move {}", ask.kind)))?;
        let arrives = kind != MoveKind::Remove;
        let leaves = matches!(kind, MoveKind::Replace | MoveKind::Remove);
        let votes = shard.voters.contains(&ask.source);
        let learner_leaves = kind == MoveKind::Remove && shard.learners.contains(&ask.source);
        if leaves && !votes && !learner_leaves {
            let source = ReplicaId::new(ask.source).map_or_else(|_| "0".into(), |id| id.to_string());
            let voters: Vec<String> = shard.voters.iter().map(|id| replica_name(*id)).collect();
            return Err(invalid(format!("{source} is no voter of {name}: these are {}", voters.join(", "))));
        }
        if kind == MoveKind::Remove && votes && shard.voters.len() < 2 {
            return Err(invalid(format!("{name} has one replica: removing it would lose its data")));
        }
        let mut target = 0;
        if arrives {
            let node = self.live_node(ask.target_node)?;
            let members = shard.voters.iter().chain(&shard.learners);
            if members.filter_map(|id| ReplicaId::new(*id).ok()).any(|replica| replica.node() == node) {
                return Err(invalid(format!(
                    "{node} holds a replica of {name} already: choose another node"
                )));
            }
            target = ReplicaId::on(node, shard.next_ordinal).get();
            shard.next_ordinal += 1;
        }
        let id = self.state.next_move;
        self.state.next_move += 1;
        let phase = MovePhase::Planned;
        let mv = v1::Move {
            id,
            group: ask.group,
            predicate: shard.predicate.clone(),
            kind: ask.kind,
            source: if leaves { ask.source } else { 0 },
            target,
            phase: phase.into(),
            session: ask.session,
            reason: ask.reason,
            started_ms: self.now_ms,
            phase_ms: self.now_ms,
            bytes_total: ask.bytes_total,
            purpose: ask.purpose,
            entered_ms: [(u32::from(phase as u8), self.now_ms)].into(),
            ..Default::default()
        };
        if arrives {
            self.put_shard(shard);
        }
        let mv = self.put_move(mv);
        self.note(format!("move {id}: {} starts", describe(&mv)));
        Ok(Answer::Move(mv))
    }

    pub(super) fn advance_move(&mut self, ask: v1::AdvanceMove) -> Outcome {
        let mut mv = self.find_move(ask.id)?;
        let refused = |reason: MetaRefusal, text: String, mv: v1::Move| {
            Err(Box::new(v1::MetaRefused {
                reason: reason.into(),
                text,
                r#move: Some(mv),
                ..Default::default()
            }))
        };
        if ask.driver_term < mv.driver_term {
            let text = format!("a driver of term {} has taken move {} over: stop", mv.driver_term, mv.id);
            return refused(MetaRefusal::StaleDriver, text, mv);
        }
        if ask.expect_phase_seq != mv.phase_seq {
            return refused(MetaRefusal::Changed, format!("move {} has changed: read it again", mv.id), mv);
        }
        let from = mv.phase();
        let Ok(to) = MovePhase::try_from(ask.phase) else {
            return refused(MetaRefusal::IllegalPhase, format!("there is no phase {}", ask.phase), mv);
        };
        let stays = from == to && !ended(from);
        let turned_back = mv.entered_ms.contains_key(&u32::from(MovePhase::Joint as u8));
        let may = match (from, to) {
            (MovePhase::Joint, MovePhase::Aborting) => self.is_removed(mv.target),
            (MovePhase::Aborting, MovePhase::RemoveOld) => turned_back,
            _ => true,
        };
        if !(stays || (legal(from, to) && may)) {
            let text = format!("a move cannot go from {from:?} to {to:?}");
            return refused(MetaRefusal::IllegalPhase, text, mv);
        }
        if to == MovePhase::Joint && mv.cancel_requested && !stays {
            let text = format!("move {} was cancelled: abort it", mv.id);
            return refused(MetaRefusal::IllegalPhase, text, mv);
        }
        if ask.gives_up && (stays || to != MovePhase::Aborting || mv.purpose() == MovePurpose::Operator) {
            let text =
                "a target is given up on the way back only, and never for an operator's move".to_owned();
            return refused(MetaRefusal::IllegalPhase, text, mv);
        }
        if ask.owing && !matches!(to, MovePhase::Cleanup | MovePhase::Aborted) {
            let text = format!("nothing can be owed on the way from {from:?} to {to:?}");
            return refused(MetaRefusal::IllegalPhase, text, mv);
        }
        mv.driver_term = ask.driver_term;
        let (blocker, was_stuck) = (ask.blocker(), mv.stuck);
        mv.set_blocker(blocker);
        mv.blocked = ask.blocked;
        mv.stuck = ask.stuck && stays;
        if mv.stuck && !was_stuck {
            self.note(format!("move {}: {} is stuck: {}", mv.id, describe(&mv), mv.blocked));
        }
        if ask.gives_up {
            // In one command with the phase: whoever dies, the move goes on as it was, or goes back and the planner knows why.
            mv.set_gave_up(blocker);
            let target = replica_name(mv.target);
            self.note(format!("move {}: {} gives {target} up: {}", mv.id, describe(&mv), mv.blocked));
        }
        mv.attempts += u32::from(ask.attempt);
        if ask.bytes_total != 0 {
            mv.bytes_total = ask.bytes_total;
        }
        if !stays {
            mv.blocked.clear();
            mv.set_blocker(MoveBlocker::None);
            mv.phase = to.into();
            mv.session = ask.session;
            mv.phase_ms = self.now_ms;
            mv.entered_ms.insert(u32::from(to as u8), self.now_ms);
            if ask.owing {
                self.owe(mv.group, if to == MovePhase::Cleanup { mv.source } else { mv.target });
            }
            if ended(to) {
                mv.finished_ms = self.now_ms;
                if to == MovePhase::Done {
                    self.settle_members(&mv);
                }
                let word = if to == MovePhase::Done { "is done" } else { "was rolled back" };
                self.note(format!("move {}: {} {word}", mv.id, describe(&mv)));
            }
        }
        Ok(Answer::Move(self.put_move(mv)))
    }

    /// Whether a replica's node was removed from the cluster.
    fn is_removed(&self, replica: u64) -> bool {
        let node = ReplicaId::new(replica).ok().and_then(|replica| self.node(replica.node().get()).ok());
        node.is_some_and(|node| node.state() == v1::NodeState::Removed)
    }

    /// A move that is done has changed the members: the planner must not look at the old ones until the next word from
    /// the group arrives.
    fn settle_members(&mut self, mv: &v1::Move) {
        let Ok(mut shard) = self.shard_of(mv.group) else { return };
        shard.voters.retain(|id| *id != mv.source && *id != mv.target);
        shard.learners.retain(|id| *id != mv.source && *id != mv.target);
        match mv.kind() {
            MoveKind::AddLearner => shard.learners.push(mv.target),
            MoveKind::Replace | MoveKind::Add => shard.voters.push(mv.target),
            MoveKind::Remove => {}
        }
        self.put_shard(shard);
    }

    pub(super) fn cancel_move(&mut self, ask: v1::CancelMove) -> Outcome {
        let mut mv = self.find_move(ask.id)?;
        if mv.cancel_requested || matches!(mv.phase(), MovePhase::Aborting | MovePhase::Aborted) {
            return Ok(Answer::Move(mv));
        }
        if mv.phase() >= MovePhase::Joint {
            let text = match mv.phase() {
                MovePhase::Done => format!("move {} is done: start one back instead", mv.id),
                _ => format!(
                    "move {0} has changed the members already and goes on to its end: follow it with `pontoon move \
                     watch {0}`, then start one back",
                    mv.id
                ),
            };
            return Err(refuse(MetaRefusal::TooLate, text));
        }
        mv.cancel_requested = true;
        self.note(
            format!("move {}: {} is cancelled {}", mv.id, describe(&mv), ask.reason).trim_end().to_owned(),
        );
        Ok(Answer::Move(self.put_move(mv)))
    }

    pub(super) fn prune_moves(&mut self, keep: usize) -> Outcome {
        let finished: Vec<u64> =
            self.state.moves.values().filter(|mv| ended(mv.phase())).map(|mv| mv.id).collect();
        for id in &finished[..finished.len().saturating_sub(keep)] {
            self.state.moves.remove(id);
            self.touched.moves.insert(*id);
        }
        Ok(Answer::Done(true))
    }
}

pub(super) fn replica_name(id: u64) -> String {
    ReplicaId::new(id).map_or_else(|_| id.to_string(), |replica| replica.to_string())
}

fn describe(mv: &v1::Move) -> String {
    let (name, source, target) = (&mv.predicate, replica_name(mv.source), replica_name(mv.target));
    match mv.kind() {
        MoveKind::Replace => format!("{name} from {source} to {target}"),
        MoveKind::Add => format!("{name} gains {target}"),
        MoveKind::AddLearner => format!("{name} gains {target} as a learner"),
        MoveKind::Remove => format!("{name} loses {source}"),
    }
}
