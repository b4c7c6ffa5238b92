//! The system calls of the `file` backend that the standard library lacks: open-file-description
//! locks, block device and loop ioctls, hole punching, the direct I/O alignment of a file. Thin:
//! arguments in, `io::Result` out, no policy.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::fcntl::{FallocateFlags, FcntlArg, fallocate, fcntl};

/// Strength of a byte-range lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LockKind {
    Shared,
    Exclusive,
}

impl LockKind {
    fn raw(self) -> libc::c_short {
        match self {
            LockKind::Shared => libc::F_RDLCK as libc::c_short,
            LockKind::Exclusive => libc::F_WRLCK as libc::c_short,
        }
    }
}

fn flock_of(kind: libc::c_short, start: u64, len: u64) -> io::Result<libc::flock> {
    // SAFETY: a plain C struct of integers; all zeroes is a valid value, and OFD locks need l_pid 0.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = signed(start)?;
    lock.l_len = signed(len)?;
    Ok(lock)
}

fn signed(value: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(value).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))
}

/// Tries once to lock `start..start + len` for the open file description of `file`; `Ok(false)`
/// when another description holds a conflicting lock.
pub(crate) fn try_lock(file: &File, kind: LockKind, start: u64, len: u64) -> io::Result<bool> {
    let lock = flock_of(kind.raw(), start, len)?;
    loop {
        match fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&lock)) {
            Ok(_) => return Ok(true),
            Err(nix::Error::EAGAIN | nix::Error::EACCES) => return Ok(false),
            Err(nix::Error::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Gives up whatever the description of `file` holds in `start..start + len`.
pub(crate) fn unlock(file: &File, start: u64, len: u64) -> io::Result<()> {
    let lock = flock_of(libc::F_UNLCK as libc::c_short, start, len)?;
    fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&lock)).map(drop).map_err(io::Error::from)
}

/// Does any *other* description hold a lock of any strength in the range?
pub(crate) fn locked_elsewhere(file: &File, start: u64, len: u64) -> io::Result<bool> {
    let mut lock = flock_of(libc::F_WRLCK as libc::c_short, start, len)?;
    fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(lock.l_type != libc::F_UNLCK as libc::c_short)
}

/// Frees the range; later reads see zeroes. The file keeps its size.
pub(crate) fn punch_hole(file: &File, start: u64, len: u64) -> io::Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file, flags, signed(start)?, signed(len)?).map_err(io::Error::from)
}

/// Makes the range read as zeroes and keeps its space.
pub(crate) fn zero_range(file: &File, start: u64, len: u64) -> io::Result<()> {
    let flags = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file, flags, signed(start)?, signed(len)?).map_err(io::Error::from)
}

/// What the kernel says about direct I/O on a regular file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DirectIo {
    /// Offsets, lengths and memory must be multiples of these many bytes.
    Aligned { offset_bytes: u32, memory_bytes: u32 },
    /// The file is served through the page cache whatever the open flags say.
    PageCacheOnly,
    /// The kernel or the filesystem does not tell.
    Unknown,
}

pub(crate) fn direct_io(file: &File) -> io::Result<DirectIo> {
    // SAFETY: a plain C struct of integers; all zeroes is a valid value.
    let mut answer: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is a NUL-terminated empty string (AT_EMPTY_PATH: the descriptor itself), the
    // descriptor lives through the call, and `answer` is writable memory of the right type.
    let rc = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &mut answer)
    };
    if rc != 0 {
        let err = io::Error::last_os_error();
        // Kernels before 4.11 and some sandboxes: not told, not a failure.
        return match err.raw_os_error() {
            Some(libc::ENOSYS | libc::EPERM | libc::EINVAL) => Ok(DirectIo::Unknown),
            _ => Err(err),
        };
    }
    if answer.stx_mask & libc::STATX_DIOALIGN == 0 {
        return Ok(DirectIo::Unknown);
    }
    if answer.stx_dio_offset_align == 0 {
        return Ok(DirectIo::PageCacheOnly);
    }
    Ok(DirectIo::Aligned {
        offset_bytes: answer.stx_dio_offset_align,
        memory_bytes: answer.stx_dio_mem_align,
    })
}

/// The ioctls, in the kernel's words.
mod ioctls {
    use nix::{ioctl_read, ioctl_read_bad, request_code_none};

    ioctl_read_bad!(blkroget, request_code_none!(0x12, 94), libc::c_int);
    ioctl_read_bad!(blksszget, request_code_none!(0x12, 104), libc::c_int);
    ioctl_read!(blkgetsize64, 0x12, 114, libc::size_t);
    nix::ioctl_write_ptr_bad!(blkdiscard, request_code_none!(0x12, 119), [u64; 2]);
    nix::ioctl_write_ptr_bad!(blkzeroout, request_code_none!(0x12, 127), [u64; 2]);
    ioctl_read_bad!(loop_get_status64, 0x4C05, super::LoopInfo64);
    nix::ioctl_write_int_bad!(loop_set_direct_io, 0x4C08);
    nix::ioctl_write_ptr_bad!(loop_configure, 0x4C0A, super::LoopConfig);
    nix::ioctl_write_int_bad!(loop_clr_fd, 0x4C01);
    nix::ioctl_none_bad!(loop_ctl_get_free, 0x4C82);
}

/// `struct loop_info64` of `linux/loop.h`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct LoopInfo64 {
    pub device: u64,
    pub inode: u64,
    pub rdevice: u64,
    pub offset: u64,
    pub size_limit: u64,
    pub number: u32,
    pub encrypt_type: u32,
    pub encrypt_key_size: u32,
    pub flags: u32,
    pub file_name: [u8; 64],
    pub crypt_name: [u8; 64],
    pub encrypt_key: [u8; 32],
    pub init: [u64; 2],
}

impl LoopInfo64 {
    pub(crate) const FLAG_READ_ONLY: u32 = 1;
    pub(crate) const FLAG_AUTOCLEAR: u32 = 4;
    pub(crate) const FLAG_DIRECT_IO: u32 = 16;

    pub(crate) fn zeroed() -> Self {
        // SAFETY: a plain C struct of integers and byte arrays; all zeroes is a valid value.
        unsafe { std::mem::zeroed() }
    }
}

/// `struct loop_config` of `linux/loop.h`.
#[repr(C)]
pub(crate) struct LoopConfig {
    pub fd: u32,
    pub block_size: u32,
    pub info: LoopInfo64,
    pub reserved: [u64; 8],
}

// The kernel copies exactly these many bytes.
const _: () = assert!(size_of::<LoopInfo64>() == 232 && size_of::<LoopConfig>() == 304);

/// Logical block of a block device in bytes.
pub(crate) fn block_device_logical_block(file: &File) -> io::Result<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: BLKSSZGET stores one int through the pointer, which is valid for the call.
    unsafe { ioctls::blksszget(file.as_raw_fd(), &mut bytes) }?;
    u32::try_from(bytes).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Size of a block device in bytes.
pub(crate) fn block_device_size(file: &File) -> io::Result<u64> {
    let mut probe: u64 = 0;
    // SAFETY: BLKGETSIZE64 stores one u64 through the pointer (its number is encoded with size_t,
    // its data is 64 bits wide everywhere); `probe` is 64 bits wide and valid for the call.
    unsafe { ioctls::blkgetsize64(file.as_raw_fd(), (&raw mut probe).cast()) }?;
    Ok(probe)
}

/// Is the block device write protected?
pub(crate) fn block_device_read_only(file: &File) -> io::Result<bool> {
    let mut flag: libc::c_int = 0;
    // SAFETY: BLKROGET stores one int through the pointer, which is valid for the call.
    unsafe { ioctls::blkroget(file.as_raw_fd(), &mut flag) }?;
    Ok(flag != 0)
}

/// Tells a block device that the range is unused.
pub(crate) fn block_device_discard(file: &File, start: u64, len: u64) -> io::Result<()> {
    // SAFETY: BLKDISCARD reads two u64 (start, length) through the pointer, valid for the call.
    unsafe { ioctls::blkdiscard(file.as_raw_fd(), &[start, len]) }.map(drop).map_err(io::Error::from)
}

/// Makes a range of a block device read as zeroes.
pub(crate) fn block_device_zero(file: &File, start: u64, len: u64) -> io::Result<()> {
    // SAFETY: BLKZEROOUT reads two u64 (start, length) through the pointer, valid for the call.
    unsafe { ioctls::blkzeroout(file.as_raw_fd(), &[start, len]) }.map(drop).map_err(io::Error::from)
}

/// What a loop device stands on; ENXIO when it has no backing file.
pub(crate) fn loop_status(file: &File) -> io::Result<LoopInfo64> {
    let mut info = LoopInfo64::zeroed();
    // SAFETY: LOOP_GET_STATUS64 fills one struct loop_info64, whose layout LoopInfo64 repeats.
    unsafe { ioctls::loop_get_status64(file.as_raw_fd(), &mut info) }?;
    Ok(info)
}

/// Asks a loop device to bypass the page cache of its backing file.
pub(crate) fn loop_set_direct_io(file: &File) -> io::Result<()> {
    // SAFETY: LOOP_SET_DIRECT_IO takes an integer and touches no memory of ours.
    unsafe { ioctls::loop_set_direct_io(file.as_raw_fd(), 1) }.map(drop).map_err(io::Error::from)
}

/// Binds a free loop device to a file; EBUSY when somebody else was faster.
pub(crate) fn loop_configure(device: &File, config: &LoopConfig) -> io::Result<()> {
    // SAFETY: LOOP_CONFIGURE reads one struct loop_config, whose layout LoopConfig repeats; the
    // descriptor named in it is kept open by the caller.
    unsafe { ioctls::loop_configure(device.as_raw_fd(), config) }.map(drop).map_err(io::Error::from)
}

/// Detaches a loop device; while somebody has it open this happens at the last close.
pub(crate) fn loop_clear(device: &File) -> io::Result<()> {
    // SAFETY: LOOP_CLR_FD takes no memory of ours.
    unsafe { ioctls::loop_clr_fd(device.as_raw_fd(), 0) }.map(drop).map_err(io::Error::from)
}

/// The number of a loop device that is free at this moment.
pub(crate) fn loop_find_free(control: &File) -> io::Result<u32> {
    // SAFETY: LOOP_CTL_GET_FREE takes no argument and answers with a number.
    let number = unsafe { ioctls::loop_ctl_get_free(control.as_raw_fd()) }?;
    u32::try_from(number).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}
