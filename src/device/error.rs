//! Errors of the device room.

use thiserror::Error;

/// The first question about any failed command: may the device have executed it, or may it do so yet?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Executed {
    /// Certainly not, and it never will be.
    No,
    /// Unknown: executed, not executed, or in part. Only [`DeviceError::TimedOut`] means that it may also be
    /// still on its way and be executed later.
    Maybe,
}

/// Why a command failed.
#[derive(Clone, Debug, Error)]
pub enum DeviceError {
    #[error("{op} at byte {offset_bytes}: {source}")]
    Io {
        op: &'static str,
        offset_bytes: u64,
        executed: Executed,
        #[source]
        source: std::sync::Arc<std::io::Error>,
    },
    /// No answer in time; the command may still be executed.
    #[error("{op} at byte {offset_bytes}: no answer within {waited_ms} ms")]
    TimedOut { op: &'static str, offset_bytes: u64, waited_ms: u64 },
    /// Perhaps executed, wholly or in part, and not on its way any more: a plain change can be made again by who still
    /// may, and is known then.
    #[error("{op} at byte {offset_bytes}: {why}; perhaps executed")]
    Interrupted { op: &'static str, offset_bytes: u64, why: String },
    /// Offset or length is not a multiple of the logical block, or lies beyond the end.
    #[error("{op} at byte {offset_bytes}, {len_bytes} bytes: not aligned or outside the device")]
    BadRange { op: &'static str, offset_bytes: u64, len_bytes: u64 },
    /// Another host keeps us out (reservation conflict or its emulation): we were fenced.
    #[error("{op} at byte {offset_bytes}: refused, this host has been fenced")]
    Fenced { op: &'static str, offset_bytes: u64 },
    /// The lease door refused the command before it was issued, or the answer came after the lease.
    #[error("{op} at byte {offset_bytes}: refused, the lease of this host has ended")]
    LeaseEnded { op: &'static str, offset_bytes: u64, executed: Executed },
    /// The device can't do this at all.
    #[error("the device does not support {op}")]
    Unsupported { op: &'static str },
}

impl DeviceError {
    /// Wraps an operating system error.
    pub fn io(op: &'static str, offset_bytes: u64, executed: Executed, source: std::io::Error) -> Self {
        DeviceError::Io { op, offset_bytes, executed, source: std::sync::Arc::new(source) }
    }

    /// A change of a device that may only be read.
    pub fn write_protected(op: &'static str, offset_bytes: u64) -> Self {
        let source = std::io::Error::from_raw_os_error(libc::EROFS);
        DeviceError::io(op, offset_bytes, Executed::No, source)
    }

    /// May the command be executed after this error was returned? For at most the device's hold time.
    pub fn may_come_later(&self) -> bool {
        matches!(self, DeviceError::TimedOut { .. })
    }

    /// Did the device refuse it because this host was shut out?
    pub fn is_fenced(&self) -> bool {
        matches!(self, DeviceError::Fenced { .. })
    }

    /// May a plain change be made again now, by who still may?
    pub fn is_to_be_made_again(&self) -> bool {
        matches!(self, DeviceError::Interrupted { .. })
    }

    /// Did the device run out of room below what it promised?
    pub fn is_full(&self) -> bool {
        matches!(self, DeviceError::Io { source, .. } if source.raw_os_error() == Some(libc::ENOSPC))
    }

    /// May the command have been executed, or be executed later?
    pub fn executed(&self) -> Executed {
        match self {
            DeviceError::Io { executed, .. } | DeviceError::LeaseEnded { executed, .. } => *executed,
            DeviceError::TimedOut { .. } | DeviceError::Interrupted { .. } => Executed::Maybe,
            DeviceError::BadRange { .. } | DeviceError::Fenced { .. } | DeviceError::Unsupported { .. } => {
                Executed::No
            }
        }
    }
}
