//! Check 3: nobody changes anything past his lease; and the slots, from which leases are reckoned.

use std::time::Duration;

use super::{HostState, Judge, Notes};
use crate::device::sim::Executed;
use crate::layout::demand::DoorbellRecord;
use crate::layout::slot::{SlotRecord, SlotState};
use crate::types::{Owner, Slot, SlotSet};

/// Beats remembered; no command is on its way for longer than these take.
const BEATS_KEPT: usize = 64;

impl Judge {
    /// Was the command issued inside a lease that the issuer could know of? `on_slot`: a swap of a slot may be
    /// a claim, which needs none.
    pub(super) fn judge_lease(&self, notes: &Notes, c: &Executed<'_>, on_slot: bool) {
        let live = notes.hosts.get(&c.host).filter(|h| h.live);
        let Some(host) = live else {
            // A command of a life that ended, executed late, belongs to that life's lease.
            let ended = notes.hosts.get(&c.host).is_some_and(|h| inside(h, c.issued));
            assert!(on_slot || ended, "check 3: {} changes {:#x} without a slot", c.host, c.offset_bytes);
            return;
        };
        if on_slot && !inside(host, c.issued) {
            // A claim of a slot by a new life of a host whose old one is forgotten.
            return;
        }
        assert!(
            inside(host, c.issued),
            "check 3: {} issued a {} of {:#x} at {:?}, past its lease (beats: {:?})",
            c.host,
            c.kind.name(),
            c.offset_bytes,
            c.issued,
            host.beats.iter().rev().take(3).collect::<Vec<_>>()
        );
    }

    pub(super) fn judge_slot(
        &self,
        notes: &mut Notes,
        c: &Executed<'_>,
        slot: Slot,
        before: &SlotRecord,
        after: &SlotRecord,
    ) {
        let who = c.host;
        let lease = Duration::from_millis(after.durations.lease_ms.into());
        if after.incarnation != before.incarnation {
            // A slot is taken as its last life left it, which is recovered first: by the same host, or by another one
            // that waited.
            let last = Owner { slot, incarnation: before.incarnation };
            let of = notes.hosts.iter().find(|(tag, h)| **tag != who && h.me == last).map(|(_, h)| h);
            let over = of.is_none_or(|h| !h.live || h.beats.iter().all(|(_, until)| *until <= c.issued));
            let back = matches!(before.state, SlotState::Live | SlotState::Withdrawn)
                && (before.host_uuid == after.host_uuid || over)
                && before.settled_up_to == after.settled_up_to;
            let free =
                back || matches!(before.state, SlotState::Free | SlotState::Left | SlotState::Recovered);
            assert!(
                free && after.state == SlotState::Live && after.incarnation.0 == before.incarnation.0 + 1,
                "check 2: {who} claims {slot:?} from {:?}: {:?}, life {}",
                before.state,
                after.state,
                after.incarnation.0
            );
            assert!(after.durations.lease_ms > 0, "check 2: {who} claims {slot:?} without durations");
            let me = Owner { slot, incarnation: after.incarnation };
            let beats = vec![(c.executed, c.issued + lease)];
            notes.hosts.insert(who, HostState { me, beats, live: true });
            return;
        }
        let Some(me) = notes.hosts.get(&who).filter(|h| h.live).map(|h| h.me) else {
            panic!("check 2: {who} changes {slot:?} without having claimed it");
        };
        if me.slot != slot {
            let dead = Owner { slot, incarnation: after.incarnation };
            return self.judge_recovery(notes, c, me, dead, before, after);
        }
        if after.settled_up_to != before.settled_up_to && after.state == SlotState::Live {
            // Its own last life is recovered.
            self.forget_births(notes, slot);
        }
        let Some(host) = notes.hosts.get_mut(&who) else { return };
        let own = host.me.slot == slot && host.me.incarnation == after.incarnation;
        assert!(own, "check 2: {who} is {} and changes {slot:?}, life {}", host.me, after.incarnation.0);
        assert!(
            before.state == SlotState::Live && after.beat == before.beat + 1,
            "check 2: {who} beats in {slot:?} from {:?} beat {} to {}",
            before.state,
            before.beat,
            after.beat
        );
        // The last word compares with the last beat and changes nothing but its own slot.
        assert!(
            inside(host, c.issued) || after.state == SlotState::Withdrawn,
            "check 3: {who} issued a beat at {:?}, past its lease: it was to stay dead",
            c.issued
        );
        match after.state {
            SlotState::Live => {
                host.beats.push((c.executed, c.issued + lease));
                if host.beats.len() > BEATS_KEPT {
                    host.beats.remove(0);
                }
            }
            SlotState::Left => {
                let settled = after.settled(after.incarnation);
                assert!(settled, "check 2: {who} left {slot:?} and did not settle its life");
                host.live = false;
            }
            SlotState::Withdrawn => host.live = false,
            SlotState::Unrecoverable => {
                let open = after.unsettled().count() > 1;
                assert!(open, "check 2: {who} gives {slot:?} up, where nothing of an earlier life is open");
                host.live = false;
            }
            other => panic!("check 2: {who} puts its own slot into state {other:?}"),
        }
    }

    /// A swap of another host's slot: only by its one recoverer, and not before its lease is over.
    fn judge_recovery(
        &self,
        notes: &mut Notes,
        c: &Executed<'_>,
        me: Owner,
        dead: Owner,
        before: &SlotRecord,
        after: &SlotRecord,
    ) {
        let who = c.host;
        let lease_over = |notes: &Notes, owner: Owner| {
            let of = notes.hosts.values().find(|h| h.me == owner);
            of.is_none_or(|h| !h.live || h.beats.iter().all(|(_, until)| *until <= c.issued))
        };
        match (before.state, after.state) {
            (SlotState::Live, SlotState::Recovering) => {
                assert!(lease_over(notes, dead), "check 2: {who} ({me}) recovers {dead} inside its lease");
            }
            (SlotState::Withdrawn, SlotState::Recovering) => {}
            (SlotState::Recovering, SlotState::Recovering) => {
                let by = before.recoverer.filter(|by| *by != me);
                let over = by.is_none_or(|by| lease_over(notes, by));
                assert!(over, "check 2: {who} ({me}) takes over a recovery from {by:?}, which lives");
            }
            (SlotState::Recovering, SlotState::Recovered | SlotState::Unrecoverable) => {
                assert_eq!(before.recoverer, Some(me), "check 2: {who} ({me}) ends another's recovery");
                let settled = after.settled_up_to == after.incarnation;
                assert_eq!(settled, after.state == SlotState::Recovered, "check 2: {who} settles {dead}");
                self.forget_births(notes, dead.slot);
            }
            (from, to) => {
                panic!("check 2: {who} ({me}) changes {:?} of {dead}: {from:?} to {to:?}", dead.slot)
            }
        }
        if after.state == SlotState::Recovering {
            assert_eq!(after.recoverer, Some(me), "check 2: {who} ({me}) names another recoverer");
        }
        if let Some(host) = notes.hosts.values_mut().find(|h| h.me == dead) {
            host.live = false;
        }
    }

    pub(super) fn judge_doorbell(
        &self,
        notes: &Notes,
        c: &Executed<'_>,
        slot: Slot,
        before: &DoorbellRecord,
        after: &DoorbellRecord,
    ) {
        let who = c.host;
        assert_eq!(
            after.swap_counter,
            before.swap_counter + 1,
            "check 2: {who} swaps the doorbell of {slot:?}"
        );
        let Some(me) = notes.hosts.get(&who).map(|h| h.me) else {
            panic!("check 2: {who} rings without a slot");
        };
        let silenced = me.slot == slot && after.ringers == SlotSet::EMPTY;
        let rung = after.ringers == before.ringers.with(me.slot);
        assert!(
            silenced || rung,
            "check 2: {who} ({me}) turns the ringers of {slot:?} from {:?} into {:?}",
            before.ringers,
            after.ringers
        );
    }
}

/// Did a beat that had executed by then give a lease beyond it?
fn inside(host: &HostState, issued: Duration) -> bool {
    host.beats.iter().any(|(executed, until)| *executed <= issued && issued < *until)
}
