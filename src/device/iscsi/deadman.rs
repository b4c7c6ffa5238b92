//! A timer of the kernel that kills this process if it is stopped in the middle of sending.
//!
//! libiscsi sends many commands and megabytes of data in one call, and no look at the clock before it helps if the process
//! is stopped inside (SIGSTOP, a debugger, a virtual machine's pause): continued after an hour it would send the
//! rest, long after the others took this host for dead. Nothing but the kernel acts while a process is stopped. So a
//! timer runs through each such call; when it ends, the kernel kills the process, also a stopped one, and resets its
//! connections, which drops what they still held.

use std::time::Duration;

use nix::sys::signal::{SigEvent, SigevNotify, Signal};
use nix::sys::time::TimeSpec;
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;

/// The timer of one connection.
pub struct Deadman(Timer);

impl Deadman {
    pub fn new() -> nix::Result<Deadman> {
        let kill = SigevNotify::SigevSignal { signal: Signal::SIGKILL, si_value: 0 };
        // Goes on while the machine sleeps.
        Timer::new(ClockId::CLOCK_BOOTTIME, SigEvent::new(kill)).map(Deadman)
    }

    fn set(&mut self, span: Duration) -> nix::Result<()> {
        self.0.set(Expiration::OneShot(TimeSpec::from_duration(span)), TimerSetTimeFlags::empty())
    }

    /// From now on this process has so long to come to [`Deadman::rest`].
    pub fn arm(&mut self, span: Duration) -> nix::Result<()> {
        self.set(span)
    }

    pub fn rest(&mut self) -> nix::Result<()> {
        self.set(Duration::ZERO)
    }
}
