//! Resource clusters: the header with its summaries, and the maps that say what is used.
//!
//! A map describes [`CHUNKS_PER_MAP`] chunks of [`GROUP_BLOCKS`] blocks. A chunk is either a run of
//! blocks, each used or free, or an inode group, each of whose inodes is used or free; once a group it is
//! a group for ever. mkfs writes no maps: the header says which maps were ever written; an unwritten map
//! means "all free" but for the cluster's own overhead.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::geometry::{CHUNKS_PER_MAP, GROUP_BLOCKS, Geometry, MAX_MAPS};
use super::{Block, Header, LayoutError, Magic, verify};
use crate::types::{BLOCK_BYTES, BlockNo, VolumeId};

/// State of one map, kept in the header so that a search reads one block.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct MapSummary {
    pub free_blocks: U16,
    /// Free inodes in the groups of this map.
    pub free_inodes: U16,
    /// 1 when the map block was written.
    pub written: u8,
    pub reserved: [u8; 3],
}

/// The cluster header as it lies on the volume.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ClusterHeader {
    /*000*/ pub header: Header,
    /*040*/ pub index: U64,
    /*048*/ pub blocks: U32,
    /*04c*/ pub maps: U32,
    /*050*/ pub free_blocks: U32,
    /*054*/ pub free_inodes: U32,
    /*058*/ pub groups: U32,
    /*05c*/ pub reserved0: [u8; 36],
    /*080*/ pub summaries: [MapSummary; MAX_MAPS as usize],
    /*c80*/ pub reserved: [u8; BLOCK_BYTES - 0xc80],
}
const _: () = assert!(size_of::<ClusterHeader>() == BLOCK_BYTES);

/// One chunk of a map.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Chunk {
    /// Bit i: block i of the chunk is used. All ones for a group.
    pub used: U16,
    /// Bit i: inode i of the group is used.
    pub inodes: u8,
    /// 0: blocks, 1: an inode group.
    pub group: u8,
}

/// A map block as it lies on the volume.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ClusterMap {
    pub header: Header,
    pub chunks: [Chunk; CHUNKS_PER_MAP as usize],
}
const _: () = assert!(size_of::<ClusterMap>() == BLOCK_BYTES);

impl ClusterHeader {
    /// The header of an empty cluster, as mkfs writes it (not sealed).
    pub fn new_empty(geometry: &Geometry, volume: VolumeId, index: u64) -> Self {
        let mut this = ClusterHeader::new_zeroed();
        let lock = geometry.cluster(index);
        this.header = Header::new(Magic::ClusterHeader, volume, geometry.cluster_header(index), lock);
        this.index = U64::new(index);
        this.blocks = U32::new(geometry.cluster_len(index) as u32);
        this.maps = U32::new(geometry.cluster_maps(index) as u32);
        let mut total = 0;
        for map in 0..geometry.cluster_maps(index) {
            let free = ClusterMap::new_empty(geometry, volume, index, map).free_blocks();
            total += free;
            this.summaries[map as usize].free_blocks = U16::new(free as u16);
        }
        this.free_blocks = U32::new(total);
        this
    }

    /// The header in a block that was verified when it was read, with its numbers checked again, so that
    /// they can be used.
    pub fn parse_cached<'a>(
        block: &'a Block,
        geometry: &Geometry,
        index: u64,
    ) -> Result<&'a Self, LayoutError> {
        let this: &Self = zerocopy::transmute_ref!(block);
        this.check(geometry, index)?;
        Ok(this)
    }

    /// Checks a header just read. Counts are checked against the geometry, so that they can be used.
    pub fn parse<'a>(
        block: &'a Block,
        geometry: &Geometry,
        volume: VolumeId,
        index: u64,
    ) -> Result<&'a Self, LayoutError> {
        let (what, at) = (Magic::ClusterHeader.name(), geometry.cluster_header(index));
        verify(&block[..], Magic::ClusterHeader, volume, at)?;
        let this = Self::ref_from_bytes(&block[..]).map_err(|_| LayoutError::Short { what, at })?;
        this.check(geometry, index)?;
        Ok(this)
    }

    fn check(&self, geometry: &Geometry, index: u64) -> Result<(), LayoutError> {
        let (what, at) = (Magic::ClusterHeader.name(), geometry.cluster_header(index));
        let bad = |field, value| Err(LayoutError::Field { what, at, field, value });
        if self.index.get() != index {
            return bad("index", self.index.get());
        }
        if u64::from(self.blocks.get()) > geometry.cluster_len(index) {
            return bad("blocks", self.blocks.get().into());
        }
        if u64::from(self.maps.get()) != geometry.cluster_maps(index) {
            return bad("maps", self.maps.get().into());
        }
        if self.free_blocks.get() > self.blocks.get() {
            return bad("free_blocks", self.free_blocks.get().into());
        }
        for summary in &self.summaries[..self.maps.get() as usize] {
            if u64::from(summary.free_blocks.get()) > CHUNKS_PER_MAP * GROUP_BLOCKS {
                return bad("summary.free_blocks", summary.free_blocks.get().into());
            }
        }
        Ok(())
    }
}

impl ClusterMap {
    /// Map `map` of a cluster in which nothing is allocated (not sealed).
    pub fn new_empty(geometry: &Geometry, volume: VolumeId, index: u64, map: u64) -> Self {
        let mut this = ClusterMap::new_zeroed();
        let lock = geometry.cluster(index);
        this.header = Header::new(Magic::ClusterMap, volume, geometry.cluster_map(index, map), lock);
        let (len, overhead) = (geometry.cluster_len(index), geometry.cluster_overhead(index));
        for (i, chunk) in this.chunks.iter_mut().enumerate() {
            let first = (map * CHUNKS_PER_MAP + i as u64) * GROUP_BLOCKS;
            // Nearly all chunks; bit by bit it was the longest part of checking a large volume's maps.
            if first >= overhead && first + GROUP_BLOCKS <= len {
                continue;
            }
            let used = (0..GROUP_BLOCKS)
                .filter(|b| first + b < overhead || first + b >= len)
                .fold(0u16, |bits, b| bits | 1 << b);
            chunk.used = U16::new(used);
        }
        this
    }

    /// Checks a map just read.
    pub fn parse(block: &Block, volume: VolumeId, at: BlockNo) -> Result<&Self, LayoutError> {
        let what = Magic::ClusterMap.name();
        verify(&block[..], Magic::ClusterMap, volume, at)?;
        let this = Self::ref_from_bytes(&block[..]).map_err(|_| LayoutError::Short { what, at })?;
        for chunk in &this.chunks {
            let sane = match chunk.group {
                0 => chunk.inodes == 0,
                1 => chunk.used.get() == u16::MAX,
                _ => false,
            };
            if !sane {
                let value = u32::from_le_bytes(chunk.as_bytes().try_into().unwrap_or_default());
                return Err(LayoutError::Field { what, at, field: "chunk", value: value.into() });
            }
        }
        Ok(this)
    }

    pub fn free_blocks(&self) -> u32 {
        self.chunks.iter().map(|c| c.used.get().count_zeros()).sum()
    }

    pub fn free_inodes(&self) -> u32 {
        self.chunks.iter().filter(|c| c.group == 1).map(|c| c.inodes.count_zeros()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{seal, zero_block};

    #[test]
    fn an_empty_cluster_counts_right() {
        for g in [Geometry::tiny(4), Geometry::plan(64 << 40, None).unwrap()] {
            let volume = VolumeId([1; 16]);
            for index in [0, g.clusters() - 1] {
                let header = ClusterHeader::new_empty(&g, volume, index);
                let usable = g.cluster_len(index) - g.cluster_overhead(index);
                assert_eq!(u64::from(header.free_blocks.get()), usable);
                let mut block = zero_block();
                block.copy_from_slice(header.as_bytes());
                seal(&mut block[..]);
                ClusterHeader::parse(&block, &g, volume, index).unwrap();
                block.copy_from_slice(ClusterMap::new_empty(&g, volume, index, 0).as_bytes());
                seal(&mut block[..]);
                ClusterMap::parse(&block, volume, g.cluster_map(index, 0)).unwrap();
            }
        }
    }
}
