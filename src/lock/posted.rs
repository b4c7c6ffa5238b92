//! A wait for a lock that other hosts know of: the request that was written, whom it rang, and when it looks again.
//!
//! The request is written before anybody is rung: who hears the bell reads it. Its age belongs to the wait and stays.

use std::time::Duration;

use super::{LockId, LockManager, Mode};
use crate::ats::AtsError;
use crate::layout::demand::Want;
use crate::layout::lock::LockRecord;
use crate::rt::Instant;
use crate::types::Owner;

/// Between two looks at a lock that is waited for: at first, at most while it is young, at most ever.
const POLL_FIRST: Duration = Duration::from_micros(500);
const POLL_YOUNG: Duration = Duration::from_millis(4);
const POLL_OLD: Duration = Duration::from_millis(100);
/// A wait older than this polls slowly.
const YOUNG: Duration = Duration::from_millis(500);
/// A holder is rung again after this long without effect.
const RING_AGAIN: Duration = Duration::from_secs(1);
/// A holder whose image carries our name is rung after this long without effect.
const CARRIED_GRACE: Duration = Duration::from_millis(20);

/// A holder that was or will be rung for a wait, at one state of the lock.
struct Rung {
    owner: Owner,
    counter: u64,
    next: Instant,
}

/// A wait that others know of.
pub(super) struct Posted<'a> {
    manager: &'a LockManager,
    pub(super) begun: Instant,
    pause: Duration,
    since: Option<u64>,
    /// The swap counter first read after the request was written.
    pub(super) first_look: Option<u64>,
    rung: Vec<Rung>,
    said_dead: Option<Instant>,
}

impl<'a> Posted<'a> {
    pub(super) fn new(manager: &'a LockManager) -> Self {
        Posted {
            manager,
            begun: Instant::now(),
            pause: POLL_FIRST,
            since: None,
            first_look: None,
            rung: Vec::new(),
            said_dead: None,
        }
    }

    /// Writes the request first, then rings whoever was not rung since the lock last moved. A holder that
    /// got the lock together with our name in its image looks at our request by itself; it is rung a little
    /// later all the same, since it may not know that it holds.
    pub(super) fn ask(
        &mut self,
        id: LockId,
        mode: Mode,
        record: &LockRecord,
        ask: &[Owner],
    ) -> Result<(), AtsError> {
        // Age belongs to the wait: it does not grow younger when the lock moves meanwhile.
        let since = *self.since.get_or_insert(record.swap_counter);
        let want = match mode {
            Mode::Shared => Want::Shared,
            Mode::Exclusive => Want::Exclusive,
        };
        let demand = &self.manager.demand;
        demand.post(id.at, want, since)?;
        let carried = record.waiters.contains(self.manager.me.slot) && since < record.swap_counter;
        let counter = record.swap_counter;
        for owner in ask {
            let known = self.rung.iter().position(|r| r.owner == *owner);
            let due = match known.and_then(|i| self.rung.get(i)) {
                Some(r) if r.counter == counter => r.next <= Instant::now(),
                _ => !carried,
            };
            let next = Instant::now() + if due { RING_AGAIN } else { CARRIED_GRACE };
            match known.and_then(|i| self.rung.get_mut(i)) {
                Some(r) if r.counter == counter && !due => {}
                Some(r) => *r = Rung { owner: *owner, counter, next },
                None => self.rung.push(Rung { owner: *owner, counter, next }),
            }
            if due {
                demand.ring(*owner)?;
            }
        }
        Ok(())
    }

    pub(super) fn pause(&mut self) -> Duration {
        let now = self.pause;
        let most = if self.begun.elapsed() < YOUNG { POLL_YOUNG } else { POLL_OLD };
        self.pause = (now * 3 / 2).min(most);
        now
    }

    pub(super) fn say_dead(&mut self, id: LockId, owner: Owner) {
        if self.said_dead.is_none_or(|at| at.elapsed() > Duration::from_secs(10)) {
            self.said_dead = Some(Instant::now());
            let name = self.manager.name_of(owner);
            log::warn!(
                "waiting for the {} lock at block {}: its owner, host \"{name}\" ({owner}), is dead and not recovered",
                id.kind.name(),
                id.at
            );
        }
    }
}
