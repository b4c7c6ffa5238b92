//! Trees of files and directories, in parts: what is wrong with them by themselves, and what they refer to.

use super::clusters::ClustersLooked;
use super::ground::{BadNode, Eyes, Nodes};
use super::inodes::LEAVES_PER_STEP;
use super::twice::Claim;
use super::{Scrub, ScrubError};
use crate::fs::dirtree::{DirTarget, DirTree};
use crate::fs::extents::{ExtentTree, MAX_FILE_BLOCKS};
use crate::fsck::finding::{Finding, Kind, Place};
use crate::inspect::names::printable;
use crate::layout::inode::{Form, InodeDisk, TRUNCATING};
use crate::tree::TreeVisitor;
use crate::types::{BLOCK_BYTES_U64, BlockNo, InodeNo};

/// What the parts of a tree add up to.
#[derive(Clone, Default)]
pub(super) struct Sums {
    blocks: u64,
    /// End of the extent before, and of the last one that was written.
    end: u64,
    written_end: u64,
    entries: u64,
    subdirectories: u32,
    /// Something can't be used: nothing is added up.
    damaged: bool,
    /// Names of this hash.
    hash: u64,
    names: Vec<Vec<u8>>,
}

/// An entry of a directory.
pub(super) struct Name {
    pub key: u64,
    pub target: DirTarget,
}

/// One part of a tree.
#[derive(Default)]
pub(super) struct Part {
    /// Where the next one begins.
    pub next: Option<u64>,
    pub runs: Vec<Claim>,
    pub names: Vec<Name>,
}

struct Walk<'a> {
    ino: InodeNo,
    sums: &'a mut Sums,
    found: &'a mut Vec<Finding>,
    part: Part,
    kind: WalkKind,
}

enum WalkKind {
    File(ExtentTree),
    Directory(DirTree),
}

impl TreeVisitor<BadNode> for Walk<'_> {
    fn node(&mut self, _: BlockNo, _: u8) {}

    fn node_from(&mut self, at: BlockNo, _: u8, lo: u64) {
        self.sums.blocks += 1;
        self.part.runs.push(Claim { at, blocks: 1, ino: self.ino, key: lo, is_node: true });
    }

    fn entry(&mut self, key: u64, value: &[u8]) {
        match self.kind {
            WalkKind::File(tree) => self.extent(&tree, key, value),
            WalkKind::Directory(tree) => self.name(&tree, key, value),
        }
    }

    fn damaged(&mut self, at: BlockNo, lo: u64, hi: u64, error: BadNode) {
        self.sums.damaged = true;
        let text = format!("node at block {at}, keys {lo:#x} to {hi:#x}: {}", error.0);
        self.found.push(Finding::new(Kind::TreeNode, Place::of_inode(self.ino), text));
    }
}

impl Walk<'_> {
    fn bad_extent(&mut self, text: String) {
        self.sums.damaged = true;
        self.found.push(Finding::new(Kind::Extent, Place::of_inode(self.ino), text));
    }

    fn extent(&mut self, tree: &ExtentTree, key: u64, value: &[u8]) {
        let extent = match tree.parse(key, value) {
            Ok(extent) => extent,
            Err(e) => return self.bad_extent(e.to_string()),
        };
        if extent.logical < self.sums.end {
            return self.bad_extent(format!("extents overlap at logical block {}", extent.logical));
        }
        self.sums.end = extent.end();
        if !extent.unwritten {
            self.sums.written_end = extent.end();
        }
        self.sums.blocks += extent.blocks;
        let (at, blocks, ino) = (extent.physical, extent.blocks, self.ino);
        self.part.runs.push(Claim { at, blocks, ino, key: extent.logical, is_node: false });
    }

    fn name(&mut self, tree: &DirTree, key: u64, value: &[u8]) {
        self.sums.entries += 1;
        let place = |inode: InodeNo| Place::Entry { directory: self.ino.0, key, inode: inode.0 };
        let item = match tree.parse(key, value) {
            Ok(item) => item,
            Err(e) => {
                self.sums.damaged = true;
                let finding = Finding::new(Kind::Entry, place(InodeNo(0)), e.to_string());
                return self.found.push(finding);
            }
        };
        let shown = printable(&String::from_utf8_lossy(item.name));
        if !tree.key_fits(&item) {
            let text = format!("\"{shown}\" can't be found by its name");
            self.found.push(Finding::new(Kind::EntryPlace, place(item.target.ino), text));
        } else {
            let hash = tree.first_key(item.name);
            if self.sums.hash != hash {
                self.sums.hash = hash;
                self.sums.names.clear();
            }
            if self.sums.names.iter().any(|name| name == item.name) {
                self.sums.damaged = true;
                let text = format!("the name \"{shown}\" is there twice");
                return self.found.push(Finding::new(Kind::EntryTwice, place(item.target.ino), text));
            }
            self.sums.names.push(item.name.to_vec());
        }
        self.sums.subdirectories += u32::from(u32::from(item.target.kind) == libc::S_IFDIR >> 12);
        self.part.names.push(Name { key, target: item.target });
    }
}

impl Sums {
    /// The tree changed since the last part: names are not compared with those of that part.
    pub fn begin_anew_with_names(&mut self) {
        self.hash = 0;
        self.names.clear();
    }

    /// What the body counts otherwise. `orphans`: it is a list of orphans.
    pub fn faults(&self, ino: InodeNo, body: &InodeDisk, orphans: bool) -> Vec<Finding> {
        let place = Place::of_inode(ino);
        let mut found = Vec::new();
        let mut find = |kind, text| found.push(Finding::new(kind, place, text));
        let blocks = body.blocks.get();
        if blocks != self.blocks && !self.damaged {
            find(Kind::InodeBlocks, format!("counts {blocks} blocks, has {}", self.blocks));
        }
        if body.mode.get() & libc::S_IFMT != libc::S_IFDIR {
            let size = body.size.get();
            if size > MAX_FILE_BLOCKS * BLOCK_BYTES_U64 {
                find(Kind::InodeSize, format!("has {size} bytes, more than a file can have"));
            } else if self.written_end > size.div_ceil(BLOCK_BYTES_U64) && body.flags.get() & TRUNCATING == 0
            {
                let end = self.written_end;
                let text = format!("has {size} bytes, and written blocks up to logical block {end}");
                find(Kind::BehindEnd, text);
            }
        } else if !self.damaged {
            let (entries, links, subdirectories) =
                (body.entries.get(), body.nlink.get(), self.subdirectories);
            if entries != self.entries {
                find(Kind::DirectoryEntries, format!("counts {entries} entries, has {}", self.entries));
            }
            let removed = links == 0 && subdirectories == 0;
            if links != 2 + subdirectories && !orphans && !removed {
                find(Kind::Links, format!("link count {links}, {subdirectories} subdirectories"));
            }
        }
        found
    }
}

impl Scrub<'_> {
    /// One part of an inode's tree.
    pub(super) fn part(
        &self,
        eyes: Eyes<'_>,
        ino: InodeNo,
        body: &InodeDisk,
        from: u64,
        sums: &mut Sums,
        found: &mut Vec<Finding>,
    ) -> Part {
        if body.form() != Form::Tree {
            return Part::default();
        }
        let ground = &self.ground;
        let (kind, tree) = if body.mode.get() & libc::S_IFMT == libc::S_IFDIR {
            let tree = DirTree::new(ground.id, ino, ground.superblock.hash_seed);
            (WalkKind::Directory(tree), *tree.tree())
        } else {
            let tree = ExtentTree::new(ground.id, ino, ground.geometry.size_blocks);
            (WalkKind::File(tree), *tree.tree())
        };
        let mut nodes = Nodes::of(ground, eyes, ino);
        let mut walk = Walk { ino, sums, found, part: Part::default(), kind };
        let next = tree.walk_part(&mut nodes, &body.content, from, LEAVES_PER_STEP, &mut walk);
        Part { next, ..walk.part }
    }

    /// [`Scrub::marks`] of a part.
    pub(super) fn marks_of(
        &mut self,
        eyes: Eyes<'_>,
        ino: InodeNo,
        part: &Part,
        looked: &mut ClustersLooked,
        found: &mut Vec<Finding>,
    ) -> Option<u64> {
        let runs: Vec<(BlockNo, u64)> = part.runs.iter().map(|run| (run.at, run.blocks)).collect();
        self.marks(eyes, ino, &runs, looked, found)
    }

    /// What a part refers to: names that do not fit, and blocks that others claim, become cases.
    pub(super) fn refer(&mut self, ino: InodeNo, part: &Part) -> Result<(), ScrubError> {
        for name in &part.names {
            if !self.entry_fits(ino, name.key, name.target) {
                self.suspect(super::cases::Case::Entry { directory: ino, key: name.key });
            }
        }
        self.claim(&part.runs);
        Ok(())
    }
}
