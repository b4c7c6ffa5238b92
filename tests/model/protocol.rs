//! What a host does, one command to the LUN at a time.
//!
//! Reading the lock and swapping it is one step where the choice hangs on the lock block and on the host alone: a
//! swap against an image that is no longer there changes nothing. Where it hangs on another block too (slots,
//! doorbells), and where an answer is lost, the steps are apart.

use super::acquire::Plan;
use super::pass_on::Answer;
use super::rules::{Rule, Rules};
use super::state::*;

/// How a waiter learns of demand, and a holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Demand {
    /// Doorbells only: no net below the ordering rules.
    Doorbell,
    /// The net only: a holder reads all request blocks now and then.
    Net,
}

/// One bounded system.
#[derive(Clone, Debug)]
pub struct Protocol {
    pub name: &'static str,
    pub rules: Rules,
    pub demand: Demand,
    /// What each host wants, one after the other. Host `h` starts in slot `h`.
    pub wants: Vec<Vec<Mode>>,
    /// Hosts that unmount after their last want, leaving their locks behind.
    pub leaves: Vec<usize>,
    /// Hosts that have no slot at first and claim one that was left.
    pub enters: Vec<usize>,
    pub lost_answers: u8,
    pub lost_bell_answers: u8,
    pub power_losses: u8,
    pub give_ups: u8,
    /// A holder reads the requests in one step and swaps in another.
    pub reads_apart: bool,
    /// More swaps than any run within these bounds needs.
    pub most_swaps: u8,
}

/// What becomes of a swap that is issued.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fate {
    Answered,
    /// It executes at once, the answer is lost.
    AnswerLost,
    /// The answer is lost and it executes later, or never.
    Late,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Swap the lock for our own want.
    Swap(usize, Fate),
    /// Find that the lock block names us.
    FindGrant(usize),
    /// Write our request block.
    Ask(usize),
    /// Ring one holder.
    Ring(usize, Fate),
    /// Read the lock, then the slots of its holders.
    FindGone(usize),
    /// Swap the lock of holders that left.
    TakeOver(usize, Fate),
    /// Serve the want under the lock.
    Use(usize),
    /// Clear our request block.
    Withdraw(usize),
    /// The waiting thread is killed.
    GiveUp(usize),
    ClearBell(usize, Fate),
    /// Read our doorbell after a swap of it with an unknown outcome.
    CheckBell(usize),
    /// Only without a rule: read the requests before the doorbell is cleared.
    Peek(usize),
    /// Read the lock, then the requests.
    ReadRequests(usize),
    /// Read requests and the lock, if not yet done, and pass the lock on if it is ours.
    Yield(usize, Fate),
    Flush(usize),
    /// Read the lock to learn what became of a swap.
    Resolve(usize),
    /// Unmount: the slot is left, locks stay as they are.
    Leave(usize),
    Claim(usize, u8),
    /// A late swap executes.
    Execute(usize),
    /// A late swap never executes.
    Vanish(usize),
    PowerLoss,
    /// The device empties its cache by itself.
    Destage,
    /// Only when no host can do anything: no more accidents come, so nobody may count on one.
    Calm,
}

impl Protocol {
    pub fn has(&self, rule: Rule) -> bool {
        self.rules.has(rule)
    }

    fn volatile(&self) -> bool {
        self.power_losses > 0
    }

    pub fn initial(&self) -> System {
        let hosts = std::array::from_fn(|h| {
            let exists = h < self.wants.len();
            let enters = self.enters.contains(&h);
            Host {
                name: (exists && !enters).then_some(Name { slot: h as u8, incarnation: 1 }),
                left: false,
                wants_done: 0,
                waiting: false,
                since: None,
                rang: None,
                held: Held::Nothing,
                ended: 0,
                cache: None,
                cache_counter: 0,
                changed: false,
                step: Step::Idle,
                to_read: 0,
                demands: None,
                bell_unsure: false,
                remembered_bells: 0,
                peeked: false,
                queued: false,
                behind: 0,
            }
        });
        let slots = std::array::from_fn(|s| {
            let living = s < self.wants.len() && !self.enters.contains(&s);
            Slot { incarnation: living as u8, living }
        });
        System {
            lun: Lun {
                lock: Record::FREE,
                durable: Record::FREE,
                block: 0,
                requests: [None; MAX_HOSTS],
                bells: [Bell { bits: 0, nonce: 0 }; MAX_HOSTS],
                slots,
                late: Vec::new(),
            },
            hosts,
            newest: 0,
            overtaken: false,
            lost_answers_left: self.lost_answers,
            lost_bell_answers_left: self.lost_bell_answers,
            power_losses_left: self.power_losses,
            give_ups_left: self.give_ups,
        }
    }

    pub fn want(&self, s: &System, h: usize) -> Option<Mode> {
        self.wants[h].get(s.hosts[h].wants_done as usize).copied()
    }

    pub fn all_served(&self, s: &System) -> bool {
        (0..self.wants.len())
            .all(|h| self.want(s, h).is_none() && (s.hosts[h].left || !self.leaves.contains(&h)))
    }

    // --- What is possible -------------------------------------------------------------------------------------

    pub fn possible(&self, s: &System, out: &mut Vec<Action>) {
        for h in 0..self.wants.len() {
            match s.hosts[h].name {
                Some(me) => self.possible_for(s, h, me, out),
                None if !s.hosts[h].left => out.extend(
                    (0..MAX_HOSTS as u8)
                        .filter(|slot| s.lun.slots[*slot as usize].incarnation > 0)
                        .filter(|slot| !s.lun.slots[*slot as usize].living)
                        .map(|slot| Action::Claim(h, slot)),
                ),
                None => {}
            }
        }
        let stuck = out.is_empty();
        for at in 0..s.lun.late.len() {
            out.push(Action::Execute(at));
            out.push(Action::Vanish(at));
        }
        if s.power_losses_left > 0 && s.lun.durable != s.lun.lock {
            out.push(Action::PowerLoss);
        }
        if s.lun.durable != s.lun.lock {
            out.push(Action::Destage);
        }
        for h in 0..self.wants.len() {
            if s.hosts[h].waiting && s.give_ups_left > 0 {
                out.push(Action::GiveUp(h));
            }
        }
        if stuck && !out.is_empty() {
            out.push(Action::Calm);
        }
    }

    fn fates(&self, left: u8) -> &'static [Fate] {
        if left > 0 { &[Fate::Answered, Fate::AnswerLost, Fate::Late] } else { &[Fate::Answered] }
    }

    fn possible_for(&self, s: &System, h: usize, me: Name, out: &mut Vec<Action>) {
        let host = &s.hosts[h];
        let requested = s.lun.asks(me.slot).is_some();
        let lock_fates = self.fates(s.lost_answers_left);
        let bell_fates = self.fates(s.lost_bell_answers_left);
        let want = self.want(s, h);

        // The thread that reads the doorbell.
        let bell = s.lun.bells[me.slot as usize];
        if self.has(Rule::ClearBeforeReading) || host.peeked && host.to_read == 0 {
            if bell.bits != 0 {
                out.extend(bell_fates.iter().map(|fate| Action::ClearBell(h, *fate)));
            }
        } else if bell.bits != 0 && !host.peeked {
            out.push(Action::Peek(h));
        }
        if host.bell_unsure && bell.bits == 0 {
            out.push(Action::CheckBell(h));
        }

        if requested && !host.waiting {
            out.push(Action::Withdraw(h));
        }
        match host.step {
            Step::Idle => {}
            Step::Flush { .. } => return out.push(Action::Flush(h)),
            Step::Resolve { .. } => return out.push(Action::Resolve(h)),
            Step::TakeOver { .. } => {
                return out.extend(lock_fates.iter().map(|fate| Action::TakeOver(h, *fate)));
            }
        }

        let answer = self.answer(s, h, me);
        match answer {
            Some(Answer::PassOn { .. } | Answer::Nothing) if self.reads_apart && host.demands.is_none() => {
                out.push(Action::ReadRequests(h));
            }
            Some(Answer::PassOn { .. }) => {
                out.extend(lock_fates.iter().map(|fate| Action::Yield(h, *fate)));
            }
            Some(Answer::Nothing) => out.push(Action::Yield(h, Fate::Answered)),
            Some(Answer::NotNow) if host.demands.is_some() => out.push(Action::Yield(h, Fate::Answered)),
            Some(Answer::NotNow) | None => {}
        }

        let Some(mode) = want else {
            if self.leaves.contains(&h) && !requested && !host.bell_unsure {
                out.push(Action::Leave(h));
            }
            return;
        };
        if requested && !host.waiting {
            return;
        }
        if host.held.suffices_for(mode) {
            return out.push(Action::Use(h));
        }
        match self.plan(s, h, me, mode) {
            Plan::FindGrant => out.push(Action::FindGrant(h)),
            Plan::Swap(_) => out.extend(lock_fates.iter().map(|fate| Action::Swap(h, *fate))),
            Plan::FindGone => out.push(Action::FindGone(h)),
            Plan::Ring(holders) => {
                let unrung = holders & !self.rang(s, h);
                let may_ring = requested || !self.has(Rule::RequestBeforeRing);
                if self.demand == Demand::Doorbell && unrung != 0 && may_ring {
                    out.extend(bell_fates.iter().map(|fate| Action::Ring(h, *fate)));
                } else if !requested {
                    out.push(Action::Ask(h));
                }
            }
        }
    }

    /// Whom this wait need not ring (again).
    pub fn rang(&self, s: &System, h: usize) -> Slots {
        match s.hosts[h].rang {
            Some((_, slots)) if !self.has(Rule::NewHolderIsRung) => slots,
            Some((counter, slots)) if counter == s.lun.lock.swap_counter => slots,
            _ => 0,
        }
    }

    // --- Do ---------------------------------------------------------------------------------------------------

    pub fn apply(&self, s: &mut System, action: Action) {
        match action {
            Action::Swap(h, fate) => {
                let me = s.hosts[h].name.expect("mounted");
                let mode = self.want(s, h).expect("wants");
                if let Plan::Swap(new) = self.plan(s, h, me, mode) {
                    self.begin_wait(s, h);
                    self.issue(s, h, new, 0, Purpose::Acquire, fate);
                }
            }
            Action::FindGrant(h) => {
                self.begin_wait(s, h);
                let image = s.lun.lock;
                self.granted(s, h, image);
            }
            Action::Ask(h) => {
                self.begin_wait(s, h);
                let me = s.hosts[h].name.expect("mounted");
                s.lun.requests[me.slot as usize] = Some(Request {
                    incarnation: me.incarnation,
                    mode: self.want(s, h).expect("wants"),
                    age: s.lun.lock.swap_counter,
                });
                if self.demand == Demand::Net {
                    s.hosts[h].since = Some(s.lun.lock.swap_counter);
                }
            }
            Action::Ring(h, fate) => self.ring(s, h, fate),
            Action::FindGone(h) => {
                self.begin_wait(s, h);
                let gone = slots_in(Slots::MAX)
                    .filter(|slot| !s.lun.slots[*slot as usize].living)
                    .fold(0, |set, slot| set | bit(slot));
                let base = self.has(Rule::ImageBeforeSlot).then_some(s.lun.lock);
                s.hosts[h].step = Step::TakeOver { base, gone };
            }
            Action::TakeOver(h, fate) => self.take_over(s, h, fate),
            Action::Use(h) => {
                let mode = self.want(s, h).expect("wants");
                let host = &mut s.hosts[h];
                host.cache.get_or_insert(s.lun.block);
                if mode == Mode::Exclusive {
                    s.newest += 1;
                    host.cache = Some(s.newest);
                    host.changed = true;
                }
                self.end_wait(s, h);
            }
            Action::Withdraw(h) => {
                let me = s.hosts[h].name.expect("mounted");
                s.lun.requests[me.slot as usize] = None;
            }
            Action::GiveUp(h) => {
                s.give_ups_left -= 1;
                if matches!(s.hosts[h].step, Step::TakeOver { .. }) {
                    s.hosts[h].step = Step::Idle;
                }
                self.end_wait(s, h);
            }
            Action::ClearBell(h, fate) => self.clear_bell(s, h, fate),
            Action::CheckBell(h) => s.hosts[h].bell_unsure = false,
            Action::Peek(h) => {
                let slot = s.hosts[h].name.expect("mounted").slot;
                s.hosts[h].to_read = s.lun.bells[slot as usize].bits;
                s.hosts[h].peeked = true;
            }
            Action::ReadRequests(h) => {
                let me = s.hosts[h].name.expect("mounted");
                let slots = self.demand_on(s, h).unwrap_or(0);
                s.hosts[h].demands = Some(self.read_requests(s, me, slots));
                s.hosts[h].to_read = 0;
            }
            Action::Yield(h, fate) => self.pass_on(s, h, fate),
            Action::Flush(h) => {
                s.lun.durable = s.lun.lock;
                if let Step::Flush { image, reset } = s.hosts[h].step {
                    s.hosts[h].step = Step::Idle;
                    if !reset || !self.has(Rule::FlushProvesOneResetCount) {
                        self.act(s, h, image);
                    }
                }
            }
            Action::Resolve(h) => self.resolve(s, h),
            Action::Leave(h) => {
                let lock = s.lun.lock;
                self.release(s, h, &lock);
                let host = &mut s.hosts[h];
                let me = host.name.take().expect("mounted");
                s.lun.slots[me.slot as usize].living = false;
                host.left = true;
                host.held = Held::Nothing;
                host.cache = None;
                host.cache_counter = 0;
                host.ended = 0;
                host.to_read = 0;
                host.demands = None;
            }
            Action::Claim(h, slot) => {
                s.lun.slots[slot as usize].living = true;
                s.lun.slots[slot as usize].incarnation += 1;
                s.hosts[h].name = Some(s.lun.resident(slot));
            }
            Action::Execute(at) => match s.lun.late.remove(at) {
                Late::Lock { base, new, noted } => {
                    if s.lun.lock == base {
                        self.land(s, new, noted);
                    }
                }
                Late::Bell { slot, base, new } => {
                    if s.lun.bells[slot as usize] == base {
                        s.lun.bells[slot as usize] = new;
                    }
                }
            },
            Action::Vanish(at) => drop(s.lun.late.remove(at)),
            Action::PowerLoss => {
                s.power_losses_left -= 1;
                s.lun.lock = s.lun.durable;
                for host in &mut s.hosts {
                    if let Step::Flush { reset, .. } = &mut host.step {
                        *reset = true;
                    }
                }
            }
            Action::Destage => s.lun.durable = s.lun.lock,
            Action::Calm => {
                s.lun.late.clear();
                s.lun.durable = s.lun.lock;
                s.lost_answers_left = 0;
                s.lost_bell_answers_left = 0;
                s.power_losses_left = 0;
                s.give_ups_left = 0;
            }
        }
        s.normalize();
    }

    pub fn begin_wait(&self, s: &mut System, h: usize) {
        if s.hosts[h].waiting {
            return;
        }
        s.hosts[h].waiting = true;
        for host in s.hosts.iter_mut().filter(|host| host.waiting && host.queued) {
            host.behind |= bit(h as u8);
        }
    }

    fn end_wait(&self, s: &mut System, h: usize) {
        let host = &mut s.hosts[h];
        host.wants_done += 1;
        host.waiting = false;
        host.since = None;
        host.rang = None;
        host.queued = false;
        host.behind = 0;
        let over = host.name.map_or(0, |me| bit(me.slot));
        for late in &mut s.lun.late {
            if let Late::Lock { noted, .. } = late {
                *noted &= !over;
            }
        }
    }

    /// Issues a swap from the image that is on the LUN now.
    pub fn issue(&self, s: &mut System, h: usize, new: Record, noted: Slots, purpose: Purpose, fate: Fate) {
        let base = s.lun.lock;
        let nonce = if self.has(Rule::NonceIsUnique) { s.fresh_nonce() } else { 0 };
        let new = Record { nonce, ..new };
        if fate == Fate::Late {
            s.lun.late.push(Late::Lock { base, new, noted });
        } else {
            self.land(s, new, noted);
        }
        if fate == Fate::Answered {
            self.done(s, h, new, purpose);
        } else {
            s.lost_answers_left -= 1;
            s.hosts[h].step = Step::Resolve { base, new, purpose };
        }
    }

    /// The swap executes on the LUN.
    fn land(&self, s: &mut System, new: Record, noted: Slots) {
        let old = s.lun.lock;
        s.lun.lock = new;
        if !self.volatile() {
            s.lun.durable = new;
        }

        // The observer of fairness.
        let by_slot = |slots: Slots, host: &Host| host.name.is_some_and(|name| slots & bit(name.slot) != 0);
        let granted = |host: &Host| match new.owner {
            Some(owner) => host.name == Some(owner) && (new.tenure != old.tenure || new.owner != old.owner),
            None => by_slot(new.sharers & !old.sharers, host),
        };
        let granted_hosts =
            (0..MAX_HOSTS).filter(|h| granted(&s.hosts[*h])).fold(0, |set, h| set | bit(h as u8));
        for h in 0..self.wants.len() {
            let Some(mode) = self.want(s, h) else {
                continue;
            };
            let host = &mut s.hosts[h];
            let in_conflict = mode == Mode::Exclusive || new.mode == Mode::Exclusive;
            let overtakers = host.behind & granted_hosts & !bit(h as u8);
            if host.waiting && host.queued && in_conflict && overtakers != 0 {
                s.overtaken = true;
            }
            if host.waiting && by_slot(noted, host) {
                host.queued = true;
            }
            if new.mode == Mode::Shared && mode == Mode::Shared {
                host.queued = false; // It can join without anybody's help.
                host.behind = 0;
            }
        }
    }

    /// We know that our swap landed.
    fn done(&self, s: &mut System, h: usize, new: Record, purpose: Purpose) {
        s.hosts[h].step = Step::Idle;
        match purpose {
            Purpose::Acquire => self.granted(s, h, new),
            Purpose::Release { keep, .. } => {
                s.hosts[h].held = Held::Nothing;
                if !self.reads_apart {
                    s.hosts[h].to_read = 0;
                }
                if keep {
                    self.granted(s, h, new);
                }
            }
        }
    }

    /// We saw an image that names us.
    fn granted(&self, s: &mut System, h: usize, image: Record) {
        if self.volatile() && self.has(Rule::FlushBeforeActing) {
            s.hosts[h].step = Step::Flush { image, reset: false };
        } else {
            self.act(s, h, image);
        }
    }

    fn act(&self, s: &mut System, h: usize, image: Record) {
        let host = &mut s.hosts[h];
        let me = host.name.expect("mounted");
        host.held = image.names(me);
        if host.cache_counter != image.change_counter && self.has(Rule::InvalidateUnlessCounterEqual) {
            host.cache = None;
        }
        host.cache_counter = image.change_counter;
        host.changed = false;
        if self.demand == Demand::Doorbell {
            let next = image.next.map_or(0, |next| bit(next.slot));
            host.to_read |= (image.waiters | next) & !bit(me.slot);
        }
    }

    fn resolve(&self, s: &mut System, h: usize) {
        let Step::Resolve { base, new, purpose } = s.hosts[h].step else {
            return;
        };
        let lock = s.lun.lock;
        if lock == new {
            return self.done(s, h, new, purpose);
        }
        s.hosts[h].step = Step::Idle;
        let Purpose::Release { was, .. } = purpose else {
            return; // The want goes on, from what is there now.
        };
        let me = s.hosts[h].name.expect("mounted");
        let (rule, believes_in_old) = if lock == base {
            (Rule::UndecidedNeedsAnotherSwap, true)
        } else {
            (Rule::UnknownTenureIsNewGrant, lock.names(me) != Held::Nothing)
        };
        s.hosts[h].held = if believes_in_old && !self.has(rule) { was } else { Held::Nothing };
    }
}
