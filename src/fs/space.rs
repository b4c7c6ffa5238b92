//! Size and space of files: truncation both ways, fallocate, holes.
//!
//! Long work is cut into restartable steps with a bounded number of locks each. A file that becomes shorter
//! gets its new size in one transaction, together with a mark; the extents behind the end go in steps, and
//! nobody makes the file longer before they are gone: old bytes never come back into sight.

use zerocopy::little_endian::{U32, U64};

use super::Fs;
use super::api::{Answer, FsError, FsResult, OpContext, Whence};
use super::attr::{add_blocks, drop_privileges, is_directory, is_regular, touch_contents};
use super::data::MAX_FILE_BYTES;
use super::extents::{Extent, ExtentTree, Mapping, Run};
use super::op::{Needs, Op, OpResult};
use crate::device::AlignedBuf;
use crate::layout::inode::{CONTENT_BYTES, Form, InodeDisk, TRUNCATING};
use crate::rt::planted::{Bug, is_planted};
use crate::types::{BLOCK_BYTES_U64, InodeNo};

/// Extents handled by one step.
const STEP: u32 = 8;
/// Blocks that one step of fallocate takes.
const FALLOCATE_STEP: u64 = 1 << 18;

impl Fs {
    /// Sets the size of a regular file.
    pub(super) fn set_size(&self, cx: &OpContext, ino: InodeNo, size: u64) -> FsResult<()> {
        if size > MAX_FILE_BYTES {
            return Err(FsError::TooLarge);
        }
        while !self.try_set_size(cx, ino, size)? {
            self.finish_truncation(cx, ino)?;
        }
        self.finish_truncation(cx, ino)
    }

    /// False: an earlier truncation has to be finished first.
    fn try_set_size(&self, cx: &OpContext, ino: InodeNo, size: u64) -> FsResult<bool> {
        let answer = self.run(cx, Needs::write(&[ino]), |op| {
            let guard = op.write_inode(ino)?;
            let block = op.body(&guard, ino)?;
            let body = InodeDisk::of(&block);
            if !is_regular(body) {
                return Err(FsError::Invalid.into());
            }
            let old = body.size.get();
            if body.flags.get() & TRUNCATING != 0 && size > old && !is_planted(Bug::TruncationForgotten) {
                return Ok(false);
            }
            if body.form() == Form::Inline {
                if size > CONTENT_BYTES as u64 {
                    self.make_tree(op, &guard, ino)?;
                } else if size > old {
                    op.change(&guard, ino)?.content[old as usize..size as usize].fill(0);
                }
            }
            if size > old && op.body(&guard, ino).map(|b| InodeDisk::of(&b).form())? == Form::Tree {
                self.zero_tail(op, &guard, ino, old)?;
            }
            let body = op.change(&guard, ino)?;
            if size < old && body.form() == Form::Tree {
                body.flags = U32::new(body.flags.get() | TRUNCATING);
            }
            body.size = U64::new(size);
            drop_privileges(body, cx);
            touch_contents(body);
            Ok(true)
        })?;
        Ok(answer.value)
    }

    /// Frees what a truncation left behind the end, step by step.
    pub(super) fn finish_truncation(&self, cx: &OpContext, ino: InodeNo) -> FsResult<()> {
        loop {
            let done = self.run(cx, Needs::write(&[ino]), |op| {
                let guard = op.write_inode(ino)?;
                let block = op.body(&guard, ino)?;
                let body = InodeDisk::of(&block);
                if body.flags.get() & TRUNCATING == 0 {
                    return Ok(true);
                }
                let keep = body.size.get().div_ceil(BLOCK_BYTES_U64);
                let done = self.free_from(op, ino, keep)?;
                if done {
                    let body = op.change(&guard, ino)?;
                    body.flags = U32::new(body.flags.get() & !TRUNCATING);
                }
                Ok(done)
            })?;
            if done.value {
                return Ok(());
            }
        }
    }

    /// One step of freeing a file's extents from a logical block on. True: nothing is left there.
    pub(super) fn free_from(&self, op: &mut Op<'_>, ino: InodeNo, keep: u64) -> OpResult<bool> {
        let guard = op.write_inode(ino)?;
        let tree = self.extent_tree(ino);
        let freed = op.with_block_count(&guard, ino, |op| {
            op.edit(&guard, ino, None, |nodes, root| tree.truncate_from(nodes, root, keep, STEP))
        })?;
        self.give_back(op, ino, &freed.runs)?;
        Ok(freed.resume.is_none())
    }

    /// Frees runs of a file's blocks in their clusters.
    fn give_back(&self, op: &mut Op<'_>, ino: InodeNo, runs: &[Run]) -> OpResult<()> {
        let guard = op.write_inode(ino)?;
        for run in runs {
            let space = op.cluster(run.start)?;
            self.alloc.free_blocks(&mut op.plan, &space, run.start, run.blocks)?;
            add_blocks(op.change(&guard, ino)?, -(run.blocks as i64));
        }
        Ok(())
    }

    pub(super) fn do_fallocate(
        &self,
        cx: &OpContext,
        ino: InodeNo,
        offset: u64,
        len: u64,
        mode: i32,
    ) -> FsResult<Answer<()>> {
        self.may_change()?;
        let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        let end = offset.checked_add(len).filter(|_| len > 0).ok_or(FsError::Invalid)?;
        if end > MAX_FILE_BYTES {
            return Err(FsError::TooLarge);
        }
        self.finish_truncation(cx, ino)?;
        match mode & !libc::FALLOC_FL_KEEP_SIZE {
            0 => self.reserve(cx, ino, offset, end)?,
            libc::FALLOC_FL_PUNCH_HOLE if keep_size => self.punch(cx, ino, offset, end)?,
            libc::FALLOC_FL_ZERO_RANGE => {
                self.punch(cx, ino, offset, end)?;
                self.reserve(cx, ino, offset, end)?;
            }
            _ => return Err(FsError::NotSupported),
        }
        self.run(cx, Needs::write(&[ino]), |op| {
            let guard = op.write_inode(ino)?;
            let block = op.body(&guard, ino)?;
            let old = InodeDisk::of(&block).size.get();
            let longer = !keep_size && end > old && mode & libc::FALLOC_FL_PUNCH_HOLE == 0;
            if longer && InodeDisk::of(&block).form() == Form::Tree {
                self.zero_tail(op, &guard, ino, old)?;
            }
            let body = op.change(&guard, ino)?;
            if longer {
                if body.form() == Form::Inline {
                    body.content[old as usize..end as usize].fill(0);
                }
                body.size = U64::new(end);
            }
            drop_privileges(body, cx);
            touch_contents(body);
            Ok(())
        })
    }

    /// Fills the holes of a range with unwritten extents, step by step.
    fn reserve(&self, cx: &OpContext, ino: InodeNo, offset: u64, end: u64) -> FsResult<()> {
        let tree = self.extent_tree(ino);
        let (mut at, last) = (offset / BLOCK_BYTES_U64, end.div_ceil(BLOCK_BYTES_U64));
        while at < last {
            let answer = self.run(cx, Needs::write(&[ino]), |op| {
                let guard = op.write_inode(ino)?;
                let block = op.body(&guard, ino)?;
                let body = InodeDisk::of(&block);
                if !is_regular(body) {
                    return Err(FsError::Invalid.into());
                }
                if body.form() == Form::Inline {
                    if end <= CONTENT_BYTES as u64 {
                        return Ok(last);
                    }
                    self.make_tree(op, &guard, ino)?;
                }
                let mapping = op.look(&guard, ino, |nodes, root| tree.lookup(nodes, root, at))?;
                let until = match mapping {
                    Mapping::Extent(extent) => return Ok(extent.end()),
                    Mapping::Hole { until } => until.min(last).min(at + FALLOCATE_STEP),
                };
                let level = op.look(&guard, ino, |_, root| Ok(tree.tree().root_level(root)?))?;
                let nodes = ExtentTree::insert_cost(level, 1).allocations;
                let space = self.room(op, ino, nodes + 1)?;
                let found = self.alloc.blocks(&mut op.plan, &space, until - at, nodes);
                let (physical, blocks) = op.unless_full(&space, found)?;
                let extent = Extent { logical: at, physical, blocks, unwritten: true };
                self.map(op, &guard, ino, &space, extent)?;
                Ok(at + blocks)
            })?;
            at = answer.value.max(at + 1);
        }
        Ok(())
    }

    /// Makes a range read as zeroes and gives its whole blocks back, step by step.
    fn punch(&self, cx: &OpContext, ino: InodeNo, offset: u64, end: u64) -> FsResult<()> {
        let tree = self.extent_tree(ino);
        let mut from = offset.div_ceil(BLOCK_BYTES_U64);
        let until = end / BLOCK_BYTES_U64;
        let mut edges = true;
        loop {
            let answer = self.run(cx, Needs::write(&[ino]), |op| {
                let guard = op.write_inode(ino)?;
                let block = op.body(&guard, ino)?;
                let body = InodeDisk::of(&block);
                if !is_regular(body) {
                    return Err(FsError::Invalid.into());
                }
                let size = body.size.get();
                if body.form() == Form::Inline {
                    let (a, b) = (offset.min(size) as usize, end.min(size) as usize);
                    op.change(&guard, ino)?.content[a..b].fill(0);
                    return Ok(None);
                }
                if edges {
                    self.zero_edges(op, ino, offset, end.min(size))?;
                }
                if from >= until {
                    return Ok(None);
                }
                let level = op.look(&guard, ino, |_, root| Ok(tree.tree().root_level(root)?))?;
                let space = self.room(op, ino, ExtentTree::punch_cost(level, STEP).allocations)?;
                let freed = op.with_block_count(&guard, ino, |op| {
                    op.edit(&guard, ino, Some(&space), |nodes, root| {
                        tree.punch(nodes, root, from..until, STEP)
                    })
                })?;
                self.give_back(op, ino, &freed.runs)?;
                Ok(freed.resume)
            })?;
            edges = false;
            match answer.value {
                Some(resume) => from = resume,
                None => return Ok(()),
            }
        }
    }

    /// Writes zeroes into the blocks that a range covers only in part.
    fn zero_edges(&self, op: &mut Op<'_>, ino: InodeNo, offset: u64, end: u64) -> OpResult<()> {
        let mut at = offset;
        while at < end {
            let block_end = (at / BLOCK_BYTES_U64 + 1) * BLOCK_BYTES_U64;
            let until = block_end.min(end);
            if !at.is_multiple_of(BLOCK_BYTES_U64) || until != block_end {
                let guard = op.write_inode(ino)?;
                let tree = self.extent_tree(ino);
                let logical = at / BLOCK_BYTES_U64;
                let mapping = op.look(&guard, ino, |nodes, root| tree.lookup(nodes, root, logical))?;
                if matches!(mapping, Mapping::Extent(e) if !e.unwritten) {
                    self.write_zero_piece(op, ino, at, until)?;
                }
                at = until;
            } else {
                // Whole blocks are punched; go on at the last, partial one.
                at = (end / BLOCK_BYTES_U64 * BLOCK_BYTES_U64).max(block_end);
            }
        }
        Ok(())
    }

    fn write_zero_piece(&self, op: &mut Op<'_>, ino: InodeNo, from: u64, until: u64) -> OpResult<()> {
        let guard = op.write_inode(ino)?;
        let zeroes = AlignedBuf::zeroed((until - from) as usize);
        self.write_piece(op, &guard, ino, from, &zeroes)
    }

    pub(super) fn do_lseek(
        &self,
        cx: &OpContext,
        ino: InodeNo,
        offset: u64,
        whence: Whence,
    ) -> FsResult<Answer<u64>> {
        let tree = self.extent_tree(ino);
        self.run(cx, Needs::read(&[ino]), |op| {
            let guard = op.read_inode(ino)?;
            let block = op.body(&guard, ino)?;
            let body = InodeDisk::of(&block);
            let size = body.size.get();
            if is_directory(body) {
                return Err(FsError::Invalid.into());
            }
            if offset >= size {
                return Err(FsError::NoData.into());
            }
            if body.form() != Form::Tree {
                return Ok(if whence == Whence::Data { offset } else { size });
            }
            let from = offset / BLOCK_BYTES_U64;
            let found = op.look(&guard, ino, |nodes, root| match whence {
                Whence::Data => tree.next_data(nodes, root, from),
                Whence::Hole => Ok(Some(tree.next_hole(nodes, root, from)?)),
            })?;
            let at = found.map(|block| (block * BLOCK_BYTES_U64).max(offset));
            match whence {
                Whence::Data => Ok(at.filter(|a| *a < size).ok_or(FsError::NoData)?),
                Whence::Hole => Ok(at.unwrap_or(size).min(size)),
            }
        })
    }
}
