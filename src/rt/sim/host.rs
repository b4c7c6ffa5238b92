//! Hosts of a simulation: which threads are whose, and what can befall a host.
//!
//! Invariants: a killed host's threads never run again before the end of the run, where they are
//! unwound after the root has ended; a tag can be used for the host's next life at once. A frozen
//! host's threads don't run, whatever happens to what they wait for; its clocks go on.
//!
//! Not modelled: a killed thread's locks stay locked. That is right for what lives in a host's own
//! memory; a test's own state that several hosts share belongs in `std` locks or atomics held only
//! for an instant, never in a `rt` lock that a killed thread could hold.

use super::core::{in_event, with_current};
use super::hooks::boot_origin;
use super::state::State;
use super::thread::{Status, Tid};
use super::trace::Happening;
use crate::rt::{HostTag, Instant, JoinHandle, spawn};

impl State {
    /// Will this thread never run again?
    pub fn is_killed(&self, tid: Tid) -> bool {
        self.threads.get(tid as usize).is_some_and(|thread| thread.status == Status::Killed)
    }

    fn threads_of(&self, tag: HostTag) -> Vec<Tid> {
        (0..self.threads.len() as Tid).filter(|tid| self.threads[*tid as usize].home == Some(tag)).collect()
    }
}

/// Runs `f` with the clock of host `tag`; what it spawns belongs to the host for good. The calling
/// thread itself stays a visitor: it is neither killed nor frozen with the host.
pub fn on_host<R>(tag: HostTag, f: impl FnOnce() -> R) -> R {
    struct Restore(Option<HostTag>);
    impl Drop for Restore {
        fn drop(&mut self) {
            with_current(|me| me.core.lock().thread(me.tid).host = self.0);
        }
    }
    let before = with_current(|me| me.core.lock().thread(me.tid).host.replace(tag)).flatten();
    let _restore = Restore(before);
    f()
}

/// Starts a thread of host `tag`.
#[track_caller]
pub fn spawn_on<T, F>(tag: HostTag, name: &str, f: F) -> JoinHandle<T>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    on_host(tag, || spawn(name, f))
}

/// The host dies: its threads stop where they are. A thread that joins one of them gets an error.
/// Called by a thread of that very host, it does not return.
pub fn kill_host(tag: HostTag) {
    with_current(|me| {
        let mut state = me.core.lock();
        state.frozen.remove(&tag);
        let mut suicide = false;
        for tid in state.threads_of(tag) {
            if matches!(state.thread(tid).status, Status::Finished | Status::Killed) {
                continue;
            }
            state.runnable.retain(|t| *t != tid);
            state.leave_queue(tid);
            let thread = state.thread(tid);
            thread.status = Status::Killed;
            thread.wait_seq += 1;
            let join_queue = thread.join_queue;
            state.wake(join_queue, true);
            state.note(tid, Happening::Kill);
            // An event runs on a thread that is asleep: that one just won't wake.
            suicide |= tid == me.tid && !in_event();
        }
        drop(state);
        if suicide {
            me.leave();
        }
    });
}

/// The host stands still until it is thawed. Called by a thread of that host, it returns then.
pub fn freeze_host(tag: HostTag) {
    with_current(|me| {
        let mut state = me.core.lock();
        state.frozen.insert(tag);
        state.note(me.tid, Happening::Freeze);
        let mut myself = false;
        for tid in state.threads_of(tag) {
            let status = state.thread(tid).status;
            if matches!(status, Status::Ready | Status::Running) {
                state.runnable.retain(|t| *t != tid);
                state.thread(tid).status = Status::Frozen;
                myself |= status == Status::Running;
            }
        }
        drop(state);
        if myself {
            me.leave();
        }
    });
}

/// The host goes on, as if it had been suspended or starved; timers that are due fire now.
pub fn thaw_host(tag: HostTag) {
    with_current(|me| {
        let mut state = me.core.lock();
        state.frozen.remove(&tag);
        state.note(me.tid, Happening::Thaw);
        for tid in state.threads_of(tag) {
            if state.thread(tid).status == Status::Frozen {
                state.make_ready(tid);
            }
        }
    });
}

/// Is the host frozen?
pub fn is_frozen(tag: HostTag) -> bool {
    with_current(|me| me.core.lock().frozen.contains(&tag)).unwrap_or(false)
}

/// What the boot clock of `tag` shows now, for a harness that judges a host by the host's own clock.
pub fn host_clock(tag: HostTag) -> Instant {
    with_current(|me| {
        let state = me.core.lock();
        Instant::from_nanos(state.now + boot_origin(&state, Some(tag)))
    })
    .unwrap_or_else(Instant::now)
}
