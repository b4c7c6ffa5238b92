//! The third pass: inode groups in the order of their addresses; locks, bodies, and the trees of files.

use super::finding::{Finding, Kind, Place};
use super::inodes::{Directory, Index, Known};
use super::rules;
use super::view::{BadNode, Nodes};
use super::{Checker, FsckError};
use crate::fs::dirtree::DirTree;
use crate::fs::extents::{Extent, ExtentTree, MAX_FILE_BLOCKS};
use crate::layout::geometry::{GROUP_BLOCKS, GROUP_INODES};
use crate::layout::inode::{Form, InodeDisk, TRUNCATING};
use crate::layout::lock::LockKind;
use crate::layout::{Block, LayoutError};
use crate::tree::TreeVisitor;
use crate::types::{BLOCK_BYTES_U64, BlockNo, InodeNo};

/// Groups that lie side by side are read together: 1 MiB.
const GROUPS_PER_READ: u64 = 16;
/// Such reads under way, where it is read ahead.
const RUNS_AHEAD: u64 = 16;

/// Extents of a file as a walk meets them.
struct Extents<'a, 'c, 'v, 'd> {
    checker: &'a mut Checker<'c, 'v, 'd>,
    ino: InodeNo,
    tree: ExtentTree,
    blocks: u64,
    /// End of the extent before, and of the last one that was written.
    end: u64,
    written_end: u64,
    /// Something of the tree can't be used: what it counts can't be judged.
    damaged: bool,
}

impl TreeVisitor<BadNode> for Extents<'_, '_, '_, '_> {
    fn node(&mut self, at: BlockNo, _: u8) {
        self.blocks += 1;
        self.checker.claim(self.ino, at, 1);
        self.checker.tick();
    }

    fn entry(&mut self, key: u64, value: &[u8]) {
        let extent: Extent = match self.tree.parse(key, value) {
            Ok(extent) => extent,
            Err(e) => return self.bad(e.to_string()),
        };
        if extent.logical < self.end {
            return self.bad(format!("extents overlap at logical block {}", extent.logical));
        }
        self.end = extent.end();
        if !extent.unwritten {
            self.written_end = extent.end();
        }
        self.blocks += extent.blocks;
        self.checker.claim(self.ino, extent.physical, extent.blocks);
    }

    fn damaged(&mut self, at: BlockNo, lo: u64, hi: u64, error: BadNode) {
        self.damaged = true;
        self.checker.damaged_node(self.ino, at, lo, hi, &error);
    }
}

impl Extents<'_, '_, '_, '_> {
    fn bad(&mut self, text: String) {
        self.damaged = true;
        self.checker.owners_unknown = true;
        if self.checker.first_round {
            self.checker.find(Kind::Extent, Place::of_inode(self.ino), text);
        }
    }
}

impl Checker<'_, '_, '_> {
    /// A node can't be used; what is behind it is unknown.
    pub(super) fn damaged_node(&mut self, ino: InodeNo, at: BlockNo, lo: u64, hi: u64, error: &BadNode) {
        self.owners_unknown = true;
        if self.first_round {
            let text = format!("node at block {at}, keys {lo:#x} to {hi:#x}: {}", error.0);
            self.find(Kind::TreeNode, Place::of_inode(ino), text);
        }
    }

    pub(super) fn bodies(&mut self) -> Result<(), FsckError> {
        let of = self.inodes.groups() as u64 * GROUP_INODES;
        let (mut number, mut wanted_to) = (0, 0);
        while let Some((next, first, count)) = self.next_run(number) {
            number = next;
            self.progress("inodes", number as u64 * GROUP_INODES, of)?;
            wanted_to = wanted_to.max(number + count as usize);
            while let Some((next, first, count)) = self.next_run(wanted_to)
                && next - number < (RUNS_AHEAD * GROUPS_PER_READ) as usize
                && self.view.will_read(first, count * GROUP_BLOCKS)
            {
                wanted_to = next + count as usize;
            }
            let blocks = self.view.blocks(first, count * GROUP_BLOCKS);
            for (i, group) in blocks.chunks(GROUP_BLOCKS as usize).enumerate() {
                for (inode, lock) in (0..GROUP_INODES).zip(group) {
                    let lock_at = first.plus(i as u64 * GROUP_BLOCKS + inode);
                    let body = &group[(inode + GROUP_INODES) as usize];
                    if self.first_round {
                        match lock {
                            Ok(block) => drop(self.lock_in(lock_at, block, LockKind::Inode)),
                            Err(e) => {
                                self.find(Kind::LockUnreadable, Place::of_block(lock_at), e.to_string());
                            }
                        }
                    }
                    let ino = InodeNo(lock_at.0 + GROUP_INODES);
                    let index = self.inodes.index_in(number + i, inode);
                    let used = self.inodes.group(number + i).is_some_and(|(_, used)| used & 1 << inode != 0);
                    match body {
                        Ok(block) => self.body(index, ino, block, used),
                        Err(e) => self.unreadable(index, ino, used, e.to_string()),
                    }
                }
            }
            number += count as usize;
        }
        self.view.forget_ahead();
        Ok(())
    }

    /// The next groups that this round looks at, from this one on: number, first block and how many.
    fn next_run(&self, from: usize) -> Option<(usize, BlockNo, u64)> {
        let mut number = from;
        while !self.first_round && number < self.inodes.groups() && !self.inodes.group_has_blocks(number) {
            number += 1;
        }
        let (first, _) = self.inodes.group(number)?;
        let mut count = 1;
        while count < GROUPS_PER_READ
            && let Some((next, _)) = self.inodes.group(number + count as usize)
            && next == first.plus(count * GROUP_BLOCKS)
        {
            count += 1;
        }
        Some((number, first, count))
    }

    fn unreadable(&mut self, index: Index, ino: InodeNo, used: bool, text: String) {
        // Of one that is marked free nothing was known before either; but it may have been in use.
        self.owners_unknown = true;
        self.names_unknown = true;
        self.inodes.set(index, Known { kind: u8::from(used), ..Known::default() });
        if self.first_round {
            self.find(Kind::InodeUnreadable, Place::of_inode(ino), text);
        }
    }

    fn body(&mut self, index: Index, ino: InodeNo, block: &Block, used: bool) {
        let parsed: Result<&InodeDisk, LayoutError> = InodeDisk::parse(block, self.volume, ino);
        let body = match parsed {
            Ok(body) => body,
            Err(e) => return self.unreadable(index, ino, used, e.to_string()),
        };
        let in_use = body.form() != Form::Free;
        if self.first_round {
            if in_use != used {
                let (kind, text) = match used {
                    true => (Kind::InodeUsed, "free, and marked used in its map"),
                    false => (Kind::InodeFree, "in use, and marked free in its map"),
                };
                self.find(kind, Place::of_inode(ino), text);
            }
            let kind = (body.mode.get() >> 12) as u8;
            let (nlink, generation) = (body.nlink.get(), body.generation.get());
            // All but the root of a directory's tree; all of a file's.
            let root_level =
                || DirTree::new(self.volume, ino, self.superblock.hash_seed).tree().root_level(&body.content);
            let has_blocks = body.form() == Form::Tree
                && (body.mode.get() & libc::S_IFMT != libc::S_IFDIR
                    || root_level().is_ok_and(|level| level > 0));
            let known = Known { nlink, generation, kind, readable: true, has_blocks, ..Known::default() };
            self.inodes.set(index, known);
        }
        if !in_use {
            return;
        }
        if let Some(text) = rules::inode_contradiction(body) {
            self.owners_unknown = true;
            self.names_unknown = true;
            if self.first_round {
                self.inodes.set(index, Known { readable: false, ..self.inodes.get(index) });
                self.find(Kind::InodeFields, Place::of_inode(ino), text);
            }
            return;
        }
        match body.mode.get() & libc::S_IFMT {
            libc::S_IFDIR if self.first_round => {
                let (parent, parent_key) = (body.parent.get(), body.parent_key.get());
                self.inodes.add_directory(Directory { index, parent, parent_key, found: None });
            }
            libc::S_IFDIR => {}
            _ => self.file(ino, body),
        }
    }

    fn file(&mut self, ino: InodeNo, body: &InodeDisk) {
        let (mut blocks, mut end, mut written_end, mut damaged) = (0, 0, 0, false);
        if body.form() == Form::Tree {
            let tree = ExtentTree::new(self.volume, ino, self.geometry.size_blocks);
            let view = self.view;
            let mut found =
                Extents { checker: self, ino, tree, blocks: 0, end: 0, written_end: 0, damaged: false };
            tree.tree().walk(&mut Nodes(view), &body.content, &mut found);
            (blocks, end, written_end, damaged) = (found.blocks, found.end, found.written_end, found.damaged);
        }
        if !self.first_round {
            return;
        }
        self.report.files += 1;
        let place = Place::of_inode(ino);
        if blocks != body.blocks.get() && !damaged {
            let text = format!("counts {} blocks, has {blocks}", body.blocks.get());
            self.found(Finding::new(Kind::InodeBlocks, place, text).should_be(blocks));
        }
        let size = body.size.get();
        if size > MAX_FILE_BLOCKS * BLOCK_BYTES_U64 {
            let text = format!("has {size} bytes, more than a file can have");
            self.found(Finding::new(Kind::InodeSize, place, text).should_be(end * BLOCK_BYTES_U64));
        } else if written_end > size.div_ceil(BLOCK_BYTES_U64) && body.flags.get() & TRUNCATING == 0 {
            let text = format!("has {size} bytes, and written blocks up to logical block {written_end}");
            self.find(Kind::BehindEnd, place, text);
        }
    }
}
