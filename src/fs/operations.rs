//! The operations as callers see them.

use super::api::*;
use super::attr::{TYPE_MASK, attributes, is_directory};
use super::namespace::Make;
use super::op::{Needs, OpResult};
use super::{Fs, LONG};
use crate::device::AlignedBuf;
use crate::layout::inode::InodeDisk;
use crate::lock::{Access, Mode};
use crate::types::InodeNo;

fn opened(handle: FileHandle, flags: i32) -> Opened {
    let writes = flags & libc::O_ACCMODE != libc::O_RDONLY;
    Opened { handle, direct_io: writes, keep_cache: !writes }
}

fn writes(flags: i32) -> bool {
    flags & libc::O_ACCMODE != libc::O_RDONLY
}

impl Fs {
    /// A host that opens a file for writing holds its lock exclusively from then on.
    fn open_needs(ino: InodeNo, flags: i32) -> Needs {
        let mut needs = Needs::read(&[ino]);
        if writes(flags) {
            needs.inodes.insert(ino, (Mode::Exclusive, Access::Overwrite));
        }
        needs
    }
}

impl Operations for Fs {
    fn root(&self) -> InodeNo {
        self.geometry.root()
    }

    fn lookup(&self, cx: &OpContext, parent: InodeNo, name: &[u8]) -> FsResult<Answer<Attributes>> {
        self.do_lookup(cx, parent, name)
    }

    fn getattr(&self, cx: &OpContext, ino: InodeNo) -> FsResult<Answer<Attributes>> {
        self.do_getattr(cx, ino)
    }

    fn setattr(&self, cx: &OpContext, ino: InodeNo, set: &SetAttributes) -> FsResult<Answer<Attributes>> {
        self.do_setattr(cx, ino, set)
    }

    fn readlink(&self, cx: &OpContext, ino: InodeNo) -> FsResult<Answer<Vec<u8>>> {
        self.do_readlink(cx, ino)
    }

    fn mknod(
        &self,
        cx: &OpContext,
        parent: InodeNo,
        name: &[u8],
        mode: u32,
        rdev: u32,
    ) -> FsResult<Answer<Attributes>> {
        let mode = if mode & TYPE_MASK == 0 { mode | libc::S_IFREG } else { mode };
        match mode & TYPE_MASK {
            libc::S_IFREG | libc::S_IFCHR | libc::S_IFBLK | libc::S_IFIFO | libc::S_IFSOCK => {}
            _ => return Err(FsError::Invalid),
        }
        self.make(cx, parent, name, &Make { mode, rdev, target: None })
    }

    fn mkdir(&self, cx: &OpContext, parent: InodeNo, name: &[u8], mode: u32) -> FsResult<Answer<Attributes>> {
        let mode = mode & 0o7777 | libc::S_IFDIR;
        self.make(cx, parent, name, &Make { mode, rdev: 0, target: None })
    }

    fn symlink(
        &self,
        cx: &OpContext,
        parent: InodeNo,
        name: &[u8],
        target: &[u8],
    ) -> FsResult<Answer<Attributes>> {
        let mode = libc::S_IFLNK | 0o777;
        self.make(cx, parent, name, &Make { mode, rdev: 0, target: Some(target) })
    }

    fn link(
        &self,
        cx: &OpContext,
        ino: InodeNo,
        new_parent: InodeNo,
        new_name: &[u8],
    ) -> FsResult<Answer<Attributes>> {
        self.do_link(cx, ino, new_parent, new_name)
    }

    fn unlink(&self, cx: &OpContext, parent: InodeNo, name: &[u8]) -> FsResult<Answer<()>> {
        self.do_unlink(cx, parent, name)
    }

    fn rmdir(&self, cx: &OpContext, parent: InodeNo, name: &[u8]) -> FsResult<Answer<()>> {
        self.do_rmdir(cx, parent, name)
    }

    fn rename(
        &self,
        cx: &OpContext,
        parent: InodeNo,
        name: &[u8],
        new_parent: InodeNo,
        new_name: &[u8],
        flags: u32,
    ) -> FsResult<Answer<()>> {
        self.do_rename(cx, parent, name, new_parent, new_name, flags)
    }

    fn open(&self, cx: &OpContext, ino: InodeNo, flags: i32) -> FsResult<Answer<Opened>> {
        if writes(flags) {
            self.may_change()?;
        }
        if flags & libc::O_TRUNC != 0 && writes(flags) {
            self.set_size(cx, ino, 0)?;
        }
        let answer = self.run(cx, Self::open_needs(ino, flags), |op| -> OpResult<FileHandle> {
            let (mode, access) = match writes(flags) {
                // Keeps the lock from stepping down to a share before the open is known.
                true => (Mode::Exclusive, Access::Overwrite),
                false => (Mode::Shared, Access::Read),
            };
            let guard = op.inode(ino, mode, access)?;
            let block = op.body(&guard, ino)?;
            if is_directory(InodeDisk::of(&block)) && writes(flags) {
                return Err(FsError::IsDirectory.into());
            }
            // Under the guard: whoever gives the lock away sees the open.
            Ok(self.open_handle(ino, flags))
        })?;
        Ok(Answer { value: opened(answer.value, flags), valid_for: answer.valid_for, hold: answer.hold })
    }

    fn create(
        &self,
        cx: &OpContext,
        parent: InodeNo,
        name: &[u8],
        mode: u32,
        flags: i32,
    ) -> FsResult<Answer<(Attributes, Opened)>> {
        self.may_change()?;
        super::namespace::check_name(name)?;
        let make = Make { mode: mode & 0o7777 | libc::S_IFREG, rdev: 0, target: None };
        let truncates = flags & libc::O_TRUNC != 0 && writes(flags);
        loop {
            let mut registered = None;
            let answer = self.run(cx, Needs::write(&[parent]), |op| {
                let dir = op.write_inode(parent)?;
                op.directory(&dir, parent)?;
                let (ino, guard) = match op.find(&dir, parent, name)? {
                    Some(_) if flags & libc::O_EXCL != 0 => return Err(FsError::Exists.into()),
                    Some(found) => (found.target.ino, op.write_inode(found.target.ino)?),
                    None => self.make_in(op, cx, parent, name, &make)?,
                };
                let block = op.body(&guard, ino)?;
                let body = InodeDisk::of(&block);
                if is_directory(body) {
                    return Err(FsError::IsDirectory.into());
                }
                let must_truncate = truncates && body.size.get() > 0;
                if !must_truncate {
                    registered = Some(self.open_handle(ino, flags));
                }
                Ok((attributes(ino, body), must_truncate))
            });
            if let (Err(_), Some(handle)) = (&answer, registered) {
                self.close_handle(handle);
            }
            let answer = answer?;
            let (attributes, must_truncate) = answer.value;
            let Some(handle) = registered.filter(|_| !must_truncate) else {
                drop(answer.hold);
                self.set_size(cx, attributes.ino, 0)?;
                continue;
            };
            let value = (attributes, opened(handle, flags));
            return Ok(Answer { value, valid_for: answer.valid_for, hold: answer.hold });
        }
    }

    fn tmpfile(
        &self,
        cx: &OpContext,
        parent: InodeNo,
        mode: u32,
        flags: i32,
    ) -> FsResult<Answer<(Attributes, Opened)>> {
        let Answer { value: (attributes, handle), valid_for, hold } =
            self.do_tmpfile(cx, parent, mode, flags)?;
        Ok(Answer { value: (attributes, opened(handle, flags)), valid_for, hold })
    }

    fn read(
        &self,
        cx: &OpContext,
        ino: InodeNo,
        _handle: Option<FileHandle>,
        offset: u64,
        len: u32,
    ) -> FsResult<Answer<AlignedBuf>> {
        self.do_read(cx, ino, offset, len)
    }

    fn write(
        &self,
        cx: &OpContext,
        ino: InodeNo,
        handle: Option<FileHandle>,
        offset: u64,
        data: &[u8],
        append: bool,
    ) -> FsResult<Answer<u32>> {
        self.do_write(cx, ino, handle, offset, data, append)
    }

    fn flush(&self, _cx: &OpContext, _ino: InodeNo, _handle: FileHandle) -> FsResult<Answer<()>> {
        Ok(Answer { value: (), valid_for: LONG, hold: Vec::new() })
    }

    fn release(&self, _ino: InodeNo, handle: FileHandle) {
        if let Some((file, last)) = self.close_handle(handle)
            && last
        {
            self.closed(file.ino);
        }
    }

    fn fsync(&self, _cx: &OpContext, _ino: InodeNo, _data_only: bool) -> FsResult<Answer<()>> {
        self.store.sync()?;
        Ok(Answer { value: (), valid_for: LONG, hold: Vec::new() })
    }

    fn fallocate(
        &self,
        cx: &OpContext,
        ino: InodeNo,
        _handle: Option<FileHandle>,
        offset: u64,
        len: u64,
        mode: i32,
    ) -> FsResult<Answer<()>> {
        self.do_fallocate(cx, ino, offset, len, mode)
    }

    fn lseek(&self, cx: &OpContext, ino: InodeNo, offset: u64, whence: Whence) -> FsResult<Answer<u64>> {
        self.do_lseek(cx, ino, offset, whence)
    }

    fn opendir(&self, cx: &OpContext, ino: InodeNo) -> FsResult<Answer<FileHandle>> {
        let answer = self.run(cx, Needs::read(&[ino]), |op| {
            let guard = op.read_inode(ino)?;
            op.directory(&guard, ino)?;
            Ok(())
        })?;
        let handle = self.open_handle(ino, libc::O_RDONLY);
        Ok(Answer { value: handle, valid_for: answer.valid_for, hold: answer.hold })
    }

    fn releasedir(&self, ino: InodeNo, handle: FileHandle) {
        self.release(ino, handle);
    }

    fn readdir(
        &self,
        cx: &OpContext,
        ino: InodeNo,
        cookie: u64,
        max_bytes: usize,
        plus: bool,
    ) -> FsResult<Answer<Vec<DirEntry>>> {
        self.do_readdir(cx, ino, cookie, max_bytes, plus)
    }

    fn statfs(&self, _cx: &OpContext) -> FsResult<VolumeUsage> {
        let blocks = self.geometry.usable_blocks();
        let (others_blocks, others_inodes) = self.peers.others_net();
        let (own_blocks, own_inodes) = self.store.net();
        let used = (others_blocks + own_blocks).max(0) as u64;
        let free_blocks = blocks.saturating_sub(used);
        let used_inodes = (others_inodes + own_inodes).max(0) as u64;
        // Inodes come out of free blocks, two each.
        let free_inodes = free_blocks / 2;
        Ok(VolumeUsage { blocks, free_blocks, inodes: used_inodes + free_inodes, free_inodes })
    }

    fn sync(&self, _cx: &OpContext) -> FsResult<()> {
        Ok(self.store.sync()?)
    }

    fn forget(&self, _ino: InodeNo, _count: u64) {}
}
