//! The rules of death and recovery, each of which can be taken out.

/// One rule. The comment says what a host does when the rule is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rule {
    /// Gone: others call a host dead while it still is inside its lease.
    LeaseEndsBeforeTheVerdict,
    /// Gone: a host that stood still for longer than its lease goes on where it was.
    DoorChecksTheLease,
    /// Gone: others call a host dead while what it sent can still come.
    VerdictWaitsForTheHoldTime,
    /// Gone: a host that withdraws says so while a plain write of its can still come.
    WithdrawnOnlyWhenItsWritesAreOver,
    /// Gone: a new life claims its slot while a command of the last one can still come.
    NextLifeOnlyWhenTheLastIsGone,
    /// Gone: a new life begins its journal without looking at what the last one left in it.
    NextLifeRecoversTheLast,
    /// Gone: the lock of a dead owner is taken before what it had committed is in place.
    SettledBeforeItIsTaken,
    /// Gone: recovery begins without a mark in the slot.
    MarkBeforeReplay,
    /// Gone: the recoverer acts on a mark that is only in the volatile cache.
    FlushTheMark,
    /// Gone: the mark names the recoverer's slot alone, and whoever lives there counts as the recoverer.
    MarkNamesTheIncarnation,
    /// Gone: a mark is taken over although its recoverer lives.
    LivingRecovererKeepsItsMark,
    /// Gone: a mark is taken over once its recoverer is dead, settled or not.
    RecovererIsSettledBeforeItsMarkIsTaken,
    /// Gone: the dead one is not shut out of a device that can do it.
    FenceBeforeReplay,
    /// Gone: an image is valid if its lock names the dead one, in whatever tenure.
    ReplayByTenure,
    /// Gone: replay looks at the lock and does not swap it.
    PinBeforeReplay,
    /// Gone: images are put in place while the pins may be in the volatile cache alone. (The journal was made
    /// durable by the flush of the mark.)
    FlushBeforePuttingInPlace,
    /// Gone: the slot says recovered before what was put in place is flushed.
    FlushBeforePublishing,
    /// Gone: a flush proves what was written before the device was reset.
    FlushProvesOneResetCount,
    /// Gone: the lock of a settled owner is taken under the old change counter.
    RaiseCounterOnTakeOver,
    /// Gone: a lock leaves when what it covers is in the journal.
    WriteInPlaceBeforeRelease,
    /// Gone: a commit is acknowledged before it is flushed.
    AcknowledgeAfterTheFlush,
}
