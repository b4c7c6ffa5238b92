//! What is asked of the kernel's socket below libiscsi.

use std::ffi::c_int;
use std::os::fd::BorrowedFd;

use nix::sys::socket::{setsockopt, sockopt};

use super::ffi::{self, Context};

/// The descriptor, if there is a connection. To be used only until the next call into libiscsi, which may close it.
fn descriptor(context: *mut Context) -> Option<c_int> {
    // SAFETY: the context lives and belongs to the calling thread.
    let fd = unsafe { ffi::iscsi_get_fd(context) };
    (fd >= 0).then_some(fd)
}

/// Closing resets the connection and drops what was not sent, also when this process is killed.
pub fn linger_never(context: *mut Context) {
    if let Some(fd) = descriptor(context) {
        // SAFETY: libiscsi keeps the descriptor open; it is borrowed for this call only.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        if let Err(e) = setsockopt(&fd, sockopt::Linger, &linger) {
            log::warn!("iSCSI: SO_LINGER: {e}");
        }
    }
}

/// Holds together what is sent until it is let go: libiscsi hands over each command, and each piece of data, with a
/// system call of its own, and each would be a packet that wakes the target up. The kernel itself lets go after 200 ms.
pub fn cork(context: *mut Context, hold: bool) {
    let Some(fd) = descriptor(context) else { return };
    let value = c_int::from(hold);
    // SAFETY: the descriptor is open; the value is an int that lives through the call. An error changes only how many
    // packets there are.
    unsafe {
        libc::setsockopt(
            fd,
            libc::IPPROTO_TCP,
            libc::TCP_CORK,
            (&raw const value).cast(),
            size_of::<c_int>() as libc::socklen_t,
        );
    }
}
