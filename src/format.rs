//! Making a volume: what mkfs does, as a function over any device.
//!
//! Invariants
//!
//! 1. **A crash half-way leaves no half volume that can be opened.** Order, with a flush after each step: the
//!    old copies of the superblock and then the old primary are zeroed; everything but superblocks is
//!    written; the new copies; the new primary. So whoever finds a superblock, also by a copy, finds a
//!    whole volume: the old one untouched, or the new one complete.
//! 2. **Nothing of an earlier format is believed.** A format draws a new volume id, which is bound into
//!    every record, so an old lock, slot or journal block that lies where the new volume has not written is
//!    void. What hosts read before they ever wrote it (locks, slots, headers) is written whole, 4 KiB.
//! 3. **Nothing outside the volume is touched**: not past its size, however long the device is.
//! 4. **Time and randomness come from `rt`**, so that a simulated cluster can be formatted from a seed.
//!
//! mkfs is one of the three exceptions of the rule that lock blocks change only by compare-and-write:
//! they are born here by plain writes. So no host may be at work: [`preflight`] watches for that before,
//! and [`format`] looks once more after the old superblock is gone. A host that mounts in between reads
//! the superblock again under the volume lock, finds it gone and leaves.
//!
//! Not for: deciding whether the device may be overwritten ([`preflight`]), printing, opening devices.

pub mod in_use;
pub mod preflight;
mod write;

use std::time::Duration;

use thiserror::Error;

use self::write::Writer;
use crate::device::{BlockDevice, DeviceError};
use crate::durations::Profile;
use crate::inspect::Volume;
use crate::inspect::superblock::looks_like_lunfs;
use crate::layout::geometry::{Geometry, GeometryError};
use crate::layout::superblock::{COMPAT_UNIT, CheckedUnit, LABEL_BYTES, Superblock};
use crate::layout::zero_block;
use crate::rt::{Instant, random_u64, wall_clock};
use crate::tree::TreeError;
use crate::types::{BLOCK_BYTES_U64, BlockNo, Slot, VolumeId};

/// What to make.
#[derive(Clone, Debug, Default)]
pub struct FormatOptions {
    /// At most [`LABEL_BYTES`] bytes without control characters.
    pub label: String,
    /// The most hosts that can mount at once; None: by size.
    pub slots: Option<u16>,
    /// Bytes of the device to use; None: all.
    pub size_bytes: Option<u64>,
    pub profile: Profile,
    /// User and group that the root directory belongs to: root's unless said otherwise.
    pub root_owner: (u32, u32),
    /// Exactly this geometry instead of one planned from size and slots: for tests.
    pub geometry: Option<Geometry>,
    /// What is known of the unit.
    pub unit: CheckedUnit,
    /// The volume that is overwritten, as [`preflight`] saw it.
    pub previous: Option<preflight::Previous>,
}

/// What was made, and what it took.
#[derive(Clone, Debug)]
pub struct FormatReport {
    pub superblock: Superblock,
    pub bytes_written: u64,
    pub write_commands: u64,
    pub flushes: u64,
    pub elapsed: Duration,
}

/// Why no volume was made.
#[derive(Debug, Error)]
pub enum FormatError {
    #[error("{0}")]
    Geometry(#[from] GeometryError),
    #[error("the label is longer than {LABEL_BYTES} bytes")]
    LabelTooLong,
    #[error("the label contains control characters")]
    LabelControl,
    #[error("logical blocks of {bytes} bytes are not supported, only 512 and 4096")]
    LogicalBlock { bytes: u32 },
    #[error("{size_bytes} bytes were asked for, but the device has only {device_bytes}")]
    DeviceTooSmall { size_bytes: u64, device_bytes: u64 },
    #[error("{step}: {source}")]
    Device { step: &'static str, source: DeviceError },
    #[error("making an empty directory: {0}")]
    Tree(TreeError),
    #[error("a host began to use the volume meanwhile (slot {slot} changed); its superblock was put back")]
    HostAppeared { slot: Slot },
    #[error("the new superblock does not read back: {0}")]
    ReadBack(String),
}

/// The superblock that [`format`] would write: geometry, durations, and a fresh identity.
pub fn plan(device_bytes: u64, options: &FormatOptions) -> Result<Superblock, FormatError> {
    if options.label.len() > LABEL_BYTES {
        return Err(FormatError::LabelTooLong);
    }
    if options.label.chars().any(char::is_control) {
        return Err(FormatError::LabelControl);
    }
    let geometry = match options.geometry {
        Some(geometry) => {
            geometry.check()?;
            geometry
        }
        None => Geometry::plan(options.size_bytes.unwrap_or(device_bytes), options.slots)?,
    };
    if geometry.size_bytes() > device_bytes {
        return Err(FormatError::DeviceTooSmall { size_bytes: geometry.size_bytes(), device_bytes });
    }
    let mut volume = random_bytes();
    // Version 4, variant 1, as RFC 9562 wants a random UUID.
    volume[6] = volume[6] & 0x0f | 0x40;
    volume[8] = volume[8] & 0x3f | 0x80;
    Ok(Superblock {
        volume: VolumeId(volume),
        label: options.label.clone(),
        geometry,
        features: [if options.unit == CheckedUnit::default() { 0 } else { COMPAT_UNIT }, 0, 0],
        durations: options.profile.durations(),
        hash_seed: random_bytes(),
        created_secs: u64::try_from(wall_clock().0).unwrap_or(0),
        generation: 1,
        unit: options.unit.clone(),
    })
}

/// Makes a volume. Whatever the device held is lost. See the module header for order and promises.
pub fn format(dev: &dyn BlockDevice, options: &FormatOptions) -> Result<FormatReport, FormatError> {
    let started = Instant::now();
    let device = dev.geometry();
    if !matches!(device.logical_block_bytes, 512 | 4096) {
        return Err(FormatError::LogicalBlock { bytes: device.logical_block_bytes });
    }
    let superblock = plan(device.size_bytes / BLOCK_BYTES_U64 * BLOCK_BYTES_U64, options)?;
    let mut writer = Writer::new(dev, superblock.volume, superblock.geometry);

    invalidate(dev, &mut writer, options)?;
    writer.flush()?;

    writer.wipe_ends()?;
    writer.system_region(options.root_owner)?;
    writer.journal_headers()?;
    writer.cluster_heads()?;
    writer.flush()?;

    for at in superblock.geometry.superblock_copies() {
        writer.superblock(&superblock, at)?;
    }
    writer.flush()?;
    writer.superblock(&superblock, superblock.geometry.superblock())?;
    writer.flush()?;

    read_back(dev, &superblock)?;
    Ok(FormatReport {
        superblock,
        bytes_written: writer.bytes_written,
        write_commands: writer.write_commands,
        flushes: writer.flushes,
        elapsed: started.elapsed(),
    })
}

/// Zeroes block 0 and every superblock of the volume that is overwritten; puts them back if a host turns
/// out to have joined since it was watched.
fn invalidate(
    dev: &dyn BlockDevice,
    writer: &mut Writer<'_>,
    options: &FormatOptions,
) -> Result<(), FormatError> {
    // A caller that did no preflight still must not leave old copies behind.
    let found = match looks_like_lunfs(dev) {
        Ok(true) => Volume::open(dev).ok().map(|v| v.superblock),
        _ => None,
    };
    let old = options.previous.as_ref().and_then(|p| p.superblock.clone());
    let mut places = vec![BlockNo(0)];
    for superblock in found.iter().chain(&old) {
        places.extend(superblock.geometry.superblock_copies());
    }
    // The primary last: until then the old volume is whole.
    places.sort_unstable_by_key(|at| std::cmp::Reverse(*at));
    places.dedup();
    let zeroes = zero_block();
    let device_blocks = dev.geometry().size_bytes / BLOCK_BYTES_U64;
    places.retain(|at| at.0 < device_blocks);
    for at in &places {
        writer.block(*at, &zeroes, "invalidating the old superblock")?;
    }
    writer.flush()?;
    let Some(previous) = &options.previous else { return Ok(()) };
    let Some(slot) = previous.changed_slot(dev) else { return Ok(()) };
    if let Some(superblock) = &previous.superblock {
        for at in places {
            writer.superblock(superblock, at)?;
        }
        writer.flush()?;
    }
    Err(FormatError::HostAppeared { slot })
}

fn read_back(dev: &dyn BlockDevice, superblock: &Superblock) -> Result<(), FormatError> {
    match Volume::open(dev) {
        Ok(volume) if volume.primary_error.is_none() && volume.superblock == *superblock => Ok(()),
        Ok(_) => Err(FormatError::ReadBack("other bytes came back".into())),
        Err(error) => Err(FormatError::ReadBack(error.to_string())),
    }
}

fn random_bytes() -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&random_u64().to_le_bytes());
    bytes[8..].copy_from_slice(&random_u64().to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests;
