//! Why a device was not opened: one clear sentence each, for a person who typed a path.

use std::io;

use thiserror::Error;

/// Why `open_device` refused.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    #[error("'{spec}': {what}: {source}")]
    Io { spec: String, what: &'static str, source: io::Error },
    #[error("'{spec}' is neither a regular file nor a block device")]
    WrongKind { spec: String },
    #[error("'{spec}': {why}")]
    Kernel { spec: String, why: String },
    #[error(
        "'{spec}' names an iSCSI target, and this program was built without iSCSI (libiscsi was not found)"
    )]
    NoIscsiBackend { spec: String },
    #[error("'{spec}': {why}")]
    Iscsi { spec: String, why: String },
    #[error(
        "'{spec}' is a block device without a compare-and-write of its own, and it can't be emulated: other \
         machines, or other names of the device on this one, would not see the locks; use a regular file on a \
         local filesystem or a loop device over one"
    )]
    NotEmulated { spec: String },
    #[error("'{spec}' is a partition; give the whole loop device or the file under it")]
    Partition { spec: String },
    #[error(
        "'{spec}' lies on {kind}, where locks of other machines are not seen or are lost silently; only local filesystems are accepted"
    )]
    RemoteFilesystem { spec: String, kind: &'static str },
    #[error(
        "'{spec}' lies on a filesystem of type {magic:#x}, which is not known to be local to this machine"
    )]
    UnknownFilesystem { spec: String, magic: u64 },
    #[error("'{spec}' is a loop device without a backing file")]
    LoopDetached { spec: String },
    #[error(
        "the backing file '{backing}' of '{spec}' can't be used for locks, so hosts on other loop devices over \
         it could not be kept out: {why}"
    )]
    LoopBacking { spec: String, backing: String, why: String },
    #[error("'{spec}' is read-only")]
    ReadOnly { spec: String },
    #[error(
        "'{spec}' is in use: another process, or another open device of this one, has it open and one of the two wants it alone"
    )]
    InUse { spec: String },
    #[error(
        "'{spec}' is open elsewhere with another kind of caching (a loop device without direct I/O beside direct \
         I/O on the same file), which would lose coherence; use direct I/O for all or for none"
    )]
    MixedCaching { spec: String },
    #[error("'{spec}': the filesystem does not support direct I/O")]
    NoDirectIo { spec: String },
    #[error("a logical block of {asked} bytes was asked for; only 512 and 4096 are possible")]
    BadLogicalBlock { asked: u32 },
    #[error(
        "'{spec}' needs direct I/O in units of {needed} bytes, so its logical block can't be {asked} bytes"
    )]
    LogicalBlockUnmet { spec: String, asked: u32, needed: u32 },
    #[error("'{spec}' has {size_bytes} bytes, less than one logical block of {logical_block_bytes}")]
    TooSmall { spec: String, size_bytes: u64, logical_block_bytes: u32 },
    #[error("'{spec}' has a fixed size; a size can be given only for regular files")]
    FixedSize { spec: String },
}
