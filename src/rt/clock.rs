//! Time: a clock that never stands still, the wall clock, and sleeping.
//!
//! Invariant: [`Instant`] follows `CLOCK_BOOTTIME`, which also runs while the machine is suspended,
//! because a lease goes on then. In a simulation every host has a boottime of its own (another
//! origin), so instants of two hosts can't be compared there, as they can't be in life.
//!
//! Not for comparing clocks of two hosts; nothing in LunFS may do that.

use std::ops::{Add, Sub};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use super::sim::hooks;

const NANOS_PER_SEC: u64 = 1_000_000_000;

/// A point in time of this host: nanoseconds since its boot. Arithmetic saturates.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Instant(u64);

impl Instant {
    pub fn now() -> Self {
        match hooks::boot_nanos() {
            Some(nanos) => Instant(nanos),
            None => Instant(os_clock(ClockId::CLOCK_BOOTTIME)),
        }
    }

    /// The instant `nanos` after the origin of this host's clock.
    pub const fn from_nanos(nanos: u64) -> Self {
        Instant(nanos)
    }

    /// Nanoseconds since the origin of this host's clock.
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// Time from this instant until now; zero if it lies ahead.
    pub fn elapsed(self) -> Duration {
        Self::now().saturating_duration_since(self)
    }

    /// Time from `earlier` to this instant; zero if `earlier` is later.
    pub fn saturating_duration_since(self, earlier: Instant) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// Time from `earlier` to this instant; None if `earlier` is later.
    pub fn checked_duration_since(self, earlier: Instant) -> Option<Duration> {
        self.0.checked_sub(earlier.0).map(Duration::from_nanos)
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;
    fn add(self, span: Duration) -> Instant {
        Instant(self.0.saturating_add(nanos_of(span)))
    }
}

impl Sub<Duration> for Instant {
    type Output = Instant;
    fn sub(self, span: Duration) -> Instant {
        Instant(self.0.saturating_sub(nanos_of(span)))
    }
}

/// Seconds and nanoseconds since 1970 as this host's wall clock sees them; for inode times only.
pub fn wall_clock() -> (i64, u32) {
    let nanos = hooks::wall_nanos().unwrap_or_else(|| os_clock(ClockId::CLOCK_REALTIME));
    ((nanos / NANOS_PER_SEC) as i64, (nanos % NANOS_PER_SEC) as u32)
}

/// Stops this thread for at least `span`.
#[track_caller]
pub fn sleep(span: Duration) {
    if !hooks::sleep(span) {
        std::thread::sleep(span);
    }
}

/// A duration in nanoseconds; five centuries and more count as for ever.
pub(crate) fn nanos_of(span: Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}

fn os_clock(clock: ClockId) -> u64 {
    let Ok(time) = clock_gettime(clock) else {
        // Without a clock a host can't know whether it still has its lease, so it must not go on.
        eprintln!("lunfs: clock_gettime failed: there is no boot time clock");
        std::process::abort();
    };
    (time.tv_sec().max(0) as u64) * NANOS_PER_SEC + time.tv_nsec() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instants_saturate_and_order() {
        let a = Instant::now();
        let b = a + Duration::from_secs(5);
        assert!(b > a);
        assert_eq!(b.saturating_duration_since(a), Duration::from_secs(5));
        assert_eq!(a.saturating_duration_since(b), Duration::ZERO);
        assert_eq!(a.checked_duration_since(b), None);
        assert_eq!(Instant::from_nanos(3) - Duration::from_secs(1), Instant::from_nanos(0));
        assert_eq!(b - Duration::from_secs(5), a);
        assert_eq!(a + Duration::MAX, Instant::from_nanos(u64::MAX));
    }

    #[test]
    fn os_sleep_takes_its_time() {
        let start = Instant::now();
        sleep(Duration::from_millis(2));
        assert!(start.elapsed() >= Duration::from_millis(2));
        assert!(wall_clock().0 > 1_600_000_000);
    }
}
