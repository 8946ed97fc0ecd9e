//! The rules that keep the log safe, by name, so that a test can break one and see that the checkers notice.
//!
//! Nothing here is part of the interface. Only with the feature `testing`, which this crate's own tests turn on and no
//! build for use does, can a rule be broken; without it each question is answered at compile time.

/// A rule that crash and damage tests must see broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// What a later frame states as durable is corrupt if it is damaged, never torn.
    DurableMarkCounts,
    /// What a frame states as durable is a beginning of its stream, not the last frame that happened to complete.
    DurableMarkIsPrefix,
    /// What follows a torn frame is cut with it.
    TornTailEnds,
    /// The opening frame is durable before anything else is written.
    OpeningAlone,
    /// A batch is acknowledged after its sync.
    SyncBeforeAck,
    /// A segment is used again only when neither manifest lists it.
    ForgottenByBoth,
    /// A segment takes frames only when both manifests list it.
    ListedByBoth,
    /// A new file's name is durable before a manifest lists it.
    NameSynced,
    /// A new file's content is durable before a manifest lists it.
    FilledBeforeListed,
    /// Frames that a later open cut are void.
    CutsHold,
    /// A frame of which some records did not reach the disk is torn as a whole.
    WholeFrames,
    /// What recovery read beyond the proven mark is durable before the log is used.
    RecoverySyncs,
    /// It is written again first: a sync that failed before may have left it clean in memory and not on the disk.
    RecoveryRewrites,
    /// A segment gets a new epoch for each use.
    NewEpoch,
    /// A checkpoint's state is durable in frames before it is written.
    CaptureDurable,
    /// A checkpoint is written over the older manifest.
    OlderManifest,
    /// A checkpoint counts when it is durable.
    ManifestSynced,
    /// A manifest that an earlier process wrote is durable before the other is written over.
    NewestManifestSynced,
    /// Entries outside the bounds that a checkpoint states are gone.
    BoundsHold,
    /// A footer is of a segment that was sealed before its checkpoint's capture began.
    FooterOfSealed,
    /// A footer is what its manifest says.
    FooterChecked,
    /// A frame's head has a copy in another block.
    HeadsCopied,
    /// A record is what its CRC says.
    RecordsChecked,
    /// The index points at a relocated record when its copy is durable.
    CopyDurable,
    /// A record is relocated only while it is where it was read.
    StillTheSame,
    /// A relocated record keeps its LSN.
    LsnKept,
    /// What was relocated after the checkpoint is void.
    ColdUpToCheckpoint,
    /// A checkpoint that forgets a segment states the cold frames that its records went to.
    ColdSeqStated,
    /// Each use of a segment has a key of its own.
    EpochInKey,
    /// What is encrypted is opened only if its tag is right.
    TagsChecked,
}

#[cfg(feature = "testing")]
thread_local! {
    static BROKEN: std::cell::Cell<Option<Rule>> = const { std::cell::Cell::new(None) };
}

/// Lets logs that this thread steps break a rule from now on, or none.
#[cfg(feature = "testing")]
pub fn break_rule(rule: Option<Rule>) {
    BROKEN.set(rule);
}

/// Lets this thread remember what it seals from now on, or no longer, so that a key that meets a nonce with two contents
/// panics. How many nonces were remembered until now.
#[cfg(feature = "testing")]
pub fn watch_nonces(on: bool) -> usize {
    crate::crypt::watch::watch_nonces(on)
}

/// Whether a test asks for this rule to be broken.
#[cfg(feature = "testing")]
pub(crate) fn is_broken(rule: Rule) -> bool {
    BROKEN.get() == Some(rule)
}

/// Nobody can ask for a rule to be broken.
#[cfg(not(feature = "testing"))]
pub(crate) const fn is_broken(_rule: Rule) -> bool {
    false
}
