//! Birth of inode groups: free space becomes inodes, once and for ever.

use std::sync::Arc;

use zerocopy::IntoBytes;
use zerocopy::little_endian::U16;

use super::{AllocError, Allocator, Space};
use crate::device::AlignedBuf;
use crate::layout::geometry::{GROUP_BLOCKS, GROUP_INODES};
use crate::layout::inode::InodeDisk;
use crate::layout::lock::LockRecord;
use crate::layout::{Block, seal};
use crate::lease::IoClass;
use crate::rt::planted::{Bug, is_planted};
use crate::store::{Plan, StoreError};
use crate::types::{BLOCK_BYTES, BlockNo, InodeNo};

/// The most groups born by one write: 1 MiB.
const MOST_GROUPS: u64 = 16;

impl Allocator {
    /// Turns free chunks of the cluster into inode groups. The locks are born owned by this host, in one
    /// plain write at addresses that were never locks; the write is flushed before the plan that marks the
    /// groups can commit, so that a marked group always has its locks.
    pub(super) fn give_birth(&self, plan: &mut Plan<'_>, space: &Space) -> Result<(), AllocError> {
        // Few files deserve few inodes: the first birth in a cluster is small, each one doubles.
        let births = self.state.lock().hints.get(&space.cluster).map_or(0, |h| h.births);
        let wanted = (1u64 << births.min(4)).min(MOST_GROUPS);
        let found = self.find_run(plan, space, wanted * GROUP_BLOCKS, GROUP_BLOCKS)?;
        let (first, len) = found.ok_or(AllocError::NoSpace)?;
        let groups = len / GROUP_BLOCKS;
        let start = self.geometry.cluster(space.cluster).plus(first);
        let volume = self.store.volume();
        let me = self.locks.me();
        let mut bytes = AlignedBuf::zeroed(len as usize * BLOCK_BYTES);
        let mut locks = Vec::new();
        let mut bodies: Vec<(BlockNo, Arc<Block>)> = Vec::new();
        for (i, block) in bytes.chunks_exact_mut(BLOCK_BYTES).enumerate() {
            let at = start.plus(i as u64);
            if (i as u64) % GROUP_BLOCKS < GROUP_INODES {
                let record = LockRecord::new_born(at, me, self.locks.fresh_nonce());
                record.encode(volume, block);
                locks.push(record);
            } else {
                let body = InodeDisk::new_free(volume, InodeNo(at.0));
                block.copy_from_slice(body.as_bytes());
                seal(block);
                let mut copy: Arc<Block> = Arc::new([0; BLOCK_BYTES]);
                Arc::make_mut(&mut copy).copy_from_slice(block);
                bodies.push((at, copy));
            }
        }
        let door = self.store.door();
        door.write(IoClass::Metadata, start, &bytes).map_err(StoreError::from)?;
        if !is_planted(Bug::BirthUnflushed) {
            door.flush(IoClass::Metadata).map_err(StoreError::from)?;
        }
        let (manager, born): (_, Vec<BlockNo>) =
            (self.locks.clone(), locks.iter().map(|record| record.address).collect());
        plan.when_abandoned(move || manager.forget_born(&born));
        for (record, (at, body)) in locks.iter().zip(bodies) {
            let epoch = self.locks.adopt_born(record);
            self.store.remember(record.address, epoch, at, body);
        }
        for group in 0..groups {
            let chunk = first / GROUP_BLOCKS + group;
            self.change_chunk(plan, space, chunk, |c| {
                c.used = U16::new(u16::MAX);
                c.group = 1;
                c.inodes = 0;
            })?;
        }
        let mut state = self.state.lock();
        let hint = state.hints.entry(space.cluster).or_default();
        hint.births += 1;
        hint.inode_cursor = first / GROUP_BLOCKS;
        Ok(())
    }
}
