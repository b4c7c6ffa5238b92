//! The transport by the `fuser` library: turns its calls into our requests and our replies into its own.
//! Nothing is decided here.
//!
//! What the library can't carry: INTERRUPT (a process that waits can't be killed until its answer comes),
//! SYNCFS, O_TMPFILE, the difference between flock and fcntl locks (so neither is asked for: both are the
//! kernel's own, valid on this host only), page-aligned write payloads, and a node without attributes in
//! a listing with attributes.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use fuser::{
    AccessFlags, CopyFileRangeFlags, Errno, FileHandle as Fh, Filesystem, INodeNo, InitFlags, IoctlFlags,
    KernelConfig, LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier, RenameFlags, ReplyAttr,
    ReplyBmap, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry,
    ReplyIoctl, ReplyLock, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, TimeOrNow,
    WriteFlags,
};

use super::capabilities::{Capabilities, OfferedFlags};
use super::handlers::Handlers;
use super::request::{Call, Caller, Name, NodeId, Payload, Request};
use super::transport::MAX_WRITE_BYTES;
use crate::fs::api::{FileHandle, SetAttributes, Whence};

mod opening;
mod replies;

pub(crate) use opening::open;
use replies::{To, set_time, timestamp};

/// What one listing asks for. The kernel passes the program's buffer size, usually this, but the library does
/// not pass it on.
const LISTING_BYTES: u32 = 32 * 1024;

/// What `fuser` calls.
pub(crate) struct FuserTransport {
    pub(crate) handlers: Arc<Handlers>,
    /// Filled when the kernel says what it can do.
    pub(crate) found: Arc<OnceLock<Capabilities>>,
    /// Behave as on a kernel without the newer abilities.
    pub(crate) pretend_old: bool,
    pub(crate) max_background: u16,
}

impl FuserTransport {
    fn serve(&self, request: &fuser::Request, call: Call<'_>, to: To) {
        let caller = Caller { uid: request.uid(), gid: request.gid(), pid: request.pid() };
        // INTERRUPT is refused by the library, so nobody will refer to it.
        self.handlers.serve(Request { unique: 0, caller, call }, to);
    }
}

fn name(name: &OsStr) -> Name<'_> {
    Cow::Borrowed(name.as_bytes())
}

fn node(ino: INodeNo) -> NodeId {
    NodeId(ino.0)
}

impl Filesystem for FuserTransport {
    fn init(&mut self, _req: &fuser::Request, config: &mut KernelConfig) -> io::Result<()> {
        let offered = config.capabilities();
        let has = |flag| offered.contains(flag);
        let protocol = config.kernel_abi();
        let capabilities = Capabilities::new(
            (protocol.0, protocol.1),
            OfferedFlags {
                direct_io_mmap: has(InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP),
                parallel_directory_operations: has(InitFlags::FUSE_PARALLEL_DIROPS),
                atomic_truncate: has(InitFlags::FUSE_ATOMIC_O_TRUNC),
                async_direct_io: has(InitFlags::FUSE_ASYNC_DIO),
                explicit_invalidation: has(InitFlags::FUSE_EXPLICIT_INVAL_DATA),
                cached_symlinks: has(InitFlags::FUSE_CACHE_SYMLINKS),
            },
            MAX_WRITE_BYTES,
            self.pretend_old,
        );
        if let Some(missing) = capabilities.missing_essentials() {
            log::error!("the kernel has no {missing}");
            return Err(io::Error::from_raw_os_error(libc::EPROTO));
        }
        // Not DO_READDIRPLUS: Linux stamps the names of such a listing with the epoch of the moment it enters
        // them, not of the request (fuse_direntplus_link in fs/fuse/readdir.c, seen in 6.18). A listing that
        // was answered, whose reader is slow, and whose directory leaves this host in between enters names
        // that INC_EPOCH no longer takes away. LOOKUP remembers the epoch of its request. Without names to
        // keep, such a listing is a listing, and plain ones need no locks of the children.
        // Not WRITEBACK_CACHE (the kernel would own size and mtime), not AUTO_INVAL_DATA (our own writes
        // would throw our cache away), not HANDLE_KILLPRIV (see the handlers), not POSIX_LOCKS or FLOCK_LOCKS.
        let mut wanted = InitFlags::FUSE_ASYNC_READ
            | InitFlags::FUSE_BIG_WRITES
            | InitFlags::FUSE_MAX_PAGES
            | InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_ASYNC_DIO
            | InitFlags::FUSE_ATOMIC_O_TRUNC
            | InitFlags::FUSE_EXPLICIT_INVAL_DATA
            | InitFlags::FUSE_CACHE_SYMLINKS;
        if capabilities.direct_io_mmap {
            wanted |= InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP;
        }
        // Only what the kernel offers; the capability table says what is missing.
        let _ = config.add_capabilities(wanted & offered);
        let _ = config.set_max_write(MAX_WRITE_BYTES);
        let _ = config.set_max_background(self.max_background);
        let _ = self.found.set(capabilities);
        Ok(())
    }

    fn lookup(&self, req: &fuser::Request, parent: INodeNo, name_: &OsStr, reply: ReplyEntry) {
        self.serve(req, Call::Lookup { parent: node(parent), name: name(name_) }, To::Entry(reply));
    }

    fn forget(&self, _req: &fuser::Request, ino: INodeNo, count: u64) {
        self.handlers.forget(node(ino), count);
    }

    fn getattr(&self, req: &fuser::Request, ino: INodeNo, _fh: Option<Fh>, reply: ReplyAttr) {
        self.serve(req, Call::GetAttributes { node: node(ino) }, To::Attr(reply));
    }

    fn setattr(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        ctime: Option<SystemTime>,
        _fh: Option<Fh>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = SetAttributes {
            mode: mode.map(|m| m & 0o7777),
            uid,
            gid,
            size,
            atime: atime.map(set_time),
            mtime: mtime.map(set_time),
            ctime: ctime.map(timestamp),
        };
        self.serve(req, Call::SetAttributes { node: node(ino), set }, To::Attr(reply));
    }

    fn readlink(&self, req: &fuser::Request, ino: INodeNo, reply: ReplyData) {
        self.serve(req, Call::ReadLink { node: node(ino) }, To::Data(reply));
    }

    fn mknod(
        &self,
        req: &fuser::Request,
        parent: INodeNo,
        name_: &OsStr,
        mode: u32,
        _umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let call = Call::MakeNode { parent: node(parent), name: name(name_), mode, rdev };
        self.serve(req, call, To::Entry(reply));
    }

    fn mkdir(
        &self,
        req: &fuser::Request,
        parent: INodeNo,
        name_: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let call = Call::MakeDirectory { parent: node(parent), name: name(name_), mode };
        self.serve(req, call, To::Entry(reply));
    }

    fn unlink(&self, req: &fuser::Request, parent: INodeNo, name_: &OsStr, reply: ReplyEmpty) {
        self.serve(req, Call::Unlink { parent: node(parent), name: name(name_) }, To::Empty(reply));
    }

    fn rmdir(&self, req: &fuser::Request, parent: INodeNo, name_: &OsStr, reply: ReplyEmpty) {
        let call = Call::RemoveDirectory { parent: node(parent), name: name(name_) };
        self.serve(req, call, To::Empty(reply));
    }

    fn symlink(
        &self,
        req: &fuser::Request,
        parent: INodeNo,
        link_name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let call = Call::MakeSymlink {
            parent: node(parent),
            name: name(link_name),
            target: name(target.as_os_str()),
        };
        self.serve(req, call, To::Entry(reply));
    }

    fn rename(
        &self,
        req: &fuser::Request,
        parent: INodeNo,
        name_: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let call = Call::Rename {
            parent: node(parent),
            name: name(name_),
            new_parent: node(newparent),
            new_name: name(newname),
            flags: flags.bits(),
        };
        self.serve(req, call, To::Empty(reply));
    }

    fn link(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        let call = Call::Link { node: node(ino), new_parent: node(newparent), new_name: name(newname) };
        self.serve(req, call, To::Entry(reply));
    }

    fn open(&self, req: &fuser::Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.serve(req, Call::Open { node: node(ino), flags: flags.0 }, To::Open(reply));
    }

    fn create(
        &self,
        req: &fuser::Request,
        parent: INodeNo,
        name_: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let call = Call::Create { parent: node(parent), name: name(name_), mode, flags };
        self.serve(req, call, To::Create(reply));
    }

    fn read(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        fh: Fh,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let call = Call::Read { node: node(ino), handle: FileHandle(fh.0), offset, len: size };
        self.serve(req, call, To::Data(reply));
    }

    fn write(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        fh: Fh,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let write_back = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let call = Call::Write {
            node: node(ino),
            handle: (!write_back).then_some(FileHandle(fh.0)),
            offset,
            data: Payload::Borrowed(data),
            // Write-back of a page goes where the page is, whatever descriptor the kernel picked for it.
            append: !write_back && flags.0 & libc::O_APPEND != 0,
            drop_privileges: write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID),
            durable: flags.0 & libc::O_DSYNC != 0,
        };
        self.serve(req, call, To::Write(reply));
    }

    fn flush(&self, req: &fuser::Request, ino: INodeNo, fh: Fh, _owner: LockOwner, reply: ReplyEmpty) {
        self.serve(req, Call::Flush { node: node(ino), handle: FileHandle(fh.0) }, To::Empty(reply));
    }

    fn release(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        fh: Fh,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.serve(req, Call::Release { node: node(ino), handle: FileHandle(fh.0) }, To::Empty(reply));
    }

    fn fsync(&self, req: &fuser::Request, ino: INodeNo, _fh: Fh, datasync: bool, reply: ReplyEmpty) {
        self.serve(req, Call::Sync { node: node(ino), data_only: datasync }, To::Empty(reply));
    }

    fn fsyncdir(&self, req: &fuser::Request, ino: INodeNo, _fh: Fh, datasync: bool, reply: ReplyEmpty) {
        self.serve(req, Call::Sync { node: node(ino), data_only: datasync }, To::Empty(reply));
    }

    fn opendir(&self, req: &fuser::Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.serve(req, Call::OpenDirectory { node: node(ino) }, To::Open(reply));
    }

    fn readdir(&self, req: &fuser::Request, ino: INodeNo, _fh: Fh, offset: u64, reply: ReplyDirectory) {
        let call =
            Call::ReadDirectory { node: node(ino), cookie: offset, max_bytes: LISTING_BYTES, plus: false };
        self.serve(req, call, To::Directory(reply));
    }

    fn readdirplus(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        _fh: Fh,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        let call =
            Call::ReadDirectory { node: node(ino), cookie: offset, max_bytes: LISTING_BYTES, plus: true };
        self.serve(req, call, To::DirectoryPlus(reply));
    }

    fn releasedir(&self, req: &fuser::Request, ino: INodeNo, fh: Fh, _flags: OpenFlags, reply: ReplyEmpty) {
        let call = Call::ReleaseDirectory { node: node(ino), handle: FileHandle(fh.0) };
        self.serve(req, call, To::Empty(reply));
    }

    fn statfs(&self, req: &fuser::Request, _ino: INodeNo, reply: ReplyStatfs) {
        self.serve(req, Call::Statistics, To::Statfs(reply));
    }

    fn fallocate(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        fh: Fh,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let handle = FileHandle(fh.0);
        let call = Call::Allocate { node: node(ino), handle, offset, len: length, mode };
        self.serve(req, call, To::Empty(reply));
    }

    fn lseek(
        &self,
        req: &fuser::Request,
        ino: INodeNo,
        _fh: Fh,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let whence = match whence {
            libc::SEEK_DATA => Whence::Data,
            libc::SEEK_HOLE => Whence::Hole,
            // The kernel answers the others itself.
            _ => return reply.error(Errno::EINVAL),
        };
        match u64::try_from(offset) {
            Ok(offset) => {
                self.serve(req, Call::Seek { node: node(ino), offset, whence }, To::Lseek(reply));
            }
            Err(_) => reply.error(Errno::ENXIO),
        }
    }

    // What follows we don't have. ENOSYS makes the kernel stop asking.

    fn setxattr(
        &self,
        _req: &fuser::Request,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn getxattr(&self, _: &fuser::Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _: &fuser::Request, _: INodeNo, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn removexattr(&self, _: &fuser::Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn access(&self, _: &fuser::Request, _: INodeNo, _: AccessFlags, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn getlk(
        &self,
        _: &fuser::Request,
        _: INodeNo,
        _: Fh,
        _: LockOwner,
        _: u64,
        _: u64,
        _: i32,
        _: u32,
        reply: ReplyLock,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn setlk(
        &self,
        _: &fuser::Request,
        _: INodeNo,
        _: Fh,
        _: LockOwner,
        _: u64,
        _: u64,
        _: i32,
        _: u32,
        _: bool,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn bmap(&self, _: &fuser::Request, _: INodeNo, _: u32, _: u64, reply: ReplyBmap) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _: &fuser::Request,
        _: INodeNo,
        _: Fh,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn poll(
        &self,
        _: &fuser::Request,
        _: INodeNo,
        _: Fh,
        _: PollNotifier,
        _: PollEvents,
        _: PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn copy_file_range(
        &self,
        _: &fuser::Request,
        _: INodeNo,
        _: Fh,
        _: u64,
        _: INodeNo,
        _: Fh,
        _: u64,
        _: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::ENOSYS);
    }
}
