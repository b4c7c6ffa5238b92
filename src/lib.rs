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
//! * [`recovery`]: brings what a dead host had committed into place
//! * [`fs`]: the filesystem's operations; knows no FUSE
//! * [`fuse`]: the kernel's door, the only room that knows FUSE
//! * [`cli`]: the command line: parses arguments, calls one function
//! * [`tree`]: a B+tree of short values in metadata blocks: directories, extents
//! * [`durations`]: every time span of heartbeat and lease, with the timeline that ties them together
//! * [`inspect`]: read-only eyes on a volume, from any host
//! * [`format`](mod@format): making a volume
//! * [`fsck`]: checking and repairing a volume that nobody uses
//! * [`scrub`]: checking a volume that hosts use meanwhile
//! * [`control`]: commands to a running daemon
pub mod alloc;
pub mod ats;
pub mod cli;
pub mod control;
pub mod device;
pub mod durations;
pub mod format;
pub mod fs;
pub mod fsck;
pub mod fuse;
pub mod heartbeat;
pub mod inspect;
pub mod journal;
pub mod layout;
pub mod lease;
pub mod lock;
pub mod recovery;
pub mod rt;
pub mod scrub;
pub mod store;
#[doc(hidden)]
pub mod testing;
pub mod tree;
pub mod types;
pub mod volume;
