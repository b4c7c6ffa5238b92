//! The second pass: clusters, their headers and maps; and at the end of each round the maps once more, against
//! what was met.

use std::ops::Range;

use super::finding::{Kind, Place};
use super::rules::{Counts, marks_own_free};
use super::usage::{BLOCKS_PER_MAP, MapId, Met};
use super::{Checker, FsckError};
use crate::layout::cluster::{ClusterHeader, ClusterMap};
use crate::layout::geometry::{CHUNKS_PER_MAP, GROUP_BLOCKS};
use crate::layout::lock::LockKind;
use crate::types::BlockNo;

const PASS: &str = "clusters";
/// 1 MiB.
const MAPS_PER_READ: usize = 256;

/// The most inode groups whose inodes can be numbered.
const MOST_GROUPS: usize = (u32::MAX / 8) as usize;

impl Checker<'_, '_, '_> {
    /// Reads all headers and maps, and notes the inode groups.
    pub(super) fn clusters(&mut self) -> Result<(), FsckError> {
        self.system_groups();
        let clusters = self.geometry.clusters();
        for cluster in 0..clusters {
            self.progress(PASS, cluster, clusters)?;
            self.cluster(cluster);
        }
        match self.inodes.groups() {
            groups if groups > MOST_GROUPS => Err(FsckError::TooManyInodes(groups)),
            _ => Ok(()),
        }
    }

    /// The root and the orphan directories: in use, and in no map.
    fn system_groups(&mut self) {
        for group in 0..self.geometry.system_groups() {
            let used = (1 + u64::from(self.geometry.slots)).saturating_sub(group * 8).min(8);
            self.inodes.add_group(self.geometry.system_group(group), ((1u16 << used) - 1) as u8);
        }
    }

    fn header(&self, cluster: u64) -> Result<Box<ClusterHeader>, String> {
        self.checked(self.geometry.cluster_header(cluster), |block| {
            ClusterHeader::parse(block, &self.geometry, self.volume, cluster).map(|h| Box::new(*h))
        })
    }

    /// Maps of a cluster that were written, ascending: those side by side are read together. On a large volume
    /// they are a million blocks.
    fn maps(&self, cluster: u64, maps: &[u64]) -> Vec<(u64, Result<Box<ClusterMap>, String>)> {
        let mut read = Vec::with_capacity(maps.len());
        for run in maps.chunk_by(|a, b| a + 1 == *b).flat_map(|run| run.chunks(MAPS_PER_READ)) {
            let Some(first) = run.first() else { continue };
            let blocks = self.view.blocks(self.geometry.cluster_map(cluster, *first), run.len() as u64);
            for (map, block) in run.iter().zip(blocks) {
                let at = self.geometry.cluster_map(cluster, *map);
                let parsed = block.map_err(|e| e.to_string()).and_then(|block| {
                    let map = ClusterMap::parse(&block, self.volume, at).map_err(|e| e.to_string())?;
                    Ok(Box::new(*map))
                });
                read.push((*map, parsed));
            }
        }
        read
    }

    fn cluster(&mut self, cluster: u64) {
        self.lock(self.geometry.cluster(cluster), LockKind::Cluster);
        let header = match self.header(cluster) {
            Ok(header) => header,
            Err(e) => {
                self.find(Kind::ClusterHeader, Place::Cluster(cluster), e);
                self.unknown_clusters.insert(cluster);
                (self.owners_unknown, self.names_unknown) = (true, true);
                return;
            }
        };
        let (mut counts, mut whole) = (Counts::default(), true);
        let summaries = || (0..self.geometry.cluster_maps(cluster)).zip(&header.summaries);
        let written: Vec<u64> = summaries().filter(|(_, s)| s.written != 0).map(|(map, _)| map).collect();
        let mut read = self.maps(cluster, &written).into_iter().peekable();
        for (map, summary) in summaries() {
            let id = (cluster, map);
            let this = match read.next_if(|(number, _)| *number == map) {
                // One that was never written means: all free but for what is not the files'.
                None => Box::new(ClusterMap::new_empty(&self.geometry, self.volume, cluster, map)),
                Some((_, Ok(this))) => this,
                Some((_, Err(e))) => {
                    self.find(Kind::ClusterMap, Place::Map { cluster, map }, e);
                    self.unknown_maps.insert(id);
                    (self.owners_unknown, self.names_unknown) = (true, true);
                    whole = false;
                    continue;
                }
            };
            if summary.written != 0 {
                self.usage.expect(id);
            }
            let groups = self.look_through(id, &this);
            counts.add(map, &this, groups, &header);
        }
        if let Some(wrong) = counts.faults(&header, &self.geometry, whole) {
            self.found(wrong);
        }
    }

    /// Notes what a map says; how many groups it has.
    fn look_through(&mut self, (cluster, map): MapId, this: &ClusterMap) -> u32 {
        let empty = ClusterMap::new_empty(&self.geometry, self.volume, cluster, map);
        let mut groups = 0;
        for (i, (chunk, empty)) in (0..).zip(this.chunks.iter().zip(&empty.chunks)) {
            let (used, overhead) = (chunk.used.get(), empty.used.get());
            self.report.used_blocks += u64::from((used & !overhead).count_ones());
            if chunk.group == 1 && overhead == 0 {
                groups += 1;
                self.report.used_inodes += u64::from(chunk.inodes.count_ones());
                self.inodes.add_group(self.chunk_start((cluster, map), i), chunk.inodes);
            }
        }
        if marks_own_free(this, &empty) {
            let text = "marks the cluster's own blocks as free or as inodes";
            self.find(Kind::ClusterOwn, Place::Map { cluster, map }, text);
        }
        groups
    }

    fn chunk_start(&self, (cluster, map): MapId, chunk: u64) -> BlockNo {
        self.geometry.cluster(cluster).plus((map * CHUNKS_PER_MAP + chunk) * GROUP_BLOCKS)
    }

    /// Tells a later round which maps there are; the first one learned it while they were looked through.
    pub(super) fn expect_maps(&mut self, clusters: Range<u64>) -> Result<(), FsckError> {
        for cluster in clusters {
            let Ok(header) = self.header(cluster) else { continue };
            for (map, summary) in (0..self.geometry.cluster_maps(cluster)).zip(&header.summaries) {
                if summary.written != 0 && !self.unknown_maps.contains(&(cluster, map)) {
                    self.usage.expect((cluster, map));
                }
            }
        }
        Ok(())
    }

    /// What maps mark as used was met, and nothing else.
    pub(super) fn compare_blocks(&mut self) -> Result<(), FsckError> {
        let clusters = self.usage.take();
        let of = clusters.len() as u64;
        for (done, (cluster, met)) in (0..).zip(clusters) {
            self.progress("blocks", done, of)?;
            let counts = |met: &Met| !matches!(met, Met::Unmapped);
            let written: Vec<u64> =
                (0..).zip(&met).filter(|(_, met)| counts(met)).map(|(map, _)| map).collect();
            let maps = self.maps(cluster, &written);
            for ((map, this), met) in maps.into_iter().zip(met.iter().filter(|met| counts(met))) {
                if let Ok(this) = this {
                    self.compare_map((cluster, map), &this, met);
                }
            }
        }
        Ok(())
    }

    fn compare_map(&mut self, id: MapId, this: &ClusterMap, met_in_map: &Met) {
        let empty = ClusterMap::new_empty(&self.geometry, self.volume, id.0, id.1);
        let (mut free, mut lost) = (Run::default(), Run::default());
        for (i, (chunk, empty)) in (0..).zip(this.chunks.iter().zip(&empty.chunks)) {
            let group = chunk.group == 1;
            let used = if group { 0 } else { chunk.used.get() & !empty.used.get() };
            let met = if group { 0 } else { met_in_map.chunk(i) };
            if used == met && free.blocks == 0 && lost.blocks == 0 {
                continue;
            }
            for bit in 0..GROUP_BLOCKS {
                let at = self.chunk_start(id, i).plus(bit);
                let mask = 1u16 << bit;
                if let Some((first, blocks)) = free.next(at, met & !used & mask != 0) {
                    self.marked_free(first, blocks);
                }
                if let Some((first, blocks)) = lost.next(at, used & !met & mask != 0) {
                    self.lost(first, blocks);
                }
            }
        }
        let end = self.chunk_start(id, 0).plus(BLOCKS_PER_MAP);
        if let Some((first, blocks)) = free.next(end, false) {
            self.marked_free(first, blocks);
        }
        if let Some((first, blocks)) = lost.next(end, false) {
            self.lost(first, blocks);
        }
    }

    fn marked_free(&mut self, first: BlockNo, blocks: u64) {
        let place = Place::Blocks { first: first.0, blocks };
        self.find(Kind::BlockFree, place, "belongs to a file or directory and is marked free");
    }

    fn lost(&mut self, first: BlockNo, blocks: u64) {
        if !self.owners_unknown {
            let place = Place::Blocks { first: first.0, blocks };
            self.find(Kind::BlockLost, place, "marked used and belongs to nobody");
        }
    }
}

/// Collects neighbouring blocks.
#[derive(Default)]
struct Run {
    first: BlockNo,
    blocks: u64,
}

impl Run {
    /// The run that ends at this block, if one does.
    fn next(&mut self, at: BlockNo, belongs: bool) -> Option<(BlockNo, u64)> {
        match (belongs, self.blocks) {
            (true, 0) => {
                (self.first, self.blocks) = (at, 1);
                None
            }
            (true, _) => {
                self.blocks += 1;
                None
            }
            (false, 0) => None,
            (false, blocks) => {
                self.blocks = 0;
                Some((self.first, blocks))
            }
        }
    }
}
