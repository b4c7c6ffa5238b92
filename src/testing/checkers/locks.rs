//! Check 2, the locks: is this swap one that its writer may make?
//!
//! Judged by images and slots on the LUN alone, so a change of the protocol that keeps the rules passes, and
//! one that breaks them does not, whatever the hosts believe.

use super::{Judge, Notes};
use crate::device::sim::Executed;
use crate::layout::lock::{LockMode, LockRecord};
use crate::layout::slot::SlotState;
use crate::types::{BlockNo, Owner, Slot, SlotSet, Tenure};

impl Judge {
    pub(super) fn judge_lock(
        &self,
        notes: &mut Notes,
        c: &Executed<'_>,
        before: &LockRecord,
        after: &LockRecord,
    ) {
        let who = c.host;
        let Some(me) = notes.hosts.get(&who).map(|h| h.me) else {
            panic!("check 2: {who} swaps the lock at {} without a slot", before.address);
        };
        if let Err(what) = self.judge_swap(notes, me, before, after) {
            panic!(
                "check 2: {who} ({me}) swaps the {} lock at {}: {what}\n  before {before:?}\n  after  {after:?}",
                before.kind.name(),
                before.address
            );
        }
        match before.mode {
            LockMode::Exclusive { owner, .. } if owner != me && self.recovers(me, owner) => {
                notes.pinned.insert(before.address, (me, after.nonce));
            }
            _ => drop(notes.pinned.remove(&before.address)),
        }
        self.note_shares(notes, me, before, after);
    }

    /// Whose shares are these? A life's own swap makes its bit a share of its own, and so does a grant by name. Never
    /// forgotten: a power cut can bring a bit back.
    fn note_shares(&self, notes: &mut Notes, me: Owner, before: &LockRecord, after: &LockRecord) {
        let shares = |slot: Slot| after.mode == LockMode::Shared && after.sharers.contains(slot);
        let granted = after.next.filter(|next| !before.sharers.contains(next.slot));
        for owner in granted.into_iter().chain([me]).filter(|owner| shares(owner.slot)) {
            notes.shares.insert((after.address, owner.slot), owner.incarnation);
        }
    }

    /// Nobody relies on this bit: the life that it was of is settled, though the slot's next one may have begun since
    /// the swap was issued. That one has no share before a swap of its own, which would have met this one.
    fn is_void_share(&self, notes: &Notes, lock: BlockNo, slot: Slot) -> bool {
        match notes.shares.get(&(lock, slot)) {
            Some(life) => self.slot_on_lun(slot).is_some_and(|r| r.settled(*life)),
            None => self.is_empty_slot(slot),
        }
    }

    fn judge_swap(
        &self,
        notes: &Notes,
        me: Owner,
        before: &LockRecord,
        after: &LockRecord,
    ) -> Result<(), &'static str> {
        let rule = |holds: bool, text| if holds { Ok(()) } else { Err(text) };
        rule(after.kind == before.kind, "it becomes another kind")?;
        rule(after.swap_counter == before.swap_counter + 1, "the swap counter does not rise by one")?;
        rule(after.change_counter >= before.change_counter, "the change counter falls")?;
        let own_bit = |a: SlotSet, b: SlotSet| a.without(me.slot) == b.without(me.slot);
        rule(own_bit(before.openers, after.openers), "another host's opener bit changes")?;
        if let LockMode::Exclusive { owner, tenure } = after.mode {
            let same = before.mode == LockMode::Exclusive { owner, tenure };
            let fresh = tenure == Tenure(after.swap_counter);
            rule(same || fresh, "the tenure is not the swap counter of the grant")?;
            rule(after.sharers.is_empty(), "exclusive with sharers")?;
        }
        match before.mode {
            LockMode::Exclusive { owner, .. } if owner == me => self.by_owner(me, after),
            LockMode::Exclusive { owner, .. } if self.recovers(me, owner) => {
                let same =
                    LockRecord { swap_counter: after.swap_counter, nonce: after.nonce, ..before.clone() };
                rule(*after == same, "a recoverer changes more of a lock than its nonce")
            }
            LockMode::Exclusive { owner, .. } => {
                rule(
                    self.is_settled(owner),
                    "another host's exclusive lock is swapped, and its owner is not settled",
                )?;
                rule(
                    after.change_counter > before.change_counter,
                    "a tenure whose end was not seen leaves the change counter alone",
                )?;
                self.by_taker(me, after)
            }
            LockMode::Free => self.by_taker(me, after),
            LockMode::Shared => self.by_sharer(notes, me, before, after),
        }
    }

    /// From a lock that holds nobody: only to oneself.
    fn by_taker(&self, me: Owner, after: &LockRecord) -> Result<(), &'static str> {
        match after.mode {
            LockMode::Exclusive { owner, .. } if owner == me => Ok(()),
            LockMode::Exclusive { .. } => Err("a lock that the host does not hold is given away"),
            LockMode::Shared if after.sharers == SlotSet::of(me.slot) => Ok(()),
            LockMode::Shared => Err("shares for others appear"),
            LockMode::Free => Ok(()),
        }
    }

    fn by_owner(&self, me: Owner, after: &LockRecord) -> Result<(), &'static str> {
        match after.mode {
            LockMode::Exclusive { owner, .. } if owner == me => Ok(()),
            LockMode::Exclusive { owner, .. } if self.ever_lived(owner) => Ok(()),
            LockMode::Exclusive { .. } => Err("given to a life that never was"),
            LockMode::Shared => {
                let granted = after.next.map(|n| n.slot);
                let strangers = after.sharers.without(me.slot);
                let strangers = granted.map_or(strangers, |slot| strangers.without(slot));
                if strangers.is_empty() { Ok(()) } else { Err("shares for hosts that were not granted one") }
            }
            LockMode::Free => Ok(()),
        }
    }

    fn by_sharer(
        &self,
        notes: &Notes,
        me: Owner,
        before: &LockRecord,
        after: &LockRecord,
    ) -> Result<(), &'static str> {
        let is_void = |slot| self.is_void_share(notes, before.address, slot);
        let others = before.sharers.without(me.slot);
        match after.mode {
            LockMode::Exclusive { owner, .. } if owner == me => match others.iter().all(&is_void) {
                true => Ok(()),
                false => Err("taken exclusively while others share it"),
            },
            LockMode::Exclusive { owner, .. } => {
                let rest = others.without(owner.slot);
                let theirs = notes.shares.get(&(before.address, owner.slot));
                if others.contains(owner.slot)
                    && theirs.is_some_and(|life| *life != owner.incarnation)
                    && !is_void(owner.slot)
                {
                    return Err("given away to an earlier life of a slot whose present one shares it");
                }
                match before.sharers.contains(me.slot) && rest.iter().all(&is_void) {
                    true => Ok(()),
                    false => Err("given away exclusively while others share it, or by one who does not"),
                }
            }
            LockMode::Shared if after.sharers.without(me.slot) == others => Ok(()),
            LockMode::Shared => Err("another host's share bit changes"),
            LockMode::Free if others.iter().all(is_void) => Ok(()),
            LockMode::Free => Err("made free while others share it"),
        }
    }

    /// Is this host the one recoverer of that life: marked in its slot, or the slot's next life?
    pub(super) fn recovers(&self, me: Owner, owner: Owner) -> bool {
        let Some(record) = self.slot_on_lun(owner.slot) else { return false };
        let marked = record.state == SlotState::Recovering && record.recoverer == Some(me);
        let next = owner.slot == me.slot && owner.incarnation < me.incarnation;
        (marked || next) && !record.settled(owner.incarnation)
    }

    fn is_settled(&self, owner: Owner) -> bool {
        self.slot_on_lun(owner.slot).is_some_and(|r| r.settled(owner.incarnation))
    }

    fn ever_lived(&self, owner: Owner) -> bool {
        self.slot_on_lun(owner.slot).is_some_and(|r| r.incarnation >= owner.incarnation)
    }

    /// Nobody who could share lives there.
    fn is_empty_slot(&self, slot: Slot) -> bool {
        let record = self.slot_on_lun(slot);
        record.is_some_and(|r| matches!(r.state, SlotState::Free | SlotState::Left | SlotState::Recovered))
    }
}
