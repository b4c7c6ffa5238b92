//! The switch that ends a FUSE connection, held open from the moment of mounting.
//!
//! The kernel offers one file per connection in the `fusectl` filesystem; writing to it aborts all
//! requests. It is opened when we mount because the moment of need is no time for path lookups. Where
//! `fusectl` isn't mounted we attach it to nothing but our descriptor, so that the machine's mount table
//! stays as it was.

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

pub(crate) struct AbortSwitch {
    file: File,
}

impl AbortSwitch {
    /// The switch of the connection whose superblock has this minor number.
    pub(crate) fn open(minor: u32) -> io::Result<AbortSwitch> {
        let path = format!("/sys/fs/fuse/connections/{minor}/abort");
        match OpenOptions::new().write(true).open(&path) {
            Ok(file) => Ok(AbortSwitch { file }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::open_detached(minor),
            Err(error) => Err(error),
        }
    }

    fn open_detached(minor: u32) -> io::Result<AbortSwitch> {
        let root = detached_mount(c"fusectl")?;
        let path = format!("{minor}/abort");
        let fd = nix::fcntl::openat(
            root.as_fd(),
            path.as_str(),
            OFlag::O_WRONLY | OFlag::O_CLOEXEC,
            Mode::empty(),
        )?;
        Ok(AbortSwitch { file: File::from(fd) })
    }

    /// Opened by another process.
    pub(crate) fn from_descriptor(descriptor: OwnedFd) -> AbortSwitch {
        AbortSwitch { file: File::from(descriptor) }
    }

    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Ends the connection: pending and future requests fail, threads reading requests see the end.
    pub(crate) fn abort(&self) -> io::Result<()> {
        (&self.file).write_all(b"1")
    }
}

/// A filesystem that needs no source, mounted nowhere: only the returned descriptor leads to it.
fn detached_mount(fstype: &CStr) -> io::Result<OwnedFd> {
    const FSOPEN_CLOEXEC: libc::c_uint = 1;
    const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
    const FSMOUNT_CLOEXEC: libc::c_uint = 1;
    let owned = |raw: libc::c_long| -> io::Result<OwnedFd> {
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        let raw = i32::try_from(raw).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
        // SAFETY: the system call just returned this descriptor to us; nobody else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(raw) })
    };
    // SAFETY: fsopen reads a NUL-terminated name and touches no other memory of ours.
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, fstype.as_ptr(), FSOPEN_CLOEXEC) })?;
    let none = std::ptr::null::<libc::c_char>();
    // SAFETY: the descriptor is open; CMD_CREATE takes no key, value or aux.
    let created =
        unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), FSCONFIG_CMD_CREATE, none, none, 0) };
    if created < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open and no memory is passed.
    owned(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, 0) })
}
