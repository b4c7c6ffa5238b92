//! LunFS: a clustered filesystem for a LUN that several hosts see at once.
//!
//! Hosts coordinate only through the disk: every lock and every heartbeat is one logical block that
//! is changed by an atomic compare-and-write (SCSI COMPARE AND WRITE, opcode 89h). There is no lock
//! server, no cluster stack and no network between hosts.
//!
//! Rooms, from the bottom up; a room uses only rooms below it (`docs/architecture.md`):
//!
//! * [`rt`]: the one door to time, threads, blocking and randomness, so that a simulation owns them
//! * [`device`]: a small block device trait and its backends
//! * [`layout`]: bytes to structures and back; pure
//! * [`fs`]: the filesystem's operations; knows no FUSE
//! * [`fuse`]: the kernel's door, the only room that knows FUSE
//! * [`cli`]: the command line: parses arguments, calls one function
pub mod cli;
pub mod device;
pub mod fs;
pub mod fuse;
pub mod layout;
pub mod rt;
#[doc(hidden)]
pub mod testing;
pub mod types;
