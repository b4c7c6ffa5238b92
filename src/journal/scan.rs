//! Reading the journal of a life that ended: what of it is committed and may not be in place.
//!
//! * A transaction counts only whole: its commit's checksum covers all of it and the commit before it. The
//!   first one that is not ends the journal, since it was never acknowledged; unless one behind it was begun,
//!   which happens only after it was durable: then the journal is damaged, and nothing is guessed.
//! * A revoke forgets every earlier image of its block, whatever lock it was made under: the block was freed
//!   and may be anything by now.
//! * Of the images of one block under one tenure the last counts.
//!
//! Nothing is written here, and nothing is believed of a lock: whether an image may go in place is for
//! replay to find out (`recovery`, invariant 8).

use std::collections::BTreeMap;
use std::sync::Arc;

use thiserror::Error;

use super::Ring;
use crate::device::{AlignedBuf, DeviceError};
use crate::layout::journal::{Commit, Descriptor, JournalHeader, JournalRecord, RecordKind};
use crate::layout::{Block, LayoutError, header_of};
use crate::lease::{Door, IoClass};
use crate::rt::planted::{Bug, is_planted};
use crate::types::{BLOCK_BYTES, BlockNo, Incarnation, Tenure, VolumeId};

/// Why a journal can't be read.
#[derive(Debug, Error)]
pub enum ScanError {
    /// May pass.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Where the journal begins is not known: nothing of it can be replayed.
    #[error("the journal's header: {0}")]
    Header(LayoutError),
    /// A later transaction was begun only after this one was durable, so its bytes were lost since.
    #[error(
        "transaction {sequence} of the journal at block {at} is damaged, but transaction {later} is there"
    )]
    Damaged { at: BlockNo, sequence: u64, later: u64 },
}

/// An image that was committed.
#[derive(Clone)]
pub struct Logged {
    pub block: BlockNo,
    pub lock: BlockNo,
    pub tenure: Tenure,
    /// Where in the ring the image lies.
    pub at: BlockNo,
    pub bytes: Arc<Block>,
}

/// What a journal holds.
#[derive(Default)]
pub struct Scanned {
    /// The life that wrote it; `None` for a ring that was never used.
    pub incarnation: Incarnation,
    pub transactions: u64,
    /// Ring blocks that they take.
    pub used_blocks: u64,
    /// By address, then in the order of tenures.
    pub images: Vec<Logged>,
    /// The slot's net allocation (blocks, inodes) after the last transaction.
    pub net: Option<(i64, i64)>,
}

/// Ring blocks read by one command.
const BLOCKS_PER_READ: u64 = 256;

/// The ring, read ahead in large pieces.
struct Reader<'a> {
    door: &'a Door,
    ring: Ring,
    /// Ring position of the buffer's first block.
    start: u64,
    buf: AlignedBuf,
}

impl Reader<'_> {
    fn block(&mut self, position: u64) -> Result<Arc<Block>, DeviceError> {
        let position = position % self.ring.blocks;
        let held = (self.buf.len() / BLOCK_BYTES) as u64;
        if position < self.start || position >= self.start + held {
            let count = BLOCKS_PER_READ.min(self.ring.blocks - position);
            self.buf = AlignedBuf::zeroed(count as usize * BLOCK_BYTES);
            self.door.read(IoClass::Journal, self.ring.at(position), &mut self.buf)?;
            self.start = position;
        }
        let offset = (position - self.start) as usize * BLOCK_BYTES;
        let mut block = [0; BLOCK_BYTES];
        if let Some(bytes) = self.buf.get(offset..offset + BLOCK_BYTES) {
            block.copy_from_slice(bytes);
        }
        Ok(Arc::new(block))
    }
}

/// A record and, but for revokes, its image with the place in the ring.
type Recorded = (JournalRecord, Option<(BlockNo, Arc<Block>)>);

/// A transaction found whole.
struct Whole {
    commit: Commit,
    records: Vec<Recorded>,
}

/// Reads the journal in `ring`.
pub fn scan(door: &Door, volume: VolumeId, ring: Ring) -> Result<Scanned, ScanError> {
    let mut bytes = AlignedBuf::zeroed(BLOCK_BYTES);
    door.read(IoClass::Journal, ring.header, &mut bytes)?;
    let Some(block) = bytes.first_chunk::<BLOCK_BYTES>() else { return Ok(Scanned::default()) };
    if header_of(block).is_none_or(|h| h.magic.get() == 0) && block.iter().all(|b| *b == 0) {
        return Ok(Scanned::default());
    }
    let header = JournalHeader::decode(block, volume, ring.header, ring.blocks).map_err(ScanError::Header)?;
    let mut reader = Reader { door, ring, start: 0, buf: AlignedBuf::zeroed(0) };
    let net = Some((header.net_blocks, header.net_inodes));
    let mut found = Scanned { incarnation: header.incarnation, net, ..Scanned::default() };
    let mut images: BTreeMap<(BlockNo, Tenure), Logged> = BTreeMap::new();
    let (mut position, mut sequence, mut chain) = (header.tail_position, header.tail_sequence, header.chain);
    let mut left = ring.blocks;
    while let Some(whole) = read_one(&mut reader, volume, &header, position, sequence, chain, left)? {
        for (record, image) in whole.records {
            match (record.kind, image) {
                (RecordKind::Image, Some((at, bytes))) => {
                    let (block, lock, tenure) = (record.block, record.lock, record.tenure);
                    images.insert((block, tenure), Logged { block, lock, tenure, at, bytes });
                }
                _ if is_planted(Bug::RevokesForgotten) => {}
                _ => images.retain(|(block, _), _| *block != record.block),
            }
        }
        found.transactions += 1;
        found.net = Some((whole.commit.net_blocks, whole.commit.net_inodes));
        position = (position + u64::from(whole.commit.blocks)) % ring.blocks;
        left -= u64::from(whole.commit.blocks);
        sequence += 1;
        chain = whole.commit.chain;
    }
    for behind in 0..left {
        let block = reader.block(position + behind)?;
        let address = ring.at(position + behind);
        let later = Commit::decode(&block, volume, address)
            .map(|c| (c.incarnation, c.sequence))
            .or_else(|_| Descriptor::decode(&block, volume, address).map(|d| (d.incarnation, d.sequence)));
        if let Ok((incarnation, later)) = later
            && incarnation == header.incarnation
            && later > sequence
        {
            return Err(ScanError::Damaged { at: ring.header, sequence, later });
        }
    }
    found.used_blocks = ring.blocks - left;
    found.images = images.into_values().collect();
    Ok(found)
}

/// The transaction at `position`, if it continues the chain.
fn read_one(
    reader: &mut Reader<'_>,
    volume: VolumeId,
    header: &JournalHeader,
    position: u64,
    sequence: u64,
    chain_before: u32,
    left: u64,
) -> Result<Option<Whole>, ScanError> {
    let ring = reader.ring;
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&chain_before.to_le_bytes());
    let mut records = Vec::new();
    let mut at = 0;
    loop {
        if at >= left {
            return Ok(None);
        }
        let block = reader.block(position + at)?;
        let address = ring.at(position + at);
        if let Ok(commit) = Commit::decode(&block, volume, address) {
            let continues = commit.incarnation == header.incarnation
                && commit.sequence == sequence
                && u64::from(commit.blocks) == at + 1
                && (commit.chain == hasher.finalize() || is_planted(Bug::TornCommitBelieved));
            return Ok(continues.then_some(Whole { commit, records }));
        }
        let Ok(descriptor) = Descriptor::decode(&block, volume, address) else { return Ok(None) };
        if descriptor.incarnation != header.incarnation || descriptor.sequence != sequence {
            return Ok(None);
        }
        hasher.update(&block[..]);
        at += 1;
        for record in descriptor.records {
            if record.kind == RecordKind::Revoke {
                records.push((record, None));
                continue;
            }
            if at >= left {
                return Ok(None);
            }
            let image = reader.block(position + at)?;
            hasher.update(&image[..]);
            records.push((record, Some((ring.at(position + at), image))));
            at += 1;
        }
    }
}
