//! How a host comes to hold the lock: what it may do by the image it sees, and the images it writes.

use super::protocol::{Fate, Protocol};
use super::rules::Rule;
use super::state::*;

/// What a host with an unserved want can do, by the lock block.
pub enum Plan {
    FindGrant,
    Swap(Record),
    FindGone,
    /// Wait for these to yield.
    Ring(Slots),
}

impl Protocol {
    /// Who waits, lives and asks among those the image names; the first in the queue first.
    pub fn queue(&self, s: &System, image: &Record) -> Vec<(u8, Request)> {
        let next = image.next.filter(|next| s.lun.lives(*next)).map_or(0, |next| bit(next.slot));
        let older = |request: &Request| {
            request.age < image.swap_counter || !self.has(Rule::ImageKnowsOlderRequestsOnly)
        };
        let mut queue: Vec<_> = slots_in(image.waiters | next)
            .filter_map(|slot| Some((slot, s.lun.asks(slot).filter(older)?)))
            .collect();
        self.sort_by_turn(image, &mut queue);
        queue
    }

    pub fn plan(&self, s: &System, h: usize, me: Name, mode: Mode) -> Plan {
        let lock = s.lun.lock;
        let host = &s.hosts[h];
        let queue = if self.has(Rule::NobodyJumpsTheQueue) { self.queue(s, &lock) } else { Vec::new() };
        let our_turn = queue.first().is_none_or(|(slot, _)| *slot == me.slot);
        let exclusive_queued =
            queue.iter().find(|(_, request)| request.mode == Mode::Exclusive).map(|(slot, _)| *slot);
        match lock.mode {
            Mode::Free if our_turn => Plan::Swap(self.take(&lock, me, mode)),
            Mode::Free => Plan::Ring(0),
            Mode::Exclusive => {
                let owner = lock.owner.expect("an exclusive lock has an owner");
                if owner == me {
                    if !self.is_own_old(host, lock.tenure) {
                        Plan::FindGrant
                    } else if our_turn {
                        Plan::Swap(self.adopt(&lock, me))
                    } else {
                        Plan::Ring(0)
                    }
                } else if !s.lun.lives(owner) {
                    if our_turn { Plan::FindGone } else { Plan::Ring(0) }
                } else if !self.has(Rule::OnlyOwnerSwapsExclusive) {
                    Plan::Swap(self.take(&lock, me, mode))
                } else {
                    let carried = lock.waiters & bit(me.slot) != 0 && !self.has(Rule::CarriedWaiterRingsToo);
                    Plan::Ring(if carried { 0 } else { bit(owner.slot) })
                }
            }
            Mode::Shared if mode == Mode::Shared => {
                let bit_set = lock.sharers & bit(me.slot) != 0;
                let granted = lock.next == Some(me)
                    && (!self.has(Rule::ShareGrantBelongsToThisWait)
                        || host.since.is_some_and(|since| lock.swap_counter > since));
                if bit_set && (granted || !self.has(Rule::ShareSwapsEvenIfBitSet)) {
                    Plan::FindGrant
                } else if exclusive_queued.is_none_or(|slot| slot == me.slot) {
                    Plan::Swap(self.take(&lock, me, mode))
                } else {
                    Plan::Ring(0)
                }
            }
            Mode::Shared => {
                let others = lock.sharers & !bit(me.slot);
                let living = slots_in(others)
                    .filter(|slot| s.lun.slots[*slot as usize].living)
                    .fold(0, |set, slot| set | bit(slot));
                if living != 0 {
                    Plan::Ring(living)
                } else if exclusive_queued.is_some_and(|slot| slot != me.slot) {
                    Plan::Ring(0)
                } else if others != 0 {
                    Plan::FindGone
                } else {
                    Plan::Swap(self.take(&lock, me, mode))
                }
            }
        }
    }

    pub fn is_own_old(&self, host: &Host, tenure: u8) -> bool {
        if self.has(Rule::OldTenuresStayOld) { tenure <= host.ended } else { tenure == host.ended }
    }

    /// The image in which `me` holds the lock. Whoever else held it shared or exclusively is gone from it, except
    /// that a new sharer joins the others.
    pub fn take(&self, from: &Record, me: Name, mode: Mode) -> Record {
        let mut new = *from;
        new.mode = mode;
        new.swap_counter += 1;
        new.waiters &= !bit(me.slot);
        if new.next == Some(me) {
            new.next = None;
        }
        if mode == Mode::Exclusive {
            new.owner = Some(me);
            new.tenure = new.swap_counter;
            new.sharers = 0;
        } else {
            new.owner = None;
            new.tenure = 0;
            new.sharers |= bit(me.slot);
        }
        new
    }

    pub fn adopt(&self, from: &Record, me: Name) -> Record {
        let mut new = self.take(from, me, Mode::Exclusive);
        if self.has(Rule::RaiseCounterOnOwnOldTenure) {
            new.change_counter += 1;
        }
        new
    }

    pub fn take_over(&self, s: &mut System, h: usize, fate: Fate) {
        let Step::TakeOver { base, gone } = s.hosts[h].step else {
            return;
        };
        s.hosts[h].step = Step::Idle;
        let me = s.hosts[h].name.expect("mounted");
        let lock = s.lun.lock;
        let mode = self.want(s, h).expect("wants");
        if base.is_some_and(|base| base != lock) {
            return; // Miscompare.
        }
        let takable = match lock.mode {
            Mode::Free => false,
            Mode::Exclusive => lock.owner.is_some_and(|owner| !s.lun.lives(owner)),
            Mode::Shared => mode == Mode::Exclusive && lock.sharers & !bit(me.slot) & !gone == 0,
        };
        if base.is_none() && !takable {
            return; // Only without the rule: the image is newer than the slots.
        }
        let mut new = self.take(&lock, me, mode);
        if lock.mode == Mode::Exclusive && self.has(Rule::RaiseCounterOnTakeOver) {
            new.change_counter += 1;
        }
        self.issue(s, h, new, 0, Purpose::Acquire, fate);
    }
}
