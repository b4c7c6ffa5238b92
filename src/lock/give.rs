//! Giving a lock to a host that asked.
//!
//! The order is what keeps readers right: serve on while the kernel is made to forget; go round again if
//! anything was served meanwhile; close; settle; swap. Without the second look a page filled between the
//! invalidation and the release stays cached for ever.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::decide::{Giving, give};
use super::demand::RequestSink;
use super::entry::{Entry, State};
use super::{Access, Held, LockError, LockId, LockManager, Mode, Patience, Usage, Wanted};
use crate::ats::{AtsError, Image, Swapped};
use crate::layout::demand::{Request, Want};
use crate::layout::lock::{LockMode, LockRecord};
use crate::lease::{EndCause, IoClass};
use crate::rt::planted::{Bug, is_planted};
use crate::rt::{self, Instant, MutexGuard};
use crate::types::{BlockNo, Owner};

/// A lock just granted stays until a waiting thread used it, but no longer than this.
const FIRST_USE: Duration = Duration::from_millis(50);
/// A busy lock stays at least this long, so that it does useful work before it moves.
const MIN_HOLD: Duration = Duration::from_millis(2);
/// A lock unused for this long moves at once.
const IDLE: Duration = Duration::from_micros(200);
/// Rounds of invalidation before readers are slowed down.
const FREE_ROUNDS: u32 = 40;

impl RequestSink for LockManager {
    fn on_request(self: Arc<Self>, by: Owner, request: Request) {
        let mode = match request.want {
            Want::Shared => Mode::Shared,
            Want::Exclusive => Mode::Exclusive,
            Want::Openers => {
                self.look_at_opener(request.lock);
                return;
            }
        };
        let entry = match self.known(request.lock) {
            Some(entry) => entry,
            // We know nothing of it, but the disk may name us; an address from outside is believed only
            // if its cluster says that a lock is there.
            None => match self.steward().and_then(|s| s.kind_of(request.lock)) {
                Some(kind) => self.entry(LockId { kind, at: request.lock }),
                None => return,
            },
        };
        let mut state = entry.state.lock();
        let wanted = Wanted { by, mode, since: request.since };
        match state.wanted.iter_mut().find(|w| w.by.slot == by.slot) {
            Some(known) => *known = wanted,
            None => state.wanted.push(wanted),
        }
        if !state.giving {
            state.giving = true;
            let entry = entry.clone();
            drop(state);
            rt::spawn("give", move || self.give_loop(&entry));
        }
    }
}

impl LockManager {
    /// Somebody wants to free an inode and asks whether it is still open here. Whoever takes the lock and
    /// gives it away again says so in the same swap.
    fn look_at_opener(self: Arc<Self>, lock: BlockNo) {
        let id = match self.known(lock) {
            Some(entry) => entry.id,
            None => match self.steward().and_then(|s| s.kind_of(lock)) {
                Some(kind) => LockId { kind, at: lock },
                None => return,
            },
        };
        if self.steward().is_none_or(|s| s.usage(id).open) || !self.telling.lock().insert(lock) {
            return;
        }
        rt::spawn("openers", move || {
            let told = self.ats.read::<LockRecord>(IoClass::Lock, id.at).map_err(LockError::from).and_then(
                |image| {
                    if !image.record.openers.contains(self.me.slot) {
                        return Ok(());
                    }
                    self.acquire(id, Mode::Exclusive, Access::Read, &Patience::endless()).map(drop)
                },
            );
            self.telling.lock().remove(&lock);
            if let Err(e) = told {
                log::debug!("telling that inode lock {} is not open here: {e}", id.at);
            }
        });
    }

    fn give_loop(self: Arc<Self>, entry: &Entry) {
        loop {
            match self.give_once(entry) {
                Ok(true) => {}
                Ok(false) => return,
                Err(e) => {
                    let mut state = entry.state.lock();
                    state.giving = false;
                    state.wanted.clear();
                    log::warn!("giving the {} lock at block {}: {e}", entry.id.kind.name(), entry.id.at);
                    return;
                }
            }
        }
    }

    /// The lock block as it is, with what a swap of ours left open settled. Nobody else is busy with the lock meanwhile;
    /// anything else of its state may have changed.
    fn look<'a>(
        &self,
        entry: &'a Entry,
        mut state: MutexGuard<'a, State>,
    ) -> Result<(MutexGuard<'a, State>, Image<LockRecord>), AtsError> {
        state.busy = true;
        drop(state);
        let read = self.ats.read::<LockRecord>(IoClass::Lock, entry.id.at);
        let settled = read.and_then(|image| self.ats.settle(IoClass::Lock, &image).map(|()| image));
        let mut state = entry.state.lock();
        state.busy = false;
        entry.changed.notify_all();
        settled.map(|image| (state, image))
    }

    /// Serves the oldest wish. `Ok(false)`: nothing left to do.
    fn give_once(&self, entry: &Entry) -> Result<bool, AtsError> {
        let id = entry.id;
        let mut state = entry.state.lock();
        let target = loop {
            let Some(target) = state.wanted.iter().min_by_key(|w| (w.since, w.by.slot)).copied() else {
                state.giving = false;
                return Ok(false);
            };
            if state.busy {
                state = entry.changed.wait(state);
                continue;
            }
            if state.held == Held::Shared && target.mode == Mode::Shared {
                // Who wants a share joins by itself, unless the disk says more than we know: the last other
                // sharer may have given us what a thread of ours asked for and waits for no more.
                let image;
                (state, image) = self.look(entry, state)?;
                match image.record.mode {
                    LockMode::Exclusive { owner, tenure } if owner == self.me => {
                        // Our own old one, come back: its changes count again.
                        if tenure <= state.ended && !is_planted(Bug::ReturnedTenureNotCounted) {
                            entry.dirtied.store(true, Ordering::Release);
                        }
                        state.adopt(image, Held::Exclusive(tenure), false, || self.new_epoch());
                    }
                    _ => state.wanted.retain(|w| w.by != target.by),
                }
                continue;
            }
            if state.held != Held::Nothing {
                let since_grant = state.granted_at.map_or(Duration::MAX, |at| at.elapsed());
                let waited_for = state.queued > 0 || state.polled_for.is_some();
                let first_use = state.unused && waited_for && since_grant < FIRST_USE;
                let in_use = since_grant < MIN_HOLD && state.last_use.is_some_and(|at| at.elapsed() < IDLE);
                if first_use || in_use {
                    state = entry.changed.wait_timeout(state, IDLE).0;
                    continue;
                }
            }
            break target;
        };
        if state.held == Held::Nothing {
            // The lock block alone says who holds: if it names us we hold it, known or not.
            let image;
            (state, image) = self.look(entry, state)?;
            let record = image.record.clone();
            match record.mode {
                LockMode::Exclusive { owner, tenure } if owner == self.me => {
                    state.adopt(image, Held::Exclusive(tenure), true, || self.new_epoch());
                    // Not seen to begin, so nothing is known of what happened in it.
                    entry.dirtied.store(true, Ordering::Release);
                    entry.changed.notify_all();
                    return Ok(true);
                }
                LockMode::Shared if record.sharers.contains(self.me.slot) => {
                    // Of an earlier life of our slot, or granted to a thread that gave up. A set bit is not
                    // a share: nobody of this host gets in before it is given away.
                    state.adopt(image, Held::Shared, true, || self.new_epoch());
                    state.closing = true;
                    state.busy = true;
                    drop(state);
                    let result = self.hand_over(entry, target, false);
                    let mut state = entry.state.lock();
                    state.let_go();
                    state.valid_at = None;
                    state.closing = false;
                    state.busy = false;
                    entry.changed.notify_all();
                    return result.map(|()| true);
                }
                _ => {
                    state.image = Some(image);
                    state.wanted.retain(|w| w.by != target.by);
                    return Ok(true);
                }
            }
        }
        drop(state);
        let usage = self.steward().map_or(Usage::default(), |s| s.usage(id));
        let keep_share = target.mode == Mode::Shared && !usage.writable;
        if !self.close(entry, keep_share) {
            return Ok(true);
        }
        let result = self.hand_over(entry, target, keep_share);
        let mut state = entry.state.lock();
        state.closing = false;
        state.busy = false;
        entry.changed.notify_all();
        result.map(|()| true)
    }

    /// Brings the lock to where nothing is served under it and nothing will be. False: it left meanwhile.
    fn close(&self, entry: &Entry, keep_share: bool) -> bool {
        let mut round = 0;
        let mut state = entry.state.lock();
        loop {
            if state.held == Held::Nothing {
                state.throttle = false;
                return false;
            }
            let downgrade = keep_share && matches!(state.held, Held::Exclusive(_));
            let served = state.served;
            // An answer on its way may reach the kernel after it was made to forget: such a round proves nothing.
            let was_idle = state.idle();
            if !downgrade {
                // Readers go on meanwhile: what the kernel locks for a read would block us otherwise.
                drop(state);
                if let Some(steward) = self.steward()
                    && !is_planted(Bug::KernelNotTold)
                {
                    steward.silence(entry.id);
                }
                state = entry.state.lock();
            }
            while state.busy {
                state = entry.changed.wait(state);
            }
            // Who only reads may stay while we step down to a share.
            let unserved = was_idle && state.served == served || is_planted(Bug::ServedMeanwhile);
            let quiet = if downgrade { !state.writing() } else { state.idle() && unserved };
            if quiet && state.held != Held::Nothing {
                state.closing = true;
                state.busy = true;
                state.throttle = false;
                return true;
            }
            if !state.idle() {
                state = entry.changed.wait_timeout(state, Duration::from_millis(10)).0;
            }
            round += 1;
            state.throttle = round > FREE_ROUNDS;
        }
    }

    /// Settles the lock and swaps it away. Called with `closing` and `busy` set.
    fn hand_over(&self, entry: &Entry, target: Wanted, keep_share: bool) -> Result<(), AtsError> {
        let id = entry.id;
        if let Some(steward) = self.steward()
            && let Err(e) = steward.settle(id)
        {
            // The lock stays: what it covers can't be made true on the disk. The volume withdraws.
            log::error!("settling the {} lock at block {}: {e}", id.kind.name(), id.at);
            entry.state.lock().wanted.clear();
            return Ok(());
        }
        let usage = self.steward().map_or(Usage::default(), |s| s.usage(id));
        if keep_share && usage.writable {
            // Opened for writing meanwhile: begin anew, and give the lock away wholly.
            return Ok(());
        }
        let (mut image, held, own_wait, upgrading) = {
            let state = entry.state.lock();
            let Some(image) = state.image.clone() else { return Ok(()) };
            let own_wait = state.queued_mode.max(state.polled_for);
            (image, state.held, own_wait, state.polled_for == Some(Mode::Exclusive))
        };
        if let Some(mode) = own_wait {
            // Threads of ours wait behind this: say so in the image and save everybody two rings.
            let want = if mode == Mode::Exclusive { Want::Exclusive } else { Want::Shared };
            entry.state.lock().wished = true;
            self.demand.post(id.at, want, image.record.swap_counter)?;
        } else {
            self.demand.clear_served(id.at)?;
        }
        let changed = entry.dirtied.load(Ordering::Acquire)
            && matches!(held, Held::Exclusive(_))
            && !is_planted(Bug::ChangeNotCounted);
        loop {
            // The bit of who asks may by now be that of the next life of its slot, which never asked. Read after the image:
            // whoever claims the slot later and shares the lock changes the image, and our swap meets that.
            if target.mode == Mode::Exclusive
                && image.record.mode == LockMode::Shared
                && image.record.sharers.contains(target.by.slot)
                && !is_planted(Bug::GrantedToTheDead)
                && self.peers.fresh(target.by.slot)?.living(target.by.slot) != Some(target.by)
            {
                let mut state = entry.state.lock();
                state.wanted.retain(|w| w.by != target.by);
                state.image = Some(image);
                return Ok(());
            }
            let waiters = {
                let state = entry.state.lock();
                let asked = state.wanted.iter().fold(image.record.waiters, |set, w| set.with(w.by.slot));
                match own_wait {
                    Some(_) => asked.with(self.me.slot),
                    None => asked.without(self.me.slot),
                }
            };
            let giving = Giving { me: self.me, keep_share, open: usage.open, changed, waiters, upgrading };
            let Some((to, left)) = give(&image.record, held, target, &giving) else {
                let mut state = entry.state.lock();
                state.wanted.retain(|w| w.by != target.by);
                if !image.record.sharers.contains(self.me.slot) {
                    state.let_go();
                    state.valid_at = None;
                }
                state.image = Some(image);
                return Ok(());
            };
            {
                // Our tenure ends here, at the issue of the swap, whatever becomes of it; so does one that
                // was granted to us meanwhile and is passed on unused.
                let mut state = entry.state.lock();
                state.let_go();
                if let LockMode::Exclusive { owner, tenure } = image.record.mode
                    && owner == self.me
                {
                    state.ended = state.ended.max(tenure);
                }
            }
            match self.ats.swap(IoClass::Lock, &image, &to)? {
                Swapped::Done(new) => return self.given(entry, target, held, left, new, to.change_counter),
                // While it was ours nobody else could swap it: our image landed unseen (its answer was lost or
                // false), and who was given the lock has gone on from there. Unless we were declared dead.
                Swapped::Miscompare(found)
                    if matches!(held, Held::Exclusive(_))
                        && found.record.swap_counter > to.swap_counter
                        && self.peers.fresh(self.me.slot)?.living(self.me.slot) == Some(self.me) =>
                {
                    let shares =
                        found.record.mode == LockMode::Shared && found.record.sharers.contains(self.me.slot);
                    let left = if shares { left } else { Held::Nothing };
                    return self.given(entry, target, held, left, found, to.change_counter);
                }
                Swapped::Miscompare(found) if matches!(held, Held::Exclusive(_)) => {
                    let reason = format!(
                        "the {} lock at block {} was taken from this host while it held it exclusively: \
                         ours {:?}, found {:?}",
                        id.kind.name(),
                        id.at,
                        image.record,
                        found.record
                    );
                    log::error!("{reason}");
                    self.ats.door().lease().end(EndCause::ShutOut, &reason);
                    return Ok(());
                }
                // Other sharers came or went: decide anew.
                Swapped::Miscompare(found) => image = found,
            }
        }
    }

    /// The swap that gave the lock landed: `image` is what the disk says now, `changed` the change counter that
    /// our image had.
    fn given(
        &self,
        entry: &Entry,
        target: Wanted,
        held: Held,
        left: Held,
        image: Image<LockRecord>,
        changed: u64,
    ) -> Result<(), AtsError> {
        self.stats.given.fetch_add(1, Ordering::Relaxed);
        let dirtied = entry.dirtied.swap(false, Ordering::AcqRel);
        let mut state = entry.state.lock();
        // What we keep in memory is what is in place at this counter.
        if matches!(held, Held::Exclusive(_)) {
            state.changed_tenures = if dirtied { state.changed_tenures.saturating_add(1) } else { 0 };
            state.valid_at = Some(changed);
        }
        state.held = left;
        let resets = image.resets();
        state.image = Some(image);
        state.granted_at = Some(Instant::now());
        if left == Held::Nothing {
            // The image carries the other waiters; they are the new owner's to serve.
            state.wanted.clear();
        } else {
            state.wanted.retain(|w| w.by != target.by);
        }
        drop(state);
        if left != Held::Nothing {
            self.ats.settle_since(IoClass::Lock, resets)?;
        }
        Ok(())
    }
}
