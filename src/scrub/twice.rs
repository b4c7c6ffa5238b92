//! Blocks that two claim.
//!
//! Who had a block when it was met is remembered, with where in that file's tree it is to be found again. So when
//! another one is met with the same block, the first is asked again whether it still has it; only if both have it
//! under both locks, it is found. A claim that is out of date gives way.
//!
//! Memory is bounded: beyond [`MOST_CLAIMS`] runs nothing more is remembered, and the report says so. They are at most 96
//! bytes each, in a tree whose nodes may be half empty.

use std::collections::BTreeMap;

use super::Scrub;
use super::cases::Case;
use super::ground::{Eyes, NoLock, Nodes};
use crate::fs::dirtree::DirTree;
use crate::fs::extents::{ExtentTree, Mapping};
use crate::fsck::finding::{Finding, Kind, Place};
use crate::layout::inode::{Form, InodeDisk};
use crate::types::{BlockNo, InodeNo};

/// Runs of blocks whose owners are remembered.
pub(super) const MOST_CLAIMS: usize = 1 << 19;

/// A run of blocks that was met, and where.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Claim {
    pub at: BlockNo,
    pub blocks: u64,
    pub ino: InodeNo,
    /// The first logical block; of a node of a tree, where its keys begin.
    pub key: u64,
    pub is_node: bool,
}

impl Claim {
    fn end(&self) -> u64 {
        self.at.0.saturating_add(self.blocks)
    }
}

/// By their first block; they never overlap.
#[derive(Default)]
pub(super) struct Claims {
    runs: BTreeMap<u64, Claim>,
    left_out: u64,
}

impl Claims {
    /// Somebody else's claim on one of these blocks.
    fn other(&self, claim: &Claim) -> Option<Claim> {
        let (_, last) = self.runs.range(..claim.end()).next_back()?;
        (last.end() > claim.at.0).then_some(*last)
    }

    /// How many runs there was no room for.
    pub fn left_out(&self) -> u64 {
        self.left_out
    }
}

impl Scrub<'_> {
    /// An inode has these.
    pub(super) fn claim(&mut self, claims: &[Claim]) {
        for claim in claims {
            self.claim_one(claim);
        }
    }

    fn claim_one(&mut self, claim: &Claim) {
        while let Some(other) = self.claims.other(claim) {
            let same = (other.ino, other.key, other.is_node) == (claim.ino, claim.key, claim.is_node);
            if !same && self.are_twice(Eyes::Glance, &other, claim) {
                return self.suspect(Case::Twice(other, *claim));
            }
            self.claims.runs.remove(&other.at.0);
        }
        match self.claims.runs.len() < MOST_CLAIMS {
            true => drop(self.claims.runs.insert(claim.at.0, *claim)),
            false => self.claims.left_out += 1,
        }
    }

    /// Have both the first block that they share?
    pub(super) fn are_twice(&self, eyes: Eyes<'_>, a: &Claim, b: &Claim) -> bool {
        let block = BlockNo(a.at.0.max(b.at.0));
        self.has(eyes, a, block) && self.has(eyes, b, block)
    }

    fn has(&self, eyes: Eyes<'_>, claim: &Claim, block: BlockNo) -> bool {
        let Ok(body) = self.ground.body(eyes, claim.ino) else { return false };
        let body = InodeDisk::of(&body);
        if body.form() != Form::Tree {
            return false;
        }
        let ground = &self.ground;
        let files = ExtentTree::new(ground.id, claim.ino, ground.geometry.size_blocks);
        let mut nodes = Nodes::of(ground, eyes, claim.ino);
        let is_directory = body.mode.get() & libc::S_IFMT == libc::S_IFDIR;
        match (claim.is_node, is_directory) {
            (true, _) => {
                let names = DirTree::new(ground.id, claim.ino, ground.superblock.hash_seed);
                let tree = if is_directory { names.tree() } else { files.tree() };
                let _ = tree.get(&mut nodes, &body.content, claim.key);
                nodes.met.contains(&block)
            }
            (false, true) => false,
            (false, false) => {
                let logical = claim.key + block.0.saturating_sub(claim.at.0);
                let found = files.lookup(&mut nodes, &body.content, logical);
                matches!(found, Ok(Mapping::Extent(extent)) if extent.physical_of(logical) == Some(block))
            }
        }
    }

    /// Looks at two that claim a block, under the locks of both.
    pub(super) fn look_at_twice(&mut self, a: &Claim, b: &Claim) -> Result<(), NoLock> {
        let guards = self.hold_inodes(&[a.ino, b.ino])?;
        let are = self.are_twice(Eyes::Look(&guards), a, b);
        drop(guards);
        if are {
            let block = BlockNo(a.at.0.max(b.at.0));
            let text = format!("block {block} of inode {} belongs to another, too", b.ino);
            self.found(Finding::new(Kind::BlockTwice, Place::of_inode(b.ino), text))?;
        }
        Ok(())
    }
}
