//! The clusters' side of the audit: headers, maps, inode groups.

use zerocopy::FromBytes;

use super::Auditor;
use crate::layout::cluster::{ClusterHeader, ClusterMap, MapSummary};
use crate::layout::geometry::{CHUNKS_PER_MAP, GROUP_BLOCKS, GROUP_INODES, lock_of_inode};
use crate::layout::inode::{Form, InodeDisk};
use crate::layout::lock::{LockKind, LockRecord};
use crate::types::{BlockNo, InodeNo};

/// Blocks that the maps say are used by files and directories.
pub struct UsedBlocks(Vec<BlockNo>);

impl Auditor<'_> {
    pub(super) fn read_maps(&mut self) -> UsedBlocks {
        let mut used = UsedBlocks(Vec::new());
        for cluster in 0..self.superblock.geometry.clusters() {
            self.read_cluster(cluster, &mut used);
        }
        used
    }

    fn read_cluster(&mut self, cluster: u64, used: &mut UsedBlocks) {
        let (geometry, volume) = (self.superblock.geometry, self.superblock.volume);
        let Some(block) = self.block(geometry.cluster_header(cluster)) else { return };
        let header = match ClusterHeader::parse(&block, &geometry, volume, cluster) {
            Ok(header) => *header,
            Err(e) => return self.problem(e.to_string()),
        };
        let (mut free_blocks, mut free_inodes, mut groups) = (0, 0, 0);
        for map in 0..geometry.cluster_maps(cluster) {
            let summary = header.summaries[map as usize];
            let Some((blocks, inodes, found)) = self.read_map(cluster, map, &summary, used) else { continue };
            free_blocks += blocks;
            free_inodes += inodes;
            groups += found;
        }
        for (what, says, is) in [
            ("free blocks", header.free_blocks.get(), free_blocks),
            ("free inodes", header.free_inodes.get(), free_inodes),
            ("groups", header.groups.get(), groups),
        ] {
            if says != is {
                self.problem(format!("cluster {cluster}: its header counts {says} {what}, its maps {is}"));
            }
        }
    }

    fn read_map(
        &mut self,
        cluster: u64,
        map: u64,
        summary: &MapSummary,
        used: &mut UsedBlocks,
    ) -> Option<(u32, u32, u32)> {
        let (geometry, volume) = (self.superblock.geometry, self.superblock.volume);
        let empty = ClusterMap::new_empty(&geometry, volume, cluster, map);
        let this = if summary.written == 0 {
            empty
        } else {
            let at = geometry.cluster_map(cluster, map);
            let block = self.block(at)?;
            if let Err(e) = ClusterMap::parse(&block, volume, at) {
                self.problem(e.to_string());
                return None;
            }
            ClusterMap::read_from_bytes(&block[..]).ok()?
        };
        let mut groups = 0;
        for (i, (chunk, own)) in this.chunks.iter().zip(&empty.chunks).enumerate() {
            let first = geometry.cluster(cluster).plus((map * CHUNKS_PER_MAP + i as u64) * GROUP_BLOCKS);
            if chunk.used.get() & own.used.get() != own.used.get() {
                self.problem(format!("cluster {cluster}: its own blocks at {first} are marked free"));
            }
            let in_use = chunk.used.get() & !own.used.get();
            self.audit.used_blocks += u64::from(in_use.count_ones());
            if chunk.group == 1 {
                groups += 1;
                self.read_group(first, chunk.inodes);
            } else {
                let bits = (0..GROUP_BLOCKS).filter(|b| in_use & (1 << b) != 0);
                used.0.extend(bits.map(|b| first.plus(b)));
            }
        }
        let (blocks, inodes) = (this.free_blocks(), this.free_inodes());
        if u32::from(summary.free_blocks.get()) != blocks || u32::from(summary.free_inodes.get()) != inodes {
            self.problem(format!(
                "cluster {cluster}, map {map}: its summary counts {} free blocks and {} free inodes, it has {blocks} and {inodes}",
                summary.free_blocks.get(),
                summary.free_inodes.get()
            ));
        }
        Some((blocks, inodes, groups))
    }

    fn read_group(&mut self, first: BlockNo, inodes: u8) {
        for i in 0..GROUP_INODES {
            let ino = InodeNo(first.0 + GROUP_INODES + i);
            let is_used = inodes & (1 << i) != 0;
            if is_used {
                self.used.insert(ino);
                self.audit.used_inodes += 1;
            } else {
                self.free.insert(ino);
            }
            let volume = self.superblock.volume;
            let lock = lock_of_inode(ino);
            if let Some(block) = self.block(lock) {
                match LockRecord::decode(&block[..], volume, lock) {
                    Ok(record) if record.kind == LockKind::Inode => {}
                    Ok(record) => self.problem(format!("the lock of inode {ino} says {:?}", record.kind)),
                    Err(e) => self.problem(e.to_string()),
                }
            }
            let Some(block) = self.block(ino.body()) else { continue };
            match InodeDisk::parse(&block, volume, ino) {
                Ok(body) if (body.form() != Form::Free) != is_used => {
                    let form = body.form();
                    self.problem(format!("inode {ino} is {form:?}, its map says used: {is_used}"));
                }
                Ok(_) => {}
                Err(e) => self.problem(e.to_string()),
            }
        }
    }

    /// Everything used was met, and nothing else.
    pub(super) fn compare(&mut self, used: &UsedBlocks) {
        for at in &used.0 {
            if self.owners.remove(at).is_none() {
                self.problem(format!("block {at} is marked used and belongs to nobody"));
            }
        }
        for (at, owner) in std::mem::take(&mut self.owners) {
            self.problem(format!("block {at} of {owner} is not marked used"));
        }
        for ino in std::mem::take(&mut self.used) {
            if !self.met.contains_key(&ino) {
                self.problem(format!("inode {ino} is marked used and has no name"));
            }
        }
    }
}
