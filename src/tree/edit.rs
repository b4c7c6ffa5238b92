//! Changes of one node: building it, and inserting, removing and altering entries in place.
//!
//! Each function tests again the bounds that it relies on and refuses (`false`) instead of panicking or
//! writing elsewhere: a store may hand out other bytes to change than it gave to check.

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::node::{HEAD_BYTES, MIN_ROOT_BYTES, NodeHead, SLOT_BYTES, SlotDisk};
use super::{BLOCK_AREA_BYTES, Tree};

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

/// Moves the values together at the end. False if they don't fit, which the check has excluded.
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

#[cfg(test)]
mod tests {
    use super::super::node::check_root;
    use super::super::{Tree, TreeError, TreeKind};
    use super::*;
    use crate::types::{InodeNo, VolumeId};

    const TREE: Tree = Tree { volume: VolumeId([0; 16]), owner: InodeNo(0x1122), kind: TreeKind::Extents };

    fn entries(area: &[u8]) -> Result<Vec<(u64, Vec<u8>)>, TreeError> {
        Ok(check_root(area, &TREE)?.entries().map(|(k, v)| (k, v.to_vec())).collect())
    }

    /// The format: whoever changes these bytes changes it.
    #[test]
    fn a_node_lies_on_the_volume_like_this() {
        let mut area = vec![0xee; 3840];
        assert!(build(&mut area, &TREE, 0, &[(1, b"one"), (0x0203, b"")]));
        let mut want = vec![0; 3840];
        want[..16].copy_from_slice(&[0x22, 0x11, 0, 0, 0, 0, 0, 0, 2, 0, 2, 0, 0xfd, 0x0e, 0, 0]);
        want[16..28].copy_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0, 0xfd, 0x0e, 3, 0]);
        want[28..40].copy_from_slice(&[3, 2, 0, 0, 0, 0, 0, 0, 0xfd, 0x0e, 0, 0]);
        want[3837..].copy_from_slice(b"one");
        assert_eq!(area, want);
    }

    #[test]
    fn a_full_node_takes_what_compaction_frees_and_no_byte_more() {
        let mut area = vec![0; 2048];
        assert!(build(&mut area, &TREE, 0, &[]));
        let mut want = Vec::new();
        for key in 0.. {
            if !insert_at(&mut area, key, key as u64, &[key as u8; 100]) {
                break;
            }
            want.push((key as u64, vec![key as u8; 100]));
        }
        assert_eq!(want.len(), (2048 - HEAD_BYTES) / (SLOT_BYTES + 100));
        assert!(remove_at(&mut area, 3));
        want.remove(3);
        assert!(!set_value(&mut area, 0, &[1; 320]));
        assert_eq!(entries(&area).unwrap(), want);
        assert!(set_value(&mut area, 0, &[1; 200]));
        want[0].1 = vec![1; 200];
        assert_eq!(entries(&area).unwrap(), want);
    }

    #[test]
    fn empty_values_survive_their_neighbours() {
        let mut area = vec![0; 2048];
        assert!(build(&mut area, &TREE, 0, &[(1, b"abc")]));
        assert!(insert_at(&mut area, 1, 2, b""));
        assert!(remove_at(&mut area, 0));
        assert!(insert_at(&mut area, 1, 3, b"xyz") && set_value(&mut area, 0, b"now longer"));
        assert_eq!(entries(&area).unwrap(), [(2, b"now longer".to_vec()), (3, b"xyz".to_vec())]);
    }

    #[test]
    fn places_outside_the_node_are_refused() {
        let mut area = vec![0; 2048];
        assert!(build(&mut area, &TREE, 0, &[(1, b"abc")]));
        let before = area.clone();
        assert!(!insert_at(&mut area, 2, 9, b"x") && !remove_at(&mut area, 1));
        assert!(!set_value(&mut area, 1, b"x") && !set_key(&mut area, 1, 9));
        assert_eq!(entries(&area), entries(&before));
        area[12..14].copy_from_slice(&[0xff, 0xff]);
        assert!(!insert_at(&mut area, 0, 0, b"x") && !remove_at(&mut area, 0));
        assert!(!set_value(&mut area, 0, b"x") && !set_key(&mut area, 0, 9));
    }
}
