//! What to do about a lock image: the protocol's decisions, pure.
//!
//! Everything that needs I/O (who lives, does `next` still ask) is looked up by the caller, *after* the
//! image was read, and handed in.

use crate::layout::lock::{LockKind, LockMode, LockRecord};
use crate::rt::planted::{Bug, is_planted};
use crate::types::{Owner, Slot, SlotSet, Tenure};

use super::Mode;
use crate::heartbeat::Liveness;

/// What this host remembers of its own hold on the lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Held {
    #[default]
    Nothing,
    Shared,
    Exclusive(Tenure),
}

impl Held {
    /// Is that enough for `mode`?
    pub fn covers(self, mode: Mode) -> bool {
        match self {
            Held::Nothing => false,
            Held::Shared => mode == Mode::Shared,
            Held::Exclusive(_) => true,
        }
    }
}

/// What the caller looked up after it read the image.
pub struct Facts<'a> {
    pub me: Owner,
    pub want: Mode,
    /// The lock's swap counter as read after this wait was made known: a share granted to us by name in a
    /// later image is ours. Without that, an image from before a late yield of ours would pass for a grant.
    pub granted_after: Option<u64>,
    /// The highest tenure of ours that has ended: an image that names us with one of those is old.
    pub ended: Tenure,
    /// Of the owner, if the image names one that is not us.
    pub owner: Liveness,
    /// `next` is another host that lives and still waits in the place that this image gave it.
    pub next_asks: bool,
    /// Of every other sharer: the slot's living owner, or that nobody lives there who could share.
    pub sharer: &'a dyn Fn(Slot) -> Sharer,
}

/// Who stands behind another slot's share bit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sharer {
    /// Somebody lives there and has to be asked.
    Living(Owner),
    /// The slot is free, left or recovered, read after the image: the bit is void.
    Nobody,
    /// Dead and not recovered.
    Dead(Owner),
}

/// The decision.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// The disk says that we hold it well enough; nothing to swap. `unseen`: the image names us with a
    /// tenure we do not remember: a new grant, or our own old one.
    Granted { held: Held, unseen: bool },
    /// Swap to this image; then we hold it like that.
    Take { to: LockRecord, held: Held },
    /// Ask these, then look again.
    Wait { ask: Vec<Owner> },
    /// This one is dead and must be recovered first.
    OwnerDead(Owner),
}

/// Decides what a host that wants the lock does next.
pub fn decide(record: &LockRecord, facts: &Facts<'_>, remembered: Held) -> Step {
    let me = facts.me;
    let base = LockRecord {
        swap_counter: record.swap_counter + 1,
        waiters: record.waiters.without(me.slot),
        ..record.clone()
    };
    let exclusive = |change_counter| {
        let tenure = Tenure(record.swap_counter + 1);
        let to = LockRecord {
            mode: LockMode::Exclusive { owner: me, tenure },
            sharers: SlotSet::EMPTY,
            next: None,
            change_counter,
            ..base.clone()
        };
        Step::Take { to, held: Held::Exclusive(tenure) }
    };
    // While `next` lives and asks, nobody jumps the queue.
    let in_line = record.next.filter(|n| *n != me && facts.next_asks);
    match record.mode {
        LockMode::Exclusive { owner, tenure } if owner == me => {
            let held = Held::Exclusive(tenure);
            if remembered != held && tenure <= facts.ended {
                // Our own old tenure, come back (a device lost what followed it): what happened under it
                // and since is unknown to everybody.
                return exclusive(record.change_counter + 1);
            }
            Step::Granted { held, unseen: remembered != held }
        }
        LockMode::Exclusive { owner, .. } => match facts.owner {
            Liveness::Living => Step::Wait { ask: vec![owner] },
            // We did not see this tenure end: whatever anybody caches under the lock is void.
            Liveness::Settled if is_planted(Bug::ChangeCounterNotRaised) => exclusive(record.change_counter),
            Liveness::Dead if is_planted(Bug::DeadSteppedOver) => exclusive(record.change_counter + 1),
            Liveness::Settled => exclusive(record.change_counter + 1),
            Liveness::Dead | Liveness::Lost => Step::OwnerDead(owner),
        },
        LockMode::Free => match (in_line, facts.want) {
            (Some(next), _) => Step::Wait { ask: vec![next] },
            (None, Mode::Exclusive) => exclusive(record.change_counter),
            // Membership: nearly everybody holds it shared for as long as it is mounted.
            (None, Mode::Shared) if record.kind == LockKind::Volume => {
                let to =
                    LockRecord { mode: LockMode::Shared, sharers: SlotSet::of(me.slot), next: None, ..base };
                Step::Take { to, held: Held::Shared }
            }
            // Alone, exclusive costs no more than a share and saves the upgrade; whoever else wants to
            // read asks, and we step down.
            (None, Mode::Shared) => exclusive(record.change_counter),
        },
        LockMode::Shared => {
            if facts.want == Mode::Shared {
                if remembered == Held::Shared {
                    return Step::Granted { held: Held::Shared, unseen: false };
                }
                // A share that was granted to this very incarnation during its own wait is ours; any other
                // set bit of our slot may be somebody else's and needs a swap of our own.
                let granted = facts.granted_after.is_some_and(|after| record.swap_counter > after);
                if granted && record.next == Some(me) && record.sharers.contains(me.slot) {
                    return Step::Granted { held: Held::Shared, unseen: true };
                }
                if let Some(next) = in_line {
                    return Step::Wait { ask: vec![next] };
                }
                let to = LockRecord {
                    sharers: record.sharers.with(me.slot),
                    next: record.next.filter(|n| *n != me),
                    ..base
                };
                return Step::Take { to, held: Held::Shared };
            }
            let mut ask = Vec::new();
            for slot in record.sharers.without(me.slot).iter() {
                match (facts.sharer)(slot) {
                    Sharer::Living(_) if is_planted(Bug::SharersNotAsked) => {}
                    Sharer::Living(owner) => ask.push(owner),
                    Sharer::Nobody => {}
                    Sharer::Dead(owner) => return Step::OwnerDead(owner),
                }
            }
            if let Some(next) = in_line
                && !ask.contains(&next)
            {
                ask.push(next);
            }
            if ask.is_empty() { exclusive(record.change_counter) } else { Step::Wait { ask } }
        }
    }
}

/// Whom a holder gives the lock to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wanted {
    pub by: Owner,
    pub mode: Mode,
    /// The lock's swap counter when that wait began: the smaller, the older.
    pub since: u64,
}

/// What a holder knows when it gives.
pub struct Giving {
    pub me: Owner,
    /// May we go on as a sharer?
    pub keep_share: bool,
    /// Is the inode open here?
    pub open: bool,
    /// Did anything covered change in our tenure?
    pub changed: bool,
    /// Others who asked, ourselves included if threads of ours wait.
    pub waiters: SlotSet,
    /// Threads of ours wait to turn their share into exclusive.
    pub upgrading: bool,
}

/// The image by which a holder gives a lock to `to`, and what it still holds afterwards. `None`: there is
/// nothing of ours to give in this image.
pub fn give(
    record: &LockRecord,
    remembered: Held,
    to: Wanted,
    giving: &Giving,
) -> Option<(LockRecord, Held)> {
    let me = giving.me;
    // A tenure that is not remembered: our own that ended and came back (a reset took back the swap that ended it, and
    // with it what that swap counted), or one that we did not see begin.
    let unseen = matches!(record.mode, LockMode::Exclusive { owner, tenure }
        if owner == me && remembered != Held::Exclusive(tenure))
        && !is_planted(Bug::ReturnedTenureNotCounted);
    let openers = if giving.open { record.openers.with(me.slot) } else { record.openers.without(me.slot) };
    let base = LockRecord {
        swap_counter: record.swap_counter + 1,
        change_counter: record.change_counter + u64::from(giving.changed || unseen),
        openers,
        waiters: giving.waiters.without(to.by.slot),
        next: None,
        ..record.clone()
    };
    let grant = LockRecord {
        mode: LockMode::Exclusive { owner: to.by, tenure: Tenure(record.swap_counter + 1) },
        sharers: SlotSet::EMPTY,
        ..base.clone()
    };
    match record.mode {
        LockMode::Exclusive { owner, .. } if owner == me => match to.mode {
            Mode::Exclusive => Some((grant, Held::Nothing)),
            Mode::Shared if giving.keep_share => {
                let sharers = SlotSet::of(me.slot).with(to.by.slot);
                Some((
                    LockRecord { mode: LockMode::Shared, sharers, next: Some(to.by), ..base },
                    Held::Shared,
                ))
            }
            // Alone it is as well served exclusively.
            Mode::Shared => Some((grant, Held::Nothing)),
        },
        LockMode::Shared if record.sharers.contains(me.slot) && remembered == Held::Shared => match to.mode {
            Mode::Shared => None,
            Mode::Exclusive => {
                let sharers = record.sharers.without(me.slot);
                if sharers.without(to.by.slot).is_empty() || is_planted(Bug::SharesOfOthersCleared) {
                    return Some((grant, Held::Nothing));
                }
                // The first that yields says who is next; then nobody joins. An upgrader that is next gives
                // its share up but keeps its place.
                let keeps_place = |n: &Owner| if *n == me { giving.upgrading } else { true };
                let granted = record.next.filter(|n| sharers.contains(n.slot) && *n != to.by && *n != me);
                let next = record.next.filter(|n| granted.is_none() && keeps_place(n));
                let next = Some(next.unwrap_or(to.by));
                Some((LockRecord { sharers, next, ..base }, Held::Nothing))
            }
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{BlockNo, Incarnation};

    fn host(slot: u16) -> Owner {
        Owner { slot: Slot(slot), incarnation: Incarnation(1) }
    }

    fn lock(mode: LockMode) -> LockRecord {
        LockRecord {
            mode,
            swap_counter: 10,
            change_counter: 3,
            ..LockRecord::new_free(LockKind::Inode, BlockNo(64))
        }
    }

    fn step(record: &LockRecord, want: Mode, owner: Liveness, sharer: Sharer, held: Held) -> Step {
        let facts = Facts {
            me: host(1),
            want,
            granted_after: None,
            ended: Tenure(3),
            owner,
            next_asks: true,
            sharer: &|_| sharer,
        };
        decide(record, &facts, held)
    }

    const LIVE: Sharer = Sharer::Living(Owner { slot: Slot(2), incarnation: Incarnation(1) });

    #[test]
    fn a_free_lock_is_taken_exclusively_in_one_swap() {
        let Step::Take { to, held } =
            step(&lock(LockMode::Free), Mode::Shared, Liveness::Living, LIVE, Held::Nothing)
        else {
            panic!("not taken")
        };
        assert_eq!(held, Held::Exclusive(Tenure(11)));
        assert_eq!(to.mode, LockMode::Exclusive { owner: host(1), tenure: Tenure(11) });
        assert_eq!((to.swap_counter, to.change_counter), (11, 3));
    }

    #[test]
    fn an_unseen_end_raises_the_change_counter() {
        let record = lock(LockMode::Exclusive { owner: host(2), tenure: Tenure(4) });
        let Step::Take { to, .. } = step(&record, Mode::Shared, Liveness::Settled, LIVE, Held::Nothing)
        else {
            panic!("not taken")
        };
        assert_eq!(to.change_counter, 4);
        assert_eq!(
            step(&record, Mode::Shared, Liveness::Dead, LIVE, Held::Nothing),
            Step::OwnerDead(host(2))
        );
        assert_eq!(
            step(&record, Mode::Shared, Liveness::Living, LIVE, Held::Nothing),
            Step::Wait { ask: vec![host(2)] }
        );
    }

    #[test]
    fn a_set_bit_is_not_a_share_without_a_swap() {
        let mut record = lock(LockMode::Shared);
        record.sharers = SlotSet::of(Slot(1)).with(Slot(2));
        assert!(matches!(
            step(&record, Mode::Shared, Liveness::Living, LIVE, Held::Nothing),
            Step::Take { held: Held::Shared, .. }
        ));
        // Granted by name, but not during a wait of ours, or in an image from before it.
        record.next = Some(host(1));
        let with = |granted_after| {
            let facts = Facts {
                me: host(1),
                want: Mode::Shared,
                granted_after,
                ended: Tenure(3),
                owner: Liveness::Living,
                next_asks: false,
                sharer: &|_| LIVE,
            };
            decide(&record, &facts, Held::Nothing)
        };
        assert!(matches!(with(None), Step::Take { .. }));
        assert!(matches!(with(Some(10)), Step::Take { .. }));
        assert_eq!(with(Some(9)), Step::Granted { held: Held::Shared, unseen: true });
    }

    #[test]
    fn an_old_tenure_of_ours_is_no_new_grant() {
        let named = |tenure| lock(LockMode::Exclusive { owner: host(1), tenure: Tenure(tenure) });
        let new = step(&named(4), Mode::Shared, Liveness::Living, LIVE, Held::Nothing);
        assert_eq!(new, Step::Granted { held: Held::Exclusive(Tenure(4)), unseen: true });
        let old = step(&named(3), Mode::Shared, Liveness::Living, LIVE, Held::Nothing);
        assert!(matches!(old, Step::Take { to, .. } if to.change_counter == 4));
    }

    #[test]
    fn an_upgrade_asks_every_living_sharer_and_voids_other_bits() {
        let mut record = lock(LockMode::Shared);
        record.sharers = SlotSet::of(Slot(1)).with(Slot(2));
        assert_eq!(
            step(&record, Mode::Exclusive, Liveness::Living, LIVE, Held::Shared),
            Step::Wait { ask: vec![host(2)] }
        );
        assert!(matches!(
            step(&record, Mode::Exclusive, Liveness::Living, Sharer::Nobody, Held::Shared),
            Step::Take { held: Held::Exclusive(_), .. }
        ));
        assert_eq!(
            step(&record, Mode::Exclusive, Liveness::Living, Sharer::Dead(host(2)), Held::Shared),
            Step::OwnerDead(host(2))
        );
    }

    #[test]
    fn nobody_jumps_over_next() {
        let mut record = lock(LockMode::Shared);
        record.sharers = SlotSet::of(Slot(2));
        record.next = Some(host(3));
        assert_eq!(
            step(&record, Mode::Shared, Liveness::Living, LIVE, Held::Nothing),
            Step::Wait { ask: vec![host(3)] }
        );
    }

    #[test]
    fn giving_ends_what_we_held_and_names_the_waiter() {
        let giving = |keep_share| Giving {
            me: host(1),
            keep_share,
            open: true,
            changed: true,
            waiters: SlotSet::of(Slot(3)).with(Slot(2)),
            upgrading: false,
        };
        let to = |mode| Wanted { by: host(2), mode, since: 4 };
        let mine = lock(LockMode::Exclusive { owner: host(1), tenure: Tenure(10) });
        let held = Held::Exclusive(Tenure(10));
        let (image, left) = give(&mine, held, to(Mode::Exclusive), &giving(true)).unwrap();
        assert_eq!(left, Held::Nothing);
        assert_eq!(image.mode, LockMode::Exclusive { owner: host(2), tenure: Tenure(11) });
        assert_eq!(image.change_counter, 4);
        assert_eq!(image.waiters, SlotSet::of(Slot(3)));
        assert!(image.openers.contains(Slot(1)));
        let (image, left) = give(&mine, held, to(Mode::Shared), &giving(true)).unwrap();
        assert_eq!((left, image.mode, image.next), (Held::Shared, LockMode::Shared, Some(host(2))));
        let mut shared = lock(LockMode::Shared);
        shared.sharers = SlotSet::of(Slot(1)).with(Slot(2)).with(Slot(3));
        let (image, _) = give(&shared, Held::Shared, to(Mode::Exclusive), &giving(true)).unwrap();
        assert_eq!(image.sharers, SlotSet::of(Slot(2)).with(Slot(3)));
        assert_eq!(image.next, Some(host(2)));
        // An upgrader that is next yields its share and keeps its place.
        shared.next = Some(host(1));
        let upgrading = Giving { upgrading: true, ..giving(true) };
        let (image, _) = give(&shared, Held::Shared, to(Mode::Exclusive), &upgrading).unwrap();
        assert_eq!(image.next, Some(host(1)));
        // The upgrader is the only one left: it gets the lock in the same swap.
        shared.sharers = SlotSet::of(Slot(1)).with(Slot(2));
        let (image, _) = give(&shared, Held::Shared, to(Mode::Exclusive), &giving(true)).unwrap();
        assert!(matches!(image.mode, LockMode::Exclusive { owner, .. } if owner == host(2)));
        // Our own old tenure, come back: what was counted when it ended is counted again.
        let unchanged = Giving { changed: false, ..giving(true) };
        let (image, _) = give(&mine, Held::Shared, to(Mode::Exclusive), &unchanged).unwrap();
        assert_eq!(image.change_counter, 4);
        let (image, _) = give(&mine, held, to(Mode::Exclusive), &unchanged).unwrap();
        assert_eq!(image.change_counter, 3);
        // A bit of our slot that we do not remember is not ours to clear here.
        assert_eq!(give(&shared, Held::Nothing, to(Mode::Exclusive), &giving(true)), None);
    }
}
