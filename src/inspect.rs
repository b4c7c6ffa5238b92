//! Read-only eyes on a volume: from any host, mounted or not, beside hosts that are at work.
//!
//! Invariants
//!
//! 1. **Nothing is ever written.** No function here calls anything of [`BlockDevice`] but `geometry`
//!    and `read`.
//! 2. **No lock is taken**, so every answer may be old or torn. A record that fails its check is read
//!    again ([`Volume::read_checked`]); only the same bad bytes several times in a row are reported, with
//!    the block they stand in. What was read together need not fit together.
//! 3. **Nothing that was read is trusted**: no panic, no unbounded loop, whatever the blocks hold.
//!
//! Not for: mounting (which must hold locks for what it believes), and repair (`fsck`).

pub mod locks;
pub mod names;
pub mod path;
pub mod scan;
pub mod superblock;
pub mod table;
pub mod watch;

use std::time::Duration;

use thiserror::Error;

use crate::device::{AlignedBuf, BlockDevice, DeviceError};
use crate::layout::cluster::{ClusterHeader, ClusterMap};
use crate::layout::demand::{DoorbellRecord, RequestBlock};
use crate::layout::geometry::Geometry;
use crate::layout::inode::InodeDisk;
use crate::layout::lock::LockRecord;
use crate::layout::slot::SlotRecord;
use crate::layout::superblock::{Superblock, SuperblockError};
use crate::layout::{Block, LayoutError, zero_block};
use crate::rt;
use crate::tree::TreeError;
use crate::types::{BLOCK_BYTES, BlockNo, InodeNo, Slot, VolumeId};

/// Why something could not be read. Every variant says where.
#[derive(Clone, Debug, Error)]
pub enum InspectError {
    #[error("block {at} can't be read: {source}")]
    Device { at: BlockNo, source: DeviceError },
    #[error(transparent)]
    Superblock(#[from] SuperblockError),
    /// The same bad bytes came back every time.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Tree(#[from] TreeError),
    #[error("block {at} lies outside the volume")]
    Outside { at: BlockNo },
}

/// Reads of a block that fails its check, before it is reported.
const READS_OF_BAD_BLOCK: u32 = 4;
/// Reads of a block whose bytes keep changing and never pass.
const READS_OF_RESTLESS_BLOCK: u32 = 20;
/// Between two such reads: longer than a 4 KiB write takes.
const REREAD_AFTER: Duration = Duration::from_millis(10);

/// A volume opened for looking at it.
pub struct Volume<'a> {
    dev: &'a dyn BlockDevice,
    pub superblock: Superblock,
    /// The block that the superblock was read from: 0, or a copy's.
    pub superblock_at: BlockNo,
    /// What is wrong with the primary superblock, if a copy had to be used.
    pub primary_error: Option<SuperblockError>,
}

impl<'a> Volume<'a> {
    /// Finds the superblock (see [`superblock::locate`]) and checks that the device holds the volume.
    pub fn open(dev: &'a dyn BlockDevice) -> Result<Self, InspectError> {
        let found = superblock::locate(dev)?;
        found.superblock.check_device_size(dev.geometry().size_bytes)?;
        Ok(Volume {
            dev,
            superblock: found.superblock,
            superblock_at: found.at,
            primary_error: found.primary_error,
        })
    }

    pub fn id(&self) -> VolumeId {
        self.superblock.volume
    }

    pub fn geometry(&self) -> &Geometry {
        &self.superblock.geometry
    }

    /// Bytes of consecutive blocks, unchecked.
    pub fn read_run(&self, at: BlockNo, blocks: u64) -> Result<AlignedBuf, InspectError> {
        let end = at.0.checked_add(blocks).filter(|end| *end <= self.geometry().size_blocks);
        if end.is_none() {
            return Err(InspectError::Outside { at });
        }
        let mut buf = AlignedBuf::zeroed(blocks as usize * BLOCK_BYTES);
        self.dev.read(at.offset_bytes(), &mut buf).map_err(|source| InspectError::Device { at, source })?;
        Ok(buf)
    }

    /// Reads block `at` until `decode` accepts it, or until it is certain that it won't.
    pub fn read_checked<T>(
        &self,
        at: BlockNo,
        decode: impl Fn(&Block) -> Result<T, LayoutError>,
    ) -> Result<T, InspectError> {
        let mut before = None;
        let mut same = 1;
        for _ in 0..READS_OF_RESTLESS_BLOCK {
            let mut block = zero_block();
            block.copy_from_slice(&self.read_run(at, 1)?);
            let error = match decode(&block) {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            match &before {
                Some((old, _)) if *old == block => same += 1,
                _ => same = 1,
            }
            if same == READS_OF_BAD_BLOCK {
                return Err(error.into());
            }
            before = Some((block, error));
            rt::sleep(REREAD_AFTER);
        }
        match before {
            Some((_, error)) => Err(error.into()),
            None => Err(InspectError::Outside { at }),
        }
    }

    pub fn slot(&self, slot: Slot) -> Result<SlotRecord, InspectError> {
        let at = self.geometry().slot(slot);
        self.read_checked(at, |block| SlotRecord::decode(block, self.id(), at))
    }

    pub fn doorbell(&self, slot: Slot) -> Result<DoorbellRecord, InspectError> {
        let at = self.geometry().doorbell(slot);
        self.read_checked(at, |block| DoorbellRecord::decode(block, self.id(), at))
    }

    pub fn requests(&self, slot: Slot) -> Result<RequestBlock, InspectError> {
        let at = self.geometry().request(slot);
        self.read_checked(at, |block| RequestBlock::decode(block, self.id(), at))
    }

    pub fn lock(&self, at: BlockNo) -> Result<LockRecord, InspectError> {
        self.read_checked(at, |block| LockRecord::decode(block, self.id(), at))
    }

    /// The body of an inode; its content may be older than what its lock's holder sees.
    pub fn inode(&self, ino: InodeNo) -> Result<Box<Block>, InspectError> {
        self.read_checked(ino.body(), |block| {
            InodeDisk::parse(block, self.id(), ino)?;
            Ok(Box::new(*block))
        })
    }

    pub fn cluster_header(&self, index: u64) -> Result<ClusterHeader, InspectError> {
        self.read_checked(self.geometry().cluster_header(index), |block| {
            ClusterHeader::parse(block, self.geometry(), self.id(), index).copied()
        })
    }

    pub fn cluster_map(&self, index: u64, map: u64) -> Result<Box<ClusterMap>, InspectError> {
        let at = self.geometry().cluster_map(index, map);
        self.read_checked(at, |block| Ok(Box::new(*ClusterMap::parse(block, self.id(), at)?)))
    }
}
