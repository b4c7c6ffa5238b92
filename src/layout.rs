//! Bytes on the volume to structures and back. Pure: no I/O, no clock.
//!
//! * Every record and metadata block begins with the same [`Header`]: magic, format version, checksum,
//!   volume id, own address, covering lock, nonce. [`seal`] is called just before a write and
//!   [`verify`] just after a read; nothing is believed that did not pass it. Without the own address a
//!   misdirected write would be believed; without the volume id, remains of an earlier format would.
//! * All numbers are little-endian; structures have no padding (the compiler refuses it) and their sizes
//!   are asserted.
//! * Lock, slot and doorbell records are [`RECORD_BYTES`] long: the first logical block of their 4 KiB
//!   block on any device, so that one format serves 512n, 512e and 4Kn.
//!
//! Not for: deciding what a record means for a host (`lock`, `heartbeat`), or where to read it (`volume`).

pub mod cluster;
pub mod demand;
pub mod fields;
pub mod geometry;
pub mod inode;
pub mod journal;
pub mod lock;
pub mod slot;
pub mod superblock;

use thiserror::Error;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::types::{BLOCK_BYTES, BlockNo, VolumeId};

/// One version of the whole format; raised when an old program would misread a new volume in a way
/// that feature bits can't tell.
pub const FORMAT_VERSION: u16 = 1;
/// Length of records that change by compare-and-write.
pub const RECORD_BYTES: usize = 512;

/// A 4 KiB metadata block in memory.
pub type Block = [u8; BLOCK_BYTES];

/// Four letters that say what a block is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Magic {
    Superblock,
    Lock,
    Slot,
    Doorbell,
    Request,
    ClusterHeader,
    ClusterMap,
    Inode,
    TreeNode,
    JournalHeader,
    JournalDescriptor,
    JournalCommit,
}

impl Magic {
    pub const fn value(self) -> u32 {
        u32::from_le_bytes(match self {
            Magic::Superblock => *b"LnSB",
            Magic::Lock => *b"LnLK",
            Magic::Slot => *b"LnHB",
            Magic::Doorbell => *b"LnDB",
            Magic::Request => *b"LnRQ",
            Magic::ClusterHeader => *b"LnCH",
            Magic::ClusterMap => *b"LnCM",
            Magic::Inode => *b"LnIN",
            Magic::TreeNode => *b"LnTN",
            Magic::JournalHeader => *b"LnJH",
            Magic::JournalDescriptor => *b"LnJD",
            Magic::JournalCommit => *b"LnJC",
        })
    }

    /// The structure's name in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Magic::Superblock => "superblock",
            Magic::Lock => "lock",
            Magic::Slot => "heartbeat slot",
            Magic::Doorbell => "doorbell",
            Magic::Request => "request block",
            Magic::ClusterHeader => "cluster header",
            Magic::ClusterMap => "cluster map",
            Magic::Inode => "inode",
            Magic::TreeNode => "tree node",
            Magic::JournalHeader => "journal header",
            Magic::JournalDescriptor => "journal descriptor",
            Magic::JournalCommit => "journal commit",
        }
    }
}

/// What begins every record and metadata block.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Debug)]
#[repr(C)]
pub struct Header {
    /*00*/ pub magic: U32,
    /*04*/ pub version: U16,
    /*06*/ pub reserved0: U16,
    /*08*/ pub crc: U32,
    /*0c*/ pub reserved1: U32,
    /*10*/ pub volume: [u8; 16],
    /*20*/ pub address: U64,
    /// Address of the lock that covers this block; 0 for locks, slots and what mkfs alone writes.
    /*28*/
    pub lock: U64,
    /// Makes every image unique: who wrote it and which of its images this is.
    /*30*/
    pub nonce: [u8; 16],
}

/// Length of [`Header`].
pub const HEADER_BYTES: usize = 64;
const _: () = assert!(size_of::<Header>() == HEADER_BYTES);

impl Header {
    pub fn new(magic: Magic, volume: VolumeId, address: BlockNo, lock: BlockNo) -> Self {
        Header {
            magic: U32::new(magic.value()),
            version: U16::new(FORMAT_VERSION),
            reserved0: U16::ZERO,
            crc: U32::ZERO,
            reserved1: U32::ZERO,
            volume: volume.0,
            address: U64::new(address.0),
            lock: U64::new(lock.0),
            nonce: [0; 16],
        }
    }
}

/// Never repeats on a volume: a random number drawn at mount and a counter.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct Nonce(pub [u8; 16]);

/// What is wrong with bytes read from the volume. Every variant names the block.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum LayoutError {
    #[error("{what} at block {at}: wrong magic {found:#010x}")]
    Magic { what: &'static str, at: BlockNo, found: u32 },
    #[error("{what} at block {at}: format version {found}, this program knows {FORMAT_VERSION}")]
    Version { what: &'static str, at: BlockNo, found: u16 },
    #[error("{what} at block {at}: belongs to another volume ({found})")]
    Volume { what: &'static str, at: BlockNo, found: VolumeId },
    #[error("{what} at block {at}: says that it belongs at block {found}")]
    Address { what: &'static str, at: BlockNo, found: BlockNo },
    #[error("{what} at block {at}: checksum {found:#010x}, computed {computed:#010x}")]
    Checksum { what: &'static str, at: BlockNo, found: u32, computed: u32 },
    #[error("{what} at block {at}: field {field} has the impossible value {value:#x}")]
    Field { what: &'static str, at: BlockNo, field: &'static str, value: u64 },
    #[error("{what} at block {at}: shorter than the structure")]
    Short { what: &'static str, at: BlockNo },
}

/// CRC-32 (IEEE 802.3 polynomial) of `bytes` with the checksum field taken as zero.
pub fn checksum(bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..8]);
    hasher.update(&[0; 4]);
    hasher.update(&bytes[12..]);
    hasher.finalize()
}

/// Puts the checksum into a record or block that begins with a [`Header`]. Call it last before a write.
pub fn seal(bytes: &mut [u8]) {
    let crc = checksum(bytes);
    bytes[8..12].copy_from_slice(&crc.to_le_bytes());
}

/// The header of a block, unchecked.
pub fn header_of(bytes: &[u8]) -> Option<&Header> {
    Header::ref_from_prefix(bytes).ok().map(|(h, _)| h)
}

/// Checks identity first and checksum second, so that the message says what a block is rather than that
/// it differs. `bytes` is exactly what the checksum covers: [`RECORD_BYTES`] or a whole block.
pub fn verify(bytes: &[u8], magic: Magic, volume: VolumeId, at: BlockNo) -> Result<(), LayoutError> {
    let what = magic.name();
    let header = header_of(bytes).ok_or(LayoutError::Short { what, at })?;
    if header.magic.get() != magic.value() {
        return Err(LayoutError::Magic { what, at, found: header.magic.get() });
    }
    if header.version.get() != FORMAT_VERSION {
        return Err(LayoutError::Version { what, at, found: header.version.get() });
    }
    if header.volume != volume.0 {
        return Err(LayoutError::Volume { what, at, found: VolumeId(header.volume) });
    }
    if header.address.get() != at.0 {
        return Err(LayoutError::Address { what, at, found: BlockNo(header.address.get()) });
    }
    let computed = checksum(bytes);
    if header.crc.get() != computed {
        return Err(LayoutError::Checksum { what, at, found: header.crc.get(), computed });
    }
    Ok(())
}

/// A zeroed block on the heap.
pub fn zero_block() -> Box<Block> {
    Box::new([0; BLOCK_BYTES])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sealed_block_verifies_and_each_difference_is_named() {
        let volume = VolumeId([7; 16]);
        let at = BlockNo(42);
        let mut block = zero_block();
        let header = Header::new(Magic::Inode, volume, at, BlockNo(34));
        block[..HEADER_BYTES].copy_from_slice(header.as_bytes());
        seal(&mut block[..]);
        assert_eq!(verify(&block[..], Magic::Inode, volume, at), Ok(()));
        assert!(matches!(verify(&block[..], Magic::Lock, volume, at), Err(LayoutError::Magic { .. })));
        assert!(matches!(
            verify(&block[..], Magic::Inode, VolumeId([8; 16]), at),
            Err(LayoutError::Volume { .. })
        ));
        assert!(matches!(
            verify(&block[..], Magic::Inode, volume, BlockNo(43)),
            Err(LayoutError::Address { .. })
        ));
        block[4000] ^= 1;
        assert!(matches!(verify(&block[..], Magic::Inode, volume, at), Err(LayoutError::Checksum { .. })));
    }
}
