//! Commands that pass the door, counted by what they are for.

use std::sync::atomic::AtomicU64;

/// What a command is for; counted apart, because some cost per second and others per operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IoClass {
    /// Own beats and reading those of others.
    Beat,
    /// Doorbells and request blocks looked at or written by the demand thread.
    Demand,
    /// Lock blocks.
    Lock,
    /// The doorbell and request traffic of a wait: hints, which a device may forget.
    Wish,
    Journal,
    /// Metadata blocks in place.
    Metadata,
    Data,
    /// Mounting and leaving.
    Setup,
    /// The last word of a host that withdraws: a swap of its own slot, the one change that passes after the
    /// end of the lease. It compares with the host's last beat, so it changes nothing once somebody else did.
    Farewell,
}

impl IoClass {
    /// Nothing rests on it; its writer looks at it again and puts it right.
    pub(super) fn is_hint(self) -> bool {
        matches!(self, IoClass::Demand | IoClass::Wish)
    }
}

pub(super) const CLASSES: usize = 9;

/// Commands issued through a door, by class.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CommandCounts {
    pub reads: u64,
    pub writes: u64,
    /// Compare-and-writes, whatever their outcome.
    pub swaps: u64,
    pub flushes: u64,
    pub bytes_read: u64,
    pub bytes_written: u64,
}

impl CommandCounts {
    /// All commands.
    pub fn commands(&self) -> u64 {
        self.reads + self.writes + self.swaps + self.flushes
    }

    /// What was added since `earlier`.
    pub fn since(&self, earlier: &CommandCounts) -> CommandCounts {
        CommandCounts {
            reads: self.reads - earlier.reads,
            writes: self.writes - earlier.writes,
            swaps: self.swaps - earlier.swaps,
            flushes: self.flushes - earlier.flushes,
            bytes_read: self.bytes_read - earlier.bytes_read,
            bytes_written: self.bytes_written - earlier.bytes_written,
        }
    }

    /// The sum of two counts.
    pub fn plus(&self, other: &CommandCounts) -> CommandCounts {
        CommandCounts {
            reads: self.reads + other.reads,
            writes: self.writes + other.writes,
            swaps: self.swaps + other.swaps,
            flushes: self.flushes + other.flushes,
            bytes_read: self.bytes_read + other.bytes_read,
            bytes_written: self.bytes_written + other.bytes_written,
        }
    }
}

#[derive(Default)]
pub(super) struct Counters {
    pub(super) reads: AtomicU64,
    pub(super) writes: AtomicU64,
    pub(super) swaps: AtomicU64,
    pub(super) flushes: AtomicU64,
    pub(super) bytes_read: AtomicU64,
    pub(super) bytes_written: AtomicU64,
}
