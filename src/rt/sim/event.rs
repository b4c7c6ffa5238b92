//! Events and completions: what simulated hardware is made of.
//!
//! An event runs at its time whether or not the thread that caused it still lives. It runs between
//! two threads' turns, sees everything at rest, and must not block.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::core::{in_event, wait_for, with_current};
use super::report::Reporter;
use super::thread::Tid;
use super::timer::Action;
use super::trace::Happening;
use super::wait::WaitPoint;
use crate::rt::clock::nanos_of;

/// A simulated thread, as [`this_thread`] names it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ThreadTag(Tid);

/// Virtual time since the simulation began; None outside of one. Independent of any host's clock.
pub fn now() -> Option<Duration> {
    with_current(|me| Duration::from_nanos(me.core.lock().now))
}

/// The calling thread; None outside a simulation and in an event.
pub fn this_thread() -> Option<ThreadTag> {
    if in_event() { None } else { with_current(|me| ThreadTag(me.tid)) }
}

/// Has the thread's host been killed under it?
pub fn is_killed(thread: ThreadTag) -> bool {
    with_current(|me| me.core.lock().is_killed(thread.0)).unwrap_or(false)
}

/// Is the run over, so that the calling thread is only being unwound?
pub fn is_over() -> bool {
    with_current(|me| me.is_cancelled()).unwrap_or(false)
}

/// Runs `event` after `delay` of virtual time. A panic in it fails the run. It may kill, freeze and
/// thaw hosts and do things to a simulated LUN; it belongs to no host.
pub fn after(delay: Duration, event: impl FnOnce() + Send + 'static) {
    with_current(|me| me.core.lock().add_timer(nanos_of(delay), Action::Event(Box::new(event))));
}

/// Makes a number part of the run's fingerprint, such as a hash of a command.
pub fn mark(hash: u64) {
    with_current(|me| {
        let mut state = me.core.lock();
        state.note(me.tid, Happening::Mark(hash));
    });
}

/// Adds a report that is printed should the run fail.
pub fn on_failure(name: &str, reporter: Reporter) {
    with_current(|me| me.core.lock().reporters.push((name.to_owned(), reporter)));
}

/// Something that will be answered later, once, by an event or another thread.
pub struct Completion<T> {
    point: WaitPoint,
    value: Mutex<Option<T>>,
}

impl<T> Completion<T> {
    pub const fn new() -> Self {
        Completion { point: WaitPoint::new(), value: Mutex::new(None) }
    }

    /// Answers; the first answer counts.
    pub fn complete(&self, value: T) {
        let mut slot = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none() {
            *slot = Some(value);
        }
        drop(slot);
        self.point.released();
    }

    /// Waits for the answer, at most for `limit`; None if it did not come, or if the run is over.
    #[track_caller]
    pub fn wait(&self, what: &'static str, limit: Option<Duration>) -> Option<T> {
        let wait = wait_for("an answer to", what);
        loop {
            if let Some(value) = self.value.lock().unwrap_or_else(PoisonError::into_inner).take() {
                return Some(value);
            }
            let again = with_current(|me| {
                me.check_cancelled();
                if me.is_cancelled() {
                    return false;
                }
                !self.point.wait_limited(me, wait, limit)
            });
            if again != Some(true) {
                return self.value.lock().unwrap_or_else(PoisonError::into_inner).take();
            }
        }
    }
}

impl<T> Default for Completion<T> {
    fn default() -> Self {
        Completion::new()
    }
}
