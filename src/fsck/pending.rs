//! What journals hold of lives that ended without leaving: judged as if it were in place.
//!
//! Only where an image lies is remembered, and read there when it is asked for: all hosts of a large volume can die
//! with four GiB in their journals. One journal at a time is in memory while it is looked through.
//!
//! Not for: replaying (`recovery`).

use std::collections::BTreeMap;
use std::sync::Arc;

use super::FsckError;
use super::maintenance::before;
use crate::device::BlockDevice;
use crate::inspect::Volume;
use crate::journal::{Ring, ScanError, scan};
use crate::layout::lock::LockMode;
use crate::layout::slot::{SlotRecord, SlotState};
use crate::lease::{Door, Lease};
use crate::types::{BlockNo, Incarnation, Owner, Slot, Tenure};

/// The journal of one slot.
pub struct Journal {
    pub slot: Slot,
    pub state: Pending,
}

pub enum Pending {
    /// Nothing of it counts any more; or the slot can't be read.
    Settled,
    /// Committed and perhaps not in place.
    Open {
        life: Incarnation,
        transactions: u64,
        blocks: u64,
        net: Option<(i64, i64)>,
    },
    Damaged {
        life: Incarnation,
        why: String,
    },
}

/// Looks through the journals of all slots whose last life is not settled.
pub fn look(
    device: &Arc<dyn BlockDevice>,
    volume: &Volume<'_>,
    me: Option<Owner>,
    images: &mut BTreeMap<BlockNo, BlockNo>,
) -> Result<Vec<Journal>, FsckError> {
    // Never claimed: a door of which only reads are asked.
    let door = Door::new(device.clone(), Arc::new(Lease::new()));
    let mut found = Vec::new();
    for slot in volume.geometry().all_slots() {
        let state = match volume.slot(slot) {
            // One that says that it ended, and yet is not settled, contradicts itself: that is named elsewhere.
            Ok(record) if me.is_none_or(|me| me.slot != slot) && is_open(&record) => {
                let given_up = record.state == SlotState::Unrecoverable;
                look_at(&door, volume, slot, record.incarnation, record.settled_up_to, given_up, images)?
            }
            // We took the slot over from a life whose journal we could not replay.
            Ok(record)
                if me.is_some_and(|me| me.slot == slot) && !record.settled(before(record.incarnation)) =>
            {
                let life = before(record.incarnation);
                look_at(&door, volume, slot, life, record.settled_up_to, true, images)?
            }
            _ => Pending::Settled,
        };
        found.push(Journal { slot, state });
    }
    Ok(found)
}

/// Does the slot say that something of its life may not be in place?
fn is_open(record: &SlotRecord) -> bool {
    let ended = matches!(record.state, SlotState::Free | SlotState::Left | SlotState::Recovered);
    !ended && !record.settled(record.incarnation)
}

fn look_at(
    door: &Door,
    volume: &Volume<'_>,
    slot: Slot,
    life: Incarnation,
    settled: Incarnation,
    given_up: bool,
    images: &mut BTreeMap<BlockNo, BlockNo>,
) -> Result<Pending, FsckError> {
    let scanned = match scan(door, volume.id(), Ring::of(volume.geometry(), slot)) {
        Ok(scanned) => scanned,
        Err(ScanError::Device(e)) => return Err(e.into()),
        Err(e) => return Ok(Pending::Damaged { life, why: e.to_string() }),
    };
    if given_up {
        let why = "its recovery was given up; the log of the host that tried says why".into();
        return Ok(Pending::Damaged { life, why });
    }
    if scanned.incarnation <= settled {
        return Ok(Pending::Open { life, transactions: 0, blocks: 0, net: None });
    }
    let owner = Owner { slot, incarnation: scanned.incarnation };
    let mut tenures: BTreeMap<BlockNo, Option<Tenure>> = BTreeMap::new();
    let mut blocks = 0;
    for logged in scanned.images {
        // An image of a tenure that ended is old: what it changed is in place, and may have changed again.
        let tenure = *tenures.entry(logged.lock).or_insert_with(|| match volume.lock(logged.lock) {
            Ok(lock) => match lock.mode {
                LockMode::Exclusive { owner: holder, tenure } if holder == owner => Some(tenure),
                _ => None,
            },
            Err(_) => None,
        });
        if tenure == Some(logged.tenure) {
            images.insert(logged.block, logged.at);
            blocks += 1;
        }
    }
    Ok(Pending::Open { life, transactions: scanned.transactions, blocks, net: scanned.net })
}
