//! What has to happen before a lock leaves this host: the kernel forgets, what the lock covers is in place, and whoever
//! asks learns how it is used here. The lock layer knows none of that.

use std::sync::{Arc, OnceLock, Weak};

use zerocopy::transmute_ref;

use crate::device::AlignedBuf;
use crate::fs::Fs;
use crate::fs::api::KernelCaches;
use crate::layout::cluster::{ClusterHeader, ClusterMap};
use crate::layout::geometry::{CHUNKS_PER_MAP, GROUP_BLOCKS, GROUP_INODES, Geometry, inode_of_lock};
use crate::layout::lock::LockKind;
use crate::layout::superblock::Superblock;
use crate::lease::{Door, IoClass};
use crate::lock::{LockId, Steward, Usage};
use crate::rt::Mutex;
use crate::store::Store;
use crate::types::{BLOCK_BYTES, BlockNo, InodeNo};

/// Knows what has to happen before a lock leaves.
pub(super) struct VolumeSteward {
    pub(super) geometry: Geometry,
    pub(super) door: Arc<Door>,
    pub(super) store: Arc<Store>,
    pub(super) fs: OnceLock<Weak<Fs>>,
    pub(super) kernel: Mutex<Option<Arc<dyn KernelCaches>>>,
    pub(super) superblock: Superblock,
}

impl VolumeSteward {
    fn fs(&self) -> Option<Arc<Fs>> {
        self.fs.get()?.upgrade()
    }

    /// Is there an inode group in which `lock` is the lock of an inode? Read without the cluster's lock: a
    /// group is a group for ever, so the answer can only be too cautious, and whoever asked asks again.
    fn is_group_lock(&self, lock: BlockNo) -> bool {
        let ino = inode_of_lock(lock);
        if self.geometry.is_system_inode(ino) {
            return true;
        }
        let Some(cluster) = self.geometry.cluster_of(lock) else { return false };
        let offset = lock.0 - self.geometry.cluster(cluster).0;
        if offset % GROUP_BLOCKS >= GROUP_INODES {
            return false;
        }
        let chunk = offset / GROUP_BLOCKS;
        let volume = self.superblock.volume;
        let read = |at: BlockNo| {
            let mut buf = AlignedBuf::zeroed(BLOCK_BYTES);
            self.door.read(IoClass::Lock, at, &mut buf).ok().map(|()| buf)
        };
        let Some(header) = read(self.geometry.cluster_header(cluster)) else { return false };
        let Some(header) = header.first_chunk::<BLOCK_BYTES>() else { return false };
        let Ok(header) = ClusterHeader::parse(header, &self.geometry, volume, cluster) else { return false };
        let map = chunk / CHUNKS_PER_MAP;
        if header.summaries.get(map as usize).is_none_or(|s| s.written == 0) {
            return false;
        }
        let at = self.geometry.cluster_map(cluster, map);
        let Some(block) = read(at) else { return false };
        let Some(block) = block.first_chunk::<BLOCK_BYTES>() else { return false };
        let Ok(_) = ClusterMap::parse(block, volume, at) else { return false };
        let map: &ClusterMap = transmute_ref!(block);
        map.chunks[(chunk % CHUNKS_PER_MAP) as usize].group == 1
    }
}

impl Steward for VolumeSteward {
    fn silence(&self, lock: LockId) {
        if lock.kind != LockKind::Inode {
            return;
        }
        let Some(kernel) = self.kernel.lock().clone() else { return };
        let ino: InodeNo = inode_of_lock(lock.at);
        if self.fs().is_some_and(|fs| fs.was_directory(ino)) {
            kernel.forget_names(ino);
        }
        kernel.forget_inode(ino);
    }

    fn forgotten(&self, lock: LockId) {
        if let (LockKind::Inode, Some(fs)) = (lock.kind, self.fs()) {
            fs.forget_directory(inode_of_lock(lock.at));
        }
    }

    fn settle(&self, lock: LockId) -> Result<(), String> {
        self.store.settle(lock.at).map_err(|e| e.to_string())
    }

    fn usage(&self, lock: LockId) -> Usage {
        match (lock.kind, self.fs()) {
            (LockKind::Inode, Some(fs)) => fs.usage(lock),
            _ => Usage::default(),
        }
    }

    fn kind_of(&self, at: BlockNo) -> Option<LockKind> {
        if at == self.geometry.volume_lock() {
            return Some(LockKind::Volume);
        }
        if at == self.geometry.rename_lock() {
            return Some(LockKind::Rename);
        }
        if let Some(cluster) = self.geometry.cluster_of(at)
            && self.geometry.cluster(cluster) == at
        {
            return Some(LockKind::Cluster);
        }
        self.is_group_lock(at).then_some(LockKind::Inode)
    }
}
