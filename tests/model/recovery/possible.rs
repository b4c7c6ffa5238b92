//! What can happen next: what hosts do, what time does, and what nobody may count on.

use super::rules::Rule;
use super::state::*;
use super::{Action, Deed, End, Recovery, Want};

impl Action {
    /// Does this come without an accident, so that others may wait for it?
    pub fn is_work(&self) -> bool {
        match self {
            Action::Do(_, deed, end) => *deed != Deed::Claim && *end == End::Answered,
            Action::DeadTimePasses(_) => true,
            _ => false,
        }
    }
}

impl Recovery {
    pub fn want(&self, s: &System, h: usize) -> Option<Want> {
        self.wants[h].get(s.hosts[h].wants_done as usize).copied()
    }

    pub fn possible(&self, s: &System, out: &mut Vec<Action>) {
        for h in 0..self.wants.len() {
            for deed in self.deeds(s, h) {
                if s.stops_left > 0 && self.command(s, h, deed).is_some() {
                    let late = self.fails.iter().filter(|how| deed != Deed::Claim || **how == How::Crash);
                    out.extend(late.map(|how| Action::Do(h, deed, End::Late(*how))));
                }
                out.push(Action::Do(h, deed, End::Answered));
            }
            let host = &s.hosts[h];
            let runs = matches!(host.life, Life::Running | Life::Withdrawing);
            if runs && s.stops_left > 0 {
                let how = self.fails.iter().filter(|_| host.life == Life::Running);
                out.extend(how.map(|how| Action::Stop(h, *how)));
            }
            if host.life == Life::Frozen {
                out.push(Action::Wake(h));
            }
        }
        for slot in 0..self.wants.len() as u8 {
            if self.dead_time_may_pass(s, slot) {
                out.push(Action::DeadTimePasses(slot));
            }
        }
        for at in 0..s.lun.late.len() {
            out.push(Action::Execute(at));
            out.push(Action::Vanish(at));
        }
        if let Some(durable) = &s.lun.durable {
            let now = &s.lun.now;
            if *durable != *now {
                out.push(Action::PowerLoss);
            }
            out.extend(
                (0..MAX_LOCKS).filter(|l| durable.locks[*l] != now.locks[*l]).map(Action::DestageLock),
            );
            out.extend(
                (0..MAX_LOCKS).filter(|l| durable.blocks[*l] != now.blocks[*l]).map(Action::DestageBlock),
            );
            out.extend(
                (0..MAX_HOSTS).filter(|h| durable.slots[*h] != now.slots[*h]).map(Action::DestageSlot),
            );
            out.extend(
                (0..MAX_HOSTS)
                    .filter(|h| durable.journals[*h] != now.journals[*h])
                    .map(Action::DestageJournal),
            );
        }
    }

    fn dead_time_may_pass(&self, s: &System, slot: u8) -> bool {
        let record = s.lun.now.slots[slot as usize];
        let resident = s.lun.now.resident(slot);
        let runs = s.hosts.iter().any(|host| host.me == resident && host.life == Life::Running);
        record.state == SlotState::Live
            && !s.silent[slot as usize]
            && (!runs || !self.has(Rule::LeaseEndsBeforeTheVerdict))
    }

    /// Does this life beat, as the others see it?
    pub fn living(&self, s: &System, name: Name) -> bool {
        let record = s.lun.now.slots[name.slot as usize];
        let same = record.incarnation == name.incarnation || !self.has(Rule::MarkNamesTheIncarnation);
        same && record.state == SlotState::Live && !s.silent[name.slot as usize]
    }

    /// May `h` mark the slot and recover it?
    fn is_dead(&self, s: &System, h: usize, slot: u8) -> bool {
        let record = s.lun.now.slots[slot as usize];
        match record.state {
            SlotState::Live => s.silent[slot as usize],
            SlotState::Withdrawn => true,
            SlotState::Recovered => false,
            SlotState::Recovering => {
                let by = record.recoverer.expect("a mark names the recoverer");
                if by == s.hosts[h].me && self.has(Rule::MarkNamesTheIncarnation) {
                    return true;
                }
                if !self.has(Rule::LivingRecovererKeepsItsMark) {
                    return true;
                }
                let settled =
                    !self.has(Rule::RecovererIsSettledBeforeItsMarkIsTaken) || s.lun.now.settled(by);
                !self.living(s, by) && settled
            }
        }
    }

    fn may_claim(&self, s: &System, h: usize) -> bool {
        let me = s.hosts[h].me;
        let record = s.lun.now.slots[me.slot as usize];
        let its_io_is_gone = s.lun.late.iter().all(|late| late.by != me);
        match record.state {
            SlotState::Live | SlotState::Withdrawn => {
                record.incarnation == me.incarnation
                    && (its_io_is_gone || !self.has(Rule::NextLifeOnlyWhenTheLastIsGone))
            }
            SlotState::Recovered => true,
            SlotState::Recovering => false,
        }
    }

    /// What a host can do by itself.
    pub fn deeds(&self, s: &System, h: usize) -> Vec<Deed> {
        let host = &s.hosts[h];
        let mut deeds = Vec::new();
        match host.life {
            Life::Running => {}
            Life::Withdrawing => return vec![Deed::Farewell],
            Life::Frozen => return deeds,
            Life::Gone => {
                if s.lives_left > 0 && self.may_claim(s, h) {
                    deeds.push(Deed::Claim);
                }
                return deeds;
            }
        }
        let flushes =
            host.locks.iter().any(|l| l.seen.is_some() || matches!(l.way, Way::Logged | Way::Written));
        let own = host.replay.as_ref().is_some_and(|replay| replay.slot == host.me.slot);
        let stage = host.replay.as_ref().map(|replay| replay.stage);
        let replay_flushes = stage.is_some_and(|stage| stage.is_flush());
        if flushes || replay_flushes || host.begun == Begun::Written {
            deeds.push(Deed::Flush);
        }
        match stage {
            Some(Stage::Fence) => deeds.push(Deed::Fence),
            Some(Stage::Scan) => deeds.push(Deed::Scan),
            Some(Stage::Pin) => deeds.push(Deed::Pin),
            Some(Stage::PutInPlace) => deeds.push(Deed::PutInPlace),
            Some(Stage::Publish) => deeds.push(Deed::Publish),
            Some(_) => {}
            None if host.begun == Begun::No => deeds.push(Deed::BeginJournal),
            None if host.begun == Begun::Written => {}
            None => {
                let others = (0..self.wants.len() as u8).filter(|slot| *slot != host.me.slot);
                deeds.extend(others.filter(|slot| self.is_dead(s, h, *slot)).map(Deed::Mark));
            }
        }
        if own || host.begun != Begun::Yes {
            return deeds;
        }
        self.ordinary_deeds(s, h, &mut deeds);
        deeds
    }

    fn ordinary_deeds(&self, s: &System, h: usize, deeds: &mut Vec<Deed>) {
        let host = &s.hosts[h];
        if host.locks.iter().any(|l| l.way == Way::Changed) {
            deeds.push(Deed::Commit);
        }
        let needed = self.want(s, h).map_or(0, |want| want.locks);
        for lock in 0..MAX_LOCKS {
            let holding = &host.locks[lock];
            if holding.way == Way::Committed {
                deeds.push(Deed::Checkpoint(lock));
            }
            // The lock block alone says who holds.
            let named = s.lun.now.locks[lock].owner == Some(host.me) && holding.seen.is_none();
            // What was granted for a waiting thread is used first, but out of order nobody holds on to anything.
            let lower = (1 << lock) - 1;
            let in_order = locks_in(needed & lower).all(|lock| host.locks[lock].held != Held::Nothing);
            if !named
                || needed & 1 << lock != 0 && in_order && (holding.unused || holding.held == Held::Nothing)
            {
                continue;
            }
            let in_place = holding.way == Way::InPlace
                || holding.way == Way::Committed && !self.has(Rule::WriteInPlaceBeforeRelease);
            if in_place {
                let asks = (0..self.wants.len()).filter(|to| *to != h && self.asks(s, *to, lock));
                deeds.extend(asks.map(|to| Deed::HandOver(lock, to)));
            }
        }
        if needed == 0 {
            return;
        }
        // In the order of the locks.
        match locks_in(needed).find(|lock| host.locks[*lock].held == Held::Nothing) {
            None => deeds.push(Deed::Use),
            Some(lock) if host.locks[lock].seen.is_some() => {}
            Some(lock) => {
                let image = &s.lun.now.locks[lock];
                let ours = image.owner == Some(host.me);
                if ours && image.tenure > host.locks[lock].ended {
                    deeds.push(Deed::FindGrant(lock));
                } else if self.may_take(s, host, image) {
                    deeds.push(Deed::Take(lock));
                }
            }
        }
    }

    fn may_take(&self, s: &System, host: &Host, image: &Record) -> bool {
        match image.owner {
            None => true,
            // Our own old tenure, come back.
            Some(owner) if owner == host.me => true,
            Some(owner) => {
                let dead = !self.has(Rule::SettledBeforeItIsTaken) && !self.living(s, owner);
                s.lun.now.settled(owner) || dead
            }
        }
    }

    /// Does this host wait for the lock, as far as its request on the disk says? Who stopped a moment ago does, who
    /// has only claimed its slot does not.
    fn asks(&self, s: &System, h: usize, lock: usize) -> bool {
        let host = &s.hosts[h];
        host.begun == Begun::Yes
            && self.living(s, host.me)
            && s.lun.now.resident(host.me.slot) == host.me
            && self.want(s, h).is_some_and(|want| want.locks & 1 << lock != 0)
            && host.locks[lock].held == Held::Nothing
            && host.locks[lock].seen.is_none()
    }

    /// Nothing is owed any more: every life that ended is settled, and whoever lives was served. Where nobody
    /// lives, nobody waits.
    pub fn is_finished(&self, s: &System) -> bool {
        let hosts = 0..self.wants.len();
        let running = |h: usize| s.hosts[h].life == Life::Running;
        if !hosts.clone().any(running) {
            return true;
        }
        hosts.clone().all(|slot| {
            let record = s.lun.now.slots[slot];
            let resident = s.lun.now.resident(slot as u8);
            let lives = hosts.clone().any(|h| s.hosts[h].me == resident && running(h));
            let earlier = record.incarnation - u8::from(lives);
            record.settled(earlier)
        }) && hosts.clone().filter(|h| running(*h)).all(|h| self.want(s, h).is_none())
    }
}

impl Stage {
    pub fn is_flush(self) -> bool {
        matches!(self, Stage::FlushMark | Stage::FlushPins | Stage::FlushPlaced | Stage::FlushPublished)
    }
}
