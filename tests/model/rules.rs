//! The rules of the lock protocol, each of which can be taken out.

/// One rule. The comment says what a host does when the rule is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rule {
    /// Gone: a host believes in its tenure until the answer to its releasing swap has come.
    ReleaseEndsTenureAtIssue,
    /// Gone: a release with a lost answer and the old image still there counts as "did not happen".
    UndecidedNeedsAnotherSwap,
    /// Gone: two swaps with the same content make the same image.
    NonceIsUnique,
    /// Gone: an image that names us after a lost answer is taken for the tenure we had.
    UnknownTenureIsNewGrant,
    /// Gone: only the last tenure that ended is known as old, not every one up to it.
    OldTenuresStayOld,
    /// Gone: the cache survives every acquisition.
    InvalidateUnlessCounterEqual,
    /// Gone: a holder hands on what it changed under the old change counter.
    RaiseCounterOnChange,
    /// Gone: the lock of an owner that left is taken under the old change counter.
    RaiseCounterOnTakeOver,
    /// Gone: an own old tenure that came back is taken up under the old change counter.
    RaiseCounterOnOwnOldTenure,
    /// Gone: a lock leaves before the block it covers is in place.
    WriteInPlaceBeforeRelease,
    /// Gone: a host acts on an image that is only in the volatile cache.
    FlushBeforeActing,
    /// Gone: a flush proves an image although the device was reset in between.
    FlushProvesOneResetCount,
    /// Gone: a host whose bit is set takes it for its own share.
    ShareSwapsEvenIfBitSet,
    /// Gone: a share named by `next` is believed even if it is older than the wait.
    ShareGrantBelongsToThisWait,
    /// Gone: bits of an empty slot are cleared against an image read after the slot.
    ImageBeforeSlot,
    /// Gone: a sharer that waits to upgrade does not yield.
    SharerAlwaysYields,
    /// Gone: a sharer that waits to upgrade and is the first in the queue yields to whoever asks.
    YieldingUpgraderKeepsItsPlace,
    /// Gone: a waiter swaps itself into a lock that somebody holds exclusively.
    OnlyOwnerSwapsExclusive,
    /// Gone: a waiter rings first and writes its request then.
    RequestBeforeRing,
    /// Gone: a holder reads the requests and clears its doorbell then.
    ClearBeforeReading,
    /// Gone: a waiter decides by what it remembers of the doorbell.
    DoorbellReadFromDisk,
    /// Gone: a waiter rings once for a wait, whoever holds the lock later.
    NewHolderIsRung,
    /// Gone: a hand-over forgets the other waiters.
    HandOverCarriesWaiters,
    /// Gone: a waiter whose bit the image carries does not ring the new owner.
    CarriedWaiterRingsToo,
    /// Gone: a bit or `next` in an image counts for a request that was written after the image.
    ImageKnowsOlderRequestsOnly,
    /// Gone: a host passes the lock on while its own request, served long ago, still asks for it.
    WithdrawBeforePassingOn,
    /// Gone: whoever finds the lock takes it, queue or not.
    NobodyJumpsTheQueue,
    /// Gone: a host that is rung answers from what it believes to hold.
    RungHolderReadsTheBlock,
}

impl Rule {
    pub const ALL: [Rule; 28] = [
        Rule::ReleaseEndsTenureAtIssue,
        Rule::UndecidedNeedsAnotherSwap,
        Rule::NonceIsUnique,
        Rule::UnknownTenureIsNewGrant,
        Rule::OldTenuresStayOld,
        Rule::InvalidateUnlessCounterEqual,
        Rule::RaiseCounterOnChange,
        Rule::RaiseCounterOnTakeOver,
        Rule::RaiseCounterOnOwnOldTenure,
        Rule::WriteInPlaceBeforeRelease,
        Rule::FlushBeforeActing,
        Rule::FlushProvesOneResetCount,
        Rule::ShareSwapsEvenIfBitSet,
        Rule::ShareGrantBelongsToThisWait,
        Rule::ImageBeforeSlot,
        Rule::SharerAlwaysYields,
        Rule::YieldingUpgraderKeepsItsPlace,
        Rule::OnlyOwnerSwapsExclusive,
        Rule::RequestBeforeRing,
        Rule::ClearBeforeReading,
        Rule::DoorbellReadFromDisk,
        Rule::NewHolderIsRung,
        Rule::HandOverCarriesWaiters,
        Rule::CarriedWaiterRingsToo,
        Rule::ImageKnowsOlderRequestsOnly,
        Rule::WithdrawBeforePassingOn,
        Rule::NobodyJumpsTheQueue,
        Rule::RungHolderReadsTheBlock,
    ];
}

/// A set of rules in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules(u64);

impl Rules {
    pub fn all() -> Rules {
        Rules(Rule::ALL.iter().fold(0, |set, rule| set | 1 << *rule as u64))
    }

    pub fn without(self, rule: Rule) -> Rules {
        Rules(self.0 & !(1 << rule as u64))
    }

    pub fn has(self, rule: Rule) -> bool {
        self.0 & 1 << rule as u64 != 0
    }
}
