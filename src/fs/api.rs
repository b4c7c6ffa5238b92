//! What the filesystem offers to its callers (the kernel's door and tests), as types.
//!
//! Every operation is one method of [`Operations`]. An operation that would have to wait for another host
//! says so ([`FsError::WouldWait`]) when its context forbids waiting; the caller then repeats it where
//! waiting is allowed. An answer comes inside [`Answer`], which keeps the locks that cover it in use until
//! it is dropped: the caller drops it only after the answer reached its reader, so that nothing that a
//! reader may cache is handed out after the lock was given away.

use std::time::Duration;

use thiserror::Error;

pub use crate::layout::inode::Timestamp;
use crate::rt::Instant;
use crate::types::InodeNo;

/// Who asks, and whether the operation may wait for other hosts.
#[derive(Clone, Debug)]
pub struct OpContext {
    pub uid: u32,
    pub gid: u32,
    pub pid: u32,
    /// May the calling thread wait for a lock that another host holds, for journal space, for a commit?
    pub may_wait: bool,
    /// Set by the caller when the requester gave up (a signal); waits end with [`FsError::Interrupted`].
    pub interrupt: Option<std::sync::Arc<std::sync::atomic::AtomicBool>>,
    pub meant: Meant,
}

/// Which lives of inodes the asker means, where it learnt of them earlier. An inode's number is used anew
/// when its file is gone; an operation on another life than the one meant ends with [`FsError::Stale`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meant {
    lives: [Option<(InodeNo, u32)>; 2],
}

impl Meant {
    /// The inode of this generation. An operation names two inodes at most.
    pub fn add(&mut self, ino: InodeNo, generation: u32) {
        match self.lives.iter_mut().find(|life| life.is_none()) {
            Some(free) => *free = Some((ino, generation)),
            None => debug_assert!(false, "an operation on three inodes"),
        }
    }

    /// Does the asker mean another life of this inode?
    pub fn is_another(&self, ino: InodeNo, generation: u32) -> bool {
        self.lives.iter().flatten().any(|life| life.0 == ino && life.1 != generation)
    }
}

/// Why an operation failed. One errno each, in [`FsError::errno`].
#[derive(Debug, Error)]
pub enum FsError {
    #[error("no such file or directory")]
    NotFound,
    #[error("file exists")]
    Exists,
    #[error("not a directory")]
    NotDirectory,
    #[error("is a directory")]
    IsDirectory,
    #[error("directory not empty")]
    NotEmpty,
    #[error("file name too long")]
    NameTooLong,
    #[error("invalid argument")]
    Invalid,
    #[error("file too large")]
    TooLarge,
    #[error("no space left on the volume")]
    NoSpace,
    #[error("too many links")]
    TooManyLinks,
    #[error("operation not permitted")]
    NotPermitted,
    #[error("permission denied")]
    Access,
    #[error("read-only filesystem")]
    ReadOnly,
    #[error("stale handle")]
    Stale,
    #[error("no such device or address (nothing after this offset)")]
    NoData,
    #[error("too many levels of symbolic links or a directory moved into itself")]
    Loop,
    #[error("not supported")]
    NotSupported,
    #[error("interrupted")]
    Interrupted,
    /// The operation must be repeated where waiting is allowed; nothing was changed.
    #[error("would have to wait for another host")]
    WouldWait,
    /// This host may not touch the volume any more.
    #[error("this host has lost its lease or was shut down")]
    Fenced,
    /// The device has no room left below what it promised (thin provisioning, a sparse image).
    #[error("the device is full: {0}")]
    DeviceFull(String),
    /// The device or the bytes on it failed; the message says where.
    #[error("{0}")]
    Io(String),
}

impl FsError {
    /// The errno a program sees.
    pub fn errno(&self) -> i32 {
        match self {
            FsError::NotFound => libc::ENOENT,
            FsError::Exists => libc::EEXIST,
            FsError::NotDirectory => libc::ENOTDIR,
            FsError::IsDirectory => libc::EISDIR,
            FsError::NotEmpty => libc::ENOTEMPTY,
            FsError::NameTooLong => libc::ENAMETOOLONG,
            FsError::Invalid | FsError::Loop => libc::EINVAL,
            FsError::TooLarge => libc::EFBIG,
            FsError::NoSpace | FsError::DeviceFull(_) => libc::ENOSPC,
            FsError::TooManyLinks => libc::EMLINK,
            FsError::NotPermitted => libc::EPERM,
            FsError::Access => libc::EACCES,
            FsError::ReadOnly => libc::EROFS,
            FsError::Stale => libc::ESTALE,
            FsError::NoData => libc::ENXIO,
            FsError::NotSupported => libc::EOPNOTSUPP,
            FsError::Interrupted => libc::EINTR,
            // Never reaches a program: the caller repeats the operation.
            FsError::WouldWait => libc::EAGAIN,
            FsError::Fenced => libc::EIO,
            FsError::Io(_) => libc::EIO,
        }
    }
}

pub type FsResult<T> = Result<T, FsError>;

/// Keeps the locks that cover an answer in use. Opaque to callers.
pub trait Hold: Send {}

/// An answer and what keeps it true until the reader has it.
pub struct Answer<T> {
    pub value: T,
    /// How long the reader may cache it; zero for an answer without a covering lock.
    pub valid_for: Duration,
    /// Dropped last, after the answer was delivered.
    pub hold: Vec<Box<dyn Hold>>,
}

/// Attributes of an inode as stat(2) shows them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Attributes {
    pub ino: InodeNo,
    pub generation: u32,
    /// Type and permission bits.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub nlink: u32,
    pub rdev: u32,
    pub size: u64,
    /// In 512-byte units.
    pub blocks_512: u64,
    pub atime: Timestamp,
    pub mtime: Timestamp,
    pub ctime: Timestamp,
    pub btime: Timestamp,
}

/// A new value of a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    Now,
    At(Timestamp),
}

/// What setattr changes; `None` leaves a field alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetAttributes {
    /// Permission bits; the type can't change.
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    pub atime: Option<SetTime>,
    pub mtime: Option<SetTime>,
    pub ctime: Option<Timestamp>,
}

/// Handle of an open file or directory, unique per mount.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FileHandle(pub u64);

/// How the kernel's view of an open file may behave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    pub handle: FileHandle,
    /// Reads and writes of this descriptor come to us, past the page cache (every open that may write).
    pub direct_io: bool,
    /// Pages cached before are still valid (opens for reading).
    pub keep_cache: bool,
}

/// One entry of a directory listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    pub ino: InodeNo,
    /// Zero where it is not known (the entry "..").
    pub generation: u32,
    /// Position after this entry; stays valid while others insert and delete.
    pub cookie: u64,
    /// d_type of readdir(3): the file type bits of `mode` shifted right by 12.
    pub kind: u8,
    pub name: Vec<u8>,
    /// Filled by readdir with attributes where that needs no waiting.
    pub attributes: Option<Attributes>,
}

/// statfs(2), in units of 4 KiB blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeUsage {
    pub blocks: u64,
    pub free_blocks: u64,
    pub inodes: u64,
    pub free_inodes: u64,
}

/// Which bytes lseek(2) looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whence {
    Data,
    Hole,
}

/// All operations of a mounted volume. Inode numbers are the filesystem's own ([`Operations::root`] for
/// the root). Names are bytes without slash. Every mutating call is one transaction: wholly there or
/// wholly absent after a crash.
pub trait Operations: Send + Sync {
    fn root(&self) -> InodeNo;
    fn lookup(&self, cx: &OpContext, parent: InodeNo, name: &[u8]) -> FsResult<Answer<Attributes>>;
    fn getattr(&self, cx: &OpContext, ino: InodeNo) -> FsResult<Answer<Attributes>>;
    fn setattr(&self, cx: &OpContext, ino: InodeNo, set: &SetAttributes) -> FsResult<Answer<Attributes>>;
    fn readlink(&self, cx: &OpContext, ino: InodeNo) -> FsResult<Answer<Vec<u8>>>;
    /// Makes a regular file, device node, pipe or socket; `mode` holds type and permission bits after umask.
    fn mknod(
        &self,
        cx: &OpContext,
        parent: InodeNo,
        name: &[u8],
        mode: u32,
        rdev: u32,
    ) -> FsResult<Answer<Attributes>>;
    fn mkdir(&self, cx: &OpContext, parent: InodeNo, name: &[u8], mode: u32) -> FsResult<Answer<Attributes>>;
    fn symlink(
        &self,
        cx: &OpContext,
        parent: InodeNo,
        name: &[u8],
        target: &[u8],
    ) -> FsResult<Answer<Attributes>>;
    fn link(
        &self,
        cx: &OpContext,
        ino: InodeNo,
        new_parent: InodeNo,
        new_name: &[u8],
    ) -> FsResult<Answer<Attributes>>;
    fn unlink(&self, cx: &OpContext, parent: InodeNo, name: &[u8]) -> FsResult<Answer<()>>;
    fn rmdir(&self, cx: &OpContext, parent: InodeNo, name: &[u8]) -> FsResult<Answer<()>>;
    /// `flags`: RENAME_NOREPLACE and RENAME_EXCHANGE of renameat2(2).
    fn rename(
        &self,
        cx: &OpContext,
        parent: InodeNo,
        name: &[u8],
        new_parent: InodeNo,
        new_name: &[u8],
        flags: u32,
    ) -> FsResult<Answer<()>>;
    /// `flags` as in open(2); O_TRUNC truncates here.
    fn open(&self, cx: &OpContext, ino: InodeNo, flags: i32) -> FsResult<Answer<Opened>>;
    /// Creates (unless it exists and O_EXCL is absent) and opens in one transaction.
    fn create(
        &self,
        cx: &OpContext,
        parent: InodeNo,
        name: &[u8],
        mode: u32,
        flags: i32,
    ) -> FsResult<Answer<(Attributes, Opened)>>;
    /// Makes a regular file without a name and opens it. Unless `flags` say O_EXCL, `link` may give it one.
    fn tmpfile(
        &self,
        _cx: &OpContext,
        _parent: InodeNo,
        _mode: u32,
        _flags: i32,
    ) -> FsResult<Answer<(Attributes, Opened)>> {
        Err(FsError::NotSupported)
    }
    /// At most `len` bytes; fewer only at the end of the file.
    fn read(
        &self,
        cx: &OpContext,
        ino: InodeNo,
        handle: Option<FileHandle>,
        offset: u64,
        len: u32,
    ) -> FsResult<Answer<crate::device::AlignedBuf>>;
    /// Writes all of `data`; with `append` at the true end of the file, wherever the kernel believes it is.
    fn write(
        &self,
        cx: &OpContext,
        ino: InodeNo,
        handle: Option<FileHandle>,
        offset: u64,
        data: &[u8],
        append: bool,
    ) -> FsResult<Answer<u32>>;
    /// Close of one descriptor.
    fn flush(&self, cx: &OpContext, ino: InodeNo, handle: FileHandle) -> FsResult<Answer<()>>;
    /// The last use of the handle ended (mappings included). Never waits for other hosts.
    fn release(&self, ino: InodeNo, handle: FileHandle);
    /// Everything of this file is durable when it returns.
    fn fsync(&self, cx: &OpContext, ino: InodeNo, data_only: bool) -> FsResult<Answer<()>>;
    /// `mode` as in fallocate(2).
    fn fallocate(
        &self,
        cx: &OpContext,
        ino: InodeNo,
        handle: Option<FileHandle>,
        offset: u64,
        len: u64,
        mode: i32,
    ) -> FsResult<Answer<()>>;
    fn lseek(&self, cx: &OpContext, ino: InodeNo, offset: u64, whence: Whence) -> FsResult<Answer<u64>>;
    fn opendir(&self, cx: &OpContext, ino: InodeNo) -> FsResult<Answer<FileHandle>>;
    fn releasedir(&self, ino: InodeNo, handle: FileHandle);
    /// Entries after `cookie` (0: from the start), "." and ".." first; at least one unless at the end;
    /// about `max_bytes` of names and 32 bytes an entry. `plus` asks for attributes.
    fn readdir(
        &self,
        cx: &OpContext,
        ino: InodeNo,
        cookie: u64,
        max_bytes: usize,
        plus: bool,
    ) -> FsResult<Answer<Vec<DirEntry>>>;
    fn statfs(&self, cx: &OpContext) -> FsResult<VolumeUsage>;
    /// The whole volume as this host changed it is durable when it returns.
    fn sync(&self, cx: &OpContext) -> FsResult<()>;
    /// The kernel dropped `count` references to the inode. A hint.
    fn forget(&self, ino: InodeNo, count: u64);
}

/// What the filesystem asks of the kernel's door: make the kernel forget what a lock covered, before the
/// lock leaves this host. Called from threads that serve no request; may take as long as requests in
/// progress take.
pub trait KernelCaches: Send + Sync {
    /// Pages and attributes of the inode (written back first where the kernel has dirty ones).
    fn forget_inode(&self, ino: InodeNo);
    /// Names in every directory, and what is cached of this one.
    fn forget_names(&self, directory: InodeNo);
    /// Serve nothing more at all: the lease ended or the daemon gives up. The kernel shows nothing old any more when
    /// it returns, whoever else called it as well.
    fn silence(&self);
    /// The lease runs until then. Whoever silences the kernel when this process can't does so at that moment.
    /// Returns at once.
    fn lease_until(&self, until: Instant);
}
