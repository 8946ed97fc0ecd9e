//! What snapshots may take of a node: bytes per second, pulls and views at a time, room on the disk.
//!
//! A node receives in many groups at once, and what it receives competes with what its groups write. So a pull waits for
//! its turn, asks for a chunk when the budget has come that far, and begins only if everything that is still to come, its
//! own and that of the pulls before it, fits on the disk. Of a budget with a name that is no promise ([`SnapshotBudget::adapts`]) it
//! uses as much as clients do not notice ([`crate::pace`]). Time comes in as ticks: the same inputs give the same turns.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use pontoon_proto::{GroupId, NodeId};

use crate::{
    error::Error,
    pace::{Share, WHOLE},
};

/// What snapshots may take of a node. Changes hold at once, for pulls under way too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotBudget {
    /// Bytes per second that the node receives; `None` is not limited. What was not taken within an eighth of a second, or a tick if
    /// that is longer, is lost.
    pub bytes_per_second: Option<u64>,
    /// Whether less is used while clients' writes, here or where it comes from, take longer than they do without
    /// ([`crate::Foreground`]).
    pub adapts: bool,
    /// States that the node receives at the same time; the others wait. At least 1.
    pub max_pulls: u32,
    /// States that the node gives to others at the same time; who asks for more is sent to another member. At least 1.
    pub max_views: u32,
}

impl SnapshotBudget {
    /// Hardly to be noticed beside what the node does otherwise.
    pub const SLOW: SnapshotBudget =
        SnapshotBudget { bytes_per_second: Some(8 << 20), adapts: true, max_pulls: 2, max_views: 4 };
    /// The default.
    pub const NORMAL: SnapshotBudget =
        SnapshotBudget { bytes_per_second: Some(128 << 20), adapts: true, max_pulls: 16, max_views: 32 };
    /// For a cluster that has little else to do.
    pub const FAST: SnapshotBudget =
        SnapshotBudget { bytes_per_second: Some(512 << 20), adapts: true, max_pulls: 64, max_views: 128 };
    /// As fast as it goes.
    pub const MAX: SnapshotBudget =
        SnapshotBudget { bytes_per_second: None, adapts: false, max_pulls: 256, max_views: 512 };
}

impl Default for SnapshotBudget {
    fn default() -> Self {
        SnapshotBudget::NORMAL
    }
}

impl FromStr for SnapshotBudget {
    type Err = Error;

    /// `slow`, `normal`, `fast`, `max`, or bytes per second.
    fn from_str(text: &str) -> Result<Self, Error> {
        Ok(match text {
            "slow" => SnapshotBudget::SLOW,
            "normal" => SnapshotBudget::NORMAL,
            "fast" => SnapshotBudget::FAST,
            "max" => SnapshotBudget::MAX,
            number => match number.parse() {
                Ok(bytes @ 1..) => {
                    SnapshotBudget { bytes_per_second: Some(bytes), adapts: false, ..SnapshotBudget::NORMAL }
                }
                _ => {
                    let what =
                        format!("{text} is no budget: say slow, normal, fast, max or bytes per second");
                    return Err(Error::Config(what));
                }
            },
        })
    }
}

/// What the loops of a node have together.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// Bytes of room.
    reserved: AtomicU64,
    /// Loops that receive or give a state, and whoever reads one.
    copying: AtomicU64,
    /// Loops that know of clients that wait longer than they do without copies, here or at another node.
    strained: AtomicU64,
}

impl Ledger {
    /// Whether the node receives or gives a state.
    pub(crate) fn copies(&self) -> bool {
        self.copying.load(Ordering::Relaxed) > 0
    }

    /// One more copies, or one less.
    pub(crate) fn set_copying(&self, copies: bool) {
        match copies {
            true => self.copying.fetch_add(1, Ordering::Relaxed),
            false => self.copying.fetch_sub(1, Ordering::Relaxed),
        };
    }

    fn set_strained(&self, strained: bool) {
        match strained {
            true => self.strained.fetch_add(1, Ordering::Relaxed),
            false => self.strained.fetch_sub(1, Ordering::Relaxed),
        };
    }

    pub(crate) fn is_strained(&self) -> bool {
        self.strained.load(Ordering::Relaxed) > 0
    }
}

/// Ticks after the last sign of a copy for which it is taken to go on.
const COPY_TICKS: u64 = 30;
/// Ticks for which a node counts as strained that has said so once: it may have died of it.
const STRAINED_TICKS: u64 = 30;

/// The pulls of one loop, and their turns.
///
/// Invariants: a group is in `active` or in `waiting` or in neither; `reserved` and `felt_by` are of active groups; the sum of
/// `reserved` is this loop's part of `ledger.reserved`, and it has one part in `ledger.copying` if `is_told`,
/// and one in `ledger.strained` if `tells_strain`.
pub(crate) struct Turns {
    budget: SnapshotBudget,
    /// How much of the budget is used, if it adapts.
    share: Share,
    /// Which nodes' clients feel that an active group is received: that of who gives, and that of the leader.
    felt_by: BTreeMap<GroupId, [Option<NodeId>; 2]>,
    /// Clients here wait longer than they do without copies; the same of other nodes.
    strained: bool,
    /// With the ticks for which that holds.
    strained_nodes: BTreeMap<NodeId, u64>,
    /// Ticks for which what was asked of this node, or is received in a group that it leads, counts as going on.
    copy_goes_on: u64,
    is_told: bool,
    /// This loop has one in `ledger.strained`.
    tells_strain: bool,
    /// This loop has one in so many parts of the node's budget.
    lanes: u32,
    tick: Duration,
    /// Bytes that may be asked for now. A chunk that is larger than what there is makes a debt.
    tokens: i64,
    active: BTreeSet<GroupId>,
    waiting: VecDeque<GroupId>,
    /// Active ones that have something to ask for and no tokens.
    thirsty: BTreeSet<GroupId>,
    reserved: BTreeMap<GroupId, u64>,
    ledger: Arc<Ledger>,
    /// What may still be written to the disk, as it was heard last.
    free: Option<u64>,
}

impl Turns {
    pub(crate) fn new(budget: SnapshotBudget, lanes: u32, tick: Duration) -> Turns {
        let mut turns = Turns {
            budget,
            share: Share::new(tick),
            felt_by: BTreeMap::new(),
            strained: false,
            strained_nodes: BTreeMap::new(),
            copy_goes_on: 0,
            is_told: false,
            tells_strain: false,
            lanes: lanes.max(1),
            tick,
            tokens: 0,
            active: BTreeSet::new(),
            waiting: VecDeque::new(),
            thirsty: BTreeSet::new(),
            reserved: BTreeMap::new(),
            ledger: Arc::default(),
            free: None,
        };
        turns.tokens = turns.most_tokens();
        turns
    }

    /// Shares what is reserved with the node's other loops. To be called before anything is.
    pub(crate) fn share(&mut self, ledger: Arc<Ledger>) {
        self.ledger = ledger;
    }

    pub(crate) fn set_budget(&mut self, budget: SnapshotBudget) {
        self.budget = budget;
        self.tokens = self.tokens.min(self.most_tokens());
    }

    /// Whether clients here wait longer than they do without copies.
    pub(crate) fn set_strained(&mut self, strained: bool) {
        self.strained = strained;
    }

    /// What is told to other nodes.
    pub(crate) fn is_strained(&self) -> bool {
        self.strained
    }

    /// Another node tells whether it is strained.
    pub(crate) fn hear_strain(&mut self, node: NodeId, strained: bool) {
        match strained {
            true => self.strained_nodes.insert(node, STRAINED_TICKS),
            false => self.strained_nodes.remove(&node),
        };
    }

    /// A state, or a part of one, is asked of this node, or it leads a group of which one is received.
    pub(crate) fn note_copy(&mut self) {
        self.copy_goes_on = COPY_TICKS;
    }

    pub(crate) fn set_free(&mut self, bytes: u64) {
        self.free = Some(bytes);
    }

    /// Whether states come as fast as they can, whoever waits for them.
    pub(crate) fn hurries(&self) -> bool {
        self.budget.bytes_per_second.is_none()
    }

    /// This loop's part of the bytes per second, as much of it as is used.
    fn per_second(&self) -> Option<i64> {
        let share = if self.budget.adapts { self.share.get() } else { WHOLE };
        let bytes = u128::from(self.budget.bytes_per_second?) * u128::from(share);
        let bytes = bytes / u128::from(WHOLE) / u128::from(self.lanes);
        Some(i64::try_from(bytes).unwrap_or(i64::MAX).max(1))
    }

    /// What so many ticks bring.
    fn brought(&self, ticks: u64) -> i64 {
        let micros = i128::from(ticks) * self.tick.as_micros() as i128;
        let bytes = i128::from(self.per_second().unwrap_or_default()) * micros / 1_000_000;
        bytes.clamp(1, i128::from(i64::MAX)) as i64
    }

    /// More than this is not kept: a burst is felt more than a stream.
    fn most_tokens(&self) -> i64 {
        (self.per_second().unwrap_or_default() / 8).max(self.brought(1))
    }

    fn most_pulls(&self) -> usize {
        (self.budget.max_pulls / self.lanes).max(1) as usize
    }

    /// Time goes on.
    pub(crate) fn tick(&mut self, ticks: u64) {
        let receives = !self.active.is_empty();
        let mut nodes = self.felt_by.values().flatten().flatten();
        let strained = self.strained || nodes.any(|node| self.strained_nodes.contains_key(node));
        self.share.tick(ticks, receives, strained);
        self.strained_nodes.retain(|_, left| {
            *left = left.saturating_sub(ticks);
            *left > 0
        });
        let strained = self.strained || !self.strained_nodes.is_empty();
        if std::mem::replace(&mut self.tells_strain, strained) != strained {
            self.ledger.set_strained(strained);
        }
        self.copy_goes_on = self.copy_goes_on.saturating_sub(ticks);
        let copies = receives || self.copy_goes_on > 0;
        if std::mem::replace(&mut self.is_told, copies) != copies {
            self.ledger.set_copying(copies);
        }
        if self.per_second().is_some() {
            self.tokens = self.tokens.saturating_add(self.brought(ticks)).min(self.most_tokens());
        }
    }

    /// Takes a turn. False: the group waits, and is among [`Turns::take_next`] later.
    pub(crate) fn enter(&mut self, group: GroupId) -> bool {
        if self.active.contains(&group) {
            return true;
        }
        if self.active.len() < self.most_pulls() && self.waiting.is_empty() {
            return self.active.insert(group);
        }
        if !self.waiting.contains(&group) {
            self.waiting.push_back(group);
        }
        false
    }

    /// Whether the group's turn is still to come.
    pub(crate) fn is_waiting(&self, group: GroupId) -> bool {
        self.waiting.contains(&group)
    }

    /// The pull has ended, however.
    pub(crate) fn leave(&mut self, group: GroupId) {
        self.release(group, u64::MAX);
        self.active.remove(&group);
        self.felt_by.remove(&group);
        self.thirsty.remove(&group);
        self.waiting.retain(|waiting| *waiting != group);
    }

    /// Groups that go on: their turn has come, or there is something to spend.
    pub(crate) fn take_next(&mut self) -> Vec<GroupId> {
        let mut next = Vec::new();
        while self.active.len() < self.most_pulls()
            && let Some(group) = self.waiting.pop_front()
        {
            self.active.insert(group);
            next.push(group);
        }
        if self.per_second().is_none() || self.tokens > 0 {
            next.extend(std::mem::take(&mut self.thirsty));
        }
        next
    }

    /// Whether so many bytes may be asked of a node now. False: the group is among [`Turns::take_next`] when they may.
    pub(crate) fn spend(&mut self, group: GroupId, felt_by: [Option<NodeId>; 2], bytes: u64) -> bool {
        if self.active.contains(&group) {
            self.felt_by.insert(group, felt_by);
        }
        if self.per_second().is_none() {
            return true;
        }
        if self.tokens <= 0 {
            self.thirsty.insert(group);
            return false;
        }
        self.tokens = self.tokens.saturating_sub(i64::try_from(bytes).unwrap_or(i64::MAX));
        true
    }

    /// Reserves room for what is to come.
    ///
    /// # Errors
    /// What is free beside the other pulls, if it is less.
    pub(crate) fn reserve(&mut self, group: GroupId, bytes: u64) -> Result<(), u64> {
        self.release(group, u64::MAX);
        let free = self.free.unwrap_or(u64::MAX);
        let taken = self.ledger.reserved.fetch_update(Ordering::AcqRel, Ordering::Acquire, |reserved| {
            reserved.checked_add(bytes).filter(|all| *all <= free)
        });
        match taken {
            Ok(_) => {
                self.reserved.insert(group, bytes);
                Ok(())
            }
            Err(reserved) => Err(free.saturating_sub(reserved)),
        }
    }

    /// Of what was reserved, so much is written or will not come.
    pub(crate) fn release(&mut self, group: GroupId, bytes: u64) {
        let Some(reserved) = self.reserved.get_mut(&group) else { return };
        let bytes = bytes.min(*reserved);
        *reserved -= bytes;
        if *reserved == 0 {
            self.reserved.remove(&group);
        }
        self.ledger.reserved.fetch_sub(bytes, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turns(budget: SnapshotBudget, lanes: u32) -> Turns {
        Turns::new(budget, lanes, Duration::from_millis(100))
    }

    #[test]
    fn budgets_have_names_or_say_bytes_per_second() {
        assert_eq!("normal".parse::<SnapshotBudget>().unwrap(), SnapshotBudget::default());
        assert_eq!("max".parse::<SnapshotBudget>().unwrap().bytes_per_second, None);
        assert_eq!("4096".parse::<SnapshotBudget>().unwrap().bytes_per_second, Some(4096));
        for nonsense in ["", "0", "-1", "quick"] {
            assert!(nonsense.parse::<SnapshotBudget>().unwrap_err().to_string().contains("slow, normal"));
        }
    }

    #[test]
    fn over_a_while_no_more_is_asked_for_than_the_budget_allows() {
        let budget =
            SnapshotBudget { bytes_per_second: Some(1_000), adapts: false, max_pulls: 9, max_views: 9 };
        let mut turns = turns(budget, 2);
        let group = GroupId(3);
        assert!(turns.enter(group));
        let mut spent = 0;
        // A tick's part is there at once.
        for _ in 0..100 {
            while turns.spend(group, [None; 2], 70) {
                spent += 70;
            }
            assert!(turns.take_next().is_empty(), "nothing to spend");
            turns.tick(1);
            drop(turns.take_next());
        }
        let allowed = 62 + 100 * 50;
        assert!((allowed - 70..=allowed + 70).contains(&spent), "{spent} of {allowed}");
        turns.set_budget(SnapshotBudget::MAX);
        assert!((0..1_000).all(|_| turns.spend(group, [None; 2], 1 << 30)));
    }

    #[test]
    fn who_comes_when_all_turns_are_taken_waits_in_order() {
        let budget = SnapshotBudget { max_pulls: 2, max_views: 1, ..SnapshotBudget::MAX };
        let mut turns = turns(budget, 1);
        assert!(turns.enter(GroupId(1)) && turns.enter(GroupId(2)) && turns.enter(GroupId(1)));
        assert!(!turns.enter(GroupId(3)) && !turns.enter(GroupId(4)) && !turns.enter(GroupId(3)));
        assert!(turns.take_next().is_empty());
        turns.leave(GroupId(3));
        turns.leave(GroupId(1));
        assert_eq!(turns.take_next(), [GroupId(4)]);
        turns.set_budget(SnapshotBudget { max_pulls: 3, ..budget });
        assert!(turns.enter(GroupId(5)));
    }

    #[test]
    fn all_pulls_together_fit_on_the_disk() {
        let (mut one, mut other) = (turns(SnapshotBudget::MAX, 2), turns(SnapshotBudget::MAX, 2));
        let ledger = Arc::new(Ledger::default());
        for turns in [&mut one, &mut other] {
            turns.share(ledger.clone());
            turns.set_free(100);
        }
        one.reserve(GroupId(1), 60).unwrap();
        assert_eq!(other.reserve(GroupId(2), 50), Err(40));
        one.release(GroupId(1), 20);
        other.reserve(GroupId(2), 50).unwrap();
        other.reserve(GroupId(2), 10).unwrap();
        one.leave(GroupId(1));
        other.leave(GroupId(2));
        assert_eq!(ledger.reserved.load(Ordering::Acquire), 0);
    }

    /// What is asked for in so many ticks.
    fn asked(turns: &mut Turns, ticks: u32) -> u64 {
        let mut asked = 0;
        for _ in 0..ticks {
            while turns.spend(GroupId(3), [2, 7].map(|id| NodeId::new(id).ok()), 1_000) {
                asked += 1_000;
            }
            turns.tick(1);
            drop(turns.take_next());
        }
        asked
    }

    #[test]
    fn a_named_budget_gives_way_to_clients_on_either_side_and_a_number_does_not() {
        let node = |id| NodeId::new(id).unwrap();
        for (budget, adapts) in [("normal", true), ("268435456", false), ("max", false)] {
            let budget = SnapshotBudget { bytes_per_second: Some(1 << 20), ..budget.parse().unwrap() };
            assert_eq!(budget.adapts, adapts);
            let mut turns = turns(budget, 1);
            assert!(turns.enter(GroupId(3)));
            asked(&mut turns, 400);
            let free = asked(&mut turns, 20);
            turns.hear_strain(node(5), true);
            assert!(asked(&mut turns, 20).abs_diff(free) <= 2_000, "that node gives nothing");
            for (id, which) in [(2, "who gives"), (7, "who leads")] {
                turns.hear_strain(node(id), true);
                let held_back = asked(&mut turns, 20);
                assert_eq!(held_back < free * 3 / 4, adapts, "{which}: {held_back} after {free}");
                turns.hear_strain(node(id), false);
                asked(&mut turns, 400);
            }
            turns.hear_strain(node(2), true);
            asked(&mut turns, STRAINED_TICKS as u32 + 400);
            assert!(asked(&mut turns, 20).abs_diff(free) <= 2_000, "it has not been heard since");
            turns.set_strained(true);
            assert_eq!(asked(&mut turns, 20) < free * 3 / 4, adapts);
        }
    }

    #[test]
    fn the_node_knows_while_one_of_its_loops_hears_of_strain() {
        let ledger = Arc::new(Ledger::default());
        let (mut one, mut other) = (turns(SnapshotBudget::MAX, 2), turns(SnapshotBudget::MAX, 2));
        one.share(ledger.clone());
        other.share(ledger.clone());
        one.hear_strain(NodeId::new(2).unwrap(), true);
        for turns in [&mut one, &mut other] {
            turns.tick(1);
        }
        assert!(ledger.is_strained(), "the other loop knows nothing of it, and says nothing against it");
        one.hear_strain(NodeId::new(2).unwrap(), false);
        one.tick(1);
        assert!(!ledger.is_strained());
    }

    #[test]
    fn the_node_knows_while_it_receives_or_gives() {
        let ledger = Arc::new(Ledger::default());
        let (mut one, mut other) = (turns(SnapshotBudget::MAX, 2), turns(SnapshotBudget::MAX, 2));
        one.share(ledger.clone());
        other.share(ledger.clone());
        let tick = |one: &mut Turns, other: &mut Turns, ticks| {
            one.tick(ticks);
            other.tick(ticks);
            ledger.copies()
        };
        assert!(!tick(&mut one, &mut other, 1));
        one.enter(GroupId(2));
        other.note_copy();
        assert!(tick(&mut one, &mut other, 1));
        one.leave(GroupId(2));
        assert!(tick(&mut one, &mut other, 1), "the other loop gives");
        assert!(!tick(&mut one, &mut other, COPY_TICKS));
    }
}
