//! The changes of one operation, collected before they join a transaction.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Dirty, Hook, Store, StoreError};
use crate::layout::{Block, Magic, header_of};
use crate::lock::Guard;
use crate::types::{BlockNo, Tenure};

/// Everything that one operation changes. Reads see its own changes. Dropped without
/// [`Store::apply`], nothing happened.
pub struct Plan<'s> {
    store: &'s Store,
    changes: BTreeMap<BlockNo, Dirty>,
    revokes: Vec<(BlockNo, BlockNo, Tenure)>,
    hooks: Vec<Hook>,
    abandon: Vec<Hook>,
    pub net_blocks: i64,
    pub net_inodes: i64,
    /// Blocks that the inode at hand gained or lost: for its owner to add up.
    pub blocks_of_inode: i64,
}

/// A plan that passed its checks.
pub struct Planned {
    pub(super) changes: BTreeMap<BlockNo, Dirty>,
    pub(super) revokes: Vec<(BlockNo, BlockNo, Tenure)>,
    pub(super) hooks: Vec<Hook>,
    pub(super) dropped: Vec<BlockNo>,
    pub(super) net_blocks: i64,
    pub(super) net_inodes: i64,
}

impl Store {
    /// An empty plan.
    pub fn plan(&self) -> Plan<'_> {
        Plan {
            store: self,
            changes: BTreeMap::new(),
            revokes: Vec::new(),
            hooks: Vec::new(),
            abandon: Vec::new(),
            net_blocks: 0,
            net_inodes: 0,
            blocks_of_inode: 0,
        }
    }
}

impl<'s> Plan<'s> {
    pub fn store(&self) -> &'s Store {
        self.store
    }

    pub fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.revokes.is_empty()
    }

    /// Blocks changed so far.
    pub fn len(&self) -> usize {
        self.changes.len()
    }

    /// The block as this operation left it.
    pub fn read(&self, guard: &Guard, at: BlockNo, magic: Magic) -> Result<Arc<Block>, StoreError> {
        match self.changes.get(&at) {
            Some(dirty) => Ok(dirty.block.clone()),
            None => self.store.read(guard, at, magic),
        }
    }

    /// The block, for changing.
    pub fn update(&mut self, guard: &Guard, at: BlockNo, magic: Magic) -> Result<&mut Block, StoreError> {
        let lock = guard.lock();
        let tenure = guard.tenure().ok_or(StoreError::NoTenure { at, lock })?;
        if !self.changes.contains_key(&at) {
            let block = self.store.read(guard, at, magic)?;
            self.changes.insert(at, Dirty { block, lock, tenure, epoch: guard.epoch() });
            guard.mark_changed();
        }
        match self.changes.get_mut(&at) {
            Some(dirty) if dirty.lock == lock => Ok(Arc::make_mut(&mut dirty.block)),
            Some(dirty) => Err(StoreError::WrongLock { at, found: dirty.lock, held: lock }),
            None => Err(StoreError::NoTenure { at, lock }),
        }
    }

    /// A block with new contents: one that was just allocated, or is replaced as a whole.
    pub fn put(&mut self, guard: &Guard, at: BlockNo, block: Arc<Block>) -> Result<(), StoreError> {
        let lock = guard.lock();
        let tenure = guard.tenure().ok_or(StoreError::NoTenure { at, lock })?;
        guard.mark_changed();
        self.revokes.retain(|(b, ..)| *b != at);
        self.changes.insert(at, Dirty { block, lock, tenure, epoch: guard.epoch() });
        Ok(())
    }

    /// The block is metadata no more: earlier records of it must not be replayed.
    pub fn revoke(&mut self, guard: &Guard, at: BlockNo) -> Result<(), StoreError> {
        let lock = guard.lock();
        let tenure = guard.tenure().ok_or(StoreError::NoTenure { at, lock })?;
        guard.mark_changed();
        self.changes.remove(&at);
        self.revokes.push((at, lock, tenure));
        Ok(())
    }

    /// Runs once the transaction is durable.
    pub fn when_durable(&mut self, hook: impl FnOnce() + Send + 'static) {
        self.hooks.push(Box::new(hook));
    }

    /// Runs if the plan never joins a transaction.
    pub fn when_abandoned(&mut self, hook: impl FnOnce() + Send + 'static) {
        self.abandon.push(Box::new(hook));
    }

    /// Every change names its own place and its lock: a block that would not be believed is not written.
    pub(super) fn finish(&mut self) -> Result<Planned, StoreError> {
        for (at, dirty) in &self.changes {
            let (at, held) = (*at, dirty.lock);
            let (address, lock) = header_of(&dirty.block[..])
                .map_or((BlockNo(0), BlockNo(0)), |h| (BlockNo(h.address.get()), BlockNo(h.lock.get())));
            if lock != held || address != at {
                return Err(StoreError::WrongLock { at, found: lock, held });
            }
        }
        let dropped = self.revokes.iter().map(|(at, ..)| *at).collect();
        Ok(Planned {
            changes: std::mem::take(&mut self.changes),
            revokes: std::mem::take(&mut self.revokes),
            hooks: std::mem::take(&mut self.hooks),
            dropped,
            net_blocks: self.net_blocks,
            net_inodes: self.net_inodes,
        })
    }

    /// The plan joined a transaction.
    pub(super) fn joined(&mut self) {
        self.abandon.clear();
    }
}

impl Drop for Plan<'_> {
    fn drop(&mut self) {
        for hook in self.abandon.drain(..) {
            hook();
        }
    }
}
