//! The rules that keep replicas and their moves safe, by name, so that a test can break one and see that the simulation
//! notices. Each stands for a mistake that another system has made.
//!
//! Nothing here is part of the interface. Only with the feature `testing`, which the simulation's tests turn on and no build
//! for use does, can a rule be broken; without it each question is answered at compile time.

/// A rule that the simulation must see broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// An acknowledgement leaves when what it acknowledges is durable.
    DurableBeforeAck,
    /// The applied mark is in the batch of the data.
    MarkWithData,
    /// A learner votes when it has the group's state and has caught up.
    PromoteCaughtUp,
    /// The tombstone is durable before the data of a replica goes.
    TombstoneFirst,
    /// A leader asks a quorum before it lets somebody read.
    ReadsAskQuorum,
    /// A change of members holds from its entry on.
    ChangeAtItsEntry,
    /// A replica is removed from its node when the group has left it behind.
    LeftBehindFirst,
    /// A leader takes no order that comes late.
    OrdersInTime,
}

#[cfg(feature = "testing")]
thread_local! {
    static BROKEN: std::cell::Cell<Option<Rule>> = const { std::cell::Cell::new(None) };
}

/// Lets replicas that this thread steps break a rule from now on, or none.
#[cfg(feature = "testing")]
pub fn break_rule(rule: Option<Rule>) {
    BROKEN.set(rule);
}

/// Whether a test asks for this rule to be broken.
#[cfg(feature = "testing")]
pub fn is_broken(rule: Rule) -> bool {
    BROKEN.get() == Some(rule)
}

/// Nobody can ask for a rule to be broken.
#[cfg(not(feature = "testing"))]
pub const fn is_broken(_rule: Rule) -> bool {
    false
}
