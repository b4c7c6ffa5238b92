//! Changes of a volume under maintenance: blocks in memory, written out together, through the door.
//!
//! Invariant: blocks are marked used before anything points at them is written, and all of a patch is written
//! before the next one begins; a patch that was not written out whole is found by the next check.
//!
//! Not for: deciding what to change (`repair`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32};

use crate::ats::AtsError;
use crate::device::{AlignedBuf, DeviceError};
use crate::inspect::{InspectError, Volume};
use crate::layout::cluster::{Chunk, ClusterHeader, ClusterMap};
use crate::layout::geometry::{CHUNKS_PER_MAP, GROUP_BLOCKS, GROUP_INODES};
use crate::layout::inode::InodeDisk;
use crate::layout::{Block, LayoutError, Magic, seal, verify, zero_block};
use crate::lease::{Door, IoClass};
use crate::tree::{NodeRead, NodeStore, TreeError};
use crate::types::{BlockNo, InodeNo};

/// Why a repair could not be made. The finding stays.
#[derive(Debug, thiserror::Error)]
pub enum PatchError {
    #[error(transparent)]
    Inspect(#[from] InspectError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Tree(#[from] TreeError),
    #[error(transparent)]
    Ats(AtsError),
    #[error("no free space is left on the volume")]
    NoSpace,
    #[error("{0}")]
    Other(&'static str),
}

pub struct Patch<'p, 'd> {
    pub volume: &'p Volume<'d>,
    door: &'p Door,
    changed: BTreeMap<BlockNo, Box<Block>>,
    /// Clusters whose header has to be counted anew.
    counted: BTreeSet<u64>,
    /// Blocks that trees took from here, less those they gave back.
    pub taken: i64,
    near: u64,
}

impl<'p, 'd> Patch<'p, 'd> {
    pub fn new(volume: &'p Volume<'d>, door: &'p Door) -> Self {
        let (changed, counted) = (BTreeMap::new(), BTreeSet::new());
        Patch { volume, door, changed, counted, taken: 0, near: 0 }
    }

    /// Space is looked for from this block's cluster on.
    pub fn near(&mut self, at: BlockNo) {
        self.near = self.volume.geometry().cluster_of(at).unwrap_or(0);
    }

    /// The block as this patch leaves it.
    pub fn block(&self, at: BlockNo) -> Result<Box<Block>, PatchError> {
        if let Some(block) = self.changed.get(&at) {
            return Ok(block.clone());
        }
        let mut block = zero_block();
        block.copy_from_slice(&self.volume.read_run(at, 1)?);
        Ok(block)
    }

    /// A record, whose checksum covers its first bytes only and is in place.
    pub fn put_record(&mut self, at: BlockNo, block: Box<Block>) {
        self.changed.insert(at, block);
    }

    /// A block, sealed here.
    pub fn put_block(&mut self, at: BlockNo, mut block: Box<Block>) {
        seal(&mut block[..]);
        self.changed.insert(at, block);
    }

    pub fn inode(&self, ino: InodeNo) -> Result<Box<Block>, PatchError> {
        let block = self.block(ino.body())?;
        InodeDisk::parse(&block, self.volume.id(), ino)?;
        Ok(block)
    }

    /// Writes file data at once: nothing points at it yet.
    pub fn copy_data(&self, from: BlockNo, to: BlockNo, blocks: u64) -> Result<(), PatchError> {
        const STEP: u64 = 256;
        let mut done = 0;
        while done < blocks {
            let count = STEP.min(blocks - done);
            let bytes = self.volume.read_run(from.plus(done), count)?;
            self.door.write(IoClass::Data, to.plus(done), &bytes)?;
            done += count;
        }
        Ok(())
    }

    fn header(&self, cluster: u64) -> Result<Box<ClusterHeader>, PatchError> {
        let geometry = self.volume.geometry();
        let block = self.block(geometry.cluster_header(cluster))?;
        Ok(Box::new(*ClusterHeader::parse(&block, geometry, self.volume.id(), cluster)?))
    }

    /// A map as this patch leaves it; one that was never written as what that means.
    pub fn map(&self, cluster: u64, map: u64) -> Result<Box<ClusterMap>, PatchError> {
        let geometry = self.volume.geometry();
        let at = geometry.cluster_map(cluster, map);
        let written = self.header(cluster)?.summaries.get(map as usize).is_some_and(|s| s.written != 0);
        if !written && !self.changed.contains_key(&at) {
            return Ok(Box::new(ClusterMap::new_empty(geometry, self.volume.id(), cluster, map)));
        }
        let block = self.block(at)?;
        Ok(Box::new(*ClusterMap::parse(&block, self.volume.id(), at)?))
    }

    pub fn put_map(&mut self, cluster: u64, map: u64, this: &ClusterMap) {
        let mut block = zero_block();
        block.copy_from_slice(this.as_bytes());
        self.put_block(self.volume.geometry().cluster_map(cluster, map), block);
        self.counted.insert(cluster);
    }

    /// Counts a cluster's header anew, from its maps, when this is written out.
    pub fn recount(&mut self, cluster: u64) {
        self.counted.insert(cluster);
    }

    /// Changes the chunk that has a block.
    fn change_chunk(&mut self, at: BlockNo, change: impl FnOnce(&mut Chunk, u64)) -> Result<(), PatchError> {
        let geometry = *self.volume.geometry();
        let cluster = geometry.cluster_of(at).ok_or(PatchError::Other("no cluster has this block"))?;
        let offset = at.0 - geometry.cluster(cluster).0;
        let (map, chunk) = (offset / GROUP_BLOCKS / CHUNKS_PER_MAP, offset / GROUP_BLOCKS % CHUNKS_PER_MAP);
        let mut this = self.map(cluster, map)?;
        if let Some(chunk) = this.chunks.get_mut(chunk as usize) {
            change(chunk, offset % GROUP_BLOCKS);
        }
        self.put_map(cluster, map, &this);
        Ok(())
    }

    pub fn mark_blocks(&mut self, first: BlockNo, blocks: u64, used: bool) -> Result<(), PatchError> {
        let mut at = first;
        while at.0 < first.0 + blocks {
            let end = (first.0 + blocks).min(at.0 - at.0 % GROUP_BLOCKS + GROUP_BLOCKS);
            let count = end - at.0;
            self.change_chunk(at, |chunk, bit| {
                let mask = ((((1u32 << count) - 1) << bit) & 0xffff) as u16;
                if chunk.group == 0 {
                    let old = chunk.used.get();
                    chunk.used = U16::new(if used { old | mask } else { old & !mask });
                }
            })?;
            at = BlockNo(end);
        }
        Ok(())
    }

    pub fn mark_inode(&mut self, ino: InodeNo, used: bool) -> Result<(), PatchError> {
        self.change_chunk(ino.body(), |chunk, bit| {
            let mask = 1u8 << bit.saturating_sub(GROUP_INODES);
            chunk.inodes = if used { chunk.inodes | mask } else { chunk.inodes & !mask };
        })
    }

    /// A run of free blocks of one chunk or more, now marked used: up to `blocks` of them.
    pub fn take_blocks(&mut self, blocks: u64) -> Result<(BlockNo, u64), PatchError> {
        self.search(|chunk, _| {
            let free = !chunk.used.get();
            let bit = free.trailing_zeros();
            let run = u64::from((free >> bit.min(15)).trailing_ones()).min(blocks);
            (chunk.group == 0 && free != 0).then_some((u64::from(bit), run))
        })
        .and_then(|(at, run)| self.mark_blocks(at, run, true).map(|()| (at, run)))
    }

    /// A free inode of any group, now marked used.
    pub fn take_inode(&mut self) -> Result<InodeNo, PatchError> {
        let (at, _) = self.search(|chunk, _| {
            let bit = u64::from(chunk.inodes.trailing_ones());
            (chunk.group == 1 && bit < GROUP_INODES).then_some((GROUP_INODES + bit, 1))
        })?;
        let ino = InodeNo(at.0);
        self.mark_inode(ino, true)?;
        Ok(ino)
    }

    /// The first chunk that fits, from the near cluster on: the block in it and how many.
    fn search(&self, fits: impl Fn(&Chunk, u64) -> Option<(u64, u64)>) -> Result<(BlockNo, u64), PatchError> {
        let geometry = *self.volume.geometry();
        let clusters = geometry.clusters();
        for cluster in (0..clusters).map(|i| (self.near + i) % clusters) {
            for map in 0..geometry.cluster_maps(cluster) {
                // A map that can't be read gives no space.
                let Ok(this) = self.map(cluster, map) else { continue };
                let found = (0..).zip(&this.chunks).find_map(|(i, chunk)| Some((i, fits(chunk, i)?)));
                if let Some((chunk, (block, count))) = found {
                    let offset: u64 = (map * CHUNKS_PER_MAP + chunk) * GROUP_BLOCKS + block;
                    return Ok((geometry.cluster(cluster).plus(offset), count));
                }
            }
        }
        Err(PatchError::NoSpace)
    }

    fn count(&mut self, cluster: u64) -> Result<(), PatchError> {
        let geometry = *self.volume.geometry();
        let mut header = self.header(cluster)?;
        let (mut free_blocks, mut free_inodes, mut groups) = (0, 0, 0);
        for map in 0..geometry.cluster_maps(cluster) {
            let changed = self.changed.contains_key(&geometry.cluster_map(cluster, map));
            let Some(summary) = header.summaries.get_mut(map as usize) else { continue };
            let Ok(this) = self.map(cluster, map) else {
                // Nothing is taken from a map that can't be read.
                (summary.free_blocks, summary.free_inodes) = (U16::ZERO, U16::ZERO);
                continue;
            };
            summary.written |= u8::from(changed);
            summary.free_blocks = U16::new(this.free_blocks() as u16);
            summary.free_inodes = U16::new(this.free_inodes() as u16);
            free_blocks += this.free_blocks();
            free_inodes += this.free_inodes();
            groups += this.chunks.iter().filter(|c| c.group == 1).count() as u32;
        }
        header.free_blocks = U32::new(free_blocks);
        header.free_inodes = U32::new(free_inodes);
        header.groups = U32::new(groups);
        header.blocks = U32::new(geometry.cluster_len(cluster) as u32);
        let mut block = zero_block();
        block.copy_from_slice(header.as_bytes());
        self.put_block(geometry.cluster_header(cluster), block);
        Ok(())
    }

    /// Writes everything: what marks space first, then what uses it.
    pub fn write_out(mut self) -> Result<(), PatchError> {
        for cluster in std::mem::take(&mut self.counted) {
            self.count(cluster)?;
        }
        let geometry = *self.volume.geometry();
        let marks_space = |at: BlockNo| {
            geometry
                .cluster_of(at)
                .is_some_and(|c| at.0 - geometry.cluster(c).0 < geometry.cluster_overhead(c))
        };
        for marks in [true, false] {
            for (at, block) in self.changed.iter().filter(|(at, _)| marks_space(**at) == marks) {
                self.door.write(IoClass::Metadata, *at, &AlignedBuf::copy_of(&block[..]))?;
            }
            self.door.flush(IoClass::Metadata)?;
        }
        Ok(())
    }
}

impl NodeRead for Patch<'_, '_> {
    type Error = PatchError;
    fn load(&mut self, at: BlockNo) -> Result<Arc<Block>, PatchError> {
        let block = self.block(at)?;
        verify(&block[..], Magic::TreeNode, self.volume.id(), at)?;
        Ok(Arc::from(block))
    }
}

impl NodeStore for Patch<'_, '_> {
    fn modify(&mut self, at: BlockNo, change: &mut dyn FnMut(&mut Block)) -> Result<(), PatchError> {
        let mut block = self.block(at)?;
        change(&mut block);
        self.put_block(at, block);
        Ok(())
    }
    fn put(&mut self, at: BlockNo, block: Box<Block>) -> Result<(), PatchError> {
        self.put_block(at, block);
        Ok(())
    }
    fn allocate(&mut self) -> Result<BlockNo, PatchError> {
        let (at, _) = self.take_blocks(1)?;
        self.taken += 1;
        Ok(at)
    }
    /// It stays marked used: another may own it, too. The next check calls it lost if nobody does.
    fn free(&mut self, _: BlockNo) -> Result<(), PatchError> {
        self.taken -= 1;
        Ok(())
    }
}
