//! The map of the disk: start and size of every region, computed in this one place. Nobody else adds
//! offsets.
//!
//! ```text
//! block 0            superblock
//!       1            volume lock
//!       2            rename lock
//!       16           heartbeat slots, one block each
//!       + slots      doorbells, one block each
//!       + slots      request blocks, one block each
//!       aligned      system inode groups: the root directory and one orphan directory per slot
//!       + ...        journals, one per slot
//!       1 MiB align  clusters
//! ```
//!
//! A cluster begins with its lock, its header, one block reserved for a copy of the superblock and its
//! maps; the rest is allocated in blocks, and in chunks of [`GROUP_BLOCKS`] as inode groups.

use thiserror::Error;

use crate::types::{BLOCK_BYTES_U64, BlockNo, InodeNo, MAX_SLOTS, Slot};

/// Inodes in a group.
pub const GROUP_INODES: u64 = 8;
/// Blocks of a group: the locks of its inodes, then their bodies. Also the chunk of the cluster maps.
pub const GROUP_BLOCKS: u64 = 2 * GROUP_INODES;
/// Chunks that one map block describes.
pub const CHUNKS_PER_MAP: u64 = 1008;
/// Blocks before the maps of a cluster: lock, header, superblock copy.
pub const CLUSTER_HEAD_BLOCKS: u64 = 3;
/// The most maps a cluster can have: what the summaries in its header hold.
pub const MAX_MAPS: u64 = 384;

const VOLUME_LOCK: u64 = 1;
const RENAME_LOCK: u64 = 2;
const SLOTS_START: u64 = 16;
const MIB_BLOCKS: u64 = (1 << 20) / BLOCK_BYTES_U64;
const MIN_CLUSTER_BLOCKS: u64 = MIB_BLOCKS;
const MAX_CLUSTER_BLOCKS: u64 = (16 << 30) / BLOCK_BYTES_U64;
/// Smallest volume: below it nothing useful fits.
pub const MIN_VOLUME_BYTES: u64 = 16 << 20;
/// Largest volume: 2^60 bytes keeps every product of the map inside 64 bits.
pub const MAX_VOLUME_BYTES: u64 = 1 << 60;

/// The numbers that mkfs chooses and the superblock keeps; everything else follows from them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Geometry {
    pub size_blocks: u64,
    pub slots: u16,
    pub journal_blocks: u64,
    pub cluster_blocks: u64,
}

/// Why a geometry is impossible.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum GeometryError {
    #[error("too small: {size_bytes} bytes, at least {MIN_VOLUME_BYTES} are needed")]
    TooSmall { size_bytes: u64 },
    #[error("too large: {size_bytes} bytes, at most {MAX_VOLUME_BYTES} are possible")]
    TooLarge { size_bytes: u64 },
    #[error("{slots} slots: 1 to {MAX_SLOTS} are possible")]
    Slots { slots: u16 },
    #[error("{slots} slots with their journals leave no room for files on {size_bytes} bytes")]
    NoRoom { slots: u16, size_bytes: u64 },
    #[error("impossible {field}: {value}")]
    Field { field: &'static str, value: u64 },
}

impl Geometry {
    /// What mkfs chooses for a device of `size_bytes`.
    pub fn plan(size_bytes: u64, slots: Option<u16>) -> Result<Self, GeometryError> {
        if size_bytes < MIN_VOLUME_BYTES {
            return Err(GeometryError::TooSmall { size_bytes });
        }
        if size_bytes > MAX_VOLUME_BYTES {
            return Err(GeometryError::TooLarge { size_bytes });
        }
        let gib = 1u64 << 30;
        let slots = slots.unwrap_or(match size_bytes {
            s if s < gib => 8,
            s if s < 64 * gib => 16,
            s if s < 1024 * gib => 32,
            _ => 64,
        });
        let size_blocks = size_bytes / BLOCK_BYTES_U64;
        // At most an eighth of the volume goes to journals; 64 MiB absorb some seconds of the busiest
        // metadata load and replay in less than a second.
        let journal_blocks = (size_blocks / 8 / u64::from(slots.max(1)))
            .clamp(MIB_BLOCKS / 4, 64 * MIB_BLOCKS)
            .next_multiple_of(GROUP_BLOCKS);
        // Some hundred clusters, thousands on the largest volumes: far more than hosts, few enough to look
        // through, each large enough that a host seldom needs the next.
        let cluster_blocks =
            (size_blocks / 256).next_power_of_two().clamp(MIN_CLUSTER_BLOCKS, MAX_CLUSTER_BLOCKS);
        let geometry = Geometry { size_blocks, slots, journal_blocks, cluster_blocks };
        geometry.check()?;
        Ok(geometry)
    }

    /// A geometry whose journals wrap and whose clusters fill in no time: for tests.
    pub fn tiny(slots: u16) -> Self {
        Geometry {
            size_blocks: (24 << 20) / BLOCK_BYTES_U64,
            slots,
            journal_blocks: 128,
            cluster_blocks: MIN_CLUSTER_BLOCKS,
        }
    }

    /// Is every number possible? Nothing is computed from a geometry before this was asked.
    pub fn check(&self) -> Result<(), GeometryError> {
        let field = |field, value| Err(GeometryError::Field { field, value });
        let size_bytes = self.size_blocks.saturating_mul(BLOCK_BYTES_U64);
        if size_bytes < MIN_VOLUME_BYTES {
            return Err(GeometryError::TooSmall { size_bytes });
        }
        if size_bytes > MAX_VOLUME_BYTES {
            return Err(GeometryError::TooLarge { size_bytes });
        }
        if self.slots == 0 || self.slots > MAX_SLOTS {
            return Err(GeometryError::Slots { slots: self.slots });
        }
        if self.journal_blocks < 32 || self.journal_blocks > 1 << 24 {
            return field("journal_blocks", self.journal_blocks);
        }
        if !self.cluster_blocks.is_power_of_two()
            || !(MIN_CLUSTER_BLOCKS..=MAX_CLUSTER_BLOCKS).contains(&self.cluster_blocks)
        {
            return field("cluster_blocks", self.cluster_blocks);
        }
        if self.first_cluster() + MIN_CLUSTER_BLOCKS > self.size_blocks {
            return Err(GeometryError::NoRoom { slots: self.slots, size_bytes });
        }
        Ok(())
    }

    pub fn size_bytes(&self) -> u64 {
        self.size_blocks * BLOCK_BYTES_U64
    }

    pub fn superblock(&self) -> BlockNo {
        BlockNo(0)
    }

    pub fn volume_lock(&self) -> BlockNo {
        BlockNo(VOLUME_LOCK)
    }

    pub fn rename_lock(&self) -> BlockNo {
        BlockNo(RENAME_LOCK)
    }

    pub fn slot(&self, slot: Slot) -> BlockNo {
        BlockNo(SLOTS_START + u64::from(slot.0))
    }

    pub fn doorbell(&self, slot: Slot) -> BlockNo {
        BlockNo(SLOTS_START + u64::from(self.slots) + u64::from(slot.0))
    }

    pub fn request(&self, slot: Slot) -> BlockNo {
        BlockNo(SLOTS_START + 2 * u64::from(self.slots) + u64::from(slot.0))
    }

    pub fn all_slots(&self) -> impl Iterator<Item = Slot> + use<> {
        (0..self.slots).map(Slot)
    }

    fn system_start(&self) -> u64 {
        (SLOTS_START + 3 * u64::from(self.slots)).next_multiple_of(GROUP_BLOCKS)
    }

    /// Groups of the system inodes: the root directory and the orphan directories.
    pub fn system_groups(&self) -> u64 {
        (1 + u64::from(self.slots)).div_ceil(GROUP_INODES)
    }

    /// First block of system group `index`.
    pub fn system_group(&self, index: u64) -> BlockNo {
        BlockNo(self.system_start() + index * GROUP_BLOCKS)
    }

    fn system_inode(&self, index: u64) -> InodeNo {
        let group = self.system_group(index / GROUP_INODES);
        InodeNo(group.0 + GROUP_INODES + index % GROUP_INODES)
    }

    pub fn root(&self) -> InodeNo {
        self.system_inode(0)
    }

    pub fn orphan_directory(&self, slot: Slot) -> InodeNo {
        self.system_inode(1 + u64::from(slot.0))
    }

    /// First block of a slot's journal: its header; the ring follows.
    pub fn journal(&self, slot: Slot) -> BlockNo {
        let start = self.system_start() + self.system_groups() * GROUP_BLOCKS;
        BlockNo(start + u64::from(slot.0) * self.journal_blocks)
    }

    /// First block of cluster 0.
    pub fn first_cluster(&self) -> u64 {
        (self.journal(Slot(0)).0 + u64::from(self.slots) * self.journal_blocks).next_multiple_of(MIB_BLOCKS)
    }

    /// Number of clusters; the last one may be shorter than the others.
    pub fn clusters(&self) -> u64 {
        let room = self.size_blocks - self.first_cluster();
        let whole = room / self.cluster_blocks;
        let rest = room % self.cluster_blocks;
        whole + u64::from(rest >= MIN_CLUSTER_BLOCKS)
    }

    /// First block of a cluster: its lock.
    pub fn cluster(&self, index: u64) -> BlockNo {
        BlockNo(self.first_cluster() + index * self.cluster_blocks)
    }

    /// Length of a cluster, a multiple of [`GROUP_BLOCKS`].
    pub fn cluster_len(&self, index: u64) -> u64 {
        let room = self.size_blocks - self.cluster(index).0;
        room.min(self.cluster_blocks) / GROUP_BLOCKS * GROUP_BLOCKS
    }

    pub fn cluster_header(&self, index: u64) -> BlockNo {
        self.cluster(index).plus(1)
    }

    /// Number of map blocks of a cluster.
    pub fn cluster_maps(&self, index: u64) -> u64 {
        (self.cluster_len(index) / GROUP_BLOCKS).div_ceil(CHUNKS_PER_MAP)
    }

    pub fn cluster_map(&self, index: u64, map: u64) -> BlockNo {
        self.cluster(index).plus(CLUSTER_HEAD_BLOCKS + map)
    }

    /// Blocks at the start of a cluster that are never allocated.
    pub fn cluster_overhead(&self, index: u64) -> u64 {
        CLUSTER_HEAD_BLOCKS + self.cluster_maps(index)
    }

    /// The cluster that a block lies in, if any.
    pub fn cluster_of(&self, block: BlockNo) -> Option<u64> {
        let offset = block.0.checked_sub(self.first_cluster())?;
        let index = offset / self.cluster_blocks;
        (index < self.clusters() && offset % self.cluster_blocks < self.cluster_len(index)).then_some(index)
    }

    /// Where copies of the superblock lie.
    pub fn superblock_copies(&self) -> Vec<BlockNo> {
        let clusters = self.clusters();
        let mut indexes = vec![0, clusters / 4, clusters / 2, clusters * 3 / 4, clusters - 1];
        indexes.dedup();
        indexes.into_iter().map(|i| self.cluster(i).plus(2)).collect()
    }

    /// All blocks of all clusters that files and inodes can use on an empty volume.
    pub fn usable_blocks(&self) -> u64 {
        let last = self.clusters() - 1;
        let of = |i| self.cluster_len(i) - self.cluster_overhead(i);
        last * of(0) + of(last)
    }

    /// Could an inode's body lie there, as far as the map of the disk says?
    pub fn can_be_inode(&self, ino: InodeNo) -> bool {
        if self.is_system_inode(ino) {
            return true;
        }
        let Some(cluster) = self.cluster_of(ino.body()) else { return false };
        (ino.0 - self.cluster(cluster).0) % GROUP_BLOCKS >= GROUP_INODES
    }

    /// Is this the place of an inode body of the system groups?
    pub fn is_system_inode(&self, ino: InodeNo) -> bool {
        let Some(offset) = ino.0.checked_sub(self.system_start()) else { return false };
        offset < self.system_groups() * GROUP_BLOCKS && offset % GROUP_BLOCKS >= GROUP_INODES
    }
}

/// The lock of an inode lies a fixed distance before its body.
pub fn lock_of_inode(ino: InodeNo) -> BlockNo {
    BlockNo(ino.0 - GROUP_INODES)
}

/// The inode whose lock this is, if the address is that of an inode lock.
pub fn inode_of_lock(lock: BlockNo) -> InodeNo {
    InodeNo(lock.0 + GROUP_INODES)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_map(g: Geometry) {
        g.check().unwrap();
        let last = Slot(g.slots - 1);
        assert!(g.request(last).0 < g.system_group(0).0);
        assert!(g.system_group(g.system_groups() - 1).0 + GROUP_BLOCKS <= g.journal(Slot(0)).0);
        assert!(g.journal(last).0 + g.journal_blocks <= g.first_cluster());
        assert!(g.is_system_inode(g.root()) && g.is_system_inode(g.orphan_directory(last)));
        assert!(!g.is_system_inode(InodeNo(g.system_group(0).0)));
        let n = g.clusters();
        assert!(n >= 1);
        for i in [0, n / 2, n - 1] {
            let (start, len) = (g.cluster(i), g.cluster_len(i));
            assert!(start.0 + len <= g.size_blocks);
            assert!(g.cluster_maps(i) <= MAX_MAPS && g.cluster_overhead(i) < len);
            assert_eq!(g.cluster_of(start), Some(i));
            assert_eq!(g.cluster_of(start.plus(len - 1)), Some(i));
            assert_eq!(start.0 % GROUP_BLOCKS, 0);
        }
        assert_eq!(g.cluster_of(BlockNo(g.first_cluster() - 1)), None);
    }

    #[test]
    fn the_map_holds_at_every_size() {
        for shift in 24..=60 {
            for odd in [0u64, 4096 * 77] {
                let size = ((1u64 << shift) + odd).min(MAX_VOLUME_BYTES);
                for slots in [None, Some(1), Some(256)] {
                    match Geometry::plan(size, slots) {
                        Ok(g) => check_map(g),
                        Err(e) => assert!(matches!(e, GeometryError::NoRoom { .. }), "{size} {slots:?}: {e}"),
                    }
                }
            }
        }
        check_map(Geometry::tiny(4));
    }

    #[test]
    fn a_64_tib_volume_has_a_manageable_number_of_clusters() {
        let g = Geometry::plan(64 << 40, None).unwrap();
        assert!((1000..=4096).contains(&g.clusters()), "{}", g.clusters());
    }
}
