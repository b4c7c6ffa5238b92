//! Finding the superblock: the primary, or a copy when the primary is damaged.
//!
//! Where the copies lie follows from the geometry, which stands in the superblock. So when the primary
//! can't be read, the search tries the geometries that mkfs chooses for a device of this size, and then
//! every place where a first cluster can begin; that second search of thousands of reads is made only if
//! block 0 looks like LunFS, or on a small device.
//!
//! A primary of another format version or with unknown features is an answer and not damage: no copy is
//! looked for.

use std::collections::BTreeSet;

use super::InspectError;
use crate::device::{AlignedBuf, BlockDevice};
use crate::layout::geometry::Geometry;
use crate::layout::superblock::{Superblock, SuperblockError};
use crate::layout::{Block, LayoutError, Magic, header_of, zero_block};
use crate::rt;
use crate::types::{BLOCK_BYTES, BLOCK_BYTES_U64, BlockNo, MAX_SLOTS};

/// A valid superblock and where it was found.
#[derive(Clone, Debug)]
pub struct Located {
    pub superblock: Superblock,
    pub at: BlockNo,
    /// Why the primary was not used.
    pub primary_error: Option<SuperblockError>,
}

/// First clusters begin on this boundary, their superblock copies in their third block.
const CLUSTER_ALIGN_BLOCKS: u64 = (1 << 20) / BLOCK_BYTES_U64;
const COPY_IN_CLUSTER: u64 = 2;
/// How far a first cluster can be from the start of a volume that mkfs made: its largest journals for
/// all its slots.
const FIRST_CLUSTER_MAX: u64 = (17 << 30) / BLOCK_BYTES_U64;
/// On such a device the thorough search is quick enough for any block 0.
const SMALL_DEVICE_BYTES: u64 = 1 << 30;
/// A live superblock may be under a write when it is read.
const READS_OF_PRIMARY: u32 = 4;

/// The volume's superblock; an error only if there is neither a good primary nor a good copy.
pub fn locate(dev: &dyn BlockDevice) -> Result<Located, InspectError> {
    let primary = BlockNo(0);
    let mut tries = 1;
    let error = loop {
        let block = read(dev, primary)?;
        match Superblock::decode(&block, primary, true) {
            Ok(superblock) => return Ok(Located { superblock, at: primary, primary_error: None }),
            Err(SuperblockError::Damaged(LayoutError::Checksum { .. })) if tries < READS_OF_PRIMARY => {
                tries += 1;
                rt::sleep(super::REREAD_AFTER);
            }
            Err(error) => break error,
        }
    };
    match error {
        SuperblockError::NotLunfs { .. } | SuperblockError::Damaged(_) | SuperblockError::Geometry { .. } => {
        }
        _ => return Err(error.into()),
    }
    let looks_like_lunfs = !matches!(error, SuperblockError::NotLunfs { .. });
    let small = dev.geometry().size_bytes <= SMALL_DEVICE_BYTES;
    match newest_copy(dev, looks_like_lunfs || small) {
        Some((superblock, at)) => Ok(Located { superblock, at, primary_error: Some(error) }),
        None => Err(error.into()),
    }
}

/// Does block 0 carry the magic of a LunFS superblock, whatever the rest says?
pub fn looks_like_lunfs(dev: &dyn BlockDevice) -> Result<bool, InspectError> {
    let block = read(dev, BlockNo(0))?;
    Ok(header_of(&block[..]).is_some_and(|h| h.magic.get() == Magic::Superblock.value()))
}

fn newest_copy(dev: &dyn BlockDevice, thorough: bool) -> Option<(Superblock, BlockNo)> {
    let size_blocks = dev.geometry().size_bytes / BLOCK_BYTES_U64;
    let mut places = BTreeSet::new();
    for slots in 1..=MAX_SLOTS {
        if let Ok(geometry) = Geometry::plan(dev.geometry().size_bytes, Some(slots)) {
            places.extend(geometry.superblock_copies());
        }
    }
    let mut found = best_of(dev, &places, size_blocks);
    if found.is_none() && thorough {
        let last = size_blocks.min(FIRST_CLUSTER_MAX) / CLUSTER_ALIGN_BLOCKS;
        let all = (0..last).map(|i| BlockNo(i * CLUSTER_ALIGN_BLOCKS + COPY_IN_CLUSTER)).collect();
        found = best_of(dev, &all, size_blocks);
    }
    // One copy tells where the others of this volume lie; one of those may be newer.
    let (first, at) = found?;
    let others = first.geometry.superblock_copies().into_iter().collect();
    let newer = best_of(dev, &others, size_blocks)
        .filter(|(sb, _)| sb.volume == first.volume && sb.generation > first.generation);
    Some(newer.unwrap_or((first, at)))
}

/// The newest of the good copies among `places`. A place that can't be read is passed over: it is
/// only one of many that may hold a copy.
fn best_of(
    dev: &dyn BlockDevice,
    places: &BTreeSet<BlockNo>,
    size_blocks: u64,
) -> Option<(Superblock, BlockNo)> {
    let mut best: Option<(Superblock, BlockNo)> = None;
    for at in places.iter().copied().filter(|at| at.0 < size_blocks) {
        let Ok(block) = read(dev, at) else { continue };
        let Ok(superblock) = Superblock::decode(&block, at, true) else { continue };
        // A copy that its own geometry does not place here is an older volume's.
        if !superblock.geometry.superblock_copies().contains(&at) {
            continue;
        }
        if best.as_ref().is_none_or(|(b, _)| superblock.generation > b.generation) {
            best = Some((superblock, at));
        }
    }
    best
}

fn read(dev: &dyn BlockDevice, at: BlockNo) -> Result<Box<Block>, InspectError> {
    let mut buf = AlignedBuf::zeroed(BLOCK_BYTES);
    dev.read(at.offset_bytes(), &mut buf).map_err(|source| InspectError::Device { at, source })?;
    let mut block = zero_block();
    block.copy_from_slice(&buf);
    Ok(block)
}
