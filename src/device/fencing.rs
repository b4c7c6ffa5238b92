//! Stopping a host at the device: reservations, or what stands for them.
//!
//! What a backend promises that offers it: once [`Fencing::fence`] returned Ok, no command that was issued under
//! that key changes the device any more, wherever it was held, and later ones fail with
//! [`DeviceError::Fenced`](super::DeviceError::Fenced). That is the one proof against a write that was issued
//! inside a lease and comes after any waiting (a frozen host, a path that holds commands for longer than it says).
//!
//! With SCSI persistent reservations: PREEMPT AND ABORT under a write-exclusive reservation for all registrants
//! (SPC-4 5.13, SBC-3 5.3). Not for: deciding whom to fence, or keeping track of keys (`heartbeat`, `recovery`).

use super::DeviceError;
use crate::types::Owner;

/// Names one life of one host at the device; never zero, never used twice on a volume.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FencingKey(u64);

const LIFE_BITS: u32 = 48;

impl FencingKey {
    /// The key of a mount.
    pub fn of(owner: Owner) -> FencingKey {
        let life = owner.incarnation.0 & ((1 << LIFE_BITS) - 1);
        FencingKey((u64::from(owner.slot.0) + 1) << LIFE_BITS | life)
    }

    pub fn value(self) -> u64 {
        self.0
    }

    /// The slot: small, so that a backend can have a place for each.
    pub fn registrant(self) -> u16 {
        ((self.0 >> LIFE_BITS) - 1) as u16
    }

    /// Raised by each mount in the slot.
    pub fn life(self) -> u64 {
        self.0 & ((1 << LIFE_BITS) - 1)
    }
}

/// Reservations of a device.
pub trait Fencing: Send + Sync {
    /// What this handle changes from now on, it changes under `key`, which is not fenced.
    fn register(&self, key: FencingKey) -> Result<(), DeviceError>;

    /// See the module's header. Fencing a key again, or one that was never registered, succeeds. An error says
    /// nothing: the host may be fenced, or not.
    fn fence(&self, key: FencingKey) -> Result<(), DeviceError>;

    /// Shuts out everybody else, whoever that is: what an earlier volume's hosts left on a unit that nobody uses. How many
    /// were there?
    fn fence_all_others(&self) -> Result<usize, DeviceError> {
        Ok(0)
    }

    /// The handle's key is given back, on a clean leave: nothing is issued under it any more.
    fn unregister(&self) -> Result<(), DeviceError>;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Incarnation, Slot};

    #[test]
    fn a_key_is_its_slot_and_life() {
        for (slot, life) in [(0, 1), (255, 77), (3, (1 << 48) - 1)] {
            let key = FencingKey::of(Owner { slot: Slot(slot), incarnation: Incarnation(life) });
            assert_ne!(key.value(), 0);
            assert_eq!((key.registrant(), key.life()), (slot, life));
        }
    }
}
