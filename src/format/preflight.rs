//! May this device be overwritten? Foreign signatures, an older LunFS volume, and hosts at work on it.
//!
//! Invariant: **a volume on which a heartbeat moves is never overwritten**, whatever the administrator
//! insists on. A host is judged as other hosts would judge it: by whether its slot stays unchanged for
//! a full dead time plus hold time of its own. A volume of a newer format, whose slots can't be found, is
//! watched as bytes for the longest dead time of any profile.
//!
//! Not for: use of the device by this machine in other ways ([`super::in_use`]).

use std::time::Duration;

use thiserror::Error;

use crate::device::probe::{Signature, probe};
use crate::device::{AlignedBuf, BlockDevice, DeviceError};
use crate::durations::{Profile, dead_after};
use crate::inspect::superblock::looks_like_lunfs;
use crate::inspect::watch::{ByteWatch, SlotWatch};
use crate::inspect::{InspectError, Volume};
use crate::layout::RECORD_BYTES;
use crate::layout::superblock::Superblock;
use crate::rt::{Instant, sleep};
use crate::types::{BLOCK_BYTES, BLOCK_BYTES_U64, BlockNo, MAX_SLOTS, Slot};

/// A LunFS volume that was found and watched.
#[derive(Clone, Debug)]
pub struct Previous {
    /// None if it is so damaged or so new that its superblock can't be used.
    pub superblock: Option<Superblock>,
    /// The bytes of its slots at the end of the watch.
    slots: Vec<[u8; RECORD_BYTES]>,
}

/// Why the device is not overwritten.
#[derive(Debug, Error)]
pub enum PreflightError {
    #[error("the device carries {}; use --force to overwrite it", list(.0))]
    Signature(Vec<Signature>),
    #[error("the device carries a LunFS volume{}; use --force to overwrite it", named(.label))]
    Lunfs { label: String },
    #[error("host '{host}' (slot {slot}) is using the LunFS volume on this device; unmount it there first")]
    Alive { host: String, slot: Slot },
    #[error("a host is using the LunFS volume on this device (its first blocks change); unmount it first")]
    BytesMove,
    #[error("reading the device: {0}")]
    Device(#[from] DeviceError),
    #[error("reading the LunFS volume on the device: {0}")]
    Inspect(#[from] InspectError),
}

/// Told to the caller while the watch goes on, about four times a second.
#[derive(Clone, Copy, Debug)]
pub struct Watching {
    pub watched: Duration,
    pub of: Duration,
}

/// Looks and, if `force` lets it get that far, watches. Ok(None): nothing of LunFS was there.
pub fn preflight(
    dev: &dyn BlockDevice,
    force: bool,
    progress: &mut dyn FnMut(Watching),
) -> Result<Option<Previous>, PreflightError> {
    let signatures = probe(dev)?;
    if !force && !signatures.is_empty() {
        return Err(PreflightError::Signature(signatures));
    }
    match Volume::open(dev) {
        Ok(volume) if force => watch(&volume, progress).map(Some),
        Ok(volume) => Err(PreflightError::Lunfs { label: volume.superblock.label }),
        Err(error @ InspectError::Device { .. }) => Err(error.into()),
        Err(_) if !looks_like_lunfs(dev)? => Ok(None),
        Err(_) if force => watch_bytes(dev, progress).map(Some),
        Err(_) => Err(PreflightError::Lunfs { label: String::new() }),
    }
}

impl Previous {
    /// A slot that changed since the watch ended; None also if it can't be told any more.
    pub fn changed_slot(&self, dev: &dyn BlockDevice) -> Option<Slot> {
        let geometry = &self.superblock.as_ref()?.geometry;
        let mut now = AlignedBuf::zeroed(usize::from(geometry.slots) * BLOCK_BYTES);
        dev.read(geometry.slot(Slot(0)).offset_bytes(), &mut now).ok()?;
        let changed =
            now.chunks(BLOCK_BYTES).zip(&self.slots).position(|(a, b)| a[..RECORD_BYTES] != b[..])?;
        u16::try_from(changed).ok().map(Slot)
    }
}

fn watch(volume: &Volume<'_>, progress: &mut dyn FnMut(Watching)) -> Result<Previous, PreflightError> {
    let mut watch = SlotWatch::start(volume)?;
    let mut of = watch.full_dead_time();
    loop {
        let watched = watch.watched_for();
        progress(Watching { watched: watched.min(of), of });
        if watched >= of {
            break;
        }
        let next = watched + watch.poll_interval().max(Duration::from_millis(250));
        watch.run(next.min(of))?;
        if let Some(moving) = watch.first_moving() {
            return Err(PreflightError::Alive {
                host: crate::inspect::names::printable(moving.host_name()),
                slot: moving.slot,
            });
        }
        of = of.max(watch.full_dead_time());
    }
    let slots = watch.slots.iter().map(|s| *s.raw()).collect();
    Ok(Previous { superblock: Some(volume.superblock.clone()), slots })
}

fn watch_bytes(
    dev: &dyn BlockDevice,
    progress: &mut dyn FnMut(Watching),
) -> Result<Previous, PreflightError> {
    // Slots, doorbells and requests of every volume of this format lie in its first blocks.
    let blocks = (16 + 3 * u64::from(MAX_SLOTS)).min(dev.geometry().size_bytes / BLOCK_BYTES_U64);
    let of = Profile::ALL.iter().map(|p| dead_after(&p.durations())).max().unwrap_or_default();
    let watch = ByteWatch::start(dev, BlockNo(0), blocks)?;
    let started = Instant::now();
    loop {
        let watched = started.elapsed().min(of);
        progress(Watching { watched, of });
        if watch.moved()? {
            return Err(PreflightError::BytesMove);
        }
        if watched == of {
            return Ok(Previous { superblock: None, slots: Vec::new() });
        }
        sleep(Duration::from_millis(500).min(of - watched));
    }
}

fn list(signatures: &[Signature]) -> String {
    let text = |s: &Signature| format!("{} (at byte {})", s.name, s.offset_bytes);
    signatures.iter().map(text).collect::<Vec<_>>().join(", ")
}

fn named(label: &str) -> String {
    match label {
        "" => String::new(),
        label => format!(" labelled '{}'", crate::inspect::names::printable(label)),
    }
}
