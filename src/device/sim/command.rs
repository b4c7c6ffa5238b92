//! Commands of the simulated LUN, what observers see of them, and how they are counted.

use std::time::Duration;

use crate::device::{CompareOutcome, DeviceError, FencingKey};
use crate::rt::HostTag;
use crate::rt::sim::{Completion, ThreadTag};

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum CommandKind {
    Read,
    Write,
    CompareAndWrite,
    Flush,
    Discard,
    WriteZeroes,
}

impl CommandKind {
    /// The name that errors carry.
    pub const fn name(self) -> &'static str {
        match self {
            CommandKind::Read => "read",
            CommandKind::Write => "write",
            CommandKind::CompareAndWrite => "compare-and-write",
            CommandKind::Flush => "flush",
            CommandKind::Discard => "discard",
            CommandKind::WriteZeroes => "write-zeroes",
        }
    }

    /// Does it change the medium?
    pub const fn changes(self) -> bool {
        !matches!(self, CommandKind::Read | CommandKind::Flush)
    }
}

/// What a command carries to the LUN.
pub enum Payload {
    Nothing,
    Data(Vec<u8>),
    Compare { expected: Vec<u8>, new: Vec<u8> },
}

/// What comes back: the bytes of a read, the verdict of a compare-and-write.
#[derive(Default)]
pub struct Reply {
    pub data: Vec<u8>,
    pub compared: Option<CompareOutcome>,
}

/// An answer as it arrives at the host, with the count of losses when it left.
pub struct Answer {
    pub result: Result<Reply, DeviceError>,
    pub resets: u64,
}

/// A command from its issue until its answer.
pub struct Command {
    pub id: u64,
    pub host: HostTag,
    pub kind: CommandKind,
    pub offset: u64,
    pub len: u64,
    pub payload: Payload,
    /// Virtual time of the issue; zero outside a simulation.
    pub issued: Duration,
    /// How many executions there had been.
    pub issue_order: u64,
    pub issuer: Option<ThreadTag>,
    /// The key under which the host was registered when it issued the command.
    pub key: Option<FencingKey>,
    pub resets: u64,
    pub completion: Completion<Answer>,
}

/// An execution as an observer sees it. Times are virtual, on no host's clock.
pub struct Executed<'a> {
    pub id: u64,
    pub host: HostTag,
    pub kind: CommandKind,
    pub offset_bytes: u64,
    pub len_bytes: u64,
    /// The bytes of the range before and after; both empty for a flush and for discards and zeroings
    /// beyond [`OBSERVED_FILL_BYTES`]. A torn write shows in `after`.
    pub before: &'a [u8],
    pub after: &'a [u8],
    /// Some for a compare-and-write.
    pub compared: Option<CompareOutcome>,
    pub issued: Duration,
    pub executed: Duration,
    /// The same command executed before (it was repeated below the host).
    pub again: bool,
    /// The host was killed between issue and execution.
    pub issuer_killed: bool,
    /// It failed, and a change may have been made in part.
    pub failed: bool,
}

/// Larger discards and zeroings are observed without their bytes.
pub const OBSERVED_FILL_BYTES: u64 = 1 << 20;

/// Sees every command when it executes, in that order, and judges it: a panic fails the run. It must
/// neither block nor issue commands; `SimLun::contents` is allowed.
pub trait LunObserver: Send + Sync {
    fn executed(&self, command: &Executed<'_>);

    /// The LUN lost power; contents may have gone back to older ones.
    fn power_cut(&self) {}
}

/// Executed commands, counted; one that was repeated below the host counts once.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct CommandCounts {
    pub reads: u64,
    pub writes: u64,
    pub swapped: u64,
    pub miscompared: u64,
    pub flushes: u64,
    pub discards: u64,
    pub write_zeroes: u64,
    pub bytes_read: u64,
    /// By plain writes and compare-and-writes that swapped.
    pub bytes_written: u64,
    /// Commands that were refused, fenced or hit by a planned error.
    pub failed: u64,
}

impl CommandCounts {
    pub fn count(&mut self, kind: CommandKind, len: u64, compared: Option<CompareOutcome>) {
        match (kind, compared) {
            (CommandKind::Read, _) => {
                self.reads += 1;
                self.bytes_read += len;
            }
            (CommandKind::Write, _) => {
                self.writes += 1;
                self.bytes_written += len;
            }
            (CommandKind::CompareAndWrite, Some(CompareOutcome::Swapped)) => {
                self.swapped += 1;
                self.bytes_written += len;
            }
            (CommandKind::CompareAndWrite, _) => self.miscompared += 1,
            (CommandKind::Flush, _) => self.flushes += 1,
            (CommandKind::Discard, _) => self.discards += 1,
            (CommandKind::WriteZeroes, _) => self.write_zeroes += 1,
        }
    }

    /// All executed commands.
    pub fn total(&self) -> u64 {
        self.reads + self.writes + self.swaps() + self.flushes + self.discards + self.write_zeroes
    }

    /// Compare-and-writes with either verdict.
    pub fn swaps(&self) -> u64 {
        self.swapped + self.miscompared
    }

    /// What came on top since `earlier`.
    pub fn since(&self, earlier: &CommandCounts) -> CommandCounts {
        self.combine(earlier, u64::saturating_sub)
    }

    /// Both together.
    pub fn plus(&self, other: &CommandCounts) -> CommandCounts {
        self.combine(other, u64::saturating_add)
    }

    fn combine(&self, other: &CommandCounts, op: fn(u64, u64) -> u64) -> CommandCounts {
        CommandCounts {
            reads: op(self.reads, other.reads),
            writes: op(self.writes, other.writes),
            swapped: op(self.swapped, other.swapped),
            miscompared: op(self.miscompared, other.miscompared),
            flushes: op(self.flushes, other.flushes),
            discards: op(self.discards, other.discards),
            write_zeroes: op(self.write_zeroes, other.write_zeroes),
            bytes_read: op(self.bytes_read, other.bytes_read),
            bytes_written: op(self.bytes_written, other.bytes_written),
            failed: op(self.failed, other.failed),
        }
    }
}
