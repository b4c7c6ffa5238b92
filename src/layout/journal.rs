//! Blocks of a journal: its header, and the descriptors, images and commits of its ring.
//!
//! A transaction is a run of ring blocks: descriptors, each followed by the images it lists, then one
//! commit. The commit carries a checksum over all of them and over the commit before it, so that a
//! transaction is whole or absent and none can be left out in between. Each record names its block, the
//! covering lock and the tenure under which it was made: replay applies it only while the disk shows
//! exactly that tenure.

use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Block, Header, LayoutError, Magic, seal, verify};
use crate::types::{BLOCK_BYTES, BlockNo, Incarnation, Tenure, VolumeId};

/// What replay does with a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RecordKind {
    /// Write the image that follows the descriptor.
    Image,
    /// Forget all earlier records of this block: it was freed.
    Revoke,
}

/// One record of a descriptor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct JournalRecord {
    pub kind: RecordKind,
    pub block: BlockNo,
    pub lock: BlockNo,
    pub tenure: Tenure,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RecordDisk {
    block: U64,
    lock: U64,
    tenure: U64,
    kind: u8,
    reserved: [u8; 7],
}

/// Records that fit into one descriptor.
pub const RECORDS_PER_DESCRIPTOR: usize = 124;

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct DescriptorDisk {
    /*00*/ header: Header,
    /*40*/ incarnation: U64,
    /*48*/ sequence: U64,
    /*50*/ count: U16,
    /*52*/ reserved: [u8; 46],
    /*80*/ records: [RecordDisk; RECORDS_PER_DESCRIPTOR],
}
const _: () = assert!(size_of::<DescriptorDisk>() == BLOCK_BYTES);

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct CommitDisk {
    /*00*/ header: Header,
    /*40*/ incarnation: U64,
    /*48*/ sequence: U64,
    /*50*/ blocks: U32,
    /*54*/ chain: U32,
    /*58*/ net_blocks: I64,
    /*60*/ net_inodes: I64,
    /*68*/ reserved: [u8; BLOCK_BYTES - 0x68],
}
const _: () = assert!(size_of::<CommitDisk>() == BLOCK_BYTES);

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct JournalHeaderDisk {
    /*00*/ header: Header,
    /*40*/ incarnation: U64,
    /*48*/ tail_sequence: U64,
    /*50*/ tail_position: U64,
    /*58*/ chain: U32,
    /*5c*/ reserved0: U32,
    /*60*/ net_blocks: I64,
    /*68*/ net_inodes: I64,
    /*70*/ reserved: [u8; BLOCK_BYTES - 0x70],
}
const _: () = assert!(size_of::<JournalHeaderDisk>() == BLOCK_BYTES);

/// Where the live part of a ring begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct JournalHeader {
    pub incarnation: Incarnation,
    /// Sequence number of the first transaction that may not be in place.
    pub tail_sequence: u64,
    /// Its first ring block, counted from the start of the ring.
    pub tail_position: u64,
    /// Chain value of the commit before it.
    pub chain: u32,
    /// The slot's net allocation after the commit before it.
    pub net_blocks: i64,
    pub net_inodes: i64,
}

/// A descriptor, decoded.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Descriptor {
    pub incarnation: Incarnation,
    pub sequence: u64,
    pub records: Vec<JournalRecord>,
}

/// A commit, decoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Commit {
    pub incarnation: Incarnation,
    pub sequence: u64,
    /// Ring blocks of the transaction, this one included.
    pub blocks: u32,
    /// CRC-32 over the chain value before, then over all blocks of the transaction before this one.
    pub chain: u32,
    /// The slot's net allocation once this transaction is in place.
    pub net_blocks: i64,
    pub net_inodes: i64,
}

impl JournalHeader {
    pub fn encode(&self, volume: VolumeId, at: BlockNo, block: &mut Block) {
        let mut disk = JournalHeaderDisk::new_zeroed();
        disk.header = Header::new(Magic::JournalHeader, volume, at, BlockNo(0));
        disk.incarnation = U64::new(self.incarnation.0);
        disk.tail_sequence = U64::new(self.tail_sequence);
        disk.tail_position = U64::new(self.tail_position);
        disk.chain = U32::new(self.chain);
        disk.net_blocks = I64::new(self.net_blocks);
        disk.net_inodes = I64::new(self.net_inodes);
        block.copy_from_slice(disk.as_bytes());
        seal(&mut block[..]);
    }

    /// `ring_blocks` bounds the tail.
    pub fn decode(
        block: &Block,
        volume: VolumeId,
        at: BlockNo,
        ring_blocks: u64,
    ) -> Result<Self, LayoutError> {
        let what = Magic::JournalHeader.name();
        verify(&block[..], Magic::JournalHeader, volume, at)?;
        let disk =
            JournalHeaderDisk::ref_from_bytes(&block[..]).map_err(|_| LayoutError::Short { what, at })?;
        if disk.tail_position.get() >= ring_blocks {
            let value = disk.tail_position.get();
            return Err(LayoutError::Field { what, at, field: "tail_position", value });
        }
        Ok(JournalHeader {
            incarnation: Incarnation(disk.incarnation.get()),
            tail_sequence: disk.tail_sequence.get(),
            tail_position: disk.tail_position.get(),
            chain: disk.chain.get(),
            net_blocks: disk.net_blocks.get(),
            net_inodes: disk.net_inodes.get(),
        })
    }
}

impl Descriptor {
    /// Records beyond [`RECORDS_PER_DESCRIPTOR`] are left out; the writer splits before.
    pub fn encode(&self, volume: VolumeId, at: BlockNo, block: &mut Block) {
        let mut disk = DescriptorDisk::new_zeroed();
        disk.header = Header::new(Magic::JournalDescriptor, volume, at, BlockNo(0));
        disk.incarnation = U64::new(self.incarnation.0);
        disk.sequence = U64::new(self.sequence);
        disk.count = U16::new(self.records.len().min(RECORDS_PER_DESCRIPTOR) as u16);
        for (to, from) in disk.records.iter_mut().zip(&self.records) {
            *to = RecordDisk {
                block: U64::new(from.block.0),
                lock: U64::new(from.lock.0),
                tenure: U64::new(from.tenure.0),
                kind: match from.kind {
                    RecordKind::Image => 1,
                    RecordKind::Revoke => 2,
                },
                reserved: [0; 7],
            };
        }
        block.copy_from_slice(disk.as_bytes());
        seal(&mut block[..]);
    }

    pub fn decode(block: &Block, volume: VolumeId, at: BlockNo) -> Result<Self, LayoutError> {
        let what = Magic::JournalDescriptor.name();
        verify(&block[..], Magic::JournalDescriptor, volume, at)?;
        let disk = DescriptorDisk::ref_from_bytes(&block[..]).map_err(|_| LayoutError::Short { what, at })?;
        let bad = |field, value| LayoutError::Field { what, at, field, value };
        let used = disk
            .records
            .get(..usize::from(disk.count.get()))
            .ok_or_else(|| bad("count", disk.count.get().into()))?;
        let records = used
            .iter()
            .map(|r| {
                let kind = match r.kind {
                    1 => RecordKind::Image,
                    2 => RecordKind::Revoke,
                    other => return Err(bad("kind", other.into())),
                };
                Ok(JournalRecord {
                    kind,
                    block: BlockNo(r.block.get()),
                    lock: BlockNo(r.lock.get()),
                    tenure: Tenure(r.tenure.get()),
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Descriptor {
            incarnation: Incarnation(disk.incarnation.get()),
            sequence: disk.sequence.get(),
            records,
        })
    }
}

impl Commit {
    pub fn encode(&self, volume: VolumeId, at: BlockNo, block: &mut Block) {
        let mut disk = CommitDisk::new_zeroed();
        disk.header = Header::new(Magic::JournalCommit, volume, at, BlockNo(0));
        disk.incarnation = U64::new(self.incarnation.0);
        disk.sequence = U64::new(self.sequence);
        disk.blocks = U32::new(self.blocks);
        disk.chain = U32::new(self.chain);
        disk.net_blocks = I64::new(self.net_blocks);
        disk.net_inodes = I64::new(self.net_inodes);
        block.copy_from_slice(disk.as_bytes());
        seal(&mut block[..]);
    }

    pub fn decode(block: &Block, volume: VolumeId, at: BlockNo) -> Result<Self, LayoutError> {
        let what = Magic::JournalCommit.name();
        verify(&block[..], Magic::JournalCommit, volume, at)?;
        let disk = CommitDisk::ref_from_bytes(&block[..]).map_err(|_| LayoutError::Short { what, at })?;
        Ok(Commit {
            incarnation: Incarnation(disk.incarnation.get()),
            sequence: disk.sequence.get(),
            blocks: disk.blocks.get(),
            chain: disk.chain.get(),
            net_blocks: disk.net_blocks.get(),
            net_inodes: disk.net_inodes.get(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::zero_block;

    #[test]
    fn round_trips() {
        let volume = VolumeId([6; 16]);
        let at = BlockNo(1000);
        let mut block = zero_block();
        let record = JournalRecord {
            kind: RecordKind::Revoke,
            block: BlockNo(5),
            lock: BlockNo(3),
            tenure: Tenure(8),
        };
        let descriptor = Descriptor {
            incarnation: Incarnation(2),
            sequence: 11,
            records: vec![record; RECORDS_PER_DESCRIPTOR],
        };
        descriptor.encode(volume, at, &mut block);
        assert_eq!(Descriptor::decode(&block, volume, at), Ok(descriptor));
        let commit = Commit {
            incarnation: Incarnation(2),
            sequence: 11,
            blocks: 9,
            chain: 77,
            net_blocks: -3,
            net_inodes: 4,
        };
        commit.encode(volume, at, &mut block);
        assert_eq!(Commit::decode(&block, volume, at), Ok(commit));
        let header = JournalHeader {
            incarnation: Incarnation(2),
            tail_sequence: 11,
            tail_position: 5,
            chain: 1,
            net_blocks: 7,
            net_inodes: -2,
        };
        header.encode(volume, at, &mut block);
        assert_eq!(JournalHeader::decode(&block, volume, at, 6), Ok(header));
        assert!(JournalHeader::decode(&block, volume, at, 5).is_err());
    }
}
