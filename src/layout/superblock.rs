//! The superblock: identity, geometry, features and terms of a volume.

use thiserror::Error;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::geometry::{Geometry, GeometryError};
use super::slot::Durations;
use super::{Block, FORMAT_VERSION, Header, LayoutError, Magic, checksum, header_of, seal};
use crate::types::{BLOCK_BYTES, BlockNo, VolumeId};

/// Compat: the superblock says what is known of the unit. A program that doesn't know it mounts without reservations, and
/// is refused by a unit whose hosts use them.
pub const COMPAT_UNIT: u64 = 1;
/// Feature bits that this program knows: compat, ro-compat, incompat.
pub const KNOWN_FEATURES: [u64; 3] = [COMPAT_UNIT, 0, 0];
/// Longest label, in bytes.
pub const LABEL_BYTES: usize = 64;
/// The protocol of locks, heartbeats and demand that this program speaks.
pub const PROTOCOL_VERSION: u32 = 1;

/// Longest name of a unit that is kept, in bytes.
pub const UNIT_NAME_BYTES: usize = 64;

/// What mkfs found out of the unit that carries the volume (`device::check`).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CheckedUnit {
    /// The unit's own name (VPD 83h); empty where it has none.
    pub name: String,
    /// When it was checked, seconds since 1970; 0: never.
    pub checked_secs: u64,
    /// Everything that was asked about reservations was good.
    pub proved_reservations: bool,
    /// All hosts mount with reservations. Else none does.
    pub reservations: bool,
}

const PROVED: u8 = 1;
const USED: u8 = 2;

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
    /// Only with [`COMPAT_UNIT`].
    pub unit: CheckedUnit,
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
    /*0e8*/ unit_checked_secs: U64,
    /*0f0*/ unit_flags: u8,
    /*0f1*/ reserved2: [u8; 7],
    /*0f8*/ unit_name: [u8; UNIT_NAME_BYTES],
    /*138*/ reserved: [u8; BLOCK_BYTES - 0x138],
}
const _: () = assert!(size_of::<SuperblockDisk>() == BLOCK_BYTES);

/// As much of `text` as fits, whole characters only.
fn put_text(place: &mut [u8], text: &str) {
    let mut len = text.len().min(place.len());
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    place[..len].copy_from_slice(&text.as_bytes()[..len]);
}

fn text(place: &[u8]) -> String {
    let len = place.iter().position(|b| *b == 0).unwrap_or(place.len());
    String::from_utf8_lossy(&place[..len]).into_owned()
}

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
        put_text(&mut disk.label, &self.label);
        put_text(&mut disk.unit_name, &self.unit.name);
        disk.unit_checked_secs = U64::new(self.unit.checked_secs);
        let flag = |set: bool, bit: u8| if set { bit } else { 0 };
        disk.unit_flags = flag(self.unit.proved_reservations, PROVED) | flag(self.unit.reservations, USED);
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
        let has_unit = features[0] & COMPAT_UNIT != 0;
        if has_unit && disk.unit_flags & !(PROVED | USED) != 0 {
            let value = disk.unit_flags.into();
            return Err(LayoutError::Field { what, at, field: "unit_flags", value }.into());
        }
        let unit = CheckedUnit {
            name: text(&disk.unit_name),
            checked_secs: disk.unit_checked_secs.get(),
            proved_reservations: disk.unit_flags & PROVED != 0,
            reservations: disk.unit_flags & USED != 0,
        };
        Ok(Superblock {
            volume: VolumeId(header.volume),
            label: text(&disk.label),
            geometry,
            features,
            durations,
            hash_seed: disk.hash_seed,
            created_secs: disk.created_secs.get(),
            generation: disk.generation.get(),
            unit: if has_unit { unit } else { CheckedUnit::default() },
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
            features: [COMPAT_UNIT, 0, 0],
            durations: Durations { beat_ms: 1000, lease_ms: 8000, dead_ms: 16000, hold_ms: 0 },
            hash_seed: [4; 16],
            created_secs: 1_700_000_000,
            generation: 1,
            unit: CheckedUnit {
                name: "naa.600140512345678".into(),
                checked_secs: 1_700_000_001,
                proved_reservations: true,
                reservations: false,
            },
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
