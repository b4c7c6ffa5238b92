//! Every duration of the heartbeat, the lease and the verdict "dead", in one place.
//!
//! All of them follow from one number, the time between two beats, by a profile that mkfs writes into
//! the superblock and each host copies into its slot; others judge a host by *its* numbers, never by
//! their own. Invariant: **the owner gives up strictly before anyone may take.**
//!
//! # Timeline (profile `normal`; times in milliseconds; `H` is the hold time of the owner's device)
//!
//! ```text
//!      t  owner                                        another host
//!      0  issues the beat that will be its last to
//!         land; its lease runs from *here*, not from
//!         the answer
//!    0+d  the beat lands                               sees it change not before it landed, so its
//!                                                      wait starts at or after 0+d, on its own clock
//!   1000  next beat due; it does not land
//!   8000  lease over: the door refuses every command;
//!         daemon and guard, each by itself, abort the
//!         FUSE connection and invalidate what the
//!         kernel cached
//!  10000  the kernel is silent
//!  8000+H the device layers below the owner have let go
//!         of the last write it issued
//! 16000+d                                              unchanged for dead_ms
//! 16000+d+H                                            unchanged for dead_ms + hold_ms: may mark the
//!                                                      slot, replay its journal and take its locks
//! ```
//!
//! Why `dead_ms - lease_ms` covers what it must. Between the owner's end of lease and the other's first
//! write lie `dead_ms - lease_ms + d` milliseconds beyond `H`. In them the owner's kernel must fall silent
//! (abort, then one invalidation per cached node): [`KERNEL_SILENCE`]; and the two clocks may have run at
//! different rates: [`CLOCK_DRIFT_PPM`] of `dead_ms` at most. What is left in the longer profiles is room
//! for a machine that is too busy to run its guard at once. It does not matter whether the daemon lives: the
//! guard has the deadline, and a daemon that dies earlier is silenced earlier. A write that hangs below the owner for longer than its published `hold_ms` is not
//! covered by any waiting; only a reservation stops it.
//!
//! Why `lease_ms` is several beats: a beat may be slow or lost without the host giving up; at least
//! [`BEATS_PER_LEASE_MIN`] beats fit into a lease.
//!
//! Not for: reading clocks, or deciding who is dead (`heartbeat`).

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::layout::slot::Durations;

/// Beats that fit into a lease at the least.
pub const BEATS_PER_LEASE_MIN: u32 = 4;
/// How far two hosts' clocks may differ in rate, in parts per million; real ones differ by about 100.
pub const CLOCK_DRIFT_PPM: u64 = 1000;

/// How long a host's kernel may take to fall silent after the lease ended: to wake the guard, to abort, and to
/// drop what was cached. Measured: 15 ms for each ten thousand inodes, and 150 ms for each GiB of pages.
/// A host with more than a dozen GiB of a volume in its page cache wants the room that `normal` leaves beyond.
pub const KERNEL_SILENCE: Duration = Duration::from_millis(2000);

/// A set of durations that mkfs can choose.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Profile {
    /// Quick failover; for arrays whose slowest answer stays far below two seconds, and for tests.
    Fast,
    #[default]
    Normal,
    /// For arrays whose controllers take long to fail over.
    SlowArray,
}

const FAST: Durations = Durations { beat_ms: 250, lease_ms: 2000, dead_ms: 4500, hold_ms: 0 };
const NORMAL: Durations = Durations { beat_ms: 1000, lease_ms: 8000, dead_ms: 16000, hold_ms: 0 };
const SLOW_ARRAY: Durations = Durations { beat_ms: 2000, lease_ms: 20000, dead_ms: 45000, hold_ms: 0 };

/// The rules of the module header; every profile keeps them, proved at compile time.
pub const fn consistent(d: &Durations) -> bool {
    let drift_ms = d.dead_ms as u64 * CLOCK_DRIFT_PPM / 1_000_000 + 1;
    let silence_ms = KERNEL_SILENCE.as_millis() as u64;
    d.beat_ms > 0
        && d.lease_ms >= BEATS_PER_LEASE_MIN * d.beat_ms
        && d.dead_ms > d.lease_ms
        && (d.dead_ms - d.lease_ms) as u64 >= d.lease_ms as u64
        && (d.dead_ms - d.lease_ms) as u64 > drift_ms + silence_ms + d.beat_ms as u64
}

const _: () = assert!(consistent(&FAST));
const _: () = assert!(consistent(&NORMAL));
const _: () = assert!(consistent(&SLOW_ARRAY));

impl Profile {
    pub const ALL: [Profile; 3] = [Profile::Fast, Profile::Normal, Profile::SlowArray];

    /// The profile's durations; the hold time is the device's and is added by the host that mounts.
    pub const fn durations(self) -> Durations {
        match self {
            Profile::Fast => FAST,
            Profile::Normal => NORMAL,
            Profile::SlowArray => SLOW_ARRAY,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            Profile::Fast => "fast",
            Profile::Normal => "normal",
            Profile::SlowArray => "slow-array",
        }
    }
}

/// How long a slot must stay unchanged, on the watcher's own clock, before its host counts as dead.
pub fn dead_after(d: &Durations) -> Duration {
    Duration::from_millis(u64::from(d.dead_ms) + u64::from(d.hold_ms))
}

/// How long a slot must stay unchanged, on the watcher's own clock, before a host that never had it may claim it
/// over a life that nobody fenced. Its journal becomes the claimer's: a write that was issued inside the dead host's
/// lease and held by something that froze with it must have come or gone by then. Waiting proves that less than a
/// fence does, so it is long: nothing but the claim waits for it.
pub fn quarantine_after(d: &Durations) -> Duration {
    dead_after(d) * 4
}

impl FromStr for Profile {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Profile::ALL
            .into_iter()
            .find(|p| p.name() == text)
            .ok_or_else(|| "one of fast, normal and slow-array is possible".into())
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_the_hold_time_counts() {
        for profile in Profile::ALL {
            assert_eq!(profile.to_string().parse(), Ok(profile));
            assert!(consistent(&profile.durations()));
        }
        assert!("quick".parse::<Profile>().is_err());
        let held = Durations { hold_ms: 500, ..Profile::Normal.durations() };
        assert_eq!(dead_after(&held), Duration::from_millis(16500));
        assert!(!consistent(&Durations { lease_ms: 9000, ..Profile::Normal.durations() }));
    }
}
