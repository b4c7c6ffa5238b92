//! One node: a head, slots sorted by key growing up, values growing down from the end.
//!
//! ```text
//! head (16 bytes) | slot slot slot ... -> free <- ... value value value
//! ```
//!
//! [`check`] proves once that every slot points into the value heap, that keys ascend inside their
//! range and that the values fit together; only then does a [`Node`] exist.
//!
//! Not for: changes (`edit`), more than one node (`read`, `insert`, `remove`).

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{BLOCK_AREA_BYTES, MAX_LEVEL, Tree, TreeError, TreeKind, area_of, root_address};
use crate::layout::geometry::lock_of_inode;
use crate::layout::{Block, header_of};
use crate::types::BlockNo;

/// The longest value. Twelve of them fit a node, so splitting always leaves two nodes that fit.
pub const MAX_VALUE_BYTES: usize = 320;
/// The shortest slice that can be a root: room for a few of the longest values.
pub const MIN_ROOT_BYTES: usize = 2048;

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct NodeHead {
    /*00*/ pub owner: U64,
    /*08*/ pub kind: u8,
    /// 0: a leaf.
    /*09*/
    pub level: u8,
    /*0a*/ pub count: U16,
    /// Where the lowest value begins, from the start of the head.
    /*0c*/
    pub heap: U16,
    /*0e*/ pub reserved: U16,
}
pub(super) const HEAD_BYTES: usize = 16;
const _: () = assert!(size_of::<NodeHead>() == HEAD_BYTES);

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct SlotDisk {
    pub key: U64,
    pub offset: U16,
    pub len: U16,
}
pub(super) const SLOT_BYTES: usize = 12;
const _: () = assert!(size_of::<SlotDisk>() == SLOT_BYTES);

/// Bytes of an internal node's value: the child's address.
pub(super) const CHILD_BYTES: usize = 8;
/// Bytes for slots and values in a node block.
const BLOCK_CAPACITY: usize = BLOCK_AREA_BYTES - HEAD_BYTES;
/// The same in a [`TreeKind::Tiny`], and its longest value.
const TINY_CAPACITY: usize = 160;
const TINY_VALUE_BYTES: usize = 40;

/// Do both sides fit a node when one that overflows is cut in the middle?
const fn splits_fit(capacity: usize, longest: usize) -> bool {
    (capacity + SLOT_BYTES + longest) / 2 + SLOT_BYTES + longest <= capacity
}
const _: () = assert!(splits_fit(BLOCK_CAPACITY, MAX_VALUE_BYTES));
const _: () = assert!(splits_fit(TINY_CAPACITY, TINY_VALUE_BYTES));

impl Tree {
    /// Bytes for slots and values in a block.
    pub(super) fn node_capacity(&self) -> usize {
        if self.kind == TreeKind::Tiny { TINY_CAPACITY } else { BLOCK_CAPACITY }
    }

    /// The same in the root; less, as it shares its block with the inode.
    pub(super) fn root_capacity(&self, root: &[u8]) -> usize {
        let bytes = root.len().saturating_sub(HEAD_BYTES);
        if self.kind == TreeKind::Tiny { TINY_CAPACITY - SLOT_BYTES } else { bytes }
    }

    pub(super) fn max_value(&self) -> usize {
        if self.kind == TreeKind::Tiny { TINY_VALUE_BYTES } else { MAX_VALUE_BYTES }
    }
}

/// What the way to a node says about it.
#[derive(Clone, Copy)]
pub(super) struct Expect {
    pub at: BlockNo,
    pub level: u8,
    /// The first and last key it may have.
    pub lo: u64,
    pub hi: u64,
}

/// A checked node.
#[derive(Clone, Copy)]
pub(super) struct Node<'a> {
    area: &'a [u8],
    level: u8,
    slots: &'a [SlotDisk],
    /// Bytes of slots and values together.
    pub used: usize,
}

impl<'a> Node<'a> {
    pub fn level(&self) -> u8 {
        self.level
    }

    pub fn count(&self) -> usize {
        self.slots.len()
    }

    /// Zero past the end.
    pub fn key(&self, index: usize) -> u64 {
        self.slots.get(index).map_or(0, |s| s.key.get())
    }

    /// Empty past the end; inside the node [`check`] has proved the bounds.
    pub fn value(&self, index: usize) -> &'a [u8] {
        let range = self.slots.get(index).map(|s| {
            let offset = usize::from(s.offset.get());
            offset..offset + usize::from(s.len.get())
        });
        range.and_then(|r| self.area.get(r)).unwrap_or_default()
    }

    pub fn child(&self, index: usize) -> BlockNo {
        let bytes = self.value(index).try_into().unwrap_or_default();
        BlockNo(u64::from_le_bytes(bytes))
    }

    /// Where the key is, or where it would be inserted.
    pub fn search(&self, key: u64) -> Result<usize, usize> {
        self.slots.binary_search_by(|s| s.key.get().cmp(&key))
    }

    /// The child whose range has the key. Keys below the first separator belong to child 0.
    pub fn child_index(&self, key: u64) -> usize {
        match self.search(key) {
            Ok(index) => index,
            Err(index) => index.saturating_sub(1),
        }
    }

    /// What a child must look like, given the range of this node.
    pub fn expect_child(&self, index: usize, lo: u64, hi: u64) -> Expect {
        Expect {
            at: self.child(index),
            level: self.level.saturating_sub(1),
            lo: if index == 0 { lo } else { self.key(index) },
            // Keys ascend strictly, so the key after another one is not zero.
            hi: if index + 1 < self.count() { self.key(index + 1).saturating_sub(1) } else { hi },
        }
    }

    pub fn entries(&self) -> impl Iterator<Item = (u64, &'a [u8])> + use<'a> {
        let this = *self;
        (0..this.count()).map(move |i| (this.key(i), this.value(i)))
    }

    /// Do two values share bytes? [`check`] does not ask: it can't harm memory, and costs more than the
    /// rest together.
    pub fn overlaps(&self) -> bool {
        let mut ranges: Vec<_> = self.slots.iter().map(|s| (s.offset.get(), s.len.get())).collect();
        ranges.retain(|(_, len)| *len > 0);
        ranges.sort_unstable();
        ranges.windows(2).any(|pair| matches!(pair, [a, b] if a.0 + a.1 > b.0))
    }
}

/// Checks a node's bytes against the way that led to it. All that the rest of this room relies on.
fn check<'a>(area: &'a [u8], tree: &Tree, expect: Option<Expect>) -> Result<Node<'a>, TreeError> {
    let at = expect.map_or(root_address(tree.owner), |e| e.at);
    let bad = |field, value: u64| Err(TreeError::Damaged { owner: tree.owner, at, field, value });
    let (lo, hi) = expect.map_or((0, u64::MAX), |e| (e.lo, e.hi));
    if area.len() < MIN_ROOT_BYTES || area.len() > BLOCK_AREA_BYTES {
        return bad("length", area.len() as u64);
    }
    let Ok((head, rest)) = NodeHead::ref_from_prefix(area) else { return bad("length", area.len() as u64) };
    if head.owner.get() != tree.owner.0 {
        return bad("owner", head.owner.get());
    }
    if head.kind != tree.kind.code() {
        return bad("kind", head.kind.into());
    }
    if head.level > MAX_LEVEL || expect.is_some_and(|e| e.level != head.level) {
        return bad("level", head.level.into());
    }
    let count = usize::from(head.count.get());
    if count == 0 && (expect.is_some() || head.level > 0) {
        return bad("count", 0);
    }
    let Ok((slots, _)) = <[SlotDisk]>::ref_from_prefix_with_elems(rest, count) else {
        return bad("count", count as u64);
    };
    let heap = usize::from(head.heap.get());
    if heap < HEAD_BYTES + count * SLOT_BYTES || heap > area.len() {
        return bad("heap", heap as u64);
    }
    let mut least = lo;
    let mut value_bytes = 0;
    for (i, slot) in slots.iter().enumerate() {
        let (key, offset, len) =
            (slot.key.get(), usize::from(slot.offset.get()), usize::from(slot.len.get()));
        // The greatest key can only be the last one.
        if key < least || key > hi || (key == u64::MAX && i + 1 < count) {
            return bad("key", key);
        }
        least = key.saturating_add(1);
        // The place of an empty value means nothing.
        if (len > 0 && offset < heap) || offset + len > area.len() {
            return bad("offset", offset as u64);
        }
        if len > tree.max_value() || (head.level > 0 && len != CHILD_BYTES) {
            return bad("len", len as u64);
        }
        value_bytes += len;
    }
    let used = count * SLOT_BYTES + value_bytes;
    let capacity = if expect.is_some() { tree.node_capacity() } else { tree.root_capacity(area) };
    if value_bytes > area.len() - heap || used > capacity {
        return bad("value bytes", value_bytes as u64);
    }
    Ok(Node { area, level: head.level, slots, used })
}

/// Checks a root.
pub(super) fn check_root<'a>(root: &'a [u8], tree: &Tree) -> Result<Node<'a>, TreeError> {
    check(root, tree, None)
}

/// Level and count of a root that an operation is working on, unchecked.
pub(super) fn root_head(root: &[u8]) -> Option<(u8, usize)> {
    let (head, _) = NodeHead::ref_from_prefix(root).ok()?;
    Some((head.level, head.count.get().into()))
}

/// Checks a node block.
pub(super) fn check_block<'a>(block: &'a Block, tree: &Tree, expect: Expect) -> Result<Node<'a>, TreeError> {
    let lock = header_of(block).map_or(0, |h| h.lock.get());
    if lock != lock_of_inode(tree.owner).0 {
        return Err(TreeError::Damaged { owner: tree.owner, at: expect.at, field: "lock", value: lock });
    }
    check(area_of(block), tree, Some(expect))
}
