//! The block device as LunFS sees it: a small trait, its error type and its backends.
//!
//! What every backend promises: reads never come from a page cache that another host can't see
//! invalidated; `compare_and_write` is atomic against every other `compare_and_write` of any host on
//! the same device; an error says first of all whether the command may have been executed. What a
//! backend does not do: retry a compare-and-write, cache anything, or know any LunFS structure.

mod buf;
pub mod check;
pub mod count;
mod error;
mod fencing;
pub mod file;
pub mod iscsi;
pub mod kernel;
pub mod open;
mod open_error;
pub mod probe;
pub mod scsi;
pub mod sim;

pub use buf::AlignedBuf;
pub use error::{DeviceError, Executed};
pub use fencing::{Fencing, FencingKey};
pub use open_error::OpenError;

use std::time::Duration;

/// What a device is: read once when it is opened, again when a backend says it changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceGeometry {
    /// 512 or 4096: the unit of compare-and-write and the alignment of every transfer.
    pub logical_block_bytes: u32,
    pub size_bytes: u64,
    /// Writes that were answered can be lost by a power cut until a flush that began after them ended.
    pub volatile_cache: bool,
    /// The longest time anything below us can hold a write after its issuer is gone.
    pub hold_time: Duration,
}

impl DeviceGeometry {
    /// Refuses a transfer that does not lie on logical blocks of the device.
    pub fn check_range(
        &self,
        op: &'static str,
        offset_bytes: u64,
        len_bytes: u64,
    ) -> Result<(), DeviceError> {
        let unit = u64::from(self.logical_block_bytes);
        let inside = offset_bytes.checked_add(len_bytes).is_some_and(|end| end <= self.size_bytes);
        if inside && offset_bytes.is_multiple_of(unit) && len_bytes.is_multiple_of(unit) {
            return Ok(());
        }
        Err(DeviceError::BadRange { op, offset_bytes, len_bytes })
    }

    /// Refuses images of a compare-and-write that are not one logical block each.
    pub fn check_images(
        &self,
        op: &'static str,
        offset_bytes: u64,
        expected: &[u8],
        new: &[u8],
    ) -> Result<(), DeviceError> {
        let unit = self.logical_block_bytes as usize;
        if expected.len() == unit && new.len() == unit {
            return Ok(());
        }
        let len_bytes = expected.len().max(new.len()) as u64;
        Err(DeviceError::BadRange { op, offset_bytes, len_bytes })
    }
}

/// Answer of a compare-and-write that was executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompareOutcome {
    /// The block equalled the expected image and now holds the new one.
    Swapped,
    /// The block did not equal the expected image and was left alone.
    Miscompare,
}

/// A block device that several hosts share. Offsets and lengths are in bytes and are multiples of
/// the logical block; a violation is an error, not a panic. Every call blocks until the outcome is
/// known or given up; calls from several threads run at once.
pub trait BlockDevice: Send + Sync + 'static {
    fn geometry(&self) -> DeviceGeometry;

    fn read(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<(), DeviceError>;

    fn write(&self, offset_bytes: u64, data: &[u8]) -> Result<(), DeviceError>;

    /// Atomically: if the logical block at `offset_bytes` equals `expected`, write `new`. Both
    /// slices are exactly one logical block long. Not retried below this call.
    fn compare_and_write(
        &self,
        offset_bytes: u64,
        expected: &[u8],
        new: &[u8],
    ) -> Result<CompareOutcome, DeviceError>;

    /// Everything that was answered before this call began survives a power cut once it returns Ok.
    fn flush(&self) -> Result<(), DeviceError>;

    /// Tells the device that the range is unused. Contents are undefined afterwards.
    fn discard(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), DeviceError>;

    fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), DeviceError>;

    /// How often the device may have lost its cache or our registration since it was opened (new
    /// session, unit attention 29h, power cut). A flush proves only writes issued under the same count.
    fn resets(&self) -> u64;

    /// What the device says of itself, for people: name and value.
    fn about(&self) -> Vec<(&'static str, String)> {
        Vec::new()
    }

    /// The name that the unit itself gives, the same on every host and path (SPC-4 7.8.6); `None`: it has none.
    fn unit_name(&self) -> Option<String> {
        None
    }

    /// Is each handle a party of its own to the device's reservations, or is that the machine, whatever is opened?
    fn own_nexus(&self) -> bool {
        true
    }

    /// Reservations, where the device has them or something that keeps their promise.
    fn fencing(&self) -> Option<&dyn Fencing> {
        None
    }
}
