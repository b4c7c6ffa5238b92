//! Every duration of this backend, in one place, and the hold time that follows.
//!
//! ```text
//!  0 s  a write is asked for (its issuer looked at its lease just before)
//!  3 s  SEND: what has not been handed to the network by now never is, whatever stopped this process
//!  6 s  ANSWER: without an answer the connection is closed by a reset, which drops what it still held
//!  8 s  KERNEL: a kernel that can't deliver gives up (TCP_USER_TIMEOUT), also of a process that was stopped
//! 10 s  TARGET: a target has executed what it took in, or dropped it
//! ```
//!
//! The sum is the hold time that this backend publishes: the others wait so much longer before they call this host
//! dead. Where a command can be when its host gives up, and what ends it there:
//!
//! | where | what ends it |
//! | --- | --- |
//! | in this backend, not handed to libiscsi | its `send_until`; nothing is handed over after it |
//! | in libiscsi's queue | the batch's `send_until` ([`super::event_loop`]); if this process is stopped while libiscsi sends, the kernel kills it 3 s later ([`super::deadman`]): 6 s in all, as for an answer |
//! | in this kernel's socket | closing resets, which drops it: at `ANSWER` at the latest, or when the process ends. A process that is stopped elsewhere doesn't close: then it goes out as fast as the target takes it, or is given up after `KERNEL` |
//! | in the target's socket, or in its queue | a reset, where the target looks at it before the data; a login under the session's name, on each target tried; else nothing but the target's pace |
//!
//! The last step is no more than a demand on the target: nothing that a host can do bounds how long a target
//! sits on a command that it took in. Only a reservation does. A login under the old name ends everything at once, but it has
//! to come from the host that sent it: so a host makes its own writes again after one, and others wait.
//!
//! A compare-and-write may come at any time without harm (its image is compared), so it is given up early, and the
//! block is read: a beat that lost its answer must be decided within a lease.

use std::time::Duration;

pub const SEND: Duration = Duration::from_secs(3);
pub const ANSWER: Duration = Duration::from_secs(6);
pub const KERNEL: Duration = Duration::from_secs(2);
const TARGET: Duration = Duration::from_secs(2);
/// See above.
pub const HOLD: Duration = ANSWER.saturating_add(KERNEL).saturating_add(TARGET);

/// A compare-and-write is unknown after this; the shortest lease is two seconds.
pub const SWAP: Duration = Duration::from_millis(1200);
/// One try of a read of a block; a lost answer must not hold up who reads a lock.
pub const SMALL_READ: Duration = Duration::from_millis(1200);
/// All tries of a read. Longer than any lease: who waits for a device is ended by the lease.
pub const READ: Duration = Duration::from_secs(60);
/// A flush can move a whole cache to the medium.
pub const FLUSH: Duration = Duration::from_secs(30);
/// Reservations, and looking at a target.
pub const ADMIN: Duration = Duration::from_secs(5);

/// From the name of a portal to a session.
pub const LOGIN: Duration = Duration::from_secs(5);
/// Pauses between tries to log in again.
pub const RETRY_FIRST: Duration = Duration::from_millis(50);
pub const RETRY_LONGEST: Duration = Duration::from_secs(1);
/// A thread that was asleep for so much longer than it wanted was stopped, or starved.
pub const STALL: Duration = Duration::from_secs(1);
