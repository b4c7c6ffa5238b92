//! What was written to a device with a volatile cache and no flush has covered yet, by content.
//!
//! Such a device may forget it (power, a reset, a session that broke: nobody tells which), and who wrote it can only write
//! it again from here. Each block has its latest content. A lock leaves a host behind a flush, so what is in here lies
//! under locks that this host holds, or in its own journal: writing it again disturbs nobody.
//!
//! Not for: compare-and-writes (the block itself says what became of them), beats and wishes (nothing rests on them).

use std::sync::Arc;

use rangemap::RangeMap;

use crate::device::AlignedBuf;
use crate::types::{BLOCK_BYTES, BLOCK_BYTES_U64, BlockNo};

/// What one command made of its blocks.
#[derive(Clone, Debug)]
enum Content {
    Bytes(Arc<[u8]>),
    Zeroes,
}

/// One command that changed blocks.
#[derive(Clone, Debug)]
struct Change {
    /// Changes are numbered as they ended.
    number: u64,
    first: BlockNo,
    content: Content,
}

// A number is given once.
impl PartialEq for Change {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl Eq for Change {}

/// See the module.
#[derive(Default)]
pub(super) struct Unflushed {
    blocks: RangeMap<u64, Change>,
    last: u64,
    /// Memory of the contents, at most: what was written over counts until the next flush.
    bytes: u64,
}

/// What is written again by one command.
#[derive(Debug)]
pub(super) enum Rewrite {
    Bytes(BlockNo, AlignedBuf),
    Zeroes(BlockNo, u64),
}

/// One command writes at most so much again.
const REWRITE_BLOCKS: u64 = 256;

impl Unflushed {
    fn insert(&mut self, first: BlockNo, blocks: u64, content: Content) {
        self.last += 1;
        if blocks > 0 {
            let change = Change { number: self.last, first, content };
            self.blocks.insert(first.0..first.0 + blocks, change);
        }
    }

    /// A write ended.
    pub fn wrote(&mut self, at: BlockNo, data: &[u8]) {
        self.bytes += data.len() as u64;
        self.insert(at, (data.len() as u64).div_ceil(BLOCK_BYTES_U64), Content::Bytes(data.into()));
    }

    /// A command that fills blocks with zeroes ended.
    pub fn zeroed(&mut self, at: BlockNo, blocks: u64) {
        self.insert(at, blocks, Content::Zeroes);
    }

    /// Nobody will ask any more what these blocks hold.
    pub fn discarded(&mut self, at: BlockNo, blocks: u64) {
        if blocks > 0 {
            self.blocks.remove(at.0..at.0 + blocks);
        }
    }

    /// Is there something of this block?
    pub fn holds(&self, at: BlockNo) -> bool {
        self.blocks.contains_key(&at.0)
    }

    /// Memory of what is kept, in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// All changes that ended until now; for [`Unflushed::flushed`].
    pub fn mark(&self) -> u64 {
        self.last
    }

    /// A flush that began after `mark` was taken, on a device that forgot nothing since, went well.
    pub fn flushed(&mut self, mark: u64) {
        if mark == self.last {
            self.blocks.clear();
            self.bytes = 0;
            return;
        }
        let covered: Vec<_> =
            self.blocks.iter().filter(|(_, c)| c.number <= mark).map(|(range, _)| range.clone()).collect();
        covered.into_iter().for_each(|range| self.blocks.remove(range));
        self.bytes = self
            .blocks
            .iter()
            .map(|(_, c)| match &c.content {
                Content::Bytes(bytes) => bytes.len() as u64,
                Content::Zeroes => 0,
            })
            .sum();
    }

    /// All of it, in commands of a sensible size.
    pub fn rewrites(&self) -> Vec<Rewrite> {
        let mut all = Vec::new();
        for (range, change) in self.blocks.iter() {
            match &change.content {
                Content::Zeroes => all.push(Rewrite::Zeroes(BlockNo(range.start), range.end - range.start)),
                Content::Bytes(bytes) => {
                    let mut at = range.start;
                    while at < range.end {
                        let end = range.end.min(at + REWRITE_BLOCKS);
                        let offset = |block: u64| (block - change.first.0) as usize * BLOCK_BYTES;
                        // The last block of a write may be a part of one.
                        let piece = bytes.get(offset(at)..offset(end).min(bytes.len())).unwrap_or_default();
                        all.push(Rewrite::Bytes(BlockNo(at), AlignedBuf::copy_of(piece)));
                        at = end;
                    }
                }
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::rt::sim::SimRng;

    fn applied(unflushed: &Unflushed, disk: &mut BTreeMap<u64, u8>) {
        for rewrite in unflushed.rewrites() {
            match rewrite {
                Rewrite::Zeroes(at, blocks) => (0..blocks).for_each(|n| {
                    disk.insert(at.0 + n, 0);
                }),
                Rewrite::Bytes(at, bytes) => {
                    assert!(bytes.len() as u64 <= REWRITE_BLOCKS * BLOCK_BYTES_U64);
                    for (n, block) in bytes.chunks(BLOCK_BYTES).enumerate() {
                        assert!(block.iter().all(|b| *b == block[0]));
                        disk.insert(at.0 + n as u64, block[0]);
                    }
                }
            }
        }
    }

    /// Whatever is written, zeroed, discarded and flushed: written again, the disk holds what it held before it forgot
    /// all that no flush had covered, but for what was discarded.
    #[test]
    fn what_is_written_again_is_what_was_there() {
        for seed in 0..200 {
            let mut rng = SimRng::new(seed, 1);
            let mut unflushed = Unflushed::default();
            let (mut now, mut durable): (BTreeMap<u64, u8>, BTreeMap<u64, u8>) = Default::default();
            let mut discarded = std::collections::BTreeSet::new();
            for _ in 0..60 {
                let (at, blocks) = (rng.below(700), [1, 2, 5, 300][rng.index(4)]);
                let range = at..at + blocks;
                match rng.below(8) {
                    0..4 => {
                        let byte = rng.below(255) as u8 + 1;
                        unflushed.wrote(BlockNo(at), &vec![byte; blocks as usize * BLOCK_BYTES]);
                        for n in range {
                            now.insert(n, byte);
                            discarded.remove(&n);
                        }
                    }
                    4 => {
                        unflushed.zeroed(BlockNo(at), blocks);
                        for n in range {
                            now.insert(n, 0);
                            discarded.remove(&n);
                        }
                    }
                    5 => {
                        unflushed.discarded(BlockNo(at), blocks);
                        discarded.extend(range);
                    }
                    _ => {
                        // Something is written while the flush is on its way: it is not covered.
                        let (mark, covered) = (unflushed.mark(), now.clone());
                        if rng.chance(0.5) {
                            unflushed.wrote(BlockNo(at), &[9; BLOCK_BYTES]);
                            now.insert(at, 9);
                            discarded.remove(&at);
                        }
                        unflushed.flushed(mark);
                        durable = covered;
                    }
                }
            }
            let mut disk = durable.clone();
            applied(&unflushed, &mut disk);
            for (at, byte) in &now {
                if !discarded.contains(at) {
                    assert_eq!(disk.get(at), Some(byte), "seed {seed}, block {at}");
                }
            }
            unflushed.flushed(unflushed.mark());
            assert!(unflushed.bytes() == 0 && unflushed.rewrites().is_empty());
        }
    }

    #[test]
    fn memory_is_counted_and_given_back() {
        let mut unflushed = Unflushed::default();
        unflushed.wrote(BlockNo(10), &[1; 3 * BLOCK_BYTES]);
        let mark = unflushed.mark();
        unflushed.wrote(BlockNo(11), &[2; BLOCK_BYTES]);
        unflushed.zeroed(BlockNo(50), 1 << 40);
        assert_eq!(unflushed.bytes(), 4 * BLOCK_BYTES_U64);
        unflushed.flushed(mark);
        assert_eq!(unflushed.bytes(), BLOCK_BYTES_U64);
        assert!(unflushed.holds(BlockNo(11)) && !unflushed.holds(BlockNo(10)));
        // Half a block at the end stays half a block.
        unflushed.wrote(BlockNo(90), &[3; BLOCK_BYTES + 512]);
        let short = unflushed.rewrites().into_iter().any(
            |r| matches!(r, Rewrite::Bytes(at, bytes) if at.0 == 90 && bytes.len() == BLOCK_BYTES + 512),
        );
        assert!(short);
    }
}
