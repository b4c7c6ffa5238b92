//! Attaches a regular file to a free loop device, for tests and demonstrations that need a block
//! device node per host. Needs root.
//!
//! The device is marked "autoclear" and held open: it goes away by itself when the last user has
//! closed it, even if this process is killed.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use super::sys::{self, LoopConfig, LoopInfo64};

/// Free devices are found and taken in two steps; others may be faster this many times.
const TRIES_MAX: u32 = 64;

/// How to attach.
#[derive(Clone, Copy, Debug)]
pub struct LoopOptions {
    /// 512 or 4096.
    pub logical_block_bytes: u32,
    /// Byte of the file at which the device begins.
    pub offset_bytes: u64,
    /// Bypass the page cache of the file.
    pub direct_io: bool,
    pub read_only: bool,
}

impl Default for LoopOptions {
    fn default() -> Self {
        LoopOptions { logical_block_bytes: 512, offset_bytes: 0, direct_io: true, read_only: false }
    }
}

/// An attached loop device; detached when dropped and no longer in use.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
    node: File,
}

impl LoopDevice {
    /// Binds `file` to a free loop device. Errors are those of the kernel: EACCES or EPERM without
    /// root, EINVAL for a logical block or direct I/O that the file below can't do.
    pub fn attach(file: &Path, options: &LoopOptions) -> io::Result<Self> {
        let control = File::options().read(true).write(true).open("/dev/loop-control")?;
        let backing = File::options().read(true).write(!options.read_only).open(file)?;
        let mut info = LoopInfo64::zeroed();
        info.offset = options.offset_bytes;
        info.flags = LoopInfo64::FLAG_AUTOCLEAR;
        if options.direct_io {
            info.flags |= LoopInfo64::FLAG_DIRECT_IO;
        }
        if options.read_only {
            info.flags |= LoopInfo64::FLAG_READ_ONLY;
        }
        let fd = u32::try_from(backing.as_raw_fd()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let config = LoopConfig { fd, block_size: options.logical_block_bytes, info, reserved: [0; 8] };
        for _ in 0..TRIES_MAX {
            let path = PathBuf::from(format!("/dev/loop{}", sys::loop_find_free(&control)?));
            let node = File::options().read(true).write(!options.read_only).open(&path)?;
            match sys::loop_configure(&node, &config) {
                Ok(()) => return Ok(LoopDevice { path, node }),
                Err(err) if err.raw_os_error() == Some(libc::EBUSY) => {}
                Err(err) => return Err(err),
            }
        }
        Err(io::Error::from_raw_os_error(libc::EBUSY))
    }

    /// Path of the device node.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // Also without this it would go with its last user; that it failed changes nothing.
        let _ = sys::loop_clear(&self.node);
    }
}
