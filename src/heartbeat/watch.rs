//! Watching the other slots: who lives, who left, who is dead.

use std::sync::Arc;
use std::time::Duration;

use super::Stop;
use crate::ats::{Ats, AtsError};
use crate::device::AlignedBuf;
use crate::layout::geometry::Geometry;
use crate::layout::slot::{SlotRecord, SlotState};
use crate::lease::IoClass;
use crate::rt::planted::{Bug, is_planted};
use crate::rt::{Instant, Mutex};
use crate::types::{BLOCK_BYTES, Owner, Slot};

/// What is known of one life of a slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Liveness {
    /// It beats, or has not been silent for long enough to be called dead.
    Living,
    /// It left cleanly or was recovered: nothing of it is outstanding.
    Settled,
    /// Silent for its dead time, withdrawn, or being recovered: what it held must be recovered first.
    Dead,
    /// Its journal can't be replayed; what it held gives errors until fsck.
    Lost,
}

struct Watched {
    record: SlotRecord,
    /// End of the first read that showed this image.
    since: Instant,
    /// Issue of the last read that still showed it.
    last_look: Instant,
    said_dead: bool,
}

/// All slots as this host sees them.
pub struct Peers {
    ats: Arc<Ats>,
    geometry: Geometry,
    me: Owner,
    slots: Mutex<Vec<Option<Watched>>>,
}

/// Slots read in one command at most.
const SLOTS_PER_READ: u16 = 64;

impl Peers {
    pub(super) fn new(ats: Arc<Ats>, geometry: Geometry, me: Owner) -> Self {
        let slots = geometry.all_slots().map(|_| None).collect();
        Peers { ats, geometry, me, slots: Mutex::new(slots) }
    }

    pub(super) fn watch_loop(&self, stop: &Stop, period: Duration) {
        loop {
            let begun = Instant::now();
            if let Err(e) = self.look() {
                log::warn!("watching the other hosts: {e}");
            }
            // More hosts, fewer looks: what 256 hosts read of each other stays a few MiB a second.
            let living = self.living().len() as u32;
            let pause = period * (1 + living / 16);
            if !stop.sleep_until(begun + pause) {
                return;
            }
        }
    }

    /// Reads all slots once.
    pub fn look(&self) -> Result<(), AtsError> {
        let mut first = 0;
        while first < self.geometry.slots {
            let count = SLOTS_PER_READ.min(self.geometry.slots - first);
            let mut buf = AlignedBuf::zeroed(usize::from(count) * BLOCK_BYTES);
            let issued = Instant::now();
            self.ats.door().read(IoClass::Beat, self.geometry.slot(Slot(first)), &mut buf)?;
            let ended = Instant::now();
            for (i, bytes) in buf.chunks_exact(BLOCK_BYTES).enumerate() {
                let slot = Slot(first + i as u16);
                let at = self.geometry.slot(slot);
                match SlotRecord::decode(bytes, self.ats.volume(), at) {
                    Ok(record) => self.note(slot, record, issued, ended),
                    Err(e) => self.ats.damaged::<SlotRecord>(at, &e),
                }
            }
            first += count;
        }
        Ok(())
    }

    /// Does the volume have this slot?
    pub fn has(&self, slot: Slot) -> bool {
        slot.0 < self.geometry.slots
    }

    /// Reads one slot now: for decisions that need a look *after* something else was read.
    pub fn fresh(&self, slot: Slot) -> Result<SlotRecord, AtsError> {
        let issued = Instant::now();
        let image = self.ats.read::<SlotRecord>(IoClass::Lock, self.geometry.slot(slot))?;
        self.note(slot, image.record.clone(), issued, Instant::now());
        Ok(image.record)
    }

    fn note(&self, slot: Slot, record: SlotRecord, issued: Instant, ended: Instant) {
        let mut slots = self.slots.lock();
        let Some(entry) = slots.get_mut(usize::from(slot.0)) else { return };
        match entry {
            Some(watched) if watched.record.nonce == record.nonce => {
                watched.last_look = watched.last_look.max(issued);
                if !watched.said_dead && slot != self.me.slot && watched.silent_too_long() {
                    watched.said_dead = true;
                    log::warn!(
                        "host \"{}\" ({slot:?}, life {}) is dead: no beat for {} ms",
                        watched.record.host_name,
                        watched.record.incarnation.0,
                        watched.silent_for().as_millis()
                    );
                }
            }
            _ => *entry = Some(Watched { record, since: ended, last_look: issued, said_dead: false }),
        }
    }

    /// What became of a life, as last seen.
    pub fn liveness(&self, owner: Owner) -> Liveness {
        if owner == self.me {
            return Liveness::Living;
        }
        let slots = self.slots.lock();
        match slots.get(usize::from(owner.slot.0)) {
            Some(Some(watched)) => judge(&watched.record, watched.silent_too_long(), owner),
            // Not looked at yet.
            _ => Liveness::Living,
        }
    }

    /// The slot's record as last seen.
    pub fn last_seen(&self, slot: Slot) -> Option<SlotRecord> {
        let slots = self.slots.lock();
        slots.get(usize::from(slot.0))?.as_ref().map(|w| w.record.clone())
    }

    /// How long a slot has been silent, as watched by us.
    pub fn silent_for(&self, slot: Slot) -> Option<Duration> {
        let slots = self.slots.lock();
        slots.get(usize::from(slot.0))?.as_ref().map(Watched::silent_for)
    }

    /// All lives that beat or may still beat, but ours.
    pub fn living(&self) -> Vec<Owner> {
        let slots = self.slots.lock();
        (0..)
            .map(Slot)
            .zip(slots.iter())
            .filter_map(|(slot, w)| w.as_ref()?.record.living(slot))
            .filter(|owner| owner.slot != self.me.slot)
            .collect()
    }

    /// Sums of what all slots published: blocks and inodes allocated since mkfs. Ours is left out.
    pub fn others_net(&self) -> (i64, i64) {
        let slots = self.slots.lock();
        let others = (0..).map(Slot).zip(slots.iter()).filter(|(slot, _)| *slot != self.me.slot);
        others
            .filter_map(|(_, w)| w.as_ref())
            .fold((0, 0), |(b, i), w| (b + w.record.net_blocks, i + w.record.net_inodes))
    }
}

impl Watched {
    fn silent_for(&self) -> Duration {
        self.last_look.saturating_duration_since(self.since)
    }

    fn silent_too_long(&self) -> bool {
        let d = self.record.durations;
        let mut limit = u64::from(d.dead_ms) + u64::from(d.hold_ms);
        if is_planted(Bug::DeadTooEarly) {
            limit = u64::from(d.lease_ms) / 2;
        }
        if is_planted(Bug::HoldTimeForgotten) {
            limit = u64::from(d.dead_ms);
        }
        self.record.state == SlotState::Live && self.silent_for() >= Duration::from_millis(limit)
    }
}

/// Pure: what a slot's record says about one of its lives.
fn judge(record: &SlotRecord, silent_too_long: bool, owner: Owner) -> Liveness {
    if record.settled(owner.incarnation) {
        return Liveness::Settled;
    }
    match record.state {
        SlotState::Unrecoverable => Liveness::Lost,
        // Claimed after our last look.
        _ if record.incarnation < owner.incarnation => Liveness::Living,
        // A later life claimed the slot although this one was never settled: nothing is taken from it
        // without recovery.
        _ if record.incarnation > owner.incarnation => Liveness::Dead,
        SlotState::Live if !silent_too_long => Liveness::Living,
        _ => Liveness::Dead,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{BlockNo, Incarnation};

    #[test]
    fn every_state_of_a_slot_is_judged() {
        let owner = |n| Owner { slot: Slot(1), incarnation: Incarnation(n) };
        let mut record = SlotRecord::new_free(BlockNo(17));
        record.incarnation = Incarnation(5);
        record.settled_up_to = Incarnation(4);
        for (state, silent, incarnation, expected) in [
            (SlotState::Live, false, 5, Liveness::Living),
            (SlotState::Live, true, 5, Liveness::Dead),
            (SlotState::Live, false, 4, Liveness::Settled),
            (SlotState::Live, true, 4, Liveness::Settled),
            (SlotState::Live, false, 6, Liveness::Living),
            (SlotState::Withdrawn, false, 5, Liveness::Dead),
            (SlotState::Recovering, false, 5, Liveness::Dead),
            (SlotState::Unrecoverable, false, 5, Liveness::Lost),
            (SlotState::Unrecoverable, false, 4, Liveness::Settled),
        ] {
            record.state = state;
            assert_eq!(judge(&record, silent, owner(incarnation)), expected, "{state:?} {silent}");
        }
        record.state = SlotState::Left;
        record.settled_up_to = Incarnation(5);
        assert_eq!(judge(&record, true, owner(5)), Liveness::Settled);
    }
}
