//! A B+tree of `u64` keys and short byte strings: directories, extents, extended attributes.
//!
//! The root lives in a slice of its owner's inode body, so a small tree needs no block at all; other
//! nodes are 4 KiB metadata blocks under the owner's lock. Nodes come and go through [`NodeStore`], which
//! the transaction layer implements; this room does no I/O and keeps no state.
//!
//! Invariants, and what would break without them:
//!
//! * A child's level is its parent's level less one. Otherwise damaged addresses could make a cycle.
//! * All keys of a node lie in the range that its parent gives it, and only the root may be empty.
//!   Otherwise one block could be reached by two ways, and a walk over garbage would not end.
//! * Each node names its owner and its kind. Otherwise a stale address would graft a piece of another
//!   file into this one.
//! * Every node that is read is checked before it is used, and an operation reads all it needs before
//!   it changes anything: damage never leaves half an operation behind, only a failing store does.
//! * A child's first separator is only a lower bound that nobody compares with: the range of child 0
//!   begins where its parent's range begins. That is what lets an empty node leave without a
//!   change in any other node.
//!
//! Not for: deciding which locks are held, sealing blocks (the journal does), reserving space (the
//! caller does, with [`Cost`], before it joins a transaction).

mod clear;
mod edit;
mod insert;
#[doc(hidden)]
pub mod mem;
mod node;
mod overlay;
mod read;
mod remove;
mod verify;

use std::sync::Arc;

use thiserror::Error;

use crate::layout::geometry::lock_of_inode;
use crate::layout::{Block, HEADER_BYTES, Header, Magic, zero_block};
use crate::types::{BLOCK_BYTES, BlockNo, InodeNo, VolumeId};

pub use node::{MAX_VALUE_BYTES, MIN_ROOT_BYTES};
pub use overlay::{Overlay, atomically};
pub use verify::{TreeSummary, TreeVisitor};

/// Levels above the leaves that a tree may have. Even nodes a quarter full reach far more keys than a
/// volume has room for.
pub const MAX_LEVEL: u8 = 8;

/// Whose root this is, in messages: the root has no block of its own.
pub(crate) fn root_address(owner: InodeNo) -> BlockNo {
    owner.body()
}

/// Why a tree operation failed. Every variant names the owner, and the block where one is to blame.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum TreeError {
    #[error("tree node at block {at} of inode {owner}: {field} has the impossible value {value:#x}")]
    Damaged { owner: InodeNo, at: BlockNo, field: &'static str, value: u64 },
    #[error("tree of inode {owner}: the value of key {key:#x} is damaged: {what}")]
    Value { owner: InodeNo, key: u64, what: &'static str },
    #[error("tree of inode {owner}: key {key:#x} is there already")]
    Exists { owner: InodeNo, key: u64 },
    #[error("tree of inode {owner}: key {key:#x} is not there")]
    Missing { owner: InodeNo, key: u64 },
    #[error("tree of inode {owner}: {what}: {value:#x} is out of range")]
    Range { owner: InodeNo, what: &'static str, value: u64 },
    #[error("tree of inode {owner}: cannot grow deeper")]
    TooDeep { owner: InodeNo },
    /// The store gave other bytes to change than it gave to read.
    #[error("tree node at block {at} of inode {owner}: changed between reading and writing")]
    Unstable { owner: InodeNo, at: BlockNo },
}

/// Where lookups get nodes from.
pub trait NodeRead {
    type Error: From<TreeError>;
    /// A walk will load this block soon. A hint.
    fn will_load(&mut self, _at: BlockNo) {}
    /// The block's present contents in this transaction, verified by [`crate::layout::verify`] as a
    /// [`Magic::TreeNode`] when it came from the device. The tree checks what is inside.
    fn load(&mut self, at: BlockNo) -> Result<Arc<Block>, Self::Error>;
}

/// Where changes go to. Nothing here may wait: locks and space were taken before.
pub trait NodeStore: NodeRead {
    /// Changes an existing node in place; `change` is called once, with what `load` returned last.
    /// Except when nodes split, the tree keeps no `Arc` of the block while it calls this, so that
    /// a store that alone holds the block need not copy it.
    fn modify(&mut self, at: BlockNo, change: &mut dyn FnMut(&mut Block)) -> Result<(), Self::Error>;
    /// New contents of an existing or just allocated node, header included, not sealed.
    fn put(&mut self, at: BlockNo, block: Box<Block>) -> Result<(), Self::Error>;
    /// A block out of those reserved before.
    fn allocate(&mut self) -> Result<BlockNo, Self::Error>;
    fn free(&mut self, at: BlockNo) -> Result<(), Self::Error>;
}

/// What a tree holds; a node of one kind is never taken for a node of another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TreeKind {
    Directory,
    Extents,
    Attributes,
    /// For tests: nodes of a few short entries, so that a small tree is deep and rare paths are common.
    #[doc(hidden)]
    Tiny,
}

impl TreeKind {
    pub fn code(self) -> u8 {
        match self {
            TreeKind::Directory => 1,
            TreeKind::Extents => 2,
            TreeKind::Attributes => 3,
            TreeKind::Tiny => 255,
        }
    }
}

/// One tree: whose, of what. The root's bytes are passed to each operation, since they lie in the
/// inode body that the caller has in hands anyway.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tree {
    pub volume: VolumeId,
    pub owner: InodeNo,
    pub kind: TreeKind,
}

/// A key and its value.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    pub key: u64,
    pub value: Vec<u8>,
}

/// The most that operations need of what must be reserved before. The root is not counted: it is part
/// of the inode body.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Cost {
    /// Blocks that may be allocated.
    pub allocations: u32,
    /// Distinct blocks that may be written or freed, new ones included: records in the journal.
    pub touched: u32,
}

impl Cost {
    /// Of `count` calls of `insert` or `replace` (fewer than a hundred in one transaction), on a tree
    /// whose root has `level` now.
    ///
    /// One insert splits at most one node on each of the `level` levels below the root; a root that
    /// is full moves into a new node that may have to split. A root that just grew has one or two of
    /// nearly two hundred entries, so it does not grow again soon.
    pub const fn inserts(level: u8, count: u32) -> Cost {
        let splits = (level as u32 + 1) * count;
        let allocations = if count == 0 { 0 } else { splits + 1 };
        Cost { allocations, touched: (level as u32 + 1) * count + allocations }
    }

    /// Of `count` calls of `remove`: on each level the node and one neighbour.
    pub const fn removes(level: u8, count: u32) -> Cost {
        Cost { allocations: 0, touched: 2 * level as u32 * count }
    }

    /// Of one step of [`Tree::free_all`] with `max_nodes`.
    pub const fn free_step(level: u8, max_nodes: u32) -> Cost {
        Cost { allocations: 0, touched: max_nodes + 2 * level as u32 }
    }

    /// Of both.
    pub const fn and(self, other: Cost) -> Cost {
        Cost { allocations: self.allocations + other.allocations, touched: self.touched + other.touched }
    }
}

impl Tree {
    /// The most blocks one insert can allocate on a tree whose root has `level`.
    pub const fn max_allocations_for_insert(level: u8) -> u32 {
        Cost::inserts(level, 1).allocations
    }

    /// Writes an empty tree into `root`, whatever was there. Fails if the slice is too short or too long.
    pub fn init_root(&self, root: &mut [u8]) -> Result<(), TreeError> {
        let value = root.len() as u64;
        match edit::build(root, self, 0, &[]) {
            true => Ok(()),
            false => Err(TreeError::Range { owner: self.owner, what: "bytes for a root", value }),
        }
    }

    /// Levels above the leaves; 0: all entries are in the root. [`Cost`] is reckoned from it.
    pub fn root_level(&self, root: &[u8]) -> Result<u8, TreeError> {
        Ok(node::check_root(root, self)?.level())
    }

    /// A block for a new node, with its identity filled in.
    fn new_block(&self, at: BlockNo, level: u8, entries: &[(u64, &[u8])]) -> Result<Box<Block>, TreeError> {
        let mut block = zero_block();
        let header = Header::new(Magic::TreeNode, self.volume, at, lock_of_inode(self.owner));
        let (front, area) = block.split_at_mut(HEADER_BYTES);
        front.copy_from_slice(zerocopy::IntoBytes::as_bytes(&header));
        match edit::build(area, self, level, entries) {
            true => Ok(block),
            // Splits are planned so that both sides fit; entries that don't are a fault of this room.
            false => Err(TreeError::Unstable { owner: self.owner, at }),
        }
    }

    fn unstable(&self, at: BlockNo) -> TreeError {
        TreeError::Unstable { owner: self.owner, at }
    }
}

/// The part of a node block that belongs to the tree.
pub(crate) fn area_of(block: &Block) -> &[u8] {
    block.split_at(HEADER_BYTES).1
}

pub(crate) fn area_of_mut(block: &mut Block) -> &mut [u8] {
    block.split_at_mut(HEADER_BYTES).1
}

/// Bytes of the tree's part of a node block.
pub(crate) const BLOCK_AREA_BYTES: usize = BLOCK_BYTES - HEADER_BYTES;
