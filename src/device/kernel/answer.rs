//! From what SG_IO brings back to an answer of the target, or a word on why there is none. Pure.
//!
//! | from the kernel | means |
//! | --- | --- |
//! | errno before sending (ENODEV, ENXIO, EPERM, EINVAL, ENOMEM, EIO for a length, ...) | not sent |
//! | any other errno | lost |
//! | host byte OK, or one with which the kernel only comments on the target's status (10h target failure, 11h nexus failure: a reservation conflict, 12h, 13h) | the target's status and sense |
//! | host byte time-out, and error handling has left the disk running | the command was aborted: dead, and perhaps executed before |
//! | any other host byte, any other driver byte | lost |
//! | CHECK CONDITION with sense key 0 or none that makes sense | lost: virtual machines say so when *their* time-out ended |
//!
//! *Lost*: perhaps executed. It won't leave this machine any more, and comes within `timing::TARGET` if at all.
//! DID_NO_CONNECT is lost, too: drivers say so of commands that they had sent, when the other side vanished.

use std::io;

use super::door::SgAnswer;
use crate::device::scsi::sense::{Sense, key};
use crate::device::scsi::transport::{Reply, TransportError, status};

/// Host bytes (`include/scsi/scsi_status.h`) that are told apart.
mod did {
    pub const OK: u16 = 0x00;
    pub const TIME_OUT: u16 = 0x03;
    pub const PASSTHROUGH: u16 = 0x0A;
    pub const TARGET_FAILURE: u16 = 0x10;
    pub const NEXUS_FAILURE: u16 = 0x11;
    pub const ALLOC_FAILURE: u16 = 0x12;
    pub const MEDIUM_ERROR: u16 = 0x13;
}

const DRIVER_SENSE: u16 = 0x08;

fn host_byte_name(byte: u16) -> &'static str {
    const NAMES: [&str; 21] = [
        "OK",
        "NO_CONNECT",
        "BUS_BUSY",
        "TIME_OUT",
        "BAD_TARGET",
        "ABORT",
        "PARITY",
        "ERROR",
        "RESET",
        "BAD_INTR",
        "PASSTHROUGH",
        "SOFT_ERROR",
        "IMM_RETRY",
        "REQUEUE",
        "TRANSPORT_DISRUPTED",
        "TRANSPORT_FAILFAST",
        "TARGET_FAILURE",
        "NEXUS_FAILURE",
        "ALLOC_FAILURE",
        "MEDIUM_ERROR",
        "TRANSPORT_MARGINAL",
    ];
    NAMES.get(usize::from(byte)).copied().unwrap_or("an unknown host status")
}

/// What a command's end says of its path.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PathState {
    Fine,
    /// It may serve again; the unit behind it did not lose anything that is known of.
    Slow(String),
    /// The path was down: the target may have been another life of itself since.
    Lost(String),
    /// The port is not for use at the moment (ALUA standby, unavailable).
    Standby(String),
}

/// Judges one SG_IO of `len` bytes. `running`: is the disk in use by the kernel, now that the command has ended?
pub fn judge(
    ended: io::Result<SgAnswer>,
    len: usize,
    running: impl FnOnce() -> bool,
) -> (Result<Reply, TransportError>, PathState) {
    let answer = match ended {
        Ok(answer) => answer,
        Err(error) => return of_errno(&error),
    };
    let lost = |why: String| {
        let state = PathState::Lost(why.clone());
        (Err(TransportError::Lost(why)), state)
    };
    match answer.host_status {
        did::OK
        | did::PASSTHROUGH
        | did::TARGET_FAILURE
        | did::NEXUS_FAILURE
        | did::ALLOC_FAILURE
        | did::MEDIUM_ERROR => {}
        did::TIME_OUT if running() => {
            let why = "timed out, and the kernel aborted it".to_owned();
            return (Err(TransportError::Broken(why.clone())), PathState::Slow(why));
        }
        byte => return lost(format!("the kernel says DID_{}", host_byte_name(byte))),
    }
    if answer.driver_status & 0x0F != 0 && answer.driver_status & 0x0F != DRIVER_SENSE {
        return lost(format!("the kernel says driver status {:02X}h", answer.driver_status));
    }
    if answer.status == status::GOOD && !matches!(answer.host_status, did::OK | did::PASSTHROUGH) {
        // A comment on a failure without the failure: kernels that clear the status.
        return match answer.host_status {
            did::NEXUS_FAILURE => reply(answer, status::RESERVATION_CONFLICT, len),
            byte => lost(format!("the kernel says DID_{}", host_byte_name(byte))),
        };
    }
    if answer.status == status::CHECK_CONDITION {
        match Sense::decode(&answer.sense) {
            None => return lost("check condition without sense data".into()),
            Some(sense) if sense.key == key::NO_SENSE => {
                return lost("check condition that says nothing".into());
            }
            // Target port in standby, unavailable, or no path: another port may serve.
            Some(sense)
                if sense.key == key::NOT_READY && sense.asc == 4 && matches!(sense.ascq, 0x0B | 0x0C) =>
            {
                let why = sense.to_string();
                return (Err(TransportError::NotSent(why.clone())), PathState::Standby(why));
            }
            Some(_) => {}
        }
    }
    let status = answer.status;
    reply(answer, status, len)
}

fn reply(answer: SgAnswer, status: u8, len: usize) -> (Result<Reply, TransportError>, PathState) {
    let left = usize::try_from(answer.residual).unwrap_or(0);
    (Ok(Reply { status, sense: answer.sense, transferred: len.saturating_sub(left) }), PathState::Fine)
}

fn of_errno(error: &io::Error) -> (Result<Reply, TransportError>, PathState) {
    let why = error.to_string();
    match error.raw_os_error() {
        // The disk is gone or offline.
        Some(libc::ENODEV | libc::ENXIO | libc::EBADF | libc::ENOTCONN) => {
            (Err(TransportError::NotSent(why.clone())), PathState::Lost(why))
        }
        Some(libc::EPERM | libc::EACCES) => {
            let why = format!("{why}: SCSI commands need CAP_SYS_RAWIO");
            (Err(TransportError::NotSent(why)), PathState::Fine)
        }
        // EIO: longer than the disk takes in one command; other failures don't come as an errno.
        Some(libc::EINVAL | libc::ENOMEM | libc::ENOTTY | libc::EIO | libc::EAGAIN | libc::EBUSY) => {
            (Err(TransportError::NotSent(why)), PathState::Fine)
        }
        _ => (Err(TransportError::Lost(why.clone())), PathState::Slow(why)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::scsi::verdict::Verdict;

    fn of(answer: SgAnswer) -> (Verdict, PathState) {
        let (outcome, state) = judge(Ok(answer), 512, || true);
        (Verdict::of(&outcome), state)
    }

    fn host(byte: u16) -> SgAnswer {
        SgAnswer { host_status: byte, ..SgAnswer::default() }
    }

    #[test]
    fn answers_of_the_target_pass() {
        assert_eq!(of(host(0)), (Verdict::Done, PathState::Fine));
        // With and without the kernel's comment; and a kernel that leaves only the comment.
        for (host_status, status) in [(0, 0x18), (0x11, 0x18), (0x11, 0)] {
            let answer = SgAnswer { status, host_status, ..SgAnswer::default() };
            assert_eq!(of(answer), (Verdict::Conflict, PathState::Fine));
        }
        for (status, words) in [(0x08, "busy"), (0x28, "task set full")] {
            assert_eq!(of(SgAnswer { status, ..SgAnswer::default() }).0, Verdict::Busy(words));
        }
        let (outcome, _) = judge(Ok(SgAnswer { residual: 100, ..SgAnswer::default() }), 512, || true);
        assert_eq!(outcome.unwrap().transferred, 412);
        let (outcome, _) = judge(Ok(SgAnswer { residual: -5, ..SgAnswer::default() }), 512, || true);
        assert_eq!(outcome.unwrap().transferred, 512);
    }

    #[test]
    fn sense_data_in_both_formats() {
        let mut fixed = vec![0xF0, 0, 0xE, 0, 0, 0, 37, 10, 0, 0, 0, 0, 0x1D, 0, 0, 0, 0, 0];
        let descriptor = vec![0x72, 0xE, 0x1D, 0, 0, 0, 0, 12, 0, 10, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 37];
        for (host_status, sense) in [(0, fixed.clone()), (0x10, fixed.clone()), (0, descriptor)] {
            let answer = SgAnswer { status: 2, host_status, driver_status: 8, sense, ..SgAnswer::default() };
            assert_eq!(of(answer), (Verdict::Miscompare { offset: Some(37) }, PathState::Fine));
        }
        // No sense: a virtual machine's time-out. It may have been executed, and may be yet.
        fixed[2] = 0;
        for sense in [fixed, vec![]] {
            let (verdict, state) = of(SgAnswer { status: 2, sense, ..SgAnswer::default() });
            assert!(matches!(verdict, Verdict::Unknown { later: true, .. }), "{verdict:?}");
            assert!(matches!(state, PathState::Lost(_)));
        }
        let standby = vec![0x72, 2, 4, 0x0B, 0, 0, 0, 0];
        let (verdict, state) = of(SgAnswer { status: 2, sense: standby, ..SgAnswer::default() });
        assert!(matches!((verdict, state), (Verdict::NotSent(_), PathState::Standby(_))));
    }

    #[test]
    fn what_the_kernel_gave_up_is_unknown() {
        for byte in [1, 2, 4, 5, 6, 7, 8, 9, 0xB, 0xC, 0xD, 0xE, 0xF, 0x10, 0x12, 0x13, 0x14, 0x77] {
            let (verdict, state) = of(host(byte));
            assert!(matches!(verdict, Verdict::Unknown { later: true, .. }), "{byte:x}: {verdict:?}");
            assert!(matches!(state, PathState::Lost(_)));
        }
        let (verdict, _) = of(SgAnswer { driver_status: 6, ..SgAnswer::default() });
        assert!(matches!(verdict, Verdict::Unknown { later: true, .. }));
        // Aborted by the kernel, if error handling has left the disk running.
        for (running, dead) in [(true, true), (false, false)] {
            let (outcome, _) = judge(Ok(host(3)), 0, || running);
            let verdict = Verdict::of(&outcome);
            assert!(matches!(verdict, Verdict::Unknown { later, .. } if later != dead), "{verdict:?}");
        }
    }

    #[test]
    fn errors_before_sending() {
        let errno = |n| judge(Err(io::Error::from_raw_os_error(n)), 0, || true);
        for n in [libc::ENODEV, libc::ENXIO] {
            assert!(matches!(errno(n), (Err(TransportError::NotSent(_)), PathState::Lost(_))));
        }
        for n in [libc::EPERM, libc::EINVAL, libc::ENOMEM, libc::EIO, libc::ENOTTY] {
            assert!(matches!(errno(n), (Err(TransportError::NotSent(_)), PathState::Fine)));
        }
        for n in [libc::EFAULT, libc::EINTR, libc::EBADE, libc::ETIMEDOUT] {
            assert!(matches!(errno(n).0, Err(TransportError::Lost(_))), "{n}");
        }
    }
}
