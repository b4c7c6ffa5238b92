//! One extent: its form on the volume, and cutting and joining.

use std::ops::Range;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{MAX_EXTENT_BLOCKS, MAX_FILE_BLOCKS};
use crate::tree::{Tree, TreeError};
use crate::types::BlockNo;

/// An extent's value; its key is the first logical block.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct ExtentDisk {
    /*00*/ physical: U64,
    /*08*/ blocks: U32,
    /*0c*/ flags: U32,
}
const _: () = assert!(size_of::<ExtentDisk>() == 16);

const FLAG_UNWRITTEN: u32 = 1;

/// A run of a file's blocks that lie side by side on the volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    pub logical: u64,
    pub physical: BlockNo,
    pub blocks: u64,
    /// Belongs to the file but reads as zeroes.
    pub unwritten: bool,
}

impl Extent {
    /// The first logical block after it.
    pub fn end(&self) -> u64 {
        self.logical + self.blocks
    }

    /// Where a logical block of it lies.
    pub fn physical_of(&self, logical: u64) -> Option<BlockNo> {
        let offset = logical.checked_sub(self.logical).filter(|o| *o < self.blocks)?;
        Some(self.physical.plus(offset))
    }

    /// The part inside a range of logical blocks; of no blocks if there is none.
    pub fn slice(&self, range: Range<u64>) -> Extent {
        let start = range.start.clamp(self.logical, self.end());
        let end = range.end.clamp(start, self.end());
        let physical = self.physical.plus(start - self.logical);
        Extent { logical: start, physical, blocks: end - start, ..*self }
    }

    /// Can `next` become part of this one?
    pub(super) fn joins(&self, next: &Extent) -> bool {
        self.end() == next.logical
            && self.physical.plus(self.blocks) == next.physical
            && self.unwritten == next.unwritten
            && self.blocks + next.blocks <= MAX_EXTENT_BLOCKS
    }

    /// Is it possible at all, on a volume of that size? Every number is proved small enough to add.
    pub(super) fn check(&self, tree: &Tree, volume_blocks: u64) -> Result<(), TreeError> {
        let bad = |what, value| Err(TreeError::Range { owner: tree.owner, what, value });
        if self.blocks == 0 || self.blocks > MAX_EXTENT_BLOCKS {
            return bad("length of an extent", self.blocks);
        }
        if self.logical > MAX_FILE_BLOCKS - self.blocks {
            return bad("logical block of an extent", self.logical);
        }
        let fits = volume_blocks.checked_sub(self.blocks).is_some_and(|last| self.physical.0 <= last);
        if self.physical.0 == 0 || !fits {
            return bad("physical block of an extent", self.physical.0);
        }
        Ok(())
    }

    pub(super) fn encode(&self) -> ExtentDisk {
        ExtentDisk {
            physical: U64::new(self.physical.0),
            blocks: U32::new(self.blocks as u32),
            flags: U32::new(if self.unwritten { FLAG_UNWRITTEN } else { 0 }),
        }
    }

    pub(super) fn decode(
        tree: &Tree,
        volume_blocks: u64,
        key: u64,
        value: &[u8],
    ) -> Result<Extent, TreeError> {
        let bad = |what| TreeError::Value { owner: tree.owner, key, what };
        let disk = ExtentDisk::ref_from_bytes(value).map_err(|_| bad("not as long as an extent"))?;
        if disk.flags.get() & !FLAG_UNWRITTEN != 0 {
            return Err(bad("unknown flags"));
        }
        let extent = Extent {
            logical: key,
            physical: BlockNo(disk.physical.get()),
            blocks: disk.blocks.get().into(),
            unwritten: disk.flags.get() & FLAG_UNWRITTEN != 0,
        };
        extent.check(tree, volume_blocks).map_err(|_| bad("outside of file or volume"))?;
        Ok(extent)
    }
}
