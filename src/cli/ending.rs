//! How a mount's daemon ended: its exit status, and the last line of its log, which says the same where nobody sees
//! the status.
//!
//! Scripts and service managers decide by the number what is to be done, so each kind of end has one of its own, and
//! a number never changes its meaning (`docs/recovery.md`). Not for: why a mount was not made (mount(8) has statuses
//! for that), or deciding that it ends (`lease`, `fuse::session`).

use super::EXIT_SYSTEM;
use crate::fuse::EndReason;
use crate::lease::EndCause;

/// The lease ran out while the device answered beats with errors.
pub const EXIT_DEVICE_FAILED: u8 = 69;
/// A thread of the daemon failed in a way that nobody foresaw.
pub const EXIT_INTERNAL: u8 = 70;
/// This host gave up by itself: the device refused what it had to make durable.
pub const EXIT_WITHDREW: u8 = 74;
/// The lease ran out, and no error says why: this host stood still, or the device did.
pub const EXIT_LEASE_OVER: u8 = 75;
/// Another host declared this one dead, or had it shut out of the device.
pub const EXIT_SHUT_OUT: u8 = 77;

/// What the status means, and what an administrator does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ending {
    pub status: u8,
    pub meaning: &'static str,
}

/// `reason`: why the session ended; `lost_by`: why the volume may not be used; `left`: was it left cleanly?
pub fn of(reason: &EndReason, lost_by: Option<EndCause>, left: bool) -> Ending {
    let ending = |status, meaning| Ending { status, meaning };
    match (lost_by, reason) {
        (Some(EndCause::DeviceFailed), _) => ending(
            EXIT_DEVICE_FAILED,
            "the device failed for as long as a lease; look at the path to it, then mount again",
        ),
        (Some(EndCause::Withdrew), _) => ending(
            EXIT_WITHDREW,
            "this host withdrew, because the device refused what had to be made durable; what no fsync had \
             acknowledged is gone; look at the device, then mount again",
        ),
        (Some(EndCause::ShutOut), _) => ending(
            EXIT_SHUT_OUT,
            "another host declared this one dead and took over; find out why it seemed dead, then mount again",
        ),
        (Some(EndCause::Silence), _) | (_, EndReason::Lost(_)) => ending(
            EXIT_LEASE_OVER,
            "no beat reached the volume for as long as a lease: this host stood still, or its device did; mount again",
        ),
        (_, EndReason::Internal(_)) => ending(EXIT_INTERNAL, "an internal error; please report it"),
        _ if !left => ending(EXIT_SYSTEM, "the volume was not left cleanly; others recover this host"),
        _ => ending(0, "left cleanly"),
    }
}

impl Ending {
    /// The last word of a daemon. `why` in full: whoever else was to say it may not have come to that.
    pub fn log(&self, mountpoint: &str, why: Option<&str>) {
        let Ending { status, meaning } = self;
        match status {
            0 => log::info!("the mount on {mountpoint} ends with status 0: {meaning}"),
            _ => {
                let why = why.map(|why| format!(" ({why})")).unwrap_or_default();
                log::error!("the mount on {mountpoint} ends with status {status}: {meaning}{why}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_to_end_has_a_status_of_its_own() {
        let lost = EndReason::Lost("why".into());
        let internal = EndReason::Internal("what".into());
        let endings = [
            of(&EndReason::KernelGone, None, true),
            of(&EndReason::Signal(15), None, false),
            of(&lost, Some(EndCause::DeviceFailed), true),
            of(&internal, None, true),
            of(&lost, Some(EndCause::Withdrew), true),
            of(&lost, Some(EndCause::Silence), true),
            of(&lost, Some(EndCause::ShutOut), true),
        ];
        assert_eq!(endings.map(|e| e.status), [0, 2, 69, 70, 74, 75, 77]);
        // Unmounted, and the last commit failed: that is no clean end.
        assert_eq!(of(&EndReason::KernelGone, Some(EndCause::Withdrew), false).status, EXIT_WITHDREW);
        // The guard was faster than the daemon.
        assert_eq!(of(&lost, None, true).status, EXIT_LEASE_OVER);
    }
}
