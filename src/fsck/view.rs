//! The volume as a check sees it: blocks from the device, and over them what a journal that was not replayed
//! would bring into place.
//!
//! Not for: writing.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use super::ahead::Ahead;
use crate::device::AlignedBuf;
use crate::inspect::{InspectError, Volume};
use crate::layout::{Block, Magic, verify, zero_block};
use crate::tree::{NodeRead, TreeError};
use crate::types::{BLOCK_BYTES, BlockNo};

/// Reads blocks; remembers nothing of them.
pub struct View<'v, 'd> {
    pub volume: &'v Volume<'d>,
    /// Where in a journal the block is that would be brought into place here.
    pub pending: BTreeMap<BlockNo, BlockNo>,
    /// Only on volumes large enough to be worth it.
    pub ahead: OnceCell<Ahead>,
}

/// Why a tree node can't be used: a sentence.
pub struct BadNode(pub String);

impl From<TreeError> for BadNode {
    fn from(e: TreeError) -> Self {
        BadNode(e.to_string())
    }
}

impl View<'_, '_> {
    fn read_run(&self, first: BlockNo, count: u64) -> Result<AlignedBuf, InspectError> {
        match self.ahead.get().and_then(|ahead| ahead.take(first, count)) {
            Some(bytes) => Ok(bytes),
            None => self.volume.read_run(first, count),
        }
    }

    /// These will be asked for, by exactly these calls of [`View::blocks`] or, for one, [`View::block`]. False: no more now.
    pub fn will_read(&self, first: BlockNo, count: u64) -> bool {
        let inside = first.0.checked_add(count).is_some_and(|end| end <= self.volume.geometry().size_blocks);
        inside && self.ahead.get().is_some_and(|ahead| ahead.want(first, count))
    }

    /// What was to be read was not.
    pub fn forget_ahead(&self) {
        if let Some(ahead) = self.ahead.get() {
            ahead.forget();
        }
    }

    pub fn block(&self, at: BlockNo) -> Result<Box<Block>, InspectError> {
        let mut block = zero_block();
        let from = self.pending.get(&at).copied().unwrap_or(at);
        block.copy_from_slice(&self.read_run(from, 1)?);
        Ok(block)
    }

    /// Consecutive blocks, in one command where the device can; each may fail for itself.
    pub fn blocks(&self, first: BlockNo, count: u64) -> Vec<Result<Box<Block>, InspectError>> {
        let Ok(bytes) = self.read_run(first, count) else {
            return (0..count).map(|i| self.block(first.plus(i))).collect();
        };
        let pieces = bytes.chunks_exact(BLOCK_BYTES).enumerate();
        let blocks = pieces
            .map(|(i, piece)| {
                let at = first.plus(i as u64);
                if self.pending.contains_key(&at) {
                    return self.block(at);
                }
                let mut block = zero_block();
                block.copy_from_slice(piece);
                Ok(block)
            })
            .collect();
        if let Some(ahead) = self.ahead.get() {
            ahead.give_back(bytes);
        }
        blocks
    }
}

/// Tree nodes through a view.
pub struct Nodes<'a, 'v, 'd>(pub &'a View<'v, 'd>);

impl NodeRead for Nodes<'_, '_, '_> {
    type Error = BadNode;
    fn will_load(&mut self, at: BlockNo) {
        // Those that a journal would bring are few.
        self.0.will_read(at, 1);
    }
    fn load(&mut self, at: BlockNo) -> Result<Arc<Block>, BadNode> {
        let block = self.0.block(at).map_err(|e| BadNode(e.to_string()))?;
        verify(&block[..], Magic::TreeNode, self.0.volume.id(), at).map_err(|e| BadNode(e.to_string()))?;
        Ok(Arc::from(block))
    }
}
