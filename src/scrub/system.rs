//! What no inode or cluster lock covers: superblocks, slots and what belongs to them, the volume's own locks.
//!
//! These blocks change by swaps of one logical block (or never while a volume is mounted), so each is whole whenever it
//! is read, and a second read of the same bytes is certain.

use super::ground::Eyes;
use super::{Scrub, ScrubError};
use crate::fsck::finding::{Finding, Kind, Place};
use crate::fsck::rules;
use crate::layout::Block;
use crate::layout::demand::{DoorbellRecord, RequestBlock};
use crate::layout::journal::JournalHeader;
use crate::layout::lock::{LockKind, LockRecord};
use crate::layout::slot::{SlotRecord, SlotState};
use crate::layout::superblock::Superblock;
use crate::types::{BlockNo, Incarnation, Slot};

impl Scrub<'_> {
    pub(super) fn system(&mut self) -> Result<(), ScrubError> {
        let geometry = self.ground.geometry;
        let primary = geometry.superblock();
        self.superblock(primary, Kind::Superblock)?;
        for at in geometry.superblock_copies() {
            self.superblock(at, Kind::SuperblockCopy)?;
        }
        for slot in geometry.all_slots() {
            self.slot(slot)?;
            self.ground.pay()?;
        }
        for (at, kind) in
            [(geometry.volume_lock(), LockKind::Volume), (geometry.rename_lock(), LockKind::Rename)]
        {
            self.lock(at, kind, None)?;
        }
        Ok(())
    }

    fn find(&mut self, kind: Kind, place: Place, text: impl Into<String>) -> Result<(), ScrubError> {
        self.found(Finding::new(kind, place, text))
    }

    /// The one that this host mounted by is the one that counts; it can't change while hosts hold the volume lock.
    fn superblock(&mut self, at: BlockNo, kind: Kind) -> Result<(), ScrubError> {
        let decoded = self.ground.block(Eyes::Glance, at, at).and_then(|block| {
            let found = Superblock::decode(&block, at, true).map_err(|e| e.to_string())?;
            match found.volume == self.ground.id {
                true => Ok(found),
                false => Err(format!("belongs to another volume ({})", found.volume)),
            }
        });
        match decoded {
            Err(e) => self.find(kind, Place::of_block(at), e),
            Ok(found) if found != self.ground.superblock => {
                self.find(kind, Place::of_block(at), "differs from the one that this host mounted")
            }
            Ok(_) => Ok(()),
        }
    }

    fn record(&self, slot: Slot) -> Result<SlotRecord, String> {
        let at = self.ground.geometry.slot(slot);
        self.ground.checked(Eyes::Glance, at, at, |block| SlotRecord::decode(&block[..], self.ground.id, at))
    }

    fn slot(&mut self, slot: Slot) -> Result<(), ScrubError> {
        let (geometry, id) = (self.ground.geometry, self.ground.id);
        let place = Place::of_slot(slot);
        match self.record(slot) {
            Err(e) => self.find(Kind::Slot, place, e)?,
            Ok(record) => {
                if let Some(text) = rules::slot_contradiction(&record, geometry.slots) {
                    self.find(Kind::Slot, place, text)?;
                }
                if record.state == SlotState::Unrecoverable {
                    let text = "what its last life committed can't be replayed; what it held gives errors";
                    self.find(Kind::JournalDamaged, place, text)?;
                }
                self.journal_header(slot, &record)?;
            }
        }
        let at = geometry.doorbell(slot);
        let doorbell =
            self.ground.checked(Eyes::Glance, at, at, |block| DoorbellRecord::decode(&block[..], id, at));
        if let Err(e) = doorbell {
            self.find(Kind::Doorbell, place, e)?;
        }
        let at = geometry.request(slot);
        let request = self.ground.checked(Eyes::Glance, at, at, |block| RequestBlock::decode(block, id, at));
        match request {
            Err(e) => self.find(Kind::Request, place, e),
            Ok(_) => Ok(()),
        }
    }

    /// The journal of a slot in which nobody lives, unless somebody begins to.
    fn journal_header(&mut self, slot: Slot, record: &SlotRecord) -> Result<(), ScrubError> {
        let (geometry, id) = (self.ground.geometry, self.ground.id);
        let at = geometry.journal(slot);
        let ended = matches!(record.state, SlotState::Free | SlotState::Left | SlotState::Recovered);
        if !ended {
            return Ok(());
        }
        let decode = |block: &Block| JournalHeader::decode(block, id, at, geometry.journal_blocks - 1);
        let header = self.ground.checked(Eyes::Glance, at, at, decode);
        let text = match header {
            Ok(header) if header.incarnation > record.incarnation => {
                format!("written by life {}, which never was", header.incarnation.0)
            }
            Ok(_) => return Ok(()),
            Err(e) => e,
        };
        match self.record(slot) {
            Ok(again) if again.incarnation == record.incarnation => {
                self.find(Kind::JournalHeader, Place::of_slot(slot), text)
            }
            _ => Ok(()),
        }
    }

    /// A lock block. `block`: as it was read with others; read again before anything is said.
    pub(super) fn lock(
        &mut self,
        at: BlockNo,
        kind: LockKind,
        block: Option<&[u8]>,
    ) -> Result<(), ScrubError> {
        let (id, slots) = (self.ground.id, self.ground.geometry.slots);
        if let Some(Ok(record)) = block.map(|bytes| LockRecord::decode(bytes, id, at))
            && rules::lock_fault(&record, kind, slots, |slot| self.known_life(slot)).is_none()
        {
            return Ok(());
        }
        let decode = |block: &Block| LockRecord::decode(&block[..], id, at);
        match self.ground.checked(Eyes::Glance, at, at, decode) {
            Err(e) => self.find(Kind::LockUnreadable, Place::of_block(at), e),
            Ok(record) => {
                // Lives are counted up: what a slot says after the lock was read is enough.
                if let crate::layout::lock::LockMode::Exclusive { owner, .. } = record.mode
                    && owner.slot.0 < slots
                {
                    self.learn_life(owner.slot);
                }
                match rules::lock_fault(&record, kind, slots, |slot| self.known_life(slot)) {
                    Some(fault) => self.found(fault),
                    None => Ok(()),
                }
            }
        }
    }

    fn known_life(&self, slot: Slot) -> Option<Incarnation> {
        self.lives.get(usize::from(slot.0)).copied().flatten()
    }

    fn learn_life(&mut self, slot: Slot) {
        let life = self.record(slot).ok().map(|record| record.incarnation);
        if let Some(known) = self.lives.get_mut(usize::from(slot.0)) {
            *known = life;
        }
    }
}
