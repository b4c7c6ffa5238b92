//! Claiming a slot: the first swap of a mount.

use thiserror::Error;

use crate::ats::{Ats, AtsError, Image, Swapped};
use crate::device::FencingKey;
use crate::layout::geometry::Geometry;
use crate::layout::slot::{Durations, SlotRecord, SlotState};
use crate::layout::superblock::{KNOWN_FEATURES, PROTOCOL_VERSION};
use crate::lease::IoClass;
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
    #[error("all {slots} slots are taken; unmount a host or format with more --slots")]
    AllTaken { slots: u16 },
    #[error("host \"{name}\" has this volume mounted already (slot {slot}); give another --host name")]
    SameHost { name: String, slot: Slot },
    #[error(
        "host \"{other}\" sees logical blocks of {theirs} bytes, this host {ours}: compare-and-write would not exclude"
    )]
    BlockSize { other: String, theirs: u32, ours: u32 },
    #[error(transparent)]
    Ats(#[from] AtsError),
}

/// How willing we are to take a slot; lower is better.
fn rank(record: &SlotRecord, host: &HostIdentity) -> Option<u8> {
    match record.state {
        // What that life owed is brought into place before anything else is done in the slot.
        _ if host.outlived(record) => Some(0),
        SlotState::Left | SlotState::Recovered if record.host_uuid == host.uuid => Some(1),
        SlotState::Free => Some(2),
        SlotState::Left => Some(3),
        // A late write of a dead host may still reach a recovered slot's journal: only its own host may come
        // back.
        SlotState::Recovered
        | SlotState::Live
        | SlotState::Withdrawn
        | SlotState::Recovering
        | SlotState::Unrecoverable => None,
    }
}

/// A claimed slot: who we are now, the image that says so, and when the claim was issued.
pub struct Claim {
    pub me: Owner,
    pub image: Image<SlotRecord>,
    pub issued: Instant,
}

/// Claims a slot for a new life of `host`. Ends with a flush, so that two hosts can't get one name from a
/// device that forgets. `fenced`: this life can be shut out of the device, by the key that its slot says from now
/// on; the caller registers it before anything else is written.
pub fn claim(
    ats: &Ats,
    geometry: &Geometry,
    host: &HostIdentity,
    durations: Durations,
    fenced: bool,
) -> Result<Claim, ClaimError> {
    loop {
        let mut best: Option<(u8, Slot, Image<SlotRecord>)> = None;
        let ours = ats.door().geometry().logical_block_bytes;
        for slot in geometry.all_slots() {
            let image: Image<SlotRecord> = ats.read(IoClass::Setup, geometry.slot(slot))?;
            let record = &image.record;
            if record.state == SlotState::Live {
                if record.logical_block_bytes != ours {
                    let (other, theirs) = (record.host_name.clone(), record.logical_block_bytes);
                    return Err(ClaimError::BlockSize { other, theirs, ours });
                }
                if record.host_uuid == host.uuid
                    && !host.outlived(record)
                    && moves(ats, geometry, slot, record)?
                {
                    return Err(ClaimError::SameHost { name: host.name.clone(), slot });
                }
            }
            if let Some(rank) = rank(record, host)
                && best.as_ref().is_none_or(|(r, ..)| rank < *r)
            {
                best = Some((rank, slot, image));
            }
        }
        let Some((_, slot, image)) = best else {
            return Err(ClaimError::AllTaken { slots: geometry.slots });
        };
        let incarnation = Incarnation(image.record.incarnation.0 + 1);
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
            logical_block_bytes: ours,
            protocol: PROTOCOL_VERSION,
            features: KNOWN_FEATURES,
            fencing_key: if fenced { FencingKey::of(Owner { slot, incarnation }).value() } else { 0 },
            recoverer: None,
            wall_ns: secs.saturating_mul(1_000_000_000).saturating_add(nanos.into()),
            ..image.record.clone()
        };
        let issued = Instant::now();
        match ats.swap(IoClass::Setup, &image, &record)? {
            Swapped::Done(image) => {
                ats.settle(IoClass::Setup, &image)?;
                return Ok(Claim { me: Owner { slot, incarnation }, image, issued });
            }
            Swapped::Miscompare(_) => log::debug!("{slot:?} was claimed by another host first"),
        }
    }
}

/// Does the beat of a slot move within a bit more than two of its periods?
fn moves(ats: &Ats, geometry: &Geometry, slot: Slot, seen: &SlotRecord) -> Result<bool, AtsError> {
    let period = std::time::Duration::from_millis(seen.durations.beat_ms.into());
    let until = Instant::now() + period * 5 / 2;
    while Instant::now() < until {
        rt::sleep(period / 4);
        let now: Image<SlotRecord> = ats.read(IoClass::Setup, geometry.slot(slot))?;
        if now.record.nonce != seen.nonce {
            return Ok(now.record.state == SlotState::Live);
        }
    }
    Ok(false)
}
