//! Nodes in memory: the store of this room's tests and of those above it. Counts what operations use, so
//! that tests can hold them to their bounds.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use thiserror::Error;

use super::{Cost, NodeRead, NodeStore, TreeError};
use crate::layout::{Block, LayoutError, Magic, seal, verify};
use crate::types::{BlockNo, VolumeId};

#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum MemError {
    #[error(transparent)]
    Tree(#[from] TreeError),
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error("no such block: {0}")]
    Absent(BlockNo),
    #[error("the store was told to fail")]
    Injected,
}

#[derive(Clone, Default)]
pub struct MemStore {
    pub blocks: HashMap<BlockNo, Arc<Block>>,
    free: Vec<BlockNo>,
    used: Cost,
    touched: BTreeSet<BlockNo>,
    /// When set, every load verifies checksum and identity; use with [`MemStore::seal_all`].
    pub verify: Option<VolumeId>,
    /// Allocations that still succeed.
    pub allocations_left: Option<u32>,
}

impl MemStore {
    /// What was used since the last call.
    pub fn take_cost(&mut self) -> Cost {
        let cost = Cost { touched: self.touched.len() as u32, ..self.used };
        self.used = Cost::default();
        self.touched.clear();
        cost
    }

    pub fn seal_all(&mut self) {
        self.blocks.values_mut().for_each(|block| seal(&mut Arc::make_mut(block)[..]));
    }
}

impl NodeRead for MemStore {
    type Error = MemError;

    fn load(&mut self, at: BlockNo) -> Result<Arc<Block>, MemError> {
        let block = self.blocks.get(&at).ok_or(MemError::Absent(at))?;
        if let Some(volume) = self.verify {
            verify(&block[..], Magic::TreeNode, volume, at)?;
        }
        Ok(Arc::clone(block))
    }
}

impl NodeStore for MemStore {
    fn modify(&mut self, at: BlockNo, change: &mut dyn FnMut(&mut Block)) -> Result<(), MemError> {
        let block = Arc::make_mut(self.blocks.get_mut(&at).ok_or(MemError::Absent(at))?);
        change(block);
        if self.verify.is_some() {
            seal(&mut block[..]);
        }
        self.touched.insert(at);
        Ok(())
    }

    fn put(&mut self, at: BlockNo, mut block: Box<Block>) -> Result<(), MemError> {
        if self.verify.is_some() {
            seal(&mut block[..]);
        }
        self.blocks.insert(at, Arc::from(block));
        self.touched.insert(at);
        Ok(())
    }

    fn allocate(&mut self) -> Result<BlockNo, MemError> {
        if let Some(left) = &mut self.allocations_left {
            *left = left.checked_sub(1).ok_or(MemError::Injected)?;
        }
        self.used.allocations += 1;
        let fresh = BlockNo(100_000 + self.blocks.len() as u64 + self.free.len() as u64);
        let at = self.free.pop().unwrap_or(fresh);
        // An allocated block exists, so that the next one gets another address.
        self.blocks.insert(at, Arc::new([0xab; crate::types::BLOCK_BYTES]));
        Ok(at)
    }

    fn free(&mut self, at: BlockNo) -> Result<(), MemError> {
        self.blocks.remove(&at).ok_or(MemError::Absent(at))?;
        self.touched.insert(at);
        self.free.push(at);
        Ok(())
    }
}
