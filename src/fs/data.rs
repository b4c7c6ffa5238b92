//! File data: reads and writes.
//!
//! Data is on the LUN before the plan that exposes it is applied. Bytes behind the end of a file, inside its
//! last block, are undefined on the disk; whoever makes the file longer puts zeroes there first.

use std::sync::Arc;

use zerocopy::little_endian::U64;

use super::Fs;
use super::api::{Answer, FileHandle, FsError, FsResult, Hold, OpContext};
use super::attr::{drop_privileges, is_directory, is_regular, touch_contents};
use super::extents::{Extent, ExtentTree, MAX_FILE_BLOCKS, Mapping};
use super::op::{Needs, Op, OpResult};
use crate::alloc::{Need, Space};
use crate::device::AlignedBuf;
use crate::layout::inode::{CONTENT_BYTES, Form, InodeDisk, TRUNCATING};
use crate::lease::IoClass;
use crate::lock::{Access, Guard, Mode};
use crate::rt;
use crate::rt::planted::{Bug, is_planted};
use crate::types::{BLOCK_BYTES, BLOCK_BYTES_U64, InodeNo};

/// The largest file: 64 TiB.
pub(super) const MAX_FILE_BYTES: u64 = MAX_FILE_BLOCKS * BLOCK_BYTES_U64;
/// Bytes written under one plan.
const WRITE_STEP: usize = 1 << 20;

impl Fs {
    pub(super) fn do_read(
        &self,
        cx: &OpContext,
        ino: InodeNo,
        offset: u64,
        len: u32,
    ) -> FsResult<Answer<AlignedBuf>> {
        self.run(cx, Needs::read(&[ino]), |op| {
            let guard = op.read_inode(ino)?;
            let block = op.body(&guard, ino)?;
            let body = InodeDisk::of(&block);
            if is_directory(body) {
                return Err(FsError::IsDirectory.into());
            }
            let size = body.size.get();
            let len = u64::from(len).min(size.saturating_sub(offset));
            self.read_bytes(op, &guard, ino, offset, len)
        })
    }

    /// Bytes of a file that lie inside its size.
    pub(super) fn read_bytes(
        &self,
        op: &mut Op<'_>,
        guard: &Arc<Guard>,
        ino: InodeNo,
        offset: u64,
        len: u64,
    ) -> OpResult<AlignedBuf> {
        let block = op.body(guard, ino)?;
        let body = InodeDisk::of(&block);
        if len == 0 {
            return Ok(AlignedBuf::zeroed(0));
        }
        if body.form() != Form::Tree {
            let range = offset as usize..(offset + len) as usize;
            let bytes = body.content.get(range).ok_or(FsError::Invalid)?;
            return Ok(AlignedBuf::copy_of(bytes));
        }
        let first = offset / BLOCK_BYTES_U64;
        let end = (offset + len).div_ceil(BLOCK_BYTES_U64);
        let mut buf = AlignedBuf::zeroed((end - first) as usize * BLOCK_BYTES);
        self.read_blocks(op, guard, ino, first, &mut buf)?;
        let skip = (offset % BLOCK_BYTES_U64) as usize;
        if skip > 0 {
            buf.copy_within(skip..skip + len as usize, 0);
        }
        buf.truncate(len as usize);
        Ok(buf)
    }

    /// Whole blocks from logical block `first` on; holes read as zeroes. `buf` comes zeroed.
    fn read_blocks(
        &self,
        op: &mut Op<'_>,
        guard: &Arc<Guard>,
        ino: InodeNo,
        first: u64,
        buf: &mut [u8],
    ) -> OpResult<()> {
        let tree = self.extent_tree(ino);
        let end = first + (buf.len() / BLOCK_BYTES) as u64;
        let mut at = first;
        while at < end {
            let mapping = op.look(guard, ino, |nodes, root| tree.lookup(nodes, root, at))?;
            let until = match mapping {
                Mapping::Hole { until } => until.min(end),
                Mapping::Extent(extent) => {
                    let until = extent.end().min(end);
                    if !extent.unwritten {
                        let from = (at - first) as usize * BLOCK_BYTES;
                        let to = (until - first) as usize * BLOCK_BYTES;
                        let place = extent.physical.plus(at - extent.logical);
                        self.store.door().read(IoClass::Data, place, &mut buf[from..to])?;
                    }
                    until
                }
            };
            at = until.max(at + 1);
        }
        Ok(())
    }

    pub(super) fn do_write(
        &self,
        cx: &OpContext,
        ino: InodeNo,
        handle: Option<FileHandle>,
        offset: u64,
        data: &[u8],
        append: bool,
    ) -> FsResult<Answer<u32>> {
        self.may_change()?;
        let append =
            append || handle.is_some_and(|h| self.handles.lock().get(&h.0).is_some_and(|f| f.appends));
        if !append && let Some(hold) = self.overwrite(cx, ino, offset, data)? {
            // The data is written, so this may not be begun anew elsewhere; and it need not wait for other
            // hosts, since `hold` keeps the lock here. One at a time, so that times don't go back.
            let cx = OpContext { may_wait: true, ..cx.clone() };
            let _one = self.times.lock();
            let answer = self.run(&cx, Self::overwrite_needs(ino), |op| {
                let guard = op.inode(ino, Mode::Exclusive, Access::Overwrite)?;
                op.body(&guard, ino)?;
                let body = op.change(&guard, ino)?;
                drop_privileges(body, &cx);
                touch_contents(body);
                Ok(data.len() as u32)
            })?;
            drop(hold);
            return Ok(answer);
        }
        let mut done = 0;
        let mut start = offset;
        loop {
            let mut truncating = false;
            let piece = &data[done..data.len().min(done + WRITE_STEP)];
            let answer = self.run(cx, Needs::write(&[ino]), |op| {
                let guard = op.write_inode(ino)?;
                let block = op.body(&guard, ino)?;
                let body = InodeDisk::of(&block);
                if !is_regular(body) {
                    return Err(
                        if is_directory(body) { FsError::IsDirectory } else { FsError::Invalid }.into()
                    );
                }
                truncating = body.flags.get() & TRUNCATING != 0 && !is_planted(Bug::TruncationForgotten);
                if truncating {
                    return Ok(());
                }
                // The true end of file, wherever the kernel believes it is.
                start = match append {
                    true => body.size.get(),
                    false => offset + done as u64,
                };
                if start.checked_add(piece.len() as u64).is_none_or(|end| end > MAX_FILE_BYTES) {
                    return Err(FsError::TooLarge.into());
                }
                self.write_piece(op, &guard, ino, start, piece)?;
                let body = op.change(&guard, ino)?;
                drop_privileges(body, cx);
                touch_contents(body);
                Ok(())
            });
            let answer = match answer {
                // Some of it is written: say how much, as write(2) does.
                Err(_) if done > 0 => self.run(cx, Needs::read(&[ino]), |_| Ok(()))?,
                other => other?,
            };
            if truncating {
                drop(answer);
                self.finish_truncation(cx, ino)?;
                continue;
            }
            done += piece.len();
            if done >= data.len() || piece.is_empty() {
                let Answer { valid_for, hold, .. } = answer;
                return Ok(Answer { value: done.min(data.len()) as u32, valid_for, hold });
            }
        }
    }

    /// Writes whole blocks that the file has already, next to other such writes of this host: a guest's
    /// disk is written like that. `None`: this write needs more than that, and nothing was done.
    fn overwrite(
        &self,
        cx: &OpContext,
        ino: InodeNo,
        offset: u64,
        data: &[u8],
    ) -> FsResult<Option<Vec<Box<dyn Hold>>>> {
        let whole = BLOCK_BYTES_U64;
        if data.is_empty() || !offset.is_multiple_of(whole) || !data.len().is_multiple_of(BLOCK_BYTES) {
            return Ok(None);
        }
        let tree = self.extent_tree(ino);
        let answer = self.run(cx, Self::overwrite_needs(ino), |op| {
            let guard = op.inode(ino, Mode::Exclusive, Access::Overwrite)?;
            let block = op.body(&guard, ino)?;
            let body = InodeDisk::of(&block);
            let inside = offset.checked_add(data.len() as u64).is_some_and(|end| end <= body.size.get());
            let plain = is_regular(body) && body.form() == Form::Tree && body.flags.get() & TRUNCATING == 0;
            if !inside || !plain {
                return Ok(false);
            }
            let (first, end) = (offset / whole, (offset + data.len() as u64) / whole);
            let mut places = Vec::new();
            let mut at = first;
            while at < end {
                let mapping = op.look(&guard, ino, |nodes, root| tree.lookup(nodes, root, at))?;
                let Mapping::Extent(extent) = mapping else { return Ok(false) };
                if extent.unwritten {
                    return Ok(false);
                }
                let until = extent.end().min(end);
                places.push((extent.physical.plus(at - extent.logical), at, until));
                at = until;
            }
            for (place, from, until) in places {
                let piece = (from - first) as usize * BLOCK_BYTES..(until - first) as usize * BLOCK_BYTES;
                self.store.door().write(IoClass::Data, place, &data[piece])?;
            }
            Ok(true)
        })?;
        Ok(answer.value.then_some(answer.hold))
    }

    fn overwrite_needs(ino: InodeNo) -> Needs {
        let mut needs = Needs::default();
        needs.inodes.insert(ino, (Mode::Exclusive, Access::Overwrite));
        needs
    }

    /// Writes one piece: data first, then what exposes it goes into the plan.
    pub(super) fn write_piece(
        &self,
        op: &mut Op<'_>,
        guard: &Arc<Guard>,
        ino: InodeNo,
        offset: u64,
        data: &[u8],
    ) -> OpResult<()> {
        if data.is_empty() {
            return Ok(());
        }
        let block = op.body(guard, ino)?;
        let body = InodeDisk::of(&block);
        let size = body.size.get();
        let end = offset + data.len() as u64;
        let new_size = size.max(end);
        if body.form() == Form::Inline {
            if new_size <= CONTENT_BYTES as u64 {
                let body = op.change(guard, ino)?;
                // What lies behind the end is undefined.
                if offset > size {
                    body.content[size as usize..offset as usize].fill(0);
                }
                body.content[offset as usize..end as usize].copy_from_slice(data);
                body.size = U64::new(new_size);
                return Ok(());
            }
            self.make_tree(op, guard, ino)?;
        }
        if offset > size {
            self.zero_tail(op, guard, ino, size)?;
        }
        let first = offset / BLOCK_BYTES_U64;
        let blocks = end.div_ceil(BLOCK_BYTES_U64) - first;
        let head = (offset % BLOCK_BYTES_U64) as usize;
        if head == 0 && data.len().is_multiple_of(BLOCK_BYTES) && AlignedBuf::is_aligned(data, BLOCK_BYTES) {
            self.write_blocks(op, guard, ino, first, data)?;
        } else {
            let mut buf = AlignedBuf::zeroed(blocks as usize * BLOCK_BYTES);
            // The edges keep what they had, as far as the file reached.
            let last = first + blocks - 1;
            if head > 0 {
                self.read_edge(op, guard, ino, size, first, &mut buf[..BLOCK_BYTES])?;
            }
            if !end.is_multiple_of(BLOCK_BYTES_U64) && (last > first || head == 0) {
                let from = buf.len() - BLOCK_BYTES;
                self.read_edge(op, guard, ino, size, last, &mut buf[from..])?;
            }
            buf[head..head + data.len()].copy_from_slice(data);
            self.write_blocks(op, guard, ino, first, &buf)?;
        }
        op.change(guard, ino)?.size = U64::new(new_size);
        Ok(())
    }

    /// One block as the file shows it: zeroes behind the end.
    fn read_edge(
        &self,
        op: &mut Op<'_>,
        guard: &Arc<Guard>,
        ino: InodeNo,
        size: u64,
        logical: u64,
        block: &mut [u8],
    ) -> OpResult<()> {
        let start = logical * BLOCK_BYTES_U64;
        if start < size {
            self.read_blocks(op, guard, ino, logical, block)?;
            let valid = (size - start).min(BLOCK_BYTES_U64) as usize;
            block[valid..].fill(0);
        }
        Ok(())
    }

    /// Puts zeroes behind the end of the file into its last block, before the file becomes longer.
    pub(super) fn zero_tail(
        &self,
        op: &mut Op<'_>,
        guard: &Arc<Guard>,
        ino: InodeNo,
        size: u64,
    ) -> OpResult<()> {
        if size.is_multiple_of(BLOCK_BYTES_U64) {
            return Ok(());
        }
        let logical = size / BLOCK_BYTES_U64;
        let tree = self.extent_tree(ino);
        let mapping = op.look(guard, ino, |nodes, root| tree.lookup(nodes, root, logical))?;
        let Mapping::Extent(extent) = mapping else { return Ok(()) };
        if extent.unwritten {
            return Ok(());
        }
        let mut buf = AlignedBuf::zeroed(BLOCK_BYTES);
        let place = extent.physical.plus(logical - extent.logical);
        self.store.door().read(IoClass::Data, place, &mut buf)?;
        buf[(size % BLOCK_BYTES_U64) as usize..].fill(0);
        Ok(self.store.door().write(IoClass::Data, place, &buf)?)
    }

    /// Writes whole blocks: in place where the file has them, into new ones where it has none.
    fn write_blocks(
        &self,
        op: &mut Op<'_>,
        guard: &Arc<Guard>,
        ino: InodeNo,
        first: u64,
        data: &[u8],
    ) -> OpResult<()> {
        let tree = self.extent_tree(ino);
        let end = first + (data.len() / BLOCK_BYTES) as u64;
        let mut at = first;
        while at < end {
            let mapping = op.look(guard, ino, |nodes, root| tree.lookup(nodes, root, at))?;
            let piece = |until: u64| {
                &data[(at - first) as usize * BLOCK_BYTES..(until - first) as usize * BLOCK_BYTES]
            };
            match mapping {
                Mapping::Extent(extent) => {
                    let until = extent.end().min(end);
                    let place = extent.physical.plus(at - extent.logical);
                    self.store.door().write(IoClass::Data, place, piece(until))?;
                    if extent.unwritten {
                        let level = op.look(guard, ino, |_, root| Ok(tree.tree().root_level(root)?))?;
                        let need = ExtentTree::mark_written_cost(level, 1).allocations;
                        let space = self.room(op, ino, need)?;
                        op.with_block_count(guard, ino, |op| {
                            op.edit(guard, ino, Some(&space), |nodes, root| {
                                tree.mark_written(nodes, root, at..until, 1)
                            })
                        })?;
                    }
                    at = until;
                }
                Mapping::Hole { until } => {
                    let want = until.min(end) - at;
                    let level = op.look(guard, ino, |_, root| Ok(tree.tree().root_level(root)?))?;
                    let nodes = ExtentTree::insert_cost(level, 1).allocations;
                    let space = self.room(op, ino, nodes + 1)?;
                    let found = self.alloc.blocks(&mut op.plan, &space, want, nodes);
                    let (place, got) = op.unless_full(&space, found)?;
                    if is_planted(Bug::DataBehindChange) {
                        let (door, late) = (self.store.door().clone(), piece(at + got).to_vec());
                        rt::spawn("late data", move || drop(door.write(IoClass::Data, place, &late)));
                    } else {
                        self.store.door().write(IoClass::Data, place, piece(at + got))?;
                    }
                    let extent = Extent { logical: at, physical: place, blocks: got, unwritten: false };
                    self.map(op, guard, ino, &space, extent)?;
                    at += got;
                }
            }
        }
        Ok(())
    }

    /// Adds an extent to a file and counts its blocks.
    pub(super) fn map(
        &self,
        op: &mut Op<'_>,
        guard: &Arc<Guard>,
        ino: InodeNo,
        space: &Arc<Space>,
        extent: Extent,
    ) -> OpResult<()> {
        let tree = self.extent_tree(ino);
        op.with_block_count(guard, ino, |op| {
            op.plan.blocks_of_inode += extent.blocks as i64;
            op.edit(guard, ino, Some(space), |nodes, root| tree.insert(nodes, root, extent))
        })
    }

    /// A cluster with `blocks` free blocks, near the file.
    pub(super) fn room(&self, op: &mut Op<'_>, ino: InodeNo, blocks: u32) -> OpResult<Arc<Space>> {
        op.space(self.geometry.cluster_of(ino.body()), Need { blocks, inode: false })
    }

    /// Turns an inline file into one with extents; its bytes move to a block of their own.
    pub(super) fn make_tree(&self, op: &mut Op<'_>, guard: &Arc<Guard>, ino: InodeNo) -> OpResult<()> {
        let block = op.body(guard, ino)?;
        let body = InodeDisk::of(&block);
        let size = body.size.get() as usize;
        let content = AlignedBuf::copy_of(&body.content[..size]);
        let tree = self.extent_tree(ino);
        let body = op.change(guard, ino)?;
        body.form = Form::Tree.code();
        tree.init(&mut body.content)?;
        if size > 0 {
            let mut buf = AlignedBuf::zeroed(BLOCK_BYTES);
            buf[..size].copy_from_slice(&content);
            self.write_blocks(op, guard, ino, 0, &buf)?;
        }
        Ok(())
    }

    /// The target of a symbolic link that does not fit into the body.
    pub(super) fn write_long_target(
        &self,
        op: &mut Op<'_>,
        guard: &Arc<Guard>,
        ino: InodeNo,
        target: &[u8],
        space: &Arc<Space>,
    ) -> OpResult<()> {
        let tree = self.extent_tree(ino);
        let body = op.change(guard, ino)?;
        body.form = Form::Tree.code();
        tree.init(&mut body.content)?;
        body.size = U64::new(target.len() as u64);
        let mut buf = AlignedBuf::zeroed(BLOCK_BYTES);
        buf[..target.len()].copy_from_slice(target);
        let (place, _) = self.alloc.blocks(&mut op.plan, space, 1, 0)?;
        self.store.door().write(IoClass::Data, place, &buf)?;
        let extent = Extent { logical: 0, physical: place, blocks: 1, unwritten: false };
        self.map(op, guard, ino, space, extent)
    }
}
