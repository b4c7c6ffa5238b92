//! What each step does.

use super::rules::Rule;
use super::state::*;
use super::{Action, Deed, End, Recovery};

/// No image repeats: the writer stands for the nonce, and its swap counter goes up.
fn nonce(by: Name) -> u8 {
    by.slot << 4 | by.incarnation
}

impl Recovery {
    pub fn volatile(&self, s: &System) -> bool {
        s.lun.durable.is_some()
    }

    pub fn apply(&self, s: &mut System, action: Action) {
        match action {
            Action::Do(h, deed, end) => {
                let by = self.writer(s, h, deed);
                if deed == Deed::Farewell && self.has(Rule::WithdrawnOnlyWhenItsWritesAreOver) && !self.lies {
                    s.lun.late.retain(|late| late.by != by || !late.command.is_plain());
                }
                match (self.command(s, h, deed), end) {
                    (Some(command), End::Late(how)) => {
                        s.lun.late.push(Late { by, command });
                        self.stop(s, h, how);
                    }
                    (Some(command), End::Answered) => {
                        if s.lun.is_fenced(by) {
                            s.hosts[h].life = Life::Gone;
                            self.forget(s, h);
                        } else {
                            let done = self.execute(s, by, &command);
                            self.done(s, h, deed, Some(&command), done);
                        }
                    }
                    (None, _) => self.done(s, h, deed, None, true),
                }
            }
            Action::Stop(h, how) => self.stop(s, h, how),
            Action::Wake(h) => {
                if self.has(Rule::DoorChecksTheLease) {
                    s.hosts[h].life = Life::Gone;
                } else {
                    s.hosts[h].life = Life::Running;
                }
            }
            Action::DeadTimePasses(slot) => {
                s.silent[slot as usize] = true;
                let life = s.lun.now.resident(slot);
                if !self.lies && self.has(Rule::VerdictWaitsForTheHoldTime) {
                    s.lun.late.retain(|late| late.by != life);
                }
            }
            Action::Execute(at) => {
                let Late { by, command } = s.lun.late.remove(at);
                self.execute(s, by, &command);
            }
            Action::Vanish(at) => drop(s.lun.late.remove(at)),
            Action::PowerLoss => self.power_loss(s),
            Action::DestageLock(l) => self.destage(s, |durable, now| durable.locks[l] = now.locks[l]),
            Action::DestageBlock(l) => self.destage(s, |durable, now| durable.blocks[l] = now.blocks[l]),
            Action::DestageSlot(h) => self.destage(s, |durable, now| durable.slots[h] = now.slots[h]),
            Action::DestageJournal(h) => {
                self.destage(s, |durable, now| durable.journals[h] = now.journals[h].clone());
            }
        }
        for slot in 0..MAX_HOSTS {
            s.silent[slot] &= s.lun.now.slots[slot].state == SlotState::Live;
        }
    }

    fn destage(&self, s: &mut System, copy: impl FnOnce(&mut Media, &Media)) {
        if let Some(durable) = &mut s.lun.durable {
            copy(durable, &s.lun.now);
        }
    }

    // --- The end of a host --------------------------------------------------------------------------------------

    fn stop(&self, s: &mut System, h: usize, how: How) {
        s.stops_left -= 1;
        s.hosts[h].life = match how {
            How::Crash => Life::Gone,
            How::Freeze => Life::Frozen,
            How::Withdraw => Life::Withdrawing,
        };
        if how != How::Freeze || self.has(Rule::DoorChecksTheLease) {
            self.forget(s, h);
        }
    }

    fn forget(&self, s: &mut System, h: usize) {
        s.hosts[h].locks = [NOTHING; MAX_LOCKS];
        s.hosts[h].replay = None;
    }

    fn power_loss(&self, s: &mut System) {
        s.power_losses_left -= 1;
        let durable = s.lun.durable.clone().expect("a volatile cache");
        s.lun.now = durable;
        if s.power_losses_left == 0 {
            s.lun.durable = None; // What is volatile can't matter any more.
        }
        let counts_resets = self.has(Rule::FlushProvesOneResetCount);
        for host in s.hosts.iter_mut().filter(|host| host.life == Life::Running) {
            for holding in &mut host.locks {
                if let Some((_, reset)) = &mut holding.seen {
                    *reset = true;
                }
                // The bytes stay in memory until a flush; after a reset they are written again.
                holding.way = match holding.way {
                    Way::Logged if counts_resets => Way::Changed,
                    Way::Written if counts_resets => Way::Committed,
                    way => way,
                };
            }
            if host.begun == Begun::Written && counts_resets {
                host.begun = Begun::No;
            }
            if let Some(replay) = &mut host.replay {
                replay.reset = true;
            }
        }
    }

    // --- Commands -----------------------------------------------------------------------------------------------

    /// Under whose name the command goes out.
    fn writer(&self, s: &System, h: usize, deed: Deed) -> Name {
        let me = s.hosts[h].me;
        match deed {
            Deed::Claim => {
                Name { slot: me.slot, incarnation: s.lun.now.slots[me.slot as usize].incarnation + 1 }
            }
            _ => me,
        }
    }

    /// The command that changes something, if this deed is one.
    pub fn command(&self, s: &System, h: usize, deed: Deed) -> Option<Command> {
        let host = &s.hosts[h];
        let me = host.me;
        let slot_record = |slot: u8| s.lun.now.slots[slot as usize];
        match deed {
            Deed::Take(lock) => {
                let base = s.lun.now.locks[lock];
                // We did not see that tenure end.
                let unseen = base.owner.is_some() && self.has(Rule::RaiseCounterOnTakeOver);
                let change_counter = base.change_counter + u8::from(unseen);
                let new = Record { change_counter, ..self.granted_to(base, me, me) };
                Some(Command::SwapLock { lock, base, new })
            }
            Deed::HandOver(lock, to) => {
                let base = s.lun.now.locks[lock];
                let to = s.hosts[to].me;
                // Of a tenure that we do not remember we do not know what happened in it.
                let changed = host.locks[lock].dirtied || host.locks[lock].held == Held::Nothing;
                let change_counter = base.change_counter + u8::from(changed);
                let new = Record { change_counter, ..self.granted_to(base, to, me) };
                Some(Command::SwapLock { lock, base, new })
            }
            Deed::Commit => {
                let images = (0..MAX_LOCKS).filter_map(|lock| {
                    let holding = &host.locks[lock];
                    match (holding.way, holding.held) {
                        (Way::Changed, Held::Exclusive(tenure)) => {
                            Some(Logged { lock, tenure, content: holding.cache? })
                        }
                        _ => None,
                    }
                });
                let images = images.collect();
                Some(Command::Append { slot: me.slot, incarnation: me.incarnation, images })
            }
            Deed::Checkpoint(lock) => {
                let content = host.locks[lock].cache.expect("what is committed is in the cache");
                Some(Command::WriteInPlace { lock, content })
            }
            Deed::BeginJournal => Some(Command::BeginJournal { slot: me.slot, incarnation: me.incarnation }),
            Deed::Claim => {
                let base = slot_record(me.slot);
                let new = SlotRecord {
                    incarnation: base.incarnation + 1,
                    state: SlotState::Live,
                    beat: 1,
                    recoverer: None,
                    ..base
                };
                Some(Command::SwapSlot { slot: me.slot, base, new })
            }
            Deed::Farewell => {
                // From its last beat: others that began without it are not disturbed.
                let base = SlotRecord {
                    incarnation: me.incarnation,
                    state: SlotState::Live,
                    recoverer: None,
                    ..slot_record(me.slot)
                };
                let new = SlotRecord { state: SlotState::Withdrawn, beat: base.beat + 1, ..base };
                Some(Command::SwapSlot { slot: me.slot, base, new })
            }
            Deed::Mark(slot) if self.has(Rule::MarkBeforeReplay) => {
                let base = slot_record(slot);
                let new = SlotRecord {
                    state: SlotState::Recovering,
                    beat: base.beat + 1,
                    recoverer: Some(me),
                    ..base
                };
                Some(Command::SwapSlot { slot, base, new })
            }
            Deed::Pin | Deed::PutInPlace | Deed::Publish => self.replay_command(s, host, deed),
            Deed::FindGrant(_) | Deed::Use | Deed::Flush | Deed::Mark(_) | Deed::Fence | Deed::Scan => None,
        }
    }

    fn granted_to(&self, base: Record, to: Name, by: Name) -> Record {
        let swap_counter = base.swap_counter + 1;
        Record {
            mode: Mode::Exclusive,
            owner: Some(to),
            tenure: swap_counter,
            swap_counter,
            nonce: nonce(by),
            ..base
        }
    }

    /// The image by which a recoverer pins a lock.
    pub fn pinned(&self, base: Record, by: Name) -> Record {
        Record { swap_counter: base.swap_counter + 1, nonce: nonce(by), ..base }
    }

    /// A command executes on the LUN. False: it compared with something else than what is there.
    fn execute(&self, s: &mut System, by: Name, command: &Command) -> bool {
        if s.lun.is_fenced(by) {
            return false;
        }
        let now = &mut s.lun.now;
        match command {
            Command::SwapLock { lock, base, new } => {
                if now.locks[*lock] != *base {
                    return false;
                }
                now.locks[*lock] = *new;
                if new.owner != base.owner {
                    s.taken_from[*lock] = base.owner.filter(|owner| *owner != by);
                }
            }
            Command::SwapSlot { slot, base, new } => {
                let record = &mut now.slots[*slot as usize];
                if record != base {
                    return false;
                }
                if record.incarnation != new.incarnation {
                    s.silent[*slot as usize] = false;
                }
                *record = *new;
                let published = &mut s.published[*slot as usize];
                *published = (*published).max(new.settled_up_to);
            }
            Command::Append { slot, incarnation, images } => {
                let journal = &mut now.journals[*slot as usize];
                if journal.incarnation != *incarnation {
                    // Over the records of a later life.
                    journal.images.clear();
                    return true;
                }
                for new in images {
                    journal.images.retain(|old| (old.lock, old.tenure) != (new.lock, new.tenure));
                    journal.images.push(*new);
                }
                journal.images.sort_by_key(|image| (image.lock, image.tenure));
            }
            Command::BeginJournal { slot, incarnation } => {
                now.journals[*slot as usize] = Journal { incarnation: *incarnation, images: Vec::new() };
            }
            Command::WriteInPlace { lock, content } => {
                s.undone |= now.blocks[*lock] & !content != 0;
                now.blocks[*lock] = *content;
            }
        }
        true
    }

    // --- The answer ---------------------------------------------------------------------------------------------

    fn done(&self, s: &mut System, h: usize, deed: Deed, command: Option<&Command>, landed: bool) {
        let volatile = self.volatile(s);
        match (deed, command) {
            (Deed::Take(lock), Some(Command::SwapLock { new, .. })) if landed => {
                self.granted(s, h, lock, *new)
            }
            (Deed::FindGrant(lock), _) => {
                let image = s.lun.now.locks[lock];
                self.granted(s, h, lock, image);
            }
            (Deed::HandOver(lock, _), Some(Command::SwapLock { base, new, .. })) => {
                // Our tenure ended when the swap was issued.
                let holding = &mut s.hosts[h].locks[lock];
                holding.held = Held::Nothing;
                holding.ended = base.tenure;
                holding.cache_counter = new.change_counter;
                holding.dirtied = false;
                holding.unused = false;
                holding.way = Way::InPlace;
            }
            (Deed::Use, _) => self.use_locks(s, h),
            (Deed::Commit, Some(Command::Append { images, .. })) => {
                let acknowledged = !volatile || !self.has(Rule::AcknowledgeAfterTheFlush);
                for image in images {
                    s.hosts[h].locks[image.lock].way =
                        if acknowledged { Way::Committed } else { Way::Logged };
                    if acknowledged {
                        s.acknowledged[image.lock] |= image.content;
                    }
                }
            }
            (Deed::Checkpoint(lock), _) => {
                s.hosts[h].locks[lock].way = if volatile { Way::Written } else { Way::InPlace };
            }
            (Deed::BeginJournal, _) => s.hosts[h].begun = if volatile { Begun::Written } else { Begun::Yes },
            (Deed::Farewell, _) => s.hosts[h].life = Life::Gone,
            (Deed::Claim, Some(Command::SwapSlot { slot, new, .. })) if landed => {
                s.lives_left -= 1;
                s.hosts[h] = Host {
                    life: Life::Running,
                    me: Name { slot: *slot, incarnation: new.incarnation },
                    begun: Begun::No,
                    wants_done: s.hosts[h].wants_done,
                    locks: [NOTHING; MAX_LOCKS],
                    replay: None,
                };
                let owes = !new.settled(new.incarnation - 1) && self.has(Rule::NextLifeRecoversTheLast);
                // On a device that forgets nobody acts on a claim that is not flushed.
                if owes || volatile {
                    self.begin_replay(s, h, *slot, *new);
                }
            }
            (Deed::Flush, _) => self.flush(s, h),
            (Deed::Mark(slot), Some(Command::SwapSlot { new, .. })) if landed => {
                self.begin_replay(s, h, slot, *new);
            }
            (Deed::Mark(slot), None) => {
                let seen = s.lun.now.slots[slot as usize];
                self.begin_replay(s, h, slot, seen);
            }
            (Deed::Fence | Deed::Scan | Deed::Pin | Deed::PutInPlace | Deed::Publish, _) => {
                self.replay_done(s, h, deed, landed);
            }
            _ => {}
        }
    }

    fn flush(&self, s: &mut System, h: usize) {
        if let Some(durable) = &mut s.lun.durable {
            *durable = s.lun.now.clone();
        }
        let counts_resets = self.has(Rule::FlushProvesOneResetCount);
        for lock in 0..MAX_LOCKS {
            let holding = &mut s.hosts[h].locks[lock];
            match holding.way {
                Way::Logged => {
                    holding.way = Way::Committed;
                    s.acknowledged[lock] |= holding.cache.expect("what is logged is in the cache");
                }
                Way::Written => holding.way = Way::InPlace,
                Way::InPlace | Way::Changed | Way::Committed => {}
            }
            if let Some((image, reset)) = s.hosts[h].locks[lock].seen.take()
                && (!reset || !counts_resets)
            {
                self.act(s, h, lock, image);
            }
        }
        if s.hosts[h].begun == Begun::Written {
            s.hosts[h].begun = Begun::Yes;
        }
        self.replay_flushed(s, h);
    }

    // --- Ordinary work ------------------------------------------------------------------------------------------

    /// We saw an image that names us.
    fn granted(&self, s: &mut System, h: usize, lock: usize, image: Record) {
        if self.volatile(s) {
            s.hosts[h].locks[lock].seen = Some((image, false));
        } else {
            self.act(s, h, lock, image);
        }
    }

    fn act(&self, s: &mut System, h: usize, lock: usize, image: Record) {
        if let Some(owner) = s.taken_from[lock].take() {
            s.stepped_over |= owner.incarnation > s.published[owner.slot as usize];
        }
        let holding = &mut s.hosts[h].locks[lock];
        holding.held = Held::Exclusive(image.tenure);
        if holding.cache_counter != image.change_counter {
            holding.cache = None;
        }
        holding.cache_counter = image.change_counter;
        holding.dirtied = false;
        holding.unused = true;
        holding.way = Way::InPlace;
    }

    fn use_locks(&self, s: &mut System, h: usize) {
        let want = self.want(s, h).expect("wants");
        let change = 1 << s.made.len();
        for lock in locks_in(want.locks) {
            let in_place = s.lun.now.blocks[lock];
            let holding = &mut s.hosts[h].locks[lock];
            holding.unused = false;
            let content = *holding.cache.get_or_insert(in_place);
            if want.changes {
                holding.cache = Some(content | change);
                holding.way = Way::Changed;
                holding.dirtied = true;
            }
        }
        if want.changes {
            s.made.push(Made { by: s.hosts[h].me, locks: want.locks });
        }
        s.hosts[h].wants_done += 1;
    }
}
