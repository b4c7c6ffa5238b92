//! Recovery: what a dead host had committed is brought into place, then what it held is free.
//!
//! The order, each step an image on the disk that outlives the recoverer:
//!
//! 1. Mark the dead one's slot, from the image that was watched for its dead time: only one host wins, and a
//!    host that was not dead after all meets the mark at its next beat and stops.
//! 2. Shut it out of the device, where the device can ([`Fencing`](crate::device::Fencing)).
//! 3. Scan its journal.
//! 4. For each lock under which it logged something: if the lock still shows exactly that life and that
//!    tenure, swap it once (same owner, same tenure, new nonce), so that no late swap of the dead can land.
//! 5. Write the images made under those tenures in place, and flush. Invariant 8: an image made under any other
//!    tenure is old, because its lock left the dead one, and before a lock leaves all of it is in place.
//! 6. Publish in the slot that this life is settled. From then on its locks can be taken by anybody.
//!
//! A recoverer that dies is recovered itself, and after that its mark in the slot is taken over: every step can be done
//! again. A journal that can't be read is a verdict that stays in the slot; what the dead one held gives
//! errors until a repair, and nothing else stops.
//!
//! Replay takes no lock, waits for no host, and never writes a lock block. Orphans are ordinary work of the
//! filesystem, afterwards.
//!
//! Not for: deciding that a host is dead (`heartbeat`), or stopping one that only seems so.

mod many;
mod replay;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use crate::ats::{Ats, AtsError, Image, Swapped};
use crate::device::{DeviceError, FencingKey};
use crate::heartbeat::{Liveness, Peers};
use crate::layout::geometry::Geometry;
use crate::layout::slot::{SlotRecord, SlotState};
use crate::lease::{Door, IoClass};
use crate::rt::planted::{Bug, is_planted};
use crate::types::{BlockNo, Incarnation, Owner, Slot};

/// A slot that can't be marked for so long may be kept by the host that had it.
const MARK_PATIENCE: Duration = Duration::from_secs(3);

/// Why a slot was not recovered by this call.
#[derive(Debug, Error)]
pub enum RecoveryError {
    #[error(transparent)]
    Ats(#[from] AtsError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The mount requires a fence; recovery is tried again.
    #[error("{owner} can't be fenced and this host requires it (fencing=required): {reason}")]
    NotFenced { owner: Owner, reason: String },
    /// It is said in the slot, for fsck to repair.
    #[error("the journal of {owner} can't be replayed: {reason}")]
    Unrecoverable { owner: Owner, reason: String },
}

/// What a replay brought into place.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Replayed {
    pub transactions: u64,
    /// Blocks of the journal that held them, of all it has.
    pub used_blocks: u64,
    pub ring_blocks: u64,
    pub blocks: u64,
    /// Images of tenures that had ended.
    pub skipped: u64,
    pub net: Option<(i64, i64)>,
    pub took: Duration,
}

impl fmt::Display for Replayed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Replayed { transactions, used_blocks, ring_blocks, blocks, skipped, took, .. } = self;
        let ms = took.as_millis();
        write!(f, "{transactions} transactions ({used_blocks} of {ring_blocks} journal blocks), ")?;
        write!(f, "{blocks} blocks in place, {skipped} of ended tenures, {ms} ms")
    }
}

/// Recovers other slots, and the earlier life of our own.
pub struct Recovery {
    ats: Arc<Ats>,
    geometry: Geometry,
    me: Owner,
    /// Nobody's journal is replayed before the device shuts its writer out.
    fence_required: bool,
}

impl Recovery {
    pub fn new(ats: Arc<Ats>, geometry: Geometry, me: Owner, fence_required: bool) -> Self {
        Recovery { ats, geometry, me, fence_required }
    }

    pub fn door(&self) -> &Arc<Door> {
        self.ats.door()
    }

    /// Recovers every slot whose life is dead and that nobody living recovers. One that can't be recovered now
    /// keeps none of the others waiting.
    pub fn recover_the_dead(&self, peers: &Peers) {
        for slot in self.geometry.all_slots().filter(|slot| *slot != self.me.slot) {
            let Some(seen) = peers.last_seen(slot) else { continue };
            let owner = Owner { slot, incarnation: seen.incarnation };
            if seen.incarnation.0 > 0
                && peers.liveness(owner) == Liveness::Dead
                && let Err(e) = self.recover(peers, &seen)
            {
                log::error!("recovering {owner}: {e}");
            }
        }
    }

    /// Recovers the slot that was seen like this and is dead as its watcher judges.
    fn recover(&self, peers: &Peers, seen: &SlotRecord) -> Result<(), RecoveryError> {
        let slot_at = seen.address;
        let image: Image<SlotRecord> = self.ats.read(IoClass::Lock, slot_at)?;
        if image.record.nonce != seen.nonce {
            // It moved since: the watcher judges anew.
            return Ok(());
        }
        let owner = match self.owner(slot_at, seen.incarnation) {
            Some(owner) => owner,
            None => return Ok(()),
        };
        if let Some(by) = seen.recoverer.filter(|by| seen.state == SlotState::Recovering && *by != self.me)
            && !matches!(peers.liveness(by), Liveness::Settled | Liveness::Lost)
            && !is_planted(Bug::RecoveryTakenOver)
        {
            // It lives; or it is dead, and what it was putting in place may still come: it is recovered itself
            // first, fenced where that can be. Each in a chain of marks died later than the one it marked, so
            // somebody can always begin.
            return Ok(());
        }
        log::warn!("recovering host \"{}\" ({owner}), which is {}", seen.host_name, state_word(seen.state));
        let mut me = self.me;
        if is_planted(Bug::RecovererWithoutIncarnation) {
            me.incarnation = Incarnation(0);
        }
        let marked = SlotRecord {
            state: SlotState::Recovering,
            beat: seen.beat + 1,
            recoverer: Some(me),
            ..image.record.clone()
        };
        let image = match self.ats.swap_within(IoClass::Lock, &image, &marked, Some(MARK_PATIENCE)) {
            Ok(Swapped::Done(image)) => image,
            // Another host was faster, or it lives.
            Ok(Swapped::Miscompare(_)) => return Ok(()),
            // On a device that is emulated it may be the dead one itself that keeps its slot: stopped in the middle of a
            // beat. It has been silent for its dead time, so nothing is lost by shutting it out before its slot says why.
            Err(e @ AtsError::Device(_)) => {
                log::warn!("marking the slot of {owner}: {e}; fencing it first");
                self.fence_all(seen)?;
                return Err(e.into());
            }
            Err(e) => return Err(e.into()),
        };
        self.ats.settle(IoClass::Lock, &image)?;
        let fenced = self.stop_the_writer(owner, seen)?;
        let ended = match self.replay(owner.slot, seen.settled_up_to) {
            Ok(replayed) => Ok(replayed),
            Err(RecoveryError::Unrecoverable { reason, .. }) => Err(reason),
            Err(passing) => return Err(passing),
        };
        let mut record = image.record.clone();
        record.beat += 1;
        match &ended {
            Ok(replayed) => {
                record.state = SlotState::Recovered;
                record.settled_up_to = record.incarnation;
                record.keyless = false;
                if fenced {
                    record.fenced_up_to = record.incarnation;
                }
                if let Some((blocks, inodes)) = replayed.net {
                    (record.net_blocks, record.net_inodes) = (blocks, inodes);
                }
            }
            Err(_) => record.state = SlotState::Unrecoverable,
        }
        let published = match self.ats.swap(IoClass::Lock, &image, &record)? {
            Swapped::Done(published) => published,
            Swapped::Miscompare(found) => {
                log::warn!(
                    "the slot of {owner} was changed while it was recovered: {:?}",
                    found.record.state
                );
                return Ok(());
            }
        };
        self.ats.settle(IoClass::Lock, &published)?;
        peers.fresh(owner.slot)?;
        match ended {
            Ok(replayed) => {
                log::warn!("recovered {owner}: {replayed}");
                Ok(())
            }
            Err(reason) => Err(RecoveryError::Unrecoverable { owner, reason }),
        }
    }

    /// Nothing of the dead one may come any more: proved by the device (true), or, where it can't, by having waited.
    fn stop_the_writer(&self, owner: Owner, seen: &SlotRecord) -> Result<bool, RecoveryError> {
        let waited = match seen.state {
            SlotState::Withdrawn => "its own word that nothing of it can come any more",
            _ => "its dead time and its device's hold time, which are over",
        };
        let keyless = seen.keyless || seen.fencing_key == 0;
        let fenced = match self.fence_all(seen) {
            Err(e) if self.fence_required => {
                return Err(RecoveryError::NotFenced { owner, reason: e.to_string() });
            }
            Err(e) => {
                log::error!("fencing {owner}: {e}; the proof that it is silent is {waited}");
                return Ok(false);
            }
            Ok(asked) => asked && !keyless,
        };
        if fenced {
            log::warn!("{owner} has been fenced: the device refuses what may still come of it");
        } else if self.fence_required {
            return Err(RecoveryError::NotFenced { owner, reason: "it mounted without fencing".into() });
        } else {
            log::warn!("{owner} has not been fenced; the proof that it is silent is {waited}");
        }
        Ok(fenced)
    }

    /// Shuts every life that the slot has not settled out of the device: one that took the slot over and died may have
    /// left that of an earlier one to us. False: the device can't.
    fn fence_all(&self, seen: &SlotRecord) -> Result<bool, DeviceError> {
        let (Some(fencing), Some(slot)) = (self.ats.door().fencing(), self.slot(seen.address)) else {
            return Ok(false);
        };
        if is_planted(Bug::NotFenced) {
            return Ok(false);
        }
        for incarnation in seen.unsettled() {
            fencing.fence(FencingKey::of(Owner { slot, incarnation }))?;
        }
        Ok(true)
    }

    /// The same for the earlier lives of our own slot, which ended before it could be claimed.
    pub fn fence_earlier(&self, mine: &SlotRecord) -> Result<(), RecoveryError> {
        let earlier = Incarnation(mine.incarnation.0.saturating_sub(1));
        let open = SlotRecord { incarnation: earlier, ..mine.clone() };
        if open.settled(earlier) {
            return Ok(());
        }
        let fenced = self.fence_all(&open)? && !mine.keyless;
        if self.fence_required && !fenced {
            let owner = Owner { slot: self.me.slot, incarnation: earlier };
            return Err(RecoveryError::NotFenced { owner, reason: "it mounted without fencing".into() });
        }
        Ok(())
    }

    fn slot(&self, slot_at: BlockNo) -> Option<Slot> {
        self.geometry.all_slots().find(|slot| self.geometry.slot(*slot) == slot_at)
    }

    fn owner(&self, slot_at: BlockNo, incarnation: Incarnation) -> Option<Owner> {
        Some(Owner { slot: self.slot(slot_at)?, incarnation })
    }
}

fn state_word(state: SlotState) -> &'static str {
    match state {
        SlotState::Withdrawn => "withdrawn",
        SlotState::Recovering => "half recovered by a host that is gone",
        _ => "dead",
    }
}
