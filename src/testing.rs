//! Not part of the filesystem: what tests need and users don't.
//!
//! * [`cluster`]: simulated hosts with the volume mounted, on one simulated LUN
//! * [`checkers`]: judges every command of every host when it executes
//! * [`audit`]: does fsck find a volume at rest whole?
//! * [`memfs`]: the operations in memory, simple enough to be believed; the reference the real
//!   filesystem is compared with, and a partner for testing the kernel's door
//! * [`model`]: the same random operations on a volume and on the one in memory
//! * [`tripwire`]: kills a host after exactly so many commands
//! * [`memfs_control`]: pulls its strings from another process

pub mod audit;
pub mod checkers;
pub mod cluster;
pub mod memfs;
pub mod memfs_control;
pub mod model;
pub mod tripwire;
