//! One host's journal: a ring of checksummed, chained transactions.
//!
//! * A transaction is whole or absent: its commit block carries a checksum over all of it, chained to the
//!   commit before, so one write order and one flush suffice.
//! * Ring space is reused only after the header that says so (the tail) is durable; else replay would start
//!   in overwritten records.
//! * Records name block, lock and tenure; replay applies them only while the disk shows exactly that.
//!
//! Not for: collecting changes (`store`), deciding what may be replayed (`recovery`).

mod scan;

pub use scan::{Logged, ScanError, Scanned, scan};

use std::collections::VecDeque;
use std::sync::Arc;

use crate::device::{AlignedBuf, DeviceError};
use crate::layout::geometry::Geometry;
use crate::layout::journal::{
    Commit, Descriptor, JournalHeader, JournalRecord, RECORDS_PER_DESCRIPTOR, RecordKind,
};
use crate::layout::{Block, zero_block};
use crate::lease::{Door, IoClass};
use crate::rt::planted::{Bug, is_planted};
use crate::types::{BLOCK_BYTES, BlockNo, Owner, Slot, VolumeId};

/// Where a slot's ring lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring {
    pub header: BlockNo,
    pub first: BlockNo,
    pub blocks: u64,
}

impl Ring {
    pub fn of(geometry: &Geometry, slot: Slot) -> Self {
        let header = geometry.journal(slot);
        Ring { header, first: header.plus(1), blocks: geometry.journal_blocks - 1 }
    }

    pub fn at(&self, position: u64) -> BlockNo {
        self.first.plus(position % self.blocks)
    }
}

/// A transaction in the ring whose blocks are not all in place.
struct Live {
    sequence: u64,
    position: u64,
    blocks: u64,
    chain_before: u32,
    net_before: (i64, i64),
    /// Blocks whose newest image is this transaction's and not in place yet.
    outstanding: usize,
}

/// Appends transactions. One thread at a time.
pub struct Journal {
    door: Arc<Door>,
    volume: VolumeId,
    me: Owner,
    ring: Ring,
    head: u64,
    next_sequence: u64,
    chain: u32,
    /// The slot's net allocation (blocks, inodes) after the last transaction.
    net: (i64, i64),
    live: VecDeque<Live>,
    /// Blocks between the tail on the disk and the head.
    used: u64,
}

/// What a transaction brings along.
pub struct Transaction<'a> {
    pub images: Vec<(JournalRecord, &'a Block)>,
    pub revokes: Vec<JournalRecord>,
    pub net_blocks: i64,
    pub net_inodes: i64,
}

/// Ring blocks written by one command at most.
const BLOCKS_PER_WRITE: usize = 256;

impl Journal {
    /// Begins an empty journal for a new life of the slot, which has allocated `net` (blocks, inodes) so far. What
    /// the ring held before is settled.
    pub fn begin(
        door: Arc<Door>,
        volume: VolumeId,
        geometry: &Geometry,
        me: Owner,
        net: (i64, i64),
    ) -> Result<Self, DeviceError> {
        let ring = Ring::of(geometry, me.slot);
        let mut journal = Journal {
            door,
            volume,
            me,
            ring,
            head: 0,
            next_sequence: 1,
            chain: 0,
            net,
            live: VecDeque::new(),
            used: 0,
        };
        journal.write_tail(0)?;
        Ok(journal)
    }

    /// Ring blocks that a transaction takes.
    pub fn blocks_for(images: usize, revokes: usize) -> u64 {
        let descriptors = (images + revokes).div_ceil(RECORDS_PER_DESCRIPTOR);
        (descriptors + images + 1) as u64
    }

    pub fn capacity_blocks(&self) -> u64 {
        self.ring.blocks
    }

    pub fn free_blocks(&self) -> u64 {
        self.ring.blocks - self.used
    }

    /// Sequence number of the next transaction.
    pub fn next_sequence(&self) -> u64 {
        self.next_sequence
    }

    /// Writes and flushes a transaction; it is durable when this returns Ok. The caller made sure of the
    /// space ([`Journal::free_blocks`]).
    pub fn append(&mut self, tx: &Transaction<'_>) -> Result<u64, DeviceError> {
        let sequence = self.next_sequence;
        let total = Self::blocks_for(tx.images.len(), tx.revokes.len());
        if total > self.free_blocks() {
            return Err(DeviceError::Unsupported { op: "a transaction larger than the journal" });
        }
        let mut out = AlignedBuf::zeroed(total as usize * BLOCK_BYTES);
        let mut next = 0usize;
        let mut put = |bytes: &Block| {
            let start = next * BLOCK_BYTES;
            if let Some(to) = out.get_mut(start..start + BLOCK_BYTES) {
                to.copy_from_slice(bytes);
            }
            next += 1;
        };
        let mut scratch = zero_block();
        let mut position = self.head;
        let mut images = tx.images.iter();
        let mut revokes = tx.revokes.iter();
        loop {
            let some: Vec<_> = images.by_ref().take(RECORDS_PER_DESCRIPTOR).collect();
            let mut records: Vec<JournalRecord> = some.iter().map(|(r, _)| *r).collect();
            let room = RECORDS_PER_DESCRIPTOR - records.len();
            records.extend(revokes.by_ref().take(room).copied());
            if records.is_empty() {
                break;
            }
            let descriptor = Descriptor { incarnation: self.me.incarnation, sequence, records };
            descriptor.encode(self.volume, self.ring.at(position), &mut scratch);
            put(&scratch);
            for (_, image) in &some {
                put(image);
            }
            position += 1 + some.len() as u64;
        }
        let body = (total as usize - 1) * BLOCK_BYTES;
        let chain_before = self.chain;
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&chain_before.to_le_bytes());
        hasher.update(&out[..body]);
        let chain = hasher.finalize();
        let commit = Commit {
            incarnation: self.me.incarnation,
            sequence,
            blocks: total as u32,
            chain,
            net_blocks: tx.net_blocks,
            net_inodes: tx.net_inodes,
        };
        commit.encode(self.volume, self.ring.at(position), &mut scratch);
        out[body..].copy_from_slice(&scratch[..]);
        if self.door.has_unflushed_data() && !is_planted(Bug::DataBehindCommit) {
            // The commit must not reach the medium before the data that it exposes.
            self.door.flush(IoClass::Journal)?;
        }
        if let Err(e) = self.write_ring(&out)
            && !is_planted(Bug::FailedCommitForgotten)
        {
            return Err(e);
        }
        // Everything: what the transaction exposes (data, births) and the lock images it rests on.
        if !is_planted(Bug::CommitUnflushed)
            && let Err(e) = self.door.flush(IoClass::Journal)
            && !is_planted(Bug::FailedFlushForgotten)
        {
            return Err(e);
        }
        self.live.push_back(Live {
            sequence,
            position: self.head,
            blocks: total,
            chain_before,
            net_before: self.net,
            outstanding: tx.images.len(),
        });
        self.head = (self.head + total) % self.ring.blocks;
        self.used += total;
        self.chain = chain;
        self.net = (tx.net_blocks, tx.net_inodes);
        self.next_sequence += 1;
        Ok(sequence)
    }

    fn write_ring(&self, data: &[u8]) -> Result<(), DeviceError> {
        let mut position = self.head;
        let mut rest = data;
        while !rest.is_empty() {
            let to_end = (self.ring.blocks - position) as usize;
            let blocks = (rest.len() / BLOCK_BYTES).min(to_end).min(BLOCKS_PER_WRITE);
            let (now, later) = rest.split_at(blocks * BLOCK_BYTES);
            self.door.write(IoClass::Journal, self.ring.at(position), now)?;
            position = (position + blocks as u64) % self.ring.blocks;
            rest = later;
        }
        Ok(())
    }

    /// `count` blocks of a transaction are in place, or were replaced by a later transaction.
    pub fn settled(&mut self, sequence: u64, count: usize) {
        if let Some(live) = self.live.iter_mut().find(|l| l.sequence == sequence) {
            live.outstanding = live.outstanding.saturating_sub(count);
        }
    }

    /// Gives ring space back: moves the tail past all transactions in place and makes that durable.
    pub fn advance_tail(&mut self) -> Result<(), DeviceError> {
        let done = self.live.iter().take_while(|live| live.outstanding == 0).count();
        if done > 0 {
            // Nothing is given back before the disk says so: a failure leaves all as it was.
            self.write_tail(done)?;
            self.used -= self.live.drain(..done).map(|live| live.blocks).sum::<u64>();
        }
        Ok(())
    }

    /// Writes a header after which the oldest `done` transactions are not replayed any more.
    fn write_tail(&mut self, done: usize) -> Result<(), DeviceError> {
        let (tail_sequence, tail_position, chain, net) = match self.live.get(done) {
            Some(first) => (first.sequence, first.position, first.chain_before, first.net_before),
            None => (self.next_sequence, self.head, self.chain, self.net),
        };
        let incarnation = self.me.incarnation;
        let (net_blocks, net_inodes) = net;
        let header =
            JournalHeader { incarnation, tail_sequence, tail_position, chain, net_blocks, net_inodes };
        let mut block = AlignedBuf::zeroed(BLOCK_BYTES);
        if let Some(bytes) = block.first_chunk_mut::<BLOCK_BYTES>() {
            header.encode(self.volume, self.ring.header, bytes);
        }
        self.door.write(IoClass::Journal, self.ring.header, &block)?;
        self.door.flush(IoClass::Journal)
    }
}

/// A record of an image or of a revoke.
pub fn record(
    kind: RecordKind,
    block: BlockNo,
    lock: BlockNo,
    tenure: crate::types::Tenure,
) -> JournalRecord {
    JournalRecord { kind, block, lock, tenure }
}
