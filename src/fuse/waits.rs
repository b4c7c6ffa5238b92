//! Requests that wait for another host, and what ends their wait early.
//!
//! * **The end of the mount** ends all of them.
//! * **A signal that kills** ends the wait of the thread that got it: nobody should have to wait for another host to be
//!   rid of a process. Any other signal doesn't: on a local filesystem these calls are not interrupted either, and
//!   programs that use signals for their own purposes don't expect `EINTR` of a rename.
//!
//! The kernel says once only that a waiting thread has a signal (INTERRUPT), and not which; the deadly one may come
//! later. So whoever was announced once is looked at until it is answered.
//!
//! An INTERRUPT may arrive before its request has begun to wait, or when that was answered long ago. Numbers of requests
//! that nobody waits for are kept a while ([`EARLY`]), and forgotten without harm.
//!
//! Not for: requests that wait for a device only. They end with it, or with the lease.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::request::Caller;

/// Announced signals of requests that were not found, kept at most.
const EARLY: usize = 1024;
/// Between two looks at threads that were sent a signal.
const LOOK: Duration = Duration::from_millis(20);

struct Wait {
    unique: u64,
    thread: u32,
    signalled: bool,
    give_up: Arc<AtomicBool>,
}

#[derive(Default)]
struct State {
    ending: bool,
    last: u64,
    waits: HashMap<u64, Wait>,
    early: VecDeque<u64>,
    watched: bool,
}

/// Whether a thread is about to be killed; a door for tests.
type IsDying = fn(u32) -> bool;

struct Shared {
    state: Mutex<State>,
    is_dying: IsDying,
}

/// The waiting requests of one mount. Clones share it.
#[derive(Clone)]
pub struct Waits {
    shared: Arc<Shared>,
}

/// While it lives its request waits.
pub struct Waiting {
    waits: Waits,
    key: u64,
    give_up: Arc<AtomicBool>,
}

impl Waiting {
    /// Set when the request is to give up.
    pub fn give_up(&self) -> Arc<AtomicBool> {
        self.give_up.clone()
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.waits.lock().waits.remove(&self.key);
    }
}

impl Default for Waits {
    fn default() -> Waits {
        Waits::new(is_dying)
    }
}

impl Waits {
    fn new(is_dying: IsDying) -> Waits {
        Waits { shared: Arc::new(Shared { state: Mutex::default(), is_dying }) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The request of this number, of this caller, begins to wait.
    pub fn begin(&self, unique: u64, caller: Caller) -> Waiting {
        let mut state = self.lock();
        let give_up = Arc::new(AtomicBool::new(state.ending));
        let signalled = state.early.contains(&unique);
        state.early.retain(|early| *early != unique);
        state.last += 1;
        let key = state.last;
        let wait = Wait { unique, thread: caller.pid, signalled, give_up: give_up.clone() };
        state.waits.insert(key, wait);
        drop(state);
        if signalled {
            self.look();
        }
        Waiting { waits: self.clone(), key, give_up }
    }

    /// The thread that asked for this was sent a signal.
    pub fn signalled(&self, unique: u64) {
        let mut state = self.lock();
        match state.waits.values_mut().find(|wait| wait.unique == unique) {
            Some(wait) => wait.signalled = true,
            None => {
                state.early.push_back(unique);
                if state.early.len() > EARLY {
                    state.early.pop_front();
                }
                return;
            }
        }
        drop(state);
        self.look();
    }

    /// All give up, and whoever begins to wait from now on.
    pub fn end(&self) {
        let mut state = self.lock();
        state.ending = true;
        state.waits.values().for_each(|wait| wait.give_up.store(true, Ordering::Release));
    }

    /// One look at those who were sent a signal. Is there somebody to be looked at again?
    fn look_once(&self) -> bool {
        let mut state = self.lock();
        let mut again = false;
        for wait in state.waits.values_mut().filter(|wait| wait.signalled) {
            match (self.shared.is_dying)(wait.thread) {
                true => {
                    wait.signalled = false;
                    wait.give_up.store(true, Ordering::Release);
                }
                false => again = true,
            }
        }
        state.watched &= again;
        again
    }

    fn look(&self) {
        if !self.look_once() {
            return;
        }
        if std::mem::replace(&mut self.lock().watched, true) {
            return;
        }
        let me = self.clone();
        let started = crate::rt::try_spawn("lunfs-signalled", move || {
            while me.look_once() {
                crate::rt::sleep(LOOK);
            }
        });
        if let Err(error) = started {
            log::warn!("a process that waits may not die at once: {error}");
            self.lock().watched = false;
        }
    }
}

/// Is this thread to die as soon as it gets back from the kernel? Linux gives each thread of a process that a signal
/// kills a SIGKILL of its own (`complete_signal` in kernel/signal.c). A thread that we can't see (of a process that is
/// gone, or of a namespace beyond ours) counts as dying: better an `EINTR` than a wait that nobody can end.
fn is_dying(thread: u32) -> bool {
    let Ok(status) = std::fs::read_to_string(format!("/proc/{thread}/status")) else { return true };
    let kill = 1u64 << (libc::SIGKILL - 1);
    let pending = |line: &str| {
        let set = line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:"))?;
        u64::from_str_radix(set.trim(), 16).ok()
    };
    status.lines().filter_map(pending).any(|set| set & kill != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pid: u32) -> Caller {
        Caller { pid, ..Caller::default() }
    }

    fn gave_up(waiting: &Waiting) -> bool {
        waiting.give_up.load(Ordering::Acquire)
    }

    fn until(mut condition: impl FnMut() -> bool) {
        let start = std::time::Instant::now();
        while !condition() {
            assert!(start.elapsed() < Duration::from_secs(20));
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn a_deadly_signal_ends_its_own_wait_only() {
        let waits = Waits::new(|thread| thread == 7);
        let (doomed, other) = (waits.begin(2, of(7)), waits.begin(4, of(8)));
        waits.signalled(2);
        assert!(gave_up(&doomed) && !gave_up(&other));
        // One that doesn't kill.
        waits.signalled(4);
        assert!(!gave_up(&other));
        assert!(waits.lock().watched);
        drop(other);
        until(|| !waits.lock().watched);
    }

    #[test]
    fn the_deadly_signal_may_come_after_a_harmless_one() {
        static DYING: AtomicBool = AtomicBool::new(false);
        let waits = Waits::new(|_| DYING.load(Ordering::Acquire));
        let waiting = waits.begin(2, of(7));
        waits.signalled(2);
        assert!(!gave_up(&waiting));
        DYING.store(true, Ordering::Release);
        until(|| gave_up(&waiting));
        until(|| !waits.lock().watched);
        // The next one is looked at as well.
        DYING.store(false, Ordering::Release);
        let next = waits.begin(6, of(7));
        waits.signalled(6);
        DYING.store(true, Ordering::Release);
        until(|| gave_up(&next));
    }

    #[test]
    fn a_signal_that_is_announced_before_the_wait_begins_counts() {
        let waits = Waits::new(|_| true);
        waits.signalled(2);
        let (doomed, other) = (waits.begin(2, of(7)), waits.begin(4, of(7)));
        assert!(gave_up(&doomed) && !gave_up(&other));
        // Announcements of what was answered long ago are forgotten.
        (0..3 * EARLY as u64).for_each(|n| waits.signalled(100 + 2 * n));
        assert_eq!(waits.lock().early.len(), EARLY);
    }

    #[test]
    fn the_end_ends_all_and_whoever_comes_later() {
        let waits = Waits::new(|_| false);
        let early = waits.begin(2, of(7));
        waits.end();
        assert!(gave_up(&early) && gave_up(&waits.begin(4, of(8))));
    }

    #[test]
    fn who_is_alive_is_not_dying_and_who_is_gone_is() {
        assert!(!is_dying(nix::unistd::gettid().as_raw() as u32));
        let mut child = std::process::Command::new("true").spawn().expect("a process");
        let pid = child.id();
        child.wait().expect("it ends");
        assert!(is_dying(pid) && is_dying(0));
    }
}
