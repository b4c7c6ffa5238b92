//! A simulated LUN, shared by the simulated hosts of one process, with every fault from one seed.
//!
//! # The fault model
//!
//! Modelled:
//!
//! * Commands of different threads overtake each other: each takes its own time to its execution and
//!   its answer its own time back. A command executes at one instant, atomically.
//! * Unknown outcomes: a lost answer, a command that executes long after the host gave up waiting,
//!   one that never executes, one that executes twice, one that was repeated below the host so that
//!   the host sees the answer of the second execution (the false miscompare), one that is aborted after
//!   it executed. Errors that may have executed, wholly or in part, and errors that certainly did not.
//! * Wrong answers: a compare-and-write answered "miscompare" although it was executed, or although the
//!   block held what was expected.
//! * A host killed or frozen with commands in flight ([`crate::rt::sim::kill_host`],
//!   [`crate::rt::sim::freeze_host`]): a killed host's commands land, or not, or, if they write
//!   several logical blocks, in part. A compare-and-write is never torn, nor is one logical block.
//! * Freezing between the lease check and the execution: a write that sits in the fabric
//!   ([`Fault::Late`]), and a partition that holds commands and lets them go later.
//! * A host cut off from the LUN, hanging or failing; a host fenced, whose commands in flight are
//!   dropped as PREEMPT AND ABORT does.
//! * A volatile cache. A flush makes durable what had *executed* when it was issued. That contains
//!   all that had been answered, and what a read had already shown, which the rule "flush after
//!   seeing an image" needs. A power cut leaves each logical block at its durable bytes or at any
//!   write since, each for itself; compare-and-writes are no exception: a lock can go back in time.
//! * After a power cut, or a partition (a new session), a host's first compare-and-write meets a unit
//!   attention (not executed), and `resets` of its handle rises with the first answer that comes back.
//! * Space never written reads as zeros, discarded space as 0xaf.
//!
//! Not modelled:
//!
//! * Reads that see half of a write that executes meanwhile; bit rot other than by
//!   [`SimLun::overwrite`]; a medium that tears one logical block; FUA and queue tags.
//! * Random delays beyond the hold time that the device publishes. A planned [`Fault::Late`] can go
//!   beyond: that is a device that lies, and no filesystem survives it without reservations.
//! * Compare-and-write against plain writes: both are atomic here. Many real targets guarantee less,
//!   which is why invariant 1 is checked by an observer and not by luck.
//! * Reservations beyond [`SimLun::fence`]; several paths; geometry that changes.
//!
//! Outside a simulation (plain threads, examples) commands execute at once; a late one executes at
//! once too and its host times out, and nothing that needs time to pass happens later.

mod command;
mod engine;
mod fault;
mod handle;
mod lun;
mod media;
mod options;
mod store;

pub use command::{CommandCounts, CommandKind, Executed, LunObserver, OBSERVED_FILL_BYTES};
pub use fault::{Fault, FaultPlan, FaultRule};
pub use handle::SimDevice;
pub use lun::{LunSnapshot, Partition, SimLun};
pub use media::Keep;
pub use options::{Latency, SimLunOptions, Span};
pub use store::DISCARDED;
