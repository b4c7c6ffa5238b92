//! Addresses, numbers and sizes that every room shares, as types of their own, so that a slot can't
//! be passed as a count or a byte offset as a block.

use std::fmt;

/// Size of a LunFS block. All addresses in structures are in units of it, whatever the logical
/// block size of the device is.
pub const BLOCK_BYTES: usize = 4096;
/// [`BLOCK_BYTES`] as the type of offsets.
pub const BLOCK_BYTES_U64: u64 = BLOCK_BYTES as u64;
/// The most heartbeat slots (hosts) a volume can have: the width of the bitmaps in a lock record.
pub const MAX_SLOTS: u16 = 256;

/// Address of a 4 KiB block on the volume. Block 0 holds the superblock, so 0 never names an inode,
/// a lock or a file block.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct BlockNo(pub u64);

impl BlockNo {
    /// Byte offset of the block on the device.
    pub const fn offset_bytes(self) -> u64 {
        self.0 * BLOCK_BYTES_U64
    }
    /// The block `blocks` further on.
    pub const fn plus(self, blocks: u64) -> Self {
        BlockNo(self.0 + blocks)
    }
}

impl fmt::Debug for BlockNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "block {:#x}", self.0)
    }
}

impl fmt::Display for BlockNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Number of an inode: the address of its body.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct InodeNo(pub u64);

impl InodeNo {
    /// The block that holds the inode's body.
    pub const fn body(self) -> BlockNo {
        BlockNo(self.0)
    }
}

impl fmt::Debug for InodeNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "inode {:#x}", self.0)
    }
}

impl fmt::Display for InodeNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A heartbeat slot: a host's place in the heartbeat region and its bit in lock records.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u16);

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slot {}", self.0)
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// One life of a slot: grows by one with each claim, never zero while the slot is claimed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Incarnation(pub u64);

/// Who: a slot in one of its lives.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Owner {
    pub slot: Slot,
    pub incarnation: Incarnation,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slot {} life {}", self.slot.0, self.incarnation.0)
    }
}

/// The swap counter of a lock at the swap that granted it exclusively; names that grant for ever.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Tenure(pub u64);

/// Identity of a volume; bound into every record so that remains of an earlier format are void.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct VolumeId(pub [u8; 16]);

impl fmt::Debug for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", uuid::Uuid::from_bytes(self.0))
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", uuid::Uuid::from_bytes(self.0))
    }
}

/// A set of slots: sharers, openers, waiters, doorbell ringers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct SlotSet(pub [u64; 4]);

impl SlotSet {
    pub const EMPTY: SlotSet = SlotSet([0; 4]);
    /// The set of one slot.
    pub fn of(slot: Slot) -> Self {
        let mut set = Self::EMPTY;
        set.insert(slot);
        set
    }
    pub fn contains(&self, slot: Slot) -> bool {
        let (word, bit) = Self::place(slot);
        self.0[word] & bit != 0
    }
    pub fn insert(&mut self, slot: Slot) {
        let (word, bit) = Self::place(slot);
        self.0[word] |= bit;
    }
    pub fn remove(&mut self, slot: Slot) {
        let (word, bit) = Self::place(slot);
        self.0[word] &= !bit;
    }
    pub fn with(mut self, slot: Slot) -> Self {
        self.insert(slot);
        self
    }
    pub fn without(mut self, slot: Slot) -> Self {
        self.remove(slot);
        self
    }
    pub fn union(mut self, other: SlotSet) -> Self {
        for (a, b) in self.0.iter_mut().zip(other.0) {
            *a |= b;
        }
        self
    }
    pub fn is_empty(&self) -> bool {
        self.0 == [0; 4]
    }
    pub fn len(&self) -> u32 {
        self.0.iter().map(|w| w.count_ones()).sum()
    }
    pub fn iter(&self) -> impl Iterator<Item = Slot> + '_ {
        (0..MAX_SLOTS).map(Slot).filter(|s| self.contains(*s))
    }
    pub fn to_bytes(self) -> [u8; 32] {
        let mut out = [0; 32];
        for (chunk, word) in out.chunks_exact_mut(8).zip(self.0) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        out
    }
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        let mut set = Self::EMPTY;
        for (i, byte) in bytes.iter().enumerate() {
            set.0[i / 8] |= u64::from(*byte) << (8 * (i % 8));
        }
        set
    }
    fn place(slot: Slot) -> (usize, u64) {
        let index = usize::from(slot.0 % MAX_SLOTS);
        (index / 64, 1 << (index % 64))
    }
}

impl fmt::Debug for SlotSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter().map(|s| s.0)).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slot_set_round_trips() {
        let set = SlotSet::of(Slot(0)).with(Slot(63)).with(Slot(64)).with(Slot(255));
        assert_eq!(SlotSet::from_bytes(set.to_bytes()), set);
        assert_eq!(set.iter().map(|s| s.0).collect::<Vec<_>>(), [0, 63, 64, 255]);
        assert_eq!(set.len(), 4);
        assert!(set.without(Slot(0)).without(Slot(63)).without(Slot(64)).without(Slot(255)).is_empty());
    }
}
