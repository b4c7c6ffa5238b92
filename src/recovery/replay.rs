//! Replay: what a journal holds comes into place, under locks that still show the tenures in which it was made.
//!
//! A full journal may name ten thousand locks, each to be read and swapped once, and as many blocks in as many places; on
//! a LUN that answers within half a millisecond that is ten seconds one after the other. So both are done by several
//! threads ([`many`](super::many)), and each step still ends before the next one begins: all swaps, flush, all writes, flush.
//!
//! Not for: whom to recover, or when (`recovery`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::many::at_once;
use super::{Recovery, RecoveryError, Replayed};
use crate::ats::{Ats, AtsError, Image, Swapped};
use crate::device::AlignedBuf;
use crate::journal::{Logged, Ring, ScanError, Scanned, scan};
use crate::layout::lock::{LockMode, LockRecord};
use crate::layout::{Magic, header_of, verify};
use crate::lease::{Door, IoClass};
use crate::rt::Instant;
use crate::rt::planted::{Bug, is_planted};
use crate::types::{BLOCK_BYTES, BlockNo, Incarnation, Owner, Slot, Tenure};

/// Blocks written by one command at most: 1 MiB.
const BLOCKS_PER_WRITE: usize = 256;

impl Recovery {
    /// Brings what the journal of a slot holds into place, unless that life is settled. Can be repeated.
    pub fn replay(&self, slot: Slot, settled_up_to: Incarnation) -> Result<Replayed, RecoveryError> {
        let begun = Instant::now();
        let ring = Ring::of(&self.geometry, slot);
        let scanned = match scan(self.ats.door(), self.ats.volume(), ring) {
            Ok(scanned) => scanned,
            Err(ScanError::Device(e)) => return Err(e.into()),
            Err(_) if is_planted(Bug::DamagedJournalSkipped) => return Ok(Replayed::default()),
            Err(e) => {
                let owner = Owner { slot, incarnation: settled_up_to };
                return Err(RecoveryError::Unrecoverable { owner, reason: e.to_string() });
            }
        };
        let Scanned { incarnation, transactions, used_blocks, images, net } = scanned;
        if incarnation <= settled_up_to {
            // The life that ended did not come as far as writing its journal.
            return Ok(Replayed::default());
        }
        let owner = Owner { slot, incarnation };
        let resets = self.door().resets();
        let mut replayed =
            Replayed { transactions, used_blocks, ring_blocks: ring.blocks, net, ..Replayed::default() };
        let locks: BTreeSet<BlockNo> = images.iter().map(|logged| logged.lock).collect();
        let (ats, size_blocks) = (self.ats.clone(), self.geometry.size_blocks);
        let pinned = at_once(locks.into_iter().collect(), move |lock: BlockNo| {
            Ok((lock, pin(&ats, size_blocks, owner, lock)?))
        })?;
        let held: BTreeMap<BlockNo, Option<Tenure>> = pinned.into_iter().collect();
        let mut valid = Vec::new();
        for logged in images {
            let tenure = held.get(&logged.lock).copied().flatten();
            let same = tenure == Some(logged.tenure) || is_planted(Bug::ReplayByOwner) && tenure.is_some();
            if !same {
                replayed.skipped += 1;
                continue;
            }
            self.check(owner, &logged)?;
            valid.push(logged);
        }
        // The swaps must not be undone by a device that forgets, after what they protect was written.
        self.ats.settle_since(IoClass::Lock, resets)?;
        replayed.blocks = valid.len() as u64;
        self.put_in_place(valid)?;
        replayed.took = begun.elapsed();
        Ok(replayed)
    }

    /// Is it an image of the block that it is to become, and of one that may be written at all?
    fn check(&self, owner: Owner, logged: &Logged) -> Result<(), RecoveryError> {
        let reason = |reason: String| RecoveryError::Unrecoverable { owner, reason };
        let header = header_of(&logged.bytes[..]);
        let magic = header.map(|h| h.magic.get());
        if header.is_none_or(|h| h.lock.get() != logged.lock.0) || logged.block.0 >= self.geometry.size_blocks
        {
            let (block, lock) = (logged.block, logged.lock);
            return Err(reason(format!("the image of block {block} was not made under lock {lock}")));
        }
        let kinds = [Magic::Inode, Magic::TreeNode, Magic::ClusterHeader, Magic::ClusterMap];
        let Some(kind) = kinds.into_iter().find(|kind| Some(kind.value()) == magic) else {
            return Err(reason(format!("an image of block {} is of no kind that is logged", logged.block)));
        };
        verify(&logged.bytes[..], kind, self.ats.volume(), logged.block).map_err(|e| reason(e.to_string()))
    }

    fn put_in_place(&self, images: Vec<Logged>) -> Result<(), RecoveryError> {
        let mut runs: Vec<Vec<Logged>> = Vec::new();
        for logged in images {
            match runs.last_mut() {
                Some(run)
                    if run.len() < BLOCKS_PER_WRITE
                        && run.last().is_some_and(|last| last.block.plus(1) == logged.block) =>
                {
                    run.push(logged);
                }
                _ => runs.push(vec![logged]),
            }
        }
        let door = self.ats.door().clone();
        at_once(runs, move |run: Vec<Logged>| write_run(&door, &run))?;
        if is_planted(Bug::PublishedUnflushed) {
            return Ok(());
        }
        Ok(self.ats.door().flush(IoClass::Metadata)?)
    }
}

fn write_run(door: &Arc<Door>, run: &[Logged]) -> Result<(), RecoveryError> {
    let Some(first) = run.first() else { return Ok(()) };
    let mut buf = AlignedBuf::zeroed(run.len() * BLOCK_BYTES);
    for (logged, to) in run.iter().zip(buf.chunks_exact_mut(BLOCK_BYTES)) {
        to.copy_from_slice(&logged.bytes[..]);
    }
    Ok(door.write(IoClass::Metadata, first.block, &buf)?)
}

/// The tenure in which this life holds the lock; the lock is swapped once, so that nothing of the dead one
/// can change it any more.
fn pin(ats: &Ats, size_blocks: u64, owner: Owner, lock: BlockNo) -> Result<Option<Tenure>, RecoveryError> {
    if lock.0 >= size_blocks {
        let reason = format!("lock {lock} lies behind the volume's end");
        return Err(RecoveryError::Unrecoverable { owner, reason });
    }
    let mut image: Image<LockRecord> = match ats.read(IoClass::Lock, lock) {
        Ok(image) => image,
        Err(AtsError::Damaged(e)) => {
            return Err(RecoveryError::Unrecoverable { owner, reason: e.to_string() });
        }
        Err(e) => return Err(e.into()),
    };
    loop {
        let tenure = match image.record.mode {
            LockMode::Exclusive { owner: holder, tenure } if holder == owner => tenure,
            _ => return Ok(None),
        };
        if is_planted(Bug::NoSwapBeforeReplay) {
            return Ok(Some(tenure));
        }
        let to = LockRecord { swap_counter: image.record.swap_counter + 1, ..image.record.clone() };
        match ats.swap(IoClass::Lock, &image, &to)? {
            Swapped::Done(_) => return Ok(Some(tenure)),
            Swapped::Miscompare(found) => image = found,
        }
    }
}
