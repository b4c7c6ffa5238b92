//! The lease of this host and the one door through which its I/O passes.
//!
//! * The lease runs from the *issue* of the last beat that landed. Once it ended it stays ended, whatever
//!   answer still comes: a lease that could be revived by a late answer would let this host write after
//!   others took what it held.
//! * Upper rooms get the device only as a [`Door`]. The thread that issues a command checks the lease just
//!   before, and again after completion before anything is answered.
//! * What no user-space check can close (a pause between the check and the system call, a write that sits
//!   in a path below us) is what the hold time and, where a target has them, reservations are for
//!   (`docs/locking.md`).
//!
//! Not for: beating (`heartbeat`), deciding that others are dead, or retrying.

mod counts;
mod door;
mod forgetful;
mod timing;
mod unflushed;

pub use counts::{CommandCounts, IoClass};
pub use door::Door;
pub use timing::{Timing, TimingSummary};

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::rt::planted::{Bug, is_planted};
use crate::rt::{Condvar, Instant, Mutex};

/// Whether this host may touch the volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LeaseState {
    /// Before the slot is claimed: reading is allowed, nothing is held.
    Unclaimed,
    /// Until the instant given.
    Running { until: Instant },
    /// For good.
    Ended,
}

/// What kind of end a lease came to; each is an exit status of the daemon of its own (`docs/recovery.md`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EndCause {
    /// This host gave the volume back.
    Left,
    /// No beat landed in time, and the device did not say why: this host stood still or starved, or the device hangs.
    Silence,
    /// No beat landed in time because the device answered them with errors.
    DeviceFailed,
    /// This host could not keep its promises and gave up by itself.
    Withdrew,
    /// Another host declared this one dead, or the device refuses it for another host's sake.
    ShutOut,
}

/// Why a lease ended that nobody ended.
const RAN_OUT: &str = "no beat landed within the lease";

/// Shared by the beat thread, which extends it, and every thread that does I/O, which asks it.
pub struct Lease {
    state: Mutex<Inner>,
    changed: Condvar,
    /// A copy of the deadline for the door: nanoseconds since the runtime's origin plus one; 0: unclaimed.
    fast: AtomicU64,
    origin: Instant,
}

struct Inner {
    state: LeaseState,
    reason: Option<String>,
    cause: Option<EndCause>,
    /// What the device said to the last beat, while none landed since.
    beat_failed: Option<String>,
    /// This host gave up by itself: its slot is to say so, that others need not wait for its dead time.
    withdraws: bool,
    /// Told of every deadline, in order.
    observer: Option<DeadlineObserver>,
}

type DeadlineObserver = Box<dyn Fn(Instant) + Send>;

const UNCLAIMED: u64 = 0;
const ENDED: u64 = 1;

impl Default for Lease {
    fn default() -> Self {
        Self::new()
    }
}

impl Lease {
    pub fn new() -> Self {
        Lease {
            state: Mutex::new(Inner {
                state: LeaseState::Unclaimed,
                reason: None,
                cause: None,
                beat_failed: None,
                withdraws: false,
                observer: None,
            }),
            changed: Condvar::new(),
            fast: AtomicU64::new(UNCLAIMED),
            origin: Instant::now(),
        }
    }

    /// A beat issued at `issued` landed: the lease now runs until `issued + lease`. False if it had ended
    /// before: then nothing revives it.
    pub fn extend(&self, issued: Instant, lease: Duration) -> bool {
        let mut inner = self.state.lock();
        let issued = if is_planted(Bug::LeaseFromAnswer) { Instant::now() } else { issued };
        let until = issued + lease;
        match inner.state {
            LeaseState::Ended => return false,
            LeaseState::Running { until: old } if Instant::now() >= old => {
                let reason = "a beat was answered after the lease had ended";
                Self::end_locked(&mut inner, &self.fast, EndCause::Silence, reason);
                self.changed.notify_all();
                return false;
            }
            LeaseState::Running { until: old } if until <= old => return true,
            _ => {}
        }
        inner.state = LeaseState::Running { until };
        inner.beat_failed = None;
        let since_origin = until.saturating_duration_since(self.origin).as_nanos() as u64;
        self.fast.store(since_origin.max(ENDED + 1), Ordering::Release);
        if let Some(observer) = &inner.observer {
            observer(until);
        }
        self.changed.notify_all();
        true
    }

    /// Tells `observer` of the present deadline and of each later one. It must return at once and not call back:
    /// the beat waits for it. The end of a lease is told by [`Lease::wait_for_end`].
    pub fn observe_deadlines(&self, observer: impl Fn(Instant) + Send + 'static) {
        let mut inner = self.state.lock();
        if let LeaseState::Running { until } = inner.state {
            observer(until);
        }
        inner.observer = Some(Box::new(observer));
    }

    /// The device answered a beat with this error. The lease goes on; if it runs out, that was why.
    pub fn beat_failed(&self, error: &str) {
        self.state.lock().beat_failed = Some(error.to_owned());
    }

    /// Ends the lease for good. The first reason counts.
    pub fn end(&self, cause: EndCause, reason: &str) {
        let mut inner = self.state.lock();
        if inner.state != LeaseState::Ended {
            Self::end_locked(&mut inner, &self.fast, cause, reason);
        }
        self.changed.notify_all();
    }

    /// Ends the lease because this host can't keep its promises although it could go on beating. Called on a
    /// lease that had ended before it changes nothing.
    pub fn withdraw(&self, reason: &str) {
        let mut inner = self.state.lock();
        if inner.state != LeaseState::Ended {
            inner.withdraws = true;
            Self::end_locked(&mut inner, &self.fast, EndCause::Withdrew, reason);
        }
        self.changed.notify_all();
    }

    /// Did the lease end by [`Lease::withdraw`]?
    pub fn withdraws(&self) -> bool {
        self.state.lock().withdraws
    }

    fn end_locked(inner: &mut Inner, fast: &AtomicU64, cause: EndCause, reason: &str) {
        let ran_out = matches!(inner.state, LeaseState::Running { until } if Instant::now() >= until);
        inner.state = LeaseState::Ended;
        // Whoever says it first: a lease that had run out ended by that. Giving up and leaving say more.
        let ran_out =
            ran_out && matches!(cause, EndCause::Silence | EndCause::DeviceFailed | EndCause::ShutOut);
        let (cause, reason) = match inner.beat_failed.take() {
            Some(error) if ran_out => {
                (EndCause::DeviceFailed, format!("{RAN_OUT}; the device's last answer: {error}"))
            }
            // Who notices it last says what he found; that comes of it.
            _ if ran_out && reason != RAN_OUT => (EndCause::Silence, format!("{RAN_OUT}; {reason}")),
            _ => (cause, reason.to_owned()),
        };
        (inner.cause, inner.reason) = (Some(cause), Some(reason));
        // Against the count of changes under way (see `Door::changes_are_over`): one of the two sees the other.
        fast.store(ENDED, Ordering::SeqCst);
    }

    /// May a command be issued, or its answer be used, now?
    pub fn allows(&self) -> bool {
        match self.fast.load(Ordering::SeqCst) {
            UNCLAIMED => true,
            _ if is_planted(Bug::LeaseIgnored) => true,
            ENDED => false,
            until_ns => (Instant::now().saturating_duration_since(self.origin).as_nanos() as u64) < until_ns,
        }
    }

    pub fn state(&self) -> LeaseState {
        self.state.lock().state
    }

    /// Why the lease ended.
    pub fn reason(&self) -> Option<String> {
        self.state.lock().reason.clone()
    }

    /// What kind of end it came to; also of a lease that ran out a moment ago, which nobody noticed yet.
    pub fn cause(&self) -> Option<EndCause> {
        let inner = self.state.lock();
        match inner.state {
            LeaseState::Running { until } if Instant::now() >= until => {
                Some(inner.beat_failed.as_ref().map_or(EndCause::Silence, |_| EndCause::DeviceFailed))
            }
            _ => inner.cause,
        }
    }

    /// Blocks until the lease ends, by its deadline or by [`Lease::end`]. Takes no other lock and does no
    /// I/O, so that nothing can keep it from noticing.
    pub fn wait_for_end(&self) -> String {
        let mut inner = self.state.lock();
        loop {
            match inner.state {
                LeaseState::Ended => return inner.reason.clone().unwrap_or_default(),
                LeaseState::Unclaimed => inner = self.changed.wait(inner),
                LeaseState::Running { until } => {
                    if Instant::now() >= until {
                        Self::end_locked(&mut inner, &self.fast, EndCause::Silence, RAN_OUT);
                        self.changed.notify_all();
                    } else {
                        inner = self.changed.wait_until(inner, until).0;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_deadline_is_told() {
        let lease = Lease::new();
        let (told, heard) = std::sync::mpsc::channel();
        let start = Instant::now();
        let span = Duration::from_secs(60);
        lease.extend(start, span);
        lease.observe_deadlines(move |until| told.send(until).expect("somebody listens"));
        lease.extend(start + span, span);
        // Not later than what was told: nothing new.
        lease.extend(start, span);
        lease.end(EndCause::Left, "test");
        lease.extend(start + span * 2, span);
        assert_eq!(heard.try_iter().collect::<Vec<_>>(), [start + span, start + span * 2]);
    }

    #[test]
    fn why_it_ended_is_known() {
        let ended = |run_out: bool, failed: bool, end: &dyn Fn(&Lease)| {
            let lease = Lease::new();
            lease.extend(Instant::now(), Duration::from_millis(if run_out { 1 } else { 60_000 }));
            if failed {
                lease.beat_failed("EIO");
            }
            if run_out {
                crate::rt::sleep(Duration::from_millis(2));
            }
            end(&lease);
            (lease.cause().expect("it ended"), lease.wait_for_end())
        };
        let shut_out = |lease: &Lease| lease.end(EndCause::ShutOut, "declared dead");
        let (cause, reason) = ended(true, true, &|_| ());
        assert_eq!(cause, EndCause::DeviceFailed);
        assert!(reason.ends_with("last answer: EIO"), "{reason}");
        assert_eq!(ended(true, false, &|_| ()).0, EndCause::Silence);
        assert_eq!(ended(false, true, &shut_out), (EndCause::ShutOut, "declared dead".into()));
        // A host that slept notices much at once; that it slept comes first.
        assert_eq!(ended(true, false, &shut_out).0, EndCause::Silence);
        assert_eq!(ended(true, true, &|lease| lease.withdraw("no commit")).0, EndCause::Withdrew);
        // An error that a later beat made good says nothing.
        let lease = Lease::new();
        lease.extend(Instant::now(), Duration::from_secs(60));
        lease.beat_failed("EIO");
        lease.extend(Instant::now() + Duration::from_millis(1), Duration::from_secs(60));
        assert_eq!(lease.state.lock().beat_failed, None);
    }

    #[test]
    fn a_late_answer_revives_nothing() {
        let lease = Lease::new();
        assert!(lease.allows());
        assert!(lease.extend(Instant::now(), Duration::from_secs(60)));
        assert!(lease.allows());
        lease.end(EndCause::Left, "test");
        assert!(!lease.allows());
        assert!(!lease.extend(Instant::now(), Duration::from_secs(60)));
        assert!(!lease.allows());
        assert_eq!(lease.reason().as_deref(), Some("test"));
        let lease = Lease::new();
        let long_ago = Instant::now();
        assert!(lease.extend(long_ago, Duration::from_millis(1)));
        crate::rt::sleep(Duration::from_millis(2));
        assert!(!lease.allows());
        assert!(!lease.extend(Instant::now(), Duration::from_secs(60)));
    }
}
