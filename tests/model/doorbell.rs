//! Doorbells: a waiter writes its request and rings; a holder clears its doorbell and reads the requests.

use super::acquire::Plan;
use super::protocol::{Fate, Protocol};
use super::rules::Rule;
use super::state::*;

impl Protocol {
    pub fn ring(&self, s: &mut System, h: usize, fate: Fate) {
        let me = s.hosts[h].name.expect("mounted");
        let mode = self.want(s, h).expect("wants");
        let Plan::Ring(holders) = self.plan(s, h, me, mode) else {
            return;
        };
        self.begin_wait(s, h);
        let rang = self.rang(s, h);
        let Some(holder) = slots_in(holders & !rang).next() else {
            return;
        };
        let counter = s.lun.lock.swap_counter;
        s.hosts[h].since.get_or_insert(counter);
        let bell = s.lun.bells[holder as usize];
        let remembered =
            !self.has(Rule::DoorbellReadFromDisk) && s.hosts[h].remembered_bells & bit(holder) != 0;
        let set = bell.bits & bit(me.slot) != 0;
        if !set && !remembered {
            let bits = bell.bits | bit(me.slot);
            if !self.swap_bell(s, holder, bits, fate) {
                return; // Reads it again.
            }
        }
        if !self.has(Rule::DoorbellReadFromDisk) {
            s.hosts[h].remembered_bells |= bit(holder);
        }
        s.hosts[h].rang = Some((counter, rang | bit(holder)));
    }

    pub fn clear_bell(&self, s: &mut System, h: usize, fate: Fate) {
        let slot = s.hosts[h].name.expect("mounted").slot;
        if self.has(Rule::ClearBeforeReading) {
            s.hosts[h].to_read |= s.lun.bells[slot as usize].bits;
        }
        s.hosts[h].peeked = false;
        s.hosts[h].bell_unsure = !self.swap_bell(s, slot, 0, fate);
    }

    /// Whether the answer came.
    fn swap_bell(&self, s: &mut System, slot: u8, bits: Slots, fate: Fate) -> bool {
        let base = s.lun.bells[slot as usize];
        let nonce = if self.has(Rule::NonceIsUnique) { s.fresh_bell_nonce(slot) } else { 0 };
        let new = Bell { bits, nonce };
        if fate == Fate::Late {
            s.lun.late.push(Late::Bell { slot, base, new });
        } else {
            s.lun.bells[slot as usize] = new;
        }
        if fate != Fate::Answered {
            s.lost_bell_answers_left -= 1;
        }
        fate == Fate::Answered
    }
}
