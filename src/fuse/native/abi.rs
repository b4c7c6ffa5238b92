//! The bytes of /dev/fuse: Linux's `include/uapi/linux/fuse.h`, protocol 7.45 (Linux 6.18).
//!
//! Only what this transport reads or writes. Numbers are in the machine's own byte order, and fields lie where
//! they lie whatever their alignment, so that any slice of a message can be looked at as a structure.
//! Sizes are asserted below: a structure that is a byte too long makes the kernel refuse the answer.
//!
//! Not for: meaning. [`decode`](super::decode) and [`encode`](super::encode) know that.

use zerocopy::native_endian::{I32, I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The protocol this transport speaks; the kernel's own may be older or newer.
pub const MAJOR: u32 = 7;
pub const MINOR: u32 = 45;

/// What the kernel asks (`enum fuse_opcode`).
pub mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const NOTIFY_REPLY: u32 = 41;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const SYNCFS: u32 = 50;
    pub const TMPFILE: u32 = 51;
    pub const STATX: u32 = 52;
}

/// Messages that nobody asked for (`enum fuse_notify_code`).
pub mod notify {
    pub const INVAL_INODE: i32 = 2;
    pub const INC_EPOCH: i32 = 8;
}

bitflags::bitflags! {
    /// Abilities in INIT, both words of them.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct InitFlags: u64 {
        const ASYNC_READ = 1 << 0;
        const ATOMIC_O_TRUNC = 1 << 3;
        const BIG_WRITES = 1 << 5;
        const ASYNC_DIO = 1 << 15;
        const PARALLEL_DIROPS = 1 << 18;
        const MAX_PAGES = 1 << 22;
        const CACHE_SYMLINKS = 1 << 23;
        const EXPLICIT_INVAL_DATA = 1 << 25;
        /// The second word counts.
        const INIT_EXT = 1 << 30;
        const DIRECT_IO_ALLOW_MMAP = 1 << 36;
    }
}

bitflags::bitflags! {
    /// Fields of a SETATTR that are to be changed.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct SetAttrFlags: u32 {
        const MODE = 1 << 0;
        const UID = 1 << 1;
        const GID = 1 << 2;
        const SIZE = 1 << 3;
        const ATIME = 1 << 4;
        const MTIME = 1 << 5;
        const ATIME_NOW = 1 << 7;
        const MTIME_NOW = 1 << 8;
        const CTIME = 1 << 10;
    }
}

/// How the kernel treats an open file (`FOPEN_*`).
pub mod open_flag {
    pub const DIRECT_IO: u32 = 1 << 0;
    pub const KEEP_CACHE: u32 = 1 << 1;
    pub const NOFLUSH: u32 = 1 << 5;
    pub const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
}

/// Of WRITE: a page that the kernel writes back, by no particular descriptor.
pub const WRITE_CACHE: u32 = 1 << 0;
/// Of WRITE: the writer may not keep set-user-id and set-group-id bits.
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// Of FSYNC: the data only.
pub const FSYNC_DATA_ONLY: u32 = 1 << 0;
macro_rules! wire {
    ($($(#[$meta:meta])* $name:ident ($size:literal) { $($field:ident : $kind:ty),* $(,)? })*) => {$(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        pub struct $name { $(pub $field: $kind),* }
        const _: () = assert!(size_of::<$name>() == $size);
    )*};
}

wire! {
    /// Before every request.
    InHeader (40) {
        len: U32, opcode: U32, unique: U64, node: U64, uid: U32, gid: U32, pid: U32, extension_len: U16,
        padding: U16,
    }
    /// Before every answer and notification; `unique` is zero for the latter, and `error` their code.
    OutHeader (16) { len: U32, error: I32, unique: U64 }
    InitIn (16) { major: U32, minor: U32, max_readahead: U32, flags: U32 }
    /// What follows [`InitIn`] since 7.36.
    InitInMore (48) { flags2: U32, unused: [U32; 11] }
    InitOut (64) {
        major: U32, minor: U32, max_readahead: U32, flags: U32, max_background: U16, congestion_threshold: U16,
        max_write: U32, time_gran: U32, max_pages: U16, map_alignment: U16, flags2: U32, max_stack_depth: U32,
        request_timeout: U16, unused: [U16; 11],
    }
    Attr (88) {
        ino: U64, size: U64, blocks: U64, atime: U64, mtime: U64, ctime: U64, atime_nsec: U32, mtime_nsec: U32,
        ctime_nsec: U32, mode: U32, nlink: U32, uid: U32, gid: U32, rdev: U32, blksize: U32, flags: U32,
    }
    EntryOut (128) {
        node: U64, generation: U64, entry_valid: U64, attr_valid: U64, entry_valid_nsec: U32,
        attr_valid_nsec: U32, attr: Attr,
    }
    AttrOut (104) { attr_valid: U64, attr_valid_nsec: U32, padding: U32, attr: Attr }
    StatxTime (16) { sec: I64, nsec: U32, padding: U32 }
    /// What [`AttrOut`] says and the time of birth, in statx(2)'s own form.
    StatxOut (288) {
        attr_valid: U64, attr_valid_nsec: U32, flags: U32, spare: [U64; 2], mask: U32, blksize: U32,
        attributes: U64, nlink: U32, uid: U32, gid: U32, mode: U16, padding: U16, ino: U64, size: U64,
        blocks: U64, attributes_mask: U64, atime: StatxTime, btime: StatxTime, ctime: StatxTime,
        mtime: StatxTime, rdev_major: U32, rdev_minor: U32, dev_major: U32, dev_minor: U32,
        more_spare: [U64; 14],
    }
    SetAttrIn (88) {
        valid: U32, padding: U32, fh: U64, size: U64, lock_owner: U64, atime: U64, mtime: U64, ctime: U64,
        atime_nsec: U32, mtime_nsec: U32, ctime_nsec: U32, mode: U32, unused4: U32, uid: U32, gid: U32,
        unused5: U32,
    }
    MknodIn (16) { mode: U32, rdev: U32, umask: U32, padding: U32 }
    MkdirIn (8) { mode: U32, umask: U32 }
    RenameIn (8) { new_parent: U64 }
    Rename2In (16) { new_parent: U64, flags: U32, padding: U32 }
    LinkIn (8) { node: U64 }
    OpenIn (8) { flags: U32, open_flags: U32 }
    CreateIn (16) { flags: U32, mode: U32, umask: U32, open_flags: U32 }
    OpenOut (16) { fh: U64, open_flags: U32, backing_id: I32 }
    ReadIn (40) {
        fh: U64, offset: U64, size: U32, read_flags: U32, lock_owner: U64, flags: U32, padding: U32,
    }
    WriteIn (40) {
        fh: U64, offset: U64, size: U32, write_flags: U32, lock_owner: U64, flags: U32, padding: U32,
    }
    WriteOut (8) { size: U32, padding: U32 }
    ReleaseIn (24) { fh: U64, flags: U32, release_flags: U32, lock_owner: U64 }
    FlushIn (24) { fh: U64, unused: U32, padding: U32, lock_owner: U64 }
    FsyncIn (16) { fh: U64, fsync_flags: U32, padding: U32 }
    ForgetIn (8) { count: U64 }
    BatchForgetIn (8) { count: U32, padding: U32 }
    ForgetOne (16) { node: U64, count: U64 }
    InterruptIn (8) { unique: U64 }
    FallocateIn (32) { fh: U64, offset: U64, length: U64, mode: U32, padding: U32 }
    LseekIn (24) { fh: U64, offset: U64, whence: U32, padding: U32 }
    LseekOut (8) { offset: U64 }
    StatfsOut (80) {
        blocks: U64, bfree: U64, bavail: U64, files: U64, ffree: U64, bsize: U32, namelen: U32, frsize: U32,
        padding: U32, spare: [U32; 6],
    }
    /// Before each name of a listing; names are padded to eight bytes.
    Dirent (24) { ino: U64, cookie: U64, name_len: U32, kind: U32 }
    InvalInode (24) { node: U64, offset: I64, len: I64 }
}
