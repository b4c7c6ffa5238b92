//! The one door to the kernel: device nodes, SG_IO, and where sysfs is. Thin: no policy, no retries.
//!
//! Everything in this folder goes through [`Kernel`] and [`Node`], so that tests can stand a kernel of their own in
//! their place.

use std::any::Any;
use std::ffi::{c_int, c_uchar, c_uint, c_ushort, c_void};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr::null_mut;
use std::sync::Arc;
use std::time::Duration;

/// Bytes of sense data that are asked for: the most there can be.
const SENSE_BYTES: usize = 252;

/// Data of a command.
pub enum SgData<'a> {
    None,
    In(&'a mut [u8]),
    Out(&'a [u8]),
}

impl SgData<'_> {
    pub fn len_bytes(&self) -> usize {
        match self {
            SgData::None => 0,
            SgData::In(buf) => buf.len(),
            SgData::Out(data) => data.len(),
        }
    }
}

/// One SCSI command.
pub struct SgCommand<'a> {
    pub cdb: &'a [u8],
    pub data: SgData<'a>,
    /// The kernel's; raised to 7 s by it.
    pub timeout: Duration,
    /// Before what waits in the disk's queue.
    pub at_head: bool,
}

/// What SG_IO brings back.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SgAnswer {
    pub status: u8,
    pub host_status: u16,
    pub driver_status: u16,
    pub sense: Vec<u8>,
    /// Bytes that were not moved.
    pub residual: i32,
}

/// An open disk.
pub trait Node: Send + Sync + 'static {
    /// Sends one command, once, and waits for its answer however long that takes.
    fn sg_io(&self, command: &mut SgCommand<'_>) -> io::Result<SgAnswer>;

    /// Writes out and drops what the kernel has cached of the disk for programs that don't use direct I/O.
    fn drop_page_cache(&self) -> io::Result<()>;

    /// Takes the advisory lock of the node for as long as it is open; false: another process has it.
    fn try_lock(&self) -> io::Result<bool>;
}

/// The kernel, as far as this backend knows it.
pub trait Kernel: Send + Sync + 'static {
    /// The root of sysfs.
    fn sysfs(&self) -> &Path;

    /// Device number of the node at `path`; `None`: it is no block device.
    fn block_device(&self, path: &Path) -> io::Result<Option<u64>>;

    /// Opens a disk by the name that the kernel has for it ("sda"), if its node has this device number.
    fn open(&self, name: &str, number: u64) -> io::Result<Arc<dyn Node>>;

    /// Claims the node at `path` as a filesystem would, for as long as the answer lives; EBUSY: it is in use.
    fn claim(&self, path: &Path) -> io::Result<Box<dyn Any + Send + Sync>>;
}

/// The real one.
pub struct Linux {
    sysfs: PathBuf,
    dev: PathBuf,
}

impl Default for Linux {
    fn default() -> Self {
        Linux { sysfs: "/sys".into(), dev: "/dev".into() }
    }
}

impl Kernel for Linux {
    fn sysfs(&self) -> &Path {
        &self.sysfs
    }

    fn block_device(&self, path: &Path) -> io::Result<Option<u64>> {
        let meta = std::fs::metadata(path)?;
        Ok(meta.file_type().is_block_device().then(|| meta.rdev()))
    }

    fn open(&self, name: &str, number: u64) -> io::Result<Arc<dyn Node>> {
        // Names of devices have '!' for '/' in sysfs.
        let path = self.dev.join(name.replace('!', "/"));
        // Read-only is enough for SG_IO with CAP_SYS_RAWIO, and has two virtues: closing it makes udev probe
        // nothing, and kernels that forbid writing to mounted devices don't mind. O_NONBLOCK: no waiting for a medium.
        let flags = libc::O_NONBLOCK | libc::O_CLOEXEC;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        let meta = file.metadata()?;
        if !meta.file_type().is_block_device() || meta.rdev() != number {
            return Err(io::Error::from_raw_os_error(libc::ENXIO));
        }
        Ok(Arc::new(SgNode(file)))
    }

    fn claim(&self, path: &Path) -> io::Result<Box<dyn Any + Send + Sync>> {
        let flags = libc::O_EXCL | libc::O_NONBLOCK | libc::O_CLOEXEC;
        Ok(Box::new(OpenOptions::new().read(true).custom_flags(flags).open(path)?))
    }
}

struct SgNode(File);

/// `struct sg_io_hdr` of `scsi/sg.h`, interface version 3.
#[repr(C)]
struct SgIoHdr {
    interface_id: c_int,
    dxfer_direction: c_int,
    cmd_len: c_uchar,
    mx_sb_len: c_uchar,
    iovec_count: c_ushort,
    dxfer_len: c_uint,
    dxferp: *mut c_void,
    cmdp: *const c_uchar,
    sbp: *mut c_uchar,
    timeout: c_uint,
    flags: c_uint,
    pack_id: c_int,
    usr_ptr: *mut c_void,
    status: c_uchar,
    masked_status: c_uchar,
    msg_status: c_uchar,
    sb_len_wr: c_uchar,
    host_status: c_ushort,
    driver_status: c_ushort,
    resid: c_int,
    duration: c_uint,
    info: c_uint,
}

// The kernel copies exactly these many bytes.
#[cfg(target_pointer_width = "64")]
const _: () = assert!(size_of::<SgIoHdr>() == 88);

const DXFER_NONE: c_int = -1;
const DXFER_TO_DEV: c_int = -2;
const DXFER_FROM_DEV: c_int = -3;
const FLAG_Q_AT_HEAD: c_uint = 0x20;

mod ioctls {
    use nix::request_code_none;
    nix::ioctl_readwrite_bad!(sg_io, 0x2285, super::SgIoHdr);
    nix::ioctl_none_bad!(blkflsbuf, request_code_none!(0x12, 97));
}

impl Node for SgNode {
    fn sg_io(&self, command: &mut SgCommand<'_>) -> io::Result<SgAnswer> {
        let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
        let len = c_uint::try_from(command.data.len_bytes()).map_err(|_| invalid())?;
        let (direction, memory) = match &mut command.data {
            SgData::None => (DXFER_NONE, null_mut()),
            SgData::In(buf) => (DXFER_FROM_DEV, buf.as_mut_ptr().cast::<c_void>()),
            // The kernel only reads it.
            SgData::Out(data) => (DXFER_TO_DEV, data.as_ptr().cast_mut().cast::<c_void>()),
        };
        let mut sense = [0u8; SENSE_BYTES];
        let mut header = SgIoHdr {
            interface_id: c_int::from(b'S'),
            dxfer_direction: direction,
            cmd_len: c_uchar::try_from(command.cdb.len()).map_err(|_| invalid())?,
            mx_sb_len: SENSE_BYTES as c_uchar,
            iovec_count: 0,
            dxfer_len: len,
            dxferp: memory,
            cmdp: command.cdb.as_ptr(),
            sbp: sense.as_mut_ptr(),
            timeout: command.timeout.as_millis().try_into().unwrap_or(c_uint::MAX),
            flags: if command.at_head { FLAG_Q_AT_HEAD } else { 0 },
            pack_id: 0,
            usr_ptr: null_mut(),
            status: 0,
            masked_status: 0,
            msg_status: 0,
            sb_len_wr: 0,
            host_status: 0,
            driver_status: 0,
            resid: 0,
            duration: 0,
            info: 0,
        };
        // SAFETY: the header has the kernel's layout; command, sense and data are memory of the lengths that it
        // says, the data writable if it is read into, and all of them outlive the call, which ends only when the
        // kernel is done with them.
        unsafe { ioctls::sg_io(self.0.as_raw_fd(), &mut header) }?;
        let came = usize::from(header.sb_len_wr).min(SENSE_BYTES);
        Ok(SgAnswer {
            status: header.status,
            host_status: header.host_status,
            driver_status: header.driver_status,
            sense: sense[..came].to_vec(),
            residual: header.resid,
        })
    }

    fn drop_page_cache(&self) -> io::Result<()> {
        // SAFETY: BLKFLSBUF takes no memory of ours.
        unsafe { ioctls::blkflsbuf(self.0.as_raw_fd()) }.map(drop).map_err(io::Error::from)
    }

    fn try_lock(&self) -> io::Result<bool> {
        match self.0.try_lock() {
            Ok(()) => Ok(true),
            Err(std::fs::TryLockError::WouldBlock) => Ok(false),
            Err(std::fs::TryLockError::Error(e)) => Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_scsi_disk_refuses_the_command() {
        // A regular file: the ioctl is made, and the kernel says that it knows no such thing.
        let node = SgNode(tempfile::tempfile().unwrap());
        let mut command =
            SgCommand { cdb: &[0; 6], data: SgData::None, timeout: Duration::from_secs(7), at_head: false };
        let error = node.sg_io(&mut command).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
        assert!(node.try_lock().unwrap());
        assert!(Linux::default().open("null", 0).is_err());
        assert_eq!(Linux::default().block_device(Path::new("/dev/null")).unwrap(), None);
    }
}
