//! What a path really stands on: the one inode on which all hosts of this machine must lock.
//!
//! * A regular file: itself, at offset 0.
//! * A loop device: its backing file, at the loop's offset, because several loop devices (one per
//!   "host" of a test) may stand over one file. The file is found by the name the kernel reports
//!   and believed only if device and inode number are the ones that the loop driver holds open.
//! * Any other block device: refused. A lock on a device node is a lock on that *node's inode*, not
//!   on the device: a second node, a partition or a mapping of the same device would not meet it,
//!   and other machines never would. Partitions of a loop device are refused for the same reason.
//!
//! The inode must live on a filesystem of a fixed list of local ones. A list of known remote ones would
//! let the next one through: NFS loses locks silently after its own lease, FUSE hides what is behind
//! it, and the cluster filesystems differ in what their locks mean.

use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;

use nix::sys::stat::{major, makedev, minor};
use nix::sys::statfs::fstatfs;

use super::locks::CacheMode;
use super::sys::{self, DirectIo, LoopInfo64};
use crate::device::OpenError;

/// Major number of whole loop devices (`Documentation/admin-guide/devices.txt`).
const LOOP_MAJOR: u64 = 7;

/// What the type of a filesystem means for locks taken on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Locality {
    /// One kernel owns it, so its locks are everybody's locks. Blocks lie on a device below.
    Local,
    /// As `Local`, and the page cache *is* the storage.
    Memory,
    /// Copies a sector-sized direct write through the page cache; needs 4096-byte units.
    LocalCoarse,
    Remote(&'static str),
    Unknown,
}

/// Judges the `f_type` of `statfs`.
pub(crate) fn locality(f_type: u64) -> Locality {
    match f_type {
        0xEF53 => Locality::Local,      // ext2, ext3, ext4
        0x5846_5342 => Locality::Local, // xfs
        0xF2F5_2010 => Locality::Local, // f2fs
        0xCA45_1A4E => Locality::Local, // bcachefs
        0x3153_464A => Locality::Local, // jfs
        0x3434 => Locality::Local,      // nilfs2
        // Overlay: an inode of its own, the same for all that come through the same mount; overlayfs
        // itself forbids to touch the layers beside it.
        0x794C_7630 => Locality::Local,
        0x9123_683E => Locality::LocalCoarse, // btrfs
        0x2FC1_2FC1 => Locality::LocalCoarse, // zfs
        0x0102_1994 => Locality::Memory,      // tmpfs
        0x8584_58F6 => Locality::Memory,      // ramfs
        0x6969 => Locality::Remote("NFS"),
        0x517B | 0xFF53_4D42 | 0xFE53_4D42 => Locality::Remote("SMB/CIFS"),
        0x6573_5546 => Locality::Remote("FUSE (what is behind it can't be seen)"),
        0x0102_1997 => Locality::Remote("9p"),
        0x00C3_6400 => Locality::Remote("CephFS"),
        0x0BD0_0BD0 => Locality::Remote("Lustre"),
        0x5346_414F | 0x6B41_4653 => Locality::Remote("AFS"),
        0x7375_7245 => Locality::Remote("Coda"),
        0x0116_1970 => Locality::Remote("GFS2"),
        0x7461_636F => Locality::Remote("OCFS2"),
        0x4750_4653 => Locality::Remote("GPFS"),
        0x786F_4256 => Locality::Remote("a VirtualBox shared folder"),
        _ => Locality::Unknown,
    }
}

/// Is this the device number of a whole loop device?
pub(crate) fn is_loop_device(rdev: u64) -> bool {
    major(rdev) == LOOP_MAJOR
}

/// What is below a path.
pub(crate) enum Kind {
    Regular,
    Loop { node_rdev: u64 },
}

/// A path resolved: how to reach the data, and where to lock.
pub(crate) struct Backing {
    pub kind: Kind,
    /// An open description of the agreed inode, for locks only.
    pub lock_inode: File,
    /// Byte of the agreed inode at which the device begins.
    pub base_bytes: u64,
    pub cache_mode: CacheMode,
    /// What direct I/O on a regular file needs at least; 1 where nothing is known.
    pub unit_bytes: u32,
    pub volatile_cache: bool,
}

/// Resolves an open file or device node; `writable` as it was opened.
pub(crate) fn resolve(spec: &str, file: &File, writable: bool) -> Result<Backing, OpenError> {
    let meta = file.metadata().map_err(|e| io_error(spec, "stat", e))?;
    match usable_kind(spec, &meta)? {
        FileKind::Regular => regular(spec, file),
        FileKind::Node => loop_device(spec, file, meta.rdev(), writable),
    }
}

/// What this backend takes at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileKind {
    Regular,
    /// The node of a whole loop device.
    Node,
}

/// Judges by the kind of file alone, so that nothing else is opened, let alone for writing.
pub(crate) fn usable_kind(spec: &str, meta: &Metadata) -> Result<FileKind, OpenError> {
    if meta.file_type().is_file() {
        return Ok(FileKind::Regular);
    }
    if !meta.file_type().is_block_device() {
        return Err(OpenError::WrongKind { spec: spec.into() });
    }
    if is_loop_device(meta.rdev()) {
        return Ok(FileKind::Node);
    }
    Err(refuse_block_device(spec, meta.rdev()))
}

fn regular(spec: &str, file: &File) -> Result<Backing, OpenError> {
    let local = require_local(spec, file)?;
    let direct = sys::direct_io(file).map_err(|e| io_error(spec, "statx", e))?;
    let unit_bytes = match (local, direct) {
        (Locality::LocalCoarse, DirectIo::Aligned { offset_bytes, .. }) => offset_bytes.max(4096),
        (Locality::LocalCoarse, _) => 4096,
        (_, DirectIo::Aligned { offset_bytes, memory_bytes }) => offset_bytes.max(memory_bytes),
        (_, DirectIo::PageCacheOnly | DirectIo::Unknown) => 1,
    };
    let through_cache = local == Locality::Memory || direct == DirectIo::PageCacheOnly;
    Ok(Backing {
        kind: Kind::Regular,
        lock_inode: file.try_clone().map_err(|e| io_error(spec, "dup", e))?,
        base_bytes: 0,
        cache_mode: if through_cache { CacheMode::PageCache } else { CacheMode::Direct },
        unit_bytes,
        // A disk's own write cache lies below any filesystem, and fdatasync is what reaches it.
        volatile_cache: true,
    })
}

/// Fails unless the file lies on a filesystem that only this machine serves.
pub(crate) fn require_local(spec: &str, file: impl AsFd) -> Result<Locality, OpenError> {
    let stat = fstatfs(file).map_err(|e| io_error(spec, "statfs", e.into()))?;
    // The field is a signed word on some architectures; the magics are 32-bit numbers everywhere.
    let magic = stat.filesystem_type().0 as u64 & 0xFFFF_FFFF;
    match locality(magic) {
        Locality::Remote(kind) => Err(OpenError::RemoteFilesystem { spec: spec.into(), kind }),
        Locality::Unknown => Err(OpenError::UnknownFilesystem { spec: spec.into(), magic }),
        local => Ok(local),
    }
}

/// Fails unless a loop device stands on a local regular file that can be opened and is the right one.
fn loop_device(spec: &str, node: &File, rdev: u64, writable: bool) -> Result<Backing, OpenError> {
    let status = loop_status(spec, node)?;
    let (backing_path, backing) = open_loop_backing(spec, rdev, &status, writable)?;
    let refuse = |why: String| OpenError::LoopBacking {
        spec: spec.into(),
        backing: backing_path.display().to_string(),
        why,
    };
    let local = require_local(spec, &backing).map_err(|e| refuse(e.to_string()))?;
    let mut flags = status.flags;
    if flags & LoopInfo64::FLAG_DIRECT_IO == 0 && writable {
        // Direct I/O below the loop device avoids a second copy and the mixture that `Presence`
        // refuses. Where the file can't do it the page cache serves: coherent if all do the same.
        if sys::loop_set_direct_io(node).is_ok() {
            flags = loop_status(spec, node)?.flags;
        }
    }
    let direct = flags & LoopInfo64::FLAG_DIRECT_IO != 0 && local != Locality::Memory;
    Ok(Backing {
        kind: Kind::Loop { node_rdev: rdev },
        lock_inode: backing,
        base_bytes: status.offset,
        cache_mode: if direct { CacheMode::Direct } else { CacheMode::PageCache },
        unit_bytes: 1,
        volatile_cache: volatile_cache_of(rdev),
    })
}

fn loop_status(spec: &str, node: &File) -> Result<LoopInfo64, OpenError> {
    sys::loop_status(node).map_err(|err| match err.raw_os_error() {
        Some(libc::ENXIO) => OpenError::LoopDetached { spec: spec.into() },
        _ => io_error(spec, "loop status", err),
    })
}

/// Opens the file under a loop device and proves that it is that file.
fn open_loop_backing(
    spec: &str,
    rdev: u64,
    status: &LoopInfo64,
    writable: bool,
) -> Result<(PathBuf, File), OpenError> {
    let attribute = sysfs(rdev).join("loop/backing_file");
    let mut name =
        std::fs::read(&attribute).map_err(|e| io_error(spec, "reading the loop's backing file name", e))?;
    if name.last() == Some(&b'\n') {
        name.pop();
    }
    let path = PathBuf::from(OsString::from_vec(name));
    let refuse =
        |why: String| OpenError::LoopBacking { spec: spec.into(), backing: path.display().to_string(), why };
    // Never a blocking open: the name could be anything by now.
    let file =
        File::options().read(true).write(writable).custom_flags(libc::O_NONBLOCK).open(&path).map_err(
            |e| refuse(format!("it can't be opened (deleted, or in another mount namespace?): {e}")),
        )?;
    let meta = file.metadata().map_err(|e| refuse(e.to_string()))?;
    if !meta.file_type().is_file() {
        return Err(refuse("it is not a regular file".into()));
    }
    if meta.ino() != status.inode || meta.dev() != decode_kernel_dev(status.device) {
        return Err(refuse("another file stands under that name now".into()));
    }
    Ok((path, file))
}

/// Device numbers in the loop driver's answers are in the kernel's encoding (`huge_encode_dev`).
fn decode_kernel_dev(encoded: u64) -> u64 {
    let major_number = (encoded >> 8) & 0xFFF;
    let minor_number = (encoded & 0xFF) | ((encoded >> 12) & 0xFFF00);
    makedev(major_number, minor_number)
}

/// SCSI disks and what maps them are the `scsi` backend's, which says what it refuses; here is what is left.
fn refuse_block_device(spec: &str, rdev: u64) -> OpenError {
    let spec = spec.to_string();
    if sysfs(rdev).join("partition").exists() {
        return OpenError::Partition { spec };
    }
    OpenError::NotEmulated { spec }
}

/// Does the kernel say that the device keeps answered writes in a cache? Yes when in doubt.
fn volatile_cache_of(rdev: u64) -> bool {
    match std::fs::read_to_string(sysfs(rdev).join("queue/write_cache")) {
        Ok(text) => text.trim() != "write through",
        Err(_) => true,
    }
}

fn sysfs(rdev: u64) -> PathBuf {
    // The link is followed, so that `..` names the disk of a partition.
    let link = PathBuf::from(format!("/sys/dev/block/{}:{}", major(rdev), minor(rdev)));
    std::fs::canonicalize(&link).unwrap_or(link)
}

pub(crate) fn io_error(spec: &str, what: &'static str, source: io::Error) -> OpenError {
    OpenError::Io { spec: spec.into(), what, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_local_filesystems_pass() {
        assert_eq!(locality(0xEF53), Locality::Local);
        assert_eq!(locality(0x0102_1994), Locality::Memory);
        assert_eq!(locality(0x6969), Locality::Remote("NFS"));
        assert_eq!(locality(0xFE53_4D42), Locality::Remote("SMB/CIFS"));
        assert!(matches!(locality(0x6573_5546), Locality::Remote(_)));
        assert_eq!(locality(0xDEAD_BEEF), Locality::Unknown);
        let text = OpenError::RemoteFilesystem { spec: "/mnt/a.img".into(), kind: "NFS" }.to_string();
        assert!(text.contains("'/mnt/a.img' lies on NFS"), "{text}");
    }

    #[test]
    fn kernel_device_numbers_are_decoded() {
        // 254:3 and a minor number beyond eight bits, as huge_encode_dev packs them.
        assert_eq!(decode_kernel_dev(0xFE03), makedev(254, 3));
        assert_eq!(decode_kernel_dev((0x12 << 12 << 8) | (8 << 8) | 0x34), makedev(8, 0x1234));
    }

    #[test]
    fn procfs_is_not_a_place_for_a_volume() {
        let file = File::open("/proc/self/status").unwrap();
        assert!(matches!(require_local("x", &file), Err(OpenError::UnknownFilesystem { .. })));
    }
}
