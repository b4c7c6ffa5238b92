//! Which blocks were met to be used, for those maps of the clusters that were ever written.
//!
//! Memory: what was met in a map is a list of runs, four bytes each, and becomes a bitmap of two kilobytes where that is
//! less. Files are mostly a few long runs, so a volume of 64 TiB that is full of them takes some tens of MiB. Where
//! everything is in pieces it would be two kilobytes for each 63 MiB of the volume; [`BUDGET_BYTES`] is never
//! passed: the last clusters are let go, and looked at in another round over all trees.
//!
//! Not for: judging what a claim means (`clusters`, and [`super::Checker`]).

use std::collections::BTreeMap;
use std::ops::Range;

use crate::layout::geometry::{CHUNKS_PER_MAP, GROUP_BLOCKS, Geometry};
use crate::types::BlockNo;

/// Blocks that one map describes.
pub const BLOCKS_PER_MAP: u64 = CHUNKS_PER_MAP * GROUP_BLOCKS;
/// What all that was met may take at once.
pub const BUDGET_BYTES: usize = 128 << 20;
const WORDS: usize = (BLOCKS_PER_MAP / 64) as usize;
/// More runs than this take more than a bitmap.
const MOST_RUNS: usize = WORDS * 8 / size_of::<Run>();
/// What an allocation costs beyond what was asked for, at the most.
const ALLOCATION_BYTES: usize = 32;

/// The bits of one map's blocks.
type Bits = [u64; WORDS];

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

/// Blocks of a map that lie side by side and were met; the end is not included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    first: u16,
    end: u16,
}

/// What was met in one map.
pub enum Met {
    /// The map was never written or can't be read: claims don't count.
    Unmapped,
    /// Ascending; none touches the next.
    Runs(Vec<Run>),
    Bits(Box<Bits>),
}

impl Met {
    fn bytes(&self) -> usize {
        match self {
            Met::Unmapped => 0,
            Met::Runs(runs) if runs.capacity() == 0 => 0,
            Met::Runs(runs) => runs.capacity() * size_of::<Run>() + ALLOCATION_BYTES,
            Met::Bits(_) => size_of::<Bits>() + ALLOCATION_BYTES,
        }
    }

    /// Adds blocks; the first that was there before.
    fn add(&mut self, new: Run) -> Option<u16> {
        match self {
            Met::Unmapped => None,
            Met::Bits(bits) => set(bits, new),
            Met::Runs(runs) => {
                let twice = add_run(runs, new);
                if runs.len() > MOST_RUNS {
                    let mut bits = Box::new([0; WORDS]);
                    for run in runs.iter() {
                        set(&mut bits, *run);
                    }
                    *self = Met::Bits(bits);
                }
                twice
            }
        }
    }

    /// The sixteen blocks of one chunk.
    pub fn chunk(&self, chunk: u64) -> u16 {
        match self {
            Met::Unmapped => 0,
            Met::Bits(bits) => {
                let word = bits.get((chunk / 4) as usize).copied().unwrap_or(0);
                (word >> (chunk % 4 * 16)) as u16
            }
            Met::Runs(runs) => {
                let (first, end) = ((chunk * GROUP_BLOCKS) as u16, ((chunk + 1) * GROUP_BLOCKS) as u16);
                let from = runs.partition_point(|run| run.end <= first);
                let here = runs.iter().skip(from).take_while(|run| run.first < end);
                here.fold(0, |bits, run| {
                    let (a, b) = (run.first.max(first) - first, run.end.min(end) - first);
                    bits | (u16::MAX >> (16 - (b - a))) << a
                })
            }
        }
    }
}

fn set(bits: &mut Bits, new: Run) -> Option<u16> {
    let mut twice = None;
    let mut bit = new.first;
    while bit < new.end {
        let in_word = (64 - bit % 64).min(new.end - bit);
        let mask = (u64::MAX >> (64 - in_word)) << (bit % 64);
        if let Some(word) = bits.get_mut(usize::from(bit / 64)) {
            if *word & mask != 0 && twice.is_none() {
                twice = Some(bit / 64 * 64 + (*word & mask).trailing_zeros() as u16);
            }
            *word |= mask;
        }
        bit += in_word;
    }
    twice
}

fn add_run(runs: &mut Vec<Run>, new: Run) -> Option<u16> {
    // Those that touch it become one with it.
    let from = runs.partition_point(|run| run.end < new.first);
    let to = runs.partition_point(|run| run.first <= new.end);
    let touching = runs.get(from..to).unwrap_or_default();
    let overlapping = touching.iter().find(|run| run.first < new.end && new.first < run.end);
    let twice = overlapping.map(|run| run.first.max(new.first));
    let joined = Run {
        first: touching.first().map_or(new.first, |run| run.first.min(new.first)),
        end: touching.last().map_or(new.end, |run| run.end.max(new.end)),
    };
    runs.splice(from..to, [joined]);
    twice
}

/// The claims of one round.
pub struct Usage {
    geometry: Geometry,
    clusters: Range<u64>,
    /// Clusters of which a map was written.
    maps: BTreeMap<u64, Box<[Met]>>,
    bytes: usize,
    budget_bytes: usize,
}

impl Usage {
    pub fn new(geometry: Geometry, clusters: Range<u64>, budget_bytes: usize) -> Self {
        Usage { geometry, clusters, maps: BTreeMap::new(), bytes: 0, budget_bytes }
    }

    /// Which of the clusters asked for are in this round; the others were let go.
    pub fn clusters(&self) -> Range<u64> {
        self.clusters.clone()
    }

    /// This map was written: claims on its blocks count.
    pub fn expect(&mut self, (cluster, map): MapId) {
        if !self.clusters.contains(&cluster) {
            return;
        }
        let maps = self.geometry.cluster_maps(cluster) as usize;
        let of_cluster = self.maps.entry(cluster).or_insert_with(|| {
            self.bytes += maps * size_of::<Met>() + ALLOCATION_BYTES;
            (0..maps).map(|_| Met::Unmapped).collect()
        });
        if let Some(met @ Met::Unmapped) = of_cluster.get_mut(map as usize) {
            *met = Met::Runs(Vec::new());
        }
        self.keep_to_budget();
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
        let met = match self.maps.get_mut(&cluster).and_then(|maps| maps.get_mut(map as usize)) {
            None | Some(Met::Unmapped) => return (count, Claimed::Unmapped),
            Some(met) => met,
        };
        let before = met.bytes();
        let twice = met.add(Run { first: first as u16, end: (first + count) as u16 });
        self.bytes = self.bytes + met.bytes() - before;
        self.keep_to_budget();
        (count, twice.map_or(Claimed::Fresh, |block| Claimed::Twice(at.plus(u64::from(block) - first))))
    }

    /// Lets the last clusters go, so that it need not be done soon again; the first one stays.
    fn keep_to_budget(&mut self) {
        if self.bytes <= self.budget_bytes {
            return;
        }
        while self.bytes > self.budget_bytes / 8 * 7
            && self.maps.len() > 1
            && let Some((cluster, maps)) = self.maps.pop_last()
        {
            self.bytes -= maps.len() * size_of::<Met>() + ALLOCATION_BYTES;
            self.bytes -= maps.iter().map(Met::bytes).sum::<usize>();
            self.clusters.end = cluster;
        }
    }

    /// Hands out the clusters of this round of which a map was written, with what was met in each of their maps.
    pub fn take(&mut self) -> BTreeMap<u64, Box<[Met]>> {
        self.bytes = 0;
        std::mem::take(&mut self.maps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_are_cut_at_maps_and_seen_twice() {
        let geometry = Geometry::plan(1 << 40, None).unwrap();
        let mut usage = Usage::new(geometry, 0..1, BUDGET_BYTES);
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
        let maps = usage.take().remove(&0).unwrap();
        assert!(matches!(maps[2], Met::Unmapped));
        assert_eq!(maps[0].chunk(CHUNKS_PER_MAP - 1), u16::MAX);
        assert_eq!(maps[0].chunk(0), 0);
        assert_eq!(maps[1].chunk(58), 0b11);
    }

    #[test]
    fn runs_and_bits_say_the_same_whatever_comes_in_whatever_order() {
        let mut rng = crate::rt::sim::SimRng::new(7, 0);
        for _ in 0..300 {
            // Few and long, or so many that they become a bitmap.
            let (count, longest) = [(20, 4000), (800, 40), (3000, 3)][rng.below(3) as usize];
            let mut runs = Met::Runs(Vec::new());
            let mut bits = Met::Bits(Box::new([0; WORDS]));
            for _ in 0..count {
                let first = rng.below(BLOCKS_PER_MAP) as u16;
                let end = (u64::from(first) + 1 + rng.below(longest)).min(BLOCKS_PER_MAP) as u16;
                let new = Run { first, end };
                assert_eq!(runs.add(new), bits.add(new));
            }
            for chunk in 0..CHUNKS_PER_MAP {
                assert_eq!(runs.chunk(chunk), bits.chunk(chunk), "chunk {chunk}");
            }
            assert!(runs.bytes() <= 2 * size_of::<Bits>() + ALLOCATION_BYTES);
            if let Met::Runs(runs) = &runs {
                assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].first), "{runs:?}");
            }
        }
    }

    #[test]
    fn clusters_are_let_go_when_the_budget_is_used_up() {
        let geometry = Geometry::plan(1 << 40, None).unwrap();
        let budget = 200 << 10;
        let mut usage = Usage::new(geometry, 0..4, budget);
        let maps = geometry.cluster_maps(0);
        (0..4).for_each(|cluster| (0..maps).for_each(|map| usage.expect((cluster, map))));
        let mut claimed = [0u64; 4];
        // Every second block of each: the most that there can be.
        for offset in (geometry.cluster_overhead(0)..geometry.cluster_len(0)).step_by(2) {
            for cluster in 0..4 {
                match usage.claim(geometry.cluster(cluster).plus(offset), 1).1 {
                    Claimed::Fresh => claimed[cluster as usize] += 1,
                    Claimed::Elsewhere => assert!(!usage.clusters().contains(&cluster)),
                    other => panic!("{other:?}"),
                }
            }
            assert!(usage.bytes <= budget.max(maps as usize * 2200));
        }
        let kept = usage.clusters();
        assert!(kept.start == 0 && (1..4).contains(&kept.end), "{kept:?}");
        let room = geometry.cluster_len(0) - geometry.cluster_overhead(0);
        for cluster in kept {
            assert_eq!(claimed[cluster as usize], room.div_ceil(2));
        }
    }
}
