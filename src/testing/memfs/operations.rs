//! The operations of the in-memory filesystem.

use super::node::{Body, COOKIE_DOT, COOKIE_DOT_DOT};
use super::{MemFs, ROOT, State, check_new_name, now};
use crate::device::AlignedBuf;
use crate::fs::api::{
    Answer, Attributes, DirEntry, FileHandle, FsError, FsResult, OpContext, Opened, Operations,
    SetAttributes, SetTime, VolumeUsage, Whence,
};
use crate::types::InodeNo;

/// Larger files are refused, as on a volume.
const MAX_FILE_BYTES: u64 = 64 << 40;
const MAX_LINKS: u32 = 65_000;

fn check_end(offset: u64, len: u64) -> FsResult<u64> {
    offset.checked_add(len).filter(|end| *end <= MAX_FILE_BYTES).ok_or(FsError::TooLarge)
}

impl State {
    fn attributes_of(&self, ino: InodeNo) -> FsResult<Answer<Attributes>> {
        Ok(self.answer(self.node(ino)?.attributes()))
    }

    fn child(&self, parent: InodeNo, name: &[u8]) -> FsResult<Option<u64>> {
        check_new_name(name)?;
        Ok(self.node(parent)?.directory()?.find(name))
    }

    fn open_answer(&mut self, ino: InodeNo, flags: i32) -> FsResult<Opened> {
        let writes = flags & libc::O_ACCMODE != libc::O_RDONLY;
        if flags & libc::O_TRUNC != 0 {
            let node = self.node_mut(ino)?;
            node.file_mut()?.truncate(0);
            node.touch_content();
        }
        let handle = self.open_handle(ino)?;
        Ok(Opened { handle: FileHandle(handle), direct_io: writes, keep_cache: !writes })
    }

    fn list(&self, ino: InodeNo, cookie: u64, max_bytes: usize, plus: bool) -> FsResult<Vec<DirEntry>> {
        let directory = self.node(ino)?.directory()?;
        let dots = [(COOKIE_DOT, &b"."[..], ino.0), (COOKIE_DOT_DOT, b"..", directory.parent)];
        let mut left = max_bytes;
        let mut entries = Vec::new();
        let after = dots.into_iter().filter(|(c, ..)| *c > cookie).chain(directory.after(cookie));
        for (cookie, name, ino) in after {
            let needs = name.len() + 32;
            if needs > left && !entries.is_empty() {
                break;
            }
            left = left.saturating_sub(needs);
            let node = self.nodes.get(&ino);
            entries.push(DirEntry {
                ino: InodeNo(ino),
                generation: node.map_or(0, |n| n.attributes().generation),
                cookie,
                kind: node.map_or(4, |n| (n.mode >> 12) as u8),
                name: name.to_vec(),
                attributes: node.filter(|_| plus).map(|n| n.attributes()),
            });
        }
        Ok(entries)
    }

    fn move_name(
        &mut self,
        (parent, name): (InodeNo, &[u8]),
        (new_parent, new_name): (InodeNo, &[u8]),
        flags: u32,
    ) -> FsResult<()> {
        let ino = self.child(parent, name)?.ok_or(FsError::NotFound)?;
        let target = self.child(new_parent, new_name)?;
        let moves_directory = self.node(InodeNo(ino))?.is_directory();
        if moves_directory && self.is_above(ino, new_parent.0) {
            return Err(FsError::Invalid);
        }
        if flags & libc::RENAME_EXCHANGE != 0 {
            return self.exchange((parent, name, ino), (new_parent, new_name, target));
        }
        if let Some(target) = target {
            if flags & libc::RENAME_NOREPLACE != 0 {
                return Err(FsError::Exists);
            }
            if target == ino {
                return Ok(());
            }
            let old = self.node(InodeNo(target))?;
            match (moves_directory, old.is_directory()) {
                (true, false) => return Err(FsError::NotDirectory),
                (false, true) => return Err(FsError::IsDirectory),
                (true, true) if !old.directory()?.is_empty() => return Err(FsError::NotEmpty),
                _ => {}
            }
            let directory = self.node_mut(new_parent)?;
            directory.nlink -= u32::from(moves_directory);
            directory.directory_mut()?.remove(new_name);
            self.drop_link(target)?;
        }
        self.node_mut(parent)?.directory_mut()?.remove(name);
        self.node_mut(new_parent)?.directory_mut()?.insert(new_name, ino);
        self.set_parent(ino, parent, new_parent)?;
        self.touch_all(&[parent, new_parent], ino)
    }

    fn exchange(
        &mut self,
        (parent, name, ino): (InodeNo, &[u8], u64),
        (new_parent, new_name, target): (InodeNo, &[u8], Option<u64>),
    ) -> FsResult<()> {
        let target = target.ok_or(FsError::NotFound)?;
        if self.node(InodeNo(target))?.is_directory() && self.is_above(target, parent.0) {
            return Err(FsError::Invalid);
        }
        self.node_mut(parent)?.directory_mut()?.replace(name, target);
        self.node_mut(new_parent)?.directory_mut()?.replace(new_name, ino);
        self.set_parent(ino, parent, new_parent)?;
        self.set_parent(target, new_parent, parent)?;
        self.node_mut(InodeNo(target))?.touch_change();
        self.touch_all(&[parent, new_parent], ino)
    }

    /// A moved directory counts for another parent's links.
    fn set_parent(&mut self, ino: u64, from: InodeNo, to: InodeNo) -> FsResult<()> {
        if let Body::Directory(directory) = &mut self.node_mut(InodeNo(ino))?.body {
            directory.parent = to.0;
            self.node_mut(from)?.nlink -= 1;
            self.node_mut(to)?.nlink += 1;
        }
        Ok(())
    }

    fn touch_all(&mut self, directories: &[InodeNo], moved: u64) -> FsResult<()> {
        for directory in directories {
            self.node_mut(*directory)?.touch_content();
        }
        self.node_mut(InodeNo(moved))?.touch_change();
        Ok(())
    }
}

impl Operations for MemFs {
    fn root(&self) -> InodeNo {
        InodeNo(ROOT)
    }

    fn lookup(&self, cx: &OpContext, parent: InodeNo, name: &[u8]) -> FsResult<Answer<Attributes>> {
        let state = self.enter(cx, "lookup", &[parent])?;
        let ino = state.child(parent, name)?.ok_or(FsError::NotFound)?;
        state.attributes_of(InodeNo(ino))
    }

    fn getattr(&self, cx: &OpContext, ino: InodeNo) -> FsResult<Answer<Attributes>> {
        self.enter(cx, "getattr", &[ino])?.attributes_of(ino)
    }

    fn setattr(&self, cx: &OpContext, ino: InodeNo, set: &SetAttributes) -> FsResult<Answer<Attributes>> {
        let mut state = self.enter(cx, "setattr", &[ino])?;
        let node = state.node_mut(ino)?;
        if let Some(size) = set.size {
            check_end(size, 0)?;
            node.file_mut()?.truncate(size);
            node.touch_content();
        }
        if let Some(mode) = set.mode {
            node.mode = node.mode & libc::S_IFMT | mode & 0o7777;
        }
        node.uid = set.uid.unwrap_or(node.uid);
        node.gid = set.gid.unwrap_or(node.gid);
        let resolve = |time| match time {
            SetTime::Now => now(),
            SetTime::At(time) => time,
        };
        node.atime = set.atime.map_or(node.atime, resolve);
        node.mtime = set.mtime.map_or(node.mtime, resolve);
        node.ctime = set.ctime.unwrap_or_else(now);
        state.attributes_of(ino)
    }

    fn readlink(&self, cx: &OpContext, ino: InodeNo) -> FsResult<Answer<Vec<u8>>> {
        let state = self.enter(cx, "readlink", &[ino])?;
        match &state.node(ino)?.body {
            Body::Symlink(target) => Ok(state.answer(target.clone())),
            _ => Err(FsError::Invalid),
        }
    }

    fn mknod(
        &self,
        cx: &OpContext,
        parent: InodeNo,
        name: &[u8],
        mode: u32,
        rdev: u32,
    ) -> FsResult<Answer<Attributes>> {
        let mut state = self.enter(cx, "mknod", &[parent])?;
        if matches!(mode & libc::S_IFMT, libc::S_IFDIR | libc::S_IFLNK) {
            return Err(FsError::Invalid);
        }
        let ino = state.add(cx, parent, name, mode, rdev)?;
        state.attributes_of(ino)
    }

    fn mkdir(&self, cx: &OpContext, parent: InodeNo, name: &[u8], mode: u32) -> FsResult<Answer<Attributes>> {
        let mut state = self.enter(cx, "mkdir", &[parent])?;
        let ino = state.add(cx, parent, name, libc::S_IFDIR | mode & 0o7777, 0)?;
        state.attributes_of(ino)
    }

    fn symlink(
        &self,
        cx: &OpContext,
        parent: InodeNo,
        name: &[u8],
        target: &[u8],
    ) -> FsResult<Answer<Attributes>> {
        let mut state = self.enter(cx, "symlink", &[parent])?;
        let ino = state.add(cx, parent, name, libc::S_IFLNK | 0o777, 0)?;
        state.node_mut(ino)?.body = Body::Symlink(target.to_vec());
        state.attributes_of(ino)
    }

    fn link(
        &self,
        cx: &OpContext,
        ino: InodeNo,
        new_parent: InodeNo,
        new_name: &[u8],
    ) -> FsResult<Answer<Attributes>> {
        let mut state = self.enter(cx, "link", &[ino, new_parent])?;
        if state.child(new_parent, new_name)?.is_some() {
            return Err(FsError::Exists);
        }
        let node = state.node_mut(ino)?;
        if node.is_directory() {
            return Err(FsError::NotPermitted);
        }
        if node.nlink == 0 && !std::mem::take(&mut node.linkable) {
            return Err(FsError::NotFound);
        }
        if node.nlink >= MAX_LINKS {
            return Err(FsError::TooManyLinks);
        }
        node.nlink += 1;
        node.touch_change();
        let directory = state.node_mut(new_parent)?;
        directory.directory_mut()?.insert(new_name, ino.0);
        directory.touch_content();
        state.attributes_of(ino)
    }

    fn unlink(&self, cx: &OpContext, parent: InodeNo, name: &[u8]) -> FsResult<Answer<()>> {
        let mut state = self.enter(cx, "unlink", &[parent])?;
        let ino = state.child(parent, name)?.ok_or(FsError::NotFound)?;
        if state.node(InodeNo(ino))?.is_directory() {
            return Err(FsError::IsDirectory);
        }
        let directory = state.node_mut(parent)?;
        directory.directory_mut()?.remove(name);
        directory.touch_content();
        state.drop_link(ino)?;
        Ok(state.answer(()))
    }

    fn rmdir(&self, cx: &OpContext, parent: InodeNo, name: &[u8]) -> FsResult<Answer<()>> {
        let mut state = self.enter(cx, "rmdir", &[parent])?;
        let ino = state.child(parent, name)?.ok_or(FsError::NotFound)?;
        if !state.node(InodeNo(ino))?.directory()?.is_empty() {
            return Err(FsError::NotEmpty);
        }
        let directory = state.node_mut(parent)?;
        directory.directory_mut()?.remove(name);
        directory.nlink -= 1;
        directory.touch_content();
        state.drop_link(ino)?;
        Ok(state.answer(()))
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
        let mut state = self.enter(cx, "rename", &[parent, new_parent])?;
        if flags & !(libc::RENAME_EXCHANGE | libc::RENAME_NOREPLACE) != 0 {
            return Err(FsError::Invalid);
        }
        state.move_name((parent, name), (new_parent, new_name), flags)?;
        Ok(state.answer(()))
    }

    fn open(&self, cx: &OpContext, ino: InodeNo, flags: i32) -> FsResult<Answer<Opened>> {
        let mut state = self.enter(cx, "open", &[ino])?;
        let opened = state.open_answer(ino, flags)?;
        Ok(state.answer(opened))
    }

    fn create(
        &self,
        cx: &OpContext,
        parent: InodeNo,
        name: &[u8],
        mode: u32,
        flags: i32,
    ) -> FsResult<Answer<(Attributes, Opened)>> {
        let mut state = self.enter(cx, "create", &[parent])?;
        let ino = match state.child(parent, name)? {
            Some(_) if flags & libc::O_EXCL != 0 => return Err(FsError::Exists),
            Some(ino) => InodeNo(ino),
            None => state.add(cx, parent, name, libc::S_IFREG | mode & 0o7777, 0)?,
        };
        let opened = state.open_answer(ino, flags)?;
        let attributes = state.node(ino)?.attributes();
        Ok(state.answer((attributes, opened)))
    }

    fn tmpfile(
        &self,
        cx: &OpContext,
        parent: InodeNo,
        mode: u32,
        flags: i32,
    ) -> FsResult<Answer<(Attributes, Opened)>> {
        let mut state = self.enter(cx, "tmpfile", &[parent])?;
        let ino = state.add_unnamed(cx, parent, mode, flags & libc::O_EXCL == 0)?;
        let opened = state.open_answer(ino, flags)?;
        let attributes = state.node(ino)?.attributes();
        Ok(state.answer((attributes, opened)))
    }

    fn read(
        &self,
        cx: &OpContext,
        ino: InodeNo,
        _handle: Option<FileHandle>,
        offset: u64,
        len: u32,
    ) -> FsResult<Answer<AlignedBuf>> {
        let state = self.enter(cx, "read", &[ino])?;
        let mut buf = AlignedBuf::zeroed(len as usize);
        let read = state.node(ino)?.file()?.read(offset, &mut buf);
        buf.truncate(read);
        Ok(state.answer(buf))
    }

    fn write(
        &self,
        cx: &OpContext,
        ino: InodeNo,
        _handle: Option<FileHandle>,
        offset: u64,
        data: &[u8],
        append: bool,
    ) -> FsResult<Answer<u32>> {
        let mut state = self.enter(cx, "write", &[ino])?;
        let node = state.node_mut(ino)?;
        let file = node.file_mut()?;
        let offset = if append { file.size } else { offset };
        check_end(offset, data.len() as u64)?;
        file.write(offset, data);
        node.touch_content();
        Ok(state.answer(data.len() as u32))
    }

    fn flush(&self, cx: &OpContext, ino: InodeNo, _handle: FileHandle) -> FsResult<Answer<()>> {
        Ok(self.enter(cx, "flush", &[ino])?.answer(()))
    }

    fn release(&self, _ino: InodeNo, handle: FileHandle) {
        self.lock().close_handle(handle.0);
    }

    fn fsync(&self, cx: &OpContext, ino: InodeNo, _data_only: bool) -> FsResult<Answer<()>> {
        // Like a commit, which is never waited for on a serving thread.
        if !cx.may_wait {
            return Err(FsError::WouldWait);
        }
        Ok(self.enter(cx, "fsync", &[ino])?.answer(()))
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
        let mut state = self.enter(cx, "fallocate", &[ino])?;
        let end = check_end(offset, len)?;
        let node = state.node_mut(ino)?;
        let file = node.file_mut()?;
        let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        match mode & !libc::FALLOC_FL_KEEP_SIZE {
            0 => file.allocate(offset, len),
            libc::FALLOC_FL_PUNCH_HOLE if keep_size => file.punch(offset, len),
            libc::FALLOC_FL_ZERO_RANGE => {
                file.punch(offset, len);
                file.allocate(offset, len);
            }
            _ => return Err(FsError::NotSupported),
        }
        if !keep_size {
            file.size = file.size.max(end);
        }
        node.touch_content();
        Ok(state.answer(()))
    }

    fn lseek(&self, cx: &OpContext, ino: InodeNo, offset: u64, whence: Whence) -> FsResult<Answer<u64>> {
        let state = self.enter(cx, "lseek", &[ino])?;
        let found = state.node(ino)?.file()?.seek(offset, whence == Whence::Data)?;
        Ok(state.answer(found))
    }

    fn opendir(&self, cx: &OpContext, ino: InodeNo) -> FsResult<Answer<FileHandle>> {
        let mut state = self.enter(cx, "opendir", &[ino])?;
        state.node(ino)?.directory()?;
        let handle = state.open_handle(ino)?;
        Ok(state.answer(FileHandle(handle)))
    }

    fn releasedir(&self, _ino: InodeNo, handle: FileHandle) {
        self.lock().close_handle(handle.0);
    }

    fn readdir(
        &self,
        cx: &OpContext,
        ino: InodeNo,
        cookie: u64,
        max_bytes: usize,
        plus: bool,
    ) -> FsResult<Answer<Vec<DirEntry>>> {
        let state = self.enter(cx, if plus { "readdirplus" } else { "readdir" }, &[ino])?;
        let entries = state.list(ino, cookie, max_bytes, plus)?;
        Ok(state.answer(entries))
    }

    fn statfs(&self, cx: &OpContext) -> FsResult<VolumeUsage> {
        let state = self.enter(cx, "statfs", &[])?;
        let inodes = state.nodes.len() as u64;
        Ok(VolumeUsage {
            blocks: 1 << 20,
            free_blocks: (1 << 20) - 4096,
            inodes: inodes + 1_000_000,
            free_inodes: 1_000_000,
        })
    }

    fn sync(&self, _cx: &OpContext) -> FsResult<()> {
        Ok(())
    }

    fn forget(&self, _ino: InodeNo, _count: u64) {
        *self.lock().calls.entry("forget").or_insert(0) += 1;
    }
}
