//! System calls of the guard that have no safe wrapper.

use std::io;

/// Leaves this process nothing but stdin, stdout and stderr.
pub(super) fn close_inherited() -> io::Result<()> {
    // SAFETY: called first thing in a process that was just executed: no value in it owns a descriptor above 2 yet.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
    if closed < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Puts this process before all others that are not real-time. It sleeps until the moment at which it is late.
pub(super) fn be_urgent() -> io::Result<()> {
    // SAFETY: changes this process's priority and touches no memory.
    let set = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
