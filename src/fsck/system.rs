//! The first pass: superblocks, slots and what belongs to them, journals, the volume's own locks.

use super::finding::{Kind, Place};
use super::pending::{Journal, Pending};
use super::{Checker, rules};
use crate::layout::demand::{DoorbellRecord, RequestBlock};
use crate::layout::journal::JournalHeader;
use crate::layout::lock::{LockKind, LockMode, LockRecord};
use crate::layout::slot::SlotRecord;
use crate::layout::superblock::Superblock;
use crate::layout::{Block, LayoutError};
use crate::types::{BlockNo, Incarnation, Owner, Slot};

impl Checker<'_, '_, '_> {
    pub(super) fn system(&mut self, journals: &[Journal]) {
        self.superblocks();
        for slot in self.geometry.all_slots() {
            let record = self.slot(slot);
            self.slots.push(record);
        }
        for journal in journals {
            self.journal(journal);
            self.mail(journal.slot);
        }
        self.lock(self.geometry.rename_lock(), LockKind::Rename);
        self.volume_lock();
    }

    fn superblocks(&mut self) {
        let primary = self.geometry.superblock();
        // The one believed is the newest, and the one that most agree on.
        match self.superblock_at(primary) {
            Err(e) => self.find(Kind::Superblock, Place::of_block(primary), e),
            Ok(sb) if sb != self.superblock => {
                self.find(
                    Kind::Superblock,
                    Place::of_block(primary),
                    "older than its copies, or not what they say",
                );
            }
            Ok(_) => {}
        }
        for at in self.geometry.superblock_copies() {
            match self.superblock_at(at) {
                Err(e) => self.find(Kind::SuperblockCopy, Place::of_block(at), e),
                Ok(sb) if sb != self.superblock => {
                    self.find(Kind::SuperblockCopy, Place::of_block(at), "differs from the superblock");
                }
                Ok(_) => {}
            }
        }
    }

    fn superblock_at(&self, at: BlockNo) -> Result<Superblock, String> {
        let block = self.view.block(at).map_err(|e| e.to_string())?;
        let found = Superblock::decode(&block, at, true).map_err(|e| e.to_string())?;
        match found.volume == self.volume {
            true => Ok(found),
            false => Err(format!("belongs to another volume ({})", found.volume)),
        }
    }

    fn slot(&mut self, slot: Slot) -> Option<SlotRecord> {
        let at = self.geometry.slot(slot);
        let decode = |block: &Block| SlotRecord::decode(&block[..], self.volume, at);
        let record = match self.checked(at, decode) {
            Ok(record) => record,
            Err(e) => {
                // Its journal may be that of a life that did not leave.
                (self.owners_unknown, self.names_unknown) = (true, true);
                self.find(Kind::Slot, Place::of_slot(slot), e);
                return None;
            }
        };
        if let Some(text) = rules::slot_contradiction(&record, self.geometry.slots) {
            self.find(Kind::Slot, Place::of_slot(slot), text);
        }
        Some(record)
    }

    /// Doorbell and request block.
    fn mail(&mut self, slot: Slot) {
        let at = self.geometry.doorbell(slot);
        let doorbell = self.checked(at, |block| DoorbellRecord::decode(&block[..], self.volume, at));
        if let Err(e) = doorbell {
            self.find(Kind::Doorbell, Place::of_slot(slot), e);
        }
        let at = self.geometry.request(slot);
        let request = self.checked(at, |block| RequestBlock::decode(block, self.volume, at));
        if let Err(e) = request {
            self.find(Kind::Request, Place::of_slot(slot), e);
        }
    }

    fn journal(&mut self, journal: &Journal) {
        let (slot, place) = (journal.slot, Place::of_slot(journal.slot));
        let mut net = None;
        match &journal.state {
            Pending::Open { life, transactions, blocks, net: after } => {
                let owner = Owner { slot, incarnation: *life };
                let text = format!(
                    "{owner} did not leave; {transactions} transactions with {blocks} blocks are judged as if they were in place"
                );
                net = *after;
                self.find(Kind::JournalPending, place, text);
            }
            Pending::Damaged { life, why } => {
                // What is not in place may own and name anything.
                (self.owners_unknown, self.names_unknown) = (true, true);
                let owner = Owner { slot, incarnation: *life };
                self.find(
                    Kind::JournalDamaged,
                    place,
                    format!("what {owner} committed can't be replayed: {why}"),
                );
            }
            Pending::Settled => self.settled_journal(slot),
        }
        self.net.push(net);
    }

    /// The header of a journal that holds nothing.
    fn settled_journal(&mut self, slot: Slot) {
        let at = self.geometry.journal(slot);
        let ring_blocks = self.geometry.journal_blocks - 1;
        let decode = |block: &Block| JournalHeader::decode(block, self.volume, at, ring_blocks);
        let lived = self.slots.get(usize::from(slot.0)).and_then(|s| s.as_ref()).map(|s| s.incarnation);
        match self.checked(at, decode) {
            Err(e) => self.find(Kind::JournalHeader, Place::of_slot(slot), e),
            Ok(header) if lived.is_some_and(|lived| header.incarnation > lived) => {
                let text = format!("written by life {}, which never was", header.incarnation.0);
                self.find(Kind::JournalHeader, Place::of_slot(slot), text);
            }
            Ok(_) => {}
        }
    }

    fn volume_lock(&mut self) {
        let at = self.geometry.volume_lock();
        let Some(record) = self.lock(at, LockKind::Volume) else { return };
        if let LockMode::Exclusive { owner, .. } = record.mode
            && Some(owner) != self.me
        {
            let text = format!("{owner} took the volume for maintenance and did not end it");
            self.find(Kind::Maintenance, Place::of_block(at), text);
        }
    }

    /// Reads a lock and checks it against what it must be.
    pub(super) fn lock(&mut self, at: BlockNo, kind: LockKind) -> Option<LockRecord> {
        match self.checked(at, |block| LockRecord::decode(&block[..], self.volume, at)) {
            Ok(record) => self.lock_record(record, kind),
            Err(e) => {
                self.find(Kind::LockUnreadable, Place::of_block(at), e);
                None
            }
        }
    }

    /// The lock in a block that was read with others.
    pub(super) fn lock_in(&mut self, at: BlockNo, block: &Block, kind: LockKind) -> Option<LockRecord> {
        match LockRecord::decode(&block[..], self.volume, at) {
            Ok(record) => self.lock_record(record, kind),
            Err(e) => {
                self.find(Kind::LockUnreadable, Place::of_block(at), e.to_string());
                None
            }
        }
    }

    fn lock_record(&mut self, record: LockRecord, kind: LockKind) -> Option<LockRecord> {
        let fault = rules::lock_fault(&record, kind, self.geometry.slots, |slot| self.lives_of(slot));
        match fault {
            Some(fault) => {
                self.found(fault);
                None
            }
            None => Some(record),
        }
    }

    /// The last life of a slot, if the slot can be read.
    fn lives_of(&self, slot: Slot) -> Option<Incarnation> {
        self.slots.get(usize::from(slot.0)).and_then(|s| s.as_ref()).map(|s| s.incarnation)
    }

    /// A block, decoded; a sentence where that fails.
    pub(super) fn checked<T>(
        &self,
        at: BlockNo,
        decode: impl Fn(&Block) -> Result<T, LayoutError>,
    ) -> Result<T, String> {
        let block = self.view.block(at).map_err(|e| e.to_string())?;
        decode(&block).map_err(|e| e.to_string())
    }
}
