//! What changes by swap: the three records, and images of them as they were read.

use crate::device::AlignedBuf;
use crate::layout::demand::DoorbellRecord;
use crate::layout::fields::Field;
use crate::layout::lock::{LockMode, LockRecord};
use crate::layout::slot::{SlotRecord, SlotState};
use crate::layout::{LayoutError, Nonce};
use crate::rt::Instant;
use crate::types::{BlockNo, Incarnation, Owner, VolumeId};

/// What a swapped block is for; swaps are counted apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BlockKind {
    Lock,
    Heartbeat,
    Doorbell,
}

impl BlockKind {
    pub const ALL: [BlockKind; 3] = [BlockKind::Lock, BlockKind::Heartbeat, BlockKind::Doorbell];

    /// The kind's name in messages.
    pub const fn name(self) -> &'static str {
        match self {
            BlockKind::Lock => "lock",
            BlockKind::Heartbeat => "heartbeat slot",
            BlockKind::Doorbell => "doorbell",
        }
    }
}

/// Place of an image among all images that its block ever had: grows with every swap.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Version {
    /// The life, of a slot; 0 of other blocks.
    pub incarnation: Incarnation,
    pub swaps: u64,
}

/// A record that changes by swap.
pub trait SwapRecord: Clone + PartialEq + std::fmt::Debug {
    const KIND: BlockKind;
    fn address(&self) -> BlockNo;
    fn nonce(&self) -> Nonce;
    fn set_nonce(&mut self, nonce: Nonce);
    fn encode(&self, volume: VolumeId, block: &mut [u8]);
    fn decode(block: &[u8], volume: VolumeId, at: BlockNo) -> Result<Self, LayoutError>;
    fn version(&self) -> Version;
    fn fields(&self) -> Vec<Field>;

    /// Who alone may swap this image, as the image says.
    fn sole_writer(&self) -> Option<Owner> {
        None
    }

    /// Was `ours` on the disk before this later image, as this image alone proves?
    fn proves(&self, _ours: &Self) -> bool {
        false
    }

    /// The slot in it, if it is one.
    fn as_slot(&self) -> Option<&SlotRecord> {
        None
    }

    /// The lock in it, if it is one.
    fn as_lock(&self) -> Option<&LockRecord> {
        None
    }
}

macro_rules! common {
    ($type:ty) => {
        fn address(&self) -> BlockNo {
            self.address
        }
        fn nonce(&self) -> Nonce {
            self.nonce
        }
        fn set_nonce(&mut self, nonce: Nonce) {
            self.nonce = nonce;
        }
        fn encode(&self, volume: VolumeId, block: &mut [u8]) {
            <$type>::encode(self, volume, block);
        }
        fn decode(block: &[u8], volume: VolumeId, at: BlockNo) -> Result<Self, LayoutError> {
            <$type>::decode(block, volume, at)
        }
        fn fields(&self) -> Vec<Field> {
            <$type>::fields(self)
        }
    };
}

impl SwapRecord for LockRecord {
    const KIND: BlockKind = BlockKind::Lock;
    common!(LockRecord);

    fn version(&self) -> Version {
        Version { incarnation: Incarnation(0), swaps: self.swap_counter }
    }

    fn sole_writer(&self) -> Option<Owner> {
        match self.mode {
            LockMode::Exclusive { owner, .. } => Some(owner),
            LockMode::Free | LockMode::Shared => None,
        }
    }

    fn as_lock(&self) -> Option<&LockRecord> {
        Some(self)
    }
}

impl SwapRecord for SlotRecord {
    const KIND: BlockKind = BlockKind::Heartbeat;
    common!(SlotRecord);

    fn version(&self) -> Version {
        Version { incarnation: self.incarnation, swaps: self.beat }
    }

    /// Another host lives in the slot and nothing of ours is outstanding: it left, as we wanted. (Or it was recovered
    /// long after; then nothing is outstanding either.)
    fn proves(&self, ours: &Self) -> bool {
        ours.state == SlotState::Left
            && self.incarnation > ours.incarnation
            && self.settled(ours.incarnation)
            && self.host_uuid != ours.host_uuid
    }

    fn as_slot(&self) -> Option<&SlotRecord> {
        Some(self)
    }
}

impl SwapRecord for DoorbellRecord {
    const KIND: BlockKind = BlockKind::Doorbell;
    common!(DoorbellRecord);

    fn version(&self) -> Version {
        Version { incarnation: Incarnation(0), swaps: self.swap_counter }
    }
}

/// A logical block as it was read, and the record in it.
#[derive(Clone, Debug)]
pub struct Image<R> {
    pub record: R,
    /// When we last knew it to be on the disk.
    pub(super) seen: Instant,
    /// How often the device had been reset before it was read or written: a flush proves only images of the same
    /// count.
    pub(super) resets: u64,
    /// The block without the zeroes at its end: a host remembers an image for each lock it knows.
    bytes: Box<[u8]>,
}

impl<R> Image<R> {
    pub(super) fn new(record: R, block: &[u8], resets: u64) -> Self {
        let len = block.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
        Image { record, seen: Instant::now(), resets, bytes: block[..len].into() }
    }

    /// How often the device had been reset when this was seen.
    pub fn resets(&self) -> u64 {
        self.resets
    }

    /// The whole logical block, fit for I/O.
    pub(super) fn block(&self, logical_bytes: usize) -> AlignedBuf {
        let mut block = AlignedBuf::zeroed(logical_bytes.max(self.bytes.len()));
        block[..self.bytes.len()].copy_from_slice(&self.bytes);
        block
    }

    /// Are they the same bytes?
    pub(super) fn equals(&self, other: &Image<R>) -> bool {
        self.bytes == other.bytes
    }
}
