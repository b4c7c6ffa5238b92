//! The `file` backend: a regular file, or a loop device over one, shared by several hosts *of one
//! machine*. The embedded default for trying LunFS and for tests; never a LUN that other machines see.
//!
//! Invariants
//!
//! 1. **One agreed inode.** All locks are taken on the regular file at the bottom, whatever loop
//!    device or path a host came by (`backing`). A device for which that inode can't be found
//!    and proved, or that lies on a filesystem not known to be local, is refused.
//! 2. **compare_and_write is atomic against every other one** of any thread or process here: read,
//!    compare and write happen under an exclusive lock on exactly that block's bytes (`locks`).
//!    Plain writes are *not* excluded, as on many real targets.
//! 3. **No page cache of ours.** The device is opened with O_DIRECT. Below a loop device the backing
//!    file's page cache may serve; it is one for all loop devices, so they agree. Direct and cached
//!    access to one file at the same time do not agree, and are refused.
//! 4. **A lock that was not got is `Executed::No`**; a write that failed is `Executed::Maybe` unless the
//!    kernel rejected its arguments.
//!
//! Single-block reads are *not* atomic against a swap in progress when a page cache serves them:
//! who reads a lock block plainly must check its checksum and read again.
//!
//! `hold_time` is zero: an issuer waits in the kernel until its write has ended, so a process that is
//! gone has nothing on its way. A local disk that stalls one write for longer than a lease while it
//! serves others is not covered by that.
//!
//! Every write, swap, discard and zeroing passes the gate of the emulated fence (`fence`).

mod backing;
mod fence;
mod io;
mod locks;
pub mod loopdev;
mod sys;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

pub(super) use self::backing::is_loop_device;
use self::backing::{Backing, FileKind, Kind, io_error, require_local, resolve};
use self::fence::{Fence, Inside};
use self::io::Io;
use self::locks::{LockError, Presence, PresenceError, RangeLocks};
use super::{
    AlignedBuf, BlockDevice, CompareOutcome, DeviceError, DeviceGeometry, Executed, Fencing, OpenError,
};

/// How to open a [`FileDevice`].
#[derive(Clone, Debug)]
pub struct FileOptions {
    pub read_only: bool,
    /// 512 or 4096 for a regular file; `None` takes 512, or 4096 where the filesystem can't do less.
    /// A loop device has its own; another wish is refused.
    pub logical_block_bytes: Option<u32>,
    /// Creates the regular file if it is missing, and lets it grow (sparsely) to this many bytes.
    pub create_size: Option<u64>,
    /// Refuses if anything else on this machine has the device open, and keeps others out.
    pub exclusive: bool,
    /// The longest a compare-and-write waits for the lock of its block, and a fence for what is under way.
    pub swap_deadline: Duration,
}

impl Default for FileOptions {
    fn default() -> Self {
        FileOptions {
            read_only: false,
            logical_block_bytes: None,
            create_size: None,
            exclusive: false,
            swap_deadline: Duration::from_secs(5),
        }
    }
}

/// A regular file or a loop device; see the module's header.
pub struct FileDevice {
    io: Io,
    locks: RangeLocks,
    geometry: DeviceGeometry,
    /// Byte of the agreed inode at which the device begins.
    base_bytes: u64,
    swap_deadline: Duration,
    read_only: bool,
    fence: Option<Fence>,
    _presence: Presence,
}

impl FileDevice {
    /// Opens a regular file or a loop device. Every refusal is an [`OpenError`].
    pub fn open(path: &Path, options: &FileOptions) -> Result<Self, OpenError> {
        let spec = &*path.to_string_lossy();
        if let Some(asked) = options.logical_block_bytes
            && asked != 512
            && asked != 4096
        {
            return Err(OpenError::BadLogicalBlock { asked });
        }
        let file = open_direct(spec, path, options)?;
        let backing = resolve(spec, &file, !options.read_only)?;
        if let Some(size_bytes) = options.create_size {
            grow(spec, &file, &backing, size_bytes)?;
        }
        let (logical_block_bytes, size_bytes) = measure(spec, &file, &backing, options)?;
        let inode = &backing.lock_inode;
        let presence = Presence::announce(inode, !options.read_only, backing.cache_mode, options.exclusive)
            .map_err(|err| match err {
            PresenceError::InUse => OpenError::InUse { spec: spec.into() },
            PresenceError::OtherCacheMode => OpenError::MixedCaching { spec: spec.into() },
            PresenceError::Io(e) => io_error(spec, "announcing us with a lock", e),
        })?;
        let fence = if options.read_only {
            None
        } else {
            Fence::new(inode, options.swap_deadline).map_err(|e| io_error(spec, "opening its fence", e))?
        };
        Ok(FileDevice {
            geometry: DeviceGeometry {
                logical_block_bytes,
                size_bytes,
                volatile_cache: backing.volatile_cache,
                hold_time: Duration::ZERO,
            },
            base_bytes: backing.base_bytes,
            io: Io::new(
                file,
                matches!(backing.kind, Kind::Loop { .. }),
                logical_block_bytes,
                backing.base_bytes,
            ),
            locks: RangeLocks::new(backing.lock_inode, !options.read_only),
            swap_deadline: options.swap_deadline,
            read_only: options.read_only,
            fence,
            _presence: presence,
        })
    }

    /// Was it opened for reading only? Then every change fails with EROFS.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The gate of everything that changes the device, to be kept until the change has ended.
    fn enter_change(
        &self,
        op: &'static str,
        offset_bytes: u64,
        len_bytes: u64,
    ) -> Result<Option<Inside<'_>>, DeviceError> {
        self.geometry.check_range(op, offset_bytes, len_bytes)?;
        if self.read_only {
            return Err(DeviceError::write_protected(op, offset_bytes));
        }
        self.fence.as_ref().map(|fence| fence.enter(op, offset_bytes)).transpose()
    }
}

impl BlockDevice for FileDevice {
    fn geometry(&self) -> DeviceGeometry {
        self.geometry
    }

    fn read(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.geometry.check_range("read", offset_bytes, buf.len() as u64)?;
        self.io.read(offset_bytes, buf)
    }

    fn write(&self, offset_bytes: u64, data: &[u8]) -> Result<(), DeviceError> {
        let _inside = self.enter_change("write", offset_bytes, data.len() as u64)?;
        self.io.write("write", offset_bytes, data)
    }

    fn compare_and_write(
        &self,
        offset_bytes: u64,
        expected: &[u8],
        new: &[u8],
    ) -> Result<CompareOutcome, DeviceError> {
        const OP: &str = "compare-and-write";
        self.geometry.check_images(OP, offset_bytes, expected, new)?;
        let unit = expected.len();
        let _inside = self.enter_change(OP, offset_bytes, unit as u64)?;
        // All memory is at hand before the lock is held.
        let mut found = AlignedBuf::zeroed(unit);
        let new = AlignedBuf::copy_of(new);
        let start = self.base_bytes + offset_bytes;
        let held = self.locks.lock(start, unit as u64, self.swap_deadline).map_err(|err| {
            let err = match err {
                LockError::Io(err) => err,
                // Not DeviceError::TimedOut: that one means "may still be executed", and this can't.
                LockError::Busy { waited } => std::io::Error::new(
                    std::io::ErrorKind::TimedOut,
                    format!("another process has held the lock of this block for {} ms", waited.as_millis()),
                ),
            };
            DeviceError::io(OP, offset_bytes, Executed::No, err)
        })?;
        self.io.read(offset_bytes, &mut found)?;
        let outcome = if *found == *expected {
            self.io.write(OP, offset_bytes, &new)?;
            CompareOutcome::Swapped
        } else {
            CompareOutcome::Miscompare
        };
        drop(held);
        Ok(outcome)
    }

    fn flush(&self) -> Result<(), DeviceError> {
        // After a failed one the kernel calls its pages clean, and the next one succeeds without them: the door, which hears
        // of the error, takes that for a reset.
        self.io.flush()
    }

    fn discard(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), DeviceError> {
        let _inside = self.enter_change("discard", offset_bytes, len_bytes)?;
        self.io.discard(offset_bytes, len_bytes)
    }

    fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), DeviceError> {
        let _inside = self.enter_change("write-zeroes", offset_bytes, len_bytes)?;
        self.io.write_zeroes(offset_bytes, len_bytes)
    }

    fn resets(&self) -> u64 {
        0
    }

    fn fencing(&self) -> Option<&dyn Fencing> {
        self.fence.as_ref().map(|fence| fence as &dyn Fencing)
    }
}

/// Opens the path for direct I/O; creates a regular file if asked to.
fn open_direct(spec: &str, path: &Path, options: &FileOptions) -> Result<File, OpenError> {
    let create = options.create_size.is_some() && !options.read_only && !path.exists();
    if create {
        // Before anything is created: a refusal must leave no file behind.
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let dir = File::open(parent).map_err(|e| io_error(spec, "opening its directory", e))?;
        require_local(spec, &dir)?;
    }
    let is_node = match std::fs::metadata(path) {
        Ok(meta) => backing::usable_kind(spec, &meta)? == FileKind::Node,
        Err(_) => false,
    };
    // O_EXCL on a block device: refused while it is mounted or otherwise claimed. O_NONBLOCK: a path
    // to a pipe must not hang us; it means nothing to files and disks.
    let exclusive = if options.exclusive && is_node { libc::O_EXCL } else { 0 };
    OpenOptions::new()
        .read(true)
        .write(!options.read_only)
        .create(create)
        .mode(0o600)
        .custom_flags(libc::O_DIRECT | libc::O_CLOEXEC | libc::O_NONBLOCK | exclusive)
        .open(path)
        .map_err(|err| match err.raw_os_error() {
            Some(libc::EINVAL) => OpenError::NoDirectIo { spec: spec.into() },
            Some(libc::EROFS) => OpenError::ReadOnly { spec: spec.into() },
            Some(libc::EBUSY) => OpenError::InUse { spec: spec.into() },
            _ => io_error(spec, "open", err),
        })
}

/// Lets a regular file grow to `size_bytes`; never shrinks it.
fn grow(spec: &str, file: &File, backing: &Backing, size_bytes: u64) -> Result<(), OpenError> {
    if !matches!(backing.kind, Kind::Regular) {
        return Err(OpenError::FixedSize { spec: spec.into() });
    }
    let now = file.metadata().map_err(|e| io_error(spec, "stat", e))?.size();
    if now < size_bytes {
        file.set_len(size_bytes).map_err(|e| io_error(spec, "setting its size", e))?;
        // The size is metadata of the filesystem below; no later fdatasync has to care.
        file.sync_all().map_err(|e| io_error(spec, "fsync", e))?;
    }
    Ok(())
}

/// Logical block and size in bytes.
fn measure(
    spec: &str,
    file: &File,
    backing: &Backing,
    options: &FileOptions,
) -> Result<(u32, u64), OpenError> {
    let asked = options.logical_block_bytes;
    let (unit, size_bytes) = match backing.kind {
        Kind::Loop { .. } => {
            let protected = sys::block_device_read_only(file).map_err(|e| io_error(spec, "BLKROGET", e))?;
            if protected && !options.read_only {
                return Err(OpenError::ReadOnly { spec: spec.into() });
            }
            let unit = sys::block_device_logical_block(file).map_err(|e| io_error(spec, "BLKSSZGET", e))?;
            if asked.is_some_and(|asked| asked != unit) || (unit != 512 && unit != 4096) {
                let asked = asked.unwrap_or(4096);
                return Err(OpenError::LogicalBlockUnmet { spec: spec.into(), asked, needed: unit });
            }
            (unit, sys::block_device_size(file).map_err(|e| io_error(spec, "BLKGETSIZE64", e))?)
        }
        Kind::Regular => {
            let size_bytes = file.metadata().map_err(|e| io_error(spec, "stat", e))?.size();
            let unit = regular_logical_block(spec, file, backing.unit_bytes, asked, size_bytes)?;
            (unit, size_bytes)
        }
    };
    let whole_blocks = size_bytes - size_bytes % u64::from(unit);
    if whole_blocks == 0 {
        return Err(OpenError::TooSmall { spec: spec.into(), size_bytes, logical_block_bytes: unit });
    }
    Ok((unit, whole_blocks))
}

/// The smallest of 512 and 4096 (or the one asked for) that the filesystem below really takes.
fn regular_logical_block(
    spec: &str,
    file: &File,
    needed: u32,
    asked: Option<u32>,
    size_bytes: u64,
) -> Result<u32, OpenError> {
    use std::os::unix::fs::FileExt;
    let candidates: &[u32] = match asked {
        Some(512) => &[512],
        Some(_) => &[4096],
        None => &[512, 4096],
    };
    for &unit in candidates {
        // What statx says, and then the proof: older kernels say nothing.
        if unit < needed {
            continue;
        }
        if size_bytes < u64::from(unit) {
            return Err(OpenError::TooSmall { spec: spec.into(), size_bytes, logical_block_bytes: unit });
        }
        match file.read_at(&mut AlignedBuf::zeroed(unit as usize), 0) {
            Ok(_) => return Ok(unit),
            Err(err) if err.raw_os_error() == Some(libc::EINVAL) => {}
            Err(err) => return Err(io_error(spec, "reading its first block", err)),
        }
    }
    match asked {
        Some(asked) => {
            Err(OpenError::LogicalBlockUnmet { spec: spec.into(), asked, needed: needed.max(4096) })
        }
        None => Err(OpenError::NoDirectIo { spec: spec.into() }),
    }
}

/// Identity of what a path names, for [`super::open::device_identity`].
pub(super) fn identify(spec: &str, file: &File) -> Result<(u64, u64, u64, Option<u64>), OpenError> {
    let backing = resolve(spec, file, false)?;
    let meta = backing.lock_inode.metadata().map_err(|e| io_error(spec, "stat", e))?;
    let node = match backing.kind {
        Kind::Loop { node_rdev } => Some(node_rdev),
        Kind::Regular => None,
    };
    Ok((meta.dev(), meta.ino(), backing.base_bytes, node))
}
