//! Tree nodes written as `docs/format.md` says, without the code that fsck reads them with.

use lunfs::layout::geometry::lock_of_inode;
use lunfs::layout::{Block, HEADER_BYTES, Header, Magic, seal};
use lunfs::types::{BlockNo, InodeNo, VolumeId};
use zerocopy::IntoBytes;

pub const EXTENT_BYTES: usize = 16;
const HEAD: usize = 16;
const SLOT: usize = 12;
const ROOT_BYTES: usize = 3840 - HEAD;
const NODE_BYTES: usize = 4096 - HEADER_BYTES - HEAD;
const CHILD: usize = 8;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Directory = 1,
    Extents = 2,
}

/// How so many entries of one length are put into nodes: leaves first, then the nodes above them.
#[derive(Clone, Copy, Debug)]
pub struct Shelves {
    pub entries: usize,
    per_leaf: usize,
    leaves: usize,
    /// Nodes between the root and the leaves.
    inner: usize,
}

const PER_INNER: usize = NODE_BYTES / (SLOT + CHILD);
const PER_ROOT: usize = ROOT_BYTES / (SLOT + CHILD);

impl Shelves {
    pub fn new(entries: usize, value_bytes: usize) -> Self {
        let bytes = SLOT + value_bytes;
        let per_leaf = NODE_BYTES / bytes;
        let leaves = if entries * bytes <= ROOT_BYTES { 0 } else { entries.div_ceil(per_leaf) };
        let inner = if leaves <= PER_ROOT { 0 } else { leaves.div_ceil(PER_INNER) };
        assert!(inner <= PER_ROOT, "{entries} entries");
        Shelves { entries, per_leaf, leaves, inner }
    }

    pub fn nodes(&self) -> u64 {
        (self.leaves + self.inner) as u64
    }

    /// Writes the root, or the node with this number.
    pub fn write(&self, area: &mut [u8], tree: &Tree<'_>, node: Option<usize>) {
        let child = |i: usize| (tree.at.0 + i as u64).to_le_bytes().to_vec();
        let leaf = |i: usize| ((tree.key)(i * self.per_leaf), child(i));
        let above = |i: usize| ((tree.key)(i * PER_INNER * self.per_leaf), child(self.leaves + i));
        let entry = |i: usize| ((tree.key)(i), (tree.value)(i));
        match node {
            None if self.leaves == 0 => put(area, tree, 0, (0..self.entries).map(entry)),
            None if self.inner == 0 => put(area, tree, 1, (0..self.leaves).map(leaf)),
            None => put(area, tree, 2, (0..self.inner).map(above)),
            Some(n) if n < self.leaves => {
                let end = self.entries.min((n + 1) * self.per_leaf);
                put(area, tree, 0, (n * self.per_leaf..end).map(entry));
            }
            Some(n) => {
                let n = n - self.leaves;
                let end = self.leaves.min((n + 1) * PER_INNER);
                put(area, tree, 1, (n * PER_INNER..end).map(leaf));
            }
        }
    }
}

/// Whose, of what, and where its first node is.
pub struct Tree<'a> {
    pub kind: Kind,
    pub owner: InodeNo,
    pub at: BlockNo,
    pub key: &'a dyn Fn(usize) -> u64,
    pub value: &'a dyn Fn(usize) -> Vec<u8>,
}

fn put(area: &mut [u8], tree: &Tree<'_>, level: u8, entries: impl Iterator<Item = (u64, Vec<u8>)>) {
    let (mut heap, mut count) = (area.len(), 0);
    for (key, value) in entries {
        heap -= value.len();
        area[heap..heap + value.len()].copy_from_slice(&value);
        let slot = &mut area[HEAD + count * SLOT..][..SLOT];
        slot[..8].copy_from_slice(&key.to_le_bytes());
        slot[8..10].copy_from_slice(&(heap as u16).to_le_bytes());
        slot[10..].copy_from_slice(&(value.len() as u16).to_le_bytes());
        count += 1;
    }
    assert!(HEAD + count * SLOT <= heap);
    area[..8].copy_from_slice(&tree.owner.0.to_le_bytes());
    (area[8], area[9]) = (tree.kind as u8, level);
    area[10..12].copy_from_slice(&(count as u16).to_le_bytes());
    area[12..14].copy_from_slice(&(heap as u16).to_le_bytes());
}

/// A whole node block.
pub fn node_block(block: &mut Block, volume: VolumeId, shelves: &Shelves, tree: &Tree<'_>, node: usize) {
    let at = tree.at.plus(node as u64);
    let header = Header::new(Magic::TreeNode, volume, at, lock_of_inode(tree.owner));
    block[..HEADER_BYTES].copy_from_slice(header.as_bytes());
    shelves.write(&mut block[HEADER_BYTES..], tree, Some(node));
    seal(&mut block[..]);
}
