//! How the lock leaves a host that is asked for it.

use super::acquire::Plan;
use super::protocol::{Demand, Fate, Protocol};
use super::rules::Rule;
use super::state::*;

/// What a host that was asked for the lock does, by the lock block and the requests.
pub enum Answer {
    /// Its own want comes first.
    NotNow,
    Nothing,
    PassOn {
        new: Record,
        keep: bool,
        noted: Slots,
    },
}

impl Protocol {
    /// The slots whose requests a host has reason to read now.
    pub fn demand_on(&self, s: &System, h: usize) -> Option<Slots> {
        let host = &s.hosts[h];
        let lock = s.lun.lock;
        match self.demand {
            Demand::Doorbell if host.to_read == 0 || host.bell_unsure => None,
            Demand::Doorbell => {
                Some(host.to_read | lock.waiters | lock.next.map_or(0, |next| bit(next.slot)))
            }
            Demand::Net => Some(Slots::MAX),
        }
    }

    /// The lock first, then the requests.
    pub fn read_requests(&self, s: &System, me: Name, slots: Slots) -> Demands {
        let mut requests = [None; MAX_HOSTS];
        for slot in slots_in(slots & !bit(me.slot)) {
            requests[slot as usize] = s.lun.asks(slot);
        }
        Demands { base: s.lun.lock, requests }
    }

    /// `None`: there is nothing to read.
    pub fn answer(&self, s: &System, h: usize, me: Name) -> Option<Answer> {
        let host = &s.hosts[h];
        let lock = s.lun.lock;
        let demands = match host.demands {
            Some(demands) => demands,
            None => self.read_requests(s, me, self.demand_on(s, h)?),
        };
        if demands.base != lock {
            return Some(Answer::NotNow); // Miscompare: another sharer was faster.
        }
        let has_read = self.demand == Demand::Doorbell || host.demands.is_some();
        let nothing = has_read.then_some(Answer::Nothing);
        if host.held == Held::Nothing && !self.has(Rule::RungHolderReadsTheBlock) {
            return nothing;
        }
        let named = lock.names(me);
        if named == Held::Nothing {
            return nothing;
        }
        let served = !host.waiting && s.lun.asks(me.slot).is_some();
        if served && self.has(Rule::WithdrawBeforePassingOn) {
            return Some(Answer::NotNow);
        }
        // A thread of ours waits and the lock is there for it: it goes first, else nobody would ever get on.
        if host.waiting
            && let Some(mode) = self.want(s, h)
            && (host.held.suffices_for(mode) || matches!(self.plan(s, h, me, mode), Plan::FindGrant))
        {
            return Some(Answer::NotNow);
        }

        let mut askers: Vec<(u8, Request)> =
            slots_in(Slots::MAX).filter_map(|slot| Some((slot, demands.requests[slot as usize]?))).collect();
        self.sort_by_turn(&lock, &mut askers);
        let mut new = lock;
        new.swap_counter += 1;
        if let Held::Exclusive(tenure) = named {
            let Some(first) = askers.first() else {
                return nothing;
            };
            let shared = askers.iter().all(|(_, request)| request.mode == Mode::Shared);
            let keep = matches!(host.held, Held::Exclusive(_)) && shared;
            let changed = host.changed && self.has(Rule::RaiseCounterOnChange);
            let own_old = host.held == Held::Nothing
                && self.is_own_old(host, tenure)
                && self.has(Rule::RaiseCounterOnOwnOldTenure);
            if changed || own_old {
                new.change_counter += 1;
            }
            self.hand_over(&mut new, first, &askers[1..]);
            if keep {
                new.sharers |= bit(me.slot);
            }
            return Some(Answer::PassOn { new, keep, noted: noted(s, &askers) });
        }

        // A share: only an exclusive waiter needs us to yield, a shared one joins.
        if askers.iter().all(|(_, request)| request.mode == Mode::Shared) {
            return nothing;
        }
        if host.waiting && host.held == Held::Shared && !self.has(Rule::SharerAlwaysYields) {
            return Some(Answer::NotNow);
        }
        // We may be the first in the queue ourselves. Then we yield the share all the same and stay the first.
        if host.waiting
            && let Some(ours) = s.lun.asks(me.slot)
        {
            askers.push((me.slot, ours));
            self.sort_by_turn(&lock, &mut askers);
        }
        let may_be_us = self.has(Rule::YieldingUpgraderKeepsItsPlace);
        let first = askers
            .iter()
            .position(|(slot, request)| request.mode == Mode::Exclusive && (may_be_us || *slot != me.slot))?;
        let noted = noted(s, &askers);
        let first = askers.remove(first);
        new.sharers &= !bit(me.slot);
        if new.sharers == 0 && first.0 == me.slot {
            return Some(Answer::NotNow); // Nobody else is left: we upgrade now.
        }
        if new.sharers & !bit(first.0) == 0 {
            self.hand_over(&mut new, &first, &askers);
        } else {
            new.next = Some(name(&first));
            if self.has(Rule::HandOverCarriesWaiters) {
                new.waiters = slots_of(&askers);
            }
        }
        Some(Answer::PassOn { new, keep: false, noted })
    }

    /// Whom `next` names comes first, unless the request is younger than the image; then the oldest.
    pub fn sort_by_turn(&self, image: &Record, askers: &mut [(u8, Request)]) {
        let is_next = |asker: &(u8, Request)| {
            let known = asker.1.age < image.swap_counter || !self.has(Rule::ImageKnowsOlderRequestsOnly);
            image.next == Some(name(asker)) && known
        };
        askers.sort_by_key(|asker| (!is_next(asker), asker.1.age, asker.0));
    }

    /// Writes the waiter in; the image carries the others.
    fn hand_over(&self, new: &mut Record, to: &(u8, Request), others: &[(u8, Request)]) {
        new.mode = to.1.mode;
        new.waiters = 0;
        new.next = None;
        if self.has(Rule::HandOverCarriesWaiters) {
            new.waiters = slots_of(others);
            new.next = others.iter().min_by_key(|(slot, request)| (request.age, *slot)).map(name);
        }
        if to.1.mode == Mode::Exclusive {
            new.owner = Some(name(to));
            new.tenure = new.swap_counter;
            new.sharers = 0;
        } else {
            new.owner = None;
            new.tenure = 0;
            new.sharers = bit(to.0);
            new.next = Some(name(to));
        }
    }

    /// Answers what was read: passes the lock on, or finds no reason to, or puts it off.
    pub fn pass_on(&self, s: &mut System, h: usize, fate: Fate) {
        let me = s.hosts[h].name.expect("mounted");
        let answer = self.answer(s, h, me);
        let read = s.hosts[h].demands.take().map_or(0, |demands| {
            let asking = |slot: &u8| demands.requests[*slot as usize].is_some();
            slots_in(Slots::MAX).filter(asking).fold(0, |set, slot| set | bit(slot))
        });
        let (new, keep, noted) = match answer {
            Some(Answer::PassOn { new, keep, noted }) => (new, keep, noted),
            Some(Answer::NotNow) => return s.hosts[h].to_read |= self.rung(read),
            _ if self.reads_apart => return,
            _ => return s.hosts[h].to_read = 0,
        };
        if fate != Fate::Answered {
            s.hosts[h].to_read |= self.rung(read);
        }
        self.release(s, h, &new);
        let purpose = Purpose::Release { was: s.hosts[h].held, keep };
        if let Held::Exclusive(tenure) = s.lun.lock.names(me) {
            s.hosts[h].ended = s.hosts[h].ended.max(tenure);
        }
        if self.has(Rule::ReleaseEndsTenureAtIssue) {
            s.hosts[h].held = Held::Nothing;
        }
        self.issue(s, h, new, noted, purpose, fate);
    }

    /// With the net alone nobody needs to remember who asked.
    fn rung(&self, slots: Slots) -> Slots {
        if self.demand == Demand::Doorbell { slots } else { 0 }
    }

    /// What must be true before the lock leaves.
    pub fn release(&self, s: &mut System, h: usize, new: &Record) {
        let host = &mut s.hosts[h];
        if host.changed && self.has(Rule::WriteInPlaceBeforeRelease) {
            s.lun.block = host.cache.expect("what we changed is in the cache");
        }
        if matches!(host.held, Held::Exclusive(_)) {
            host.cache_counter = new.change_counter;
        }
        host.changed = false;
    }
}

fn name(asker: &(u8, Request)) -> Name {
    Name { slot: asker.0, incarnation: asker.1.incarnation }
}

fn slots_of(askers: &[(u8, Request)]) -> Slots {
    askers.iter().fold(0, |set, (slot, _)| set | bit(*slot))
}

/// For the observer of fairness: the waits that this image knows, as far as they still go on.
fn noted(s: &System, askers: &[(u8, Request)]) -> Slots {
    let waits = askers.iter().filter(|(slot, request)| s.lun.asks(*slot) == Some(*request));
    waits.fold(0, |set, (slot, _)| set | bit(*slot))
}
