//! How a dead host is stopped: the mount's choice, and what the volume says of its unit.
//!
//! On a LUN either all hosts of a volume mount with reservations or none: who is not registered is refused by a
//! reservation, and who can't be fenced makes the fences of the others worth nothing. So the superblock decides, by what
//! mkfs found out of the unit, and a mount may only agree. Image files and loop devices have no reservation that refuses
//! strangers; there each mount chooses for itself.

use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

use crate::device::open::{OpenOptions, open_device, shown};
use crate::device::{BlockDevice, OpenError};

/// Whether a dead host is shut out of the device before it is recovered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum FencingMode {
    /// Where the device can; else the lease and the waiting must do.
    #[default]
    Auto,
    /// Always: mounting fails where the device can't, and a dead host that can't be fenced is not recovered.
    Required,
    /// Never.
    Lease,
}

impl FromStr for FencingMode {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(FencingMode::Auto),
            "required" => Ok(FencingMode::Required),
            "lease" => Ok(FencingMode::Lease),
            _ => Err("auto, required or lease".into()),
        }
    }
}

/// Why a device was not opened for a host of its volume.
#[derive(Debug, Error)]
pub enum HostOpenError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(
        "{device}: fencing=lease, but the hosts of this volume mount with reservations, and the unit refuses who is not \
         registered; mount with fencing=auto"
    )]
    LeaseAmongReservations { device: String },
    #[error(
        "{device}: fencing=required, but the hosts of this volume mount without reservations: when it was made they were \
         not wanted, or trying showed that they can't be trusted (lunfs check-device says why)"
    )]
    ReservationsNotUsed { device: String },
    #[error("{device}: the hosts of this volume mount with reservations, and this unit has none")]
    ReservationsGone { device: String },
}

/// Opens the device as a host of its volume does: with reservations, if the volume's hosts use them.
pub fn open_as_host(
    spec: &str,
    how: OpenOptions,
    mode: FencingMode,
) -> Result<Arc<dyn BlockDevice>, HostOpenError> {
    let device = open_device(spec, OpenOptions { reservations: false, ..how.clone() })?;
    let Some(name) = device.unit_name() else { return Ok(device) };
    // What is no volume is told so by whoever reads it next.
    let Ok(superblock) = super::read_superblock(&*device, true) else { return Ok(device) };
    let unit = superblock.unit;
    if !unit.name.is_empty() && unit.name != name {
        log::warn!(
            "{}: the volume was made on the unit {}, and this is {name}: perhaps a copy. What was found out of that \
             unit need not hold for this one (lunfs check-device)",
            shown(spec),
            unit.name
        );
    }
    match (mode, unit.reservations) {
        (FencingMode::Lease, true) => {
            return Err(HostOpenError::LeaseAmongReservations { device: shown(spec) });
        }
        (FencingMode::Required, false) => {
            return Err(HostOpenError::ReservationsNotUsed { device: shown(spec) });
        }
        (_, false) => return Ok(device),
        (_, true) => {}
    }
    drop(device);
    let device = open_device(spec, OpenOptions { reservations: true, ..how })?;
    if device.fencing().is_none() {
        return Err(HostOpenError::ReservationsGone { device: shown(spec) });
    }
    Ok(device)
}
