//! Whether a move gets on, and what is done if it does not. Pure: the clock is passed in.
//!
//! There are no deadlines: however long a move takes, it goes on while something is seen of it. What counts as life depends
//! on what it waits for: for a state that is copied and for entries that are lacking, any byte or entry more; for everything
//! else, a change of the group's members. Writes of clients are no sign of life of a move that waits for something else.
//!
//! | without life for | what is done |
//! |---|---|
//! | [`Patience::note`] | the record says what holds the move up, as code and in words |
//! | [`Patience::stall`], a state is copied | the target asks another member for it |
//! | the same, or as long again | the planner's own move whose target is at fault goes back, and the planner chooses another, if there is one |
//! | the same | the record says that the move is stuck; it gives its slot back, and goes on when what it waits for comes |
//!
//! What no waiting changes (a dead target, states that differ) is not waited for. Time counts for each blocker by itself: a group
//! that was without a leader for an hour has not used up the patience with its target. An operator's own move is never sent
//! elsewhere. A driver's successor begins to count anew: it may wait longer, and gives nothing up too early.

use std::{collections::BTreeMap, time::Duration};

use pontoon_proto::{ReplicaId, v1};
use v1::{MoveBlocker, MovePhase, MovePurpose};

use super::{Action, Decision, Observation, replica_at};

/// A state is read at this rate at least, be it to be cut into chunks or to be hashed: meanwhile nothing is seen of it.
const SLOW_READ_BYTES_PER_S: u64 = 16 << 20;
/// A note stays until a move has got on for so many times [`Patience::note`]: one that trickles is not noted again and again.
const NOTE_STAYS: u32 = 5;

/// How long nothing may be seen of a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// Until its record says what holds it up.
    pub note: Duration,
    /// Until something is done about that.
    pub stall: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Patience { note: Duration::from_secs(2), stall: Duration::from_secs(60) }
    }
}

/// What the record shall say of what holds the move up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// [`MoveBlocker::None`]: nothing any more.
    pub blocker: MoveBlocker,
    /// In words.
    pub reason: String,
    /// Nothing is left that can be done by itself.
    pub stuck: bool,
}

/// What is to be done after all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judged {
    /// To be written into the record first.
    pub note: Option<Note>,
    /// To be carried out.
    pub decision: Decision,
}

/// What is seen of a move's life.
#[derive(Debug, Clone, PartialEq)]
struct Life {
    phase: MovePhase,
    members: Option<v1::ConfState>,
    /// How far the target is: bytes of a state, entries that it has matched, persisted and applied.
    copied: [u64; 4],
    /// Whether a state comes.
    comes: bool,
}

impl Life {
    fn of(mv: &v1::Move, seen: &Observation) -> Life {
        let target = ReplicaId::new(mv.target).ok();
        let there = target.and_then(|target| replica_at(seen.target.as_ref(), target));
        let pull = there.and_then(|info| info.pull.as_ref());
        let leader = seen.leader.as_ref();
        let matched = leader.and_then(|leader| leader.progress.iter().find(|peer| peer.replica == mv.target));
        Life {
            phase: mv.phase(),
            members: leader.and_then(|leader| leader.conf_state.clone()),
            copied: [
                pull.map_or(0, |pull| pull.bytes_done),
                matched.map_or(0, |peer| peer.matched),
                there.map_or(0, |info| info.durable.max(info.persisted)),
                there.map_or(0, |info| info.applied),
            ],
            comes: pull.is_some(),
        }
    }

    /// Whether the move has got on since. Who is not heard, has not.
    fn is_beyond(&self, last: &Life, blocker: MoveBlocker) -> bool {
        let changed = self.members.is_some() && last.members.is_some() && self.members != last.members;
        let copies = matches!(blocker, MoveBlocker::Copying | MoveBlocker::Queued | MoveBlocker::CatchingUp);
        let more = self.copied.iter().zip(last.copied).any(|(now, then)| *now > then);
        self.phase != last.phase || changed || (copies && more)
    }
}

/// What a driver keeps of a move to judge whether it gets on. Nothing of it must survive the driver.
///
/// Invariants: `alive` is at most `looked`; `spent` counts time since `alive` only.
#[derive(Debug, Clone, Default)]
pub struct Watch {
    patience: Patience,
    life: Option<Life>,
    /// When the move was last seen to get on.
    alive: Duration,
    looked: Duration,
    /// For how long what has held it up since.
    spent: BTreeMap<i32, Duration>,
    held_by: Option<MoveBlocker>,
    /// Whether another source was asked for since.
    turned: bool,
    /// The last decision was to ask who is a member.
    asks: bool,
    /// What was ordered last and failed.
    failure: Option<(MoveBlocker, String)>,
    /// When it was last seen not to get on.
    quiet: Duration,
    /// When the record was last told so.
    noted: Duration,
}

impl Watch {
    /// For a move that nothing is known of yet.
    pub fn new(patience: Patience) -> Watch {
        Watch { patience, ..Watch::default() }
    }

    /// Something that was to be done for the move has failed. Told with the next judgement, unless that finds something else.
    pub fn failed(&mut self, blocker: MoveBlocker, reason: impl Into<String>) {
        self.failure = Some((blocker, reason.into()));
    }

    /// Judges what was decided. `elsewhere` says whether there is another target than this one; it is asked if that matters.
    pub fn judge(
        &mut self,
        now: Duration,
        mv: &v1::Move,
        seen: &Observation,
        decision: Decision,
        elsewhere: impl FnOnce() -> bool,
    ) -> Judged {
        // A question that every second look asks holds nothing up; one whose answer does not come does.
        let asks = decision == Decision::Act(vec![Action::ConfirmRemoved]);
        let asked = std::mem::replace(&mut self.asks, asks);
        if asks && !asked && self.failure.is_none() {
            return Judged { note: None, decision };
        }
        let failure = self.failure.take();
        let (blocker, reason) = match &decision {
            Decision::Wait { blocker, reason } => (*blocker, reason.clone()),
            Decision::Act(actions) => {
                failure.or_else(|| actions.first().map(pending)).unwrap_or((MoveBlocker::None, String::new()))
            }
            Decision::Advance(_) | Decision::AdvanceOwing(_) | Decision::GiveUp { .. } => {
                failure.unwrap_or((MoveBlocker::None, String::new()))
            }
        };
        let got_on = self.look(now, Life::of(mv, seen), blocker);
        if blocker == MoveBlocker::None {
            // Another phase begins without a word.
            return Judged { note: None, decision };
        }
        if now - self.alive < self.patience.note {
            let is_over = got_on && mv.stuck
                || blocker != mv.blocker()
                || now - self.quiet >= self.patience.note * NOTE_STAYS;
            let nothing = Note { blocker: MoveBlocker::None, reason: String::new(), stuck: false };
            return Judged {
                note: (is_over && mv.blocker() != MoveBlocker::None).then_some(nothing),
                decision,
            };
        }
        self.quiet = now;
        let advances = !matches!(decision, Decision::Wait { .. } | Decision::Act(_));
        let spent = self.spent.get(&(blocker as i32)).copied().unwrap_or_default();
        let patience = self.patience.stall + reading(blocker, mv, seen);
        let turned = u32::from(self.turned && blocker == MoveBlocker::Copying);
        let is_stalled = is_final(blocker) || spent >= patience * (1 + turned);
        if !is_stalled || blocker == MoveBlocker::Queued || advances {
            // A successor does not know for how long it has been stuck, and nothing has changed for the better.
            let stuck = mv.stuck && mv.blocker() == blocker;
            return Judged { note: self.note(now, mv, blocker, reason, stuck), decision };
        }
        if let Some(action) = self.other_source(mv, seen, blocker) {
            self.turned = true;
            return Judged {
                note: self.note(now, mv, blocker, reason, false),
                decision: Decision::Act(vec![action]),
            };
        }
        let may_give_up = mv.purpose() != MovePurpose::Operator
            && mv.target != 0
            && mv.phase() < MovePhase::Joint
            && blames_target(blocker);
        if may_give_up && elsewhere() {
            return Judged { note: None, decision: Decision::GiveUp { blocker, reason } };
        }
        Judged { note: self.note(now, mv, blocker, reason, true), decision }
    }

    /// Takes in what is seen; whether the move has got on since the last look.
    fn look(&mut self, now: Duration, life: Life, blocker: MoveBlocker) -> bool {
        let got_on = self.life.as_ref().is_some_and(|last| life.is_beyond(last, blocker));
        match self.held_by {
            Some(held_by) if !got_on => {
                *self.spent.entry(held_by as i32).or_default() += now - self.looked;
            }
            Some(_) => self.begin(now),
            None => {
                self.begin(now);
                self.quiet = now;
            }
        }
        // Who is not heard now was somewhere all the same: what he has is not new when he is heard again.
        let was = self.life.as_ref().filter(|last| last.phase == life.phase);
        let members = life.members.clone().or_else(|| was.and_then(|last| last.members.clone()));
        let most = |nth: usize| life.copied[nth].max(was.map_or(0, |last| last.copied[nth]));
        // A state that must come once more counts from its beginning.
        let bytes = if life.comes { life.copied[0] } else { most(0) };
        self.life = Some(Life { members, copied: [bytes, most(1), most(2), most(3)], ..life });
        (self.looked, self.held_by) = (now, Some(blocker));
        got_on
    }

    fn begin(&mut self, now: Duration) {
        self.alive = now;
        self.spent.clear();
        self.turned = false;
    }

    /// What the record does not say yet. Words that change all the time, a number of entries, are renewed now and then.
    fn note(
        &mut self,
        now: Duration,
        mv: &v1::Move,
        blocker: MoveBlocker,
        reason: String,
        stuck: bool,
    ) -> Option<Note> {
        let other = mv.blocker() != blocker || mv.stuck != stuck;
        let renews = mv.blocked != reason && now - self.noted >= self.patience.stall;
        if !other && !renews {
            return None;
        }
        self.noted = now;
        Some(Note { blocker, reason, stuck })
    }

    /// The order to ask another source, once, if it is a source that the target waits for.
    fn other_source(&self, mv: &v1::Move, seen: &Observation, blocker: MoveBlocker) -> Option<Action> {
        let target = ReplicaId::new(mv.target).ok()?;
        let pulls = replica_at(seen.target.as_ref(), target)?.pull.is_some();
        let may = blocker == MoveBlocker::Copying && pulls && !self.turned;
        may.then(|| Action::OtherSource { node: target.node(), replica: target })
    }
}

/// What is waited for once an action was taken.
fn pending(action: &Action) -> (MoveBlocker, String) {
    let majority = |what: &str| {
        let reason = format!("{what} takes a majority of the group's voters: start their nodes");
        (MoveBlocker::NoMajority, reason)
    };
    match action {
        Action::Reserve { node, .. } => (MoveBlocker::Making, format!("{node} is asked for room")),
        Action::EnsureReplica { node, replica } => {
            (MoveBlocker::Making, format!("{node} is to make {replica} and has not yet"))
        }
        Action::AddLearner(replica) => majority(&format!("adding {replica}")),
        Action::EnterJoint { .. } => majority("exchanging the members"),
        Action::LeaveJoint => majority("leaving the joint configuration"),
        Action::RemoveLearner(replica) => majority(&format!("removing {replica}")),
        Action::ConfirmRemoved => majority("reading the members"),
        Action::TransferLeader { to } => {
            (MoveBlocker::LeaderStays, format!("leadership is to pass to {to} and has not yet"))
        }
        Action::Fence { node, replica } => {
            (MoveBlocker::Fencing, format!("{node} is to fence {replica} and has not yet"))
        }
        Action::Verify => (MoveBlocker::Hashing, "the group's state is to be hashed".to_owned()),
        Action::OtherSource { replica, .. } => {
            (MoveBlocker::Copying, format!("{replica} receives the group's state from another member"))
        }
    }
}

/// What a failed action says: of a node without room, of one that does not do what it should, or of an order that is refused.
pub fn failure(action: &Action, is_full: bool, reason: &str) -> (MoveBlocker, String) {
    let (blocker, _) = pending(action);
    let blocker = match (action, blocker) {
        (Action::Reserve { .. }, _) if is_full => MoveBlocker::TargetFull,
        (_, MoveBlocker::NoMajority) => MoveBlocker::Refused,
        (_, blocker) => blocker,
    };
    (blocker, reason.to_owned())
}

/// How much longer a state may be read without a word.
fn reading(blocker: MoveBlocker, mv: &v1::Move, seen: &Observation) -> Duration {
    let target = ReplicaId::new(mv.target).ok();
    let pull = target.and_then(|target| replica_at(seen.target.as_ref(), target)?.pull.as_ref());
    let reads = match blocker {
        MoveBlocker::Hashing => true,
        MoveBlocker::Copying => pull.is_some_and(|pull| pull.bytes_total == 0),
        _ => false,
    };
    Duration::from_secs(if reads { mv.bytes_total / SLOW_READ_BYTES_PER_S } else { 0 })
}

/// Whether no waiting changes it.
fn is_final(blocker: MoveBlocker) -> bool {
    use MoveBlocker::{HashesDiffer, Malformed, MembersChanged, TargetDead, TargetFenced};
    matches!(blocker, TargetDead | TargetFenced | HashesDiffer | MembersChanged | Malformed)
}

/// Whether another target might do better.
fn blames_target(blocker: MoveBlocker) -> bool {
    use MoveBlocker::{CatchingUp, Copying, Making, TargetDead, TargetFenced, TargetFull, TargetSilent};
    matches!(blocker, TargetSilent | TargetFull | TargetDead | TargetFenced | Making | Copying | CatchingUp)
}

/// Whether a move waits for somebody to do something: to start a node, to make room, to cancel it. All others go on by
/// themselves, or are stuck one day. Such a move does not count among those that run at the same time.
pub fn needs_hand(mv: &v1::Move) -> bool {
    use MoveBlocker::{NoLeader, SourceSilent, TargetFull, TargetSilent};
    let blocker = mv.blocker();
    mv.stuck || is_final(blocker) || matches!(blocker, NoLeader | SourceSilent | TargetFull | TargetSilent)
}
