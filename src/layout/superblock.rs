//! The superblock: identity, geometry, features and terms of a volume.

use thiserror::Error;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::geometry::{Geometry, GeometryError};
use super::slot::Durations;
use super::{Block, FORMAT_VERSION, Header, LayoutError, Magic, checksum, header_of, seal};
use crate::types::{BLOCK_BYTES, BlockNo, VolumeId};

/// Feature bits that this program knows: compat, ro-compat, incompat.
pub const KNOWN_FEATURES: [u64; 3] = [0, 0, 0];
/// Longest label, in bytes.
pub const LABEL_BYTES: usize = 64;
/// The protocol of locks, heartbeats and demand that this program speaks.
pub const PROTOCOL_VERSION: u32 = 1;

/// A superblock that passed every check.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Superblock {
    pub volume: VolumeId,
    pub label: String,
    pub geometry: Geometry,
    pub features: [u64; 3],
    pub durations: Durations,
    /// Seeds the hash of directory entries.
    pub hash_seed: [u8; 16],
    /// When mkfs ran, seconds since 1970.
    pub created_secs: u64,
    /// Raised by every change of the superblock; the newest valid copy counts.
    pub generation: u64,
}

/// Why a volume can't be used. One sentence each, for an administrator.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SuperblockError {
    #[error("not a LunFS volume (no LunFS superblock at block {at})")]
    NotLunfs { at: BlockNo },
    #[error("superblock at block {at}: format version {found}, this program knows version {FORMAT_VERSION}")]
    Version { at: BlockNo, found: u16 },
    #[error(
        "superblock at block {at}: unknown feature bits {bits:#x} that forbid {what}; a newer lunfs is needed"
    )]
    Feature { at: BlockNo, bits: u64, what: &'static str },
    #[error("superblock at block {at}: {source}")]
    Geometry { at: BlockNo, source: GeometryError },
    #[error("superblock at block {at}: the volume has {volume_bytes} bytes, the device only {device_bytes}")]
    DeviceTooSmall { at: BlockNo, volume_bytes: u64, device_bytes: u64 },
    #[error(transparent)]
    Damaged(#[from] LayoutError),
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct SuperblockDisk {
    /*000*/ header: Header,
    /*040*/ features: [U64; 3],
    /*058*/ size_blocks: U64,
    /*060*/ journal_blocks: U64,
    /*068*/ cluster_blocks: U64,
    /*070*/ slots: U16,
    /*072*/ reserved0: [u8; 6],
    /*078*/ beat_ms: U32,
    /*07c*/ lease_ms: U32,
    /*080*/ dead_ms: U32,
    /*084*/ reserved1: U32,
    /*088*/ created_secs: U64,
    /*090*/ generation: U64,
    /*098*/ hash_seed: [u8; 16],
    /*0a8*/ label: [u8; LABEL_BYTES],
    /*0e8*/ reserved: [u8; BLOCK_BYTES - 0xe8],
}
const _: () = assert!(size_of::<SuperblockDisk>() == BLOCK_BYTES);

impl Superblock {
    /// The copy that belongs at block `at`, sealed.
    pub fn encode(&self, at: BlockNo, block: &mut Block) {
        let mut disk = SuperblockDisk::new_zeroed();
        disk.header = Header::new(Magic::Superblock, self.volume, at, self.geometry.volume_lock());
        disk.features = self.features.map(U64::new);
        disk.size_blocks = U64::new(self.geometry.size_blocks);
        disk.journal_blocks = U64::new(self.geometry.journal_blocks);
        disk.cluster_blocks = U64::new(self.geometry.cluster_blocks);
        disk.slots = U16::new(self.geometry.slots);
        disk.beat_ms = U32::new(self.durations.beat_ms);
        disk.lease_ms = U32::new(self.durations.lease_ms);
        disk.dead_ms = U32::new(self.durations.dead_ms);
        disk.created_secs = U64::new(self.created_secs);
        disk.generation = U64::new(self.generation);
        disk.hash_seed = self.hash_seed;
        let mut len = self.label.len().min(LABEL_BYTES);
        while !self.label.is_char_boundary(len) {
            len -= 1;
        }
        disk.label[..len].copy_from_slice(&self.label.as_bytes()[..len]);
        block.copy_from_slice(disk.as_bytes());
        seal(&mut block[..]);
    }

    /// Reads and checks the copy at block `at`. Version and identity come first, so that a volume of a
    /// newer program is called that and not damaged. `read_only` lets unknown ro-compat features pass.
    pub fn decode(block: &Block, at: BlockNo, read_only: bool) -> Result<Self, SuperblockError> {
        let what = Magic::Superblock.name();
        let header = header_of(&block[..]).ok_or(LayoutError::Short { what, at })?;
        if header.magic.get() != Magic::Superblock.value() {
            return Err(SuperblockError::NotLunfs { at });
        }
        if header.version.get() != FORMAT_VERSION {
            return Err(SuperblockError::Version { at, found: header.version.get() });
        }
        let computed = checksum(&block[..]);
        if header.crc.get() != computed {
            return Err(LayoutError::Checksum { what, at, found: header.crc.get(), computed }.into());
        }
        if header.address.get() != at.0 {
            return Err(LayoutError::Address { what, at, found: BlockNo(header.address.get()) }.into());
        }
        let disk = SuperblockDisk::ref_from_bytes(&block[..]).map_err(|_| LayoutError::Short { what, at })?;
        let features = disk.features.map(|f| f.get());
        let unknown = |i: usize| features[i] & !KNOWN_FEATURES[i];
        if unknown(2) != 0 {
            return Err(SuperblockError::Feature { at, bits: unknown(2), what: "mounting" });
        }
        if unknown(1) != 0 && !read_only {
            return Err(SuperblockError::Feature { at, bits: unknown(1), what: "writing" });
        }
        let geometry = Geometry {
            size_blocks: disk.size_blocks.get(),
            slots: disk.slots.get(),
            journal_blocks: disk.journal_blocks.get(),
            cluster_blocks: disk.cluster_blocks.get(),
        };
        geometry.check().map_err(|source| SuperblockError::Geometry { at, source })?;
        let durations = Durations {
            beat_ms: disk.beat_ms.get(),
            lease_ms: disk.lease_ms.get(),
            dead_ms: disk.dead_ms.get(),
            hold_ms: 0,
        };
        if durations.beat_ms == 0
            || durations.lease_ms < 2 * durations.beat_ms
            || durations.dead_ms <= durations.lease_ms
        {
            let value = durations.lease_ms.into();
            return Err(LayoutError::Field { what, at, field: "lease_ms", value }.into());
        }
        let label_len = disk.label.iter().position(|b| *b == 0).unwrap_or(LABEL_BYTES);
        Ok(Superblock {
            volume: VolumeId(header.volume),
            label: String::from_utf8_lossy(&disk.label[..label_len]).into_owned(),
            geometry,
            features,
            durations,
            hash_seed: disk.hash_seed,
            created_secs: disk.created_secs.get(),
            generation: disk.generation.get(),
        })
    }

    /// Does the device hold the whole volume?
    pub fn check_device_size(&self, device_bytes: u64) -> Result<(), SuperblockError> {
        let volume_bytes = self.geometry.size_bytes();
        if device_bytes < volume_bytes {
            let at = self.geometry.superblock();
            return Err(SuperblockError::DeviceTooSmall { at, volume_bytes, device_bytes });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::zero_block;

    pub(crate) fn sample() -> Superblock {
        Superblock {
            volume: VolumeId([9; 16]),
            label: "datastore1".into(),
            geometry: Geometry::tiny(4),
            features: [0; 3],
            durations: Durations { beat_ms: 1000, lease_ms: 8000, dead_ms: 16000, hold_ms: 0 },
            hash_seed: [4; 16],
            created_secs: 1_700_000_000,
            generation: 1,
        }
    }

    #[test]
    fn every_kind_of_bad_superblock_is_named() {
        let good = sample();
        let at = BlockNo(0);
        let mut block = zero_block();
        assert_eq!(Superblock::decode(&block, at, false), Err(SuperblockError::NotLunfs { at }));
        good.encode(at, &mut block);
        assert_eq!(Superblock::decode(&block, at, false), Ok(good.clone()));
        assert!(good.check_device_size(good.geometry.size_bytes()).is_ok());
        assert!(good.check_device_size(good.geometry.size_bytes() - 1).is_err());
        let mut torn = block.clone();
        torn[300] = 1;
        assert!(matches!(Superblock::decode(&torn, at, false), Err(SuperblockError::Damaged(_))));
        let mut newer = block.clone();
        newer[4] = 2;
        seal(&mut newer[..]);
        assert!(matches!(
            Superblock::decode(&newer, at, false),
            Err(SuperblockError::Version { found: 2, .. })
        ));
        let mut other = good.clone();
        other.features[2] = 1 << 40;
        other.encode(at, &mut block);
        assert!(matches!(Superblock::decode(&block, at, true), Err(SuperblockError::Feature { .. })));
        other.features = [0, 2, 0];
        other.encode(at, &mut block);
        assert!(matches!(Superblock::decode(&block, at, false), Err(SuperblockError::Feature { .. })));
        assert!(Superblock::decode(&block, at, true).is_ok());
        other = good;
        other.geometry.cluster_blocks = 3;
        other.encode(at, &mut block);
        assert!(matches!(Superblock::decode(&block, at, false), Err(SuperblockError::Geometry { .. })));
    }
}
