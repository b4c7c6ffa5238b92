//! Is a volume on a simulated LUN whole? What [`crate::fsck`] finds, looked at from outside the simulation: no
//! command is issued, no time passes, no fault meets the check.
//!
//! Not for: volumes that somebody has mounted.

use std::sync::Arc;

use crate::device::sim::SimLun;
use crate::device::{BlockDevice, CompareOutcome, DeviceError, DeviceGeometry};
use crate::fsck::finding::Finding;
use crate::fsck::{Report, check};

/// The bytes of a LUN as a read would see them now.
struct Contents(SimLun);

fn refused<T>(op: &'static str) -> Result<T, DeviceError> {
    Err(DeviceError::Unsupported { op })
}

impl BlockDevice for Contents {
    fn geometry(&self) -> DeviceGeometry {
        self.0.geometry()
    }
    fn read(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        buf.copy_from_slice(&self.0.contents(offset_bytes, buf.len()));
        Ok(())
    }
    fn write(&self, _: u64, _: &[u8]) -> Result<(), DeviceError> {
        refused("write")
    }
    fn compare_and_write(&self, _: u64, _: &[u8], _: &[u8]) -> Result<CompareOutcome, DeviceError> {
        refused("compare-and-write")
    }
    fn flush(&self) -> Result<(), DeviceError> {
        refused("flush")
    }
    fn discard(&self, _: u64, _: u64) -> Result<(), DeviceError> {
        refused("discard")
    }
    fn write_zeroes(&self, _: u64, _: u64) -> Result<(), DeviceError> {
        refused("write zeroes")
    }
    fn resets(&self) -> u64 {
        0
    }
}

/// What the volume consists of, and everything that is wrong with it.
pub fn audit(lun: &SimLun) -> (Report, Vec<Finding>) {
    let mut findings = Vec::new();
    let report = check(Arc::new(Contents(lun.clone())), &mut findings).expect("reading the LUN's contents");
    (report, findings)
}
