//! The durations of this backend but those that follow from the kernel's settings, which are `hold`'s.

use std::time::Duration;

/// What has not been handed to the kernel this long after it was asked for never is.
pub const SEND: Duration = Duration::from_secs(3);
/// SG_IO's time-out for all but flushes: the shortest that the kernel accepts.
pub const COMMAND: Duration = Duration::from_secs(7);
/// A target has executed what it took in, or dropped it. A demand that only a reservation can enforce.
pub const TARGET: Duration = Duration::from_secs(2);
/// What a hypervisor that never gives a command up is believed to need; see `hold`.
pub const HYPERVISOR: Duration = Duration::from_secs(10);

/// A compare-and-write is unknown after this; the shortest lease is two seconds.
pub const SWAP: Duration = Duration::from_millis(1200);
/// One try of a read of a block; a lost answer must not hold up who reads a lock.
pub const SMALL_READ: Duration = Duration::from_millis(1200);
/// One try of a read of data, where another path could serve.
pub const BULK_READ: Duration = Duration::from_secs(5);
/// All tries of a read. Longer than any lease: who waits for a device is ended by the lease.
pub const READ: Duration = Duration::from_secs(60);
/// Reservations, and looking at a path.
pub const ADMIN: Duration = Duration::from_secs(8);
/// Is a path ready? Asked while others may be used.
pub const READY: Duration = Duration::from_secs(2);

/// How often the keeper of the paths looks at the kernel's view of them.
pub const LOOK: Duration = Duration::from_secs(1);
/// Pauses between looks at a path that does not answer.
pub const RETRY_FIRST: Duration = Duration::from_millis(20);
pub const RETRY_LONGEST: Duration = Duration::from_secs(1);
