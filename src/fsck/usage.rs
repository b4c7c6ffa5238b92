//! Which blocks were met to be used: a bitmap per map of the clusters, for those maps that were ever written.
//!
//! Memory: two kilobytes per map, that is per 63 MiB of the volume that was ever used. A round looks at no more
//! than [`MAPS_PER_ROUND`] of them; a larger volume takes more rounds over its trees.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::layout::geometry::{CHUNKS_PER_MAP, GROUP_BLOCKS, Geometry};
use crate::types::BlockNo;

/// Blocks that one map describes.
pub const BLOCKS_PER_MAP: u64 = CHUNKS_PER_MAP * GROUP_BLOCKS;
/// Bitmaps held at once: 128 MiB, four TiB of a volume that is full.
pub const MAPS_PER_ROUND: u64 = 65_536;
const WORDS: usize = (BLOCKS_PER_MAP / 64) as usize;

/// The bits of one map's blocks.
pub type Bits = [u64; WORDS];

/// Which map: cluster and number in it.
pub type MapId = (u64, u64);

/// What became of a claim of some blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Claimed {
    /// Nobody had claimed them before, and a map describes them.
    Fresh,
    /// Claimed already; the first block.
    Twice(BlockNo),
    /// Their map was never written, so it says that they are free.
    Unmapped,
    /// Where no file's blocks can be.
    Outside,
    /// Not in the range of this round.
    Elsewhere,
}

/// The claims of one round.
pub struct Usage {
    geometry: Geometry,
    clusters: Range<u64>,
    maps: BTreeMap<MapId, Option<Box<Bits>>>,
}

impl Usage {
    pub fn new(geometry: Geometry, clusters: Range<u64>) -> Self {
        Usage { geometry, clusters, maps: BTreeMap::new() }
    }

    /// This map was written: claims on its blocks count.
    pub fn expect(&mut self, id: MapId) {
        self.maps.insert(id, None);
    }

    /// Claims what of a run lies in one map, and says how many blocks that were.
    pub fn claim(&mut self, at: BlockNo, blocks: u64) -> (u64, Claimed) {
        let Some(cluster) = self.geometry.cluster_of(at) else { return (1, Claimed::Outside) };
        let offset = at.0 - self.geometry.cluster(cluster).0;
        let (map, first) = (offset / BLOCKS_PER_MAP, offset % BLOCKS_PER_MAP);
        let in_cluster = self.geometry.cluster_len(cluster) - offset;
        let count = blocks.min(BLOCKS_PER_MAP - first).min(in_cluster).max(1);
        if offset < self.geometry.cluster_overhead(cluster) {
            let own = self.geometry.cluster_overhead(cluster) - offset;
            return (count.min(own), Claimed::Outside);
        }
        if !self.clusters.contains(&cluster) {
            return (count, Claimed::Elsewhere);
        }
        let Some(bits) = self.maps.get_mut(&(cluster, map)) else { return (count, Claimed::Unmapped) };
        let bits = bits.get_or_insert_with(|| Box::new([0; WORDS]));
        let mut twice = None;
        let mut bit = first;
        while bit < first + count {
            let in_word = (64 - bit % 64).min(first + count - bit);
            let mask = (u64::MAX >> (64 - in_word)) << (bit % 64);
            if let Some(word) = bits.get_mut((bit / 64) as usize) {
                if *word & mask != 0 && twice.is_none() {
                    let before = u64::from((*word & mask).trailing_zeros());
                    twice = Some(at.plus(bit / 64 * 64 + before - first));
                }
                *word |= mask;
            }
            bit += in_word;
        }
        (count, twice.map_or(Claimed::Fresh, Claimed::Twice))
    }

    /// Hands out the maps of this round with what was claimed in them.
    pub fn take(&mut self) -> BTreeMap<MapId, Option<Box<Bits>>> {
        std::mem::take(&mut self.maps)
    }
}

/// The bits of the sixteen blocks of one chunk.
pub fn chunk_bits(bits: Option<&Bits>, chunk: u64) -> u16 {
    let word = bits.and_then(|b| b.get((chunk / 4) as usize)).copied().unwrap_or(0);
    (word >> (chunk % 4 * 16)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_are_cut_at_maps_and_seen_twice() {
        let geometry = Geometry::plan(1 << 40, None).unwrap();
        let mut usage = Usage::new(geometry, 0..1);
        usage.expect((0, 0));
        usage.expect((0, 1));
        let start = geometry.cluster(0);
        let own = geometry.cluster_overhead(0);
        assert_eq!(usage.claim(start.plus(1), 100), (own.saturating_sub(1).min(100), Claimed::Outside));
        let at = start.plus(BLOCKS_PER_MAP - 70);
        assert_eq!(usage.claim(at, 1000), (70, Claimed::Fresh));
        assert_eq!(usage.claim(start.plus(BLOCKS_PER_MAP), 930), (930, Claimed::Fresh));
        assert_eq!(usage.claim(at.plus(69), 1), (1, Claimed::Twice(at.plus(69))));
        assert_eq!(usage.claim(start.plus(BLOCKS_PER_MAP - 200), 200), (200, Claimed::Twice(at)));
        assert_eq!(usage.claim(start.plus(2 * BLOCKS_PER_MAP), 5), (5, Claimed::Unmapped));
        assert_eq!(usage.claim(geometry.cluster(1).plus(5000), 5).1, Claimed::Elsewhere);
        assert_eq!(usage.claim(BlockNo(3), 5), (1, Claimed::Outside));
        let maps = usage.take();
        let bits = maps[&(0, 0)].as_deref();
        assert_eq!(chunk_bits(bits, CHUNKS_PER_MAP - 1), u16::MAX);
        assert_eq!(chunk_bits(bits, 0), 0);
        assert_eq!(chunk_bits(maps[&(0, 1)].as_deref(), 58), 0b11);
    }
}
