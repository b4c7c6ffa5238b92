//! Clusters: headers, maps, and whether what belongs to inodes is marked used.
//!
//! A glance at maps uses [`Maps`], which may be old: it only acquits, and what it does not acquit is read again.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::sync::Arc;

use lru::LruCache;
use zerocopy::{FromBytes, IntoBytes};

use super::cases::Case;
use super::ground::{Eyes, Ground};
use super::{Scrub, ScrubError};
use crate::fsck::finding::{Finding, Kind, Place};
use crate::fsck::rules::{Counts, marks_own_free};
use crate::fsck::usage::BLOCKS_PER_MAP;
use crate::layout::cluster::{Chunk, ClusterHeader, ClusterMap};
use crate::layout::geometry::{CHUNKS_PER_MAP, GROUP_BLOCKS};
use crate::layout::lock::LockKind;
use crate::types::{BlockNo, InodeNo};

/// Maps remembered for glances: what 126 GiB of a volume use, in 8 MiB of memory.
pub(super) const MAPS_IN_MEMORY: usize = 2048;

/// Maps as they were once.
pub(super) struct Maps(LruCache<(u64, u64), Arc<ClusterMap>>);

impl Default for Maps {
    fn default() -> Self {
        Maps(LruCache::new(NonZeroUsize::new(MAPS_IN_MEMORY).unwrap_or(NonZeroUsize::MIN)))
    }
}

/// What a run of blocks is, by a map.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Marked {
    Used,
    Free,
    /// Among them are inodes.
    Group,
}

/// Which cluster's map still has to be looked at for a set of runs, and which were.
#[derive(Default)]
pub(super) struct ClustersLooked {
    pub held: Option<u64>,
    pub done: BTreeSet<u64>,
}

impl Ground<'_> {
    fn header(&self, eyes: Eyes<'_>, cluster: u64) -> Result<Box<ClusterHeader>, String> {
        let geometry = self.geometry;
        self.checked(eyes, geometry.cluster(cluster), geometry.cluster_header(cluster), |block| {
            ClusterHeader::parse(block, &geometry, self.id, cluster).map(|h| Box::new(*h))
        })
    }

    fn empty_map(&self, cluster: u64, map: u64) -> ClusterMap {
        ClusterMap::new_empty(&self.geometry, self.id, cluster, map)
    }

    /// A map as it is, or what one that was never written means.
    fn map_of(&self, eyes: Eyes<'_>, header: &ClusterHeader, map: u64) -> Result<Arc<ClusterMap>, String> {
        let cluster = header.index.get();
        if header.summaries.get(map as usize).is_none_or(|s| s.written == 0) {
            return Ok(Arc::new(self.empty_map(cluster, map)));
        }
        let at = self.geometry.cluster_map(cluster, map);
        self.checked(eyes, self.geometry.cluster(cluster), at, |block| {
            ClusterMap::parse(block, self.id, at)?;
            let copy = ClusterMap::read_from_bytes(block.as_bytes());
            Ok(Arc::new(copy.unwrap_or_else(|_| self.empty_map(cluster, map))))
        })
    }

    /// The map that has this block, its chunk and its place in there.
    fn chunk_at(&self, eyes: Eyes<'_>, at: BlockNo) -> Option<Chunk> {
        let cluster = self.geometry.cluster_of(at)?;
        let offset = at.0 - self.geometry.cluster(cluster).0;
        let header = self.header(eyes, cluster).ok()?;
        let map = self.map_of(eyes, &header, offset / BLOCKS_PER_MAP).ok()?;
        map.chunks.get((offset % BLOCKS_PER_MAP / GROUP_BLOCKS) as usize).copied()
    }

    /// By its cluster's lock: is the inode in a group, and is it marked used? None: that can't be read.
    pub fn inode_mark(&self, eyes: Eyes<'_>, ino: InodeNo) -> Option<(bool, bool)> {
        let chunk = self.chunk_at(eyes, ino.body())?;
        let bit = (ino.0 % GROUP_BLOCKS).wrapping_sub(GROUP_BLOCKS / 2);
        Some((chunk.group == 1, bit < 8 && chunk.inodes & 1 << bit != 0))
    }
}

fn marked(map: &ClusterMap, first: u64, blocks: u64) -> Marked {
    let mut all = Marked::Used;
    for chunk in first / GROUP_BLOCKS..=(first + blocks - 1) / GROUP_BLOCKS {
        let Some(this) = map.chunks.get(chunk as usize) else { return Marked::Free };
        if this.group == 1 {
            return Marked::Group;
        }
        let from = first.max(chunk * GROUP_BLOCKS) % GROUP_BLOCKS;
        let until = (first + blocks).min((chunk + 1) * GROUP_BLOCKS) - chunk * GROUP_BLOCKS;
        let mask = (from..until).fold(0u16, |bits, bit| bits | 1 << bit);
        if this.used.get() & mask != mask {
            all = Marked::Free;
        }
    }
    all
}

impl Scrub<'_> {
    /// One cluster and everything whose lock lies in it.
    pub(super) fn cluster_pass(&mut self, cluster: u64) -> Result<(), ScrubError> {
        let geometry = self.ground.geometry;
        self.lock(geometry.cluster(cluster), LockKind::Cluster, None)?;
        let (findings, groups) = self.cluster(Eyes::Glance, cluster);
        if !findings.is_empty() {
            self.suspect(Case::Cluster(cluster));
        }
        for (first, used) in groups {
            self.group(first, Some(used))?;
        }
        self.decide_due()
    }

    /// Header and maps: what is wrong with them, and the groups that they name.
    pub(super) fn cluster(&mut self, eyes: Eyes<'_>, cluster: u64) -> (Vec<Finding>, Vec<(BlockNo, u8)>) {
        let geometry = self.ground.geometry;
        let (mut found, mut groups) = (Vec::new(), Vec::new());
        let header = match self.ground.header(eyes, cluster) {
            Ok(header) => header,
            Err(e) => {
                found.push(Finding::new(Kind::ClusterHeader, Place::Cluster(cluster), e));
                return (found, groups);
            }
        };
        let (mut counts, mut whole) = (Counts::default(), true);
        for map in 0..geometry.cluster_maps(cluster) {
            let place = Place::Map { cluster, map };
            let this = match self.ground.map_of(eyes, &header, map) {
                Ok(this) => this,
                Err(e) => {
                    found.push(Finding::new(Kind::ClusterMap, place, e));
                    whole = false;
                    continue;
                }
            };
            let empty = self.ground.empty_map(cluster, map);
            let before = groups.len();
            for (i, (chunk, empty)) in (0..).zip(this.chunks.iter().zip(&empty.chunks)) {
                if chunk.group == 1 && empty.used.get() == 0 {
                    let offset = (map * CHUNKS_PER_MAP + i) * GROUP_BLOCKS;
                    groups.push((geometry.cluster(cluster).plus(offset), chunk.inodes));
                }
            }
            counts.add(map, &this, (groups.len() - before) as u32, &header);
            if marks_own_free(&this, &empty) {
                let text = "marks the cluster's own blocks as free or as inodes";
                found.push(Finding::new(Kind::ClusterOwn, place, text));
            }
            self.maps.0.put((cluster, map), this);
        }
        found.extend(counts.faults(&header, &geometry, whole));
        (found, groups)
    }

    /// The map that has a block, as it was once; `fresh`: as it lies on the device now.
    fn remembered(&mut self, cluster: u64, map: u64, fresh: bool) -> Option<Arc<ClusterMap>> {
        if !fresh && let Some(known) = self.maps.0.get(&(cluster, map)) {
            return Some(known.clone());
        }
        let header = self.ground.header(Eyes::Glance, cluster).ok()?;
        let this = self.ground.map_of(Eyes::Glance, &header, map).ok()?;
        self.maps.0.put((cluster, map), this.clone());
        Some(this)
    }

    /// Is there an inode group at this place, as far as a glance tells? A group is one for ever.
    pub(super) fn is_group(&mut self, ino: InodeNo) -> bool {
        if self.ground.geometry.is_system_inode(ino) {
            return true;
        }
        let Some(cluster) = self.ground.geometry.cluster_of(ino.body()) else { return false };
        let offset = ino.0 - self.ground.geometry.cluster(cluster).0;
        [false, true].into_iter().any(|fresh| {
            // Where the map can't be read, the inode itself has to tell.
            self.remembered(cluster, offset / BLOCKS_PER_MAP, fresh).is_none_or(|map| {
                let chunk = map.chunks.get((offset % BLOCKS_PER_MAP / GROUP_BLOCKS) as usize);
                chunk.is_some_and(|c| c.group == 1)
            })
        })
    }

    /// Are an inode's blocks marked used? What does not look so is found at once by a glance, and by a look under the
    /// lock of its cluster: if that is not held yet, it is returned, and the same runs are to be asked for again with it.
    pub(super) fn marks(
        &mut self,
        eyes: Eyes<'_>,
        ino: InodeNo,
        runs: &[(BlockNo, u64)],
        looked: &mut ClustersLooked,
        found: &mut Vec<Finding>,
    ) -> Option<u64> {
        let geometry = self.ground.geometry;
        let mut wanted = None;
        for (start, blocks) in runs {
            let (mut at, mut left) = (*start, *blocks);
            while left > 0 {
                let outside = |at: BlockNo| {
                    let text = format!("block {at} can't belong to a file or directory");
                    Finding::new(Kind::Extent, Place::of_inode(ino), text)
                };
                let Some(cluster) = geometry.cluster_of(at) else {
                    if looked.held.is_none() {
                        found.push(outside(at));
                    }
                    break;
                };
                let offset = at.0 - geometry.cluster(cluster).0;
                let (map, first) = (offset / BLOCKS_PER_MAP, offset % BLOCKS_PER_MAP);
                let in_cluster = geometry.cluster_len(cluster) - offset;
                let count = left.min(BLOCKS_PER_MAP - first).min(in_cluster).max(1);
                let own = offset < geometry.cluster_overhead(cluster);
                if own && looked.held.is_none() {
                    found.push(outside(at));
                }
                let acquitted = own
                    || looked.done.contains(&cluster)
                    || [false, true].into_iter().any(|fresh| {
                        let map = self.remembered(cluster, map, fresh);
                        map.is_none_or(|map| marked(&map, first, count) == Marked::Used)
                    });
                let this = match eyes {
                    _ if acquitted => None,
                    Eyes::Look(_) if looked.held != Some(cluster) => {
                        wanted = wanted.or(Some(cluster));
                        None
                    }
                    _ => self
                        .ground
                        .header(eyes, cluster)
                        .and_then(|header| self.ground.map_of(eyes, &header, map))
                        .ok(),
                };
                match this.map(|map| marked(&map, first, count)) {
                    Some(Marked::Free) => {
                        let text = format!("belongs to inode {ino} and is marked free");
                        let place = Place::Blocks { first: at.0, blocks: count };
                        found.push(Finding::new(Kind::BlockFree, place, text));
                    }
                    Some(Marked::Group) => found.push(outside(at)),
                    Some(Marked::Used) | None => {}
                }
                at = at.plus(count);
                left -= count.min(left);
            }
        }
        looked.done.extend(looked.held.take());
        wanted
    }
}
