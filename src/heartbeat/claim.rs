//! Claiming a slot: the first swap of a mount.
//!
//! * What can be claimed at once: a slot of this host whose process is provably gone, one that was left, one that was
//!   recovered if it was this host's or if its writer was fenced.
//! * What can be claimed by waiting, when nothing else is there: a slot of this host after its dead time, any other after
//!   a quarantine ([`quarantine_after`]); both as seen by us, on our own clock. What that life owed is the claimer's to
//!   recover, before it does anything else in the slot.
//! * The swap decides: a host that lives after all beats, and the claim meets another image.
//!
//! Without the quarantine a late write of the dead host could reach the journal of its successor. Without the waiting,
//! a volume with a slot for each host could not be mounted any more after all of them lost power.
//!
//! Not for: recovering what an earlier life owed (`recovery`), or giving a slot back (`heartbeat`).

use std::fmt;
use std::time::Duration;

use thiserror::Error;

use crate::ats::{Ats, AtsError, Image, Swapped};
use crate::device::FencingKey;
use crate::durations::{dead_after, quarantine_after};
use crate::layout::Nonce;
use crate::layout::geometry::Geometry;
use crate::layout::slot::{Durations, SlotRecord, SlotState};
use crate::layout::superblock::{KNOWN_FEATURES, PROTOCOL_VERSION};
use crate::lease::IoClass;
use crate::rt::planted::{Bug, is_planted};
use crate::rt::{self, Instant};
use crate::types::{Incarnation, Owner, Slot};

/// Who this host is; the same after a restart, different for every `--host` of one machine.
#[derive(Clone, Debug)]
pub struct HostIdentity {
    pub name: String,
    pub uuid: [u8; 16],
    pub boot_id: [u8; 16],
    pub pid: u32,
    pub pid_namespace: u64,
    /// Is the process of this number, of our process id namespace, gone with all its I/O?
    pub is_gone: fn(u32) -> bool,
}

impl HostIdentity {
    /// Was this the slot's life of a process of this host that is provably gone? Then nothing has to be waited
    /// for: the same machine, not restarted since, knows its processes.
    fn outlived(&self, record: &SlotRecord) -> bool {
        matches!(record.state, SlotState::Live | SlotState::Withdrawn)
            && record.host_uuid == self.uuid
            && record.boot_id == self.boot_id
            && record.pid_namespace == self.pid_namespace
            && (self.is_gone)(record.pid)
    }
}

/// Why no slot could be claimed. One sentence each.
#[derive(Debug, Error)]
pub enum ClaimError {
    #[error(
        "all {slots} slots are taken by hosts that live, or wait for fsck; unmount a host or format with more --slots"
    )]
    AllTaken { slots: u16 },
    #[error("no slot was free at once, and waiting for one was cancelled")]
    Cancelled,
    #[error("host \"{name}\" has this volume mounted already (slot {slot}); give another --host name")]
    SameHost { name: String, slot: Slot },
    #[error(
        "host \"{other}\" sees logical blocks of {theirs} bytes, this host {ours}: compare-and-write would not exclude"
    )]
    BlockSize { other: String, theirs: u32, ours: u32 },
    #[error(transparent)]
    Ats(#[from] AtsError),
}

/// How willing we are to take a slot at once; lower is better.
fn rank(record: &SlotRecord, host: &HostIdentity) -> Option<u8> {
    match record.state {
        // What that life owed is brought into place before anything else is done in the slot.
        _ if host.outlived(record) => Some(0),
        // By its own word nothing of it can come any more.
        SlotState::Withdrawn if record.host_uuid == host.uuid => Some(0),
        SlotState::Left | SlotState::Recovered if record.host_uuid == host.uuid => Some(1),
        SlotState::Free => Some(2),
        SlotState::Left => Some(3),
        SlotState::Recovered if record.is_fenced() || is_planted(Bug::SlotReusedEarly) => Some(4),
        SlotState::Recovered
        | SlotState::Live
        | SlotState::Withdrawn
        | SlotState::Recovering
        | SlotState::Unrecoverable => None,
    }
}

/// How long a slot that can't be claimed at once must stay unchanged, and whether it can be claimed then: one that is
/// being recovered is only waited for.
fn prospect(record: &SlotRecord, host: &HostIdentity) -> Option<(Duration, bool)> {
    let own = record.host_uuid == host.uuid;
    let (dead, quarantine) = (dead_after(&record.durations), quarantine_after(&record.durations));
    match record.state {
        SlotState::Live if own => Some((dead, true)),
        SlotState::Live | SlotState::Withdrawn | SlotState::Recovered => Some((quarantine, true)),
        // Its recoverer lives, or its slot can be claimed before this time is over, and then it is recovered from there.
        SlotState::Recovering => Some((quarantine + dead, false)),
        SlotState::Free | SlotState::Left | SlotState::Unrecoverable => None,
    }
}

/// What a claim waits for.
#[derive(Clone, Copy, Debug)]
pub struct Waiting<'r> {
    /// The slot that can be claimed first if nothing changes.
    pub record: &'r SlotRecord,
    /// How long it has been unchanged, and must be.
    pub so_far: Duration,
    pub of: Duration,
}

impl fmt::Display for Waiting<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "no slot is free; one last used by host \"{}\" will be taken if it stays silent for {} s more",
            self.record.host_name,
            self.of.saturating_sub(self.so_far).as_secs() + 1
        )
    }
}

/// A slot as a waiting claim watches it.
struct Watched {
    image: Image<SlotRecord>,
    /// End of the first read that showed this image, issue of the last one.
    since: Instant,
    last_look: Instant,
    /// It was seen to change, and lives.
    moves: bool,
}

/// A claimed slot: who we are now, the image that says so, and when the claim was issued.
pub struct Claim {
    pub me: Owner,
    pub image: Image<SlotRecord>,
    pub issued: Instant,
}

/// Claims a slot for a new life of `host`. Ends with a flush, so that two hosts can't get one name from a
/// device that forgets. `fenced`: this life can be shut out of the device, by the key that its slot says from now
/// on; the caller registers it before anything else is written. `waiting` is told from time to time while there is
/// nothing to be claimed, and says whether to go on.
pub fn claim(
    ats: &Ats,
    geometry: &Geometry,
    host: &HostIdentity,
    durations: Durations,
    fenced: bool,
    waiting: &mut dyn FnMut(&Waiting<'_>) -> bool,
) -> Result<Claim, ClaimError> {
    let mut slots: Vec<Option<Watched>> = geometry.all_slots().map(|_| None).collect();
    let pause = Duration::from_millis(durations.beat_ms.into()) / 2;
    loop {
        look(ats, geometry, host, &mut slots)?;
        let seen = || slots.iter().flatten();
        let at_once = seen().filter_map(|w| Some((rank(&w.image.record, host)?, w)));
        let due = match at_once.min_by_key(|(rank, _)| *rank) {
            Some((_, watched)) => Some(watched),
            None => {
                let slots = geometry.slots;
                let (left, of, next) = seen()
                    .filter(|w| !w.moves)
                    .filter_map(|w| Some((w, prospect(&w.image.record, host)?)))
                    .map(|(w, (of, claimable))| (w.unchanged(), of, claimable, w))
                    // One that was to be recovered by now and was not, is not waited for any longer.
                    .filter(|(unchanged, of, claimable, _)| *claimable || unchanged < of)
                    .map(|(unchanged, of, claimable, w)| (of.saturating_sub(unchanged), of, (claimable, w)))
                    .min_by_key(|(left, ..)| *left)
                    .ok_or(ClaimError::AllTaken { slots })?;
                let (claimable, watched) = next;
                if left.is_zero() && claimable {
                    Some(watched)
                } else {
                    let (record, so_far) = (&watched.image.record, watched.unchanged());
                    if !waiting(&Waiting { record, so_far, of }) {
                        return Err(ClaimError::Cancelled);
                    }
                    None
                }
            }
        };
        match due {
            None => rt::sleep(pause),
            Some(watched) => match take(ats, geometry, host, durations, fenced, &watched.image)? {
                Some(claim) => return Ok(claim),
                None => log::debug!("a slot that could be claimed has changed"),
            },
        }
    }
}

impl Watched {
    fn unchanged(&self) -> Duration {
        self.last_look.saturating_duration_since(self.since)
    }
}

/// Reads all slots once, and says why this host can't mount whatever they show.
fn look(
    ats: &Ats,
    geometry: &Geometry,
    host: &HostIdentity,
    slots: &mut [Option<Watched>],
) -> Result<(), ClaimError> {
    let ours = ats.door().geometry().logical_block_bytes;
    for (slot, watched) in geometry.all_slots().zip(slots) {
        let issued = Instant::now();
        let image: Image<SlotRecord> = ats.read(IoClass::Setup, geometry.slot(slot))?;
        let ended = Instant::now();
        let record = &image.record;
        let changed = watched.as_ref().is_some_and(|w| w.image.record.nonce != record.nonce);
        if record.state == SlotState::Live {
            if record.logical_block_bytes != ours {
                let (other, theirs) = (record.host_name.clone(), record.logical_block_bytes);
                return Err(ClaimError::BlockSize { other, theirs, ours });
            }
            let first = watched.is_none();
            if record.host_uuid == host.uuid
                && !host.outlived(record)
                && (changed || first && moves(ats, geometry, slot, record.nonce)?)
            {
                return Err(ClaimError::SameHost { name: host.name.clone(), slot });
            }
        }
        match watched {
            Some(known) if !changed => known.last_look = known.last_look.max(issued),
            _ => {
                let moves = changed && record.state == SlotState::Live;
                *watched = Some(Watched { image, since: ended, last_look: issued, moves });
            }
        }
    }
    Ok(())
}

/// The swap that claims, if the slot still is as it was seen.
fn take(
    ats: &Ats,
    geometry: &Geometry,
    host: &HostIdentity,
    durations: Durations,
    fenced: bool,
    image: &Image<SlotRecord>,
) -> Result<Option<Claim>, ClaimError> {
    let last = &image.record;
    let Some(slot) = geometry.all_slots().find(|slot| geometry.slot(*slot) == last.address) else {
        return Ok(None);
    };
    let incarnation = Incarnation(last.incarnation.0 + 1);
    let (secs, nanos) = rt::wall_clock();
    let record = SlotRecord {
        state: SlotState::Live,
        incarnation,
        beat: 1,
        host_uuid: host.uuid,
        host_name: host.name.clone(),
        boot_id: host.boot_id,
        pid: host.pid,
        pid_namespace: host.pid_namespace,
        durations,
        logical_block_bytes: ats.door().geometry().logical_block_bytes,
        protocol: PROTOCOL_VERSION,
        features: KNOWN_FEATURES,
        fencing_key: if fenced { FencingKey::of(Owner { slot, incarnation }).value() } else { 0 },
        keyless: last.unsettled().next().is_some() && (last.keyless || last.fencing_key == 0),
        recoverer: None,
        wall_ns: secs.saturating_mul(1_000_000_000).saturating_add(nanos.into()),
        ..last.clone()
    };
    let issued = Instant::now();
    match ats.swap(IoClass::Setup, image, &record)? {
        Swapped::Done(image) => {
            ats.settle(IoClass::Setup, &image)?;
            Ok(Some(Claim { me: Owner { slot, incarnation }, image, issued }))
        }
        Swapped::Miscompare(_) => Ok(None),
    }
}

/// Does the beat of a slot move within a bit more than two of its periods?
fn moves(ats: &Ats, geometry: &Geometry, slot: Slot, seen: Nonce) -> Result<bool, AtsError> {
    let first: Image<SlotRecord> = ats.read(IoClass::Setup, geometry.slot(slot))?;
    let period = Duration::from_millis(first.record.durations.beat_ms.into());
    let until = Instant::now() + period * 5 / 2;
    let mut now = first;
    loop {
        if now.record.nonce != seen {
            return Ok(now.record.state == SlotState::Live);
        }
        if Instant::now() >= until {
            return Ok(false);
        }
        rt::sleep(period / 4);
        now = ats.read(IoClass::Setup, geometry.slot(slot))?;
    }
}
