//! Where simulated threads wait: the part of a lock or condition variable that the scheduler knows.
//!
//! Invariants: a point is known by a number that is only ever compared, never ordered or hashed, so
//! runs don't depend on how many points exist elsewhere in the process; outside a simulation a point
//! costs one load when a lock is released and nothing when it is taken.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use super::core::{Current, in_event, wait_for, with_current};
use super::thread::{Tid, Wait};
use crate::rt::clock::nanos_of;

/// Held by nobody, or by a thread that isn't simulated.
const NOBODY: Tid = Tid::MAX;

/// Part of each lock and condition variable.
pub struct WaitPoint {
    /// 0 until the first wait.
    id: AtomicU64,
    waiters: AtomicU32,
    /// The thread that took it last, for reports.
    holder: AtomicU32,
}

impl WaitPoint {
    pub const fn new() -> Self {
        WaitPoint { id: AtomicU64::new(0), waiters: AtomicU32::new(0), holder: AtomicU32::new(NOBODY) }
    }

    /// The queue of this point.
    pub fn id(&self) -> u64 {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let id = self.id.load(Relaxed);
        if id != 0 {
            return id;
        }
        let fresh = NEXT.fetch_add(1, Relaxed);
        match self.id.compare_exchange(0, fresh, Relaxed, Relaxed) {
            Ok(_) => fresh,
            Err(other) => other,
        }
    }

    /// A lock was taken by the calling thread.
    pub fn taken(&self) {
        with_current(|me| self.holder.store(me.tid, Relaxed));
    }

    /// A lock was released: whoever waits may try again.
    pub fn released(&self) {
        if self.waiters.load(Relaxed) > 0 {
            with_current(|me| me.core.lock().wake(self.id(), true));
        }
    }

    /// Waits until the lock may be free.
    #[track_caller]
    pub fn wait_for_release(&self, what: &'static str, of: &'static str) {
        let mut wait = wait_for(what, of);
        wait.holder = Some(self.holder.load(Relaxed)).filter(|holder| *holder != NOBODY);
        with_current(|me| self.wait(me, wait));
    }

    /// Waits in this point's queue, for as long as it takes.
    pub fn wait(&self, me: &Current, wait: Wait) {
        self.block(me, wait, None, || {});
        me.check_cancelled();
    }

    /// Waits in this point's queue; true if the time ran out.
    pub fn wait_limited(&self, me: &Current, wait: Wait, limit: Option<Duration>) -> bool {
        let timed_out = self.block(me, wait, limit.map(nanos_of), || {});
        me.check_cancelled();
        timed_out
    }

    /// Waits for a notification; true if the time ran out first. `release` lets go of the mutex.
    #[track_caller]
    pub fn wait_for_notify(&self, span: Option<Duration>, of: &'static str, release: impl FnOnce()) -> bool {
        let wait = wait_for("a notification about", of);
        with_current(|me| {
            me.check_cancelled();
            let spurious = {
                let mut state = me.core.lock();
                let probability = state.options.spurious;
                state.schedule_rng.chance(probability)
            };
            if spurious {
                release();
                me.give_way();
                me.check_cancelled();
                return false;
            }
            let timed_out = self.block(me, wait, span.map(nanos_of), release);
            me.check_cancelled();
            timed_out && span.is_some()
        })
        .unwrap_or(false)
    }

    /// Wakes one or all of those who wait for a notification; never unwinds.
    pub fn notify(&self, all: bool) {
        with_current(|me| {
            if self.waiters.load(Relaxed) > 0 {
                me.core.lock().wake(self.id(), all);
            }
            if !in_event() {
                me.toss_coin();
            }
        });
    }

    fn block(&self, me: &Current, wait: Wait, timeout: Option<u64>, release: impl FnOnce()) -> bool {
        self.waiters.fetch_add(1, Relaxed);
        let timed_out = me.block(wait, Some(self.id()), timeout, release);
        self.waiters.fetch_sub(1, Relaxed);
        timed_out
    }
}
