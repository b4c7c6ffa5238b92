//! The lock record: the one block that says who holds what it covers.
//!
//! A lock block is for ever: it never becomes anything else, and a free inode keeps its lock with all
//! counters. The counters are what makes cached state provably valid (`change_counter`), replay safe
//! (`tenure`) and images unique (`swap_counter` and nonce).

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Header, LayoutError, Magic, Nonce, RECORD_BYTES, seal, verify};
use crate::types::{BlockNo, Incarnation, MAX_SLOTS, Owner, Slot, SlotSet, Tenure, VolumeId};

/// What a lock covers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LockKind {
    /// Superblock, membership, maintenance.
    Volume,
    /// Moves of directories between parents.
    Rename,
    /// One inode: body, directory and extent-tree blocks, data.
    Inode,
    /// Allocation state of one resource cluster.
    Cluster,
}

/// What the disk says about who holds the lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LockMode {
    /// Nobody, or nobody who has to be asked.
    Free,
    /// The living hosts in `sharers`.
    Shared,
    /// `owner`, since `tenure`.
    Exclusive { owner: Owner, tenure: Tenure },
}

/// A lock record as hosts reason about it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LockRecord {
    pub kind: LockKind,
    pub address: BlockNo,
    pub mode: LockMode,
    /// Slots whose living host shares the lock. Meaningful in mode Shared.
    pub sharers: SlotSet,
    /// Slots whose living host may have the inode open although it does not hold the lock.
    pub openers: SlotSet,
    /// Who else asked, as known to the host that handed the lock over.
    pub waiters: SlotSet,
    /// Next in line for exclusive; or, when its bit is set in `sharers`, the host that was just granted a share.
    pub next: Option<Owner>,
    /// Raised by every swap.
    pub swap_counter: u64,
    /// Raised when what the lock covers changed.
    pub change_counter: u64,
    pub nonce: Nonce,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct LockDisk {
    /*00*/ header: Header,
    /*40*/ kind: u8,
    /*41*/ mode: u8,
    /*42*/ owner_slot: U16,
    /*44*/ next_slot: U16,
    /*46*/ has_next: u8,
    /*47*/ reserved0: u8,
    /*48*/ owner_incarnation: U64,
    /*50*/ next_incarnation: U64,
    /*58*/ tenure: U64,
    /*60*/ swap_counter: U64,
    /*68*/ change_counter: U64,
    /*70*/ sharers: [u8; 32],
    /*90*/ openers: [u8; 32],
    /*b0*/ waiters: [u8; 32],
    /*d0*/ reserved: [u8; 304],
}
const _: () = assert!(size_of::<LockDisk>() == RECORD_BYTES);

impl LockKind {
    fn code(self) -> u8 {
        match self {
            LockKind::Volume => 1,
            LockKind::Rename => 2,
            LockKind::Inode => 3,
            LockKind::Cluster => 4,
        }
    }
    fn from_code(code: u8) -> Option<Self> {
        [LockKind::Volume, LockKind::Rename, LockKind::Inode, LockKind::Cluster]
            .into_iter()
            .find(|k| k.code() == code)
    }
    /// The kind's name in messages.
    pub fn name(self) -> &'static str {
        match self {
            LockKind::Volume => "volume",
            LockKind::Rename => "rename",
            LockKind::Inode => "inode",
            LockKind::Cluster => "cluster",
        }
    }
}

impl LockRecord {
    /// A lock that nobody ever held, as mkfs writes it.
    pub fn new_free(kind: LockKind, address: BlockNo) -> Self {
        LockRecord {
            kind,
            address,
            mode: LockMode::Free,
            sharers: SlotSet::EMPTY,
            openers: SlotSet::EMPTY,
            waiters: SlotSet::EMPTY,
            next: None,
            swap_counter: 0,
            change_counter: 0,
            nonce: Nonce::default(),
        }
    }

    /// A lock of an inode group at its birth: owned by the host that turned free space into the group.
    pub fn new_born(address: BlockNo, owner: Owner, nonce: Nonce) -> Self {
        LockRecord {
            mode: LockMode::Exclusive { owner, tenure: Tenure(1) },
            swap_counter: 1,
            nonce,
            ..Self::new_free(LockKind::Inode, address)
        }
    }

    /// Writes the record into the first [`RECORD_BYTES`] of `block`, sealed; the rest is kept.
    pub fn encode(&self, volume: VolumeId, block: &mut [u8]) {
        let mut header = Header::new(Magic::Lock, volume, self.address, BlockNo(0));
        header.nonce = self.nonce.0;
        let (mode, owner, tenure) = match self.mode {
            LockMode::Free => (0, None, Tenure(0)),
            LockMode::Shared => (1, None, Tenure(0)),
            LockMode::Exclusive { owner, tenure } => (2, Some(owner), tenure),
        };
        let disk = LockDisk {
            header,
            kind: self.kind.code(),
            mode,
            owner_slot: U16::new(owner.map_or(0, |o| o.slot.0)),
            next_slot: U16::new(self.next.map_or(0, |o| o.slot.0)),
            has_next: u8::from(self.next.is_some()),
            reserved0: 0,
            owner_incarnation: U64::new(owner.map_or(0, |o| o.incarnation.0)),
            next_incarnation: U64::new(self.next.map_or(0, |o| o.incarnation.0)),
            tenure: U64::new(tenure.0),
            swap_counter: U64::new(self.swap_counter),
            change_counter: U64::new(self.change_counter),
            sharers: self.sharers.to_bytes(),
            openers: self.openers.to_bytes(),
            waiters: self.waiters.to_bytes(),
            reserved: [0; 304],
        };
        block[..RECORD_BYTES].copy_from_slice(disk.as_bytes());
        seal(&mut block[..RECORD_BYTES]);
    }

    /// Reads and checks the record at the start of `block`.
    pub fn decode(block: &[u8], volume: VolumeId, at: BlockNo) -> Result<Self, LayoutError> {
        let what = Magic::Lock.name();
        let bytes = block.get(..RECORD_BYTES).ok_or(LayoutError::Short { what, at })?;
        verify(bytes, Magic::Lock, volume, at)?;
        let disk = LockDisk::read_from_bytes(bytes).map_err(|_| LayoutError::Short { what, at })?;
        let bad = |field, value| LayoutError::Field { what, at, field, value };
        let owner_of = |slot: U16, incarnation: U64, field| {
            if slot.get() >= MAX_SLOTS {
                return Err(bad(field, slot.get().into()));
            }
            if incarnation.get() == 0 {
                return Err(bad(field, 0));
            }
            Ok(Owner { slot: Slot(slot.get()), incarnation: Incarnation(incarnation.get()) })
        };
        let mode = match disk.mode {
            0 => LockMode::Free,
            1 => LockMode::Shared,
            2 => LockMode::Exclusive {
                owner: owner_of(disk.owner_slot, disk.owner_incarnation, "owner")?,
                tenure: Tenure(disk.tenure.get()),
            },
            other => return Err(bad("mode", other.into())),
        };
        let next = match disk.has_next {
            0 => None,
            1 => Some(owner_of(disk.next_slot, disk.next_incarnation, "next")?),
            other => return Err(bad("has_next", other.into())),
        };
        Ok(LockRecord {
            kind: LockKind::from_code(disk.kind).ok_or_else(|| bad("kind", disk.kind.into()))?,
            address: at,
            mode,
            sharers: SlotSet::from_bytes(disk.sharers),
            openers: SlotSet::from_bytes(disk.openers),
            waiters: SlotSet::from_bytes(disk.waiters),
            next,
            swap_counter: disk.swap_counter.get(),
            change_counter: disk.change_counter.get(),
            nonce: Nonce(disk.header.nonce),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::BLOCK_BYTES;

    #[test]
    fn round_trip_keeps_the_rest_of_the_block() {
        let volume = VolumeId([3; 16]);
        let owner = Owner { slot: Slot(200), incarnation: Incarnation(9) };
        let mut record = LockRecord::new_born(BlockNo(77), owner, Nonce([5; 16]));
        record.openers = SlotSet::of(Slot(255));
        record.next = Some(Owner { slot: Slot(1), incarnation: Incarnation(2) });
        record.change_counter = 12;
        let mut block = [0xeeu8; BLOCK_BYTES];
        record.encode(volume, &mut block);
        assert_eq!(LockRecord::decode(&block, volume, BlockNo(77)), Ok(record));
        assert!(block[RECORD_BYTES..].iter().all(|b| *b == 0xee));
    }
}
