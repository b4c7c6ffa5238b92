//! Putting committed blocks in place, merged into as few commands as possible.

use std::sync::Arc;

use super::{Clean, Dirty, Store, StoreError};
use crate::device::AlignedBuf;
use crate::journal::Journal;
use crate::lease::IoClass;
use crate::rt::planted::{Bug, is_planted};
use crate::types::{BLOCK_BYTES, BlockNo};

/// Blocks written by one command at most: 1 MiB.
const BLOCKS_PER_WRITE: usize = 256;

impl Store {
    /// Writes committed blocks in place: all, or those of one lock. False: there were none, nothing was
    /// flushed.
    pub(super) fn checkpoint_locked(
        &self,
        journal: &mut Journal,
        only: Option<BlockNo>,
    ) -> Result<bool, StoreError> {
        let list: Vec<(BlockNo, Dirty, u64)> = {
            let state = self.state.lock();
            let chosen = state.pending.iter().filter(|(_, p)| only.is_none_or(|lock| p.dirty.lock == lock));
            chosen.map(|(at, p)| (*at, p.dirty.clone(), p.sequence)).collect()
        };
        if list.is_empty() {
            return Ok(false);
        }
        let mut start = 0;
        while start < list.len() {
            let mut end = start + 1;
            while end < list.len() && end - start < BLOCKS_PER_WRITE && list[end].0 == list[end - 1].0.plus(1)
            {
                end += 1;
            }
            let mut buf = AlignedBuf::zeroed((end - start) * BLOCK_BYTES);
            for ((_, dirty, _), to) in list[start..end].iter().zip(buf.chunks_exact_mut(BLOCK_BYTES)) {
                to.copy_from_slice(&dirty.block[..]);
            }
            self.door.write(IoClass::Metadata, list[start].0, &buf)?;
            start = end;
        }
        if !is_planted(Bug::TailMovesUnflushed) {
            self.door.flush(IoClass::Metadata)?;
        }
        let mut state = self.state.lock();
        if only.is_none() {
            state.pending_since = None;
        }
        for (at, dirty, sequence) in list {
            let same = state.pending.get(&at).is_some_and(|p| Arc::ptr_eq(&p.dirty.block, &dirty.block));
            if !same {
                continue;
            }
            state.pending.remove(&at);
            journal.settled(sequence, 1);
            let clean = Clean { block: dirty.block, lock: dirty.lock, epoch: dirty.epoch };
            if !state.running.blocks.contains_key(&at) {
                state.clean.put(at, clean);
            }
        }
        Ok(true)
    }
}
