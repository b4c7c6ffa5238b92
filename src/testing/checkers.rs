//! Judges of a simulated LUN: every command of every host, at the moment it executes.
//!
//! What is checked (a violation panics, which fails the run and prints its seed):
//!
//! 1. Lock, slot and doorbell blocks change by compare-and-write only, and compare-and-write touches nothing
//!    else. Exceptions: the birth of inode groups at addresses that were never locks, under the cluster's
//!    exclusive lock. Request blocks and journals are written by their slot's host only.
//! 2. A metadata block is written only while its covering lock, as it stands on the LUN at that moment, names
//!    the writer exclusively, by an image that is durable and, in a replay, was swapped first; and each swap
//!    of a lock is one that its writer may make.
//! 3. No host changes anything past its lease, which is reckoned here from the beats that executed.
//! 4. A clean block that a host serves from its cache equals the LUN ([`Judge::hit_check`]).
//!
//! Invariants: the judge believes the LUN and its own notes, never a host's memory; it knows who a host is
//! from the claims it saw.
//!
//! Not for: mkfs and fsck (they break rule 1 by right), or file data (blocks without our header), of which only
//! the place is judged.

mod lease;
mod locks;
mod writes;

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use crate::device::CompareOutcome;
use crate::device::sim::{CommandKind, Executed, LunObserver, SimLun};
use crate::layout::demand::DoorbellRecord;
use crate::layout::geometry::{GROUP_BLOCKS, GROUP_INODES, Geometry};
use crate::layout::lock::LockRecord;
use crate::layout::slot::SlotRecord;
use crate::layout::superblock::Superblock;
use crate::layout::{Nonce, RECORD_BYTES};
use crate::rt::HostTag;
use crate::store::HitCheck;
use crate::types::{BLOCK_BYTES, BLOCK_BYTES_U64, BlockNo, Incarnation, Owner, Slot, VolumeId};

/// What a block is for, by its address alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Place {
    Superblock,
    Lock,
    Slot(Slot),
    Doorbell(Slot),
    Request(Slot),
    Journal(Slot),
    /// A block of a cluster that is no lock.
    Cluster(u64),
    /// Bodies of system inodes.
    SystemInode,
    Nothing,
}

/// What is known of a host.
pub(super) struct HostState {
    pub me: Owner,
    /// Beats that landed: when they executed, and until when the lease goes that each gives.
    pub beats: Vec<(Duration, Duration)>,
    pub live: bool,
}

#[derive(Default)]
pub(super) struct Notes {
    pub hosts: BTreeMap<HostTag, HostState>,
    /// Locks born since the observation began, by whom and as what; all others follow from the geometry.
    pub born: BTreeMap<BlockNo, (Owner, Nonce)>,
    pub nonces: HashSet<[u8; 16]>,
    /// Locks that a recoverer swapped, as nobody has since: it may replay under them.
    pub pinned: BTreeMap<BlockNo, (Owner, Nonce)>,
    /// Share bits of locks, and the last lives that got them.
    pub shares: BTreeMap<(BlockNo, Slot), Incarnation>,
    /// Commands judged, and those that changed a lock.
    pub judged: u64,
    pub swaps: u64,
}

/// The judge of one LUN.
pub struct Judge {
    pub(super) lun: SimLun,
    pub(super) geometry: Geometry,
    pub(super) volume: VolumeId,
    notes: Mutex<Notes>,
    this: Weak<Judge>,
}

impl Judge {
    pub fn new(lun: &SimLun, superblock: &Superblock) -> Arc<Self> {
        Arc::new_cyclic(|this| Judge {
            lun: lun.clone(),
            geometry: superblock.geometry,
            volume: superblock.volume,
            notes: Mutex::default(),
            this: this.clone(),
        })
    }

    pub(super) fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Commands judged so far, and the swaps of locks among them.
    pub fn judged(&self) -> (u64, u64) {
        let notes = self.notes();
        (notes.judged, notes.swaps)
    }

    /// For `Store::set_hit_check`: what the cache serves is what the LUN has.
    pub fn hit_check(&self, host: HostTag) -> HitCheck {
        let this = self.this.clone();
        Arc::new(move |at, block| {
            let Some(this) = this.upgrade() else { return };
            let on_lun = this.lun.contents(at.offset_bytes(), BLOCK_BYTES);
            if on_lun[..] != block[..] {
                let first = on_lun.iter().zip(&block[..]).position(|(a, b)| a != b).unwrap_or(0);
                panic!(
                    "check 4: {host} serves block {at} from its cache; byte {first} of it differs on the LUN"
                );
            }
        })
    }

    pub(super) fn place(&self, notes: &Notes, at: BlockNo) -> Place {
        let g = &self.geometry;
        let slot_of = |first: BlockNo, each: u64| {
            let index = at.0.checked_sub(first.0)? / each;
            (index < u64::from(g.slots)).then_some(Slot(index as u16))
        };
        if at == g.superblock() || g.superblock_copies().contains(&at) {
            return Place::Superblock;
        }
        if at == g.volume_lock() || at == g.rename_lock() || notes.born.contains_key(&at) {
            return Place::Lock;
        }
        if let Some(slot) = slot_of(g.slot(Slot(0)), 1) {
            return Place::Slot(slot);
        }
        if let Some(slot) = slot_of(g.doorbell(Slot(0)), 1) {
            return Place::Doorbell(slot);
        }
        if let Some(slot) = slot_of(g.request(Slot(0)), 1) {
            return Place::Request(slot);
        }
        if let Some(slot) = slot_of(g.journal(Slot(0)), g.journal_blocks) {
            return Place::Journal(slot);
        }
        let system = g.system_group(0).0..g.system_group(0).0 + g.system_groups() * GROUP_BLOCKS;
        if system.contains(&at.0) {
            let is_lock = (at.0 - system.start) % GROUP_BLOCKS < GROUP_INODES;
            return if is_lock { Place::Lock } else { Place::SystemInode };
        }
        match g.cluster_of(at) {
            Some(cluster) if g.cluster(cluster) == at => Place::Lock,
            Some(cluster) => Place::Cluster(cluster),
            None => Place::Nothing,
        }
    }

    /// The lock record on the LUN now.
    pub(super) fn lock_on_lun(&self, at: BlockNo) -> Option<LockRecord> {
        let bytes = self.lun.contents(at.offset_bytes(), RECORD_BYTES);
        LockRecord::decode(&bytes, self.volume, at).ok()
    }

    pub(super) fn slot_on_lun(&self, slot: Slot) -> Option<SlotRecord> {
        let at = self.geometry.slot(slot);
        let bytes = self.lun.contents(at.offset_bytes(), RECORD_BYTES);
        SlotRecord::decode(&bytes, self.volume, at).ok()
    }

    /// No image of a swap is ever like another.
    pub(super) fn fresh_nonce(&self, notes: &mut Notes, at: BlockNo, nonce: Nonce) {
        assert!(nonce != Nonce::default(), "check 2: the image of block {at} has no nonce");
        assert!(
            notes.nonces.insert(nonce.0),
            "check 2: the nonce of the image of block {at} was used before"
        );
    }

    fn swapped(&self, notes: &mut Notes, c: &Executed<'_>, at: BlockNo, place: Place) {
        let decoded = |e: crate::layout::LayoutError| -> ! {
            panic!("check 1: {} swapped garbage: {e}", c.host);
        };
        match place {
            Place::Lock => {
                let before = LockRecord::decode(c.before, self.volume, at).unwrap_or_else(|e| decoded(e));
                let after = LockRecord::decode(c.after, self.volume, at).unwrap_or_else(|e| decoded(e));
                self.fresh_nonce(notes, at, after.nonce);
                notes.swaps += 1;
                self.judge_lock(notes, c, &before, &after);
            }
            Place::Slot(slot) => {
                let before = SlotRecord::decode(c.before, self.volume, at).unwrap_or_else(|e| decoded(e));
                let after = SlotRecord::decode(c.after, self.volume, at).unwrap_or_else(|e| decoded(e));
                self.fresh_nonce(notes, at, after.nonce);
                self.judge_slot(notes, c, slot, &before, &after);
            }
            Place::Doorbell(slot) => {
                let before = DoorbellRecord::decode(c.before, self.volume, at).unwrap_or_else(|e| decoded(e));
                let after = DoorbellRecord::decode(c.after, self.volume, at).unwrap_or_else(|e| decoded(e));
                self.fresh_nonce(notes, at, after.nonce);
                self.judge_doorbell(notes, c, slot, &before, &after);
            }
            _ => {}
        }
    }
}

impl LunObserver for Judge {
    fn executed(&self, c: &Executed<'_>) {
        if !c.kind.changes() {
            return;
        }
        let mut notes = self.notes();
        notes.judged += 1;
        let (first, last) =
            (c.offset_bytes / BLOCK_BYTES_U64, (c.offset_bytes + c.len_bytes - 1) / BLOCK_BYTES_U64);
        if c.kind == CommandKind::CompareAndWrite {
            let at = BlockNo(first);
            let place = self.place(&notes, at);
            let swappable = matches!(place, Place::Lock | Place::Slot(_) | Place::Doorbell(_));
            let aligned = c.offset_bytes.is_multiple_of(BLOCK_BYTES_U64);
            assert!(
                swappable && aligned,
                "check 1: {} compares and writes at {:#x}, which is no lock, slot or doorbell but {place:?}",
                c.host,
                c.offset_bytes
            );
            self.judge_lease(&notes, c, matches!(place, Place::Slot(_)));
            if c.compared == Some(CompareOutcome::Swapped) {
                self.swapped(&mut notes, c, at, place);
            }
            return;
        }
        self.judge_lease(&notes, c, false);
        self.judge_write(&mut notes, c, first..last + 1);
    }
}
