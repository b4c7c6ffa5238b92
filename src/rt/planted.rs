//! Bugs that a simulation can plant, each of which takes one rule out of the code: what no suite notices the
//! absence of, no suite tests (`docs/testing.md` lists who notices what).
//!
//! Invariants: in a build without debug assertions, which every release is, nothing can be planted and
//! [`is_planted`] is a constant; anywhere else it is true only on threads of a simulation that asked for that
//! very bug, or in a daemon in whose environment [`VARIABLE`] names one of [`Bug::REAL`], which only real kernels
//! can show.
//!
//! Not for: faults of devices and hosts (`device::sim`, `rt::sim`), which rules are there to survive.

use std::sync::OnceLock;

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
    /// A host's own tenure that a power cut brought back is given away as if nothing had changed in it.
    ReturnedTenureNotCounted,
    /// After a reset, reads go on before what may have been forgotten is written again.
    ReadBeforeRewrite,
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
    /// A holder gives a lock away after a change without raising the change counter.
    ChangeNotCounted,
    /// A sharer that yields clears the others' bits, too.
    SharesOfOthersCleared,
    /// All images of a host carry one nonce.
    NonceRepeats,
    /// A group of inodes that are all free becomes free space again.
    GroupsGivenBack,
    /// A flush counts for what was written before the device was reset.
    ResetsNotCounted,
    /// A commit whose flush failed counts.
    FailedFlushForgotten,
    /// A plain write whose answer never came counts as written.
    LateWriteNotAwaited,
    /// A hint of unknown outcome is waited for like a change.
    HintAwaited,
    /// A host is dead though its device may still hold what it sent.
    HoldTimeForgotten,
    /// The beat goes on though nobody looks at the doorbell.
    DeafAndBeating,
    /// A host that gives up does not say so in its slot.
    WithdrawalNotTold,
    /// File data is written after the change that exposes it has joined.
    DataBehindChange,
    /// A file may grow while extents of a truncation are still there.
    TruncationForgotten,
    /// Requests are read only when somebody rings.
    NetTakenOut,
    /// A wish is granted over the share of its slot, whichever life that is of.
    GrantedToTheDead,
    /// A host does not look whether its wishes still stand on the disk.
    WishNotReadBack,
    /// The dead are recovered without being shut out of a device that can do it.
    NotFenced,
    /// A change that the device refused to a fenced host counts as made.
    ConflictIgnored,
    /// A recovery is taken over from a host that lives.
    RecoveryTakenOver,
    /// A journal that can't be read counts as empty.
    DamagedJournalSkipped,
    /// A recovered slot is claimed by any host at once.
    SlotReusedEarly,
    /// A directory may move below itself.
    AncestorsUnchecked,
    /// Directories move without the rename lock, and what was found of their ancestors before a wait counts after it.
    MovesNotRevalidated,
    /// Directories move without the rename lock.
    RenameLockNotTaken,
    /// A file that is open and loses its last name is entered nowhere.
    OrphansForgotten,
    /// A file without names is freed whoever has it open.
    OpenersNotAsked,
    /// The orphans of slots in which nobody lives are left to themselves.
    DeadListsUnswept,
    /// A file open for writing is held by a share like any other.
    WritableOpensShared,
    /// A lock leaves while the kernel still has what it covers.
    KernelNotTold,
    /// A lock leaves though something was served while the kernel forgot.
    ServedMeanwhile,
    /// A mount does not look whether the volume is under maintenance.
    MaintenanceIgnored,
    /// Maintenance begins without a look whether other hosts live.
    MaintenanceUnwatched,
    /// A scrub looks at what did not fit without the locks that cover it.
    LooksWithoutLocks,
    /// The kernel keeps a file's pages when its lock leaves.
    KernelPagesKept,
    /// The kernel is not told that a file changes hands: it keeps attributes and pages.
    KernelInodesKept,
    /// The kernel keeps names when the lock of their directory leaves.
    KernelNamesKept,
    /// The guard of a dead daemon aborts the connection, and no more.
    GuardOnlyAborts,
}

impl Bug {
    /// All whose absence does harm: that of `RenameLockNotTaken` does none (`docs/testing.md`).
    pub const ALL: [Bug; 57] = [
        Bug::RevokesForgotten,
        Bug::ReplayByOwner,
        Bug::NoSwapBeforeReplay,
        Bug::RecovererWithoutIncarnation,
        Bug::PublishedUnflushed,
        Bug::TornCommitBelieved,
        Bug::ChangeCounterNotRaised,
        Bug::ReturnedTenureNotCounted,
        Bug::ReadBeforeRewrite,
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
        Bug::ChangeNotCounted,
        Bug::SharesOfOthersCleared,
        Bug::NonceRepeats,
        Bug::GroupsGivenBack,
        Bug::ResetsNotCounted,
        Bug::FailedFlushForgotten,
        Bug::LateWriteNotAwaited,
        Bug::HintAwaited,
        Bug::HoldTimeForgotten,
        Bug::DeafAndBeating,
        Bug::WithdrawalNotTold,
        Bug::DataBehindChange,
        Bug::TruncationForgotten,
        Bug::NetTakenOut,
        Bug::WishNotReadBack,
        Bug::GrantedToTheDead,
        Bug::NotFenced,
        Bug::ConflictIgnored,
        Bug::RecoveryTakenOver,
        Bug::DamagedJournalSkipped,
        Bug::SlotReusedEarly,
        Bug::AncestorsUnchecked,
        Bug::MovesNotRevalidated,
        Bug::OrphansForgotten,
        Bug::OpenersNotAsked,
        Bug::DeadListsUnswept,
        Bug::WritableOpensShared,
        Bug::KernelNotTold,
        Bug::ServedMeanwhile,
        Bug::MaintenanceIgnored,
        Bug::MaintenanceUnwatched,
        Bug::LooksWithoutLocks,
    ];
    /// Those between a daemon and its kernel: no simulation has one.
    pub const REAL: [Bug; 5] = [
        Bug::KernelPagesKept,
        Bug::KernelInodesKept,
        Bug::KernelNamesKept,
        Bug::GuardOnlyAborts,
        Bug::WritableOpensShared,
    ];
}

/// Names the bug that daemons have.
pub const VARIABLE: &str = "LUNFS_PLANTED_BUG";

/// The one bug of this process, as its environment says.
fn of_this_process() -> Option<Bug> {
    static PLANTED: OnceLock<Option<Bug>> = OnceLock::new();
    *PLANTED.get_or_init(|| {
        let name = std::env::var(VARIABLE).ok()?;
        Bug::REAL.into_iter().find(|bug| format!("{bug:?}") == name)
    })
}

/// Is this bug planted in the simulation that the calling thread belongs to, or in this daemon?
#[inline]
pub fn is_planted(bug: Bug) -> bool {
    cfg!(debug_assertions) && (sim::planted() == Some(bug) || of_this_process() == Some(bug))
}
