//! Recovery, in the order of `src/recovery.rs`: mark, fence, scan, pin, put in place, publish.

use super::Deed;
use super::Recovery;
use super::rules::Rule;
use super::state::*;

impl Recovery {
    /// The slot was marked, or our own next life claimed it.
    pub fn begin_replay(&self, s: &mut System, h: usize, slot: u8, marked: SlotRecord) {
        let flush = self.volatile(s) && self.has(Rule::FlushTheMark);
        let stage = if flush { Stage::FlushMark } else { self.after_the_mark() };
        let (images, valid) = (Vec::new(), Vec::new());
        s.hosts[h].replay = Some(Replay { slot, marked, stage, images, valid, reset: false });
    }

    fn after_the_mark(&self) -> Stage {
        if self.fences && self.has(Rule::FenceBeforeReplay) { Stage::Fence } else { Stage::Scan }
    }

    /// Is it an earlier life of our own slot? Then the slot has moved on.
    fn is_own(host: &Host, replay: &Replay) -> bool {
        replay.slot == host.me.slot
    }

    /// The life whose journal it is.
    fn logger(s: &System, replay: &Replay) -> Name {
        Name { slot: replay.slot, incarnation: s.lun.now.journals[replay.slot as usize].incarnation }
    }

    fn names(&self, s: &System, replay: &Replay, logged: &Logged) -> Held {
        s.lun.now.locks[logged.lock].names(Self::logger(s, replay))
    }

    fn first_image<'a>(&self, replay: &'a Replay) -> Option<&'a Logged> {
        replay.images.first()
    }

    pub fn replay_command(&self, s: &System, host: &Host, deed: Deed) -> Option<Command> {
        let replay = host.replay.as_ref()?;
        match deed {
            Deed::Pin => {
                let logged = self.first_image(replay)?;
                let held = self.names(s, replay, logged);
                if held == Held::Nothing || !self.has(Rule::PinBeforeReplay) {
                    return None;
                }
                let base = s.lun.now.locks[logged.lock];
                let new = self.pinned(base, host.me);
                Some(Command::SwapLock { lock: logged.lock, base, new })
            }
            Deed::PutInPlace => {
                let logged = replay.valid.first()?;
                Some(Command::WriteInPlace { lock: logged.lock, content: logged.content })
            }
            Deed::Publish => {
                let base = replay.marked;
                let new = if Self::is_own(host, replay) {
                    SlotRecord { settled_up_to: base.incarnation - 1, beat: base.beat + 1, ..base }
                } else {
                    SlotRecord {
                        state: SlotState::Recovered,
                        settled_up_to: base.incarnation,
                        beat: base.beat + 1,
                        ..base
                    }
                };
                Some(Command::SwapSlot { slot: replay.slot, base, new })
            }
            _ => None,
        }
    }

    pub fn replay_done(&self, s: &mut System, h: usize, deed: Deed, landed: bool) {
        let Some(mut replay) = s.hosts[h].replay.take() else { return };
        // After a reset there is something to be noticed even if no other power loss comes.
        let flushes = self.volatile(s) || replay.reset;
        match deed {
            Deed::Fence => {
                let own = Self::is_own(&s.hosts[h], &replay);
                let incarnation = replay.marked.incarnation - u8::from(own);
                let life = Name { slot: replay.slot, incarnation };
                s.lun.fenced[life.slot as usize] |= 1 << incarnation;
                s.lun.late.retain(|late| late.by != life);
                replay.stage = Stage::Scan;
            }
            Deed::Scan => {
                let journal = &s.lun.now.journals[replay.slot as usize];
                // What is settled owes nothing; its life did not come as far as beginning a journal.
                if !replay.marked.settled(journal.incarnation) {
                    replay.images = journal.images.clone();
                }
                replay.stage = self.after_the_pins(flushes, &replay);
            }
            Deed::Pin => {
                let first = *self.first_image(&replay).expect("an image to pin");
                let held = self.names(s, &replay, &first);
                let (now, later): (Vec<_>, _) =
                    replay.images.iter().copied().partition(|logged| logged.lock == first.lock);
                replay.images = later;
                let valid = now.into_iter().rfind(|logged| match held {
                    Held::Exclusive(tenure) => tenure == logged.tenure || !self.has(Rule::ReplayByTenure),
                    Held::Nothing | Held::Shared => false,
                });
                replay.valid.extend(valid);
                replay.stage = self.after_the_pins(flushes, &replay);
            }
            Deed::PutInPlace => {
                replay.valid.remove(0);
                let flush = flushes && self.has(Rule::FlushBeforePublishing);
                if replay.valid.is_empty() {
                    replay.stage = if flush { Stage::FlushPlaced } else { Stage::Publish };
                }
            }
            Deed::Publish => {
                if !landed || !flushes {
                    // Settled, or the slot was changed by another: the watcher judges anew.
                    return self.given_up(s, h, &replay, landed);
                }
                replay.stage = Stage::FlushPublished;
            }
            _ => {}
        }
        s.hosts[h].replay = Some(replay);
    }

    /// What comes after the scan and after each pin.
    fn after_the_pins(&self, flushes: bool, replay: &Replay) -> Stage {
        if !replay.images.is_empty() {
            Stage::Pin
        } else if replay.valid.is_empty() && !replay.reset {
            Stage::Publish
        } else if flushes && self.has(Rule::FlushBeforePuttingInPlace) {
            Stage::FlushPins
        } else if replay.valid.is_empty() {
            Stage::Publish
        } else {
            Stage::PutInPlace
        }
    }

    /// A flush of ours has ended.
    pub fn replay_flushed(&self, s: &mut System, h: usize) {
        let Some(mut replay) = s.hosts[h].replay.take() else { return };
        let proves = !replay.reset || !self.has(Rule::FlushProvesOneResetCount);
        if replay.stage.is_flush() {
            replay.reset = false;
        }
        replay.stage = match replay.stage {
            Stage::FlushMark | Stage::FlushPublished if !proves => {
                return self.given_up(s, h, &replay, false);
            }
            Stage::FlushPins | Stage::FlushPlaced if !proves => {
                (replay.images, replay.valid) = (Vec::new(), Vec::new());
                Stage::Scan
            }
            Stage::FlushMark => self.after_the_mark(),
            Stage::FlushPins if replay.valid.is_empty() => Stage::Publish,
            Stage::FlushPins => Stage::PutInPlace,
            Stage::FlushPlaced => Stage::Publish,
            Stage::FlushPublished => return,
            stage => stage,
        };
        s.hosts[h].replay = Some(replay);
    }

    /// The slot is not as we left it, or may not be: a recoverer looks again, a new life ends.
    fn given_up(&self, s: &mut System, h: usize, replay: &Replay, settled: bool) {
        if Self::is_own(&s.hosts[h], replay) && !settled {
            s.hosts[h].life = Life::Gone;
            s.hosts[h].begun = Begun::No;
            s.hosts[h].locks = [NOTHING; MAX_LOCKS];
        }
    }
}
