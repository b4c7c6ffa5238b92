//! Names: lookup, make, link, unlink, listings.

use std::ops::ControlFlow;
use std::sync::Arc;

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

use super::api::{Answer, Attributes, DirEntry, FsError, FsResult, OpContext, Timestamp};
use super::attr::{add_blocks, attributes, is_directory, touch, touch_contents};
use super::dirtree::{DirEntryRef, DirTarget, DirTree, Inserted};
use super::op::{Fail, Needs, Op, OpResult};
use super::{Fs, now_after};
use crate::alloc::{Need, Space};
use crate::layout::geometry::lock_of_inode;
use crate::layout::inode::{CONTENT_BYTES, Form, InodeDisk, LINKABLE};
use crate::layout::{Block, Header, Magic};
use crate::lock::{Access, Guard, Mode};
use crate::types::{BLOCK_BYTES, InodeNo};

/// Longest name, in bytes.
pub(super) const NAME_BYTES: usize = 255;
/// Longest target of a symbolic link that Linux has.
const TARGET_BYTES: usize = 4095;
/// Most links of an inode.
const MAX_LINKS: u32 = i32::MAX as u32;

/// What is made.
pub(super) struct Make<'a> {
    pub mode: u32,
    pub rdev: u32,
    /// A symbolic link's target.
    pub target: Option<&'a [u8]>,
}

pub(super) fn check_name(name: &[u8]) -> FsResult<()> {
    match name {
        _ if name.len() > NAME_BYTES => Err(FsError::NameTooLong),
        b"" => Err(FsError::NotFound),
        b"." | b".." => Err(FsError::Invalid),
        _ if name.contains(&b'/') || name.contains(&0) => Err(FsError::Invalid),
        _ => Ok(()),
    }
}

impl<'f> Op<'f> {
    /// The body of a directory in which names are looked up.
    pub(super) fn directory(&mut self, guard: &Guard, ino: InodeNo) -> OpResult<Arc<Block>> {
        let block = match self.body(guard, ino) {
            // Removed and freed by another host since it was looked up: to whoever uses it as a directory it
            // is gone, as a removed working directory is.
            Err(Fail::Error(FsError::Stale)) => return Err(FsError::NotFound.into()),
            other => other?,
        };
        if !is_directory(InodeDisk::of(&block)) {
            return Err(FsError::NotDirectory.into());
        }
        self.fs.note_directory(ino);
        Ok(block)
    }

    /// A directory in which names are made or removed: it must not have been removed meanwhile.
    pub(super) fn living_directory(&mut self, guard: &Guard, ino: InodeNo) -> OpResult<Arc<Block>> {
        let block = self.directory(guard, ino)?;
        if InodeDisk::of(&block).nlink.get() == 0 {
            return Err(FsError::NotFound.into());
        }
        Ok(block)
    }

    pub(super) fn find(
        &mut self,
        guard: &Arc<Guard>,
        dir: InodeNo,
        name: &[u8],
    ) -> OpResult<Option<DirEntryRef>> {
        let tree = self.fs.dir_tree(dir);
        self.look(guard, dir, |nodes, root| tree.lookup(nodes, root, name))
    }

    /// How deep a directory's tree is: what an insert may cost follows from it.
    pub(super) fn dir_level(&mut self, guard: &Arc<Guard>, dir: InodeNo) -> OpResult<u8> {
        let tree = self.fs.dir_tree(dir);
        self.look(guard, dir, |_, root| Ok(tree.tree().root_level(root)?))
    }

    /// Enters a name; the directory's times and counts follow.
    pub(super) fn enter(
        &mut self,
        guard: &Arc<Guard>,
        dir: InodeNo,
        name: &[u8],
        target: DirTarget,
        space: &Arc<Space>,
    ) -> OpResult<u64> {
        let tree = self.fs.dir_tree(dir);
        let inserted = self.with_block_count(guard, dir, |op| {
            op.edit(guard, dir, Some(space), |nodes, root| tree.insert(nodes, root, name, target))
        })?;
        let key = match inserted {
            Inserted::Done(key) => key,
            Inserted::Exists(_) => return Err(FsError::Exists.into()),
            Inserted::Full => return Err(FsError::NoSpace.into()),
        };
        let body = self.change(guard, dir)?;
        body.entries = U64::new(body.entries.get() + 1);
        body.size = U64::new(body.entries.get() * 32);
        touch_contents(body);
        Ok(key)
    }

    /// Takes a name out.
    pub(super) fn leave(&mut self, guard: &Arc<Guard>, dir: InodeNo, name: &[u8]) -> OpResult<DirEntryRef> {
        let tree = self.fs.dir_tree(dir);
        let gone = self.with_block_count(guard, dir, |op| {
            op.edit(guard, dir, None, |nodes, root| tree.remove(nodes, root, name))
        })?;
        let gone = gone.ok_or(FsError::NotFound)?;
        let body = self.change(guard, dir)?;
        body.entries = U64::new(body.entries.get().saturating_sub(1));
        body.size = U64::new(body.entries.get() * 32);
        touch_contents(body);
        Ok(gone)
    }

    /// Adds what `work` allocated and freed to the inode's block count.
    pub(super) fn with_block_count<T>(
        &mut self,
        guard: &Arc<Guard>,
        ino: InodeNo,
        work: impl FnOnce(&mut Self) -> OpResult<T>,
    ) -> OpResult<T> {
        let before = std::mem::take(&mut self.plan.blocks_of_inode);
        let value = work(self)?;
        let delta = std::mem::replace(&mut self.plan.blocks_of_inode, before);
        if delta != 0 {
            add_blocks(self.change(guard, ino)?, delta);
        }
        Ok(value)
    }
}

impl Fs {
    pub(super) fn do_lookup(
        &self,
        cx: &OpContext,
        parent: InodeNo,
        name: &[u8],
    ) -> FsResult<Answer<Attributes>> {
        if name.len() > NAME_BYTES {
            return Err(FsError::NameTooLong);
        }
        self.run(cx, Needs::look_at(self, parent), |op| {
            let guard = op.read_inode(parent)?;
            let block = op.directory(&guard, parent)?;
            let ino = match name {
                b"." => parent,
                b".." => InodeNo(InodeDisk::of(&block).parent.get()),
                _ => op.find(&guard, parent, name)?.ok_or(FsError::NotFound)?.target.ino,
            };
            let child = op.look_at_inode(ino)?;
            let block = op.body(&child, ino)?;
            if is_directory(InodeDisk::of(&block)) {
                op.fs.note_directory(ino);
            }
            Ok(attributes(ino, InodeDisk::of(&block)))
        })
    }

    pub(super) fn do_readlink(&self, cx: &OpContext, ino: InodeNo) -> FsResult<Answer<Vec<u8>>> {
        self.run(cx, Needs::read(&[ino]), |op| {
            let guard = op.read_inode(ino)?;
            let block = op.body(&guard, ino)?;
            let body = InodeDisk::of(&block);
            if body.mode.get() & libc::S_IFMT != libc::S_IFLNK {
                return Err(FsError::Invalid.into());
            }
            let size = body.size.get().min(TARGET_BYTES as u64);
            Ok(op.fs.read_bytes(op, &guard, ino, 0, size)?.to_vec())
        })
    }

    /// Makes an inode of any kind under a new name.
    pub(super) fn make(
        &self,
        cx: &OpContext,
        parent: InodeNo,
        name: &[u8],
        make: &Make<'_>,
    ) -> FsResult<Answer<Attributes>> {
        self.may_change()?;
        check_name(name)?;
        if make.target.is_some_and(|t| t.len() > TARGET_BYTES) {
            return Err(FsError::NameTooLong);
        }
        self.run(cx, Needs::write(&[parent]), |op| {
            let (ino, _) = self.make_in(op, cx, parent, name, make)?;
            let guard = op.write_inode(ino)?;
            let block = op.body(&guard, ino)?;
            Ok(attributes(ino, InodeDisk::of(&block)))
        })
    }

    /// The part of [`Fs::make`] that create shares.
    pub(super) fn make_in(
        &self,
        op: &mut Op<'_>,
        cx: &OpContext,
        parent: InodeNo,
        name: &[u8],
        make: &Make<'_>,
    ) -> OpResult<(InodeNo, Arc<Guard>)> {
        let dir = op.write_inode(parent)?;
        let block = op.living_directory(&dir, parent)?;
        let parent_body = InodeDisk::of(&block);
        if op.find(&dir, parent, name)?.is_some() {
            return Err(FsError::Exists.into());
        }
        let makes_dir = make.mode & libc::S_IFMT == libc::S_IFDIR;
        if makes_dir && parent_body.nlink.get() >= MAX_LINKS {
            return Err(FsError::TooManyLinks.into());
        }
        let gid = group_in(cx, parent_body);
        let mut mode = make.mode;
        if makes_dir {
            mode |= parent_body.mode.get() & libc::S_ISGID;
        }
        let level = op.dir_level(&dir, parent)?;
        let long = make.target.is_some_and(|t| t.len() > CONTENT_BYTES);
        let need = Need { blocks: DirTree::insert_cost(level).allocations + u32::from(long), inode: true };
        // Files follow their directory, unless its cluster is another host's.
        let near = self.geometry.cluster_of(parent.body());
        let space = op.space(near, need)?;
        let Some((ino, guard)) = self.alloc.inode(&mut op.plan, &space)? else { return Err(Fail::Again) };
        let guard = op.adopt(ino, guard);
        let kind = ((mode & libc::S_IFMT) >> 12) as u8;
        let generation = self.begin_inode(op, &guard, ino, mode)?;
        let target = DirTarget { ino, generation, kind };
        let key = op.enter(&dir, parent, name, target, &space)?;
        let body = op.change(&guard, ino)?;
        body.uid = U32::new(cx.uid);
        body.gid = U32::new(gid);
        body.nlink = U32::new(if makes_dir { 2 } else { 1 });
        body.rdev = U32::new(make.rdev);
        body.parent = U64::new(parent.0);
        body.parent_key = U64::new(key);
        if let Some(target) = make.target {
            match body.content.get_mut(..target.len()) {
                Some(content) => {
                    content.copy_from_slice(target);
                    body.size = U64::new(target.len() as u64);
                }
                None => self.write_long_target(op, &guard, ino, target, &space)?,
            }
        }
        if makes_dir {
            let body = op.change(&dir, parent)?;
            body.nlink = U32::new(body.nlink.get() + 1);
        }
        Ok((ino, guard))
    }

    /// Resets every field of an inode that is used anew; its generation rises.
    pub(super) fn begin_inode(
        &self,
        op: &mut Op<'_>,
        guard: &Arc<Guard>,
        ino: InodeNo,
        mode: u32,
    ) -> OpResult<u32> {
        let block = op.plan.read(guard, ino.body(), Magic::Inode)?;
        let old = InodeDisk::of(&block);
        if old.form() != Form::Free {
            return Err(
                FsError::Io(format!("inode {ino} is in use although its cluster says it is free")).into()
            );
        }
        let generation = old.generation.get().wrapping_add(1).max(1);
        let now = now_after(Timestamp::default());
        let mut fresh = InodeDisk::new_free(self.volume, ino);
        fresh.header = Header::new(Magic::Inode, self.volume, ino.body(), lock_of_inode(ino));
        fresh.change = old.change;
        fresh.generation = U32::new(generation);
        fresh.mode = U32::new(mode);
        for time in [&mut fresh.atime, &mut fresh.mtime, &mut fresh.ctime, &mut fresh.btime] {
            *time = now.into();
        }
        fresh.form = match mode & libc::S_IFMT {
            libc::S_IFREG | libc::S_IFLNK => Form::Inline,
            libc::S_IFDIR => {
                self.dir_tree(ino).init(&mut fresh.content)?;
                self.note_directory(ino);
                Form::Tree
            }
            _ => Form::Empty,
        }
        .code();
        let mut image: Arc<Block> = Arc::new([0; BLOCK_BYTES]);
        Arc::make_mut(&mut image).copy_from_slice(fresh.as_bytes());
        op.plan.put(guard, ino.body(), image)?;
        Ok(generation)
    }

    pub(super) fn do_link(
        &self,
        cx: &OpContext,
        ino: InodeNo,
        parent: InodeNo,
        name: &[u8],
    ) -> FsResult<Answer<Attributes>> {
        self.may_change()?;
        check_name(name)?;
        self.run(cx, Needs::write(&[ino, parent]), |op| {
            let (guard, dir) = (op.write_inode(ino)?, op.write_inode(parent)?);
            op.living_directory(&dir, parent)?;
            let block = op.body(&guard, ino)?;
            let body = InodeDisk::of(&block);
            if is_directory(body) {
                return Err(FsError::NotPermitted.into());
            }
            let is_first = body.nlink.get() == 0;
            if is_first && body.flags.get() & LINKABLE == 0 {
                return Err(FsError::NotFound.into());
            }
            if body.nlink.get() >= MAX_LINKS {
                return Err(FsError::TooManyLinks.into());
            }
            let target = target_of(ino, body);
            let orphanage = is_first.then(|| InodeNo(body.parent.get()));
            if op.find(&dir, parent, name)?.is_some() {
                return Err(FsError::Exists.into());
            }
            let level = op.dir_level(&dir, parent)?;
            let need = Need { blocks: DirTree::insert_cost(level).allocations, inode: false };
            let space = op.space(self.geometry.cluster_of(parent.body()), need)?;
            let key = op.enter(&dir, parent, name, target, &space)?;
            if let Some(orphanage) = orphanage {
                op.leave_orphans(orphanage, ino)?;
            }
            let body = op.change(&guard, ino)?;
            body.nlink = U32::new(body.nlink.get() + 1);
            if is_first {
                body.flags = U32::new(body.flags.get() & !LINKABLE);
                body.parent = U64::new(parent.0);
                body.parent_key = U64::new(key);
            }
            touch(body);
            Ok(attributes(ino, body))
        })
    }

    pub(super) fn do_unlink(&self, cx: &OpContext, parent: InodeNo, name: &[u8]) -> FsResult<Answer<()>> {
        self.may_change()?;
        check_name(name)?;
        let mut orphan = None;
        let answer = self.run(cx, Needs::write(&[parent]), |op| {
            orphan = None;
            let dir = op.write_inode(parent)?;
            op.directory(&dir, parent)?;
            let entry = op.find(&dir, parent, name)?.ok_or(FsError::NotFound)?;
            let ino = entry.target.ino;
            let guard = op.write_inode(ino)?;
            let block = op.body(&guard, ino)?;
            if is_directory(InodeDisk::of(&block)) {
                return Err(FsError::IsDirectory.into());
            }
            op.leave(&dir, parent, name)?;
            orphan = self.drop_link(op, &guard, ino)?;
            Ok(())
        })?;
        Ok(self.without_orphan(cx, answer, orphan))
    }

    pub(super) fn do_rmdir(&self, cx: &OpContext, parent: InodeNo, name: &[u8]) -> FsResult<Answer<()>> {
        self.may_change()?;
        if name == b".." {
            return Err(FsError::NotEmpty);
        }
        check_name(name)?;
        let mut orphan = None;
        let answer = self.run(cx, Needs::write(&[parent]), |op| {
            orphan = None;
            let dir = op.write_inode(parent)?;
            op.directory(&dir, parent)?;
            let entry = op.find(&dir, parent, name)?.ok_or(FsError::NotFound)?;
            let ino = entry.target.ino;
            let guard = op.write_inode(ino)?;
            op.directory(&guard, ino)?;
            op.check_empty(&guard, ino)?;
            op.leave(&dir, parent, name)?;
            orphan = self.drop_directory(op, &guard, ino)?;
            let body = op.change(&dir, parent)?;
            body.nlink = U32::new(body.nlink.get().saturating_sub(1));
            Ok(())
        })?;
        Ok(self.without_orphan(cx, answer, orphan))
    }

    /// The listing of a directory after a cookie: ".", "..", then entries in the order of their keys.
    pub(super) fn do_readdir(
        &self,
        cx: &OpContext,
        dir: InodeNo,
        cookie: u64,
        max_bytes: usize,
        plus: bool,
    ) -> FsResult<Answer<Vec<DirEntry>>> {
        let mut extra: Vec<Guard> = Vec::new();
        let mut answer = self.run(cx, Needs::read(&[dir]), |op| {
            extra.clear();
            let guard = op.read_inode(dir)?;
            let block = op.directory(&guard, dir)?;
            let body = InodeDisk::of(&block);
            let kind = (libc::S_IFDIR >> 12) as u8;
            let mut list = Vec::new();
            let mut room = max_bytes;
            let mut push = |list: &mut Vec<DirEntry>, (ino, generation), cookie, kind, name: &[u8]| {
                let cost = 32 + name.len();
                if cost > room && !list.is_empty() {
                    return ControlFlow::Break(());
                }
                room = room.saturating_sub(cost);
                list.push(DirEntry { ino, generation, cookie, kind, name: name.to_vec(), attributes: None });
                ControlFlow::Continue(())
            };
            let mut full = false;
            if cookie < 1 {
                full |= push(&mut list, (dir, body.generation.get()), 1, kind, b".").is_break();
            }
            if cookie < 2 && !full {
                let parent = if dir == self.geometry.root() { dir } else { InodeNo(body.parent.get()) };
                full |= push(&mut list, (parent, 0), 2, kind, b"..").is_break();
            }
            if !full {
                let tree = self.dir_tree(dir);
                let after = if cookie <= 2 { 0 } else { cookie };
                op.look(&guard, dir, |nodes, root| {
                    tree.list(nodes, root, after, |item| {
                        let DirTarget { ino, generation, kind } = item.target;
                        push(&mut list, (ino, generation), item.key, kind, item.name)
                    })
                })?;
            }
            if plus {
                for entry in list.iter_mut().filter(|e| e.cookie > 2) {
                    let Ok(id) = self.inode_lock(entry.ino) else { continue };
                    let mode = self.mode_for(entry.ino, Mode::Shared);
                    // Only what this host holds anyway: a listing waits for nobody.
                    let Some(guard) = self.locks.try_held(id, mode, Access::Read) else { continue };
                    if let Ok(block) = op.body(&guard, entry.ino) {
                        if entry.kind == kind {
                            self.note_directory(entry.ino);
                        }
                        entry.attributes = Some(attributes(entry.ino, InodeDisk::of(&block)));
                    }
                    extra.push(guard);
                }
            }
            Ok(list)
        })?;
        answer.hold.extend(extra.iter().map(|guard| Box::new(guard.in_use()) as _));
        Ok(answer)
    }
}

/// The group of what is made in a directory.
pub(super) fn group_in(cx: &OpContext, parent: &InodeDisk) -> u32 {
    if parent.mode.get() & libc::S_ISGID != 0 { parent.gid.get() } else { cx.gid }
}

/// What a directory entry says of an inode.
pub(super) fn target_of(ino: InodeNo, body: &InodeDisk) -> DirTarget {
    let kind = ((body.mode.get() & libc::S_IFMT) >> 12) as u8;
    DirTarget { ino, generation: body.generation.get(), kind }
}

impl Op<'_> {
    pub(super) fn check_empty(&mut self, guard: &Arc<Guard>, dir: InodeNo) -> OpResult<()> {
        let tree = self.fs.dir_tree(dir);
        let empty = self.look(guard, dir, |nodes, root| tree.is_empty(nodes, root))?;
        if empty { Ok(()) } else { Err(FsError::NotEmpty.into()) }
    }
}
