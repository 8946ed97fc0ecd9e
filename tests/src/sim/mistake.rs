//! Mistakes that other systems made, made on purpose: a simulation that does not notice them is worth nothing.

use std::str::FromStr;

use pontoon_raftstore::rules as replicas;
use pontoon_wal::rules as log;

/// A mistake, named after what goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mistake {
    /// A follower acknowledges what is not durable yet.
    AckBeforeSync,
    /// A damaged tail that was acknowledged is cut as if it were torn.
    AcknowledgedTailCut,
    /// The applied mark and the data reach the engine in two batches.
    MarkApart,
    /// A learner votes before it has the state.
    PromotedEarly,
    /// The data of a replica goes before its tombstone is durable.
    TombstoneAfter,
    /// Reads rest on raft's own lease.
    LeaseRead,
    /// A follower goes on with the members of before.
    ChangeMissed,
    /// The source's data goes when the driver believes that it is not needed.
    DeletedOnBelief,
    /// An order of a move takes effect however late it comes.
    LateOrder,
}

impl Mistake {
    /// All of them.
    pub const ALL: [Mistake; 9] = [
        Mistake::AckBeforeSync,
        Mistake::AcknowledgedTailCut,
        Mistake::MarkApart,
        Mistake::PromotedEarly,
        Mistake::TombstoneAfter,
        Mistake::LeaseRead,
        Mistake::ChangeMissed,
        Mistake::DeletedOnBelief,
        Mistake::LateOrder,
    ];

    /// Everything that this thread simulates makes the mistake until the guard is dropped.
    pub fn make(self) -> Making {
        use replicas::Rule;
        let rule = match self {
            Mistake::AckBeforeSync => Rule::DurableBeforeAck,
            Mistake::AcknowledgedTailCut => {
                log::break_rule(Some(log::Rule::DurableMarkCounts));
                return Making(());
            }
            Mistake::MarkApart => Rule::MarkWithData,
            Mistake::PromotedEarly => Rule::PromoteCaughtUp,
            Mistake::TombstoneAfter => Rule::TombstoneFirst,
            Mistake::LeaseRead => Rule::ReadsAskQuorum,
            Mistake::ChangeMissed => Rule::ChangeAtItsEntry,
            Mistake::DeletedOnBelief => Rule::LeftBehindFirst,
            Mistake::LateOrder => Rule::OrdersInTime,
        };
        replicas::break_rule(Some(rule));
        Making(())
    }
}

impl FromStr for Mistake {
    type Err = String;

    /// Reads the name as it is written in the code, in any case, with or without dashes.
    fn from_str(text: &str) -> Result<Self, String> {
        let plain = text.replace('-', "").to_lowercase();
        let found = Mistake::ALL.into_iter().find(|mistake| format!("{mistake:?}").to_lowercase() == plain);
        found.ok_or_else(|| format!("no such mistake; there are {:?}", Mistake::ALL))
    }
}

/// A mistake is being made.
#[derive(Debug)]
pub struct Making(());

impl Drop for Making {
    fn drop(&mut self) {
        log::break_rule(None);
        replicas::break_rule(None);
    }
}
