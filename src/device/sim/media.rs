//! The medium behind its volatile cache.
//!
//! Reads see every executed write. Where the device has a volatile cache, a write is durable only
//! after a flush that was issued after the write had executed; a power cut leaves each logical block
//! that has younger writes at its durable content or at any of them, each block for itself.
//!
//! Invariant: `now` is what reads see; `unflushed` holds, for exactly those logical blocks that a
//! power cut may change, the durable bytes and the writes since.
//!
//! Not modelled: discards and zeroings of more than [`CACHED_FILL_BYTES`] are durable at once.

use std::collections::{BTreeMap, BTreeSet};

use super::store::Store;
use crate::rt::sim::SimRng;

/// Larger fills bypass the cache, or each would cost an entry a block.
const CACHED_FILL_BYTES: u64 = 4 << 20;
/// Unflushed writes of one block beyond this are thinned out where no flush can tell.
const MAX_VERSIONS: usize = 6;

/// What a power cut keeps of the writes that were not flushed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Keep {
    /// Each logical block for itself: its durable bytes, or any write since.
    Random,
    Nothing,
    Everything,
    /// Of the logical blocks at risk, in the order of their addresses, only this one.
    Only(usize),
    /// All but this one.
    AllBut(usize),
}

#[derive(Clone)]
struct Unflushed {
    durable: Vec<u8>,
    /// Later writes with their places in the order of executions.
    versions: Vec<(u64, Vec<u8>)>,
}

/// Contents of a LUN, with what a power cut would do to them.
#[derive(Clone)]
pub struct Media {
    block: u64,
    volatile: bool,
    now: Store,
    unflushed: BTreeMap<u64, Unflushed>,
    /// When the flushes that are on their way were issued.
    flushes: BTreeSet<u64>,
}

impl Media {
    pub fn new(logical_block_bytes: u32, volatile: bool) -> Self {
        Media {
            block: u64::from(logical_block_bytes),
            volatile,
            now: Store::default(),
            unflushed: BTreeMap::new(),
            flushes: BTreeSet::new(),
        }
    }

    pub fn bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut buf = vec![0; len];
        self.now.read(offset, &mut buf);
        buf
    }

    /// A write that executes as number `order`.
    pub fn write(&mut self, order: u64, offset: u64, data: &[u8]) {
        if self.volatile {
            for (i, bytes) in data.chunks(self.block as usize).enumerate() {
                self.remember(order, offset + i as u64 * self.block, bytes);
            }
        }
        self.now.write(offset, data);
    }

    /// A write that no power cut can take back.
    pub fn write_durable(&mut self, order: u64, offset: u64, data: &[u8]) {
        self.write(order, offset, data);
        let end = offset + data.len() as u64;
        let mut tail = self.unflushed.split_off(&offset);
        self.unflushed.append(&mut tail.split_off(&end));
    }

    /// A discard or zeroing that executes as number `order`.
    pub fn fill(&mut self, order: u64, offset: u64, len: u64, discard: bool) {
        if self.volatile && len <= CACHED_FILL_BYTES {
            let mut filled = Store::default();
            filled.fill(offset, len, discard);
            let mut data = vec![0; len as usize];
            filled.read(offset, &mut data);
            self.write(order, offset, &data);
        }
        if len > CACHED_FILL_BYTES {
            let mut tail = self.unflushed.split_off(&offset);
            self.unflushed.append(&mut tail.split_off(&(offset + len)));
        }
        self.now.fill(offset, len, discard);
    }

    /// A flush was issued after execution number `order`.
    pub fn flush_issued(&mut self, order: u64) {
        self.flushes.insert(order);
    }

    /// That flush will not execute any more.
    pub fn flush_gone(&mut self, order: u64) {
        self.flushes.remove(&order);
    }

    /// Makes durable what had executed when the flush was issued; later writes stay at risk.
    pub fn flush(&mut self, issued: u64) {
        self.unflushed.retain(|_, block| {
            let covered = block.versions.iter().take_while(|(order, _)| *order <= issued).count();
            if let Some((_, bytes)) = block.versions.drain(..covered).next_back() {
                block.durable = bytes;
            }
            !block.versions.is_empty()
        });
        self.flushes.remove(&issued);
    }

    /// The cache is lost.
    pub fn power_cut(&mut self, rng: &mut SimRng, keep: Keep) {
        for (i, (offset, block)) in std::mem::take(&mut self.unflushed).into_iter().enumerate() {
            let kept = match keep {
                Keep::Everything => continue,
                Keep::Only(one) if i == one => continue,
                Keep::AllBut(one) if i != one => continue,
                Keep::Nothing | Keep::Only(_) | Keep::AllBut(_) => 0,
                Keep::Random => rng.index(block.versions.len() + 1),
            };
            let bytes = if kept == 0 { &block.durable } else { &block.versions[kept - 1].1 };
            self.now.write(offset, bytes);
        }
        self.flushes.clear();
    }

    /// How many logical blocks a power cut may change.
    pub fn unflushed_blocks(&self) -> usize {
        self.unflushed.len()
    }

    pub fn is_at_risk(&self, offset: u64) -> bool {
        self.unflushed.contains_key(&offset)
    }

    fn remember(&mut self, order: u64, offset: u64, bytes: &[u8]) {
        let (now, block) = (&self.now, self.block as usize);
        let entry = self.unflushed.entry(offset).or_insert_with(|| {
            let mut durable = vec![0; block];
            now.read(offset, &mut durable);
            Unflushed { durable, versions: Vec::new() }
        });
        entry.versions.push((order, bytes.to_vec()));
        if entry.versions.len() > MAX_VERSIONS {
            // A write may be forgotten if every flush that covers it covers the next one too.
            let oldest_flush = self.flushes.first().copied().unwrap_or(u64::MAX);
            if entry.versions[1].0 <= oldest_flush {
                entry.versions.remove(0);
            }
        }
    }
}
