//! Bugs that a simulation can plant, each of which takes one rule out of the code: what no suite notices the
//! absence of, no suite tests (`docs/testing.md` lists who notices what).
//!
//! Invariants: in a build without debug assertions, which every release is, nothing can be planted and
//! [`is_planted`] is a constant; anywhere else it is true only on threads of a simulation that asked for that
//! very bug.
//!
//! Not for: faults of devices and hosts (`device::sim`, `rt::sim`), which rules are there to survive.

use super::sim;

/// A rule that is taken out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bug {
    /// Replay brings back blocks that were freed since.
    RevokesForgotten,
    /// Replay asks whether the dead host holds the lock, not in which tenure.
    ReplayByOwner,
    /// Replay writes under a lock that it did not swap first.
    NoSwapBeforeReplay,
    /// A recoverer is named by its slot alone.
    RecovererWithoutIncarnation,
    /// A slot says *recovered* before what was replayed is durable.
    PublishedUnflushed,
    /// Transactions count though their commits don't fit them.
    TornCommitBelieved,
    /// Who takes over from a dead host leaves the change counter as it is.
    ChangeCounterNotRaised,
    /// What a dead host held is taken without recovery.
    DeadSteppedOver,
    /// A lock is taken exclusively while others share it.
    SharersNotAsked,
    /// What was cached under a lock stays valid over an acquisition.
    CacheKept,
    /// A lock leaves before what it covers is in place.
    LeavesUnsettled,
    /// A host acts on a swapped image at once, durable or not.
    ActsBeforeFlush,
    /// A swap whose answer did not come counts as not done.
    UnknownIsFailed,
    /// The door lets everything through, whatever became of the lease.
    LeaseIgnored,
    /// What is in memory is answered without a look at the lease.
    AnswersPastLease,
    /// The lease runs from the answer to a beat, not from its issue.
    LeaseFromAnswer,
    /// A host that is silent for as long as a lease counts as dead.
    DeadTooEarly,
    /// A commit is acknowledged without a flush.
    CommitUnflushed,
    /// A commit may reach the medium before the data that it exposes.
    DataBehindCommit,
    /// The journal's tail moves past blocks that are not durable in their place.
    TailMovesUnflushed,
    /// Freed blocks can be used again before they are durably free.
    FreedReusedEarly,
    /// A group of inodes may be marked before its locks are durable.
    BirthUnflushed,
    /// A commit whose write failed counts.
    FailedCommitForgotten,
}

impl Bug {
    pub const ALL: [Bug; 23] = [
        Bug::RevokesForgotten,
        Bug::ReplayByOwner,
        Bug::NoSwapBeforeReplay,
        Bug::RecovererWithoutIncarnation,
        Bug::PublishedUnflushed,
        Bug::TornCommitBelieved,
        Bug::ChangeCounterNotRaised,
        Bug::DeadSteppedOver,
        Bug::SharersNotAsked,
        Bug::CacheKept,
        Bug::LeavesUnsettled,
        Bug::ActsBeforeFlush,
        Bug::UnknownIsFailed,
        Bug::LeaseIgnored,
        Bug::AnswersPastLease,
        Bug::LeaseFromAnswer,
        Bug::DeadTooEarly,
        Bug::CommitUnflushed,
        Bug::DataBehindCommit,
        Bug::TailMovesUnflushed,
        Bug::FreedReusedEarly,
        Bug::BirthUnflushed,
        Bug::FailedCommitForgotten,
    ];
}

/// Is this bug planted in the simulation that the calling thread belongs to?
#[inline]
pub fn is_planted(bug: Bug) -> bool {
    cfg!(debug_assertions) && sim::planted() == Some(bug)
}
