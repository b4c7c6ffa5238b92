//! The doors of `rt` into the simulation: each answers for a simulated thread and declines for any
//! other, so that `rt` itself needs to know nothing of scheduling.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub use super::core::is_simulated;
use super::core::{in_event, wait_for, with_current};
use super::rng::mix;
use super::state::State;
pub use super::wait::WaitPoint;
use crate::rt::HostTag;
use crate::rt::clock::nanos_of;

/// Virtual time begins here on the wall: 2033-05-18.
const WALL_EPOCH_NANOS: u64 = 2_000_000_000 * 1_000_000_000;
/// Clocks of simulated hosts were booted up to this long ago.
const MAX_UPTIME_NANOS: u64 = 1_000_000 * 1_000_000_000;
/// Their wall clocks are off by up to this, either way.
const MAX_SKEW_NANOS: u64 = 3 * 1_000_000_000;
/// The harness and events see a clock that began this much earlier, so that subtracting works.
const HARNESS_UPTIME_NANOS: u64 = 3600 * 1_000_000_000;

/// Now on the boot clock of the calling thread's host.
pub fn boot_nanos() -> Option<u64> {
    let host = current_host();
    with_current(|me| {
        let state = me.core.lock();
        state.now + boot_origin(&state, host)
    })
}

/// How far ahead of virtual time the boot clock of `host` is.
pub fn boot_origin(state: &State, host: Option<HostTag>) -> u64 {
    match host {
        Some(host) if state.options.host_clocks => {
            HARNESS_UPTIME_NANOS + mix(state.seed ^ mix(u64::from(host.0) + 1)) % MAX_UPTIME_NANOS
        }
        _ => HARNESS_UPTIME_NANOS,
    }
}

pub fn wall_nanos() -> Option<u64> {
    let host = current_host();
    with_current(|me| {
        let state = me.core.lock();
        let skew = match host {
            Some(host) if state.options.host_clocks => {
                mix(state.seed ^ mix(u64::from(host.0) + 0x1_0000)) % (2 * MAX_SKEW_NANOS)
            }
            _ => MAX_SKEW_NANOS,
        };
        WALL_EPOCH_NANOS + state.now + skew - MAX_SKEW_NANOS
    })
}

pub fn random_u64() -> Option<u64> {
    with_current(|me| me.core.lock().user_rng.next_u64())
}

#[track_caller]
pub fn sleep(span: Duration) -> bool {
    let wait = wait_for("the end of", "a sleep");
    with_current(|me| {
        me.check_cancelled();
        if me.is_cancelled() {
            // A sleep in a drop while all are unwound: no time is left to pass.
            me.give_way();
        } else {
            me.block(wait, None, Some(nanos_of(span)), || {});
        }
        me.check_cancelled();
    })
    .is_some()
}

/// Half of the yields also let a little time pass, so that a loop that polls the clock gets on.
#[track_caller]
pub fn yield_now() -> bool {
    let wait = wait_for("its turn after", "a yield");
    with_current(|me| {
        me.check_cancelled();
        let pause = me.core.lock().schedule_rng.below(2) == 0;
        if pause && !me.is_cancelled() {
            me.block(wait, None, Some(1_000), || {});
        } else {
            me.give_way();
        }
        me.check_cancelled();
    })
    .is_some()
}

pub fn current_host() -> Option<HostTag> {
    if in_event() {
        return None;
    }
    with_current(|me| me.core.lock().thread(me.tid).host).flatten()
}

/// A lock is about to be taken: a chance for others, and where a cancelled thread stops.
pub fn before_lock() {
    with_current(|me| {
        me.check_cancelled();
        me.toss_coin();
        me.check_cancelled();
    });
}

/// A lock was released; never unwinds, because it runs in drops.
pub fn after_unlock() {
    with_current(|me| me.toss_coin());
}

/// The thread was cancelled or its host was killed before it returned anything.
#[derive(Debug)]
pub struct Killed;

/// A simulated thread's end.
pub struct SimJoin<T> {
    outcome: Arc<Outcome<T>>,
}

struct Outcome<T> {
    /// Those who wait for the end; also woken when the thread's host is killed.
    point: WaitPoint,
    value: Mutex<Option<T>>,
    ended: AtomicBool,
    tid: Mutex<Option<super::thread::Tid>>,
}

impl<T> SimJoin<T> {
    #[track_caller]
    pub fn join(self) -> std::thread::Result<T> {
        let wait = wait_for("the end of", "a thread");
        with_current(|me| {
            me.check_cancelled();
            while !self.is_finished() {
                self.outcome.point.wait(me, wait);
                if me.is_cancelled() {
                    // A drop while all are unwound: it has had its chance, and goes on without.
                    break;
                }
            }
        });
        let mut value = self.outcome.value.lock().unwrap_or_else(PoisonError::into_inner);
        value.take().ok_or_else(|| Box::new(Killed) as Box<dyn std::any::Any + Send>)
    }

    /// Has the thread ended, or will it never?
    pub fn is_finished(&self) -> bool {
        let tid = *self.outcome.tid.lock().unwrap_or_else(PoisonError::into_inner);
        let killed = tid.and_then(|tid| with_current(|me| me.core.lock().is_killed(tid)));
        self.outcome.ended.load(Relaxed) || killed == Some(true)
    }
}

/// Marks the end even if the thread unwinds.
struct Ended<T>(Arc<Outcome<T>>);

impl<T> Drop for Ended<T> {
    fn drop(&mut self) {
        self.0.ended.store(true, Relaxed);
    }
}

#[track_caller]
pub fn spawn<T, F>(name: &str, f: F) -> std::io::Result<SimJoin<T>>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    let point = WaitPoint::new();
    let queue = point.id();
    let outcome = Arc::new(Outcome {
        point,
        value: Mutex::new(None),
        ended: AtomicBool::new(false),
        tid: Mutex::new(None),
    });
    let ended = Ended(outcome.clone());
    let body = Box::new(move || {
        let value = f();
        *ended.0.value.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
    });
    let host = current_host();
    let spawned = with_current(|me| {
        me.check_cancelled();
        me.core.spawn(name, host, queue, body)
    });
    let Some(tid) = spawned else { return Err(std::io::Error::other("not in a simulation")) };
    *outcome.tid.lock().unwrap_or_else(PoisonError::into_inner) = Some(tid?);
    // Who goes first is always open: starting a thread takes its time.
    with_current(|me| me.give_way());
    Ok(SimJoin { outcome })
}
