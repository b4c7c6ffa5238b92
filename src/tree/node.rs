//! One node: a head, slots sorted by key growing up, values growing down from the end.
//!
//! ```text
//! head (16 bytes) | slot slot slot ... -> free <- ... value value value
//! ```
//!
//! [`check`] proves once that every slot points into the value heap, that keys ascend inside their
//! range and that the values fit together; only then does a [`Node`] exist. Changes in place keep that
//! true; they test their own bounds again and refuse instead of panicking.
//!
//! Not for: more than one node; see `read`, `insert`, `remove`.

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{BLOCK_AREA_BYTES, MAX_LEVEL, Tree, TreeError, area_of, root_address};
use crate::layout::geometry::lock_of_inode;
use crate::layout::{Block, header_of};
use crate::types::BlockNo;

/// The longest value. Twelve of them fit a node, so splitting always leaves two nodes that fit.
pub const MAX_VALUE_BYTES: usize = 320;
/// The shortest slice that can be a root: room for a few of the longest values.
pub const MIN_ROOT_BYTES: usize = 2048;

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct NodeHead {
    /*00*/ owner: U64,
    /*08*/ kind: u8,
    /// 0: a leaf.
    /*09*/
    level: u8,
    /*0a*/ count: U16,
    /// Where the lowest value begins, from the start of the head.
    /*0c*/
    heap: U16,
    /*0e*/ reserved: U16,
}
pub(super) const HEAD_BYTES: usize = 16;
const _: () = assert!(size_of::<NodeHead>() == HEAD_BYTES);

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct SlotDisk {
    key: U64,
    offset: U16,
    len: U16,
}
pub(super) const SLOT_BYTES: usize = 12;
const _: () = assert!(size_of::<SlotDisk>() == SLOT_BYTES);

/// Bytes of an internal node's value: the child's address.
pub(super) const CHILD_BYTES: usize = 8;
/// Bytes for slots and values in a node block.
pub(super) const BLOCK_CAPACITY: usize = BLOCK_AREA_BYTES - HEAD_BYTES;

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
        if len > MAX_VALUE_BYTES || (head.level > 0 && len != CHILD_BYTES) {
            return bad("len", len as u64);
        }
        value_bytes += len;
    }
    if value_bytes > area.len() - heap {
        return bad("value bytes", value_bytes as u64);
    }
    Ok(Node { area, level: head.level, slots, used: count * SLOT_BYTES + value_bytes })
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

/// Bytes for slots and values in a node of that many bytes.
pub(super) fn capacity(area: &[u8]) -> usize {
    area.len().saturating_sub(HEAD_BYTES)
}

/// Writes a node with these entries; old bytes are cleared. False, and an unusable node, if they don't fit.
#[must_use]
pub(super) fn build(area: &mut [u8], tree: &Tree, level: u8, entries: &[(u64, &[u8])]) -> bool {
    if area.len() < MIN_ROOT_BYTES || area.len() > BLOCK_AREA_BYTES {
        return false;
    }
    area.fill(0);
    let mut heap = area.len();
    for (i, (key, value)) in entries.iter().enumerate() {
        let from = HEAD_BYTES + i * SLOT_BYTES;
        let Some(start) = heap.checked_sub(value.len()).filter(|s| *s >= from + SLOT_BYTES) else {
            return false;
        };
        area[start..heap].copy_from_slice(value);
        heap = start;
        write_slot(area, i, *key, heap, value.len());
    }
    let head = NodeHead {
        owner: U64::new(tree.owner.0),
        kind: tree.kind.code(),
        level,
        count: U16::new(entries.len() as u16),
        heap: U16::new(heap as u16),
        reserved: U16::ZERO,
    };
    area[..HEAD_BYTES].copy_from_slice(head.as_bytes());
    true
}

/// Callers have tested that the slot lies inside.
fn write_slot(area: &mut [u8], index: usize, key: u64, offset: usize, len: usize) {
    let slot = SlotDisk { key: U64::new(key), offset: U16::new(offset as u16), len: U16::new(len as u16) };
    let from = HEAD_BYTES + index * SLOT_BYTES;
    area[from..from + SLOT_BYTES].copy_from_slice(slot.as_bytes());
}

/// Number of slots and start of the heap, if they are possible.
fn bounds(area: &[u8]) -> Option<(usize, usize)> {
    let (head, _) = NodeHead::ref_from_prefix(area).ok()?;
    let (count, heap) = (usize::from(head.count.get()), usize::from(head.heap.get()));
    (HEAD_BYTES + count * SLOT_BYTES <= heap && heap <= area.len()).then_some((count, heap))
}

fn set_bounds(area: &mut [u8], count: usize, heap: usize) {
    if let Ok((head, _)) = NodeHead::mut_from_prefix(area) {
        head.count = U16::new(count as u16);
        head.heap = U16::new(heap as u16);
    }
}

fn slot(area: &[u8], index: usize) -> Option<SlotDisk> {
    let from = HEAD_BYTES + index * SLOT_BYTES;
    SlotDisk::read_from_bytes(area.get(from..from + SLOT_BYTES)?).ok()
}

/// Moves the values together at the end. False if they don't fit, which [`check`] has excluded.
#[must_use]
fn compact(area: &mut [u8]) -> bool {
    let Some((count, _)) = bounds(area) else { return false };
    let old = area.to_vec();
    let mut heap = area.len();
    for index in 0..count {
        let Some(slot) = slot(&old, index) else { return false };
        let (offset, len) = (usize::from(slot.offset.get()), usize::from(slot.len.get()));
        let (Some(value), Some(start)) = (old.get(offset..offset + len), heap.checked_sub(len)) else {
            return false;
        };
        if start < HEAD_BYTES + count * SLOT_BYTES {
            return false;
        }
        area[start..heap].copy_from_slice(value);
        heap = start;
        write_slot(area, index, slot.key.get(), heap, len);
    }
    set_bounds(area, count, heap);
    true
}

/// Inserts an entry at `index`; the caller knows that the key belongs there. False, and nothing
/// changed but the order of values, if it doesn't fit.
#[must_use]
pub(super) fn insert_at(area: &mut [u8], index: usize, key: u64, value: &[u8]) -> bool {
    let need = SLOT_BYTES + value.len();
    let room = |area: &[u8]| {
        bounds(area)
            .filter(|(count, heap)| HEAD_BYTES + count * SLOT_BYTES + need <= *heap && index <= *count)
    };
    if room(area).is_none() && !compact(area) {
        return false;
    }
    let Some((count, heap)) = room(area) else { return false };
    let (from, end) = (HEAD_BYTES + index * SLOT_BYTES, HEAD_BYTES + count * SLOT_BYTES);
    let start = heap - value.len();
    area.copy_within(from..end, from + SLOT_BYTES);
    area[start..heap].copy_from_slice(value);
    write_slot(area, index, key, start, value.len());
    set_bounds(area, count + 1, start);
    true
}

/// Takes an entry out. Its value's bytes become free at the next compaction.
#[must_use]
pub(super) fn remove_at(area: &mut [u8], index: usize) -> bool {
    let Some((count, heap)) = bounds(area).filter(|(count, _)| index < *count) else { return false };
    let Some(gone) = slot(area, index) else { return false };
    let (from, end) = (HEAD_BYTES + index * SLOT_BYTES, HEAD_BYTES + count * SLOT_BYTES);
    area.copy_within(from + SLOT_BYTES..end, from);
    // The lowest value can be given back at once: what was appended last is often removed first.
    let lowest = usize::from(gone.offset.get()) == heap && gone.len.get() > 0;
    let heap = match count {
        1 => area.len(),
        _ if lowest => (heap + usize::from(gone.len.get())).min(area.len()),
        _ => heap,
    };
    set_bounds(area, count - 1, heap);
    true
}

/// Gives an entry another value. False, and nothing changed, if it doesn't fit.
#[must_use]
pub(super) fn set_value(area: &mut [u8], index: usize, value: &[u8]) -> bool {
    let Some((count, _)) = bounds(area).filter(|(count, _)| index < *count) else { return false };
    let Some(old) = slot(area, index) else { return false };
    let (key, offset, len) = (old.key.get(), usize::from(old.offset.get()), usize::from(old.len.get()));
    if value.len() <= len {
        let Some(bytes) = area.get_mut(offset..offset + value.len()) else { return false };
        bytes.copy_from_slice(value);
        write_slot(area, index, key, offset, value.len());
        return true;
    }
    let values: usize = (0..count).filter_map(|i| slot(area, i)).map(|s| usize::from(s.len.get())).sum();
    if HEAD_BYTES + count * SLOT_BYTES + values - len + value.len() > area.len() {
        return false;
    }
    remove_at(area, index) && insert_at(area, index, key, value)
}

/// Gives an entry another key; the caller knows that the order stays.
#[must_use]
pub(super) fn set_key(area: &mut [u8], index: usize, key: u64) -> bool {
    let Some(old) = bounds(area).filter(|(count, _)| index < *count).and_then(|_| slot(area, index)) else {
        return false;
    };
    write_slot(area, index, key, old.offset.get().into(), old.len.get().into());
    true
}
